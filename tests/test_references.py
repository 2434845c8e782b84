"""Anchors against given references, in every selector and loss, and selectors of the user's own, against loops."""

import math

import numpy as np
import pytest
import torch

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
)

LABELS = {  # of the anchors, of the references
    "balanced": ([0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2]),
    "unbalanced": ([4, 4, 4, 4, 4, -1, 9], [-1, -1, -1, -1, 4, 9, 9]),
    "more_references": ([3, 5], [5, 3, 3, 5, 7, 3, 5, 5, 7, 3, 5]),
    "absent_in_the_references": ([0, 1, 2, 3, 3], [0, 0, 7, 7, 1]),
    "disjoint": ([0, 1, 1, 0], [2, 3, 2]),
    "one_class": ([5, 5, 5], [5, 5, 5, 5]),
    "all_distinct": ([1, 2, 3], [3, 1, 2]),
    "far_apart": ([10**12, -7, 10**12], [-7, 10**12, -7, 3, 10**12]),
    "one_reference": ([0, 0, 1], [0]),
    "one_anchor": ([1], [0, 1, 1, 0]),
    "no_reference": ([0, 0, 1], []),
    "no_anchor": ([], [0, 1, 1]),
    "nothing": ([], []),
}
WITHOUT_TRIPLETS = ("disjoint", "one_class", "one_reference", "no_reference", "no_anchor", "nothing")
WITHOUT_PAIRS = ("no_reference", "no_anchor", "nothing")

PAIR_SELECTORS = {
    "all": lambda: AllPositivePairSelector(balance=False),
    "balanced": AllPositivePairSelector,
    "hard": HardNegativePairSelector,
}
TRIPLET_SELECTORS = {
    "all": AllTripletSelector,
    "batch_hard": BatchHardTripletSelector,
    "hardest": lambda **options: HardestNegativeTripletSelector(1.0, **options),
    "random": lambda **options: RandomNegativeTripletSelector(1.0, **options),
    "semihard": lambda **options: SemihardNegativeTripletSelector(1.0, **options),
    "function": lambda **options: FunctionNegativeTripletSelector(1.0, hardest_negative, **options),
}
MARGIN = 1.0
LOSSES = {
    **{f"contrastive_{name}": lambda m=make: OnlineContrastiveLoss(2.0, m()) for name, make in PAIR_SELECTORS.items()},
    **{f"triplet_{name}": lambda m=make: OnlineTripletLoss(MARGIN, m()) for name, make in TRIPLET_SELECTORS.items()},
    "triplet_all_soft": lambda: OnlineTripletLoss(MARGIN, AllTripletSelector(), soft_margin=True),
    "triplet_all_plain": lambda: OnlineTripletLoss(MARGIN, AllTripletSelector(), squared=False),
    "triplet_random_plain": lambda: OnlineTripletLoss(
        MARGIN, RandomNegativeTripletSelector(MARGIN, squared=False), squared=False
    ),
    "batch_all": lambda: BatchAllTripletLoss(MARGIN),
    "batch_all_plain": lambda: BatchAllTripletLoss(MARGIN, squared=False),
    "batch_all_average": lambda: BatchAllTripletLoss(MARGIN, average="all", both_directions=False),
}

each_labels = pytest.mark.parametrize(("labels", "reference_labels"), LABELS.values(), ids=LABELS)
each_labels_with_triplets = pytest.mark.parametrize(
    ("labels", "reference_labels"),
    [LABELS[name] for name in LABELS if name not in WITHOUT_TRIPLETS],
    ids=[name for name in LABELS if name not in WITHOUT_TRIPLETS],
)
each_pair_selector = pytest.mark.parametrize("make", PAIR_SELECTORS.values(), ids=PAIR_SELECTORS)
each_triplet_selector = pytest.mark.parametrize("make", TRIPLET_SELECTORS.values(), ids=TRIPLET_SELECTORS)
each_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
each_geometry = pytest.mark.parametrize(
    ("squared", "both_directions"), [(True, False), (True, True), (False, False), (False, True)]
)


def points_for(labels, reference_labels, n_seeds=3):
    """Normal points, and on a small integer grid, where anchors equal references, distances tie and all is exact."""
    for seed in range(n_seeds):
        generator = torch.Generator().manual_seed(seed)
        A, R = len(labels), len(reference_labels)
        yield torch.randn(A + R, 3, generator=generator).split((A, R))
        yield torch.randint(0, 3, (A + R, 2), generator=generator).float().split((A, R))


def rows_of(indices):
    """The rows as a set of tuples: none may come twice."""
    assert indices.dtype == torch.int64
    rows = [tuple(row) for row in indices.tolist()]
    assert len(set(rows)) == len(rows)
    return set(rows)


def naive_distance(x, y, squared=True):
    total = 0.0
    for a, b in zip(x, y):
        total += (a - b) ** 2
    return total if squared else math.sqrt(total)


def naive_pairs(labels, reference_labels):
    positive, negative = set(), set()
    for i, label in enumerate(labels):
        for j, reference_label in enumerate(reference_labels):
            (positive if label == reference_label else negative).add((i, j))
    return positive, negative


def naive_negatives(embeddings, labels, reference, reference_labels, squared=True):
    """For each (anchor, positive): their distance and the distance of each negative, by index."""
    points, others, found = embeddings.tolist(), reference.tolist(), {}
    for a, p in naive_pairs(labels, reference_labels)[0]:
        distances = {}
        for n, label in enumerate(reference_labels):
            if label != labels[a]:
                distances[n] = naive_distance(points[a], others[n], squared)
        found[a, p] = naive_distance(points[a], others[p], squared), distances
    return found


def naive_triplets(labels, reference_labels):
    triplets = set()
    for a, p in naive_pairs(labels, reference_labels)[0]:
        for n, label in enumerate(reference_labels):
            if label != labels[a]:
                triplets.add((a, p, n))
    return triplets


