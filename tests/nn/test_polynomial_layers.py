"""Layers with a polynomial, a spectral norm and a gain: values, gradients, conversions, the norm's updates, cached weights."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from support import errors, law_floor
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import interp_nn
from interp_nn import convert, functional
from interp_nn.engines.problem import Plan
from interp_nn.nn import SummaryConv2d, SummaryLinear, constrain, follow, update_spectral_norms
from interp_nn.nn.polynomials import NAMED, inverse_map, map_of, monotone_until
from interp_nn.ops import direct, polynomial

CASES = [(name, None, None) for name in NAMED] + [
    ("newton-schulz", True, False),
    ("pc-1", "restore", False),
    ("pc-4", True, True),
    ("summary", True, True),
    ((0.5, 0.25, 0.1), False, True),
    ((0.7,), "restore", None),
    ((1.0, 0.5, 0.0, 0.0, 0.1), None, None),
    ((-2.0, -0.5), None, None),
]


def options(case):
    return dict(zip(("polynomial", "normalize", "gain"), case, strict=True))


def trained(layer):
    """Give every parameter and buffer of a layer values that training could give."""
    with torch.no_grad():
        layer.b.normal_(0, 0.4)
        if layer.gain is not None:
            layer.gain.uniform_(0.5, 2)
    update_spectral_norms(layer)
    return layer


def expected_weight(layer):
    """The effective weight (groups, in, out) by powers of bᵀb, from the singular values of b."""
    b = layer.matrix().detach()
    b = b if b.dim() == 3 else b.unsqueeze(0)
    c = NAMED[layer.polynomial] if isinstance(layer.polynomial, str) else layer.polynomial
    scale = layer.scale.view(-1, 1, 1) if layer.normalize else torch.ones(1, 1, 1, dtype=b.dtype)
    scaled = b * scale
    g = scaled.mT @ scaled
    q = sum(value * torch.linalg.matrix_power(g, i) for i, value in enumerate(c))
    w = scaled @ q
    w = w / scale if layer.normalize == "restore" else w
    return w if layer.gain is None else w * layer.gain.detach().view(-1, 1, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sizes", [(7, 5), (5, 9)])
def test_linear_is_its_equation(case, sizes):
    layer = trained(SummaryLinear(*sizes, dtype=torch.float64, **options(case)))
    x = torch.randn(4, 3, sizes[0], dtype=torch.float64)
    (w,) = expected_weight(layer)
    torch.testing.assert_close(layer(x), x @ w + layer.bias)
    torch.testing.assert_close(torch.Tensor(layer.weight), w.T)
    torch.testing.assert_close(layer.fold()(x), layer(x))
    torch.testing.assert_close(layer.spectrum(weight=True), torch.linalg.svdvals(w))
    frozen = layer.freeze()(x)
    torch.testing.assert_close(frozen, x @ w + layer.bias)


@pytest.mark.filterwarnings("ignore:b of .* singular value")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_is_its_equation(case, groups):
    layer = trained(SummaryConv2d(4, 6, 3, groups=groups, dtype=torch.float64, **options(case)))
    w = expected_weight(layer).mT.reshape(layer.b.shape)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, w, layer.bias, groups=groups))
    torch.testing.assert_close(torch.Tensor(layer.weight), w)
    torch.testing.assert_close(layer.fold()(x), layer(x))
    want = torch.linalg.svdvals(expected_weight(layer))
    torch.testing.assert_close(layer.spectrum(weight=True), want if groups > 1 else want[0])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_gradients(case, kind):
    if kind == "linear":
        layer, x = SummaryLinear(4, 3, dtype=torch.float64, **options(case)), torch.randn(5, 4, dtype=torch.float64)
    else:
        layer = SummaryConv2d(2, 4, 2, groups=2, dtype=torch.float64, **options(case))
        x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    trained(layer)
    parameters = dict(layer.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *parameters.values()))


@pytest.mark.parametrize(("sizes", "form"), [
    ((32, 512, 100), "few rows"),
    ((300, 512, 100), "operator"),
    ((150, 128, 100), "weight, differentiable"),
    ((32, 512, 100), "effective weight"),
    ((32, 512, 100), "groups"),
])  # fmt: skip
def test_a_gain_has_the_gradient_of_one_inner_product(sizes, form):
    """The sum of the coefficients' gradients cancels for pc-4; over many draws, because one number may be right by luck."""
    n, d, k = sizes
    groups = 2 if form == "groups" else 1
    ours, expression = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        layer = SummaryLinear(d, k, bias=False, polynomial="pc-4")
        if groups > 1:
            layer = SummaryConv2d(groups * d, groups * k, 1, groups=groups, bias=False, polynomial="pc-4")
        with torch.no_grad():
            layer.b.normal_(0, max(d, k) ** -0.5)
        layer.reset_norm()
        x, dy = torch.randn(n, groups * d), torch.randn(n, groups * k)

        def run(layer=layer, x=x):
            if form == "effective weight":
                return x @ layer.effective_weight().t()
            return layer(x[..., None, None])[..., 0, 0] if groups > 1 else layer(x)

        def written(dtype, layer=layer, x=x, dy=dy):
            """The gradient of PyTorch's expression, by Horner's rule."""
            b, gain = layer.matrix().detach().to(dtype).view(groups, d, k), layer.gain.detach().to(dtype)
            scale = layer.scale.to(dtype).view(groups, 1, 1)
            b, eye = b * scale, torch.eye(k, dtype=dtype)
            q, c = NAMED["pc-4"][-1] * eye, NAMED["pc-4"]
            for value in c[-2::-1]:
                q = b.mT @ b @ q + value * eye
            rows = x.to(dtype).view(n, groups, d).transpose(0, 1)
            y = (gain.requires_grad_().view(groups, 1, 1) / scale) * (rows @ b @ q)
            return torch.autograd.grad(y.transpose(0, 1).reshape(n, groups * k), gain, dy.to(dtype))[0].double()

        differentiable = form == "weight, differentiable"
        (found,) = torch.autograd.grad(run(), layer.gain, dy, create_graph=differentiable)
        exact = written(torch.float64)
        ours.append(found.detach().double() - exact)
        expression.append(written(torch.float32) - exact)
    ours, expression = (torch.cat(errors).square().mean().sqrt() for errors in (ours, expression))
    assert ours <= 1.5 * expression


