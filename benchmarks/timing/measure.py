"""One problem: every provider checked against fp64, timed in one interleaved run, and checked again.

All gradients are those of `torch.autograd.grad`, which adds to none: there is nothing to clear, and nothing that is timed twice.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.records.rows import Writer
from benchmarks.timing import footprint, providers
from benchmarks.timing.ceilings import Ceiling
from benchmarks.timing.clocks import Limit, Sampler, Timing, on_events, on_wall, rounds, summary
from benchmarks.timing.cuda_graphs import capture
from benchmarks.timing.fp64_reference import Truth, value_and_gradients
from benchmarks.timing.problems import Data, Problem, datasets, least_bytes, rotation, useful_flops
from benchmarks.timing.providers import Provider, UnsupportedError

TIMERS = {"cpu": ("wall",), "cuda": ("events", "graph")}
_SAMPLE_MS = 1.0  # of a sample on a GPU at least, as events of less time the host
_MOST = 500  # samples
_FAR, _LONG = 5, 0.5  # times the fastest, and seconds, beyond both of which a call is timed once
_PATIENCE = 6  # times the seconds of a run, beyond which it takes fewer samples


class Asked(NamedTuple):
    """How to measure. timer: of TIMERS. cold: with inputs in turn that the last cache does not hold. seconds: of one run at
    least, and long enough for `samples` rounds, but for calls that take long. call_limit: seconds of a call beyond which a
    provider is left out. limit: when it is over, what has not begun is skipped.
    """

    device: torch.device
    timer: str
    cold: bool = False
    engine: str = "auto"
    seconds: float = 1.5
    samples: int = 7
    call_limit: float = 10.0
    limit: Limit = Limit()


class _Entrant(NamedTuple):
    """A provider that is right so far, and its call in a mode on the i-th set of inputs."""

    provider: Provider
    call: Callable[[int], list[Tensor]]
    errors: list[tuple[float, float]]
    seconds: float


def measure(
    problem: Problem, modes: Sequence[str], names: Sequence[str], asked: Asked, ceiling: Ceiling | None, writer: Writer
) -> None:
    """Time the providers of a problem in each mode, and write a row for each of both.

    best-eager is the row of the fastest association; ceiling: what the device can do, for the rows' sol_frac.
    """
    fixed = {"n": problem.n, "d": problem.d, "k": problem.k, "m": problem.m, "op": problem.op, "dtype": problem.dtype}
    try:
        sets = datasets(problem, asked.device, rotation(problem, asked.device, asked.cold))
        truth = Truth(problem, sets[0])
    except Exception as error:
        status, note = said(error)
        for mode, name in itertools.product(modes, names):
            writer.write(**fixed, mode=mode, provider=name, status=status, note=note)
        return
    for mode in modes:
        found = left_out(names, asked) or _measure(problem, mode, names, asked, sets, truth)
        share = {"gflop": useful_flops(problem, mode) / 1e9, "least_mb": least_bytes(problem, mode) / 1e6}
        for name in names:
            row = found[name]
            if ceiling is not None and row.get("ms_p50"):
                row["sol_frac"] = 1e3 * ceiling.seconds(problem, mode) / row["ms_p50"]
            writer.write(**fixed, **share, mode=mode, provider=name, **row)


def left_out(names: Iterable[str], asked: Asked) -> dict[str, dict[str, Any]]:
    """What there is to say of each provider when the time is over; nothing before."""
    why = asked.limit.over()
    return {} if why is None else {name: {"status": "skipped", "note": why} for name in names}


def _measure(
    problem: Problem, mode: str, names: Sequence[str], asked: Asked, sets: Sequence[Data], truth: Truth
) -> dict[str, dict[str, Any]]:
    """What there is to say of each provider, by name."""
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, _Entrant] = {}
    eager = [name for name in providers.ASSOCIATIONS if name in names]
    best: str | None = None
    # Those that take the fastest association come when the others have been tried.
    for name in sorted(names, key=lambda name: name in ("compile", "graphed")):
        if name == "best-eager":
            continue
        if name in ("compile", "graphed") and best is None:
            best = min((n for n in eager if n in ready), key=lambda n: ready[n].seconds, default="assoc-a")
        try:
            ready[name] = _enter(name, problem, mode, asked, sets, truth, best)
        except Exception as error:
            found[name] = dict(zip(("status", "note"), said(error), strict=True))
    fastest = min((entrant.seconds for entrant in ready.values()), default=0.0)
    slow = {name for name, entrant in ready.items() if entrant.seconds > max(_FAR * fastest, _LONG)}
    timings = _time({name: entrant for name, entrant in ready.items() if name not in slow}, asked, len(sets))
    timings |= {name: summary([1e3 * ready[name].seconds]) for name in slow}
    for name, timing in timings.items():
        found[name] = _row(ready[name], mode, timing, truth, asked)
        if name in slow and found[name]["status"] == "ok":
            found[name]["note"] = f"timed once: over {_FAR} times the fastest"
        if name in ("compile", "graphed"):
            found[name]["plan"] = best
    if "best-eager" in names:
        medians = {name: found[name]["ms_p50"] for name in eager if found[name]["status"] == "ok"}
        found["best-eager"] = {"status": "skipped", "note": "no association was timed"}
        if medians:
            winner = min(medians, key=lambda name: medians[name])
            found["best-eager"] = {**found[winner], "plan": winner}
    return found


def _enter(
    name: str, problem: Problem, mode: str, asked: Asked, sets: Sequence[Data], truth: Truth, best: str | None
) -> _Entrant:
    """The provider's call, tried on every set and found right. Raises UnsupportedError or _WrongError with the reason."""
    if name == "graphed" and asked.timer != "events":
        why = "there are no CUDA graphs" if asked.timer == "wall" else "this timer replays every provider as a graph"
        raise UnsupportedError(why)
    provider = providers.build(name, problem, mode, sets, asked.engine, best)
    call = calling(provider, mode, sets)
    if name == "graphed":
        call = _replaying(call, len(sets), asked.device)
    with provider.using():
        start = time.perf_counter()
        got = call(0)
        _synchronize(asked.device)
        seconds = time.perf_counter() - start
        errors = truth.errors(provider, mode, got)
        if wrong := truth.breach(provider, mode, errors):
            raise _WrongError(wrong)
        del got
        for i in range(1, len(sets)):
            call(i)
        if seconds < asked.seconds or name == "compile":  # else the first call has warmed up what there is
            _synchronize(asked.device)
            start = time.perf_counter()
            call(0)
            _synchronize(asked.device)
            seconds = time.perf_counter() - start
    if seconds > asked.call_limit:
        raise _SkippedError(f"a call takes {seconds:.0f} s, over the limit of {asked.call_limit:.0f} s")
    return _Entrant(provider, call, errors, seconds)


