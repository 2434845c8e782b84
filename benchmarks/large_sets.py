"""Time and memory of evaluation where sets are large: retrieval, verification, episodes, statistics.

    python benchmarks/large_sets.py            # print the table, write results/large_sets.json
    python benchmarks/large_sets.py --print    # print the table of the last run

Noisy classes, one thread, each once in a process of its own.
"""

import sys

import torch
from common import read, try_alone, write
from tables import markdown

from evaluation import evaluate_embeddings, few_shot_accuracy, verification
from metrics import EmbeddingStatisticsMetric


def sample(n, n_classes, D):
    """Embeddings (n, D) around centres of classes of one size, and labels (n,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    centres = torch.randn(n_classes, D, generator=generator)
    return centres[labels] + 1.5 * torch.randn(n, D, generator=generator), labels


def statistics(embeddings, labels):
    metric = EmbeddingStatisticsMetric()
    for x, y in zip(embeddings.split(250), labels.split(250)):
        metric((x,), (y,), None)
    return metric.value()


def each_of(n_classes):
    return f"`evaluate_embeddings`, 50,000 x 64, {n_classes:,} classes, each against all others"


TASKS = {
    **{each_of(C): lambda C=C: (evaluate_embeddings, sample(50_000, C, 64), {}) for C in (10, 100, 1000)},
    "`verification`, 10,000 x 64, 10 classes, all pairs": lambda: (verification, sample(10_000, 10, 64), {}),
    "`verification`, 100,000 x 64, 500 classes, a sample": lambda: (verification, sample(100_000, 500, 64), {}),
    "`few_shot_accuracy`, 100-way 5-shot, 4,000 x 2,048, 100 episodes": lambda: (
        few_shot_accuracy,
        sample(4000, 200, 2048),
        {"n_way": 100, "n_shot": 5, "n_episodes": 100},
    ),
    "`EmbeddingStatisticsMetric`, 1,500 x 4,096": lambda: (statistics, sample(1500, 50, 4096), {}),
}


def measure():
    results = {}
    for name, prepare in TASKS.items():
        function, sets, options = prepare()
        status, seconds, peak = try_alone(lambda: function(*sets, **options), seconds=600)  # noqa: B023, called at once
        results[name] = {"status": status, "seconds": seconds, "mib": peak / 2**20}
        print(name, results[name], file=sys.stderr, flush=True)
    return results


def table(results):
    """A row for each task."""
    rows = [[name, f"{x['seconds']:.1f}", f"{x['mib']:,.0f}"] for name, x in results["tasks"].items()]
    return markdown(["", "seconds", "MiB above the base"], rows)


def main():
    if "--print" not in sys.argv:
        torch.set_num_threads(1)
        write("large_sets", {"tasks": measure()})
    print(table(read("large_sets")))


if __name__ == "__main__":
    main()
