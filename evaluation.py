"""How good embeddings are: functions of all embeddings of a data set and their labels.

They take tensors or arrays, and stand alone or go into a metric for `fit`:

    numbers = evaluate_embeddings(embeddings, labels)  # also verification, few_shot_accuracy, knn_predict
    metrics = [EmbeddingMetric(evaluate_embeddings, keys=["map@r"])]  # of metrics.py
"""

import contextlib
import os
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm


def evaluate_embeddings(
    embeddings: Any,
    labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    n_neighbors: int = 5,
    groups: Any = None,
    reference_groups: Any = None,
    average: str | None = "micro",
    metric: str = "euclidean",
    full_ranking: bool = False,
    allow_copies: bool = False,
) -> dict[str, Any]:
    """Retrieval: how often the nearest neighbours of an embedding belong to its class.

    The relevant references of a query are the R with its label. Without a reference set, each embedding is a query
    against all others. Neighbours are ordered by distance, ties by index. Distances are computed in float64 by a matrix
    product, which cannot resolve differences below about 1e-7 of the embeddings' spread.

    With groups, references of a query's label *and* group are left out, as in re-identification: a person has to be
    found in the pictures of other cameras. References of the same group and another label stay.

    Args:
        embeddings: queries (N, D); a tensor or array of any dtype, on any device.
        labels: their labels (N,), whole numbers or strings; a tensor, array, list or Series.
        reference, reference_labels: the set to search, (M, D) and (M,); by default the other queries.
        ks: the values of k for recall@k.
        n_neighbors: how many neighbours vote on a label.
        groups: (N,), whole numbers or strings, such as the camera, or the object that several photographs show.
        reference_groups: (M,), the groups of the reference set, if there is one.
        average: "micro" for means over queries; "macro" for means over classes of the means of their queries; None for
            the means of each class, as dicts by label.
        metric: "euclidean" or "cosine".
        full_ranking: whether to rank all references, for `map` and `cmc@K` below.
        allow_copies: whether queries are meant to have copies of themselves among the references.

    Returns:
        A dict of means over the queries that have a relevant reference, each between 0 and 1:

        - `recall@K` for each of `ks`: whether any of the k nearest is relevant;
        - `r_precision`: the fraction of the R nearest that is relevant;
        - `map@r`: (1 / R) sum of precision(i) over the relevant i among the R nearest (Musgrave et al. 2020, 3.2);
        - `knnN` for `n_neighbors`: whether the N nearest vote for the right label, see `knn_predict`;
        - with `full_ranking`, `map`: (1 / R) sum of precision(i) over all relevant i; and `cmc@K` for each of `ks`: the
          cumulative match characteristic, another name for recall@k;

        and `n_queries`, the number of these queries, and `n_left_out`, the number without a relevant reference. A k
        larger than the reference set means all of it. O(N M D) time; memory for R neighbours of a few queries at a
        time, with `full_ranking` for M.

    Warns:
        UserWarning: queries have a copy of themselves among the references: the same label, and a distance below 1e-7
            of the spread.

    Raises:
        ValueError: if shapes do not fit, values are not finite, a row is zero where the metric is cosine, labels are
            neither whole numbers nor strings, or no query has a relevant reference.

    >>> import torch
    >>> values = evaluate_embeddings(torch.tensor([[0.0], [1.0], [2.1], [2.6]]), torch.tensor([0, 1, 0, 1]), ks=(1, 2))
    >>> values["recall@1"], values["recall@2"], values["map@r"]
    (0.0, 0.5, 0.0)
    """
    is_self = reference is None
    ks = np.atleast_1d(ks).tolist()
    if not all(isinstance(k, (int, np.integer)) and k >= 1 for k in (*ks, n_neighbors)):
        raise ValueError(f"expected ks and n_neighbors to be whole numbers of at least 1, got {ks} and {n_neighbors}")
    if average not in ("micro", "macro", None):
        raise ValueError(f'expected average to be "micro", "macro" or None, got {average!r}')
    if is_self and not (reference_labels is None and reference_groups is None):
        raise ValueError("expected no reference_labels and no reference_groups without a reference")
    queries = _check_embeddings(embeddings, metric)
    references = queries if is_self else _check_embeddings(reference, metric, like=queries)
    sets = [queries] if is_self else [queries, references]
    codes, classes = _code("label", [labels, reference_labels], sets)
    left_out = _ranges(torch.arange(len(queries), device=queries.device)) if is_self else None
    if groups is not None or reference_groups is not None:
        group_codes, _ = _code("group", [groups, reference_groups], sets)
        left_out = _ranges(*[group * len(classes) + code for group, code in zip(group_codes, codes)])
    values, used = _retrieval(queries, references, codes, left_out, ks, n_neighbors, full_ranking, allow_copies)
    used_codes = codes[0][used].cpu()
    means = {name: _average(value, used_codes, classes, average) for name, value in values.items()}
    return {**means, "n_queries": len(used), "n_left_out": len(queries) - len(used)}


