"""Values that planning passes around: the problem, the plan, the tiles of a kernel, the options of a loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from interp_nn.engines.devices import DeviceSpec

EngineName = Literal["eager", "triton", "cuda"]
ENGINES: tuple[EngineName, ...] = ("eager", "triton", "cuda")

# The order in which X b bᵀ b is multiplied, with G = bᵀb, and X b q(G), with K = bbᵀ. A head's loss forms both logits either from
# X itself, with a weight of d x 2m, or from the n x k latent code P = X b.
Order = Literal[
    "(Xb)G", "X(bG)", "((Xb)bᵀ)b", "(X(bbᵀ))b", "X((bbᵀ)b)", "(Xb)q", "X(bq)", "X(q(K)b)", "((Xb)bᵀ)b...",
    "logits_from_x", "logits_from_latent",
]  # fmt: skip
SUMMARY_ORDERS: tuple[Order, ...] = ("(Xb)G", "X(bG)", "((Xb)bᵀ)b", "(X(bbᵀ))b", "X((bbᵀ)b)")
POLYNOMIAL_ORDERS: tuple[Order, ...] = ("(Xb)q", "X(bq)", "X(q(K)b)", "((Xb)bᵀ)b...")
HEAD_ORDERS: tuple[Order, ...] = ("logits_from_x", "logits_from_latent")

# Functions of an engine for calls of one plan and layout. They return None, and do nothing, where the engine itself has to see
# the call: (x, b, bias) -> (P, Y, saved), (dP, dY, x, b, saved) -> (dX, db, dbias), (x, b, a, c, target) -> (loss, gradients),
# and (gradients, upstream) -> gradients. They are made for rows x (n, d), and take a contiguous x (..., d). P, Y, dP and dY are
# (n, k); gradients are laid out as their tensors.
PreparedForward = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor | None, Tensor, list[Tensor]] | None]
PreparedBackward = Callable[[Tensor | None, Tensor, Tensor, Tensor, Sequence[Tensor]], tuple[Tensor | None, ...] | None]
PreparedLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor], tuple[Tensor, list[Tensor]] | None]
PreparedScale = Callable[[Sequence[Tensor], Tensor], Sequence[Tensor] | None]


class LossOptions(NamedTuple):
    """Options of the three-term loss w1 CE(o1, t) + w2 CE(o2, t) + w3 MSE(o1, o2) of two logits o1, o2.

    Attributes:
        weights: The factors (w1, w2, w3).
        ignore_index: Rows with this target are left out of all three terms.
        reduction: "mean" over the kept rows, "sum", or "none" for one loss a row.
    """

    weights: tuple[float, float, float]
    ignore_index: int
    reduction: str


class Problem(NamedTuple):
    """X (n x d) with b (d x k), on a device.

    Attributes:
        n: Rows of X.
        d: Features: columns of X, rows of b.
        k: Columns of b.
        pair: The projection is an output too.
        need_x: X needs a gradient.
        need_b: b needs a gradient.
        classes: Number of classes of a loss: k itself, or m behind an output layer. None for a summary or a pair.
        head: The loss is that of an output layer on both codes.
        dtype: Dtype of X and b.
        spec: Figures of the GPU; None where no engine has kernels for the device.
        device: PyTorch's device type, or "sm_90" and the like for a GPU that is not at hand.
        degree: Degree of q in X b q(bᵀb); None for the summary, whose q(G) is G.
        need_scale: The scale of a polynomial's b needs a gradient.
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
    spec: DeviceSpec | None = None
    device: str = "cpu"
    degree: int | None = None
    need_scale: bool = False


class Config(NamedTuple):
    """Tile sizes and launch options of a Triton kernel.

    Attributes:
        tiles: Sizes in the order of `configs.TILES`.
        warps: Warps of a program.
        stages: Stages of the software pipeline.
        scratch: A loss stores its rows in scratch memory and reads them again, which needs fewer registers.
        blocks_per_sm: Programs that run on one multiprocessor at a time.
        stages_a: Stages of a loss's first loop over features, which has the longest waits; None for `stages`.
    """

    tiles: tuple[int, ...]
    warps: int = 8
    stages: int = 3
    scratch: bool = False
    blocks_per_sm: int = 1
    stages_a: int | None = None

    def __str__(self) -> str:
        return "x".join(map(str, self.tiles)) + f", {self.warps} warps, {self.stages} stages"


class Plan(NamedTuple):
    """The way a problem is computed, forward and backward, with its reason.

    Attributes:
        engine: "eager", "triton" or "cuda".
        order: The order of the products.
        saves: The forward saves an intermediate with n rows for the backward (P of "(Xb)G" and "(Xb)q").
        autograd: PyTorch's autograd computes the backward of plain products, because the operator's fixed cost is more than it
            saves. Only for "eager".
        tiles: Config of each kernel by name, forward first. Empty but for "triton".
        reason: Why this engine and this order, in words.
        flops: Floating-point operations, forward and backward.
        bytes: Predicted bytes moved on a GPU; None elsewhere.
        seconds: Predicted seconds on a GPU; None elsewhere.

    Example:
        >>> import interp_nn
        >>> plan = interp_nn.plan(4096, 512, 64)
        >>> plan.engine, plan.order
        ('eager', 'X(bG)')
    """

    engine: EngineName
    order: Order
    saves: bool = False
    autograd: bool = False
    tiles: tuple[tuple[str, Config], ...] = ()
    reason: str = ""
    flops: int = 0
    bytes: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        how = (
            ", saves P"
            if self.saves and self.order in ("(Xb)G", "(Xb)q")
            else ", backward by autograd"
            if self.autograd
            else ""
        )
        text = f"{self.engine}, {self.order}{how}"
        text += f"; {self.reason}" if self.reason else ""
        if self.seconds is not None and self.bytes is not None:
            text += f"; predicted {self.bytes / 1e6:.4g} MB, {self.flops / 1e6:.4g} MFLOP, {self.seconds * 1e6:.4g} µs"
        return text + "".join(f"; {kernel} {config}" for kernel, config in self.tiles)


# The schema of an operator has no type for a plan: there it is a string of ASCII, engine:order or engine:order:saves.
_ORDER_OF = {order.replace("ᵀ", "'"): order for order in (*SUMMARY_ORDERS, *POLYNOMIAL_ORDERS, *HEAD_ORDERS)}
_TEXT_OF = {order: text for text, order in _ORDER_OF.items()}


def plan_to_text(plan: Plan) -> str:
    """The string that an operator takes for a plan."""
    return f"{plan.engine}:{_TEXT_OF[plan.order]}{':saves' if plan.saves else ''}"


@functools.lru_cache(256)
def plan_from_text(text: str) -> Plan:
    """The plan of an operator's string.

    Raises:
        ValueError: The string is not one that `plan_to_text` returns.
    """
    engine, _, rest = text.partition(":")
    order, _, saves = rest.partition(":")
    for name in ENGINES:
        if name == engine and order in _ORDER_OF and saves in ("", "saves"):
            return Plan(name, _ORDER_OF[order], saves == "saves")
    raise ValueError(
        f"plan: got {text!r}, want 'engine:order' or 'engine:order:saves' with engine in {ENGINES} and order in "
        f"{tuple(_ORDER_OF)}"
    )
