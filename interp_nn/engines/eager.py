"""The reference engine: the operator and its losses in PyTorch's own matrix products, in every association.

x is (..., n, d), b (..., d, k); leading dimensions broadcast as in torch.matmul. Forms and what they keep are dispatch's.
Each product is rounded to the inputs' dtype and accumulated as torch.matmul does it (fp32 for 16-bit types); sums of
two products use addmm, so they round once. Softmax, losses and logit gradients are computed in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_nn.engines.orders import head_by_gram
from interp_nn.linalg import accumulation_dtype, gram

_FEW_COLUMNS = 16
_MANY_ELEMENTS = 2**15


def _add_product(base: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """base + left @ right, rounded once where PyTorch can; left @ right without a base."""
    if base is None:
        return left @ right
    if left.dim() == right.dim() == base.dim() == 2:
        return torch.addmm(base, left, right)
    return base + left @ right


def _columns(x: Tensor, b: Tensor) -> Tensor:
    """b, in column-major order where that pays: BLAS on a CPU is up to four times faster at X b and Xᵀ dY for few columns.

    PyTorch's autograd forms db in b's order too, so this also speeds up a backward that is left to it.
    """
    few = b.shape[-1] < _FEW_COLUMNS
    if few and x.shape[-2] * x.shape[-1] >= _MANY_ELEMENTS and b.is_cpu and b.is_contiguous():
        return b.mT.contiguous().mT
    return b


def _column_major(b: Tensor) -> bool:
    """Whether b's columns are contiguous, as those of a layer's transposed weight are: W = b G then follows it."""
    return min(b.shape[-2:]) > 1 and b.mT.is_contiguous()


def _correlate(x: Tensor, y: Tensor) -> Tensor:
    """xᵀ y, in column-major order for few columns (see `_columns`)."""
    return (y.mT @ x).mT if y.shape[-1] < _FEW_COLUMNS and y.is_cpu else x.mT @ y


def _affine(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left @ right if bias is None else torch.addmm(bias, left, right)


def _twice_symmetric(t: Tensor) -> Tensor:
    return t + t.mT


def forward(
    x: Tensor, b: Tensor, bias: Tensor | None, form: str, pair: bool
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """(P where the form needs it or `pair` asks for it, Y, what the form keeps). A bias needs 2-D inputs.

    Differentiable: the forms with a star are this under PyTorch's autograd, and keep nothing themselves.
    """
    association, b = form[0], _columns(x, b)
    if association == "A":
        p, g = x @ b, gram(b)
        return p, _affine(p, g, bias), [p, g] if form == "A+" else [g]
    if association == "C":
        p = x @ b
        q = p @ b.mT
        return p, _affine(q, b, bias), [p, q] if form == "C+" else []
    projection = x @ b if pair else None
    if association == "B":
        g = gram(b)
        w = (g @ b.mT).mT if _column_major(b) else b @ g
        return projection, _affine(x, w, bias), [g, w]
    outer = gram(b.mT)
    if association == "E":
        w = (b.mT @ outer).mT if _column_major(b) else outer @ b
        return projection, _affine(x, w, bias), [outer, w]
    r = x @ outer
    return projection, _affine(r, b, bias), [outer, r] if form == "D+" else [outer]


def backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    kept: Sequence[Tensor],
    form: str,
    need_x: bool,
    need_b: bool,
    need_bias: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, db, dbias) for upstream dP and dY, either of which may be None (zero); None where not needed."""
    if dy is None:
        assert dp is not None
        dbias = b.new_zeros(b.shape[-1]) if need_bias else None
        return dp @ b.mT if need_x else None, _correlate(x, dp) if need_b else None, dbias
    dx, db = _BACKWARD[form[0]](dp, dy, x, b, kept, need_x, need_b)
    return dx, db, dy.sum(0) if need_bias else None


_Gradients = tuple[Tensor | None, Tensor | None]


