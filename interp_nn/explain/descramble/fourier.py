"""The two-dimensional Fourier amplitudes of a weight matrix whose features are in a meaningful order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from interp_nn import linalg


class FourierView(NamedTuple):
    """The Fourier amplitudes of a matrix, the result of `fft_view`.

    Attributes:
        amplitudes: Amplitude of each pair of waves along the rows and the columns, (n, d) float64, with constants in the middle.
            The sum of their squares is |W|².
        row_waves: Periods of each wave over the height of the matrix, (n,) float64, ascending.
        column_waves: Periods of each wave over the width of the matrix, (d,) float64, ascending.

    Example:
        >>> fft_view(torch.ones(3, 4)).column_waves
        tensor([-2., -1.,  0.,  1.], dtype=torch.float64)
    """

    amplitudes: Tensor
    row_waves: Tensor
    column_waves: Tensor


def fft_view(W: Tensor) -> FourierView:
    """Compute the two-dimensional Fourier amplitudes of a matrix.

    Applied to descrambled weights P W, a row that filters a single frequency appears as one pair of bright points.

    Args:
        W: Matrix of shape (n, d) with at least one entry, real floating-point.

    Returns:
        `FourierView` of the amplitudes and their frequencies.

    Raises:
        TypeError: A complex or integer matrix.
        ValueError: Another shape.

    Example:
        >>> fft_view(torch.ones(2, 2)).amplitudes  # a constant alone
        tensor([[0., 0.],
                [0., 2.]], dtype=torch.float64)

    Source: Amey, Keeley, Choudhury & Kuprov (2021), PNAS 118(5) e2016917118.
    """
    linalg.check_real("W", W)
    if W.dim() != 2 or not W.numel():
        raise ValueError(f"W: got shape {tuple(W.shape)}, want a matrix with at least one entry")
    spectrum = torch.fft.fftshift(torch.fft.fft2(W.detach().double(), norm="ortho"))
    rows, columns = (torch.fft.fftshift(torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)) for size in W.shape)
    return FourierView(spectrum.abs(), rows.round(), columns.round())
