"""Suites `ops` and `polynomials`: the operator and its losses, and layers with polynomials, against the baselines."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.records.report import REPEAT
from benchmarks.records.rows import Writer
from benchmarks.timing import custom
from benchmarks.timing.measure import Asked, measure
from benchmarks.timing.problems import (
    CLASSES,
    HEADS,
    LAYER_SHAPES,
    LAYERS,
    MODES,
    OPS,
    QUICK,
    SHAPES,
    SHAPES_OF_MICROBATCHES,
    Problem,
    products,
    useful_flops,
)
from benchmarks.timing.providers import NAMES, chosen
from benchmarks.timing.roofline import Ceiling
from benchmarks.timing.roofline import measure as measure_rates

CPU_BUDGET = 100.0  # GFLOP of a forward and backward
# From LARGE GFLOP on a CPU times only the main providers, in the modes that do not follow from others; all that are named.
LARGE = 10.0
_MAIN = ("ours", "linear", "unfused", "assoc-a", "best-eager", "compile", REPEAT)
_MAIN_OF_SUMMARY = (*_MAIN, "assoc-b", "inverse-inv")
_MAIN_MODES = ("fwdbwd", "infer", "loss")
# --quick times these, which neither compile nor factorize.
QUICK_NAMES = ("ours", "linear", "unfused", "assoc-a", "assoc-b", "assoc-c", "best-eager", "inverse-inv", REPEAT)


class Wanted(NamedTuple):
    """The problems, modes and providers to time; problems of more GFLOP than `budget` are left out.

    Problems of more than `large` GFLOP have their main providers, and their main modes unless `modes` names some.
    """

    ops: Sequence[str] = OPS
    modes: Sequence[str] | None = None
    shapes: Sequence[tuple[int, ...]] | None = None
    dtypes: Sequence[str] = ("fp32",)
    providers: Sequence[str] = NAMES
    budget: float | None = None
    quick: bool = False
    large: float | None = None


def problems(wanted: Wanted) -> Iterator[Problem]:
    """Yield the problems in each dtype, the small ones first. The fourth number of a head's shape is its classes."""
    own: dict[str, Sequence[tuple[int, ...]]] = {
        **dict.fromkeys(LAYERS, LAYER_SHAPES), "microbatches": SHAPES_OF_MICROBATCHES,
        "head": tuple((*shape, CLASSES) for shape in HEADS),
    }  # fmt: skip
    for op in wanted.ops:
        quick = own["head"][-1:] if op == "head" else QUICK
        for shape in wanted.shapes or (quick if wanted.quick else own.get(op, SHAPES)):
            if len(shape) == (4 if op == "head" else 3):
                for dtype in wanted.dtypes:
                    yield Problem.of(op, shape, dtype)


def run(wanted: Wanted, asked: Asked, writer: Writer) -> None:
    """Time all problems, between two measurements of the device's rates."""
    from tqdm import tqdm

    found = list(problems(wanted))
    dtypes = list(dict.fromkeys(problem.dtype for problem in found))
    rates = {dtype: ceiling(dtype, "start", asked, writer) for dtype in dtypes}
    with tqdm(found, unit="problem") as progress:
        for problem in progress:
            progress.set_description(problem.name)
            modes = [mode for mode in MODES[problem.op] if wanted.modes is None or mode in wanted.modes]
            names = chosen(
                [name for name in wanted.providers if custom.op_of(name) in (None, problem.op)], wanted.providers
            )
            if why := over(problem, wanted.budget) or asked.limit.over():
                _skip(problem, modes, names, why, asked, writer)
                continue
            timed: tuple[Sequence[str], Sequence[str]] = modes, names
            if wanted.large is not None and (gflop := _gflop(problem)) > wanted.large:
                timed = _kept(problem, modes, names, wanted.modes is None)
                why = f"{gflop:.0f} GFLOP, of {wanted.large:.0f} on timed only where --provider or --mode names it"
                _skip(problem, [mode for mode in modes if mode not in timed[0]], names, why, asked, writer)
                _skip(problem, timed[0], [name for name in names if name not in timed[1]], why, asked, writer)
            with products(problem.dtype):
                measure(problem, *timed, asked, rates[problem.dtype], writer)
    for dtype in dtypes:
        ceiling(dtype, "end", asked, writer)


def _kept(
    problem: Problem, modes: Sequence[str], names: Sequence[str], all_modes: bool
) -> tuple[Sequence[str], Sequence[str]]:
    main = _MAIN if problem.loss else _MAIN_OF_SUMMARY
    return [mode for mode in modes if mode in _MAIN_MODES or not all_modes], [name for name in names if name in main]


def _skip(problem: Problem, modes: Sequence[str], names: Sequence[str], why: str, asked: Asked, writer: Writer) -> None:
    for mode, name in itertools.product(modes, names):
        fields = {**problem._asdict(), **asked.fields(), "mode": mode, "provider": name}
        writer.write(**fields, status="skipped", note=why)


def _gflop(problem: Problem) -> float:
    return useful_flops(problem, "fwdbwd") / 1e9


def over(problem: Problem, budget: float | None) -> str | None:
    """Return why a problem is over a budget in GFLOP, None if it is not."""
    gflop = _gflop(problem)
    if budget is None or gflop <= budget:
        return None
    return f"over the FLOP budget: {gflop:.0f} of {budget:.0f} GFLOP"


def ceiling(dtype: str, when: str, asked: Asked, writer: Writer) -> Ceiling:
    """Measure the device's rates, and write their row."""
    with products(dtype):
        found = measure_rates(asked.device, dtype, min(1.0, asked.seconds))
    writer.write(
        op="ceiling", provider="device", mode=when, dtype=dtype, n=0, d=0, k=0, **asked.fields(),
        gbps=found.bandwidth / 1e9, tflops=found.flops / 1e12, status="ok",
    )  # fmt: skip
    return found
