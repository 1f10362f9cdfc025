"""Polynomials X b q(bᵀb) by the kernels: against fp64 in guarded memory, phase by phase, with their real barrier, refusals."""

import functools

import harness
import pytest
import torch
import torch.nn.functional as F
from engine_contract import OPS, OnlyLaunches
from harness import Launches, forced, inputs, targets
from interpreter import mutated, schedule
from support import errors, exceeds, law_floor, leaves, naive_loss
from torch.library import opcheck

from benchmarks.timing.tolerances import SPLIT_ULPS
from interp_nn import functional
from interp_nn.engines import eager, orders, select
from interp_nn.engines.triton import backward, engine, tiles

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COEFFICIENTS = ((1.5, -0.5), (1.9, -1.3, 0.4), (2.4, -2.9, 1.9, -0.5), (2.8, -4.3, 4.1, -2.1, 0.5))
KERNELS = ("summary", "pair", "pair_loss", "latent_loss", "flat_loss")
SHAPES = [(40, 30, 12), (33, 10, 20), (70, 40, 65), (17, 64, 100)]  # tall and wide
M = 7


def formula(x, b, c, a=None):
    """The pair (P, Y), power by power."""
    b = b if a is None else a * b
    p, g = x @ b, b.mT @ b
    y, power = c[0] * p, p
    for factor in c[1:]:
        power = power @ g
        y = y + factor * power
    return p.to(x.dtype), y.to(x.dtype)


def case(name, n, d, k, scale, reduction="mean"):
    """Return (fp64 inputs, call, formula): x, b and what else the function takes, with G of norm 1 at the scale."""
    given = inputs(n, d, k, M if "_loss" in name and name != "pair_loss" else None)
    given[1] /= torch.linalg.matrix_norm(given[1], 2) * (scale or 1)
    options = {} if scale is None else {"scale": torch.tensor(scale)}
    target = targets(n, M if len(given) == 4 else k)

    def reference(c, x, b, *rest):
        a = None if scale is None else torch.tensor(scale, dtype=c.dtype)
        p, y = formula(x, b, c, a)
        if name == "pair":
            return p, y
        if name == "summary":
            return (y + rest[0],)
        logits = [F.linear(t, *rest) for t in (p, y)] if rest else (p, y)
        return (naive_loss(*logits, target, reduction=reduction),)

    def call(c, x, b, *rest):
        b = harness.transposed(b)
        if name == "summary":
            return (functional.summary(x, b, *rest, polynomial=c, **options),)
        if name == "pair":
            return functional.summary_pair(x, b, polynomial=c, **options)
        function = functional.summary_head_cross_entropy if rest else functional.summary_cross_entropy
        return (function(x, b, *rest, target, reduction=reduction, polynomial=c, **options),)

    if name == "summary":
        given.append(torch.randn(k, dtype=torch.float64))
    return given, call, reference


def evaluate(function, coefficients, given, dtype):
    """Outputs and gradients, that of the coefficients last; these are fp32, or fp64 for fp64."""
    c = torch.tensor(coefficients).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    given = leaves(*given, dtype=dtype)
    out = function(c, *given)
    torch.manual_seed(5)
    upstream = [torch.rand(o.shape, dtype=torch.float64).to(torch.float16).to(o.dtype) + 0.5 for o in out]
    found = torch.autograd.grad(out, (*given, c), upstream)
    return [*(o.detach() for o in out), *found]


def head_order(name):
    return {"latent_loss": "logits_from_latent", "flat_loss": "logits_from_x"}.get(name)


