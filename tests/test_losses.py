"""Losses against loops and numbers worked by hand. D-numbers in names: the defects that the tests guard against."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import BatchAllTripletLoss, ContrastiveLoss, OnlineContrastiveLoss, OnlineTripletLoss, TripletLoss
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

PAIR_SELECTORS = {
    "all": lambda: AllPositivePairSelector(balance=False),
    "balanced": AllPositivePairSelector,
    "hard": HardNegativePairSelector,
}
TRIPLET_SELECTORS = {
    "all": AllTripletSelector,
    "batch_hard": BatchHardTripletSelector,
    "hardest": lambda: HardestNegativeTripletSelector(1.0),
    "random": lambda: RandomNegativeTripletSelector(1.0),
    "semihard": lambda: SemihardNegativeTripletSelector(1.0),
    "function": lambda: FunctionNegativeTripletSelector(1.0, hardest_negative),
}

each_pair_selector = pytest.mark.parametrize("make", PAIR_SELECTORS.values(), ids=PAIR_SELECTORS)
each_triplet_selector = pytest.mark.parametrize("make", TRIPLET_SELECTORS.values(), ids=TRIPLET_SELECTORS)
each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
each_average = pytest.mark.parametrize("size_average", [True, False])
each_seed = pytest.mark.parametrize("seed", range(3))
each_variant = pytest.mark.parametrize(
    ("squared", "soft_margin"),
    [(True, False), (True, True), (False, False), (False, True)],
    ids=["squared", "squared_soft", "plain", "plain_soft"],
)


class GivenPairs(PairSelector):
    """Always the same pairs: what a user's own selector may look like."""

    def __init__(self, positive, negative, device="cpu"):
        self.pairs = [
            torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 2) for rows in (positive, negative)
        ]

    def get_pairs(self, embeddings, labels):
        return self.pairs


class GivenTriplets(TripletSelector):
    def __init__(self, triplets, device="cpu"):
        self.triplets = torch.tensor(triplets, dtype=torch.int64, device=device).reshape(-1, 3)

    def get_triplets(self, embeddings, labels):
        return self.triplets


def naive_distance(x, y, squared=True):
    total = 0.0
    for a, b in zip(x, y):
        total += (a - b) ** 2
    return total if squared else math.sqrt(total)


def naive_contrastive(x1, x2, target, margin):
    """The loss of each pair."""
    losses = []
    for a, b, is_same in zip(x1.tolist(), x2.tolist(), target.tolist()):
        distance = naive_distance(a, b, squared=False)
        losses.append(0.5 * distance**2 if is_same else 0.5 * max(0.0, margin - distance) ** 2)
    return losses


def naive_triplet(anchor, positive, negative, margin, squared=True, soft_margin=False):
    """The loss of each triplet."""
    losses = []
    for a, p, n in zip(anchor.tolist(), positive.tolist(), negative.tolist()):
        violation = naive_distance(a, p, squared) - naive_distance(a, n, squared) + margin
        losses.append(math.log(1 + math.exp(violation)) if soft_margin else max(0.0, violation))
    return losses


def value_and_gradient(loss_fn, embeddings, labels):
    """An online loss and its gradient."""
    embeddings = embeddings.detach().clone().requires_grad_()
    result = loss_fn(embeddings, labels)
    loss = result[0] if isinstance(result, tuple) else result
    loss.backward()
    return loss.detach(), embeddings.grad


def assert_zero_with_graph(loss, embeddings):
    assert loss.dtype == torch.promote_types(embeddings.dtype, torch.float32)
    assert loss.shape == ()
    assert loss.item() == 0
    loss.backward()
    assert embeddings.grad.shape == embeddings.shape
    assert embeddings.grad.count_nonzero() == 0


# By hand


def test_contrastive_by_hand():
    x1 = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    x2 = torch.tensor([[3.0, 4.0], [0.6, 0.8], [3.0, 4.0], [1.0, 1.0]])
    target = torch.tensor([1, 0, 0, 0])
    # d = 5 of one class; d = 1, 5 and 0 of two: 25, (2 - 1)^2, 0 and (2 - 0)^2, halved
    assert ContrastiveLoss(2.0)(x1, x2, target, size_average=False).item() == pytest.approx(15)
    assert ContrastiveLoss(2.0)(x1, x2, target).item() == pytest.approx(15 / 4)


def test_triplet_by_hand():
    anchor, positive = torch.zeros(3, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 2.0]])
    negative = torch.tensor([[0.0, 2.0], [0.0, 3.0], [0.0, 2.0]])
    # squared: 25 - 4 + 1, 1 - 9 + 1 and 4 - 4 + 1; plain: 5 - 2 + 1, 1 - 3 + 1 and 2 - 2 + 1
    assert TripletLoss(1.0)(anchor, positive, negative, size_average=False).item() == pytest.approx(23)
    assert TripletLoss(1.0)(anchor, positive, negative).item() == pytest.approx(23 / 3)
    assert TripletLoss(1.0, squared=False)(anchor, positive, negative, False).item() == pytest.approx(5)
    soft = math.log(1 + math.exp(4)) + math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))
    loss = TripletLoss(1.0, squared=False, soft_margin=True)(anchor, positive, negative, size_average=False)
    assert loss.item() == pytest.approx(soft)


def test_online_contrastive_by_hand():
    embeddings = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.6, 0.8]])
    loss_fn = OnlineContrastiveLoss(2.0, GivenPairs([[0, 1]], [[0, 2], [1, 2]]))
    assert loss_fn(embeddings, [0, 0, 1]).item() == pytest.approx((25 + 1 + 0) / 3)


def test_online_triplet_by_hand():
    embeddings = torch.tensor([[0.0], [2.0], [1.0], [9.0]])
    loss, count = OnlineTripletLoss(1.0, GivenTriplets([[0, 1, 2], [0, 1, 3], [1, 0, 2]]))(embeddings, [0, 0, 1, 1])
    assert loss.item() == pytest.approx((4 - 1 + 1 + 0 + 4 - 1 + 1) / 3)
    assert count.item() == 2


# Against loops


@each_seed
@each_average
@pytest.mark.parametrize("margin", [0.5, 3.0])
def test_contrastive_equals_loops(seed, size_average, margin):
    torch.manual_seed(seed)
    x1, x2, target = torch.randn(20, 3), torch.randn(20, 3), torch.randint(2, (20,))
    losses = naive_contrastive(x1, x2, target, margin)
    loss = ContrastiveLoss(margin)(x1, x2, target, size_average=size_average)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(losses) / (20 if size_average else 1), rel=1e-5)


