"""Tests of metrics.py, on numbers that can be checked by hand."""

import pytest
import torch

from metrics import AccumulatedAccuracyMetric, AverageNonzeroTripletsMetric, Metric

both_metrics = pytest.mark.parametrize("metric_class", [AccumulatedAccuracyMetric, AverageNonzeroTripletsMetric])


def scores_of(*predictions, n_classes=3):
    """Scores, with the prediction's the largest."""
    return (torch.eye(n_classes)[list(predictions)] - 0.5,)


def labels_of(*labels):
    return (torch.tensor(labels),)


def counted(count):
    return torch.tensor(0.5), count


@pytest.mark.parametrize("metric", [AccumulatedAccuracyMetric(), AverageNonzeroTripletsMetric()])
def test_metric_is_a_metric_with_the_original_name(metric):
    assert isinstance(metric, Metric)
    assert metric.name() in ("Accuracy", "Average nonzero triplets")
    assert (metric.name() == "Accuracy") == isinstance(metric, AccumulatedAccuracyMetric)


def test_base_class_asks_for_its_methods():
    metric = Metric()
    for method in (lambda: metric((), None, None), metric.reset, metric.value, metric.name):
        with pytest.raises(NotImplementedError):
            method()


def test_accuracy_is_in_per_cent():
    metric = AccumulatedAccuracyMetric()
    metric(scores_of(0, 1, 2, 2), labels_of(0, 1, 2, 0), None)
    assert metric.value() == 75.0
    assert isinstance(metric.value(), float)


def test_accuracy_weighs_samples_and_not_batches():
    metric = AccumulatedAccuracyMetric()
    metric(scores_of(0, 1, 2, 0), labels_of(0, 1, 2, 0), None)
    metric(scores_of(1), labels_of(2), None)
    assert metric.value() == 80.0


def test_accuracy_takes_labels_in_a_column():
    metric = AccumulatedAccuracyMetric()
    metric(scores_of(0, 1, 2, 0), (torch.tensor([[0], [1], [0], [1]]),), None)
    assert metric.value() == 50.0


@pytest.mark.parametrize("count", [int, torch.tensor])
def test_nonzero_triplets_are_averaged_over_batches(count):
    metric = AverageNonzeroTripletsMetric()
    for n in (40, 20, 3):
        metric((), None, counted(count(n)))
    assert metric.value() == 21.0
    assert isinstance(metric.value(), float)


def test_reset_forgets():
    accuracy, triplets = AccumulatedAccuracyMetric(), AverageNonzeroTripletsMetric()
    accuracy(scores_of(0, n_classes=1), labels_of(7), None)
    accuracy.reset()
    accuracy(scores_of(1, 1), labels_of(1, 0), None)
    assert accuracy.value() == 50.0
    triplets((), None, counted(1000))
    triplets.reset()
    triplets((), None, counted(10))
    assert triplets.value() == 10.0


@both_metrics
def test_no_value_before_the_first_batch_D49(metric_class):
    metric = metric_class()
    with pytest.raises(ValueError, match=f"{metric.name()} has no value before the first batch"):
        metric.value()
    if metric_class is AccumulatedAccuracyMetric:
        metric(scores_of(0), labels_of(0), None)
    else:
        metric((), None, counted(1))
    metric.reset()
    with pytest.raises(ValueError, match="before the first batch"):
        metric.value()


@pytest.mark.parametrize(
    ("outputs", "target"),
    [
        (scores_of(0, 1) * 3, labels_of(0, 1)),
        (scores_of(0, 1), None),
        (scores_of(0, 1), labels_of(0, 1, 2)),
        ((torch.zeros(2),), labels_of(0, 1)),
        ((torch.zeros(2, 3, 4, 4),), (torch.zeros(2, 4, 4),)),
        (scores_of(0, 1), ({"label": torch.tensor([0, 1])},)),
        (scores_of(0, 1), (labels_of(0, 1) * 2,)),
    ],
    ids=["three outputs", "no target", "too many labels", "one score", "pixels", "dict", "two targets"],
)
def test_accuracy_refuses_what_it_cannot_compare_D49(outputs, target):
    metric = AccumulatedAccuracyMetric()
    with pytest.raises(ValueError, match=r"needs one output \(B, C\) and labels \(B,\)"):
        metric(outputs, target, None)


def test_accuracy_of_embeddings_is_an_error_D49():
    metric = AccumulatedAccuracyMetric()
    metric((torch.randn(10, 2),), (torch.arange(10),), None)
    metric((torch.randn(2, 2),), labels_of(0, 1), None)
    with pytest.raises(ValueError, match=r"label 9, but only 2 outputs: are these embeddings"):
        metric.value()


def test_accuracy_takes_a_batch_of_no_samples():
    metric = AccumulatedAccuracyMetric()
    metric((torch.zeros(0, 3),), (torch.zeros(0, dtype=torch.int64),), None)
    metric(scores_of(0, 1), labels_of(0, 2), None)
    assert metric.value() == 50.0


@pytest.mark.parametrize(
    "loss", [torch.tensor(0.5), (torch.tensor(0.5),), None], ids=["tensor", "tuple of one", "None"]
)
def test_nonzero_triplets_without_a_count_are_an_error_D49(loss):
    with pytest.raises(ValueError, match=r"needs what OnlineTripletLoss returns, \(loss, count\)"):
        AverageNonzeroTripletsMetric()((), None, loss)
