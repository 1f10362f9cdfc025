"""The kernel of whole networks in closed form, compared with the enumeration of paths and with draws of the weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from interp_nn.explain.following.calls import UnsupportedOperation
from interp_nn.explain.following.gate_record import record
from interp_nn.explain.paths.enumeration import path_features
from interp_nn.explain.paths.monte_carlo import npk_montecarlo
from interp_nn.explain.paths.path_kernel import npk, npk_from_gates
from interp_nn.nn.conv import SummaryConv2d
from interp_nn.nn.gated.from_relu import to_dgn
from interp_nn.nn.gated.gates import HardGate
from interp_nn.nn.gated.networks import DGN, DLGN
from interp_nn.nn.linear import SummaryLinear

FP64 = torch.float64


class Residual(nn.Module):
    """Two blocks on a stream, with a ReLU after each sum or none."""

    def __init__(self, after, bias=True):
        super().__init__()
        self.first, self.last, self.after = nn.Linear(3, 4, bias), nn.Linear(4, 2, bias), after
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, w, bias), nn.ReLU(), nn.Linear(w, 4, bias)) for w in (5, 3)
        )

    def forward(self, x):
        z = self.first(x).relu()
        for block in self.blocks:
            z = z + block(z)
            z = z.relu() if self.after else z
        return self.last(z)


class Convolutional(nn.Module):
    """Skips, concatenation of channels, batch norms alone and after a convolution, and pooling of both kinds between gates."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Conv2d(3, 2, (3, 1), padding=(1, 0))
        self.after, self.alone = nn.BatchNorm2d(3), nn.BatchNorm2d(5)
        self.c, self.out = nn.Conv2d(5, 4, 1, bias=False), nn.Linear(4, 2)
        for norm in (self.after, self.alone):
            for t, how in ((norm.running_mean, "normal_"), (norm.running_var, "uniform_")):
                getattr(t, how)()
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        z = self.after(self.a(x)).relu()
        z = self.alone(torch.cat([z, self.b(z)], dim=1))
        z = z + 0.5 * z.relu() + (-z.clone()).div(4)
        z = self.c(F.avg_pool2d(z, 2, stride=1)).relu()
        z = F.max_pool2d(z, 2, stride=1)
        return self.out(z.relu().mean((2, 3)))


def circular(*head):
    convolutions = [
        nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular", bias=False),
        nn.ReLU(),
        nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular", bias=False),
        nn.ReLU(),
    ]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


def fully_connected(bias):
    layers = [nn.Linear(3, 8, bias), nn.ReLU(), nn.Linear(8, 7, bias), nn.ReLU(), nn.Linear(7, 6, bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(6, 2, bias))


def dual(**settings):
    network = nn.Sequential(
        nn.Conv1d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(3, 2, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    return to_dgn(network, **settings)


NETWORKS = {
    "fully connected": (lambda: fully_connected(False), (3,)),
    "with biases": (lambda: fully_connected(True), (3,)),
    "convolution, mean": (lambda: circular(nn.Linear(2, 3, bias=False)), (1, 4, 4)),
    "convolution, mean, head": (lambda: circular(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), (1, 4, 4)),
    "ends in a mean": (lambda: nn.Sequential(*circular()[:3], nn.AvgPool2d((3, 5)), nn.Flatten()), (1, 3, 5)),
    "flattened": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 2, dilation=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(18, 3),
        ),
        (2, 5, 5),
    ),
    "groups": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 2, groups=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2), nn.ReLU(),
            nn.Conv2d(6, 6, 1, groups=6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
        ),
        (2, 3, 3),
    ),
    "overlapping pools": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1, ceil_mode=True), nn.ReLU(),
            nn.Flatten(), nn.Linear(3 * 4, 2),
        ),
        (1, 6, 6),
    ),
    "padded and reshaped": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 12)), nn.Conv1d(1, 2, 3, padding=2, padding_mode="reflect"), nn.ReLU(),
            nn.ZeroPad1d(1), nn.Conv1d(2, 2, 2, stride=3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(10, 1),
        ),
        (12,),
    ),
    "residual": (lambda: Residual(False), (3,)),
    "residual, gated sums": (lambda: Residual(True), (3,)),
    "residual, no biases": (lambda: Residual(True, bias=False), (3,)),
    "everything": (Convolutional, (2, 4, 4)),
    "DGN": (lambda: DGN((3, 5, 4, 2), bias=True), (3,)),
    "DLGN": (lambda: DLGN((3, 5, 4, 2)), (3,)),
    "dual, linear": (lambda: dual(gating="linear"), (2, 6)),
    "dual, ReLU": (lambda: dual(gating="relu", value_input="x"), (2, 6)),
    "summaries": (
        lambda: nn.Sequential(SummaryConv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), SummaryLinear(12, 3), nn.ReLU(), nn.Linear(3, 1)),
        (1, 3, 3),
    ),
}  # fmt: skip


