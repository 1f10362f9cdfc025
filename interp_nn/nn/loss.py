"""SummaryLoss: the reference network's three-term loss of given logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from interp_nn.functional import loss_weights, reconstruction_loss, reconstruction_weight, three_term_loss


class SummaryLoss(nn.Module):
    """Compute w1 CE(o1, t) + w2 CE(o2, t) + w3 MSE of a pair of logits, and optionally a reconstruction's term.

    A row's MSE is its mean over the last dimension. `SummaryHead.loss` computes the same from the features, in fewer passes.

    Args:
        weights: The weights (w1, w2, w3) of the three terms, not of classes.
        consistency: "logits" takes the MSE between the two logits, as the reference's code does. "latent" takes it between
            the two codes, as its paper does, and then the call needs them.
        ignore_index: Rows with this target are left out of all three terms.
        reduction: "mean" over the rows that are left (NaN without any, as in PyTorch), "sum", or "none": one loss a row.
        reconstruction: The weight w of a fourth term, w times `functional.reconstruction_loss` of the features, which get no
            gradient from it. If it is not 0, the call needs the features and b.

    Raises:
        TypeError: `weights` are not three numbers, or `reconstruction` is not one.
        ValueError: An option is something else.

    Example:
        >>> import torch
        >>> logits, target = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
        >>> SummaryLoss()((logits, logits), target).round(decimals=4)  # 2 log 3
        tensor(2.1972)
    """

    def __init__(
        self,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        consistency: str = "logits",
        ignore_index: int = -100,
        reduction: str = "mean",
        reconstruction: float = 0.0,
    ) -> None:
        super().__init__()
        if consistency not in ("logits", "latent"):
            raise ValueError(f"consistency: got {consistency!r}, want 'logits' or 'latent'")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: got {reduction!r}, want 'mean', 'sum' or 'none'")
        self.weights, self.reconstruction = loss_weights(weights), reconstruction_weight(reconstruction)
        self.consistency, self.ignore_index, self.reduction = consistency, ignore_index, reduction

    def forward(
        self,
        logits: Sequence[Tensor],
        target: Tensor,
        latents: Sequence[Tensor] | None = None,
        *,
        features: Tensor | None = None,
        b: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            logits: The pair (o1, o2), each (..., classes).
            target: Classes of shape (...), int64.
            latents: The pair (projection, summary), each (..., k), for consistency "latent".
            features: The layer's input (..., d), for a reconstruction.
            b: The layer's b (d, k), for a reconstruction.

        Returns:
            A scalar, or (...) for reduction "none"; float32 for 16-bit logits, else in their dtype.

        Raises:
            TypeError: `logits` is one tensor.
            ValueError: `latents` is None for consistency "latent"; `features` or `b` is None for a reconstruction.
        """
        if isinstance(logits, Tensor):
            raise TypeError(
                "logits: got a tensor, want the pair of a summary head in training mode; in evaluation mode it gives the "
                "projection's logits alone: use torch.nn.functional.cross_entropy"
            )
        if self.consistency == "latent" and latents is None:
            raise ValueError("latents: got None, want the pair (projection, summary) for consistency='latent'")
        codes = latents if self.consistency == "latent" and latents is not None else ()
        loss = three_term_loss(logits, target, self.weights, self.ignore_index, self.reduction, codes)
        if not self.reconstruction:
            return loss
        if features is None or b is None:
            raise ValueError("features, b: got None, want the layer's input and its b for a reconstruction")
        return loss + self.reconstruction * reconstruction_loss(
            features.detach(), b, target=target, ignore_index=self.ignore_index, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Return the options for repr."""
        extra = f", reconstruction={self.reconstruction}" if self.reconstruction else ""
        return f"weights={self.weights}, consistency={self.consistency!r}, reduction={self.reduction!r}{extra}"
