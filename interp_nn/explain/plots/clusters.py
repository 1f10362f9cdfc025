"""Figures of clusters: their coefficients and coverage, and the regions of a plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from interp_nn.explain.following.gate_record import record
from interp_nn.explain.plots.canvas import LIGHT, PALETTE, SIGNED, array, heat_map, new_axes, set_title
from interp_nn.explain.plots.contributions import feature_list

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from interp_nn.explain.linear.regions import Region


def cluster_coefficients(
    coefficients: Tensor,
    counts: Tensor,
    *,
    features: Sequence[str] | None = None,
    responses: Tensor | None = None,
    most: int = 20,
    most_features: int = 10,
    total: int | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw the coefficients of the largest clusters as a table in colour and digits, one row for each cluster.

    Args:
        coefficients: (clusters, d), of one output.
        counts: Number of samples in each cluster, (clusters,).
        features: d names of the columns; by default x0, x1, ...
        responses: Mean response of each cluster, (clusters,), shown beside the sizes.
        most: Largest number of rows; the largest clusters are first.
        most_features: Largest number of columns. Of more, those with the largest mean |coefficient| over the samples are shown,
            largest first.
        total: Number of all samples, of which the sizes are shares; by default the sum of `counts`.
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
    names = feature_list(features, values.shape[1])
    columns = np.arange(len(names))
    if most_features < len(names):
        columns = np.argsort(-(sizes @ np.abs(values)), kind="stable")[:most_features]
    rows = []
    for c in order:
        row = f"cluster {c}: {int(sizes[c]):,} ({sizes[c] / (total or sizes.sum()):.1%})"
        rows.append(row if responses is None else f"{row}, mean {float(array(responses)[c]):.2f}")
    axes = new_axes(axes, (0.85 * len(columns) + 4.2, 0.32 * len(rows) + 1.8))
    heat_map(
        axes,
        values[np.ix_(order, columns)],
        rows,
        [names[j] for j in columns],
        "output per unit",
        sizes[order],
    )
    hidden = [f"{count} {what}" for count, what in (
        (len(sizes) - len(order), "smaller clusters"), (len(names) - len(columns), "features of smaller coefficients")
    ) if count]  # fmt: skip
    means = sizes @ np.abs(values) / (sizes.sum() or 1)
    finding = f"{names[int(means.argmax())]} has the largest mean |coefficient|: {means.max():.2g}"
    set_title(axes, finding + (f" (not shown: {', '.join(hidden)})" if hidden else ""))
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
        >>> axes.get_title()
        '2 of 3 clusters hold 90.0% of the samples'
    """
    shares = array(coverage)
    if shares.ndim != 1 or not len(shares):
        raise ValueError(f"coverage: got shape {tuple(coverage.shape)}, want (clusters,)")
    enough = np.flatnonzero(shares >= level - 1e-12)
    reached = int(enough[0]) + 1 if len(enough) else len(shares)
    axes = new_axes(axes, (5.0, 3.6))
    axes.step(np.arange(1, len(shares) + 1), 100 * shares, where="mid", color=PALETTE[0], marker=".", markersize=4)
    axes.axhline(100 * level, color="0.5", linewidth=0.8, linestyle="--")
    axes.axvline(reached, color="0.5", linewidth=0.8, linestyle="--")
    if len(shares) > 20:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(ylim=(0, 104), xlabel="number of clusters, largest first", ylabel="samples covered, %")
    set_title(axes, f"{reached} of {len(shares)} clusters hold {shares[reached - 1]:.1%} of the samples")
    return axes