@pytest.mark.parametrize(
    ("dtype", "degree"),
    [*((DTYPES[0], degree) for degree in range(1, 5)), *((DTYPES[1 + i % 2], i) for i in range(1, 5))],
    ids=str,
)
@pytest.mark.parametrize("name", KERNELS)
def test_values_and_gradients(name, dtype, degree, monkeypatch):
    """The error of a coefficient's gradient, a sum that may cancel, is relative to the norms of the sum's terms."""
    place = degree + DTYPES.index(dtype)
    reduction = ("mean", "none", "sum")[place % 3]
    scale = (None, 0.25)[degree // 2 % 2]
    given, call, reference = case(name, *SHAPES[place % 4], scale, reduction)
    rounded, coefficients = [t.to(dtype) for t in given], COEFFICIENTS[degree - 1]
    monkeypatch.setattr(orders, "head_order", lambda *_: head_order(name))
    monkeypatch.setattr(select, "can_form_logits_from_x", lambda *_: True)  # the interpreter has no shared memory
    same, exact = (evaluate(reference, coefficients, rounded, of) for of in (dtype, torch.float64))
    launches = Launches(monkeypatch)
    with forced():
        found = evaluate(call, coefficients, rounded, dtype)
    if name in ("summary", "pair"):
        assert launches.kernels == ["stream", f"{name}_backward"]
    else:
        late = dtype == torch.float16 or reduction == "none"
        assert launches.kernels == ([name, name] if late else [name, "scale_gradients"])
    largest = float(exact[-len(given)].norm() * rounded[1].double().norm())
    for i, (got, theirs, value) in enumerate(zip(found, same, exact, strict=True)):
        assert got.dtype == theirs.dtype
        ours, other = errors(got, value), errors(theirs, value)
        if i == len(exact) - 1:
            ours, other = ((float((t.double() - value).norm()) / largest, 0.0) for t in (got, theirs))
        why = exceeds(ours, other, law_floor(dtype, SPLIT_ULPS if dtype == torch.float32 else None))
        assert why is None, (i, why)


@pytest.fixture
def run(monkeypatch):
    """run(name, degree, seed) -> outputs and gradients in fp32, on a device with room for several programs."""

    def run(name, degree, seed, scratch=False, phases=False, programs=4, rows=16):
        monkeypatch.setattr(orders, "head_order", lambda *_: head_order(name))
        torch.manual_seed(1)
        given, call, reference = case(name, 50, 40, 20, 0.5)
        with monkeypatch.context() as patch, harness.device(patch, programs, True, scratch, rows), forced():
            Launches(patch, phases)
            with schedule(seed):
                found = evaluate(call, COEFFICIENTS[degree - 1], given, torch.float32)
        exact = evaluate(reference, COEFFICIENTS[degree - 1], [t.float() for t in given], torch.float64)
        return found, max(max(errors(f, e)) for f, e in zip(found, exact, strict=True))

    return run


@pytest.mark.parametrize("name", KERNELS)
def test_one_launch_under_random_schedules_and_phase_by_phase(name, run):
    found, error = run(name, 3, 1)
    assert error < 1e-5
    assert all(map(torch.equal, run(name, 3, None, phases=True)[0], found))
    assert run(name, 1, 2, programs=2)[1] < 1e-5


@pytest.mark.parametrize("name", ["pair_loss", "latent_loss"])
def test_scratch_rows(name, run):
    assert run(name, 2, 2, scratch=True)[1] < 1e-5


@pytest.mark.parametrize(
    ("name", "kernel", "old", "new"),
    [
        ("summary", tiles.horner, "v * tl.load(C_Q + i)", "v * tl.load(C_Q)"),
        ("pair", backward.add_derivative, "range(DEGREE - 1, 0,", "range(DEGREE - 2, 0,"),
        ("latent_loss", backward._times_symmetrized, "tl.trans(a)", "tl.trans(u2)"),
        ("pair_loss", backward.store_dq, "total * scale", "total"),
        ("flat_loss", tiles.scaled, "value * tl.load(SCALE)", "value"),
    ],
)
def test_a_mutant_is_noticed(name, kernel, old, new, run):
    with mutated(kernel, old, new):
        assert not run(name, 3, 1)[1] < 1e-5


@pytest.mark.parametrize(
    ("output", "needs"),
    [("summary", needs) for needs in ("x", "b", "bias", "c")]
    + [("P", "b"), ("P", "c"), ("Y", "x"), ("Y", "c"), ("loss", "b"), ("loss", "c"), ("head", "bias"), ("head", "c")],
)
def test_one_gradient_alone(output, needs):
    given = {"x": torch.randn(20, 12), "b": torch.randn(12, 6) / 4, "bias": torch.randn(6), "c": torch.randn(3)}
    target = targets(20, 6)
    given[needs].requires_grad_()

    def gradient():
        x, b, bias, c = given.values()
        if output == "summary":
            y = functional.summary(x, b, bias, polynomial=c)
        elif output == "loss":
            y = functional.summary_cross_entropy(x, b, target, polynomial=c)
        elif output == "head":
            y = functional.summary_head_cross_entropy(x, b, torch.eye(6), bias, target, polynomial=c)
        else:
            y = functional.summary_pair(x, b, polynomial=c)["PY".index(output)]
        return torch.autograd.grad(y.square().sum(), given[needs])[0] if y.requires_grad else torch.zeros(3)

    with forced():
        found = gradient()
    torch.testing.assert_close(found, gradient(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_second_derivatives(name, monkeypatch):
    given, call, reference = case(name, 12, 8, 5, 0.5)
    monkeypatch.setattr(orders, "head_order", lambda *_: head_order(name))

    def penalty(function, dtype):
        x, b, *rest = leaves(*given, dtype=dtype)
        c = torch.tensor(COEFFICIENTS[2], dtype=dtype).requires_grad_()
        grads = torch.autograd.grad(sum(o.square().sum() for o in function(c, x, b, *rest)), (x, c), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, b, c))

    with forced():
        found = penalty(call, torch.float32)
    for got, exact in zip(found, penalty(reference, torch.float64), strict=True):
        assert errors(got, exact)[0] < 1e-5


def test_one_launch_each_and_nothing_between(monkeypatch):
    names = []
    monkeypatch.setattr(engine, "launch", lambda made, *rest: names.append(made.kernel.__name__))
    monkeypatch.setattr(eager, "check_target", lambda *_: None)  # on the CPU only
    given, _, _ = case("summary", 24, 16, 6, None)
    x, b, bias = leaves(*given, dtype=torch.float32)
    c, scale = torch.tensor(COEFFICIENTS[1]).requires_grad_(), torch.tensor(0.5)
    upstream, target = torch.randn(24, 6), targets(24, 6)
    with forced(), OnlyLaunches():
        functional.summary(x, b, bias, polynomial=c, scale=scale).backward(upstream)
        assert names == ["stream", "summary_backward"]
        functional.summary_cross_entropy(x, b, target, polynomial=c, scale=scale)
        assert names[2:] == ["pair_loss"]


@pytest.mark.parametrize("shape", [(0, 8, 4), (5, 0, 4), (3, 2, 0)], ids=str)
def test_empty_tensors(shape):
    n, d, k = shape
    x, b, c = leaves(torch.ones(n, d), torch.ones(d, k), torch.ones(3))
    target = torch.zeros(n, dtype=torch.int64)

    def results():
        y = [functional.summary(x, b, polynomial=c), *functional.summary_pair(x, b, polynomial=c)]
        if k:
            y.append(functional.summary_cross_entropy(x, b, target, reduction="sum", polynomial=c))
        return [*y, *torch.autograd.grad(sum(t.sum() for t in y), (x, b, c))]

    with forced():
        found = results()
    torch.testing.assert_close(found, results())


@pytest.mark.parametrize("head", [False, True])
def test_opcheck(head):
    x, b, c, scale = torch.randn(20, 10), torch.randn(6, 10).t(), torch.randn(3), torch.tensor(0.5)
    target = targets(20, 4)
    check = functools.partial(opcheck, test_utils=("test_schema", "test_faketensor"))
    with forced():
        if head:
            rest = (torch.randn(4, 6), torch.randn(4), target, [1.0] * 3, -100, "mean", "triton:logits_from_latent")
            arguments = (x, b, *rest, [True] * 5, True, c, scale)
            check(OPS.summary_cross_entropy.default, arguments)
            check(OPS.summary_cross_entropy_backward.default, (torch.tensor(2.0), *arguments))
        else:
            check(OPS.summary.default, (x, b, torch.randn(6), "triton:(Xb)q", c, scale))
            _, saved = OPS.summary(x, b, None, "triton:(Xb)q", c, scale)
            arguments = (None, torch.randn(20, 6), x, b, saved, "triton:(Xb)q", [True] * 4 + [False], True, c, scale)
            check(OPS.summary_backward.default, arguments)


def test_what_the_kernels_lack_is_refused_by_name():
    x, b, wide = torch.randn(4, 6), torch.randn(6, 3), torch.randn(6, 129)
    target, learned = torch.zeros(4, dtype=torch.int64), torch.tensor(0.5, requires_grad=True)
    with forced():
        for call, reason in (
            (lambda: functional.summary(x, b, polynomial=(2,)), "degrees? 1 to 4: degree 0 has no Gram matrix"),
            (lambda: functional.summary(x, wide, polynomial=(2, 1)), "at most 128 columns, not 129: beyond, cuBLAS"),
            (lambda: functional.summary(x, b, polynomial=(2, 1), scale=learned), "no gradient of a polynomial's scale"),
            (lambda: functional.summary_cross_entropy(x, b, target, scale=learned), "no gradient of a polynomial's"),
        ):
            with pytest.raises(RuntimeError, match=f"the triton engine was asked for, but its .*{reason}"):
                call()
        with torch.no_grad():
            functional.summary(x, b, polynomial=(2, 1), scale=learned)
        _, saved = OPS.summary(x, b, None, "triton:(Xb)q", torch.ones(2), learned)
        with pytest.raises(ValueError, match="needs: got a gradient of the scale for the triton engine"):
            OPS.summary_backward(
                None, x @ b, x, b, saved, "triton:(Xb)q", [True] * 5, False, torch.ones(2), learned
            )  # fmt: skip
    options = ([1.0] * 3, -100, "mean", "eager:logits_from_x", [False] * 5, False)
    with pytest.raises(ValueError, match="plan: got the eager engine for the loss of a polynomial"):
        OPS.summary_cross_entropy(x, b, b.mT, None, target, *options, torch.ones(2))
