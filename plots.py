"""Pictures of two-dimensional embeddings, with matplotlib.

Give each a tensor or an array:

    figure = compare_embeddings({"train": (train_embeddings, train_labels), "test": (test_embeddings, test_labels)})
    figure.savefig("embeddings.png")
"""

import matplotlib.pyplot as plt
import numpy as np


def plot_embeddings(embeddings, labels, xlim=None, ylim=None, *, ax=None, title=None, class_names=None, classes=None):
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
    embeddings, labels = (x.detach().cpu() if hasattr(x, "detach") else x for x in (embeddings, labels))
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    if embeddings.ndim != 2 or embeddings.shape[1] != 2:
        raise ValueError(f"expected embeddings of shape (N, 2), got {embeddings.shape}")
    if ax is None:
        ax = plt.figure(figsize=(7, 6), layout="constrained").add_subplot()
    classes = np.unique(labels) if classes is None else classes
    size = float(np.clip(20000 / max(1, len(embeddings)), 3, 12))  # small points for many, visible ones for few
    colours = plt.get_cmap("tab10" if len(classes) <= 10 else "nipy_spectral", len(classes))
    for number, label in enumerate(classes):
        name = label if class_names is None else class_names[number]
        x, y = embeddings[labels == label].T
        ax.scatter(x, y, s=size, alpha=0.6, linewidths=0, color=colours(number), label=str(name), rasterized=True)
    if xlim is not None:
        ax.set_xlim(xlim)
    if ylim is not None:
        ax.set_ylim(ylim)
    ax.set_title(title)
    legend = ax.legend(markerscale=3, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    return ax


def compare_embeddings(sets, *, class_names=None):
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
    classes = np.unique(np.concatenate([np.asarray(labels) for _, labels in sets.values()]))
    for ax, (title, (embeddings, labels)) in zip(axes[0], sets.items()):
        plot_embeddings(embeddings, labels, ax=ax, title=title, class_names=class_names, classes=classes)
    for ax in axes[0, :-1]:
        ax.get_legend().remove()
    return figure
