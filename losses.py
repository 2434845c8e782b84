"""Losses on embeddings: contrastive and triplet, on given pairs and triplets or on those selected in a batch.

`ContrastiveLoss` and `TripletLoss` take the outputs of SiameseNet and TripletNet. The online losses take one batch of
embeddings with its labels and a selector, any object with `get_pairs` or `get_triplets`:

    loss = OnlineContrastiveLoss(margin=1.0, pair_selector=HardNegativePairSelector())(embeddings, labels)

Letters: B batch, D embedding dimension, P pairs, T triplets. Half-precision embeddings are computed with in float32.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

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
            ValueError, TypeError: for other shapes or arguments.
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
        target = target.reshape(-1).to(distances.dtype)
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


class OnlineContrastiveLoss(nn.Module):
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

    def __init__(self, margin: float, pair_selector: Any) -> None:
        super().__init__()
        if not hasattr(pair_selector, "get_pairs"):
            given = f"got {type(pair_selector).__name__}; triplet selectors go to OnlineTripletLoss"
            raise TypeError(f"expected a pair selector, with get_pairs, {given}")
        self.margin = margin
        self.pair_selector = pair_selector

    def forward(self, embeddings: Tensor, target: Tensor | None = None, *unexpected: Any) -> Tensor:
        """Select pairs and compute their loss.

        Args:
            embeddings: (B, D), any floating dtype and device.
            target: class labels (B,).

        Returns:
            Scalar tensor, float32 at least; where nothing is selected a zero that still has a graph.

        Raises:
            ValueError, TypeError: for other shapes or arguments.
        """
        offline = "for the outputs of SiameseNet use ContrastiveLoss"
        _check_online("OnlineContrastiveLoss", offline, embeddings, target, unexpected)
        pairs = self.pair_selector.get_pairs(embeddings, target)
        positive_pairs, negative_pairs = (indices.to(embeddings.device) for indices in pairs)
        if len(positive_pairs) + len(negative_pairs) == 0:
            return _zero_with_graph(embeddings)
        positive_losses = _distances_of(embeddings, *positive_pairs.unbind(dim=1))  # (P,)
        negative_distances = _sqrt(_distances_of(embeddings, *negative_pairs.unbind(dim=1)))
        return torch.cat((positive_losses, F.relu(self.margin - negative_distances).square())).mean()


class OnlineTripletLoss(nn.Module):
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
        self.margin = margin
        self.triplet_selector = triplet_selector
        self.squared = squared
        self.soft_margin = soft_margin

    def forward(self, embeddings: Tensor, target: Tensor | None = None, *unexpected: Any) -> tuple[Tensor, Tensor]:
        """Select triplets and compute their loss.

        Args:
            embeddings: (B, D), any floating dtype and device.
            target: class labels (B,).

        Returns:
            `(loss, count)`: scalar tensor, float32 at least, and 0-dim int64 tensor, the number of triplets whose loss
            is above zero. Where nothing is selected the loss is a zero that still has a graph.

        Raises:
            ValueError, TypeError: for other shapes or arguments.
        """
        offline = "for the outputs of TripletNet use TripletLoss"
        _check_online("OnlineTripletLoss", offline, embeddings, target, unexpected)
        triplets = self.triplet_selector.get_triplets(embeddings, target).to(embeddings.device)  # (T, 3)
        if len(triplets) == 0:
            return _zero_with_graph(embeddings), torch.zeros((), dtype=torch.int64, device=embeddings.device)
        anchor, positive, negative = triplets.unbind(dim=1)  # (T,) each
        rows, columns = anchor.repeat(2), torch.cat((positive, negative))  # (2 T,)
        d_ap, d_an = _distances_of(embeddings, rows, columns, self.squared).chunk(2)  # (T,) each
        losses = _hinge(d_ap, d_an, self.margin, self.soft_margin)
        return losses.mean(), (losses > 0).sum()


class BatchAllTripletLoss(nn.Module):
    """Triplet loss of all valid triplets of a batch, exact, without forming one (Hermans et al. 2017, "batch all").

    relu(d_ap^2 - d_an^2 + margin), summed over every anchor, positive and negative, divided by the number of these
    triplets or of the active ones, whose loss is above zero. O(B^2 log K) time for K samples a class, on a GPU and
    compiled O(B^2 log B), and O(B^2) memory.

    An active triplet adds d_ap - d_an + margin. So with W_ij, how many active triplets hold distance d_ij as
    anchor-positive less how many hold it as anchor-negative, the sum is sum_ij W_ij d_ij + margin * count; and W, whole
    numbers, is constant wherever the gradient exists. Only W is needed, and each row of it takes one sort of an
    anchor's positives and a search for each negative.

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

    def __init__(
        self, margin: float, *, squared: bool = True, both_directions: bool = True, average: str = "active"
    ) -> None:
        super().__init__()
        if average not in ("active", "all"):
            raise ValueError(f'expected average="active" or "all", got {average!r}')
        self.margin = margin
        self.squared = squared
        self.both_directions = both_directions
        self.average = average

    def forward(self, embeddings: Tensor, target: Tensor | None = None, *unexpected: Any) -> tuple[Tensor, Tensor]:
        """Compute the loss.

        Args:
            embeddings: (B, D), any floating dtype and device.
            target: class labels (B,).

        Returns:
            `(loss, count)`: scalar tensor, float32 at least, and 0-dim int64 tensor, the number of active triplets.
            Where there is none the loss is a zero that still has a graph. No value is read, so a GPU does not wait.

        Raises:
            ValueError, TypeError: for other shapes or arguments.
        """
        offline = "for the outputs of TripletNet use TripletLoss"
        _check_online("BatchAllTripletLoss", offline, embeddings, target, unexpected)
        labels = torch.as_tensor(target, device=embeddings.device).reshape(-1)
        labels, order = labels.to(torch.promote_types(labels.dtype, torch.int32)).sort()  # bool has no searchsorted
        distances = _AllDistances.apply(embeddings.index_select(0, order), self.squared)  # (B, B)
        with torch.no_grad():
            weights, n_active, n_valid = _active_counts(distances, labels, order, self.margin, self.both_directions)
        sum_of_distances = (weights * distances).sum(dim=1).to(_wide(embeddings)).sum()
        total = sum_of_distances + self.margin * n_active.to(sum_of_distances.dtype)
        n_averaged = n_active if self.average == "active" else n_valid
        return (total / n_averaged.clamp(min=1)).to(distances.dtype), n_active


