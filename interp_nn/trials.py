"""Time kernel configs on a device for `interp_nn.tuning`, after worker processes have compiled them."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import multiprocessing
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from interp_nn import engines, functional
from interp_nn.engines import eager, select
from interp_nn.engines.devices import DeviceSpec, spec_of
from interp_nn.engines.limits import unsupported_reason
from interp_nn.engines.problem import ENGINES, Config, EngineName, LossOptions, Plan, Problem
from interp_nn.engines.triton import configs
from interp_nn.engines.triton.configs import Bucket

ITEMSIZES = {2: "bf16", 4: "fp32"}
_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_FEW_ROWS = 256  # to see whether a candidate compiles and launches
_COMPILING = 90.0  # seconds that this may take
_OPTIONS = LossOptions((1.0, 1.0, 1.0), -100, "mean")

Key = TypeVar("Key", bound=Hashable)


class Group(NamedTuple):
    """Buckets that differ in their rows only. They are measured with k = columns, d = 8 k, and 10 or 100 classes."""

    kernel: str
    itemsize: int
    columns: int
    classes: int = 16

    def bucket(self, rows: int) -> Bucket:
        """Return the bucket of so many rows."""
        return Bucket(self.kernel, self.itemsize, self.columns, self.classes, rows)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Return (d, k, m) of the measured problem."""
        return 8 * self.columns, self.columns, 10 if self.classes == 16 else 100

    def __str__(self) -> str:
        classes = f", {self.classes} classes" if self.kernel in ("latent_loss", "flat_loss") else ""
        return f"{self.kernel} {ITEMSIZES[self.itemsize]}, {self.columns} columns{classes}"


def engine_call(group: Group, n: int, device: torch.device, config: Config) -> Callable[[], object]:
    """Return a call of the triton engine that launches the group's kernel, with n rows and a layer's transposed weight."""
    engine = engines.unverified("triton")
    (d, k, m), dtype = group.sizes, _DTYPES[group.itemsize]
    tiles = ((group.kernel, config),)
    x = torch.randn(n, d, dtype=dtype, device=device)
    b = (torch.randn(k, d, device=device) / max(d, k) ** 0.5).to(dtype).t()
    for order, kernel in configs.LOSS_KERNELS.items():
        if kernel == group.kernel:
            head = kernel != "pair_loss"
            target = torch.randint(m if head else k, (n,), device=device)
            a = torch.randn(m, k, dtype=dtype, device=device) / k**0.5 if head else None
            c = torch.randn(m, dtype=dtype, device=device) if head else None
            plan = Plan("triton", order, saves=not head, tiles=tiles)
            return lambda: engine.loss(x, b, a, c, target, _OPTIONS, plan, None, (True, True, head, head))
    pair = group.kernel == "pair_backward"
    order = "X(bG)" if group.kernel in ("phased_forward", "phased_backward") else "(Xb)G"
    plan = Plan("triton", order, saves=pair, tiles=tiles)
    if group.kernel in ("stream", "phased_forward"):
        return lambda: engine.forward(x, b, None, plan, False)
    saved = [t.contiguous() for t in eager.forward(x, b, None, plan, pair)[2]]
    dp, dy = (torch.randn(n, k, dtype=dtype, device=device) for _ in range(2))
    return lambda: engine.backward(dp if pair else None, dy, x, b, saved, plan, True, True)


def whole_call(kind: str, itemsize: int, columns: int, n: int, device: torch.device) -> Callable[[], object]:
    """Return a call of forward and backward of a "summary", "pair", "pair_loss" or "head_loss", as a layer makes it."""
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
    """Time calls on the device with cold caches: between two events, behind a write that is long enough to hide the host."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
    flush = torch.empty(max(8 * cache, 2**30), dtype=torch.int8, device=device)
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
    """Time calls in a loop, the host's share included."""

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


# Devices that configs are tried on


class Bench(Protocol):
    """A device that configs are tried on: a GPU, or a test's substitute."""

    spec: DeviceSpec
    origin: str

    def prepare(self, group: Group, tried: Sequence[Config], seconds: float) -> dict[Config, str | None]:
        """Return None for each config that compiles and launches, an error message for the others."""

    def kernel_times(self, group: Group, n: int, tried: Sequence[Config]) -> dict[int, list[float]]:
        """Return milliseconds of the group's kernel by the config's place in `tried`, without those that fail."""

    def engine_times(self, kind: str, itemsize: int, columns: int, n: int) -> dict[str, list[float]]:
        """Return milliseconds of a whole problem, host included, by engine; each engine a second time as "... again"."""


