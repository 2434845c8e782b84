"""Gradients of the online losses: on nasty data, second derivatives, torch.func, and what is kept for them."""

from itertools import pairwise

import pytest
import torch

from losses import BatchAllTripletLoss, ContrastiveLoss, OnlineContrastiveLoss, OnlineTripletLoss, TripletLoss
from utils import (
    AllPositivePairSelector,
    AllTripletSelector,
    BatchHardTripletSelector,
    FunctionNegativeTripletSelector,
    HardestNegativeTripletSelector,
    HardNegativePairSelector,
    RandomNegativeTripletSelector,
    SemihardNegativeTripletSelector,
    hardest_negative,
)

PAIR_SELECTORS = {
    "all": lambda: AllPositivePairSelector(balance=False),
    "balanced": AllPositivePairSelector,
    "hard": HardNegativePairSelector,
}
TRIPLET_SELECTORS = {
    "all": lambda margin, squared: AllTripletSelector(),
    "batch_hard": lambda margin, squared: BatchHardTripletSelector(),
    "hardest": lambda margin, squared: HardestNegativeTripletSelector(margin, squared=squared),
    "random": lambda margin, squared: RandomNegativeTripletSelector(margin, squared=squared),
    "semihard": lambda margin, squared: SemihardNegativeTripletSelector(margin, squared=squared),
    "function": lambda margin, squared: FunctionNegativeTripletSelector(margin, hardest_negative, squared=squared),
}


def contrastive(make):
    return lambda margin=1.0: OnlineContrastiveLoss(margin, make())


def triplet(make, squared=True, soft_margin=False):
    return lambda margin=1.0: OnlineTripletLoss(margin, make(margin, squared), squared=squared, soft_margin=soft_margin)


def batch_all(**options):
    return lambda margin=1.0: BatchAllTripletLoss(margin, **options)


PLAIN_LOSSES = {
    **{f"contrastive_{name}": contrastive(make) for name, make in PAIR_SELECTORS.items()},
    **{f"triplet_{name}_plain": triplet(make, squared=False) for name, make in TRIPLET_SELECTORS.items()},
    "batch_all_plain": batch_all(squared=False),
}
SQUARED_LOSSES = {
    **{f"triplet_{name}": triplet(make) for name, make in TRIPLET_SELECTORS.items()},
    "batch_all": batch_all(),
    "batch_all_average": batch_all(average="all"),
    "batch_all_one_direction": batch_all(both_directions=False),
}
SOFT_LOSSES = {
    "triplet_all_soft": triplet(TRIPLET_SELECTORS["all"], soft_margin=True),
    "triplet_hardest_soft": triplet(TRIPLET_SELECTORS["hardest"], soft_margin=True),
    "triplet_all_plain_soft": triplet(TRIPLET_SELECTORS["all"], squared=False, soft_margin=True),
}
LOSSES = {**PLAIN_LOSSES, **SQUARED_LOSSES, **SOFT_LOSSES}
DRAWING = ("balanced", "random", "semihard")
SURE_LOSSES = {name: make for name, make in LOSSES.items() if not any(one in name for one in DRAWING)}

each_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
each_hard_loss = pytest.mark.parametrize(
    "make", {**PLAIN_LOSSES, **SQUARED_LOSSES}.values(), ids={**PLAIN_LOSSES, **SQUARED_LOSSES}
)
each_squared_loss = pytest.mark.parametrize("make", SQUARED_LOSSES.values(), ids=SQUARED_LOSSES)
each_plain_loss = pytest.mark.parametrize("make", PLAIN_LOSSES.values(), ids=PLAIN_LOSSES)
with_and_without = pytest.mark.parametrize("with_references", [False, True], ids=["batch", "references"])


def loss_of(loss_fn, embeddings, labels, reference=None, reference_labels=None):
    """The loss alone, with the same draws at every call."""
    given = {} if reference is None else {"reference": reference, "reference_target": reference_labels}
    torch.manual_seed(0)
    result = loss_fn(embeddings, labels, **given)
    return result[0] if isinstance(result, tuple) else result


def indices_of(loss_fn, embeddings, labels, reference=None, reference_labels=None):
    """The pairs or triplets that a loss is over: those of its selector, with the same draws, or all."""
    given = {} if reference is None else {"reference": reference, "reference_labels": reference_labels}
    torch.manual_seed(0)
    if hasattr(loss_fn, "pair_selector"):
        return loss_fn.pair_selector.get_pairs(embeddings, labels, **given)
    selector = AllTripletSelector(both_directions=getattr(loss_fn, "both_directions", True))
    return getattr(loss_fn, "triplet_selector", selector).get_triplets(embeddings, labels, **given)


