"""Tests of trainer.py, on models and data small enough to work out each number by hand."""

import inspect
import math
import re
import sys
from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim import SGD
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from datasets import SiameseDataset, TripletDataset
from evaluation import evaluate_embeddings
from losses import ContrastiveLoss, OnlineContrastiveLoss, OnlineTripletLoss, TripletLoss
from metrics import AccumulatedAccuracyMetric, AverageNonzeroTripletsMetric, EmbeddingMetric, Metric
from networks import ClassificationNet, SiameseNet, TripletNet
from trainer import extract_embeddings, fit, test_epoch, train_epoch
from utils import (
    AllTripletSelector,
    BatchHardTripletSelector,
    HardNegativePairSelector,
    SemihardNegativeTripletSelector,
)

HISTORY_KEYS = ["epoch", "lr", "train_loss", "val_loss", "seconds"]


class Scale(nn.Module):
    """Multiplies each input by one weight, which starts at 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, *inputs):
        outputs = tuple(x * self.weight for x in inputs)
        return outputs if len(outputs) > 1 else outputs[0]


class Recorder(Metric):
    """Keeps what it is called with in a pass; the value is how often that was."""

    def __init__(self):
        self.passes = []

    def __call__(self, outputs, target, loss):
        self.passes[-1].append((outputs, target, loss))

    def reset(self):
        self.passes.append([])

    def value(self):
        return len(self.passes[-1])

    def name(self):
        return "Calls"


def mean_output(*outputs):
    """A loss without target."""
    return torch.stack([output.mean() for output in outputs]).mean()


def batches(*values):
    """A loader without targets: one batch for each list of values."""
    return [(torch.tensor(x, dtype=torch.float32), []) for x in values]


def fit_scale(train_loader, val_loader=None, loss_fn=mean_output, *, model=None, lr=0.0, n_epochs=1, **options):
    """The history of `fit` on a Scale, and the model."""
    model = model or Scale()
    given = {"scheduler": None, "cuda": False, "log_interval": 0, **options}
    return fit(train_loader, val_loader, model, loss_fn, SGD(model.parameters(), lr), n_epochs=n_epochs, **given), model


def clusters(n=120):
    """Three classes of points in the plane, which overlap a little."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    return TensorDataset(centres[labels] + 0.3 * torch.randn(n, 2, generator=generator), labels)


def dense_net():
    return nn.Sequential(nn.Linear(2, 8), nn.PReLU(), nn.Linear(8, 2))


# --- what fit trains


@pytest.mark.parametrize(
    ("wrap_net", "wrap_data", "loss_fn", "metrics"),
    [
        (lambda net: ClassificationNet(net, 3), None, nn.NLLLoss(), [AccumulatedAccuracyMetric()]),
        (SiameseNet, SiameseDataset, ContrastiveLoss(1.0), []),
        (TripletNet, TripletDataset, TripletLoss(1.0), []),
        (None, None, OnlineContrastiveLoss(1.0, HardNegativePairSelector()), []),
        (None, None, OnlineTripletLoss(1.0, SemihardNegativeTripletSelector(1.0)), [AverageNonzeroTripletsMetric()]),
    ],
    ids=["classes", "pairs", "triplets", "online pairs", "online triplets"],
)
def test_fit_trains_any_kind_of_model(wrap_net, wrap_data, loss_fn, metrics):
    torch.manual_seed(0)
    model = wrap_net(dense_net()) if wrap_net else dense_net()
    data = wrap_data(clusters()) if wrap_data else clusters()
    train_loader, val_loader = DataLoader(data, batch_size=30, shuffle=True), DataLoader(data, batch_size=30)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    # All by position, as code for the original may give them.
    history = fit(train_loader, val_loader, model, loss_fn, optimizer, StepLR(optimizer, 8), 10, False, 50, metrics, 0)
    if metrics and isinstance(metrics[0], AverageNonzeroTripletsMetric):
        name = "Average nonzero triplets"
        assert history[-1][f"train_{name}"] < 0.7 * history[0][f"train_{name}"]
        assert history[-1][f"val_{name}"] < 0.7 * history[0][f"val_{name}"]
    else:
        assert history[-1]["train_loss"] < 0.7 * history[0]["train_loss"]
        assert history[-1]["val_loss"] < 0.8 * history[0]["val_loss"]