def knn_predict(
    embeddings: Any, reference: Any, reference_labels: Any, *, n_neighbors: int = 5, metric: str = "euclidean"
) -> tuple[Any, Tensor, Tensor]:
    """Predict the labels of embeddings by a majority vote of their nearest neighbours in a labelled reference set.

    The most frequent label wins; in a tie, that of the nearest neighbour.

    Args:
        embeddings: (N, D); a tensor or array of any dtype, on any device.
        reference, reference_labels: (M, D) and (M,), labels whole numbers or strings.
        n_neighbors: how many neighbours vote, at most M.
        metric: "euclidean" or "cosine".

    Returns:
        `(labels, neighbors, distances)`: labels (N,), an int64 tensor, or an array of strings; int64 tensor
        (N, n_neighbors) of indices into the reference, nearest first, ties by index; and float64 tensor
        (N, n_neighbors) of distances, Euclidean or 1 - cosine. Tensors are on the embeddings' device (on the CPU for
        MPS, which has no float64).

    Raises:
        ValueError: if shapes do not fit, values are not finite, a row is zero where the metric is cosine, labels are
            neither whole numbers nor strings, or there are fewer references than `n_neighbors`.

    >>> labels, neighbors, distances = knn_predict([[0.0]], [[1.0], [3.0], [2.0]], [4, 5, 5], n_neighbors=3)
    >>> labels.tolist(), neighbors.tolist(), distances.tolist()
    ([5], [[0, 2, 1]], [[1.0, 2.0, 3.0]])
    """
    queries = _check_embeddings(embeddings, metric)
    references = _check_embeddings(reference, metric, like=queries)
    (codes,), classes = _code("label", [reference_labels], [references], ["references"])
    if not 1 <= n_neighbors <= len(references):
        raise ValueError(f"expected n_neighbors from 1 to the {len(references)} references, got {n_neighbors}")
    neighbors, distances = _nearest_exactly(queries, references, n_neighbors)
    votes = _vote(codes[neighbors])
    if classes.dtype == np.int64:
        predicted: Any = torch.from_numpy(classes).to(votes.device)[votes]
    else:
        predicted = classes[votes.cpu().numpy()]
    return predicted, neighbors, distances if metric == "euclidean" else distances.square() / 2


