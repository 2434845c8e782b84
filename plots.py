"""Pictures of embeddings, neighbours, ROC and learning curves with matplotlib; a page to explore embeddings with bokeh.

Give each tensors or arrays; labels may be numbers or strings:

    figure = compare_embeddings({"train": (train_embeddings, train_labels), "test": (test_embeddings, test_labels)})
    figure.savefig("embeddings.png")
"""

import base64
import io
import math
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image


def plot_embeddings(
    embeddings: Any,
    labels: Any,
    xlim: tuple[float, float] | None = None,
    ylim: tuple[float, float] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    class_names: Any = None,
    classes: Any = None,
) -> Axes:
    """Scatter plot of embeddings, a colour for each class, with a legend of up to 100.

    Embeddings of more than two dimensions are drawn by their first two principal components, and the title says so. The
    largest weight of each component is positive.

    Args:
        embeddings: (N, D) with D of at least 2, tensor or array. For more than 2 the cost is O(N D min(N, D)).
        labels: (N,) or (N, 1), numbers or strings: a tensor, array, list or Series.
        xlim, ylim: `(low, high)` of the axes.
        ax: matplotlib axes to draw on; a new figure by default.
        title: text above the picture.
        class_names: texts for the labels: a dict from label to name, or a sequence that has the name of label i as its
            item i. A label that the dict lacks stands for itself, and so do all by default.
        classes: labels in the order of their colours, others are not drawn; by default those that occur, ascending.

    Returns:
        The axes.

    Raises:
        ValueError: embeddings of another shape, or not finite; labels that are not one for each embedding, or of two
            types; a sequence of names that has none for a label.
    """
    (points,), note = _in_the_plane([embeddings])
    if classes is None:
        (labels,) = _labels([labels], [points])
        classes = np.unique(labels)
    else:
        labels, classes = _labels([labels, classes], [points, classes])
    names = _names(classes, class_names).values()
    if ax is None:
        n_columns = math.ceil(len(classes) / 30) if len(classes) <= 100 else 0  # of the legend
        ax = plt.figure(figsize=(6 + max(1, 1.5 * n_columns), 6), layout="constrained").add_subplot()
    size = float(np.clip(20000 / max(1, len(points)), 3, 12))  # small points for many, visible ones for few
    style: Any = {"s": size, "alpha": 0.6, "linewidths": 0, "rasterized": True}
    drawn = [
        ax.scatter(*points[labels == label].T, color=colour, label=name, **style)
        for label, colour, name in zip(classes, _colours(len(classes)), names)
    ]
    if xlim is not None:
        ax.set_xlim(xlim)
    if ylim is not None:
        ax.set_ylim(ylim)
    ax.set_title(_titled(title, note), parse_math=False)  # a "$" is no formula
    if len(drawn) <= 100:
        style = {"ncols": max(1, math.ceil(len(drawn) / 30)), "loc": "center left", "bbox_to_anchor": (1, 0.5)}
        legend = _legend(ax, drawn, map(_short, names), markerscale=3, frameon=False, **style)
        for handle in legend.legend_handles:
            handle.set_alpha(1)
    return ax


def _legend(ax, handles, names, **style):
    """A legend of names as they are: matplotlib leaves out what begins with "_", and takes "$" for a formula."""
    legend = ax.legend(handles, [""] * len(handles), fontsize="small", **style)
    for text, name in zip(legend.get_texts(), names):
        text.set(text=name, parse_math=False)
    return legend


def _short(name):
    return name if len(name) <= 24 else f"{name[:23]}…"


