"""The eager path: one autograd Function and one call of an engine, without operators.

Only for checked plain tensors where `library.ordinary` holds, and none of them is one of `library.is_batched`. The backward
calls the engine too, unless something is active there that has to see an operator, or the backward is differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, addmm, is_grad_enabled
from torch.autograd import Function

from interp_nn import engines
from interp_nn.engines import eager, eager_polynomial
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.problem import (
    LossOptions,
    Plan,
    PreparedBackward,
    PreparedForward,
    PreparedLoss,
    PreparedScale,
)
from interp_nn.linalg import is_column_major
from interp_nn.ops import polynomial
from interp_nn.ops.library import any_autocast_enabled, apply, is_batched, ordinary, tensor_check, unwatched
from interp_nn.ops.losses import CrossEntropyBackwardFunction, any_ignored, computed_late, expression
from interp_nn.ops.summary import as_rows, backward_function, ordered, spread

_TRIES = (
    16  # for all functions of a call: a kernel is known to be compiled, with its arguments, from its third launch on
)
_Check = Callable[..., bool]  # of `tensor_check`


class Call:
    """A checked call of one layout: its plan, and an engine's functions for it, which do without what the layout decides.

    Those of a backward come with a check of the tensors that they were prepared for.

    Attributes:
        plan: The plan.
        pair: The projection is returned too.
        options: A loss's options.
        factors: The products of a plan of a summary that is left to PyTorch's autograd, else None.
        products: The same if the tensors are multiplied in place, else None.
        in_place: `eager.in_place` holds, or of a loss `eager.loss_in_place`.
        late: A loss's gradients are computed in the backward; None before the first call.
        forward: `Engine.prepared_forward`, or None.
        backward: `Engine.prepared_backward` by the given upstreams and the needed gradients.
        loss: `Engine.prepared_loss` by the needed gradients.
        scale: `Engine.prepared_scale` by the number of gradients.
    """

    __slots__ = (
        "backward", "factors", "forward", "in_place", "late", "loss", "options", "pair", "plan", "products", "scale", "tries",
    )  # fmt: skip

    def __init__(
        self, plan: Plan, pair: bool = False, options: LossOptions | None = None, in_place: bool = False
    ) -> None:
        self.plan, self.pair, self.options = plan, pair, options
        self.factors = eager.FACTORS.get(plan.order) if plan.autograd else None
        self.products = self.factors if in_place else None
        self.in_place = in_place
        self.late: bool | None = None
        self.forward: PreparedForward | None = None
        self.backward: dict[tuple[bool, ...], tuple[_Check, PreparedBackward]] = {}
        self.loss: dict[tuple[bool, ...], PreparedLoss] = {}
        self.scale: dict[int, tuple[_Check, PreparedScale]] = {}
        self.tries = 0 if plan.engine == "eager" else _TRIES

    def prepared(self, name: str, *given: Any) -> Any:
        """Return what an engine has prepared, or None. To be called while there are tries."""
        prepare = getattr(engines.get(self.plan.engine), name, None)
        self.tries = 0 if prepare is None else self.tries - 1
        return None if prepare is None else prepare(*given)


class SummaryDirect(Function):
    """Y (n, k) of x (..., d), b (d, k) and bias (k,) or None.

    It has two dimensions, because a view that a Function returns cannot be written in place. What is saved has the shapes of
    what the operators' Function saves: a checkpoint may call the one and then the other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        prepared = call.forward
        found = None if prepared is None else prepared(x, b, bias)
        p, y, saved = _forward(x, b, bias, call) if found is None else found
        if saved and saved[0] is p and x.dim() != 2:
            saved[0] = _shaped_as(x, p)
        ctx.save_for_backward(x, b, *saved)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, b, *saved = ctx.saved_tensors
        call, needs = ctx.call, ctx.needs_input_grad[:3]
        found = _by_prepared(None, dy, x, b, saved, call, needs)
        if found is not None:
            return *found, None
        if _needs_operators(dy):
            first, second = (*saved, None, None)[:2]
            found = apply(backward_function(), None, _shaped_as(x, dy), x, b, first, second, call.plan, *needs)
            return (*spread(found, needs), None)
        return *_backward(None, dy, x, b, saved, call, needs), None


