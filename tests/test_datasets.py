"""Tests of datasets.py. In the made-up data x is the sample's own number, so an item says which samples it is of."""

import copy
import io
import math
import pickle
import random
import tracemalloc
from collections import Counter, namedtuple
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)
from torchvision.datasets import MNIST, ImageFolder
from torchvision.transforms import PILToTensor

from datasets import BalancedBatchSampler, InMemoryDataset, SiameseDataset, SiameseMNIST, TripletDataset, TripletMNIST

both_wrappers = pytest.mark.parametrize("wrapper", [SiameseMNIST, TripletMNIST])
both_modes = pytest.mark.parametrize("train", [True, False])
# Warnings of a machine with fewer cores than workers, and of the way in which Python 3.12 and 3.13 start them.
starts_workers = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning", "ignore:This process .* is multi-threaded:DeprecationWarning"
)

LABELS = [0] * 2 + [1] * 3 + [2] * 5 + [3] * 10
LABELS = [LABELS[7 * i % 20] for i in range(20)]  # out of order


class Numbered(Dataset):
    """Sample i is `(render(i), class_of[i])`; keywords become attributes, such as `targets` or `train`."""

    def __init__(self, class_of, render=float, **attributes):
        self.class_of = class_of
        self.render = render
        self.n_reads = 0
        vars(self).update(attributes)

    def __len__(self):
        return len(self.class_of)

    def __getitem__(self, i):
        self.n_reads += 1
        return self.render(i), self.class_of[i]


class Unreadable(Numbered):
    """Tells its labels, and fails where a sample is read."""

    def __getitem__(self, i):
        raise AssertionError("a sample was read")


def as_rgb_image(i):
    return PILToTensor()(Image.new("RGB", (9, 7), (i, i, i)))


def as_channel_last_array(i):
    return np.full((7, 9, 3), i, dtype=np.uint8)


def as_tensor(i):
    return torch.full((3, 7, 9), float(i))


def number(x):
    return int(np.asarray(x).flat[0])


def partners(item):
    """`(anchor, other, whether they should be of one class)` for each partner in an item."""
    xs, target = item
    anchor, *others = (number(x) for x in xs)
    should_be_same = [True, False] if len(others) == 2 else [target == 1]
    return [(anchor, other, same) for other, same in zip(others, should_be_same)]


def assert_partners_are_right(dataset, class_of):
    for i in range(len(dataset)):
        for anchor, other, should_be_same in partners(dataset[i]):
            assert anchor == number(dataset.mnist_dataset[i][0])
            assert other != anchor
            assert (class_of(other) == class_of(anchor)) == should_be_same


def contents(dataset):
    return [partners(dataset[i]) for i in range(len(dataset))]


def assert_drawn_with(shares, observed):
    """Chi-square test; chance alone exceeds the critical value in less than one of 10,000 runs."""
    counts = Counter(observed)
    assert counts.keys() == shares.keys()
    expected = {outcome: share * counts.total() for outcome, share in shares.items()}
    statistic = sum((counts[outcome] - e) ** 2 / e for outcome, e in expected.items())
    degrees = len(shares) - 1
    assert statistic < degrees + 6 * math.sqrt(2 * degrees) + 8


# --- pairs and triplets


def test_original_names_are_the_datasets():
    assert SiameseMNIST is SiameseDataset
    assert TripletMNIST is TripletDataset


@both_wrappers
@both_modes
def test_every_sample_is_an_anchor_with_the_right_partners(wrapper, train):
    dataset = wrapper(Numbered(LABELS, train=train))
    assert len(dataset) == len(LABELS)
    assert [number(dataset[i][0][0]) for i in range(len(dataset))] == list(range(len(dataset)))
    for _ in range(10):
        assert_partners_are_right(dataset, LABELS.__getitem__)


def test_items_have_the_original_form():
    (x1, x2), target = SiameseMNIST(Numbered(LABELS))[0]
    assert (type(x1), type(x2)) == (float, float)
    assert type(target) is int
    triplet, target = TripletMNIST(Numbered(LABELS))[0]
    assert (type(triplet), len(triplet), target) == (tuple, 3, [])


@both_wrappers
def test_items_are_drawn_afresh_at_every_access(wrapper):
    dataset = wrapper(Numbered(LABELS))
    for i in range(len(dataset)):
        assert len({str(dataset[i]) for _ in range(40)}) > 1


def test_siamese_partners_are_uniform():
    torch.manual_seed(1)
    dataset = SiameseMNIST(Numbered(LABELS))
    anchor = LABELS.index(2)
    items = [dataset[anchor] for _ in range(4000)]
    assert_drawn_with({0: 0.5, 1: 0.5}, [target for _, target in items])
    positives = {j: 1 / 4 for j in range(20) if LABELS[j] == 2 and j != anchor}
    assert_drawn_with(positives, [number(x2) for (_, x2), target in items if target == 1])
    negatives = {j: 1 / 3 / LABELS.count(LABELS[j]) for j in range(20) if LABELS[j] != 2}
    assert_drawn_with(negatives, [number(x2) for (_, x2), target in items if target == 0])


def test_triplet_partners_are_uniform():
    torch.manual_seed(2)
    dataset = TripletMNIST(Numbered(LABELS))
    anchor = LABELS.index(1)
    triplets = [dataset[anchor][0] for _ in range(4000)]
    positives = {j: 1 / 2 for j in range(20) if LABELS[j] == 1 and j != anchor}
    assert_drawn_with(positives, [number(positive) for _, positive, _ in triplets])
    negatives = {j: 1 / 3 / LABELS.count(LABELS[j]) for j in range(20) if LABELS[j] != 1}
    assert_drawn_with(negatives, [number(negative) for _, _, negative in triplets])


@both_wrappers
def test_every_item_can_be_iterated_and_indexed_from_the_end(wrapper):
    dataset = wrapper(Numbered(LABELS), train=False)
    with pytest.raises(IndexError, match="20 samples"):
        dataset[len(dataset)]  # which is what ends a loop over it
    assert [partners(item) for item in dataset] == contents(dataset)
    assert partners(dataset[-1]) == partners(dataset[len(dataset) - 1])


# --- evaluation


def fixed_partners():
    """What the evaluation pairs and triplets of a small data set with names for labels are."""
    data = Numbered([f"class {i % 3}" for i in range(9)], train=False)
    return [
        [other for _, other, _ in item] for wrapper in (SiameseMNIST, TripletMNIST) for item in contents(wrapper(data))
    ]


@both_wrappers
def test_evaluation_items_are_fixed(wrapper):
    first = wrapper(Numbered(LABELS, train=False))
    expected = contents(first)
    torch.manual_seed(1234)
    np.random.seed(1234)
    assert contents(first) == expected
    assert contents(wrapper(Numbered(LABELS, train=False))) == expected


def test_evaluation_items_are_those_of_earlier_versions():
    siamese = [[4], [7], [5], [4], [6], [1], [8], [4], [5]]
    triplets = [[6, 1], [7, 3], [8, 7], [0, 7], [7, 3], [8, 6], [3, 2], [4, 8], [2, 7]]
    assert fixed_partners() == siamese + triplets


@both_wrappers
@both_modes
def test_construction_leaves_global_generators_alone(wrapper, train):
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    dataset = wrapper(Numbered(LABELS, train=train))
    if not train:
        contents(dataset)
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert str(before[1:]) == str(after[1:])


