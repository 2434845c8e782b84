"""Tests of fit's options, and of what it does with models, losses and batches of other kinds."""

import collections
import math
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import trainer
from checkpoints import Checkpoint
from datasets import BalancedBatchSampler, SiameseDataset, TripletDataset
from losses import (
    BatchAllTripletLoss,
    ContrastiveLoss,
    GlobalBatchLoss,
    OnlineContrastiveLoss,
    OnlineTripletLoss,
    TripletLoss,
)
from metrics import AccumulatedAccuracyMetric, EmbeddingMetric
from networks import ClassificationNet, SiameseNet, TripletNet
from trainer import extract_embeddings, fit, test_epoch, train_epoch
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


class Recorder(nn.Module):
    """Keeps its outputs, and how many samples it has seen at once."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.outputs = []

    def forward(self, x):
        self.outputs.append(self.net(x))
        return self.outputs[-1]


# --- precision


class Dtypes(nn.Module):
    """A loss that keeps the dtype of what it gets."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def forward(self, embeddings, target):
        self.seen.add((embeddings.dtype, torch.is_autocast_enabled("cpu")))
        return BatchAllTripletLoss(1.0)(embeddings, target)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_amp_is_for_the_model_and_not_for_the_loss(amp):
    inside = Recorder(nn.Linear(5, 8))
    net = nn.Sequential(inside, nn.Linear(8, 3))
    loss_fn = Dtypes()
    history = train(net, loss_fn, amp=amp, n_epochs=1)
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
    train(resumed, BatchAllTripletLoss(1.0), amp=torch.float16, n_epochs=2, checkpoint=Checkpoint(tmp_path / "run.pt"))
    state = torch.load(tmp_path / "run.pt", weights_only=True)["scaler"]
    assert state["scale"] > 1
    assert state["_growth_tracker"] == 6
    fresh = make_net()
    train(fresh, BatchAllTripletLoss(1.0), amp=torch.float16, n_epochs=4, checkpoint=Checkpoint(tmp_path / "run.pt"))
    for ours, theirs in zip(fresh.parameters(), whole.parameters()):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="cannot resume"):
        train(make_net(), BatchAllTripletLoss(1.0), n_epochs=5, checkpoint=Checkpoint(tmp_path / "run.pt"))


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
    with pytest.warns(UserWarning, match=r"Epoch 1/3: the embeddings have shrunk to a point.*try") as caught:
        fit_balanced(constant(norm=norm), loss_fn, n_epochs=3)
    assert len(caught) == 1


@pytest.mark.parametrize("options", [{"margin": 1.0}, {"margin": 0.0, "soft_margin": True}])
def test_embeddings_small_beside_the_loss_are_warned_of(options):
    loss_fn = OnlineTripletLoss(triplet_selector=BatchHardTripletSelector(), squared=False, **options)
    net = make_net()
    with torch.no_grad():
        net[2].weight *= 0.005
        net[2].bias *= 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_balanced(net, loss_fn, lr=0.0, n=40 * 20)  # after 40 steps it may be a beginning
    with pytest.warns(UserWarning, match="the embeddings have shrunk, their spread is .* beside a loss of"):
        fit_balanced(net, loss_fn, lr=0.0, n=60 * 20)


@pytest.mark.parametrize("kind", [lambda count: count, int], ids=["tensor", "int"])
def test_an_epoch_without_an_active_triplet_is_warned_of(kind):
    net, loss_fn = make_net(), BatchAllTripletLoss(0.01)
    loss_fn.register_forward_hook(lambda module, inputs, outputs: (outputs[0], kind(outputs[1])))
    with torch.no_grad():
        net[2].weight *= 100
    with pytest.warns(UserWarning, match="no triplet was active"):
        fit_balanced(net, loss_fn, lr=0.0, spread=0.001)


