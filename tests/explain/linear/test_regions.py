import pytest
import torch
from torch import nn

from interp_nn.explain import ActivationPatterns, Region, record, region

DTYPE = torch.float64


def network(d=5, widths=(7, 6)):
    """A ReLU network, and the region of an input by composing its layers with the gates as they are there."""
    sizes = [d, *widths]
    layers = [
        (torch.randn(o, i, dtype=DTYPE), torch.randn(o, dtype=DTYPE)) for i, o in zip(sizes, widths, strict=False)
    ]

    def preactivations(x):
        out = []
        for weight, bias in layers:
            out.append(x @ weight.T + bias)
            x = out[-1].relu()
        return torch.cat(out, -1)

    def region(x):
        normal, offset = torch.eye(d, dtype=DTYPE), torch.zeros(d, dtype=DTYPE)
        normals, offsets = [], []
        for weight, bias in layers:
            normal, offset = weight @ normal, weight @ offset + bias
            normals.append(normal)
            offsets.append(offset)
            gate = (normal @ x + offset > 0).to(DTYPE)
            normal, offset = gate.unsqueeze(1) * normal, gate * offset
        return Region(torch.cat(normals), torch.cat(offsets), preactivations(x) > 0)

    return preactivations, region


def test_the_radius_is_where_exactly_one_unit_flips():
    preactivations, region_of = network()
    for _ in range(20):
        x = torch.randn(5, dtype=DTYPE)
        region = region_of(x)
        radius, (distance, unit, point) = region.radius(x), region.nearest_boundary(x)
        assert bool(region.contains(x)) and radius == distance > 0
        inside, outside = x + 0.999 * (point - x), x + 1.001 * (point - x)
        assert bool(region.contains(inside)) and not bool(region.contains(outside))
        flips = (preactivations(outside) > 0) != region.on
        assert flips.nonzero().tolist() == [[int(unit)]]
        directions = torch.nn.functional.normalize(torch.randn(200, 5, dtype=DTYPE), dim=1)
        assert bool(region.contains(x + 0.999 * radius * directions).all())


def test_a_region_is_where_the_pattern_is_the_same():
    preactivations, region_of = network()
    x = torch.randn(5, dtype=DTYPE)
    others = x + 0.3 * torch.randn(500, 5, dtype=DTYPE)
    same = (preactivations(others) > 0).eq(preactivations(x) > 0).all(1)
    assert torch.equal(region_of(x).contains(others), same)
    patterns = ActivationPatterns.from_preactivations(preactivations(torch.cat([x.unsqueeze(0), others])))
    assert torch.equal(patterns.groups().labels[1:] == 0, same)
    assert 0 < int(same.sum()) < 500


def test_half_spaces():
    _, region_of = network()
    x = torch.randn(5, dtype=DTYPE)
    region = region_of(x)
    spaces = region.to_halfspaces()
    assert spaces.shape == (13, 6) and bool((spaces[:, :5] @ x + spaces[:, 5] <= 0).all())
    other = x + torch.randn(300, 5, dtype=DTYPE)
    inside = (other @ spaces[:, :5].T + spaces[:, 5] <= 0).all(1)
    assert torch.equal(inside, region.contains(other))


def test_a_unit_that_depends_on_nothing_never_flips():
    region = Region(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([-1.0, 5.0]), torch.tensor([False, True]))
    assert region.margins(torch.zeros(2)).tolist() == [torch.inf, 1.0]
    boundary = region.nearest_boundary(torch.zeros(2))
    assert boundary.unit == 1 and torch.allclose(boundary.point, torch.tensor([-0.6, -0.8]))
    assert repr(region) == "Region(2 units, 1 of them on, 2 inputs)"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.ones(2, 3), torch.ones(3), torch.ones(2).bool()), ValueError, r"want \(u, d\), \(u,\) and \(u,\)"),
        ((torch.ones(2, 3), torch.ones(2), torch.ones(2)), TypeError, "on: got torch.float32, want torch.bool"),
    ],
)
def test_bad_input_is_named(arguments, error, text):
    with pytest.raises(error, match=text):
        Region(*arguments)


def test_points_of_another_space():
    with pytest.raises(ValueError, match=r"x: got shape \(4,\), want \(\.\.\., 3\)"):
        Region(torch.ones(2, 3), torch.ones(2), torch.ones(2).bool()).contains(torch.ones(4))


def test_the_largest_ball():
    """In a right triangle with legs 3 and 4 it is the inscribed circle, of radius 1 about (1, 1)."""
    normals = torch.tensor([[5.0, 0.0], [0.0, 0.1], [4.0, 3.0], [0.0, 0.0]])
    triangle = Region(normals, torch.tensor([0.0, 0.0, -12.0, 3.0]), torch.tensor([True, True, False, True]))
    centre, radius = triangle.chebyshev()
    torch.testing.assert_close(centre, torch.ones(2))
    assert radius == pytest.approx(1)
    centre, radius = triangle.chebyshev(box=(0.0, torch.tensor([0.5, 9.0])))
    assert radius == pytest.approx(0.25) and centre[0] == pytest.approx(0.25)


def test_the_largest_ball_of_a_networks_region():
    _, region_of = network()
    for _ in range(5):
        x = torch.randn(5, dtype=DTYPE)
        region = region_of(x)
        centre, radius = region.chebyshev(box=(x - 1, x + 1))
        within = torch.cat([x + 1 - centre, centre - x + 1]).amin()
        assert radius == pytest.approx(min(region.radius(centre).item(), within.item())) and bool(
            region.contains(centre)
        )
        assert radius >= min(region.radius(x).item(), 1) - 1e-9
        for other in centre + 0.05 * torch.randn(50, 5, dtype=DTYPE):
            inside = torch.cat([x + 1 - other, other - x + 1]).amin()
            assert min(region.radius(other).item(), inside.item()) <= radius + 1e-9


def test_regions_without_a_largest_ball():
    half = Region(torch.tensor([[1.0, 0.0]]), torch.zeros(1), torch.tensor([True]))
    with pytest.raises(ValueError, match="box: got None, but balls of any size fit"):
        half.chebyshev()
    with pytest.raises(ValueError, match=r"box: got \(-2, -1\), but no ball fits"):
        half.chebyshev((-2, -1))


def test_the_largest_ball_without_scipy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install scipy"):
        Region(torch.ones(1, 1), torch.ones(1), torch.tensor([True])).chebyshev()


def test_a_unit_is_located_in_its_layer():
    """Max-pooling with padding, whose candidates beyond the border are left out of the region."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.MaxPool2d(2, padding=1), nn.Flatten(), nn.Linear(9, 5), nn.ReLU()).eval()
    x = torch.randn(1, 1, 4, 4)
    around, gates = region(model, x), record(model, x)
    for i, on in enumerate(around.on.tolist()):
        name, unit = around.locate(i)
        assert on == bool(gates.gates(name).flatten()[unit])
    assert around.locate(len(around.on) - 5) == (gates.sites[-1].name, 0)
    for bad in (-1, len(around.on)):
        with pytest.raises(ValueError, match=f"unit: got {bad}, want an index of one of {len(around.on)} units"):
            around.locate(bad)
    with pytest.raises(ValueError, match="unit: got a region without its model"):
        Region(around.normals, around.offsets, around.on).locate(0)
