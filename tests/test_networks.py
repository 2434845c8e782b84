"""Tests of networks.py, against outputs of the original network and against the network plainly written."""

import copy
import io
import math
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

import networks
from networks import (
    Chunked,
    ClassificationNet,
    ConvNet4,
    EmbeddingNet,
    EmbeddingNetL2,
    RandomAffine,
    SiameseNet,
    TripletNet,
)

GOLDEN = Path(__file__).parent / "golden" / "networks_11.npz"
EMBEDDING_NET_NAMES = [
    *("convnet.0.weight", "convnet.0.bias", "convnet.1.weight"),
    *("convnet.3.weight", "convnet.3.bias", "convnet.4.weight"),
    *("fc.0.weight", "fc.0.bias", "fc.1.weight", "fc.2.weight", "fc.2.bias", "fc.3.weight", "fc.4.weight", "fc.4.bias"),
]
both_embedding_nets = pytest.mark.parametrize("net_class", [EmbeddingNet, EmbeddingNetL2])


class PlainNet(nn.Module):
    """The network in the original's order, with nothing done to make it fast."""

    def __init__(self):
        super().__init__()
        self.convnet = nn.Sequential(
            *(nn.Conv2d(1, 32, 5), nn.PReLU(), nn.MaxPool2d(2)), *(nn.Conv2d(32, 64, 5), nn.PReLU(), nn.MaxPool2d(2))
        )
        self.fc = nn.Sequential(
            *(nn.Linear(1024, 256), nn.PReLU()), *(nn.Linear(256, 256), nn.PReLU()), nn.Linear(256, 2)
        )

    def forward(self, x):
        return self.fc(self.convnet(x).flatten(1))


