import copy
import pickle

import pytest
import torch
from relative_error import error, naive_kernel, naive_linear, randomize
from torch import nn
from torch.nn import functional as F

from interp_nn.nn import SummaryConv2d, SummaryLinear

KINDS = ["linear", "wide", "conv", "grouped"]
by_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, dtype=torch.float32, bias=True):
    """A layer whose weight is far from orthonormal, an input, and the plain function of (input, weight, bias)."""
    if kind in ("linear", "wide"):
        layer = SummaryLinear(*((12, 5) if kind == "linear" else (5, 12)), bias=bias, dtype=dtype)
        return randomize(layer), torch.randn(7, layer.in_features, dtype=dtype), F.linear
    groups = 2 if kind == "grouped" else 1
    layer = SummaryConv2d(4, 6, 3, padding=1, stride=2, groups=groups, bias=bias, dtype=dtype)
    plain = lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, groups)  # noqa: E731
    return randomize(layer), torch.randn(2, 4, 6, 6, dtype=dtype), plain


def truth(layer, x, plain):
    """The output in fp64."""
    bias = None if layer.bias is None else layer.bias.double()
    return plain(x.double(), naive_kernel(layer.weight.double(), layer.groups), bias)


def is_current(layer, x, plain):
    """Return True if the output equals, bit for bit, that of the plain layer with the current effective weight."""
    with torch.no_grad():
        return torch.equal(layer(x), plain(x, layer.effective_weight().contiguous(), layer.bias))


def is_frozen(layer, x):
    layer.zero_grad()
    layer(x).sum().backward()
    return layer.weight.grad is None


# Frozen forwards


@by_kind
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_forward_is_the_plain_layer_to_the_bit(kind, bias):
    layer, x, plain = make(kind, bias=bias)
    before = layer(x)
    assert layer.freeze() is layer
    assert is_current(layer, x, plain)
    assert error(layer(x), before) <= 1e-6
    assert "frozen" in repr(layer)


@by_kind
def test_frozen_weight_gets_no_gradient_and_the_rest_does(kind):
    layer, x, plain = make(kind, torch.float64)
    layer.freeze()
    x.requires_grad_()
    y = layer(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert layer.weight.grad is None and layer.weight.requires_grad
    kernel = naive_kernel(layer.weight, layer.groups).detach()
    wanted = torch.autograd.grad(plain(x, kernel, layer.bias), (x, layer.bias), upstream)
    assert error(x.grad, wanted[0]) <= 1e-12 and error(layer.bias.grad, wanted[1]) <= 1e-12


def _optimizer_step(layer):
    layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.Adam(layer.parameters(), lr=0.1).step()


@torch.no_grad()
def _write(layer):
    layer.weight.mul_(1.5)


@torch.no_grad()
def _write_part(layer):
    layer.weight[0].zero_()


def _replace(layer):
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def _replace_often(layer):
    for _ in range(3):  # the allocator may give the third weight the memory that the first had
        _replace(layer)


def _initialize(layer):
    nn.init.normal_(layer.weight)


def _orthogonalize(layer):
    layer.orthogonalize_()


def _swap(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn_like(layer.weight)))


CHANGES = [_optimizer_step, _write, _write_part, _replace, _replace_often, _initialize, _orthogonalize, _swap]


@by_kind
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.strip("_"))
@pytest.mark.parametrize("inference", [False, True])
def test_frozen_layer_notices_a_changed_weight(kind, change, inference):
    layer, x, plain = make(kind)
    layer.freeze()
    before = layer(x)
    change(layer)
    with torch.inference_mode(inference):
        assert is_current(layer, x, plain)
    assert error(layer(x), before) > 1e-2
    assert is_frozen(layer, x.requires_grad_())


