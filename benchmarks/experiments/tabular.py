"""Small tables with a known answer: two made regimes, and survival on the Titanic, from its 32 published counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

# Dawson (1995), "The 'unusual episode' data revisited", Journal of Statistics Education 3(3): people on board by outcome,
# sex and age, in the order of _CLASSES.
_CLASSES = ("1st", "2nd", "3rd", "crew")
_DIED = {
    ("male", "child"): (0, 0, 35, 0), ("female", "child"): (0, 0, 17, 0), ("male", "adult"): (118, 154, 387, 670),
    ("female", "adult"): (4, 13, 89, 3),
}  # fmt: skip
_SURVIVED = {
    ("male", "child"): (5, 11, 13, 0), ("female", "child"): (1, 13, 14, 0), ("male", "adult"): (57, 14, 75, 192),
    ("female", "adult"): (140, 80, 76, 20),
}  # fmt: skip


class Table(NamedTuple):
    """Rows x (n, d) with the response y (n,), of one dtype, and the names of the d features."""

    x: Tensor
    y: Tensor
    features: tuple[str, ...]


def two_regimes(n: int = 5000, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Table:
    """Draw y = 2 x2 where x1 > 0 and -x3 elsewhere, without noise; x uniform in [-1, 1]³."""
    x = 2 * torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    y = torch.where(x[:, 0] > 0, 2 * x[:, 1], -x[:, 2])
    return Table(x.to(dtype), y.to(dtype), ("x1", "x2", "x3"))


def titanic(dtype: torch.dtype = torch.float64) -> Table:
    """Return the 2,201 people on board: four columns for the class, one for female, one for child; y is 1 for the 711 survivors.

    Only 14 of the rows are distinct: there were no children among the crew.
    """
    people: list[tuple[float, ...]] = []
    for outcome, counts in enumerate((_DIED, _SURVIVED)):
        for (sex, age), (which, _) in product(counts, enumerate(_CLASSES)):
            one_hot = tuple(float(which == other) for other in range(len(_CLASSES)))
            row = (*one_hot, float(sex == "female"), float(age == "child"), float(outcome))
            people += [row] * counts[sex, age][which]
    rows = torch.tensor(people, dtype=dtype)
    return Table(rows[:, :-1], rows[:, -1], (*_CLASSES, "female", "child"))


def mlp(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Build linear layers of these widths with ReLU between and PyTorch's initial weights; keep the global generator's state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(
    network: nn.Module,
    table: Table,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.mse_loss,
    steps: int,
    learning_rate: float,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> float:
    """Run full-batch Adam on loss(network(x)[:, 0], y), and return the loss after the last step.

    progress wraps the range of steps, as tqdm.tqdm does.
    """
    adam = torch.optim.Adam(network.parameters(), learning_rate)
    for _ in progress(range(steps)):
        adam.zero_grad()
        loss(network(table.x).squeeze(1), table.y).backward()
        adam.step()
    with torch.no_grad():
        return float(loss(network(table.x).squeeze(1), table.y))
