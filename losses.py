"""Losses on embeddings: contrastive and triplet, on given pairs and triplets or on those selected in a batch.

`ContrastiveLoss` and `TripletLoss` take the outputs of SiameseNet and TripletNet. The online losses take one batch of
embeddings with its labels and a selector, any object with `get_pairs` or `get_triplets`:

    loss = OnlineContrastiveLoss(margin=1.0, pair_selector=HardNegativePairSelector())(embeddings, labels)

Letters: A anchors, R references, B batch, D embedding dimension, K samples of the largest class, P pairs, T triplets.
"""

import contextlib
import copy
import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContrastiveLoss(nn.Module):
    """Contrastive loss of embedding pairs (Hadsell, Chopra and LeCun 2006, equation 4).

    With d the Euclidean distance of a pair and target 1 for the same class, 0 for different ones, the mean (or sum) of
    0.5 * (target * d^2 + (1 - target) * relu(margin - d)^2).

    Args:
        margin: the distance beyond which a negative pair costs nothing.

    >>> x1, x2 = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.5]])
    >>> ContrastiveLoss(margin=1.0)(x1, x2, torch.tensor([1, 0]))  # (25 + 0.5^2) / 2 / 2
    tensor(6.3125)
    """

    def __init__(self, margin: float) -> None:
        super().__init__()
        _check_margin(margin, lowest=0)
        self.margin = margin

    def forward(self, x1: Tensor, x2: Tensor, target: Tensor | None = None, size_average: bool = True) -> Tensor:
        """Compute the loss.

        Args:
            x1, x2: embeddings (P, D), the outputs of SiameseNet.
            target: (P,) or (P, 1), 1 where the pair is of one class, 0 where it is not.
            size_average: mean over the pairs; False for their sum.

        Returns:
            Scalar tensor, float32 at least.

        Raises:
            ValueError, TypeError: for other shapes or arguments, and targets below 0 or above 1; on a GPU, which would
                have to be read, the loss of these is NaN.
        """
        remedy = "ContrastiveLoss takes the two outputs of SiameseNet and a target (P,); for one batch with labels use "
        remedy += "OnlineContrastiveLoss"
        if target is None:
            raise TypeError(f"{remedy}; got no target")
        _check_flag(remedy, size_average)
        _check_same_shape(remedy, x1, x2)
        if target.shape not in ((len(x1),), (len(x1), 1)):
            raise ValueError(f"{remedy}; got {len(x1)} pairs and a target of shape {tuple(target.shape)}")
        distances = _distances(x1, x2, squared=False)  # (P,)
        target = _checked_target(target.reshape(-1).to(distances.dtype))
        losses = 0.5 * (target * _distances(x1, x2) + (1 - target) * F.relu(self.margin - distances).square())
        return losses.mean() if size_average else losses.sum()


class TripletLoss(nn.Module):
    """Triplet loss of embedding triplets (Schroff et al. 2015, equation 3).

    The mean (or sum) of relu(d_ap^2 - d_an^2 + margin); the paper takes the sum.

    Args:
        margin: compared with squared distances, or with plain ones where `squared` is False.
        squared: squared Euclidean distances; False for plain ones, as Hermans et al. 2017 advise.
        soft_margin: log(1 + exp(.)) in place of relu(.); the soft margin of Hermans et al. 2017 has margin 0.

    >>> anchor, positive, negative = torch.tensor([[0.0]]), torch.tensor([[2.0]]), torch.tensor([[1.0]])
    >>> TripletLoss(margin=1.0)(anchor, positive, negative), TripletLoss(0.5, squared=False)(anchor, positive, negative)
    (tensor(4.), tensor(1.5000))
    """

    def __init__(self, margin: float, *, squared: bool = True, soft_margin: bool = False) -> None:
        super().__init__()
        _check_margin(margin)
        self.margin = margin
        self.squared = squared
        self.soft_margin = soft_margin

    def forward(
        self, anchor: Tensor, positive: Tensor, negative: Tensor | None = None, size_average: bool = True
    ) -> Tensor:
        """Compute the loss.

        Args:
            anchor, positive, negative: embeddings (T, D), the outputs of TripletNet.
            size_average: mean over the triplets; False for their sum.

        Returns:
            Scalar tensor, float32 at least.

        Raises:
            ValueError, TypeError: for other shapes or arguments.
        """
        remedy = "TripletLoss takes the three outputs of TripletNet; for one batch with labels use OnlineTripletLoss"
        if negative is None:
            raise TypeError(f"{remedy}; got two arguments")
        _check_flag(remedy, size_average)
        _check_same_shape(remedy, anchor, positive, negative)
        d_ap, d_an = _distances(anchor, positive, self.squared), _distances(anchor, negative, self.squared)  # (T,)
        losses = _hinge(d_ap, d_an, self.margin, self.soft_margin)
        return losses.mean() if size_average else losses.sum()


class _OnlineLoss(nn.Module):
    """What the online losses share. A subclass gives, block by block of anchors, sums and the slopes of its total.

    `_selection` says what is to be computed, a list; `_block` takes an entry of it to `(total, n_active, n_averaged,
    pairs, slopes)`, the slopes being the derivatives of the total by the squared distances of these pairs.
    """

    offline = ""

    def forward(
        self,
        embeddings: Tensor,
        target: Any = None,
        *unexpected: Any,
        reference: Tensor | None = None,
        reference_target: Any = None,
    ) -> Any:
        """Compute the loss of a batch, or of a batch with references.

        Args:
            embeddings: (B, D), any floating dtype and device.
            target: class labels (B,), numbers or strings: tensor, array, Series or list.
            reference: (R, D), compared with in place of the batch itself; none of them is taken to be the anchor. Each
                same-class (embedding, reference) is a positive pair. Gradients flow into both.
            reference_target: class labels (R,).

        Returns:
            `(loss, count)`: scalar tensor, float32 at least, and 0-dim int64 tensor, the number of triplets whose loss
            is above zero; the contrastive loss alone. Where nothing is selected the loss is a zero that still has a
            graph; where an embedding or its square is not finite it is NaN. On a GPU no value is read, so it does not
            wait, but for labels that are no whole numbers, among which NaN is looked for.

        Raises:
            ValueError, TypeError: for other shapes or types, labels that are NaN, and references without labels.
        """
        name = type(self).__name__
        question = _ask(name, self.offline, embeddings, target, unexpected, reference, reference_target)
        return self._result(question.points.dtype, *self._sums(question))

    def _sums(self, question):
        """Total, and the numbers of active and of averaged terms: 0-dim tensors, the first of which has a graph."""
        question.indices = self._indices(question)
        if torch.compiler.is_compiling() or getattr(self.margin, "requires_grad", False):  # one graph, of fixed shapes
            comparison = question.compare(question.points, may_read=False)
            return _plain_sums(self, comparison, self._selection(comparison, question))
        wants_gradient = torch.is_grad_enabled() and question.points.requires_grad
        return _OnePass.apply(question.points, self, question, wants_gradient)[:3]

    def _indices(self, question):
        """What a selector of the user's own selects, or None."""
        return None

    def _result(self, dtype, total, n_active, n_averaged):
        return (total / n_averaged.clamp(min=1)).to(dtype), n_active


