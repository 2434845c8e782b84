"""Tests of evaluation.py, against numbers worked by hand, loops and other libraries."""

import enum
import itertools
import os
import random
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

import evaluation
from datasets import BalancedBatchSampler
from evaluation import evaluate_embeddings, few_shot_accuracy, knn_predict, one_shot_runs, verification
from metrics import EmbeddingMetric

# Many of the sets below hold equal rows; the tests of the warning look for it themselves.
pytestmark = pytest.mark.filterwarnings("ignore:.*have a copy of themselves")

# Data, and loops that compute what is right


def shuffled_labels(n, n_classes, generator):
    return (torch.arange(n) % n_classes)[torch.randperm(n, generator=generator)]


def gaussian(generator):
    return torch.randn(44, 4, generator=generator), shuffled_labels(44, 5, generator)


def duplicates(generator):
    x, labels = gaussian(generator)
    rows = torch.randint(14, (44,), generator=generator)
    return x[rows], labels[rows]


def duplicates_of_other_labels(generator):
    x, labels = gaussian(generator)
    return x[torch.randint(14, (44,), generator=generator)], labels


def grid(generator):
    return torch.randint(4, (44, 2), generator=generator), shuffled_labels(44, 5, generator)


def unbalanced(generator):
    labels = torch.tensor([-7] * 20 + [1000] * 12 + [3] * 5 + [4] * 2 + [5] * 2 + [6, 8, 9])
    return torch.randn(44, 3, generator=generator), labels[torch.randperm(44, generator=generator)]


def collapsed(generator):
    return torch.full((44, 3), 0.1), shuffled_labels(44, 5, generator)


def far_from_the_origin(generator):
    return torch.randn(44, 4, generator=generator) + 1e4, shuffled_labels(44, 5, generator)


def far_grid(generator):
    x, labels = grid(generator)
    return x.double() * 0.25 + 1e8, labels  # squares no longer fit float64, differences do


MAKERS = [
    gaussian,
    duplicates,
    duplicates_of_other_labels,
    grid,
    unbalanced,
    collapsed,
    far_from_the_origin,
    far_grid,
]

each_dtype = pytest.mark.parametrize(  # each with few digits behind the point: ties
    ("dtype", "offset"), [(torch.float16, 90), (torch.bfloat16, 30), (torch.float32, 3e5), (torch.float64, 1e12)]
)
each_data_set = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
each_seed = pytest.mark.parametrize("seed", range(3))
each_metric = pytest.mark.parametrize("metric", ["euclidean", "cosine"])


def seeded_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close_to(expected, tolerance=1e-12):
    return pytest.approx(expected, rel=0, abs=tolerance)


def naive_squared_distance(a, b):
    total = 0.0
    for p, q in zip(a, b):
        total += (float(p) - float(q)) ** 2
    return total


def naive_neighbors(query, references, left_out=()):
    """All references but those left out, by distance and then by index."""
    found = []
    for index, reference in enumerate(references):
        if index not in left_out:
            found.append((naive_squared_distance(query, reference), index))
    return [index for _, index in sorted(found)]


def naive_vote(labels):
    """What most have of labels that come nearest first; among equals that of the nearest."""
    most, winner = 0, None
    for label in labels:
        count = 0
        for other in labels:
            count += other == label
        if count > most:
            most, winner = count, label
    return winner


def naive_retrieval(x, labels, reference=None, reference_labels=None, ks=(1, 5, 10), n_neighbors=5, **options):
    rows, n_left_out = naive_figures(x, labels, reference, reference_labels, ks, n_neighbors, **options)
    figures = [row for _, row in rows]
    means = {name: sum(row[name] for row in figures) / len(figures) for name in figures[0]}
    return {**means, "n_queries": len(rows), "n_left_out": n_left_out}


def naive_figures(
    x, labels, reference, reference_labels, ks, n_neighbors, groups=None, reference_groups=None, full=False
):
    """`(label, figures)` of each query with a relevant reference, and the number of those without."""
    is_self = reference is None
    references, reference_labels = (x, labels) if is_self else (reference, reference_labels)
    reference_groups = groups if is_self else reference_groups
    rows, n_left_out = [], 0
    for i, (query, label) in enumerate(zip(x, labels)):
        left_out = {i} if is_self else set()
        for j in range(len(references) if groups is not None else 0):
            if reference_labels[j] == label and reference_groups[j] == groups[i]:
                left_out.add(j)
        is_relevant, votes = [], []
        for j in naive_neighbors(query, references, left_out):
            is_relevant.append(reference_labels[j] == label)
            votes.append(reference_labels[j])
        R = sum(is_relevant)
        if R == 0:
            n_left_out += 1
            continue
        row = {f"recall@{k}": float(any(is_relevant[:k])) for k in ks}
        row["r_precision"] = sum(is_relevant[:R]) / R
        row["map@r"] = sum(sum(is_relevant[: p + 1]) / (p + 1) for p in range(R) if is_relevant[p]) / R
        row[f"knn{n_neighbors}"] = float(naive_vote(votes[:n_neighbors]) == label)
        if full:
            ranks = [p + 1 for p, relevant in enumerate(is_relevant) if relevant]
            row["map"] = sum((n + 1) / rank for n, rank in enumerate(ranks)) / R
            row |= {f"cmc@{k}": float(ranks[0] <= k) for k in ks}
        rows.append((label, row))
    return rows, n_left_out


def naive_pairs(x, labels):
    """Distances of pairs of one class, and of two."""
    positive, negative = [], []
    for i in range(len(x)):
        for j in range(i):
            distance = naive_squared_distance(x[i], x[j]) ** 0.5
            (positive if labels[i] == labels[j] else negative).append(distance)
    return positive, negative


def naive_rates(positive, negative):
    """(FAR, TAR) of accepting no pair, and then all up to each distance that occurs."""
    rates = [(0.0, 0.0)]
    for limit in sorted({*positive, *negative}):
        far, tar = (sum(distance <= limit for distance in part) / len(part) for part in (negative, positive))
        rates.append((far, tar))
    return rates


def naive_auc(positive, negative):
    wins = 0.0
    for p in positive:
        for n in negative:
            wins += 1.0 if p < n else 0.5 if p == n else 0.0
    return wins / (len(positive) * len(negative))


def naive_accuracy(positive, negative):
    P, N = len(positive), len(negative)
    return max((tar * P + (1 - far) * N) / (P + N) for far, tar in naive_rates(positive, negative))


def naive_tar(rates, limit):
    """The largest TAR at which FAR is at most the limit."""
    return max(tar for far, tar in rates if far <= limit)


def naive_eer(positive, negative):
    """FAR where the polyline through all rates meets FAR = 1 - TAR."""
    rates = naive_rates(positive, negative)
    for (far, tar), (next_far, next_tar) in itertools.pairwise(rates):
        missing, step = 1 - far - tar, next_far - far + next_tar - tar
        if step >= missing:
            return far + missing / step * (next_far - far)
    raise AssertionError("the curve ends at (1, 1)")


def naive_verification(x, labels, fars=(0.001, 0.01)):
    positive, negative = naive_pairs(x, labels)
    rates = naive_rates(positive, negative)
    return {
        "auc": naive_auc(positive, negative),
        "eer": naive_eer(positive, negative),
        "accuracy": naive_accuracy(positive, negative),
        **{f"tar@far={limit:g}": naive_tar(rates, limit) for limit in fars},
        "n_positive": len(positive),
        "n_negative": len(negative),
        "is_sample": False,
    }


def naive_episode(classes, n_shot):
    """Accuracy of one episode: classes are lists of samples, of which the first ones are the support."""
    prototypes, n_right, n_queries = [], 0, 0
    for samples in classes:
        prototypes.append([sum(column) / n_shot for column in zip(*samples[:n_shot])])
    for truth, samples in enumerate(classes):
        for query in samples[n_shot:]:
            distances = [naive_squared_distance(query, prototype) for prototype in prototypes]
            n_right += distances.index(min(distances)) == truth
            n_queries += 1
    return n_right / n_queries


def without(values, prefixes=("threshold", "curve")):
    """What is left of values without those that the loops do not give."""
    return {name: value for name, value in values.items() if not name.startswith(prefixes)}


def exact_distances(x, y):
    """(N, M), by differences, in float64."""
    x, y = (np.asarray(z, dtype=np.float64) for z in (x, y))
    return np.sqrt(sum((x[:, None, d] - y[None, :, d]) ** 2 for d in range(x.shape[1])))


def pairs_of(x, labels):
    """Distance of each pair and whether it is of one class, by numpy: (P + N,), (P + N,)."""
    i, j = np.triu_indices(len(x), k=1)
    labels = np.asarray(labels)
    return exact_distances(x, x)[i, j], labels[i] == labels[j]


def numpy_retrieval(x, labels, reference=None, reference_labels=None, ks=(1, 5, 10), n_neighbors=5):
    """A second opinion on more data than loops can take: whole matrices, sorted in full."""
    is_self = reference is None
    x, labels = np.asarray(x), np.asarray(labels)
    y, y_labels = (x, labels) if is_self else (np.asarray(reference), np.asarray(reference_labels))
    distances = exact_distances(x, y)
    if is_self:
        np.fill_diagonal(distances, np.inf)
    order = distances.argsort(axis=1, kind="stable")[:, : len(y) - is_self]
    sorted_labels = y_labels[order]
    is_relevant = sorted_labels == labels[:, None]
    R = is_relevant.sum(axis=1)
    keep = R > 0
    order, sorted_labels, is_relevant, R, labels = (a[keep] for a in (order, sorted_labels, is_relevant, R, labels))
    place = np.arange(is_relevant.shape[1])
    hits = is_relevant & (place < R[:, None])
    values = {f"recall@{k}": is_relevant[:, :k].max(axis=1).mean() for k in ks}
    values["r_precision"] = (hits.sum(axis=1) / R).mean()
    values["map@r"] = ((is_relevant.cumsum(axis=1) / (place + 1) * hits).sum(axis=1) / R).mean()
    votes = [naive_vote(row) for row in sorted_labels[:, :n_neighbors].tolist()]
    values[f"knn{n_neighbors}"] = (np.array(votes) == labels).mean()
    return {**values, "n_queries": int(keep.sum()), "n_left_out": int((~keep).sum())}, order


