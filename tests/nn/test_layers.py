import copy
import inspect
import math
import pickle

import pytest
import torch
from layers import make
from relative_error import error, naive_kernel, naive_linear, randomize
from torch import nn
from torch.nn import functional as F

from interp_nn.functional import SummaryPair
from interp_nn.nn import SummaryClassifier, SummaryConv2d, SummaryHead, SummaryLayer, SummaryLinear, SummaryLoss

SHAPES = [pytest.param(160, 48, id="tall"), pytest.param(48, 160, id="wide"), pytest.param(64, 64, id="square")]
PRECISIONS = [pytest.param(torch.float32, 1e-6, id="fp32"), pytest.param(torch.float64, 1e-12, id="fp64")]
TWINS = [(SummaryLinear, nn.Linear, (6, 4)), (SummaryConv2d, nn.Conv2d, (6, 4, 3))]
by_twin = pytest.mark.parametrize(("ours", "theirs", "sizes"), TWINS, ids=["linear", "conv2d"])


# Drop-in: signature, parameters, state_dict


@by_twin
def test_signature_is_pytorchs(ours, theirs, sizes):
    def arguments(cls):
        return [(p.name, p.kind, p.default) for p in inspect.signature(cls).parameters.values()]

    own = [("polynomial", "summary"), ("normalize", None), ("gain", None)]
    assert arguments(ours) == arguments(theirs) + [(n, inspect.Parameter.KEYWORD_ONLY, value) for n, value in own]


@by_twin
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_and_repr_are_pytorchs(ours, theirs, sizes, bias):
    mine, other = ours(*sizes, bias=bias), theirs(*sizes, bias=bias)
    wanted = {name.replace("weight", "b"): p for name, p in other.named_parameters()}
    if ours is SummaryLinear:
        wanted["b"] = wanted["b"].t()
    assert [(n, p.shape, p.dtype) for n, p in mine.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in wanted.items()
    ]
    assert list(mine.state_dict()) == list(wanted)
    assert mine.weight.shape == other.weight.shape and mine.weight.stride() == other.weight.stride()
    assert repr(mine) == repr(other).replace(theirs.__name__, ours.__name__)


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize(("d", "k"), [*SHAPES, pytest.param(512, 100, id="vgg")])
def test_linear_is_nn_linear_at_an_orthonormal_weight(d, k, dtype, bound):
    mine, other = SummaryLinear(d, k, dtype=dtype), nn.Linear(d, k, dtype=dtype)
    if k > d:  # an orthonormal b has orthonormal rows then, and b (bᵀb) = (b bᵀ) b is b again
        assert error(mine.b @ mine.b.t(), torch.eye(d)) < 1e-5
    other.load_state_dict({"weight": mine.b.t(), "bias": mine.bias})
    x = torch.randn(40, d, dtype=dtype)
    assert error(mine(x), other(x)) <= bound
    with torch.no_grad():  # and nowhere else
        mine.b.mul_(1.1), other.weight.mul_(1.1)
    assert error(mine(x), other(x)) > 0.1


# SummaryLinear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "k"), SHAPES)
def test_reset_parameters_draws_an_orthonormal_weight(d, k, dtype):
    layer = randomize(SummaryLinear(d, k, dtype=dtype))
    layer.reset_parameters()
    # A 16-bit weight is an orthonormal one rounded: each entry moves by at most half an eps of itself.
    bound = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
    assert layer.orthogonality_defect() < bound
    assert 0 < layer.bias.abs().max() <= 1 / math.sqrt(d)
    assert layer.bias.abs().max() > 0.8 / math.sqrt(d)  # uniform up to that bound


def test_two_layers_draw_different_weights():
    assert not torch.equal(SummaryLinear(8, 4).b, SummaryLinear(8, 4).b)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SummaryLinear(6, 4, device="meta"),
        lambda: SummaryConv2d(4, 6, 3, groups=2, device="meta"),
        lambda: SummaryLayer(6, 4, device="meta"),
        lambda: SummaryClassifier(6, 4, device="meta"),
        lambda: SummaryHead(6, 4, 3, device="meta"),
    ],
    ids=["linear", "conv2d", "layer", "classifier", "head"],
)
def test_meta_construction_then_reset(make):
    layer = make()
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.b.fill_(math.nan)
    layer.reset_parameters()
    assert layer.orthogonality_defect() < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 1, 3), (0,), (3, 0)])
def test_leading_dimensions(shape, bias):
    layer = randomize(SummaryLinear(6, 4, bias=bias)).double()
    x = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape, 4) and y.dtype == torch.float64
    assert (layer.bias is None) is not bias
    torch.testing.assert_close(y, naive_linear(x, layer.b, layer.bias), rtol=1e-12, atol=1e-13)
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.b.grad.shape == (6, 4)
    if 0 in shape:
        assert not layer.b.grad.any()


