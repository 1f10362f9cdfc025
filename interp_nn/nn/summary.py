"""Layers that compute summaries: SummaryLinear and SummaryConv2d drop in, SummaryLayer, -Classifier and -Head pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.utils import _pair

from interp_nn import functional, linalg
from interp_nn.functional import SummaryPair
from interp_nn.nn.linear_form import Freezable, LinearForm, copy_parameters, folded, root
from interp_nn.nn.loss import SummaryLoss


class SummaryLinear(Freezable):
    """y = x b (bᵀb) + bias with nn.Linear's signature, parameters and state_dict: `weight` (out, in) is bᵀ, `bias` (out).

    Initialised with b orthonormal, where it equals nn.Linear with the same weight; bias as in nn.Linear.
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
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.reset_orthogonal_()
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.frozen_weight()
        if frozen is not None:
            return nn.functional.linear(x, frozen, self.bias)
        if self.constraint == "penalty":
            y, square = functional.summary_and_square(x, self.weight.t(), self.bias)
            self._keep_square(square)
            return y
        return functional.summary(x, self.weight.t(), self.bias)

    def fold(self) -> nn.Linear:
        """A plain nn.Linear that computes the same function, its weight formed in fp64."""
        out = nn.Linear(**_linear_arguments(self)).to_empty(device=self.weight.device)
        copy_parameters(self, out, folded(self))
        return out

    @classmethod
    def from_linear(cls, linear: nn.Linear, preserve: str = "function") -> SummaryLinear:
        """The summary layer of an nn.Linear.

        preserve="function" keeps the outputs: b gets the cube roots of the weight's singular values, taken in fp64.
        preserve="weight" keeps the parameter, and changes the outputs wherever it is not orthonormal.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: got {type(linear).__name__}, want nn.Linear")
        weight = root("linear", linear.weight, preserve)
        out = cls(**_linear_arguments(linear)).to_empty(device=weight.device)
        copy_parameters(linear, out, weight)
        return out

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}{self._note()}"


class SummaryConv2d(Freezable, _ConvNd):  # type: ignore[misc]
    """A convolution whose kernels are the effective weight b (bᵀb): nn.Conv2d's signature, parameters and state_dict.

    b (in_channels / groups * kh * kw, out_channels) is `weight` flattened and transposed, one b for each group: every
    output position is the summary of its patch. The effective weight is formed once a call, so the rest is a convolution.
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
    ) -> None:
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

    def reset_parameters(self) -> None:
        _ConvNd.reset_parameters(self)
        self.reset_orthogonal_()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.frozen_weight()
        if weight is None:
            b = self.matrix()
            square = linalg.smaller_square(b)
            weight = linalg.by_square(b, square).mT.reshape(self.weight.shape)
            if self.constraint == "penalty":
                self._keep_square(square)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = nn.functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = _pair(0)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def fold(self) -> nn.Conv2d:
        """A plain nn.Conv2d that computes the same function, its kernels formed in fp64."""
        out = nn.Conv2d(**_conv_arguments(self)).to_empty(device=self.weight.device)
        copy_parameters(self, out, folded(self))
        return out

    def extra_repr(self) -> str:
        return _ConvNd.extra_repr(self) + self._note()

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, preserve: str = "function") -> SummaryConv2d:
        """The summary layer of an nn.Conv2d; `preserve` as in SummaryLinear.from_linear."""
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: got {type(conv).__name__}, want nn.Conv2d")
        weight = root("conv", conv.weight, preserve, conv.groups)
        out = cls(**_conv_arguments(conv)).to_empty(device=weight.device)
        copy_parameters(conv, out, weight)
        return out


def _linear_arguments(linear: nn.Module) -> dict[str, Any]:
    return _arguments(linear, "in_features", "out_features")


def _conv_arguments(conv: nn.Module) -> dict[str, Any]:
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    return _arguments(conv, *names)


def _arguments(layer: Any, *names: str) -> dict[str, Any]:
    """What makes a layer like `layer` on the meta device: nothing is drawn for parameters that are about to be copied."""
    given = {name: getattr(layer, name) for name in names}
    return given | {"bias": layer.bias is not None, "device": "meta", "dtype": layer.weight.dtype}


class SummaryLayer(LinearForm):
    """The pair (projection x b, summary x b (bᵀb)), each (..., out_features); b starts orthonormal, where they are equal."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.reset_orthogonal_()

    def forward(self, x: Tensor) -> Any:
        """SummaryPair."""
        return functional.summary_pair(x, self.weight.t())

    def projection(self, x: Tensor) -> Tensor:
        """x b alone (..., out_features): what inference needs."""
        return nn.functional.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}{self._note()}"


class SummaryClassifier(SummaryLayer):
    """A summary layer whose columns are the classes: the pair of logits in training, the projection's in evaluation."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, device, dtype)

    def forward(self, x: Tensor) -> Any:
        """SummaryPair of logits (..., num_classes) in training mode, one tensor of them in evaluation mode."""
        return super().forward(x) if self.training else self.projection(x)

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:
        """`functional.summary_cross_entropy` of this layer's b."""
        return functional.summary_cross_entropy(
            x, self.weight.t(), target, weights=weights, ignore_index=ignore_index, reduction=reduction
        )


class SummaryHead(SummaryLayer):
    """The reference network's head: a summary layer of `latent` columns and one output layer shared by both codes.

    In training mode the forward gives the pair of logits (..., num_classes), in evaluation mode those of the projection.
    `loss` computes the three-term loss from the features, with its gradients in the same call. `output` is an nn.Linear.
    """

    def __init__(
        self,
        in_features: int,
        latent: int,
        num_classes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, latent, device, dtype)
        self.output = nn.Linear(latent, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        """SummaryPair of logits in training mode, one tensor of them in evaluation mode."""
        if not self.training:
            return self.output(self.projection(x))
        return SummaryPair(*map(self.output, super().forward(x)))

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        consistency: str = "logits",
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:
        """w1 CE(o1, t) + w2 CE(o2, t) + w3 MSE, the MSE between the logits (the reference's code) or the codes (its paper).

        x (..., in_features), target (...) int64; see `functional.summary_head_cross_entropy` and `SummaryLoss`.
        """
        if consistency == "logits":
            return functional.summary_head_cross_entropy(
                x,
                self.weight.t(),
                self.output.weight,
                self.output.bias,
                target,
                weights=weights,
                ignore_index=ignore_index,
                reduction=reduction,
            )
        criterion = SummaryLoss(weights, consistency, ignore_index, reduction)
        codes = functional.summary_pair(x, self.weight.t())
        return criterion(tuple(map(self.output, codes)), target, codes)
