"""Mistakes that must be caught: what the emulator is strict about, and what the tests look at, is all needed."""

import ctypes

import mirror_build
import pytest
import torch
from cases import Case, Guarded, Problem
from support import errors

SEEDS = range(4)


def pointer(t):
    return ctypes.c_void_p((t.tensor if isinstance(t, Guarded) else t).data_ptr())


class Library:
    """A build of single.cpp, run on one forward and one backward problem."""

    def __init__(self, library):
        self.library = library
        for function in (library.forward, library.pair_backward):
            function.restype = ctypes.c_char_p
        library.work_floats.restype = ctypes.c_int64
        library.conflicts.restype = ctypes.c_long

    def forward(self, seed):
        problem = Problem(Case("BF16", 300, 200, 64))
        n, d, k, _ = problem.sizes
        results = [problem.empty(n, k), problem.empty(n, k), problem.empty(k, k)]
        given = [pointer(problem.inputs[key]) for key in ("x", "b")]
        error = self.library.forward(*given, *map(pointer, results), ctypes.c_int64(n), d, k, seed)
        p, y, g = problem.forward(True)
        return self.verdict(error, results, [p, y - problem.bias.double(), g])

    def backward(self, seed):
        problem = Problem(Case("BF16", 300, 200, 64))
        n, d, k, _ = problem.sizes
        p, _, g = (t.to(problem.dtype) for t in problem.forward(True))
        results = [problem.empty(n, d), problem.empty(d, k)]
        rows = torch.full((n, k), float("nan"), dtype=problem.dtype)
        size = self.library.work_floats(ctypes.c_int64(n), d, k)
        work = torch.full((size,), float("nan"))
        kept = Guarded(p.shape, p.dtype, p), Guarded(g.shape, g.dtype, g)
        given = [problem.inputs["x"], problem.inputs["b"], *kept, problem.inputs["dp"], problem.inputs["dy"]]
        pointers = map(pointer, [*given, *results, rows, work])
        error = self.library.pair_backward(*pointers, ctypes.c_int64(n), d, k, seed)
        return self.verdict(error, results, problem.pair_backward(True, p, g))

    def verdict(self, error, results, exact):
        """What is wrong, or None."""
        if error is not None:
            return error.decode()
        for got, truth in zip(results, exact, strict=True):
            try:
                got.check()
            except AssertionError as mistake:
                return str(mistake)
            if max(errors(got.tensor, truth)) > 0.02:
                return "wrong numbers"
        return "bank conflicts" if self.library.conflicts() else None

    def found(self):
        return [self.forward(seed) for seed in SEEDS], [self.backward(seed) for seed in SEEDS]


MUTANTS = {
    "wait_too_shallow": ("tiles.h", "wait_copies(stages - 2);", "wait_copies(stages - 1);", "both", "wrong numbers"),
    "no_wait_at_all": ("tiles.h", "wait_copies(stages - 2);", "", "both", "wrong numbers"),
    "sync_of_a_step_removed": (
        "tiles.h",
        "block_barrier();  // everyone's copies of this step are here, and everyone is done with the stage loaded next",
        "",
        "both",
        "wrong numbers",
    ),
    "sync_of_gram_removed": ("forward.h", "block_barrier();  // G is whole", "", "forward", "wrong numbers"),
    "wrong_lane_of_a_matrix": ("fragments.h", "tile.chunk(row + (l & 15)", "tile.chunk(row + (l & 7)", "both", None),
    "no_exchange_of_chunks": ("tiles.h", "((chunk & 7) ^ exchange(row))", "(chunk & 7)", "both", "bank conflicts"),
    "row_too_many_stored": ("forward.h", "r < rows) store_two(at_y", "r <= rows) store_two(at_y", "forward", "outside"),
    "row_too_many_loaded": (
        "tiles.h",
        "row < rows && column < columns",
        "row <= rows && column < columns",
        "backward",
        None,
    ),
    "column_too_many_loaded": (
        "tiles.h",
        "row < rows && column < columns",
        "row < rows && column <= columns",
        "forward",
        "wrong numbers",
    ),
    "grid_barrier_removed": (
        "pair_backward.h",
        "grid_barrier(arguments.counter);  // before db",
        "",
        "backward",
        "wrong numbers",
    ),
    "square_not_symmetric": ("grid.h", "t[i] + t[column * BK + row]", "2 * t[i]", "backward", "wrong numbers"),
    "barrier_one_program_short": (
        "primitives.h",
        "static_cast<uint32_t>(programs() - 1) : 1u",
        "static_cast<uint32_t>(programs() - 2) : 1u",
        "backward",
        None,
    ),
    "barrier_waits_for_ever": (
        "primitives.h",
        "static_cast<uint32_t>(programs() - 1) : 1u",
        "static_cast<uint32_t>(programs()) : 1u",
        "backward",
        "deadlock",
    ),
}


def test_unpatched(tmp_path):
    library = Library(mirror_build.build_mutant(tmp_path, "unpatched", []))
    assert library.found() == ([None] * len(SEEDS), [None] * len(SEEDS))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(tmp_path, name):
    file, text, replacement, where, expected = MUTANTS[name]
    library = Library(mirror_build.build_mutant(tmp_path, name, [(file, text, replacement)]))
    for kernel in ("forward", "backward"):
        if where in (kernel, "both"):
            verdicts = [getattr(library, kernel)(seed) for seed in SEEDS]
            assert any(verdicts), f"{name} survives in {kernel}"
            if expected is not None:
                assert any(verdict is not None and expected in verdict for verdict in verdicts), verdicts
