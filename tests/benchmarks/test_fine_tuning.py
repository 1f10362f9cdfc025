"""The experiments on recipes and on fine-tuning run, and the guide has the tables of their records."""

import json

import pytest
import torch
from support import needs_records

from benchmarks import experiments
from benchmarks.experiments import fine_tuning, recipes
from benchmarks.records.environment import ROOT


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an experiment and return its record; its page has the table."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def run(name, module):
        page = tmp_path / "page.md"
        page.write_text(f"<!-- begin: python -m benchmarks experiments {name} -->\n<!-- end -->\n")
        assert experiments.find(name)(["--quick", "--output", str(tmp_path), "--page", str(page)]) == 0
        record = json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=pytest.fail)
        assert module.markdown(record["results"]) in page.read_text()
        return record

    return run


def test_recipes(run, monkeypatch):
    names = (
        "no decay",
        "decay 1 by `parameter_groups`",
        "float16, GradScaler",
        "EMA 0.99, constant rate",
        "rate 0.03, clipped",
    )
    monkeypatch.setattr(recipes, "WAYS", {name: recipes.WAYS[name] for name in names})
    ways = run("recipes", recipes)["results"]["ways"]
    free, decayed, half, ema, clipped = (ways[name] for name in names)
    assert free["newton-schulz"]["norm_of_b"] == decayed["newton-schulz"]["norm_of_b"]  # no b of these decays
    assert free["summary head"]["norm_of_b"][1] > decayed["summary head"]["norm_of_b"][1]
    assert half["nn.Linear"]["norm_of_b"] is None and half["newton-schulz"]["accuracy"]["mean"] > 0.15
    assert clipped["summary head"]["clipped"]["mean"] > 0 == free["summary head"]["clipped"]["mean"]
    change = ema["newton-schulz"]["average"]["change_by_the_norms"]["mean"]
    assert 1e-4 < change < 1 and ema["summary head"]["average"]["change_by_the_norms"]["mean"] == 0


def test_the_rate_rises_and_falls():
    assert [recipes.schedule(i, 10, 0.2, True) for i in (0, 1, 2, 6, 9)] == [0.5, 1, 1, 0.5, 0.125]
    assert [recipes.schedule(i, 10, 0.0, True) for i in (0, 5)] == [1, 0.5]
    assert {recipes.schedule(i, 10, 0.0, False) for i in range(10)} == {1.0}


def test_fine_tuning(run):
    record = run("fine_tuning", fine_tuning)
    trainings, networks = record["results"]["trainings"], record["results"]["networks"]
    assert len(trainings) == 2 * 2 * len(fine_tuning.CONVERSIONS)
    assert all(row["error_of_the_conversion"] < 1e-4 and 0 < row["step"] < 10 for row in trainings)
    for found in networks.values():
        for one in found.values():
            assert one["below_plain_there"][fine_tuning.PLAIN] == 0
    means = networks["ResNet"]["SGD"]["conversions"]["whole, newton-schulz"]["0.1"]
    assert (
        abs(means["change_of_gains"]["body.0"]) < 1e-3 < abs(means["change_of_gains"]["head"])
    )  # a batch norm follows body.0


def test_the_step_of_a_weight_is_divided_by_directions():
    before = torch.diag(torch.tensor([3.0, 1.0]))
    found = fine_tuning.moved(before, before + torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert found["share_of_the_first_direction"] == pytest.approx(9 / 25)
    assert found["step"] == pytest.approx(5 / 10**0.5)


@needs_records
@pytest.mark.parametrize(
    ("module", "page"), [(recipes, "learning_rates"), (fine_tuning, "fine_tune")], ids=["recipes", "fine_tuning"]
)
def test_the_guide_has_the_table(module, page):
    record = json.loads((ROOT / f"benchmarks/results/cpu/experiments/{module.NAME}.json").read_text())
    assert not record["dirty"] and not record["quick"]
    assert module.markdown(record["results"]) in (ROOT / "docs" / "howto" / f"{page}.md").read_text(encoding="utf-8")
