"""One process of a GPU job: it runs the steps of a part, or every n-th of them, and writes a log.

A step that raises becomes a line of the log. A step that breaks the device's context or takes too long ends the process, and
`job` starts another one at the next step.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import interp_nn
from benchmarks.gpu import cases, checks, kernels, runs
from benchmarks.gpu.log import Log, common, lacked_time
from benchmarks.records import files
from benchmarks.timing.clocks import OUT_OF_TIME
from benchmarks.timing.problems import Problem
from interp_nn.engines import devices, verify

LOST = 3  # the exit status of a process that has lost its device
_STEP_SECONDS = 180.0  # far more than a step with its compilations needs


class Settings(NamedTuple):
    """The settings of a part: the device, the job's folder, whether its problems are tiny, the engines with kernels."""

    device: torch.device
    output: Path
    tiny: bool
    engines: tuple[str, ...]


class Step(NamedTuple):
    """A named piece of a part; after `seconds` its process is ended."""

    name: str
    run: Callable[[Log], None]
    seconds: float = _STEP_SECONDS


def _verify(settings: Settings) -> list[Step]:
    """Each usual kernel once, as at its first use; then the use itself."""
    variants = [variant for variant in verify.standard(settings.device) if variant.engine in settings.engines]
    if settings.tiny:
        verify._MOST_ROWS, variants = 61, variants[-7:-5]
    return [
        *(Step(f"verify {variant}", partial(checks.check_variant, variant, settings.device)) for variant in variants),
        Step("first use", partial(checks.check_first_use, settings.device)),
        *(
            Step(f"first use in a graph, {name}", partial(checks.check_capture, name, settings.device))
            for name in (settings.engines if settings.device.type == "cuda" else ())
        ),
    ]


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


def _each(part: str, check: Callable[..., None], settings: Settings, *shapes: runs.Shape, times: int) -> list[Step]:
    """Return a step for each shape and engine."""
    return [
        Step(f"{part} {shape.name}, {name}", partial(check, name, shape, times, settings.device), 300)
        for shape in shapes
        for name in settings.engines
    ]


def _launches(settings: Settings) -> list[Step]:
    return [Step(f"launches {name}", partial(runs.count_launches, name, settings.device)) for name in settings.engines]


def _repeats(settings: Settings) -> list[Step]:
    if settings.tiny:
        return _each("repeats", runs.repeat, settings, runs.TINY, times=2)
    shapes = [runs.MIDDLE, runs.LARGE, runs.EXACT, runs.SMALL]
    return [
        *_each("repeats", runs.repeat, settings, *shapes[:3], times=1000),
        *(
            Step(f"alternating shapes, {name}", partial(runs.alternate, name, shapes, 200, settings.device))
            for name in settings.engines
        ),
    ]


def _streams(settings: Settings) -> list[Step]:
    return _each("streams", runs.on_streams, settings, runs.SMALL, runs.MIDDLE, runs.LARGE, times=100)


def _graphs(settings: Settings) -> list[Step]:
    return _each("graphs", runs.in_graphs, settings, runs.MIDDLE, runs.SMALL, times=100)


def _sanitizer(settings: Settings) -> list[Step]:
    engines, device = settings.engines, settings.device

    def step(tool: str) -> Step:
        return Step(tool, lambda log: runs.sanitize(tool, engines, device, max(1.0, log.left()), log), 1e6)

    return [step("memcheck"), step("racecheck"), *_small(settings)]


def _small(settings: Settings) -> list[Step]:
    return [
        Step(f"small problems, {name}", partial(runs.run_small, name, settings.device), 1e6)
        for name in settings.engines
    ]


def _tune(settings: Settings) -> list[Step]:
    from interp_nn import tuning

    def tune(log: Log) -> None:
        if "triton" not in settings.engines:
            log.write("tune", "skipped", why="only the triton engine has tiles to tune")
            return
        path = settings.output / "table.json"
        with log.guarded("tune"):
            table = tuning.tune(path, log.left(), settings.device)
            log.write("tune", "ok", table=str(path), **{name: len(table[name]) for name in ("kernels", "engines")})

    return [Step("tune", tune, 1e6)]


def _time(settings: Settings) -> list[Step]:
    from benchmarks.gpu import timings

    engines, device, problems = settings.engines, settings.device, timings.problems()

    def timed(problem: Problem, mode: str, timers: Sequence[str], share: Callable[[Log], float]) -> Step:
        def run(log: Log) -> None:
            timings.time_problem(problem, mode, engines, device, timers, share(log), log)

        return Step(f"{problem.name} {mode}, {timers[0]}", run)

    if settings.tiny:
        return [timed(problem, mode, ("wall",), lambda log: 0.0) for problem, mode in timings.TINY]
    # The steps share the time that is left; half of it is for compiling and warming up.
    shares = [
        lambda log, place=place: max(0.2, 0.5 * log.left() / (len(problems) - place)) for place in range(len(problems))
    ]
    return [
        Step("rates", partial(timings.rates, device, "start")),
        *([Step("barrier", partial(timings.barrier, device))] if "triton" in engines else []),
        *(timed(problem, mode, ("host",), lambda log: 2.0) for problem, mode in timings.HOST),
        *(timed(*pair, ("events", "graph"), share) for pair, share in zip(problems, shares, strict=True)),
        Step("rates at the end", partial(timings.rates, device, "end")),
    ]


