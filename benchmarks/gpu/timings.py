"""The timing part: `measure` by each clock of a GPU, the cost of a barrier, and which engine is the fastest.

Few rows are timed by the host's share alone, the others by events and by graphs. The fastest engine is a line of its own, with
the entry that a table of `interp_nn.engines.triton.configs` would have for it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.log import Log
from benchmarks.records.rows import Row
from benchmarks.timing import clocks, cuda_graphs, providers, training_suite
from benchmarks.timing.clocks import Limit
from benchmarks.timing.measure import Asked, calling, measure
from benchmarks.timing.operator_suite import ceiling
from benchmarks.timing.problems import DTYPES, Problem, datasets, products
from benchmarks.timing.reference_networks import ARCHITECTURES
from interp_nn import engines
from interp_nn.engines import barrier as barrier_counters
from interp_nn.engines.devices import spec_of, table_capability
from interp_nn.engines.limits import padded

NAMES = (
    "ours", "ours-eager", "ours-triton", "ours-cuda", "kernel-triton", "kernel-cuda", "linear", "unfused", "assoc-a", "assoc-b",
    "assoc-c", "best-eager", "inverse-inv",
)  # fmt: skip
SHAPES = ((65536, 1024, 128), (65536, 512, 64), (4096, 512, 100), (32, 512, 100))
HEADS = ((65536, 512, 100, 10), (4096, 512, 100, 10))
TINY = [(Problem("summary", 9, 20, 6), mode) for mode in ("infer", "bwd", "fwdbwd")]
TINY += [(Problem("cross_entropy", 9, 20, 6), "loss"), (Problem("head", 9, 20, 6, 3), "loss")]
# The first problems to be timed on a GPU, and their rivals.
SIX = (
    (Problem("summary", 65536, 512, 64, None, "bf16"), "infer"), (Problem("summary", 65536, 512, 64, None, "bf16"), "fwdbwd"),
    (Problem("cross_entropy", 65536, 512, 64, None, "bf16"), "loss"),
    (Problem("summary", 65536, 1024, 128, None, "bf16"), "fwdbwd"),
    (Problem("summary", 4096, 512, 100, None, "bf16"), "fwdbwd"), (Problem("head", 65536, 512, 100, 10, "bf16"), "loss"),
)  # fmt: skip
RIVALS = ("ours", "kernel-triton", "kernel-cuda", "linear", "unfused", "inverse-inv", "compile")
NETWORKS = tuple(ARCHITECTURES)
HOST = tuple((Problem("summary", 32, 512, 100, None, "bf16"), mode) for mode in ("infer", "fwdbwd"))
_TABLE = {"fwdbwd": "summary", "cross_entropy": "pair_loss", "head": "head_loss"}  # kinds of problems in a tuned table


def problems() -> list[tuple[Problem, str]]:
    """Return all problems with their modes, the most important first."""
    out = []
    for dtype in ("bf16", "fp32"):
        out += [(Problem("cross_entropy", *shape, None, dtype), "loss") for shape in SHAPES]
        out += [(Problem("head", *shape, dtype), "loss") for shape in HEADS]
        out += [
            (Problem("summary", *shape, None, dtype), mode) for mode in ("fwdbwd", "infer", "bwd") for shape in SHAPES
        ]
    return out


def names_of(on: Sequence[str], names: Sequence[str] = NAMES) -> list[str]:
    """Return the providers of the engines that are on, and the baselines."""
    off = {name for name in engines.ENGINES[1:] if name not in on}
    return [name for name in names if not name.endswith(tuple(f"-{engine}" for engine in off))]


def train(name: str, on: Sequence[str], device: torch.device, tiny: bool, log: Log) -> None:
    """Time training steps of a reference network."""
    timer = "wall" if device.type == "cpu" else "events"
    asked = Asked(device, timer, seconds=0.0 if tiny else 6.0, samples=3, limit=Limit(log.left() / 60))
    names = ("ours", "linear", "unfused") if tiny else training_suite.PROVIDERS  # not in Triton's interpreter
    training_suite.run(names_of(on, names), asked, log, [name])


def time_problem(
    problem: Problem, mode: str, on: Sequence[str], device: torch.device, timers: Sequence[str], seconds: float, log: Log,
    names: Sequence[str] = NAMES,
) -> None:  # fmt: skip
    """Time every provider of a problem by each clock, then write which engine is the fastest by the first one."""
    first = len(log.rows)
    for timer in timers:
        asked = Asked(
            device, timer, cold=timer != "host" and device.type == "cuda", seconds=seconds / len(timers), samples=5,
            limit=Limit(log.left() / 60), profile=False,
        )  # fmt: skip
        with products(problem.dtype):
            measure(problem, (mode,), names_of(on, names), asked, None, log)
    timed = [row for row in log.rows[first:] if row["timer"] == timers[0] and row["status"] == "ok"]
    found = fastest({engine: row for row in timed if (engine := providers.OURS.get(row["provider"]))})
    log.write(f"{problem.name} {mode}, {timers[0]}", "info", **found, entry=table_entry(problem, mode, device, found))


def fastest(found: dict[str, Row]) -> Row:
    """Return the engine with the least median, and whether most of its samples are below most of every other's."""
    best = min(found, key=lambda name: found[name]["ms_p50"], default=None)
    others = [row["ms_p20"] for name, row in found.items() if name != best]
    clear = best is not None and all(found[best]["ms_p80"] < other for other in others)
    return {"fastest": best, "clear": clear, "microseconds": {n: round(1e3 * r["ms_p50"], 2) for n, r in found.items()}}


