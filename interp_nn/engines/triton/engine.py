"""The Triton engine: `forward`, `backward` and `loss` in one launch each, by the kernels beside this file.

Plans: up to 128 columns a summary is "(Xb)G" (saves G) and a pair also saves P. Beyond, a pair is "(Xb)G" with P, and a
summary the same for n <= d, else "X(bG)" (saves G and W). A polynomial is "(Xb)q" (saves G and q(G), and P for a pair), up to
128 columns. Losses need at most 128 columns and classes. Products take operands in the inputs' dtype and accumulate in fp32; the
products of a polynomial's derivative take them in fp32. fp32 operands are rounded to tf32 where PyTorch's own switch for matrix
products allows it. Otherwise, and in the widest heads, they are split in two such parts ("tf32x3"). Rounded are: P, G and W as
operands and as results, D = dP + dY G and the logits' gradients as operands, results.

Workspaces come from PyTorch's allocator. Kernels with phases wait at a barrier counter of their own (see `barrier.counter`). They
are launched cooperatively: a grid that does not fit fails instead of waiting for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from interp_nn.engines import eager
from interp_nn.engines.barrier import counter, workspace
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.limits import MOST_COLUMNS
from interp_nn.engines.problem import LossOptions, Plan
from interp_nn.engines.triton import launches
from interp_nn.engines.triton.launcher import launch
from interp_nn.engines.triton.launches import (
    Tuned,
    loss_launch,
    loss_spaces,
    pair_backward_launch,
    phased_launch,
    precision_of,
    row_length,
    scale_launch,
    stream_launch,
    summary_backward_launch,
)
from interp_nn.engines.triton.prepared import prepared_backward as prepared_backward
from interp_nn.engines.triton.prepared import prepared_forward as prepared_forward
from interp_nn.engines.triton.prepared import prepared_loss as prepared_loss
from interp_nn.engines.triton.prepared import prepared_scale as prepared_scale


def _matrix(b: Tensor) -> tuple[Tensor, bool]:
    """Return (b, True if it is column-major), copied if it is neither that nor contiguous."""
    if b.is_contiguous():
        return b, False
    return (b, True) if b.mT.is_contiguous() else (b.contiguous(), False)


def _like(b: Tensor, transposed: bool) -> Tensor:
    """Return an empty matrix with b's shape and memory order."""
    d, k = b.shape
    return workspace((d, k), b.dtype, b.device, (1, d) if transposed else None)


