"""Operators `summary`, `summary_pair`, `summary_backward`, and the summary's gradients to every order.

A plan travels from forward to backward; the tensors that it saves are further outputs of the forward operators. Operators take it
as a string. In eager mode a plan with `autograd` leaves its backward to PyTorch's autograd. Given coefficients, and a scale or
None, the operators compute X b q(bᵀb), whose autograd Function is in `interp_nn.ops.polynomial`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from interp_nn import engines
from interp_nn.engines import eager, eager_polynomial, select
from interp_nn.engines.eager_polynomial import MOST_COEFFICIENTS, Polynomial
from interp_nn.engines.orders import saved_names
from interp_nn.engines.problem import Plan, plan_from_text, plan_to_text
from interp_nn.linalg import gram, is_column_major
from interp_nn.ops.library import apply, define, implement, is_dtensor, loses_derivatives

BY_AUTOGRAD = Plan("eager", "(Xb)G", autograd=True)  # the plan of DTensors
_SAVING = Plan("eager", "(Xb)G", saves=True)


def as_rows(x: Tensor) -> Tensor:
    """Return x (..., d) as a matrix (n, d), a view where the strides allow it."""
    if x.dim() == 2:
        return x
    return x.reshape(row_count(x), x.shape[-1])  # unlike flatten, has a rule under autograd's own vmap


def _rows_if_any(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_rows(x)


def row_count(x: Tensor) -> int:
    """Return the number of rows n of x (..., d)."""
    n = 1
    for size in x.shape[:-1]:
        n *= size
    return n


def _forward(
    x: Tensor,
    b: Tensor,
    bias: Tensor | None,
    plan: str,
    pair: bool,
    coefficients: Tensor | None,
    scale: Tensor | None,
    shift: float = 0.0,
) -> tuple[Tensor | None, Tensor, list[Tensor], tuple[str, ...]]:
    value = plan_from_text(plan)
    names = saved_names(value, coefficients is not None)
    if coefficients is None:
        if scale is not None:
            raise ValueError("scale: got a tensor without coefficients, want both or None")
        return *engines.get(value.engine).forward(as_rows(x), b, bias, value, pair), names
    q = checked_polynomial(coefficients, scale, shift)
    if value.engine == "eager":
        return *eager_polynomial.forward(as_rows(x), b, bias, q, value, pair), names
    return *engines.get(value.engine).forward(as_rows(x), b, bias, value, pair, q), names


def checked_polynomial(coefficients: Tensor, scale: Tensor | None, shift: float = 0.0) -> Polynomial:
    """Return the polynomial of an operator's arguments."""
    if coefficients.dim() != 1 or not 2 <= len(coefficients) <= MOST_COEFFICIENTS:
        got = tuple(coefficients.shape)
        raise ValueError(f"coefficients: got shape {got}, want (2,) to ({MOST_COEFFICIENTS},)")
    return Polynomial(coefficients, scale, shift)


def _summary(
    x: Tensor,
    b: Tensor,
    bias: Tensor | None,
    plan: str,
    coefficients: Tensor | None = None,
    scale: Tensor | None = None,
    shift: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    _, y, saved, _ = _forward(x, b, bias, plan, False, coefficients, scale, shift)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], b.shape[1]), _contiguous(saved)


def _summary_pair(
    x: Tensor,
    b: Tensor,
    plan: str,
    coefficients: Tensor | None = None,
    scale: Tensor | None = None,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    p, y, saved, names = _forward(x, b, None, plan, True, coefficients, scale, shift)
    assert p is not None
    if x.dim() != 2:
        p, y = (t.view(*x.shape[:-1], b.shape[1]) for t in (p, y))
    return p, y, _contiguous(saved[1:] if names[0] == "P" else saved)


def _summary_backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    saved: Sequence[Tensor],
    plan: str,
    needs: Sequence[bool],
    transposed: bool,
    coefficients: Tensor | None = None,
    scale: Tensor | None = None,
    shift: float = 0.0,
) -> list[Tensor]:
    value = plan_from_text(plan)
    dp, dy = _rows_if_any(dp), _rows_if_any(dy)
    saved = list(map(as_rows, saved))  # a pair's own P may have batch dimensions
    dc = da = None
    need_x, need_b, need_bias, *more = needs
    if coefficients is None:
        backward = engines.get(value.engine).backward
        dx, db, dbias = backward(dp, dy, as_rows(x), b, saved, value, need_x, need_b, need_bias)
    elif value.engine == "eager":
        q = checked_polynomial(coefficients, scale, shift)
        dx, db, dbias, dc, da = eager_polynomial.backward(dp, dy, as_rows(x), b, q, saved, value, needs)
    else:
        need_c, need_a = more
        if need_a:
            raise ValueError(f"needs: got a gradient of the scale for the {value.engine} engine, want the eager engine")
        q = checked_polynomial(coefficients, scale, shift)
        backward = engines.get(value.engine).backward
        dx, db, dbias, dc = backward(dp, dy, as_rows(x), b, saved, value, need_x, need_b, need_bias, need_c, q)
        dc = None if dc is None else dc.to(coefficients.dtype)
    out = [] if dx is None else [dx.view(x.shape)]
    if db is not None:
        out.append(ordered(db, transposed))
    return out + [t for t in (dbias, dc, da) if t is not None]