def naive_hardest(batch, margin, squared=True):
    triplets = set()
    for (a, p), (d_ap, distances) in naive_negatives(*batch, squared).items():
        best = None
        for n in sorted(distances):
            if best is None or distances[n] < distances[best]:
                best = n
        if best is not None and d_ap - distances[best] + margin > 0:
            triplets.add((a, p, best))
    return triplets


def naive_candidates(batch, margin, squared=True, semihard=False):
    """For each (anchor, positive) that has one, the negatives that may be drawn."""
    candidates = {}
    for pair, (d_ap, distances) in naive_negatives(*batch, squared).items():
        for n, d_an in distances.items():
            if d_ap - d_an + margin > 0 and (not semihard or d_an > d_ap):
                candidates.setdefault(pair, set()).add(n)
    return candidates


def naive_batch_hard(embeddings, labels, reference, reference_labels):
    triplets, others = set(), reference.tolist()
    for a, point in enumerate(embeddings.tolist()):
        farthest = nearest = None
        for i, label in enumerate(reference_labels):
            d = naive_distance(point, others[i])
            if label == labels[a] and (farthest is None or d > farthest[0]):
                farthest = d, i
            if label != labels[a] and (nearest is None or d < nearest[0]):
                nearest = d, i
        if farthest and nearest:
            triplets.add((a, farthest[1], nearest[1]))
    return triplets


def naive_contrastive_loss(embeddings, reference, positive, negative, margin):
    points, others, losses = embeddings.tolist(), reference.tolist(), []
    for i, j in positive:
        losses.append(naive_distance(points[i], others[j]))
    for i, j in negative:
        losses.append(max(0.0, margin - naive_distance(points[i], others[j], squared=False)) ** 2)
    return sum(losses) / max(1, len(losses))


def naive_triplet_loss(embeddings, reference, triplets, squared=True, soft_margin=False, average="all"):
    """The mean and how many are above zero."""
    points, others, losses = embeddings.tolist(), reference.tolist(), []
    for a, p, n in triplets:
        d_ap, d_an = naive_distance(points[a], others[p], squared), naive_distance(points[a], others[n], squared)
        violation = d_ap - d_an + MARGIN
        losses.append(math.log1p(math.exp(violation)) if soft_margin else max(0.0, violation))
    count = sum(one > 0 for one in losses)
    return sum(losses) / max(1, count if average == "active" else len(losses)), count


def select(selector, embeddings, labels, reference=None, reference_labels=None):
    """What a selector returns, as a list of tensors."""
    method = selector.get_pairs if isinstance(selector, PairSelector) else selector.get_triplets
    given = {} if reference is None else {"reference": reference, "reference_labels": reference_labels}
    result = method(embeddings, labels, **given)
    return list(result) if isinstance(selector, PairSelector) else [result]


def loss_of(loss_fn, embeddings, labels, reference=None, reference_labels=None, seed=0):
    """The loss alone, with the same draws at every call."""
    given = {} if reference is None else {"reference": reference, "reference_target": reference_labels}
    torch.manual_seed(seed)
    result = loss_fn(embeddings, labels, **given)
    return result[0] if isinstance(result, tuple) else result


def small_batch(dtype=torch.float64):
    labels, reference_labels = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 0, 2, 0, 1, 7])
    embeddings, reference = torch.randn(11, 2, dtype=torch.float64).to(dtype).split((5, 6))
    return embeddings.clone(), labels, reference.clone(), reference_labels


# Pairs


@each_labels
def test_all_pairs_with_references_equal_loops(labels, reference_labels):
    for embeddings, reference in points_for(labels, reference_labels, n_seeds=1):
        positive, negative = AllPositivePairSelector(balance=False).get_pairs(
            embeddings, torch.tensor(labels), reference=reference, reference_labels=torch.tensor(reference_labels)
        )
        assert (rows_of(positive), rows_of(negative)) == naive_pairs(labels, reference_labels)
        assert positive.shape[1] == negative.shape[1] == 2


@each_labels
def test_balanced_pairs_with_references_are_a_sample_of_as_many(labels, reference_labels):
    expected, all_negative = naive_pairs(labels, reference_labels)
    for embeddings, reference in points_for(labels, reference_labels):
        positive, negative = select(AllPositivePairSelector(), embeddings, labels, reference, reference_labels)
        assert rows_of(positive) == expected
        assert rows_of(negative) <= all_negative
        assert len(negative) == min(len(expected), len(all_negative))


@each_labels
def test_hard_pairs_with_references_equal_loops(labels, reference_labels):
    expected_positive, all_negative = naive_pairs(labels, reference_labels)
    for embeddings, reference in points_for(labels, reference_labels):
        points, others = embeddings.tolist(), reference.tolist()
        by_distance = {(i, j): naive_distance(points[i], others[j]) for i, j in all_negative}
        positive, negative = select(HardNegativePairSelector(), embeddings, labels, reference, reference_labels)
        assert rows_of(positive) == expected_positive
        assert rows_of(negative) <= all_negative
        # Where distances tie, which of the pairs is free: their distances are compared.
        expected = sorted(by_distance.values())[: len(expected_positive)]
        assert sorted(by_distance[pair] for pair in rows_of(negative)) == expected


# Triplets


@each_labels
@pytest.mark.parametrize("both_directions", [False, True])
def test_all_triplets_with_references_equal_loops(labels, reference_labels, both_directions):
    for embeddings, reference in points_for(labels, reference_labels, n_seeds=1):
        selector = AllTripletSelector(both_directions=both_directions)
        (triplets,) = select(selector, embeddings, labels, reference, reference_labels)
        assert rows_of(triplets) == naive_triplets(labels, reference_labels)
        assert triplets.shape[1] == 3