@each_seed
@each_average
@each_variant
@pytest.mark.parametrize("margin", [0.0, 0.5, 3.0])
def test_triplet_equals_loops(seed, size_average, squared, soft_margin, margin):
    torch.manual_seed(seed)
    embeddings = torch.randn(3, 20, 4)
    losses = naive_triplet(*embeddings, margin, squared, soft_margin)
    loss = TripletLoss(margin, squared=squared, soft_margin=soft_margin)(*embeddings, size_average=size_average)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(sum(losses) / (20 if size_average else 1), rel=1e-5)


@each_seed
def test_online_contrastive_equals_loops(seed):
    torch.manual_seed(seed)
    embeddings, labels = torch.randn(14, 3), torch.randint(4, (14,)).tolist()
    losses, points = [], embeddings.tolist()
    for i in range(14):
        for j in range(i + 1, 14):
            distance = naive_distance(points[i], points[j], squared=False)
            losses.append(distance**2 if labels[i] == labels[j] else max(0.0, 1.5 - distance) ** 2)
    loss = OnlineContrastiveLoss(1.5, AllPositivePairSelector(balance=False))(embeddings, labels)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@each_seed
@each_variant
def test_online_triplet_equals_loops(seed, squared, soft_margin):
    torch.manual_seed(seed)
    embeddings, labels = torch.randn(14, 3), torch.randint(4, (14,)).tolist()
    rows = []
    for a in range(14):
        for p in range(a + 1, 14):
            for n in range(14):
                if labels[a] == labels[p] != labels[n]:
                    rows.append((a, p, n))
    losses = naive_triplet(*(embeddings[[row[i] for row in rows]] for i in range(3)), 0.7, squared, soft_margin)
    loss_fn = OnlineTripletLoss(0.7, AllTripletSelector(), squared=squared, soft_margin=soft_margin)
    loss, count = loss_fn(embeddings, labels)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert count.item() == sum(one > 0 for one in losses)


# Gradients


def test_contrastive_gradient():
    x1, x2 = torch.randn(2, 8, 3, dtype=torch.float64).requires_grad_()
    target = torch.tensor([0, 1] * 4)
    assert torch.autograd.gradcheck(lambda *pair: ContrastiveLoss(2.5)(*pair, target), (x1, x2))


@each_variant
def test_triplet_gradient(squared, soft_margin):
    embeddings = torch.randn(3, 8, 3, dtype=torch.float64).requires_grad_()
    loss_fn = TripletLoss(0.5, squared=squared, soft_margin=soft_margin)
    assert torch.autograd.gradcheck(lambda e: loss_fn(*e), embeddings)


def test_online_contrastive_gradient():
    embeddings, labels = torch.randn(9, 3, dtype=torch.float64, requires_grad=True), [0, 1, 2] * 3
    for selector in (AllPositivePairSelector(balance=False), HardNegativePairSelector()):
        loss_fn = OnlineContrastiveLoss(2.5, selector)
        assert torch.autograd.gradcheck(lambda e, loss_fn=loss_fn: loss_fn(e, labels), embeddings)


@each_variant
def test_online_triplet_gradient(squared, soft_margin):
    embeddings, labels = torch.randn(9, 3, dtype=torch.float64, requires_grad=True), [0, 1, 2] * 3
    selectors = (AllTripletSelector(), HardestNegativeTripletSelector(0.5, squared=squared))
    for selector in selectors:
        loss_fn = OnlineTripletLoss(0.5, selector, squared=squared, soft_margin=soft_margin)
        assert torch.autograd.gradcheck(lambda e, loss_fn=loss_fn: loss_fn(e, labels)[0], embeddings)


def test_coincident_pairs_have_finite_gradients():
    x1, x2 = torch.full((2, 3, 2), 0.7).requires_grad_().unbind()
    x1.retain_grad()
    loss = ContrastiveLoss(1.5)(x1, x2, torch.tensor([1, 0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0 + 1.5**2 + 1.5**2) / 3)
    assert torch.isfinite(x1.grad).all()


@each_pair_selector
def test_coincident_negatives_in_a_batch_have_finite_gradients(make):
    embeddings = torch.tensor([[0.0, 0.0], [3.0, 1.0], [0.0, 0.0], [9.0, 1.0]])  # 0 and 2: the pair that is mined
    loss, gradient = value_and_gradient(OnlineContrastiveLoss(1.5, make()), embeddings, [0, 0, 1, 1])
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    loss, gradient = value_and_gradient(OnlineContrastiveLoss(1.5, make()), torch.full((4, 2), 0.7), [0, 0, 1, 1])
    assert loss > 0
    assert gradient.count_nonzero() == 0


@each_variant
def test_coincident_triplets_have_finite_gradients(squared, soft_margin):
    options = {"squared": squared, "soft_margin": soft_margin}
    embeddings = torch.full((3, 4, 2), 0.7).requires_grad_()
    loss = TripletLoss(1.5, **options)(*embeddings)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(1.5)) if soft_margin else 1.5)
    assert torch.isfinite(embeddings.grad).all()
    loss_fn = OnlineTripletLoss(1.5, AllTripletSelector(), **options)
    loss, gradient = value_and_gradient(loss_fn, torch.full((4, 2), 0.7), [0, 0, 1, 1])
    assert loss.item() == pytest.approx(math.log(1 + math.exp(1.5)) if soft_margin else 1.5)
    assert torch.isfinite(gradient).all()


# Online and offline


@each_pair_selector
@each_seed
def test_online_contrastive_is_twice_the_offline_one(make, seed):
    torch.manual_seed(seed)
    embeddings, labels = torch.randn(16, 3), torch.randint(4, (16,))
    positive, negative = make().get_pairs(embeddings, labels)
    selector = GivenPairs(positive.tolist(), negative.tolist())
    loss, gradient = value_and_gradient(OnlineContrastiveLoss(1.5, selector), embeddings, labels)
    offline = embeddings.clone().requires_grad_()
    pairs = torch.cat((positive, negative))
    target = torch.tensor([1] * len(positive) + [0] * len(negative))
    offline_loss = ContrastiveLoss(1.5)(offline[pairs[:, 0]], offline[pairs[:, 1]], target)
    offline_loss.backward()
    torch.testing.assert_close(loss, 2 * offline_loss.detach())
    torch.testing.assert_close(gradient, 2 * offline.grad)