def normed_net():
    """A small network with batch norm, which sees how often and on what it is run."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def set_to_formula(model):
    """Weights as those of the golden outputs."""
    state = model.state_dict()
    for i, tensor in enumerate(state.values()):
        n, scale = tensor.numel(), 1.7 / np.sqrt(max(1, tensor.numel() / tensor.shape[0]))
        values = np.sin(np.arange(n, dtype=np.float64) * (0.37 + 0.01 * i)) * scale
        tensor.copy_(torch.tensor(values, dtype=torch.float32).reshape(tensor.shape))
    model.load_state_dict(state)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# --- EmbeddingNet


def test_outputs_are_those_of_the_original():
    golden = {name: torch.tensor(array) for name, array in np.load(GOLDEN).items()}
    model = ClassificationNet(EmbeddingNet(), 10)
    set_to_formula(model)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(model.embedding_net(golden["input"]), golden["embedding"], **close)
    torch.testing.assert_close(model(golden["input"]), golden["scores"], **close)
    torch.testing.assert_close(model.get_embedding(golden["input"]), golden["class_embedding"], **close)


@both_embedding_nets
def test_parameter_names_are_those_of_the_original(net_class):
    assert list(net_class().state_dict()) == EMBEDDING_NET_NAMES


def test_wrapper_parameter_names_are_those_of_the_original():
    inner = [f"embedding_net.{name}" for name in EMBEDDING_NET_NAMES]
    classifier = ClassificationNet(EmbeddingNet(), 10).state_dict()
    assert list(classifier) == [*inner, "nonlinear.weight", "fc1.weight", "fc1.bias"]
    assert list(SiameseNet(EmbeddingNet()).state_dict()) == inner
    assert list(TripletNet(EmbeddingNet()).state_dict()) == inner


def test_saved_weights_of_the_plain_network_load(tmp_path):
    plain, net = PlainNet(), EmbeddingNet()
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    net.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True))
    x = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(net(x), plain(x))


@pytest.mark.parametrize("slope", [0.0, 0.25, -0.1, 1.5])
def test_outputs_and_gradients_equal_the_plain_network(slope):
    torch.manual_seed(4)
    # In float64 rounding moves no maximum from one pixel to another.
    plain, net = PlainNet().double(), EmbeddingNet().double()
    for layer in plain.modules():
        if isinstance(layer, nn.PReLU):
            nn.init.constant_(layer.weight, slope)
    net.load_state_dict(plain.state_dict())

    results = []
    for model in (plain, net):
        x = torch.randn(6, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        output = model(x)
        output.square().sum().backward()
        results.append({"output": output, "input": x.grad, **{n: p.grad for n, p in model.named_parameters()}})
    for name, expected in results[0].items():
        difference = (results[1][name] - expected).abs().max()
        assert difference <= 1e-9 * expected.abs().max(), name


@both_embedding_nets
@pytest.mark.parametrize(("height", "width"), [(28, 28), (29, 28), (28, 31), (32, 32), (33, 47), (64, 64), (28, 90)])
def test_any_image_size_from_28_embeds(net_class, height, width):
    assert net_class()(torch.rand(2, 1, height, width)).shape == (2, 2)


def test_all_of_a_larger_image_counts():
    net = EmbeddingNet()
    image = torch.rand(1, 1, 64, 48)
    for top in (0, 16, 32, 48):
        for left in (0, 16, 32):
            changed = image.clone()
            changed[:, :, top : top + 16, left : left + 16] *= -3
            assert not torch.allclose(net(changed), net(image))


@both_embedding_nets
def test_channels_and_embedding_dim_can_be_chosen(net_class):
    net = net_class(embedding_dim=64, in_channels=3)
    assert net.embedding_dim == 64
    assert net(torch.rand(5, 3, 40, 40)).shape == (5, 64)
    assert net_class(7)(torch.rand(5, 1, 28, 28)).shape == (5, 7)


def test_memory_format_does_not_change_the_embedding():
    net = EmbeddingNet(in_channels=3)
    x = torch.rand(4, 3, 30, 36)
    channels_last = x.to(memory_format=torch.channels_last)
    assert channels_last.stride() != x.stride()
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    torch.testing.assert_close(net(channels_last), net(x))
    torch.testing.assert_close(net(strided), net(x))


@both_embedding_nets
@pytest.mark.parametrize(
    "shape", [(2, 1, 27, 28), (2, 1, 28, 27), (2, 3, 28, 28), (1, 28, 28), (2, 784), (2, 1, 1, 28, 28)]
)
def test_other_shapes_are_errors(net_class, shape):
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 1, H, W\).*got \(" + f"{shape[0]}, "):
        net_class()(torch.rand(shape))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [(5, 5), (6, 7), (7, 9), (8, 8), (13, 10), (18, 4)], ids=str)
def test_deterministic_pool_equals_the_adaptive_one(size, deterministic):
    x = torch.randn(3, 8, *size).round().requires_grad_()  # rounded, so that there are ties
    weights = torch.randn(3, 8, 4, 4)
    expected = functional.adaptive_max_pool2d(x, 4)
    result = networks._max_pool_to_4x4(x)
    assert torch.equal(result, expected)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (result, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("size", [(32, 32), (45, 48)], ids=str)
def test_deterministic_passes_of_larger_images_take_no_adaptive_pool(size, deterministic, monkeypatch):
    net, x = EmbeddingNet(), torch.rand(2, 1, *size)
    torch.use_deterministic_algorithms(False)
    expected = net(x)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(functional, "adaptive_max_pool2d", None)
    assert torch.equal(net(x), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [28, 45, 48])
def test_any_image_size_trains_deterministically_on_the_gpu(size):
    code = f"""if True:
        import torch
        from networks import ConvNet4, EmbeddingNet, RandomAffine, SiameseNet
        torch.use_deterministic_algorithms(True)
        for net in (EmbeddingNet(4), ConvNet4(4)):
            model = SiameseNet(torch.nn.Sequential(RandomAffine(translate=1, degrees=10), net)).cuda()
            a, b = model(*torch.rand(2, 4, 1, {size}, {size}, device="cuda"))
            (a - b).square().sum().backward()
    """
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_hooks_on_convnet_fire():
    net = EmbeddingNet()
    outputs = []
    net.convnet.register_forward_hook(lambda module, args, output: outputs.append(output))
    net(torch.rand(2, 1, 28, 28))
    assert [tuple(output.shape) for output in outputs] == [(2, 64, 4, 4)]


def test_every_layer_of_convnet_runs():
    net = EmbeddingNet()
    calls = [count_calls(layer) for layer in net.convnet]
    net(torch.rand(2, 1, 28, 28))
    assert calls == [[1]] * 6


def test_layer_appended_to_convnet_runs():
    net = EmbeddingNet()
    net.convnet.append(nn.Threshold(1e9, 3.0))
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(net(x), net.fc(torch.full((2, 1024), 3.0)))


# --- EmbeddingNetL2


def test_l2_rows_are_those_of_the_plain_net_at_norm_one():
    net = EmbeddingNetL2(embedding_dim=16)
    plain = EmbeddingNet(embedding_dim=16)
    plain.load_state_dict(net.state_dict())
    x = torch.rand(8, 1, 28, 28)
    embeddings, raw = net(x), plain(x)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(embeddings * raw.norm(dim=1, keepdim=True), raw)


def test_l2_trains():
    net = EmbeddingNetL2(embedding_dim=8)
    x, aim = torch.rand(8, 1, 28, 28), functional.normalize(torch.randn(1, 8), dim=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = (net(x) - aim).square().sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())
        assert all(p.grad.any() for p in net.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_l2_of_a_zero_embedding_is_zero(dtype):
    net = EmbeddingNetL2()
    nn.init.zeros_(net.fc[4].weight)
    nn.init.zeros_(net.fc[4].bias)
    embeddings = net.to(dtype)(torch.rand(4, 1, 28, 28, dtype=dtype))
    assert embeddings.dtype == dtype
    assert torch.equal(embeddings, torch.zeros(4, 2, dtype=dtype))


def test_l2_of_a_zero_embedding_has_finite_gradient():
    net = EmbeddingNetL2()
    nn.init.zeros_(net.fc[4].weight)
    nn.init.zeros_(net.fc[4].bias)
    net(torch.rand(4, 1, 28, 28)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


# --- ClassificationNet


def test_classifier_is_prelu_dense_log_softmax():
    net = ClassificationNet(nn.Linear(3, 4), 5)
    nn.init.constant_(net.nonlinear.weight, 0.1)
    x = torch.randn(6, 3)
    raw = x @ net.embedding_net.weight.T + net.embedding_net.bias
    embedding = torch.where(raw > 0, raw, 0.1 * raw)
    scores = embedding @ net.fc1.weight.T + net.fc1.bias
    torch.testing.assert_close(net.get_embedding(x), embedding)
    torch.testing.assert_close(net(x), scores - scores.exp().sum(dim=1, keepdim=True).log())


def flat_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 20), nn.ReLU(), nn.Linear(20, 12))


@pytest.mark.parametrize(
    ("make_net", "embedding_dim"),
    [
        (lambda: EmbeddingNet(embedding_dim=64, in_channels=3), 64),
        (lambda: EmbeddingNetL2(embedding_dim=3, in_channels=3), 3),
        (flat_net, 12),
        (lambda: resnet18(weights=None), 1000),
    ],
    ids=["EmbeddingNet", "EmbeddingNetL2", "Sequential", "resnet18"],
)
def test_classifier_takes_any_net(make_net, embedding_dim):
    net = ClassificationNet(make_net(), 10).eval()
    x = torch.rand(2, 3, 32, 32)
    assert net.get_embedding(x).shape == (2, embedding_dim)
    torch.testing.assert_close(net(x).exp().sum(dim=1), torch.ones(2))
    assert net(x).shape == (2, 10)


def test_classifier_takes_the_embedding_dim_told():
    net = ClassificationNet(nn.Sequential(nn.Linear(3, 9), nn.Unflatten(1, (3, 3)), nn.Flatten()), 4, embedding_dim=9)
    assert net(torch.rand(2, 3)).shape == (2, 4)
    pooled = nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert ClassificationNet(pooled, 4, embedding_dim=6)(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    told = nn.Linear(3, 9)
    told.embedding_dim = 8
    assert ClassificationNet(told, 4, embedding_dim=9).fc1.in_features == 9
    assert ClassificationNet(told, 4).fc1.in_features == 8


def test_classifier_of_unknown_embedding_dim_is_an_error():
    with pytest.raises(ValueError, match="embedding_dim=D"):
        ClassificationNet(nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten()), 4)


# --- SiameseNet, TripletNet


@pytest.mark.parametrize(("wrapper", "n_inputs"), [(SiameseNet, 2), (TripletNet, 3)])
def test_wrappers_embed_each_input_with_shared_weights(wrapper, n_inputs):
    net = EmbeddingNet()
    inputs = torch.rand(n_inputs, 4, 1, 28, 28)
    outputs = wrapper(net)(*inputs)
    assert isinstance(outputs, tuple)
    assert len(outputs) == n_inputs
    for x, output in zip(inputs, outputs):
        torch.testing.assert_close(output, net(x))


@pytest.mark.parametrize(("wrapper", "sizes"), [(SiameseNet, (5, 2)), (TripletNet, (1, 4, 2))])
def test_wrappers_pass_the_inputs_once_and_together(wrapper, sizes):
    net, reference = normed_net(), normed_net()
    inputs = [torch.randn(size, 3) + i for i, size in enumerate(sizes)]
    expected = reference(torch.cat(inputs)).split(sizes)
    calls = count_calls(net)
    model = wrapper(net)
    outputs = model(*inputs)
    assert calls == [1]
    assert [len(output) for output in outputs] == list(sizes)
    for output, of_reference in zip(outputs, expected):
        torch.testing.assert_close(output, of_reference)
    assert net[1].num_batches_tracked == 1
    torch.testing.assert_close(net[1].running_mean, reference[1].running_mean)
    torch.testing.assert_close(net[1].running_var, reference[1].running_var)
    model(*inputs)
    assert calls == [1, 1]


class Noisy(nn.Module):
    """Batch norm, dropout and draws from every kind of generator, then `finish(self, x)`; inputs are read by `read`."""

    def __init__(self, finish=lambda self, x: x, read=lambda self, x: x, **layers):
        super().__init__()
        self.finish, self.read = finish, read
        self.layers = nn.ModuleDict(layers)
        self.norm, self.dropout = nn.BatchNorm1d(5), nn.Dropout(0.3)
        self.generator = torch.Generator().manual_seed(2)
        self.n_calls = 0

    def forward(self, x):
        self.n_calls += 1
        x = self.dropout(self.norm(self.read(self, x)))  # (B, 5)
        return self.finish(self, x * torch.rand(1, generator=self.generator) * np.random.rand() * random.random())


def traces(net):
    """All that a pass changes: random states and buffers."""
    numbers = torch.get_rng_state(), net.generator.get_state(), np.random.get_state()[1], random.getstate()[1]
    return [*map(np.asarray, numbers), *(buffer.clone().numpy() for buffer in net.buffers())]


def leaves(outputs):
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [x for part in outputs for x in leaves(part)] if isinstance(outputs, (tuple, list)) else [outputs]


def assert_as_one_by_one(net, *inputs, n_superfluous, wrapper=SiameseNet):
    """Outputs and traces are those of a call for each input, twice over; `n_superfluous` joint passes were in vain."""
    twin = copy.deepcopy(net)
    model = wrapper(twin)
    results = []
    for function, called in ((lambda *xs: tuple(net(x) for x in xs), net), (model, twin)):
        for set_seed in (torch.manual_seed, np.random.seed, random.seed):
            set_seed(0)
        results.append([(function(*inputs), traces(called)) for _ in range(2)])
    for (expected, expected_traces), (outputs, found_traces) in zip(*results):
        assert isinstance(outputs, tuple)
        assert len(leaves(outputs)) == len(leaves(expected))
        assert all(torch.equal(x, y) for x, y in zip(leaves(outputs), leaves(expected)))
        assert all(np.array_equal(x, y) for x, y in zip(found_traces, expected_traces))
    assert twin.n_calls == net.n_calls + n_superfluous


def of_list(self, x):
    return torch.stack(list(x))


def last_state(self, x):
    return self.layers["gru"](x)[1][0]  # (L, B, D) or PackedSequence to (B, 5)


UNLIKE_INPUTS = {
    "lists": (of_list, lambda n: list(torch.rand(n, 5))),
    "dicts": (lambda self, x: x["a"], lambda n: {"a": torch.rand(n, 5)}),
    "objects": (lambda self, x: x.x, lambda n: type("Graph", (), {"x": torch.rand(n, 5)})()),
    "sparse": (lambda self, x: x.to_dense(), lambda n: torch.rand(n, 5).to_sparse()),
    "packed": (last_state, lambda n: pack_sequence([torch.rand(n, 5), torch.rand(2, 5)])),
    "sizes": (lambda self, x: x.mean(dim=(2, 3)), lambda n: torch.rand(3, 5, n, n)),
    "dtypes": (lambda self, x: x.float(), lambda n: torch.rand(3, 5).to([torch.float32, torch.float64][n % 2])),
    "nested": (
        lambda self, x: torch.stack([part.mean(dim=0) for part in x.unbind()]),
        lambda n: torch.nested.nested_tensor([torch.rand(n, 5), torch.rand(2, 5)], layout=torch.jagged),
    ),
}


@pytest.mark.parametrize("wrapper", [SiameseNet, TripletNet])
@pytest.mark.parametrize(("read", "make_input"), UNLIKE_INPUTS.values(), ids=UNLIKE_INPUTS)
def test_inputs_that_cannot_be_put_together_pass_one_by_one(read, make_input, wrapper):
    inputs = [make_input(n) for n in (4, 3, 6)[: 2 if wrapper is SiameseNet else 3]]
    net = Noisy(read=read, gru=nn.GRU(5, 5))
    assert_as_one_by_one(net, *inputs, n_superfluous=0, wrapper=wrapper)
    assert wrapper(net).get_embedding(inputs[0]).shape[1] == 5


OTHER_OUTPUTS = {
    "two": lambda self, x: (x, 2 * x),
    "dict": lambda self, x: {"a": x, "b": x.sum(dim=1)},
    "4-D": lambda self, x: x[:, :, None, None],
    "1-D": lambda self, x: x.sum(dim=1),
    "of the batch": lambda self, x: x.mean(dim=0, keepdim=True),
}


@pytest.mark.parametrize("wrapper", [SiameseNet, TripletNet])
@pytest.mark.parametrize("finish", OTHER_OUTPUTS.values(), ids=OTHER_OUTPUTS)
def test_a_network_of_another_output_runs_one_by_one_after_one_try_without_trace(finish, wrapper):
    inputs = torch.rand(2 if wrapper is SiameseNet else 3, 4, 5)
    assert_as_one_by_one(Noisy(finish), *inputs, n_superfluous=1, wrapper=wrapper)


@pytest.mark.parametrize(("L", "B"), [(3, 4), (5, 3), (2, 4), (3, 6), (2, 3), (1, 2)])
def test_time_first_inputs_run_one_by_one_also_where_the_output_looks_right(L, B):
    looks_right = 2 * L == B
    net = Noisy(read=last_state, gru=nn.GRU(5, 5))
    assert_as_one_by_one(net, *torch.rand(2, L, B, 5), n_superfluous=0 if looks_right else 1)


def test_embeddings_of_a_batch_whose_shape_is_ambiguous_do_not_depend_on_earlier_batches():
    model = SiameseNet(nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.BatchNorm1d(4)))
    fresh = copy.deepcopy(model)
    model(*torch.rand(2, 4, 6, 3))  # as a resumed run has not
    inputs = torch.rand(2, 3, 6, 3)  # six rows, and a dimension of six beside
    assert all(torch.equal(x, y) for x, y in zip(model(*inputs), fresh(*inputs)))


def test_a_network_that_raises_on_the_joint_batch_runs_one_by_one():
    def finish(self, x):
        return x + torch.zeros(4, 1)

    assert_as_one_by_one(Noisy(finish), *torch.rand(2, 4, 5), n_superfluous=1)


def test_the_error_seen_is_that_of_a_single_input():
    model = SiameseNet(EmbeddingNet())
    with pytest.raises(ValueError, match=r"got \(3, 1, 9, 9\)") as caught:
        model(*torch.rand(2, 3, 1, 9, 9))
    assert caught.value.__context__ is None
    calls = count_calls(model.embedding_net)
    model(*torch.rand(2, 3, 1, 28, 28))
    assert calls == [1]


def test_training_and_evaluation_may_differ_in_the_output():
    net = Noisy(lambda self, x: (x, x) if self.training else x)
    model = SiameseNet(net).eval()
    assert all(torch.is_tensor(x) for x in model(*torch.rand(2, 4, 5)))
    assert net.n_calls == 1
    assert all(isinstance(x, tuple) for x in model.train()(*torch.rand(2, 4, 5)))
    assert net.norm.num_batches_tracked == 2


def test_a_network_put_in_the_others_place_is_tried_anew():
    model = SiameseNet(normed_net())
    model(*torch.rand(2, 4, 3))
    model.embedding_net = Noisy(OTHER_OUTPUTS["two"])
    assert all(len(x) == 2 for x in model(*torch.rand(2, 4, 5)))


def test_lazy_networks_and_buffers_set_in_inference_mode_pass():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    assert [len(x) for x in SiameseNet(lazy)(*torch.rand(2, 4, 3))] == [4, 4]
    net = normed_net()
    with torch.inference_mode():
        net.register_buffer("constant", torch.ones(2))
    assert [len(x) for x in SiameseNet(net)(*torch.rand(2, 4, 3))] == [4, 4]


def test_outputs_of_single_passes_may_be_changed_in_place():
    (first, _), (second, _) = SiameseNet(Noisy(OTHER_OUTPUTS["two"]))(*torch.rand(2, 4, 5))
    first /= 2
    (first + second).sum().backward()


def test_a_wrapper_that_has_run_saves_the_same_names_and_can_be_copied():
    model = SiameseNet(normed_net())
    names = list(model.state_dict())
    inputs = torch.rand(2, 4, 3)
    model(*inputs)
    assert list(model.state_dict()) == names
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls = count_calls(twin.embedding_net)
        assert all(torch.equal(x, y) for x, y in zip(twin.eval()(*inputs), model.eval()(*inputs)))
        assert calls == [1]
        model.train()


@pytest.mark.slow
@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize(("wrapper", "n"), [(SiameseNet, 2), (TripletNet, 3)])
@pytest.mark.parametrize("net_class", [EmbeddingNet, ConvNet4])
def test_export_takes_batches_of_any_size(net_class, wrapper, n, is_warm):
    model = wrapper(net_class()).eval()
    inputs = tuple(torch.rand(n, 4, 1, 28, 28))
    if is_warm:
        model(*inputs)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, inputs, dynamic_shapes=({0: batch},) * n).module()
    for B in (2, 9):
        inputs = torch.rand(n, B, 1, 28, 28)
        torch.testing.assert_close(exported(*inputs), model(*inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_wrappers_are_one_graph_for_batches_of_any_size():
    net = normed_net()
    compiled = torch.compile(SiameseNet(net), backend="eager", fullgraph=True)
    for B in (4, 7, 5):
        x1, x2 = torch.rand(2, B, 3)
        expected = copy.deepcopy(net)(torch.cat((x1, x2)))
        torch.testing.assert_close(torch.cat(compiled(x1, x2)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("is_warm", [False, True])
def test_a_compiled_wrapper_of_two_outputs_gives_both_for_each_input(is_warm):
    net = nn.Sequential(nn.Linear(5, 3), TwoHeads())
    model = SiameseNet(net)
    inputs = torch.rand(2, 4, 5)
    if is_warm:  # else it breaks the graph to find out
        model(*inputs)
    torch._dynamo.reset()
    outputs = torch.compile(model, backend="eager", fullgraph=is_warm)(*inputs)
    torch.testing.assert_close(outputs, tuple(net(x) for x in inputs))


class TwoHeads(nn.Module):
    def forward(self, x):
        return x, x.square()


# --- all


MAKE_ANY_NET = {
    "EmbeddingNet": lambda: EmbeddingNet(3),
    "EmbeddingNetL2": lambda: EmbeddingNetL2(3),
    "ClassificationNet": lambda: ClassificationNet(EmbeddingNet(3), 10),
    "SiameseNet": lambda: SiameseNet(EmbeddingNet(3)),
    "TripletNet": lambda: TripletNet(EmbeddingNet(3)),
}
any_net = pytest.mark.parametrize("make_net", MAKE_ANY_NET.values(), ids=MAKE_ANY_NET)


@any_net
def test_every_net_has_get_embedding(make_net):
    net, x = make_net(), torch.rand(4, 1, 28, 28)
    embedding = net.get_embedding(x)
    assert embedding.shape == (4, 3)
    if isinstance(net, EmbeddingNet):
        torch.testing.assert_close(embedding, net(x))
    elif not isinstance(net, ClassificationNet):
        torch.testing.assert_close(embedding, net.embedding_net(x))


@any_net
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
def test_every_net_can_be_copied(make_net, copied):
    net, x = make_net(), torch.rand(2, 1, 28, 28)
    twin = copied(net)
    assert torch.equal(twin.get_embedding(x), net.get_embedding(x))
    nn.init.zeros_(next(twin.parameters()))
    assert next(net.parameters()).any()


@any_net
def test_every_net_goes_through_a_state_dict(make_net, tmp_path):
    net, other, x = make_net(), make_net(), torch.rand(2, 1, 28, 28)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(other.get_embedding(x), net.get_embedding(x))


def test_parameters_can_be_flattened():
    assert len(nn.utils.parameters_to_vector(EmbeddingNet().parameters())) == sum(
        p.numel() for p in EmbeddingNet().parameters()
    )


def test_first_layer_can_be_replaced():
    net = EmbeddingNet()
    net.convnet[0] = nn.Conv2d(3, 32, 5)
    assert net(torch.zeros(2, 3, 28, 28)).shape == (2, 2)


# --- dropout


def inputs_of_dense_layers(net, x):
    """What the dense layers of an EmbeddingNet are given (B, 1024)."""
    inputs = []
    handle = net.fc.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    net(x)
    handle.remove()
    return inputs[0]


@both_embedding_nets
def test_dropout_has_no_effect_in_evaluation(net_class):
    net, plain = net_class(dropout=0.6).eval(), net_class()
    plain.load_state_dict(net.state_dict())
    x = torch.rand(4, 1, 32, 40)
    assert torch.equal(net(x), plain(x))
    assert torch.equal(net(x), net(x))


@both_embedding_nets
@pytest.mark.parametrize("options", [{}, {"dropout": 0.0}], ids=["default", "zero"])
def test_no_dropout_leaves_training_as_it_was(net_class, options):
    net = net_class(**options)
    x = torch.rand(4, 1, 28, 28)
    state = torch.get_rng_state()
    outputs = net(x)
    assert torch.equal(torch.get_rng_state(), state)
    features = inputs_of_dense_layers(net, x)
    assert torch.equal(features, net.convnet(x).flatten(1))
    raw = net.fc(features)
    assert torch.equal(outputs, functional.normalize(raw, dim=1) if net_class is EmbeddingNetL2 else raw)


@both_embedding_nets
def test_dropout_drops_its_share_of_features_while_training(net_class):
    net = net_class(embedding_dim=8, dropout=0.3)
    x = torch.rand(16, 1, 28, 28)
    whole, kept = net.convnet(x).flatten(1), inputs_of_dense_layers(net, x)
    is_dropped = kept == 0
    assert float(is_dropped.float().mean()) == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(kept, torch.where(is_dropped, 0, whole / 0.7))
    assert not torch.equal(is_dropped[0], is_dropped[1])
    share_of_channel = is_dropped.view(16, 64, 16).float().mean(dim=2)
    assert (share_of_channel % 1 > 0).float().mean() > 0.9  # each value by itself, not whole channels
    assert not torch.allclose(net(x), net(x))


@both_embedding_nets
def test_dropout_is_governed_by_manual_seed_and_has_no_parameters(net_class):
    net = net_class(3, 1, dropout=0.5)
    assert list(net.state_dict()) == EMBEDDING_NET_NAMES
    x, outputs = torch.rand(4, 1, 28, 28), []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(net(x))
    assert torch.equal(*outputs)
    outputs[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


# --- RandomAffine


ALL_OF_AFFINE = {"translate": 2.5, "degrees": 40, "scale": 0.4, "shear": 25, "flip": 0.5}


def naive_affine(x, uniform, *, translate=0.0, degrees=0.0, scale=0.0, shear=0.0, flip=0.0):
    """Pixel by pixel: from the output back through mirror, shear, turn, scale and move, then bilinear interpolation.

    `x` is (B, C, H, W), `uniform` the draws (6, B).
    """
    B, C, H, W = x.shape
    result = torch.empty_like(x)
    for b in range(B):
        right, down, angle, growth, slant = (2 * float(u) - 1 for u in uniform[:5, b])
        for i in range(H):
            for j in range(W):
                u, v = j - (W - 1) / 2, i - (H - 1) / 2  # from the centre, in pixels
                if float(uniform[5, b]) < flip:
                    u = -u
                u += math.tan(math.radians(slant * shear)) * v
                turn = math.radians(angle * degrees)
                u, v = math.cos(turn) * u - math.sin(turn) * v, math.sin(turn) * u + math.cos(turn) * v
                u, v = (coordinate * (1 + scale) ** growth for coordinate in (u, v))
                column = min(max(u + right * translate + (W - 1) / 2, 0), W - 1)
                row = min(max(v + down * translate + (H - 1) / 2, 0), H - 1)
                for c in range(C):
                    total = 0.0
                    for k in (math.floor(row), math.floor(row) + 1):
                        for m in (math.floor(column), math.floor(column) + 1):
                            share = (1 - abs(row - k)) * (1 - abs(column - m))
                            if share > 0:
                                total += share * float(x[b, c, k, m])
                    result[b, c, i, j] = total
    return result


def draws(B, seed, device="cpu"):
    """A layer's generator, and what it is going to draw (6, B)."""
    generator = torch.Generator(device).manual_seed(seed)
    return generator, torch.rand(6, B, device=device, generator=torch.Generator(device).manual_seed(seed))


