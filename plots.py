"""Pictures of embeddings, with matplotlib: in the plane, nearest neighbours, ROC curves.

Give each tensors or arrays:

    figure = compare_embeddings({"train": (train_embeddings, train_labels), "test": (test_embeddings, test_labels)})
    figure.savefig("embeddings.png")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot_embeddings(
    embeddings: Any,
    labels: Any,
    xlim: tuple[float, float] | None = None,
    ylim: tuple[float, float] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    class_names: Sequence[str] | None = None,
    classes: Any = None,
) -> Axes:
    """Scatter plot of 2-D embeddings, a colour for each class.

    Args:
        embeddings: (N, 2), tensor or array.
        labels: (N,), tensor or array.
        xlim, ylim: `(low, high)` of the axes.
        ax: matplotlib axes to draw on; a new figure by default.
        title: text above the picture.
        class_names: text of the legend for each class; by default its label.
        classes: labels in the order of colours and names; by default those that occur, ascending.

    Returns:
        The axes.

    Raises:
        ValueError: embeddings that are not 2-D.
    """
    embeddings, labels = _array(embeddings), _array(labels)
    if embeddings.ndim != 2 or embeddings.shape[1] != 2:
        raise ValueError(f"expected embeddings of shape (N, 2), got {embeddings.shape}")
    if ax is None:
        ax = plt.figure(figsize=(7, 6), layout="constrained").add_subplot()
    classes = np.unique(labels) if classes is None else classes
    size = float(np.clip(20000 / max(1, len(embeddings)), 3, 12))  # small points for many, visible ones for few
    n_colours = len(classes)
    name_of_map = "tab10" if n_colours <= 10 else "tab20" if n_colours <= 20 else "nipy_spectral"
    colours = plt.get_cmap(name_of_map, n_colours)
    for number, label in enumerate(classes):
        name = label if class_names is None else class_names[number]
        x, y = embeddings[labels == label].T
        ax.scatter(x, y, s=size, alpha=0.6, linewidths=0, color=colours(number), label=str(name), rasterized=True)
    if xlim is not None:
        ax.set_xlim(xlim)
    if ylim is not None:
        ax.set_ylim(ylim)
    ax.set_title(title or "")
    legend = ax.legend(markerscale=3, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for handle in legend.legend_handles:
        handle.set_alpha(1)  # type: ignore[union-attr]
    return ax


def compare_embeddings(sets: Mapping[str, tuple[Any, Any]], *, class_names: Sequence[str] | None = None) -> Figure:
    """Several sets of 2-D embeddings side by side on the same axes.

    Args:
        sets: dict from a title to `(embeddings, labels)`, (N, 2) and (N,).
        class_names: as for `plot_embeddings`.

    Returns:
        The figure.
    """
    figure, axes = plt.subplots(
        1, len(sets), figsize=(6.5 * len(sets), 5.5), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    classes = np.unique(np.concatenate([_array(labels) for _, labels in sets.values()]))
    for ax, (title, (embeddings, labels)) in zip(axes[0], sets.items()):
        plot_embeddings(embeddings, labels, ax=ax, title=title, class_names=class_names, classes=classes)
    for ax in axes[0, :-1]:
        ax.get_legend().remove()
    return figure


def embedding_movie(
    frames: Sequence[tuple[Any, Any]],
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    titles: Sequence | None = None,
    fps: int = 4,
) -> None:
    """2-D embeddings over time as an animated GIF, all frames on the same axes.

    An `EmbeddingMetric` of metrics.py collects them while `fit` runs, one frame for each epoch:

        frames = []
        metric = EmbeddingMetric(lambda embeddings, labels: frames.append((embeddings, labels)) or {})

    Args:
        frames: list of `(embeddings, labels)`, (N, 2) and (N,).
        path: the file to write.
        class_names: as for `plot_embeddings`.
        titles: text above each frame; by default its number, from 1.
        fps: frames a second; the last one stays for two seconds.

    Raises:
        ValueError: no frames, other than 2-D embeddings, or another number of titles.
    """
    if len(frames) == 0 or (titles is not None and len(titles) != len(frames)):
        raise ValueError(f"expected frames, and as many titles, got {len(frames)} and {len(titles or frames)}")
    titles = range(1, len(frames) + 1) if titles is None else titles
    classes = np.unique(np.concatenate([_array(labels) for _, labels in frames]))
    points = np.concatenate([_array(embeddings) for embeddings, _ in frames])
    extent = np.ptp(points, axis=0)
    margin = 0.05 * np.where(extent > 0, extent, 1)
    limits = np.stack((points.min(axis=0) - margin, points.max(axis=0) + margin), axis=1)  # of x and of y
    figure = plt.figure(figsize=(5.5, 4.5), layout="constrained")
    writer = PillowWriter(fps=fps)
    with writer.saving(figure, path, dpi=80):
        for (embeddings, labels), title in zip(frames, titles):
            figure.clear()
            style: Any = {"title": str(title), "class_names": class_names, "classes": classes}
            plot_embeddings(embeddings, labels, *limits, ax=figure.add_subplot(), **style)
            writer.grab_frame()
        for _ in range(2 * fps - 1):
            writer.grab_frame()
    plt.close(figure)


def plot_neighbors(
    query_images: Any,
    query_labels: Any,
    images: Any,
    labels: Any,
    neighbors: Any,
    *,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Queries, a row each, and their nearest neighbours: of the query's class in a blue frame, others in a red one.

    Args:
        query_images: (n, C, H, W) or (n, H, W), grey (C = 1) or RGB, any range.
        query_labels: (n,).
        images: the reference, (M, C, H, W) or (M, H, W).
        labels: (M,).
        neighbors: indices (n, k) into the reference, nearest first, as `knn_predict` of evaluation.py returns them.
        class_names: text for each label; by default the label.

    Returns:
        The figure.

    Raises:
        ValueError: as many queries, labels and rows of neighbours are expected.
    """
    query_labels, labels, neighbors = _array(query_labels), _array(labels), _array(neighbors)
    if neighbors.ndim != 2 or not len(neighbors) == len(query_labels) == len(query_images):
        given = f"{len(query_images)} images, {len(query_labels)} labels, neighbors of shape {neighbors.shape}"
        raise ValueError(f"expected n query images, n labels and neighbors of shape (n, k), got {given}")
    n, k = neighbors.shape
    name = str if class_names is None else lambda label: str(class_names[int(label)])
    figure, axes = plt.subplots(n, k + 1, figsize=(1.15 * (k + 1), 1.35 * n), squeeze=False, layout="constrained")
    for row, label, query, indices in zip(axes, query_labels, query_images, neighbors):
        _show(row[0], query, f"query: {name(label)}", "black")
        for ax, index in zip(row[1:], indices):
            is_right = labels[index] == label
            _show(ax, images[index], name(labels[index]), "tab:blue" if is_right else "tab:red")
    return figure


