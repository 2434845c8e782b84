"""Time of selection, loss, forward and backward on given embeddings, beside loops and other libraries.

    python benchmarks/selection.py                     # print the table, write results/selection.json
    python benchmarks/selection.py --print             # print the table of the last run
    python benchmarks/selection.py "all pairs"         # measure some strategies again, keep the others
    python benchmarks/selection.py --against FOLDER    # the time of another version's losses over ours; writes nothing
    python benchmarks/selection.py --shapes 10x25x2    # a trial of some shapes; writes nothing

One thread. Each contender runs once in a process of its own, for its peak memory, within the limits below; those that
finish are then timed in turn in one process. Who runs out of memory or time is not tried on larger batches, nor who
would run out of time by the growth of B^2. Unit-norm noisy clusters, margin 0.2 (1 for pairs).
"""

import argparse
import functools
import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import GIB, read, time_in_turn, try_alone, write
from tables import markdown

import losses
import utils
from utils import PairSelector, TripletSelector

SHAPES = [(10, 25, 2), (10, 16, 64), (32, 8, 128), *((C, 16, 128) for C in (64, 128, 256, 512, 1024, 4096))]
SHAPES_AGAINST = SHAPES[:-2]
LARGEST = SHAPES[-1]  # for batch-all alone, since ours take minutes there
LIMIT_GIB, LIMIT_S, LIMIT_S_OURS_LARGEST = 12, 60, 600
SLOW = 5  # seconds from which one run is enough
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


class AllIndices(TripletSelector):
    """All triplets, formed: `OnlineTripletLoss` counts those of `AllTripletSelector` itself instead."""

    def get_triplets(self, embeddings, labels):
        return utils.AllTripletSelector(both_directions=True).get_triplets(embeddings, labels)


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


def ours(losses, utils):
    """Strategy -> loss of (embeddings, labels), from these two modules of ours or of another version."""

    def triplet(selector):
        return losses.OnlineTripletLoss(MARGIN, selector)

    return {
        "batch-all": losses.BatchAllTripletLoss(MARGIN),
        "hardest": triplet(utils.HardestNegativeTripletSelector(MARGIN)),
        "random": triplet(utils.RandomNegativeTripletSelector(MARGIN)),
        "semi-hard": triplet(utils.SemihardNegativeTripletSelector(MARGIN)),
        "batch-hard": triplet(utils.BatchHardTripletSelector()),
        "all pairs": losses.OnlineContrastiveLoss(1.0, utils.AllPositivePairSelector(balance=False)),
        "hard negative pairs": losses.OnlineContrastiveLoss(1.0, utils.HardNegativePairSelector()),
    }


def naive():
    """Strategy -> name and loss of the naive way: a Python loop over pairs or anchors, or all triplets as indices."""

    def triplet(selector):
        return losses.OnlineTripletLoss(MARGIN, selector)

    def choose(function):
        return "loop", triplet(utils.FunctionNegativeTripletSelector(MARGIN, function))

    return {
        "batch-all": ("triplets", triplet(AllIndices())),
        "hardest": choose(utils.hardest_negative),
        "random": choose(utils.random_hard_negative),
        "semi-hard": choose(functools.partial(utils.semihard_negative, margin=MARGIN)),
        "batch-hard": ("loop", triplet(LoopBatchHard())),
        "all pairs": ("loop", losses.OnlineContrastiveLoss(1.0, LoopPairs(hard=False))),
        "hard negative pairs": ("loop", losses.OnlineContrastiveLoss(1.0, LoopPairs(hard=True))),
    }


def contenders():
    """Strategy -> contender -> loss of (embeddings, labels); peers marked * choose other triplets or pairs."""
    strategies = {strategy: {"ours": loss} for strategy, loss in ours(losses, utils).items()}
    for strategy, (name, loss) in naive().items():
        strategies[strategy][name] = loss
    for add in PEERS.values():
        add(strategies)
    return strategies


def add_pytorch_metric_learning(strategies):
    from pytorch_metric_learning import distances, losses, miners  # their losses, in this function

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