class GlobalBatchLoss(nn.Module):
    """An online loss over the embeddings of all processes of torch.distributed, as if they were one batch.

    Each process gathers the embeddings and labels of all, in the order of their ranks, and computes the same loss from
    them, with the same random draws. Of the gradient it keeps what belongs to its own embeddings, times the number of
    processes: DistributedDataParallel takes the mean over processes, so the weights get the gradient of one process
    with the whole batch. Time and memory are those of the whole batch in every process. Batches may differ in size, but
    every process must make every call. Without torch.distributed, or with one process, only the draws are other ones.

    Args:
        loss_fn: an online loss, or anything called as `loss_fn(embeddings, target)`.
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

    def forward(self, embeddings: Tensor, target: Tensor | None = None, *unexpected: Any) -> Any:
        """Gather and compute the loss.

        Args:
            embeddings: (B, D) of this process, any floating dtype and device.
            target: class labels (B,).

        Returns:
            What `loss_fn` returns, the same in all processes.

        Raises:
            ValueError: embeddings of different D; and what `loss_fn` raises.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            n_processes = torch.distributed.get_world_size(self.process_group)
        else:
            n_processes = 1
        if n_processes > 1:
            offline = "the outputs of SiameseNet and TripletNet need no gathering"
            _check_online("GlobalBatchLoss", offline, embeddings, target, unexpected)
            embeddings, target = _gather(embeddings, target, self.process_group)
        self.n_calls += 1
        with _seeded(self.seed + self.n_calls, embeddings.device):
            return self.loss_fn(embeddings, target, *unexpected)

    def get_extra_state(self) -> int:
        """The number of calls, for the state dict: the next draws depend on it."""
        return self.n_calls

    def set_extra_state(self, state: int) -> None:
        """Go on behind so many calls."""
        self.n_calls = state


