"""Forward and backward for any number of columns: the grid shares the tiles of each product, with a barrier between products.

One launch each, but slower than cuBLAS: they run only where the triton engine is forced. FORM is the order, "A" for (X b) G or
"B" for X (b G). k is an argument here, not a constant; BN and BK are the rows and columns of a product's tiles, BD their depth.
"""

import triton
import triton.language as tl

from interp_nn.engines.triton.grid import barrier
from interp_nn.engines.triton.tiles import dot


@triton.jit
def multiply_and_sum(
    L,
    R,
    acc,
    sums,
    rows,
    columns,
    inner,
    l_row,
    l_inner,
    r_inner,
    r_column,
    i,
    j,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr = True,
):
    """Return acc + tile (i, j) of L R, and with SUMS sums + the column sums of R. Strides express transposes.

    Operands of different dtypes are multiplied in fp32, at PRECISION.
    """
    rn = tl.cast(i * BN + tl.arange(0, BN), tl.int64)
    rk = tl.cast(j * BK + tl.arange(0, BK), tl.int64)
    rd = tl.cast(tl.arange(0, BD), tl.int64)
    at_l = L + rn[:, None] * l_row + rd[None, :] * l_inner
    at_r = R + rd[:, None] * r_inner + rk[None, :] * r_column
    for first in range(0, inner, BD):
        left = tl.arange(0, BD) < inner - first
        lhs = tl.load(at_l, mask=(rn[:, None] < rows) & left[None, :], other=0.0)
        rhs = tl.load(at_r, mask=left[:, None] & (rk[None, :] < columns), other=0.0)
        if L.dtype != R.dtype:
            lhs, rhs = lhs.to(tl.float32), rhs.to(tl.float32)
        acc = dot(lhs, rhs, acc, PRECISION)
        if SUMS:
            sums += tl.sum(rhs.to(tl.float32), axis=0)
        at_l += BD * l_inner
        at_r += BD * r_inner
    return acc, sums