@by_kind
def test_a_frozen_layer_with_another_weight_in_a_transform(kind):
    """Every transform of a frozen layer's weight sees that weight, whose gradient is none, and leaves nothing behind."""
    layer, x, plain = make(kind, torch.float64)
    layer.freeze()
    kept = layer.frozen_weight()
    weights = torch.randn(3, *layer.weight.shape, dtype=torch.float64)

    def value(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    wanted = torch.stack([plain(x, naive_kernel(w, layer.groups), layer.bias) for w in weights])
    assert error(torch.vmap(value)(weights), wanted) <= 1e-12
    y, tangent = torch.func.jvp(value, (weights[0],), (weights[1],))
    assert error(y, wanted[0]) <= 1e-12 and not tangent.any()
    assert not torch.func.grad(lambda w: value(w).sum())(weights[0]).any()
    assert error(torch.vmap(layer)(torch.stack((x, x)))[1], layer(x)) <= 1e-12
    assert layer.frozen_weight() is kept


def test_no_later_weight_passes_for_the_frozen_one_by_its_address():
    for _ in range(100):  # the allocator decides whether an address comes back: it does in some of these rounds
        layer, x = SummaryLinear(64, 64), torch.randn(2, 64)
        _replace(layer)
        address = layer.weight.data_ptr()
        layer.freeze()
        _replace(layer)
        later = []
        while len(later) < 20 and (not later or later[-1].data_ptr() != address):
            later.append(nn.Parameter(torch.randn_like(layer.weight)))
        layer.weight = later[-1]
        assert is_current(layer, x, F.linear)


@by_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_frozen_layer_follows_a_dtype_change(kind, dtype):
    layer, x, plain = make(kind)
    layer.freeze().to(dtype)
    assert layer(x.to(dtype)).dtype == dtype
    assert is_current(layer, x.to(dtype), plain)
    assert is_frozen(layer, x.to(dtype).requires_grad_())
    layer.float()  # in bf16 the weight was rounded: the kept one must be too
    assert is_current(layer, x, plain)


@by_kind
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_frozen_copy_and_its_original_go_separate_ways(kind, duplicate):
    layer, x, plain = make(kind)
    layer.freeze()
    before = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), before)
    _write(other)
    assert is_current(other, x, plain) and not torch.equal(other(x), before)
    assert is_current(layer, x, plain) and torch.equal(layer(x), before)