@each_labels
def test_batch_hard_with_references_equals_loops(labels, reference_labels):
    for embeddings, reference in points_for(labels, reference_labels):
        (triplets,) = select(BatchHardTripletSelector(), embeddings, labels, reference, reference_labels)
        assert rows_of(triplets) == naive_batch_hard(embeddings, labels, reference, reference_labels)


@each_labels
@each_geometry
def test_hardest_negatives_with_references_equal_loops(labels, reference_labels, squared, both_directions):
    options = {"squared": squared, "both_directions": both_directions}
    for embeddings, reference in points_for(labels, reference_labels, n_seeds=2):
        batch = embeddings, labels, reference, reference_labels
        for margin in (0.0, 0.5, 50.0):
            expected = naive_hardest(batch, margin, squared)
            (triplets,) = select(HardestNegativeTripletSelector(margin, **options), *batch)
            assert rows_of(triplets) == expected
            (triplets,) = select(FunctionNegativeTripletSelector(margin, hardest_negative, **options), *batch)
            assert rows_of(triplets) == expected


@each_labels
@each_geometry
@pytest.mark.parametrize("semihard", [False, True], ids=["random", "semihard"])
def test_drawn_negatives_with_references_are_candidates_of_loops(
    labels, reference_labels, squared, both_directions, semihard
):
    strategy = SemihardNegativeTripletSelector if semihard else RandomNegativeTripletSelector
    for embeddings, reference in points_for(labels, reference_labels, n_seeds=2):
        batch = embeddings, labels, reference, reference_labels
        for margin in (0.0, 0.5, 50.0):
            candidates = naive_candidates(batch, margin, squared, semihard)
            (triplets,) = select(strategy(margin, squared=squared, both_directions=both_directions), *batch)
            drawn = {(a, p): n for a, p, n in rows_of(triplets)}
            assert len(drawn) == len(triplets)
            assert set(drawn) == set(candidates)
            for pair, negative in drawn.items():
                assert negative in candidates[pair]


def test_function_is_given_all_negatives_in_the_order_of_the_references():
    seen = []

    def last(loss_values):
        seen.append(loss_values.tolist())
        return len(loss_values) - 1

    selector = FunctionNegativeTripletSelector(1.0, last)
    triplets = selector.get_triplets(
        torch.tensor([[0.0], [5.0]]),
        [0, 8],
        reference=torch.tensor([[3.0], [2.0], [1.0], [0.0]]),
        reference_labels=[1, 0, 2, 0],
    )
    assert rows_of(triplets) == {(0, 1, 2), (0, 3, 2)}
    assert sorted(seen) == [[-8.0, 0.0], [-4.0, 4.0]]  # d_ap^2 of 0 and 4; d_an^2 of 9 and 1


@each_triplet_selector
def test_an_anchor_equal_to_a_reference_is_another_sample(make):
    # The same tensor given as both: its samples are compared with themselves too, at distance 0.
    points, labels = torch.tensor([[0.0], [0.5], [0.75]]), [0, 1, 2]
    (triplets,) = select(make(), points, labels, points, labels)
    assert {(a, p) for a, p, _ in triplets.tolist()} == {(0, 0), (1, 1), (2, 2)}
    assert bool((triplets[:, 2] != triplets[:, 0]).all())


