"""`compare`: two revisions of the library side by side, or two records.

Each revision gets a process, which imports its interp_nn and this checkout's benchmarks. Both hold the same problem and take
samples in turn, in a new random order each round. nn.Linear, which cannot have changed, is timed with them: the distance of its
ratio from 1 is the machine's noise.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import numpy as np

from benchmarks.command_line import UserInputError, at_least, not_negative, users_input
from benchmarks.command_line import device as present
from benchmarks.records.environment import ROOT
from benchmarks.records.intervals import ENOUGH, resampled
from benchmarks.records.report import COLUMNS, Column, Problems, Ratio, between, noise, noise_floor, own_columns, ratio
from benchmarks.records.rows import grouped, read
from benchmarks.timing.problems import MODES, OPS, QUICK, Problem
from benchmarks.timing.providers import ASSOCIATIONS
from benchmarks.timing.run import ALL_MODES, shape
from interp_nn.display import track

_NAMES = ("ours", "linear")
_MOST_NOISE = 0.25  # a change that a comparison has to see, unless the threshold is larger


class Verdict(NamedTuple):
    """A problem in a mode: the ratios of HEAD's medians to BASE's, for ours and nn.Linear; slower: whether ours is slower.

    noisy: Whether it is not, but the noise hides a change of `_MOST_NOISE` or of the threshold.
    """

    name: str
    ours: Ratio
    linear: Ratio
    slower: bool
    noisy: bool

    @property
    def said(self) -> str:
        """Return the verdict in words."""
        return "SLOWER" if self.slower else "too noisy to judge" if self.noisy else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks compare`."""
    parser.add_argument("base", metavar="BASE", help="a git revision, or a record")
    parser.add_argument("head", metavar="HEAD", nargs="?", help="the same (default: the files of this checkout)")
    parser.add_argument(
        "--threshold",
        type=not_negative,
        default=5.0,
        metavar="PERCENT",
        help="a larger increase is slower (default: 5)",
    )
    parser.add_argument("--op", choices=OPS, action="append", help="repeatable (default: summary and cross_entropy)")
    parser.add_argument(
        "--mode", choices=ALL_MODES, action="append", help="repeatable (default: fwdbwd, infer and loss)"
    )
    parser.add_argument("--shape", type=shape, action="append", metavar="N,D,K[,M]", help="repeatable")
    parser.add_argument("--device", type=present, default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="write how far two records are apart, between its marks"
    )
    parser.add_argument("--rounds", type=at_least(ENOUGH), default=60, help="samples of each (default: 60)")


def run(given: argparse.Namespace) -> int:
    """Compare and print; the exit status is 1 where HEAD is slower, 2 where there is nothing to compare."""
    files = [Path(name) for name in (given.base, given.head) if name is not None]
    if all(file.is_file() for file in files) and len(files) == 2:
        return _records(files[0], files[1], given.threshold / 100, given.page)
    if given.page is not None:
        raise UserInputError("--page: got it without two records")
    for file in files:
        if file.suffix == ".jsonl":
            raise UserInputError(f"{file}: {'want two records' if file.is_file() else 'there is no such record'}")
    shapes = given.shape or QUICK
    modes = given.mode or ("fwdbwd", "infer", "loss")
    problems = [
        (Problem.of(op, size), mode)
        for op in given.op or ("summary", "cross_entropy")
        for size in shapes
        for mode in MODES[op]
        if mode in modes and (len(size) == 4) == (op == "head")
    ]
    if not problems:
        raise UserInputError(
            "no problem has the ops, modes and shapes asked for; a head's shape is N,D,K,M, the others' N,D,K"
        )
    verdicts = revisions(given.base, given.head, problems, given.device, given.rounds, given.threshold / 100)
    print(f"\n{'HEAD / BASE, 95 % interval':46}{'ours':>20}{'linear':>20}")
    for verdict in verdicts:
        print(f"{verdict.name:46}{verdict.ours!s:>20}{verdict.linear!s:>20}  {verdict.said}".rstrip())
    return int(any(verdict.slower for verdict in verdicts))


