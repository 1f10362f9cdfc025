"""The engines with kernels of their own: which are at hand, what each refuses, and what it launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from interp_nn import engines
from interp_nn.engines.devices import chip_of, interpreting

WITH_KERNELS = ("triton", "cuda")
# The name of what passes through an engine's `launch`.
_NAMES: dict[str, Callable[[Any], str]] = {
    "triton": lambda plan: plan.kernel.__name__,
    "cuda": lambda operator: operator.overloadpacket.__name__,
}


def reasons(device: str) -> dict[str, str | None]:
    """Why each engine with kernels cannot compute anything on a device "cuda" or "cpu"; None if it can."""
    return {engine: _off(engine, device) for engine in WITH_KERNELS}


def _off(engine: str, device: str) -> str | None:
    if device == "cpu" and engine == "cuda":
        return "its kernels run on CUDA devices only"
    if device == "cpu" and not interpreting():
        return "its kernels run on a CPU with TRITON_INTERPRET=1 only"
    return engines.unavailable(engine)


def at_hand(device: str) -> tuple[str, ...]:
    """The engines with kernels that compute on such a device here."""
    return tuple(engine for engine, why in reasons(device).items() if why is None)


def refusal(
    engine: str, device: torch.device, dtype: torch.dtype, n: int, d: int, k: int, classes: int | None = None, head: bool = False
) -> str | None:  # fmt: skip
    """Why an engine does not compute this problem, with the engine's name; None if it does."""
    why = engines.refusal(engine, chip_of(device), device.type, dtype, n, d, k, classes, head)
    return None if why is None else f"{engine}: {why}"


@contextlib.contextmanager
def launches(engine: str) -> Iterator[list[str]]:
    """A list that gets the names of what the engine launches inside; the reference launches nothing of its own."""
    names: list[str] = []
    if engine not in WITH_KERNELS:
        yield names
        return
    module: Any = engines.get(engine)
    original = module.launch

    def launch(what: Any, *arguments: Any) -> Any:
        names.append(_NAMES[engine](what))
        return original(what, *arguments)

    with mock.patch.object(module, "launch", launch):
        yield names


def profiled(call: Callable[[], Any], device: torch.device) -> tuple[Any, list[str] | None]:
    """(what the call returns, the names of what ran on the device meanwhile; None without a device).

    Ranges that a program marks, such as an optimizer's step, have copies among the device's events: they are left out.
    """
    if device.type != "cuda":
        return call(), None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        out = call()
        torch.cuda.synchronize()
    events = profile.events() or []
    return out, [e.name for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