class OnlineContrastiveLoss(_OnlineLoss):
    """Contrastive loss of the pairs that a selector chooses in a batch.

    The mean over the selected pairs of d^2 (positive) and relu(margin - d)^2 (negative), d the Euclidean distance.
    There is no factor 1/2 here: on the same pairs it is twice `ContrastiveLoss`.

    Args:
        margin: the distance beyond which a negative pair costs nothing.
        pair_selector: an object with `get_pairs(embeddings, labels)`, as in utils.py.

    >>> class AllPairs:
    ...     def get_pairs(self, embeddings, labels):
    ...         return torch.tensor([[0, 1]]), torch.tensor([[0, 2], [1, 2]])
    >>> embeddings = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.5]])
    >>> OnlineContrastiveLoss(1.0, AllPairs())(embeddings, torch.tensor([0, 0, 1]))  # (4 + 0.25 + 0) / 3
    tensor(1.4167)
    """

    offline = "for the outputs of SiameseNet use ContrastiveLoss"

    def __init__(self, margin: float, pair_selector: Any) -> None:
        super().__init__()
        if not hasattr(pair_selector, "get_pairs"):
            given = f"got {type(pair_selector).__name__}; triplet selectors go to OnlineTripletLoss"
            raise TypeError(f"expected a pair selector, with get_pairs, {given}")
        _check_margin(margin, lowest=0)
        self.margin = margin
        self.pair_selector = pair_selector

    def _indices(self, question):
        if _offers_blocks(self.pair_selector, question):
            return None
        pairs = _ask_selector(self.pair_selector.get_pairs, question, width=2)  # (P, 2) each
        is_positive = torch.arange(sum(map(len, pairs)), device=pairs[0].device) < len(pairs[0])
        return *torch.cat(pairs).unbind(dim=1), is_positive

    def _selection(self, comparison, question):
        blocks = [question.indices]
        if question.indices is None:
            blocks = self.pair_selector.pair_blocks(comparison, question.share, question.n_shares)
        return [part for block in blocks for part in _chunks(comparison, block)]

    def _block(self, comparison, block):
        rows, columns, mask = block
        if torch.is_tensor(rows):
            pairs, is_same, is_pair = _SomePairs(comparison, rows, columns, is_near_exact=True), mask, None
        else:
            pairs, is_pair = _AllPairs(comparison, rows, columns.start, is_near_exact=True), mask
            is_same = pairs.are_of_one_class()
        squared = pairs.squared.to(comparison.dtype)
        distances = _sqrt(squared)
        hinge = F.relu(self.margin - distances)
        losses = torch.where(is_same, squared, hinge.square())
        slopes = torch.where(is_same, 1, -hinge * _inverse(distances))
        if is_pair is None and is_same.dim() == 2 and comparison.start == 0:  # once each, above the diagonal
            is_pair = torch.ones_like(is_same).triu_(1)
        if is_pair is None:
            n_pairs = torch.full((), is_same.numel(), device=losses.device)
        else:
            losses, slopes, n_pairs = losses.masked_fill(~is_pair, 0), slopes.masked_fill(~is_pair, 0), is_pair.sum()
        return losses.sum(dtype=pairs.squared.dtype), n_pairs, n_pairs, pairs, slopes.to(pairs.squared.dtype)

    def _result(self, dtype, total, n_active, n_averaged):
        return super()._result(dtype, total, n_active, n_averaged)[0]


