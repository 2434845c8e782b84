"""The five MNIST experiments in bfloat16, beside the same in float32: `fit(..., amp=torch.bfloat16)`.

    python benchmarks/precision.py            # train, 20 epochs each, and write results/precision.json
    python benchmarks/precision.py --print    # print the table of the last run

Each is the notebook's cell, seed 0, with one thread, in all but `amp`; its figure in float32 is that of `make results`.
Stopped and started again, it goes on with the experiment that it was at.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
from common import read, time_in_turn, write
from reproduce import (
    DIGITS_AND_CLOTHES,
    EPOCHS,
    N_TRAIN,
    NOTEBOOKS,
    ORIGINAL,
    RUNS,
    cell,
    is_wanted,
    path_of,
    run_cells,
    summary,
)
from tables import markdown

from losses import BatchAllTripletLoss
from networks import EmbeddingNet
from trainer import train_epoch


def in_bfloat16(names):
    """What takes the place of the notebook's `fit`; an error, before anything is trained, where images are missing."""
    if len(names["train"]) != N_TRAIN["mnist"]:
        raise ValueError(f"expected all {N_TRAIN['mnist']:,} images, as in results/, got {len(names['train']):,}")
    return {"fit": functools.partial(names["fit"], amp=torch.bfloat16)}


def knn5(experiment):
    """Per cent of the test images that their five nearest training images name, in float32 and in bfloat16."""
    made = Path(os.environ["RUN_DIR"]) / f"{experiment}.json"
    if not is_wanted(made, "mnist", 0):
        run_cells(NOTEBOOKS["mnist"], experiment, in_bfloat16)  # its cell writes the file
    paths = {"float32": path_of("mnist", experiment, 0), "bfloat16": made}
    return {dtype: json.loads(path.read_text())["metrics"]["knn5"] for dtype, path in paths.items()}


def step_times():
    """Seconds of a training step of 250 images in either."""
    torch.manual_seed(0)
    batch = torch.rand(250, 1, 28, 28), torch.arange(250) % 10
    model, loss_fn = EmbeddingNet(), BatchAllTripletLoss(1.0)
    optimizer = torch.optim.Adam(model.parameters())

    def step(amp):
        train_epoch([batch], model, loss_fn, optimizer, False, 0, [], amp=amp)

    return time_in_turn({"float32": lambda: step(None), "bfloat16": lambda: step(torch.bfloat16)})


def table(results):
    """A row for each experiment, beside what seeds make of it in float32, and one for the time."""
    rows = []
    for name, x in results["knn5"].items():
        over_seeds = cell(summary()["mnist"][name]["knn5"])
        title = f"5-nn of {DIGITS_AND_CLOTHES[name]}"
        rows.append([title, f"{x['bfloat16']:.2f}", f"{x['float32']:.2f}", over_seeds])
    times = [f"{1000 * results['step'][dtype]:.0f} ms" for dtype in ("bfloat16", "float32")]
    rows.append(["a training step of 250 images", *times, ""])
    return markdown(["", "bfloat16", "float32", "float32, three seeds"], rows)


def main():
    if "--print" not in sys.argv:
        torch.set_num_threads(1)
        os.environ |= {"EPOCHS": str(EPOCHS), "SEED": "0", "RUN_DIR": str(RUNS / "precision"), "TQDM_DISABLE": "1"}
        write("precision", {"step": step_times(), "knn5": {name: knn5(name) for name in ORIGINAL["mnist"]}})
    print(table(read("precision")))


if __name__ == "__main__":
    main()
