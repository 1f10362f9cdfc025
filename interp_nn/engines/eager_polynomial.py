"""The eager engine's polynomials: Y = P q(G) with P = a X b, G = a² bᵀb and q(G) = c0 I + c1 G + ... + c4 G⁴.

With b̂ = a b, which is formed first so that no power overflows where a is one over b's norm, and q' = q without its constant term:

    D = dP + dY q(G), T = Pᵀ dY, dX = D b̂ᵀ, db̂ = Xᵀ D + b̂ (M + Mᵀ), dc_i = <T, Gⁱ>, db = a db̂, da = <db̂, b>

M + Mᵀ is the derivative of q at G along T + Tᵀ, and for k > d, with S = Xᵀ dY, that at K = b̂ b̂ᵀ along N + Nᵀ, N = S b̂ᵀ:

    db̂ = q(K) S + (M + Mᵀ) b̂ + Xᵀ dP, dc_i = <N, Kⁱ>

The coefficients and the scale are tensors with a dtype of their own, and are read as scalars, which round no operand to it.

Where the terms of q would cancel, its coefficients are those of powers of G - s I (see `linalg.centred`). All of the above then
holds with G - s I and K - s I in the place of G and K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from interp_nn.engines.eager import _add_product, _affine, _columns, _correlate, _twice_symmetric
from interp_nn.engines.orders import head_by_gram
from interp_nn.engines.problem import Plan
from interp_nn.linalg import (
    accumulation_dtype,
    add_multiple,
    centred_weight,
    gram,
    is_column_major,
    minus_identity,
    polynomial_terms,
)

MOST_COEFFICIENTS = 5
_EXACT = (torch.float32, torch.float64)
SAVING = Plan("eager", "(Xb)q", saves=True)


class Polynomial(NamedTuple):
    """The coefficients of q, (degree + 1,), in powers of G - shift I; and the scale of b, a 0-dim tensor, or None for 1."""

    coefficients: Tensor
    scale: Tensor | None
    shift: float = 0.0

    @property
    def degree(self) -> int:
        """The degree of q."""
        return self.coefficients.shape[0] - 1


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def forward(
    x: Tensor,
    b: Tensor,
    bias: Tensor | None,
    q: Polynomial,
    plan: Plan,
    pair: bool,
    gain: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Compute (P or None, Y, saved tensors) of x (n, d) and b (d, k), as `eager.forward` does for the summary.

    A gain, a number that multiplies Y without its bias, is for an order with P under PyTorch's autograd, and for degree 1 or
    more.
    """
    b = _columns(x, _scaled(b, q))
    c = q.coefficients.unbind()
    if plan.order == "(Xb)q":
        p = x @ b
        if gain is not None:  # times q(G) and not P: the inner product of k x k matrices rounds less
            eye = torch.eye(b.shape[1], dtype=b.dtype, device=b.device)
            g = gram(b) - q.shift * eye if q.shift else gram(b)
            matrix = polynomial_terms(g, c) + c[0] * eye
            return p, _affine(p, gain * matrix, bias), []
        base = c[0] * p if bias is None else c[0] * p + bias
        if len(c) == 1:
            return p, base, []
        g = minus_identity(gram(b), q.shift)
        terms = polynomial_terms(g, c)
        return p, _add_product(base, p, terms), [p, g, terms]
    if plan.order == "((Xb)bᵀ)b...":
        p = x @ b if gain is None else gain * (x @ b)
        y = c[-1] * p
        for term in c[-2::-1]:
            first = term * p - q.shift * y if q.shift else term * p
            y = _add_product(first, y @ b.mT, b)
        return p, y if bias is None else y + bias, []
    projection = x @ b if pair else None
    if len(c) == 1:
        return projection, _affine(x, c[0] * b, bias), []
    g = minus_identity(gram(b) if plan.order == "X(bq)" else gram(b.mT), q.shift)
    terms = polynomial_terms(g, c)
    w = _weight(b, terms, c[0], plan.order != "X(bq)")
    return projection, _affine(x, w, bias), [g, terms, w]


def backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    q: Polynomial,
    saved: Sequence[Tensor],
    plan: Plan,
    needs: Sequence[bool],
) -> Gradients:
    """Compute the needed ones of (dX, db, dbias, dc, da), for a plan of `orders.POLYNOMIAL_PLANS` and degree 1 or more."""
    need_x, need_b, need_bias, need_c, need_a = needs
    given, b = b, _scaled(b, q)
    need_scaled = need_b or need_a
    dx = db = dc = None
    if dy is None:
        assert dp is not None
        dx = dp @ b.mT if need_x else None
        db = _correlate(x, dp) if need_scaled else None
        dc = torch.zeros_like(q.coefficients) if need_c else None
    else:
        c = q.coefficients.unbind()
        by_projection = plan.order == "(Xb)q"
        if by_projection:
            p, g, terms = saved
            d = _add_product(c[0] * dy if dp is None else c[0] * dy + dp, dy, terms)
            dx = d @ b.mT if need_x else None
        else:
            g, terms, w = saved
            if need_x:
                dx = _add_product(None if dp is None else dp @ b.mT, dy, w.mT)
        if need_scaled or need_c:
            if by_projection:
                m, dc = _derivative(g, _twice_symmetric(p.mT @ dy), c, need_c)
                db = _add_product(_correlate(x, d), b, m) if need_scaled else None
            else:
                left = plan.order != "X(bq)"
                db, dc = _through_weight(_correlate(x, dy), b, (g, terms), c, left, need_scaled, need_c)
                db = db if db is None or dp is None else _add_product(db, x.mT, dp)
            dc = None if dc is None else dc.to(q.coefficients.dtype)
    dbias = None
    if need_bias:
        dbias = b.new_zeros(b.shape[-1]) if dy is None else dy.sum(0)
    da = None
    if db is not None:
        db, da = _through_scale(db, given, q, need_a)
    return dx, db if need_b else None, dbias, dc, da


def gradient(
    dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor, q: Polynomial, needs: Sequence[bool]
) -> Gradients:
    """Compute the needed ones of (dX, db, dbias, dc, da) in plain differentiable products, of x (..., d)."""
    n = math.prod(x.shape[:-1])  # -1 is ambiguous for no columns
    rows = x.reshape(n, x.shape[-1])
    dp, dy = (None if g is None else g.reshape(n, b.shape[1]) for g in (dp, dy))
    saved = forward(rows, b, None, q, SAVING, True)[2]
    dx, db, dbias, dc, da = backward(dp, dy, rows, b, q, saved, SAVING, needs)
    return None if dx is None else dx.view(x.shape), db, dbias, dc, da


def weight(b: Tensor, q: Polynomial) -> Tensor:
    """Return the effective weight a b q(a² bᵀb) through the smaller of the two Gram matrices, in b's order of memory."""
    return centred_weight(_scaled(b, q), q.coefficients.unbind(), q.shift)