class OnlineTripletLoss(_OnlineLoss):
    """Triplet loss of the triplets that a selector chooses in a batch.

    The mean over the selected triplets of relu(d_ap^2 - d_an^2 + margin), and how many of them are active, their loss
    above zero. The mean over the active ones alone is loss * T / count. Watch the count: the mean over hard triplets
    stays near the margin while there are fewer and fewer of them.

    Args:
        margin: compared with squared distances, or with plain ones where `squared` is False.
        triplet_selector: an object with `get_triplets(embeddings, labels)`, as in utils.py. Where it has a margin, that
            and its `squared` should be the loss's: a warning says so otherwise.
        squared: squared Euclidean distances; False for plain ones.
        soft_margin: log(1 + exp(.)) in place of relu(.); the soft margin of Hermans et al. 2017 has margin 0.

    >>> class OneTriplet:
    ...     def get_triplets(self, embeddings, labels):
    ...         return torch.tensor([[0, 1, 2]])
    >>> OnlineTripletLoss(1.0, OneTriplet())(torch.tensor([[0.0], [2.0], [1.0]]), torch.tensor([0, 0, 1]))
    (tensor(4.), tensor(1))
    """

    offline = "for the outputs of TripletNet use TripletLoss"

    def __init__(
        self, margin: float, triplet_selector: Any, *, squared: bool = True, soft_margin: bool = False
    ) -> None:
        super().__init__()
        if not hasattr(triplet_selector, "get_triplets"):
            name = type(triplet_selector).__name__
            remedy = "pair selectors go to OnlineContrastiveLoss"
            raise TypeError(f"expected a triplet selector, with get_triplets, got {name}; {remedy}")
        for name, value in (("margin", margin), ("squared", squared)):
            selector_value = getattr(triplet_selector, name, value)
            if selector_value != value:
                selector_name = type(triplet_selector).__name__
                message = f"{name}={value} of the loss differs from {name}={selector_value} of its {selector_name}"
                warnings.warn(message, stacklevel=2)
        _check_margin(margin)
        self.margin = margin
        self.triplet_selector = triplet_selector
        self.squared = squared
        self.soft_margin = soft_margin

    def _indices(self, question):
        if _offers_blocks(self.triplet_selector, question):
            return None
        (triplets,) = _ask_selector(self.triplet_selector.get_triplets, question, width=3)
        return triplets.unbind(dim=1)  # (T,) each

    def _selection(self, comparison, question):
        if question.indices is None:
            return self.triplet_selector.triplet_blocks(comparison, question.first, question.last)
        return _chunks(comparison, question.indices)

    def _block(self, comparison, block):
        if len(block) == 2:  # a selector's function and its arguments
            first, last, *triplets = block[0](*block[1])
            if triplets[1] is None:
                return self._all_negatives(comparison, first, last, *triplets[::2])
            rows, block = (first, last), _flat(comparison, first, last, *triplets)
        else:
            rows = (0, comparison.n_anchors)
        anchor, positive, negative, *is_chosen = block  # (t,) each
        places = torch.cat((anchor, anchor)), torch.cat((positive, negative))  # (2 t,)
        pairs = _SomePairs(comparison, *places, *rows, is_near_exact=not self.squared)
        losses, slopes = self._losses(*pairs.squared.chunk(2), comparison.dtype)
        n_triplets = torch.full((), len(anchor), device=anchor.device)
        for mask in is_chosen:
            losses, n_triplets = losses.masked_fill(~mask, 0), mask.sum()
            slopes = [slope.masked_fill(~mask, 0) for slope in slopes]
        return losses.sum(dtype=slopes[0].dtype), (losses > 0).sum(), n_triplets, pairs, torch.cat(slopes)

    def _losses(self, d_ap, d_an, dtype):
        """Losses from squared distances, and their slopes by both."""
        if not self.squared:
            d_ap, d_an = _sqrt(d_ap), _sqrt(d_an)
        if self.soft_margin:
            losses = _hinge(d_ap, d_an, self.margin, True)
            slope = -torch.expm1(-losses)  # the sigmoid
        else:  # compared as rounded to the embeddings' dtype, where equal distances are equal
            losses = _hinge(d_ap.to(dtype), d_an.to(dtype), self.margin, False)
            slope = (losses > 0).to(d_ap.dtype)
        if self.squared:
            return losses, (slope, -slope)
        return losses, (slope * _inverse(d_ap) / 2, -slope * _inverse(d_an) / 2)

    def _all_negatives(self, comparison, first, last, positive, is_positive):
        """Every triplet of these positives (b, K), by counting or, the soft margin, one by one."""
        if not self.soft_margin:
            both_directions = self.triplet_selector.both_directions
            return _all_triplets(comparison, first, last, self.margin, self.squared, both_directions)
        pairs = _AllPairs(comparison, slice(first, last), is_near_exact=not self.squared)
        parts = pairs.squared, pairs.are_of_one_class(), positive, is_positive
        if not torch.compiler.is_compiling():  # so many anchors at once that their triplets (b, K, R) are 2^20
            size = max(1, 2**20 // (comparison.K * comparison.R))
            sums = [self._of_all(*part, comparison.dtype) for part in zip(*(x.split(size) for x in parts))]
        else:
            sums = [self._of_all(*parts, comparison.dtype)]
        totals, n_active, n_triplets, slopes = zip(*sums)
        return sum(totals), sum(n_active), sum(n_triplets), pairs, torch.cat(slopes)

    def _of_all(self, squared, is_same, positive, is_positive, dtype):
        is_triplet = is_positive[:, :, None] & ~is_same[:, None]  # (b, K, R)
        losses, slopes = self._losses(squared.gather(1, positive)[:, :, None], squared[:, None], dtype)
        losses = losses.masked_fill(~is_triplet, 0)
        of_ap, of_an = (slope.expand_as(losses).masked_fill(~is_triplet, 0) for slope in slopes)
        slopes = of_an.sum(dim=1).scatter_add(1, positive, of_ap.sum(dim=2))
        return losses.sum(dtype=slopes.dtype), (losses > 0).sum(), is_triplet.sum(), slopes


class BatchAllTripletLoss(_OnlineLoss):
    """Triplet loss of all valid triplets of a batch, exact, without forming one (Hermans et al. 2017, "batch all").

    relu(d_ap^2 - d_an^2 + margin), summed over every anchor, positive and negative, divided by the number of these
    triplets or of the active ones, whose loss is above zero. O(B^2 (D + log K)) time for K samples a class and O(B D)
    memory: loss and gradient come in one pass over blocks of anchors. Compiled, O(B^2) memory.

    An active triplet adds d_ap - d_an + margin. So with W_ij, how many active triplets hold distance d_ij as
    anchor-positive less how many hold it as anchor-negative, the sum is sum_ij W_ij d_ij + margin * count; and W, whole
    numbers, is constant wherever the gradient exists. Only W is needed, and a row of it takes one sort of an anchor's
    positives and a search for each negative.

    Args:
        margin: compared with squared distances, or with plain ones where `squared` is False.
        squared: squared Euclidean distances; False for plain ones, as Hermans et al. advise.
        both_directions: take each same-class pair as anchor and positive both ways; False for i < j only, i the anchor,
            which with average="all" is `OnlineTripletLoss(margin, AllTripletSelector())`.
        average: "active", over the active triplets, or "all", over all valid ones.

    >>> embeddings, labels = torch.tensor([[0.0], [2.0], [1.0]]), torch.tensor([0, 0, 1])
    >>> BatchAllTripletLoss(margin=1.0)(embeddings, labels)  # anchors 0 and 1: 4 - 1 + 1 each
    (tensor(4.), tensor(2))
    """

    offline = "for the outputs of TripletNet use TripletLoss"

    def __init__(
        self, margin: float, *, squared: bool = True, both_directions: bool = True, average: str = "active"
    ) -> None:
        super().__init__()
        if average not in ("active", "all"):
            raise ValueError(f'expected average="active" or "all", got {average!r}')
        _check_margin(margin)
        self.margin = margin
        self.squared = squared
        self.both_directions = both_directions
        self.average = average

    def _selection(self, comparison, question):
        return comparison.blocks(question.first, question.last) if comparison.K else []

    def _block(self, comparison, block):
        total, n_active, n_valid, *rest = _all_triplets(
            comparison, *block, self.margin, self.squared, self.both_directions
        )
        return total, n_active, n_active if self.average == "active" else n_valid, *rest


class GlobalBatchLoss(nn.Module):
    """An online loss over the embeddings of all processes of torch.distributed, as if they were one batch.

    Each process gathers the embeddings and labels of all, in the order of their ranks, and compares its own with them:
    a share of the anchors, and so of the time. It hands the others back their part of the gradient, by a
    reduce-scatter, and takes its own times the number of processes: DistributedDataParallel takes the mean over
    processes, so the weights get the gradient of one process with the whole batch. Random selectors draw as in one
    process. Batches may differ in size, but every process must make every call. Without torch.distributed, or with one
    process, only the draws are other ones.

    A loss of another library, one with a forward of its own, selectors that choose among all pairs at once (balanced,
    hard), and those of your own see the whole batch in every process.

    Args:
        loss_fn: an online loss, or `MemoryLoss` of one, or anything called as `loss_fn(embeddings, target)`.
        process_group: the processes; None for all.
        seed: of the draws; a selector with a generator of its own draws from that, which must be the same everywhere.

    >>> GlobalBatchLoss(BatchAllTripletLoss(margin=1.0))(torch.tensor([[0.0], [2.0], [1.0]]), torch.tensor([0, 0, 1]))
    (tensor(4.), tensor(2))
    """

    def __init__(self, loss_fn: Callable, *, process_group: Any = None, seed: int = 0) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        self.process_group = process_group
        self.seed = seed
        self.n_calls = 0

    def forward(self, embeddings: Tensor, target: Any = None, *unexpected: Any, **references: Any) -> Any:
        """Gather and compute the loss.

        Args:
            embeddings: (B, D) of this process, any floating dtype and device.
            target: class labels (B,), numbers.
            references: `reference` and `reference_target` of this process, as of `loss_fn`.

        Returns:
            What `loss_fn` returns, the same in all processes.

        Raises:
            ValueError: embeddings of different D; and what `loss_fn` raises.
            RuntimeError: for second derivatives, which are not handed back to the other processes.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            n_processes = torch.distributed.get_world_size(self.process_group)
        else:
            n_processes = 1
        self.n_calls += 1
        with _seeded(self.seed + self.n_calls, getattr(embeddings, "device", torch.device("cpu"))):
            if n_processes == 1:
                return self.loss_fn(embeddings, target, *unexpected, **references)
            offline = "the outputs of SiameseNet and TripletNet need no gathering"
            return self._of_all(_ask("GlobalBatchLoss", offline, embeddings, target, unexpected, **references))

    def _of_all(self, question):
        _check_numbers("GlobalBatchLoss", *question.given[1::2])
        group, loss_fn = self.process_group, self.loss_fn
        is_shared = _is_ours(loss_fn)
        parts = [_gather(*part, group, is_shared) for part in question.parts()]  # the batch, and references if given
        _, _, first, last = parts[0]
        given = tuple(x for part in parts for x in part[:2])
        if not is_shared:
            return loss_fn(*given[:2], **dict(zip(("reference", "reference_target"), given[2:])))
        points, labels = torch.cat(given[::2]), torch.cat(given[1::2])
        n_anchors = len(given[0])
        start = n_anchors if len(parts) > 1 else 0
        rank, W = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        question = _Question(points, labels, n_anchors, start, first, last, given, rank, W)
        total, *counts = loss_fn._sums(question)
        of_all = torch.stack((total.detach(), *(n.to(total.dtype) for n in counts)))  # float64 counts to 2^53
        torch.distributed.all_reduce(of_all, group=group)
        total = W * total  # DistributedDataParallel takes the mean over processes of the gradients of their anchors
        total = total + (of_all[0] - total.detach())  # the value is that of all
        return loss_fn._result(points.dtype, total, *of_all[1:].long())

    def get_extra_state(self) -> int:
        """The number of calls, for the state dict: the next draws depend on it."""
        return self.n_calls

    def set_extra_state(self, state: int) -> None:
        """Go on behind so many calls."""
        self.n_calls = state


class MemoryLoss(nn.Module):
    """An online loss against the batch and the last embeddings of earlier batches (Wang et al. 2020, "cross-batch").

    References are the batch itself and the memory, which has no gradient. A sample is not its own reference; pairs that
    a selector takes once, i < j, are taken once within the batch. In evaluation mode it is `loss_fn` alone and
    remembers nothing. Embeddings that are not finite are remembered too. Not for use inside `torch.utils.checkpoint`,
    whose second pass would meet another memory.

    Args:
        loss_fn: an online loss. A selector of your own must know references, or it is refused from the second batch on.
        size: how many embeddings are remembered.

    >>> loss_fn = MemoryLoss(BatchAllTripletLoss(margin=1.0), size=100)
    >>> loss_fn(torch.tensor([[0.0], [2.0]]), torch.tensor([0, 1]))  # no positive
    (tensor(0.), tensor(0))
    >>> loss_fn(torch.tensor([[1.0]]), torch.tensor([0]))  # one positive and one negative, both remembered: 1 - 1 + 1
    (tensor(1.), tensor(1))
    """

    def __init__(self, loss_fn: Any, size: int) -> None:
        super().__init__()
        if not _is_ours(loss_fn) or isinstance(loss_fn, MemoryLoss):
            name = type(loss_fn).__name__
            raise TypeError(f"expected an online loss, which takes references, with its own forward, got {name}")
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"expected a size of at least 1, got {size!r}")
        self.loss_fn = loss_fn
        self.size = size
        # The last (M, D), M growing to the size: a state dict holds them as extra state, whose shape may change.
        self.register_buffer("embeddings", torch.empty(0, 0), persistent=False)
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64), persistent=False)

    def forward(self, embeddings: Tensor, target: Any = None, *unexpected: Any) -> Any:
        """Compute the loss against batch and memory; then remember the batch.

        Args:
            embeddings: (B, D), any floating dtype and device.
            target: class labels (B,), numbers.

        Returns:
            What `loss_fn` returns.

        Raises:
            ValueError, TypeError: for other shapes or types, labels that are no numbers, another D than before, and a
                selector that knows no references.
        """
        if not self.training:
            return self.loss_fn(embeddings, target, *unexpected)
        question = _ask("MemoryLoss", self.loss_fn.offline, embeddings, target, unexpected)
        return self._result(question.points.dtype, *self._sums(question))

    def _sums(self, question):
        if not self.training:
            return self.loss_fn._sums(question)
        _check_numbers("MemoryLoss", question.given[1])
        batch, labels = question.points, question.labels
        if len(self.embeddings) and self.embeddings.shape[1] != batch.shape[1]:
            D, before = batch.shape[1], self.embeddings.shape[1]
            raise ValueError(f"expected embeddings of the D before, {before}, got {D}")
        kept, kept_labels = self.embeddings.to(batch).reshape(-1, batch.shape[1]), self.labels.to(batch.device)
        points, codes = torch.cat((batch, kept)), torch.cat((labels, kept_labels))
        given = (*question.given[:2], points, codes) if len(kept) else question.given
        sums = self.loss_fn._sums(dataclasses.replace(question, points=points, labels=codes, given=given))
        # Oldest first, so that what is in excess is at the front.
        n_old = max(0, self.size - len(batch))
        self.embeddings = torch.cat((kept[max(0, len(kept) - n_old) :], batch.detach()[-self.size :]))
        self.labels = torch.cat((kept_labels[max(0, len(kept) - n_old) :], labels[-self.size :]))
        return sums

    def _result(self, dtype, *sums):
        return self.loss_fn._result(dtype, *sums)

    def get_extra_state(self) -> dict[str, Tensor]:
        """The memory, for the state dict."""
        return {"embeddings": self.embeddings, "labels": self.labels}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Remember what a state dict holds, the last of it where it is more than the size."""
        device = self.labels.device
        self.embeddings, self.labels = (state[name][-self.size :].to(device) for name in ("embeddings", "labels"))


@dataclasses.dataclass
class _Question:
    """What a loss is asked: anchors, the first of the points, and references, the points from `start` on."""

    points: Tensor  # (N, D), float32 at least
    labels: Tensor  # (N,)
    n_anchors: int
    start: int
    first: int  # of the anchors whose triplets are this process's share
    last: int
    given: tuple  # for a selector of the user's own: embeddings, labels and perhaps references and theirs
    share: int = 0  # of lists of pairs, or of blocks of them: every `n_shares`-th from here on
    n_shares: int = 1
    indices: Any = None  # what that has selected
    selection: Any = None  # what has been selected, for derivatives of the gradient

    def compare(self, points, may_read):
        return _Comparison(points, self.labels, self.n_anchors, self.start, may_read)

    def parts(self):
        """Points and labels of the batch, and of the references if they are others."""
        ends = [slice(0, self.n_anchors)] + ([slice(self.start, None)] if self.start else [])
        return [(self.points[part], self.labels[part]) for part in ends]


class _OnePass(torch.autograd.Function):
    """Sums and gradient, both in the forward pass, over blocks of anchors of which none outlives its turn.

    Autograd keeps the points and the gradient, (N, D) each.
    """

    @staticmethod
    def forward(points, loss, question, wants_gradient):
        comparison = question.compare(points, may_read=points.device.type == "cpu")
        gradient = _Gradient(comparison) if wants_gradient else None
        sums, selection = _nothing(comparison), loss._selection(comparison, question)
        zero = sums[0].clone()
        for block in selection:
            *of_block, pairs, slopes = loss._block(comparison, block)
            for x, y in zip(sums, of_block):
                x += y  # in place: small tensors that stay split the memory that large ones leave
            if wants_gradient:
                pairs.add_gradient(gradient, slopes)
        question.selection = selection
        return *sums, gradient.value().add_(zero).to(points.dtype) if wants_gradient else points.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        points, ctx.loss, ctx.question, _ = inputs
        ctx.save_for_backward(points, output[3])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, of_total, *_):
        points, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return _GradientOfTotal.apply(of_total, points, gradient, ctx.loss, ctx.question), None, None, None
        return of_total * gradient, None, None, None

    @staticmethod
    def vmap(info, in_dims, points, loss, question, wants_gradient):
        ones = points.unbind(in_dims[0])
        wants_gradient = torch.is_grad_enabled()  # of a batched tensor it is not known
        results = [_OnePass.apply(one, loss, copy.copy(question), wants_gradient) for one in ones]
        return tuple(map(torch.stack, zip(*results))), (0, 0, 0, 0)


