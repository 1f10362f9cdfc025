"""torch.func, forward mode and batched gradients, over the forms that dispatch takes and over every operator plan."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from support import CASES, OPERATOR_PLANS, naive, naive_cross_entropy, naive_head_cross_entropy, naive_pair, operator
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from interp_nn import functional
from interp_nn.engines import orders, select
from interp_nn.engines.problem import plan_to_text
from interp_nn.ops import remembered

close = torch.testing.assert_close


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def through(plan):
    return lambda x, b, bias=None: operator(x, b, bias, plan)


# functional leaves these sizes to autograd; the operators' plans are forced.
SUMMARIES = {"functional": functional.summary, **{plan_to_text(plan): through(plan) for plan in OPERATOR_PLANS}}
PAIRS = {
    "functional": lambda x, b: tuple(functional.summary_pair(x, b)),
    **{plan_to_text(plan): (lambda x, b, plan=plan: operator(x, b, None, plan, True)) for plan, pair in CASES if pair},
}
summaries = pytest.mark.parametrize("f", SUMMARIES.values(), ids=SUMMARIES)
pairs = pytest.mark.parametrize("f", PAIRS.values(), ids=PAIRS)


class Form(NamedTuple):
    """A summary or a pair, its formula, and how many of x, b and bias it takes."""

    call: Callable
    plain: Callable
    inputs: int


FORMS = {f"summary {name}": Form(f, naive, 3) for name, f in SUMMARIES.items()}
FORMS |= {f"pair {name}": Form(f, naive_pair, 2) for name, f in PAIRS.items()}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


# vmap

VMAPS = {
    "x": ((0, None, None), ((4, 3, 5), (5, 2), (2,))),
    "vectors": ((0, None, None), ((4, 5), (5, 2), (2,))),
    "b": ((None, 0, None), ((3, 5), (4, 5, 2), (2,))),
    "bias": ((None, None, 0), ((3, 5), (5, 2), (4, 2))),
    "x and b": ((0, 0, None), ((4, 3, 5), (4, 5, 2), (2,))),
    "all": ((0, 0, 0), ((4, 3, 5), (4, 5, 2), (4, 2))),
    "vectors and b": ((0, 0, None), ((4, 5), (4, 5, 2), (2,))),
    "other dimensions": ((1, 2, 1), ((3, 4, 5), (5, 2, 4), (2, 4))),
    "last dimensions": ((-1, 1, None), ((3, 5, 4), (5, 4, 2), (2,))),
    "batched x": ((2, None, 0), ((2, 3, 4, 5), (5, 2), (4, 2))),
    "batched x and b": ((0, 0, None), ((4, 2, 3, 5), (4, 5, 2), (2,))),
}


def random_inputs(shapes):
    return tuple(randn(*shape) for shape in shapes)


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in FORMS for case in VMAPS if case != "bias" or name.startswith("summary")],
)
def test_vmap(name, case):
    form = FORMS[name]
    in_dims, shapes = (part[: form.inputs] for part in VMAPS[case])
    inputs = random_inputs(shapes)
    for out_dims in (0, 1):
        got, expected = (vmap(f, in_dims, out_dims)(*inputs) for f in (form.call, form.plain))
        close(got, expected)


@pytest.mark.parametrize("order", [("x", "b"), ("b", "x"), ("x", "x"), ("b", "b"), ("bias", "x")], ids=str)
@summaries
def test_nested_vmap(f, order):
    shapes = {"x": (2, 4), "b": (4, 3), "bias": (3,)}
    for i, name in enumerate(reversed(order)):  # the outer batch of 6 ends up in front
        shapes[name] = (5 + i, *shapes[name])
    inputs = random_inputs(shapes.values())

    def nest(f):
        for name in reversed(order):
            f = vmap(f, tuple(0 if other == name else None for other in shapes))
        return f

    close(nest(f)(*inputs), nest(naive)(*inputs))


@summaries
def test_gradients_flow_through_vmap(f):
    for case, (in_dims, shapes) in VMAPS.items():
        inputs = [t.requires_grad_() for t in random_inputs(shapes)]
        got, expected = (torch.autograd.grad(vmap(g, in_dims)(*inputs).square().sum(), inputs) for g in (f, naive))
        close(got, expected, msg=lambda m, case=case: f"{case}: {m}")


@summaries
def test_vmap_with_randomness_of_empty_rows(f):
    close(vmap(f, (0, None))(randn(3, 0, 5), randn(5, 2)), torch.zeros(3, 0, 2, dtype=torch.float64))


# Derivatives


@summaries
def test_per_sample_gradients_equal_a_loop(f):
    x, b, bias = randn(6, 5), randn(5, 3), randn(3)

    def value(b, bias, row):
        return f(row, b, bias).pow(3).sum()

    per_sample = vmap(grad(value, (0, 1)), (None, None, 0))(b, bias, x)
    for i, row in enumerate(x):
        leaves = b.clone().requires_grad_(), bias.clone().requires_grad_()
        expected = torch.autograd.grad(naive(row, *leaves).pow(3).sum(), leaves)
        close((per_sample[0][i], per_sample[1][i]), expected)


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd, partial(jacrev, chunk_size=2)], ids=["rev", "fwd", "in chunks"])
@forms
def test_jacobians(form, jacobian):
    inputs, argnums = (randn(3, 4), randn(4, 2), randn(2))[: form.inputs], tuple(range(form.inputs))
    close(jacobian(form.call, argnums)(*inputs), jacrev(form.plain, argnums)(*inputs))


NESTINGS = {
    "forward over reverse": lambda f, argnums: jacfwd(jacrev(f, argnums), argnums),
    "reverse over reverse": lambda f, argnums: jacrev(jacrev(f, argnums), argnums),
    "reverse over forward": lambda f, argnums: jacrev(jacfwd(f, argnums), argnums),
}


def forward_over_forward(f, argnums):
    return jacfwd(jacfwd(f, argnums), argnums)


@pytest.mark.parametrize("nesting", NESTINGS)
@forms
def test_hessians(form, nesting):
    inputs = (randn(3, 3), randn(3, 2), randn(2))[: form.inputs]

    def value(f):
        def inner(*inputs):
            out = f(*inputs)
            p, y = out if isinstance(out, tuple) else (out, out)
            return (p * y).sum() + p.pow(3).sum()

        return inner

    for argnums in (tuple(range(form.inputs)), 1):
        got = NESTINGS[nesting](value(form.call), argnums)(*inputs)
        close(got, NESTINGS["reverse over reverse"](value(form.plain), argnums)(*inputs))


@pytest.fixture
def operators_only(monkeypatch):
    """Dispatch takes an operator's plan at any size."""
    monkeypatch.setattr(orders, "OPERATOR_OVERHEAD", 0)
    monkeypatch.setattr(remembered, "plans", {})
    assert not select.plan(3, 3, 2).autograd


