"""Predicted time of a plan on a GPU: bytes over bandwidth or operations over the matrix units' rate, and the cost of calls.

A model for choosing where nothing was measured. Its fractions of the datasheet's rates, and its costs of a launch and of a
barrier, are assumptions; a tuned table overrules them (see `interp_nn.engines.triton.configs`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from interp_nn.engines.devices import DeviceSpec
from interp_nn.engines.limits import padded
from interp_nn.engines.orders import count_products, flops_and_products
from interp_nn.engines.problem import Plan, Problem

BANDWIDTH = 0.90  # of the datasheet's, reached by anything that streams
LIBRARY, _KERNEL, _SPLIT = 0.95, 0.65, 0.3  # of the matrix rate: cuBLAS, a fused kernel, one with fp32 operands
_WARPS = 0.6  # of Triton's rate: products of single warps, as in csrc, on GPUs that have those of warp groups
_UNALIGNED = 0.25  # of the bandwidth, where rows of X are no whole vectors: a kernel then loads element by element
LAUNCH, BARRIER = 2e-6, 1.7e-6
_HOST_CALL, _HOST_LAUNCH = 5e-6, 12e-6  # of the CPU, for an operation of PyTorch's and for a launch of an engine's
_LOSS_PASSES = 20  # over both logits in fp32, in a loss written with PyTorch's operations


class Prediction(NamedTuple):
    """Floating-point operations, bytes moved and seconds, forward and backward together."""

    flops: float
    bytes: float
    seconds: float


def unaligned(problem: Problem) -> bool:
    """Return True if the kernels of one launch cannot load X in vectors."""
    return problem.d % 16 != 0


def predict_eager(problem: Problem, plan: Plan, spec: DeviceSpec) -> Prediction:
    """Predict a plan in PyTorch's own operations: one kernel a product, `_LOSS_PASSES` passes a loss."""
    n, d, k, itemsize = problem.n, problem.d, problem.k, problem.dtype.itemsize
    flops, calls = flops_and_products(plan, problem)
    if problem.head and problem.classes is not None:
        from_x, m = plan.order == "logits_from_x", problem.classes
        width = 2 * m if from_x else k
        elements = 3 * n * d + 3 * n * width + (0 if from_x else 6 * n * m) + 8 * d * k
    else:
        elements = count_products(plan, problem).elements(n, d, k)
    moved = elements * itemsize
    if problem.classes is not None:
        calls += _LOSS_PASSES
        moved += _LOSS_PASSES * 2 * n * problem.classes * 4
    rate = LIBRARY * _matrix_rate(spec, problem.dtype, 15)
    busy = max(moved / (BANDWIDTH * spec.bandwidth), flops / rate) + calls * LAUNCH
    return Prediction(flops, moved, max(busy, calls * _HOST_CALL))


def predict_fused(problem: Problem, plan: Plan, spec: DeviceSpec) -> Prediction:
    """Predict a plan in an engine's kernels of one launch each. Every program forms G itself, and columns are padded.

    A polynomial counts as the summary: it moves the same bytes, and its k x k products are left out.
    """
    n, d, itemsize = problem.n, problem.d, problem.dtype.itemsize
    k = padded(problem.k)
    rows, xs = n * problem.k * itemsize, n * d * itemsize
    gram = min(spec.multiprocessors, -(-n // 64)) * 2 * d * k * k
    gradients = problem.need_x + problem.need_b
    if problem.classes is None:
        barriers = 2 if problem.need_b else 1
        flops = 2 * n * d * k * (1 + gradients) + 2 * n * k * k * (1 + 2 * problem.pair) + gram + 4 * d * k * k
        moved = xs * (1 + gradients) + rows * (2 + 2 * problem.pair) + (4 * rows if problem.pair else rows)
        launches = 2 if gradients else 1
    elif plan.order == "logits_from_x":
        m = padded(problem.classes)
        barriers, launches = 4, 1
        flops = 2 * 2 * m * n * d * (1 + gradients) + gram
        moved = xs * (1 + gradients) + 2 * n * 2 * m * itemsize
    else:
        barriers, launches = 2, 1
        inner = 4 * n * k * padded(problem.classes) * 3 if problem.head else 6 * n * k * k
        flops = 2 * n * d * k * (1 + gradients) + inner + gram
        moved = xs * (1 + gradients) + 2 * rows
    rate = (_SPLIT if itemsize == 4 else _KERNEL) * _matrix_rate(spec, problem.dtype, 6)
    rate *= _WARPS if plan.engine == "cuda" and spec.has_warpgroup_products else 1
    bandwidth = BANDWIDTH * spec.bandwidth * (_UNALIGNED if unaligned(problem) else 1)
    busy = max(moved / bandwidth, flops / rate) + launches * LAUNCH + barriers * BARRIER
    return Prediction(flops, moved, max(busy, launches * _HOST_LAUNCH))


def _matrix_rate(spec: DeviceSpec, dtype: torch.dtype, exact_share: int) -> float:
    """The rate of 16-bit products; of tf32 where PyTorch allows it; 1 / exact_share of it for exact fp32 products."""
    if dtype != torch.float32:
        return spec.matrix_rate
    return spec.matrix_rate / (2 if torch.backends.cuda.matmul.fp32_precision == "tf32" else exact_share)