def _shapes(settings: Settings) -> list[Step]:
    """Six shapes against their baselines, beside the device's rates."""
    from benchmarks.gpu import timings

    engines, device, problems = settings.engines, settings.device, timings.TINY if settings.tiny else timings.SIX
    timers = ("wall",) if device.type == "cpu" else ("graph", "events")

    def step(place: int, problem: Problem, mode: str) -> Step:
        def run(log: Log) -> None:
            seconds = 0.0 if settings.tiny else max(0.2, 0.3 * log.left() / (len(problems) - place))
            timings.time_problem(problem, mode, engines, device, timers, seconds, log, timings.RIVALS)

        return Step(f"shape {problem.name} {mode}", run)

    return [
        *([] if settings.tiny else [Step("shapes: rates", partial(timings.rates, device, "start"))]),
        *(step(place, *pair) for place, pair in enumerate(problems)),
        *([Step("shapes: barrier", partial(timings.barrier, device))] * ("triton" in engines and not settings.tiny)),
    ]


def _host(settings: Settings) -> list[Step]:
    from benchmarks.gpu import timings

    def timed(problem: Problem, mode: str) -> Step:
        timers = ("wall",) if settings.device.type == "cpu" else ("host",)
        seconds = 0.0 if settings.tiny else 4.0
        return Step(
            f"host {problem.name} {mode}",
            lambda log: timings.time_problem(problem, mode, settings.engines, settings.device, timers, seconds, log),
        )

    return [timed(*pair) for pair in (timings.TINY[:1] if settings.tiny else timings.HOST)]


def _training(settings: Settings) -> list[Step]:
    from benchmarks.gpu import timings

    return [
        Step(f"training {name}", partial(timings.train, name, settings.engines, settings.device, settings.tiny))
        for name in timings.NETWORKS[: 1 if settings.tiny else None]
    ]


def _profile(settings: Settings) -> list[Step]:
    return [
        Step(f"profile {kernel}", partial(runs.profile_kernel, kernel, settings.device, settings.output), 1e6)
        for kernel in runs.PROFILED
    ]


def _profiled(settings: Settings) -> list[Step]:
    """Run the calls that `ncu` looks at."""
    shape = runs.TINY if settings.tiny else runs.LARGE
    return [Step(f"calls, {name}", partial(runs.run_once, name, shape, settings.device)) for name in settings.engines]


def _compile_runs(settings: Settings) -> list[Step]:
    """Compile Triton's kernels of the parts that run in one process, in several processes."""
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


def _compile_times(settings: Settings, everything: bool = True) -> list[Step]:
    from benchmarks.gpu import timings

    if "triton" not in settings.engines:
        return []
    rest = [pair for pair in timings.problems() if pair[1] in ("loss", "fwdbwd")]
    return [
        Step(f"compile {problem.name} {mode}", partial(timings.compile_kernels, problem, mode, settings.device))
        for problem, mode in (rest if everything else timings.SIX)
    ]


PARTS: dict[str, Callable[[Settings], list[Step]]] = {
    "verify": _verify, "shapes": _shapes, "host": _host, "training": _training, "profile": _profile, "profiled": _profiled,
    "correctness": _correctness, "launches": _launches, "repeats": _repeats, "streams": _streams, "graphs": _graphs,
    "sanitizer": _sanitizer, "small": _small, "tune": _tune, "time": _time, "compile runs": _compile_runs,
    "compile times": _compile_times, "compile shapes": partial(_compile_times, everything=False),
}  # fmt: skip


def work(
    steps: list[Step], log: Log, device: torch.device, first: int, position: Path | None, done: Path | None = None
) -> int:  # fmt: skip
    """Run the steps from the first on and return the exit status.

    `position` holds the number of the current step. Steps whose names are in `done` are left out, and others added to it if they
    had the time for all they do: also the one before the first, which has ended an earlier process.
    """
    names = set(done.read_text(encoding="utf-8").splitlines()) if done is not None and done.exists() else set()

    def note(step: Step) -> None:
        if done is not None:
            with done.open("a", encoding="utf-8") as file:
                file.write(f"{step.name}\n")

    if 0 < first <= len(steps):
        note(steps[first - 1])
    for place, step in enumerate(steps):
        if place < first or step.name in names:
            continue
        if position is not None:
            files.write_text(position, str(place))
        if log.left() < 0:
            log.write(step.name, "skipped", why=OUT_OF_TIME)
            continue
        faulthandler.dump_traceback_later(step.seconds, exit=True, file=sys.__stderr__ or sys.stderr)
        lines, bad, start = len(log.rows), log.bad, time.monotonic()
        with log.guarded(step.name):
            step.run(log)
        faulthandler.cancel_dump_traceback_later()
        print(f"{step.name}: {time.monotonic() - start:.1f} s{' BAD' * (log.bad > bad)}", flush=True)
        if log.bad > bad and _lost(device, log, step.name):
            return LOST
        if not any(map(lacked_time, log.rows[lines:])):
            note(step)
    return 0


def _lost(device: torch.device, log: Log, name: str) -> bool:
    """Return whether the device no longer answers this process."""
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
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker", description=__doc__)
    add = parser.add_argument
    add("part", choices=PARTS)
    for name, kind in (("--log", Path), ("--seconds", float)):
        add(name, type=kind, required=True)
    add("--output", type=Path, default=Path("."))
    add("--device", default="cuda")
    add("--engines", help="separated by commas (default: the engines with kernels that are on)")
    add("--share", default="0/1", help="i/n: every n-th step, from the i-th on")
    add("--first", type=int, default=0, help="the first step of the share to run")
    add("--position", type=Path)
    add("--done", type=Path, help="names of steps, a line each, that are left out; completed ones are added")
    add("--revision")
    add("--tiny", action="store_true")
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
    return work(steps, log, device, given.first, given.position, given.done)


if __name__ == "__main__":
    sys.exit(main())
