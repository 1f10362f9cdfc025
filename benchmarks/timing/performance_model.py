"""`model`: predicted times of the Triton kernels on GPUs that are not at hand, beside `nn.Linear`'s. Nothing is measured.

A kernel is a sequence of loops. Each takes the longest of four times: its bytes at the memory's rate, its loads in turn at the
memory's latency with a few of them in flight, its products at the matrix units' rate, and its instructions. Programs, tiles
and stages are the engine's own. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from interp_nn.engines import cost
from interp_nn.engines.devices import DeviceSpec, spec_for
from interp_nn.engines.problem import Config

SHAPES = (
    (32, 512, 100), (4096, 512, 64), (4096, 512, 100), (65536, 512, 64), (65536, 512, 100), (65536, 1024, 128),
)  # fmt: skip
_DTYPE, _BYTES = torch.bfloat16, 2

# Assumptions, frozen before any measurement.
_LATENCY, _CACHE_LATENCY = 0.8e-6, 0.3e-6  # of a load from loaded memory, and from the L2 cache
_CACHE_BYTES = 23.7  # a clock and multiprocessor, from the L2 cache: 5.5 TB/s on an H200
_PRODUCTS = 0.8  # of the matrix units' rate
_IPC = 0.65  # instructions a clock, for each of the 4 schedulers of a multiprocessor
_CE_KERNELS, _CE_BYTES = 5, 22  # of PyTorch's cross entropy with its backward: kernels, and bytes for each logit
# Instructions of a thread in sm_90's code: a fixed number, and more for each number that the thread holds of a tile.
_BACKWARD_STEP, _BACKWARD_DX, _BACKWARD_DY = 99, 3.67, 1.6
_LOSS_ROWS, _LOSS_LOGIT = 40, 103


class Gpu(NamedTuple):
    """A GPU: the figures that planning uses, its clock in 1/s, and the bytes of its L2 cache."""

    spec: DeviceSpec
    clock: float
    cache: float


def _known(capability: tuple[int, int]) -> DeviceSpec:
    spec = spec_for(capability)
    assert spec is not None
    return spec


GPUS = {
    "A100": Gpu(_known((8, 0)), 1.41e9, 40e6),
    "H200": Gpu(_known((9, 0))._replace(bandwidth=4.8e12), 1.755e9, 50e6),
    "L4": Gpu(_known((8, 9))._replace(multiprocessors=58, bandwidth=0.3e12, matrix_rate=121e12), 2.04e9, 48e6),
    "B200": Gpu(_known((10, 0)), 1.85e9, 126e6),
}


class Kernels(NamedTuple):
    """How kernels are built, where it decides their time.

    Attributes:
        flat: G is formed in a loop of its own, and then the forward loads the next row tile while it stores the last one.
            Without, G counts by its products, beside the loads of the first row tile.
        sum_rows: Parts of T that are loaded together.
        sum_columns: Numbers of T in a block, for up to 64 and up to 128 columns.
        splits: Parts of db that are loaded together.
        configs: Tiles by kernel; those of the tables without.
    """

    flat: bool = True
    sum_rows: int = 128
    sum_columns: tuple[int, int] = (32, 64)
    splits: int = 8
    configs: tuple[tuple[str, Config], ...] = ()


PRESENT = Kernels()


class Prediction(NamedTuple):
    """Bytes from and to memory, floating-point operations, grid barriers, and seconds."""

    bytes: float
    flops: float
    barriers: int
    seconds: float


def predict(name: str, gpu: Gpu, n: int, d: int, k: int, kernels: Kernels = PRESENT) -> Prediction:
    """Predict one kernel, "stream", "summary_backward" or "pair_loss", for X (n, d) and b (d, k) in bfloat16.

    The losses return all gradients. The backward has no bias.
    """
    return _Model(name, gpu, n, d, k, kernels).predict()


class _Model:
    """One kernel for one problem on one GPU."""

    def __init__(self, name: str, gpu: Gpu, n: int, d: int, k: int, kernels: Kernels) -> None:
        from interp_nn.engines.triton import launches  # which imports Triton

        self.name, self.n, self.d, self.k, self.kernels, self.gpu = name, n, d, k, kernels, gpu
        spec = gpu.spec
        self.config, self.tiles = launches.config_and_tiles(kernels.configs, _DTYPE, n, d, k, name, spec)
        self.rows = -(-n // self.tiles.get("BN_A", self.tiles["BN"]))  # tiles of the first loop
        if name == "stream":
            self.jobs, self.splits = self.rows, 1
            self.programs = launches.programs_of(spec, self.config, self.rows)
        else:
            self.splits = launches.splits_of(spec, self.config, n, d, self.tiles["BD"])
            self.jobs = -(-d // self.tiles["BD"]) * self.splits
            first = self.rows if name == "pair_loss" else 1
            self.programs = launches.programs_of(spec, self.config, first, self.jobs, -(-d // self.tiles["BC"]))
        shared = max(1, -(-self.programs // spec.multiprocessors))  # programs of a multiprocessor
        self.bandwidth = cost.BANDWIDTH * spec.bandwidth
        self.products = _PRODUCTS * spec.matrix_rate / spec.multiprocessors / shared  # of a program
        self.from_cache = _CACHE_BYTES * gpu.clock / shared
        self.instruction = self.config.warps * shared / (4 * _IPC * gpu.clock)
        self.in_flight = max(1, self.config.stages - 1)
        in_cache = 2 * n * d * _BYTES <= gpu.cache  # with a gradient of X's size
        self.latency_after = _CACHE_LATENCY if in_cache else _LATENCY  # of what the kernel itself has stored

    def predict(self) -> Prediction:
        n, d, k, bk = self.n, self.d, self.k, self.tiles["BK"]
        gram = 2 * self.programs * d * bk * bk
        xs, rows = n * d * _BYTES, n * k * _BYTES
        if self.name == "stream":
            seconds = self.forward() if self.kernels.flat else self.drained(0.0)
            return Prediction(xs + rows, 2 * n * d * bk + 2 * n * bk * bk + gram, 0, cost.LAUNCH + seconds)
        gradients, tail = 4 * n * d * bk, 2 * cost.BARRIER + self.sums()
        if self.name == "summary_backward":
            seconds = self.gradients(_LATENCY)
            return Prediction(2 * xs + rows, gradients + 6 * d * bk * bk, 2, cost.LAUNCH + seconds + tail)
        loss = (_LOSS_ROWS + _LOSS_LOGIT * self.held(self.tiles["BN_A"], bk)) * self.instruction
        seconds = self.drained(loss) + self.gradients(self.latency_after)
        if self.kernels.flat:
            seconds += self.gram()
        if self.config.scratch:  # T in another loop, over P and E2
            product = 2 * self.tiles["BN_A"] * bk * bk / self.products
            seconds += self.turns * max(self.latency_after / self.in_flight, product)
        flops = gradients + 2 * n * d * bk + 6 * n * bk * bk + gram
        moved = 3 * xs + (2 + 4 * self.config.scratch) * rows
        return Prediction(moved, flops, 2, cost.LAUNCH + seconds + tail)

    def held(self, rows: int, columns: int) -> float:
        """Return the numbers of a tile that each thread holds."""
        return rows * columns / (32 * self.config.warps)

    @property
    def turns(self) -> int:
        """Row tiles of the program that has most of them."""
        return -(-self.rows // self.programs)

    def gram(self) -> float:
        """Return the seconds of G, from b in the L2 cache."""
        depth, bk = self.tiles.get("BD_A", self.tiles["BD"]), self.tiles["BK"]
        step = max(_CACHE_LATENCY / self.in_flight, 2 * depth * bk * bk / self.products)
        return _CACHE_LATENCY + -(-self.d // depth) * step

    def project(self, latency: float, products: float) -> float:
        """Return the seconds of one row tile's loop over features."""
        high = self.tiles.get("BN_A", self.tiles["BN"])
        steps = -(-self.d // self.tiles.get("BD_A", self.tiles["BD"]))
        stored = high * self.k if self.name == "stream" else 0
        moved = (high * self.d + stored) * _BYTES * self.programs / self.bandwidth
        b = self.d * self.k * _BYTES / self.from_cache
        return max(latency + moved, steps * _LATENCY / self.in_flight, b, products / self.products)

    def drained(self, end: float) -> float:
        """Return the seconds of row tiles that start their loads anew, each with an end in which nothing is loaded."""
        high, bk = self.tiles.get("BN_A", self.tiles["BN"]), self.tiles["BK"]
        one, gram = 2 * high * self.d * bk, 0 if self.kernels.flat else 2 * self.d * bk * bk
        return self.project(_LATENCY, one + gram) + (self.turns - 1) * self.project(_LATENCY, one) + self.turns * end

    def forward(self) -> float:
        """Return the seconds of G, and of row tiles in one loop that never drains."""
        one = 2 * self.tiles["BN"] * self.tiles["BK"] * (self.d + self.tiles["BK"])
        return self.gram() + _LATENCY + self.turns * self.project(0.0, one)

    def gradients(self, latency: float) -> float:
        """Return the seconds of dX and of the parts of db: each step multiplies twice, and stores its tile of dX."""
        high, depth, bk = self.tiles["BN"], self.tiles["BD"], self.tiles["BK"]
        tiles = -(-self.n // high)
        steps = -(-self.jobs // self.programs) * -(-tiles // self.splits)
        code = _BACKWARD_STEP + _BACKWARD_DX * self.held(high, depth) + _BACKWARD_DY * self.held(high, bk)
        step = 4 * high * depth * bk / self.products + code * self.instruction
        moved = (2 * self.n * self.d + self.n * self.k) * _BYTES / self.bandwidth
        return max(latency + max(moved, steps * step), steps * latency / self.in_flight)

    def sums(self) -> float:
        """Return the seconds of T and of db: sums of parts, a few of which are loaded at a time."""
        bk, kernels = self.tiles["BK"], self.kernels
        blocks = -(-bk * bk // kernels.sum_columns[bk > 64])
        parts = min(self.programs, self.jobs) if self.name == "summary_backward" else self.programs
        of_t = -(-blocks // self.programs) * -(-parts // kernels.sum_rows)
        of_db = -(-self.d // self.tiles["BC"] // self.programs) * -(-self.splits // kernels.splits)
        return (of_t + of_db) * self.latency_after


def linear(gpu: Gpu, n: int, d: int, k: int) -> dict[str, float]:
    """Return the predicted seconds of nn.Linear's forward and backward, and of both with its cross entropy, by kernel."""
    spec = gpu.spec
    bandwidth, rate = cost.BANDWIDTH**2 * spec.bandwidth, cost.LIBRARY * spec.matrix_rate

    def product() -> float:
        return cost.LAUNCH + max((n * d + n * k + d * k) * _BYTES / bandwidth, 2 * n * d * k / rate)

    loss = _CE_KERNELS * cost.LAUNCH + _CE_BYTES * n * k / bandwidth
    return {"stream": product(), "summary_backward": 2 * product(), "pair_loss": 3 * product() + loss}


_NAMES = {"stream": "forward", "summary_backward": "backward", "pair_loss": "loss"}


def markdown() -> str:
    """Return the tables of all GPUs, each with an empty column for what will be measured."""
    return "\n\n".join("\n".join(_table(name, gpu)) for name, gpu in GPUS.items())


def _table(name: str, gpu: Gpu) -> Iterator[str]:
    spec = gpu.spec
    yield f"### {name}\n"
    yield (
        f"{spec.multiprocessors} multiprocessors at {gpu.clock / 1e9:.3g} GHz, {spec.bandwidth / 1e12:.3g} TB/s, "
        f"{spec.matrix_rate / 1e12:.0f} TFLOP/s, {gpu.cache / 1e6:.0f} MB of L2 cache.\n"
    )
    yield "| (n, d, k) | kernel | MB | GFLOP | barriers | predicted, µs | `nn.Linear`, predicted, µs | ratio | measured, µs |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|"
    for shape in SHAPES:
        theirs = linear(gpu, *shape)
        for kernel, word in _NAMES.items():
            moved, flops, barriers, seconds = predict(kernel, gpu, *shape)
            figures = moved / 1e6, flops / 1e9, barriers, 1e6 * seconds, 1e6 * theirs[kernel]
            shown = " | ".join(f"{figure:.3g}" if figure < 1000 else f"{figure:.0f}" for figure in figures)
            yield f"| {shape} | {word} | {shown} | {seconds / theirs[kernel]:.2f} | |"
