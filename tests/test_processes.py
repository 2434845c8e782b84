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


def assert_as_in_one(together, alone, shares):
    """Losses and counts of each process are those of one, its gradient the share of that one's times the processes."""
    for rank, (loss, count, gradient) in enumerate(together):
        assert float(loss) == pytest.approx(float(alone[0]), rel=1e-6, abs=1e-6)
        assert torch.equal(loss, together[0][0])  # to the last bit, so that the processes cannot drift apart
        assert count == alone[1]
        expected = len(shares) * alone[2].split(shares)[rank]
        assert gradient.dtype == expected.dtype
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6 * float(alone[2].abs().max() + 1))


@pytest.mark.parametrize("name", processes.LOSSES)
def test_losses_and_gradients_are_those_of_one_process(of_processes, name):
    alone = processes.calls(GlobalBatchLoss(processes.LOSSES[name](), seed=7))
    for call, shares in enumerate(processes.SHARES[len(of_processes)]):
        assert_as_in_one([results["losses"][name][call] for results in of_processes], alone[call], shares)
    assert all(loss > 0 and gradient.any() for loss, _, gradient in alone)


@pytest.mark.parametrize("name", processes.LOSSES)
def test_processes_train_as_one_with_the_whole_batch(of_processes, name):
    alone = processes.train(processes.make_model(), GlobalBatchLoss(processes.LOSSES[name](), seed=7))
    for results in of_processes:
        assert distance(results["trained"][name], alone) < 1e-6
    assert distance(alone, processes.make_model().state_dict()) > 0.01


@pytest.mark.parametrize("name", processes.SHARED)
def test_each_process_does_its_share_of_the_work(of_processes, name):
    B, W = 512, len(of_processes)
    alone = processes.work_of(GlobalBatchLoss(processes.LOSSES[name]()), B)
    for results in of_processes:
        total, largest, saved = results["work"][name]
        assert total < 1.25 * alone[0] / W
        assert largest <= B * B / W  # distances of the own anchors from all embeddings
        assert saved <= alone[2] + 20 * B  # the gathered embeddings, and a few numbers of each


@pytest.mark.parametrize("name", processes.OURS)
def test_what_a_global_loss_saves_grows_linearly(name):
    half, whole = (processes.work_of(GlobalBatchLoss(processes.LOSSES[name]()), B)[2] for B in (256, 512))
    assert whole <= 2.1 * half


def test_half_precision_is_computed_in_float32(of_processes):
    alone = processes.calls(GlobalBatchLoss(BatchAllTripletLoss(1.0)), dtype=torch.bfloat16)
    for results in of_processes:
        for (loss, count, gradient), expected in zip(results["bfloat16"], alone):
            assert float(loss) == pytest.approx(float(expected[0]), rel=1e-6)
            assert count == expected[1]
            assert gradient.dtype == torch.bfloat16


def test_validation_is_that_of_the_loss_alone_over_all_processes(of_processes):
    expected, count = BatchAllTripletLoss(1.0)(*processes.embeddings_of(0))
    for results in of_processes:
        assert float(results["validation"][0]) == pytest.approx(float(expected), rel=1e-6)
        assert results["validation"][1] == count


def test_labels_of_any_kind_are_gathered(of_processes):
    for name, convert in processes.LABELS.items():
        expected = processes.of_labels(convert)
        for results in of_processes:
            assert float(results["labels"][name]) == pytest.approx(float(expected), rel=1e-6), name


def test_labels_that_are_no_numbers_are_refused_in_words(of_processes):
    assert all("labels that are numbers" in results["strings"] for results in of_processes)


def test_second_derivatives_over_processes_are_refused_in_words(of_processes):
    for results in of_processes:
        for name, message in results["second"].items():
            assert "second derivative" in message, name


@pytest.mark.parametrize("name", processes.OURS)
def test_references_of_all_processes_are_compared_with(of_processes, name):
    alone = processes.of_two_encoders(name)
    for k in (0, 1):  # the gradient of the embeddings, and that of the references
        together = [
            (*results["two encoders"][name][:2], results["two encoders"][name][2 + k]) for results in of_processes
        ]
        assert_as_in_one(together, (*alone[:2], alone[2 + k]), processes.SHARES[len(of_processes)][1 + k])


def test_processes_resume_their_draws(of_processes):
    for results in of_processes:
        went_on, resumed = results["resumed draws"]
        for call, other in zip(went_on, resumed):
            assert all(torch.equal(x, y) for x, y in zip(call, other))
        assert went_on[0][0] != went_on[1][0]


def test_a_group_of_processes_is_a_batch_of_its_own(of_processes):
    for group in range(len(of_processes) // 2):
        embeddings, labels = processes.embeddings_of(group)
        loss, count = BatchAllTripletLoss(1.0)(embeddings.requires_grad_(), labels)
        alone = (loss.detach(), count, *torch.autograd.grad(loss, embeddings))
        together = [results["pairs of processes"] for results in of_processes[2 * group : 2 * group + 2]]
        assert_as_in_one(together, alone, [12, 12])


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


def test_labels_of_different_kinds_are_an_error(of_processes):
    assert all("labels of one kind in all processes" in results["kinds"] for results in of_processes)


def test_mean_over_processes_of_a_margins_gradient_is_that_of_one(of_processes):
    mean = torch.stack([results["margin"] for results in of_processes]).mean()
    torch.testing.assert_close(mean, processes.gradient_of_margin())
    assert mean > 0


@pytest.mark.parametrize("name", processes.FIXED)
def test_global_loss_of_one_process_is_the_loss(name):
    expected = processes.calls(processes.FIXED[name]())
    for call, expected_call in zip(processes.calls(GlobalBatchLoss(processes.FIXED[name]())), expected):
        assert all(torch.equal(x, y) for x, y in zip(call, expected_call))


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
