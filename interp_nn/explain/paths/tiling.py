"""A kernel matrix from its tiles, so that what a tile needs is all that is held beside the matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

_Side = TypeVar("_Side")


def tiled(
    shape: tuple[int, int],
    chunk: int,
    left: Callable[[slice], _Side],
    right: Callable[[slice], _Side] | None,
    tile: Callable[[_Side, _Side], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    want: tuple[str, str] = ("normalize=True, or dtype=torch.float64", "dtype=torch.float64"),
) -> Tensor:
    """The matrix of this shape with tile(left(rows), right(columns)) at rows and columns, at most `chunk` of each.

    right: None where it is `left` again and the matrix symmetric, of which the upper half is then computed.
    Raises ValueError for a chunk below 1, and for entries beyond what the dtype holds. want: what would do where they are too
    large, or no numbers, and where they are too small.
    """
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, want at least 1")
    kernel = torch.empty(shape, dtype=dtype, device=device)
    largest = 0.0
    for top in range(0, shape[0], chunk):
        rows = slice(top, top + chunk)
        a = left(rows)
        for start in range(0 if right else top, shape[1], chunk):
            columns = slice(start, start + chunk)
            diagonal = right is None and start == top
            block = tile(a, a if diagonal else (right or left)(columns))
            entry = largest_entry(block)
            if not entry <= torch.finfo(dtype).max:
                raise ValueError(f"kernel: its largest entry is {entry:.3g}, more than {dtype} holds; want {want[0]}")
            largest = max(largest, entry)
            if diagonal:  # a product of a matrix and itself may round its two halves differently
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
    """max |m|, 0 of an empty one; NaN where there is one."""
    if not matrix.numel():
        return 0.0
    low, high = matrix.aminmax()
    return float(torch.maximum(-low, high))
