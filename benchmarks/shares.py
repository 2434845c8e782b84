"""What a process of 1, 2 and 4 has to compute of `GlobalBatchLoss`: time and memory of its share of the anchors.

    python benchmarks/shares.py            # print the table, write results/shares.json
    python benchmarks/shares.py --print    # print the table of the last run

The loss alone, forward and backward, of 4,096 embeddings in 128 dimensions, 16 a class, as they are once gathered; one
thread, one process at a time, so that a machine of few cores will do. Gathering and handing back are left out.
"""

import functools
import sys

import torch
from common import read, time_in_turn, try_alone, write
from selection import batch, ours
from tables import markdown

import losses
import utils

N_PROCESSES = [1, 2, 4]


def step(loss_fn, embeddings, labels, n_processes):
    """Forward and backward of the first process's share."""
    B = len(embeddings)
    given = embeddings, labels
    question = losses._Question(embeddings, labels, B, 0, 0, B // n_processes, given, share=0, n_shares=n_processes)
    total, *_ = loss_fn._sums(question)
    torch.autograd.grad(total, embeddings)


def measure():
    results = {}
    for strategy, loss_fn in ours(losses, utils).items():
        function = functools.partial(step, loss_fn, *batch(256, 16, 128))
        contenders = {n: functools.partial(function, n) for n in N_PROCESSES}
        alone = {n: try_alone(contender) for n, contender in contenders.items()}
        seconds = time_in_turn(contenders, budget=8)
        results[strategy] = [{"seconds": seconds[n], "mib": alone[n][2] / 2**20} for n in N_PROCESSES]
        print(strategy, results[strategy], file=sys.stderr, flush=True)
    return results


def table(results):
    """A row for each strategy: seconds, as a part of one process's too, and MiB above the base."""
    rows = []
    for strategy, entries in results["strategies"].items():
        whole = entries[0]["seconds"]
        cells = [f"{x['seconds']:.2f} s ({x['seconds'] / whole:.2f}), {x['mib']:,.0f} MiB" for x in entries]
        rows.append([strategy, *cells])
    return markdown(["strategy", "one process", "each of two", "each of four"], rows)


def main():
    if "--print" not in sys.argv:
        torch.set_num_threads(1)
        write("shares", {"strategies": measure()})
    print(table(read("shares")))


if __name__ == "__main__":
    main()
