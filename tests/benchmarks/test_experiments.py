"""Each experiment from its command line, at sizes small enough for every run of the tests: what it records must be true."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.experiments import (
    digits_attribution,
    digits_tsne,
    gated_digits,
    gated_images,
    gating_regimes,
    oblique_trees,
    tabular,
    titanic,
    two_regimes,
)
from benchmarks.records.environment import ROOT
from benchmarks.timing import reference_networks
from interp_nn.nn.gated.gates import HardGate

HEADER = "survived,pclass,name,sex,age,sibsp,parch,ticket,fare,cabin,embarked"


@pytest.fixture(autouse=True)
def _without_data(monkeypatch):
    monkeypatch.delenv("INTERP_NN_DATA", raising=False)


def run(experiment, folder, *arguments, name=None):
    """The record's results; the figures that it names are there, and small."""
    return recorded(experiment, folder, "--quick", *arguments, name=name)["results"]


def recorded(experiment, folder, *arguments, name=None):
    name = name or experiment.NAME
    assert experiment.main(["--output", str(folder), *arguments]) == 0
    record = json.loads((folder / f"{name}.json").read_text())
    assert record["experiment"] == name
    assert (record["git_sha"] is not None) == (ROOT / ".git").exists()  # which a source archive lacks
    assert {"device", "versions", "seeds", "epochs", "seconds", "budget"} <= set(record)
    assert record["quick"] == ("--quick" in arguments)
    assert sorted(record["figures"]) == sorted(file.name for file in folder.glob("*.png")) and record["figures"]
    for name in record["figures"]:
        figure = (folder / name).read_bytes()
        assert figure.startswith(b"\x89PNG") and len(figure) < 200_000
    return record


def test_digits_attribution(tmp_path, capsys):
    results = run(digits_attribution, tmp_path)
    for dtype, close in (("float32", 1e-5), ("float64", 1e-12)):
        assert all(error <= close for error in results["exactness"][dtype].values())
    near = results["error_over_change_by_step"]["images with noise of 0.01"]
    assert near["1e-06"] <= 1e-6 < near["0.01"]
    bias = results["bias"]
    assert bias["sum_of_layers_error"] <= 1e-10
    assert sum(bias["mean_of_its_constant_by_layer"].values()) == pytest.approx(bias["mean_of_its_constant"], rel=1e-9)
    deletion = results["deletion"]
    assert deletion["most supporting"][0] == deletion["least supporting"][0] == results["test_accuracy"] > 0.3
    assert deletion["most supporting"][2] < deletion["least supporting"][2]
    assert "accuracy after deleting pixels" in capsys.readouterr().out


def test_digits_tsne(tmp_path, capsys):
    results = run(digits_tsne, tmp_path)
    assert results["exactness_float64"]["at_x"] <= 1e-12
    assert results["exactness_float64"]["step_1e-6_error_over_change"] <= 1e-6
    assert len(results["divergence"]) == 3 and results["divergence"][-1] < results["divergence"][0]
    assert results["neighbour_accuracy"]["fitted points"] > 0.2
    assert "accuracy of 5 nearest neighbours" in capsys.readouterr().out


def test_two_regimes(tmp_path, capsys):
    results = run(two_regimes, tmp_path)
    assert results["check"] <= 1e-12 and results["samples"] == 500
    assert 0 < results["mse"] < 0.2 * results["variance"]
    assert sum(results["merged"]["samples"]) == 500 and 0.9 < results["merged"]["r2"] <= 1
    for name, median in results["median_coefficients"].items():
        assert median == pytest.approx(results["truth"][name], abs=0.3)
    assert "median coefficients" in capsys.readouterr().out


def test_the_titanic_from_its_counts(tmp_path, capsys):
    results = run(titanic, tmp_path)
    counts = results.pop("counts")
    assert results == {}
    assert counts["people"] == 2201 and counts["distinct_rows"] == 14
    assert counts["best_accuracy_of_any_rule"] == 1740 / 2201 >= counts["accuracy"] > 0.7
    assert counts["check"] <= 1e-12 and len(counts["ranks"]) == counts["clusters"]
    assert "2,201 people, 14 distinct rows" in capsys.readouterr().out


