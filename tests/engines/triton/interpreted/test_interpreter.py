"""The interpreter's corrections, schedules, guard zones and mutants, on kernels of a few lines."""

import inspect
import itertools
import operator

import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

BITS16 = torch.arange(-(2**15), 2**15, dtype=torch.int16)
PROGRAMS = 8


def every_bf16():
    """All of bf16: NaNs, infinities, subnormals and both zeros included."""
    return BITS16.view(torch.bfloat16)


def any_bf16(n):
    return BITS16[torch.randint(len(BITS16), (n,))].view(torch.bfloat16)


def any_fp32(n):
    """Random bit patterns, then the values where rounding to bf16 goes wrong first."""
    bits = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32)
    ties = (bits & -0x10000) | 0x8000
    low_nans = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max, 1e-45])
    return torch.cat([bits.view(torch.float32), ties.view(torch.float32), low_nans.view(torch.float32), special])


def assert_same(got, expected):
    """Equal to the last bit, except that one NaN is as good as another."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(got.signbit()[numbers], expected.signbit()[numbers])


# Arithmetic


@triton.jit
def binary_kernel(a, b, out, OP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    else:
        z = x / y
    tl.store(out + at, z)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv"])
def test_bf16_arithmetic_is_that_of_torch(name):
    a, b = any_bf16(4096), any_bf16(4096)
    out = torch.empty_like(a)
    binary_kernel[(4,)](a, b, out, name, 1024)
    assert_same(out, getattr(operator, name)(a, b))


@triton.jit
def scalars_kernel(a, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, -tl.abs(tl.load(a + at)) * 2.5)


def test_bf16_with_constants_and_unary_operations():
    a = any_bf16(1024)
    a[a == 0] = 1  # the sign of -0 depends on the version of Triton
    out = torch.empty_like(a)
    scalars_kernel[(1,)](a, out, 1024)
    assert_same(out, -a.abs() * 2.5)


@triton.jit
def compare_kernel(a, b, out, chosen, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(a + at), tl.load(b + at)
    equal, not_equal = (x == y).to(tl.int32), (x != y).to(tl.int32)
    less, not_less = (x < y).to(tl.int32), (x >= y).to(tl.int32)
    more, not_more = (x > y).to(tl.int32), (x <= y).to(tl.int32)
    tl.store(out + at, equal + 2 * not_equal + 4 * less + 8 * not_less + 16 * more + 32 * not_more)
    between = (x > 0) & (x < y)
    tl.store(chosen + at, tl.where(between, x, between.to(tl.bfloat16)), mask=~between | (x < 1))


def test_bf16_comparisons_are_int1():
    a, b = any_bf16(4096), any_bf16(4096)
    b[::4] = a[::4]
    out, chosen = torch.empty(4096, dtype=torch.int32), torch.full_like(a, -1)
    compare_kernel[(1,)](a, b, out, chosen, 4096)
    orders = [a == b, a != b, a < b, a >= b, a > b, a <= b]
    torch.testing.assert_close(out, sum(2**i * order.int() for i, order in enumerate(orders)))
    between = (a > 0) & (a < b)
    assert between.any() and not between.all()
    assert_same(chosen, torch.where(between, torch.where(a < 1, a, -1), 0.0))


@triton.jit
def fma_kernel(a, b, c, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.fma(tl.load(a + at), tl.load(b + at), tl.load(c + at)))


def test_bf16_fma_rounds_the_sum_only():
    a, b, c = torch.randn(3, 4096).bfloat16()
    out = torch.empty_like(a)
    fma_kernel[(1,)](a, b, c, out, 4096)
    assert_same(out, (a.float() * b.float() + c.float()).bfloat16())
    assert not torch.equal(out, a * b + c), "these numbers cannot tell one rounding from two"


@triton.jit
def copy_kernel(a, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(a + at, mask=at < n), mask=at < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_casts_to_bf16_round_to_nearest_even(dtype):
    a = any_fp32(4096)
    a = torch.randint(-(2**31), 2**31, (4096,), dtype=dtype) if dtype == torch.int32 else a.to(dtype)
    out = torch.empty(len(a), dtype=torch.bfloat16)
    copy_kernel[(triton.cdiv(len(a), 1024),)](a, out, len(a), 1024)
    assert_same(out, a.float().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_casts_from_bf16_keep_every_value(dtype):
    a = every_bf16()
    out = torch.empty(len(a), dtype=dtype)
    copy_kernel[(len(a) // 4096,)](a, out, len(a), 4096)
    assert_same(out, a.to(dtype))


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
    """Beyond fp16's range, with more digits than bf16 has, and no less exact for what an input precision says."""
    a, b = torch.randint(-128, 128, (16, 32)).to(dtype), torch.randint(-128, 128, (32, 16)).to(dtype)
    a[0], b[:, 0] = 127, 127
    assert torch.equal(dot(a, b, precision), a.float() @ b.float() + 0.5)


