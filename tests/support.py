"""What the tests compare against: the formulas in plain PyTorch, and the law that says how close is close enough."""

import math

import torch
import torch.nn.functional as F

from interp_nn import associations
from interp_nn.ops import summary as ops_summary
from interp_nn.ops.library import apply

FORMS = tuple(associations.KEEPS)
COMPOSED_FORMS = tuple(f"{association}*" for association in associations.EXPRESSIONS)
# A pair keeps its projection anyway, so the form that drops it does not exist for one.
CASES = tuple((form, pair) for form in FORMS for pair in (False, True) if not (pair and form == "A"))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Beyond twice PyTorch's own error: as many ulps as a chain of roundings leaves when PyTorch's happen to cancel. In fp64
# the reference is itself the same-precision expression, whose error reads as zero.
FLOOR_ULPS = {torch.float64: 32, torch.float32: 3, torch.bfloat16: 3, torch.float16: 3}


def naive(x, b, bias=None):
    y = x @ b @ (b.mT @ b)
    return y if bias is None else y + bias


def naive_pair(x, b):
    return x @ b, naive(x, b)


def naive_loss(o1, o2, target, weights=(1.0, 1.0, 1.0), ignore_index=-100, reduction="mean"):
    """w1 CE(o1) + w2 CE(o2) + w3 MSE(o1, o2) over the rows that are not ignored; 16-bit logits are read in fp32."""
    wide = torch.float64 if o1.dtype == torch.float64 else torch.float32
    m, kept = o1.shape[-1], (target != ignore_index).flatten()
    o1, o2 = o1.to(wide).reshape(-1, m), o2.to(wide).reshape(-1, m)
    first, second = (
        F.cross_entropy(o, target.flatten(), ignore_index=ignore_index, reduction="none") for o in (o1, o2)
    )
    mse = torch.where(kept, (o1 - o2).square().mean(1), 0.0)
    rows = weights[0] * first + weights[1] * second + weights[2] * mse
    if reduction == "none":
        return rows.view(target.shape)
    return rows.sum() / kept.sum() if reduction == "mean" else rows.sum()


def naive_cross_entropy(x, b, target, **options):
    return naive_loss(*naive_pair(x, b), target, **options)


def naive_head_cross_entropy(x, b, a, c, target, **options):
    p, y = naive_pair(x, b)
    return naive_loss(F.linear(p, a, c), F.linear(y, a, c), target, **options)


def operator(x, b, bias=None, form="B", pair=False):
    """The outputs of the operator's autograd Function in a form of the test's choice, whatever dispatch would take."""
    out = apply(ops_summary._summary_function(), x, b, bias, f"reference:{form}", pair)
    return out[:2] if pair else out[0]


def in_form(form, x, b, bias=None):
    """The summary in any form, starred or not."""
    return ops_summary.summary(x, b, bias, f"reference:{form}")


def pair_in_form(form, x, b):
    return ops_summary.summary_pair(x, b, f"reference:{form}")


def errors(got, exact):
    """(relative Frobenius, relative maximum) error against an fp64 reference; a NaN or Inf counts as infinite."""
    got, exact = got.detach().double(), exact.detach()
    assert exact.dtype == torch.float64
    assert got.shape == exact.shape
    if got.numel() == 0:
        return 0.0, 0.0
    difference = got - exact
    if not bool(torch.isfinite(difference).all()):
        return math.inf, math.inf
    if not bool(exact.any()):
        return (math.inf, math.inf) if bool(difference.any()) else (0.0, 0.0)
    return float(difference.norm() / exact.norm()), float(difference.abs().max() / exact.abs().max())


def assert_close_law(got, same_precision_torch, exact_fp64, name="result", precision=None, ulps=None):
    """got is at most twice as far from the fp64 reference as PyTorch's own expression in the same precision, plus a floor.

    `precision` is what the products are rounded to, where that is not the result's dtype: a loss of 16-bit logits is fp32.
    `ulps` replaces the usual floor.
    """
    assert got.dtype == same_precision_torch.dtype, name
    precision = precision or got.dtype
    floor = (ulps or FLOOR_ULPS[precision]) * torch.finfo(precision).eps
    measured, allowed = errors(got, exact_fp64), errors(same_precision_torch, exact_fp64)
    for kind, ours, theirs in zip(("Frobenius", "maximum"), measured, allowed, strict=True):
        assert math.isfinite(theirs), f"{name}: PyTorch's own expression is not finite, which proves nothing"
        assert ours <= 2 * theirs + floor, f"{name}: {kind} error {ours:.3g}, PyTorch's {theirs:.3g}, floor {floor:.3g}"


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
