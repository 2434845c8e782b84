"""Losses on embeddings: contrastive and triplet, on given pairs and triplets or on those selected in a batch.

`ContrastiveLoss` and `TripletLoss` take the outputs of SiameseNet and TripletNet. The online losses take one batch of
embeddings with its labels and a selector, any object with `get_pairs` or `get_triplets`:

    loss = OnlineContrastiveLoss(margin=1.0, pair_selector=HardNegativePairSelector())(embeddings, labels)

Letters: B batch, D embedding dimension, P pairs, T triplets. Half-precision embeddings are computed with in float32.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import nn


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

    def __init__(self, margin):
        super().__init__()
        self.margin = margin

    def forward(self, x1, x2, target=None, size_average=True):
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
        _check_same_shape(remedy, x1, x2)
        if target.numel() != len(x1):
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

    def __init__(self, margin, *, squared=True, soft_margin=False):
        super().__init__()
        self.margin = margin
        self.squared = squared
        self.soft_margin = soft_margin

    def forward(self, anchor, positive, negative=None, size_average=True):
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
        _check_same_shape(remedy, anchor, positive, negative)
        losses = _triplet_losses(anchor, positive, negative, self.margin, self.squared, self.soft_margin)
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

    def __init__(self, margin, pair_selector):
        super().__init__()
        if not hasattr(pair_selector, "get_pairs"):
            raise TypeError(f"expected a pair selector, with get_pairs, got {type(pair_selector).__name__}")
        self.margin = margin
        self.pair_selector = pair_selector

    def forward(self, embeddings, target=None, *unexpected):
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
        positive_losses = _distances(*_gather(embeddings, positive_pairs))  # (P,)
        negative_distances = _distances(*_gather(embeddings, negative_pairs), squared=False)
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

    def __init__(self, margin, triplet_selector, *, squared=True, soft_margin=False):
        super().__init__()
        if not hasattr(triplet_selector, "get_triplets"):
            raise TypeError(f"expected a triplet selector, with get_triplets, got {type(triplet_selector).__name__}")
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

    def forward(self, embeddings, target=None, *unexpected):
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
        triplets = _gather(embeddings, triplets)  # anchor, positive, negative (T, D)
        losses = _triplet_losses(*triplets, self.margin, self.squared, self.soft_margin)
        return losses.mean(), (losses > 0).sum()


def _triplet_losses(anchor, positive, negative, margin, squared, soft_margin):
    """One loss for each triplet, (T,)."""
    violation = _distances(anchor, positive, squared) - _distances(anchor, negative, squared) + margin
    return F.softplus(violation) if soft_margin else F.relu(violation)


def _distances(x, y, squared=True):
    """Distances of paired rows, (P,), in float32 at least; the norm's gradient at coincident points is 0, not NaN."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    difference = x.to(dtype) - y.to(dtype)
    return difference.square().sum(dim=1) if squared else torch.linalg.vector_norm(difference, dim=1)


def _gather(embeddings, indices):
    """The rows of embeddings (B, D) for each column of indices (T, n): n tensors (T, D)."""
    return [embeddings.index_select(0, column) for column in indices.unbind(dim=1)]


def _zero_with_graph(embeddings):
    """A zero to call backward on; NaN where the embeddings are not finite, so that they are never taken for a zero."""
    return (embeddings * 0).sum().to(torch.promote_types(embeddings.dtype, torch.float32))


def _check_same_shape(remedy, *embeddings):
    shapes = [tuple(x.shape) for x in embeddings]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"{remedy}; expected embeddings of one shape (B, D), got {', '.join(map(str, shapes))}")


def _check_online(name, offline, embeddings, target, unexpected):
    remedy = f"{name} takes one batch of embeddings (B, D) and its labels (B,); {offline}"
    if target is None or unexpected or not torch.is_tensor(embeddings):
        given = 1 + (target is not None) + len(unexpected)
        raise TypeError(f"{remedy}; got {given} argument(s), the first a {type(embeddings).__name__}")
    shape = tuple(getattr(target, "shape", (len(target),)))
    if embeddings.dim() != 2 or len(shape) not in (1, 2) or shape != (len(embeddings),) + (1,) * (len(shape) - 1):
        raise ValueError(f"{remedy}; got shapes {tuple(embeddings.shape)} and {shape}")
