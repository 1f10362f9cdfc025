"""Problems: an operator at a size in a dtype, its inputs, its operations and its bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp_nn.engines import orders
from interp_nn.engines.problem import HEAD_ORDERS, Plan
from interp_nn.engines.problem import Problem as PlannedProblem
from interp_nn.nn.polynomial_layer import POWER_ITERATIONS
from interp_nn.nn.polynomials import NAMED, SUMMARY

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,  # whose products PyTorch may round to tf32
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
# "summary": Y = X b (bᵀb). "cross_entropy": the three-term loss of (P, Y), with k classes. "head": the same loss behind an
# output layer with m classes.
OPS = ("summary", "cross_entropy", "head")
# The summary: "fwd" records a graph, "bwd" walks a graph that is kept, "fwdbwd" does both, and "infer" records nothing. A loss
# is computed with all its gradients.
MODES = {"summary": ("fwd", "bwd", "fwdbwd", "infer"), "cross_entropy": ("loss",), "head": ("loss",)}
# Ops of one layer without a bias, by the polynomial of its SummaryLinear. "microbatches": a "step" is forward and backward of the
# rows in MICROBATCHES parts, whose gradients add up. "update_spectral_norms": what follows a step of the optimizer.
LAYERS = {
    "layer-summary": "summary", "layer-newton-schulz": "newton-schulz", "layer-pc-1": "pc-1", "layer-pc-4": "pc-4",
    "microbatches": "newton-schulz", "update_spectral_norms": "newton-schulz",
}  # fmt: skip
MODES |= dict.fromkeys(LAYERS, ("fwd", "bwd", "fwdbwd"))
MODES |= {"microbatches": ("step",), "update_spectral_norms": ("update",)}
MICROBATCHES = 8
LAYER_SHAPES = ((32, 512, 100), (4096, 512, 64), (4096, 1024, 256))
SHAPES_OF_MICROBATCHES = ((256, 512, 100),)
SHAPES = (
    (32, 512, 100), (256, 512, 100), (1024, 512, 100), (4096, 512, 100), (65536, 512, 64), (65536, 1024, 128),
    (16384, 4096, 256), (8192, 4096, 1024), (8192, 4096, 4096), (1024, 25088, 4096),
)  # fmt: skip
# The heads of the reference networks at their batch of 32: the small CNN's and the vgg11's, with 10 classes.
HEADS = ((32, 1600, 120), (32, 512, 100))
# A sweep over n and k at one d, in which the choice of a plan is compared with every plan; the last k is above d.
SELECTION = tuple(
    (n, 512, k) for k in (16, 64, 256, 512, 1024) for n in (1, 8, 32, 128, 512, 2048, 8192) if n * k < 2**23
)
QUICK = ((32, 512, 100), (4096, 512, 64))
CLASSES = 10


class Problem(NamedTuple):
    """An op of OPS on X (n x d) and b (d x k), in a dtype of DTYPES; m classes behind an output layer, None without one."""

    op: str
    n: int
    d: int
    k: int
    m: int | None = None
    dtype: str = "fp32"

    @classmethod
    def of(cls, op: str, shape: Sequence[int], dtype: str = "fp32") -> Problem:
        """Make a problem from a shape of three numbers, or of four for a head."""
        n, d, k, *rest = shape
        return cls(op, n, d, k, rest[0] if rest else None, dtype)

    @property
    def name(self) -> str:
        """Return the problem as text."""
        sizes = ", ".join(str(size) for size in (self.n, self.d, self.k, self.m) if size is not None)
        return f"{self.op} ({sizes}) {self.dtype}"

    @property
    def loss(self) -> bool:
        """Return whether the problem is a loss."""
        return self.op in ("cross_entropy", "head")

    @property
    def degree(self) -> int | None:
        """Return the degree of a layer's polynomial; None for the summary."""
        coefficients = NAMED[LAYERS.get(self.op, "summary")]
        return None if coefficients == SUMMARY else len(coefficients) - 1


