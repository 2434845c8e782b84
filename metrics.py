"""What an embedding is worth: metrics for `fit`, and functions of all embeddings of a data set.

A metric is called on every batch, with the model's outputs, the target and what the loss returned:

    fit(train_loader, val_loader, model, loss_fn, ..., metrics=[EmbeddingMetric()])
    numbers = evaluate_embeddings(embeddings, labels)  # retrieval; also verification, few_shot_accuracy ...
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Metric:
    """Base class: collects over batches, reports a value. Override the four methods.

    `fit` calls `reset()` before each pass over the training or validation data, the metric itself after each batch,
    and `value()` at the end of the pass. Collect tensors as they are: reading one (`.item()`) makes a GPU wait.
    """

    def __call__(self, outputs: tuple[Tensor, ...], target: tuple[Tensor] | None, loss: Any) -> None:
        """Take in a batch.

        Args:
            outputs: tuple of what the model returned.
            target: tuple of one, the target; None where the loader gives none.
            loss: what the loss returned, a tensor or a tuple that begins with one.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all batches."""
        raise NotImplementedError

    def gather(self) -> None:
        """Take in what this metric has collected in the other processes of torch.distributed; by default nothing.

        `fit` calls it before `value()` where the processes share the samples of a pass, in all of them.
        """

    def value(self) -> Any:
        """The value over all batches since the last reset: a number, a dict of numbers by name, or None for none."""
        raise NotImplementedError

    def name(self) -> str:
        """The name under which the value is reported."""
        raise NotImplementedError


class AccumulatedAccuracyMetric(Metric):
    """Classification accuracy in per cent: the share of samples whose largest output is the one of their label.

    >>> import torch
    >>> accuracy = AccumulatedAccuracyMetric()
    >>> accuracy((torch.tensor([[0.9, 0.1], [0.8, 0.2]]),), (torch.tensor([0, 1]),), None)
    >>> accuracy.value()
    50.0
    """

    correct: Any
    largest_label: Any
    total: int

    def __init__(self) -> None:
        self.reset()

    def __call__(self, outputs: tuple[Tensor, ...], target: tuple[Tensor] | None, loss: Any) -> None:
        """Take in a batch: `outputs[0]` scores (B, C), `target[0]` labels (B,); anything else is a ValueError."""
        labels: Any = None if target is None else target[0]
        n_labels = labels.numel() if hasattr(labels, "numel") else None
        if len(outputs) != 1 or outputs[0].dim() != 2 or n_labels != len(outputs[0]):
            shapes = ", ".join(str(tuple(x.shape)) for x in outputs)
            given = tuple(labels.shape) if hasattr(labels, "shape") else type(labels).__name__
            raise ValueError(f"Accuracy needs one output (B, C) and labels (B,), got {shapes} and labels {given}")
        if n_labels == 0:
            return
        labels = labels.reshape(-1)
        self.correct += (outputs[0].argmax(dim=1) == labels).sum()
        self.largest_label = labels.max().clamp(min=self.largest_label)
        self.n_classes = outputs[0].shape[1]
        self.total += len(labels)

    def reset(self) -> None:
        self.correct = 0
        self.largest_label = 0
        self.n_classes = 0
        self.total = 0

    def gather(self) -> None:
        """Count the samples of all processes."""
        own = int(self.correct), int(self.largest_label), self.n_classes, self.total
        correct, largest_labels, n_classes, totals = zip(*_gathered(own))
        self.correct, self.largest_label = sum(correct), torch.tensor(max(largest_labels))
        self.n_classes, self.total = max(n_classes), sum(totals)

    def value(self) -> float:
        """Accuracy in per cent; ValueError before the first batch, or where the outputs were no scores of classes."""
        if self.total == 0:
            raise ValueError("Accuracy has no value before the first batch")
        if self.largest_label >= self.n_classes:
            classes = f"label {int(self.largest_label)}, but only {self.n_classes} outputs"
            raise ValueError(f"Accuracy met {classes}: are these embeddings rather than scores of classes?")
        return 100 * float(self.correct) / self.total

    def name(self) -> str:
        return "Accuracy"


class AverageNonzeroTripletsMetric(Metric):
    """Mean number of active triplets a batch, those whose loss is above zero.

    >>> import torch
    >>> average = AverageNonzeroTripletsMetric()
    >>> average((), None, (torch.tensor(0.5), torch.tensor(40)))
    >>> average((), None, (torch.tensor(0.4), torch.tensor(20)))
    >>> average.value()
    30.0
    """

    def __init__(self) -> None:
        self.reset()

    def __call__(self, outputs: tuple[Tensor, ...], target: tuple[Tensor] | None, loss: Any) -> None:
        """Take in a batch: `loss` is `(loss, count)`, as OnlineTripletLoss returns; anything else is a ValueError."""
        if not isinstance(loss, (tuple, list)) or len(loss) < 2:
            raise ValueError("Average nonzero triplets needs what OnlineTripletLoss returns, (loss, count)")
        self.count += loss[1]
        self.n_batches += 1

    def reset(self) -> None:
        self.count = 0
        self.n_batches = 0

    def gather(self) -> None:
        """Count the batches of all processes."""
        self.count, self.n_batches = map(sum, zip(*_gathered((int(self.count), self.n_batches))))

    def value(self) -> float:
        """Mean count a batch; ValueError before the first batch."""
        if self.n_batches == 0:
            raise ValueError("Average nonzero triplets has no value before the first batch")
        return float(self.count) / self.n_batches

    def name(self) -> str:
        return "Average nonzero triplets"


class EmbeddingMetric(Metric):
    """Numbers of all embeddings of a validation pass, once an epoch: retrieval by default.

    Give it to `fit` for a model that returns embeddings, and the history has `val_map@r`, `val_recall@1` and so on.
    The training pass is left out, since its embeddings come from a network that changes meanwhile.

    Args:
        function: called as `function(embeddings, labels)`, returns a dict; `evaluate_embeddings`, `verification`, or
            your own. Of its values the numbers are kept.
        keys: the values to report; by default all.

    >>> import torch
    >>> metric = EmbeddingMetric()
    >>> with torch.no_grad():
    ...     metric((torch.tensor([[0.0], [1.0], [5.0]]),), (torch.tensor([7, 7, 8]),), None)
    >>> metric.value()["map@r"]
    1.0
    """

    def __init__(
        self, function: Callable[[Tensor, Tensor], dict] | None = None, *, keys: Sequence[str] | None = None
    ) -> None:
        self.function = evaluate_embeddings if function is None else function
        self.keys = keys
        self.reset()

    def __call__(self, outputs: tuple[Tensor, ...], target: tuple[Tensor] | None, loss: Any) -> None:
        """Take in a batch: `outputs[0]` embeddings (B, D), `target[0]` labels (B,); anything else is a ValueError."""
        if torch.is_grad_enabled():  # training
            return
        embeddings, labels = _embeddings_and_labels(self, outputs, target)
        self.embeddings.append(embeddings)
        self.labels.append(labels)

    def reset(self) -> None:
        self.embeddings: list[Tensor] = []
        self.labels: list[Tensor] = []

    def gather(self) -> None:
        """Take in the embeddings of all processes, as dealt to them one by one by torch's DistributedSampler."""
        if self.embeddings:
            device = self.embeddings[0].device
            parts = zip(*_gathered((torch.cat(self.embeddings).cpu(), torch.cat(self.labels).cpu())))
            self.embeddings, self.labels = ([_in_turn(part).to(device)] for part in parts)

    def value(self) -> dict[str, float] | None:
        """A dict of numbers by name; None where no batch was evaluated."""
        if not self.embeddings:
            return None
        values = self.function(torch.cat(self.embeddings), torch.cat(self.labels))
        keys = values if self.keys is None else self.keys
        if not set(keys) <= set(values):
            raise ValueError(f"expected keys among {', '.join(values)}, got {', '.join(keys)}")
        return {key: values[key] for key in keys if isinstance(values[key], numbers.Real)}

    def name(self) -> str:
        return "Embeddings"