@both_wrappers
def test_evaluation_positive_is_never_the_anchor(wrapper):
    dataset = wrapper(Numbered([i % 50 for i in range(100)], train=False))
    for anchor, other, should_be_same in chain(*contents(dataset)):
        assert not should_be_same or other == (anchor + 50) % 100


def test_evaluation_pairs_are_half_positive_in_mixed_order():
    dataset = SiameseMNIST(Numbered([i % 4 for i in range(400)], train=False))
    targets = [dataset[i][1] for i in range(400)]
    assert sum(targets) == 200
    assert 60 < sum(targets[:200]) < 140
    changes = sum(a != b for a, b in pairwise(targets))
    assert 120 < changes < 280  # neither in two blocks nor in turn


@both_wrappers
def test_train_keyword_overrides_the_dataset(wrapper):
    for train_of_data in (True, False):
        data = Numbered(LABELS, train=train_of_data)
        fixed, fresh = wrapper(data, train=False), wrapper(data, train=True)
        assert contents(fixed) == contents(fixed)
        assert contents(fresh) != contents(fresh)


@both_wrappers
def test_train_of_the_dataset_is_seen_through_subsets(wrapper):
    for train in (True, False):
        dataset = wrapper(Subset(Subset(Numbered(LABELS, train=train), range(19)), range(18)))
        assert (contents(dataset) != contents(dataset)) == train
    unsaid = wrapper(Numbered(LABELS))
    assert contents(unsaid) != contents(unsaid)


# --- requests that cannot be met


@both_wrappers
@both_modes
def test_single_sample_class_is_named(wrapper, train):
    with pytest.raises(ValueError, match=r"at least 2 samples.*: dog, fox$"):
        wrapper(Numbered(["cat", "dog", "cat", "emu", "emu", "fox"]), train=train)


def test_many_single_sample_classes_are_counted():
    with pytest.raises(ValueError, match=r"c10.*and 90 more"):
        SiameseMNIST(Numbered([f"c{i}" for i in range(10, 110)]))


@both_wrappers
@both_modes
def test_one_class_is_an_error(wrapper, train):
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        wrapper(Numbered([5, 5, 5]), train=train)


# --- any data


def mod_3(n):
    return [i % 3 for i in range(n)]


ANY_DATA = {
    "RGB images": Numbered(mod_3(12), as_rgb_image),
    "channel-last arrays": Numbered(mod_3(12), as_channel_last_array),
    "float tensors": Numbered(mod_3(12), as_tensor),
    "tensor labels": Numbered(list(torch.tensor(mod_3(12))), as_tensor),
    "TensorDataset": TensorDataset(torch.arange(12.0), torch.tensor(mod_3(12))),
    "Subset": Subset(Numbered(mod_3(12), targets=mod_3(12)), [11, 2, 5, 7, 4, 0, 3]),
    "ConcatDataset": ConcatDataset([Numbered(mod_3(12)), Subset(Numbered(mod_3(12), as_tensor), [7, 8, 9])]),
}


@both_wrappers
@both_modes
@pytest.mark.parametrize("data", ANY_DATA.values(), ids=ANY_DATA)
def test_any_data_can_be_paired(wrapper, train, data):
    dataset = wrapper(data, train=train)
    assert len(dataset) == len(data)
    if isinstance(data, ConcatDataset):  # 7, 8 and 9 are in it twice
        assert all((a % 3 == b % 3) == same for a, b, same in chain(*contents(dataset)))
    else:
        assert_partners_are_right(dataset, lambda i: i % 3)


def test_samples_come_as_the_dataset_gives_them():
    (x1, x2), _ = SiameseMNIST(Numbered(LABELS, as_channel_last_array))[3]
    assert isinstance(x1, np.ndarray)
    assert (x1.shape, x2.shape, x1.dtype) == ((7, 9, 3), (7, 9, 3), np.uint8)


@both_wrappers
@pytest.mark.parametrize("name", ["targets", "labels", "train_labels", "test_labels"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_labels_are_read_without_samples(wrapper, name, kind):
    data = Unreadable(LABELS, **{name: kind(LABELS)})
    dataset = wrapper(ConcatDataset([data, Subset(data, range(10, 20))]))
    with pytest.raises(AssertionError, match="a sample was read"):
        dataset[0]


@both_wrappers
def test_image_folder_labels_are_read_without_decoding(wrapper, tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.png").touch()
    decoded = []

    def load(path):
        decoded.append(Path(path).parent.name)
        return float(len(decoded))

    dataset = wrapper(ImageFolder(tmp_path, loader=load, target_transform=lambda label: label // 2))
    assert decoded == []
    met = set()
    for i in range(12):
        decoded.clear()
        xs, target = dataset[i]
        assert len(decoded) == len(xs)
        same_group = [(name in "ab") == (decoded[0] in "ab") for name in decoded[1:]]
        assert same_group == ([True, False] if wrapper is TripletMNIST else [target == 1])
        met.update((decoded[0], name) for name in decoded[1:])
    assert any(a != b and {a, b} in ({"a", "b"}, {"c", "d"}) for a, b in met)  # one class after target_transform


@pytest.mark.parametrize("train", [True, False])
def test_labels_are_those_of_the_part_where_a_dataset_holds_both(train):
    class Old(Dataset):
        train_labels, test_labels = torch.arange(20) % 4, torch.arange(20) // 5

        def __init__(self):
            self.train = train

        def __len__(self):
            return 20

        def __getitem__(self, i):
            return i, int((self.train_labels if self.train else self.test_labels)[i])

    data = Old()
    for (i, j), target in (SiameseMNIST(data)[k] for k in range(20)):
        assert target == (data[i][1] == data[j][1])


def as_series(labels):
    """With an index that has nothing to do with the positions."""
    pandas = pytest.importorskip("pandas")
    return pandas.Series(labels, index=range(len(labels) - 1, -1, -1))


KINDS_OF_LABELS = {
    "strings": lambda labels: [f"class {label}" for label in labels],
    "array of strings": lambda labels: np.array([f"class {label}" for label in labels]),
    "fractions": lambda labels: torch.tensor(labels) / 10,
    "uint16": lambda labels: torch.tensor(labels, dtype=torch.uint16),
    "bfloat16": lambda labels: torch.tensor(labels, dtype=torch.bfloat16),
    "column": lambda labels: torch.tensor(labels)[:, None],
    "list of tensors": lambda labels: list(torch.tensor(labels)),
    "list of numpy's": lambda labels: [np.int8(label) for label in labels],
    "mixed whole numbers": lambda labels: [(int, np.uint8, torch.tensor)[i % 3](y) for i, y in enumerate(labels)],
    "Series": as_series,
    "Series of strings": lambda labels: as_series([f"class {label}" for label in labels]),
    "categories": lambda labels: as_series(labels).astype("category"),
}


@both_wrappers
@pytest.mark.parametrize("of_kind", KINDS_OF_LABELS.values(), ids=KINDS_OF_LABELS)
@pytest.mark.parametrize("told", [True, False])
def test_labels_may_be_of_any_kind(wrapper, of_kind, told):
    labels = of_kind(LABELS)
    items = list(labels)
    dataset = wrapper(Unreadable(LABELS, targets=labels) if told else Numbered(items, int))
    dataset.mnist_dataset = Numbered(LABELS)
    assert_partners_are_right(dataset, LABELS.__getitem__)
    assert sorted(map(len, dataset.label_to_indices.values())) == [2, 3, 5, 10]
    for batch in BalancedBatchSampler(labels, n_classes=4, n_samples=2):
        assert sorted(LABELS[i] for i in batch) == [0, 0, 1, 1, 2, 2, 3, 3]


@both_wrappers
def test_labels_may_be_bools(wrapper):
    for labels in ([i < 7 for i in range(20)], torch.arange(20) < 7, np.arange(20) < 7):
        for dataset in (wrapper(Numbered(list(labels), int)), wrapper(Unreadable(LABELS, targets=labels))):
            assert dataset.labels_set == {True, False}
            assert dataset.label_to_indices[True].tolist() == list(range(7))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.0, 1.0, float("nan"), 2.0, 2.0], "a label is NaN"),
        (torch.tensor([1.0, 1.0, float("nan"), 2.0, 2.0]), "a label is NaN"),
        (np.array(["a", "a", np.nan, "b", "b"], dtype=object), "a label is NaN"),
        ([None, "a", "a", "b", "b"], "labels that can be compared, got NoneType, str"),
        ([[0, 1], [1], [0], [1], [0]], "one label for each sample, got several"),
        (torch.eye(5), r"one label for each sample, shape \(N,\), got \(5, 5\)"),
    ],
    ids=["NaN", "NaN in a tensor", "NaN among strings", "None", "ragged", "one-hot"],
)
def test_labels_that_are_no_classes_are_an_error(labels, message):
    for make in (
        lambda: SiameseMNIST(Numbered(list(labels))),
        lambda: TripletMNIST(Unreadable(range(5), targets=labels)),
        lambda: BalancedBatchSampler(labels, 1, 1),
    ):
        with pytest.raises(ValueError, match=message):
            make()


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(0.0, 0), (1.0, 1)])

    def __len__(self):
        return 2


