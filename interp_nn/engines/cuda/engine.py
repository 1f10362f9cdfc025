"""The CUDA engine: `forward`, `backward` and `loss` in one launch each, by the compiled kernels of csrc.

Plans: a summary is "(Xb)G" (saves G), a pair also saves P, the loss of a head is "logits_from_latent"; all have at most 128
    columns and
classes. b may have any strides. Products take operands in the inputs' dtype and accumulate in fp32; fp32 operands are rounded
to tf32 where PyTorch's own switch for matrix products allows it, and are split in two such parts otherwise (below compute
capability 8.0, which has no such products, they are multiplied as they are). What is rounded: P, G and W as operands and as
results, D = dP + dY G and the logits' gradients as operands, results.

The library has private operators, whose schemas and fake kernels are here; the public operators of `interp_nn.ops` end in
them. They allocate their results and workspaces themselves, and are launched on the current stream. What they count on is
the kernels' own business (see `memory.counter`), so the schemas do not call it changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from interp_nn.engines import eager
from interp_nn.engines.barrier import counter
from interp_nn.engines.problem import LossOptions, Plan
from interp_nn.linalg import is_column_major

_REDUCTIONS = ("none", "mean", "sum")  # as the library counts them

_LIBRARY = torch.library.Library("interp_nn", "FRAGMENT")


def _define(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define a private operator, whose kernel is in the compiled library."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    torch.library.register_fake(f"interp_nn::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.interp_nn, name).default
    return operator


def _matrix_b(b: Tensor, transposed: bool) -> Tensor:
    d, k = b.shape
    return b.new_empty(k, d).mT if transposed else b.new_empty(d, k)


def _fake_forward(x: Tensor, b: Tensor, bias: Tensor | None, pair: bool, tf32: bool) -> list[Tensor]:
    n, k = x.shape[0], b.shape[1]
    results = [x.new_empty(n, k), x.new_empty(k, k)]
    return [*results, x.new_empty(n, k)] if pair else results


def _fake_backward(
    dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor, p: Tensor | None, g: Tensor | None, counter: Tensor,
    pair: bool, need_x: bool, need_b: bool, need_bias: bool, transposed: bool, tf32: bool,
) -> list[Tensor]:  # fmt: skip
    made = x.new_empty(x.shape), _matrix_b(b, transposed), x.new_empty(b.shape[1])
    return [t for t, need in zip(made, (need_x, need_b, need_bias), strict=True) if need]


def _fake_loss(
    x: Tensor, b: Tensor, weight: Tensor | None, bias: Tensor | None, target: Tensor, upstream: Tensor | None,
    counter: Tensor, w1: float, w2: float, w3: float, ignore_index: int, reduction: int, need_x: bool, need_b: bool,
    need_weight: bool, need_bias: bool, transposed: bool, tf32: bool,
) -> list[Tensor]:  # fmt: skip
    value = x.new_empty(target.shape if _REDUCTIONS[reduction] == "none" else (), dtype=torch.float32)
    results = [value]
    results += [x.new_empty(x.shape)] if need_x else []
    results += [_matrix_b(b, transposed)] if need_b else []
    results += [x.new_empty(weight.shape)] if need_weight and weight is not None else []
    return results + ([x.new_empty(weight.shape[0])] if need_bias and weight is not None else [])


def _fake_scale(upstream: Tensor, gradients: list[Tensor]) -> None:
    return None


_forward = _define("cuda_forward(Tensor x, Tensor b, Tensor? bias, bool pair, bool tf32) -> Tensor[]", _fake_forward)
_backward = _define(
    "cuda_backward(Tensor? dp, Tensor? dy, Tensor x, Tensor b, Tensor? p, Tensor? g, Tensor counter, bool pair, "
    "bool need_x, bool need_b, bool need_bias, bool transposed, bool tf32) -> Tensor[]",
    _fake_backward,
)
_loss = _define(
    "cuda_loss(Tensor x, Tensor b, Tensor? weight, Tensor? bias, Tensor target, Tensor? upstream, Tensor counter, "
    "float w1, float w2, float w3, int ignore_index, int reduction, bool need_x, bool need_b, bool need_weight, "
    "bool need_bias, bool transposed, bool tf32) -> Tensor[]",
    _fake_loss,
)
_scale = _define("cuda_scale(Tensor upstream, Tensor(a!)[] gradients) -> ()", _fake_scale)


def launch(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Call an operator of the library, with PyTorch's own error where memory is short. Every launch passes here."""
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if "aoti_torch_empty_strided" not in str(error):
            raise
        # The stable ABI tells the library that an allocation failed, and neither why nor by which kind of error.
        raise torch.OutOfMemoryError(
            f"CUDA out of memory: no room for the results or workspaces of {operator}"
        ) from error


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def forward(
    x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan, pair: bool
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Compute `Engine.forward`."""
    if x.numel() * b.shape[1] == 0:
        return eager.forward(x, b, bias, plan, pair)
    y, g, *p = launch(_forward, x.contiguous(), b, _contiguous(bias), plan.saves, _tf32(x.dtype))
    return (p[0], y, [p[0], g]) if p else (None, y, [g])


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute `Engine.backward`."""
    if x.numel() * b.shape[1] == 0 or not (need_x or need_b):
        return eager.backward(dp, dy, x, b, saved, plan, need_x, need_b, need_bias)
    p, g = saved if plan.saves else (None, *saved)
    found = iter(
        launch(
            _backward, _contiguous(dp), _contiguous(dy), x.contiguous(), b, _contiguous(p), _contiguous(g),
            counter(x.device), plan.saves, need_x, need_b, need_bias, is_column_major(b), _tf32(x.dtype),
        )
    )  # fmt: skip
    dx, db, dbias = (next(found) if need else None for need in (need_x, need_b, need_bias))
    return dx, db, dbias


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
) -> tuple[Tensor, list[Tensor]]:
    """Compute `Engine.loss`. A target out of range stops the kernel, as it stops PyTorch's own losses."""
    if x.numel() * b.shape[1] == 0:
        return eager.loss(x, b, a, c, target, options, plan, upstream, needs)
    if upstream is not None:
        upstream = upstream.float().contiguous()
    value, *grads = launch(
        _loss, x.contiguous(), b, _contiguous(a), _contiguous(c), target.contiguous(), upstream, counter(x.device),
        *options.weights, options.ignore_index, _REDUCTIONS.index(options.reduction), *(needs or (False,) * 4),
        is_column_major(b), _tf32(x.dtype),
    )  # fmt: skip
    return value, grads


def scale(grads: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Compute `Engine.scale` in place.

    The kernel reads the upstream on the device, and returns early when it is 1: no host sync.
    """
    launch(_scale, upstream.float(), list(grads))
    return list(grads)