@pytest.mark.parametrize("shape", [(3, 3, 2), (2, 2, 3)], ids=str)
@pytest.mark.usefixtures("operators_only")
def test_forward_over_forward(shape):
    """Which no custom Function can do in PyTorch, so the library must not be one there."""
    n, d, k = shape
    inputs = randn(n, d), randn(d, k), randn(k)
    got = forward_over_forward(lambda *t: functional.summary(*t).pow(2).sum(), (0, 1, 2))(*inputs)
    close(got, jacrev(jacrev(lambda *t: naive(*t).pow(2).sum(), (0, 1, 2)), (0, 1, 2))(*inputs))

    def value(f):
        return lambda *inputs: torch.stack(tuple(f(*inputs))).pow(3).sum()

    got = forward_over_forward(value(functional.summary_pair), (0, 1))(*inputs[:2])
    close(got, jacrev(jacrev(value(naive_pair), (0, 1)), (0, 1))(*inputs[:2]))


@summaries
def test_hessians_of_each_sample(f):
    x, b = randn(4, 3), randn(3, 2)

    def per_sample(g):
        return vmap(hessian(lambda b, row: g(row, b).pow(2).sum()), (None, 0))(b, x)

    close(per_sample(f), per_sample(naive))


@summaries
def test_vjp_and_linear_maps_of_empty_dimensions(f):
    for n, d, k in ((0, 3, 2), (3, 0, 2), (3, 2, 0)):
        inputs = randn(n, d), randn(d, k), randn(k)
        y, pull = vjp(f, *inputs)
        assert [g.shape for g in pull(torch.ones_like(y))] == [t.shape for t in inputs]
        close(pull(torch.ones_like(y)), vjp(naive, *inputs)[1](torch.ones_like(y)))
        tangents = random_inputs(t.shape for t in inputs)
        close(jvp(f, inputs, tangents), jvp(naive, inputs, tangents))

        def second(g, inputs=inputs, tangents=tangents):
            return jvp(grad(lambda *inputs: g(*inputs).pow(2).sum(), (0, 1, 2)), inputs, tangents)[1]

        close(second(f), second(naive))


# Forward mode


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@summaries
def test_dual_numbers(f, needs, gradients):
    inputs = randn(2, 3, 4), randn(4, 2), randn(2)
    tangents = [randn(*t.shape) if need else torch.zeros_like(t) for t, need in zip(inputs, needs, strict=True)]
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, u) if need else t for t, u, need in zip(inputs, tangents, needs, strict=True)]
        got = forward_ad.unpack_dual(f(*duals))
    close((got.primal, got.tangent), jvp(naive, inputs, tuple(tangents)))


