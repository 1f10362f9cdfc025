"""The three-term loss of the pair with its gradients: w1 CE(P, t) + w2 CE(Y, t) + w3 MSE(P, Y).

======  ======  ========================================================
symbol  shape   meaning
======  ======  ========================================================
E1, E2  (n, K)  gradients of the logits, P and Y
D       (n, K)  E1 + E2 G
T       (K, K)  Pᵀ E2
VALUE           the loss: a scalar, or (n,) for reduction "none"
======  ======  ========================================================

A polynomial has Q = q(G) in the place of G, P = a X b, and the derivative of q at G for that of T + Tᵀ (see `backward`).

Gradients are kept without the factor upstream / kept rows, which would make 16-bit ones underflow. They are multiplied with it
in fp32 when they are stored. Reduction "none" has one upstream a row, which is applied at once.
"""

import triton
import triton.language as tl

from interp_nn.engines.triton.backward import backprop_projection, store_db, store_dq, symmetrized
from interp_nn.engines.triton.grid import add_parts, add_scalars, barrier, blocks, store_column_sums
from interp_nn.engines.triton.tiles import (
    dot,
    evaluate,
    gram,
    inside,
    load_rows,
    project,
    scaled,
    store_rows,
    store_square,
)


@triton.jit
def _log_softmax_terms(o, onehot, M: tl.constexpr, BM: tl.constexpr):
    """Return each row's maximum, 1 / sum of exponentials, and cross entropy."""
    o_max = tl.max(tl.where(tl.arange(0, BM)[None, :] < M, o, float("-inf")), axis=1)
    total = tl.sum(tl.where(tl.arange(0, BM)[None, :] < M, tl.exp(o - o_max[:, None]), 0.0), axis=1)
    return o_max, 1.0 / total, tl.log(total) + o_max - tl.sum(tl.where(onehot, o, 0.0), axis=1)


@triton.jit
def load_targets(TARGET, row, rn, n, ignore_index, M: tl.constexpr):
    """Load the targets of the rows row + rn, and which rows count. A class out of range stops the kernel, as in PyTorch."""
    exists = inside(row, rn, n)
    target = tl.load(TARGET + row + rn, mask=exists, other=0)
    kept = exists & (target != ignore_index)
    tl.device_assert((~kept) | ((target >= 0) & (target < M)), "target: class index out of range")
    return target, kept


@triton.jit
def loss_terms(
    o1, o2, target, kept, UPSTREAM, row, rn, w1, w2, w3, M: tl.constexpr, BM: tl.constexpr, REDUCTION: tl.constexpr
):
    """Return each row's loss, E1 and E2, all zero where a row does not count.

    The row statistics come first, so that few wide intermediates are live at once.
    """
    rm = tl.arange(0, BM)
    onehot = rm[None, :] == target[:, None]
    max1, inverse1, ce1 = _log_softmax_terms(o1, onehot, M, BM)
    max2, inverse2, ce2 = _log_softmax_terms(o2, onehot, M, BM)
    difference = o1 - o2
    loss = w1 * ce1 + w2 * ce2 + w3 * (tl.sum(difference * difference, axis=1) / M)
    loss = tl.where(kept, loss, 0.0)
    weight = tl.where(kept, 1.0, 0.0)
    if REDUCTION == "none":
        if UPSTREAM is not None:
            weight = tl.load(UPSTREAM + row + rn, mask=kept, other=0.0).to(tl.float32)
    use = kept[:, None] & (rm[None, :] < M)
    mse_grad = difference * (2.0 * w3 / M)
    one = tl.where(onehot, 1.0, 0.0)
    e1 = tl.where(use, ((tl.exp(o1 - max1[:, None]) * inverse1[:, None] - one) * w1 + mse_grad) * weight[:, None], 0.0)
    e2 = tl.where(use, ((tl.exp(o2 - max2[:, None]) * inverse2[:, None] - one) * w2 - mse_grad) * weight[:, None], 0.0)
    return loss, e1, e2


