"""The sweep over learning rates: its layers compute what they say, its tables count what they say."""

import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from support import needs_records
from torch import nn

from benchmarks import experiments
from benchmarks.experiments.learning_rates import cells, tables
from benchmarks.experiments.learning_rates.architectures import NETWORKS
from benchmarks.experiments.learning_rates.cells import OPTIMIZERS, Cell
from benchmarks.experiments.learning_rates.layers import CANDIDATES, LINEAR, Conv2d, Linear
from benchmarks.records.environment import ROOT


def polynomial(s, coefficients):
    return sum(c * s ** (2 * i) for i, c in enumerate(coefficients))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=["tall", "wide"])
@pytest.mark.parametrize("name", CANDIDATES)
def test_a_weight_is_the_map_of_the_singular_values(name, shape):
    torch.manual_seed(0)
    layer = Linear(*shape, CANDIDATES[name]).double()
    with torch.no_grad():
        layer.weight.mul_(1.3).add_(0.2 * torch.randn_like(layer.weight))
        for gain in layer.gains:
            gain.uniform_(0.5, 2)
    for _ in range(50 if layer.candidate.updated else 0):
        layer.after_step()
    kind = layer.candidate
    u, s, vt = torch.linalg.svd(layer.weight.detach() * kind.scale, full_matrices=False)
    sigma = (layer.u @ layer.weight @ layer.v).detach() if kind.sigma else 1.0
    if kind.sigma and kind.updated:
        torch.testing.assert_close(sigma, s[0], rtol=1e-6, atol=0)
    s = s / sigma
    wanted = u * (s * polynomial(s, kind.polynomial) * (sigma if kind.restored else 1)) @ vt
    for gain in layer.gains:
        wanted = wanted * gain
    torch.testing.assert_close(layer.effective_weight(), wanted)


@pytest.mark.parametrize("coefficients", [(0, 1), (1.5, -0.5), (2.083, -1.643, 0.56)], ids=str)
def test_a_step_of_b_moves_the_weight_as_the_guide_says(coefficients):
    """By entries in the basis of singular vectors: symmetric, antisymmetric, and outside of the columns of b."""
    random = torch.Generator().manual_seed(0)
    b = torch.randn(6, 3, generator=random, dtype=torch.float64)
    step = torch.randn(6, 3, generator=random, dtype=torch.float64)

    def weight(b):
        gram = b.mT @ b
        return b @ sum(c * torch.linalg.matrix_power(gram, i) for i, c in enumerate(coefficients))

    found = torch.func.jvp(weight, (b,), (step,))[1]
    u, s, vt = torch.linalg.svd(b)
    found, step = u.mT @ found @ vt.mT, u.mT @ step @ vt.mT
    f = s * polynomial(s, coefficients)
    slope = sum((2 * i + 1) * c * s ** (2 * i) for i, c in enumerate(coefficients))
    apart = s[:, None] - s
    symmetric = torch.where(apart == 0, slope, (f[:, None] - f) / torch.where(apart == 0, 1, apart))
    antisymmetric = (f[:, None] + f) / (s[:, None] + s)
    top = step[:3]
    wanted = symmetric * (top + top.mT) / 2 + antisymmetric * (top - top.mT) / 2
    torch.testing.assert_close(found[:3], wanted)
    torch.testing.assert_close(found[3:], step[3:] * f / s)


def test_bounded_steps_move_the_weight_no_further_than_the_optimizer_would():
    torch.manual_seed(0)
    layer = Linear(6, 4, CANDIDATES["summary, bounded steps"]).double()
    for _ in range(20):
        before, asked = layer.effective_weight().detach(), 0.5 * torch.randn_like(layer.weight)
        asked *= torch.linalg.matrix_norm(asked, 2).clamp(max=1) / torch.linalg.matrix_norm(asked, 2)
        with torch.no_grad():
            layer.weight += asked
        layer.after_step()
        moved = torch.linalg.matrix_norm(layer.effective_weight() - before, 2)
        assert 0 < moved <= 1.01 * torch.linalg.matrix_norm(asked, 2)


