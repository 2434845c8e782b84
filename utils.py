"""Selectors: which pairs and triplets of a batch the online losses train on.

Each takes embeddings (B, D) and labels (B,) and returns int64 indices into the batch, on the embeddings' device,
found by tensor operations without gradient. Hand one to `OnlineContrastiveLoss` or `OnlineTripletLoss`:

    loss_fn = OnlineTripletLoss(margin=1.0, triplet_selector=SemihardNegativeTripletSelector(margin=1.0))

Letters: B batch, D embedding dimension, P pairs, T triplets. Distances are squared Euclidean unless `squared=False`.
"""

from collections.abc import Callable

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
    x = vectors.to(torch.float32 if vectors.device.type == "mps" else torch.float64)
    return _squared_distances(x - x.mean(dim=0)).to(torch.promote_types(vectors.dtype, torch.float32))


class PairSelector:
    """Base class of pair selectors: override `get_pairs`."""

    def get_pairs(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the pairs of a batch.

        Args:
            embeddings: floating-point tensor (B, D).
            labels: class labels (B,) or (B, 1); tensor, array or list.

        Returns:
            `(positive_pairs, negative_pairs)`: int64 tensors (P, 2), each row i < j; (0, 2) where there are none.

        Raises:
            ValueError: for other shapes.
        """
        raise NotImplementedError


class AllPositivePairSelector(PairSelector):
    """All positive pairs, and all negative pairs or a random sample of as many.

    Args:
        balance: sample as many negative pairs as there are positive, uniformly without replacement. Where a batch has
            fewer negative pairs than positive ones, all of them are taken, and the two numbers differ.
        generator: `torch.Generator` for the sample; None draws from torch's own, which `torch.manual_seed` governs.

    >>> positive, negative = AllPositivePairSelector(balance=False).get_pairs(torch.zeros(3, 2), [0, 1, 0])
    >>> positive.tolist(), negative.tolist()
    ([[0, 2]], [[0, 1], [1, 2]])
    """

    def __init__(self, balance: bool = True, *, generator: torch.Generator | None = None) -> None:
        self.balance = balance
        self.generator = generator

    @torch.no_grad()
    def get_pairs(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        embeddings, labels = _check_batch(embeddings, labels)
        same = labels[:, None] == labels  # (B, B)
        positive_pairs = same.triu(1).nonzero()  # (P, 2)
        negative_pairs = (~same).triu(1).nonzero()
        if self.balance and len(negative_pairs) > len(positive_pairs):
            device = embeddings.device if self.generator is None else self.generator.device
            order = torch.randperm(len(negative_pairs), generator=self.generator, device=device)
            negative_pairs = negative_pairs[order[: len(positive_pairs)].to(negative_pairs.device)]
        return positive_pairs, negative_pairs


class HardNegativePairSelector(PairSelector):
    """All positive pairs, and as many of the closest negative pairs (all of them where there are fewer).

    Args:
        cpu: select on the CPU; the indices still come back on the embeddings' device.

    >>> embeddings = torch.tensor([[0.0], [1.0], [5.0], [2.0]])
    >>> positive, negative = HardNegativePairSelector().get_pairs(embeddings, [0, 0, 1, 2])
    >>> positive.tolist(), negative.tolist()
    ([[0, 1]], [[1, 3]])
    """

    def __init__(self, cpu: bool = False) -> None:
        self.cpu = cpu

    @torch.no_grad()
    def get_pairs(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x, labels = _check_batch(embeddings, labels, self.cpu)
        same = labels[:, None] == labels  # (B, B)
        positive_pairs = same.triu(1).nonzero()  # (P, 2)
        negatives = _true_indices((~same).triu(1).flatten())  # (N,), into the B^2 pairs
        if len(negatives) > len(positive_pairs):
            distances = pdist(x).flatten().index_select(0, negatives)
            negatives = negatives[_smallest(distances, len(positive_pairs))]
        negative_pairs = torch.stack((negatives // len(x), negatives % len(x)), dim=1)
        return positive_pairs.to(embeddings.device), negative_pairs.to(embeddings.device)


class TripletSelector:
    """Base class of triplet selectors: override `get_triplets`."""

    def get_triplets(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Choose the triplets of a batch.

        Args:
            embeddings: floating-point tensor (B, D).
            labels: class labels (B,) or (B, 1); tensor, array or list.

        Returns:
            int64 tensor (T, 3) of indices anchor, positive, negative; (0, 3) where nothing qualifies.

        Raises:
            ValueError: for other shapes.
        """
        raise NotImplementedError


class AllTripletSelector(TripletSelector):
    """Every same-class pair with every sample of another class: O(B^2 K) triplets, 172,800 for 10 classes of 16.

    For their loss alone take `BatchAllTripletLoss` of losses.py: the same number in O(B^2 log K), without the triplets.

    Args:
        both_directions: take each pair (i, j) as anchor and positive both ways; by default only i < j, i the anchor.

    >>> AllTripletSelector().get_triplets(torch.zeros(3, 2), [0, 1, 0]).tolist()
    [[0, 2, 1]]
    """

    def __init__(self, *, both_directions: bool = False) -> None:
        self.both_directions = both_directions

    @torch.no_grad()
    def get_triplets(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        embeddings, labels = _check_batch(embeddings, labels)
        same = labels[:, None] == labels  # (B, B)
        anchor, positive = _positive_pairs(same, self.both_directions)  # (P,), (P,)
        pair, negative = (~same)[anchor].nonzero().T  # (T,), (T,)
        return torch.stack((anchor[pair], positive[pair], negative), dim=1)


class BatchHardTripletSelector(TripletSelector):
    """For each anchor its farthest positive and its nearest negative (Hermans et al. 2017, "batch hard").

    Anchors without a positive or without a negative are left out; ties go to the lower index.

    Args:
        cpu: select on the CPU; the indices still come back on the embeddings' device.

    >>> embeddings = torch.tensor([[0.0], [1.0], [3.0], [5.0]])
    >>> BatchHardTripletSelector().get_triplets(embeddings, [0, 0, 0, 1]).tolist()
    [[0, 2, 3], [1, 2, 3], [2, 0, 3]]
    """

    def __init__(self, cpu: bool = False) -> None:
        self.cpu = cpu

    @torch.no_grad()
    def get_triplets(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        x, labels = _check_batch(embeddings, labels, self.cpu)
        if len(labels) == 0:
            return _no_triplets(embeddings)
        distances = pdist(x)  # (B, B)
        same = labels[:, None] == labels
        nearest = distances.masked_fill(same, torch.inf).min(dim=1)  # values, indices (B,)
        same.fill_diagonal_(False)
        farthest = distances.masked_fill(~same, -1).max(dim=1)
        is_complete = (nearest.values < torch.inf) & (farthest.values >= 0)
        anchor = torch.arange(len(labels), device=labels.device)
        return torch.stack((anchor, farthest.indices, nearest.indices), dim=1)[is_complete].to(embeddings.device)


class _NegativePerPairSelector(TripletSelector):
    """For each same-class pair one negative or none: subclasses say which, in `_choose`."""

    def __init__(
        self, margin: float, cpu: bool = False, *, squared: bool = True, both_directions: bool = False
    ) -> None:
        self.margin = margin
        self.cpu = cpu
        self.squared = squared
        self.both_directions = both_directions

    @torch.no_grad()
    def get_triplets(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        x, labels = _check_batch(embeddings, labels, self.cpu)
        distances = pdist(x) if self.squared else pdist(x).sqrt()  # (B, B)
        same = labels[:, None] == labels
        anchor, positive = _positive_pairs(same, self.both_directions)  # (P,), (P,)
        if len(anchor) == 0:
            return _no_triplets(embeddings)
        positive_distances = distances[anchor, positive]
        distances.masked_fill_(same, torch.inf)
        negative, is_found = self._choose(distances, anchor, positive_distances)
        return torch.stack((anchor, positive, negative), dim=1)[is_found].to(embeddings.device)

    def _choose(self, distances, anchor, positive_distances):
        """From distances to negatives (B, B), inf elsewhere: the negative and whether there is one, each (P,)."""
        raise NotImplementedError


class HardestNegativeTripletSelector(_NegativePerPairSelector):
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

    def _choose(self, distances, anchor, positive_distances):
        nearest = distances.min(dim=1)  # values, indices (B,)
        return nearest.indices[anchor], nearest.values[anchor] < positive_distances + self.margin


class RandomNegativeTripletSelector(_NegativePerPairSelector):
    """For each same-class pair i < j a negative drawn uniformly from those that violate the margin.

    A triplet violates it when d_ap^2 - d_an^2 + margin > 0. O(B^2 log B) time, O(B^2) memory.

    Args:
        margin: compared with squared distances, or with plain ones where `squared` is False; the same as the loss's.
        cpu: select on the CPU; the indices still come back on the embeddings' device.
        squared: squared Euclidean distances; False for plain ones. The same as the loss's.
        both_directions: take each pair as anchor and positive both ways.
        generator: `torch.Generator` for the draw; None draws from torch's own, which `torch.manual_seed` governs.

    >>> embeddings = torch.tensor([[0.0], [1.0], [1.5], [9.0]])
    >>> RandomNegativeTripletSelector(margin=2.0).get_triplets(embeddings, [0, 0, 1, 2]).tolist()
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
        super().__init__(margin, cpu, squared=squared, both_directions=both_directions)
        self.generator = generator

    def _choose(self, distances, anchor, positive_distances):
        # With its negatives sorted, those of an anchor that qualify for a pair are a range: a draw is one index.
        distances, order = _sort_rows(distances)
        start, stop = self._range(distances, anchor, positive_distances)  # (P,), (P,)
        device = anchor.device if self.generator is None else self.generator.device
        uniform = torch.rand(len(anchor), generator=self.generator, device=device).to(anchor.device)
        rank = torch.minimum(start + (uniform * (stop - start)).long(), stop - 1).clamp(min=0)
        return order[anchor, rank], (start < stop) & (distances[anchor, rank] < torch.inf)  # NaN is not

    def _range(self, sorted_distances, anchor, positive_distances):
        stop = _count_below(sorted_distances, anchor, positive_distances + self.margin)
        return torch.zeros_like(stop), stop


class SemihardNegativeTripletSelector(RandomNegativeTripletSelector):
    """For each same-class pair i < j a negative drawn uniformly from the semi-hard ones (Schroff et al. 2015, 3.2).

    Semi-hard: farther than the positive, but within the margin, d_ap^2 < d_an^2 < d_ap^2 + margin.
    O(B^2 log B) time, O(B^2) memory.

    Args:
        margin: compared with squared distances, or with plain ones where `squared` is False; the same as the loss's.
        cpu: select on the CPU; the indices still come back on the embeddings' device.
        squared: squared Euclidean distances; False for plain ones. The same as the loss's.
        both_directions: take each pair as anchor and positive both ways.
        generator: `torch.Generator` for the draw; None draws from torch's own, which `torch.manual_seed` governs.

    >>> embeddings = torch.tensor([[0.0], [1.0], [1.5], [9.0], [-0.5]])
    >>> SemihardNegativeTripletSelector(margin=2.0).get_triplets(embeddings, [0, 0, 1, 2, 3]).tolist()
    [[0, 1, 2]]
    """

    def _range(self, sorted_distances, anchor, positive_distances):
        start = _count_below(sorted_distances, anchor, positive_distances, right=True)
        return start, _count_below(sorted_distances, anchor, positive_distances + self.margin)


class FunctionNegativeTripletSelector(_NegativePerPairSelector):
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
        super().__init__(margin, cpu, squared=squared, both_directions=both_directions)
        self.negative_selection_fn = negative_selection_fn

    def _choose(self, distances, anchor, positive_distances):
        rows, chosen = distances.cpu().numpy(), []
        for a, positive_distance in zip(anchor.tolist(), positive_distances.cpu().numpy()):
            negatives = np.flatnonzero(rows[a] < np.inf)
            loss_values = positive_distance - rows[a, negatives] + rows.dtype.type(self.margin)
            index = self.negative_selection_fn(loss_values) if len(negatives) else None
            chosen.append(-1 if index is None else int(negatives[index]))
        negative = torch.tensor(chosen, device=anchor.device)  # (P,)
        return negative, negative >= 0


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


def _squared_distances(x):
    """Squared distances (B, B) of the rows of a centred float64 matrix (B, D)."""
    rounding = 2 * torch.finfo(x.dtype).eps * (2 + x.shape[1] ** 0.5)  # so much too short that equal rows clamp to 0
    norms = x.square().sum(dim=1) * (1 - rounding)  # (B,)
    return torch.addmm(norms[None], x, x.T, alpha=-2).add_(norms[:, None]).clamp_(min=0).fill_diagonal_(0)


def _positive_pairs(same, both_directions):
    """Anchor and positive (P,), (P,) of every same-class pair i < j, or i != j."""
    pairs = same.clone().fill_diagonal_(False) if both_directions else same.triu(1)  # (B, B)
    return pairs.nonzero().unbind(dim=1)


def _true_indices(mask):
    """Indices of what is true in a mask (N,)."""
    if mask.device.type == "cpu":  # numpy takes a fifth of the time here, and in the next two functions
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def _smallest(values, k):
    """Indices of the k smallest of more than k values (N,), in any order."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.argpartition(values.numpy(), k)[:k])
    return values.topk(k, largest=False, sorted=False).indices


def _sort_rows(distances):
    """Rows (B, B) in ascending order, and the order."""
    if distances.device.type == "cpu":
        order = torch.from_numpy(np.argsort(distances.numpy(), axis=1))
        return distances.gather(1, order), order
    return distances.sort(dim=1)


def _count_below(sorted_rows, row, value, right=False):
    """How many entries of each query's row of (B, B) are below its value, or with `right` not above it, (P,)."""
    first = torch.searchsorted(row, torch.arange(len(sorted_rows), device=row.device))  # (B,), a row's first query
    column = torch.arange(len(row), device=row.device) - first[row]  # (P,)
    queries = value.new_zeros(len(sorted_rows), int(column.max()) + 1)  # (B, K)
    queries[row, column] = value
    return torch.searchsorted(sorted_rows, queries, right=right)[row, column]


def _no_triplets(embeddings):
    return torch.empty(0, 3, dtype=torch.int64, device=embeddings.device)


def _check_batch(embeddings, labels, cpu=False):
    """Embeddings (B, D) and labels (B,) on one device, checked."""
    if not torch.is_tensor(embeddings) or embeddings.dim() != 2:
        raise ValueError(f"expected embeddings of shape (B, D), got {_describe(embeddings)}")
    device = torch.device("cpu") if cpu else embeddings.device
    labels = torch.as_tensor(labels, device=device)
    B = len(embeddings)
    if labels.shape not in ((B,), (B, 1)):
        raise ValueError(f"expected one label for each embedding, shape ({B},), got {_describe(labels)}")
    return embeddings.to(device), labels.reshape(B)


def _describe(value):
    return f"a tensor of shape {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
