"""`host`: the time that Python takes above the kernels and above the products.

With few rows this time is the time of a layer. The triton engine runs with its kernels replaced by nothing below Triton's own
Python, on CPU tensors that stand for those of an H100: a launch is counted, a kernel is not. Layers, losses and polynomials of
the eager engine run on the CPU beside the same products written by hand. All calls run on one thread, interleaved, and are
timed by that thread's CPU time, which other programs on the machine lengthen less than the wall clock's. The loss of a head is
also timed with its reconstruction's term.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

import interp_nn
from benchmarks.command_line import UserInputError
from benchmarks.records import environment, intervals, rows
from benchmarks.timing.clocks import Timing, interleave
from interp_nn import functional
from interp_nn.engines import devices, eager, limits, select
from interp_nn.engines.problem import LossOptions, Plan
from interp_nn.nn import SummaryHead, SummaryLinear, cached_weights
from interp_nn.ops import remembered

_ROUNDS = 3000
_SECONDS = 50.0
_KERNEL_SHAPE = 64, 64, 16  # an n at which a kernel takes less time than its launch
_LAYER_SHAPE = 32, 512, 100  # the fastest of the shapes in the tables
_CLASSES = 10
_HEAD_SHAPE = 32, 128, 16  # the README's head, at batch 32
_POLYNOMIAL_SHAPE = 4096, 512, 64
_POLYNOMIALS = "newton-schulz", "pc-1", "pc-4"
_MICROBATCHES, _MICROBATCH_SHAPE = 8, (32, 512, 100)
_CALLS = 10  # in a sample
Calls = dict[str, Callable[[], Any]]


class Ratio:
    """A bound: a call's time against another's, as a ratio or as a difference in microseconds."""

    def __init__(self, call: str, other: str, most: float, unit: str = "x") -> None:
        self.call, self.other, self.most, self.unit = call, other, most, unit

    def of(self, medians: dict[str, float], taken: dict[str, Timing]) -> dict[str, Any]:
        """Return the comparison as a row of the record; the interval is of ratios, by groups of rounds.

        A difference is the median of those of the groups: a few microseconds are less than what a machine drifts in a run.
        """
        groups = taken[self.call].groups, taken[self.other].groups
        if self.unit == "x":
            value = round(medians[self.call] / medians[self.other], 3)
        else:
            value = round(1e3 * median(a - b for a, b in zip(*groups, strict=True)), 2)
        found = intervals.interval(intervals.resampled(*groups))
        ratio = [round(end, 3) for end in found]
        return {
            "call": self.call, "to": self.other, "value": value, "unit": self.unit, "bound": self.most, "ratio": ratio,
        }  # fmt: skip


_KERNEL_BOUNDS = (
    Ratio("summary, forward", "bare Function, forward", 4.0, "us"),
    Ratio("summary, no gradients", "F.linear at (1, 8, 8), no gradients", 4.0, "us"),
    Ratio("summary, forward and backward", "F.linear, forward and backward", 1.2),
    Ratio("pair loss and backward", "F.linear, cross entropy and backward", 0.9),
)
_LAYER_BOUNDS = (
    Ratio("SummaryLinear, forward", "by hand, forward", 6.0, "us"),
    Ratio("SummaryLinear, no gradients", "by hand, no gradients", 6.0, "us"),
    Ratio("SummaryLinear, forward and backward", "by hand, forward and backward", 9.0, "us"),
    Ratio("pair loss and backward", "pair loss by hand and backward", 1.04),
    Ratio("head loss and backward", "head loss by hand and backward", 1.04),
)
_HEAD_BOUNDS = (
    Ratio("with reconstruction, forward", "loss, forward", 2.6),
    Ratio("with reconstruction, forward and backward", "loss, forward and backward", 2.0),
)
_POLYNOMIAL_BOUNDS = (
    *(Ratio(f"{name}, forward and backward", "nn.Linear, forward and backward", 1.10) for name in _POLYNOMIALS),
    Ratio("newton-schulz, microbatches, cached", "nn.Linear, microbatches", 1.65),
)


def run(output: Path | None) -> dict[str, Any]:
    """Measure median microseconds of the triton engine's calls, of layers and losses, and of polynomials."""
    if limits.triton_version() < limits.OLDEST_TRITON or devices.interpreting():
        raise UserInputError("host: needs Triton, and that TRITON_INTERPRET is not set")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _stubbed_launches():
            kernels = _timed(_kernel_calls(), _KERNEL_SHAPE, _KERNEL_BOUNDS)
        layers = _timed(_layer_calls(), _LAYER_SHAPE, _LAYER_BOUNDS)
        heads = _timed(_reconstruction_calls(), _HEAD_SHAPE, _HEAD_BOUNDS)
        polynomials = _timed(_polynomial_calls(), _POLYNOMIAL_SHAPE, _POLYNOMIAL_BOUNDS)
    finally:
        torch.set_num_threads(threads)
    parts = {"kernels": kernels, "layers": layers, "heads": heads, "polynomials": polynomials}
    result = {
        **environment.facts(),
        "unit": "us",
        "threads": 1,
        "calls a sample": _CALLS,
        **parts,
        "functions": functions(),
    }
    if output is not None:
        rows.write_json(output, result)
    return result


