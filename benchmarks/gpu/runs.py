"""The other checks of kernels: one launch, the same bits every time, on streams, in graphs, and in bounds."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import interp_nn
from benchmarks.gpu import kernels
from benchmarks.gpu.log import Log, read
from benchmarks.records.environment import ROOT
from benchmarks.timing import footprint
from benchmarks.timing.clocks import OUT_OF_TIME
from benchmarks.timing.cuda_graphs import captured, synchronize
from benchmarks.timing.kernel_profile import NCU
from interp_nn import functional
from interp_nn.engines import orders
from interp_nn.nn.polynomials import NAMED

Call = Callable[[], Sequence[Tensor]]


class Shape(NamedTuple):
    """Rows, features, columns, classes behind a head, dtype."""

    n: int
    d: int
    k: int
    m: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Return the shape as text."""
        return f"({self.n}, {self.d}, {self.k}, {self.m}) {str(self.dtype).removeprefix('torch.')}"


SMALL = Shape(200, 72, 40, 10, torch.bfloat16)
MIDDLE = Shape(4096, 512, 100, 10, torch.bfloat16)
LARGE = Shape(65536, 512, 64, 10, torch.bfloat16)
EXACT = Shape(4096, 512, 64, 100, torch.float32)
TINY = Shape(33, 24, 10, 3, torch.float32)
_WIDE = 200  # columns


def workload(shape: Shape, device: torch.device, wide: bool = False) -> dict[str, Call]:
    """Return calls of every kernel of one launch: forward and backward of summary and pair, losses with their gradients.

    Inputs are drawn once; a call returns outputs and gradients. `wide` has more columns, for which there are other kernels.
    """
    n, d, k, m, dtype = shape
    if wide:
        k = _WIDE
    draw = torch.Generator().manual_seed(0)  # on the CPU: the device runs the calls alone

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=draw) * scale).to(dtype).to(device)

    x, w, bias = randn(n, d), randn(k, d, scale=max(d, k) ** -0.5), randn(k)
    a, c = randn(m, k, scale=k**-0.5), randn(m)
    dp, dy = randn(n, k), randn(n, k)
    t, tm = (torch.randint(high, (n,), generator=draw).to(device) for high in (k, m))
    upstream = torch.tensor(0.75, device=device)

    def calling(function: Callable[..., Sequence[Tensor]], upstreams: Sequence[Tensor], *inputs: Tensor) -> Call:
        def call() -> Sequence[Tensor]:
            leaves = [given.detach().requires_grad_() for given in inputs]
            out = function(*leaves)
            return [*(o.detach() for o in out), *torch.autograd.grad(out, leaves, upstreams)]

        return call

    def head(order: str) -> Call:
        loss = functional.summary_head_cross_entropy
        call = calling(lambda x, w, a, c: [loss(x, w.t(), a, c, tm)], [upstream], x, w, a, c)

        def in_order() -> Sequence[Tensor]:
            with mock.patch.object(orders, "head_order", return_value=order):
                return call()

        return in_order

    calls = {
        "summary": calling(lambda x, w, bias: [functional.summary(x, w.t(), bias)], [dy], x, w, bias),
        "pair": calling(lambda x, w: functional.summary_pair(x, w.t()), [dp, dy], x, w),
    }
    if not wide:
        calls["pair loss"] = calling(lambda x, w: [functional.summary_cross_entropy(x, w.t(), t)], [upstream], x, w)
        calls |= {"latent head loss": head("logits_from_latent"), "flat head loss": head("logits_from_x")}
    return calls


def admitted(engine: str, shape: Shape, device: torch.device, log: Log, wide: bool = False) -> dict[str, Call]:
    """Return the workload of a shape that the engine supports; the rest is a line each."""
    n, d, k, m, dtype = shape
    k = _WIDE if wide else k
    classes = {"pair loss": k, "latent head loss": m, "flat head loss": m}
    calls = {}
    for name, call in workload(shape, device, wide).items():
        why = kernels.unsupported_reason(engine, device, dtype, n, d, k, classes.get(name), "head" in name)
        if engine == "cuda" and name == "flat head loss":
            why = why or "cuda: it forms logits from the latent code only"
        if why is None:
            calls[name] = call
        else:
            log.write(f"{'wide ' * wide}{name} {shape.name}, {engine}", "skipped", why=why, engine=engine)
    return calls