@pytest.mark.parametrize(("n", "d", "k"), [(5, 6, 4), (5, 4, 6), (300, 160, 48), (30, 48, 160), (20, 512, 100)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_gradients_are_those_of_the_naive_expression(n, d, k, bias):
    layer = randomize(SummaryLinear(d, k, bias=bias, dtype=torch.float64))
    x = torch.randn(2, n, d, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, n, k, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad(layer(x), leaves, upstream)
    wanted = torch.autograd.grad(naive_linear(x, layer.b, layer.bias), leaves, upstream)
    assert len(got) == 2 + bias
    assert all(error(g, w) <= 1e-12 for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_follows_its_parameters_dtype(kind):
    layer, x = make(kind, torch.float64)

    def output_and_gradients(layer, x):
        y = layer(x)
        return [y, *torch.autograd.grad(y.float().square().mean(), list(layer.parameters()))]

    exact = output_and_gradients(layer, x)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)):
        low = output_and_gradients(copy.deepcopy(layer).to(dtype), x.to(dtype))
        assert all(got.dtype == dtype and error(got, wanted) < bound for got, wanted in zip(low, exact, strict=True))


# Gram matrix, spectrum and orthogonality of b


@pytest.mark.parametrize(("d", "k"), [(12, 5), (5, 12)])
def test_gram_is_the_gram_matrix_and_differentiable(d, k):
    layer = randomize(SummaryLinear(d, k, dtype=torch.float64))
    upstream = torch.randn(k, k, dtype=torch.float64)
    g = layer.gram()
    assert error(g, layer.b.t() @ layer.b) <= 1e-12
    (got,) = torch.autograd.grad(g, layer.b, upstream)
    assert error(got, layer.b @ (upstream + upstream.t())) <= 1e-12


@pytest.mark.filterwarnings("ignore:b of .* singular value")
@pytest.mark.parametrize(("d", "k"), [(30, 8), (8, 30)])
def test_effective_weights_singular_values_are_the_cubes(d, k):
    layer = randomize(SummaryLinear(d, k, dtype=torch.float64))
    s = layer.spectrum()
    assert s.dtype == torch.float64 and s.shape == (8,) and not s.requires_grad
    assert (s.diff() <= 0).all()
    assert error(s, torch.linalg.svdvals(layer.b)) <= 1e-12
    effective = layer.effective_weight()
    assert effective.shape == (k, d) and effective.requires_grad
    assert error(torch.linalg.svdvals(effective), s**3) <= 1e-12
    assert layer.half().spectrum().dtype == torch.float64


@pytest.mark.parametrize(("d", "k"), [(9, 4), (4, 9)])
@pytest.mark.parametrize(("values", "defect"), [((1.5, 1.0, 0.9, 0.7), 0.5), ((1.1, 1.0, 0.9, 0.0), 1.0)])
def test_orthogonality_defect_is_the_farthest_singular_value(d, k, values, defect):
    layer = SummaryLinear(d, k, dtype=torch.float64)
    left, right = (
        torch.linalg.qr(torch.randn(k, 4, dtype=torch.float64))[0],
        torch.linalg.qr(torch.randn(d, 4, dtype=torch.float64))[0],
    )
    with torch.no_grad():
        layer.b.copy_(right * torch.tensor(values) @ left.t())
    assert layer.orthogonality_defect() == pytest.approx(defect, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d", "k"), SHAPES)
def test_orthogonalize_moves_the_weight_to_its_polar_factor_in_place(d, k, dtype):
    layer = SummaryLinear(d, k, dtype=dtype)
    rank = min(d, k)  # well-conditioned, so that the factor is well determined
    with torch.no_grad():
        layer.b.copy_(layer.b * 3 + torch.randn(d, k, dtype=dtype) / math.sqrt(d + k))
    u, _, vh = torch.linalg.svd(layer.b.detach().double(), full_matrices=False)
    weight, bias, version = layer.b, layer.bias.clone(), layer.b._version
    defect = layer.orthogonalize_()
    assert layer.b is weight and weight._version > version and weight.requires_grad
    assert torch.equal(layer.bias, bias)
    assert defect == layer.orthogonality_defect() < 1e-5
    small = layer.gram() if k <= d else layer.b @ layer.b.t()
    assert (small - torch.eye(rank, dtype=dtype)).abs().max() <= 1e-6
    assert error(layer.b, u @ vh) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.filterwarnings("ignore:b of .* singular value")
def test_orthogonalize_works_group_by_group():
    layer = randomize(SummaryConv2d(8, 12, 3, groups=4, dtype=torch.float64))
    assert layer.gram().shape == (4, 3, 3) and layer.spectrum().shape == (4, 3)
    assert layer.orthogonality_defect() > 0.1
    assert layer.orthogonalize_() < 1e-12
    assert (layer.gram() - torch.eye(3)).abs().max() <= 1e-12
    with torch.no_grad():
        layer.b[3:6] = 0  # the second group's b
    assert layer.orthogonalize_() == layer.orthogonality_defect() == 1


# SummaryConv2d

CONVOLUTIONS = {
    "plain": {},
    "stride": {"stride": (2, 1), "padding": 1},
    "dilation": {"dilation": 2, "padding": (1, 2)},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": (4, 2), "dilation": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise, wide": {"groups": 4, "out_channels": 48, "bias": False},
    "wide": {"in_channels": 2, "out_channels": 20, "kernel_size": (3, 1)},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "circular": {"padding": (2, 1), "padding_mode": "circular", "groups": 2, "stride": 2},
    "same circular": {"padding": "same", "padding_mode": "circular", "kernel_size": (4, 5), "dilation": (1, 2)},
}
by_convolution = pytest.mark.parametrize(
    "options",
    [{"in_channels": 4, "out_channels": 6, "kernel_size": 3} | o for o in CONVOLUTIONS.values()],
    ids=CONVOLUTIONS,
)


@by_convolution
def test_conv_and_its_gradients_are_conv2d_of_the_effective_weight(options):
    layer, plain = (randomize(cls(**options, dtype=torch.float64)) for cls in (SummaryConv2d, nn.Conv2d))
    x = torch.randn(2, layer.in_channels, 9, 8, dtype=torch.float64, requires_grad=True)
    parameters = dict(plain.named_parameters()) | {"weight": naive_kernel(layer.b, layer.groups)}
    if layer.bias is not None:
        parameters["bias"] = layer.bias
    wanted, got = torch.func.functional_call(plain, parameters, (x,)), layer(x)
    assert error(got, wanted) <= 1e-12
    leaves, upstream = [x, *layer.parameters()], torch.randn_like(got)
    grads = [torch.autograd.grad(y, leaves, upstream) for y in (got, wanted)]
    assert all(error(a, b) <= 1e-12 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@by_convolution
def test_conv_is_nn_conv2d_at_orthonormal_kernels(options, dtype, bound):
    mine, other = SummaryConv2d(**options, dtype=dtype), nn.Conv2d(**options, dtype=dtype)
    other.load_state_dict({"weight" if name == "b" else name: p for name, p in mine.state_dict().items()})
    x = torch.randn(2, mine.in_channels, 9, 8, dtype=dtype)
    assert error(mine(x), other(x)) <= bound
    randomize(mine)
    with torch.no_grad():
        other.weight.copy_(mine.b)
    assert error(mine(x), other(x)) > 0.1


def test_conv_takes_one_image_and_channels_last():
    layer, x = randomize(SummaryConv2d(3, 5, 3)).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    y = layer(x)
    assert error(layer(x[0]), y[0]) <= 1e-12
    layer = layer.to(memory_format=torch.channels_last)
    assert error(layer(x.to(memory_format=torch.channels_last)), y) <= 1e-12
    layer.reset_parameters()
    assert layer.orthogonality_defect() < 1e-5
    assert randomize(layer).orthogonalize_() < 1e-5


# SummaryLayer, SummaryClassifier, SummaryHead


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
def test_pairs_in_training_and_tensors_in_evaluation(shape):
    x = torch.randn(*shape, 12)
    for layer, width in ((SummaryLayer(12, 5), 5), (SummaryClassifier(12, 4), 4), (SummaryHead(12, 5, 3), 3)):
        randomize(layer)
        pair = layer(x)
        assert isinstance(pair, SummaryPair)
        assert pair.projection.shape == pair.summary.shape == (*shape, width)
        out = layer.eval()(x)
        if type(layer) is SummaryLayer:
            assert isinstance(out, SummaryPair)
        else:
            assert isinstance(out, torch.Tensor)
            torch.testing.assert_close(out, pair.projection, rtol=1e-5, atol=1e-5)


def test_layers_compute_what_they_say():
    x = torch.randn(20, 12, dtype=torch.float64)
    layer = randomize(SummaryLayer(12, 5, dtype=torch.float64))
    head = randomize(SummaryHead(12, 5, 3, dtype=torch.float64))
    for module, output in ((layer, lambda p: p), (head, lambda p: p @ head.output.weight.t() + head.output.bias)):
        pair = module(x)
        assert error(pair.projection, output(x @ module.b)) <= 1e-12
        assert error(pair.summary, output(naive_linear(x, module.b))) <= 1e-12


def test_heads_state_dict_and_repr():
    head = SummaryHead(12, 5, 3)
    assert {name: tuple(p.shape) for name, p in head.state_dict().items()} == {
        "b": (12, 5),
        "output.weight": (3, 5),
        "output.bias": (3,),
    }
    assert "in_features=12, out_features=5" in repr(head) and "(output): Linear(in_features=5" in repr(head)


by_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
by_consistency = pytest.mark.parametrize("consistency", ["logits", "latent"])
by_ignored = pytest.mark.parametrize("ignore_index", [-100, 1])
WEIGHTS = (1.0, 0.5, 2.0)


def _batch(d, classes, ignore_index, dtype=torch.float64):
    x = torch.randn(3, 8, d, dtype=dtype)
    target = torch.randint(classes, (3, 8))
    target[0, ::3] = ignore_index
    return x, target


@by_ignored
@by_reduction
@by_consistency
@pytest.mark.parametrize(
    ("dtype", "bound", "of_gradients"), [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-12, 1e-12)]
)
def test_heads_loss_is_summary_loss_of_the_naive_pair(dtype, bound, of_gradients, consistency, reduction, ignore_index):
    head = randomize(SummaryHead(40, 12, 5, dtype=dtype), 0.3)
    x, target = _batch(40, 5, ignore_index, dtype)
    x.requires_grad_()
    options = {"weights": WEIGHTS, "consistency": consistency, "ignore_index": ignore_index, "reduction": reduction}
    codes = x @ head.b, naive_linear(x, head.b)
    got = head.loss(x, target, **options)
    wanted = SummaryLoss(**options)([head.output(code) for code in codes], target, codes)
    assert got.shape == (target.shape if reduction == "none" else ())
    assert error(got, wanted) <= bound
    leaves, upstream = [x, *head.parameters()], torch.randn_like(wanted)
    grads = [torch.autograd.grad(loss, leaves, upstream) for loss in (got, wanted)]
    assert len(leaves) == 4
    assert all(error(a, b) <= of_gradients for a, b in zip(*grads, strict=True))


@by_ignored
@by_reduction
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_classifiers_loss_is_summary_loss_of_its_pair(dtype, bound, reduction, ignore_index):
    layer = randomize(SummaryClassifier(40, 5, dtype=dtype), 0.2)
    x, target = _batch(40, 5, ignore_index, dtype)
    options = {"weights": WEIGHTS, "ignore_index": ignore_index, "reduction": reduction}
    assert error(layer.loss(x, target, **options), SummaryLoss(**options)(layer(x), target)) <= bound


def test_classifiers_default_loss_is_the_papers_on_the_kept_rows():
    layer = randomize(SummaryClassifier(40, 5, dtype=torch.float64), 0.2)
    x, target = _batch(40, 5, -100)
    p, y = (o[target != -100] for o in layer(x))
    t = target[target != -100]
    wanted = F.cross_entropy(p, t) + F.cross_entropy(y, t) + F.mse_loss(p, y)
    assert error(layer.loss(x, target), wanted) <= 1e-12


@by_consistency
def test_loss_of_one_unbatched_example(consistency):
    head, x = randomize(SummaryHead(12, 5, 3, dtype=torch.float64)), torch.randn(12, dtype=torch.float64)
    target = torch.tensor(2)
    batched = head.loss(x.unsqueeze(0), target.unsqueeze(0), consistency=consistency)
    assert error(head.loss(x, target, consistency=consistency), batched) <= 1e-12


@by_consistency
def test_loss_without_kept_rows_is_nan_as_in_pytorch(consistency):
    head, x = SummaryHead(12, 5, 3), torch.randn(4, 12)
    ignored = torch.full((4,), -100)
    assert head.loss(x, ignored, consistency=consistency).isnan()
    assert head.loss(x, ignored, consistency=consistency, reduction="sum") == 0
    assert head.loss(x[:0], ignored[:0], consistency=consistency).isnan()


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"consistency": "codes"}, "consistency"),
        ({"reduction": "max"}, "reduction"),
        ({"weights": (1, 1)}, "weights"),
        ({"weights": (1, 1, float("inf"))}, "weights"),
        ({"weights": 1.0}, "weights"),
    ],
)
def test_wrong_loss_options_are_named(options, argument):
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: got "):
        SummaryLoss(**options)
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: got "):
        SummaryHead(4, 3, 2).loss(torch.randn(5, 4), torch.zeros(5, dtype=torch.long), **options)


