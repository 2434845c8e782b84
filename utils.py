"""Selectors: which pairs and triplets of a batch the online losses train on.

Each takes embeddings (B, D) and labels (B,) and returns int64 indices into the batch, on the embeddings' device,
found by tensor operations without gradient. Hand one to `OnlineContrastiveLoss` or `OnlineTripletLoss`:

    loss_fn = OnlineTripletLoss(margin=1.0, triplet_selector=SemihardNegativeTripletSelector(margin=1.0))

Letters: A anchors, R references, B batch, K samples of the largest class, P pairs, T triplets.
"""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pdist(vectors: Tensor) -> Tensor:
    """Squared Euclidean distances between all rows.

    The Gram matrix of the centred vectors is taken in float64, so neighbours are right far from the origin too, and
    neither autocast nor TF32 touches it. Distances (not squared) below about 1e-7 of the vectors' spread are not
    resolved. (MPS, which has no float64, uses float32.)

    Args:
        vectors: floating-point tensor (B, D), any device. Gradients flow.

    Returns:
        Tensor (B, B) on the same device, float32 (float64 for float64 input), never negative, zero on the diagonal and
        between equal rows; NaN off the diagonal where any input is not finite. O(B^2 D) time, O(B^2) memory.

    Raises:
        ValueError: for another shape.

    >>> pdist(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([[ 0., 25.],
            [25.,  0.]])
    """
    if not torch.is_tensor(vectors) or vectors.dim() != 2:
        raise ValueError(f"expected vectors of shape (B, D), got {_describe(vectors)}")
    comparison = _Comparison(vectors, None, len(vectors), start=0, may_read=False)
    return comparison.distances(0, len(vectors)).to(comparison.dtype)