def _numbers(q: Polynomial | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the coefficients and the scale as kernels read them, on the device."""
    if q is None:
        return None, None
    assert not q.shift, "the kernels take powers of G itself"
    return q.coefficients.float().contiguous(), None if q.scale is None else q.scale.float()


def _of_zeros(plan: Plan, q: Polynomial | None) -> Plan:
    """Return the plan of the summary, which computes a polynomial of empty tensors too: P is zero, whatever q is."""
    return plan if q is None or plan.order != "(Xb)q" else plan._replace(order="(Xb)G")


def _zeros(q: Polynomial) -> Tensor:
    return torch.zeros(q.degree + 1, dtype=torch.float32, device=q.coefficients.device)


def forward(
    x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan, pair: bool, q: Polynomial | None = None
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Compute `Engine.forward`."""
    (n, d), k = x.shape, b.shape[1]
    if n * d * k == 0:
        p, y, saved = eager.forward(x, b, bias, _of_zeros(plan, q), pair)
        return p, y, saved if q is None else [*saved, saved[-1]]
    device, spec, precision = x.device, launches.spec_on(x.device), precision_of(x.dtype)
    x, (b, transposed) = x.contiguous(), _matrix(b)
    bias = None if bias is None else bias.contiguous()
    y, g = workspace((n, k), x.dtype, device), workspace((k, k), x.dtype, device)
    if k <= MOST_COLUMNS:
        p = workspace((n, k), x.dtype, device) if plan.saves else None
        made = stream_launch(
            plan.tiles, spec, x.dtype, n, d, k, transposed, precision, None if q is None else q.degree
        )  # fmt: skip
        if q is None:
            launch(made, device, x, b, bias, p, y, g, None, None, None, n, d)
            return p, y, [g] if p is None else [p, g]
        qg = workspace((k, k), x.dtype, device)
        launch(made, device, x, b, bias, p, y, g, qg, *_numbers(q), n, d)
        return p, y, [g, qg] if p is None else [p, g, qg]
    p = workspace((n, k), x.dtype, x.device) if plan.saves or pair else None
    w = workspace((d, k), x.dtype, x.device) if plan.order == "X(bG)" else None
    phases = 7 if plan.order == "X(bG)" else 3
    made = phased_launch(plan.tiles, spec, x.dtype, n, d, k, plan.order, precision, phases, False)
    launch(made, device, x, b, bias, p, y, g, w, counter(device), n, d, k, *b.stride())
    if w is not None:
        return p, y, [g, w]
    assert p is not None
    return p, y, [p, g]


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
    (n, d), k = x.shape, b.shape[1]
    if n * d * k == 0 or not (need_x or need_b or need_c):
        grads = eager.backward(
            dp, dy, x, b, saved if q is None else saved[:-1], _of_zeros(plan, q), need_x, need_b, need_bias
        )
        return grads if q is None else (*grads, _zeros(q) if need_c else None)
    x, (b, transposed) = x.contiguous(), _matrix(b)
    dp, dy = (None if g is None else g.contiguous() for g in (dp, dy))
    dx = workspace((n, d), x.dtype, x.device) if need_x else None
    db = _like(b, transposed) if need_b or need_c else None  # the phase of db forms dc too
    dbias = workspace((k,), b.dtype, b.device) if need_bias else None
    dc = workspace((q.degree + 1,), torch.float32, x.device) if q is not None and need_c else None
    if k > MOST_COLUMNS:
        _phased_backward(dp, dy, x, b, saved, plan, dx, db, dbias)
    elif not plan.saves:
        assert dy is not None
        _summary_backward(dy, x, b, saved, plan.tiles, transposed, dx, db, dbias, q, dc)
    else:
        assert dbias is None
        _pair_backward(dp, dy, x, b, saved, plan.tiles, transposed, dx, db, q, dc)
    if q is None:
        return dx, db, dbias
    return dx, db if need_b else None, dbias, dc


def _squares(saved: Sequence[Tensor], q: Polynomial | None) -> tuple[Tensor | None, Tensor]:
    """Return (G or None, q(G)) of the saved tensors, contiguous; (None, G) of the summary."""
    *_, gram, last = (None, *(t.contiguous() for t in saved))
    assert last is not None
    return None if q is None else gram, last


def _summary_backward(
    dy: Tensor, x: Tensor, b: Tensor, saved: Sequence[Tensor], tuned: Tuned, transposed: bool,
    dx: Tensor | None, db: Tensor | None, dbias: Tensor | None, q: Polynomial | None, dc: Tensor | None,
) -> None:  # fmt: skip
    (n, d), k, device = x.shape, b.shape[1], x.device
    phases = 7 if db is not None else 3 if dbias is not None else 1
    made, size = summary_backward_launch(
        tuned, launches.spec_on(device), x.dtype, n, d, k, transposed, precision_of(x.dtype), phases,
        None if q is None else q.degree,
    )  # fmt: skip
    g, qg = _squares(saved, q)
    work = workspace((size,), torch.float32, device)
    given = x, b, qg, dy, dx, db, dbias, g, *_numbers(q), dc
    launch(made, device, *given, work, counter(device), n, d, made.splits)


def _pair_backward(
    dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor, saved: Sequence[Tensor], tuned: Tuned,
    transposed: bool,
    dx: Tensor | None, db: Tensor | None, q: Polynomial | None, dc: Tensor | None,
) -> None:  # fmt: skip
    (n, d), k, device = x.shape, b.shape[1], x.device
    p, (g, qg) = saved[0].contiguous(), _squares(saved, q)
    phases = (2 if dy is None else 3) | (0 if db is None else 4)
    degree = None if q is None else q.degree
    made, size = pair_backward_launch(
        tuned, launches.spec_on(device), x.dtype, n, d, k, transposed, precision_of(x.dtype), phases, degree
    )
    rows = dp if dy is None else workspace((n, row_length(k)), x.dtype, device)
    work = workspace((size,), torch.float32, device)
    if dy is None and dc is not None:
        dc.zero_()
    given = x, b, p, qg, dp, dy, dx, db, g, *_numbers(q), None if dy is None else dc
    launch(made, device, *given, rows, work, counter(device), n, d, made.splits)


def _phased_backward(
    dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor, saved: Sequence[Tensor], plan: Plan,
    dx: Tensor | None, db: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    (n, d), k, device = x.shape, b.shape[1], x.device
    p, g, w, rows, s, t = None, None, None, dp, None, None
    need_t = dy is not None and (db is not None or dbias is not None)
    if plan.order == "X(bG)":
        g, w = saved
        phases = 7 if db is not None else 1
        s = workspace((d, k), torch.float32, device) if need_t else None
    else:
        p, g = (m.contiguous() for m in saved)
        phases = 2 if dy is None else 3
        rows = dp if dy is None else workspace((n, k), x.dtype, device)
    if need_t:
        t = workspace((k, k), torch.float32, device)
    made = phased_launch(
        plan.tiles, launches.spec_on(device), x.dtype, n, d, k, plan.order, precision_of(x.dtype), phases, True
    )  # fmt: skip
    launch(made, device, x, b, p, g, w, dp, dy, dx, db, dbias, rows, s, t, counter(device), n, d, k, *b.stride())


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
    """Compute `Engine.loss`. On a GPU a target out of range stops the kernel, as it stops PyTorch's own losses."""
    (n, d), k = x.shape, b.shape[1]
    if n * d * k == 0:
        wanted = None if needs is None else needs[:4]
        value, grads = eager.loss(x, b, a, c, target, options, _of_zeros(plan, q), upstream, wanted)
        return value, grads if q is None or needs is None or not needs[4] else [*grads, _zeros(q)]
    device, spec = x.device, launches.spec_on(x.device)
    m = None if a is None else a.shape[0]
    if device.type == "cpu":
        eager.check_target(target, m or k, options.ignore_index)
    need_x, need_b, need_a, need_c, need_q = (*(needs or ()), *(False,) * 5)[:5]
    x, (b, transposed), target = x.contiguous(), _matrix(b), target.contiguous()
    if upstream is not None:
        upstream = upstream.contiguous()
    parameters = need_b or need_a or need_q
    made, size = loss_launch(
        plan.tiles, spec, x.dtype, n, d, k, m, plan.order, transposed, precision_of(x.dtype), options.reduction,
        need_x or parameters or need_c, parameters, None if q is None else q.degree,
    )  # fmt: skip
    value = workspace((n,) if options.reduction == "none" else (), torch.float32, device)
    dx = workspace((n, d), x.dtype, x.device) if need_x else None
    db = _like(b, transposed) if need_b or need_q else None  # the phase of db forms dq too
    dq = workspace((q.degree + 1,), torch.float32, device) if q is not None and need_q else None
    numbers = (*_numbers(q), dq)
    work = workspace((size,), torch.float32, device)
    tail = (work, counter(device), n, d, made.splits, options.ignore_index, *options.weights)
    sizes = loss_spaces(made, plan.order, n, d, k, m, need_x or need_b or need_q, parameters)
    spaces = [None if size is None else workspace((size,), x.dtype, device) for size in sizes]
    if a is None or m is None:
        launch(made, device, x, b, target, upstream, value, dx, db, *numbers, *spaces, *tail)
        return value, [g for g in (dx, db if need_b else None, dq) if g is not None]
    a, c = a.contiguous(), None if c is None else c.contiguous()
    da = workspace((m, k), a.dtype, device) if need_a else None
    dc = workspace((m,), a.dtype, device) if need_c else None
    launch(made, device, x, b, a, c, target, upstream, value, dx, db, da, dc, *numbers, *spaces, *tail)
    return value, [g for g in (dx, db if need_b else None, da, dc, dq) if g is not None]


def scale(grads: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Compute `Engine.scale` in place.

    The kernel reads the upstream on the device, and returns early when it is 1: no host sync.
    """
    sizes = [g.numel() for g in grads]
    device = upstream.device
    rest = 5 - len(sizes)
    launch(
        scale_launch(launches.spec_on(device), max(sizes)), device, upstream, *grads, *(None,) * rest, *sizes, *(0,) * rest
    )  # fmt: skip
    return list(grads)
