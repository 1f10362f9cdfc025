"""The engines with kernels: which are on, why each does not compute a problem, and the names of its launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest import mock

import torch

from interp_nn import engines
from interp_nn.engines import limits
from interp_nn.engines.devices import interpreting, spec_of
from interp_nn.engines.problem import ENGINES, EngineName, Problem

EAGER, *_KERNELS = ENGINES
WITH_KERNELS = tuple(_KERNELS)
# How to name an argument of an engine's `launch`.
_NAMES: dict[str, Callable[[Any], str]] = {
    "triton": lambda plan: plan.kernel.__name__,
    "cuda": lambda operator: operator.overloadpacket.__name__,
}


def reasons(device: str) -> dict[str, str | None]:
    """Return why each engine with kernels is off on a device "cuda" or "cpu"; None if it is on."""
    return {engine: _off(engine, device) for engine in WITH_KERNELS}


def _off(engine: EngineName, device: str) -> str | None:
    if device == "cpu" and engine == "cuda":
        return "its kernels run on CUDA devices only"
    if device == "cpu" and not interpreting():
        return "its kernels run on a CPU with TRITON_INTERPRET=1 only"
    return limits.unsupported_reason(engine)


def at_hand(device: str) -> tuple[str, ...]:
    """Return the engines with kernels that are on for a device."""
    return tuple(engine for engine, why in reasons(device).items() if why is None)


def unsupported_reason(
    engine: str, device: torch.device, dtype: torch.dtype, n: int, d: int, k: int, classes: int | None = None,
    head: bool = False, degree: int | None = None,
) -> str | None:  # fmt: skip
    """Return why an engine does not compute a problem, with its name; None if it does."""
    pair = classes is not None and not head
    problem = Problem(n, d, k, pair, True, True, classes, head, dtype, spec_of(device), device.type, degree)
    why = limits.unsupported_reason(cast(EngineName, engine), problem)
    return None if why is None else f"{engine}: {why}"


@contextlib.contextmanager
def launches(engine: str) -> Iterator[list[str]]:
    """Yield a list that gets the names of the engine's launches; the eager engine has none."""
    names: list[str] = []
    if engine not in WITH_KERNELS:
        yield names
        return
    module: Any = engines.unverified(engine)
    original = module.launch

    def launch(what: Any, *arguments: Any) -> Any:
        names.append(_NAMES[engine](what))
        return original(what, *arguments)

    with mock.patch.object(module, "launch", launch):
        yield names
