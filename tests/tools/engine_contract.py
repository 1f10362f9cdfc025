"""Tests for every engine with kernels: one launch each and nothing around it, gradients, identities, training, schemas.

A test file takes them with `from engine_contract import *` and has two fixtures: `engine`, an `Engine`, and `launched`, a list
that gets the name of each launch.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import pytest
import torch
from support import naive, naive_cross_entropy, naive_head_cross_entropy, naive_pair
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from interp_nn import functional
from interp_nn.engines.problem import Plan, plan_to_text
from interp_nn.nn import SummaryClassifier, SummaryHead, SummaryLinear

OPS = torch.ops.interp_nn
ALLOCATIONS = {"empty", "empty_strided", "new_empty", "empty_like"}
VIEWS = {"view", "_unsafe_view", "t", "transpose", "detach", "alias", "expand"}
PARTS = {"slice", "as_strided", "split", "select"}


class Engine(NamedTuple):
    """An engine's name, a context in which it computes on the CPU, and what it calls its launches."""

    name: str
    forced: Callable[[], AbstractContextManager[None]]
    forward: str
    backward: str
    pair_loss: str
    head_loss: str
    scale: str


class OnlyLaunches(TorchDispatchMode):
    """Lets our operators, allocations and views pass; anything else would be a launch of its own."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        counter = name == "zeros" and list(args[0]) == [1]  # a GPU has it already
        ours = name == "ones_like" and args[0].dim() == 0  # autograd's gradient of the loss itself
        if operator.namespace != "interp_nn" and name not in ALLOCATIONS | VIEWS | PARTS and not counter and not ours:
            raise AssertionError(f"{operator} between the launches")
        return operator(*args, **(kwargs or {}))


def inputs(n, d, k, m=None, dtype=torch.float32):
    """x, b in column-major order, and with classes m an output layer."""
    x, b = torch.randn(n, d, dtype=dtype), torch.randn(k, d, dtype=dtype).mul_(max(d, k) ** -0.5).T
    if m is None:
        return [x, b]
    return [x, b, torch.randn(m, k, dtype=dtype).mul_(k**-0.5), torch.randn(m, dtype=dtype)]


def targets(n, classes):
    """Class indices, of which every fifth is ignored."""
    target = torch.arange(n) % classes
    target[1::5] = -100
    return target


def differentiable(tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("mode", [OnlyLaunches, contextlib.nullcontext], ids=["operators", "direct"])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_of_a_layer_are_one_launch_each(bias, mode, engine, launched):
    layer = SummaryLinear(48, 20, bias=bias)
    x, upstream = torch.randn(40, 48, requires_grad=True), torch.randn(40, 20)
    with engine.forced(), mode():
        y = layer(x)
        assert launched == [engine.forward]
        y.backward(upstream)
    assert launched == [engine.forward, engine.backward]
    assert layer.b.grad.stride() == layer.b.stride()


@pytest.mark.parametrize("name", ["classifier", "head"])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("mode", [OnlyLaunches, contextlib.nullcontext], ids=["operators", "direct"])
def test_a_loss_with_its_gradients_is_one_launch(mode, name, gradients, engine, launched):
    """The backward adds at most one launch, which multiplies by the upstream gradient, here 1."""
    layer = SummaryClassifier(48, 7) if name == "classifier" else SummaryHead(48, latent=30, num_classes=7)
    x, target = torch.randn(40, 48, requires_grad=True), targets(40, 7)
    with engine.forced(), torch.set_grad_enabled(gradients), mode():
        loss = layer.loss(x, target)
        assert launched == [engine.pair_loss if name == "classifier" else engine.head_loss]
        if gradients:
            loss.backward()
    if gradients:
        assert launched[1:] == [engine.scale]
        assert all(p.grad is not None for p in layer.parameters()) and x.grad is not None


TARGET = targets(33, 10)
FUNCTIONS = {
    "summary": (functional.summary, naive, (33, 40, 20)),
    "pair": (lambda x, b: tuple(functional.summary_pair(x, b)), naive_pair, (33, 40, 20)),
    "projection": (
        lambda x, b: functional.summary_pair(x, b).projection,
        lambda x, b: naive_pair(x, b)[0],
        (33, 40, 20),
    ),
    "loss": (
        lambda x, b: functional.summary_cross_entropy(x, b, TARGET, weights=(0.7, 1.3, 0.9)),
        lambda x, b: naive_cross_entropy(x, b, TARGET, weights=(0.7, 1.3, 0.9)),
        (33, 40, 10),
    ),
    "head": (
        lambda x, b, a, c: functional.summary_head_cross_entropy(x, b, a, c, TARGET),
        lambda x, b, a, c: naive_head_cross_entropy(x, b, a, c, TARGET),
        (33, 40, 20, 10),
    ),
}


def outputs_and_gradients(function, tensors, scale):
    tensors = differentiable(tensors)
    out = function(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((o.double() * torch.linspace(0.5, 1.5, o.numel()).view(o.shape)).sum() for o in out)
    return [*out, *torch.autograd.grad(total * scale, tensors)]


@pytest.mark.parametrize("order", ["layer's", "row-major", "strided"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name, order, engine):
    function, expression, shape = FUNCTIONS[name]
    tensors = inputs(*shape)
    if order != "layer's":
        tensors[1] = tensors[1].contiguous()
    if order == "strided":
        tensors[1] = torch.stack((tensors[1], tensors[1]), 2)[:, :, 0]
    with engine.forced():
        found = outputs_and_gradients(function, tensors, 0.25)
    exact = outputs_and_gradients(expression, [t.double() for t in tensors], 0.25)
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["sliced x", "expanded upstream", "batched x"])
def test_any_strides(layout, engine):
    x, b = inputs(24, 30, 12)
    upstream = torch.randn(24, 12)
    if layout == "sliced x":
        x = torch.randn(24, 70)[:, 3:63:2]
    elif layout == "expanded upstream":
        upstream = torch.randn(1, 1).expand(24, 12)
    else:
        x, upstream = x.view(4, 6, 30), upstream.view(4, 6, 12)
    given, exact_given = (x.requires_grad_(), b.requires_grad_()), differentiable((x, b), torch.float64)
    with engine.forced():
        found = torch.autograd.grad(functional.summary(*given), given, upstream)
    exact = torch.autograd.grad(functional.summary(*exact_given), exact_given, upstream.double())
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needs", ["x", "b", "bias"])
def test_one_gradient_alone(needs, engine):
    x, b = inputs(40, 30, 12)
    given = {"x": x, "b": b, "bias": torch.randn(12)}
    given[needs].requires_grad_()
    with engine.forced():
        functional.summary(**given).square().sum().backward()
    found, given[needs].grad = given[needs].grad, None
    functional.summary(**given).square().sum().backward()
    torch.testing.assert_close(found, given[needs].grad, rtol=1e-4, atol=1e-5)


def test_a_graph_kept_for_a_second_backward_gives_its_gradients_again(engine):
    given, target = differentiable(inputs(30, 20, 10)), targets(30, 10)
    with engine.forced():
        loss = functional.summary_cross_entropy(*given, target)
        first = [g.clone() for g in torch.autograd.grad(loss, given, torch.tensor(3.0), retain_graph=True)]
        second = torch.autograd.grad(loss, given, torch.tensor(0.5))
    doubles = differentiable(given, torch.float64)
    exact = torch.autograd.grad(functional.summary_cross_entropy(*doubles, target), doubles)
    for one, two, expected in zip(first, second, exact, strict=True):
        torch.testing.assert_close(one, 3 * expected.float(), rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(two, 0.5 * expected.float(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**14])
def test_half_precision_under_a_loss_scaler(scale, engine):
    """The kernel multiplies by the upstream gradient in fp32: fp16 gradients neither underflow nor overflow."""
    given, target = differentiable(inputs(64, 24, 10, dtype=torch.float16)), targets(64, 10)
    with engine.forced():
        found = torch.autograd.grad(functional.summary_cross_entropy(*given, target), given, torch.tensor(scale))
    doubles = differentiable(given, torch.float64)
    exact = torch.autograd.grad(functional.summary_cross_entropy(*doubles, target), doubles)
    for got, expected in zip(found, exact, strict=True):
        assert float((got.double() / scale - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize("name", ["summary", "loss"])
def test_second_derivatives(name, engine):
    """A gradient penalty: the backward of a backward, after kernels have computed the first one."""

    def penalty(x, b, target):
        y = (
            functional.summary(x, b).square().sum()
            if name == "summary"
            else functional.summary_cross_entropy(x, b, target)
        )
        (gx,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(gx.square().sum(), (x, b))

    given, target = inputs(20, 12, 6), targets(20, 6)
    with engine.forced():
        found = penalty(*differentiable(given), target)
    exact = penalty(*differentiable(given, torch.float64), target)
    for got, expected in zip(found, exact, strict=True):
        assert float((got.double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("shape", [(0, 8, 4), (5, 0, 4), (3, 2, 0)], ids=str)
def test_empty_tensors_need_no_launch(shape, engine, launched):
    n, d, k = shape
    x, b = (t.requires_grad_() for t in (torch.ones(n, d), torch.ones(d, k)))
    with engine.forced():
        y = functional.summary(x, b)
    assert y.shape == (n, k) and not bool(y.any()) and not launched


@pytest.mark.parametrize("rows", [0, 9])
@pytest.mark.parametrize("head", [False, True])
def test_a_loss_of_no_kept_row(head, rows, engine):
    x, b, a, c = differentiable(inputs(rows, 8, 4, 3))
    target = torch.full((rows,), -100)
    given = (x, b, a, c) if head else (x, b)
    function = functional.summary_head_cross_entropy if head else functional.summary_cross_entropy
    with engine.forced():
        mean, total = (function(*given, target, reduction=reduction) for reduction in ("mean", "sum"))
        grads = [torch.autograd.grad(value, given) for value in (mean, total)]
    assert torch.isnan(mean) and total == 0
    for found in grads:
        assert all(g.shape == t.shape and not g.any() for g, t in zip(found, given, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_that_is_not_finite_spoils_no_other(dtype, engine):
    x, b = inputs(40, 30, 12, dtype=dtype)
    bad = x.clone()
    bad[7, 3], bad[20, 29] = float("inf"), float("nan")
    with engine.forced():
        clean, spoilt = functional.summary_pair(x, b), functional.summary_pair(bad, b)
    rest = [i for i in range(40) if i not in (7, 20)]
    for c, s in zip(clean, spoilt, strict=True):
        assert torch.equal(c[rest], s[rest])
        assert not torch.isfinite(s[[7, 20]]).all(1).any()


def test_homogeneity_is_exact(engine):
    """f(2X, b) = 2 f(X, b) and f(X, 2b) = 8 f(X, b), bit for bit."""
    x, b = inputs(40, 30, 12)
    with engine.forced():
        y = functional.summary(x, b)
        assert torch.equal(functional.summary(2 * x, b), 2 * y)
        assert torch.equal(functional.summary(x, 2 * b), 8 * y)


@pytest.mark.parametrize("name", ["linear", "classifier", "head"])
def test_training_follows_the_eager_engine(name, engine):
    """Twelve steps of SGD in fp32: the loss curve of the eager engine, to 1e-5 of it."""

    def train():
        torch.manual_seed(3)
        x, target = torch.randn(48, 20), torch.randint(5, (48,))
        layer = {
            "linear": lambda: SummaryLinear(20, 5),
            "classifier": lambda: SummaryClassifier(20, 5),
            "head": lambda: SummaryHead(20, latent=16, num_classes=5),
        }[name]()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(layer(x), target) if name == "linear" else layer.loss(x, target)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return torch.tensor(losses)

    with engine.forced():
        ours = train()
    theirs = train()
    assert theirs[-1] < theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def check_compiled(engine, shape):
    x, b = differentiable(inputs(*shape))

    def function(x, b):
        return functional.summary(x.sin(), b).cos()

    with engine.forced():
        out = torch.compile(function, fullgraph=True, backend="aot_eager")(x, b)
        found = torch.autograd.grad(out.sum(), (x, b))
    expected = function(x, b)
    exact = torch.autograd.grad(expected.sum(), (x, b))
    for got, want in zip((out, *found), (expected, *exact), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_compiled_without_a_break(engine):
    """torch.compile(fullgraph=True) of the operators, forward and backward."""
    check_compiled(engine, (40, 48, 20))


def check_operators(engine, plan, transposed, k):
    """Fake kernels promise the shapes and strides that the engine returns too."""
    text, dy = plan_to_text(plan._replace(engine=engine.name)), torch.randn(20, k)
    x, b = torch.randn(20, 10), torch.randn(k, 10).t() if transposed else torch.randn(10, k)
    with engine.forced():
        opcheck(OPS.summary.default, (x, b, torch.randn(k), text))
        if plan.saves:
            p, _, saved = OPS.summary_pair(x, b, text)
            opcheck(OPS.summary_pair.default, (x, b, text))
            arguments = (dy, dy, x, b, [p, *saved], text, [True, True, False], transposed)
        else:
            _, saved = OPS.summary(x, b, None, text)
            arguments = (None, dy, x, b, saved, text, [True] * 3, transposed)
        opcheck(OPS.summary_backward.default, arguments)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("saves", [False, True])
def test_opcheck(saves, transposed, engine):
    check_operators(engine, Plan("eager", "(Xb)G", saves), transposed, 12)


def check_loss_operators(engine, plan, transposed):
    head = not plan.saves
    x, b, a, c = inputs(20, 10, 6, 4)
    b = b if transposed else b.contiguous()
    a, c, needs = (a, c, [True] * 4) if head else (None, None, [True, True, False, False])
    text = plan_to_text(plan._replace(engine=engine.name))
    arguments = (x, b, a, c, targets(20, 4), [1.0] * 3, -100, "mean", text, needs, transposed)
    with engine.forced():
        opcheck(OPS.summary_cross_entropy.default, arguments)
        opcheck(OPS.summary_cross_entropy_backward.default, (torch.tensor(2.0), *arguments))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("plan", [Plan("eager", "(Xb)G", saves=True), Plan("eager", "logits_from_latent")])
def test_opcheck_of_a_loss(plan, transposed, engine):
    check_loss_operators(engine, plan, transposed)
