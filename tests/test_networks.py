"""Tests of networks.py, against outputs of the original network and against the network plainly written."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models import resnet18

from networks import ClassificationNet, EmbeddingNet, EmbeddingNetL2, SiameseNet, TripletNet

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
    net.load_state_dict(torch.load(tmp_path / "plain.pt"))
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
def test_any_image_size_from_28_embeds_D39(net_class, height, width):
    assert net_class()(torch.rand(2, 1, height, width)).shape == (2, 2)


def test_all_of_a_larger_image_counts_D39():
    net = EmbeddingNet()
    image = torch.rand(1, 1, 64, 48)
    for top in (0, 16, 32, 48):
        for left in (0, 16, 32):
            changed = image.clone()
            changed[:, :, top : top + 16, left : left + 16] *= -3
            assert not torch.allclose(net(changed), net(image))


@both_embedding_nets
def test_channels_and_embedding_dim_can_be_chosen_D39(net_class):
    net = net_class(embedding_dim=64, in_channels=3)
    assert net.embedding_dim == 64
    assert net(torch.rand(5, 3, 40, 40)).shape == (5, 64)
    assert net_class(7)(torch.rand(5, 1, 28, 28)).shape == (5, 7)


def test_memory_format_does_not_change_the_embedding_D5_D39():
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
def test_other_shapes_are_errors_D39(net_class, shape):
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 1, H, W\).*got \(" + f"{shape[0]}, "):
        net_class()(torch.rand(shape))


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


def test_l2_trains_D38():
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
def test_l2_of_a_zero_embedding_is_zero_D38(dtype):
    net = EmbeddingNetL2()
    nn.init.zeros_(net.fc[4].weight)
    nn.init.zeros_(net.fc[4].bias)
    embeddings = net.to(dtype)(torch.rand(4, 1, 28, 28, dtype=dtype))
    assert embeddings.dtype == dtype
    assert torch.equal(embeddings, torch.zeros(4, 2, dtype=dtype))


def test_l2_of_a_zero_embedding_has_finite_gradient_D38():
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
def test_classifier_takes_any_net_D5(make_net, embedding_dim):
    net = ClassificationNet(make_net(), 10).eval()
    x = torch.rand(2, 3, 32, 32)
    assert net.get_embedding(x).shape == (2, embedding_dim)
    torch.testing.assert_close(net(x).exp().sum(dim=1), torch.ones(2))
    assert net(x).shape == (2, 10)


def test_classifier_takes_the_embedding_dim_told_D5():
    net = ClassificationNet(nn.Sequential(nn.Linear(3, 9), nn.Unflatten(1, (3, 3)), nn.Flatten()), 4, embedding_dim=9)
    assert net(torch.rand(2, 3)).shape == (2, 4)
    pooled = nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert ClassificationNet(pooled, 4, embedding_dim=6)(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    told = nn.Linear(3, 9)
    told.embedding_dim = 8
    assert ClassificationNet(told, 4, embedding_dim=9).fc1.in_features == 9
    assert ClassificationNet(told, 4).fc1.in_features == 8


def test_classifier_of_unknown_embedding_dim_is_an_error_D5():
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
def test_wrappers_pass_the_inputs_once_and_together_D40(wrapper, sizes):
    net, reference = normed_net(), normed_net()
    inputs = [torch.randn(size, 3) + i for i, size in enumerate(sizes)]
    expected = reference(torch.cat(inputs)).split(sizes)
    calls = count_calls(net)
    outputs = wrapper(net)(*inputs)
    assert calls == [1]
    assert [len(output) for output in outputs] == list(sizes)
    for output, of_reference in zip(outputs, expected):
        torch.testing.assert_close(output, of_reference)
    assert net[1].num_batches_tracked == 1
    torch.testing.assert_close(net[1].running_mean, reference[1].running_mean)
    torch.testing.assert_close(net[1].running_var, reference[1].running_var)


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
    other.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert torch.equal(other.get_embedding(x), net.get_embedding(x))


def test_parameters_can_be_flattened():
    assert len(nn.utils.parameters_to_vector(EmbeddingNet().parameters())) == sum(
        p.numel() for p in EmbeddingNet().parameters()
    )


def test_first_layer_can_be_replaced():
    net = EmbeddingNet()
    net.convnet[0] = nn.Conv2d(3, 32, 5)
    assert net(torch.zeros(2, 3, 28, 28)).shape == (2, 2)
