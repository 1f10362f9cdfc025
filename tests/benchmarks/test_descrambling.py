"""The experiments of descrambling from their command lines, at sizes small enough for every run of the tests."""

import json
import math

import pytest
import torch

from benchmarks.experiments import descent, descramble_digits, descramble_linear, descramble_signals
from interp_nn.explain.descramble.derivatives import derivative_operator


def run(experiment, folder):
    """The record's results; the figures that it names are there, and small."""
    assert experiment.main(["--quick", "--output", str(folder)]) == 0
    record = json.loads((folder / f"{experiment.NAME}.json").read_text())
    assert record["experiment"] == experiment.NAME and record["quick"] and record["seed"] == 0
    assert sorted(record["figures"]) == sorted(file.name for file in folder.glob("*.png")) and record["figures"]
    for name in record["figures"]:
        figure = (folder / name).read_bytes()
        assert figure.startswith(b"\x89PNG") and len(figure) < 300_000
    return record["results"]


def test_no_descent_passes_the_closed_form(tmp_path, capsys):
    results = run(descent, tmp_path)
    assert results["closed_form_at_most_best_descent"]
    for trial in results["trials"]:
        closed = trial["closed"]
        assert closed["error_of_its_loss"] <= 1e-10 and closed["error_of_orthogonality"] <= 1e-12
        assert closed["loss"] <= trial["loss_before_scrambling"]
        if trial["operator"] == "diff1":  # whose modes are those that the signals were made of
            assert trial["loss_before_scrambling"] <= 1.2 * closed["loss"]
        losses = [one["loss"] for one in trial["descents"]]
        assert trial["best_of_descents"] == min(losses) >= closed["loss"] * (1 - 1e-10)
    small = [row for row in results["table"] if row["n"] == 8]
    assert all(row["descents"] == 4 and row["iterations"] >= 1 for row in small)
    assert "closed form <= the best descent in every trial" in capsys.readouterr().out


def test_a_descent_that_passes_it_is_told(tmp_path, monkeypatch, capsys):
    found = descent.descend
    monkeypatch.setattr(descent, "QUICK", (descent.Size(8, 1, 1, 0.2),))
    monkeypatch.setattr(descent, "descend", lambda *a, **k: found(*a, **k)._replace(loss=0.0))
    assert descent.main(["--quick", "--output", str(tmp_path)]) == 1
    assert "NOT every trial" in capsys.readouterr().out


def test_descrambling_where_the_answer_is_known(tmp_path, capsys):
    results = run(descramble_linear, tmp_path)
    isotropic = results["isotropic"]
    assert isotropic["error_of_weights"][1] <= 0.15 < isotropic["error_of_weights"][0]
    assert isotropic["least_cosine"][1] >= 0.95

    tree = results["tree"]
    assert min(tree["share_in_its_level"]["trained"]) >= 0.99 > 0.9 > min(tree["share_in_its_level"]["untrained"])
    assert tree["ambiguity"]["rank"] == 8 and tree["ambiguity"]["features"] == 16
    assert tree["singular_values"][:8] == pytest.approx(tree["singular_values_of_theory"], rel=1e-2)

    convolution = results["convolution"]
    for layer in (1, 2):
        exact = convolution[f"all shifts, layer {layer}"]
        assert exact["largest_share"]["least"] >= 0.9999
        assert exact["frequencies"] == exact["frequencies_by_power"]
        assert exact["equal_components"] == descramble_linear.LENGTH // 2
        drawn, mixed = (convolution[f"{name}, layer {layer}"] for name in ("as many drawn", "places mixed"))
        assert mixed["largest_share"]["mean"] < drawn["largest_share"]["mean"] < 0.9999
    assert "in order of power" in capsys.readouterr().out


def test_descrambling_a_network_of_signals(tmp_path, capsys):
    results = run(descramble_signals, tmp_path)
    for layer in ("first layer", "last layer"):
        nulls, waves = results["nulls"][layer], results["waves"][layer]
        assert 0 < nulls["fitted"] < nulls["shuffled"] < 1
        assert nulls["fitted"] <= 1.001 * nulls["held_out"]
        assert set(waves) == {"descrambled", "untrained, descrambled", "by P of shuffled data", "by random P"}
        assert len(waves["descrambled"]["frequencies"]) == descramble_signals.WIDTH
        assert sum(waves["descrambled"]["energies"]) == pytest.approx(1)
        assert abs(waves["by random P"]["order"]["mean"]) < 0.15
    assert len(results["training_loss"]) == 2 and results["training_loss"][1] < results["training_loss"][0]
    assert "R² of the distributions" in capsys.readouterr().out


def test_waves_of_a_weight_are_found():
    """Mode m of the rows times m turns of a cosine: in order, and each in one frequency."""

    places = torch.arange(64, dtype=torch.float64)
    filters = torch.cos(2 * math.pi * torch.outer(torch.arange(1, 10).double(), places) / 64)
    weight = derivative_operator(9, "fourier2").inverse(filters)
    waves = descramble_signals._waves(weight)
    assert waves["frequencies"] == pytest.approx(range(1, 10))
    assert waves["concentration"] == pytest.approx(1) and waves["order"] == pytest.approx(1)
    assert descramble_signals._waves(weight.flip(1))["frequencies"] == pytest.approx(range(1, 10))


def test_descrambling_digits(tmp_path, capsys):
    results = run(descramble_digits, tmp_path)
    assert results["test_accuracy"] > 0.3
    assert set(results["nulls"]) == {"convolution", "hidden layer", "latent"}
    for nulls in results["nulls"].values():
        assert 0 < nulls["fitted"] < nulls["shuffled"] and 0 < nulls["random_net"] < 1
    function = results["function"]
    assert max(function["orthogonal, latent"].values()) <= 1e-12
    assert "ReLU" in function["orthogonal, hidden layer"]["refused"]
    assert function["orthogonal, hidden layer"]["error_of_logits"] > 0.01
    assert function["order, hidden layer"]["error_of_logits"] <= 1e-12
    assert function["order, hidden layer"]["loss_over_its_lower_bound"] >= 1
    shares = results["class_share"]["descrambled"]
    assert len(shares) == descramble_digits.LATENT and all(0 <= share <= 1 for share in shares)
    assert "written into the network" in capsys.readouterr().out


def test_class_share_is_one_where_only_the_class_counts():

    y = torch.arange(10).repeat(20)
    values = torch.stack((y.double(), torch.randn(200).double()), 1)
    only, none = descramble_digits._class_share(values, y)
    assert only == pytest.approx(1) and none < 0.2
