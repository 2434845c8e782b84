"""Metrics for `fit`: called after every batch, asked for their value at the end of a pass.

A metric is called with the model's outputs, the target and what the loss returned. `EmbeddingMetric` hands the
embeddings of a whole validation pass to a function, such as `evaluate_embeddings` of evaluation.py:

    metrics = [EmbeddingMetric(evaluate_embeddings, keys=["map@r"])]
    history = fit(train_loader, val_loader, model, loss_fn, ..., metrics=metrics)
"""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Metric:
    """Base class: collects over batches, reports a value. Override all methods but `gather`.

    `fit` calls `reset()` before each pass over the training or validation data, the metric itself after each batch,
    and `value()` at the end of the pass. Keep what is counted in tensors: reading one (`.item()`) makes a GPU wait.
    """

    def __call__(self, outputs: tuple[Tensor, ...], target: tuple[Tensor] | None, loss: Any) -> None:
        """Take in a batch.

        Args:
            outputs: tuple of the model's outputs.
            target: tuple of one, the target; None if the loader gives none. The metrics below want labels. If a target
                has several parts, a subclass picks one: `super().__call__(outputs, (target[0]["label"],), loss)`.
            loss: what the loss returned, a tensor or a tuple that begins with one.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all batches."""
        raise NotImplementedError

    def gather(self) -> None:
        """Add what this metric has collected in the other processes of torch.distributed; by default nothing.

        If the processes share the samples of a pass, `fit` calls it before `value()`, in all of them.
        """

    def value(self) -> Any:
        """The value over all batches since the last reset: a number, a dict of numbers by name, or None for none."""
        raise NotImplementedError

    def name(self) -> str:
        """The name under which the value is reported."""
        raise NotImplementedError


class _OutputMetric(Metric):
    """A metric of one of the model's outputs, a matrix, and of the labels."""

    output = 0  # on the class, as others below, for subclasses whose `__init__` does not call this one

    def __init__(self, output: int = 0) -> None:
        if not isinstance(output, int):
            raise TypeError(f"expected output to be the number of one of the model's outputs, got {_kind(output)}")
        self.output = output
        self.reset()

    def _take(self, outputs, target, needed):
        """Of a batch, the output (B, D) and the labels (B,), detached, and how many samples are surely no pairs.

        SiameseNet has outputs of one shape and targets 0 and 1. Anything else but labels is a ValueError.
        """
        outputs, target = (x if isinstance(x, (tuple, list)) else (x,) for x in (outputs, target))
        if not -len(outputs) <= self.output < len(outputs):
            raise ValueError(f"{self.name()} takes output {self.output} of the model, which returned {len(outputs)}")
        x, labels = outputs[self.output], target[0] if len(target) == 1 else target
        is_matrix = torch.is_tensor(x) and x.dim() == 2 and x.shape[1] > 0
        if not is_matrix or not torch.is_tensor(labels) or labels.shape not in ((len(x),), (len(x), 1)):
            given = f"{_kind(x)} as output {self.output} and {_kind(labels)} as target"
            raise ValueError(f"{self.name()} needs {needed} and labels (B,), got {given}")
        labels = labels.detach().reshape(-1)
        labels = labels if labels.is_floating_point() else labels.long()
        may_be_pairs = self.output == 0 and len(outputs) > 1 and len({_kind(x) for x in outputs}) == 1
        return x.detach(), labels, ((labels != 0) & (labels != 1)).sum() if may_be_pairs else len(labels)

    def _refuse_pairs(self, n_single):
        if n_single == 0:
            seen = f"{self.name()} met outputs of one shape and targets 0 and 1, as of SiameseNet's pairs"
            raise ValueError(f"{seen}: give it single samples, or say with output=-2 that these are")


