"""The operators as PyTorch sees them: schemas, fake kernels, autocast, what is saved, and which engine a backward runs on."""

import itertools
import threading
import types

import pytest
import torch
from support import CASES, OPERATOR_PLANS, apply, naive, operator, ops_summary
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

import interp_nn
from interp_nn import engines, functional
from interp_nn.engines import eager, orders, select
from interp_nn.engines.problem import Plan, Problem, plan_from_text, plan_to_text
from interp_nn.ops import remembered
from interp_nn.ops.summary import SummaryFunction

OPS = torch.ops.interp_nn
PAIR_PLANS = [plan for plan, pair in CASES if pair]


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


def weight(d, k):
    """b as a layer passes it: a transposed view."""
    return randn(k, d).t()


# opcheck


# opcheck takes half a second, so each plan is checked once; the other arguments vary in the most frequent plan. Most of the
# time is the trace of dynamic shapes, where the operator is one node in all plans: it is slow but for the most frequent one.
MOST = Plan("eager", "(Xb)G", saves=True)
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def checks(*cases, traced=()):
    """Each case with the quick checks, and with the trace: slow but for the most frequent plan and those in `traced`."""
    trace, found = "test_aot_dispatch_dynamic", []
    for plan, *rest in cases:
        slow = plan != MOST and plan not in traced
        found += [(plan, *rest, QUICK), pytest.param(plan, *rest, trace, marks=[pytest.mark.slow] * slow)]
    return found


@pytest.mark.parametrize(
    ("plan", "shape", "make_b", "bias", "which"),
    checks(*((plan, (200, 6, 4), weight, True) for plan in OPERATOR_PLANS), (MOST, (2, 3, 5), randn, False)),
)
def test_opcheck_summary(plan, shape, make_b, bias, which):
    n, d, k = shape
    given = randn(n, d), make_b(d, k), randn(k) if bias else None, plan_to_text(plan)
    opcheck(OPS.summary.default, given, test_utils=which)


@pytest.mark.parametrize(
    ("plan", "batch", "make_b", "which"),
    checks(*((plan, (2, 3), weight) for plan in PAIR_PLANS), (MOST, (), randn)),
)
def test_opcheck_pair(plan, batch, make_b, which):
    opcheck(OPS.summary_pair.default, (randn(*batch, 5), make_b(5, 3), plan_to_text(plan)), test_utils=which)


@pytest.mark.parametrize(
    ("plan", "needs", "transposed", "which"),
    checks(*((plan, (1, 1, 1), True) for plan in OPERATOR_PLANS), (MOST, (0, 1, 0), True), (MOST, (1, 1, 1), False)),
)
def test_opcheck_backward(plan, needs, transposed, which):
    x, b, dy = randn(2, 4, 5), weight(5, 3), randn(2, 4, 3)
    _, saved = OPS.summary(x, b, None, plan_to_text(plan))
    given = None, dy, x, b, saved, plan_to_text(plan), [bool(need) for need in needs], transposed
    opcheck(OPS.summary_backward.default, given, test_utils=which)


@pytest.mark.parametrize(
    ("plan", "outputs", "which"),
    checks(*((plan, "both") for plan in PAIR_PLANS), (MOST, "projection"), (MOST, "summary")),
)
def test_opcheck_backward_of_a_pair(plan, outputs, which):
    x, b = randn(4, 5), weight(5, 3)
    p, _, saved = OPS.summary_pair(x, b, plan_to_text(plan))
    saved = [p, *saved] if orders.saved_names(plan)[:1] == ("P",) else saved
    dp = None if outputs == "summary" else randn(4, 3)
    dy = None if outputs == "projection" else randn(4, 3)
    given = dp, dy, x, b, saved, plan_to_text(plan), [True, True, False], True
    opcheck(OPS.summary_backward.default, given, test_utils=which)


LOSSES = [
    *((plan, False) for plan in PAIR_PLANS),
    (Plan("eager", "logits_from_x"), True),
    (Plan("eager", "logits_from_latent"), True),
]


