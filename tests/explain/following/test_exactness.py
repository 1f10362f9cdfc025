"""Kinds of models whose map could be wrong in silence: each has the map of finite differences, or is refused by name."""

import copy

import pytest
import torch
from fuzzed_models import differences
from torch import nn
from torch.nn import functional as F

from interp_nn.explain import (
    InstanceLinearization,
    UnsupportedOperation,
    frozen,
    linearize,
    record,
    region,
    supported_ops,
)
from interp_nn.explain.following import secants
from interp_nn.explain.following.calls import Call, UnsupportedCallError, reads
from interp_nn.explain.following.dependence import overlap

DTYPE = torch.float64
aten = torch.ops.aten


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


def inputs(n=3):
    return torch.randn(n, 6, dtype=DTYPE)


def assert_right(function, exact=True):
    """The map is that of finite differences where it is exact, and always the model at x."""
    model, x = function if isinstance(function, nn.Module) else Of(function), inputs()
    with torch.no_grad():
        wanted = model(x.clone()).reshape(3, -1)
    affine = linearize(model, x)
    weight = affine.weight.reshape(3, -1, 6)
    torch.testing.assert_close(
        torch.einsum("nkd,nd->nk", weight, x) + affine.bias.reshape(3, -1), wanted, rtol=1e-10, atol=1e-10
    )
    assert affine.check() <= 1e-10 and supported_ops(model, x).exact == exact
    if exact:
        torch.testing.assert_close(weight, differences(model, x, 1e-6), rtol=1e-6, atol=1e-6)


