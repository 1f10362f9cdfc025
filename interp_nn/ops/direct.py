"""The eager path: one autograd Function and one call of an engine, without operators.

Only for checked plain tensors where `library.ordinary` holds. The backward calls the engine too, unless something is active there
that has to see an operator, or the backward is differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, is_grad_enabled
from torch.autograd import Function

from interp_nn import engines
from interp_nn.engines import eager, eager_polynomial
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.problem import LossOptions, Plan
from interp_nn.linalg import is_column_major
from interp_nn.ops import losses, polynomial
from interp_nn.ops import summary as operators
from interp_nn.ops.library import any_autocast_enabled, apply, is_batched, ordinary
from interp_nn.ops.losses import CrossEntropyBackwardFunction, any_ignored, computed_late, expression
from interp_nn.ops.summary import as_rows, backward_function, ordered, spread


class SummaryDirect(Function):
    """Y (n, k) of x (..., d), b (d, k) and bias (k,) or None by a plan, or (P, Y) of a pair; without coefficients the summary.

    Results have two dimensions, because a view that a Function returns cannot be written in place. What is saved has the
    shapes of what the operators' Function saves: a checkpoint may call the one and then the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        b: Tensor,
        bias: Tensor | None,
        coefficients: Tensor | None,
        scale: Tensor | None,
        plan: Plan,
        pair: bool,
    ) -> Any:
        q = None if coefficients is None else Polynomial(coefficients, scale)
        rows = as_rows(x)
        p, y, saved = _forward(rows, b, bias, q, plan, pair)
        if rows is not x and saved and saved[0] is p:
            saved[0] = _shaped_as(x, p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, b, coefficients, scale, *saved)
        ctx.plan, ctx.pair = plan, pair
        return (p, y) if pair else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dp, dy = grads if ctx.pair else (None, grads[0])
        given = dy if dp is None else dp
        if given is None:
            return (None,) * 7
        x, b, coefficients, scale, *saved = ctx.saved_tensors
        plan, needs = ctx.plan, ctx.needs_input_grad[:5]
        q = None if coefficients is None else Polynomial(coefficients, scale)
        if is_grad_enabled() or not ordinary() or any_autocast_enabled() or is_batched(given):
            dp, dy = (None if g is None else _shaped_as(x, g) for g in (dp, dy))
            if q is not None:
                return (*polynomial.backward(dp, dy, x, b, q, saved, plan, needs), None, None)
            first, second = (*saved, None, None)[:2]
            found = apply(backward_function(), dp, dy, x, b, first, second, plan, *needs[:3])
            return (*spread(found, needs), None, None)
        rows = as_rows(x)
        if rows is not x:
            saved = [as_rows(t) for t in saved]
        dx, db, *rest = _backward(dp, dy, rows, b, q, saved, plan, needs)
        if dx is not None and rows is not x:
            dx = dx.view(x.shape)
        if db is not None and db.stride() != b.stride():
            db = ordered(db, is_column_major(b))
        return dx, db, *rest, None, None


_apply_summary = super(Function, SummaryDirect).apply  # without the step that binds arguments for transforms


def _forward(
    x: Tensor, b: Tensor, bias: Tensor | None, q: Polynomial | None, plan: Plan, pair: bool
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    if q is None:
        return engines.get(plan.engine).forward(x, b, bias, plan, pair)
    if plan.engine == "eager":
        return eager_polynomial.forward(x, b, bias, q, plan, pair)
    return engines.get(plan.engine).forward(x, b, bias, plan, pair, q)


def _backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    q: Polynomial | None,
    saved: Sequence[Tensor],
    plan: Plan,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the needed ones of (dX, db, dbias, dc, da), None for the others."""
    if q is not None and plan.engine == "eager":
        return eager_polynomial.backward(dp, dy, x, b, q, saved, plan, needs)
    need_x, need_b, need_bias, need_c, _ = needs
    backward = engines.get(plan.engine).backward
    if q is None:
        return *backward(dp, dy, x, b, saved, plan, need_x, need_b, need_bias), None, None
    *found, dc = backward(dp, dy, x, b, saved, plan, need_x, need_b, need_bias, need_c, q)
    return *found, None if dc is None else dc.to(q.coefficients.dtype), None


def summary(x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Return X b (bᵀb) + bias."""
    rows = x if x.dim() == 2 else as_rows(x)
    y: Tensor
    if plan.autograd:
        y = eager.forward(rows, b, bias, plan, False)[1]
    elif _any_batched(x, b, bias):
        return operators.summary(x, b, bias, plan)[0]
    elif is_grad_enabled() and (x.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)):
        y = _apply_summary(x, b, bias, None, None, plan, False)
    else:
        y = engines.get(plan.engine).forward(rows, b, bias, plan, False)[1]
    return y if rows is x else _shaped_as(x, y)