def test_the_titanic_from_its_passengers(tmp_path, capsys):
    people = tabular.titanic()
    lines = [HEADER]
    for i, (row, y) in enumerate(zip(people.x[::4].tolist(), people.y[::4].tolist(), strict=True)):
        which = 1 + min(row.index(1.0), 2)
        sex, age = ("female" if row[4] else "male"), ("" if i % 5 == 0 else 9 if row[5] else 20 + i % 40)
        lines.append(f'{int(y)},{which},"Doe, {i}",{sex},{age},{i % 3},0,T{i},{60 / which},,{"SCQ"[i % 3]}')
    data = tmp_path / "data" / "titanic"
    data.mkdir(parents=True)
    (data / "titanic.csv").write_text("\r\n".join(lines))
    output = tmp_path / "output"
    results = run(titanic, output, "--data", str(tmp_path / "data"))["passengers"]
    assert results["passengers"] == {"fitted": 441, "held_out": 110}
    assert results["held_out"]["accuracy"] > 0.6 and results["check"] <= 1e-12
    assert max(results["importance"], key=results["importance"].get) == "female"
    assert len(results["splits"]["network"]["steps"]) == 2 and 1 <= max(results["splits"]["network"]["steps"]) <= 60
    for found in results["splits"].values():
        assert 0.6 < found["accuracy"]["mean"] < 1 and 0.6 < found["auc"]["mean"] < 1 and found["auc"]["std"] > 0
    coefficients = results["splits"]["logistic regression"]["coefficients"]
    assert max(coefficients, key=coefficients.get) == "female"
    assert "441 passengers" in capsys.readouterr().out


def test_passengers_are_read_as_they_are(tmp_path):
    rows = ["1,1,A,female,30,1,2,T,7.25,,C", "0,3,B,male,,0,0,T,0,,S", "0,2,C,male,50,0,1,T,20,,"]
    (tmp_path / "titanic.csv").write_text("\n".join([HEADER, *rows]))
    x, y, features = titanic.read_passengers(tmp_path)
    column = dict(zip(features, x.T.tolist(), strict=True))
    assert y.tolist() == [1, 0, 0]
    assert column["1st class"] == [1, 0, 0] and column["3rd class"] == [0, 1, 0] and column["female"] == [1, 0, 0]
    assert column["age unknown"] == [0, 1, 0] and column["from C"] == [1, 0, 0] and column["from Q"] == [0, 0, 0]
    assert column["age"][::2] == [30, 50] and math.isnan(column["age"][1])
    assert column["fare"] == pytest.approx([math.log(8.25), 0, math.log(21)]) and column["siblings, spouse"] == [
        1,
        0,
        0,
    ]


def made_passengers(n=60):
    torch.manual_seed(0)
    x = torch.rand(n, len(titanic.FEATURES), dtype=torch.float64)
    x[::7, titanic.FEATURES.index("age")] = torch.nan
    return tabular.Table(x, (x[:, 2] + 0.5 * torch.rand(n) > 0.7).double(), titanic.FEATURES)


def test_what_is_held_out_is_prepared_by_what_is_fitted():
    part, rest = titanic._split(made_passengers(), 3)
    fitted, held_out = titanic._prepared(part, rest)
    for name in titanic.MEASURED:
        column = fitted.x[:, titanic.FEATURES.index(name)]
        assert column.mean().item() == pytest.approx(0, abs=1e-12) and column.std().item() == pytest.approx(1)
    again, other = titanic._prepared(part, rest._replace(x=2 * rest.x))
    assert torch.equal(again.x, fitted.x) and fitted.x.isfinite().all() and held_out.x.isfinite().all()
    age = titanic.FEATURES.index("age")
    unknown = part.x[:, age].isnan()
    assert fitted.x[unknown, age].unique().numel() == 1 and bool(
        fitted.x[~unknown, age].eq(fitted.x[unknown, age][0]).any()
    )
    assert torch.equal(other.x[:, 2], 2 * held_out.x[:, 2])  # 0 or 1 is left as it is


