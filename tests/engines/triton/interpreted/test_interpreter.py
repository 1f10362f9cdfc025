"""The corrections, schedules and guards of `interpreter` without which a test of a kernel would pass in error."""

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

BITS16 = torch.arange(-(2**15), 2**15, dtype=torch.int16)
EVERY_BF16 = BITS16.view(torch.bfloat16)  # NaNs, infinities, subnormals and both zeros included
PROGRAMS = 8


def assert_same(got, expected):
    """Equal to the last bit; every NaN equals every other."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(got.signbit()[numbers], expected.signbit()[numbers])


# Arithmetic


@triton.jit
def arithmetic_kernel(a, b, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, (x + y) * x - y)


def test_bf16_arithmetic_rounds_each_operation():
    a, b = EVERY_BF16[torch.randint(len(EVERY_BF16), (2, 4096))]
    out = torch.empty_like(a)
    arithmetic_kernel[(4,)](a, b, out, 1024)
    assert_same(out, (a + b) * a - b)


@triton.jit
def copy_kernel(a, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(a + at, mask=at < n), mask=at < n)


def test_casts_to_bf16_round_to_nearest_even():
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int32)
    ties = (bits & -0x10000) | 0x8000
    low_nans = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32)
    special = torch.tensor([-0.0, torch.inf, -torch.inf, torch.finfo(torch.float32).max, 1e-45])
    a = torch.cat([*(t.view(torch.float32) for t in (bits, ties, low_nans)), special])
    out = torch.empty(len(a), dtype=torch.bfloat16)
    copy_kernel[(triton.cdiv(len(a), 1024),)](a, out, len(a), 1024)
    assert_same(out, a.bfloat16())


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left, right = tl.load(a + m[:, None] * K + k), tl.load(b + k[:, None] * N + n)
    half = tl.full((M, N), 0.5, tl.float32)
    tl.store(out + m[:, None] * N + n, tl.dot(left, right, acc=half, input_precision=PRECISION))


def dot(a, b, precision="ieee"):
    out = torch.empty(len(a), b.shape[1])
    dot_kernel[(1,)](a, b, out, *a.shape, b.shape[1], precision)
    return out


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dots_of_16_bits_accumulate_in_fp32(dtype, precision):
    """The sums exceed fp16's range and bf16's digits; the input precision changes nothing."""
    a, b = torch.randint(-128, 128, (16, 32)).to(dtype), torch.randint(-128, 128, (32, 16)).to(dtype)
    a[0], b[:, 0] = 127, 127
    assert torch.equal(dot(a, b, precision), a.float() @ b.float() + 0.5)


def tf32(t):
    """fp32 cut to eleven significant bits, computed in fp64."""
    mantissa, exponent = np.frexp(t.double().numpy())
    return torch.from_numpy(np.ldexp(np.trunc(mantissa * 2**11), exponent - 11))


def test_tf32_cuts_the_operands_and_is_the_default():
    a, eye = torch.randn(32, 32), torch.eye(32)
    assert not torch.equal(tf32(a), a.double())
    for x, y in ((a, eye), (eye, a)):
        assert torch.equal(dot(x, y, "tf32"), (tf32(a) + 0.5).float())
        assert torch.equal(dot(x, y, None), dot(x, y, "tf32"))
        assert torch.equal(dot(x, y, "ieee"), a + 0.5)


def test_tf32x3_is_nearly_fp32():
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    exact = a.double() @ b.double() + 0.5
    error = {p: float((dot(a, b, p).double() - exact).norm() / exact.norm()) for p in ("ieee", "tf32x3", "tf32")}
    assert error["tf32x3"] < min(error["tf32"] / 100, 8 * error["ieee"])


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_dots_keep_infinities_nans_and_the_poison(precision):
    a = torch.ones(16, 16)
    a[0, 0], a[1, 1], a[2, 2] = torch.inf, torch.nan, interpreter.guarded((), torch.float32)
    expected = torch.full((16, 16), 16.5)
    expected[0], expected[1:3] = torch.inf, torch.nan
    assert_same(dot(a, torch.ones(16, 16), precision), expected)


# Schedules


@triton.jit
def barrier(counter):
    """A grid barrier: together the programs add 2^31, which flips the sign bit; the next barrier flips it back."""
    tl.debug_barrier()
    step = tl.where(tl.program_id(0) == 0, (1 - tl.num_programs(0)) ^ -2147483648, 1)
    old = tl.atomic_add(counter, step, sem="acq_rel", scope="gpu")
    now = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while (old ^ now) >= 0:
        now = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def no_barrier(counter):
    tl.atomic_add(counter, 0)


@triton.jit
def twice_kernel(counter, parts, out, N: tl.constexpr):
    """Each program sums the parts of all, twice: the second round overwrites the parts that the first has read."""
    program = tl.program_id(0)
    tl.store(parts + program, program + 1)
    barrier(counter)
    total = tl.sum(tl.load(parts + tl.arange(0, N)), axis=0)
    barrier(counter)
    tl.store(parts + program, total)
    barrier(counter)
    tl.store(out + program, tl.sum(tl.load(parts + tl.arange(0, N)), axis=0))
    barrier(counter)


def run_twice(counter):
    parts, out = (interpreter.guarded((PROGRAMS,), torch.int32) for _ in range(2))
    twice_kernel[(PROGRAMS,)](counter, parts, out, PROGRAMS)
    interpreter.check_guards([parts, out])
    return out.tolist() == [PROGRAMS * sum(range(1, PROGRAMS + 1))] * PROGRAMS


def test_a_grid_barrier_holds_under_any_schedule_and_a_deleted_one_is_noticed():
    counter = torch.zeros(1, dtype=torch.int32)
    for seed in range(6):  # even ones change the program at random, odd ones stay with it
        with interpreter.schedule(seed):
            assert run_twice(counter) and counter.item() == 0
            with interpreter.replaced(barrier, no_barrier):
                assert not run_twice(counter)


@triton.jit
def waiting_kernel(flag, FAILING: tl.constexpr):
    while tl.atomic_add(flag, 0) == 0:
        tl.static_assert(tl.program_id(0) != FAILING, "as asked")  # the interpreter asserts at run time


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_wait_that_never_ends_and_the_failure_of_one_program_end_all(seed):
    flag = torch.zeros(1, dtype=torch.int32)
    with interpreter.schedule(seed, limit=500):
        with pytest.raises(interpreter.LivelockError):
            waiting_kernel[(4,)](flag, -1)
        with pytest.raises(AssertionError, match="as asked"):
            waiting_kernel[(4,)](flag, 2 if seed is not None else 0)


# Guard zones

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8]


@triton.jit
def fill_kernel(out, n, value, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, value, mask=at < n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_guarded_tensors_are_poisoned_and_stray_writes_are_noticed(dtype):
    fine, t = interpreter.guarded((3, 5), dtype), interpreter.guarded((3, 7), dtype)
    assert bool((t.isnan() if dtype.is_floating_point else t == -1).all()) and t.data_ptr() % 16 == 0
    fill_kernel[(4,)](t, 21, 1, 8)
    interpreter.check_guards([fine, t])
    fill_kernel[(4,)](t, 23, 1, 8)
    with pytest.raises(AssertionError, match=r"tensor 1, of shape \(3, 7\) .* from element 21 to 22"):
        interpreter.check_guards([fine, t])


def test_stray_writes_before_the_start_between_rows_and_of_nan_are_noticed():
    negative_nan = torch.tensor([-0x400000], dtype=torch.int32).view(torch.float32)  # inf - inf on many CPUs
    for t, at in ((interpreter.guarded((3, 7), torch.float32), -2), (torch.zeros(6, 8)[:, :5], 5)):
        t = t if at < 0 else interpreter.guarded_like(t)
        torch.as_strided(t, (1,), (1,), t.storage_offset() + at).copy_(negative_nan)
        with pytest.raises(AssertionError, match=f"from element {at} to {at}"):
            interpreter.check_guards([t])


def test_unmasked_reads_are_noticed():
    a = interpreter.guarded_like(torch.randn(21))
    out = torch.empty(32)
    copy_kernel[(4,)](a, out, 32, 8)
    assert torch.equal(out[:21], a) and bool(out[21:].isnan().all())


def test_guarded_copies_keep_their_layout():
    m = torch.randn(6, 8)
    for t in (m, m.mT, m[:, :5], m[:, 0], torch.ones(2, 3, 4).bfloat16()):
        copy = interpreter.guarded_like(t)
        assert torch.equal(copy, t) and copy.stride() == t.stride() and copy.dtype == t.dtype
        interpreter.check_guards([copy])


# Mutants


@triton.jit
def negated(x):
    return -x


@triton.jit
def negate_kernel(a, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, negated(tl.load(a + at, mask=at < n)), mask=at < n)


def run_negate():
    a, out = interpreter.guarded_like(torch.randn(5)), interpreter.guarded((5,), torch.float32)
    negate_kernel[(1,)](a, out, 5, 8)
    interpreter.check_guards([out])
    return torch.equal(out, -a)


def test_mutants_of_kernels_and_helpers_run_and_end_with_their_block():
    with interpreter.mutated(negated, "-x", "x"):
        assert not run_negate()
    with interpreter.mutated(negate_kernel, "), mask=at < n", ")"), pytest.raises(AssertionError, match="outside it"):
        run_negate()
    assert run_negate()
    with pytest.raises(AssertionError, match="occurs 2 times"), interpreter.mutated(negate_kernel, "at < n", "at <= n"):
        pass
