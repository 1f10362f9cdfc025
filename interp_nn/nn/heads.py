"""Layers that return a pair of outputs: SummaryLayer, SummaryClassifier and SummaryHead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp_nn import functional
from interp_nn.functional import SummaryPair
from interp_nn.nn.base import LinearForm
from interp_nn.nn.loss import SummaryLoss


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
