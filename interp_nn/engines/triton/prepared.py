"""Prepared calls: the engine's functions for tensors whose layouts are known, by kernels that are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from interp_nn.engines.barrier import allocator, counter
from interp_nn.engines.limits import MOST_COLUMNS
from interp_nn.engines.problem import (
    LossOptions,
    Plan,
    PreparedBackward,
    PreparedForward,
    PreparedLoss,
    PreparedScale,
)
from interp_nn.engines.triton import launches
from interp_nn.engines.triton.launcher import ready
from interp_nn.engines.triton.launches import (
    loss_launch,
    loss_spaces,
    pair_backward_launch,
    precision_of,
    row_length,
    scale_launch,
    stream_launch,
    summary_backward_launch,
)


def _in_place(x: Tensor, b: Tensor, *others: Tensor | None) -> bool:
    """Return True if kernels read the tensors where they are: none is empty, and none has to be copied first."""
    dense = b.is_contiguous() or b.mT.is_contiguous()
    return bool(dense and x.numel() and b.numel()) and all(t is None or t.is_contiguous() for t in (x, *others))


def _sizes(x: Tensor, b: Tensor) -> tuple[int, int, int, bool]:
    """Return n, d and k, and True if b is column-major."""
    d, k = b.shape
    return x.shape[0], d, k, not b.is_contiguous()


def _one_allocation(numbers: int, *sizes: int | None) -> tuple[tuple[int], list[int | None]]:
    """Return the shape of an allocation in fp32 numbers: so many, and then spaces of so many bytes; and their offsets.

    Offsets are multiples of 16 bytes. A space that is None has none.
    """
    end, offsets = 4 * numbers, list[int | None]()
    for size in sizes:
        if size is not None:
            end = -(-end // 16) * 16
        offsets.append(None if size is None else end)
        end += size or 0
    return (-(-end // 4),), offsets


def prepared_forward(x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan) -> PreparedForward | None:
    """Compute `Engine.prepared_forward`."""
    if b.shape[1] > MOST_COLUMNS or not _in_place(x, b, bias):
        return None
    n, d, k, transposed = _sizes(x, b)
    device, dtype, saves, empty = x.device, x.dtype, plan.saves, allocator(x.device)
    made = stream_launch(plan.tiles, launches.spec_on(device), dtype, n, d, k, transposed, precision_of(dtype), None)
    kinds = (dtype, dtype, None if bias is None else dtype, dtype if saves else None, dtype, dtype, None, None, None)
    launched = ready(made, device, kinds, n, d)
    if launched is None:
        return None
    rows, square, by_row = (n, k), (k, k), (k, 1)

    def call(x: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor, list[Tensor]] | None:
        y, g, p = empty(rows, by_row, dtype), empty(square, by_row, dtype), None
        at_x, at_b, at_bias, at_p = x.data_ptr(), b.data_ptr(), 0 if bias is None else bias.data_ptr(), 0
        if saves:
            p = empty(rows, by_row, dtype)
            at_p = p.data_ptr()
        at_y, at_g = y.data_ptr(), g.data_ptr()
        if launched(at_x | at_b | at_bias | at_p | at_y | at_g, at_x, at_b, at_bias, at_p, at_y, at_g, 0, 0, 0):
            return p, y, [g] if p is None else [p, g]
        return None

    return call


def prepared_backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    saved: Sequence[Tensor],
    plan: Plan,
    needs: tuple[bool, bool, bool],
) -> PreparedBackward | None:
    """Compute `Engine.prepared_backward`."""
    need_x, need_b, need_bias = needs
    if b.shape[1] > MOST_COLUMNS or dy is None or not (need_x or need_b) or not _in_place(x, b, dp, dy, *saved):
        return None
    n, d, k, transposed = _sizes(x, b)
    device, dtype, saves, empty = x.device, x.dtype, plan.saves, allocator(x.device)
    problem = plan.tiles, launches.spec_on(device), dtype, n, d, k, transposed, precision_of(dtype)
    of_x, of_b, of_bias = (dtype if need else None for need in needs)
    kinds: tuple[torch.dtype | None, ...]
    if saves:
        made, size = pair_backward_launch(*problem, 7 if need_b else 3, None)
        kinds = (*(dtype,) * 4, None if dp is None else dtype, dtype, of_x, of_b, *(None,) * 4, dtype)
        spaces = [n * row_length(k) * dtype.itemsize]
    else:
        made, size = summary_backward_launch(*problem, 7 if need_b else 3 if need_bias else 1, None)
        kinds, spaces = (*(dtype,) * 4, of_x, of_b, of_bias, *(None,) * 4), []
    launched = ready(made, device, (*kinds, torch.float32, torch.int32), n, d, made.splits)
    if launched is None:
        return None
    scratch, offsets = _one_allocation(size, *spaces)
    at_rows = offsets[0] or 0 if saves else 0
    by_row, stride = (d, 1), (1, d) if transposed else (k, 1)

    def call(
        dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...] | None:
        dx = db = dbias = None
        at_dx = at_db = at_dbias = 0
        if need_x:
            dx = empty((n, d), by_row, dtype)
            at_dx = dx.data_ptr()
        if need_b:
            db = empty((d, k), stride, dtype)
            at_db = db.data_ptr()
        if need_bias:
            dbias = empty((k,), (1,), dtype)
            at_dbias = dbias.data_ptr()
        work, given = empty(scratch, (1,), torch.float32), tuple[int, ...]()
        at_x, at_b, at_dy, at_work, at_counter = (
            x.data_ptr(), b.data_ptr(), dy.data_ptr(), work.data_ptr(), counter(device).data_ptr()
        )  # fmt: skip
        bits = at_x | at_b | at_dy | at_dx | at_db | at_dbias | at_work | at_counter
        if saves:
            at_p, at_g, at_dp = saved[0].data_ptr(), saved[1].data_ptr(), 0 if dp is None else dp.data_ptr()
            given = at_x, at_b, at_p, at_g, at_dp, at_dy, at_dx, at_db, 0, 0, 0, 0, at_work + at_rows
            bits |= at_p | at_g | at_dp
        else:
            at_g = saved[0].data_ptr()
            given = at_x, at_b, at_g, at_dy, at_dx, at_db, at_dbias, 0, 0, 0, 0
            bits |= at_g
        if launched(bits, *given, at_work, at_counter):
            return dx if dx is None or x.dim() == 2 else dx.view(x.shape), db, dbias
        return None

    return call


def prepared_loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    plan: Plan,
    needs: tuple[bool, bool, bool, bool],
) -> PreparedLoss | None:
    """Compute `Engine.prepared_loss`."""
    if options.reduction == "none" or not _in_place(x, b, a, c, target):
        return None
    n, d, k, transposed = _sizes(x, b)
    m = None if a is None else a.shape[0]
    need_x, need_b, need_a, need_c = needs
    device, dtype, empty, parameters = x.device, x.dtype, allocator(x.device), need_b or need_a
    made, size = loss_launch(
        plan.tiles, launches.spec_on(device), dtype, n, d, k, m, plan.order, transposed, precision_of(dtype), options.reduction,
        any(needs), parameters, None,
    )  # fmt: skip
    sizes = loss_spaces(made, plan.order, n, d, k, m, need_x or need_b, parameters)
    kinds = [dtype, dtype, torch.int64, None, torch.float32, *(dtype if need else None for need in needs[:2])]
    if a is not None:
        kinds[2:2] = a.dtype, None if c is None else c.dtype
        kinds += [a.dtype if need else None for need in needs[2:]]
    kinds += [None, None, None, *(None if size is None else dtype for size in sizes), torch.float32, torch.int32]
    last = n, d, made.splits, options.ignore_index, *options.weights
    launched = ready(made, device, kinds, *last)
    if launched is None:
        return None
    scratch, offsets = _one_allocation(size, *(None if s is None else s * dtype.itemsize for s in sizes))
    by_row, stride = (d, 1), (1, d) if transposed else (k, 1)
    of_a = torch.float32 if a is None else a.dtype
    head = a is not None

    def call(
        x: Tensor, b: Tensor, a: Tensor | None, c: Tensor | None, target: Tensor
    ) -> tuple[Tensor, list[Tensor]] | None:
        value, work = empty((), (), torch.float32), empty(scratch, (1,), torch.float32)
        at_x, at_b, at_target, at_value, at_work, at_counter = (
            x.data_ptr(), b.data_ptr(), target.data_ptr(), value.data_ptr(), work.data_ptr(), counter(device).data_ptr()
        )  # fmt: skip
        grads, given, at_dx, at_db = [], tuple[int, ...](), 0, 0
        if need_x:
            dx = empty((n, d), by_row, dtype)
            at_dx = dx.data_ptr()
            grads.append(dx if x.dim() == 2 else dx.view(x.shape))
        if need_b:
            db = empty((d, k), stride, dtype)
            at_db = db.data_ptr()
            grads.append(db)
        bits = at_x | at_b | at_target | at_value | at_work | at_counter | at_dx | at_db
        spaces = [0 if offset is None else at_work + offset for offset in offsets]
        if not head:
            given = at_x, at_b, at_target, 0, at_value, at_dx, at_db, 0, 0, 0
        else:
            assert a is not None and m is not None
            at_a, at_c, at_da, at_dc = a.data_ptr(), 0 if c is None else c.data_ptr(), 0, 0
            if need_a:
                da = empty((m, k), (k, 1), of_a)
                at_da = da.data_ptr()
                grads.append(da)
            if need_c:
                dc = empty((m,), (1,), of_a)
                at_dc = dc.data_ptr()
                grads.append(dc)
            bits |= at_a | at_c | at_da | at_dc
            given = at_x, at_b, at_a, at_c, at_target, 0, at_value, at_dx, at_db, at_da, at_dc, 0, 0, 0
        return (value, grads) if launched(bits, *given, *spaces, at_work, at_counter) else None

    return call


def prepared_scale(grads: Sequence[Tensor], upstream: Tensor) -> PreparedScale | None:
    """Compute `Engine.prepared_scale`."""
    sizes, device = [g.numel() for g in grads], upstream.device
    rest = 5 - len(sizes)
    kinds = (upstream.dtype, *(g.dtype for g in grads), *(None,) * rest)
    launched = ready(scale_launch(launches.spec_on(device), max(sizes)), device, kinds, *sizes, *(0,) * rest)
    if launched is None:
        return None
    none = (0,) * rest

    def call(grads: Sequence[Tensor], upstream: Tensor) -> Sequence[Tensor] | None:
        at = [g.data_ptr() for g in grads]
        bits = first = upstream.data_ptr()
        for one in at:
            bits |= one
        return grads if launched(bits, first, *at, *none) else None

    return call