def compare_embeddings(sets: Mapping[str, tuple[Any, Any]], *, class_names: Any = None) -> Figure:
    """Several sets of embeddings side by side on the same axes.

    Those of more than two dimensions are drawn by the first two principal components of all sets together.

    Args:
        sets: dict from a title to `(embeddings, labels)`, as for `plot_embeddings`, of one dimension.
        class_names: as for `plot_embeddings`.

    Returns:
        The figure.

    Raises:
        ValueError: no sets, or as for `plot_embeddings`.
    """
    points, note = _in_the_plane([embeddings for embeddings, _ in sets.values()])
    labels = _labels([labels for _, labels in sets.values()], points)
    classes = np.unique(np.concatenate(labels))
    style: Any = {"classes": classes, "class_names": _names(classes, class_names)}
    figure, axes = plt.subplots(
        1, len(sets), figsize=(6.5 * len(sets), 5.5), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for ax, title, x, y in zip(axes[0], sets, points, labels):
        plot_embeddings(x, y, ax=ax, title=_titled(title, note), **style)
    for ax in axes[0, :-1]:
        if ax.get_legend():
            ax.get_legend().remove()
    return figure


def embedding_movie(
    frames: Sequence[tuple[Any, Any]],
    path: str | Path,
    *,
    class_names: Any = None,
    titles: Sequence | None = None,
    fps: int = 4,
) -> None:
    """Embeddings over time as an animated GIF, all frames on the same axes.

    Those of more than two dimensions are drawn by the first two principal components of all frames together. An
    `EmbeddingMetric` of metrics.py collects frames while `fit` runs, one for each epoch:

        frames = []
        metric = EmbeddingMetric(lambda embeddings, labels: frames.append((embeddings, labels)) or {})

    Args:
        frames: list of `(embeddings, labels)`, as for `plot_embeddings`, of one dimension.
        path: the file to write.
        class_names: as for `plot_embeddings`.
        titles: text above each frame; by default its number, from 1.
        fps: frames a second; the last one stays for two seconds.

    Raises:
        ValueError: no frames, another number of titles, or fps below 1; or as for `plot_embeddings`.
    """
    titles = range(1, len(frames) + 1) if titles is None else titles
    if len(frames) == 0 or len(titles) != len(frames) or fps < 1:
        given = f"{len(frames)} and {len(titles)}, fps {fps}"
        raise ValueError(f"expected frames, and as many titles, and fps of at least 1, got {given}")
    points, note = _in_the_plane([embeddings for embeddings, _ in frames])
    labels = _labels([labels for _, labels in frames], points)
    classes = np.unique(np.concatenate(labels))
    style: Any = {"classes": classes, "class_names": _names(classes, class_names)}
    everything = np.concatenate(points)
    extent = np.ptp(everything, axis=0)
    margin = 0.05 * np.where(extent > 0, extent, 1)
    limits = np.stack((everything.min(axis=0) - margin, everything.max(axis=0) + margin), axis=1)  # of x and of y
    figure = plt.figure(figsize=(5.5, 4.5), layout="constrained")
    writer = PillowWriter(fps=fps)
    with writer.saving(figure, path, dpi=80):
        for x, y, title in zip(points, labels, titles):
            figure.clear()
            plot_embeddings(x, y, *limits, ax=figure.add_subplot(), title=_titled(title, note), **style)
            writer.grab_frame()
        for _ in range(2 * fps - 1):
            writer.grab_frame()
    plt.close(figure)


def embedding_page(
    embeddings: Any,
    labels: Any,
    images: Any,
    path: str | Path,
    *,
    class_names: Any = None,
    title: str | None = None,
) -> None:
    """Embeddings as one HTML file for the browser: the mouse over a point shows its image and label.

    The wheel zooms and dragging moves the picture; a click on a class in the legend hides it, and shows it again. More
    than 100 classes have no legend. The page loads nothing from elsewhere. Embeddings of more than two dimensions are
    drawn by their first two principal components, and the title says so.

    Args:
        embeddings: (N, D) with D of at least 2, tensor or array.
        labels: (N,) or (N, 1), as for `plot_embeddings`.
        images: (N, C, H, W) or (N, H, W), grey (C = 1) or RGB, of any range and dtype, or a list of N such images. The
            least value of all becomes black and the largest white, for grey ones the other way round. Images of more
            than 64 pixels are made smaller; grey ones are kept as PNG, others as JPEG.
        path: the file to write, whole or, if an error occurs, not at all.
        class_names: as for `plot_embeddings`.
        title: text above the picture; by default the numbers of points and classes.

    Raises:
        ValueError: images that are not one for each embedding, of another shape or not finite; or as for
            `plot_embeddings`.
        OSError: a path whose folder does not exist, or that is no file.
        ImportError: without bokeh.
    """
    try:
        from bokeh.embed import file_html
        from bokeh.resources import INLINE
    except ImportError as error:
        raise ImportError("embedding_page needs bokeh: pip install bokeh") from error
    path = Path(path).resolve()  # the file that a link names
    if not path.parent.is_dir() or (path.exists() and not path.is_file()):
        raise OSError(f"expected path to be a file in a folder that exists, got {path}")
    (points,), note = _in_the_plane([embeddings])
    (labels,) = _labels([labels], [points])
    classes, codes = np.unique(labels, return_inverse=True)
    names = list(_names(classes, class_names).values())
    uris, largest = _encoded(images, len(points))
    heading = title or f"{len(points):,} embeddings of {len(classes):,} classes"
    tooltip = _TOOLTIP.format(
        side=96 if largest > 64 else largest * math.ceil(96 / largest),  # whole multiples stay sharp
        rendering="auto" if largest > 64 else "pixelated",
    )
    figure = _page_figure(points, codes, names, uris, _titled(heading, note), tooltip)
    _write_whole(path, file_html(figure, INLINE, title=heading))


_TOOLTIP = """<div style="max-width: 240px; text-align: center; overflow-wrap: anywhere">
<img src="@image" style="width: {side}px; height: {side}px; object-fit: contain; image-rendering: {rendering}">
<br><b>@name</b> row @row</div>"""


def _page_figure(points, codes, names, uris, title, tooltip):
    """A bokeh figure of points (N, 2), with a renderer for each class, or one for all where there is no legend."""
    from bokeh.models import ColumnDataSource, HoverTool, Legend, LegendItem, PlainText, Title
    from bokeh.plotting import figure

    tools: Any = {"tools": "pan,wheel_zoom,box_zoom,reset,save", "active_scroll": "wheel_zoom"}
    plot = figure(title=Title(text=PlainText(text=title)), output_backend="webgl", sizing_mode="stretch_both", **tools)
    colours = np.array([to_hex(colour) for colour in _colours(len(names))])
    names, uris = np.array(names, dtype=object), np.array(uris, dtype=object)
    style: Any = {"size": float(np.clip(400 / math.sqrt(len(points)), 5, 10)), "line_color": None, "alpha": 0.7}
    parts = [np.flatnonzero(codes == c) for c in range(len(names))] if len(names) <= 100 else [np.arange(len(points))]
    items = []
    for rows in parts:
        x, y = points[rows].T
        columns = {"x": x, "y": y, "row": rows, "colour": colours[codes[rows]].tolist()}
        columns |= {"name": names[codes[rows]].tolist(), "image": uris[rows].tolist()}
        dots = plot.scatter("x", "y", source=ColumnDataSource(columns), color="colour", **style)
        items.append(LegendItem(label={"value": _short(columns["name"][0])}, renderers=[dots]))
    plot.add_tools(HoverTool(tooltips=tooltip, limit=1, attachment="horizontal"))  # one point of each class
    if len(parts) == len(names):
        plot.add_layout(Legend(items=items, click_policy="hide", ncols=math.ceil(len(items) / 20)), "right")
    return plot


def _encoded(images, n):
    """Images as n data URIs, and the largest of their heights and widths."""
    images = [_array(image) for image in (images if isinstance(images, (list, tuple)) else _array(images))]
    if not 0 < n == len(images):
        raise ValueError(f"expected an image for each of at least one embedding, got {len(images)} for {n}")
    images = [_channels_last(image) for image in images]
    low, high = (float(extreme([extreme(image) for image in images])) for extreme in (np.min, np.max))
    if not math.isfinite(high - low):
        raise ValueError(f"expected finite images, got values from {low} to {high}")
    largest = max(max(image.shape[:2]) for image in images)
    return [_data_uri((image.astype(float) - low) / max(high - low, 1e-12)) for image in images], largest


def _data_uri(image):
    """An image (H, W) or (H, W, 3) of values from 0 to 1."""
    is_grey = image.ndim == 2
    levels = np.rint(255 * (1 - image if is_grey else image)).astype(np.uint8)
    picture = Image.fromarray(levels)
    picture.thumbnail((64, 64))
    file = io.BytesIO()
    if is_grey:
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=85, optimize=True)
    return f"data:image/{'png' if is_grey else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def _write_whole(path, text):
    """Write a text file, which is there whole or not at all, with the mode of one that was there."""
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def plot_neighbors(
    query_images: Any,
    query_labels: Any,
    images: Any,
    labels: Any,
    neighbors: Any,
    *,
    class_names: Any = None,
) -> Figure:
    """Queries, a row each, and their nearest neighbours: of the query's class in a blue frame, others in a red one.

    Args:
        query_images: (n, C, H, W) or (n, H, W), grey (C = 1) or RGB, any range.
        query_labels: (n,) or (n, 1), as for `plot_embeddings`.
        images: the reference, (M, C, H, W) or (M, H, W).
        labels: (M,) or (M, 1).
        neighbors: indices (n, k) into the reference, nearest first, as `knn_predict` of evaluation.py returns them.
        class_names: as for `plot_embeddings`.

    Returns:
        The figure.

    Raises:
        ValueError: if the numbers of queries, labels and rows of neighbours differ, or those of images and labels of
            the reference; indices that the reference lacks; images of another shape; labels and names as for
            `plot_embeddings`.
    """
    neighbors = _array(neighbors)
    if neighbors.ndim != 2 or neighbors.size == 0 or len(neighbors) != len(query_images):
        given = f"{len(query_images)} images, neighbors of shape {neighbors.shape}"
        raise ValueError(f"expected n query images and neighbors of shape (n, k), got {given}")
    query_labels, labels = _labels([query_labels, labels], [query_images, images])
    if neighbors.dtype.kind not in "iu" or ((neighbors < 0) | (neighbors >= len(labels))).any():
        raise ValueError(f"expected neighbors from 0 to {len(labels) - 1}, got {neighbors}")
    n, k = neighbors.shape
    classes = np.unique(np.concatenate((query_labels, labels[neighbors].ravel())))
    names = _names(classes, class_names)
    figure, axes = plt.subplots(n, k + 1, figsize=(1.15 * (k + 1), 1.35 * n), squeeze=False, layout="constrained")
    for row, label, query, indices in zip(axes, query_labels.tolist(), query_images, neighbors.tolist()):
        _show(row[0], query, f"query: {names[label]}", "black")
        for ax, index in zip(row[1:], indices):
            is_right = labels[index] == label
            _show(ax, images[index], names[labels[index].item()], "tab:blue" if is_right else "tab:red")
    return figure


