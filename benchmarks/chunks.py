"""Memory and time of a training step of 4,096 images, whole and in chunks: `Chunked(net, size)`.

    python benchmarks/chunks.py            # print the table, write results/chunks.json
    python benchmarks/chunks.py --print    # print the table of the last run

EmbeddingNet in 64 dimensions and the batch-all loss, 64 classes of 64 random images, one thread, Adam. Each contender
runs once in a process of its own, for its peak memory, then all in turn in one process.
"""

import sys

import torch
from common import read, time_in_turn, try_alone, write
from tables import markdown

from losses import BatchAllTripletLoss
from networks import Chunked, EmbeddingNet
from trainer import train_epoch

N_IMAGES, N_CLASSES = 4096, 64
CHUNKS = {"whole": None, "1,024": 1024, "256": 256, "64": 64}


def step(size):
    """A training step of a network made for it, `size` images at a time; None for all."""
    torch.manual_seed(0)
    batch = torch.rand(N_IMAGES, 1, 28, 28), torch.arange(N_IMAGES) % N_CLASSES
    model = EmbeddingNet(64) if size is None else Chunked(EmbeddingNet(64), size)
    optimizer = torch.optim.Adam(model.parameters())
    train_epoch([batch], model, BatchAllTripletLoss(1.0), optimizer, False, 0, [])


def measure():
    contenders = {name: lambda size=size: step(size) for name, size in CHUNKS.items()}
    alone = {name: try_alone(function, seconds=600) for name, function in contenders.items()}
    seconds = time_in_turn(contenders, budget=20)
    return {name: {"seconds": seconds[name], "mib": alone[name][2] / 2**20} for name in contenders}


def table(results):
    """A row for each size of the chunks."""
    rows = [[name, f"{x['mib']:,.0f}", f"{x['seconds']:.2f}"] for name, x in results["contenders"].items()]
    return markdown(["images at once", "MiB above the base", "seconds"], rows)


def main():
    if "--print" not in sys.argv:
        torch.set_num_threads(1)
        write("chunks", {"contenders": measure()})
    print(table(read("chunks")))


if __name__ == "__main__":
    main()
