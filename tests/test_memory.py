"""Tests of MemoryLoss: the references are the batch and the last embeddings before it, as loops over a list say."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from checkpoints import Checkpoint
from datasets import BalancedBatchSampler
from losses import BatchAllTripletLoss, ContrastiveLoss, GlobalBatchLoss, MemoryLoss, OnlineContrastiveLoss
from losses import OnlineTripletLoss as Triplets
from trainer import fit, test_epoch
from utils import (
    AllPositivePairSelector,
    AllTripletSelector,
    BatchHardTripletSelector,
    FunctionNegativeTripletSelector,
    HardestNegativeTripletSelector,
    HardNegativePairSelector,
    RandomNegativeTripletSelector,
    SemihardNegativeTripletSelector,
    hardest_negative,
)

MARGIN = 1.0
BATCHES = [9, 5, 9, 1, 9, 14, 9]  # their sizes


def batch(call, B=12, dtype=torch.float64):
    """Embeddings (B, 3) and labels of four classes in no order."""
    generator = torch.Generator().manual_seed(call)
    labels = torch.randint(4, (B,), generator=generator)
    return (torch.randn(B, 3, generator=generator, dtype=torch.float64) + 0.2 * labels[:, None]).to(dtype), labels


def as_tuple(output):
    return output if isinstance(output, tuple) else (output,)


def call(loss_fn, x, labels):
    """Loss, perhaps count, and gradient."""
    x = x.clone().requires_grad_()
    output = as_tuple(loss_fn(x, labels))
    return (output[0].detach(), *output[1:], *torch.autograd.grad(output[0], x))


def assert_same(results, others):
    assert len(results) == len(others)
    for result, other in zip(results, others):
        assert len(result) == len(other)
        assert all(torch.equal(x, y) for x, y in zip(result, other))


# --- oracles: loops over the batch, references 0 to B - 1, and the memory behind it


def naive_distances(points, B):
    return [[((x - y) ** 2).sum() for y in points] for x in points[:B]]


def naive_same(labels, i, B, both_directions):
    """References of the class of anchor i: behind it in the batch, or all but itself, and in the memory."""
    return [j for j in range(len(labels)) if labels[j] == labels[i] and (j > i or (both_directions and j != i))]


def naive_other(labels, i):
    return [k for k in range(len(labels)) if labels[k] != labels[i]]


def naive_all(distances, labels, B, both_directions=False):
    for i in range(B):
        for j in naive_same(labels, i, B, both_directions):
            for k in naive_other(labels, i):
                yield i, j, k


def naive_hardest(distances, labels, B, both_directions=False):
    for i in range(B):
        for j in naive_same(labels, i, B, both_directions):
            k = min(naive_other(labels, i), key=lambda k: distances[i][k].item(), default=None)
            if k is not None and distances[i][j] - distances[i][k] + MARGIN > 0:
                yield i, j, k


def naive_batch_hard(distances, labels, B):
    for i in range(B):
        same, others = naive_same(labels, i, B, both_directions=True), naive_other(labels, i)
        if same and others:
            j = max(same, key=lambda j: distances[i][j].item())
            yield i, j, min(others, key=lambda k: distances[i][k].item())


def naive_triplets(choose, mean_of_active=False, **kwargs):
    def oracle(points, labels, B):
        distances = naive_distances(points, B)
        triplets = choose(distances, labels, B, **kwargs)
        losses = [(distances[i][j] - distances[i][k] + MARGIN).clamp(min=0) for i, j, k in triplets]
        count = sum(loss.item() > 0 for loss in losses)
        total = sum(losses, 0 * points.sum())
        return total / max(1, count if mean_of_active else len(losses)), torch.tensor(count)

    return oracle


def naive_pairs(hard_only):
    def oracle(points, labels, B):
        distances, positive, negative = naive_distances(points, B), [], []
        for i in range(B):
            for j in range(i + 1, len(points)):
                (positive if labels[i] == labels[j] else negative).append(distances[i][j])
        if hard_only:
            negative = sorted(negative, key=lambda x: x.item())[: len(positive)]
        losses = positive + [(MARGIN - distance.sqrt()).clamp(min=0) ** 2 for distance in negative]
        return (sum(losses, 0 * points.sum()) / max(1, len(losses)),)

    return oracle


# Name: the loss, and what it gives for points (B + M, D), their labels and B.
LOSSES = {
    "batch-all": (
        lambda: BatchAllTripletLoss(MARGIN),
        naive_triplets(naive_all, mean_of_active=True, both_directions=True),
    ),
    "batch-all, i < j, mean of all": (
        lambda: BatchAllTripletLoss(MARGIN, both_directions=False, average="all"),
        naive_triplets(naive_all),
    ),
    "all triplets": (lambda: Triplets(MARGIN, AllTripletSelector()), naive_triplets(naive_all)),
    "batch-hard": (lambda: Triplets(MARGIN, BatchHardTripletSelector()), naive_triplets(naive_batch_hard)),
    "hardest": (lambda: Triplets(MARGIN, HardestNegativeTripletSelector(MARGIN)), naive_triplets(naive_hardest)),
    "hardest, both directions": (
        lambda: Triplets(MARGIN, HardestNegativeTripletSelector(MARGIN, both_directions=True)),
        naive_triplets(naive_hardest, both_directions=True),
    ),
    "function": (
        lambda: Triplets(MARGIN, FunctionNegativeTripletSelector(MARGIN, hardest_negative)),
        naive_triplets(naive_hardest),
    ),
    "all pairs": (
        lambda: OnlineContrastiveLoss(MARGIN, AllPositivePairSelector(balance=False)),
        naive_pairs(hard_only=False),
    ),
    "hard pairs": (lambda: OnlineContrastiveLoss(MARGIN, HardNegativePairSelector()), naive_pairs(hard_only=True)),
}
RANDOM = {
    "random": lambda: Triplets(MARGIN, RandomNegativeTripletSelector(MARGIN)),
    "semi-hard": lambda: Triplets(MARGIN, SemihardNegativeTripletSelector(MARGIN)),
    "balanced pairs": lambda: OnlineContrastiveLoss(MARGIN, AllPositivePairSelector()),
}
EVERY = {name: loss for name, (loss, _) in LOSSES.items()} | RANDOM


def naive_memory(oracle, size, sizes=BATCHES):
    """Loss, perhaps count, and gradient of each call, as `call` has them."""
    memory, memory_labels = torch.empty(0, 3, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    for number, B in enumerate(sizes):
        x, labels = batch(number, B)
        x.requires_grad_()
        all_labels = torch.cat((labels, memory_labels)).tolist()
        output = oracle(torch.cat((x, memory)), all_labels, B)
        yield (output[0].detach(), *output[1:], *torch.autograd.grad(output[0], x))
        memory = torch.cat((memory, x.detach()))[-size:]
        memory_labels = torch.cat((memory_labels, labels))[-size:]


# --- value and gradient


@pytest.mark.parametrize("size", [1, 5, 9, 13])
@pytest.mark.parametrize("name", LOSSES)
def test_memory_loss_is_that_of_loops_over_batch_and_memory(name, size):
    loss_fn = MemoryLoss(LOSSES[name][0](), size)
    n_active = 0
    for number, expected in enumerate(naive_memory(LOSSES[name][1], size)):
        x, labels = batch(number, BATCHES[number])
        *output, gradient = call(loss_fn, x, labels)
        assert float(output[0]) == pytest.approx(float(expected[0]), rel=1e-6, abs=1e-9)
        assert output[1:] == list(expected[1:-1])
        torch.testing.assert_close(gradient, expected[-1], rtol=1e-6, atol=1e-6)
        n_active += bool(output[0] > 0)
    assert n_active > 4


def test_memory_larger_than_all_batches_holds_all():
    loss_fn, sizes = MemoryLoss(BatchAllTripletLoss(MARGIN), 1000), [12, 7, 12, 12]
    for number, expected in enumerate(naive_memory(LOSSES["batch-all"][1], 1000, sizes)):
        loss, count, gradient = call(loss_fn, *batch(number, sizes[number]))
        assert float(loss) == pytest.approx(float(expected[0]), rel=1e-6)
        assert count == expected[1]
        torch.testing.assert_close(gradient, expected[2], rtol=1e-6, atol=1e-6)


def test_memory_loss_of_numbers_worked_by_hand():
    loss_fn = MemoryLoss(BatchAllTripletLoss(margin=1.0), size=2)
    assert loss_fn(torch.tensor([[2.0], [1.0]]), torch.tensor([0, 1])) == (0, 0)  # no class twice
    loss, count = loss_fn(torch.tensor([[0.0]]), torch.tensor([0]))  # 4 - 1 + 1, of anchor 0, positive 2, negative 1
    assert (float(loss), int(count)) == (4.0, 1)
    loss, count = loss_fn(torch.tensor([[0.0]]), torch.tensor([0]))  # 2 is forgotten: 0 - 1 + 1 is not active
    assert (float(loss), int(count)) == (0.0, 0)


@pytest.mark.parametrize("name", EVERY)
def test_first_batch_is_as_without_memory(name):
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(3)
        expected = call(EVERY[name](), *batch(0, 30, dtype))
        torch.manual_seed(3)
        assert_same([call(MemoryLoss(EVERY[name](), 50), *batch(0, 30, dtype))], [expected])


@pytest.mark.parametrize("name", ["random", "semi-hard"])
def test_random_negatives_come_from_batch_and_memory_alike(name):
    # One pair: the batch's first embedding and the memory's. Its loss tells which negative was drawn.
    loss_fn = MemoryLoss(RANDOM[name](), 3)
    positive, negatives = 0.5, [0.6, 0.7, 0.8, 0.9]
    losses = [positive**2 - x**2 + MARGIN for x in negatives]
    seen = np.zeros(4, dtype=int)
    for _ in range(200):
        loss_fn(torch.tensor([[positive], [negatives[0]], [negatives[1]]]), torch.tensor([0, 1, 2]))
        x = torch.tensor([[0.0], [negatives[2]], [negatives[3]]])
        loss, count = copy.deepcopy(loss_fn)(x, torch.tensor([0, 3, 4]))
        assert count == 1
        seen[np.argmin(np.abs(np.array(losses) - float(loss)))] += 1
    assert ((seen - 50) ** 2 / 50).sum() < 16.3  # chi-square with 3 degrees of freedom, 0.1 per cent


def test_balanced_pairs_are_as_many_negative_as_positive_over_batch_and_memory():
    x = torch.zeros(4, 1)  # positive pairs cost 0, negative ones the square of the margin
    loss_fn = MemoryLoss(OnlineContrastiveLoss(MARGIN, AllPositivePairSelector()), 8)
    for _ in range(3):
        loss = loss_fn(x, torch.tensor([0, 0, 1, 1]))
        assert float(loss) == pytest.approx(0.5)


def test_memory_is_detached_and_no_view_of_the_embeddings():
    loss_fn, other = (MemoryLoss(BatchAllTripletLoss(MARGIN), 20) for _ in range(2))
    x, labels = batch(0)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    embeddings = x * weight
    loss_fn(embeddings, labels)[0].backward()
    other(x.clone(), labels)
    with torch.no_grad():
        embeddings.zero_()
    loss_fn(batch(1)[0] * weight, batch(1)[1])[0].backward()  # which the graph of the first batch has no part in
    other(*batch(1))
    assert not any(x.requires_grad for x in tensors(loss_fn.state_dict()).values())
    assert_same([call(loss_fn, *batch(2))], [call(other, *batch(2))])


def test_empty_and_single_batches_are_legal():
    loss_fn = MemoryLoss(BatchAllTripletLoss(MARGIN), 20)
    for B in (0, 1, 12, 0, 1, 0):
        loss, _, gradient = call(loss_fn, *batch(B, B))
        assert torch.isfinite(loss)
        assert gradient.shape == (B, 3)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings(dtype):
    loss_fn, other = (MemoryLoss(BatchAllTripletLoss(MARGIN), 17) for _ in range(2))
    for number, B in enumerate(BATCHES):
        x, labels = batch(number, B, dtype)
        loss, count, gradient = call(loss_fn, x, labels)
        expected = call(other, x.float(), labels)
        assert loss.dtype == torch.float32
        assert gradient.dtype == dtype
        assert float(loss) == pytest.approx(float(expected[0]), rel=1e-6)
        assert count == expected[1]
        torch.testing.assert_close(gradient, expected[2].to(dtype), rtol=0.02, atol=1e-5)


def test_precision_may_change_between_batches():
    loss_fn, other = (MemoryLoss(BatchAllTripletLoss(MARGIN), 17) for _ in range(2))
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64, torch.float32)):
        x = batch(number)[0].to(torch.bfloat16)  # numbers that all of these hold
        results = [call(loss, x.to(d), batch(number)[1]) for loss, d in ((loss_fn, dtype), (other, torch.float64))]
        assert float(results[0][0]) == pytest.approx(float(results[1][0]), rel=1e-5)
        assert results[0][1] == results[1][1]


def test_module_moves_to_another_dtype():
    loss_fn, other = (MemoryLoss(BatchAllTripletLoss(MARGIN), 17) for _ in range(2))
    for number in range(3):
        call(loss_fn, *batch(number, dtype=torch.float32))
        call(other, *batch(number, dtype=torch.float32))
    loss_fn.double()
    for number in range(3, 6):
        results = [call(x, *batch(number, dtype=d)) for x, d in ((loss_fn, torch.float64), (other, torch.float32))]
        assert float(results[0][0]) == pytest.approx(float(results[1][0]), rel=1e-5)
        assert results[0][1] == results[1][1]


@pytest.mark.gpu
def test_module_moves_to_another_device(gpu_unread):
    for moved_first in (False, True):
        loss_fn, other = (MemoryLoss(BatchAllTripletLoss(MARGIN), 17) for _ in range(2))
        if not moved_first:
            call(loss_fn, *batch(0))
            call(other, *batch(0))
        loss_fn.cuda()
        for number in range(1, 5):
            x, labels = (value.cuda() for value in batch(number))
            with gpu_unread():
                result = call(loss_fn, x, labels)
            expected = call(other, *batch(number))
            assert float(result[0]) == pytest.approx(float(expected[0]), rel=1e-6)
            assert result[1].cpu() == expected[1]


@pytest.mark.slow
def test_compiled_it_is_the_same():
    torch._dynamo.reset()
    loss_fn, other = (MemoryLoss(BatchAllTripletLoss(MARGIN), 17) for _ in range(2))
    compiled = torch.compile(loss_fn, backend="eager")
    for number, B in enumerate([9, 9, 7]):
        loss, count, gradient = call(compiled, *batch(number, B))
        expected = call(other, *batch(number, B))
        assert float(loss) == pytest.approx(float(expected[0]), rel=1e-6)
        assert count == expected[1]
        torch.testing.assert_close(gradient, expected[2], rtol=1e-6, atol=1e-6)
    assert_same_state(loss_fn, other)


# --- state


def tensors(state):
    """The tensors of a state dict, also those in an extra state, by name."""
    values = [(key, x if isinstance(x, dict) else {"": x}) for key, x in state.items()]
    return {f"{key} {name}": x for key, held in values for name, x in held.items()}


def assert_same_state(loss_fn, other):
    state, other_state = tensors(loss_fn.state_dict()), tensors(other.state_dict())
    assert state.keys() == other_state.keys()
    for key, x in state.items():
        assert torch.equal(x, other_state[key]) if torch.is_tensor(x) else x == other_state[key]


def after(n_calls, name="random", size=17):
    loss_fn = MemoryLoss(EVERY[name](), size)
    for number in range(n_calls):
        call(loss_fn, *batch(number, BATCHES[number]))
    return loss_fn


def calls_from(loss_fn, first):
    torch.manual_seed(4)
    return [call(loss_fn, *batch(number, BATCHES[number])) for number in range(first, len(BATCHES))]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("n_calls", [0, 1, 3])
def test_state_goes_into_a_fresh_loss_bit_by_bit(name, n_calls):
    loss_fn, fresh, used = after(n_calls, name), after(0, name), after(5, name)
    file = io.BytesIO()
    torch.save(loss_fn.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    expected = calls_from(copy.deepcopy(loss_fn), n_calls)
    for other in (fresh, used):
        other.load_state_dict(state)
        assert_same_state(loss_fn, other)
        assert_same(calls_from(other, n_calls), expected)


def test_state_of_a_module_that_holds_the_loss():
    class Holder(nn.Module):
        def __init__(self, loss_fn):
            super().__init__()
            self.loss_fn, self.head = loss_fn, nn.Linear(2, 2)

    holder = Holder(after(3))
    other = Holder(after(0))
    other.load_state_dict(holder.state_dict())
    assert_same(calls_from(other.loss_fn, 3), calls_from(holder.loss_fn, 3))


def test_a_state_that_was_loaded_is_a_copy():
    loss_fn, other = after(3), after(0)
    state = copy.deepcopy(loss_fn.state_dict())
    other.load_state_dict(loss_fn.state_dict())
    calls_from(other, 3)
    unchanged = after(0)
    unchanged.load_state_dict(state)
    assert_same_state(loss_fn, unchanged)


def test_of_the_state_of_a_larger_memory_the_last_are_used():
    loss_fn = after(0, size=5)
    loss_fn.load_state_dict(after(3, size=17).state_dict())
    assert_same(calls_from(loss_fn, 3), calls_from(after(3, size=5), 3))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_alike_and_apart(duplicate):
    for n_calls in (0, 3):
        loss_fn = after(n_calls)
        other = duplicate(loss_fn)
        expected = calls_from(loss_fn, n_calls)
        assert_same(calls_from(other, n_calls), expected)


def test_evaluation_is_the_loss_alone_and_leaves_no_trace():
    loss_fn, other, alone = after(3, "batch-all"), after(3, "batch-all"), BatchAllTripletLoss(MARGIN)
    loss_fn.eval()
    for number in range(20, 24):
        assert_same([call(loss_fn, *batch(number, 30))], [call(alone, *batch(number, 30))])
    assert_same_state(loss_fn, other)
    assert_same(calls_from(loss_fn.train(), 3), calls_from(other, 3))


def test_evaluation_before_the_first_batch_leaves_no_trace():
    loss_fn = after(0, "batch-all").eval()
    call(loss_fn, *batch(20, 30))
    assert_same_state(loss_fn, after(0, "batch-all"))
    assert_same(calls_from(loss_fn.train(), 0), calls_from(after(0, "batch-all"), 0))


# --- in fit


def make_run(name):
    torch.manual_seed(0)
    labels = torch.arange(60) % 5
    data = TensorDataset(torch.randn(60, 4) + 0.3 * labels[:, None], labels)
    loader = DataLoader(data, batch_sampler=BalancedBatchSampler(labels, 3, 3, seed=1))
    model = nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 3))
    optimizer = SGD(model.parameters(), 0.02, momentum=0.9)
    return loader, DataLoader(data, 15), model, MemoryLoss(EVERY[name](), 25), optimizer


def trained(name, n_epochs=4, validate=True, wrap=lambda loss_fn: loss_fn, **kwargs):
    """Weights and memory after so many epochs, and the losses of each."""
    train, val, model, loss_fn, optimizer = make_run(name)
    loss_fn = wrap(loss_fn)
    history = fit(train, val if validate else None, model, loss_fn, optimizer, None, n_epochs, False, 0, **kwargs)
    return model, loss_fn, [row["train_loss"] for row in history]


class Interruption(Exception):
    pass


@pytest.mark.parametrize("wrap", [lambda loss_fn: loss_fn, GlobalBatchLoss], ids=["alone", "global"])
@pytest.mark.parametrize("name", ["batch-all", "random", "hard pairs"])
def test_a_resumed_run_ends_in_the_same_weights_and_memory(tmp_path, name, wrap):
    def interrupt(row):
        if row["epoch"] == 2:
            raise Interruption

    expected = trained(name, wrap=wrap)
    with pytest.raises(Interruption):
        trained(name, wrap=wrap, checkpoint=Checkpoint(tmp_path / "run.pt"), on_epoch=interrupt)
    resumed = trained(name, wrap=wrap, checkpoint=Checkpoint(tmp_path / "run.pt"))
    assert resumed[2] == expected[2]
    for module, other in zip(resumed[:2], expected[:2]):
        assert_same_state(module, other)


def test_validation_changes_no_training():
    for name in ("batch-all", "hardest"):
        with_validation, without = (trained(name, validate=validate) for validate in (True, False))
        assert with_validation[2] == without[2]
        for module, other in zip(with_validation[:2], without[:2]):
            assert_same_state(module, other)


def test_validation_loss_is_that_without_memory():
    model, loss_fn, _ = trained("batch-all")
    val = make_run("batch-all")[1]
    loss, _ = test_epoch(val, model, loss_fn, False, [])
    assert loss == test_epoch(val, model, BatchAllTripletLoss(MARGIN), False, [])[0]
    assert loss_fn.training


# --- labels, selectors, arguments


@pytest.mark.parametrize(
    "convert",
    [
        lambda labels: labels - 2,
        lambda labels: labels + 2**62,
        lambda labels: 2**63 - 1 - labels,
        lambda labels: labels.to(torch.uint8),
        lambda labels: labels.to(torch.uint16),
        lambda labels: labels.tolist(),
        lambda labels: labels.numpy().astype(np.int16),
        lambda labels: labels[:, None],
    ],
)
def test_labels_of_any_value_and_kind(convert):
    loss_fn, other = (MemoryLoss(BatchAllTripletLoss(MARGIN), 17) for _ in range(2))
    for number, B in enumerate(BATCHES):
        x, labels = batch(number, B)
        assert_same([call(loss_fn, x, convert(labels))], [call(other, x, labels)])


def test_bool_labels():
    loss_fn, other = (MemoryLoss(BatchAllTripletLoss(MARGIN), 17) for _ in range(2))
    for number in range(3):
        x, labels = batch(number)
        assert_same([call(loss_fn, x, labels > 1)], [call(other, x, (labels > 1).long())])


def test_float_labels_are_kept_apart():
    loss_fn, other = (MemoryLoss(BatchAllTripletLoss(MARGIN), 17) for _ in range(2))
    for number in range(3):
        x, labels = batch(number)
        assert_same([call(loss_fn, x, labels / 8)], [call(other, x, labels)])


def test_string_labels_are_refused_in_words():
    loss_fn = MemoryLoss(BatchAllTripletLoss(MARGIN), 17)
    with pytest.raises((TypeError, ValueError), match="labels"):
        loss_fn(batch(0, 2)[0], ["a", "b"])


class FirstTriplets:
    """A user's own selector, which knows no references."""

    def get_triplets(self, embeddings, labels):
        return np.array([[0, 1, 2]])


