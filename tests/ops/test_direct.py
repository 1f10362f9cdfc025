"""Eager calls that pass the operators by: nothing else may notice, and no plan is stale."""

import contextlib
import copy
import os
import sys
import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import AUTOGRAD_PLANS, CASES, OPERATOR_PLANS, naive, naive_cross_entropy, naive_pair
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.autograd import gradcheck, gradgradcheck
from torch.distributed.tensor.debug import CommDebugMode
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import interp_nn
from benchmarks.timing import host
from interp_nn import engines, functional
from interp_nn.engines import eager, eager_polynomial, orders, select
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.problem import LossOptions, Plan
from interp_nn.linalg import is_column_major
from interp_nn.ops import direct, remembered
from interp_nn.ops.summary import as_rows, ordered

LOSS = LossOptions((1.0, 0.5, 2.0), -100, "mean")


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.fixture
def operators_only(monkeypatch):
    """Plans of operators at any size, in a memory of their own."""
    monkeypatch.setattr(orders, "OPERATOR_OVERHEAD", 0)
    monkeypatch.setattr(select, "_prefers_autograd", lambda _: False)
    monkeypatch.setattr(remembered, "plans", {})


class Seen(TorchDispatchMode):
    """Collects the names of this library's operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "interp_nn":
            self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


# Derivatives


@pytest.mark.parametrize("shape", [(3, 4, 2), (2, 2, 3)], ids=str)
@pytest.mark.parametrize(("plan", "pair"), CASES, ids=str)
def test_first_and_second_derivatives(plan, pair, shape):
    n, d, k = shape
    inputs = (randn(n, d), randn(d, k)) if pair else (randn(n, d), randn(d, k), randn(k))
    function, call = direct.summary_pair if pair else direct.summary, direct.Call(plan, pair)
    assert gradcheck(lambda *given: function(*given, call), inputs, check_batched_grad=True)
    assert gradgradcheck(lambda *given: function(*given, call), inputs, check_batched_grad=True)


@pytest.mark.parametrize("shape", [(3, 4, 2), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("pair", [False, True])
def test_first_and_second_derivatives_of_a_polynomial(pair, shape):
    n, d, k = shape
    plan = Plan("eager", "X(bq)" if k <= d else "X(q(K)b)") if not pair else Plan("eager", "(Xb)q", saves=True)
    inputs = (
        randn(n, d),
        randn(d, k),
        None if pair else randn(k),
        randn(3),
        torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
    )

    def function(x, b, bias, coefficients, scale):
        found = direct.polynomial_summary(x, b, bias, Polynomial(coefficients, scale), direct.Call(plan, pair))
        return found if pair else found[1]

    assert gradcheck(function, inputs, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_with_more_dimensions(reduction, operators_only):
    target = torch.zeros(2, 3, dtype=torch.int64)
    inputs = randn(2, 3, 4), randn(4, 2)
    assert gradgradcheck(lambda x, b: sum(functional.summary_pair(x, b)), inputs, check_batched_grad=True)
    assert gradgradcheck(lambda x, b: functional.summary_cross_entropy(x, b, target, reduction=reduction), inputs)


@pytest.mark.parametrize(("head", "reduction"), [(False, "mean"), (True, "none")])
def test_first_and_second_derivatives_of_a_loss(head, reduction):
    inputs = (randn(4, 3), randn(3, 2), randn(3, 2), randn(3)) if head else (randn(4, 3), randn(3, 2))
    target, options = torch.tensor([0, 1, -100, 1]), LOSS._replace(reduction=reduction)
    plan = (OPERATOR_PLANS[0] if not head else OPERATOR_PLANS[0]._replace(order="logits_from_x"))._replace(saves=True)

    def loss(x, b, a=None, c=None):
        return direct.cross_entropy(x, b, a, c, target, direct.Call(plan, options=options))

    assert gradcheck(loss, inputs, check_batched_grad=True)
    assert gradgradcheck(loss, inputs)


@pytest.mark.parametrize("dims", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("plan", [*OPERATOR_PLANS, *AUTOGRAD_PLANS])
def test_other_dimensions_and_strides(plan, dims):
    x, b, bias = randn(*dims, 4), randn(3, 4), randn(3)
    y = direct.summary(x, b.t(), bias, direct.Call(plan))
    torch.testing.assert_close(y, naive(x, b.t(), bias))
    dy = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, (x, b, bias), dy),
        torch.autograd.grad(naive(x, b.t(), bias), (x, b, bias), dy),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (4,)], ids=str)
def test_results_may_be_written_in_place(shape, operators_only):
    """As by nn.ReLU(inplace=True)."""
    x, b, bias = randn(*shape), randn(4, 3), randn(3)
    calls = {
        lambda: functional.summary(x, b, bias): naive(x, b, bias),
        lambda: functional.summary_pair(x, b).summary: naive(x, b),
        lambda: functional.summary(x, b, bias, polynomial=(0, 1, 0)): naive(x, b, bias),
    }
    for call, want in calls.items():
        got = torch.autograd.grad(call().relu_().square().sum(), (x, b))
        torch.testing.assert_close(got, torch.autograd.grad(want.relu().square().sum(), (x, b)))


def test_a_retained_graph_and_half_of_a_pair(operators_only):
    x, b = randn(5, 4), randn(4, 3)
    p, y = functional.summary_pair(x, b)
    for out, want in ((p, naive_pair(x, b)[0]), (y, naive_pair(x, b)[1])):
        for _ in range(2):
            got = torch.autograd.grad(out.sum(), (x, b), retain_graph=True)
            torch.testing.assert_close(got, torch.autograd.grad(want.sum(), (x, b), retain_graph=True))


# What has to see an operator sees one


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_mode_sees_the_operators(where, operators_only):
    x, b, target, seen = randn(5, 4), randn(4, 3), torch.arange(5) % 3, Seen()
    calls = {
        "summary": lambda: functional.summary(x, b).sum(),
        "summary_pair": lambda: sum(functional.summary_pair(x, b)).sum(),
        "summary_cross_entropy": lambda: functional.summary_cross_entropy(x.half(), b.half(), target),
    }
    for name, call in calls.items():
        out = call()
        with seen:
            out = call() if where == "forward" else out
            torch.autograd.grad(out, (x, b))
        backward = f"{name.removesuffix('_pair')}_backward"
        assert seen.names == [name, backward][where == "backward" :]
        seen.names.clear()
        call()
        assert not seen.names


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("op", ["summary", "cross_entropy"])
def test_nothing_else_is_passed_by(op, operators_only, monkeypatch):
    """Each way that PyTorch may look into a call leaves the direct path alone, also where the call is remembered by its b."""
    x, b, target = torch.randn(5, 4), torch.nn.Parameter(torch.randn(4, 3)), torch.arange(5) % 3

    def call(x, b):
        return functional.summary(x, b) if op == "summary" else functional.summary_cross_entropy(x, b, target)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.b = b

        def forward(self, x):
            return call(x, self.b)

    for _ in range(4):
        call(x, b)
    monkeypatch.setattr(direct, op, lambda *_: pytest.fail("an operator was passed by"))
    with BaseTorchFunctionMode():
        call(x, b)
    with torch.autograd.forward_ad.dual_level():
        call(x, b)
    with functional.calls_followed():
        call(x, b)
    torch.func.vmap(call, (0, None))(x.expand(2, 5, 4), b)
    torch.func.grad(lambda b: call(x, b).sum())(b)
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(DataDependentOutputException):
        call(x, b)
    with FlopCounterMode(display=False):
        call(x, b)
    with CommDebugMode():
        call(x, b)
    if op == "summary":  # it cannot record the operator of a loss
        torch.jit.trace(call, (x, b.detach()), check_trace=False)
    torch.fx.experimental.proxy_tensor.make_fx(call)(x, b)
    torch.export.export(Layer(), (x,))
    torch.compile(Layer(), backend="eager", fullgraph=True)(x)
    copy.deepcopy(Layer())
    with pytest.raises(pytest.fail.Exception, match="passed by"):
        call(x, b)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # also of a plain product
def test_linearize(operators_only):
    """It calls the function once as it is, and then inside of transforms."""
    given = torch.randn(5, 4), torch.randn(4, 3)
    tangents = tuple(map(torch.randn_like, given))
    value, jvp = torch.func.linearize(functional.summary, *given)
    torch.testing.assert_close((value, jvp(*tangents)), torch.func.jvp(naive, given, tangents))


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)], ids=str)
def test_a_checkpoint_under_a_mode_at_one_of_two_times(shape, where, operators_only):
    """It computes by operators one time and without them the other time, and the two have to save the same."""
    x, b, c = randn(*shape), randn(4, 3), torch.tensor([1.0, 0.5], dtype=torch.float64)
    target = torch.zeros(shape[:-1], dtype=torch.int64)
    calls = (
        lambda x, b: functional.summary(x.sin(), b).cos(),
        lambda x, b: sum(functional.summary_pair(x.sin(), b)).cos(),
        lambda x, b: sum(functional.summary_pair(x.sin(), b, polynomial=c)).cos(),
        lambda x, b: functional.summary_cross_entropy(x.sin(), b, target).cos(),
        lambda x, b: functional.summary_cross_entropy(x.sin(), b, target, reduction="none").cos(),
    )
    for call in calls:
        with Seen() if where == "forward" else contextlib.nullcontext():
            out = checkpoint(call, x, b, use_reentrant=False).sum()
        with Seen() if where == "backward" else contextlib.nullcontext():
            got = torch.autograd.grad(out, (x, b))
        torch.testing.assert_close(got, torch.autograd.grad(call(x, b).sum(), (x, b)))


@pytest.mark.parametrize("where", ["forward", "backward", "both"])
def test_autocast(where, operators_only):
    """A forward's products are of cast tensors, and a backward's of what it saved, whatever the state then."""
    x, b, bias = randn(5, 4, dtype=torch.float32), randn(4, 3, dtype=torch.float32), randn(3, dtype=torch.float32)
    found = []
    for mode in (contextlib.nullcontext(), Seen()):  # the direct path, and that of the operators
        with mode:
            with torch.autocast("cpu", torch.bfloat16, enabled=where != "backward"):
                y = functional.summary(x, b, bias)
            with torch.autocast("cpu", torch.bfloat16, enabled=where != "forward"):
                found.append((y, *torch.autograd.grad(y.float().square().sum(), (x, b, bias))))
    assert found[0][0].dtype == (torch.float32 if where == "backward" else torch.bfloat16)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kernel", [False, True])
def test_an_old_batched_tensor_reaches_no_engine(kernel, monkeypatch):
    """is_grads_batched=True gives plain tensors a hidden dimension, which plain products know and operators refuse."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return functional.summary(dx, torch.eye(4))

    if kernel:
        monkeypatch.setattr(orders, "OPERATOR_OVERHEAD", 0)
        monkeypatch.setattr(remembered, "plans", {})
        monkeypatch.setattr(eager, "forward", lambda *_: pytest.fail("an operator was passed by"))
    x, upstream = torch.randn(5, 4, requires_grad=True), torch.randn(2, 5, 4)
    with pytest.raises(RuntimeError, match="interp_nn::summary") if kernel else contextlib.nullcontext():
        (got,) = torch.autograd.grad(Through.apply(x), x, upstream, is_grads_batched=True)
        torch.testing.assert_close(got, upstream)