# Retrieval


def test_retrieval_by_hand():
    values = evaluate_embeddings(
        [[0.0], [1.0], [3.0], [6.0], [10.0]], [0, 1, 0, 0, 2], ks=(1, 2), n_neighbors=3
    )  # the neighbours of the three queries have labels 0: 1 0 0 2, 2: 1 0 0 2, 3: 0 2 1 0
    assert values == close_to(
        {
            "recall@1": 1 / 3,
            "recall@2": 1.0,
            "r_precision": 1 / 2,
            "map@r": (1 / 4 + 1 / 4 + 1 / 2) / 3,
            "knn3": 1.0,
            "n_queries": 3,
            "n_left_out": 2,
        }
    )
    assert all(type(value) in (int, float) for value in values.values())


def test_retrieval_leaves_out_a_query_by_index_and_not_by_distance():
    twins = [[0.0], [0.0], [5.0], [5.0]]
    assert evaluate_embeddings(twins, [0, 0, 1, 1], ks=(1,))["recall@1"] == 1
    assert evaluate_embeddings(twins, [0, 1, 0, 1], ks=(1,))["recall@1"] == 0
    assert evaluate_embeddings(twins, [0, 1, 0, 1], twins, [0, 1, 0, 1], ks=(1,))["recall@1"] == 0.5


@each_data_set
@each_seed
def test_retrieval_equals_loops(make, seed):
    x, labels = make(seeded_generator(seed))
    expected = naive_retrieval(x.tolist(), labels.tolist())
    assert evaluate_embeddings(x, labels) == close_to(expected)


@each_data_set
@each_seed
def test_retrieval_from_a_reference_equals_loops(make, seed):
    x, labels = make(seeded_generator(seed))
    x, y, labels, y_labels = x[:15], x[15:], labels[:15].clone(), labels[15:]
    labels[:2] = 77  # nowhere in the reference
    expected = naive_retrieval(x.tolist(), labels.tolist(), y.tolist(), y_labels.tolist(), (1, 2, 4), 3)
    assert expected["n_left_out"] >= 2
    assert evaluate_embeddings(x, labels, y, y_labels, ks=(1, 2, 4), n_neighbors=3) == close_to(expected)


@pytest.mark.parametrize("n_neighbors", [1, 2, 4, 1000])
def test_retrieval_takes_any_k_and_number_of_neighbours(n_neighbors):
    x, labels = grid(seeded_generator())
    ks = (3, 1, 43, 44, 1000)
    values = evaluate_embeddings(x, labels, ks=ks, n_neighbors=n_neighbors)
    assert values == close_to(naive_retrieval(x.tolist(), labels.tolist(), ks=ks, n_neighbors=n_neighbors))
    assert values["recall@1000"] == 1


@each_dtype
@each_seed
def test_retrieval_computes_in_float64_whatever_comes(dtype, offset, seed):
    x, labels = gaussian(seeded_generator(seed))
    x = (x.double() + offset).to(dtype)
    assert evaluate_embeddings(x, labels) == close_to(naive_retrieval(x.tolist(), labels.tolist()))


def test_embeddings_and_labels_come_in_any_form():
    x, labels = grid(seeded_generator())
    expected = [f(x, labels) for f in (evaluate_embeddings, verification)]
    forms = [
        (x.numpy(), labels.numpy()),
        (x.numpy().astype(np.float16), labels.numpy().astype(np.uint8)),
        (x.tolist(), labels.tolist()),
        (x.bfloat16().requires_grad_(), labels[:, None].int()),
        (x.T.contiguous().T, labels[:, None].numpy()),
    ]
    for form in forms:
        for f, values in zip((evaluate_embeddings, verification), expected):
            assert without(f(*form), "curve") == without(values, "curve")
        assert few_shot_accuracy(*form, 3, 1, n_query=2, n_episodes=9) == few_shot_accuracy(
            x, labels, 3, 1, n_query=2, n_episodes=9
        )
        for result, other in zip(knn_predict(x[:5], *form), knn_predict(form[0][:5], x, labels)):
            assert torch.equal(result, other)


CALLS = {
    "evaluate_embeddings": evaluate_embeddings,
    "reference": lambda x, labels: evaluate_embeddings([[0.0, 0.0], [1.0, 1.0]], [0, 1], x, labels),
    "knn_predict": lambda x, labels: knn_predict([[0.0, 0.0]], x, labels, n_neighbors=1),
    "verification": verification,
    "few_shot_accuracy": lambda x, labels: few_shot_accuracy(x, labels, 2, 1, n_query=1),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


KINDS = {
    "uint16 tensor": lambda labels: labels.to(torch.uint16),
    "int8 column": lambda labels: labels.to(torch.int8)[:, None],
    "strings": lambda labels: [f"number {label}" for label in labels.tolist()],
    "array of strings": lambda labels: np.array([f"number {label}" for label in labels.tolist()]),
    "array of objects": lambda labels: np.array([f"number {label}" for label in labels.tolist()], dtype=object),
    "series": lambda labels: pd.Series(labels.numpy(), index=labels.numpy()[::-1] * 7),
    "series of strings": lambda labels: pd.Series([f"n {label}" for label in labels.tolist()], index=labels.numpy()),
    "categories": lambda labels: pd.Series([f"n {label}" for label in labels.tolist()]).astype("category"),
    "list of numpy's": lambda labels: [*labels.numpy()],
    "list of tensors": lambda labels: [*labels],
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@each_kind
def test_labels_may_be_of_any_kind(kind):
    x, labels = gaussian(seeded_generator())
    named = kind(labels)
    assert evaluate_embeddings(x, named) == evaluate_embeddings(x, labels)
    assert evaluate_embeddings(x, named, x, named) == evaluate_embeddings(x, labels, x, labels)
    assert without(verification(x, named), "curve") == without(verification(x, labels), "curve")
    options = {"n_way": 3, "n_shot": 1, "n_query": 2, "n_episodes": 9}
    assert few_shot_accuracy(x, named, **options) == few_shot_accuracy(x, labels, **options)
    groups = torch.arange(44) % 3
    assert evaluate_embeddings(x, labels, groups=kind(groups)) == evaluate_embeddings(x, labels, groups=groups)
    predicted, expected = knn_predict(x[:5], x, named)[0], knn_predict(x[:5], x, labels)[0]
    if torch.is_tensor(predicted):
        assert torch.equal(predicted, expected)
    else:
        assert predicted.tolist() == np.asarray(kind(expected)).tolist()


def test_labels_may_be_bools():
    x, labels = gaussian(seeded_generator())
    labels = labels > 2
    assert evaluate_embeddings(x, labels) == evaluate_embeddings(x, labels.long())
    assert evaluate_embeddings(x, labels.tolist(), x, labels.numpy()) == evaluate_embeddings(
        x, labels.long(), x, labels
    )


@pytest.mark.parametrize(
    "labels",
    [[0, "0"] * 3, ["a", None] * 3, [0, None] * 3, [0, float("nan")] * 3, [1 + 2j] * 6, [(0, 1)] * 6],
    ids=["numbers and strings", "strings and None", "numbers and None", "NaN", "complex", "tuples"],
)
@each_call
def test_labels_that_are_no_labels_are_an_error(call, labels):
    with pytest.raises(
        ValueError, match=r"one whole number or string as label of each of 6 (embeddings|references), got"
    ):
        call(torch.randn(6, 2), labels)


class Kind(str, enum.Enum):
    CAT = "cat"
    DOG = "a dog"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Kind.CAT, Kind.DOG), (b"a", b"a\0"), ("a", "a\0"), (2**64 - 1, 2**64 - 2), (2**70, 1), (-(2**63), 2**63 - 1),
        (np.uint8(1), np.int64(2)), (True, False), ("x" * 10_000, "x"),
    ],
    ids=["enum", "bytes", "NUL", "uint64", "large", "int64", "numpy's", "bool", "long"],
)  # fmt: skip
def test_labels_that_differ_a_little_are_two_classes(first, second):
    x = torch.randn(40, 2, generator=seeded_generator())
    labels = [first, second] * 20
    assert evaluate_embeddings(x, labels) == evaluate_embeddings(x, [0, 1] * 20)
    each = evaluate_embeddings(x, labels, average=None)["map@r"]
    assert set(each) == {first, second}
    predicted = knn_predict(x, x, labels, n_neighbors=1)[0]
    assert predicted.tolist() == labels


def test_labels_of_uint64_are_not_those_of_their_bits():
    x = torch.randn(8, 2)
    with pytest.raises(ValueError, match="no query has a reference of its label"):
        evaluate_embeddings(x, np.full(8, 2**64 - 1, dtype=np.uint64), x, [-1] * 8)


@pytest.mark.parametrize("n_classes", [1, 2])
def test_values_of_each_class_where_one_has_queries(n_classes):
    x, labels = [[0.0], [1.0], [5.0]], [3, 3, 4][: 3 if n_classes == 2 else 2]
    values = evaluate_embeddings(x[: len(labels)], labels, average=None, ks=(1,))
    assert values["recall@1"] == {3: 1.0}