class AccumulatedAccuracyMetric(_OutputMetric):
    """Classification accuracy in per cent: the fraction of samples whose largest score is that of their label.

    Args:
        output: which of the model's outputs holds the scores; negative numbers count from the last.

    >>> import torch
    >>> accuracy = AccumulatedAccuracyMetric()
    >>> accuracy((torch.tensor([[0.9, 0.1], [0.8, 0.2]]),), (torch.tensor([0, 1]),), None)
    >>> accuracy.value()
    50.0
    """

    correct: Any = 0
    largest_label: Any = -1
    smallest_label: Any = 0
    n_classes = total = 0

    def __call__(self, outputs: tuple[Tensor, ...], target: tuple[Tensor] | None, loss: Any) -> None:
        """Take in a batch: scores (B, C) and labels (B,), whole numbers; ValueError for anything else."""
        scores, labels, _ = self._take(outputs, target, "scores (B, C)")
        if labels.is_floating_point():
            raise ValueError(f"{self.name()} needs whole numbers as labels, got {labels.dtype}")
        if len(labels) == 0:
            return
        self.correct = self.correct + (scores.argmax(dim=1) == labels).sum()
        self.largest_label = labels.max().clamp(min=self.largest_label)
        self.smallest_label = labels.min().clamp(max=self.smallest_label)
        self.n_classes = scores.shape[1]
        self.total += len(labels)

    def reset(self) -> None:
        self.correct = self.n_classes = self.total = 0
        self.largest_label, self.smallest_label = -1, 0

    def gather(self) -> None:
        """Add the samples of the other processes."""
        own = int(self.correct), int(self.largest_label), int(self.smallest_label), self.n_classes, self.total
        correct, largest_labels, smallest_labels, n_classes, totals = zip(*_gathered(own))
        self.correct, self.largest_label = sum(correct), torch.tensor(max(largest_labels))
        self.smallest_label = torch.tensor(min(smallest_labels))
        self.n_classes, self.total = max(n_classes), sum(totals)

    def value(self) -> float:
        """Accuracy in per cent; ValueError before the first batch, or if a label has no score."""
        if self.total == 0:
            raise ValueError(f"{self.name()} has no value before the first batch")
        if self.largest_label >= self.n_classes:
            classes = f"label {int(self.largest_label)}, but only {self.n_classes} outputs"
            raise ValueError(f"{self.name()} met {classes}: are these embeddings rather than scores of classes?")
        if self.smallest_label < 0:
            raise ValueError(f"{self.name()} met label {int(self.smallest_label)}, which no score is for")
        return 100 * float(self.correct) / self.total

    def name(self) -> str:
        return "Accuracy"


class AverageNonzeroTripletsMetric(Metric):
    """Mean number of active triplets per batch, those whose loss is above zero.

    >>> import torch
    >>> average = AverageNonzeroTripletsMetric()
    >>> average((), None, (torch.tensor(0.5), torch.tensor(40)))
    >>> average((), None, (torch.tensor(0.4), torch.tensor(20)))
    >>> average.value()
    30.0
    """

    count: Any = 0
    n_batches = 0

    def __init__(self) -> None:
        self.reset()

    def __call__(self, outputs: tuple[Tensor, ...], target: tuple[Tensor] | None, loss: Any) -> None:
        """Take in a batch: `loss` is `(loss, count)`, as OnlineTripletLoss returns; ValueError for anything else."""
        count = loss[1] if isinstance(loss, (tuple, list)) and len(loss) > 1 else None
        try:
            count = _double(torch.as_tensor(count)).reshape(())
        except (TypeError, ValueError, RuntimeError):
            given = f"{_kind(loss)} with {_kind(count)} as count"
            needed = f"{self.name()} needs what OnlineTripletLoss returns, (loss, count)"
            raise ValueError(f"{needed}, got {given}") from None
        self.count = self.count + count
        self.n_batches += 1

    def reset(self) -> None:
        self.count = self.n_batches = 0

    def gather(self) -> None:
        """Add the batches of the other processes."""
        self.count, self.n_batches = map(sum, zip(*_gathered((float(self.count), self.n_batches))))

    def value(self) -> float:
        """Mean count per batch; ValueError before the first batch."""
        if self.n_batches == 0:
            raise ValueError(f"{self.name()} has no value before the first batch")
        return float(self.count) / self.n_batches

    def name(self) -> str:
        return "Average nonzero triplets"