# Plans


class Probe:
    """An engine in the place of cuda's that computes as eager does, and notes its calls."""

    def __init__(self):
        self.calls, self.prepared = [], 0

    def forward(self, x, b, bias, plan, pair, q=None):
        self.calls.append("forward")
        if q is None:
            return eager.forward(x, b, bias, plan, pair)
        return eager_polynomial.forward(x, b, bias, q, plan._replace(saves=True), True)

    def backward(self, dp, dy, x, b, saved, plan, need_x, need_b, need_bias=False, need_c=False, q=None):
        self.calls.append("backward")
        if q is None:
            return eager.backward(dp, dy, x, b, saved, plan, need_x, need_b, need_bias)
        return eager_polynomial.backward(dp, dy, x, b, q, saved, plan, (need_x, need_b, need_bias, need_c, False))[:4]

    def loss(self, *args):
        self.calls.append("loss")
        return eager.loss(*args)

    def scale(self, *args):
        self.calls.append("scale")
        return eager.scale(*args)

    # Calls that are prepared compute the same, and only for tensors that are laid out as those they were prepared for.

    def prepared_forward(self, x, b, bias, plan):
        given = layouts(x, b, bias)

        def call(x, b, bias):
            assert given == layouts(x, b, bias) and x.is_contiguous()
            return self.forward(as_rows(x), b, bias, plan, plan.saves)

        return self.noted(call)

    def prepared_backward(self, dp, dy, x, b, saved, plan, needs):
        given = layouts(x, dp, dy, b, *saved)

        def call(dp, dy, x, b, saved):
            assert given == layouts(x, dp, dy, b, *saved) and x.is_contiguous()
            dx, db, dbias = self.backward(dp, dy, as_rows(x), b, list(map(as_rows, saved)), plan, *needs)
            return None if dx is None else dx.view(x.shape), None if db is None else as_b(db, b), dbias

        return self.noted(call)

    def prepared_loss(self, x, b, a, c, target, options, plan, needs):
        given = layouts(x, b, a, c)

        def call(x, b, a, c, target):
            assert given == layouts(x, b, a, c) and x.is_contiguous() and target.is_contiguous()
            value, grads = self.loss(as_rows(x), b, a, c, target.view(-1), options, plan, None, needs)
            if needs[0]:
                grads[0] = grads[0].view(x.shape)
            if needs[1]:
                grads[needs[0]] = as_b(grads[needs[0]], b)
            return value, grads

        return None if options.reduction == "none" else self.noted(call)

    def prepared_scale(self, grads, upstream):
        given = layouts(upstream, *grads)

        def call(grads, upstream):
            assert given == layouts(upstream, *grads)
            return self.scale(grads, upstream)

        return self.noted(call)

    def noted(self, call):
        def prepared(*given):
            self.prepared += 1
            return call(*given)

        return prepared


