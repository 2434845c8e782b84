"""What must hold for whatever batch: of any shape, labels, dtype and magnitude, with values that are not finite."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets import BalancedBatchSampler, SiameseDataset, TripletDataset
from evaluation import evaluate_embeddings, few_shot_accuracy, knn_predict, verification
from losses import BatchAllTripletLoss, OnlineContrastiveLoss, OnlineTripletLoss
from utils import (
    AllPositivePairSelector,
    AllTripletSelector,
    BatchHardTripletSelector,
    HardestNegativeTripletSelector,
    HardNegativePairSelector,
    RandomNegativeTripletSelector,
    SemihardNegativeTripletSelector,
    pdist,
)

pytestmark = pytest.mark.slow

for_any = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)

PAIR_SELECTORS = [AllPositivePairSelector(), AllPositivePairSelector(balance=False), HardNegativePairSelector()]
TRIPLET_SELECTORS = [
    AllTripletSelector(),
    AllTripletSelector(both_directions=True),
    BatchHardTripletSelector(),
    HardestNegativeTripletSelector(1.0),
    RandomNegativeTripletSelector(1.0),
    SemihardNegativeTripletSelector(1.0),
]
LOSSES = [
    *(OnlineContrastiveLoss(1.0, selector) for selector in PAIR_SELECTORS),
    *(OnlineTripletLoss(1.0, selector) for selector in TRIPLET_SELECTORS),
    BatchAllTripletLoss(1.0),
    BatchAllTripletLoss(1.0, squared=False),
    BatchAllTripletLoss(1.0, average="all"),
]
SURE_LOSSES = [  # that draw nothing
    OnlineContrastiveLoss(1.0, HardNegativePairSelector()),
    OnlineContrastiveLoss(1.0, AllPositivePairSelector(balance=False)),
    *(OnlineTripletLoss(1.0, selector) for selector in TRIPLET_SELECTORS[:4]),
    BatchAllTripletLoss(1.0),
]
SYMMETRIC_LOSSES = [  # over every anchor; those over pairs i < j take the first of each as anchor
    OnlineContrastiveLoss(1.0, AllPositivePairSelector(balance=False)),
    OnlineTripletLoss(1.0, AllTripletSelector(both_directions=True)),
    OnlineTripletLoss(1.0, BatchHardTripletSelector()),
    BatchAllTripletLoss(1.0),
    BatchAllTripletLoss(1.0, squared=False, average="all"),
]


@st.composite
def batches(draw, dtypes=(torch.float32, torch.float64, torch.bfloat16), min_size=1, exponents=(-20, 18)):
    """Embeddings (B, D) of some magnitude, some rows the same, and labels (B,)."""
    B, D = draw(st.integers(min_size, 24)), draw(st.integers(1, 5))
    labels = torch.tensor(draw(st.lists(st.integers(-3, 4), min_size=B, max_size=B)))
    generator = torch.Generator().manual_seed(draw(seeds))
    embeddings = torch.randn(B, D, generator=generator) * 10.0 ** draw(st.integers(*exponents))
    n_same = draw(st.integers(0, B))
    embeddings[:n_same] = embeddings[:1].expand(n_same, D) if n_same else embeddings[:0]
    return embeddings.to(draw(st.sampled_from(dtypes))), labels


def name_of(loss):
    parts = [type(loss).__name__, *(type(x).__name__ for x in vars(loss).values() if hasattr(x, "__module__"))]
    return "-".join(part for part in parts if part.endswith(("Loss", "Selector")))


def value_of(loss):
    return loss[0] if isinstance(loss, tuple) else loss


@pytest.mark.parametrize("selector", TRIPLET_SELECTORS, ids=lambda s: type(s).__name__)
@for_any
@given(batches())
def test_triplets_are_of_two_of_one_class_and_one_of_another(selector, batch):
    embeddings, labels = batch
    triplets = selector.get_triplets(embeddings, labels)
    assert (triplets.dtype, triplets.shape[1]) == (torch.int64, 3)
    anchor, positive, negative = triplets.unbind(dim=1)
    assert bool((anchor != positive).all())
    assert bool((labels[anchor] == labels[positive]).all())
    assert bool((labels[anchor] != labels[negative]).all())
    assert len({tuple(triplet) for triplet in triplets.tolist()}) == len(triplets)


@pytest.mark.parametrize("selector", PAIR_SELECTORS, ids=lambda s: type(s).__name__)
@for_any
@given(batches())
def test_pairs_are_of_one_class_and_of_two(selector, batch):
    embeddings, labels = batch
    positive, negative = selector.get_pairs(embeddings, labels)
    assert bool((labels[positive[:, 0]] == labels[positive[:, 1]]).all())
    assert bool((labels[negative[:, 0]] != labels[negative[:, 1]]).all())
    for pairs in (positive, negative):
        assert bool((pairs[:, 0] < pairs[:, 1]).all())
        assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
    counts = Counter(labels.tolist())
    assert len(positive) == sum(n * (n - 1) // 2 for n in counts.values())


@for_any
@given(batches())
def test_distances_are_those_of_a_metric(batch):
    distances = pdist(batch[0])
    assert bool((distances >= 0).all())
    assert bool((distances.diagonal() == 0).all())
    torch.testing.assert_close(distances, distances.T)


@pytest.mark.parametrize("loss_fn", LOSSES, ids=name_of)
@for_any
@given(batches())
def test_losses_and_gradients_are_finite(loss_fn, batch):
    embeddings, labels = batch
    embeddings = embeddings.requires_grad_()
    loss = value_of(loss_fn(embeddings, labels))
    assert loss.dtype in (torch.float32, torch.float64)
    assert float(loss.detach()) >= 0
    if embeddings.dtype == torch.float64 or float(embeddings.detach().abs().max()) < 1e15:  # else its square overflows
        assert bool(loss.isfinite())
        loss.backward()
        assert bool(embeddings.grad.isfinite().all())


@pytest.mark.parametrize("loss_fn", LOSSES, ids=name_of)
@for_any
@given(
    batches(dtypes=(torch.float32,), min_size=6, exponents=(-2, 2)),
    st.sampled_from([torch.inf, -torch.inf, torch.nan]),
    seeds,
)
def test_what_is_not_finite_never_gives_a_finite_loss(loss_fn, batch, value, seed):
    embeddings, labels = batch
    labels = torch.arange(len(labels)) % 2  # pairs of both kinds
    embeddings[seed % len(embeddings), 0] = value
    assert not bool(value_of(loss_fn(embeddings, labels)).isfinite())


@pytest.mark.parametrize("loss_fn", SURE_LOSSES, ids=name_of)
@for_any
@given(batches(dtypes=(torch.float64,), exponents=(-1, 1)))
def test_losses_do_not_depend_on_the_names_of_classes(loss_fn, batch):
    embeddings, labels = batch
    torch.testing.assert_close(
        value_of(loss_fn(embeddings, 7 - labels)), value_of(loss_fn(embeddings, labels)), atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("loss_fn", SYMMETRIC_LOSSES, ids=name_of)
@for_any
@given(batches(dtypes=(torch.float64,), exponents=(-1, 1)), seeds)
def test_losses_over_all_anchors_do_not_depend_on_the_order(loss_fn, batch, seed):
    embeddings, labels = batch
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        value_of(loss_fn(embeddings[order], labels[order])), value_of(loss_fn(embeddings, labels)), atol=1e-9, rtol=1e-9
    )


@for_any
@given(batches(dtypes=(torch.float64,), exponents=(-2, 1)), st.booleans(), st.floats(0.01, 10))
def test_batch_all_is_the_loss_of_all_triplets(batch, squared, margin):
    embeddings, labels = batch
    all_triplets = OnlineTripletLoss(margin, AllTripletSelector(both_directions=True), squared=squared)
    expected, count = all_triplets(embeddings, labels)
    loss, own_count = BatchAllTripletLoss(margin, squared=squared, average="all")(embeddings, labels)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-7)
    assert abs(int(own_count) - int(count)) <= 2  # some have a loss of 0 but for rounding


@for_any
@given(batches(dtypes=(torch.float64,), exponents=(-1, 1)), st.floats(-100, 100))
def test_batch_all_does_not_depend_on_where_the_embeddings_lie(batch, shift):
    embeddings, labels = batch
    loss_fn = BatchAllTripletLoss(1.0, average="all")
    torch.testing.assert_close(
        loss_fn(embeddings + shift, labels)[0], loss_fn(embeddings, labels)[0], atol=1e-8, rtol=1e-8
    )


@for_any
@given(st.data(), st.integers(1, 8), st.integers(1, 5), st.integers(1, 3), seeds)
def test_sampler_batches_are_balanced(data, n_classes, n_samples, n_processes, seed):
    counts = data.draw(st.lists(st.integers(1, 9), min_size=n_classes, max_size=10))
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    if len(labels) < n_classes * n_samples * n_processes:
        return
    samplers = [
        BalancedBatchSampler(labels, n_classes, n_samples, num_replicas=n_processes, rank=rank, seed=seed)
        for rank in range(n_processes)
    ]
    for batches_of_step in zip(*samplers):
        for batch in batches_of_step:
            drawn = Counter(labels[i] for i in batch)
            assert len(drawn) == n_classes
            assert set(drawn.values()) == {n_samples}
        together = Counter(i for batch in batches_of_step for i in batch)
        for c, n in Counter(labels[i] for i in together.elements()).items():
            assert sum(labels[i] == c for i in together) == min(n, counts[c])  # all of a class before one twice
    assert {len(list(sampler)) for sampler in samplers} == {len(samplers[0])}


@for_any
@given(st.lists(st.integers(2, 6), min_size=2, max_size=6), st.booleans(), seeds)
def test_pairs_and_triplets_of_a_dataset_are_what_they_say(counts, is_training, seed):
    labels = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
    data = torch.utils.data.TensorDataset(torch.arange(len(labels)), labels)
    torch.manual_seed(seed)
    for i, ((first, second), target) in enumerate(SiameseDataset(data, train=is_training)):
        assert first == i != second
        assert target == int(labels[first] == labels[second])
    for i, ((anchor, positive, negative), _) in enumerate(TripletDataset(data, train=is_training)):
        assert anchor == i != positive
        assert labels[anchor] == labels[positive] != labels[negative]
        if i + 1 == len(labels):
            break


@for_any
@given(batches(min_size=4, exponents=(-15, 15)))
def test_retrieval_figures_are_shares(batch):
    embeddings, labels = batch
    if max(Counter(labels.tolist()).values()) < 2:
        return
    values = evaluate_embeddings(embeddings, labels, ks=(1, 3), allow_copies=True)
    assert values["n_queries"] + values["n_left_out"] == len(labels)
    shares = {name: value for name, value in values.items() if not name.startswith("n_")}
    assert all(0 <= value <= 1 for value in shares.values())
    assert values["recall@1"] <= values["recall@3"]
    assert values["map@r"] <= values["r_precision"] + 1e-12
    assert evaluate_embeddings(embeddings, labels + 5, ks=(1, 3), allow_copies=True) == values


@for_any
@given(batches(min_size=4, exponents=(-5, 5)), st.integers(1, 6))
def test_neighbours_of_a_set_in_itself_begin_with_one_at_no_distance(batch, k):
    embeddings, labels = batch
    k = min(k, len(labels))
    predicted, _, distances = knn_predict(embeddings, embeddings, labels, n_neighbors=k)
    assert bool((distances[:, 0] <= 1e-6 * embeddings.double().abs().max()).all())
    assert bool((distances.diff(dim=1) >= -1e-6 * embeddings.double().abs().max()).all())
    assert set(predicted.tolist()) <= set(labels.tolist())


@for_any
@given(batches(min_size=4, exponents=(-5, 5)))
def test_verification_figures_are_shares(batch):
    embeddings, labels = batch
    counts = Counter(labels.tolist())
    if max(counts.values()) < 2 or len(counts) < 2:
        return
    values = verification(embeddings, labels)
    for name in ("auc", "eer", "accuracy", "tar@far=0.001", "tar@far=0.01"):
        assert 0 <= values[name] <= 1, name
    assert values["tar@far=0.001"] <= values["tar@far=0.01"]
    assert values["threshold"] >= 0


@for_any
@given(batches(min_size=8, exponents=(-5, 5)), st.integers(1, 2), st.integers(1, 2))
def test_few_shot_accuracy_is_a_share(batch, n_shot, n_query):
    embeddings, labels = batch
    counts = sorted(Counter(labels.tolist()).values())
    if len(counts) < 2 or counts[-2] < n_shot + n_query:
        return
    accuracy, interval = few_shot_accuracy(embeddings, labels, 2, n_shot, n_query=n_query, n_episodes=5)
    assert 0 <= accuracy <= 1
    assert interval >= 0
