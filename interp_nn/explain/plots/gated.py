"""Figures of gated networks: their hyperplanes and trees, path kernels, kernel alignment over training, and training regimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from interp_nn.explain.plots.canvas import LIGHT, PALETTE, SIGNED, array, new_axes, scale, set_title
from interp_nn.nn.gated.oblique_tree import ObliqueTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def gate_hyperplanes(found: Tensor, truth: Tensor, *, level: float = 0.99, axes: Axes | None = None) -> Axes:
    """Draw |cos| between known hyperplanes (rows) and those of gates (columns), with each row's best gate on the diagonal.

    A row's label has its largest |cos|. The title has the number of rows that reach `level`.

    Args:
        found: Normals (gates, d), as `effective_gate_weights` returns them.
        truth: Known normals (m, d).
        level: The |cos| at which a hyperplane counts as found.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: Other shapes, or values that are not finite.
        ImportError: matplotlib is not installed.

    Example:
        >>> gate_hyperplanes(torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.eye(2)).get_title()
        '1 of 2 hyperplanes found at |cos| ≥ 0.99'
    """
    normals = [_directions(values, name) for name, values in (("found", found), ("truth", truth))]
    if normals[0].shape[1] != normals[1].shape[1]:
        raise ValueError(
            f"found, truth: got normals of {normals[0].shape[1]} and {normals[1].shape[1]} dimensions, want the same"
        )
    cosines = array((normals[1] @ normals[0].T).abs())
    best, gates = cosines.max(1), cosines.argmax(1)
    first = list(dict.fromkeys(gates.tolist()))
    rest = [gate for gate in np.argsort(-cosines.max(0), kind="stable").tolist() if gate not in set(first)]
    axes = new_axes(axes, (0.16 * cosines.shape[1] + 3.0, 0.22 * len(cosines) + 1.4))
    shown = axes.imshow(cosines[:, first + rest], cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.figure.colorbar(shown, ax=axes, label="|cos|")
    axes.set_yticks(range(len(best)), [f"{i}: {value:.3f}" for i, value in enumerate(best)], fontsize=8)
    axes.set(xlabel="gate", ylabel="hyperplane: its best |cos|", xticks=[])
    set_title(axes, f"{int((best >= level).sum())} of {len(best)} hyperplanes found at |cos| ≥ {level:g}")
    return axes


def kernel_matrix(kernel: Tensor, labels: Tensor | None = None, *, axes: Axes | None = None) -> Axes:
    """Draw a kernel in colour, with the samples sorted by label and lines between the classes.

    The colour scale holds 99 % of the values. It starts at zero if no value is negative, and is symmetric otherwise.

    Args:
        kernel: (n, n).
        labels: Class of each sample (n,).
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: Other shapes.
        ImportError: matplotlib is not installed.

    Example:
        >>> axes = kernel_matrix(torch.eye(3), torch.tensor([1, 0, 1]))
        >>> [label.get_text() for label in axes.get_xticklabels()]
        ['0', '1']
    """
    values = array(kernel)
    n = len(values)
    if values.ndim != 2 or values.shape != (n, n) or not n:
        raise ValueError(f"kernel: got shape {tuple(kernel.shape)}, want (n, n)")
    if labels is not None and labels.shape != (n,):
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, want ({n},)")
    axes = new_axes(axes, (5.0, 4.2))
    ticks: tuple[list[float], list[str]] = ([], [])
    if labels is not None:
        order = np.argsort(array(labels), kind="stable")
        values = values[np.ix_(order, order)]
        classes, counts = np.unique(array(labels), return_counts=True)
        ends = np.cumsum(counts)
        for end in ends[:-1]:
            axes.axhline(end - 0.5, color="black", linewidth=0.4)
            axes.axvline(end - 0.5, color="black", linewidth=0.4)
        ticks = (ends - counts / 2 - 0.5).tolist(), [f"{c:g}" for c in classes]
    limit, extend = scale(values)
    signed = bool((values < 0).any())
    low, colours = (-limit, SIGNED) if signed else (0.0, "Greys")
    shown = axes.imshow(values, cmap=colours, vmin=low, vmax=limit, interpolation="nearest")
    axes.figure.colorbar(shown, ax=axes, label="kernel" if signed else "kernel (no entry is negative)", extend=extend)
    axes.set_xticks(*ticks)
    axes.set_yticks(*ticks)
    axes.set(xlabel="sample" if labels is None else "class of the sample")
    if labels is not None:
        same = np.equal.outer(array(labels)[order], array(labels)[order])
        within, between = values[same].mean(), values[~same].mean() if (~same).any() else np.nan
        set_title(axes, f"mean within classes {within:.3g}, between {between:.3g}")
    elif n > 1:
        inner = np.eye(n, dtype=bool)
        set_title(axes, f"mean on the diagonal {values[inner].mean():.3g}, off it {values[~inner].mean():.3g}")
    return axes


def alignment_curves(curves: Mapping[str, Tensor], *, axes: Axes | None = None) -> Axes:
    """Draw kernel alignment over training; several seeds are thin lines, and their mean is a thick line.

    Args:
        curves: By name, alignments (epochs + 1,) or (seeds, epochs + 1). The first is before training.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: No curves, or other shapes.
        ImportError: matplotlib is not installed.

    Example:
        >>> axes = alignment_curves({"ReLU": torch.tensor([0.1, 0.5, 0.9])})
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('epoch', 'alignment with the classes')
    """
    if not curves:
        raise ValueError("curves: got none, want at least one")
    axes = new_axes(axes, (6.4, 3.8))
    from matplotlib.ticker import MaxNLocator

    for i, (name, values) in enumerate(curves.items()):
        lines = array(torch.atleast_2d(values))
        if lines.ndim != 2 or not lines.size:
            raise ValueError(
                f"curves: {name} has shape {tuple(values.shape)}, want (epochs + 1,) or (seeds, epochs + 1)"
            )
        epochs = np.arange(lines.shape[1])
        if len(lines) > 1:
            axes.plot(epochs, lines.T, color=PALETTE[i % len(PALETTE)], linewidth=0.6, alpha=0.5)
        axes.plot(
            epochs,
            lines.mean(0),
            color=PALETTE[i % len(PALETTE)],
            linewidth=1.8,
            marker="." if len(epochs) < 4 else "",
            label=name,
        )
    axes.set(xlabel="epoch", ylabel="alignment with the classes")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    ends = {name: float(array(torch.atleast_2d(values))[:, -1].mean()) for name, values in curves.items()}
    best = max(ends, key=lambda name: ends[name])
    set_title(axes, f"{best} ends {'highest:' if len(ends) > 1 else 'at'} {ends[best]:.2g}")
    return axes


def regime_bars(
    accuracies: Mapping[str, Sequence[float]],
    *,
    published: Mapping[str, float] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw the mean accuracy of each training regime as a line, in percent, and a dot for each seed; numbers are the means.

    The axis does not start at zero, so that small differences are visible.

    Args:
        accuracies: By regime, one share in [0, 1] for each seed.
        published: By regime, a published share, drawn as a cross.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: No regimes, or a regime without accuracies.
        ImportError: matplotlib is not installed.

    Example:
        >>> axes = regime_bars({"ReLU": [0.97, 0.99], "fixed gates": [0.9]})
        >>> [text.get_text() for text in axes.texts]
        ['98.0', '90.0']
    """
    if not accuracies:
        raise ValueError("accuracies: got no regimes, want at least one")
    for name, values in accuracies.items():
        if not len(values):
            raise ValueError(f"accuracies: {name} has none, want at least one")
    others = {name: 100 * share for name, share in (published or {}).items() if name in accuracies}
    names = list(accuracies)
    means = [100 * float(np.mean(accuracies[name])) for name in names]
    axes = new_axes(axes, (6.4, 0.34 * len(names) + 1.5))
    axes.plot(means, range(len(names)), "|", color=PALETTE[0], markersize=14, markeredgewidth=2.5, label="mean")
    for i, name in enumerate(names):
        dots = 100 * np.asarray(accuracies[name], dtype=np.float64)
        axes.plot(dots, [i] * len(dots), "o", color=PALETTE[0], alpha=0.6, markersize=4)
        axes.text(1.01, i, f"{means[i]:.1f}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    if others:
        axes.plot(list(others.values()), [names.index(name) for name in others], "kx", markersize=6, label="published")
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.0), borderaxespad=5, ncols=2)
    every = [100 * float(v) for values in accuracies.values() for v in values] + list(others.values())
    low, high = min(every), max(every)
    room = max(high - low, 1.0)
    axes.set_xlim(max(0.0, low - 0.25 * room), high + 0.1 * room)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    best = names[int(np.argmax(means))]
    axes.set(xlabel="accuracy, %")
    set_title(axes, f"{best} is most accurate: {max(means):.1f} %")
    return axes


