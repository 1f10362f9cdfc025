"""Polynomials X b q(bᵀb): values and derivatives in every plan, transforms, compilation, losses, constants and errors."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from support import DTYPES, errors, exceeds, law_floor, leaves, naive_loss, ops_summary
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacrev, jvp, vmap
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import interp_nn
from interp_nn import functional, linalg
from interp_nn.engines import devices, limits, orders
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.problem import POLYNOMIAL_ORDERS, Plan, Problem, plan_from_text, plan_to_text
from interp_nn.ops import polynomial as ops
from interp_nn.ops import validation

OPS = torch.ops.interp_nn
PLANS = orders.POLYNOMIAL_PLANS
ALL_PLANS = (*PLANS, *(Plan("eager", order, autograd=True) for order in POLYNOMIAL_ORDERS))
# Level by level those of the preconditioning layer of Qi, Ye et al. (level 0: a plain linear layer).
LEVELS = (
    (0.7,),
    (1.507, -0.507),
    (2.083, -1.643, 0.560),
    (2.909, -4.649, 4.023, -1.283),
    (3.625, -9.261, 14.097, -10.351, 2.890),
)
close = torch.testing.assert_close


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def formula(x, b, c, a=None, bias=None):
    """The pair (P, Y), power by power."""
    b = b if a is None else a * b
    p, g = x @ b, b.mT @ b
    y, power = c[0] * p, p
    for i in range(1, len(c)):
        power = power @ g
        y = y + c[i] * power
    return p, y if bias is None else y + bias


def around(c, shift):
    """The coefficients of the same polynomial in powers of G - shift I."""
    n = len(c)
    return torch.stack([sum(math.comb(j, i) * shift ** (j - i) * c[j] for j in range(i, n)) for i in range(n)])


def run(x, b, c, a=None, bias=None, plan=None, shift=0.0):
    """The pair and the summary of `functional`, or of a plan."""
    if plan is None:
        scale = 1.0 if a is None else a
        pair = functional.summary_pair(x, b, polynomial=c, scale=scale)
        return *pair, functional.summary(x, b, bias, polynomial=c, scale=scale)
    q = Polynomial(around(c, shift), a, shift)
    return *ops.summary_pair(x, b, q, plan), ops.summary(x, b, bias, q, plan)


# Values


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(60, 20, 9), (9, 20, 30), (80, 12, 20)], ids=str)
@pytest.mark.parametrize("degree", range(5))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_near_to_fp64_as_the_formula(dtype, degree, shape, scaled):
    """A scalar's gradient is a sum that may cancel, so its error is taken relative to the norms of the sum's terms."""
    n, d, k = shape
    b = randn(d, k)
    b = b / torch.linalg.matrix_norm(b, 2) * (5 if scaled else 1)
    given = [t.to(dtype) for t in (randn(n, d), b)]
    given += [torch.tensor(LEVELS[degree]), *([torch.tensor(0.2)] if scaled else [])]
    upstream = [randn(n, k).to(dtype) for _ in range(2)]
    results = []
    for function, to in ((run, None), (formula, None), (formula, torch.float64)):
        inputs = leaves(*given, dtype=to)
        pair = function(*inputs)[:2]
        found = torch.autograd.grad(pair, inputs, [u.to(to or dtype) for u in upstream])
        results.append([*(t.detach() for t in pair), *found])
    largest = float(results[2][3].norm() * given[1].double().norm())
    for i, (got, same, exact) in enumerate(zip(*results, strict=True)):
        assert got.dtype == (dtype if i < 4 else torch.float32)
        if i < 4:
            why = exceeds(errors(got, exact), errors(same, exact), law_floor(dtype))
        else:
            ours, theirs = (float((t.double() - exact).norm()) / largest for t in (got, same))
            why = exceeds((ours, 0.0), (theirs, 0.0), law_floor(dtype) + law_floor(torch.float32))
        assert why is None, (i, why)


FORMS = {
    "pair": lambda x, b, **q: functional.summary_pair(x, b, **q).summary,
    "weight": lambda x, b, **q: x @ functional.effective_weight(b, **q),
    "tensor scale": lambda x, b, polynomial: functional.summary(x, b, polynomial=polynomial, scale=torch.ones(())),
    "as one row": lambda x, b, **q: torch.cat([functional.summary(row, b, **q) for row in x.split(1)]),
    "operator": lambda x, b, polynomial: ops.summary(x, b, None, centred(polynomial), PLANS[1]),
    "compiled": lambda x, b, **q: torch.compile(functional.summary, backend="aot_eager", fullgraph=True)(x, b, **q),
}


def centred(c):
    numbers, shift = linalg.centred(c)
    return Polynomial(torch.tensor(numbers), None, shift)


@pytest.mark.usefixtures("_fresh")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.parametrize("form", ["summary", "vmap", *FORMS])
@pytest.mark.parametrize("level", [3, 4])
def test_numbers_that_cancel_are_taken_around_a_half(level, form):
    """Their terms are up to ten times a value, for a b of norm 1; all results are nearer to fp64 than the formula's."""
    b = torch.linalg.qr(randn(96, 64)).Q
    x, dy = randn(128, 96), randn(128, 64).float()
    results = []
    for function, dtype in ((None, torch.float32), (formula, torch.float32), (formula, torch.float64)):
        inputs = leaves(x, b, dtype=dtype)
        if function is not None:
            y = function(*inputs, LEVELS[level])[1]
        elif form == "vmap":
            y = vmap(lambda x, b=inputs[1]: functional.summary(x, b, polynomial=LEVELS[level]))(inputs[0])
        else:
            y = FORMS.get(form, functional.summary)(*inputs, polynomial=LEVELS[level])
        results.append([y.detach(), *torch.autograd.grad(y, inputs, dy.to(dtype))])
    for got, same, exact in zip(*results, strict=True):
        assert errors(got, exact)[0] <= 0.75 * errors(same, exact)[0]