def test_a_pair_of_an_anchor_with_an_equal_reference_is_one():
    points, labels = torch.zeros(3, 2), [0, 0, 1]
    positive, negative = AllPositivePairSelector(balance=False).get_pairs(
        points, labels, reference=points, reference_labels=labels
    )
    assert rows_of(positive) == {(0, 0), (0, 1), (1, 0), (1, 1), (2, 2)}
    assert rows_of(negative) == {(0, 2), (1, 2), (2, 0), (2, 1)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_selection_with_references_in_other_precisions_equals_loops(dtype):
    labels, reference_labels = LABELS["balanced"]
    for embeddings, reference in points_for(labels, reference_labels):
        if dtype == torch.float64 and embeddings.shape[1] == 2:
            continue  # ties of the grid, which float64 rounds
        batch = (embeddings * 6 + 300).to(dtype), labels, (reference * 6 + 300).to(dtype), reference_labels
        assert rows_of(*select(BatchHardTripletSelector(), *batch)) == naive_batch_hard(*batch)
        for margin in (0.2, 30.0):
            hardest = select(HardestNegativeTripletSelector(margin), *batch)
            assert rows_of(*hardest) == naive_hardest(batch, margin)


@each_triplet_selector
def test_selection_does_not_depend_on_how_far_from_the_origin_all_lie(make):
    labels, reference_labels = LABELS["balanced"]
    embeddings, reference = torch.randint(0, 4, (12, 2)).float().split((6, 6))
    results = []
    for offset in (0, 2**13):
        torch.manual_seed(0)
        results.append(select(make(), embeddings + offset, labels, reference + offset, reference_labels)[0].tolist())
    assert results[0] == results[1]


# Draws


CRITICAL = {4: 23.5, 14: 42.6, 24: 58.6}  # of chi-square by degrees of freedom: one uniform draw in 10,000 exceeds it


def chi_square(values, n_cells):
    """Pearson's statistic of how often each value was seen, against a uniform draw."""
    counts = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    expected = len(values) / n_cells
    assert len(counts) <= n_cells
    assert expected > 20
    unseen = (n_cells - len(counts)) * expected
    return unseen + sum((count - expected) ** 2 / expected for count in counts.values())


def coincident_pairs(n_anchors, n_positives):
    """Anchors and their positives at the origin, and of the negatives, in no order, five inside the margin."""
    points = [9.0, 1.5, 0.5, 1.0, *[0.0] * n_positives, 7.0, 0.25, 1.25, 8.0]
    labels = [10, 11, 12, 13, *[0] * n_positives, 14, 15, 16, 17]
    candidates = {i for i, point in enumerate(points) if 0 < point < 2}
    return torch.zeros(n_anchors, 1), [0] * n_anchors, torch.tensor(points)[:, None], labels, candidates


@pytest.mark.parametrize("strategy", [RandomNegativeTripletSelector, SemihardNegativeTripletSelector])
def test_draws_from_references_are_uniform_and_pairwise_independent(strategy):
    *batch, candidates = coincident_pairs(n_anchors=1200, n_positives=3)
    (triplets,) = select(strategy(4.0), *batch)
    assert len(triplets) == 3600
    drawn = {(a, p): n for a, p, n in triplets.tolist()}
    assert set(drawn.values()) == candidates
    assert chi_square(list(drawn.values()), n_cells=5) < CRITICAL[4]
    for p, q in ((4, 5), (4, 6), (5, 6)):  # of one anchor
        assert chi_square([(drawn[a, p], drawn[a, q]) for a in range(1200)], n_cells=25) < CRITICAL[24]
    neighbours = [(drawn[a, 4], drawn[a + 1, 4]) for a in range(0, 1200, 2)]  # of one positive
    halves = [(drawn[a, 4], drawn[a + 600, 4]) for a in range(600)]
    across = [(drawn[a, 6], drawn[a + 1, 4]) for a in range(0, 1200, 2)]  # the last of one anchor, the next one's first
    for pairs in (neighbours, halves, across):
        assert chi_square(pairs, n_cells=25) < CRITICAL[24]


def test_semihard_draws_from_references_are_uniform_over_those_behind_the_nearer_ones():
    nearer, semihard, farther = [0.1, 0.5, 0.9, 0.3, 0.7], [1.5, 1.1, 2.0, 1.7, 1.3], [3.0, 4.0]
    reference = torch.tensor([*nearer, 1.0, *semihard, *farther])[:, None]
    embeddings, labels = torch.zeros(1500, 1), [0] * 1500
    reference_labels = [*range(1, 6), 0, *range(6, 13)]
    (triplets,) = select(SemihardNegativeTripletSelector(4.0), embeddings, labels, reference, reference_labels)
    assert chi_square(triplets[:, 2].tolist(), n_cells=5) < CRITICAL[4]
    assert set(triplets[:, 2].tolist()) == set(range(6, 11))


def test_balanced_pairs_with_references_are_uniform():
    embeddings, reference = torch.zeros(2, 2), torch.zeros(4, 2)
    labels, reference_labels = [0, 1], [0, 1, 0, 2]  # 3 positive pairs, 2 + 3 negative ones
    selector, draws = AllPositivePairSelector(), []
    for _ in range(500):
        _, negative = select(selector, embeddings, labels, reference, reference_labels)
        draws += [tuple(pair) for pair in negative.tolist()]
    assert len(draws) == 1500
    assert chi_square(draws, n_cells=5) < CRITICAL[4]


@pytest.mark.parametrize(
    "make",
    [
        lambda generator: AllPositivePairSelector(generator=generator),
        lambda generator: RandomNegativeTripletSelector(4.0, generator=generator),
        lambda generator: SemihardNegativeTripletSelector(4.0, generator=generator),
    ],
    ids=["balanced_pairs", "random", "semihard"],
)
def test_draws_from_references_repeat_with_the_generator(make):
    batch = torch.randn(20, 2), [i % 3 for i in range(20)], torch.randn(30, 2), [i % 3 for i in range(30)]
    draws = []
    state = torch.get_rng_state()
    for seed in (5, 5, 6):
        draws.append(select(make(torch.Generator().manual_seed(seed)), *batch)[-1].tolist())
    assert torch.equal(torch.get_rng_state(), state)
    assert draws[0] == draws[1] != draws[2]


# Losses


@each_labels
@each_pair_selector
def test_contrastive_with_references_equals_loops(make, labels, reference_labels):
    for embeddings, reference in points_for(labels, reference_labels, n_seeds=2):
        torch.manual_seed(0)
        positive, negative = select(make(), embeddings, labels, reference, reference_labels)
        expected = naive_contrastive_loss(embeddings, reference, positive.tolist(), negative.tolist(), 1.5)
        loss = loss_of(OnlineContrastiveLoss(1.5, make()), embeddings, labels, reference, reference_labels)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@each_labels_with_triplets
@each_triplet_selector
@pytest.mark.parametrize(
    ("squared", "soft_margin"),
    [(True, False), (True, True), (False, False), (False, True)],
    ids=["squared", "squared_soft", "plain", "plain_soft"],
)
def test_triplet_with_references_equals_loops(make, labels, reference_labels, squared, soft_margin):
    options = {} if make in (AllTripletSelector, BatchHardTripletSelector) else {"squared": squared}
    for embeddings, reference in points_for(labels, reference_labels, n_seeds=1):
        torch.manual_seed(0)
        (triplets,) = select(make(**options), embeddings, labels, reference, reference_labels)
        expected, n_active = naive_triplet_loss(embeddings, reference, triplets.tolist(), squared, soft_margin)
        loss_fn = OnlineTripletLoss(MARGIN, make(**options), squared=squared, soft_margin=soft_margin)
        torch.manual_seed(0)
        loss, count = loss_fn(embeddings, labels, reference=reference, reference_target=reference_labels)
        assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert count.dtype == torch.int64
        if embeddings.shape[1] == 3 or squared:  # plain distances of the grid: whether a hinge is 0 is up to rounding
            assert count.item() == n_active


@each_labels_with_triplets
@pytest.mark.parametrize("average", ["active", "all"])
@each_geometry
def test_batch_all_with_references_equals_loops(labels, reference_labels, squared, both_directions, average):
    triplets = naive_triplets(labels, reference_labels)
    for embeddings, reference in points_for(labels, reference_labels, n_seeds=2):
        expected, n_active = naive_triplet_loss(embeddings, reference, triplets, squared, average=average)
        loss_fn = BatchAllTripletLoss(MARGIN, squared=squared, both_directions=both_directions, average=average)
        loss, count = loss_fn(embeddings, labels, reference=reference, reference_target=reference_labels)
        if embeddings.shape[1] == 3 or squared:
            assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
            assert count.item() == n_active


@each_triplet_selector
def test_both_directions_changes_nothing_with_references(make):
    if make is BatchHardTripletSelector:
        pytest.skip("has no both_directions")
    batch = torch.randn(6, 3), *LABELS["balanced"][:1], torch.randn(6, 3), *LABELS["balanced"][1:]
    results = []
    for both_directions in (False, True):
        selector = make(both_directions=both_directions)
        torch.manual_seed(0)
        triplets = select(selector, *batch)[0].tolist()
        results.append((triplets, loss_of(OnlineTripletLoss(MARGIN, selector), *batch).item()))
    assert results[0] == results[1]


@each_loss
def test_many_references_equal_the_same_in_float64(make):
    labels, reference_labels = torch.randint(40, (50,)), torch.randint(40, (400,))
    embeddings, reference = torch.randn(50, 8), torch.randn(400, 8)
    loss_fn = make()
    selector = getattr(loss_fn, "triplet_selector", getattr(loss_fn, "pair_selector", AllTripletSelector()))
    torch.manual_seed(0)
    selected = select(selector, embeddings, labels, reference, reference_labels)
    loss = loss_of(loss_fn, embeddings, labels, reference, reference_labels)
    x, y = embeddings.double(), reference.double()
    if isinstance(loss_fn, OnlineContrastiveLoss):
        positive, negative = selected
        d_positive, d_negative = ((x[i] - y[j]).square().sum(1) for i, j in (positive.T, negative.T))
        losses = torch.cat((d_positive, (loss_fn.margin - d_negative.sqrt()).clamp(min=0).square()))
    else:
        a, p, n = selected[0].T
        d_ap, d_an = (x[a] - y[p]).square().sum(1), (x[a] - y[n]).square().sum(1)
        violation = (d_ap - d_an if loss_fn.squared else d_ap.sqrt() - d_an.sqrt()) + loss_fn.margin
        losses = torch.nn.functional.softplus(violation) if getattr(loss_fn, "soft_margin", False) else violation
        losses = losses.clamp(min=0)
    n_averaged = int((losses > 0).sum()) if getattr(loss_fn, "average", "all") == "active" else len(losses)
    assert loss.item() == pytest.approx(losses.sum().item() / n_averaged, rel=1e-5)


# Gradients


@each_loss
def test_gradients_flow_into_anchors_and_references(make):
    embeddings, labels, reference, reference_labels = small_batch()
    loss_fn, inputs = make(), (embeddings.requires_grad_(), reference.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: loss_of(loss_fn, x, labels, y, reference_labels), inputs)
    loss = loss_of(loss_fn, embeddings, labels, reference, reference_labels)
    both = torch.autograd.grad(loss, inputs)
    assert all(bool(gradient.count_nonzero()) for gradient in both)


@each_loss
def test_second_derivatives_with_references_are_right(make):
    embeddings, labels, reference, reference_labels = small_batch()
    loss_fn, inputs = make(), (embeddings.requires_grad_(), reference.requires_grad_())
    function = lambda x, y: loss_of(loss_fn, x, labels, y, reference_labels)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_into_one_of_the_two_alone(make, dtype):
    batch, loss_fn = small_batch(dtype), make()
    inputs = [batch[0].clone().requires_grad_(), batch[2].clone().requires_grad_()]
    loss = loss_of(loss_fn, inputs[0], batch[1], inputs[1], batch[3])
    both = torch.autograd.grad(loss, inputs)
    for i in range(2):
        given = [x.detach().clone() for x in inputs]
        given[i].requires_grad_()
        one = loss_of(loss_fn, given[0], batch[1], given[1], batch[3])
        assert one.item() == loss.item()
        one.backward()
        torch.testing.assert_close(given[i].grad, both[i])
        assert given[1 - i].grad is None
    none = loss_of(loss_fn, inputs[0].detach(), batch[1], inputs[1].detach(), batch[3])
    assert not none.requires_grad
    assert none.item() == loss.item()
    with torch.no_grad():
        assert not loss_of(loss_fn, inputs[0], batch[1], inputs[1], batch[3]).requires_grad


@each_loss
def test_references_that_are_the_embeddings_get_their_gradient_added(make):
    # One tensor given as both: the sum of the two gradients.
    embeddings, labels = torch.randn(8, 3, dtype=torch.float64, requires_grad=True), torch.arange(8) % 3
    copies = [embeddings.detach().clone().requires_grad_() for _ in range(2)]
    loss = loss_of(make(), embeddings, labels, embeddings, labels)
    other = loss_of(make(), copies[0], labels, copies[1], labels)
    torch.testing.assert_close(loss, other)
    expected = sum(torch.autograd.grad(other, copies))
    torch.testing.assert_close(torch.autograd.grad(loss, embeddings)[0], expected)


@each_loss
def test_inputs_are_left_alone(make):
    batch = small_batch(torch.float32)
    before = [x.clone() for x in batch]
    loss_of(make(), batch[0].requires_grad_(), batch[1], batch[2].requires_grad_(), batch[3]).backward()
    assert all(torch.equal(x.detach(), y) for x, y in zip(batch, before))


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_references_equals_float32(make, dtype):
    batch = small_batch(dtype)
    half = [batch[0].requires_grad_(), batch[2].requires_grad_()]
    full = [x.detach().float().requires_grad_() for x in half]
    losses = [loss_of(make(), x, batch[1], y, batch[3]) for x, y in (half, full)]
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(*losses)
    for gradient, expected in zip(torch.autograd.grad(losses[0], half), torch.autograd.grad(losses[1], full)):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, expected.to(dtype))