def test_steps_are_chosen_by_a_fifth_of_what_is_fitted():
    part, _ = titanic._split(made_passengers(), 3)
    chosen = titanic._chosen_steps(part, 80, 5)
    inner, validation = titanic._prepared(*titanic._split(part, 5))
    losses = []
    for steps in range(1, 81):
        logits = titanic._network(inner, steps, 5)(validation.x).squeeze(1)
        losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logits, validation.y).item())
    assert chosen == 1 + losses.index(min(losses)) < 80


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "titanic: not found in"),
        ("survived,sex\n1,male", "has no column pclass, age, sibsp, parch, fare, embarked"),
        (HEADER, "has no passenger of known age"),
        (HEADER + "\n1,4,A,male,1,0,0,T,1,,S", "line 2: survived, pclass and sex are '1', '4', 'male'"),
        (HEADER + "\n1,3,A,male,1,0,0,T,1,,S\n1,3,A,male,30", "line 3: got 5 columns, want 11"),
        (HEADER + "\n1,3,A,male,1,0,0,T,1,,S,1", "line 2: got 12 columns, want 11"),
        *(
            (HEADER + f"\n1,3,A,male,{age},{relatives},0,T,{fare},,S", f"line 2: {name} is '{value}', want a number")
            for age, relatives, fare, name, value in (
                ("1", "0", "", "fare", ""),
                ("1", "0", "nan", "fare", "nan"),
                ("1", "0", "-5", "fare", "-5"),
                ("nan", "0", "1", "age", "nan"),
                ("NA", "0", "1", "age", "NA"),
                ("1", "inf", "1", "sibsp", "inf"),
            )
        ),
        (HEADER + "\n1,3,A,male,1,0,0,T,1,,Z", "line 2: embarked is 'Z', want S, C, Q or nothing"),
    ],
)
def test_missing_or_broken_passengers_are_named(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "titanic.csv").write_text(text)
    assert titanic.main(["--data", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_oblique_trees(tmp_path, capsys):
    record = recorded(oblique_trees, tmp_path, "--quick", "--datasets", "SDI", "SDII", "--epochs", "4")
    results = record["results"]
    assert record["seeds"] == [0] and record["epochs"] == {"SDI": 4, "SDII": 4} and record["budget"]["minutes"] is None
    trainings = results.pop("trainings")
    assert len(trainings) == 6
    for row in trainings:
        assert row["epochs"] == 4 and 0 < row["last_accuracy"] <= row["best_accuracy"] < 1
        if "gates" in row:
            best = row["gates"]["best_cosines"]
            assert len(best) == 15 and row["gates"]["found"] == sum(value >= 0.99 for value in best)
            assert 0 < row["gates"]["mean_best_cosine_of_random_gates"] < 0.9 and 0 < row["gates"]["sharpness"] < 1
    assert list(results) == ["SDI", "SDII"]
    assert results["SDI"]["DLGN-SF"]["published_accuracy"] == 0.9743
    assert results["SDI"]["DLGN-SF"]["hyperplanes_found"] == [trainings[0]["gates"]["found"]]
    assert "hyperplanes found, of 15" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gates_of_a_dlgn_become_the_trees_hyperplanes(tmp_path):
    results = recorded(oblique_trees, tmp_path, "--datasets", "SDI", "--seeds", "1")["results"]
    found = results["SDI"]["DLGN-SF"]
    assert found["last_accuracy"]["mean"] >= 0.96 and found["hyperplanes_found"] == [15]
    assert found["last_accuracy"]["mean"] > results["SDI"]["ReLU network"]["last_accuracy"]["mean"]
    assert results["trainings"][0]["before"]["accuracy"] < 0.7
    assert results["trainings"][0]["gates"]["mean_best_cosine_of_random_gates"] < 0.7


def test_gated_digits(tmp_path, capsys):
    results = run(gated_digits, tmp_path, "--epochs", "1")
    assert len(results["regimes"]) == 11 and all(row["meaning"] for row in results["regimes"].values())
    for name in ("FRNPF (II)", "FRNPF (DI)", "FLNPF"):  # fixed gates keep their kernel
        assert results["alignment"][name]["before"] == results["alignment"][name]["after"]
    assert results["alignment"]["FLNPF"]["before"] == results["alignment"]["ReLU"]["after"]
    assert results["alignment"]["DLGN(1)"]["before"] != results["alignment"]["DLGN(1)"]["after"]
    assert all(0.9 < row["mean"] <= 1 for row in results["kernel_machines"].values())
    assert 0.95 < results["logistic_regression"] < 0.99
    accuracy = {name: row["last_accuracy"]["mean"] for name, row in results["regimes"].items()}
    ratio = results["required"]["DLGN(1) over ReLU, at least 0.97"]
    assert ratio["value"] == pytest.approx(accuracy["DLGN(1)"] / accuracy["ReLU"])
    assert ratio["holds"] == (ratio["value"] >= 0.97)
    assert "alignment before, after" in capsys.readouterr().out


@pytest.fixture
def mnist(tmp_path, idx):
    """Stripes in the place of digits, the class in their height: a folder as users have it."""
    random = np.random.default_rng(0)
    for split in ("train", "t10k"):
        y = random.integers(0, 10, 120).astype(np.uint8)
        x = random.integers(0, 40, (120, 28, 28)).astype(np.uint8)
        for image, label in zip(x, y, strict=True):
            image[2 * label + 4 : 2 * label + 8] = 255
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx(x))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(y))
    return str(tmp_path)


def test_gated_images_of_digits(tmp_path, capsys):
    results = run(gated_images, tmp_path, "--train-size", "64", name="gated_images-digits")
    assert [row["network"] for row in results["trainings"]] == list(gated_images.REGIMES)
    assert all(row["published_best_accuracy"] is None for row in results["regimes"].values())
    assert "digits: 64 training and 50 test images, 1 epochs of Adam 0.0003 at batch 32" in capsys.readouterr().out