class PairAccuracyMetric(Metric):
    """Accuracy in per cent of SiameseNet's pairs or TripletNet's triplets, by their Euclidean distances d.

    A pair is accepted as of one class if d < threshold. A triplet is correct if d(anchor, positive) is less than
    d(anchor, negative), so none is where embeddings have collapsed. A distance that is NaN is never less.

    Args:
        threshold: for pairs, not negative, such as `verification(...)["threshold@eer"]` of other data. None:
            the best one for the pairs of the pass. That is optimistic, since the pairs that choose it also judge it: it
            is at least the share of the more frequent kind. Keeps 16 bytes for each pair.

    Raises:
        ValueError: another threshold.

    >>> import torch
    >>> accuracy = PairAccuracyMetric(threshold=1.0)
    >>> pairs = torch.tensor([[0.0], [0.0], [0.0]]), torch.tensor([[0.5], [2.0], [3.0]])
    >>> accuracy(pairs, (torch.tensor([1, 0, 0]),), None)
    >>> accuracy.value()
    100.0
    """

    correct: Any
    n_outside: Any
    total: int
    pairs: list[Tensor]

    def __init__(self, threshold: float | None = None) -> None:
        is_number = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)
        if threshold is not None and not (is_number and threshold >= 0):
            raise ValueError(f"expected threshold to be None or a distance, 0 or more, got {threshold!r}")
        self.threshold = None if threshold is None else float(threshold)
        self.reset()

    def __call__(self, outputs: tuple[Tensor, ...], target: tuple[Tensor] | None, loss: Any) -> None:
        """Take in a batch.

        Args:
            outputs: of pairs two embeddings (B, D), of triplets three: anchor, positive, negative.
            target: of pairs (B,) or (B, 1) in any numeric dtype: 1 where the pair is of one class, 0 where it is not,
                or between: of one class where above 0.5. None for triplets.
            loss: not used.

        Raises:
            ValueError: for anything else. A target below 0 or above 1 is noticed by `value()`.
        """
        outputs, target = self._checked(outputs, target)
        anchor, *others = (_double(x) for x in outputs)
        distances = [torch.linalg.vector_norm(anchor - other, dim=1) for other in others]
        if target is None:
            self.correct = self.correct + (distances[0] < distances[1]).sum()
        else:
            target = _double(target).reshape(-1).to(anchor.device)
            self.n_outside = self.n_outside + (~((target >= 0) & (target <= 1))).sum()
            if self.threshold is None:
                self.pairs.append(torch.stack((distances[0], target)))  # (2, B)
            else:
                self.correct = self.correct + ((distances[0] < self.threshold) == (target > 0.5)).sum()
        self.total += len(anchor)

    def _checked(self, outputs, target):
        """Outputs and a target, None of triplets."""
        outputs, target = (x if isinstance(x, (tuple, list)) else (x,) for x in (outputs, target))
        targets = [x for x in target if x is not None]
        shapes = [tuple(x.shape) if torch.is_tensor(x) else () for x in (*outputs, *targets)]
        if len(set(shapes[: len(outputs)])) == 1 and len(shapes[0]) == 2:
            B = shapes[0][0]
            if len(outputs) == 3 and not targets:
                return outputs, None
            if len(outputs) == 2 and len(targets) == 1 and shapes[2] in ((B,), (B, 1)):
                return outputs, targets[0]
        came, target_came = (" and ".join(map(_kind, x)) or "nothing" for x in (outputs, targets))
        needed = "SiameseNet's pairs, two (B, D) and a target (B,), or TripletNet's triplets, three (B, D) alone"
        raise ValueError(f"{self.name()} got {came} as outputs, {target_came} as target: give it {needed}")

    def reset(self) -> None:
        self.correct = self.n_outside = self.total = 0
        self.pairs = []

    def gather(self) -> None:
        """Add the pairs or triplets of the other processes."""
        pairs = [torch.cat(self.pairs, dim=1).cpu()] if self.pairs else []
        own = int(self.correct), int(self.n_outside), self.total, pairs
        correct, n_outside, totals, pairs = zip(*_gathered(own))
        self.correct, self.n_outside, self.total = sum(correct), sum(n_outside), sum(totals)
        self.pairs = [part for own in pairs for part in own]

    def value(self) -> float:
        """Accuracy in per cent; ValueError before the first batch, or if a target is below 0, above 1 or NaN."""
        if self.total == 0:
            raise ValueError(f"{self.name()} has no value before the first batch")
        if self.n_outside > 0:
            given = f"{int(self.n_outside)} of {self.total} beyond"
            raise ValueError(f"{self.name()} needs pairs with targets from 0 to 1, got {given}: are these labels?")
        correct = int(self.correct)
        if self.pairs:
            distances, target = torch.cat(self.pairs, dim=1)
            correct += _most_correct(distances, target > 0.5)
        return 100 * correct / self.total

    def name(self) -> str:
        return "Pair accuracy"