def assert_same_in_any_order(function):
    """The map does not depend on the order in which its parts are read."""
    model, x = Of(function), inputs()
    want = linearize(model, x)
    for first in (
        lambda affine: affine.bias,
        lambda affine: affine.check(),
        lambda affine: affine.matvec(x),
        lambda affine: affine.rmatvec(torch.ones_like(want.bias)),
        lambda affine: affine.bias_by_layer(),
    ):
        affine = linearize(model, x)
        first(affine)
        torch.testing.assert_close(affine.weight, want.weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(affine.bias, want.bias, rtol=1e-12, atol=1e-12)


def assert_refused(function, match, mode="secant"):
    model = function if isinstance(function, nn.Module) else Of(function)
    with pytest.raises(UnsupportedOperation, match=match):
        linearize(model, inputs(), mode=mode)


VECTOR = torch.linspace(-1, 1, 6, dtype=DTYPE)
MATRIX = torch.linspace(-1, 1, 36, dtype=DTYPE).view(6, 6).sin()
ALIASES = {
    "max": lambda x: torch.max(x, axis=1)[0],
    "max, keepdims": lambda x: torch.max(x.view(-1, 2, 3), axis=1, keepdims=True)[0].flatten(1),
    "max of x1 and x2": lambda x: torch.maximum(x1=x, x2=x.flip(1)),
    "max of a": lambda x: torch.max(a=x, axis=1).values,
    "max of other": lambda x: torch.max(input=x, other=x.flip(1)),
    "min": lambda x: x.view(-1, 2, 3).min(axis=1).values,
    "minimum of x": lambda x: torch.minimum(x=x, x2=VECTOR),
    "amax": lambda x: x.view(-1, 2, 3).amax(axis=1, keepdims=True).flatten(1),
    "amin": lambda x: torch.amin(a=x.view(-1, 2, 3), axis=(1, 2), keepdims=True).flatten(1),
    "sort": lambda x: torch.sort(x.view(-1, 2, 3), axis=1, descending=True)[0].flatten(1),
    "topk": lambda x: torch.topk(x.view(-1, 2, 3), axis=1, k=1)[0].flatten(1),
    "kthvalue": lambda x: x.view(-1, 2, 3).kthvalue(2, axis=1, keepdims=True)[0].flatten(1),
    "median": lambda x: torch.median(x.view(-1, 3, 2), axis=1)[0],
    "argmax": lambda x: x * F.one_hot(torch.argmax(x, axis=1), 6),
    "argsort": lambda x: x.gather(1, torch.argsort(a=x, axis=1)),
    "comparison": lambda x: x * torch.gt(x1=x, x2=0.3),
    "sum": lambda x: torch.sum(x.view(-1, 2, 3), axis=1, keepdims=True).flatten(1),
    "cat": lambda x: torch.cat([x, x], axis=1),
    "glu": lambda x: torch.cumsum(x, axis=1),
    "softmax": lambda x: torch.squeeze(x.unsqueeze(1), axis=1),
    "mul": lambda x: torch.mul(x1=VECTOR, x2=x),
    "div": lambda x: torch.div(a=x, x2=VECTOR + 3),
    "add": lambda x: torch.add(a=x, x2=x, alpha=2),
    "relu": lambda x: torch.relu(a=x),
    "relu_": lambda x: torch.relu_(input=x * 1),
    "aten": lambda x: aten.relu(self=x),
    "mv": lambda x: torch.stack([torch.mv(MATRIX, vec=row) for row in x]),
    "baddbmm": lambda x: torch.baddbmm(
        x.view(-1, 2, 3), batch2=MATRIX[:3, :3].expand(len(x), 3, 3), batch1=x.view(-1, 2, 3)
    ).flatten(1),
    "mm": lambda x: torch.mm(mat2=MATRIX, input=x),
    "einsum of aten": lambda x: aten.einsum(equation="ni,ij->nj", tensors=[x, MATRIX]),
    "adaptive_max_pool1d of torch": lambda x: torch.adaptive_max_pool1d(x.unsqueeze(1), output_size=3)[0].flatten(1),
    "max_pool1d with indices by position": lambda x: F.max_pool1d(x.unsqueeze(1), 2, 2, 0, 1, False, True)[0].flatten(
        1
    ),
    "batch_norm of torch": lambda x: torch.batch_norm(
        x,
        VECTOR,
        None,
        running_mean=VECTOR,
        running_var=VECTOR + 2,
        training=False,
        momentum=0.1,
        eps=0.1,
        cudnn_enabled=False,
    ),
}


@pytest.mark.parametrize("name", ALIASES)
def test_s3_aliases_of_argument_names(name):
    assert_right(ALIASES[name])


def test_s3_the_same_in_gates_regions_and_replays():
    x = inputs(1)
    for one, other in (
        (lambda x: torch.max(x.view(-1, 2, 3), axis=1)[0], lambda x: x.view(-1, 2, 3).max(1)[0]),
        (lambda x: torch.amin(x.view(-1, 2, 3), axis=2), lambda x: x.view(-1, 2, 3).amin(2)),
    ):
        assert record(Of(one), x).patterns() == record(Of(other), x).patterns()
        assert torch.equal(region(Of(one), x).normals, region(Of(other), x).normals)
        assert torch.equal(frozen(Of(one), x)(2 * x), frozen(Of(other), x)(2 * x))


COMPLEX = {
    "imag": lambda x: x + (x * 1j).imag,
    "complex": lambda x: torch.complex(x, x.flip(1)).imag + x,
    "view_as_complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(-1, 3, 2)) * (2 - 1j)).flatten(1),
    "conj": lambda x: ((x + 2j * x.flip(1)).conj() * 1j).real,
    "cast": lambda x: x + (x.to(torch.complex128) * (1 + 1j)).real,
    "adjoint": lambda x: (torch.complex(x, 2 * x).adjoint() * 1j).real.t(),
    "matmul": lambda x: (x.to(torch.complex128) @ (MATRIX * 1j)).imag + x.relu(),
    "in place": lambda x: (x.to(torch.complex128) * 1).mul_(1j).add_(x).imag,
    "cat": lambda x: torch.cat([x * 1j, x + 0j], 1).imag,
    "where": lambda x: torch.where(x > 0, x * 1j, x * 2j).imag,
}


@pytest.mark.parametrize("name", COMPLEX)
def test_s4_complex_values(name):
    assert_right(COMPLEX[name])


@pytest.mark.parametrize(
    ("name", "function"),
    [("__deepcopy__", lambda h: copy.deepcopy(h.detach())), ("resize", lambda h: h.resize_(len(h), 6))],
)
def test_calls_that_fail_with_gradients_alone_are_refused_by_name(name, function):
    assert_refused(lambda x: function(x @ MATRIX) + x, f"^{name} in layer '': ")
    with pytest.raises(RuntimeError, match=r"shape '\[5\]' is invalid"):  # the model's own
        linearize(Of(lambda x: x.view(5)), inputs())


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("abs", lambda x: x + (x * 1j).abs()),
        ("sgn", lambda x: x + torch.sgn(x + 1j * x.flip(1)).real),
        ("angle", lambda x: x + torch.angle(x + 1j * x.flip(1))),
        ("polar", lambda x: x + torch.polar(x.abs(), x).real),
        ("tanh", lambda x: (x * 1j).tanh().imag),
        ("eq", lambda x: x * (x * 1j == 0)),
        ("view", lambda x: x + x.view(torch.int64).view(DTYPE)),
        ("view", lambda x: x.view(torch.complex128).view(DTYPE)),
        ("view", lambda x: x.view(torch.float32).double()),
        ("fft_fft", lambda x: torch.fft.fft(x).real),
    ],
)
def test_s4_complex_values_that_are_refused(name, function):
    assert_refused(function, f"^{name} in layer ''")