class FirstPairs:
    def get_pairs(self, embeddings, labels):
        return torch.tensor([[0, 1]]), torch.tensor([[0, 2], [1, 2]])


@pytest.mark.parametrize("loss", [Triplets(MARGIN, FirstTriplets()), OnlineContrastiveLoss(MARGIN, FirstPairs())])
def test_a_selector_without_references_is_refused_from_the_second_batch_on(loss):
    loss_fn, x = MemoryLoss(loss, 17), torch.tensor([[0.0], [2.0], [1.0]])
    assert_same([call(loss_fn, x, torch.tensor([0, 0, 1]))], [call(loss, x, torch.tensor([0, 0, 1]))])
    for _ in range(2):
        with pytest.raises(TypeError, match="reference"):
            loss_fn(x, torch.tensor([0, 0, 1]))
    assert_same([call(loss_fn.eval(), x, torch.tensor([0, 0, 1]))], [call(loss, x, torch.tensor([0, 0, 1]))])


class OwnTriplets:
    """A user's own selector, which knows references: every triplet of one loop after the other."""

    def get_triplets(self, embeddings, labels, *, reference=None, reference_labels=None):
        is_batch = reference is None
        columns = labels if is_batch else reference_labels
        found = [
            (i, j, k)
            for i in range(len(labels))
            for j in range(i + 1 if is_batch else 0, len(columns))
            for k in range(len(columns))
            if labels[i] == columns[j] != columns[k]
        ]
        return torch.tensor(found, dtype=torch.int64).reshape(-1, 3)


