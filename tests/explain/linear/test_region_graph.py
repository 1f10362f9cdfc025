"""Facets against scipy's geometry, and walks against the regions of a fine grid."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.spatial import HalfspaceIntersection
from sklearn.neural_network import MLPRegressor
from torch import nn

from interp_nn.explain import Region, facets, record, region, region_graph

F64 = torch.float64


def network(*widths, seed=0):
    torch.manual_seed(seed)
    layers = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double().eval()


@pytest.mark.parametrize("d", [2, 3, 4])
def test_facets_are_those_of_scipys_intersection(d):
    model = network(d, 9, 7, 1, seed=d)
    for x in torch.rand(3, 1, d, generator=torch.Generator().manual_seed(0), dtype=F64) * 2 - 1:
        around = region(model, x)
        units = len(around.on)
        unit = np.eye(d)
        walls = np.concatenate(
            [np.column_stack([-unit, -np.ones(d) * 1.5]), np.column_stack([unit, -np.ones(d) * 1.5])]
        )
        rows = np.concatenate([around.to_halfspaces().numpy(), walls])
        lengths = np.linalg.norm(rows[:, :-1], axis=1)
        kept = np.flatnonzero(lengths > 0)
        inside = around.chebyshev((-1.5, 1.5)).centre.numpy()
        peer = HalfspaceIntersection(rows[kept] / lengths[kept, None], inside)
        # A side with d or more vertices on it bounds the intersection.
        distances = rows[kept, :-1] @ peer.intersections.T + rows[kept, -1:]
        on_side = (np.abs(distances / lengths[kept, None]) < 1e-9).sum(1) >= d
        wanted = {int(i) for i in kept[on_side] if i < units}
        found = facets(around, box=(-1.5, 1.5))
        assert set(found.units.tolist()) == wanted
        # Each point is on its side and at its radius from all others, to the inside.
        margins = around.margins(found.points)
        for row, (i, radius) in enumerate(zip(found.units.tolist(), found.radii.tolist(), strict=True)):
            others = margins[row][torch.arange(units) != i]
            assert abs(margins[row, i]) < 1e-9 and (others > -1e-9).all() and radius > 0


def test_sides_of_no_consequence_and_equal_sides_count_once():
    normals = torch.tensor([[1.0, 0], [2, 0], [-1, 0], [0, 0], [1, 0]], dtype=F64)
    offsets = torch.tensor([1.0, 2, 5, 1, 9], dtype=F64)
    found = facets(Region(normals, offsets, torch.tensor([True, True, True, True, True])), box=(-20.0, 20.0))
    assert found.units.tolist() == [0, 2]  # -1 < x < 5: once from two units; the unit 4 is far, the unit 3 constant
    whole = facets(Region(torch.zeros(2, 3), torch.ones(2), torch.ones(2, dtype=torch.bool)))
    assert whole.units.shape == (0,) and whole.points.shape == (0, 3)


@pytest.mark.parametrize("widths", [(2, 5, 1), (2, 4, 4, 1), (1, 6, 3, 1)])
def test_a_walk_finds_the_regions_of_a_grid(widths):
    model = network(*widths, seed=4)
    d = widths[0]
    graph = region_graph(model, torch.full((1, d), 0.1, dtype=F64), box=(-1.0, 1.0))
    assert graph.complete
    axis = torch.linspace(-0.999, 0.999, 150 if d == 2 else 5000, dtype=F64)
    grid = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
    patterns = {row.numpy().tobytes() for row in record(model, grid).patterns().unpack().unique(dim=0)}
    found = {around.on.numpy().tobytes() for around in graph.regions}
    assert patterns <= found and len(found) == len(graph.regions) < len(patterns) + 4  # slivers between grid points
    assert len(patterns) >= 4
    for around, point in zip(graph.regions, graph.points, strict=True):
        assert bool(around.contains(point)) and bool((point.abs() < 1.01).all())
    of = [facets(around, box=(-1.0, 1.0)) for around in graph.regions]
    for i, j in graph.edges.tolist():
        other, shared = graph.regions[j], of[i]
        both = [p for u, p in zip(shared.units.tolist(), shared.points, strict=True) if other.margins(p).amin() > -1e-8]
        assert i < j and both
    if d == 1:
        assert len(graph.edges) == len(graph.regions) - 1  # a line
    if len(widths) == 3 and d == 2:
        differing = [int((graph.regions[i].on != graph.regions[j].on).sum()) for i, j in graph.edges.tolist()]
        assert set(differing) == {1}


def test_budgets_and_refusals():
    model, x = network(2, 8, 1), torch.zeros(1, 2, dtype=F64) + 0.1
    few = region_graph(model, x, box=(-1.0, 1.0), budget=3)
    assert len(few.regions) == 3 and not few.complete and few.edges.max() <= 2
    mlp = MLPRegressor(hidden_layer_sizes=(4,), solver="lbfgs", random_state=0).fit(
        [[0.0], [1.0], [2.0]], [0.0, 1.0, 0.0]
    )
    assert region_graph(mlp, np.array([[0.5]]), box=(-1.0, 3.0)).complete
    for call, text in (
        (lambda: region_graph(model, x, box=(-1.0, 1.0), budget=0), "budget: got 0"),
        (lambda: region_graph(model, x + 5, box=(-1.0, 1.0)), "x: lies outside of the box"),
        (lambda: region_graph(model.float(), x.float(), box=(-1.0, 1.0)), "x: got torch.float32, want torch.float64"),
        (lambda: region_graph(model, [[0.0]], box=(-1.0, 1.0)), "x: got list"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