def written(function):
    """A model that applies a function of a hidden tensor, and returns what it returns."""
    return lambda x: function(x @ MATRIX, x)


def view_of_base(h, x):
    v = h[:]
    h.mul_(3)
    return v


def pooled_then_overwritten(h, x):
    v = h.sort(1)[0]
    h.zero_().add_(x)
    return v + h


def through_detach(h, x):
    v = h.detach()
    v.abs_()
    return h + x


def through_detached_constant(h, x):
    out = torch.zeros_like(h)
    out.detach()[:, :3].copy_(h[:, :3])
    return out + x


def through_an_earlier_view(h, x):
    out = torch.zeros_like(h)
    view = out[:, 3:]
    out[:, 3:] = h[:, :3]
    return view.relu()


def of_no_grad(h, x):
    with torch.no_grad():
        out = torch.zeros_like(h)
        view = out[:, 1:]
    view.copy_(h[:, 1:])
    return out


def parts_in_place(h, x):
    a, b = h.chunk(2, 1)
    a.relu_()
    first = b.unbind(1)[0]
    first.mul_(2)
    return h


def by_schema(h, x):
    aten.relu_.default(h)
    return h


def transposed(h, x):
    h.t_()
    h.mul_(2)
    return h.t() + x


def disjoint(h, x):
    a, b = h[:, ::2], h[:, 1::2]
    a.exp_()
    return b * 2


LIVE = [
    view_of_base,
    pooled_then_overwritten,
    through_detach,
    through_detached_constant,
    through_an_earlier_view,
    of_no_grad,
    parts_in_place,
    by_schema,
    transposed,
]


@pytest.mark.parametrize("function", LIVE, ids=lambda f: f.__name__)
def test_s5_live_views_of_memory_that_is_overwritten(function):
    assert_right(written(function))
    assert_same_in_any_order(written(function))


def test_s5_views_of_other_elements_do_not_count():
    assert_right(written(disjoint), exact=False)
    t = torch.zeros(4, 6)
    for a, b, much in (
        (t[:, ::2], t[:, 1::2], "none"),
        (t[:, ::2], t[:, ::3], "some"),
        (t[:, ::2], t[:, ::4], "all"),
        (t[:2], t[2:], "none"),
        (t.t(), t[1], "all"),
        (t[:, :3], t, "some"),
        (t[:0], t, "none"),
        (t, t.view(torch.int16)[:, 3:], "all"),
        (t[:, :2], t.view(torch.int16)[:, 3:], "some"),
    ):
        assert overlap(a, b) == much


def powered(h, x):
    v = h[:]
    h.pow_(-1)
    return v


def half_powered(h, x):
    a, b = h[:, :2], h[:, 2:]
    a.exp_()
    b.copy_(x[:, 2:])
    return h + x


def mask_of_mixed_memory(h, x):
    a, b = h[:, :2], h[:, 2:]
    a.exp_()
    b.copy_(x[:, 2:])
    return x.masked_fill(h > 0.5, 0.25)