def table_entry(problem: Problem, mode: str, device: torch.device, found: Row) -> Row | None:
    """Return what a tuned table would say of this problem and of more rows; None where no engine is clearly faster."""
    kind, spec = _TABLE.get(mode) or _TABLE.get(problem.op), spec_of(device)
    if kind is None or spec is None or not found["clear"]:
        return None
    return {
        "problem": kind, "capabilities": [list(table_capability(spec.capability) or spec.capability)],
        "itemsize": DTYPES[problem.dtype].itemsize, "columns": padded(problem.k),
        "classes": padded(problem.m or (problem.k if problem.loss else 1)), "rows": problem.n,
        "engine": found["fastest"], "microseconds": found["microseconds"],
    }  # fmt: skip


def compile_kernels(problem: Problem, mode: str, device: torch.device, log: Log) -> None:
    """Call the triton engine once, so that Triton's cache has the kernels before they are timed."""
    sets = datasets(problem, device, 1)
    with products(problem.dtype):
        for name in ("ours-triton", "kernel-triton"):
            provider = providers.build(name, problem, mode, sets, "triton", None)
            with provider.using():
                calling(provider, mode, sets)(0)
    log.write(f"{problem.name} {mode}")


def rates(device: torch.device, when: str, log: Log) -> None:
    """Measure the device's rates, in bf16 and in fp32."""
    for dtype in ("bf16", "fp32"):
        ceiling(dtype, when, Asked(device, "events", cold=True), log)


def empty_launch(some: Tensor, phases: int) -> None:
    """Launch the phased forward on no rows, a program a multiprocessor: with phases 7 it has two barriers, with 4 none.

    All pointers of the launch point at `some`, so that nothing is allocated.
    """
    from interp_nn.engines.triton import launcher, phased

    device = some.device
    spec = spec_of(device)
    assert spec is not None
    constants: Any = {"FORM": "B", "PRECISION": "tf32", "PHASES": phases, "BN": 64, "BK": 64, "BD": 32}
    options = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True, "launch_cooperative_grid": True}
    made = launcher.Launch(phased.phased_forward, spec.multiprocessors, 1, constants | options)
    launcher.launch(
        made, device, some, some, None, None, some, some, some, barrier_counters.counter(device), 0, 0, 0, 16, 1
    )


def barrier(device: torch.device, log: Log) -> None:
    """Measure a barrier, an empty launch, and the host's share of a launch."""
    times, some = 50, torch.zeros(16, 16, dtype=torch.bfloat16, device=device)

    def launches(phases: int) -> None:
        for _ in range(times):
            empty_launch(some, phases)

    graphs = {phases: cuda_graphs.capture(functools.partial(launches, phases), device)[0] for phases in (7, 4)}
    samplers = {str(phases): clocks.on_events(graph.replay, times) for phases, graph in graphs.items()}
    taken = clocks.rounds(samplers, 1.0, 20, 60)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    launches(4)
    host = (time.perf_counter() - begin) / times
    torch.cuda.synchronize()
    two, none = (1e3 * clocks.summary(taken[phases]).p50 for phases in ("7", "4"))
    log.write("barrier", "info", barrier_us=(two - none) / 2, empty_launch_us=none, host_launch_us=host * 1e6)