def measured_maps(layer, B, H=25, W=41):
    """Matrices (B, 2, 2) and shifts (B, 2) by which pixels of the output find theirs in the input, from the centre.

    They are read off images whose two channels are the coordinates of a pixel, which interpolation keeps as they are.
    """
    v, u = torch.meshgrid(torch.arange(H) - H // 2, torch.arange(W) - W // 2, indexing="ij")
    source = layer(torch.stack((u, v)).double().expand(B, 2, H, W))
    centre = source[:, :, H // 2, W // 2]
    columns = source[:, :, H // 2, W // 2 + 1] - centre, source[:, :, H // 2 + 1, W // 2] - centre
    return torch.stack(columns, dim=2), centre


def moments(images):
    """Mass (B,), centre (B, 2) as column and row, and covariance (B, 2, 2) of single-channel images."""
    B, _, H, W = images.shape
    v, u = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    points = torch.stack((u, v), dim=-1).double().reshape(-1, 2)  # (HW, 2)
    weights = images.double().reshape(B, -1)
    mass = weights.sum(dim=1)
    weights = weights / mass[:, None]
    centre = weights @ points
    offsets = points - centre[:, None]  # (B, HW, 2)
    return mass, centre, torch.einsum("bn,bni,bnj->bij", weights, offsets, offsets)


def disc(B, H, W, radius):
    v, u = torch.meshgrid(torch.arange(H) - (H - 1) / 2, torch.arange(W) - (W - 1) / 2, indexing="ij")
    return (u.square() + v.square() <= radius**2).float().expand(B, 1, H, W)


@pytest.mark.parametrize("size", [(28, 28), (9, 14)], ids=str)
def test_affine_in_evaluation_returns_the_tensor_itself(size):
    layer = RandomAffine(**ALL_OF_AFFINE).eval()
    x = torch.rand(3, 2, *size)
    state = torch.get_rng_state()
    assert layer(x) is x
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(28, 28), (9, 14), (32, 32), (1, 1)], ids=str)
def test_affine_of_nothing_is_the_identity(size):
    x = torch.rand(3, 2, *size)
    torch.testing.assert_close(RandomAffine()(x), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"translate": 2.5}, {"degrees": 70}, {"scale": 0.5}, {"shear": 30}, {"flip": 0.5}, ALL_OF_AFFINE],
    ids=[*ALL_OF_AFFINE, "all"],
)
@pytest.mark.parametrize("size", [(9, 9), (6, 11)], ids=str)
def test_affine_equals_the_oracle(options, size):
    x = torch.rand(5, 2, *size, dtype=torch.float64)
    for seed in range(2):
        generator, uniform = draws(5, seed)
        result = RandomAffine(**options, generator=generator)(x)
        torch.testing.assert_close(result, naive_affine(x, uniform, **options), rtol=0, atol=1e-5)