def product_with_mixed_memory(h, x):
    h[:, :2].exp_()
    return x * h


def entries_of_an_exponential(h, x):
    h[:, 0] = x[:, 0].exp()
    return x * h


def sign_through_a_view(h, x):
    v = h.view(-1, 2, 3)
    v[:, 0].sign_()
    return h + x


def test_s5_a_write_that_is_not_affine_freezes_the_whole():
    assert_right(written(entries_of_an_exponential), exact=False)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("pow", powered),
        ("add", half_powered),
        ("add", sign_through_a_view),
        ("gt", mask_of_mixed_memory),
        ("mul", product_with_mixed_memory),
    ],
)
def test_s5_writes_that_are_not_affine_are_seen_through_views(name, function):
    assert_refused(written(function), f"^{name} in layer ''")


def test_s5_the_gates_of_a_maximum_are_those_before_a_write():
    def pooled(x):
        h = x @ MATRIX
        v = F.max_pool1d(h.unsqueeze(1), 3).flatten(1)
        h.neg_().clamp_(min=-0.1)
        return v

    x = inputs(1)
    want = region(Of(lambda x: F.max_pool1d((x @ MATRIX).unsqueeze(1), 3).flatten(1)), x)
    got = region(Of(pooled), x)
    assert torch.equal(got.normals[: len(want.normals)], want.normals)
    assert torch.equal(got.offsets[: len(want.offsets)], want.offsets)


def swish(x):
    return x * torch.sigmoid(x)


def overwrite(x):
    x.mul_(x)
    return 1


def noise(x):
    return torch.rand_like(x)


def positive(x) -> bool:
    return bool(x.sum() > 0)


def gradient(x):
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        return x + torch.autograd.grad((z**3).sum(), z)[0]


def scripted_in_place(x):
    h = x * 1
    torch.jit.script(overwrite)(h)
    return h


