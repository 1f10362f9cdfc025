"""Operators `summary_cross_entropy` and its backward: the three-term loss of a pair, or of a head's two logits.

w1 CE(o1, t) + w2 CE(o2, t) + w3 MSE(o1, o2), with (o1, o2) = (P, Y), or (P Aᵀ + c, Y Aᵀ + c) behind an output layer. One
call gives the loss and its gradients for an upstream of 1, scaled when the upstream arrives. Where that scaling would
come too late (fp16, whose small gradients underflow; one upstream a row) the backward computes them with the upstream.

Given coefficients, and a scale or None, they compute the loss of a polynomial, on engines with kernels; the eager engine's is
an expression under PyTorch's autograd. `needs` then has a fifth entry, the coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from interp_nn import engines
from interp_nn.engines import eager, eager_polynomial, select
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.problem import LossOptions, Plan, plan_from_text, plan_to_text
from interp_nn.linalg import accumulation_dtype, is_column_major
from interp_nn.ops.library import apply, define, implement, is_batched, loses_derivatives, transforming
from interp_nn.ops.summary import as_rows, checked_polynomial, ordered, row_count, spread


def _loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    weights: Sequence[float],
    ignore_index: int,
    reduction: str,
    plan: str,
    needs: Sequence[bool],
    transposed: bool,
    coefficients: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    upstream: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    chosen = plan_from_text(plan)
    options = LossOptions((weights[0], weights[1], weights[2]), ignore_index, reduction)
    loss = engines.get(chosen.engine).loss
    if coefficients is None:
        value, grads = loss(as_rows(x), b, a, c, target.reshape(-1), options, chosen, upstream, needs)
    else:
        if chosen.engine == "eager":
            raise ValueError("plan: got the eager engine for the loss of a polynomial, want one with kernels")
        q = checked_polynomial(coefficients, scale)
        value, grads = loss(as_rows(x), b, a, c, target.reshape(-1), options, chosen, upstream, needs, q)
        if needs[4]:
            grads[-1] = grads[-1].to(coefficients.dtype)
    return value.view(target.shape) if reduction == "none" else value, _shaped(grads, x, needs, transposed)


def _loss_backward(upstream: Tensor, *arguments: Any) -> list[Tensor]:
    return _loss(*arguments, upstream=upstream.reshape(-1))[1]


def _shaped(grads: list[Tensor], x: Tensor, needs: Sequence[bool], transposed: bool) -> list[Tensor]:
    """Return the gradients, dX in the shape of x and db in the memory order that `transposed` asks for."""
    if needs[0]:
        grads[0] = grads[0].view(x.shape)
    if needs[1]:
        grads[needs[0]] = ordered(grads[needs[0]], transposed)
    return grads


def _fake_loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    weights: Sequence[float],
    ignore_index: int,
    reduction: str,
    plan: str,
    needs: Sequence[bool],
    transposed: bool,
    coefficients: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    tensors = (x, b, a, c, coefficients)
    grads = [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=False) if need and t is not None]
    shape = target.shape if reduction == "none" else ()
    return x.new_empty(shape, dtype=accumulation_dtype(x.dtype)), _shaped(grads, x, needs, transposed)


def _fake_loss_backward(upstream: Tensor, *arguments: Any) -> list[Tensor]:
    return _fake_loss(*arguments)[1]


# needs: of x, b, output_weight and output_bias, and with coefficients also of these
_ARGUMENTS = (
    "Tensor x, Tensor b, Tensor? output_weight, Tensor? output_bias, Tensor target, float[3] weights, "
    "int ignore_index, str reduction, str plan, bool[] needs, bool transposed, "
    "Tensor? coefficients=None, Tensor? scale=None"
)
loss_operator = define(f"summary_cross_entropy({_ARGUMENTS}) -> (Tensor, Tensor[])", _loss, _fake_loss)
loss_backward_operator = define(
    f"summary_cross_entropy_backward(Tensor upstream, {_ARGUMENTS}) -> Tensor[]",
    _loss_backward,
    _fake_loss_backward,
    cast_inputs=False,
)


def expression(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    plan: Plan,
    masked: bool = True,
    q: Polynomial | None = None,
) -> Tensor:
    """Return the same loss as one differentiable PyTorch expression.

    It serves plans with `autograd`, torch.func, second derivatives and polynomials. masked: rows may be ignored.
    """
    rows = x if x.dim() == 2 else as_rows(x)
    o1: Tensor | None
    if a is None:
        if q is None:
            o1, o2, _ = eager.forward(rows, b, None, plan, True)
        else:
            o1, o2, _ = eager_polynomial.forward(rows, b, None, q, plan, True)
        assert o1 is not None
    elif q is not None:
        o1, o2 = eager_polynomial.logits(rows, b, a, c, q, plan)
    else:
        o1, o2 = eager.logits(rows, b, a, c, plan)[0].unbind(1)
    if o1.dtype in (torch.float16, torch.bfloat16):
        o1, o2 = o1.float(), o2.float()
    value = eager.three_terms(o1, o2, target if target.dim() == 1 else target.reshape(-1), options, masked)
    return value.view(target.shape) if options.reduction == "none" else value


def _batched_loss_backward(
    upstream: Tensor,
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    weights: Sequence[float],
    ignore_index: int,
    reduction: str,
    plan: str,
    needs: Sequence[bool],
    transposed: bool,
    coefficients: Tensor | None = None,
    scale: Tensor | None = None,
) -> list[Tensor]:
    """Compute the backward under autograd.grad(is_grads_batched=True), whose vmap sees operators and not Functions."""
    options = LossOptions((weights[0], weights[1], weights[2]), ignore_index, reduction)
    tensors = (x, b, a, c, coefficients)
    needed = [t for t, need in zip(tensors, needs, strict=False) if need and t is not None]

    def value(*parameters: Tensor) -> Tensor:
        given = iter(parameters)
        # An output layer's `needs` are false where it is None.
        x, b, a, c, numbers = (next(given) if need else t for t, need in zip(tensors, (*needs, False)[:5], strict=True))
        assert x is not None and b is not None
        q = None if numbers is None else Polynomial(numbers, scale)
        return expression(x, b, a, c, target, options, plan_from_text(plan), q=q)

    return list(torch.func.vjp(value, *needed)[1](upstream))


implement("summary_cross_entropy_backward", _batched_loss_backward, "Batched")


class CrossEntropyFunction(Function):
    """The autograd Function over `interp_nn::summary_cross_entropy`: (loss, *needed gradients for an upstream of 1)."""

    @staticmethod
    def forward(
        x: Tensor,
        b: Tensor,
        a: Tensor | None,
        c: Tensor | None,
        coefficients: Tensor | None,
        scale: Tensor | None,
        target: Tensor,
        options: LossOptions,
        plan: Plan,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        rest = (*_unpack(options), plan_to_text(plan), needs, is_column_major(b), coefficients, scale)
        value, grads = loss_operator(x, b, a, c, target, *rest)
        return (value, *grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options, ctx.plan, _ = inputs
        grads = output[1:]
        ctx.mark_non_differentiable(*grads)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *grads)
        ctx.spent = False

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 10
        x, b, a, c, coefficients, scale, target, *grads = ctx.saved_tensors
        if ctx.spent:
            grads = []  # of a retained graph: handed out by an earlier backward, and scaled in place by some engines
        needs = tuple(ctx.needs_input_grad[: 4 if coefficients is None else 5])
        plain = not (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or transforming(upstream, x, b, a, c, coefficients, scale)
            or is_batched(upstream)
        )
        if grads and plain:
            ctx.spent = True
            # By .data, which has a version of its own: what their owner does to them then is no harm to a retained graph.
            found = [g.data for g in engines.get(ctx.plan.engine).scale(grads, upstream)]
        else:
            ones = (*grads, *(None,) * 5)[:5]
            tensors = upstream, x, b, a, c, coefficients, scale, target
            found = apply(CrossEntropyBackwardFunction, *tensors, *ones, ctx.options, ctx.plan, needs)
        return (*spread(found, needs), *(None,) * (10 - len(needs)))


class CrossEntropyBackwardFunction(Function):
    """The needed gradients times the upstream, or computed with it. Its own backward differentiates `expression`."""

    @staticmethod
    def forward(
        upstream: Tensor,
        x: Tensor,
        b: Tensor,
        a: Tensor | None,
        c: Tensor | None,
        coefficients: Tensor | None,
        scale: Tensor | None,
        target: Tensor,
        g0: Tensor | None,
        g1: Tensor | None,
        g2: Tensor | None,
        g3: Tensor | None,
        g4: Tensor | None,
        options: LossOptions,
        plan: Plan,
        needs: tuple[bool, ...],
    ) -> tuple[Tensor, ...]:
        if g0 is not None:
            return tuple(g * upstream for g in (g0, g1, g2, g3, g4) if g is not None)
        rest = (*_unpack(options), plan_to_text(plan), needs, is_column_major(b), coefficients, scale)
        return tuple(loss_backward_operator(upstream, x, b, a, c, target, *rest))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.plan, ctx.needs = inputs[13:]
        ctx.save_for_backward(*inputs[:8])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        upstream, *tensors, target = ctx.saved_tensors
        present = [t for t in tensors if t is not None]

        def value(*parameters: Tensor) -> Tensor:
            given = iter(parameters)
            x, b = next(given), next(given)
            a, c, coefficients, scale = (None if t is None else next(given) for t in tensors[2:])
            q = None if coefficients is None else Polynomial(coefficients, scale)
            return expression(x, b, a, c, target, ctx.options, ctx.plan, q=q)

        def gradients(upstream: Tensor, *parameters: Tensor) -> list[Tensor]:
            found = iter(torch.func.vjp(value, *parameters)[1](upstream))
            by_place = [None if t is None else next(found) for t in tensors]
            return [g for g, need in zip(by_place, ctx.needs, strict=False) if need and g is not None]

        second = iter(torch.func.vjp(gradients, upstream, *present)[1](list(cotangents)))
        return (next(second), *(None if t is None else next(second) for t in tensors), *(None,) * 9)


def _unpack(options: LossOptions) -> tuple[list[float], int, str]:
    return list(options.weights), options.ignore_index, options.reduction


_FEW = 256  # a list of so many takes less time than two operations


def any_ignored(target: Tensor, ignore_index: int) -> bool:
    """Return True if a class is the ignored one, which costs a synchronisation on a GPU."""
    if target.numel() <= _FEW:
        return ignore_index in (target if target.dim() == 1 else target.flatten()).tolist()
    if ignore_index < 0 and int(target.min()) >= 0:  # of one pass where no class is negative
        return False
    return bool((target == ignore_index).any())


def choose(x: Tensor, b: Tensor, a: Tensor | None, q: Polynomial | None) -> Plan:
    """Return the plan of a loss for checked arguments."""
    enabled = torch.is_grad_enabled()
    scale = None if q is None else q.scale
    needs = enabled and x.requires_grad, enabled and b.requires_grad
    need_scale = enabled and scale is not None and scale.requires_grad
    d, k = b.shape
    classes, degree = k if a is None else a.shape[0], None if q is None else q.degree
    return select.choose(select.problem_of(x, row_count(x), d, k, a is None, needs, classes, degree, need_scale))


def computed_late(x: Tensor, options: LossOptions) -> bool:
    """Return True where a loss's gradients are computed with the upstream: scaled later, those of fp16 have underflowed."""
    return x.dtype == torch.float16 or options.reduction == "none"


