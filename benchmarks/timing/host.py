"""`host`: the Python overhead of `SummaryLinear` above its products, and of the triton engine's calls without their launch.

With few rows this overhead is the time of a layer. The engine runs on a CPU in Triton's interpreter, with launches replaced by
an empty function, so that Triton's own launch is not counted. The layer runs on the CPU beside `nn.Linear` and beside a module
with the same products written by hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import interp_nn
from benchmarks.records import environment, rows
from benchmarks.timing.clocks import interleave
from interp_nn import functional
from interp_nn.engines.problem import LossOptions, Plan
from interp_nn.nn import SummaryLinear

_ROUNDS = 2000
_SECONDS = 30.0
_SHAPE = 32, 512, 100  # the fastest of the shapes in the tables


def run(output: Path | None) -> dict[str, Any]:
    """Measure median microseconds of the engine's calls, of calls of `functional`, and of layers, in interleaved runs."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported: CPU tensors are accepted then
    with interp_nn.use_engine("triton"):
        from interp_nn.engines import eager
        from interp_nn.engines.triton import engine

        # On a GPU the kernel checks the targets.
        with mock.patch.object(engine, "launch", _nothing), mock.patch.object(eager, "check_target", _nothing):
            timed = interleave(_calls(engine), seconds=0.0, least=_ROUNDS, most=_ROUNDS)
    medians = {name: round(1e3 * timing.p50, 2) for name, timing in timed.items()}
    result = {**environment.facts(), "unit": "us", "rounds": _ROUNDS, "median": medians, "layer": _layers()}
    if output is not None:
        rows.write_json(output, result)
    return result


def table(result: dict[str, Any]) -> str:
    """Return the record as lines of text."""
    lines = [f"{name:32s} {median:6.1f} us" for name, median in result["median"].items()]
    layer = result["layer"]
    lines.append(f"n, d, k = {', '.join(map(str, layer['shape']))}, one thread:")
    lines += [f"{name:32s} {median:6.1f} us" for name, median in layer["median"].items()]
    lines += [f"{f'{mode}, above by hand':32s} {above:6.1f} us" for mode, above in layer["above by hand"].items()]
    return "\n".join(lines)


class _ByHand(SummaryLinear):
    """The products of `SummaryLinear` at this shape, without its overhead."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return torch.addmm(self.bias, x @ self.b @ self.b.t(), self.b)


def _layers() -> dict[str, Any]:
    """Time layers on one thread. The difference to the products by hand is plans, checks and the freezing of weights."""
    n, d, k = _SHAPE
    assert interp_nn.plan(n, d, k).order == interp_nn.plan(n, d, k, grad=()).order == "((Xb)bᵀ)b"
    x, leaf, dy = torch.randn(n, d), torch.randn(n, d, requires_grad=True), torch.randn(n, k)
    layers = {"nn.Linear": nn.Linear(d, k), "by hand": _ByHand(d, k), "SummaryLinear": SummaryLinear(d, k)}

    def inference(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    def both(layer: nn.Module) -> None:
        torch.autograd.grad(layer(leaf), (leaf, *layer.parameters()), dy)

    modes = {"forward": lambda layer: layer(x), "no gradients": inference, "forward and backward": both}
    calls = {f"{name}, {mode}": partial(call, layer) for mode, call in modes.items() for name, layer in layers.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        timed = interleave(calls, seconds=_SECONDS, most=_ROUNDS)
    finally:
        torch.set_num_threads(threads)
    medians = {name: round(1e3 * timing.p50, 2) for name, timing in timed.items()}
    above = {mode: round(medians[f"SummaryLinear, {mode}"] - medians[f"by hand, {mode}"], 2) for mode in modes}
    return {"shape": list(_SHAPE), "threads": 1, "median": medians, "above by hand": above}


def _nothing(*_: Any) -> None:  # a mock would cost more than the calls
    return None


def _calls(engine: Any) -> dict[str, Callable[[], Any]]:
    n, d, k, m = 64, 64, 16, 4
    x, weight, bias, dy = torch.randn(n, d), torch.randn(k, d), torch.randn(k), torch.randn(n, k)
    g, a, c = torch.randn(k, k), torch.randn(m, k), torch.randn(m)
    b, target = weight.t(), torch.zeros(n, dtype=torch.int64)
    options = LossOptions((1.0, 1.0, 1.0), -100, "mean")
    alone, pair, flat = Plan("triton", "(Xb)G"), Plan("triton", "(Xb)G", saves=True), Plan("triton", "logits_from_x")
    leaf, parameter = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def forward_and_backward() -> None:
        torch.autograd.grad(functional.summary(leaf, parameter.t(), bias), (leaf, parameter), dy)

    def loss_and_backward() -> None:
        torch.autograd.grad(functional.summary_cross_entropy(leaf, parameter.t(), target), (leaf, parameter))

    return {
        "engine: forward": lambda: engine.forward(x, b, bias, alone, False),
        "engine: backward": lambda: engine.backward(None, dy, x, b, [g], alone, True, True, True),
        "engine: backward of a pair": lambda: engine.backward(dy, dy, x, b, [dy, g], pair, True, True),
        "engine: loss of a pair": lambda: engine.loss(
            x, b, None, None, target, options, pair, None, (True, True, False, False)
        ),
        "engine: loss of a head": lambda: engine.loss(x, b, a, c, target, options, flat, None, (True,) * 4),
        "summary, forward": lambda: functional.summary(x, b, bias),
        "summary, forward and backward": forward_and_backward,
        "cross entropy and backward": loss_and_backward,
    }
