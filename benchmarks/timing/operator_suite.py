"""Suites `ops` and `polynomials`: the operator and its losses, and layers with polynomials, against the baselines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tqdm import tqdm

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

CPU_BUDGET = 150.0  # GFLOP of a forward and backward


class Wanted(NamedTuple):
    """The problems, modes and providers to time; problems of more GFLOP than `budget` are left out."""

    ops: Sequence[str] = OPS
    modes: Sequence[str] | None = None
    shapes: Sequence[tuple[int, ...]] | None = None
    dtypes: Sequence[str] = ("fp32",)
    providers: Sequence[str] = NAMES
    budget: float | None = None
    quick: bool = False


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
                for mode in modes:
                    for name in names:
                        fields = {**problem._asdict(), **asked.fields(), "mode": mode, "provider": name}
                        writer.write(**fields, status="skipped", note=why)
                continue
            with products(problem.dtype):
                measure(problem, modes, names, asked, rates[problem.dtype], writer)
    for dtype in dtypes:
        ceiling(dtype, "end", asked, writer)


def over(problem: Problem, budget: float | None) -> str | None:
    """Return why a problem is over a budget in GFLOP, None if it is not."""
    gflop = useful_flops(problem, "fwdbwd") / 1e9
    if budget is None or gflop <= budget:
        return None
    return f"over the FLOP budget: {gflop:.0f} of {budget:.0f} GFLOP"


def ceiling(dtype: str, when: str, asked: Asked, writer: Writer) -> Ceiling:
    """Measure the device's rates, and write their row."""
    with products(dtype):
        found = measure_rates(asked.device, dtype)
    writer.write(
        op="ceiling", provider="device", mode=when, dtype=dtype, n=0, d=0, k=0, **asked.fields(),
        gbps=found.bandwidth / 1e9, tflops=found.flops / 1e12, status="ok",
    )  # fmt: skip
    return found