class EmbeddingStatisticsMetric(Metric):
    """What the embeddings of a pass are like, and how many triplets still teach: tells early why a run does not learn.

    Its value is a dict; distances are Euclidean, means are over the pass:

    - `spread`: root mean square distance to the mean of all; next to 0 where they have collapsed;
    - `effective_rank`: how many dimensions they use, from 1 to D: the exponential of the entropy of the covariance's
      eigenvalues as shares of their sum (Roy and Vetterli 2007);
    - `norm`: mean norm;
    - `positive_distance`, `negative_distance`: mean distance of two of one class and of two classes, within batches;
    - `active`: share of the triplets, selected or all valid ones, whose loss is above zero. Needs `loss_fn`.

    Args:
        loss_fn: OnlineTripletLoss or BatchAllTripletLoss, the one that `fit` has; None for no `active`.

    >>> import torch
    >>> metric = EmbeddingStatisticsMetric()
    >>> metric((torch.tensor([[0.0, 3.0], [4.0, 0.0]]),), (torch.tensor([0, 1]),), None)
    >>> metric.value()
    {'spread': 2.5, 'effective_rank': 1.0, 'norm': 3.5, 'negative_distance': 5.0}
    """

    center: Any
    sums: dict[str, Any]

    def __init__(self, loss_fn: Any = None) -> None:
        self.loss_fn = loss_fn
        self.reset()

    @torch.no_grad()
    def __call__(self, outputs: tuple[Tensor, ...], target: tuple[Tensor] | None, loss: Any) -> None:
        """Take in a batch: `outputs[0]` embeddings (B, D), `target[0]` labels (B,); anything else is a ValueError."""
        x, labels = _embeddings_and_labels(self, outputs, target)
        if len(x) == 0:
            return
        x = x.detach().to("cpu" if x.device.type == "mps" else x.device).double()  # mps has no float64
        same = labels[:, None] == labels  # (B, B)
        if self.center is None:
            self.center = x.mean(dim=0)
        shifted = x - self.center
        distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        is_pair = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
        sums = {"n": len(x), "sum": shifted.sum(dim=0), "products": shifted.T @ shifted, "norm": x.norm(dim=1).sum()}
        for name, pairs in (("positive", is_pair & same.to(x.device)), ("negative", ~same.to(x.device))):
            sums |= {f"{name}_distance": (distances * pairs).sum(), f"n_{name}": pairs.sum()}
        if self.loss_fn is not None:
            sums |= {"active": loss[1], "n_triplets": self._n_triplets(same)}
        self._add(sums)

    def _n_triplets(self, same):
        n_selected = getattr(self.loss_fn, "n_selected", None)
        if n_selected is not None:
            return n_selected
        n_valid = ((same.sum(dim=1) - 1) * (~same).sum(dim=1)).sum()
        return n_valid if getattr(self.loss_fn, "both_directions", True) else n_valid // 2

    def _add(self, sums):
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def reset(self) -> None:
        self.center = None
        self.sums = {}

    def gather(self) -> None:
        """Take in the batches of all processes."""
        center, sums = self.center, {k: v.cpu() if torch.is_tensor(v) else v for k, v in self.sums.items()}
        parts = [part for part in _gathered((None if center is None else center.cpu(), sums)) if part[0] is not None]
        self.reset()
        for center, sums in parts:
            self.center = center if self.center is None else self.center
            shift, total = center - self.center, sums["sum"]
            cross = torch.outer(total, shift)
            products = sums["products"] + cross + cross.T + sums["n"] * torch.outer(shift, shift)
            self._add(sums | {"sum": total + sums["n"] * shift, "products": products})

    def value(self) -> dict[str, float] | None:
        """The dict above, without what there were no pairs or triplets for; None before the first batch."""
        if self.center is None:
            return None
        n, sums = self.sums["n"], self.sums
        mean = sums["sum"] / n
        variances = torch.linalg.eigvalsh(sums["products"] / n - torch.outer(mean, mean)).clamp(min=0)  # (D,)
        shares = variances / variances.sum().clamp(min=torch.finfo(variances.dtype).tiny)
        values = {
            "spread": float(variances.sum().sqrt()),
            "effective_rank": float(torch.special.entr(shares).sum().exp()),
            "norm": float(sums["norm"]) / n,
        }
        for name in ("positive", "negative"):
            if int(sums[f"n_{name}"]) > 0:
                values[f"{name}_distance"] = float(sums[f"{name}_distance"]) / int(sums[f"n_{name}"])
        if int(sums.get("n_triplets", 0)) > 0:
            values["active"] = int(sums["active"]) / int(sums["n_triplets"])
        return values

    def name(self) -> str:
        return "Embedding statistics"


