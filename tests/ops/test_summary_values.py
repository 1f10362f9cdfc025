"""What the operator computes, forward and backward: against the law, and by identities that hold exactly."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    AUTOGRAD_PLANS,
    CASES,
    DTYPES,
    OPERATOR_PLANS,
    check_law,
    naive,
    naive_pair,
    operator,
    pair_by,
    summary_by,
)

from interp_nn import functional

ALL_PLANS = (*OPERATOR_PLANS, *AUTOGRAD_PLANS)
ALL_CASES = [*CASES, *((plan, True) for plan in AUTOGRAD_PLANS), *((plan, False) for plan in AUTOGRAD_PLANS)]
# Few columns and many rows take their own memory order; k > d and n < k their own associations.
SHAPES = [(131, 37, 7), (5, 16, 48), (8, 64, 24)]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def scaled(n, d, k):
    """x and b whose summary is of order one in every dtype."""
    return randn(n, d), randn(d, k) / max(d, k) ** 0.5


def integers(*shape, dtype=torch.float64, limit=2):
    """Small whole numbers: every product and sum is exact, in whatever order it is formed."""
    return torch.randint(-limit, limit + 1, shape).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("plan", "pair"), ALL_CASES)
def test_every_order_and_dtype_obeys_the_law(plan, pair, shape):
    n, d, k = shape
    inputs = [*scaled(n, d, k)] if pair else [*scaled(n, d, k), randn(k)]
    function = (lambda x, b: pair_by(plan, x, b)) if pair else (lambda x, b, bias: summary_by(plan, x, b, bias))
    upstream = [randn(n, k), randn(n, k)][: 1 + pair]
    for dtype in DTYPES:
        check_law(function, naive_pair if pair else naive, inputs, upstream, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(300, 64, 16), (16, 64, 32), (32, 16, 64)], ids=str)
def test_functional_obeys_the_law(shape, dtype):
    n, d, k = shape
    check_law(functional.summary, naive, [*scaled(n, d, k), randn(k)], [randn(n, k)], dtype)
    check_law(functional.summary_pair, naive_pair, scaled(n, d, k), [randn(n, k), randn(n, k)], dtype)


def assert_exact(function, reference, inputs, upstream):
    """The same numbers as the naive expression, outputs and gradients, for inputs on which both are exact."""

    def run(f):
        given = [t.detach().requires_grad_() for t in inputs]
        out = f(*given)
        out = (out,) if isinstance(out, torch.Tensor) else tuple(out)
        return [*out, *torch.autograd.grad(out, given, [upstream] * len(out))]

    for got, expected in zip(run(function), run(reference), strict=True):
        assert got.shape == expected.shape
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("plan", "pair"), ALL_CASES)
def test_sizes_from_zero_up(plan, pair):
    batches = ((), (0,), (1,), (2,), (2, 0), (2, 1), (1, 2, 1))
    for dtype, batch, d, k in itertools.product((torch.float64, torch.float16), batches, (0, 1, 2), (0, 1, 3)):
        x, b, bias = (integers(*shape, dtype=dtype, limit=1) for shape in ((*batch, d), (d, k), (k,)))
        upstream = integers(*batch, k, dtype=dtype, limit=1)
        if pair:
            assert_exact(lambda x, b: pair_by(plan, x, b), naive_pair, [x, b], upstream)
        else:
            assert_exact(lambda *t: summary_by(plan, *t), naive, [x, b, bias], upstream)


@st.composite
def laid_out(draw, shape):
    """Small whole numbers of a shape, in some memory layout: any order of dimensions, strides, offset or expansion."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    offset = draw(st.sampled_from([0, 0, 3]))
    t = integers(*(shape[i] * steps[i] + offset for i in order))
    t = t.permute([order.index(i) for i in range(len(shape))])
    t = t[tuple(slice(offset, None, step) for step in steps)]
    expanded = draw(st.sampled_from([None, None, *range(len(shape))]))
    if expanded is not None and shape[expanded]:
        t = t.narrow(expanded, 0, 1).expand(shape)
    assert t.shape == shape
    return t