def layouts(x, *others):
    """Shapes as rows, strides and dtypes."""
    rows = [as_rows(t) if t is not None and t.dim() > 2 else t for t in (x, *others)]
    return [None if t is None else (t.numel(), t.shape[-1:], t.stride()[-2:], t.dtype) for t in rows]


def as_b(db, b):
    return ordered(db, is_column_major(b))


CHANGES = {
    "n": [1, 5],
    "d": [3, 4],
    "k": [2, 3],
    "leading": [(), (2,)],
    "x": ["contiguous", "transposed", "strided", "sparse"],
    "b": ["contiguous", "transposed", "strided"],
    "dtype": [torch.float32, torch.float64, torch.bfloat16],
    "dtype of b": [None, torch.float64, torch.float8_e5m2],
    "x needs": [False, True],
    "parameter": [False, True],
    "b needs": [False, True],
    "bias": [None, "right", "long", "float64"],
    "grad mode": [True, False],
    "autocast": [False, True],
    "engine": ["auto", "eager", "cuda"],
    "op": ["summary", "pair", "loss", "head", "polynomial"],
    "polynomial": [(0, 1), (1.5, -0.5), [1, 0, 2], "tensor", "parameter"],
    "scale": [1.0, 0.5, "tensor", "parameter"],
    "target": ["right", "ignored", "out of range", "int32"],
    "weights": [(1.0, 1.0, 1.0), (1, 1, 1), (True, 1.0, 1.0), (0.5, 2.0, 1.0), [1.0, 1.0, 1.0]],
    "ignore_index": [-100, 1, True],
    "reduction": ["mean", "sum", "none", "median"],
}  # fmt: skip