def test_history_holds_a_row_for_each_epoch():
    history, _ = fit_scale(batches([1, 2], [3]), batches([4]), n_epochs=3, lr=0.5, metrics=[Recorder()], start_epoch=1)
    assert [row["epoch"] for row in history] == [2, 3]
    for row in history:
        assert list(row) == ["epoch", "lr", "train_loss", "train_Calls", "val_loss", "val_Calls", "seconds"]
        assert (type(row["epoch"]), type(row["train_loss"]), type(row["val_loss"])) == (int, float, float)
        assert (row["lr"], row["train_Calls"], row["val_Calls"]) == (0.5, 2, 1)
        assert row["seconds"] >= 0


def test_history_without_validation_has_no_validation_loss():
    history, _ = fit_scale(batches([1, 2]), None, metrics=[Recorder()])
    assert set(history[0]) == {*HISTORY_KEYS, "train_Calls"}
    assert history[0]["val_loss"] is None


def test_each_step_takes_its_own_gradient():
    _, model = fit_scale(batches([1.0], [3.0]), batches([100.0]), lr=0.1)
    assert model.weight.item() == pytest.approx(1 - 0.1 * 1 - 0.1 * 3)


def test_train_and_test_epoch_return_loss_and_metrics():
    model, metrics = Scale(), [Recorder()]
    result = train_epoch(batches([1], [2]), model, mean_output, SGD(model.parameters(), 0.5), False, 10, metrics)
    assert result == (pytest.approx((1 * 1 + 2 * 0.5) / 2), metrics)
    assert type(result[0]) is float
    assert model.weight.item() == -0.5
    result = test_epoch(batches([1], [2], [6]), model, mean_output, False, metrics)
    assert result == (pytest.approx(-0.5 * 3), metrics)
    assert model.weight.item() == -0.5
    assert [len(calls) for calls in metrics[0].passes] == [2, 3]


def test_modes_and_gradients_are_those_of_training_and_validation():
    class Observer(Scale):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    seen = []
    fit_scale(batches([1], [2]), batches([3]), model=Observer(), n_epochs=2)
    assert seen == [(True, True), (True, True), (False, False)] * 2


# --- scheduler


def test_step_lr_acts_after_the_epoch():
    model = Scale()
    optimizer = SGD(model.parameters(), lr=1.0)
    trained_at = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: trained_at.append(optimizer.param_groups[0]["lr"]))
    scheduler = StepLR(optimizer, 8, gamma=0.1)
    history = fit(batches([1e-3]), None, model, mean_output, optimizer, scheduler, 20, False, 10)
    expected = [1.0] * 8 + [0.1] * 8 + [0.01] * 4
    assert trained_at == pytest.approx(expected)
    assert [row["lr"] for row in history] == pytest.approx(expected)


def test_start_epoch_brings_a_new_scheduler_forward():
    model = Scale()
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, 8, gamma=0.1)
    history = fit(batches([1]), None, model, mean_output, optimizer, scheduler, 20, False, 10, start_epoch=8)
    assert [row["epoch"] for row in history] == list(range(9, 21))
    assert [row["lr"] for row in history] == pytest.approx([0.1] * 8 + [0.01] * 4)


def test_resumed_training_equals_training_in_one_go():
    def start():
        model = Scale()
        optimizer = SGD(model.parameters(), lr=0.5, momentum=0.9)
        return {"model": model, "optimizer": optimizer, "scheduler": StepLR(optimizer, 3, gamma=0.1)}

    def run(parts, n_epochs, start_epoch=0):
        return fit(
            batches([1, 2], [3]), None, loss_fn=lambda out: (out - 7).square().mean(), n_epochs=n_epochs, cuda=False,
            log_interval=10, start_epoch=start_epoch, **parts,
        )  # fmt: skip

    whole, first, second = start(), start(), start()
    history = run(whole, 8)
    rows = run(first, 4)
    for name, part in second.items():
        part.load_state_dict(first[name].state_dict())
    rows += run(second, 8, start_epoch=4)
    for row, expected in zip(rows, history):
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}
    assert torch.equal(second["model"].weight, whole["model"].weight)


def test_no_scheduler_keeps_the_rate():
    history, _ = fit_scale(batches([1]), n_epochs=3, lr=0.25, scheduler=None)
    assert [row["lr"] for row in history] == [0.25] * 3