MODES = {"inference": torch.inference_mode, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
DROPPERS = {
    "unfreeze": lambda m: m.unfreeze(),
    "train": lambda m: m.train(),
    "train of the parent": lambda m: nn.Sequential(nn.ReLU(), m).train(),
    "load_state_dict": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
    "load_state_dict, assign": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "load_state_dict of the parent": lambda m: (p := nn.Sequential(nn.ReLU(), m)).load_state_dict(p.state_dict()),
}


@by_kind
@pytest.mark.parametrize("drop", DROPPERS.values(), ids=DROPPERS)
def test_freezing_ends(kind, drop):
    layer, x, _ = make(kind)
    x.requires_grad_()
    layer.freeze()
    assert is_frozen(layer, x)
    drop(layer)
    assert layer.frozen_weight() is None
    assert not is_frozen(layer, x)
    assert "frozen" not in repr(layer)


@by_kind
def test_loaded_weights_are_used_by_a_frozen_model(kind):
    layer, x, plain = make(kind)
    other = make(kind)[0]
    model = nn.Sequential(layer.freeze())
    before = model(x)
    model.load_state_dict({f"0.{name}": value for name, value in other.state_dict().items()})
    assert error(model(x), before) > 1e-2 and torch.equal(model(x), other(x))
    assert is_current(layer.freeze(), x, plain)


@by_kind
def test_eval_keeps_a_frozen_weight_and_makes_none(kind):
    layer, x, _ = make(kind)
    x.requires_grad_()
    layer.eval()
    assert layer.frozen_weight() is None and not is_frozen(layer, x)
    layer.freeze().eval()
    assert layer.frozen_weight() is not None and is_frozen(layer, x)


@by_kind
def test_freezing_is_no_state(kind):
    layer = make(kind)[0]
    keys = list(layer.state_dict())
    layer.freeze()
    assert list(layer.state_dict()) == keys == ["weight", "bias"]
    assert len(list(layer.parameters())) == 2 and not list(layer.buffers())


@by_kind
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_weight_frozen_or_refreshed_in_a_mode_serves_outside_it(kind, mode):
    layer, x, plain = make(kind)
    with mode():
        layer.freeze()
        assert error(layer(x), truth(layer, x, plain)) < 2e-2
    assert is_current(layer, x, plain)
    assert is_frozen(layer, x.requires_grad_())
    _write(layer)
    with mode():
        layer(x)
    assert layer.frozen_weight().dtype == torch.float32
    assert is_current(layer, x, plain)
    assert is_frozen(layer, x)


@by_kind
def test_frozen_layer_made_in_inference_mode(kind):
    with torch.inference_mode():
        layer, x, plain = make(kind)
        assert is_current(layer.freeze(), x, plain)


# fold


@by_kind
@pytest.mark.parametrize("bias", [True, False])
def test_fold_is_the_same_function_as_a_plain_layer(kind, bias):
    layer, x, plain = make(kind, bias=bias)
    folded = layer.fold()
    assert type(folded) is (nn.Linear if kind in ("linear", "wide") else nn.Conv2d)
    assert error(folded(x), truth(layer, x, plain)) <= 1e-6
    assert repr(folded) == repr(layer).replace("Summary", "")


@by_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fold_rounds_its_weight_once(kind, dtype):
    layer = make(kind, dtype)[0]
    exact = naive_kernel(layer.weight.detach().double(), layer.groups)
    assert error(layer.fold().weight, exact.to(dtype)) <= 1e-14
    assert torch.equal(layer.fold().bias, layer.bias)


@by_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trainable", [(True, False), (False, True)])
@pytest.mark.parametrize("direction", ["fold", "from"])
def test_conversion_keeps_flags_and_shares_nothing(kind, training, trainable, direction):
    layer = make(kind)[0]
    source = layer if direction == "fold" else layer.fold()
    source.train(training)
    source.weight.requires_grad_(trainable[0]), source.bias.requires_grad_(trainable[1])
    if direction == "fold":
        made = source.fold()
    else:
        made = type(layer).from_linear(source) if isinstance(source, nn.Linear) else type(layer).from_conv2d(source)
    assert made.training is training
    assert (made.weight.requires_grad, made.bias.requires_grad) == trainable
    assert made.weight.is_leaf and made.bias.is_leaf
    weight, bias = source.weight.clone(), source.bias.clone()
    randomize(made)
    assert torch.equal(source.weight, weight) and torch.equal(source.bias, bias)


@by_kind
def test_conversion_draws_no_random_numbers(kind):
    layer = make(kind)[0]
    state = torch.get_rng_state()
    folded = layer.fold()
    _ = type(layer).from_linear(folded) if isinstance(folded, nn.Linear) else type(layer).from_conv2d(folded)
    assert torch.equal(torch.get_rng_state(), state)


# from_linear, from_conv2d

PLAIN = {
    "tall": lambda **o: nn.Linear(20, 8, **o),
    "wide": lambda **o: nn.Linear(8, 20, **o),
    "one output": lambda **o: nn.Linear(9, 1, **o),
    "conv": lambda **o: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular", **o),
    "grouped conv": lambda **o: nn.Conv2d(4, 6, (3, 2), stride=2, dilation=2, padding=(2, 1), groups=2, **o),
    "depthwise conv": lambda **o: nn.Conv2d(4, 4, 3, groups=4, **o),
}
by_plain = pytest.mark.parametrize("build", PLAIN.values(), ids=PLAIN)


def convert(plain, *args, **options):
    if isinstance(plain, nn.Linear):
        return SummaryLinear.from_linear(plain, *args, **options)
    return SummaryConv2d.from_conv2d(plain, *args, **options)


def input_of(plain, dtype):
    shape = (30, plain.in_features) if isinstance(plain, nn.Linear) else (2, 4, 9, 9)
    return torch.randn(shape, dtype=dtype)


@by_plain
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", ["full", "deficient", "zero"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_preserving_the_function(build, bias, rank, dtype, bound):
    plain = build(bias=bias, dtype=dtype)
    if rank != "full":
        with torch.no_grad():  # each group's kernels are multiples of its first, or zero
            groups = getattr(plain, "groups", 1)
            parts = plain.weight.flatten(1).unflatten(0, (groups, -1))
            parts.copy_(parts[:, :1] * torch.randn(parts.shape[1], 1, dtype=dtype) * (rank == "deficient"))
    made, x = convert(plain), input_of(plain, dtype)
    assert type(made) is (SummaryLinear if isinstance(plain, nn.Linear) else SummaryConv2d)
    if rank == "zero" and not bias:
        assert not made(x).any()
    else:
        assert error(made(x), plain(x)) <= bound
        assert error(convert(plain, preserve="function")(x), plain(x)) <= bound


@by_plain
def test_preserving_the_weight(build):
    plain = build()
    made, x = convert(plain, preserve="weight"), input_of(plain, torch.float32)
    assert torch.equal(made.weight, plain.weight) and torch.equal(made.bias, plain.bias)
    with torch.no_grad():
        plain.weight.copy_(naive_kernel(plain.weight, getattr(plain, "groups", 1)))
    assert error(made(x), plain(x)) <= 1e-6


@by_plain
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13), (torch.bfloat16, 2e-2)])
def test_folding_a_converted_layer_returns_it(build, dtype, bound):
    plain = build(dtype=dtype)
    back = convert(plain).fold()
    assert type(back) is type(plain) and repr(back) == repr(plain)
    assert error(back.weight, plain.weight) <= bound and torch.equal(back.bias, plain.bias)


