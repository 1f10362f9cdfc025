"""Layers that return a pair of outputs: SummaryLayer, SummaryClassifier and SummaryHead."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp_nn import functional, linalg
from interp_nn.functional import EQUAL_WEIGHTS, SummaryPair
from interp_nn.nn import diagnosis
from interp_nn.nn.base import LinearForm
from interp_nn.nn.loss import SummaryLoss
from interp_nn.nn.symbolic import call_in_graph


class SummaryLayer(LinearForm):
    """Compute the pair (projection x b, summary x b (bᵀb)). b starts orthonormal, where the two are equal.

    The parameter is `b` (in_features, out_features). `weight` (out_features, in_features) is the summary's effective weight,
    computed from b; the projection's weight is bᵀ.

    Args:
        in_features: Size of each input row, d.
        out_features: Size of each output row, k.
        device: Device of the parameters; None is PyTorch's default device.
        dtype: float64, float32, bfloat16 or float16; None is PyTorch's default dtype.

    Example:
        >>> projection, summary = SummaryLayer(4, 3)(torch.ones(2, 4))
        >>> projection.shape, torch.allclose(projection, summary, atol=1e-5)
        (torch.Size([2, 3]), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.b = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw b as a random orthonormal matrix."""
        self.reset_orthogonal_()

    def forward(self, x: Tensor) -> Any:
        """Compute the `SummaryPair` of x (..., in_features), each (..., out_features)."""
        if (call := call_in_graph(self, x)) is not None:
            return call
        self._refuse_quantized("x", x)
        return functional.summary_pair(x, self.b)

    def projection(self, x: Tensor) -> Tensor:
        """Compute the projection x b alone, (..., out_features), for x (..., in_features)."""
        self._refuse_quantized("x", x)
        return x @ self.b

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Reconstruct features from codes: codes b⁺ (..., in_features), which is codes bᵀ where b has orthonormal columns.

        Args:
            codes: (..., out_features), for example a projection x b.

        Returns:
            The features of least norm among those whose projections are nearest to the codes.

        Raises:
            ValueError: A last dimension that does not fit.

        Example:
            >>> layer, x = SummaryLayer(3, 3), torch.ones(2, 3)
            >>> torch.allclose(layer.reconstruct(layer.projection(x)), x, atol=1e-5)
            True
        """
        if codes.dim() == 0 or codes.shape[-1] != self.out_features:
            raise ValueError(f"codes: got shape {tuple(codes.shape)}, want (..., {self.out_features})")
        wide = linalg.accumulation_dtype(self.b.dtype)
        with linalg.autocast_off(self.b.device):
            return codes @ torch.linalg.pinv(self.b.to(wide)).to(codes.dtype)

    @torch.no_grad()
    def explained_variance(self, x: Tensor) -> float:
        """Compute the share of the features' variance that `reconstruct` gives back from their projection.

        It is 1 - ‖E - mean E‖² / ‖X - mean X‖² with E = X - X b b⁺: in [0, 1], and scikit-learn's `explained_variance_score` with
        variance-weighted outputs.

        Args:
            x: Features of shape (..., in_features), at least two different rows.

        Raises:
            ValueError: A last dimension that does not fit, or features without variance.

        Example:
            >>> SummaryLayer(3, 3).explained_variance(torch.eye(3)) > 0.9999
            True
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want (..., {self.in_features})")
        rows = x.reshape(-1, self.in_features).to(linalg.accumulation_dtype(self.b.dtype))
        rows = rows - rows.mean(0)
        total = rows.square().sum()
        if not total > 0:
            raise ValueError("x: got features without variance, want at least two different rows")
        with linalg.autocast_off(x.device):
            b = self.whole_matrix().to(rows.dtype)
            missed = rows - rows @ b @ torch.linalg.pinv(b)
        return float(1 - missed.square().sum() / total)

    def _with_reconstruction(
        self, loss: Tensor, weight: float, x: Tensor, target: Tensor, ignore_index: int, reduction: str
    ) -> Tensor:
        """Return a loss plus the weighted reconstruction loss, whose features get no gradient."""
        weight = functional.reconstruction_weight(weight)
        missed = functional.reconstruction_loss(
            x.detach(), self.b, target=target, ignore_index=ignore_index, reduction=reduction
        )
        return torch.add(loss, missed, alpha=weight)

    def _folded_projection(self) -> nn.Linear:
        """Return the plain layer of the projection."""
        diagnosis.look(self)
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.b.dtype)
        plain = plain.to_empty(device=self.b.device).train(self.training)
        with torch.no_grad():
            plain.weight.copy_(self.whole_matrix().mT).requires_grad_(self.b.requires_grad)
        return plain

    def extra_repr(self) -> str:
        """Return the sizes and the constraint for repr."""
        return f"in_features={self.in_features}, out_features={self.out_features}{self._note()}"


class SummaryClassifier(SummaryLayer):
    """Classify with a summary layer whose columns are the classes.

    In training mode the forward returns the pair of logits, in evaluation mode the projection's logits.

    Args:
        in_features: Size of each input row, d.
        num_classes: The number of classes, k.
        device: Device of the parameters; None is PyTorch's default device.
        dtype: float64, float32, bfloat16 or float16; None is PyTorch's default dtype.

    Example:
        >>> classifier = SummaryClassifier(4, 3)
        >>> classifier.loss(torch.zeros(2, 4), torch.tensor([0, 2])).round(decimals=4)  # 2 log 3
        tensor(2.1972, grad_fn=...)
        >>> classifier.eval()(torch.ones(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_classes(num_classes)
        super().__init__(in_features, num_classes, device, dtype)

    def forward(self, x: Tensor) -> Any:
        """Compute a `SummaryPair` of logits (..., num_classes) in training mode, one tensor of them in evaluation mode."""
        if (call := call_in_graph(self, x)) is not None:
            return call
        return super().forward(x) if self.training else self.projection(x)

    def fold(self) -> nn.Linear:
        """Return a plain nn.Linear that computes the logits of evaluation mode.

        Example:
            >>> SummaryClassifier(4, 3).fold()
            Linear(in_features=4, out_features=3, bias=False)
        """
        return self._folded_projection()

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        weights: Sequence[float] = EQUAL_WEIGHTS,
        ignore_index: int = -100,
        reduction: str = "mean",
        reconstruction: float = 0.0,
    ) -> Tensor:
        """Compute `functional.summary_cross_entropy` with this layer's b.

        On a GPU the forward pass computes the gradients too, so evaluate it under `torch.no_grad()`. On a CPU PyTorch's
        autograd computes them in the backward pass.

        Args:
            x: Features of shape (..., in_features).
            target: Classes of shape (...), int64.
            weights: Weights of the three terms: cross entropy of the projection, of the summary, and their MSE. They are no
                weights of classes; for those, and for label smoothing, apply your own loss to both outputs of the forward.
            ignore_index: Rows with this target are left out of all terms.
            reduction: "mean" over the rows that are left, "sum", or "none".
            reconstruction: The weight w of a fourth term, w times `functional.reconstruction_loss`, by which the codes come to
                explain the features. The features get no gradient from it.

        Returns:
            A scalar, or (...) for reduction "none"; float32 for 16-bit features, else in x's dtype.

        Raises:
            TypeError: A dtype that is not supported or differs between the arguments.
            ValueError: Shapes, devices or options that do not fit. The message names the argument.
        """
        loss = functional.summary_cross_entropy(
            x, self.b, target, weights=weights, ignore_index=ignore_index, reduction=reduction
        )
        if reconstruction == 0:
            return loss
        return self._with_reconstruction(loss, reconstruction, x, target, ignore_index, reduction)


class SummaryHead(SummaryLayer):
    """Classify as the reference network does: a summary layer, then one output layer for both of its codes.

    The codes are the projection P = x b and the summary Y = P (bᵀb). The attribute `output` is the output layer, an
    nn.Linear. In training mode the forward returns the pair of logits, in evaluation mode the projection's logits.

    Args:
        in_features: Size of each input row, d.
        latent: Size of the codes, k.
        num_classes: The number of classes, m.
        device: Device of the parameters; None is PyTorch's default device.
        dtype: float64, float32, bfloat16 or float16; None is PyTorch's default dtype.

    Example:
        >>> head, x = SummaryHead(8, 4, 3), torch.ones(2, 8)
        >>> first, second = head(x)
        >>> first.shape, head.loss(x, torch.tensor([0, 2])).shape, head.eval()(x).shape
        (torch.Size([2, 3]), torch.Size([]), torch.Size([2, 3]))

    Source: Banh, Interpretable-Neural-Net (MIT).
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
        _check_classes(num_classes)
        self.output = nn.Linear(latent, num_classes, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SummaryHead:
        """Make a head with the outputs of a trained nn.Linear, in both of its readings.

        The singular value decomposition U diag(s) Vᵀ of the weight gives b = V, which is orthonormal, and the weight of `output`,
        U diag(s). The head has min(in_features, out_features) latents: the outputs depend on no more.

        Args:
            linear: The layer; it is not changed. If it has no bias, that of `output` is 0.

        Returns:
            A SummaryHead with parameters of its own, in the layer's dtype and on its device.

        Raises:
            TypeError: `linear` is not an nn.Linear, or its weight is uninitialized.
            ValueError: The weight is empty or not finite.

        Example:
            >>> linear, x = nn.Linear(8, 3), torch.ones(2, 8)
            >>> head = SummaryHead.from_linear(linear).eval()
            >>> head.in_features, head.out_features, torch.allclose(head(x), linear(x), atol=1e-5)
            (8, 3, True)
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: got {type(linear).__name__}, want nn.Linear")
        weight, bias = linear.weight, linear.bias
        if isinstance(weight, nn.UninitializedParameter):
            raise TypeError("linear: got an uninitialized weight (a lazy module), want one that has run once")
        if not weight.numel() or not bool(weight.isfinite().all()):
            raise ValueError(
                f"linear: got a weight of shape {tuple(weight.shape)}, want one that is finite and not empty"
            )
        u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        head = cls(linear.in_features, len(s), linear.out_features, weight.device, weight.dtype)
        with torch.no_grad():
            head.b.copy_(vh.mT).requires_grad_(weight.requires_grad)
            head.output.weight.copy_(u * s).requires_grad_(weight.requires_grad)
            head.output.bias.zero_().requires_grad_((weight if bias is None else bias).requires_grad)
            if bias is not None:
                head.output.bias.copy_(bias)
        return head.train(linear.training)

    def forward(self, x: Tensor) -> Any:
        """Compute a `SummaryPair` of logits (..., num_classes) in training mode, one tensor of them in evaluation mode."""
        if (call := call_in_graph(self, x)) is not None:
            return call
        if not self.training:
            return self.output(self.projection(x))
        return SummaryPair(*map(self.output, super().forward(x)))

    def fold(self) -> nn.Sequential:
        """Return two plain layers that compute the logits of evaluation mode: one with the weight bᵀ, and a copy of `output`.

        Example:
            >>> head, x = SummaryHead(8, 4, 3).eval(), torch.ones(2, 8)
            >>> torch.allclose(head.fold()(x), head(x), atol=1e-6)
            True
        """
        return nn.Sequential(self._folded_projection(), copy.deepcopy(self.output)).train(self.training)

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        weights: Sequence[float] = EQUAL_WEIGHTS,
        consistency: str = "logits",
        ignore_index: int = -100,
        reduction: str = "mean",
        reconstruction: float = 0.0,
    ) -> Tensor:
        """Compute w1 CE(o1, t) + w2 CE(o2, t) + w3 MSE from the features, in fewer passes than forward and `SummaryLoss`.

        On a GPU the forward pass computes the gradients too, so evaluate it under `torch.no_grad()`. On a CPU PyTorch's
        autograd computes them in the backward pass, as it does for consistency "latent" everywhere.

        Args:
            x: Features of shape (..., in_features).
            target: Classes of shape (...), int64.
            weights: The weights (w1, w2, w3) of the three terms. They are no weights of classes; for those, and for label
                smoothing, apply your own loss to both outputs of the forward.
            consistency: "logits" takes the MSE between the two logits, as the reference's code does; "latent" between the two
                codes, as its paper does.
            ignore_index: Rows with this target are left out of all terms.
            reduction: "mean" over the rows that are left, "sum", or "none".
            reconstruction: The weight w of a fourth term, w times `functional.reconstruction_loss`, by which the codes come to
                explain the features. The features get no gradient from it.

        Returns:
            A scalar, or (...) for reduction "none"; float32 for 16-bit features, else in x's dtype.

        Raises:
            TypeError: A dtype that is not supported or differs between the arguments.
            ValueError: Shapes, devices or options that do not fit. The message names the argument.
        """
        if consistency == "logits":
            # Attributes of a module that are parameters or modules take a long search.
            mine, output = self.__dict__["_parameters"], self._modules.get("output")
            known: dict[str, Any] = output._parameters if type(output) is nn.Linear else {}
            weight, bias = known.get("weight"), known.get("bias")
            b = mine.get("b")
            loss = functional.summary_head_cross_entropy(
                x,
                self.b if b is None else b,
                self.output.weight if weight is None else weight,
                self.output.bias if bias is None else bias,
                target,
                weights=weights,
                ignore_index=ignore_index,
                reduction=reduction,
            )
        else:
            criterion = SummaryLoss(weights, consistency, ignore_index, reduction)
            codes = functional.summary_pair(x, self.b)
            loss = criterion(tuple(map(self.output, codes)), target, codes)
        if reconstruction == 0:
            return loss
        return self._with_reconstruction(loss, reconstruction, x, target, ignore_index, reduction)


def _check_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes}, want at least 1")
