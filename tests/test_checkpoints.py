"""Tests of checkpoints.py: whatever ends a run, the same call goes on as if nothing had happened."""

import functools
import math
import os
import pickle
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, TensorDataset

import checkpoints
from checkpoints import Checkpoint
from datasets import BalancedBatchSampler, InMemoryDataset, SiameseDataset, TripletDataset
from evaluation import evaluate_embeddings
from losses import BatchAllTripletLoss, ContrastiveLoss, OnlineTripletLoss, TripletLoss
from metrics import AccumulatedAccuracyMetric, EmbeddingMetric, Metric
from networks import Chunked, ClassificationNet, RandomAffine, SiameseNet, TripletNet
from trainer import fit
from utils import RandomNegativeTripletSelector

N_EPOCHS = 4


class Stop(Metric):
    """Raises an error at the n-th batch of training and validation together."""

    def __init__(self, n, error=RuntimeError, value=None):
        self.n, self.error, self.calls, self.given = n, error, 0, value

    def __call__(self, outputs, target, loss):
        self.calls += 1
        if self.calls == self.n:
            raise self.error("stopped")

    def reset(self):
        pass

    def value(self):
        return self.given

    def name(self):
        return "odd"


class Noisy(Dataset):
    """Samples with noise from all three generators of random numbers that a data set may use."""

    def __init__(self):
        self.x, self.targets = clusters()
        self.own = np.random.default_rng(5)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.rand(1) + np.random.rand() + random.random() + self.own.random()
        return self.x[index] + 0.1 * noise.float(), int(self.targets[index])


def clusters(n=48):
    """Images (n, 1, 6, 6) of four classes, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 4
    return torch.randn(4, 1, 6, 6, generator=generator)[labels] + torch.randn(n, 1, 6, 6, generator=generator), labels


def net(n_out=3):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.PReLU(), nn.Linear(8, n_out)
    )


def classification():
    model = ClassificationNet(net(), 4, embedding_dim=3)
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True)
    scheduler = ReduceLROnPlateau(optimizer, patience=0)
    generators = [loader.dataset.own]
    return loader, loader, model, nn.NLLLoss(), optimizer, scheduler, [AccumulatedAccuracyMetric()], generators


def pairs():
    model = SiameseNet(net())
    optimizer = Adam(model.parameters(), 0.01)
    dataset = SiameseDataset(TensorDataset(*clusters()))
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(dataset, batch_size=8, shuffle=True, generator=generator)
    return loader, None, model, ContrastiveLoss(1.0), optimizer, StepLR(optimizer, 2), [], [generator]


def triplets_of_workers():
    model = TripletNet(net())
    optimizer = Adam(model.parameters(), 0.01)
    loader = DataLoader(TripletDataset(TensorDataset(*clusters())), batch_size=8, shuffle=True, num_workers=1)
    return loader, None, model, TripletLoss(1.0), optimizer, CosineAnnealingLR(optimizer, N_EPOCHS), [], []


def online():
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    model = nn.Sequential(RandomAffine(translate=1, generator=generators[0]), net())
    optimizer = Adam(model.parameters(), 0.01, amsgrad=True)
    data = InMemoryDataset(TensorDataset(*clusters()))
    batches = BalancedBatchSampler(data.targets, 4, 3, generator=generators[1])
    loader = DataLoader(data, sampler=batches, batch_size=None)
    loss_fn = OnlineTripletLoss(1.0, RandomNegativeTripletSelector(1.0, generator=generators[2]))
    scheduler = OneCycleLR(optimizer, 0.05, total_steps=N_EPOCHS + 1)
    metrics = [EmbeddingMetric(evaluate_embeddings, keys=["map@r"])]
    return loader, loader, model, loss_fn, optimizer, scheduler, metrics, generators


def learned_loss():
    """A loss with weights of its own."""
    model = net()
    loss_fn = AccumulatedLoss()
    optimizer = SGD([*model.parameters(), *loss_fn.parameters()], 0.1)
    return DataLoader(TensorDataset(*clusters()), 8, shuffle=True), None, model, loss_fn, optimizer, None, [], []


def chunked():
    """Dropout, batch norm and augmentation in chunks."""
    generator = torch.Generator().manual_seed(0)
    model = Chunked(nn.Sequential(RandomAffine(translate=1, generator=generator), net()), size=5)
    optimizer = Adam(model.parameters(), 0.01)
    data = InMemoryDataset(TensorDataset(*clusters()))
    loader = DataLoader(data, sampler=BalancedBatchSampler(data.targets, 4, 3, seed=4), batch_size=None)
    return loader, loader, model, BatchAllTripletLoss(1.0), optimizer, StepLR(optimizer, 2), [], [generator]


class AccumulatedLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.proxies = nn.Parameter(torch.eye(4, 3))

    def forward(self, embeddings, target):
        return nn.functional.cross_entropy(embeddings @ self.proxies.T, target)


SETTINGS = [classification, pairs, triplets_of_workers, online, learned_loss, chunked]


def run(setting, path, metrics=(), n_epochs=N_EPOCHS, seed=0, best=None, mode="min", **options):
    """Train from the seeds on, as a process begun anew does. Weights, loss weights and history without seconds."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    train, val, model, loss_fn, optimizer, scheduler, own_metrics, generators = setting()
    keep = None if path is None else Checkpoint(path, best=best, mode=mode, generators=generators)
    metrics = [*own_metrics, *metrics]
    history = fit(
        train, val, model, loss_fn, optimizer, scheduler, n_epochs, False, 0, metrics, checkpoint=keep, **options
    )
    weights = {**model.state_dict(), **{f"loss {key}": value for key, value in loss_fn.state_dict().items()}}
    return weights, [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def assert_equal_runs(run, other):
    assert run[1] == other[1]
    assert run[0].keys() == other[0].keys()
    for key in run[0]:
        assert torch.equal(run[0][key], other[0][key]), key


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path, setting):
    undisturbed = run(setting, None)
    n_batches = len(setting()[0])
    for n in (2, n_batches + 2, 2 * n_batches):
        with pytest.raises(RuntimeError, match="stopped"):
            run(setting, tmp_path / "run.pt", [Stop(n)])
    assert set(contents(tmp_path)) <= {"run.pt"}
    assert_equal_runs(run(setting, tmp_path / "run.pt"), undisturbed)


