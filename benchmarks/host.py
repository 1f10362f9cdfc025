"""What a call of the triton engine costs on the host: everything but the launch itself, which is replaced by nothing.

For few rows this, with what Triton's own launch costs, is the time of a layer. Measured on a CPU, where Triton interprets.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import interp_nn
from benchmarks import record
from interp_nn import functional
from interp_nn.engines.reference import LossOptions

_ROUNDS = 2000


def run(output: Path | None) -> dict[str, Any]:
    """Median microseconds of the engine's calls, and of whole calls of `functional`, in one interleaved run."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported: CPU tensors are accepted then
    with interp_nn.use_engine("triton"):
        from interp_nn.engines import reference, triton

        # On a GPU the kernel checks the targets.
        with mock.patch.object(triton, "launch", _nothing), mock.patch.object(reference, "check_target", _nothing):
            medians = _medians(_calls(triton))
    result = {**record.environment(), "unit": "us", "rounds": _ROUNDS, "median": medians}
    if output is not None:
        record.write(output, result)
    return result


def table(result: dict[str, Any]) -> str:
    """The record as lines of text."""
    return "\n".join(f"{name:32s} {median:6.1f} us" for name, median in result["median"].items())


def _nothing(*_: Any) -> None:  # a mock would cost more than what is measured
    return None


def _calls(engine: Any) -> dict[str, Callable[[], Any]]:
    n, d, k, m = 64, 64, 16, 4
    x, weight, bias, dy = torch.randn(n, d), torch.randn(k, d), torch.randn(k), torch.randn(n, k)
    g, a, c = torch.randn(k, k), torch.randn(m, k), torch.randn(m)
    b, target = weight.t(), torch.zeros(n, dtype=torch.int64)
    options = LossOptions((1.0, 1.0, 1.0), -100, "mean")
    leaf, parameter = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def forward_and_backward() -> None:
        torch.autograd.grad(functional.summary(leaf, parameter.t(), bias), (leaf, parameter), dy)

    def loss_and_backward() -> None:
        torch.autograd.grad(functional.summary_cross_entropy(leaf, parameter.t(), target), (leaf, parameter))

    return {
        "engine: forward": lambda: engine.forward(x, b, bias, "A", False),
        "engine: backward": lambda: engine.backward(None, dy, x, b, [g], "A", True, True, True),
        "engine: backward of a pair": lambda: engine.backward(dy, dy, x, b, [dy, g], "A+", True, True),
        "engine: loss of a pair": lambda: engine.loss(
            x, b, None, None, target, options, "A+", None, (True, True, False, False)
        ),
        "engine: loss of a head": lambda: engine.loss(x, b, a, c, target, options, "flat", None, (True,) * 4),
        "summary, forward": lambda: functional.summary(x, b, bias),
        "summary, forward and backward": forward_and_backward,
        "cross entropy and backward": loss_and_backward,
    }


def _medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(taken) * 1e6, 2) for name, taken in samples.items()}
