"""Tests of metrics.py, against numbers worked by hand and loops."""

import copy
import itertools
import math
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import metrics as metrics_module
from datasets import SiameseMNIST, TripletMNIST
from evaluation import evaluate_embeddings, verification
from metrics import (
    AccumulatedAccuracyMetric,
    AverageNonzeroTripletsMetric,
    EmbeddingMetric,
    EmbeddingStatisticsMetric,
    Metric,
    PairAccuracyMetric,
)
from networks import SiameseNet, TripletNet
from trainer import extract_embeddings, fit, test_epoch


def count_of(embeddings, labels):
    return {"n": len(embeddings)}


METRICS_OF_OUTPUTS = {
    "accuracy": AccumulatedAccuracyMetric,
    "embeddings": lambda output=0: EmbeddingMetric(count_of, output=output),
    "statistics": EmbeddingStatisticsMetric,
}
each_metric_of_outputs = pytest.mark.parametrize(
    "make_metric", METRICS_OF_OUTPUTS.values(), ids=METRICS_OF_OUTPUTS.keys()
)
both_counting_metrics = pytest.mark.parametrize(
    "metric_class", [AccumulatedAccuracyMetric, AverageNonzeroTripletsMetric]
)


def scores_of(*predictions, n_classes=3):
    """Scores, with the prediction's the largest."""
    return (torch.eye(n_classes)[list(predictions)] - 0.5,)


def labels_of(*labels):
    return (torch.tensor(labels),)


def counted(count):
    return torch.tensor(0.5), count


def overlapping_classes():
    """Embeddings (40, 3) and labels (40,) of five classes that overlap."""
    labels = torch.arange(40) % 5
    return torch.randn(40, 3) + labels[:, None], labels


def feed(metric, x, labels, size=10):
    """A validation, batch by batch."""
    with torch.no_grad():
        for start in range(0, len(x), size):
            metric((x[start : start + size],), (labels[start : start + size],), None)
    return metric


def tensors_in(thing):
    """Those in nested dicts and lists."""
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ()
    return [thing] if torch.is_tensor(thing) else [x for part in parts for x in tensors_in(part)]


# Accuracy and the number of active triplets


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (AccumulatedAccuracyMetric(), "Accuracy"),
        (AverageNonzeroTripletsMetric(), "Average nonzero triplets"),
        (PairAccuracyMetric(), "Pair accuracy"),
    ],
)
def test_metric_is_a_metric_with_its_name(metric, name):
    assert isinstance(metric, Metric)
    assert metric.name() == name


def test_base_class_asks_for_its_methods():
    metric = Metric()
    for method in (lambda: metric((), None, None), metric.reset, metric.value, metric.name):
        with pytest.raises(NotImplementedError):
            method()
    assert metric.gather() is None


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


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.uint16, torch.uint64])
def test_labels_are_whole_numbers_of_any_dtype(dtype):
    labels = (torch.tensor([0, 1, 1, 0]).to(dtype),)
    accuracy, statistics = AccumulatedAccuracyMetric(), EmbeddingStatisticsMetric()
    accuracy(scores_of(0, 1, 0, 0, n_classes=2), labels, None)
    statistics((torch.tensor([[0.0], [1.0], [3.0], [0.0]]),), labels, None)
    assert accuracy.value() == 75.0
    assert statistics.value()["positive_distance"] == 1.0


def test_accuracy_of_labels_that_are_not_whole_numbers_is_an_error():
    with pytest.raises(ValueError, match=r"Accuracy needs whole numbers as labels, got torch.float32"):
        AccumulatedAccuracyMetric()(scores_of(0, 1), labels_of(0.0, 1.5), None)


@pytest.mark.parametrize(
    "form",
    [int, float, torch.tensor, np.int64, np.array, lambda n: torch.tensor([n]), lambda n: np.array([[n]])],
    ids=["int", "float", "tensor", "numpy", "array", "tensor of one", "array of one"],
)
def test_nonzero_triplets_are_averaged_over_batches(form):
    metric = AverageNonzeroTripletsMetric()
    for n in (40, 20, 3):
        metric((), None, counted(form(n)))
    assert metric.value() == 21.0
    assert type(metric.value()) is float


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.int64])
def test_nonzero_triplets_are_added_up_exactly_in_any_dtype(dtype):
    metric = AverageNonzeroTripletsMetric()
    for n in (101, 101, 101, 98):  # neither 256 nor 303 would fit 8 bits
        metric((), None, counted(torch.tensor(n, dtype=dtype)))
    assert metric.value() == 401 / 4
    metric.reset()
    for n in (np.int8(100), np.int8(100)):
        metric((), None, counted(n))
    assert metric.value() == 100
    metric.reset()
    for n in (2**24, 1, 1):  # float32 would lose the ones
        metric((), None, counted(torch.tensor(n)))
    assert metric.value() == (2**24 + 2) / 3


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        (torch.tensor(0.5), r"a tensor \(\)"),
        (torch.tensor([0.5, 3.0]), r"a tensor \(2,\)"),
        ((torch.tensor(0.5),), "tuple of 1"),
        (None, "NoneType"),
        (counted("40"), "str as count"),
        (counted(None), "NoneType as count"),
        (counted({"n": 4}), "dict of 1 as count"),
        (counted([1, 2]), "list of 2 as count"),
        (counted(torch.zeros(2)), r"a tensor \(2,\) as count"),
        (counted(torch.zeros(0)), r"a tensor \(0,\) as count"),
        (counted(np.zeros(3)), "ndarray as count"),
    ],
)
def test_nonzero_triplets_without_a_count_are_an_error(loss, given):
    message = rf"Average nonzero triplets needs what OnlineTripletLoss returns, \(loss, count\), got .*{given}"
    with pytest.raises(ValueError, match=message):
        AverageNonzeroTripletsMetric()((), None, loss)


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


@both_counting_metrics
def test_no_value_before_the_first_batch(metric_class):
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


def test_accuracy_of_embeddings_is_an_error():
    metric = AccumulatedAccuracyMetric()
    metric((torch.randn(10, 2),), (torch.arange(10),), None)
    metric((torch.randn(2, 2),), labels_of(0, 1), None)
    with pytest.raises(ValueError, match=r"label 9, but only 2 outputs: are these embeddings"):
        metric.value()


