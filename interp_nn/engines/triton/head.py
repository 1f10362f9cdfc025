"""The three-term loss of a head with its gradients: w1 CE(O1, t) + w2 CE(O2, t) + w3 MSE(O1, O2).

======  ======  ==================================================================
symbol  shape   meaning
======  ======  ==================================================================
M, BM           classes, and the power of two that holds them
A, C    (M, K)  weight and bias (M,) of the output layer
H       (M, K)  A G
O1, O2  (n, M)  logits P Aᵀ + c and Y Aᵀ + c = P Hᵀ + c
E1, E2  (n, M)  gradients of the logits
D       (n, K)  E1 A + E2 H
U1, U2  (M, K)  E1ᵀ P and E2ᵀ P
T       (K, K)  U2ᵀ A
======  ======  ==================================================================

Latent form: dX = D bᵀ, db = Xᵀ D + b (T + Tᵀ), dA = U1 + U2 G. The output layer is linear, so Y, dY and Pᵀ dY are never formed.
Flat form, for few classes: with W1 = b Aᵀ, W2 = b Hᵀ (d, M) and V1 = Xᵀ E1, V2 = Xᵀ E2 (d, M),

    O1 = X W1 + c,   O2 = X W2 + c,   dX = E1 W1ᵀ + E2 W2ᵀ,   U1 = V1ᵀ b,   U2 = V2ᵀ b,   Xᵀ D = V1 A + V2 H,

so no (n, K) matrix exists.

A polynomial has H = A q(G), by Horner's rule on the rows of A, and dA = U1 + U2 q(G) in the same way; P = a X b, W = a b Aᵀ and
U = a Vᵀ b have the scale a. T + Tᵀ becomes the derivative of q at G along it (see `backward`).
"""

import triton
import triton.language as tl

from interp_nn.engines.triton.backward import (
    add_derivative,
    add_splits,
    add_to_part,
    backprop_projection,
    store_db,
    store_db_tile,
    store_dq,
)
from interp_nn.engines.triton.cross_entropy import gradient_scale, load_targets, loss_terms, store_value_and_dc
from interp_nn.engines.triton.grid import add_parts, barrier
from interp_nn.engines.triton.tiles import (
    dot,
    gram,
    inside,
    load_a,
    load_b,
    load_rows,
    load_x,
    project,
    rows_times_q,
    scaled,
    store_rows,
    store_x,
)


@triton.jit
def _load_c(C, rm, M: tl.constexpr, BM: tl.constexpr):
    """Load the bias in fp32, zeros without one."""
    c = tl.zeros((BM,), tl.float32)
    if C is not None:
        c += tl.load(C + rm, mask=rm < M, other=0.0).to(tl.float32)
    return c


@triton.jit
def _symmetrized(U, a, BK: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr):
    """Return T + Tᵀ for T = U2ᵀ A, from the workspace U (2, BM, BK) and A in fp32."""
    u2 = tl.load(U + BM * BK + tl.arange(0, BM)[:, None] * BK + tl.arange(0, BK)[None, :])
    t = dot(tl.trans(u2), a, None, PRECISION)
    return dot(tl.trans(a), u2, t, PRECISION)


@triton.jit
def _form_h(a, g, C_Q, DTYPE: tl.constexpr, DEGREE: tl.constexpr, PRECISION: tl.constexpr):
    """Return H = A G, or A q(G), in fp32; operands in DTYPE."""
    if DEGREE is None:
        h = dot(a, g.to(DTYPE), None, PRECISION)
    else:
        h = rows_times_q(a.to(tl.float32), g.to(DTYPE), C_Q, DEGREE, PRECISION)
    return h


