"""How good embeddings are: functions of all embeddings of a data set and their labels.

They take tensors or arrays, and stand alone or go into a metric for `fit`:

    numbers = evaluate_embeddings(embeddings, labels)  # also verification, few_shot_accuracy, knn_predict
    metrics = [EmbeddingMetric(evaluate_embeddings, keys=["map@r"])]  # of metrics.py
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def evaluate_embeddings(
    embeddings: Any,
    labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    n_neighbors: int = 5,
) -> dict[str, float]:
    """Retrieval: how often the nearest neighbours of an embedding belong to its class.

    The relevant references of a query are the R with its label. Without a reference set, each embedding is a query
    against all others. Neighbours are ordered by Euclidean distance, ties by index. Distances are computed in float64
    by a matrix product, which cannot resolve differences below about 1e-7 of the embeddings' spread.

    Args:
        embeddings: queries (N, D); a tensor or array of any dtype, on any device.
        labels: their labels (N,), whole numbers.
        reference, reference_labels: the set to search, (M, D) and (M,); by default the other queries.
        ks: the values of k for recall@k.
        n_neighbors: how many neighbours vote on a label.

    Returns:
        A dict of means over the queries that have a relevant reference, each between 0 and 1:

        - `recall@K` for each of `ks`: whether any of the k nearest is relevant;
        - `r_precision`: the fraction of the R nearest that is relevant;
        - `map@r`: (1 / R) sum of precision(i) over the relevant i among the R nearest (Musgrave et al. 2020, 3.2);
        - `knnN` for `n_neighbors`: whether the N nearest vote for the right label, see `knn_predict`;

        and `n_queries`, the number of these queries, and `n_left_out`, the number without a relevant reference. A k
        larger than the reference set means all of it. O(N M D) time; memory for R neighbours of a few queries at a
        time.

    Raises:
        ValueError: if shapes do not fit, values are not finite, or no query has a relevant reference.

    >>> import torch
    >>> values = evaluate_embeddings(torch.tensor([[0.0], [1.0], [2.1], [2.6]]), torch.tensor([0, 1, 0, 1]), ks=(1, 2))
    >>> values["recall@1"], values["recall@2"], values["map@r"]
    (0.0, 0.5, 0.0)
    """
    if min(*ks, n_neighbors) < 1 or (reference is None and reference_labels is not None):
        raise ValueError("expected ks and n_neighbors of at least 1, and no reference_labels without a reference")
    queries, labels = _check_set(embeddings, labels)
    is_self = reference is None
    references, reference_labels = (queries, labels) if is_self else _check_set(reference, reference_labels, queries)
    ordered = reference_labels.sort().values
    bounds = [torch.searchsorted(ordered, labels, right=right) for right in (False, True)]
    R = bounds[1] - bounds[0] - int(is_self)  # (N,)
    used = (R > 0).nonzero().squeeze(1)  # (n,)
    if len(used) == 0:
        raise ValueError("no query has a reference of its label")

    k = max(*ks, n_neighbors, int(R.max()))
    sums: dict[str, Any] = {}
    for rows, neighbors in _nearest(queries[used], references, k, own=used if is_self else None):
        neighbor_labels = reference_labels[neighbors]  # (n, k)
        is_relevant = neighbor_labels == labels[used[rows], None]
        values = _retrieval(is_relevant, R[used[rows]], ks)
        values[f"knn{n_neighbors}"] = _vote(neighbor_labels[:, :n_neighbors]) == labels[used[rows]]
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.sum(dtype=torch.float64)
    means = {name: float(total) / len(used) for name, total in sums.items()}
    return {**means, "n_queries": len(used), "n_left_out": len(labels) - len(used)}


def knn_predict(
    embeddings: Any, reference: Any, reference_labels: Any, *, n_neighbors: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels for new embeddings, by a vote of their nearest neighbours in a labelled reference set.

    The most frequent label wins; in a tie, that of the nearest neighbour.

    Args:
        embeddings: (N, D); a tensor or array of any dtype, on any device.
        reference, reference_labels: (M, D) and (M,), labels whole numbers.
        n_neighbors: how many neighbours vote, at most M.

    Returns:
        `(labels, neighbors, distances)`: int64 tensor (N,), int64 tensor (N, n_neighbors) of indices into the
        reference, nearest first, ties by index, and float64 tensor (N, n_neighbors) of Euclidean distances; on the
        embeddings' device (on the CPU for MPS, which has no float64).

    Raises:
        ValueError: if shapes do not fit, values are not finite, or there are fewer references than `n_neighbors`.

    >>> labels, neighbors, distances = knn_predict([[0.0]], [[1.0], [3.0], [2.0]], [4, 5, 5], n_neighbors=3)
    >>> labels.tolist(), neighbors.tolist(), distances.tolist()
    ([5], [[0, 2, 1]], [[1.0, 2.0, 3.0]])
    """
    queries = _check_embeddings(embeddings)
    references, reference_labels = _check_set(reference, reference_labels, queries)
    if not 1 <= n_neighbors <= len(references):
        raise ValueError(f"expected n_neighbors from 1 to the {len(references)} references, got {n_neighbors}")
    neighbors = torch.cat([indices for _, indices in _nearest(queries, references, n_neighbors)])  # (N, n_neighbors)
    distances = [torch.linalg.vector_norm(queries - references[column], dim=1) for column in neighbors.unbind(dim=1)]
    # Exact distances put in order what the matrix product could not tell apart.
    distances, order = torch.stack(distances, dim=1).sort(dim=1, stable=True)
    neighbors = neighbors.gather(1, order)
    return _vote(reference_labels[neighbors]), neighbors, distances