def test_other_numbers_stay_as_they_are():
    """Where the signs do not alternate there is nothing to gain, and for a small b much to lose."""
    for c in ((0.0, 1.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.0, 0.0, -1.0), (1.5, -0.5), (2.0,), (1.0, -4.0, 4.0)):
        assert linalg.centred(c) == (c, 0.0)
    for c in LEVELS[2:]:
        numbers, shift = linalg.centred(c)
        close(torch.tensor(numbers), around(torch.tensor(c), 0.5))
        assert shift == 0.5
        for size in (1e-6, 1e-3, 30.0):  # of eigenvalues far from it
            x, b = torch.eye(8), torch.linalg.qr(torch.randn(8, 8)).Q * size**0.5
            got, same, exact = (
                f(x, b, c)[1] for f in (run, formula, lambda *t: formula(*(u.double() for u in t[:2]), t[2]))
            )
            assert exceeds(errors(got, exact), errors(same, exact), law_floor(torch.float32)) is None


@pytest.mark.parametrize("shape", [(7, 5, 3), (3, 4, 6)], ids=str)
@pytest.mark.parametrize(("degree", "shift"), [*((i, 0.0) for i in range(1, 5)), (2, 0.5), (4, 0.3)])
@pytest.mark.parametrize("plan", ALL_PLANS)
def test_every_plan_has_the_formulas_derivatives_to_second_order(plan, degree, shift, shape):
    n, d, k = shape
    given = leaves(randn(n, d), randn(d, k), randn(degree + 1), torch.tensor(0.7).double(), randn(k))
    p, y = formula(*given)
    wanted, got = (p, y - given[-1], y), run(*given, plan=plan, shift=shift)
    close(got, wanted)
    upstream = [randn(n, k) for _ in range(3)]
    plain = torch.autograd.grad(got, given, upstream, retain_graph=True)
    first, expected = (torch.autograd.grad(o, given, upstream, create_graph=True) for o in (got, wanted))
    close(plain, expected)
    close(first, expected)
    second = [torch.autograd.grad(sum(g.square().sum() for g in grads), given[:4]) for grads in (first, expected)]
    close(*second)


@pytest.mark.parametrize("needs", ["x", "b", "c", "a", "bias"])
@pytest.mark.parametrize("plan", PLANS)
def test_the_gradient_of_one_input(plan, needs):
    given = [randn(4, 5), randn(5, 3), randn(5), torch.tensor(0.7).double(), randn(3)]
    wanted = given[["x", "b", "c", "a", "bias"].index(needs)].requires_grad_()
    for output in (1, 2) if needs != "bias" else (2,):
        y, exact = run(*given, plan=plan)[output], formula(*given)[1] - (given[4] if output == 1 else 0)
        close(*(torch.autograd.grad(o.square().sum(), wanted) for o in (y, exact)))


