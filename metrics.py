"""Metrics for `fit`: called on every batch, reported once an epoch.

A metric is called with the model's outputs, the target and what the loss returned:

    fit(train_loader, val_loader, model, loss_fn, ..., metrics=[AccumulatedAccuracyMetric()])
"""


class Metric:
    """Base class: collects over batches, reports a value. Override the four methods.

    `fit` calls `reset()` before each pass over the training or validation data, the metric itself after each batch,
    and `value()` at the end of the pass. Collect tensors as they are: reading one (`.item()`) makes a GPU wait.
    """

    def __call__(self, outputs, target, loss):
        """Take in a batch.

        Args:
            outputs: tuple of what the model returned.
            target: tuple of one, the target; None where the loader gives none.
            loss: what the loss returned, a tensor or a tuple that begins with one.
        """
        raise NotImplementedError

    def reset(self):
        """Forget all batches."""
        raise NotImplementedError

    def value(self):
        """The value over all batches since the last reset, a number."""
        raise NotImplementedError

    def name(self):
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

    def __init__(self):
        self.reset()

    def __call__(self, outputs, target, loss):
        """Take in a batch: `outputs[0]` scores (B, C), `target[0]` labels (B,); anything else is a ValueError."""
        labels = None if target is None else target[0]
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

    def reset(self):
        self.correct = 0
        self.largest_label = 0
        self.n_classes = 0
        self.total = 0

    def value(self):
        """Accuracy in per cent; ValueError before the first batch, or where the outputs were no scores of classes."""
        if self.total == 0:
            raise ValueError("Accuracy has no value before the first batch")
        if self.largest_label >= self.n_classes:
            classes = f"label {int(self.largest_label)}, but only {self.n_classes} outputs"
            raise ValueError(f"Accuracy met {classes}: are these embeddings rather than scores of classes?")
        return 100 * float(self.correct) / self.total

    def name(self):
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

    def __init__(self):
        self.reset()

    def __call__(self, outputs, target, loss):
        """Take in a batch: `loss` is `(loss, count)`, as OnlineTripletLoss returns; anything else is a ValueError."""
        if not isinstance(loss, (tuple, list)) or len(loss) < 2:
            raise ValueError("Average nonzero triplets needs what OnlineTripletLoss returns, (loss, count)")
        self.count += loss[1]
        self.n_batches += 1

    def reset(self):
        self.count = 0
        self.n_batches = 0

    def value(self):
        """Mean count a batch; ValueError before the first batch."""
        if self.n_batches == 0:
            raise ValueError("Average nonzero triplets has no value before the first batch")
        return float(self.count) / self.n_batches

    def name(self):
        return "Average nonzero triplets"
