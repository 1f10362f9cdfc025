"""SummaryLinear: a layer with the arguments of nn.Linear, whose weight is b (bᵀb)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp_nn import functional
from interp_nn.nn.polynomial_layer import Normalize, PolynomialLayer, options_of
from interp_nn.nn.symbolic import call_in_graph, fx_state
from interp_nn.nn.weights import copy_parameters, folded_weight, meta_arguments, solved_from
from interp_nn.ops.polynomial import layer_weight, weight_comes_first


class SummaryLinear(PolynomialLayer):
    """Compute y = x b (bᵀb) + bias, or y = g x b̂ q(b̂ᵀb̂) + bias for a polynomial q, with nn.Linear's signature.

    The parameters are `b` (in_features, out_features), `bias` (out_features,) and with a gain `gain` (1,). `weight`
    (out_features, in_features) is the effective weight, computed from b: the layer equals an nn.Linear with it. b starts
    orthonormal, bias starts as in nn.Linear, the gain at 1. For all named polynomials the weight starts as bᵀ. b has the shape
    that it has in the equation, because the transposed layout is not faster.

    The summary is q(G) = G. It is for heads: a whole network of it diverges at some learning rates at which nn.Linear trains. For
    whole networks take `polynomial="newton-schulz"`, which is y = g x b̂ (3 I - b̂ᵀb̂) / 2 with b̂ = b / σ, and call
    `interp_nn.nn.follow(optimizer, model)` once, which updates the spectral norm σ of b after each step.

    Args:
        in_features: Size of each input row, d.
        out_features: Size of each output row, k.
        bias: If True, the layer has a bias.
        device: Device of the parameters; None is PyTorch's default device.
        dtype: float64, float32, bfloat16 or float16; None is PyTorch's default dtype.
        polynomial: "summary", "newton-schulz", "pc-1" to "pc-4", or one to five coefficients of q, the constant first.
        normalize: If True, b̂ = b / σ. "restore" also multiplies y by σ, as published for PC layers. If False, b̂ = b. None is
            True for "newton-schulz", "restore" for PC layers, and False for the others. σ is a constant to autograd.
        gain: If True, y has a learned factor g. None is True for "newton-schulz" and PC layers, and False for the others.

    Raises:
        TypeError: `polynomial` or `gain` is of another type.
        ValueError: `polynomial` or `normalize` is not one of these.

    Example:
        >>> layer = SummaryLinear(4, 3)
        >>> layer(torch.ones(2, 4)).shape, layer.orthogonality_defect() < 1e-5
        (torch.Size([2, 3]), True)
        >>> SummaryLinear(4, 3, polynomial="newton-schulz")
        SummaryLinear(in_features=4, out_features=3, bias=True, polynomial='newton-schulz', normalize=True, gain=True)

    Source:
        Banh, Interpretable-Neural-Net; for "pc-1" to "pc-4": PC Layer, arXiv 2606.06470.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        polynomial: str | Sequence[float] = "summary",
        normalize: Normalize | None = None,
        gain: bool | None = None,
    ) -> None:
        super().__init__()
        options = options_of(polynomial, normalize, gain)
        self.in_features, self.out_features = in_features, out_features
        self.b = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._set_options(options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw b as a random orthonormal matrix, and the bias as nn.Linear does; a gain becomes 1."""
        self._reset_b()
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """Compute y (..., out_features) for the input x (..., in_features)."""
        if type(input) is not Tensor or getattr(fx_state, "_is_fx_tracing_flag", True):
            call = call_in_graph(self, input)
            if call is not None:
                return call
        if getattr(input, "is_quantized", False):
            self._refuse_quantized("input", input)
        cache = self._cache
        if cache is not None or self._frozen is not None:
            formed = self.frozen_weight() if cache is None else cache.weight()
            if formed is not None:
                bias = self._parameters.get("bias")
                return nn.functional.linear(input, formed, self.bias if bias is None else bias)
        if not self._plain:
            self._warn_if_stale()
            if weight_comes_first(input, self.in_features) and (found := self._numbers(input)) is not None:
                return nn.functional.linear(input, layer_weight(*found), self.bias)
            if (factors := self._scale_and_multiplier()) is not None:
                return functional.gained_summary(input, self.b, self.bias, self._coefficients, *factors)
            return functional.summary(input, self.b, self.bias, **self._functional_options())
        if self.constraint == "penalty":
            y, gram = functional.summary_and_gram(input, self.b, self.bias)
            self._cache_gram(gram)
            return y
        # Attributes of a module that are parameters take a long search.
        parameters = self.__dict__["_parameters"]
        b, bias = parameters.get("b"), parameters.get("bias")
        return functional.summary(input, self.b if b is None else b, self.bias if bias is None else bias)

    def fold(self) -> nn.Linear:
        """Return a plain nn.Linear that computes the same function, with the weight formed in float64."""
        out = nn.Linear(**_linear_arguments(self)).to_empty(device=self.b.device)
        copy_parameters(self, out, folded_weight(self))
        return out

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        preserve: str = "function",
        *,
        polynomial: str | Sequence[float] = "summary",
        normalize: Normalize | None = None,
        gain: bool | None = None,
    ) -> SummaryLinear:
        """Make a summary layer from an nn.Linear.

        Args:
            linear: The layer; it is not changed.
            preserve: "function" keeps the outputs: b is computed in float64, as by `set_weight_`. "weight" takes the transposed
                weight as b, and changes the outputs unless it is orthonormal.
            polynomial: As in the constructor.
            normalize: As in the constructor.
            gain: As in the constructor.

        Returns:
            A SummaryLinear with parameters of its own, in the layer's dtype and on its device.

        Raises:
            TypeError: `linear` is not an nn.Linear, or its weight is uninitialized; an option is of another type.
            ValueError: `preserve` or an option is something else; or no b gives the weight, as in `set_weight_`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: got {type(linear).__name__}, want nn.Linear")
        options = options_of(polynomial, normalize, gain)
        solved = solved_from("linear", linear.weight, preserve, options)
        out = cls(**_linear_arguments(linear), **options.arguments()).to_empty(device=solved.b.device)
        copy_parameters(linear, out, solved.b)
        out._write_solved(solved)
        return out

    def extra_repr(self) -> str:
        """Return the sizes, options, constraint and frozen state for repr."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}{self._note()}"


def _linear_arguments(linear: nn.Module) -> dict[str, Any]:
    return meta_arguments(linear, "in_features", "out_features")