def test_a_run_is_resumed_under_another_seed_to_the_same_end(tmp_path):
    undisturbed = run(online, None)
    run(online, tmp_path / "run.pt", n_epochs=2)
    torch.rand(17)
    assert_equal_runs(run(online, tmp_path / "run.pt", seed=1), undisturbed)


def test_a_checkpoint_changes_nothing_of_a_run(tmp_path):
    assert_equal_runs(run(classification, tmp_path / "deep" / "er" / "run.pt"), run(classification, None))
    assert list(contents(tmp_path / "deep" / "er")) == ["run.pt"]


def test_a_finished_run_gives_its_history_without_training(tmp_path):
    first = run(pairs, tmp_path / "run.pt")
    before = contents(tmp_path)
    assert_equal_runs(run(pairs, tmp_path / "run.pt", [Stop(1)]), first)
    assert contents(tmp_path) == before


def test_a_finished_run_trains_further(tmp_path):
    run(learned_loss, tmp_path / "run.pt", n_epochs=2)
    assert_equal_runs(run(learned_loss, tmp_path / "run.pt", n_epochs=5), run(learned_loss, None, n_epochs=5))


def test_what_is_kept_can_be_read_without_executing_anything(tmp_path):
    weights, history = run(classification, tmp_path / "run.pt", [Stop(-1, value=(np.float32(0.5), [1]))])
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert len(state["history"]) == N_EPOCHS
    for key in state["model"]:
        assert torch.equal(state["model"][key], weights[key])
    assert state["history"][0]["train_Accuracy"] == history[0]["train_Accuracy"]
    assert isinstance(state["history"][0]["train_odd"], str)  # a value that no such file may hold


def test_the_best_epoch_is_kept_on_request(tmp_path):
    for mode, best in (("min", min), ("max", max)):
        _, history = run(classification, tmp_path / mode, best="val_Accuracy", mode=mode)
        values = [row["val_Accuracy"] for row in history]
        state = torch.load(tmp_path / f"{mode}.best", weights_only=True)
        assert len(state["history"]) == 1 + values.index(best(values))
    assert len({row["val_Accuracy"] for row in history}) > 1


