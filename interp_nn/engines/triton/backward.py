"""Backward for up to 128 columns: of the pair (through D = dP + dY G) and of the summary alone (through S = Xᵀ dY).

Both end in strips: a job is a tile of features and a split of the rows. It walks over its rows once, adding up its
part of a d x K gradient in registers and streaming its strip of dX out.
"""

import triton
import triton.language as tl

from interp_nn.engines.triton.grid import add_parts, barrier
from interp_nn.engines.triton.tiles import load_b, load_rows, load_square, load_x, store_b, store_rows, store_x


@triton.jit
def projection_strips(
    X,
    B,
    D,
    DX,
    PARTS,
    n,
    d,
    splits,
    scale,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    NEED_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """PARTS[split] = Xᵀ D over the rows of the split; dX = scale D bᵀ where DX is not None. D is (n, WIDTH), dX like X."""
    rn, rk = tl.arange(0, BN), tl.arange(0, BK)
    strips, tiles = tl.cdiv(d, BD), tl.cdiv(n, BN)
    share = tl.cdiv(tiles, splits)
    for job in range(tl.program_id(0), strips * splits, tl.num_programs(0)):
        split = job // strips
        rd = (job % strips) * BD + tl.arange(0, BD)
        s = tl.zeros((BD, BK), tl.float32)
        if DX is not None:
            b = tl.trans(load_b(B, rd, rk, d, K, B_T, EVEN_D))
        for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
            row = tl.cast(tile, tl.int64) * BN
            g = load_rows(D, row, rn, rk, n, WIDTH)
            if NEED_B:
                x = load_x(X, row, rn, rd, n, d, EVEN_D)
                s = tl.dot(tl.trans(x), g, s, input_precision=PRECISION)
            if DX is not None:
                store_x(DX, tl.dot(g, b, input_precision=PRECISION) * scale, row, rn, rd, n, d, EVEN_D)
        if NEED_B:
            at = PARTS + (split * d + rd[:, None]) * BK + rk[None, :]
            tl.store(at, s, mask=rd[:, None] < d)


@triton.jit
def add_splits(PARTS, rd, d, splits, BK: tl.constexpr, BC: tl.constexpr, BATCH: tl.constexpr):
    """The sum over splits of PARTS[split, rd, :], a (BC, BK) tile, in a fixed order."""
    rk = tl.arange(0, BK)
    total = tl.zeros((BC, BK), tl.float32)
    for first in range(0, splits, BATCH):
        q = first + tl.arange(0, BATCH)
        at = PARTS + (q[:, None, None] * d + rd[None, :, None]) * BK + rk[None, None, :]
        mask = (q[:, None, None] < splits) & (rd[None, :, None] < d)
        total += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def add_to_part(PART, value, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """PART += value for a (ROWS, COLUMNS) tile in a program's own part of a workspace; PART = value where `first`."""
    at = PART + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if not first:
        value += tl.load(at)
    tl.debug_barrier()  # another thread of the program may have stored what this one loads
    tl.store(at, value)
    tl.debug_barrier()


@triton.jit
def twice_symmetric(T, BK: tl.constexpr):
    """T + Tᵀ of a (BK, BK) workspace."""
    r = tl.arange(0, BK)
    at = r[:, None] * BK + r[None, :]
    return tl.load(T + at) + tl.trans(tl.load(T + at))


@triton.jit(do_not_specialize=["n", "splits"])
def pair_backward(
    X,
    B,
    P,
    G,
    DP,
    DY,
    DX,
    DB,
    D,
    WORK,
    COUNTER,
    n,
    d,
    splits,
    K: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASES: tl.constexpr,
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    BN_A: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    BATCH: tl.constexpr,
):
    """dX = D bᵀ and db = Xᵀ D + b (T + Tᵀ) with D = dP + dY G and T = Pᵀ dY. DP, DX or DB may be None, and so may DY:
    D is then dP itself, without the first phase.

    Phases: 1 rows, D and parts of T; 2 strips, and T; 4 db. D (n, WIDTH) is a workspace in X's dtype, WORK one in fp32:
    (splits, d, BK) parts of Xᵀ D, (programs, BK, BK) parts of T, T.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    rk = tl.arange(0, BK)
    T_PARTS = WORK + splits * d * BK
    T = T_PARTS + programs * BK * BK
    if PHASES & 1:
        rn = tl.arange(0, BN_A)
        g = load_square(G, rk, K)
        t = tl.zeros((BK, BK), tl.float32)
        for tile in range(program, tl.cdiv(n, BN_A), programs):
            row = tl.cast(tile, tl.int64) * BN_A
            dy = load_rows(DY, row, rn, rk, n, K)
            gradient = tl.dot(dy, g, input_precision=PRECISION)
            if DP is not None:
                gradient += load_rows(DP, row, rn, rk, n, K).to(tl.float32)
            store_rows(D, gradient, row, rn, rk, n, WIDTH)
            if DB is not None:
                p = load_rows(P, row, rn, rk, n, K)
                t = tl.dot(tl.trans(p), dy, t, input_precision=PRECISION)
        if DB is not None:
            tl.store(T_PARTS + program * BK * BK + rk[:, None] * BK + rk[None, :], t)
    if (PHASES & 3) == 3:
        barrier(COUNTER)
    if PHASES & 2:
        projection_strips(
            X, B, D, DX, WORK, n, d, splits, 1.0, K, WIDTH, BK, BN, BD, B_T, EVEN_D, DB is not None, PRECISION
        )
        if DB is not None and DY is not None:
            add_parts(T_PARTS, T, programs, BK * BK, BK * BK, 256, BATCH)
    if (PHASES & 6) == 6:
        barrier(COUNTER)
    if PHASES & 4:
        if DY is not None:
            t = twice_symmetric(T, BK)
        for strip in range(program, tl.cdiv(d, BC), programs):
            rd = strip * BC + tl.arange(0, BC)
            db = add_splits(WORK, rd, d, splits, BK, BC, 4)
            if DY is not None:
                b = load_b(B, rd, rk, d, K, B_T, EVEN_D).to(tl.float32)
                db = tl.dot(b, t, db, input_precision=PRECISION)
            store_b(DB, db, rd, rk, d, K, B_T)


@triton.jit(do_not_specialize=["n", "splits"])
def summary_backward(
    X,
    B,
    G,
    DY,
    DX,
    DB,
    DBIAS,
    WORK,
    COUNTER,
    n,
    d,
    splits,
    K: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASES: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    BATCH: tl.constexpr,
):
    """dX = dY Wᵀ with W = b G, db = S G + b (T + Tᵀ) with S = Xᵀ dY and T = bᵀ S, dbias = the column sums of dY. No n x K
    matrix but dY. DX, DB or DBIAS may be None.

    Phases: 1 strips, parts of S, of T and of dbias; 2 T and dbias; 4 db. WORK, in fp32: (splits, d, BK) parts of S,
    (min(programs, strips * splits), BK, BK) parts of T, (splits, BK) parts of dbias, T.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    rn, rk = tl.arange(0, BN), tl.arange(0, BK)
    strips, tiles = tl.cdiv(d, BD), tl.cdiv(n, BN)
    share = tl.cdiv(tiles, splits)
    T_PARTS = WORK + splits * d * BK
    parts = tl.minimum(programs, strips * splits)
    BIAS_PARTS = T_PARTS + parts * BK * BK
    T = BIAS_PARTS + splits * BK
    if PHASES & 1:
        for job in range(program, strips * splits, programs):
            split = job // strips
            rd = (job % strips) * BD + tl.arange(0, BD)
            b = load_b(B, rd, rk, d, K, B_T, EVEN_D)
            if DX is not None:
                w = tl.dot(b, load_square(G, rk, K), input_precision=PRECISION)
                w = tl.trans(w.to(X.dtype.element_ty))
            s = tl.zeros((BD, BK), tl.float32)
            columns = tl.zeros((BK,), tl.float32)
            for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
                row = tl.cast(tile, tl.int64) * BN
                dy = load_rows(DY, row, rn, rk, n, K)
                if DB is not None:
                    x = load_x(X, row, rn, rd, n, d, EVEN_D)
                    s = tl.dot(tl.trans(x), dy, s, input_precision=PRECISION)
                if DX is not None:
                    store_x(DX, tl.dot(dy, w, input_precision=PRECISION), row, rn, rd, n, d, EVEN_D)
                if DBIAS is not None:
                    if job % strips == 0:
                        columns += tl.sum(dy.to(tl.float32), axis=0)
            if DB is not None:
                tl.store(WORK + (split * d + rd[:, None]) * BK + rk[None, :], s, mask=rd[:, None] < d)
                t = tl.dot(tl.trans(b.to(tl.float32)), s, input_precision=PRECISION)
                add_to_part(T_PARTS + program * BK * BK, t, job == program, BK, BK)
            if DBIAS is not None:
                if job % strips == 0:
                    tl.store(BIAS_PARTS + split * BK + rk, columns)
    if (PHASES & 3) == 3:
        barrier(COUNTER)
    if PHASES & 2:
        if DB is not None:
            add_parts(T_PARTS, T, parts, BK * BK, BK * BK, 256, BATCH)
        if DBIAS is not None:
            if program == programs - 1:
                total = tl.zeros((BK,), tl.float32)
                for split in range(0, splits):
                    total += tl.load(BIAS_PARTS + split * BK + rk)
                tl.store(DBIAS + rk, total.to(DBIAS.dtype.element_ty), mask=rk < K)
    if (PHASES & 6) == 6:
        barrier(COUNTER)
    if PHASES & 4:
        # S G first, in S's place, then b (T + Tᵀ): G and T in fp32, both at hand, would be more than fits.
        g = load_square(G, rk, K).to(tl.float32)
        for strip in range(program, tl.cdiv(d, BC), programs):
            rd = strip * BC + tl.arange(0, BC)
            s = tl.dot(add_splits(WORK, rd, d, splits, BK, BC, 4), g, input_precision=PRECISION)
            tl.debug_barrier()
            tl.store(WORK + rd[:, None] * BK + rk[None, :], s, mask=rd[:, None] < d)
        tl.debug_barrier()
        t = twice_symmetric(T, BK)
        for strip in range(program, tl.cdiv(d, BC), programs):
            rd = strip * BC + tl.arange(0, BC)
            s = tl.load(WORK + rd[:, None] * BK + rk[None, :], mask=rd[:, None] < d, other=0.0)
            b = load_b(B, rd, rk, d, K, B_T, EVEN_D).to(tl.float32)
            store_b(DB, tl.dot(b, t, s, input_precision=PRECISION), rd, rk, d, K, B_T)
