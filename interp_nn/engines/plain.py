"""The four functions of `Engine` in PyTorch's operations, for the plans of the engines with kernels, polynomials included.

They serve as the reference of `verify`, and in the place of a kernel that fails there: they return and take the same saved
tensors as the kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from interp_nn.engines import eager, eager_polynomial
from interp_nn.engines.eager_polynomial import SAVING, Polynomial
from interp_nn.engines.problem import LossOptions, Plan
from interp_nn.linalg import accumulation_dtype


def forward(
    x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan, pair: bool, q: Polynomial | None = None
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Compute `Engine.forward`."""
    if q is None:
        return eager.forward(x, b, bias, plan, pair)
    p, y, (_, g, terms) = eager_polynomial.forward(x, b, bias, q, SAVING, True)
    assert p is not None
    qg = terms.clone()
    qg.diagonal().add_(q.coefficients[0])
    return p, y, [p, g, qg] if plan.saves else [g, qg]


def backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    saved: Sequence[Tensor],
    plan: Plan,
    need_x: bool,
    need_b: bool,
    need_bias: bool = False,
    need_c: bool = False,
    q: Polynomial | None = None,
) -> tuple[Tensor | None, ...]:
    """Compute `Engine.backward`."""
    if q is None:
        return eager.backward(dp, dy, x, b, saved, plan, need_x, need_b, need_bias)
    own = eager_polynomial.forward(x, b, None, q, SAVING, True)[2]
    dx, db, dbias, dc, _ = eager_polynomial.backward(
        dp, dy, x, b, q, own, SAVING, (need_x, need_b, need_bias, need_c, False)
    )
    return dx, db, dbias, dc


def loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    plan: Plan,
    upstream: Tensor | None = None,
    needs: Sequence[bool] | None = None,
    q: Polynomial | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Compute `Engine.loss`; of a polynomial by PyTorch's autograd."""
    if q is None:
        return eager.loss(x, b, a, c, target, options, plan, upstream, needs)
    wanted = (*(needs or ()), *(False,) * 5)[:5]
    given = [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip((x, b, a, c, q.coefficients), wanted, strict=True)
    ]
    with torch.enable_grad():
        x, b, a, c, coefficients = given  # type: ignore[assignment]
        assert coefficients is not None
        polynomial = Polynomial(coefficients, q.scale)
        if a is None:
            o1, o2, _ = eager_polynomial.forward(x, b, None, polynomial, SAVING, True)
            assert o1 is not None
        else:
            o1, o2 = eager_polynomial.logits(x, b, a, c, polynomial, plan)
        wide = accumulation_dtype(x.dtype)
        value = eager.three_terms(o1.to(wide), o2.to(wide), target, options, True)
    leaves = [t for t in given if t is not None and t.requires_grad]
    if not leaves:
        return value.detach(), []
    one = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return value.detach(), list(torch.autograd.grad(value, leaves, one))


def scale(grads: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Compute `Engine.scale`."""
    return eager.scale(grads, upstream)