def test_a_gain_rounds_nothing_twice_under_autocast():
    layer, x = trained(SummaryLinear(64, 32, polynomial="pc-1")), torch.randn(9, 64)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = functional.summary(x, layer.b, layer.bias, **layer._functional_options())
        assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("sizes", [(32, 512, 100), (300, 512, 100), (256, 128, 100)], ids=str)
def test_coefficients_that_cancel_cost_no_accuracy(sizes):
    """pc-4's are up to 14 times a value: by powers of bᵀb the results are as far from fp64 as those of PyTorch's expression.

    Over many draws, because the gradient of the gain, one number, may be wrong in some. It is joined to that of b.
    """
    n, d, k = sizes
    c, eye = NAMED["pc-4"], torch.eye(k, dtype=torch.float64)
    ours, theirs = [], []
    for seed in range(60 if n == 32 else 20):
        torch.manual_seed(seed)
        layer = SummaryLinear(d, k, bias=False, polynomial="pc-4")
        with torch.no_grad():
            layer.b.normal_(0, max(d, k) ** -0.5)
        layer.reset_norm()
        given = [torch.randn(n, d).requires_grad_(), layer.b, layer.gain]
        dy = torch.randn(n, k)

        def expression(x, b, gain, scale=layer.scale):
            scale, b = scale.to(x.dtype), b * scale.to(x.dtype)
            q = c[-1] * eye.to(x.dtype)
            for value in c[-2::-1]:
                q = b.mT @ b @ q + value * eye.to(x.dtype)
            return gain / scale * (x @ b @ q)

        exact = [t.detach().double().requires_grad_() for t in given]
        results = []
        for y, inputs in ((layer(given[0]), given), (expression(*given), given), (expression(*exact), exact)):
            dx, db, dgain = torch.autograd.grad(y, inputs, dy.to(y.dtype))
            results.append((y.detach(), dx, torch.cat((db.flatten(), dgain))))
        for found, like in ((ours, results[0]), (theirs, results[1])):
            found.append([errors(t, e) for t, e in zip(like, results[2], strict=True)])
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)  # (draws, results, norms)
    assert bool((ours <= 0.75 * (2 * theirs + law_floor(torch.float32))).all())
    assert bool((ours[..., 0].mean(0) <= 0.6 * theirs[..., 0].mean(0)).all())