UNSEEN = {
    "script": (
        lambda x: x + torch.jit.script(swish)(x),
        "add in layer '': an argument was computed by calls that cannot",
    ),
    "script without gradients": (
        torch.no_grad()(lambda x: x + torch.jit.script(swish)(x)),
        "add in layer '': an argument was computed by calls that cannot",
    ),
    "the script alone": (
        lambda x: torch.jit.script(swish)(x),
        "forward in layer '': an argument was computed by calls",
    ),
    "script in place": (scripted_in_place, "an argument was computed by calls that cannot be recorded"),
    "script that returns a number": (
        lambda x: x * (2 if torch.jit.script(positive)(x) else 3),
        "_local_scalar_dense.default was called where calls cannot be recorded",
    ),
    "torch.func": (
        lambda x: x + torch.vmap(torch.relu)(x),
        "relu in layer '': it runs inside a transform of torch.func",
    ),
    "a derivative": (gradient, "grad in layer '': it differentiates inside the model"),
    "dlpack": (lambda x: x + torch.from_dlpack(x.detach()), "__dlpack__ in layer '': it copies values"),
    "memory": (lambda x: x * (x.data_ptr() > 0), "data_ptr in layer '': it copies values"),
    "a dropout of constants": (
        lambda x: x * torch.native_dropout(torch.ones(6, dtype=DTYPE), 0.5, True)[0],
        "aten.native_dropout.default draws random numbers",
    ),
    "noise in TorchScript": (
        lambda x: x + torch.jit.script(noise)(VECTOR),
        "aten.rand_like.default draws random numbers|rand_like in layer ''",
    ),
    "fill value": (lambda x: x + torch.full_like(x, x[0, 0]), "full_like|a scale or another number of a call"),
    "scale": (lambda x: torch.add(x, x, alpha=x[0, 0]), "add in layer ''|a scale or another number of a call"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", UNSEEN)
def test_s6_calls_that_are_not_seen(name):
    function, text = UNSEEN[name]
    model, x = Of(function), inputs()
    for explain in (record, frozen, linearize):
        with pytest.raises(UnsupportedOperation, match=text):
            explain(model, x)
    assert not supported_ops(model, x).supported


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_s6_gates_of_a_scripted_activation_are_not_lost():
    model = nn.Sequential(nn.Linear(6, 4), Of(torch.jit.script(F.relu6)), nn.Linear(4, 2)).to(DTYPE)
    with pytest.raises(
        UnsupportedOperation, match="linear in layer '2': an argument was computed by calls that cannot"
    ):
        record(model, inputs())
    with pytest.raises(UnsupportedOperation, match=r"item in layer ''.* no derivative sees it"):
        linearize(Of(lambda x: x * x[0, 0].item()), inputs(), mode="tangent")


def requires_grad_set(x):
    h = x * 2
    h.requires_grad = False
    return h.relu()


def hooked(x):
    h = x * 2
    if h.requires_grad:
        h.register_hook(lambda g: -g)
    return h.abs()


def in_context(context, function=lambda x: F.relu(x @ MATRIX) + x):
    def run(x):
        with context():
            return function(x)

    return run


GRADIENTS_OFF = {
    "inference_mode, as a decorator": torch.inference_mode()(lambda x: F.relu(x @ MATRIX)),
    "inference_mode": in_context(torch.inference_mode),
    "inference_mode and a constant": in_context(torch.inference_mode, lambda x: (x * torch.ones(6, dtype=DTYPE)).abs()),
    "no_grad": in_context(torch.no_grad),
    "no_grad, as a decorator": torch.no_grad()(lambda x: F.relu(x @ MATRIX)),
    "set_grad_enabled": in_context(lambda: torch.autograd.set_grad_enabled(False)),
    "detach": lambda x: x.detach().relu() + x,
    "detach_": lambda x: (x * 2).detach_().relu(),
    "data": lambda x: x.data.relu() * 2,
    "requires_grad_": lambda x: (x * 2).requires_grad_(False).relu(),
    "requires_grad": requires_grad_set,
    "register_hook": hooked,
}


@pytest.mark.parametrize("name", GRADIENTS_OFF)
def test_s7_gradients_switched_off_inside_the_model(name):
    function = GRADIENTS_OFF[name]
    assert_right(function)
    x = inputs()
    tangent = linearize(Of(function), x, mode="tangent")
    torch.testing.assert_close(tangent.weight, differences(Of(function), x, 1e-6), rtol=1e-6, atol=1e-6)
    assert tangent.check() <= 1e-12


def test_s7_a_forward_in_inference_mode():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).to(DTYPE)

        @torch.inference_mode()
        def forward(self, x):
            return self.layers(x)

    model, x = Network(), inputs()
    assert torch.equal(linearize(model, x).weight, linearize(model.layers, x).weight)
    attributions = InstanceLinearization(model).attribute(x, target=1)
    assert torch.equal(attributions, InstanceLinearization(model.layers).attribute(x, target=1)) and attributions.any()


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"]
)
def test_s7_backward_hooks_do_not_change_the_map(register):
    layer = nn.Linear(6, 4).to(DTYPE)
    model, x = nn.Sequential(layer, nn.ReLU()), inputs()
    want = linearize(model, x).weight
    calls = []

    def hook(module, *grads):
        calls.append(module)
        return tuple(None if g is None else -g for g in grads[0])

    getattr(layer, register)(hook)
    hooks = len(layer._backward_hooks) + len(layer._backward_pre_hooks)
    for mode in ("secant", "tangent"):
        affine = linearize(model, x, mode=mode)
        assert torch.equal(affine.weight, want) and affine.check() <= 1e-12
    assert supported_ops(model, x).exact and not calls
    assert len(layer._backward_hooks) + len(layer._backward_pre_hooks) == hooks == 1


