"""Figures of contributions as images, and of constants by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from interp_nn.explain.plots.canvas import SIGNED, array, heat_map, new_axes, pyplot, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DIGITS = 3


def attribution_maps(
    contributions: Tensor,
    images: Tensor | None = None,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    label: str = "contribution",
    figure: Figure | None = None,
) -> Figure:
    """Draw contributions as a grid of signed images, one row for each sample and one column for each output.

    Args:
        contributions: (n, k, height, width), or (n, k, channels, height, width), whose channels are summed.
        images: The explained images (n, [channels,] height, width), drawn in a first column.
        rows: n titles of the rows.
        columns: k titles of the columns.
        label: Label of the colour bar.
        figure: Figure to draw on; by default a new one.

    Returns:
        The figure.

    Raises:
        ValueError: Other shapes or numbers of titles.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> figure = attribution_maps(torch.randn(2, 3, 8, 8), columns=["cat", "dog", "bird"])
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['cat', 'dog', 'bird']
    """
    plt = pyplot()
    maps = array(contributions)
    if maps.ndim == 5:
        maps = maps.sum(2)
    if maps.ndim != 4:
        raise ValueError(
            f"contributions: got shape {tuple(contributions.shape)}, want (n, k, h, w) or (n, k, channels, h, w)"
        )
    n, k = maps.shape[:2]
    shown = None if images is None else _pictures(images, n)
    for name, titles, count in (("rows", rows, n), ("columns", columns, k)):
        if titles is not None and len(titles) != count:
            raise ValueError(f"{name}: got {len(titles)} titles, want {count}")
    first = 0 if shown is None else 1
    if figure is None:
        figure = plt.figure(figsize=(1.15 * (k + first) + 1.3, 1.2 * n + 0.6), layout="constrained")
    grid = figure.subplots(n, k + first, squeeze=False)
    limit, extend = scale(maps)
    for i, j in np.ndindex(n, k + first):
        axes = grid[i, j]
        axes.set(xticks=[], yticks=[])
        if shown is not None and j == 0:
            axes.imshow(shown[i], cmap="gray")
        else:
            mappable = axes.imshow(maps[i, j - first], cmap=SIGNED, vmin=-limit, vmax=limit)
        if i == 0 and j >= first and columns is not None:
            axes.set_title(columns[j - first], fontsize=10)
        if i == 0 and j < first:
            axes.set_title("input", fontsize=10)
        if j == 0 and rows is not None:
            axes.set_ylabel(rows[i], fontsize=10)
    figure.colorbar(mappable, ax=grid[:, first:], label=label, shrink=0.8, aspect=30, extend=extend)
    return figure


def bias_bars(by_layer: Mapping[str, Tensor], *, sample: int = 0, output: int = 0, axes: Axes | None = None) -> Axes:
    """Draw what each layer adds to the constant of one output of one sample, and the sum, as bars.

    Args:
        by_layer: Each layer's part (n, k), as `AffineMap.bias_by_layer` returns it. The bars have its order.
        sample: Index of the sample.
        output: Index of the output.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: No layers, other shapes, or an index out of range.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> axes = bias_bars({"0": torch.tensor([[1.0]]), "2": torch.tensor([[-3.0]])})
        >>> [float(bar.get_width()) for bar in axes.patches]
        [1.0, -3.0, -2.0]
    """
    names, parts = _layers(by_layer, sample)
    if not -parts.shape[1] <= output < parts.shape[1]:
        raise ValueError(f"output: got {output}, want one of {parts.shape[1]}")
    values = parts[:, output]
    axes = new_axes(axes, (6.0, 0.32 * len(names) + 1.6))
    places = np.arange(len(names) + 1)
    heights = np.append(values, values.sum())
    colours = ["#b2182b" if v > 0 else "#2166ac" for v in values] + ["0.35"]
    bars = axes.barh(places, heights, color=colours)
    axes.bar_label(bars, fmt=f"%.{_DIGITS}g", padding=3, fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [*names, "sum"], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set(xlabel="part of the constant b", title=f"Constant of output {output} by layer")
    return axes


def bias_map(
    by_layer: Mapping[str, Tensor], *, sample: int = 0, outputs: Sequence[str] | None = None, axes: Axes | None = None
) -> Axes:
    """Draw what each layer (rows) adds to the constant of each output (columns) of one sample.

    Args:
        by_layer: Each layer's part (n, k), as `AffineMap.bias_by_layer` returns it.
        sample: Index of the sample.
        outputs: k titles of the columns.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: No layers, other shapes or numbers of titles, or an index out of range.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> axes = bias_map({"0": torch.tensor([[1.0, 2.0]]), "2": torch.tensor([[-3.0, 0.5]])})
        >>> [text.get_text() for text in axes.texts]
        ['1.00', '2.00', '-3.00', '0.50']
    """
    names, parts = _layers(by_layer, sample)
    k = parts.shape[1]
    columns = [str(j) for j in range(k)] if outputs is None else list(outputs)
    axes = new_axes(axes, (0.62 * k + 3.2, 0.36 * len(names) + 1.5))
    heat_map(axes, parts, names, columns, "part of the constant b")
    axes.set(xlabel="output", title="Constant of each output by layer")
    return axes


def _pictures(images: Tensor, n: int) -> np.ndarray[Any, Any]:
    """Return grey (n, h, w) or coloured (n, h, w, 3) images, scaled to [0, 1] together."""
    pictures = array(images)
    if len(pictures) != n or pictures.ndim not in (3, 4) or (pictures.ndim == 4 and pictures.shape[1] not in (1, 3)):
        raise ValueError(f"images: got shape {tuple(images.shape)}, want ({n}, h, w) or ({n}, 1 or 3 channels, h, w)")
    if pictures.ndim == 4:
        pictures = pictures[:, 0] if pictures.shape[1] == 1 else pictures.transpose(0, 2, 3, 1)
    low, high = pictures.min(), pictures.max()
    return (pictures - low) / ((high - low) or 1)


def _layers(by_layer: Mapping[str, Tensor], sample: int) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Return the layers' names, and their parts (layers, k) of one sample."""
    if not by_layer:
        raise ValueError("by_layer: got no layers, want a network with constants")
    parts = {name: array(part) for name, part in by_layer.items()}
    for name, part in parts.items():
        if part.ndim != 2 or not -len(part) <= sample < len(part):
            raise ValueError(f"by_layer: {name} has shape {part.shape}, want (n, k) with sample {sample} in it")
    return list(parts), np.stack([part[sample] for part in parts.values()])