@triton.jit
def gradient_scale(COUNTS, UPSTREAM, parts, REDUCTION: tl.constexpr, BATCH: tl.constexpr):
    """Return the factor that the gradients lack: upstream / kept rows for "mean", upstream for "sum", 1 for "none"."""
    scale = 1.0
    if REDUCTION != "none":
        if UPSTREAM is not None:
            scale = tl.load(UPSTREAM).to(tl.float32)
    if REDUCTION == "mean":
        scale = scale / tl.maximum(add_scalars(COUNTS, parts, BATCH), 1.0)
    return scale


@triton.jit
def store_value_and_dc(
    VALUE,
    LOSSES,
    COUNTS,
    DC,
    C_PARTS,
    scale,
    parts,
    REDUCTION: tl.constexpr,
    M: tl.constexpr,
    BM: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Store, by the last program, the reduced loss (NaN for the mean of no kept row, as in PyTorch) and a head's dc."""
    if tl.program_id(0) == tl.num_programs(0) - 1:
        if DC is not None:
            store_column_sums(DC, C_PARTS, parts, scale, M, BM)
        if REDUCTION != "none":
            value = add_scalars(LOSSES, parts, BATCH)
            if REDUCTION == "mean":
                value = value / add_scalars(COUNTS, parts, BATCH)
            tl.store(VALUE, value)


@triton.jit
def pair_loss_workspace(WORK, splits, d, programs, BK: tl.constexpr):
    """Return the arrays in WORK, which follow one another from WORK on, and WORK's end.

    =======  ==================  =========================================
    array    shape               content
    =======  ==================  =========================================
    WORK     (splits, d, BK)     parts of Xᵀ D
    T_PARTS  (programs, BK, BK)  parts of T
    T        (BK, BK)            T
    LOSSES   (programs,)         parts of the loss
    COUNTS   (programs,)         parts of the number of kept rows
    G        (BK, BK)            G of a polynomial
    =======  ==================  =========================================
    """
    T_PARTS = WORK + splits * d * BK
    T = T_PARTS + programs * BK * BK
    LOSSES = T + BK * BK
    COUNTS = LOSSES + programs
    G = COUNTS + programs
    return T_PARTS, T, LOSSES, COUNTS, G, G + BK * BK


@triton.jit(do_not_specialize=["n", "splits", "ignore_index"])
def pair_loss(
    X,
    B,
    TARGET,
    UPSTREAM,
    VALUE,
    DX,
    DB,
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
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASES: tl.constexpr,
    REDUCTION: tl.constexpr,
    DEGREE: tl.constexpr,
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    BN_A: tl.constexpr,
    BD_A: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    STAGES_A: tl.constexpr,
    BATCH: tl.constexpr,
):
    """Store the loss, dX = D bᵀ and db = Xᵀ D + b (T + Tᵀ), and DQ of a polynomial. The logits stay in registers.

    Phases: 1 D, parts of T and of the loss; 2 dX, parts of Xᵀ D, T, and the loss; 4 db.
    Workspaces D, P_SCRATCH (P) and E_SCRATCH (E2): (n, WIDTH), X's dtype. With the last two, T is summed in a second pass over
    them, which needs fewer registers.
    UPSTREAM: None for 1, a scalar, or (n,) for reduction "none".
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    rk = tl.arange(0, BK)
    T_PARTS, T, LOSSES, COUNTS, G, _ = pair_loss_workspace(WORK, splits, d, programs, BK)
    if PHASES & 1:
        rn = tl.arange(0, BN_A)
        g = gram(B, d, K, BK, BD_A, B_T, EVEN_D, PRECISION)
        if DEGREE is not None:
            g = scaled(scaled(g, SCALE), SCALE)
            if program == 0:
                store_square(G, g, rk, BK)
            g = evaluate(g, C_Q, X.dtype.element_ty, BK, DEGREE, PRECISION)
        g = g.to(X.dtype.element_ty)
        t = tl.zeros((BK, BK), tl.float32)
        total, count = 0.0, 0.0
        for tile in range(program, tl.cdiv(n, BN_A), programs):
            row = tl.cast(tile, tl.int64) * BN_A
            target, kept = load_targets(TARGET, row, rn, n, ignore_index, K)
            p = scaled(project(X, B, row, n, d, K, BK, BN_A, BD_A, B_T, EVEN_D, PRECISION, STAGES_A), SCALE)
            p16 = p.to(X.dtype.element_ty)
            y = dot(p16, g, None, PRECISION)
            loss, e1, e2 = loss_terms(p, y, target, kept, UPSTREAM, row, rn, w1, w2, w3, K, BK, REDUCTION)
            total += tl.sum(loss, axis=0)
            count += tl.sum(tl.where(kept, 1.0, 0.0), axis=0)
            if REDUCTION == "none":
                tl.store(VALUE + row + rn, loss, mask=inside(row, rn, n))
            if D is not None:
                e2 = e2.to(X.dtype.element_ty)
                store_rows(D, dot(e2, g, e1, PRECISION), row, rn, rk, n, WIDTH)
                if DB is not None:
                    if P_SCRATCH is not None:
                        store_rows(P_SCRATCH, p16, row, rn, rk, n, WIDTH)
                        store_rows(E_SCRATCH, e2, row, rn, rk, n, WIDTH)
                    else:
                        t = dot(tl.trans(p16), e2, t, PRECISION)
        if DB is not None:
            if P_SCRATCH is not None:
                tl.debug_barrier()
                for tile in range(program, tl.cdiv(n, BN_A), programs):
                    row = tl.cast(tile, tl.int64) * BN_A
                    p16 = load_rows(P_SCRATCH, row, rn, rk, n, WIDTH)
                    e2 = load_rows(E_SCRATCH, row, rn, rk, n, WIDTH)
                    t = dot(tl.trans(p16), e2, t, PRECISION)
            tl.store(T_PARTS + program * BK * BK + rk[:, None] * BK + rk[None, :], t)
        tl.store(LOSSES + program, total)
        tl.store(COUNTS + program, count)
    if (PHASES & 3) == 3:
        barrier(COUNTER)
    if PHASES & 2:
        if D is not None:
            scale = gradient_scale(COUNTS, UPSTREAM, programs, REDUCTION, BATCH)
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
            if DB is not None:
                add_parts(T_PARTS, T, programs, BK * BK, BK * BK)
        store_value_and_dc(VALUE, LOSSES, COUNTS, None, None, 1.0, programs, REDUCTION, K, BK, BATCH)
    if (PHASES & 6) == 6:
        barrier(COUNTER)
    if PHASES & 4:
        scale = gradient_scale(COUNTS, UPSTREAM, programs, REDUCTION, BATCH)
        t = None
        if DEGREE is None:
            t = symmetrized(T, BK)
        store_db(
            DB, B, WORK, t, scaled(scale, SCALE), d, splits, K, BK, BC, B_T, EVEN_D, PRECISION, 8,
            T, None, None, G, C_Q, SCALE, 1, 16, BK, DEGREE,
        )  # fmt: skip
        if DQ is not None:
            store_dq(DQ, T, None, G, scale, 1, K, BK, BK, BK, DEGREE, PRECISION)


@triton.jit
def _scale_one(G, size, scale, BLOCK: tl.constexpr):
    """Multiply `size` elements of memory by `scale` in place."""
    if G is not None:
        for block in range(tl.program_id(0), blocks(size, BLOCK), tl.num_programs(0)):
            i = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            g = tl.load(G + i, mask=i < size, other=0.0).to(tl.float32) * scale
            tl.store(G + i, g.to(G.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["size0", "size1", "size2", "size3", "size4"])
def scale_gradients(UPSTREAM, G0, G1, G2, G3, G4, size0, size1, size2, size3, size4, BLOCK: tl.constexpr):
    """Multiply up to five gradients by UPSTREAM in place; an UPSTREAM of 1, the usual case, leaves memory untouched."""
    scale = tl.load(UPSTREAM).to(tl.float32)
    if scale != 1.0:
        _scale_one(G0, size0, scale, BLOCK)
        _scale_one(G1, size1, scale, BLOCK)
        _scale_one(G2, size2, scale, BLOCK)
        _scale_one(G3, size3, scale, BLOCK)
        _scale_one(G4, size4, scale, BLOCK)
