"""Tests of plots.py, on the artists that it leaves on the axes."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba
from PIL import Image

from evaluation import verification
from metrics import EmbeddingMetric
from plots import compare_embeddings, embedding_movie, plot_embeddings, plot_history, plot_neighbors, plot_roc


@pytest.fixture(autouse=True)
def _without_a_screen():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def points(n, n_classes, scale=1.0):
    rng = np.random.default_rng(n)
    return (scale * rng.standard_normal((n, 2))).astype(np.float32), np.arange(n) % n_classes


@pytest.mark.slow
@pytest.mark.parametrize("n_classes", [1, 3, 10, 11, 37])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_every_class_is_drawn_in_a_colour_of_its_own(n_classes, kind):
    embeddings, labels = points(4 * n_classes, n_classes)
    ax = plot_embeddings(kind(embeddings), kind(labels))
    ax.figure.canvas.draw()
    assert len(ax.collections) == n_classes
    for c, drawn in enumerate(ax.collections):
        np.testing.assert_allclose(drawn.get_offsets(), embeddings[labels == c])
    assert len({tuple(drawn.get_facecolor()[0]) for drawn in ax.collections}) == n_classes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [str(c) for c in range(n_classes)]


def lab(colour):
    """CIELAB of an sRGB colour, where distances are about those that one sees."""
    rgb = np.asarray(to_rgba(colour)[:3])
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089])  # but for near black
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("n_classes", [10, 11, 20])
def test_up_to_twenty_colours_can_be_told_apart(n_classes):
    ax = plot_embeddings(*points(n_classes, n_classes))
    colours = [lab(drawn.get_facecolor()[0]) for drawn in ax.collections]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > 15


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_names_title_and_limits_are_shown():
    _, own_axes = plt.subplots()
    embeddings, labels = points(6, 2)
    names = {5: "cat", 6: "_dog"}
    ax = plot_embeddings(embeddings, labels + 5, (-9, 8), (-7, 6), ax=own_axes, title="pets", class_names=names)
    assert ax is own_axes
    assert legend_of(ax) == ["cat", "_dog"]
    assert (ax.get_title(), ax.get_xlim(), ax.get_ylim()) == ("pets", (-9, 8), (-7, 6))


def test_more_than_a_hundred_classes_have_no_legend():
    assert plot_embeddings(*points(100, 100)).get_legend()
    figure = compare_embeddings({"a": points(101, 101), "b": points(101, 101)})
    assert [ax.get_legend() for ax in figure.axes] == [None, None]


# --- labels and names


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven"]


def drawn_names(function, labels, class_names=None):
    """The texts that a function draws for two classes."""
    embeddings = np.random.default_rng(0).normal(size=(len(labels), 2))
    if function is plot_embeddings:
        return legend_of(plot_embeddings(embeddings, labels, class_names=class_names))
    if function is compare_embeddings:
        return legend_of(compare_embeddings({"a": (embeddings, labels)}, class_names=class_names).axes[0])
    images, neighbors = images_of(len(labels), 6, 7), [[0, 1]] * len(labels)
    figure = plot_neighbors(images, labels, images, labels, neighbors, class_names=class_names)
    return [ax.get_title() for ax in figure.axes[1:3]]


each_function = pytest.mark.parametrize(
    "function", [plot_embeddings, compare_embeddings, plot_neighbors], ids=lambda function: function.__name__
)


@each_function
@pytest.mark.parametrize(
    ("class_names", "expected"),
    [
        (None, ["3", "7"]),
        (NAMES, ["three", "seven"]),
        (np.array(NAMES), ["three", "seven"]),
        ({7: "seven", 3: "three"}, ["three", "seven"]),
        (pd.Series(["seven", "three"], index=[7, 3]), ["three", "seven"]),
        ({7: "seven"}, ["3", "seven"]),
    ],
    ids=["none", "list", "array", "dict", "series", "dict without a label"],
)
def test_names_go_by_label(function, class_names, expected):
    assert drawn_names(function, [3, 7, 3, 7], class_names) == expected


@each_function
@pytest.mark.parametrize(
    ("labels", "class_names"),
    [([3, 7], NAMES[:7]), ([-1, 2], NAMES), (["a", "b"], NAMES), ([0.5, 1], NAMES), ([0, 1], "ab")],
    ids=["too few", "negative", "strings", "fractions", "no sequence of names"],
)
def test_names_that_no_label_can_index_are_an_error(function, labels, class_names):
    with pytest.raises(ValueError, match="expected class_names as a dict from label to name, or a sequence"):
        drawn_names(function, labels, class_names)
    assert plt.get_fignums() == []


@each_function
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (torch.tensor([3, 7, 3], dtype=torch.uint16), ["3", "7"]),
        (torch.tensor([3.0, 7.0, 3.0], requires_grad=True), ["3", "7"]),
        (torch.tensor([[3], [7], [3]]), ["3", "7"]),
        ([torch.tensor(3), torch.tensor(7), torch.tensor(3)], ["3", "7"]),
        (np.array([3, 7, 3], dtype=np.uint64), ["3", "7"]),
        (pd.Series([3, 7, 3], index=[9, 0, 1]), ["3", "7"]),
        (pd.Series(["a", "b", "a"], index=[1, 2, 0], dtype="category"), ["a", "b"]),
        (["a", "b", "a"], ["a", "b"]),
        (np.array([["a"], ["b"], ["a"]], dtype=object), ["a", "b"]),
        ([False, True, False], ["False", "True"]),
        (np.array([0.5, 1.5, 0.5]), ["0.5", "1.5"]),
    ],
    ids=lambda labels: type(labels).__name__,
)
def test_labels_may_be_of_any_kind(function, labels, expected):
    assert drawn_names(function, labels) == expected


@pytest.mark.parametrize(
    "labels",
    [[1, 2], [[1, 2, 3]], None, [1, "a", 2], [1, None, 2], [0.0, float("nan"), 1.0], np.array([1j, 2, 3])],
    ids=str,
)
def test_labels_that_are_not_one_for_each_embedding_are_an_error(labels):
    embeddings = np.random.default_rng(0).normal(size=(3, 2))
    with pytest.raises(ValueError, match=r"expected (3 labels, numbers or strings, got|labels that are finite)"):
        plot_embeddings(embeddings, labels)


def test_labels_of_two_types_in_one_picture_are_an_error():
    embeddings = np.random.default_rng(0).normal(size=(2, 2))
    with pytest.raises(ValueError, match="labels of one type, got numbers and strings"):
        compare_embeddings({"a": (embeddings, [1, 2]), "b": (embeddings, ["1", "2"])})
    with pytest.raises(ValueError, match="labels of one type, got numbers and strings"):
        plot_embeddings(embeddings, [1, 2], classes=["1", "2"])


# --- more than two dimensions


def naive_components(embeddings):
    """The first two principal components, signed by their largest weight, and their share of the variance."""
    centred = np.asarray(embeddings, dtype=float) - np.mean(embeddings, axis=0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    signs = [1 if max(row, key=abs) > 0 else -1 for row in vt[:2]]
    return u[:, :2] * s[:2] * signs, (s[:2] ** 2).sum() / (s**2).sum()


def offsets(ax):
    """The points of an axes, class by class."""
    return np.concatenate([np.asarray(drawn.get_offsets()) for drawn in ax.collections])


@pytest.mark.parametrize(("n", "d"), [(50, 3), (50, 64), (40, 300), (3, 3), (2, 5)])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_many_dimensions_are_drawn_by_principal_components_and_the_title_says_so(n, d, kind):
    rng = np.random.default_rng(n)
    embeddings = (rng.normal(size=(n, d)) * rng.random(d) ** 3 + 5).astype(np.float32)
    ax = plot_embeddings(kind(embeddings), np.zeros(n), title="test")
    expected, share = naive_components(embeddings)
    np.testing.assert_allclose(offsets(ax), expected, atol=1e-5)
    assert ax.get_title() == f"test\nfirst two of {d} principal components, {share:.0%} of the variance"


def test_compared_sets_and_frames_are_drawn_by_the_components_of_all(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    sets = {name: (rng.normal(size=(n, 8)) * rng.random(8), np.zeros(n)) for name, n in (("a", 20), ("b", 30))}
    expected, _ = naive_components(np.concatenate([embeddings for embeddings, _ in sets.values()]))
    figure = compare_embeddings(sets)
    np.testing.assert_allclose(np.concatenate([offsets(ax) for ax in figure.axes]), expected, atol=1e-9)
    note = "first two of 8 principal components, "
    assert [ax.get_title().partition(note)[:2] for ax in figure.axes] == [("a\n", note), ("b\n", note)]
    frames = []
    monkeypatch.setattr("plots.plot_embeddings", lambda *a, **options: frames.append((a[0], options["title"])))
    embedding_movie(list(sets.values()), tmp_path / "movie.gif", fps=1)
    np.testing.assert_allclose(np.concatenate([frame for frame, _ in frames]), expected, atol=1e-9)
    assert [title.partition(note)[:2] for _, title in frames] == [("1\n", note), ("2\n", note)]


@pytest.mark.parametrize("shape", [(1, 3), (1, 1), (5, 3), (5, 1)], ids=str)
def test_embeddings_without_a_second_component_lie_on_a_line(shape):
    n, rank = shape
    directions = np.random.default_rng(0).normal(size=(5, 40))
    embeddings = np.arange(n)[:, None] * directions[0] + (0.0 if rank == 1 else 3.0)
    drawn = offsets(plot_embeddings(embeddings, np.zeros(n)))
    assert drawn.shape == (n, 2)
    np.testing.assert_allclose(np.ptp(drawn[:, 0]), (n - 1) * np.linalg.norm(directions[0]), atol=1e-9)
    np.testing.assert_allclose(drawn[:, 1], 0, atol=1e-6)


@pytest.mark.parametrize("function", [plot_embeddings, compare_embeddings, embedding_movie])
@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (
            np.zeros((6, 1)),
            r"expected embeddings of shape \(N, D\) with D of at least 2, got float64 of shape \(6, 1\)",
        ),
        (np.zeros(6), r"got float64 of shape \(6,\)"),
        (np.zeros((6, 2, 1)), r"got float64 of shape \(6, 2, 1\)"),
        (np.full((6, 2), "a"), "got <U1 of shape"),
        (
            np.array([[0.0, 1], [np.nan, 1], [np.inf, np.nan]] * 2),
            "embeddings that are finite and below 1e150, got others in 4 of 6",
        ),
        (np.full((6, 5), np.inf), "embeddings that are finite and below 1e150, got others in 6 of 6"),
    ],
    ids=["1-D", "no D", "three axes", "strings", "2-D not finite", "5-D not finite"],
)
def test_embeddings_that_cannot_be_drawn_are_an_error(function, embeddings, message, tmp_path):
    good, labels = np.zeros((6, embeddings.shape[-1])), np.zeros(6)
    arguments = {
        plot_embeddings: [embeddings, labels],
        compare_embeddings: [{"good": (good, labels), "bad": (embeddings, labels)}],
        embedding_movie: [[(embeddings, labels), (embeddings, labels)], tmp_path / "movie.gif"],
    }[function]
    with pytest.raises(ValueError, match=message if function is not compare_embeddings else "expected"):
        function(*arguments)
    assert (list(tmp_path.iterdir()), plt.get_fignums()) == ([], [])


def test_sets_of_different_dimensions_or_none_are_an_error():
    with pytest.raises(ValueError, match=r"of one dimension, got \[2, 3\]"):
        compare_embeddings({"a": (np.zeros((4, 3)), np.zeros(4)), "b": (np.zeros((4, 2)), np.zeros(4))})
    with pytest.raises(ValueError, match="of one dimension, got no sets"):
        compare_embeddings({})


@pytest.mark.parametrize("scales", [(1, 50, 3), (50, 1, 3)])
def test_compared_sets_share_axes_that_hold_all_points(scales):
    sets = {f"times {scale}": points(30 + scale, 5, scale) for scale in scales}
    figure = compare_embeddings(sets)
    figure.canvas.draw()
    assert [ax.get_title() for ax in figure.axes] == list(sets)
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1
    (x_low, x_high), (y_low, y_high) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    for ax, (embeddings, _) in zip(figure.axes, sets.values()):
        assert sum(len(drawn.get_offsets()) for drawn in ax.collections) == len(embeddings)
        assert x_low < embeddings[:, 0].min()
        assert embeddings[:, 0].max() < x_high
        assert y_low < embeddings[:, 1].min()
        assert embeddings[:, 1].max() < y_high


def test_class_keeps_its_colour_where_another_is_absent():
    points = np.random.default_rng(0).normal(size=(6, 2))
    sets = {"all": (points, [0, 1, 2, 0, 1, 2]), "two": (points, [1, 2, 1, 2, 1, 2])}
    figure = compare_embeddings(sets, class_names=["zero", "one", "two"])
    colours = [{c.get_label(): tuple(c.get_facecolor()[0]) for c in ax.collections} for ax in figure.axes]
    assert colours[0] == colours[1]
    assert set(colours[0]) == {"zero", "one", "two"}


# --- plot_neighbors


QUERY_LABELS, LABELS = np.array([4, 5]), np.array([4, 4, 5, 5, 6])
NEIGHBORS = np.array([[1, 2, 0], [4, 2, 3]])
IS_RIGHT = [[True, False, True], [False, True, True]]


def images_of(n, *shape, seed=0):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


def neighbors_figure(*shape, kind=np.asarray, **options):
    queries, images = kind(images_of(2, *shape)), kind(images_of(5, *shape, seed=1))
    return plot_neighbors(queries, QUERY_LABELS, images, LABELS, NEIGHBORS, **options)


def drawn_image(ax):
    (image,) = ax.images
    return np.asarray(image.get_array())


def frame_of(ax):
    """Colour and width of an axes' frame, which is the same on its four sides."""
    ((colour, width),) = {(spine.get_edgecolor(), spine.get_linewidth()) for spine in ax.spines.values()}
    assert to_rgba(ax.title.get_color()) == colour
    return colour, width


