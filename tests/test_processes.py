"""Tests of several processes: together they train as one does with the whole batch."""

import os
import subprocess
import sys

import processes
import pytest
import torch

from losses import BatchAllTripletLoss, GlobalBatchLoss, OnlineTripletLoss
from utils import RandomNegativeTripletSelector


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)])
def of_processes(request, tmp_path_factory):
    """What each of 2 and of 4 processes returned."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, processes.__file__, str(rank), str(request.param), str(folder)], env=environment
        )
        for rank in range(request.param)
    ]
    assert [process.wait(timeout=300) for process in running] == [0] * request.param
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


pytestmark = pytest.mark.xdist_group("processes")  # one process of pytest sets them up, for all


def distance(weights, others):
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


@pytest.mark.parametrize("name", processes.LOSSES)
def test_processes_train_as_one_with_the_whole_batch(of_processes, name):
    loss_fn = GlobalBatchLoss(processes.LOSSES[name](), seed=7)
    alone = processes.train(processes.make_model(), loss_fn)
    for results in of_processes:
        assert distance(results[name], alone) < 1e-6
    assert distance(alone, processes.make_model().state_dict()) > 0.01


@pytest.mark.parametrize("way", ["no factor", "local", "detached"])
def test_wrong_ways_to_gather_train_otherwise(of_processes, way):
    alone = processes.train(processes.make_model(), BatchAllTripletLoss(1.0))
    assert distance(of_processes[0][way], alone) > 1e-4


def test_processes_evaluate_each_sample_once_and_in_order(of_processes):
    alone = processes.evaluate()
    for results in of_processes:
        together = results["evaluation"]
        assert together.keys() == alone.keys()
        assert torch.equal(together["labels"], alone["labels"])
        torch.testing.assert_close(together["embeddings"], alone["embeddings"])
        for name in ("recall@1", "map@r", "n_queries", "accuracy", "spread", "effective_rank", "norm"):
            assert together[name] == pytest.approx(alone[name], rel=1e-6), name
        assert together["loss"] == of_processes[0]["evaluation"]["loss"]


def test_processes_resume_from_one_file(of_processes):
    for results in of_processes:
        assert distance(results["resumed"], results["whole"]) == 0
        assert torch.equal(results["whole"]["losses"], of_processes[0]["whole"]["losses"])
    assert len(results["whole"]["losses"]) == 8


def test_the_first_process_ends_the_training_of_all(of_processes):
    assert [results["n_epochs"] for results in of_processes] == [2] * len(of_processes)


def test_embeddings_of_different_widths_are_an_error(of_processes):
    assert all("one D in all processes" in results["message"] for results in of_processes)


def test_global_loss_of_one_process_is_the_loss():
    embeddings, labels = torch.randn(12, 3, requires_grad=True), torch.arange(12) % 3
    loss_fn = BatchAllTripletLoss(1.0)
    expected, count = loss_fn(embeddings, labels)
    loss, own_count = GlobalBatchLoss(loss_fn)(embeddings, labels)
    assert (loss, own_count) == (expected, count)
    assert torch.equal(torch.autograd.grad(loss, embeddings)[0], torch.autograd.grad(expected, embeddings)[0])


def test_global_loss_draws_by_its_seed_and_leaves_the_callers_generator_alone():
    embeddings, labels = torch.randn(40, 3), torch.arange(40) % 4

    def losses(seed, n=3):
        loss_fn = GlobalBatchLoss(OnlineTripletLoss(1.0, RandomNegativeTripletSelector(1.0)), seed=seed)
        return [float(loss_fn(embeddings, labels)[0]) for _ in range(n)]

    state = torch.get_rng_state()
    first = losses(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert losses(0) == first
    assert losses(1) != first
    assert len(set(first)) == 3  # draws anew at each call


def test_global_loss_resumes_its_draws():
    embeddings, labels = torch.randn(40, 3), torch.arange(40) % 4
    loss_fn, other = (GlobalBatchLoss(OnlineTripletLoss(1.0, RandomNegativeTripletSelector(1.0))) for _ in range(2))
    loss_fn(embeddings, labels)
    other.load_state_dict(loss_fn.state_dict())
    assert other(embeddings, labels) == loss_fn(embeddings, labels)


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)  # no threads yet, so that this process may be copied
import processes

folder, n_processes, n_epochs = sys.argv[1], 2, 100

def start(name, turn):
    children = []
    for rank in range(n_processes):
        pid = os.fork()
        if pid == 0:
            store = f"file://{folder}/store-{name}-{turn}"
            torch.distributed.init_process_group("gloo", store, rank=rank, world_size=n_processes)
            result = processes.resume(rank, n_processes, f"{folder}/{name}", n_epochs)
            torch.save(result, f"{folder}/{name}-{rank}.result")
            os._exit(0)
        children.append(pid)
    return children

def wait(children):
    return [os.waitpid(pid, 0)[1] for pid in children]

path = f"{folder}/run"

def change():
    return os.stat(path).st_mtime_ns if os.path.exists(path) else None

assert wait(start("whole", 0)) == [0, 0]
moments = random.Random(3)
for turn in range(5):
    before, began = change(), time.perf_counter()
    children = start("run", turn)
    while change() == before and time.perf_counter() - began < 60:  # an epoch more, and a part of another
        time.sleep(0.001)
    time.sleep(moments.uniform(0, 0.1))
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    wait(children)
    print("killed after", torch.load(path, weights_only=True)["history"][-1]["epoch"])
assert wait(start("run", 5)) == [0, 0]
"""


@pytest.mark.slow
def test_two_processes_killed_five_times_end_bit_identical(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed after") == 5
    for rank in range(2):
        results = [torch.load(tmp_path / f"{name}-{rank}.result", weights_only=True) for name in ("run", "whole")]
        assert distance(*results) == 0
        assert len(results[0]["losses"]) == 200
