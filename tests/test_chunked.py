"""Tests of networks.Chunked against the whole batch, and against its chunks one after the other."""

import copy
import os
import pickle
import random
import subprocess
import sys
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from losses import BatchAllTripletLoss, ContrastiveLoss, OnlineContrastiveLoss, OnlineTripletLoss, TripletLoss
from networks import Chunked, ClassificationNet, EmbeddingNet, RandomAffine, SiameseNet, TripletNet
from utils import (
    AllPositivePairSelector,
    AllTripletSelector,
    BatchHardTripletSelector,
    HardNegativePairSelector,
    RandomNegativeTripletSelector,
)


def make_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def make_norm_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3))


def in_parts(net, x, size):
    """The naive way: chunks one after the other, all in memory."""
    return torch.cat([net(part) for part in x.split(size)])


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters()]


class Run(nn.Module):
    """A network that is a function of its input and one linear layer."""

    def __init__(self, function, n_in=5):
        super().__init__()
        self.function = function
        self.linear = nn.Linear(n_in, 3)

    def forward(self, *args, **kwargs):
        return self.function(self.linear, *args, **kwargs)


# --- gradients

LOSSES = {
    "batch-all": (1, BatchAllTripletLoss(1.0)),
    "all triplets": (1, OnlineTripletLoss(1.0, AllTripletSelector())),
    "random": (1, OnlineTripletLoss(1.0, RandomNegativeTripletSelector(1.0))),
    "batch-hard": (1, OnlineTripletLoss(1.0, BatchHardTripletSelector())),
    "all pairs": (1, OnlineContrastiveLoss(1.0, AllPositivePairSelector(balance=False))),
    "hard pairs": (1, OnlineContrastiveLoss(1.0, HardNegativePairSelector())),
    "contrastive": (2, ContrastiveLoss(1.0)),
    "triplet": (3, TripletLoss(1.0)),
}


@pytest.mark.parametrize("size", [1, 7, 10, 19, 20])
@pytest.mark.parametrize(("n_inputs", "loss_fn"), LOSSES.values(), ids=LOSSES)
def test_gradients_are_those_of_the_whole_batch(n_inputs, loss_fn, size):
    net = make_net()
    wrap = {1: lambda net: net, 2: SiameseNet, 3: TripletNet}[n_inputs]
    targets = {1: (torch.arange(20) % 4,), 2: (torch.arange(20) % 2,), 3: ()}[n_inputs]
    inputs = torch.randn(n_inputs, 20, 5)
    results = []
    for model in (wrap(net), Chunked(wrap(net), size), wrap(Chunked(net, size)), Chunked(Chunked(wrap(net), size), 9)):
        torch.manual_seed(0)
        outputs = model(*inputs)
        loss = loss_fn(*(outputs if n_inputs > 1 else [outputs]), *targets)
        results.append(gradients(net, loss[0] if isinstance(loss, tuple) else loss))
    for result in results[1:]:
        for ours, expected in zip(result, results[0]):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_a_classifier_and_its_embeddings_are_those_of_the_whole_batch():
    plain = ClassificationNet(EmbeddingNet(64), 10)
    inside = ClassificationNet(Chunked(EmbeddingNet(64), 4), 10)
    inside.load_state_dict(plain.state_dict())
    x, target = torch.rand(10, 1, 28, 28), torch.arange(10)
    expected = gradients(plain, nn.functional.nll_loss(plain(x), target))
    for model in (Chunked(plain, 4), inside):
        torch.testing.assert_close(model.get_embedding(x), plain.get_embedding(x))
        for ours, theirs in zip(gradients(model, nn.functional.nll_loss(model(x), target)), expected):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_get_embedding_is_in_chunks_and_that_of_the_network_inside():
    seen = []
    inner = EmbeddingNet(7)
    inner.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    for net in (ClassificationNet(inner, 10), nn.DataParallel(ClassificationNet(inner, 10)), inner):
        assert Chunked(net, 4).get_embedding(torch.rand(10, 1, 28, 28)).shape == (10, 7)
    assert seen == [4, 4, 2] * 3
    assert Chunked(nn.Linear(5, 3), 4).get_embedding(torch.rand(10, 5)).shape == (10, 3)