@each_triplet_selector
@each_variant
def test_online_triplet_equals_the_offline_one(make, squared, soft_margin):
    embeddings, labels = torch.randn(16, 3), torch.arange(16) % 4
    triplets = make().get_triplets(embeddings, labels)
    options = {"squared": squared, "soft_margin": soft_margin}
    loss_fn = OnlineTripletLoss(1.0, GivenTriplets(triplets.tolist()), **options)
    loss, gradient = value_and_gradient(loss_fn, embeddings, labels)
    offline = embeddings.clone().requires_grad_()
    offline_loss = TripletLoss(1.0, **options)(*(offline[triplets[:, i]] for i in range(3)))
    offline_loss.backward()
    torch.testing.assert_close(loss, offline_loss.detach())
    torch.testing.assert_close(gradient, offline.grad)


@pytest.mark.parametrize("n_selected", [1, 5, 400])
@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("is_grid", [False, True])
def test_online_losses_of_few_and_many_equal_the_offline_ones(n_selected, offset, is_grid):
    # Any rows, some of them twice, in a batch of 24; on the grid some of the selected points coincide.
    embeddings = (torch.randint(0, 3, (24, 2)).float() if is_grid else torch.randn(24, 2)) + offset
    triplets, n_positive = torch.randint(0, 24, (n_selected, 3)), (n_selected + 1) // 2
    cases = [
        (
            OnlineTripletLoss(1.0, GivenTriplets(triplets.tolist()), squared=squared),
            TripletLoss(1.0, squared=squared),
            1,
        )
        for squared in (True, False)
    ]
    positive, negative = triplets[:n_positive, :2].tolist(), triplets[n_positive:, :2].tolist()
    target = (torch.arange(n_selected) < n_positive).long()
    contrastive = ContrastiveLoss(2.0)
    cases.append(
        (OnlineContrastiveLoss(2.0, GivenPairs(positive, negative)), lambda a, p, _: contrastive(a, p, target), 2)
    )
    for online, offline, factor in cases:
        loss, gradient = value_and_gradient(online, embeddings, torch.zeros(24))
        exact = embeddings.double().requires_grad_()
        exact_loss = factor * offline(*(exact[triplets[:, i]] for i in range(3)))
        exact_loss.backward()
        torch.testing.assert_close(loss, exact_loss.detach().float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, exact.grad.float(), rtol=1e-4, atol=1e-5)


@each_triplet_selector
def test_online_triplet_takes_the_selectors_triplets(make):
    embeddings, labels = torch.randn(16, 3), torch.arange(16) % 4
    torch.manual_seed(1)
    triplets = make().get_triplets(embeddings, labels)
    torch.manual_seed(1)
    loss, count = OnlineTripletLoss(1.0, make())(embeddings, labels)
    losses = naive_triplet(*(embeddings[triplets[:, i]] for i in range(3)), 1.0)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert count.item() == sum(one > 0 for one in losses)


def test_labels_of_every_form_give_the_same():
    embeddings, labels = torch.randn(8, 2), torch.tensor([0, 0, 1, 1, 5, 5, -2, -2])
    for loss_fn in (
        OnlineContrastiveLoss(1.0, HardNegativePairSelector()),
        OnlineTripletLoss(1.0, AllTripletSelector()),
    ):
        expected, _ = value_and_gradient(loss_fn, embeddings, labels)
        for form in (labels.tolist(), labels.numpy(), labels[:, None], labels.float()):
            assert value_and_gradient(loss_fn, embeddings, form)[0] == expected


# What is counted


def test_count_is_of_active_triplets():
    embeddings = torch.tensor([[0.0], [1.0], [1.0], [50.0], [2.0**0.5]])
    selector = GivenTriplets([[0, 1, 2], [0, 1, 3], [0, 3, 1], [0, 1, 3]])
    loss, count = OnlineTripletLoss(1.0, selector)(embeddings, [0, 0, 1, 1, 2])
    assert count.shape == ()
    assert count.dtype == torch.int64
    assert count.item() == 2
    assert loss.item() == pytest.approx((1 + 0 + 2500 - 1 + 1 + 0) / 4)


def test_count_leaves_out_a_loss_of_exactly_zero():
    loss, count = OnlineTripletLoss(3.0, GivenTriplets([[0, 1, 2]]))(torch.tensor([[0.0], [1.0], [2.0]]), [0, 0, 1])
    assert (loss.item(), count.item()) == (0, 0)  # 1 - 4 + 3


def test_mean_over_active_triplets_from_the_count():
    embeddings, labels = torch.randn(20, 2), torch.arange(20) % 4
    triplets = AllTripletSelector().get_triplets(embeddings, labels)
    losses = naive_triplet(*(embeddings[triplets[:, i]] for i in range(3)), 0.5)
    active = [one for one in losses if one > 0]
    assert 0 < len(active) < len(losses)
    loss, count = OnlineTripletLoss(0.5, AllTripletSelector())(embeddings, labels)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert (loss * len(triplets) / count).item() == pytest.approx(sum(active) / len(active), rel=1e-5)


# Nothing selected


