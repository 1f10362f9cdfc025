"""A kernel matrix that is computed in tiles, so that only one tile's working memory is needed beside the matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from interp_nn.display import track

_Side = TypeVar("_Side")


def tiled(
    shape: tuple[int, int],
    chunk_size: int,
    left: Callable[[slice], _Side],
    right: Callable[[slice], _Side] | None,
    tile: Callable[[_Side, _Side], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    want: tuple[str, str] = ("normalize=True, or dtype=torch.float64", "dtype=torch.float64"),
    progress: bool | None = False,
) -> Tensor:
    """Compute a matrix whose tile at some rows and columns is tile(left(rows), right(columns)).

    Args:
        shape: Shape of the matrix.
        chunk_size: The largest number of rows and of columns of a tile.
        left: Returns the operand of a slice of rows.
        right: Returns the operand of a slice of columns. None for a symmetric matrix, whose columns have the operands of its
            rows; only its upper half is then computed.
        tile: Returns a tile from two operands.
        dtype: Dtype of the matrix.
        device: Device of the matrix.
        want: Two remedies for error messages: for entries that are too large or NaN, and for entries that are too small.
        progress: Show a progress bar, as `track` takes it.

    Returns:
        Tensor of this shape.

    Raises:
        ValueError: A chunk_size below 1, or entries beyond the range of the dtype.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, want at least 1")
    kernel = torch.empty(shape, dtype=dtype, device=device)
    largest = 0.0
    for top in track(range(0, shape[0], chunk_size), "kernel", progress, "row of tiles"):
        rows = slice(top, top + chunk_size)
        a = left(rows)
        for start in range(0 if right else top, shape[1], chunk_size):
            columns = slice(start, start + chunk_size)
            diagonal = right is None and start == top
            block = tile(a, a if diagonal else (right or left)(columns))
            entry = largest_entry(block)
            if not entry <= torch.finfo(dtype).max:
                raise ValueError(f"kernel: its largest entry is {entry:.3g}, more than {dtype} holds; want {want[0]}")
            largest = max(largest, entry)
            if diagonal:  # the product of a matrix with its transpose may round its two halves differently
                block = block.triu() + block.triu(1).T
            kernel[rows, columns] = block
            if right is None and not diagonal:
                kernel[columns, rows] = block.T
    if 0 < largest < torch.finfo(dtype).tiny / torch.finfo(dtype).eps:
        raise ValueError(
            f"kernel: its largest entry is {largest:.3g}, too small for {dtype} to tell its entries apart; "
            f"want {want[1]}"
        )
    return kernel


def largest_entry(matrix: Tensor) -> float:
    """Return max |m|: 0 for an empty matrix, NaN if an entry is NaN."""
    if not matrix.numel():
        return 0.0
    low, high = matrix.aminmax()
    return float(torch.maximum(-low, high))
