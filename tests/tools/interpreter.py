"""Triton's CPU interpreter, corrected and extended until a kernel can be tested on it.

As shipped it computes bf16 on raw bit patterns, ignores tf32, runs programs one after another, so that a grid barrier
never opens, and reads and writes out of bounds without a word. Here are the corrections (`install`), interleaved programs
(`schedule`), tensors that notice stray accesses (`guarded`) and mutants of kernels (`replaced`, `mutated`).

Needs TRITON_INTERPRET=1 before Triton is imported: a process either interprets kernels or compiles them.
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

TF32 = stock._ir.INPUT_PRECISION.TF32
TF32X3 = stock._ir.INPUT_PRECISION.TF32x3

# Atomics in one launch before it counts as a livelock: some seconds of spinning, far more than a test's barriers need.
LIMIT = 50_000

POISON = 0xFF  # in every byte: a NaN in each float type, -1 in each signed integer
GUARD_ELEMENTS = 4096  # at least, on each side of a guarded tensor
GUARD_ROWS = 128  # of a matrix: a row tile of that height stays between the guards, whatever it forgets to mask


# Arithmetic


def round_mantissa(values: np.ndarray, dropped: int) -> np.ndarray:
    """fp32 rounded to nearest even, so that the last `dropped` bits are zero; NaN and infinities stay what they are."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    below_half = (1 << (dropped - 1)) - 1
    rounded = (bits + (below_half + ((bits >> dropped) & 1))) >> dropped << dropped
    return np.where(np.isfinite(values), rounded, bits).astype(np.uint32).view(np.float32)


def to_tf32(values: np.ndarray) -> np.ndarray:
    return round_mantissa(values, 13)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bit patterns, uint16, of fp32 values rounded to bf16."""
    one_nan = np.where(np.isnan(values), np.nan, values)  # the payload of another could sit in the lower half alone
    return (round_mantissa(one_nan, 16).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def tf32x3_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Three tf32 products. As in Triton's lowering, an infinite operand, whose small part is NaN, has no small terms."""
    a_big, b_big = to_tf32(a), to_tf32(b)
    a_small, b_small = to_tf32(a - a_big), to_tf32(b - b_big)
    small = a_small @ b_big + a_big @ b_small
    return a_big @ b_big + np.where(np.isnan(small), np.float32(0), small)


def product(a: np.ndarray, b: np.ndarray, precision: object) -> np.ndarray:
    """The product of fp32 matrices as the tensor cores take it at that input precision, accumulated in fp32."""
    if precision == TF32:
        return to_tf32(a) @ to_tf32(b)
    if precision == TF32X3:
        return tf32x3_product(a, b)
    return a @ b