def test_subclasses_that_set_what_the_original_does_keep_working():
    class SecondBest(AccumulatedAccuracyMetric):  # with an `__init__` and a `__call__` of its own
        def __init__(self):
            self.correct = 0
            self.total = 0

        def __call__(self, outputs, target, loss):
            self.correct += int((outputs[0].argsort(dim=1)[:, -2] == target[0]).sum())
            self.total += len(target[0])

    class Silent(AccumulatedAccuracyMetric):
        def __init__(self):
            pass

    second, silent = SecondBest(), Silent()
    second((torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]),), labels_of(1, 2), None)
    silent(scores_of(0, 1), labels_of(0, 0), None)
    assert second.value() == silent.value() == 50.0


# Which of the model's outputs


@each_metric_of_outputs
def test_metric_takes_the_output_it_is_told_to(make_metric):
    x, labels = overlapping_classes()
    scores = nn.functional.one_hot(labels, 6) + 0.6 * torch.rand(40, 6)

    def value_of(output, *outputs):
        metric = make_metric(output)
        with torch.no_grad():
            metric(outputs, (labels,), None)
        return metric.value()

    alone = value_of(0, scores)
    assert value_of(1, torch.zeros(40, 5), scores, x) == alone
    assert value_of(-2, torch.zeros(40, 5), scores, x) == alone
    assert value_of(0, scores, {"anything": x}, None) == alone
    assert value_of(0, scores, scores.clone()) == alone  # of one shape, but with labels beyond 1


@pytest.mark.parametrize("output", ["embeddings", 1.0, None, nn.Linear(2, 2)], ids=lambda x: type(x).__name__)
@each_metric_of_outputs
def test_output_that_is_no_number_is_an_error(make_metric, output):
    message = f"expected output to be the number of one of the model's outputs, got {type(output).__name__}"
    with pytest.raises(TypeError, match=message):
        make_metric(output)


@pytest.mark.parametrize("output", [2, -3])
@each_metric_of_outputs
def test_output_beyond_those_of_the_model_is_an_error(make_metric, output):
    metric = make_metric(output)
    with torch.no_grad(), pytest.raises(ValueError, match=f"takes output {output} of the model, which returned 2"):
        metric((torch.zeros(2, 3), torch.zeros(2, 3)), labels_of(0, 1), None)
    with torch.no_grad(), pytest.raises(ValueError, match=f"takes output {output} of the model, which returned 0"):
        metric((), labels_of(0, 1), None)


@pytest.mark.parametrize(
    ("outputs", "target", "given"),
    [
        (scores_of(0, 1), None, "NoneType as target"),
        (scores_of(0, 1), (None,), "NoneType as target"),
        (scores_of(0, 1), (), "tuple of 0 as target"),
        (scores_of(0, 1), labels_of(0, 1, 2), r"a tensor \(3,\) as target"),
        (scores_of(0, 1, 2, 0), (torch.zeros(2, 2),), r"a tensor \(2, 2\) as target"),
        (scores_of(0, 1), ({"label": torch.tensor([0, 1])},), "dict of 1 as target"),
        (scores_of(0, 1), (labels_of(0, 1) * 2,), "tuple of 2 as target"),
        (scores_of(0, 1), labels_of(0, 1) * 2, "tuple of 2 as target"),
        (scores_of(0, 1), ([torch.tensor([0, 1])] * 2,), "list of 2 as target"),
        (scores_of(0, 1), (["ant", "bee"],), "list of 2 as target"),
        (scores_of(0), ("ant",), "str as target"),
        ((torch.zeros(2),), labels_of(0, 1), r"a tensor \(2,\) as output 0"),
        ((torch.zeros(()),), labels_of(0), r"a tensor \(\) as output 0"),
        ((torch.zeros(2, 0),), labels_of(0, 1), r"a tensor \(2, 0\) as output 0"),
        ((torch.zeros(2, 3, 4, 4),), (torch.zeros(2, 4, 4),), r"a tensor \(2, 3, 4, 4\) as output 0"),
        (({"logits": torch.zeros(2, 3)},), labels_of(0, 1), "dict of 1 as output 0"),
        (([torch.zeros(2, 3)],), labels_of(0, 1), "list of 1 as output 0"),
        (((torch.zeros(2, 3), torch.zeros(2, 3)),), labels_of(0, 1), "tuple of 2 as output 0"),
        ((None, torch.zeros(2, 3)), labels_of(0, 1), "NoneType as output 0"),
        ((np.zeros((2, 3)),), labels_of(0, 1), "ndarray as output 0"),
        ({"logits": torch.zeros(2, 3)}, labels_of(0, 1), "dict of 1 as output 0"),
        (None, labels_of(0, 1), "NoneType as output 0"),
    ],
)
@each_metric_of_outputs
def test_batch_of_another_kind_is_an_error_in_words(make_metric, outputs, target, given):
    metric = make_metric()
    needed = "scores (B, C)" if isinstance(metric, AccumulatedAccuracyMetric) else "embeddings (B, D)"
    with torch.no_grad(), pytest.raises(ValueError, match=given) as error:
        metric(outputs, target, None)
    assert f"{metric.name()} needs {needed} and labels (B,), got " in str(error.value)


@each_metric_of_outputs
def test_bare_tensors_are_taken_as_tuples_of_one(make_metric):
    x, labels = overlapping_classes()
    values = []
    for batch in ((torch.cat((x, x), dim=1), labels), ((torch.cat((x, x), dim=1),), [labels])):
        metric = make_metric()
        with torch.no_grad():
            metric(*batch, None)
        values.append(metric.value())
    assert values[0] == values[1]


@each_metric_of_outputs
def test_target_of_several_parts_is_picked_from_in_a_subclass(make_metric):
    x, labels = overlapping_classes()
    x = torch.cat((x, x), dim=1)

    class OfLabel(type(make_metric())):
        def __call__(self, outputs, target, loss):
            super().__call__(outputs, (target[0]["label"],), loss)

    expected = make_metric()
    metric = OfLabel(count_of) if isinstance(expected, EmbeddingMetric) else OfLabel()
    with torch.no_grad():
        expected((x,), (labels,), None)
        metric((x,), ({"label": labels, "name": ["a"] * 40},), None)
    assert metric.value() == expected.value()