def test_backward_twice_and_second_derivatives():
    net, x = make_net(), torch.randn(10, 5, requires_grad=True)
    results = []
    for model in (net, Chunked(net, 4)):
        output = model(x)
        output.sum().backward(retain_graph=True)
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        results.append([gradient, *gradients(net, gradient.square().sum() + output.sum())])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_is_that_of_the_first_pass(dtype):
    net, x = EmbeddingNet(3), torch.rand(10, 1, 28, 28)
    results = []
    for function in (lambda x: in_parts(net, x, 4), Chunked(net, 4)):
        with torch.autocast("cpu", dtype):
            output = function(x)
        assert output.dtype == dtype
        results.append(gradients(net, output.float().square().sum()))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=1e-4)
    net.to(dtype)
    assert gradients(net, Chunked(net, 4)(x.to(dtype)).sum())[0].dtype == dtype


def test_frozen_parts_and_inputs_without_gradients():
    net, x = EmbeddingNet(3).requires_grad_(False), torch.rand(9, 1, 28, 28)
    model = Chunked(net, 4)
    assert not model(x).requires_grad
    model(x.requires_grad_()).sum().backward()
    assert x.grad.any()
    net.fc[4].requires_grad_(True)
    model(x.detach()).sum().backward()
    assert net.fc[4].weight.grad.any()
    assert net.fc[0].weight.grad is None


@pytest.mark.parametrize("as_input", [lambda x: x, lambda x: [x], lambda x: {"a": (x, 1)}])
def test_an_input_changed_in_place_is_noticed(as_input):
    def function(layer, data):
        return layer(data if torch.is_tensor(data) else data[0] if isinstance(data, list) else data["a"][0])

    x = torch.rand(10, 5)
    output = Chunked(Run(function), 4)(as_input(x))
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_the_graph_keeps_no_activations():
    net, x = EmbeddingNet(4), torch.rand(24, 1, 28, 28)
    known = {t.untyped_storage().data_ptr() for t in [x, *net.parameters()]}
    kept = []
    for model in (net, Chunked(net, 4)):
        sizes = {}

        def keep(t, sizes=sizes):
            if t.untyped_storage().data_ptr() not in known:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(x)
        kept.append(sum(sizes.values()))
    assert kept[0] > 24 * 32 * 24 * 24 * 4
    assert kept[1] < 0.001 * kept[0]


# --- the second pass


class Draws(nn.Module):
    """Draws from every kind of generator, and keeps what comes out."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(4)
        self.outputs = []

    def forward(self, x):
        factor = 1 + torch.rand(1) + torch.rand(1, generator=self.generator) + np.random.rand() + random.random()
        self.outputs.append(x * factor)
        return self.outputs[-1]


def states(module):
    return [
        torch.get_rng_state().tolist(),
        module.generator.get_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    ]


def test_both_passes_draw_the_same_and_the_states_are_those_after_one():
    draws = Draws()
    model = Chunked(nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 4), draws, nn.Linear(4, 2)), 5)
    output = model(torch.rand(12, 5))
    after = states(draws)
    output.square().sum().backward()
    assert states(draws) == after
    assert [len(x) for x in draws.outputs] == [5, 5, 2, 2, 5, 5]
    for first, second in zip(draws.outputs[:3], draws.outputs[:2:-1]):
        assert torch.equal(first, second)
    assert len({float(x.detach()[0, 0]) for x in draws.outputs[:3]}) == 3


@pytest.mark.parametrize("own_generator", [False, True])
def test_augmentation_and_dropout_train_as_chunks_one_after_the_other(own_generator):
    generator = torch.Generator() if own_generator else None
    net = nn.Sequential(RandomAffine(translate=1, degrees=90, generator=generator), EmbeddingNet(4, dropout=0.4))
    x, results = torch.rand(10, 1, 28, 28), []
    for function in (lambda x: in_parts(net, x, 4), Chunked(net, 4)):
        torch.manual_seed(3)
        if own_generator:
            generator.manual_seed(5)
        grads = gradients(net, function(x).square().sum())
        results.append([*grads, torch.get_rng_state(), *([generator.get_state()] if own_generator else [])])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


class Recurrent(nn.Module):
    """Puts another tensor in a buffer's place in each pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("state", torch.zeros(3))

    def forward(self, x):
        output = (self.linear(x) + self.state).tanh()
        self.state = output.detach().mean(dim=0)
        return output


class RecurrentInPlace(Recurrent):
    """Changes its buffer."""

    def forward(self, x):
        output = self.linear(x) + self.state
        self.state.copy_(output.detach().mean(dim=0))
        return output.tanh()