class _AllDistances(torch.autograd.Function):
    """Distances (B, B) of all rows, in float32 at least, the Gram matrix in float64 as in `pdist` of utils.py.

    Backward, weights W on squared distances give 2 (diag(S 1) - S) X with S = W + W^T: a graph Laplacian, two products,
    and none of the (B, B) tensors that autograd would keep.
    """

    @staticmethod
    def forward(ctx, embeddings, squared):
        x = embeddings.to(_wide(embeddings))  # (B, D)
        distances = _squared_distances(x - x.mean(dim=0)).to(torch.promote_types(embeddings.dtype, torch.float32))
        if not squared:
            distances = distances.sqrt_()
        ctx.save_for_backward(embeddings, None if squared else distances)
        return distances

    @staticmethod
    def backward(ctx, weights):
        embeddings, distances = ctx.saved_tensors
        # Products in float32 are twice as fast on a CPU; plain distances weigh near points by 1 / d and need float64,
        # and on a GPU float32 could be TF32.
        is_fast = distances is None and weights.device.type == "cpu"
        dtype, factor = (weights.dtype if is_fast else _wide(weights)), 2
        if distances is not None:  # W / (2 d), the derivative of the square root, 0 at coincident points
            weights, factor = weights / distances.masked_fill(distances == 0, torch.inf), 1
        x = embeddings.to(_wide(embeddings))
        x, weights = (x - x.mean(dim=0)).to(dtype), weights.to(dtype)
        x_and_ones = torch.cat((x, x.new_ones(len(x), 1)), dim=1)  # (B, D + 1)
        with torch.autocast(weights.device.type, enabled=False):
            sums = weights @ x_and_ones + weights.T @ x_and_ones  # S X and S 1, (B, D + 1)
        return (factor * (sums[:, -1:] * x - sums[:, :-1])).to(embeddings.dtype), None


def _active_counts(distances, labels, order, margin, both_directions):
    """Weights W (B, B) of the distances, and the numbers of active and of valid triplets; labels (B,) ascending.

    A negative at distance d is active with the positives whose threshold d_ap + margin is above d. With an anchor's
    thresholds sorted, these are the ones behind d's place among them.
    """
    B, device = len(labels), labels.device
    start, stop = torch.searchsorted(labels, labels), torch.searchsorted(labels, labels, right=True)  # (B,)
    # A row of thresholds holds one class. Reading K would make a GPU wait and break a compiled graph: there it holds B.
    K = int((stop - start).max()) if B and device.type == "cpu" and not torch.compiler.is_compiling() else B
    column = start[:, None] + torch.arange(K, device=device)  # (B, K)
    is_positive = (column < stop[:, None]) & (column != torch.arange(B, device=device)[:, None])
    column = column.clamp(max=B - 1)
    if not both_directions:
        is_positive &= order[column] > order[:, None]
    is_negative = labels[:, None] != labels  # (B, B)

    thresholds = torch.where(is_positive, distances.gather(1, column) + margin, -torch.inf)  # (B, K)
    thresholds, rank = thresholds.sort(dim=1)
    place = torch.searchsorted(thresholds, distances, right=True)  # (B, B), thresholds not above d
    n_at_place = distances.new_zeros(B, K + 1).scatter_add_(1, place, is_negative.to(distances.dtype))
    n_negatives = torch.empty_like(thresholds).scatter_(1, rank, n_at_place.cumsum(dim=1)[:, :K])  # (B, K)
    weights = place.sub_(K).mul_(is_negative).to(distances.dtype).scatter_add_(1, column, n_negatives)

    n_active = n_negatives.long().sum()
    n_valid = (is_positive.sum(dim=1) * is_negative.sum(dim=1)).sum()
    return weights, n_active, n_valid


class _GatherRows(torch.autograd.Function):
    """The rows (n, D) of all processes, (sum of n, D); backward the gradient of the own rows, times the processes."""

    @staticmethod
    def forward(ctx, rows, sizes, group):
        rank = torch.distributed.get_rank(group)
        ctx.factor, ctx.own = len(sizes), slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # of one size everywhere
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(gathered, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes)])

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient[ctx.own], None, None