def add_sentence_transformers(strategies):
    from sentence_transformers.sentence_transformer import losses  # theirs, in this function

    squared = functools.partial(losses.BatchHardTripletLossDistanceFunction.euclidean_distance, squared=True)

    def of_embeddings(loss):
        return lambda embeddings, labels: loss.compute_loss_from_embeddings([embeddings], labels)

    # The model that they ask for computes embeddings of texts; given embeddings, they don't use it.
    strategies["batch-all"]["ST"] = of_embeddings(losses.BatchAllTripletLoss(None, squared, MARGIN))
    strategies["batch-hard"]["ST"] = of_embeddings(losses.BatchHardTripletLoss(None, squared, MARGIN))
    # For each pair, both ways, the nearest negative beyond the positive, within the margin or not; else the farthest.
    strategies["semi-hard"]["ST*"] = of_embeddings(losses.BatchSemiHardTripletLoss(None, squared, MARGIN))


PEERS = {
    "pytorch_metric_learning": add_pytorch_metric_learning,
    "online_triplet_loss": add_online_triplet_loss,
    "sentence_transformers": add_sentence_transformers,
}


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


def not_to_try(name, shape, earlier, limit):
    """Why a contender isn't tried at a shape, by how it did at the last smaller one; None where it is.

    Args:
        name, shape: the contender, and (C, K, D).
        earlier: dict from the shapes tried so far to their entries.
        limit: seconds that it may take.
    """
    smaller = [s for s, entries in earlier.items() if all(x <= y for x, y in zip(s, shape)) and name in entries]
    if not smaller:
        return None
    entry = earlier[smaller[-1]][name]
    if entry["ms"] is None:
        return None if entry["status"].startswith("fails") else entry["status"]
    growth = (shape[0] * shape[1] / (smaller[-1][0] * smaller[-1][1])) ** 2
    return "not tried" if entry["ms"] * growth > 1e3 * limit else None


def try_each(steps, shape, earlier):
    """Contender -> {"status", "ms", "mib"} of one run alone; from a process that has not computed anything itself."""
    entries = {}
    for name, function in steps.items():
        limit = LIMIT_S_OURS_LARGEST if name == "ours" and shape == LARGEST else LIMIT_S
        reason = not_to_try(name, shape, earlier, limit)
        status, seconds, peak = (reason, None, None) if reason else try_alone(function, limit, LIMIT_GIB * GIB)
        entries[name] = {"status": status, "ms": seconds and 1e3 * seconds, "mib": peak and peak / 2**20}
    return entries


def time_each(steps, entries):
    """Put the median of many runs in turn in place of the first; what takes many seconds keeps that."""
    quick = {name: steps[name] for name, x in entries.items() if x["status"] == "ok" and x["ms"] < 1e3 * SLOW}
    for name, seconds in time_in_turn(quick, budget=4).items():
        entries[name]["ms"] = 1e3 * seconds


def cell(entry):
    """Milliseconds, and in brackets the peak memory in MiB where it is known; or why there are none."""
    if entry["ms"] is None:
        return entry["status"]
    milliseconds = f"{entry['ms']:.3g}" if entry["ms"] < 1000 else f"{entry['ms']:,.0f}"
    return milliseconds if entry["mib"] is None else f"{milliseconds} ({entry['mib']:,.0f})"


def ratio(entries):
    """Time of the fastest other library over ours."""
    peers = [entry["ms"] for name, entry in entries.items() if name.startswith(("PML", "OTL", "ST")) and entry["ms"]]
    ms = entries["ours"]["ms"] if entries else None
    return f"**{min(peers) / ms:.1f}**" if peers and ms else ""


def table(results, counts=()):
    """A row for each strategy and contender, a column for each shape; then what was counted at the first shape."""
    shapes = list(dict.fromkeys(itertools.chain(*results["strategies"].values())))
    rows = []
    for strategy, by_shape in results["strategies"].items():
        columns = [by_shape.get(shape, {}) for shape in shapes]
        for name in sorted(dict.fromkeys(itertools.chain(*columns)), key=lambda name: not name.startswith("ours")):
            cells = [cell(entries[name]) if name in entries else "" for entries in columns]
            counted = ["" if columns[0].get(name, {}).get(key) is None else columns[0][name][key] for key in counts]
            rows.append([strategy, name.replace("*", "\\*"), *cells, *counted])
            strategy = ""
        if any(map(ratio, columns)):
            rows.append(["", "**best peer / ours**", *map(ratio, columns), *("" for _ in counts)])
    return markdown(["strategy", "by", *shapes, *counts], rows)


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