class Subclass(HardestNegativeTripletSelector):
    """A selector of the library that a user has changed, for instance to count."""

    n_triplets = 0

    def get_triplets(self, *args, **kwargs):
        triplets = super().get_triplets(*args, **kwargs)
        self.n_triplets += len(triplets)
        return triplets


@pytest.mark.parametrize(
    ("own", "ours"),
    [
        # Given references, each pair of anchor and reference is one: of those in the batch, too.
        (OwnTriplets(), AllTripletSelector(both_directions=True)),
        (Subclass(MARGIN, both_directions=True), HardestNegativeTripletSelector(MARGIN, both_directions=True)),
        (Subclass(MARGIN), HardestNegativeTripletSelector(MARGIN)),
    ],
    ids=["own", "subclass, both directions", "subclass"],
)
def test_a_users_selector_that_knows_references_is_asked_for_those_of_batch_and_memory(own, ours):
    loss_fn, other = (MemoryLoss(Triplets(MARGIN, selector), 17) for selector in (own, ours))
    for number, B in enumerate(BATCHES[1:], start=1):
        result, expected = (call(loss, *batch(number, B)) for loss in (loss_fn, other))
        if number > 1:
            assert float(result[0]) == pytest.approx(float(expected[0]), rel=1e-6)
            assert result[1] == expected[1]
            torch.testing.assert_close(result[2], expected[2], rtol=1e-6, atol=1e-6)
    assert getattr(own, "n_triplets", 1) > 0


