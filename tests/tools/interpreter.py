"""Correct Triton's CPU interpreter so that kernels can be tested on it.

Triton's own version computes bf16 on raw bit patterns, and tf32 products in fp32. It runs programs one after another, so a
grid barrier never opens, and it ignores accesses out of bounds. This module has the corrections (`install`), interleaved
programs (`schedule`), tensors that detect stray accesses (`guarded`), and mutants of kernels (`replaced`, `mutated`).

Set TRITON_INTERPRET=1 before Triton is imported: a process either interprets kernels or compiles them.
"""

import contextlib
import functools
import inspect
import linecache
import math
import random
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

from interp_nn.engines import limits

TF32 = stock._ir.INPUT_PRECISION.TF32
TF32X3 = stock._ir.INPUT_PRECISION.TF32x3

# A launch with more atomics counts as a livelock: this is some seconds of waiting, far more than a test's barriers need.
LIMIT = 50_000

POISON = 0xFF  # in every byte: a NaN in each float type, -1 in each signed integer
GUARD_ELEMENTS = 4096  # the least on each side of a guarded tensor
GUARD_ROWS = 128  # the guards of a matrix have this many rows, so that an unmasked tile of rows stays inside them


# Arithmetic


def round_mantissa(values: np.ndarray, dropped: int) -> np.ndarray:
    """Round fp32 to nearest even so that the last `dropped` bits are zero; keep NaN and infinities."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    below_half = (1 << (dropped - 1)) - 1
    rounded = (bits + (below_half + ((bits >> dropped) & 1))) >> dropped << dropped
    return np.where(np.isfinite(values), rounded, bits).astype(np.uint32).view(np.float32)


def to_tf32(values: np.ndarray) -> np.ndarray:
    return round_mantissa(values, 13)


def cut_to_tf32(values: np.ndarray) -> np.ndarray:
    """Set the last 13 bits of fp32 to zero, as the matrix units do with an operand that is not rounded before; keep NaN."""
    bits = np.asarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(values), values, bits.view(np.float32)).astype(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round fp32 to bf16 and return the bit patterns as uint16."""
    one_nan = np.where(np.isnan(values), np.nan, values)  # other NaNs may have bits in the lower half only
    return (round_mantissa(one_nan, 16).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def tf32x3_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute three tf32 products as Triton does: the small terms of an infinite operand, which are NaN, are dropped."""
    a_big, b_big = to_tf32(a), to_tf32(b)
    a_small, b_small = to_tf32(a - a_big), to_tf32(b - b_big)
    small = a_small @ b_big + a_big @ b_small
    return a_big @ b_big + np.where(np.isnan(small), np.float32(0), small)


def product(a: np.ndarray, b: np.ndarray, precision: object) -> np.ndarray:
    """Multiply fp32 matrices as tensor cores do at an input precision, accumulating in fp32.

    The compiler rounds the parts of split operands ("tf32x3"), but not the operands of a single tf32 product.
    """
    if precision == TF32:
        return cut_to_tf32(a) @ cut_to_tf32(b)
    if precision == TF32X3:
        return tf32x3_product(a, b)
    return a @ b


def is_bf16(handle: stock.TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(handle: stock.TensorHandle) -> stock.TensorHandle:
    """Convert bf16 to fp32; return any other dtype as it is."""
    return stock.TensorHandle(from_bf16(handle.data), tl.float32) if is_bf16(handle) else handle


def narrowed(handle: stock.TensorHandle) -> stock.TensorHandle:
    return stock.TensorHandle(to_bf16(handle.data), tl.bfloat16)


class LivelockError(RuntimeError):
    """A launch has too many atomics: some program waits for a value that is never written."""


class Builder(stock.InterpreterBuilder):
    """The interpreter's operations on numpy arrays: bf16 is stored as bits and computed in fp32, and atomics are counted."""

    limit = LIMIT
    atomics = 0
    interleaving: "Interleaving | None" = None

    def get_bf16(self, value: float) -> stock.TensorHandle:
        return narrowed(self.get_fp32(value))

    def cast_impl(self, src, dst_type):
        wide = widened(src)
        if dst_type.scalar == tl.bfloat16:
            return narrowed(super().cast_impl(wide, tl.float32))
        return super().cast_impl(wide, dst_type)

    def binary_op(self, lhs, rhs, op):
        result = super().binary_op(widened(lhs), widened(rhs), op)
        if result.data.dtype == np.bool_:  # a comparison, to whose result Triton gives the operands' dtype
            return stock.TensorHandle(result.data, tl.int1)
        return narrowed(result) if is_bf16(lhs) else result

    def unary_op(self, arg, op):
        result = super().unary_op(widened(arg), op)
        return narrowed(result) if is_bf16(arg) else result

    def create_fma(self, x, y, z):
        result = super().create_fma(widened(x), widened(y), widened(z))
        return narrowed(result) if is_bf16(z) else result

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if not {a.dtype.scalar, b.dtype.scalar} <= {tl.bfloat16, tl.float16, tl.float32}:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        a_wide, b_wide, d_wide = (widened(h).data.astype(np.float32) for h in (a, b, d))
        total = product(a_wide, b_wide, input_precision) + d_wide  # tf32 represents 16-bit values exactly
        return self.cast_impl(stock.TensorHandle(total, tl.float32), d.dtype.scalar)

    def create_atomic_rmw(self, *args):
        self.before_atomic()
        return super().create_atomic_rmw(*args)

    def create_atomic_cas(self, *args):
        self.before_atomic()
        return super().create_atomic_cas(*args)

    def create_atomic_load(self, *args):  # this and the next two exist in newer versions only
        self.before_atomic()
        return super().create_atomic_load(*args)

    def create_atomic_store(self, *args):
        self.before_atomic()
        return super().create_atomic_store(*args)

    def create_atomic_poll(self, *args):
        raise NotImplementedError("tl.atomic_poll: no other program runs meanwhile; wait with tl.atomic_add in a loop")

    def before_atomic(self):
        """Count the atomic and let another program of a scheduled launch run."""
        self.atomics += 1
        if self.atomics > self.limit:
            raise LivelockError(
                f"the launch has more than {self.limit} atomics: a wait never ends. (Without schedule(seed) programs run "
                "one after another, so a wait for a later program never ends.)"
            )
        if self.interleaving is not None:
            self.interleaving.switch()


# Scheduling


class Stopped(BaseException):
    """Ends a program because another one failed."""


class Interleaving:
    """Run the programs of one launch in a thread each, one at a time.

    A program runs up to its next atomic, where a random program continues. With an even seed each is as likely; with an odd
    seed the same program continues three times in four. Even seeds find errors of programs that advance together, odd seeds
    errors of one program that is far ahead.
    """

    def __init__(self, indices: list[tuple[int, int, int]], program: Callable[[], None], seed: int):
        self.indices, self.program = indices, program
        self.random, self.sticky = random.Random(seed), seed % 2 == 1
        self.turns = [threading.Semaphore(0) for _ in indices]
        self.alive = list(range(len(indices)))
        self.running = -1
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run all programs to their end, and raise the error of one that failed."""
        threads = [threading.Thread(target=self.run_program, args=(i,), daemon=True) for i in self.alive]
        for thread in threads:
            thread.start()
        self.wake_next()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def run_program(self, i: int) -> None:
        """Run one program; after an error, each of the others gets one more turn, in which it ends."""
        try:
            self.wait_for_turn(i)
            with np.errstate(all="ignore"):  # numpy keeps it per thread
                self.program()
        except Stopped:
            pass
        except BaseException as error:  # raised again in the thread that launched
            self.error = error
        self.alive.remove(i)
        if self.alive:
            self.wake_next()

    def switch(self) -> None:
        """Let a random program continue, and wait for this one's next turn."""
        i = self.running
        self.wake_next()
        self.wait_for_turn(i)

    def wake_next(self) -> None:
        stays = self.sticky and self.running in self.alive and self.random.random() < 0.75
        if not stays:
            self.running = self.random.choice(self.alive)
        self.turns[self.running].release()

    def wait_for_turn(self, i: int) -> None:
        self.turns[i].acquire()
        if self.error is not None:
            raise Stopped
        stock.interpreter_builder.set_grid_idx(*self.indices[i])


def gathering(fn: Callable, seed: int) -> Callable:
    """Replace a kernel by a function that collects the programs it is called for, and runs them interleaved at the last."""
    builder, indices = stock.interpreter_builder, []

    def gather(**arguments):
        indices.append(builder.grid_idx)
        if len(indices) < math.prod(builder.grid_dim):
            return
        builder.interleaving = Interleaving(indices, functools.partial(fn, **arguments), seed)
        try:
            builder.interleaving.run()
        finally:
            builder.interleaving = None

    gather.__signature__ = inspect.signature(fn)  # the executor binds the arguments with it
    return gather


class GridExecutor(stock.GridExecutor):
    """A launch. Overflow and invalid operations do not warn, as on a GPU."""

    seed: int | None = None
    limit = LIMIT

    def __call__(self, *args, **kwargs):
        builder = stock.interpreter_builder
        builder.atomics, builder.limit = 0, self.limit
        if self.seed is not None:
            self.fn = gathering(self.fn, self.seed)
        with np.errstate(all="ignore"):
            super().__call__(*args, **kwargs)


@contextlib.contextmanager
def schedule(seed: int | None, limit: int = LIMIT) -> Iterator[None]:
    """Interleave the programs of every launch inside, in an order that the seed decides; None runs them in sequence.

    A grid barrier then waits, and a missing one gives wrong results. Programs switch at atomics only, so errors of memory
    order are not found. More than `limit` atomics in one launch raise LivelockError.
    """
    install()
    before = GridExecutor.seed, GridExecutor.limit
    GridExecutor.seed, GridExecutor.limit = seed, limit
    try:
        yield
    finally:
        GridExecutor.seed, GridExecutor.limit = before


# Installation


def patch_language(patch: Callable, fn: Callable) -> object:
    """Make triton.language the interpreter's until the returned scope is restored.

    Triton patches the modules among the globals of `fn`, again at every call of a helper, and does not undo the latter. Here a
    launch patches the whole language once. Loop bounds also become ints, which some versions miss with a newer numpy.
    """
    scope = patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    return scope


def call_helper(self: stock.InterpretedFunction, *args, **kwargs):
    """Call a @triton.jit function inside another: the launch has patched triton.language already."""
    return self.rewrite()(*args, **kwargs)


def checking_bf16(check: Callable) -> Callable:
    """Extend the check of a reduction's or scan's operands: bf16, which would be combined as bits, is an error."""

    def check_tensor(self, tensors):
        check(self, tensors)
        if any(t.dtype == tl.bfloat16 for t in tensors):
            raise NotImplementedError("the interpreter cannot reduce bf16: cast to fp32 in the kernel first")

    return check_tensor


@functools.cache
def install() -> None:
    """Correct the interpreter of this process."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("the tests of kernels need TRITON_INTERPRET=1 in the environment")
    stock.interpreter_builder.__class__ = Builder
    stock.GridExecutor = GridExecutor
    stock._patch_lang = functools.partial(patch_language, stock._patch_lang)
    stock.InterpretedFunction.__call__ = call_helper
    stock.ReduceScanOpInterface.check_tensor = checking_bf16(stock.ReduceScanOpInterface.check_tensor)
    limits.interpreter_has_bfloat16 = True
    triton.knobs.compilation.front_end_debugging = True  # a kernel's exception is raised unchanged


# Guard zones


def guarded(
    shape: Iterable[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    fill: float | None = None,
    stride: Iterable[int] | None = None,
) -> torch.Tensor:
    """Return a tensor in the middle of a poisoned buffer, aligned to 16 bytes; contiguous unless strides are given.

    Reads outside it give NaN or -1, and so does its own content unless `fill` sets it. `check_guards` finds writes outside it,
    also in gaps between its strides.
    """
    shape = torch.Size(shape)
    stride = torch.empty(shape, device="meta").stride() if stride is None else tuple(stride)
    span = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    zone = max(GUARD_ELEMENTS, GUARD_ROWS * max(stride[-2:], default=1))
    buffer = torch.full(((span + 2 * zone) * dtype.itemsize,), POISON, dtype=torch.uint8, device=device)
    t = buffer.view(dtype).as_strided(shape, stride, zone)
    return t if fill is None else t.fill_(fill)


def guarded_like(t: torch.Tensor) -> torch.Tensor:
    """Return a guarded copy with the same strides."""
    return guarded(t.shape, t.dtype, t.device, stride=t.stride()).copy_(t.detach())


def stray_writes(t: torch.Tensor) -> list[int]:
    """Return the places outside a guarded tensor that were written, in elements from its start."""
    elements = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).view(-1, t.itemsize)
    if t.storage_offset() < GUARD_ELEMENTS or len(elements) < GUARD_ELEMENTS + t.storage_offset():
        raise ValueError(f"a tensor of shape {tuple(t.shape)} was not made by guarded() or guarded_like()")
    written = (elements != POISON).any(1)
    written.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return (written.nonzero().flatten() - t.storage_offset()).tolist()


def check_guards(tensors: Iterable[torch.Tensor]) -> None:
    """Assert that nothing was written around these tensors, which `guarded` or `guarded_like` returned."""
    for index, t in enumerate(tensors):
        stray = stray_writes(t)
        assert not stray, (
            f"tensor {index}, of shape {tuple(t.shape)} and {t.dtype}: {len(stray)} elements outside it were written, "
            f"from element {stray[0]} to {stray[-1]} counted from its start"
        )


# Mutants


@contextlib.contextmanager
def replaced(kernel: stock.InterpretedFunction, mutant: stock.InterpretedFunction) -> Iterator[None]:
    """Run `mutant` wherever `kernel`, a @triton.jit kernel or a helper of kernels, is launched or called.

    At each call the interpreter looks up the function that it has rewritten; this entry is exchanged. So modules stay as they
    are, and references to the kernel in tables run the mutant too.
    """
    table, original = stock.InterpretedFunction.rewritten_fn, kernel.rewrite()
    table[kernel.fn] = mutant.rewrite()
    try:
        yield
    finally:
        table[kernel.fn] = original


def textual_mutant(kernel: stock.InterpretedFunction, old: str, new: str) -> stock.InterpretedFunction:
    """Compile `kernel` again with `old` replaced by `new` in its source, with the globals of the original."""
    fn = kernel.fn
    source = textwrap.dedent(inspect.getsource(fn))
    places = source.count(old)
    assert places == 1, f"{old!r} occurs {places} times in {fn.__name__}; a mutant changes one place"
    source = source.replace(old, new)
    filename = f"<{fn.__name__} with {new!r} for {old!r}>"
    # The interpreter reads the source of the function that it rewrites, and this source is in no file.
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    namespace: dict[str, stock.InterpretedFunction] = {}
    exec(compile(source, filename, "exec"), fn.__globals__, namespace)
    return namespace[fn.__name__]


@contextlib.contextmanager
def mutated(kernel: stock.InterpretedFunction, old: str, new: str) -> Iterator[None]:
    """Run `kernel` with one fragment of its source replaced, e.g. without a mask, to see that a test notices.

    `old` must occur exactly once, indented as in a function at the left margin. Mutants of two functions nest; of two mutants
    of one function the inner one runs.
    """
    with replaced(kernel, textual_mutant(kernel, old, new)):
        yield
