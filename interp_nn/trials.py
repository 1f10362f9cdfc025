"""Time kernel configs on a device for `interp_nn.tuning`. On a GPU other processes compile, run and time them: they may hang."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
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
from interp_nn.engines.workers import Workers

ITEMSIZES = {2: "bf16", 4: "fp32"}
_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_FEW_ROWS = 256  # to see whether a candidate compiles and launches
_LIMIT = 90.0  # seconds that one config may take to compile and launch, or some configs to be timed
_TENSOR_MEMORY = 512  # columns of a multiprocessor
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
        precision = torch.backends.cuda.matmul.fp32_precision
        self._workers = Workers(count, partial(_task, device, precision), _LIMIT) if cuda and count else None

    def prepare(self, group: Group, tried: Sequence[Config], seconds: float) -> dict[Config, str | None]:
        """Compile each config; see `Bench.prepare`."""
        if self._workers is None:
            return {config: attempt(group, config, self.device) for config in tried}
        found = self._workers.run([(group, _FEW_ROWS, [config]) for config in tried], seconds)
        return dict(zip(tried, found, strict=True))

    def kernel_times(self, group: Group, n: int, tried: Sequence[Config]) -> dict[int, list[float]]:
        """Time each config; see `Bench.kernel_times`."""
        if self._workers is None:
            return timed(group, n, dict(enumerate(tried)), self.device)
        # A config that ran with few rows may fail, or wait for ever, with many: more programs, more memory.
        found = self._workers.run([(group, n, [config]) for config in tried], _LIMIT * len(tried))
        alive = {place: config for place, config in enumerate(tried) if found[place] is None}
        (taken,) = self._workers.run([(group, n, alive)], 2 * _LIMIT)
        if not isinstance(taken, dict):
            raise RuntimeError(taken)
        return taken

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


def timed(group: Group, n: int, tried: Mapping[int, Config], device: torch.device) -> dict[int, list[float]]:
    """Return milliseconds of each config that launches, by its place."""
    calls = dict[int, Callable[[], object]]()
    for place, config in tried.items():
        with contextlib.suppress(Exception):
            call = engine_call(group, n, device, config)
            call()
            _synchronize(device)
            calls[place] = call
    return device_clock(calls, device) if device.type == "cuda" else host_clock(calls, device)


def attempt(group: Group, config: Config, device: torch.device, n: int = _FEW_ROWS) -> str | None:
    """Launch the group's kernel on n rows; return an error message if that fails."""
    try:
        call = engine_call(group, n, device, config)
        if config.blocks_per_sm > 1:
            columns = config.blocks_per_sm * _tensor_memory(call)
            if columns > _TENSOR_MEMORY:  # a block that finds none waits, and so would the grid barrier, for ever
                return f"{columns} columns of tensor memory, and a multiprocessor has {_TENSOR_MEMORY}"
        call()
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


def _task(device: torch.device, precision: str, task: tuple[Group, int, Any]) -> Any:
    """Launch a config and return what `attempt` does, or time configs by their places, in a process of its own."""
    torch.backends.cuda.matmul.fp32_precision = precision
    group, n, tried = task
    if isinstance(tried, dict):
        return timed(group, n, tried, device)
    why = attempt(group, tried[0], device, n)
    if why is not None:
        _synchronize(device)  # raises, and so ends the process, where the failure has cost it the device
    return why


@contextlib.contextmanager
def _compiled_only() -> Iterator[list[Any]]:
    """Compile what the triton engine would launch, without launching it, and collect the compiled kernels."""
    engine: Any = engines.unverified("triton")
    found: list[Any] = []

    def compile_only(made: Any, device: torch.device, *arguments: Any) -> None:
        found.append(made.kernel.warmup(*arguments, grid=(made.programs,), **made.constants))

    launch, engine.launch = engine.launch, compile_only
    try:
        yield found
    finally:
        engine.launch = launch


def _tensor_memory(call: Callable[[], object]) -> int:
    """Return the most columns of tensor memory that a block of the call's kernels takes."""
    with _compiled_only() as kernels:
        call()
    return max((getattr(kernel.metadata, "tmem_size", None) or 0 for kernel in kernels), default=0)
