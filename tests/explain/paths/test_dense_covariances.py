"""Covariances of all pairs of positions by shifts, compared with those of the pairs one by one."""

import pytest
import torch
from torch import nn

from interp_nn.explain.paths import covariances, dense_covariances
from interp_nn.explain.paths.covariances import Propagation
from interp_nn.explain.paths.path_kernel import npk
from interp_nn.explain.paths.path_network import PathNetwork

FP64 = torch.float64


class Skips(nn.Module):
    """Sums and concatenations of the input, of convolutions and of a batch norm between pools of several kinds."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, (1, 5), padding=(0, 2), groups=2)
        self.norm, self.down = nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3, stride=2, padding=1)
        self.c, self.pool, self.out = nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(3, 1, 1), nn.Linear(3, 2)

    def forward(self, x):
        z = self.a(x).relu()
        z = z + self.b(z).relu()
        z = self.pool(self.norm(torch.cat([z, x], 1)))
        z = self.down(z).relu()
        return self.out((z + self.c(z).relu()).mean((2, 3)))


def pooled(*layers, channels, dims=2):
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](1)
    return nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(channels, 2))


NETWORKS = {
    "same": (
        lambda: pooled(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 5, padding=2), nn.ReLU(), channels=4),
        (2, 5, 6),
    ),
    "dilated": (
        lambda: pooled(
            nn.Conv2d(2, 3, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv2d(3, 3, (3, 1), padding="same"),
            nn.ReLU(),
            channels=3,
        ),
        (2, 5, 4),
    ),
    "even kernels": (
        lambda: pooled(nn.Conv2d(2, 3, 2, padding="same"), nn.ReLU(), nn.Conv2d(3, 3, 4, padding="same"), channels=3),
        (2, 5, 4),
    ),
    "larger than the image": (
        lambda: pooled(nn.Conv2d(2, 3, 7, padding=3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1), channels=2),
        (2, 2, 3),
    ),
    "circular": (
        lambda: pooled(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), channels=3
        ),
        (2, 4, 4),
    ),
    "no padding": (lambda: pooled(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 2), nn.ReLU(), channels=3), (2, 6, 5)),
    "pools between": (
        lambda: pooled(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2, ceil_mode=True),
            nn.Conv2d(3, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            channels=3,
        ),
        (2, 7, 6),
    ),
    "one dimension": (
        lambda: pooled(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 3, 1), nn.ReLU(), channels=3, dims=1),
        (2, 7),
    ),
    "three dimensions": (
        lambda: pooled(
            nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv3d(2, 2, 3, padding=1), nn.ReLU(), channels=2, dims=3
        ),
        (1, 3, 2, 4),
    ),
    "flattened": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)
        ),
        (2, 4, 4),
    ),
    "skips": (Skips, (2, 6, 6)),
}


def quick(names, values):
    """Each network with the first value; with the second one, one factor or one dtype elsewhere, only these are quick."""
    first, second = values
    marks = {name: [] if name in names else [pytest.mark.slow] for name in NETWORKS}
    return [
        *((name, first) for name in NETWORKS),
        *(pytest.param(name, second, marks=mark) for name, mark in marks.items()),
    ]


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize(("name", "normalize"), quick(("skips",), (True, False)))
def test_all_pairs_at_once_are_the_pairs_one_by_one(name, normalize, monkeypatch):
    make, shape = NETWORKS[name]
    model, x = make().to(FP64).eval(), torch.randn(4, *shape, dtype=FP64)
    steps = Propagation(PathNetwork(model, FP64).layers(x[:1]), normalize)._steps.values()
    assert any(step.dense for step in steps) or name == "flattened"
    got = npk(model, x, normalize=normalize), npk(model, x[:2], x[2:], normalize=normalize)
    monkeypatch.setattr("interp_nn.explain.paths.covariances._BLOCK_BYTES", 1)  # each pair of samples by itself
    alone = npk(model, x, normalize=normalize)
    monkeypatch.setattr(dense_covariances, "suits", lambda layer: False)
    want = npk(model, x, normalize=normalize)
    torch.testing.assert_close(got[0], want, rtol=1e-12, atol=0)
    torch.testing.assert_close(got[1], want[:2, 2:], rtol=1e-12, atol=0)
    torch.testing.assert_close(alone, want, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize(("name", "integers"), quick(("dilated", "skips"), (True, False)))
def test_products_of_integers_are_those_in_fp64(name, integers, monkeypatch):
    make, shape = NETWORKS[name]
    model, x = make().eval(), torch.rand(5, *shape)
    x[:2] = (x[:2] < 0.5).float()  # 0 and 1 on one side only
    called, int_mm = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *args, **kwargs: called.append(1) or int_mm(*args, **kwargs))
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: integers)
    for other in (None, x[2:]):
        got, want = npk(model, x[:2], other), npk(model, x[:2], other, dtype=FP64)
        torch.testing.assert_close(got.to(FP64), want, rtol=2e-6, atol=0)
    assert bool(called) == (integers and name != "flattened")


@pytest.mark.skipif(not hasattr(torch, "_int_mm"), reason="no products of 8-bit integers here")
@pytest.mark.parametrize("channels", [1, 2, 5])  # of one channel, PyTorch's own are wrong
def test_products_of_integers_are_whole_numbers(channels):
    a, b = (torch.randint(0, 2, (40, n, channels), dtype=torch.int8) for n in (2, 3))
    buffers = dense_covariances.Buffers(torch.float32, a.device)
    got = dense_covariances._products(a, b, buffers)
    torch.testing.assert_close(got, torch.einsum("pnc,qmc->npmq", a.float(), b.float()), rtol=0, atol=0)


def test_profiles_of_one_number_are_integers(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    places = torch.tensor([0, 1, 3])
    source = dense_covariances._Source("same", torch.tensor([1, 0, 2]), places, 1, torch.arange(3), 4)
    gates = torch.tensor([[0.0, 1], [1, 1], [0, 0]])[:, :, None]  # of 3 positions and 2 samples
    for number in (1.0, 2**-10, 3.0, 0.0):
        profile, unit = dense_covariances.prepared(source, gates * number)
        assert profile.dtype == torch.int8
        want = torch.tensor([[1.0, 1], [0, 1], [0, 0], [0, 0]])[:, :, None] * number
        torch.testing.assert_close(profile * unit, want, rtol=0, atol=0)
    for mixed in (gates * torch.tensor([1.0, 0.5])[:, None], gates.double(), gates * float("nan")):
        profile, unit = dense_covariances.prepared(source, mixed)
        assert profile.dtype == mixed.dtype
        assert unit == 1


@pytest.mark.parametrize(
    ("dtype", "count"), [(FP64, 2), (torch.float32, 1)]
)  # a convolution's result is memory of its own
@pytest.mark.parametrize("bias", [True, False])
def test_two_buffers_hold_the_covariances_of_a_chain(bias, dtype, count, monkeypatch):
    layers = [m for i in (2, 3, 3) for m in (nn.Conv2d(i, 3, 3, padding=1, bias=bias), nn.ReLU())]
    model, x = pooled(*layers, channels=3), torch.randn(3, 2, 6, 5)
    made, empty = [], torch.empty
    monkeypatch.setattr(dense_covariances, "_convolves", lambda *_: count == 1)
    monkeypatch.setattr(dense_covariances.torch, "empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    monkeypatch.setattr("interp_nn.explain.paths.covariances._BLOCK_BYTES", 1)  # each pair of samples by itself
    npk(model, x, dtype=dtype)
    assert made.count((42 * 43,)) == count and not made.count((42 * 42,))


@pytest.mark.parametrize(
    "name",
    [
        "dilated",
        "one dimension",
        "three dimensions",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("same", "skips")),
    ],
)
def test_convolutions_sum_what_shifts_do_in_memory_that_holds_anything(name, monkeypatch):
    make, shape = NETWORKS[name]
    model, x, called, conv = make().eval(), torch.randn(5, *shape), [], dense_covariances._convolved
    monkeypatch.setattr(dense_covariances, "_MOST_CONVOLVED", 0)
    monkeypatch.setattr(dense_covariances, "_convolved", lambda *args: called.append(args[1].shape) or conv(*args))
    empty = torch.empty
    monkeypatch.setattr(dense_covariances.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    for rows, columns in ((5, None), (2, x[2:]), (3, x[3:])):  # of more rows than columns, shifts sum
        called.clear()
        got, want = npk(model, x[:rows], columns), npk(model, x[:rows], columns, dtype=FP64)
        torch.testing.assert_close(got.to(FP64), want, rtol=2e-6, atol=0)
        assert bool(called) == (columns is None or rows <= len(columns))


def test_convolutions_of_less_precision_are_not_used(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    assert dense_covariances._convolves(torch.float32, torch.device("cpu"))
    assert not dense_covariances._convolves(FP64, torch.device("cpu"))
    assert not dense_covariances._convolves(torch.float32, torch.device("meta"))
    try:
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
        assert not dense_covariances._convolves(torch.float32, torch.device("cpu"))
    finally:
        torch.backends.mkldnn.conv.fp32_precision = "none"


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("normalize", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["dilated", "pools between", "flattened", "skips"])
def test_no_covariance_exceeds_its_bound(name, normalize, monkeypatch):
    make, shape = NETWORKS[name]
    model, x, scaled, bounds = make().eval(), torch.randn(3, *shape), covariances._scaled, []

    def checked(groups, power, bound):
        largest = max(float(group.abs().max()) for group in groups)
        bounds.append(largest / bound)
        return scaled(groups, power, bound)

    monkeypatch.setattr(covariances, "_scaled", checked)
    npk(model, x, normalize=normalize)
    assert 0 < max(bounds) <= 1 + 1e-5


@pytest.mark.parametrize(("entry", "bound"), [(2.0**-60, 1.0), (1.0, 2.0**60), (2.0**60, 2.0**60)])
def test_covariances_that_may_leave_their_range_are_all_looked_at(entry, bound):
    z = torch.ones(2 * covariances._LOOKED_AT)
    z.fill_(entry)[0] = 2.0**50
    groups, power, _ = covariances._scaled([z], 3, bound)
    assert (float(groups[0].max()), power) == ((0.5, 64) if entry == 2.0**60 else (0.5, 54))


def test_shifts_are_found_in_the_window():
    x = torch.randn(1, 2, 4, 5)
    for layer, found in (
        (nn.Conv2d(2, 1, 3, padding=1), True),
        (nn.Conv2d(2, 1, 1), True),
        (nn.Conv2d(2, 1, 3, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(2, 1, 3, padding=1, stride=2), False),
        (nn.Conv2d(2, 1, 3), False),
    ):
        layers = PathNetwork(layer, torch.float32).layers(x)
        assert dense_covariances.shifts(layers[1]) == found
