"""The job has six stages of two to four minutes. A stage has parts, which run in processes of their own.

`python -m benchmarks gpu 1` runs one stage, and without a number the first three run. A stage that is run again does the steps
that it has not done yet. Each stage leaves `stage-N.jsonl` and prints a table of ten lines (see docs/gpu.md).

The job covers the engines that are on: triton, and cuda where its library is built. Stage 1 builds the library first, for the
GPU at hand, where nvcc is. An engine that is off is a line of the record. `--parts` runs parts by name instead of a stage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.command_line import at_least, not_negative, users_input
from benchmarks.gpu.job_table import short_table, table
from benchmarks.gpu.kernels import WITH_KERNELS
from benchmarks.gpu.log import BAD, Log, lacked_time, read
from benchmarks.records import files
from benchmarks.records.environment import ROOT

# The parts with their shares of the time. The later parts share what a part leaves.
SHARES = {
    "verify": 20, "compile runs": 8, "launches": 4, "correctness": 35, "streams": 6, "repeats": 8, "graphs": 6, "sanitizer": 16,
    "compile shapes": 6, "shapes": 30, "tune": 18, "host": 4, "training": 10, "compile times": 6, "time": 25, "profile": 10,
}  # fmt: skip
# Compilations by several processes, before the parts that run in one.
_COMPILED = {
    "compile runs": ("launches", "repeats", "streams", "graphs", "sanitizer"),
    "compile shapes": ("shapes",),
    "compile times": ("time",),
}
PARTS = tuple(name for name in SHARES if name not in _COMPILED)
_ABREAST = ("verify", "correctness", "sanitizer", *_COMPILED)  # parts whose steps several processes share


class Stage(NamedTuple):
    """The parts of a stage, and its minutes."""

    parts: tuple[str, ...]
    minutes: float


STAGES = {
    1: Stage(("verify", "launches", "correctness"), 4.0),
    2: Stage(("streams", "repeats", "graphs", "sanitizer"), 2.0),
    3: Stage(("shapes",), 3.0),
    4: Stage(("tune",), 4.0),
    5: Stage(("host", "training"), 4.0),
    6: Stage(("profile",), 4.0),
}
_FIRST_STAGES = (1, 2, 3)
_BUILDING = 100.0  # seconds for the CUDA library
_KILLED = "killed: the time of its part was over"
_GRACE = 15.0  # seconds for the current step when a part's time is over
_PROGRESS = 10.0


class Settings(NamedTuple):
    """The settings of the command line."""

    parts: tuple[str, ...]
    output: Path
    minutes: float | None
    workers: int
    device: str = "cuda"
    tiny: bool = False
    revision: str | None = None
    engines: tuple[str, ...] = WITH_KERNELS
    stages: tuple[int, ...] = ()

    @property
    def done(self) -> Path:
        """The names of the steps that are done, a line each."""
        return self.output / "done.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks gpu`."""
    parts, engines = (
        f"of {','.join(PARTS)}, instead of a stage",
        f"of {','.join(WITH_KERNELS)} (default: those that are on)",
    )
    records = "for the records; a table.json there, written by `tune`, is used"
    stages = "; ".join(f"{number}: {', '.join(stage.parts)}" for number, stage in STAGES.items())
    add = parser.add_argument
    add("stage", nargs="?", type=int, choices=STAGES, help=f"{stages} (default: 1, 2, then 3)")
    add("--parts", type=partial(_among, PARTS, "part"), metavar="A,B", help=parts)
    add("--engines", type=partial(_among, WITH_KERNELS, "engine"), default=WITH_KERNELS, metavar="A,B", help=engines)
    add("--output", type=Path, default=Path("results") / "gpu", metavar="DIR", help=records)
    add("--minutes", type=not_negative, help="for a stage, or for all parts together (default: the stage's own, or 10)")
    add("--workers", type=at_least(1), default=_workers(), help="processes that check at the same time")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: with TRITON_INTERPRET=1 only")
    add("--tiny", action="store_true", help="tiny problems, to test this command")
    add("--revision", metavar="SHA", help="the commit to record where there is no git")