def as_leaf(array):
    return torch.tensor(array, requires_grad=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, as_leaf, list], ids=["array", "tensor", "leaf", "list"])
@pytest.mark.parametrize("shape", [(1, 6, 7), (6, 7), (3, 6, 7)], ids=str)
def test_neighbors_stand_behind_their_query_nearest_first(shape, kind):
    figure = neighbors_figure(*shape, kind=kind)
    figure.canvas.draw()
    assert len(figure.axes) == 2 * 4
    for row, (query, indices) in enumerate(zip(images_of(2, *shape), NEIGHBORS)):
        for ax, image in zip(figure.axes[4 * row :], [query, *images_of(5, *shape, seed=1)[indices]]):
            expected = (image - image.min()) / (image.max() - image.min())
            expected = np.moveaxis(expected, 0, 2) if shape[0] == 3 else expected.reshape(6, 7)
            np.testing.assert_allclose(drawn_image(ax), expected, rtol=1e-5)
            assert (len(ax.get_xticks()), len(ax.get_yticks())) == (0, 0)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list], ids=["array", "tensor", "list"])
def test_neighbors_have_blue_frames_where_right_and_red_ones_where_wrong(kind):
    queries, images = images_of(2, 1, 6, 7), images_of(5, 1, 6, 7, seed=1)
    figure = plot_neighbors(queries, kind(QUERY_LABELS), images, kind(LABELS), kind(NEIGHBORS))
    figure.canvas.draw()
    for row, is_right in enumerate(IS_RIGHT):
        query, *frames = [frame_of(ax) for ax in figure.axes[4 * row : 4 * row + 4]]
        assert query[0] == to_rgba("black")
        assert [colour for colour, _ in frames] == [to_rgba("tab:blue" if right else "tab:red") for right in is_right]
        assert all(width > query[1] for _, width in frames)


