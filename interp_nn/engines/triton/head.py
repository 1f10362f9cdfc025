"""The three-term loss of a head with its gradients: O1 = P Aᵀ + c, O2 = Y Aᵀ + c, w1 CE(O1) + w2 CE(O2) + w3 MSE(O1, O2).

The head is linear, so Y, dY and Pᵀ dY are never formed. With H = A G, logit gradients E1, E2 and U_i = E_iᵀ P (M, K):

    O2 = P Hᵀ + c,   D = E1 A + E2 H,   T = U2ᵀ A,   dA = U1 + U2 G.

That is the latent form. The flat form goes further for few classes: with W1 = b Aᵀ, W2 = b Hᵀ (d, M) and V_i = Xᵀ E_i

    O_i = X W_i + c,   dX = E1 W1ᵀ + E2 W2ᵀ,   U_i = V_iᵀ b,   Xᵀ D = V1 A + V2 H

no n x K matrix exists at all. M is the number of classes, BM the power of two that holds it.
"""

import triton
import triton.language as tl

from interp_nn.engines.triton.backward import add_splits, add_to_part, projection_strips
from interp_nn.engines.triton.cross_entropy import gradient_scale, load_targets, loss_terms, store_value
from interp_nn.engines.triton.grid import add_parts, barrier
from interp_nn.engines.triton.tiles import (
    gram,
    inside,
    load_b,
    load_rows,
    load_x,
    project,
    store_b,
    store_rows,
    store_x,
)


@triton.jit
def _load_a(A, rm, rk, M: tl.constexpr, K: tl.constexpr):
    """The output layer's weight A (M, K), zeros outside."""
    mask = (rm[:, None] < M) & (rk[None, :] < K)
    return tl.load(A + rm[:, None] * K + rk[None, :], mask=mask, other=0.0)


@triton.jit
def _load_c(C, rm, M: tl.constexpr, BM: tl.constexpr):
    """The output layer's bias in fp32, zeros without one."""
    c = tl.zeros((BM,), tl.float32)
    if C is not None:
        c += tl.load(C + rm, mask=rm < M, other=0.0).to(tl.float32)
    return c


@triton.jit
def _twice_symmetric(U, a, BK: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr):
    """T + Tᵀ with T = U2ᵀ A, from the workspace U (2, BM, BK) and A in fp32."""
    u2 = tl.load(U + BM * BK + tl.arange(0, BM)[:, None] * BK + tl.arange(0, BK)[None, :])
    t = tl.dot(tl.trans(u2), a, input_precision=PRECISION)
    return tl.dot(tl.trans(a), u2, t, input_precision=PRECISION)