def table(result: dict[str, Any]) -> str:
    """Return the record as lines of text."""
    lines = []
    for name in ("kernels", "layers", "heads", "polynomials"):
        part = result[name]
        lines.append(f"{name}, n, d, k = {', '.join(map(str, part['shape']))}:")
        lines += [f"  {call:44s} {median:8.1f} us" for call, median in part["median"].items()]
        lines += [
            f"  {bound['call']} to {bound['to']}: {bound['value']} {bound['unit']} (bound {bound['bound']})"
            for bound in part["compared"]
        ]
    lines += [f"Python functions of this library in {call}: {count}" for call, count in result["functions"].items()]
    return "\n".join(lines)


def functions() -> dict[str, int]:
    """Count the Python functions of this library that warm calls on a CPU pass."""
    n, d, k = _LAYER_SHAPE
    layer, head, x, target = SummaryLinear(d, k), SummaryHead(d, k, _CLASSES), torch.randn(n, d), torch.zeros(n).long()
    calls: Calls = {"SummaryLinear(x)": lambda: layer(x), "SummaryHead.loss": lambda: head.loss(x, target)}
    return {name: len(passed(call)) for name, call in calls.items()}


def passed(call: Callable[[], object]) -> list[str]:
    """Return the names of the Python functions of this library that a call passes, once it is warm."""
    for _ in range(2):
        call()
    names: list[str] = []
    folder = str(Path(interp_nn.__file__).parent)

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names


def _on_thread(call: Callable[[], object], _: int) -> Callable[[], float]:
    def sample() -> float:
        start = time.thread_time()
        for _ in range(_CALLS):
            call()
        return 1e3 * (time.thread_time() - start) / _CALLS

    return sample


def _timed(calls: Calls, shape: tuple[int, int, int], bounds: tuple[Ratio, ...]) -> dict[str, Any]:
    taken: dict[str, Timing] = interleave(calls, seconds=_SECONDS, least=2, most=_ROUNDS, clock=_on_thread)
    medians = {name: round(1e3 * timing.p50, 2) for name, timing in taken.items()}
    fast = {name: round(1e3 * timing.p20, 2) for name, timing in taken.items()}
    return {
        "shape": list(shape),
        "rounds": next(iter(taken.values())).samples,
        "median": medians,
        "quantile of 20 %": fast,
        "compared": [bound.of(medians, taken) for bound in bounds],
    }


# The triton engine, whose kernels do nothing


class _Kernel:
    """Stands for the kernel compiled for a key of Triton's: its launch takes all arguments and does nothing."""

    packed_metadata = ()

    def __init__(self, key: Any) -> None:
        self.function = key

    @staticmethod
    def run(*_: Any) -> None:
        """Launch nothing."""

    def launch_metadata(self, *_: Any) -> None:
        """Return None, as without hooks."""


@contextlib.contextmanager
def _stubbed_launches() -> Iterator[None]:
    """Run the triton engine on CPU tensors as on an H100, up to where Triton hands over to CUDA's driver."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from interp_nn.engines.triton import engine, prepared

    def compile_nothing(self: Any, key: Any, *_: Any, **__: Any) -> _Kernel:
        made: _Kernel = self.device_caches[0][0].setdefault(key, _Kernel(key))
        return made

    stand_in = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    cpu = torch.device("cpu")
    counter = torch.zeros(1, dtype=torch.int32)
    before = driver._active
    driver.set_active(stand_in)
    remembered.plans.clear()
    try:
        with (
            mock.patch.object(JITFunction, "_do_compile", compile_nothing),
            mock.patch.dict(devices._specs, {cpu: devices.spec_for((9, 0))}),
            mock.patch.dict(limits._machine_reasons, {"triton": None}),
            mock.patch.object(select, "interpreting", partial(bool, True)),
            mock.patch.object(engine, "counter", {cpu: counter}.__getitem__),
            mock.patch.object(prepared, "counter", {cpu: counter}.__getitem__),
            mock.patch.object(eager, "check_target", _nothing),  # on a GPU the kernel checks the targets
            interp_nn.use_engine("triton"),
        ):
            yield
    finally:
        driver._active = before
        remembered.plans.clear()


def _nothing(*_: Any) -> None:  # a mock would cost more than the calls
    return None


class _Bare(Function):
    """A Function that allocates what the summary does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        k = w.shape[0]
        g = x.new_empty(k, k)
        ctx.save_for_backward(x, w, g)
        return x.new_empty(x.shape[0], k)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, w, g = ctx.saved_tensors
        x.new_empty(64)
        return torch.empty_like(x), torch.empty_like(w), x.new_empty(g.shape[0])


