"""Figures of a device that planning uses: a `DeviceSpec`, read once from PyTorch or taken by compute capability."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch


class DeviceSpec(NamedTuple):
    """Figures of a GPU.

    The two rates serve predictions only. Those of a GPU that is not at hand are datasheet figures of a common part with that
    compute capability. At hand the bandwidth is read, and the matrix rate is the common part's for so many multiprocessors.

    Attributes:
        capability: Compute capability (major, minor).
        multiprocessors: Number of streaming multiprocessors that kernels may use.
        shared: Shared memory that a block may use, in bytes.
        bandwidth: Memory bandwidth in bytes/s.
        matrix_rate: Rate of 16-bit matrix products in FLOP/s.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared: int
    bandwidth: float
    matrix_rate: float

    @property
    def name(self) -> str:
        """The name that nvcc gives to the capability, such as "sm_90"."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def has_warpgroup_products(self) -> bool:
        """The fastest matrix products are those of whole groups of warps (from compute capability 9.0)."""
        return self.capability >= (9, 0)


# T4, A100, A10, L4/L40S, H100, B200, RTX 5090. Newer GPUs take the figures of the newest one here.
KNOWN = (
    DeviceSpec((7, 5), 40, 65536, 0.32e12, 65e12),
    DeviceSpec((8, 0), 108, 166912, 2.0e12, 312e12),
    DeviceSpec((8, 6), 72, 101376, 0.6e12, 125e12),
    DeviceSpec((8, 9), 142, 101376, 0.86e12, 181e12),
    DeviceSpec((9, 0), 132, 232448, 3.35e12, 989e12),
    DeviceSpec((10, 0), 148, 232448, 8.0e12, 2250e12),
    DeviceSpec((12, 0), 170, 101376, 1.79e12, 210e12),
)


# What torch.backends.cuda.matmul.fp32_precision reads, given "cuda" and "matmul", without its search for the name.
fp32_precision: Callable[[str, str], str] = getattr(
    torch._C, "_get_fp32_precision_getter", lambda *_: torch.backends.cuda.matmul.fp32_precision
)
sm_carveout: Callable[[], int | None] = torch._C._get_sm_carveout_experimental


def interpreting() -> bool:
    """Return True if Triton runs kernels on the CPU in this process (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def table_capability(capability: tuple[int, int]) -> tuple[int, int] | None:
    """Return the capability whose tuned tables serve another one: the nearest of its generation that is not newer."""
    older = [spec.capability for spec in KNOWN if spec.capability <= capability and spec.capability[0] == capability[0]]
    return older[-1] if older else None


def spec_for(capability: tuple[int, int]) -> DeviceSpec | None:
    """Return the figures for a capability, or those of the nearest one below it; None below 7.5."""
    older = [spec for spec in KNOWN if spec.capability <= capability]
    return older[-1]._replace(capability=capability) if older else None


_specs: dict[torch.device, DeviceSpec | None] = {}


def spec_of(device: torch.device) -> DeviceSpec | None:
    """Return the figures of a CUDA device; of an invented GPU where Triton interprets on the CPU; else None.

    Multiprocessors that PyTorch's carve-out keeps for other work, such as NCCL's, do not count: kernels with a grid barrier
    need all theirs at once.
    """
    if device not in _specs:
        _specs[device] = _read(device)
    spec, kept = _specs[device], sm_carveout()
    return spec if spec is None or not kept else spec._replace(multiprocessors=max(1, spec.multiprocessors - kept))


spec_of._dynamo_marked_constant = True  # type: ignore[attr-defined] # as assume_constant_result, without its import


def _read(device: torch.device) -> DeviceSpec | None:
    if device.type == "cpu" and interpreting():
        return DeviceSpec((9, 0), 1, 232448, 1e10, 1e10)
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(device)
    spec = spec_for((properties.major, properties.minor))
    if spec is None:
        return DeviceSpec((properties.major, properties.minor), properties.multi_processor_count, 0, 0.0, 0.0)
    shared = getattr(properties, "shared_memory_per_block_optin", spec.shared)
    kilohertz, bits = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
    bandwidth = 2e3 * kilohertz * bits / 8 or spec.bandwidth  # two transfers a clock
    count = properties.multi_processor_count
    rate = spec.matrix_rate * count / spec.multiprocessors
    return spec._replace(multiprocessors=count, shared=shared, bandwidth=bandwidth, matrix_rate=rate)
