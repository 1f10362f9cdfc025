"""The command line, as users call it, on problems small enough for every run of the tests."""

import json
import pkgutil

import pytest
import torch

from benchmarks import experiments
from benchmarks.__main__ import main
from benchmarks.timing import reference_networks


def test_demo_writes_its_record_and_figure(tmp_path, capsys):
    assert main(["demo", "--epochs", "1", "--seeds", "2", "--train-size", "256", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert "passed" in printed
    whole = json.loads((tmp_path / "demo-digits.json").read_text())
    assert {"experiment", "git_sha", "device", "versions", "seeds", "epochs", "seconds", "budget", "results"} <= set(
        whole
    )
    runs = whole["results"]["runs"]
    assert [(run["head"], run["seed"]) for run in runs] == [("mlp", 0), ("summary", 0), ("mlp", 1), ("summary", 1)]
    assert all(0 < run["test_accuracy"][-1] <= 1 for run in runs)
    assert (tmp_path / "demo-digits.png").read_bytes().startswith(b"\x89PNG")


def test_demo_says_what_is_missing(tmp_path, capsys):
    assert main(["demo", "--dataset", "mnist", "--data", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "mnist: not found in" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seeds", "--epochs", "--train-size"])
@pytest.mark.parametrize("number", ["-1", "0"])
def test_a_demo_of_nothing_is_refused(option, number, capsys):
    with pytest.raises(SystemExit):
        main(["demo", option, number])
    assert f"argument {option}: got {number}, want at least 1" in capsys.readouterr().err


def test_experiments_are_listed_and_run_by_name(tmp_path, capsys):
    assert main(["experiments"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*experiments.NAMES, *experiments.ALIASES]
    modules = {module.name for module in pkgutil.iter_modules(experiments.__path__)}
    assert {name for name in modules if hasattr(experiments._module(name), "NAME")} == set(experiments.NAMES)
    assert all(name == experiments._module(name).NAME for name in experiments.NAMES)

    assert main(["experiments", "two-regimes", "--quick", "--output", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "two_regimes.json").read_text())["experiment"] == "two_regimes"
    capsys.readouterr()
    assert main(["experiments", "dlgn-cifar10", "--data", str(tmp_path)]) == 2
    assert "cifar10: not found in" in capsys.readouterr().err
    assert main(["experiments", "summary-vg"]) == 2
    assert "summary-vg: no such experiment; did you mean summary_vgg" in capsys.readouterr().err


@pytest.mark.parametrize(("channels", "size", "features"), [(1, 8, 256), (1, 28, 1024), (3, 32, 1600)])
def test_networks_fit_their_images(channels, size, features):
    x, t = torch.randn(4, channels, size, size), torch.tensor([0, 1, 2, 3])
    for build in reference_networks.NETWORKS.values():
        network = build(channels, size)
        network.loss(x, t).backward()
        assert network.eval()(x).shape == (4, 10)
    assert network.head.in_features == features


def test_vgg11_has_the_references_shape():
    base, ours = (build(3, 32, "vgg11") for build in reference_networks.NETWORKS.values())
    assert [type(layer).__name__ for layer in base.head] == ["Dropout", "Linear", "ReLU"] * 2 + ["Linear"]
    assert ours.head.weight.shape == (100, 512)
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in base.body) == 8