@pytest.mark.parametrize("plan", PLANS)
def test_a_pair_of_which_the_projection_alone_is_used(plan):
    given = leaves(randn(4, 5), randn(5, 3), randn(4), torch.tensor(0.7).double())
    projections = run(*given, plan=plan)[0], formula(*given)[0]
    got, wanted = (torch.autograd.grad(p.sin().sum(), given, allow_unused=True) for p in projections)
    close([*got[:2], got[3]], [*wanted[:2], wanted[3]])
    assert not got[2].any() and wanted[2] is None


def pc_layer(w, level):
    """The published transform of a weight, by the smaller of its Gram matrices."""
    wide = w.shape[0] < w.shape[1]
    g = w @ w.T if wide else w.T @ w
    eye = torch.eye(len(g), dtype=w.dtype)
    if level == 1:
        q = 1.507 * eye - 0.507 * g
    elif level == 2:
        q = 2.083 * eye + g @ (-1.643 * eye + 0.560 * g)
    elif level == 3:
        q = 2.909 * eye + g @ (-4.649 * eye + g @ (4.023 * eye - 1.283 * g))
    else:
        q = 3.625 * eye + g @ (-9.261 * eye + g @ (14.097 * eye + g @ (-10.351 * eye + 2.890 * g)))
    return q @ w if wide else w @ q


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_the_published_preconditioning_layer(level, shape):
    w, x = randn(*shape), randn(20, shape[1])
    norm = float(torch.linalg.matrix_norm(w, 2))
    w.requires_grad_()
    exact = F.linear(x, pc_layer(w / norm, level))
    y = functional.summary(x, w.t(), polynomial=LEVELS[level], scale=1 / norm)
    close(y, exact, rtol=1e-12, atol=1e-13)
    close(*(torch.autograd.grad(o.square().sum(), w)[0] for o in (y, exact)), rtol=1e-12, atol=1e-13)
    close(functional.effective_weight(w.t(), polynomial=LEVELS[level], scale=1 / norm), pc_layer(w / norm, level).T)


@pytest.mark.parametrize("polynomial", [(0, 1), [0.0, 1.0]], ids=str)
def test_the_summary_by_name_has_the_summarys_bits(polynomial):
    x, b, bias = leaves(torch.randn(40, 12), torch.randn(12, 5), torch.randn(5))
    for function in (functional.summary, lambda x, b, _, **q: torch.cat(functional.summary_pair(x, b, **q))):
        found = []
        for options in ({}, {"polynomial": polynomial, "scale": 1}):
            y = function(x, b, bias, **options)
            found.append([y, *torch.autograd.grad(y.square().sum(), (x, b))])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert torch.equal(functional.effective_weight(b, polynomial=polynomial), functional.effective_weight(b))


@pytest.mark.parametrize("shape", [(9, 6, 4), (9, 4, 6), (3, 5, 7)], ids=str)
def test_known_polynomials(shape):
    x, b = randn(*shape[:2]), randn(*shape[1:])
    g = b.T @ b
    close(functional.summary(x, b, polynomial=(0, 0, 1)), x @ b @ g @ g)
    close(functional.summary(x, b, polynomial=(0, 1, 0, 0)), functional.summary(x, b))
    close(functional.summary(x, b, polynomial=(0, 1), scale=0.5), functional.summary(x, b / 2))
    close(functional.summary(x, b, polynomial=(1,)), x @ b)
    close(functional.effective_weight(b, polynomial=(1, 0, 2)), b + 2 * b @ g @ g)
    lead = x.view(1, *x.shape).expand(2, *x.shape)
    close(functional.summary(lead, b, polynomial=(1, 2)), functional.summary(x, b, polynomial=(1, 2)).expand(2, -1, -1))