@each_pair_selector
@pytest.mark.parametrize("labels", [[], [3], [0, 1]], ids=["none", "one", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_no_pairs_give_zero_with_a_graph(make, labels, dtype):
    embeddings = torch.randn(len(labels), 2).mul(5).to(dtype).requires_grad_()
    # Two samples of two classes are one negative pair, which only "all" takes: beyond the margin it costs nothing.
    loss = OnlineContrastiveLoss(1e-6, make())(embeddings, torch.tensor(labels, dtype=torch.int64))
    assert_zero_with_graph(loss, embeddings)


@each_triplet_selector
@pytest.mark.parametrize(
    "labels",
    [[], [3], [0, 0], [0, 1], [7] * 6, [5, 4, 3, 2]],
    ids=["none", "one", "alike", "two", "one_class", "distinct"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_no_triplets_give_zero_with_a_graph(make, labels, dtype):
    embeddings = torch.randn(len(labels), 2).to(dtype).requires_grad_()
    loss, count = OnlineTripletLoss(1.0, make())(embeddings, torch.tensor(labels, dtype=torch.int64))
    assert_zero_with_graph(loss, embeddings)
    assert count.shape == ()
    assert count.dtype == torch.int64
    assert count.item() == 0


@each_pair_selector
@pytest.mark.parametrize("labels", [[0, 0], [1, 1, 1, 1]])
def test_batch_without_negatives_is_the_mean_of_the_positives(make, labels):
    embeddings = torch.arange(len(labels)).float()[:, None]
    loss, gradient = value_and_gradient(OnlineContrastiveLoss(1.0, make()), embeddings, torch.tensor(labels))
    assert loss.item() == pytest.approx({2: 1, 4: (1 + 1 + 1 + 4 + 4 + 9) / 6}[len(labels)])
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2]])
def test_batch_without_positives_is_the_mean_of_the_negatives(labels):
    embeddings = torch.arange(len(labels)).float()[:, None]
    loss_fn = OnlineContrastiveLoss(3.0, AllPositivePairSelector(balance=False))
    loss, gradient = value_and_gradient(loss_fn, embeddings, torch.tensor(labels))
    assert loss.item() == pytest.approx({2: 4, 3: (4 + 1 + 4) / 3}[len(labels)])
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_not_finite_are_never_a_zero_loss(dtype, value):
    embeddings = torch.randn(4, 2)
    embeddings[1, 0] = value
    embeddings, nothing = embeddings.to(dtype), [0, 1, 2, 3]
    assert OnlineContrastiveLoss(1.0, HardNegativePairSelector())(embeddings, nothing).isnan()
    for make in TRIPLET_SELECTORS.values():
        loss, count = OnlineTripletLoss(1.0, make())(embeddings, nothing)
        assert loss.isnan()
        assert count.item() == 0


@each_triplet_selector
def test_batch_of_nan_gives_nan(make):
    loss, _ = OnlineTripletLoss(1.0, make())(torch.full((6, 2), math.nan), [0, 0, 0, 1, 1, 1])
    assert loss.isnan()


# Precision

HALF_LOSSES = {
    "contrastive": lambda e: ContrastiveLoss(200.0)(e[0::2], e[1::2], torch.arange(30) % 2),
    "triplet": lambda e: TripletLoss(1.0)(*e.chunk(3)),
    "triplet_plain": lambda e: TripletLoss(1.0, squared=False)(*e.chunk(3)),
    "triplet_soft": lambda e: TripletLoss(1.0, soft_margin=True)(*e.chunk(3)),
    "online_contrastive": lambda e: OnlineContrastiveLoss(200.0, HardNegativePairSelector())(e, torch.arange(60) % 4),
    "online_triplet": lambda e: OnlineTripletLoss(1.0, AllTripletSelector())(e, torch.arange(60) % 4)[0],
    "online_hardest": lambda e: OnlineTripletLoss(1.0, HardestNegativeTripletSelector(1.0))(e, torch.arange(60) % 4)[0],
}


def assert_half_equals_float32(loss_fn, rounded):
    """The loss of half-precision embeddings and its gradient are those of float32 embeddings of the same values."""
    embeddings, exact = rounded.detach().requires_grad_(), rounded.detach().float().requires_grad_()
    loss, exact_loss = loss_fn(embeddings), loss_fn(exact)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact_loss)
    assert exact_loss > 0
    loss.backward()
    exact_loss.backward()
    assert embeddings.grad.dtype == rounded.dtype
    assert torch.isfinite(embeddings.grad).all()
    difference = (embeddings.grad.float() - exact.grad).norm() / exact.grad.norm()
    assert difference < 4 * torch.finfo(rounded.dtype).eps


