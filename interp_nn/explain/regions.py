"""Regions: where in the input space an activation pattern holds, which is an intersection of half-spaces."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from interp_nn.explain.gates import replay_of


class Boundary(NamedTuple):
    """The nearest side of a region: its distance, its unit, and the point on it, for each x: (...), (...), (..., d)."""

    distance: Tensor
    unit: Tensor
    point: Tensor


class Region:
    """The inputs x (d,) for which each of u units is on or off as it is here.

    normals (u, d) and offsets (u,) are the units' preactivations A x + a as affine functions of the input, with the gates of
    earlier layers as they are in the region; on (u,) bool: on means A x + a > 0, off A x + a <= 0.
    """

    def __init__(self, normals: Tensor, offsets: Tensor, on: Tensor) -> None:
        """Raises ValueError for shapes that do not belong together, TypeError for `on` that is not bool."""
        if normals.dim() != 2 or offsets.shape != normals.shape[:1] or on.shape != normals.shape[:1]:
            shapes = [tuple(t.shape) for t in (normals, offsets, on)]
            raise ValueError(f"normals, offsets, on: got shapes {shapes}, want (u, d), (u,) and (u,)")
        if on.dtype != torch.bool:
            raise TypeError(f"on: got {on.dtype}, want torch.bool")
        self.normals, self.offsets, self.on = normals, offsets, on

    def contains(self, x: Tensor) -> Tensor:
        """Whether each x (..., d) is in the region: (...) bool."""
        return ((self._preactivations(x) > 0) == self.on).all(-1)

    def margins(self, x: Tensor) -> Tensor:
        """The distance of each x (..., d) to the boundary of each unit, (..., u): negative on its other side.

        Infinite for a unit whose preactivation does not depend on the input.
        """
        signed = torch.where(self.on, 1.0, -1.0) * self._preactivations(x)
        lengths = self.normals.norm(dim=1)
        return torch.where(lengths > 0, signed / lengths, signed.new_full((), torch.inf))

    def radius(self, x: Tensor) -> Tensor:
        """How far each x (..., d) of the region can move in every direction before a unit flips: (...)."""
        return self.margins(x).amin(-1)

    def nearest_boundary(self, x: Tensor) -> Boundary:
        """The nearest point of each x (..., d) at which a unit flips, seen from within the region."""
        distance, unit = self.margins(x).min(-1)
        normal = self.normals[unit]
        step = self._preactivations(x).gather(-1, unit.unsqueeze(-1)) / normal.square().sum(-1, keepdim=True)
        return Boundary(distance, unit, x - step * normal)

    def to_halfspaces(self) -> Tensor:
        """The region as rows [N, c] with N x + c <= 0, (u, d + 1): the convention of scipy.spatial.HalfspaceIntersection."""
        sign = torch.where(self.on, -1.0, 1.0).to(self.normals.dtype).unsqueeze(1)
        return sign * torch.cat([self.normals, self.offsets.unsqueeze(1)], 1)

    def __repr__(self) -> str:
        units, d = self.normals.shape
        return f"Region({units} units, {int(self.on.sum())} of them on, {d} inputs)"

    def _preactivations(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != self.normals.shape[1:]:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want (..., {self.normals.shape[1]})")
        return x @ self.normals.T + self.offsets


def region(model: nn.Module, x: Tensor) -> Region:
    """The region of one sample x (1, ...): where every gate of the model is as it is at x. Its points are flattened inputs.

    All units' preactivations as affine functions of the input, with the gates of earlier layers frozen, in the order of
    `GateRecord.patterns`. They hold u x d numbers. Raises ValueError for more than one sample, and what `record` raises.
    """
    if x.shape[:1] != (1,):
        raise ValueError(f"x: got shape {tuple(x.shape)}, want one sample (1, ...)")
    replay = replay_of(model, x)

    def preactivations(v: Tensor) -> Tensor:
        return torch.cat([z.reshape(-1) for z in replay.preactivations((v.view(x.shape),)).values()])

    flat = x.detach().reshape(-1)
    with torch.no_grad():
        normals = torch.func.jacrev(preactivations)(flat)
        return Region(normals, preactivations(torch.zeros_like(flat)), preactivations(flat) > 0)
