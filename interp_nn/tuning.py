"""`python -m interp_nn tune`: the table of `interp_nn.kernels.configs`, measured on the GPU at hand.

Nothing tunes by itself: a first step of training never waits for it. For every kernel, element size, and bucket of columns,
classes and rows, the present choice is timed against its neighbours (one tile doubled or halved, other warps, stages, parked
rows, programs a multiprocessor), then the best of them against theirs. What is faster by more than the noise is kept. With
these, the triton engine is timed against the reference on whole problems. The file is written anew after each step, so a
time limit costs what has not been done yet and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from interp_nn import dispatch, engines, functional
from interp_nn.chips import Chip, chip_of, family
from interp_nn.engines import reference
from interp_nn.engines.reference import LossOptions
from interp_nn.kernels import configs
from interp_nn.kernels.configs import TILES, Bucket, Config, estimated_shared

# From so many rows on, and the number of rows where that is measured.
LEVELS = ((16384, 65536), (1024, 4096), (0, 256))
_COLUMNS, _CLASSES = (64, 128), (16, 128)
_TILES = {
    "BN": (16, 32, 64, 128),
    "BN_A": (16, 32, 64, 128),
    "BD": (32, 64, 128),
    "BD_A": (32, 64, 128),
    "BC": (16, 32),
    "BK": (64, 128, 256),
}
_LOSSES = ("pair_loss", "latent_loss", "flat_loss")
_PARKING = ("pair_loss", "latent_loss")
_ROUNDS = 2  # of neighbours of the best
_ENGINES_SHARE = 0.25  # of the time, for whole problems
_NOISE = 0.02  # a gain that is never believed, whatever the noise seems to be
_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_NAMES = {2: "bf16", 4: "fp32"}
_COMPILING = 90.0  # seconds that a candidate may take to compile
_OPTIONS = LossOptions((1.0, 1.0, 1.0), -100, "mean")

Key = TypeVar("Key", bound=Hashable)
Say = Callable[[str], None]


class Group(NamedTuple):
    """Buckets that differ in their rows only. Measured with k = columns, d = 8 k, and about as many classes as fit."""

    kernel: str
    itemsize: int
    columns: int
    classes: int = 16

    def bucket(self, rows: int) -> Bucket:
        return Bucket(self.kernel, self.itemsize, self.columns, self.classes, rows)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(d, k, m)."""
        return 8 * self.columns, self.columns, 10 if self.classes == 16 else 100

    def __str__(self) -> str:
        classes = f", {self.classes} classes" if self.kernel in ("latent_loss", "flat_loss") else ""
        return f"{self.kernel} {_NAMES[self.itemsize]}, {self.columns} columns{classes}"


def groups() -> list[Group]:
    """All of them, those that matter most first; the kernels with phases only run where they are asked for."""
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


def neighbours(config: Config, bucket: Bucket, chip: Chip) -> list[Config]:
    """The configs one step away, as far as their shared memory should fit. Some will not compile or launch for all that."""
    found = []
    for place, name in enumerate(TILES[bucket.kernel]):
        for size in _next(_TILES[name], config.tiles[place]):
            found.append(config._replace(tiles=(*config.tiles[:place], size, *config.tiles[place + 1 :])))
    found += [config._replace(warps=warps) for warps in _next((4, 8), config.warps)]
    found += [config._replace(stages=stages) for stages in _next((2, 3, 4), config.stages)]
    found += [config._replace(resident=resident) for resident in _next((1, 2), config.resident)]
    if bucket.kernel in _PARKING:
        found.append(config._replace(parked=not config.parked))
    return [config for config in found if estimated_shared(config, bucket) <= chip.shared]


def _next(sizes: Sequence[int], size: int) -> list[int]:
    """The nearest size below, and the nearest above."""
    below, above = [s for s in sizes if s < size], [s for s in sizes if s > size]
    return below[-1:] + above[:1]