def _show(ax, image, title, colour):
    """An image (C, H, W) or (H, W) in a frame."""
    image = _array(image).astype(float)
    if image.ndim == 3:
        image = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)  # (H, W) or (H, W, 3)
    low, high = image.min(), image.max()
    ax.imshow((image - low) / max(high - low, 1e-12), cmap="gray_r" if image.ndim == 2 else None)
    ax.set_title(title, fontsize=7, color=colour, pad=2)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(edgecolor=colour, linewidth=1 if colour == "black" else 2.5)


def plot_roc(curves: Mapping[str, tuple[Any, Any]], *, ax: Axes | None = None) -> Axes:
    """ROC curves of verification: the share of same-class pairs accepted, against that of others, on a log axis.

    Args:
        curves: dict from a name to `(far, tar)`, as `verification(...)["curve"]` of evaluation.py.
        ax: matplotlib axes to draw on; a new figure by default.

    Returns:
        The axes.
    """
    if ax is None:
        ax = plt.figure(figsize=(6.5, 4.5), layout="constrained").add_subplot()
    for name, (far, tar) in curves.items():
        ax.step(far, tar, where="post", label=name)
    ax.set_xscale("log")
    ax.set_xlim(1e-4, 1)
    ax.set_xlabel("false accept rate")
    ax.set_ylabel("true accept rate")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="lower right")
    return ax


def _array(x):
    """A tensor of any dtype and device, or what numpy takes, as an array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x  # numpy has no bfloat16
    return np.asarray(x)
