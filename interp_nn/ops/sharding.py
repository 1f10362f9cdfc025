"""The summary of DTensors.

Shards over rows are computed by an operator with a registered sharding strategy, shards over d and k by DTensor's own products.

Where b is replicated and x sharded over its rows, every device runs one launch on its own rows; db and the bias's gradient come
back as partial sums, which DTensor reduces when they are used. Otherwise projection, Gram matrix and their product are
DTensor's, which knows what to gather and what to reduce. This file is imported when the first DTensor is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from interp_nn.engines import select
from interp_nn.engines.orders import saved_names
from interp_nn.engines.problem import Plan, plan_from_text, plan_to_text
from interp_nn.linalg import is_column_major
from interp_nn.ops import summary as whole
from interp_nn.ops.flops import count_by, rows_backward_flops, summary_flops
from interp_nn.ops.library import apply, define


def _forward(x: Tensor, b: Tensor, bias: Tensor | None, plan: str) -> tuple[Tensor, Tensor, Tensor]:
    return _with_two(x, *whole._summary(x, b, bias, plan))


def _fake_forward(x: Tensor, b: Tensor, bias: Tensor | None, plan: str) -> tuple[Tensor, Tensor, Tensor]:
    return _with_two(x, *whole._fake_summary(x, b, bias, plan))


def _with_two(x: Tensor, y: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, two saved tensors, empty where the plan saves fewer): DTensor has no strategies for lists of outputs."""
    first, second = (*saved, x.new_empty(0), x.new_empty(0))[:2]
    return y, first, second


def _backward(
    dy: Tensor,
    x: Tensor,
    b: Tensor,
    first: Tensor,
    second: Tensor,
    plan: str,
    needs: Sequence[bool],
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dX, db, dbias), empty where not needed."""
    saved = (first, second)[: len(saved_names(plan_from_text(plan)))]
    return _filled(whole._summary_backward(None, dy, x, b, saved, plan, needs, transposed), x, needs)


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    b: Tensor,
    first: Tensor,
    second: Tensor,
    plan: str,
    needs: Sequence[bool],
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _filled(whole._fake_summary_backward(None, dy, x, b, (), plan, needs, transposed), x, needs)


def _filled(found: Sequence[Tensor], x: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    dx, db, dbias = (x.new_empty(0) if t is None else t for t in whole.spread(found, needs))
    return dx, db, dbias


_forward_operator = define(
    "summary_of_rows(Tensor x, Tensor b, Tensor? bias, str plan) -> (Tensor, Tensor, Tensor)", _forward, _fake_forward
)
_backward_operator = define(
    "summary_of_rows_backward(Tensor dy, Tensor x, Tensor b, Tensor first, Tensor second, str plan, bool[3] needs, "
    "bool transposed) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    cast_inputs=False,
)


def _forward_strategy(x: Any, b: Any, bias: Any, plan: str) -> list[tuple[list[Any], list[Any]]]:
    """Return the strategies for one mesh dimension: rows anywhere, all else on every device."""
    whole_bias = None if bias is None else Replicate()
    return [
        ([rows, Replicate(), Replicate()], [rows, Replicate(), whole_bias, None])
        for rows in (Replicate(), *map(Shard, range(len(x.shape) - 1)))
    ]


def _backward_strategy(
    dy: Any, x: Any, b: Any, first: Any, second: Any, plan: str, needs: Sequence[bool], transposed: bool
) -> list[tuple[list[Any], list[Any]]]:
    places: list[tuple[Any, Any]] = [(Replicate(), Replicate())]
    places += [(Shard(dim), Partial()) for dim in range(len(x.shape) - 1)]
    weights = [Replicate()] * 3
    return [([rows, total, total], [rows, rows, *weights, None, None, None]) for rows, total in places]


count_by(torch.ops.interp_nn.summary_of_rows, summary_flops)
count_by(torch.ops.interp_nn.summary_of_rows_backward, rows_backward_flops)
register_sharding(torch.ops.interp_nn.summary_of_rows.default)(_forward_strategy)
register_sharding(torch.ops.interp_nn.summary_of_rows_backward.default)(_backward_strategy)


class RowsFunction(Function):
    """The autograd Function over `interp_nn::summary_of_rows`: (y, saved, saved)."""

    @staticmethod
    def forward(x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        y, first, second = _forward_operator(x, b, bias, plan_to_text(plan))
        return y, first, second

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, b, _, ctx.plan = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, b, *output[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 4
        x, b, first, second = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # for a second derivative: products, which DTensor differentiates
            dx, db = whole.gradient(None, whole.as_rows(dy), whole.as_rows(x), b)
            found = dx.view(x.shape), db, dy.sum(tuple(range(dy.dim() - 1)))
        else:
            found = _backward_operator(dy, x, b, first, second, plan_to_text(ctx.plan), needs, is_column_major(b))
        return (*(t if need else None for t, need in zip(found, needs, strict=True)), None)


def summary(x: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Return Y = X b (bᵀb) + bias as a DTensor, for checked arguments that are DTensors on one mesh."""
    assert isinstance(x, DTensor) and isinstance(b, DTensor) and (bias is None or isinstance(bias, DTensor))
    if not _over_rows(x, b, bias):
        return whole.summary(x, b, bias, whole.BY_AUTOGRAD)[0]
    local = x.to_local()
    graph = torch.is_grad_enabled()
    needs = graph and x.requires_grad, graph and b.requires_grad
    d, k = b.shape
    problem = select.problem_of(local, whole.row_count(local), d, k, False, needs)
    return apply(RowsFunction, x, b, bias, select.choose(problem, any_rows=True))[0]


def _over_rows(x: DTensor, b: DTensor, bias: DTensor | None) -> bool:
    """Return True if every device has all of b and the bias, and whole rows of x."""
    parameters = b.placements if bias is None else (*b.placements, *bias.placements)
    whole_rows = all(p.is_replicate() or (type(p) is Shard and p.dim % x.dim() < x.dim() - 1) for p in x.placements)
    return whole_rows and all(p.is_replicate() for p in parameters)
