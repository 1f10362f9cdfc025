"""Forward-mode derivatives that several threads may take at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

_LOCK = threading.RLock()


def jvp(function: Callable[..., Any], x: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """Return function(*x) and its derivative along v, by torch.func.jvp under a lock: its nesting level is global."""
    with _LOCK:
        return cast(tuple[Any, Any], torch.func.jvp(function, x, v))