def test_latent_consistency_needs_the_latents():
    logits = torch.randn(2, 5, 3).unbind()
    with pytest.raises(ValueError, match=r"^latents: got None"):
        SummaryLoss(consistency="latent")(logits, torch.zeros(5, dtype=torch.long))


def test_wrong_input_width_is_named():
    for layer in (SummaryLinear(4, 3), SummaryLayer(4, 3), SummaryClassifier(4, 3), SummaryHead(4, 3, 2)):
        with pytest.raises(ValueError, match=r"^x: got shape \(2, 5\), want \(\.\.\., 4\)"):
            layer(torch.randn(2, 5))


@pytest.mark.parametrize("consistency", ["logits", "latent"])
def test_head_loss_is_fp32_for_16_bit_inputs(consistency):
    head = SummaryHead(12, 5, 3, dtype=torch.bfloat16)
    x, target = torch.randn(6, 12, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 2, 1, 0])
    assert head.loss(x, target, consistency=consistency).dtype == torch.float32


@pytest.mark.parametrize("cls", [lambda **kw: SummaryClassifier(12, 4, **kw), lambda **kw: SummaryHead(12, 5, 4, **kw)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heads_fold_to_plain_layers(cls, dtype):
    head, x = randomize(cls(dtype=dtype), 0.3).eval(), torch.randn(7, 12, dtype=dtype)
    head.b.requires_grad_(False)
    state = torch.get_rng_state()
    plain = head.fold()
    assert torch.equal(torch.get_rng_state(), state)
    assert {type(m) for m in plain.modules()} <= {nn.Sequential, nn.Linear} and not plain.training
    torch.testing.assert_close(plain(x), head(x))
    assert not next(plain.parameters()).requires_grad
    memories = {p.data_ptr() for p in head.parameters()}
    assert not memories & {p.data_ptr() for p in plain.parameters()}
    assert head.train().fold().training
    nn.Sequential(cls(device="meta")).append(cls(device="meta").fold())


@pytest.mark.parametrize(("d", "m", "bias", "dtype"), [
    (8, 3, True, torch.float32), (3, 8, False, torch.float32), (8, 3, True, torch.float64), (8, 3, False, torch.bfloat16),
])  # fmt: skip
def test_a_head_of_a_linear_layer_has_its_outputs(d, m, bias, dtype):
    linear = nn.Linear(d, m, bias, dtype=dtype).eval().requires_grad_(False)
    head, x = SummaryHead.from_linear(linear), torch.randn(16, d, dtype=dtype)
    assert not head.training and not any(p.requires_grad for p in head.parameters())
    assert head.out_features == min(d, m) and {p.dtype for p in head.parameters()} == {dtype}
    want, eps = linear.double()(x.double()), torch.finfo(dtype).eps
    for found in (head(x), *head.train()(x)):
        assert (found - want).abs().max() <= 16 * eps * want.abs().max()
    trained = SummaryHead.from_linear(nn.Linear(d, m, bias, dtype=dtype))
    assert trained.training and all(p.requires_grad for p in trained.parameters())


def test_what_makes_no_head_is_named():
    empty, not_finite = nn.Linear(2, 3), nn.Linear(2, 3)
    empty.weight = nn.Parameter(torch.empty(3, 0))
    nn.init.constant_(not_finite.weight, math.nan)
    for given, kind, text in (
        (nn.Bilinear(2, 2, 2), TypeError, "linear: got Bilinear, want nn.Linear"),
        (nn.LazyLinear(3), TypeError, "linear: got an uninitialized weight"),
        (empty, ValueError, r"linear: got a weight of shape \(3, 0\)"),
        (not_finite, ValueError, r"linear: got a weight of shape \(3, 2\), want one that is finite"),
    ):
        with pytest.raises(kind, match=text):
            SummaryHead.from_linear(given)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_a_pair_says_what_to_do():
    head = SummaryHead(12, 5, 3)
    with torch.no_grad():
        pair = head(torch.randn(2, 12))
    with pytest.raises(
        AttributeError, match=r"SummaryPair has no attribute 'argmax'.*`projection`.* call model\.eval\(\)"
    ):
        pair.argmax(1)
    assert not hasattr(pair, "shape") and copy.deepcopy(pair).summary.shape == (2, 3)
    assert pickle.loads(pickle.dumps(pair)).projection.shape == (2, 3)
    call = torch.compile(lambda x: head(x).projection.argmax(1), backend="eager", fullgraph=True)
    assert torch.equal(call(torch.ones(2, 12)), head(torch.ones(2, 12)).projection.argmax(1))
