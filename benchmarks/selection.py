"""Time of selection, loss, forward and backward on given embeddings, beside loops and other libraries.

    python benchmarks/selection.py            # print the table, write results/selection.json
    python benchmarks/selection.py --print    # print the table of the last run
    python benchmarks/selection.py "all pairs"    # measure some strategies again, keep the others

One thread. Each contender runs once in a process of its own, for its peak memory, with 12 GB and 60 s at most; those
that finish are then timed in turn in one process. Unit-norm noisy clusters, margin 0.2 (1 for pairs).
"""

import functools
import itertools
import sys

import numpy as np
import torch
import torch.nn.functional as F
from common import read, time_in_turn, try_alone, write
from tables import markdown

from losses import BatchAllTripletLoss, OnlineContrastiveLoss, OnlineTripletLoss
from utils import (
    AllPositivePairSelector,
    AllTripletSelector,
    BatchHardTripletSelector,
    FunctionNegativeTripletSelector,
    HardestNegativeTripletSelector,
    HardNegativePairSelector,
    PairSelector,
    RandomNegativeTripletSelector,
    SemihardNegativeTripletSelector,
    TripletSelector,
    hardest_negative,
    random_hard_negative,
    semihard_negative,
)

SHAPES = [(10, 25, 2), (10, 16, 64), (32, 8, 128), (64, 16, 128), (128, 16, 128), (256, 16, 128), (512, 16, 128)]
MARGIN = 0.2
# README's rows: strategy -> the naive contender beside ours.
SHORT_SHAPE = "128x16x128"
SHORT = {"batch-all": "triplets", "semi-hard": "loop", "batch-hard": "loop", "all pairs": "loop"}


class LoopPairs(PairSelector):
    """All pairs, or as many of the closest negative ones as positive, by a loop over pairs."""

    def __init__(self, hard):
        self.hard = hard

    def get_pairs(self, embeddings, labels):
        points, labels = embeddings.detach().numpy(), labels.tolist()
        positive, negative = [], []
        for i, j in itertools.combinations(range(len(labels)), 2):
            if labels[i] == labels[j]:
                positive.append((i, j))
            else:
                negative.append((float(((points[i] - points[j]) ** 2).sum()) if self.hard else 0, i, j))
        negative = sorted(negative)[: len(positive)] if self.hard else negative
        return torch.tensor(positive), torch.tensor([pair[1:] for pair in negative])


class LoopBatchHard(TripletSelector):
    """Batch-hard triplets by a loop over anchors and samples."""

    def get_triplets(self, embeddings, labels):
        points, labels = embeddings.detach().numpy(), labels.tolist()
        triplets = []
        for a in range(len(labels)):
            distances = [float(((points[a] - point) ** 2).sum()) for point in points]
            positives = [p for p in range(len(labels)) if labels[p] == labels[a] and p != a]
            negatives = [n for n in range(len(labels)) if labels[n] != labels[a]]
            triplets.append((a, max(positives, key=distances.__getitem__), min(negatives, key=distances.__getitem__)))
        return torch.tensor(triplets)


def triplet(selector):
    return OnlineTripletLoss(MARGIN, selector)


def loop(choose):
    return triplet(FunctionNegativeTripletSelector(MARGIN, choose))


def contenders():
    """Strategy -> contender -> loss of (embeddings, labels); peers marked * choose other triplets or pairs."""
    strategies = {
        "batch-all": {
            "ours": BatchAllTripletLoss(MARGIN),
            "triplets": triplet(AllTripletSelector(both_directions=True)),
        },
        "hardest": {"ours": triplet(HardestNegativeTripletSelector(MARGIN)), "loop": loop(hardest_negative)},
        "random": {"ours": triplet(RandomNegativeTripletSelector(MARGIN)), "loop": loop(random_hard_negative)},
        "semi-hard": {
            "ours": triplet(SemihardNegativeTripletSelector(MARGIN)),
            "loop": loop(functools.partial(semihard_negative, margin=MARGIN)),
        },
        "batch-hard": {"ours": triplet(BatchHardTripletSelector()), "loop": triplet(LoopBatchHard())},
        "all pairs": {
            "ours": OnlineContrastiveLoss(1.0, AllPositivePairSelector(balance=False)),
            "loop": OnlineContrastiveLoss(1.0, LoopPairs(hard=False)),
        },
        "hard negative pairs": {
            "ours": OnlineContrastiveLoss(1.0, HardNegativePairSelector()),
            "loop": OnlineContrastiveLoss(1.0, LoopPairs(hard=True)),
        },
    }
    add_pytorch_metric_learning(strategies)
    add_online_triplet_loss(strategies)
    return strategies


def add_pytorch_metric_learning(strategies):
    from pytorch_metric_learning import distances, losses, miners

    def squared():
        return distances.LpDistance(normalize_embeddings=False, power=2)

    def mined(miner):
        loss = losses.TripletMarginLoss(MARGIN, distance=squared())
        return lambda embeddings, labels: loss(embeddings, labels, miner(embeddings, labels))

    def margin_miner(kind):
        return mined(miners.TripletMarginMiner(MARGIN, type_of_triplets=kind, distance=squared()))

    plain = distances.LpDistance(normalize_embeddings=False)
    strategies["batch-all"]["PML"] = losses.TripletMarginLoss(MARGIN, distance=squared())
    strategies["hardest"]["PML*"] = margin_miner("hard")  # all triplets with d_an < d_ap
    strategies["semi-hard"]["PML*"] = margin_miner("semihard")  # all semi-hard triplets, not one for each pair
    strategies["batch-hard"]["PML"] = mined(miners.BatchHardMiner(distance=squared()))
    strategies["all pairs"]["PML*"] = losses.ContrastiveLoss(0, 1, distance=plain)  # distances not squared