def loss_arguments(plan, head, reduction, needs, dtype=torch.float32):
    x, b, a, c = randn(6, 5), randn(5, 4), randn(3, 4), randn(3)
    target = torch.tensor([0, 2, -100, 1, 1, 0])
    a, c, needs = (a, c, needs) if head else (None, None, [*needs[:2], False, False])
    tensors = [None if t is None else t.to(dtype) for t in (x, b, a, c)]
    return (*tensors, target, [1.0, 0.5, 2.0], -100, reduction, plan_to_text(plan), needs, head)


@pytest.mark.parametrize(
    ("plan", "head", "reduction", "needs", "which"),
    checks(
        *(
            (plan, head, *rest)
            for plan, head in (LOSSES[0], *LOSSES[-2:])
            for rest in (("mean", [False, True, False, True]), ("none", [True] * 4))
        ),
        traced=[LOSSES[-1][0]],
    ),
    ids=str,
)
def test_opcheck_losses(plan, head, reduction, needs, which):
    arguments = loss_arguments(plan, head, reduction, needs)
    opcheck(OPS.summary_cross_entropy.default, arguments, test_utils=which)
    upstream = randn(6) if reduction == "none" else randn(())
    opcheck(OPS.summary_cross_entropy_backward.default, (upstream, *arguments), test_utils=which)


@pytest.mark.parametrize(
    "text", ["", "X(bG)", "eager", "eager:", "eager:Z", "eager:X(bG)*", "elsewhere:X(bG)", "eager:X(bG):saves"]
)
def test_a_string_that_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"plan: got .*, want "):
        OPS.summary(randn(3, 2), randn(2, 2), None, text)


def test_a_plan_survives_its_string():
    for plan in (*OPERATOR_PLANS, *(plan for plan, head in LOSSES if head)):
        assert plan_from_text(plan_to_text(plan)) == plan and plan_to_text(plan).isascii()


# Fake kernels


def flatten(result):
    return [t for part in result for t in (part if isinstance(part, (list, tuple)) else [part])]


def agrees(real, fake):
    for r, f in zip(flatten(real), flatten(fake), strict=True):
        assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)


@pytest.mark.parametrize("make_b", [randn, weight])
@pytest.mark.parametrize(("plan", "pair"), CASES)
def test_fake_and_meta_agree_with_real(plan, pair, make_b):
    token, transposed = plan_to_text(plan), make_b is weight

    def run(x, b):
        out = OPS.summary_pair(x, b, token) if pair else OPS.summary(x, b, None, token)
        saved = list(out[-1])
        if pair and orders.saved_names(plan)[:1] == ("P",):
            saved.insert(0, out[0])
        dp, dy = (out[0], out[1]) if pair else (None, out[0])
        return [*out, OPS.summary_backward(dp, dy, x, b, saved, token, [True] * 3, transposed)]

    inputs = [*((batch, torch.float32) for batch in ((), (0,), (2, 1), (140,))), ((9,), torch.bfloat16)]
    whole = itertools.product(inputs, ((6, 4), (3, 5)))
    for (batch, dtype), (d, k) in (*whole, *zip(inputs[1:4], ((4, 4), (1, 4), (4, 1)), strict=True)):
        x, b = randn(*batch, d).to(dtype), make_b(d, k).to(dtype)
        real = run(x, b)
        agrees(real, run(x.to("meta"), b.to("meta")))
        with FakeTensorMode() as mode:
            fake = run(mode.from_tensor(x), mode.from_tensor(b))
        agrees(real, fake)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("plan", "head"), LOSSES)
def test_fake_losses_agree_with_real(plan, head, reduction, dtype):
    arguments = loss_arguments(plan, head, reduction, [True] * 4, dtype)
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments]
    real = OPS.summary_cross_entropy(*arguments)
    agrees(real, OPS.summary_cross_entropy(*meta))
    agrees(
        [OPS.summary_cross_entropy_backward(real[0], *arguments)],
        [OPS.summary_cross_entropy_backward(real[0].to("meta"), *meta)],
    )