def ordered(db: Tensor, transposed: bool) -> Tensor:
    """Return db contiguous, or column-major, so that a layer's weight takes its gradient without a copy.

    `transposed` is an argument because compiled code may pass a b with other strides than the traced one.
    """
    return db.mT.contiguous().mT if transposed else db.contiguous()


def _saves_projection(plan: Plan) -> bool:
    return saved_names(plan)[:1] == ("P",)


def _contiguous(saved: Sequence[Tensor]) -> list[Tensor]:
    """Return the saved tensors contiguous, as the fake kernels promise: Inductor may choose other strides for b."""
    return [t.contiguous() for t in saved]


def _fake_saved(x: Tensor, b: Tensor, plan: str, pair: bool, polynomial: bool) -> list[Tensor]:
    n, (d, k) = row_count(x), b.shape
    shapes = {"P": (n, k), "G": (k, k), "W": (d, k), "Q": (n, d), "R": (n, d), "K": (d, d)}
    shapes |= {"q(G)": (k, k), "q(K)": (d, d)}
    names = saved_names(plan_from_text(plan), polynomial)
    return [x.new_empty(shapes[name]) for name in names if not (pair and name == "P")]


def _fake_summary(
    x: Tensor,
    b: Tensor,
    bias: Tensor | None,
    plan: str,
    coefficients: Tensor | None = None,
    scale: Tensor | None = None,
    shift: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    return x.new_empty(*x.shape[:-1], b.shape[1]), _fake_saved(x, b, plan, False, coefficients is not None)


def _fake_summary_pair(
    x: Tensor,
    b: Tensor,
    plan: str,
    coefficients: Tensor | None = None,
    scale: Tensor | None = None,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    shape = (*x.shape[:-1], b.shape[1])
    return x.new_empty(shape), x.new_empty(shape), _fake_saved(x, b, plan, True, coefficients is not None)


def _fake_summary_backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    saved: Sequence[Tensor],
    plan: str,
    needs: Sequence[bool],
    transposed: bool,
    coefficients: Tensor | None = None,
    scale: Tensor | None = None,
    shift: float = 0.0,
) -> list[Tensor]:
    d, k = b.shape
    out = [x.new_empty(x.shape), ordered(x.new_empty(d, k), transposed), x.new_empty(k)]
    out += [t.new_empty(t.shape) for t in (coefficients, scale) if t is not None]
    return [t for t, need in zip(out, needs, strict=False) if need]


_POLYNOMIAL = "Tensor? coefficients=None, Tensor? scale=None, float shift=0.0"
summary_operator = define(
    f"summary(Tensor x, Tensor b, Tensor? bias, str plan, {_POLYNOMIAL}) -> (Tensor, Tensor[])",
    _summary,
    _fake_summary,
)
pair_operator = define(
    f"summary_pair(Tensor x, Tensor b, str plan, {_POLYNOMIAL}) -> (Tensor, Tensor, Tensor[])",
    _summary_pair,
    _fake_summary_pair,
)
# needs: of x, b and bias, and with coefficients also of these and the scale
backward_operator = define(
    "summary_backward(Tensor? dp, Tensor? dy, Tensor x, Tensor b, Tensor[] saved, str plan, bool[] needs, "
    f"bool transposed, {_POLYNOMIAL}) -> Tensor[]",
    _summary_backward,
    _fake_summary_backward,
    cast_inputs=False,
)


def tangent(x: Tensor, b: Tensor, tx: Tensor, tb: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dP, dY) along (tx, tb): dP = tx b + x tb, dY = dP G + P (tbᵀ b + bᵀ tb)."""
    tp = tx @ b + x @ tb
    tg = tb.mT @ b
    return tp, tp @ gram(b) + (x @ b) @ (tg + tg.mT)


def gradient(dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dX, db) for upstream (dP, dY), in plain differentiable products that broadcast over leading dimensions."""
    _, _, saved = eager.forward(x, b, None, _SAVING, True)
    dx, db, _ = eager.backward(dp, dy, x, b, saved, _SAVING, True, True)
    assert dx is not None and db is not None
    return dx, db


def second_gradient(
    dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor, u: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient in (x, b) of <u, dX> + <v, db> = <dP, tP> + <dY, tY>, with (tP, tY) the tangents along (u, v)."""
    if dy is None:
        assert dp is not None
        return dp @ v.mT, u.mT @ dp
    tp = u @ b + x @ v
    tg = v.mT @ b
    tg = tg + tg.mT
    first = dy @ gram(b)  # with respect to tP
    first = first if dp is None else dp + first
    second = dy @ tg  # with respect to P
    t1, t2 = tp.mT @ dy, (x @ b).mT @ dy  # with respect to G and its tangent
    dx = first @ v.mT + second @ b.mT
    return dx, u.mT @ first + x.mT @ second + b @ (t1 + t1.mT) + v @ (t2 + t2.mT)


def _batched_backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    saved: Sequence[Tensor],
    plan: str,
    needs: Sequence[bool],
    transposed: bool,
    coefficients: Tensor | None = None,
    scale: Tensor | None = None,
    shift: float = 0.0,
) -> list[Tensor]:
    """Compute the backward under autograd.grad(is_grads_batched=True), whose vmap sees operators and not Functions."""
    if coefficients is not None:
        found = eager_polynomial.gradient(dp, dy, x, b, Polynomial(coefficients, scale, shift), needs)
        return [t for t in found if t is not None]
    dp, dy = _rows_if_any(dp), _rows_if_any(dy)
    dx, db = gradient(dp, dy, as_rows(x), b)
    bias = dy.sum(0) if dy is not None else b.new_zeros(b.shape[1])
    return [part for part, need in zip((dx.view(x.shape), db, bias), needs, strict=True) if need]


implement("summary_backward", _batched_backward, "Batched")


class SummaryFunction(Function):
    """The autograd Function over `interp_nn::summary` and `::summary_pair`: (y, *saved), or (p, y, *saved) for a pair.

    Its arguments are x (..., d), b (d, k), bias (k,) or None, the plan, and True if the projection is an output.
    """

    @staticmethod
    def forward(x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan, pair: bool) -> tuple[Tensor, ...]:
        if pair:
            p, y, saved = pair_operator(x, b, plan_to_text(plan))
            return (p, y, *saved)
        y, saved = summary_operator(x, b, bias, plan_to_text(plan))
        return (y, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, b, _, plan, pair = inputs
        outputs = 2 if pair else 1
        saved = output[outputs:]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        if pair and _saves_projection(plan):
            saved = (output[0], *saved)
        ctx.save_for_backward(x, b, *saved)
        ctx.plan, ctx.outputs = plan, outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dp, dy = grads[:2] if ctx.outputs == 2 else (None, grads[0])
        if dp is None and dy is None:
            return (None,) * 5
        x, b, *saved = ctx.saved_tensors
        first, second = (*saved, None, None)[:2]
        need_x, need_b, need_bias = ctx.needs_input_grad[:3]
        found = iter(apply(backward_function(), dp, dy, x, b, first, second, ctx.plan, need_x, need_b, need_bias))
        dx = next(found) if need_x else None
        db = next(found) if need_b else None
        return dx, db, next(found) if need_bias else None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan, pair: bool
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        x_dim, b_dim, bias_dim = in_dims[:3]
        outputs = 2 if pair else 1
        if b_dim is None and bias_dim is None:  # a batch of inputs is more rows
            assert x_dim is not None
            out = apply(_summary_function(), x.movedim(x_dim, 0), b, bias, plan, pair)
            return out, (0,) * outputs + (None,) * (len(out) - outputs)
        x, b = _batch(x, x_dim, info.batch_size), _batch(b, b_dim, info.batch_size)
        shape = (*x.shape[:-1], b.shape[2])
        p, y, saved = eager.forward(_batch_rows(x), b, None, plan, pair)
        if bias is not None:
            y = y + _batch(bias, bias_dim, info.batch_size).unsqueeze(1)
        results = [y.view(shape)]
        if pair:
            assert p is not None
            results.insert(0, p.view(shape))
            saved = saved[1:] if _saves_projection(plan) else saved
        return (*results, *saved), (0,) * (len(results) + len(saved))


class SummaryBackwardFunction(Function):
    """The needed ones of (dX, db, dbias): a Function of its own, so that a backward can be differentiated again."""

    @staticmethod
    def forward(
        dp: Tensor | None,
        dy: Tensor | None,
        x: Tensor,
        b: Tensor,
        first: Tensor | None,
        second: Tensor | None,
        plan: Plan,
        need_x: bool,
        need_b: bool,
        need_bias: bool,
    ) -> tuple[Tensor, ...]:
        saved = [t for t in (first, second) if t is not None]
        needs = [need_x, need_b, need_bias]
        return tuple(backward_operator(dp, dy, x, b, saved, plan_to_text(plan), needs, is_column_major(b)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        dp, dy, x, b, _, _, _, *ctx.needs = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dp, dy, x, b)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        dp, dy, x, b = ctx.saved_tensors
        u, v, vbias = spread(cotangents, ctx.needs)
        shape = x.shape
        dp, dy = _rows_if_any(dp), _rows_if_any(dy)
        x = as_rows(x)
        u = torch.zeros_like(x) if u is None else as_rows(u)
        v = torch.zeros_like(b) if v is None else v
        need_dp, need_dy, need_x, need_b = ctx.needs_input_grad[:4]
        gp = gy = gx = gb = None
        if need_dp or need_dy:
            gp, gy = tangent(x, b, u, v)
            gy = gy if vbias is None else gy + vbias
        if need_x or need_b:
            gx, gb = second_gradient(dp, dy, x, b, u, v)
            gx = gx.view(shape)
        upstream_shape = (*shape[:-1], b.shape[1])
        return (
            gp.view(upstream_shape) if gp is not None and need_dp else None,
            gy.view(upstream_shape) if gy is not None and need_dy else None,
            gx if need_x else None,
            gb if need_b else None,
            *(None,) * 6,
        )

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        dp: Tensor | None,
        dy: Tensor | None,
        x: Tensor,
        b: Tensor,
        first: Tensor | None,
        second: Tensor | None,
        plan: Plan,
        need_x: bool,
        need_b: bool,
        need_bias: bool,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        dp, dy = (
            None if g is None else _batch_rows(_batch(g, dim, size))
            for g, dim in zip((dp, dy), in_dims[:2], strict=True)
        )
        x, b = _batch(x, in_dims[2], size), _batch(b, in_dims[3], size)
        out: list[Tensor] = []
        if need_x or need_b:
            dx, db = gradient(dp, dy, _batch_rows(x), b)
            out += [dx.view(x.shape)] * need_x + [db] * need_b
        if need_bias:
            out.append(dy.sum(1) if dy is not None else b.new_zeros(size, b.shape[2]))
        return tuple(out), (0,) * len(out)


class _ForwardModeFunction(SummaryFunction):
    """SummaryFunction with forward-mode AD: a class of its own, because torch.compile refuses a Function with a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        SummaryFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], inputs[1])
        ctx.saved = len(output) - ctx.outputs

    @staticmethod
    def jvp(
        ctx: Any, tx: Tensor | None, tb: Tensor | None, tbias: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        x, b = ctx.saved_tensors[:2]
        tx = torch.zeros_like(x) if tx is None else tx
        tb = torch.zeros_like(b) if tb is None else tb
        tp, ty = tangent(as_rows(x), b, as_rows(tx), tb)
        ty = ty if tbias is None else ty + tbias
        shape = (*x.shape[:-1], b.shape[1])
        return (*(tp.view(shape), ty.view(shape))[2 - ctx.outputs :], *(None,) * ctx.saved)


class _ForwardModeBackwardFunction(SummaryBackwardFunction):
    """SummaryBackwardFunction with forward-mode AD."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        SummaryBackwardFunction.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def jvp(
        ctx: Any, tdp: Tensor | None, tdy: Tensor | None, tx: Tensor | None, tb: Tensor | None, *_: None
    ) -> tuple[Tensor, ...]:
        """Use that the gradient is linear in (dP, dY), and its derivative in (x, b) a Hessian, which is its own transpose."""
        dp, dy, x, b = ctx.saved_tensors
        shape = x.shape
        tx = torch.zeros_like(x) if tx is None else tx
        tb = torch.zeros_like(b) if tb is None else tb
        dp, dy, tdp, tdy = map(_rows_if_any, (dp, dy, tdp, tdy))
        x = as_rows(x)
        gx, gb = second_gradient(dp, dy, x, b, as_rows(tx), tb)
        if tdp is not None or tdy is not None:
            hx, hb = gradient(tdp, tdy, x, b)
            gx, gb = gx + hx, gb + hb
        gbias = tdy.sum(0) if tdy is not None else torch.zeros_like(b[0])
        parts = (gx.view(shape), gb, gbias)
        return tuple(part for part, need in zip(parts, ctx.needs, strict=True) if need)


def _summary_function() -> type[SummaryFunction]:
    return SummaryFunction if torch.compiler.is_compiling() else _ForwardModeFunction


def backward_function() -> type[SummaryBackwardFunction]:
    """Return the Function of a backward that can be differentiated again."""
    return SummaryBackwardFunction if torch.compiler.is_compiling() else _ForwardModeBackwardFunction


def spread(values: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
    """Return the values at the places where `needs` is true, None elsewhere."""
    found = iter(values)
    return [next(found) if need else None for need in needs]


def _batch(t: Tensor, dim: int | None, size: int) -> Tensor:
    """Return t with its batch dimension first, expanded if it has none."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _batch_rows(t: Tensor) -> Tensor:
    """Return (B, ..., d) as (B, n, d)."""
    return t.unsqueeze(1) if t.dim() == 2 else t.flatten(1, -2)


def choose(
    x: Tensor, b: Tensor, pair: bool, degree: int | None = None, need_b: bool = False, need_scale: bool = False
) -> Plan:
    """Return the plan for checked x and b, and a polynomial's degree.

    need_b: b's products need a gradient in any case. need_scale: the scale requires a gradient.
    """
    if is_dtensor(b):
        return BY_AUTOGRAD if degree is None else BY_AUTOGRAD._replace(order="(Xb)q")
    graph = torch.is_grad_enabled()
    needs = graph and x.requires_grad, graph and (need_b or b.requires_grad)
    d, k = b.shape
    problem = select.problem_of(x, row_count(x), d, k, pair, needs, None, degree, graph and need_scale)
    if not torch.compiler.is_compiling() and select.followed():
        return select.choose_followed(problem)
    return select.choose(problem)


def summary(x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan) -> tuple[Tensor, list[Tensor]]:
    """Return (Y = X b (bᵀb) + bias, the saved tensors of the plan) for checked arguments."""
    if plan.autograd or loses_derivatives(x, b, bias):
        _, y, saved = eager.forward(as_rows(x), b, bias, plan, False)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], b.shape[1]), saved
    y, *saved = apply(_summary_function(), x, b, bias, plan, False)
    return y, saved


def small_gram(plan: Plan, saved: Sequence[Tensor], b: Tensor) -> Tensor | None:
    """Return the smaller of bᵀb and bbᵀ, detached, if it is among the saved tensors of a summary; else None."""
    names = {"(Xb)G": ("P", "G")[-len(saved) :], "X(bG)": ("G", "W"), "(X(bbᵀ))b": ("K", "R"), "X((bbᵀ)b)": ("K", "W")}
    found = dict(zip(names.get(plan.order, ()), saved, strict=False))
    gram = found.get("G" if b.shape[1] <= b.shape[0] else "K")
    return None if gram is None else gram.detach()


def summary_pair(x: Tensor, b: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return (X b, X b (bᵀb)) for checked arguments."""
    if plan.autograd or loses_derivatives(x, b):
        p, y, _ = eager.forward(as_rows(x), b, None, plan, True)
        assert p is not None
        if x.dim() == 2:
            return p, y
        shape = (*x.shape[:-1], b.shape[1])
        return p.view(shape), y.view(shape)
    p, y = apply(_summary_function(), x, b, None, plan, True)[:2]
    return p, y
