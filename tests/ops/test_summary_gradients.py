"""Derivatives of the operator in every plan, by finite differences and against PyTorch's autograd, to third order."""

import pytest
import torch
from support import AUTOGRAD_PLANS, CASES, OPERATOR_PLANS, naive, naive_pair, operator, pair_by, summary_by
from torch.autograd import gradcheck, gradgradcheck

SHAPES = [(3, 4, 2), (2, 2, 3)]
ALL_PLANS = (*OPERATOR_PLANS, *AUTOGRAD_PLANS)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def problem(n, d, k):
    return randn(n, d), randn(d, k), randn(k)


def check_to_second_order(function, inputs):
    """By finite differences, entry by entry."""
    batched = {"check_batched_grad": True}
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_forward_grad=True, **batched)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, **batched)


def summary_in(plan, pair):
    """The (pair of) outputs in a plan, starred or not, as a function of the inputs alone."""
    if plan in OPERATOR_PLANS:
        return lambda x, b, bias=None: operator(x, b, bias, plan, pair)
    return (lambda x, b: pair_by(plan, x, b)) if pair else (lambda x, b, bias=None: summary_by(plan, x, b, bias))


@pytest.mark.parametrize(
    ("plan", "pair", "shape"),
    [
        *((plan, pair, SHAPES[0]) for plan, pair in CASES),
        # No plan's derivatives have a line of their own for k > d.
        *(pytest.param(plan, pair, SHAPES[1], marks=pytest.mark.slow) for plan, pair in CASES),
        *((plan, pair, SHAPES[0]) for plan in AUTOGRAD_PLANS for pair in (False, True)),
    ],
    ids=str,
)
def test_first_and_second_derivatives(plan, pair, shape):
    inputs = problem(*shape)
    check_to_second_order(summary_in(plan, pair), inputs[:2] if pair else inputs)


@pytest.mark.parametrize(
    "shapes",
    [((2, 2, 3), (3, 2), (2,)), ((3,), (3, 2), (2,)), ((3, 4), (4, 2))],
    ids=["batch dimensions", "a vector", "no bias"],
)
@pytest.mark.parametrize("plan", OPERATOR_PLANS)
def test_derivatives_of_other_inputs(plan, shapes):
    check_to_second_order(lambda *inputs: operator(*inputs, plan=plan), tuple(randn(*shape) for shape in shapes))


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("plan", OPERATOR_PLANS)
def test_gradients_of_only_some_inputs(plan, needs):
    inputs = [
        t.requires_grad_(bool(need)) for t, need in zip((t.detach() for t in problem(3, 4, 2)), needs, strict=True)
    ]
    check_to_second_order(lambda *inputs: operator(*inputs, plan=plan), tuple(inputs))


@pytest.mark.parametrize(("plan", "pair"), CASES)
def test_gradients_asked_of_one_input_where_all_need_them(plan, pair):
    x, b, bias = problem(3, 4, 2)
    bias = None if pair else bias
    expected = naive_pair(x, b) if pair else (naive(x, b, bias),)
    for wanted in (x, b) if pair else (x, b, bias):
        got = operator(x, b, bias, plan, pair)
        upstream = [torch.randn_like(o) for o in expected]
        (g,) = torch.autograd.grad(got if pair else (got,), (wanted,), upstream)
        (e,) = torch.autograd.grad(expected, (wanted,), upstream, retain_graph=True)
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("which", ["projection", "summary", "neither"])
@pytest.mark.parametrize("plan", [plan for plan, pair in CASES if pair])
def test_a_pair_of_which_one_output_is_used(plan, which):
    def one(x, b):
        return operator(x, b, None, plan, True)[which == "summary"]

    inputs = problem(3, 4, 2)[:2]
    if which != "neither":
        return check_to_second_order(one, inputs)
    loss = sum(0 * o.detach().sum() for o in operator(*inputs, None, plan, True)) + inputs[0].sum()
    gx, gb = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert gx.eq(1).all() and gb is None


@pytest.mark.parametrize(
    "upstream",
    [torch.ones(()).expand(3, 2), torch.randn(2, 3).t(), torch.randn(1, 2).expand(3, 2), torch.randn(3, 4)[:, ::2]],
    ids=["stride 0", "transposed", "expanded", "strided"],
)
@pytest.mark.parametrize(("plan", "pair"), CASES)
def test_upstream_strides(plan, pair, upstream):
    """Cotangents handed over as they are, not as a consumer's backward happens to lay them out."""
    x, b, bias = problem(3, 4, 2)
    upstream = upstream.double()
    bias, inputs = (None, (x, b)) if pair else (bias, (x, b, bias))
    got, expected = operator(x, b, bias, plan, pair), naive_pair(x, b) if pair else naive(x, b, bias)
    cotangents = (upstream, upstream) if pair else upstream
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, cotangents), torch.autograd.grad(expected, inputs, cotangents)
    )


@pytest.mark.parametrize(("plan", "pair"), CASES)
def test_third_derivative(plan, pair):
    def third(function):
        torch.manual_seed(1)
        x, b, _ = problem(3, 4, 2)
        value = sum(o.pow(2).sum() for o in function(x, b))
        for _ in range(3):
            grads = torch.autograd.grad(value, (x, b), create_graph=True)
            value = sum((g * torch.randn_like(g)).sum() for g in grads)
        return [g.detach() for g in grads]

    got = third(lambda x, b: operator(x, b, None, plan, True) if pair else (operator(x, b, None, plan),))
    torch.testing.assert_close(got, third(lambda x, b: naive_pair(x, b) if pair else (naive(x, b),)))


@pytest.mark.parametrize("plan", ALL_PLANS)
def test_backward_twice_over_a_retained_graph(plan):
    x, b, bias = problem(3, 4, 2)
    loss = summary_by(plan, x, b, bias).square().sum()
    first = torch.autograd.grad(loss, (x, b, bias), retain_graph=True)
    second = torch.autograd.grad(loss, (x, b, bias))
    assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, (x, b, bias))


@pytest.mark.parametrize("plan", OPERATOR_PLANS)
def test_an_input_modified_after_the_forward_is_refused(plan):
    x, b, _ = problem(3, 4, 2)
    y = operator(x, b, None, plan)
    with torch.no_grad():
        b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("plan", ALL_PLANS)
def test_accumulates_into_leaves_of_any_layout(plan):
    x, b, _ = problem(3, 4, 2)
    weight = b.detach().t().contiguous().requires_grad_()
    for _ in range(2):
        summary_by(plan, x, weight.t()).sum().backward()
    expected = torch.autograd.grad(2 * naive(x, b).sum(), b)[0].t()
    torch.testing.assert_close(weight.grad, expected)
    assert weight.grad.stride() == weight.stride()
