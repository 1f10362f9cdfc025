"""The closed path kernel of every layer of torch.nn, as first, middle and last layer: as drawn weights say, or refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from interp_nn.explain.following.calls import UnsupportedOperation
from interp_nn.explain.following.gate_record import record
from interp_nn.explain.paths.enumeration import path_features
from interp_nn.explain.paths.monte_carlo import npk_montecarlo
from interp_nn.explain.paths.path_kernel import npk, npk_from_gates
from interp_nn.gates.graph import _KINDS

FP64 = torch.float64
SHAPES = {0: (4,), 1: (2, 5), 2: (2, 4, 4), 3: (2, 3, 3, 3)}
# Layers for 2 channels (4 features), by the number of dimensions of their positions.
LAYERS = {
    0: {
        "Linear": lambda: nn.Linear(4, 4),
        "BatchNorm1d": lambda: nn.BatchNorm1d(4),
        "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
        "BatchNorm1d-plain": lambda: nn.BatchNorm1d(4, affine=False),
        "LazyLinear": lambda: nn.LazyLinear(4),
        "ReLU": nn.ReLU,
        "ReLU6": nn.ReLU6,
        "Hardtanh": nn.Hardtanh,
        "LeakyReLU": nn.LeakyReLU,
        "PReLU": nn.PReLU,
        "GELU": nn.GELU,
        "Identity": nn.Identity,
        "Dropout": nn.Dropout,
        "LayerNorm": lambda: nn.LayerNorm(4),
        "LayerNorm-plain": lambda: nn.LayerNorm(4, elementwise_affine=False),
        "RMSNorm": lambda: nn.RMSNorm(4),
        "Softmax": lambda: nn.Softmax(1),
        "Unflatten": lambda: nn.Unflatten(1, (2, 2)),
        "ZeroPad1d-flat": lambda: nn.ZeroPad1d(2),
        "MaxPool1d-flat": lambda: nn.MaxPool1d(2),
        "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    },
    1: {
        "Conv1d": lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect"),
        "ConvTranspose1d": lambda: nn.ConvTranspose1d(2, 2, 2),
        "BatchNorm1d": lambda: nn.BatchNorm1d(2),
        "InstanceNorm1d": lambda: nn.InstanceNorm1d(2),
        "InstanceNorm1d-affine": lambda: nn.InstanceNorm1d(2, affine=True),
        "GroupNorm": lambda: nn.GroupNorm(1, 2),
        "MaxPool1d": lambda: nn.MaxPool1d(3, 2, 1),
        "AvgPool1d": lambda: nn.AvgPool1d(3, 2, 1),
        "AdaptiveAvgPool1d": lambda: nn.AdaptiveAvgPool1d(3),
        "AdaptiveMaxPool1d": lambda: nn.AdaptiveMaxPool1d(2),
        "LPPool1d": lambda: nn.LPPool1d(2, 2),
        "AvgPool2d-flat": lambda: nn.AvgPool2d(3, 1, 1),  # takes the channels for positions
        "MaxPool2d-flat": lambda: nn.MaxPool2d(2),
        "Dropout1d": nn.Dropout1d,
        "Flatten": nn.Flatten,
        "Linear-shared": lambda: nn.Linear(5, 3),
        "Upsample": lambda: nn.Upsample(scale_factor=2, mode="linear"),
        **{f"{name}Pad1d": lambda name=name: getattr(nn, f"{name}Pad1d")(1) for name in
           ("Zero", "Reflection", "Replication", "Circular")},
        "ConstantPad1d": lambda: nn.ConstantPad1d(1, 2.0),
    },
    2: {
        "Conv2d": lambda: nn.Conv2d(2, 2, 2, stride=2, groups=2),
        "ConvTranspose2d": lambda: nn.ConvTranspose2d(2, 2, 2),
        "BatchNorm2d": lambda: nn.BatchNorm2d(2),
        "MaxPool2d": lambda: nn.MaxPool2d(2, ceil_mode=True),
        "AvgPool2d": lambda: nn.AvgPool2d(2, stride=1),
        "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(1),
        "Dropout2d": nn.Dropout2d,
        "PixelShuffle": lambda: nn.PixelShuffle(1),
        "PixelUnshuffle": lambda: nn.PixelUnshuffle(2),
        "ChannelShuffle": lambda: nn.ChannelShuffle(2),
        "UpsamplingNearest2d": lambda: nn.UpsamplingNearest2d(scale_factor=2),
        "UpsamplingBilinear2d": lambda: nn.UpsamplingBilinear2d(scale_factor=2),
        "Unfold": lambda: nn.Unfold(2),
        **{f"{name}Pad2d": lambda name=name: getattr(nn, f"{name}Pad2d")(1) for name in
           ("Zero", "Reflection", "Replication", "Circular")},
        "ConstantPad2d": lambda: nn.ConstantPad2d(1, 2.0),
    },
    3: {
        "Conv3d": lambda: nn.Conv3d(2, 2, 2),
        "ConvTranspose3d": lambda: nn.ConvTranspose3d(2, 2, 2),
        "BatchNorm3d": lambda: nn.BatchNorm3d(2),
        "MaxPool3d": lambda: nn.MaxPool3d(2, stride=1),
        "AvgPool3d": lambda: nn.AvgPool3d(2, stride=1),
        "AdaptiveAvgPool3d": lambda: nn.AdaptiveAvgPool3d(2),
        "Dropout3d": nn.Dropout3d,
        **{f"{name}Pad3d": lambda name=name: getattr(nn, f"{name}Pad3d")(1) for name in
           ("Zero", "Reflection", "Replication", "Circular")},
        "ConstantPad3d": lambda: nn.ConstantPad3d(1, 2.0),
    },
}  # fmt: skip
# Followed as first, middle and last layer, or refused by name. Without an entry: followed everywhere.
FIRST_ONLY = [
    "ReLU6",
    "Hardtanh",
    "LeakyReLU",
    "GELU",
    "Softmax",
    "LayerNorm-plain",
    "InstanceNorm1d",
    "AdaptiveMaxPool1d",
    "LPPool1d",
    "Unfold",
    "ZeroPad1d-flat",
    "MaxPool1d-flat",
]
NOT_BETWEEN = [
    "Unflatten",
    "PixelShuffle",
    "PixelUnshuffle",
    "ChannelShuffle",
]  # the order of the outputs does not matter
NOWHERE = [
    "PReLU",
    "LayerNorm",
    "RMSNorm",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "InstanceNorm1d-affine",
    "GroupNorm",
    "ConstantPad1d",
    "ConstantPad2d",
    "ConstantPad3d",
    "AvgPool2d-flat",
    "MaxPool2d-flat",
    "Linear-shared",
]
UNDRAWN = ("Softmax", "LPPool1d")  # as first layer, the closed form alone takes them
CASES = [(dims, name) for dims, named in LAYERS.items() for name in named]


def network(dims, name, place):
    layer = LAYERS[dims][name]()
    body = [nn.Linear(4, 4)] if not dims else [(nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](2, 2, 3, padding=1)]
    tail = [nn.Flatten(), nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 2)]
    layers = {
        "first": [layer, *tail],
        "middle": [*body, nn.ReLU(), layer, nn.ReLU(), *tail],
        "last": [*body, nn.ReLU(), layer],
    }
    model, x = nn.Sequential(*layers[place]).eval(), torch.randn(3, *SHAPES[dims], dtype=FP64)
    model.to(FP64)
    model(x)  # of the lazy layers
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, x


def check(dims, name, place):
    """Compare the closed kernel with draws of the weights, or see it refused by name."""
    model, x = network(dims, name, place)
    if name in NOWHERE or (name in FIRST_ONLY and place != "first") or (name in NOT_BETWEEN and place == "middle"):
        with pytest.raises(UnsupportedOperation, match=r"in layer '\d'.*montecarlo"):
            npk(model, x)
        return
    kernel = npk(model, x, normalize=False)
    if name == "parametrized" or name in UNDRAWN:
        paths = path_features(model, x) if place != "last" else None
        want = kernel if paths is None else paths.features @ paths.features.T
        torch.testing.assert_close(kernel, want)
        return
    sampled = npk_montecarlo(model, x, draws=200, normalize=False)
    error = (sampled.kernel - kernel).abs() - 1e-9 * kernel.abs().amax()
    assert bool((error <= 4.5 * sampled.standard_error).all()), (error / sampled.standard_error).amax()


QUICK = [
    (0, "BatchNorm1d"),
    (1, "ConvTranspose1d"),
    (1, "AvgPool2d-flat"),
    (2, "MaxPool2d"),
    (2, "Conv2d"),
    (0, "PReLU"),
]


@pytest.mark.parametrize("pool", [False, True])
def test_padding_in_the_place_of_all_positions_leaves_the_paths_behind_it(pool):
    behind = [nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1)] if pool else []
    tail = nn.Sequential(*behind, nn.Flatten(), nn.Linear(3 if pool else 8, 2)).to(FP64)
    model = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1), nn.ReLU(), nn.ConstantPad1d((4, -4), 0.0), *tail).to(FP64)
    x = torch.randn(3, 2, 4, dtype=FP64)
    torch.testing.assert_close(npk(model, x), npk(tail, torch.zeros_like(x)))


class Smaller(nn.Module):
    def forward(self, x):
        return x * 1e-12


@pytest.mark.parametrize("pool", [False, True])
def test_a_kernel_below_the_smallest_number_is_zero(pool):
    def layer():
        return nn.Conv1d(1, 1, 1, bias=False) if pool else nn.Linear(2, 2, bias=False)

    body = [part for _ in range(30) for part in (layer(), nn.ReLU(), Smaller())]
    tail = (
        [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(1, 1, bias=False)] if pool else [nn.Linear(2, 1, bias=False)]
    )
    model = nn.Sequential(*body, *tail).to(FP64)
    for parameter in model.parameters():
        parameter.data.abs_()
    x = torch.rand(3, 1, 4, dtype=FP64) if pool else torch.rand(3, 2, dtype=FP64)
    assert torch.equal(npk(model, x), torch.zeros(3, 3, dtype=FP64))


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize(("dims", "name"), QUICK)
def test_layers_count_or_are_refused(dims, name, place):
    check(dims, name, place)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize(("dims", "name"), [case for case in CASES if case not in QUICK])
def test_every_layer_counts_or_is_refused(dims, name, place):
    check(dims, name, place)


def test_no_layer_that_the_graph_knows_is_left_out():
    known = {name.split("-")[0] for _, name in CASES} | {"SummaryLinear", "SummaryConv2d"}  # in test_path_model
    assert {name for name in _KINDS if hasattr(nn, name)} <= known


class Norm(nn.Module):
    """A norm as first layer, under a forward whose argument has any name."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.BatchNorm1d(6), nn.Linear(6, 5), nn.Linear(5, 2)