def naive_distance(x, y, squared):
    """Of paired rows, by their difference; 0 with a gradient of 0 where they coincide."""
    distances = (x - y).square().sum(dim=1)
    if squared:
        return distances
    is_zero = distances == 0
    return torch.where(is_zero, torch.ones_like(distances), distances).sqrt() * ~is_zero


def naive_loss(loss_fn, indices, x, y):
    """The loss over these pairs or triplets, as autograd differentiates it."""
    if hasattr(loss_fn, "pair_selector"):
        positive, negative = indices
        d_negative = naive_distance(x[negative[:, 0]], y[negative[:, 1]], squared=False)
        losses = [naive_distance(x[positive[:, 0]], y[positive[:, 1]], squared=True)]
        return torch.cat([*losses, (loss_fn.margin - d_negative).relu().square()]).mean()
    anchor, positive, negative = indices.T
    d_ap = naive_distance(x[anchor], y[positive], loss_fn.squared)
    d_an = naive_distance(x[anchor], y[negative], loss_fn.squared)
    violation = d_ap - d_an + loss_fn.margin
    losses = (1 + violation.exp()).log() if getattr(loss_fn, "soft_margin", False) else violation.relu()
    if getattr(loss_fn, "average", "all") == "active":
        return losses.sum() / (losses > 0).sum().clamp(min=1)
    return losses.mean()


def parts_of(points, labels, with_references):
    """The batch; or its first half as anchors, all of it as references, so that some are equal."""
    if not with_references:
        return [points], (labels,)
    n_anchors = len(points) // 2
    return [points[:n_anchors], points], (labels[:n_anchors], labels)


def assert_gradient_is_exact(loss_fn, points, labels, with_references, tolerance=1e-5):
    """In norm, against the gradient in float64 over what the selector has chosen."""
    parts, part_labels = parts_of(points, labels, with_references)
    arguments = [one for pair in zip(parts, part_labels) for one in pair]
    indices = indices_of(loss_fn, *arguments)
    exact = [x.double().requires_grad_() for x in parts]
    expected = naive_loss(loss_fn, indices, exact[0], exact[-1])
    given = [x.clone().requires_grad_() for x in parts]
    arguments[::2] = given
    loss = loss_of(loss_fn, *arguments)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, precise in zip(torch.autograd.grad(loss, given), torch.autograd.grad(expected, exact)):
        assert precise.norm() > 0
        assert (gradient.double() - precise).norm() <= tolerance * precise.norm()


# Exactness