NO_DATASETS = {
    "loader": (lambda: DataLoader(Numbered(LABELS)), "map-style dataset.*got DataLoader; of a loader give its dataset"),
    "stream": (Stream, "map-style dataset.*got Stream"),
    "generator": (lambda: (i for i in range(4)), "map-style dataset.*got generator"),
    "number": (lambda: 3, "map-style dataset.*got int"),
    "samples as dicts": (lambda: Dicts(LABELS), r"samples \(x, label\), got dict"),
    "pairs": (lambda: SiameseMNIST(Numbered(LABELS)), "got SiameseDataset: give the one in it"),
    "some pairs": (lambda: Subset(SiameseMNIST(Numbered(LABELS, targets=LABELS)), range(9)), "got SiameseDataset"),
    "more triplets": (lambda: ConcatDataset([TripletMNIST(Numbered(LABELS))] * 2), "got TripletDataset"),
}


class Dicts(Numbered):
    def __getitem__(self, i):
        return {"x": i, "label": LABELS[i]}


@pytest.mark.parametrize("name", NO_DATASETS)
def test_what_is_no_dataset_of_samples_is_an_error_in_words(name):
    make, message = NO_DATASETS[name]
    with pytest.raises(TypeError, match=message):
        BalancedBatchSampler(make(), 2, 2)
    if name != "pairs":  # a wrapper takes the dataset in it
        with pytest.raises(TypeError, match=message):
            TripletMNIST(make())


def test_pairs_cannot_be_held_in_memory():
    with pytest.raises(TypeError, match="expected tensors, got tuple"):
        InMemoryDataset(SiameseMNIST(Numbered(LABELS, as_tensor)))


# --- the original's attributes


@both_wrappers
@both_modes
def test_wrappers_have_the_labels_of_the_original(wrapper, train):
    dataset = wrapper(Numbered(LABELS), train=train)
    assert dataset.labels_set == {0, 1, 2, 3}
    assert dataset.label_to_indices.keys() == dataset.labels_set
    for label, indices in dataset.label_to_indices.items():
        assert indices.tolist() == [i for i in range(20) if LABELS[i] == label]
    assert np.random.choice(dataset.label_to_indices[np.int64(3)]) in dataset.label_to_indices[3]


def test_evaluation_rows_are_the_items():
    pairs, triplets = (wrapper(Numbered(LABELS, int), train=False) for wrapper in (SiameseMNIST, TripletMNIST))
    assert [[*xs, target] for xs, target in pairs] == [list(row) for row in pairs.test_pairs]
    assert [list(xs) for xs, _ in triplets] == triplets.test_triplets.tolist()
    i, j, target = pairs.test_pairs[7]
    assert (i, (LABELS[i] == LABELS[j]), i == j) == (7, target, False)


def test_evaluation_rows_may_be_replaced():
    pairs = SiameseMNIST(InMemoryDataset(Numbered(LABELS, torch.tensor)), train=False)
    pairs.test_pairs = [[i, (i + 1) % 20, 0] for i in range(20)]
    assert pairs[3] == ((3, 4), 0)
    (x1, x2), _ = pairs[[3, 19]]
    assert (x1.tolist(), x2.tolist()) == ([3, 19], [4, 0])


@both_wrappers
def test_wrappers_change_between_training_and_evaluation(wrapper):
    dataset = wrapper(Numbered(LABELS, train=True))
    dataset.train = False
    assert contents(dataset) == contents(wrapper(Numbered(LABELS), train=False))
    dataset = wrapper(Numbered(LABELS, train=False))
    dataset.train = True
    assert contents(dataset) != contents(dataset)


@both_wrappers
def test_wrappers_answer_with_the_attributes_of_the_dataset(wrapper):
    held = {"transform": len, "train_labels": LABELS, "train_data": [7], "classes": ["a"], "targets": LABELS}
    dataset = wrapper(Numbered(LABELS, **held))
    assert {name: getattr(dataset, name) for name in held} == held
    assert not hasattr(dataset, "test_data")
    assert not hasattr(dataset, "transforms")
    with pytest.raises(AttributeError, match="no attribute 'alphabets'"):
        _ = dataset.alphabets


@both_wrappers
def test_wrappers_of_datasets_that_fetch_batches_give_their_own_items(wrapper):
    dataset = wrapper(Subset(Numbered(LABELS), range(20)))  # a Subset has `__getitems__`, which loaders look for
    assert not hasattr(dataset, "__getitems__")
    xs, _ = next(iter(DataLoader(dataset, batch_size=4)))
    assert len(xs) == len(partners(dataset[0])) + 1


@both_wrappers
def test_wrappers_pass_on_an_attribute_error_of_the_dataset(wrapper):
    class Broken(Numbered):
        def __getitem__(self, i):
            return self.pictures[i], self.class_of[i]

    with pytest.raises(AttributeError, match="'Broken' object has no attribute 'pictures'"):
        wrapper(Broken(LABELS))


@pytest.mark.parametrize("outer", [SiameseMNIST, TripletMNIST])
@pytest.mark.parametrize("inner", [SiameseMNIST, TripletMNIST])
@both_modes
def test_a_wrapper_of_a_wrapper_wraps_the_dataset_in_it(outer, inner, train):
    data = Numbered(LABELS, targets=LABELS)
    dataset = outer(outer(inner(data, train=train)))
    assert dataset.mnist_dataset is data
    assert dataset.train is train
    assert_partners_are_right(dataset, LABELS.__getitem__)


