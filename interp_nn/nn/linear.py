"""SummaryLinear: a drop-in replacement of nn.Linear."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from interp_nn import functional
from interp_nn.nn.base import Freezable
from interp_nn.nn.symbolic import call_in_graph
from interp_nn.nn.weights import copy_parameters, folded_weight, meta_arguments, preserving_b


class SummaryLinear(Freezable):
    """Compute y = x b (bᵀb) + bias with nn.Linear's signature.

    The parameters are `b` (in_features, out_features) and `bias` (out_features,). `weight` (out_features, in_features) is the
    effective weight (b (bᵀb))ᵀ, computed from b: the layer equals an nn.Linear with it. b starts orthonormal, where it is
    weightᵀ, and bias starts as in nn.Linear. Training does not keep b orthonormal; see `constrain`. b has the shape that it has
    in the equation, because the transposed layout is not faster.

    Args:
        in_features: Size of each input row, d.
        out_features: Size of each output row, k.
        bias: If True, the layer has a bias.
        device: Device of the parameters; None is PyTorch's default device.
        dtype: float64, float32, bfloat16 or float16; None is PyTorch's default dtype.

    Example:
        >>> layer = SummaryLinear(4, 3)
        >>> layer(torch.ones(2, 4)).shape, layer.orthogonality_defect() < 1e-5
        (torch.Size([2, 3]), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.b = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw b as a random orthonormal matrix, and the bias as nn.Linear does."""
        self.reset_orthogonal_()
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """Compute x b (bᵀb) + bias, (..., out_features), for the input x (..., in_features)."""
        if (call := call_in_graph(self, input)) is not None:
            return call
        frozen = self.frozen_weight()
        if frozen is not None:
            return nn.functional.linear(input, frozen, self.bias)
        if self.constraint == "penalty":
            y, gram = functional.summary_and_gram(input, self.b, self.bias)
            self._cache_gram(gram)
            return y
        return functional.summary(input, self.b, self.bias)

    def fold(self) -> nn.Linear:
        """Return a plain nn.Linear that computes the same function, with the weight formed in float64."""
        out = nn.Linear(**_linear_arguments(self)).to_empty(device=self.b.device)
        copy_parameters(self, out, folded_weight(self))
        return out

    @classmethod
    def from_linear(cls, linear: nn.Linear, preserve: str = "function") -> SummaryLinear:
        """Make a summary layer from an nn.Linear.

        Args:
            linear: The layer; it is not changed.
            preserve: "function" keeps the outputs: b gets the cube roots of the weight's singular values, computed in
                float64. "weight" takes the transposed weight as b, and changes the outputs unless it is orthonormal.

        Returns:
            A SummaryLinear with parameters of its own, in the layer's dtype and on its device.

        Raises:
            TypeError: `linear` is not an nn.Linear, or its weight is uninitialized.
            ValueError: `preserve` is something else.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: got {type(linear).__name__}, want nn.Linear")
        b = preserving_b("linear", linear.weight, preserve)
        out = cls(**_linear_arguments(linear)).to_empty(device=b.device)
        copy_parameters(linear, out, b)
        return out

    def extra_repr(self) -> str:
        """Return the sizes, constraint and frozen state for repr."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}{self._note()}"


def _linear_arguments(linear: nn.Module) -> dict[str, Any]:
    return meta_arguments(linear, "in_features", "out_features")