@each_loss
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_references_of_another_precision_are_taken_at_their_own(make, dtypes):
    # Two encoders of which one runs under autocast: nothing is rounded to the narrower type.
    embeddings, labels, reference, reference_labels = small_batch(torch.float64)
    for one, other in (dtypes, dtypes[::-1]):
        given = embeddings.to(one).requires_grad_(), reference.to(other).requires_grad_()
        exact = [x.detach().double().requires_grad_() for x in given]
        loss = loss_of(make(), given[0], labels, given[1], reference_labels)
        expected = loss_of(make(), exact[0], labels, exact[1], reference_labels)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for x, gradient, precise in zip(given, torch.autograd.grad(loss, given), torch.autograd.grad(expected, exact)):
            assert gradient.dtype == x.dtype
            torch.testing.assert_close(gradient, precise.to(x.dtype))


@each_loss
def test_losses_with_references_under_autocast_are_as_exact(make):
    batch, results = small_batch(torch.float32), []
    inputs = batch[0].requires_grad_(), batch[2].requires_grad_()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(make(), inputs[0], batch[1], inputs[1], batch[3])
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for plain, cast in zip(*results):
        torch.testing.assert_close(plain, cast)


# Nothing to select


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_selected_from_references_is_a_zero_with_a_graph_into_both(make, dtype):
    loss_fn = make()
    for name in WITHOUT_PAIRS if isinstance(loss_fn, OnlineContrastiveLoss) else WITHOUT_TRIPLETS:
        labels, reference_labels = LABELS[name]
        embeddings = torch.randn(len(labels), 3).to(dtype).requires_grad_()
        reference = torch.randn(len(reference_labels), 3).to(dtype).requires_grad_()
        result = loss_fn(embeddings, labels, reference=reference, reference_target=reference_labels)
        loss = result[0] if isinstance(result, tuple) else result
        assert (loss.item(), loss.shape, loss.dtype) == (0, (), torch.float32)
        if isinstance(result, tuple):
            assert (result[1].item(), result[1].dtype, result[1].shape) == (0, torch.int64, ())
        loss.backward()
        for x in (embeddings, reference):
            assert x.grad.shape == x.shape
            assert x.grad.count_nonzero() == 0