def laid_out(t, how):
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "strided":
        return t.repeat_interleave(2, -1)[..., ::2]
    return t.to_sparse() if how == "sparse" else t


def outcome(state, probe):
    """All that a call gives: values, gradients, strides, dtypes and the engine's calls, or its error."""
    torch.default_generator.manual_seed(0)
    n, d, k, dtype = state["n"], state["d"], state["k"], state["dtype"]
    x = laid_out(torch.randn(*state["leading"], n, d, dtype=dtype), state["x"])
    b = laid_out(torch.randn(d, k, dtype=dtype), state["b"]).to(state["dtype of b"] or dtype)
    x, b = x.requires_grad_(state["x needs"]), b.requires_grad_(state["b needs"])
    b = torch.nn.Parameter(b.detach(), b.requires_grad) if state["parameter"] else b
    kind = state["bias"]
    bias = (
        None if kind is None else torch.randn(k + (kind == "long"), dtype=torch.float64 if kind == "float64" else dtype)
    )
    target = torch.arange(n).expand(*state["leading"], n) % k + k * (state["target"] == "out of range")
    target = target.to(torch.int32) if state["target"] == "int32" else target
    target = torch.full_like(target, -100) if state["target"] == "ignored" else target
    options = {name: state[name] for name in ("weights", "ignore_index", "reduction")}
    probe.calls.clear()
    try:
        with (
            interp_nn.use_engine(state["engine"]),
            torch.set_grad_enabled(state["grad mode"]),
            torch.autocast("cpu", torch.bfloat16, enabled=state["autocast"]),
        ):
            if state["op"] == "summary":
                out = (functional.summary(x, b, bias),)
            elif state["op"] == "polynomial":
                made = {
                    "polynomial": torch.tensor([1.0, 2.0, -1.0], requires_grad=state["polynomial"] == "parameter"),
                    "scale": torch.tensor(0.5, requires_grad=state["scale"] == "parameter"),
                }
                chosen = {name: made[name] if state[name] in ("tensor", "parameter") else state[name] for name in made}
                out = (functional.summary(x, b, bias, **chosen), *functional.summary_pair(x, b, **chosen))
            elif state["op"] == "pair":
                out = tuple(functional.summary_pair(x, b))
            elif state["op"] == "loss":
                out = (functional.summary_cross_entropy(x, b, target, **options),)
            else:
                a = torch.randn(3, k, dtype=dtype)
                c = None if bias is None else torch.randn(3 + (kind == "long"), dtype=bias.dtype)
                out = (functional.summary_head_cross_entropy(x, b, a, c, target, **options),)
        leaves = [t for t in (x, b) if t.requires_grad] if out[0].requires_grad else []
        found = [*out, *(torch.autograd.grad([o.sum() for o in out], leaves) if leaves else ())]
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error), tuple(probe.calls)
    return [(t.detach(), t.dtype, t.stride(), t.requires_grad) for t in found], tuple(probe.calls)