class NormX(Norm):
    def forward(self, x):
        return self.b(self.a(self.norm(x)).relu())


class NormInput(Norm):
    def forward(self, input):
        return self.b(self.a(self.norm(input)).relu())


class NormA(Norm):
    def forward(self, a):
        return self.b(self.a(self.norm(a)).relu())


class NormMore(Norm):
    def forward(self, norm, mask=None):
        return self.b(self.a(self.norm(norm)).relu()) if mask is None else norm


def test_names_of_arguments_do_not_matter():
    x = torch.randn(4, 6, dtype=FP64)
    model = NormX().to(FP64).eval()
    gates = (model.a(x) > 0).double()
    want = ((x @ x.T + 6) + 1) * (gates @ gates.T) + 1  # through the norm's scale and from its shift; from two biases
    for make in (NormX, NormInput, NormA, NormMore):
        other = make().to(FP64).eval()
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(npk(other, x, normalize=False), want, rtol=1e-12, atol=0)
    chain = nn.Sequential(model.norm, model.a, nn.ReLU(), model.b)  # its forward's argument is called `input`
    torch.testing.assert_close(npk(chain, x, normalize=False), want, rtol=1e-12, atol=0)


class Calls(nn.Module):
    """A function of the input, then a linear layer, a ReLU and another one."""

    def __init__(self, function, width=6):
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(width, 5), nn.Linear(5, 2)
        self.w, self.scalar = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.randn(6))

    def forward(self, x):
        return self.b(self.a(self.function(self, x)).relu())


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x @ m.w,
        lambda m, x: torch.matmul(x, 2 * m.w.T),
        lambda m, x: F.linear(x, m.w),
        lambda m, x: x * m.w[0],
        lambda m, x: x - m.w[0],
        lambda m, x: x + m.w[0],
        lambda m, x: x * m.scalar,
        lambda m, x: torch.where(x > m.scalar, x, 0),
        lambda m, x: F.layer_norm(x, (6,), m.w[0]),
        lambda m, x: torch.einsum("ni,ij->nj", x, m.w),
    ],
)
def test_parameters_used_directly_are_refused(function):
    with pytest.raises(UnsupportedOperation, match="in layer"):
        npk(Calls(function).to(FP64), torch.randn(4, 6, dtype=FP64))