def tree_diagram(
    tree: ObliqueTree,
    feature_names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    *,
    terms: int = 2,
    axes: Axes | None = None,
) -> Axes:
    """Draw an oblique tree from left to right, with the text of `ObliqueTree.label` in each node.

    A split's upper branch is yes. The width of a branch is the share of the samples in it. Leaves of a classification have the
    colour of their class.

    Args:
        tree: The tree; prune it to 16 leaves or fewer to read it.
        feature_names: Names of the inputs; by default x0, x1, ...
        class_names: Names of the classes; by default 0, 1, ...
        terms: Number of terms of each hyperplane.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: Another number of names.
        ImportError: matplotlib is not installed.

    Example:
        >>> from interp_nn.nn import DLGN
        >>> axes = tree_diagram(DLGN((2, 3, 2)).to_tree(torch.randn(50, 2)).prune(1))
        >>> len(axes.texts)
        1
    """
    axes = new_axes(axes, (3.4 * tree.depth + 3, 0.55 * tree.leaves + 1))
    no, yes, coverage = tree.no.tolist(), tree.yes.tolist(), tree.coverage.tolist()
    places: dict[int, tuple[float, float]] = {}
    leaves = 0

    def place(node: int, depth: int) -> float:
        nonlocal leaves
        if no[node] < 0:
            leaves += 1
            height = 1.0 - leaves
        else:
            height = (place(yes[node], depth + 1) + place(no[node], depth + 1)) / 2
        places[node] = (depth, height)
        return height

    place(0, 0)
    for node, (x, y) in places.items():
        for child, answer in ((yes[node], "yes"), (no[node], "no")) if no[node] >= 0 else ():
            x1, y1 = places[child]
            axes.plot([x, x1], [y, y1], color="0.7", linewidth=0.5 + 7 * coverage[child], zorder=1)
            middle = ((x + x1) / 2, (y + y1) / 2)
            clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.annotate(answer, middle, fontsize=7, color="0.3", ha="center", va="center", bbox=clear)
        best = int(tree.value[node].argmax())
        coloured = no[node] < 0 and tree.task == "classification"
        colour = LIGHT[best % len(LIGHT)] if coloured else "white"
        text = tree.label(node, feature_names, class_names, terms=terms).replace("  [", "\n[")
        box = {"boxstyle": "round", "facecolor": colour, "edgecolor": "0.5"}
        axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box, zorder=2)
    axes.set(xlim=(-0.5, tree.depth + 0.5), ylim=(0.5 - leaves, 0.5))
    axes.axis("off")
    ends = [node for node in places if no[node] < 0]
    share = max(coverage[node] for node in ends)
    set_title(axes, f"A tree of {len(ends)} leaves: the largest has {100 * share:.0f} % of the samples")
    return axes


def _directions(normals: Tensor, name: str) -> Tensor:
    """Return unit normals in fp64; a zero normal stays zero."""
    if normals.dim() != 2 or not normals.numel():
        raise ValueError(f"{name}: got shape {tuple(normals.shape)}, want (hyperplanes, d)")
    if not bool(normals.isfinite().all()):
        raise ValueError(f"{name}: has values that are not finite, want finite normals")
    return nn.functional.normalize(normals.detach().double())
