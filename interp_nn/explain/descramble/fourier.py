"""The waves that a weight matrix is made of, once its features are in an order that means something."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from interp_nn import linalg


class FourierView(NamedTuple):
    """amplitudes: (n, d), of each pair of waves along the rows and the columns, constants in the middle; their squares sum to
    |W|². row_waves (n,), column_waves (d,): how many turns each makes over the whole length, in ascending order.
    """

    amplitudes: Tensor
    row_waves: Tensor
    column_waves: Tensor


def fft_view(W: Tensor) -> FourierView:
    """The two-dimensional Fourier amplitudes of a matrix (n, d), as Amey et al. (2021) look at descrambled weights.

    A row of P W that is a filter of one frequency is one pair of bright points. Raises TypeError for complex or integer W,
    ValueError for another shape.
    """
    linalg.check_real("W", W)
    if W.dim() != 2 or not W.numel():
        raise ValueError(f"W: got shape {tuple(W.shape)}, want a matrix with at least one entry")
    spectrum = torch.fft.fftshift(torch.fft.fft2(W.detach().double(), norm="ortho"))
    rows, columns = (torch.fft.fftshift(torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)) for size in W.shape)
    return FourierView(spectrum.abs(), rows.round(), columns.round())
