import builtins
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from interp_nn.explain import plots

matplotlib = pytest.importorskip("matplotlib")
plt = pytest.importorskip("matplotlib.pyplot")


def drawn(figure):
    """The figure's pixels, (height, width, 3); drawing also shows that nothing warns."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def network(*widths, dtype=torch.float64):
    layers = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_attribution_maps_share_a_scale_symmetric_about_zero():
    maps = torch.randn(3, 4, 5, 6)
    figure = plots.attribution_maps(maps, torch.rand(3, 1, 5, 6), rows=list("abc"), columns=list("wxyz"))
    panels = [axes for axes in figure.axes if axes.images]
    assert len(figure.axes) == 3 * 5 + 1  # and the colour bar
    limit = float(maps.abs().flatten().sort().values[356])  # 99 % of 360 values are not larger
    for place, axes in enumerate(panels[:15]):
        i, j = divmod(place, 5)
        image = axes.images[0]
        if j == 0:
            assert axes.get_ylabel() == "abc"[i]
        else:
            np.testing.assert_array_equal(image.get_array(), maps[i, j - 1].numpy())
            assert image.get_clim() == (-limit, limit)
    assert figure.axes[-1].get_ylabel() == "contribution"
    assert [axes.get_title() for axes in panels[:5]] == ["input", *"wxyz"]
    drawn(figure)


def test_channels_add_up_and_a_given_figure_is_used():
    maps = torch.randn(2, 1, 3, 4, 4)
    figure = plt.figure()
    assert plots.attribution_maps(maps, torch.rand(2, 3, 4, 4), figure=figure) is figure
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), maps[0, 0].sum(0), rtol=1e-6)
    assert figure.axes[0].images[0].get_array().shape == (4, 4, 3)
    alone = plots.attribution_maps(maps.transpose(0, 1)).axes[0].images[0]
    np.testing.assert_allclose(alone.get_array(), maps[0, 0].sum(0), rtol=1e-6)
    assert plots.attribution_maps(torch.zeros(1, 1, 2, 2)).axes[0].images[0].get_clim() == (-1, 1)


def test_bias_bars_end_in_their_sum():
    layers = {"first": torch.tensor([[1.0, 0.0], [0.5, -2.0]]), "last": torch.tensor([[1.0, 0.0], [-1.0, 0.25]])}
    _, axes = plt.subplots()
    assert plots.bias_bars(layers, sample=1, output=1, axes=axes) is axes
    assert [bar.get_width() for bar in axes.patches] == [-2.0, 0.25, -1.75]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "last", "sum"]
    drawn(axes.figure)


def test_bias_map_has_a_row_a_layer():
    layers = {"first": torch.tensor([[1.0, 0.0, 3.0]]), "last": torch.tensor([[-4.0, 0.5, 0.0]])}
    axes = plots.bias_map(layers, outputs=["a", "b", "c"])
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1, 0, 3], [-4, 0.5, 0]])
    assert axes.images[0].get_clim() == (-4, 4)
    assert texts(axes) == ["1.00", "0.00", "3.00", "-4.00", "0.50", "0.00"]
    drawn(axes.figure)


def test_clusters_are_listed_by_size():
    coefficients, counts = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([10, 60, 30])
    axes = plots.cluster_coefficients(
        coefficients, counts, features=["age", "fare"], responses=torch.tensor([0.1, 0.2, 0.3]), most=2
    )
    np.testing.assert_array_equal(axes.images[0].get_array(), [[3, 4], [5, 6]])
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["cluster 1: 60 (60.0%), mean 0.20", "cluster 2: 30 (30.0%), mean 0.30"]
    assert "1 smaller" in axes.get_title() and axes.images[0].get_clim() == (-6, 6)
    drawn(axes.figure)


def test_a_small_cluster_does_not_take_the_scale():
    axes = plots.cluster_coefficients(torch.tensor([[1.0, -0.0], [900.0, 2.0]]), torch.tensor([995, 5]))
    assert axes.images[0].get_clim() == (-1, 1)
    assert texts(axes) == ["1.00", "0.00", "900.00", "2.00"]
    assert axes.images[0].colorbar.extend == "max"


@pytest.mark.parametrize(
    ("coverage", "text"),
    [([0.8, 0.95, 1.0], "2 of 3 hold 95.0%"), ([1.0], "1 of 1 hold 100.0%"), ([0.5, 0.6], "2 of 2 hold 60.0%")],
)
def test_coverage_says_how_many_clusters_reach_the_level(coverage, text):
    axes = plots.coverage_curve(torch.tensor(coverage, dtype=torch.float64))
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 100 * np.array(coverage))
    assert texts(axes) == [text]
    drawn(axes.figure)


def test_regions_are_where_the_pattern_is_one():
    model = network(2, 6, 4, 1)
    axes = plots.region_plot(model, extent=(-2, 1, -1, 3), resolution=60)
    image = np.asarray(axes.images[0].get_array())
    s, t = torch.linspace(-2, 1, 60).double(), torch.linspace(-1, 3, 60).double()
    points = torch.stack(torch.meshgrid(s, t, indexing="xy"), 2)
    first = model[0](points)
    on = torch.cat([first > 0, model[2](first.relu()) > 0], 2).flatten(0, 1)
    same_pattern = (on.unsqueeze(1) == on).all(2).numpy()
    labels = image.ravel()
    np.testing.assert_array_equal(labels[:, None] == labels, same_pattern)
    assert axes.images[0].get_extent() == [-2, 1, -1, 3] and axes.images[0].origin == "lower"
    assert axes.get_title() == f"{len(np.unique(labels))} activation regions"
    drawn(axes.figure)


def test_lines_are_where_a_unit_flips():
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.float64), nn.ReLU(), nn.Linear(2, 1, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([-0.3, 1.0]))  # the second is always on: no line
    axes = plots.region_plot(model, resolution=40)
    (line,) = axes.collections
    points = np.concatenate([path.vertices for path in line.get_paths()])
    np.testing.assert_allclose(points @ [1.0, 2.0], 0.3, atol=1e-12)
    assert np.ptp(points[:, 0]) > 1.9


def test_a_line_is_where_pooling_chooses_another():
    model = nn.Sequential(nn.Unflatten(1, (1, 2)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(1, 1)).double()
    lines = plots.region_plot(model, resolution=40).collections
    points = np.concatenate([path.vertices for line in lines for path in line.get_paths()])
    np.testing.assert_allclose(points[:, 0], points[:, 1], atol=1e-12)
    assert np.ptp(points[:, 0]) > 1.9


def test_a_plane_of_images_filled_with_an_output():
    model = nn.Sequential(nn.Flatten(), network(12, 8, 3, dtype=torch.float32))
    o, u, v = torch.randn(3, 3, 4)
    figure, given = plt.subplots()
    axes = plots.region_plot(model, plane=(o, u, v), output=2, resolution=20, axes=given)
    assert axes is given and len(figure.axes) == 2  # with a colour bar
    image = axes.images[0]
    corner = model((o - u + v).unsqueeze(0))[0, 2].item()
    assert image.get_array()[-1, 0] == pytest.approx(corner, rel=1e-4)
    assert image.get_clim()[0] == -image.get_clim()[1]
    drawn(figure)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: plots.attribution_maps(torch.ones(2, 3, 4)), r"contributions: got shape \(2, 3, 4\)"),
        (lambda: plots.attribution_maps(torch.ones(2, 3, 4, 4), rows=["a"]), "rows: got 1 titles, want 2"),
        (lambda: plots.attribution_maps(torch.ones(2, 3, 4, 4), columns=["a"]), "columns: got 1 titles, want 3"),
        (lambda: plots.attribution_maps(torch.ones(2, 3, 4, 4), torch.ones(2, 2, 4, 4)), r"images: got shape"),
        (lambda: plots.bias_bars({}), "by_layer: got no layers"),
        (lambda: plots.bias_bars({"a": torch.ones(2, 3)}, sample=2), "by_layer: a has shape"),
        (lambda: plots.bias_bars({"a": torch.ones(2, 3)}, output=3), "output: got 3, want one of 3"),
        (lambda: plots.bias_map({"a": torch.ones(2, 3)}, outputs=["x"]), "got 1 titles for 3 columns"),
        (lambda: plots.cluster_coefficients(torch.ones(2, 3), torch.ones(3)), "coefficients, counts: got shapes"),
        (lambda: plots.coverage_curve(torch.ones(0)), r"coverage: got shape \(0,\)"),
        (lambda: plots.region_plot(network(2, 3, 1), resolution=5, output=1), "output: got 1, want one of 1"),
    ],
)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_a_missing_matplotlib_is_explained(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **named)

    with monkeypatch.context() as patch:  # closing the figures imports matplotlib again
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(ImportError, match=r"pip install interp_nn\[plot\]"):
            plots.coverage_curve(torch.ones(3))