# Trials


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """owner.name is `value` inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def forget() -> None:
    """Drop what was planned with other configs: the launches that the engine remembers, and the table."""
    configs._user_table.cache_clear()
    for name, value in vars(engines.get("triton")).items():
        if name.startswith("_plan"):
            value.cache_clear()


@contextlib.contextmanager
def using(kernel: str, config: Config) -> Iterator[None]:
    """Launches of that kernel that are planned inside have this config."""
    chosen = configs.choose

    def choose(chip: Chip, bucket: Bucket) -> Config:
        return config if bucket.kernel == kernel else chosen(chip, bucket)

    forget()
    try:
        with replaced(configs, "choose", choose):
            yield
    finally:
        forget()


@contextlib.contextmanager
def table(path: Path) -> Iterator[None]:
    """INTERP_NN_TABLE names this file inside."""
    before = os.environ.get("INTERP_NN_TABLE")
    os.environ["INTERP_NN_TABLE"] = str(path)
    forget()
    try:
        yield
    finally:
        del os.environ["INTERP_NN_TABLE"]
        if before is not None:
            os.environ["INTERP_NN_TABLE"] = before
        forget()


def engine_call(group: Group, n: int, device: torch.device) -> Callable[[], object]:
    """A call of the triton engine that launches the group's kernel, with n rows and a layer's transposed weight."""
    engine: Any = engines.get("triton")
    (d, k, m), dtype = group.sizes, _DTYPES[group.itemsize]
    x = torch.randn(n, d, dtype=dtype, device=device)
    b = (torch.randn(k, d, device=device) / max(d, k) ** 0.5).to(dtype).t()
    if group.kernel in _LOSSES:
        head = group.kernel != "pair_loss"
        target = torch.randint(m if head else k, (n,), device=device)
        a = torch.randn(m, k, dtype=dtype, device=device) / k**0.5 if head else None
        c = torch.randn(m, dtype=dtype, device=device) if head else None
        form = group.kernel.removesuffix("_loss") if head else "A+"
        return lambda: engine.loss(x, b, a, c, target, _OPTIONS, form, None, (True, True, head, head))
    form = {"pair_backward": "A+", "phased_forward": "B", "phased_backward": "B"}.get(group.kernel, "A")
    if group.kernel in ("stream", "phased_forward"):
        return lambda: engine.forward(x, b, None, form, False)
    pair = group.kernel == "pair_backward"
    kept = [t.contiguous() for t in reference.forward(x, b, None, form, pair)[2]]
    dp, dy = (torch.randn(n, k, dtype=dtype, device=device) for _ in range(2))
    return lambda: engine.backward(dp if pair else None, dy, x, b, kept, form, True, True)


def relaunch(call: Callable[[], object]) -> Callable[[], None]:
    """What the call launches, to be launched again on the same memory: the device's share of it alone."""
    engine: Any = engines.get("triton")
    launch, made = engine.launch, []

    def noted(*arguments: Any) -> None:
        made.append(arguments)
        launch(*arguments)

    with replaced(engine, "launch", noted):
        call()

    def again() -> None:
        for arguments in made:
            launch(*arguments)

    return again


def whole_call(kind: str, itemsize: int, columns: int, n: int, device: torch.device) -> Callable[[], object]:
    """Forward and backward of a "summary", "pair", "pair_loss" or "head_loss", as a user of a layer calls them."""
    d, k, m = Group(kind, itemsize, columns).sizes
    dtype = _DTYPES[itemsize]

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    x, w = leaf(n, d), leaf(k, d, scale=max(d, k) ** -0.5)
    a, c = leaf(m, k, scale=k**-0.5), leaf(m)
    dy = torch.randn(n, k, dtype=dtype, device=device)
    target = torch.randint(m if kind == "head_loss" else k, (n,), device=device)
    one = torch.ones((), device=device)

    def call() -> object:
        b = w.t()
        if kind == "summary":
            return torch.autograd.grad(functional.summary(x, b), (x, w), dy)
        if kind == "pair":
            return torch.autograd.grad(tuple(functional.summary_pair(x, b)), (x, w), (dy, dy))
        if kind == "pair_loss":
            return torch.autograd.grad(functional.summary_cross_entropy(x, b, target), (x, w), one)
        loss = functional.summary_head_cross_entropy(x, b, a, c, target)
        return torch.autograd.grad(loss, (x, w, a, c), one)

    return call


# Clocks: milliseconds of each call, sample by sample, in turn. Those far behind after some rounds are left out of the rest.