def test_a_best_epoch_of_before_the_interruption_stays(tmp_path):
    run(online, tmp_path / "whole.pt", best="train_loss", mode="max")
    run(online, tmp_path / "run.pt", n_epochs=1, best="train_loss", mode="max")
    run(online, tmp_path / "run.pt", best="train_loss", mode="max")
    best = [
        torch.load(tmp_path / f"{name}.pt.best", weights_only=True)["history"][-1]["epoch"] for name in ("whole", "run")
    ]
    assert best[0] == best[1]


@pytest.mark.parametrize(("best", "mode"), [("val_los", "min"), ("val_loss", "min"), ("train_loss", "lowest")])
def test_an_unknown_entry_is_an_error_after_the_first_epoch(tmp_path, best, mode):
    with pytest.raises(ValueError, match=r"expected mode|no number in the history.*train_loss"):
        run(pairs, tmp_path / "run.pt", best=best, mode=mode)  # pairs has no validation
    if mode == "min":
        assert len(torch.load(tmp_path / "run.pt", weights_only=True)["history"]) == 1  # kept all the same


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def of_another_run(change):
    """A setting with a part exchanged."""

    def setting():
        train, val, model, loss_fn, optimizer, scheduler, metrics, generators = pairs()
        parts = {
            "train": train,
            "model": model,
            "optimizer": optimizer,
            "scheduler": scheduler,
            "generators": generators,
        }
        parts |= change(model)
        rest = (loss_fn, parts["optimizer"], parts["scheduler"], metrics, parts["generators"])
        return parts["train"], val, parts["model"], *rest

    return setting


def another_model(model):
    model = SiameseNet(net(n_out=5))
    optimizer = Adam(model.parameters(), 0.01)
    return {"model": model, "optimizer": optimizer, "scheduler": StepLR(optimizer, 2)}


def one_tensor_more(model):
    model.register_buffer("scale", torch.ones(2))
    return {}


def another_optimizer(model):
    optimizer = SGD(model.parameters(), 0.01)
    return {"optimizer": optimizer, "scheduler": StepLR(optimizer, 2)}


def other_groups(model):
    optimizer = Adam([{"params": list(model.parameters())[:2]}, {"params": list(model.parameters())[2:]}], 0.01)
    return {"optimizer": optimizer, "scheduler": StepLR(optimizer, 2)}


def another_scheduler(model):
    optimizer = Adam(model.parameters(), 0.01)
    return {"optimizer": optimizer, "scheduler": ExponentialLR(optimizer, 0.5)}


def no_scheduler(model):
    return {"scheduler": None}


def no_generator(model):
    return {"generators": []}


@pytest.mark.parametrize(
    "change",
    [another_model, one_tensor_more, another_optimizer, other_groups, another_scheduler, no_scheduler, no_generator],
)
def test_a_checkpoint_of_another_run_is_an_error_and_stays(tmp_path, change):
    run(of_another_run(change), tmp_path / "run.pt", n_epochs=1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"cannot resume from .*run.pt: its? .*left as it is"):
        run(pairs, tmp_path / "run.pt")
    assert contents(tmp_path) == before


def test_a_longer_run_or_another_start_is_an_error(tmp_path):
    run(pairs, tmp_path / "run.pt", n_epochs=3)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="ends with epoch 3, for start_epoch=0 and n_epochs=2"):
        run(pairs, tmp_path / "run.pt", n_epochs=2)
    with pytest.raises(ValueError, match="ends with epoch 3, for start_epoch=1 and n_epochs=4"):
        run(pairs, tmp_path / "run.pt", start_epoch=1)
    assert contents(tmp_path) == before
    run(pairs, tmp_path / "run.pt", start_epoch=3)