def shape_of(name):
    C, K, D = map(int, name.split("x"))
    return C, K, D


def report(strategy, shape, entries):
    """A line for the terminal, while the table is being made."""
    shown = ", ".join(f"{name} {cell(entry)}" for name, entry in entries.items())
    print(f"{strategy} {name_of(shape)}: {shown}", file=sys.stderr, flush=True)


def measure(strategies, shapes):
    """Strategy -> shape -> contender -> entry. All trials come first, before this process computes anything itself.

    Args:
        strategies: as `contenders()`.
        shapes: strategy -> list of (C, K, D).
    """
    results = {strategy: {} for strategy in strategies}
    cases = [(strategy, shape) for strategy in strategies for shape in shapes[strategy]]
    for strategy, shape in cases:
        results[strategy][shape] = try_each(steps_of(strategies[strategy], shape), shape, results[strategy])
        report(strategy, shape, results[strategy][shape])
    for strategy, shape in cases:
        time_each(steps_of(strategies[strategy], shape), results[strategy][shape])
        report(strategy, shape, results[strategy][shape])
    return {strategy: {name_of(shape): x for shape, x in by_shape.items()} for strategy, by_shape in results.items()}


def shapes_of(strategy, shapes=SHAPES):
    """Those of the shapes at which a strategy is measured."""
    return [shape for shape in shapes if shape != LARGEST or strategy == "batch-all"]


def load(folder, name):
    """The module NAME.py of another version's folder, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"other_{name}", Path(folder) / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def also_ours(losses, utils):
    """What is compared with another version besides `ours`, as that."""
    return {
        "all triplets": losses.OnlineTripletLoss(MARGIN, utils.AllTripletSelector()),
        "balanced pairs": losses.OnlineContrastiveLoss(1.0, utils.AllPositivePairSelector()),
    }


def against(folder, shapes):
    """Table of the other version's time over ours, medians of runs in turn; or of who did not finish, and why."""
    modules = {"ours": (losses, utils), "other": (load(folder, "losses"), load(folder, "utils"))}
    versions = {version: ours(*both) | also_ours(*both) for version, both in modules.items()}
    rows = []
    for strategy in versions["ours"]:
        tried = {}
        for shape in shapes:
            steps = steps_of({version: by_strategy[strategy] for version, by_strategy in versions.items()}, shape)
            entries = tried[shape] = try_each(steps, shape, tried)
            if all(entry["status"] == "ok" for entry in entries.values()):
                for version, seconds in time_in_turn(steps, budget=4).items():
                    entries[version]["ms"] = 1e3 * seconds
            report(strategy, shape, entries)
        rows.append([strategy, *map(ratio_of_versions, tried.values())])
    return markdown(["other / ours", *map(name_of, shapes)], rows)


def ratio_of_versions(entries):
    if all(entry["ms"] for entry in entries.values()):
        return f"{entries['other']['ms'] / entries['ours']['ms']:.2f}"
    return ", ".join(f"{version}: {entry['status']}" for version, entry in entries.items() if not entry["ms"])


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("strategies", nargs="*", help="measure these again, keep the others; none: all")
    parser.add_argument("--print", action="store_true", help="print the table of the last run")
    parser.add_argument("--against", metavar="FOLDER", help="compare with losses.py and utils.py there; writes nothing")
    parser.add_argument("--shapes", nargs="+", type=shape_of, help="classes x samples x dimension; writes nothing")
    return parser.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(1)
    if args.against:
        print(against(args.against, args.shapes or SHAPES_AGAINST))
        return
    if not args.print:
        wanted = {name: x for name, x in contenders().items() if name in args.strategies or not args.strategies}
        results = {"strategies": measure(wanted, {name: args.shapes or shapes_of(name) for name in wanted})}
        if args.shapes:
            print(table(results))
            return
        kept = read("selection")["strategies"] if args.strategies else {}
        limits = {"limit_gib": LIMIT_GIB, "limit_s": LIMIT_S, "limit_s_ours_largest": LIMIT_S_OURS_LARGEST}
        write("selection", {"strategies": kept | results["strategies"], **limits})
    print(table(read("selection")))


if __name__ == "__main__":
    main()
