"""The polynomials X b q(bᵀb): the autograd Function over the operators of the summary, given coefficients and a scale.

Inside a transform of torch.func, in forward mode, and in a backward that is differentiated again, plain products take the
operator's place, so that PyTorch has the derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from interp_nn.engines import eager_polynomial
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.orders import saved_names
from interp_nn.engines.problem import Plan, plan_to_text
from interp_nn.engines.select import requested_now
from interp_nn.linalg import centred, is_column_major
from interp_nn.ops.library import (
    any_autocast_enabled,
    apply,
    is_batched,
    is_dtensor,
    is_tracing,
    ordinary,
    transforming,
)
from interp_nn.ops.summary import as_rows, backward_operator, pair_operator, spread, summary_operator

_FEW_COLUMNS, _MANY_WITH_FEW_COLUMNS, _MANY = 16, 2**15, 2**19


class PolynomialFunction(Function):
    """The autograd Function over `interp_nn::summary` and `::summary_pair` with coefficients: (y, *saved) or (p, y, *saved).

    Its arguments are x (..., d), b (d, k), bias (k,) or None, those of `Polynomial`, the plan, and True if the projection is an
    output.
    """

    @staticmethod
    def forward(
        x: Tensor,
        b: Tensor,
        bias: Tensor | None,
        coefficients: Tensor,
        scale: Tensor | None,
        shift: float,
        plan: Plan,
        pair: bool,
    ) -> tuple[Tensor, ...]:
        if pair:
            p, y, saved = pair_operator(x, b, plan_to_text(plan), coefficients, scale, shift)
            return (p, y, *saved)
        y, saved = summary_operator(x, b, bias, plan_to_text(plan), coefficients, scale, shift)
        return (y, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, b, _, coefficients, scale, shift, plan, pair = inputs
        outputs = 2 if pair else 1
        saved = output[outputs:]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        if pair and saved_names(plan, True)[0] == "P":
            saved = (output[0], *saved)
        ctx.save_for_backward(x, b, coefficients, scale, *saved)
        ctx.plan, ctx.shift, ctx.outputs = plan, shift, outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dp, dy = grads[:2] if ctx.outputs == 2 else (None, grads[0])
        if dp is None and dy is None:
            return (None,) * 8
        x, b, coefficients, scale, *saved = ctx.saved_tensors
        q = Polynomial(coefficients, scale, ctx.shift)
        return (*backward(dp, dy, x, b, q, saved, ctx.plan, ctx.needs_input_grad[:5]), None, None, None)


def backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    q: Polynomial,
    saved: Sequence[Tensor],
    plan: Plan,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Return the needed ones of (dX, db, dbias, dc, da), None for the others, by the operator or differentiable products."""
    if is_compiling() or not (torch.is_grad_enabled() or transforming(dp, dy, x, b)):
        arguments = plan_to_text(plan), needs, is_column_major(b), *q
        return spread(backward_operator(dp, dy, x, b, saved, *arguments), needs)
    return eager_polynomial.gradient(dp, dy, x, b, q, needs)