@pytest.mark.filterwarnings("ignore:.*b has changed")  # gradcheck changes it
@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives_for_more_rows_than_features(case, monkeypatch):
    """There the layer forms its weight first, if a parameter has not been replaced."""
    sizes = ((4, 3), (3, 4))[CASES.index(case) % 2]
    layer = trained(SummaryLinear(*sizes, dtype=torch.float64, **options(case)))
    x = torch.randn(sizes[0] + 1, sizes[0], dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]

    def call(*_):
        return layer(x)

    if not (layer._plain or len(layer._coefficients) == 1):
        with monkeypatch.context() as patch:
            patch.setattr(functional, "summary", pytest.fail)
            patch.setattr(functional, "gained_summary", pytest.fail)
            call()
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)
    wanted = torch.autograd.grad(
        functional_call(layer, {name: p * 1 for name, p in layer.named_parameters()}, x).sin().sum(), inputs
    )
    torch.testing.assert_close(torch.autograd.grad(layer(x).sin().sum(), inputs), wanted)
    for p in inputs:
        if p is not x:
            p.requires_grad_(False)
            rest = [q for q in inputs if q.requires_grad]
            torch.testing.assert_close(
                torch.autograd.grad(layer(x).sin().sum(), rest),
                tuple(w for w, q in zip(wanted, inputs, strict=True) if q.requires_grad),
            )


@pytest.mark.filterwarnings("ignore:.*b has changed")  # gradcheck changes it
@pytest.mark.parametrize("case", [c for c in CASES if c[0] not in ("summary", (0.7,)) and c[2] is not False], ids=str)
def test_derivatives_for_few_rows(case, monkeypatch):
    """There the layer forms the matrix gain q(bᵀb), if autograd is to have its products."""
    layer = trained(SummaryLinear(4, 3, dtype=torch.float64, **options(case)))
    x = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    inputs, used = [x, *layer.parameters()], []
    planned, few_rows = functional.planned, polynomial.few_rows

    def by_matrix(*given):
        *rest, _, plain = planned(*given)
        return *rest, direct.Call(Plan("eager", "(Xb)q", autograd=True)), plain

    monkeypatch.setattr(functional, "planned", by_matrix)
    monkeypatch.setattr(polynomial, "few_rows", lambda *given: used.append(1) or few_rows(*given))

    def call(*_):
        return layer(x)

    def derivatives(y, wanted):
        return torch.autograd.grad(y.sin().sum(), wanted)

    assert torch.autograd.gradcheck(call, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, inputs)
    applied = bool(used)
    assert applied == (layer.gain is not None or layer.normalize == "restore")
    named = {name: p * 1 for name, p in layer.named_parameters()}
    wanted = dict(zip(map(id, inputs), derivatives(functional_call(layer, named, x), inputs), strict=True))
    for p in inputs[1:]:
        p.requires_grad_(False)
        rest = [t for t in inputs if t.requires_grad]
        torch.testing.assert_close(derivatives(layer(x), rest), tuple(wanted[id(t)] for t in rest))


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n in NAMED for d in (torch.bfloat16, torch.float16)])
def test_16_bit_layers(name, dtype):
    layer = trained(SummaryLinear(32, 16, polynomial=name))
    exact = layer.double()(x := torch.randn(64, 32, dtype=torch.float64))
    halved = layer.to(dtype)
    error = (halved(x.to(dtype)).double() - exact).norm() / exact.norm()
    w = torch.Tensor(halved.weight.detach())
    plain = (nn.functional.linear(x.to(dtype), w, halved.bias).double() - exact).norm() / exact.norm()
    assert error <= 2 * plain + 8 * torch.finfo(dtype).eps