def region_plot(
    model: nn.Module,
    *,
    plane: tuple[Tensor, Tensor, Tensor] | None = None,
    extent: tuple[float, float, float, float] = (-1.0, 1.0, -1.0, 1.0),
    resolution: int = 300,
    output: int | None = None,
    points: Tensor | None = None,
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
        output: Index of an output to show in colour. None gives regions that touch different colours.
        points: Samples (m, *input) to mark, for example the data. Those outside of the plane are marked at the nearest point of
            it.
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
    own = plane is None
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
    places = origin + grid[:, 1].view(shape) * u + grid[:, 0].view(shape) * v
    gates = record(model, places)
    groups = gates.patterns().groups()
    if output is None:
        from matplotlib.colors import ListedColormap

        chosen_colours = _map_colours(array(groups.labels).reshape(resolution, resolution))
        colours = [LIGHT[colour % len(LIGHT)] for colour in chosen_colours]
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
        axes.figure.colorbar(shown, ax=axes, label=f"output {output}, in its units")
    for site in gates.sites:
        preactivations = array(gates.preactivations(site.name)).reshape(resolution, resolution, -1)
        on = preactivations > 0
        for unit in np.flatnonzero(on.any((0, 1)) & ~on.all((0, 1))):
            axes.contour(array(s), array(t), preactivations[:, :, unit], [0.0], colors="black", linewidths=0.6)
    count = len(groups.counts)
    if points is not None:
        s_t = array(in_plane(points, plane))
        axes.scatter(s_t[:, 0], s_t[:, 1], s=24, color="black", edgecolor="white", linewidth=0.6, zorder=3)
    axes.locator_params(nbins=5)
    xlabel, ylabel = ("x0", "x1") if own else ("s, in units of u", "t, in units of v")
    axes.set(xlim=extent[:2], ylim=extent[2:], xlabel=xlabel, ylabel=ylabel)
    set_title(axes, f"{count} activation regions")
    return axes


def region_polygon(
    region: Region,
    *,
    plane: tuple[Tensor, Tensor, Tensor] | None = None,
    extent: tuple[float, float, float, float] = (-1.0, 1.0, -1.0, 1.0),
    points: Tensor | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw where a region meets a plane: a convex polygon, exact, with the units whose boundaries are its sides.

    Args:
        region: As `interp_nn.explain.region` returns it.
        plane: (o, u, v), each of the shape of one input: the plane o + s u + t v. By default the input space of two inputs.
        extent: Range of s and t: (s from, s to, t from, t to).
        points: Samples (m, *input) to mark. Those outside of the plane are marked at the nearest point of it.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: No plane for a region of other than two inputs, or a plane of another size.
        ImportError: matplotlib is not installed.

    Example:
        >>> from interp_nn.explain import Region
        >>> half = Region(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0]), torch.tensor([True]))  # x0 > 0
        >>> axes = region_polygon(half)
        >>> axes.get_title(), [text.get_text() for text in axes.texts]
        ('1 of 1 units bounds the region here', ['unit 0'])
    """
    d = region.normals.shape[1]
    own = plane is None
    if plane is None:
        if d != 2:
            raise ValueError(
                f"plane: got None for a region of {d} inputs, want (o, u, v) of {d} entries each: a point o and two directions "
                "u and v of the plane o + s u + t v, for samples a, b and c (a, b - a, c - a)"
            )
        unit = torch.eye(2, dtype=region.normals.dtype, device=region.normals.device)
        plane = unit.new_zeros(2), unit[0], unit[1]
    if any(part.numel() != d for part in plane):
        raise ValueError(f"plane: got shapes {[tuple(part.shape) for part in plane]}, want {d} entries each")
    origin, u, v = (part.reshape(d).to(region.normals) for part in plane)
    sides = region.to_halfspaces().detach()
    # a s + b t + c <= 0 for each unit, in the coordinates of the plane
    lines = array(torch.stack([sides[:, :-1] @ u, sides[:, :-1] @ v, sides[:, :-1] @ origin + sides[:, -1]], 1)).astype(
        float
    )
    west, east, south, north = extent
    corners = [(west, south), (east, south), (east, north), (west, north)]
    owners: list[int | None] = [None] * 4  # the unit of the side from each corner to the next
    for i, line in enumerate(lines):
        corners, owners = _cut(corners, owners, line, i)
    axes = new_axes(axes, (5.6, 4.8))
    if corners:
        axes.fill(*zip(*corners, strict=True), facecolor=LIGHT[0], edgecolor="none")
    bounding = [unit for unit in dict.fromkeys(owners) if unit is not None]
    for (start, owner), end in zip(zip(corners, owners, strict=True), corners[1:] + corners[:1], strict=True):
        if owner is not None:
            axes.plot(*zip(start, end, strict=True), color="black", linewidth=1.2)
            middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
            axes.annotate(f"unit {owner}", middle, fontsize=7, ha="center", va="center", bbox=box)
    if points is not None:
        s_t = array(in_plane(points, plane))
        axes.scatter(s_t[:, 0], s_t[:, 1], s=24, color="black", edgecolor="white", linewidth=0.6, zorder=3)
    xlabel, ylabel = ("x0", "x1") if own else ("s, in units of u", "t, in units of v")
    title = f"{len(bounding)} of {len(lines)} units bound{'s' * (len(bounding) == 1)} the region here"
    axes.set(xlim=extent[:2], ylim=extent[2:], xlabel=xlabel, ylabel=ylabel)
    set_title(axes, title if corners else "The region does not meet this part of the plane")
    return axes


def in_plane(points: Tensor, plane: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the coordinates (m, 2) of the points (m, *input) of a plane (o, u, v) that are nearest to some points."""
    origin, u, v = plane
    if points.dim() < 1 or points.shape[1:].numel() != origin.numel():
        raise ValueError(f"points: got shape {tuple(points.shape)}, want (m, {', '.join(map(str, origin.shape))})")
    basis = torch.stack([u.flatten(), v.flatten()], 1).double()
    offset = (points.detach().flatten(1) - origin.flatten().to(points)).double()
    return torch.linalg.lstsq(basis, offset.T.to(basis.device)).solution.T