class WeightFunction(Function):
    """The effective weight of b (d, k) and the fields of `Polynomial`: (w, *saved)."""

    @staticmethod
    def forward(b: Tensor, coefficients: Tensor, scale: Tensor | None, shift: float) -> tuple[Tensor, ...]:
        w, saved = eager_polynomial.weight_forward(b, coefficients.unbind(), scale, shift)
        return (w, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        *tensors, ctx.shift = inputs
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dw = grads[0]
        if dw is None:
            return None, None, None, None
        b, coefficients, scale, *saved = ctx.saved_tensors
        q = Polynomial(coefficients, scale, ctx.shift)
        if torch.is_grad_enabled() or transforming(dw, b):
            saved = eager_polynomial.weight_forward(b, coefficients.unbind(), scale, ctx.shift)[1]
        return *eager_polynomial.weight_backward(dw, b, q, saved, ctx.needs_input_grad[:3]), None


class FormedWeight:
    """An effective weight m a b q(a² bᵀb) and its pull-back to the parameters b and m, without a graph, which costs more.

    Args:
        b: A parameter (d, k) of float32 or float64 on a CPU.
        gain: The parameter m, one number that is not zero, or None for 1.
        coefficients: Two to five numbers, which give the weight as Σ_i c_i b (bᵀb - shift I)ⁱ.
        shift: A number.

    Attributes:
        weight: The weight (k, d) of a plain layer, a leaf that requires a gradient if a parameter does.
    """

    def __init__(self, b: Tensor, gain: Tensor | None, coefficients: Sequence[float], shift: float) -> None:
        self._b, self._gain, self._coefficients = b, gain, coefficients
        w, self._saved = eager_polynomial.weight_forward(b.detach(), coefficients, None, shift)
        self.weight = w.mT.requires_grad_(b.requires_grad or (gain is not None and gain.requires_grad))

    def pull_back(self, grad: Tensor) -> None:
        """Add the gradients of the parameters, from that of the weight, to those that they have."""
        b, gain = self._b, self._gain
        with torch.no_grad():
            db, inner = eager_polynomial.pull_back(grad.mT, b, self._coefficients, self._saved)
            found = [(b, db)] if gain is None else [(b, db), (gain, inner / gain)]  # the weight is linear in the gain
        wanted = [pair for pair in found if pair[0].requires_grad]
        torch.autograd.backward([p for p, _ in wanted], [g for _, g in wanted])


class LayerWeightFunction(Function):
    """The weight (k, d) of `FormedWeight`, for a forward of many rows, beside which its graph costs little."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, gain: Tensor | None, coefficients: Sequence[float], shift: float) -> Tensor:
        w, saved = eager_polynomial.weight_forward(b, coefficients, None, shift)
        ctx.save_for_backward(b, gain, *saved)
        ctx.coefficients, ctx.shift = coefficients, shift
        return w.mT

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        b, gain, *saved = ctx.saved_tensors
        c, needs = ctx.coefficients, ctx.needs_input_grad
        if not (torch.is_grad_enabled() or any_autocast_enabled() or is_batched(dw)) and ordinary():
            db, inner = eager_polynomial.pull_back(dw.mT, b, c, saved)
            return db if needs[0] else None, inner / gain if needs[1] else None, None, None
        q = Polynomial(b.new_tensor(c) if gain is None else b.new_tensor(c) / gain.detach(), None, ctx.shift)
        w, saved = eager_polynomial.weight_forward(b, q.coefficients.unbind(), None, q.shift)
        upstream = dw.mT if gain is None else dw.mT * gain
        grads = eager_polynomial.weight_backward(upstream, b, q, saved, (needs[0], False, False))
        return grads[0], None if gain is None or not needs[1] else (dw.mT * w).sum().view_as(gain), None, None


_apply_layer_weight = super(Function, LayerWeightFunction).apply


def layer_weight(b: Tensor, gain: Tensor | None, coefficients: Sequence[float], shift: float) -> Tensor:
    """Return the weight (k, d) of `FormedWeight` with a graph, where `weight_comes_first`."""
    w: Tensor = _apply_layer_weight(b, gain, coefficients, shift)
    return w


class LayerMatrixFunction(Function):
    """The matrix gain q(bᵀb - shift I) (k, k), by which a layer multiplies few rows of X b."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, gain: Tensor, coefficients: Sequence[float], shift: float) -> Tensor:
        matrix, g = eager_polynomial.matrix_forward(b, coefficients, shift)
        ctx.save_for_backward(b, gain, matrix, g)
        ctx.coefficients, ctx.shift = coefficients, shift
        return gain * matrix

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        b, gain, *saved = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(upstream) or not ordinary():
            saved = eager_polynomial.matrix_forward(b, ctx.coefficients, ctx.shift)
        db, dgain = eager_polynomial.matrix_backward(upstream, b, gain, ctx.coefficients, saved)
        needs = ctx.needs_input_grad
        return db if needs[0] else None, dgain if needs[1] else None, None, None


_apply_layer_matrix = super(Function, LayerMatrixFunction).apply


def few_rows(
    x: Tensor, b: Tensor, bias: Tensor | None, coefficients: Sequence[float], scale: float, gain: Tensor
) -> Tensor:
    """Return gain (a X b q(a² bᵀb)) + bias of checked plain tensors in an exact dtype; the scale multiplies the coefficients."""
    c, shift = centred(tuple(coefficients))
    c = tuple(value * scale ** (2 * i + 1) for i, value in enumerate(c))
    matrix = _apply_layer_matrix(b, gain, c, shift / scale**2)
    p = as_rows(x) @ b
    y = p @ matrix if bias is None else torch.addmm(bias, p, matrix)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], b.shape[1])


