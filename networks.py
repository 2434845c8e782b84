"""Embedding networks, and the wrappers that train one as a classifier, on pairs or on triplets.

Every class has `get_embedding(x)`, the embeddings (B, D) of a batch. The wrappers take any embedding network:

    model = TripletNet(EmbeddingNet(embedding_dim=64))
    anchor, positive, negative = model(x_anchor, x_positive, x_negative)
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EmbeddingNet(nn.Module):
    """Two convolutions and three dense layers with PReLUs between, as in the original.

    Conv 5x5x32, PReLU, max pool 2, conv 5x5x64, PReLU, max pool 2, pooled further to 4 x 4 where the image is larger
    than 28 x 28, dense 256, PReLU, dense 256, PReLU, dense `embedding_dim`.

    Args:
        embedding_dim: D, length of an embedding.
        in_channels: channels of the image.
        dropout: share of the convolutions' output that is dropped while training; the original has none.

    >>> EmbeddingNet()(torch.zeros(8, 1, 28, 28)).shape
    torch.Size([8, 2])
    """

    def __init__(self, embedding_dim: int = 2, in_channels: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_channels = in_channels
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
        in_channels = getattr(self.convnet[0], "in_channels", self.in_channels)  # of a layer put in its place, too
        if x.dim() != 4 or x.shape[1] != in_channels or min(x.shape[2:]) < 28:
            expected = f"(B, {in_channels}, H, W) with H and W at least 28"
            raise ValueError(f"expected images of shape {expected}, got {tuple(x.shape)}")
        x = self.convnet(x)  # (B, 64, h, w)
        dense = [layer for layer in self.fc.modules() if isinstance(layer, nn.Linear)]
        if dense and x.shape[1:].numel() != dense[0].in_features:
            x = F.adaptive_max_pool2d(x, 4)  # (B, 64, 4, 4)
        x = F.dropout(x.flatten(start_dim=1), self.dropout, self.training)
        return self.fc(x)  # (B, D)

    def get_embedding(self, x: Tensor) -> Tensor:
        """Embeddings (B, D) of a batch: the same as calling the network."""
        return self(x)

    @property
    def embedding_dim(self) -> int | None:
        """D, the width of the last dense layer, also of one put in its place; None where there is none."""
        return _width_of_last_linear(self.fc)


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
        return F.log_softmax(self.fc1(self.get_embedding(x)), dim=-1)

    def get_embedding(self, x: Tensor) -> Tensor:
        """What the dense layer sees: the embedding after its PReLU, (B, D)."""
        return self.nonlinear(self.embedding_net(x))


class SiameseNet(nn.Module):
    """One embedding network for the two inputs of a pair. Train it with `ContrastiveLoss`.

    Args:
        embedding_net: any module from a batch to (B, D).

    >>> x1, x2 = SiameseNet(EmbeddingNet())(torch.zeros(8, 1, 28, 28), torch.zeros(8, 1, 28, 28))
    >>> x1.shape, x2.shape
    (torch.Size([8, 2]), torch.Size([8, 2]))
    """

    def __init__(self, embedding_net: nn.Module) -> None:
        super().__init__()
        self.embedding_net = embedding_net

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of both inputs, a tuple of two (B, D)."""
        return _embed_together(self.embedding_net, x1, x2)

    def get_embedding(self, x: Tensor) -> Tensor:
        """Embeddings (B, D) of a batch."""
        return self.embedding_net(x)


class TripletNet(nn.Module):
    """One embedding network for the three inputs of a triplet. Train it with `TripletLoss`.

    Args:
        embedding_net: any module from a batch to (B, D).

    >>> len(TripletNet(EmbeddingNet())(*torch.zeros(3, 8, 1, 28, 28)))
    3
    """

    def __init__(self, embedding_net: nn.Module) -> None:
        super().__init__()
        self.embedding_net = embedding_net

    def forward(self, x1: Tensor, x2: Tensor, x3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of anchor, positive and negative, a tuple of three (B, D)."""
        return _embed_together(self.embedding_net, x1, x2, x3)

    def get_embedding(self, x: Tensor) -> Tensor:
        """Embeddings (B, D) of a batch."""
        return self.embedding_net(x)


class RandomAffine(nn.Module):
    """Augmentation while training: moves, turns, scales, shears and mirrors each image of a batch by draws of its own.

    One `grid_sample` for the batch, on its device. In evaluation mode images pass as they are, so the layer can stand
    before a network: `nn.Sequential(RandomAffine(translate=1), EmbeddingNet())`. What comes in from outside has the
    value of the image's edge.

    Args:
        translate: moves by up to so many pixels along each axis, before the rest is done about the centre.
        degrees: turns by up to so many degrees either way.
        scale: enlarges or shrinks by a factor of up to 1 + scale.
        shear: shears by up to so many degrees either way.
        flip: chance of a mirror image, left and right exchanged.
        generator: `torch.Generator` for the draws, on the images' device; None draws from torch's own, which
            `torch.manual_seed` governs.

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
        uniform = torch.rand(6, B, 1, 1, device=x.device, generator=self.generator)
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


def _embed_together(embedding_net, *inputs):
    """One pass over the concatenated inputs: faster than one each, and batch norm sees the whole batch once."""
    embeddings = embedding_net(torch.cat(inputs))
    ends = itertools.accumulate(len(x) for x in inputs)
    # Slices, since the parts of a split would refuse changes in place.
    return tuple(embeddings[end - len(x) : end] for x, end in zip(inputs, ends))


def _embedding_dim_of(embedding_net):
    width = getattr(embedding_net, "embedding_dim", None) or _width_of_last_linear(embedding_net)
    if width is None:
        name = type(embedding_net).__name__
        raise ValueError(f"{name} has no embedding_dim and no nn.Linear: say ClassificationNet(..., embedding_dim=D)")
    return width


def _width_of_last_linear(module):
    """Outputs of the last dense layer, None where there is none."""
    widths = [layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear)]
    return widths[-1] if widths else None
