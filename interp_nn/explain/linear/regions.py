"""Regions: the inputs that share an activation pattern, an intersection of half-spaces."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from interp_nn.display import brief, html_table
from interp_nn.explain.following.replay import replay_at
from interp_nn.explain.following.scikit_learn import from_estimator
from interp_nn.explain.linear.affine_map import AffineMap
from interp_nn.explain.linear.operators import JacobianOperator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DECIDED = (0, 2, 3)  # of linprog's status: found, no point, not bounded


class Boundary(NamedTuple):
    """The nearest boundary of a region for each x (..., d).

    Attributes:
        distance: Euclidean distance to it, (...).
        unit: Index of the unit that flips there, (...) int64, among all units of the region. `Region.locate` names its layer.
        point: The nearest point on it, of x's shape.

    Example:
        >>> half_line = Region(torch.tensor([[2.0]]), torch.tensor([-2.0]), torch.tensor([True]))  # 2 x - 2 > 0
        >>> half_line.nearest_boundary(torch.tensor([4.0]))
        Boundary(distance=tensor(3.), unit=tensor(0), point=tensor([1.]))
    """

    distance: Tensor
    unit: Tensor
    point: Tensor

    def __repr__(self) -> str:
        return brief("Boundary", self._asdict())


class Ball(NamedTuple):
    """A ball in the input space.

    Attributes:
        centre: Its centre (d,).
        radius: Its Euclidean radius.

    Example:
        >>> half_line = Region(torch.tensor([[2.0]]), torch.tensor([-2.0]), torch.tensor([True]))  # 2 x - 2 > 0
        >>> half_line.chebyshev(box=(0.0, 5.0))
        Ball(centre=tensor([3.]), radius=2.0)
    """

    centre: Tensor
    radius: float

    def __repr__(self) -> str:
        return brief("Ball", self._asdict())


class Region:
    """The inputs x (d,) at which each of u units has a given state, on or off.

    A unit is on where its preactivation A x + a is positive. The gates of earlier layers are frozen in A and a. Methods also
    take points (..., *input) that are not flattened, for example an image, with d entries each.

    Args:
        normals: A (u, d).
        offsets: a (u,).
        on: The states (u,) bool.

    Attributes:
        normals: As given.
        offsets: As given.
        on: As given.

    Raises:
        ValueError: Shapes that do not fit.
        TypeError: `on` is not bool, or there is no tensor.

    Example:
        >>> half_line = Region(torch.tensor([[2.0]]), torch.tensor([-2.0]), torch.tensor([True]))  # 2 x - 2 > 0
        >>> half_line.contains(torch.tensor([[4.0], [0.0]])), half_line.radius(torch.tensor([4.0]))
        (tensor([ True, False]), tensor(3.))
    """

    def __init__(self, normals: Tensor, offsets: Tensor, on: Tensor) -> None:
        for name, value in (("normals", normals), ("offsets", offsets), ("on", on)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {type(value).__name__}, want a torch.Tensor")
        if normals.dim() != 2 or offsets.shape != normals.shape[:1] or on.shape != normals.shape[:1]:
            shapes = [tuple(t.shape) for t in (normals, offsets, on)]
            raise ValueError(f"normals, offsets, on: got shapes {shapes}, want (u, d), (u,) and (u,)")
        if on.dtype != torch.bool:
            raise TypeError(f"on: got {on.dtype}, want torch.bool")
        self.normals, self.offsets, self.on = normals, offsets, on
        self._layers: tuple[tuple[str, Tensor], ...] = ()  # each with the indices of its units that the region has

    def contains(self, x: Tensor) -> Tensor:
        """Return (...) bool: True for each x (..., d) in the region."""
        return ((self._preactivations(x) > 0) == self.on).all(-1)

    def margins(self, x: Tensor) -> Tensor:
        """Compute the Euclidean distance (..., u) of each x (..., d) to the boundary of each unit.

        It is negative on the other side of the boundary, and infinite for a unit that does not depend on the input.
        """
        signed = torch.where(self.on, 1.0, -1.0) * self._preactivations(x)
        lengths = self.normals.norm(dim=1)
        return torch.where(lengths > 0, signed / lengths, signed.new_full((), torch.inf))

    def radius(self, x: Tensor) -> Tensor:
        """Compute the distance (...) that each x (..., d) can move in any direction before a unit flips."""
        return self.margins(x).amin(-1)

    def nearest_boundary(self, x: Tensor) -> Boundary:
        """Find the nearest boundary of each x (..., d) in the region."""
        distance, unit = self.margins(x).min(-1)
        normal = self.normals[unit]
        step = self._preactivations(x).gather(-1, unit.unsqueeze(-1)) / normal.square().sum(-1, keepdim=True)
        return Boundary(distance, unit, x - (step * normal).reshape(x.shape))

    def locate(self, unit: int) -> tuple[str, int]:
        """Find the layer of a unit of the region.

        Args:
            unit: Index of the unit in the region, as `nearest_boundary` returns it.

        Returns:
            The name of the layer's gates, one of `GateRecord.sites`, and the unit's index among these, flattened.

        Raises:
            ValueError: A region that `region` did not return, or an index out of range.

        Example:
            >>> network = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
            >>> region(network, torch.ones(1, 1)).locate(4)
            ('3', 1)
        """
        if not self._layers:
            raise ValueError("unit: got a region without its model, want one as `region` returned it")
        left = unit
        for name, units in self._layers:
            if 0 <= left < len(units):
                return name, int(units[left])
            left -= len(units)
        raise ValueError(f"unit: got {unit}, want an index of one of {len(self.on)} units")

    def to_halfspaces(self) -> Tensor:
        """Return rows [N, c], (u, d + 1), with N x + c <= 0 in the region, as scipy.spatial.HalfspaceIntersection takes them."""
        sign = torch.where(self.on, -1.0, 1.0).to(self.normals.dtype).unsqueeze(1)
        return sign * torch.cat([self.normals, self.offsets.unsqueeze(1)], 1)

    def chebyshev(self, box: tuple[Tensor | float, Tensor | float] | None = None) -> Ball:
        """Find the largest ball in the region by a linear program; needs scipy.

        Args:
            box: Lowest and highest input, a number or a tensor (d,) each, between which the ball lies. Regions without a
                largest ball need it.

        Returns:
            The ball.

        Raises:
            ValueError: Balls of any size fit in the region, or none does.
            ImportError: scipy is not installed.
            RuntimeError: scipy's solver failed.
        """
        sides = self.to_halfspaces().detach().double().cpu()
        if box is not None:
            unit = torch.eye(sides.shape[1] - 1, dtype=torch.float64)
            low, high = (torch.as_tensor(end, dtype=torch.float64).expand(len(unit)).unsqueeze(1) for end in box)
            sides = torch.cat([sides, torch.cat([-unit, low], 1), torch.cat([unit, -high], 1)])
        # N x + c + r |N| <= 0, with rows N of length 1, or 0 for units that do not depend on the input.
        lengths = sides[:, :-1].norm(dim=1, keepdim=True)
        sides = sides / torch.where(lengths > 0, lengths, 1)
        constraints = torch.cat([sides[:, :-1], (lengths > 0).double()], 1)
        objective = [0.0] * (sides.shape[1] - 1) + [-1.0]
        free = [(None, None)] * (sides.shape[1] - 1) + [(0, None)]
        what = f"the largest ball of a region of {len(self.on)} units, in {self.normals.dtype}"
        found = linear_program(what, objective, constraints.numpy(), -sides[:, -1].numpy(), bounds=free)
        if found.status == 3:
            raise ValueError(
                f"box: got {box}, but balls of any size fit in the region; want a lowest and a highest input"
            )
        if not found.success:
            raise ValueError(f"box: got {box}, but no ball fits in the region within it: {found.message}")
        return Ball(torch.from_numpy(found.x[:-1]).to(self.normals), float(found.x[-1]))

    def plot(self, **options: Any) -> Axes:
        """Draw where the region meets a plane, by `plots.region_polygon`, and return the axes.

        Args:
            options: Of `plots.region_polygon`, such as `plane`, `extent` and `points`.
        """
        from interp_nn.explain.plots.clusters import region_polygon

        return region_polygon(self, **options)

    def bounded(self) -> bool:
        """Return True if the region is bounded, by a linear program; needs scipy.

        Raises:
            ImportError: scipy is not installed.
            RuntimeError: scipy's solver failed.
        """
        sides = self.to_halfspaces().detach().double().cpu()[:, :-1]
        sides = torch.nn.functional.normalize(sides[sides.any(1)])
        d = sides.shape[1]
        if int(torch.linalg.matrix_rank(sides)) < d:
            return False
        # Stiemke: N y <= 0 has no solution with N y != 0 if and only if Nᵀ z = 0 for some z > 0.
        what = f"the bounds of a region of {len(self.on)} units, in {self.normals.dtype}"
        found = linear_program(what, [0.0] * len(sides), A_eq=sides.T.numpy(), b_eq=[0.0] * d, bounds=(1, None))
        return bool(found.success)

    def __repr__(self) -> str:
        units, d = self.normals.shape
        return f"Region({units} units, {int(self.on.sum())} of them on, {d} inputs)"

    def _repr_html_(self) -> str:
        units, d = self.normals.shape
        return html_table(["units", "on", "inputs"], [[str(units), str(int(self.on.sum())), str(d)]], above=["Region"])

    def _preactivations(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, want a torch.Tensor")
        d = self.normals.shape[1]
        dims = next((i for i in reversed(range(x.dim())) if x.shape[i:].numel() == d), None)
        if dims is None:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want (..., {d})")
        return x.reshape(*x.shape[:dims], d) @ self.normals.T + self.offsets


def region(model: nn.Module, x: Tensor) -> Region:
    """Compute the region of one sample: the inputs at which every gate of the model is as it is at x.

    The points of the region are flattened inputs. Its units are in the order of `GateRecord.patterns`. Units whose
    preactivation is infinite at 0 are left out. For a model that is not exact (see `OperationReport.exact`) a warning names
    the operations: the region's boundaries are then not all of the map's, or only approximate.

    Args:
        model: The network, in evaluation mode, or scikit-learn's, see `from_sklearn`.
        x: One sample (1, ...).

    Returns:
        The region. It holds u x d numbers for u units.

    Raises:
        ValueError: More than one sample, a model without gates, or as `record` raises it.
        UnsupportedOperation: An operation without an affine map.
        TypeError: As `record` raises it.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
        >>> _ = nn.init.constant_(network[0].weight, 2.0), nn.init.constant_(network[0].bias, -2.0)
        >>> region(network, torch.tensor([[4.0]])).margins(torch.tensor([4.0]))
        tensor([3.])
    """
    model, x = from_estimator(model, x)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, want a torch.Tensor (1, ...)")
    if x.shape[:1] != (1,):
        raise ValueError(f"x: got shape {tuple(x.shape)}, want one sample (1, ...)")
    replay = replay_at(model, x)
    if not replay.sites:
        raise ValueError("model: has no gates, want a model with ReLU or a similar activation")
    if replay.inexact:
        found = ", ".join(f"{name} in layer {layer!r}" for name, layer in replay.inexact)
        text = "is a secant, or its pieces are not gates; the region does not show where it changes"
        warnings.warn(f"model: {found} {text}", stacklevel=2)

    def preactivations(*v: Tensor) -> Tensor:
        return torch.cat([z.reshape(1, -1) for z in replay.all_preactivations(v)], 1)

    here = x.detach()
    with torch.no_grad():
        layers = [z.flatten() for z in replay.all_preactivations((here,))]
        on = torch.cat(layers) > 0
        maps = AffineMap(JacobianOperator(preactivations, (here,), on[None].to(x), affine=True, check=lambda: None))
        normals, offsets = maps.weight[0].flatten(1), maps.bias[0]
        real = offsets.isfinite()  # a window of max-pooling has no candidates beyond the border
        made = Region(normals[real], offsets[real], on[real])
        units = [kept.nonzero()[:, 0] for kept in real.split([len(layer) for layer in layers])]
        made._layers = tuple(zip(replay.sites, units, strict=True))
        return made


def linear_program(what: str, *arguments: Any, **options: Any) -> Any:
    """Solve by scipy.optimize.linprog; the result's status is 0 (found), 2 (there is no point) or 3 (not bounded).

    Raises an ImportError with the command that installs scipy, or a RuntimeError that says which program its solver failed at.
    """
    try:
        from scipy.optimize import linprog  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError(f"{what} needs scipy: pip install scipy") from error
    found = linprog(*arguments, **options)
    if found.status not in _DECIDED:  # rounding can defeat the simplex method where interior points decide
        found = linprog(*arguments, method="highs-ipm", **options)
    if found.status not in _DECIDED:
        raise RuntimeError(
            f"{what}: scipy's solver failed with {found.message!r}; want a model and a sample in torch.float64, fewer units, or "
            "`nearest_boundary`, which needs no solver"
        )
    return found
