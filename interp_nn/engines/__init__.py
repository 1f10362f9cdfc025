"""Engines: who computes. Each is a module with the same three calls, `forward`, `backward` and `loss`."""

from __future__ import annotations

from types import ModuleType

from interp_nn.engines import reference

_MODULES = {"reference": reference}


def get(name: str) -> ModuleType:
    """The engine's module."""
    return _MODULES[name]


def availability() -> dict[str, str]:
    """Each engine with "available" or the reason why it is not."""
    return {"reference": "available (PyTorch operators, every device)"}
