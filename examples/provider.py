"""A rival of ten lines: python -m benchmarks run --quick --provider examples/provider.py:right-to-left."""

import torch

from benchmarks import provider


@provider("right-to-left", about="X (b (bᵀ b)): the weight first, then one product with the rows")
def right_to_left(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return y (n, k) of x (n, d) and b (d, k)."""
    return x @ (b @ (b.mT @ b))


@provider("one-stack", about="both logits in one cross entropy of 2 n rows")
def one_stack(x: torch.Tensor, b: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return CE(P) + CE(Y) + MSE(P, Y), a scalar."""
    p = x @ b
    y = p @ (b.mT @ b)
    both = torch.nn.functional.cross_entropy(torch.cat((p, y)), target.repeat(2))
    return 2 * both + torch.nn.functional.mse_loss(p, y)