@each_hard_loss
@with_and_without
def test_gradients_of_two_clusters_far_apart_are_exact(make, with_references):
    points = 0.1 * torch.randn(48, 4)
    points[24:, 0] += 1e4
    order = torch.randperm(48)
    for margin in (0.05, 1.0):
        assert_gradient_is_exact(make(margin), points[order], torch.arange(48)[order] // 6, with_references)
    # Classes that span both: a margin that decides no triplet by less than float32 resolves of such distances.
    margin = 1e6 if getattr(make(), "squared", False) else 100.0
    assert_gradient_is_exact(make(margin), points[order], torch.arange(48)[order] % 6, with_references)


@each_hard_loss
@with_and_without
def test_gradients_with_duplicates_are_exact(make, with_references):
    points, labels = torch.randn(12, 3).repeat(4, 1), torch.arange(48) % 5  # copies of one class and of others
    assert_gradient_is_exact(make(1.0), points, labels, with_references)


@each_hard_loss
@with_and_without
def test_gradients_at_any_scale_are_exact(make, with_references):
    points, labels = torch.randn(40, 3), torch.arange(40) % 5
    for scale in (1e-15, 1e-6, 1e5, 1e10):
        margin = scale**2 if getattr(make(), "squared", False) else scale
        assert_gradient_is_exact(make(margin), scale * points, labels, with_references)
        if scale < 1:
            assert_gradient_is_exact(make(1.0), scale * points, labels, with_references)


@each_squared_loss
@with_and_without
def test_gradients_of_points_whose_squares_underflow_are_exact(make, with_references):
    points, labels = 1e-20 * torch.randn(40, 3), torch.arange(40) % 5
    assert_gradient_is_exact(make(1.0), points, labels, with_references)


@each_plain_loss
@with_and_without
def test_gradients_of_near_points_are_exact(make, with_references):
    # In pairs a millionth apart, among points a unit apart: a negative's gradient is the direction of such a step.
    points, labels = torch.randn(20, 4).repeat_interleave(2, dim=0), torch.arange(40) % 5
    points += 1e-6 * torch.randn(40, 4)
    assert_gradient_is_exact(make(1.0), points, labels, with_references)


@each_hard_loss
@with_and_without
def test_gradients_far_from_the_origin_are_exact(make, with_references):
    points, labels = torch.randn(40, 4) + 1000, torch.arange(40) % 5
    assert_gradient_is_exact(make(1.0), points, labels, with_references)


@pytest.mark.parametrize("squared", [True, False], ids=["squared", "plain"])
@pytest.mark.parametrize("selector", [AllTripletSelector(), BatchHardTripletSelector()], ids=["all", "batch_hard"])
@with_and_without
def test_soft_gradients_of_separated_classes_are_exact(selector, squared, with_references):
    # Of violations near -16 the slope, 1e-7, is no difference of 1 and what float32 rounds to 1.
    loss_fn = OnlineTripletLoss(0.0, selector, squared=squared, soft_margin=True)
    labels = torch.arange(40) % 4
    points = 0.1 * torch.randn(40, 2)
    points[:, 0] += (4 if squared else 16) * labels
    assert_gradient_is_exact(loss_fn, points, labels, with_references, tolerance=1e-4)


@each_loss
@with_and_without
def test_gradients_of_a_large_batch_are_exact(make, with_references):
    # Classes of different sizes.
    points, labels = torch.randn(160, 8), (40 * torch.rand(160).square()).long()
    assert_gradient_is_exact(make(1.0), points, labels, with_references)


# What is kept for the backward pass


def saved_bytes(loss_fn, embeddings, labels, reference=None, reference_labels=None):
    """The storage that autograd keeps for the backward pass, each one counted once."""
    storages = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()  # kept, so that no other takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss_of(loss_fn, embeddings, labels, reference, reference_labels)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.slow
@each_loss
def test_what_autograd_keeps_is_linear_in_the_batch(make):
    D, K, n_bytes = 16, 8, []
    for B in (256, 512, 1024) if make in SOFT_LOSSES.values() else (256, 512, 1024, 2048):  # soft ones take seconds
        embeddings, labels = torch.randn(B, D, requires_grad=True), torch.arange(B) % (B // K)
        n_bytes.append(saved_bytes(make(0.1), embeddings, labels))
    assert n_bytes[-1] < B * 4 * B / 2  # well below one matrix of distances
    for smaller, larger in pairwise(n_bytes):
        assert larger <= 2.2 * smaller


@pytest.mark.slow
@each_loss
def test_what_autograd_keeps_is_linear_in_the_references(make):
    D, K, n_bytes = 16, 8, []
    for R in (512, 1024):
        embeddings, labels = torch.randn(R // 2, D, requires_grad=True), torch.arange(R // 2) % (R // K)
        reference, reference_labels = torch.randn(R, D, requires_grad=True), torch.arange(R) % (R // K)
        n_bytes.append(saved_bytes(make(0.1), embeddings, labels, reference, reference_labels))
    assert n_bytes[-1] < R / 2 * 4 * R / 2
    for smaller, larger in pairwise(n_bytes):
        assert larger <= 2.2 * smaller


# Second derivatives


@each_loss
@with_and_without
def test_hessians_equal_those_of_the_naive_loss(make, with_references):
    torch.manual_seed(1)
    loss_fn, labels, reference_labels = make(4.0), torch.tensor([0, 1, 0, 1, 2]), torch.tensor([1, 0, 2, 1])
    points = torch.randn(9 if with_references else 5, 2, dtype=torch.float64)  # the references behind the batch

    def arguments(z):
        return (z[:5], labels, z[5:], reference_labels) if with_references else (z, labels)

    def naive(z):
        return naive_loss(loss_fn, indices, z, z[5:] if with_references else z)

    indices = indices_of(loss_fn, *arguments(points))
    assert loss_of(loss_fn, *arguments(points)).item() == pytest.approx(naive(points).item())
    expected = torch.autograd.functional.hessian(naive, points)
    assert bool(expected.count_nonzero())
    hessian = torch.autograd.functional.hessian(lambda z: loss_of(loss_fn, *arguments(z)), points)
    torch.testing.assert_close(hessian, expected)


@each_loss
@with_and_without
def test_hessian_products_in_float32_are_those_of_float64(make, with_references):
    points, labels, results = torch.randn(20, 4), torch.arange(20) % 4, []
    direction = torch.randn(20, 4)
    for dtype in (torch.float32, torch.float64):
        x = points.to(dtype).requires_grad_()
        parts, part_labels = parts_of(x, labels, with_references)
        loss = loss_of(make(1.0), *(one for pair in zip(parts, part_labels) for one in pair))
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad((gradient * direction.to(dtype)).sum(), x)[0].double())
    assert results[1].norm() > 0
    assert (results[0] - results[1]).norm() <= 1e-4 * results[1].norm()


@each_loss
@with_and_without
def test_second_derivatives_are_finite_at_coincident_points(make, with_references):
    points = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.5, 0.0], [0.5, 0.0], [0.0, 0.5]], dtype=torch.float64)
    labels, x = torch.tensor([0, 0, 1, 1, 2, 2]), points.requires_grad_()
    parts, part_labels = parts_of(x, labels, with_references)
    loss = loss_of(make(1.0), *(one for pair in zip(parts, part_labels) for one in pair))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert bool(gradient.isfinite().all())
    penalty = gradient.square().sum()
    if penalty.requires_grad:
        (second,) = torch.autograd.grad(penalty, x)
        assert bool(second.isfinite().all())


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("soft_margin", [True, False])
def test_second_derivatives_of_offline_losses_are_finite_at_coincident_points(squared, soft_margin):
    points = torch.tensor([[0.3, 0.1], [0.5, 0.2], [0.3, 0.1]], dtype=torch.float64)
    x, y, z = (points.roll(i, 0).requires_grad_() for i in range(3))
    triplet_loss = TripletLoss(1.0, squared=squared, soft_margin=soft_margin)(x, y, z)
    contrastive_loss = ContrastiveLoss(1.0)(x, y, torch.tensor([0, 1, 0]))
    for loss in (triplet_loss, contrastive_loss):
        inputs = (x, y, z) if loss is triplet_loss else (x, y)
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), inputs)
        assert all(bool(gradient.isfinite().all()) for gradient in (*gradients, *second))