@pytest.mark.parametrize("plan", OPERATOR_PLANS)
def test_meta_tensors_carry_gradients(plan):
    x, b = (t.to("meta").requires_grad_() for t in (randn(2, 7, 5), randn(5, 3)))
    operator(x, b, None, plan).sum().backward()
    assert x.grad.shape == x.shape and b.grad.shape == b.shape


# Autocast


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype)


@pytest.mark.parametrize("shape", [(16, 8, 4), (2048, 64, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_equals_explicit_casts_bitwise(shape, dtype):
    n, d, k = shape
    given = randn(n, d), randn(d, k) / d**0.5, randn(k)
    upstream = randn(n, k).to(dtype)

    def run(function, to=None):
        leaves = [t.clone().requires_grad_() for t in given]
        out = function(*leaves if to is None else (t.to(to) for t in leaves))
        out = out if isinstance(out, tuple) else (out,)
        assert all(o.dtype == dtype for o in out)
        with torch.autocast("cpu", enabled=False):
            return [*out, *torch.autograd.grad(out, leaves, [upstream] * len(out), allow_unused=True)]

    for function in (functional.summary, lambda x, b, _: tuple(functional.summary_pair(x, b))):
        with autocast(dtype):
            got = run(function)
        for g, e in zip(got, run(function, dtype), strict=True):
            assert (g is None) == (e is None)
            assert g is None or (g.dtype == e.dtype and torch.equal(g, e))
        assert all(g is None or g.dtype == torch.float32 for g in got[-3:])


def test_autocast_on_the_losses():
    x, b, a, c = randn(6, 5), randn(5, 4), randn(3, 4), randn(3)
    t = torch.tensor([0, 2, 1, 1, 1, 0])
    given = [v.requires_grad_() for v in (x, b, a, c)]
    with autocast():
        loss = functional.summary_head_cross_entropy(*given, t)
    low = [v.detach().bfloat16().requires_grad_() for v in given]
    expected = functional.summary_head_cross_entropy(*low, t)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    for g, e in zip(torch.autograd.grad(loss, given), torch.autograd.grad(expected, low), strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, e.float())


@pytest.mark.parametrize("plan", OPERATOR_PLANS)
def test_backward_inside_autocast_is_the_backward_outside(plan):
    x, b = randn(6, 5).requires_grad_(), randn(5, 4).requires_grad_()
    y = operator(x, b, None, plan)
    outside = torch.autograd.grad(y.sum(), (x, b), retain_graph=True)
    with autocast():
        inside = torch.autograd.grad(y.sum(), (x, b))
    assert all(i.dtype == torch.float32 and torch.equal(i, o) for i, o in zip(inside, outside, strict=True))


def test_operators_called_directly_cast_under_autocast():
    x, b = randn(6, 5), randn(5, 4)
    with autocast():
        y, saved = OPS.summary(x, b, None, "eager:X(bG)")
        p, y2, _ = OPS.summary_pair(x, b, "eager:X(bG)")
    assert {t.dtype for t in (y, y2, p, *saved)} == {torch.bfloat16}
    assert torch.equal(y, OPS.summary(x.bfloat16(), b.bfloat16(), None, "eager:X(bG)")[0])


def test_autocast_leaves_float64_alone():
    x, b = randn(6, 5, dtype=torch.float64), randn(5, 4, dtype=torch.float64)
    with autocast():
        y = functional.summary(x, b)
        direct, _ = OPS.summary(x, b, None, "eager:X(bG)")
    assert y.dtype == direct.dtype == torch.float64
    torch.testing.assert_close(y, naive(x, b), rtol=1e-13, atol=1e-13)


# What is saved


def saved_tensors(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = function()
    assert saved
    return saved, out


SAVED_SHAPES = {
    "composed": (1024, 64, 16),
    "operator": (2048, 1024, 160),
    "few columns": (4096, 64, 7),
    "k > d, composed": (4096, 48, 96),
    "k > d, operator": (1024, 256, 512),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", SAVED_SHAPES)
def test_nothing_but_x_grows_with_n(kind, bias):
    n, d, k = SAVED_SHAPES[kind]
    assert (select.plan(n, d, k).autograd) == ("operator" not in kind)
    x, b = randn(n, d).requires_grad_(), weight(d, k).requires_grad_()
    saved, _ = saved_tensors(lambda: functional.summary(x, b, randn(k).requires_grad_() if bias else None))
    grown = [t for t in saved if n in t.shape and t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()]
    assert not grown
    assert all(t.numel() <= max(b.numel(), min(d, k) ** 2) for t in saved if n not in t.shape)


@pytest.mark.parametrize("kind", SAVED_SHAPES)
def test_a_pair_saves_its_own_outputs_at_most(kind):
    n, d, k = SAVED_SHAPES[kind]
    x, b = randn(n, d).requires_grad_(), randn(d, k).requires_grad_()
    saved, (p, _) = saved_tensors(lambda: functional.summary_pair(x, b))
    own = {t.untyped_storage().data_ptr() for t in (x, p)}
    assert not [t for t in saved if n in t.shape and t.untyped_storage().data_ptr() not in own]


@pytest.mark.parametrize("shape", [(3, 8, 5), (8, 8, 5), (500, 8, 5), (3, 5, 8), (5, 5, 8), (500, 5, 8)], ids=str)
@pytest.mark.parametrize("pair", [False, True])
def test_what_a_candidate_keeps_does_not_outgrow_b(shape, pair):
    n, d, k = shape
    x, b = randn(n, d), randn(d, k)
    for plan in orders.candidates(Problem(n, d, k, pair), autograd=False):
        token = plan_to_text(plan)
        saved = (OPS.summary_pair(x, b, token) if pair else OPS.summary(x, b, None, token))[-1]
        names = [name for name in orders.saved_names(plan) if not (pair and name == "P")]
        for name, t in zip(names, saved, strict=True):
            bound = {"G": k * k, "K": d * d}.get(name, d * k)
            assert t.numel() <= bound, (plan, name)


def test_inference_saves_nothing():
    x, b = randn(4096, 512), randn(512, 64)
    with torch.autograd.graph.saved_tensors_hooks(pytest.fail, lambda t: t):
        functional.summary(x, b)


# A backward belongs to its forward


@pytest.fixture
def probe(monkeypatch):
    """An engine that stands in for cuda, computes as eager does and notes each call."""
    calls = []

    def noted(name):
        def call(*args, **kwargs):
            calls.append(name)
            return getattr(eager, name)(*args, **kwargs)

        return call

    engine = types.SimpleNamespace(calls=calls, **{name: noted(name) for name in ("forward", "backward", "loss")})
    monkeypatch.setitem(engines._engines, "cuda", engine)
    monkeypatch.setattr(select, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(remembered, "plans", {})
    return engine


def test_backward_runs_on_the_engine_of_its_forward(probe):
    x, b = randn(300, 768).requires_grad_(), randn(768, 256).requires_grad_()
    with interp_nn.use_engine("cuda"):
        y = functional.summary(x, b)
    assert probe.calls == ["forward"]
    thread = threading.Thread(target=lambda: y.sum().backward())
    thread.start()
    thread.join()
    assert probe.calls == ["forward", "backward"]
    torch.testing.assert_close(b.grad, torch.autograd.grad(naive(x, b).sum(), b)[0], rtol=1e-3, atol=1.0)

    outside = functional.summary(x, b)
    with interp_nn.use_engine("cuda"):
        outside.sum().backward()
    assert probe.calls == ["forward", "backward"]


def test_a_loss_computed_late_stays_on_its_engine(probe):
    x, b = randn(6, 5).half().requires_grad_(), randn(5, 4).half().requires_grad_()
    with interp_nn.use_engine("cuda"):
        loss = functional.summary_cross_entropy(x, b, torch.zeros(6, dtype=torch.int64))
    loss.backward()
    assert probe.calls == ["loss", "loss"]


def test_gradients_off_skips_the_graph():
    x, b = randn(6, 5), randn(5, 4).requires_grad_()
    with torch.no_grad():
        y = apply(SummaryFunction, x, b, None, Plan("eager", "X(bG)"), False)[0]
    assert not y.requires_grad
    assert ops_summary.summary(x, b, None, Plan("eager", "X(bG)"))[0].requires_grad