@triton.jit
def _store_da(
    DA, U, G, scale, M: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """dA = scale (U1 + U2 G), sixteen classes a program, from the programs that have the least else to do."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    rk = tl.arange(0, BK)
    g = tl.load(G + rk[:, None] * BK + rk[None, :])
    for block in range(programs - 1 - program, BM // 16, programs):
        rm = block * 16 + tl.arange(0, 16)
        at = U + rm[:, None] * BK + rk[None, :]
        da = tl.dot(tl.load(at + BM * BK), g, tl.load(at), input_precision=PRECISION) * scale
        mask = (rm[:, None] < M) & (rk[None, :] < K)
        tl.store(DA + rm[:, None] * K + rk[None, :], da.to(DA.dtype.element_ty), mask=mask)


@triton.jit
def _store_dc(DC, PARTS, parts, scale, M: tl.constexpr, BM: tl.constexpr):
    """dc = scale times the sum of PARTS (parts, BM), by one program."""
    rm = tl.arange(0, BM)
    total = tl.zeros((BM,), tl.float32)
    for q in range(0, parts):
        total += tl.load(PARTS + q * BM + rm)
    tl.store(DC + rm, (total * scale).to(DC.dtype.element_ty), mask=rm < M)


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
    D,
    PARKED_P,
    PARKED_E,
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
    WIDTH: tl.constexpr,
    ANEW: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN_A: tl.constexpr,
    BD_A: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    BATCH: tl.constexpr,
):
    """The loss in its latent form, with the gradients whose pointers are not None.

    Phases: 1 rows, D, parts of U, dc and the loss; 2 strips, U, dc, the loss; 4 db, dA. D, PARKED_P (n, WIDTH) and PARKED_E
    (n, 2 BM) are workspaces in X's dtype; where parked rows are given, U is summed in a second walk over them. WORK, in fp32:
    (splits, d, BK) parts of Xᵀ D, (programs, 2, BM, BK) parts of U, U, G, (programs, BM) parts of dc, parts of loss and count.
    ANEW: A and H are laid out as operands for each tile of rows, not once for all, for want of shared memory.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    rk, rm = tl.arange(0, BK), tl.arange(0, BM)
    U_PARTS = WORK + splits * d * BK
    U = U_PARTS + programs * 2 * BM * BK
    G = U + 2 * BM * BK
    C_PARTS = G + BK * BK
    LOSSES = C_PARTS + programs * BM
    COUNTS = LOSSES + programs
    if PHASES & 1:
        rn = tl.arange(0, BN_A)
        g = gram(B, d, K, BK, BD_A, B_T, EVEN_D, PRECISION)
        if DA is not None:
            if program == 0:
                tl.store(G + rk[:, None] * BK + rk[None, :], g)
        a = _load_a(A, rm, rk, M, K)
        h = tl.dot(a, g.to(a.dtype), input_precision=PRECISION).to(a.dtype)
        c = _load_c(C, rm, M, BM)
        u1, u2 = tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BK), tl.float32)
        dc = tl.zeros((BM,), tl.float32)
        total, count = 0.0, 0.0
        for tile in range(program, tl.cdiv(n, BN_A), programs):
            row = tl.cast(tile, tl.int64) * BN_A
            target, kept = load_targets(TARGET, row, rn, n, ignore_index, M)
            p = project(X, B, row, n, d, K, BK, BN_A, BD_A, B_T, EVEN_D, PRECISION).to(a.dtype)
            if ANEW:  # what seems to change from tile to tile the compiler does not keep in shared memory
                a, h = tl.where(tile >= 0, a, 0.0), tl.where(tile >= 0, h, 0.0)
            o1 = tl.dot(p, tl.trans(a), input_precision=PRECISION) + c[None, :]
            o2 = tl.dot(p, tl.trans(h), input_precision=PRECISION) + c[None, :]
            loss, e1, e2 = loss_terms(o1, o2, target, kept, UPSTREAM, row, rn, w1, w2, w3, M, BM, REDUCTION)
            total += tl.sum(loss, axis=0)
            count += tl.sum(tl.where(kept, 1.0, 0.0), axis=0)
            if REDUCTION == "none":
                tl.store(VALUE + row + rn, loss, mask=inside(row, rn, n))
            if DC is not None:
                dc += tl.sum(e1 + e2, axis=0)
            e1, e2 = e1.to(a.dtype), e2.to(a.dtype)
            if D is not None:
                projected = tl.dot(e2, h, tl.dot(e1, a, input_precision=PRECISION), input_precision=PRECISION)
                store_rows(D, projected, row, rn, rk, n, WIDTH)
            if (DB is not None) or (DA is not None):
                if PARKED_P is not None:
                    store_rows(PARKED_P, p, row, rn, rk, n, WIDTH)
                    store_rows(PARKED_E, e1, row, rn, rm, n, 2 * BM)
                    store_rows(PARKED_E, e2, row, rn, BM + rm, n, 2 * BM)
                else:
                    u1 = tl.dot(tl.trans(e1), p, u1, input_precision=PRECISION)
                    u2 = tl.dot(tl.trans(e2), p, u2, input_precision=PRECISION)
        if (DB is not None) or (DA is not None):
            if PARKED_P is not None:
                tl.debug_barrier()
                for tile in range(program, tl.cdiv(n, BN_A), programs):
                    row = tl.cast(tile, tl.int64) * BN_A
                    p = load_rows(PARKED_P, row, rn, rk, n, WIDTH)
                    e1 = load_rows(PARKED_E, row, rn, rm, n, 2 * BM)
                    e2 = load_rows(PARKED_E, row, rn, BM + rm, n, 2 * BM)
                    u1 = tl.dot(tl.trans(e1), p, u1, input_precision=PRECISION)
                    u2 = tl.dot(tl.trans(e2), p, u2, input_precision=PRECISION)
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
            projection_strips(
                X, B, D, DX, WORK, n, d, splits, scale, K, WIDTH, BK, BN, BD, B_T, EVEN_D, DB is not None, PRECISION
            )
        if (DB is not None) or (DA is not None):
            add_parts(U_PARTS, U, programs, 2 * BM * BK, 2 * BM * BK, 256, BATCH)
        if program == programs - 1:
            if DC is not None:
                _store_dc(DC, C_PARTS, programs, scale, M, BM)
            store_value(VALUE, LOSSES, COUNTS, programs, REDUCTION, BATCH)
    if (PHASES & 6) == 6:
        barrier(COUNTER)
    if PHASES & 4:
        scale = gradient_scale(COUNTS, UPSTREAM, programs, REDUCTION, BATCH)
        if DB is not None:
            t = _twice_symmetric(U, _load_a(A, rm, rk, M, K).to(tl.float32), BK, BM, PRECISION)
            for strip in range(program, tl.cdiv(d, BC), programs):
                rd = strip * BC + tl.arange(0, BC)
                db = add_splits(WORK, rd, d, splits, BK, BC, 4)
                b = load_b(B, rd, rk, d, K, B_T, EVEN_D).to(tl.float32)
                store_b(DB, tl.dot(b, t, db, input_precision=PRECISION) * scale, rd, rk, d, K, B_T)
        if DA is not None:
            _store_da(DA, U, G, scale, M, K, BM, BK, PRECISION)


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
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN_A: tl.constexpr,
    BD_A: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    BATCH: tl.constexpr,
):
    """The loss in its flat form, with the gradients whose pointers are not None.

    Phases: 1 G and W; 2 rows, E, parts of dc and the loss; 4 strips with parts of V and U, dc, the loss; 8 U; 16 db, dA.
    W (2, d, BM) and E (n, 2 BM) are workspaces in X's dtype. WORK, in fp32: (2 splits, d, BM) parts of V, (min(programs,
    strips * splits), 2, BM, BK) parts of U, U, G, (programs, BM) parts of dc, parts of loss and count.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    rk, rm = tl.arange(0, BK), tl.arange(0, BM)
    strips = tl.cdiv(d, BD)
    parts = tl.minimum(programs, strips * splits)
    U_PARTS = WORK + 2 * splits * d * BM
    U = U_PARTS + parts * 2 * BM * BK
    G = U + 2 * BM * BK
    C_PARTS = G + BK * BK
    LOSSES = C_PARTS + programs * BM
    COUNTS = LOSSES + programs
    if PHASES & 1:
        g = gram(B, d, K, BK, BD_A, B_T, EVEN_D, PRECISION)
        if program == 0:
            tl.store(G + rk[:, None] * BK + rk[None, :], g)
        a = _load_a(A, rm, rk, M, K)
        h = tl.dot(a, g.to(a.dtype), input_precision=PRECISION).to(a.dtype)
        for strip in range(program, tl.cdiv(d, BC), programs):
            rd = strip * BC + tl.arange(0, BC)
            b = load_b(B, rd, rk, d, K, B_T, EVEN_D)
            at = W + rd[:, None] * BM + rm[None, :]
            tl.store(at, tl.dot(b, tl.trans(a), input_precision=PRECISION).to(a.dtype), mask=rd[:, None] < d)
            tl.store(at + d * BM, tl.dot(b, tl.trans(h), input_precision=PRECISION).to(a.dtype), mask=rd[:, None] < d)
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
            for j in range(0, d, BD_A):
                rd = j + tl.arange(0, BD_A)
                x = load_x(X, row, rn, rd, n, d, EVEN_D)
                at = W + rd[:, None] * BM + rm[None, :]
                o1 = tl.dot(x, tl.load(at, mask=rd[:, None] < d, other=0.0), o1, input_precision=PRECISION)
                o2 = tl.dot(x, tl.load(at + d * BM, mask=rd[:, None] < d, other=0.0), o2, input_precision=PRECISION)
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
            _flat_strips(
                X, B, W, E, DX, WORK, U_PARTS, n, d, splits, scale, K, BK, BM, BN, BD, B_T, EVEN_D, need_v, PRECISION
            )
        if program == programs - 1:
            if DC is not None:
                _store_dc(DC, C_PARTS, programs, scale, M, BM)
            store_value(VALUE, LOSSES, COUNTS, programs, REDUCTION, BATCH)
    if (PHASES & 12) == 12:
        barrier(COUNTER)
    if PHASES & 8:
        add_parts(U_PARTS, U, parts, 2 * BM * BK, 2 * BM * BK, 256, BATCH)
    if (PHASES & 24) == 24:
        barrier(COUNTER)
    if PHASES & 16:
        scale = gradient_scale(COUNTS, UPSTREAM, programs, REDUCTION, BATCH)
        if DB is not None:
            a = _load_a(A, rm, rk, M, K)
            g = tl.load(G + rk[:, None] * BK + rk[None, :])
            h = tl.dot(a.to(tl.float32), g, input_precision=PRECISION)
            a = a.to(tl.float32)
            t = _twice_symmetric(U, a, BK, BM, PRECISION)
            for strip in range(program, tl.cdiv(d, BC), programs):
                rd = strip * BC + tl.arange(0, BC)
                v1 = add_splits(WORK, rd, d, splits, BM, BC, 4)
                v2 = add_splits(WORK + splits * d * BM, rd, d, splits, BM, BC, 4)
                b = load_b(B, rd, rk, d, K, B_T, EVEN_D).to(tl.float32)
                db = tl.dot(v2, h, tl.dot(v1, a, input_precision=PRECISION), input_precision=PRECISION)
                store_b(DB, tl.dot(b, t, db, input_precision=PRECISION) * scale, rd, rk, d, K, B_T)
        if DA is not None:
            _store_da(DA, U, G, scale, M, K, BM, BK, PRECISION)


@triton.jit
def _flat_strips(
    X,
    B,
    W,
    E,
    DX,
    PARTS,
    U_PARTS,
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
    """Parts of V_i = Xᵀ E_i (2, splits, d, BM) and of U_i = V_iᵀ b; dX = scale (E1 W1ᵀ + E2 W2ᵀ) where DX is not None."""
    program = tl.program_id(0)
    rn, rk, rm = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, BM)
    strips, tiles = tl.cdiv(d, BD), tl.cdiv(n, BN)
    share = tl.cdiv(tiles, splits)
    for job in range(program, strips * splits, tl.num_programs(0)):
        split = job // strips
        rd = (job % strips) * BD + tl.arange(0, BD)
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
                v1 = tl.dot(x, e1, v1, input_precision=PRECISION)
                v2 = tl.dot(x, e2, v2, input_precision=PRECISION)
            if DX is not None:
                dx = tl.dot(e2, w2, tl.dot(e1, w1, input_precision=PRECISION), input_precision=PRECISION)
                store_x(DX, dx * scale, row, rn, rd, n, d, EVEN_D)
        if NEED_V:
            at = PARTS + (split * d + rd[:, None]) * BM + rm[None, :]
            tl.store(at, v1, mask=rd[:, None] < d)
            tl.store(at + splits * d * BM, v2, mask=rd[:, None] < d)
            b = load_b(B, rd, rk, d, K, B_T, EVEN_D).to(tl.float32)
            first = job == program
            u = U_PARTS + program * 2 * BM * BK
            add_to_part(u, tl.dot(tl.trans(v1), b, input_precision=PRECISION), first, BM, BK)
            add_to_part(u + BM * BK, tl.dot(tl.trans(v2), b, input_precision=PRECISION), first, BM, BK)
