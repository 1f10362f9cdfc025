"""Gates, and layers with gates: a unit's output is its gate, in [0, 1], times a linear function of its input.

A ReLU is such a unit whose gate depends on its own preactivation. Here the gate depends on a given q
(Lakshminarayanan & Singh, NeurIPS 2020, arXiv 2006.10529).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interp_nn.gates.graph import apply_gates


class SoftGate(nn.Module):
    """Compute the soft gate (1 + eps) sigmoid(beta q).

    The published DGN has beta = 4 and eps = 0.1. eps scales an output by up to (1 + eps) for each gated layer.

    Args:
        beta: Steepness, positive.
        eps: Excess of an open gate over 1, at least 0.

    Raises:
        ValueError: `beta` or `eps` is out of range.

    Example:
        >>> SoftGate(beta=4)(torch.tensor([-1.0, 0.0, 1.0])).round(decimals=3)
        tensor([0.0180, 0.5000, 0.9820])
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
        """Return 1 + eps, the limit of a gate that is on."""
        return 1 + self.eps

    def forward(self, q: Tensor) -> Tensor:
        """Compute the gates of q, of any shape, in its dtype."""
        gate = torch.sigmoid(self.beta * q)
        return self.ceiling * gate if self.eps else gate

    def extra_repr(self) -> str:
        """Return the settings for repr."""
        return f"beta={self.beta}, eps={self.eps}"


class HardGate(nn.Module):
    """Compute the hard gate: 1 where q > 0 and 0 elsewhere, as in PyTorch's gradient of a ReLU.

    q gets no gradient, so the gating network is not trained. With `straight_through` it gets the gradient of sigmoid(beta q)
    in training mode.

    Args:
        straight_through: If True, q gets a gradient in training mode.
        beta: Steepness of the sigmoid whose gradient that is, positive.

    Raises:
        ValueError: `beta` is not positive.

    Example:
        >>> HardGate()(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0., 0., 1.])
    """

    ceiling = 1.0

    def __init__(self, straight_through: bool = False, beta: float = 4.0) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"beta: got {beta}, want a positive number")
        self.straight_through, self.beta = straight_through, float(beta)

    def forward(self, q: Tensor) -> Tensor:
        """Compute the gates of q, of any shape, in its dtype."""
        hard = (q > 0).to(q.dtype)
        if not (self.straight_through and self.training):
            return hard
        soft = torch.sigmoid(self.beta * q)
        return hard + (soft - soft.detach())  # the bracket is exactly 0

    def extra_repr(self) -> str:
        """Return the settings for repr."""
        return f"straight_through=True, beta={self.beta}" if self.straight_through else ""


class GatedLinear(nn.Linear):
    """Compute gate(q) * (z Wᵀ + bias), with nn.Linear's parameters.

    Args:
        in_features: Size of each input row.
        out_features: Size of each output row.
        bias: If True, the layer has a bias.
        gate: Module that maps q to gates; None is `SoftGate()`.
        device: Device of the parameters; None is PyTorch's default device.
        dtype: A floating dtype; None is PyTorch's default dtype.

    Example:
        >>> layer = GatedLinear(4, 3, gate=HardGate())
        >>> layer(torch.ones(2, 4), -torch.ones(2, 3)).count_nonzero()
        tensor(0)
    """

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
        """Compute the output (n, ..., out_features).

        Args:
            z: Input of shape (n, ..., in_features).
            q: Preactivations of the gates, (n, ..., out_features).

        Raises:
            ValueError: q has another shape than the output.
        """
        return apply_gates(super().forward(z), self.gate(q))


class GatedConv2d(nn.Conv2d):
    """Compute gate(q) * conv2d(z), with nn.Conv2d's parameters.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        kernel_size: Height and width of the kernels.
        stride: Steps between output positions.
        padding: Entries added at each border, or 'valid' or 'same'.
        dilation: Steps between a kernel's entries.
        groups: Number of groups of channels.
        bias: If True, the layer has a bias.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        device: Device of the parameters; None is PyTorch's default device.
        dtype: A floating dtype; None is PyTorch's default dtype.
        gate: Module that maps q to gates; None is `SoftGate()`.

    Example:
        >>> layer = GatedConv2d(3, 8, 3, padding=1, gate=HardGate())
        >>> layer(torch.ones(2, 3, 5, 5), -torch.ones(2, 8, 5, 5)).count_nonzero()
        tensor(0)
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
        """Compute the output (n, out_channels, h_out, w_out).

        Args:
            z: Input of shape (n, in_channels, h, w).
            q: Preactivations of the gates, of the output's shape.

        Raises:
            ValueError: q has another shape than the output.
        """
        return apply_gates(super().forward(z), self.gate(q))
