"""Data: pairs and triplets of any labelled dataset, balanced batches, a dataset held in memory.

The wrappers take a map-style dataset of `(x, label)`: torchvision's, ImageFolder, Subset, your own. A dataset held in
memory is indexed by a list, so a loader gets whole batches without a loop over samples:

    sampler = BalancedBatchSampler(train.targets, n_classes=10, n_samples=25)  # train = InMemoryDataset(...)
    loader = DataLoader(train, sampler=sampler, batch_size=None)
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, Dataset, IterableDataset, Subset, get_worker_info


class _Tuples(Dataset):
    """What pairs and triplets share: labels, draws, and everything else that the wrapped dataset has."""

    mnist_dataset: Any

    def __init__(self, mnist_dataset: Any, *, train: bool | None = None) -> None:
        self.train = _is_training(mnist_dataset) if train is None else train
        self.mnist_dataset = mnist_dataset.mnist_dataset if isinstance(mnist_dataset, _Tuples) else mnist_dataset
        # Made now: errors come at once, and the workers of a loader share what is drawn and what is fixed.
        _ = self._partners, self._draws if self.train else self._fixed

    def __len__(self) -> int:
        return len(self.mnist_dataset)

    def __getattr__(self, name: str) -> Any:
        # Nothing private: by the `__getitems__` of a wrapped Subset, a loader would fetch plain samples. And nothing
        # while there is no dataset yet, as in unpickling.
        if name.startswith("_") or "mnist_dataset" not in vars(self):
            return object.__getattribute__(self, name)  # raises; for a property that failed, its own error
        return getattr(self.mnist_dataset, name)

    @cached_property
    def labels_set(self) -> set:
        """The distinct labels."""
        return set(self._partners.names)

    @cached_property
    def label_to_indices(self) -> dict[Any, np.ndarray]:
        """The indices of the samples of each label."""
        return dict(zip(self._partners.names, _indices_of_classes(self._partners.class_of)))

    @cached_property
    def _partners(self):
        return _Partners(_labels_of(self.mnist_dataset))

    @cached_property
    def _draws(self):
        return _Draws(len(self), width=3)

    def _rows(self, index):
        """For each item a row (n, 3), the anchor first: what `_draw` gives, or `_fixed` has."""
        indices = _as_indices(index, len(self))
        return self._draw(indices, self._draws(indices)) if self.train else np.asarray(self._fixed)[indices]

    def _read(self, samples, index):
        """The x of the samples (n, m): m batches of n, or m single ones for the index of one item."""
        if _is_single(index):
            return tuple(self.mnist_dataset[i][0] for i in samples[0].tolist())
        return tuple(self.mnist_dataset[column.tolist()][0] for column in samples.T)


class SiameseDataset(_Tuples):
    """Pairs of a labelled dataset: item i is `((x_i, x_j), target)`, target 1 for the same class and 0 for another.

    Training: a fresh draw at every access, target 1 or 0 with probability 1/2 each, then j uniform among the other
    samples of the class, or another class and a sample of it, each uniform. Evaluation: fixed pairs, half of each kind
    in random order, deterministic, the same on every machine; they are the rows `[i, j, target]` of `test_pairs`.

    In the main process draws come from torch's global generator. In a loader's workers they depend only on the
    loader's seed and the index, so not on the number of workers, as long as an index comes once an epoch.
    `torch.manual_seed` governs both; in workers a dataset used again under the same seed continues its draws. Two
    loaders that take turns and keep their workers want a dataset each, such as a deep copy.

    Args:
        mnist_dataset: any map-style dataset of `(x, label)`, with at least two classes of at least two samples each. Of
            a dataset of pairs or triplets, the dataset in it.
        train: draw afresh (True) or fix the pairs (False); by default the dataset's own `train`, or True. A Subset's is
            that of its parent: for a validation part of a training set say `train=False`.

    Attributes:
        labels_set: set of the distinct labels.
        label_to_indices: dict from each label to the indices of its samples.
        others: those of the wrapped dataset, such as `transform` or `classes`.

    Raises:
        ValueError: one class only, or classes with a single sample, which are named; labels that are NaN.
        TypeError: no map-style dataset of `(x, label)`.

    Index with a list where the dataset takes one (InMemoryDataset) for a whole batch: `((X_i, X_j), targets)`, the
    targets int64 (n,) on the data's device.
    """

    def __getitem__(self, index: Any) -> tuple[tuple[Any, Any], Any]:
        rows = self._rows(index)  # (n, 3)
        x1, x2 = self._read(rows[:, :2], index)
        if _is_single(index):
            return (x1, x2), int(rows[0, 2])
        return (x1, x2), torch.as_tensor(rows[:, 2], device=x1.device if torch.is_tensor(x1) else "cpu")

    @cached_property
    def test_pairs(self) -> np.ndarray:
        """The fixed pairs of evaluation, int64 (N, 3): rows `[i, j, target]`."""
        fixed = np.random.RandomState(29)  # a stream that numpy has frozen
        indices = np.arange(len(self))
        is_positive = fixed.permutation(indices % 2)
        return self._draw(indices, fixed.random_sample((len(self), 3)), is_positive)

    @property
    def _fixed(self):
        return self.test_pairs

    def _draw(self, indices, uniform, is_positive=None):
        is_positive = uniform[:, 2] < 0.5 if is_positive is None else is_positive
        positive = self._partners.same_class(indices, uniform[:, 0])
        negative = self._partners.other_class(indices, uniform[:, 0], uniform[:, 1])
        return np.array((indices, np.where(is_positive, positive, negative), is_positive)).T  # (n, 3)


class TripletDataset(_Tuples):
    """Triplets of a labelled dataset: item i is `((x_i, x_positive, x_negative), [])`; every sample is an anchor once.

    The positive is uniform among the other samples of the class; for the negative another class and a sample of it are
    drawn, each uniform. The second part is empty, since a triplet needs no target; `fit` leaves it out.

    Training and evaluation, draws, arguments, attributes and errors are those of `SiameseDataset`; the fixed triplets
    of evaluation are the rows `[i, positive, negative]` of `test_triplets`.
    """

    def __getitem__(self, index: Any) -> tuple[tuple[Any, Any, Any], list]:
        anchor, positive, negative = self._read(self._rows(index), index)
        return (anchor, positive, negative), []

    @cached_property
    def test_triplets(self) -> np.ndarray:
        """The fixed triplets of evaluation, int64 (N, 3): rows `[i, positive, negative]`."""
        fixed = np.random.RandomState(29)  # a stream that numpy has frozen
        return self._draw(np.arange(len(self)), fixed.random_sample((len(self), 3)))

    @property
    def _fixed(self):
        return self.test_triplets

    def _draw(self, indices, uniform):
        positive = self._partners.same_class(indices, uniform[:, 0])
        negative = self._partners.other_class(indices, uniform[:, 1], uniform[:, 2])
        return np.array((indices, positive, negative)).T  # (n, 3)


SiameseMNIST = SiameseDataset
TripletMNIST = TripletDataset


class BalancedBatchSampler(BatchSampler):
    """Batches of `n_classes` classes with `n_samples` samples each; give it to a DataLoader as `batch_sampler`.

    Classes are dealt like cards: each once before any twice, none twice in a batch; the samples of a class likewise, so
    that an epoch of balanced data holds every sample, as far as whole batches go. A class with fewer than `n_samples`
    samples gives some of them more than once. An epoch is `len(labels) // (n_classes * n_samples)` batches. Iterators
    are independent.

    Several processes, each with its `rank`, get batches of their own, dealt from the same cards: each class to one of
    them before any to two, and no sample to two in a step, unless its class has too few. An epoch is
    `len(labels) // (num_replicas * n_classes * n_samples)` batches for each.

    Args:
        labels: one for each sample; list, array or tensor, (N,) or (N, 1), of numbers or strings. Or a dataset of
            `(x, label)`, whose labels are taken.
        n_classes: classes a batch, C at most.
        n_samples: samples a class.
        generator: `torch.Generator` that seeds each iterator; None: torch's global generator.
        num_replicas, rank: how many processes draw, and the number of this one from 0; None for one.
        seed: in place of a generator, the same in all processes: an epoch's batches then depend on it and on the number
            given to `set_epoch`. None with several processes is 0.

    Attributes:
        labels, labels_set, label_to_indices, n_dataset, n_classes, n_samples, batch_size: the labels, their distinct
            ones (list), the indices of each (dict), and numbers. Batches are drawn from the last six, as they stand
            when an iterator begins: a subclass may set them as it likes.
        used_label_indices_count, count: zeros, for subclasses that count with them.

    Raises:
        ValueError: fewer classes than `n_classes`, fewer labels than the batches of a step have, a rank that is none of
            0 to `num_replicas` - 1, both generator and seed, or labels that are NaN.
        TypeError: neither labels nor a map-style dataset.

    >>> sampler = BalancedBatchSampler([0, 0, 1, 1, 2, 2], n_classes=3, n_samples=1)
    >>> [sorted(i // 2 for i in batch) for batch in sampler]
    [[0, 1, 2], [0, 1, 2]]
    """

    # For subclasses that do not call our `__init__`.
    generator: torch.Generator | None = None
    num_replicas, rank = 1, 0
    seed: int | None = None
    epoch = 0
    drop_last = True

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
        if generator is not None and (seed is not None or num_replicas is not None):
            raise ValueError("give several processes a seed, not a generator; and not both")
        if num_replicas is not None or rank is not None:
            if num_replicas is None or rank is None or not 0 <= rank < num_replicas:
                given = f"{rank} and num_replicas={num_replicas}"
                raise ValueError(f"expected rank from 0 to num_replicas - 1, got {given}")
            self.num_replicas, self.rank = num_replicas, rank
        self.labels = labels if _is_labels(labels) else _labels_of(labels)
        class_of, self.labels_set = _class_numbers(self.labels)
        self.label_to_indices = dict(zip(self.labels_set, _indices_of_classes(class_of)))
        self.used_label_indices_count = dict.fromkeys(self.labels_set, 0)
        self.count = 0
        self.n_classes, self.n_samples = n_classes, n_samples
        self.n_dataset, self.batch_size = len(class_of), n_samples * n_classes
        self.generator = generator
        self.seed = 0 if seed is None and num_replicas is not None else seed
        self._check()

    def _check(self):
        if self.n_classes < 1 or self.n_samples < 1:
            raise ValueError(f"expected n_classes and n_samples of at least 1, got {self.n_classes}, {self.n_samples}")
        if self.n_classes > len(self.labels_set):
            raise ValueError(f"n_classes={self.n_classes}, but the labels have {len(self.labels_set)} classes")
        if len(self) == 0:
            batch = f"{self.n_classes} x {self.n_samples}"
            batch += f" in {self.num_replicas} processes" if self.num_replicas > 1 else ""
            raise ValueError(f"a batch of {batch} exceeds the {self.n_dataset} samples")

    def __len__(self) -> int:
        return self.n_dataset // (self.num_replicas * self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the batches of an epoch, where there is a seed; `fit` does so before each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Yield batches, each a list of ints."""
        self._check()  # again: what a subclass has set
        rng, labels = self._new_rng(), list(self.labels_set)
        classes = _Deck(np.arange(len(labels)), rng)
        samples_of = [_Deck(np.asarray(self.label_to_indices[label]), rng) for label in labels]
        for _ in range(len(self)):
            hands = [classes.deal(self.n_classes).tolist() for _ in range(self.num_replicas)]  # one for each process
            counts = Counter(itertools.chain(*hands))
            # A class that several processes have is dealt to them together, so that they share no sample.
            dealt = {c: np.split(samples_of[c].deal(n * self.n_samples), n) for c, n in counts.items()}
            batches = [[dealt[c].pop() for c in hand] for hand in hands]
            yield np.concatenate(batches[self.rank]).tolist()

    def _new_rng(self):
        if self.seed is not None:
            return np.random.default_rng((self.seed, self.epoch))
        device = "cpu" if self.generator is None else self.generator.device
        return np.random.default_rng(int(torch.randint(2**62, (), generator=self.generator, device=device)))


class InMemoryDataset(Dataset):
    """A dataset as two tensors, its transform applied once to every sample.

    Args:
        dataset: a map-style dataset of `(x, label)`, x tensors of one shape, labels whole numbers.
        device: where to keep the tensors; by default the CPU.

    Attributes:
        data: tensor (N, ...) of all x. Where these differ in dtype, one that holds all their values exactly.
        targets: int64 tensor (N,).
        train: the dataset's own, or True.

    Raises:
        TypeError: where x is no tensor.
        ValueError: an empty dataset, x of different shapes, labels that are not whole numbers, or values of several
            dtypes that none holds exactly.

    Index with a number for a sample, with a slice, list, array or tensor of numbers for a batch (n, ...), (n,).
    """

    data: Tensor

    def __init__(self, dataset: Any, device: torch.device | str | None = None) -> None:
        if len(dataset) == 0:
            raise ValueError("the dataset is empty")
        labels = []
        for i in range(len(dataset)):
            item = dataset[i]
            labels.append(_whole_number(_label_of(item)))
            self._put(i, item[0], len(dataset))
        device = "cpu" if device is None else device
        self.data, self.targets = self.data.to(device), torch.tensor(labels, dtype=torch.int64, device=device)
        self.train = _is_training(dataset)

    def _put(self, i, x, n):
        """Write sample i of n."""
        if not torch.is_tensor(x):
            raise TypeError(f"expected tensors, got {type(x).__name__}: give the dataset transform=ToTensor()")
        x = x.detach().cpu()
        if i == 0:
            self.data = torch.empty(n, *x.shape, dtype=x.dtype, device="cpu")
        if x.shape != self.data.shape[1:]:
            shapes = f"{tuple(self.data.shape[1:])} and {tuple(x.shape)}"
            raise ValueError(f"expected one shape, got {shapes}: give the dataset a transform that resizes")
        if x.dtype != self.data.dtype:
            self.data = self.data.to(_common_dtype(self.data[:i], x))
        self.data[i] = x

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(index, (int, slice)):
            index = torch.as_tensor(index, device=self.data.device)
        return self.data[index], self.targets[index]


class _Partners:
    """Same-class and other-class partners of samples, from uniform numbers in [0, 1), in O(1) for each."""

    def __init__(self, labels):
        self.class_of, self.names = _class_numbers(labels)  # (N,), C
        if len(self.names) < 2:
            raise ValueError(f"pairs and triplets need at least 2 classes, got {len(self.names)}")
        self.count = np.bincount(self.class_of)  # (C,)
        if self.count.min() < 2:
            singles = [str(name) for name, count in zip(self.names, self.count) if count < 2]
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

    A loader's workers each have a generator of their own, seeded by their number: with those, draws would depend on the
    number of workers. So in a worker an index draws from the loader's seed, the index, and how often it was drawn under
    that seed. The workers share these counts, since persistent ones keep their seed from epoch to epoch; an epoch of
    another seed starts them anew. A copy shares its counts with its own workers.
    """

    def __init__(self, n, width):
        self.width = width
        self.seed_and_count = torch.zeros(n, 2, dtype=torch.int64, device="cpu")
        self._share()

    def __setstate__(self, state):
        vars(self).update(state)
        self._share()

    def _share(self):
        # What is made or copied within a worker is that worker's alone.
        self.is_shared = get_worker_info() is None
        if self.is_shared:
            self.seed_and_count.share_memory_()

    def __call__(self, indices):
        worker = get_worker_info()
        if worker is None or not self.is_shared:
            return torch.rand(len(indices), self.width, dtype=torch.float64, device="cpu").numpy()
        seed = worker.seed - worker.id
        return np.stack([self._in_worker(seed, int(i)) for i in indices])

    def _in_worker(self, seed, i):
        last_seed, count = self.seed_and_count[i].tolist()
        count = count + 1 if last_seed == seed else 0
        self.seed_and_count[i] = torch.tensor([seed, count], device="cpu")
        return np.random.default_rng((seed, i, count)).random(self.width)


class _Deck:
    """Cards dealt without end: every card once before any twice, none twice in a hand of at most all of them."""

    def __init__(self, cards, rng):
        if len(cards) == 0:
            raise ValueError("a class has no samples to draw from")
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
    """Class of each sample as 0 .. C-1 (N,), and a list of the labels that these stand for."""
    labels = _as_array(labels)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"expected one label for each sample, shape (N,), got {labels.shape}")
    try:
        if (labels != labels).any():
            raise ValueError("a label is NaN, which is no class")
        names, class_of = np.unique(labels, return_inverse=True)
    except TypeError as error:
        kinds = ", ".join(sorted({type(label).__name__ for label in labels}))
        raise ValueError(f"expected labels that can be compared, got {kinds}") from error
    return class_of, names.tolist()


def _indices_of_classes(class_of):
    """For each class the indices of its samples, a list of C arrays."""
    return np.split(np.argsort(class_of, kind="stable"), np.cumsum(np.bincount(class_of))[:-1])


def _as_array(labels):
    """Labels as an array: (N,) where there is one for each sample."""
    if torch.is_tensor(labels):
        labels = labels.tolist()
    elif isinstance(labels, (list, tuple)):
        labels = [label.tolist() if torch.is_tensor(label) else label for label in labels]
        if any(isinstance(label, str) for label in labels):
            return np.asarray(labels, dtype=object)  # or numpy would make a string of everything, NaN and None as well
    try:
        labels = np.asarray(labels)
    except ValueError as error:
        raise ValueError("expected one label for each sample, got several, not even equally many") from error
    return labels.reshape(-1) if labels.ndim and labels.size == len(labels) else labels


def _is_labels(labels):
    """Whether these are labels, rather than a dataset: a list of tuples `(x, label)` is a dataset, too."""
    if isinstance(labels, (list, tuple)):
        return not (labels and isinstance(labels[0], tuple))
    return not isinstance(labels, Dataset) and (hasattr(labels, "__array__") or isinstance(labels, Sequence))


def _labels_of(dataset):
    """The labels of a dataset (N,), read without decoding its samples where it says them."""
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        hint = "; of a loader give its dataset" if hasattr(dataset, "dataset") else ""
        raise TypeError(f"expected a map-style dataset of (x, label), got {type(dataset).__name__}{hint}")
    if isinstance(dataset, _Tuples):
        raise TypeError(f"expected a dataset of (x, label), got {type(dataset).__name__}: give the one in it")
    if isinstance(dataset, Subset):
        return _labels_of(dataset.dataset)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([_labels_of(part) for part in dataset.datasets])
    own = ("train_labels", "test_labels")  # torchvision's of old, which may hold both
    for name in ("targets", "labels", *(own if _is_training(dataset) else own[::-1])):
        labels = getattr(dataset, name, None)
        if _is_labels(labels) and len(labels) == len(dataset):
            labels = _as_array(labels)
            transform = getattr(dataset, "target_transform", None)
            return labels if transform is None else _as_array([transform(label) for label in labels.tolist()])
    return _as_array([_label_of(dataset[i]) for i in range(len(dataset))])


def _label_of(item):
    try:
        return item[1]
    except (TypeError, LookupError) as error:
        raise TypeError(f"expected samples (x, label), got {type(item).__name__}") from error


def _whole_number(label):
    value = _as_array(label)
    if value.dtype.kind not in "biu" or value.size != 1 or value.item() >= 2**63:
        raise ValueError(f"expected one whole number as label of each sample, got {label!r}")
    return int(value.item())


def _common_dtype(a, b):
    """The first of several dtypes that holds the values of both exactly."""
    try:
        candidates = [torch.promote_types(a.dtype, b.dtype)]
    except RuntimeError:  # torch promotes uint16, uint32 and uint64 with no other whole numbers
        candidates = []
    for dtype in (*candidates, torch.int64, torch.float32, torch.float64, torch.complex128):
        if _holds(dtype, a) and _holds(dtype, b):
            return dtype
    raise ValueError(f"no dtype holds the values of both {a.dtype} and {b.dtype} exactly")


def _holds(dtype, x):
    """Whether a dtype holds all values of x exactly."""
    if not torch.can_cast(x.dtype, dtype):
        return False
    if x.dtype == dtype or x.is_complex():
        return True
    y = x.to(dtype).real
    is_same = (y.to(x.dtype) == x) | (x != x)
    return bool(is_same.all()) and (x.dtype.is_signed or bool((y >= 0).all()))  # beyond 2**63 uint64 comes back as well


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
    if len(indices) and indices.dtype.kind not in "iu":
        raise IndexError(f"expected whole numbers as indices, got {indices.dtype}")
    if len(indices) and not (-n <= indices.min() and indices.max() < n):
        raise IndexError(f"index out of range for {n} samples")
    return indices.astype(np.int64) % n
