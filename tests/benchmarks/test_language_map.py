"""The experiment on a language model's map runs, and its record has what the guide says."""

import json

import pytest
import torch

from benchmarks import experiments
from benchmarks.experiments import language_map
from benchmarks.records.environment import ROOT


def true_of(results, size):
    assert results["error_of_the_state"]["float32"] <= 1e-6 and results["error_of_the_state"]["float64"] <= 1e-13
    formed, products = results[f"{size.formed} tokens"], results[f"{size.products} tokens, by products"]
    for rows in (formed, products):
        assert rows["token contributions"]["check"] <= 1e-5
        assert 0 < rows["forward"]["peak_mb"] < rows["gradient"]["peak_mb"] < rows["token contributions"]["peak_mb"]
    assert formed["W of a state"]["error_of_the_state"] <= 1e-5
    assert formed["directions by products"]["error_of_the_values"] <= 1e-4
    assert 0 < formed["directions of W"]["share_of_the_squares"] < 1


def test_language_map(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert experiments.find("language_map")(["--quick", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "language_map.json").read_text(), parse_constant=pytest.fail)
    true_of(record["results"], language_map.QUICK)


def test_the_record():
    record = json.loads((ROOT / "benchmarks/results/cpu/experiments/language_map.json").read_text())
    assert not record["dirty"] and not record["quick"]
    true_of(record["results"], language_map.Size())
    results = record["results"]
    formed, products = results["256 tokens"], results["2048 tokens, by products"]
    contributions, by_products = products["token contributions"], formed["directions by products"]
    by_weight = [formed[name] for name in ("W of a state", "directions of W")]
    said = (
        f"contributions take {contributions['over_gradient']:.1f} times the CPU time of a gradient and "
        f"{contributions['peak_mb'] / 1e3:.1f} GB, a gradient {products['gradient']['peak_mb'] / 1e3:.1f} GB.",
        f"take {by_products['cpu_seconds']:.0f} CPU seconds and {by_products['peak_mb'] / 1e3:.1f} GB by products, and "
        f"{sum(row['cpu_seconds'] for row in by_weight):.0f} and {max(row['peak_mb'] for row in by_weight) / 1e3:.1f} GB by W.",
        f"is {results['error_of_the_state']['float32']:.1e}, and {results['error_of_the_state']['float64']:.1e} in double",
    )
    page = " ".join((ROOT / "docs" / "language_models.md").read_text(encoding="utf-8").split())
    assert all(text.replace("e-0", "e-") in page for text in said)