@pytest.mark.parametrize(
    ("function", "width"),
    [
        (lambda m, x: (x - m.mean) / m.mean.exp(), 6),
        (lambda m, x: torch.fft.rfft(x).abs(), 4),
        (lambda m, x: torch.cat(tensors=[x, x.sin()], axis=1), 12),
        (lambda m, x: x.view(-1, 2, 3).mean(axis=2), 2),
        (lambda m, x: (x > 0) * x, 6),
        (lambda m, x: F.pad(x, (1, 1))[:, :7], 7),
    ],
)
def test_preprocessing_without_parameters_is_followed(function, width):
    model, x = Calls(function, width).to(FP64), torch.randn(4, 6, dtype=FP64)
    z = function(model, x)
    rest = nn.Sequential(model.a, nn.ReLU(), model.b)
    torch.testing.assert_close(npk(model, x), npk(rest, z), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x - x.mean(0, keepdim=True),
        lambda m, x: x / x.std(0, correction=0),
        lambda m, x: x.softmax(0),
        lambda m, x: x.sort(0).values,
        lambda m, x: (x * 1j).imag,
        lambda m, x: x.reshape(-1, 3).repeat(1, 2),
    ],
)
def test_samples_that_depend_on_one_another_are_refused(function):
    with pytest.raises(UnsupportedOperation, match="in layer"):
        npk(Calls(function).to(FP64), torch.randn(4, 6, dtype=FP64))