@pytest.mark.parametrize(
    ("class_names", "names"),
    [
        (None, {4: "4", 5: "5", 6: "6"}),
        (["a", "b", "c", "d", "cat", "dog", "owl"], {4: "cat", 5: "dog", 6: "owl"}),
        ({4: "cat", 5: "dog", 6: 7.5}, {4: "cat", 5: "dog", 6: "7.5"}),
    ],
    ids=["labels", "list", "dict"],
)
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list], ids=["array", "tensor", "list"])
def test_neighbors_bear_the_names_of_their_classes(class_names, names, kind):
    queries, images = images_of(2, 1, 6, 7), images_of(5, 1, 6, 7, seed=1)
    figure = plot_neighbors(queries, kind(QUERY_LABELS), images, kind(LABELS), NEIGHBORS, class_names=class_names)
    expected = []
    for label, indices in zip(QUERY_LABELS, NEIGHBORS):
        expected += [f"query: {names[label]}", *(names[LABELS[index]] for index in indices)]
    assert [ax.get_title() for ax in figure.axes] == expected


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 4), (3, 1)])
def test_neighbors_of_any_number_are_drawn(n, k):
    images = images_of(4, 1, 6, 7)
    figure = plot_neighbors(images[:n], np.arange(n), images, np.arange(4), np.arange(n * k).reshape(n, k) % 4)
    figure.canvas.draw()
    assert len(figure.axes) == n * (k + 1)
    assert all(len(ax.images) == 1 for ax in figure.axes)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 6, 7), (3, 6, 7)], ids=str)
