"""Tests of fit's ways to compute (precision, chunks), of its warnings and of its log."""

import math
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from datasets import BalancedBatchSampler, SiameseDataset, TripletDataset
from losses import (
    BatchAllTripletLoss,
    ContrastiveLoss,
    GlobalBatchLoss,
    OnlineContrastiveLoss,
    OnlineTripletLoss,
    TripletLoss,
)
from metrics import EmbeddingMetric
from networks import RandomAffine, SiameseNet, TripletNet
from trainer import fit
from utils import BatchHardTripletSelector, HardNegativePairSelector, RandomNegativeTripletSelector


def clusters(n=60, spread=1.0):
    """Points (n, 5) around four centres, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 4
    return torch.randn(4, 5, generator=generator)[labels] + spread * torch.randn(n, 5, generator=generator), labels


def make_net(*, n_out=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, n_out))


def train(model, loss_fn, data=None, *, n_epochs=2, lr=0.02, batch_size=20, **options):
    """History of `fit` from a seed on."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*clusters()) if data is None else data, batch_size, shuffle=True)
    return fit(loader, None, model, loss_fn, SGD(model.parameters(), lr), None, n_epochs, False, 0, **options)


# --- chunks


class Keywords(nn.Module):
    """A network of two named inputs, of which one is no batch."""

    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, x, factor):
        return self.net(x) * factor


class Named(torch.utils.data.Dataset):
    def __init__(self):
        self.x, self.labels = clusters()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "factor": torch.tensor([2.0, 1.0, 0.5])}, self.labels[i]


