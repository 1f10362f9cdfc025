"""The eager path: one autograd Function and one call of an engine, without operators.

Only for checked plain tensors where `library.ordinary` holds. The backward calls the engine too, unless something is active there
that has to see an operator, or the backward is differentiated again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, is_grad_enabled
from torch.autograd import Function

from interp_nn import engines
from interp_nn.engines.problem import Plan
from interp_nn.linalg import is_column_major
from interp_nn.ops.library import apply, is_batched, ordinary
from interp_nn.ops.summary import as_rows, backward_function, ordered


class SummaryDirect(Function):
    """Y of x (..., d), b (d, k) and bias (k,) or None by a plan, or (P, Y) of a pair."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan, pair: bool) -> Any:
        p, y, saved = engines.get(plan.engine).forward(as_rows(x), b, bias, plan, pair)
        if x.dim() != 2:
            shape = (*x.shape[:-1], b.shape[1])
            y = y.view(shape)
            p = p if p is None else p.view(shape)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, b, *saved)
        ctx.plan, ctx.pair = plan, pair
        return (p, y) if pair else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dp, dy = grads if ctx.pair else (None, grads[0])
        given = dy if dp is None else dp
        if given is None:
            return (None,) * 5
        x, b, *saved = ctx.saved_tensors
        plan, needs = ctx.plan, ctx.needs_input_grad[:3]
        if is_grad_enabled() or not ordinary() or is_batched(given):
            first, second = (*saved, None, None)[:2]
            found = iter(apply(backward_function(), dp, dy, x, b, first, second, plan, *needs))
            return (*(next(found) if need else None for need in needs), None, None)
        rows = x
        if x.dim() != 2:
            rows = as_rows(x)
            dp, dy = (None if g is None else as_rows(g) for g in (dp, dy))
        dx, db, dbias = engines.get(plan.engine).backward(dp, dy, rows, b, saved, plan, *needs)[:3]
        if dx is not None and x.dim() != 2:
            dx = dx.view(x.shape)
        if db is not None and db.stride() != b.stride():
            db = ordered(db, is_column_major(b))
        return dx, db, dbias, None, None


_apply_summary = super(Function, SummaryDirect).apply  # without the step that binds arguments for transforms


def summary(x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Return X b (bᵀb) + bias."""
    if not plan.autograd and is_grad_enabled() and (x.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)):
        found: Tensor = _apply_summary(x, b, bias, plan, False)
        return found
    y = engines.get(plan.engine).forward(x if x.dim() == 2 else as_rows(x), b, bias, plan, False)[1]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], b.shape[1])


def summary_pair(x: Tensor, b: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return (X b, X b (bᵀb))."""
    if not plan.autograd and is_grad_enabled() and (x.requires_grad or b.requires_grad):
        pair: tuple[Tensor, Tensor] = _apply_summary(x, b, None, plan, True)
        return pair
    p, y, _ = engines.get(plan.engine).forward(as_rows(x), b, None, plan, True)
    assert p is not None
    if x.dim() == 2:
        return p, y
    shape = (*x.shape[:-1], b.shape[1])
    return p.view(shape), y.view(shape)
