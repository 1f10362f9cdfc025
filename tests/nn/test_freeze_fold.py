import copy
import pickle

import pytest
import torch
from layers import CHANGES, make
from relative_error import error, naive_kernel, naive_linear, randomize
from torch import nn
from torch.nn import functional as F

from interp_nn.nn import SummaryConv2d, SummaryLinear

by_kind = pytest.mark.parametrize("kind", ["linear", "wide", "conv", "grouped"])


def plain_of(layer):
    """Return the plain function of (input, weight, bias)."""
    if isinstance(layer, SummaryLinear):
        return F.linear
    return lambda x, w, b: F.conv2d(x, w, b, layer.stride, layer.padding, layer.dilation, layer.groups)


def truth(layer, x):
    """The output in fp64."""
    bias = None if layer.bias is None else layer.bias.double()
    return plain_of(layer)(x.double(), naive_kernel(layer.b.double(), layer.groups), bias)


def is_current(layer, x):
    """Return True if the output equals, bit for bit, that of the plain layer with the current effective weight."""
    with torch.no_grad():
        return torch.equal(layer(x), plain_of(layer)(x, layer.effective_weight().contiguous(), layer.bias))


def is_frozen(layer, x):
    layer.zero_grad()
    layer(x).sum().backward()
    return layer.b.grad is None


# Frozen forwards


@by_kind
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_forward_is_the_plain_layer_to_the_bit(kind, bias):
    layer, x = make(kind, torch.float32, bias)
    before = layer(x)
    assert layer.freeze() is layer
    assert is_current(layer, x)
    assert error(layer(x), before) <= 1e-6
    assert "frozen" in repr(layer)


