"""One problem: each provider is compared with fp64, timed in one interleaved run, and compared again.

Gradients come from `torch.autograd.grad`, which accumulates nothing: no call has to clear them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.records.report import BEST_PLAN, CHEAPER, REPEAT
from benchmarks.records.rows import Writer
from benchmarks.timing import clocks, custom, footprint, layer_providers, providers
from benchmarks.timing.clocks import Limit, Sampler, Timing, rounds
from benchmarks.timing.cuda_graphs import capture, synchronize
from benchmarks.timing.fp64_reference import Fp64Reference, value_and_gradients
from benchmarks.timing.problems import LAYERS, OPS, Data, Problem, datasets, least_bytes, rotation, useful_flops
from benchmarks.timing.providers import Provider, UnsupportedError
from benchmarks.timing.roofline import Ceiling

# "events" times calls as a program makes them, "graph" replays them without the host, "host" is the host's share alone.
TIMERS = {"cpu": ("wall",), "cuda": ("events", "graph", "host")}
_SAMPLE_MS = 1.0  # the shortest sample: in a shorter one events time a GPU's host, and a CPU call finds cold caches
_HOST_CALLS = 50  # calls in a sample of the host, fewer than the driver queues
_MOST = 500  # samples
_FAR, _LONG = 5, 0.5  # a call slower than both, times the fastest and seconds, has its trials as its samples
_LONG_PLAN = 1e-3  # the same for a plan that is not chosen, beside the fastest plan
_PATIENCE = 6  # times the seconds of a run, after which five rounds are enough


class Asked(NamedTuple):
    """How to measure: with one of the device's TIMERS, and with `cold` on sets of inputs that the last cache does not hold.

    One run has `seconds`, more where `samples` rounds take longer, and fewer rounds of slow calls. A provider whose call takes
    more than `call_limit` seconds is left out. After `limit` problems and modes are skipped. `profile` counts launches on a GPU.
    """

    device: torch.device
    timer: str
    cold: bool = False
    engine: str = "auto"
    seconds: float = 1.5
    samples: int = 7
    call_limit: float = 10.0
    limit: Limit = Limit()
    profile: bool = True

    def fields(self) -> dict[str, str]:
        """Return the clock and the cache as a record names them."""
        return {"timer": self.timer, "l2": "cold" if self.cold else "hot"}


class _Entrant(NamedTuple):
    """A provider that is right so far, its call on the i-th set of inputs, seconds of its trials, and its clock."""

    provider: Provider
    call: Callable[[int], list[Tensor]]
    trials: list[float]
    sampler: Sampler

    @property
    def seconds(self) -> float:
        return min(self.trials)


class WrongError(Exception):
    """The results of a provider are wrong."""


class _SkippedError(Exception):
    """A provider takes too long."""


def measure(
    problem: Problem, modes: Sequence[str], names: Sequence[str], asked: Asked, ceiling: Ceiling | None, writer: Writer
) -> None:
    """Time the providers of a problem in each mode, and write a row for each; best-eager has that of `fastest_by_halves`."""
    fixed = {**problem._asdict(), **asked.fields()}
    try:
        sets = datasets(problem, asked.device, rotation(problem, asked.device, asked.cold))
        reference = Fp64Reference(problem, sets[0])
    except Exception as error:
        for mode, name in itertools.product(modes, names):
            writer.write(**fixed, mode=mode, provider=name, **said(error))
        return
    for mode in modes:
        found = left_out(names, asked) or _measure(problem, mode, names, asked, sets, reference)
        share = {"gflop": useful_flops(problem, mode) / 1e9, "least_mb": least_bytes(problem, mode) / 1e6}
        for name in names:
            row = found[name] | custom.about(name)
            if ceiling is not None and row.get("ms_p50") and name not in CHEAPER and custom.is_summary(name):
                row["sol_frac"] = 1e3 * ceiling.seconds(problem, mode) / row["ms_p50"]
            writer.write(**fixed, **share, mode=mode, provider=name, **row)


def left_out(names: Iterable[str], asked: Asked) -> dict[str, dict[str, Any]]:
    """Return a row for each provider when the time is over, nothing before."""
    why = asked.limit.over()
    return {} if why is None else {name: {"status": "skipped", "note": why} for name in names}


def time_calls(
    names: Iterable[str], enter: Callable[[str], tuple[Callable[[], object], Callable[[], dict[str, Any]]]],
    clock: Callable[[Callable[[], object], int], Sampler], asked: Asked,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Time one call of each provider in turn; `enter` checks it and returns it with the rest of its row, computed afterwards."""
    names = list(names)
    found, ready = left_out(names, asked), {}
    for name in names if not found else ():
        try:
            ready[name] = enter(name)
        except Exception as error:
            found[name] = said(error)
    samplers = {name: clock(call, 1) for name, (call, _) in ready.items()}
    rounds(samplers, 0.0, least=2, most=2)
    for name, taken in rounds(samplers, asked.seconds, asked.samples, _MOST).items():
        found[name] = {**clocks.summary(taken).fields(), **ready[name][1]()}
    return found


