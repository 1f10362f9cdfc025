"""Facets of regions, and a walk from region to region across them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interp_nn.display import brief, track
from interp_nn.explain.following.scikit_learn import from_estimator
from interp_nn.explain.linear.affine_map import linearize
from interp_nn.explain.linear.regions import Region, linear_program, region

Box = tuple[Tensor | float, Tensor | float]
_LEAST = 1e-9  # radius of a facet's largest ball, below which rounding decides


@dataclass(frozen=True)
class Facets:
    """The facets of a region: the sides that bound it.

    Attributes:
        units: Index of the unit whose boundary each facet is on, (f,) int64. Units with the same boundary count once.
        points: A point in each facet's interior, (f, d): the centre of its largest ball.
        radii: Radius of this ball within the facet, (f,); infinite entries are cut at 1e6.

    Example:
        >>> square = Region(torch.eye(2).repeat(2, 1), torch.tensor([0.0, 0, -1, -1]), torch.tensor([True, True, False, False]))
        >>> facets(square).units.tolist()
        [0, 1, 2, 3]
    """

    units: Tensor
    points: Tensor
    radii: Tensor

    def __repr__(self) -> str:
        return brief("Facets", vars(self))


def facets(around: Region, *, box: Box | None = None) -> Facets:
    """Find the facets of a region by linear programs, one for each unit; needs scipy.

    A unit has a facet if the part of its hyperplane that lies in the region has a ball of d - 1 dimensions. Each program has a
    constraint for every unit, so that the facets of thousands of units take hours; `Region.nearest_boundary` takes no program.

    Args:
        around: The region.
        box: Lowest and highest input, a number or a tensor (d,) each. Only the part of the region in the box counts; the
            sides of the box are not facets.

    Returns:
        The facets.

    Raises:
        ImportError: scipy is not installed.
        RuntimeError: scipy's solver failed.

    Example:
        >>> wedge = Region(torch.eye(2).double(), torch.zeros(2).double(), torch.tensor([True, True]))  # x > 0 and y > 0
        >>> facets(wedge, box=(-1.0, 3.0)).radii.tolist()
        [1.5, 1.5]
    """
    sides = _unit_sides(around.to_halfspaces().detach().double().cpu().numpy())
    walls = np.empty((0, sides.shape[1])) if box is None else _walls(box, sides.shape[1] - 1)
    given, first = _distinct(sides)
    found = []
    for i in track(range(len(given)), "facets", None, "unit"):
        what = f"the facet of unit {first[i]} of a region of {len(sides)} units, in {around.normals.dtype}"
        ball = _ball(what, given, walls, i)
        if ball is not None:
            found.append((first[i], *ball))
    like = around.normals
    return Facets(
        torch.tensor([unit for unit, _, _ in found], dtype=torch.int64),
        torch.from_numpy(np.array([p for _, p, _ in found]).reshape(len(found), sides.shape[1] - 1)).to(like),
        torch.tensor([r for _, _, r in found], dtype=torch.float64).to(like),
    )


@dataclass(frozen=True, eq=False)
class RegionStatistics:
    """Statistics of each of r regions; `str` gives their spread.

    Attributes:
        facets: Number of facets within the box, (r,).
        neighbours: Number of regions found that share a facet with it, (r,).
        radii: Radius of the largest ball in the region within the box, (r,).
        bounded: True where the region is bounded without the box, (r,).
        ranks: Rank of W, (r,).
        shares: Share of the samples in the region, (r,).
        distances: Mean distance of these samples to the nearest facet, (r,); NaN without samples.

    Example:
        >>> one = torch.ones(1)
        >>> RegionStatistics(one, one, one, one > 0, one, one, one).bounded
        tensor([True])
    """

    facets: Tensor
    neighbours: Tensor
    radii: Tensor
    bounded: Tensor
    ranks: Tensor
    shares: Tensor
    distances: Tensor

    def __str__(self) -> str:
        lines = [
            f"{len(self.facets)} regions within the box, {int(self.bounded.sum())} of them bounded without it; "
            f"the regions have {100 * float(self.shares.sum()):.1f} % of the samples",
            f"{'':22}{'least':>7}{'median':>8}{'most':>7}",
        ]
        for name, values in (
            ("facets", self.facets),
            ("neighbours", self.neighbours),
            ("radius of largest ball", self.radii),
            ("rank of the map", self.ranks),
            ("share of the samples", self.shares),
            ("distance to a facet", self.distances[self.distances.isfinite()]),
        ):
            if len(values):
                least, median, most = (f"{float(v):.3g}" for v in (values.min(), values.median(), values.max()))
                lines.append(f"{name:22}{least:>7}{median:>8}{most:>7}")
        return "\n".join(lines)

    __repr__ = __str__


@dataclass(frozen=True)
class RegionGraph:
    """The regions that a walk found, and which of them share a facet.

    Attributes:
        regions: The regions; the first is that of the start.
        points: A point inside each region, (regions, d).
        edges: Pairs of regions that share a facet, (edges, 2) int64, the smaller index first.
        facets: The facets of each region, within the box.
        box: Lowest and highest input, as given.
        complete: True if the walk ended because no region was left, and not because of its budget. Regions that touch the
            others in less than a facet are not reached.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
        >>> _ = nn.init.ones_(network[0].weight), network[0].bias.data.copy_(torch.tensor([0.0, -1.0]))
        >>> graph = region_graph(network, torch.tensor([[0.5]]).double(), box=(-2.0, 2.0))
        >>> len(graph.regions), graph.edges.tolist(), graph.complete
        (3, [[0, 1], [0, 2]], True)
    """

    regions: tuple[Region, ...]
    points: Tensor
    edges: Tensor
    facets: tuple[Facets, ...]
    box: Box
    complete: bool

    def __repr__(self) -> str:
        return f"RegionGraph({len(self.regions)} regions, {len(self.edges)} edges, complete={self.complete})"

    def statistics(self, model: nn.Module, x: Tensor) -> RegionStatistics:
        """Compute statistics of each region that need no volume: by linear programs, the region's map, and samples.

        Args:
            model: The network that the graph was made from.
            x: Samples (n, ...) to count in the regions, in double precision.

        Returns:
            The statistics.

        Raises:
            ValueError: Samples of another shape or dtype, or as `linearize` raises it.
            ImportError: scipy is not installed.

        Example:
            >>> network = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
            >>> _ = nn.init.ones_(network[0].weight), network[0].bias.data.copy_(torch.tensor([0.0, -1.0]))
            >>> graph = region_graph(network, torch.tensor([[0.5]]).double(), box=(-2.0, 2.0))
            >>> print(graph.statistics(network, torch.tensor([[0.5], [0.75], [1.5], [-1.0]]).double()))
            3 regions within the box, 1 of them bounded without it; the regions have 100.0 % of the samples
                                    least  median   most
            facets                      1       1      2
            neighbours                  1       1      2
            radius of largest ball    0.5     0.5      1
            rank of the map             0       1      1
            share of the samples     0.25    0.25    0.5
            distance to a facet     0.375     0.5      1
        """
        model, x = from_estimator(model, x)
        d = self.points.shape[1]
        if not isinstance(x, Tensor) or x.dtype != self.points.dtype or not len(x) or x[0].numel() != d:
            got = (x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: got {got}, want samples (n, ...) of {d} entries, {self.points.dtype}")
        rows = x.flatten(1)
        inside = torch.stack([around.contains(rows) for around in self.regions])
        margins = torch.stack([around.radius(rows) for around in self.regions])
        weight = linearize(model, self.points.view(-1, *x.shape[1:])).weight.detach()
        return RegionStatistics(
            facets=torch.tensor([len(one.units) for one in self.facets]),
            neighbours=torch.bincount(self.edges.flatten(), minlength=len(self.regions)),
            radii=torch.tensor([around.chebyshev(self.box).radius for around in self.regions], dtype=torch.float64),
            bounded=torch.tensor([around.bounded() for around in self.regions]),
            ranks=torch.linalg.matrix_rank(weight.reshape(len(self.points), -1, d)),
            shares=inside.double().mean(1),
            distances=torch.where(inside, margins, 0.0).sum(1) / inside.sum(1),
        )


def region_graph(model: nn.Module, x: Tensor, *, box: Box, budget: int = 1000) -> RegionGraph:
    """Walk from the region of x across facets, breadth first, through the regions in a box; needs scipy.

    Args:
        model: The network, in evaluation mode, in double precision, or scikit-learn's.
        x: One sample (1, ...), inside the box.
        box: Lowest and highest input, a number or a tensor (d,) each.
        budget: Largest number of regions.

    Returns:
        The regions and their neighbours.

    Raises:
        ValueError: A budget below 1, a sample outside of the box or not in double precision, or as `region` raises it.
        ImportError: scipy is not installed.
        RuntimeError: scipy's solver failed.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 1), nn.ReLU()).double()
        >>> _ = nn.init.ones_(network[0].weight), nn.init.zeros_(network[0].bias)
        >>> graph = region_graph(network, torch.ones(1, 2).double() / 2, box=(-1.0, 1.0))
        >>> [bool(around.on) for around in graph.regions]
        [True, False]
    """
    model, x = from_estimator(model, x)
    if budget < 1:
        raise ValueError(f"budget: got {budget}, want at least 1")
    if not isinstance(x, Tensor) or x.dtype != torch.float64:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: got {got}, want torch.float64 for samples and model: facets are found to its precision")
    low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device).reshape(-1) for end in box)
    if not bool(((x.flatten() > low) & (x.flatten() < high)).all()):
        raise ValueError("x: lies outside of the box; want a sample inside")
    start = region(model, x)
    found, points, edges, bounds = [start], [x.flatten()], set[tuple[int, int]](), list[Facets]()
    known = {_key(start): 0}
    waiting, complete = deque([0]), True
    while waiting:
        here = waiting.popleft()
        sides = facets(found[here], box=box)
        bounds.append(sides)  # regions leave the queue in the order of their indices
        for unit, point, radius in zip(sides.units.tolist(), sides.points, sides.radii.tolist(), strict=True):
            normal = found[here].normals[unit]
            outward = (-1.0 if bool(found[here].on[unit]) else 1.0) * normal / normal.norm()
            there = point + min(1e-6, radius / 4) * outward
            other = region(model, there.view_as(x))
            key = _key(other)
            if key not in known:
                if len(found) >= budget:
                    complete = False
                    continue
                known[key] = len(found)
                found.append(other)
                points.append(there)
                waiting.append(known[key])
            if known[key] != here:
                edges.add((min(here, known[key]), max(here, known[key])))
    pairs = torch.tensor(sorted(edges), dtype=torch.int64).reshape(-1, 2)
    return RegionGraph(tuple(found), torch.stack(points), pairs, tuple(bounds), box, complete)


def _key(around: Region) -> bytes:
    return np.packbits(around.on.cpu().numpy()).tobytes()


def _unit_sides(sides: Any) -> Any:
    lengths = np.linalg.norm(sides[:, :-1], axis=1, keepdims=True)
    return sides / np.where(lengths > 0, lengths, 1)


def _walls(box: Box, d: int) -> Any:
    unit = np.eye(d)
    low, high = (torch.as_tensor(end, dtype=torch.float64).expand(d).cpu().numpy()[:, None] for end in box)
    return np.concatenate([np.concatenate([-unit, low], 1), np.concatenate([unit, -high], 1)])


def _distinct(sides: Any) -> tuple[Any, list[int]]:
    """Return the sides that differ, without those of zero normal, and the index of each."""
    kept: list[int] = []
    for i, side in enumerate(sides):
        if side[:-1].any() and not any(np.abs(side - sides[j]).max() < 1e-12 for j in kept):
            kept.append(i)
    return sides[kept], kept


def _ball(what: str, sides: Any, walls: Any, i: int) -> tuple[Any, float] | None:
    """Return centre and radius of the largest ball in the facet of side i, or None where there is none."""
    others = np.concatenate([np.delete(sides, i, 0), walls])
    normal = sides[i, :-1]
    # Within the hyperplane, a side is as steep as the part of its normal that lies in it.
    within = np.linalg.norm(others[:, :-1] - np.outer(others[:, :-1] @ normal, normal), axis=1)
    d = len(normal)
    constraints = np.concatenate([others[:, :-1], within[:, None]], 1)
    equality = np.append(normal, 0.0)[None]
    done = linear_program(
        what,
        [0.0] * d + [-1.0],
        constraints,
        -others[:, -1],
        equality,
        [-sides[i, -1]],
        bounds=[(None, None)] * d + [(0, 1e6)],
    )
    # Without success, no point of the hyperplane is in the region.
    return (done.x[:-1], float(done.x[-1])) if done.success and done.x[-1] > _LEAST else None
