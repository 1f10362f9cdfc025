"""`python -m interp_nn tune`: the table of `interp_nn.engines.triton.configs`, measured on the GPU at hand.

Nothing tunes by itself: a first step of training never waits for it. For every kernel, element size, and bucket of columns,
classes and rows, the present choice is timed against its neighbours (one tile doubled or halved, other warps, stages, scratch
rows, programs a multiprocessor), then the best of them against theirs. What is faster by more than the noise is kept. With
these, the triton engine is timed against eager on whole problems. The file is written anew after each step, so a
time limit costs what has not been done yet and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from interp_nn.engines.devices import DeviceSpec, table_capability
from interp_nn.engines.limits import unsupported_reason
from interp_nn.engines.problem import Config
from interp_nn.engines.triton import configs
from interp_nn.engines.triton.configs import TILES, Bucket, fits
from interp_nn.trials import ITEMSIZES, Bench, DeviceBench, Group

# From so many rows on, and the number of rows where that is measured.
LEVELS = ((16384, 65536), (2048, 4096), (0, 256))
_COLUMNS, _CLASSES = (64, 128), (16, 128)
_TILES = {
    "BN": (16, 32, 64, 128),
    "BN_A": (16, 32, 64, 128),
    "BD": (32, 64, 128),
    "BD_A": (32, 64, 128),
    "BC": (16, 32),
    "BK": (64, 128, 256),
}
_STAGES = (2, 3, 4, 5)
_WITH_SCRATCH = ("pair_loss", "latent_loss")
_ROUNDS = 2  # of neighbours of the best
_ENGINES_SHARE = 0.25  # of the time, for whole problems
_NOISE = 0.02  # a gain that is never believed, whatever the noise seems to be

Say = Callable[[str], None]


def groups() -> list[Group]:
    """Return all groups, the most used first. The kernels with phases run only where the engine is forced."""
    order = ("stream", "summary_backward", "pair_loss", "flat_loss", "pair_backward", "latent_loss")
    out = [
        Group(kernel, itemsize, columns, 128 if kernel == "latent_loss" else 16)
        for itemsize in (2, 4)
        for kernel in order
        for columns in _COLUMNS
    ]
    return out + [
        Group(kernel, itemsize, 256) for itemsize in (2, 4) for kernel in ("phased_forward", "phased_backward")
    ]


def neighbours(config: Config, bucket: Bucket, spec: DeviceSpec) -> list[Config]:
    """Return the configs one step away whose shared memory should fit. Some may still fail to compile or launch."""
    found = []
    for place, name in enumerate(TILES[bucket.kernel]):
        for size in _next(_TILES[name], config.tiles[place]):
            found.append(config._replace(tiles=(*config.tiles[:place], size, *config.tiles[place + 1 :])))
    found += [config._replace(warps=warps) for warps in _next((4, 8), config.warps)]
    found += [config._replace(stages=stages) for stages in _next(_STAGES, config.stages)]
    if "BD_A" in TILES[bucket.kernel]:
        found += [config._replace(stages_a=stages) for stages in _next(_STAGES, config.stages_a or config.stages)]
    found += [config._replace(blocks_per_sm=blocks_per_sm) for blocks_per_sm in _next((1, 2), config.blocks_per_sm)]
    if bucket.kernel in _WITH_SCRATCH:
        found.append(config._replace(scratch=not config.scratch))
    return [config for config in found if fits(spec, config, bucket)]


def _next(sizes: Sequence[int], size: int) -> list[int]:
    """Return the nearest size below and the nearest above."""
    below, above = [s for s in sizes if s < size], [s for s in sizes if s > size]
    return below[-1:] + above[:1]


class Winner(NamedTuple):
    """A config, its time and that of the config that it replaces, in microseconds; None if not timed."""

    config: Config
    microseconds: float | None = None
    before: float | None = None


class _Tuning:
    """One run: the winners so far, and the file that they are written to."""

    def __init__(self, bench: Bench, output: Path, seconds: float, levels: Sequence[tuple[int, int]], say: Say) -> None:
        self.bench, self.output, self.levels, self.say = bench, output, levels, say
        self.start, self.seconds = time.monotonic(), seconds
        self.found: dict[Group, dict[int, Winner]] = {}
        self.engines: list[dict[str, Any]] = []

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def kernels(self, wanted: Iterable[Group], until: float) -> None:
        for group in wanted:
            if self.left() < until:
                self.say(f"{group}: skipped, out of time")
                continue
            self.found[group] = self._group(group, until)
            self.write()

    def _group(self, group: Group, until: float) -> dict[int, Winner]:
        spec = self.bench.spec
        present = {rows: configs.choose(spec, group.bucket(rows)) for rows, _ in self.levels}
        best, outcome = dict(present), dict[Config, str | None]()
        for _ in range(_ROUNDS):
            near = [n for rows, config in best.items() for n in neighbours(config, group.bucket(rows), spec)]
            new = [config for config in dict.fromkeys((*best.values(), *near)) if config not in outcome]
            if not new or self.left() < until:
                break
            outcome |= self.bench.prepare(group, new, self.left() - until)
            for rows, n in self.levels:
                tried = [config for config in new if outcome[config] is None and config != best[rows]]
                best[rows] = self._fastest(group, n, [best[rows], *tried])
        winners = {rows: self._duel(group, n, present[rows], best[rows]) for rows, n in self.levels}
        failed = [why for why in outcome.values() if why is not None]
        for rows, winner in winners.items():
            gain = (
                "stays" if winner.config == present[rows] else f"instead of {_short(present[rows])}, {winner.before} us"
            )
            self.say(f"{group}, rows >= {rows}: {_short(winner.config)} {gain}, {winner.microseconds} us")
        self.say(f"{group}: {len(outcome)} tried, {len(failed)} of them failed{f', as {failed[0]}' if failed else ''}")
        return winners

    def _times(self, group: Group, n: int, tried: Sequence[Config]) -> dict[int, float]:
        """Return medians in milliseconds by place, without those that could not be timed."""
        try:
            taken = self.bench.kernel_times(group, n, tried)
        except Exception as error:  # out of memory, most likely
            self.say(f"{group}, {n} rows: not timed: {error}".splitlines()[0][:200])
            return {}
        return {place: statistics.median(samples) for place, samples in taken.items() if samples}

    def _fastest(self, group: Group, n: int, tried: Sequence[Config]) -> Config:
        medians = self._times(group, n, tried) if len(tried) > 1 else {}
        return tried[min(medians, key=medians.__getitem__)] if medians else tried[0]

    def _duel(self, group: Group, n: int, present: Config, best: Config) -> Winner:
        """Return the better of two configs, timed once more. The present one is timed twice, which measures the noise."""
        if best == present:
            return Winner(present)
        medians = self._times(group, n, [present, best, present])
        if 1 not in medians:
            return Winner(present)
        took = round(1e3 * medians[1], 2)
        own = [medians[place] for place in (0, 2) if place in medians]
        if not own:  # what is chosen now does not run here
            return Winner(best, took)
        before = round(1e3 * min(own), 2)
        return Winner(best, took, before) if faster(medians[1], own) else Winner(present, before, before)

    def whole(self, wanted: Iterable[tuple[str, int, int]]) -> None:
        """Find the fastest engine for whole problems (kind, itemsize, columns), with the configs found so far."""
        for kind, itemsize, columns in wanted:
            for rows, n in self.levels:
                label = f"{kind} {ITEMSIZES[itemsize]}, {columns} columns, rows >= {rows}"
                if self.left() < 0:
                    self.say(f"{label}: skipped, out of time")
                    continue
                entry = self._engine(kind, itemsize, columns, rows, n, label)
                if entry is not None:
                    self.engines.append(entry)
            self.write()

    def _engine(self, kind: str, itemsize: int, columns: int, rows: int, n: int, label: str) -> dict[str, Any] | None:
        try:
            with configs.use_table(self.output):
                taken = self.bench.engine_times(kind, itemsize, columns, n)
        except Exception as error:
            self.say(f"{label}: not timed: {error}".splitlines()[0][:200])
            return None
        medians = {name: statistics.median(samples) for name, samples in taken.items() if samples}
        microseconds = {name: round(1e3 * value, 2) for name, value in medians.items()}
        name = fastest(medians)
        self.say(f"{label}: {name or 'no engine'} is faster, {microseconds} us")
        if name is None:
            return None
        classes = {"pair_loss": columns, "head_loss": 16}.get(kind, 16)
        bucket = {"itemsize": itemsize, "columns": columns, "classes": classes, "rows": rows}
        return {"problem": kind, **_where(self.bench.spec), **bucket, "engine": name, "microseconds": microseconds}

    def write(self) -> dict[str, Any]:
        """Write the table so far, and return it."""
        # A problem takes the first entry that holds for it: the fewest columns and classes, and the most rows, come first.
        engines = sorted(
            self.engines, key=lambda e: (e["problem"], e["itemsize"], e["columns"], e["classes"], -e["rows"])
        )
        rows = ", ".join(str(n) for _, n in self.levels)
        origin = f"{self.bench.origin}; measured with {rows} rows, k = columns, d = 8 k, a layer's weight"
        content = {"origin": origin, "kernels": self._entries(), "engines": engines}
        write(self.output, content)
        return content

    def _entries(self) -> list[dict[str, Any]]:
        """Return the entries. Where an entry would also match buckets that were not measured, the present choice precedes it."""
        spec, out = self.bench.spec, []
        for group in sorted(_covered(self.found), key=lambda g: (list(TILES).index(g.kernel), *g[1:])):
            for rows, _ in sorted(self.levels, reverse=True):
                winner = self.found.get(group, {}).get(rows) or Winner(configs.choose(spec, group.bucket(rows)))
                config = winner.config._asdict() | {"tiles": list(winner.config.tiles)}
                times = {"microseconds": winner.microseconds, "before": winner.before}
                timed = {name: value for name, value in times.items() if value is not None}
                out.append({"kernel": group.kernel, **_where(spec), **group._asdict(), "rows": rows, **config, **timed})
        return out


def faster(one: float, others: Sequence[float]) -> bool:
    """Return True if a time beats repeated times of another config by more than these differ, and by over 2 %."""
    spread = (max(others) - min(others)) / min(others)
    return one < min(others) * (1 - max(_NOISE, spread))


def fastest(medians: Mapping[str, float]) -> str | None:
    """Return the engine that beats each other one, or None. All are timed twice, the second time as "... again"."""
    twice = {name: [medians[name], medians.get(f"{name} again", medians[name])] for name in medians if " " not in name}
    name = min(twice, key=lambda name: max(twice[name]))
    rivals = [taken for other, taken in twice.items() if other != name]
    return name if all(faster(max(twice[name]), taken) for taken in rivals) else None


def _short(config: Config) -> str:
    extra = (", scratch" if config.scratch else "") + (
        f", {config.blocks_per_sm} blocks_per_sm" if config.blocks_per_sm > 1 else ""
    )
    return f"{config}{extra}"


def _where(spec: DeviceSpec) -> dict[str, Any]:
    return {"capabilities": [list(table_capability(spec.capability) or spec.capability)]}


def _covered(found: Iterable[Group]) -> set[Group]:
    """Return the groups whose problems these groups' entries would match: those with no more columns and classes."""
    out = set(found)
    for group in found:
        columns = [c for c in _COLUMNS if c < group.columns] if group.columns in _COLUMNS else []
        classes = [c for c in _CLASSES if c < group.classes]
        out |= {
            group._replace(columns=c, classes=m) for c in (*columns, group.columns) for m in (*classes, group.classes)
        }
    return out


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a table with an entry a line. The file appears in one step."""
    lines = [" " + json.dumps("origin") + ": " + json.dumps(content["origin"], ensure_ascii=False)]
    for name in ("kernels", "engines"):
        entries = ",\n".join("  " + json.dumps(entry) for entry in content[name])
        lines.append(f' "{name}": [\n{entries}\n ]' if entries else f' "{name}": []')
    _replace(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _replace(path: Path, text: str) -> None:
    """Replace a file in one step, by a temporary file with a name of its own, which an error removes."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{secrets.token_hex(8)}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _check_output(path: Path) -> None:
    """Raise OSError where the table cannot be written; make its folder."""
    if path.exists() and not path.is_file():  # a folder, or a device
        raise OSError(f"{path}: not a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise OSError(f"{path}: may not be written")
    try:
        trial = path.with_name(f".{os.getpid()}-{secrets.token_hex(8)}.part")
        _replace(trial, "\n")
        trial.unlink()
    except OSError as error:
        raise OSError(f"{path.parent}: no folder that can be written: {error.strerror}") from error


def tune(
    output: Path,
    seconds: float = math.inf,
    device: torch.device | str | None = None,
    *,
    bench: Bench | None = None,
    wanted: Sequence[Group] | None = None,
    problems: Sequence[tuple[str, int, int]] | None = None,
    levels: Sequence[tuple[int, int]] = LEVELS,
    say: Say = print,
) -> dict[str, Any]:
    """Measure, write the table to `output`, and return it.

    Raises OSError where the file cannot be written, before anything is measured, and RuntimeError where the triton engine is
    off, or INTERP_NN_TABLE, whose choices are compared with, names that file.
    seconds limit the time; `wanted` and `problems` what is looked at, `levels` the rows; a `bench` stands for the device.
    """
    used = os.environ.get("INTERP_NN_TABLE")
    if used and Path(used).resolve() == output.resolve():
        raise RuntimeError(f"INTERP_NN_TABLE names the file to be written, {output}")
    _check_output(output)
    if bench is None:
        off = unsupported_reason("triton")
        if off is not None:
            raise RuntimeError(f"the triton engine is off: {off}")
        where = torch.device(device or "cuda")
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        bench = DeviceBench(where)
    kinds = ("summary", "pair_loss", "head_loss", "pair")
    whole = [(kind, size, columns) for size in (2, 4) for columns in _COLUMNS for kind in kinds]
    run = _Tuning(bench, output, seconds, levels, say)
    run.kernels(groups() if wanted is None else wanted, _ENGINES_SHARE * seconds if seconds < math.inf else -math.inf)
    run.write()
    run.whole(whole if problems is None else problems)
    content = run.write()
    configs._read(output)  # raises if it is not a table
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m interp_nn tune`; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m interp_nn tune", description="Time this GPU's kernels, write a table."
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the table; set INTERP_NN_TABLE to it"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after so many (default: 10)")
    parser.add_argument("--device", default="cuda", help="which GPU (default: the current one)")
    given = parser.parse_args(arguments)
    try:
        if not given.minutes >= 0:
            raise ValueError(f"--minutes: got {given.minutes:g}, want a number from 0 on")
        content = tune(given.output, 60 * given.minutes, given.device)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"interp_nn tune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{given.output}: {len(content['kernels'])} kernels, {len(content['engines'])} engines")
    print(f"to use it: INTERP_NN_TABLE={given.output}")
    return 0
