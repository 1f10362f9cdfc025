"""The forward for up to 128 columns: Y = (X b) G + bias or Y = a (X b) q(G) + bias, and optionally P, G and q(G)."""

import triton
import triton.language as tl

from interp_nn.engines.triton.tiles import (
    dot,
    evaluate,
    gram,
    project,
    scaled,
    store_rows,
    store_square,
)


@triton.jit
def _store_tile(P, Y, BIAS, p, g, row, n, K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """Store P and Y = P G + bias of one row tile."""
    rn, rk = tl.arange(0, BN), tl.arange(0, BK)
    if P is not None:
        store_rows(P, p, row, rn, rk, n, K)
    y = dot(p.to(g.dtype), g, None, PRECISION)
    if BIAS is not None:
        y += tl.load(BIAS + rk, mask=rk < K, other=0.0).to(tl.float32)[None, :]
    store_rows(Y, y, row, rn, rk, n, K)


@triton.jit
def _gram_to_q(
    G,
    Q,
    g,
    C_Q,
    SCALE,
    DTYPE: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    DEGREE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return q(a² g) in DTYPE of g = bᵀb. The first program stores G = a² g and q(G)."""
    rk = tl.arange(0, BK)
    g = scaled(scaled(g, SCALE), SCALE)
    q = evaluate(g, C_Q, DTYPE, BK, DEGREE, PRECISION).to(DTYPE)
    if tl.program_id(0) == 0:
        store_square(G, g, rk, K)
        store_square(Q, q, rk, K)
    return q


@triton.jit(do_not_specialize=["n"])
def stream(
    X,
    B,
    BIAS,
    P,
    Y,
    G,
    Q,
    C_Q,
    SCALE,
    n,
    d,
    K: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    DEGREE: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Store Y, and P and G in X's dtype; BIAS (K,), P and G may be None. Of a polynomial store Q = q(G) too.

    Each program forms G itself, which costs about as much as a grid barrier. q(G) adds DEGREE - 1 products of BK x BK matrices.
    Then it takes row tiles in turn. Their loops over features are one loop: loads of the next tile run while the last one is
    stored. fp32 operands leave no memory for that.
    """
    FLAT: tl.constexpr = X.dtype.element_ty != tl.float32
    program, programs = tl.program_id(0), tl.num_programs(0)
    g = gram(B, d, K, BK, BD, B_T, EVEN_D, PRECISION)
    if DEGREE is not None:
        g = _gram_to_q(G, Q, g, C_Q, SCALE, X.dtype.element_ty, K, BK, DEGREE, PRECISION)
    g = g.to(X.dtype.element_ty)
    if DEGREE is None and G is not None:
        if program == 0:
            rk = tl.arange(0, BK)
            store_square(G, g, rk, K)
    for tile in tl.range(program, tl.cdiv(n, BN), programs, flatten=FLAT):
        row = tl.cast(tile, tl.int64) * BN
        p = project(X, B, row, n, d, K, BK, BN, BD, B_T, EVEN_D, PRECISION)
        _store_tile(P, Y, BIAS, scaled(p, SCALE), g, row, n, K, BK, BN, PRECISION)
