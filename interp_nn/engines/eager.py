"""The eager engine: the operator and its losses in PyTorch's own matrix products, in every order.

x is (..., n, d) and b (..., d, k); leading dimensions broadcast as in torch.matmul. Each product is rounded to the inputs' dtype
and accumulated as torch.matmul does it (fp32 for 16-bit types). Sums of two products use addmm, so they round once. Softmax,
losses and logit gradients are computed in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp_nn.engines.orders import head_by_gram
from interp_nn.engines.problem import LossOptions, Order, Plan
from interp_nn.linalg import accumulation_dtype, gram, is_column_major

_FEW_COLUMNS = 16
_MANY_ELEMENTS = 2**15

# The functions that those of torch.nn.functional call, after a broadcast and checks that take longer than these with few rows.
_LOSSES: Any = torch._C._nn
_CODES = {"none": 0, "mean": 1, "sum": 2}


def _add_product(base: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return base + left @ right, rounded once where PyTorch can; left @ right without a base."""
    if base is None:
        return left @ right
    if left.dim() == right.dim() == base.dim() == 2:
        return torch.addmm(base, left, right)
    return base + left @ right


def _accumulate(base: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """The same, in the memory of a row-major base, which nobody else holds."""
    if base is not None and base.dim() == 2 and base.stride() == (base.shape[1], 1):
        return torch.addmm(base, left, right, out=base)  # which counters of FLOPs know, and addmm_ they do not
    return _add_product(base, left, right)


def _columns(x: Tensor, b: Tensor) -> Tensor:
    """Return b, column-major for few columns on a CPU: BLAS is up to four times faster at X b and Xᵀ dY then.

    PyTorch's autograd forms db in b's order too, so this also speeds up a backward that is left to it.
    """
    few = b.shape[-1] < _FEW_COLUMNS
    if few and x.shape[-2] * x.shape[-1] >= _MANY_ELEMENTS and b.is_cpu and b.is_contiguous():
        return b.mT.contiguous().mT
    return b


def in_place(x: Tensor, b: Tensor) -> bool:
    """Return True if `summary` multiplies x and b in their own layouts: two matrices, b not of few columns (see `_columns`)."""
    return x.dim() == 2 and _columns(x, b) is b


def _correlate(x: Tensor, y: Tensor) -> Tensor:
    """Return xᵀ y, column-major for few columns (see `_columns`)."""
    return (y.mT @ x).mT if y.shape[-1] < _FEW_COLUMNS and y.is_cpu else x.mT @ y


def _affine(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left @ right if bias is None else torch.addmm(bias, left, right)


def _twice_symmetric(t: Tensor) -> Tensor:
    return t + t.mT


def forward(
    x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan, pair: bool
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Compute `Engine.forward`: (P or None, Y, saved tensors) of x (..., n, d) and b (..., d, k).

    With a bias, x and b must be matrices. For a plan with `autograd`, PyTorch's autograd differentiates this function.
    """
    order = plan.order
    p: Tensor | None
    b = _columns(x, b)
    first, left, right = FACTORS[order](x, b)
    if order == "(Xb)G":
        p, saved = left, [left, right] if plan.saves else [right]
    elif order == "((Xb)bᵀ)b":
        p, saved = first, [first, left]
    else:
        p, saved = x @ b if pair else None, [first, right if left is x else left]
    return p, _affine(left, right, bias), saved


def summary(x: Tensor, b: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
    """Return Y of `forward` by one of `FACTORS`, for PyTorch's autograd."""
    if b.shape[-1] < _FEW_COLUMNS:
        b = _columns(x, b)
    _, left, right = factors(x, b)
    return left @ right if bias is None else torch.addmm(bias, left, right)


# The two factors of Y by the order of the products, after the first product or Gram matrix on the way to them.
Factors = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _projected(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = x @ b
    return p, p, gram(b)


def _weight(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g = gram(b)
    return g, x, (g @ b.mT).mT if is_column_major(b) else b @ g


def _twice_projected(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = x @ b
    return p, p @ b.mT, b


def _outer(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    outer = gram(b.mT)
    return outer, x @ outer, b


def _outer_weight(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    outer = gram(b.mT)
    return outer, x, (b.mT @ outer).mT if is_column_major(b) else outer @ b


FACTORS: dict[Order, Factors] = {
    "(Xb)G": _projected,
    "X(bG)": _weight,
    "((Xb)bᵀ)b": _twice_projected,
    "(X(bbᵀ))b": _outer,
    "X((bbᵀ)b)": _outer_weight,
}


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
    if dy is None:
        assert dp is not None
        dbias = b.new_zeros(b.shape[-1]) if need_bias else None
        return dp @ b.mT if need_x else None, _correlate(x, dp) if need_b else None, dbias
    dx, db = _BACKWARD[plan.order](dp, dy, x, b, saved, need_x, need_b)
    return dx, db, dy.sum(0) if need_bias else None


_Gradients = tuple[Tensor | None, Tensor | None]


def _backward_projected(
    dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, saved: Sequence[Tensor], need_x: bool, need_b: bool
) -> _Gradients:
    if len(saved) == 1:  # P was not saved: db through S = Xᵀ dY instead
        (g,) = saved
        dx = _add_product(dp, dy, g) @ b.mT if need_x else None
        return dx, _through_gram(dp, dy, x, b, g) if need_b else None
    p, g = saved
    dprojection = _add_product(dp, dy, g)
    db = None
    if need_b:
        db = _accumulate(_correlate(x, dprojection), b, _twice_symmetric(p.mT @ dy))
    return dprojection @ b.mT if need_x else None, db


def _backward_weight(
    dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, saved: Sequence[Tensor], need_x: bool, need_b: bool
) -> _Gradients:
    g, w = saved
    dx = _accumulate(None if dp is None else dp @ b.mT, dy, w.mT) if need_x else None
    return dx, _through_gram(dp, dy, x, b, g) if need_b else None


def _through_gram(dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """Return db = Xᵀ dP + S G + b (T + Tᵀ), T = bᵀ S, S = Xᵀ dY."""
    s = _correlate(x, dy)
    db = _accumulate(s @ g, b, _twice_symmetric(b.mT @ s))
    return db if dp is None else _accumulate(db, x.mT, dp)


def _backward_twice_projected(
    dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, saved: Sequence[Tensor], need_x: bool, need_b: bool
) -> _Gradients:
    r = dy @ b.mT
    dprojection = _add_product(dp, r, b)
    db = None
    if need_b:
        p, q = saved
        db = _accumulate(_accumulate(_correlate(x, dprojection), q.mT, dy), r.mT, p)
    return dprojection @ b.mT if need_x else None, db


def _backward_outer(
    dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, saved: Sequence[Tensor], need_x: bool, need_b: bool
) -> _Gradients:
    outer, r = saved
    dr = dy @ b.mT
    dx = _accumulate(None if dp is None else dp @ b.mT, dr, outer) if need_x else None
    db = None
    if need_b:
        db = _accumulate(_correlate(r, dy), _twice_symmetric(x.mT @ dr), b)
        db = db if dp is None else _accumulate(db, x.mT, dp)
    return dx, db


def _backward_outer_weight(
    dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, saved: Sequence[Tensor], need_x: bool, need_b: bool
) -> _Gradients:
    outer, w = saved
    dx = _accumulate(None if dp is None else dp @ b.mT, dy, w.mT) if need_x else None
    db = None
    if need_b:
        s = _correlate(x, dy)
        db = _accumulate(outer @ s, _twice_symmetric(s @ b.mT), b)
        db = db if dp is None else _accumulate(db, x.mT, dp)
    return dx, db


_BACKWARD: dict[Order, Callable[..., _Gradients]] = {
    "(Xb)G": _backward_projected,
    "X(bG)": _backward_weight,
    "((Xb)bᵀ)b": _backward_twice_projected,
    "(X(bbᵀ))b": _backward_outer,
    "X((bbᵀ)b)": _backward_outer_weight,
}


class _Head(NamedTuple):
    """The output layer of a head on both logits at once: Z = [A; H] (2m x k) with H = A G.

    Logits from X have the weight W = b Zᵀ (d x 2m). H is formed from G or, where that takes less, from F = A bᵀ (m x d),
    without G.
    """

    a: Tensor
    g: Tensor | None
    f: Tensor | None
    z: Tensor
    w: Tensor | None


def _head(b: Tensor, a: Tensor, plan: Plan) -> _Head:
    """Form a head's matrices by products with m rows, never with m columns (see `_columns`)."""
    g = f = None
    w: Tensor | None
    d, k = b.shape
    if head_by_gram(d, k, a.shape[0]):
        g = gram(b)
        h = a @ g
    else:
        f = a @ b.mT
        h = f @ b
    z = torch.cat((a, h))
    if plan.order == "logits_from_x" and f is not None:
        w = torch.cat((f, h @ b.mT)).mT
    else:
        w = (z @ b.mT).mT if plan.order == "logits_from_x" else None
    return _Head(a, g, f, z, w)


def from_x(b: Tensor, a: Tensor, plan: Plan) -> bool:
    """Return True if `logits_from_x` computes a head under PyTorch's autograd."""
    return plan.autograd and plan.order == "logits_from_x" and not head_by_gram(b.shape[0], b.shape[1], a.shape[0])


def logits_from_x(x: Tensor, b: Tensor, a: Tensor, c: Tensor | None) -> Tensor:
    """Return both logits (n, 2, m) by one product with X: its weight is that of F = A bᵀ and F b bᵀ."""
    f = a @ b.mT
    w = torch.cat((f, f @ b @ b.mT)).mT
    o = x @ w if c is None else torch.addmm(torch.cat((c, c)), x, w)
    return o.view(x.shape[0], 2, a.shape[0])


def loss_in_place(x: Tensor, b: Tensor, a: Tensor | None, plan: Plan) -> bool:
    """Return True if `logits_from_x`, or for a pair the products of `FACTORS`, take x and b as they are and their P with them."""
    if x.dim() != 2 or accumulation_dtype(x.dtype) != x.dtype:
        return False
    if a is not None:
        return from_x(b, a, plan)
    return plan.autograd and plan.order in ("(Xb)G", "((Xb)bᵀ)b") and in_place(x, b)


def logits(
    x: Tensor, b: Tensor, a: Tensor | None, c: Tensor | None, plan: Plan
) -> tuple[Tensor, tuple[Tensor | None, list[Tensor], _Head | None]]:
    """Return both logits (n, 2, m), and the tensors that their backward needs. Without an output layer `a` they are P and Y."""
    if a is None:
        p, y, saved = forward(x, b, None, plan, True)
        assert p is not None
        return torch.stack((p, y), 1), (p, saved, None)
    if from_x(b, a, plan):
        return logits_from_x(x, b, a, c), (None, [], None)
    head = _head(b, a, plan)
    p = None
    if head.w is not None:
        left, right = x, head.w
    else:
        p = left = x @ b
        right = head.z.mT
    o = left @ right if c is None else torch.addmm(torch.cat((c, c)), left, right)
    return o.view(x.shape[0], 2, a.shape[0]), (p, [], head)


def row_losses(o: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss of each row, 0 where ignored; log-probabilities; mask of the kept rows) of logits o (n, 2, m)."""
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
        masked: Rows may be ignored.
        codes: Two tensors (n, k) to take the MSE between, in place of the logits.
    """
    (w1, w2, w3), ignore_index, reduction = options
    p, y = codes or (o1, o2)
    code = _CODES[reduction]
    first = _LOSSES.cross_entropy_loss(o1, target, None, code, ignore_index, 0.0)
    second = _LOSSES.cross_entropy_loss(o2, target, None, code, ignore_index, 0.0)
    if reduction == "mean" and not masked:
        third = _LOSSES.mse_loss(p, y, code)
    else:
        kept = target != ignore_index
        third = reduce_rows(torch.where(kept, (p - y).square().mean(1), 0.0), kept, reduction)
    # A factor of 1 is left out: with its backward it takes as long as a cross entropy of few rows.
    first = first if w1 == 1 else w1 * first
    return first + (second if w2 == 1 else w2 * second) + (third if w3 == 1 else w3 * third)


def reduce_rows(rows: Tensor, kept: Tensor, reduction: str) -> Tensor:
    """Return the mean over kept rows (NaN without any, as in PyTorch), the sum, or the rows themselves."""
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
    plan: Plan,
    upstream: Tensor | None = None,
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Compute `Engine.loss`."""
    o, (p, residuals, head) = logits(x, b, a, c, plan)
    check_target(target, o.shape[2], options.ignore_index)
    o = o.to(accumulation_dtype(o.dtype))
    rows, log_p, kept = row_losses(o, target, options)
    value = reduce_rows(rows, kept, options.reduction)
    if needs is None or not any(needs):
        return value, []
    e = _logit_gradients(o, target, log_p, kept, options, upstream).to(x.dtype)
    if head is None:
        dx, db, _ = backward(e[:, 0], e[:, 1], x, b, residuals, plan, needs[0], needs[1])
        return value, [g for g in (dx, db) if g is not None]
    return value, _head_gradients(e, x, b, p, head, needs)


def _logit_gradients(
    o: Tensor, target: Tensor, log_p: Tensor, kept: Tensor, options: LossOptions, upstream: Tensor | None
) -> Tensor:
    """Return d loss / d logits (n, 2, m). Rows that are ignored are exactly zero."""
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
    """Return the needed gradients. With E = [E1 E2], U = [U1 U2] = Pᵀ E: T = U2 A, dA = U1ᵀ + U2ᵀ G, Xᵀ D = Xᵀ E Z."""
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
    """Return db + b (T + Tᵀ) if db is given, and dA if needed, from U1ᵀ and U2ᵀ (m x k).

    Without G, by R = U2ᵀ bᵀ: b T = Rᵀ A, b Tᵀ = Fᵀ U2ᵀ, U2ᵀ G = R b.
    """
    out = []
    if head.f is None:
        assert head.g is not None
        if db is not None:
            out.append(_accumulate(db, b, _twice_symmetric(u2.mT @ head.a)))
        return [*out, _add_product(u1, u2, head.g)] if need_a else out
    r = u2 @ b.mT
    if db is not None:
        out.append(_accumulate(_accumulate(db, r.mT, head.a), head.f.mT, u2))
    return [*out, _add_product(u1, r, b)] if need_a else out


def scale(grads: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Compute `Engine.scale`."""
    if upstream.is_cpu and float(upstream) == 1.0:
        return list(grads)
    return list(torch._foreach_mul(list(grads), upstream))


def check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for the first bad class index. On a GPU assert on the device, without a synchronisation."""
    good = ((target >= 0) & (target < classes)) | (target == ignore_index)
    if target.device.type != "cpu":
        torch._assert_async(good.all(), f"target: class indices must be in [0, {classes}) or ignore_index")
    elif not bool(good.all()):
        bad = int(target[~good][0])
        raise ValueError(f"target: got class index {bad}, want 0 <= index < {classes} or ignore_index={ignore_index}")
