"""What the tests compare against: the formulas in plain PyTorch, and the law that says how close is close enough."""

import torch

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
from interp_nn.ops import summary as ops_summary
from interp_nn.ops.library import apply

FORMS = tuple(orders.KEEPS)
COMPOSED_FORMS = tuple(f"{association}*" for association in orders.EXPRESSIONS)
# A pair keeps its projection anyway, so the form that drops it does not exist for one.
CASES = tuple((form, pair) for form in FORMS for pair in (False, True) if not (pair and form == "A"))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def operator(x, b, bias=None, form="B", pair=False):
    """The outputs of the operator's autograd Function in a form of the test's choice, whatever dispatch would take."""
    out = apply(ops_summary._summary_function(), x, b, bias, f"reference:{form}", pair)
    return out[:2] if pair else out[0]


def in_form(form, x, b, bias=None):
    """The summary in any form, starred or not."""
    return ops_summary.summary(x, b, bias, f"reference:{form}")


def pair_in_form(form, x, b):
    return ops_summary.summary_pair(x, b, f"reference:{form}")


def assert_close_law(got, same_precision_torch, exact_fp64, name="result", precision=None, ulps=None):
    """got is at most twice as far from the fp64 reference as PyTorch's own expression in the same precision, plus a floor.

    `precision` is what the products are rounded to, where that is not the result's dtype: a loss of 16-bit logits is fp32.
    `ulps` replaces the usual floor.
    """
    assert got.dtype == same_precision_torch.dtype, name
    precision = precision or got.dtype
    why = exceeds(errors(got, exact_fp64), errors(same_precision_torch, exact_fp64), law_floor(precision, ulps))
    assert why is None, f"{name}: {why}"


def leaf(t, dtype=None):
    """A copy that requires a gradient, in another dtype if asked, with the same strides where t is dense."""
    return t.detach().to(dtype or t.dtype, copy=True).requires_grad_()


def leaves(*tensors, dtype=None):
    return tuple(None if t is None else leaf(t, dtype) for t in tensors)


def check_law(function, reference, inputs, upstreams, dtype, ulps=None):
    """Outputs and gradients of function against the law, for reference the same thing written naively.

    `inputs` are fp64, and rounded to `dtype` first so that all three computations start from the same numbers.
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