def same(one, other):
    if not isinstance(one[0], list) or not isinstance(other[0], list):
        return one == other
    values = zip(one[0], other[0], strict=True)
    equal = all(torch.equal(a[0].nan_to_num(7.0), b[0].nan_to_num(7.0)) and a[1:] == b[1:] for a, b in values)
    return equal and one[1] == other[1]


def check_no_plan_is_stale(data):
    """After any changes a call is what it is without any memory of other calls."""
    probe = Probe()
    state = {name: values[0] for name, values in CHANGES.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engines._engines, "cuda", probe)
        patch.setattr(select, "unsupported_reason", lambda *_: None)
        patch.setattr(orders, "OPERATOR_OVERHEAD", 0)
        kept_plans = {}
        for _ in range(8):
            for name in data.draw(st.lists(st.sampled_from(sorted(CHANGES)), max_size=3)):
                state[name] = data.draw(st.sampled_from(CHANGES[name]))
            patch.setattr(remembered, "plans", kept_plans)
            found = [outcome(state, probe) for _ in range(3)]
            patch.setattr(remembered, "plans", {})
            alone = outcome(state, probe)
            assert all(same(one, alone) for one in found), state


@settings(max_examples=10)
@given(st.data())
def test_no_plan_is_stale(data):
    check_no_plan_is_stale(data)


@pytest.mark.slow
@settings(max_examples=500)
@given(st.data())
def test_no_plan_is_stale_after_many_changes(data):
    check_no_plan_is_stale(data)


@pytest.fixture
def probe(monkeypatch):
    """The engine of every call; plans in a memory of their own."""
    made = Probe()
    monkeypatch.setitem(engines._engines, "cuda", made)
    monkeypatch.setattr(select, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(remembered, "plans", {})
    with interp_nn.use_engine("cuda"):
        yield made


@pytest.mark.parametrize("dims", [(), (2,)], ids=str)
@pytest.mark.parametrize("op", ["summary", "pair", "loss", "head"])
def test_prepared_calls_have_the_same_gradients(op, dims, probe):
    """Also where they are differentiated again, and where a saved tensor comes back in another layout."""
    x, b, bias, a, target = randn(*dims, 5, 4), randn(4, 3), randn(3), randn(2, 3), torch.arange(5) % 2
    target = target.expand(*dims, 5).contiguous()
    given, function = {
        "summary": ((x, b, bias), functional.summary),
        "pair": ((x, b), lambda x, b: torch.cat(functional.summary_pair(x, b))),
        "loss": ((x, b), lambda x, b: functional.summary_cross_entropy(x, b, target)),
        "head": ((x, b, a), lambda x, b, a: functional.summary_head_cross_entropy(x, b, a, None, target)),
    }[op]

    def gradients():
        y = function(*given)
        return torch.autograd.grad(y, given, torch.full_like(y, 2.0))

    want = gradients()
    before = probe.prepared
    for _ in range(3):
        torch.testing.assert_close(gradients(), want, rtol=0.0, atol=0.0)
    assert probe.prepared == before + 6
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t, lambda t: laid_out(t, "transposed") if t.dim() > 1 else t
    ):
        torch.testing.assert_close(gradients(), want)
    if op in ("summary", "loss") and not dims:
        assert gradgradcheck(function, given)


