"""The papers' tables from their command lines, on made images and a thin vgg11: what they record must be true."""

import json
import pickle

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients
from torch import nn

from benchmarks.experiments import (
    attributions,
    common,
    descramble_cifar10,
    embedding,
    gated_images,
    head_comparison,
    linearize_cifar10,
    mnist_tsne,
    papers,
    summary_cnn,
    summary_vgg,
)
from benchmarks.timing import reference_networks
from interp_nn.convert import head_from_reference
from interp_nn.nn import SummaryHead

KEYS = {"experiment", "git_sha", "device", "versions", "seeds", "epochs", "seconds", "budget", "results"}


@pytest.fixture(autouse=True)
def _without_data(monkeypatch):
    monkeypatch.delenv("INTERP_NN_DATA", raising=False)


@pytest.fixture
def thin(monkeypatch):
    """A vgg11 of few channels."""
    pools = [width if isinstance(width, str) else max(8, width // 32) for width in reference_networks._VGG11]
    monkeypatch.setattr(reference_networks, "_VGG11", tuple(pools))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, idx):
    """CIFAR-10, CIFAR-100 and MNIST in one folder as users have it: stripes, the class in their height."""
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
            x, y = pictures(40, 3, 32)
            (at / name / file).write_bytes(pickle.dumps({b"data": x.reshape(40, -1), labels: y.tolist()}))
    for split in ("train", "t10k"):
        x, y = pictures(240, 1, 28)
        (at / f"{split}-images-idx3-ubyte").write_bytes(idx(x[:, 0]))
        (at / f"{split}-labels-idx1-ubyte").write_bytes(idx(y.astype(np.uint8)))
    return at


def recorded(experiment, output, folder, *arguments, name=None):
    """The record; the figures that it names are there."""
    name = name or experiment.NAME
    assert experiment.main(["--quick", "--data", str(folder), "--output", str(output), *arguments]) == 0
    record = json.loads((output / f"{name}.json").read_text())
    assert set(record) >= KEYS and record["experiment"] == name
    assert record["figures"]
    for figure in record["figures"]:
        assert (output / figure).read_bytes().startswith(b"\x89PNG")
    assert f"| `{name}` | " in papers.markdown([record])
    return record


def test_the_heads_of_vgg11_of_which_one_is_explained(thin, folder, tmp_path, capsys):
    arguments = ["--train-size", "60", "--test-size", "20", "--batch", "10", "--epochs", "2"]
    arguments += ["--checkpoints", str(tmp_path / "checkpoints")]
    record = recorded(summary_vgg, tmp_path, folder, *arguments)
    assert record["seeds"] == [0] and record["epochs"] == 2
    assert {**record["budget"], "initialisation": "", "published": ""} == {
        "epochs": 2, "batch": 10, "learning_rate": 1e-4, "minutes": None, "train_images": 60, "test_images": 20,
        "tf32_in_convolutions": False,         "initialisation": "", "published": "",
    }  # fmt: skip
    results = record["results"]
    assert list(results["networks"]) == list(summary_vgg.STUDY.variants)
    base, ours, reference = results["networks"].values()
    assert (
        base["published"]["last"] == 0.7677 and reference["published"]["last"] == 0.7649 and ours["published"] is None
    )
    for row in (base, ours, reference):
        assert row["step"]["ms_p50"] > 0 and row["epochs"]["mean"] == 2
        assert row["step_over_base"] == pytest.approx(row["step"]["ms_p50"] / base["step"]["ms_p50"])
    for row in (ours, reference):  # without dropout there is one way to score
        assert row["last_accuracy_as_scored"] == row["last_accuracy"]
    assert base["defect"] is None and ours["defect"]["mean"] < 0.5 < reference["defect"]["mean"]
    trainings = results["trainings"]
    assert trainings[1]["before"]["defect"] < 1e-5
    off, step = results["aims"].values()
    compared = results["accuracy_compared"]
    assert off["accuracy_minus_base"] == pytest.approx(
        compared["summary head, orthogonal"]["mean"] - compared["base head"]["mean"]
    )
    assert off["holds"] == (abs(off["accuracy_minus_base"]) <= 0.015)
    assert step["holds"] == (ours["step_over_base"] <= 1.02)
    assert "as scored" in capsys.readouterr().out

    # The network is that of the checkpoint, its training seconds too.
    found = recorded(linearize_cifar10, tmp_path, folder, *arguments)["results"]
    assert [row["history"] for row in found["trainings"]] == [trainings[0]["history"]]
    assert [part["epochs"] for part in found["trainings"][0]["made"]] == [2]
    for experiment in (summary_vgg, linearize_cifar10, descramble_cifar10):
        with pytest.raises(ValueError, match=r"a checkpoint of another training, \{'test_images': 20\} instead of"):
            experiment.main(
                ["--quick", "--data", str(folder), "--output", str(tmp_path), *arguments, "--test-size", "10"]
            )


def test_the_heads_of_the_small_cnn(folder, tmp_path, capsys):
    record = recorded(summary_cnn, tmp_path, folder)
    results = record["results"]
    assert list(results["networks"]) == list(summary_cnn.STUDY.variants)
    published = [row["published"] and row["published"]["last"] for row in results["networks"].values()]
    assert published == [0.7041, None, None, None, 0.6456]
    first = {row["network"]: row["history"]["loss"][0] for row in results["trainings"]}
    assert (
        first["summary, orthogonal"] < 10 < 100 < first["summary, reference's init"]
    )  # of one outlying singular value
    assert "at this budget" in capsys.readouterr().out


def test_an_accuracy_with_dropout_is_another():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(48, 3)).eval()
    x = torch.randn(200, 3, 4, 4)
    chosen = head_comparison.data.Images("made", x, x, x, network(x).argmax(1))
    found = head_comparison.measures(chosen, network)
    assert found["accuracy"] == 1 > 0.8 > found["accuracy_as_scored"] and not network.training