@each_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["embeddings", "reference"])
def test_references_not_finite_never_give_a_finite_loss(make, bad, where):
    embeddings, labels, reference, reference_labels = small_batch(torch.float32)
    (embeddings if where == "embeddings" else reference)[1, 1] = bad
    assert not math.isfinite(loss_of(make(), embeddings, labels, reference, reference_labels).item())


# What is refused


@each_loss
def test_reference_without_its_labels_is_refused(make):
    embeddings, labels, reference, reference_labels = small_batch()
    with pytest.raises(TypeError, match="reference_target"):
        make()(embeddings, labels, reference=reference)
    with pytest.raises(TypeError, match="reference"):
        make()(embeddings, labels, reference_target=reference_labels)


@pytest.mark.parametrize("make", [*PAIR_SELECTORS.values(), *TRIPLET_SELECTORS.values()])
def test_reference_of_a_selector_without_its_labels_is_refused(make):
    embeddings, labels, reference, reference_labels = small_batch()
    selector = make()
    method = selector.get_pairs if isinstance(selector, PairSelector) else selector.get_triplets
    with pytest.raises(TypeError, match="reference_labels"):
        method(embeddings, labels, reference=reference)
    with pytest.raises(TypeError, match="reference"):
        method(embeddings, labels, reference_labels=reference_labels)


@each_loss
def test_references_of_other_dimension_shape_or_number_of_labels_are_refused(make):
    embeddings, labels, reference, reference_labels = small_batch()
    with pytest.raises(ValueError, match=r"2\b.*\b4\b|4\b.*\b2\b"):
        make()(embeddings, labels, reference=torch.randn(6, 4), reference_target=reference_labels)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        make()(embeddings, labels, reference=torch.randn(6), reference_target=reference_labels)
    with pytest.raises(ValueError, match=r"5"):
        make()(embeddings, labels, reference=reference, reference_target=reference_labels[:5])
    with pytest.raises(ValueError, match=r"device|meta"):
        make()(embeddings, labels, reference=reference.to("meta"), reference_target=reference_labels)


@pytest.mark.parametrize("make", [*PAIR_SELECTORS.values(), *TRIPLET_SELECTORS.values()])
def test_references_of_a_selector_of_other_dimension_or_number_of_labels_are_refused(make):
    embeddings, labels, reference, reference_labels = small_batch()
    with pytest.raises(ValueError, match=r"2\b.*\b4\b|4\b.*\b2\b"):
        select(make(), embeddings, labels, torch.randn(6, 4), reference_labels)
    with pytest.raises(ValueError, match=r"5"):
        select(make(), embeddings, labels, reference, reference_labels[:5])


@each_loss
def test_references_are_keywords_only(make):
    embeddings, labels, reference, reference_labels = small_batch()
    with pytest.raises(TypeError):
        make()(embeddings, labels, reference, reference_labels)


# Selectors of the user's own


class FirstPairs:
    """Inherits nothing, and knows references."""

    def get_pairs(self, embeddings, labels, *, reference=None, reference_labels=None):
        assert (reference is None) == (reference_labels is None)
        return np.array([[0, 1]]), np.array([[0, 2], [1, 2]])