def damage(kind, path):
    """Put something in the place of a checkpoint."""
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "without its end":
        path.write_bytes(content[:-1])
    elif kind == "a changed byte":
        weights = torch.load(path, weights_only=True)["model"]["embedding_net.1.weight"].numpy().tobytes()
        assert weights in content
        path.write_bytes(content.replace(weights, bytes([weights[0] ^ 1]) + weights[1:]))
    elif kind == "text":
        path.write_text("epoch 3, loss 0.01")
    elif kind == "a picture":
        path.write_bytes(bytes.fromhex("89504e470d0a1a0a") + bytes(1000))
    elif kind == "another zip file":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "a")
    elif kind == "numpy's":
        np.savez(path.with_suffix(".npz"), a=np.arange(3))
        path.with_suffix(".npz").replace(path)
    elif kind == "a pickle":
        path.write_bytes(pickle.dumps({"format": checkpoints._FORMAT}))
    elif kind == "code in a pickle":
        path.write_bytes(pickle.dumps(Evil(path.parent / "executed")))
    elif kind == "code":
        torch.save({"format": checkpoints._FORMAT, "model": Evil(path.parent / "executed")}, path)
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "weights":
        torch.save(SiameseNet(net()).state_dict(), path)
    elif kind == "a whole model":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "another version":
        torch.save(torch.load(path, weights_only=True) | {"format": "siamese-triplet run, 1"}, path)
    elif kind == "weights of another type":
        state = torch.load(path, weights_only=True)
        torch.save(state | {"model": {key: x.double() for key, x in state["model"].items()}}, path)
    elif kind == "a part missing":
        torch.save({key: x for key, x in torch.load(path, weights_only=True).items() if key != "random"}, path)


@pytest.mark.parametrize(
    "kind",
    [
        "empty", "cut off", "without its end", "a changed byte", "text", "a picture", "another zip file", "numpy's",
        "a pickle", "code in a pickle", "code", "a tensor", "weights", "a whole model", "another version",
        "weights of another type", "a part missing",
    ],
)  # fmt: skip
def test_what_is_no_whole_checkpoint_is_an_error_and_stays(tmp_path, kind):
    path = tmp_path / "run.pt"
    run(pairs, path, n_epochs=1)
    damage(kind, path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"cannot resume from .*run.pt: .*left as it is"):
        run(pairs, path)
    assert contents(tmp_path) == before
    assert not (tmp_path / "executed").exists()


def test_a_folder_in_place_of_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="cannot resume from"):
        run(pairs, tmp_path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    run(pairs, tmp_path / "run.pt", n_epochs=1)
    before = contents(tmp_path)

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(pairs, tmp_path / "run.pt", [Stop(1, AssertionError)])  # before the first batch
    assert contents(tmp_path) == before
    monkeypatch.undo()
    assert_equal_runs(run(pairs, tmp_path / "run.pt"), run(pairs, None))


def rate(factor, epoch):
    return factor**epoch


class Rate:
    def __init__(self, factor):
        self.factor = factor
        self.history = [self.__class__]  # nothing that a file of weights may hold

    def __call__(self, epoch):
        return self.factor**epoch


def test_a_state_that_cannot_be_kept_is_an_error_before_training(tmp_path):
    def setting(rate):
        def build():
            train, val, model, loss_fn, optimizer, _, *rest = pairs()
            return train, val, model, loss_fn, optimizer, LambdaLR(optimizer, rate), *rest

        return build

    plain = setting(functools.partial(rate, 0.5).__call__)
    with pytest.raises(ValueError, match="cannot be kept in a file: it holds more than tensors"):
        run(setting(Rate(0.5)), tmp_path / "run.pt", [Stop(1)])
    assert contents(tmp_path) == {}
    run(setting(lambda epoch: 0.5**epoch), tmp_path / "run.pt", n_epochs=2)
    assert_equal_runs(run(setting(lambda epoch: 0.5**epoch), tmp_path / "run.pt"), run(plain, None))


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)  # no threads yet, so that this process may be copied
import test_checkpoints as tests

path = sys.argv[1]

def child(path):
    weights, history = tests.run(getattr(tests, sys.argv[3]), path, n_epochs=60)
    torch.save((weights, history), path + ".result")
    os._exit(0)

def start(path):
    pid = os.fork()
    return pid or child(path)

def change(path):
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None

