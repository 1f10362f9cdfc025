"""SummaryConv2d: a layer with the arguments of nn.Conv2d, whose weight is b (bᵀb)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.utils import _pair

from interp_nn import linalg
from interp_nn.nn.base import as_matrix, memory_format
from interp_nn.nn.polynomial_layer import Normalize, PolynomialLayer, options_of
from interp_nn.nn.symbolic import call_in_graph
from interp_nn.nn.weights import copy_parameters, folded_weight, meta_arguments, solved_from


class SummaryConv2d(PolynomialLayer, _ConvNd):
    """Compute a convolution with the effective weight b (bᵀb), or g b̂ q(b̂ᵀb̂), with nn.Conv2d's signature.

    The parameters are `b` and `bias`. `b` has the layout of kernels, (out_channels, in_channels / groups, kh, kw), so that no
    call permutes it. Flattened to rows and transposed, it is the matrix b (in_channels / groups * kh * kw,
    out_channels / groups), one for each group, which `matrix()` returns. `weight`, in the same layout, is the effective weight,
    computed from b. Each output position is the summary of its patch. A call forms the effective weight once, then runs
    PyTorch's convolution.

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
        polynomial: As in `SummaryLinear`.
        normalize: As in `SummaryLinear`. Each group's b has a spectral norm of its own.
        gain: As in `SummaryLinear`. Each group has a gain of its own: `gain` is (groups,).

    Example:
        >>> layer = SummaryConv2d(3, 8, 3, padding=1)
        >>> layer(torch.ones(2, 3, 5, 5)).shape, layer.matrix().shape
        (torch.Size([2, 8, 5, 5]), torch.Size([27, 8]))
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
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        polynomial: str | Sequence[float] = "summary",
        normalize: Normalize | None = None,
        gain: bool | None = None,
    ) -> None:
        options = options_of(polynomial, normalize, gain)
        _ConvNd.__init__(
            self,
            in_channels,
            out_channels,
            _pair(kernel_size),
            _pair(stride),
            padding if isinstance(padding, str) else _pair(padding),
            _pair(dilation),
            False,
            _pair(0),
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
        )
        self._set_options(options)
        self.reset_parameters()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as nn.Module does. Raises ValueError for `weight`, which is computed from b."""
        # The constructor of _ConvNd registers its kernels as `weight`: those are b.
        super().register_parameter(name if name != "weight" or hasattr(self, "b") else "b", param)

    def reset_parameters(self) -> None:
        """Draw each b as a random orthonormal matrix, and the bias as nn.Conv2d does; gains become 1."""
        if "polynomial" not in vars(self):  # called by the constructor of _ConvNd, before there are options
            return
        self._reset_b()
        if self.bias is not None:
            fan_in = self.b[0].numel()
            bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """Compute the convolution (n, out_channels, h, w) of the input (n, in_channels, h, w), or both without n."""
        if (call := call_in_graph(self, input)) is not None:
            return call
        self._refuse_quantized("input", input)
        weight = self.formed_weight()
        if weight is None:
            kernels: Tensor = self.b
            last = torch.channels_last in (memory_format(kernels), memory_format(input))
            if last:  # the rows of b in another order, so that kernels, weight and gradients keep the format
                kernels = kernels.permute(0, 2, 3, 1)
            b = as_matrix(kernels, self.groups)
            if self._is_summary():
                g = linalg.gram_small(b)
                weight = linalg.mul_gram(b, g)
                if self.constraint == "penalty":
                    in_order = not last or b.shape[-1] <= b.shape[-2]  # bbᵀ has the order of the rows, bᵀb has not
                    self._cache_gram(g if in_order else None)
            else:
                self._warn_if_stale()
                weight = self._weight_of(b)
            weight = weight.mT.reshape(kernels.shape)
            if last:
                weight = weight.permute(0, 3, 1, 2)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = _pair(0)
        return nn.functional.conv2d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def fold(self) -> nn.Conv2d:
        """Return a plain nn.Conv2d that computes the same function, with the kernels formed in float64."""
        out = nn.Conv2d(**_conv_arguments(self)).to_empty(device=self.b.device)
        out.to(memory_format=memory_format(self.b))  # type: ignore[call-overload] # not in the stubs
        copy_parameters(self, out, folded_weight(self))
        return out

    def extra_repr(self) -> str:
        """Return nn.Conv2d's arguments, the constraint and frozen state for repr."""
        return _ConvNd.extra_repr(self) + self._note()

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        preserve: str = "function",
        *,
        polynomial: str | Sequence[float] = "summary",
        normalize: Normalize | None = None,
        gain: bool | None = None,
    ) -> SummaryConv2d:
        """Make a summary layer from an nn.Conv2d.

        Args:
            conv: The layer; it is not changed.
            preserve: "function" or "weight", as in `SummaryLinear.from_linear`.
            polynomial: As in the constructor.
            normalize: As in the constructor.
            gain: As in the constructor.

        Returns:
            A SummaryConv2d with parameters of its own, in the layer's dtype and on its device.

        Raises:
            TypeError: `conv` is not an nn.Conv2d, or its weight is uninitialized; an option is of another type.
            ValueError: `preserve` or an option is something else; or no b gives the weight, as in `set_weight_`.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: got {type(conv).__name__}, want nn.Conv2d")
        options = options_of(polynomial, normalize, gain)
        solved = solved_from("conv", conv.weight, preserve, options, conv.groups)
        out = cls(**_conv_arguments(conv), **options.arguments()).to_empty(device=solved.b.device)
        out.to(memory_format=memory_format(conv.weight))  # type: ignore[call-overload] # not in the stubs
        copy_parameters(conv, out, solved.b)
        out._write_solved(solved)
        return out


def _conv_arguments(conv: nn.Module) -> dict[str, Any]:
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    return meta_arguments(conv, *names)
