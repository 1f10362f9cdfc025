"""The table of what papers published and what the records say."""

import copy

import pytest

from benchmarks import papers, record
from benchmarks.__main__ import main


def value(mean, std=0.0):
    return {"mean": mean, "std": std}


def made(experiment, results, epochs, images=50_000, seeds=1, **budget):
    """A record with one training of each of so many epochs."""
    rows = [{"network": name, "seed": 0, "epochs": n} for name, n in epochs.items()]
    return {
        "experiment": experiment,
        "device": "a device",
        "seeds": list(range(seeds)),
        "budget": {"train_images": images, **budget},
        "results": {**results, "trainings": rows},
    }


def head(accuracy, as_scored, published=None, step=1.0, epochs=15):
    return {
        "last_accuracy": accuracy,
        "last_accuracy_as_scored": as_scored,
        "published": published and dict(zip(("first", "last", "seconds"), published, strict=True)),
        "step_over_base": step,
        "epochs": value(epochs),
    }


@pytest.fixture
def vgg():
    networks = {
        "base": head(value(0.8012), value(0.7512), (0.4926, 0.7677, 400.0)),
        "ours": head(value(0.7, 0.01), value(0.7, 0.01), step=1.234, epochs=14),
        "reference": head(value(0.1), value(0.1), (0.1834, 0.7649, 404.0), step=0.9, epochs=1),
    }
    return made("summary_vgg", {"networks": networks}, dict.fromkeys(networks, 15), seeds=2)


def lines(*records, brief=False):
    return papers.markdown(list(records), brief).split("\n\n")[0].splitlines()[2:]


def missing(*records):
    return papers.markdown(list(records)).split("\n\n")[-1]


def test_heads(vgg):
    assert lines(vgg) == [
        "| `summary_vgg` | base, % | 76.8 (49.3 after 1 epoch) | 75.1, without dropout 80.1 "
        "| 15 epochs, 50,000 images, 2 seeds | a device |",
        "| `summary_vgg` | ours, % | - | 70.0 ± 1.0; time x 1.23 | 14 epochs, 50,000 images, 2 seeds | a device |",
        "| `summary_vgg` | reference, % | 76.5 (18.3 after 1 epoch); time x 1.01 | 10.0; time x 0.90 "
        "| 1 epoch, 50,000 images, 2 seeds | a device |",
    ]


def test_regimes_and_what_is_left_out_of_the_brief_table():
    row = {"epochs": value(2), "best_accuracy": value(0.5)}
    regimes = {"ReLU": row | {"published_best_accuracy": 0.8032}, "DLGN(x)": row | {"published_best_accuracy": None}}
    results = {
        "regimes": regimes,
        "dlgn_over_relu": {"DLGN(x)": 0.9},
        "published_dlgn_over_relu_more_than": 0.835,
        "compared_after_epoch": 1,
    }
    assert lines(made("gated_images-cifar10", results, {"ReLU": 2}, images=7)) == [
        "| `gated_images-cifar10` | ReLU, best epoch, % | 80.3 | 50.0 | 2 epochs, 7 images, 1 seed | a device |",
        "| `gated_images-cifar10` | DLGN(x), best epoch, % | - | 50.0 | 2 epochs, 7 images, 1 seed | a device |",
        "| `gated_images-cifar10` | DLGN(x) of ReLU, last epoch, % | > 83.5 | 90.0 | 1 epoch, 7 images, 1 seed | a device |",
    ]
    tree = {"ReLU network": {"last_accuracy": value(0.9), "epochs": value(3)}}
    tree["DLGN"] = tree["ReLU network"] | {"published_accuracy": 0.95}
    trees = made("oblique_trees", dict.fromkeys(("SDI", "SDII", "SDIII"), tree), {"DLGN": 3})
    assert len(lines(trees)) == 6 and lines(trees, brief=True) == [line for line in lines(trees) if ", DLGN, " in line]


def test_what_has_not_had_its_full_budget_is_said(vgg):
    told = "`summary_vgg` (15 epochs of 50,000 images)"
    assert told in missing() and told not in missing(vgg) and "`summary_cnn`" in missing(vgg)
    for change in (
        lambda one: one["budget"].update(train_images=7),
        lambda one: one["results"]["trainings"][1].update(epochs=14),
    ):
        less = copy.deepcopy(vgg)
        change(less)
        assert told in missing(less) and told not in missing(less, vgg)
    regimes = {"regimes": {}, "dlgn_over_relu": {}}
    cheap, published = (
        made("gated_images-cifar10", regimes, {"ReLU": 30}, network=f"stride={stride}")
        for stride in ("(2, 2)", "(1, 1)")
    )
    assert "`gated_images-cifar10`" in missing(cheap) and "`gated_images-cifar10`" not in missing(published)
    plane = {
        "neighbour_accuracy": {"new points": 0.9},
        "trustworthiness_of_new_points": 0.9,
        "exactness_float64": {"at_x": 1e-15},
    }
    phases = made(
        "mnist_tsne", {"planes": [plane]}, {"first": 20, "rest": 80}, images=60_000, phases={"first": 20, "rest": 80}
    )
    assert "100 epochs, 60,000 images" in lines(phases)[0] and "`mnist_tsne`" not in missing(phases)


@pytest.mark.parametrize(("page", "arguments"), [("README.md", ["--brief"]), ("docs/papers.md", [])])
def test_pages_say_what_the_records_say(page, arguments, tmp_path, capsys):
    text = (record.ROOT / page).read_text(encoding="utf-8")
    assert papers.markdown(papers.read(), brief=bool(arguments)) in text
    copied = tmp_path / "page.md"
    copied.write_text(text, encoding="utf-8")
    assert main(["papers", *arguments, "--page", str(copied)]) == 0
    assert copied.read_text(encoding="utf-8") == text
    copied.write_text("nothing", encoding="utf-8")
    assert main(["papers", *arguments, "--page", str(copied)]) == 2
    assert "has no lines '<!-- begin: python -m benchmarks papers" in capsys.readouterr().err
    assert main(["papers", *arguments]) == 0 and capsys.readouterr().out.strip() in text