def _among(known: Sequence[str], what: str, text: str) -> tuple[str, ...]:
    """Return the names of a list with commas, in the order of `known`."""
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {what} {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(name for name in known if name in names)


def _workers() -> int:
    return max(1, min(12, (os.cpu_count() or 1) - 2))


def settings(given: argparse.Namespace) -> Settings:
    """Return the settings of parsed arguments."""
    stages = () if given.parts else _FIRST_STAGES if given.stage is None else (given.stage,)
    return Settings(
        given.parts or (), given.output.resolve(), given.minutes, given.workers, given.device, given.tiny, given.revision,
        given.engines, stages,
    )  # fmt: skip


def in_order(asked: Settings) -> list[str]:
    """Return the parts that were asked for, and the compilations of Triton's kernels for them."""
    none = asked.tiny or "triton" not in asked.engines
    compiled = () if none else tuple(name for name, parts in _COMPILED.items() if set(parts) & set(asked.parts))
    return [name for name in SHARES if name in (*asked.parts, *compiled)]


def allotted(parts: Sequence[str], left: float) -> float:
    """Return the seconds of the first part, of those left for all these parts."""
    return left * SHARES[parts[0]] / sum(SHARES[name] for name in parts)


def run(asked: Settings) -> int:
    """Run stages or parts and print a table of each; the exit status is 0 if all is well, 1 if not, 2 if no engine is on."""
    with users_input():
        files.check_folder(asked.output)
    begun = time.monotonic()  # the first stage has the time of the build too
    if 1 in asked.stages and asked.device == "cuda" and "cuda" in asked.engines:
        _build()
    off = _off(asked.device)
    on = tuple(engine for engine in asked.engines if off[engine] is None)
    without = {engine: f"the {engine} engine is off: {off[engine]}" for engine in asked.engines if engine not in on}
    for why in without.values():
        print(f"benchmarks gpu: {why}", file=sys.stderr)
    if not on:
        return 2
    asked = asked._replace(engines=on)
    with (asked.output / "gpu.log").open("a", encoding="utf-8") as talk:
        if not asked.stages:
            return _run(asked, "gpu.jsonl", begun, 10.0, without, talk, table)
        status = 0
        for number in asked.stages:
            parts, minutes = STAGES[number]
            own, name, printed = asked._replace(parts=parts), f"stage-{number}.jsonl", partial(short_table, number)
            status = max(status, _run(own, name, begun, minutes, without, talk, printed))
            begun = time.monotonic()
    return status


def _run(
    asked: Settings, name: str, begun: float, minutes: float, without: dict[str, str], talk: Any,
    printed: Callable[[Sequence[dict[str, Any]]], str],
) -> int:  # fmt: skip
    """Run parts, print a table of all that their record has, and return the exit status. A record of parts by name is new."""
    target = asked.output / name
    if not asked.stages:
        target.unlink(missing_ok=True)
        asked.done.unlink(missing_ok=True)
    end = begun + 60 * (minutes if asked.minutes is None else asked.minutes) - _GRACE
    if not target.exists():
        for engine, why in without.items():
            Log(target, "engines", 0.0, {}).write(engine, "skipped", why=why)
    # Steps that an earlier run had no time for are done now, or noted again.
    lines, ran = [line for line in read(target) if line.get("why") != _KILLED and not lacked_time(line)], 0
    parts = in_order(asked)
    while parts:
        found = run_part(parts[0], asked, allotted(parts, end - time.monotonic()), talk, target)
        lines, ran = lines + found, ran + len(found)
        parts = parts[1:]
    print("\n" + printed(lines))
    print(f"\nrecords: {target}", flush=True)
    return int(any(line["status"] in BAD for line in lines) or not (ran or asked.stages))


def _build() -> None:
    """Build the CUDA library for the GPU at hand, where nvcc is and none is built; its log is printed where it fails."""
    code = (
        "import torch; from torch.utils import cpp_extension; from interp_nn.engines.cuda import compiled_library as c; "
        "print('' if c.load() is None or cpp_extension.CUDA_HOME is None else '%d%d' % torch.cuda.get_device_capability())"
    )
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    arch = asked.stdout.strip()
    if asked.returncode or not arch:
        return
    start = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    own = {**os.environ, "INTERP_NN_CUDA_ARCHS": arch, "INTERP_NN_BUILD_CUDA": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=own, stdout=said, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )  # fmt: skip
        try:
            failed = process.wait(_BUILDING) != 0
            said.seek(0)
            why = said.read()[-3000:] if failed else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the compilers too, which would slow down what comes next
            process.wait()
            why = f"not done within {_BUILDING:.0f} s"
    print(
        f"the CUDA library for sm_{arch}: {time.monotonic() - start:.0f} s{'' if why is None else f': {why}'}",
        flush=True,
    )


def _off(device: str) -> dict[str, str | None]:
    """Return why each engine is off, None if it is on; another process finds out, so that this one never opens the device."""
    code = "import json, sys; from benchmarks.gpu import kernels; print(json.dumps(kernels.reasons(sys.argv[1])))"
    found = subprocess.run([sys.executable, "-c", code, device], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        return dict.fromkeys(WITH_KERNELS, found.stderr.strip()[-1000:])
    reasons: dict[str, str | None] = json.loads(found.stdout.splitlines()[-1])
    return reasons


class Worker:
    """A process for one share of a part, which is started again after a step that ended it."""

    def __init__(self, part: str, share: str, asked: Settings, folder: Path, end: float, talk: Any) -> None:
        self.part, self.share = part, share
        self.log = folder / f"{share.replace('/', '-')}.jsonl"
        self._position = folder / f"{share.replace('/', '-')}.position"
        self._asked, self._end, self._talk = asked, end, talk
        self._over = False
        self._start(0)

    def _start(self, first: int) -> None:
        seconds = self._end - time.monotonic()
        command = [
            *(sys.executable, "-m", "benchmarks.gpu.worker", self.part, "--log", str(self.log)),
            *("--seconds", f"{seconds:.3f}", "--output", str(self._asked.output), "--device", self._asked.device),
            *("--engines", ",".join(self._asked.engines)),
            *("--share", self.share, "--first", str(first), "--position", str(self._position)),
            *("--done", str(self._asked.done)),
            *(("--tiny",) if self._asked.tiny else ()),
            *(("--revision", self._asked.revision) if self._asked.revision else ()),
        ]
        self._position.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment(self._asked.output, self.part), stdout=self._talk, stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # a process group, so that its children end with it
        )  # fmt: skip

    def over(self) -> bool:
        """Return whether nothing is left to do; if the process has died, start the next one."""
        code = self._process.poll()
        if self._over or code is None:
            return self._over
        self._over = code == 0
        if code != 0:
            place = self._at()
            self._note(f"its process ended with status {code}", place)
            self._over = place is None or time.monotonic() > self._end
            if place is not None and not self._over:
                self._start(place + 1)
        return self._over

    def kill(self) -> None:
        """End the process and its children if it still runs."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._note(_KILLED, self._at())

    def _at(self) -> int | None:
        try:
            return int(self._position.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _note(self, why: str, place: int | None) -> None:
        step = "its start" if place is None else f"step {place}"
        Log(self.log, self.part, 0.0, {"share": self.share}).write(
            f"{self.part} {self.share}, {step}", "failed", why=why
        )


def environment(output: Path, part: str) -> dict[str, str]:
    """Return the environment of the processes: this checkout and, except for tuning, the tuned table if there is one."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if part != "verify":
        own["INTERP_NN_VERIFY"] = "0"  # they check by themselves
    tuned = output / "table.json"
    return {**own, "INTERP_NN_TABLE": str(tuned)} if tuned.exists() and part != "tune" else own


def run_part(part: str, asked: Settings, seconds: float, talk: Any, target: Path) -> list[dict[str, Any]]:
    """Run one part within so many seconds, append its lines to a record, and return them."""
    print(f"{part}: at most {seconds:.0f} s", flush=True)
    start, spoke = time.monotonic(), 0.0
    count = asked.workers if part in _ABREAST and not asked.tiny else 1
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(part, f"{i}/{count}", asked, Path(folder), start + seconds, talk) for i in range(count)]
        try:
            while not all([worker.over() for worker in workers]):
                now = time.monotonic() - start
                if now > seconds + _GRACE:
                    break
                if now - spoke > _PROGRESS:
                    spoke = now
                    print(f"  {now:4.0f} s: {_counts(_lines(workers))}", flush=True)
                time.sleep(0.2)
        finally:
            for worker in workers:
                worker.kill()
        lines = _lines(workers)
        with target.open("a", encoding="utf-8") as file:
            for worker in workers:
                if worker.log.exists():
                    file.write(worker.log.read_text(encoding="utf-8"))
    print(f"  {time.monotonic() - start:4.0f} s: {_counts(lines)}", flush=True)
    return lines


def _lines(workers: Sequence[Worker]) -> list[dict[str, Any]]:
    return [line for worker in workers for line in read(worker.log)]


def _counts(lines: Sequence[dict[str, Any]]) -> str:
    counted = Counter(line["status"] for line in lines)
    return ", ".join(f"{count} {status}" for status, count in sorted(counted.items())) or "nothing yet"
