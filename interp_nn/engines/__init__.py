"""Engines: who computes. Each is a module with the same three calls, `forward`, `backward` and `loss`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

import torch

from interp_nn.engines import eager
from interp_nn.engines.cuda import compiled_library
from interp_nn.engines.devices import Chip, chip_of, interpreting

ENGINES = ("reference", "triton", "cuda")
OLDEST_TRITON = (3, 6)
MOST_COLUMNS = 128  # that the kernels hold in one tile
SHARED_WIDE = 160 << 10  # two 128 x 128 matrices in fp32, and what is multiplied with them
_SHARED_WIDEST = 200 << 10  # three
_HEADS_ON_10 = (3, 9)
_MODULES: dict[str, ModuleType] = {"reference": eager}


def get(name: str) -> ModuleType:
    """The engine's module, imported when it is first needed."""
    if name not in _MODULES:
        _MODULES[name] = importlib.import_module(f"interp_nn.engines.{name}.engine")
    return _MODULES[name]


_reasons: dict[str, str | None] = {"reference": None}


def unavailable(name: str) -> str | None:
    """Why an engine cannot compute anything here; None if it can."""
    if name not in _reasons:
        _reasons[name] = _triton_unavailable() if name == "triton" else _cuda_unavailable()
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
    reason = _no_device((8, 0))
    without = torch.version.cuda is None or not torch.cuda.is_available()
    return f"{reason} (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)" if without else reason


def _cuda_unavailable() -> str | None:
    return _no_device((7, 5)) or compiled_library.load() or compiled_library.driver_reason()


def _no_device(oldest: tuple[int, int]) -> str | None:
    """Why there is no CUDA device that is new enough; None if there is one."""
    if torch.version.cuda is None:
        return "PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    chips = [chip_of(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    if not any(chip is not None and chip.capability >= oldest for chip in chips):
        return f"no CUDA device of compute capability {'.'.join(map(str, oldest))} or newer"
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
    oldest = (8, 0) if name == "triton" else (7, 5)
    if chip.capability < oldest:
        wanted, found = (".".join(map(str, capability)) for capability in (oldest, chip.capability))
        return f"it needs compute capability {wanted}, and {device} has {found}"
    if dtype == torch.float64:
        return "it has no float64 kernels"
    if dtype == torch.float32 and 64 < k <= MOST_COLUMNS and not head and chip.shared < SHARED_WIDE:
        return f"fp32 kernels for more than 64 columns need {SHARED_WIDE >> 10} KiB of shared memory in a block"
    if classes is not None and max(k, classes) > MOST_COLUMNS:
        return f"its losses have at most {MOST_COLUMNS} columns and classes, not {k} and {classes}"
    return (
        _triton_refusal(chip, dtype, n, d, k, classes, head)
        if name == "triton"
        else _cuda_refusal(chip, dtype, d, k, classes, head)
    )


def _triton_refusal(
    chip: Chip, dtype: torch.dtype, n: int, d: int, k: int, classes: int | None, head: bool
) -> str | None:
    if head and dtype == torch.float32 and k > 64:
        if chip.shared < SHARED_WIDE:
            return f"fp32 kernels for more than 64 columns need {SHARED_WIDE >> 10} KiB of shared memory in a block"
        if classes is not None and classes > 64 and chip.shared < _SHARED_WIDEST:
            needed = _SHARED_WIDEST >> 10
            return f"fp32 heads of more than 64 columns and 64 classes need {needed} KiB of shared memory in a block"
    if head and chip.capability[0] == 10 and _triton_version() < _HEADS_ON_10:
        return f"Triton before {'.'.join(map(str, _HEADS_ON_10))} cannot compile the loss of a head for {chip.name}"
    if max(n, d * max(k, MOST_COLUMNS)) >= 2**31:
        return "n or d k is beyond 32-bit offsets"
    return None


def _cuda_refusal(chip: Chip, dtype: torch.dtype, d: int, k: int, classes: int | None, head: bool) -> str | None:
    if k > MOST_COLUMNS:
        return f"its kernels have at most {MOST_COLUMNS} columns, not {k}"
    if d >= 2**30:
        return "d is beyond 32-bit offsets"
    few = classes is None or classes <= 16
    if chip.capability < (8, 0):
        if dtype != torch.float32 or head or k > 64 or not few:
            return "below compute capability 8.0 it has only fp32 kernels of at most 64 columns, and losses of 16"
    elif dtype == torch.float32 and not few:
        needed = _SHARED_WIDEST if head else SHARED_WIDE
        if chip.shared < needed:
            return f"its fp32 losses of more than 16 classes need {needed >> 10} KiB of shared memory in a block"
    return None


def availability() -> dict[str, str]:
    """Each engine with "available" or the reason why it is not."""
    reasons = {name: unavailable(name) for name in ENGINES}
    out = {name: "available" if reason is None else f"off: {reason}" for name, reason in reasons.items()}
    out["reference"] += " (PyTorch operators, every device)"
    if reasons["triton"] is None:
        where = "interpreted on the CPU" if interpreting() else "CUDA devices of compute capability 8.0 or newer"
        out["triton"] += f" ({where})"
    if reasons["cuda"] is None:
        out["cuda"] += " (CUDA devices of compute capability 7.5 or newer)"
    return out
