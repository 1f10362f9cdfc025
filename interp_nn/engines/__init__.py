"""Engines: who computes. Each is a module with the same three calls, `forward`, `backward` and `loss`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

import torch

from interp_nn.chips import Chip, chip_of, interpreting
from interp_nn.engines import reference

ENGINES = ("reference", "triton")
OLDEST_TRITON = (3, 6)
MOST_COLUMNS = 128  # that the kernels hold in one tile
SHARED_WIDE = 160 << 10  # two 128 x 128 matrices in fp32, and what is multiplied with them
_HEADS_ON_10 = (3, 9)
_MODULES: dict[str, ModuleType] = {"reference": reference}


def get(name: str) -> ModuleType:
    """The engine's module, imported when it is first needed."""
    if name not in _MODULES:
        _MODULES[name] = importlib.import_module(f"interp_nn.engines.{name}")
    return _MODULES[name]


_reasons: dict[str, str | None] = {"reference": None}


def unavailable(name: str) -> str | None:
    """Why an engine cannot compute anything here; None if it can."""
    if name not in _reasons:
        _reasons[name] = _triton_unavailable()
    return _reasons[name]


unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined] # see chips.chip_of


def _triton_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton, on Linux)"
    version = _triton_version()
    if version < OLDEST_TRITON:
        found, wanted = (".".join(map(str, v)) for v in (version, OLDEST_TRITON))
        return f"Triton {found} is older than {wanted}"
    if interpreting():
        numpy = tuple(map(int, importlib.metadata.version("numpy").split(".")[:2]))
        if version < (3, 7) and numpy >= (2, 4):
            return "the interpreter of Triton 3.6 needs numpy < 2.4"
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        built = "PyTorch is built without CUDA" if torch.version.cuda is None else "no CUDA device"
        return f"{built} (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    chips = [chip_of(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    if not any(chip is not None and chip.capability >= (8, 0) for chip in chips):
        return "no CUDA device of compute capability 8.0 or newer"
    return None


def _triton_version() -> tuple[int, int]:
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            major, minor = importlib.metadata.version(name).split(".")[:2]
        except importlib.metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return 0, 0


_triton_version._dynamo_marked_constant = True  # type: ignore[attr-defined] # see chips.chip_of


def refusal(
    name: str,
    chip: Chip | None,
    device: str,
    dtype: torch.dtype,
    n: int,
    d: int,
    k: int,
    classes: int | None,
    head: bool,
) -> str | None:
    """Why an engine cannot compute this problem; None if it can. `classes` is None but for a loss, `head` says of which.

    A device "sm_90" is one that is not at hand: whether the engine is available here then does not matter.
    """
    if name == "reference":
        return None
    off = None if device.startswith("sm_") else unavailable(name)
    if off is not None:
        return off
    if chip is None:
        return f"it needs a CUDA device, and x is on {device}"
    if chip.capability < (8, 0):
        return f"it needs compute capability 8.0, and {device} has {chip.capability[0]}.{chip.capability[1]}"
    if dtype == torch.float64:
        return "it has no float64 kernels"
    if dtype == torch.float32 and 64 < k <= MOST_COLUMNS and chip.shared < SHARED_WIDE:
        return f"fp32 kernels for more than 64 columns need {SHARED_WIDE >> 10} KiB of shared memory in a block"
    if classes is not None and max(k, classes) > MOST_COLUMNS:
        return f"its losses have at most {MOST_COLUMNS} columns and classes, not {k} and {classes}"
    if head and chip.capability[0] == 10 and _triton_version() < _HEADS_ON_10:
        return f"Triton before {'.'.join(map(str, _HEADS_ON_10))} cannot compile the loss of a head for {chip.name}"
    if max(n, d * max(k, MOST_COLUMNS)) >= 2**31:
        return "n or d k is beyond 32-bit offsets"
    return None


def availability() -> dict[str, str]:
    """Each engine with "available" or the reason why it is not."""
    reasons = {name: unavailable(name) for name in ENGINES}
    out = {name: "available" if reason is None else f"off: {reason}" for name, reason in reasons.items()}
    out["reference"] += " (PyTorch operators, every device)"
    if reasons["triton"] is None:
        where = "interpreted on the CPU" if interpreting() else "CUDA devices of compute capability 8.0 or newer"
        out["triton"] += f" ({where})"
    return out
