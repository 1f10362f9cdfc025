"""A linear model on the same inputs, with which a network is compared."""

from __future__ import annotations

import torch
from torch import Tensor

_FOLDS, _LEAST, _MOST = 5, 30, 3_000  # folds; samples; the smaller of the numbers of samples and inputs


def linear_predictions(x: Tensor, target: Tensor) -> Tensor | None:
    """Predict each sample by a ridge regression that was fitted to the other folds; the penalty is 1 on standardized inputs.

    Args:
        x: Inputs (n, ...).
        target: What to predict, (n, m).

    Returns:
        Tensor (n, m) in float64; None for fewer than 30 samples, or where both n and the number of inputs are above 3,000.
    """
    x, target = x.flatten(1).double(), target.double()
    n, d = x.shape
    if n < _LEAST or min(n, d) > _MOST:
        return None
    fold = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) % _FOLDS).to(x.device)
    predicted = torch.empty_like(target)
    for held_out in (fold == k for k in range(_FOLDS)):
        mean, size = x[~held_out].mean(0), x[~held_out].std(0)
        z = (x - mean) / torch.where(size > 1e-12 * x.abs().max(), size, torch.inf)  # a constant input says nothing
        fitted, centre = z[~held_out], target[~held_out].mean(0)
        if d <= len(fitted):
            weight = torch.linalg.solve(
                fitted.mT @ fitted + torch.eye(d).to(z), fitted.mT @ (target[~held_out] - centre)
            )
        else:
            gram = fitted @ fitted.mT + torch.eye(len(fitted)).to(z)
            weight = fitted.mT @ torch.linalg.solve(gram, target[~held_out] - centre)
        predicted[held_out] = z[held_out] @ weight + centre
    return predicted