# ---- options


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"polynomial": "newton"},
            ValueError,
            "polynomial: got 'newton', want one of 'summary', 'newton-schulz', 'pc-1'",
        ),
        ({"polynomial": 3}, TypeError, "polynomial: got 3, want"),
        ({"polynomial": (True, 1)}, TypeError, "polynomial: got"),
        ({"polynomial": ()}, ValueError, "polynomial: got"),
        ({"polynomial": (0.0, 0.0)}, ValueError, "not all zero"),
        ({"polynomial": (1, float("nan"))}, ValueError, "finite"),
        ({"polynomial": (1,) * 6}, ValueError, "1 to 5"),
        ({"normalize": "spectral"}, ValueError, "normalize: got 'spectral', want True, False, 'restore'"),
        ({"normalize": 1}, ValueError, "normalize: got 1"),
        ({"gain": 1.0}, TypeError, "gain: got 1.0, want True, False"),
    ],
)
def test_bad_options(arguments, error, message):
    for make in (
        lambda: SummaryLinear(3, 2, **arguments),
        lambda: SummaryConv2d(3, 2, 1, **arguments),
        lambda: SummaryLinear.from_linear(nn.Linear(3, 2), **arguments),
        lambda: convert.summarize(nn.Sequential(nn.Linear(3, 2)), **arguments),
    ):
        with pytest.raises(error, match=message):
            make()


def test_defaults_of_named_polynomials():
    for name in NAMED:
        layer = SummaryLinear(6, 4, polynomial=name)
        wanted = {"summary": (False, False), "newton-schulz": (True, True)}.get(name, ("restore", True))
        assert (layer.normalize, layer.gain is not None) == wanted
        torch.testing.assert_close(
            torch.Tensor(layer.weight), layer.b.T, atol=2e-3, rtol=0
        )  # f(1) = 1, published to 3 digits
    plain = SummaryLinear(6, 4)
    assert set(plain.state_dict()) == {"b", "bias"}
    assert repr(plain) == "SummaryLinear(in_features=6, out_features=4, bias=True)"
    text = "SummaryLinear(in_features=6, out_features=4, bias=True, polynomial='pc-1', normalize='restore', gain=True)"
    assert repr(SummaryLinear(6, 4, polynomial="pc-1")) == text


def test_without_gain_rotating_b_rotates_the_output():
    layer = trained(SummaryLinear(6, 4, bias=False, dtype=torch.float64, polynomial="newton-schulz", gain=False))
    x, r = torch.randn(3, 6, dtype=torch.float64), torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    before = layer(x)
    with torch.no_grad():
        layer.b.copy_(layer.b @ r)
    torch.testing.assert_close(layer.eval()(x), before @ r)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_pc_layers_are_the_published_transform(level):
    """W <- sigma W_hat q(W_hat^T W_hat) with W_hat = W / sigma, by the published recurrence of Horner's rule on W W^T."""
    layer = trained(SummaryLinear(9, 6, bias=False, dtype=torch.float64, polynomial=f"pc-{level}", gain=False))
    sigma = 1 / layer.scale
    w = layer.b.detach().T / sigma
    gram, eye = w @ w.T, torch.eye(6, dtype=torch.float64)
    *rest, last = NAMED[f"pc-{level}"]
    q = last * eye
    for c in reversed(rest):
        q = gram @ q + c * eye
    torch.testing.assert_close(torch.Tensor(layer.weight), sigma * (q @ w), rtol=1e-13, atol=1e-13)