@each_half
@pytest.mark.parametrize("scale", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("loss_fn", HALF_LOSSES.values(), ids=HALF_LOSSES)
def test_half_precision_equals_float32(loss_fn, dtype, scale):
    # At scale 1e-2 the squares of the smaller differences underflow float16, at 100 those of the larger ones overflow.
    assert_half_equals_float32(loss_fn, (torch.randn(60, 4) * scale).to(dtype))


@each_half
def test_half_precision_sums_beyond_float16(dtype):
    anchor, positive, negative = torch.tensor([0.0, 1000.0, 8.0]).repeat(20, 1).T[..., None].to(dtype)
    loss = TripletLoss(1.0)(anchor, positive, negative, size_average=False)
    assert loss.item() == 20 * (1000**2 - 8**2 + 1)


@each_half
def test_half_precision_gradient_of_many_triplets(dtype):
    # Each of the 172,800 triplets adds about 1e-7: float16 has nothing finer than 6e-8, yet it holds their sum.
    labels = torch.arange(160) % 10
    rounded = (torch.randn(160, 2) * 0.01).to(dtype)
    assert_half_equals_float32(lambda e: OnlineTripletLoss(1.0, AllTripletSelector())(e, labels)[0], rounded)


@pytest.mark.parametrize("loss_fn", HALF_LOSSES.values(), ids=HALF_LOSSES)
def test_loss_under_autocast_is_as_exact(loss_fn):
    embeddings = torch.randn(60, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_fn(embeddings)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_fn(embeddings))


@pytest.mark.parametrize("loss_fn", HALF_LOSSES.values(), ids=HALF_LOSSES)
def test_float64_stays_float64(loss_fn):
    assert loss_fn(torch.randn(60, 4, dtype=torch.float64)).dtype == torch.float64


# Margins that differ


@pytest.mark.parametrize("strategy", [HardestNegativeTripletSelector, SemihardNegativeTripletSelector])
def test_other_margin_of_the_selector_warns(strategy):
    with pytest.warns(UserWarning, match=rf"margin=1\.0 .*margin=0\.2 .*{strategy.__name__}") as caught:
        OnlineTripletLoss(1.0, strategy(0.2))
    assert caught[0].filename == __file__  # where the mistake is, not in the module


@pytest.mark.parametrize("squared", [True, False])
def test_other_distance_of_the_selector_warns(squared):
    selector = RandomNegativeTripletSelector(1.0, squared=not squared)
    with pytest.warns(UserWarning, match=rf"squared={squared} .*squared={not squared} .*RandomNegative"):
        OnlineTripletLoss(1.0, selector, squared=squared)


@pytest.mark.parametrize("squared", [True, False])
def test_equal_margin_and_distance_do_not_warn(squared):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OnlineTripletLoss(1, SemihardNegativeTripletSelector(1.0, squared=squared), squared=squared)
        OnlineTripletLoss(0.3, AllTripletSelector(), squared=squared)
        OnlineTripletLoss(0.3, BatchHardTripletSelector(), squared=squared)


# What stands in a loss's or a selector's place


class Delegating:
    """Hands all attributes on to a selector, but selects by itself."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)

    def get_triplets(self, embeddings, labels):
        return self.inner.get_triplets(embeddings, labels)[:1]


def test_selector_that_wraps_one_of_ours_is_asked_itself():
    embeddings, labels = torch.randn(30, 4), torch.arange(30) % 5
    loss_fn = OnlineTripletLoss(100.0, Delegating(AllTripletSelector()))
    assert int(loss_fn(embeddings, labels)[1]) == 1


def test_loss_with_a_forward_of_its_own_is_not_passed_over():
    class Normalised(BatchAllTripletLoss):
        def forward(self, embeddings, target):
            return super().forward(torch.nn.functional.normalize(embeddings), target)

    with pytest.raises(TypeError, match="its own forward, got Normalised"):
        losses.MemoryLoss(Normalised(1.0), 10)


def test_losses_do_not_depend_on_the_default_dtype():
    embeddings, labels = torch.randn(12, 3), torch.arange(12) % 3
    for loss_fn in (BatchAllTripletLoss(1.0), OnlineTripletLoss(1.0, AllTripletSelector())):
        expected = loss_fn(embeddings, labels)
        torch.set_default_dtype(torch.float64)
        try:
            assert loss_fn(embeddings, labels) == expected
        finally:
            torch.set_default_dtype(torch.float32)


@each_triplet_selector
def test_gradient_of_a_loss_that_is_nan_is_nan(make):
    embeddings = torch.randn(12, 3)
    embeddings[4, 1] = math.nan
    loss, gradient = value_and_gradient(lambda *x: OnlineTripletLoss(1.0, make())(*x), embeddings, torch.arange(12) % 3)
    assert loss.isnan()
    assert gradient.isnan().all()


def test_second_derivatives_of_functions_transformed_twice_are_refused_in_words():
    embeddings, labels = torch.randn(6, 2, dtype=torch.float64), torch.arange(6) % 2
    function = lambda x: BatchAllTripletLoss(1.0)(x, labels)[0]  # noqa: E731
    with pytest.raises(RuntimeError, match=r"torch\.autograd\.functional\.hessian"):
        torch.func.jacrev(torch.func.jacrev(function))(embeddings)


# A margin that is learned


@pytest.mark.parametrize(
    "make",
    [
        lambda margin: BatchAllTripletLoss(margin, average="all"),
        lambda margin: OnlineTripletLoss(margin, AllTripletSelector()),
        lambda margin: OnlineTripletLoss(margin, BatchHardTripletSelector(), soft_margin=True),
        lambda margin: OnlineContrastiveLoss(margin, HardNegativePairSelector()),
    ],
)
def test_margin_that_is_a_parameter_gets_a_gradient(make):
    embeddings, labels, step = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 3, 1e-5
    loss_fn = make(torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64)))
    value_and_gradient(loss_fn, embeddings, labels)
    above, below = (value_and_gradient(make(1.0 + s), embeddings, labels)[0] for s in (step, -step))
    assert loss_fn.margin.grad.item() == pytest.approx(float(above - below) / (2 * step), rel=1e-4)


# Wrong arguments


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_contrastive_target_may_be_a_column(dtype):
    x1, x2, target = torch.randn(6, 3), torch.randn(6, 3), torch.tensor([0, 1, 1, 0, 1, 0]).to(dtype)
    expected = sum(naive_contrastive(x1, x2, target, 1.0)) / 6
    assert ContrastiveLoss(1.0)(x1, x2, target).item() == pytest.approx(expected)
    assert ContrastiveLoss(1.0)(x1, x2, target[:, None]).item() == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(), (5,), (7,), (6, 6), (6, 2), (1, 6), (2, 3), (6, 1, 1)], ids=str)
def test_contrastive_target_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"target") as error:
        ContrastiveLoss(1.0)(torch.randn(6, 3), torch.randn(6, 3), torch.ones(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("shapes", [((4, 2), (3, 2)), ((4, 2), (4, 3)), ((4,), (4,)), ((4, 2, 1), (4, 2, 1))])
def test_contrastive_embeddings_of_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="ContrastiveLoss") as error:
        ContrastiveLoss(1.0)(*(torch.zeros(shape) for shape in shapes), torch.ones(4))
    assert str(shapes[1]) in str(error.value)


@pytest.mark.parametrize("shapes", [((4, 2), (4, 2), (3, 2)), ((4, 2), (4, 3), (4, 3)), ((4,), (4,), (4,))])
def test_triplet_embeddings_of_other_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="TripletLoss") as error:
        TripletLoss(1.0)(*(torch.zeros(shape) for shape in shapes))
    assert str(shapes[2]) in str(error.value)


@pytest.mark.parametrize("labels", [torch.arange(4), torch.arange(4)[:, None], [0, 1, 2, 3]])
def test_batch_and_labels_to_an_offline_loss_name_the_online_one(labels):
    with pytest.raises((TypeError, ValueError), match="OnlineContrastiveLoss"):
        ContrastiveLoss(1.0)(torch.zeros(4, 2), labels)
    with pytest.raises((TypeError, ValueError), match="OnlineTripletLoss"):
        TripletLoss(1.0)(torch.zeros(4, 2), labels)


@pytest.mark.parametrize(("n_outputs", "D"), [(1, 2), (2, 2), (3, 2), (4, 2), (1, 1), (3, 1)])
def test_outputs_of_triplet_net_to_the_online_loss_name_the_offline_one(n_outputs, D):
    outputs = [torch.zeros(4, D)] * n_outputs
    with pytest.raises((TypeError, ValueError), match=r"\bTripletLoss"):
        OnlineTripletLoss(1.0, AllTripletSelector())(*outputs)
    with pytest.raises((TypeError, ValueError), match=r"\bTripletLoss"):
        OnlineTripletLoss(1.0, AllTripletSelector())(tuple(outputs), torch.arange(4))


def test_outputs_of_siamese_net_to_the_online_loss_name_the_offline_one():
    loss_fn, target = OnlineContrastiveLoss(1.0, HardNegativePairSelector()), torch.ones(4)
    narrow, wide = [torch.zeros(4, 1)] * 2, [torch.zeros(4, 2)] * 2
    for arguments in ((*narrow, target), (*wide, target), wide, (tuple(wide), target)):
        with pytest.raises((TypeError, ValueError), match=r"\bContrastiveLoss"):
            loss_fn(*arguments)


@pytest.mark.parametrize("given", [1, 3, 4])
def test_another_number_of_arguments_is_named(given):
    with pytest.raises(TypeError, match=rf"got {given} argument\(s\), the first a Tensor"):
        OnlineTripletLoss(1.0, AllTripletSelector())(*[torch.zeros(4, 2)] * given)


@pytest.mark.parametrize(
    "loss_fn", [OnlineContrastiveLoss(1.0, HardNegativePairSelector()), OnlineTripletLoss(1.0, AllTripletSelector())]
)
@pytest.mark.parametrize("shape", [(), (3,), (4, 2), (1, 4), (2, 2)], ids=str)
def test_labels_of_another_shape_are_refused(loss_fn, shape):
    with pytest.raises(ValueError, match=type(loss_fn).__name__) as error:
        loss_fn(torch.zeros(4, 2), torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("loss_fn", [OnlineTripletLoss(1.0, GivenTriplets([[0, 1, 2]])), BatchAllTripletLoss(1.0)])
@pytest.mark.parametrize("shape", [(4,), (4, 2, 2)], ids=str)
def test_embeddings_of_another_shape_are_refused(loss_fn, shape):
    with pytest.raises(ValueError, match=type(loss_fn).__name__) as error:
        loss_fn(torch.zeros(shape), torch.arange(4) % 2)
    assert str(shape) in str(error.value)


def test_selector_of_the_wrong_kind_names_the_loss_to_use():
    with pytest.raises(TypeError, match=r"triplet selector.*HardNegativePairSelector") as error:
        OnlineTripletLoss(1.0, HardNegativePairSelector())
    assert "OnlineContrastiveLoss" in str(error.value)
    with pytest.raises(TypeError, match=r"pair selector.*AllTripletSelector") as error:
        OnlineContrastiveLoss(1.0, AllTripletSelector())
    assert "OnlineTripletLoss" in str(error.value)


@pytest.mark.parametrize("selector", [None, 1.0, hardest_negative])
def test_what_is_no_selector_is_refused(selector):
    with pytest.raises(TypeError, match="expected a triplet selector"):
        OnlineTripletLoss(1.0, selector)
    with pytest.raises(TypeError, match="expected a pair selector"):
        OnlineContrastiveLoss(1.0, selector)


# A user's own selector


def test_selector_of_the_user_is_given_embeddings_and_labels():
    embeddings, labels, given = torch.randn(4, 2), torch.tensor([0, 0, 1, 1]), []

    class Recording:
        def get_triplets(self, *arguments):
            given.append(arguments)
            return torch.tensor([[0, 1, 2]])

        def get_pairs(self, *arguments):
            given.append(arguments)
            return torch.tensor([[0, 1]]), torch.tensor([[0, 2]])

    OnlineTripletLoss(1.0, Recording())(embeddings, labels)
    OnlineContrastiveLoss(1.0, Recording())(embeddings, labels)
    assert len(given) == 2
    for arguments in given:
        assert arguments[0] is embeddings
        assert arguments[1] is labels


def test_selector_of_the_user_may_find_nothing():
    embeddings = torch.randn(4, 2, requires_grad=True)
    assert_zero_with_graph(OnlineTripletLoss(1.0, GivenTriplets([]))(embeddings, [0, 0, 1, 1])[0], embeddings)
    assert_zero_with_graph(OnlineContrastiveLoss(1.0, GivenPairs([], []))(embeddings, [0, 0, 1, 1]), embeddings)


# What the original computed


def golden_arrays(path):
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


GOLDEN = {
    path.stem[-2:]: golden_arrays(path)
    for path in sorted((Path(__file__).parent / "golden").glob("selectors_and_losses_*.npz"))
}
each_golden = pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)


def assert_golden(value, expected):
    """Equal to 1e-5 of the largest entry."""
    value, expected = value.detach().double(), expected.double()
    assert expected.abs().max() > 0
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@each_golden
@pytest.mark.parametrize("margin", [0.5, 1.0, 2.0])
@each_average
def test_golden_offline_losses(golden, margin, size_average):
    a, p, n = (golden[f"offline/{name}"].clone().requires_grad_() for name in "apn")
    key = f"offline/contrastive_{margin}_{size_average}"
    loss = ContrastiveLoss(margin)(a, p, golden["offline/target"], size_average=size_average)
    loss.backward()
    assert_golden(loss, golden[f"{key}.loss"])
    assert_golden(a.grad, golden[f"{key}.grad_a"])
    a.grad = None
    key = f"offline/triplet_{margin}_{size_average}"
    loss = TripletLoss(margin)(a, p, n, size_average=size_average)
    loss.backward()
    assert_golden(loss, golden[f"{key}.loss"])
    assert_golden(a.grad, golden[f"{key}.grad_a"])
    assert_golden(n.grad, golden[f"{key}.grad_n"])


@each_golden
@pytest.mark.parametrize("case", ["balanced", "wide", "skewed", "two_classes"])
def test_golden_online_losses(golden, case):
    embeddings, labels = golden[f"{case}/embeddings"], golden[f"{case}/labels"]
    margin = golden[f"{case}/margin"].item()
    losses = {
        "online_contrastive_hard": OnlineContrastiveLoss(margin, HardNegativePairSelector()),
        "online_triplet_all": OnlineTripletLoss(margin, AllTripletSelector()),
        "online_triplet_hardest": OnlineTripletLoss(margin, HardestNegativeTripletSelector(margin)),
    }
    if case == "two_classes":  # more positive than negative pairs: the original failed
        del losses["online_contrastive_hard"]
    for name, loss_fn in losses.items():
        loss, gradient = value_and_gradient(loss_fn, embeddings, labels)
        assert_golden(loss, golden[f"{case}/{name}.loss"])
        assert_golden(gradient, golden[f"{case}/{name}.grad"])


# On a GPU


@pytest.mark.gpu
@each_pair_selector
def test_online_contrastive_stays_on_the_gpu(make):
    embeddings = torch.randn(12, 3, device="cuda")
    for labels in (torch.arange(12) % 3, torch.arange(12, device="cuda") % 3):
        loss, gradient = value_and_gradient(OnlineContrastiveLoss(1.0, make()), embeddings, labels)
        assert loss.device == gradient.device == embeddings.device


@pytest.mark.gpu
@each_triplet_selector
@pytest.mark.parametrize("n_classes", [1, 3])
def test_online_triplet_stays_on_the_gpu(make, n_classes):
    embeddings = torch.randn(12, 3, device="cuda", requires_grad=True)
    for labels in (torch.arange(12) % n_classes, torch.arange(12, device="cuda") % n_classes):
        loss, count = OnlineTripletLoss(1.0, make())(embeddings, labels)
        loss.backward()
        assert loss.device == count.device == embeddings.grad.device == embeddings.device


@pytest.mark.gpu
@pytest.mark.parametrize(("indices_on", "embeddings_on"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_indices_of_the_user_may_be_on_another_device(indices_on, embeddings_on):
    embeddings = torch.tensor([[0.0], [2.0], [1.0]], device=embeddings_on)
    loss, count = OnlineTripletLoss(1.0, GivenTriplets([[0, 1, 2]], indices_on))(embeddings, [0, 0, 1])
    assert (loss.item(), count.item()) == (4, 1)
    loss = OnlineContrastiveLoss(2.0, GivenPairs([[0, 1]], [[0, 2]], indices_on))(embeddings, [0, 0, 1])
    assert loss.item() == pytest.approx((4 + 1) / 2)


@pytest.mark.gpu
@each_half
def test_half_precision_on_the_gpu_equals_float32(dtype):
    labels = torch.arange(160, device="cuda") % 10
    rounded = torch.randn(160, 2, device="cuda").to(dtype)
    assert_half_equals_float32(lambda e: OnlineTripletLoss(1.0, AllTripletSelector())(e, labels)[0], rounded)


# Batch-all, which forms no triplets, against loops that do

BATCH_ALL_LABELS = {
    "balanced": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "unbalanced": [7, -3, 7, 7, 40, -3, 7, 7, 40, 7],
    "singletons": [0, 0, 1, 2, 0, 3],
    "one_class": [5, 5, 5, 5],
    "all_distinct": [3, 1, 4, 5],
    "one": [2],
}
each_batch_all = pytest.mark.parametrize(
    ("squared", "both_directions", "average"),
    [(s, b, a) for s in (True, False) for b in (True, False) for a in ("active", "all")],
)
each_batch_all_labels = pytest.mark.parametrize("labels", BATCH_ALL_LABELS.values(), ids=BATCH_ALL_LABELS)


def naive_batch_all(embeddings, labels, margin, squared, both_directions, average):
    total, n_active, n_valid = (embeddings * 0).sum(), 0, 0
    for a in range(len(labels)):
        for p in range(len(labels)):
            for n in range(len(labels)):
                if labels[a] != labels[p] or a == p or labels[a] == labels[n] or (p < a and not both_directions):
                    continue
                d_ap = ((embeddings[a] - embeddings[p]) ** 2).sum()
                d_an = ((embeddings[a] - embeddings[n]) ** 2).sum()
                loss = d_ap - d_an + margin if squared else d_ap.sqrt() - d_an.sqrt() + margin
                n_valid += 1
                if loss > 0:
                    n_active += 1
                    total = total + loss
    return total / max(1, n_active if average == "active" else n_valid), n_active


@each_batch_all
@each_batch_all_labels
def test_batch_all_equals_loops(labels, squared, both_directions, average):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.randn(len(labels), 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for margin in (-0.5, 0.1, 1.0, 20.0):
            options = {"squared": squared, "both_directions": both_directions, "average": average}
            loss, count = BatchAllTripletLoss(margin, **options)(embeddings, torch.tensor(labels))
            expected, expected_count = naive_batch_all(embeddings, labels, margin, **options)
            assert int(count) == expected_count
            torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
            gradients = [torch.autograd.grad(value, embeddings)[0] for value in (loss, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@each_batch_all_labels
def test_batch_all_does_not_count_ties_at_the_hinge(labels):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.randint(0, 3, (len(labels), 2), generator=generator).float()
        loss, count = BatchAllTripletLoss(1.0)(embeddings, torch.tensor(labels))
        expected, expected_count = naive_batch_all(embeddings, labels, 1.0, True, True, "active")
        assert (loss.item(), int(count)) == (pytest.approx(float(expected)), expected_count)


@pytest.mark.parametrize("squared", [True, False])
def test_batch_all_equals_the_mean_over_all_triplets(squared):
    labels = torch.arange(40) % 7
    embeddings = torch.randn(40, 16, requires_grad=True)
    results = []
    for loss_fn in (
        BatchAllTripletLoss(1.0, squared=squared, both_directions=False, average="all"),
        OnlineTripletLoss(1.0, AllTripletSelector(), squared=squared),
    ):
        loss, count = loss_fn(embeddings, labels)
        results.append((loss, torch.autograd.grad(loss, embeddings)[0], count))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@each_batch_all
def test_batch_all_passes_gradcheck(squared, both_directions, average):
    embeddings = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2])
    loss_fn = BatchAllTripletLoss(0.7, squared=squared, both_directions=both_directions, average=average)
    assert torch.autograd.gradcheck(lambda x: loss_fn(x, labels)[0], embeddings)


@each_half
@pytest.mark.parametrize("scale", [1, 300])
def test_batch_all_in_half_precision_is_computed_in_float32(dtype, scale):
    labels = torch.arange(24) % 4
    half = (scale * torch.randn(24, 8)).to(dtype).requires_grad_()  # 300 squared overflows float16
    full = half.detach().float().requires_grad_()
    (loss, count), (expected, expected_count) = (BatchAllTripletLoss(1.0)(x, labels) for x in (half, full))
    assert (loss.dtype, int(count)) == (torch.float32, int(expected_count))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(half.grad.float(), full.grad, rtol=1e-2, atol=1e-3 * float(full.grad.abs().max()))


@pytest.mark.parametrize("squared", [True, False])
def test_batch_all_on_coincident_points_has_finite_gradients(squared):
    embeddings = torch.ones(6, 3).requires_grad_()
    loss, count = BatchAllTripletLoss(0.5, squared=squared)(embeddings, torch.tensor([0, 0, 0, 1, 1, 1]))
    loss.backward()
    assert (loss.item(), int(count)) == (0.5, 36)
    assert torch.equal(embeddings.grad, torch.zeros(6, 3))


@pytest.mark.parametrize("labels", [[], [0], [0, 0, 0], [0, 1, 2]])
def test_batch_all_without_triplets_is_zero_with_a_graph(labels):
    embeddings = torch.randn(len(labels), 2, requires_grad=True)
    loss, count = BatchAllTripletLoss(1.0)(embeddings, labels)
    loss.backward()
    assert (loss.item(), int(count)) == (0, 0)
    assert torch.equal(embeddings.grad, torch.zeros(len(labels), 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_batch_all_of_what_is_not_finite_is_nan(bad):
    embeddings = torch.randn(6, 2)
    embeddings[2, 1] = bad
    assert math.isnan(BatchAllTripletLoss(1.0)(embeddings, torch.arange(6) % 2)[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch 2.4 does so itself, as it compiles
def test_batch_all_compiles_to_one_graph():
    labels = torch.arange(12) % 3
    embeddings = torch.randn(12, 4, requires_grad=True)
    loss_fn = BatchAllTripletLoss(1.0)
    results = []
    for function in (loss_fn, torch.compile(loss_fn, fullgraph=True, backend="aot_eager")):
        loss, count = function(embeddings, labels)
        results.append((loss, torch.autograd.grad(loss, embeddings)[0], count))
    for plain, compiled in zip(*results):
        torch.testing.assert_close(plain, compiled)


def test_batch_all_refuses_wrong_arguments():
    with pytest.raises(ValueError, match="average"):
        BatchAllTripletLoss(1.0, average="mean")
    with pytest.raises(TypeError, match="TripletNet use TripletLoss"):
        BatchAllTripletLoss(1.0)(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2))


def test_batch_all_equals_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    peer = losses.TripletMarginLoss(0.2, distance=distances.LpDistance(normalize_embeddings=False, power=2))
    labels = torch.arange(60) % 6
    embeddings = torch.randn(60, 8, requires_grad=True)
    values = [BatchAllTripletLoss(0.2)(embeddings, labels)[0], peer(embeddings, labels)]
    gradients = [torch.autograd.grad(value, embeddings)[0] for value in values]
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


ON_THE_GPU = {
    "batch_all": lambda: BatchAllTripletLoss(1.0),
    "batch_all_plain": lambda: BatchAllTripletLoss(1.0, squared=False, both_directions=False, average="all"),
    **{name: lambda make=make: OnlineTripletLoss(1.0, make()) for name, make in TRIPLET_SELECTORS.items()},
    "soft": lambda: OnlineTripletLoss(0.0, AllTripletSelector(), soft_margin=True),
    **{f"pairs_{name}": lambda make=make: OnlineContrastiveLoss(1.0, make()) for name, make in PAIR_SELECTORS.items()},
}
DRAWN = ("random", "semihard", "pairs_balanced")


@pytest.mark.gpu
@pytest.mark.parametrize("with_references", [False, True])
@pytest.mark.parametrize("name", sorted(set(ON_THE_GPU) - {"function"}))
def test_no_loss_reads_a_value_of_the_gpu(gpu_unread, name, with_references):
    labels = torch.arange(64, device="cuda") % 8
    embeddings, reference = (torch.randn(64, 16, device="cuda", requires_grad=True) for _ in range(2))
    references = {"reference": reference, "reference_target": labels} if with_references else {}
    loss_fn = ON_THE_GPU[name]()
    with gpu_unread():
        result = loss_fn(embeddings, labels, **references)
        loss = result[0] if isinstance(result, tuple) else result
        loss.backward()
    on_cpu = {key: value.detach().cpu() for key, value in references.items()}
    expected = loss_fn(embeddings.detach().cpu().requires_grad_(), labels.cpu(), **on_cpu)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert torch.isfinite(embeddings.grad).all()
    if name not in DRAWN:
        torch.testing.assert_close(loss.detach().cpu(), expected.detach())


@pytest.mark.parametrize("name", sorted(set(ON_THE_GPU) - {"function", *DRAWN}))
@pytest.mark.parametrize("with_references", [False, True])
def test_losses_that_read_no_value_are_those_that_do(monkeypatch, name, with_references):
    # On a GPU all references are the columns: here too, by a comparison that says it may not read.
    labels = torch.arange(24) % 5
    embeddings, reference = torch.randn(2, 24, 3)
    references = {"reference": reference, "reference_target": labels.flip(0)} if with_references else {}
    loss_fn, results = ON_THE_GPU[name](), []
    for may_read in (True, False):
        compare = losses._Comparison
        monkeypatch.setattr(losses, "_Comparison", lambda *a, c=compare, r=may_read, **_: c(*a[:4], may_read=r))
        results.append(value_and_gradient(lambda x, y: loss_fn(x, y, **references), embeddings, labels))
        monkeypatch.undo()
    for read, unread in zip(*results):
        torch.testing.assert_close(read, unread)


# What all distances at once must not lose


def tight_clusters(spread):
    centres = torch.nn.functional.normalize(torch.randn(10, 2))
    return (centres.repeat_interleave(16, dim=0) + spread * torch.randn(160, 2)), torch.arange(10).repeat_interleave(16)


@pytest.mark.parametrize("spread", [1e-2, 1e-4])
@pytest.mark.parametrize("squared", [True, False])
def test_gradient_of_tight_clusters_is_exact(squared, spread):
    embeddings, labels = tight_clusters(spread)
    gradients = []
    for x in (embeddings.clone().requires_grad_(), embeddings.double().requires_grad_()):
        loss, _ = BatchAllTripletLoss(2.0, squared=squared)(x, labels)
        gradients.append(torch.autograd.grad(loss, x)[0].double())
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


def test_gradient_under_autocast_is_as_exact():
    embeddings, labels = torch.randn(40, 16), torch.arange(40) % 4
    gradients = []
    for enabled in (False, True):
        x = embeddings.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            BatchAllTripletLoss(1.0)(x, labels)[0].backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("squared", [True, False])
def test_batch_all_passes_gradgradcheck(squared):
    embeddings = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2])
    assert torch.autograd.gradgradcheck(lambda x: BatchAllTripletLoss(0.7, squared=squared)(x, labels)[0], embeddings)


def test_batch_all_takes_bool_labels():
    embeddings, labels = torch.randn(8, 3), torch.arange(8) % 2
    assert BatchAllTripletLoss(1.0)(embeddings, labels == 1)[0] == BatchAllTripletLoss(1.0)(embeddings, labels)[0]


# Which way is taken: a slower one would give the same numbers


class Recorder(TorchDispatchMode):
    """The first tensor that each operation returns, by the operation's name."""

    def __init__(self):
        super().__init__()
        self.results = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) else result
        self.results.setdefault(function.overloadpacket.__name__, []).append(first)
        return result


def test_batch_all_sorts_no_more_than_a_class_for_each_anchor():
    with Recorder() as recorder:
        BatchAllTripletLoss(1.0)(torch.randn(12, 2), torch.tensor([0] * 3 + [1] * 5 + [2] * 4))
    assert [tuple(result.shape) for result in recorder.results["sort"]] == [(12, 5)]


@pytest.mark.parametrize(("B", "n_triplets", "n_products"), [(9, 2, 0), (8, 2, 1), (8, 3, 1)])
def test_distances_of_fewer_pairs_than_a_sixteenth_are_computed_alone(B, n_triplets, n_products):
    loss_fn = OnlineTripletLoss(1.0, GivenTriplets([[0, 1, 2]] * n_triplets))
    with Recorder() as recorder:
        loss_fn(torch.randn(B, 2), torch.arange(B) % 2)  # two distances for each triplet, of B^2
    assert len(recorder.results.get("addmm", [])) == n_products