def test_the_body_without_relu():
    network = head_comparison.build(summary_cnn.STUDY, "no ReLU: summary, orthogonal")
    kinds = [type(layer).__name__ for layer in network.body]
    assert kinds == ["Conv2d", "MaxPool2d"] * 2 + ["Flatten"]
    x = torch.randn(2, 3, 32, 32)
    assert network.eval()(x).shape == (2, 10)


def test_the_references_b_is_drawn_and_trained_as_the_reference_does():
    torch.manual_seed(0)
    head = SummaryHead(512, 100, 10)
    head_comparison.as_reference_(head)
    W, c = head.parametrizations.weight.original, head.parametrizations.weight[0].c
    for drawn in (W, c):
        assert drawn.abs().max() <= 512**-0.5 and drawn.std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.15)
    names = ("layer.beta_func1.weight", "layer.beta_func1.bias", "output.weight", "output.bias")
    loaded = head_from_reference(dict(zip(names, (W, c, head.output.weight, head.output.bias), strict=True)))
    assert torch.equal(loaded.weight, head.weight)
    spectrum = head.spectrum()
    assert spectrum[0] > 5 and spectrum[1] < 1
    head.loss(torch.randn(4, 512), torch.arange(4)).backward()
    torch.testing.assert_close(c.grad, W.grad.sum(1))
    assert c.grad.abs().sum() > 0


def test_vgg11_begins_as_the_references():
    torch.manual_seed(0)
    layer = reference_networks.vgg11_body(3, 32)[3]
    assert layer.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert not layer.bias.any()


def test_linearize_cifar10(thin, folder, tmp_path, capsys):
    record = recorded(linearize_cifar10, tmp_path, folder, "--seeds", "2", "--train-size", "40", "--batch", "8")
    assert record["seeds"] == [0, 1] and len(record["results"]["networks"]) == 2
    for one in record["results"]["networks"]:
        for dtype, close in (("float32", 1e-5), ("float64", 1e-12)):
            assert all(error <= close for error in one["exactness"][dtype].values())
        assert one["exact_minus_gradient_times_input"] <= 1e-5
        assert one["bias"]["sum_of_layers_error"] <= 1e-10
        assert sum(one["bias"]["mean_of_its_constant_by_layer"].values()) == pytest.approx(
            one["bias"]["mean_of_its_constant"]
        )
        assert list(one["curves"]) == ["exact", "gradient x input", "integrated gradients", "random"]
        full = {curves["deletion"]["probability"][0] for curves in one["curves"].values()}
        full |= {curves["insertion"]["probability"][-1] for curves in one["curves"].values()}
        assert len(full) == 1
    assert "area under the curve" in capsys.readouterr().out