@pytest.mark.parametrize("value", [0, -3.0, 255])
def test_neighbors_may_be_constant_images(shape, value):
    images = np.full((5, *shape), value, dtype=np.float32)
    figure = plot_neighbors(images[:2], QUERY_LABELS, images, LABELS, NEIGHBORS)
    figure.canvas.draw()
    for ax in figure.axes:
        assert not drawn_image(ax).any()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 6), (1, 6, 1), (1, 6), (3, 1, 6), (3, 6, 1)], ids=str)
def test_neighbors_may_be_one_pixel_high_or_wide(shape):
    figure = neighbors_figure(*shape)
    figure.canvas.draw()
    expected = (*shape[1:], 3) if shape[0] == 3 else shape[-2:]
    assert {drawn_image(ax).shape for ax in figure.axes} == {expected}


@pytest.mark.parametrize("value", [None, 1], ids=["varied", "constant"])
@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64],
    ids=str,
)
def test_neighbors_may_have_any_dtype(dtype, value):
    spread = torch.tensor([[-120, 0, 125], [0, 125, -120]]).clamp(min=0 if dtype == torch.uint8 else -120)
    image = spread.to(dtype) if value is None else torch.full((2, 3), value).to(dtype)
    figure = plot_neighbors(image[None], [4], image[None], [4], [[0]])
    figure.canvas.draw()
    levels = image.double()
    expected = (levels - levels.min()) / (levels.max() - levels.min()).clamp(min=1e-9)
    np.testing.assert_allclose(drawn_image(figure.axes[0]), expected, atol=1e-2)


