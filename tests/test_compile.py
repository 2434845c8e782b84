"""torch.compile of every loss with every selector: one graph, for batches of changing size, the same numbers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from losses import BatchAllTripletLoss, OnlineContrastiveLoss, OnlineTripletLoss
from utils import (
    AllPositivePairSelector,
    AllTripletSelector,
    BatchHardTripletSelector,
    HardestNegativeTripletSelector,
    HardNegativePairSelector,
    RandomNegativeTripletSelector,
    SemihardNegativeTripletSelector,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),  # torch 2.4 does so itself, as it compiles
]

MARGIN = 5.0
LOSSES = {
    "contrastive_all": OnlineContrastiveLoss(2.0, AllPositivePairSelector(balance=False)),
    "contrastive_hard": OnlineContrastiveLoss(2.0, HardNegativePairSelector()),
    "triplet_all": OnlineTripletLoss(MARGIN, AllTripletSelector()),
    "triplet_batch_hard": OnlineTripletLoss(MARGIN, BatchHardTripletSelector(), squared=False, soft_margin=True),
    "triplet_hardest": OnlineTripletLoss(MARGIN, HardestNegativeTripletSelector(MARGIN)),
    "batch_all": BatchAllTripletLoss(MARGIN),
}
DRAWING = {
    "contrastive_balanced": OnlineContrastiveLoss(4.0, AllPositivePairSelector()),
    "triplet_random": OnlineTripletLoss(MARGIN, RandomNegativeTripletSelector(MARGIN)),
    "triplet_semihard": OnlineTripletLoss(MARGIN, SemihardNegativeTripletSelector(MARGIN)),
}

with_and_without = pytest.mark.parametrize("with_references", [False, True], ids=["batch", "references"])


@pytest.fixture(autouse=True)
def compiled_anew():
    """What is compiled in one test does not count in the others, which compile the same methods."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_whole(loss_fn, with_references):
    """Compiled, and the backend, which counts the graphs: others after the first call would be for other sizes."""
    # With references the graph is traced but run as it is, which takes a fifth of the time.
    backend = CompileCounterWithBackend("eager" if with_references else "aot_eager")
    return torch.compile(loss_fn, fullgraph=True, dynamic=True, backend=backend), backend


def assert_one_graph(after_the_first, after_the_last):
    if [int(x) for x in torch.__version__.split(".")[:2]] >= [2, 6]:  # torch 2.4 compiles anew for each size
        assert after_the_first == after_the_last


def ring_batch(B):
    """Class 0 on a circle, the others, which no draw tells apart, at its centre: all negatives of 0 are as far."""
    angles = torch.rand(B) * 6.28
    labels = torch.arange(B) % 2
    points = 3 * torch.stack((angles.cos(), angles.sin()), dim=1) * (labels == 0)[:, None]
    return points, labels


def normal_batch(B):
    return torch.randn(B, 2), torch.arange(B) % 3


def results_of(loss_fn, points, labels, reference=None, reference_labels=None):
    """Loss, gradients and, where there is one, the count."""
    inputs, given = [points.clone().requires_grad_()], {}
    if reference is not None:
        inputs.append(reference.clone().requires_grad_())
        given = {"reference": inputs[1], "reference_target": reference_labels}
    result = loss_fn(inputs[0], labels, **given)
    loss, *count = result if isinstance(result, tuple) else (result,)
    return loss.detach(), torch.autograd.grad(loss, inputs), count


@pytest.mark.parametrize("loss_fn", LOSSES.values(), ids=LOSSES)
@with_and_without
def test_losses_compile_to_one_graph_for_batches_of_any_size(loss_fn, with_references):
    compiled, backend = compile_whole(loss_fn, with_references)
    n_graphs = []
    for B in (12, 20, 7):
        references = normal_batch(B + 3) if with_references else ()
        batch = (*normal_batch(B), *references)
        torch.testing.assert_close(results_of(compiled, *batch), results_of(loss_fn, *batch))
        n_graphs.append(backend.frame_count)
    assert_one_graph(n_graphs[0], n_graphs[-1])


@pytest.mark.parametrize("loss_fn", DRAWING.values(), ids=DRAWING)
@with_and_without
def test_drawing_losses_compile_to_one_graph_for_batches_of_any_size(loss_fn, with_references):
    compiled, backend = compile_whole(loss_fn, with_references)
    n_graphs = []
    for B in (12, 20, 7):
        points, labels = ring_batch(B)
        references = ring_batch(B + 3) if with_references else ()
        loss, gradients, count = results_of(compiled, points, labels, *references)
        n_graphs.append(backend.frame_count)
        expected, expected_gradients, expected_count = results_of(loss_fn, points, labels, *references)
        assert loss > 0
        torch.testing.assert_close((loss, count), (expected, expected_count))
        if isinstance(loss_fn, OnlineContrastiveLoss):
            continue  # of which points of class 0 the negative pairs are is chance
        for one, other, classes in zip(gradients, expected_gradients, (labels, *references[1:])):
            is_drawn = classes == 1  # which of these, at the centre, is chance: what they get together is not
            torch.testing.assert_close(one[~is_drawn], other[~is_drawn])
            torch.testing.assert_close(one[is_drawn].sum(dim=0), other[is_drawn].sum(dim=0))
    batch = (*normal_batch(24), *(normal_batch(24) if with_references else ()))
    assert len({results_of(compiled, *batch)[0].item() for _ in range(4)}) > 1
    assert_one_graph(n_graphs[0], backend.frame_count)


def test_the_default_compiler_takes_the_hardest_negatives_among_references():
    loss_fn = OnlineTripletLoss(1.0, HardestNegativeTripletSelector(1.0))
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True)
    for B in (12, 20):
        batch = (*normal_batch(B), *normal_batch(B + 3))
        torch.testing.assert_close(results_of(compiled, *batch), results_of(loss_fn, *batch))
