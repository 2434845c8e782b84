"""Tests of plots.py, on the artists that it leaves on the axes."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from PIL import Image

from evaluation import verification
from metrics import EmbeddingMetric
from plots import compare_embeddings, embedding_movie, plot_embeddings, plot_neighbors, plot_roc


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


def test_names_title_and_limits_are_shown():
    _, own_axes = plt.subplots()
    embeddings, labels = points(6, 2)
    names = ["cat", "dog"]
    ax = plot_embeddings(embeddings, labels + 5, (-9, 8), (-7, 6), ax=own_axes, title="pets", class_names=names)
    assert ax is own_axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == names
    assert (ax.get_title(), ax.get_xlim(), ax.get_ylim()) == ("pets", (-9, 8), (-7, 6))


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


@pytest.mark.parametrize("shape", [(6, 3), (6, 1), (6,), (6, 2, 1)])
def test_embeddings_that_are_not_2d_are_an_error(shape):
    with pytest.raises(ValueError, match=r"shape \(N, 2\), got \(6,"):
        plot_embeddings(np.zeros(shape), np.zeros(6))
    with pytest.raises(ValueError, match=r"shape \(N, 2\), got \(6,"):
        compare_embeddings({"one": (np.zeros(shape), np.zeros(6))})


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
    frames = [points(6, 2), points(9, 3, scale=5.0), (torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))]
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
