"""What programs of one launch do together: wait for one another, and add what each of them has."""

import triton
import triton.language as tl


@triton.jit
def barrier(COUNTER):
    """Wait until every program of the grid has come here; all of them must be resident at once.

    The first program adds 2^31 - (programs - 1) and each other one 1, so the sign bit flips when all have arrived, and the
    counter is ready for the next barrier without being reset: of this launch, of the next one, of a replayed graph.
    """
    tl.debug_barrier()  # the program's own stores come before its arrival
    step = tl.where(tl.program_id(0) == 0, -2147483647 - tl.num_programs(0), 1)
    before = tl.atomic_add(COUNTER, step, sem="acq_rel", scope="gpu")
    now = tl.atomic_add(COUNTER, 0, sem="acquire", scope="gpu")
    while (before ^ now) >= 0:
        now = tl.atomic_add(COUNTER, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def add_parts(PARTS, OUT, parts, size, SIZE: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr):
    """OUT[i] = the sum of PARTS[q, i] over q < parts, for i < size <= SIZE, in a fixed order; the grid shares the i.

    PARTS has rows of SIZE. BATCH rows are loaded together: one at a time would be all latency.
    """
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
    """The sum of PARTS[0 : parts], in a fixed order."""
    total = tl.zeros((BATCH,), tl.float32)
    for first in range(0, parts, BATCH):
        q = first + tl.arange(0, BATCH)
        total += tl.load(PARTS + q, mask=q < parts, other=0.0)
    return tl.sum(total, axis=0)
