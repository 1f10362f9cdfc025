"""With few columns b is copied into column-major order, for speed: nothing else may change."""

import functools

import pytest
import torch
from support import AUTOGRAD_PLANS, OPERATOR_PLANS, assert_close_law, naive

from interp_nn import functional
from interp_nn.engines import eager
from interp_nn.engines.problem import Plan, plan_to_text
from interp_nn.linalg import is_column_major
from interp_nn.ops.library import apply
from interp_nn.ops.summary import SummaryFunction, summary


@pytest.fixture(autouse=True)
def _at_any_size(monkeypatch):
    monkeypatch.setattr(eager, "_MANY_ELEMENTS", 0)
    monkeypatch.setattr(functional, "_plans", {})


@pytest.mark.parametrize("k", [1, 3, 15])
@pytest.mark.parametrize("plan", [*OPERATOR_PLANS, *AUTOGRAD_PLANS])
def test_values_and_gradients(plan, k):
    x, b, dy = torch.randn(20, 9), torch.randn(9, k), torch.randn(20, k)

    def run(f, dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x, b)]
        y = f(*inputs)
        return [y, *torch.autograd.grad(y, inputs, dy.to(dtype))]

    def ours(x, b):
        if plan.autograd:
            return summary(x, b, None, plan)[0]
        return apply(SummaryFunction, x, b, None, plan, False)[0]

    for got, same, exact in zip(run(ours, x.dtype), run(naive, x.dtype), run(naive, torch.float64), strict=True):
        assert_close_law(got, same, exact)


@pytest.mark.parametrize("plan", OPERATOR_PLANS)
def test_operators_promise_the_same_strides(plan):
    x, b = torch.randn(20, 9), torch.randn(9, 3)
    check = functools.partial(torch.library.opcheck, test_utils="test_faketensor")
    check(torch.ops.interp_nn.summary.default, (x, b, torch.randn(3), plan_to_text(plan)))
    if plan != Plan("eager", "(Xb)G"):
        check(torch.ops.interp_nn.summary_pair.default, (x, b, plan_to_text(plan)))


def test_a_large_problem_takes_that_path():
    x, b = torch.randn(128, 256), torch.randn(256, 10)
    assert is_column_major(eager._columns(x, b))
    assert eager._columns(x, b.t().contiguous().t()).is_contiguous() is False
    assert eager._columns(x, torch.randn(256, 16)).is_contiguous()