def _kernel_calls() -> Calls:
    from interp_nn.engines.triton import engine

    n, d, k = _KERNEL_SHAPE
    m = 4
    x, weight, bias, dy = torch.randn(n, d), torch.randn(k, d), torch.randn(k), torch.randn(n, k)
    g, a, c = torch.randn(k, k), torch.randn(m, k), torch.randn(m)
    b, target = weight.t(), torch.zeros(n, dtype=torch.int64)
    options = LossOptions((1.0, 1.0, 1.0), -100, "mean")
    alone, pair, flat = Plan("triton", "(Xb)G"), Plan("triton", "(Xb)G", saves=True), Plan("triton", "logits_from_x")
    leaf, parameter, offset = (t.clone().requires_grad_() for t in (x, weight, bias))
    matrix = b.contiguous().requires_grad_()
    small = torch.randn(1, 8), torch.randn(8, 8), torch.randn(8)
    small_dy, small_leaves = torch.randn(1, 8), [t.clone().requires_grad_() for t in small]
    leaves = leaf, parameter, offset

    def without(call: Callable[..., Any], *given: Any) -> Callable[[], None]:
        def inference() -> None:
            with torch.no_grad():
                call(*given)

        return inference

    def linear_loss() -> Tensor:
        return F.cross_entropy(F.linear(leaf, parameter), target)

    def unfused_loss() -> Tensor:
        p = leaf @ matrix
        y = p @ (matrix.t() @ matrix)
        return F.cross_entropy(p, target) + F.cross_entropy(y, target) + F.mse_loss(p, y)

    def both(call: Callable[..., Tensor], given: Any, dy: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(*given), given, dy)

    def scalar(call: Callable[[], Tensor], *given: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(), given)

    by_summary = leaf, matrix, offset
    return {
        "engine: forward": lambda: engine.forward(x, b, bias, alone, False),
        "engine: backward": lambda: engine.backward(None, dy, x, b, [g], alone, True, True, True),
        "engine: backward of a pair": lambda: engine.backward(dy, dy, x, b, [dy, g], pair, True, True),
        "engine: loss of a pair": lambda: engine.loss(
            x, b, None, None, target, options, pair, None, (True, True, False, False)
        ),
        "engine: loss of a head": lambda: engine.loss(x, b, a, c, target, options, flat, None, (True,) * 4),
        "summary, forward": lambda: functional.summary(*by_summary),
        "summary, no gradients": without(functional.summary, *by_summary),
        "summary, forward and backward": both(functional.summary, by_summary, dy),
        "pair loss and backward": scalar(
            lambda: functional.summary_cross_entropy(leaf, matrix, target), leaf, matrix
        ),
        "bare Function, forward": lambda: _Bare.apply(*leaves),
        "bare Function, forward and backward": both(_Bare.apply, leaves, dy),
        "F.linear at (1, 8, 8), no gradients": without(F.linear, *small),
        "F.linear at (1, 8, 8), forward": lambda: F.linear(*small_leaves),
        "F.linear at (1, 8, 8), forward and backward": both(F.linear, tuple(small_leaves), small_dy),
        "F.linear, forward": lambda: F.linear(*leaves),
        "F.linear, forward and backward": both(F.linear, leaves, dy),
        "F.linear, cross entropy and backward": scalar(linear_loss, leaf, parameter),
        "unfused, forward and backward": both(
            lambda x, b, bias: torch.addmm(bias, x @ b, b.t() @ b), by_summary, dy
        ),
        "unfused pair loss and backward": scalar(unfused_loss, leaf, matrix),
    }  # fmt: skip


# Layers and losses of the eager engine


