"""What planning must know of a device: a `Chip`, read once from PyTorch, or named by compute capability."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """capability (major, minor); multiprocessors; shared memory of a block in bytes; bytes/s of memory; FLOP/s of 16-bit
    matrix products. The two rates are datasheet figures of a common part with that capability, for predictions only.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared: int
    bandwidth: float
    matrix_rate: float

    @property
    def name(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


# T4, A100, A10, L4/L40S, H100, B200, RTX 5090; the newest known one stands for what comes after it.
KNOWN = (
    Chip((7, 5), 40, 65536, 0.32e12, 65e12),
    Chip((8, 0), 108, 166912, 2.0e12, 312e12),
    Chip((8, 6), 72, 101376, 0.6e12, 125e12),
    Chip((8, 9), 142, 101376, 0.86e12, 181e12),
    Chip((9, 0), 132, 232448, 3.35e12, 989e12),
    Chip((10, 0), 148, 232448, 8.0e12, 2250e12),
    Chip((12, 0), 170, 101376, 1.79e12, 210e12),
)


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU, program by program (TRITON_INTERPRET=1), in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def family(capability: tuple[int, int]) -> tuple[int, int] | None:
    """The known capability whose tables serve another one: the nearest one of its generation that is not newer."""
    older = [chip.capability for chip in KNOWN if chip.capability <= capability and chip.capability[0] == capability[0]]
    return older[-1] if older else None


def known(capability: tuple[int, int]) -> Chip | None:
    """The known chip of that capability, or the nearest one below it; None below 7.5."""
    older = [chip for chip in KNOWN if chip.capability <= capability]
    return older[-1]._replace(capability=capability) if older else None


_chips: dict[torch.device, Chip | None] = {}


def chip_of(device: torch.device) -> Chip | None:
    """The chip of a CUDA device, of an interpreted one where Triton interprets and the device is the CPU, else None."""
    if device not in _chips:
        _chips[device] = _read(device)
    return _chips[device]


chip_of._dynamo_marked_constant = True  # type: ignore[attr-defined] # as assume_constant_result, without its import


def _read(device: torch.device) -> Chip | None:
    if device.type == "cpu" and interpreting():
        return Chip((9, 0), 1, 232448, 1e10, 1e10)
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(device)
    chip = known((properties.major, properties.minor))
    if chip is None:
        return Chip((properties.major, properties.minor), properties.multi_processor_count, 0, 0.0, 0.0)
    shared = getattr(properties, "shared_memory_per_block_optin", chip.shared)
    return chip._replace(multiprocessors=properties.multi_processor_count, shared=shared)