def _measure(
    problem: Problem, mode: str, names: Sequence[str], asked: Asked, sets: Sequence[Data], reference: Fp64Reference
) -> dict[str, dict[str, Any]]:
    """Return the row of each provider, by name."""
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, _Entrant] = {}
    eager, twin = [name for name in providers.ASSOCIATIONS if name in names], providers.repeated(names)
    same = problem.op in OPS and {"unfused", "assoc-a"} <= set(names)  # calls, which are timed once
    best: str | None = None
    # Providers that take the fastest association are tried after the others.
    for name in sorted(names, key=lambda name: name in providers.OF_THE_BEST):
        if name in ("best-eager", BEST_PLAN) or (same and name == "unfused"):
            continue
        if name in providers.OF_THE_BEST and best is None:
            best = min((n for n in eager if n in ready), key=lambda n: ready[n].seconds, default="assoc-a")
        try:
            ready[name] = _enter(twin if name == REPEAT else name, problem, mode, asked, sets, reference, best)
        except Exception as error:
            found[name] = said(error)
    seconds = {name: entrant.seconds for name, entrant in ready.items()}
    plans = {name: seconds[name] for name in ("ours", *providers.PLAN_NAMES) if name in seconds}
    slow = _slow(seconds, _LONG) | (_slow(plans, _LONG_PLAN) - {"ours"})
    timings = _time({name: entrant for name, entrant in ready.items() if name not in slow}, asked)
    timings |= {name: clocks.summary([1e3 * seconds for seconds in ready[name].trials]) for name in slow}
    for name, timing in timings.items():
        found[name] = _row(ready[name], mode, timing, reference, asked)
        if name == REPEAT:
            found[name]["plan"] = twin
        if name in slow and found[name]["status"] == "ok":
            found[name]["note"] = f"timed in its trials alone: over {_FAR} times the fastest"
    if same:
        found["unfused"] = {**found["assoc-a"], "plan": "assoc-a"}
    if "best-eager" in names:
        found["best-eager"] = fastest_by_halves(found, eager)
    if BEST_PLAN in names:
        best_plan = _fastest(found, [name for name in ("ours", *providers.PLAN_NAMES) if name in names])
        found[BEST_PLAN] = best_plan | {"plan": found.get(str(best_plan.get("plan")), {}).get("plan")}
    return found


def _slow(seconds: dict[str, float], long: float) -> set[str]:
    least = max(_FAR * min(seconds.values(), default=0.0), long)
    return {name for name, taken in seconds.items() if taken > least}


