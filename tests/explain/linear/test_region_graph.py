"""Facets against scipy's geometry, and walks against the regions of a fine grid."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import OptimizeResult, linprog
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


@pytest.mark.parametrize("widths", [(2, 10, 5, 1), (3, 7, 4, 1), (4, 8, 1)])
def test_facets_are_the_sides_that_a_linear_program_finds_irredundant(widths):
    around = region(network(*widths, seed=1), torch.full((1, widths[0]), 0.1, dtype=F64))
    sides = around.to_halfspaces().numpy()
    sides = sides / np.linalg.norm(sides[:, :-1], axis=1, keepdims=True)
    wanted = []
    for i, side in enumerate(sides):
        others = np.delete(sides, i, 0)
        most = linprog(-side[:-1], others[:, :-1], -others[:, -1], bounds=(-1e4, 1e4))
        assert most.status == 0
        if side[-1] - most.fun > 1e-9:  # without it, the region were larger
            wanted.append(i)
    assert facets(around, box=(-1e4, 1e4)).units.tolist() == wanted


# By relucent 1.0.0 with gurobipy 13.0.3 and PyTorch 2.13.0: regions, of these bounded, and the facets of all regions. The facets
# are those of `Complex.point2poly(point).shis`. Its search, `Complex.bfs`, also counts some pairs of regions as neighbours
# whose signs differ in one unit and that share no facet: 12 in the third network here, which scipy's linear programs refute.
OF_RELUCENT = {
    (3, 5, 1): (26, 4, 110),
    (2, 10, 5, 1): (117, 89, 436),
    (3, 7, 4, 1): (249, 113, 1310),
    (4, 8, 1): (163, 35, 1024),
}


@pytest.mark.parametrize(
    "widths",
    [widths if i == 0 else pytest.param(widths, marks=pytest.mark.slow) for i, widths in enumerate(OF_RELUCENT)],
)
def test_counts_are_those_of_relucent(widths):
    model, d = network(*widths, seed=1), widths[0]
    graph = region_graph(model, torch.full((1, d), 0.1, dtype=F64), box=(-1e4, 1e4))  # beyond all corners
    bounded = sum(around.bounded() for around in graph.regions)
    sides = sum(len(one.units) for one in graph.facets)
    assert graph.complete and (len(graph.regions), bounded, sides) == OF_RELUCENT[widths]
    assert 2 * len(graph.edges) == sides


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("widths", OF_RELUCENT)
def test_facets_are_those_of_relucent(widths):
    relucent = pytest.importorskip("relucent")
    model = network(*widths, seed=1)
    regions = relucent.Complex(model)
    regions.bfs(nworkers=1, verbose=0)
    afresh, counts = relucent.Complex(model), [0, 0, 0]
    for one in regions:
        point = np.asarray(one.interior_point).reshape(1, -1)
        around, wanted = region(model, torch.from_numpy(point)), afresh.point2poly(point)
        assert sorted(map(int, wanted.shis)) == facets(around).units.tolist()
        assert around.bounded() == bool(one.finite)
        if one.finite:
            assert around.chebyshev().radius == pytest.approx(float(one.inradius), rel=1e-6)
        counts = [a + b for a, b in zip(counts, (1, bool(one.finite), wanted.num_shis), strict=True)]
    assert tuple(counts) == OF_RELUCENT[widths]


def test_statistics_of_regions():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    model[0].weight.data.copy_(torch.eye(2))
    nn.init.zeros_(model[0].bias)  # the four quadrants; on, a unit is a column of the second layer
    model[2].weight.data.copy_(torch.tensor([[1.0, 2.0], [2.0, 4.1]]))
    graph = region_graph(model, torch.ones(1, 2, dtype=F64), box=(-2.0, 3.0))
    x = torch.tensor([[1.0, 2], [2, 1], [3, 0.5], [-1, 1], [0.5, -3]], dtype=F64)
    found = graph.statistics(model, x)
    on = torch.stack([around.on for around in graph.regions])
    assert found.facets.tolist() == found.neighbours.tolist() == [2] * 4 and not found.bounded.any()
    assert torch.equal(found.ranks, on.sum(1))
    sizes = torch.where(on, 3.0, 2.0).amin(1) / 2
    assert torch.allclose(found.radii, sizes.double())
    by_pattern = {
        tuple(row.tolist()): (float(s), float(m)) for row, s, m in zip(on, found.shares, found.distances, strict=True)
    }
    assert by_pattern[True, True] == pytest.approx((0.6, (1 + 1 + 0.5) / 3))
    assert by_pattern[False, True] == (0.2, 1) and by_pattern[True, False] == (0.2, 0.5)
    assert by_pattern[False, False][0] == 0 and np.isnan(by_pattern[False, False][1])
    assert str(found).startswith("4 regions within the box, 0 of them bounded without it; the regions have 100.0 %")
    few = region_graph(model, torch.ones(1, 2, dtype=F64), box=(-2.0, 3.0), budget=2).statistics(model, x)
    assert few.neighbours.tolist() == [1, 1] and few.facets.tolist() == [2, 2] and few.shares.sum() < 1
    for wrong in (x.float(), x[:, :1], x[:0], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match=r"x: got .*, want samples \(n, ...\) of 2 entries, torch.float64"):
            graph.statistics(model, wrong)


@pytest.mark.parametrize(
    ("normals", "bounded"),
    [
        ([[1, 0], [-1, 0], [0, 1], [0, -1]], True),
        ([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0], [1, 1]], True),
        ([[1, 0], [0, 1], [-1, -1]], True),
        ([[1, 0], [0, 1], [-1, -0.5], [1, 1]], True),
        ([[1, 0], [0, 1], [-1, 0.5]], False),
        ([[1, 0], [0, 1]], False),
        ([[1, 0], [-1, 0]], False),  # a strip
        ([[0, 0]], False),
    ],
)
def test_bounded(normals, bounded):
    normals = torch.tensor(normals, dtype=F64)
    on = torch.arange(len(normals)) % 2 == 0
    signed = torch.where(on, -1.0, 1.0).unsqueeze(1) * normals  # of N x <= 1
    assert Region(signed, torch.where(on, 1.0, -1.0).double(), on).bounded() is bounded


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


def test_a_program_that_defeats_the_simplex_method_is_solved_by_another_or_refused_by_name(monkeypatch):
    square = Region(torch.eye(2).repeat(2, 1), torch.tensor([0.0, 0, -1, -1]), torch.tensor([True, True, False, False]))
    solved, failed = [], {"highs"}

    def fake(*arguments, method="highs", **options):
        solved.append(method)
        if method in failed:
            return OptimizeResult(status=4, success=False, message="(HiGHS Status 4: Solve error)", x=None)
        return linprog(*arguments, method=method, **options)

    monkeypatch.setattr("scipy.optimize.linprog", fake)
    assert facets(square).units.tolist() == [0, 1, 2, 3] and solved == ["highs", "highs-ipm"] * 4
    assert square.bounded() and square.chebyshev().radius == pytest.approx(0.5)
    failed.add("highs-ipm")
    for call, name in (
        (lambda: facets(square), "the facet of unit 0 of a region of 4 units, in torch.float32"),
        (square.bounded, "the bounds of a region of 4 units"),
        (square.chebyshev, "the largest ball of a region of 4 units"),
    ):
        with pytest.raises(RuntimeError, match=f"{name}.*Solve error.*want a model and a sample in torch.float64"):
            call()