class Data(NamedTuple):
    """One set of inputs: x, a layer's weight bᵀ (k, d), an output layer, the summary's upstream gradient, targets."""

    x: Tensor
    w: Tensor
    a: Tensor
    c: Tensor
    dy: Tensor
    target: Tensor

    def double(self) -> Data:
        """Return the same in fp64, with leaves of its own."""
        exact = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in self]
        return Data(*exact)


def datasets(problem: Problem, device: torch.device, count: int) -> list[Data]:
    """Draw `count` sets of a problem's inputs, the same at every call; products of the weights neither grow nor vanish."""
    _, n, d, k, m, name = problem
    classes, dtype = m or k, DTYPES[name]
    draw = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device, generator=draw) * scale).to(dtype)

    return [
        Data(
            randn(n, d).requires_grad_(),
            randn(k, d, scale=max(d, k) ** -0.5).requires_grad_(),
            randn(classes, k, scale=k**-0.5).requires_grad_(),
            randn(classes).requires_grad_(),
            randn(n, k),
            torch.randint(classes, (n,), device=device, generator=draw),
        )
        for _ in range(count)
    ]


def rotation(problem: Problem, device: torch.device, cold: bool) -> int:
    """Return how many sets of inputs to use in turn: 1, or from 2 to 256 that fill the last cache twice, with gradients."""
    _, n, d, k, _, dtype = problem
    one = 2 * (n * d + k * d + n * k) * DTYPES[dtype].itemsize
    return max(2, min(256, -(-2 * cache_bytes(device) // one))) if cold else 1


def cache_bytes(device: torch.device) -> int:
    """Return the size of the device's last cache; 32 MiB where a CPU does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    told = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    units = {"K": 2**10, "M": 2**20}
    try:
        text = told.read_text(encoding="ascii").strip()
        return int(text[:-1]) * units[text[-1]]
    except (OSError, ValueError, KeyError):
        return 2**25


def useful_flops(problem: Problem, mode: str) -> float:
    """Return the operations of the cheapest order of products: the same for every provider, so that more work earns nothing."""
    _, n, d, k, m, _ = problem

    def cheapest(gradients: bool) -> float:
        needed = gradients or m is not None
        degree = problem.degree
        pair, head = problem.loss and m is None, m is not None
        planned = PlannedProblem(n, d, k, pair, needed, needed, m, head, degree=degree)
        plans: Sequence[Plan] = orders.OPERATOR_PLANS if degree is None else orders.POLYNOMIAL_PLANS
        plans = [Plan("eager", order) for order in HEAD_ORDERS] if head else plans
        return min(orders.flops_and_products(plan, planned)[0] for plan in plans)

    if m is not None:
        return cheapest(True)
    if mode == "update":
        return 4.0 * POWER_ITERATIONS * d * k
    if mode == "bwd":
        return cheapest(True) - cheapest(False)
    return cheapest(mode not in ("fwd", "infer"))


def least_bytes(problem: Problem, mode: str) -> float:
    """Return the bytes that are read and written at least once: inputs, outputs, and gradients of both, but not a loss."""
    _, n, d, k, m, name = problem
    if mode == "update":
        return DTYPES[name].itemsize * d * k
    inputs = n * d + d * k + (0 if m is None else m * k)
    output = 0 if problem.loss else n * k
    passes = {"fwd": inputs + output, "infer": inputs + output}.get(mode, 2 * inputs + output)
    upstream = output if mode in ("fwdbwd", "step") else 0
    return DTYPES[name].itemsize * (passes + upstream)


@contextlib.contextmanager
def products(mode: str) -> Iterator[None]:
    """Let fp32 matrix products and convolutions use tf32 in the mode of that name, and be exact in the others."""
    cudnn: Any = torch.backends.cudnn  # whose stub lacks `conv`
    switches = torch.backends.cuda.matmul, cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if mode == "tf32" else "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