os.waitpid(start(path + "whole"), 0)
moments = random.Random(int(sys.argv[2]))
for _ in range(5):
    before, began = change(path), time.perf_counter()
    pid = start(path)
    while change(path) == before and time.perf_counter() - began < 60:  # an epoch more, and a part of another
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    epoch = torch.load(path, weights_only=True)["history"][-1]["epoch"] if os.path.exists(path) else 0
    print("killed after epoch" if os.WIFSIGNALED(status) else "ended after epoch", epoch)
os.waitpid(start(path), 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["classification", "chunked"])
def test_a_run_killed_five_times_ends_bit_identical(tmp_path, setting):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run.pt"), "0", setting]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed") == 5
    assert "killed after epoch 0" not in done.stdout
    results = [torch.load(tmp_path / f"run.pt{name}.result", weights_only=False) for name in ("", "whole")]
    assert_equal_runs(*results)
    assert len(results[0][1]) == 60


# --- settings


def with_schedule(scheduler_class=CosineAnnealingLR, scheduler_options=None, **options):
    """A setting whose optimiser and scheduler have these options."""

    def setting():
        train, val, model, loss_fn, _, _, metrics, generators = pairs()
        optimizer = Adam(model.parameters(), **({"lr": 0.01} | options))
        scheduler = scheduler_class and scheduler_class(optimizer, **(scheduler_options or {"T_max": 2}))
        return train, val, model, loss_fn, optimizer, scheduler, metrics, generators

    return setting


def fit_with(setting, path, n_epochs):
    """Train without seeding; the optimiser."""
    train, _, model, loss_fn, optimizer, scheduler, _, generators = setting()
    keep = Checkpoint(path, generators=generators)
    fit(train, None, model, loss_fn, optimizer, scheduler, n_epochs, False, 0, checkpoint=keep)
    return optimizer


ONE_CYCLE = {"scheduler_class": OneCycleLR}
PLATEAU = {"scheduler_class": ReduceLROnPlateau}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"scheduler_options": {"T_max": 6}}, "scheduler T_max: 2, here: 6"),
        ({}, {"scheduler_options": {"T_max": 2, "eta_min": 1e-4}}, r"scheduler eta_min: 0(.0)?, here: 0.0001"),
        ({}, {"lr": 0.02}, "optimizer 0 initial_lr: 0.01, here: 0.02"),
        ({"scheduler_class": None}, {"scheduler_class": None, "lr": 0.005}, "optimizer 0 lr: 0.01, here: 0.005"),
        ({}, {"weight_decay": 1e-4}, "optimizer 0 weight_decay: 0, here: 0.0001"),
        ({}, {"betas": (0.8, 0.999)}, r"optimizer 0 betas: \[0.9, 0.999\], here: \[0.8, 0.999\]"),
        (
            ONE_CYCLE | {"scheduler_options": {"max_lr": 0.1, "total_steps": 9}},
            ONE_CYCLE | {"scheduler_options": {"max_lr": 0.1, "total_steps": 12}},
            "scheduler total_steps: 9, here: 12",
        ),
        (
            PLATEAU | {"scheduler_options": {"patience": 0}},
            PLATEAU | {"scheduler_options": {"patience": 3}},
            "scheduler patience: 0, here: 3",
        ),
    ],
)
def test_other_settings_are_an_error_that_names_both(tmp_path, first, second, message):
    fit_with(with_schedule(**first), tmp_path / "run.pt", 2)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"cannot resume from .*run.pt: its {message}.*left as it is"):
        fit_with(with_schedule(**second), tmp_path / "run.pt", 6)
    assert contents(tmp_path) == before
    fit_with(with_schedule(**first), tmp_path / "run.pt", 3)


@pytest.mark.parametrize(
    ("scheduler_class", "options"),
    [
        (CosineAnnealingLR, {"T_max": 4}),
        (ReduceLROnPlateau, {"patience": 0, "factor": 0.1, "mode": "max"}),
        (OneCycleLR, {"max_lr": 0.1, "total_steps": 5}),
    ],
)
def test_the_same_objects_go_on_in_the_same_process(tmp_path, scheduler_class, options):
    setting = with_schedule(scheduler_class=scheduler_class, scheduler_options=options)
    torch.manual_seed(0)
    parts = setting()
    for n_epochs in (2, 4):
        fit_with(lambda: parts, tmp_path / "run.pt", n_epochs)
    undisturbed = run(setting, None)[0]
    assert all(torch.equal(undisturbed[key], value) for key, value in parts[2].state_dict().items())