EMBEDDINGS = {
    "reversed": lambda x: x[::-1],
    "big-endian": lambda x: x.astype(">f8"),
    "read-only": lambda x: np.frombuffer(x.tobytes()).reshape(x.shape),
    "objects": lambda x: x.astype(object),
    "long double": lambda x: x.astype(np.longdouble),
    "table": pd.DataFrame,
    "nullable table": lambda x: pd.DataFrame(x).astype("Float64"),
    "bools": lambda x: x > 0,
    "list of tensors": lambda x: [*torch.from_numpy(x)],
}


@pytest.mark.parametrize("kind", EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_embeddings_may_be_of_any_kind(kind):
    x, labels = gaussian(seeded_generator())
    x, given = x.double().numpy(), kind(x.double().numpy())
    expected = torch.tensor(np.array(x[::-1] if given is not None and kind is EMBEDDINGS["reversed"] else x))
    expected = (expected > 0).double() if kind is EMBEDDINGS["bools"] else expected
    assert evaluate_embeddings(given, labels) == evaluate_embeddings(expected, labels)
    assert without(verification(given, labels), "curve") == without(verification(expected, labels), "curve")


@pytest.mark.parametrize(
    "given",
    [None, ["a"] * 6, torch.randn(6, 2, dtype=torch.complex64), np.ones((6, 2)) * 1j, [[1.0], [1.0, 2.0]] * 3],
    ids=["None", "strings", "complex", "complex array", "ragged"],
)
def test_embeddings_that_are_no_numbers_are_an_error(given):
    with pytest.raises(ValueError, match="expected embeddings"):
        evaluate_embeddings(given, [0, 1] * 3)


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e155, 1e200])
def test_scales_whose_squares_fit_no_float64(scale):
    x, labels = gaussian(seeded_generator())
    x = x.double()
    for call in (evaluate_embeddings, verification):
        with pytest.raises(ValueError, match="whose squares fit float64"):
            call(x * scale, labels)
        values, expected = call(x * scale, labels, metric="cosine"), call(x, labels, metric="cosine")
        assert without(values, "curve") == pytest.approx(without(expected, "curve"), rel=1e-9)


def test_labels_of_queries_and_references_are_of_one_type():
    x = torch.randn(6, 2)
    with pytest.raises(ValueError, match=r"expected labels of one type, got int and str"):
        evaluate_embeddings(x, [0, 1, 2] * 2, x, ["0", "1", "2"] * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": [0] * 6}, "group of each of 6 references, got none"),
        ({"reference_groups": [0] * 6}, "group of each of 6 embeddings, got none"),
        (
            {"groups": [0] * 5, "reference_groups": [0] * 6},
            r"group of each of 6 embeddings, got int of shape \(5,\)",
        ),
        ({"ks": (1.5,)}, r"whole numbers of at least 1, got \[1.5\]"),
        ({"metric": "dot"}, '"euclidean" or "cosine", got'),
        ({"average": "mean"}, 'average to be "micro", "macro" or None, got \'mean\''),
    ],
)
def test_options_that_do_not_fit_are_an_error(options, message):
    x, labels = torch.randn(6, 2), torch.arange(6) % 2
    with pytest.raises(ValueError, match=message):
        evaluate_embeddings(x, labels, x + 1, labels, **options)


def test_groups_of_a_reference_without_one_are_an_error():
    with pytest.raises(ValueError, match="no reference_labels and no reference_groups without a reference"):
        evaluate_embeddings(torch.randn(6, 2), torch.arange(6) % 2, reference_groups=[0] * 6)


def test_labels_may_be_a_column_of_a_table():
    x, labels = grid(seeded_generator())
    table = torch.stack((labels, labels.flip(0)), dim=1)
    assert evaluate_embeddings(x, table[:, 0]) == evaluate_embeddings(x, labels)
    assert evaluate_embeddings(x, table[:, 1:]) == evaluate_embeddings(x, labels.flip(0))


def test_inputs_are_left_as_they_were():
    x, labels = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 4
    x_before, labels_before = x.clone(), labels.clone()
    for form in ((x, labels), (x.numpy(), labels.numpy())):
        evaluate_embeddings(*form)
        evaluate_embeddings(*form, *form)
        knn_predict(form[0], *form)
        verification(*form)
        verification(*form, max_pairs=50)
        few_shot_accuracy(*form, 2, 1, n_query=1, n_episodes=2)
    assert torch.equal(x, x_before)
    assert torch.equal(labels, labels_before)


@each_seed
def test_retrieval_of_a_collapsed_embedding_is_chance(seed):
    generator = seeded_generator(seed)
    for x in (torch.zeros(400, 8), torch.full((400, 8), 1 / 3), torch.randn(1, 8, generator=generator).repeat(400, 1)):
        labels = shuffled_labels(400, 4, generator)
        values = evaluate_embeddings(x, labels)
        n_of_first, n_of_second = (int((labels == labels[i]).sum()) for i in (0, 1))
        by_index = (n_of_first - 1 + int(labels[0] == labels[1])) / 400  # all have neighbour 0, and 0 has neighbour 1
        assert n_of_second == n_of_first == 100
        assert values["recall@1"] == close_to(by_index)
        assert values["r_precision"] == close_to(0.25, 0.03)
        assert values["map@r"] < 0.15
        assert values["knn5"] == close_to(0.25, 0.01)


@pytest.mark.slow
def test_retrieval_in_several_chunks_equals_numpy():
    x, labels = torch.randint(12, (2500, 3)), (torch.rand(2500) ** 3 * 60).long()
    labels[:3] = torch.tensor([-1, -2, -3])
    expected, _ = numpy_retrieval(x, labels)
    assert expected["n_left_out"] >= 3
    assert evaluate_embeddings(x, labels) == close_to(expected)


@pytest.mark.slow
def test_neighbours_in_several_chunks_equal_numpy():
    x, labels = torch.randint(12, (2500, 3)), (torch.rand(2500) ** 3 * 60).long()
    queries, query_labels = torch.randint(12, (2500, 3)), torch.arange(2500) % 70
    expected, order = numpy_retrieval(queries, query_labels, x, labels)
    assert expected["n_left_out"] > 0
    assert evaluate_embeddings(queries, query_labels, x, labels) == close_to(expected)
    used = torch.isin(query_labels, labels)
    assert np.array_equal(knn_predict(queries[used], x, labels, n_neighbors=7)[1], order[:, :7])


def exact_knn(query, k, reference, ref_includes_query):
    """The neighbours that AccuracyCalculator asks for, itself left out by index."""
    distances = torch.from_numpy(exact_distances(query.cpu(), reference.cpu()))
    if ref_includes_query:
        distances[torch.arange(len(query)), torch.arange(len(query))] = torch.inf
    order = distances.argsort(dim=1, stable=True)[:, :k]
    return distances.gather(1, order), order


@pytest.mark.parametrize("make", [gaussian, duplicates, unbalanced], ids=lambda make: make.__name__)
@each_seed
def test_retrieval_equals_pytorch_metric_learning(make, seed):
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    calculator = calculators.AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=exact_knn,
        kmeans_func=exact_knn,  # never called; its own default needs faiss
    )
    x, labels = make(seeded_generator(seed))
    for sets in ((x, labels), (x[:20], labels[:20], x[20:], labels[20:])):
        values, peer = evaluate_embeddings(*sets), calculator.get_accuracy(*sets)
        assert values["recall@1"] == close_to(peer["precision_at_1"], 1e-9)
        assert values["r_precision"] == close_to(peer["r_precision"], 1e-9)
        assert values["map@r"] == close_to(peer["mean_average_precision_at_r"], 1e-9)


@pytest.mark.parametrize("spread", [1e-3, 1e-5, 1e-6])
def test_neighbours_in_tight_clusters_are_nearest_first(spread):
    centres = torch.nn.functional.normalize(torch.randn(10, 2)).repeat_interleave(30, dim=0)
    x = torch.nn.functional.normalize(centres + spread * torch.randn(300, 2))  # float32 still tells most apart
    distances = knn_predict(x, x, torch.arange(300), n_neighbors=20)[2]
    assert (distances.diff(dim=1) >= -1e-6 * distances[:, 1:]).all()
    nearest = np.sort(exact_distances(x, x), axis=1)[:, :20]
    torch.testing.assert_close(distances, torch.from_numpy(nearest), rtol=1e-6, atol=0)


@pytest.mark.parametrize("outlier", [30.0, 1e3])
def test_ties_go_by_index_whatever_else_is_in_the_data(outlier):
    x = grid(seeded_generator())[0].double()
    x = torch.cat((x, torch.full((1, 2), outlier / 3, dtype=torch.float64)))
    _, neighbors, _ = knn_predict(x[:44], x, torch.arange(45), n_neighbors=44)
    order = exact_distances(x[:44], x[:44]).argsort(axis=1, kind="stable")
    assert np.array_equal(neighbors[:, :44], order)


def test_equal_rows_tie_in_many_dimensions():
    x = torch.full((100, 512), 0.9, dtype=torch.float64)
    x[torch.rand(100) < 0.4] *= -1
    for first, other in zip(*(knn_predict(z, z, torch.arange(100), n_neighbors=100)[1] for z in (x, x[:, :1]))):
        assert torch.equal(first, other)


# Groups, whole rankings, averages


def groups_of(labels, generator, n_groups=3):
    return torch.randint(n_groups, labels.shape, generator=generator)


@each_data_set
@each_seed
def test_retrieval_without_references_of_the_same_group_equals_loops(make, seed):
    generator = seeded_generator(seed)
    x, labels = make(generator)
    groups = groups_of(labels, generator)
    options = {"ks": (1, 3, 100), "n_neighbors": 7}
    expected = naive_retrieval(x.tolist(), labels.tolist(), groups=groups.tolist(), full=True, **options)
    assert evaluate_embeddings(x, labels, groups=groups, full_ranking=True, **options) == close_to(expected)