@pytest.mark.parametrize("degree", range(5))
def test_empty_and_rank_deficient(degree):
    for n, d, k in ((0, 5, 3), (3, 0, 2), (3, 5, 0), (0, 0, 0)):
        x, b = leaves(torch.randn(n, d), torch.randn(d, k))
        y = sum(run(x, b, torch.tensor(LEVELS[degree]), torch.tensor(2.0)))
        assert y.shape == (n, k) and not y.any()
        assert [g.shape for g in torch.autograd.grad(y.sum(), (x, b))] == [x.shape, b.shape]
    x, b = randn(4, 5), randn(5, 1) @ randn(1, 3)
    close(run(x, b, randn(degree + 1) * 0 + 1)[1], formula(x, b, torch.ones(degree + 1))[1])


# Derivatives and transforms


@pytest.mark.parametrize("plan", [None, *PLANS])
def test_derivatives_by_finite_differences(plan):
    n, d, k = (2, 2, 3) if plan is not None and plan.order == "X(q(K)b)" else (2, 3, 2)
    inputs = leaves(randn(n, d), randn(d, k) / 2, randn(4), torch.tensor(0.7).double(), randn(k))
    options = {"check_batched_grad": True, "raise_exception": True}
    function = lambda *given: run(*given, plan=plan, shift=0.5)[1:]  # noqa: E731
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, **options)


def test_transforms_of_torch_func():
    given = [randn(6, 4), randn(4, 3), randn(3), torch.tensor(0.6).double()]

    def got(*given):
        return run(*given)[2]

    def wanted(*given):
        return formula(*given)[1]

    tangents = tuple(torch.randn_like(t) for t in given)
    close(*(jvp(f, tuple(given), tangents) for f in (got, wanted)))
    close(*(jacrev(f, argnums=(0, 1, 2, 3))(*given) for f in (got, wanted)))
    close(*(hessian(lambda *t, f=f: f(*t).sum(), argnums=(1, 2, 3))(*given) for f in (got, wanted)))
    for which in ((0,), (1,), (2,), (3,), (1, 3), (0, 1, 2, 3)):
        batched = [torch.stack([t, 2 * t, -t]) if i in which else t for i, t in enumerate(given)]
        dims = tuple(0 if i in which else None for i in range(4))
        close(*(vmap(f, dims)(*batched) for f in (got, wanted)))
    per_row = [vmap(torch.func.grad(lambda b, x, f=f: f(x, b, *given[2:]).sum()), (None, 0)) for f in (got, wanted)]
    close(*(f(given[1], given[0]) for f in per_row))


# Compilation


@pytest.fixture
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def summaries(x, b, c, a):
    numbers = functional.summary(x, b, polynomial=(1.5, -0.5, 0.2), scale=0.5)
    pair = functional.summary_pair(x, b, polynomial=c, scale=a)
    return torch.cat((numbers, functional.summary(x, b, polynomial=c, scale=a), *pair))


def loss(x, b, c, a):
    return functional.summary_cross_entropy(x, b, torch.arange(x.shape[0]) % 3, polynomial=c, scale=a)


@pytest.mark.usefixtures("_fresh")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.parametrize("call", [summaries, loss])
def test_compiled_equals_eager(call):
    given = [torch.randn(8, 5), torch.randn(5, 3) / 2, torch.tensor(LEVELS[2]), torch.tensor(0.6)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, call):
        inputs = leaves(*given)
        y = function(*inputs)
        found.append([y, *torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)])
    close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_fresh")
def test_compiled_transforms():
    x, b = torch.randn(8, 5), torch.randn(5, 3) / 2

    def gradient(b):
        return torch.func.grad(lambda b: functional.summary(x, b, polynomial=(1, 2, 3)).square().sum())(b)

    close(torch.compile(gradient, fullgraph=True, backend="aot_eager")(b), gradient(b), rtol=1e-5, atol=1e-5)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, x, b, c):
            return functional.summary(x, b, polynomial=c) + functional.summary(x, b, polynomial=(1, 2, 3), scale=0.5)

    given = torch.randn(8, 5), torch.randn(5, 3), torch.randn(4)
    shapes = {0: torch.export.Dim("n")}, None, None
    program = torch.export.export(Layer(), given, dynamic_shapes=shapes, strict=False)
    close(program.module()(given[0][:2], *given[1:]), Layer()(given[0][:2], *given[1:]))


# The operators


def arguments(plan, d=5, k=3):
    return torch.randn(4, d), torch.randn(k, d).t(), plan_to_text(plan), torch.randn(4), torch.tensor(0.5)


