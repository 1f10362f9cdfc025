"""Figures of exact explanations: contributions as images, constants by layer, clusters, regions and coverage.

Every function draws on the axes or the figure it is given, or on a new one, and returns it; none shows or saves anything.
Colours of signed values are symmetric about zero, red for and blue against; the largest of a hundred values may be off their
scale. matplotlib is needed (`interp_nn[plot]`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from interp_nn.explain.gates import record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIGNED = "RdBu_r"
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
    """A grid of signed images: a row for each of n samples, a column for each of k outputs, one colour scale for all.

    contributions: (n, k, height, width) or (n, k, channels, height, width); channels are summed, as contributions add up.
    images: what they explain, (n, [channels,] height, width), shown in a column before. rows, columns: n and k titles.
    label: what the colours mean.
    Raises ValueError for other shapes or numbers of titles.
    """
    plt = _pyplot()
    maps = _array(contributions)
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
    limit, extend = _scale(maps)
    for i, j in np.ndindex(n, k + first):
        axes = grid[i, j]
        axes.set(xticks=[], yticks=[])
        if shown is not None and j == 0:
            axes.imshow(shown[i], cmap="gray")
        else:
            mappable = axes.imshow(maps[i, j - first], cmap=_SIGNED, vmin=-limit, vmax=limit)
        if i == 0 and j >= first and columns is not None:
            axes.set_title(columns[j - first], fontsize=10)
        if i == 0 and j < first:
            axes.set_title("input", fontsize=10)
        if j == 0 and rows is not None:
            axes.set_ylabel(rows[i], fontsize=10)
    figure.colorbar(mappable, ax=grid[:, first:], label=label, shrink=0.8, aspect=30, extend=extend)
    return figure


def bias_bars(by_layer: Mapping[str, Tensor], *, sample: int = 0, output: int = 0, axes: Axes | None = None) -> Axes:
    """Bars of what each layer adds to the constant of one output of one sample, and of their sum.

    by_layer: each layer's part (n, k), as `AffineMap.bias_by_layer` gives it; layers are drawn in its order.
    """
    names, parts = _layers(by_layer, sample)
    if not -parts.shape[1] <= output < parts.shape[1]:
        raise ValueError(f"output: got {output}, want one of {parts.shape[1]}")
    values = parts[:, output]
    axes = _axes(axes, (6.0, 0.32 * len(names) + 1.6))
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
    """An image of what each layer (rows) adds to the constant of each output (columns) of one sample.

    by_layer: each layer's part (n, k), as `AffineMap.bias_by_layer` gives it. outputs: k titles.
    """
    names, parts = _layers(by_layer, sample)
    k = parts.shape[1]
    columns = [str(j) for j in range(k)] if outputs is None else list(outputs)
    axes = _axes(axes, (0.62 * k + 3.2, 0.36 * len(names) + 1.5))
    _heat_map(axes, parts, names, columns, "part of the constant b")
    axes.set(xlabel="output", title="Constant of each output by layer")
    return axes


def cluster_coefficients(
    coefficients: Tensor,
    counts: Tensor,
    *,
    features: Sequence[str] | None = None,
    responses: Tensor | None = None,
    most: int = 20,
    axes: Axes | None = None,
) -> Axes:
    """The largest clusters as a table: a row each with its size, and the coefficient of every feature in colour and digits.

    coefficients: (clusters, d), of one output. counts: (clusters,) samples in each. features: d names. responses: (clusters,)
    mean response, shown beside the sizes. most: how many clusters to show, largest first.
    """
    values, sizes = _array(coefficients), _array(counts)
    if values.ndim != 2 or sizes.shape != values.shape[:1]:
        raise ValueError(
            f"coefficients, counts: got shapes {values.shape} and {sizes.shape}, want (clusters, d) and (clusters,)"
        )
    order = np.argsort(-sizes, kind="stable")[:most]
    names = [f"{j}" for j in range(values.shape[1])] if features is None else list(features)
    rows = []
    for c in order:
        row = f"cluster {c}: {int(sizes[c]):,} ({sizes[c] / sizes.sum():.1%})"
        rows.append(row if responses is None else f"{row}, mean {float(_array(responses)[c]):.2f}")
    axes = _axes(axes, (0.85 * len(names) + 4.2, 0.32 * len(rows) + 1.6))
    _heat_map(axes, values[order], rows, names, "coefficient", sizes[order])
    hidden = len(sizes) - len(order)
    axes.set_title("Coefficients by cluster" + (f" ({hidden} smaller ones not shown)" if hidden else ""))
    return axes


def coverage_curve(coverage: Tensor, *, level: float = 0.9, axes: Axes | None = None) -> Axes:
    """The share of samples in the m largest clusters over m, and the m that reaches `level`.

    coverage: (clusters,) the share in the largest, in the two largest, and so on, as `ActivationClusters.coverage` gives it.
    """
    shares = _array(coverage)
    if shares.ndim != 1 or not len(shares):
        raise ValueError(f"coverage: got shape {tuple(coverage.shape)}, want (clusters,)")
    enough = np.flatnonzero(shares >= level - 1e-12)
    reached = int(enough[0]) + 1 if len(enough) else len(shares)
    axes = _axes(axes, (5.0, 3.6))
    axes.step(np.arange(1, len(shares) + 1), 100 * shares, where="mid", color="tab:blue", marker=".", markersize=4)
    axes.axhline(100 * level, color="0.5", linewidth=0.8, linestyle="--")
    axes.axvline(reached, color="0.5", linewidth=0.8, linestyle="--")
    text = f"{reached} of {len(shares)} hold {shares[reached - 1]:.1%}"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    axes.text(0.97, 0.05, text, transform=axes.transAxes, ha="right", fontsize=9, bbox=box)
    if len(shares) > 20:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(ylim=(0, 104), xlabel="largest clusters", ylabel="samples covered, %", title="Coverage by clusters")
    return axes


def region_plot(
    model: nn.Module,
    *,
    plane: tuple[Tensor, Tensor, Tensor] | None = None,
    extent: tuple[float, float, float, float] = (-1.0, 1.0, -1.0, 1.0),
    resolution: int = 300,
    output: int | None = None,
    axes: Axes | None = None,
) -> Axes:
    """The regions of a network in a plane: the points of a grid by activation pattern, and the lines where a unit flips.

    plane: (o, u, v), each of the shape of one input: the points o + s u + t v for s and t in `extent` (s from, s to, t from,
    t to). By default it is the whole input space of a network of two inputs. A line is drawn where a unit's preactivation is
    zero, by linear interpolation between points of the grid: off the exact line only within squares that several units cross.
    Memory is resolution² times the units.
    output: fill with this output of the network rather than with a colour a region.
    """
    axes = _axes(axes, (5.6, 4.8))
    if plane is None:
        parameter = next(model.parameters(), torch.zeros(0))
        unit = torch.eye(2, dtype=parameter.dtype, device=parameter.device)
        plane = unit.new_zeros(2), unit[0], unit[1]
    origin, u, v = plane
    s, t = (
        torch.linspace(*ends, resolution, dtype=origin.dtype, device=origin.device) for ends in (extent[:2], extent[2:])
    )
    grid = torch.cartesian_prod(t, s)
    shape = (len(grid), *(1,) * origin.dim())
    points = origin + grid[:, 1].view(shape) * u + grid[:, 0].view(shape) * v
    gates = record(model, points)
    groups = gates.patterns().groups()
    if output is None:
        from matplotlib.colors import ListedColormap

        colours = np.random.default_rng(0).uniform(0.55, 0.97, (len(groups.counts), 3))
        image = groups.labels.view(resolution, resolution)
        axes.imshow(
            _array(image),
            cmap=ListedColormap(colours),
            vmin=-0.5,
            vmax=len(colours) - 0.5,
            origin="lower",
            extent=extent,
            aspect="auto",
            interpolation="nearest",
        )
    else:
        values = _array(gates.output).reshape(resolution, resolution, -1)
        if not -values.shape[2] <= output < values.shape[2]:
            raise ValueError(f"output: got {output}, want one of {values.shape[2]}")
        chosen = values[:, :, output]
        limit = float(np.abs(chosen).max()) or 1.0
        shown = axes.imshow(chosen, cmap=_SIGNED, vmin=-limit, vmax=limit, origin="lower", extent=extent, aspect="auto")
        axes.figure.colorbar(shown, ax=axes, label=f"output {output}")
    for site in gates.sites:
        preactivations = _array(gates.preactivations(site.name)).reshape(resolution, resolution, -1)
        on = preactivations > 0
        for unit in np.flatnonzero(on.any((0, 1)) & ~on.all((0, 1))):
            axes.contour(_array(s), _array(t), preactivations[:, :, unit], [0.0], colors="black", linewidths=0.6)
    count = len(groups.counts)
    axes.locator_params(nbins=5)
    axes.set(xlim=extent[:2], ylim=extent[2:], xlabel="s", ylabel="t", title=f"{count} activation regions")
    return axes


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install interp_nn[plot]") from error
    return pyplot


def _axes(axes: Axes | None, size: tuple[float, float]) -> Axes:
    return _pyplot().figure(figsize=size, layout="constrained").subplots() if axes is None else axes


def _array(values: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    values = values.detach().cpu()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()


def _scale(values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any] | None = None) -> tuple[float, str]:
    """The end of a scale symmetric about zero that holds 99 % of the values, by weight of their rows, and which ends are open."""
    sizes = np.abs(values).ravel()
    order = np.argsort(sizes)
    share = np.ones_like(sizes) if weights is None else np.repeat(weights, values.size // len(values))
    cumulated = np.cumsum(share[order])
    limit = float(sizes[order[np.searchsorted(cumulated, 0.99 * cumulated[-1])]]) or 1.0
    high, low = bool((values > limit).any()), bool((values < -limit).any())
    return limit, "both" if high and low else "max" if high else "min" if low else "neither"


def _pictures(images: Tensor, n: int) -> np.ndarray[Any, Any]:
    """Grey (n, h, w) or coloured (n, h, w, 3) images, scaled to [0, 1] together."""
    pictures = _array(images)
    if len(pictures) != n or pictures.ndim not in (3, 4) or (pictures.ndim == 4 and pictures.shape[1] not in (1, 3)):
        raise ValueError(f"images: got shape {tuple(images.shape)}, want ({n}, h, w) or ({n}, 1 or 3 channels, h, w)")
    if pictures.ndim == 4:
        pictures = pictures[:, 0] if pictures.shape[1] == 1 else pictures.transpose(0, 2, 3, 1)
    low, high = pictures.min(), pictures.max()
    return (pictures - low) / ((high - low) or 1)


def _layers(by_layer: Mapping[str, Tensor], sample: int) -> tuple[list[str], np.ndarray[Any, Any]]:
    """The layers' names, and their parts (layers, k) of one sample."""
    if not by_layer:
        raise ValueError("by_layer: got no layers; a network without constants has nothing to show")
    parts = {name: _array(part) for name, part in by_layer.items()}
    for name, part in parts.items():
        if part.ndim != 2 or not -len(part) <= sample < len(part):
            raise ValueError(f"by_layer: {name} has shape {part.shape}, want (n, k) with sample {sample} in it")
    return list(parts), np.stack([part[sample] for part in parts.values()])


def _heat_map(
    axes: Axes,
    values: np.ndarray[Any, Any],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    weights: np.ndarray[Any, Any] | None = None,
) -> None:
    """Signed values in colour and in digits, with titles and a colour bar; weights are those of rows, for the scale."""
    if len(columns) != values.shape[1]:
        raise ValueError(f"got {len(columns)} titles for {values.shape[1]} columns")
    limit, extend = _scale(values, weights)
    shown = axes.imshow(values, cmap=_SIGNED, vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(j, i, f"{round(float(value), 2) + 0.0:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.figure.colorbar(shown, ax=axes, label=label, extend=extend)