def network(name, n=4):
    make, shape = NETWORKS[name]
    return make().to(FP64).eval(), torch.randn(n, *shape, dtype=FP64)


@pytest.mark.parametrize("name", NETWORKS)
def test_closed_form_is_the_sum_over_paths(name):
    model, x = network(name)
    paths = path_features(model, x)
    assert paths.check() <= 1e-12
    want = paths.features @ paths.features.T
    got = npk(model, x, normalize=False)
    assert float((got - want).abs().amax() / want.abs().amax()) <= 1e-10
    assert torch.equal(got, got.T)
    assert torch.linalg.eigvalsh(got)[0] >= -1e-10 * got.trace()


@pytest.mark.parametrize("name", ["with biases", "residual", "everything", "DLGN", "dual, ReLU"])
def test_tiles_and_two_sets_of_samples(name):
    model, x = network(name, n=5)
    whole = npk(model, x)
    torch.testing.assert_close(npk(model, x, chunk_size=2), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(npk(model, x[:2], x[2:], chunk_size=2), whole[:2, 2:], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "name", ["with biases", "flattened", "groups", "residual, gated sums", "everything", "dual, ReLU"]
)
@pytest.mark.parametrize("normalize", [True, pytest.param(False, marks=pytest.mark.slow)])  # above, by enumeration
def test_mean_over_draws_of_the_weights(name, normalize):
    model, x = network(name, n=3)
    sampled = npk_montecarlo(model, x, draws=200, normalize=normalize)
    closed = npk(model, x, normalize=normalize)
    assert float(sampled.standard_error.amin()) > 0
    assert float(((sampled.kernel - closed) / sampled.standard_error).abs().amax()) < 4
    assert float(sampled.standard_error.mean() / closed.mean()) < 0.3
    if normalize:
        got = npk(model, x, method="montecarlo", draws=10, chunk_size=2, dtype=torch.float32)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), npk_montecarlo(model, x, draws=10).kernel, rtol=1e-5, atol=1e-6)


def test_standard_error_is_the_spread_over_seeds():
    model, x = DGN((3, 4, 1), dtype=FP64), torch.randn(2, 3, dtype=FP64)
    runs = [npk_montecarlo(model, x, draws=20, seed=seed) for seed in range(200)]
    spread = torch.stack([run.kernel for run in runs]).std(0)
    stated = torch.stack([run.standard_error for run in runs]).square().mean(0).sqrt()
    torch.testing.assert_close(stated, spread, rtol=0.2, atol=0)