def evaluate_embeddings(
    embeddings: Any,
    labels: Any,
    reference: Any = None,
    reference_labels: Any = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    n_neighbors: int = 5,
) -> dict[str, float]:
    """How well the nearest neighbours of embeddings are of their class.

    The relevant references of a query are those of its label, R of them. Without a reference each embedding is a query
    among all others. Neighbours go by Euclidean distance, equal ones by index. A product of matrices gives distances
    in float64, and does not resolve what is below about 1e-7 of the embeddings' spread.

    Args:
        embeddings: queries (N, D); tensor or array, any floating dtype and device.
        labels: their labels (N,), whole numbers.
        reference, reference_labels: (M, D) and (M,) to search among; by default the other queries.
        ks: the k of recall@k.
        n_neighbors: how many vote on a label.

    Returns:
        A dict of means over the queries that have a relevant reference, between 0 and 1:

        - `recall@K` for each of `ks`: whether any of the k nearest is relevant;
        - `r_precision`: the relevant share of the R nearest;
        - `map@r`: (1 / R) sum of precision(i) over the relevant i among the R nearest (Musgrave et al. 2020, 3.2);
        - `knnN` for `n_neighbors`: whether a vote of the N nearest gives the label, see `knn_predict`;

        and `n_queries`, how many these are, and `n_left_out`, how many have no relevant reference. A k beyond the
        references means all of them. O(N M D) time; memory for R neighbours of a few queries at a time.

    Raises:
        ValueError: other shapes, values that are not finite, or no query with a relevant reference.

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
    """Labels of new embeddings by a vote of their nearest neighbours among embeddings of known label.

    The label that most of them have; among equals that of the nearest.

    Args:
        embeddings: (N, D); tensor or array, any floating dtype and device.
        reference, reference_labels: (M, D) and (M,), labels whole numbers.
        n_neighbors: how many vote, M at most.

    Returns:
        `(labels, neighbors, distances)`: int64 tensor (N,), int64 tensor (N, n_neighbors) of indices into the
        reference, nearest first and equal ones by index, and float64 tensor (N, n_neighbors) of Euclidean distances;
        on the embeddings' device (MPS, which has no float64: the CPU).

    Raises:
        ValueError: other shapes, values that are not finite, or fewer references than `n_neighbors`.

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
    distances, order = torch.stack(distances, dim=1).sort(dim=1, stable=True)  # what the product left undecided
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
    """Same class or not: how well the distance of two embeddings tells, over all pairs or a sample of them.

    A pair is accepted where its Euclidean distance is below a threshold. TAR is the share of same-class pairs that are
    accepted, FAR that of the others.

    Args:
        embeddings: (N, D); tensor or array, any floating dtype and device.
        labels: (N,), whole numbers.
        max_pairs: where there are more pairs, so many are drawn, uniformly and with replacement. None stands for 50
            million, which holds all pairs of 10,000 embeddings and needs 0.9 GB.
        fars: false accept rates at which to report TAR.
        generator: `torch.Generator` on the CPU for the draw; None draws the same pairs every time.

    Returns:
        A dict of

        - `auc`: area under the ROC curve, the chance that a same-class pair is closer than another, ties half;
        - `eer`: the rate at which FAR and 1 - TAR are equal, interpolated on the ROC curve;
        - `accuracy`: the share of pairs judged right at the best threshold, and `threshold`, that distance;
        - `tar@far=F` and `threshold@far=F` for each of `fars`: the largest TAR with FAR at most F, and its distance;
        - `n_positive`, `n_negative`, the pairs; `is_sample`, whether they are a sample;
        - `curve`: arrays `(far, tar)` of some 500 points for a plot.

        A threshold lies midway between the last distance accepted and the next.

    Raises:
        ValueError: other shapes, values that are not finite, no pair of one class or none of two.

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
    """Accuracy of N-way K-shot episodes: each query goes to the nearest prototype (Snell et al. 2017).

    An episode draws `n_way` classes, and of each `n_shot` samples, whose mean is the prototype, and `n_query` others to
    classify. Classes with too few samples for that are left out.

    Args:
        embeddings: (N, D); tensor or array, any floating dtype and device.
        labels: (N,), whole numbers.
        n_way, n_shot, n_query: classes, samples and queries of each class in an episode.
        n_episodes: how many episodes.
        groups: (N,), whole numbers: an episode draws its classes from one group, such as the characters of an alphabet,
            and groups take turns; those with fewer than `n_way` classes are left out. None for all classes in one.
        generator: `torch.Generator` on the CPU for the draw; None draws the same episodes every time.

    Returns:
        `(accuracy, interval)`: the mean over the episodes, between 0 and 1, and the half-width of its 95 per cent
        interval, 1.96 standard errors; infinite for one episode.

    Raises:
        ValueError: other shapes, values that are not finite, a class in two groups, or fewer than `n_way` classes of
            enough samples.

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