@pytest.mark.parametrize("change", [lambda z: z[:, :1], lambda z: z[:, [0, 0, 1]], lambda z: z.expand(2, 4, 3)])
def test_outputs_that_are_dropped_or_repeated_are_refused(change):
    class Last(nn.Linear):
        def forward(self, x):
            return change(self.inner(x).relu())

    model = Last(1, 1)
    model.inner = nn.Linear(6, 3)
    with pytest.raises(UnsupportedOperation, match="in layer"):
        npk(model, torch.randn(4, 6))


def test_layers_alone_are_networks_of_one_layer():
    x, images = torch.randn(4, 6, dtype=FP64), torch.randn(3, 2, 5, dtype=FP64)
    linear = nn.Linear(6, 2).to(FP64)
    torch.testing.assert_close(npk(linear, x, normalize=False), x @ x.T + 1, rtol=1e-12, atol=0)
    assert path_features(linear, x).check() <= 1e-12
    conv = nn.Conv1d(2, 3, 3).to(FP64)
    torch.testing.assert_close(npk(conv, images), npk(nn.Sequential(conv), images), rtol=0, atol=0)


def test_weights_that_are_computed_are_not_drawn():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 2))
    with pytest.raises(ValueError, match="layer '0' computes its weight from another"):
        npk_montecarlo(nn.Sequential(layer), torch.randn(2, 6))


class Skip(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.a, self.b, self.c, self.out, self.last = (*(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 2), last)

    def forward(self, x):
        z = self.a(x).relu()
        z = z + self.c(self.b(z).relu())
        return self.out(z if self.last else z.relu())


@pytest.mark.parametrize("last", [True, False])
def test_records_of_residual_networks_are_refused(last):
    model, x = Skip(last), torch.randn(40, 6)
    with pytest.raises(ValueError, match=r"gates: .* is not an affine function of layer .*npk\(model, x\)"):
        npk_from_gates(record(model, x), x)
    chain = nn.Sequential(model.a, nn.ReLU(), model.b, nn.ReLU(), model.c, nn.ReLU(), model.out)
    for n in (1, 3, 7, 40):
        got = npk_from_gates(record(chain, x[:n]), x[:n], bias=True)
        torch.testing.assert_close(got, npk(chain, x[:n]), rtol=1e-5, atol=1e-7)