def tf32(t):
    """fp32 rounded to eleven significant bits, in fp64 and without looking at a bit."""
    mantissa, exponent = np.frexp(t.double().numpy())
    return torch.from_numpy(np.ldexp(np.rint(mantissa * 2**11), exponent - 11))


def test_tf32_rounds_the_operands():
    a, eye = torch.randn(32, 32), torch.eye(32)
    a[0] = 1 + torch.arange(32) * 2.0**-12  # ties, which go to even
    assert not torch.equal(tf32(a), a.double())
    for x, y in ((a, eye), (eye, a)):
        assert torch.equal(dot(x, y, "tf32"), (tf32(a) + 0.5).float())
        assert torch.equal(dot(x, y, "ieee"), a + 0.5)


def test_tf32_is_the_default_of_fp32_dots():
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    assert torch.equal(dot(a, b, None), dot(a, b, "tf32"))
    assert not torch.equal(dot(a, b, None), dot(a, b, "ieee"))


def test_tf32x3_is_nearly_fp32():
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    exact = a.double() @ b.double() + 0.5
    error = {p: float((dot(a, b, p).double() - exact).norm() / exact.norm()) for p in ("ieee", "tf32x3", "tf32")}
    assert error["ieee"] < error["tf32"] / 100
    assert error["tf32x3"] < error["tf32"] / 100
    assert error["tf32x3"] < 8 * error["ieee"]


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
def test_dots_of_what_is_not_finite(precision):
    a = torch.ones(16, 16)
    a[0, 0], a[1, 1], a[2, 2] = torch.inf, torch.nan, interpreter.guarded((), torch.float32)
    expected = torch.full((16, 16), 16.5)
    expected[0], expected[1:3] = torch.inf, torch.nan
    assert_same(dot(a, torch.ones(16, 16), precision), expected)