def _by_group(classes, groups, x):
    """Lists of the classes of each group; a class is its samples (n,)."""
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


@torch.no_grad()
def one_shot_runs(
    embed: Callable, runs: Sequence[tuple[Tensor, Tensor, Tensor]], *, distances: Callable[..., Tensor] = torch.cdist
) -> tuple[float, list[float]]:
    """Error of one-shot runs, such as Omniglot's: each test image goes to the nearest training image, by itself.

    Args:
        embed: called as `embed(images)` on the (n, C, H, W) of a run, returns what `distances` compares. A model should
            be in evaluation mode.
        runs: list of `(training images, test images, answers)`, answers int64 (n_test,), the indices of the training
            images that are right, as `load_one_shot_runs` of datasets.py returns them.
        distances: called as `distances(embedded test images, embedded training images)`, returns (n_test, n_train).

    Returns:
        `(error, errors)`: the mean over the runs, between 0 and 1, and the list of each run's.

    Raises:
        ValueError: no runs.

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


def _embeddings_and_labels(metric, outputs, target):
    """Of a batch, (B, D) and (B,); ValueError where it is of another kind."""
    labels = None if target is None else target[0]
    is_one = len(outputs) == 1 and outputs[0].dim() == 2 and torch.is_tensor(labels)
    if not is_one or labels.numel() != len(outputs[0]):
        shapes = ", ".join(str(tuple(x.shape)) for x in outputs)
        given = tuple(labels.shape) if torch.is_tensor(labels) else type(labels).__name__
        raise ValueError(f"{metric.name()} needs embeddings (B, D) and labels (B,), got {shapes} and labels {given}")
    return outputs[0], labels.reshape(-1)


def _gathered(value):
    """A value of each process, in the order of their ranks; a list of one without torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _in_turn(parts):
    """The rows of all processes (N, ...), of which row i was dealt to process i % W."""
    place = torch.cat([torch.arange(len(part)) * len(parts) + rank for rank, part in enumerate(parts)])
    return torch.cat(parts)[place.argsort()]