def bits(t: Tensor) -> Tensor:
    """View the memory as integers, so that equal bits compare equal, NaN too."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def differing(got: Sequence[Tensor], first: Sequence[Tensor]) -> Tensor:
    """Return, on the device, whether any bit differs."""
    return torch.stack([(bits(g) != bits(f)).any() for g, f in zip(got, first, strict=True)]).any()


# Launches


def count_launches(engine: str, device: torch.device, log: Log) -> None:
    """Count the kernels of forward, of backward and of a loss with its gradients, by the engine's hook and by the profiler.

    The backward of a loss launches the kernel that scales the gradients by the upstream gradient.
    """
    shape = MIDDLE if device.type == "cuda" else TINY
    n, d, k, m, dtype = shape
    x = torch.randn(n, d).to(device, dtype).requires_grad_()
    dy = torch.randn(n, k).to(device, dtype)
    t, tm = (torch.randint(high, (n,)).to(device) for high in (k, m))
    one = torch.ones((), device=device)
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    linear = interp_nn.nn.SummaryLinear(d, k, bias=True, **made)
    layer = interp_nn.nn.SummaryLayer(d, k, **made)
    classifier = interp_nn.nn.SummaryClassifier(d, k, **made)
    head = interp_nn.nn.SummaryHead(d, k, m, **made)
    # Name, module, forward, backward, and the classes of a loss.
    measured: list[tuple[str, torch.nn.Module, Callable[[], Any], Callable[[Any], None], int | None]] = [
        ("SummaryLinear(bias=True)", linear, lambda: linear(x), lambda y: y.backward(dy), None),
        ("SummaryLayer", layer, lambda: layer(x), lambda p: torch.autograd.backward(tuple(p), (dy, dy)), None),
        ("SummaryClassifier.loss", classifier, lambda: classifier.loss(x, t), lambda v: v.backward(one), k),
        ("SummaryHead.loss", head, lambda: head.loss(x, tm), lambda v: v.backward(one), m),
    ]
    degrees = {name: len(NAMED[name]) - 1 for name in ("newton-schulz", "pc-4")}
    for name in degrees:
        polynomial = partial(functional.summary, x, linear.b, linear.bias, polynomial=NAMED[name])
        measured.append((name, linear, polynomial, lambda y: y.backward(dy), None))
    with interp_nn.use_engine(engine):
        for name, module, forward, backward, classes in measured:
            label = f"launches of {name}, {engine}"
            why = kernels.unsupported_reason(engine, device, dtype, n, d, k, classes, module is head, degrees.get(name))
            if why is not None:
                log.write(label, "skipped", why=why, engine=engine)
                continue
            with log.guarded(label):

                def clear(module: torch.nn.Module = module) -> None:
                    x.grad = None
                    module.zero_grad(set_to_none=True)

                for _ in range(3):
                    backward(forward())
                    clear()
                with kernels.launches(engine) as seen:
                    out, ran = footprint.profiled(forward, device)
                _count(f"{name}, forward", engine, seen, ran, shape, log)
                with kernels.launches(engine) as seen:
                    _, ran = footprint.profiled(partial(backward, out), device)
                _count(f"{name}, backward", engine, seen, ran, shape, log)
                clear()


def _count(name: str, engine: str, seen: list[str], profiled: list[str] | None, shape: Shape, log: Log) -> None:
    """Check that there is one launch, and nothing else."""
    ran = seen if profiled is None else profiled
    right = len(ran) == len(seen) == 1
    why = None if right else f"{len(ran)} on the device, {len(seen)} of the engine's, want 1"
    facts = {"engine": engine, "shape": shape.name, "launched": seen, "profiled": profiled}
    log.check(f"launches of {name}, {engine}", why, **facts)


# Repeats


def repeat(engine: str, shape: Shape, times: int, device: torch.device, log: Log) -> None:
    """Check that repeats of every call at one shape are bitwise equal."""
    for wide in (False, True):
        for name, call in admitted(engine, shape, device, log, wide).items():
            label = f"{times} repeats of {'wide ' * wide}{name} {shape.name}, {engine}"
            if log.left() < 0:
                log.write(label, "skipped", why=OUT_OF_TIME)
                continue
            with log.guarded(label), interp_nn.use_engine(engine):
                first = call()
                wrong = torch.zeros((), dtype=torch.int64, device=device)
                done = 0
                while done < times and (log.left() > 0 or done < 10):
                    wrong += differing(call(), first)
                    done += 1
                    if done % 50 == 0:
                        synchronize(device)
                _judge(label, int(wrong), done, log, engine=engine, shape=shape.name)


def _judge(label: str, wrong: int, done: int, log: Log, **facts: Any) -> None:
    log.check(label, f"{wrong} of {done} differ" if wrong else None, repeats=done, **facts)


def alternate(engine: str, shapes: Sequence[Shape], times: int, device: torch.device, log: Log) -> None:
    """Check that calls at several shapes in turn are bitwise equal to the first at that shape."""
    label = f"{times} calls of alternating shapes, {engine}"
    with interp_nn.use_engine(engine):
        calls = [call for shape in shapes for call in admitted(engine, shape, device, log).values()]
        if not calls:
            return
        firsts = [call() for call in calls]
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for i in range(times):
            place = i * 7 % len(calls)
            wrong += differing(calls[place](), firsts[place])
    _judge(label, int(wrong), times, log, engine=engine, shapes=[shape.name for shape in shapes])


# Streams


def on_streams(engine: str, shape: Shape, rounds: int, device: torch.device, log: Log) -> None:
    """Check that calls on several streams at once, beside other work, are bitwise equal to one stream."""
    label = f"4 streams, {rounds} rounds {shape.name}, {engine}"
    calls = admitted(engine, shape, device, log)
    if not calls:
        return
    with interp_nn.use_engine(engine):
        firsts = {name: call() for name, call in calls.items()}
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(device) for _ in range(4)]
        other = torch.cuda.Stream(device)
        left, right = (torch.randn(1024, 1024, device=device) for _ in range(2))
        wrong = {name: [torch.zeros((), dtype=torch.int64, device=device) for _ in streams] for name in calls}
        torch.cuda.synchronize()
        names, done = list(calls), 0
        while done < rounds and (log.left() > 0 or done < 2):
            with torch.cuda.stream(other):
                torch.mm(left, right)
            for place, stream in enumerate(streams):
                name = names[(done + place) % len(names)]
                with torch.cuda.stream(stream):
                    wrong[name][place] += differing(calls[name](), firsts[name])
            done += 1
        torch.cuda.synchronize()
    _judge(
        label, sum(int(one) for counts in wrong.values() for one in counts), 4 * done, log, engine=engine,
        shape=shape.name,
    )  # fmt: skip


# Graphs


def in_graphs(engine: str, shape: Shape, replays: int, device: torch.device, log: Log) -> None:
    """Check replays of forward, backward and losses in one graph, then of two graphs of one stream on two streams."""
    calls = list(admitted(engine, shape, device, log).values())
    if not calls:
        return

    def everything() -> Sequence[Tensor]:
        return [t for call in calls for t in call()]

    stream = torch.cuda.Stream(device)
    with interp_nn.use_engine(engine):
        first = everything()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(3):
                everything()
        torch.cuda.synchronize()
        graphs = [captured(everything, stream) for _ in range(2)]
    graph, out = graphs[0]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(replays):
        for t in out:
            t.fill_(math.nan)
        graph.replay()
        wrong += differing(out, first)
    _judge(
        f"{replays} replays of a graph {shape.name}, {engine}", int(wrong), replays, log, engine=engine,
        shape=shape.name,
    )  # fmt: skip
    torch.cuda.synchronize()
    others = [torch.cuda.Stream(device) for _ in graphs]
    counts = [torch.zeros((), dtype=torch.int64, device=device) for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(replays):
        for side, (graph, out), count in zip(others, graphs, counts, strict=True):
            with torch.cuda.stream(side):
                for t in out:
                    t.fill_(math.nan)
                graph.replay()
                count += differing(out, first)
    torch.cuda.synchronize()
    label = f"two graphs of one stream on two streams {shape.name}, {engine}"
    _judge(label, sum(map(int, counts)), 2 * replays, log, engine=engine, shape=shape.name)


# Sanitizer


def run_small(engine: str, device: torch.device, log: Log) -> None:
    """Run each kernel once on a small problem, for the sanitizer."""
    for shape in (TINY, SMALL) if device.type == "cuda" else (TINY,):
        for wide in (False, True):
            for name, call in admitted(engine, shape, device, log, wide).items():
                label = f"{'wide ' * wide}{name} {shape.name}, {engine}"
                with log.guarded(label), interp_nn.use_engine(engine):
                    finite = all(bool(t.isfinite().all()) for t in call())
                    log.check(label, None if finite else "not finite", engine=engine, shape=shape.name)


PROFILED = ("stream", "summary_backward", "pair_loss", "flat_loss")


def run_once(engine: str, shape: Shape, device: torch.device, log: Log) -> None:
    """Run each call twice, for the profiler: the second time nothing is compiled."""
    for name, call in admitted(engine, shape, device, log).items():
        with interp_nn.use_engine(engine):
            call()
            call()
        log.write(f"{name} {shape.name}, {engine}")


def profile_kernel(kernel: str, device: torch.device, output: Path, log: Log) -> None:
    """Write what Nsight Compute says of the second launch of a kernel into `ncu-KERNEL.txt`."""
    program, file = tool("ncu"), output / f"ncu-{kernel}.txt"
    if program is None:
        log.write(f"profile {kernel}", "skipped", why="tool not found: ncu in PATH, CUDA_HOME or /usr/local/cuda")
        return
    part = ["-m", "benchmarks.gpu.worker", "profiled", "--log", str(output / "profiled.jsonl"), "--seconds", "60"]
    options = [*NCU, "--kernel-name", f"regex:{kernel}", "--launch-skip", "1", "--launch-count", "1"]
    command = [program, *options, "--target-processes", "all", sys.executable, *part, "--device", device.type]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(1.0, log.left())
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        log.write(f"profile {kernel}", "skipped", why=OUT_OF_TIME)
        return
    file.write_text(done.stdout, encoding="utf-8")
    allowed = "ERR_NVGPUCTRPERM" not in done.stdout
    why = (
        None
        if done.returncode == 0 and allowed
        else f"exit status {done.returncode}: {(done.stdout + done.stderr)[-300:]}"
    )
    log.write(f"profile {kernel}", "ok" if why is None else "skipped", why=why, file=str(file))


def sanitizer() -> str | None:
    """Return the path of compute-sanitizer, from PATH or a CUDA toolkit."""
    return tool("compute-sanitizer")


def tool(name: str) -> str | None:
    """Return the path of a tool of CUDA's, from PATH or a toolkit."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{root}/bin" for root in toolkits if root)]
    places += [f"{root}/compute-sanitizer" for root in toolkits if root]
    return shutil.which(name, path=os.pathsep.join(places))


