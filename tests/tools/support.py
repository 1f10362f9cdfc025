"""The formulas in plain PyTorch, the operator in any form, and the tolerance of every comparison of values."""

import pytest
import torch

from benchmarks.records.environment import ROOT
from benchmarks.timing.tolerances import (  # noqa: F401 - tests take the formulas from here
    errors,
    exceeds,
    naive,
    naive_cross_entropy,
    naive_head_cross_entropy,
    naive_loss,
    naive_pair,
)
from benchmarks.timing.tolerances import floor as law_floor
from interp_nn.engines import orders
from interp_nn.engines.problem import SUMMARY_ORDERS, Plan
from interp_nn.ops import summary as ops_summary
from interp_nn.ops.library import apply

needs_records = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "results").is_dir(), reason="a source archive has no records"
)
OPERATOR_PLANS = orders.OPERATOR_PLANS
AUTOGRAD_PLANS = tuple(Plan("eager", order, autograd=True) for order in SUMMARY_ORDERS)
# A pair returns its projection, so the plan that does not save it does not exist for one.
CASES = tuple(
    (plan, pair) for plan in OPERATOR_PLANS for pair in (False, True) if not (pair and plan == Plan("eager", "(Xb)G"))
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def operator(x, b, bias=None, plan=Plan("eager", "X(bG)"), pair=False):  # noqa: B008 - a Plan is immutable
    """The outputs of the operator's autograd Function under a given plan."""
    out = apply(ops_summary._summary_function(), x, b, bias, plan, pair)
    return out[:2] if pair else out[0]


def summary_by(plan, x, b, bias=None):
    """The summary under a given plan, of an operator or of autograd."""
    return ops_summary.summary(x, b, bias, plan)[0]


def pair_by(plan, x, b):
    """The pair under a given plan, of an operator or of autograd."""
    return ops_summary.summary_pair(x, b, plan)


def assert_close_law(got, same_precision_torch, exact_fp64, name="result", precision=None, ulps=None):
    """Assert that got is at most twice as far from the fp64 reference as PyTorch in the same precision, plus a floor.

    `precision` is the dtype of the products where it differs from the result's: a loss of 16-bit logits is fp32.
    `ulps` replaces the usual floor.
    """
    assert got.dtype == same_precision_torch.dtype, name
    precision = precision or got.dtype
    why = exceeds(errors(got, exact_fp64), errors(same_precision_torch, exact_fp64), law_floor(precision, ulps))
    assert why is None, f"{name}: {why}"


def leaf(t, dtype=None):
    """Return a copy that requires a gradient, with the same strides where t is dense."""
    return t.detach().to(dtype or t.dtype, copy=True).requires_grad_()


def leaves(*tensors, dtype=None):
    """Return a `leaf` of each tensor; None stays None."""
    return tuple(None if t is None else leaf(t, dtype) for t in tensors)


def check_law(function, reference, inputs, upstreams, dtype, ulps=None):
    """Check outputs and gradients of `function` with `assert_close_law`; `reference` is the formula in plain PyTorch.

    `inputs` are fp64; they are rounded to `dtype` first, so that all three computations start from the same numbers.
    """
    rounded = [t.to(dtype) for t in inputs]

    def run(f, to):
        given = leaves(*rounded, dtype=to)
        out = f(*given)
        out = (out,) if isinstance(out, torch.Tensor) else tuple(out)
        cotangents = [u.to(dtype).to(o.dtype) for u, o in zip(upstreams, out, strict=True)]
        return [*(o.detach() for o in out), *torch.autograd.grad(out, given, cotangents)]

    found = run(function, dtype), run(reference, dtype), run(reference, torch.float64)
    for i, (got, same, exact) in enumerate(zip(*found, strict=True)):
        place = i - (len(found[0]) - len(inputs))
        name = f"gradient of input {place}" if place >= 0 else f"output {i}"
        assert_close_law(got, same, exact, name, dtype, ulps)
