"""The timings: ours by every engine against the expression a user would write, the best association of it, and nn.Linear.

Each problem has more sets of inputs than the second-level cache holds, taken in turn. Two clocks: "plain" is a loop of calls
as a program makes them, the host's share included; "graph" replays a CUDA graph of them, which leaves the device's. For few
rows the host's share is all there is, so a third one takes it alone. Which engine is faster is a line of its own, in the
form that a table of `interp_nn.engines.triton.configs` has.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import interp_nn
from benchmarks.gpu import kernels
from benchmarks.gpu.log import Log
from benchmarks.timing import providers
from benchmarks.timing.clocks import on_events, on_host, rounds
from benchmarks.timing.cuda_graphs import captured, spare_words
from benchmarks.timing.problems import Data, drawn, filling
from interp_nn import engines, functional
from interp_nn.engines import barrier as barrier_words
from interp_nn.engines.devices import chip_of, family
from interp_nn.engines.eager import LossOptions
from interp_nn.engines.triton.configs import padded

_PLAIN_MS = 1.0  # of one sample at least
_LEAST, _MOST = 5, 60  # rounds
_OPTIONS = LossOptions((1.0, 1.0, 1.0), -100, "mean")
_UNFUSED, _LINEAR, _INVERSE = "unfused", "linear", "inverse-inv"
_HOST_CALLS = 50  # of one sample: fewer than the driver queues
_KINDS = {"both": "summary", "loss": "pair_loss", "head": "head_loss"}  # what a tuned table calls them


class Problem(NamedTuple):
    """What is timed: "forward" (inference), "backward", "both", "loss" or "head" (with all gradients), at what size."""

    what: str
    n: int
    d: int
    k: int
    m: int | None
    dtype: torch.dtype

    @property
    def name(self) -> str:
        sizes = ", ".join(str(size) for size in (self.n, self.d, self.k, self.m) if size is not None)
        return f"{self.what} ({sizes}) {str(self.dtype).removeprefix('torch.')}"


SHAPES = ((65536, 1024, 128), (65536, 512, 64), (4096, 512, 100), (32, 512, 100))
HEADS = ((65536, 512, 100, 10), (4096, 512, 100, 10))


def problems() -> list[Problem]:
    """All of them, those that say most first."""
    out = []
    for dtype in (torch.bfloat16, torch.float32):
        out += [Problem("loss", n, d, k, None, dtype) for n, d, k in SHAPES]
        out += [Problem("head", *shape, dtype) for shape in HEADS]
        out += [Problem(what, n, d, k, None, dtype) for what in ("both", "forward", "backward") for n, d, k in SHAPES]
    return out


def tiny_problems() -> list[Problem]:
    """One of each kind, for Triton's interpreter."""
    sizes = 9, 20, 6
    kinds = [Problem(what, *sizes, None, torch.float32) for what in ("forward", "backward", "both", "loss")]
    return [*kinds, Problem("head", *sizes, 3, torch.float32)]


def datasets(problem: Problem, device: torch.device, cache: int) -> list[Data]:
    """So many sets that they and their gradients fill the cache twice, within limits."""
    _, n, d, k, m, dtype = problem
    return drawn(n, d, k, m or k, dtype, device, filling(n, d, k, dtype.itemsize, cache))


class Provider(NamedTuple):
    """A way to compute a problem: what it does with one set of inputs, and the engine asked for meanwhile if it is ours."""

    call: Callable[[int], Sequence[Tensor]]
    engine: str | None = None
    capturable: bool = True

    def using(self) -> contextlib.AbstractContextManager[object]:
        """In which its call is made."""
        return contextlib.nullcontext() if self.engine is None else interp_nn.use_engine(self.engine)


def candidates(problem: Problem, engines: Sequence[str], sets: Sequence[Data]) -> dict[str, Provider]:
    """Every provider of a problem, by name: ours by each engine, those with kernels also without what is around them."""
    functions = _losses(problem) if problem.what in ("loss", "head") else _summaries(problem)
    ours = functions.pop("ours")
    made = {engine: Provider(_calling(problem, ours, sets), engine) for engine in (*engines, "auto", "reference")}
    made |= {f"{engine} kernel": Provider(_kernel_call(problem, engine, sets), engine) for engine in engines}
    return made | {name: Provider(_calling(problem, f, sets), None, name != _INVERSE) for name, f in functions.items()}


