"""Gates and the layers they multiply: a unit's output is its gate, in [0, 1], times a linear function of its input.

A ReLU is such a unit whose gate looks at its own preactivation; here the gate looks at q, whatever that was computed from
(Lakshminarayanan & Singh, NeurIPS 2020, arXiv 2006.10529).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interp_nn.gates.graph import apply_gates


class SoftGate(nn.Module):
    """(1 + eps) sigmoid(beta q), of q of any shape. `ceiling`, 1 + eps, is what a gate that is on tends to.

    beta = 4, eps = 0.1 are those of the published DGN; eps scales an output by up to (1 + eps) for each gated layer.
    Raises ValueError for a beta that is not positive or a negative eps.
    """

    def __init__(self, beta: float = 4.0, eps: float = 0.0) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta: got {beta}, want a positive number")
        if not eps >= 0:
            raise ValueError(f"eps: got {eps}, want 0 or a positive number")
        self.beta, self.eps = float(beta), float(eps)

    @property
    def ceiling(self) -> float:
        return 1 + self.eps

    def forward(self, q: Tensor) -> Tensor:
        gate = torch.sigmoid(self.beta * q)
        return self.ceiling * gate if self.eps else gate

    def extra_repr(self) -> str:
        return f"beta={self.beta}, eps={self.eps}"


class HardGate(nn.Module):
    """1 where q > 0 and 0 elsewhere, in q's dtype, as PyTorch's gradient of a ReLU has it.

    Nothing flows back to q, so that what computes it is not trained; with `straight_through`, the gradient of sigmoid(beta q)
    does in training mode. Raises ValueError for a beta that is not positive.
    """

    ceiling = 1.0

    def __init__(self, straight_through: bool = False, beta: float = 4.0) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta: got {beta}, want a positive number")
        self.straight_through, self.beta = straight_through, float(beta)

    def forward(self, q: Tensor) -> Tensor:
        hard = (q > 0).to(q.dtype)
        if not (self.straight_through and self.training):
            return hard
        soft = torch.sigmoid(self.beta * q)
        return hard + (soft - soft.detach())  # the bracket is exactly 0

    def extra_repr(self) -> str:
        return f"straight_through=True, beta={self.beta}" if self.straight_through else ""


class GatedLinear(nn.Linear):
    """gate(q) * (z Wᵀ + b): z (..., in_features), q (..., out_features). nn.Linear's parameters; gate: SoftGate() by default."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        gate: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.gate = SoftGate() if gate is None else gate

    def forward(self, z: Tensor, q: Tensor) -> Tensor:  # type: ignore[override]
        return apply_gates(super().forward(z), self.gate(q))


class GatedConv2d(nn.Conv2d):
    """gate(q) * conv2d(z): z (n, in_channels, h, w), q of the convolution's output shape. nn.Conv2d's arguments and parameters.

    gate: SoftGate() by default.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate: nn.Module | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self.gate = SoftGate() if gate is None else gate

    def forward(self, z: Tensor, q: Tensor) -> Tensor:  # type: ignore[override]
        return apply_gates(super().forward(z), self.gate(q))
