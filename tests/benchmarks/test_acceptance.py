"""The main job's promise on scikit-learn's digits, at its full budget."""

import json

import numpy as np
import pytest

from benchmarks.__main__ import main


@pytest.mark.slow
def test_summary_head_matches_the_mlp_head_on_digits(tmp_path):
    assert main(["demo", "--dataset", "digits", "--output", str(tmp_path)]) == 0
    whole = json.loads((tmp_path / "demo-digits.json").read_text())
    assert whole["epochs"] == 20
    assert whole["seeds"] == [0, 1, 2]
    runs = whole["results"]["runs"]
    accuracy = {
        head: np.mean([r["test_accuracy"][-1] for r in runs if r["head"] == head]) for head in ("mlp", "summary")
    }
    assert accuracy["summary"] >= accuracy["mlp"] - 0.01
    for run in runs:
        if run["head"] == "summary":
            assert run["agreement"] >= 0.99
            assert run["relative_difference"] <= 0.05
            assert run["first_loss"] < 10