class DeviceBench:
    """The device at hand. On a GPU other processes compile the candidates, several at a time."""

    def __init__(self, device: torch.device, workers: int | None = None) -> None:
        spec = spec_of(device)
        assert spec is not None
        self.spec, self.device = spec, device
        self.origin = _origin(device, spec)
        cuda = device.type == "cuda"
        count = min(12, os.cpu_count() or 1) if workers is None else workers
        self._compilers = Compilers(count, device) if cuda and count else None

    def prepare(self, group: Group, tried: Sequence[Config], seconds: float) -> dict[Config, str | None]:
        """Compile each config; see `Bench.prepare`."""
        if self._compilers is None:
            return {config: attempt(group, config, self.device) for config in tried}
        found = self._compilers.run([(group, config) for config in tried], seconds)
        return dict(zip(tried, found, strict=True))

    def kernel_times(self, group: Group, n: int, tried: Sequence[Config]) -> dict[int, list[float]]:
        """Time each config; see `Bench.kernel_times`."""
        calls = dict[int, Callable[[], object]]()
        for place, config in enumerate(tried):
            # A config that compiles for few rows may not launch for many: twice the programs, more memory.
            with contextlib.suppress(Exception):
                call = engine_call(group, n, self.device, config)
                call()
                _synchronize(self.device)
                calls[place] = call
        return device_clock(calls, self.device) if self.device.type == "cuda" else host_clock(calls, self.device)

    def _able(self, kind: str, itemsize: int, columns: int, n: int) -> list[EngineName]:
        """The engines that can compute a problem."""
        d, k, m = Group(kind, itemsize, columns).sizes
        classes = {"pair_loss": k, "head_loss": m}.get(kind)
        pair, head = kind in ("pair", "pair_loss"), kind == "head_loss"
        problem = Problem(n, d, k, pair, True, True, classes, head, _DTYPES[itemsize], self.spec, self.device.type)
        return [name for name in ENGINES if unsupported_reason(name, problem) is None]

    def engine_times(self, kind: str, itemsize: int, columns: int, n: int) -> dict[str, list[float]]:
        """Time each engine; see `Bench.engine_times`."""
        call = whole_call(kind, itemsize, columns, n, self.device)

        def on(engine: str) -> Callable[[], object]:
            def run() -> object:
                with select.use_engine(engine):
                    return call()

            return run

        calls = {
            f"{name}{suffix}": on(name) for suffix in ("", " again") for name in self._able(kind, itemsize, columns, n)
        }
        return host_clock(calls, self.device)


def attempt(group: Group, config: Config, device: torch.device) -> str | None:
    """Launch the group's kernel on few rows; return an error message if that fails."""
    try:
        engine_call(group, _FEW_ROWS, device, config)()
        _synchronize(device)
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def _origin(device: torch.device, spec: DeviceSpec) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, interpreted"
    triton = importlib.import_module("triton").__version__
    precision = torch.backends.cuda.matmul.fp32_precision
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    versions = f"torch {torch.__version__}, triton {triton}, CUDA {torch.version.cuda}, fp32 products {precision!r}"
    return f"python -m interp_nn tune on {name} ({spec.name}), {today}, {versions}"


def _serve(connection: Any, device: torch.device, precision: str) -> None:
    """Compile-worker loop: receives (group, config), sends back an error message or None, exits on EOF."""
    torch.backends.cuda.matmul.fp32_precision = precision
    while True:
        try:
            group, config = connection.recv()
        except EOFError:
            return
        why = attempt(group, config, device)
        if why is not None:
            _synchronize(device)  # raises, and so ends the process, where the failure has cost it the device
        connection.send(why)


class Compilers:
    """A pool of compile workers, which fill Triton's cache on disk. A worker that dies or hangs is replaced."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._device, self._free = device, count
        self._precision = torch.backends.cuda.matmul.fp32_precision
        self._idle: list[tuple[Any, Any]] = []

    def run(self, tasks: Sequence[tuple[Group, Config]], seconds: float) -> list[str | None]:
        """Return an error message or None for each task."""
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
        """Start a worker; return its process and the connection to it."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._device, self._precision), daemon=True)
        process.start()
        theirs.close()
        self._free -= 1
        return process, ours