def test_affine_turns_as_torchvision_does():
    x = torch.rand(6, 3, 24, 31) * disc(6, 24, 31, 10)  # so that no edge comes in
    generator, uniform = draws(6, seed=3)
    turned = RandomAffine(degrees=80, generator=generator)(x)
    for image, result, u in zip(x, turned, uniform[2]):
        expected = rotate(image, (2 * float(u) - 1) * 80, InterpolationMode.BILINEAR)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_affine_moves_a_pixel_within_the_bounds_by_draws_of_its_own():
    x = torch.zeros(200, 1, 15, 23)
    x[:, :, 7, 11] = 1
    mass, centre, _ = moments(RandomAffine(translate=3)(x))
    torch.testing.assert_close(mass, torch.ones(200, dtype=torch.float64), rtol=0, atol=1e-4)
    moved = centre - torch.tensor([11, 7])
    assert 2.7 < moved.abs().max() < 3 + 1e-4
    assert (moved.amin(dim=0) < -2.7).all()
    assert (moved.amax(dim=0) > 2.7).all()
    assert len(moved.round(decimals=4).unique(dim=0)) == 200
    for first in (moved[:, 0] < 0, moved[:, 0] > 0):  # all four directions
        for second in (moved[:, 1] < 0, moved[:, 1] > 0):
            assert 25 < (first & second).sum() < 75


