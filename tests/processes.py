"""What the tests of several processes run in each of them, in a module that imports little."""

import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from checkpoints import Checkpoint
from datasets import BalancedBatchSampler
from evaluation import evaluate_embeddings
from losses import BatchAllTripletLoss, GlobalBatchLoss, OnlineContrastiveLoss, OnlineTripletLoss
from metrics import AccumulatedAccuracyMetric, AverageNonzeroTripletsMetric, EmbeddingMetric, EmbeddingStatisticsMetric
from networks import ClassificationNet
from trainer import extract_embeddings, fit, test_epoch
from utils import (
    BatchHardTripletSelector,
    HardNegativePairSelector,
    RandomNegativeTripletSelector,
    SemihardNegativeTripletSelector,
)

N_STEPS = 20
LOSSES = {
    "contrastive": lambda: OnlineContrastiveLoss(1.0, HardNegativePairSelector()),
    "random": lambda: OnlineTripletLoss(1.0, RandomNegativeTripletSelector(1.0)),
    "semihard": lambda: OnlineTripletLoss(1.0, SemihardNegativeTripletSelector(1.0)),
    "batch_hard": lambda: OnlineTripletLoss(1.0, BatchHardTripletSelector()),
    "batch_all": lambda: BatchAllTripletLoss(1.0),
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
    optimizer = SGD(model.parameters(), 0.005, momentum=0.9)
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


def work(rank, n_processes, folder):
    """Train with each loss and each wrong way, evaluate, resume; every process writes its results."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=n_processes)
    results = {}
    for name, make_loss in LOSSES.items():
        loss_fn = GlobalBatchLoss(make_loss(), seed=7)
        results[name] = train(DistributedDataParallel(make_model()), loss_fn, rank, n_processes)
    for way in ("no factor", "local", "detached"):
        loss_fn = WrongBatchLoss(BatchAllTripletLoss(1.0), way)
        results[way] = train(DistributedDataParallel(make_model()), loss_fn, rank, n_processes, is_even=True)
    try:
        GlobalBatchLoss(BatchAllTripletLoss(1.0))(torch.zeros(2, 2 + rank), torch.tensor([0, 1]))
    except ValueError as error:
        results["message"] = str(error)
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
