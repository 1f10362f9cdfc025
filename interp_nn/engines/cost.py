"""How long a plan should take on a GPU: bytes over bandwidth or operations over the matrix units' rate, and what calls cost.

A model for choosing where nothing was measured, not a measurement. Its fractions of the datasheet's rates, and its costs of a
launch and of a barrier, are assumptions that a tuned table overrules (see `interp_nn.engines.triton.configs`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from interp_nn.engines.devices import Chip
from interp_nn.engines.orders import counted, head_products
from interp_nn.engines.triton.configs import padded

_BANDWIDTH = 0.90  # of the datasheet's, reached by anything that streams
_LIBRARY, _KERNEL, _SPLIT = 0.95, 0.65, 0.3  # of the matrix rate: cuBLAS, a fused kernel, one with fp32 operands
_WARPS = 0.6  # of what Triton's kernels reach, where products of single warps, which csrc has, are not the fastest: from 9.0 on
_UNALIGNED = 0.25  # of the bandwidth, where rows of X are no whole vectors: a kernel then loads element by element
_LAUNCH, _BARRIER = 2e-6, 1.5e-6
_HOST_CALL, _HOST_LAUNCH = 5e-6, 12e-6  # of the CPU, for an operation of PyTorch's and for a launch of an engine's
_LOSS_PASSES = 20  # over both logits in fp32, in a loss written with PyTorch's operations


class Problem(NamedTuple):
    """X (n x d) with b (d x k) and which gradients, on a chip (None: no GPU that has kernels here).

    classes: None for a summary or a pair. For a loss the number of classes: k itself, or m behind an output layer (`head`).
    """

    n: int
    d: int
    k: int
    pair: bool = False
    need_x: bool = True
    need_b: bool = True
    classes: int | None = None
    head: bool = False
    dtype: torch.dtype = torch.float32
    chip: Chip | None = None
    device: str = "cpu"


def unaligned(problem: Problem) -> bool:
    """Whether the kernels of one launch cannot load X in vectors."""
    return problem.d % 16 != 0


class Prediction(NamedTuple):
    """Floating-point operations, bytes moved and seconds, forward and backward together."""

    flops: float
    bytes: float
    seconds: float


def reference(problem: Problem, form: str, chip: Chip) -> Prediction:
    """A form in PyTorch's own operations: one kernel a product, two passes a loss."""
    n, d, k, itemsize = problem.n, problem.d, problem.k, problem.dtype.itemsize
    if problem.head and problem.classes is not None:
        m = problem.classes
        flops, calls = head_products(form, n, d, k, m)
        width = 2 * m if form == "flat" else k
        elements = 3 * n * d + 3 * n * width + (0 if form == "flat" else 6 * n * m) + 8 * d * k
    else:
        found = counted(form, problem.pair, problem.need_x, problem.need_b)
        flops, calls, elements = found.flops(n, d, k), sum(found), found.elements(n, d, k)
    moved = elements * itemsize
    if problem.classes is not None:
        calls += _LOSS_PASSES
        moved += _LOSS_PASSES * 2 * n * problem.classes * 4
    rate = _LIBRARY * _matrix_rate(chip, problem.dtype, 15)
    busy = max(moved / (_BANDWIDTH * chip.bandwidth), flops / rate) + calls * _LAUNCH
    return Prediction(flops, moved, max(busy, calls * _HOST_CALL))


def one_launch(problem: Problem, form: str, chip: Chip, engine: str = "triton") -> Prediction:
    """A form in an engine's kernels of one launch each. Every program forms G for itself, and columns are padded."""
    n, d, itemsize = problem.n, problem.d, problem.dtype.itemsize
    k = padded(problem.k)
    rows, xs = n * problem.k * itemsize, n * d * itemsize
    gram = min(chip.multiprocessors, -(-n // 64)) * 2 * d * k * k
    gradients = problem.need_x + problem.need_b
    if problem.classes is None:
        barriers = 2 if problem.need_b else 1
        flops = 2 * n * d * k * (1 + gradients) + 2 * n * k * k * (1 + 2 * problem.pair) + gram + 4 * d * k * k
        moved = xs * (1 + gradients) + rows * (2 + 2 * problem.pair) + (4 * rows if problem.pair else rows)
        launches = 2 if gradients else 1
    elif form == "flat":
        m = padded(problem.classes)
        barriers, launches = 4, 1
        flops = 2 * 2 * m * n * d * (1 + gradients) + gram
        moved = xs * (1 + gradients) + 2 * n * 2 * m * itemsize
    else:
        barriers, launches = 2, 1
        inner = 4 * n * k * padded(problem.classes) * 3 if problem.head else 6 * n * k * k
        flops = 2 * n * d * k * (1 + gradients) + inner + gram
        moved = xs * (1 + gradients) + 2 * rows
    rate = (_SPLIT if itemsize == 4 else _KERNEL) * _matrix_rate(chip, problem.dtype, 6)
    rate *= _WARPS if engine == "cuda" and chip.capability >= (9, 0) else 1
    bandwidth = _BANDWIDTH * chip.bandwidth * (_UNALIGNED if unaligned(problem) else 1)
    busy = max(moved / bandwidth, flops / rate) + launches * _LAUNCH + barriers * _BARRIER
    return Prediction(flops, moved, max(busy, launches * _HOST_LAUNCH))


def _matrix_rate(chip: Chip, dtype: torch.dtype, exact_share: int) -> float:
    """The rate of 16-bit products; of tf32 where PyTorch allows it; 1 / exact_share of it for exact fp32 products."""
    if dtype != torch.float32:
        return chip.matrix_rate
    return chip.matrix_rate / (2 if torch.backends.cuda.matmul.fp32_precision == "tf32" else exact_share)
