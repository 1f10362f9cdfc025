"""Each experiment from its command line, at sizes small enough for every run of the tests: what it records must be true."""

import json

import pytest

from benchmarks import tables
from benchmarks.experiments import digits_attribution, digits_tsne, titanic, two_regimes

HEADER = "survived,pclass,name,sex,age,sibsp,parch,ticket,fare,cabin,embarked"


@pytest.fixture(autouse=True)
def _without_data(monkeypatch):
    monkeypatch.delenv("INTERP_NN_DATA", raising=False)


def run(experiment, folder, *arguments):
    """The record's results; the figures that it names are there, and small."""
    assert experiment.main(["--quick", "--output", str(folder), *arguments]) == 0
    record = json.loads((folder / f"{experiment.NAME}.json").read_text())
    assert record["experiment"] == experiment.NAME and record["quick"] and record["git_sha"] is not None
    assert sorted(record["figures"]) == sorted(file.name for file in folder.glob("*.png")) and record["figures"]
    for name in record["figures"]:
        figure = (folder / name).read_bytes()
        assert figure.startswith(b"\x89PNG") and len(figure) < 200_000
    return record["results"]


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
    people = tables.titanic()
    lines = [HEADER]
    for i, (row, y) in enumerate(zip(people.x[::8].tolist(), people.y[::8].tolist(), strict=True)):
        which = 1 + min(row.index(1.0), 2)
        sex, age = ("female" if row[4] else "male"), ("" if i % 5 == 0 else 9 if row[5] else 20 + i % 40)
        lines.append(f'{int(y)},{which},"Doe, {i}",{sex},{age},{i % 3},0,T{i},{60 / which},,{"SCQ"[i % 3]}')
    data = tmp_path / "data" / "titanic"
    data.mkdir(parents=True)
    (data / "titanic.csv").write_text("\r\n".join(lines))
    output = tmp_path / "output"
    results = run(titanic, output, "--data", str(tmp_path / "data"))["passengers"]
    assert results["passengers"] == {"fitted": 221, "held_out": 55}
    assert results["held_out"]["accuracy"] > 0.6 and results["check"] <= 1e-12
    assert max(results["importance"], key=results["importance"].get) == "female"
    assert "221 passengers" in capsys.readouterr().out


def test_passengers_are_read_as_they_are(tmp_path):
    rows = ["1,1,A,female,30,1,2,T,7.25,,C", "0,3,B,male,,0,0,T,0,,S", "0,2,C,male,50,0,1,T,20,,"]
    (tmp_path / "titanic.csv").write_text("\n".join([HEADER, *rows]))
    x, y, features = titanic.read_passengers(tmp_path)
    column = dict(zip(features, x.T.tolist(), strict=True))
    assert y.tolist() == [1, 0, 0]
    assert column["1st class"] == [1, 0, 0] and column["3rd class"] == [0, 1, 0] and column["female"] == [1, 0, 0]
    assert column["age unknown"] == [0, 1, 0] and column["from C"] == [1, 0, 0] and column["from Q"] == [0, 0, 0]
    age = column["age"]
    assert age[1] == age[0] < age[2]  # the lower median of 30 and 50
    for name in ("age", "fare", "siblings, spouse", "parents, children"):
        assert sum(column[name]) == pytest.approx(0, abs=1e-12)
        assert sum(v**2 for v in column[name]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "titanic: not found in"),
        ("survived,sex\n1,male", "has no column pclass, age, sibsp, parch, fare, embarked"),
        (HEADER, "has no passenger of known age"),
        (HEADER + "\n1,4,A,male,1,0,0,T,1,,S", "line 2: survived, pclass and sex are '1', '4', 'male'"),
    ],
)
def test_missing_or_broken_passengers_are_named(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "titanic.csv").write_text(text)
    assert titanic.main(["--data", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
