import builtins
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from interp_nn.explain import Region, plots, region

matplotlib = pytest.importorskip("matplotlib")
plt = pytest.importorskip("matplotlib.pyplot")


SQUARE = Region(torch.cat([torch.eye(2), -torch.eye(2)]), torch.full((4,), 0.5), torch.ones(4, dtype=torch.bool))
SQUARE3 = Region(torch.eye(3), torch.zeros(3), torch.ones(3, dtype=torch.bool))


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
    figure = plots.attribution_maps(maps.unsqueeze(2), torch.rand(3, 1, 5, 6), rows=list("abc"), columns=list("wxyz"))
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
    alone = plots.attribution_maps(maps[:, 0]).axes[0].images[0]
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
    assert "1 smaller clusters" in axes.get_title() and axes.images[0].get_clim() == (-6, 6)
    drawn(axes.figure)


def test_a_small_cluster_does_not_take_the_scale():
    axes = plots.cluster_coefficients(torch.tensor([[1.0, -0.0], [900.0, 2.0]]), torch.tensor([995, 5]))
    assert axes.images[0].get_clim() == (-1, 1)
    assert texts(axes) == ["1.00", "0.00", "900.00", "2.00"]
    assert axes.images[0].colorbar.extend == "max"


@pytest.mark.parametrize(
    ("coverage", "text"),
    [
        ([0.8, 0.95, 1.0], "2 of 3 clusters hold 95.0% of the samples"),
        ([1.0], "1 of 1 clusters hold 100.0% of the samples"),
        ([0.5, 0.6], "2 of 2 clusters hold 60.0% of the samples"),
    ],
)
def test_coverage_says_how_many_clusters_reach_the_level(coverage, text):
    axes = plots.coverage_curve(torch.tensor(coverage, dtype=torch.float64))
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 100 * np.array(coverage))
    assert axes.get_title() == text
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


def test_channels_of_an_image_are_not_outputs():
    """One map for each sample of RGB images, the sum over the channels, and not one for each channel."""
    maps, images = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    for figure in (
        plots.attribution_maps(maps),
        plots.attribution_maps(maps, images),
        plots.attribution_maps(maps[:, None]),
    ):
        panels = [axes.images[-1] for axes in figure.axes if axes.images and axes.get_title() != "input"]
        signed = [panel for panel in panels if panel.get_array().ndim == 2]
        assert len(signed) == 2
        np.testing.assert_allclose(signed[1].get_array(), maps[1].sum(0), rtol=1e-5, atol=1e-6)


def test_maps_are_marked_and_laid_over_the_images():
    maps, images = torch.randn(2, 3, 1, 4, 4), torch.rand(2, 3, 4, 4)
    constants = torch.arange(6.0).view(2, 3)
    figure = plots.attribution_maps(
        maps, images, predicted=torch.tensor([1, 2]), true=torch.tensor([1, 0]), constants=constants, overlay=True
    )
    notes = [axes.get_xlabel() for axes in figure.axes[:8]]
    assert notes == [
        *("", "c = 0", "predicted, true\nc = 1", "c = 2"),
        *("", "true\nc = 3", "c = 4", "predicted\nc = 5"),
    ]
    below, above = figure.axes[1].images
    assert below.get_array().shape == above.get_alpha().shape == (4, 4)
    assert figure.axes[2].spines["top"].get_linewidth() > figure.axes[1].spines["top"].get_linewidth()
    drawn(figure)


def test_bars_and_waterfalls_add_up_to_the_output():
    contributions, x = torch.tensor([0.5, -3.0, 1.0, 0.25]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    names = ["a", "b", "c", "d"]
    bars = plots.contribution_bars(contributions, torch.tensor([2.0]), x=x, features=names, most=2)
    assert [label.get_text() for label in bars.get_yticklabels()] == ["b = 2", "c = 3", "2 others", "constant", "sum"]
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], [-3, 1, 0.75, 2, 0.75])
    falls = plots.contribution_waterfall(contributions, 2.0, features=names, most=2, output="logit")
    assert [label.get_text() for label in falls.get_yticklabels()] == ["constant", "b", "c", "2 others", "logit"]
    starts, ends = np.array([(bar.get_x(), bar.get_x() + bar.get_width()) for bar in falls.patches]).T
    np.testing.assert_allclose(starts, [0, 2, -1, 0, 0])
    np.testing.assert_allclose(ends, [2, -1, 0, 0.75, 0.75])
    assert falls.get_title() == "logit 0.75 = constant 2 + contributions -1.25"
    assert falls.get_xlim()[0] < -1.3 and falls.get_xlim()[1] > 2.3  # room for numbers beside the bars
    drawn(bars.figure)
    drawn(falls.figure)


def test_a_beeswarm_has_a_dot_a_sample_and_the_largest_features_first():
    torch.manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64)
    contributions = x * torch.tensor([0.1, 3.0, -1.0, 0.0])
    axes = plots.contribution_beeswarm(contributions, x, features=["a", "b", "c", "d"], most=3)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "c", "a"]
    for row, (dots, j) in enumerate(zip(axes.collections, (1, 2, 0), strict=True)):
        places = np.asarray(dots.get_offsets())
        np.testing.assert_allclose(places[:, 0], contributions[:, j])
        assert np.abs(places[:, 1] - row).max() <= 0.4
        assert (np.asarray(dots.get_array()).argsort() == x[:, j].argsort().numpy()).all()
    assert axes.get_title().startswith("b contributes most") and "1 features not shown" in axes.get_title()
    drawn(axes.figure)
    drawn(plots.contribution_beeswarm(torch.zeros(2, 1), torch.zeros(2, 1)).figure)