@pytest.mark.parametrize("labels", [torch.arange(40) // 20, torch.arange(40)], ids=["one class", "all distinct"])
def test_batches_without_a_valid_triplet_are_warned_of_and_given_the_sampler(labels):
    data = TensorDataset(torch.randn(40, 5), labels)
    net = make_net()
    with pytest.warns(UserWarning, match="no batch had two samples of one class and one of another.*BalancedBatchSam"):
        fit(DataLoader(data, 20), None, net, BatchAllTripletLoss(1.0), SGD(net.parameters(), 0.1), None, 1, False, 0)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int8, torch.float32, torch.bool])
def test_labels_of_any_dtype_are_looked_at(dtype):
    x, labels = clusters()
    train(make_net(), OnlineTripletLoss(1.0, BatchHardTripletSelector()), TensorDataset(x, (labels % 2).to(dtype)))


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


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_labels_that_are_no_tensor_are_not_said_to_hold_no_triplet(kind):
    labels = torch.arange(20) % 4
    target = labels.tolist() if kind == "list" else {"label": labels}
    with pytest.warns(UserWarning, match="no triplet was active"):
        fit_once(lambda x, y: (0 * x.sum(), torch.tensor(0)), [(torch.randn(20, 5), target)])


def fit_once(loss_fn, loader):
    net = make_net()
    fit(loader, None, net, loss_fn, SGD(net.parameters(), 0.1), None, 1, False, 0)


def test_batches_of_one_sample_are_warned_of():
    with pytest.warns(UserWarning, match="no batch had two samples of one class"):
        fit_once(BatchAllTripletLoss(1.0), DataLoader(TensorDataset(*clusters()), 1))


def test_a_regression_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_once(lambda x, y: (0 * x + y.mean()).square().mean(), [(torch.zeros(20, 5), torch.rand(20))])


def test_a_classifier_that_has_learned_little_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(ClassificationNet(make_net(), 4), nn.NLLLoss(), lr=1e-4)


def test_a_last_batch_of_one_sample_is_not_taken_for_a_collapse():
    data = TensorDataset(*(part[:41] for part in clusters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make_net(), OnlineContrastiveLoss(1.0, HardNegativePairSelector()), data)


# --- frozen parts


def normed(n_out=3):
    """A body with batch norm and dropout, and a head."""
    torch.manual_seed(2)
    body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    return nn.Sequential(collections.OrderedDict(body=body, head=nn.Linear(8, n_out)))


def fit_epoch(model, loss_fn, loader):
    train_epoch(loader, model, loss_fn, SGD(model.parameters(), 0.1), False, 0, [])


@pytest.mark.parametrize("make_model", [nn.Sequential, nn.DataParallel, lambda net: net, AveragedModel])
def test_frozen_parts_stay_as_they_are(make_model):
    net = normed()
    net.body.eval().requires_grad_(False)
    before = {name: x.clone() for name, x in net.body.state_dict().items()}
    model = make_model(net)
    body = model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("body")))
    seen = []
    body[2].register_forward_hook(lambda module, *_: seen.append(module.training))
    train(model, BatchAllTripletLoss(1.0))
    assert all(torch.equal(x, before[name]) for name, x in body.state_dict().items())
    assert seen
    assert not any(seen)


def test_frozen_parts_stay_so_when_the_whole_model_was_in_evaluation_mode():
    net = normed()
    net.body.requires_grad_(False)
    net.eval()
    before = net.body[1].running_mean.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, BatchAllTripletLoss(1.0))
    assert torch.equal(net.body[1].running_mean, before)
    assert not net.training


def test_a_part_that_was_merely_in_evaluation_mode_trains_with_a_warning():
    net = normed().eval()
    model = SiameseNet(net)
    modes = []
    net.body[2].register_forward_hook(lambda module, *_: modes.append(module.training))
    with pytest.warns(UserWarning, match="embedding_net was in evaluation mode and is trained") as caught:
        train(model, ContrastiveLoss(1.0), SiameseDataset(TensorDataset(*clusters())), n_epochs=3)
    assert len(caught) == 1
    assert all(modes)
    assert int(net.body[1].num_batches_tracked) == 9
    assert not net.training  # as it came