def test_how_steps_are_computed_may_change(tmp_path):
    fit_with(with_schedule(foreach=True), tmp_path / "run.pt", 1)
    optimizer = fit_with(with_schedule(foreach=False), tmp_path / "run.pt", 2)
    assert optimizer.param_groups[0]["foreach"] is False


def numpy_rate(epoch):
    return 1.0 if epoch < 2 else np.exp(-epoch)


def test_numpy_numbers_in_a_state_are_kept_as_plain_ones(tmp_path):
    setting = with_schedule(scheduler_class=LambdaLR, scheduler_options={"lr_lambda": numpy_rate}, lr=np.float64(0.01))
    fit_with(setting, tmp_path / "run.pt", 3)
    fit_with(setting, tmp_path / "run.pt", 4)
    fit_with(
        with_schedule(scheduler_class=LambdaLR, scheduler_options={"lr_lambda": numpy_rate}), tmp_path / "run.pt", 5
    )


def chained(*makers):
    return lambda optimizer, T_max=2: ChainedScheduler([make(optimizer) for make in makers])


def sequential(*makers):
    return lambda optimizer, T_max=2: SequentialLR(optimizer, [make(optimizer) for make in makers], [3])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda o, T_max: MultiStepLR(o, [1, 2]), lambda o, T_max: MultiStepLR(o, [1, 3])),
        (lambda o, T_max: MultiStepLR(o, [1, 2, 3]), lambda o, T_max: MultiStepLR(o, [1])),
        (chained(ConstantLR), chained(ConstantLR, lambda o: ExponentialLR(o, 0.9))),
        (chained(ConstantLR, lambda o: ExponentialLR(o, 0.9)), chained(ConstantLR)),
        (
            sequential(ConstantLR, lambda o: CosineAnnealingLR(o, 5)),
            sequential(ConstantLR, lambda o: ExponentialLR(o, 0.9)),
        ),
    ],
    ids=["another milestone", "fewer milestones", "one more", "one fewer", "another kind"],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR's own
def test_other_settings_within_a_scheduler_are_an_error(tmp_path, first, second):
    fit_with(with_schedule(scheduler_class=first), tmp_path / "run.pt", 2)
    with pytest.raises(ValueError, match=r"cannot resume from .* its scheduler .*: .*, here: "):
        fit_with(with_schedule(scheduler_class=second), tmp_path / "run.pt", 4)
    fit_with(with_schedule(scheduler_class=first), tmp_path / "run.pt", 4)


def test_parameters_in_another_order_are_an_error(tmp_path):
    def setting(order):
        def build():
            train, val, model, loss_fn, _, _, *rest = pairs()
            optimizer = Adam(list(model.parameters())[::order], 0.01)
            return train, val, model, loss_fn, optimizer, None, *rest

        return build

    fit_with(setting(1), tmp_path / "run.pt", 1)
    with pytest.raises(ValueError, match="its optimizer has its parameters in other groups, another order"):
        fit_with(setting(-1), tmp_path / "run.pt", 2)


def test_parts_that_are_there_and_not_here_are_named(tmp_path):
    fit_with(with_schedule(), tmp_path / "run.pt", 1)
    with pytest.raises(
        ValueError, match="it keeps model, loss_fn, optimizer, scheduler, this run model, loss_fn, optim"
    ):
        fit_with(with_schedule(scheduler_class=None), tmp_path / "run.pt", 2)


def test_a_loop_that_only_saves_can_be_resumed(tmp_path):
    class Counter:
        n = 5

        def state_dict(self):
            return {"n": self.n}

        def load_state_dict(self, state):
            self.n = state["n"]

    Checkpoint(tmp_path / "run.pt", best="x").save({"counter": Counter()}, [])
    counter = Counter()
    counter.n = 0
    Checkpoint(tmp_path / "run.pt").resume({"counter": counter})
    assert counter.n == 5
    with pytest.raises(ValueError, match="expected other names of parts than history"):
        Checkpoint(tmp_path / "run.pt").save({"history": counter}, [])


# --- the best epoch


