"""Tests of plots.py, on the artists that it leaves on the axes."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from plots import compare_embeddings, plot_embeddings


@pytest.fixture(autouse=True)
def _without_a_screen():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def points(n, n_classes, scale=1.0):
    rng = np.random.default_rng(n)
    return (scale * rng.standard_normal((n, 2))).astype(np.float32), np.arange(n) % n_classes


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