@pairs
def test_dual_numbers_through_a_pair(f):
    inputs = randn(3, 4), randn(4, 2)
    tangents = random_inputs(t.shape for t in inputs)
    with torch.no_grad(), forward_ad.dual_level():
        out = [forward_ad.unpack_dual(o) for o in f(*map(forward_ad.make_dual, inputs, tangents))]
    values, directions = jvp(naive_pair, inputs, tangents)
    close(tuple(o.primal for o in out), values)
    close(tuple(o.tangent for o in out), directions)


# Batched gradients


@pytest.mark.parametrize("batch", [(3,), (2, 3)], ids=str)
@forms
def test_is_grads_batched(form, batch):
    inputs = [t.requires_grad_() for t in (randn(*batch, 4), randn(4, 2), randn(2))[: form.inputs]]
    upstream = [randn(5, *batch, 2) for _ in range(4 - form.inputs)]
    outputs = (f(*inputs) for f in (form.call, form.plain))
    got, expected = (torch.autograd.grad(out, inputs, upstream, is_grads_batched=True) for out in outputs)
    close(got, expected)


# Losses

TARGET = torch.tensor([0, 2, -100, 1])
LOSSES = {
    "pair": (functional.summary_cross_entropy, naive_cross_entropy, ((4, 3), (3, 3))),
    "head": (functional.summary_head_cross_entropy, naive_head_cross_entropy, ((4, 3), (3, 2), (3, 2), (3,))),
}
losses = pytest.mark.parametrize("kind", LOSSES)


def both_losses(kind):
    ours, theirs, shapes = LOSSES[kind]
    return ours, theirs, tuple(0.5 * t for t in random_inputs(shapes))


@pytest.mark.parametrize("nesting", [*NESTINGS.values(), forward_over_forward], ids=[*NESTINGS, "forward over forward"])
@losses
def test_hessian_of_a_loss(kind, nesting):
    ours, theirs, inputs = both_losses(kind)
    argnums = tuple(range(len(inputs)))
    got = nesting(lambda *t: ours(*t, TARGET), argnums)(*inputs)
    close(got, NESTINGS["reverse over reverse"](lambda *t: theirs(*t, TARGET), argnums)(*inputs))


@losses
def test_jvp_and_jacobian_of_a_loss(kind):
    ours, theirs, inputs = both_losses(kind)
    tangents = random_inputs(t.shape for t in inputs)
    for options in ({"reduction": "sum"}, {"reduction": "none"}, {"weights": (0.5, 2.0, 3.0)}):
        f, g = (lambda *t, h=h, options=options: h(*t, TARGET, **options) for h in (ours, theirs))
        close(jvp(f, inputs, tangents), jvp(g, inputs, tangents))
        close(jacrev(f, tuple(range(len(inputs))))(*inputs), jacrev(g, tuple(range(len(inputs))))(*inputs))


@losses
def test_dual_numbers_through_a_loss_without_gradients(kind):
    ours, theirs, inputs = both_losses(kind)
    tangents = random_inputs(t.shape for t in inputs)
    with torch.no_grad(), forward_ad.dual_level():
        got = forward_ad.unpack_dual(ours(*map(forward_ad.make_dual, inputs, tangents), TARGET))
    close((got.primal, got.tangent), jvp(lambda *t: theirs(*t, TARGET), inputs, tangents))


@losses
def test_per_sample_gradients_of_a_loss(kind):
    ours, theirs, (x, *rest) = both_losses(kind)
    target = TARGET.clamp_min(0)
    argnums = tuple(range(1, len(rest) + 1))

    def per_sample(f):
        return vmap(grad(lambda row, *t: f(row, *t[:-1], t[-1]), argnums), (0, *(None for _ in rest), 0))(
            x, *rest, target
        )

    def naive_rows(row, *t):
        return theirs(row[None], *t[:-1], t[-1][None])

    close(per_sample(ours), per_sample(naive_rows))


@losses
def test_vmap_of_a_loss_over_models(kind):
    ours, theirs, (x, *rest) = both_losses(kind)
    stacked = [torch.stack((t, 2 * t, -t)) for t in rest]
    got = vmap(lambda *t: ours(x, *t, TARGET))(*stacked)
    close(got, torch.stack([theirs(x, *(s[i] for s in stacked), TARGET) for i in range(3)]))


@losses
def test_is_grads_batched_of_a_loss(kind):
    ours, theirs, inputs = both_losses(kind)
    inputs = [t.requires_grad_() for t in inputs]
    for reduction, shape in (("mean", (5,)), ("none", (5, 4))):
        upstream = randn(*shape)
        got, expected = (
            torch.autograd.grad(f(*inputs, TARGET, reduction=reduction), inputs, upstream, is_grads_batched=True)
            for f in (ours, theirs)
        )
        close(got, expected)