def test_neighbors_of_grey_images_are_dark_on_light():
    assert {ax.images[0].get_cmap().name for ax in neighbors_figure(1, 6, 7).axes} == {"gray_r"}


@pytest.mark.gpu
def test_neighbors_may_lie_on_the_gpu():
    def on_gpu(array):
        return torch.as_tensor(array, device="cuda")

    queries, images = on_gpu(images_of(2, 1, 6, 7)), on_gpu(images_of(5, 1, 6, 7, seed=1))
    figure = plot_neighbors(queries, on_gpu(QUERY_LABELS), images, on_gpu(LABELS), on_gpu(NEIGHBORS))
    assert [ax.get_title() for ax in figure.axes] == ["query: 4", "4", "5", "4", "query: 5", "6", "5", "5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbors": [[1, 5, 0], [4, 2, 3]]}, "expected neighbors from 0 to 4, got"),
        ({"neighbors": [[1, -1, 0], [4, 2, 3]]}, "expected neighbors from 0 to 4, got"),
        ({"neighbors": [[1.0, 2.0], [0.0, 1.0]]}, "expected neighbors from 0 to 4, got"),
        ({"neighbors": [1, 2]}, r"neighbors of shape \(n, k\), got 2 images, neighbors of shape \(2,\)"),
        ({"query_images": images_of(3, 6, 7)}, r"got 3 images, neighbors of shape \(2, 3\)"),
        ({"query_labels": [4, 5, 6]}, "expected 2 labels"),
        ({"labels": LABELS[:4]}, "expected 5 labels"),
        ({"images": images_of(5, 2, 6, 7)}, r"expected images of shape .* got \(2, 6, 7\)"),
        ({"query_labels": ["a", "b"]}, "expected labels of one type"),
    ],
)
def test_neighbors_that_do_not_fit_are_an_error(changes, message):
    arguments = {"query_images": images_of(2, 6, 7), "query_labels": QUERY_LABELS, "images": images_of(5, 6, 7)}
    with pytest.raises(ValueError, match=message):
        plot_neighbors(**arguments | {"labels": LABELS, "neighbors": NEIGHBORS} | changes)


