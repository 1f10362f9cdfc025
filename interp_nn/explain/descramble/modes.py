"""Orthonormal bases of smooth modes: Fourier, cosine, sine and beam modes, their products on a grid, and any matrix.

A basis is T (n, n), with a mode in each column and the smooth ones first. `analyse` computes Tᵀ H and `synthesise` T C, for
columns (n, N). The Fourier, cosine and sine bases use FFTs, in O(n log n) a column, where that is faster than a product with T.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, reduce
from math import pi, prod, sqrt

import torch
from torch import Tensor

_BISECTIONS = 60


class Modes(ABC):
    """An orthonormal basis T of R^n."""

    def __init__(self, n: int) -> None:
        self.n = n

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return T (n, n) in float64, with a mode in each column."""

    def analyse(self, h: Tensor) -> Tensor:
        """Compute Tᵀ H (n, N), in the dtype and on the device of H."""
        return self._matrix.mT.to(h) @ h

    def synthesise(self, c: Tensor) -> Tensor:
        """Compute T C (n, N), in the dtype and on the device of C."""
        return self._matrix.to(c) @ c

    @cached_property
    def _matrix(self) -> Tensor:
        return self.matrix()


class DenseModes(Modes):
    """The columns of an orthogonal matrix."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix))
        self._given = matrix

    def matrix(self) -> Tensor:
        """Return a copy of the matrix."""
        return self._given.clone()


class WaveModes(Modes):
    """Trigonometric modes, whose products can be computed by FFTs.

    waves: the wave number of each mode, (n,) float64. radians: the step of its angle from place to place, (n,) float64. fft_from:
    the n from which FFTs are faster, measured on two cores of a CPU.
    """

    fft_from = 256
    waves: Tensor
    radians: Tensor

    def analyse(self, h: Tensor) -> Tensor:
        """Compute Tᵀ H (n, N), by FFT from `fft_from` places on."""
        return self._analyse(h.to(_fft_type(h))).to(h.dtype) if self._by_fft(h) else super().analyse(h)

    def synthesise(self, c: Tensor) -> Tensor:
        """Compute T C (n, N), by FFT from `fft_from` places on."""
        return self._synthesise(c.to(_fft_type(c))).to(c.dtype) if self._by_fft(c) else super().synthesise(c)

    def _by_fft(self, h: Tensor) -> bool:
        return self.n >= self.fft_from and h.shape[1] > 0  # some FFT libraries raise for an empty batch

    @abstractmethod
    def _analyse(self, h: Tensor) -> Tensor: ...

    @abstractmethod
    def _synthesise(self, c: Tensor) -> Tensor: ...


class FourierModes(WaveModes):
    """A ring: 1, cos q, sin q, cos 2q, sin 2q, ... at q = 2 pi j / n, with (-1)^j as the last mode for even n."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.waves = (torch.arange(n) + 1).div(2, rounding_mode="floor").double()
        self.radians = 2 * pi / n * self.waves

    def matrix(self) -> Tensor:
        """Return T, from angles that are reduced while they are exact."""
        place = torch.arange(self.n)
        angle = _angles(torch.outer(place, (place + 1).div(2, rounding_mode="floor")), self.n)
        sine = (place % 2 == 0) & (place > 0)
        return self._norms(angle).squeeze(1) * torch.where(sine, angle.sin(), angle.cos())

    def _analyse(self, h: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(h, dim=0)
        pairs = torch.stack((spectrum.real, -spectrum.imag), 1).flatten(0, 1)  # cosine and sine of the waves 0, 1, ...
        return self._norms(h) * torch.cat((pairs[:1], pairs[2 : self.n + 1]))

    def _synthesise(self, c: Tensor) -> Tensor:
        c = c * self._norms(c)
        none = torch.zeros_like(c[:1])
        pairs = torch.cat((c[:1], none, c[1:], none)[: 4 if self.n % 2 == 0 else 3]).unflatten(0, (-1, 2))
        # The real FFT counts each wave twice, except for the constant and, for even n, the last one.
        weight = pairs.new_full((len(pairs), 1), self.n / 2)
        weight[0] = self.n
        if self.n % 2 == 0:
            weight[-1] = self.n
        return torch.fft.irfft(weight * torch.complex(pairs[:, 0], -pairs[:, 1]), self.n, dim=0)

    def _norms(self, like: Tensor) -> Tensor:
        norms = like.new_full((self.n, 1), sqrt(2 / self.n))
        norms[0] = sqrt(1 / self.n)
        if self.n % 2 == 0:
            norms[-1] = sqrt(1 / self.n)
        return norms


class CosineModes(WaveModes):
    """A line with free ends: cos(pi k (j + 1/2) / n) for k = 0 ... n - 1, the DCT-II."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.waves = torch.arange(n, dtype=torch.float64)
        self.radians = pi / n * self.waves

    def matrix(self) -> Tensor:
        """Return T, from angles that are reduced while they are exact."""
        angle = _angles(torch.outer(2 * torch.arange(self.n) + 1, torch.arange(self.n)), 4 * self.n)
        return self._norms(angle).squeeze(1) * angle.cos()

    # One real FFT of n values, with the even places first and then the odd ones in reverse (Makhoul 1980).

    def _analyse(self, h: Tensor) -> Tensor:
        turned = torch.fft.rfft(torch.cat((h[::2], h[1::2].flip(0))), dim=0) * self._turns(h)
        last = (self.n + 1) // 2
        return self._norms(h) * torch.cat((turned.real, -turned.imag[1:last].flip(0)))

    def _synthesise(self, c: Tensor) -> Tensor:
        c = c / self._norms(c)
        half = self.n // 2 + 1
        mirrored = torch.cat((torch.zeros_like(c[:1]), c.flip(0)))[:half]
        h = torch.fft.irfft(torch.complex(c[:half], -mirrored) * self._turns(c).conj(), self.n, dim=0)
        out = torch.empty_like(c)
        out[::2], out[1::2] = h[: (self.n + 1) // 2], h[(self.n + 1) // 2 :].flip(0)
        return out

    def _turns(self, like: Tensor) -> Tensor:
        angle = torch.arange(self.n // 2 + 1, dtype=like.dtype, device=like.device) * (-pi / (2 * self.n))
        return torch.polar(torch.ones_like(angle), angle).unsqueeze(1)

    def _norms(self, like: Tensor) -> Tensor:
        norms = like.new_full((self.n, 1), sqrt(2 / self.n))
        norms[0] = sqrt(1 / self.n)
        return norms


class SineModes(WaveModes):
    """A line with zeros beyond its ends: sin(pi k j / (n + 1)) for j and k = 1 ... n, the DST-I, which is its own inverse."""

    fft_from = 512

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.waves = torch.arange(1, n + 1, dtype=torch.float64)
        self.radians = pi / (n + 1) * self.waves

    def matrix(self) -> Tensor:
        """Return T, from angles that are reduced while they are exact."""
        k = torch.arange(self.n) + 1
        return sqrt(2 / (self.n + 1)) * _angles(torch.outer(k, k), 2 * self.n + 2).sin()

    def _analyse(self, h: Tensor) -> Tensor:
        none = torch.zeros_like(h[:1])
        odd = torch.fft.rfft(torch.cat((none, h, none, -h.flip(0))), dim=0)
        return -odd.imag[1 : self.n + 1] / sqrt(2 * (self.n + 1))

    def _synthesise(self, c: Tensor) -> Tensor:
        return self._analyse(c)


class BeamModes(Modes):
    """The modes of second differences on a line with free ends: 1, x, and the modes of a discrete beam with free ends.

    With x measured from the middle, a beam mode is A cos(theta x) + B cosh(phi x), or the sines of both, with
    sin(theta / 2) = sinh(phi / 2). Its second difference must be zero at two more places beyond each end. This leaves one theta
    in each interval (p pi, (p + 1) pi) / (n - 1), p = 1 ... n - 2, which bisection finds.
    """

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self._span = max(1, n - 1)
        self._p = torch.arange(1, max(2, n - 1))[: max(0, n - 2)]
        self._even = self._p % 2 == 1  # about the middle
        self._excess = self._bisect()

    @property
    def radians(self) -> Tensor:
        """The angle theta of every mode, (n,) float64; 0 for the modes 1 and x."""
        return torch.cat((torch.zeros(self.n - len(self._p), dtype=torch.float64), self._theta(self._excess)))

    def matrix(self) -> Tensor:
        """Return T, from normalised modes."""
        x = torch.arange(1 - self.n, self.n, 2).unsqueeze(1)  # twice the place, measured from the middle
        rigid = torch.cat((torch.ones_like(x), x), 1)[:, : self.n]
        modes = torch.cat((rigid.double(), self._flexed(x)), 1)
        return modes / torch.linalg.vector_norm(modes, dim=0)

    def _flexed(self, x: Tensor) -> Tensor:
        end, theta = torch.tensor(self.n - 1), self._theta(self._excess)
        phi, sign = 2 * (theta / 2).sin().asinh(), torch.where(self._even, 1.0, -1.0).to(theta)
        # cosh(phi x) / cosh(phi end), or sinh for both, written with exponentials that cannot overflow.
        near, far = (phi / 2 * (x - end)).exp(), (-phi / 2 * (x + end)).exp()
        hyperbolic = (near + sign * far) / (1 + sign * (-phi * end).exp())
        return self._wave(x, self._excess) / self._wave(end, self._excess) + hyperbolic

    def _bisect(self) -> Tensor:
        low = torch.zeros(len(self._p), dtype=torch.float64)
        high, end = torch.full_like(low, pi), torch.tensor(self.n - 1)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            s = (self._theta(middle) / 2).sin()
            tanh = (s.asinh() * end).tanh()
            rise = 2 * s + torch.where(self._even, tanh, 1 / tanh) * (1 + s * s).sqrt()
            own, other = self._wave(end, middle), self._wave(end, middle, quadrature=True)
            below = own * (rise * own + (1 - s * s).sqrt() * other) < 0
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _theta(self, excess: Tensor) -> Tensor:
        return (pi * self._p.double() + excess) / self._span

    def _wave(self, x: Tensor, excess: Tensor, quadrature: bool = False) -> Tensor:
        """Return cos(theta x / 2) for even modes and sin for odd ones; with quadrature, sin and -cos. x: whole numbers."""
        angle = _angles(self._p * x, 4 * self._span) + excess * x / (2 * self._span)
        if quadrature:
            return torch.where(self._even, angle.sin(), -angle.cos())
        return torch.where(self._even, angle.cos(), angle.sin())


class GridModes(Modes):
    """Products of the modes of each axis of a grid, sorted by `order`. The places are in row-major order."""

    def __init__(self, axes: Sequence[Modes], order: Tensor) -> None:
        super().__init__(prod(axis.n for axis in axes))
        self._axes, self._order = tuple(axes), order

    def matrix(self) -> Tensor:
        """Return T, the sorted Kronecker product of the axes' bases."""
        return reduce(torch.kron, (axis.matrix() for axis in self._axes))[:, self._order]

    def analyse(self, h: Tensor) -> Tensor:
        """Compute Tᵀ H (n, N), one axis after another."""
        return self._along(h, [axis.analyse for axis in self._axes])[self._order.to(h.device)]

    def synthesise(self, c: Tensor) -> Tensor:
        """Compute T C (n, N), one axis after another."""
        unsorted = torch.empty_like(c)
        unsorted[self._order.to(c.device)] = c
        return self._along(unsorted, [axis.synthesise for axis in self._axes])

    def _along(self, h: Tensor, maps: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        grid = h.unflatten(0, [axis.n for axis in self._axes])
        for i, change in enumerate(maps):
            moved = grid.movedim(i, 0)
            grid = change(moved.flatten(1)).view(moved.shape).movedim(0, i)
        return grid.reshape(h.shape)


def _angles(steps: Tensor, turn: int) -> Tensor:
    """Return the angles (float64) of whole numbers of steps, with `turn` steps in a full turn. Full turns are removed exactly."""
    return (2 * pi / turn) * (steps % turn).double()


def _fft_type(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