def test_converting_subclasses():
    class Mine(SummaryLinear):
        pass

    class Theirs(nn.Linear):
        pass

    assert type(Mine.from_linear(Theirs(4, 3))) is Mine


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: SummaryLinear.from_linear(nn.Conv2d(1, 1, 1)), TypeError, "linear: got Conv2d, want nn.Linear"),
        (lambda: SummaryLinear.from_linear(SummaryLinear(2, 2)), TypeError, "linear: got SummaryLinear"),
        (lambda: SummaryLinear.from_linear(torch.randn(2, 2)), TypeError, "linear: got Tensor"),
        (lambda: SummaryConv2d.from_conv2d(nn.Linear(2, 2)), TypeError, "conv: got Linear, want nn.Conv2d"),
        (lambda: SummaryConv2d.from_conv2d(nn.Conv1d(2, 2, 1)), TypeError, "conv: got Conv1d"),
        (
            lambda: SummaryLinear.from_linear(nn.Linear(2, 2), "both"),
            ValueError,
            "preserve: got 'both', want 'function'",
        ),
        (lambda: SummaryConv2d.from_conv2d(nn.Conv2d(2, 2, 1), ""), ValueError, "preserve: got '', want 'function'"),
        (lambda: SummaryLinear.from_linear(nn.LazyLinear(2)), TypeError, "linear: got an uninitialized weight"),
        (lambda: SummaryConv2d.from_conv2d(nn.LazyConv2d(2, 1)), TypeError, "conv: got an uninitialized weight"),
    ],
)
def test_what_cannot_be_converted_is_named(call, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        call()


def test_a_lazy_layer_converts_once_it_has_run():
    lazy, x = nn.LazyLinear(3), torch.randn(2, 5)
    wanted = lazy(x)
    assert error(SummaryLinear.from_linear(lazy)(x), wanted) <= 1e-5


def test_unfrozen_forward_stays_the_summary():
    layer, x, _ = make("linear", torch.float64)
    assert error(layer.freeze().unfreeze()(x), naive_linear(x, layer.weight, layer.bias)) <= 1e-12