@pytest.mark.parametrize("size", [0, -1, 2.5, None, "10"])
def test_size_is_a_positive_whole_number(size):
    with pytest.raises((TypeError, ValueError), match="size"):
        MemoryLoss(BatchAllTripletLoss(MARGIN), size)


@pytest.mark.parametrize("loss", [ContrastiveLoss(MARGIN), lambda embeddings, target: embeddings.sum()])
def test_a_loss_that_knows_no_references_is_refused_in_words(loss):
    def two_batches():
        loss_fn = MemoryLoss(loss, 10)
        return [loss_fn(*batch(number)) for number in range(2)]

    with pytest.raises(TypeError, match="reference"):
        two_batches()


def test_embeddings_of_another_width_are_an_error_in_words():
    loss_fn = after(3)
    expected = copy.deepcopy(loss_fn)
    with pytest.raises(ValueError, match=r"3.*5|5.*3"):
        loss_fn(torch.randn(4, 5), torch.arange(4) % 2)
    assert_same(calls_from(loss_fn, 3), calls_from(expected, 3))


@pytest.mark.parametrize(
    ("x", "labels", "error"),
    [
        (torch.zeros(4, 3), torch.zeros(5), ValueError),
        (torch.zeros(4, 3, 1), torch.zeros(4), ValueError),
        (torch.zeros(4, 3), torch.tensor([0, 1, torch.nan, 0]), ValueError),
        (torch.zeros(4, 3), None, TypeError),
    ],
)
def test_a_batch_that_is_refused_is_not_remembered(x, labels, error):
    for n_calls in (0, 2):
        loss_fn, expected = after(n_calls, "batch-all"), after(n_calls, "batch-all")
        with pytest.raises(error):
            loss_fn(x.double(), labels)
        assert_same_state(loss_fn, expected)
