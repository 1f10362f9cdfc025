"""The baseline descends, stays orthogonal, and never passes the closed form."""

import pytest
import torch

from benchmarks.experiments import cayley_descent, signals
from benchmarks.experiments.cayley_descent import descend
from interp_nn.explain.descramble.brockett import brockett_min
from interp_nn.explain.descramble.derivatives import derivative_operator


def pair(n, operator="diff1", seed=0):
    """A = DᵀD and B = HHᵀ of scrambled signals."""
    d, h = derivative_operator(n, operator).matrix(), signals.scrambled(n, 4 * n, seed=seed).mixed
    return d.mT @ d, h @ h.mT


@pytest.mark.parametrize("operator", ["diff1", "fourier2"])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_small_problems_are_solved(n, operator):
    A, B = pair(n, operator)
    found, best = descend(A, B), brockett_min(A, B)
    assert found.converged
    assert found.loss == pytest.approx(best.value, rel=1e-6)
    assert found.loss >= best.value * (1 - 1e-10)


def test_the_gradient_is_that_of_the_objective():
    """The loss falls from the first iteration on, at the rate that automatic differentiation gives."""
    torch.manual_seed(0)
    seen, minimise = [], cayley_descent.minimize

    def spy(evaluate, start, **rest):
        seen.append(evaluate)
        return minimise(evaluate, start, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cayley_descent, "minimize", spy)
        a, c = pair(6)
        cayley_descent._one_chart(a, c, 1, lambda intermediate_result: None)
    values = torch.randn(15, dtype=torch.float64, requires_grad=True)
    q = torch.zeros(6, 6, dtype=torch.float64)
    q[torch.triu_indices(6, 6, 1).unbind()] = values
    q, eye = q - q.mT, torch.eye(6, dtype=torch.float64)
    s = torch.linalg.solve(eye + q, eye - q)
    loss = (a @ s @ c * s).sum()
    (expected,) = torch.autograd.grad(loss, values)
    found, gradient = seen[0](values.detach().numpy())
    assert found == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.from_numpy(gradient), expected, rtol=1e-10, atol=1e-10)


def test_no_start_passes_the_closed_form():
    A, B = pair(12, seed=3)
    best = brockett_min(A, B).value
    generator = torch.Generator().manual_seed(0)
    losses = []
    for start in [None, *(signals.orthogonal(12, generator) for _ in range(19))]:
        found = descend(A, B, start, iterations=150)
        assert (found.P @ found.P.mT - torch.eye(12)).abs().max() <= 1e-12
        assert found.loss == pytest.approx(float(torch.trace(A @ found.P @ B @ found.P.mT)), rel=1e-10)
        losses.append(found.loss)
    assert best <= min(losses) + 1e-10 * best
    assert max(losses) <= 1.05 * best  # and they do descend


def test_limits_end_a_descent_and_say_so():
    A, B = pair(24)
    few = descend(A, B, iterations=5)
    assert len(few.history) == 6 and not few.converged and few.evaluations >= 5
    assert [seconds for seconds, _ in few.history] == sorted(seconds for seconds, _ in few.history)
    losses = [loss for _, loss in few.history]
    assert losses == sorted(losses, reverse=True) and losses[-1] == pytest.approx(few.loss, rel=1e-10)
    none = descend(A, B, seconds=0.0)
    assert len(none.history) == 1 and not none.converged and torch.equal(none.P, torch.eye(24, dtype=torch.float64))
    assert none.loss == pytest.approx(float((A * B).sum()), rel=1e-12)
