"""What the tests of several processes run in each of them, in a module that imports little."""

import sys

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from checkpoints import Checkpoint
from datasets import BalancedBatchSampler
from evaluation import evaluate_embeddings
from losses import BatchAllTripletLoss, GlobalBatchLoss, MemoryLoss, OnlineContrastiveLoss, OnlineTripletLoss
from metrics import AccumulatedAccuracyMetric, AverageNonzeroTripletsMetric, EmbeddingMetric, EmbeddingStatisticsMetric
from networks import ClassificationNet
from trainer import extract_embeddings, fit, test_epoch
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
    random_hard_negative,
)


class EveryOtherTriplet(HardestNegativeTripletSelector):
    """A user's change of a selector of the library."""

    def get_triplets(self, embeddings, labels, **references):
        return super().get_triplets(embeddings, labels, **references)[::2]


class FirstTriplets:
    """A user's own selector, which returns an array of numpy."""

    def get_triplets(self, embeddings, labels):
        labels = np.asarray(labels)
        same, other = labels[:, None] == labels, labels[:, None] != labels
        np.fill_diagonal(same, False)
        anchors = np.flatnonzero(same.any(axis=1) & other.any(axis=1))
        return np.stack((anchors, same[anchors].argmax(axis=1), other[anchors].argmax(axis=1)), axis=1)


class OwnPairs:
    """A user's own selector of pairs: neighbours in the batch."""

    def get_pairs(self, embeddings, labels):
        pairs = torch.stack((torch.arange(len(labels) - 1), torch.arange(1, len(labels))), dim=1)
        is_same = labels[:-1] == labels[1:]
        return pairs[is_same], pairs[~is_same]


def foreign_loss(embeddings, target):
    """A loss of another library."""
    is_same = (target[:, None] == target).to(embeddings.dtype)
    return nn.functional.binary_cross_entropy_with_logits(embeddings @ embeddings.T, is_same)


def triplets(selector, margin=1.0, **kwargs):
    return OnlineTripletLoss(margin, selector, **kwargs)


def random_of(seed):
    return RandomNegativeTripletSelector(1.0, generator=torch.Generator().manual_seed(seed))


RANDOM = {
    "random": lambda: triplets(RandomNegativeTripletSelector(1.0)),
    "random, both directions": lambda: triplets(RandomNegativeTripletSelector(1.0, both_directions=True)),
    "random, generator": lambda: triplets(random_of(3)),
    "semi-hard": lambda: triplets(SemihardNegativeTripletSelector(1.0)),
    "random function": lambda: triplets(FunctionNegativeTripletSelector(1.0, random_hard_negative)),
    "balanced pairs": lambda: OnlineContrastiveLoss(1.5, AllPositivePairSelector()),
    "memory, random": lambda: MemoryLoss(triplets(RandomNegativeTripletSelector(1.0)), 30),
}
FIXED = {
    "batch-all": lambda: BatchAllTripletLoss(1.0),
    "batch-all, plain distances": lambda: BatchAllTripletLoss(0.5, squared=False),
    "batch-all, i < j": lambda: BatchAllTripletLoss(1.0, both_directions=False),
    "batch-all, mean of all": lambda: BatchAllTripletLoss(1.0, both_directions=False, average="all"),
    "all triplets": lambda: triplets(AllTripletSelector()),
    "batch-hard": lambda: triplets(BatchHardTripletSelector()),
    "batch-hard, soft margin": lambda: triplets(BatchHardTripletSelector(), 0.0, squared=False, soft_margin=True),
    "hardest": lambda: triplets(HardestNegativeTripletSelector(1.0)),
    "hardest, plain distances": lambda: triplets(HardestNegativeTripletSelector(1.0, squared=False), squared=False),
    "function": lambda: triplets(FunctionNegativeTripletSelector(1.0, hardest_negative)),
    "all pairs": lambda: OnlineContrastiveLoss(1.5, AllPositivePairSelector(balance=False)),
    "hard pairs": lambda: OnlineContrastiveLoss(1.5, HardNegativePairSelector()),
    "subclass": lambda: triplets(EveryOtherTriplet(1.0)),
    "own triplets": lambda: triplets(FirstTriplets()),
    "own pairs": lambda: OnlineContrastiveLoss(1.5, OwnPairs()),
    "foreign": lambda: foreign_loss,
    "memory": lambda: MemoryLoss(BatchAllTripletLoss(1.0), 30),
    "memory, hardest": lambda: MemoryLoss(triplets(HardestNegativeTripletSelector(1.0)), 30),
    "memory, subclass": lambda: MemoryLoss(triplets(EveryOtherTriplet(1.0)), 30),
    "memory, hard pairs": lambda: MemoryLoss(OnlineContrastiveLoss(1.5, HardNegativePairSelector()), 30),
}
LOSSES = FIXED | RANDOM
# Those whose work the processes share, and two that choose among all pairs in each process.
SHARED = ["batch-all", "batch-all, plain distances", "batch-hard", "hardest", "random", "semi-hard", "all pairs"]
OURS = [*SHARED, "balanced pairs", "hard pairs"]

