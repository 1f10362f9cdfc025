"""Rotations of codes that keep a head's outputs: to the codes' variance, to the classes, and to varimax."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_ITERATIONS, _CHANGE = 1000, 1e-12


def to_variance(codes: Tensor, decoder: Tensor) -> Tensor:
    """Return the rotation (k, k) to the principal components of codes (n, k), largest variance first."""
    return _signed(_components(codes), codes, decoder)


def to_classes(codes: Tensor, decoder: Tensor) -> Tensor:
    """Return the rotation to the right singular vectors of A (m, k), largest singular value first.

    The columns of A are then orthogonal to one another. Those beyond its rank are zero, and their codes are rotated to their
    variance.
    """
    return _signed(torch.cat(_row_space(codes, decoder), 1), codes, decoder)


def to_varimax(codes: Tensor, decoder: Tensor) -> Tensor:
    """Return the rotation by which A has the largest variance of squares in its columns: few classes for each latent.

    Latents outside the row space of A are rotated to their variance, and are last.

    Source: Kaiser, Psychometrika 23 (1958), by the iteration of singular value decompositions.
    """
    inside, outside = _row_space(codes, decoder)
    rotated = inside @ _varimax(decoder.double() @ inside)
    sizes = torch.linalg.vector_norm(decoder.double() @ rotated, dim=0)
    return _signed(torch.cat((rotated[:, sizes.argsort(descending=True)], outside), 1), codes, decoder)


def _varimax(loadings: Tensor) -> Tensor:
    r = loadings.shape[1]
    rotation, value = torch.eye(r, dtype=loadings.dtype), loadings.new_zeros(())
    for _ in range(_MOST_ITERATIONS if r > 1 else 0):
        turned = loadings @ rotation
        gradient = loadings.mT @ (turned.pow(3) - turned * turned.square().mean(0))
        u, s, vh = torch.linalg.svd(gradient)
        rotation = u @ vh
        if s.sum() <= value * (1 + _CHANGE):
            break
        value = s.sum()
    return rotation


def _row_space(codes: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases (k, r) and (k, k - r) of A's row space, by singular value, and of the rest, by variance."""
    _, values, vh = torch.linalg.svd(decoder.double(), full_matrices=True)
    tolerance = values[:1].sum() * max(decoder.shape) * torch.finfo(decoder.dtype).eps
    rank = int((values > tolerance).sum())
    rest = vh[rank:].mT
    return vh[:rank].mT, rest @ _components(codes.double() @ rest)


def _components(codes: Tensor) -> Tensor:
    centred = codes.double() - codes.double().mean(0)
    return torch.linalg.eigh(centred.mT @ centred).eigenvectors.flip(1)


def _signed(rotation: Tensor, codes: Tensor, decoder: Tensor) -> Tensor:
    """Return the rotation with signs by which each latent's largest weight, or without one its largest code, is positive."""
    for matrix in (codes, decoder):
        values = matrix.double() @ rotation
        largest = values.gather(0, values.abs().argmax(0, keepdim=True))[0]
        weak = largest.abs() <= 1e-9 * values.abs().max()
        rotation = rotation * torch.where(weak | (largest > 0), 1.0, -1.0)
    return rotation
