"""Figures of contributions as images, and of constants by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp_nn.explain.plots.canvas import (
    NEUTRAL,
    SIGNED,
    array,
    heat_map,
    new_axes,
    number,
    pyplot,
    scale,
    set_title,
    signed_colours,
)
from interp_nn.explain.plots.contributions import contribution_beeswarm, contribution_waterfall

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from interp_nn.explain.linear.affine_map import AffineMap

_DIGITS = 3
_MOST_ROWS, _MOST_COLUMNS = 8, 12
_LUMA = (0.299, 0.587, 0.114)  # the grey of red, green and blue


def attribution_maps(
    contributions: Tensor,
    images: Tensor | None = None,
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    predicted: Tensor | None = None,
    true: Tensor | None = None,
    constants: Tensor | None = None,
    overlay: bool = False,
    label: str = "contribution",
    figure: Figure | None = None,
) -> Figure:
    """Draw contributions as a grid of signed images, one row for each sample and one column for each output.

    The channels of an image are summed. Four dimensions are those of one output, (n, channels, height, width): 1 or 3 channels,
    or as many as `images` has. Several outputs have five, also for one channel.

    Args:
        contributions: (n, k, channels, height, width), or (n, channels, height, width) for one output.
        images: The explained images (n, [channels,] height, width), drawn in a first column.
        rows: n titles of the rows.
        columns: k titles of the columns.
        predicted: Index of the column that the network predicts for each sample, (n,) int64, which is marked.
        true: Index of the column of each sample's class, (n,) int64, which is marked.
        constants: (n, k) constants c, written below the maps: the part of the outputs that no pixel holds.
        overlay: Draw the maps over the images in grey. A pixel that contributes less is more transparent.
        label: Label of the colour bar.
        figure: Figure to draw on; by default a new one.

    Returns:
        The figure.

    Raises:
        ValueError: Other shapes, numbers of titles or indices, or `overlay` without images.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> maps = torch.randn(2, 3, 1, 8, 8)  # of two grey images and three outputs
        >>> figure = attribution_maps(maps, columns=["cat", "dog", "bird"], predicted=torch.tensor([0, 2]))
        >>> [axes.get_title() for axes in figure.axes[:3]], figure.axes[0].get_xlabel()
        (['cat', 'dog', 'bird'], 'predicted')
    """
    plt = pyplot()
    maps = _maps(contributions, images)
    n, k = maps.shape[:2]
    shown = None if images is None else _pictures(images, n)
    if overlay and shown is None:
        raise ValueError("overlay: got True without images, want the explained images")
    for name, titles, count in (("rows", rows, n), ("columns", columns, k)):
        if titles is not None and len(titles) != count:
            hint = "; maps of several outputs are (n, k, channels, h, w)" if contributions.dim() == 4 else ""
            raise ValueError(f"{name}: got {len(titles)} titles, want {count}{hint}")
    notes = _notes(n, k, predicted, true, constants)
    first = 0 if shown is None else 1
    if figure is None:
        figure = plt.figure(
            figsize=(1.15 * (k + first) + 1.3, (1.4 if notes.any() else 1.2) * n + 0.6), layout="constrained"
        )
    grid = figure.subplots(n, k + first, squeeze=False)
    limit, extend = scale(maps)
    for i, j in np.ndindex(n, k + first):
        axes = grid[i, j]
        axes.set(xticks=[], yticks=[])
        if shown is not None and j == 0:
            axes.imshow(shown[i], cmap="gray", vmin=0, vmax=1)
        else:
            values = maps[i, j - first]
            drawn: dict[str, Any] = {}
            if overlay and shown is not None:
                grey = shown[i] if shown[i].ndim == 2 else shown[i] @ _LUMA
                axes.imshow(grey, cmap="gray", vmin=0, vmax=1, alpha=0.6)
                drawn["alpha"] = np.clip(np.abs(values) / limit, 0, 1)
            mappable = axes.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, **drawn)
            axes.set_xlabel(notes[i, j - first], fontsize=8, labelpad=3)
            if "predicted" in notes[i, j - first] or "true" in notes[i, j - first]:
                axes.spines[:].set(linewidth=2.5, linestyle="-" if "predicted" in notes[i, j - first] else ":")
        if i == 0 and j >= first and columns is not None:
            axes.set_title(columns[j - first], fontsize=10)
        if i == 0 and j < first:
            axes.set_title("input", fontsize=10)
        if j == 0 and rows is not None:
            axes.set_ylabel(rows[i], fontsize=10)
    figure.colorbar(mappable, ax=grid[:, first:], label=label, shrink=0.8, aspect=30, extend=extend)
    return figure


def bias_bars(
    by_layer: Mapping[str, Tensor],
    *,
    sample: int = 0,
    output: int = 0,
    value: float | Tensor | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw what each layer adds to the constant of one output of one sample, and the sum, as bars.

    Args:
        by_layer: Each layer's part (n, k), as `AffineMap.bias_by_layer` returns it. The bars have its order.
        sample: Index of the sample.
        output: Index of the output.
        value: The network's value of this output, of which the title says the constant's share.
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
    total = float(values.sum())
    bars = axes.barh(range(len(names) + 1), np.append(values, total), color=[*signed_colours(values), NEUTRAL])
    axes.bar_label(bars, fmt=f"%.{_DIGITS}g", padding=3, fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names) + 1), [*names, "sum"], fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    title = f"Constant of output {output}: {total:.{_DIGITS}g}"
    if value is not None:
        whole = number(value, "value")
        title += f" of {whole:.{_DIGITS}g}" + (f" ({total / whole:.0%})" if whole else "")
    axes.set(xlabel="part of the constant c, in the output's units", ylabel="layer")
    set_title(axes, title)
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
    axes = new_axes(axes, (max(5.0, 0.62 * k + 3.2), max(2.6, 0.36 * len(names) + 1.5)))
    heat_map(axes, parts, names, columns, "part of c, in the output's units")
    largest = np.unravel_index(np.abs(parts).argmax(), parts.shape)
    title = f"Constants by layer: largest in layer {names[largest[0]]}, for output {columns[largest[1]]}"
    set_title(axes, title)
    axes.set(xlabel="output", ylabel="layer")
    return axes


def _maps(contributions: Tensor, images: Tensor | None) -> np.ndarray[Any, Any]:
    """Return maps (n, k, h, w), with the channels summed. Raises ValueError where channels and outputs cannot be told apart."""
    shape = tuple(contributions.shape)
    if contributions.dim() not in (4, 5) or not contributions.numel():
        raise ValueError(f"contributions: got shape {shape}, want (n, k, channels, h, w), or (n, channels, h, w)")
    maps = array(contributions)
    if maps.ndim == 5:
        return maps.sum(2)
    channels = maps.shape[1]
    known = (1, 3) if images is None else (1,) if images.dim() == 3 else tuple(images.shape[1:2])
    if channels not in known:
        raise ValueError(
            f"contributions: got shape {shape}, whose {channels} are not the channels of "
            f"{'an image' if images is None else 'the images'}; want (n, 1, {channels}, h, w) if they are channels, and "
            f"(n, {channels}, 1, h, w) if they are outputs"
        )
    return maps.sum(1, keepdims=True)


def _notes(
    n: int, k: int, predicted: Tensor | None, true: Tensor | None, constants: Tensor | None
) -> np.ndarray[Any, Any]:
    """Return what is written below each map, (n, k) of str."""
    notes: list[list[list[str]]] = [[[] for _ in range(k)] for _ in range(n)]
    for name, index in (("predicted", predicted), ("true", true)):
        if index is None:
            continue
        if index.shape != (n,) or index.is_floating_point() or not bool(((index >= 0) & (index < k)).all()):
            raise ValueError(f"{name}: got {index.dtype} of shape {tuple(index.shape)}, want ({n},) indices below {k}")
        for i, column in enumerate(index.tolist()):
            notes[i][column] = [", ".join([*notes[i][column], name])]
    if constants is not None:
        if constants.shape != (n, k):
            raise ValueError(f"constants: got shape {tuple(constants.shape)}, want ({n}, {k})")
        for row, values in zip(notes, constants.tolist(), strict=True):
            for note, value in zip(row, values, strict=True):
                note.append(f"c = {value:.2g}")
    return np.array([["\n".join(note) for note in row] for row in notes])


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


def affine_plot(
    affine: AffineMap,
    x: Tensor,
    sample: int | None,
    output: int | None,
    features: Sequence[str] | None,
    class_names: Sequence[str] | None,
    contrast: tuple[int, int, int] | None,
) -> Axes | Figure:
    """Draw the contributions of an affine map, as `AffineMap.plot` says."""
    if not isinstance(x, Tensor) or not isinstance(affine.shape, torch.Size):
        raise ValueError(
            "plot: got a map of several inputs, want one; plot its contributions by interp_nn.explain.plots"
        )
    n, dims = len(affine), x.dim() - 1
    if x.shape != (wanted := (n, *affine.shape[affine.bias.dim() :])):
        raise ValueError(f"x: got shape {tuple(x.shape)}, want {wanted}; sample=i draws one of them")
    constants = affine.bias.reshape(n, -1)
    k = constants.shape[1]
    for name, index, size in (("sample", sample, n), ("output", output, k)):
        if index is not None and not -size <= index < size:
            raise ValueError(f"{name}: got {index}, want an index below {size}")
    if output is None and k > (1 if dims < 2 else _MOST_COLUMNS):
        raise ValueError(f"output: got None for {k} outputs, want the index of one")
    titles = [f"output {j}" for j in range(k)] if k > 1 else ["output"]
    if class_names is not None:
        titles = list(map(str, class_names))
    if class_names is not None and contrast is not None and len(titles) == contrast[2]:
        titles = [f"{titles[contrast[0]]} - {titles[contrast[1]]}"]
    if len(titles) != k:
        pair = ", that of the target" if k == 1 else ""
        if contrast is not None:
            pair = f", or {contrast[2]}, those of the outputs that were contrasted"
        raise ValueError(f"class_names: got {len(titles)} names, want {k}, one for each output{pair}")
    contributions = affine.contributions(x).detach().reshape(n, -1, *x.shape[1:])
    values = constants + contributions.flatten(2).sum(2)
    samples = list(range(n)) if sample is None else [sample % n]
    outputs = list(range(k)) if output is None else [output % k]
    if dims < 2:
        (column,) = outputs
        name = titles[column]
        parts = contributions[:, column].reshape(n, -1)
        if len(samples) > 1:
            return contribution_beeswarm(parts, x.reshape(n, -1), features=features, output=name)
        (row,) = samples
        return contribution_waterfall(
            parts[row], constants[row, column], x=x.reshape(n, -1)[row], features=features, output=name
        )
    if dims > 3:
        raise ValueError(
            f"plot: got inputs of shape {tuple(x.shape)}, want features (n, d) or images (n, [channels,] h, w)"
        )
    samples = samples[:_MOST_ROWS]
    pictures = x if dims == 2 or x.shape[1] in (1, 3) else None
    shown = contributions[samples][:, outputs]
    return attribution_maps(
        shown.unsqueeze(2) if dims == 2 else shown,
        None if pictures is None else pictures[samples],
        rows=[f"sample {i}" for i in samples],
        columns=[titles[j] for j in outputs],
        predicted=values[samples].argmax(1) if len(outputs) > 1 else None,
        constants=constants[samples][:, outputs],
    )