def _check_set(embeddings, labels, like=None):
    """Embeddings and labels as `_check_embeddings` has them and int64 (N,), checked."""
    x = _check_embeddings(embeddings, like)
    if labels is None:
        raise ValueError(f"expected one whole number as label of each of {len(x)} embeddings, got none")
    labels = torch.as_tensor(labels, device=x.device)
    if labels.shape not in ((len(x),), (len(x), 1)) or labels.is_floating_point():
        given = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"expected one whole number as label of each of {len(x)} embeddings, got {given}")
    return x, labels.reshape(-1).long().contiguous()


def _check_embeddings(embeddings, like=None):
    """Embeddings (N, D) in float64, checked; on the device and of the width of `like` where given."""
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
    """Squared distances (N, M) of the rows of two centred float64 matrices; 0 between equal rows."""
    rounding = 2 * torch.finfo(x.dtype).eps * (2 + x.shape[1] ** 0.5)  # so much too short that equal rows clamp to 0
    x_norms, y_norms = (z.square().sum(dim=1) * (1 - rounding) for z in (x, y))  # (N,), (M,)
    return torch.addmm(y_norms, x, y.T, alpha=-2).add_(x_norms[:, None]).clamp_(min=0)


def _rounded_bits(squared_distances, n_bits=16):
    """The bits of float64 distances, rounded to multiples of 2^n_bits, in place.

    As whole numbers these have the order of the distances. Rounding takes away 1e-11 of a distance, what a product of
    matrices may add to it: so distances equal in truth are equal here, unless they are small beside the spread.
    """
    return squared_distances.view(torch.int64).add_(1 << (n_bits - 1)).bitwise_and_(-(1 << n_bits))