class _GradientOfTotal(torch.autograd.Function):
    """A gradient that is known; its own derivatives come from the whole sum as one graph, in O(A R) memory."""

    @staticmethod
    def forward(of_total, points, gradient, loss, question):
        return of_total * gradient

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.loss, ctx.question = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, direction):
        of_total, points, gradient = ctx.saved_tensors
        if ctx.question.selection is None:
            raise RuntimeError("second derivatives under vmap are not supported: loop over the batches")
        with torch.enable_grad():
            comparison = ctx.question.compare(points, may_read=False)
            total, *_ = _plain_sums(ctx.loss, comparison, ctx.question.selection)
            if not total.requires_grad:  # the points are of a transform that is over
                raise RuntimeError("torch.func cannot differentiate this twice: use torch.autograd.functional.hessian")
            (of_points,) = torch.autograd.grad(total, points, create_graph=True)
        create_graph = torch.is_grad_enabled()
        (product,) = torch.autograd.grad(of_points, points, of_total * direction, create_graph=create_graph)
        return ((of_points if create_graph else gradient) * direction).sum(), product, None, None, None

    @staticmethod
    def vmap(info, in_dims, of_total, points, gradient, loss, question):
        tensors = list(zip((of_total, points, gradient), in_dims))
        ones = ([x if dim is None else x.select(dim, i) for x, dim in tensors] for i in range(info.batch_size))
        return torch.stack([_GradientOfTotal.apply(*one, loss, question) for one in ones]), 0