class EmbeddingMetric(_OutputMetric):
    """Numbers computed from all embeddings of a validation pass: retrieval, verification, or a function of your own.

    With `evaluate_embeddings`, the history of `fit` has `val_map@r`, `val_recall@1` and so on. Training passes are
    ignored, because their embeddings come from a network that changes from batch to batch. The validation loader should
    give each sample once: copies of a sample would find each other.

    Args:
        function: called as `function(embeddings, labels)` with tensors (N, D) and (N,), returns a dict. Its numbers are
            kept, other values ignored.
        keys: which values to report; by default all.
        output: which of the model's outputs holds the embeddings; negative numbers count from the last.

    >>> import torch
    >>> metric = EmbeddingMetric(lambda embeddings, labels: {"largest": embeddings.max(), "n": len(labels)})
    >>> with torch.no_grad():
    ...     metric((torch.tensor([[0.0], [1.0], [5.0]]),), (torch.tensor([7, 7, 8]),), None)
    >>> metric.value()
    {'largest': 5.0, 'n': 3}
    """

    embeddings: list[Tensor]
    labels: list[Tensor]
    n_single: Any

    def __init__(
        self, function: Callable[[Tensor, Tensor], Mapping], *, keys: Sequence[str] | None = None, output: int = 0
    ) -> None:
        if not callable(function):
            example = "such as evaluate_embeddings of evaluation.py"
            raise TypeError(f"expected a function of embeddings and labels, {example}, got {_kind(function)}")
        if isinstance(keys, str):
            raise TypeError(f"expected keys to be a list of names, such as [{keys!r}], got the string {keys!r}")
        self.function = function
        self.keys = None if keys is None else list(keys)
        super().__init__(output)

    def __call__(self, outputs: tuple[Tensor, ...], target: tuple[Tensor] | None, loss: Any) -> None:
        """Take in a batch of a validation: embeddings (B, D) and labels (B,); ValueError for anything else."""
        if torch.is_grad_enabled():  # training
            return
        embeddings, labels, n_single = self._take(outputs, target, "embeddings (B, D)")
        if len(embeddings) > 0:
            # Copies: the next run of a compiled model overwrites its outputs, and a view would keep all it is part of.
            self.embeddings.append(embeddings.clone())
            self.labels.append(labels.clone())
            self.n_single = self.n_single + n_single

    def reset(self) -> None:
        self.embeddings, self.labels, self.n_single = [], [], 0

    def gather(self) -> None:
        """Add the embeddings of the other processes, in the order in which DistributedSampler dealt the samples."""
        device = self.embeddings[0].device if self.embeddings else torch.device("cpu")
        own = [torch.cat(part).cpu() for part in (self.embeddings, self.labels) if part]
        parts = [part for part in _gathered(own) if part]  # a process may have had no sample
        if parts:
            self.embeddings, self.labels = ([_in_turn(part).to(device)] for part in zip(*parts))
        self.n_single = sum(_gathered(int(self.n_single)))

    def value(self) -> dict[str, Any] | None:
        """A dict of numbers by name; None if no batch was evaluated."""
        if not self.embeddings:
            return None
        self._refuse_pairs(self.n_single)
        values = self.function(torch.cat(self.embeddings), torch.cat(self.labels))
        if not isinstance(values, Mapping):
            raise TypeError(f"{self.name()} needs a function that returns a dict, got {_kind(values)} from it")
        keys = list(values) if self.keys is None else self.keys
        missing = [key for key in keys if key not in values]
        if missing:
            raise ValueError(f"expected keys among {list(values)}, which the function returned, got {missing}")
        found = {key: values[key] for key in keys}
        found = {key: value.item() if getattr(value, "ndim", None) == 0 else value for key, value in found.items()}
        return {key: value for key, value in found.items() if isinstance(value, numbers.Real)}

    def name(self) -> str:
        return "Embeddings"