def _in_turn(
    sample: Callable[[Callable[[], object]], float], calls: Mapping[Key, Callable[[], object]], rounds: int, early: int
) -> dict[Key, list[float]]:  # fmt: skip
    taken: dict[Key, list[float]] = {key: [] for key in calls}
    alive = list(taken)
    for done in range(rounds):
        if done == early and alive:
            best = min(statistics.median(taken[key]) for key in alive)
            alive = [key for key in alive if statistics.median(taken[key]) < 1.3 * best]
        for key in alive if done % 2 else reversed(alive):
            taken[key].append(sample(calls[key]))
    return taken


def device_clock(calls: Mapping[Key, Callable[[], object]], device: torch.device) -> dict[Key, list[float]]:
    """What a call takes on the device with cold caches: between two events, behind a write long enough to hide the host."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
    flush = torch.empty(max(8 * cache, 2**28), dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(call: Callable[[], object]) -> float:
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return _in_turn(sample, calls, rounds=24, early=5)


def host_clock(calls: Mapping[Key, Callable[[], object]], device: torch.device) -> dict[Key, list[float]]:
    """What a call takes in a loop of them, the host's share included."""

    def loop(call: Callable[[], object], times: int) -> float:
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(times):
            call()
        _synchronize(device)
        return 1e3 * (time.perf_counter() - begin) / times

    def sample(call: Callable[[], object]) -> float:
        return loop(call, 10)

    for call in calls.values():
        loop(call, 3)
    return _in_turn(sample, calls, rounds=11, early=5)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# What tuning needs of a device


class Bench(Protocol):
    """Where configs are tried: a GPU, or what a test puts in its place."""

    chip: Chip
    origin: str

    def prepare(self, group: Group, tried: Sequence[Config], seconds: float) -> dict[Config, str | None]:
        """None for each config that compiles and launches; why not for the others."""

    def kernel_times(self, group: Group, n: int, tried: Sequence[Config]) -> dict[int, list[float]]:
        """Milliseconds of the group's kernel with each config, by its place in `tried`; none for one that fails."""

    def engine_times(self, kind: str, itemsize: int, columns: int, n: int) -> dict[str, list[float]]:
        """Milliseconds of a whole problem, host included, by engine; each engine again as "... again"."""


class DeviceBench:
    """A device that kernels run on; on a GPU other processes compile the candidates, several at a time."""

    def __init__(self, device: torch.device, workers: int | None = None) -> None:
        chip = chip_of(device)
        assert chip is not None
        self.chip, self.device = chip, device
        self.origin = _origin(device, chip)
        cuda = device.type == "cuda"
        count = min(12, os.cpu_count() or 1) if workers is None else workers
        self._compilers = Compilers(count, device) if cuda and count else None

    def prepare(self, group: Group, tried: Sequence[Config], seconds: float) -> dict[Config, str | None]:
        if self._compilers is None:
            return {config: attempt(group, config, self.device) for config in tried}
        found = self._compilers.run([(group, config) for config in tried], seconds)
        return dict(zip(tried, found, strict=True))

    def kernel_times(self, group: Group, n: int, tried: Sequence[Config]) -> dict[int, list[float]]:
        call, calls = engine_call(group, n, self.device), {}
        for place, config in enumerate(tried):
            # What compiles for few rows may still not launch for many: twice the programs, more memory.
            with using(group.kernel, config), contextlib.suppress(Exception):
                calls[place] = relaunch(call)
                _synchronize(self.device)
        return device_clock(calls, self.device) if self.device.type == "cuda" else host_clock(calls, self.device)

    def engine_times(self, kind: str, itemsize: int, columns: int, n: int) -> dict[str, list[float]]:
        call = whole_call(kind, itemsize, columns, n, self.device)

        def on(engine: str) -> Callable[[], object]:
            def run() -> object:
                with dispatch.use_engine(engine):
                    return call()

            return run

        names = ("triton", "reference")
        calls = {f"{name}{suffix}": on(name) for suffix in ("", " again") for name in names}
        return host_clock(calls, self.device)


def attempt(group: Group, config: Config, device: torch.device) -> str | None:
    """Launch the group's kernel on few rows; why that fails, if it does."""
    try:
        with using(group.kernel, config):
            engine_call(group, LEVELS[-1][1], device)()
        _synchronize(device)
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def _origin(device: torch.device, chip: Chip) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, interpreted"
    triton = importlib.metadata.version("triton")
    precision = torch.backends.cuda.matmul.fp32_precision
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    versions = f"torch {torch.__version__}, triton {triton}, CUDA {torch.version.cuda}"
    how = (
        f"k = columns, d = 8 k, rows {', '.join(str(n) for _, n in LEVELS)}, fp32 products {precision!r}, bᵀ contiguous"
    )
    return f"python -m interp_nn tune on {name} ({chip.name}), {today}, {versions}; measured with {how}"