def _show(ax, image, title, colour):
    """An image (C, H, W) or (H, W) in a frame."""
    image = _channels_last(_array(image)).astype(float)
    low, high = image.min(), image.max()
    ax.imshow((image - low) / max(high - low, 1e-12), cmap="gray_r" if image.ndim == 2 else None)
    ax.set_title(title, fontsize=7, color=colour, pad=2, parse_math=False)
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

    Raises:
        ValueError: anything else than such a dict.
    """
    if not isinstance(curves, Mapping) or not all(
        isinstance(x, (tuple, list)) and len(x) == 2 for x in curves.values()
    ):
        raise ValueError(f"expected curves as a dict from a name to arrays (far, tar), got {curves!r:.100}")
    if ax is None:
        ax = plt.figure(figsize=(6.5, 4.5), layout="constrained").add_subplot()
    lines = [ax.step(_array(far), _array(tar), where="post", label=name)[0] for name, (far, tar) in curves.items()]
    ax.set_xscale("log")
    ax.set_xlim(1e-4, 1)
    ax.set_xlabel("false accept rate")
    ax.set_ylabel("true accept rate")
    ax.grid(alpha=0.3)
    _legend(ax, lines, map(str, curves), loc="lower right")
    return ax


def plot_history(history: Sequence[Mapping[str, Any]], *, keys: Sequence[str] | None = None) -> Figure:
    """Learning curves: a panel for each quantity, with a line for training and one for validation.

    Args:
        history: what `fit` of trainer.py returns: a dict for each epoch, with `epoch` and, for each quantity NAME,
            numbers `train_NAME` and `val_NAME`. Values that are absent, None or NaN leave gaps.
        keys: names of the quantities to draw, such as `["loss", "map@r"]`; by default all.

    Returns:
        The figure.

    Raises:
        ValueError: no epochs, or no such quantity; a value that is no number.
    """
    if len(history) == 0 or not all(isinstance(row, Mapping) for row in history):
        raise ValueError(f"expected a history: a list with a dict for each of at least one epoch, got {history!r:.100}")
    parts = {"train": ("training", "tab:blue"), "val": ("validation", "tab:orange")}
    prefixes = ("train_", "val_")
    found = dict.fromkeys(key.partition("_")[2] for row in history for key in row if key.startswith(prefixes))
    keys = list(found) if keys is None else [keys] if isinstance(keys, str) else list(keys)
    if not keys or not found.keys() >= set(keys):
        raise ValueError(f"expected keys among those of the history, {', '.join(found) or 'none'}, got {keys}")
    epochs = [row.get("epoch", number) for number, row in enumerate(history, 1)]
    values = {f"{part}_{key}": [_number(row, f"{part}_{key}") for row in history] for key in keys for part in parts}
    n_columns = min(len(keys), 3)
    n_rows = math.ceil(len(keys) / n_columns)
    figure = plt.figure(figsize=(4.2 * n_columns, 3.2 * n_rows), layout="constrained")
    for number, key in enumerate(keys, 1):
        ax = figure.add_subplot(n_rows, n_columns, number, xlabel="epoch")
        ax.set_title(key, parse_math=False)
        for part, (label, colour) in parts.items():
            if np.isfinite(values[f"{part}_{key}"]).any():
                ax.plot(epochs, values[f"{part}_{key}"], "o-", markersize=3, color=colour, label=label)
                ax.legend(fontsize="small")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.grid(alpha=0.3)
    return figure


def _number(row, key):
    """A value of the history as a float; NaN if there is none."""
    try:
        return float("nan" if row.get(key) is None else _array(row[key]).item())
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a number as {key} of the history, got {row[key]!r:.100}") from error


def _in_the_plane(sets):
    """Checked embeddings (N, D) of some sets as points (N, 2), and a note for the title: how, if D is more than 2."""
    sets = [_array(embeddings) for embeddings in sets]
    for embeddings in sets:
        if embeddings.ndim != 2 or embeddings.shape[1] < 2 or embeddings.dtype.kind not in "biuf":
            given = f"{embeddings.dtype} of shape {embeddings.shape}"
            raise ValueError(f"expected embeddings of shape (N, D) with D of at least 2, got {given}")
        fits = np.abs(embeddings, dtype=float) < 1e150  # neither NaN nor infinite, and with a square
        if not fits.all():
            n_bad = (~fits).any(axis=1).sum()
            raise ValueError(
                f"expected embeddings that are finite and below 1e150, got others in {n_bad} of {len(fits)}"
            )
    dimensions = {embeddings.shape[1] for embeddings in sets}
    if len(dimensions) != 1:
        raise ValueError(f"expected sets of embeddings of one dimension, got {sorted(dimensions) or 'no sets'}")
    sets = [embeddings.astype(float) for embeddings in sets]
    if dimensions == {2}:
        return sets, ""
    everything = np.concatenate(sets)
    points, share = _principal(everything)
    is_spread = np.ptp(points, axis=0).max(initial=0) > 1e-7 * np.abs(everything).max(initial=0)
    of_all = f"{share:.0%} of the variance" if is_spread else "all points as good as equal"
    note = f"first two of {dimensions.pop()} principal components, {of_all}"
    return np.split(points, np.cumsum([len(embeddings) for embeddings in sets])[:-1]), note


def _principal(x):
    """The first two principal components (N, 2) of float64 embeddings (N, D), and their share of the variance."""
    N, D = x.shape
    x = x - x.sum(axis=0) / max(N, 1)
    variances, vectors = np.linalg.eigh(x.T @ x if D <= N else x @ x.T)  # ascending, of the smaller of both
    total, variances, vectors = variances.sum(), variances[:-3:-1].clip(min=0), vectors[:, :-3:-1]
    weights = vectors if D <= N else x.T @ vectors  # (D, 2)
    points = x @ vectors if D <= N else vectors * np.sqrt(variances)
    largest = np.take_along_axis(weights, np.abs(weights).argmax(axis=0)[None], axis=0)  # (1, 2)
    points = np.pad(points * np.where(largest < 0, -1, 1), ((0, 0), (0, 2 - points.shape[1])))  # N may be 1
    return points, variances.sum() / total if total > 0 else 1.0


def _labels(labels_of_sets, sets):
    """Labels of some sets as arrays (N,), all of them numbers or all of them strings."""
    parts = []
    for labels, of in zip(labels_of_sets, sets):
        if not isinstance(labels, (list, tuple)):
            part = _array(labels)
        else:
            part = np.asarray([_array(x) if hasattr(x, "detach") else x for x in labels], dtype=object)
        if part.dtype.kind in "OT" and len({isinstance(label, str) for label in part.flat}) <= 1:  # "1" is not 1
            part = np.asarray(part.tolist())
        if part.shape not in ((len(of),), (len(of), 1)) or part.dtype.kind not in "biufU":
            given = "none" if labels is None else f"{part.dtype} of shape {part.shape}"
            raise ValueError(f"expected {len(of)} labels, numbers or strings, got {given}")
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            raise ValueError("expected labels that are finite, got NaN or infinity")
        is_whole = part.dtype.kind in "iu" or (part.dtype.kind == "f" and (part == np.rint(part)).all())
        is_large = part.dtype == np.uint64 and part.max(initial=0) >= 2**63
        parts.append(part.reshape(-1).astype(object if is_large else np.int64 if is_whole else part.dtype))
    if len({part.dtype.kind == "U" for part in parts if part.size}) > 1:
        raise ValueError("expected labels of one type, got numbers and strings")
    return parts


def _names(classes, class_names):
    """A dict with the text for each label of an array (C,): its name, or the label itself."""
    classes = classes.tolist()
    class_names = _array(class_names).tolist() if hasattr(class_names, "detach") else class_names
    if class_names is None or hasattr(class_names, "keys"):  # a dict, or a Series
        return {label: str(label if class_names is None else class_names.get(label, label)) for label in classes}
    without = [label for label in classes if not isinstance(label, int) or not 0 <= label < len(class_names)]
    if without or isinstance(class_names, str):
        wanted = "a dict from label to name, or a sequence with a name for each label 0, 1, ..."
        raise ValueError(f"expected class_names as {wanted}; got {len(class_names)} names, none for {without[:5]}")
    return {label: str(class_names[label]) for label in classes}


def _colours(n):
    """Colours of n classes."""
    colours = plt.get_cmap("tab10" if n <= 10 else "tab20" if n <= 20 else "nipy_spectral", n)
    return [colours(number) for number in range(n)]


def _titled(title, note):
    return "\n".join(str(text) for text in (title, note) if text not in (None, ""))


def _channels_last(image):
    """An image (1, H, W) or (H, W) as (H, W), one of three channels as (H, W, 3)."""
    if image.ndim not in (2, 3) or (image.ndim == 3 and len(image) not in (1, 3)) or image.size == 0:
        raise ValueError(f"expected images of shape (1, H, W), (3, H, W) or (H, W), channels first, got {image.shape}")
    if image.ndim == 2:
        return image
    return image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)


def _array(x):
    """A tensor of any dtype and device, or what numpy takes, as an array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() and x.element_size() < 4 else x  # numpy has no bfloat16
    return np.asarray(x)
