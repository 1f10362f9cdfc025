"""With few columns b is copied into column-major order, for speed: nothing else may change."""

import functools

import pytest
import torch
from support import AUTOGRAD_PLANS, OPERATOR_PLANS, check_law, naive, summary_by

from interp_nn.engines import eager
from interp_nn.engines.problem import Plan, plan_to_text
from interp_nn.linalg import is_column_major
from interp_nn.ops import remembered


@pytest.fixture(autouse=True)
def _at_any_size(monkeypatch):
    monkeypatch.setattr(eager, "_MANY_ELEMENTS", 0)
    monkeypatch.setattr(remembered, "plans", {})


@pytest.mark.parametrize("k", [1, 3, 15])
@pytest.mark.parametrize("plan", [*OPERATOR_PLANS, *AUTOGRAD_PLANS])
def test_values_and_gradients(plan, k):
    x, b, dy = (torch.randn(*shape, dtype=torch.float64) for shape in ((20, 9), (9, k), (20, k)))
    check_law(lambda x, b: summary_by(plan, x, b), naive, [x, b], [dy], torch.float32)


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