def test_a_model_that_was_in_evaluation_mode_trains_without_a_warning():
    net = normed().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, BatchAllTripletLoss(1.0))
    assert int(net.body[1].num_batches_tracked) == 6


def test_dropout_switched_off_in_a_training_model_stays_off():
    net = normed()
    net.body[2].eval()
    modes = []
    net.body[2].register_forward_hook(lambda module, *_: modes.append(module.training))
    train(net, BatchAllTripletLoss(1.0), n_epochs=1)
    assert modes == [False] * 3


def test_a_model_that_keeps_its_batch_norm_in_evaluation_mode_is_not_warned_of():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = normed()

        def train(self, mode=True):
            super().train(mode)
            self.net.body[1].eval()
            return self

        def forward(self, x):
            return self.net(x)

    model = Kept().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, BatchAllTripletLoss(1.0))
    assert int(model.net.body[1].num_batches_tracked) == 0


def test_parts_may_be_frozen_and_thawed_between_epochs():
    net = normed()
    n_seen = []

    def on_epoch(row):
        n_seen.append(int(net.body[1].num_batches_tracked))
        net.body.requires_grad_(row["epoch"] != 1).train(row["epoch"] != 1)

    train(net, BatchAllTripletLoss(1.0), n_epochs=3, on_epoch=on_epoch)
    assert n_seen == [3, 3, 6]


def test_an_epoch_by_itself_leaves_frozen_parts_alone():
    net = normed()
    net.body.eval().requires_grad_(False)
    fit_epoch(net, BatchAllTripletLoss(1.0), DataLoader(TensorDataset(*clusters()), 20))
    assert [net.training, net.body.training, net.head.training] == [True, False, True]
    assert int(net.body[1].num_batches_tracked) == 0


# --- the scheduler


def rates_of(make_scheduler, n_epochs=4, n=40, **options):
    """Rates of all steps, and the history."""
    net, rates = make_net(), []
    optimizer = SGD(net.parameters(), 0.1, momentum=0.9)
    optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    loader = DataLoader(TensorDataset(*(part[:n] for part in clusters())), 4)
    run = (optimizer, make_scheduler(optimizer), n_epochs, False, 0)
    return rates, fit(loader, None, net, lambda x, target: x.square().mean(), *run, **options)


def one_cycle(optimizer):
    return OneCycleLR(optimizer, 1e-3, epochs=4, steps_per_epoch=10)


def test_a_schedule_for_batches_is_stepped_after_each():
    rates, history = rates_of(one_cycle, scheduler_step="batch")
    optimizer = SGD([nn.Parameter(torch.ones(1))], 0.1, momentum=0.9)
    scheduler, expected = one_cycle(optimizer), []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == expected
    assert [row["lr"] for row in history] == expected[::10]


def test_a_resumed_schedule_is_not_stepped_for_batches_that_were_not_there(tmp_path):
    class Overstated(list):
        def __len__(self):
            return 20

    def rates(n_epochs, path):
        net = make_net()
        optimizer = SGD(net.parameters(), 0.1)
        loader = Overstated([(torch.ones(2, 5), [])] * 4)
        run = (optimizer, StepLR(optimizer, 6), n_epochs, False, 0)
        keep = None if path is None else Checkpoint(path)
        history = fit(loader, None, net, lambda x: x.mean(), *run, checkpoint=keep, scheduler_step="batch")
        return [row["lr"] for row in history]

    rates(2, tmp_path / "run.pt")
    assert rates(4, tmp_path / "run.pt") == rates(4, None)


def test_a_schedule_for_batches_cannot_begin_late_without_their_number():
    net = make_net()
    optimizer = SGD(net.parameters(), 0.1)
    run = (net, lambda x: x.mean(), optimizer, StepLR(optimizer, 3), 2, False, 0)
    with pytest.raises(ValueError, match="start_epoch needs a loader with a length"):
        fit(iter([]), None, *run, start_epoch=1, scheduler_step="batch")


