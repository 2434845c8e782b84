"""Run the notebooks' experiments over several seeds, and write their results into results/ and README.md.

    python scripts/reproduce.py            # what is missing, then summary.json and the tables
    python scripts/reproduce.py --tables   # summary.json and the tables alone

An experiment is a cell of a notebook that carries its name as a tag, behind the cells tagged "setup". Each is run in a
process of its own with one thread, with SEED in the environment, and leaves results/DATASET/EXPERIMENT-SEED.json. What
is there is not run again, so this can be stopped at any time. Where the notebook itself was run with a seed, as by
`make experiments`, its numbers are taken. DATA_ROOT says where the data are, JOBS how many processes run at once.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tables import insert, markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
RUNS = ROOT / "runs"
README = ROOT / "README.md"
NOTEBOOKS = {"mnist": "Experiments_MNIST.ipynb", "fashion_mnist": "Experiments_FashionMNIST.ipynb"}
EXPERIMENTS = {
    "softmax": "softmax",
    "siamese": "siamese, random pairs",
    "triplet": "triplet, random triplets",
    "online_contrastive": "online contrastive, hard negative pairs",
    "online_triplet": "online triplet, random hard negatives",
    "best_2d": "online contrastive, augmented",
    "best_64d": "online contrastive, augmented, 64-D",
}
SEEDS = [0, 1, 2]
EPOCHS = 20
N_TRAIN = 60_000  # results are those of the whole data sets
# Validation loss or accuracy that the original's notebooks end on.
ORIGINAL = {
    "mnist": {
        "softmax": "99.04 %",
        "siamese": "0.0041",
        "triplet": "0.0196",
        "online_contrastive": "0.0147",
        "online_triplet": "1.2147",
    },
    "fashion_mnist": {
        "softmax": "90.72 %",
        "siamese": "0.0274",
        "triplet": "0.0741",
        "online_contrastive": "0.1386",
        "online_triplet": "1.3636",
    },
}


def path_of(dataset, experiment, seed):
    return RESULTS / dataset / f"{experiment}-{seed}.json"


def run_cells(notebook, experiment):
    """Execute the set-up and an experiment of a notebook in this process."""
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    namespace = {"__name__": "__main__"}
    for tag in ("setup", experiment):
        tagged = ["".join(cell["source"]) for cell in cells if tag in cell["metadata"].get("tags", [])]
        if not tagged:
            raise ValueError(f"{notebook} has no cell tagged {tag!r}")
        for source in tagged:
            exec(compile(source, f"{notebook}, {tag}", "exec"), namespace)


def is_wanted(path, seed):
    """Whether a file holds a result of this seed on all data, for all epochs."""
    if not path.exists():
        return False
    try:
        settings = json.loads(path.read_text())["settings"]
    except ValueError:  # of a run that was stopped while it wrote
        return False
    return (settings["seed"], settings["epochs"], settings["n_train"]) == (seed, EPOCHS, N_TRAIN)


def run(dataset, experiment, seed):
    """Fetch one result from the notebook's own run, or make it in a process; keep it in results/."""
    target, run_dir = path_of(dataset, experiment, seed), RUNS / "results" / f"{dataset}-{experiment}-{seed}"
    made = RUNS / dataset / f"{experiment}.json"
    if not is_wanted(made, seed):
        made = run_dir / f"{experiment}.json"
        made.unlink(missing_ok=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        variables = {"SEED": seed, "EPOCHS": EPOCHS, "RUN_DIR": run_dir, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
        variables |= {"TQDM_DISABLE": 1, "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": 1}
        command = [sys.executable, __file__, "--run", NOTEBOOKS[dataset], experiment]
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        with open(run_dir / "log", "w") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode or not is_wanted(made, seed):
            reason = "it failed" if done.returncode else f"it did not have all {N_TRAIN:,} training images"
            return f"{dataset}, {experiment}, seed {seed}: {reason}, see {(run_dir / 'log').relative_to(ROOT)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(made.read_text() + "\n")
    partial.replace(target)  # at once, so that a file is whole where there is one
    return f"{dataset}, {experiment}, seed {seed}: {json.loads(target.read_text())['metrics']}"


def run_missing():
    """Run what has no result yet; True where all succeeded."""
    wanted = [(d, e, seed) for seed in SEEDS for d in NOTEBOOKS for e in EXPERIMENTS]
    missing = [entry for entry in wanted if not path_of(*entry).exists()]
    print(f"{len(missing)} of {len(wanted)} runs are missing.", flush=True)
    with ThreadPoolExecutor(int(os.environ.get("JOBS", os.cpu_count()))) as pool:
        for line in pool.map(lambda entry: run(*entry), missing):
            print(line, flush=True)
    return all(path_of(*entry).exists() for entry in wanted)


def summary():
    """Dataset -> experiment -> metric -> {"mean", "std", "n"}, over the seeds there are; std None for one."""
    table = {}
    for dataset in NOTEBOOKS:
        for experiment in EXPERIMENTS:
            paths = [path_of(dataset, experiment, seed) for seed in SEEDS]
            runs = [json.loads(path.read_text())["metrics"] for path in paths if path.exists()]
            for metric in runs[0] if runs else []:
                values = [metrics[metric] for metrics in runs]
                std = statistics.stdev(values) if len(values) > 1 else None
                entry = {"mean": statistics.mean(values), "std": std, "n": len(values)}
                table.setdefault(dataset, {}).setdefault(experiment, {})[metric] = entry
    return table


def cell(entry, digits):
    """Mean and deviation as text."""
    if entry is None:
        return ""
    deviation = "" if entry["std"] is None else f" ± {entry['std']:.{digits}f}"
    return f"{entry['mean']:.{digits}f}{deviation}"


def table_of(dataset, experiments):
    """A Markdown table, a row for each experiment."""
    header = ["", "the original", "ours", "5-nn", "recall@1", "MAP@R", "AUC", "EER", "seeds"]
    rows = []
    for name, metrics in experiments.items():
        accuracy = metrics.get("val_accuracy")
        ours = f"{cell(accuracy, 2)} %" if accuracy else cell(metrics["val_loss"], 4)
        figures = [cell(metrics.get(key), 2) for key in ("knn5", "recall@1", "map@r", "auc", "eer")]
        n = metrics["val_loss"]["n"]
        rows.append([EXPERIMENTS[name], ORIGINAL[dataset].get(name, ""), ours, *figures, str(n)])
    return markdown(header, rows)


def with_tables(text, table):
    """The text with the tables of the data sets behind `<!-- results DATASET -->`."""
    for dataset, experiments in table.items():
        text = insert(text, f"results {dataset}", table_of(dataset, experiments), "`make results`.")
    return text


def main():
    if "--run" in sys.argv:
        return run_cells(*sys.argv[sys.argv.index("--run") + 1 :])
    is_complete = "--tables" in sys.argv or run_missing()
    (RESULTS / "summary.json").write_text(json.dumps(summary(), indent=1) + "\n")
    README.write_text(with_tables(README.read_text(), summary()))
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
