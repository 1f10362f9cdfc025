"""The layers that the sweep compares: Y = X W + bias with W = gain · b q(bᵀb), q a polynomial. All but one are plain PyTorch.

With b = U S Vᵀ the weight is W = U f(S) Vᵀ, f(s) = s q(s²).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from interp_nn.nn import SummaryConv2d, SummaryLinear

POWER_ITERATIONS = 10  # a step of the optimizer, as published for PC layers


@dataclass(frozen=True)
class Candidate:
    """A layer of the sweep.

    Attributes:
        polynomial: Coefficients c0, c1, ... of q(G) = c0 I + c1 G + ....
        init: "uniform" is nn.Linear's own, "orthogonal" has singular values 1.
        scale: b is the parameter times this number, and starts as without it.
        sigma: b is divided by its spectral norm, which the backward holds "constant" or differentiates ("gradient").
        restored: The weight is multiplied by that norm again.
        gain: Learned multipliers of the weight, 1 at first: one "scalar", one a "row" (output), or one a "row and column".
        updated: If False, the spectral norm stays the first one.
        bounded: If True, each update of b is multiplied by 1 / (3 s² + 3 s + 1), s the spectral norm of b. The spectral norm of
            the step of W = b bᵀ b is then at most that of the optimizer's update, if that is at most 1.
        library: The polynomial's name, if the layers are this library's SummaryLinear and SummaryConv2d.
    """

    polynomial: tuple[float, ...] = (1.0,)
    init: Literal["uniform", "orthogonal"] = "orthogonal"
    scale: float = 1.0
    sigma: Literal["constant", "gradient"] | None = None
    restored: Literal["constant", "gradient"] | None = None
    gain: Literal["scalar", "row", "row and column"] | None = None
    updated: bool = True
    bounded: bool = False
    library: str | None = None


LINEAR, ORTHOGONAL, LIBRARY = "nn.Linear", "nn.Linear, orthogonal", "SummaryLinear, newton-schulz"
_SUMMARY, _NEWTON_SCHULZ = (0.0, 1.0), (1.5, -0.5)
# Levels 1 to 4 of "PC Layer: Polynomial Weight Preconditioning for Improving LLM Pre-Training", arXiv 2606.06470.
PC = (
    (1.507, -0.507),
    (2.083, -1.643, 0.560),
    (2.909, -4.649, 4.023, -1.283),
    (3.625, -9.261, 14.097, -10.351, 2.890),
)
CANDIDATES = {
    LINEAR: Candidate(init="uniform"),
    ORTHOGONAL: Candidate(),
    "summary": Candidate(_SUMMARY),
    "summary, w = 3b": Candidate(_SUMMARY, scale=1 / 3),
    "summary, bounded steps": Candidate(_SUMMARY, bounded=True),
    "summary, normalised": Candidate(_SUMMARY, sigma="gradient", gain="row"),
    "Newton-Schulz": Candidate(_NEWTON_SCHULZ, sigma="gradient", gain="row"),
    "Newton-Schulz, one gain": Candidate(_NEWTON_SCHULZ, sigma="gradient", gain="scalar"),
    "Newton-Schulz, row and column gains": Candidate(_NEWTON_SCHULZ, sigma="gradient", gain="row and column"),
    "Newton-Schulz, norm held constant": Candidate(_NEWTON_SCHULZ, sigma="constant", gain="row"),
    "Newton-Schulz, norm never updated": Candidate(_NEWTON_SCHULZ, sigma="gradient", gain="row", updated=False),
    "slope 0.2 at 1": Candidate((1.4, -0.4), sigma="gradient", gain="row"),
    "slope 0.5 at 1": Candidate((1.25, -0.25), sigma="gradient", gain="row"),
    "spectral norm": Candidate(sigma="gradient", gain="row"),
    **{
        f"PC-{level}": Candidate(polynomial, "uniform", sigma="gradient", restored="constant", gain="scalar")
        for level, polynomial in enumerate(PC, 1)
    },
    "PC-1, norm held constant": Candidate(PC[0], "uniform", sigma="constant", restored="constant", gain="scalar"),
    "PC-1, norm differentiated": Candidate(PC[0], "uniform", sigma="gradient", restored="gradient"),
    LIBRARY: Candidate(_NEWTON_SCHULZ, sigma="constant", gain="scalar", library="newton-schulz"),
}  # fmt: skip


class Linear(nn.Module):
    """A linear layer with a candidate's weight; its parameter `weight` (out, in) is bᵀ / scale.

    Args:
        in_features: Size of an input row.
        out_features: Size of an output row.
        candidate: The candidate.
        bias: If True, the layer has a bias, which starts as in nn.Linear.
    """

    u: Tensor
    v: Tensor
    eye: Tensor
    before: Tensor | None

    def __init__(self, in_features: int, out_features: int, candidate: Candidate, bias: bool = True) -> None:
        super().__init__()
        self.candidate = candidate
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        if candidate.init == "orthogonal":
            nn.init.orthogonal_(self.weight, 1 / candidate.scale)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(in_features)
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound)) if bias else None
        gains: dict[str | None, tuple[tuple[int, int], ...]] = {
            None: (),
            "scalar": ((1, 1),),
            "row": ((out_features, 1),),
        }
        gains["row and column"] = (*gains["row"], (1, in_features))
        self.gains = nn.ParameterList([torch.ones(shape) for shape in gains[candidate.gain]])
        u, _, vt = torch.linalg.svd(self.weight.detach(), full_matrices=False)
        self.register_buffer("u", u[:, 0].clone())
        self.register_buffer("v", vt[0].clone())
        self.register_buffer("eye", torch.eye(min(in_features, out_features)), persistent=False)
        before = self.weight.detach().clone() if candidate.bounded else None
        self.register_buffer("before", before, persistent=False)

    def effective_weight(self) -> Tensor:
        """Return W transposed, (out_features, in_features)."""
        kind = self.candidate
        w: Tensor = self.weight
        if kind.scale != 1:
            w = w * kind.scale
        if kind.sigma is not None:
            sigma = self.u @ w.detach() @ self.v if kind.sigma == "constant" else self.u @ w @ self.v
            w = w / sigma
        w = self._polynomial(w)
        if kind.restored is not None:
            w = w * (sigma if kind.restored == "gradient" else sigma.detach())
        for gain in self.gains:
            w = w * gain
        return w

    def _polynomial(self, w: Tensor) -> Tensor:
        c = self.candidate.polynomial
        if len(c) == 1:
            return w if c[0] == 1 else w * c[0]
        wide = w.shape[0] <= w.shape[1]
        gram = w @ w.T if wide else w.T @ w  # the smaller one
        if len(c) == 2:
            return torch.addmm(w, *((gram, w) if wide else (w, gram)), beta=c[0], alpha=c[1])
        q = c[-2] * self.eye + c[-1] * gram
        for coefficient in reversed(c[:-2]):
            q = torch.addmm(self.eye, gram, q, beta=coefficient)
        return q @ w if wide else w @ q

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of inputs (..., in_features)."""
        return nn.functional.linear(x, self.effective_weight(), self.bias)

    @torch.no_grad()
    def after_step(self) -> None:
        """Bound the update of the optimizer, and update the estimate of the spectral norm."""
        if self.before is not None:
            self._power_iterations(self.before)
            s = float(self.u @ self.before @ self.v)
            self.weight.copy_(self.before + (self.weight - self.before) / (3 * s * s + 3 * s + 1))
            self.before.copy_(self.weight)
        elif self.candidate.sigma is not None and self.candidate.updated:
            self._power_iterations(self.weight)

    def _power_iterations(self, w: Tensor) -> None:
        w = w / (self.u @ w @ self.v)  # so that nothing over- or underflows
        u = self.u
        for _ in range(POWER_ITERATIONS):
            v = w.T @ u
            u = w @ v
        self.u.copy_(u / u.norm())
        self.v.copy_(v / v.norm())


class Conv2d(Linear):
    """A convolution with square kernels and padding that keeps the size at stride 1; b has a row for each input of a patch."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, candidate: Candidate) -> None:
        super().__init__(in_channels * kernel * kernel, out_channels, candidate)
        self.shape, self.stride, self.padding = (out_channels, in_channels, kernel, kernel), stride, kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of images (n, in_channels, height, width)."""
        weight = self.effective_weight().view(self.shape)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def linear(in_features: int, out_features: int, candidate: Candidate) -> nn.Module:
    """Make a candidate's linear layer."""
    if candidate.library is not None:
        return SummaryLinear(in_features, out_features, polynomial=candidate.library)
    return Linear(in_features, out_features, candidate)


def conv2d(in_channels: int, out_channels: int, kernel: int, stride: int, candidate: Candidate) -> nn.Module:
    """Make a candidate's convolution with square kernels."""
    if candidate.library is not None:
        padding = kernel // 2
        return SummaryConv2d(in_channels, out_channels, kernel, stride, padding, polynomial=candidate.library)
    return Conv2d(in_channels, out_channels, kernel, stride, candidate)