SIXTEEN = {
    "rms_norm": (nn.RMSNorm(64), 0.1),
    "rms_norm of small values": (nn.RMSNorm(64), 1e-3),
    "rms_norm, eps": (nn.RMSNorm(64, eps=1e-6), 1e-3),
    "layer_norm": (nn.LayerNorm(64), 3e-3),
    "layer_norm, eps": (nn.LayerNorm(64, eps=1e-12), 1e-4),
    "layer_norm of large values": (nn.LayerNorm(64), 500.0),
    "group_norm": (nn.GroupNorm(4, 64), 3e-3),
    "instance_norm": (Of(lambda x: F.instance_norm(x.view(-1, 4, 16)).flatten(1)), 3e-3),
    "gelu": (nn.GELU("tanh"), 50.0),
    "softplus": (nn.Softplus(3.0, 2.0), 1.0),
    "mish": (nn.Mish(), 4.0),
    "elu": (nn.ELU(), 4.0),
    "silu": (nn.SiLU(), 4.0),
    "sigmoid": (nn.Sigmoid(), 4.0),
    "tanhshrink": (nn.Tanhshrink(), 0.5),
    "attention": (
        Of(lambda x: F.scaled_dot_product_attention(*[x.view(-1, 1, 4, 16)] * 3).flatten(1)),
        30.0,  # the scores are beyond the largest number of fp16
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SIXTEEN)
def test_s8_constants_of_16_bits(name, dtype):
    model, size = SIXTEEN[name]
    x = (size * torch.randn(2, 64)).to(dtype)
    with torch.no_grad():
        wanted = model.to(dtype)(x).float()
    affine = linearize(model, x)
    got = torch.einsum("nkd,nd->nk", affine.weight.float(), x.float()) + affine.bias.float()
    assert bool(affine.weight.isfinite().all())
    assert float((got - wanted).abs().max() / wanted.abs().max()) <= 12 * torch.finfo(dtype).eps
    model.float()


def test_s8_the_eps_of_rms_norm_is_that_of_pytorch():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        eps, t = secants.default_rms_eps(dtype, torch.device("cpu")), torch.full((4,), 2.0**-12, dtype=dtype)
        torch.testing.assert_close(F.rms_norm(t, (4,)), F.rms_norm(t, (4,), eps=eps))


ARGUMENTS = {
    "elu": lambda x: aten.elu(x, 1.0, 2.0, 0.5),
    "elu.default": lambda x: aten.elu.default(x, 0.7, 1.3),
    "elu of torch._C": lambda x: torch._C._nn.elu(x, scale=2.0, input_scale=3.0),
    "elu by name": lambda x: F.elu(alpha=0.3, input=x),
    "elu_": lambda x: F.elu_(x * 1, 0.3),
    "celu": lambda x: aten.celu(x, 0.3),
    "selu": lambda x: aten.selu(x),
    "softplus": lambda x: aten.softplus(x, 2.0, 0.5),
    "softplus by name": lambda x: F.softplus(x, threshold=0.5, beta=2.0),
    "gelu": lambda x: aten.gelu(x, approximate="tanh"),
    "glu": lambda x: aten.glu(x.view(-1, 2, 3), 1).flatten(1),
    "layer_norm": lambda x: torch.layer_norm(x, [6], VECTOR, None, 0.3, False),
    "group_norm": lambda x: torch.group_norm(x, 2, VECTOR, VECTOR, 0.3, False),
    "instance_norm": lambda x: torch.instance_norm(
        x.view(-1, 2, 3), VECTOR[:2], VECTOR[2:4], None, None, True, 0.1, 0.3, False
    ).flatten(1),
    "rms_norm": lambda x: aten.rms_norm(x, [6], VECTOR, 0.3),
    "attention": lambda x: aten.scaled_dot_product_attention(
        *[x.view(-1, 1, 3, 2)] * 3, None, 0.0, True, scale=0.3
    ).flatten(1),
    "attention with a mask of the input": lambda x: F.scaled_dot_product_attention(
        torch.ones(len(x), 3, 2, dtype=DTYPE),
        torch.ones(len(x), 3, 2, dtype=DTYPE),
        x.view(-1, 3, 2),
        attn_mask=x.view(-1, 3, 2)[:, :, :1].expand(-1, 3, 3),
    ).flatten(1),
}
PIECEWISE = {
    "leaky_relu": lambda x: aten.leaky_relu(x, 0.3),
    "leaky_relu.default": lambda x: aten.leaky_relu.default(x),
    "leaky_relu_": lambda x: torch._C._nn.leaky_relu_(x * 1, 0.3),
    "threshold": lambda x: aten.threshold(x, 0.2, -0.7),
    "hardtanh": lambda x: aten.hardtanh(x, -0.3),
    "hardtanh by name": lambda x: F.hardtanh(x, max_val=0.4),
    "hardshrink": lambda x: aten.hardshrink(x, 0.7),
    "softshrink": lambda x: aten.softshrink(x, 0.7),
    "prelu": lambda x: aten.prelu(x, VECTOR[:1]),
    "rrelu": lambda x: aten.rrelu(x, 0.2, 0.4, False),
    "clamp": lambda x: aten.clamp(x, None, 0.3),
    "clamp of tensors": lambda x: aten.clamp.Tensor(x, max=VECTOR),
    "clamp_min": lambda x: aten.clamp_min(x, 0.3),
    "dropout": lambda x: aten.dropout(x, 0.3, False),
    "alpha_dropout": lambda x: F.alpha_dropout(x),
    "sort": lambda x: aten.sort.stable(x, stable=True, dim=1, descending=True)[0],
    "max": lambda x: aten.max.dim(x.view(-1, 2, 3), 1)[0],
    "max_pool2d_with_indices": lambda x: aten.max_pool2d_with_indices(x.view(-1, 1, 2, 3), [1, 2], [1, 1])[0].flatten(
        1
    ),
    "clamp of a bound that is overwritten": lambda x: (lambda low: (x.clamp(min=low), low.add_(1))[0])(torch.zeros(6)),
}


@pytest.mark.parametrize("name", [*ARGUMENTS, *PIECEWISE])
def test_s9_arguments_of_operators(name):
    assert_right({**ARGUMENTS, **PIECEWISE}[name], exact=name in PIECEWISE)


def test_s9_exported_programs():
    model = nn.Sequential(nn.Linear(6, 6), nn.SELU(), nn.ELU(0.5), nn.LeakyReLU(0.3), nn.LayerNorm(6), nn.Linear(6, 3))
    model, x = model.to(DTYPE).eval(), inputs()
    exported = torch.export.export(model, (x,)).module()
    got, want = linearize(exported, x), linearize(model, x)
    torch.testing.assert_close(got.weight, want.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.bias, want.bias, rtol=1e-12, atol=1e-12)


def test_s9_an_argument_that_is_not_known_is_refused_by_name():
    x = inputs()
    rule = reads("alpha", lambda call: call)
    for args, kwargs in (((x, 1.0), {}), ((x, 2.0, 1), {}), ((x,), {"input_scale": 1.0})):
        call = Call(aten.elu, "elu", args, kwargs)
        assert rule(call) is call  # the others have their defaults
    with pytest.raises(UnsupportedCallError, match=r"its argument input_scale = 0\.5 is not known"):
        rule(Call(aten.elu, "elu", (x, 1.0, 1.0, 0.5), {}))
    with pytest.raises(UnsupportedCallError, match="its 5 arguments are those of no known signature"):
        rule(Call(aten.elu, "elu", (x, 1.0, 1.0, 0.5, 3), {}))
    assert_refused(lambda x: torch.rrelu(x, 0.1, 0.3, True), "rrelu in layer '': it draws random numbers")


def test_s18_the_check_reads_the_weight_and_bias_that_are_held():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).to(DTYPE), inputs()
    for name in ("weight", "bias"):
        affine = linearize(model, x)
        getattr(affine, name)[1, 2] += 1e-3
        assert affine.check() > 1e-6
    affine = linearize(model, x)
    assert affine.check() <= 1e-13 and "weight" not in vars(affine)


def test_s18_the_check_finds_a_wrong_map_that_is_right_at_x(monkeypatch):
    """A value that is taken for piecewise constant gives a constant that is right at x alone."""
    from interp_nn.explain.following import calls, operations

    x = inputs()
    monkeypatch.setitem(operations.TABLE, "tanh", lambda call: calls.piecewise_constant(call, treatment="gate"))
    affine = linearize(Of(lambda x: x + x.tanh()), x)
    assert supported_ops(Of(lambda x: x + x.tanh()), x).exact and affine.check() > 1e-5