# --- plot_history


def row(epoch, train, val, **more):
    return {"epoch": epoch, "lr": 0.1, "train_loss": train, "val_loss": val, "seconds": 3.0, **more}


def lines_of(ax):
    """Label -> points of its line, those that are drawn."""
    return {line.get_label(): [(x, y) for x, y in line.get_xydata() if np.isfinite(y)] for line in ax.lines}


def test_history_has_a_panel_for_each_quantity_with_training_and_validation():
    history = [
        row(4, 3, np.float32(4), training=1, **{"train_map@r": torch.tensor(0.5), "val_map@r": np.array(0.25)}),
        row(5, torch.tensor(2.0, dtype=torch.bfloat16, requires_grad=True), 3.5, train_Average_x=1),
    ]
    figure = plot_history(history)
    figure.canvas.draw()
    assert [ax.get_title() for ax in figure.axes] == ["loss", "map@r", "Average_x"]
    assert {ax.get_xlabel() for ax in figure.axes} == {"epoch"}
    loss, map_at_r, average = map(lines_of, figure.axes)
    assert loss == {"training": [(4, 3), (5, 2)], "validation": [(4, 4), (5, 3.5)]}
    assert map_at_r == {"training": [(4, 0.5)], "validation": [(4, 0.25)]}
    assert average == {"training": [(5, 1)]}
    assert [line.get_color() for ax in figure.axes for line in ax.lines] == ["tab:blue", "tab:orange"] * 2 + [
        "tab:blue"
    ]
    assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_history_leaves_gaps_where_values_are_missing():
    history = [row(1, 5.0, None), row(2, float("nan"), 3.0), {"epoch": 3, "train_loss": 2.0}, row(4, 1.0, 2.0)]
    (ax,) = plot_history(history).axes
    training, validation = (line.get_ydata() for line in ax.lines)
    np.testing.assert_array_equal(training, [5, np.nan, 2, 1])
    np.testing.assert_array_equal(validation, [np.nan, 3, np.nan, 2])
    (ax,) = plot_history([row(1, 5.0, None), row(2, 4.0, None)]).axes
    assert legend_of(ax) == ["training"]


def test_history_of_one_epoch_is_visible():
    (ax,) = plot_history([row(1, 5.0, 4.0)]).axes
    ax.figure.canvas.draw()
    assert all(line.get_marker() == "o" and line.get_markersize() > 0 for line in ax.lines)
    assert [tick for tick in ax.get_xticks() if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]] == [1]


@pytest.mark.parametrize(("keys", "titles"), [(["b", "loss"], ["b", "loss"]), ("b", ["b"]), (None, ["loss", "a", "b"])])
def test_history_draws_the_quantities_asked_for(keys, titles):
    figure = plot_history([row(1, 5.0, 4.0, train_a="no number" if keys else 1, val_b=2)], keys=keys)
    assert [ax.get_title() for ax in figure.axes] == titles


@pytest.mark.parametrize(
    ("history", "keys", "message"),
    [
        ([], None, r"expected a history: .* got \[\]"),
        (row(1, 5.0, 4.0), None, "expected a history: a list with a dict for each"),
        ([row(1, 5.0, 4.0, val_b=2)], ["loss", "c"], r"keys among those of the history, loss, b, got \['loss', 'c'\]"),
        ([row(1, 5.0, 4.0)], [], r"keys among those of the history, loss, got \[\]"),
        ([{"epoch": 1}], None, "keys among those of the history, none"),
        ([row(1, "five", 4.0)], None, "expected a number as train_loss of the history, got 'five'"),
        ([row(1, 5.0, [4.0, 3.0])], None, r"expected a number as val_loss of the history, got \[4.0, 3.0\]"),
    ],
)
def test_history_that_cannot_be_drawn_is_an_error(history, keys, message):
    with pytest.raises(ValueError, match=message):
        plot_history(history, keys=keys)
    assert plt.get_fignums() == []


