"""A Triton kernel as a rival, on a GPU, in inference: it has no backward.

python -m benchmarks run --suite ops --mode infer --dtype bf16 --provider examples/triton_provider.py:triton-product
"""

import torch
import triton
import triton.language as tl

from benchmarks import provider


@triton.jit
def _product(X, W, Y, n, d, k, sw0, sw1, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr):
    row, column = tl.program_id(0) * BN + tl.arange(0, BN)[:, None], tl.program_id(1) * BK + tl.arange(0, BK)[None, :]
    y = tl.zeros((BN, BK), tl.float32)
    for first in range(0, d, BD):
        at = first + tl.arange(0, BD)
        x = tl.load(X + row * d + at[None, :], mask=(row < n) & (at[None, :] < d), other=0.0)
        w = tl.load(W + at[:, None] * sw0 + column * sw1, mask=(at[:, None] < d) & (column < k), other=0.0)
        y = tl.dot(x, w, y, input_precision="ieee")
    tl.store(Y + row * k + column, y.to(Y.dtype.element_ty), mask=(row < n) & (column < k))


@provider("triton-product", about="one Triton product of X with b (bᵀ b), which PyTorch forms")
def triton_product(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return y (n, k) of x (n, d), contiguous, and b (d, k) of any strides."""
    (n, d), k = x.shape, b.shape[1]
    w, y = b @ (b.mT @ b), x.new_empty(n, k)
    _product[triton.cdiv(n, 64), triton.cdiv(k, 64)](x, w, y, n, d, k, *w.stride(), BN=64, BD=32, BK=64)
    return y