@pytest.mark.parametrize("make_metric", [METRICS_OF_OUTPUTS["embeddings"], EmbeddingStatisticsMetric])
def test_pairs_of_a_siamese_network_are_no_embeddings_of_samples(make_metric):
    data = TensorDataset(torch.randn(20, 3), torch.arange(20) % 4)
    loader = DataLoader(SiameseMNIST(data), batch_size=5)

    def value_of(output):
        _, [metric] = test_epoch(
            loader, SiameseNet(nn.Linear(3, 2)), lambda a, b, y: (a - b).mean(), False, [make_metric(output)]
        )
        return metric.value()

    with pytest.raises(ValueError, match="met outputs of one shape and targets 0 and 1, as of SiameseNet's pairs"):
        value_of(0)
    assert value_of(-2)  # taken at one's word


def test_batches_of_classes_0_and_1_alone_are_no_pairs_if_others_follow():
    x, labels = torch.randn(30, 2), torch.arange(30) // 10  # sorted, as a folder of images is
    metrics = EmbeddingMetric(evaluate_embeddings), EmbeddingStatisticsMetric()
    with torch.no_grad():
        for rows in torch.arange(30).split(10):
            for metric in metrics:
                metric((x[rows], x[rows] + 1), (labels[rows],), None)
    assert metrics[0].value() == evaluate_embeddings(x, labels)
    assert metrics[1].value().keys() >= {"spread", "positive_distance"}


# What a metric keeps


@each_metric_of_outputs
def test_metric_keeps_no_graph_and_no_view(make_metric):
    whole = torch.randn(4, 100, requires_grad=True).clone()
    metric = make_metric()
    with torch.no_grad():
        metric((whole[:, :3],), labels_of(0, 1, 2, 0), None)
    value = metric.value()
    metric(((whole * 2)[:, :3],), labels_of(0, 1, 2, 0), None)  # training

    kept = tensors_in(vars(metric))
    assert kept
    for tensor in kept:
        assert not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if isinstance(metric, EmbeddingMetric):
        assert metric.value() == value


def test_count_of_a_loss_is_kept_without_its_graph():
    metric = AverageNonzeroTripletsMetric()
    metric((), None, counted(torch.tensor(3.0, requires_grad=True) * 2))
    assert not metric.count.requires_grad
    assert metric.value() == 6


def test_embeddings_are_kept_as_they_were_at_the_batch():
    x, labels = overlapping_classes()
    static, static_labels = torch.empty(10, 3), torch.empty(10, dtype=torch.int64)  # overwritten, as by CUDA graphs
    metric = EmbeddingMetric(evaluate_embeddings)
    with torch.no_grad():
        for rows in torch.arange(40).split(10):
            metric((static.copy_(x[rows]),), (static_labels.copy_(labels[rows]),), None)
    assert metric.value() == evaluate_embeddings(x, labels)


@each_metric_of_outputs
def test_no_batch_waits_for_the_device(make_metric):
    """Tensors without data: whatever reads one is an error."""
    metric = make_metric()
    with torch.no_grad():
        for _ in range(3):
            outputs = torch.empty(8, 4, device="meta"), torch.empty(8, 4, device="meta")
            metric(outputs, (torch.empty(8, dtype=torch.int64, device="meta"),), None)


def test_no_count_waits_for_the_device():
    metric = AverageNonzeroTripletsMetric()
    for dtype in (torch.int64, torch.float16):
        metric((), None, counted(torch.empty((), dtype=dtype, device="meta")))


@pytest.mark.gpu
def test_no_batch_waits_for_the_gpu():
    x, labels = torch.randn(40, 6, device="cuda"), torch.arange(40, device="cuda") % 5
    count = torch.tensor(7, device="cuda")
    metrics = [make() for make in METRICS_OF_OUTPUTS.values()] + [AverageNonzeroTripletsMetric()]
    of_pairs, of_triplets = [PairAccuracyMetric(), PairAccuracyMetric(1.0)], PairAccuracyMetric()
    mode = torch.cuda.get_sync_debug_mode()
    for repeat in range(2):  # the first loads kernels
        torch.cuda.set_sync_debug_mode(("default", "error")[repeat])
        try:
            with torch.no_grad():
                for metric in metrics:
                    metric((x, x), (labels,), counted(count))
                for metric in of_pairs:
                    metric((x, x + 1), (labels > 2,), None)
                of_triplets((x, x, x + 1), None, None)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    assert metrics[1].value() == {"n": 80}
    assert metrics[3].value() == 7
    assert [metric.value() for metric in (*of_pairs, of_triplets)] == [60, 60, 100]