def verification(
    embeddings: Any,
    labels: Any,
    *,
    max_pairs: int | None = None,
    fars: Sequence[float] = (0.001, 0.01),
    metric: str = "euclidean",
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Verification: how well the distance of two embeddings tells whether they are of one class.

    A pair is accepted if its distance is below a threshold. TAR (true accept rate) is the fraction of same-class pairs
    that are accepted, FAR (false accept rate) that of the other pairs.

    To decide by, take `threshold@eer`, or `threshold@far=F` if a false acceptance costs more than a false rejection.
    With many classes nearly all pairs are of two classes, and the threshold of best accuracy rejects nearly all pairs.

    Args:
        embeddings: (N, D); a tensor or array of any dtype, on any device.
        labels: (N,), whole numbers or strings; a tensor, array, list or Series.
        max_pairs: of more pairs than this, so many are drawn, uniformly and with replacement: half of them same-class
            pairs and half others, or all of the kind there are too few of. None: all of up to 50 million pairs, such as
            those of 10,000 embeddings; of more, 10 million. docs/benchmarks.md has time and memory of both.
        fars: false accept rates at which to report TAR.
        metric: "euclidean" or "cosine"; thresholds are Euclidean distances or 1 - cosine.
        generator: `torch.Generator` on the CPU for the sample; None: the same sample every time.

    Returns:
        A dict of

        - `auc`: area under the ROC curve, the probability that a same-class pair is closer than another, ties half;
        - `eer`: the rate at which FAR and 1 - TAR are equal, interpolated on the ROC curve, and `threshold@eer`, the
          distance at which they come closest to each other;
        - `accuracy`: the fraction of all pairs judged correctly at the best threshold, and `threshold`, that distance;
        - `tar@far=F` and `threshold@far=F` for each of `fars`: the largest TAR with FAR at most F, and its distance;
        - `n_positive`, `n_negative`: numbers of pairs compared; `is_sample`: whether they are a sample;
        - `curve`: arrays `(far, tar)` of about 500 points for a plot.

        A threshold lies midway between the last accepted distance and the next one.

    Raises:
        ValueError: if shapes do not fit, values are not finite, a row is zero where the metric is cosine, labels are
            neither whole numbers nor strings, or all pairs are of one kind.

    >>> values = verification([[0.0], [1.0], [5.0], [5.5]], [0, 0, 1, 1])
    >>> values["auc"], values["eer"], values["threshold@eer"]
    (1.0, 0.0, 2.5)
    """
    fars = np.atleast_1d(fars).tolist()
    if not all(0 <= far <= 1 for far in fars):
        raise ValueError(f"expected false accept rates from 0 to 1, got {fars}")
    if max_pairs is not None and not (isinstance(max_pairs, (int, np.integer)) and max_pairs >= 2):
        raise ValueError(f"expected max_pairs to be None or a whole number of at least 2, got {max_pairs!r}")
    x = _check_embeddings(embeddings, metric)
    (codes,), classes = _code("label", [labels], [x])
    counts = torch.bincount(codes, minlength=len(classes))
    P = int((counts * (counts - 1) // 2).sum())
    N = len(x) * (len(x) - 1) // 2 - P
    if P == 0 or N == 0:
        raise ValueError(f"expected pairs of one class and of two, got {P} and {N}")
    most = 50_000_000 if max_pairs is None else max_pairs
    if is_sample := most < P + N:
        n_drawn = 10_000_000 if max_pairs is None else max_pairs
        n_positive = min(P, max(n_drawn // 2, n_drawn - N))
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        x = x[codes.argsort(stable=True)]
        positive = _drawn_pairs(x, counts, n_positive, P, generator, same=True)
        negative = _drawn_pairs(x, counts, n_drawn - n_positive, N, generator, same=False)
    else:
        positive, negative = _all_pairs(x, codes, P)
    if metric == "cosine":
        positive, negative = positive**2 / 2, negative**2 / 2
    values = _roc(positive, negative, fars, (P, N))
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
        labels: (N,), whole numbers or strings; a tensor, array, list or Series.
        n_way: number of classes in an episode.
        n_shot, n_query: numbers of samples and of queries for each class.
        n_episodes: number of episodes.
        groups: (N,), whole numbers or strings, such as the alphabet of a character: the classes of an episode come from
            one group. Groups take turns; those with fewer than `n_way` classes are left out. None: one of all classes.
        generator: `torch.Generator` on the CPU for the episodes; None: the same episodes every time.

    Returns:
        `(accuracy, interval)`: the mean over the episodes, between 0 and 1, and the half-width of its 95 per cent
        confidence interval, 1.96 standard errors; infinite for one episode.

    Raises:
        ValueError: if shapes do not fit, values are not finite, labels are neither whole numbers nor strings, fewer
            than `n_way` classes have enough samples, or one that has is in two groups.

    >>> few_shot_accuracy([[0.0], [0.1], [5.0], [5.1]], [0, 0, 1, 1], n_way=2, n_shot=1, n_query=1, n_episodes=10)
    (1.0, 0.0)
    """
    x = _check_embeddings(embeddings)
    (codes,), _ = _code("label", [labels], [x])
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    n_drawn = n_shot + n_query
    by_class = codes.argsort(stable=True).split(torch.bincount(codes).tolist())
    classes = [samples for samples in by_class if len(samples) >= n_drawn]
    of_groups = [group for group in _by_group(classes, groups, x) if len(group) >= n_way]
    if min(n_way, n_shot, n_query, n_episodes) < 1 or not of_groups:
        need = f"{n_way} classes of at least {n_shot} + {n_query} samples{'' if groups is None else ' in one group'}"
        raise ValueError(f"expected {need}, and numbers of at least 1; {len(classes)} classes have so many")
    truth = torch.arange(n_way, device=x.device)[:, None]
    accuracies = torch.empty(n_episodes, dtype=torch.float64, device="cpu")
    for episode in _progress(range(n_episodes), "episodes"):
        classes = of_groups[episode % len(of_groups)]
        ways = [classes[c] for c in _shuffled(len(classes), generator)[:n_way].tolist()]
        drawn = [way[_shuffled(len(way), generator)[:n_drawn].to(way.device)] for way in ways]
        support, query = x[torch.stack(drawn)].split((n_shot, n_query), dim=1)  # (n_way, n_shot | n_query, D)
        nearest = _nearest_prototypes(query.flatten(0, 1), support.mean(dim=1))
        accuracies[episode] = (nearest.view(n_way, n_query) == truth).double().mean()
    interval = 1.96 * accuracies.std(correction=1) / n_episodes**0.5 if n_episodes > 1 else torch.inf
    return float(accuracies.mean()), float(interval)


def _shuffled(n, generator):
    return torch.randperm(n, generator=generator, device="cpu")


def _nearest_prototypes(queries, prototypes):
    """The index (N,) of the nearest of a few prototypes (C, D), the first of equal ones.

    A matrix product tells which ones may be it, exact distances of these decide.
    """
    center = prototypes.mean(dim=0)
    left, right = _factor(queries - center), _factor(prototypes - center, is_reference=True)
    squared_distances = left @ right  # (N, C)
    error = 1e-14 * (left[:, -2:-1] + right[-1].max()) * queries.shape[1] ** 0.5  # a sum of D terms rounds by less
    row, column = (squared_distances <= squared_distances.min(dim=1, keepdim=True).values + error).nonzero().unbind(1)
    squared_distances.fill_(torch.inf)
    for i, j in zip(*(part.split(max(1, 2**21 // queries.shape[1])) for part in (row, column))):
        squared_distances[i, j] = (queries[i] - prototypes[j]).square().sum(dim=1)
    return squared_distances.argmin(dim=1)


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


def _check_embeddings(embeddings, metric="euclidean", like=None):
    """Checked embeddings (N, D) in float64, of unit norm for "cosine"; `like`, if given, prescribes device and D."""
    x = embeddings if torch.is_tensor(embeddings) else _as_tensor(embeddings)
    if x.dim() != 2 or x.numel() == 0 or x.is_complex():
        raise ValueError(f"expected embeddings of shape (N, D), got {tuple(x.shape)} of {x.dtype}")
    if like is not None and x.shape[1] != like.shape[1]:
        raise ValueError(f"queries have {like.shape[1]} dimensions, references {x.shape[1]}")
    device = x.device if like is None else like.device
    x = x.detach().to("cpu" if device.type == "mps" else device).double()  # mps has no float64
    if not x.isfinite().all():
        raise ValueError(f"{int((~x.isfinite()).any(dim=1).sum())} of {len(x)} embeddings are not finite")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f'expected metric to be "euclidean" or "cosine", got {metric!r}')
    if metric == "cosine":
        scales = x.abs().amax(dim=1, keepdim=True)  # first, since squares of 1e-160 are 0
        if (scales == 0).any():
            raise ValueError(f"{int((scales == 0).sum())} of {len(x)} embeddings are zero, which have no cosine")
        x = x / torch.frexp(scales).exponent.double().exp2()  # exactly
        return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    largest = float(x.abs().max())
    if not (largest == 0 or 1e-150 < largest < 1e150):
        raise ValueError(f"expected embeddings whose squares fit float64, got values up to {largest:g}")
    return x


def _as_tensor(embeddings):
    """An array, a table or a list as a tensor that shares its memory where it can."""
    try:
        array = np.asarray(embeddings)
        is_of_torch = array.dtype.kind in "biufc" and array.dtype != np.longdouble
        array = array if is_of_torch else array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected embeddings as numbers, got {type(embeddings).__name__}: {error}") from error
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))  # as torch wants it


def _code(kind, labels_of_sets, sets, names=("embeddings", "references")):
    """Labels of one or two sets of embeddings as numbers, equal where the labels are.

    Returns:
        A list with an int64 tensor (N,) for each set, and an array of the labels that the numbers 0, 1, ... stand for:
        of int64, or of Python's objects, as they came.
    """
    parts, types = [], []
    for x, labels, name in zip(sets, labels_of_sets, names):
        part = _label_array(labels)
        found = {*map(_kind_of, {*map(type, part.flat)})} if part.dtype.kind == "O" else {_kind_of(part.dtype.type)}
        fits = part.shape in ((len(x),), (len(x), 1)) and not np.ma.is_masked(labels)
        if not fits or len(found) > 1 or not found <= {str, bytes, int}:
            given = "none" if labels is None else " and ".join(sorted(t.__name__ for t in found))
            needed = f"one whole number or string as {kind} of each of {len(x)} {name}"
            raise ValueError(f"expected {needed}, got {given} of shape {part.shape}")
        parts.append(part.reshape(-1))
        types += found
    if len({*types}) > 1:
        raise ValueError(f"expected {kind}s of one type, got {' and '.join(t.__name__ for t in types)}")
    values = np.concatenate(parts)
    if int in types:
        with contextlib.suppress(OverflowError):  # of uint64, beyond
            values = values.astype(np.int64)
    if values.dtype == np.int64:
        classes, codes = np.unique(values, return_inverse=True)
    else:  # numpy would take b"a" for b"a\0"
        classes = np.array([*sorted({*values}), None], dtype=object)[:-1]
        number = {label: i for i, label in enumerate(classes)}
        codes = np.array([number[value] for value in values])
    codes = torch.from_numpy(codes.reshape(-1)).to(sets[0].device)
    return codes.split([len(part) for part in parts]), classes


def _label_array(labels):
    """Labels as an array of int64, of Python's objects, or of what labels cannot be."""
    if torch.is_tensor(labels):
        labels = labels.detach().cpu()
        labels = labels.float() if labels.dtype == torch.bfloat16 else labels  # which numpy has not
    if isinstance(labels, (list, tuple)):
        labels = np.asarray([label.item() if torch.is_tensor(label) else label for label in labels], dtype=object)
    array = np.asarray(labels)
    is_object = array.dtype.kind in "UST" or array.dtype == np.uint64
    return array.astype(object if is_object else np.int64 if array.dtype.kind in "biu" else array.dtype)


def _kind_of(type_of_label):
    """What a type is one of: str, bytes or int; others are what they are."""
    kinds = {str: str, bytes: bytes, int: (int, np.integer, np.bool_)}
    return next((kind for kind, types in kinds.items() if issubclass(type_of_label, types)), type_of_label)


def _ranges(codes, reference_codes=None):
    """Where the references of each query's code are, as `(order, first, count)`: order (M,)[first : first + count]."""
    ordered, order = (codes if reference_codes is None else reference_codes).sort(stable=True)
    first, last = (torch.searchsorted(ordered, codes, right=right) for right in (False, True))
    return order, first, last - first


def _retrieval(queries, references, codes, left_out, ks, n_neighbors, full_ranking, allow_copies):
    """The figures of each query that has a relevant reference, as a dict of (n,), and the indices (n,) of these.

    `codes` are the labels of both sets, or of the one, `left_out` is what `_ranges` returned, or None.
    """
    R = _ranges(codes[0], codes[-1])[2]  # (N,)
    R = R if left_out is None else R - left_out[2]
    used = (R > 0).nonzero().squeeze(1)  # (n,)
    if len(used) == 0:
        raise ValueError("no query has a reference of its label, but for those left out")
    queries, labels, R = queries[used], codes[0][used], R[used]
    left_out = left_out and (left_out[0], left_out[1][used], left_out[2][used])
    k = len(references) if full_ranking else max(*ks, n_neighbors, int(R.max()))
    reference_labels = torch.cat((codes[-1], codes[-1].new_tensor([-1])))  # and -1 where there is no neighbour
    values: dict[str, Tensor] = {}
    n_copies: Any = 0
    resolution = _resolution(references)
    for rows, neighbors in _nearest(queries, references, k, left_out):
        neighbor_labels = reference_labels.index_select(0, neighbors.flatten()).view_as(neighbors)  # (n, k)
        is_relevant = neighbor_labels == labels[rows, None]
        figures = _figures(is_relevant, R[rows], ks, full_ranking)
        figures[f"knn{n_neighbors}"] = _vote(neighbor_labels[:, :n_neighbors]) == labels[rows]
        for name, value in figures.items():
            values.setdefault(name, torch.empty_like(R, dtype=torch.float64))[rows] = value.double()
        first, place = is_relevant[:, :10].byte().max(dim=1)  # the closest one of the query's label
        closest = references[neighbors.gather(1, place[:, None]).squeeze(1)]
        distances = torch.linalg.vector_norm(queries[rows] - closest, dim=1)
        n_copies = n_copies + (first.bool() & (distances < resolution)).sum()  # not read yet: a GPU would wait
    if n_copies and not allow_copies:
        _warn_of_copies(int(n_copies) / len(used))
    return {name: value.cpu() for name, value in values.items()}, used


def _resolution(x):
    """A distance below which rows of x (N, D) are copies of each other: 0 for none, if all rows are equal."""
    spread = float(x.var(dim=0, correction=0).sum().sqrt())
    return 1e-7 * spread if spread > 1e-12 * float(x.abs().max()) else 0.0


def _warn_of_copies(share):
    # One digit, so that Python shows the warning once, and not in every epoch.
    percent = f"about {float(f'{100 * share:.1g}'):g} per cent" if share >= 0.01 else "less than 1 per cent"
    warnings.warn(
        f"{percent} of the queries have a copy of themselves among the references, of their label and closer than 1e-7 "
        "of the spread, which counts as found. A reference set should not hold the queries, nor a loader repeat "
        "samples; groups leave several copies of one thing out, and allow_copies=True says that they are meant",
        stacklevel=4,
    )


def _figures(is_relevant, R, ks, full_ranking):
    """Figures (n,) for each query, from the relevance (n, k) of its neighbours, nearest first, and its R (n,)."""
    place = torch.arange(1, is_relevant.shape[1] + 1, device=R.device)  # (k,)
    hits = is_relevant & (place <= R[:, None])  # relevant ones among the R nearest
    precision = is_relevant.cumsum(dim=1, dtype=torch.int32) / place.double()  # (n, k)
    values = {f"recall@{k}": is_relevant[:, :k].any(dim=1) for k in ks}
    values["r_precision"] = hits.sum(dim=1) / R.double()
    values["map@r"] = (precision * hits).sum(dim=1) / R
    if full_ranking:
        values["map"] = (precision * is_relevant).sum(dim=1) / R
        values |= {f"cmc@{k}": values[f"recall@{k}"] for k in ks}
    return values


def _average(values, labels, classes, average):
    """The mean of values (n,) over queries, or over classes of their means, or the dict of these; labels are codes."""
    if average == "micro":
        return float(values.mean())
    counts = torch.bincount(labels, minlength=len(classes))
    occurs = counts > 0
    means = (torch.bincount(labels, values, minlength=len(classes)) / counts)[occurs]
    return float(means.mean()) if average == "macro" else dict(zip(classes[occurs.numpy()].tolist(), means.tolist()))


def _vote(neighbor_labels):
    """The most frequent label (n,) of neighbours (n, k), nearest first; in a tie, that of the nearest; -1 is none."""
    ordered, columns = neighbor_labels.sort(dim=1).values, neighbor_labels.contiguous()
    first, last = (torch.searchsorted(ordered, columns, right=right) for right in (False, True))
    votes = (last - first) * (columns >= 0)  # (n, k)
    return columns.gather(1, votes.argmax(dim=1, keepdim=True)).squeeze(1)


def _factor(x, *, is_reference=False):
    """Centred rows x (N, D) as (N, D + 2), or of a reference (D + 2, N): a product of both is of squared distances.

    Squared norms are shorter than they are by what rounding may add: so equal rows are no farther than 0.
    """
    rounding = 2 * torch.finfo(x.dtype).eps * (2 + x.shape[1] ** 0.5)
    norms = x.square().sum(dim=1, keepdim=True) * (1 - rounding)
    ones = torch.ones_like(norms)
    return torch.cat((-2 * x, ones, norms), dim=1).T if is_reference else torch.cat((x, norms, ones), dim=1)


def _rounded_bits(squared_distances, n_bits=16):
    """The bits of float64 distances as int64, rounded to multiples of 2^n_bits, in place.

    These integers are ordered as the distances are. Rounding removes 1e-11 of a distance, the error of a matrix
    product: so equal distances are equal here too, unless they are small compared with the spread.
    """
    return squared_distances.view(torch.int64).add_(1 << (n_bits - 1)).bitwise_and_(-(1 << n_bits))


def _nearest(queries, references, k, left_out=None):
    """Yield `(rows, neighbors)`: a slice of the queries and the indices (n, k) of their nearest references.

    Ordered by distance, then by index: both are packed into one integer, by which references are sorted. `left_out` is
    what `_ranges` returns of references to leave out. A k larger than the reference set means all of it, and where less
    than k are left, M follows.
    """
    N, M, device = len(queries), len(references), references.device
    k = min(k, M if left_out is None else M - int(left_out[2].min()))
    may_lack = left_out is not None and k > M - int(left_out[2].max())
    n_bits, most = max(16, (M - 1).bit_length()), torch.iinfo(torch.int64).max
    center = references.mean(dim=0)
    references = _factor(references - center, is_reference=True)  # (D + 2, M)
    index = torch.arange(M, device=device)
    n_rows = max(1, 2**23 // max(references.shape))  # 64 MB of keys
    n_columns = 2048 if device.type == "cpu" else M  # what a cache holds
    all_keys = torch.empty(min(n_rows, N), M, dtype=torch.int64, device=device)
    for start in _progress(range(0, N, n_rows), "neighbours"):
        keys = all_keys[: N - start]  # (n, M)
        rows = slice(start, start + len(keys))
        block = _factor(queries[rows] - center)
        for columns in (slice(first, first + n_columns) for first in range(0, M, n_columns)):
            bits = _rounded_bits((block @ references[:, columns]).clamp_(min=0), n_bits)
            torch.bitwise_or(bits, index[columns], out=keys[:, columns])
        if left_out is not None:
            keys[_members(*left_out, rows)] = most
        for part in keys.split(max(1, 2**19 // k)):  # so that what is computed of neighbours fits a cache
            nearest = _smallest(part, k)
            neighbors = nearest.bitwise_and((1 << n_bits) - 1)
            yield slice(start, start + len(part)), neighbors.masked_fill_(nearest == most, M) if may_lack else neighbors
            start += len(part)


def _smallest(keys, k):
    """The k smallest (n, k) of each row of keys (n, M), sorted; keys are not what they were afterwards."""
    if keys.device.type != "cpu":
        return keys.topk(k, dim=1, largest=False, sorted=True).values
    array = keys.numpy()  # numpy selects and sorts many times faster here
    array.partition(k - 1, axis=1)
    array[:, :k].sort(axis=1)
    return keys[:, :k]


def _members(order, first, count, rows):
    """Indices `(row, column)` of the references that `_ranges` gives for some of the queries."""
    first, count = first[rows], count[rows]
    row = torch.arange(len(count), device=count.device).repeat_interleave(count)
    place = torch.arange(len(row), device=count.device) - (count.cumsum(0) - count)[row]
    return row, order[first[row] + place]


def _nearest_exactly(queries, references, k):
    """The k nearest references of each query by exact distances, ties by index: indices and distances, (N, k)."""
    neighbors = torch.cat([indices for _, indices in _nearest(queries, references, k)])
    columns = neighbors.unbind(dim=1)
    squared_distances = torch.stack([(queries - references[column]).square().sum(dim=1) for column in columns], dim=1)
    # They put in order what the matrix product could not tell apart.
    squared_distances, order = squared_distances.sort(dim=1, stable=True)
    return neighbors.gather(1, order), squared_distances.sqrt()


def _by_group(classes, groups, x):
    """The classes of each group, as a list of lists; a class is given by the indices (n,) of its samples."""
    if groups is None:
        return [classes]
    (groups,), names = _code("group", [groups], [x])
    by_group = {}
    for samples in classes:
        own = groups[samples].unique().tolist()
        if len(own) > 1:
            raise ValueError(f"expected each class in one group, got one with samples in groups {names[own].tolist()}")
        by_group.setdefault(own[0], []).append(samples)
    return list(by_group.values())


def _all_pairs(x, labels, n_positive):
    """Distances of all same-class pairs (P,) and of all others (N,), as arrays."""
    distances = np.empty(len(x) * (len(x) - 1) // 2)
    x = x - x.mean(dim=0)
    left, right = _factor(x), _factor(x, is_reference=True)
    filled = [0, n_positive]  # positive pairs come first, then negative ones
    step = max(1, 2**22 // len(x))
    for start in _progress(range(0, len(x), step), "pairs"):
        rows = slice(start, min(start + step, len(x)))
        squared_distances = (left[rows] @ right[:, start:]).clamp_(min=0)
        block = _rounded_bits(squared_distances).view(torch.float64).sqrt_()  # (n, N - start)
        is_pair = torch.ones_like(block, dtype=torch.bool).triu(1)
        same = labels[rows, None] == labels[start:]
        for part, mask in enumerate((is_pair & same, is_pair & ~same)):
            chosen = block[mask].cpu().numpy()
            distances[filled[part] : filled[part] + len(chosen)] = chosen
            filled[part] += len(chosen)
    return distances[:n_positive], distances[n_positive:]


def _drawn_pairs(x, counts, n_pairs, n_all, generator, *, same):
    """Distances (n_pairs,) of pairs of one class (`same`) or of two, drawn uniformly with replacement, as an array.

    Rows x (N, D) are sorted by class, `counts` (C,) are the sizes of classes. The 2 n_all ordered pairs are numbered by
    class, sample and partner. If n_pairs is n_all, each pair comes once.
    """
    n_others = counts - 1 if same else len(x) - counts  # (C,): partners of a sample
    starts, ends = counts.cumsum(0) - counts, (counts * n_others).cumsum(0)  # (C,): of samples and of numbers
    if n_pairs < n_all:
        drawn = torch.randint(2 * n_all, (n_pairs,), generator=generator, device="cpu")
        drawn = drawn.sort().values  # so that the rows of samples come in turn, out of a cache
    else:
        drawn = torch.arange(2 * n_all, device="cpu")
    distances, n_done = np.empty(n_pairs), 0
    for part in _progress(drawn.to(x.device).split(max(1, 2**19 // x.shape[1])), "pairs"):
        c = torch.searchsorted(ends, part, right=True)
        place, start, n = part - (ends - counts * n_others)[c], starts[c], n_others[c]
        i, j = start + place // n, place % n
        j = j + start + (j + start >= i) if same else j + counts[c] * (j >= start)
        chosen = slice(None) if n_pairs < n_all else i < j
        found = torch.linalg.vector_norm(x[i[chosen]] - x[j[chosen]], dim=1)
        distances[n_done : n_done + len(found)] = found.cpu().numpy()
        n_done += len(found)
    return distances


def _roc(positive, negative, fars, n_all):
    """The figures of `verification` from distances of same-class pairs (P,) and others (N,), sorted in place.

    `n_all` are the numbers of all pairs of both kinds, of which these may be samples.
    """
    positive.sort()
    negative.sort()
    P, N = len(positive), len(negative)
    # The ROC curve rises at the distances of positive pairs: by a step or, if negative pairs tie, by a slope.
    accepted = np.unique(positive)
    tar = np.searchsorted(positive, accepted, side="right") / P
    far_before, far = (np.searchsorted(negative, accepted, side=side) / N for side in ("left", "right"))
    tar_before = np.concatenate(([0], tar[:-1]))
    i = int(np.searchsorted(far + tar, 1))  # the first at which FAR is at least 1 - TAR
    x, y = np.array([(far[i - 1] if i else 0, far_before[i], far[i]), (tar_before[i], tar_before[i], tar[i])])

    accepted, tar, far = (np.concatenate(([-np.inf], accepted)), np.concatenate(([0], tar)), np.concatenate(([0], far)))
    accuracy = (n_all[0] * tar + n_all[1] * (1 - far)) / sum(n_all)
    best = int(accuracy.argmax())
    values = {
        "auc": float(1 - ((tar[1:] - tar_before) * (far_before + far[1:])).sum() / 2),
        "eer": float(np.interp(0, x + y - 1, x)),
        "threshold@eer": _threshold_behind(_distance_of_equal_errors(positive, negative), positive, negative),
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


def _distance_of_equal_errors(positive, negative):
    """The distance up to which to accept so that FAR and 1 - TAR are closest, of those in the sorted arrays."""

    def excess(distance):  # FAR - (1 - TAR): rises from -1 to 1
        far, tar = (np.searchsorted(part, distance, side="right") / len(part) for part in (negative, positive))
        return far + tar - 1

    reached = min(part[bisect_left(part, 0, key=excess)] for part in (positive, negative))
    shorter = [part[: np.searchsorted(part, reached)][-1:] for part in (positive, negative)]
    before = float(np.concatenate((*shorter, [-np.inf])).max())
    return reached if excess(reached) < -excess(before) else before


def _threshold_behind(distance, positive, negative):
    """The midpoint between a distance and the next one in the sorted arrays: 0 accepts no pair, infinity all."""
    following = [part[np.searchsorted(part, distance, side="right") :][:1] for part in (positive, negative)]
    following = float(np.concatenate((*following, [np.inf])).min())
    return max(0.0, (float(distance) + following) / 2)


def _progress(steps, title):
    """Steps of a loop, with a bar in the first process once it has taken two seconds, as that of `fit`."""
    disable = os.environ.get("TQDM_DISABLE", "0") not in ("", "0") or _rank() > 0 or None  # None: without a terminal
    return tqdm(steps, desc=title, delay=2, leave=False, disable=disable)


def _rank():
    """The number of this process, 0 where there is one."""
    is_one_of_many = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if is_one_of_many else 0