def test_draws_of_what_the_closed_form_does_not_follow():
    """A layer norm, whose factors are fixed as gates are, has a sampled kernel that is finite and positive semi-definite."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 1)).to(FP64)
    x = torch.randn(3, 3, dtype=FP64)
    with pytest.raises(UnsupportedOperation, match=r"LayerNorm in layer '1'.*montecarlo"):
        npk(model, x)
    got = npk_montecarlo(model, x, draws=50)
    assert bool(got.kernel.isfinite().all())
    assert torch.linalg.eigvalsh(got.kernel)[0] >= -1e-10 * got.kernel.trace()


@pytest.mark.parametrize("head", [[], [nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)]])
def test_shifts_do_not_matter_where_padding_is_circular(head):
    model, x = circular(*head).to(FP64), torch.randn(3, 1, 5, 6, dtype=FP64)
    kernel = npk(model, x)
    for shift in ((1, 0), (2, 5), (4, 3)):
        moved = npk(model, x, x.roll(shift, (2, 3)))
        assert float((moved - kernel).abs().amax() / kernel.abs().amax()) <= 1e-12
    model[0].padding_mode = "zeros"
    model[0] = nn.Conv2d(1, 3, 3, padding=1, bias=False).to(FP64)
    assert not torch.allclose(npk(model, x, x.roll(2, 2)), npk(model, x))


def test_common_paths_of_shifted_images():
    """With a mean over all positions: H = 1/P² times the sum over shifts r of <x, shifted x'> weighted by the paths in common."""
    model, x = circular().to(FP64), torch.randn(2, 1, 3, 3, dtype=FP64)
    gates = record(model, x)
    first, second = gates.gates(0).double(), gates.gates(1).double()
    offsets = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]

    def kernel(a, b):
        total = 0.0
        for r in ((i, j) for i in range(3) for j in range(3)):  # positions p of x' against p + r of x
            turn = lambda t: t.roll(r, (1, 2))  # noqa: E731, B023
            inputs = (x[a] * turn(x[b])).sum(0)
            one = sum(inputs.roll(o, (0, 1)) for o in offsets) * (first[a] * turn(first[b])).sum(0)
            two = sum(one.roll(o, (0, 1)) for o in offsets) * (second[a] * turn(second[b])).sum(0)
            total += two.sum() / 81
        return total

    want = (
        torch.tensor([[kernel(a, b) for b in range(2)] for a in range(2)], dtype=FP64) / 2
    )  # of two outputs, each its own
    torch.testing.assert_close(npk(model, x, normalize=False), want, rtol=1e-12, atol=0)


class Shortcut(nn.Module):
    """The input, added to the output of many layers."""

    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(depth))
        self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, 1, bias=False)

    def forward(self, x):
        z = x
        for layer in self.layers:
            z = layer(z).relu()
        return self.out(z + x + self.norm(x))


def test_terms_of_different_magnitude():
    model, x = Shortcut(60).to(FP64).eval(), torch.rand(3, 6, dtype=FP64)
    for layer in model.layers:  # the first three units are on, the others off
        layer.weight.data.abs_()[3:].neg_()
    gates = record(model, x)
    with pytest.raises(ValueError, match="'output' is not an affine function of layer"):
        npk_from_gates(gates, x)
    deep = npk_from_gates([gates.gates(site) for site in gates.sites], x)
    assert 0 < float(deep.abs().amax()) < 2**-40
    want = deep + (2 * x @ x.T + 6) / 6
    torch.testing.assert_close(npk(model, x), want, rtol=1e-12, atol=0)