def test_a_convolution_has_the_weight_of_its_matrix():
    torch.manual_seed(0)
    layer = Conv2d(2, 5, 3, 2, CANDIDATES["Newton-Schulz"])
    x = torch.randn(2, 2, 8, 8)
    patches = nn.functional.unfold(x, 3, padding=1, stride=2)
    wanted = (layer.effective_weight() @ patches + layer.bias[:, None]).unflatten(-1, (4, 4))
    torch.testing.assert_close(layer(x), wanted)


def test_gains_and_biases_do_not_decay():
    network = NETWORKS["transformer"](CANDIDATES["Newton-Schulz, row and column gains"])
    (optimizer,) = OPTIMIZERS["AdamW, decay 0.1"][1](network, 1e-3)
    decayed, kept = (group["params"] for group in optimizer.param_groups)
    gains = [gain for m in network.modules() if isinstance(m, Linear) for gain in m.gains]
    assert len(decayed) + len(kept) == len(list(network.parameters())) and all(p.ndim > 1 for p in decayed)
    assert gains and all(any(gain is p for p in kept) for gain in gains)


def row(layer, accuracy, seed=0, rate=0.1, length=10, finite=True):
    cell = Cell("mlp", layer, "SGD", rate, seed, length)
    return {**cell._asdict(), "accuracy": accuracy, "finite": finite}


def test_cells_count_where_plain_layers_are_good_and_trained_to_the_end():
    found = [row(LINEAR, 0.9 + 0.01 * s, s, rate) for s in range(3) for rate in (0.1, 0.2)]
    found += [row(LINEAR, a, s, 0.3) for s, a in enumerate((0.9, 0.91, 0.8))]  # a bad seed
    found += [row(LINEAR, 0.912, s, 0.1, 20) for s in range(3)] + [row(LINEAR, 0.92, s, 0.2, 20) for s in range(3)]
    found += [row(LINEAR, 0.91, s, 0.3, 20) for s in range(3)]
    assert tables.counted(found) == [("mlp", "SGD", 0.1)]  # 0.2 still learns with more epochs
    found += [row("summary", a, s) for s, a in enumerate((0.89, 0.95, 0.1))]
    found += [row("PC-1", 0.88, s) for s in range(3)] + [row("PC-2", 0.1, 0, 0.2)]
    assert tables.score(found, "summary") == pytest.approx({"counted": 1, "near": 1, "failures": 1, "shortfall": 0.02})
    assert tables.score(found, "PC-1") == pytest.approx({"counted": 1, "near": 0, "failures": 0, "shortfall": 0.03})
    assert tables.best(found, 1) == ["PC-1"]  # no failure
    assert tables.failures_everywhere(found, "PC-2", "mlp") == 1


def test_a_training_that_diverges_ends_and_says_so(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    found = cells.train(Cell("mlp", "summary", "SGD", 100.0, 0, 50))
    assert not found["finite"] and found["accuracy"] < 0.15 and found["seconds"] < 5


def test_a_finished_cell_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    run = experiments.find("learning_rates")
    arguments = ["--quick", "--workers", "1", "--output", str(tmp_path)]
    assert run(arguments) == 0
    rows = (tmp_path / "learning_rates.jsonl").read_text().splitlines()
    monkeypatch.setattr(cells, "train", None)
    assert run(arguments) == 0
    assert (tmp_path / "learning_rates.jsonl").read_text().splitlines() == rows and len(rows) == 8
    record = json.loads((tmp_path / "learning_rates.json").read_text())
    assert record["budget"]["trainings"] == 8 and record["results"]["gpt"]["layers"].keys() == {LINEAR, "summary"}
    by_name = {(r["network"], r["layer"]): r for r in map(json.loads, rows)}
    found = record["results"]["cnn"]["by_optimizer"]["SGD"]["summary"]["accuracy"]
    assert found == by_name["cnn", "summary"]["accuracy"]


@needs_records
def test_the_guide_has_the_tables_of_the_record():
    record = json.loads((ROOT / "benchmarks/results/cpu/experiments/learning_rates.json").read_text())
    page = (ROOT / "docs" / "polynomials.md").read_text(encoding="utf-8")
    assert tables.markdown(record["results"]) in page