class Centred(nn.Module):
    """Finds its buffer's value in the first pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("centre", None)

    def forward(self, x):
        output = self.linear(x)
        if self.centre is None:
            self.centre = output.detach().mean(dim=0)
            return output.tanh().square()
        return (output - self.centre).tanh()


MAKE_NETS_WITH_BUFFERS = {
    "batch norm": make_norm_net,
    "batch norm of all batches": lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, momentum=None)),
    "frozen batch norm": lambda: make_norm_net().eval(),
    "spectral norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3)), nn.Tanh()),
    "recurrent": Recurrent,
    "recurrent in place": RecurrentInPlace,
    "centred": Centred,
}


@pytest.mark.parametrize("n_backward", [1, 2])
@pytest.mark.parametrize("make", MAKE_NETS_WITH_BUFFERS.values(), ids=MAKE_NETS_WITH_BUFFERS)
def test_buffers_are_those_of_chunks_one_after_the_other(make, n_backward):
    torch.manual_seed(2)
    net = make()
    twin = copy.deepcopy(net)
    x, results = torch.randn(11, 5), []
    for module, function in ((net, Chunked(net, 4)), (twin, lambda x: in_parts(twin, x, 4))):
        torch.manual_seed(0)
        for _ in range(2):
            loss = function(x).square().sum()
            for _ in range(n_backward):
                loss.backward(retain_graph=True)
        results.append([*(p.grad for p in module.parameters()), *module.buffers()])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_buffers_stay_the_tensors_they_are():
    net = make_norm_net()
    before = list(net.buffers())
    Chunked(net, 4)(torch.randn(10, 5)).sum().backward()
    assert all(x is y for x, y in zip(net.buffers(), before))
    assert net[1].num_batches_tracked == 3


def test_constant_buffers_are_copied_once_a_batch():
    net = make_net()
    net.register_buffer("table", torch.ones(1000))
    copied = []
    original = torch.Tensor.clone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", lambda x, **options: copied.append(x) or original(x, **options))
        Chunked(net, 2)(torch.randn(20, 5))
    assert sum(x is net.table for x in copied) == 1


def test_a_model_put_into_evaluation_mode_before_the_backward_pass():
    net = make_norm_net()
    x, results = torch.randn(10, 5), []
    for function in (lambda x: in_parts(net, x, 4), Chunked(net, 4)):
        torch.manual_seed(0)
        output = function(x)
        net.eval()
        results.append(gradients(net, output.square().sum()))
        assert not any(module.training for module in net.modules())
        net.train()
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = make_norm_net(), nn.Linear(3, 4)

    def forward(self, x):
        embeddings = self.body(x)
        return embeddings, self.head(embeddings)


@pytest.mark.parametrize(
    ("make", "inner_size", "n_passes"),
    [(make_norm_net, None, 3), (make_norm_net, 2, 12), (TwoHeads, None, 6), (TwoHeads, 2, 12)],
)
def test_a_siamese_net_inside_finds_out_in_the_first_chunk_what_its_network_returns(make, inner_size, n_passes):
    net = make()
    model = Chunked(SiameseNet(net if inner_size is None else Chunked(net, inner_size)), 4)
    outputs = model(*torch.randn(2, 12, 5))
    sum(x.square().sum() for part in outputs for x in (part if isinstance(part, tuple) else [part])).backward()
    assert all(p.grad is not None for p in net.parameters())
    norm = next(module for module in net.modules() if isinstance(module, nn.BatchNorm1d))
    assert norm.num_batches_tracked == n_passes


# --- inputs and outputs

Pair = namedtuple("Pair", ["first", "second"])


def test_inputs_may_be_nested_and_what_is_no_batch_is_passed_whole():
    seen = []

    def function(layer, batch, *, scale, debug=False, context_fn="name"):
        assert (scale.shape, debug, context_fn, batch["name"]) == ((3,), True, "other", ["a"] * 10)
        assert type(batch["pair"]) is Pair
        assert type(batch["pair"].second) is list
        seen.append([len(batch["x"]), len(batch["pair"].first), len(batch["pair"].second[0])])
        return layer(batch["x"]) * scale + batch["pair"].first[:, None] * batch["pair"].second[0][:, None]

    pair = Pair(torch.rand(10), [torch.rand(10), torch.tensor(3.0), None, "text"])
    batch = OrderedDict(x=torch.randn(10, 5), pair=pair, name=["a"] * 10)
    net = Run(function)
    options = {"scale": torch.rand(3), "debug": True, "context_fn": "other"}
    results = [gradients(net, model(batch, **options).square().sum()) for model in (net, Chunked(net, 4))]
    assert seen == [[10] * 3, [4] * 3, [4] * 3, [2] * 3, [2] * 3, [4] * 3, [4] * 3]
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected)


def test_tensors_given_by_name_alone_are_cut():
    net = Run(lambda layer, *, x: layer(x))
    x = torch.rand(10, 5)
    torch.testing.assert_close(Chunked(net, 4)(x=x), net(x=x))


def test_outputs_may_be_nested():
    net = Run(lambda layer, x: Pair(layer(x), {"a": [x, (x.sum(dim=1),)], "b": OrderedDict(c=x)}))
    x = torch.rand(10, 5)
    output = Chunked(net, 4)(x)
    assert type(output) is Pair
    assert type(output.second["b"]) is OrderedDict
    assert type(output.second["a"]) is list
    torch.testing.assert_close(output, net(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda layer, x: layer(x).sum(),
        lambda layer, x: layer(x).sum(dim=0),
        lambda layer, x: (layer(x), None),
        lambda layer, x: {"a": layer(x), "b": 3},
        lambda layer, x: list(layer(x)),
        lambda layer, x: layer(x)[1:],
    ],
)
def test_an_output_without_a_row_for_each_sample_is_an_error(function):
    with pytest.raises(ValueError, match="a row for each of the 4 samples of a chunk, got"):
        Chunked(Run(function), 4)(torch.rand(10, 5))


def test_a_batch_that_is_not_found_is_an_error_and_not_a_larger_output():
    net = Run(lambda layer, x, batch: layer(batch.x))
    with pytest.raises(ValueError, match="a row for each of the 4 samples of a chunk, got"):
        Chunked(net, 4)(torch.rand(10), SimpleNamespace(x=torch.rand(10, 5)))


@pytest.mark.parametrize("B", [0, 1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_any_number_of_samples_passes_in_chunks(B, mode):
    sizes = []
    net = EmbeddingNet(3)
    net.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    x = torch.rand(B, 1, 28, 28)
    with mode():
        torch.testing.assert_close(Chunked(net, 4)(x), net(x))
    assert sizes[:-1] == ([4] * (B // 4) + [B % 4] * (B % 4 > 0) or [0])


def test_inputs_without_a_tensor_pass_whole():
    net = Run(lambda layer, n: layer(torch.ones(n, 5)))
    assert Chunked(net, 4)(10).shape == (10, 3)
    packed = nn.utils.rnn.pack_sequence([torch.rand(3, 5), torch.rand(2, 5)])
    assert Chunked(nn.GRU(5, 2), 1)(packed)[1].shape == (1, 2, 2)


@pytest.mark.parametrize("size", [0, -3, 2.0, True, "4", None])
def test_a_size_that_is_no_positive_whole_number_is_an_error(size):
    with pytest.raises(ValueError, match=f"positive whole number, got {size!r}"):
        Chunked(make_net(), size)


def test_the_size_may_be_a_numpy_integer_and_is_printed():
    model = Chunked(make_net(), np.int64(3))
    assert model(torch.rand(7, 5)).shape == (7, 3)
    assert "size=3" in repr(model)


# --- state dicts and copies

WRAPPERS = {
    "alone": (lambda net: Chunked(net, 4), ""),
    "twice": (lambda net: Chunked(Chunked(net, 4), 3), ""),
    "Sequential": (lambda net: nn.Sequential(Chunked(net, 4)), "0."),
    "SiameseNet": (lambda net: SiameseNet(Chunked(Chunked(net, 3), 4)), "embedding_net."),
    "DataParallel": (lambda net: nn.DataParallel(Chunked(net, 4)), "module."),
    "AveragedModel": (lambda net: AveragedModel(Chunked(net, 4)), "module."),
    "compile": (lambda net: torch.compile(Chunked(net, 4), backend="eager"), "_orig_mod."),
}


@pytest.mark.parametrize(("wrap", "prefix"), WRAPPERS.values(), ids=WRAPPERS)
def test_keys_are_those_of_the_network(wrap, prefix, tmp_path):
    net, model = make_norm_net(), wrap(make_norm_net())
    others = {"n_averaged": torch.tensor(0)} if isinstance(model, AveragedModel) else {}
    weights = {prefix + name: x + 1 for name, x in net.state_dict().items()} | others
    torch.save(weights, tmp_path / "weights.pt")
    assert sorted(model.state_dict()) == sorted(weights)
    given = torch.load(tmp_path / "weights.pt", weights_only=True)
    result = model.load_state_dict(given)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert list(given) == list(weights)  # the caller's dict is left alone


@pytest.mark.parametrize(("wrap", "prefix"), WRAPPERS.values(), ids=WRAPPERS)
def test_what_does_not_fit_is_named_as_in_the_file(wrap, prefix):
    model = wrap(make_norm_net())
    weights = dict(model.state_dict())
    del weights[f"{prefix}3.bias"]
    weights[f"{prefix}3.net.scale"] = torch.zeros(1)
    result = model.load_state_dict(weights, strict=False)
    assert result.missing_keys == [f"{prefix}3.bias"]
    assert result.unexpected_keys == [f"{prefix}3.net.scale"]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{prefix}3.bias"'):
        model.load_state_dict(weights)
    weights = {**model.state_dict(), f"{prefix}3.bias": torch.zeros(9)}
    with pytest.raises(RuntimeError, match=f"size mismatch for {prefix}3.bias: "):
        model.load_state_dict(weights)


def test_keys_beside_a_chunked_part_are_left_alone():
    model = nn.ModuleDict({"a": Chunked(nn.Linear(2, 2), 4), "a_net": nn.Linear(2, 2), "net": nn.Linear(2, 2)})
    plain = nn.ModuleDict({name: nn.Linear(2, 2) for name in model})
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), assign=True)
    assert all(torch.equal(x, plain.state_dict()[name]) for name, x in model.state_dict().items())


def copied_by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, copied_by_pickle])
def test_copies_run_and_load_as_the_first(copied):
    layer = RandomAffine(translate=1, generator=torch.Generator().manual_seed(3))
    model = Chunked(nn.Sequential(layer, EmbeddingNet(3)), 4)
    twin, x = copied(model), torch.rand(9, 1, 28, 28)
    assert torch.equal(model(x), twin(x))
    nn.Sequential(twin).load_state_dict({f"0.{name}": value + 1 for name, value in model.state_dict().items()})
    assert all(torch.equal(x, y + 1) for x, y in zip(twin.state_dict().values(), model.state_dict().values()))
    twin(x).sum().backward()
    assert next(model.parameters()).grad is None


# --- compiled, and on several processes


@pytest.mark.slow
@pytest.mark.parametrize("is_inside", [False, True])
def test_compiled_networks_train_as_the_network(is_inside):
    net = make_net()
    torch._dynamo.reset()
    model = Chunked(torch.compile(net, backend="aot_eager"), 4)
    if not is_inside:
        model = torch.compile(nn.Sequential(Chunked(net, 4), nn.Tanh()), backend="aot_eager")
    for B in (10, 7, 3):
        x = torch.randn(B, 5)
        expected = gradients(net, (net(x) if is_inside else net(x).tanh()).square().sum())
        for ours, theirs in zip(gradients(net, model(x).square().sum()), expected):
            torch.testing.assert_close(ours, theirs)


WORK = """if True:
    import sys
    import torch
    from torch import distributed, nn
    from torch.nn.parallel import DistributedDataParallel
    from networks import Chunked, SiameseNet
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))[10 * rank :][:10]
    results = []
    wraps = [lambda net: Chunked(net, 3)]
    wraps += [lambda net: SiameseNet(Chunked(net, 3)), lambda net: Chunked(SiameseNet(net), 3)]
    for wrap in wraps:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        model = DistributedDataParallel(wrap(net))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(5):
            outputs = model(x) if isinstance(model.module, Chunked) and model.module.net is net else model(x[:5], x[5:])
            loss = (outputs if torch.is_tensor(outputs) else torch.cat(outputs)).square().sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.load_state_dict({name: x for name, x in model.state_dict().items()})
        results.append([list(model.state_dict()), [p.detach() for p in net.parameters()]])
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORK]
    runs = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        optimizer.zero_grad()
        net(x).square().sum(dim=1).mean().backward()
        optimizer.step()
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for (names, weights), prefix in zip(results, ("module.", "module.embedding_net.", "module.embedding_net.")):
            assert names == [prefix + name for name in net.state_dict()]
            for ours, expected in zip(weights, net.parameters()):
                torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_draws_and_precision_on_the_gpu_are_those_of_the_first_pass(dtype):
    generator = torch.Generator("cuda")
    layers = RandomAffine(translate=2, generator=generator), EmbeddingNet(16, dropout=0.5)
    net = nn.Sequential(*layers).cuda()
    x, results = torch.rand(20, 1, 28, 28, device="cuda"), []
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    for function in (lambda x: in_parts(net, x, 6), Chunked(net, 6), lambda x: Chunked(net, 6)(input=x)):
        torch.manual_seed(0)
        generator.manual_seed(1)
        with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
            output = function(x)
        grads = gradients(net, scaler.scale(output.float().square().mean()))
        results.append([*grads, torch.cuda.get_rng_state(), generator.get_state()])
    for result in results[1:]:
        for ours, expected in zip(result, results[0]):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_weights_changed_before_the_backward_pass_are_noticed():
    net = Chunked(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), 2)
    output = net(torch.randn(5, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    with pytest.raises(RuntimeError, match="a parameter was changed in place"):
        output.sum().backward()
