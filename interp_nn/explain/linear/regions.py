"""Regions: where in the input space an activation pattern holds, which is an intersection of half-spaces."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from interp_nn.explain.following.replay import replayed


class Boundary(NamedTuple):
    """The nearest side of a region: its distance, its unit, and the point on it, for each x: (...), (...), (..., d)."""

    distance: Tensor
    unit: Tensor
    point: Tensor


class Ball(NamedTuple):
    """A ball: its centre (d,) and its radius."""

    centre: Tensor
    radius: float


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

    def chebyshev(self, box: tuple[Tensor | float, Tensor | float] | None = None) -> Ball:
        """The largest ball in the region, by a linear program; needs scipy.

        box: the lowest and highest input, a number or (d,) each, within which the ball is to lie: many regions have no end.
        Raises ValueError where balls of any size fit, and where none does.
        """
        try:
            from scipy.optimize import linprog  # type: ignore[import-untyped, unused-ignore]
        except ImportError as error:
            raise ImportError("the largest ball of a region needs scipy: pip install interp_nn[explain]") from error
        sides = self.to_halfspaces().detach().double().cpu()
        if box is not None:
            unit = torch.eye(sides.shape[1] - 1, dtype=torch.float64)
            low, high = (torch.as_tensor(end, dtype=torch.float64).expand(len(unit)).unsqueeze(1) for end in box)
            sides = torch.cat([sides, torch.cat([-unit, low], 1), torch.cat([unit, -high], 1)])
        # N x + c + r |N| <= 0, with sides of length 1 but for those that no input reaches.
        lengths = sides[:, :-1].norm(dim=1, keepdim=True)
        sides = sides / torch.where(lengths > 0, lengths, 1)
        constraints = torch.cat([sides[:, :-1], (lengths > 0).double()], 1)
        objective = [0.0] * (sides.shape[1] - 1) + [-1.0]
        free = [(None, None)] * (sides.shape[1] - 1) + [(0, None)]
        found = linprog(objective, constraints.numpy(), -sides[:, -1].numpy(), bounds=free)
        if found.status == 3:
            raise ValueError(
                f"box: got {box}, but balls of any size fit in the region; want its lowest and highest input"
            )
        if not found.success:
            raise ValueError(f"box: got {box}, but no ball fits in the region within it: {found.message}")
        return Ball(torch.from_numpy(found.x[:-1]).to(self.normals), float(found.x[-1]))

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
    `GateRecord.patterns`, less what is infinite there. They hold u x d numbers. Raises ValueError for more than one sample or a
    model without gates, and what `record` raises.
    """
    if x.shape[:1] != (1,):
        raise ValueError(f"x: got shape {tuple(x.shape)}, want one sample (1, ...)")
    replay = replayed(model, x)
    if not replay.sites:
        raise ValueError("model: has no gates, want one with ReLU or the like")

    def preactivations(v: Tensor) -> Tensor:
        return torch.cat([z.reshape(-1) for z in replay.all_preactivations((v.view(x.shape),))])

    flat = x.detach().reshape(-1)
    with torch.no_grad():
        normals = torch.func.jacrev(preactivations)(flat)
        offsets, on = preactivations(torch.zeros_like(flat)), preactivations(flat) > 0
        real = offsets.isfinite()  # a max-pooling's windows have no candidates beyond the border
        return Region(normals[real], offsets[real], on[real])
