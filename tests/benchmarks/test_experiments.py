"""Each experiment from its command line, at a size for every run of the tests: its record must be true."""

import functools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from support import needs_records

from benchmarks import experiments
from benchmarks.experiments import (
    descent,
    dlgn_recovery,
    gated_images,
    head_comparison,
    images,
    oblique_trees,
    operator_learning,
    papers,
    path_kernel_theorems,
    physics_informed,
    tabular,
)
from benchmarks.records import environment, rows
from benchmarks.records.environment import ROOT
from benchmarks.timing import reference_networks
from interp_nn.explain.descramble.descrambler import Descrambler

KEYS = {
    "experiment", "git_sha", "device", "torch", "seeds", "epochs", "quick", "seconds", "budget", "figures", "results",
}  # fmt: skip
SMALL = ("--train-size", "40", "--test-size", "20", "--batch", "10")
PASSENGERS = "survived,pclass,name,sex,age,sibsp,parch,ticket,fare,cabin,embarked"
_run = functools.cache(environment._run)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No data from outside; no rendering, which is half of the time; few shuffles; a small vgg11; git is asked once."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())
    monkeypatch.setattr(Descrambler.nulls, "__defaults__", (4, 0))
    monkeypatch.setattr(environment, "_run", _run)
    thin = [width if isinstance(width, str) else max(8, width // 32) for width in reference_networks._VGG11]
    monkeypatch.setattr(reference_networks, "_VGG11", tuple(thin))
    vgg11 = reference_networks.ARCHITECTURES["vgg11"]
    monkeypatch.setitem(reference_networks.ARCHITECTURES, "vgg11", vgg11._replace(hidden=(64, 64)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, idx):
    """CIFAR-10, CIFAR-100, MNIST and the Titanic in one folder as users have them: stripes, the class in their height."""
    at = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)

    def pictures(n, channels, size):
        y = np.arange(n) % 10
        x = random.integers(0, 60, (n, channels, size, size)).astype(np.uint8)
        for image, label in zip(x, y, strict=True):
            image[:, 2 * label + 4 : 2 * label + 7] = 255
        return x, y

    for name, labels, files in (
        ("cifar10", b"labels", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]),
        ("cifar100", b"fine_labels", ["train", "test", "meta"]),
    ):
        (at / name).mkdir()
        for file in files:
            x, y = pictures(20, 3, 32)
            (at / name / file).write_bytes(pickle.dumps({b"data": x.reshape(20, -1), labels: y.tolist()}))
    for split in ("train", "t10k"):
        x, y = pictures(130, 1, 28)
        (at / f"{split}-images-idx3-ubyte").write_bytes(idx(x[:, 0]))
        (at / f"{split}-labels-idx1-ubyte").write_bytes(idx(y.astype(np.uint8)))
    people, lines = tabular.titanic(), [PASSENGERS]
    for i, (row, y) in enumerate(zip(people.x[::4].tolist(), people.y[::4].tolist(), strict=True)):
        which = 1 + min(row.index(1.0), 2)
        sex, age = ("female" if row[4] else "male"), ("" if i % 5 == 0 else 9 if row[5] else 20 + i % 40)
        lines.append(f'{int(y)},{which},"Doe, {i}",{sex},{age},{i % 3},0,T{i},{60 / which},,{"SCQ"[i % 3]}')
    (at / "titanic.csv").write_text("\r\n".join(lines))
    return at


@pytest.fixture
def run(tmp_path):
    """Run an experiment and return its record."""

    def run(name, *arguments, record=None, status=0):
        assert experiments.find(name)(["--quick", "--output", str(tmp_path), *map(str, arguments)]) == status
        found = json.loads((tmp_path / f"{record or name}.json").read_text(), parse_constant=pytest.fail)
        assert set(found) >= KEYS and found["experiment"] == (record or name) and found["quick"] and found["figures"]
        assert (found["git_sha"] is not None) == (ROOT / ".git").exists()  # which a source archive lacks
        assert all((tmp_path / figure).exists() for figure in found["figures"])
        if (record or name) in papers._READERS:
            assert papers.markdown([found])
        return found

    return run


def test_digits_attribution(run):
    found = run("digits-attribution", record="digits_attribution")["results"]
    for dtype, close in (("float32", 1e-5), ("float64", 1e-12)):
        assert all(error <= close for error in found["exactness"][dtype].values())
    near = found["error_over_change_by_step"]["images with noise of 0.01"]
    assert near["1e-06"] <= 1e-6 < near["0.01"] and found["bias"]["sum_of_layers_error"] <= 1e-10
    deletion = found["deletion"]
    assert deletion["most supporting"][0] == deletion["least supporting"][0] == found["test_accuracy"] > 0.3
    assert deletion["most supporting"][2] < deletion["least supporting"][2]


def test_digits_tsne(run):
    found = run("digits_tsne")["results"]
    assert found["exactness_float64"]["at_x"] <= 1e-12
    assert found["exactness_float64"]["step_1e-6_error_over_change"] <= 1e-6
    assert found["divergence"][-1] < found["divergence"][0] and found["neighbour_accuracy"]["fitted points"] > 0.2


def test_two_regimes(run):
    found = run("two_regimes")["results"]
    assert found["check"] <= 1e-12 and 0 < found["mse"] < 0.2 * found["variance"]
    assert sum(found["merged"]["samples"]) == found["samples"] == 500 and 0.9 < found["merged"]["r2"] <= 1
    for name, median in found["median_coefficients"].items():
        assert median == pytest.approx(found["truth"][name], abs=0.3)


@pytest.mark.slow
def test_few_clusters(run):
    found = run("few_clusters")["results"]
    assert list(found) == ["breast cancer", "wine", "diabetes", "digits"]
    for one in found.values():
        (row,) = one["rows"]
        assert row["check"] <= 1e-11 and row["single"] <= row["clusters"] <= row["samples"]
        assert 1 <= row["merged_0.95"] <= row["merged_0.99"] <= 12 and 0.6 < row["r2_0.95"] <= 1


def test_titanic(run, folder):
    found = run("clusters_titanic", "--data", folder, record="titanic")["results"]
    counts, people = found["counts"], found["passengers"]
    assert counts["people"] == 2201 and counts["distinct_rows"] == 14 and counts["check"] <= 1e-12
    assert counts["best_accuracy_of_any_rule"] == 1740 / 2201 >= counts["accuracy"] > 0.7
    assert people["passengers"] == {"fitted": 441, "held_out": 110} and people["check"] <= 1e-12
    assert max(people["importance"], key=people["importance"].get) == "female"
    for one in people["splits"].values():
        assert 0.6 < one["accuracy"]["mean"] < 1 and 0.6 < one["auc"]["mean"] < 1
    assert set(run("titanic")["results"]) == {"counts"}  # without --data


def test_oblique_trees(run):
    record = run("oblique_trees", "--datasets", "SDI", "--epochs", "3")
    trainings = record["results"]["trainings"]
    assert set(record["epochs"]["SDI"].values()) == {3} and [row["epochs"] for row in trainings] == [3] * 3
    for row in trainings[:2]:
        best = row["gates"]["best_cosines"]
        assert len(best) == 15 and row["gates"]["found"] == sum(value >= 0.99 for value in best)
    assert record["results"]["SDI"]["DLGN-SF"]["published_accuracy"] == 0.9743


@pytest.mark.slow
def test_the_gates_of_a_dlgn_become_the_trees_hyperplanes(tmp_path):
    assert oblique_trees.main(["--output", str(tmp_path), "--datasets", "SDI", "--seeds", "1"]) == 0
    results = json.loads((tmp_path / "oblique_trees.json").read_text())["results"]
    found = results["SDI"]["DLGN-SF"]
    assert found["last_accuracy"]["mean"] >= 0.96 and found["hyperplanes_found"] == [15]
    assert found["last_accuracy"]["mean"] > results["SDI"]["ReLU network"]["last_accuracy"]["mean"]
    assert results["trainings"][0]["gates"]["mean_best_cosine_of_random_gates"] < 0.7


def test_gated_tables(run):
    results = run("gated_tables")["results"]
    assert set(results) == {"breast cancer", "wine", "titanic", "SDI"}
    for found in results.values():
        assert found["pruned tree"]["leaves"]["mean"] <= min(16, found["tree"]["leaves"]["mean"])
        assert all(0.3 < one["accuracy"]["mean"] <= 1 for one in found.values())
        assert 0.5 < found["tree"]["fidelity"]["mean"] <= 1
    assert results["titanic"]["tree"]["fidelity"]["mean"] > 0.95


def test_gated_digits(run):
    found = run("gated_digits", "--epochs", "1")["results"]
    assert len(found["regimes"]) == 11 and all(row["meaning"] for row in found["regimes"].values())
    for name in ("FRNPF (II)", "FRNPF (DI)", "FLNPF"):  # fixed gates keep their kernel
        assert found["alignment"][name]["before"] == found["alignment"][name]["after"]
    assert found["alignment"]["FLNPF"]["before"] == found["alignment"]["ReLU"]["after"]
    assert found["alignment"]["DLGN(1)"]["before"] != found["alignment"]["DLGN(1)"]["after"]
    assert all(0.9 < row["mean"] <= 1 for row in found["kernel_machines"].values())


def test_orthogonality(run):
    found = run("orthogonality", "--epochs", "1")["results"]
    defect = {name: row["defect"]["mean"] for name, row in found["ways"].items() if name != "nn.Linear"}
    assert max(defect["parametrization"], defect["retract"]) < 1e-5 and 0.05 < defect["penalty"] < defect["free"]
    assert all(row["step"]["ms_p50"] > 0 and row["last_accuracy"]["mean"] > 0.2 for row in found["ways"].values())


def test_no_descent_passes_the_closed_form(run, monkeypatch):
    found = run("descent")["results"]
    assert found["closed_form_at_most_best_descent"]
    for trial in found["trials"]:
        assert trial["closed"]["error_of_its_loss"] <= 1e-10 and trial["closed"]["error_of_orthogonality"] <= 1e-12
        best = min(one["loss"] for one in trial["descents"])
        assert trial["best_of_descents"] == best >= trial["closed"]["loss"] * (1 - 1e-10)
    descend = descent.descend
    monkeypatch.setattr(descent, "QUICK", (descent.Size(8, 1, 1, 0.2),))
    monkeypatch.setattr(descent, "descend", lambda *a, **k: descend(*a, **k)._replace(loss=0.0))
    assert not run("descent", status=1)["results"]["closed_form_at_most_best_descent"]


def test_descrambling_where_the_answer_is_known(run):
    found = run("descramble_linear")["results"]
    assert found["isotropic"]["error_of_weights"][1] <= 0.15 < found["isotropic"]["error_of_weights"][0]
    shares = found["tree"]["share_in_its_level"]
    assert min(shares["trained"]) >= 0.99 > 0.9 > min(shares["untrained"]) and found["tree"]["ambiguity"]["rank"] == 8
    for layer in (1, 2):
        names = (f"{name}, layer {layer}" for name in ("all shifts", "as many drawn", "places mixed"))
        exact, drawn, mixed = (found["convolution"][name] for name in names)
        assert exact["largest_share"]["least"] >= 0.9999 and exact["frequencies"] == exact["frequencies_by_power"]
        assert mixed["largest_share"]["mean"] < drawn["largest_share"]["mean"] < 0.9999


def test_descrambling_a_network_of_signals(run):
    found = run("descramble_signals")["results"]
    assert found["training_loss"][1] < found["training_loss"][0]
    for layer, nulls in found["nulls"].items():
        assert 0 < nulls["fitted"] < nulls["shuffled"] < 1 and nulls["fitted"] <= 1.001 * nulls["held_out"]
        assert sum(found["waves"][layer]["descrambled"]["energies"]) == pytest.approx(1)
        assert abs(found["waves"][layer]["by random P"]["order"]["mean"]) < 0.15


def test_operator_learning(run):
    found = run("operator_learning")["results"]
    assert {row["inputs"] for row in found["trainings"]} == {"white", "small start", "smooth", "shuffled"}
    for row in found["trainings"]:
        assert all(0 < p <= 1 for p in row["p"].values())
        assert row["operator_gains"] == sorted(row["operator_gains"], reverse=True) and row["operator_gains"][0] == 1


def test_physics_informed(run):
    layers = run("physics_informed")["results"]["networks"]["residual"]["layers"]
    assert all(0 < row[basis]["mean"] <= 1 for row in layers.values() for basis in ("sines", "polynomials"))


@pytest.mark.slow
def test_a_linear_network_from_a_small_start_has_the_operators_modes_and_spectrum():
    cell = operator_learning.Cell("Poisson, ring", "small start", "linear", 0)
    row = operator_learning.measured(cell, (8192, 500), operator_learning.RECIPE, 9)
    assert row["measures"]["overlap of input filters"] > 0.95 and row["energy_exponent"] == pytest.approx(1, abs=0.15)
    assert row["gains"][:4] == pytest.approx(row["operator_gains"][:4], rel=0.05) and row["test_error"] < 1e-6


def test_path_kernel_theorems(run):
    found = run("path_kernel_theorems")["results"]
    invariant, *others = found["shifts"].values()
    assert invariant["largest"] <= 1e-12 and all(row["largest"] > 1e-3 for row in others)
    for row in found["skips"].values():
        assert row["relative_error"] <= 1e-12 < row["without_the_longest"]
        assert sum(row["share_of_trace_by_length"]) == pytest.approx(1)
    assert found["skips"]["dense"]["relative_error_by_gates"] <= 1e-12
    assert found["cost"]["relative_error"] <= 1e-5 and found["alignment"]["samples"] == 30


@pytest.mark.parametrize(
    ("module", "page"),
    [(operator_learning, "operators.md"), (physics_informed, "operators.md"), (path_kernel_theorems, "path_kernel.md")],
)
def test_a_page_has_the_tables_of_its_record(module, page):
    record = ROOT / "benchmarks" / "results" / "cpu" / "experiments" / f"{module.NAME}.json"
    results = json.loads(record.read_text(encoding="utf-8"))["results"]
    assert module.markdown(results) in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_descrambling_digits(run):
    found = run("descramble_digits")["results"]
    assert all(0 < nulls["fitted"] < nulls["shuffled"] for nulls in found["nulls"].values())
    function = found["function"]
    assert max(function["orthogonal, latent"].values()) <= 1e-12
    assert "ReLU" in function["orthogonal, hidden layer"]["refused"]
    assert function["orthogonal, hidden layer"]["error_of_logits"] > 0.01
    assert function["order, hidden layer"]["error_of_logits"] <= 1e-12


def test_heads_of_vgg11_and_the_network_of_their_checkpoint(run, folder, tmp_path, capsys):
    arguments = ["--data", folder, *SMALL, "--checkpoints", tmp_path / "checkpoints"]
    record = run("summary-vgg", *arguments, record="summary_vgg")
    trained, (base, ours, reference) = record["results"]["trainings"], record["results"]["networks"].values()
    assert (base["published"]["last"], ours["published"], reference["published"]["last"]) == (0.7677, None, 0.7649)
    for row in (base, ours, reference):
        assert row["step_over_base"] == pytest.approx(row["step"]["ms_p50"] / base["step"]["ms_p50"])
    assert base["defect"] is None and ours["defect"]["mean"] < 0.5 < reference["defect"]["mean"]
    assert ours["last_accuracy"] == ours["last_accuracy_as_scored"]  # without dropout

    linearized = run("linearize_cifar10", *arguments)["results"]
    assert [row["history"] for row in linearized["trainings"]] == [trained[0]["history"]]  # the checkpoint's
    (one,) = linearized["networks"]
    for dtype, close in (("float32", 1e-5), ("float64", 1e-12)):
        assert all(error <= close for error in one["exactness"][dtype].values())
    assert one["exact_minus_gradient_times_input"] <= 1e-5 and one["bias"]["sum_of_layers_error"] <= 1e-10

    descrambled = run("descramble_cifar10", *arguments)["results"]
    assert [row["history"] for row in descrambled["trainings"]] == [trained[0]["history"]]
    (one,) = descrambled["networks"]
    for layer in one["layers"].values():
        loss = layer["loss_over_that_of_a_random_P"]
        assert layer["error_against_the_bound"] <= 1e-5 and 0 < loss["fitted"] < loss["shuffled"]
    assert all(order["error_of_logits"] <= 1e-5 for order in one["order"].values())
    other = ["--quick", "--output", tmp_path, *arguments, "--test-size", "10"]
    assert experiments.find("linearize_cifar10")([*map(str, other)]) == 2
    assert "a checkpoint of another training, {'test_images': 20} instead of" in capsys.readouterr().err


def test_heads_of_the_small_cnn(run, folder):
    results = run("summary_cnn", "--data", folder)["results"]
    assert list(results["networks"]) == list(head_comparison.STUDIES["summary_cnn"].variants)
    first = {row["network"]: row["history"]["loss"][0] for row in results["trainings"]}
    assert first["summary, orthogonal"] < 10 < 100 < first["summary, reference's init"]  # of an outlying singular value
    assert (
        0 < first["summary, orthogonal, reconstruction"] - first["summary, orthogonal"] < 2
    )  # the share that is missed
    explained = {row["network"]: row["history"].get("explained_variance") for row in results["trainings"]}
    assert explained["base head"] is None and 0 < explained["summary, orthogonal"][-1] <= 1


def test_a_variant_and_a_seed_of_the_small_cnn_are_a_row(folder, tmp_path, capsys):
    arguments = [
        "--quick",
        "--data",
        str(folder),
        "--output",
        str(tmp_path),
        "--variant",
        head_comparison.BASE,
        "--seed",
        "2",
    ]
    for _ in range(2):  # the second time it is there
        assert experiments.find("summary_cnn")(arguments) == 0
        (row,) = rows.lines(tmp_path / "summary_cnn.jsonl")
        assert f"base head, seed 2: {row['last_accuracy']:.2%} after the last epoch" in capsys.readouterr().out
    assert (row["network"], row["seed"], row["epochs"], row["train_images"]) == (head_comparison.BASE, 2, 1, 32)
    assert not (tmp_path / "summary_cnn.json").exists()


def test_mnist_tsne(run, folder, tmp_path, capsys):
    arguments = ["--data", folder, "--train-size", "130", "--checkpoints", tmp_path / "checkpoints"]
    record = run("mnist_tsne", *arguments)
    assert record["results"]["points"] == {"fitted": 120, "new": 60}  # whole batches
    assert [(r["network"], r["epochs"]) for r in record["results"]["trainings"]] == [
        ("attraction x 4", 1),
        ("t-SNE", 4),
    ]
    (plane,) = record["results"]["planes"]
    assert plane["exactness_float64"]["at_x"] <= 1e-12 and plane["divergence"][-1] < plane["divergence"][0]
    assert run("mnist_tsne", *arguments)["results"] == record["results"]  # from the checkpoints
    with pytest.raises(SystemExit):
        run("mnist_tsne", "--data", folder, "--perplexity", "60")
    assert "--perplexity: got 60 for batches of 60 images" in capsys.readouterr().err


def test_gated_images_stop_in_time_and_go_on_as_if_they_had_not(run, folder, tmp_path):
    def trained(*more):
        return run("gated_images", *arguments, *more, record="gated_images-mnist")

    arguments = ["--dataset", "mnist", "--data", folder, "--train-size", "0", "--epochs", "2"]
    whole = trained()
    assert whole["results"]["regimes"]["ReLU"]["published_best_accuracy"] == 0.9814
    assert [row["network"] for row in whole["results"]["trainings"]] == list(gated_images.REGIMES)
    arguments += ["--checkpoints", tmp_path / "checkpoints"]
    cut = trained("--minutes", "1e-6")
    assert {row["epochs"] for row in cut["results"]["trainings"]} == {1} and cut["epochs"] == 2
    for ours, theirs in zip(trained()["results"]["trainings"], whole["results"]["trainings"], strict=True):
        assert ours["history"]["loss"] == theirs["history"]["loss"] and ours["epochs"] == 2


def test_gated_images_of_100_classes(run, folder):
    record = run(
        "gated-images", "--dataset", "cifar100", "--data", folder, "--train-size", "4", "--test-size", "4", "--batch", "4",
        record="gated_images-cifar100",
    )  # fmt: skip
    assert record["results"]["published_dlgn_over_relu_more_than"] == 0.835
    assert "out_features=100" in record["budget"]["network"] and record["budget"]["network"].count("(2, 2)") == 2


def test_each_training_of_dlgn_cifar10_is_a_row(folder, tmp_path, monkeypatch):
    def units(*arguments, name="dlgn-cifar10", dtype=torch.bfloat16):
        monkeypatch.setattr(images, "compute_dtype", lambda device: dtype)
        given = ["--quick", "--data", folder, "--output", tmp_path, "--checkpoints", tmp_path / "kept", *arguments]
        assert experiments.find(name)([*map(str, given)]) == 0
        return rows.lines(tmp_path / f"{name.replace('dlgn-', 'dlgn_recovery-')}.jsonl")

    (relu,) = units("--regime", "ReLU", "--seed", "1")
    assert (relu["network"], relu["seed"], relu["epochs"], relu["decay"]) == ("ReLU", 1, 1, True)
    assert relu["best_accuracy"] == max(relu["history"]["accuracy"]) and relu["dtype"] == "bfloat16"
    found = units("--regime", "FLNPF", "--seed", "1")
    assert found[0] == relu and [row["network"] for row in found] == ["ReLU", "FLNPF"]  # ReLU is not trained again
    kept = {name: torch.load(file)["network"] for name in ("ReLU", "FLNPF") for file in _checkpoints(tmp_path, name)}
    assert all(
        torch.equal(kept["FLNPF"][f"gating.{name}"], w) for name, w in kept["ReLU"].items() if name != "14.weight"
    )
    wanted = [*((name, 0) for name in dlgn_recovery.REGIMES), ("DLGN(x)", 1), ("DLGN(1)", 1)]
    assert [(row["network"], row["seed"]) for row in units("--seeds", "2")[2:]] == wanted
    (other,) = units("--regime", "DLGN(1)", name="dlgn-cifar100", dtype=torch.float32)
    assert (other["dataset"], other["dtype"]) == ("cifar100", "float32")
    assert other["last_accuracy_float32"] == other["last_accuracy"]


def _checkpoints(folder, network):
    return (folder / "kept").glob(f"dlgn-recovery-cifar10-{network}*1.pt")


def test_dlgn_of_images_that_are_not_there(capsys):
    assert experiments.find("dlgn-cifar100")([]) == 2
    assert "not run, no data: cifar100: no folder given; pass --data DIR" in capsys.readouterr().err


@needs_records
def test_the_page_of_papers_says_what_the_records_say(tmp_path, capsys):
    from benchmarks.__main__ import main

    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    copied = tmp_path / "page.md"
    copied.write_text(text, encoding="utf-8")
    assert main(["papers", "--page", str(copied)]) == 0 and copied.read_text(encoding="utf-8") == text
    copied.write_text("nothing", encoding="utf-8")
    assert main(["papers", "--page", str(copied)]) == 2
    assert "has no lines '<!-- begin: python -m benchmarks papers" in capsys.readouterr().err


def test_the_recovered_share_is_that_of_the_same_seeds(tmp_path):
    shared = {
        "dataset": "cifar10",
        "epochs": 12,
        "batch": 64,
        "train_images": 50_000,
        "test_images": 9,
        "device": "a device",
    }
    units = [
        ("ReLU", 0, 0.5),
        ("ReLU", 1, 0.8),
        ("DLGN(x)", 0, 0.4),
        ("DLGN(x)", 1, 0.8),
        ("DLGN(x)", 2, 0.9),
        ("FLNPF", 1, 0.6),
    ]
    rows = [{**shared, "network": name, "seed": seed, "last_accuracy": found} for name, seed, found in units]
    file = tmp_path / "a_device" / "experiments" / "dlgn_recovery-cifar10.jsonl"
    file.parent.mkdir(parents=True)
    rows.insert(0, {**rows[2], "epochs": 1, "last_accuracy": 0.1})  # of another budget
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = papers.markdown(papers.read(tmp_path))
    assert (
        page.count("| DLGN(x) of ReLU, last epoch, % | > 83.5 | 90.0 ± 14.1 | 12 epochs, 50,000 images, 3 seeds |") == 2
    )
    assert (
        page.count("| FLNPF of ReLU, last epoch, % | - | 75.0 | 12 epochs, 50,000 images, 1 seed |") == 1
    )  # no headline


def test_seeds_of_a_head_are_lines_of_the_table(tmp_path):
    shared = {"epochs": 15, "batch": 32, "train_images": 50_000, "test_images": 10_000, "device": "a device"}
    units = [
        ("base head", 0, 0.7, {}),
        ("base head", 1, 0.8, {}),
        ("summary, orthogonal", 0, 0.75, {"explained_variance": [0.5, 0.25]}),
    ]
    file = tmp_path / "a_device" / "experiments" / "summary_cnn.jsonl"
    file.parent.mkdir(parents=True)
    lines = [
        {**shared, "network": name, "seed": seed, "last_accuracy": accuracy, "history": history}
        for name, seed, accuracy, history in units
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    page = papers.markdown(papers.read(tmp_path))
    assert page.count("| base head, last epoch, % | 70.41 | 75.0 ± 7.1 | 15 epochs, 50,000 images, 2 seeds |") == 2
    assert page.count("| summary, orthogonal: variance of the features in its codes, % | - | 25.0 | 15 epochs") == 1


@needs_records
@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("titanic", lambda record: record.pop("experiment"), "has no key 'experiment'"),
        ("titanic", lambda record: record.pop("device"), "has no key 'device'"),
        ("gated_images-mnist", lambda record: record["budget"].pop("train_images"), "has no key 'train_images'"),
        ("summary_cnn", lambda record: record["results"].pop("networks"), "has no key 'networks'"),
        ("summary_cnn", lambda record: record["results"].update(networks={}), "generator raised StopIteration"),
        ("mnist_tsne", lambda record: record["results"].update(planes=[]), "list index out of range"),
        ("mnist_tsne", lambda record: record.update(results=None), "'NoneType' object is not subscriptable"),
    ],
)
def test_a_record_that_lacks_a_key_is_named_in_one_line(file, change, told, tmp_path, capsys, monkeypatch):
    from benchmarks.__main__ import main

    source = next((ROOT / "benchmarks" / "results").glob(f"*/experiments/{file}.json"))
    record = json.loads(source.read_text(encoding="utf-8"))
    change(record)
    (tmp_path / "a_device" / "experiments").mkdir(parents=True)
    broken = tmp_path / "a_device" / "experiments" / f"{file}.json"
    broken.write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(papers, "read", functools.partial(papers.read, tmp_path))
    assert main(["papers"]) == 2
    assert capsys.readouterr().err == f"benchmarks papers: {broken}: {told}\n"


@pytest.mark.parametrize(
    "less",
    [{"train_images": 7}, {"test_images": 20}, {"quick": True}, {"epochs": 14}, {"network": "stride=(2, 2)"}],
    ids=str,
)
def test_a_smaller_budget_is_not_the_full_one(less):
    def record(change):
        row = {"network": "base", "seed": 0, "epochs": change.get("epochs", 30)}
        budget = {"train_images": 50_000, "test_images": 10_000, "batch": 128, **change}
        results = {"regimes": {}, "dlgn_over_relu": {}, "trainings": [row]}
        rest = {"device": "a device", "seeds": [0], "quick": "quick" in change, "budget": budget, "results": results}
        return {"experiment": "gated_images-cifar10", **rest}

    told = "`gated_images-cifar10` (30 epochs of 50,000 images at batch 128, where 200 at batch 32 are published)"
    assert told in papers.markdown([record(less)]) and told not in papers.markdown([record({})])
