"""The table of what papers published and what the records say."""

import copy

import pytest

from benchmarks.__main__ import main
from benchmarks.experiments import gated_images, papers, summary_vgg
from benchmarks.records import environment


def value(mean, std=0.0):
    return {"mean": mean, "std": std}


def made(experiment, results, epochs, images=50_000, seeds=1, **budget):
    """A record with one training of each of so many epochs, from each seed."""
    rows = [{"network": name, "seed": seed, "epochs": n} for seed in range(seeds) for name, n in epochs.items()]
    return {
        "experiment": experiment,
        "device": "a device",
        "seeds": list(range(seeds)),
        "quick": False,
        "budget": {"train_images": images, "test_images": 10_000, "batch": 32, **budget},
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
    base, ours, reference = summary_vgg.STUDY.variants
    networks = {
        base: head(value(0.8012), value(0.7512), (0.4926, 0.7677, 400.0)),
        ours: head(value(0.7, 0.01), value(0.7, 0.01), step=1.234, epochs=14),
        reference: head(value(0.1), value(0.1), (0.1834, 0.7649, 404.0), step=0.9, epochs=1),
    }
    return made("summary_vgg", {"networks": networks}, dict.fromkeys(networks, 15), seeds=2)


def lines(*records, brief=False):
    return papers.markdown(list(records), brief).split("\n\n")[0].splitlines()[2:]


def missing(*records):
    return papers.markdown(list(records)).split("\n\n")[-1]


def test_heads(vgg):
    assert lines(vgg) == [
        "| `summary_vgg` | base head, % | 76.77 (49.26 after 1 epoch) | 75.1, without dropout 80.1 "
        "| 15 epochs, 50,000 images, 2 seeds | a device |",
        "| `summary_vgg` | summary head, orthogonal, % | - | 70.0 ± 1.0; time x 1.23 "
        "| 14 epochs, 50,000 images, 2 seeds | a device |",
        "| `summary_vgg` | summary head, reference's init, % | 76.49 (18.34 after 1 epoch); time x 1.01 | 10.0; time x 0.90 "
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
        "| `gated_images-cifar10` | ReLU, best epoch, % | 80.32 | 50.0 | 2 epochs, 7 images, 1 seed | a device |",
        "| `gated_images-cifar10` | DLGN(x), best epoch, % | - | 50.0 | 2 epochs, 7 images, 1 seed | a device |",
        "| `gated_images-cifar10` | DLGN(x) of ReLU, last epoch, % | > 83.5 | 90.0 | 1 epoch, 7 images, 1 seed | a device |",
    ]
    other = made("gated_images-cifar10", results, {"ReLU": 2}, images=7, batch=128)
    assert all("7 images, batch 128, 1 seed" in line for line in lines(other))
    tree = {"ReLU network": {"last_accuracy": value(0.9), "epochs": value(3)}}
    tree["DLGN"] = tree["ReLU network"] | {"published_accuracy": 0.9425}
    trees = made("oblique_trees", dict.fromkeys(("SDI", "SDII", "SDIII"), tree), {"DLGN": 3})
    assert len(lines(trees)) == 6 and lines(trees, brief=True) == [line for line in lines(trees) if ", DLGN, " in line]
    assert all("% | 94.25 |" in line for line in lines(trees, brief=True))


def test_what_a_record_lacks_has_no_line():
    tree = {"DLGN": {"last_accuracy": value(0.9), "epochs": value(3), "published_accuracy": 0.9605}}
    assert len(lines(made("oblique_trees", {"SDI": tree}, {"DLGN": 3}))) == 1
    assert lines(made("titanic", {"counts": {}}, {})) == []


def test_what_several_seeds_gave_is_their_mean_and_spread():
    def curve(area):
        return {kind: {"area": area, "standard_error": 0.5} for kind in ("deletion", "insertion")}

    networks = [
        {
            "exactness": {"float64": {"at_x": error, "away": 1e-15}},
            "bias": {"median_share_of_its_constant": share},
            "curves": {"exact": curve(share)},
            "layers": {"first": {"loss_over_that_of_a_random_P": {"random_net": share}}},
        }
        for share, error in ((0.1, 1e-16), (0.3, 3e-14))
    ]
    trained = {"base head": 15}
    found = lines(made("linearize_cifar10", {"networks": networks}, trained, seeds=2))
    assert [line.split(" | ")[3] for line in found] == [
        "3.0e-14 in float64", "20.0 ± 14.1", "exact 0.200 ± 0.141", "exact 0.200 ± 0.141",
    ]  # fmt: skip
    (found,) = lines(made("descramble_cifar10", {"networks": networks}, trained, seeds=2))
    assert found.split(" | ")[3:5] == ["random net 0.2 ± 0.141", "15 epochs, 50,000 images, 2 seeds"]
    planes = [
        {"neighbour_accuracy": {"new points": v}, "trustworthiness_of_new_points": v, "exactness_float64": {"at_x": v}}
        for v in (0.8, 0.9)
    ]
    phases = {"attraction x 4": 20, "t-SNE": 80}
    found = lines(made("mnist_tsne", {"planes": planes}, phases, batch=500, phases=phases, seeds=2))
    assert [line.split(" | ")[3] for line in found] == ["85.0 ± 7.1", "0.850 ± 0.071", "9.0e-01"]
    assert found[0].split(" | ")[4] == "100 epochs, 50,000 images, 2 seeds"


def test_what_has_not_had_its_full_budget_is_said(vgg):
    told = "`summary_vgg` (15 epochs of 50,000 images)"
    assert told in missing() and told not in missing(vgg) and "`summary_cnn`" in missing(vgg)
    for change in (
        lambda one: one["budget"].update(train_images=7),
        lambda one: one["budget"].update(test_images=20),
        lambda one: one.update(quick=True),
        lambda one: one["results"]["trainings"].pop(),
        lambda one: one["results"]["trainings"][1].update(epochs=14),
    ):
        less = copy.deepcopy(vgg)
        change(less)
        assert told in missing(less) and told not in missing(less, vgg)
    regimes = {"regimes": {}, "dlgn_over_relu": {}}
    epochs = dict.fromkeys(gated_images.REGIMES, 30)
    cheap, published = (
        made("gated_images-cifar10", regimes, epochs, network=f"stride={stride}", batch=128)
        for stride in ("(2, 2)", "(1, 1)")
    )
    told = "`gated_images-cifar10` (30 epochs of 50,000 images at batch 128, where 200 at batch 32 are published)"
    assert told in missing(cheap) and told not in missing(published)
    plane = {
        "neighbour_accuracy": {"new points": 0.9},
        "trustworthiness_of_new_points": 0.9,
        "exactness_float64": {"at_x": 1e-15},
    }
    epochs = {"attraction x 4": 20, "t-SNE": 80}
    phases = made("mnist_tsne", {"planes": [plane]}, epochs, images=60_000, phases=epochs, batch=500)
    assert "100 epochs, 60,000 images" in lines(phases)[0] and "`mnist_tsne`" not in missing(phases)


@pytest.mark.parametrize(("page", "arguments"), [("README.md", ["--brief"]), ("docs/papers.md", [])])
def test_pages_say_what_the_records_say(page, arguments, tmp_path, capsys):
    text = (environment.ROOT / page).read_text(encoding="utf-8")
    assert papers.markdown(papers.read(), brief=bool(arguments)) in text
    copied = tmp_path / "page.md"
    copied.write_text(text, encoding="utf-8")
    assert main(["papers", *arguments, "--page", str(copied)]) == 0
    assert copied.read_text(encoding="utf-8") == text
    copied.write_text("nothing", encoding="utf-8")
    assert main(["papers", *arguments, "--page", str(copied)]) == 2
    assert "has no lines '<!-- begin: python -m benchmarks papers" in capsys.readouterr().err
    assert main(["papers", *arguments]) == 0 and capsys.readouterr().out.strip() in text
