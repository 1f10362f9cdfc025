"""Made data whose structure is known: signals that decay in frequency, shift-invariant ones, a tree of items, dipolar traces."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DIPOLAR = 2 * math.pi * 52.04  # rad/µs nm³: the coupling of two free electrons at a distance of 1 nm


class Scrambled(NamedTuple):
    """Signals (n, N) fp64 along n features, and the same ones in another orthonormal basis."""

    mixed: Tensor
    smooth: Tensor


def scrambled(n: int, samples: int, *, decay: float = 1.0, seed: int = 0) -> Scrambled:
    """Draw Gaussian signals whose k-th cosine mode has a standard deviation (1 + k)^-decay, and mix them at random."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.arange(n, dtype=torch.float64)
    cosines = torch.cos(torch.outer(k + 0.5, k) * math.pi / n)
    cosines /= cosines.norm(dim=0)
    drawn = torch.randn(n, samples, generator=generator, dtype=torch.float64)
    smooth = cosines @ ((1 + k).pow(-decay).unsqueeze(1) * drawn)
    return Scrambled(orthogonal(n, generator) @ smooth, smooth)


def orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Draw an orthogonal matrix (n, n) fp64 uniformly: Q of a Gaussian matrix, with the signs of R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def stationary(n: int, samples: int, *, decay: float = 1.0, seed: int = 0) -> Tensor:
    """Draw periodic signals (samples, n) fp64, stationary and Gaussian: wavenumber k has an amplitude ~ (1 + k)^-decay."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.fft.rfft(torch.randn(samples, n, generator=generator, dtype=torch.float64))
    return torch.fft.irfft(drawn * (1 + torch.arange(n // 2 + 1, dtype=torch.float64)).pow(-decay), n)


def all_shifts(signals: Tensor) -> Tensor:
    """Return every signal (N, n) in each of its n circular shifts: (N n, n). Their Gram matrix is circulant exactly."""
    n = signals.shape[1]
    index = (torch.arange(n).unsqueeze(1) + torch.arange(n)) % n
    return signals[:, index].flatten(0, 1)


def tree(depth: int) -> Tensor:
    """Return items (columns) by properties (rows), in {0, 1}, fp64, of a balanced binary tree with 2^depth leaves.

    The items are the leaves. Each node is a property of the items below it; the rows are the levels in turn.

    The right singular vectors are Haar wavelets: all items, then one half against the other, and so on, with equal singular
    values at a level (Saxe, McClelland & Ganguli, PNAS 116, 2019).
    """
    items = torch.eye(2**depth, dtype=torch.float64)
    return torch.cat([items.view(2**level, -1, 2**depth).sum(1) for level in range(depth + 1)])


def dipolar_kernel(t: Tensor, r: Tensor) -> Tensor:
    """Compute K(t, r) (times, distances) fp64, the powder average of a dipolar modulation, for t in µs and r in nm.

    K = ∫₀¹ cos((1 - 3 x²) ω t) dx with ω = DIPOLAR / r³, by Fresnel integrals: sqrt(π / 6 ω t) (cos(ω t) C(z) + sin(ω t) S(z)),
    z = sqrt(6 ω t / π); 1 at t = 0.
    """
    from scipy.special import fresnel

    phase = torch.outer(t.double().abs(), DIPOLAR / r.double().pow(3))
    z = (6 * phase / math.pi).sqrt()
    sine, cosine = (torch.from_numpy(part) for part in fresnel(z.numpy()))
    kernel = (phase.cos() * cosine + phase.sin() * sine) / z
    return torch.where(z > 0, kernel, torch.ones_like(kernel))


class Dipolar(NamedTuple):
    """Traces (N, times), distributions (N, distances) with a maximum of 1, times in µs and distances in nm, all fp32."""

    traces: Tensor
    distributions: Tensor
    times: Tensor
    distances: Tensor


def dipolar(
    samples: int,
    *,
    points: int = 256,
    longest: float = 2.0,
    distances: tuple[float, float] = (1.5, 6.0),
    background: bool = True,
    noise: float = 0.02,
    seed: int = 0,
) -> Dipolar:
    """Draw traces V(t) = ((1 - λ) + λ ∫ P(r) K(t, r) dr) exp(-κ t) + noise of double electron-electron resonance.

    P is a sum of one to three Gaussians at random distances, 0.05 to 0.4 nm wide; the modulation depth λ is uniform in
    (0.2, 0.6); the background's rate κ is uniform in (0, 0.5) per µs, or 0 without `background`; `noise` is a standard
    deviation. Traces last `longest` µs. The formula is the one that Worswick et al. (Science Advances 4 eaat5218, 2018) train
    on; these ranges are simpler than theirs.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    times = torch.linspace(0, longest, points, dtype=torch.float64)
    r = torch.linspace(*distances, points, dtype=torch.float64)
    span = distances[1] - distances[0]
    centres = uniform(distances[0] + 0.1 * span, distances[1] - 0.1 * span, samples, 3, 1)
    widths, heights = uniform(0.05, 0.4, samples, 3, 1), uniform(0.2, 1.0, samples, 3, 1)
    present = torch.arange(3).view(1, 3, 1) < torch.randint(1, 4, (samples, 1, 1), generator=generator)
    p = torch.zeros(samples, points, dtype=torch.float64)
    for peak in range(3):  # one by one: memory of one (samples, points)
        p += (present * heights)[:, peak] * torch.exp(-0.5 * ((r - centres[:, peak]) / widths[:, peak]).square())
    modulation = (p / p.sum(1, keepdim=True)) @ dipolar_kernel(times, r).T
    depth = uniform(0.2, 0.6, samples, 1)
    decay = torch.exp(-uniform(0.0, 0.5, samples, 1) * times) if background else 1.0
    traces = (1 - depth + depth * modulation) * decay
    traces += noise * torch.randn(samples, points, generator=generator, dtype=torch.float64)
    return Dipolar(traces.float(), (p / p.amax(1, keepdim=True)).float(), times.float(), r.float())