N_STEPS = 5
# How many of the 24 embeddings each process has, call after call: as many, unequally many, in one process none.
SHARES = {
    1: [[24]] * 4,
    2: [[12, 12], [23, 1], [0, 24], [12, 12]],
    4: [[6, 6, 6, 6], [9, 6, 8, 1], [0, 10, 14, 0], [6, 6, 6, 6]],
}


class WrongBatchLoss(nn.Module):
    """Ways to gather that train with another gradient: without the factor, local, or with detached references."""

    def __init__(self, loss_fn, way):
        super().__init__()
        self.loss_fn = loss_fn
        self.way = way

    def forward(self, embeddings, target):
        if self.way == "local":
            return self.loss_fn(embeddings, target)
        rank, n = distributed.get_rank(), distributed.get_world_size()
        parts, labels = [torch.empty_like(embeddings) for _ in range(n)], [torch.empty_like(target) for _ in range(n)]
        distributed.all_gather(parts, embeddings.detach())
        distributed.all_gather(labels, target)
        if self.way == "no factor":
            parts[rank] = embeddings
            return self.loss_fn(torch.cat(parts), torch.cat(labels))
        return self.loss_fn(torch.cat((embeddings, *parts)), torch.cat((target, *labels)))


def embeddings_of(call):
    """Embeddings (24, 3) and labels of five classes in no order."""
    generator = torch.Generator().manual_seed(100 + call)
    labels = torch.randint(5, (24,), generator=generator)
    return torch.randn(24, 3, generator=generator) + 0.2 * labels[:, None], labels


def value_and_count(output):
    return output if isinstance(output, tuple) else (output, torch.tensor(-1))


def calls(loss_fn, rank=0, n_processes=1, dtype=torch.float32, calls=range(4)):
    """`(loss, count, gradient of the own embeddings)` of each call."""
    results = []
    torch.manual_seed(rank)  # as unlike as processes that augment
    for call in calls:
        embeddings, labels = (x.split(SHARES[n_processes][call])[rank] for x in embeddings_of(call))
        embeddings = embeddings.to(dtype, copy=True).requires_grad_()
        loss, count = value_and_count(loss_fn(embeddings, labels))
        results.append((loss.detach(), count, *torch.autograd.grad(loss, embeddings)))
    return results


