"""Growth of time and memory with the batch: selection, loss, forward and backward from B = 512 to 32,768.

    python benchmarks/scaling.py            # print the table, write results/scaling.json
    python benchmarks/scaling.py --print    # print the table of the last run

One thread, 16 samples a class, 128 dimensions; each run in a process of its own, the median of three, or one run where
it takes many seconds. The exponents are slopes of a straight line through the logarithms, from B = 2048 up, where the
fixed cost of a call is small.
"""

import functools
import statistics
import sys

import numpy as np
import torch
from common import GIB, read, try_alone, write
from selection import MARGIN, SLOW, batch, ours, step
from tables import markdown

import losses
import utils

SIZES = [512, 2048, 8192, 32768]
LARGE = 2048


def exponent(sizes, values):
    """Slope of log value against log size, over the large sizes that finished."""
    points = [(s, v) for s, v in zip(sizes, values) if s >= LARGE and v]
    return float(np.polyfit(*np.log(np.array(points)).T, 1)[0]) if len(points) > 2 else None


def measure(loss_fn):
    """One entry for each size: {"status", "seconds", "mib"}; after one that did not finish, its status for all."""
    entries = []
    for B in SIZES:
        if entries and entries[-1]["status"] != "ok":
            entries.append(entries[-1])
            continue
        function = functools.partial(step, loss_fn, *batch(B // 16, 16, 128))
        runs = [try_alone(function, seconds=300, memory=16 * GIB)]
        if runs[0][0] == "ok" and runs[0][1] < SLOW:
            runs += [try_alone(function, seconds=300, memory=16 * GIB) for _ in range(2)]
        finished = [run for run in runs if run[0] == "ok"]
        middle = [statistics.median(run[i] for run in finished) if finished else None for i in (1, 2)]
        entries.append({"status": runs[0][0], "seconds": middle[0], "mib": middle[1] and middle[1] / 2**20})
    return entries


def table(results):
    """One row for each strategy: seconds and MiB at every size, and the two exponents."""
    rows = []
    for strategy, entries in results["strategies"].items():
        cells = [f"{e['seconds']:.2g} s, {e['mib']:,.0f} MiB" if e["seconds"] else e["status"] for e in entries]
        slopes = [exponent(results["sizes"], [e[key] for e in entries]) for key in ("seconds", "mib")]
        rows.append([strategy, *cells, *(f"{slope:.2f}" if slope else "" for slope in slopes)])
    header = ["strategy", *(f"B = {B}" for B in results["sizes"]), "time exponent", "memory exponent"]
    return markdown(header, rows)


def main():
    if "--print" not in sys.argv:
        torch.set_num_threads(1)
        results = {"sizes": SIZES, "strategies": {}}
        plain = {"batch-all, plain distances": losses.BatchAllTripletLoss(MARGIN, squared=False)}
        for strategy, loss_fn in (ours(losses, utils) | plain).items():
            results["strategies"][strategy] = measure(loss_fn)
            print(strategy, results["strategies"][strategy][-1], file=sys.stderr, flush=True)
        write("scaling", results)
    print(table(read("scaling")))


if __name__ == "__main__":
    main()