@by_kind
def test_frozen_weight_gets_no_gradient_and_the_rest_does(kind):
    layer, x = make(kind)
    layer.freeze()
    x.requires_grad_()
    y = layer(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert layer.b.grad is None and layer.b.requires_grad
    kernel = naive_kernel(layer.b, layer.groups).detach()
    wanted = torch.autograd.grad(plain_of(layer)(x, kernel, layer.bias), (x, layer.bias), upstream)
    assert error(x.grad, wanted[0]) <= 1e-12 and error(layer.bias.grad, wanted[1]) <= 1e-12


@by_kind
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_frozen_layer_notices_a_changed_weight(kind, change, inference):
    layer, x = make(kind, torch.float32)
    layer.freeze()
    before = layer(x)
    with torch.no_grad():
        change(layer)
    with torch.inference_mode(inference):
        assert is_current(layer, x)
    assert error(layer(x), before) > 1e-2
    assert is_frozen(layer, x.requires_grad_())


@by_kind
def test_a_frozen_layer_with_another_weight_in_a_transform(kind):
    """Every transform of a frozen layer's weight sees that weight, whose gradient is none, and leaves nothing behind."""
    layer, x = make(kind)
    layer.freeze()
    kept = layer.frozen_weight()
    several = torch.randn(3, *layer.b.shape, dtype=torch.float64)

    def value(b):
        return torch.func.functional_call(layer, {"b": b}, (x,))

    wanted = torch.stack([plain_of(layer)(x, naive_kernel(b, layer.groups), layer.bias) for b in several])
    assert error(torch.vmap(value)(several), wanted) <= 1e-12
    y, tangent = torch.func.jvp(value, (several[0],), (several[1],))
    assert error(y, wanted[0]) <= 1e-12 and not tangent.any()
    assert not torch.func.grad(lambda b: value(b).sum())(several[0]).any()
    assert error(torch.vmap(layer)(torch.stack((x, x)))[1], layer(x)) <= 1e-12
    assert layer.frozen_weight() is kept


def test_no_later_weight_passes_for_the_frozen_one_by_its_address():
    for _ in range(100):  # the allocator decides whether an address comes back: it does in some of these rounds
        layer, x = SummaryLinear(64, 64), torch.randn(2, 64)
        CHANGES["replaced"](layer)
        address = layer.b.data_ptr()
        layer.freeze()
        CHANGES["replaced"](layer)
        later = []
        while len(later) < 20 and (not later or later[-1].data_ptr() != address):
            later.append(nn.Parameter(torch.randn_like(layer.b)))
        layer.b = later[-1]
        assert is_current(layer, x)


@by_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_frozen_layer_follows_a_dtype_change(kind, dtype):
    layer, x = make(kind, torch.float32)
    layer.freeze().to(dtype)
    assert layer(x.to(dtype)).dtype == dtype
    assert is_current(layer, x.to(dtype))
    assert is_frozen(layer, x.to(dtype).requires_grad_())
    layer.float()  # in bf16 the weight was rounded: the kept one must be too
    assert is_current(layer, x)


@by_kind
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_frozen_copy_and_its_original_go_separate_ways(kind, duplicate):
    layer, x = make(kind, torch.float32)
    layer.freeze()
    before = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        other.b.mul_(1.5)
    assert is_current(other, x) and not torch.equal(other(x), before)
    assert is_current(layer, x) and torch.equal(layer(x), before)


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
    layer, x = make(kind, torch.float32)
    x.requires_grad_()
    layer.freeze()
    assert is_frozen(layer, x)
    drop(layer)
    assert layer.frozen_weight() is None
    assert not is_frozen(layer, x)
    assert "frozen" not in repr(layer)


@by_kind
def test_eval_keeps_a_frozen_weight_and_makes_none(kind):
    layer, x = make(kind, torch.float32)
    x.requires_grad_()
    layer.eval()
    assert layer.frozen_weight() is None and not is_frozen(layer, x)
    layer.freeze().eval()
    assert layer.frozen_weight() is not None and is_frozen(layer, x)


@by_kind
def test_freezing_is_no_state(kind):
    layer = make(kind, torch.float32)[0]
    keys = list(layer.state_dict())
    layer.freeze()
    assert list(layer.state_dict()) == keys == ["b", "bias"]
    assert len(list(layer.parameters())) == 2 and not list(layer.buffers())


@by_kind
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_weight_frozen_or_refreshed_in_a_mode_serves_outside_it(kind, mode):
    layer, x = make(kind, torch.float32)
    with mode():
        layer.freeze()
        assert error(layer(x), truth(layer, x)) < 2e-2
    assert is_current(layer, x)
    assert is_frozen(layer, x.requires_grad_())
    with torch.no_grad():
        layer.b.mul_(1.5)
    with mode():
        layer(x)
    assert layer.frozen_weight().dtype == torch.float32
    assert is_current(layer, x)
    assert is_frozen(layer, x)


@by_kind
def test_frozen_layer_made_in_inference_mode(kind):
    with torch.inference_mode():
        layer, x = make(kind, torch.float32)
        assert is_current(layer.freeze(), x)


# fold


@by_kind
@pytest.mark.parametrize("bias", [True, False])
def test_fold_is_the_same_function_as_a_plain_layer(kind, bias):
    layer, x = make(kind, torch.float32, bias)
    folded = layer.fold()
    assert type(folded) is (nn.Linear if kind in ("linear", "wide") else nn.Conv2d)
    assert error(folded(x), truth(layer, x)) <= 1e-6
    assert repr(folded) == repr(layer).replace("Summary", "")


@by_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fold_rounds_its_weight_once(kind, dtype):
    layer = make(kind, dtype)[0]
    exact = naive_kernel(layer.b.detach().double(), layer.groups)
    assert error(layer.fold().weight, exact.to(dtype)) <= 1e-14
    assert torch.equal(layer.fold().bias, layer.bias)


@by_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trainable", [(True, False), (False, True)])
@pytest.mark.parametrize("direction", ["fold", "from"])
def test_conversion_keeps_flags_and_shares_nothing(kind, training, trainable, direction):
    layer = make(kind, torch.float32)[0]
    source = layer if direction == "fold" else layer.fold()
    source.train(training)
    own = {True: "b", False: "weight"}
    given = getattr(source, own[direction == "fold"])
    given.requires_grad_(trainable[0]), source.bias.requires_grad_(trainable[1])
    if direction == "fold":
        made = source.fold()
    else:
        made = type(layer).from_linear(source) if isinstance(source, nn.Linear) else type(layer).from_conv2d(source)
    assert made.training is training
    new = getattr(made, own[direction == "from"])
    assert (new.requires_grad, made.bias.requires_grad) == trainable
    assert new.is_leaf and made.bias.is_leaf
    before, bias = given.clone(), source.bias.clone()
    randomize(made)
    assert torch.equal(given, before) and torch.equal(source.bias, bias)


@by_kind
def test_conversion_draws_no_random_numbers(kind):
    layer = make(kind, torch.float32)[0]
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
    wanted = plain.weight.t() if isinstance(plain, nn.Linear) else plain.weight
    assert torch.equal(made.b, wanted) and torch.equal(made.bias, plain.bias)
    with torch.no_grad():
        plain.weight.copy_(naive_kernel(wanted, getattr(plain, "groups", 1)))
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
    layer, x = make("linear")
    assert error(layer.freeze().unfreeze()(x), naive_linear(x, layer.b, layer.bias)) <= 1e-12