def test_many_features_leave_the_largest():
    coefficients = torch.zeros(2, 30)
    coefficients[0, 7], coefficients[1, 3], coefficients[0, 20] = 5.0, -100.0, 1.0
    axes = plots.cluster_coefficients(coefficients, torch.tensor([99, 1]), most_features=2)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x7", "x3"]
    assert "28 features of smaller" in axes.get_title()
    drawn(axes.figure)


def test_a_region_is_the_polygon_of_its_units():
    axes = plots.region_polygon(SQUARE, extent=(-1, 1, -0.25, 1), points=torch.tensor([[0.1, 0.2]]))
    corners = axes.patches[0].get_xy()
    assert {tuple(corner) for corner in corners.tolist()} == {(-0.5, -0.25), (0.5, -0.25), (0.5, 0.5), (-0.5, 0.5)}
    assert sorted(texts(axes)) == ["unit 0", "unit 2", "unit 3"]
    assert axes.get_title() == "3 of 4 units bound the region here"
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[0.1, 0.2]], atol=1e-7)
    away = plots.region_polygon(SQUARE, extent=(1, 2, 1, 2))
    assert not away.patches and "does not meet" in away.get_title()
    drawn(axes.figure)


def test_a_polygon_holds_the_points_of_the_region():
    torch.manual_seed(0)
    model = network(5, 8, 6, 1)
    x = torch.randn(1, 5, dtype=torch.float64)
    around, (u, v) = region(model, x), torch.randn(2, 5, dtype=torch.float64)
    axes = plots.region_polygon(around, plane=(x[0], u, v))
    polygon = axes.patches[0].get_path()
    coordinates = torch.rand(2000, 2, dtype=torch.float64) * 2 - 1
    inside = around.contains(x + coordinates @ torch.stack([u, v])).numpy()
    np.testing.assert_array_equal(polygon.contains_points(coordinates.numpy()), inside)
    assert inside.any() and not inside.all()


def test_regions_that_touch_have_different_colours():
    torch.manual_seed(0)
    axes = plots.region_plot(network(2, 6, 4, 1), resolution=60, points=torch.zeros(1, 2).double())
    image = axes.images[0]
    colours = image.cmap(image.norm(np.asarray(image.get_array())))[..., :3]
    labels = np.asarray(image.get_array())
    for a, b, c, d in ((labels[1:], labels[:-1], colours[1:], colours[:-1]),):
        assert (np.abs(c - d).sum(-1)[a != b] > 0.05).all()
    assert len(axes.collections[-1].get_offsets()) == 1 and axes.get_xlabel() == "x0"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: plots.attribution_maps(torch.ones(2, 3, 4)), r"contributions: got shape \(2, 3, 4\)"),
        (lambda: plots.attribution_maps(torch.ones(2, 3, 4, 4), rows=["a"]), "rows: got 1 titles, want 2"),
        (
            lambda: plots.attribution_maps(torch.ones(2, 3, 4, 4), columns=["a", "b", "c"]),
            r"columns: got 3 .* want 1; maps",
        ),
        (
            lambda: plots.attribution_maps(torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4)),
            r"and \(n, 3, 1, h, w\) if they",
        ),
        (lambda: plots.attribution_maps(torch.ones(2, 10, 4, 4)), "whose 10 are not the channels of an image"),
        (lambda: plots.attribution_maps(torch.ones(2, 2, 4, 4), torch.ones(2, 2, 4, 4)), r"images: got shape"),
        (lambda: plots.attribution_maps(torch.ones(2, 1, 4, 4), overlay=True), "overlay: got True without images"),
        (
            lambda: plots.attribution_maps(torch.ones(2, 1, 4, 4), true=torch.tensor([0, 1])),
            r"want \(2,\) indices below 1",
        ),
        (
            lambda: plots.attribution_maps(torch.ones(2, 1, 4, 4), constants=torch.ones(2)),
            r"constants: got shape \(2,\)",
        ),
        (lambda: plots.contribution_bars(torch.ones(2, 3), 0.0), r"contributions: got shape \(2, 3\), want \(d,\)"),
        (lambda: plots.contribution_bars(torch.ones(3), torch.ones(2)), r"constant: got shape \(2,\)"),
        (lambda: plots.contribution_bars(torch.ones(3), 0.0, features=["a"]), "features: got 1 names, want 3"),
        (lambda: plots.contribution_bars(torch.ones(3), 0.0, most=0), "most: got 0"),
        (lambda: plots.contribution_waterfall(torch.ones(3), 0.0, x=torch.ones(2)), r"x: got shape \(2,\)"),
        (lambda: plots.contribution_beeswarm(torch.ones(3), torch.ones(3)), "contributions, x: got shapes"),
        (lambda: plots.region_polygon(SQUARE3), "plane: got None for a region of 3 inputs"),
        (lambda: plots.region_polygon(SQUARE3, plane=(torch.ones(2),) * 3), "want 3 entries each"),
        (lambda: plots.region_polygon(SQUARE, points=torch.ones(1, 3)), r"points: got shape \(1, 3\)"),
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
        with pytest.raises(ImportError, match=r"pip install matplotlib"):
            plots.coverage_curve(torch.ones(3))


def test_the_gallery_has_every_plot():
    pages = (Path(__file__).parents[3] / "docs").glob("plots*.md")
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert [name for name in plots.__all__ if f"plots.{name}" not in text] == []