class Written(TorchDispatchMode):
    """Counts the numbers in what operations return: of all together, and the most of one."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        numbers = [x.numel() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.total, self.largest = self.total + sum(numbers), max(self.largest, *numbers, 0, 0)
        return result


def work_of(loss_fn, B, rank=0, n_processes=1):
    """Numbers that forward and backward write, in all and at most at once, and that autograd saves between them."""
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(B, 4, generator=generator), torch.arange(B) % (B // 16)
    embeddings, labels = (x.chunk(n_processes)[rank].clone() for x in (embeddings, labels))
    saved = {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with Written() as written:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss, _ = value_and_count(loss_fn(embeddings.requires_grad_(), labels))
        loss.backward()
    return written.total, written.largest, sum(saved.values())


def second_derivative(loss_fn, rank=0, n_processes=1):
    """The message of an error."""
    embeddings, labels = (x.chunk(n_processes)[rank] for x in embeddings_of(0))
    embeddings.requires_grad_()
    loss, _ = value_and_count(loss_fn(embeddings, labels))
    try:
        (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), embeddings)
    except RuntimeError as error:
        return str(error)
    return "none"


def of_labels(convert, rank=0, n_processes=1):
    """The loss of labels converted, or the message of an error."""
    embeddings, labels = (x.chunk(n_processes)[rank] for x in embeddings_of(0))
    try:
        return GlobalBatchLoss(BatchAllTripletLoss(1.0))(embeddings, convert(labels))[0]
    except (TypeError, ValueError) as error:
        return str(error)


LABELS = {
    "uint8": lambda labels: labels.to(torch.uint8),
    "bool": lambda labels: labels > 2,
    "large": lambda labels: labels + 2**62,
    "list": lambda labels: labels.tolist(),
    "array": lambda labels: labels.numpy().astype(np.uint16),
    "column": lambda labels: labels[:, None],
    "float": lambda labels: labels / 2,
}


@torch.no_grad()
def in_validation(rank=0, n_processes=1):
    """The loss, after a step of training, as validation asks for it: without gradient and memory."""
    loss_fn = GlobalBatchLoss(MemoryLoss(BatchAllTripletLoss(1.0), 30))
    batches = [[x.chunk(n_processes)[rank] for x in embeddings_of(call)] for call in range(2)]
    loss_fn(*batches[1])
    return loss_fn.eval()(*batches[0])


def of_two_encoders(name, rank=0, n_processes=1):
    """Loss, count and both gradients of embeddings with other references, unequally many in each process."""
    loss_fn = GlobalBatchLoss(LOSSES[name](), seed=7)
    both = []
    for call in range(2):
        x, labels = (part.split(SHARES[n_processes][1 + call])[rank] for part in embeddings_of(call))
        both += [x.clone().requires_grad_(), labels]
    loss, count = value_and_count(loss_fn(*both[:2], reference=both[2], reference_target=both[3]))
    return loss.detach(), count, *torch.autograd.grad(loss, both[::2])


def resumed_draws(rank, n_processes):
    """The third and fourth call of a loss, and of another that went on from its state after two."""
    loss_fn, other = (GlobalBatchLoss(LOSSES["memory, random"]()) for _ in range(2))
    calls(loss_fn, rank, n_processes, calls=range(2))
    other.load_state_dict(loss_fn.state_dict())
    return [calls(x, rank, n_processes, calls=range(2, 4)) for x in (loss_fn, other)]


def of_pairs_of_processes(rank, n_processes):
    """Losses of processes two by two, each group with batches of its own."""
    groups = [distributed.new_group([i, i + 1]) for i in range(0, n_processes, 2)]
    loss_fn = GlobalBatchLoss(BatchAllTripletLoss(1.0), process_group=groups[rank // 2])
    embeddings, labels = (x.chunk(2)[rank % 2] for x in embeddings_of(rank // 2))
    embeddings.requires_grad_()
    loss, count = loss_fn(embeddings, labels)
    return loss.detach(), count, *torch.autograd.grad(loss, embeddings)


def batch(step):
    """Inputs (24, 6) and labels of five classes in no order."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(5, (24,), generator=generator)
    return torch.randn(24, 6, generator=generator) + 0.5 * labels[:, None], labels


def sizes(step, n_processes):
    """Of each process at a step; at every fifth they are unequal."""
    even = [24 // n_processes] * n_processes
    return [even[0] + even[-1] - 1, *even[1:-1], 1] if step % 5 == 4 and n_processes > 1 else even


def train(model, loss_fn, rank=0, n_processes=1, is_even=False):
    """Weights after N_STEPS steps on this process's part of each batch."""
    optimizer = SGD(model.parameters(), 0.01, momentum=0.9)
    torch.manual_seed(rank)  # as unlike as processes that augment
    for step in range(N_STEPS):
        own = sizes(0 if is_even else step, n_processes)
        x, labels = (part.split(own)[rank] for part in batch(step))
        loss = loss_fn(model(x), labels)
        optimizer.zero_grad()
        (loss[0] if isinstance(loss, tuple) else loss).backward()
        optimizer.step()
    return {name.removeprefix("module."): x.detach().clone() for name, x in model.state_dict().items()}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.PReLU(), nn.Linear(16, 3))


