"""Seconds of a training epoch by `fit`, beside those of the plain network alone.

    python benchmarks/epoch.py            # print the table, write results/epoch.json
    python benchmarks/epoch.py --print    # print the table of the last run

The plain network: convolution, PReLU, pool in this order on contiguous tensors; forward, backward and Adam on tensors
in memory, batches of 250, and nothing else. It is timed in turn with the epochs, and counted twice for pairs and three
times for triplets, as many images as go through the network there; the median of three rounds. The epochs take Adam
with fused=True. DATA_ROOT says where MNIST is.
"""

import os
import statistics
import sys
import time

import torch
from common import read, write
from tables import markdown
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from datasets import BalancedBatchSampler, InMemoryDataset, SiameseMNIST, TripletMNIST
from demo_data import load_mnist
from losses import BatchAllTripletLoss, ContrastiveLoss, OnlineContrastiveLoss, OnlineTripletLoss, TripletLoss
from networks import ClassificationNet, EmbeddingNet, SiameseNet, TripletNet
from trainer import train_epoch
from utils import HardNegativePairSelector, RandomNegativeTripletSelector

ROUNDS = 3
ORIGINAL = {"softmax": 26, "siamese": 43, "triplet": 65, "online contrastive": 25, "online triplet": 50}  # 60,000
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain_network():
    """The original's network, written down as it stands there."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.PReLU(), nn.MaxPool2d(2, stride=2),
        nn.Conv2d(32, 64, 5), nn.PReLU(), nn.MaxPool2d(2, stride=2),
        nn.Flatten(), nn.Linear(1024, 256), nn.PReLU(), nn.Linear(256, 256), nn.PReLU(), nn.Linear(256, 2),
    ).to(DEVICE)  # fmt: skip


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def time_plain(data):
    """Seconds for one pass of the plain network over images (N, 1, 28, 28)."""
    model = plain_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    wait()
    began = time.perf_counter()
    for start in range(0, len(data) - 249, 250):
        optimizer.zero_grad()
        model(data[start : start + 250]).square().mean().backward()
        optimizer.step()
    wait()
    return time.perf_counter() - began


def experiments(train):
    """Name -> (loader, model, loss, images of the network for each image of the data)."""

    def shuffled(dataset, batch_size):
        return DataLoader(dataset, sampler=BatchSampler(RandomSampler(dataset), batch_size, False), batch_size=None)

    sampler = BalancedBatchSampler(train.targets, n_classes=10, n_samples=25)
    online = DataLoader(train, sampler=sampler, batch_size=None)
    random_hard = RandomNegativeTripletSelector(1.0)
    return {
        "softmax": (shuffled(train, 256), ClassificationNet(EmbeddingNet(), 10), nn.NLLLoss(), 1),
        "siamese": (shuffled(SiameseMNIST(train), 128), SiameseNet(EmbeddingNet()), ContrastiveLoss(1.0), 2),
        "triplet": (shuffled(TripletMNIST(train), 128), TripletNet(EmbeddingNet()), TripletLoss(1.0), 3),
        "online contrastive": (online, EmbeddingNet(), OnlineContrastiveLoss(1.0, HardNegativePairSelector()), 1),
        "online triplet": (online, EmbeddingNet(), OnlineTripletLoss(1.0, random_hard), 1),
        "batch-all": (online, EmbeddingNet(), BatchAllTripletLoss(1.0), 1),
    }


def measure():
    train = InMemoryDataset(load_mnist(os.environ.get("DATA_ROOT", "data")), DEVICE)
    seconds = {}
    for _ in range(ROUNDS):
        seconds.setdefault("plain", []).append(time_plain(train.data))
        for name, (loader, model, loss_fn, _) in experiments(train).items():
            optimizer = torch.optim.Adam(model.to(DEVICE).parameters(), lr=1e-3, fused=True)
            wait()
            began = time.perf_counter()
            train_epoch(loader, model, loss_fn, optimizer, DEVICE, 1000, [], title=name)
            wait()
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            print(f"plain {seconds['plain'][-1]:.1f} s, {name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    passes = {name: entry[3] for name, entry in experiments(train).items()}
    seconds = {name: statistics.median(values) for name, values in seconds.items()}
    return {"images": len(train), "device": DEVICE.type, "seconds": seconds, "passes": passes}


def table(results):
    """One row for each experiment."""
    plain = results["seconds"]["plain"]
    rows = []
    for name, passes in results["passes"].items():
        seconds = results["seconds"][name]
        original = ORIGINAL.get(name, "") if results["images"] == 60000 and results["device"] == "cpu" else ""
        rows.append([name, f"{seconds:.2f}", f"{plain * passes:.2f}", f"{seconds / (plain * passes):.2f}", original])
    header = ["epoch of", "fit, s", "plain network alone, s", "ratio", "the original, s (another machine)"]
    return f"{results['images']:,} images, {results['device'].upper()}\n\n{markdown(header, rows)}"


def main():
    if "--print" not in sys.argv:
        write("epoch", measure())
    print(table(read("epoch")))


if __name__ == "__main__":
    main()
