"""The real barrier, in one launch, under random interleavings of the programs; and mutants, which must be caught."""

import dataclasses

import harness
import pytest
import torch
from harness import Launches, forced, inputs, targets
from interpreter import LivelockError, mutated, schedule
from support import errors
from triton.runtime import interpreter as stock

from interp_nn import functional
from interp_nn.engines import orders
from interp_nn.engines.triton import backward, cross_entropy, engine, grid, head, phased, tiles

N, D, K, M = 70, 40, 20, 7
PROGRAMS = 5
TOLERANCE = 2e-6


def problem(name):
    """Return (inputs, function, upstream gradients) in fp64."""
    wide = name.startswith("wide")
    k = 140 if wide else K
    if name in ("summary", "wide summary"):
        given = [*inputs(N, D, k), torch.randn(k, dtype=torch.float64)]
        return given, functional.summary, [torch.randn(N, k, dtype=torch.float64)]
    if name in ("pair", "wide pair"):
        return inputs(N, D, k), harness.pair, [torch.randn(N, k, dtype=torch.float64) for _ in range(2)]
    target = targets(N, M if "head" in name else k)
    options = {"reduction": "none"} if "rows" in name else {}
    upstream = [torch.rand(N if options else (), dtype=torch.float64) + 0.5]
    if name.startswith("pair loss"):
        return inputs(N, D, k), harness.pair_loss(target, **options), upstream
    return inputs(N, D, k, M), harness.head_loss(target, **options), upstream


NAMES = ["summary", "pair", "wide summary", "wide pair", "pair loss", "pair loss of rows", "latent head", "flat head"]


def evaluate(name, dtype):
    torch.manual_seed(1)
    given, function, upstreams = problem(name)
    leaves = [t.to(torch.float32).to(dtype).requires_grad_() for t in given]
    out = function(*leaves)
    out = (out,) if isinstance(out, torch.Tensor) else out
    cotangents = [u.to(torch.float32).to(o.dtype) for u, o in zip(upstreams, out, strict=True)]
    return [*(o.detach() for o in out), *torch.autograd.grad(out, leaves, cotangents)]


@pytest.fixture
def run(monkeypatch):
    """run(name, seed) -> outputs and gradients, on a device with room for several programs."""

    def run(name, seed, scratch=False, phases=False, programs=PROGRAMS, rows=32):
        monkeypatch.setattr(orders, "head_order", lambda *_: f"logits_from_{name.split()[0]}".replace("flat", "x"))
        with monkeypatch.context() as patch, harness.device(patch, programs, True, scratch, rows), forced():
            launches = Launches(patch, phases)
            with schedule(seed):
                out = evaluate(name, torch.float32)
        assert all(int(word) in (0, -(2**31)) for word in launches.counters)
        return out

    return run


def worst(found, exact):
    return max(max(errors(f, e)) for f, e in zip(found, exact, strict=True))


@pytest.fixture
def exact():
    return lambda name: evaluate(name, torch.float64)


def equal(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_one_launch_under_random_schedules(name, run, exact):
    """The results are right, and the same bits in every schedule."""
    first = run(name, 0)
    assert worst(first, exact(name)) < TOLERANCE
    for seed in range(1, 4):
        assert equal(run(name, seed), first), seed


@pytest.mark.parametrize("name", ["pair loss", "latent head"])
def test_scratch_rows(name, run, exact):
    assert worst(run(name, 2, scratch=True), exact(name)) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_phase_by_phase(name, run, exact):
    """Phases exchange data only through workspaces: launched one by one, they give the same bits."""
    assert equal(run(name, None, phases=True), run(name, 0))


@pytest.mark.parametrize("name", NAMES)
def test_more_jobs_than_programs_and_more_programs_than_jobs(name, run, exact):
    assert worst(run(name, 1, programs=2, rows=16), exact(name)) < TOLERANCE
    assert worst(run(name, 1, programs=40, rows=16), exact(name)) < TOLERANCE


def test_the_counter_serves_launch_after_launch(run, monkeypatch):
    word = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(engine, "counter", lambda device: word)
    for seed in range(4):
        run(("pair", "flat head")[seed % 2], seed)
    assert int(word) in (0, -(2**31))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_overflows(name, run, exact, monkeypatch):
    """With TRITON_DEBUG=1 an overflow of 32-bit integers stops a kernel."""
    options = dataclasses.replace(stock.interpreter_builder.options, debug=True)
    monkeypatch.setattr(stock.interpreter_builder, "options", options)
    assert worst(run(name, 1), exact(name)) < TOLERANCE


@pytest.mark.parametrize("parity", ["uniform", "sticky"])
@pytest.mark.parametrize("name", NAMES)
def test_a_deleted_barrier_is_noticed(name, parity, run, exact):
    seeds = range(0, 8, 2) if parity == "uniform" else range(1, 9, 2)
    with mutated(grid.barrier, "    while (before ^ now) >= 0:\n", "    while False:\n"):
        assert any(not worst(run(name, seed), exact(name)) < TOLERANCE for seed in seeds)


def test_a_barrier_for_one_program_more_never_opens(run):
    old, new = "(1 - tl.num_programs(0))", "(0 - tl.num_programs(0))"
    with mutated(grid.barrier, old, new), pytest.raises(LivelockError):
        run("pair", 0)


MUTANTS = [
    ("summary", tiles.load_x, "inside(row, rn, n)[:, None]", "(rn >= 0)[:, None]"),
    ("pair", tiles.load_rows, "inside(row, rn, n)[:, None] & (rc[None, :] < WIDTH)", "inside(row, rn, n)[:, None]"),
    ("pair", tiles.store_rows, "inside(row, rn, n)[:, None] & (rc[None, :] < WIDTH)", "(rc[None, :] < WIDTH)"),
    ("summary", tiles.load_b, "rk[None, :] < K) & (rd[:, None] < d)", "rk[None, :] < K)"),
    ("summary", tiles.store_b, "(rd[:, None] < d) & (rk[None, :] < K)", "(rd[:, None] < d)"),
    ("pair", backward.symmetrized, "tl.load(T + at) + tl.trans(tl.load(T + at))", "2 * tl.load(T + at)"),
    ("latent head", head._symmetrized, "tl.trans(a), u2, t,", "tl.trans(u2), a, t,"),
    ("wide pair", phased.phased_backward, "b_column, 1, k, i, j", "b_column, k, 1, i, j"),
    ("pair", grid.add_parts, "q[:, None] < parts", "q[:, None] < parts + 1"),
    ("summary", backward.add_splits, "range(0, splits, BATCH)", "range(0, splits - 1, BATCH)"),
    ("pair loss", backward.store_db_tile, "db * scale", "db"),
    ("pair loss", cross_entropy.gradient_scale, "scale / tl.maximum", "scale * tl.maximum"),
    ("pair loss", cross_entropy.loss_terms, "loss = tl.where(kept, loss, 0.0)", "loss = loss + 0.0"),
    ("flat head", backward.add_to_part, "if not first:", "if first:"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kernel", "old", "new"), MUTANTS, ids=[f"{m[1].__name__}-{i}" for i, m in enumerate(MUTANTS)]
)
def test_a_mutant_is_noticed(name, kernel, old, new, run, exact):
    """A dropped mask, a T that is not symmetric, a stale workspace: the result is wrong, or a guard zone is written."""
    with mutated(kernel, old, new):
        assert noticed(lambda: worst(run(name, 2), exact(name)))


def noticed(error):
    """Return whether the error is too large, or a write was out of bounds."""
    try:
        return not error() < TOLERANCE
    except AssertionError as stray:
        return "elements outside it were written" in str(stray)