# --- plot_roc


ROC = np.array([0.0, 0.001, 0.1, 1.0]), np.array([0.5, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list], ids=["array", "tensor", "list"])
def test_roc_has_a_line_for_each_curve(kind):
    curves = {"good": ROC, "better": (ROC[0][1:], np.sqrt(ROC[1][1:]))}
    ax = plot_roc({name: (kind(far), kind(tar)) for name, (far, tar) in curves.items()})
    ax.figure.canvas.draw()
    assert len(ax.lines) == 2
    for line, (name, (far, tar)) in zip(ax.lines, curves.items()):
        assert line.get_label() == name
        assert line.get_drawstyle() == "steps-post"  # a threshold accepts the share of the one below it
        np.testing.assert_allclose(np.asarray(line.get_xdata()), far)
        np.testing.assert_allclose(np.asarray(line.get_ydata()), tar)
    assert len({line.get_color() for line in ax.lines}) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(curves)


def test_roc_has_a_log_axis_and_labels():
    ax = plot_roc({"good": ROC})
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert ax.get_xlim() == (1e-4, 1)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("false accept rate", "true accept rate")


def test_roc_is_drawn_on_the_axes_given():
    figure, (left, right) = plt.subplots(1, 2)
    assert plot_roc({"good": ROC}, ax=right) is right
    assert (len(left.lines), len(right.lines)) == (0, 1)
    assert plt.get_fignums() == [figure.number]


def test_roc_without_axes_makes_a_figure_of_its_own():
    first, second = plot_roc({"good": ROC}), plot_roc({"good": ROC})
    assert first.figure is not second.figure
    assert (len(first.lines), len(second.lines)) == (1, 1)


def test_roc_draws_what_verification_returns():
    labels = torch.arange(60) % 3
    curve = verification(labels[:, None] + 0.3 * torch.randn(60, 2), labels)["curve"]
    ax = plot_roc({"embeddings": curve})
    ax.figure.canvas.draw()
    np.testing.assert_allclose(ax.lines[0].get_xdata(), curve[0])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), curve[1])


def test_embeddings_in_half_precision_and_labels_of_any_kind_are_drawn():
    embeddings, labels = points(30, 3)
    embeddings, labels = torch.tensor(embeddings).bfloat16(), torch.tensor(labels, dtype=torch.float32).requires_grad_()
    assert len(plot_embeddings(embeddings, labels).collections) == 3
    assert len(compare_embeddings({"a": (embeddings, labels)}).axes[0].collections) == 3


@pytest.mark.slow
def test_movie_has_a_picture_for_each_frame_on_the_same_axes(tmp_path, monkeypatch):
    seen = []

    def draw(embeddings, labels, xlim, ylim, **options):
        seen.append((len(embeddings), tuple(xlim), tuple(ylim), options["title"], tuple(options["classes"])))
        return plot_embeddings(embeddings, labels, xlim, ylim, **options)

    monkeypatch.setattr("plots.plot_embeddings", draw)
    frames = [points(6, 2), points(9, 3, scale=5.0), (torch.zeros(4, 2), torch.zeros(4, dtype=torch.uint16))]
    embedding_movie(frames, tmp_path / "movie.gif", titles=["a", "b", "c"], fps=2, class_names=["x", "y", "z"])
    assert [(n, title, classes) for n, *_, title, classes in seen] == [
        (6, "a", (0, 1, 2)),
        (9, "b", (0, 1, 2)),
        (4, "c", (0, 1, 2)),
    ]
    assert len({limits[1:3] for limits in seen}) == 1
    (low, high), _ = seen[0][1:3]
    assert low < frames[1][0][:, 0].min() < frames[1][0][:, 0].max() < high
    with Image.open(tmp_path / "movie.gif") as movie:
        durations = []
        for number in range(movie.n_frames):  # equal frames at the end may be one that lasts
            movie.seek(number)
            durations.append(movie.info["duration"])
        assert movie.n_frames >= 3
        assert sum(durations) == 3000  # half a second for each of two, two seconds for the last
    assert plt.get_fignums() == []