def test_affine_fills_with_the_values_of_the_edge():
    x = torch.full((20, 1, 9, 16), 2.0)
    x[..., 8:] = -5.0
    layer = RandomAffine(translate=30, generator=torch.Generator().manual_seed(0))
    right = (2 * draws(20, 0)[1][0] - 1) * 30
    for image, shift in zip(layer(x), right):
        if abs(shift) > 8:
            torch.testing.assert_close(image, torch.full((1, 9, 16), 2.0 if shift < 0 else -5.0))


def test_affine_keeps_a_constant_image():
    layer = RandomAffine(translate=50, degrees=180, scale=2, shear=60, flip=0.5)
    x = torch.tensor([7.5, -3.0])[None, :, None, None].expand(50, 2, 12, 19)
    torch.testing.assert_close(layer(x), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(28, 28), (7, 12), (8, 5)], ids=str)
def test_affine_flips_left_and_right(size):
    x = torch.rand(20, 3, *size)
    mirrored = x.flip(3)
    torch.testing.assert_close(RandomAffine(flip=1)(x), mirrored, rtol=0, atol=1e-5)
    is_flipped = []
    for image, original, mirror in zip(RandomAffine(flip=0.5)(x), x, mirrored):
        differences = [float((image - other).abs().max()) for other in (original, mirror)]
        assert min(differences) < 1e-5
        is_flipped.append(differences[1] < 1e-5)
    assert 2 <= sum(is_flipped) <= 18


