"""Run the notebooks' experiments over several seeds; write results/, and the tables of README.md and docs/results.md.

    python scripts/reproduce.py            # what is missing, then summary.json and the tables
    python scripts/reproduce.py --tables   # summary.json and the tables alone

An experiment is a cell of a notebook that carries its name as a tag, behind the cells tagged "setup". Each is run in a
process of its own with one thread, with SEED in the environment, and leaves results/DATASET/EXPERIMENT-SEED.json. What
is there is not run again, so this can be stopped at any time. Where the notebook itself was run with a seed, as by
`make experiments`, its numbers are taken. DATA_ROOT says where the data are, JOBS how many processes run at once.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tables import insert, markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
RUNS = ROOT / "runs"
PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md"]
SEEDS = [0, 1, 2]
EPOCHS = 20
NOTEBOOKS = {
    "mnist": "Experiments_MNIST.ipynb",
    "fashion_mnist": "Experiments_FashionMNIST.ipynb",
    "omniglot": "Experiments_Omniglot.ipynb",
}
N_TRAIN = {"mnist": 60_000, "fashion_mnist": 60_000, "omniglot": 19_280}  # results are those of the whole data sets
DIGITS_AND_CLOTHES = {
    "softmax": "softmax",
    "siamese": "siamese, random pairs",
    "triplet": "triplet, random triplets",
    "online_contrastive": "online contrastive, hard negative pairs",
    "online_triplet": "online triplet, random hard negatives",
    "best_2d": "online contrastive, augmented",
    "best_64d": "online contrastive, augmented, 64-D",
}
STRATEGIES = {
    "softmax": "softmax classifier",
    "contrastive": "contrastive, hard negative pairs",
    "triplet_random": "triplet, random hard negatives",
    "triplet_semihard": "triplet, semi-hard",
    "triplet_batch_hard": "triplet, batch-hard",
    "triplet_batch_all": "triplet, batch-all",
}
ONE_SHOT = {
    "official_runs": "this library, from 30 alphabets, 964 characters",
    "official_runs_small1": "this library, from 5 alphabets, 136 characters",
    "official_runs_small2": "this library, from 5 others, 156 characters",
}
EXPERIMENTS = {
    "mnist": DIGITS_AND_CLOTHES,
    "fashion_mnist": DIGITS_AND_CLOTHES,
    "omniglot": STRATEGIES | ONE_SHOT | {"split_1200_423": "this library"},
}
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
# Errors in per cent on the 20 official runs, and accuracies in per cent on the 1,200 + 423 characters, as published.
PUBLISHED_ONE_SHOT = [
    ["people (Lake et al. 2015)", "4.5", ""],
    ["Bayesian program learning (Lake et al. 2015)", "3.3", ""],
    ["convolutional network (Lake et al. 2019)", "13.5", ""],
    ["modified Hausdorff distance (the data set's demo)", "38.8", ""],
    ["siamese network (Koch et al. 2015, 400 trials of their own)", "8.0", ""],
]
FEW_SHOT = ["5way_1shot", "5way_5shot", "20way_1shot", "20way_5shot"]
PUBLISHED_FEW_SHOT = [
    ["matching networks (Vinyals et al. 2016)", "98.1", "", "93.8", "", ""],
    ["prototypical networks (Snell et al. 2017)", "98.8", "", "96.0", "", ""],
]


def path_of(dataset, experiment, seed):
    return RESULTS / dataset / f"{experiment}-{seed}.json"


def run_cells(notebook, experiment, change=lambda namespace: {}):
    """Execute the set-up and an experiment of a notebook in this process, and return its names and their values.

    `change` is called between the two, with the names of the set-up; those that it returns take the place of others.
    """
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    namespace = {"__name__": "__main__"}
    for tag in ("setup", experiment):
        tagged = ["".join(cell["source"]) for cell in cells if tag in cell["metadata"].get("tags", [])]
        if not tagged:
            raise ValueError(f"{notebook} has no cell tagged {tag!r}")
        for source in tagged:
            exec(compile(source, f"{notebook}, {tag}", "exec"), namespace)
        if tag == "setup":
            namespace.update(change(namespace))
    return namespace


def is_wanted(path, dataset, seed):
    """Whether a file holds a result of this seed on all data, for all epochs."""
    if not path.exists():
        return False
    try:
        settings = json.loads(path.read_text())["settings"]
    except ValueError:  # of a run that was stopped while it wrote
        return False
    return (settings["seed"], settings["epochs"], settings["n_train"]) == (seed, EPOCHS, N_TRAIN[dataset])


def run(dataset, experiment, seed):
    """Fetch one result from the notebook's own run, or make it in a process; keep it in results/."""
    target, run_dir = path_of(dataset, experiment, seed), RUNS / "results" / f"{dataset}-{experiment}-{seed}"
    made = RUNS / dataset / f"{experiment}.json"
    if not is_wanted(made, dataset, seed):
        made = run_dir / f"{experiment}.json"
        made.unlink(missing_ok=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        variables = {"SEED": seed, "EPOCHS": EPOCHS, "RUN_DIR": run_dir, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
        variables |= {"TQDM_DISABLE": 1, "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": 1}
        command = [sys.executable, __file__, "--run", NOTEBOOKS[dataset], experiment]
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        with open(run_dir / "log", "w") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode or not is_wanted(made, dataset, seed):
            incomplete = f"it did not have all {N_TRAIN[dataset]:,} training images"
            reason = "it failed" if done.returncode else incomplete
            return f"{dataset}, {experiment}, seed {seed}: {reason}, see {(run_dir / 'log').relative_to(ROOT)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(made.read_text() + "\n")
    partial.replace(target)  # at once, so that a file is whole where there is one
    return f"{dataset}, {experiment}, seed {seed}: {json.loads(target.read_text())['metrics']}"


def run_missing():
    """Run what has no result yet; True where all succeeded."""
    wanted = [(d, e, seed) for seed in SEEDS for d in NOTEBOOKS for e in EXPERIMENTS[d]]
    missing = [entry for entry in wanted if not path_of(*entry).exists()]
    print(f"{len(missing)} of {len(wanted)} runs are missing.", flush=True)
    with ThreadPoolExecutor(int(os.environ.get("JOBS", os.cpu_count()))) as pool:
        for line in pool.map(lambda entry: run(*entry), missing):
            print(line, flush=True)
    return all(path_of(*entry).exists() for entry in wanted)


def summary():
    """Dataset -> experiment -> metric -> {"mean", "std", "n"}, over the seeds there are; std None for one."""
    table = {}
    for dataset, experiments in EXPERIMENTS.items():
        for experiment in experiments:
            paths = [path_of(dataset, experiment, seed) for seed in SEEDS]
            runs = [json.loads(path.read_text())["metrics"] for path in paths if path.exists()]
            for metric in runs[0] if runs else []:
                values = [metrics[metric] for metrics in runs]
                std = float(np.std(values, ddof=1)) if len(values) > 1 else None
                entry = {"mean": float(np.mean(values)), "std": std, "n": len(values)}
                table.setdefault(dataset, {}).setdefault(experiment, {})[metric] = entry
    return table


def cell(entry, digits=2):
    """Mean and deviation as text."""
    if entry is None:
        return ""
    deviation = "" if entry["std"] is None else f" ± {entry['std']:.{digits}f}"
    return f"{entry['mean']:.{digits}f}{deviation}"


def rows_of(dataset, names, metrics, results):
    """A row for each experiment that has results: its title, its metrics, how many seeds."""
    titles = EXPERIMENTS[dataset]
    rows = {name: results[name] for name in names if name in results}
    return [
        [titles[name], *(cell(entries.get(key)) for key in metrics), str(next(iter(entries.values()))["n"])]
        for name, entries in rows.items()
    ]


def short_table(results):
    """MNIST at a glance, for README: three columns of the whole table."""
    rows = rows_of("mnist", DIGITS_AND_CLOTHES, ["knn5", "map@r", "eer"], results)
    return markdown(["", "5-nn", "MAP@R", "EER"], [row[:-1] for row in rows])


def table_beside_the_original(dataset, results):
    metrics = ["knn5", "recall@1", "map@r", "auc", "eer"]
    rows = rows_of(dataset, EXPERIMENTS[dataset], metrics, results)
    for row, name in zip(rows, results):
        accuracy = results[name].get("val_accuracy")
        ours = f"{cell(accuracy)} %" if accuracy else cell(results[name]["val_loss"], 4)
        row[1:1] = [ORIGINAL[dataset].get(name, ""), ours]
    return markdown(["", "the original", "ours", "5-nn", "recall@1", "MAP@R", "AUC", "EER", "seeds"], rows)


def tables_of(summary):
    """Name between the pages' markers -> table."""
    tables = {f"results {d}": table_beside_the_original(d, summary[d]) for d in ORIGINAL if d in summary}
    if "mnist" in summary:
        tables["results short"] = short_table(summary["mnist"])
    if "omniglot" in summary:
        results = summary["omniglot"]
        one_shot = rows_of("omniglot", ONE_SHOT, ["error"], results)
        few_shot = rows_of("omniglot", ["split_1200_423"], FEW_SHOT, results)
        strategies = rows_of("omniglot", STRATEGIES, ["within_20way_error", "map@r", "minutes"], results)
        header = ["", *(name.replace("way_", "-way ").replace("shot", "-shot") for name in FEW_SHOT), "seeds"]
        tables["results omniglot"] = markdown(["", "error", "seeds"], [*PUBLISHED_ONE_SHOT, *one_shot])
        tables["results omniglot_split"] = markdown(header, [*PUBLISHED_FEW_SHOT, *few_shot])
        header = ["", "20-way error within an alphabet", "MAP@R", "minutes", "seeds"]
        tables["results omniglot_strategies"] = markdown(header, strategies)
    return tables


def with_tables(text, summary):
    """The text with the tables between `<!-- results NAME -->` and `<!-- end -->`."""
    for name, table in tables_of(summary).items():
        text = insert(text, name, table, "`make results`.")
    return text


def main():
    if "--run" in sys.argv:
        run_cells(*sys.argv[sys.argv.index("--run") + 1 :])
        return 0
    is_complete = "--tables" in sys.argv or run_missing()
    (RESULTS / "summary.json").write_text(json.dumps(summary(), indent=1) + "\n")
    for page in PAGES:
        page.write_text(with_tables(page.read_text(), summary()))
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