@triton.jit
def exp_kernel(a, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(a + at)
    tl.store(out + at, tl.exp(x) - tl.log(x))


def test_overflow_and_invalid_operations_are_silent():
    a = torch.tensor([1000.0, -1.0, 0.0, torch.inf])
    out = torch.empty_like(a)
    for seed in (None, 0):
        with interpreter.schedule(seed):
            exp_kernel[(1,)](a, out, 4)
        torch.testing.assert_close(out, a.exp() - a.log(), equal_nan=True)


# The language


@triton.jit
def range_kernel(out, n, step):
    total = 0
    for i in range(0, n, step):
        total += i
    for i in tl.range(0, tl.load(out), step):
        total += i
    tl.store(out, total.to(tl.int32))


def test_loop_bounds_known_only_at_run_time():
    out = torch.tensor([7], dtype=torch.int32)
    range_kernel[(1,)](out, 10, 2)
    assert out.item() == sum(range(0, 10, 2)) + sum(range(0, 7, 2))


@triton.jit
def reduce_kernel(a, out, OP: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(a + tl.arange(0, BLOCK))
    if OP == "sum":
        tl.store(out, tl.sum(x, axis=0))
    elif OP == "wide sum":
        tl.store(out, tl.sum(x.to(tl.float32), axis=0))
    else:
        tl.store(out, tl.max(x, axis=0))


def test_reductions_of_bf16_are_refused_unless_widened():
    a, out = torch.randn(64).bfloat16(), torch.empty(1)
    with pytest.raises(NotImplementedError, match="cast to fp32"):
        reduce_kernel[(1,)](a, out, "sum", 64)
    reduce_kernel[(1,)](a, out, "wide sum", 64)
    torch.testing.assert_close(out[0], a.float().sum())
    reduce_kernel[(1,)](a, out, "max", 64)  # which Triton widens by itself
    assert out[0] == a.float().max()


def language():
    """What every name of triton.language means now."""
    places = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)
    return {(p, n): inspect.getattr_static(p, n) for p in places for n in dir(p) if n != "__annotations__"}


@triton.jit
def doubled(x):
    return tl.sum(tl.reshape(x + tl.zeros_like(x), (1, 4)), axis=0) * 2


@triton.jit
def nested_kernel(a, failing: tl.constexpr):
    at = tl.arange(0, 4)
    tl.store(a + at, doubled(tl.load(a + at)))
    tl.static_assert(not failing, "as asked")


@pytest.mark.parametrize("seed", [None, 0])
def test_the_language_is_as_before_after_a_launch(seed):
    a, before = torch.arange(4.0), language()
    with interpreter.schedule(seed):
        nested_kernel[(2,)](a, False)
        assert language() == before
        with pytest.raises(AssertionError, match="as asked"):
            nested_kernel[(1,)](a, True)
    assert language() == before
    assert a.tolist() == [0, 8, 16, 24]


def test_a_launch_patches_once(monkeypatch):
    patches, patch = [], interpreter.stock._patch_lang
    monkeypatch.setattr(interpreter.stock, "_patch_lang", lambda fn: patches.append(fn) or patch(fn))
    nested_kernel[(3,)](torch.arange(4.0), False)
    assert len(patches) == 1


def test_installing_again_changes_nothing():
    before = interpreter.stock._patch_lang, interpreter.stock.GridExecutor
    interpreter.install()
    assert (interpreter.stock._patch_lang, interpreter.stock.GridExecutor) == before


# Schedules


@triton.jit
def barrier(counter):
    """All programs of the grid wait for each other: what they add makes 2^31 together, and so flips the sign bit.

    The next barrier flips it back: the counter needs no reset.
    """
    tl.debug_barrier()
    step = tl.where(tl.program_id(0) == 0, -2147483647 - tl.num_programs(0), 1)
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
    """Each program sums what all wrote, twice: the second round overwrites what the first has read."""
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
    return out.tolist()


RIGHT = [PROGRAMS * sum(range(1, PROGRAMS + 1))] * PROGRAMS


def test_a_grid_barrier_holds_under_any_schedule_and_resets_itself():
    counter = torch.zeros(1, dtype=torch.int32)
    for seed in range(8):
        with interpreter.schedule(seed):
            assert run_twice(counter) == RIGHT
        assert counter.item() == 0


@pytest.mark.parametrize("seeds", [range(0, 6, 2), range(1, 7, 2)], ids=["uniform", "sticky"])
def test_a_deleted_barrier_is_noticed(seeds):
    counter = torch.zeros(1, dtype=torch.int32)
    with interpreter.replaced(barrier, no_barrier):
        for seed in seeds:
            with interpreter.schedule(seed):
                assert run_twice(counter) != RIGHT
    with interpreter.schedule(0):
        assert run_twice(counter) == RIGHT


@triton.jit
def order_kernel(counter, order, N: tl.constexpr):
    for _ in range(N):
        tl.store(order + tl.atomic_add(counter, 1), tl.program_id(0) + 10 * tl.program_id(1))


def order_of_programs(seed, rounds=16):
    order = torch.empty(4 * rounds, dtype=torch.int32)
    with interpreter.schedule(seed):
        order_kernel[(2, 2)](torch.zeros(1, dtype=torch.int32), order, rounds)
    return order.tolist()


def test_a_seed_decides_the_order():
    assert order_of_programs(None) == sorted(order_of_programs(None), key=[0, 10, 1, 11].index)
    orders = [order_of_programs(seed) for seed in range(8)]
    assert orders == [order_of_programs(seed) for seed in range(8)]
    assert len(set(map(tuple, orders))) == 8
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_odd_seeds_stay_with_a_program():
    def changes(seed):
        return sum(a != b for a, b in itertools.pairwise(order_of_programs(seed, rounds=32)))

    assert max(map(changes, range(1, 8, 2))) < min(map(changes, range(0, 8, 2)))


def test_schedules_end_with_their_block():
    sequential = order_of_programs(None)
    with pytest.raises(KeyError), interpreter.schedule(0):
        raise KeyError
    order = torch.empty(64, dtype=torch.int32)
    order_kernel[(2, 2)](torch.zeros(1, dtype=torch.int32), order, 16)
    assert order.tolist() == sequential


@triton.jit
def wait_kernel(flag):
    while tl.atomic_add(flag, 0) == 0:
        tl.debug_barrier()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_livelock_is_an_error(seed):
    flag = torch.zeros(1, dtype=torch.int32)
    with interpreter.schedule(seed, limit=500), pytest.raises(interpreter.LivelockError, match="500 atomics"):
        wait_kernel[(4,)](flag)
    with interpreter.schedule(seed, limit=500):
        wait_kernel[(4,)](flag.fill_(1))


@triton.jit
def failing_kernel(counter, done, flag):
    program = tl.program_id(0)
    tl.atomic_add(counter, 1)
    tl.static_assert(program != 2, "the third program fails")  # the interpreter's is an assert, at run time
    while tl.atomic_add(flag, 0) == 0:
        tl.debug_barrier()
    tl.store(done, 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_failure_of_one_program_ends_all(seed):
    counter, done, flag = torch.zeros(3, 1, dtype=torch.int32)
    with interpreter.schedule(seed), pytest.raises(AssertionError, match="the third program fails"):
        failing_kernel[(4,)](counter, done, flag)
    assert done.item() == 0
    assert interpreter.stock.interpreter_builder.interleaving is None


# Guard zones


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 3, 7), (0, 4)])
def test_guarded_tensors_are_poisoned_and_aligned(dtype, shape):
    t = interpreter.guarded(shape, dtype)
    assert t.shape == shape and t.dtype == dtype and t.is_contiguous() and t.data_ptr() % 16 == 0
    assert bool((t.isnan() if dtype.is_floating_point else t == -1).all())
    interpreter.check_guards([t, interpreter.guarded(shape, dtype, fill=0)])
    assert not interpreter.guarded(shape, dtype, fill=0).any()