def test_attributions_are_captums():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)).double()
    x, target = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 5
    expected = InputXGradient(network).attribute(x.clone().requires_grad_(), target=target)
    for method in (attributions.exact, attributions.gradient_times_input):
        torch.testing.assert_close(method(network, x, target), expected.detach())
    path = IntegratedGradients(network).attribute(x, target=target, n_steps=32, method="riemann_middle")
    torch.testing.assert_close(attributions.integrated_gradients(network, x, target), path)


def test_curves_know_a_good_order():
    """A network of which one pixel decides."""

    class Corner(nn.Module):
        def forward(self, x):
            return torch.stack((10 * x[:, 0, 0, 0], torch.zeros(len(x))), 1)

    x, target = torch.ones(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    scores = torch.tensor([[4.0, 3], [2, 1]]).expand(3, 2, 2)
    shares = [0, 0.25, 0.5, 0.75, 1]
    good = attributions.curves(Corner(), x, target, scores, shares)
    bad = attributions.curves(Corner(), x, target, -scores, shares)
    sure = torch.tensor(10.0).sigmoid().item()
    assert good["deletion"].probability == pytest.approx([sure, 0.5, 0.5, 0.5, 0.5])
    assert good["insertion"].probability == pytest.approx([0.5, sure, sure, sure, sure])
    assert bad["deletion"].probability == pytest.approx([sure, sure, sure, sure, 0.5])
    assert good["deletion"].area == pytest.approx(0.5 + (sure - 0.5) / 8) and good["deletion"].standard_error == 0
    assert bad["insertion"].area == pytest.approx(0.5 + (sure - 0.5) / 8)


def test_descramble_cifar10(thin, folder, tmp_path, capsys):
    record = recorded(descramble_cifar10, tmp_path, folder, "--test-size", "40")
    (one,) = record["results"]["networks"]
    assert list(one["layers"]) == list(descramble_cifar10.LAYERS)
    for layer in one["layers"].values():
        assert layer["error_against_the_bound"] <= 1e-5 and 1 <= layer["rank"] <= layer["features"]
        loss = layer["loss_over_that_of_a_random_P"]
        assert 0 < loss["fitted"] < loss["shuffled"] and loss["fitted"] <= 1.1 * loss["held_out"]
        assert 0 < loss["random_net"] < 1
    for order in one["order"].values():
        assert order["error_of_logits"] <= 1e-5 and order["loss_over_its_lower_bound"] >= 1
    assert "loss over that of a random P" in capsys.readouterr().out


def test_mnist_tsne(folder, tmp_path, capsys):
    arguments = ["--train-size", "130", "--checkpoints", str(tmp_path / "checkpoints")]
    record = recorded(mnist_tsne, tmp_path, folder, *arguments)
    results = record["results"]
    assert results["points"] == {"fitted": 120, "new": 60}  # whole batches
    assert record["budget"]["phases"] == {"attraction x 4": [1, 4.0], "t-SNE": [4, 1.0]}
    assert [(row["network"], row["epochs"]) for row in results["trainings"]] == [("attraction x 4", 1), ("t-SNE", 4)]
    (plane,) = results["planes"]
    assert plane["exactness_float64"]["at_x"] <= 1e-12
    assert plane["exactness_float64"]["step_1e-6_error_over_change"] <= 1e-6
    assert len(plane["divergence"]) == 4 and plane["divergence"][-1] < plane["divergence"][0]
    assert plane["neighbour_accuracy"]["new points"] == results["trainings"][1]["last_accuracy"] > 0.2
    assert "trustworthiness" in capsys.readouterr().out

    again = recorded(mnist_tsne, tmp_path / "again", folder, *arguments)["results"]
    assert again["planes"] == results["planes"] and again["trainings"] == results["trainings"]
    with pytest.raises(SystemExit):
        mnist_tsne.main(["--quick", "--data", str(folder), "--perplexity", "60"])
    assert "--perplexity: got 60 for batches of 60 images" in capsys.readouterr().err
    for other, name in ((["--perplexity", "20"], "perplexity"), (["--test-size", "50"], "test_images")):
        with pytest.raises(ValueError, match=f"a checkpoint of another training, .*'{name}'"):
            mnist_tsne.main(["--quick", "--data", str(folder), "--output", str(tmp_path), *arguments, *other])


def test_neighbours_vote_whatever_is_taken_at_once(monkeypatch):
    torch.manual_seed(0)
    points, labels = torch.randn(50, 2), torch.arange(50) % 3
    whole = embedding.accuracy(points, labels, points, labels, itself=True)
    monkeypatch.setattr(embedding, "_AT_ONCE", 7)
    assert embedding.accuracy(points, labels, points, labels, itself=True) == whole < 1
    twins = points.repeat_interleave(6, 0)
    assert embedding.accuracy(twins, torch.arange(50).repeat_interleave(6), points, torch.arange(50)) == 1


def test_gated_images_of_100_classes(folder, tmp_path):
    arguments = ["--dataset", "cifar100", "--train-size", "4", "--test-size", "4", "--batch", "4"]
    record = recorded(gated_images, tmp_path, folder, *arguments, name="gated_images-cifar100")
    assert record["results"]["published_dlgn_over_relu_more_than"] == 0.835
    assert "out_features=100" in record["budget"]["network"]


def test_gated_images_of_another_stride_are_trained_anew(folder, tmp_path):
    arguments = ["--dataset", "cifar10", "--train-size", "4", "--test-size", "4", "--batch", "4"]
    arguments += ["--checkpoints", str(tmp_path / "checkpoints")]
    on_a_cpu = recorded(gated_images, tmp_path / "2", folder, *arguments, name="gated_images-cifar10")
    published = recorded(gated_images, tmp_path / "1", folder, *arguments, "--stride", "1", name="gated_images-cifar10")
    assert on_a_cpu["budget"]["network"].count("stride=(2, 2)") == 2 and "(2, 2)" not in published["budget"]["network"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2 * len(gated_images.REGIMES)


@pytest.mark.parametrize("experiment", [summary_vgg, summary_cnn, linearize_cifar10, descramble_cifar10, mnist_tsne])
def test_missing_or_damaged_images_are_named(experiment, tmp_path, capsys):
    name = "mnist" if experiment is mnist_tsne else "cifar10"
    assert experiment.main([]) == 2
    assert f"{name}: no folder given; pass --data DIR" in capsys.readouterr().err
    assert experiment.main(["--data", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"{name}: not found in {tmp_path}; looked for" in message
    files = (
        [f"{a}-{b}" for a in ("train", "t10k") for b in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if name == "mnist"
        else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    )
    for file in files:
        (tmp_path / file).write_bytes(b"damaged")
    assert experiment.main(["--data", str(tmp_path)]) == 2
    assert f"{name}: the files in {tmp_path} are damaged" in capsys.readouterr().err


def test_a_gpu_gets_the_full_budget(capsys):
    x, y = torch.zeros(8, 1, 2, 2), torch.zeros(8, dtype=torch.long)
    chosen = head_comparison.data.Images("made", x, y, x, y)
    small, full, quick = (
        head_comparison.Budget(4, 2, 1),
        head_comparison.Budget(None, None, 15, seeds=2, batch=3),
        head_comparison.Budget(1, 1, 1),
    )
    parser = head_comparison.images.parser("made", None)
    sizes = {}
    for device in ("cpu", "cuda"):
        given = parser.parse_args([])
        given.device = device if device == "cpu" else _Cuda("cpu")
        found, recipe = head_comparison.images.within(chosen, given, small, full, quick, 1e-3)
        sizes[device] = len(found.y_train), len(found.y_test), recipe.epochs, recipe.batch, given.seeds
    assert sizes == {"cpu": (4, 2, 1, 32, 1), "cuda": (8, 8, 15, 3, 2)}
    capsys.readouterr()


class _Cuda(str):
    """A device that says it is CUDA's and is not."""

    def startswith(self, *_):
        return True


def test_where_records_go(tmp_path, monkeypatch):
    given = common.parser("made", None).parse_args([])
    common.Run("made", given)
    assert given.output == common.record.ROOT / "benchmarks" / "results" / "cpu" / "experiments"
    quick = common.parser("made", None).parse_args(["--quick"])
    common.Run("made", quick)
    assert str(quick.output) == "results"
