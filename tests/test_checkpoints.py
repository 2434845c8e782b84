"""Tests of fit's checkpoints: whatever ends a run, the same call goes on as if nothing had happened."""

import functools
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
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

import trainer
from datasets import BalancedBatchSampler, InMemoryDataset, SiameseDataset, TripletDataset
from losses import ContrastiveLoss, OnlineTripletLoss, TripletLoss
from metrics import AccumulatedAccuracyMetric, EmbeddingMetric, Metric
from networks import ClassificationNet, RandomAffine, SiameseNet, TripletNet
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
    return loader, loader, model, nn.NLLLoss(), optimizer, scheduler, [AccumulatedAccuracyMetric()]


def pairs():
    model = SiameseNet(net())
    optimizer = Adam(model.parameters(), 0.01)
    dataset = SiameseDataset(TensorDataset(*clusters()))
    loader = DataLoader(dataset, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))
    return loader, None, model, ContrastiveLoss(1.0), optimizer, StepLR(optimizer, 2), []


def triplets_of_workers():
    model = TripletNet(net())
    optimizer = Adam(model.parameters(), 0.01)
    loader = DataLoader(TripletDataset(TensorDataset(*clusters())), batch_size=8, shuffle=True, num_workers=1)
    return loader, None, model, TripletLoss(1.0), optimizer, CosineAnnealingLR(optimizer, N_EPOCHS), []


def online():
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    model = nn.Sequential(RandomAffine(translate=1, generator=generators[0]), net())
    optimizer = Adam(model.parameters(), 0.01, amsgrad=True)
    data = InMemoryDataset(TensorDataset(*clusters()))
    batches = BalancedBatchSampler(data.targets, 4, 3, generator=generators[1])
    loader = DataLoader(data, sampler=batches, batch_size=None)
    loss_fn = OnlineTripletLoss(1.0, RandomNegativeTripletSelector(1.0, generator=generators[2]))
    scheduler = OneCycleLR(optimizer, 0.05, total_steps=N_EPOCHS + 1)
    return loader, loader, model, loss_fn, optimizer, scheduler, [EmbeddingMetric(keys=["map@r"])]


def learned_loss():
    """A loss with weights of its own."""
    model = net()
    loss_fn = AccumulatedLoss()
    optimizer = SGD([*model.parameters(), *loss_fn.parameters()], 0.1)
    return DataLoader(TensorDataset(*clusters()), 8, shuffle=True), None, model, loss_fn, optimizer, None, []


class AccumulatedLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.proxies = nn.Parameter(torch.eye(4, 3))

    def forward(self, embeddings, target):
        return nn.functional.cross_entropy(embeddings @ self.proxies.T, target)


SETTINGS = [classification, pairs, triplets_of_workers, online, learned_loss]