def is_bf16(handle: stock.TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widened(handle: stock.TensorHandle) -> stock.TensorHandle:
    """bf16 as the fp32 that holds the same values; anything else as it is."""
    return stock.TensorHandle(from_bf16(handle.data), tl.float32) if is_bf16(handle) else handle


def narrowed(handle: stock.TensorHandle) -> stock.TensorHandle:
    return stock.TensorHandle(to_bf16(handle.data), tl.bfloat16)


class LivelockError(RuntimeError):
    """A launch went round and round its atomics: what some program waits for never comes."""


class Builder(stock.InterpreterBuilder):
    """The interpreter's operations on numpy arrays, with bf16 held as bits but computed in fp32, and countable atomics."""

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
        if result.data.dtype == np.bool_:  # a comparison; the stock calls its result by the operands' type
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
        total = product(a_wide, b_wide, input_precision) + d_wide  # 16-bit values are tf32 values as they are
        return self.cast_impl(stock.TensorHandle(total, tl.float32), d.dtype.scalar)

    def create_atomic_rmw(self, *args):
        self.before_atomic()
        return super().create_atomic_rmw(*args)

    def create_atomic_cas(self, *args):
        self.before_atomic()
        return super().create_atomic_cas(*args)

    def create_atomic_load(self, *args):  # this and the next two: newer versions only
        self.before_atomic()
        return super().create_atomic_load(*args)

    def create_atomic_store(self, *args):
        self.before_atomic()
        return super().create_atomic_store(*args)

    def create_atomic_poll(self, *args):
        raise NotImplementedError("tl.atomic_poll spins where no other program can run; spin on tl.atomic_add instead")

    def before_atomic(self):
        """Where the programs of a scheduled launch change over."""
        self.atomics += 1
        if self.atomics > self.limit:
            raise LivelockError(
                f"{self.limit} atomics in one launch, and it has not ended: a spin wait is never satisfied. (Without "
                "schedule(seed) programs run one after another, and no wait for a later one can end.)"
            )
        if self.interleaving is not None:
            self.interleaving.change_over()


# Scheduling


class Stopped(BaseException):
    """Ends a program because another one failed; no error of its own."""


class Interleaving:
    """The programs of one launch, a thread each, of which only the holder of the baton runs.

    It runs up to its next atomic, where a random program gets the baton: any, when the seed is even; the same one three
    times in four, when it is odd. The first finds what goes wrong when all advance together, the second what goes wrong
    when one is far ahead.
    """

    def __init__(self, indices: list[tuple[int, int, int]], program: Callable[[], None], seed: int):
        self.indices, self.program = indices, program
        self.random, self.sticky = random.Random(seed), seed % 2 == 1
        self.batons = [threading.Semaphore(0) for _ in indices]
        self.alive = list(range(len(indices)))
        self.holder = -1
        self.error: BaseException | None = None

    def run(self) -> None:
        threads = [threading.Thread(target=self.live, args=(me,), daemon=True) for me in self.alive]
        for thread in threads:
            thread.start()
        self.pass_on()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def live(self, me: int) -> None:
        """A thread's life. After an error each of the others is still given the baton once, and ends there."""
        try:
            self.take(me)
            with np.errstate(all="ignore"):  # numpy keeps it per thread
                self.program()
        except Stopped:
            pass
        except BaseException as error:  # of whatever kind, it belongs to the thread that launched
            self.error = error
        self.alive.remove(me)
        if self.alive:
            self.pass_on()

    def change_over(self) -> None:
        me = self.holder
        self.pass_on()
        self.take(me)

    def pass_on(self) -> None:
        stays = self.sticky and self.holder in self.alive and self.random.random() < 0.75
        if not stays:
            self.holder = self.random.choice(self.alive)
        self.batons[self.holder].release()

    def take(self, me: int) -> None:
        self.batons[me].acquire()
        if self.error is not None:
            raise Stopped
        stock.interpreter_builder.set_grid_idx(*self.indices[me])


def gathering(fn: Callable, seed: int) -> Callable:
    """A stand-in for a kernel that notes each program it is called for, and runs them all, interleaved, at the last."""
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

    gather.__signature__ = inspect.signature(fn)  # by which the executor binds the arguments
    return gather


class GridExecutor(stock.GridExecutor):
    """A launch. Arithmetic is silent, as on a GPU: what overflows in a lane that is masked later is nobody's concern."""

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
    """Every launch inside runs its whole grid interleaved, as the seed says; None: one program after another, as outside.

    A grid barrier then really waits, and one that is missing shows. Programs change over at atomics only, so what this
    cannot show is an error of memory order. More than `limit` atomics in one launch raise LivelockError.
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
    """`patch` for a launch: makes triton.language the interpreter's until the scope it returns is restored.

    The stock patches what the globals of `fn` show, and again at every call of a helper, which it never takes back. Here a
    launch patches all there is, once. A loop bound is also made an int, which not every version does with a newer numpy.
    """
    scope = patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    return scope


def call_helper(self: stock.InterpretedFunction, *args, **kwargs):
    """A @triton.jit function called inside another: the launch has patched triton.language already."""
    return self.rewrite()(*args, **kwargs)


def checking_bf16(check: Callable) -> Callable:
    """`check` of a reduction's or scan's operands, which also refuses those that would be combined as bits."""

    def check_tensor(self, tensors):
        check(self, tensors)
        if any(t.dtype == tl.bfloat16 for t in tensors):
            raise NotImplementedError("the interpreter has no reductions of bf16: cast to fp32 in the kernel first")

    return check_tensor


@functools.cache
def install() -> None:
    """Correct the interpreter of this process, once and for good."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("the tests of kernels need TRITON_INTERPRET=1 in the environment")
    stock.interpreter_builder.__class__ = Builder
    stock.GridExecutor = GridExecutor
    stock._patch_lang = functools.partial(patch_language, stock._patch_lang)
    stock.InterpretedFunction.__call__ = call_helper
    stock.ReduceScanOpInterface.check_tensor = checking_bf16(stock.ReduceScanOpInterface.check_tensor)
    triton.knobs.compilation.front_end_debugging = True  # so that a kernel's exception arrives as itself


# Guard zones


def guarded(
    shape: Iterable[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    fill: float | None = None,
    stride: Iterable[int] | None = None,
) -> torch.Tensor:
    """An empty tensor in the middle of a poisoned buffer, aligned to 16 bytes; contiguous, unless strides are given.

    What is read outside it is NaN or -1, and so is its own content until it is written, or set by `fill`. `check_guards`
    tells what was written outside it, gaps between the strides included.
    """
    shape = torch.Size(shape)
    stride = torch.empty(shape, device="meta").stride() if stride is None else tuple(stride)
    span = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    zone = max(GUARD_ELEMENTS, GUARD_ROWS * max(stride[-2:], default=1))
    buffer = torch.full(((span + 2 * zone) * dtype.itemsize,), POISON, dtype=torch.uint8, device=device)
    t = buffer.view(dtype).as_strided(shape, stride, zone)
    return t if fill is None else t.fill_(fill)


def guarded_like(t: torch.Tensor) -> torch.Tensor:
    """A guarded copy with the same strides, hence the same layout: contiguous, transposed, rows apart."""
    return guarded(t.shape, t.dtype, t.device, stride=t.stride()).copy_(t.detach())


def stray_writes(t: torch.Tensor) -> list[int]:
    """Where, in elements from the start of a guarded tensor, something outside it was written."""
    elements = torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).view(-1, t.itemsize)
    if t.storage_offset() < GUARD_ELEMENTS or len(elements) < GUARD_ELEMENTS + t.storage_offset():
        raise ValueError(f"a tensor of shape {tuple(t.shape)} was not made by guarded() or guarded_like()")
    written = (elements != POISON).any(1)
    written.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return (written.nonzero().flatten() - t.storage_offset()).tolist()


def check_guards(tensors: Iterable[torch.Tensor]) -> None:
    """Assert that nothing was written around these tensors, each as `guarded` or `guarded_like` returned it."""
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

    Whatever name or table it was reached by: the interpreter looks up, at each call, the function it has rewritten for
    this one, and it is that entry which is exchanged. Modules stay untouched.
    """
    table, original = stock.InterpretedFunction.rewritten_fn, kernel.rewrite()
    table[kernel.fn] = mutant.rewrite()
    try:
        yield
    finally:
        table[kernel.fn] = original


def textual_mutant(kernel: stock.InterpretedFunction, old: str, new: str) -> stock.InterpretedFunction:
    """`kernel` compiled again from its source with `old` replaced by `new`, among the globals of the original."""
    fn = kernel.fn
    source = textwrap.dedent(inspect.getsource(fn))
    places = source.count(old)
    assert places == 1, f"{old!r} occurs {places} times in {fn.__name__}; a mutant changes one place"
    source = source.replace(old, new)
    filename = f"<{fn.__name__} with {new!r} for {old!r}>"
    # The interpreter reads the source of what it rewrites, and this source is in no file.
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    namespace: dict[str, stock.InterpretedFunction] = {}
    exec(compile(source, filename, "exec"), fn.__globals__, namespace)
    return namespace[fn.__name__]


@contextlib.contextmanager
def mutated(kernel: stock.InterpretedFunction, old: str, new: str) -> Iterator[None]:
    """Run `kernel` with one fragment of its source replaced, e.g. a mask dropped, to see that a test notices.

    The interpreter rewrites kernels from their source, so a changed source is a changed kernel: it is compiled among the
    globals of the original, where it finds the same helpers, and then `replaced`. `old` has to occur exactly once, indented
    as in a function at the left margin if it goes over lines. Mutants of two functions nest; of one, the inner one counts.
    """
    with replaced(kernel, textual_mutant(kernel, old, new)):
        yield
