"""Cooperation of the programs of one launch: a barrier, and sums of the parts that each of them has stored."""

import triton
import triton.language as tl


@triton.jit
def barrier(COUNTER):
    """Wait until every program of the grid has arrived; all of them must be resident at once.

    The first program adds 2^31 - (programs - 1) and each other program adds 1. The sign bit flips when all have arrived, and the
    counter needs no reset: it is ready for the next barrier, the next launch, or a replayed graph.
    """
    tl.debug_barrier()  # the program's own stores come before its arrival
    first = (1 - tl.num_programs(0)) ^ -2147483648  # a sum would overflow, which TRITON_DEBUG=1 does not allow
    step = tl.where(tl.program_id(0) == 0, first, 1)
    before = tl.atomic_add(COUNTER, step, sem="acq_rel", scope="gpu")
    now = tl.atomic_add(COUNTER, 0, sem="acquire", scope="gpu")
    while (before ^ now) >= 0:
        now = tl.atomic_add(COUNTER, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def blocks(size, BLOCK: tl.constexpr):
    """Return the number of blocks of a size that may be just below 2^31, where `tl.cdiv` overflows."""
    return tl.cdiv(tl.cast(size, tl.int64), BLOCK)


@triton.jit
def add_parts(PARTS, OUT, parts, size, SIZE: tl.constexpr):
    """Store OUT[i] = the sum of PARTS[:parts, i] in a fixed order, for i < size <= SIZE; the grid shares the i.

    PARTS has rows of SIZE. Many rows are loaded together, because one at a time would wait for memory each time, and blocks are
    small, because each program then has about one.
    """
    BLOCK: tl.constexpr = 32 if SIZE <= 4096 else 64
    BATCH: tl.constexpr = 128
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        i = block * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, parts, BATCH):
            q = first + tl.arange(0, BATCH)
            mask = (q[:, None] < parts) & (i[None, :] < size)
            total += tl.sum(tl.load(PARTS + q[:, None] * SIZE + i[None, :], mask=mask, other=0.0), axis=0)
        tl.store(OUT + i, total, mask=i < size)


@triton.jit
def add_scalars(PARTS, parts, BATCH: tl.constexpr):
    """Return the sum of PARTS[:parts] in a fixed order."""
    total = tl.zeros((BATCH,), tl.float32)
    for first in range(0, parts, BATCH):
        q = first + tl.arange(0, BATCH)
        total += tl.load(PARTS + q, mask=q < parts, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def store_column_sums(OUT, PARTS, parts, scale, K: tl.constexpr, BK: tl.constexpr):
    """Store OUT (K,) = scale times the sum over the rows of PARTS (parts, BK). One program calls it."""
    rk = tl.arange(0, BK)
    total = tl.zeros((BK,), tl.float32)
    for q in range(0, parts):
        total += tl.load(PARTS + q * BK + rk)
    tl.store(OUT + rk, (total * scale).to(OUT.dtype.element_ty), mask=rk < K)