def test_numbers_of_torch_and_numpy_are_numbers(tmp_path):
    keep = Checkpoint(tmp_path / "run.pt", best="value", mode="max")
    values = [torch.tensor(0.25), np.float32(0.5), torch.tensor([0.125]), 1]
    keep.save({}, [{"value": value} for value in values])
    assert keep.resume({}) == [{"value": value} for value in (0.25, 0.5, 0.125, 1)]
    assert (tmp_path / "run.pt.best").exists()


@pytest.mark.parametrize(
    ("values", "mode", "expected"),
    [
        ([math.nan, 0.2, 0.9, 0.5], "max", 3),
        ([0.5, math.nan, 0.9], "max", 3),
        ([0.9, math.nan, 0.5], "max", 1),
        ([math.nan, 0.9, 0.2, math.nan], "min", 3),
        ([0.5, None, 0.2], "min", 3),
        ([-math.inf, 0.5, 0.2], "max", 2),
        ([0.5, 0.5], "max", 1),
    ],
)
def test_an_epoch_without_a_number_is_not_the_best_nor_the_end_of_it(tmp_path, values, mode, expected):
    keep = Checkpoint(tmp_path / "run.pt", best="value", mode=mode)
    history = []
    for epoch, value in enumerate(values, start=1):
        history.append({"epoch": epoch} if value is None else {"epoch": epoch, "value": value})
        keep.save({"model": nn.Linear(1, 1)}, history)
    assert len(torch.load(tmp_path / "run.pt.best", weights_only=True)["history"]) == expected


# --- the file


def test_a_link_is_followed_and_the_mode_of_the_file_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "kept.pt", tmp_path / "run.pt"
    run(pairs, target, n_epochs=1)
    target.chmod(0o640)
    link.symlink_to(target)
    run(pairs, link, n_epochs=2, best="train_loss")
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert len(torch.load(target, weights_only=True)["history"]) == 2
    assert (tmp_path / "run.pt.best").exists()


def test_a_relative_path_is_of_the_folder_at_the_time(tmp_path, monkeypatch):
    class Wanderer(Stop):
        def __call__(self, outputs, target, loss):
            monkeypatch.chdir(tmp_path / "b")

    for name in "ab":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    run(pairs, "run.pt", [Wanderer(-1)], n_epochs=2)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")] == ["a/run.pt"]


def test_a_long_name_and_what_is_no_file(tmp_path):
    run(pairs, tmp_path / ("a" * 240), n_epochs=1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it is no file"):
        run(pairs, tmp_path / "pipe", n_epochs=1)


def test_a_folder_that_cannot_be_written_is_noticed_before_the_first_batch(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, ValueError), match=r"run\.pt|file"):
        run(pairs, tmp_path / "file" / "run.pt", [Stop(1, AssertionError)])


def test_a_full_disk_after_an_epoch_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    run(pairs, tmp_path / "run.pt", n_epochs=1)
    before = contents(tmp_path)
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:  # the first is the trial before training
            raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(pairs, tmp_path / "run.pt", best="train_loss")
    assert contents(tmp_path) == before


def test_what_a_killed_process_left_long_ago_is_removed(tmp_path):
    for name, age in (("old", 7200), ("new", 60)):
        path = tmp_path / f".run.pt.{name}.partial"
        path.write_bytes(b"unfinished")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    run(pairs, tmp_path / "run.pt", n_epochs=1)
    assert set(contents(tmp_path)) == {"run.pt", ".run.pt.new.partial"}


def test_two_writers_do_not_mix(tmp_path, monkeypatch):
    models = [nn.Linear(1, 1), nn.Linear(300, 300)]
    replace, names = os.replace, []

    def replace_in_turn(partial, path):
        names.append(str(partial))
        if len(names) == 1:  # another process saves while this one is about to
            Checkpoint(path).save({"model": models[1]}, [])
        replace(partial, path)

    monkeypatch.setattr(checkpoints.os, "replace", replace_in_turn)
    Checkpoint(tmp_path / "run.pt").save({"model": models[0]}, [])
    assert len(set(names)) == 2
    assert Checkpoint(tmp_path / "run.pt").resume({"model": models[0]}) == []
    assert list(contents(tmp_path)) == ["run.pt"]


