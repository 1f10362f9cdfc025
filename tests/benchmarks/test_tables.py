import pytest
import torch
from torch.nn import functional

from benchmarks.experiments import tabular


def test_the_people_of_the_titanic():
    """Totals as published: 2,201 on board, 711 saved; 470 female; 109 children; 325, 285, 706 and 885 by class."""
    table = tabular.titanic()
    assert table.x.shape == (2201, 6) and table.y.sum() == 711
    assert table.x.sum(0).tolist() == [325, 285, 706, 885, 470, 109]
    assert table.features == ("1st", "2nd", "3rd", "crew", "female", "child")
    rows, counts = torch.cat([table.x, table.y.unsqueeze(1)], 1).unique(dim=0, return_counts=True)
    assert len(table.x.unique(dim=0)) == 14 and len(rows) == 24
    assert counts[(rows == torch.tensor([0, 0, 1, 0, 1, 1, 0.0])).all(1)] == 17  # girls of the 3rd class who died
    assert not bool((table.x[:, 3] * table.x[:, 5]).any())


def test_two_regimes():
    table = tabular.two_regimes(seed=3)
    assert table.x.shape == (5000, 3) and table.x.abs().max() <= 1 and table.x.dtype == torch.float64
    truth = [2 * x2 if x1 > 0 else -x3 for x1, x2, x3 in table.x[:50].tolist()]
    assert table.y[:50].tolist() == truth
    assert table.y.var().item() == pytest.approx(5 / 6, rel=0.05)  # (4 + 1) / 3 / 2
    assert torch.equal(tabular.two_regimes(seed=3).x, table.x) and not torch.equal(
        tabular.two_regimes(seed=4).x, table.x
    )


def test_a_seeded_network_is_trained():
    table, state = tabular.two_regimes(500, dtype=torch.float32), torch.get_rng_state()
    first, again = (tabular.mlp(3, 16, 1, seed=5, dtype=torch.float32) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    untrained = functional.mse_loss(first(table.x).squeeze(1), table.y)
    losses = [tabular.train(network, table, steps=300, learning_rate=1e-2) for network in (first, again)]
    assert losses[0] == losses[1] and losses[0] < untrained / 4
    assert functional.mse_loss(first(table.x).squeeze(1), table.y) == losses[0]