def _cut(
    corners: list[tuple[float, float]], owners: list[int | None], line: np.ndarray[Any, Any], unit: int
) -> tuple[list[tuple[float, float]], list[int | None]]:
    """Cut a convex polygon by a s + b t + c <= 0 (Sutherland & Hodgman 1974), and return its corners and its sides' units."""
    values = [float(line[0] * s + line[1] * t + line[2]) for s, t in corners]
    if all(value <= 0 for value in values):
        return corners, owners
    kept: list[tuple[float, float]] = []
    sides: list[int | None] = []
    for i, (here, value) in enumerate(zip(corners, values, strict=True)):
        j = (i + 1) % len(corners)
        if value <= 0:
            kept.append(here)
            sides.append(owners[i])
        if (value <= 0) != (values[j] <= 0):
            share = value / (value - values[j])
            ahead = corners[j]
            kept.append((here[0] + share * (ahead[0] - here[0]), here[1] + share * (ahead[1] - here[1])))
            sides.append(unit if value <= 0 else owners[i])
    return kept, sides


def _map_colours(labels: np.ndarray[Any, Any]) -> list[int]:
    """Return a colour's number for each label of an image, so that neighbours differ, where few colours are enough."""
    pairs = np.concatenate(
        [np.stack([a.ravel(), b.ravel()], 1) for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1]))]
    )
    pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
    neighbours: dict[int, set[int]] = {label: set() for label in range(int(labels.max()) + 1)}
    for a, b in pairs.tolist():
        neighbours[a].add(b)
        neighbours[b].add(a)
    colours: dict[int, int] = {}
    for label in sorted(neighbours, key=lambda label: -len(neighbours[label])):
        taken = {colours.get(other) for other in neighbours[label]}
        colours[label] = next(colour for colour in range(len(taken) + 1) if colour not in taken)
    return [colours[label] for label in range(len(colours))]