@pytest.mark.gpu
def test_values_on_the_gpu_are_those_of_the_cpu():
    x, labels = overlapping_classes()
    x = torch.cat((x, x), dim=1)
    for make in (lambda: EmbeddingMetric(evaluate_embeddings), EmbeddingStatisticsMetric, AccumulatedAccuracyMetric):
        on_gpu, on_cpu = feed(make(), x.cuda(), labels.cuda()).value(), feed(make(), x, labels).value()
        assert on_gpu == pytest.approx(on_cpu, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_outputs_give_the_values_of_their_float64(dtype):
    x, labels = overlapping_classes()
    x = (x.repeat(1, 2) + 30).to(dtype)
    for make in (AccumulatedAccuracyMetric, lambda: EmbeddingMetric(evaluate_embeddings), EmbeddingStatisticsMetric):
        assert feed(make(), x, labels).value() == feed(make(), x.double(), labels).value()


@each_metric_of_outputs
def test_metric_goes_on_outside_of_inference_mode(make_metric):
    x, labels = overlapping_classes()
    x = x.repeat(1, 2)
    metric, expected = make_metric(), make_metric()
    with torch.inference_mode():
        metric((x[:20] + 0,), (labels[:20] + 0,), None)
    with torch.no_grad():
        metric((x[20:],), (labels[20:],), None)
        expected((x[:20],), (labels[:20],), None)
        expected((x[20:],), (labels[20:],), None)
    assert metric.value() == expected.value()


@each_metric_of_outputs
def test_batch_of_no_samples_changes_nothing(make_metric):
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    empty = (torch.zeros(0, 3),), (torch.zeros(0, dtype=torch.int64),), None
    metric, expected = make_metric(), make_metric()
    with torch.no_grad():
        expected((x,), (labels,), None)
        metric(*empty)
        if isinstance(metric, AccumulatedAccuracyMetric):
            with pytest.raises(ValueError, match="before the first batch"):
                metric.value()
        else:
            assert metric.value() is None
        metric((x,), (labels,), None)
        metric(*empty)
    assert metric.value() == expected.value()


@each_metric_of_outputs
def test_metric_may_be_copied_in_the_middle_of_a_pass(make_metric):
    x, labels = overlapping_classes()
    metric = feed(make_metric(), x.repeat(1, 2), labels)
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert other.value() == metric.value()


# All embeddings of a pass


@pytest.mark.parametrize(
    "function", [evaluate_embeddings, verification, lambda x, labels: evaluate_embeddings(x, labels, ks=(3,))]
)
def test_embedding_metric_is_its_function_of_all_embeddings(function):
    x, labels = overlapping_classes()
    metric = feed(EmbeddingMetric(function), x, labels[:, None])
    values = metric.value()
    assert values == {name: value for name, value in function(x, labels).items() if name != "curve"}
    assert all(type(value) in (int, float, bool) for value in values.values())
    assert metric.value() == values


def test_embedding_metric_wants_a_function():
    for given in (None, {"a": 1}, ["map@r"], "evaluate_embeddings"):
        with pytest.raises(TypeError, match=r"such as evaluate_embeddings of evaluation.py, got \w+"):
            EmbeddingMetric(given)
    with pytest.raises(TypeError, match="function"):
        EmbeddingMetric()


def test_embedding_metric_gives_the_numbers_of_its_function_as_python_numbers():
    found = {
        "int": 1,
        "float32": np.float32(0.5),
        "int64": np.int64(3),
        "array": np.array(0.25),
        "bool": np.bool_(True),
        "tensor": torch.tensor(2.0, dtype=torch.bfloat16, requires_grad=True),
        "whole": torch.tensor(7),
        "not a number": float("nan"),
    }
    others = {"vector": torch.zeros(3), "one": np.zeros(1), "pair": (1, 2), "text": "text", "none": None, "dict": {}}
    values = feed(EmbeddingMetric(lambda x, labels: OrderedDict(found | others)), *overlapping_classes()).value()
    assert list(values) == list(found)
    assert {name: type(value) for name, value in values.items()} == {
        **dict.fromkeys(("int", "int64", "whole"), int),
        **dict.fromkeys(("float32", "array", "tensor", "not a number"), float),
        "bool": bool,
    }
    assert list(values.values())[:-1] == [1, 0.5, 3, 0.25, True, 2.0, 7]
    assert math.isnan(values["not a number"])


@pytest.mark.parametrize("returned", [0.5, None, (0.9, 0.1), [("a", 1)], torch.zeros(2)], ids=lambda x: str(type(x)))
def test_embedding_metric_whose_function_returns_no_dict_is_an_error(returned):
    metric = feed(EmbeddingMetric(lambda x, labels: returned), *overlapping_classes())
    with pytest.raises(TypeError, match="Embeddings needs a function that returns a dict, got "):
        metric.value()


def test_embedding_metric_reports_the_keys_asked_for():
    x, labels = overlapping_classes()
    for function, all_keys in ((evaluate_embeddings, ("n_queries", "map@r")), (verification, ("curve", "eer"))):
        values = function(x, labels)
        for keys in (list(values)[:1], all_keys, ()):
            expected = {key: values[key] for key in keys if key != "curve"}
            metric = feed(EmbeddingMetric(function, keys=keys), x, labels)
            assert metric.value() == expected
            assert list(metric.value()) == list(expected)


def test_embedding_metric_may_have_its_keys_from_an_iterator():
    metric = feed(EmbeddingMetric(count_of, keys=iter(["n"])), *overlapping_classes())
    assert metric.value() == metric.value() == {"n": 40}


def test_keys_that_the_function_does_not_return_are_an_error():
    metric = feed(EmbeddingMetric(count_of, keys=["n", "map@2"]), *overlapping_classes())
    with pytest.raises(ValueError, match=r"expected keys among \['n'\], which the function returned, got \['map@2'\]"):
        metric.value()
    with pytest.raises(TypeError, match=r"list of names, such as \['map@r'\], got the string 'map@r'"):
        EmbeddingMetric(count_of, keys="map@r")


def test_embedding_metric_collects_in_evaluation_only():
    x, labels = overlapping_classes()
    metric = EmbeddingMetric(evaluate_embeddings)
    assert metric.value() is None
    metric((x,), (labels,), None)
    metric(("what a training may have", x), None, None)
    assert metric.value() is None
    feed(metric, x[:30], labels[:30])
    metric((x[30:],), (labels[30:],), None)
    assert metric.value() == evaluate_embeddings(x[:30], labels[:30])
    metric.reset()
    assert metric.value() is None
    with torch.inference_mode():
        metric((x[20:],), (labels[20:],), None)
    assert metric.value() == evaluate_embeddings(x[20:], labels[20:])


def test_function_of_embedding_metric_may_train_on_them():
    def probe(x, labels):
        weights = torch.zeros(3, requires_grad=True)
        (x @ weights - labels).square().mean().backward()
        return {"gradient": weights.grad.norm()}

    x, labels = overlapping_classes()
    metric = EmbeddingMetric(probe)
    with torch.inference_mode():
        metric((x + 0,), (labels + 0,), None)
    assert metric.value()["gradient"] == pytest.approx(float((2 * labels.float() @ x / 40).norm()))


def test_labels_of_embedding_metric_may_be_any_numbers_that_its_function_takes():
    x, ages = torch.randn(10, 2), torch.rand(10)
    metric = feed(EmbeddingMetric(lambda x, labels: {"mean": labels.mean()}), x, ages)
    assert metric.value() == {"mean": float(ages.mean())}


# The same over several processes: what each has collected, in place of torch.distributed's gathering


def gathered_by(metrics, monkeypatch):
    """`gather()` in each of several metrics as if each were in a process of its own."""
    asked = []
    for metric in metrics:
        values = []
        monkeypatch.setattr(metrics_module, "_gathered", lambda value, values=values: values.append(value) or [value])
        copy.deepcopy(metric).gather()
        asked.append(values)
    for metric in metrics:
        calls = iter(zip(*asked))
        monkeypatch.setattr(metrics_module, "_gathered", lambda value, calls=calls: list(next(calls)))
        metric.gather()
    assert len({len(values) for values in asked}) == 1  # a process that gathers less often hangs the others


@pytest.mark.parametrize("n", [23, 2])
@each_metric_of_outputs
def test_metric_of_processes_is_that_of_all_samples_even_if_one_has_none(make_metric, n, monkeypatch):
    x, labels = overlapping_classes()
    x, labels = x[:n].repeat(1, 2), labels[:n] + 1
    metrics = [feed(make_metric(), x[rank::3], labels[rank::3]) for rank in range(3)]
    gathered_by(metrics, monkeypatch)
    expected = feed(make_metric(), x, labels).value()
    for metric in metrics:
        value = metric.value()
        if isinstance(metric, EmbeddingStatisticsMetric):  # distances are within batches, and these are others
            names = ("spread", "effective_rank", "norm")
            value, expected = ({name: part[name] for name in names} for part in (value, expected))
        assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("make_metric", [METRICS_OF_OUTPUTS["embeddings"], EmbeddingStatisticsMetric])
def test_metric_of_processes_without_samples_has_no_value(make_metric, monkeypatch):
    metrics = [make_metric() for _ in range(3)]
    gathered_by(metrics, monkeypatch)
    assert [metric.value() for metric in metrics] == [None] * 3


def test_embeddings_of_processes_are_in_the_order_of_the_samples(monkeypatch):
    x = torch.arange(7.0)[:, None]
    metrics = [feed(EmbeddingMetric(count_of), x[rank::3], torch.arange(7)[rank::3]) for rank in range(3)]
    gathered_by(metrics, monkeypatch)
    for metric in metrics:
        assert torch.cat(metric.labels).tolist() == list(range(7))
        assert torch.equal(torch.cat(metric.embeddings), x)


def test_nonzero_triplets_of_processes_are_those_of_all_batches(monkeypatch):
    metrics = [AverageNonzeroTripletsMetric() for _ in range(3)]
    for metric, counts in zip(metrics, ([4, 6], [torch.tensor(2)], [])):
        for count in counts:
            metric((), None, counted(count))
    gathered_by(metrics, monkeypatch)
    assert [metric.value() for metric in metrics] == [4.0] * 3


# Pairs and triplets


def pairs_of(n=40, width=3, seed=0):
    """Embeddings (n, width) of both sides, many of whose distances tie, and targets (n,)."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randint(3, (2, n, width), generator=generator).float()
    return a, b, (torch.rand(n, generator=generator) < 1 / (1 + (a - b).norm(dim=1))).long()


def naive_pair_accuracy(a, b, target, threshold):
    correct = 0
    for x, y, same in zip(a.tolist(), b.tolist(), target.reshape(-1).tolist()):
        correct += (math.dist(x, y) < threshold) == (same > 0.5)
    return 100 * correct / len(a)


def naive_best_accuracy(a, b, target):
    distances = {math.dist(x, y) for x, y in zip(a.tolist(), b.tolist())}
    return max(naive_pair_accuracy(a, b, target, d) for d in {*distances, max(distances) + 1})


def pair_accuracy(a, b, target, threshold=None, size=7):
    metric = PairAccuracyMetric(threshold)
    for part in zip(a.split(size), b.split(size), target.split(size)):
        metric(part[:2], part[2:], None)
    return metric.value()


@pytest.mark.parametrize("seed", range(5))
def test_pair_accuracy_is_that_of_loops(seed):
    pairs = pairs_of(seed=seed)
    for threshold in (0, 1, 1.5, 2.0, np.float32(2.5), 100):
        assert pair_accuracy(*pairs, threshold) == naive_pair_accuracy(*pairs, threshold)
    assert pair_accuracy(*pairs) == naive_best_accuracy(*pairs) > 50
    a, b, target = pairs
    assert pair_accuracy(b, a, 1 - target) == naive_best_accuracy(b, a, 1 - target)


@pytest.mark.parametrize("ties", [True, False])
def test_best_pair_accuracy_is_that_of_verification(ties):
    x, labels = overlapping_classes()
    x = x.round() if ties else x
    i, j = torch.triu_indices(40, 40, offset=1)
    pairs = x[i], x[j], labels[i] == labels[j]
    expected = verification(x, labels)
    assert pair_accuracy(*pairs) == pytest.approx(100 * expected["accuracy"], rel=1e-12)
    assert pair_accuracy(*pairs, expected["threshold"]) == pair_accuracy(*pairs)


def test_pairs_at_one_distance_are_accepted_together():
    a, b = torch.zeros(4, 1), torch.tensor([[1.0], [1.0], [1.0], [2.0]])
    assert pair_accuracy(a, b, torch.tensor([1, 0, 0, 0])) == 75  # none of the three
    assert pair_accuracy(a, b, torch.tensor([1, 1, 0, 1])) == 75  # all of them
    assert pair_accuracy(a[:2], b[2:], torch.tensor([0, 0])) == 100  # none
    assert pair_accuracy(a, b, torch.tensor([1, 1, 0, 0]), 1.0) == 50  # not below the threshold
    assert pair_accuracy(a, b, torch.tensor([1, 1, 0, 0]), 1.1) == 75


@pytest.mark.parametrize("target", [[1, 0, 0, 0], [1, 1, 1, 0]])
def test_pairs_of_a_collapse_are_as_accurate_as_one_answer_for_all(target):
    assert pair_accuracy(torch.ones(4, 2), torch.ones(4, 2), torch.tensor(target)) == 75


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.int64, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threshold", [None, 1.5])
def test_targets_of_pairs_are_numbers_of_any_dtype(threshold, dtype):
    a, b, target = pairs_of()
    expected = pair_accuracy(a, b, target, threshold)
    assert pair_accuracy(a, b, target.to(dtype), threshold) == expected
    assert pair_accuracy(a, b, target[:, None].to(dtype), threshold) == expected


def test_soft_targets_are_of_one_class_above_a_half():
    x = torch.zeros(4, 2)
    assert pair_accuracy(x, x, torch.tensor([0.51, 1.0, 0.5, 0.1]), 1.0) == 50
    assert pair_accuracy(x, x, torch.tensor([0.51, 1.0, 0.5, 0.9])) == 75


@pytest.mark.parametrize("value", [-1, 2, float("nan"), 1.001])
@pytest.mark.parametrize("threshold", [None, 1.5])
def test_target_of_a_pair_beyond_0_and_1_is_an_error(threshold, value):
    a, b, target = pairs_of()
    target = target.double()
    target[11] = value
    message = "Pair accuracy needs pairs with targets from 0 to 1, got 1 of 40 beyond"
    with pytest.raises(ValueError, match=message):
        pair_accuracy(a, b, target, threshold)


def test_pairs_whose_distance_is_no_number_are_never_accepted():
    a, b = torch.zeros(5, 1), torch.tensor([[1.0], [float("nan")], [float("nan")], [3.0], [float("inf")]])
    for threshold in (2.0, None):
        assert pair_accuracy(a, b, torch.tensor([1, 1, 0, 0, 0]), threshold) == 80
    for nan in (b[1:3], b[4:]):
        assert pair_accuracy(nan * 0, nan, torch.ones(len(nan))) == 0
        assert pair_accuracy(nan * 0, nan, torch.zeros(len(nan))) == 100
    metric = PairAccuracyMetric()
    metric((a, b, a + 1), None, None)
    metric((a, a + 1, b), None, None)
    assert metric.value() == 100 * 2 / 10  # the one at 3, and the one at infinity


def test_triplets_are_right_where_the_positive_is_nearer():
    anchor, positive, negative = torch.randint(3, (3, 60, 2)).float()
    metric = PairAccuracyMetric()
    for rows in torch.arange(60).split(7):
        metric((anchor[rows], positive[rows], negative[rows]), None, None)
    points = zip(anchor.tolist(), positive.tolist(), negative.tolist())
    assert metric.value() == 100 * sum(math.dist(a, p) < math.dist(a, n) for a, p, n in points) / 60


def test_triplets_of_a_collapse_are_all_wrong():
    metric = PairAccuracyMetric(threshold=0.5)
    metric([torch.ones(4, 2)] * 3, (), None)
    assert metric.value() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_pairs_and_triplets_are_compared_in_float64(dtype):
    a, b, c = (100 + torch.randn(3, 200, 4)).to(dtype)
    target = torch.arange(200) % 2
    values = []
    for embeddings in ((a, b, c), (a.double(), b.double(), c.double())):
        metric = PairAccuracyMetric()
        metric(embeddings, None, None)
        values.append((metric.value(), pair_accuracy(*embeddings[:2], target), pair_accuracy(b, c, target, 1.5)))
    assert values[0] == values[1]
    far = torch.full((2, 4), 6e4, dtype=torch.float16)  # whose differences float16 cannot hold
    assert pair_accuracy(far, -far, torch.tensor([1, 1]), 1e6) == 100


@pytest.mark.parametrize(
    ("outputs", "target", "given"),
    [
        ((torch.zeros(4, 2),), (torch.arange(4),), r"a tensor \(4, 2\) as outputs, a tensor \(4,\) as target"),
        (torch.zeros(4, 2), torch.arange(4), r"a tensor \(4, 2\) as outputs, a tensor \(4,\) as target"),
        ((torch.zeros(4, 2), torch.zeros(4, 3)), (torch.zeros(4),), r"a tensor \(4, 2\) and a tensor \(4, 3\)"),
        ((torch.zeros(4, 2), torch.zeros(1, 2)), (torch.zeros(4),), r"\(4, 2\) and a tensor \(1, 2\)"),
        ([torch.zeros(4, 2)] * 2, (torch.zeros(3),), r"a tensor \(3,\) as target"),
        ([torch.zeros(4, 2)] * 2, (torch.zeros(1, 4),), r"a tensor \(1, 4\) as target"),
        ([torch.zeros(4, 2)] * 2, ([0, 1, 0, 1],), "list of 4 as target"),
        ([torch.zeros(4, 2)] * 2, [torch.zeros(4)] * 2, r"a tensor \(4,\) and a tensor \(4,\) as target"),
        ([torch.zeros(4, 2)] * 2, None, "nothing as target"),
        ([torch.zeros(4)] * 2, (torch.zeros(4),), r"a tensor \(4,\) and a tensor \(4,\) as outputs"),
        ([(torch.zeros(4, 2), torch.zeros(4, 9))] * 2, (torch.zeros(4),), "tuple of 2 and tuple of 2 as outputs"),
        ([torch.zeros(4, 2)] * 3, (torch.zeros(4),), r"a tensor \(4,\) as target"),
        ([torch.zeros(4, 2)] * 4, None, "nothing as target"),
        ({"a": torch.zeros(4, 2)}, None, "dict of 1 as outputs"),
        ((), None, "nothing as outputs, nothing as target"),
        (None, (torch.zeros(4),), "NoneType as outputs"),
    ],
)
def test_batch_without_pairs_or_triplets_is_an_error_in_words(outputs, target, given):
    with pytest.raises(ValueError, match=given) as error:
        PairAccuracyMetric()(outputs, target, None)
    assert str(error.value).startswith("Pair accuracy got ")
    assert "give it SiameseNet's pairs, two (B, D) and a target (B,), or TripletNet's triplets" in str(error.value)


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), "0.5", True, [1.0], torch.ones(2)])
def test_threshold_of_pairs_is_none_or_a_distance(threshold):
    with pytest.raises(ValueError, match="expected threshold to be None or a distance, 0 or more, got "):
        PairAccuracyMetric(threshold)


def test_an_infinite_threshold_accepts_every_pair():  # `verification` may return it
    a, b, target = pairs_of()
    metric = PairAccuracyMetric(float("inf"))
    metric((a, b), (target,), None)
    assert metric.value() == 100 * float((target > 0.5).double().mean())


@pytest.mark.parametrize("threshold", [None, 1.5])
def test_pair_accuracy_has_no_value_before_the_first_sample(threshold):
    a, b, target = pairs_of()
    metric = PairAccuracyMetric(threshold)
    for forget in (lambda: None, metric.reset):
        forget()
        metric((a[:0], b[:0]), (target[:0],), None)
        metric((a[:0], a[:0], a[:0]), None, None)
        with pytest.raises(ValueError, match="Pair accuracy has no value before the first batch"):
            metric.value()
        metric((a, b), (target,), None)
        assert metric.value() == pair_accuracy(a, b, target, threshold)


def test_pair_accuracy_keeps_no_graph_and_only_for_the_best_threshold_the_pairs():
    a, b, target = pairs_of()
    metrics = {"best": PairAccuracyMetric(), "fixed": PairAccuracyMetric(1.0), "triplets": PairAccuracyMetric()}
    for _ in range(10):
        for name, metric in metrics.items():
            third = [] if name != "triplets" else [b + 1]
            outputs = [x.clone().requires_grad_() * 1 for x in (a, b, *third)]
            metric(outputs, None if third else (target,), None)
    kept = {name: tensors_in(vars(metric)) for name, metric in metrics.items()}
    assert not any(x.requires_grad for tensors in kept.values() for x in tensors)
    numbers = {name: sum(x.numel() for x in tensors) for name, tensors in kept.items()}
    assert numbers == {"best": 10 * 2 * 40 + 1, "fixed": 2, "triplets": 1}


@pytest.mark.parametrize("n_others", [1, 2])
@pytest.mark.parametrize("threshold", [None, 1.5])
def test_no_pair_or_triplet_waits_for_the_device(threshold, n_others):
    metric = PairAccuracyMetric(threshold)
    for _ in range(3):
        target = (torch.empty(8, dtype=torch.int64, device="meta"),) if n_others == 1 else None
        metric([torch.empty(8, 4, device="meta")] * (1 + n_others), target, None)


@pytest.mark.parametrize("threshold", [None, 1.5])
@pytest.mark.parametrize("n", [23, 2])
def test_pair_accuracy_of_processes_is_that_of_all_even_if_one_has_none(n, threshold, monkeypatch):
    a, b, target = (x[:n] for x in pairs_of())
    of_pairs, of_triplets = ([PairAccuracyMetric(threshold) for _ in range(3)] for _ in range(2))
    for rank in range(3):
        if len(a[rank::3]):
            of_pairs[rank]((a[rank::3], b[rank::3]), (target[rank::3],), None)
            of_triplets[rank]((a[rank::3], b[rank::3], a[rank::3] + 1), None, None)
    gathered_by(of_pairs, monkeypatch)
    gathered_by(of_triplets, monkeypatch)
    assert [metric.value() for metric in of_pairs] == [pair_accuracy(a, b, target, threshold)] * 3
    one = PairAccuracyMetric()
    one((a, b, a + 1), None, None)
    assert [metric.value() for metric in of_triplets] == [one.value()] * 3
    of_pairs[1]((a, b), (target + 2,), None)
    gathered_by(of_pairs, monkeypatch)
    for metric in of_pairs:
        with pytest.raises(ValueError, match=r"targets from 0 to 1, got \d+ of \d+ beyond: are these labels\?"):
            metric.value()


@pytest.mark.parametrize(
    ("wrapper", "dataset", "loss_fn"),
    [
        (SiameseNet, SiameseMNIST, lambda a, b, y: (y * (a - b).square().sum(dim=1)).mean()),
        (TripletNet, TripletMNIST, lambda a, p, n: (a - p).square().mean()),
    ],
    ids=["pairs", "triplets"],
)
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_fit_reports_pair_accuracy_of_training_and_validation(wrapper, dataset, loss_fn, amp):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(30, 5, generator=generator), torch.arange(30) % 3)
    train, validation = (DataLoader(dataset(data, train=is_train), batch_size=7) for is_train in (True, False))
    model = wrapper(nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = [PairAccuracyMetric()]
    row = fit(train, validation, model, loss_fn, optimizer, None, 2, False, 0, metrics, amp=amp)[-1]
    assert 0 < row["train_Pair accuracy"] <= 100
    batches = [[*data, *([target] if len(data) == 2 else [])] for data, target in validation]
    columns = [torch.cat(column) for column in zip(*batches)]
    with torch.no_grad(), torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
        outputs = [x.double() for x in model(*columns[: 2 if wrapper is SiameseNet else 3])]
    if wrapper is SiameseNet:
        expected = naive_best_accuracy(*outputs, columns[2])
    else:
        points = zip(*(x.tolist() for x in outputs))
        expected = 100 * sum(math.dist(a, p) < math.dist(a, n) for a, p, n in points) / 30
    assert row["val_Pair accuracy"] == pytest.approx(expected)


# In fit


class TwoHeads(nn.Module):
    """A model that returns embeddings and scores."""

    def __init__(self, n_dimensions=3, n_classes=4):
        super().__init__()
        self.body = nn.Linear(5, n_dimensions)
        self.head = nn.Linear(n_dimensions, n_classes)

    def forward(self, x):
        embeddings = self.body(x)
        return embeddings, self.head(embeddings)


def loaders():
    """Training and validation, 20 samples each, of four classes."""
    labels = torch.arange(40) % 4
    x = torch.randn(40, 5) + torch.randn(4, 5)[labels]
    return [DataLoader(TensorDataset(x[rows], labels[rows]), 7) for rows in (slice(20), slice(20, 40))]


def test_fit_reports_embedding_metrics_of_the_validation():
    train, validation = loaders()
    model = nn.Linear(5, 2)

    def loss_fn(embeddings, target):
        return (embeddings - target[:, None]).square().mean()

    metrics = [EmbeddingMetric(evaluate_embeddings), EmbeddingMetric(verification), AccumulatedAccuracyMetric()]
    metrics[2].value = lambda: 50.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = fit(train, validation, model, loss_fn, optimizer, None, 2, cuda=False, log_interval=0, metrics=metrics)
    assert len(history) == 2
    for row in history:
        assert {"val_map@r", "val_recall@1", "val_knn5", "val_n_queries", "val_auc", "val_threshold"} <= row.keys()
        assert [name for name in row if name.startswith("train_")] == ["train_loss", "train_Accuracy"]
        assert "val_curve" not in row
        assert "val_Embeddings" not in row
    embeddings, truth = extract_embeddings(validation, model)
    expected = {**evaluate_embeddings(embeddings, truth), **verification(embeddings, truth)}
    del expected["curve"]
    assert {name: history[-1][f"val_{name}"] for name in expected} == expected
    history = fit(train, None, model, loss_fn, optimizer, None, 1, cuda=False, log_interval=0, metrics=metrics[:2])
    assert not any(name.startswith("val_") for name in history[0].keys() - {"val_loss"})


@pytest.mark.parametrize("n_dimensions", [3, 4], ids=["of two widths", "of one width"])
def test_fit_has_every_metric_for_a_model_of_two_outputs(n_dimensions):
    train, validation = loaders()
    model = TwoHeads(n_dimensions)

    def loss_fn(embeddings, scores, target):
        return nn.functional.cross_entropy(scores, target) + 1e-3 * embeddings.square().mean(), 5

    metrics = [
        EmbeddingMetric(evaluate_embeddings, keys=["recall@1"]),
        EmbeddingStatisticsMetric(),
        AccumulatedAccuracyMetric(output=-1),
        AverageNonzeroTripletsMetric(),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    row = fit(train, validation, model, loss_fn, optimizer, None, 2, cuda=False, log_interval=0, metrics=metrics)[-1]
    x, labels = validation.dataset.tensors
    with torch.no_grad():
        embeddings, scores = model(x)
    assert row["val_recall@1"] == evaluate_embeddings(embeddings, labels)["recall@1"]
    assert row["val_Accuracy"] == 100 * int((scores.argmax(dim=1) == labels).sum()) / 20
    assert row["val_norm"] == pytest.approx(float(embeddings.norm(dim=1).mean()), rel=1e-5)
    assert row["val_Average nonzero triplets"] == 5


# Statistics


def batches_of_embeddings(n_batches=3, n=12, width=4, offset=0.0):
    """Embeddings (n, width) and labels (n,) of each batch."""
    return batches_of_sizes([n] * n_batches, width, offset)


def batches_of_sizes(sizes, width, offset=0.0):
    generator = torch.Generator().manual_seed(4)
    scale = 3 / (1 + torch.arange(width))
    return [
        (offset + scale * torch.randn(n, width, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def statistics_of(batches):
    metric = EmbeddingStatisticsMetric()
    for x, labels in batches:
        metric((x,), (labels,), None)
    return metric


def naive_statistics(batches):
    """By loops, over all embeddings together and over the pairs of each batch."""
    x = np.concatenate([x.double().numpy() for x, _ in batches])
    mean = x.mean(axis=0)
    variances = np.linalg.svd(x - mean, compute_uv=False) ** 2 / len(x)
    shares = [v / variances.sum() for v in variances if v > 0]
    distances = {"positive_distance": [], "negative_distance": []}
    for embeddings, labels in batches:
        for i in range(len(labels)):
            for j in range(i):
                name = "positive_distance" if labels[i] == labels[j] else "negative_distance"
                distances[name].append(math.dist(embeddings[i].tolist(), embeddings[j].tolist()))
    return {
        "spread": math.sqrt(sum(math.dist(row, mean) ** 2 for row in x) / len(x)),
        "effective_rank": math.exp(-sum(p * math.log(p) for p in shares)),
        "norm": sum(math.dist(row, np.zeros_like(row)) for row in x) / len(x),
        **{name: sum(values) / len(values) for name, values in distances.items() if values},
    }


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("width", [1, 4, 12, 40])
def test_statistics_are_those_of_loops_with_fewer_rows_than_dimensions_as_many_and_more(width, offset):
    batches = batches_of_sizes([3, 4, 5, 1, 2, 20, 5, 8, 1], width, offset)
    metric = EmbeddingStatisticsMetric()
    for n, (x, labels) in enumerate(batches, start=1):
        metric((x,), (labels,), None)
        expected = naive_statistics(batches[:n])
        assert metric.value() == metric.value() == pytest.approx(expected, rel=1e-12)


def test_statistics_of_many_rows_are_put_together_from_blocks():
    batches = batches_of_sizes([20] * 30, 620)
    assert statistics_of(batches).value() == pytest.approx(naive_statistics(batches), rel=1e-12)


def test_statistics_of_few_rows_take_no_square_of_the_dimensions(monkeypatch):
    metric, shapes, eigvalsh = statistics_of(batches_of_sizes([5, 6], 300)), [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: shapes.append(x.shape) or eigvalsh(x))
    assert metric.value()
    assert shapes == [(11, 11)]
    assert sum(x.numel() for x in tensors_in(vars(metric))) < 15 * 300


@pytest.mark.parametrize("size", [1, 7, 50])
def test_statistics_keep_at_most_twice_the_square_of_the_dimensions(size):
    metric = EmbeddingStatisticsMetric()
    for x, labels in batches_of_sizes([size] * 60, 10):
        metric((x,), (labels,), None)
        assert sum(x.numel() for x in tensors_in(vars(metric))) <= 2 * 10**2 + 30


def test_statistics_of_processes_with_rows_or_products_or_both_or_nothing(monkeypatch):
    for sizes in itertools.permutations([[4], [2, 9], [9, 3], []]):
        batches = batches_of_sizes([n for part in sizes for n in part], 6, offset=100.0)
        rest = iter(batches)
        metrics = [statistics_of([next(rest) for _ in part]) for part in sizes]
        gathered_by(metrics, monkeypatch)
        assert [metric.value() for metric in metrics] == [pytest.approx(naive_statistics(batches), rel=1e-12)] * 4


def test_statistics_of_processes_with_few_rows_each_are_put_together(monkeypatch):
    batches = batches_of_sizes([4, 4, 4], 9, offset=100.0)  # 8 rows of 9 dimensions, then 12
    for n in (2, 3):
        metrics = [statistics_of([batch]) for batch in batches[:n]]
        gathered_by(metrics, monkeypatch)
        assert [metric.value() for metric in metrics] == [pytest.approx(naive_statistics(batches[:n]), rel=1e-12)] * n


def test_statistics_of_a_collapse():
    values = statistics_of([(torch.full((6, 3), 2.0), torch.arange(6) % 2)] * 2).value()
    assert values["spread"] == values["positive_distance"] == values["negative_distance"] == 0
    assert values["effective_rank"] == 1
    assert values["norm"] == pytest.approx(12**0.5)


def test_statistics_count_the_dimensions_in_use():
    x = torch.cat((torch.eye(5), -torch.eye(5)))
    labels = torch.arange(10)
    assert statistics_of([(x, labels)]).value()["effective_rank"] == pytest.approx(5)
    assert statistics_of([(x * torch.tensor([1.0, 1, 0, 0, 0]), labels)]).value()["effective_rank"] == pytest.approx(2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [0, 1])
def test_statistics_of_embeddings_that_are_not_finite_are_nan(value, batch):
    batches = batches_of_embeddings()
    batches[batch][0][3, 1] = value
    values = statistics_of(batches).value()
    assert math.isnan(values["spread"])
    assert math.isnan(values["effective_rank"])
    assert not math.isfinite(values["norm"])


def test_statistics_without_pairs_or_batches():
    metric = statistics_of([(torch.rand(1, 3), torch.tensor([0]))])
    assert metric.value().keys() == {"spread", "effective_rank", "norm"}
    metric.reset()
    assert metric.value() is None


def test_accuracy_of_a_negative_label_is_an_error():
    accuracy = AccumulatedAccuracyMetric()
    accuracy((torch.eye(3),), (torch.tensor([0, -1, 2]),), None)
    with pytest.raises(ValueError, match="Accuracy met label -1"):
        accuracy.value()