class PolynomialDirect(Function):
    """Y (n, k) of a polynomial, or the (P, Y) of a pair; without coefficients those of the summary. See `SummaryDirect`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        b: Tensor,
        bias: Tensor | None,
        coefficients: Tensor | None,
        scale: Tensor | None,
        shift: float,
        call: Call,
    ) -> Any:
        q = None if coefficients is None else Polynomial(coefficients, scale, shift)
        p, y, saved = _forward(x, b, bias, call, q)
        if x.dim() != 2 and saved and saved[0] is p:
            saved[0] = _shaped_as(x, p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, b, coefficients, scale, *saved)
        ctx.call, ctx.shift = call, shift
        return (p, y) if call.pair else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad[:5]
        dp, dy = grads if call.pair else (None, grads[0])
        given = dy if dp is None else dp
        if given is None:
            return (None,) * 7
        x, b, coefficients, scale, *saved = ctx.saved_tensors
        q = None if coefficients is None else Polynomial(coefficients, scale, ctx.shift)
        if q is None:
            found = _by_prepared(dp, dy, x, b, saved, call, needs[:3])
            if found is not None:
                return *found, None, None, None, None
        if _needs_operators(given):
            dp, dy = (None if g is None else _shaped_as(x, g) for g in (dp, dy))
            if q is not None:
                return (*polynomial.backward(dp, dy, x, b, q, saved, call.plan, needs), None, None)
            first, second = (*saved, None, None)[:2]
            found = apply(backward_function(), dp, dy, x, b, first, second, call.plan, *needs[:3])
            return (*spread(found, needs), None, None)
        if q is None:
            return *_backward(dp, dy, x, b, saved, call, needs[:3]), None, None, None, None
        return *_polynomial_backward(dp, dy, x, b, q, saved, call.plan, needs), None, None


# Without the step that binds arguments for transforms.
_apply_summary = super(Function, SummaryDirect).apply
_apply_polynomial = super(Function, PolynomialDirect).apply


def _needs_operators(upstream: Tensor) -> bool:
    """Return True where something sees a backward's operators: it is differentiated, or batched, or a mode is active."""
    return is_grad_enabled() or not ordinary() or any_autocast_enabled() or is_batched(upstream)