@pytest.mark.parametrize("flip", [0.1, 0.5, 0.8])
def test_affine_flips_with_the_chance_given(flip):
    x = torch.arange(4.0).expand(2000, 1, 1, 4)
    is_flipped = RandomAffine(flip=flip)(x)[:, 0, 0, 0] > 1.5
    assert float(is_flipped.float().mean()) == pytest.approx(flip, abs=4 * math.sqrt(flip * (1 - flip) / 2000))


def assert_uniform(values, limit):
    """Within `limit` either way, and one as likely as another."""
    assert values.abs().max() <= limit * (1 + 1e-4)
    quarters = torch.histc(values.float(), bins=4, min=-limit, max=limit)
    assert quarters.sum() == len(values)
    assert (quarters / len(values) - 0.25).abs().max() < 0.08


def test_affine_moves_are_uniform_along_both_axes():
    matrices, shifts = measured_maps(RandomAffine(translate=4), B=500)
    torch.testing.assert_close(matrices, torch.eye(2).double().expand(500, 2, 2), rtol=0, atol=1e-4)
    for shift in shifts.T:
        assert_uniform(shift, 4)
    assert torch.corrcoef(shifts.T)[0, 1].abs() < 0.15


def test_affine_angles_are_uniform_and_turn_without_shear():
    matrices, shifts = measured_maps(RandomAffine(degrees=35), B=500)
    torch.testing.assert_close(shifts, torch.zeros(500, 2).double(), rtol=0, atol=1e-4)
    angles = torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0])
    expected = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), dim=1).view(-1, 2, 2)
    torch.testing.assert_close(matrices, expected, rtol=0, atol=1e-4)
    assert_uniform(angles.rad2deg(), 35)


def test_affine_factors_shrink_as_often_as_they_enlarge():
    matrices, shifts = measured_maps(RandomAffine(scale=0.5), B=500)
    torch.testing.assert_close(shifts, torch.zeros(500, 2).double(), rtol=0, atol=1e-4)
    factors = matrices[:, 0, 0]
    torch.testing.assert_close(matrices, factors[:, None, None] * torch.eye(2).double(), rtol=0, atol=1e-4)
    assert_uniform(factors.log(), math.log(1.5))


def test_affine_shears_along_rows():
    matrices, shifts = measured_maps(RandomAffine(shear=20), B=500)
    torch.testing.assert_close(shifts, torch.zeros(500, 2).double(), rtol=0, atol=1e-4)
    tangents = matrices[:, 0, 1].clone()
    matrices[:, 0, 1] = 0
    torch.testing.assert_close(matrices, torch.eye(2).double().expand(500, 2, 2), rtol=0, atol=1e-4)
    assert_uniform(tangents.atan().rad2deg(), 20)


@pytest.mark.parametrize("size", [(30, 30), (30, 60), (64, 33)], ids=str)
def test_affine_turned_square_stays_a_square(size):
    H, W = size
    x = torch.zeros(40, 1, H, W)
    x[:, :, H // 2 - 6 : H // 2 + 6, W // 2 - 6 : W // 2 + 6] = 1
    mass, _, covariance = moments(RandomAffine(degrees=180)(x))
    torch.testing.assert_close(mass, torch.full_like(mass, 144), rtol=0.02, atol=0)
    expected = (12**2 - 1) / 12 * torch.eye(2).double().expand(40, 2, 2)  # the same in every direction
    torch.testing.assert_close(covariance, expected, rtol=0, atol=0.4)


def test_affine_scales_a_disc_within_the_bounds():
    x = disc(200, 60, 80, radius=14)
    mass, centre, covariance = moments(RandomAffine(scale=0.5)(x))
    growth = mass / x[0].sum()
    assert growth.max() < 1.5**2 * 1.03
    assert growth.min() > 1.5**-2 / 1.03
    assert growth.max() > 2
    assert growth.min() < 0.5
    torch.testing.assert_close(centre, torch.tensor([39.5, 29.5]).double().expand(200, 2), rtol=0, atol=0.02)
    torch.testing.assert_close(covariance[:, 0, 0], covariance[:, 1, 1], rtol=0.03, atol=0)


def test_affine_is_repeatable_by_its_generator_alone():
    x = torch.rand(4, 1, 10, 10)
    state = torch.get_rng_state()
    results = []
    for seed in (5, 5, 6):
        layer = RandomAffine(**ALL_OF_AFFINE, generator=torch.Generator().manual_seed(seed))
        results.append((layer(x), layer(x)))
    assert torch.equal(torch.get_rng_state(), state)
    for first, second in zip(results[0], results[1]):
        assert torch.equal(first, second)
    assert not torch.equal(results[0][0], results[0][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_affine_is_repeatable_by_manual_seed():
    x, layer, results = torch.rand(4, 1, 10, 10), RandomAffine(**ALL_OF_AFFINE), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(layer(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_affine_draws_for_each_image_and_for_all_its_channels():
    x = torch.rand(1, 1, 12, 12).expand(8, 3, 12, 12)
    result = RandomAffine(**ALL_OF_AFFINE)(x)
    for image in result:
        torch.testing.assert_close(image, image[:1].expand(3, 12, 12))
    assert len({image.numpy().tobytes() for image in result[:, 0]}) == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(28, 28), (160, 200)], ids=str)
def test_affine_keeps_the_dtype_and_is_as_exact_as_it_allows(dtype, size):
    H, W = size
    rows, columns = torch.arange(H)[:, None] / 9, torch.arange(W) / 7
    x = (rows.sin() * columns.cos()).expand(3, 1, H, W).to(dtype)
    assert RandomAffine(**ALL_OF_AFFINE).eval()(x).dtype == dtype
    generator, _ = draws(3, seed=2)
    result = RandomAffine(**ALL_OF_AFFINE, generator=generator)(x)
    assert result.dtype == dtype
    expected = RandomAffine(**ALL_OF_AFFINE, generator=draws(3, seed=2)[0])(x.double())
    atol = max(1e-5, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=atol)


def test_affine_is_as_exact_under_autocast():
    x = torch.rand(3, 1, 100, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = RandomAffine()(x)
    torch.testing.assert_close(result, x, rtol=0, atol=1e-4)


def test_affine_does_not_depend_on_the_memory_format():
    x = torch.rand(4, 3, 10, 14)
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    results = []
    for given in (x, x.to(memory_format=torch.channels_last), strided):
        results.append(RandomAffine(**ALL_OF_AFFINE, generator=draws(4, seed=1)[0])(given))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_affine_leaves_its_input_unchanged():
    x = torch.rand(4, 1, 10, 10)
    before = x.clone()
    RandomAffine(**ALL_OF_AFFINE)(x)
    assert torch.equal(x, before)


def test_affine_lets_gradients_through():
    x = torch.rand(2, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: RandomAffine(**ALL_OF_AFFINE, generator=draws(2, seed=1)[0])(x), (x,))
    RandomAffine(**ALL_OF_AFFINE)(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad.sum(dim=(1, 2, 3)) > 1).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(1, 28, 28), (28, 28), (2, 1, 1, 28, 28), (2, 784)], ids=str)
def test_affine_of_another_shape_is_an_error(training, shape):
    with pytest.raises(ValueError, match=r"expected images of shape \(B, C, H, W\), got \(" + f"{shape[0]}, "):
        RandomAffine(translate=1).train(training)(torch.rand(shape))


@pytest.mark.parametrize("training", [True, False])
def test_affine_of_an_empty_batch_is_empty(training):
    layer = RandomAffine(**ALL_OF_AFFINE).train(training)
    assert layer(torch.rand(0, 1, 28, 28)).shape == (0, 1, 28, 28)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("has_generator", [True, False])
def test_affine_can_be_copied(copied, has_generator):
    layer = RandomAffine(**ALL_OF_AFFINE, generator=torch.Generator().manual_seed(4) if has_generator else None)
    twin, x, results = copied(layer), torch.rand(4, 1, 9, 9), []
    for each in (layer, twin):
        torch.manual_seed(3)
        results.append(each(x))
    assert torch.equal(*results)


def test_affine_trains_before_the_network_of_a_classifier():
    model = ClassificationNet(nn.Sequential(RandomAffine(translate=2, degrees=10), EmbeddingNet(embedding_dim=5)), 10)
    assert list(model.embedding_net.state_dict()) == [f"1.{name}" for name in EMBEDDING_NET_NAMES]
    assert model.fc1.in_features == 5
    x = torch.rand(4, 1, 28, 28)
    assert not torch.equal(model(x), model(x))
    nn.functional.nll_loss(model(x), torch.arange(4)).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
    model.eval()
    torch.testing.assert_close(model(x).exp().sum(dim=1), torch.ones(4))
    assert torch.equal(model.get_embedding(x), model.nonlinear(model.embedding_net[1](x)))


def test_affine_draws_for_each_input_of_a_triplet():
    net = EmbeddingNet(embedding_dim=5)
    model = TripletNet(nn.Sequential(RandomAffine(**ALL_OF_AFFINE), net))
    x = torch.rand(3, 1, 28, 28)
    embeddings = model(x, x, x)
    assert [output.shape for output in embeddings] == [(3, 5)] * 3
    assert len(torch.cat(embeddings).unique(dim=0)) == 9
    for output in model.eval()(x, x, x):
        torch.testing.assert_close(output, net(x))


@pytest.mark.slow
@pytest.mark.parametrize("has_generator", [False, True])
def test_affine_compiles_for_batches_of_changing_size(has_generator):
    generator = torch.Generator() if has_generator else None
    layer = RandomAffine(**ALL_OF_AFFINE, generator=generator)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=not has_generator)
    for B in (12, 20, 7, 1):
        x, results = torch.rand(B, 1, 8, 9), []
        for function in (layer, compiled):
            (generator or torch).manual_seed(5)
            results.append(function(x))
        torch.testing.assert_close(*results)


@pytest.mark.gpu
def test_affine_on_the_gpu_equals_the_oracle():
    x = torch.rand(4, 2, 9, 14)
    generator, uniform = draws(4, seed=0, device="cuda")
    result = RandomAffine(**ALL_OF_AFFINE, generator=generator)(x.cuda())
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), naive_affine(x, uniform.cpu(), **ALL_OF_AFFINE), rtol=0, atol=1e-3)
    model = nn.Sequential(RandomAffine(translate=2, flip=0.5), EmbeddingNet()).cuda()
    images = torch.rand(4, 1, 28, 28, device="cuda")
    model(images).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert model[0].eval()(images) is images


