"""Forward-mode derivatives, for threads that take some at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

_LOCK = threading.RLock()


def pushed(function: Callable[..., Any], x: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """function(x) and its derivative along v: torch.func.jvp, by one thread at a time, since its level is the process's."""
    with _LOCK:
        return cast(tuple[Any, Any], torch.func.jvp(function, x, v))