def samples():
    """23 samples of four classes, so that neither two nor four processes get as many each."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(23) % 4
    return TensorDataset(torch.randn(23, 6, generator=generator) + 0.5 * labels[:, None], labels)


def evaluate(rank=0, n_processes=1):
    """Embeddings of all samples, and numbers of a pass over them that the processes share."""
    data = samples()
    sampler = DistributedSampler(data, n_processes, rank, shuffle=False) if n_processes > 1 else None
    loader = DataLoader(data, batch_size=2, sampler=sampler)
    model, classifier = make_model(), ClassificationNet(make_model(), 4, embedding_dim=3)
    metrics = [EmbeddingMetric(evaluate_embeddings), EmbeddingStatisticsMetric()]
    _, [retrieval, statistics] = test_epoch(loader, model, BatchAllTripletLoss(1.0), False, metrics)
    spread = {name: statistics.value()[name] for name in ("spread", "effective_rank", "norm")}
    loss, [accuracy] = test_epoch(loader, classifier, nn.NLLLoss(), False, [AccumulatedAccuracyMetric()])
    embeddings, labels = extract_embeddings(loader, model)
    return {
        "embeddings": embeddings,
        "labels": labels,
        **retrieval.value(),
        **spread,
        "accuracy": accuracy.value(),
        "loss": loss,
    }


def resume(rank, n_processes, path, n_epochs, on_epoch=None):
    """Train on balanced batches of all processes, with dropout, from the file's end on."""
    data = samples()
    sampler = BalancedBatchSampler(data.tensors[1], 2, 2, num_replicas=n_processes, rank=rank, seed=5)
    loader = DataLoader(data, batch_sampler=sampler)
    model = DistributedDataParallel(nn.Sequential(make_model(), nn.Dropout(0.5)))
    loss_fn = GlobalBatchLoss(OnlineTripletLoss(1.0, RandomNegativeTripletSelector(1.0)))
    optimizer = SGD(model.parameters(), 0.01)
    torch.manual_seed(rank)
    run = (optimizer, StepLR(optimizer, 1), n_epochs, False, 0, [AverageNonzeroTripletsMetric()])
    history = fit(loader, None, model, loss_fn, *run, checkpoint=Checkpoint(path), on_epoch=on_epoch)
    losses = [row["train_loss"] for row in history] + [row["train_Average nonzero triplets"] for row in history]
    return {**model.module.state_dict(), "losses": torch.tensor(losses)}


def gradient_of_margin(rank=0, n_processes=1):
    """Of a margin that is learned, on this process's part of a batch."""
    margin = nn.Parameter(torch.tensor(1.0))
    loss_fn = GlobalBatchLoss(OnlineTripletLoss(margin, AllTripletSelector()))
    x, labels = (part.chunk(n_processes)[rank] for part in batch(0))
    loss_fn(x, labels)[0].backward()
    return margin.grad


def work(rank, n_processes, folder):
    """Train with each loss and each wrong way, evaluate, resume; every process writes its results."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=n_processes)
    results = {"losses": {}, "trained": {}, "work": {}}
    for name, make_loss in LOSSES.items():
        results["losses"][name] = calls(GlobalBatchLoss(make_loss(), seed=7), rank, n_processes)
        model = DistributedDataParallel(make_model())
        results["trained"][name] = train(model, GlobalBatchLoss(make_loss(), seed=7), rank, n_processes)
    for name in SHARED:
        results["work"][name] = work_of(GlobalBatchLoss(LOSSES[name]()), 512, rank, n_processes)
    results["bfloat16"] = calls(GlobalBatchLoss(BatchAllTripletLoss(1.0)), rank, n_processes, torch.bfloat16)
    results["second"] = {
        name: second_derivative(GlobalBatchLoss(LOSSES[name]()), rank, n_processes) for name in ("batch-all", "hardest")
    }
    results["labels"] = {name: of_labels(convert, rank, n_processes) for name, convert in LABELS.items()}
    results["strings"] = of_labels(lambda labels: [f"class {label}" for label in labels], rank, n_processes)
    results["validation"] = in_validation(rank, n_processes)
    results["two encoders"] = {name: of_two_encoders(name, rank, n_processes) for name in OURS}
    results["resumed draws"] = resumed_draws(rank, n_processes)
    results["pairs of processes"] = of_pairs_of_processes(rank, n_processes)
    for way in ("no factor", "local", "detached"):
        loss_fn = WrongBatchLoss(BatchAllTripletLoss(1.0), way)
        results[way] = train(DistributedDataParallel(make_model()), loss_fn, rank, n_processes, is_even=True)
    try:
        GlobalBatchLoss(BatchAllTripletLoss(1.0))(torch.zeros(2, 2 + rank), torch.tensor([0, 1]))
    except ValueError as error:
        results["message"] = str(error)
    try:
        labels = torch.tensor([0, 1], dtype=torch.int64 if rank == 0 else torch.float32)
        GlobalBatchLoss(BatchAllTripletLoss(1.0))(torch.zeros(2, 2), labels)
    except TypeError as error:
        results["kinds"] = str(error)
    results["margin"] = gradient_of_margin(rank, n_processes)
    results["evaluation"] = evaluate(rank, n_processes)
    results["whole"] = resume(rank, n_processes, f"{folder}/whole", 4)
    resume(rank, n_processes, f"{folder}/run", 2)
    results["resumed"] = resume(rank, n_processes, f"{folder}/run", 4)
    ended = resume(rank, n_processes, f"{folder}/ended", 4, on_epoch=lambda row: row["epoch"] == 2)
    results["n_epochs"] = len(ended["losses"]) // 2
    if rank == 0:
        make_model().load_state_dict(
            {k[2:]: x for k, x in torch.load(f"{folder}/run", weights_only=True)["model"].items()}
        )
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