def test_views_of_a_weight_are_remembered(monkeypatch):
    """Each call has a b of its own, which a graph keeps."""
    monkeypatch.setattr(remembered, "plans", {})
    x, w, target, made, check = randn(5, 4), randn(3, 4), torch.arange(5) % 3, [], remembered.tensor_check
    monkeypatch.setattr(remembered, "tensor_check", lambda *given: made.append(1) or check(*given))
    kept = [(functional.summary(x, w.mT), functional.summary_cross_entropy(x, w.mT, target)) for _ in range(5)]
    assert len(kept) == 5 and len(made) == 2


def changed(b, how):
    """Change a parameter in its place, so that its address stays."""
    if how == "requires_grad":
        b.requires_grad_(not b.requires_grad)
    elif how == "values":
        with torch.no_grad():
            b.mul_(2.0)
    else:
        made = {
            "layout": laid_out(b.data, "transposed"),
            "dtype": b.data.to(torch.float32),
            "shape": b.data[:, :2].clone(),
        }
        b.data = made[how]
    return b


OF_A_B = {
    "summary": lambda x, b, a, target: functional.summary(x, b),
    "pair": lambda x, b, a, target: sum(functional.summary_pair(x, b)),
    "loss": lambda x, b, a, target: functional.summary_cross_entropy(x, b, target),
    "head": lambda x, b, a, target: functional.summary_head_cross_entropy(x, b, a, None, target),
}


@pytest.mark.parametrize("how", ["requires_grad", "values", "layout", "dtype", "shape", "another"])
@pytest.mark.parametrize("operators", [False, True])
@pytest.mark.parametrize("op", OF_A_B)
def test_a_b_that_changes_meets_no_stale_plan(op, operators, how, monkeypatch):
    """A call is remembered by the address of its parameter, and another one may lie there afterwards."""
    monkeypatch.setattr(remembered, "plans", {})
    if operators:
        monkeypatch.setattr(orders, "OPERATOR_OVERHEAD", 0)
        monkeypatch.setattr(select, "_prefers_autograd", lambda _: False)
    x, a, target = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64), torch.arange(6) % 2
    function, b = OF_A_B[op], torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

    def outcome():
        try:
            y = function(x, b, a, target)
            return y, *(torch.autograd.grad(y.sum(), b) if y.requires_grad else ())
        except (TypeError, ValueError) as error:
            return type(error), str(error)

    for _ in range(4):
        outcome()
    (place,) = (key for key in remembered.plans if type(key) is int)
    if how == "another":
        remembered.plans[id(one := torch.nn.Parameter(torch.randn(4, 2, dtype=torch.float64))) + place - id(b)] = (
            remembered.plans[place]
        )
        b = one
    else:
        changed(b, how)
    found = outcome()
    remembered.plans.clear()
    for got, want in zip(found, outcome(), strict=True):
        if not isinstance(want, torch.Tensor):
            assert got == want
        else:
            assert torch.equal(got, want) and got.stride() == want.stride() and got.requires_grad == want.requires_grad