# ---- from a weight


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_takes_a_weight(name, dtype):
    linear, x = nn.Linear(9, 6, dtype=dtype), torch.randn(5, 9, dtype=dtype)
    with torch.no_grad():
        linear.weight.mul_(7)
    layer = SummaryLinear.from_linear(linear, polynomial=name)
    torch.testing.assert_close(layer(x), linear(x))
    if layer.normalize is True:
        assert float(layer.spectrum()[0]) == pytest.approx(1, abs=1e-6)
        assert float(layer.gain.detach()) == pytest.approx(
            float(torch.linalg.matrix_norm(linear.weight.detach(), 2)), rel=1e-5
        )
    update_spectral_norms(layer)
    torch.testing.assert_close(layer(x), linear(x), rtol=2e-2, atol=2e-2)  # the iterations approach the norm from below
    conv = nn.Conv2d(4, 6, 3, groups=2, dtype=dtype)
    images = torch.randn(2, 4, 5, 5, dtype=dtype)
    torch.testing.assert_close(SummaryConv2d.from_conv2d(conv, polynomial=name)(images), conv(images))
    layer.set_weight_(torch.zeros(6, 9))
    torch.testing.assert_close(layer(x), layer.bias.expand(5, 6))
    layer.set_weight_(linear.weight)
    torch.testing.assert_close(layer(x), linear(x))


def test_a_zero_weight_can_still_train():
    layer = SummaryLinear.from_linear(nn.utils.skip_init(nn.Linear, 5, 3), polynomial="newton-schulz")
    layer.set_weight_(torch.zeros(3, 5))
    layer(torch.randn(4, 5)).square().sum().backward()
    layer(torch.randn(4, 5)).sum().backward()
    assert float(layer.gain.detach()) == 0
    assert bool(layer.gain.grad != 0)


@pytest.mark.parametrize("name", NAMED)
def test_the_map_is_inverted_on_its_first_branch(name):
    c = NAMED[name]
    end = min(monotone_until(c), 3.0)
    s = torch.linspace(0, end, 50, dtype=torch.float64)
    assert bool((map_of(c, s).diff() > 0).all())
    torch.testing.assert_close(map_of(c, inverse_map(c, map_of(c, s), "w")), map_of(c, s))


def test_weights_that_no_b_has():
    weight = torch.diag(torch.tensor([1.5, 1.25, 0.5]))
    linear = nn.Linear(3, 3)
    linear.weight.data = weight
    with pytest.raises(ValueError, match=r"linear: got 2 singular values beyond 1, .*: 1\.5, 1\.25"):
        SummaryLinear.from_linear(linear, polynomial="newton-schulz", normalize=False, gain=False)
    with pytest.raises(ValueError, match=r"linear: got spectral norm 1\.5, want 1.*pass gain=True"):
        SummaryLinear.from_linear(linear, polynomial="newton-schulz", gain=False)
    with pytest.raises(ValueError, match=r"f\(1\) is 0"):
        SummaryLinear.from_linear(linear, polynomial=(1.0, -1.0), gain=True)
    layer = SummaryLinear(3, 3, polynomial="newton-schulz", normalize=False, gain=False)
    before = layer.b.clone()
    with pytest.raises(ValueError, match="weight: got 2 singular values"):
        layer.set_weight_(weight)
    assert torch.equal(layer.b, before)
    model = nn.Sequential(nn.Linear(3, 3), linear)
    with pytest.raises(ValueError, match="0: got spectral norm"):
        convert.summarize(model, polynomial="newton-schulz", gain=False)
    assert all(type(m) is nn.Linear for m in model)


# ---- whole models


@pytest.mark.parametrize("name", ["newton-schulz", "pc-2"])
def test_models_are_converted_and_folded(name):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 8))
    model[5].weight = nn.Parameter(torch.eye(8) * 2)
    tied = nn.Linear(8, 8)
    tied.weight = model[5].weight
    model.append(tied)
    x = torch.randn(3, 1, 5, 5)
    before = model(x)
    report = convert.summarize(model, polynomial=name)
    assert len(report.converted) == 4 and report.error < 1e-5
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert model[5].b is model[6].b and model[5].gain is model[6].gain
    state = copy.deepcopy(model.state_dict())
    convert.fold(model)
    assert [type(m).__name__ for m in model] == ["Conv2d", "ReLU", "Flatten", "Linear", "ReLU", "Linear", "Linear"]
    assert not any(key.endswith(("gain", "scale", "u", "v")) for key in model.state_dict())
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert model[5].weight is model[6].weight
    plain = copy.deepcopy(model.state_dict())
    convert.summarize(model, polynomial=name)
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    convert.load_state_dict(model, plain, source="linear")
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"0\.weight: belongs to a layer with polynomial="):
        convert.load_state_dict(model, plain, source="summary-0.1")


