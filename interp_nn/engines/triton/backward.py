"""Backward for up to 128 columns: of the pair, through D = dP + dY G, and of the summary alone, through S = Xᵀ dY.

A polynomial has Q = q(G) in the place of G, the scale a, and in that of T + Tᵀ the derivative M of q at G along T + Tᵀ:

    D = dP + dY Q, dX = a D bᵀ, db = a Xᵀ D + a² b M,   or   W = a b Q, db = a S Q + a² b M, T = a bᵀ S,   dc_i = <T, Gⁱ>

M is never formed: each tile of db takes b M from its rows of b by Horner's rule (see `add_derivative`).

Both kernels end in jobs of one feature tile and one split of the rows. A job reads its rows once, accumulates its part of a
(d, K) gradient in registers, and stores its columns of dX. The losses use these jobs too.
"""

import triton
import triton.language as tl

from interp_nn.engines.triton.grid import add_parts, barrier, store_column_sums
from interp_nn.engines.triton.tiles import (
    dot,
    load_a,
    load_b,
    load_rows,
    load_square,
    load_x,
    scaled,
    store_b,
    store_rows,
    store_x,
)


@triton.jit
def backprop_projection(
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
    """Store dX = scale D bᵀ, and with NEED_B the parts (splits, d, BK) of Xᵀ D. D has n rows of WIDTH elements."""
    rn, rk = tl.arange(0, BN), tl.arange(0, BK)
    feature_tiles, tiles = tl.cdiv(d, BD), tl.cdiv(n, BN)
    share = tl.cdiv(tiles, splits)
    # What a job needs at its end is computed there: before the loop it would take registers from the rows.
    for job in tl.range(tl.program_id(0), feature_tiles * splits, tl.num_programs(0), disable_licm=True):
        split = job // feature_tiles
        rd = (job % feature_tiles) * BD + tl.arange(0, BD)
        s = tl.zeros((BD, BK), tl.float32)
        if DX is not None:
            b = tl.trans(load_b(B, rd, rk, d, K, B_T, EVEN_D))
        for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
            row = tl.cast(tile, tl.int64) * BN
            g = load_rows(D, row, rn, rk, n, WIDTH)
            if NEED_B:
                x = load_x(X, row, rn, rd, n, d, EVEN_D)
                s = dot(tl.trans(x), g, s, PRECISION)
            if DX is not None:
                store_x(DX, dot(g, b, None, PRECISION) * scale, row, rn, rd, n, d, EVEN_D)
        if NEED_B:
            at = PARTS + (split * d + rd[:, None]) * BK + rk[None, :]
            tl.store(at, s, mask=rd[:, None] < d)


@triton.jit
def add_splits(PARTS, rd, d, splits, BK: tl.constexpr, BC: tl.constexpr, BATCH: tl.constexpr):
    """Sum PARTS[split, rd, :] over the splits in their order: a (BC, BK) tile. BATCH loads are in flight at a time."""
    rk = tl.arange(0, BK)
    total = tl.zeros((BC, BK), tl.float32)
    for first in range(0, splits, BATCH):
        for i in tl.static_range(BATCH):
            at = PARTS + ((first + i) * d + rd[:, None]) * BK + rk[None, :]
            total += tl.load(at, mask=(first + i < splits) & (rd[:, None] < d), other=0.0)
    return total


@triton.jit
def add_to_part(PART, value, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Add a (ROWS, COLUMNS) tile to the program's own part of a workspace; the first job stores it instead."""
    at = PART + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if not first:
        value += tl.load(at)
    tl.debug_barrier()  # another thread of the program may have stored what this one loads
    tl.store(at, value)
    tl.debug_barrier()


@triton.jit
def symmetrized(T, BK: tl.constexpr):
    """Load T + Tᵀ of a (BK, BK) workspace."""
    r = tl.arange(0, BK)
    at = r[:, None] * BK + r[None, :]
    return tl.load(T + at) + tl.trans(tl.load(T + at))


@triton.jit
def _times_symmetrized(
    r, acc, T, U2, A, M: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """Return acc + r (T + Tᵀ); of a head T is U2ᵀ A."""
    if U2 is None:
        acc = dot(r, symmetrized(T, BK), acc, PRECISION)
    else:
        rk, rm = tl.arange(0, BK), tl.arange(0, BM)
        u2 = tl.load(U2 + rm[:, None] * BK + rk[None, :])
        a = load_a(A, rm, rk, M, K).to(tl.float32)
        acc = dot(dot(r, tl.trans(u2), None, PRECISION), a, acc, PRECISION)
        acc = dot(dot(r, tl.trans(a), None, PRECISION), u2, acc, PRECISION)
    return acc


@triton.jit
def add_derivative(
    db,
    B,
    rd,
    d,
    T,
    U2,
    A,
    G,
    C_Q,
    SCALE,
    K: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    WIDTH: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    DEGREE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return db + a b M for the features rd of b and the derivative M of q at G (WIDTH, WIDTH) along T + Tᵀ.

    Horner's rule for q and its derivative, applied to rows of b: 3 DEGREE - 2 products of a tile with a BK x BK matrix, where
    the summary has one. Each loads its matrix anew, 64 KiB of it for more than 64 columns: two of them in fp32 do not fit in
    shared memory.
    """
    rk = tl.arange(0, BK)
    b = load_b(B, rd, rk, d, K, B_T, EVEN_D).to(tl.float32)
    r = b * tl.load(C_Q + DEGREE)
    out = _times_symmetrized(r, tl.zeros(b.shape, tl.float32), T, U2, A, M, K, BM, BK, PRECISION)
    for i in tl.range(DEGREE - 1, 0, -1, num_stages=1):
        tl.debug_barrier()  # or the compiler would keep both matrices
        g = load_square(G, rk, WIDTH).to(tl.float32)
        out = dot(out, g, None, PRECISION)
        r = dot(r, g, None, PRECISION) + b * tl.load(C_Q + i)
        tl.debug_barrier()
        out = _times_symmetrized(r, out, T, U2, A, M, K, BM, BK, PRECISION)
    return db + scaled(out, SCALE)


@triton.jit
def store_dq(
    DQ,
    L,
    A,
    G,
    scale,
    M: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    WIDTH: tl.constexpr,
    DEGREE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store DQ_i = scale <L, A Gⁱ> by the last program, which has the least to do: <T, Gⁱ> for L = T and no A.

    L is (ROWS, BK) in fp32; sixteen rows at a time take DEGREE products.
    """
    if tl.program_id(0) == tl.num_programs(0) - 1:
        rk, ri = tl.arange(0, BK), tl.arange(0, 8)
        g = load_square(G, rk, WIDTH).to(tl.float32)
        total = tl.zeros((8,), tl.float32)
        for first in range(0, ROWS, 16):
            rm = first + tl.arange(0, 16)
            left = tl.load(L + rm[:, None] * BK + rk[None, :])
            v = tl.where(rm[:, None] == rk[None, :], 1.0, 0.0) if A is None else load_a(A, rm, rk, M, K).to(tl.float32)
            for i in tl.static_range(DEGREE + 1):
                if i > 0:
                    v = dot(v, g, None, PRECISION)
                total += tl.where(ri == i, tl.sum(tl.sum(left * v, axis=1), axis=0), 0.0)
        tl.store(DQ + ri, total * scale, mask=ri <= DEGREE)


@triton.jit
def store_db_tile(
    DB,
    B,
    db,
    t,
    scale,
    rd,
    d,
    K: tl.constexpr,
    BK: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the features rd of scale (db + b t), where t is T + Tᵀ, or None for zero."""
    rk = tl.arange(0, BK)
    if t is not None:
        b = load_b(B, rd, rk, d, K, B_T, EVEN_D).to(tl.float32)
        db = dot(b, t, db, PRECISION)
    store_b(DB, db * scale, rd, rk, d, K, B_T)


@triton.jit
def store_db(
    DB,
    B,
    PARTS,
    t,
    scale,
    d,
    splits,
    K: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH: tl.constexpr = 8,
    T=None,
    U2=None,
    A=None,
    G=None,
    C_Q=None,
    SCALE=None,
    M: tl.constexpr = 1,
    BM: tl.constexpr = 16,
    WIDTH: tl.constexpr = 1,
    DEGREE: tl.constexpr = None,
):
    """Store db = scale (the sum of PARTS (splits, d, BK) + b t), the last phase of most kernels.

    Of a polynomial t is None, and what follows BATCH are the arguments of `add_derivative`; nothing is added without T and U2.
    """
    for tile in range(tl.program_id(0), tl.cdiv(d, BC), tl.num_programs(0)):
        rd = tile * BC + tl.arange(0, BC)
        db = add_splits(PARTS, rd, d, splits, BK, BC, BATCH)
        if DEGREE is not None and (T is not None or U2 is not None):
            db = add_derivative(
                db, B, rd, d, T, U2, A, G, C_Q, SCALE, K, M, BK, BM, WIDTH, B_T, EVEN_D, DEGREE, PRECISION
            )
        store_db_tile(DB, B, db, t, scale, rd, d, K, BK, B_T, EVEN_D, PRECISION)


@triton.jit
def pair_backward_workspace(WORK, splits, d, programs, BK: tl.constexpr):
    """Return the arrays in WORK, which follow one another from WORK on, and WORK's end.

    =======  ==================  ===============
    array    shape               content
    =======  ==================  ===============
    WORK     (splits, d, BK)     parts of Xᵀ D
    T_PARTS  (programs, BK, BK)  parts of T
    T        (BK, BK)            T
    =======  ==================  ===============
    """
    T_PARTS = WORK + splits * d * BK
    T = T_PARTS + programs * BK * BK
    return T_PARTS, T, T + BK * BK


@triton.jit(do_not_specialize=["n", "splits"])
def pair_backward(
    X,
    B,
    P,
    Q,
    DP,
    DY,
    DX,
    DB,
    G,
    C_Q,
    SCALE,
    DQ,
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
    DEGREE: tl.constexpr,
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    BN_A: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    """Store dX = D bᵀ and db = Xᵀ D + b (T + Tᵀ), and of a polynomial DQ. Q is G itself for the summary, which has no G besides.

    Phases: 1 D and parts of T; 2 dX, parts of Xᵀ D, and T; 4 db. Without DY, D is dP itself and phase 1 is left out.
    Workspace D: (n, WIDTH), X's dtype.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    rk = tl.arange(0, BK)
    T_PARTS, T, _ = pair_backward_workspace(WORK, splits, d, programs, BK)
    if PHASES & 1:
        rn = tl.arange(0, BN_A)
        g = load_square(Q, rk, K)
        t = tl.zeros((BK, BK), tl.float32)
        for tile in range(program, tl.cdiv(n, BN_A), programs):
            row = tl.cast(tile, tl.int64) * BN_A
            dy = load_rows(DY, row, rn, rk, n, K)
            # Transposed, or each warp of a small tile would compute all of its rows.
            gradient = tl.trans(dot(tl.trans(g), tl.trans(dy), None, PRECISION))
            if DP is not None:
                gradient += load_rows(DP, row, rn, rk, n, K).to(tl.float32)
            store_rows(D, gradient, row, rn, rk, n, WIDTH)
            if DB is not None:
                p = load_rows(P, row, rn, rk, n, K)
                t = dot(tl.trans(p), dy, t, PRECISION)
        if DB is not None:
            tl.store(T_PARTS + program * BK * BK + rk[:, None] * BK + rk[None, :], t)
    if (PHASES & 3) == 3:
        barrier(COUNTER)
    if PHASES & 2:
        backprop_projection(
            X,
            B,
            D,
            DX,
            WORK,
            n,
            d,
            splits,
            scaled(1.0, SCALE),
            K,
            WIDTH,
            BK,
            BN,
            BD,
            B_T,
            EVEN_D,
            DB is not None,
            PRECISION,
        )
        if DB is not None and DY is not None:
            add_parts(T_PARTS, T, programs, BK * BK, BK * BK)
    if (PHASES & 6) == 6:
        barrier(COUNTER)
    if PHASES & 4:
        t = None
        if DY is None:
            T = None
        elif DEGREE is None:
            t = symmetrized(T, BK)
        store_db(
            DB, B, WORK, t, scaled(1.0, SCALE), d, splits, K, BK, BC, B_T, EVEN_D, PRECISION, 8,
            T, None, None, G, C_Q, SCALE, 1, 16, K, DEGREE,
        )  # fmt: skip
        if DQ is not None:
            store_dq(DQ, T, None, G, 1.0, 1, K, BK, BK, K, DEGREE, PRECISION)


@triton.jit
def summary_backward_workspace(WORK, splits, d, parts, BK: tl.constexpr):
    """Return the arrays in WORK, which follow one another from WORK on, and WORK's end.

    ==========  ===============  ================================================================
    array       shape            content
    ==========  ===============  ================================================================
    WORK        (splits, d, BK)  parts of S; then S Q in the place of the first
    T_PARTS     (parts, BK, BK)  parts of T; `parts` is min(programs, feature tiles of BD * splits)
    BIAS_PARTS  (splits, BK)     parts of dbias
    T           (BK, BK)         T
    ==========  ===============  ================================================================
    """
    T_PARTS = WORK + splits * d * BK
    BIAS_PARTS = T_PARTS + parts * BK * BK
    T = BIAS_PARTS + splits * BK
    return T_PARTS, BIAS_PARTS, T, T + BK * BK


@triton.jit(do_not_specialize=["n", "splits"])
def summary_backward(
    X,
    B,
    Q,
    DY,
    DX,
    DB,
    DBIAS,
    G,
    C_Q,
    SCALE,
    DQ,
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
    DEGREE: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    """Store dX = dY Wᵀ, db = S G + b (T + Tᵀ), and dbias, the column sums of dY. The only (n, K) matrix is dY.

    Of a polynomial also DQ. Q is G itself for the summary, which has no G besides.

    Phases: 1 dX, parts of S, T and dbias; 2 T and dbias; 4 db.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    rn, rk = tl.arange(0, BN), tl.arange(0, BK)
    feature_tiles, tiles = tl.cdiv(d, BD), tl.cdiv(n, BN)
    share = tl.cdiv(tiles, splits)
    SLICE: tl.constexpr = 32 if BK > 64 else BK  # rows of T at a time
    parts = tl.minimum(programs, feature_tiles * splits)
    T_PARTS, BIAS_PARTS, T, _ = summary_backward_workspace(WORK, splits, d, parts, BK)
    if PHASES & 1:
        for job in tl.range(program, feature_tiles * splits, programs, disable_licm=True):  # as in backprop_projection
            split = job // feature_tiles
            rd = (job % feature_tiles) * BD + tl.arange(0, BD)
            b = load_b(B, rd, rk, d, K, B_T, EVEN_D)
            if DX is not None:
                w = scaled(dot(b, load_square(Q, rk, K), None, PRECISION), SCALE)
                w = tl.trans(w.to(X.dtype.element_ty))
            s = tl.zeros((BD, BK), tl.float32)
            columns = tl.zeros((BK,), tl.float32)
            for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
                row = tl.cast(tile, tl.int64) * BN
                dy = load_rows(DY, row, rn, rk, n, K)
                if DB is not None:
                    x = load_x(X, row, rn, rd, n, d, EVEN_D)
                    s = dot(tl.trans(x), dy, s, PRECISION)
                if DX is not None:
                    store_x(DX, dot(dy, w, None, PRECISION), row, rn, rd, n, d, EVEN_D)
                if DBIAS is not None:
                    if job % feature_tiles == 0:
                        columns += tl.sum(dy.to(tl.float32), axis=0)
            if DB is not None:
                tl.store(WORK + (split * d + rd[:, None]) * BK + rk[None, :], s, mask=rd[:, None] < d)
                for first in tl.range(0, BK, SLICE, num_stages=1):
                    part = load_b(B, rd, first + tl.arange(0, SLICE), d, K, B_T, EVEN_D).to(tl.float32)
                    t = scaled(dot(tl.trans(part), s, None, PRECISION), SCALE)
                    add_to_part(T_PARTS + (program * BK + first) * BK, t, job == program, SLICE, BK)
            if DBIAS is not None:
                if job % feature_tiles == 0:
                    tl.store(BIAS_PARTS + split * BK + rk, columns)
    if (PHASES & 3) == 3:
        barrier(COUNTER)
    if PHASES & 2:
        if DB is not None:
            add_parts(T_PARTS, T, parts, BK * BK, BK * BK)
        if DBIAS is not None:
            if program == programs - 1:
                store_column_sums(DBIAS, BIAS_PARTS, splits, 1.0, K, BK)
    if (PHASES & 6) == 6:
        barrier(COUNTER)
    if PHASES & 4:
        # S Q first, in S's place, then b (T + Tᵀ): Q and T in fp32 do not both fit in shared memory.
        g = load_square(Q, rk, K).to(tl.float32)
        for tile in range(program, tl.cdiv(d, BC), programs):
            rd = tile * BC + tl.arange(0, BC)
            s = dot(add_splits(WORK, rd, d, splits, BK, BC, 8), g, None, PRECISION)
            tl.debug_barrier()
            tl.store(WORK + rd[:, None] * BK + rk[None, :], s, mask=rd[:, None] < d)
        tl.debug_barrier()
        t = None
        if DEGREE is None:
            t = symmetrized(T, BK)
        store_db(
            DB, B, WORK, t, scaled(1.0, SCALE), d, 1, K, BK, BC, B_T, EVEN_D, PRECISION, 1,
            T, None, None, G, C_Q, SCALE, 1, 16, K, DEGREE,
        )  # fmt: skip
        if DQ is not None:
            store_dq(DQ, T, None, G, 1.0, 1, K, BK, BK, K, DEGREE, PRECISION)