class FirstTriplets:
    def get_triplets(self, embeddings, labels, *, reference=None, reference_labels=None):
        assert (reference is None) == (reference_labels is None)
        return np.array([[0, 1, 2], [1, 0, 2]])


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor, lambda x: np.asarray(x, dtype=np.int32)])
def test_indices_of_the_user_may_be_arrays(convert):
    class Triplets:
        def get_triplets(self, embeddings, labels):
            return convert([[0, 1, 2]])

    class Pairs:
        def get_pairs(self, embeddings, labels):
            return convert([[0, 1]]), convert([[1, 2]])

    embeddings, labels = torch.tensor([[0.0], [2.0], [1.0]], requires_grad=True), [0, 0, 1]
    loss, count = OnlineTripletLoss(1.0, Triplets())(embeddings, labels)
    assert (loss.item(), count.item()) == (4.0, 1)
    assert torch.autograd.grad(loss, embeddings)[0].tolist() == [[-2.0], [4.0], [-2.0]]
    assert OnlineContrastiveLoss(1.5, Pairs())(embeddings, labels).item() == pytest.approx((4 + 0.25) / 2)


@pytest.mark.parametrize("n_triplets", [0, 1])
def test_empty_arrays_of_the_user_give_zero(n_triplets):
    class Nothing:
        def get_triplets(self, embeddings, labels):
            return np.empty((0, 3), dtype=np.int64)

        def get_pairs(self, embeddings, labels):
            return np.empty((0, 2), dtype=np.int64), np.empty((0, 2), dtype=np.int64)

    embeddings = torch.randn(3, 2, requires_grad=True)
    for loss_fn in (OnlineTripletLoss(1.0, Nothing()), OnlineContrastiveLoss(1.0, Nothing())):
        loss = loss_of(loss_fn, embeddings, [0, 0, 1])
        assert loss.item() == 0
        loss.backward()


def test_selectors_that_inherit_nothing_are_given_the_references():
    embeddings = torch.tensor([[0.0], [1.0]], requires_grad=True)
    reference = torch.tensor([[4.0], [2.0], [0.5]], requires_grad=True)
    labels, reference_labels = [0, 1], [1, 0, 2]
    given = {"reference": reference, "reference_target": reference_labels}
    loss, count = OnlineTripletLoss(1.0, FirstTriplets())(embeddings, labels, **given)
    assert loss.item() == pytest.approx((4 - 0.25 + 1 + 9 - 0.25 + 1) / 2)
    assert count.item() == 2
    gradients = torch.autograd.grad(loss, (embeddings, reference))
    assert all(bool(gradient.count_nonzero()) for gradient in gradients)
    loss = OnlineContrastiveLoss(1.0, FirstPairs())(embeddings, labels, **given)
    assert loss.item() == pytest.approx((4 + 0.25 + 0.25) / 3)
    gradients = torch.autograd.grad(loss, (embeddings, reference))
    assert all(bool(gradient.count_nonzero()) for gradient in gradients)


def test_a_selector_that_takes_any_keyword_is_given_the_references():
    class Anything:
        def get_triplets(self, embeddings, labels, **options):
            self.options = options
            return torch.tensor([[0, 1, 0]])

    selector, reference = Anything(), torch.randn(2, 1)
    loss_fn = OnlineTripletLoss(1.0, selector)
    loss_fn(torch.randn(3, 1), [0, 0, 1])
    assert selector.options == {}
    loss_fn(torch.randn(3, 1), [0, 0, 1], reference=reference, reference_target=[1, 0])
    assert sorted(selector.options) == ["reference", "reference_labels"]
    assert torch.equal(selector.options["reference"], reference)


class WithSource(TripletSelector):
    """A third argument that is the user's."""

    def get_triplets(self, embeddings, labels, source=None):
        assert source is None
        return torch.tensor([[0, 1, 2]])


class WithThreshold(PairSelector):
    def get_pairs(self, embeddings, labels, threshold=0.5):
        assert threshold == 0.5
        return torch.tensor([[0, 1]]), torch.tensor([[0, 2]])


class TwoArguments:
    def get_triplets(self, embeddings, labels):
        return torch.tensor([[0, 1, 2]])

    def get_pairs(self, embeddings, labels):
        return torch.tensor([[0, 1]]), torch.tensor([[0, 2]])


class OursOverridden(HardestNegativeTripletSelector):
    def get_triplets(self, embeddings, labels):
        return super().get_triplets(embeddings, labels)[:1]


@pytest.mark.parametrize(
    "loss_fn",
    [
        OnlineTripletLoss(1.0, WithSource()),
        OnlineContrastiveLoss(1.0, WithThreshold()),
        OnlineTripletLoss(1.0, TwoArguments()),
        OnlineContrastiveLoss(1.0, TwoArguments()),
        OnlineTripletLoss(1.0, OursOverridden(1.0)),
    ],
    ids=["source", "threshold", "triplets", "pairs", "overridden"],
)
def test_selectors_without_references_are_called_with_two_arguments_and_refuse_references(loss_fn):
    embeddings, labels = torch.tensor([[0.0], [1.0], [0.5]]), [0, 0, 1]
    assert loss_of(loss_fn, embeddings, labels).item() > 0
    selector = getattr(loss_fn, "triplet_selector", None) or loss_fn.pair_selector
    with pytest.raises(TypeError, match=f"{type(selector).__name__}.*reference"):
        loss_fn(embeddings, labels, reference=embeddings, reference_target=labels)


@pytest.mark.parametrize("name", TRIPLET_SELECTORS)
def test_subclasses_of_our_selectors_are_asked_through_their_get_triplets(name):
    base = type(TRIPLET_SELECTORS[name]())

    class First(base):
        def get_triplets(self, embeddings, labels, *, reference=None, reference_labels=None):
            triplets = super().get_triplets(embeddings, labels, reference=reference, reference_labels=reference_labels)
            self.n_calls = getattr(self, "n_calls", 0) + 1
            return triplets[:1]

    arguments = {"all": (), "batch_hard": (), "function": (9.0, hardest_negative)}.get(name, (9.0,))
    selector = First(*arguments)
    embeddings, labels = torch.tensor([[0.0], [1.0], [2.0], [4.0]]), [0, 0, 1, 1]
    loss_fn = OnlineTripletLoss(9.0, selector)
    loss, count = loss_fn(embeddings, labels)
    assert (selector.n_calls, count.item()) == (1, 1)
    reference, reference_labels = torch.tensor([[0.5], [3.0]]), [0, 1]
    loss, count = loss_fn(embeddings, labels, reference=reference, reference_target=reference_labels)
    assert (selector.n_calls, count.item()) == (2, 1)
    assert loss.item() == pytest.approx(0.25 - 9 + 9)  # anchor 0 with both references


