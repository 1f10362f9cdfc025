"""Grids as large as an H200's: the sums over programs and splits go round their loops more often than on a small GPU."""

import pytest
from cases import Case, Problem
from test_emulated_backward import RUNS
from test_emulated_losses import Loss

H200 = (132, 227 * 1024, 90)
CASE = Case("BF16", 132 * 256, 16, 10)  # rows for 132 splits of one tile of features

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("run", "check"), RUNS.values(), ids=RUNS)
def test_backward(emulated, run, check):
    problem = Problem(CASE)
    check(problem, *run(emulated, problem, H200))


@pytest.mark.parametrize("classes", [None, 10])
def test_loss(emulated, classes):
    loss = Loss(CASE, classes, "mean")
    loss.check(loss.run(emulated, H200))
