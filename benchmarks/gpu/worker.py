"""One process of a GPU job: the steps of a part, or every n-th of them, written to a log.

A step that raises is a line of the log. Where it has broken the device's context, or takes longer than any should, the process
ends, and `job` starts another one at the next step: what a kernel does to its process stays there.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import interp_nn
from benchmarks.gpu import cases, checks, kernels, runs
from benchmarks.gpu.log import Log, common
from interp_nn.engines import devices

LOST = 3  # the exit status of a process whose device has failed
_STEP_SECONDS = 180.0  # far more than any step needs, its compilations included


class Settings(NamedTuple):
    """What a part may know: the device, the job's folder, whether everything is to be small, the engines with kernels."""

    device: torch.device
    output: Path
    tiny: bool
    engines: tuple[str, ...]


class Step(NamedTuple):
    """A named piece of a part; it may take `seconds` before the process is given up."""

    name: str
    run: Callable[[Log], None]
    seconds: float = _STEP_SECONDS


def _correctness(settings: Settings) -> list[Step]:
    engines, device = settings.engines, settings.device
    small: dict[str, Any] = {"elements": 2**13, "d": 32, "dtype": torch.float32} if settings.tiny else {}
    return [
        Step("poison", partial(checks.check_poison, engines, device)),
        Step("far rows", partial(checks.check_far_rows, engines, device, **small)),
        *(
            Step(case.name, partial(checks.check_case, case, engines, device))
            for case in (cases.tiny_cases() if settings.tiny else cases.cases())
        ),
    ]


def _launches(settings: Settings) -> list[Step]:
    return [Step(f"launches {name}", partial(runs.count_launches, name, settings.device)) for name in settings.engines]


def _repeats(settings: Settings) -> list[Step]:
    engines, device = settings.engines, settings.device
    if settings.tiny:
        return [Step(f"repeats {name}", partial(runs.repeat, name, runs.TINY, 2, device)) for name in engines]
    shapes = [runs.MIDDLE, runs.LARGE, runs.EXACT, runs.SMALL]
    repeated = [
        Step(f"repeats {shape.name}, {name}", partial(runs.repeat, name, shape, 1000, device), 300)
        for shape in shapes[:3]
        for name in engines
    ]
    alternating = [
        Step(f"alternating shapes, {name}", partial(runs.alternate, name, shapes, 200, device)) for name in engines
    ]
    return [*repeated, *alternating]


def _streams(settings: Settings) -> list[Step]:
    return [
        Step(f"streams {shape.name}, {name}", partial(runs.on_streams, name, shape, 100, settings.device))
        for shape in (runs.SMALL, runs.MIDDLE, runs.LARGE)
        for name in settings.engines
    ]


def _graphs(settings: Settings) -> list[Step]:
    return [
        Step(f"graphs {shape.name}, {name}", partial(runs.in_graphs, name, shape, 100, settings.device))
        for shape in (runs.MIDDLE, runs.SMALL)
        for name in settings.engines
    ]


def _sanitizer(settings: Settings) -> list[Step]:
    engines, device = settings.engines, settings.device

    def step(tool: str, share: float) -> Step:
        return Step(tool, lambda log: runs.sanitize(tool, engines, device, max(1.0, share * log.left()), log), 1e6)

    return [*_small(settings), step("memcheck", 0.5), step("racecheck", 1.0)]


def _small(settings: Settings) -> list[Step]:
    return [
        Step(f"small problems, {name}", partial(runs.run_small, name, settings.device), 1e6)
        for name in settings.engines
    ]


def _tune(settings: Settings) -> list[Step]:
    from interp_nn import tuning

    def tune(log: Log) -> None:
        if "triton" not in settings.engines:
            log.write("tune", "skipped", why="only the kernels of the triton engine have tiles to choose")
            return
        path = settings.output / "table.json"
        with log.guarded("tune"):
            table = tuning.tune(path, log.left(), settings.device)
            log.write("tune", "ok", table=str(path), **{name: len(table[name]) for name in ("kernels", "engines")})

    return [Step("tune", tune, 1e6)]


