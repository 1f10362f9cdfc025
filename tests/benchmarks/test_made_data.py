"""Made data have the structure that they are made to have, and the descent that is compared with the closed form descends."""

import pytest
import torch
from torch.nn import functional

from benchmarks.experiments import oblique_trees, signals, tabular
from benchmarks.experiments.descent import descend
from interp_nn.explain.descramble.brockett import brockett_min
from interp_nn.explain.descramble.derivatives import derivative_operator


def test_a_tree_has_haar_wavelets_for_modes():
    tree = signals.tree(3)
    assert tree.shape == (15, 8) and tree.sum(1).tolist() == [8, 4, 4, *[2] * 4, *[1] * 8]
    halves = torch.tensor([1.0] * 4 + [-1.0] * 4).double()
    torch.testing.assert_close(tree.mT @ (tree @ halves), 7 * halves)


def test_the_dipolar_kernel_is_the_powder_average():
    t, r = torch.tensor([-0.3, 0.0, 0.01, 0.5, 2.0]).double(), torch.tensor([1.5, 2.5, 6.0]).double()
    x = (torch.arange(40_000).double() + 0.5) / 40_000
    phase = (1 - 3 * x.square()) * signals.DIPOLAR * t.view(-1, 1, 1) / r.view(-1, 1).pow(3)
    torch.testing.assert_close(signals.dipolar_kernel(t, r), phase.cos().mean(2), rtol=0, atol=1e-6)


def test_a_seeded_network_is_trained():
    table, state = tabular.two_regimes(500, seed=3, dtype=torch.float32), torch.get_rng_state()
    assert table.y[:50].tolist() == [2 * x2 if x1 > 0 else -x3 for x1, x2, x3 in table.x[:50].tolist()]
    first, again = (tabular.mlp(3, 16, 1, seed=5, dtype=torch.float32) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    untrained = functional.mse_loss(first(table.x).squeeze(1), table.y)
    losses = [tabular.train(network, table, steps=100, learning_rate=2e-2) for network in (first, again)]
    assert losses[0] == losses[1] < untrained / 4


def test_labels_are_those_of_a_walk_through_the_tree():
    data = oblique_trees.load("SDI", points=400)
    assert data.x_train.shape == (200, 20) and data.x_test.shape == (100, 20) and data.normals.shape == (15, 20)
    for x, y in zip(data.x_train.double(), data.y_train, strict=True):
        node = 0
        for _ in range(oblique_trees.DEPTH):
            right = bool(x @ data.normals[node] > 0)
            node = 2 * node + 1 + right
        assert y == 1 - right
    assert not torch.equal(data.normals, oblique_trees.load("SDI", points=8, seed=1).normals)


# The descent


def pair(n, operator="diff1", seed=0):
    """A = DᵀD and B = HHᵀ of scrambled signals."""
    d, h = derivative_operator(n, operator).matrix(), signals.scrambled(n, 4 * n, seed=seed).mixed
    return d.mT @ d, h @ h.mT


@pytest.mark.parametrize(("n", "operator"), [(2, "diff1"), (7, "diff1"), (7, "fourier2")])
def test_descents_solve_small_problems(n, operator):
    A, B = pair(n, operator)
    found, best = descend(A, B), brockett_min(A, B)
    assert (
        found.converged and found.loss == pytest.approx(best.value, rel=1e-6) and found.loss >= best.value * (1 - 1e-10)
    )