@triton.jit
def _store_da(
    DA,
    U,
    G,
    C_Q,
    scale,
    M: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    DEGREE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store dA = scale (U1 + U2 G): sixteen classes a program, the last programs first, because they have less to do."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    rk = tl.arange(0, BK)
    g = tl.load(G + rk[:, None] * BK + rk[None, :])
    for block in range(programs - 1 - program, BM // 16, programs):
        rm = block * 16 + tl.arange(0, 16)
        at = U + rm[:, None] * BK + rk[None, :]
        if DEGREE is None:
            da = dot(tl.load(at + BM * BK), g, tl.load(at), PRECISION) * scale
        else:
            da = (tl.load(at) + rows_times_q(tl.load(at + BM * BK), g, C_Q, DEGREE, PRECISION)) * scale
        mask = (rm[:, None] < M) & (rk[None, :] < K)
        tl.store(DA + rm[:, None] * K + rk[None, :], da.to(DA.dtype.element_ty), mask=mask)


@triton.jit
def latent_loss_workspace(WORK, splits, d, programs, BK: tl.constexpr, BM: tl.constexpr):
    """Return the arrays in WORK, which follow one another from WORK on, and WORK's end.

    =======  =====================  =================================
    array    shape                  content
    =======  =====================  =================================
    WORK     (splits, d, BK)        parts of Xᵀ D
    U_PARTS  (programs, 2, BM, BK)  parts of U1 and U2
    U        (2, BM, BK)            U1 and U2
    G        (BK, BK)               G
    C_PARTS  (programs, BM)         parts of dc
    LOSSES   (programs,)            parts of the loss
    COUNTS   (programs,)            parts of the number of kept rows
    =======  =====================  =================================
    """
    U_PARTS = WORK + splits * d * BK
    U = U_PARTS + programs * 2 * BM * BK
    G = U + 2 * BM * BK
    C_PARTS = G + BK * BK
    LOSSES = C_PARTS + programs * BM
    COUNTS = LOSSES + programs
    return U_PARTS, U, G, C_PARTS, LOSSES, COUNTS, COUNTS + programs


@triton.jit(do_not_specialize=["n", "splits", "ignore_index"])
def latent_loss(
    X,
    B,
    A,
    C,
    TARGET,
    UPSTREAM,
    VALUE,
    DX,
    DB,
    DA,
    DC,
    C_Q,
    SCALE,
    DQ,
    D,
    P_SCRATCH,
    E_SCRATCH,
    WORK,
    COUNTER,
    n,
    d,
    splits,
    ignore_index,
    w1,
    w2,
    w3,
    K: tl.constexpr,
    M: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASES: tl.constexpr,
    REDUCTION: tl.constexpr,
    DEGREE: tl.constexpr,
    WIDTH: tl.constexpr,
    RELOAD_OPERANDS: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN_A: tl.constexpr,
    BD_A: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    STAGES_A: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Store the loss in its latent form, and the gradients whose pointers are not None.

    Phases: 1 D, parts of U, of dc and of the loss; 2 dX, parts of Xᵀ D, U, dc, and the loss; 4 db and dA.
    Workspaces D and P_SCRATCH (P): (n, WIDTH); E_SCRATCH (E1 and E2): (n, 2 BM); X's dtype. With the last two, U is summed in a
    second pass over them.
    RELOAD_OPERANDS: lay A and H out as operands for each row tile instead of once, where shared memory cannot keep them.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    rk, rm = tl.arange(0, BK), tl.arange(0, BM)
    U_PARTS, U, G, C_PARTS, LOSSES, COUNTS, _ = latent_loss_workspace(WORK, splits, d, programs, BK, BM)
    if PHASES & 1:
        rn = tl.arange(0, BN_A)
        g = scaled(scaled(gram(B, d, K, BK, BD_A, B_T, EVEN_D, PRECISION), SCALE), SCALE)
        if (DA is not None) or (DEGREE is not None):
            if program == 0:
                tl.store(G + rk[:, None] * BK + rk[None, :], g)
        a = load_a(A, rm, rk, M, K)
        h = _form_h(a, g, C_Q, a.dtype, DEGREE, PRECISION).to(a.dtype)
        c = _load_c(C, rm, M, BM)
        u1, u2 = tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BK), tl.float32)
        dc = tl.zeros((BM,), tl.float32)
        total, count = 0.0, 0.0
        for tile in range(program, tl.cdiv(n, BN_A), programs):
            row = tl.cast(tile, tl.int64) * BN_A
            target, kept = load_targets(TARGET, row, rn, n, ignore_index, M)
            p = scaled(project(X, B, row, n, d, K, BK, BN_A, BD_A, B_T, EVEN_D, PRECISION, STAGES_A), SCALE).to(a.dtype)
            if RELOAD_OPERANDS:  # the compiler keeps in shared memory only what it sees to be the same for every tile
                a, h = tl.where(tile >= 0, a, 0.0), tl.where(tile >= 0, h, 0.0)
            o1 = dot(p, tl.trans(a), None, PRECISION) + c[None, :]
            o2 = dot(p, tl.trans(h), None, PRECISION) + c[None, :]
            loss, e1, e2 = loss_terms(o1, o2, target, kept, UPSTREAM, row, rn, w1, w2, w3, M, BM, REDUCTION)
            total += tl.sum(loss, axis=0)
            count += tl.sum(tl.where(kept, 1.0, 0.0), axis=0)
            if REDUCTION == "none":
                tl.store(VALUE + row + rn, loss, mask=inside(row, rn, n))
            if DC is not None:
                dc += tl.sum(e1 + e2, axis=0)
            e1, e2 = e1.to(a.dtype), e2.to(a.dtype)
            if D is not None:
                projected = dot(e2, h, dot(e1, a, None, PRECISION), PRECISION)
                store_rows(D, projected, row, rn, rk, n, WIDTH)
            if (DB is not None) or (DA is not None):
                if P_SCRATCH is not None:
                    store_rows(P_SCRATCH, p, row, rn, rk, n, WIDTH)
                    store_rows(E_SCRATCH, e1, row, rn, rm, n, 2 * BM)
                    store_rows(E_SCRATCH, e2, row, rn, BM + rm, n, 2 * BM)
                else:
                    u1 = dot(tl.trans(e1), p, u1, PRECISION)
                    u2 = dot(tl.trans(e2), p, u2, PRECISION)
        if (DB is not None) or (DA is not None):
            if P_SCRATCH is not None:
                tl.debug_barrier()
                for tile in range(program, tl.cdiv(n, BN_A), programs):
                    row = tl.cast(tile, tl.int64) * BN_A
                    p = load_rows(P_SCRATCH, row, rn, rk, n, WIDTH)
                    e1 = load_rows(E_SCRATCH, row, rn, rm, n, 2 * BM)
                    e2 = load_rows(E_SCRATCH, row, rn, BM + rm, n, 2 * BM)
                    u1 = dot(tl.trans(e1), p, u1, PRECISION)
                    u2 = dot(tl.trans(e2), p, u2, PRECISION)
            at = U_PARTS + program * 2 * BM * BK + rm[:, None] * BK + rk[None, :]
            tl.store(at, u1)
            tl.store(at + BM * BK, u2)
        if DC is not None:
            tl.store(C_PARTS + program * BM + rm, dc)
        tl.store(LOSSES + program, total)
        tl.store(COUNTS + program, count)
    if (PHASES & 3) == 3:
        barrier(COUNTER)
    if PHASES & 2:
        scale = gradient_scale(COUNTS, UPSTREAM, programs, REDUCTION, BATCH)
        if D is not None:
            backprop_projection(
                X,
                B,
                D,
                DX,
                WORK,
                n,
                d,
                splits,
                scaled(scale, SCALE),
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
        if (DB is not None) or (DA is not None):
            add_parts(U_PARTS, U, programs, 2 * BM * BK, 2 * BM * BK)
        store_value_and_dc(VALUE, LOSSES, COUNTS, DC, C_PARTS, scale, programs, REDUCTION, M, BM, BATCH)
    if (PHASES & 6) == 6:
        barrier(COUNTER)
    if PHASES & 4:
        scale = gradient_scale(COUNTS, UPSTREAM, programs, REDUCTION, BATCH)
        if DB is not None:
            t = None
            if DEGREE is None:
                t = _symmetrized(U, load_a(A, rm, rk, M, K).to(tl.float32), BK, BM, PRECISION)
            store_db(
                DB, B, WORK, t, scaled(scale, SCALE), d, splits, K, BK, BC, B_T, EVEN_D, PRECISION, 8,
                None, U + BM * BK, A, G, C_Q, SCALE, M, BM, BK, DEGREE,
            )  # fmt: skip
        if DQ is not None:
            store_dq(DQ, U + BM * BK, A, G, scale, M, K, BM, BK, BK, DEGREE, PRECISION)
        if DA is not None:
            _store_da(DA, U, G, C_Q, scale, M, K, BM, BK, DEGREE, PRECISION)


@triton.jit
def _backprop_flat(
    X,
    B,
    W,
    E,
    DX,
    PARTS,
    U_PARTS,
    SCALE,
    n,
    d,
    splits,
    scale,
    K: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    NEED_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store dX = scale (E1 W1ᵀ + E2 W2ᵀ), and with NEED_V the parts of V and U."""
    program = tl.program_id(0)
    rn, rk, rm = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BM)
    feature_tiles, tiles = tl.cdiv(d, BD), tl.cdiv(n, BN)
    share = tl.cdiv(tiles, splits)
    for job in range(program, feature_tiles * splits, tl.num_programs(0)):
        split = job // feature_tiles
        rd = (job % feature_tiles) * BD + tl.arange(0, BD)
        v1, v2 = tl.zeros((BD, BM), tl.float32), tl.zeros((BD, BM), tl.float32)
        if DX is not None:
            at = W + rd[None, :] * BM + rm[:, None]
            w1 = tl.load(at, mask=rd[None, :] < d, other=0.0)
            w2 = tl.load(at + d * BM, mask=rd[None, :] < d, other=0.0)
        for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
            row = tl.cast(tile, tl.int64) * BN
            e1 = load_rows(E, row, rn, rm, n, 2 * BM)
            e2 = load_rows(E, row, rn, BM + rm, n, 2 * BM)
            if NEED_V:
                x = tl.trans(load_x(X, row, rn, rd, n, d, EVEN_D))
                v1 = dot(x, e1, v1, PRECISION)
                v2 = dot(x, e2, v2, PRECISION)
            if DX is not None:
                dx = dot(e2, w2, dot(e1, w1, None, PRECISION), PRECISION)
                store_x(DX, dx * scale, row, rn, rd, n, d, EVEN_D)
        if NEED_V:
            at = PARTS + (split * d + rd[:, None]) * BM + rm[None, :]
            tl.store(at, v1, mask=rd[:, None] < d)
            tl.store(at + splits * d * BM, v2, mask=rd[:, None] < d)
            b = load_b(B, rd, rk, d, K, B_T, EVEN_D).to(tl.float32)
            first = job == program
            u = U_PARTS + program * 2 * BM * BK
            add_to_part(u, scaled(dot(tl.trans(v1), b, None, PRECISION), SCALE), first, BM, BK)
            add_to_part(u + BM * BK, scaled(dot(tl.trans(v2), b, None, PRECISION), SCALE), first, BM, BK)


@triton.jit
def flat_loss_workspace(WORK, splits, d, parts, programs, BK: tl.constexpr, BM: tl.constexpr):
    """Return the arrays in WORK, which follow one another from WORK on, and WORK's end.

    =======  ==================  ====================================================================
    array    shape               content
    =======  ==================  ====================================================================
    WORK     (2, splits, d, BM)  parts of V1 and V2
    U_PARTS  (parts, 2, BM, BK)  parts of U; `parts` is min(programs, feature tiles of BD * splits)
    U        (2, BM, BK)         U1 and U2
    G        (BK, BK)            G
    C_PARTS  (programs, BM)      parts of dc
    LOSSES   (programs,)         parts of the loss
    COUNTS   (programs,)         parts of the number of kept rows
    =======  ==================  ====================================================================
    """
    U_PARTS = WORK + 2 * splits * d * BM
    U = U_PARTS + parts * 2 * BM * BK
    G = U + 2 * BM * BK
    C_PARTS = G + BK * BK
    LOSSES = C_PARTS + programs * BM
    COUNTS = LOSSES + programs
    return U_PARTS, U, G, C_PARTS, LOSSES, COUNTS, COUNTS + programs


@triton.jit(do_not_specialize=["n", "splits", "ignore_index"])
def flat_loss(
    X,
    B,
    A,
    C,
    TARGET,
    UPSTREAM,
    VALUE,
    DX,
    DB,
    DA,
    DC,
    C_Q,
    SCALE,
    DQ,
    W,
    E,
    WORK,
    COUNTER,
    n,
    d,
    splits,
    ignore_index,
    w1,
    w2,
    w3,
    K: tl.constexpr,
    M: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASES: tl.constexpr,
    REDUCTION: tl.constexpr,
    DEGREE: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN_A: tl.constexpr,
    BD_A: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    STAGES_A: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Store the loss in its flat form, and the gradients whose pointers are not None.

    Phases: 1 G and W; 2 E, parts of dc and of the loss; 4 dX, parts of V and U, dc, and the loss; 8 U; 16 db and dA.
    Workspaces W (W1 and W2): (2, d, BM); E (E1 and E2): (n, 2 BM); X's dtype.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    rk, rm = tl.arange(0, BK), tl.arange(0, BM)
    parts = tl.minimum(programs, tl.cdiv(d, BD) * splits)
    U_PARTS, U, G, C_PARTS, LOSSES, COUNTS, _ = flat_loss_workspace(WORK, splits, d, parts, programs, BK, BM)
    if PHASES & 1:
        g = scaled(scaled(gram(B, d, K, BK, BD_A, B_T, EVEN_D, PRECISION), SCALE), SCALE)
        if program == 0:
            tl.store(G + rk[:, None] * BK + rk[None, :], g)
        a = load_a(A, rm, rk, M, K)
        h = _form_h(a, g, C_Q, a.dtype, DEGREE, PRECISION).to(a.dtype)
        for tile in range(program, tl.cdiv(d, BC), programs):
            rd = tile * BC + tl.arange(0, BC)
            b = load_b(B, rd, rk, d, K, B_T, EVEN_D)
            at = W + rd[:, None] * BM + rm[None, :]
            mask = rd[:, None] < d
            tl.store(at, scaled(dot(b, tl.trans(a), None, PRECISION), SCALE).to(a.dtype), mask=mask)
            tl.store(at + d * BM, scaled(dot(b, tl.trans(h), None, PRECISION), SCALE).to(a.dtype), mask=mask)
    if (PHASES & 3) == 3:
        barrier(COUNTER)
    if PHASES & 2:
        rn = tl.arange(0, BN_A)
        c = _load_c(C, rm, M, BM)
        dc = tl.zeros((BM,), tl.float32)
        total, count = 0.0, 0.0
        for tile in range(program, tl.cdiv(n, BN_A), programs):
            row = tl.cast(tile, tl.int64) * BN_A
            target, kept = load_targets(TARGET, row, rn, n, ignore_index, M)
            o1, o2 = tl.zeros((BN_A, BM), tl.float32), tl.zeros((BN_A, BM), tl.float32)
            for j in tl.range(0, d, BD_A, num_stages=STAGES_A):
                rd = j + tl.arange(0, BD_A)
                x = load_x(X, row, rn, rd, n, d, EVEN_D)
                at = W + rd[:, None] * BM + rm[None, :]
                o1 = dot(x, tl.load(at, mask=rd[:, None] < d, other=0.0), o1, PRECISION)
                o2 = dot(x, tl.load(at + d * BM, mask=rd[:, None] < d, other=0.0), o2, PRECISION)
            o1, o2 = o1 + c[None, :], o2 + c[None, :]
            loss, e1, e2 = loss_terms(o1, o2, target, kept, UPSTREAM, row, rn, w1, w2, w3, M, BM, REDUCTION)
            total += tl.sum(loss, axis=0)
            count += tl.sum(tl.where(kept, 1.0, 0.0), axis=0)
            if REDUCTION == "none":
                tl.store(VALUE + row + rn, loss, mask=inside(row, rn, n))
            if DC is not None:
                dc += tl.sum(e1 + e2, axis=0)
            if E is not None:
                store_rows(E, e1, row, rn, rm, n, 2 * BM)
                store_rows(E, e2, row, rn, BM + rm, n, 2 * BM)
        if DC is not None:
            tl.store(C_PARTS + program * BM + rm, dc)
        tl.store(LOSSES + program, total)
        tl.store(COUNTS + program, count)
    if (PHASES & 6) == 6:
        barrier(COUNTER)
    if PHASES & 4:
        scale = gradient_scale(COUNTS, UPSTREAM, programs, REDUCTION, BATCH)
        if E is not None:
            need_v: tl.constexpr = (DB is not None) or (DA is not None)
            _backprop_flat(
                X,
                B,
                W,
                E,
                DX,
                WORK,
                U_PARTS,
                SCALE,
                n,
                d,
                splits,
                scale,
                K,
                BK,
                BM,
                BN,
                BD,
                B_T,
                EVEN_D,
                need_v,
                PRECISION,
            )
        store_value_and_dc(VALUE, LOSSES, COUNTS, DC, C_PARTS, scale, programs, REDUCTION, M, BM, BATCH)
    if (PHASES & 12) == 12:
        barrier(COUNTER)
    if PHASES & 8:
        add_parts(U_PARTS, U, parts, 2 * BM * BK, 2 * BM * BK)
    if (PHASES & 24) == 24:
        barrier(COUNTER)
    if PHASES & 16:
        scale = gradient_scale(COUNTS, UPSTREAM, programs, REDUCTION, BATCH)
        if DB is not None:
            a = load_a(A, rm, rk, M, K)
            g = tl.load(G + rk[:, None] * BK + rk[None, :])
            h = _form_h(a.to(tl.float32), g, C_Q, tl.float32, DEGREE, PRECISION)
            a = a.to(tl.float32)
            t = None
            if DEGREE is None:
                t = _symmetrized(U, a, BK, BM, PRECISION)
            for tile in range(program, tl.cdiv(d, BC), programs):
                rd = tile * BC + tl.arange(0, BC)
                v1 = add_splits(WORK, rd, d, splits, BM, BC, 8)
                v2 = add_splits(WORK + splits * d * BM, rd, d, splits, BM, BC, 8)
                db = dot(v2, h, dot(v1, a, None, PRECISION), PRECISION)
                if DEGREE is not None:
                    db = add_derivative(
                        db, B, rd, d, None, U + BM * BK, A, G, C_Q, SCALE, K, M, BK, BM, BK, B_T, EVEN_D, DEGREE,
                        PRECISION,
                    )  # fmt: skip
                store_db_tile(DB, B, db, t, scaled(scale, SCALE), rd, d, K, BK, B_T, EVEN_D, PRECISION)
        if DQ is not None:
            store_dq(DQ, U + BM * BK, A, G, scale, M, K, BM, BK, BK, DEGREE, PRECISION)
        if DA is not None:
            _store_da(DA, U, G, C_Q, scale, M, K, BM, BK, DEGREE, PRECISION)