def _laid_out(dx: Tensor | None, db: Tensor | None, x: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return dX in the shape of x, and db in the memory order of b."""
    if dx is not None and x.dim() != 2:
        dx = dx.view(x.shape)
    if db is not None and db.stride() != b.stride():
        db = ordered(db, is_column_major(b))
    return dx, db


def _forward(
    x: Tensor, b: Tensor, bias: Tensor | None, call: Call, q: Polynomial | None = None
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Return (P or None, Y, saved) of the summary or a polynomial, P and Y (n, k)."""
    if call.forward is not None and q is None and (prepared := call.forward(x, b, bias)) is not None:
        return prepared
    rows, plan = as_rows(x), call.plan
    if q is not None and plan.engine == "eager":
        return eager_polynomial.forward(rows, b, bias, q, plan, call.pair)
    given = () if q is None else (q,)
    found = engines.get(plan.engine).forward(rows, b, bias, plan, call.pair, *given)
    if call.tries and q is None and call.forward is None and x.is_contiguous():
        call.forward = call.prepared("prepared_forward", rows, b, bias, plan)
    return found


def _by_prepared(
    dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor, saved: Sequence[Tensor], call: Call,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...] | None:  # fmt: skip
    """Return the gradients by what an engine has prepared; None where it has not, or where something may see operators."""
    prepared = call.backward.get(needs if dp is None else (*needs, True))
    if prepared is None or dy is None or is_grad_enabled() or not unwatched():
        return None
    check, function = prepared
    if not (check(dy, x, b, *saved) if dp is None else check(dp, dy, x, b, *saved)):
        return None
    return function(dp, dy, x, b, saved)


def _backward(
    dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor, saved: Sequence[Tensor], call: Call,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the needed ones of (dX, db, dbias) of the summary, None for the others."""
    rows = as_rows(x)
    as_saved = saved if rows is x else [as_rows(t) for t in saved]
    dx, db, dbias = engines.get(call.plan.engine).backward(dp, dy, rows, b, as_saved, call.plan, *needs)
    key = needs if dp is None else (*needs, True)
    if call.tries and dy is not None and x.is_contiguous() and key not in call.backward:
        made = call.prepared("prepared_backward", dp, dy, rows, b, as_saved, call.plan, needs)
        given = (dy, x, b, *saved) if dp is None else (dp, dy, x, b, *saved)
        check = None if made is None else tensor_check(*given)
        if check is not None:
            call.backward[key] = check, made
    return *_laid_out(dx, db, x, b), dbias


def _polynomial_backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    q: Polynomial,
    saved: Sequence[Tensor],
    plan: Plan,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the needed ones of (dX, db, dbias, dc, da), None for the others."""
    rows = as_rows(x)
    if rows is not x:
        saved = [as_rows(t) for t in saved]
    if plan.engine == "eager":
        dx, db, *rest = eager_polynomial.backward(dp, dy, rows, b, q, saved, plan, needs)
    else:
        need_x, need_b, need_bias, need_c, _ = needs
        backward = engines.get(plan.engine).backward
        dx, db, dbias, dc = backward(dp, dy, rows, b, saved, plan, need_x, need_b, need_bias, need_c, q)
        rest = [dbias, None if dc is None else dc.to(q.coefficients.dtype), None]
    return *_laid_out(dx, db, x, b), *rest


def summary(x: Tensor, b: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    """Return X b (bᵀb) + bias."""
    products = call.products
    if products is not None:  # the shortest way, for few rows
        _, left, right = products(x, b)
        return left @ right if bias is None else addmm(bias, left, right)
    y: Tensor
    if call.factors is not None:
        y = eager.summary(x if x.dim() == 2 else as_rows(x), b, bias, call.factors)
    elif is_grad_enabled() and (x.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)):
        y = _apply_summary(x, b, bias, call)
    else:
        y = _forward(x, b, bias, call)[1]
    return y if x.dim() == 2 else _shaped_as(x, y)


def summary_pair(x: Tensor, b: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return (X b, X b (bᵀb))."""
    p: Tensor | None
    if is_grad_enabled() and (x.requires_grad or b.requires_grad) and not call.plan.autograd:
        p, y = _apply_polynomial(x, b, None, None, None, 0.0, call)
    else:
        p, y, _ = _forward(x, b, None, call)
    assert p is not None
    return (p, y) if x.dim() == 2 else (_shaped_as(x, p), _shaped_as(x, y))


def polynomial_summary(
    x: Tensor, b: Tensor, bias: Tensor | None, q: Polynomial, call: Call
) -> tuple[Tensor | None, Tensor]:
    """Return (a X b or None, X b q(bᵀb) + bias) by a plan without `autograd`; the projection where it is a pair's."""
    tensors = x, b, bias, q.coefficients, q.scale
    if is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        found = _apply_polynomial(x, b, bias, *q, call)
        p, y = found if call.pair else (None, found)
    else:
        p, y, _ = _forward(x, b, bias, call, q)
    return (p, y) if x.dim() == 2 else (None if p is None else _shaped_as(x, p), _shaped_as(x, y))


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
        call: Call,
    ) -> Tensor:
        if call.late is None:
            assert call.options is not None
            call.late = computed_late(x, call.options)
        needs = _NONE if call.late else ctx.needs_input_grad[:4]
        prepared = call.loss.get(needs)
        found = None if prepared is None else prepared(x, b, a, c, target)
        value, grads = _loss(x, b, a, c, target, call, None, needs) if found is None else found
        ctx.save_for_backward(x, b, a, c, target, *grads)
        ctx.call, ctx.spent = call, False
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, b, a, c, target, *grads = ctx.saved_tensors
        if ctx.spent:
            grads = []  # of a retained graph: handed out by an earlier backward, and scaled in place by some engines
        call, needs = ctx.call, ctx.needs_input_grad[:4]
        scaled = None
        prepared = call.scale.get(len(grads))
        if prepared is not None and not is_grad_enabled() and unwatched() and prepared[0](upstream, *grads):
            scaled = prepared[1](grads, upstream)
        if scaled is None and _needs_operators(upstream):
            options, plan, ones = call.options, call.plan, (*grads, *(None,) * 5)[:5]
            upstream = upstream.view(target.shape) if options.reduction == "none" else upstream
            tensors = upstream, x, b, a, c, None, None, target
            found = apply(CrossEntropyBackwardFunction, *tensors, *ones, options, plan, needs)
        elif grads:
            ctx.spent = True
            # By .data, which has a version of its own: what their owner does to them then is no harm to a retained graph.
            found = [g.data for g in scaled or _scale(grads, upstream, call)]
        else:
            found = _loss(x, b, a, c, target, call, upstream.reshape(-1), needs)[1]
        return (*spread(found, needs), None, None)


_NONE = (False,) * 4  # needed gradients
_apply_cross_entropy = super(Function, CrossEntropyDirect).apply


def _loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    call: Call,
    upstream: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor]]:
    """Return an engine's loss, and the needed gradients in the shape of x and the memory order of b."""
    rows, classes = as_rows(x), target if target.dim() == 1 else target.reshape(-1)
    plan, options = call.plan, call.options
    assert options is not None
    value, grads = engines.get(plan.engine).loss(rows, b, a, c, classes, options, plan, upstream, needs)
    if call.tries and upstream is None and needs not in call.loss and x.is_contiguous() and target.is_contiguous():
        made = call.prepared("prepared_loss", rows, b, a, c, classes, options, plan, needs)
        if made is not None:
            call.loss[needs] = made
    if needs[0] and rows is not x:
        grads[0] = grads[0].view(x.shape)
    if needs[1] and grads[needs[0]].stride() != b.stride():
        grads[needs[0]] = ordered(grads[needs[0]], is_column_major(b))
    return value, grads


