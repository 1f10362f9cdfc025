"""Made data of Banerjee et al. (ICLR 2025): points on a sphere, labelled by an oblique decision tree that is known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DEPTH = 4
SIZES = {"SDI": (20, 40_000), "SDII": (100, 60_000), "SDIII": (500, 100_000)}
SEED = 365  # of the published data


class Oblique(NamedTuple):
    """Points (n, d) with labels 0 or 1 (n,), fp32, for training and testing, and the tree's unit normals (15, d) fp64."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    normals: Tensor


def load(name: str, *, points: int | None = None, seed: int = SEED) -> Oblique:
    """Draw SDI, SDII or SDIII: half for training, the last quarter for testing (the third is for validation, and not used).

    points: how many in all, for less than the published number. seed: of tree and points; 365 draws the published ones.
    Raises ValueError for another name or fewer than 4 points.
    """
    if name not in SIZES:
        raise ValueError(f"name: got {name!r}, want one of {', '.join(SIZES)}")
    dim, published = SIZES[name]
    n = published if points is None else points
    if n < 4:
        raise ValueError(f"points: got {n}, want at least 4")
    random = np.random.RandomState(seed)
    normals = torch.from_numpy(_on_sphere(random, 2**DEPTH - 1, dim))
    x = torch.from_numpy(_on_sphere(random, n, dim))
    y = labels(x, normals)
    x, y = x.float(), y.float()
    return Oblique(name, x[: n // 2], y[: n // 2], x[n - n // 4 :], y[n - n // 4 :], normals)


def labels(x: Tensor, normals: Tensor) -> Tensor:
    """Return the label of each point (n,) int64 from a complete tree of unit normals (2^depth - 1, d), level by level.

    A node sends the points with u·x > 0 to its second child; a leaf that is a first child has label 1, a second child 0.
    """
    right = (x @ normals.T > 0).long()
    node = x.new_zeros(len(x), dtype=torch.int64)
    while bool((node < len(normals)).any()):
        node = 2 * node + 1 + right.gather(1, node.unsqueeze(1)).squeeze(1)
    return node % 2


def _on_sphere(random: np.random.RandomState, n: int, dim: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    points = random.standard_normal((n, dim))
    return points / np.linalg.norm(points, axis=1, keepdims=True)