def test_one_b_with_two_gains_is_not_folded():
    model = nn.Sequential(*(SummaryLinear(4, 4, polynomial="newton-schulz") for _ in range(2)))
    model[1].b = model[0].b
    convert.fold(copy.deepcopy(model))  # equal so far
    with torch.no_grad():
        model[1].gain.fill_(2)
    report = convert.fold(model)
    assert not report.converted and "tied" in report.skipped[0].reason


def test_checkpoints_keep_bits_and_converge_without_a_norm():
    layer = trained(SummaryLinear(12, 5, polynomial="newton-schulz"))
    x = torch.randn(3, 12)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
    other = SummaryLinear(12, 5, polynomial="newton-schulz")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    for name in ("u", "v", "scale"):
        del state[name]
    other = SummaryLinear(12, 5, polynomial="newton-schulz")
    assert set(other.load_state_dict(state, strict=False).missing_keys) == {"u", "v", "scale"}
    torch.testing.assert_close(other.scale, 1 / torch.linalg.matrix_norm(layer.b.detach(), 2), rtol=1e-2, atol=0)
    stale = layer.state_dict() | {"scale": torch.tensor(3.0)}  # of another b
    other.load_state_dict(stale)
    torch.testing.assert_close(other(x), layer(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_layers_without_values(device):
    layer = SummaryLinear(3, 2, device="meta", polynomial="newton-schulz")
    assert layer(torch.empty(4, 3, device="meta")).shape == (4, 2)
    if device == "cpu":
        layer.to_empty(device="cpu").reset_parameters()
        assert bool(layer(torch.ones(4, 3)).isfinite().all())
    empty = SummaryLinear(0, 2, polynomial="newton-schulz")
    assert empty(torch.ones(4, 0)).shape == (4, 2)


# ---- the norm


def test_norm_follows_b():
    torch.manual_seed(0)
    model = nn.Sequential(SummaryLinear(20, 16, polynomial="newton-schulz"), nn.ReLU(), SummaryConv2d(1, 2, 3).train())
    layer = model[0]
    adam = torch.optim.Adam(model[:1].parameters(), 1e-2)
    handle = follow(adam, model)
    for _ in range(30):
        adam.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model[:2](torch.randn(8, 20)).square().mean().backward()
        adam.step()
    exact = torch.linalg.matrix_norm(layer.b.detach(), 2)
    assert float(layer.scale * exact) == pytest.approx(1, abs=1e-2)
    handle.remove()
    before = layer.scale.clone()
    adam.step()
    assert torch.equal(layer.scale, before)


def test_forwards_between_two_updates_use_one_norm():
    layer = trained(SummaryLinear(20, 16, polynomial="newton-schulz"))
    x = torch.randn(4, 20)
    state = {n: t.clone() for n, t in layer.state_dict().items()}
    first = layer(x)
    first.sum().backward()
    assert torch.equal(layer(x), first)
    assert all(torch.equal(t, state[n]) for n, t in layer.state_dict().items())


def test_an_unfollowed_step_warns_once_by_name():
    layer = SummaryLinear(5, 4, polynomial="newton-schulz")
    sgd = torch.optim.SGD(layer.parameters(), 0.1)
    x = torch.randn(3, 5)
    layer(x).sum().backward()
    sgd.step()
    with pytest.warns(UserWarning, match=r"SummaryLinear\(in_features=5.*spectral norm.*follow\(optimizer, model\)"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        sgd.step()
        layer.eval()(x)
        update_spectral_norms(layer)
        copy.deepcopy(layer.train())(x)
        SummaryLinear(5, 4)(x)


def test_an_initialiser_that_leaves_the_norm_behind_is_named():
    layer = nn.utils.skip_init(SummaryLinear, 5, 4, polynomial="newton-schulz")
    with torch.no_grad():
        layer.scale.fill_(3.0)  # whatever was in the memory
        layer.bias.zero_()
    nn.init.orthogonal_(layer.b)
    with pytest.warns(UserWarning, match="update_spectral_norms"):
        layer(torch.randn(3, 5))
    update_spectral_norms(layer)
    layer.reset_norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for moved in (layer, layer.to(torch.bfloat16), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            moved(torch.randn(3, 5).to(layer.b.dtype))


def test_follow_retracts_too_and_skips_skipped_steps():
    model = constrain(nn.Sequential(SummaryLinear(8, 4), SummaryLinear(4, 4, polynomial="newton-schulz")), "retract")
    sgd = torch.optim.SGD(model.parameters(), 0.05)
    follow(sgd, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.randn(16, 8)).square().mean()).backward()
    scaler.step(sgd)
    assert max(layer.orthogonality_defect() for layer in model) < 0.05
    state = copy.deepcopy(model.state_dict())
    model[0].b.grad.fill_(float("inf"))
    scaler.update()
    scaler.scale(torch.ones(())).requires_grad_()
    scaler.step(sgd)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    with pytest.raises(TypeError, match="optimizer: got Sequential"):
        follow(model, sgd)
    with pytest.raises(TypeError, match="model: got SGD"):
        follow(sgd, sgd)


class Wrapper(torch.optim.Optimizer):
    """A wrapper that has not called its base's constructor, as accelerate's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def test_follow_takes_a_wrapper_of_an_optimizer():
    layer = SummaryLinear(6, 4, polynomial="newton-schulz")
    wrapper = Wrapper(Wrapper(torch.optim.SGD(layer.parameters(), 0.5)))
    follow(wrapper, layer)
    layer(torch.randn(3, 6)).square().sum().backward()
    wrapper.step()
    assert float(layer.scale) != 1 and norm_errors([layer])[0] < 1e-2
    with pytest.raises(TypeError, match="optimizer: got Wrapper, which has no hooks; want the optimizer inside of it"):
        follow(Wrapper(layer), layer)


@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_norm_of_large_and_small_b(size):
    layer = SummaryLinear(6, 4, polynomial="newton-schulz")
    with torch.no_grad():
        layer.b.mul_(size)
    layer.reset_norm()
    torch.testing.assert_close(layer.scale * size, torch.ones(()), rtol=1e-3, atol=0)
    with torch.no_grad():
        layer.b.zero_()
    layer.reset_norm()
    assert float(layer.scale) == 1
    assert torch.equal(layer(torch.ones(2, 6)), layer.bias.expand(2, 4))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forwards_are_the_same(reentrant):
    layer = trained(SummaryLinear(6, 4, dtype=torch.float64, polynomial="newton-schulz"))
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    got = [x.grad, *(p.grad for p in layer.parameters())]
    if reentrant:  # its first forward is under no_grad, whose order of products may differ
        torch.testing.assert_close(got, list(want), rtol=1e-12, atol=1e-12)
    else:
        assert all(map(torch.equal, got, want))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_compiled_layer():
    layer = trained(SummaryLinear(6, 4, polynomial="newton-schulz"))
    x = torch.randn(5, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    got = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(got, [p.grad for p in layer.parameters()])
    trained(layer)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_layer_has_no_python_in_it():
    layer, x = trained(SummaryLinear(6, 4, polynomial="newton-schulz")), torch.randn(9, 6)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), layer(x))


def test_penalty_and_engines_of_polynomial_layers():
    layer = constrain(trained(SummaryLinear(6, 4, polynomial="newton-schulz")), "penalty")
    x = torch.randn(5, 6)
    layer(x)
    g = layer.b.T @ layer.b
    torch.testing.assert_close(interp_nn.nn.orthogonality_penalty(layer), (g - torch.eye(4)).square().sum())
    constrain(layer, "parametrization")
    assert layer.spectrum()[0] == pytest.approx(1, abs=1e-5)
    assert float(layer.scale) == pytest.approx(1, abs=1e-2)


def test_code_that_reads_the_weight_gets_it():
    encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dtype=torch.float64).eval()
    norm, x = nn.BatchNorm2d(4).double().eval(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    conv = trained(SummaryConv2d(4, 4, 3, dtype=torch.float64, polynomial="newton-schulz")).eval()
    torch.testing.assert_close(torch.nn.utils.fusion.fuse_conv_bn_eval(conv.fold(), norm)(x), norm(conv(x)))
    with pytest.raises(ValueError, match=r"set_weight_\(W\).*fold"):
        torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    tokens = torch.randn(2, 5, 8, dtype=torch.float64)
    before = encoder(tokens)
    convert.summarize(encoder, select=["linear1", "linear2"], polynomial="pc-2")
    with torch.no_grad():  # PyTorch's fast path reads weights
        torch.testing.assert_close(encoder(tokens), before)
    for write in (nn.init.zeros_, lambda w: w.mul_(2), lambda w: w.copy_(w)):
        with pytest.raises(ValueError, match="set_weight_"):
            write(encoder.linear1.weight)


# ---- averages of models


def trajectory(steps=30):
    torch.manual_seed(0)
    model = nn.Sequential(SummaryLinear(20, 12, polynomial="newton-schulz"), SummaryLinear(12, 4, polynomial="pc-1"))
    adam = torch.optim.Adam(model.parameters(), 0.05)
    follow(adam, model)
    for _ in range(steps):
        adam.zero_grad()
        x = torch.randn(16, 20)
        (model(x) - 2 * x[:, :4]).square().mean().backward()
        adam.step()
        yield model


def norm_errors(model):
    return [abs(float(torch.linalg.matrix_norm(layer.b.detach(), 2) * layer.scale.detach()) - 1) for layer in model]


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_an_average_of_models_whose_norms_are_not_its_own_warns(kind, use_buffers):
    average = None
    for model in trajectory():
        if average is None:
            options = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)} if kind == "ema" else {}
            average = swa_utils.AveragedModel(model, use_buffers=use_buffers, **options).eval()
        average.update_parameters(model)
    assert max(norm_errors(average.module)) > 1e-2
    x = torch.randn(3, 20)
    for use in (lambda m: m(x), lambda m: m.state_dict(), convert.fold, lambda m: m.module[1].weight):
        with pytest.warns(UserWarning, match=r"b has changed.*update_spectral_norms\(model\) after each change"):
            use(copy.deepcopy(average))
    for _ in range(2):
        update_spectral_norms(average)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average(x)
    assert max(norm_errors(average.module)) < 1e-2


def test_an_average_of_states_is_loaded_with_the_norms_of_its_own():
    models = [copy.deepcopy(model) for model in trajectory()]
    states = [models[9].state_dict(), models[-1].state_dict()]
    average = {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}
    models[0].load_state_dict(average)
    assert max(norm_errors(models[0])) < 1e-2
    assert not torch.equal(models[0][0].scale, average["0.scale"])
    for dtype in (torch.float32, torch.bfloat16):  # a state that is no average keeps its norms
        state = {name: t.to(dtype) for name, t in states[1].items()}
        models[0].load_state_dict(state)
        kept = ("scale",) if dtype == torch.bfloat16 else ("b", "gain", "u", "v", "scale")
        for name, value in models[0].state_dict().items():
            assert torch.equal(value, state[name].float()) or not name.endswith(kept)


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
def test_a_norm_from_before_b_was_pruned_or_parametrized_warns(how):
    layer = trained(SummaryLinear(12, 5, polynomial="newton-schulz")).eval()
    x = torch.randn(3, 12)
    if how == "pruned":
        prune.ln_structured(layer, "b", 4, n=2, dim=0)
    else:
        parametrizations.orthogonal(layer, "b")
    with pytest.warns(UserWarning, match=r"b has changed since its spectral norm was computed"):
        layer(x)
    update_spectral_norms(layer)
    assert norm_errors([layer])[0] < 1e-2
    layer(x)