def _serve(connection: Any, device: torch.device, precision: str) -> None:
    """The life of a process that compiles: tasks come, and what is wrong with them goes back."""
    torch.backends.cuda.matmul.fp32_precision = precision
    while True:
        group, config = connection.recv()
        why = attempt(group, config, device)
        if why is not None:
            _synchronize(device)  # raises, and so ends the process, where the failure has cost it the device
        connection.send(why)


class Compilers:
    """Processes that attempt candidates, which fills Triton's cache on disk. One that dies or hangs is replaced."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._device, self._free = device, count
        self._precision = torch.backends.cuda.matmul.fp32_precision
        self._idle: list[tuple[Any, Any]] = []

    def run(self, tasks: Sequence[tuple[Group, Config]], seconds: float) -> list[str | None]:
        """What is wrong with each task, None for nothing."""
        end = time.monotonic() + seconds
        found: list[str | None] = ["out of time"] * len(tasks)
        waiting = deque(range(len(tasks)))
        busy: dict[Any, tuple[Any, int, float]] = {}
        while waiting or busy:
            now = time.monotonic()
            for connection, (process, place, since) in list(busy.items()):
                if now > end or now - since > _COMPILING:
                    process.kill()
                    del busy[connection]
                    self._free += 1
                    found[place] = "out of time" if now > end else f"not compiled within {_COMPILING:.0f} s"
            if now > end:
                break
            while waiting and (self._idle or self._free):
                process, connection = self._idle.pop() if self._idle else self._started()
                place = waiting.popleft()
                busy[connection] = process, place, time.monotonic()
                with contextlib.suppress(OSError):  # it has died since: seen below
                    connection.send(tasks[place])
            ready: list[Any] = list(wait(list(busy), timeout=0.5))
            for connection in ready:
                process, place, _ = busy.pop(connection)
                try:
                    found[place] = connection.recv()
                    self._idle.append((process, connection))
                except (EOFError, OSError):
                    found[place] = "the process that tried it died"
                    self._free += 1
        return found

    def _started(self) -> tuple[Any, Any]:
        """A new process, and the connection to it."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._device, self._precision), daemon=True)
        process.start()
        theirs.close()
        self._free -= 1
        return process, ours


# Tuning


class Winner(NamedTuple):
    """A config and what it takes, in microseconds, and what the one before it took, where they were timed."""

    config: Config
    microseconds: float | None = None
    before: float | None = None