def test_a_subclass_of_a_wrapper_may_have_a_constructor_of_its_own():
    class Labelled(SiameseMNIST):
        def __init__(self, dataset):
            self.mnist_dataset = dataset
            self.train = dataset.train
            self.transform = dataset.transform

        def __getitem__(self, i):
            return *super().__getitem__(i), LABELS[i]

    for train in (True, False):
        dataset = Labelled(Numbered(LABELS, train=train, transform=None))
        assert [item[2] for item in dataset] == LABELS
        assert dataset.labels_set == {0, 1, 2, 3}


def test_wrappers_take_torchvisions_mnist_as_the_original_did():
    data = MNIST.__new__(MNIST)  # its files are of no interest here
    data.data, data.targets = torch.arange(20).byte()[:, None, None].repeat(1, 4, 4), torch.tensor(LABELS)
    data.train = True
    data.transform, data.target_transform = PILToTensor(), None
    dataset = SiameseMNIST(data)
    with pytest.warns(UserWarning, match="renamed"):
        assert torch.equal(dataset.train_labels, data.targets)
    assert isinstance(dataset.transform, PILToTensor)
    assert len(dataset.classes) == 10
    assert_partners_are_right(dataset, LABELS.__getitem__)


# --- seeds, workers, cost


@both_wrappers
def test_manual_seed_governs_the_draws(wrapper):
    def epoch(seed):
        dataset = wrapper(Numbered(LABELS))
        torch.manual_seed(seed)
        return contents(dataset)

    assert epoch(3) == epoch(3)
    assert epoch(3) != epoch(4)


def worker_epochs(data, n_workers, seed, n_epochs=2, persistent_workers=False):
    """What the workers draw in each epoch, by anchor; shuffled, so that an anchor goes from worker to worker."""
    loader = DataLoader(data, batch_size=3, shuffle=True, num_workers=n_workers, persistent_workers=persistent_workers)
    torch.manual_seed(seed)
    return [{x[0]: x[1:] for xs, _ in loader for x in torch.stack(xs, dim=1).tolist()} for _ in range(n_epochs)]


@pytest.mark.slow
@starts_workers
@both_wrappers
def test_draws_do_not_depend_on_the_number_of_workers(wrapper):
    data = Numbered(LABELS)
    first, second = worker_epochs(wrapper(data), 1, seed=5)
    assert first != second
    assert worker_epochs(wrapper(data), 2, seed=5) == [first, second]
    assert worker_epochs(wrapper(data), 3, seed=5) == [first, second]
    assert worker_epochs(wrapper(data), 2, seed=6, n_epochs=1) != [first]


@starts_workers
def test_draws_of_persistent_workers_are_fresh_each_epoch():
    data = Numbered(LABELS)
    epochs = worker_epochs(SiameseMNIST(data), 1, seed=5, n_epochs=3, persistent_workers=True)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    for n_workers in (2, 3):
        assert worker_epochs(SiameseMNIST(data), n_workers, seed=5, n_epochs=3, persistent_workers=True) == epochs


@starts_workers
def test_worker_draws_are_uniform_and_follow_the_target():
    torch.manual_seed(8)
    loader = DataLoader(SiameseMNIST(Numbered([i % 2 for i in range(1000)])), batch_size=250, num_workers=1)
    targets = []
    for (x1, x2), target in loader:
        assert torch.equal(((x1 - x2) % 2 == 0).long(), target)
        targets += target.tolist()
    assert_drawn_with({0: 0.5, 1: 0.5}, targets)