class PairSelector:
    """Base class of pair selectors: override `get_pairs`."""

    def get_pairs(
        self, embeddings: Tensor, labels: Any, *, reference: Tensor | None = None, reference_labels: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Choose the pairs of a batch, or those of a batch with references.

        Args:
            embeddings: floating-point tensor (B, D).
            labels: class labels (B,) or (B, 1), numbers or strings: tensor, array, Series or list.
            reference: (R, D), compared with in place of the batch itself. Every (embedding, reference) is a pair.
            reference_labels: (R,), as the labels.

        Returns:
            `(positive_pairs, negative_pairs)`: int64 tensors (P, 2), each row i < j; (0, 2) where there are none. Given
            references, i is an index of embeddings, j of references.

        Raises:
            ValueError, TypeError: for other shapes or types, and labels that are NaN.
        """
        raise NotImplementedError


class _ComparingPairSelector(PairSelector):
    """Pair selectors of this module: subclasses say which negative pairs."""

    cpu = False
    balance = True  # as many negative pairs as positive ones, or all
    is_replaced = False

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        cls.is_replaced = cls.is_replaced or "get_pairs" in vars(cls)

    @torch.no_grad()
    def get_pairs(
        self, embeddings: Tensor, labels: Any, *, reference: Tensor | None = None, reference_labels: Any = None
    ) -> tuple[Tensor, Tensor]:
        comparison = _compare(embeddings, labels, reference, reference_labels, self.cpu)
        positive, negative = (torch.from_numpy(x.T.copy()).to(embeddings.device) for x in self._pairs(comparison))
        return positive, negative

    def offers_blocks(self, device: torch.device, is_share: bool = False) -> bool:
        """Whether `pair_blocks` stands for `get_pairs`: not where that is another's, or on another device."""
        return _has_own(self, _ComparingPairSelector.get_pairs, "get_pairs") and not (self.cpu and device.type != "cpu")

    def pair_blocks(self, comparison: Any, share: int = 0, n_shares: int = 1) -> list:
        """What `OnlineContrastiveLoss` asks for: the pairs, or one of several shares of them, block by block.

        An entry is `(rows, columns, is_pair)`, ranges of anchors and of references with a mask (b, c) or None: all are
        pairs, those of one batch once; or it is `(anchor, column, is_positive)`, indices (P,) and a mask.
        """
        if not self.balance:
            blocks = comparison.blocks(0, comparison.n_anchors, n_least=4 * n_shares if n_shares > 1 else 1)
            return [(*_ranges(comparison, first, last), None) for first, last in blocks[share::n_shares]]
        choose = self._chosen_indices if comparison.may_read else self._chosen_masks
        return [choose(comparison, share, n_shares)]

    def _chosen_indices(self, comparison, share, n_shares):
        positive, negative = self._pairs(comparison)
        anchor, column = np.concatenate((positive, negative), axis=1)
        is_positive = np.arange(len(anchor)) < positive.shape[1]
        found = (x[share::n_shares] for x in (anchor, column, is_positive))
        return tuple(torch.from_numpy(x).to(comparison.x.device) for x in found)

    @torch.no_grad()
    def _pairs(self, comparison):
        """Anchors and references, arrays (2, P), of the positive and of the negative pairs."""
        positive = _positive_pairs(comparison)
        return positive, self._negative_pairs(comparison, *positive)

    @torch.no_grad()
    def _chosen_masks(self, comparison, share, n_shares):
        # As many negative pairs as positive ones without reading how many: the first of all in order. O(A R) memory.
        rows, columns = _ranges(comparison, 0, comparison.n_anchors)
        is_positive, is_negative = _masks(comparison, rows, columns)
        order = self._keys(comparison).masked_fill(~is_negative, torch.inf).flatten().argsort()
        is_first = torch.arange(len(order), device=order.device) < is_positive.sum()
        is_chosen = is_negative & torch.empty_like(is_first).scatter_(0, order, is_first).view_as(is_negative)
        is_pair = is_positive | is_chosen
        if n_shares > 1:  # of rows
            rows = slice(len(is_pair) * share // n_shares, len(is_pair) * (share + 1) // n_shares)
        return rows, columns, is_pair[rows]

    def _negative_pairs(self, comparison, anchor, column):
        """Anchors and references, an array (2, P), of the negative pairs, given those of the positive ones."""
        raise NotImplementedError

    def _keys(self, comparison):
        """Numbers (A, R): the negative pairs with the smallest ones are taken."""
        raise NotImplementedError


class AllPositivePairSelector(_ComparingPairSelector):
    """All positive pairs, and all negative pairs or a random sample of as many.

    Args:
        balance: sample as many negative pairs as there are positive, uniformly without replacement. Where a batch has
            fewer negative pairs than positive ones, all of them are taken, and the two numbers differ.
        generator: `torch.Generator` for the sample. None: torch's global generator.

    >>> positive, negative = AllPositivePairSelector(balance=False).get_pairs(torch.zeros(3, 2), [0, 1, 0])
    >>> positive.tolist(), negative.tolist()
    ([[0, 2]], [[0, 1], [1, 2]])
    """

    def __init__(self, balance: bool = True, *, generator: torch.Generator | None = None) -> None:
        self.balance = balance
        self.generator = generator

    def _negative_pairs(self, comparison, anchor, column):
        # The q-th negative pair of all by arithmetic, so that a sample lists no others. An anchor's partners are the
        # references behind it, or all where it is none of them; its positives, `anchor` and `column`, are left out.
        A, R = comparison.n_anchors, comparison.R
        own = np.arange(A) if comparison.start == 0 else np.full(A, -1)
        n_positives = np.bincount(anchor, minlength=A)  # (A,)
        first_positive = n_positives.cumsum() - n_positives
        n_negatives = R - 1 - own - n_positives
        last_negative = n_negatives.cumsum()
        n_pairs, n_wanted = int(n_negatives.sum()), len(anchor)
        if self.balance and n_pairs > n_wanted:
            pair = _sample(n_pairs, n_wanted, self.generator, comparison.x.device)
        else:
            pair = np.arange(n_pairs)
        row = last_negative.searchsorted(pair, "right")  # (P,)
        rank = pair - (last_negative - n_negatives)[row]
        # So many negatives stand before each positive; from there the positives before a negative of that rank.
        n_before = column - own[anchor] - 1 - (np.arange(n_wanted) - first_positive[anchor])
        n_skipped = (anchor * (R + 1) + n_before).searchsorted(row * (R + 1) + rank, "right")
        return np.stack((row, own[row] + 1 + rank + n_skipped - first_positive[row]))

    def _keys(self, comparison):
        shape, device = (comparison.n_anchors, comparison.R), comparison.x.device
        if self.generator is None:  # a compiled graph takes no generator, not even None
            return torch.rand(shape, device=device)
        return torch.rand(shape, generator=self.generator, device=self.generator.device).to(device)


class HardNegativePairSelector(_ComparingPairSelector):
    """All positive pairs, and as many of the closest negative pairs (all of them where there are fewer).

    O(B^2 D) time; O(B D + P) memory where values may be read, as in `get_pairs` and on a CPU, and O(B^2) elsewhere.

    Args:
        cpu: select on the CPU; the indices still come back on the embeddings' device.

    >>> embeddings = torch.tensor([[0.0], [1.0], [5.0], [2.0]])
    >>> positive, negative = HardNegativePairSelector().get_pairs(embeddings, [0, 0, 1, 2])
    >>> positive.tolist(), negative.tolist()
    ([[0, 1]], [[1, 3]])
    """

    def __init__(self, cpu: bool = False) -> None:
        self.cpu = cpu

    def _negative_pairs(self, comparison, anchor, column):
        n, R, device = len(anchor), comparison.R, comparison.x.device
        distances = torch.empty(0, dtype=comparison.dtype, device=device)  # the smallest so far
        place, worst = torch.empty(0, dtype=torch.int64, device=device), math.inf  # of their pairs among all A R
        for first, last in comparison.blocks(0, comparison.n_anchors):
            rows, columns = _ranges(comparison, first, last)
            block = comparison.distances(first, last, columns.start).to(comparison.dtype)  # (b, c)
            _, is_near = _masks(comparison, rows, columns)
            if worst < math.inf:
                is_near &= ~(block > worst)  # what is not a number is kept
            found = _true_indices(is_near.flatten())
            found, near = _smallest(block.flatten().index_select(0, found), n, found)
            row = found // block.shape[1]
            found = found + (first + row) * R + columns.start - row * block.shape[1]  # among all A R
            place, distances = _smallest(torch.cat((distances, near)), n, torch.cat((place, found)))
            if n and len(distances) == n:
                worst = float(distances.max())
        return np.stack(np.divmod(place.cpu().numpy(), R))

    def _keys(self, comparison):
        return comparison.distances(0, comparison.n_anchors)


class TripletSelector:
    """Base class of triplet selectors: override `get_triplets`."""

    def get_triplets(
        self, embeddings: Tensor, labels: Any, *, reference: Tensor | None = None, reference_labels: Any = None
    ) -> Tensor:
        """Choose the triplets of a batch, or those of a batch with references.

        Args:
            embeddings: floating-point tensor (B, D).
            labels: class labels (B,) or (B, 1), numbers or strings: tensor, array, Series or list.
            reference: (R, D), compared with in place of the batch itself; none of them is taken to be the anchor.
            reference_labels: (R,), as the labels.

        Returns:
            int64 tensor (T, 3) of indices anchor, positive, negative; (0, 3) where nothing qualifies. Given references,
            positive and negative are indices of these, and each same-class (anchor, reference) is a pair once.

        Raises:
            ValueError, TypeError: for other shapes or types, and labels that are NaN.
        """
        raise NotImplementedError


class _ComparingTripletSelector(TripletSelector):
    """Triplet selectors of this module: subclasses say in `_choose` which triplets of a block of anchors."""

    cpu = False
    both_directions = False
    generator: torch.Generator | None = None
    draws = False
    is_replaced = False

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        cls.is_replaced = cls.is_replaced or "get_triplets" in vars(cls)

    @torch.no_grad()
    def get_triplets(
        self, embeddings: Tensor, labels: Any, *, reference: Tensor | None = None, reference_labels: Any = None
    ) -> Tensor:
        comparison = _compare(embeddings, labels, reference, reference_labels, self.cpu)
        triplets = [torch.empty(0, 3, dtype=torch.int64, device=comparison.x.device)]
        for choose, arguments in self.triplet_blocks(comparison, 0, comparison.n_anchors):
            first, last, positive, negative, is_chosen = choose(*arguments)
            if negative is None:  # all of them
                positive, negative, is_chosen = _with_all_negatives(comparison, first, last, positive, is_chosen)
            anchor = torch.arange(first, last, device=positive.device)[:, None].expand_as(is_chosen)
            chosen = _true_indices(is_chosen.flatten())
            triplets.append(torch.stack([x.flatten()[chosen] for x in (anchor, positive, negative)], dim=1))
        return torch.cat(triplets).to(embeddings.device)

    def offers_blocks(self, device: torch.device, is_share: bool = False) -> bool:
        """Whether `triplet_blocks` stands for `get_triplets`: not where that is another's, or on another device."""
        return _has_own(self, _ComparingTripletSelector.get_triplets, "get_triplets") and not (
            self.cpu and device.type != "cpu"
        )

    def triplet_blocks(self, comparison: Any, first: int, last: int) -> list[tuple[Callable, tuple]]:
        """What `OnlineTripletLoss` asks for: the triplets of anchors `first` to `last`, block by block.

        An entry is a function with its arguments. It returns `(first, last, positive, negative, is_chosen)`: a range of
        anchors, references (b, k), (b, k) and which of these triplets are chosen. Where `negative` is None every
        negative is, with each positive.
        """
        # Draws belong to the anchor and the positive, whatever the blocks, the columns and the number of processes.
        keys = _draw_keys(comparison, self.generator) if self.draws else None
        if comparison.K == 0:
            return []
        return [(self._block, (comparison, i, j, keys)) for i, j in comparison.blocks(first, last)]

    @torch.no_grad()
    def _block(self, comparison, first, last, keys=None):
        distances = comparison.distances(first, last).to(comparison.dtype)  # (b, R)
        if not getattr(self, "squared", True):
            distances = distances.sqrt_()
        column, is_class, is_positive = comparison.columns(first, last, self.both_directions)  # (b, K)
        of_class = distances.gather(1, column)
        positive = of_class.masked_fill(~is_positive, -torch.inf)
        negative = distances.scatter_(1, column, of_class.masked_fill_(is_class, torch.inf))  # (b, R)
        uniform = None if keys is None else _uniform(keys[first:last, None], column)
        return first, last, *self._choose(comparison, column, positive, negative, uniform)

    def _choose(self, comparison, column, positive, negative, uniform):
        """From references (b, K), distances to the positives among them, else -inf, and to negatives (b, R), else inf.

        Returns:
            Positives and negatives (b, k), (b, k), indices of references, and which triplets (b, k) are chosen.
        """
        raise NotImplementedError


class AllTripletSelector(_ComparingTripletSelector):
    """Every same-class pair with every sample of another class: O(B^2 K) triplets, 172,800 for 10 classes of 16.

    For their loss alone take `BatchAllTripletLoss` of losses.py, which has no need of the triplets.

    Args:
        both_directions: take each pair (i, j) as anchor and positive both ways; by default only i < j, i the anchor.

    >>> AllTripletSelector().get_triplets(torch.zeros(3, 2), [0, 1, 0]).tolist()
    [[0, 2, 1]]
    """

    def __init__(self, *, both_directions: bool = False) -> None:
        self.both_directions = both_directions

    @torch.no_grad()
    def _block(self, comparison, first, last, keys=None):
        column, _, is_positive = comparison.columns(first, last, self.both_directions)
        return first, last, column, None, is_positive


class BatchHardTripletSelector(_ComparingTripletSelector):
    """For each anchor its farthest positive and its nearest negative (Hermans et al. 2017, "batch hard").

    Anchors without a positive or without a negative are left out; ties go to the lower index.

    Args:
        cpu: select on the CPU; the indices still come back on the embeddings' device.

    >>> embeddings = torch.tensor([[0.0], [1.0], [3.0], [5.0]])
    >>> BatchHardTripletSelector().get_triplets(embeddings, [0, 0, 0, 1]).tolist()
    [[0, 2, 3], [1, 2, 3], [2, 0, 3]]
    """

    both_directions = True

    def __init__(self, cpu: bool = False) -> None:
        self.cpu = cpu

    def _choose(self, comparison, column, positive, negative, uniform):
        nearest, farthest = negative.argmin(dim=1, keepdim=True), positive.argmax(dim=1, keepdim=True)  # (b, 1)
        is_complete = (negative.gather(1, nearest) < torch.inf) & (positive.gather(1, farthest) >= 0)
        return column.gather(1, farthest), nearest, is_complete


class FunctionNegativeTripletSelector(_ComparingTripletSelector):
    """For each same-class pair i < j one negative, chosen by a function of your own.

    The function is called once for each pair, in Python: for the three strategies below use their selectors, which
    do the same without a loop.

    Args:
        margin: compared with squared distances, or with plain ones where `squared` is False; the same as the loss's.
        negative_selection_fn: takes the float array of d_ap^2 - d_an^2 + margin over all negatives of the anchor, in
            the order of the batch, and returns an index into it, or None for no triplet.
        cpu: select on the CPU; the indices still come back on the embeddings' device.
        squared: squared Euclidean distances; False for plain ones. The same as the loss's.
        both_directions: take each pair as anchor and positive both ways.

    >>> easiest = FunctionNegativeTripletSelector(2.0, lambda loss_values: int(loss_values.argmin()))
    >>> easiest.get_triplets(torch.tensor([[0.0], [1.0], [1.5], [9.0]]), [0, 0, 1, 2]).tolist()
    [[0, 1, 3]]
    """

    def __init__(
        self,
        margin: float,
        negative_selection_fn: Callable[[np.ndarray], int | None],
        cpu: bool = False,
        *,
        squared: bool = True,
        both_directions: bool = False,
    ) -> None:
        _check_margin(margin)
        self.margin = margin
        self.negative_selection_fn = negative_selection_fn
        self.cpu = cpu
        self.squared = squared
        self.both_directions = both_directions

    def offers_blocks(self, device: torch.device, is_share: bool = False) -> bool:
        """As of the other selectors. A function of your own reads values, and may draw: it is asked for all anchors."""
        is_ours = type(self)._choose is not FunctionNegativeTripletSelector._choose
        is_able = device.type == "cpu" and not torch.compiler.is_compiling() and not is_share
        return super().offers_blocks(device, is_share) and (is_ours or is_able)

    def triplet_blocks(self, comparison: Any, first: int, last: int) -> list[tuple[Callable, tuple]]:
        """As of the other selectors; a function of your own is called once a pair, second derivatives included."""
        blocks = super().triplet_blocks(comparison, first, last)
        is_ours = type(self)._choose is not FunctionNegativeTripletSelector._choose
        return blocks if is_ours else [(functools.cache(choose), arguments) for choose, arguments in blocks]

    def _choose(self, comparison, column, positive, negative, uniform):
        is_positive, chosen = positive >= 0, torch.full_like(column, -1)  # NaN is no distance
        rows, positives = negative.cpu().numpy(), positive.cpu().numpy()
        for a, k in is_positive.nonzero().tolist():
            negatives = np.flatnonzero(rows[a] < np.inf)
            loss_values = positives[a, k] - rows[a, negatives] + rows.dtype.type(self.margin)
            index = self.negative_selection_fn(loss_values) if len(negatives) else None
            if index is not None:
                chosen[a, k] = int(negatives[index])
        return column, chosen.clamp(min=0), chosen >= 0


class HardestNegativeTripletSelector(FunctionNegativeTripletSelector):
    """For each same-class pair i < j the negative nearest to i, where it violates the margin.

    A triplet violates it when d_ap^2 - d_an^2 + margin > 0. Ties go to the lower index.

    Args:
        margin: compared with squared distances, or with plain ones where `squared` is False; the same as the loss's.
        cpu: select on the CPU; the indices still come back on the embeddings' device.
        squared: squared Euclidean distances; False for plain ones. The same as the loss's.
        both_directions: take each pair as anchor and positive both ways.

    >>> embeddings = torch.tensor([[0.0], [1.0], [1.5], [9.0]])
    >>> HardestNegativeTripletSelector(margin=2.0).get_triplets(embeddings, [0, 0, 1, 1]).tolist()
    [[0, 1, 2], [2, 3, 1]]
    """

    def __init__(
        self, margin: float, cpu: bool = False, *, squared: bool = True, both_directions: bool = False
    ) -> None:
        super().__init__(margin, hardest_negative, cpu, squared=squared, both_directions=both_directions)

    def _choose(self, comparison, column, positive, negative, uniform):
        nearest = negative.argmin(dim=1, keepdim=True)  # (b, 1)
        return column, nearest.expand_as(column), negative.gather(1, nearest) < positive + self.margin


class RandomNegativeTripletSelector(FunctionNegativeTripletSelector):
    """For each same-class pair i < j a negative drawn uniformly from those that violate the margin.

    A triplet violates it when d_ap^2 - d_an^2 + margin > 0. O(B^2 (D + log B)) time, O(B (D + K)) memory on a CPU.

    Args:
        margin: compared with squared distances, or with plain ones where `squared` is False; the same as the loss's.
        cpu: select on the CPU; the indices still come back on the embeddings' device.
        squared: squared Euclidean distances; False for plain ones. The same as the loss's.
        both_directions: take each pair as anchor and positive both ways.
        generator: `torch.Generator` for the draws. None: torch's global generator.

    >>> embeddings = torch.tensor([[0.0], [1.0], [1.5], [9.0]])
    >>> RandomNegativeTripletSelector(margin=2.0).get_triplets(embeddings, [0, 0, 1, 2]).tolist()
    [[0, 1, 2]]
    """

    draws = True

    def __init__(
        self,
        margin: float,
        cpu: bool = False,
        *,
        squared: bool = True,
        both_directions: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(margin, random_hard_negative, cpu, squared=squared, both_directions=both_directions)
        self.generator = generator

    def _choose(self, comparison, column, positive, negative, uniform):
        # With an anchor's negatives sorted, those that qualify for a pair are a range: a draw is one index.
        distances, order = _sort_rows(negative, comparison.may_read)  # (b, R)
        start = self._first(distances, positive)  # (b, K)
        stop = torch.searchsorted(distances, positive + self.margin)
        rank = torch.minimum(start + (uniform * (stop - start)).long(), stop - 1).clamp_(min=0)
        is_chosen = (start < stop) & (distances.gather(1, rank) < torch.inf)  # NaN is not
        return column, order.gather(1, rank), is_chosen

    def _first(self, distances, positive):
        """Where the negatives that qualify begin in the sorted ones."""
        return 0 * positive.long()


class SemihardNegativeTripletSelector(RandomNegativeTripletSelector):
    """For each same-class pair i < j a negative drawn uniformly from the semi-hard ones (Schroff et al. 2015, 3.2).

    Semi-hard: farther than the positive, but within the margin, d_ap^2 < d_an^2 < d_ap^2 + margin.
    O(B^2 (D + log B)) time, O(B (D + K)) memory on a CPU.

    Args:
        margin: compared with squared distances, or with plain ones where `squared` is False; the same as the loss's.
        cpu: select on the CPU; the indices still come back on the embeddings' device.
        squared: squared Euclidean distances; False for plain ones. The same as the loss's.
        both_directions: take each pair as anchor and positive both ways.
        generator: `torch.Generator` for the draws. None: torch's global generator.

    >>> embeddings = torch.tensor([[0.0], [1.0], [1.5], [9.0], [-0.5]])
    >>> SemihardNegativeTripletSelector(margin=2.0).get_triplets(embeddings, [0, 0, 1, 2, 3]).tolist()
    [[0, 1, 2]]
    """

    def __init__(
        self,
        margin: float,
        cpu: bool = False,
        *,
        squared: bool = True,
        both_directions: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(margin, cpu, squared=squared, both_directions=both_directions, generator=generator)
        self.negative_selection_fn = functools.partial(semihard_negative, margin=margin)

    def _first(self, distances, positive):
        return torch.searchsorted(distances, positive, right=True)


def hardest_negative(loss_values: np.ndarray) -> int | None:
    """Index of the largest loss if it is above 0, else None.

    >>> hardest_negative(np.array([0.1, 0.7, -0.2])), hardest_negative(np.array([-0.1, 0.0]))
    (1, None)
    """
    loss_values = torch.as_tensor(loss_values)
    hardest = int(loss_values.argmax())
    return hardest if loss_values[hardest] > 0 else None


def random_hard_negative(loss_values: np.ndarray) -> int | None:
    """Index drawn uniformly from the losses above 0, None if there are none.

    >>> random_hard_negative(np.array([-0.1, 0.7, -0.2]))
    1
    """
    return _draw_index(torch.as_tensor(loss_values) > 0)


def semihard_negative(loss_values: np.ndarray, margin: float) -> int | None:
    """Index drawn uniformly from the losses strictly between 0 and `margin`, None if there are none.

    >>> semihard_negative(np.array([-0.1, 0.7, 0.2]), margin=0.5)
    2
    """
    loss_values = torch.as_tensor(loss_values)
    return _draw_index((loss_values > 0) & (loss_values < margin))


def _draw_index(is_candidate):
    candidates = is_candidate.nonzero()
    return int(candidates[torch.randint(len(candidates), ())]) if len(candidates) else None


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


def _ranges(comparison, first, last):
    """A block's anchors and references: of one batch those from the first anchor on, as each pair stands once."""
    return slice(first, last), slice(first if comparison.start == 0 else 0, comparison.R)


def _masks(comparison, rows, columns):
    """The positive and the negative pairs (b, c) of such ranges, those of one batch above the diagonal."""
    labels = comparison.labels
    is_positive = labels[rows, None] == labels[comparison.start + columns.start :]
    is_negative = ~is_positive
    return (is_positive.triu_(1), is_negative.triu_(1)) if comparison.start == 0 else (is_positive, is_negative)


def _positive_pairs(comparison):
    """Anchors and references of all positive pairs, an array (2, P)."""
    pairs = [np.empty((2, 0), np.int64)]
    for first, last in comparison.blocks(0, comparison.n_anchors):
        column, _, is_pair = comparison.read_columns(first, last)
        row, k = is_pair.nonzero()
        pairs.append(np.stack((row + first, column[row, k])))
    return np.concatenate(pairs, axis=1)


def _with_all_negatives(comparison, first, last, positive, is_chosen):
    """Each positive (b, K) with every reference, (b, K R), and which of these are triplets."""
    labels = comparison.labels
    is_negative = labels[first:last, None] != labels[comparison.start :]  # (b, R)
    shape = (*positive.shape, comparison.R)
    negative = torch.arange(comparison.R, device=positive.device).expand(shape)
    is_triplet = is_chosen[:, :, None] & is_negative[:, None]
    return (x.expand(shape).flatten(1) for x in (positive[:, :, None], negative, is_triplet))


def _true_indices(mask):
    """Indices of what is true in a mask (N,)."""
    if mask.device.type == "cpu":  # numpy takes a fifth of the time here, and in the next two functions
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def _smallest(values, k, others):
    """The k smallest values (N,), or all if there are no more, in any order, behind what stands at the same places."""
    if len(values) <= k:
        return others, values
    if values.device.type == "cpu":
        kept = torch.from_numpy(np.argpartition(values.numpy(), k)[:k])
    else:
        kept = values.topk(k, largest=False, sorted=False).indices
    return others.index_select(0, kept), values.index_select(0, kept)


def _sort_rows(distances, may_read):
    """Rows (b, R) in ascending order, and the order."""
    if distances.device.type != "cpu" or not may_read or distances.dtype != torch.float32:
        return distances.sort(dim=1, stable=True)
    # As numbers of 64 bits, the distance's above those of its index: numpy sorts these faster.
    high = 1 if sys.byteorder == "little" else 0
    packed = np.empty((*distances.shape, 2), np.int32)
    np.bitwise_and(distances.numpy().view(np.int32), 0x7FFFFFFF, out=packed[..., high])  # NaN has either sign
    packed[..., 1 - high] = np.arange(distances.shape[1], dtype=np.int32)
    packed.view(np.int64).sort(axis=1)
    distances, order = (torch.from_numpy(np.ascontiguousarray(packed[..., i])) for i in (high, 1 - high))
    return distances.view(torch.float32), order.long()


def _sample(n, k, generator, device):
    """Different whole numbers (k,) below n, which is more than k: O(k) memory, but for small n."""
    device = device if generator is None else generator.device
    if n <= max(4 * k, 2**16):
        return torch.randperm(n, generator=generator, device=device)[:k].cpu().numpy()
    numbers = np.empty(0, np.int64)
    while len(numbers) < k:  # the first k different ones of a row of draws
        drawn = torch.randint(n, (2 * k,), generator=generator, device=device).cpu().numpy()
        numbers = drawn[np.sort(np.unique(drawn, return_index=True)[1])[:k]]
    return numbers


def _draw_keys(comparison, generator):
    """A random number of 63 bits for each anchor, (A,)."""
    shape, device = (comparison.n_anchors,), comparison.x.device
    if generator is None:  # a compiled graph takes no generator, not even None
        return torch.randint(2**63 - 1, shape, device=device)
    return torch.randint(2**63 - 1, shape, generator=generator, device=generator.device).to(device)


def _uniform(keys, column):
    """Numbers in [0, 1) for keys (b, 1) and columns (b, K): the top 24 bits of SplitMix64 (Steele, Lea, Flood 2014)."""
    z = keys + (column + 1) * -0x61C8864680B583EB  # the golden ratio; multiplication wraps
    z = (z ^ (z >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & 2**37 - 1)) * -0x6B2FB644ECCEEE15
    return ((z ^ (z >> 31 & 2**33 - 1)) >> 40 & 2**24 - 1).to(torch.float32) / 2**24


def _has_own(selector, method, name):
    """Whether no subclass and no user has put another method in place of ours, `method`."""
    if selector.is_replaced or name in selector.__dict__:
        return False
    return torch.compiler.is_compiling() or getattr(type(selector), name) is method  # which torch 2.4 cannot compile


def _compare(embeddings, labels, reference, reference_labels, cpu):
    """What a selector is asked, checked, on one device."""
    if not torch.is_tensor(embeddings) or embeddings.dim() != 2:
        raise ValueError(f"expected embeddings of shape (B, D), got {_describe(embeddings)}")
    if (reference is None) != (reference_labels is None):
        raise TypeError("reference and reference_labels go together: got one of them")
    device = torch.device("cpu") if cpu else embeddings.device
    points, n_anchors = embeddings.to(device), len(embeddings)
    if reference is None:
        return _Comparison(points, _code_labels(device, (labels, n_anchors)), n_anchors, 0)
    if not torch.is_tensor(reference) or reference.dim() != 2 or reference.shape[1] != embeddings.shape[1]:
        raise ValueError(f"expected references of shape (R, {embeddings.shape[1]}), got {_describe(reference)}")
    codes = _code_labels(device, (labels, n_anchors), (reference_labels, len(reference)))
    return _Comparison(torch.cat((points, reference.to(device))), codes, n_anchors, n_anchors)


def _check_margin(margin):
    if not 0 <= margin < math.inf:
        raise ValueError(f"expected a margin that is finite and not negative, got {margin}")


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


def _describe(value):
    return f"a tensor of shape {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