class _Gradient:
    """Gradient by the points X of sum_ij S_ij d_ij^2, each slope S_ij in place: 2 (diag(S 1 + S^T 1) - S - S^T) X."""

    def __init__(self, comparison):
        self.x = comparison.x
        self.products = torch.zeros_like(self.x)  # S X, (N, D)
        self.transposed = self.sums = None  # (S^T X)^T, (D, N), since so its product is faster, and (S + S^T) 1, (N,)

    def add_block(self, slopes, rows, columns):
        """Slopes (b, c) of ranges of the points."""
        if self.sums is None:
            self.transposed, self.sums = self.x.new_zeros(self.x.shape[1], len(self.x)), self.x.new_zeros(len(self.x))
        self.sums[rows] += slopes.sum(dim=1)
        self.sums[columns] += slopes.sum(dim=0)
        self.products[rows].addmm_(slopes, self.x[columns])
        self.transposed[:, columns].addmm_(self.x[rows].T, slopes)

    def add_pairs(self, slopes, rows, columns, difference):
        """Slopes (P,) of single pairs, given x_i - x_j (P, D), which is used up."""
        difference.mul_(slopes[:, None])
        self.products.index_add_(0, rows, difference, alpha=-1).index_add_(0, columns, difference)

    def value(self):
        """The gradient (N, D)."""
        if self.sums is None:
            return self.products.mul_(-2)
        return (self.sums[:, None] * self.x).sub_(self.products).sub_(self.transposed.T).mul_(2)


