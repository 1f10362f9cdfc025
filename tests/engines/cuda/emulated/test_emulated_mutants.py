"""Mistakes that must be caught: what the emulator is strict about, and what the tests look at, is all needed."""

import ctypes

import emulator_build
import pytest
import torch
from cases import Case, Guarded, Problem
from support import errors

from interp_nn.engines import eager
from interp_nn.engines.problem import LossOptions, Plan

SEEDS = range(4)


def pointer(t):
    return ctypes.c_void_p((t.tensor if isinstance(t, Guarded) else t).data_ptr())


class Library:
    """A build of single.cpp, run on one forward, one backward and one loss."""

    def __init__(self, library):
        self.library = library
        for function in (library.forward, library.pair_backward, library.pair_loss):
            function.restype = ctypes.c_char_p
        for function in (library.backward_floats, library.loss_floats):
            function.restype = ctypes.c_int64
        library.conflicts.restype = ctypes.c_long

    def forward(self, seed):
        problem = Problem(Case("BF16", 300, 200, 64))
        n, d, k = problem.case[1:4]
        results = [problem.empty(n, k), problem.empty(n, k), problem.empty(k, k)]
        given = [pointer(problem.inputs[key]) for key in ("x", "b")]
        error = self.library.forward(*given, *map(pointer, results), ctypes.c_int64(n), d, k, seed)
        p, y, g = problem.forward(True)
        return self.verdict(error, results, [p, y - problem.bias.double(), g])

    def backward(self, seed):
        problem = Problem(Case("BF16", 300, 200, 64))
        n, d, k = problem.case[1:4]
        p, _, g = (t.to(problem.dtype) for t in problem.forward(True))
        results = [problem.empty(n, d), problem.empty(d, k)]
        kept = Guarded(p.shape, p.dtype, p), Guarded(g.shape, g.dtype, g)
        given = [problem.inputs["x"], problem.inputs["b"], *kept, problem.inputs["dp"], problem.inputs["dy"]]
        spaces = self.spaces(problem, self.library.backward_floats, 1)
        error = self.library.pair_backward(*map(pointer, [*given, *results, *spaces]), ctypes.c_int64(n), d, k, seed)
        return self.verdict(error, results, problem.pair_backward(True, p, g))

    def loss(self, seed):
        problem = Problem(Case("BF16", 300, 200, 12))
        n, d, k = problem.case[1:4]
        target = (torch.arange(n) % 13).where(torch.arange(n) % 13 < 12, -100)
        value, results = Guarded((1,), torch.float32), [problem.empty(n, d), problem.empty(d, k)]
        given = [problem.inputs["x"], problem.inputs["b"], target, value]
        spaces = self.spaces(problem, self.library.loss_floats, 3)
        error = self.library.pair_loss(*map(pointer, [*given, *results, *spaces]), ctypes.c_int64(n), d, k, seed)
        options = LossOptions((1.0, 1.0, 1.0), -100, "mean")
        x, b = problem.x.double(), problem.b.double()
        exact, grads = eager.loss(
            x, b, None, None, target, options, Plan("eager", "(Xb)G", saves=True), None, (True, True)
        )
        return self.verdict(error, [value, *results], [exact.view(1), *grads])

    @staticmethod
    def spaces(problem, floats, matrices):
        """The workspaces of a kernel: rows as wide as 16-byte words, and numbers in fp32."""
        n, d, k = problem.case[1:4]
        rows = torch.full((matrices, n, -(-k // 8) * 8), float("nan"), dtype=problem.dtype)
        return rows, torch.full((floats(ctypes.c_int64(n), d, k),), float("nan"))

    def verdict(self, error, results, exact):
        """What is wrong, or None."""
        if error is not None:
            return error.decode()
        for got, truth in zip(results, exact, strict=True):
            try:
                got.check()
            except AssertionError as mistake:
                return str(mistake)
            if not max(errors(got.tensor, truth)) < 0.02:
                return "wrong numbers"
        return "bank conflicts" if self.library.conflicts() else None

    def found(self, names):
        return {name: [getattr(self, name)(seed) for seed in SEEDS] for name in names}


KERNELS = {"forward": ("forward",), "backward": ("backward",), "loss": ("loss",), "both": ("forward", "backward")}
MUTANTS = {
    "wait_too_shallow": ("tiles.h", "wait_copies(stages - 2);", "wait_copies(stages - 1);", "both", "wrong numbers"),
    "no_wait_at_all": ("tiles.h", "wait_copies(stages - 2);", "", "both", "wrong numbers"),
    "sync_of_a_step_removed": (
        "tiles.h",
        "block_barrier();  // all copies of this step are done, and no thread reads the stage that is loaded next",
        "",
        "both",
        "wrong numbers",
    ),
    "sync_of_gram_removed": ("projection.h", "block_barrier();  // G is whole", "", "forward", "wrong numbers"),
    "wrong_lane_of_a_matrix": ("fragments.h", "tile.chunk(row + (l & 15)", "tile.chunk(row + (l & 7)", "both", None),
    "no_exchange_of_chunks": ("tiles.h", "((chunk & 7) ^ exchange)", "(chunk & 7)", "both", "bank conflicts"),
    "row_too_many_stored": (
        "tiles.h",
        "r < rows ? columns - c * PER_CHUNK : 0;\n        const unsigned char*",
        "r < rows + (rows > 0) ? columns - c * PER_CHUNK : 0;\n        const unsigned char*",
        "forward",
        "outside",
    ),
    "row_too_many_loaded": (
        "tiles.h",
        "r < rows ? columns - c * PER_CHUNK : 0;\n        const T*",
        "r <= rows ? columns - c * PER_CHUNK : 0;\n        const T*",
        "backward",
        None,
    ),
    "column_too_many_loaded": (
        "tiles.h",
        "copy_async<16>(to, source, inside > 0);",
        "copy_async<16>(to, source, inside > -PER_CHUNK);",
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
    "square_not_symmetric": (
        "grid.h",
        "t[row * BK + column] + t[column * BK + row]",
        "2 * t[row * BK + column]",
        "backward",
        "wrong numbers",
    ),
    "a_part_too_many_is_added": (
        "grid.h",
        "if (q < count) sums",
        "if (q <= count) sums",
        "backward",
        "wrong numbers",
    ),
    "barrier_of_the_losses_removed": (
        "pair_loss.h",
        "    grid_barrier(arguments.counter);\n    if (program()",
        "    if (program()",
        "loss",
        "wrong numbers",
    ),
    "barrier_of_the_losses_sums_removed": (
        "pair_loss.h",
        "grid_barrier(arguments.counter);  // before db",
        "",
        "loss",
        "wrong numbers",
    ),
    "ignored_rows_are_counted": (
        "cross_entropy.h",
        "sums.count += kept ? .25f : 0.f;",
        "sums.count += .25f;",
        "loss",
        "wrong numbers",
    ),
    "a_lanes_second_row_is_forgotten": ("cross_entropy.h", "exchange_rows(o2);", "", "loss", "wrong numbers"),
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
    library = Library(emulator_build.build_mutant(tmp_path, "unpatched", []))
    names = ("forward", "backward", "loss")
    assert library.found(names) == dict.fromkeys(names, [None] * len(SEEDS))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(tmp_path, name):
    file, text, replacement, where, expected = MUTANTS[name]
    library = Library(emulator_build.build_mutant(tmp_path, name, [(file, text, replacement)]))
    for kernel, verdicts in library.found(KERNELS[where]).items():
        assert any(verdicts), f"{name} survives in {kernel}"
        if expected is not None:
            assert any(verdict is not None and expected in verdict for verdict in verdicts), verdicts
