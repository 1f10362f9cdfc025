"""The reference network's three-term loss on given logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interp_nn.functional import loss_weights
from interp_nn.linalg import accumulation_dtype


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
        work = accumulation_dtype(logits[0].dtype)
        logits = [o.to(work) for o in logits]
        first, second = logits if self.consistency == "logits" or latents is None else (p.to(work) for p in latents)
        w1, w2, w3 = self.weights
        classes = target.flatten()
        entropies = [
            F.cross_entropy(
                o.reshape(classes.shape[0], o.shape[-1]), classes, reduction="none", ignore_index=self.ignore_index
            )
            for o in logits
        ]
        kept = classes != self.ignore_index
        squares = F.mse_loss(first, second, reduction="none").mean(-1).flatten()
        rows = w1 * entropies[0] + w2 * entropies[1] + w3 * torch.where(kept, squares, 0.0)
        if self.reduction == "none":
            return rows.view(target.shape)
        return rows.sum() / kept.sum() if self.reduction == "mean" else rows.sum()

    def extra_repr(self) -> str:
        return f"weights={self.weights}, consistency={self.consistency!r}, reduction={self.reduction!r}"