class _AllPairs:
    """A block's anchors with references from `left` on: squared distances (b, c), and gradient from slopes by these."""

    def __init__(self, comparison, rows, left=0, is_near_exact=False):
        self.comparison, self.rows, self.begin = comparison, rows, comparison.start + left
        self.squared = comparison.distances(rows.start, rows.stop, left)
        if is_near_exact and comparison.may_read and self.squared.numel():
            self._measure_near_pairs()

    def _measure_near_pairs(self):
        # A product loses what two points differ by where that is 1e-4 of their norms: too much under a square root.
        (x, y), norms = self.points(), self.comparison.squared_norms
        x_norms, y_norms = norms[self.rows], norms[self.begin :]
        is_near = self.squared < 1e-8 * (x_norms[:, None] + y_norms.max())
        place = torch.from_numpy(np.flatnonzero(is_near.numpy()))
        row, column = place // len(y), place % len(y)
        is_near = self.squared[row, column] < 1e-8 * (
            x_norms[row] + y_norms[column]
        )  # not only beside the largest norm
        size = max(2**10, 2**18 // max(1, x.shape[1]))
        for i, j in zip(row[is_near].split(size), column[is_near].split(size)):
            self.squared[i, j] = _squared_lengths(x[i] - y[j])

    def are_of_one_class(self):
        labels = self.comparison.labels
        return labels[self.rows, None] == labels[self.begin :]

    def points(self):
        return self.comparison.x[self.rows], self.comparison.x[self.begin :]

    def add_gradient(self, gradient, slopes):
        gradient.add_block(slopes, self.rows, slice(self.begin, None))


class _SomePairs:
    """Pairs (P,) of anchors and references: squared distances, and gradient from slopes by these.

    Each costs D numbers, or where they are many, or no value may be read, is looked up among all those of anchors
    `first` to `last`.
    """

    def __init__(self, comparison, rows, columns, first=0, last=None, is_near_exact=False):
        self.comparison, self.rows, self.columns, self.block = comparison, rows, columns, None
        last = comparison.n_anchors if last is None else last
        n_all = (last - first) * comparison.R
        if comparison.may_read and not _is_looked_up(len(rows), n_all):
            x, start = comparison.x, comparison.start
            self.difference = x.index_select(0, rows) - x.index_select(0, columns + start)  # (P, D)
            self.squared = _squared_lengths(self.difference)
        else:
            self.block = _AllPairs(comparison, slice(first, last), is_near_exact=is_near_exact)
            self.place = (rows - first) * comparison.R + columns
            self.squared = self.block.squared.flatten().index_select(0, self.place)

    def add_gradient(self, gradient, slopes):
        if self.block is None:
            gradient.add_pairs(slopes, self.rows, self.columns + self.comparison.start, self.difference)
        else:
            of_all = torch.zeros_like(self.block.squared)
            of_all.view(-1).index_add_(0, self.place, slopes)
            self.block.add_gradient(gradient, of_all)


class _Comparison:
    """Anchors (A, D), the first of the points, beside references (R, D), the points from `start` on.

    Of one batch `start` is 0 and a sample is not its own reference. Where values may be read, an anchor's class is a
    range of the references in order of their labels, K columns. On a GPU, which would wait, and in a compiled graph,
    which would break, all references are the columns, K = R. Blocks of anchors come one by one: nothing here is (A, R).
    """

    def __init__(self, points, labels, n_anchors, start, may_read=True):
        x = points.to(torch.float32 if points.device.type == "mps" else torch.float64)
        self.x = x - x.mean(dim=0)  # (N, D)
        shorter = 1 - 2 * torch.finfo(x.dtype).eps * (2 + x.shape[1] ** 0.5)  # by so much that equal rows clamp to 0
        self.squared_norms = self.x.square().sum(dim=1) * shorter
        self.dtype = torch.promote_types(points.dtype, torch.float32)
        self.labels, self.n_anchors, self.start, self.may_read = labels, n_anchors, start, may_read
        self.K = self.R = len(points) - start
        if may_read:  # with numpy, whose calls cost less than torch's
            values = labels.cpu().numpy()
            self.order = values[start:].argsort(kind="stable")
            self.begin, self.end = (
                values[start:][self.order].searchsorted(values[:n_anchors], side)[:, None] for side in ("left", "right")
            )
            self.K = int(max((self.end - self.begin).max(), 0)) if n_anchors else 0

    def blocks(self, first, last, n_least=1):
        """Ranges of anchors: on a CPU 128, or as many as make 2^18 distances, which its cache holds; on a GPU 2^24."""
        if torch.compiler.is_compiling() or self.R == 0:
            return [(first, last)] if self.R else []
        size = max(128, 2 ** (18 if self.x.device.type == "cpu" else 24) // self.R)
        size = max(1, min(size, -(-(last - first) // n_least)))
        return [(i, min(i + size, last)) for i in range(first, last, size)]

    def distances(self, first, last, left=0):
        """Squared distances (b, R - left) of anchors from references, in float64; 0 from an anchor to itself."""
        begin, norms = self.start + left, self.squared_norms
        distances = torch.addmm(norms[begin:], self.x[first:last], self.x[begin:].T, alpha=-2)
        distances = distances.add_(norms[first:last, None]).clamp_(min=0)
        if self.start == 0:
            own = torch.arange(first - left, last - left, device=distances.device)
            distances.scatter_(1, own[:, None], 0)
        return distances

    def columns(self, first, last, both_directions=False):
        """References (b, K) that may be of an anchor's class; which are, (b, 1) or (b, K); which make a pair, (b, K).

        Of one batch a pair i, j is one of anchor i < j, unless both directions are asked for.
        """
        device = self.x.device
        if self.may_read:
            return [torch.from_numpy(x).to(device) for x in self.read_columns(first, last, both_directions)]
        own = torch.arange(first, last, device=device)[:, None]
        column = torch.arange(self.R, device=device).expand(last - first, -1)
        is_class = is_pair = self.labels[first:last, None] == self.labels[self.start :]
        if self.start == 0:
            is_pair = is_class & (column != own if both_directions else column > own)
        return column, is_class, is_pair

    def read_columns(self, first, last, both_directions=False):
        """The same as numpy's arrays."""
        begin, end = self.begin[first:last], self.end[first:last]
        place = begin + np.arange(self.K)  # (b, K)
        column = self.order[np.minimum(place, end - 1)]
        is_pair = place < end
        if self.start == 0:
            own = np.arange(first, last)[:, None]
            is_pair &= column != own if both_directions else column > own
        return column, begin < end, is_pair

    def n_of_class(self, first, last):
        """How many references are of an anchor's class, (b,)."""
        if self.may_read:
            return torch.from_numpy((self.end - self.begin)[first:last, 0]).to(self.x.device)
        return (self.labels[first:last, None] == self.labels[self.start :]).sum(dim=1)


def _plain_sums(loss, comparison, selection):
    """Sums of blocks as one graph."""
    sums = _nothing(comparison)
    for block in selection:
        sums = [x + y for x, y in zip(sums, loss._block(comparison, block))]
    return sums


def _nothing(comparison):
    """A total of zero, NaN where squares are not finite, so that none goes unseen, and two counts."""
    zero = comparison.squared_norms.sum().to(comparison.dtype).to(comparison.x.dtype) * 0
    return [zero, *(torch.zeros((), dtype=torch.int64, device=zero.device) for _ in range(2))]


def _all_triplets(comparison, first, last, margin, squared, both_directions):
    """The block's sums of all valid triplets; see BatchAllTripletLoss."""
    pairs = _AllPairs(comparison, slice(first, last), is_near_exact=not squared)
    distances = pairs.squared if squared else _sqrt(pairs.squared)  # (b, R)
    with torch.no_grad():
        weights, n_active, n_valid = _count_active(comparison, first, last, distances, margin, both_directions)
    total = torch.dot(weights.flatten(), distances.flatten()) + margin * n_active.to(weights.dtype)
    slopes = weights if squared else weights * _inverse(distances) / 2
    return total, n_active, n_valid, pairs, slopes


def _count_active(comparison, first, last, distances, margin, both_directions):
    """Weights W (b, R) of the distances, and the numbers of active and of valid triplets.

    A negative at distance d is active with the positives whose threshold d_ap + margin is above d. With an anchor's
    thresholds sorted, these are the ones behind d's place among them.
    """
    K, R = comparison.K, comparison.R
    distances = distances.detach().to(comparison.dtype, copy=True)
    column, is_class, is_positive = comparison.columns(first, last, both_directions)  # (b, K)
    of_class = distances.gather(1, column)
    thresholds, rank = (of_class + margin).masked_fill_(~is_positive, -torch.inf).sort(dim=1)
    negative = distances.scatter_(1, column, of_class.masked_fill(is_class, torch.inf))  # (b, R)
    place = _place(thresholds, negative, comparison.may_read)  # (b, R), K of what is no negative
    n_at_place = torch.zeros(len(place), K + 1, dtype=torch.float32, device=place.device)  # which counts to 2^24
    n_at_place.scatter_add_(1, place.long(), torch.ones_like(place, dtype=torch.float32))
    n_negatives = n_at_place.cumsum(dim=1)[:, :K].to(comparison.x.dtype)
    n_negatives = torch.empty_like(n_negatives).scatter_(1, rank, n_negatives)  # (b, K)
    weights = place.to(comparison.x.dtype).sub_(K).scatter_add_(1, column, n_negatives)
    n_valid = (is_positive.sum(dim=1) * (R - comparison.n_of_class(first, last))).sum()
    return weights, n_negatives.long().sum(), n_valid


def _place(thresholds, distances, may_read):
    """How many of a row's ascending thresholds (b, K) are not above each of its distances (b, R)."""
    if not may_read or thresholds.shape[1] > 64:
        return torch.searchsorted(thresholds, distances, right=True)
    # Few thresholds are compared with one by one: faster than a search, whose branches a processor guesses wrong.
    values, place = distances.numpy(), np.full(distances.shape, thresholds.shape[1], np.uint8)
    is_above = np.empty(distances.shape, bool)
    for threshold in thresholds.numpy().T:
        np.greater(threshold[:, None], values, out=is_above)
        place -= is_above.view(np.uint8)
    return torch.from_numpy(place)


class _GatherRows(torch.autograd.Function):
    """The rows (n, D) of all processes, (sum of n, D); backward each gets its part of the gradients of all, summed.

    Where each has computed all instead of a share, its own part times the processes, since their mean is taken.
    """

    @staticmethod
    def forward(ctx, rows, sizes, group, is_shared):
        ctx.sizes, ctx.group, ctx.is_shared = sizes, group, is_shared
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # of one size everywhere
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(gathered, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes)])

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "GlobalBatchLoss has no second derivatives: create_graph=True is not for several processes"
            )
        sizes, rank = ctx.sizes, torch.distributed.get_rank(ctx.group)
        is_gloo = torch.distributed.get_backend(ctx.group) == "gloo"  # which has no reduce-scatter
        if is_gloo or not ctx.is_shared:
            gradient = gradient.contiguous()
            if ctx.is_shared:  # else every process has computed all of it
                torch.distributed.all_reduce(gradient, group=ctx.group)
            return (1 if ctx.is_shared else len(sizes)) * gradient.split(sizes)[rank], None, None, None
        padded = gradient.new_zeros(len(sizes), max(sizes), *gradient.shape[1:])
        for part, own in zip(padded, gradient.split(sizes)):
            part[: len(own)] = own
        own = torch.empty_like(padded[0])
        torch.distributed.reduce_scatter_tensor(own, padded.flatten(0, 1), group=ctx.group)
        return own[: sizes[rank]], None, None, None


def _gather(points, labels, group, is_shared):
    """Points and labels of all processes, and where the own ones begin and end."""
    shape = torch.tensor((*points.shape, labels.is_floating_point()), device=points.device)
    shapes = [torch.empty_like(shape) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(shapes, shape, group=group)
    sizes, widths, kinds = zip(*(shape.tolist() for shape in shapes))
    if len(set(kinds)) > 1:
        raise TypeError("expected labels of one kind in all processes, got whole numbers and others")
    if len(set(widths)) > 1:
        raise ValueError(f"expected embeddings of one D in all processes, got {', '.join(map(str, widths))}")
    rank = torch.distributed.get_rank(group)
    points, labels = (_GatherRows.apply(x, sizes, group, is_shared) for x in (points, labels))
    return points, labels, sum(sizes[:rank]), sum(sizes[: rank + 1])


@contextlib.contextmanager
def _seeded(seed, device):
    """Random numbers of a seed, on the CPU and the device; behind, the generators are where they were."""
    index = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(index):
        torch.default_generator.manual_seed(seed)
        for i in index:
            torch.cuda.default_generators[i].manual_seed(seed)
        yield


def _hinge(d_ap, d_an, margin, soft_margin):
    """One loss for each triplet, (T,)."""
    violation = d_ap - d_an + margin
    return F.softplus(violation) if soft_margin else F.relu(violation)


def _distances(x, y, squared=True):
    """Distances of paired rows, (P,), in float32 at least; at coincident points every derivative is 0, not NaN."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    difference = x.to(dtype) - y.to(dtype)
    if squared:
        return difference.square().sum(dim=1)
    is_zero = (difference == 0).all(dim=1)
    norms = torch.linalg.vector_norm(difference.masked_fill(is_zero[:, None], 1), dim=1)
    return norms.masked_fill(is_zero, 0)


def _squared_lengths(x):
    if torch.is_grad_enabled():  # a norm is faster, but has no second derivative at 0
        return x.square().sum(dim=1)
    return torch.linalg.vector_norm(x, dim=1).square_()


def _sqrt(squared_distances):
    """Square root whose derivatives at 0 are 0, not infinite."""
    if not torch.is_grad_enabled():
        return squared_distances.sqrt()
    is_zero = squared_distances == 0
    return squared_distances.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)


def _inverse(distances):
    """1 / d, and 0 where d is 0."""
    return distances.reciprocal().masked_fill(distances == 0, 0)


def _flat(comparison, first, last, positive, negative, is_chosen):
    """Triplets (b, k) as indices (t,): the chosen ones, or without reading a value all, and which are chosen."""
    if comparison.may_read:
        row, k = is_chosen.numpy().nonzero()
        triplets = row + first, positive.numpy()[row, k], negative.numpy()[row, k]
        return [torch.from_numpy(x) for x in triplets]
    anchor = torch.arange(first, last, device=positive.device)[:, None].expand_as(is_chosen)
    return [x.flatten() for x in (anchor, positive, negative, is_chosen)]


def _chunks(comparison, indices):
    """Indices (T,) each, in parts whose points, of D numbers each, fit a processor's cache; ranges as they are."""
    if not comparison.may_read or not torch.is_tensor(indices[0]):
        return [indices]
    if _is_looked_up(len(indices[0]), comparison.n_anchors * comparison.R):
        return [indices]
    size = max(256, 2**17 // max(1, comparison.x.shape[1]))
    return list(zip(*(x.split(size) for x in indices)))


def _is_looked_up(n_pairs, n_all):
    """Whether distances of pairs are looked up among all: from a sixteenth of them on, measured, this is cheaper."""
    return 16 * n_pairs >= n_all and n_all <= 2**22


def _is_ours(loss_fn):
    """Whether a loss is an online one or a memory of one, and no subclass has put another forward in its place."""
    if isinstance(loss_fn, MemoryLoss):
        return type(loss_fn).forward is MemoryLoss.forward
    return isinstance(loss_fn, _OnlineLoss) and type(loss_fn).forward is _OnlineLoss.forward


def _offers_blocks(selector, question):
    """Whether a selector is asked block by block: its class says so, and not what it may hand attributes on to."""
    is_able = hasattr(type(selector), "offers_blocks")
    return is_able and selector.offers_blocks(question.points.device, is_share=question.n_shares > 1)


def _ask_selector(method, question, width):
    """Index tensors (T, width) of a selector of the user's own, of this process's share of the anchors."""
    embeddings, labels, *references = question.given
    keywords = dict(zip(("reference", "reference_labels"), references))
    if references and not _takes(method, keywords):
        name = getattr(method, "__qualname__", repr(method))
        raise TypeError(f"{name} knows no references: it takes no keywords reference and reference_labels")
    selected = method(embeddings, labels, **keywords)
    is_of_memory = bool(references) and question.start == 0  # whose references hold the batch
    once = width == 2 or not getattr(getattr(method, "__self__", None), "both_directions", True)
    parts = selected if width == 2 else (selected,)
    if len(parts) != 4 - width:
        raise ValueError(f"expected positive and negative pairs of the selector, got {len(parts)} parts")
    chosen = [_checked_indices(x, question, width) for x in parts]
    if is_of_memory:  # no sample is its own positive, and pairs that are taken once are within the batch too
        chosen = [x[x[:, 0] < x[:, 1] if once else x[:, 0] != x[:, 1]] for x in chosen]
    return [x[question.share :: question.n_shares] for x in chosen]


def _takes(method, keywords):
    parameters = inspect.signature(method).parameters
    return any(p.kind == p.VAR_KEYWORD for p in parameters.values()) or parameters.keys() >= keywords.keys()


def _checked_indices(selected, question, width):
    device, n_references = question.points.device, len(question.points) - question.start
    indices = selected if torch.is_tensor(selected) else torch.from_numpy(np.array(selected))  # copied for its strides
    if indices.numel() and (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool):
        raise TypeError(f"expected whole numbers as indices of the selector, got {indices.dtype}")
    indices = indices.to(device)
    indices = indices.to(torch.int64) if indices.numel() else indices.new_empty((0, width), dtype=torch.int64)
    if indices.dim() != 2 or indices.shape[1] != width:
        raise ValueError(f"expected indices of shape (T, {width}) of the selector, got {tuple(indices.shape)}")
    if device.type == "cpu" and len(indices):
        lowest, highest = int(indices.min()), (int(indices[:, 0].max()), int(indices[:, 1:].max()))
        if lowest < 0 or highest[0] >= question.n_anchors or highest[1] >= n_references:
            sizes = f"{question.n_anchors} anchors and {n_references} references"
            raise IndexError(f"the selector's indices, from {lowest} to {max(highest)}, go beyond {sizes}")
    return indices


def _check_margin(margin, lowest=-math.inf):
    value = float(margin.detach() if torch.is_tensor(margin) else margin)  # a margin may be learned
    if not math.isfinite(value) or value < lowest:
        raise ValueError(f"expected a finite margin{' of at least 0' if lowest == 0 else ''}, got {margin}")


def _checked_target(target):
    """A target between 0 and 1, or without reading it NaN where it is not, so that none goes unseen."""
    is_outside = (target < 0) | (target > 1)
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and bool(is_outside.any()):
        raise ValueError(f"expected targets of 1, one class, and 0, two, got {float(target[is_outside][0]):g}")
    return target.masked_fill(is_outside, torch.nan)


def _check_flag(remedy, size_average):
    if not isinstance(size_average, (bool, int)) and type(size_average).__name__ != "bool_":  # a target in its place
        shape = f" of shape {tuple(size_average.shape)}" if torch.is_tensor(size_average) else ""
        raise TypeError(f"{remedy}; got one argument too many, a {type(size_average).__name__}{shape}")


def _check_same_shape(remedy, *embeddings):
    shapes = [tuple(x.shape) for x in embeddings]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"{remedy}; expected embeddings of one shape (B, D), got {', '.join(map(str, shapes))}")


def _check_numbers(name, *labels):
    for part in labels:
        if not torch.is_tensor(part) and np.asarray(part).dtype.kind not in "biuf":
            raise TypeError(f"{name} takes labels that are numbers: others are coded anew in each batch")


def _ask(name, offline, embeddings, target, unexpected, reference=None, reference_target=None):
    """A question of checked arguments."""
    remedy = f"{name} takes one batch of embeddings (B, D) and its labels (B,); {offline}"
    if target is None or unexpected or not torch.is_tensor(embeddings):
        given = 1 + (target is not None) + len(unexpected)
        raise TypeError(f"{remedy}; got {given} argument(s), the first a {type(embeddings).__name__}")
    if (reference is None) != (reference_target is None):
        raise TypeError(f"{name}: reference and reference_target go together, got one of them")
    parts = [(embeddings, target)] if reference is None else [(embeddings, target), (reference, reference_target)]
    for points, labels in parts:
        shape = tuple(labels.shape if torch.is_tensor(labels) else np.shape(labels))
        if points.dim() != 2 or shape not in ((len(points),), (len(points), 1)):
            raise ValueError(f"{remedy}; got shapes {tuple(points.shape)} and {shape}")
    if reference is not None and (reference.shape[1:] != embeddings.shape[1:] or reference.device != embeddings.device):
        shapes = f"{tuple(embeddings.shape)} on {embeddings.device}, {tuple(reference.shape)} on {reference.device}"
        raise ValueError(f"{name}: expected references of the embeddings' D and device, got {shapes}")
    codes = _code_labels(embeddings.device, *((labels, len(points)) for points, labels in parts))
    points = torch.cat([points for points, _ in parts]) if len(parts) > 1 else embeddings
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    B = len(embeddings)
    start = B if len(parts) > 1 else 0
    return _Question(points, codes, B, start, 0, B, tuple(x for part in parts for x in part))


def _code_labels(device, *labels_and_lengths):
    """Labels of one or two sets, one behind the other, as a tensor (N,) of numbers: equal where the labels are."""
    parts = []
    for labels, length in labels_and_lengths:
        labels = labels if torch.is_tensor(labels) else np.asarray(labels)
        shape = tuple(labels.shape)
        if shape not in ((length,), (length, 1)):
            raise ValueError(f"expected one label for each embedding, shape ({length},), got shape {shape}")
        parts.append(labels.reshape(length))
    if not all(not part.is_complex() if torch.is_tensor(part) else part.dtype.kind in "biuf" for part in parts):
        values = [part.cpu().numpy() if torch.is_tensor(part) else part for part in parts if len(part)]
        kinds = {type(value).__name__ for part in values for value in part.tolist()}
        if len(kinds) > 1 or any(value != value for part in values for value in part.tolist()):
            raise ValueError(
                f"expected labels of one type that are equal to themselves, got {', '.join(sorted(kinds))}"
            )
        return torch.from_numpy(np.unique(np.concatenate(values), return_inverse=True)[1]).to(device)
    parts = [  # an array as a copy, for its strides, byte order or protection
        part if torch.is_tensor(part) else torch.from_numpy(np.array(part, part.dtype.newbyteorder("=")))
        for part in parts
    ]
    wide = torch.float32 if device.type == "mps" else torch.float64
    parts = [part.to(device, wide if part.is_floating_point() else torch.int64) for part in parts]
    codes = torch.cat(parts) if len(parts) > 1 else parts[0]
    if codes.is_floating_point() and not torch.compiler.is_compiling() and bool(codes.isnan().any()):
        raise ValueError("expected labels, got NaN among them")
    return codes