def run(setting, checkpoint, metrics=(), n_epochs=N_EPOCHS, seed=0, **options):
    """Train from the seeds on, as a process begun anew does. Weights, loss weights and history without seconds."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    train, val, model, loss_fn, optimizer, scheduler, own_metrics = setting()
    metrics = [*own_metrics, *metrics]
    history = fit(
        train, val, model, loss_fn, optimizer, scheduler, n_epochs, False, 0, metrics, checkpoint=checkpoint, **options
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
        assert (tmp_path / "run.pt.interrupted").exists()
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
    assert state["epoch"] == N_EPOCHS
    assert len(state["history"]) == N_EPOCHS
    for key in state["model"]:
        assert torch.equal(state["model"][key], weights[key])
    assert state["history"][0]["train_Accuracy"] == history[0]["train_Accuracy"]
    assert isinstance(state["history"][0]["train_odd"], str)  # a value that no such file may hold


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_what_an_interrupted_epoch_trained_is_kept_beside_the_checkpoint(tmp_path, error):
    n_batches = len(learned_loss()[0])
    with pytest.raises(error):
        run(learned_loss, tmp_path / "run.pt", [Stop(n_batches + 4, error)])
    whole, interrupted = (torch.load(tmp_path / name, weights_only=True) for name in ("run.pt", "run.pt.interrupted"))
    assert whole["epoch"] == interrupted["epoch"] == 1
    assert not torch.equal(whole["model"]["1.weight"], interrupted["model"]["1.weight"])
    assert not torch.equal(whole["loss_fn"]["proxies"], interrupted["loss_fn"]["proxies"])


def test_the_best_epoch_is_kept_on_request(tmp_path):
    for mode, best in (("min", min), ("max", max)):
        _, history = run(classification, tmp_path / mode, monitor="val_Accuracy", mode=mode)
        values = [row["val_Accuracy"] for row in history]
        state = torch.load(tmp_path / f"{mode}.best", weights_only=True)
        assert state["epoch"] == 1 + values.index(best(values))
    assert len({row["val_Accuracy"] for row in history}) > 1


def test_a_best_epoch_of_before_the_interruption_stays(tmp_path):
    run(online, tmp_path / "whole.pt", monitor="train_loss", mode="max")
    run(online, tmp_path / "run.pt", n_epochs=1, monitor="train_loss", mode="max")
    run(online, tmp_path / "run.pt", monitor="train_loss", mode="max")
    best = [torch.load(tmp_path / f"{name}.pt.best", weights_only=True)["epoch"] for name in ("whole", "run")]
    assert best[0] == best[1]


@pytest.mark.parametrize(("monitor", "mode"), [("val_los", "min"), ("val_loss", "min"), ("train_loss", "lowest")])
def test_a_monitor_that_is_none_is_an_error(tmp_path, monitor, mode):
    with pytest.raises(ValueError, match=r"expected mode|train_loss"):
        run(pairs, tmp_path / "run.pt", monitor=monitor, mode=mode)  # pairs has no validation
    if mode == "min":
        assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 1  # kept all the same


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def of_another_run(change):
    """A setting with a part exchanged."""

    def setting():
        train, val, model, loss_fn, optimizer, scheduler, metrics = pairs()
        parts = {"train": train, "model": model, "optimizer": optimizer, "scheduler": scheduler} | change(model)
        parts.setdefault("loss_fn", loss_fn)
        return parts["train"], val, parts["model"], parts["loss_fn"], parts["optimizer"], parts["scheduler"], metrics

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
    return {"train": DataLoader(SiameseDataset(TensorDataset(*clusters())), batch_size=8)}


@pytest.mark.parametrize(
    "change",
    [another_model, one_tensor_more, another_optimizer, other_groups, another_scheduler, no_scheduler, no_generator],
)
def test_a_checkpoint_of_another_run_is_an_error_and_stays(tmp_path, change):
    run(of_another_run(change), tmp_path / "run.pt", n_epochs=1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"cannot resume from .*run.pt: it.*left as it is"):
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
        path.write_bytes(pickle.dumps({"format": "siamese-triplet run, 1"}))
    elif kind == "code in a pickle":
        path.write_bytes(pickle.dumps(Evil(path.parent / "executed")))
    elif kind == "code":
        torch.save({"format": "siamese-triplet run, 1", "model": Evil(path.parent / "executed")}, path)
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "weights":
        torch.save(SiameseNet(net()).state_dict(), path)
    elif kind == "a whole model":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "another version":
        torch.save(torch.load(path, weights_only=True) | {"format": "siamese-triplet run, 2"}, path)
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

    monkeypatch.setattr(trainer.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), pytest.warns(UserWarning, match="could not be kept"):
        run(pairs, tmp_path / "run.pt")
    assert contents(tmp_path)["run.pt"] == before["run.pt"]
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
            train, val, model, loss_fn, optimizer, _, metrics = pairs()
            return train, val, model, loss_fn, optimizer, LambdaLR(optimizer, rate), metrics

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
    weights, history = tests.run(tests.classification, path, n_epochs=30)
    torch.save((weights, history), path + ".result")
    os._exit(0)

def start(path):
    pid = os.fork()
    return pid or child(path)

began = time.perf_counter()
os.waitpid(start(path + "whole"), 0)
whole = time.perf_counter() - began
moments = random.Random(int(sys.argv[2]))
for _ in range(5):
    pid = start(path)
    time.sleep(moments.uniform(0.05, 0.3) * whole)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    epoch = torch.load(path, weights_only=True)["epoch"] if os.path.exists(path) else 0
    print("killed after epoch" if os.WIFSIGNALED(status) else "ended after epoch", epoch)
os.waitpid(start(path), 0)
"""


def test_a_run_killed_five_times_ends_bit_identical(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run.pt"), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed") == 5
    results = [torch.load(tmp_path / f"run.pt{name}.result", weights_only=False) for name in ("", "whole")]
    assert_equal_runs(*results)
    assert len(results[0][1]) == 30