@pytest.mark.parametrize("base", [AllPositivePairSelector, HardNegativePairSelector])
def test_subclasses_of_our_selectors_are_asked_through_their_get_pairs(base):
    class PositivesOnly(base):
        def get_pairs(self, embeddings, labels, *, reference=None, reference_labels=None):
            positive, negative = super().get_pairs(
                embeddings, labels, reference=reference, reference_labels=reference_labels
            )
            return positive, negative[:0]

    loss_fn = OnlineContrastiveLoss(9.0, PositivesOnly())
    embeddings, labels = torch.tensor([[0.0], [1.0], [2.0], [4.0]]), [0, 0, 1, 1]
    assert loss_fn(embeddings, labels).item() == pytest.approx((1 + 4) / 2)
    loss = loss_fn(embeddings, labels, reference=torch.tensor([[0.5], [3.0]]), reference_target=[0, 2])
    assert loss.item() == pytest.approx((0.25 + 0.25) / 2)


def test_a_method_replaced_on_the_object_is_asked():
    embeddings, labels = torch.tensor([[0.0], [1.0], [2.0], [4.0]]), [0, 0, 1, 1]
    selector = SemihardNegativeTripletSelector(1.0)
    loss_fn = OnlineTripletLoss(1.0, selector)
    selector.get_triplets = lambda embeddings, labels: np.array([[0, 1, 3]])
    loss, count = loss_fn(embeddings, labels)
    assert (loss.item(), count.item()) == (0, 0)
    selector.get_triplets = lambda embeddings, labels: np.array([[3, 2, 0], [3, 2, 1]])
    assert loss_fn(embeddings, labels)[0].item() == 0
    selector.get_triplets = lambda embeddings, labels: np.array([[2, 3, 1]])
    assert loss_fn(embeddings, labels)[0].item() == 4
    pairs = AllPositivePairSelector()
    contrastive = OnlineContrastiveLoss(1.0, pairs)
    pairs.get_pairs = lambda embeddings, labels: (np.array([[0, 3]]), np.empty((0, 2), dtype=np.int64))
    assert contrastive(embeddings, labels).item() == 16


def test_a_method_replaced_on_the_class_is_asked(monkeypatch):
    monkeypatch.setattr(HardestNegativeTripletSelector, "get_triplets", lambda *_: torch.tensor([[2, 3, 1]]))
    embeddings, labels = torch.tensor([[0.0], [1.0], [2.0], [4.0]]), [0, 0, 1, 1]
    assert OnlineTripletLoss(1.0, HardestNegativeTripletSelector(1.0))(embeddings, labels)[0].item() == 4


def test_what_is_replaced_in_a_selector_is_used_in_its_loss():
    # Attributes of a selector count when the loss is called, not when it was built.
    embeddings, labels = torch.tensor([[0.0], [1.0], [3.0], [30.0]]), [0, 0, 1, 1]
    selector = HardestNegativeTripletSelector(0.5)
    loss_fn = OnlineTripletLoss(0.5, selector)
    assert loss_fn(embeddings, labels)[1].item() == 1  # (2, 3, 1)
    selector.margin = loss_fn.margin = 20.0
    assert loss_fn(embeddings, labels)[1].item() == 2
    loss_fn.triplet_selector = AllTripletSelector()
    assert loss_fn(embeddings, labels)[1].item() == 3  # all but (0, 1, 3)


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        (HardestNegativeTripletSelector(1.0), {1}),
        (RandomNegativeTripletSelector(1.0), {1, 3}),
        (SemihardNegativeTripletSelector(1.0), {3}),
    ],
    ids=["hardest", "random", "semihard"],
)
def test_strategies_are_selectors_by_function(selector, chosen):
    assert isinstance(selector, FunctionNegativeTripletSelector)
    assert isinstance(selector, TripletSelector)
    loss_values = np.array([-0.1, 1.7, -0.2, 0.5])
    assert {selector.negative_selection_fn(loss_values) for _ in range(40)} == chosen
    assert selector.negative_selection_fn(np.array([-0.1, -0.2])) is None
    assert selector.margin == 1.0


@each_loss
def test_results_are_the_same_whoever_asks(make):
    """A subclass that only hands on takes the way of indices, where our own selectors may take another."""
    loss_fn = make()
    name = "pair_selector" if hasattr(loss_fn, "pair_selector") else "triplet_selector"
    if not hasattr(loss_fn, name):
        pytest.skip("has no selector")
    selector = getattr(loss_fn, name)

    class HandsOn:
        def get_triplets(self, *args, **kwargs):
            return selector.get_triplets(*args, **kwargs)

        def get_pairs(self, *args, **kwargs):
            return selector.get_pairs(*args, **kwargs)

    embeddings, labels, reference, reference_labels = small_batch()
    inputs = embeddings.requires_grad_(), reference.requires_grad_()
    options = {key: getattr(loss_fn, key) for key in ("squared", "soft_margin") if hasattr(loss_fn, key)}
    other_fn = type(loss_fn)(loss_fn.margin, HandsOn(), **options)
    for given, graph in (((), inputs[:1]), ((reference, reference_labels), inputs)):
        loss, other = (loss_of(one, embeddings, labels, *given) for one in (loss_fn, other_fn))
        torch.testing.assert_close(loss, other)
        for gradient, expected in zip(torch.autograd.grad(loss, graph), torch.autograd.grad(other, graph)):
            torch.testing.assert_close(gradient, expected)