@triton.jit
def fill_kernel(out, n, value, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, value, mask=at < n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stray_writes_are_noticed(dtype):
    fine, t = interpreter.guarded((3, 5), dtype), interpreter.guarded((3, 7), dtype)
    fill_kernel[(4,)](t, 21, 1, 8)
    interpreter.check_guards([fine, t])
    fill_kernel[(4,)](t, 23, 1, 8)
    with pytest.raises(AssertionError, match=r"tensor 1, of shape \(3, 7\) .* 2 elements .* from element 21 to 22"):
        interpreter.check_guards([fine, t])


def test_writes_before_the_start_and_of_nan_are_noticed():
    t = interpreter.guarded((3, 7), torch.float32)
    negative_nan = torch.tensor([-0x400000], dtype=torch.int32).view(torch.float32)  # what inf - inf is on many CPUs
    torch.as_strided(t, (1,), (1,), t.storage_offset() - 2).copy_(negative_nan)
    with pytest.raises(AssertionError, match="from element -2 to -2"):
        interpreter.check_guards([t])


def test_unmasked_reads_are_noticed():
    a = interpreter.guarded_like(torch.randn(21))
    out = torch.empty(32)
    copy_kernel[(4,)](a, out, 32, 8)
    assert torch.equal(out[:21], a) and bool(out[21:].isnan().all())


def test_guarded_copies_keep_their_layout():
    m = torch.randn(6, 8)
    for t in (m, m.mT, m[:, :5], m[0], m[:, 0], torch.randn(2, 3, 4), torch.tensor(1.0), torch.ones(2, 3).bfloat16()):
        copy = interpreter.guarded_like(t.requires_grad_())
        assert torch.equal(copy, t) and copy.stride() == t.stride() and copy.dtype == t.dtype
        assert copy.data_ptr() % 16 == 0 and not copy.requires_grad
        interpreter.check_guards([copy])


def test_gaps_between_rows_are_guarded():
    copy = interpreter.guarded_like(torch.zeros(6, 8)[:, :5])
    torch.as_strided(copy, (1,), (1,), copy.storage_offset() + 5).fill_(1)
    with pytest.raises(AssertionError, match="from element 5 to 5"):
        interpreter.check_guards([copy])


def test_a_tensor_without_guards_is_no_proof():
    with pytest.raises(ValueError, match="was not made by guarded"):
        interpreter.check_guards([torch.zeros(3)])


# Mutants


@triton.jit
def transpose_kernel(a, out, n, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    inside = (row < n) & (column < n)
    x = tl.load(a + row * n + column, mask=inside)
    tl.store(
        out + row * n + column,
        tl.trans(x),
        mask=inside,
    )


def run_transpose(kernel=transpose_kernel):
    a, out = interpreter.guarded_like(torch.randn(5, 5)), interpreter.guarded((5, 5), torch.float32)
    kernel[(1,)](a, out, 5, 8)
    interpreter.check_guards([out])
    return bool(torch.equal(out, a.mT))


def test_textual_mutants():
    assert run_transpose()
    with interpreter.mutated(transpose_kernel, "tl.trans(x)", "x"):
        assert not run_transpose()
    with interpreter.mutated(transpose_kernel, "        mask=inside,\n    )", "    )"), pytest.raises(AssertionError):
        run_transpose()
    assert run_transpose()


def test_mutants_are_seen_by_whatever_name_a_kernel_has():
    table = {"transpose": transpose_kernel}
    with interpreter.mutated(transpose_kernel, "tl.trans(x)", "x"):
        assert not run_transpose(table["transpose"])


def test_textual_mutants_of_helpers():
    a = torch.arange(4.0)
    with interpreter.mutated(doubled, "* 2", "* 3"):
        nested_kernel[(1,)](a, False)
    assert a.tolist() == [0, 3, 6, 9]


def test_textual_mutants_are_rewritten_as_kernels_are():
    """In which a variable that starts as a constant is a tensor."""
    out = torch.tensor([7], dtype=torch.int32)
    with interpreter.mutated(range_kernel, "in range(0, n, step)", "in range(0, n, 1)"):
        range_kernel[(1,)](out, 10, 2)
    assert out.item() == sum(range(10)) + sum(range(0, 7, 2))


def test_a_mutant_needs_its_fragment_once():
    for fragment, times in (("tl.zeros", 0), ("row * n + column", 2)):
        with (
            pytest.raises(AssertionError, match=f"occurs {times} times in transpose_kernel"),
            interpreter.mutated(transpose_kernel, fragment, "x"),
        ):
            pass


def test_mutants_end_with_their_block_even_by_an_error():
    with pytest.raises(KeyError), interpreter.mutated(transpose_kernel, "tl.trans(x)", "x"):
        raise KeyError
    assert run_transpose()


def test_a_mutant_in_which_a_program_skips_the_barrier_is_a_livelock():
    old = "    barrier(counter)\n    tl.store(out"
    with (
        interpreter.mutated(twice_kernel, old, "    if program != 3:\n        barrier(counter)\n    tl.store(out"),
        interpreter.schedule(0, limit=5000),
        pytest.raises(interpreter.LivelockError),
    ):
        run_twice(torch.zeros(1, dtype=torch.int32))