class _WrongError(Exception):
    """A provider whose results are not what they should be."""


class _SkippedError(Exception):
    """A provider that would take too long."""


def said(error: Exception) -> tuple[str, str]:
    """The status and the note of what an exception says."""
    text = f"{error}".strip().splitlines()[0][:300] if f"{error}".strip() else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text:
        return "oom", text
    known = {UnsupportedError: "unsupported", _WrongError: "wrong", _SkippedError: "skipped"}
    if type(error) in known:
        return known[type(error)], text
    return "failed", f"{type(error).__name__}: {text}"


def calling(provider: Provider, mode: str, sets: Sequence[Data]) -> Callable[[int], list[Tensor]]:
    """What a mode does with a provider and a set of inputs; the graphs of "bwd" are built at their first call."""
    built: dict[int, Tensor] = {}

    def forward(i: int) -> list[Tensor]:
        return [provider.output(i)]

    def infer(i: int) -> list[Tensor]:
        with torch.no_grad():
            return [provider.output(i)]

    def backward(i: int) -> list[Tensor]:
        if i not in built:
            built[i] = provider.output(i)
        return list(torch.autograd.grad(built[i], provider.leaves(i), sets[i].dy, retain_graph=True))

    def both(i: int) -> list[Tensor]:
        return value_and_gradients(functools.partial(provider.output, i), provider.leaves(i), sets[i].dy)

    return {"fwd": forward, "infer": infer, "bwd": backward}.get(mode, both)


