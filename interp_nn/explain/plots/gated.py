"""Gated networks: their hyperplanes against known ones, path kernels, alignment over training, and regimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from interp_nn.explain.plots.canvas import SIGNED, array, new_axes, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def gate_hyperplanes(found: Tensor, truth: Tensor, *, level: float = 0.99, axes: Axes | None = None) -> Axes:
    """|cos| between known hyperplanes (rows) and those of gates (columns), each row's best gate on the diagonal.

    found: normals (gates, d), as `effective_gate_weights` gives them. truth: normals (m, d). A row's title has its largest
    |cos|, the figure's how many rows reach `level`. Raises ValueError for other shapes and for values that are not finite.
    """
    normals = [_directions(values, name) for name, values in (("found", found), ("truth", truth))]
    if normals[0].shape[1] != normals[1].shape[1]:
        raise ValueError(f"found, truth: got normals of {normals[0].shape[1]} and {normals[1].shape[1]} dimensions")
    cosines = array((normals[1] @ normals[0].T).abs())
    best, gates = cosines.max(1), cosines.argmax(1)
    first = list(dict.fromkeys(gates.tolist()))
    rest = [gate for gate in np.argsort(-cosines.max(0), kind="stable").tolist() if gate not in set(first)]
    axes = new_axes(axes, (0.16 * cosines.shape[1] + 3.0, 0.22 * len(cosines) + 1.4))
    shown = axes.imshow(cosines[:, first + rest], cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.figure.colorbar(shown, ax=axes, label="|cos|")
    axes.set_yticks(range(len(best)), [f"{i}: {value:.3f}" for i, value in enumerate(best)], fontsize=8)
    axes.set(xlabel="gate", ylabel="hyperplane: its best |cos|", xticks=[])
    axes.set_title(f"{int((best >= level).sum())} of {len(best)} hyperplanes found at |cos| ≥ {level:g}")
    return axes


def kernel_matrix(kernel: Tensor, labels: Tensor | None = None, *, axes: Axes | None = None) -> Axes:
    """A kernel (n, n) in colour, its samples sorted by their labels (n,), with lines between the classes.

    The scale holds 99 % of the values, from zero where none is negative, and symmetric about it elsewhere. Raises ValueError
    for other shapes.
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
    axes.figure.colorbar(shown, ax=axes, label="kernel", extend=extend)
    axes.set_xticks(*ticks)
    axes.set_yticks(*ticks)
    axes.set(xlabel="sample" if labels is None else "class of the sample")
    return axes


def alignment_curves(curves: Mapping[str, Tensor], *, axes: Axes | None = None) -> Axes:
    """Kernel alignment over training: by name, (epochs + 1,) or (seeds, epochs + 1), the first before any training.

    Of several seeds each is a thin line, and their mean a thick one.
    """
    if not curves:
        raise ValueError("curves: got none")
    axes = new_axes(axes, (5.4, 3.8))
    from matplotlib.ticker import MaxNLocator

    for i, (name, values) in enumerate(curves.items()):
        lines = array(torch.atleast_2d(values))
        if lines.ndim != 2 or not lines.size:
            raise ValueError(
                f"curves: {name} has shape {tuple(values.shape)}, want (epochs + 1,) or (seeds, epochs + 1)"
            )
        epochs = np.arange(lines.shape[1])
        if len(lines) > 1:
            axes.plot(epochs, lines.T, color=f"C{i}", linewidth=0.6, alpha=0.5)
        axes.plot(
            epochs, lines.mean(0), color=f"C{i}", linewidth=1.8, marker="." if len(epochs) < 4 else "", label=name
        )
    axes.set(xlabel="epoch", ylabel="alignment with the classes")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return axes


def regime_bars(
    accuracies: Mapping[str, Sequence[float]],
    *,
    published: Mapping[str, float] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Mean accuracy by regime as bars, in percent from where they differ, with a dot for each seed.

    accuracies: shares in [0, 1] by regime, one a seed. published: others' shares by regime, drawn as crosses. The axis does
    not begin at zero: it is there to compare. Raises ValueError for a regime without accuracies.
    """
    if not accuracies:
        raise ValueError("accuracies: got no regimes")
    for name, values in accuracies.items():
        if not len(values):
            raise ValueError(f"accuracies: {name} has none")
    others = {name: 100 * share for name, share in (published or {}).items() if name in accuracies}
    names = list(accuracies)
    means = [100 * float(np.mean(accuracies[name])) for name in names]
    axes = new_axes(axes, (6.4, 0.34 * len(names) + 1.5))
    axes.barh(range(len(names)), means, color="tab:blue", alpha=0.6)
    for i, name in enumerate(names):
        dots = 100 * np.asarray(accuracies[name], dtype=np.float64)
        axes.plot(dots, [i] * len(dots), "o", color="tab:blue", markersize=3)
        # At the foot of its bar, away from the dots.
        axes.text(0.01, i, f"{means[i]:.1f}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    if others:
        axes.plot(list(others.values()), [names.index(name) for name in others], "kx", markersize=6, label="published")
        axes.legend(loc="lower left", fontsize=8)
    every = [100 * float(v) for values in accuracies.values() for v in values] + list(others.values())
    low, high = min(every), max(every)
    room = max(high - low, 1.0)
    axes.set_xlim(max(0.0, low - 0.25 * room), high + 0.2 * room)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy, %")
    return axes


def _directions(normals: Tensor, name: str) -> Tensor:
    """Unit normals in fp64; one that is zero stays so."""
    if normals.dim() != 2 or not normals.numel():
        raise ValueError(f"{name}: got shape {tuple(normals.shape)}, want (hyperplanes, d)")
    if not bool(normals.isfinite().all()):
        raise ValueError(f"{name}: has values that are not finite")
    return nn.functional.normalize(normals.detach().double())