def _backward_a(
    dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, kept: Sequence[Tensor], need_x: bool, need_b: bool
) -> _Gradients:
    if len(kept) == 1:  # P was not kept: db through S = Xᵀ dY instead
        (g,) = kept
        dx = _add_product(dp, dy, g) @ b.mT if need_x else None
        return dx, _through_gram(dp, dy, x, b, g) if need_b else None
    p, g = kept
    dprojection = _add_product(dp, dy, g)
    db = None
    if need_b:
        db = _add_product(_correlate(x, dprojection), b, _twice_symmetric(p.mT @ dy))
    return dprojection @ b.mT if need_x else None, db


def _backward_b(
    dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, kept: Sequence[Tensor], need_x: bool, need_b: bool
) -> _Gradients:
    g, w = kept
    dx = _add_product(None if dp is None else dp @ b.mT, dy, w.mT) if need_x else None
    return dx, _through_gram(dp, dy, x, b, g) if need_b else None


def _through_gram(dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """db = Xᵀ dP + S G + b (T + Tᵀ), T = bᵀ S, S = Xᵀ dY."""
    s = _correlate(x, dy)
    db = _add_product(s @ g, b, _twice_symmetric(b.mT @ s))
    return db if dp is None else _add_product(db, x.mT, dp)


def _backward_c(
    dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, kept: Sequence[Tensor], need_x: bool, need_b: bool
) -> _Gradients:
    r = dy @ b.mT
    dprojection = _add_product(dp, r, b)
    db = None
    if need_b:
        p = kept[0] if kept else x @ b
        q = kept[1] if len(kept) > 1 else p @ b.mT
        db = _add_product(_add_product(_correlate(x, dprojection), q.mT, dy), r.mT, p)
    return dprojection @ b.mT if need_x else None, db


def _backward_d(
    dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, kept: Sequence[Tensor], need_x: bool, need_b: bool
) -> _Gradients:
    outer = kept[0]
    dr = dy @ b.mT
    dx = _add_product(None if dp is None else dp @ b.mT, dr, outer) if need_x else None
    db = None
    if need_b:
        r = kept[1] if len(kept) > 1 else x @ outer
        db = _add_product(_correlate(r, dy), _twice_symmetric(x.mT @ dr), b)
        db = db if dp is None else _add_product(db, x.mT, dp)
    return dx, db


def _backward_e(
    dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, kept: Sequence[Tensor], need_x: bool, need_b: bool
) -> _Gradients:
    outer, w = kept
    dx = _add_product(None if dp is None else dp @ b.mT, dy, w.mT) if need_x else None
    db = None
    if need_b:
        s = _correlate(x, dy)
        db = _add_product(outer @ s, _twice_symmetric(s @ b.mT), b)
        db = db if dp is None else _add_product(db, x.mT, dp)
    return dx, db


_BACKWARD = {"A": _backward_a, "B": _backward_b, "C": _backward_c, "D": _backward_d, "E": _backward_e}


class LossOptions(NamedTuple):
    """weights of CE(o1), CE(o2), MSE(o1, o2); ignore_index as in PyTorch; reduction "mean", "sum" or "none"."""

    weights: tuple[float, float, float]
    ignore_index: int
    reduction: str


class _Head(NamedTuple):
    """The output layer of a head on both logits at once: Z = [A; H] (2m x k) with H = A G, and its flat form W = b Zᵀ.

    H is formed from G or, where that takes less, from F = A bᵀ (m x d), without G.
    """

    a: Tensor
    g: Tensor | None
    f: Tensor | None
    z: Tensor
    w: Tensor | None


def _head(b: Tensor, a: Tensor, form: str) -> _Head:
    """Products with m rows, never with m columns: see `_columns`."""
    g = f = w = None
    d, k = b.shape
    if head_by_gram(d, k, a.shape[0]):
        g = gram(b)
        h = a @ g
    else:
        f = a @ b.mT
        h = f @ b
    z = torch.cat((a, h))
    if form == "flat":
        w = (z @ b.mT if f is None else torch.cat((f, h @ b.mT))).mT
    return _Head(a, g, f, z, w)


def logits(
    x: Tensor, b: Tensor, a: Tensor | None, c: Tensor | None, form: str
) -> tuple[Tensor, tuple[Tensor | None, list[Tensor], _Head | None]]:
    """Both logits (n, 2, m), and what their backward needs. Without an output layer `a` they are P and Y themselves."""
    if a is None:
        p, y, kept = forward(x, b, None, form, True)
        assert p is not None
        return torch.stack((p, y), 1), (p, kept, None)
    head = _head(b, a, form)
    both = None if c is None else torch.cat((c, c))
    p = None
    if head.w is None:
        p = x @ b
        o = _affine(p, head.z.mT, both)
    else:
        o = _affine(x, head.w, both)
    return o.view(x.shape[0], 2, a.shape[0]), (p, [], head)


def row_losses(o: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(w1 CE(o1) + w2 CE(o2) + w3 MSE(o1, o2) of each row, 0 where ignored; log-probabilities; kept rows) of o (n, 2, m)."""
    w1, w2, w3 = options.weights
    kept = target != options.ignore_index
    index = target.masked_fill(~kept, 0).view(-1, 1, 1).expand(-1, 2, 1)
    log_p = o.log_softmax(2)
    entropy = -log_p.gather(2, index).squeeze(2)
    difference = (o[:, 0] - o[:, 1]).square().mean(1)
    rows = w1 * entropy[:, 0] + w2 * entropy[:, 1] + w3 * difference
    return torch.where(kept, rows, 0.0), log_p, kept


def three_terms(
    o1: Tensor, o2: Tensor, target: Tensor, options: LossOptions, masked: bool, codes: Sequence[Tensor] = ()
) -> Tensor:
    """Compute the loss of logits (n, m) with PyTorch's own losses, under its autograd.

    Args:
        o1: Logits of the projection, (n, m).
        o2: Logits of the summary, (n, m).
        target: Classes, (n,) int64.
        options: Weights of the terms, ignored class and reduction.
        masked: Whether rows may be ignored.
        codes: Two tensors (n, k) to take the MSE between, in place of the logits.
    """
    w1, w2, w3 = options.weights
    p, y = codes or (o1, o2)
    first, second = (
        F.cross_entropy(o, target, ignore_index=options.ignore_index, reduction=options.reduction) for o in (o1, o2)
    )
    entropy = w1 * first + w2 * second
    if options.reduction == "mean" and not masked:
        return entropy + w3 * F.mse_loss(p, y)
    kept = target != options.ignore_index
    difference = torch.where(kept, (p - y).square().mean(1), 0.0)
    return entropy + w3 * reduce_rows(difference, kept, options.reduction)


def reduce_rows(rows: Tensor, kept: Tensor, reduction: str) -> Tensor:
    """Mean over kept rows (NaN without any, as in PyTorch), sum, or the rows themselves."""
    if reduction == "none":
        return rows
    return rows.sum() / kept.sum() if reduction == "mean" else rows.sum()


def loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    form: str,
    upstream: Tensor | None = None,
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The three-term loss of x (n, d) and, where `needs` names any of (x, b, a, c), its gradients in that order.

    Gradients are for `upstream` (a scalar, or (n,) for reduction "none"); None means 1. Raises ValueError for a target
    outside of [0, classes) that is not ignored (on a GPU: an assertion on the device).
    """
    o, (p, residuals, head) = logits(x, b, a, c, form)
    check_target(target, o.shape[2], options.ignore_index)
    o = o.to(accumulation_dtype(o.dtype))
    rows, log_p, kept = row_losses(o, target, options)
    value = reduce_rows(rows, kept, options.reduction)
    if needs is None or not any(needs):
        return value, []
    e = _logit_gradients(o, target, log_p, kept, options, upstream).to(x.dtype)
    if head is None:
        dx, db, _ = backward(e[:, 0], e[:, 1], x, b, residuals, form, needs[0], needs[1])
        return value, [g for g in (dx, db) if g is not None]
    return value, _head_gradients(e, x, b, p, head, needs)


def _logit_gradients(
    o: Tensor, target: Tensor, log_p: Tensor, kept: Tensor, options: LossOptions, upstream: Tensor | None
) -> Tensor:
    """d loss / d logits (n, 2, m): rows that are ignored are exactly zero."""
    w1, w2, w3 = options.weights
    scale = torch.ones(1, dtype=o.dtype, device=o.device) if upstream is None else upstream.to(o.dtype)
    if options.reduction == "mean":
        scale = scale / kept.sum()
    scale = scale.view(-1, 1)
    index = target.masked_fill(~kept, 0).view(-1, 1, 1).expand(-1, 2, 1)
    # p - 1 of the target's class as expm1, which does not cancel where that class is nearly certain.
    e = log_p.exp().scatter_(2, index, log_p.gather(2, index).expm1_())
    difference = (o[:, 0] - o[:, 1]).mul_(scale * (2 * w3 / o.shape[2]))
    e[:, 0].mul_(scale * w1).add_(difference)
    e[:, 1].mul_(scale * w2).sub_(difference)
    return e.masked_fill_(~kept.view(-1, 1, 1), 0.0)


def _head_gradients(
    e: Tensor, x: Tensor, b: Tensor, p: Tensor | None, head: _Head, needs: Sequence[bool]
) -> list[Tensor]:
    """The head is linear, so with E = [E1 E2] and U = [U1 U2] = Pᵀ E = bᵀ Xᵀ E: T = U2 A, dA = U1ᵀ + U2ᵀ G, Xᵀ D = Xᵀ E Z."""
    a, z, w = head.a, head.z, head.w
    need_x, need_b, need_a, need_c = needs
    m = a.shape[0]
    out: list[Tensor] = []
    bias_gradient = e.sum(0).sum(0) if need_c else None
    e = e.reshape(e.shape[0], 2 * m)
    dprojection = None
    if w is not None:
        if need_x:
            out.append(e @ w.mT)
    elif need_x or need_b:
        dprojection = e @ z
        if need_x:
            out.append(dprojection @ b.mT)
    if need_b or need_a:
        if w is not None:
            v = _correlate(x, e)
            u = b.mT @ v
        else:
            assert p is not None
            u = _correlate(p, e)
        u1, u2 = u[:, :m].mT, u[:, m:].mT
        through_x = None
        if need_b:
            through_x = v @ z if dprojection is None else x.mT @ dprojection
        out += _through_output(through_x, u1, u2, b, head, need_a)
    if bias_gradient is not None:
        out.append(bias_gradient)
    return out


def _through_output(db: Tensor | None, u1: Tensor, u2: Tensor, b: Tensor, head: _Head, need_a: bool) -> list[Tensor]:
    """db + b (T + Tᵀ) where db is given, and dA where needed, of U1ᵀ and U2ᵀ (m x k).

    Without G, by R = U2ᵀ bᵀ: b T = Rᵀ A, b Tᵀ = Fᵀ U2ᵀ, U2ᵀ G = R b.
    """
    out = []
    if head.f is None:
        assert head.g is not None
        if db is not None:
            out.append(_add_product(db, b, _twice_symmetric(u2.mT @ head.a)))
        return [*out, _add_product(u1, u2, head.g)] if need_a else out
    r = u2 @ b.mT
    if db is not None:
        out.append(_add_product(_add_product(db, r.mT, head.a), head.f.mT, u2))
    return [*out, _add_product(u1, r, b)] if need_a else out


def scale(grads: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """The gradients for an upstream of 1 times another one. An engine may overwrite them: they are asked for once."""
    if upstream.is_cpu and float(upstream) == 1.0:
        return list(grads)
    return list(torch._foreach_mul(list(grads), upstream))


def check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """ValueError naming the first bad class index; on a GPU an assertion on the device, without a synchronisation."""
    good = ((target >= 0) & (target < classes)) | (target == ignore_index)
    if target.device.type != "cpu":
        torch._assert_async(good.all(), f"target: class indices must be in [0, {classes}) or ignore_index")
    elif not bool(good.all()):
        bad = int(target[~good][0])
        raise ValueError(f"target: got class index {bad}, want 0 <= index < {classes} or ignore_index={ignore_index}")