def add_online_triplet_loss(strategies):
    from online_triplet_loss.losses import batch_all_triplet_loss, batch_hard_triplet_loss

    strategies["batch-all"]["OTL"] = lambda x, y: batch_all_triplet_loss(y, x, MARGIN, squared=True)
    strategies["batch-hard"]["OTL"] = lambda x, y: batch_hard_triplet_loss(y, x, MARGIN, squared=True)


def batch(C, K, D):
    """Embeddings (B, D) on the unit sphere around C centres, and labels (B,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(C).repeat_interleave(K)
    centres = F.normalize(torch.randn(C, D, generator=generator))
    noise = torch.randn(C * K, D, generator=generator) / np.sqrt(D)
    return F.normalize(centres[labels] + noise).requires_grad_(), labels


def step(loss_fn, embeddings, labels):
    """Forward and backward."""
    loss = loss_fn(embeddings, labels)
    loss = loss[0] if isinstance(loss, tuple) else loss
    torch.autograd.grad(loss, embeddings)


def steps_of(losses, shape):
    """Contender -> forward and backward on the batch of a shape."""
    embeddings, labels = batch(*shape)
    return {name: functools.partial(step, loss_fn, embeddings, labels) for name, loss_fn in losses.items()}


def try_each(steps):
    """Contender -> {"status", "ms", "mib"} of one run alone; from a process that has not computed anything itself."""
    entries = {}
    for name, function in steps.items():
        status, seconds, peak = try_alone(function)
        entries[name] = {"status": status, "ms": seconds and 1e3 * seconds, "mib": peak and peak / 2**20}
    return entries


def time_each(steps, entries):
    """Put the median of many runs in turn in place of the first; what takes many seconds keeps that."""
    quick = {name: steps[name] for name, entry in entries.items() if entry["status"] == "ok" and entry["ms"] < 5e3}
    for name, seconds in time_in_turn(quick).items():
        entries[name]["ms"] = 1e3 * seconds


def cell(entry):
    """Milliseconds, and the peak memory in MiB; or why there are none."""
    if entry["ms"] is None:
        return entry["status"]
    return (f"{entry['ms']:.3g}" if entry["ms"] < 1000 else f"{entry['ms']:,.0f}") + f" ({entry['mib']:,.0f})"


def ratio(entries):
    """Time of the fastest other library over ours."""
    peers = [entry["ms"] for name, entry in entries.items() if name.startswith(("PML", "OTL")) and entry["ms"]]
    return f"**{min(peers) / entries['ours']['ms']:.1f}**" if peers and entries["ours"]["ms"] else ""


def table(results):
    """A row for each strategy and contender, a column for each shape."""
    rows = []
    for strategy, shapes in results["strategies"].items():
        columns = list(shapes.values())
        for name in columns[0]:
            rows.append([strategy, name.replace("*", "\\*"), *(cell(entries[name]) for entries in columns)])
            strategy = ""
        if any(ratio(entries) for entries in columns):
            rows.append(["", "**best peer / ours**", *(ratio(entries) for entries in columns)])
    shapes = next(iter(results["strategies"].values()))
    return markdown(["strategy", "by", *shapes], rows)


def short_table(results):
    """Four strategies on one large batch, for README: ours, the naive way, and PML."""
    rows = []
    for strategy, naive in SHORT.items():
        entries = results["strategies"][strategy][SHORT_SHAPE]
        peer = next(name for name in entries if name.startswith("PML"))
        mark = peer.removeprefix("PML").replace("*", " \\*")
        rows.append([strategy, cell(entries["ours"]), cell(entries[naive]), cell(entries[peer]) + mark])
    return markdown(["milliseconds (MiB)", "ours", "naive", "pytorch-metric-learning"], rows)


def name_of(shape):
    return "x".join(map(str, shape))


def report(strategy, shape, results):
    """A line for the terminal, while the table is being made."""
    entries = results[strategy][name_of(shape)]
    shown = ", ".join(f"{name} {cell(entry)}" for name, entry in entries.items())
    print(f"{strategy} {name_of(shape)}: {shown}", file=sys.stderr, flush=True)


def main():
    if "--print" not in sys.argv:
        torch.set_num_threads(1)
        again = sys.argv[1:]
        strategies = {name: losses for name, losses in contenders().items() if name in again or not again}
        results = read("selection")["strategies"] if again else {}
        results |= {strategy: {} for strategy in strategies}
        for strategy, shape in itertools.product(strategies, SHAPES):
            results[strategy][name_of(shape)] = try_each(steps_of(strategies[strategy], shape))
            report(strategy, shape, results)
        for strategy, shape in itertools.product(strategies, SHAPES):
            time_each(steps_of(strategies[strategy], shape), results[strategy][name_of(shape)])
            report(strategy, shape, results)
        write("selection", {"strategies": results, "limit_gib": 12, "limit_s": 60})
    print(table(read("selection")))


if __name__ == "__main__":
    main()