SIZE = st.integers(0, 9) | st.sampled_from([11, 13, 17])


@st.composite
def problems(draw):
    d, k = draw(SIZE), draw(SIZE)
    batch = tuple(draw(st.lists(SIZE, max_size=3)))
    if batch and draw(st.booleans()):
        batch = (128 + batch[0],)  # long enough for the memory order of many rows
    return (*(draw(laid_out(shape)) for shape in ((*batch, d), (d, k), (k,))), draw(laid_out((*batch, k))))


@given(problems())
def test_any_shape_and_layout_is_exact(problem):
    x, b, bias, upstream = problem
    assert_exact(functional.summary, naive, [x, b, bias], upstream)
    assert_exact(functional.summary, naive, [x, b], upstream)
    assert_exact(functional.summary_pair, naive_pair, [x, b], upstream)


@given(problems(), st.sampled_from(ALL_CASES))
def test_any_shape_and_layout_is_exact_in_every_order(problem, case):
    (x, b, bias, upstream), (plan, pair) = problem, case
    if pair:
        assert_exact(lambda x, b: pair_by(plan, x, b), naive_pair, [x, b], upstream)
    else:
        assert_exact(lambda *t: summary_by(plan, *t), naive, [x, b, bias], upstream)


# Rows on their own, and the same bits, at dimensions that every memory order and association meets.


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("plan", "pair"), ALL_CASES)
def test_a_non_finite_row_stays_its_own_affair(plan, pair, dtype, value):
    x, b = (t.to(dtype) for t in scaled(150, 24, 10))
    poisoned = x.clone()
    poisoned[41, 5] = value

    def f(x):
        return pair_by(plan, x, b) if pair else (summary_by(plan, x, b),)

    others = torch.arange(150) != 41
    for clean, dirty in zip(f(x), f(poisoned), strict=True):
        assert not dirty[41].isfinite().any()
        assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("plan", ALL_PLANS)
def test_a_non_finite_b_is_not_hidden(plan):
    x, b = scaled(6, 5, 4)
    b[1, 2] = torch.nan
    assert not summary_by(plan, x, b)[:, 2].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("plan", "pair"), ALL_CASES)
def test_same_bits_every_time_and_inputs_untouched(plan, pair, dtype):
    x, b, bias, dy = (t.to(dtype) for t in (*scaled(150, 24, 10), randn(10), randn(150, 10)))
    inputs = [x.requires_grad_(), b.requires_grad_()] + ([] if pair else [bias.requires_grad_()])
    before = [t.detach().clone() for t in (*inputs, dy)]
    versions = [t._version for t in (*inputs, dy)]

    def run():
        out = pair_by(plan, *inputs) if pair else (summary_by(plan, *inputs),)
        return [*out, *torch.autograd.grad(out, inputs, [dy] * len(out))]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    assert [t._version for t in (*inputs, dy)] == versions
    assert all(torch.equal(t, old) for t, old in zip((*inputs, dy), before, strict=True))


@pytest.mark.parametrize("plan", OPERATOR_PLANS)
def test_outputs_share_no_memory_with_inputs_or_each_other(plan):
    x, b = scaled(4, 3, 3)
    tensors = [x, b, *operator(x, b, None, plan, True)]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_gradients_are_dropped_under_no_grad_and_inference_mode():
    x, b = (t.requires_grad_() for t in scaled(5, 4, 3))
    expected = functional.summary(x, b).detach()
    with torch.no_grad():
        y = functional.summary(x, b)
    assert not y.requires_grad and torch.equal(y, expected)
    with torch.inference_mode():
        p, y = functional.summary_pair(x, b)
    assert y.is_inference() and p.is_inference()
    torch.testing.assert_close(y.clone(), expected)
