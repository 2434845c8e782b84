"""Time and memory of retrieval figures: MAP@R and R-precision of 10,000 queries against 60,000 references in 64-D.

    python benchmarks/retrieval.py            # print the table, write results/retrieval.json
    python benchmarks/retrieval.py --print    # print the table of the last run

Ten noisy classes, one thread. Each contender runs once in a process of its own, for its peak memory, then both in turn
in one process. PML is pytorch-metric-learning's AccuracyCalculator with k="max_bin_count", which searches by faiss.
"""

import sys

import torch
from common import read, time_in_turn, try_alone, write
from tables import markdown

from evaluation import evaluate_embeddings

N_QUERIES, N_REFERENCES, D = 10_000, 60_000, 64
FIGURES = {"recall@1": "precision_at_1", "r_precision": "r_precision", "map@r": "mean_average_precision_at_r"}


def sample(n, generator):
    """Embeddings (n, D) around ten centres, and labels (n,)."""
    centres = torch.randn(10, D, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(10, (n,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(n, D, generator=generator), labels


def ours(queries, reference):
    values = evaluate_embeddings(*queries, *reference)
    return {name: values[name] for name in FIGURES}


def peer(queries, reference):
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(include=tuple(FIGURES.values()), k="max_bin_count")
    values = calculator.get_accuracy(*queries, *reference)
    return {name: float(values[theirs]) for name, theirs in FIGURES.items()}


def measure():
    import faiss

    faiss.omp_set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    sets = sample(N_QUERIES, generator), sample(N_REFERENCES, generator)
    figures = {}
    contenders = {
        "ours": lambda: figures.update(ours=ours(*sets)),
        "PML with faiss": lambda: figures.update({"PML with faiss": peer(*sets)}),
    }
    alone = {name: try_alone(function, seconds=600) for name, function in contenders.items()}
    seconds = time_in_turn(contenders, budget=0)
    return {
        name: {"seconds": seconds[name], "mib": alone[name][2] / 2**20, "figures": figures[name]} for name in contenders
    }


def table(results):
    """A row for each contender."""
    rows = [
        [name, f"{entry['seconds']:.1f}", f"{entry['mib']:,.0f}", *(f"{x:.6f}" for x in entry["figures"].values())]
        for name, entry in results["contenders"].items()
    ]
    return markdown(["", "seconds", "MiB above the base", *FIGURES], rows)


def main():
    if "--print" not in sys.argv:
        torch.set_num_threads(1)
        write("retrieval", {"contenders": measure()})
    print(table(read("retrieval")))


if __name__ == "__main__":
    main()