@pytest.mark.parametrize("max_chunk", [1, 7, 10, 19])
@pytest.mark.parametrize(
    ("make_model", "loss_fn", "wrap"),
    [
        (make_net, BatchAllTripletLoss(1.0), None),
        (make_net, OnlineTripletLoss(1.0, RandomNegativeTripletSelector(1.0)), None),
        (make_net, OnlineContrastiveLoss(1.0, HardNegativePairSelector()), None),
        (make_net, GlobalBatchLoss(BatchAllTripletLoss(1.0)), None),
        (lambda: SiameseNet(make_net()), ContrastiveLoss(1.0), SiameseDataset),
        (lambda: TripletNet(make_net()), TripletLoss(1.0), TripletDataset),
        (Keywords, BatchAllTripletLoss(1.0), lambda data: Named()),
    ],
)
def test_chunks_train_as_the_whole_batch(make_model, loss_fn, wrap, max_chunk):
    data = TensorDataset(*clusters())
    data = data if wrap is None else wrap(data)
    whole, chunked = make_model(), make_model()
    expected = train(whole, loss_fn, data)
    history = train(chunked, loss_fn, data, max_chunk=max_chunk)
    for ours, theirs in zip(chunked.parameters(), whole.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert [row["train_loss"] for row in history] == pytest.approx([row["train_loss"] for row in expected], rel=1e-5)


class Recorder(nn.Module):
    """Keeps its outputs, and how many samples it has seen at once."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.outputs = []

    def forward(self, x):
        self.outputs.append(self.net(x))
        return self.outputs[-1]


class Noise(nn.Module):
    """Draws from numpy's and from Python's generator, as a user's own layer may."""

    def forward(self, x):
        return x + np.random.rand() + random.random()


@pytest.mark.parametrize("own_generator", [False, True])
def test_chunks_draw_the_same_in_both_passes(own_generator):
    generator = torch.Generator().manual_seed(5) if own_generator else None
    augmentation = RandomAffine(translate=1, degrees=90, generator=generator)
    net = Recorder(nn.Sequential(augmentation, Noise(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)))
    data = TensorDataset(torch.rand(24, 1, 4, 4), torch.arange(24) % 4)
    train(net, OnlineTripletLoss(1.0, RandomNegativeTripletSelector(1.0)), data, n_epochs=1, batch_size=12, max_chunk=5)
    assert [len(x) for x in net.outputs] == [5, 5, 2] * 4
    without_graph, with_graph = net.outputs[:3] + net.outputs[6:9], net.outputs[3:6] + net.outputs[9:]
    assert not any(x.requires_grad for x in without_graph)
    for first, second in zip(without_graph[:3], with_graph[:3]):
        assert torch.equal(first, second)
    assert not torch.equal(net.outputs[0], net.outputs[1])
    assert not torch.equal(net.outputs[0], net.outputs[6])


def test_chunks_leave_the_random_numbers_behind_the_loss():
    def numbers(max_chunk):
        train(make_net(), OnlineTripletLoss(1.0, RandomNegativeTripletSelector(1.0)), max_chunk=max_chunk)
        return torch.rand(3)

    assert torch.equal(numbers(6), numbers(None))


def test_chunks_count_once_for_running_averages():
    net = nn.Sequential(make_net(), nn.BatchNorm1d(3))
    train(net, BatchAllTripletLoss(1.0), n_epochs=1, max_chunk=10)
    assert int(net[1].num_batches_tracked) == 6  # three batches of two chunks


def test_chunks_of_validation_are_those_of_training():
    net = Recorder(make_net())
    loader = DataLoader(TensorDataset(*clusters()), 20)
    optimizer = SGD(net.parameters(), 0.0)
    metric = EmbeddingMetric(keys=["map@r"])
    history = fit(loader, loader, net, BatchAllTripletLoss(1.0), optimizer, None, 1, False, 0, [metric], max_chunk=8)
    assert max(len(x) for x in net.outputs) == 8
    whole = fit(loader, loader, net, BatchAllTripletLoss(1.0), optimizer, None, 1, False, 0, [metric])
    assert history[0]["val_map@r"] == whole[0]["val_map@r"]
    assert history[0]["val_loss"] == pytest.approx(whole[0]["val_loss"], rel=1e-6)


@pytest.mark.parametrize("max_chunk", [0, -3])
def test_chunks_of_nothing_are_an_error(max_chunk):
    with pytest.raises(ValueError, match="max_chunk of at least 1"):
        train(make_net(), BatchAllTripletLoss(1.0), max_chunk=max_chunk)


# --- precision


class Dtypes(nn.Module):
    """A loss that keeps the dtype of what it gets."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def forward(self, embeddings, target):
        self.seen.add((embeddings.dtype, torch.is_autocast_enabled("cpu")))
        return BatchAllTripletLoss(1.0)(embeddings, target)


@pytest.mark.parametrize("max_chunk", [None, 8])
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_amp_is_for_the_model_and_not_for_the_loss(amp, max_chunk):
    inside = Recorder(nn.Linear(5, 8))
    net = nn.Sequential(inside, nn.Linear(8, 3))
    loss_fn = Dtypes()
    history = train(net, loss_fn, amp=amp, max_chunk=max_chunk, n_epochs=1)
    assert {x.dtype for x in inside.outputs} == {amp}
    assert loss_fn.seen == {(torch.float32, False)}
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert math.isfinite(history[0]["train_loss"])


def test_bfloat16_trains_about_as_float32():
    losses = [
        train(make_net(), BatchAllTripletLoss(1.0), amp=amp, n_epochs=5)[-1]["train_loss"]
        for amp in (None, torch.bfloat16)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_float16_keeps_its_scale_in_the_checkpoint(tmp_path):
    whole, resumed = make_net(), make_net()
    train(whole, BatchAllTripletLoss(1.0), amp=torch.float16, n_epochs=4)
    train(resumed, BatchAllTripletLoss(1.0), amp=torch.float16, n_epochs=2, checkpoint=tmp_path / "run.pt")
    state = torch.load(tmp_path / "run.pt", weights_only=True)["scaler"]
    assert state["scale"] > 1
    assert state["_growth_tracker"] == 6
    fresh = make_net()
    train(fresh, BatchAllTripletLoss(1.0), amp=torch.float16, n_epochs=4, checkpoint=tmp_path / "run.pt")
    for ours, theirs in zip(fresh.parameters(), whole.parameters()):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="cannot resume"):
        train(make_net(), BatchAllTripletLoss(1.0), n_epochs=5, checkpoint=tmp_path / "run.pt")


@pytest.mark.parametrize("amp", [torch.float32, True, "bf16"])
def test_another_precision_is_an_error(amp):
    with pytest.raises(ValueError, match=r"amp to be torch\.bfloat16"):
        train(make_net(), BatchAllTripletLoss(1.0), amp=amp)


def test_a_compiled_model_trains_as_the_model():
    plain, model = make_net(), make_net()
    expected = train(plain, BatchAllTripletLoss(1.0))
    compiled = torch.compile(model, backend="eager")
    history = train(compiled, BatchAllTripletLoss(1.0))
    assert [row["train_loss"] for row in history] == pytest.approx([row["train_loss"] for row in expected])
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs)


# --- warnings


def balanced(data):
    return DataLoader(data, batch_sampler=BalancedBatchSampler(data.tensors[1], 4, 5))


def fit_balanced(model, loss_fn, *, n_epochs=1, lr=0.02, spread=1.0, n=400):
    torch.manual_seed(0)
    loader = balanced(TensorDataset(*clusters(n, spread)))
    fit(loader, None, model, loss_fn, SGD(model.parameters(), lr), None, n_epochs, False, 0)


def constant(*, norm, n_out=3):
    """A network whose embeddings are all the same, and stay so."""
    net = make_net(n_out=n_out)
    nn.init.zeros_(net[2].weight)
    nn.init.constant_(net[2].bias, norm)
    net[0].requires_grad_(False)
    return net


@pytest.mark.parametrize("norm", [0.0, 3.0])
@pytest.mark.parametrize(
    "loss_fn",
    [
        BatchAllTripletLoss(1.0),
        OnlineTripletLoss(1.0, BatchHardTripletSelector()),
        OnlineContrastiveLoss(1.0, HardNegativePairSelector()),
        GlobalBatchLoss(OnlineTripletLoss(0.0, BatchHardTripletSelector(), squared=False, soft_margin=True)),
    ],
)
def test_constant_embeddings_are_warned_of_once(loss_fn, norm):
    with pytest.warns(UserWarning, match=r"Epoch 1/3: the embeddings have collapsed.*try") as caught:
        fit_balanced(constant(norm=norm), loss_fn, n_epochs=3)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (OnlineTripletLoss(1.0, BatchHardTripletSelector(), squared=False), "stands at the margin, 1"),
        (OnlineTripletLoss(0.0, BatchHardTripletSelector(), squared=False, soft_margin=True), "stands at ln 2, 0.693"),
    ],
)
def test_embeddings_small_beside_the_margin_are_warned_of(loss_fn, message):
    net = make_net()
    with torch.no_grad():
        net[2].weight *= 0.005
        net[2].bias *= 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_balanced(net, loss_fn, lr=0.0, n=40 * 20)  # after 40 steps it may be a beginning
    with pytest.warns(UserWarning, match=message):
        fit_balanced(net, loss_fn, lr=0.0, n=60 * 20)


def test_a_margin_of_0_is_warned_of():
    with pytest.warns(UserWarning, match="a margin of 0 is met by"):
        fit_balanced(make_net(), BatchAllTripletLoss(0.0))


@pytest.mark.parametrize("kind", [lambda count: count, int], ids=["tensor", "int"])
def test_an_epoch_without_an_active_triplet_is_warned_of(kind):
    net, loss_fn = make_net(), BatchAllTripletLoss(0.01)
    loss_fn.register_forward_hook(lambda module, inputs, outputs: (outputs[0], kind(outputs[1])))
    with torch.no_grad():
        net[2].weight *= 100
    with pytest.warns(UserWarning, match="no triplet was active"):
        fit_balanced(net, loss_fn, lr=0.0, spread=0.001)


@pytest.mark.parametrize(
    "loss_fn",
    [
        BatchAllTripletLoss(1.0),
        OnlineTripletLoss(1.0, RandomNegativeTripletSelector(1.0)),
        OnlineContrastiveLoss(1.0, HardNegativePairSelector()),
    ],
)
def test_a_run_that_learns_is_not_warned_of(loss_fn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_balanced(make_net(), loss_fn, n_epochs=3, spread=0.3)


def test_a_model_of_another_kind_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(constant(norm=1.0, n_out=4), nn.CrossEntropyLoss())


# --- TensorBoard


def test_log_holds_the_history_and_the_embeddings(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loader = DataLoader(TensorDataset(*clusters()), 20)
    net = make_net()
    metrics = [EmbeddingMetric(keys=["map@r"])]
    optimizer = SGD(net.parameters(), 0.01)
    history = fit(
        loader, loader, net, BatchAllTripletLoss(1.0), optimizer, None, 2, False, 0, metrics, log_dir=tmp_path
    )
    log = events.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in log.Scalars("train/loss")] == [1, 2]
    assert [event.value for event in log.Scalars("val/map@r")] == pytest.approx([row["val_map@r"] for row in history])
    assert (tmp_path / "projector_config.pbtxt").read_text().count("embeddings {") == 1


def test_without_a_log_tensorboard_is_not_imported():
    code = "import sys, trainer; sys.exit(any(name.startswith('tensorboard') for name in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": ":".join(sys.path)}).returncode
        == 0
    )