@pytest.mark.parametrize("val_loader", [batches([3]), None], ids=["validation", "no validation"])
def test_plateau_scheduler_gets_the_loss(val_loader):
    class Recording(ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(metrics)
            super().step(metrics)

    seen = []
    model = Scale()
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = Recording(optimizer, patience=0, factor=0.5, mode="max")  # the loss falls, so no epoch is a better one
    history = fit(batches([1]), val_loader, model, mean_output, optimizer, scheduler, 4, False, 10)
    assert seen == [row["val_loss" if val_loader else "train_loss"] for row in history]
    assert [row["lr"] for row in history] == pytest.approx([0.1, 0.1, 0.05, 0.025])


# --- averages


def test_losses_are_averaged_over_samples():
    loader = batches([1, 3], [5, 7], [100])
    history, _ = fit_scale(loader, batches([2], [5, 5, 5]))
    assert history[0]["train_loss"] == pytest.approx((1 + 3 + 5 + 7 + 100) / 5)
    assert history[0]["val_loss"] == pytest.approx((2 + 3 * 5) / 4)


def test_a_pair_is_one_sample():
    pairs = [((torch.tensor(x), torch.tensor(y)), []) for x, y in [([1.0, 2.0], [3.0, 4.0]), ([5.0], [7.0])]]
    assert test_epoch(pairs, Scale(), mean_output, False, [])[0] == pytest.approx((2.5 * 2 + 6) / 3)


@pytest.mark.parametrize(
    "count", [int, torch.tensor, lambda n: torch.tensor([n])], ids=["int", "tensor", "tensor of one"]
)
def test_losses_are_averaged_over_samples_whatever_the_count_of_triplets(count):
    def loss_fn(outputs):
        return outputs.mean(), count(len(outputs) - 1)

    history, _ = fit_scale(batches([1, 1, 1, 1], [4, 4], [9]), batches([2, 2], [5, 5, 5]), loss_fn)
    assert history[0]["train_loss"] == pytest.approx((4 * 1 + 2 * 4 + 1 * 9) / 7)
    assert history[0]["val_loss"] == pytest.approx((2 * 2 + 3 * 5) / 5)


def test_no_active_triplet_gives_zero():
    def loss_fn(outputs):
        return 0 * outputs.sum(), torch.tensor(0)

    assert test_epoch(batches([1, 2]), Scale(), loss_fn, False, [])[0] == 0.0


def test_loss_of_shape_1_is_a_number():
    def loss_fn(outputs):
        return outputs.mean().reshape(1)

    assert test_epoch(batches([1, 1, 1], [5]), Scale(), loss_fn, False, [])[0] == pytest.approx(2)
    with pytest.raises(FloatingPointError, match="batch 2"):
        test_epoch(batches([1], [math.nan]), Scale(), loss_fn, False, [])


@pytest.mark.parametrize(
    ("train_loader", "val_loader", "name"), [([], None, "train"), (batches([1]), [], "validation")]
)
def test_empty_loader_is_named(train_loader, val_loader, name):
    with pytest.raises(ValueError, match=f"(?i){name}.*loader is empty"):
        fit_scale(train_loader, val_loader)


# --- what a batch may hold


def test_list_that_a_model_returns_is_not_changed():
    class Lister(Scale):
        def forward(self, x):
            self.returned = [x * self.weight, x + 1]
            return self.returned

    def loss_fn(scaled, raised, target):
        return (scaled + raised - target).mean()

    metric = Recorder()
    loader = [(torch.ones(2), torch.zeros(2))]
    _, model = fit_scale(loader, loader, loss_fn, model=Lister(), metrics=[metric])
    assert len(model.returned) == 2
    assert type(metric.passes[0][0][0]) is tuple


@pytest.mark.parametrize(
    "target",
    [torch.tensor(2.0), 2.0, (torch.tensor(1.0), torch.tensor([2.0])), {"low": torch.tensor(1.0), "high": 2.0}],
    ids=["0-dim", "number", "tuple", "dict"],
)
@pytest.mark.parametrize("cuda", [False, "cpu"])
def test_target_of_any_kind_reaches_loss_and_metric(target, cuda):
    def loss_fn(outputs, got):
        if isinstance(target, tuple):
            low, high = got
            return outputs.mean() * low * high[0]
        if isinstance(target, dict):
            return outputs.mean() * got["low"] * got["high"]
        return outputs.mean() * got

    metric = Recorder()
    loader = [(torch.tensor([3.0]), target)]
    history, _ = fit_scale(loader, loader, loss_fn, metrics=[metric], cuda=cuda)
    assert (history[0]["train_loss"], history[0]["val_loss"]) == (6.0, 6.0)
    (got,) = metric.passes[0][0][1]
    assert got == target or list(got) == list(target)


@pytest.mark.parametrize("cuda", [False, "cpu"])
def test_dict_of_inputs_goes_by_keyword(cuda):
    class Named(Scale):
        def forward(self, *, left, right):
            return (left - right) * self.weight

    loader = [({"right": torch.tensor([1.0, 2.0]), "left": torch.tensor([4.0, 7.0])}, [])]
    history, _ = fit_scale(loader, loader, model=Named(), cuda=cuda)
    assert history[0]["train_loss"] == history[0]["val_loss"] == 4.0


@pytest.mark.parametrize("data_type", [tuple, list])
def test_inputs_and_targets_come_in_order(data_type):
    def loss_fn(first, second, target):
        return (first - 10 * second + 100 * target).mean()

    loader = [(data_type([torch.tensor([1.0]), torch.tensor([2.0])]), torch.tensor([3.0]))]
    assert test_epoch(loader, Scale(), loss_fn, False, [])[0] == 281.0


@pytest.mark.parametrize("data_type", [tuple, lambda inputs: dict(zip(("names", "x"), inputs))], ids=["tuple", "dict"])
def test_inputs_need_not_all_be_tensors(data_type):
    class Selective(Scale):
        def forward(self, names, x):
            return x * self.weight

    loader = [(data_type([[object() for _ in x], torch.tensor(x)]), []) for x in ([1.0, 1.0, 1.0], [5.0])]
    assert test_epoch(loader, Selective(), mean_output, False, [])[0] == pytest.approx(2)


def test_inputs_may_be_nested():
    class Nested(Scale):
        def forward(self, left, right):
            return (left["x"] - right[0]) * self.weight

    loader = [(({"x": torch.tensor(x)}, [torch.zeros(len(x))]), []) for x in ([1.0, 1.0, 1.0], [5.0])]
    assert test_epoch(loader, Nested(), mean_output, False, [])[0] == pytest.approx(2)  # weighed by samples: D45


def test_inputs_without_a_tensor_count_as_one():
    class Lookup(Scale):
        def forward(self, name):
            return {"low": 1.0, "high": 3.0}[name] * self.weight

    loader = [({"name": "low"}, []), ({"name": "high"}, [])]
    assert test_epoch(loader, Lookup(), lambda output: output, False, [])[0] == 2.0


@pytest.mark.parametrize("empty", [[], (), None])
def test_empty_target_is_left_out(empty):
    metric = Recorder()
    fit_scale([(torch.ones(2), empty)], metrics=[metric])
    ((outputs, target, loss),) = metric.passes[0]
    assert target is None
    assert [output.tolist() for output in outputs] == [[1, 1]]
    assert loss == 1


@pytest.mark.parametrize(
    ("batch", "what"), [(torch.ones(2), "Tensor"), ((torch.ones(2),), "of 1"), ((torch.ones(2),) * 3, "of 3")]
)
def test_batch_that_is_not_data_and_target_is_an_error(batch, what):
    with pytest.raises(ValueError, match=rf"expected batches \(data, target\), got .*{what}"):
        fit_scale([batch])


def test_loader_need_have_no_length(capsys):
    class Stream:
        def __iter__(self):
            yield from batches([1], [3])

    history, _ = fit_scale(Stream(), Stream(), n_epochs=2, log_interval=1)
    assert [row["train_loss"] for row in history] == [2, 2]
    assert [row["val_loss"] for row in history] == [2, 2]
    assert len(re.findall(r"batch [12], loss", capsys.readouterr().out)) == 4


# --- mode, errors, device


@pytest.mark.parametrize("mode", [True, False])
def test_mode_of_the_model_is_restored(mode):
    model = Scale().train(mode)
    fit_scale(batches([1]), batches([1]), model=model)
    assert model.training is mode
    test_epoch(batches([1]), model, mean_output, False, [])
    assert model.training is mode
    extract_embeddings([(torch.ones(2), torch.ones(2))], model)
    assert model.training is mode


@pytest.mark.parametrize("mode", [True, False])
def test_mode_of_the_model_is_restored_after_an_error(mode):
    def fail(*args):
        raise KeyError("broken")

    model = Scale().train(mode)
    with pytest.raises(KeyError, match="broken"):
        fit_scale(batches([1]), batches([1]), fail, model=model)
    assert model.training is mode
    with pytest.raises(KeyError, match="broken"):
        test_epoch(batches([1]), model, fail, False, [])
    assert model.training is mode
    model.get_embedding = fail
    with pytest.raises(KeyError, match="broken"):
        extract_embeddings([(torch.ones(2), torch.ones(2))], model)
    assert model.training is mode


def test_mode_of_a_frozen_part_survives_an_evaluation():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    model[1].eval()
    extract_embeddings([(torch.rand(3, 2), torch.ones(3))], model)
    assert [module.training for module in model.modules()] == [True, True, False]
    test_epoch([(torch.rand(3, 2), [])], model, mean_output, False, [])
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_stops_before_the_step(value):
    def loss_fn(outputs):
        calls.append(1)
        return outputs.mean() * (value if len(calls) == 5 else 1)

    calls = []
    model = Scale()
    with pytest.raises(FloatingPointError, match=rf"Epoch 2/4 train.*{value} in batch 2"):
        fit_scale(batches([1], [2], [4]), None, loss_fn, model=model, lr=0.1, n_epochs=4)
    assert model.weight.item() == pytest.approx(1 - 0.1 * (1 + 2 + 4) - 0.1 * 1)
    assert len(calls) == 5


def test_validation_loss_that_is_not_finite_is_named():
    with pytest.raises(FloatingPointError, match=r"Epoch 1/1 validation.*nan in batch 3"):
        fit_scale(batches([1]), batches([1], [2], [math.nan]))


@pytest.mark.parametrize("cuda", [False, None, "cpu", torch.device("cpu")], ids=repr)
def test_cuda_takes_a_device(cuda):
    history, model = fit_scale(batches([1, 2]), batches([4]), cuda=cuda)
    assert (history[0]["train_loss"], history[0]["val_loss"]) == (1.5, 4.0)
    assert model.weight.device.type == "cpu"


def test_model_and_batches_are_moved_to_the_device():
    class Observer(Scale):
        def forward(self, x, y):
            devices.update(tensor.device.type for tensor in (x, y, self.weight))
            raise KeyError("seen")

    devices = set()
    with pytest.raises(KeyError, match="seen"):
        test_epoch([((torch.ones(2), torch.ones(2)), [])], Observer(), mean_output, "meta", [])
    assert devices == {"meta"}


def test_cuda_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda=True, but torch sees no GPU"):
        fit_scale(batches([1]), cuda=True)


@pytest.mark.gpu
def test_fit_on_the_gpu_equals_the_cpu():
    results = []
    for cuda in (False, True):
        torch.manual_seed(0)
        model = ClassificationNet(dense_net(), 3)
        optimizer = SGD(model.parameters(), lr=0.1)
        loader, metric = DataLoader(clusters(), batch_size=30), AccumulatedAccuracyMetric()
        history = fit(loader, loader, model, nn.NLLLoss(), optimizer, None, 3, cuda, 2, metrics=[metric])
        embeddings, _ = extract_embeddings(loader, model)
        assert next(model.parameters()).is_cuda == cuda
        assert not embeddings.is_cuda
        results.append(history)
    for row, expected in zip(*results):
        for key in ("train_loss", "val_loss", "train_Accuracy", "val_Accuracy"):
            assert row[key] == pytest.approx(expected[key], rel=0.02)


# --- metrics and log lines


def test_metrics_get_tuples_and_are_reset_for_each_pass():
    def loss_fn(first, second, target):
        return (first * second * target).mean(), torch.tensor(4)

    metric = Recorder()
    x, y, target = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    fit_scale([((x, y), target)] * 2, [((x, y), target)], loss_fn, metrics=[metric], n_epochs=2)
    assert [len(calls) for calls in metric.passes] == [2, 1, 2, 1]
    for outputs, got_target, loss in (call for calls in metric.passes for call in calls):
        assert (type(outputs), type(got_target)) == (tuple, tuple)
        assert [output.tolist() for output in outputs] == [[1], [2]]
        assert [t.tolist() for t in got_target] == [[3]]
        assert (float(loss[0].detach()), int(loss[1])) == (6, 4)


def test_default_list_of_metrics_stays_empty():
    fit_scale(batches([1]), batches([1]))
    assert inspect.signature(fit).parameters["metrics"].default == []


@pytest.mark.parametrize("value", ["good", [1, 2], torch.tensor([0.25, 0.5]), torch.tensor(3)], ids=repr)
def test_metric_whose_value_is_no_number_is_reported(value):
    metric = Recorder()
    metric.value = lambda: value
    history, _ = fit_scale(batches([1]), batches([1]), metrics=[metric])
    assert history[0]["train_Calls"] is value
    assert history[0]["val_Calls"] is value


def test_a_line_is_printed_every_log_interval(capsys):
    fit_scale(batches([1], [3], [5], [9], [100]), batches([1]) * 4, log_interval=2)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 3
    assert re.search(r"Epoch 1/1.*batch 2 of 5, loss 2\.0", lines[0])
    assert re.search(r"Epoch 1/1.*batch 4 of 5, loss 7\.0", lines[1])  # of the batches since the last line
    assert printed.err == ""


def test_a_line_is_printed_for_each_epoch(capsys):
    fit_scale(batches([1], [3]), batches([8]), n_epochs=2, log_interval=3, metrics=[Recorder()])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for number, line in enumerate(lines, start=1):
        assert re.search(rf"Epoch {number}/2.*loss 2 / 8, Calls 2 / 1 ", line)


def test_terminal_gets_a_bar_unless_it_is_switched_off(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fit_scale(batches([1], [2]), log_interval=1)
    printed = capsys.readouterr()
    assert "Epoch 1/1 train" in printed.err
    assert "batch" not in printed.out
    monkeypatch.setenv("TQDM_DISABLE", "1")
    fit_scale(batches([1], [2]), log_interval=1)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "batch 2 of 2" in printed.out


# --- extract_embeddings


def test_embeddings_and_labels_come_in_the_order_of_the_loader():
    data = clusters(50)
    net = dense_net()
    embeddings, labels = extract_embeddings(DataLoader(data, batch_size=16), net)
    points, expected_labels = data.tensors
    torch.testing.assert_close(embeddings, net(points).detach())
    assert torch.equal(labels, expected_labels)
    assert not embeddings.requires_grad


def test_embeddings_are_those_of_get_embedding_in_evaluation_mode():
    net = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    model = ClassificationNet(net, 3, embedding_dim=6)
    data = clusters(40)
    embeddings, _ = extract_embeddings(DataLoader(data, batch_size=16), model, device="cpu")
    assert net[1].num_batches_tracked == 0
    torch.testing.assert_close(embeddings, model.eval().get_embedding(data.tensors[0]).detach())


def test_embeddings_of_a_model_without_parameters():
    embeddings, labels = extract_embeddings([(torch.ones(2, 12), torch.ones(2))], nn.Flatten())
    assert (embeddings.shape, labels.shape) == ((2, 12), (2,))


@pytest.mark.parametrize("wrapper", [SiameseDataset, TripletDataset])
def test_embeddings_of_pairs_are_an_error(wrapper):
    with pytest.raises(TypeError, match=r"does not take the [23] input\(s\) of a batch .*SiameseNet wants pairs"):
        extract_embeddings(DataLoader(wrapper(clusters()), batch_size=8), dense_net())


def test_embeddings_of_an_empty_loader_are_an_error():
    with pytest.raises(ValueError, match="loader is empty"):
        extract_embeddings([], dense_net())


def test_flag_that_passes_for_true_asks_for_the_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="no GPU"):
        test_epoch([(torch.ones(2), [])], Scale(), mean_output, 1, [])


# --- metrics of several values, and of none


class Reporter(Recorder):
    """Reports what it is told, a value for each pass in turn."""

    def __init__(self, *values):
        super().__init__()
        self.values = values

    def value(self):
        return self.values[(len(self.passes) - 1) % len(self.values)]


def epoch_line(capsys):
    (line,) = capsys.readouterr().out.splitlines()
    return line


def test_metric_of_several_values_has_an_entry_for_each(capsys):
    metric = Reporter({"low": 0.25, "high": 2}, {"low": 0.5, "high": 3})
    history, _ = fit_scale(batches([1]), batches([4]), metrics=[metric])
    expected = ["epoch", "lr", "train_loss", "train_low", "train_high", "val_loss", "val_low", "val_high", "seconds"]
    assert list(history[0]) == expected
    assert (history[0]["train_low"], history[0]["val_low"]) == (0.25, 0.5)
    assert (history[0]["train_high"], history[0]["val_high"]) == (2, 3)
    assert (history[0]["train_loss"], history[0]["val_loss"]) == (1, 4)
    assert "validation: loss 1 / 4, low 0.25 / 0.5, high 2 / 3 (" in epoch_line(capsys)


def test_metric_of_several_values_without_validation(capsys):
    history, _ = fit_scale(batches([1]), metrics=[Reporter({"low": 0.25})])
    assert set(history[0]) == {*HISTORY_KEYS, "train_low"}
    assert "validation: loss 1, low 0.25 (" in epoch_line(capsys)


@pytest.mark.parametrize("nothing", [None, {}, {"low": None}], ids=repr)
def test_metric_without_a_value_has_no_entry(capsys, nothing):
    history, _ = fit_scale(batches([1]), batches([4]), metrics=[Reporter(nothing), Recorder()])
    assert set(history[0]) == {*HISTORY_KEYS, "train_Calls", "val_Calls"}
    assert "validation: loss 1 / 4, Calls 1 / 1 (" in epoch_line(capsys)


def test_zero_and_false_are_values(capsys):
    metrics = [Reporter({"none": 0, "share": 0.0, "flag": False})]
    history, _ = fit_scale(batches([1]), batches([4]), metrics=metrics)
    assert (history[0]["train_none"], history[0]["val_share"], history[0]["val_flag"]) == (0, 0.0, False)
    assert "none 0 / 0, share 0 / 0, flag 0 / 0 (" in epoch_line(capsys)


def test_metric_of_the_validation_alone_is_printed(capsys):
    metrics = [Reporter(None, {"recall@1": 0.5, "train_val": 0.75}), Reporter(None, 8)]
    history, _ = fit_scale(batches([1]), batches([4]), metrics=metrics)
    assert set(history[0]) == {*HISTORY_KEYS, "val_recall@1", "val_train_val", "val_Calls"}
    assert "validation: loss 1 / 4, recall@1 0.5, train_val 0.75, Calls 8 (" in epoch_line(capsys)


def test_metric_of_the_training_alone_is_printed(capsys):
    history, _ = fit_scale(batches([1]), batches([4]), metrics=[Reporter({"low": 0.25, "high": 1}, {"high": 2})])
    assert set(history[0]) == {*HISTORY_KEYS, "train_low", "train_high", "val_high"}
    assert "validation: loss 1 / 4, low 0.25, high 1 / 2 (" in epoch_line(capsys)


def test_numbers_and_several_values_stand_side_by_side(capsys):
    metrics = [Recorder(), Reporter({"low": 0.25}), Reporter({"high": "good"})]
    history, _ = fit_scale(batches([1], [1]), batches([4]), metrics=metrics, n_epochs=2)
    for row in history:
        assert (row["train_Calls"], row["train_low"], row["train_high"]) == (2, 0.25, "good")
        assert (row["val_Calls"], row["val_low"], row["val_high"]) == (1, 0.25, "good")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("loss 1 / 4, Calls 2 / 1, low 0.25 / 0.25, high good / good (" in line for line in lines)


def test_history_keeps_the_values_of_a_dict_that_changes():
    shared = {}

    class Counting(Recorder):
        def value(self):
            shared["passes"] = len(self.passes)
            return shared

    history, _ = fit_scale(batches([1]), batches([4]), metrics=[Counting()], n_epochs=2)
    assert [(row["train_passes"], row["val_passes"]) for row in history] == [(1, 2), (3, 4)]


def test_embedding_metric_fills_the_history_of_a_validation(capsys):
    net, loss_fn = dense_net(), OnlineTripletLoss(1.0, SemihardNegativeTripletSelector(1.0))
    loader, optimizer = DataLoader(clusters(60), batch_size=30), SGD(net.parameters(), lr=0.01)
    metrics = [EmbeddingMetric(evaluate_embeddings)]
    history = fit(loader, loader, net, loss_fn, optimizer, None, 1, False, 0, metrics=metrics)
    assert 0.3 < history[0]["val_recall@1"] <= 1
    assert not any(key.startswith("train_") for key in history[0] if key != "train_loss")
    assert f"recall@1 {history[0]['val_recall@1']:.4g}," in epoch_line(capsys)


# --- averages, resuming and inputs of other kinds


@pytest.mark.parametrize("selector", [AllTripletSelector(), BatchHardTripletSelector()])
def test_mean_over_selected_triplets_is_that_of_the_batches(selector):
    labels = torch.arange(4).repeat_interleave(4)
    easy = 5.0 * torch.eye(4).repeat_interleave(4, dim=0)
    batches = [(easy, labels)] * 9 + [(easy + 1.6 * torch.randn(16, 4), labels)]
    loss_fn = OnlineTripletLoss(1.0, selector)
    values = [float(loss_fn(*batch)[0]) for batch in batches]
    assert values[0] == 0 < values[-1]
    average, _ = test_epoch(batches, nn.Identity(), loss_fn, False, [])
    assert average == pytest.approx(sum(values) / 10)


@pytest.mark.parametrize("make", [lambda o: StepLR(o, 2, 0.1), lambda o: CosineAnnealingLR(o, 6)])
def test_new_scheduler_of_a_restored_optimizer_goes_on_at_its_rate(make):
    def rates(optimizer, n_epochs, start_epoch=0):
        options = {"n_epochs": n_epochs, "cuda": False, "log_interval": 50, "start_epoch": start_epoch}
        loader = [(torch.ones(2, 1), [])]
        history = fit(loader, None, model, lambda x: x.mean(), optimizer, make(optimizer), **options)
        return [row["lr"] for row in history]

    model = nn.Linear(1, 1)
    whole = rates(SGD(model.parameters(), lr=1.0), 6)
    first, second = SGD(model.parameters(), lr=1.0), SGD(model.parameters(), lr=1.0)
    assert rates(first, 3) == whole[:3]
    second.load_state_dict(first.state_dict())
    assert rates(second, 6, start_epoch=3) == pytest.approx(whole[3:])


def test_start_epoch_brings_a_chained_scheduler_forward():
    def rates(n_epochs, start_epoch):
        model = nn.Linear(1, 1)
        optimizer = SGD(model.parameters(), lr=1.0)
        chained = ChainedScheduler([ExponentialLR(optimizer, 0.5), StepLR(optimizer, 2, 0.1)])
        loader = [(torch.ones(2, 1), [])]
        history = fit(loader, None, model, lambda x: x.mean(), optimizer, chained, n_epochs, False, 50, [], start_epoch)
        return [row["lr"] for row in history]

    assert rates(5, 2) == pytest.approx(rates(5, 0)[2:])


Pair = namedtuple("Pair", ["x", "length"])


def test_named_tuple_is_one_argument_and_moved_as_such():
    seen = []

    class Net(nn.Module):
        def forward(self, pair):
            seen.append(pair)
            return pair

    batch = (Pair(torch.ones(2, 1), torch.tensor([1, 1])), torch.zeros(2))
    test_epoch([batch], Net(), lambda pair, target: pair.x.mean() + target.sum(), "cpu", [])
    assert type(seen[0]) is Pair


def test_packed_sequence_is_one_argument():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, packed):
            return self.rnn(packed)[1][0]

    packed = pack_padded_sequence(torch.randn(6, 5, 3), [5, 4, 3, 2, 2, 1], batch_first=True)
    batch = (packed, torch.tensor([0, 0, 0, 1, 1, 1]))
    average, _ = test_epoch([batch], Net(), OnlineTripletLoss(1.0, AllTripletSelector()), "cpu", [])
    assert average > 0


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_mapping_of_inputs_may_hold_numbers(kind):
    class Net(nn.Module):
        def forward(self, scale, x):
            return scale * x

    batches = [(kind(scale=torch.tensor(2.0), x=torch.full((n, 1), float(n))), []) for n in (1, 3)]
    average, _ = test_epoch(batches, Net(), lambda x: x.mean(), "cpu", [])
    assert average == pytest.approx((1 * 2 + 3 * 6) / 4)


def test_input_that_can_move_itself_is_moved():
    class Movable:
        device = None

        def to(self, device):
            self.device = device
            return self

    data = Movable()
    test_epoch([(data, [])], nn.Identity(), lambda movable: torch.tensor(1.0), "cpu", [])
    assert data.device == torch.device("cpu")


def test_labels_in_a_column_come_as_a_row():
    loader = [(torch.ones(2, 1), torch.tensor([[3], [4]]))]
    assert extract_embeddings(loader, nn.Identity())[1].tolist() == [3, 4]


def test_labels_that_are_strings_are_an_error_with_a_remedy():
    data = [(torch.rand(4), name) for name in ("ant", "bee", "ant")]
    with pytest.raises(ValueError, match=r"got a tuple; names, labels = np.unique\(strings, return_inverse=True\)"):
        extract_embeddings(DataLoader(data, batch_size=3), nn.Linear(4, 2))