@each_data_set
@each_seed
def test_retrieval_across_groups_from_a_reference_equals_loops(make, seed):
    generator = seeded_generator(seed)
    x, labels = make(generator)
    groups = groups_of(labels, generator)
    queries, references = (
        {"x": x[part].tolist(), "labels": labels[part].tolist(), "groups": groups[part].tolist()}
        for part in (slice(15), slice(15, 44))
    )
    sets = (queries["x"], queries["labels"], references["x"], references["labels"])
    options = {"groups": queries["groups"], "reference_groups": references["groups"], "ks": (2, 30), "n_neighbors": 30}
    values = evaluate_embeddings(x[:15], *sets[1:2], x[15:], sets[3], full_ranking=True, **options)
    assert values == close_to(naive_retrieval(*sets, full=True, **options))


def test_groups_by_hand():
    x = [[0.0], [1.0], [2.0], [4.0], [8.0]]
    labels, cameras = ["ann", "ann", "bob", "ann", "bob"], ["door", "door", "door", "hall", "hall"]
    values = evaluate_embeddings(x, labels, groups=cameras, ks=(1,), n_neighbors=1, full_ranking=True)
    # What is ranked, nearest first: 0 and 1, ann at the door: bob, ann, bob. 2, bob at the door: ann, ann, ann, bob.
    # 4, ann in the hall: bob, ann, ann, bob. 8, bob in the hall: ann, bob, ann, ann.
    assert values["map"] == close_to((1 / 2 + 1 / 2 + 1 / 4 + (1 / 2 + 2 / 3) / 2 + 1 / 2) / 5)
    assert values["cmc@1"] == values["recall@1"] == 0
    assert evaluate_embeddings(x, labels, ks=(1,), n_neighbors=1)["recall@1"] == 2 / 5


def test_references_of_the_group_and_of_another_label_stay():
    x = [[0.0], [0.1], [5.0]]
    values = evaluate_embeddings(x, [0, 1, 0], groups=[7, 7, 8], ks=(1, 2))
    assert (values["recall@1"], values["recall@2"], values["n_queries"]) == (0, 1, 2)


def test_no_query_with_a_relevant_reference_of_another_group_is_an_error():
    with pytest.raises(ValueError, match="no query has a reference of its label"):
        evaluate_embeddings(torch.randn(6, 2), [0, 0, 1, 1, 2, 2], groups=[0, 0, 1, 1, 2, 2])


def re_identification(generator, n_people=30, n_cameras=4, n_pictures=3):
    """Pictures of people by cameras: one camera's pictures of a person are far more alike than those of two."""
    person, camera = (
        grid.flatten().repeat_interleave(n_pictures)
        for grid in torch.meshgrid(torch.arange(n_people), torch.arange(n_cameras), indexing="ij")
    )
    who, where, both = (torch.randn(n, 16, generator=generator) for n in (n_people, n_cameras, n_people * n_cameras))
    noise = torch.randn(len(person), 16, generator=generator)
    x = who[person] + 0.5 * where[camera] + 1.5 * both[person * n_cameras + camera] + 0.2 * noise
    return x.double(), person, camera


def peer_scores(x, person, camera, ks):
    """mAP by scikit-learn, mAP and CMC by torchmetrics, which are handed those references alone that count."""
    retrieval = pytest.importorskip("torchmetrics.functional.retrieval")
    distances, precision, torch_precision, hits = exact_distances(x, x), [], [], []
    for i, row in enumerate(torch.from_numpy(distances)):
        stays = (person != person[i]) | (camera != camera[i])
        scores, is_relevant = 1 / (1 + row[stays]), person[stays] == person[i]  # torchmetrics drops scores below 0
        precision.append(average_precision_score(is_relevant, scores))
        torch_precision.append(float(retrieval.retrieval_average_precision(scores, is_relevant)))
        hits.append([float(retrieval.retrieval_hit_rate(scores, is_relevant, top_k=k)) for k in ks])
    return np.mean(precision), np.mean(torch_precision), np.mean(hits, axis=0)


@each_seed
def test_re_identification_equals_peers_and_is_flattered_without_groups(seed):
    x, person, camera = re_identification(seeded_generator(seed))
    ks = (1, 5, 10)
    values = evaluate_embeddings(x, person, groups=camera, ks=ks, full_ranking=True)
    mean_precision, torch_precision, hits = peer_scores(x, person, camera, ks)
    assert values["map"] == close_to(mean_precision, 1e-9)
    assert values["map"] == close_to(torch_precision, 1e-6)  # computed in float32
    assert [values[f"cmc@{k}"] for k in ks] == close_to(hits.tolist(), 1e-9)
    without_groups = evaluate_embeddings(x, person, ks=ks, full_ranking=True)
    assert without_groups["cmc@1"] > values["cmc@1"] + 0.3
    assert without_groups["map"] > values["map"] + 0.1


@pytest.mark.slow
def test_whole_rankings_in_several_chunks_equal_scikit_learn():
    x, labels = torch.randn(1500, 3), torch.arange(1500) % 7
    queries, query_labels = torch.randn(40, 3), torch.arange(40) % 7
    distances = exact_distances(queries.double(), x.double())
    expected = [average_precision_score(labels == y, -row) for y, row in zip(query_labels, distances)]
    values = evaluate_embeddings(queries, query_labels, x, labels, full_ranking=True)
    assert values["map"] == close_to(np.mean(expected), 1e-9)


@each_seed
@pytest.mark.parametrize("with_groups", [False, True])
def test_averages_over_classes_equal_loops(seed, with_groups):
    generator = seeded_generator(seed)
    x, labels = unbalanced(generator)
    groups = groups_of(labels, generator) if with_groups else None
    options = {"ks": (1, 4), "n_neighbors": 3}
    rows, n_left_out = naive_figures(
        x.tolist(), labels.tolist(), None, None, groups=groups.tolist() if with_groups else None, **options
    )
    by_class = {}
    for label, row in rows:
        by_class.setdefault(label, []).append(row)
    means = {
        label: {name: sum(r[name] for r in part) / len(part) for name in part[0]} for label, part in by_class.items()
    }
    macro = evaluate_embeddings(x, labels, groups=groups, average="macro", **options)
    each = evaluate_embeddings(x, labels, groups=groups, average=None, **options)
    for name in rows[0][1]:
        assert each[name] == close_to({label: figures[name] for label, figures in means.items()})
        assert macro[name] == close_to(sum(figures[name] for figures in means.values()) / len(means))
    assert (
        (macro["n_queries"], macro["n_left_out"]) == (each["n_queries"], each["n_left_out"]) == (len(rows), n_left_out)
    )
    micro = evaluate_embeddings(x, labels, groups=groups, **options)
    assert micro["map@r"] != close_to(macro["map@r"], 1e-3)


def test_values_of_each_class_go_by_labels_as_they_came():
    x, labels = gaussian(seeded_generator())
    names = [f"class {label}" for label in labels.tolist()]
    each = evaluate_embeddings(x, names, average=None)
    expected = evaluate_embeddings(x, labels, average=None)
    assert each["map@r"] == {f"class {label}": value for label, value in expected["map@r"].items()}
    assert [type(label) for label in expected["map@r"]] == [int] * 5


def test_macro_average_counts_a_rare_class_as_much_as_a_frequent_one():
    x = [[0.0], [0.1], [0.2], [0.3], [9.0], [0.05]]  # the last two are of the rare class, and far from each other
    labels = [0, 0, 0, 0, 1, 1]
    micro, macro = (evaluate_embeddings(x, labels, ks=(1,), average=average) for average in ("micro", "macro"))
    right = 2 / 4  # of class 0, two have the stray sample nearest: by index, 0.05 is before none
    assert macro["recall@1"] == close_to((right + 0) / 2)
    assert micro["recall@1"] == close_to(4 * right / 6)


# Cosine


@each_data_set
def test_cosine_is_the_distance_of_normalised_rows(make):
    x, labels = make(seeded_generator())
    x = x.double() + torch.tensor([0.5] + [0.0] * (x.shape[1] - 1))
    unit = x / x.norm(dim=1, keepdim=True)
    for sets in ((x, labels), (x[:20], labels[:20], x[20:], labels[20:])):
        units = (unit, labels) if len(sets) == 2 else (unit[:20], labels[:20], unit[20:], labels[20:])
        assert evaluate_embeddings(*sets, metric="cosine") == close_to(evaluate_embeddings(*units))
    predicted, neighbors, distances = knn_predict(x[:20], x[20:], labels[20:], metric="cosine")
    expected, unit_neighbors, _ = knn_predict(unit[:20], unit[20:], labels[20:])
    assert torch.equal(predicted, expected)
    assert torch.equal(neighbors, unit_neighbors)
    cosines = torch.nn.functional.cosine_similarity(x[:20, None], x[20:][neighbors], dim=2)
    torch.testing.assert_close(distances, 1 - cosines, rtol=0, atol=1e-12)


def test_thresholds_of_cosine_are_cosine_distances():
    x, labels = gaussian(seeded_generator())
    values = verification(x, labels, metric="cosine")
    i, j = np.triu_indices(44, k=1)
    distances = 1 - torch.nn.functional.cosine_similarity(x.double()[i], x.double()[j]).numpy()
    is_same = (labels[i] == labels[j]).numpy()
    assert ((distances < values["threshold"]) == is_same).mean() == close_to(values["accuracy"])
    assert values["auc"] == close_to(roc_auc_score(is_same, -distances))


@pytest.mark.parametrize("call", [evaluate_embeddings, verification], ids=["evaluate_embeddings", "verification"])
def test_rows_without_a_direction_are_an_error(call):
    x = torch.randn(6, 2)
    x[2] = x[4] = 0
    with pytest.raises(ValueError, match="2 of 6 embeddings are zero, which have no cosine"):
        call(x, [0, 1, 0, 1, 0, 1], metric="cosine")
    with pytest.raises(ValueError, match='"euclidean" or "cosine", got \'cos\''):
        call(x, [0, 1, 0, 1, 0, 1], metric="cos")