@pytest.mark.slow
def test_movie_of_one_point(tmp_path):
    embedding_movie([(np.zeros((3, 2)), np.zeros(3))] * 2, tmp_path / "movie.gif")
    assert (tmp_path / "movie.gif").stat().st_size > 0


@pytest.mark.parametrize(
    ("labels", "class_names"), [(["a", "b"], ["x", "y"]), ([1, 2], ["x", "y"]), ([1], None), ([1, "a"], None)]
)
def test_movie_of_labels_that_do_not_fit_is_an_error_and_leaves_nothing(labels, class_names, tmp_path):
    with pytest.raises(ValueError, match=r"expected (class_names|2 labels)"):
        embedding_movie([(np.eye(2), labels)], tmp_path / "movie.gif", class_names=class_names)
    assert (list(tmp_path.iterdir()), plt.get_fignums()) == ([], [])


def test_movie_is_collected_by_a_metric():
    frames = []
    metric = EmbeddingMetric(lambda embeddings, labels: frames.append((embeddings, labels)) or {})
    with torch.no_grad():
        for _ in range(2):
            metric.reset()
            metric((torch.rand(5, 2),), (torch.arange(5),), None)
            assert metric.value() == {}
    assert [len(embeddings) for embeddings, _ in frames] == [5, 5]


@pytest.mark.parametrize(("frames", "titles"), [([], None), ([points(4, 2)], ["a", "b"])])
def test_movie_of_nothing_is_an_error(tmp_path, frames, titles):
    with pytest.raises(ValueError, match="expected frames, and as many titles"):
        embedding_movie(frames, tmp_path / "movie.gif", titles=titles)


def test_movie_without_time_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="fps of at least 1, got 1 and 1, fps 0"):
        embedding_movie([points(4, 2)], tmp_path / "movie.gif", fps=0)


# --- texts that are not what they seem


def test_dollars_and_underscores_are_text():
    names = ["$x_$", "_b", "$5 to $10"]
    ax = plot_embeddings(np.eye(3)[:, :2], names, title="$^$ and $$")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == sorted(names)
    compare_embeddings({"$x_$": (np.eye(3)[:, :2], names)})
    plot_roc({name: ROC for name in names})
    plot_history([{"epoch": 1, "train_$x_$": 1.0}])
    plot_neighbors(images_of(3, 4, 4), names, images_of(3, 4, 4), names, [[0], [1], [2]])
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()  # a formula that cannot be read would be an error here


def test_names_in_the_legend_are_short_enough_to_leave_room():
    labels = [f"class name of usual length {i}" for i in range(60)]
    ax = plot_embeddings(np.random.default_rng(0).normal(size=(60, 2)), labels)
    ax.figure.canvas.draw()
    assert {len(text.get_text()) for text in ax.get_legend().get_texts()} == {24}
    assert ax.get_position().width > 0.4


@pytest.mark.parametrize("noise", [0, 1e-9])
def test_embeddings_that_have_collapsed_are_said_to(noise):
    x = 0.1 + noise * np.random.default_rng(0).normal(size=(30, 16))
    assert "all points as good as equal" in plot_embeddings(x, np.arange(30) % 3).get_title()


def test_large_labels_of_uint64_are_shown_as_they_are():
    ax = plot_embeddings(np.eye(2), np.array([2**64 - 1, 5], dtype=np.uint64), class_names={2**64 - 1: "last"})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["5", "last"]


@pytest.mark.parametrize("curves", [ROC, {"a": {"far": 1}}, {"a": ROC[0]}, None])
def test_curves_that_are_none_are_an_error(curves):
    with pytest.raises(ValueError, match=r"expected curves as a dict from a name to arrays \(far, tar\)"):
        plot_roc(curves)
