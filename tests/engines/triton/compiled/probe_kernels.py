"""Kernels that show one thing each, for the tests of `offline`. Other processes import them by name."""

import triton
import triton.language as tl


@triton.jit
def product(x, b, y, n, d, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """y = x b for contiguous x: n × d and b: d × K. Row strides are d, a run's argument, and K <= COLUMNS, the compiler's."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, d, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        x_mask = (rows[:, None] < n) & (depth[None, :] < d)
        b_mask = (depth[:, None] < d) & (columns[None, :] < K)
        x_tile = tl.load(x + rows[:, None] * d + depth[None, :], mask=x_mask, other=0.0)
        b_tile = tl.load(b + depth[:, None] * K + columns[None, :], mask=b_mask, other=0.0)
        total = tl.dot(x_tile, b_tile, total)
    y_mask = (rows[:, None] < n) & (columns[None, :] < K)
    tl.store(y + rows[:, None] * K + columns[None, :], total.to(y.dtype.element_ty), mask=y_mask)


@triton.jit
def _grid_barrier(counter):
    """Every program arrives, and waits until the counter's sign has flipped, which it does when the last has come."""
    tl.debug_barrier()
    step = tl.where(tl.program_id(0) == 0, (1 - tl.num_programs(0)) ^ -2147483648, 1)
    before = tl.atomic_add(counter, step, sem="acq_rel", scope="gpu")
    now = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while (before ^ now) >= 0:
        now = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def reverse_twice(x, y, z, counter, n, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """z gets x back, by way of y: what a program reads there, another one of the same launch has written."""
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + here, tl.load(x + n - 1 - here, mask=here < n), mask=here < n)
    if BARRIER:
        _grid_barrier(counter)
    tl.store(z + here, tl.load(y + n - 1 - here, mask=here < n), mask=here < n)


@triton.jit
def even_only(x, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Compiles for an even WIDTH."""
    tl.static_assert(WIDTH % 2 == 0, "the width is odd")
    tl.store(x + tl.arange(0, BLOCK), WIDTH)


@triton.constexpr_function
def _die():
    """End the process that compiles, as a failed assertion in the compiler does."""
    import os

    os._exit(1)


@triton.jit
def deadly(x):
    """Compiles for nobody."""
    tl.store(x, _die())
