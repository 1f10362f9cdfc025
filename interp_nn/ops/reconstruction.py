"""The tied reconstruction X b bᵀ: the share of X that it misses, without a matrix of X's size."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from interp_nn.linalg import accumulation_dtype, autocast_off
from interp_nn.ops.library import any_autocast_enabled, transforming
from interp_nn.ops.summary import as_rows

_ROWS = 4096  # of a 16-bit X, cast to float32 at a time
_FEW = 2**16  # elements of X up to which the number of operations decides


class _WideProduct(Function):
    """X b in float32 for a 16-bit X (n, d) and a float32 b (d, k), with no float32 copy of X."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, b)
        return torch.cat([part.to(b.dtype) @ b for part in x.split(_ROWS)])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, b = ctx.saved_tensors
        dx = (upstream @ b.t()).to(x.dtype) if ctx.needs_input_grad[0] else None
        db = None
        if ctx.needs_input_grad[1]:
            parts = zip(x.split(_ROWS), upstream.split(_ROWS), strict=True)
            db = torch.stack([part.to(b.dtype).t() @ g for part, g in parts]).sum(0)
        return dx, db


def missed_share(x: Tensor, b: Tensor, kept: Tensor | None, reduction: str) -> Tensor:
    """Return ‖X - X b bᵀ‖² / ‖X‖² over the kept rows of x (..., d); times their number for "sum", and by row for "none".

    kept: Rows that count, bool of x's shape without its last dimension; None is all of them.
    """
    wide, rows, compiling = accumulation_dtype(x.dtype), as_rows(x), is_compiling()
    with autocast_off(x.device) if compiling or any_autocast_enabled() else nullcontext():
        b = b.to(wide)
        if x.dtype == wide or not len(rows) or compiling or transforming(x, b):
            p = rows.to(wide) @ b
        else:
            p = _WideProduct.apply(rows, b)
        sizes = torch.linalg.vector_norm(rows, dim=1, dtype=wide).square()
        if kept is not None:
            kept = kept.reshape(-1)
            p, sizes = torch.where(kept.unsqueeze(1), p, 0.0), torch.where(kept, sizes, 0.0)
        whole = sizes.sum()
        total, count = whole.clamp_min(torch.finfo(wide).tiny), len(rows) if kept is None else kept.sum()
        g = b.t() @ b
        # ‖X - P bᵀ‖² = ‖X‖² - 2 ‖P‖² + <PᵀP, G>, which cancels to rounding of ‖X‖² where b reconstructs X.
        if reduction == "none" or (rows.numel() <= _FEW and not compiling):
            terms = torch.addmm(p, p, g, beta=-2) * p
            if reduction == "none":
                return ((sizes + terms.sum(1)).clamp_min(0) * (count / total)).view(x.shape[:-1])
            missed = whole + terms.sum()
        else:  # without further matrices of n rows
            missed = whole - 2 * p.square().sum() + ((p.t() @ p) * g).sum()
        share = missed.clamp_min(0) / total
        return share * count if reduction == "sum" else share