# --- what users replace and change


@pytest.mark.parametrize("head", [nn.Linear(1024, 8), nn.Sequential(nn.Dropout(), nn.Linear(1024, 8)), nn.Identity()])
def test_dense_layers_may_be_replaced(head):
    net = EmbeddingNet()
    net.fc = head
    assert net(torch.randn(3, 1, 28, 28)).shape == (3, 1024 if isinstance(head, nn.Identity) else 8)
    if isinstance(head, nn.Identity):
        with pytest.raises(ValueError, match="embedding_dim=D"):
            ClassificationNet(net, 10)
    else:
        assert ClassificationNet(net, 10)(torch.randn(3, 1, 28, 28)).shape == (3, 10)


def test_classifier_follows_a_replaced_last_layer():
    net = EmbeddingNet()
    net.fc[4] = nn.Linear(256, 64)
    assert net.embedding_dim == 64
    assert ClassificationNet(net, 10)(torch.randn(3, 1, 28, 28)).shape == (3, 10)


def test_embeddings_may_be_changed_in_place():
    first, second = SiameseNet(EmbeddingNet())(torch.randn(3, 1, 28, 28), torch.randn(3, 1, 28, 28))
    first /= first.norm(dim=1, keepdim=True).detach()
    (first + second).sum().backward()


def test_inputs_have_the_originals_names():
    x = torch.randn(2, 1, 28, 28)
    assert len(SiameseNet(EmbeddingNet())(x1=x, x2=x)) == 2
    assert len(TripletNet(EmbeddingNet())(x1=x, x2=x, x3=x)) == 3


# --- code written for the original


class OwnLayers(EmbeddingNet):
    """A subclass with layers of its own, for images smaller than 28 x 28 and more channels."""

    def __init__(self):
        nn.Module.__init__(self)
        self.convnet = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(), nn.MaxPool2d(2))
        self.fc = nn.Sequential(nn.Linear(8 * 5 * 5, 16), nn.PReLU(), nn.Linear(16, 6))
        self.dropout = nn.Dropout(0.9)  # in no forward pass of ours


class OwnLayersL2(EmbeddingNetL2):
    def __init__(self):
        super(EmbeddingNet, self).__init__()
        self.convnet = nn.Sequential(nn.Conv1d(3, 8, 3), nn.PReLU())
        self.fc = nn.Linear(8 * 10, 6)