def weight_comes_first(x: Tensor, d: int) -> bool:
    """Return True if a plan for x (..., d) forms the weight, in a call with gradients on a CPU that may pass the checks by.

    So it is for more rows than d: all plans form the weight then, and leave the product with x to PyTorch's autograd.
    """
    if type(x) is not Tensor or not (x.is_cpu and torch.is_grad_enabled() and ordinary()):
        return False
    if x.layout is not torch.strided or x.dim() < 2 or x.shape[-1] != d or x.numel() <= d * d:
        return False
    return not (any_autocast_enabled() or is_batched(x)) and requested_now() in ("auto", "eager")


def weight(b: Tensor, q: Polynomial) -> Tensor:
    """Return the effective weight a b q(a² bᵀb) of b (d, k)."""
    if q.degree == 0 or is_compiling() or is_tracing() or is_dtensor(b) or is_batched(b) or transforming(b, *q):
        return eager_polynomial.weight(b, q)
    w: Tensor = apply(WeightFunction, b, *q)[0]
    return w


def _as_layer(w: Tensor, x: Tensor) -> Tensor:
    """Return wᵀ, contiguous as an nn.Linear's weight where that is faster: for many numbers of x on a CPU."""
    many = _MANY_WITH_FEW_COLUMNS if w.shape[1] < _FEW_COLUMNS else _MANY
    return w.mT.contiguous() if not is_compiling() and x.is_cpu and x.numel() >= many else w.mT


def _products(x: Tensor, b: Tensor, bias: Tensor | None, q: Polynomial, plan: Plan) -> bool:
    """Return True where plain products under PyTorch's autograd compute, and not the operator."""
    return plan.autograd or is_dtensor(b) or transforming(x, b, bias, *q)


def summary(x: Tensor, b: Tensor, bias: Tensor | None, q: Polynomial, plan: Plan, gain: Tensor | None = None) -> Tensor:
    """Return X b q(bᵀb) + bias, or gain X b q(bᵀb) + bias, for checked arguments."""
    if _products(x, b, bias, q, plan):
        if plan.order in ("X(bq)", "X(q(K)b)") and (q.degree or gain is not None):
            w = weight(b, q) if gain is None else gain * weight(b, q)
            return torch.nn.functional.linear(x, _as_layer(w, x), bias)  # whose backward has fewer products
        y = eager_polynomial.forward(as_rows(x), b, bias, q, plan, False, gain)[1]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], b.shape[1])
    if gain is not None:
        y = gain * summary(x, b, None, q, plan)
        return y if bias is None else y + bias
    return apply(PolynomialFunction, x, b, bias, *q, plan, False)[0]


def summary_pair(x: Tensor, b: Tensor, q: Polynomial, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return (a X b, X b q(bᵀb)) for checked arguments."""
    if _products(x, b, None, q, plan):
        p, y, _ = eager_polynomial.forward(as_rows(x), b, None, q, plan, True)
        assert p is not None
        if x.dim() == 2:
            return p, y
        shape = (*x.shape[:-1], b.shape[1])
        return p.view(shape), y.view(shape)
    p, y = apply(PolynomialFunction, x, b, None, *q, plan, True)[:2]
    return p, y
