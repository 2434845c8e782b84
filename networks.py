"""Embedding networks, and the wrappers that train one as a classifier, on pairs, on triplets or in chunks.

Every network has `get_embedding(x)`, the embeddings (B, D) of a batch. The wrappers take any embedding network:

    model = TripletNet(EmbeddingNet(embedding_dim=64))
    anchor, positive, negative = model(x_anchor, x_positive, x_negative)
"""

import contextlib
import copy
import functools
import itertools
import numbers
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint


class EmbeddingNet(nn.Module):
    """Two convolutions and three dense layers with PReLUs between, as in the original.

    Conv 5x5x32, PReLU, max pool 2, conv 5x5x64, PReLU, max pool 2, pooled further to 4 x 4 where the image is larger
    than 28 x 28, dense 256, PReLU, dense 256, PReLU, dense `embedding_dim`. Subclasses may define `convnet` and `fc` of
    their own, without calling `EmbeddingNet.__init__`.

    Args:
        embedding_dim: D, length of an embedding.
        in_channels: channels of the image.
        dropout: share of the convolutions' output that is dropped while training; the original has none.

    >>> EmbeddingNet()(torch.zeros(8, 1, 28, 28)).shape
    torch.Size([8, 2])
    """

    def __init__(self, embedding_dim: int = 2, in_channels: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.convnet = _ConvPReLUPool(
            nn.Conv2d(in_channels, 32, 5), nn.PReLU(), nn.MaxPool2d(2, stride=2),
            nn.Conv2d(32, 64, 5), nn.PReLU(), nn.MaxPool2d(2, stride=2),
        )  # fmt: skip
        self.fc = nn.Sequential(
            nn.Linear(64 * 4 * 4, 256), nn.PReLU(),
            nn.Linear(256, 256), nn.PReLU(),
            nn.Linear(256, embedding_dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Embed a batch.

        Args:
            x: float tensor (B, in_channels, H, W), H and W at least 28; contiguous or channels-last.

        Returns:
            (B, D).

        Raises:
            ValueError: for another shape.
        """
        if isinstance(self.convnet, _ConvPReLUPool):  # a subclass's own layers say themselves what they take
            channels = getattr(self.convnet[0], "in_channels", None)  # of a layer put in its place, too
            if x.dim() != 4 or channels not in (None, x.shape[1]) or min(x.shape[2:]) < 28:
                expected = f"(B, {channels or 'C'}, H, W) with H and W at least 28"
                raise ValueError(f"expected images of shape {expected}, got {tuple(x.shape)}")
        x = self.convnet(x)  # (B, 64, h, w)
        dense = next((layer for layer in self.fc.modules() if isinstance(layer, nn.Linear)), None)
        if dense is not None and x.dim() == 4 and x.shape[1:].numel() > dense.in_features == 16 * x.shape[1]:
            x = _max_pool_to_4x4(x)  # (B, 64, 4, 4)
        # Read from the instance: a subclass may have a layer of this name, or none.
        x = F.dropout(x.flatten(start_dim=1), vars(self).get("dropout", 0.0), self.training)
        return self.fc(x)  # (B, D)

    def get_embedding(self, x: Tensor) -> Tensor:
        """Embeddings (B, D) of a batch: the same as calling the network."""
        return self(x)

    @property
    def embedding_dim(self) -> int | None:
        """D: what was assigned, else the width of the last dense layer; None where there is none."""
        if "embedding_dim" in vars(self):
            return vars(self)["embedding_dim"]
        return _width_of_last_linear(getattr(self, "fc", self))

    @embedding_dim.setter
    def embedding_dim(self, value: int | None) -> None:
        vars(self)["embedding_dim"] = value


class EmbeddingNetL2(EmbeddingNet):
    """EmbeddingNet with each row divided by its Euclidean norm; a zero row stays zero.

    >>> embeddings = EmbeddingNetL2(embedding_dim=64)(torch.rand(8, 1, 28, 28))
    >>> torch.allclose(embeddings.norm(dim=1), torch.ones(8))
    True
    """

    def forward(self, x: Tensor) -> Tensor:
        """Embed a batch: (B, in_channels, H, W) to (B, D) of norm 1, see `EmbeddingNet.forward`."""
        embeddings = super().forward(x)
        at_least_float32 = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))  # eps is 0 in float16
        return F.normalize(at_least_float32, dim=1).to(embeddings.dtype)


class ConvNet4(nn.Module):
    """Four blocks of convolution 3x3, batch norm, ReLU and max pool 2, the usual network of few-shot papers.

    64 channels, `embedding_dim` in the last block (Vinyals et al. 2016, 4.1). What is left of the image then, a single
    pixel of 28 x 28, is averaged.

    Args:
        embedding_dim: D, length of an embedding.
        in_channels: channels of the image.

    >>> ConvNet4()(torch.zeros(8, 1, 28, 28)).shape
    torch.Size([8, 64])
    """

    def __init__(self, embedding_dim: int = 64, in_channels: int = 1) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        widths = [in_channels, 64, 64, 64, embedding_dim]
        self.convnet = nn.Sequential(*(self._block(*pair) for pair in itertools.pairwise(widths)))

    @staticmethod
    def _block(n_in, n_out):
        # ReLU behind the pool instead of ahead of it: the same function and gradient, of a quarter of the values.
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.MaxPool2d(2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Embed a batch: float (B, in_channels, H, W), H and W at least 16, to (B, D)."""
        if _is_eager_on_cpu(x):
            x = _as_channels_last(x)  # with the pool ahead of ReLU, a step takes three fifths of the time
        return self.convnet(x).mean(dim=(2, 3))

    def get_embedding(self, x: Tensor) -> Tensor:
        """Embeddings (B, D) of a batch: the same as calling the network."""
        return self(x)


class ClassificationNet(nn.Module):
    """A classifier on top of an embedding network: PReLU, one dense layer, log-softmax. Train it with `nn.NLLLoss`.

    Args:
        embedding_net: any module from a batch to (B, D).
        n_classes: C, number of classes.
        embedding_dim: D; by default the `embedding_dim` of `embedding_net`, or the width of its last `nn.Linear`.

    Raises:
        ValueError: where D is neither given nor found.

    >>> ClassificationNet(EmbeddingNet(embedding_dim=64), n_classes=10)(torch.zeros(8, 1, 28, 28)).shape
    torch.Size([8, 10])
    """

    def __init__(self, embedding_net: nn.Module, n_classes: int, *, embedding_dim: int | None = None) -> None:
        super().__init__()
        if embedding_dim is None:
            embedding_dim = _embedding_dim_of(embedding_net)
        self.embedding_net = embedding_net
        self.n_classes = n_classes
        self.nonlinear = nn.PReLU()
        self.fc1 = nn.Linear(embedding_dim, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (B, C) of a batch."""
        return F.log_softmax(self.fc1(self.nonlinear(self.embedding_net(x))), dim=-1)

    def get_embedding(self, x: Tensor) -> Tensor:
        """What the dense layer sees: the embedding after its PReLU, (B, D)."""
        return self.nonlinear(self.embedding_net(x))


class _UnjoinedError(ValueError):
    """The output for several inputs together cannot be told apart."""


class _SharedNet(nn.Module):
    """One embedding network for several inputs.

    Tensors of one shape go through it together, which is faster, and batch norm sees the whole batch once. Where they
    cannot be put together, or the output is not one tensor (B, D), the network runs once for each input, as in the
    original. The latter is found by trying once, which leaves no trace in buffers and random states.
    """

    embedding_net: nn.Module
    _joins: Mapping = {}  # what was found, by network and its mode, training or evaluation

    def get_embedding(self, x: Any) -> Any:
        """Embeddings (B, D) of a batch."""
        return self.embedding_net(x)

    def _embed(self, *inputs):
        if not _can_be_joined(inputs):
            return self._one_by_one(inputs)
        if torch.compiler.is_compiling():
            return self._one_by_one(inputs) if False in self._joins.values() else self._together(inputs)
        # Time-first input (L, B, D) with 2 L = B would give as many rows. What earlier batches showed does not count
        # here, so that a resumed run goes the same way as one that never stopped.
        if inputs[0].dim() > 1 and inputs[0].shape[1] == sum(x.shape[0] for x in inputs):
            return self._one_by_one(inputs)
        key = self.embedding_net, getattr(self.embedding_net, "training", None)
        if key not in self._joins:
            return self._find_out(inputs, key)
        if self._joins[key]:
            try:
                return self._together(inputs)
            except _UnjoinedError:  # the network has changed
                self._joins = {**self._joins, key: False}
        return self._one_by_one(inputs)

    def _one_by_one(self, inputs):
        return tuple(self.embedding_net(x) for x in inputs)

    def _together(self, inputs):
        sizes = [x.shape[0] for x in inputs]
        output = self.embedding_net(torch.cat(inputs))
        if not torch.is_tensor(output) or output.dim() != 2 or output.shape[0] != sum(sizes):
            got = tuple(output.shape) if torch.is_tensor(output) else type(output).__name__
            message = f"expected one tensor with a row for each of {sum(sizes)} samples, got {got}"
            raise _UnjoinedError(f"{message}; to compile such a network, call the model once uncompiled first")
        # Slices, since the parts of a split would refuse changes in place.
        return tuple(output[end - n : end] for n, end in zip(sizes, itertools.accumulate(sizes)))

    def _find_out(self, inputs, key):
        before = _Snapshot(self, {})
        try:
            outputs = self._together(inputs)
        except Exception as error:
            is_end = type(error).__module__ == checkpoint.__module__  # of a second pass that has done its part
            if is_end or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            outputs = None
        joins = outputs is not None
        if not joins:
            before.restore()
            outputs = self._one_by_one(inputs)  # its error is the one to be seen
        self._joins = {**{old: value for old, value in self._joins.items() if old[0] is key[0]}, key: joins}
        return outputs


class SiameseNet(_SharedNet):
    """One embedding network for the two inputs of a pair. Train it with `ContrastiveLoss`.

    Tensors of one shape (but for B) pass the network together; anything else (graphs, dicts, images of two sizes, ...)
    one input after the other, and so does everything where the network's output is not one tensor (B, D).

    Args:
        embedding_net: any module from a batch to (B, D).

    >>> x1, x2 = SiameseNet(EmbeddingNet())(torch.zeros(8, 1, 28, 28), torch.zeros(8, 1, 28, 28))
    >>> x1.shape, x2.shape
    (torch.Size([8, 2]), torch.Size([8, 2]))
    """

    def __init__(self, embedding_net: nn.Module) -> None:
        super().__init__()
        self.embedding_net = embedding_net

    def forward(self, x1: Any, x2: Any) -> tuple[Any, Any]:
        """Embeddings of both inputs, a tuple of two (B, D)."""
        return self._embed(x1, x2)


class TripletNet(_SharedNet):
    """One embedding network for the three inputs of a triplet. Train it with `TripletLoss`. See `SiameseNet`.

    Args:
        embedding_net: any module from a batch to (B, D).

    >>> len(TripletNet(EmbeddingNet())(*torch.zeros(3, 8, 1, 28, 28)))
    3
    """

    def __init__(self, embedding_net: nn.Module) -> None:
        super().__init__()
        self.embedding_net = embedding_net

    def forward(self, x1: Any, x2: Any, x3: Any) -> tuple[Any, Any, Any]:
        """Embeddings of anchor, positive and negative, a tuple of three (B, D)."""
        return self._embed(x1, x2, x3)


class Chunked(nn.Module):
    """Any network, run on `size` samples at a time, so that memory holds the activations of one chunk.

    Embeddings and gradients are those of the whole batch, whatever the loss, but that batch norm sees chunks. Going
    back, each chunk passes the network a second time (`torch.utils.checkpoint`), which costs the time of a forward
    pass. The second pass draws the same random numbers: torch's, numpy's and Python's global ones, and those of a
    `torch.Generator` that is an attribute of a layer, as in `RandomAffine(generator=g)`. It leaves random states and
    buffers alone, so batch norm counts a chunk once. The state dict is that of `net`, with the same keys.

    Args:
        net: the network. What it is given may be nested in tuples, lists and dicts: tensors whose first dimension is
            the batch, that of the first tensor, are cut, anything else is passed whole. What it returns, tensors nested
            likewise, has a row for each sample.
        size: samples at a time; a batch of no more passes whole.

    Raises:
        ValueError: `size` is no positive whole number; the output of a chunk has no row for each sample.

    >>> Chunked(EmbeddingNet(64), size=3)(torch.zeros(8, 1, 28, 28)).shape
    torch.Size([8, 64])
    """

    def __init__(self, net: nn.Module, size: int) -> None:
        if not isinstance(size, numbers.Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"expected size to be a positive whole number, got {size!r}")
        super().__init__()
        self.net: nn.Module = net
        self.size: int = int(size)
        self.register_load_state_dict_post_hook(_shorten_names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `net` returns for a batch."""
        # torch.compile cannot trace the second pass: it leaves the chunks alone, and compiles what is around them.
        run = torch.compiler.disable(self._in_chunks) if torch.compiler.is_compiling() else self._in_chunks
        return run(self.net, args, kwargs)

    def get_embedding(self, *args: Any, **kwargs: Any) -> Any:
        """Embeddings (B, D) of a batch: by the network's own `get_embedding` where it has one."""
        return self._in_chunks(_seen_through(self.net, "get_embedding") or self.net, args, kwargs)

    def _in_chunks(self, function, args, kwargs):
        sizes: list = []
        _map(lambda x: sizes.append(x.shape[0]) if torch.is_tensor(x) and x.dim() > 0 else None, (args, kwargs))
        B = sizes[0] if sizes else 0
        copies: dict = {}
        if self.size >= B:
            return self._run(function, (args, kwargs), copies)

        def cut(start, x):
            return x[start : start + self.size] if torch.is_tensor(x) and x.shape[:1] == (B,) else x

        chunks = (_map(functools.partial(cut, start), (args, kwargs)) for start in range(0, B, self.size))
        return _map(functools.partial(_cat, B, self.size), *[self._run(function, chunk, copies) for chunk in chunks])

    def _run(self, function, inputs, copies):
        """The function of one chunk; to be run again in the backward pass, where there will be one."""
        if not torch.is_grad_enabled():
            return function(*inputs[0], **inputs[1])
        leaves: list = []  # handed over one by one: then checkpoint notices those that are changed in place meanwhile
        _map(leaves.append, inputs)

        def run(*leaves):
            rest = iter(leaves)
            args, kwargs = _map(lambda _: next(rest), inputs)
            return function(*args, **kwargs)

        contexts = contextlib.nullcontext(), _Snapshot(self, copies)
        return checkpoint(run, *leaves, use_reentrant=False, context_fn=lambda: contexts)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state dict of `net`."""
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state dict of `net`."""
        return self.net.load_state_dict(state_dict, *args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *messages):
        """As part of another module: put keys where `net` looks for them, and take messages back, `_shorten_names`."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}net.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        self._loading = prefix, messages

    def extra_repr(self) -> str:
        """The size, for `print`."""
        return f"size={self.size}"


class RandomAffine(nn.Module):
    """Augmentation while training: moves, turns, scales, shears and mirrors each image of a batch by draws of its own.

    One `grid_sample` for the batch, on its device. In evaluation mode images pass as they are, so the layer can stand
    before a network: `nn.Sequential(RandomAffine(translate=1), EmbeddingNet())`. Pixels beyond the border repeat it.

    `torch.compile` takes the layer whole, with batches of changing size; with a generator of its own, which compiled
    code cannot draw from, it breaks the graph there. Under `torch.use_deterministic_algorithms(True)` a GPU refuses
    the gradient of the *images*, which training does not ask for.

    Args:
        translate: moves by up to so many pixels along each axis, before the rest is done about the centre.
        degrees: turns by up to so many degrees either way.
        scale: enlarges or shrinks by a factor of up to 1 + scale.
        shear: shears by up to so many degrees either way.
        flip: chance of a mirror image, left and right exchanged.
        generator: `torch.Generator` for the draws, on the images' device; None: torch's global generator.

    >>> RandomAffine(translate=2, degrees=10)(torch.rand(8, 1, 28, 28)).shape
    torch.Size([8, 1, 28, 28])
    """

    def __init__(
        self,
        *,
        translate: float = 0.0,
        degrees: float = 0.0,
        scale: float = 0.0,
        shear: float = 0.0,
        flip: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.translate = translate
        self.degrees = degrees
        self.scale = scale
        self.shear = shear
        self.flip = flip
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Transform a batch of images: float (B, C, H, W) to the same; ValueError for another shape."""
        if x.dim() != 4:
            raise ValueError(f"expected images of shape (B, C, H, W), got {tuple(x.shape)}")
        if not self.training:
            return x
        B, _, H, W = x.shape
        # torch.compile cannot trace a generator argument with changing sizes, not even None.
        rand = torch.rand if self.generator is None else functools.partial(torch.rand, generator=self.generator)
        uniform = rand(6, B, 1, 1, device=x.device)
        right, down, angle, growth, slant = uniform[:5] * 2 - 1  # (B, 1, 1) each, from -1 to 1
        angle, slant = torch.deg2rad(angle * self.degrees), torch.deg2rad(slant * self.shear)
        factor = (1 + self.scale) ** growth
        mirror = torch.where(uniform[5] < self.flip, -1.0, 1.0)
        cos, sin = factor * angle.cos(), factor * angle.sin()
        # Where in the input a pixel of the output lies, in pixels from the centre. The matrix product of F.affine_grid
        # would be rounded to fractions of a pixel under autocast.
        column = torch.arange(W, device=x.device) - (W - 1) / 2  # (W,)
        row = torch.arange(H, device=x.device)[:, None] - (H - 1) / 2  # (H, 1)
        across = mirror * cos * column + (cos * slant.tan() - sin) * row + right * self.translate  # (B, H, W)
        along = mirror * sin * column + (sin * slant.tan() + cos) * row + down * self.translate
        grid = torch.stack((across * 2 / W, along * 2 / H), dim=-1)  # (B, H, W, 2)
        dtype = torch.promote_types(x.dtype, grid.dtype)  # sampling in half precision is coarse, and NaN at times
        sampled = F.grid_sample(x.to(dtype), grid.to(dtype), padding_mode="border", align_corners=False)
        return sampled.to(x.dtype)


class _ConvPReLUPool(nn.Sequential):
    """nn.Sequential that computes a max pool before the PReLU ahead of it, where that is the same function.

    PReLU with a slope above 0 is increasing, so it commutes with the maximum, and after the pool it has a quarter of
    the values to go through: that saves a third of the network's time on a CPU, where both are bound by memory. The
    gradients are the same too, up to ties that rounding makes. With a slope of 0 the gradients differ, with one below 0
    the values do. Channels-last convolutions save another fifth. Reading the slope would make a GPU wait and break a
    compiled graph, which gain little: they keep the order as written.
    """

    def forward(self, x):
        layers = list(self)
        if _is_eager_on_cpu(x):
            x = _as_channels_last(x)
            for i, (prelu, pool) in enumerate(itertools.pairwise(self)):
                is_pair = isinstance(prelu, nn.PReLU) and isinstance(pool, nn.MaxPool2d)
                if is_pair and bool((prelu.weight > 0).all()):
                    layers[i : i + 2] = pool, prelu
        for layer in layers:
            x = layer(x)
        return x


def _is_eager_on_cpu(x):
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _as_channels_last(x):
    """As x.contiguous(memory_format=torch.channels_last), which leaves a single channel as it is."""
    B, C, H, W = x.shape
    return x.permute(0, 2, 3, 1).reshape(-1).view(B, H, W, C).permute(0, 3, 1, 2)


def _max_pool_to_4x4(x):
    """As F.adaptive_max_pool2d(x, 4), also where the backward pass has to be deterministic, which that is not on CUDA.

    The way round it takes four to ten times as long on a CPU.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_max_pool2d(x, 4)
    for dim in (2, 3):
        n = x.shape[dim]
        starts, ends = [i * n // 4 for i in range(4)], [(i * n + n + 3) // 4 for i in range(4)]
        longest = max(end - start for start, end in zip(starts, ends))
        # Windows of one length, the last row or column of shorter ones repeated.
        index = [min(start + j, end - 1) for start, end in zip(starts, ends) for j in range(longest)]
        x = x.index_select(dim, torch.tensor(index, device=x.device))
    return F.max_pool2d(x, (x.shape[2] // 4, x.shape[3] // 4))


def _can_be_joined(inputs):
    first = inputs[0]
    return all(
        torch.is_tensor(x) and x.layout == torch.strided and not x.is_nested and x.dim() > 0 for x in inputs
    ) and all((x.dtype, x.device, x.shape[1:]) == (first.dtype, first.device, first.shape[1:]) for x in inputs)


class _Snapshot:
    """What a pass through a model may change besides its output: random states, modes and buffers.

    `restore()` undoes the pass. As a context it lets the pass run once more from where it began, and leaves everything
    as it is now. The second pass gets buffers of its own: changing the true ones, even back, would invalidate graphs
    that hold them. `copies`, shared by the chunks of a batch, saves the copy of a buffer that has not changed since.
    """

    def __init__(self, model, copies):
        self.model = model
        self.versions = [(x, x._version) for x in model.parameters() if not is_lazy(x) and not x.is_inference()]
        self.states = self._states()
        self.buffers = []
        for module in model.modules():
            for name, x in module._buffers.items():
                if x is None:
                    self.buffers.append((module._buffers, name, None, None))
                elif not is_lazy(x) and not x.is_inference():  # those have no value yet, or one that stays
                    if x not in copies or copies[x][0] != x._version:
                        copies[x] = x._version, x.clone()
                    self.buffers.append((module._buffers, name, x, copies[x][1]))

    def _states(self):
        """Pairs of a function that sets a state, and the state."""
        pairs: list = [
            (torch.set_rng_state, torch.get_rng_state()),
            (np.random.set_state, np.random.get_state()),
            (random.setstate, random.getstate()),
        ]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            pairs.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        for module in self.model.modules():
            pairs += [(x.set_state, x.get_state()) for x in vars(module).values() if isinstance(x, torch.Generator)]
            for name in ("training", "_joins"):
                if hasattr(module, name):
                    pairs.append((functools.partial(setattr, module, name), getattr(module, name)))
        return pairs

    @staticmethod
    def _set(states):
        for function, state in states:
            function(state)

    def restore(self):
        self._set(self.states)
        with torch.no_grad():
            for buffers, name, x, old in self.buffers:
                buffers[name] = x if old is None else x.copy_(old)

    def __enter__(self):
        if any(x._version != version for x, version in self.versions):
            raise RuntimeError("a parameter was changed in place between the forward and the backward pass of Chunked")
        self.later = self._states(), [(buffers, name, buffers[name]) for buffers, name, _, _ in self.buffers]
        self._set(self.states)
        for buffers, name, _, old in self.buffers:
            buffers[name] = old if old is None else old.clone()

    def __exit__(self, *error):
        states, buffers_now = self.later
        self._set(states)
        for buffers, name, x in buffers_now:
            buffers[name] = x


def _map(function, *trees):
    """A function of the leaves of trees of one form, of tuples, lists and dicts: a tree of that form."""
    first = trees[0]
    if isinstance(first, Mapping):
        result = copy.copy(first)
        for key in first:
            result[key] = _map(function, *(tree[key] for tree in trees))
        return result
    if isinstance(first, (tuple, list)) and not isinstance(first, PackedSequence):
        items = [_map(function, *parts) for parts in zip(*trees)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return function(*trees)


def _cat(B, size, *chunks):
    for i, x in enumerate(chunks):
        n = min(size, B - i * size)
        if not torch.is_tensor(x) or x.shape[:1] != (n,):
            got = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
            raise ValueError(f"expected an output with a row for each of the {n} samples of a chunk, got {got}")
    return torch.cat(chunks)


def _shorten_names(chunked, _):
    """Have messages of what did not fit name keys as they are in the file, without `net.`."""
    prefix, messages = vars(chunked).pop("_loading")
    inner = f"{prefix}net."
    for names in messages:
        names[:] = [
            prefix + name.removeprefix(inner) if name.startswith(inner) else name.replace(f" {inner}", f" {prefix}")
            for name in names
        ]


def _seen_through(net, name):
    """An attribute of a network, or of the one inside its wrappers; None where there is none."""
    while net is not None:
        value = getattr(net, name, None)
        if value is not None:
            return value
        if isinstance(net, (nn.DataParallel, DistributedDataParallel, AveragedModel)):
            net = net.module
        else:
            net = net.net if isinstance(net, Chunked) else getattr(net, "_orig_mod", None)
    return None


def _embedding_dim_of(embedding_net):
    width = _seen_through(embedding_net, "embedding_dim")
    width = width if width and isinstance(width, int) else _width_of_last_linear(embedding_net)
    if width is None:
        name = type(embedding_net).__name__
        raise ValueError(f"{name} has no embedding_dim and no nn.Linear: say ClassificationNet(..., embedding_dim=D)")
    return width


def _width_of_last_linear(module):
    """Outputs of the last dense layer, None where there is none."""
    widths = [layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear)]
    return widths[-1] if widths else None