def test_no_schedule_for_batches_is_none():
    assert set(rates_of(lambda optimizer: None, scheduler_step="batch")[0]) == {0.1}


def test_a_schedule_for_batches_is_resumed_where_it_was(tmp_path):
    whole, _ = rates_of(one_cycle, scheduler_step="batch")
    options = {"scheduler_step": "batch", "checkpoint": Checkpoint(tmp_path / "run.pt")}
    first, _ = rates_of(one_cycle, n_epochs=1, **options)
    second, _ = rates_of(one_cycle, **options)
    assert first + second == whole
    assert rates_of(one_cycle, scheduler_step="batch", start_epoch=3)[0] == whole[30:]


@pytest.mark.parametrize(
    "make", [one_cycle, lambda optimizer: CosineAnnealingLR(optimizer, 40)], ids=["OneCycleLR", "CosineAnnealingLR"]
)
def test_a_schedule_for_batches_that_is_stepped_by_epochs_is_warned_of(make):
    with pytest.warns(UserWarning, match='set for 40 steps, one for each batch.*scheduler_step="batch"'):
        rates_of(make)


def test_a_schedule_that_would_end_before_the_training_is_an_error_before_it():
    def make(optimizer):
        return OneCycleLR(optimizer, 1e-3, total_steps=30)

    with pytest.raises(ValueError, match="OneCycleLR ends after 30 steps; 4 epochs make 40"):
        rates_of(make, scheduler_step="batch")


@pytest.mark.parametrize(
    ("make", "step", "message"),
    [
        (ReduceLROnPlateau, "batch", "ReduceLROnPlateau goes by the loss of an epoch"),
        (lambda optimizer: StepLR(optimizer, 2), "step", 'scheduler_step "epoch" or "batch", got'),
    ],
)
def test_a_scheduler_that_cannot_be_stepped_so_is_an_error(make, step, message):
    with pytest.raises(ValueError, match=message):
        rates_of(make, scheduler_step=step)


# --- on_epoch


@pytest.mark.parametrize(
    ("answer", "n_epochs"), [(True, 2), (np.True_, 2), (1, 5), (None, 5), (False, 5), (0.5, 5), ("yes", 5)]
)
def test_training_ends_when_on_epoch_returns_true(answer, n_epochs):
    history = train(
        make_net(), BatchAllTripletLoss(1.0), n_epochs=5, on_epoch=lambda row: answer if row["epoch"] == 2 else None
    )
    assert len(history) == n_epochs


def test_on_epoch_gets_the_row_when_the_checkpoint_is_saved(tmp_path):
    seen = []

    def on_epoch(row):
        seen.append((row, len(torch.load(tmp_path / "run.pt", weights_only=True)["history"])))

    history = train(make_net(), BatchAllTripletLoss(1.0), checkpoint=Checkpoint(tmp_path / "run.pt"), on_epoch=on_epoch)
    assert [row for row, _ in seen] == history
    assert [n for _, n in seen] == [1, 2]


# --- several outputs


class TwoHeads(nn.Module):
    """Embeddings and scores of classes."""

    def __init__(self):
        super().__init__()
        self.body, self.head = make_net(), nn.Linear(3, 4)

    def forward(self, x):
        embeddings = self.body(x)
        return embeddings, self.head(embeddings)


def of_both(embeddings, scores, target):
    return BatchAllTripletLoss(1.0)(embeddings, target)[0] + nn.functional.cross_entropy(scores, target)


def count_rows(embeddings, labels):
    return {"rows": len(embeddings), "width": embeddings.shape[1]}