def test_a_subclass_with_layers_of_its_own_runs_as_the_original_does():
    net, x = OwnLayers(), torch.rand(4, 3, 12, 12)
    assert torch.equal(net(x), net.fc(net.convnet(x).flatten(start_dim=1)))
    assert isinstance(net.dropout, nn.Dropout)
    assert ClassificationNet(net, 10)(x).shape == (4, 10)
    assert net.get_embedding(x).shape == (4, 6)
    torch.testing.assert_close(OwnLayersL2()(torch.rand(4, 3, 12)).norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("is_early", [False, True])
def test_a_subclass_may_set_its_embedding_dim(is_early):
    class Wide(EmbeddingNet):
        def __init__(self):
            if is_early:
                self.embedding_dim = 1024
            super().__init__()
            self.embedding_dim = 1024

        def forward(self, x):
            return self.convnet(x).flatten(start_dim=1)

    net = Wide()
    assert net.embedding_dim == 1024
    assert pickle.loads(pickle.dumps(EmbeddingNet(5))).embedding_dim == 5
    assert ClassificationNet(net, 10)(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_a_classifier_whose_get_embedding_is_overridden_classifies_as_before():
    class Normalised(ClassificationNet):
        def get_embedding(self, x):
            return functional.normalize(self.embedding_net(x))

    net, x = Normalised(EmbeddingNet(), 10), torch.rand(3, 1, 28, 28)
    plain = ClassificationNet(EmbeddingNet(), 10)
    plain.load_state_dict(net.state_dict())
    assert torch.equal(net(x), plain(x))


@pytest.mark.parametrize(("wrapper", "n_inputs"), [(SiameseNet, 2), (TripletNet, 3)])
def test_a_wrapper_that_skips_our_init_runs(wrapper, n_inputs):
    class Own(wrapper):
        def __init__(self, net):
            super(wrapper, self).__init__()
            self.embedding_net = net

        def get_embedding(self, x):
            return -self.embedding_net(x)

    net = normed_net().eval()
    inputs = torch.rand(n_inputs, 4, 3)
    for x, output in zip(inputs, Own(net)(*inputs)):
        torch.testing.assert_close(output, net(x))


ORIGINAL_CLASSES = """
from torch import nn

class EmbeddingNet(nn.Module):
    def __init__(self):
        super().__init__()
        conv = [nn.Conv2d(1, 32, 5), nn.PReLU(), nn.MaxPool2d(2, stride=2), nn.Conv2d(32, 64, 5)]
        self.convnet = nn.Sequential(*conv, nn.PReLU(), nn.MaxPool2d(2, stride=2))
        dense = [nn.Linear(1024, 256), nn.PReLU(), nn.Linear(256, 256), nn.PReLU(), nn.Linear(256, 2)]
        self.fc = nn.Sequential(*dense)

class EmbeddingNetL2(EmbeddingNet):
    pass

class ClassificationNet(nn.Module):
    def __init__(self, embedding_net, n_classes):
        super().__init__()
        self.embedding_net, self.n_classes = embedding_net, n_classes
        self.nonlinear, self.fc1 = nn.PReLU(), nn.Linear(2, n_classes)

class SiameseNet(nn.Module):
    def __init__(self, embedding_net):
        super().__init__()
        self.embedding_net = embedding_net

class TripletNet(SiameseNet):
    pass
"""


@pytest.fixture
def saved_by_the_original(monkeypatch):
    """A function that makes a model of the original's classes and gives what `torch.save(model)` of them gives."""

    def save(make_model):
        original = type(sys)("networks")
        exec(ORIGINAL_CLASSES, vars(original))
        file = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "networks", original)
            model = make_model(original)
            torch.save(model, file)
        file.seek(0)
        return model.state_dict(), torch.load(file, weights_only=False)

    return save


@pytest.mark.parametrize("name", ["EmbeddingNet", "EmbeddingNetL2"])
def test_embedding_nets_saved_whole_by_the_original_load_and_run(saved_by_the_original, name):
    weights, net = saved_by_the_original(lambda original: getattr(original, name)())
    ours = getattr(networks, name)()
    assert type(net) is type(ours)
    ours.load_state_dict(weights)
    x = torch.rand(3, 1, 28, 28)
    for each in (net, pickle.loads(pickle.dumps(net)), copy.deepcopy(net).train()):
        torch.testing.assert_close(each(x), ours(x))
    assert net(torch.rand(3, 1, 40, 33)).shape == (3, 2)
    assert (net.embedding_dim, ClassificationNet(net, 4).fc1.in_features) == (2, 2)


def test_wrappers_saved_whole_by_the_original_load_and_run(saved_by_the_original):
    x = torch.rand(3, 4, 1, 28, 28)
    for name, inputs in (("SiameseNet", x[:2]), ("TripletNet", x)):
        _, model = saved_by_the_original(lambda original, name=name: getattr(original, name)(original.EmbeddingNet()))
        assert type(model) is getattr(networks, name)
        for output, given in zip(model(*inputs), inputs):
            torch.testing.assert_close(output, model.get_embedding(given))
    weights, model = saved_by_the_original(lambda original: original.ClassificationNet(original.EmbeddingNet(), 10))
    ours = ClassificationNet(EmbeddingNet(), 10)
    ours.load_state_dict(weights)
    torch.testing.assert_close(model(x[0]), ours(x[0]))
    torch.testing.assert_close(model.get_embedding(x[0]), ours.get_embedding(x[0]))


# --- wrapped networks


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compile": lambda net: torch.compile(net, backend="eager"),
    "Chunked": lambda net: Chunked(net, 4),
    "several": lambda net: nn.DataParallel(Chunked(torch.compile(net, backend="eager"), 4)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_classifier_finds_the_embedding_dim_of_a_wrapped_network(wrap):
    for net in (EmbeddingNet(64), ConvNet4(64)):
        assert ClassificationNet(wrap(net), 10).fc1.in_features == 64
    assert ClassificationNet(wrap(EmbeddingNet(64)), 10)(torch.rand(6, 1, 28, 28)).shape == (6, 10)


# --- ConvNet4


def test_convnet4_is_four_blocks_of_convolution_norm_relu_and_pool():
    net = ConvNet4().eval()
    expected = nn.Sequential()
    for i, n_in in enumerate([1, 64, 64, 64]):
        layers = nn.Conv2d(n_in, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)
        expected.append(nn.Sequential(*layers))
        expected[i].load_state_dict(net.convnet[i].state_dict())
    x = torch.randn(5, 1, 28, 28)
    torch.testing.assert_close(net(x), expected.eval()(x).flatten(start_dim=1))
    assert torch.equal(net.get_embedding(x), net(x))

    weights = torch.randn(5, 64)
    (net.train()(x) * weights).sum().backward()
    (expected.train()(x).flatten(start_dim=1) * weights).sum().backward()
    for ours, theirs in zip(net.parameters(), expected.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in net.parameters()) == 64 * 9 + 3 * 64 * 64 * 9 + 4 * 3 * 64


@pytest.mark.parametrize("size", [16, 28, 32, 84])
def test_convnet4_takes_other_sizes_channels_and_dimensions(size):
    net = ConvNet4(embedding_dim=10, in_channels=3)
    assert net(torch.randn(2, 3, size, size)).shape == (2, 10)
    assert ClassificationNet(net, 7)(torch.randn(2, 3, size, size)).shape == (2, 7)
    assert len(TripletNet(net)(*torch.randn(3, 2, 3, size, size))) == 3


def test_a_network_that_comes_to_return_more_is_run_once_for_each_input():
    class Growing(nn.Module):
        has_both = False

        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, x):
            return (self.net(x), x) if self.has_both else self.net(x)

    model = SiameseNet(Growing())
    a, b = torch.randn(2, 4, 3)
    model(a, b)
    model.embedding_net.has_both = True
    (embedding, same), _ = model(a, b)
    torch.testing.assert_close(embedding, model.embedding_net.net(a))
    assert torch.equal(same, a)


def test_classifier_passes_over_an_embedding_dim_that_is_no_number():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 5)

        def embedding_dim(self):
            return 5

        def forward(self, x):
            return self.net(x)

    assert ClassificationNet(Net(), 4)(torch.ones(2, 3)).shape == (2, 4)