def test_gated_images_stop_in_time_and_go_on_as_if_they_had_not(tmp_path, mnist):
    name, arguments = "gated_images-mnist", ["--quick", "--data", mnist, "--train-size", "0", "--epochs", "3"]
    whole = recorded(gated_images, tmp_path / "whole", *arguments, name=name)
    assert whole["epochs"] == 3 and whole["budget"]["train_images"] == 120 and whole["budget"]["test_images"] == 50
    assert whole["results"]["regimes"]["ReLU"]["published_best_accuracy"] == 0.9814
    assert whole["results"]["compared_after_epoch"] == 3

    arguments += ["--checkpoints", str(tmp_path / "checkpoints")]
    cut = recorded(gated_images, tmp_path / "cut", *arguments, "--minutes", "1e-6", name=name)
    assert {row["epochs"] for row in cut["results"]["trainings"]} == {1} and cut["epochs"] == 3
    for row in whole["results"]["trainings"]:
        accuracies = row["history"]["accuracy"]
        assert len(accuracies) == len(row["history"]["loss"]) == row["epochs"] == 3
        assert [row["last_accuracy"], row["best_accuracy"]] == [accuracies[-1], max(accuracies)]
    assert cut["budget"]["minutes"] == 1e-6 and cut["results"]["compared_after_epoch"] == 1
    relu = cut["results"]["accuracy_compared"]["ReLU"]["mean"]
    assert cut["results"]["dlgn_over_relu"]["DLGN(x)"] == pytest.approx(
        cut["results"]["accuracy_compared"]["DLGN(x)"]["mean"] / relu
    )

    with pytest.raises(ValueError, match=r"a checkpoint of another training, \{'test_images': 50\} instead of"):
        gated_images.main([*arguments, "--test-size", "40", "--output", str(tmp_path / "other")])

    resumed = recorded(gated_images, tmp_path / "resumed", *arguments, name=name)
    for ours, theirs in zip(resumed["results"]["trainings"], whole["results"]["trainings"], strict=True):
        assert ours["history"]["loss"] == theirs["history"]["loss"]
        assert ours["history"]["accuracy"] == theirs["history"]["accuracy"]


@pytest.mark.parametrize("option", ["--seeds", "--epochs", "--batch", "--train-size"])
def test_numbers_that_mean_nothing_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        gated_images.main([option, "-1"])
    assert f"argument {option}: got -1, want at least" in capsys.readouterr().err


def test_missing_or_damaged_images_are_named(tmp_path, mnist, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["--data", str(tmp_path / "empty")], "cifar10 or mnist or cifar100: not found in"),
        (["--dataset", "mnist"], "mnist: no folder given"),
    ):
        assert gated_images.main([*arguments, "--output", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"")
    assert gated_images.main(["--data", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "are damaged" in capsys.readouterr().err


def test_regimes_are_what_the_papers_mean():
    def backbone():
        return reference_networks.relu_mlp(6, 5, 5, 3)

    def weights(net):
        return [module.weight for module in net.modules() if isinstance(module, torch.nn.Linear)]

    relu = gating_regimes.build("ReLU", backbone)
    x = torch.randn(40, 6)
    dependent, independent, learned = (
        gating_regimes.build(name, backbone, relu) for name in ("FRNPF (DI)", "FRNPF (II)", "FLNPF")
    )
    for net in (dependent, independent, learned):
        assert isinstance(net.gate, HardGate)
        assert not any(p.requires_grad for p in net.gating.parameters())
        assert all(p.requires_grad for p in net.value.parameters())
    gating, value = weights(dependent.gating), weights(dependent.value)
    assert all(torch.equal(a, b) for a, b in zip(gating, value, strict=False))
    assert not any(
        torch.equal(a, b) for a, b in zip(weights(independent.gating), weights(independent.value), strict=False)
    )
    hidden = relu[1](relu[0](x)), relu[:4](x)
    for gates, units in zip(learned.gate_values(x), hidden, strict=True):
        assert torch.equal(gates, (units > 0).float())
    assert not torch.equal(learned(x), relu(x))
    # Dependent initialisation: before training it is the network that its gates come from.
    torch.testing.assert_close(dependent(x), torch.nn.Sequential(*_with(backbone(), value))(x))
    for name in ("DLNPF", "DGN(x)", "DGN(1)", "DLGN(x)", "DLGN(1)"):
        net = gating_regimes.build(name, backbone)
        assert all(p.requires_grad for p in net.parameters())
        assert (net.value_input == "ones") == name.endswith("(1)")
        net(x).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
        if name.startswith("DLGN"):
            for forth, back in zip(net.gating(x), net.gating(-x), strict=True):
                torch.testing.assert_close(forth, -back)
    with pytest.raises(ValueError, match="FLNPF"):
        gating_regimes.build("FLNPF", backbone)


def _with(net, weights):
    for module, weight in zip((m for m in net if isinstance(m, torch.nn.Linear)), weights, strict=True):
        module.weight = weight
    return net