class EmbeddingStatisticsMetric(_OutputMetric):
    """Statistics of the embeddings of a pass: they show early why a run does not learn.

    The value is a dict; distances are Euclidean, means are over the pass:

    - `spread`: root mean square distance to the mean embedding; close to 0 if the embeddings have collapsed;
    - `effective_rank`: how many dimensions they use, from 1 to D: the exponential of the entropy of the covariance's
      eigenvalues, as fractions of their sum (Roy and Vetterli 2007);
    - `norm`: mean norm;
    - `positive_distance`, `negative_distance`: mean distance of two samples of the same and of different classes,
      within batches.

    Embeddings that are not finite give NaN. Of n samples it keeps min(n, D) * D numbers, then at most 2 * D^2, and
    takes the eigenvalues of a matrix of min(n, D) rows.

    Args:
        output: which of the model's outputs holds the embeddings; negative numbers count from the last.

    >>> import torch
    >>> metric = EmbeddingStatisticsMetric()
    >>> metric((torch.tensor([[0.0, 3.0], [4.0, 0.0]]),), (torch.tensor([0, 1]),), None)
    >>> metric.value()
    {'spread': 2.5, 'effective_rank': 1.0, 'norm': 3.5, 'negative_distance': 5.0}
    """

    center: Any
    sums: dict[str, Any]
    rows: list[Tensor]

    @torch.no_grad()
    def __call__(self, outputs: tuple[Tensor, ...], target: tuple[Tensor] | None, loss: Any) -> None:
        """Take in a batch: embeddings (B, D) and labels (B,); ValueError for anything else."""
        embeddings, labels, n_single = self._take(outputs, target, "embeddings (B, D)")
        if len(embeddings) == 0:
            return
        x = _double(embeddings)
        if self.center is None:
            self.center = x.mean(dim=0)
        shifted = x - self.center
        distances = torch.nn.functional.pdist(x)  # (B * (B - 1) / 2,), by differences: exact far from the origin too
        i, j = torch.triu_indices(len(x), len(x), offset=1, device=labels.device)
        same = (labels[i] == labels[j]).to(x.device)
        sums = {"n": len(x), "sum": shifted.sum(dim=0), "norm": x.norm(dim=1).sum(), "n_single": n_single}
        for name, pairs in (("positive", same), ("negative", ~same)):
            sums |= {f"{name}_distance": (distances * pairs).sum(), f"n_{name}": pairs.sum()}
        self._add(sums, [shifted])

    def _add(self, sums, rows):
        """Add sums, and rows (n, D) less the centre. Of these at most D are kept beside the products."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value
        for part in rows:
            self.rows.append(part)
            if sum(map(len, self.rows)) > part.shape[1]:
                self._fold()

    def _fold(self):
        """Replace the rows by their products (D, D), added up."""
        if self.rows:
            rows = torch.cat(self.rows)
            products = self.sums.get("products", rows.new_zeros(rows.shape[1], rows.shape[1]))
            self.sums["products"] = torch.addmm(products, rows.T, rows)
            self.rows = []

    def reset(self) -> None:
        self.center, self.sums, self.rows = None, {}, []

    def gather(self) -> None:
        """Add the batches of the other processes."""
        if "products" in self.sums:
            self._fold()  # a process sends rows or products, not both
        center, sums = self.center, {k: v.cpu() if torch.is_tensor(v) else v for k, v in self.sums.items()}
        own = None if center is None else (center.cpu(), sums, [part.cpu() for part in self.rows])
        parts = [part for part in _gathered(own) if part is not None]
        self.reset()
        for center, sums, rows in parts:
            self.center = center if self.center is None else self.center
            shift, n = center - self.center, sums["n"]
            if "products" in sums:
                cross = torch.outer(sums["sum"], shift)
                sums = sums | {"products": sums["products"] + cross + cross.T + n * torch.outer(shift, shift)}
            self._add(sums | {"sum": sums["sum"] + n * shift}, [part + shift for part in rows])

    def value(self) -> dict[str, float] | None:
        """The dict above, without distances of which there were no pairs; None before the first batch."""
        if self.center is None:
            return None
        n, sums = self.sums["n"], self.sums
        self._refuse_pairs(sums["n_single"])
        variances = self._variances()
        shares = variances / variances.sum().clamp(min=torch.finfo(variances.dtype).tiny)
        values = {
            "spread": float(variances.sum().sqrt()),
            "effective_rank": float(torch.special.entr(shares).sum().exp()),
            "norm": float(sums["norm"]) / n,
        }
        for name in ("positive", "negative"):
            if int(sums[f"n_{name}"]) > 0:
                values[f"{name}_distance"] = float(sums[f"{name}_distance"]) / int(sums[f"n_{name}"])
        return values

    def _variances(self):
        """Eigenvalues of the covariance (D,), or (n,) of n <= D rows, which have no others but zeros."""
        n = self.sums["n"]
        mean = self.sums["sum"] / n
        if "products" in self.sums:
            self._fold()
            products = self.sums["products"] / n - torch.outer(mean, mean)  # (D, D)
        else:
            products = _lower_products(torch.cat(self.rows) - mean) / n  # (n, n)
        if not products.isfinite().all():  # eigvalsh raises an error for others
            return products.diagonal() * torch.nan
        return torch.linalg.eigvalsh(products).clamp(min=0)  # of the lower triangle

    def name(self) -> str:
        return "Embedding statistics"


def _most_correct(distances, is_same):
    """How many of P pairs the best threshold gets right, (P,) each. Equal distances are on one side of it."""
    distances, order = distances.sort()  # NaN last
    gains = (2 * is_same[order].long() - 1).cumsum(dim=0)  # by accepting this pair and all before
    is_last = distances.isfinite()
    is_last[:-1] &= distances[:-1] != distances[1:]
    return int((~is_same).sum()) + int((gains * is_last).max().clamp(min=0))  # 0: no pair is accepted


def _lower_products(rows, size=256):
    """Products of each two rows (n, n), in the lower triangle. Without the upper one they take little over half."""
    products = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), size):
        products[start:, start : start + size] = rows[start:] @ rows[start : start + size].T
    return products


def _kind(thing):
    """What something is, for a message."""
    if torch.is_tensor(thing):
        return f"a tensor {tuple(thing.shape)}"
    return f"{type(thing).__name__} of {len(thing)}" if isinstance(thing, (tuple, list, dict)) else type(thing).__name__


def _double(x):
    """A tensor in float64, detached, on its device; on the CPU for MPS, which has no float64."""
    return x.detach().to("cpu" if x.device.type == "mps" else x.device).double()


def _gathered(value):
    """A value of each process, in the order of their ranks; a list of one without torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _in_turn(parts):
    """The rows of all processes (N, ...), of which row i was dealt to process i % W."""
    place = torch.cat(
        [torch.arange(len(part), device=part.device) * len(parts) + rank for rank, part in enumerate(parts)]
    )
    return torch.cat(parts)[place.argsort()]