@triton.jit
def multiply(
    L,
    R,
    acc,
    rows,
    columns,
    inner,
    l_row,
    l_inner,
    r_inner,
    r_column,
    i,
    j,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return acc + tile (i, j) of L R."""
    acc, _ = multiply_and_sum(
        L, R, acc, tl.zeros((BK,), tl.float32), rows, columns, inner, l_row, l_inner, r_inner, r_column, i, j,
        BN, BK, BD, PRECISION, False,
    )  # fmt: skip
    return acc


@triton.jit
def store_tile(T, value, rows, columns, row, column, i, j, BN: tl.constexpr, BK: tl.constexpr):
    """Store tile (i, j) of T in T's dtype; `row` and `column` are T's strides.

    T may be None, because both branches of a run-time condition are compiled.
    """
    if T is not None:
        rn = tl.cast(i * BN + tl.arange(0, BN), tl.int64)
        rk = tl.cast(j * BK + tl.arange(0, BK), tl.int64)
        mask = (rn[:, None] < rows) & (rk[None, :] < columns)
        tl.store(T + rn[:, None] * row + rk[None, :] * column, value.to(T.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(T, rows, columns, i, j, BN: tl.constexpr, BK: tl.constexpr):
    """Load tile (i, j) of a contiguous T in fp32, zeros outside and where T is None."""
    tile = tl.zeros((BN, BK), tl.float32)
    if T is not None:
        rn = tl.cast(i * BN + tl.arange(0, BN), tl.int64)
        rk = tl.cast(j * BK + tl.arange(0, BK), tl.int64)
        mask = (rn[:, None] < rows) & (rk[None, :] < columns)
        tile += tl.load(T + rn[:, None] * columns + rk[None, :], mask=mask, other=0.0).to(tl.float32)
    return tile


@triton.jit(do_not_specialize=["n"])
def phased_forward(
    X,
    B,
    BIAS,
    P,
    Y,
    G,
    W,
    COUNTER,
    n,
    d,
    k,
    b_row,
    b_column,
    FORM: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASES: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Store Y, G, P where it is not None, and in form B also W; BIAS may be None.

    Phases of form A: 1 G and P; 2 Y = P G. Of form B: 1 G and P; 2 W = b G; 4 Y = X W.
    b has strides (b_row, b_column); all others are contiguous. G is symmetric: only tiles on or above the diagonal are computed,
    and those above it are stored twice.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    zeros = tl.zeros((BN, BK), tl.float32)
    tn, tk = tl.cdiv(n, BN), tl.cdiv(k, BK)
    if PHASES & 1:
        grams = tl.cdiv(k, BN) * tk
        projections = 0
        if P is not None:
            projections = tn * tk
        for job in range(program, grams + projections, programs):
            if job < grams:
                i, j = job // tk, job % tk
                if (j + 1) * BK > i * BN:
                    g = multiply(B, B, zeros, k, k, d, b_column, b_row, b_row, b_column, i, j, BN, BK, BD, PRECISION)
                    store_tile(G, g, k, k, k, 1, i, j, BN, BK)
                    if j * BK >= (i + 1) * BN:
                        store_tile(G, g, k, k, 1, k, i, j, BN, BK)
            else:
                i, j = (job - grams) // tk, (job - grams) % tk
                p = multiply(X, B, zeros, n, k, d, d, 1, b_row, b_column, i, j, BN, BK, BD, PRECISION)
                store_tile(P, p, n, k, k, 1, i, j, BN, BK)
    if (PHASES & 3) == 3:
        barrier(COUNTER)
    if (PHASES & 2) and FORM == "B":
        for job in range(program, tl.cdiv(d, BN) * tk, programs):
            i, j = job // tk, job % tk
            w = multiply(B, G, zeros, d, k, k, b_row, b_column, k, 1, i, j, BN, BK, BD, PRECISION)
            store_tile(W, w, d, k, k, 1, i, j, BN, BK)
    if (PHASES & 6) == 6:
        barrier(COUNTER)
    LAST: tl.constexpr = 2 if FORM == "A" else 4
    if PHASES & LAST:
        for job in range(program, tn * tk, programs):
            i, j = job // tk, job % tk
            y = zeros
            if BIAS is not None:
                rk = j * BK + tl.arange(0, BK)
                y += tl.load(BIAS + rk, mask=rk < k, other=0.0).to(tl.float32)[None, :]
            if FORM == "A":
                y = multiply(P, G, y, n, k, k, k, 1, k, 1, i, j, BN, BK, BD, PRECISION)
            else:
                y = multiply(X, W, y, n, k, d, d, 1, k, 1, i, j, BN, BK, BD, PRECISION)
            store_tile(Y, y, n, k, k, 1, i, j, BN, BK)


@triton.jit
def correlate(
    L,
    DY,
    OUT,
    DBIAS,
    rows,
    n,
    k,
    i,
    j,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store tile (i, j) of OUT = Lᵀ dY (rows, k); the first row of tiles also stores DBIAS, the column sums of dY."""
    zeros = tl.zeros((BN, BK), tl.float32)
    if DBIAS is None:
        out = multiply(L, DY, zeros, rows, k, n, 1, rows, k, 1, i, j, BN, BK, BD, PRECISION)
    else:
        sums = tl.zeros((BK,), tl.float32)
        out, sums = multiply_and_sum(L, DY, zeros, sums, rows, k, n, 1, rows, k, 1, i, j, BN, BK, BD, PRECISION)
        if i == 0:
            rk = j * BK + tl.arange(0, BK)
            tl.store(DBIAS + rk, sums.to(DBIAS.dtype.element_ty), mask=rk < k)
    store_tile(OUT, out, rows, k, k, 1, i, j, BN, BK)


@triton.jit(do_not_specialize=["n"])
def phased_backward(
    X,
    B,
    P,
    G,
    W,
    DP,
    DY,
    DX,
    DB,
    DBIAS,
    D,
    S,
    T,
    COUNTER,
    n,
    d,
    k,
    b_row,
    b_column,
    FORM: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASES: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Store the gradients whose pointers are not None, from what the forward saved. db has b's strides.

    Phases of form A: 1 D, T and dbias; 2 dX = D bᵀ, db = Xᵀ D + b T + b Tᵀ. Without DY and T, D is dP and phase 1 is left out.
    Phases of form B: 1 dX = dY Wᵀ, S and dbias; 2 T = bᵀ S; 4 db = S G + b T + b Tᵀ.
    Workspaces D: (n, k), X's dtype; S: (d, k), fp32; T: (k, k), fp32.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    zeros = tl.zeros((BN, BK), tl.float32)
    tn, tk, tg = tl.cdiv(n, BN), tl.cdiv(k, BK), tl.cdiv(k, BN)
    td, tc = tl.cdiv(d, BN), tl.cdiv(d, BK)  # tiles of features as rows, as columns
    need_t: tl.constexpr = (DB is not None) or (DBIAS is not None)
    if PHASES & 1:
        if FORM == "A":
            grams = 0
            if need_t:
                grams = tg * tk
            for job in range(program, grams + tn * tk, programs):
                if job < grams:
                    correlate(P, DY, T, DBIAS, k, n, k, job // tk, job % tk, BN, BK, BD, PRECISION)
                else:
                    i, j = (job - grams) // tk, (job - grams) % tk
                    upstream = load_tile(DP, n, k, i, j, BN, BK)
                    g = multiply(DY, G, upstream, n, k, k, k, 1, k, 1, i, j, BN, BK, BD, PRECISION)
                    store_tile(D, g, n, k, k, 1, i, j, BN, BK)
        else:
            correlations = 0
            if need_t:
                correlations = td * tk
            dx_tiles = 0
            if DX is not None:
                dx_tiles = tn * tc
            for job in range(program, correlations + dx_tiles, programs):
                if job < correlations:
                    correlate(X, DY, S, DBIAS, d, n, k, job // tk, job % tk, BN, BK, BD, PRECISION)
                else:
                    i, j = (job - correlations) // tc, (job - correlations) % tc
                    dx = multiply(DY, W, zeros, n, d, k, k, 1, 1, k, i, j, BN, BK, BD, PRECISION)
                    store_tile(DX, dx, n, d, d, 1, i, j, BN, BK)
    if (PHASES & 3) == 3:
        barrier(COUNTER)
    if (PHASES & 2) and FORM == "B":
        for job in range(program, tg * tk, programs):
            i, j = job // tk, job % tk
            t = multiply(B, S, zeros, k, k, d, b_column, b_row, k, 1, i, j, BN, BK, BD, PRECISION)
            store_tile(T, t, k, k, k, 1, i, j, BN, BK)
    if (PHASES & 6) == 6:
        barrier(COUNTER)
    LAST: tl.constexpr = 2 if FORM == "A" else 4
    if PHASES & LAST:
        if (FORM == "A") and (DX is not None):
            for job in range(program, tn * tc, programs):
                i, j = job // tc, job % tc
                dx = multiply(D, B, zeros, n, d, k, k, 1, b_column, b_row, i, j, BN, BK, BD, PRECISION)
                store_tile(DX, dx, n, d, d, 1, i, j, BN, BK)
        if DB is not None:
            for job in range(program, td * tk, programs):
                i, j = job // tk, job % tk
                if FORM == "A":
                    db = multiply(X, D, zeros, d, k, n, 1, d, k, 1, i, j, BN, BK, BD, PRECISION)
                else:
                    db = multiply(S, G, zeros, d, k, k, k, 1, k, 1, i, j, BN, BK, BD, PRECISION)
                if T is not None:
                    db = multiply(B, T, db, d, k, k, b_row, b_column, k, 1, i, j, BN, BK, BD, PRECISION)
                    db = multiply(B, T, db, d, k, k, b_row, b_column, 1, k, i, j, BN, BK, BD, PRECISION)
                store_tile(DB, db, d, k, b_row, b_column, i, j, BN, BK)