class _Tuning:
    """One run: what was found so far, and the file it is written to."""

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
        chip = self.bench.chip
        present = {rows: configs.choose(chip, group.bucket(rows)) for rows, _ in self.levels}
        best, outcome = dict(present), dict[Config, str | None]()
        for _ in range(_ROUNDS):
            near = [n for rows, config in best.items() for n in neighbours(config, group.bucket(rows), chip)]
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
        """Medians in milliseconds by place; none of what could not be timed."""
        try:
            taken = self.bench.kernel_times(group, n, tried)
        except RuntimeError as error:  # out of memory, most likely
            self.say(f"{group}, {n} rows: not timed: {error}".splitlines()[0][:200])
            return {}
        return {place: statistics.median(samples) for place, samples in taken.items() if samples}

    def _fastest(self, group: Group, n: int, tried: Sequence[Config]) -> Config:
        medians = self._times(group, n, tried) if len(tried) > 1 else {}
        return tried[min(medians, key=medians.__getitem__)] if medians else tried[0]

    def _duel(self, group: Group, n: int, present: Config, best: Config) -> Winner:
        """The better of two, timed once more; the present one twice, which tells the noise."""
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
        """Which engine is faster on whole problems (kind, itemsize, columns), with the configs found."""
        for kind, itemsize, columns in wanted:
            for rows, n in self.levels:
                label = f"{kind} {_NAMES[itemsize]}, {columns} columns, rows >= {rows}"
                if self.left() < 0:
                    self.say(f"{label}: skipped, out of time")
                    continue
                entry = self._engine(kind, itemsize, columns, rows, n, label)
                if entry is not None:
                    self.engines.append(entry)
            self.write()

    def _engine(self, kind: str, itemsize: int, columns: int, rows: int, n: int, label: str) -> dict[str, Any] | None:
        try:
            with table(self.output):
                taken = self.bench.engine_times(kind, itemsize, columns, n)
        except RuntimeError as error:
            self.say(f"{label}: not timed: {error}".splitlines()[0][:200])
            return None
        medians = {name: statistics.median(samples) for name, samples in taken.items() if samples}
        ours, theirs = (
            [medians[m] for m in (name, f"{name} again") if m in medians] for name in ("triton", "reference")
        )
        microseconds = {name: round(1e3 * value, 2) for name, value in medians.items()}
        name = "triton" if faster(max(ours), theirs) else "reference" if faster(max(theirs), ours) else None
        self.say(f"{label}: {name or 'no engine'} is faster, {microseconds} us")
        if name is None:
            return None
        classes = {"pair_loss": columns, "head_loss": 16}.get(kind, 16)
        bucket = {"itemsize": itemsize, "columns": columns, "classes": classes, "rows": rows}
        return {"problem": kind, **_where(self.bench.chip), **bucket, "engine": name, "microseconds": microseconds}

    def write(self) -> dict[str, Any]:
        """The table so far, which is also what the file now holds."""
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
        """What was found, and where an entry would also hold for what was not looked at, the present choice before it."""
        chip, out = self.bench.chip, []
        for group in sorted(_covered(self.found), key=lambda g: (list(TILES).index(g.kernel), *g[1:])):
            for rows, _ in sorted(self.levels, reverse=True):
                winner = self.found.get(group, {}).get(rows) or Winner(configs.choose(chip, group.bucket(rows)))
                config = winner.config._asdict() | {"tiles": list(winner.config.tiles)}
                times = {"microseconds": winner.microseconds, "before": winner.before}
                timed = {name: value for name, value in times.items() if value is not None}
                out.append({"kernel": group.kernel, **_where(chip), **group._asdict(), "rows": rows, **config, **timed})
        return out


def faster(one: float, others: Sequence[float]) -> bool:
    """Whether a time beats the same thing timed several times by more than these differ, and by more than a bit."""
    spread = (max(others) - min(others)) / min(others)
    return one < min(others) * (1 - max(_NOISE, spread))


def _short(config: Config) -> str:
    extra = (", parked" if config.parked else "") + (f", {config.resident} resident" if config.resident > 1 else "")
    return f"{config}{extra}"


def _where(chip: Chip) -> dict[str, Any]:
    return {"capabilities": [list(family(chip.capability) or chip.capability)]}


def _covered(found: Iterable[Group]) -> set[Group]:
    """The groups whose problems the entries of these would take: with no more columns and classes."""
    out = set(found)
    for group in found:
        columns = [c for c in _COLUMNS if c < group.columns] if group.columns in _COLUMNS else []
        classes = [c for c in _CLASSES if c < group.classes]
        out |= {
            group._replace(columns=c, classes=m) for c in (*columns, group.columns) for m in (*classes, group.classes)
        }
    return out


def write(path: Path, content: Mapping[str, Any]) -> None:
    """A table as the package's own one is written, an entry a line; the file is never half of one."""
    lines = [" " + json.dumps("origin") + ": " + json.dumps(content["origin"], ensure_ascii=False)]
    for name in ("kernels", "engines"):
        entries = ",\n".join("  " + json.dumps(entry) for entry in content[name])
        lines.append(f' "{name}": [\n{entries}\n ]' if entries else f' "{name}": []')
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    half.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    half.replace(path)


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
    """Measure, write the table to `output`, and return it. Raises RuntimeError where the triton engine is off.

    seconds limit the time; `wanted` and `problems` what is looked at, `levels` the rows; a `bench` stands for the device.
    """
    if bench is None:
        off = engines.unavailable("triton")
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
    """`python -m interp_nn tune`; the exit status."""
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
        content = tune(given.output, 60 * given.minutes, given.device)
    except RuntimeError as error:
        print(f"interp_nn tune: {error}", file=sys.stderr)
        return 2
    print(f"{given.output}: {len(content['kernels'])} kernels, {len(content['engines'])} engines")
    print(f"to use it: INTERP_NN_TABLE={given.output}")
    return 0