def weight_forward(
    b: Tensor, c: Sequence[Tensor | float], scale: Tensor | None = None, shift: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """Compute (W, saved tensors) of b (d, k) for `weight_backward`, for degree 1 or more.

    The transpose of W is contiguous: it is the weight of a plain layer, without a copy.
    """
    scaled, left = b if scale is None else b * scale, b.shape[1] > b.shape[0]
    g = gram(scaled.mT) if left else gram(scaled)
    if shift:
        g.diagonal().sub_(shift)
    terms = polynomial_terms(g, c)
    factors = (scaled.mT, terms.mT) if left else (terms.mT, scaled.mT)
    if b.dtype in _EXACT:
        terms.diagonal().add_(c[0])  # rounds no more than the sum with c0 b, which is a pass over b
        w = factors[0] @ factors[1]
    else:
        w = _add_product(c[0] * scaled.mT, *factors)
    return w.mT, [g, terms] if scale is None else [g, terms, scaled]


def weight_backward(
    dw: Tensor, b: Tensor, q: Polynomial, saved: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the needed ones of (db, dc, da)."""
    need_b, need_c, need_a = needs
    g, terms, scaled = (*saved, b)[:3]
    c, left, need_scaled = q.coefficients.unbind(), b.shape[1] > b.shape[0], need_b or need_a
    if b.dtype in _EXACT:
        m, dc = _derivative(g, _twice_symmetric(dw @ scaled.mT if left else scaled.mT @ dw), c, need_c)
        db = _sum_of_products(dw, terms, scaled, m, left) if need_scaled else None
    else:
        db, dc = _through_weight(dw, scaled, (g, terms), c, left, need_scaled, need_c)
    da = None
    if db is not None:
        db, da = _through_scale(db, b, q, need_a)
    return db if need_b else None, None if dc is None else dc.to(q.coefficients.dtype), da


def pull_back(dw: Tensor, b: Tensor, c: Sequence[float], saved: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute db and <dW, W> of a weight formed of numbers c in an exact dtype, outside of any transform."""
    g, terms = saved
    left = b.shape[1] > b.shape[0]
    s = _twice_symmetric(dw @ b.mT if left else b.mT @ dw)
    m, _ = _derivative(g, s, c, False)
    return _sum_of_products(dw, terms, b, m, left, in_place=True), (s * terms).sum() * 0.5


def matrix_forward(b: Tensor, c: Sequence[float], shift: float) -> tuple[Tensor, Tensor]:
    """Compute q(G) (k, k) of numbers c, in an exact dtype, and G - shift I, for `matrix_backward`."""
    g = gram(b)
    if shift:
        g.diagonal().sub_(shift)
    matrix = polynomial_terms(g, c)
    matrix.diagonal().add_(c[0])
    return matrix, g


def matrix_backward(
    dm: Tensor, b: Tensor, gain: Tensor, c: Sequence[float], saved: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute (db, dgain) of gain q(G), with one product of b's size where PyTorch's autograd has two."""
    matrix, g = saved
    s = _twice_symmetric(dm)
    m, _ = _derivative(g, s, c, False)
    return b @ (gain * m), _inner(s, matrix) * 0.5


def _sum_of_products(s: Tensor, terms: Tensor, b: Tensor, m: Tensor, left: bool, in_place: bool = False) -> Tensor:
    """Return S q(G) + b M, or q(K) S + M b if `left`; in b's order of memory."""
    if is_column_major(b):
        return _sum_of_products(s.mT, terms.mT, b.mT, m.mT, not left, in_place).mT
    first, factors = terms @ s if left else s @ terms, (m, b) if left else (b, m)
    return first.addmm_(*factors) if in_place else _add_product(first, *factors)


def _through_weight(
    s: Tensor, b: Tensor, saved: Sequence[Tensor], c: Sequence[Tensor], left: bool, need_b: bool, need_c: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return (db̂, dc) from the gradient S of the weight, by K = b̂ b̂ᵀ if `left`."""
    g, terms = saved
    m, dc = _derivative(g, _twice_symmetric(s @ b.mT if left else b.mT @ s), c, need_c)
    if not need_b:
        return None, dc
    db = _add_product(c[0] * s, *((terms, s) if left else (s, terms)))
    return _add_product(db, *((m, b) if left else (b, m))), dc


def _through_scale(db: Tensor, b: Tensor, q: Polynomial, need_a: bool) -> tuple[Tensor, Tensor | None]:
    """Return (db, da) from db̂."""
    if q.scale is None:
        return db, None
    return db * q.scale, _inner(db, b).to(q.scale.dtype) if need_a else None


def logits(x: Tensor, b: Tensor, a: Tensor, bias: Tensor | None, q: Polynomial, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return both logits (n, m) of an output layer a (m, k), as `eager.logits` does for the summary."""
    b = _scaled(b, q)
    c = q.coefficients.unbind()
    h = c[-1] * a
    if len(c) > 1:
        d, k = b.shape
        g = minus_identity(gram(b), q.shift) if head_by_gram(d, k, a.shape[0], len(c) - 1) else None
        for term in c[-2::-1]:
            first = term * a - q.shift * h if q.shift and g is None else term * a
            h = _add_product(first, *((h @ b.mT, b) if g is None else (h, g)))
    z, both = torch.cat((a, h)), None if bias is None else torch.cat((bias, bias))
    o = _affine(x, (z @ b.mT).mT, both) if plan.order == "logits_from_x" else _affine(x @ b, z.mT, both)
    first, second = o.view(x.shape[0], 2, a.shape[0]).unbind(1)
    return first, second


def _scaled(b: Tensor, q: Polynomial) -> Tensor:
    return b if q.scale is None else b * q.scale


def _upper(g: Tensor, square: Tensor, c: Sequence[Tensor | float]) -> Tensor:
    return c[3] * g if len(c) == 4 else add_multiple(c[3] * g, c[4], square)


def _derivative(g: Tensor, s: Tensor, c: Sequence[Tensor | float], need_c: bool) -> tuple[Tensor, Tensor | None]:
    """Return Σ_i c_i Σ_{j<i} Gʲ S Gⁱ⁻¹⁻ʲ of a symmetric S = T + Tᵀ, and <T, Gⁱ> for each i if needed."""
    degree = len(c) - 1
    m = c[1] * s
    h = g @ s if degree >= 2 else s
    square = g @ g if degree >= 3 or (need_c and degree == 2) else g
    if degree >= 2:
        s2 = _twice_symmetric(h)  # the derivative of G²
        m = add_multiple(m, c[2], s2)
        if degree >= 3:
            m = _add_product(_add_product(m, s2, _upper(g, square, c)), square, _upper(s, s2, c))
    if not need_c:
        return m, None
    products = [s.diagonal().to(accumulation_dtype(s.dtype)).sum(), _inner(s, g)]
    if degree >= 2:
        products.append(_inner(s, square))
    if degree >= 3:
        products.append(_inner(h, square))
    if degree == 4:
        products.append(_inner(h @ g, square))
    return m, torch.stack(products) * 0.5


def _inner(left: Tensor, right: Tensor) -> Tensor:
    wide = accumulation_dtype(left.dtype)
    return (left.to(wide) * right.to(wide)).sum()


def _weight(b: Tensor, terms: Tensor, constant: Tensor, left: bool) -> Tensor:
    """Return c0 b + b q'(G), or c0 b + q'(K) b if `left`; in b's order of memory, and rounded once."""
    if is_column_major(b):
        return _weight(b.mT, terms, constant, not left).mT
    return _add_product(constant * b, *((terms, b) if left else (b, terms)))