def _time(settings: Settings) -> list[Step]:
    from benchmarks.gpu import timings

    engines, device, problems = settings.engines, settings.device, timings.problems()
    if settings.tiny:
        return [
            Step(problem.name, partial(timings.check_problem, problem, engines, device))
            for problem in timings.tiny_problems()
        ]

    def timed(problem: timings.Problem, place: int) -> Step:
        def run(log: Log) -> None:
            # What is left is shared by what is left; compiling and warming up have half of it.
            timings.time_problem(problem, engines, device, max(0.2, 0.5 * log.left() / (len(problems) - place)), log)

        return Step(problem.name, run)

    return [
        Step("rates", partial(timings.rates, device, "start")),
        *([Step("barrier", partial(timings.barrier, device))] if "triton" in engines else []),
        *(
            Step(problem.name, partial(timings.time_host, problem, engines, device))
            for problem in timings.host_problems()
        ),
        *(timed(problem, place) for place, problem in enumerate(problems)),
        Step("rates at the end", partial(timings.rates, device, "end")),
    ]


def _compile_runs(settings: Settings) -> list[Step]:
    """Triton's kernels of the parts that run one after another, compiled by several processes first."""
    if "triton" not in settings.engines:
        return []
    device, tasks = settings.device, []
    for shape in (runs.MIDDLE, runs.LARGE, runs.EXACT, runs.SMALL, runs.TINY):
        for wide in (False, True):
            names = (
                ("summary", "pair") if wide else ("summary", "pair", "pair loss", "latent head loss", "flat head loss")
            )
            tasks += [(shape._replace(n=min(shape.n, 20000)), wide, name) for name in names]

    def step(shape: runs.Shape, wide: bool, name: str) -> Step:
        def run(log: Log) -> None:
            with interp_nn.use_engine("triton"):
                runs.workload(shape, device, wide)[name]()
            log.write(f"{'wide ' * wide}{name} {shape.name}", "ok")

        return Step(f"{'wide ' * wide}{name} {shape.name}", run)

    return [step(*task) for task in tasks]


def _compile_times(settings: Settings) -> list[Step]:
    from benchmarks.gpu import timings

    if "triton" not in settings.engines:
        return []

    def step(problem: timings.Problem) -> Step:
        return Step(problem.name, partial(timings.compile_kernels, problem, settings.device))

    return [step(problem) for problem in timings.problems() if problem.what in ("loss", "head", "both")]


PARTS: dict[str, Callable[[Settings], list[Step]]] = {
    "correctness": _correctness,
    "launches": _launches,
    "repeats": _repeats,
    "streams": _streams,
    "graphs": _graphs,
    "sanitizer": _sanitizer,
    "small": _small,
    "tune": _tune,
    "time": _time,
    "compile runs": _compile_runs,
    "compile times": _compile_times,
}


def work(steps: list[Step], log: Log, device: torch.device, first: int, position: Path | None) -> int:
    """Run the steps from the first on; the exit status. `position` holds the number of the one at hand."""
    for place, step in enumerate(steps):
        if place < first:
            continue
        if position is not None:
            position.write_text(str(place), encoding="utf-8")
        if log.left() < 0:
            log.write(step.name, "skipped", why="out of time")
            continue
        faulthandler.dump_traceback_later(step.seconds, exit=True, file=sys.__stderr__ or sys.stderr)
        bad, start = log.bad, time.monotonic()
        with log.guarded(step.name):
            step.run(log)
        faulthandler.cancel_dump_traceback_later()
        print(f"{step.name}: {time.monotonic() - start:.1f} s{' BAD' * (log.bad > bad)}", flush=True)
        if log.bad > bad and _lost(device, log, step.name):
            return LOST
    return 0


def _lost(device: torch.device, log: Log, name: str) -> bool:
    """Whether the device no longer answers this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        log.write(name, "failed", why=f"the device is lost to this process: {error}"[:500])
        return True
    return False


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--output", type=Path, default=Path("."))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engines", help="those with kernels, with commas (default: the ones that are on here)")
    parser.add_argument("--share", default="0/1", help="i/n: every n-th step from the i-th on")
    parser.add_argument("--first", type=int, default=0, help="the first step of the share to run")
    parser.add_argument("--position", type=Path)
    parser.add_argument("--revision")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if given.device == "cpu" and devices.interpreting():
        torch.set_num_threads(1)
    device = torch.device(given.device, torch.cuda.current_device()) if given.device == "cuda" else torch.device("cpu")
    share, shares = map(int, given.share.split("/"))
    log = Log(given.log, given.part, given.seconds, common(device, given.revision) | {"share": given.share})
    engines = kernels.at_hand(device.type) if given.engines is None else tuple(given.engines.split(","))
    steps = PARTS[given.part](Settings(device, given.output, given.tiny, engines))[share::shares]
    print(f"{given.part} {given.share}: {len(steps)} steps, pid {os.getpid()}", flush=True)
    return work(steps, log, device, given.first, given.position)


if __name__ == "__main__":
    sys.exit(main())