class InputTwice(nn.Module):
    """The input's channels, concatenated and added, with and without a norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(6, 2)

    def forward(self, x):
        flipped, normed = 2 * x.flip(1), self.norm(x)
        raw = torch.cat([x, flipped], 1) + torch.cat([flipped, x], 1)
        return self.out(raw + torch.cat([normed, normed], 1) + torch.cat([torch.relu(x), x], 1))


def test_the_input_is_one_function_and_its_norms_are_others():
    model, x = InputTwice().to(FP64).eval(), torch.randn(4, 3, dtype=FP64)
    z = torch.cat([x + 2 * x.flip(1), 2 * x.flip(1) + x], 1) + torch.cat([x.relu(), x], 1)
    want = (
        z @ z.T + 2 * (x @ x.T + 3) + 1
    )  # without weights; through norms' scales, and from their shifts; from the bias
    torch.testing.assert_close(npk(model, x, normalize=False), want, rtol=1e-12, atol=0)
    assert path_features(model, x).check() <= 1e-12


def test_fully_connected_is_the_product_of_gates():
    for bias in (False, True):
        model, x = fully_connected(bias), torch.randn(7, 3)
        got = npk(model, x)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, npk_from_gates(record(model, x), x, bias=bias), rtol=1e-5, atol=1e-7)
    model = DGN((3, 5, 4, 2), gate=HardGate(), value_input="ones").to(FP64)
    x = torch.randn(7, 3, dtype=FP64)
    torch.testing.assert_close(npk(model, x), npk_from_gates(model.gate_values(x)), rtol=1e-12, atol=0)


def test_depth_110():
    """Products of many layers stay in the range of fp32 as long as the kernel does. Otherwise npk raises."""
    layers = [nn.Linear(4, 32, bias=False)]
    for _ in range(110):
        layers += [nn.ReLU(), nn.Linear(32, 32, bias=False)]
    model, x = nn.Sequential(*layers, nn.Linear(32, 1, bias=False)).to(FP64), torch.randn(3, 4, dtype=FP64)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    exact = npk(model, 1000 * x)
    assert 0 < float(exact.abs().amax()) < 1e-20
    got = npk(model, 1000 * x, dtype=torch.float32).to(FP64)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6 * float(exact.abs().amax()))
    with pytest.raises(ValueError, match=r"too small for torch.float32"):
        npk(model, 1e-15 * x, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"more than torch.float32 holds"):
        npk(model, x, dtype=torch.float32, normalize=False)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.out(self.layer(self.layer(x).relu()).relu())


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Twice(), (3,), "Linear in layer 'layer': its weights are used more than once"),
        (tied(), (3,), "Linear in layer '2': its weights are used more than once"),
        (nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1)), (3,), "GELU in layer '1'"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)),
            (2, 3),
            "Linear in layer '0': it shares its weights",
        ),
        (
            nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval(),
            (1, 3),
            "BatchNorm1d in layer '2': it scales each of 4 features",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.Linear(4, 1)),
            (3,),
            "Unflatten in layer '1'",
        ),
    ],
)
def test_layers_that_are_not_followed(model, shape, message):
    with pytest.raises(UnsupportedOperation, match=f"{message}.*montecarlo"):
        npk(model, torch.randn(2, *shape))


def test_bad_input():
    model, x = fully_connected(True), torch.randn(2, 3)
    with pytest.raises(ValueError, match="x: has values that are not finite"):
        npk(model, x * torch.inf)
    with pytest.raises(ValueError, match=r"more than torch.float32 holds"):
        npk(model, x * 1e30)
    with pytest.raises(ValueError, match=r"other_x: got shape \(0, 3\)"):
        npk(model, x, x[:0])
    with pytest.raises(TypeError, match=r"x: got torch.int64"):
        npk(model, x.long())
    with pytest.raises(ValueError, match="method: got 'open'"):
        npk(model, x, method="open")
    with pytest.raises(ValueError, match="draws: got 1"):
        npk_montecarlo(model, x, draws=1)
    with pytest.raises(ValueError, match="chunk_size: got 0"):
        npk_montecarlo(model, x, chunk_size=0)
    with pytest.raises(ValueError, match="layer '0' computes its weight from another"):
        npk_montecarlo(nn.Sequential(SummaryLinear(3, 2)), x)
    with pytest.raises(ValueError, match=r"layer '0' .*training mode"):
        npk(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), x)


def test_paths_that_are_too_many():
    model = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 900), nn.ReLU(), nn.Linear(900, 1))
    with pytest.raises(ValueError, match=r"layer '4' is reached by 1134901 paths, want at most 1000000"):
        path_features(model, torch.randn(1, 20))


def test_outputs_with_paths_of_their_own():
    with pytest.raises(ValueError, match="outputs have gates of their own"):
        path_features(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))
    with pytest.raises(ValueError, match="outputs have positions"):
        path_features(nn.Sequential(nn.Conv1d(1, 2, 2)), torch.randn(2, 1, 3))


def test_kernel_of_outputs_with_paths_of_their_own_is_their_mean():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).to(FP64), torch.randn(3, 3, dtype=FP64)
    gate = record(model, x).gates(0).double()
    want = (x @ x.T + 1) * (gate @ gate.T) / 4
    torch.testing.assert_close(npk(model, x, normalize=False), want, rtol=1e-12, atol=0)
