"""The leading singular triplets of an operator by products with it: Rayleigh-Ritz on a block Krylov space.

Source: Musco & Musco, Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value Decomposition,
NeurIPS 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor

from interp_nn.explain.linear.operators import AffineOperator

_BLOCKS = 32


def leading_triplets(operator: AffineOperator, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the k largest singular values of each W by products with W and Wᵀ, of k vectors at a time.

    Args:
        operator: An operator with one input.
        k: Number of singular values, at most min(rows, columns).

    Returns:
        Left vectors (n, rows, k), values (n, k) in descending order, and right vectors (n, k, columns), as torch.linalg.svd
        returns them.

    Raises:
        RuntimeError: The residuals are above the square root of eps after 32 blocks of k vectors.
    """
    push, pull = operator.products()
    n, (shape,) = operator.n, operator.inputs
    rows, columns = operator.output.numel(), shape.numel()

    def times(v: Tensor) -> Tensor:
        """Return W v (n, rows, r) for v (n, columns, r)."""
        return push((v.movedim(2, 0).reshape(-1, n, *shape),)).reshape(-1, n, rows).movedim(0, 2)

    def transposed_times(u: Tensor) -> Tensor:
        return pull(u.movedim(2, 0).reshape(-1, n, *operator.output))[0].reshape(-1, n, columns).movedim(0, 2)

    start = torch.randn(n, columns, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block, tolerance = times(start.to(operator.sources[0])), torch.finfo(operator.result.dtype).eps ** 0.5
    left, pulled, moved = (operator.result.new_zeros(n, size, 0) for size in (rows, columns, rows))
    for _ in range(_BLOCKS):
        block = block[..., : min(rows, columns) - left.shape[2]]
        for _ in range(2):  # once leaves rounding along the earlier vectors
            block = torch.linalg.qr(block - left @ (left.mT @ block))[0]
        here = transposed_times(block)
        block, left, pulled = times(here), torch.cat([left, block], 2), torch.cat([pulled, here], 2)
        moved = torch.cat([moved, block], 2)  # W Wᵀ left
        q, r = torch.linalg.qr(pulled)  # Wᵀ left = q r
        right, values, ritz = torch.linalg.svd(r)
        ritz, values = ritz.mT[..., :k], values[:, :k]
        residuals = (moved @ ritz - values.square().unsqueeze(1) * (left @ ritz)).norm(dim=1)
        error = float((residuals.amax(1) / values[:, 0].square().clamp_min(torch.finfo(values.dtype).tiny)).max())
        if error <= tolerance or left.shape[2] == min(rows, columns):
            return left @ ritz, values, (q @ right[..., :k]).mT
    raise RuntimeError(
        f"svd: the residuals of {k} singular values are {error:.1e} after {_BLOCKS} products of {k} vectors, want at most "
        f"{tolerance:.1e}; want another k, or form_weight=True"
    )