@each_loss
@with_and_without
def test_a_penalty_on_the_gradient_trains(make, with_references):
    # backward() through a gradient: what it adds to .grad is the sum of both derivatives.
    points, labels = torch.randn(10, 3, dtype=torch.float64), torch.arange(10) % 3
    x = points.clone().requires_grad_()
    parts, part_labels = parts_of(x, labels, with_references)
    arguments = [one for pair in zip(parts, part_labels) for one in pair]
    loss = loss_of(make(1.0), *arguments)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()
    y = points.clone().requires_grad_()
    parts, part_labels = parts_of(y, labels, with_references)
    indices = indices_of(make(1.0), *(one for pair in zip(parts, part_labels) for one in pair))
    expected = naive_loss(make(1.0), indices, parts[0], parts[-1])
    (gradient,) = torch.autograd.grad(expected, y, create_graph=True)
    (expected + gradient.square().sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)


@each_loss
def test_a_graph_may_be_used_twice(make):
    x, labels = torch.randn(10, 3, requires_grad=True), torch.arange(10) % 3
    loss = loss_of(make(1.0), x, labels)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, x)
    torch.testing.assert_close(second, 3 * first)


# torch.func


@each_loss
@with_and_without
def test_func_grad_equals_autograd(make, with_references):
    points, labels = torch.randn(10, 3), torch.arange(10) % 3
    given = (torch.randn(7, 3), torch.arange(7) % 4) if with_references else ()
    x = points.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(make(1.0), x, labels, *given), x)
    gradient = torch.func.grad(lambda z: loss_of(make(1.0), z, labels, *given))(points)
    torch.testing.assert_close(gradient, expected)
    gradient, value = torch.func.grad_and_value(lambda z: loss_of(make(1.0), z, labels, *given))(points)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(value, loss_of(make(1.0), points, labels, *given))


@each_loss
def test_func_grad_into_references_equals_autograd(make):
    points, labels, reference = torch.randn(10, 3), torch.arange(10) % 3, torch.randn(7, 3)
    reference_labels = torch.arange(7) % 4
    y = reference.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(make(1.0), points, labels, y, reference_labels), y)
    gradient = torch.func.grad(lambda z: loss_of(make(1.0), points, labels, z, reference_labels))(reference)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("make", [LOSSES[name] for name in LOSSES if "function" not in name])  # which read values
def test_func_grad_of_a_gradient_equals_autograd(make):
    points, labels = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 3

    def penalty(z):
        return torch.func.grad(lambda w: loss_of(make(1.0), w, labels))(z).square().sum()

    x = points.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(make(1.0), x, labels), x, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.square().sum(), x)
    torch.testing.assert_close(torch.func.grad(penalty)(points), expected)


@pytest.mark.parametrize("make", SURE_LOSSES.values(), ids=SURE_LOSSES)
@with_and_without
@pytest.mark.parametrize("of", [lambda f: f, torch.func.grad], ids=["value", "gradient"])
def test_vmap_is_right_or_says_no(make, with_references, of):
    stack, labels = torch.randn(3, 8, 3), torch.arange(8) % 3
    given = (torch.randn(7, 3), torch.arange(7) % 4) if with_references else ()
    function = of(lambda z: loss_of(make(1.0), z, labels, *given))
    expected = torch.stack([function(points) for points in stack])
    try:
        results, message = torch.func.vmap(function)(stack), ""
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        results, message = None, str(error)
    if results is None:
        assert "vmap" in message
    else:
        torch.testing.assert_close(results, expected)