def test_a_model_of_two_heads_is_trained_measured_and_embedded():
    model = TwoHeads()
    loader = DataLoader(TensorDataset(*clusters()), 20)
    metrics = [AccumulatedAccuracyMetric(output=1), EmbeddingMetric(count_rows)]
    history = fit(loader, loader, model, of_both, SGD(model.parameters(), 0.01), None, 5, False, 0, metrics)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert (history[-1]["val_rows"], history[-1]["val_width"]) == (60, 3)
    embeddings, labels = extract_embeddings(loader, model)
    scores, _ = extract_embeddings(loader, model, output=1)
    assert (embeddings.shape, scores.shape, labels.shape) == ((60, 3), (60, 4), (60,))
    torch.testing.assert_close(scores, model.head(embeddings).detach())
    assert torch.equal(extract_embeddings(loader, model, output=-1)[0], scores)
    accuracy = 100 * float((scores.argmax(dim=1) == labels).double().mean())
    assert history[-1][next(key for key in history[-1] if key.startswith("val_Acc"))] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("model", "output", "message"),
    [
        (TwoHeads(), 2, "output=2, but the model returns 2"),
        (make_net(), 1, "output=1, but the model returns 1"),
        (lambda x: {"a": x}, 0, "to be a tensor .*, got a dict"),
        (lambda x: x.sum(), 0, "to be a tensor"),
        (lambda x: (None, x), 0, "got a NoneType"),
        (lambda x: x[:3], 0, "a number for each of 3 embeddings"),
    ],
)
def test_an_output_that_is_none_is_an_error_in_words(model, output, message):
    with pytest.raises(ValueError, match=message):
        extract_embeddings(DataLoader(TensorDataset(*clusters()), 20), model, output=output)


def test_a_method_of_a_model_is_called_in_evaluation_mode():
    model = ClassificationNet(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.9)), 4, embedding_dim=3)
    loader = DataLoader(TensorDataset(*clusters()), 20)
    assert torch.equal(extract_embeddings(loader, model.get_embedding)[0], extract_embeddings(loader, model)[0])
    assert model.training


def test_embeddings_are_extracted_by_any_function_from_any_data():
    x, labels = torch.arange(12.0).reshape(6, 2), torch.arange(6)
    batches = [({"a": x[:4], "b": 2 * x[:4]}, labels[:4]), ({"a": x[4:], "b": 2 * x[4:]}, labels[4:])]
    embeddings, got = extract_embeddings(batches, lambda a, b: a + b)
    assert torch.equal(embeddings, 3 * x)
    assert torch.equal(got, labels)
    assert torch.equal(extract_embeddings([((x, 2 * x), labels)], lambda a, b: a + b)[0], 3 * x)
    assert torch.equal(
        extract_embeddings([(x, labels.numpy()), (x, labels.tolist())], lambda a: a)[1], labels.repeat(2)
    )


@pytest.mark.parametrize("target", [[], None, ("a", "b"), {"y": torch.ones(2)}, torch.tensor(1), ["a", "b"]], ids=repr)
def test_embeddings_without_a_label_for_each_are_an_error_in_words(target):
    with pytest.raises(ValueError, match=r"expected batches \(data, labels\), a number for each of 2 embeddings"):
        extract_embeddings([(torch.ones(2, 3), target)], nn.Identity())


# --- wrappers


