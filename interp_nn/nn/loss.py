"""The reference network's three-term loss on given logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from interp_nn.functional import loss_weights, three_term_loss


class SummaryLoss(nn.Module):
    """w1 CE(o1, t) + w2 CE(o2, t) + w3 MSE for a pair of logits (..., classes) and targets (...).

    consistency="logits" takes the MSE between the two logits, as the reference's code does; "latent" takes it between
    the two codes, as its paper does, and then the call needs them. A row's MSE is its mean over the last dimension. Rows
    whose target is `ignore_index` are left out of all three terms; "mean" divides by the kept rows, "sum" adds them,
    "none" returns one loss a row. The loss is fp32 for 16-bit inputs. A head's own `loss` computes the same from the
    features, in fewer passes.
    """

    def __init__(
        self,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        consistency: str = "logits",
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if consistency not in ("logits", "latent"):
            raise ValueError(f"consistency: got {consistency!r}, want 'logits' or 'latent'")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: got {reduction!r}, want 'mean', 'sum' or 'none'")
        self.weights = loss_weights(weights)
        self.consistency, self.ignore_index, self.reduction = consistency, ignore_index, reduction

    def forward(self, logits: Sequence[Tensor], target: Tensor, latents: Sequence[Tensor] | None = None) -> Tensor:
        """logits: the pair (o1, o2); latents: the pair (projection, summary), for consistency="latent" only."""
        if self.consistency == "latent" and latents is None:
            raise ValueError("latents: got None, want the pair (projection, summary) for consistency='latent'")
        codes = latents if self.consistency == "latent" and latents is not None else ()
        return three_term_loss(logits, target, self.weights, self.ignore_index, self.reduction, codes)

    def extra_repr(self) -> str:
        return f"weights={self.weights}, consistency={self.consistency!r}, reduction={self.reduction!r}"
