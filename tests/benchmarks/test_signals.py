"""Made data have the structure that they are made to have."""

import math

import pytest
import torch

from benchmarks.experiments import signals


def test_scrambled_signals_are_smooth_ones_in_another_basis():
    made = signals.scrambled(32, 2000, seed=1)
    torch.testing.assert_close(made.mixed.mT @ made.mixed, made.smooth.mT @ made.smooth, rtol=0, atol=1e-10)
    rough = [h.diff(dim=0).square().sum() / h.square().sum() for h in (made.smooth, made.mixed)]
    assert rough[0] < 0.2 * rough[1]
    values = torch.linalg.svdvals(made.smooth) / math.sqrt(2000)
    torch.testing.assert_close(values, 1 / torch.arange(1.0, 33).double(), rtol=0.15, atol=0)


def test_random_orthogonal_matrices_are_of_either_determinant():
    generator = torch.Generator().manual_seed(0)
    signs = {round(float(torch.linalg.det(signals.orthogonal(3, generator)))) for _ in range(20)}
    assert signs == {-1, 1}
    assert signals.orthogonal(1, generator).abs().item() == 1


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_all_shifts_have_a_circulant_gram_matrix(n):
    shifted = signals.all_shifts(signals.stationary(n, 3, seed=2))
    assert shifted.shape == (3 * n, n)
    gram = shifted.mT @ shifted
    torch.testing.assert_close(gram, gram.roll((1, 1), (0, 1)), rtol=0, atol=1e-12)


def test_stationary_signals_have_the_spectrum_asked_for():
    power = torch.fft.rfft(signals.stationary(16, 40_000, decay=0.5, seed=0)).abs().square().mean(0)
    torch.testing.assert_close(power / 16, 1 / torch.arange(1.0, 10).double(), rtol=0.03, atol=0)


def test_a_tree_has_haar_wavelets_for_modes():
    tree = signals.tree(3)
    assert tree.shape == (15, 8) and tree.sum(1).tolist() == [8, 4, 4, *[2] * 4, *[1] * 8]
    assert tree.sum(0).tolist() == [4] * 8 and tree[2].tolist() == [0] * 4 + [1] * 4
    squares = torch.linalg.svdvals(tree).square()
    torch.testing.assert_close(squares, torch.tensor([15, 7, 3, 3, 1, 1, 1, 1.0]).double())
    halves = torch.tensor([1.0] * 4 + [-1.0] * 4).double()
    torch.testing.assert_close(tree.mT @ (tree @ halves), 7 * halves)


def test_the_dipolar_kernel_is_the_powder_average():
    t = torch.tensor([-0.3, 0.0, 0.01, 0.5, 2.0]).double()
    r = torch.tensor([1.5, 2.5, 6.0]).double()
    x = (torch.arange(40_000).double() + 0.5) / 40_000
    phase = (1 - 3 * x.square()) * signals.DIPOLAR * t.view(-1, 1, 1) / r.view(-1, 1).pow(3)
    torch.testing.assert_close(signals.dipolar_kernel(t, r), phase.cos().mean(2), rtol=0, atol=1e-6)
    assert signals.dipolar_kernel(t[1:2], r).tolist() == [[1, 1, 1]]


def test_dipolar_traces_follow_from_their_distributions():
    made = signals.dipolar(5, points=64, noise=0.0, background=False, seed=4)
    assert made.traces.shape == made.distributions.shape == (5, 64)
    torch.testing.assert_close(made.distributions.amax(1), torch.ones(5))
    p = made.distributions.double()
    modulation = (p / p.sum(1, keepdim=True)) @ signals.dipolar_kernel(made.times, made.distances).mT
    # V = 1 - λ + λ M: where two times are compared, λ is what is left.
    depth = (1 - made.traces[:, 30].double()) / (1 - modulation[:, 30])
    assert ((depth > 0.2) & (depth < 0.6)).all()
    expected = 1 - depth.unsqueeze(1) * (1 - modulation)
    torch.testing.assert_close(made.traces.double(), expected, rtol=0, atol=1e-5)


def test_noise_and_background_are_as_asked():
    quiet, noisy, decaying = (
        signals.dipolar(400, points=32, noise=noise, background=background, seed=1).traces
        for noise, background in ((0.0, False), (0.1, False), (0.0, True))
    )
    assert (noisy - quiet).std().item() == pytest.approx(0.1, rel=0.05)
    ratio = (decaying / quiet)[:, -1]  # exp(-2 κ), κ in (0, 0.5)
    assert ratio.min() > math.exp(-1) and ratio.max() <= 1 and ratio.std() > 0.1
