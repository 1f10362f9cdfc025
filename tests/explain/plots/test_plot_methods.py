"""Objects draw themselves by the functions of `plots`."""

import numpy as np
import pandas
import pytest
import torch
from sklearn.neural_network import MLPRegressor
from torch import nn

from interp_nn.explain import ActivationClusters, AffineMap, Descrambler, linearize, region

pytest.importorskip("matplotlib")
torch.manual_seed(0)
NETWORK = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
CONVOLUTION = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).eval()
X, IMAGES = torch.randn(6, 3, dtype=torch.float64), torch.rand(9, 3, 6, 6)


def names(axes):
    return [label.get_text().split(" = ")[0] for label in axes.get_yticklabels()]


def test_features_of_one_sample_are_a_waterfall_and_of_several_a_beeswarm():
    affine = linearize(NETWORK, X)
    axes = affine.plot(sample=4, output=1, features=["a", "b", "c"])
    bars = [bar.get_width() for bar in axes.patches]
    assert names(axes)[0] == "constant" and names(axes)[-1] == "output 1"
    assert bars[-1] == pytest.approx(NETWORK(X)[4, 1].item()) and bars[0] == pytest.approx(affine.bias[4, 1].item())
    swarm = affine.plot(output=0)
    assert sorted(names(swarm)) == ["x0", "x1", "x2"] and len(swarm.collections) >= 3
    assert names(affine.contrast(0, 1).plot(sample=-1))[-1] == "output"


def test_a_data_frame_names_the_features():
    table = np.random.default_rng(0).normal(size=(60, 3))
    frame = pandas.DataFrame(table, columns=["age", "fare", "weight"])
    model = MLPRegressor(hidden_layer_sizes=(4,), solver="lbfgs", max_iter=5000, random_state=0).fit(frame, table[:, 0])
    affine = linearize(model, frame)
    assert sorted(names(affine.plot())) == ["age", "fare", "weight"]
    assert sorted(names(affine.plot(features=["a", "b", "c"]))) == ["a", "b", "c"]
    two = linearize(
        MLPRegressor(hidden_layer_sizes=(4,), solver="lbfgs", max_iter=5000).fit(frame, table[:, :2]), frame
    )
    assert sorted(names(two.contrast(0, 1).plot())) == ["age", "fare", "weight"]


def test_images_are_maps_with_channels_summed_and_constants():
    affine = linearize(CONVOLUTION, IMAGES)
    figure = affine.plot()
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 8 * 5  # of the first eight images: the image and four outputs
    predicted = CONVOLUTION(IMAGES[:1]).argmax(1).item()
    assert panels[1 + predicted].get_xlabel().startswith("predicted")
    chosen = linearize(CONVOLUTION, IMAGES, torch.zeros(9, dtype=torch.int64))
    panels = [axes for axes in chosen.plot(sample=2).axes if axes.images]
    assert len(panels) == 2 and panels[1].images[0].get_array().shape == (6, 6)
    assert panels[1].get_xlabel() == f"c = {chosen.bias[2].item():.2g}"


def test_class_names_are_those_of_the_outputs():
    affine = linearize(NETWORK, X)
    assert names(affine.plot(sample=4, output=-1, class_names=["no", "yes"]))[-1] == "yes"
    assert affine.plot(output=0, class_names=["no", "yes"]).get_xlabel() != affine.plot(output=0).get_xlabel()
    assert names(affine.contrast(0, 1).plot(sample=0, class_names=["no over yes"]))[-1] == "no over yes"
    for whole in (affine, AffineMap.from_tensors(affine.weight, affine.bias)):
        assert names(whole.contrast(0, -1).plot(X, sample=0, class_names=["no", "yes"]))[-1] == "no - yes"
    with pytest.raises(
        ValueError, match="got 3 names, want 1, one for each output, or 2, those of the outputs that were"
    ):
        affine.contrast(0, 1).plot(sample=0, class_names="abc")
    figure = linearize(CONVOLUTION, IMAGES[:2]).plot(class_names="abcd")
    assert [axes.get_title() for axes in figure.axes if axes.images][1:5] == list("abcd")
    with pytest.raises(ValueError, match="class_names: got 3 names, want 2, one for each output"):
        affine.plot(output=0, class_names="abc")


def test_clusters_exact_and_merged():
    frame = pandas.DataFrame(X.numpy(), columns=["age", "fare", "weight"])
    clusters = ActivationClusters(NETWORK).fit(frame)
    for one in (clusters, clusters.merge(1)):
        axes = one.plot(1)
        assert sorted(label.get_text() for label in axes.get_xticklabels()) == ["age", "fare", "weight"]
        assert len(axes.get_yticklabels()) == len(one.counts_)
        assert one.plot(axes=axes) is axes


def test_pixels_of_clusters_have_rows_and_columns():
    grey = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).eval()
    table = ActivationClusters(grey).fit(IMAGES[:, :1]).merge(1).table()
    assert table.features[:7] == (*(f"row 0 col {j}" for j in range(6)), "row 1 col 0")
    table = ActivationClusters(CONVOLUTION).fit(IMAGES).merge(1).table()
    assert table.features[0] == "channel 0 row 0 col 0" and table.features[-1] == "channel 2 row 5 col 5"
    assert len(table.features) == len(set(table.features)) == 108
    pairs = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU())
    assert ActivationClusters(pairs).fit(torch.rand(3, 2, 2)).table().features == (
        "x[0, 0]",
        "x[0, 1]",
        "x[1, 0]",
        "x[1, 1]",
    )


def test_regions_and_descramblers():
    around = region(NETWORK, X[:1])
    axes = around.plot(plane=(X[0], X[1] - X[0], X[2] - X[0]), points=X[:3])
    assert axes.patches and axes.collections[0].get_offsets()[1].tolist() == pytest.approx([1, 0])
    found = Descrambler(operator="diff1").fit(torch.randn(50, 4).double())
    assert found.plot().get_xticklabels()[0].get_text() == "features"
    assert "cheap modes" in found.spectrum_.plot().get_title() and found.ambiguity_.plot().images


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: linearize(NETWORK, X).plot(), "output: got None for 2 outputs, want the index of one"),
        (
            lambda: linearize(nn.Sequential(nn.Conv2d(1, 13, 2), nn.Flatten()), torch.ones(1, 1, 2, 2)).plot(),
            "output: got None for 13 outputs",
        ),
        (lambda: linearize(NETWORK, X).plot(output=2), "output: got 2, want an index below 2"),
        (
            lambda: linearize(NETWORK, X).plot(X[:1], output=0),
            r"x: got shape \(1, 3\), want \(6, 3\); sample=i draws one",
        ),
        (lambda: linearize(NETWORK, X).plot(sample=6, output=0), "sample: got 6, want an index below 6"),
        (
            lambda: AffineMap.from_tensors(torch.ones(1, 2), torch.ones(1)).plot(),
            r"x: got a map without its inputs.*plot\(x\)",
        ),
        (
            lambda: region(NETWORK, X[:1]).plot(),
            r"plane: got None for a region of 3 inputs.*a point o and two directions u",
        ),
        (
            lambda: AffineMap.from_tensors((torch.ones(1, 2),) * 2, torch.ones(1)).plot(X),
            "plot: got a map of several inputs",
        ),
        (
            lambda: AffineMap.from_tensors(torch.ones(1, 1, 1, 1, 2), torch.ones(1)).plot(torch.ones(1, 1, 1, 1, 2)),
            r"plot: got inputs of shape \(1, 1, 1, 1, 2\)",
        ),
    ],
)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