def sanitize(tool: str, engines: Sequence[str], device: torch.device, seconds: float, log: Log) -> None:
    """Run the small problems under one tool of compute-sanitizer, in another process."""
    program = sanitizer()
    label = f"compute-sanitizer {tool}"
    if program is None:
        log.write(label, "skipped", why="tool not found: compute-sanitizer in PATH, CUDA_HOME or /usr/local/cuda")
        return
    with tempfile.TemporaryDirectory() as folder:
        report, lines = Path(folder, "report"), Path(folder, "lines")
        options = ["--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        if tool == "memcheck":
            options += ["--report-api-errors", "no"]  # PyTorch handles API errors itself
        part = ["-m", "benchmarks.gpu.worker", "small", "--log", str(lines), "--seconds", str(seconds)]
        part += ["--device", device.type, "--engines", ",".join(engines)]
        # Without PyTorch's cache each tensor is an allocation, whose bounds the tool knows.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with report.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [program, *options, sys.executable, *part],
                cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,
            )  # fmt: skip
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
        said = report.read_text(encoding="utf-8", errors="replace").splitlines()
        done = [line["status"] for line in read(lines) if line["status"] != "skipped"]
    facts = {"tail": said[-40:], "command": options, "problems": len(done)}
    if code is None:
        log.write(label, "skipped", why=f"{OUT_OF_TIME}: {seconds:.0f} s", **facts)
    elif not done and any("not supported" in line for line in said):
        log.write(label, "skipped", why="the tool does not support this device here", **facts)
    else:
        bad = [] if code == 0 else [f"exit status {code}"]
        bad += [f"{len(done)} problems ran, not all of them right"] if not done or set(done) != {"ok"} else []
        log.check(label, "; ".join(bad) or None, **facts)