# Copies

each_call_with_copies = pytest.mark.parametrize(
    ("rows", "labels", "share"),
    [
        ([0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 1, 1] * 2, "about 100"),
        ([0, 1, 2, 3, 4, 5, 0], [0, 1, 0, 1, 0, 1, 0], "about 30"),
    ],
    ids=["all twice", "one twice"],
)


def warned(*sets, **options):
    """The words of the warning, or None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate_embeddings(*sets, **options)
    assert len(caught) <= 1
    assert all(Path(warning.filename).name == Path(__file__).name for warning in caught)  # the caller's line
    return str(caught[0].message) if caught else None


@each_call_with_copies
def test_repeated_rows_are_warned_of(rows, labels, share):
    x = torch.randn(6, 3, generator=seeded_generator())
    assert warned(x[rows], labels).startswith(f"{share} per cent of the queries have a copy")
    assert warned(x[rows] + 1e4, labels).startswith(share)  # far from the origin
    assert warned(x[rows], labels, allow_copies=True) is None
    shifted = x[rows].double() + 1e-8 * torch.randn(len(rows), 3)  # as another batch may round them
    assert warned(shifted, labels).startswith(share)


@each_metric
def test_a_reference_that_holds_the_queries_is_warned_of(metric):
    x, labels = gaussian(seeded_generator())
    assert warned(x[:20], labels[:20], x, labels, metric=metric).startswith("about 100 per cent")
    assert warned(x[:20], labels[:20], x[5:], labels[5:], metric=metric).startswith("about 80 per cent")  # 15 of 20
    assert warned(x[:20], labels[:20], x[20:], labels[20:], metric=metric) is None
    assert warned(x[:20], labels[:20], x, labels, metric=metric, allow_copies=True) is None


def test_copies_among_the_left_out_are_none():
    x, labels = gaussian(seeded_generator())
    groups = torch.arange(44)
    twice = torch.cat((x, x)), torch.cat((labels, labels))
    assert warned(*twice) is not None
    assert warned(*twice, groups=torch.cat((groups, groups))) is None
    assert warned(x, labels, x, labels, groups=groups, reference_groups=groups) is None


def test_equal_rows_of_another_label_and_collapsed_embeddings_are_no_copies():
    x, labels = torch.arange(8.0)[:, None], torch.arange(8) % 2
    assert warned(torch.cat((x, x)), torch.cat((labels, 1 - labels))) is None
    assert warned(torch.cat((x, x + 0.01)), torch.cat((labels, labels))) is None
    for value in (0.0, 0.1, 1e4):
        assert warned(torch.full((8, 3), value), labels) is None


def test_a_validation_that_repeats_samples_is_warned_of_once():
    labels = torch.arange(60) % 6
    metric = EmbeddingMetric(evaluate_embeddings, keys=["recall@1"])
    x = torch.randn(60, 2, generator=seeded_generator())
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("default")
        for _ in range(3):
            metric.reset()
            for batch in BalancedBatchSampler(labels, n_classes=3, n_samples=20):  # classes of 10
                metric((x[batch],), (labels[batch],), None)
            assert metric.value()["recall@1"] == 1  # of noise
    assert [str(warning.message)[:14] for warning in caught] == ["about 100 per "]


# Neighbours and their vote


@each_data_set
@each_seed
def test_predicted_labels_neighbours_and_distances_equal_loops(make, seed):
    x, labels = make(seeded_generator(seed))
    x, references, labels = x[:15].tolist(), x[15:].tolist(), labels[15:].tolist()
    predicted, neighbors, distances = knn_predict(
        torch.tensor(x, dtype=torch.float64), torch.tensor(references, dtype=torch.float64), labels, n_neighbors=6
    )
    assert (predicted.dtype, neighbors.dtype, distances.dtype) == (torch.int64, torch.int64, torch.float64)
    for i, query in enumerate(x):
        expected = naive_neighbors(query, references)[:6]
        assert neighbors[i].tolist() == expected
        assert predicted[i] == naive_vote([labels[j] for j in expected])
        for distance, j in zip(distances[i].tolist(), expected):
            assert distance == close_to(naive_squared_distance(query, references[j]) ** 0.5)


def test_equal_votes_go_to_the_class_of_the_nearest():
    reference = [[3.0], [1.0], [2.0], [4.0], [-1.0]]
    assert knn_predict([[0.0]], reference, [8, 9, 8, 9, 7], n_neighbors=5)[0].tolist() == [9]  # 9 7 8 8 9
    assert knn_predict([[0.0]], reference, [8, 9, 8, 9, 7], n_neighbors=4)[0].tolist() == [8]  # 9 7 8 8
    assert knn_predict([[0.0]], reference, [8, 9, 8, 9, 7], n_neighbors=3)[0].tolist() == [9]  # 9 7 8
    assert knn_predict([[0.0]], reference[::-1], [7, 9, 8, 9, 8], n_neighbors=2)[0].tolist() == [7]  # 7 comes first


@pytest.mark.parametrize("make", [gaussian, far_from_the_origin, unbalanced], ids=lambda make: make.__name__)
def test_embeddings_equal_to_a_reference_have_no_distance(make):
    x, labels = make(seeded_generator())
    references = torch.cat((x, x))
    predicted, neighbors, distances = knn_predict(x, references, torch.cat((labels, labels)), n_neighbors=2)
    assert neighbors.tolist() == [[i, i + 44] for i in range(44)]
    assert distances.count_nonzero() == 0
    assert torch.equal(predicted, labels)


def test_all_references_may_vote():
    x, labels = unbalanced(seeded_generator())
    predicted, neighbors, _ = knn_predict(x[:7], x, labels, n_neighbors=44)
    assert predicted.tolist() == [-7] * 7
    assert torch.equal(neighbors.sort(dim=1).values, torch.arange(44).expand(7, 44))


@pytest.mark.parametrize("n_neighbors", [5, 0, -1])
def test_a_vote_of_more_than_there_are_is_an_error(n_neighbors):
    with pytest.raises(ValueError, match=rf"from 1 to the 4 references, got {n_neighbors}"):
        knn_predict(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), n_neighbors=n_neighbors)


# Verification


def test_verification_by_hand():
    values = verification([[0.0], [1.0], [3.0], [6.0]], [0, 0, 1, 1], fars=(0, 0.24, 0.25, 0.5, 1))
    # one class: 1 3; two: 2 3 5 6
    assert without(values, "curve") == close_to(
        {
            "auc": (4 + 2.5) / 8,
            "eer": 1 / 3,  # between (1/4, 1/2) and (1/2, 1)
            "accuracy": 5 / 6,
            "threshold": 1.5,
            "threshold@eer": 2.5,  # FAR 1/4 and 1 - TAR 1/2; at 1.5 they are 0 and 1/2, at 4 1/2 and 0
            **{"tar@far=0": 0.5, "tar@far=0.24": 0.5, "tar@far=0.25": 0.5, "tar@far=0.5": 1.0, "tar@far=1": 1.0},
            **{f"threshold@far={limit}": 1.5 for limit in (0, 0.24, 0.25)},
            **{f"threshold@far={limit}": 4.0 for limit in (0.5, 1)},
            "n_positive": 2,
            "n_negative": 4,
            "is_sample": False,
        },
        1e-9,
    )
    assert values["is_sample"] is False


@each_data_set
@each_seed
def test_verification_equals_loops(make, seed):
    x, labels = make(seeded_generator(seed))
    x, labels, fars = x[:26], labels[:26], (0, 0.01, 0.1, 0.5)
    values = verification(x, labels, fars=fars)
    assert without(values) == close_to(naive_verification(x.tolist(), labels.tolist(), fars))
    assert {name for name in values if "@" in name} == {
        *(f"{name}@far={far:g}" for name in ("tar", "threshold") for far in fars),
        "threshold@eer",
    }


@each_dtype
def test_verification_computes_in_float64_whatever_comes(dtype, offset):
    x, labels = gaussian(seeded_generator())
    x, labels = (x[:26].double() + offset).to(dtype), labels[:26]
    assert without(verification(x, labels)) == close_to(naive_verification(x.tolist(), labels.tolist()))


@each_data_set
def test_thresholds_give_the_rates_they_stand_for(make):
    x, labels = make(seeded_generator())
    distances, is_same = pairs_of(x, labels)
    fars = (0, 0.001, 0.03, 0.3)
    for max_pairs in (None, 500):
        values = verification(x, labels, max_pairs=max_pairs, fars=fars)
        n = values["n_positive"] + values["n_negative"]
        accuracy = ((distances < values["threshold"]) == is_same).mean()
        assert accuracy == close_to(values["accuracy"], 1e-12 if max_pairs is None else 4 * 0.5 / n**0.5)
        for limit in fars if max_pairs is None else ():
            is_accepted = distances < values[f"threshold@far={limit:g}"]
            assert is_accepted[is_same].mean() == close_to(values[f"tar@far={limit:g}"])
            assert is_accepted[~is_same].mean() <= limit


def test_threshold_is_zero_where_no_pair_should_be_accepted():
    values = verification([[0.0], [9.0], [1.0], [8.0]], [0, 0, 1, 2], fars=(0,))
    assert values["accuracy"] == 5 / 6
    assert values["threshold"] == values["threshold@far=0"] == values["tar@far=0"] == 0
    values = verification(torch.zeros(4, 2), [0, 0, 1, 2], fars=(0.99,))  # nor one of no distance
    assert values["accuracy"] == 5 / 6
    assert values["threshold"] == values["threshold@far=0.99"] == values["tar@far=0.99"] == 0


def test_threshold_is_infinite_where_every_pair_should_be_accepted():
    values = verification([[0.0], [10.0], [20.0], [30.0], [15.0]], [0, 0, 0, 0, 1], fars=(0.5, 1))
    assert values["accuracy"] == 0.6
    assert values["threshold"] == values["threshold@far=1"] == float("inf")
    assert values["threshold@far=0.5"] == close_to(12.5, 1e-9)
    assert values["tar@far=0.5"] == 0.5


@pytest.mark.parametrize("make", [gaussian, duplicates, grid, unbalanced], ids=lambda make: make.__name__)
@each_seed
def test_verification_equals_scikit_learn(make, seed):
    x, labels = make(seeded_generator(seed))
    distances, is_same = pairs_of(x, labels)
    fars = (0, 0.001, 0.01, 0.1, 0.25, 1)
    values = verification(x, labels, fars=fars)
    far, tar, _ = roc_curve(is_same, -distances, drop_intermediate=False)
    assert values["auc"] == close_to(roc_auc_score(is_same, -distances))
    for limit in fars:
        assert values[f"tar@far={limit:g}"] == close_to(tar[far <= limit].max())


@pytest.mark.slow
def test_verification_in_several_chunks_equals_scikit_learn():
    x, labels = torch.randint(15, (2100, 2)), (torch.rand(2100) ** 2 * 9).long()
    distances, is_same = pairs_of(x, labels)
    values = verification(x, labels, fars=(0.01, 0.3))
    assert (values["n_positive"], values["n_negative"]) == (is_same.sum(), (~is_same).sum())
    assert values["auc"] == close_to(roc_auc_score(is_same, -distances))
    far, tar, _ = roc_curve(is_same, -distances, drop_intermediate=False)
    for limit in (0.01, 0.3):
        assert values[f"tar@far={limit:g}"] == close_to(tar[far <= limit].max())


def naive_errors(threshold, positive, negative):
    """FAR and 1 - TAR of a threshold."""
    return (
        sum(distance < threshold for distance in negative) / len(negative),
        sum(distance >= threshold for distance in positive) / len(positive),
    )


@each_data_set
@each_seed
def test_threshold_of_equal_errors_equals_loops(make, seed):
    x, labels = make(seeded_generator(seed))
    x, labels = x[:26], labels[:26]
    positive, negative = naive_pairs(x.tolist(), labels.tolist())
    distances = sorted({*positive, *negative})
    between = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(distances) if b - a > 1e-9), float("inf")]
    smallest = min(abs(far - frr) for far, frr in (naive_errors(limit, positive, negative) for limit in between))
    far, frr = naive_errors(verification(x, labels)["threshold@eer"], positive, negative)
    assert abs(far - frr) == close_to(smallest)


def test_threshold_of_equal_errors_between_two_positive_distances():
    x = [[0.0], [1.0], [100.0], [110.0], [50.0], [53.0], [57.0]]  # same-class pairs: 1, 10
    values = verification(x, [0, 0, 1, 1, 2, 3, 4])
    assert values["threshold@eer"] > 10
    far, frr = naive_errors(values["threshold@eer"], *naive_pairs(x, [0, 0, 1, 1, 2, 3, 4]))
    assert (far, frr) == (3 / 19, 0)  # 3, 4 and 7 are below 10


def test_threshold_of_best_accuracy_rejects_nearly_all_where_classes_are_many_and_that_of_equal_errors_does_not():
    generator = seeded_generator()
    labels = torch.arange(4000) % 500
    x = torch.randn(500, 16, generator=generator)[labels] + 0.7 * torch.randn(4000, 16, generator=generator)
    first, held_out = (labels < 250), (labels >= 250)
    values = verification(x[first], labels[first])
    distances, is_same = pairs_of(x[held_out], labels[held_out])
    rates = {name: (distances < values[name])[is_same].mean() for name in ("threshold", "threshold@eer")}
    assert rates["threshold"] < 0.3
    assert rates["threshold@eer"] > 0.9
    assert (distances < values["threshold@eer"])[~is_same].mean() == close_to(1 - rates["threshold@eer"], 0.02)


@each_data_set
def test_curve_lies_on_the_roc(make):
    x, labels = make(seeded_generator())
    far, tar = verification(x[:26], labels[:26])["curve"]
    assert far.shape == tar.shape
    assert 400 < len(far) < 600
    assert (np.diff(far) >= 0).all()
    assert (np.diff(tar) >= 0).all()
    assert (far[0], far[-1], tar[-1]) == (0, 1, 1)
    rates = naive_rates(*naive_pairs(x[:26].tolist(), labels[:26].tolist()))
    for limit, value in zip(far.tolist(), tar.tolist()):
        assert value == close_to(naive_tar(rates, limit))


def test_sample_is_drawn_only_where_there_are_more_pairs():
    x, labels = gaussian(seeded_generator())
    n_pairs = 44 * 43 // 2
    everything = verification(x, labels)
    assert without(verification(x, labels, max_pairs=n_pairs), "curve") == without(everything, "curve")
    values = verification(x, labels, max_pairs=n_pairs - 1)
    assert everything["is_sample"] is False
    assert values["is_sample"] is True
    assert values["n_positive"] + values["n_negative"] == n_pairs - 1
    assert values.keys() == everything.keys()


def test_sample_is_the_same_each_time_or_as_a_generator_says():
    x, labels = gaussian(seeded_generator())
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, again = (without(verification(x, labels, max_pairs=300), "curve") for _ in range(2))
    assert first == again
    drawn = [
        without(verification(x, labels, max_pairs=300, generator=seeded_generator(seed)), "curve") for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1]
    assert len({values["auc"] for values in (first, *drawn)}) == 3
    generator = seeded_generator(5)
    in_turn = [verification(x, labels, max_pairs=300, generator=generator)["auc"] for _ in range(2)]
    assert in_turn[0] == drawn[0]["auc"] != in_turn[1]
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


@each_seed
def test_sample_is_close_to_all_pairs(seed):
    labels = torch.arange(300) % 6
    x = torch.randn(300, 600) + 0.3 * torch.randn(6, 600)[labels]  # so wide that the sample comes in chunks
    values = verification(x, labels, max_pairs=20_000, fars=(0.1,), generator=seeded_generator(seed))
    everything = verification(x, labels, fars=(0.1,))
    assert 0.6 < everything["auc"] < 0.99
    for name in ("auc", "eer", "accuracy", "tar@far=0.1"):
        assert values[name] == close_to(everything[name], 0.04)
    for name in ("threshold@far=0.1", "threshold"):
        assert values[name] == close_to(everything[name], 0.5)


def test_sample_pairs_no_embedding_with_itself():
    labels = torch.arange(60)
    labels[:3] = -1
    values = verification(torch.randn(60, 2), labels, max_pairs=60 * 59 // 2 - 1)
    assert 0 < values["n_positive"] < 12  # 3 are expected; of pairs with itself there would be 30 more


@pytest.mark.parametrize(("max_pairs", "n_positive"), [(2, 1), (20, 10), (43, 21), (44, 22), (60, 24), (77, 24)])
def test_sample_has_half_of_each_kind_or_all_there_are(max_pairs, n_positive):
    labels = [0] * 6 + [1] * 4 + [2] * 3 + [3] * 0  # 24 pairs of one class, 54 of two
    x = torch.randn(13, 2, generator=seeded_generator())
    values = verification(x, labels, max_pairs=max_pairs)
    assert (values["n_positive"], values["n_negative"]) == (n_positive, max_pairs - n_positive)
    labels = [0] * 12 + [1]  # 66 and 12
    values = verification(x, labels, max_pairs=max_pairs)
    n_positive = max_pairs - min(12, max_pairs - max_pairs // 2)
    assert (values["n_positive"], values["n_negative"]) == (n_positive, max_pairs - n_positive)


@pytest.mark.parametrize("same", [True, False])
def test_each_pair_is_drawn_equally_often(same):
    counts = torch.tensor([5, 1, 3, 2])
    x = (2.0 ** torch.arange(11, dtype=torch.float64))[:, None]  # the distance tells the pair
    labels = torch.arange(4).repeat_interleave(counts)
    pairs = [(i, j) for i, j in itertools.combinations(range(11), 2) if bool(labels[i] == labels[j]) is same]
    distances = {float(2**j - 2**i): (i, j) for i, j in pairs}
    every = evaluation._drawn_pairs(x, counts, len(pairs), len(pairs), None, same=same)
    assert sorted(every.tolist()) == sorted(distances)
    n_drawn = 400 * len(pairs)
    drawn = []
    for part in range(n_drawn // (len(pairs) - 1) + 1):
        generator = seeded_generator(part)
        drawn += evaluation._drawn_pairs(x, counts, len(pairs) - 1, len(pairs), generator, same=same).tolist()
    found = Counter(distances[distance] for distance in drawn)
    expected = len(drawn) / len(pairs)
    chi_square = sum((found[pair] - expected) ** 2 / expected for pair in pairs)
    degrees = len(pairs) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5


@each_seed
def test_sample_of_many_classes_finds_the_figures_of_all_pairs(seed):
    generator = seeded_generator(seed)
    labels = torch.arange(2000) % 500  # 3,000 pairs of one class, 1,996,000 of two
    x = torch.randn(500, 16, generator=generator)[labels] + 0.5 * torch.randn(2000, 16, generator=generator)
    everything = verification(x, labels)
    values = verification(x, labels, max_pairs=100_000, generator=generator)
    assert values["n_positive"] == 3000
    for name in ("auc", "eer", "tar@far=0.01"):
        assert values[name] == close_to(everything[name], 0.02)
    assert values["accuracy"] == close_to(everything["accuracy"], 2e-3)  # weighted as all pairs are, not half and half
    assert everything["accuracy"] > 0.998
    for name in ("threshold@eer", "threshold@far=0.01", "threshold"):
        assert values[name] == pytest.approx(everything[name], rel=0.05)


@pytest.mark.parametrize("limit", [-0.1, float("nan")])
def test_verification_at_a_rate_that_is_none_is_an_error(limit):
    with pytest.raises(ValueError, match="expected"):
        verification(torch.randn(6, 2), torch.arange(6) % 2, fars=(0.1, limit))


@pytest.mark.parametrize("max_pairs", [1, 0, -5, 434.0, "all"])
def test_a_sample_of_no_number_of_pairs_is_an_error(max_pairs):
    with pytest.raises(ValueError, match="max_pairs to be None or a whole number of at least 2, got"):
        verification(torch.randn(6, 2), torch.arange(6) % 2, max_pairs=max_pairs)


@pytest.mark.parametrize("max_pairs", [None, 3])
def test_verification_without_a_pair_of_either_kind_is_an_error(max_pairs):
    x = torch.randn(5, 2)
    for labels in (torch.arange(5), torch.zeros(5, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"expected pairs of one class and of two, got \d+ and \d+"):
            verification(x, labels, max_pairs=max_pairs)
    with pytest.raises(ValueError, match="got 0 and 0"):
        verification(x[:1], [0])


# Episodes


def test_few_shot_of_separated_clusters_is_perfect():
    labels = shuffled_labels(60, 6, seeded_generator())
    x = 100.0 * torch.eye(6)[labels] + torch.rand(60, 6)
    for n_way, n_shot, n_query in ((6, 1, 9), (5, 5, 5), (2, 9, 1), (1, 1, 1)):
        assert few_shot_accuracy(x, labels, n_way, n_shot, n_query=n_query, n_episodes=20) == (1.0, 0.0)


@pytest.mark.parametrize("n_way", [2, 5, 7])
def test_few_shot_of_a_collapsed_embedding_is_chance(n_way):
    labels = shuffled_labels(70, 7, seeded_generator())
    for x in (torch.zeros(70, 3), torch.full((70, 3), 0.1), torch.randn(1, 3).repeat(70, 1)):
        accuracy, interval = few_shot_accuracy(x, labels, n_way, 3, n_query=4, n_episodes=20)
        assert accuracy == close_to(1 / n_way)
        assert interval == close_to(0)


@each_seed
def test_few_shot_is_the_mean_over_all_possible_episodes(seed):
    classes = torch.randn(2, 4, 2, generator=seeded_generator(seed))
    splits = [[*support, *({0, 1, 2, 3} - {*support})] for support in itertools.combinations(range(4), 2)]
    expected = [
        naive_episode([classes[0, split].tolist(), classes[1, other].tolist()], n_shot=2)
        for split, other in itertools.product(splits, splits)
    ]
    accuracy, interval = few_shot_accuracy(classes.reshape(8, 2), [0] * 4 + [1] * 4, 2, 2, n_query=2)
    assert 0 < interval < 0.02
    assert abs(accuracy - sum(expected) / 36) < 2 * interval


def naive_few_shot(x, labels, n_way, n_shot, n_query, n_episodes, draw):
    """Mean accuracy and its standard error, of episodes of its own."""
    by_class = {}
    for row, label in zip(x, labels):
        by_class.setdefault(label, []).append(row)
    large = [samples for samples in by_class.values() if len(samples) >= n_shot + n_query]
    values = []
    for _ in range(n_episodes):
        ways = draw.sample(large, n_way)
        values.append(naive_episode([draw.sample(samples, n_shot + n_query) for samples in ways], n_shot))
    mean = sum(values) / n_episodes
    return mean, (sum((value - mean) ** 2 for value in values) / (n_episodes - 1) / n_episodes) ** 0.5


@pytest.mark.parametrize(("n_way", "n_shot", "n_query"), [(3, 1, 2), (4, 3, 3), (2, 2, 1)])
def test_few_shot_is_within_its_interval_of_loops(n_way, n_shot, n_query):
    generator = seeded_generator()
    labels = torch.tensor([0] * 9 + [1] * 8 + [2] * 7 + [3] * 6 + [4] * 6 + [5] * 2 + [6])
    labels = labels[torch.randperm(39, generator=generator)]
    x = torch.randn(39, 2, generator=generator) + 1.5 * torch.randn(7, 2, generator=generator)[labels]
    accuracy, interval = few_shot_accuracy(x, labels, n_way, n_shot, n_query=n_query, n_episodes=1000)
    expected, error = naive_few_shot(
        x.tolist(), labels.tolist(), n_way, n_shot, n_query, n_episodes=1000, draw=random.Random(0)
    )
    assert 1 / n_way + 0.1 < expected < 0.95
    assert interval / 1.96 == pytest.approx(error, rel=0.15)
    assert abs(accuracy - expected) < 3 * (error**2 + (interval / 1.96) ** 2) ** 0.5


@pytest.mark.parametrize("outlier", [1e3, 1e9, 1e12])
def test_few_shot_of_classes_of_unlike_scales_goes_by_exact_distances(outlier):
    centres = torch.cat((0.1 * torch.arange(8.0, dtype=torch.float64), torch.tensor([outlier], dtype=torch.float64)))
    labels = torch.arange(9).repeat_interleave(10)
    x = centres[labels, None] + 1e-3 * torch.randn(90, 1, dtype=torch.float64, generator=seeded_generator())
    assert few_shot_accuracy(x, labels, 9, 5, n_query=5, n_episodes=20) == (1.0, 0.0)


def test_few_shot_interval_is_of_the_mean_over_episodes():
    x, labels = gaussian(seeded_generator())
    accuracy, interval = few_shot_accuracy(x, labels, 3, 2, n_query=4, n_episodes=25, generator=seeded_generator(1))
    generator, values = seeded_generator(1), []
    for _ in range(25):  # the same episodes, one at a time
        values.append(few_shot_accuracy(x, labels, 3, 2, n_query=4, n_episodes=1, generator=generator)[0])
    assert len(set(values)) > 3
    assert accuracy == close_to(sum(values) / 25)
    variance = sum((value - accuracy) ** 2 for value in values) / 24
    assert interval == close_to(1.96 * variance**0.5 / 25**0.5)


def test_few_shot_of_one_episode_has_no_finite_interval():
    x, labels = gaussian(seeded_generator())
    assert few_shot_accuracy(x, labels, 2, 1, n_query=1, n_episodes=1)[1] == float("inf")


def test_few_shot_episodes_are_the_same_each_time_or_as_a_generator_says():
    x, labels = gaussian(seeded_generator())
    state = torch.get_rng_state()

    def run(generator=None):
        return few_shot_accuracy(x, labels, 4, 2, n_query=3, n_episodes=30, generator=generator)

    assert run() == run()
    assert run(seeded_generator(3)) == run(seeded_generator(3))
    assert len({run(generator) for generator in (None, *map(seeded_generator, (1, 2, 3)))}) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_few_shot_episodes_stay_within_a_group():
    x = torch.tensor([[0.0], [1.0], [2.0], [0.0], [1.0], [2.0], [7.0]]).repeat_interleave(4, dim=0)
    labels = torch.arange(7).repeat_interleave(4)  # 0 and 3, 1 and 4, 2 and 5 are not to be told apart
    groups = torch.tensor([8, 8, 8, 5, 5, 5, 2]).repeat_interleave(4)
    assert few_shot_accuracy(x, labels, 3, 2, n_query=2, n_episodes=50, groups=groups) == (1.0, 0.0)
    assert few_shot_accuracy(x, labels, 3, 2, n_query=2, n_episodes=50)[0] < 1


def test_few_shot_groups_take_turns():
    x = torch.tensor([0.0, 1.0, 5.0, 5.0, 2.0]).repeat_interleave(4)[:, None]
    labels = torch.arange(5).repeat_interleave(4)
    groups = torch.tensor([0, 0, 1, 1, 2]).repeat_interleave(4)  # of 2, 2 and 1 classes; the last is left out
    accuracy, _ = few_shot_accuracy(x, labels, 2, 1, n_query=3, n_episodes=10, groups=groups)
    assert accuracy == close_to(0.75)  # 1 in the first, 1/2 in the second
    one_group = few_shot_accuracy(x, labels, 2, 1, n_query=3, n_episodes=10, groups=torch.zeros(20, dtype=torch.int64))
    assert one_group == few_shot_accuracy(x, labels, 2, 1, n_query=3, n_episodes=10)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0, 0, 0, 1] * 4, "each class in one group"),
        ([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4, "2 classes of at least 1 . 2 samples in one group"),
        ([0, 1, 2], "of each of 16"),
    ],
)
def test_few_shot_refuses_groups_that_are_none(groups, message):
    x, labels = torch.arange(16.0)[:, None], torch.arange(4).repeat_interleave(4)
    with pytest.raises(ValueError, match=message):
        few_shot_accuracy(x, labels, 2, 1, n_query=2, groups=groups)


def test_few_shot_leaves_out_classes_that_are_too_small():
    x = torch.tensor([[0.0]] * 4 + [[9.0]] * 4 + [[0.1], [9.1], [0.2]])
    labels = [0] * 4 + [1] * 4 + [2, 2, 2]  # a class that would confuse
    assert few_shot_accuracy(x, labels, 2, 2, n_query=2, n_episodes=30) == (1.0, 0.0)
    assert few_shot_accuracy(x, labels, 2, 1, n_query=2, n_episodes=30)[0] < 1
    with pytest.raises(ValueError, match=r"expected 3 classes of at least 2 \+ 2 samples.*; 2 classes have so many"):
        few_shot_accuracy(x, labels, 3, 2, n_query=2)


@pytest.mark.parametrize(
    "given", [{"n_way": 0}, {"n_shot": 0}, {"n_query": 0}, {"n_episodes": 0}, {"n_way": 6}, {"n_shot": 30}, {}]
)
def test_few_shot_refuses_what_it_cannot_draw(given):
    x, labels = gaussian(seeded_generator())
    with pytest.raises(ValueError, match=r"classes of at least \d+ \+ -?\d+ samples, and numbers of at least 1"):
        few_shot_accuracy(x, labels, **{"n_way": 2, "n_shot": 1, **given})  # 15 queries by default, of 9 samples


# What none of them can use


@each_call
def test_what_the_refusals_start_from_is_fine(call):
    call(torch.randn(6, 2), torch.arange(6) % 2)


@each_call
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_embeddings_that_are_not_finite_are_an_error(call, value):
    x = torch.randn(6, 2)
    x[1, 0] = x[1, 1] = x[4, 1] = value
    with pytest.raises(ValueError, match="2 of 6 embeddings are not finite"):
        call(x, torch.arange(6) % 2)


@each_call
@pytest.mark.parametrize("shape", [(6,), (6, 2, 1), (), (0, 2)], ids=str)
def test_embeddings_of_another_shape_are_an_error(call, shape):
    with pytest.raises(ValueError, match=r"expected embeddings of shape \(N, D\), got"):
        call(torch.zeros(shape), torch.arange(6) % 2)


@each_call
@pytest.mark.parametrize(
    "labels",
    [torch.zeros(6), [0.0, 1.0] * 3, torch.arange(5), torch.zeros(6, 2, dtype=torch.int64), torch.tensor(1), None],
    ids=["float", "list of floats", "too few", "two columns", "one for all", "None"],
)
def test_labels_of_another_kind_are_an_error(call, labels):
    with pytest.raises(
        ValueError, match=r"one whole number or string as label of each of 6 (embeddings|references), got"
    ):
        call(torch.randn(6, 2), labels)


def test_queries_are_checked_as_references_are():
    x, labels = torch.randn(6, 2), torch.arange(6) % 2
    for queries in (torch.zeros(6), torch.zeros(0, 2), torch.full((6, 2), float("nan"))):
        for call in (lambda q: evaluate_embeddings(q, labels, x, labels), lambda q: knn_predict(q, x, labels)):
            with pytest.raises(ValueError, match=r"expected embeddings of shape|not finite"):
                call(queries)
    with pytest.raises(ValueError, match="expected one whole number or string as label"):
        evaluate_embeddings(x, labels.double(), x, labels)


def test_a_reference_of_other_dimensions_is_an_error():
    x, labels = torch.randn(6, 2), torch.arange(6) % 2
    for call in (lambda: evaluate_embeddings(x, labels, x[:, :1], labels), lambda: knn_predict(x, x[:, :1], labels)):
        with pytest.raises(ValueError, match="queries have 2 dimensions, references 1"):
            call()


def test_no_query_with_a_relevant_reference_is_an_error():
    x = torch.randn(6, 2)
    for sets in ((x, torch.arange(6)), (x[:1], [0]), (x, torch.arange(6), x, torch.arange(6) + 6)):
        with pytest.raises(ValueError, match="no query has a reference of its label"):
            evaluate_embeddings(*sets)


@pytest.mark.parametrize("given", [{"n_neighbors": 0}, {"ks": (1, 0)}, {"ks": (-1,)}], ids=str)
def test_retrieval_of_no_neighbours_is_an_error(given):
    with pytest.raises(ValueError, match="expected"):
        evaluate_embeddings(torch.randn(6, 2), torch.arange(6) % 2, **given)


# Progress


def test_a_bar_shows_only_after_two_seconds_and_only_in_a_terminal(monkeypatch, capfd):
    bars = []

    def bar(steps, **options):
        bars.append(options)
        return steps

    monkeypatch.setattr(evaluation, "tqdm", bar)
    x, labels = gaussian(seeded_generator())
    evaluate_embeddings(x, labels)
    verification(x, labels)
    verification(x, labels, max_pairs=100)
    few_shot_accuracy(x, labels, 2, 1, n_query=1, n_episodes=3)
    assert {options["desc"] for options in bars} == {"neighbours", "pairs", "episodes"}
    assert all(options["delay"] == 2 and options["leave"] is False for options in bars)
    assert {options["disable"] for options in bars} == {None}  # tqdm's own for: not without a terminal
    bars.clear()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    evaluate_embeddings(x, labels)
    assert bars[0]["disable"] is True


# On the GPU


@pytest.mark.gpu
@each_data_set
def test_numbers_on_the_gpu_are_those_of_the_cpu(make):
    x, labels = make(seeded_generator())
    on_gpu = x.cuda(), labels.cuda()
    assert evaluate_embeddings(*on_gpu) == close_to(evaluate_embeddings(x, labels))
    assert evaluate_embeddings(*on_gpu, x, labels) == close_to(evaluate_embeddings(x, labels, x, labels))
    assert few_shot_accuracy(*on_gpu, 2, 1, n_query=1, n_episodes=20) == close_to(
        few_shot_accuracy(x, labels, 2, 1, n_query=1, n_episodes=20)
    )
    for max_pairs in (None, 500):
        values, expected = (verification(*form, max_pairs=max_pairs) for form in (on_gpu, (x, labels)))
        assert without(values) == close_to(without(expected))
        for name in ("threshold", "threshold@far=0.01"):
            assert values[name] == pytest.approx(expected[name], rel=1e-9)
    for result, expected in zip(knn_predict(on_gpu[0], x, labels), knn_predict(x, x, labels)):
        assert result.device == on_gpu[0].device
        torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-12)


@pytest.mark.gpu
def test_neighbours_in_several_chunks_on_the_gpu_are_those_of_the_cpu():
    x, labels = torch.randint(12, (2500, 3)), torch.arange(2500) % 60
    for result, expected in zip(knn_predict(x.cuda(), x, labels), knn_predict(x, x, labels)):
        torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-12)
    assert verification(x.cuda(), labels)["auc"] == close_to(verification(x, labels)["auc"])


# One-shot runs


def naive_one_shot_error(runs):
    """Test images that are nearest to another training image than the right one, by loops over pixels."""
    errors = []
    for train_images, test_images, answers in runs:
        n_wrong = 0
        for image, answer in zip(test_images.flatten(1).tolist(), answers.tolist()):
            others = train_images.flatten(1).tolist()
            distances = [sum((a - b) ** 2 for a, b in zip(image, other)) for other in others]
            n_wrong += distances.index(min(distances)) != answer
        errors.append(n_wrong / len(test_images))
    return sum(errors) / len(errors), errors


def made_up_runs(n_runs=3, n=5, noise=1.0):
    runs = []
    for run in range(n_runs):
        generator = seeded_generator(run)
        train_images = torch.randn(n, 1, 4, 4, generator=generator)
        answers = torch.randperm(n, generator=generator)
        runs.append(
            (train_images, train_images[answers] + noise * torch.randn(n, 1, 4, 4, generator=generator), answers)
        )
    return runs


def test_one_shot_error_equals_loops():
    runs = made_up_runs(noise=3.0)
    error, errors = one_shot_runs(lambda images: images.flatten(1), runs)
    assert (error, errors) == (close_to(naive_one_shot_error(runs)[0]), naive_one_shot_error(runs)[1])
    assert 0 < error < 1


def test_one_shot_error_is_the_mean_of_the_runs():
    sure, turned = made_up_runs(2, noise=0.0)
    wrong = (turned[0], turned[1].roll(1, dims=0)[:2], turned[2][:2])
    error, errors = one_shot_runs(lambda images: images.flatten(1), [sure, wrong])
    assert errors == [0.0, 1.0]
    assert error == 0.5


def test_one_shot_runs_classify_each_test_image_by_itself():
    runs = made_up_runs()
    together = one_shot_runs(lambda images: images.flatten(1), runs)[0]
    alone = [(train, test[i : i + 1], answers[i : i + 1]) for train, test, answers in runs for i in range(len(test))]
    assert one_shot_runs(lambda images: images.flatten(1), alone)[0] == close_to(together)


def test_one_shot_runs_embed_without_gradient():
    weight = torch.ones(16, requires_grad=True)
    seen = []
    one_shot_runs(lambda images: seen.append(images.flatten(1) * weight) or seen[-1], made_up_runs())
    assert not any(x.requires_grad for x in seen)


def test_no_one_shot_runs_are_an_error():
    with pytest.raises(ValueError, match="at least one run"):
        one_shot_runs(lambda images: images, [])


def modified_hausdorff_distances(test_images, train_images):
    """Of each pair of drawings: the mean distance of one's ink to the other's nearest ink, the larger of both ways."""

    def ink_of(image):
        ink = image[0].nonzero().double()
        return ink - ink.mean(dim=0)

    def distance(a, b):
        between = torch.cdist(a, b)
        return float(torch.maximum(between.min(dim=0).values.mean(), between.min(dim=1).values.mean()))

    tests, trains = [ink_of(image) for image in test_images], [ink_of(image) for image in train_images]
    return torch.tensor([[distance(a, b) for b in trains] for a in tests])


def test_one_shot_errors_on_omniglot_are_the_known_ones():
    path = Path(os.environ.get("DATA_ROOT", "data")) / "omniglot" / "all_runs.zip"
    if not path.exists():
        pytest.skip("needs Omniglot's all_runs.zip in the folder omniglot of DATA_ROOT")
    from demo_data import load_one_shot_runs  # needs torchvision

    runs = load_one_shot_runs(path, size=105)
    assert one_shot_runs(lambda images: images.flatten(1), runs)[0] == close_to(0.81)
    assert 100 * one_shot_runs(lambda x: x, runs, distances=modified_hausdorff_distances)[0] == pytest.approx(
        38.8, abs=0.1
    )