# --- generators


@pytest.mark.parametrize(
    "generator", [torch.Generator(), np.random.default_rng(0), np.random.RandomState(0), random.Random(0)]
)
def test_generators_of_any_kind_are_kept(tmp_path, generator):
    def draw():
        if isinstance(generator, torch.Generator):
            return float(torch.rand((), generator=generator))
        return generator.random() if hasattr(generator, "random") else generator.random_sample()

    keep = Checkpoint(tmp_path / "run.pt", generators=[generator])
    keep.save({"model": nn.Linear(1, 1)}, [])
    expected = [draw(), draw()]
    keep.resume({"model": nn.Linear(1, 1)})
    assert [draw(), draw()] == expected


@pytest.mark.parametrize(
    "generator", [random.SystemRandom(), 3, None, "seed", torch.rand], ids=lambda x: type(x).__name__
)
def test_what_is_no_generator_is_an_error(tmp_path, generator):
    with pytest.raises(TypeError, match=r"expected generators of torch\.Generator"):
        Checkpoint(tmp_path / "run.pt", generators=[generator])


def test_generators_of_another_kind_are_an_error_before_anything_is_loaded(tmp_path):
    Checkpoint(tmp_path / "run.pt", generators=[torch.Generator()]).save({"model": nn.Linear(1, 1)}, [])
    model = nn.Linear(1, 1)
    before = model.weight.clone()
    for generator in (np.random.default_rng(0), np.random.Generator(np.random.MT19937(0))):
        with pytest.raises(ValueError, match=r"its generators: \['Generator'\], here: "):
            Checkpoint(tmp_path / "run.pt", generators=[generator]).resume({"model": model})
    assert torch.equal(model.weight, before)


# --- wrappers


class Mixed(nn.Module):
    """A network with a part of the name that wrappers use, and one that is compiled."""

    def __init__(self, compiled):
        super().__init__()
        self.module = nn.Linear(36, 4)
        body = nn.Sequential(nn.PReLU(), nn.Linear(4, 3))
        self.body = torch.compile(body, backend="eager") if compiled else body

    def forward(self, x):
        return self.body(self.module(x.flatten(1)))


WRAPPED = {
    "plain": lambda: Mixed(False),
    "compiled": lambda: torch.compile(Mixed(False), backend="eager"),
    "parallel": lambda: nn.DataParallel(Mixed(False)),
    "averaged": lambda: AveragedModel(Mixed(False)),
    "a compiled part": lambda: Mixed(True),
    "all of them": lambda: torch.compile(nn.DataParallel(AveragedModel(Mixed(True))), backend="eager"),
    "chunked": lambda: Chunked(torch.compile(nn.DataParallel(Mixed(True)), backend="eager"), size=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("second", WRAPPED)
@pytest.mark.parametrize("first", ["plain", "all of them", "chunked"])
def test_a_checkpoint_is_the_same_in_any_wrapper(tmp_path, first, second):
    a, b = WRAPPED[first](), WRAPPED[second]()
    Checkpoint(tmp_path / "run.pt").save({"model": a}, [{"epoch": 1}])
    weights = torch.load(tmp_path / "run.pt", weights_only=True)["model"]
    Mixed(False).load_state_dict(weights)
    assert Checkpoint(tmp_path / "run.pt").resume({"model": b}) == [{"epoch": 1}]
    x = torch.rand(5, 1, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(a(x), b(x))


def test_an_average_of_models_goes_on_where_it_was(tmp_path):
    model = nn.Linear(2, 1)
    average = AveragedModel(model)
    for _ in range(3):
        average.update_parameters(model)
    Checkpoint(tmp_path / "run.pt").save({"model": model, "average": average}, [])
    other = AveragedModel(model)
    Checkpoint(tmp_path / "run.pt").resume({"model": nn.Linear(2, 1), "average": other})
    assert int(other.n_averaged) == 3


def test_a_part_named_like_a_wrappers_stays(tmp_path):
    Checkpoint(tmp_path / "run.pt").save({"model": nn.Sequential(Mixed(False))}, [])
    keys = torch.load(tmp_path / "run.pt", weights_only=True)["model"]
    assert "0.module.weight" in keys