WRAPPERS = {
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "all": lambda model: torch.compile(nn.DataParallel(AveragedModel(model)), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize(
    "make_model", [lambda: ClassificationNet(make_net(), 4), lambda: SiameseNet(make_net())], ids=["classes", "pairs"]
)
def test_embeddings_of_a_wrapped_model_are_those_of_the_model(make_model, wrap):
    model = make_model()
    loader = DataLoader(TensorDataset(*clusters()), 20)
    expected, _ = extract_embeddings(loader, model)
    wrapped = wrap(model)
    assert torch.equal(extract_embeddings(loader, wrapped)[0], expected)
    assert wrapped.training


# --- the state of a loss


class Remembering(nn.Module):
    """A loss with states of many kinds, which it changes at each call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(4))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.plain, self.array = torch.zeros(2), np.zeros(2)
        self.calls, self.losses, self.table = 0, [], {}
        self.recent, self.seen = collections.deque(maxlen=3), set()
        self.inner = nn.Module()
        self.inner.count = 0
        self.modes = []

    def forward(self, outputs, target):
        self.queue[int(self.place) % 4] = outputs.detach().mean()
        self.place += 1
        self.plain += 1
        self.array += 1
        self.calls += 1
        self.inner.count += 1
        self.new = self.calls
        self.queue = self.queue + 1  # a new tensor
        for add in (self.losses.append, self.recent.append, self.seen.add):
            add(self.calls)
        self.table[self.calls] = 1
        modes.append(self.training)
        return BatchAllTripletLoss(1.0)(outputs, target)[0] + 0.01 * self.queue.sum()

    def content(self):
        state = {name: x.clone() for name, x in self.state_dict().items()}
        names = ("plain", "array", "calls", "losses", "table", "recent", "seen")
        return state | {name: str(getattr(self, name)) for name in names} | {"inner": self.inner.count}


modes = []


def test_a_validation_leaves_the_state_of_the_loss_as_it_was():
    loader = DataLoader(TensorDataset(*clusters()), 20)
    model, loss_fn = make_net(), Remembering()
    train_epoch(loader, model, loss_fn, SGD(model.parameters(), 0.1), False, 0, [])
    before, tensor, attributes = loss_fn.content(), loss_fn.plain, set(vars(loss_fn))
    modes.clear()
    test_epoch(loader, model, loss_fn, False, [])
    assert modes == [False] * 3
    assert loss_fn.training
    after = loss_fn.content()
    assert before.keys() == after.keys()
    assert all(str(after[name]) == str(before[name]) for name in before)
    assert loss_fn.plain is tensor
    assert set(vars(loss_fn)) == attributes


def test_a_validation_leaves_the_generators_of_a_loss_and_its_selector_alone():
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    loss_fn = OnlineTripletLoss(1.0, RandomNegativeTripletSelector(1.0, generator=generators[0]))
    loss_fn.own = generators[1]
    before = [generator.get_state() for generator in generators]
    loss_fn.register_forward_hook(lambda module, *_: [torch.rand(2, generator=module.own), None][1])
    test_epoch(DataLoader(TensorDataset(*clusters()), 20), make_net(), loss_fn, False, [])
    assert all(torch.equal(generator.get_state(), state) for generator, state in zip(generators, before))


def test_a_validation_does_not_change_the_training():
    def weights(has_validation):
        model, loss_fn, loader = make_net(), Remembering(), DataLoader(TensorDataset(*clusters()), 20)
        optimizer = SGD(model.parameters(), 0.1)
        fit(loader, loader if has_validation else None, model, loss_fn, optimizer, None, 3, False, 0)
        return model.state_dict()

    first, second = weights(True), weights(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_validation_leaves_the_memory_of_another_library_alone():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    loader = DataLoader(TensorDataset(*clusters()), 20)
    model = make_net()
    loss_fn = losses.CrossBatchMemory(losses.ContrastiveLoss(), embedding_size=3, memory_size=90)
    train_epoch(loader, model, loss_fn, SGD(model.parameters(), 0.1), False, 0, [])
    before = loss_fn.embedding_memory.clone(), loss_fn.queue_idx
    test_epoch(loader, model, loss_fn, False, [])
    assert torch.equal(loss_fn.embedding_memory, before[0])
    assert loss_fn.queue_idx == before[1] > 0


# --- what is refused in words


def fail(match, error=ValueError, *, model=None, loss_fn=None, data=None, **options):
    model = make_net() if model is None else model
    loss_fn = BatchAllTripletLoss(1.0) if loss_fn is None else loss_fn
    with pytest.raises(error, match=match):
        train(model, loss_fn, data, **options)


class Named(EmbeddingMetric):
    def __init__(self, name, values):
        super().__init__(lambda embeddings, labels: values)
        self.given = name

    def name(self):
        return self.given


@pytest.mark.parametrize(
    "metrics",
    [
        [Named("a", {"loss": 1.0})],
        [Named("a", {"x": 1.0}), Named("b", {"x": 2.0})],
        [AccumulatedAccuracyMetric(), AccumulatedAccuracyMetric()],
    ],
)
def test_names_that_collide_in_the_history_are_an_error(metrics):
    loader, net = DataLoader(TensorDataset(*clusters()), 20), make_net(n_out=4)
    optimizer = SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"the history has a (train|val)_.* already"):
        fit(loader, loader, net, nn.CrossEntropyLoss(), optimizer, None, 1, False, 0, metrics)


def test_labels_of_triplets_are_an_error_in_words():
    data = [((torch.rand(2, 5),) * 3, torch.tensor([0, 1]))]
    model = TripletNet(make_net())
    with pytest.raises(TypeError, match=r"TripletLoss takes the three outputs.*one argument too many, a Tensor"):
        fit(data, None, model, TripletLoss(1.0), SGD(model.parameters(), 0.1), None, 1, False, 0)


def test_single_inputs_to_a_triplet_net_are_an_error_in_words():
    fail("does not take the 1 input.*missing.*TripletNet triplets", TypeError, model=TripletNet(make_net()))
    fail("does not take the 1 input", TypeError, model=nn.DataParallel(SiameseNet(make_net())))


def test_an_error_within_the_model_stays_what_it_is():
    class Broken(nn.Module):
        def forward(self, x):
            return len(3)

    fail("object of type 'int' has no len", TypeError, model=nn.Sequential(make_net(), Broken()))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"loss": torch.ones(())}, TypeError, "expected a loss that returns a tensor.*got dict"),
        (1.0, TypeError, "got float"),
        (None, TypeError, "got NoneType"),
        (torch.ones(20), ValueError, r"one floating-point number, got a tensor of shape \(20,\)"),
        (torch.tensor(3), ValueError, r"one floating-point number, got .* of torch\.int64"),
        (torch.tensor(1.0), ValueError, "the loss has no gradient"),
    ],
)
def test_a_loss_that_returns_no_number_is_an_error_in_words(value, error, message):
    fail(message, error, loss_fn=lambda *_: value)


def test_lbfgs_is_refused_before_the_first_step():
    net = make_net()
    with pytest.raises(TypeError, match="LBFGS"):
        fit([], None, net, BatchAllTripletLoss(1.0), torch.optim.LBFGS(net.parameters()), None, 1, False, 0)


@pytest.mark.parametrize("checkpoint", ["run.pt", 3])
def test_a_checkpoint_that_is_none_is_refused_before_the_first_step(checkpoint):
    fail(r"expected a checkpoint with resume and save, such as Checkpoint\(path\)", TypeError, checkpoint=checkpoint)


# --- dtypes


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_outputs_that_are_not_in_half_precision_keep_their_dtype(amp):
    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x):
            return self.net(x), torch.full((len(x),), 16777217), x.double()

    def loss_fn(embeddings, numbers, doubles, target):
        seen.append((embeddings.dtype, numbers.dtype, int(numbers[0]), doubles.dtype))
        return embeddings.square().mean()

    seen = []
    train(Outputs(), loss_fn, amp=amp, n_epochs=1)
    assert set(seen) == {(torch.float32, torch.int64, 16777217, torch.float64)}


def test_nested_outputs_come_in_float32_too():
    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x):
            return {"embeddings": self.net(x), "n": len(x)}

    def loss_fn(outputs, target):
        assert outputs["embeddings"].dtype == torch.float32
        return outputs["embeddings"].square().mean()

    train(Outputs(), loss_fn, amp=torch.bfloat16, n_epochs=1)


class Thing:
    """Data that is no tensor, as a batch of graphs."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return self


class OfThings(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, thing):
        dtypes.append(self.net[0](thing.x).dtype)
        return self.net(thing.x)


dtypes = []


def test_batches_of_things_are_weighed_by_their_samples():
    x, labels = clusters()
    parts = [slice(0, 45), slice(45, 60)]
    loss_fn = BatchAllTripletLoss(1.0)
    expected = test_epoch([(x[part], labels[part]) for part in parts], make_net(), loss_fn, False, [])[0]
    things = [(Thing(x[part]), labels[part].numpy()) for part in parts]
    assert test_epoch(things, OfThings(), loss_fn, False, [])[0] == pytest.approx(expected)


def test_half_precision_is_for_things_too():
    dtypes.clear()
    test_epoch([(Thing(torch.ones(2, 5)), [])], OfThings(), lambda x: x.mean(), False, [], amp=torch.bfloat16)
    assert dtypes == [torch.bfloat16]


def test_containers_stay_what_they_are_in_half_precision():
    class Outputs(dict):
        def __init__(self, **items):
            super().__init__(**items)

        @property
        def logits(self):
            return self["logits"]

    class Nested(nn.Module):
        def forward(self, x):
            return x, (x, [x]), Outputs(logits=x.bfloat16())

    def loss_fn(x, pair, outputs):
        assert type(pair) is tuple
        assert type(pair[1]) is list
        assert outputs.logits.dtype == torch.float32
        return x.mean()

    test_epoch([(torch.ones(2, 5), [])], Nested(), loss_fn, "cpu", [], amp=torch.bfloat16)


# --- memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps():
    batch = torch.rand(4, 5), torch.arange(4) % 2

    def peak(n_steps):
        net = make_net()
        tracemalloc.start()
        loader = (batch for _ in range(n_steps))
        fit(loader, None, net, BatchAllTripletLoss(1.0), SGD(net.parameters(), 0.1), None, 1, False, 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(50)
    assert peak(1000) - peak(200) < 800 * 200  # bytes


# --- compile


COMPILED = {
    "softmax": (lambda: ClassificationNet(make_net(), 4), nn.NLLLoss(), None),
    "siamese": (lambda: SiameseNet(make_net()), ContrastiveLoss(1.0), SiameseDataset),
    "triplet": (lambda: TripletNet(make_net()), TripletLoss(1.0), TripletDataset),
    "batch-all": (make_net, BatchAllTripletLoss(1.0), None),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training_ends_in_the_same_weights(name):
    make_model, loss_fn, wrap = COMPILED[name]
    data = TensorDataset(*clusters(70))  # batches of 20 and a last one of 10
    data = data if wrap is None else wrap(data)
    weights, values = [], []
    for compile in (False, True):
        torch.compiler.reset()
        counters.clear()
        model = make_model()
        loader = DataLoader(data, 20)
        metrics = [EmbeddingMetric(count_rows)] if name == "batch-all" else []
        torch.manual_seed(0)
        optimizer = SGD(model.parameters(), 0.02)
        val_loader = loader if metrics else None  # for one of them: compiling takes long
        history = fit(loader, val_loader, model, loss_fn, optimizer, None, 5, False, 0, metrics, compile=compile)
        weights.append(model.state_dict())
        values.append([row[key] for row in history for key in ("train_loss", "val_loss", "val_rows") if row.get(key)])
    assert all(torch.allclose(weights[0][key], weights[1][key], rtol=0, atol=1e-5) for key in weights[0])
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 0


def test_what_a_replayed_step_returns_is_kept_as_copies_with_their_graph():
    x = torch.ones(2, requires_grad=True)
    outputs, (loss, count, name) = trainer._copied((2 * x, {"a": x}), (x.sum(), 3, "n"))
    assert isinstance(outputs, tuple)
    assert (count, name) == (3, "n")
    assert outputs[1]["a"] is not x
    assert torch.equal(torch.autograd.grad(loss + outputs[0].sum(), x)[0], torch.full((2,), 3.0))


def test_without_a_compiler_compile_is_an_error_before_the_first_step(monkeypatch):
    def fail_to_compile(*args, **options):
        def function(*args):
            raise RuntimeError("no C++ compiler\nat all")

        return function

    monkeypatch.setattr(torch, "compile", fail_to_compile)
    fail(r"compile=True, but torch\.compile does not work here: no C\+\+ compiler$", RuntimeError, compile=True)