def test_kinds_of_calls_with_one_b_are_kept_apart(monkeypatch):
    """Summary, pair and losses, with gradients and without, each with options of its own."""
    monkeypatch.setattr(remembered, "plans", {})
    x, a, c, b = (
        randn(6, 4),
        torch.randn(3, 3).double(),
        torch.randn(3).double(),
        torch.nn.Parameter(torch.randn(4, 3).double()),
    )
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    calls = [partial(function, x, b, a, target) for function in OF_A_B.values()]
    calls += [
        partial(functional.summary_cross_entropy, x, b, target, ignore_index=1),
        partial(functional.summary_cross_entropy, x, b, target, reduction="sum"),
        partial(functional.summary_cross_entropy, x, b, target, weights=(1.0, 1.0, 2.0)),
        partial(functional.summary_head_cross_entropy, x, b, a, c, target),
        partial(functional.summary_head_cross_entropy, x, b, a, c, target, reduction="none"),
        partial(functional.summary, x, b, c),
    ]
    want = [call() for call in calls]
    for grad in (True, False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                for call, value in zip(calls, want, strict=True):
                    got = call()
                    assert got.requires_grad is grad
                    torch.testing.assert_close(got, value)


def test_a_head_without_an_output_layer_is_no_pair(monkeypatch):
    monkeypatch.setattr(remembered, "plans", {})
    x, b, target = randn(5, 4), randn(4, 3), torch.arange(5) % 3
    for _ in range(3):
        functional.summary_cross_entropy(x, b, target)
        with pytest.raises(ValueError, match="output_weight: got shape None"):
            functional.summary_head_cross_entropy(x, b, None, None, target)


def test_sizes_that_are_symbols(monkeypatch):
    made = torch.fx.experimental.proxy_tensor.make_fx(lambda x, b: functional.summary(x, b), tracing_mode="symbolic")(
        torch.randn(5, 4), torch.randn(4, 3)
    )
    x, b = torch.randn(7, 4), torch.randn(4, 3)
    torch.testing.assert_close(made(x, b), naive(x, b))


def test_plans_are_remembered_after_thousands_of_shapes(monkeypatch):
    """The oldest makes room."""
    monkeypatch.setattr(remembered, "_MOST_PLANS", 4)
    monkeypatch.setattr(remembered, "plans", {})
    b, target = torch.randn(3, 2), torch.zeros(20, dtype=torch.int64)
    for n in range(1, 8):
        functional.summary(torch.randn(n, 3), b)
        functional.summary_cross_entropy(torch.randn(n, 3), b, target[:n])
    assert [key[0][0] for key in remembered.plans] == [6, 6, 7, 7]


def test_threads_share_a_small_memory_of_plans(monkeypatch):
    monkeypatch.setattr(remembered, "_MOST_PLANS", 3)
    monkeypatch.setattr(remembered, "plans", {})
    failed, b, target = [], torch.randn(3, 2), torch.zeros(40, dtype=torch.int64)

    def work(first):
        try:
            for n in range(first, first + 30):
                x = torch.randn(1 + n % 37, 3)
                torch.testing.assert_close(functional.summary(x, b), naive(x, b))
                given = target[: len(x)]
                torch.testing.assert_close(
                    functional.summary_cross_entropy(x, b, given), naive_cross_entropy(x, b, given)
                )
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(7 * i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed and len(remembered.plans) <= 3 + len(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_its_own_memory_of_plans():
    x, b = torch.randn(6, 3), torch.randn(3, 2)
    want = functional.summary(x, b)
    child = os.fork()
    if not child:
        good = torch.equal(functional.summary(x, b), want)
        remembered.plans.clear()
        os._exit(0 if good and torch.equal(functional.summary(x, b), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert remembered.plans


# Python


def test_few_python_functions():
    found = host.functions()
    assert found["SummaryLinear(x)"] <= 6 and found["SummaryHead.loss"] <= 12


@pytest.mark.parametrize("calls", [100, pytest.param(20_000, marks=pytest.mark.slow)])
def test_many_calls_leak_nothing(calls, operators_only):
    import gc

    x, b, target = torch.randn(4, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True), torch.arange(4) % 2

    def call():
        torch.autograd.grad(functional.summary(x, b).sum(), (x, b))
        torch.autograd.grad(functional.summary_cross_entropy(x, b, target), (x, b))

    for _ in range(3):  # the second is remembered by its tensors, the third by its b too
        call()
    gc.collect()
    before, plans = len(gc.get_objects()), len(remembered.plans)
    gc.disable()
    try:
        for _ in range(calls):
            call()
        grown = len(gc.get_objects()) - before
    finally:
        gc.enable()
    assert grown < 50 and len(remembered.plans) == plans