def test_opcheck():
    x, b, text, c, a = arguments(PLANS[0])
    opcheck(OPS.summary.default, (x, b, torch.randn(3), text, c, a, 0.5))
    saved = OPS.summary(x, b, None, text, c, a)[1]
    opcheck(OPS.summary_backward.default, (None, torch.randn(4, 3), x, b, saved, text, [True] * 5, True, c, a, 0.5))


@pytest.mark.parametrize("plan", PLANS)
def test_fake_tensors_agree_with_real(plan):
    def outputs(x, b, c, a):
        y, saved = OPS.summary(x, b, None, plan_to_text(plan), c, a)
        pair = OPS.summary_pair(x, b, plan_to_text(plan), c, a)
        grads = OPS.summary_backward(None, y, x, b, saved, plan_to_text(plan), [True] * 5, True, c, a)
        return [y, *saved, *pair[:2], *pair[2], *grads]

    for d, k in ((5, 3), (3, 5), (4, 1)):
        x, b, _, c, a = arguments(plan, d, k)
        real, meta = outputs(x, b, c, a), outputs(*(t.to("meta") for t in (x, b, c, a)))
        with FakeTensorMode() as mode:
            fake = outputs(*map(mode.from_tensor, (x, b, c, a)))
        for r, m, f in zip(real, meta, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (m.shape, m.stride(), m.dtype) == (f.shape, f.stride(), f.dtype)


@pytest.mark.parametrize(
    ("plan", "q", "message"),
    [
        ("eager:(Xb)G", (torch.ones(2), None), r"plan: got order \(Xb\)G, want one of \(Xb\)q saves, X\(bq\), "),
        ("eager:X(bq)", (), r"plan: got order X\(bq\), want one of \(Xb\)G, "),
        ("triton:X(bq)", (torch.ones(2), None), r"plan: got order X\(bq\), want one of \(Xb\)q, \(Xb\)q saves"),
        ("eager:(Xb)q", (torch.ones(2), None), r"plan: got order \(Xb\)q, want one of \(Xb\)q saves, X\(bq\), "),
        ("eager:X(bq)", (torch.ones(1), None), r"coefficients: got shape \(1,\), want \(2,\) to \(5,\)"),
        ("eager:X(bG)", (None, torch.ones(())), "scale: got a tensor without coefficients"),
    ],
)
def test_arguments_of_an_operator_that_do_not_fit(plan, q, message):
    with pytest.raises(ValueError, match=message):
        OPS.summary(torch.ones(3, 2), torch.ones(2, 2), None, plan, *q)


@pytest.mark.parametrize("call", [lambda *q: run(*q)[2], lambda *q: torch.cat(run(*q)[:2])])
def test_autocast_leaves_the_coefficients_alone(call):
    x, b, c, a = leaves(torch.randn(300, 64), torch.randn(64, 48) / 12, torch.tensor(LEVELS[4]), torch.tensor(0.7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(x, b, c, a)
    wanted = call(x.bfloat16(), b.bfloat16(), c, a)
    assert torch.equal(got, wanted)
    found = [torch.autograd.grad(y.float().sum(), (x, b, c, a)) for y in (got, wanted)]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        direct = OPS.summary(x.detach(), b.detach(), None, "eager:X(bq)", c.detach(), a.detach())[0]
    plain = OPS.summary(x.detach().bfloat16(), b.detach().bfloat16(), None, "eager:X(bq)", c.detach(), a.detach())[0]
    assert torch.equal(direct, plain)


@pytest.mark.parametrize("shape", [(4096, 32, 16), (2048, 1024, 160), (1024, 64, 128), (16, 64, 48)], ids=str)
def test_nothing_saved_outgrows_the_parameter(shape):
    n, d, k = shape
    x, b = leaves(torch.randn(n, d), torch.randn(d, k) / 40)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.summary(x, b, polynomial=LEVELS[3], scale=0.5)
    own = x.untyped_storage().data_ptr()
    assert saved and all(t.numel() <= d * k or t.untyped_storage().data_ptr() == own for t in saved)
    with torch.autograd.graph.saved_tensors_hooks(pytest.fail, lambda t: t):
        functional.summary(x.detach(), b.detach(), polynomial=LEVELS[3], scale=0.5)


# Plans and engines


@pytest.mark.parametrize("degree", range(5))
def test_the_counts_of_a_plan_are_those_of_its_products(degree):
    """Compared with what PyTorch computes, inside the operators too."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "interp_nn":
                with self:
                    return getattr(ops_summary, f"_{function.overloadpacket.__name__}")(*args)
            self.count += function.overloadpacket.__name__ in ("mm", "addmm", "matmul")
            return function(*args, **(kwargs or {}))

    for pair in (False, True):
        problem = Problem(8, 6, 7, pair, degree=degree)
        for plan in orders.candidates(problem):
            x, b = leaves(torch.randn(8, 6), torch.randn(6, 7))
            q = Polynomial(torch.randn(degree + 1), None)
            with Products() as products:
                out = ops.summary_pair(x, b, q, plan) if pair else (ops.summary(x, b, None, q, plan),)
                torch.autograd.grad(out, (x, b), out)
            assert products.count == orders.flops_and_products(plan, problem)[1], plan


def test_every_order_is_the_cheapest_of_some_problem():
    sizes = [(n, d, k) for n in (8, 300, 4096) for d in (64, 512) for k in (16, 100, 2048)]
    for degree in (1, 2, 4):
        found = {orders.cheapest(Problem(*s, degree=degree)).order for s in sizes}
        assert found <= set(POLYNOMIAL_ORDERS) and {"X(bq)", "X(q(K)b)"} <= found
    assert {orders.cheapest(Problem(*s, degree=1)).order for s in sizes} == set(POLYNOMIAL_ORDERS)


def test_a_plan_shows_its_polynomial_order():
    plan = interp_nn.plan(300, 768, 256, degree=2)
    assert (plan.engine, plan.order, plan.saves) == ("eager", "(Xb)q", True)
    assert "MFLOP in 10 products; cost of the others: X(bq)" in str(plan) and "saves P" in str(plan)
    assert interp_nn.plan(300, 768, 256, degree=0).order == "X(bq)"
    assert interp_nn.plan(300, 768, 256, degree=4, pair=True, classes=256).autograd
    for plan in PLANS:
        assert plan_from_text(plan_to_text(plan)) == plan and plan_to_text(plan).isascii()
    for degree in (5, -1, True, "2"):
        with pytest.raises(ValueError, match="plan: degree must be an integer from 0 to 4"):
            interp_nn.plan(3, 2, 2, degree=degree)


def test_a_plan_for_a_gpu_has_the_kernels_where_they_compute_the_polynomial(monkeypatch):
    def plan(k=64, degree=2, n=65536, **options):
        return interp_nn.plan(n, 512, k, degree=degree, dtype=torch.bfloat16, device="sm_90", **options)

    for options in ({}, {"pair": True}, {"pair": True, "classes": 64}):
        found = plan(**options)
        assert (found.engine, found.order, found.saves) == ("triton", "(Xb)q", bool(options)) and found.tiles
    head = plan(classes=10)
    assert (head.engine, head.order) == ("triton", "logits_from_x")
    assert interp_nn.plan(65536, 512, 64, dtype=torch.bfloat16, device="sm_90", classes=10).seconds == head.seconds
    for options, reason in (
        ({"degree": 0}, "not triton: its kernels compute polynomials of degree 1 to 4: degree 0 has no Gram matrix"),
        ({"k": 129, "pair": True, "classes": 129}, "not triton: its polynomials have at most 128 columns, not 129"),
        ({"k": 129}, "cuBLAS is faster than a kernel of one launch for k > 128"),
    ):
        found = plan(**options)
        assert found.engine == "eager" and reason in found.reason
    problem = Problem(8, 4, 3, spec=devices.spec_for((9, 0)), device="sm_90", degree=2, need_scale=True)
    assert limits.unsupported_reason("triton", problem) == "its kernels have no gradient of a polynomial's scale"
    assert limits.unsupported_reason("triton", problem._replace(need_scale=False)) is None
    monkeypatch.setattr(interp_nn.engines.select, "requested", lambda: "triton")
    for pair in (False, True):
        found = interp_nn.engines.select.choose(problem._replace(need_scale=False, pair=pair), any_rows=True)
        assert found == Plan("triton", "(Xb)q", pair)


@pytest.mark.parametrize("engine", ["triton", "cuda"])
def test_an_engine_without_kernels_for_a_polynomial_names_it(engine, monkeypatch):
    monkeypatch.setattr(interp_nn.engines.select, "requested", lambda: engine)
    x, b, target = torch.randn(3, 2), torch.randn(2, 2), torch.zeros(3, dtype=torch.int64)
    for call, reason in (
        (lambda: functional.summary(x, b, polynomial=(2.0,)), "degree 0 has no Gram matrix"),
        (lambda: functional.summary(x, torch.randn(2, 129), scale=0.5), "at most 128 columns, not 129"),
        (
            lambda: functional.summary_pair(x, b, scale=torch.ones((), requires_grad=True)),
            "no gradient of a polynomial's",
        ),
        (lambda: functional.summary_cross_entropy(x, b, target, polynomial=(1.0,)), "degree 0 has no Gram matrix"),
    ):
        with pytest.raises(RuntimeError, match=f"the {engine} engine was asked for, but .*{reason}"):
            call()


# Losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(12, 9, 4), (12, 4, 30)], ids=str)
def test_losses(shape, reduction, dtype):
    n, d, k = shape
    x, b, a = randn(n, d), randn(d, k) / (d + k), randn(3, k)
    target = (torch.arange(n) % 4).where(torch.arange(n) % 4 < 3, -100)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.float16 else {}
    for degree in range(5):
        c, scale = randn(degree + 1), torch.tensor(0.6).double()
        options = {"polynomial": c, "scale": scale, "reduction": reduction}
        for head in (False, True):
            given = leaves(x, b, *([a] if head else []), dtype=dtype)
            exact = leaves(*given, c, scale, dtype=torch.float64)
            options |= dict(zip(("polynomial", "scale"), leaves(c, scale), strict=True))
            bias = torch.ones(3).to(dtype)
            if head:
                got = functional.summary_head_cross_entropy(*given, bias, target, **options)
            else:
                got = functional.summary_cross_entropy(*given, target, **options)
            p, y = formula(*exact[:2], *exact[-2:])
            logits = [F.linear(t, exact[2], bias.double()) for t in (p, y)] if head else (p, y)
            wanted = naive_loss(*logits, target, reduction=reduction)
            close(got.double(), wanted, **tolerance)
            grads = torch.autograd.grad(got.sum(), (*given, options["polynomial"], options["scale"]))
            close([g.double() for g in grads], list(torch.autograd.grad(wanted.sum(), exact)), **tolerance)


# Constants


def test_numbers_become_one_tensor_that_belongs_to_no_mode(monkeypatch):
    monkeypatch.setattr(validation, "_constants", {})
    x, b = leaves(torch.randn(4, 3), torch.randn(3, 2))

    def call(x=x, b=b):
        return functional.summary(x, b, polynomial=(3, 2, 1), scale=0.5)

    with FakeTensorMode() as mode:
        call(mode.from_tensor(x), mode.from_tensor(b))
    with torch.inference_mode():
        call()
    torch.func.grad(lambda b: call(b=b).sum())(b)
    vmap(lambda x: call(x))(x.detach())
    call().sum().backward()
    kept = dict(validation._constants)
    assert [key[:2] for key in kept] == [((3.0, 2.0, 1.0), torch.float32), (0.5, torch.float32)]
    assert all(type(t) is torch.Tensor and not t.is_inference() for t in kept.values())
    call()
    assert all(validation._constants[key] is t for key, t in kept.items())
    monkeypatch.setattr(validation, "_MOST_CONSTANTS", 2)
    close(functional.summary(x, b, polynomial=(1, 1)), formula(x, b, (1, 1))[1])
    assert len(validation._constants) == 2


# Errors

WANT = "want 1 to 5 coefficients, the constant first: finite real numbers, or a 1-D tensor"
NUMBER = "want a finite real number, or a 0-dim tensor"
REAL = "want float64, float32, bfloat16 or float16"
BAD = [
    ({"polynomial": ()}, ValueError, f"polynomial: got 0 numbers, {WANT}"),
    ({"polynomial": (1, 2, 3, 4, 5, 6)}, ValueError, f"polynomial: got 6 numbers, {WANT}"),
    ({"polynomial": torch.ones(6)}, ValueError, f"polynomial: got shape (6,), {WANT}"),
    ({"polynomial": torch.ones(0)}, ValueError, f"polynomial: got shape (0,), {WANT}"),
    ({"polynomial": torch.ones(2, 2)}, ValueError, f"polynomial: got shape (2, 2), {WANT}"),
    ({"polynomial": torch.ones(())}, ValueError, f"polynomial: got shape (), {WANT}"),
    ({"polynomial": "pc-1"}, TypeError, f"polynomial: got 'pc-1', {WANT}"),
    ({"polynomial": 1.0}, TypeError, f"polynomial: got 1.0, {WANT}"),
    ({"polynomial": None}, TypeError, f"polynomial: got None, {WANT}"),
    ({"polynomial": (1, 2j)}, TypeError, f"polynomial: got (1, 2j), {WANT}"),
    ({"polynomial": (1, True)}, TypeError, f"polynomial: got (1, True), {WANT}"),
    ({"polynomial": (1, torch.ones(()))}, TypeError, f"polynomial: got (1, tensor(1.)), {WANT}"),
    ({"polynomial": (1, math.nan)}, ValueError, f"polynomial: got (1, nan), {WANT}"),
    ({"polynomial": (1, 10**400)}, ValueError, f"polynomial: got a number beyond the range of floats, {WANT}"),
    ({"polynomial": torch.ones(2).long()}, TypeError, f"polynomial: got dtype torch.int64, {REAL}"),
    ({"polynomial": torch.ones(2) * 1j}, TypeError, f"polynomial: got dtype torch.complex64, {REAL}"),
    ({"polynomial": torch.ones(2, device="meta")}, ValueError, "polynomial: got device meta, want cpu, the device of"),
    ({"scale": "1"}, TypeError, f"scale: got '1', {NUMBER}"),
    ({"scale": None}, TypeError, f"scale: got None, {NUMBER}"),
    ({"scale": 1j}, TypeError, f"scale: got 1j, {NUMBER}"),
    ({"scale": math.inf}, ValueError, f"scale: got inf, {NUMBER}"),
    ({"scale": torch.ones(1)}, ValueError, f"scale: got shape (1,), {NUMBER}"),
    ({"scale": torch.ones(()).long()}, TypeError, f"scale: got dtype torch.int64, {REAL}"),
    ({"scale": torch.ones((), device="meta")}, ValueError, "scale: got device meta, want cpu, the device of"),
]
X, B, TARGET = torch.ones(3, 4), torch.ones(4, 2), torch.zeros(3, dtype=torch.int64)
FUNCTIONS = {
    "summary": lambda **q: functional.summary(X, B, **q),
    "pair": lambda **q: functional.summary_pair(X, B, **q),
    "loss": lambda **q: functional.summary_cross_entropy(X, B, TARGET, **q),
    "head": lambda **q: functional.summary_head_cross_entropy(X, B, torch.ones(5, 2), None, TARGET, **q),
    "weight": lambda **q: functional.effective_weight(B, **q),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_polynomials_and_scales(options, error, message):
    for function in FUNCTIONS.values():
        with pytest.raises(error, match="^" + re.escape(message)):
            function(**options)


def test_a_tensor_may_hold_nan():
    """Its values are read on its device alone."""
    assert functional.summary(X, B, polynomial=torch.tensor([1.0, math.nan])).isnan().all()


@pytest.mark.parametrize("sizes", [(0, 4, 3), (5, 0, 3), (5, 4, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("pair", [False, True])
def test_gradients_of_nothing(sizes, pair):
    n, d, k = sizes
    x, b, c = leaves(torch.randn(2, n, d), torch.randn(d, k), torch.tensor([1.0, 0.5, 0.25]))
    call = functional.summary_pair if pair else functional.summary
    y = call(x, b, polynomial=c)
    total = sum(t.square().sum() for t in y) if pair else y.square().sum()
    first = torch.autograd.grad(total, (x, b, c), create_graph=True)
    assert [g.shape for g in first] == [x.shape, b.shape, c.shape] and not any(g.count_nonzero() for g in first)
    torch.autograd.grad(sum(g.square().sum() for g in first), (x, b), allow_unused=True)
