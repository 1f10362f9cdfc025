"""Figures of clusters: their coefficients and coverage, and the regions of a plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from interp_nn.explain.following.gate_record import record
from interp_nn.explain.plots.canvas import SIGNED, array, heat_map, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def cluster_coefficients(
    coefficients: Tensor,
    counts: Tensor,
    *,
    features: Sequence[str] | None = None,
    responses: Tensor | None = None,
    most: int = 20,
    axes: Axes | None = None,
) -> Axes:
    """Draw the coefficients of the largest clusters as a table in colour and digits, one row for each cluster.

    Args:
        coefficients: (clusters, d), of one output.
        counts: Number of samples in each cluster, (clusters,).
        features: d names of the columns.
        responses: Mean response of each cluster, (clusters,), shown beside the sizes.
        most: Largest number of rows; the largest clusters are first.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: Other shapes or numbers of names.
        ImportError: matplotlib is not installed.

    Example:
        >>> axes = cluster_coefficients(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([10, 30]))
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['cluster 1: 30 (75.0%)', 'cluster 0: 10 (25.0%)']
    """
    values, sizes = array(coefficients), array(counts)
    if values.ndim != 2 or sizes.shape != values.shape[:1]:
        raise ValueError(
            f"coefficients, counts: got shapes {values.shape} and {sizes.shape}, want (clusters, d) and (clusters,)"
        )
    order = np.argsort(-sizes, kind="stable")[:most]
    names = [f"{j}" for j in range(values.shape[1])] if features is None else list(features)
    rows = []
    for c in order:
        row = f"cluster {c}: {int(sizes[c]):,} ({sizes[c] / sizes.sum():.1%})"
        rows.append(row if responses is None else f"{row}, mean {float(array(responses)[c]):.2f}")
    axes = new_axes(axes, (0.85 * len(names) + 4.2, 0.32 * len(rows) + 1.6))
    heat_map(axes, values[order], rows, names, "coefficient", sizes[order])
    hidden = len(sizes) - len(order)
    axes.set_title("Coefficients by cluster" + (f" ({hidden} smaller ones not shown)" if hidden else ""))
    return axes


def coverage_curve(coverage: Tensor, *, level: float = 0.9, axes: Axes | None = None) -> Axes:
    """Draw the share of samples in the m largest clusters against m, and mark the m that reaches `level`.

    Args:
        coverage: Shares (clusters,), as `ActivationClusters.coverage` returns them.
        level: Share to mark, in [0, 1].
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: Other shapes.
        ImportError: matplotlib is not installed.

    Example:
        >>> axes = coverage_curve(torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64))
        >>> axes.texts[0].get_text()
        '2 of 3 hold 90.0%'
    """
    shares = array(coverage)
    if shares.ndim != 1 or not len(shares):
        raise ValueError(f"coverage: got shape {tuple(coverage.shape)}, want (clusters,)")
    enough = np.flatnonzero(shares >= level - 1e-12)
    reached = int(enough[0]) + 1 if len(enough) else len(shares)
    axes = new_axes(axes, (5.0, 3.6))
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
    """Draw the regions of a network in a plane: a grid of points by activation pattern, and the lines where a unit flips.

    A line is drawn where a unit's preactivation is zero, by linear interpolation between the points of the grid. It is off
    the exact line only in squares that several units cross. The memory is resolution² times the number of units.

    Args:
        model: The network, in evaluation mode.
        plane: (o, u, v), each of the shape of one input: the plane o + s u + t v. By default the input space of a network of
            two inputs.
        extent: Range of s and t: (s from, s to, t from, t to).
        resolution: Number of points along s and along t.
        output: Index of an output to show in colour. None gives each region its own colour.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: An output out of range, or as `record` raises it.
        UnsupportedOperation: An operation without an affine map.
        ImportError: matplotlib is not installed.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> _ = nn.init.eye_(network[0].weight), nn.init.zeros_(network[0].bias)
        >>> region_plot(network, resolution=10).get_title()
        '4 activation regions'
    """
    axes = new_axes(axes, (5.6, 4.8))
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
            array(image),
            cmap=ListedColormap(colours),
            vmin=-0.5,
            vmax=len(colours) - 0.5,
            origin="lower",
            extent=extent,
            aspect="auto",
            interpolation="nearest",
        )
    else:
        values = array(gates.output).reshape(resolution, resolution, -1)
        if not -values.shape[2] <= output < values.shape[2]:
            raise ValueError(f"output: got {output}, want one of {values.shape[2]} outputs")
        chosen = values[:, :, output]
        limit = float(np.abs(chosen).max()) or 1.0
        shown = axes.imshow(chosen, cmap=SIGNED, vmin=-limit, vmax=limit, origin="lower", extent=extent, aspect="auto")
        axes.figure.colorbar(shown, ax=axes, label=f"output {output}")
    for site in gates.sites:
        preactivations = array(gates.preactivations(site.name)).reshape(resolution, resolution, -1)
        on = preactivations > 0
        for unit in np.flatnonzero(on.any((0, 1)) & ~on.all((0, 1))):
            axes.contour(array(s), array(t), preactivations[:, :, unit], [0.0], colors="black", linewidths=0.6)
    count = len(groups.counts)
    axes.locator_params(nbins=5)
    axes.set(xlim=extent[:2], ylim=extent[2:], xlabel="s", ylabel="t", title=f"{count} activation regions")
    return axes