def revisions(
    base: str, head: str | None, problems: Sequence[tuple[Problem, str]], device: str, rounds: int, threshold: float,
    root: Path = ROOT,
) -> list[Verdict]:  # fmt: skip
    """Time both revisions of the repository at `root`.

    Raises:
        UserInputError: Git does not know a revision.
    """
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(_checkout(revision, root)) for revision in (base, head)]
        workers = [stack.enter_context(_worker(folder, device)) for folder in folders]
        return [
            _compared(problem, mode, workers, rounds, threshold)
            for problem, mode in track(problems, "compare", None, "problem")
        ]


@contextlib.contextmanager
def _checkout(revision: str | None, root: Path) -> Iterator[Path]:
    """Yield a folder with a revision's interp_nn, or this checkout's for None."""
    with tempfile.TemporaryDirectory() as folder:
        if revision is None:
            (Path(folder) / "interp_nn").symlink_to(root / "interp_nn")
        else:
            # A name that starts with a dash would be an option.
            command = ["git", "archive", "--format=tar", f"{revision}^{{commit}}", "interp_nn"]
            done = subprocess.run(command, cwd=root, capture_output=True, check=False)
            if done.returncode:
                raise UserInputError(f"{revision}: {done.stderr.decode().strip()}")
            with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
                if hasattr(tarfile, "data_filter"):  # Python 3.10 has it from 3.10.12 on
                    archive.extraction_filter = tarfile.data_filter
                archive.extractall(folder)
        yield Path(folder)


