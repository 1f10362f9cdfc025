"""The streaming forward: Y = (X b) G + bias, and P where asked, for up to 128 columns."""

import triton
import triton.language as tl

from interp_nn.engines.triton.tiles import gram, project, project_and_gram, store_rows, store_square


@triton.jit
def _emit(P, Y, BIAS, p, g, row, n, K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """Store P and Y = P G + bias of one row tile."""
    rn, rk = tl.arange(0, BN), tl.arange(0, BK)
    if P is not None:
        store_rows(P, p, row, rn, rk, n, K)
    y = tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
    if BIAS is not None:
        y += tl.load(BIAS + rk, mask=rk < K, other=0.0).to(tl.float32)[None, :]
    store_rows(Y, y, row, rn, rk, n, K)


@triton.jit(do_not_specialize=["n"])
def stream(
    X,
    B,
    BIAS,
    P,
    Y,
    G,
    n,
    d,
    K: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Each program walks over its row tiles. The first also gives it G, from the tiles of b that X is multiplied with.

    Recomputing G in every program costs about what a barrier would, and needs none. BIAS, P, G may be None; G and P are
    stored in X's dtype.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    row = tl.cast(program, tl.int64) * BN
    if PRECISION == "tf32x3":  # two parts of each operand leave no registers for two products
        g = gram(B, d, K, BK, BD, B_T, EVEN_D, PRECISION)
        p = project(X, B, row, n, d, K, BK, BN, BD, B_T, EVEN_D, PRECISION)
    else:
        p, g = project_and_gram(X, B, row, n, d, K, BK, BN, BD, B_T, EVEN_D, PRECISION)
    g = g.to(X.dtype.element_ty)
    if G is not None:
        if program == 0:
            rk = tl.arange(0, BK)
            store_square(G, g, rk, K)
    _emit(P, Y, BIAS, p, g, row, n, K, BK, BN, PRECISION)
    for tile in range(program + programs, tl.cdiv(n, BN), programs):
        row = tl.cast(tile, tl.int64) * BN
        p = project(X, B, row, n, d, K, BK, BN, BD, B_T, EVEN_D, PRECISION)
        _emit(P, Y, BIAS, p, g, row, n, K, BK, BN, PRECISION)