@both_wrappers
def test_many_classes_cost_no_more_per_item(wrapper):
    dataset = wrapper(Numbered([i // 2 for i in range(40_000)]))
    for i in range(0, 40_000, 20):
        assert all((a // 2 == b // 2) == same for a, b, same in partners(dataset[i]))
    tracemalloc.start()
    dataset[7]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000  # bytes: no room for anything that has an entry for each class


@pytest.mark.parametrize("device", ["meta"])
def test_draws_do_not_depend_on_the_default_device(device):
    expected = contents(SiameseMNIST(Numbered(LABELS))), list(BalancedBatchSampler(LABELS, 2, 2))
    torch.manual_seed(0)
    with torch.device(device):
        assert (contents(SiameseMNIST(Numbered(LABELS))), list(BalancedBatchSampler(LABELS, 2, 2))) == expected
        data = InMemoryDataset(Numbered(LABELS, lambda i: torch.tensor(float(i), device="cpu")))
    assert (data.data.device.type, data.targets.device.type) == ("cpu", "cpu")


def test_training_draws_are_those_of_earlier_versions():
    siamese, triplets = SiameseMNIST(Numbered(mod_3(9), int)), TripletMNIST(Numbered(mod_3(9), int))
    torch.manual_seed(1)
    assert [x2 for (_, x2), _ in siamese] == [3, 4, 6, 6, 1, 8, 8, 8, 5]
    assert [xs[1:] for xs, _ in triplets] == [(6, 5), (4, 6), (8, 1), (0, 4), (7, 0), (8, 3), (0, 2), (1, 3), (2, 6)]


# --- copies


def saved_and_loaded(dataset):
    file = io.BytesIO()
    torch.save(dataset, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.copy, copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset)), saved_and_loaded]
any_copy = pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "pickle", "save"])


@any_copy
@both_wrappers
@both_modes
def test_copies_of_wrappers_draw_like_the_original(copied, wrapper, train):
    original = wrapper(Numbered(LABELS, train=train))
    dataset = copied(original)
    assert (dataset.train, dataset.labels_set, len(dataset)) == (train, {0, 1, 2, 3}, 20)
    torch.manual_seed(3)
    expected = contents(original)
    torch.manual_seed(3)
    assert contents(dataset) == expected
    assert (contents(dataset) != expected) == train


@pytest.mark.slow
@starts_workers
@any_copy
def test_copies_of_wrappers_draw_afresh_in_persistent_workers(copied):
    data = Numbered(LABELS, int)
    options = {"seed": 5, "n_epochs": 3, "persistent_workers": True}
    expected = worker_epochs(SiameseMNIST(data), 1, **options)
    used = SiameseMNIST(data)
    worker_epochs(used, 1, seed=4, n_epochs=1)
    assert worker_epochs(copied(used), 2, **options) == expected
    assert expected[0] != expected[1] != expected[2] != expected[0]


class MadeInWorker(Dataset):
    """Builds its wrapper where it is first read, or copies it there."""

    def __init__(self, wrapper=None):
        self.wrapper = wrapper
        self.own = None

    def __len__(self):
        return 200

    def __getitem__(self, i):
        if self.own is None:
            self.own = copy.deepcopy(self.wrapper) or SiameseMNIST(Numbered([i % 10 for i in range(200)], int))
        return self.own[i]


@pytest.mark.slow
@starts_workers
@pytest.mark.parametrize("is_copy", [True, False])
def test_wrappers_made_or_copied_in_workers_draw_afresh_each_epoch(is_copy):
    dataset = MadeInWorker(SiameseMNIST(Numbered([i % 10 for i in range(200)], int)) if is_copy else None)
    first, second, third = worker_epochs(dataset, 2, seed=5, n_epochs=3, persistent_workers=True)
    for one, other in ((first, second), (second, third), (first, third)):
        assert sum(one[i] == other[i] for i in range(200)) < 30  # of 200, about 8 by chance
    assert worker_epochs(dataset, 2, seed=5, n_epochs=1) == [first]


@pytest.mark.slow
@starts_workers
def test_draws_of_started_anew_workers_are_those_of_forked_ones():
    expected = worker_epochs(SiameseMNIST(TENS), 1, seed=5, persistent_workers=True)
    options = {"batch_size": 3, "shuffle": True, "num_workers": 2, "persistent_workers": True}
    loader = DataLoader(SiameseMNIST(TENS), multiprocessing_context="spawn", **options)
    torch.manual_seed(5)
    assert [{x[0]: x[1:] for xs, _ in loader for x in torch.stack(xs, 1).tolist()} for _ in range(2)] == expected


TENS = TensorDataset(torch.arange(20.0), torch.arange(20) % 2)


@any_copy
def test_copies_of_data_in_memory_hold_the_same(copied):
    original = InMemoryDataset(Numbered(LABELS, as_tensor, train=False))
    data = copied(original)
    assert torch.equal(data.data, original.data)
    assert (data.targets.tolist(), data.train, len(data)) == (LABELS, False, 20)
    assert data[[1, 2]][1].tolist() == LABELS[1:3]


@any_copy
@pytest.mark.parametrize("seeded_by", [{}, {"seed": 3}, {"generator": 4}], ids=str)
def test_copies_of_samplers_go_on_like_the_original(copied, seeded_by):
    options = seeded_by if "generator" not in seeded_by else {"generator": torch.Generator().manual_seed(4)}
    original = BalancedBatchSampler(LABELS, 2, 2, **options)
    first = list(original)
    if copied is copy.copy and "generator" in seeded_by:
        pytest.skip("the two share the generator")
    sampler = copied(original)
    torch.manual_seed(1)
    second = list(original)
    torch.manual_seed(1)
    assert list(sampler) == second
    assert (first == second) == ("seed" in seeded_by)


# --- whole batches at once


@both_modes
def test_list_indices_give_a_whole_batch(train):
    data = InMemoryDataset(Numbered(LABELS, as_tensor, train=train))
    (x1, x2), target = SiameseMNIST(data)[[3, 1, 4]]
    assert (x1.shape, x2.shape, target.shape, target.dtype) == ((3, 3, 7, 9), (3, 3, 7, 9), (3,), torch.int64)
    (anchor, positive, negative), target = TripletMNIST(data)[[3, 1, 4]]
    assert anchor[:, 0, 0, 0].tolist() == [3, 1, 4]
    assert positive.shape == negative.shape == (3, 3, 7, 9)
    assert target == []


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_list_indices_give_the_same_fixed_items_as_single_ones(kind):
    data = InMemoryDataset(Numbered(LABELS, torch.tensor, train=False))
    order = [3, 1, 4, 1, 19, -2]
    (x1, x2), target = SiameseMNIST(data)[kind(order)]
    singles = [SiameseMNIST(data)[i] for i in order]
    assert list(zip(x1, x2)) == [xs for xs, _ in singles]
    assert target.tolist() == [target for _, target in singles]
    xs, _ = TripletMNIST(data)[kind(order)]
    assert list(zip(*xs)) == [TripletMNIST(data)[i][0] for i in order]


def test_list_indices_draw_right_and_fresh_partners():
    dataset = SiameseMNIST(InMemoryDataset(Numbered(LABELS, torch.tensor)))
    labels = torch.tensor(LABELS)
    drawn = []
    for _ in range(20):
        (x1, x2), target = dataset[list(range(20))]
        assert torch.equal((labels[x1] == labels[x2]).long(), target)
        assert not (x1 == x2).any()
        drawn.append(x2.tolist())
    assert len({str(x2) for x2 in drawn}) == 20


def test_loader_passes_whole_batches_through():
    dataset = TripletMNIST(InMemoryDataset(Numbered(LABELS, torch.tensor)))
    sampler = BatchSampler(SequentialSampler(dataset), batch_size=8, drop_last=False)
    batches = list(DataLoader(dataset, sampler=sampler, batch_size=None))
    assert [len(xs[0]) for xs, _ in batches] == [8, 8, 4]
    assert torch.cat([xs[0] for xs, _ in batches]).tolist() == list(range(20))


# --- BalancedBatchSampler


@pytest.mark.parametrize("n_classes", [1, 2, 3, 4])
@pytest.mark.parametrize("n_samples", [1, 2, 3, 5, 6])
def test_sampler_length_is_the_number_of_batches(n_classes, n_samples):
    labels = [i % 4 for i in range(24)]
    sampler = BalancedBatchSampler(labels, n_classes, n_samples)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 24 // (n_classes * n_samples) > 0
    for batch in batches:
        assert all(type(i) is int for i in batch)
        assert len(set(batch)) == n_classes * n_samples
        counts = Counter(labels[i] for i in batch)
        assert len(counts) == n_classes
        assert set(counts.values()) == {n_samples}


@pytest.mark.parametrize(
    "labels",
    [
        [4, 4, 9, 9, 2, 2],
        (4, 4, 9, 9, 2, 2),
        np.array([4, 4, 9, 9, 2, 2]),
        np.array([[4], [4], [9], [9], [2], [2]]),
        torch.tensor([4, 4, 9, 9, 2, 2]),
        torch.tensor([[4], [4], [9], [9], [2], [2]]),
        ["dog", "dog", "emu", "emu", "cat", "cat"],
    ],
    ids=lambda labels: f"{type(labels).__name__} {np.shape(labels)}",
)
def test_sampler_takes_labels_in_any_form(labels):
    sampler = BalancedBatchSampler(labels, n_classes=3, n_samples=1)
    assert len(sampler) == 2
    for batch in sampler:
        assert sorted(i // 2 for i in batch) == [0, 1, 2]


def test_sampler_repeats_samples_of_a_small_class():
    labels = [0] + [1] * 3 + [2] * 20
    sampler = BalancedBatchSampler(labels, n_classes=3, n_samples=4)
    for _ in range(20):
        for batch in sampler:
            of_class = [[i for i in batch if labels[i] == c] for c in range(3)]
            assert [len(indices) for indices in of_class] == [4, 4, 4]
            assert len(set(of_class[1])) == 3  # all of them before one twice
            assert len(set(of_class[2])) == 4


@pytest.mark.parametrize(
    ("labels", "n_classes", "n_samples", "message"),
    [
        ([0, 0, 1, 1], 3, 1, "n_classes=3.*2 classes"),
        ([0, 0, 1, 1], 2, 3, "2 x 3 exceeds the 4 samples"),
        ([0, 0, 1, 1], 0, 1, "at least 1"),
        ([0, 0, 1, 1], 1, 0, "at least 1"),
        ([], 1, 1, "one label for each sample"),
        ([[0, 1], [1, 0]], 1, 1, "one label for each sample"),
    ],
)
def test_sampler_refuses_the_impossible_at_construction(labels, n_classes, n_samples, message):
    with pytest.raises(ValueError, match=message):
        BalancedBatchSampler(labels, n_classes, n_samples)


def test_sampler_iterators_do_not_disturb_each_other():
    sampler = BalancedBatchSampler([i % 5 for i in range(60)], n_classes=5, n_samples=2)
    torch.manual_seed(0)
    alone = list(sampler)
    torch.manual_seed(0)
    first = iter(sampler)
    batches = [next(first)]
    second = iter(sampler)
    others = []
    for batch in first:
        others.append(next(second))
        batches.append(batch)
    assert batches == alone
    assert sorted(chain(*others, *second)) == list(range(60))
    assert len(list(sampler)) == 6


@pytest.mark.parametrize(
    ("n_of_each", "n_classes", "n_samples"), [(10, 5, 2), (10, 10, 5), (4, 2, 2), (12, 3, 4), (12, 9, 1), (6, 10, 6)]
)
def test_sampler_covers_balanced_data_in_an_epoch(n_of_each, n_classes, n_samples):
    n = 10 * n_of_each
    batches = list(BalancedBatchSampler([i % 10 for i in range(n)], n_classes, n_samples))
    counts = Counter(chain(*batches))
    if n % (n_classes * n_samples) == 0:
        assert counts == Counter(range(n))
    else:
        assert max(counts.values()) == 1


def test_sampler_deals_every_sample_before_any_twice():
    labels = [0] * 3 + [1] * 10 + [2] * 40 + [3] * 547
    sampler = BalancedBatchSampler(labels, n_classes=3, n_samples=4)
    seen, class_seen = Counter(dict.fromkeys(range(600), 0)), Counter(dict.fromkeys(range(4), 0))
    for batch in sampler:
        for i in batch:
            seen[i] += 1
            class_seen[labels[i]] += 1
        for c in range(4):
            counts = [seen[i] for i in range(600) if labels[i] == c]
            assert max(counts) - min(counts) <= 1
        assert max(class_seen.values()) - min(class_seen.values()) <= sampler.n_samples
    assert min(seen[i] for i in range(53)) >= 3


def test_sampler_batches_are_random():
    torch.manual_seed(3)
    labels = [i % 4 for i in range(12)]
    sampler = BalancedBatchSampler(labels, n_classes=2, n_samples=1)
    first = [next(iter(sampler)) for _ in range(3000)]
    assert_drawn_with(dict.fromkeys(range(12), 1 / 12), [batch[0] for batch in first])
    pairs = [(a, b) for a in range(4) for b in range(a)]
    assert_drawn_with(dict.fromkeys(pairs, 1 / 6), [tuple(sorted((labels[i] for i in b), reverse=True)) for b in first])


def test_sampler_obeys_manual_seed_or_its_own_generator():
    labels = [i % 4 for i in range(40)]
    torch.manual_seed(1)
    epochs = [list(BalancedBatchSampler(labels, 2, 2)) for _ in range(2)]
    assert epochs[0] != epochs[1]
    torch.manual_seed(1)
    assert [list(BalancedBatchSampler(labels, 2, 2)) for _ in range(2)] == epochs

    own = BalancedBatchSampler(labels, 2, 2, generator=torch.Generator().manual_seed(9))
    before = torch.get_rng_state()
    epochs = [list(own), list(own)]
    assert torch.equal(torch.get_rng_state(), before)
    assert epochs[0] != epochs[1]
    torch.manual_seed(1)
    again = BalancedBatchSampler(labels, 2, 2, generator=torch.Generator().manual_seed(9))
    assert [list(again), list(again)] == epochs


def of_processes(labels, n_classes, n_samples, n_processes, epoch=0, **options):
    """For each step the batches of all processes."""
    samplers = [
        BalancedBatchSampler(labels, n_classes, n_samples, num_replicas=n_processes, rank=rank, **options)
        for rank in range(n_processes)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    assert {len(list(sampler)) for sampler in samplers} == {len(samplers[0])}
    return list(zip(*samplers))


@pytest.mark.parametrize(("n_classes", "n_samples", "n_processes"), [(10, 3, 2), (5, 4, 2), (7, 2, 3), (4, 2, 4)])
def test_sampler_processes_share_no_sample_at_a_step(n_classes, n_samples, n_processes):
    labels = [i % 10 for i in range(240)]
    steps = of_processes(labels, n_classes, n_samples, n_processes)
    assert len(steps) == 240 // (n_classes * n_samples * n_processes)
    for batches in steps:
        together = [i for batch in batches for i in batch]
        assert len(set(together)) == len(together) == n_classes * n_samples * n_processes
        for batch in batches:
            assert sorted(Counter(labels[i] for i in batch).values()) == [n_samples] * n_classes
    if 240 % (n_classes * n_samples * n_processes) == 0 and (n_classes * n_processes) % 10 == 0:
        assert sorted(i for batches in steps for batch in batches for i in batch) == list(range(240))
        for batches in steps:
            assert len(set(Counter(labels[i] for batch in batches for i in batch).values())) == 1


def test_sampler_gives_processes_too_few_samples_more_than_once():
    labels = [0] * 3 + [1] * 20
    for batches in of_processes(labels, 2, 2, 2):
        rare = [i for batch in batches for i in batch if labels[i] == 0]
        assert len(rare) == 4
        assert set(rare) == {0, 1, 2}


def test_sampler_epochs_of_a_seed():
    labels = [i % 4 for i in range(80)]
    first = of_processes(labels, 2, 2, 2)
    assert of_processes(labels, 2, 2, 2) == of_processes(labels, 2, 2, 2, seed=0) == first
    assert of_processes(labels, 2, 2, 2, epoch=1) != first
    assert of_processes(labels, 2, 2, 2, seed=1) != first
    alone = BalancedBatchSampler(labels, 2, 2, seed=3)
    one_of_one = BalancedBatchSampler(labels, 2, 2, seed=3, num_replicas=1, rank=0)
    assert list(alone) == list(alone) == list(one_of_one)
    state = torch.get_rng_state()
    list(alone)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_replicas": 2}, "rank from 0 to num_replicas - 1"),
        ({"rank": 0}, "rank from 0 to num_replicas - 1"),
        ({"num_replicas": 2, "rank": 2}, "rank from 0 to num_replicas - 1"),
        ({"num_replicas": 2, "rank": -1}, "rank from 0 to num_replicas - 1"),
        ({"num_replicas": 5, "rank": 0}, "2 x 2 in 5 processes exceeds the 16 samples"),
        ({"num_replicas": 2, "rank": 0, "generator": torch.Generator()}, "a seed, not a generator"),
        ({"seed": 0, "generator": torch.Generator()}, "not both"),
    ],
)
def test_sampler_refuses_processes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        BalancedBatchSampler([i % 4 for i in range(16)], 2, 2, **options)


def test_sampler_serves_a_loader_as_batch_sampler():
    sampler = BalancedBatchSampler(LABELS, n_classes=4, n_samples=2)
    loader = DataLoader(Numbered(LABELS), batch_sampler=sampler)
    assert len(loader) == 2
    for x, label in loader:
        assert label.tolist() == [LABELS[int(i)] for i in x]
        assert sorted(label.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_sampler_serves_a_loader_of_data_in_memory():
    data = InMemoryDataset(Numbered(LABELS, as_tensor))
    sampler = BalancedBatchSampler(data.targets, n_classes=4, n_samples=2)
    loader = DataLoader(data, sampler=sampler, batch_size=None)
    assert len(loader) == 2
    for x, label in loader:
        assert x.shape == (8, 3, 7, 9)
        assert label.tolist() == [LABELS[int(i)] for i in x[:, 0, 0, 0]]
        assert sorted(label.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_sampler_draws_are_those_of_earlier_versions():
    torch.manual_seed(1)
    batches = list(BalancedBatchSampler([i % 4 for i in range(24)], 2, 3))
    assert batches[:2] == [[12, 20, 8, 23, 19, 3], [1, 21, 17, 18, 22, 6]]
    sampler = BalancedBatchSampler(list("aabbbccccc"), 2, 2, seed=7, num_replicas=2, rank=1)
    sampler.set_epoch(3)
    assert list(sampler) == [[9, 7, 1, 0]]


def test_sampler_has_the_attributes_of_the_original():
    labels = torch.tensor(LABELS)
    sampler = BalancedBatchSampler(labels, 2, 3)
    assert sampler.labels is labels
    assert sampler.labels_set == [0, 1, 2, 3]
    assert {c: indices.tolist() for c, indices in sampler.label_to_indices.items()} == {
        c: [i for i in range(20) if LABELS[i] == c] for c in range(4)
    }
    assert sampler.used_label_indices_count == {0: 0, 1: 0, 2: 0, 3: 0}
    assert (sampler.count, sampler.n_dataset, sampler.batch_size) == (0, 20, 6)
    assert (sampler.n_classes, sampler.n_samples) == (2, 3)
    assert BalancedBatchSampler(list("abab"), 2, 1).label_to_indices["b"].tolist() == [1, 3]


class OwnConstructor(BalancedBatchSampler):
    """Sets what the original's constructor sets, and does not call ours."""

    def __init__(self, labels, n_classes, n_samples):
        self.labels = torch.as_tensor(labels)
        numbers = self.labels.numpy()
        self.labels_set = list(set(numbers))
        self.label_to_indices = {label: np.flatnonzero(numbers == label) for label in self.labels_set}
        self.used_label_indices_count = {label: 0 for label in self.labels_set}
        self.count = 0
        self.n_classes, self.n_samples = n_classes, n_samples
        self.n_dataset = len(self.labels)
        self.batch_size = self.n_samples * self.n_classes


class OwnIterator(OwnConstructor):
    """Draws by itself, from what the constructor has set."""

    def __iter__(self):
        self.count = 0
        while self.count + self.batch_size <= self.n_dataset:
            batch = []
            for label in np.random.choice(self.labels_set, self.n_classes, replace=False):
                used = self.used_label_indices_count[label]
                batch += self.label_to_indices[label][used : used + self.n_samples].tolist()
                left = len(self.label_to_indices[label]) - used - self.n_samples
                self.used_label_indices_count[label] = used + self.n_samples if left >= self.n_samples else 0
            yield batch
            self.count += self.batch_size


class OwnIteratorOfOurs(BalancedBatchSampler):
    __iter__ = OwnIterator.__iter__


@pytest.mark.parametrize("sampler", [OwnConstructor, OwnIterator, OwnIteratorOfOurs])
def test_sampler_subclasses_with_methods_of_their_own_draw_balanced_batches(sampler):
    labels = [i % 5 for i in range(60)]
    own = sampler(labels, 3, 2)
    loader = DataLoader(Numbered(labels), batch_sampler=own)
    for _ in range(2):
        batches = [label.tolist() for _, label in loader]
        assert len(batches) == len(own) == len(loader) == 10
        assert {tuple(sorted(Counter(batch).values())) for batch in batches} == {(2, 2, 2)}


def test_sampler_subclasses_draw_as_ours_and_take_an_epoch():
    torch.manual_seed(2)
    expected = list(BalancedBatchSampler(LABELS, 2, 2))
    torch.manual_seed(2)
    own = OwnConstructor(LABELS, 2, 2)
    assert list(own) == expected
    own.seed = 3
    own.set_epoch(4)
    ours = BalancedBatchSampler(LABELS, 2, 2, seed=3)
    ours.set_epoch(4)
    assert list(own) == list(ours)
    assert list(copy.deepcopy(own)) == list(ours)


def test_sampler_obeys_what_a_subclass_sets():
    class Changed(BalancedBatchSampler):
        def __init__(self, labels, n_classes, n_samples):
            super().__init__(labels, n_classes, n_samples)
            self.n_dataset *= 3
            self.labels_set = {0, 2, 3}
            self.label_to_indices[3] = [i for i in range(len(labels)) if labels[i] == 3][:4]

    sampler = Changed(LABELS, 3, 2)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 10
    threes = [i for i in range(20) if LABELS[i] == 3]
    for batch in batches:
        assert sorted(LABELS[i] for i in batch) == [0, 0, 2, 2, 3, 3]
        assert set(batch) & set(threes) <= set(threes[:4])


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("n_classes", 5, "n_classes=5, but the labels have 4 classes"),
        ("labels_set", [], "n_classes=2, but the labels have 0 classes"),
        ("label_to_indices", {0: [], 1: [], 2: [], 3: []}, "no samples to draw from"),
        ("n_dataset", 3, "2 x 2 exceeds the 3 samples"),
    ],
)
def test_sampler_refuses_the_impossible_of_a_subclass(attribute, value, message):
    sampler = OwnConstructor(LABELS, 2, 2)
    setattr(sampler, attribute, value)
    with pytest.raises(ValueError, match=message):
        list(sampler)


Sample = namedtuple("Sample", "x label")


@pytest.mark.parametrize(
    "data",
    [
        Numbered(LABELS),
        Unreadable(LABELS, targets=LABELS),
        Unreadable(LABELS, labels=np.array(LABELS)),
        TensorDataset(torch.zeros(20), torch.tensor(LABELS)),
        InMemoryDataset(Numbered(LABELS, as_tensor)),
        Subset(Unreadable([*LABELS, 7], targets=[*LABELS, 7]), range(20)),
        ConcatDataset([Numbered(LABELS[:9]), Unreadable(LABELS[9:], targets=torch.tensor(LABELS[9:]))]),
        [(float(i), label) for i, label in enumerate(LABELS)],
        [Sample(float(i), label) for i, label in enumerate(LABELS)],
    ],
    ids=["dataset", "targets", "labels", "TensorDataset", "memory", "Subset", "ConcatDataset", "list", "named tuples"],
)
def test_sampler_takes_a_dataset_for_its_labels(data):
    sampler = BalancedBatchSampler(data, n_classes=2, n_samples=3, seed=1)
    assert list(sampler) == list(BalancedBatchSampler(LABELS, n_classes=2, n_samples=3, seed=1))
    assert list(sampler.labels) == LABELS


def test_sampler_takes_an_image_folder_without_decoding_it(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.png").touch()
    sampler = BalancedBatchSampler(ImageFolder(tmp_path), n_classes=3, n_samples=2)
    assert [sorted(i // 4 for i in batch) for batch in sampler] == [[0, 0, 1, 1, 2, 2]] * 2


@pytest.mark.slow
def test_sampler_of_many_classes_is_fast():
    sampler = BalancedBatchSampler(np.arange(60_000) % 20_000, n_classes=100, n_samples=3)
    tracemalloc.start()
    assert sum(len(batch) for batch in sampler) == 60_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 2**20  # nothing that has an entry for each pair of classes


# --- InMemoryDataset


def test_memory_holds_the_transformed_samples_once():
    source = Numbered(LABELS, as_tensor)
    data = InMemoryDataset(source)
    assert source.n_reads == len(data) == 20
    assert torch.equal(data.data, torch.stack([as_tensor(i) for i in range(20)]))
    assert data.targets.tolist() == LABELS
    assert data.targets.dtype == torch.int64
    for _ in range(2):
        list(DataLoader(data, batch_size=4))
    assert source.n_reads == 20


def test_memory_targets_are_those_after_target_transform(tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / name / "0.png")
    data = InMemoryDataset(ImageFolder(tmp_path, transform=PILToTensor(), target_transform=lambda label: label // 2))
    assert data.targets.tolist() == [0, 0, 1, 1]
    assert (data.data.shape, data.data.dtype) == ((4, 3, 4, 4), torch.uint8)


@pytest.mark.parametrize("train", [True, False])
def test_memory_keeps_train(train):
    assert InMemoryDataset(Numbered(LABELS, as_tensor, train=train)).train is train
    assert InMemoryDataset(Subset(Numbered(LABELS, as_tensor, train=train), range(4))).train is train


@pytest.mark.parametrize("index", [3, -1, np.int64(3), torch.tensor(3)], ids=repr)
def test_memory_takes_a_number(index):
    x, target = InMemoryDataset(Numbered(LABELS, as_tensor))[index]
    assert torch.equal(x, as_tensor(range(20)[index]))
    assert target == LABELS[index]
    assert target.shape == ()


@pytest.mark.parametrize(
    "index",
    [slice(2, 9, 3), [2, 5, 8], (2, 5, 8), range(2, 9, 3), np.array([2, 5, 8]), torch.tensor([2, 5, 8])],
    ids=lambda index: type(index).__name__,
)
def test_memory_takes_many_numbers(index):
    x, target = InMemoryDataset(Numbered(LABELS, as_tensor))[index]
    assert torch.equal(x, torch.stack([as_tensor(i) for i in (2, 5, 8)]))
    assert target.tolist() == [LABELS[i] for i in (2, 5, 8)]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (Numbered([]), ValueError, "empty"),
        (Numbered([0, 1]), TypeError, "expected tensors, got float"),
        (Numbered([0, 1], lambda i: torch.zeros(i + 1)), ValueError, r"\(1,\) and \(2,\)"),
        (Numbered([0, 1], lambda i: torch.zeros([5] * i)), ValueError, r"\(\) and \(5,\)"),
        (Numbered([0.5, 1.0], torch.tensor), ValueError, "whole number"),
        (Numbered([[0, 1], [1, 0]], torch.tensor), ValueError, "whole number"),
        (Numbered(["cat", "dog"], torch.tensor), ValueError, "whole number"),
    ],
    ids=["empty", "no tensor", "two shapes", "two numbers of dimensions", "float", "two labels", "names"],
)
def test_memory_refuses_what_it_cannot_hold(data, error, message):
    with pytest.raises(error, match=message):
        InMemoryDataset(data)


def of_kinds(*kinds):
    """Samples of one number each, `(value, dtype)`."""
    return Numbered([0] * len(kinds), lambda i: torch.tensor([kinds[i][0]], dtype=kinds[i][1]))


BIG = 2**24 + 1  # which float32 does not hold


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((200, torch.uint8), (0.7, torch.float32), torch.float32),
        ((200, torch.uint8), (-3, torch.int8), torch.int16),
        ((True, torch.bool), (7, torch.uint8), torch.uint8),
        ((True, torch.bool), (0.5, torch.float16), torch.float16),
        ((0.1, torch.float64), (0.5, torch.float32), torch.float64),
        ((0.5, torch.float16), (2.0**100, torch.bfloat16), torch.float32),
        ((float("nan"), torch.float16), (0.1, torch.float64), torch.float64),
        ((BIG, torch.int64), (0.5, torch.float32), torch.float64),
        ((BIG, torch.int32), (0.5, torch.float32), torch.float64),
        ((7, torch.int64), (0.5, torch.float32), torch.float32),
        ((5001, torch.int16), (0.5, torch.float16), torch.float32),
        ((65_535, torch.uint16), (-1, torch.int8), torch.int64),
        ((65_535, torch.uint16), (0.5, torch.float32), torch.float32),
        ((BIG, torch.int64), (1j, torch.complex64), torch.complex128),
    ],
    ids=str,
)
def test_memory_changes_no_value_of_mixed_types(one, other, expected):
    for kinds in ((one, other), (other, one), (one, other, one, other)):
        data = InMemoryDataset(of_kinds(*kinds))
        assert data.data.dtype == expected
        for held, (value, dtype) in zip(data.data, kinds):
            np.testing.assert_equal(held.item(), torch.tensor([value], dtype=dtype).item())


def test_memory_goes_through_several_types():
    kinds = [(7, torch.uint8), (0.5, torch.float32), (BIG, torch.int64), (0.1, torch.float32), (True, torch.bool)]
    data = InMemoryDataset(of_kinds(*kinds))
    assert data.data.dtype == torch.float64
    assert data.data[:, 0].tolist() == [7.0, 0.5, BIG, float(np.float32(0.1)), 1.0]


def test_memory_refuses_values_that_no_type_holds():
    for kinds in (((2**53 + 1, torch.int64), (0.1, torch.float64)), ((-1, torch.int8), (2**63 + 5, torch.uint64))):
        for data in (of_kinds(*kinds), of_kinds(*reversed(kinds))):
            with pytest.raises(ValueError, match=r"no dtype holds the values of both"):
                InMemoryDataset(data)


def test_memory_takes_whole_numbers_of_any_kind_as_labels():
    labels = [3, True, np.int8(-4), np.uint64(5), np.bool_(False), torch.tensor(6), torch.tensor([7]), [8]]
    labels += [torch.tensor(9, dtype=torch.uint8), torch.tensor(True), np.array([2]), 2**40, torch.tensor(2**62 + 1)]
    data = InMemoryDataset(Numbered(labels, torch.tensor))
    assert data.targets.tolist() == [3, 1, -4, 5, 0, 6, 7, 8, 9, 1, 2, 2**40, 2**62 + 1]
    assert data.targets.dtype == torch.int64


@pytest.mark.parametrize("label", [2**63, 2**70, np.uint64(2**63), torch.tensor(1.0), np.float32(2), None, "1", 1j])
def test_memory_refuses_other_labels(label):
    with pytest.raises(ValueError, match="one whole number as label of each sample, got"):
        InMemoryDataset(Numbered([0, label], torch.tensor))


def test_memory_holds_plain_values_of_what_has_a_gradient():
    data = InMemoryDataset(Numbered(LABELS, lambda i: torch.tensor(float(i), requires_grad=True)))
    assert not data.data.requires_grad
    assert data.data.tolist() == list(range(20))


def test_memory_lies_on_the_device_asked_for():
    data = InMemoryDataset(Numbered(LABELS, as_tensor), device="meta")
    assert (data.data.device.type, data.targets.device.type) == ("meta", "meta")


@pytest.mark.gpu
def test_memory_serves_batches_on_the_gpu():
    data = InMemoryDataset(Numbered(LABELS, as_tensor), device="cuda")
    sampler = BalancedBatchSampler(data.targets, n_classes=4, n_samples=2)
    for x, label in DataLoader(data, sampler=sampler, batch_size=None):
        assert x.is_cuda
        assert label.is_cuda
        assert label.tolist() == [LABELS[int(i)] for i in x[:, 0, 0, 0]]
    (x1, x2), target = SiameseMNIST(data)[[0, 1, 2]]
    assert x1.is_cuda
    assert x2.is_cuda
    assert target.is_cuda