def cross_entropy(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    plan: Plan,
    q: Polynomial | None = None,
) -> Tensor:
    """Return the three-term loss for checked arguments; a and c are None for a pair's own loss, q for the summary."""
    compiling = torch.compiler.is_compiling()
    by_eager = q is not None and plan.engine == "eager"
    unread = by_eager and (compiling or not x.is_cpu)  # the target's values: a graph break, a synchronisation
    if unread or (loses_derivatives() if compiling else transforming(x, b, a, c, *(q or ()))):
        return expression(x, b, a, c, target, options, plan, q=q)
    if plan.autograd:
        try:
            return expression(x, b, a, c, target, options, plan, any_ignored(target, options.ignore_index), q)
        except IndexError:  # of PyTorch's loss, which spares the check where all is well
            eager.check_target(target, b.shape[1] if a is None else a.shape[0], options.ignore_index)
            raise
    enabled = torch.is_grad_enabled()
    coefficients, scale, shift = q or (None, None, 0.0)
    assert not shift, "the operator takes powers of G itself"
    tensors = (x, b, a, c) if q is None else (x, b, a, c, coefficients)
    needs = tuple(enabled and t is not None and t.requires_grad for t in tensors)
    now = (False,) * len(needs) if computed_late(x, options) else needs
    return apply(CrossEntropyFunction, x, b, a, c, coefficients, scale, target, options, plan, now)[0]