def able(problem: Problem, engines: Sequence[str], device: torch.device, log: Log) -> list[str]:
    """The engines that do not refuse a problem; a line for each that does."""
    what, n, d, k, m, dtype = problem
    classes = m or (k if what == "loss" else None)
    found = {engine: kernels.refusal(engine, device, dtype, n, d, k, classes, m is not None) for engine in engines}
    for engine, why in found.items():
        if why is not None:
            log.write(f"{problem.name}, {engine}", "skipped", why=why)
    return [engine for engine in engines if found[engine] is None]


def _summaries(problem: Problem) -> dict[str, Callable[..., Tensor]]:
    def with_columns(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda t: f(t.x, t.w.t())

    wide = ("assoc-d", "assoc-e") if problem.k > problem.d else ()
    rivals = {_UNFUSED: providers.ASSOCIATIONS["assoc-a"]}
    rivals |= {name: providers.ASSOCIATIONS[name] for name in ("assoc-b", "assoc-c", *wide)}
    if problem.what == "forward" and not wide and problem.dtype.itemsize > 2:  # torch.linalg has no 16 bits
        rivals[_INVERSE] = providers.INVERSES[_INVERSE]
    functions: dict[str, Callable[..., Tensor]] = {"ours": lambda t: functional.summary(t.x, t.w.t())}
    functions |= {name: with_columns(f) for name, f in rivals.items()}
    return {**functions, _LINEAR: lambda t: F.linear(t.x, t.w)}


def _losses(problem: Problem) -> dict[str, Callable[..., Tensor]]:
    """Losses in the inputs' dtype where they are PyTorch's own: the fewest kernels a user could have."""

    def three_terms(logits: Iterable[Tensor], target: Tensor) -> Tensor:
        o1, o2 = logits
        return F.cross_entropy(o1, target) + F.cross_entropy(o2, target) + F.mse_loss(o1, o2)

    def pair(t: Data) -> tuple[Tensor, Tensor]:
        p = t.x @ t.w.t()
        return p, p @ (t.w @ t.w.t())

    if problem.m is None:
        return {
            "ours": lambda t: functional.summary_cross_entropy(t.x, t.w.t(), t.target),
            _UNFUSED: lambda t: three_terms(pair(t), t.target),
            _LINEAR: lambda t: F.cross_entropy(F.linear(t.x, t.w), t.target),
        }
    return {
        "ours": lambda t: functional.summary_head_cross_entropy(t.x, t.w.t(), t.a, t.c, t.target),
        _UNFUSED: lambda t: three_terms((F.linear(o, t.a, t.c) for o in pair(t)), t.target),
        _LINEAR: lambda t: F.cross_entropy(F.linear(F.linear(t.x, t.w), t.a, t.c), t.target),
    }


def _calling(problem: Problem, f: Callable[..., Tensor], sets: Sequence[Data]) -> Callable[[int], Sequence[Tensor]]:
    """What is timed of f: its value, its value and gradients, or, of graphs that are built at the first call, gradients."""
    built: dict[int, Tensor] = {}
    inputs = 4 if problem.m is not None else 2

    def forward(i: int) -> Sequence[Tensor]:
        with torch.no_grad():
            return [f(sets[i])]

    def both(i: int) -> Sequence[Tensor]:
        y = f(sets[i])
        dy = None if y.dim() == 0 else sets[i].dy
        return [y.detach(), *torch.autograd.grad(y, sets[i][:inputs], dy)]

    def backward(i: int) -> Sequence[Tensor]:
        if i not in built:
            built[i] = f(sets[i])
        return torch.autograd.grad(built[i], sets[i][:inputs], sets[i].dy, retain_graph=True)

    return {"forward": forward, "backward": backward}.get(problem.what, both)


def _kernel_call(problem: Problem, name: str, sets: Sequence[Data]) -> Callable[[int], Sequence[Tensor]]:
    """An engine's own calls, without operator and autograd around them."""
    engine: Any = engines.get(name)
    kept: dict[int, list[Tensor]] = {}

    @functools.cache
    def form(device: torch.device) -> str:  # asked for at the first call, in which the engine is in use
        n, d, k, m = problem[1:5]
        return "A+" if m is None else interp_nn.plan(n, d, k, classes=m, dtype=problem.dtype, device=device).form

    def forward(t: Data) -> tuple[Tensor, list[Tensor]]:
        _, y, keeps = engine.forward(t.x, t.w.t(), None, "A", False)
        return y, keeps

    def backward(t: Data, keeps: list[Tensor]) -> list[Tensor]:
        return [*engine.backward(None, t.dy, t.x, t.w.t(), keeps, "A", True, True)[:2]]

    def call(i: int) -> Sequence[Tensor]:
        t = Data(*(value.detach() for value in sets[i]))
        if problem.what in ("loss", "head"):
            head = problem.m is not None
            a, c = (t.a, t.c) if head else (None, None)
            needs = (True, True, head, head)
            value, grads = engine.loss(t.x, t.w.t(), a, c, t.target, _OPTIONS, form(t.x.device), None, needs)
            return [value, *grads]
        if problem.what == "forward":
            return [forward(t)[0]]
        if problem.what == "backward":
            if i not in kept:
                kept[i] = forward(t)[1]
            return backward(t, kept[i])
        y, keeps = forward(t)
        return [y, *backward(t, keeps)]

    return call


def difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative Frobenius difference; shapes may differ by a transposition."""
    worst = 0.0
    for g, e in zip(got, expected, strict=True):
        g, e = (g if g.shape == e.shape else g.mT).float(), e.float()
        worst = max(worst, float((g - e).norm() / e.norm()))
    return worst


class Clock(NamedTuple):
    """Samples of one provider: milliseconds a call."""

    samples: list[float]
    calls: int

    def facts(self) -> dict[str, Any]:
        p50, p20, p80 = (1e3 * value for value in np.quantile(self.samples, (0.5, 0.2, 0.8)).tolist())
        return {"us_p50": p50, "us_p20": p20, "us_p80": p80, "samples": len(self.samples), "calls": self.calls}


def time_problem(problem: Problem, engines: Sequence[str], device: torch.device, seconds: float, log: Log) -> None:
    """Every provider of a problem by both clocks, each first compared with the unfused expression; a line for each."""
    sets = datasets(problem, device, torch.cuda.get_device_properties(device).L2_cache_size)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        ready = right(problem, engines, sets, log)
        plain = _plain(ready, len(sets), seconds / 2)
        graphs = _graphs(ready, len(sets), stream, seconds / 2)
    for name, provider in ready.items():
        clocks = {"plain": plain[name].facts(), "graph": graphs[name].facts() if name in graphs else None}
        log.write(f"{problem.name}, {name}", "ok", **clocks, **_facts(problem, name, provider, sets))
    rivals = {name: plain[name] for name in (*engines, "reference") if name in ready}
    log.write(problem.name, "info", **fastest(rivals), entry=_entry(problem, device, rivals))


def check_problem(problem: Problem, engines: Sequence[str], device: torch.device, log: Log) -> None:
    """The providers of a problem without the clocks; a line for each."""
    sets = datasets(problem, device, 0)
    for name, provider in right(problem, engines, sets, log).items():
        log.write(f"{problem.name}, {name}", "ok", **_facts(problem, name, provider, sets))


def host_problems() -> list[Problem]:
    """Of so few rows that the host's share is the time of a call."""
    return [Problem(f"host {what}", 32, 512, 100, None, torch.bfloat16) for what in ("forward", "both")]


def time_host(problem: Problem, engines: Sequence[str], device: torch.device, log: Log) -> None:
    """The host's share of a call by each engine, of the engines' own calls, and of a plain layer; a line for all."""
    timed = problem._replace(what=problem.what.removeprefix("host "))
    sets = datasets(timed, device, 0)
    ready = right(timed, engines, sets, log)
    wanted = [name for name, provider in ready.items() if provider.engine is not None or name == _LINEAR]
    samplers = {name: _sampler(ready[name], len(sets), _HOST_CALLS, on_host) for name in wanted}
    for sample in samplers.values():
        sample()
    taken = rounds(samplers, 2.0, 20, 200)
    clocks = {name: Clock(samples, _HOST_CALLS) for name, samples in taken.items()}
    facts = {f"{name.replace(' ', '_')}_us": clock.facts()["us_p50"] for name, clock in clocks.items()}
    rivals = {name: clocks[name] for name in (*engines, "reference") if name in clocks}
    log.write(
        problem.name, "info", **facts, **fastest(rivals),
        clocks={name: clock.facts() for name, clock in clocks.items()},
    )  # fmt: skip


def fastest(rivals: Mapping[str, Clock]) -> dict[str, Any]:
    """Which has the least median, and whether it is clearly so: most of its samples below most of every other's."""
    facts = {name: clock.facts() for name, clock in rivals.items()}
    if not facts:
        return {"fastest": None, "clear": False}
    best = min(facts, key=lambda name: facts[name]["us_p50"])
    others = [fact["us_p20"] for name, fact in facts.items() if name != best]
    return {"fastest": best, "clear": all(facts[best]["us_p80"] < other for other in others)}


def _entry(problem: Problem, device: torch.device, rivals: Mapping[str, Clock]) -> dict[str, Any] | None:
    """What a table would say of this problem and of more rows; None where no engine is clearly faster."""
    found, chip = fastest(rivals), chip_of(device)
    if problem.what not in _KINDS or chip is None or not found["clear"]:
        return None
    classes = problem.m or (problem.k if problem.what == "loss" else 1)
    return {
        "problem": _KINDS[problem.what],
        "capabilities": [list(family(chip.capability) or chip.capability)],
        "itemsize": problem.dtype.itemsize,
        "columns": padded(problem.k),
        "classes": padded(classes),
        "rows": problem.n,
        "engine": found["fastest"],
        "microseconds": {name: round(clock.facts()["us_p50"], 2) for name, clock in rivals.items()},
    }


def right(problem: Problem, engines: Sequence[str], sets: Sequence[Data], log: Log) -> dict[str, Provider]:
    """The providers that run on every set and compute the same as the unfused expression, as far as they should."""
    made, ready = candidates(problem, able(problem, engines, sets[0].x.device, log), sets), {}
    expected = made[_UNFUSED].call(0)
    for name, provider in made.items():
        label = f"{problem.name}, {name}"
        with log.guarded(label), provider.using():
            got = provider.call(0)
            for i in range(len(sets)):
                provider.call(i)
            found = 0.0 if name in (_LINEAR, _INVERSE) else difference(got, expected)
            if found < 0.1:
                ready[name] = provider
            else:
                log.write(label, "wrong", why=f"{found:.3g} from the unfused expression")
    return ready


def _facts(problem: Problem, name: str, provider: Provider, sets: Sequence[Data]) -> dict[str, Any]:
    """What is timed, on how much memory in turn, and for ours how it is computed."""
    out = {"provider": name, **problem._asdict(), "dtype": str(problem.dtype).removeprefix("torch.")}
    out |= {"sets": len(sets), "rotated_bytes": 2 * sum(t.numel() * t.element_size() for one in sets for t in one[:2])}
    if provider.engine is None:
        return out
    loss = problem.what in ("loss", "head")
    with provider.using():
        plan = interp_nn.plan(
            problem.n, problem.d, problem.k,
            pair=problem.what == "loss", grad=() if problem.what == "forward" else ("x", "b"),
            classes=(problem.m or problem.k) if loss else None, dtype=problem.dtype, device=sets[0].x.device,
        )  # fmt: skip
    seconds = None if plan.seconds is None else plan.seconds * 1e6
    config = {kernel: str(config) for kernel, config in plan.config}
    planned = {"engine": plan.engine, "form": plan.form, "reason": plan.reason, "config": config}
    return {**out, **planned, "predicted_us": seconds}


def _plain(ready: dict[str, Provider], sets: int, seconds: float) -> dict[str, Clock]:
    samplers, calls = {}, {}
    for name, provider in ready.items():
        once = _sampler(provider, sets, sets, on_events)
        once()
        calls[name] = max(1, min(4 * sets, round(_PLAIN_MS / max(once(), 1e-4))))
        samplers[name] = _sampler(provider, sets, calls[name], on_events)
    return {name: Clock(taken, calls[name]) for name, taken in rounds(samplers, seconds, _LEAST, _MOST).items()}


def _sampler(
    provider: Provider, sets: int, calls: int, clock: Callable[[Callable[[], object], int], Callable[[], float]]
) -> Callable[[], float]:
    at = 0

    def work() -> None:
        nonlocal at
        for _ in range(calls):
            provider.call(at)
            at = (at + 1) % sets

    sample = clock(work, calls)

    def asked() -> float:
        with provider.using():
            return sample()

    return asked


def _graphs(ready: dict[str, Provider], sets: int, stream: torch.cuda.Stream, seconds: float) -> dict[str, Clock]:
    """A graph of one call for each set; a provider that cannot be captured has no such clock."""
    samplers, held = {}, []
    for name, provider in ready.items():
        if not provider.capturable:
            continue
        spare_words(stream.device)

        def everything(provider: Provider = provider) -> Sequence[Tensor]:
            for i in range(sets):
                provider.call(i)
            return []

        with provider.using():
            graph, _ = captured(everything, stream)
        held.append(graph)
        graph.replay()
        samplers[name] = on_events(graph.replay, sets)
    torch.cuda.synchronize()
    return {name: Clock(taken, sets) for name, taken in rounds(samplers, seconds, _LEAST, _MOST).items()}


def compile_kernels(problem: Problem, device: torch.device, log: Log) -> None:
    """Run ours once, so that Triton's cache has its kernels when it is timed."""
    made = candidates(problem, ["triton"], datasets(problem, device, 0)[:1])
    for provider in (made["triton"], made["triton kernel"]):
        with provider.using():
            provider.call(0)
    log.write(problem.name, "ok")


# What the device can do


def rates(device: torch.device, when: str, log: Log) -> None:
    """Bytes a second of a large copy, read and written, and the rate of a large product of 16-bit matrices."""
    with log.guarded(f"rates at the {when}"):
        source = torch.randint(2**31 - 1, (2**28,), dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        size = 8192
        left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        copy = on_events(lambda: target.copy_(source), 1)
        product = on_events(lambda: left @ right, 1)
        taken = rounds({"copy": copy, "product": product}, 0.5, 13, _MOST)
        copied, multiplied = (float(np.median(taken[name][3:])) for name in ("copy", "product"))
        log.write(
            f"rates at the {when}",
            "info",
            copy_bytes_per_second=2 * source.nbytes / copied * 1e3,
            bf16_flop_per_second=2 * size**3 / multiplied * 1e3,
        )


def empty_launch(some: Tensor, phases: int) -> None:
    """A launch of the phased forward on nothing at all, a program a multiprocessor: 7 has two barriers, 4 none.

    some: what its pointers point at.
    """
    from interp_nn.engines.triton import phased

    engine: Any = engines.get("triton")
    device = some.device
    chip = chip_of(device)
    assert chip is not None
    constants = {"FORM": "B", "PRECISION": "tf32", "PHASES": phases, "BN": 64, "BK": 64, "BD": 32}
    options = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True, "launch_cooperative_grid": True}
    plan = engine.Launch(phased.phased_forward, chip.multiprocessors, 1, constants | options)
    engine.launch(plan, device, some, some, None, None, some, some, some, barrier_words.counter(device), 0, 0, 0, 16, 1)


def barrier(device: torch.device, log: Log) -> None:
    """What a barrier, an empty launch, and its host's share cost."""
    with log.guarded("barrier"):
        stream, times = torch.cuda.Stream(device), 50
        with torch.cuda.stream(stream):
            some = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)  # here, so that no launch is timed with it
            samplers, held = {}, []
            for name, phases in (("two barriers", 7), ("none", 4)):

                def launches(phases: int = phases) -> Sequence[Tensor]:
                    for _ in range(times):
                        empty_launch(some, phases)
                    return []

                launches()
                torch.cuda.synchronize()
                spare_words(device)
                graph, _ = captured(launches, stream)
                held.append(graph)
                samplers[name] = on_events(graph.replay, times)
            taken = rounds(samplers, 1.0, 20, _MOST)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(times):
                empty_launch(some, 4)
            host = (time.perf_counter() - begin) / times
            torch.cuda.synchronize()
        two, none = (1e3 * float(np.median(taken[name])) for name in ("two barriers", "none"))
        log.write("barrier", "info", barrier_us=(two - none) / 2, empty_launch_us=none, host_launch_us=host * 1e6)