def verification(
    embeddings: Any,
    labels: Any,
    *,
    max_pairs: int | None = None,
    fars: Sequence[float] = (0.001, 0.01),
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Verification: how well the distance of two embeddings tells whether they are of one class.

    A pair is accepted if its Euclidean distance is below a threshold. TAR (true accept rate) is the fraction of
    same-class pairs that are accepted, FAR (false accept rate) that of the other pairs.

    Args:
        embeddings: (N, D); a tensor or array of any dtype, on any device.
        labels: (N,), whole numbers.
        max_pairs: if there are more pairs than this, a sample of this size is drawn, uniformly and with replacement.
            None means 50 million, enough for all pairs of 10,000 embeddings, which need 0.9 GB.
        fars: false accept rates at which to report TAR.
        generator: `torch.Generator` on the CPU for the sample; None: the same sample every time.

    Returns:
        A dict of

        - `auc`: area under the ROC curve, the probability that a same-class pair is closer than another, ties half;
        - `eer`: the rate at which FAR and 1 - TAR are equal, interpolated on the ROC curve;
        - `accuracy`: the fraction of pairs judged correctly at the best threshold, and `threshold`, that distance;
        - `tar@far=F` and `threshold@far=F` for each of `fars`: the largest TAR with FAR at most F, and its distance;
        - `n_positive`, `n_negative`: numbers of pairs; `is_sample`: whether they are a sample;
        - `curve`: arrays `(far, tar)` of about 500 points for a plot.

        A threshold lies midway between the last accepted distance and the next one.

    Raises:
        ValueError: if shapes do not fit, values are not finite, or all pairs are of one kind.

    >>> values = verification([[0.0], [1.0], [5.0], [5.5]], [0, 0, 1, 1])
    >>> values["auc"], values["eer"], values["threshold"]
    (1.0, 0.0, 2.5)
    """
    if not all(0 <= far <= 1 for far in fars):
        raise ValueError(f"expected false accept rates from 0 to 1, got {fars}")
    x, labels = _check_set(embeddings, labels)
    max_pairs = 50_000_000 if max_pairs is None else max_pairs
    is_sample = len(x) * (len(x) - 1) // 2 > max_pairs
    if is_sample:
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        positive, negative = _sampled_pairs(x, labels, max_pairs, generator)
    else:
        positive, negative = _all_pairs(x, labels)
    if len(positive) == 0 or len(negative) == 0:
        raise ValueError(f"expected pairs of one class and of two, got {len(positive)} and {len(negative)}")
    values = _roc(positive, negative, fars)
    return {**values, "n_positive": len(positive), "n_negative": len(negative), "is_sample": is_sample}


def few_shot_accuracy(
    embeddings: Any,
    labels: Any,
    n_way: int,
    n_shot: int,
    *,
    n_query: int = 15,
    n_episodes: int = 1000,
    groups: Any = None,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """Accuracy in N-way K-shot episodes: each query is assigned to the nearest prototype (Snell et al. 2017).

    An episode draws `n_way` classes, and from each class `n_shot` samples, whose mean is the prototype, and `n_query`
    others to classify. Classes with too few samples are left out.

    Args:
        embeddings: (N, D); a tensor or array of any dtype, on any device.
        labels: (N,), whole numbers.
        n_way: number of classes in an episode.
        n_shot, n_query: numbers of samples and of queries for each class.
        n_episodes: number of episodes.
        groups: (N,), whole numbers, such as the alphabet of a character: the classes of an episode come from one group.
            Groups take turns; those with fewer than `n_way` classes are left out. None: one group of all classes.
        generator: `torch.Generator` on the CPU for the episodes; None: the same episodes every time.

    Returns:
        `(accuracy, interval)`: the mean over the episodes, between 0 and 1, and the half-width of its 95 per cent
        confidence interval, 1.96 standard errors; infinite for one episode.

    Raises:
        ValueError: if shapes do not fit, values are not finite, a class is in two groups, or fewer than `n_way` classes
            have enough samples.

    >>> few_shot_accuracy([[0.0], [0.1], [5.0], [5.1]], [0, 0, 1, 1], n_way=2, n_shot=1, n_query=1, n_episodes=10)
    (1.0, 0.0)
    """
    x, labels = _check_set(embeddings, labels)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    counts = labels.unique(return_counts=True)[1].tolist()
    n_drawn = n_shot + n_query
    classes = [samples for samples in labels.argsort(stable=True).split(counts) if len(samples) >= n_drawn]
    of_groups = [group for group in _by_group(classes, groups, x) if len(group) >= n_way]
    if min(n_way, n_shot, n_query, n_episodes) < 1 or not of_groups:
        need = f"{n_way} classes of at least {n_shot} + {n_query} samples{'' if groups is None else ' in one group'}"
        raise ValueError(f"expected {need}, and numbers of at least 1; {len(classes)} classes have so many")
    truth = torch.arange(n_way, device=x.device)[:, None]
    accuracies = []
    for episode in range(n_episodes):
        classes = of_groups[episode % len(of_groups)]
        ways = [classes[c] for c in torch.randperm(len(classes), generator=generator)[:n_way].tolist()]
        drawn = [way[torch.randperm(len(way), generator=generator)[:n_drawn].to(way.device)] for way in ways]
        support, query = x[torch.stack(drawn)].split((n_shot, n_query), dim=1)  # (n_way, n_shot | n_query, D)
        squared_distances = (query[:, :, None] - support.mean(dim=1)).square().sum(dim=3)  # (n_way, n_query, n_way)
        accuracies.append((squared_distances.argmin(dim=2) == truth).double().mean())
    accuracies = torch.stack(accuracies)
    interval = 1.96 * accuracies.std(correction=1) / n_episodes**0.5 if n_episodes > 1 else torch.inf
    return float(accuracies.mean()), float(interval)


@torch.no_grad()
def one_shot_runs(
    embed: Callable, runs: Sequence[tuple[Tensor, Tensor, Tensor]], *, distances: Callable[..., Tensor] = torch.cdist
) -> tuple[float, list[float]]:
    """Error rate in one-shot runs, such as Omniglot's: each test image is assigned to the nearest training image.

    Args:
        embed: called as `embed(images)` on the images (n, C, H, W) of a run; returns what `distances` compares. A model
            should be in evaluation mode.
        runs: list of `(training images, test images, answers)`, as `load_one_shot_runs` of demo_data.py returns it;
            answers, int64 (n_test,), are the indices of the right training images.
        distances: called as `distances(embedded test images, embedded training images)`, returns (n_test, n_train).

    Returns:
        `(error, errors)`: the mean over the runs, between 0 and 1, and a list with the error of each run.

    Raises:
        ValueError: if there are no runs.

    >>> run = torch.tensor([[[[0.0]]], [[[1.0]]]]), torch.tensor([[[[0.9]]], [[[0.8]]]]), torch.tensor([1, 0])
    >>> one_shot_runs(lambda images: images.flatten(1), [run])
    (0.5, [0.5])
    """
    if len(runs) == 0:
        raise ValueError("expected at least one run")
    errors = []
    for train_images, test_images, answers in runs:
        nearest = distances(embed(test_images), embed(train_images)).argmin(dim=1)  # (n_test,)
        errors.append(float((nearest.cpu() != answers.cpu()).double().mean()))
    return float(np.mean(errors)), errors


def _check_set(embeddings, labels, like=None):
    """Checked embeddings (N, D) in float64, see `_check_embeddings`, and checked labels (N,) in int64."""
    x = _check_embeddings(embeddings, like)
    if labels is None:
        raise ValueError(f"expected one whole number as label of each of {len(x)} embeddings, got none")
    labels = torch.as_tensor(labels, device=x.device)
    if labels.shape not in ((len(x),), (len(x), 1)) or labels.is_floating_point():
        given = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"expected one whole number as label of each of {len(x)} embeddings, got {given}")
    return x, labels.reshape(-1).long().contiguous()


def _check_embeddings(embeddings, like=None):
    """Checked embeddings (N, D) in float64; `like`, if given, prescribes their device and D."""
    x = torch.as_tensor(embeddings)
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(f"expected embeddings of shape (N, D), got {tuple(x.shape)}")
    if like is not None and x.shape[1] != like.shape[1]:
        raise ValueError(f"queries have {like.shape[1]} dimensions, references {x.shape[1]}")
    device = x.device if like is None else like.device
    x = x.detach().to("cpu" if device.type == "mps" else device).double()  # mps has no float64
    if not x.isfinite().all():
        raise ValueError(f"{int((~x.isfinite()).any(dim=1).sum())} of {len(x)} embeddings are not finite")
    return x


def _squared_distances(x, y):
    """Squared distances (N, M) between the rows of two centred float64 matrices; 0 for equal rows."""
    rounding = 2 * torch.finfo(x.dtype).eps * (2 + x.shape[1] ** 0.5)  # shorter by this, equal rows clamp to 0
    x_norms, y_norms = (z.square().sum(dim=1) * (1 - rounding) for z in (x, y))  # (N,), (M,)
    return torch.addmm(y_norms, x, y.T, alpha=-2).add_(x_norms[:, None]).clamp_(min=0)


def _rounded_bits(squared_distances, n_bits=16):
    """The bits of float64 distances as int64, rounded to multiples of 2^n_bits, in place.

    These integers are ordered as the distances are. Rounding removes 1e-11 of a distance, the error of a matrix
    product: so equal distances are equal here too, unless they are small compared with the spread.
    """
    return squared_distances.view(torch.int64).add_(1 << (n_bits - 1)).bitwise_and_(-(1 << n_bits))


def _nearest(queries, references, k, own=None):
    """Yield `(rows, neighbors)`: a slice of the queries and the indices (n, k) of their nearest references.

    Ordered by distance, then by index: both are packed into one integer, by which references are sorted. `own` (N,)
    holds the index of each query among the references, to leave out. A k larger than the reference set means all of it.
    """
    M = len(references)
    k = min(k, M - (own is not None))
    n_bits = max(16, (M - 1).bit_length())
    center = references.mean(dim=0)
    queries, references = queries - center, references - center
    index = torch.arange(M, device=references.device)
    step = max(1, 2**22 // M)  # 32 MB of distances at a time
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        keys = _rounded_bits(_squared_distances(queries[rows], references), n_bits).bitwise_or_(index)  # (n, M)
        if own is not None:
            keys.scatter_(1, own[rows, None], torch.iinfo(torch.int64).max)
        if keys.device.type == "cpu":  # numpy selects and sorts many times faster here
            array = keys.numpy()
            array.partition(k - 1, axis=1)
            array[:, :k].sort(axis=1)
            keys = keys[:, :k]
        else:
            keys = keys.topk(k, dim=1, largest=False, sorted=True).values
        yield rows, keys.bitwise_and((1 << n_bits) - 1)


def _retrieval(is_relevant, R, ks):
    """Figures (n,) for each query, from the relevance (n, k) of its neighbours, nearest first, and its R (n,)."""
    place = torch.arange(1, is_relevant.shape[1] + 1, device=R.device)  # (k,)
    hits = is_relevant & (place <= R[:, None])  # relevant ones among the R nearest
    precision = is_relevant.cumsum(dim=1) / place.double()  # (n, k)
    values = {f"recall@{k}": is_relevant[:, :k].any(dim=1) for k in ks}
    values["r_precision"] = hits.sum(dim=1) / R.double()
    values["map@r"] = (precision * hits).sum(dim=1) / R
    return values


def _vote(neighbor_labels):
    """The most frequent label (n,) of neighbours (n, k), nearest first; in a tie, that of the nearest."""
    votes = sum((neighbor_labels == column[:, None]).long() for column in neighbor_labels.unbind(dim=1))  # (n, k)
    return neighbor_labels.gather(1, votes.argmax(dim=1, keepdim=True)).squeeze(1)


def _by_group(classes, groups, x):
    """The classes of each group, as a list of lists; a class is given by the indices (n,) of its samples."""
    if groups is None:
        return [classes]
    groups = _check_set(x, groups)[1]
    by_group = {}
    for samples in classes:
        own = groups[samples].unique().tolist()
        if len(own) > 1:
            raise ValueError(f"expected each class in one group, got one with samples in groups {own}")
        by_group.setdefault(own[0], []).append(samples)
    return list(by_group.values())


def _all_pairs(x, labels):
    """Distances of all same-class pairs (P,) and of all others (N,), as arrays."""
    counts = labels.unique(return_counts=True)[1]
    n_positive = int((counts * (counts - 1) // 2).sum())
    distances = np.empty(len(x) * (len(x) - 1) // 2)
    x = x - x.mean(dim=0)
    filled = [0, n_positive]  # positive pairs come first, then negative ones
    step = max(1, 2**22 // len(x))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        block = _rounded_bits(_squared_distances(x[rows], x[start:])).view(torch.float64).sqrt_()  # (n, N - start)
        is_pair = torch.ones_like(block, dtype=torch.bool).triu(1)
        same = labels[rows, None] == labels[start:]
        for part, mask in enumerate((is_pair & same, is_pair & ~same)):
            chosen = block[mask].cpu().numpy()
            distances[filled[part] : filled[part] + len(chosen)] = chosen
            filled[part] += len(chosen)
    return distances[:n_positive], distances[n_positive:]


def _sampled_pairs(x, labels, n_pairs, generator):
    """Distances of pairs drawn uniformly with replacement: same-class ones (P,) and others (N,), as arrays."""
    distances, is_same = np.empty(n_pairs), np.empty(n_pairs, dtype=bool)
    step = max(1, 2**22 // x.shape[1])
    for start in range(0, n_pairs, step):
        n = min(step, n_pairs - start)
        i = torch.randint(len(x), (n,), generator=generator)
        j = torch.randint(len(x) - 1, (n,), generator=generator)
        i, j = i.to(x.device), (j + (j >= i)).to(x.device)  # any other sample, all equally likely
        squared_distances = (x[i] - x[j]).square().sum(dim=1)
        distances[start : start + n] = squared_distances.sqrt().cpu().numpy()
        is_same[start : start + n] = (labels[i] == labels[j]).cpu().numpy()
    return distances[is_same], distances[~is_same]


def _roc(positive, negative, fars):
    """The figures of `verification` from distances of same-class pairs (P,) and others (N,), sorted in place."""
    positive.sort()
    negative.sort()
    P, N = len(positive), len(negative)
    # The ROC curve rises at the distances of positive pairs: by a step or, if negative pairs tie, by a slope.
    accepted = np.unique(positive)
    tar = np.searchsorted(positive, accepted, side="right") / P
    far_before, far = (np.searchsorted(negative, accepted, side=side) / N for side in ("left", "right"))
    tar_before = np.concatenate(([0], tar[:-1]))
    x = np.concatenate(([0], np.stack((far_before, far), axis=1).flatten(), [1]))
    y = np.concatenate(([0], np.stack((tar_before, tar), axis=1).flatten(), [1]))

    accepted, tar, far = (np.concatenate(([-np.inf], accepted)), np.concatenate(([0], tar)), np.concatenate(([0], far)))
    accuracy = (P * tar + N * (1 - far)) / (P + N)
    best = int(accuracy.argmax())
    values = {
        "auc": float(1 - ((tar[1:] - tar_before) * (far_before + far[1:])).sum() / 2),
        "eer": float(np.interp(0, x + y - 1, x)),
        "accuracy": float(accuracy[best]),
        "threshold": _threshold_behind(accepted[best], positive, negative),
    }
    for limit in fars:
        last = np.searchsorted(far, limit, side="right") - 1
        values[f"tar@far={limit:g}"] = float(tar[last])
        values[f"threshold@far={limit:g}"] = _threshold_behind(accepted[last], positive, negative)
    far_of_plot = np.concatenate(([0], np.geomspace(1 / N, 1, 500)))
    values["curve"] = far_of_plot, tar[np.searchsorted(far, far_of_plot, side="right") - 1]
    return values


def _threshold_behind(distance, positive, negative):
    """The midpoint between a distance and the next one in the sorted arrays: 0 accepts no pair, infinity all."""
    following = [part[np.searchsorted(part, distance, side="right") :][:1] for part in (positive, negative)]
    following = float(np.concatenate((*following, [np.inf])).min())
    return max(0.0, (float(distance) + following) / 2)