def _nearest(queries, references, k, own=None):
    """Yield `(rows, neighbors)`: a slice of the queries, and the indices (n, k) of the references nearest to each.

    By distance and then by index: both are packed into one whole number, which is what gets sorted. `own` (N,) are the
    queries' own indices among the references, left out; a k beyond the references means all.
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
    """Figures of each query, (n,): whether its neighbours (n, k), nearest first, are relevant, and R (n,) are."""
    place = torch.arange(1, is_relevant.shape[1] + 1, device=R.device)  # (k,)
    hits = is_relevant & (place <= R[:, None])  # relevant ones among the R nearest
    precision = is_relevant.cumsum(dim=1) / place.double()  # (n, k)
    values = {f"recall@{k}": is_relevant[:, :k].any(dim=1) for k in ks}
    values["r_precision"] = hits.sum(dim=1) / R.double()
    values["map@r"] = (precision * hits).sum(dim=1) / R
    return values


def _vote(neighbor_labels):
    """The label that most neighbours (n, k) have, nearest first; among equals that of the nearest. (n,)."""
    votes = sum((neighbor_labels == column[:, None]).long() for column in neighbor_labels.unbind(dim=1))  # (n, k)
    return neighbor_labels.gather(1, votes.argmax(dim=1, keepdim=True)).squeeze(1)


def _all_pairs(x, labels):
    """Distances of all pairs of one class and of two, arrays (P,), (N,)."""
    counts = labels.unique(return_counts=True)[1]
    n_positive = int((counts * (counts - 1) // 2).sum())
    distances = np.empty(len(x) * (len(x) - 1) // 2)
    x = x - x.mean(dim=0)
    filled = [0, n_positive]  # positive pairs first, negative ones behind
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
    """Distances of pairs drawn uniformly with replacement, of one class and of two, arrays (P,), (N,)."""
    distances, is_same = np.empty(n_pairs), np.empty(n_pairs, dtype=bool)
    step = max(1, 2**22 // x.shape[1])
    for start in range(0, n_pairs, step):
        n = min(step, n_pairs - start)
        i = torch.randint(len(x), (n,), generator=generator)
        j = torch.randint(len(x) - 1, (n,), generator=generator)
        i, j = i.to(x.device), (j + (j >= i)).to(x.device)  # another sample, each equally likely
        squared_distances = (x[i] - x[j]).square().sum(dim=1)
        distances[start : start + n] = squared_distances.sqrt().cpu().numpy()
        is_same[start : start + n] = (labels[i] == labels[j]).cpu().numpy()
    return distances[is_same], distances[~is_same]


def _roc(positive, negative, fars):
    """The figures of `verification` from distances of pairs of one class (P,) and of two (N,), which get sorted."""
    positive.sort()
    negative.sort()
    P, N = len(positive), len(negative)
    # The ROC curve rises at the distances of positive pairs, by steps or, where negative ones tie, by a slope.
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
    """Midway between a distance and the next of the sorted ones: 0 accepts no pair, infinity all."""
    following = [part[np.searchsorted(part, distance, side="right") :][:1] for part in (positive, negative)]
    following = float(np.concatenate((*following, [np.inf])).min())
    return max(0.0, (float(distance) + following) / 2)