def _time(ready: Mapping[str, _Entrant], asked: Asked, sets: int) -> dict[str, Timing]:
    if not ready:
        return {}
    samplers: dict[str, Sampler] = {}
    held: list[Any] = []
    for name, entrant in ready.items():
        if asked.timer == "graph":
            samplers[name] = _graph_sampler(entrant, sets, asked.device, held)
        elif asked.timer == "events":
            calls = max(1, min(4 * sets, round(_SAMPLE_MS / max(1e3 * entrant.seconds, 1e-4))))
            samplers[name] = _sampler(entrant, sets, calls, on_events)
        else:
            samplers[name] = _sampler(entrant, sets, 1, on_wall)
    if asked.device.type == "cuda":  # where clocks rise with the load
        rounds(samplers, 0.0, least=1, most=1)
    taken = rounds(samplers, asked.seconds, asked.samples, max(asked.samples, _MOST), _PATIENCE * asked.seconds)
    return {name: summary(samples) for name, samples in taken.items()}


def _sampler(
    entrant: _Entrant, sets: int, calls: int, clock: Callable[[Callable[[], object], int], Sampler]
) -> Sampler:
    """A sample of so many calls, on the sets in turn, by the engine that the provider is of."""
    turn = itertools.cycle(range(sets))

    def work() -> None:
        for _ in range(calls):
            entrant.call(next(turn))

    sample = clock(work, calls)

    def asked() -> float:
        with entrant.provider.using():
            return sample()

    return asked


def _graph_sampler(entrant: _Entrant, sets: int, device: torch.device, held: list[Any]) -> Sampler:
    """Replays of one CUDA graph of a call on each set."""

    def everything(_: int) -> list[Tensor]:
        for i in range(sets):
            entrant.call(i)
        return []

    with entrant.provider.using():
        graph = capture(functools.partial(everything, 0), device)[0]
    held.append(graph)
    return on_events(graph.replay, sets)


def _replaying(call: Callable[[int], list[Tensor]], sets: int, device: torch.device) -> Callable[[int], list[Tensor]]:
    graphs = [capture(functools.partial(call, i), device) for i in range(sets)]

    def replay(i: int) -> list[Tensor]:
        graph, out = graphs[i]
        graph.replay()
        return list(out)

    return replay


def _row(entrant: _Entrant, mode: str, timing: Timing, truth: Truth, asked: Asked) -> dict[str, Any]:
    """What a timed provider's row says: it is checked once more, and what it holds and launches is counted."""
    provider = entrant.provider
    with provider.using():
        peak, got = footprint.peak_bytes(lambda: entrant.call(0), asked.device)
        errors = truth.errors(provider, mode, got)
        why = truth.breach(provider, mode, errors)
        saves = mode in ("fwd", "fwdbwd", "loss")
        launched = launches(lambda: entrant.call(0), asked.device)
        saved = footprint.saved_bytes(lambda: provider.output(0), provider.leaves(0)) if saves else None
    ratios = [o[0] / p[0] for o, p in zip(errors, truth.plain_errors(provider, mode), strict=True) if p[0] > 0]
    return {
        "plan": provider.plan,
        **timing.fields(),
        "peak_delta_mb": peak / 1e6,
        "saved_mb": None if saved is None else saved / 1e6,
        "launches": launched,
        "err_fro": max(error[0] for error in errors),
        "err_ratio": max(ratios, default=None),
        "status": "ok" if why is None else "wrong",
        "note": None if why is None else f"after timing: {why}",
    }


def launches(call: Callable[[], object], device: torch.device) -> int | None:
    """How many kernels a call launches on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    from benchmarks.gpu.kernels import profiled

    _, names = profiled(call, device)
    return sum(not name.startswith("Mem") for name in names or [])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