def summary_pair(x: Tensor, b: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return (X b, X b (bᵀb))."""
    if _any_batched(x, b):
        return operators.summary_pair(x, b, plan)
    if is_grad_enabled() and (x.requires_grad or b.requires_grad) and not plan.autograd:
        p, y = _apply_summary(x, b, None, None, None, plan, True)
    else:
        p, y, _ = engines.get(plan.engine).forward(as_rows(x), b, None, plan, True)
    return (p, y) if x.dim() == 2 else (_shaped_as(x, p), _shaped_as(x, y))


def polynomial_summary(
    x: Tensor, b: Tensor, bias: Tensor | None, q: Polynomial, plan: Plan, pair: bool
) -> tuple[Tensor | None, Tensor]:
    """Return (a X b or None, X b q(bᵀb) + bias) by a plan without `autograd`; the projection where it is a pair's."""
    if _any_batched(x, b, bias, *q):
        return polynomial.summary_pair(x, b, q, plan) if pair else (None, polynomial.summary(x, b, bias, q, plan))
    if is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, b, bias, *q)):
        found = _apply_summary(x, b, bias, *q, plan, pair)
        p, y = found if pair else (None, found)
    else:
        p, y, _ = _forward(as_rows(x), b, bias, q, plan, pair)
    return (p, y) if x.dim() == 2 else (None if p is None else _shaped_as(x, p), _shaped_as(x, y))


def _any_batched(*tensors: Tensor | None) -> bool:
    """Return True if a tensor is one of `is_batched`, which has no memory for a kernel to read."""
    return any(t is not None and is_batched(t) for t in tensors)


def _shaped_as(x: Tensor, rows: Tensor) -> Tensor:
    return rows.view(*x.shape[:-1], rows.shape[1])


class CrossEntropyDirect(Function):
    """The three-term loss of x (..., d), of a pair where a is None, else of an output layer a and c; for "none" of shape (n,)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        b: Tensor,
        a: Tensor | None,
        c: Tensor | None,
        target: Tensor,
        options: LossOptions,
        plan: Plan,
    ) -> Tensor:
        needs = (False,) * 4 if computed_late(x, options) else ctx.needs_input_grad[:4]
        value, grads = _loss(x, b, a, c, target, options, plan, None, needs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, b, a, c, target, *grads)
        ctx.options, ctx.plan, ctx.spent = options, plan, False
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        x, b, a, c, target, *grads = ctx.saved_tensors
        if ctx.spent:
            grads = []  # of a retained graph: handed out by an earlier backward, and scaled in place by some engines
        options, plan, needs = ctx.options, ctx.plan, ctx.needs_input_grad[:4]
        if is_grad_enabled() or not ordinary() or any_autocast_enabled() or is_batched(upstream):
            ones = (*grads, *(None,) * 5)[:5]
            upstream = upstream.view(target.shape) if options.reduction == "none" else upstream
            tensors = upstream, x, b, a, c, None, None, target
            found = apply(CrossEntropyBackwardFunction, *tensors, *ones, options, plan, needs)
        elif grads:
            ctx.spent = True
            # By .data, which has a version of its own: what their owner does to them then is no harm to a retained graph.
            found = [g.data for g in engines.get(plan.engine).scale(grads, upstream)]
        else:
            found = _loss(x, b, a, c, target, options, plan, upstream.reshape(-1), needs)[1]
        return (*spread(found, needs), None, None, None)


_apply_cross_entropy = super(Function, CrossEntropyDirect).apply


def _loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    plan: Plan,
    upstream: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """Return an engine's loss, and the needed gradients in the shape of x and the memory order of b."""
    rows, classes = as_rows(x), target if target.dim() == 1 else target.reshape(-1)
    value, grads = engines.get(plan.engine).loss(rows, b, a, c, classes, options, plan, upstream, needs)
    if needs[0] and rows is not x:
        grads[0] = grads[0].view(x.shape)
    if needs[1] and grads[needs[0]].stride() != b.stride():
        grads[needs[0]] = ordered(grads[needs[0]], is_column_major(b))
    return value, grads


def cross_entropy(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    plan: Plan,
) -> Tensor:
    """Return the loss."""
    if plan.autograd:
        try:
            return expression(x, b, a, c, target, options, plan, any_ignored(target, options.ignore_index))
        except IndexError:  # of PyTorch's loss, which spares the check where all is well
            eager.check_target(target, b.shape[1] if a is None else a.shape[0], options.ignore_index)
            raise
    if _any_batched(x, b, a, c, target):
        return losses.cross_entropy(x, b, a, c, target, options, plan)
    value: Tensor
    if is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, b, a, c)):
        value = _apply_cross_entropy(x, b, a, c, target, options, plan)
    else:
        value, _ = _loss(x, b, a, c, target, options, plan, None, (False,) * 4)
    return value.view(target.shape) if options.reduction == "none" and target.dim() != 1 else value