def _fastest(found: dict[str, dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return the row of the fastest of some providers, with its name as the plan."""
    medians = {name: found[name]["ms_p50"] for name in names if found[name]["status"] == "ok"}
    if not medians:
        return {"status": "skipped", "note": "none of them was timed"}
    winner = min(medians, key=lambda name: medians[name])
    return {**found[winner], "plan": winner}


def fastest_by_halves(found: dict[str, dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return the row of the fastest of some providers, timed in each half of the groups of rounds by its choice in the other.

    The least of several medians is too small where providers are equally fast: it is the one that noise has favoured. Groups of
    rounds that took no part in the choice favour none. Where the choices differ, the quantiles are those of groups.
    """
    row = _fastest(found, names)
    if row["status"] != "ok" or len(row["ms_groups"]) < 2:
        return row
    groups = [found[name]["ms_groups"] for name in names if found[name]["status"] == "ok"]
    groups = [one for one in groups if len(one) == len(row["ms_groups"])]  # slow providers have fewer
    even = min(groups, key=lambda one: float(np.median(one[0::2])))
    odd = min(groups, key=lambda one: float(np.median(one[1::2])))
    if even == odd:
        return row
    timed = tuple((even if i % 2 else odd)[i] for i in range(len(even)))
    p50, p20, p80 = np.quantile(timed, (0.5, 0.2, 0.8)).tolist()
    return {**row, "ms_groups": timed, "ms_p50": p50, "ms_p20": p20, "ms_p80": p80}


def _enter(
    name: str, problem: Problem, mode: str, asked: Asked, sets: Sequence[Data], reference: Fp64Reference, best: str | None
) -> _Entrant:  # fmt: skip
    """Try a provider on every set, compare its results with the reference, and make its clock; raises why it is not timed."""
    if name == "graphed" and asked.timer in ("wall", "graph"):
        why = "there are no CUDA graphs" if asked.timer == "wall" else "this timer replays every provider as a graph"
        raise UnsupportedError(why)
    if name in providers.INVERSES and asked.timer == "graph":
        raise UnsupportedError("torch.linalg waits for the device, which a graph cannot record")
    build = layer_providers.build if problem.op in LAYERS else providers.build
    provider = build(name, problem, mode, sets, asked.engine, best)
    call = calling(provider, mode, sets)
    if name == "graphed":
        call = _replaying(call, len(sets), asked.device)
    with provider.using():
        if wrong := reference.exceeds(provider, mode, reference.errors(provider, mode, call(0))):
            raise WrongError(wrong)
        for i in range(1, len(sets)):
            call(i)

        def one() -> None:
            call(0)
            synchronize(asked.device)

        trials = clocks.settled(one)
    seconds = min(trials)
    if seconds > asked.call_limit:
        raise _SkippedError(f"a call takes {seconds:.0f} s, over the limit of {asked.call_limit:.0f} s")
    return _Entrant(provider, call, trials, _sampler(provider, call, seconds, len(sets), asked))


def said(error: Exception) -> dict[str, Any]:
    """Return the status and the note of an exception."""
    text = f"{error}".strip().splitlines()[0][:300] if f"{error}".strip() else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text:
        return {"status": "oom", "note": text}
    known = {UnsupportedError: "unsupported", WrongError: "wrong", _SkippedError: "skipped"}.get(type(error))
    if known:
        return {"status": known, "note": text}
    return {"status": "failed", "note": f"{type(error).__name__}: {text}{custom.place(error)}"}


def calling(provider: Provider, mode: str, sets: Sequence[Data]) -> Callable[[int], list[Tensor]]:
    """Return what a mode does with a provider and the i-th set of inputs; the first call for "bwd" builds its graph."""
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

    return provider.direct or {"fwd": forward, "infer": infer, "bwd": backward}.get(mode, both)


def _time(entrants: dict[str, _Entrant], asked: Asked) -> dict[str, Timing]:
    samplers = {name: entrant.sampler for name, entrant in entrants.items()}
    # A GPU's clocks rise with the load, and quick calls share an allocator that still grows.
    if asked.device.type == "cuda" or sum(entrant.seconds for entrant in entrants.values()) < asked.seconds:
        rounds(samplers, 0.0, least=1, most=1)
    taken = rounds(samplers, asked.seconds, asked.samples, max(asked.samples, _MOST), _PATIENCE * asked.seconds)
    return {name: clocks.summary(samples) for name, samples in taken.items() if samples}


def _sampler(
    provider: Provider, call: Callable[[int], list[Tensor]], seconds: float, sets: int, asked: Asked
) -> Sampler:
    """Return the clock of a provider's calls on the sets in turn, or of replays of one graph of a call on each set."""
    if asked.timer == "graph":

        def everything() -> None:
            for i in range(sets):
                call(i)

        with provider.using():
            return clocks.on_events(capture(everything, asked.device)[0].replay, sets)
    turn = itertools.cycle(range(sets))
    enough = max(1, round(_SAMPLE_MS / max(1e3 * seconds, 1e-4)))
    calls = {"wall": enough, "host": _HOST_CALLS}.get(asked.timer, min(4 * sets, enough))

    def work() -> None:
        for _ in range(calls):
            call(next(turn))

    sample = {"wall": clocks.on_wall, "host": clocks.on_host}.get(asked.timer, clocks.on_events)(work, calls)

    def in_use() -> float:
        with provider.using():
            return sample()

    return in_use


def _replaying(call: Callable[[int], list[Tensor]], sets: int, device: torch.device) -> Callable[[int], list[Tensor]]:
    graphs = [capture(functools.partial(call, i), device) for i in range(sets)]

    def replay(i: int) -> list[Tensor]:
        graph, out = graphs[i]
        graph.replay()
        return list(out)

    return replay


def _row(entrant: _Entrant, mode: str, timing: Timing, reference: Fp64Reference, asked: Asked) -> dict[str, Any]:
    """Return the row of a timed provider: its results are compared once more, its memory and launches are counted."""
    provider, saved = entrant.provider, None
    with provider.using():
        peak, got = footprint.peak_bytes(lambda: entrant.call(0), asked.device)
        errors = reference.errors(provider, mode, got)
        why = reference.exceeds(provider, mode, errors)
        launched = footprint.launches(lambda: entrant.call(0), asked.device) if asked.profile else None
        if mode in ("fwd", "fwdbwd", "loss") and provider.direct is None:
            saved = footprint.saved_bytes(lambda: provider.output(0), provider.leaves(0)) / 1e6
    ratios = [o[0] / p[0] for o, p in zip(errors, reference.plain_errors(provider, mode), strict=True) if p[0] > 0]
    return {
        "plan": provider.plan, **timing.fields(), "peak_delta_mb": peak / 1e6, "saved_mb": saved, "launches": launched,
        "err_fro": max(error[0] for error in errors), "err_ratio": max(ratios, default=None),
        "status": "ok" if why is None else "wrong", "note": None if why is None else f"after timing: {why}",
    }  # fmt: skip