class _ByHand(SummaryLinear):
    """The products of `SummaryLinear` at this shape, without its overhead."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return torch.addmm(self.bias, x @ self.b @ self.b.t(), self.b)


def _layer_calls() -> Calls:
    """The difference to the products by hand is plans, checks and the freezing of weights."""
    n, d, k = _LAYER_SHAPE
    assert interp_nn.plan(n, d, k).order == interp_nn.plan(n, d, k, grad=()).order == "((Xb)bᵀ)b"
    assert interp_nn.plan(n, d, k, pair=True, classes=k).order == "((Xb)bᵀ)b"
    assert interp_nn.plan(n, d, k, classes=_CLASSES).order == "logits_from_x"
    x, leaf, dy = torch.randn(n, d), torch.randn(n, d, requires_grad=True), torch.randn(n, k)
    classes, target = torch.randint(k, (n,)), torch.randint(_CLASSES, (n,))
    by_hand, ours = _ByHand(d, k), SummaryLinear(d, k)
    # Where a matrix lies in memory changes a product by more than the bounds.
    by_hand.b, by_hand.bias = ours.b, ours.bias
    layers = {"nn.Linear": nn.Linear(d, k), "by hand": by_hand, "SummaryLinear": ours}
    head = SummaryHead(d, k, _CLASSES)
    b = head.b
    parameters = b, head.output.weight, head.output.bias

    def inference(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    def both(layer: nn.Module) -> None:
        torch.autograd.grad(layer(leaf), (leaf, *layer.parameters()), dy)

    def pair_loss() -> Any:
        return torch.autograd.grad(functional.summary_cross_entropy(leaf, b, classes), (leaf, b))

    def head_loss() -> Any:
        return torch.autograd.grad(head.loss(leaf, target), (leaf, *parameters))

    modes = {"forward": lambda layer: layer(x), "no gradients": inference, "forward and backward": both}
    calls: Calls = {
        f"{name}, {mode}": partial(call, layer) for mode, call in modes.items() for name, layer in layers.items()
    }
    return calls | {
        "pair loss and backward": pair_loss,
        "pair loss by hand and backward": lambda: torch.autograd.grad(_pair_by_hand(leaf, b, classes), (leaf, b)),
        "head loss and backward": head_loss,
        "head loss by hand and backward": lambda: torch.autograd.grad(
            _head_by_hand(leaf, *parameters, target), (leaf, *parameters)
        ),
    }


def _three_terms(o1: Tensor, o2: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(o1, target) + F.cross_entropy(o2, target) + F.mse_loss(o1, o2)


def _pair_by_hand(x: Tensor, b: Tensor, target: Tensor) -> Tensor:
    """The products of the loss's plan at this shape."""
    p = x @ b
    return _three_terms(p, (p @ b.t()) @ b, target)


def _head_by_hand(x: Tensor, b: Tensor, a: Tensor, c: Tensor, target: Tensor) -> Tensor:
    """The products of the head's plan at this shape: both logits from x, with a weight of both output layers."""
    f = a @ b.t()
    h = f @ b
    o = torch.addmm(torch.cat((c, c)), x, torch.cat((f, h @ b.t())).t()).view(-1, 2, len(a))
    first, second = o.unbind(1)
    return _three_terms(first, second, target)


def _reconstruction_calls() -> Calls:
    """The loss of a head with and without its reconstruction's term, with gradients to the features too."""
    n, d, k = _HEAD_SHAPE
    head, leaf, target = (
        SummaryHead(d, k, _CLASSES),
        torch.randn(n, d, requires_grad=True),
        torch.randint(_CLASSES, (n,)),
    )
    wanted = (leaf, *head.parameters())

    def both(weight: float) -> Any:
        return torch.autograd.grad(head.loss(leaf, target, reconstruction=weight), wanted)

    return {
        "loss, forward": lambda: head.loss(leaf, target),
        "with reconstruction, forward": lambda: head.loss(leaf, target, reconstruction=1.0),
        "loss, forward and backward": lambda: both(0.0),
        "with reconstruction, forward and backward": lambda: both(1.0),
    }


# Polynomials of the eager engine


def _polynomial_calls() -> Calls:
    n, d, k = _POLYNOMIAL_SHAPE
    leaf, dy = torch.randn(n, d, requires_grad=True), torch.randn(n, k)
    layers: dict[str, nn.Module] = {"nn.Linear": nn.Linear(d, k)}
    layers |= {name: SummaryLinear(d, k, polynomial=name) for name in _POLYNOMIALS}
    rows, features, columns = _MICROBATCH_SHAPE
    small, summary = nn.Linear(features, columns), SummaryLinear(features, columns, polynomial="newton-schulz")
    parts = [torch.randn(rows, features, requires_grad=True) for _ in range(_MICROBATCHES)]
    upstream = torch.randn(rows, columns)

    def both(layer: nn.Module) -> None:
        torch.autograd.grad(layer(leaf), (leaf, *layer.parameters()), dy)

    def accumulate(layer: nn.Module, cached: bool) -> None:
        for part in parts:
            part.grad = None
        with cached_weights(layer) if cached else contextlib.nullcontext():
            for part in parts:
                layer(part).backward(upstream)
        layer.zero_grad()

    calls: Calls = {f"{name}, forward and backward": partial(both, layer) for name, layer in layers.items()}
    return calls | {
        "nn.Linear, microbatches": lambda: accumulate(small, False),
        "newton-schulz, microbatches, cached": lambda: accumulate(summary, True),
    }