def _scale(grads: Sequence[Tensor], upstream: Tensor, call: Call) -> list[Tensor]:
    """Return the gradients times the upstream, which may overwrite them."""
    found = engines.get(call.plan.engine).scale(grads, upstream)
    if call.tries and len(grads) not in call.scale:
        made = call.prepared("prepared_scale", grads, upstream)
        check = None if made is None else tensor_check(upstream, *grads)
        if check is not None:
            call.scale[len(grads)] = check, made
    return found


def cross_entropy(x: Tensor, b: Tensor, a: Tensor | None, c: Tensor | None, target: Tensor, call: Call) -> Tensor:
    """Return the loss."""
    plan, options = call.plan, call.options
    assert options is not None
    if plan.autograd:
        masked = any_ignored(target, options.ignore_index)
        try:
            if call.products is not None:
                first, left, right = call.products(x, b)
                return eager.three_terms(first, left @ right, target, options, masked)
            if call.in_place and a is not None:
                first, second = eager.logits_from_x(x, b, a, c).unbind(1)
                return eager.three_terms(first, second, target, options, masked)
            return expression(x, b, a, c, target, options, plan, masked)
        except IndexError:  # of PyTorch's loss, which spares the check where all is well
            eager.check_target(target, b.shape[1] if a is None else a.shape[0], options.ignore_index)
            raise
    value: Tensor
    if is_grad_enabled() and (
        x.requires_grad or b.requires_grad or (a is not None and a.requires_grad) or (c is not None and c.requires_grad)
    ):
        value = _apply_cross_entropy(x, b, a, c, target, call)
    else:
        prepared = call.loss.get(_NONE)
        found = None if prepared is None else prepared(x, b, a, c, target)
        value, _ = _loss(x, b, a, c, target, call, None, _NONE) if found is None else found
    return value.view(target.shape) if options.reduction == "none" and target.dim() != 1 else value