def _gather(embeddings, target, group):
    """Embeddings in float32 at least and labels of all processes."""
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    labels = torch.as_tensor(target, device=embeddings.device).reshape(-1).long()
    shape = torch.tensor(embeddings.shape, device=embeddings.device)
    shapes = [torch.empty_like(shape) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(shapes, shape, group=group)
    sizes, widths = zip(*(shape.tolist() for shape in shapes))
    if len(set(widths)) > 1:
        raise ValueError(f"expected embeddings of one D in all processes, got {', '.join(map(str, widths))}")
    return _GatherRows.apply(embeddings, sizes, group), _GatherRows.apply(labels, sizes, group)


@contextlib.contextmanager
def _seeded(seed, device):
    """Random numbers of a seed, on the CPU and the device; behind, the generators are where they were."""
    index = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(index):
        torch.default_generator.manual_seed(seed)
        for i in index:
            torch.cuda.default_generators[i].manual_seed(seed)
        yield


def _wide(embeddings):
    """The widest dtype of the embeddings' device."""
    return torch.float32 if embeddings.device.type == "mps" else torch.float64


def _squared_distances(x):
    """Squared distances (B, B) of the rows of a centred float64 matrix (B, D)."""
    rounding = 2 * torch.finfo(x.dtype).eps * (2 + x.shape[1] ** 0.5)  # so much too short that equal rows clamp to 0
    norms = x.square().sum(dim=1) * (1 - rounding)  # (B,)
    return torch.addmm(norms[None], x, x.T, alpha=-2).add_(norms[:, None]).clamp_(min=0).fill_diagonal_(0)


def _hinge(d_ap, d_an, margin, soft_margin):
    """One loss for each triplet, (T,)."""
    violation = d_ap - d_an + margin
    return F.softplus(violation) if soft_margin else F.relu(violation)


def _distances(x, y, squared=True):
    """Distances of paired rows, (P,), in float32 at least; the norm's gradient at coincident points is 0, not NaN."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    difference = x.to(dtype) - y.to(dtype)
    return difference.square().sum(dim=1) if squared else torch.linalg.vector_norm(difference, dim=1)


def _distances_of(embeddings, rows, columns, squared=True):
    """Distances of embeddings (B, D) at index pairs, (P,), (P,): gathered, or for many pairs looked up among all B^2.

    A gathered pair costs D numbers both ways; measured, all B^2 distances are cheaper from about B^2 / 8 pairs on.
    """
    if 8 * len(rows) < len(embeddings) ** 2:
        # In float32 ahead of the gathers, so that gradients of the same embedding add up in it.
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return _distances(embeddings.index_select(0, rows), embeddings.index_select(0, columns), squared)
    distances = _AllDistances.apply(embeddings, squared)  # (B, B)
    return distances.flatten().index_select(0, rows * len(embeddings) + columns)


def _sqrt(squared_distances):
    """Square root whose gradient at 0 is 0, not infinite."""
    is_zero = squared_distances == 0
    return squared_distances.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)


def _zero_with_graph(embeddings):
    """A zero to call backward on; NaN where embeddings or their squares are not finite, so that none goes unseen."""
    return (embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)).square() * 0).sum()


def _check_flag(remedy, size_average):
    if not isinstance(size_average, (bool, int)) and type(size_average).__name__ != "bool_":  # a target in its place
        shape = f" of shape {tuple(size_average.shape)}" if torch.is_tensor(size_average) else ""
        raise TypeError(f"{remedy}; got one argument too many, a {type(size_average).__name__}{shape}")


def _check_same_shape(remedy, *embeddings):
    shapes = [tuple(x.shape) for x in embeddings]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"{remedy}; expected embeddings of one shape (B, D), got {', '.join(map(str, shapes))}")


def _check_online(name, offline, embeddings, target, unexpected):
    remedy = f"{name} takes one batch of embeddings (B, D) and its labels (B,); {offline}"
    if target is None or unexpected or not torch.is_tensor(embeddings):
        given = 1 + (target is not None) + len(unexpected)
        raise TypeError(f"{remedy}; got {given} argument(s), the first a {type(embeddings).__name__}")
    shape, B = tuple(torch.as_tensor(target).shape), len(embeddings)
    if embeddings.dim() != 2 or shape not in ((B,), (B, 1)):
        raise ValueError(f"{remedy}; got shapes {tuple(embeddings.shape)} and {shape}")