class _Worker:
    """A process with one revision. It is stopped between questions: threads that wait for work would disturb the other one."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal("SIGCONT")
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        self._signal("SIGSTOP")
        if not answer:
            raise RuntimeError(f"the process of a revision ended with status {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self._signal("SIGCONT")
        self._process.communicate()

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):  # not on Windows
            self._process.send_signal(getattr(signal, name))


@contextlib.contextmanager
def _worker(folder: Path, device: str) -> Iterator[_Worker]:
    path = os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.timing.compare_worker", device], cwd=folder, env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with contextlib.closing(_Worker(process)) as worker:
        yield worker


def _compared(problem: Problem, mode: str, workers: Sequence[_Worker], rounds: int, threshold: float) -> Verdict:
    for worker in workers:
        worker.ask(problem=problem._asdict(), mode=mode, names=_NAMES)
    draw, order = random.Random(0), [(i, name) for i in range(2) for name in _NAMES]
    taken: dict[tuple[int, str], list[float]] = {which: [] for which in order}
    for _ in range(rounds):
        for i, name in draw.sample(order, len(order)):
            taken[i, name].append(workers[i].ask(sample=name))
    ours, linear = (
        Ratio(float(np.median(taken[1, name]) / np.median(taken[0, name])), resampled(taken[1, name], taken[0, name]))
        for name in _NAMES
    )
    # Slower by the whole interval, which is above the threshold and above that of nn.Linear, which cannot have changed.
    low, noise = _ends(ours)[0], _ends(linear)[1]
    slower = low > max(1 + threshold, noise)
    widest = max(_ends(ours)[1], noise, 1 / _ends(linear)[0])  # a faster nn.Linear hides a slower ours
    noisy = not slower and widest > 1 + max(threshold, _MOST_NOISE)
    return Verdict(f"{problem.name} {mode}", ours, linear, slower, noisy)


def _ends(ratio: Ratio) -> tuple[float, float]:
    assert ratio.ends is not None
    return ratio.ends


def _records(base: Path, head: Path, threshold: float, page: Path | None) -> int:
    """Compare the ratios of two records of one device; the exit status is 1 where HEAD is slower beyond the noise."""
    with users_input():
        one, other = grouped(read([base])), grouped(read([head]))
    changes = list(_common(one, other))
    if not changes:
        raise UserInputError("got two records without a common problem that both have timed")
    unchanged = [change.ratio for change in changes if change.column in _UNCHANGED]
    floor = noise_floor([*noise(one), *noise(other), *unchanged])
    least, most = max(floor, threshold), max(threshold, _MOST_NOISE)
    judged = {*_JUDGED, *_own(one)}
    verdicts = [(change, change.verdict(least, most)) for change in changes if change.column in judged]
    if verdicts:
        print(f"{'HEAD / BASE of the ratio, 95 % interval':60}{'':24}{'change':>20}  verdict")
    for change, verdict in verdicts:
        print(f"{change.name:60}{change.column.title:24}{change.ratio!s:>20}  {verdict}")
    print(f"\nnoise floor: {floor:.1%}, which 95 % of the pairs of identical or unchanged providers keep")
    print(f"slower: the whole interval is above {least:.1%}, the larger one of floor and threshold\n")
    text = _differences(changes)
    print(text)
    with users_input():
        if page is not None:
            names = [file.resolve().relative_to(ROOT).as_posix() for file in (base, head)]
            between(page, f"compare {names[0]} {names[1]}", text)
    slower = any(verdict == "SLOWER" for _, verdict in verdicts)
    if floor > most and not slower:
        raise UserInputError(
            f"too noisy to judge: identical or unchanged providers differ by {floor:.1%}, which hides a change of {most:.0%}; "
            "time both again on a quiet machine, with more --seconds"
        )
    return int(slower)


def differences(base: Path, head: Path) -> str:
    """Return how far the ratios of two records are apart, as Markdown."""
    return _differences(list(_common(grouped(read([base])), grouped(read([head])))))


def _differences(changes: Sequence[_Change]) -> str:
    off: dict[str, list[float]] = {}
    for change in changes:
        if change.column in COLUMNS or change.column not in (*_JUDGED, *_UNCHANGED):
            off.setdefault(change.column.title, []).append(change.ratio.value)
    lines = [
        "| ratio | geometric mean of its change | median change | 80 % below | largest | count |",
        f"|---|{'--:|' * 5}",
    ]
    if off:
        off["all"] = [value for found in off.values() for value in found]
    for title, values in off.items():
        far = np.exp(np.abs(np.log(values))) - 1
        median, most = np.quantile(far, (0.5, 0.8)).tolist()
        lines.append(
            f"| {title} | {geometric_mean(values):.3f} | {median:.1%} | {most:.1%} | {far.max():.1%} | {len(values)} |"
        )
    return "\n".join(lines)


# Ours beside what cannot have changed, and the latter among themselves.
_JUDGED = tuple(Column(f"ours / {name}", "ours", name, True) for name in ("linear", "backwards", "unique"))
_UNCHANGED = tuple(Column(f"{name} / linear", name, "linear") for name in ("unfused", *ASSOCIATIONS))


class _Change(NamedTuple):
    """A ratio of one record and of another one."""

    key: tuple[Any, ...]
    column: Column
    before: Ratio
    after: Ratio

    @property
    def name(self) -> str:
        op, mode, dtype, *sizes = self.key[:7]
        return f"{op} ({', '.join(str(size) for size in sizes if size is not None)}) {dtype} {mode}"

    @property
    def ratio(self) -> Ratio:
        both = self.before.draws, self.after.draws
        draws = None if both[0] is None or both[1] is None else both[1] / both[0]
        return Ratio(self.after.value / self.before.value, draws)

    def verdict(self, least: float, most: float) -> str:
        """Judge a change of more than `least`; a change of more than `most` may not be hidden by the noise."""
        if (ends := self.ratio.ends) is None:
            return "not known: a record has no rounds"
        low, high = ends
        if low > 1 + least or high < 1 / (1 + least):
            return "SLOWER" if low > 1 else "faster"
        return "too noisy to judge" if max(1 + least, high) > 1 + most else "same within the noise"


def _own(problems: Problems) -> list[Column]:
    return own_columns(row for found in problems.values() for row in found.values())


def _common(one: Problems, other: Problems) -> Iterator[_Change]:
    for key in [key for key in one if key in other]:
        for column in dict.fromkeys((*COLUMNS, *_own(one), *_JUDGED, *_UNCHANGED)):
            before, after = ratio(one[key], column), ratio(other[key], column)
            if before is not None and after is not None:
                yield _Change(key, column, before, after)
