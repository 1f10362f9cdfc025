"""Figures of descrambling: what is drawn is what was given."""

import math
import warnings

import numpy as np
import pytest
import torch

from interp_nn.explain.descramble.descrambler import Descrambler, Nulls
from interp_nn.explain.descramble.optimum import Ambiguity, Spectrum

plt = pytest.importorskip("matplotlib.pyplot")
plots = pytest.importorskip("interp_nn.explain.plots.spectra")

NULLS = Nulls(0.1, 0.4, 0.12, 0.2)


def draw(figure):
    """Drawing shows that nothing warns."""
    figure.canvas.draw()


def test_weights_are_shown_before_and_after_with_their_waves():
    before = torch.randn(6, 9)
    after = torch.cos(2 * math.pi * 2 * torch.arange(9) / 9).expand(6, 9)
    figure = plots.descrambled_weights(before, after, columns="time")
    images = [axes for axes in figure.axes if axes.images]
    np.testing.assert_array_equal(images[0].images[0].get_array(), before)
    np.testing.assert_array_equal(images[1].images[0].get_array(), after)
    assert len({axes.images[0].get_clim() for axes in images[:2]}) == 1
    low, high = images[0].images[0].get_clim()
    assert low == -high
    waves = images[3].images[0]
    assert waves.get_extent() == [-4.5, 4.5, -3.5, 2.5] and waves.origin == "lower"
    # A cosine of two turns along the columns that is the same in every row.
    bright = np.argwhere(np.asarray(waves.get_array()) > 1e-4)
    assert {(r - 3, c - 4) for r, c in bright.tolist()} == {(0, -2), (0, 2)}
    assert images[0].get_xlabel() == "time" and images[1].get_title() == "after"
    draw(figure)


def test_a_given_figure_is_used_and_zeros_are_fine():
    figure = plt.figure()
    assert plots.descrambled_weights(torch.zeros(1, 1), torch.zeros(1, 1), figure=figure) is figure
    draw(figure)


def test_spectra_are_shares():
    spectrum = Spectrum(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([6.0, 3.0, 1.0]))
    axes = plots.spectrum_curves(spectrum, others={"shuffled": torch.tensor([2.0, 1.0, 1.0])})
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.6, 0.3, 0.1], rtol=1e-6)
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [0.5, 0.25, 0.25], rtol=1e-6)
    (twin,) = (other for other in axes.figure.axes if other is not axes)
    np.testing.assert_allclose(twin.lines[0].get_ydata(), [np.nan, 0.25, 1], rtol=1e-6)
    assert axes.get_yscale() == twin.get_yscale() == "log"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["energy of the components", "shuffled", "cost of the modes"]
    draw(axes.figure)


def test_a_spectrum_of_zeros_is_drawn():
    axes = plots.spectrum_curves(Spectrum(torch.zeros(2), torch.zeros(2)))
    assert axes.get_yscale() == "linear"
    draw(axes.figure)


def test_nulls_stand_beside_what_was_fitted():
    _, given = plt.subplots()
    axes = plots.null_bars({"first": NULLS, "second": NULLS._replace(random_net=math.nan)}, axes=given)
    assert axes is given
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    np.testing.assert_allclose(heights, [[0.1, 0.1], [0.12, 0.12], [0.4, 0.4], [0.2, math.nan]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "second"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["a random P", "the data", "held-out data", "shuffled data", "untrained network"]
    draw(axes.figure)


def test_a_null_that_no_layer_has_is_left_out():
    axes = plots.null_bars({"": NULLS._replace(held_out=math.nan, random_net=math.nan)})
    assert len(axes.containers) == 2
    draw(axes.figure)


def test_the_legend_of_one_layer_is_inside_the_figure():
    axes = plots.null_bars({"fc": NULLS})
    draw(axes.figure)
    legend, figure = axes.get_legend().get_window_extent(), axes.figure.bbox
    assert figure.x0 <= legend.x0 < legend.x1 <= figure.x1 and figure.y0 <= legend.y0 < legend.y1 <= figure.y1


def test_arbitrary_modes_are_marked():
    axes = plots.ambiguity_strips(Ambiguity(((1, 3), (3, 5)), ((0, 2),), 4, 6))
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0, 1, 1, 2, 2, 0], [1, 1, 0, 0, 3, 3]])
    assert axes.get_title() == "Arbitrary beyond signs: 4 of 6 modes, 4 of 6 components"
    draw(axes.figure)


def test_a_fit_is_drawn_as_it_is():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the rank
        fitted = Descrambler().fit(torch.randn(50, 3).double() @ torch.randn(3, 8).double())
    draw(plots.spectrum_curves(fitted.spectrum_).figure)
    strips = plots.ambiguity_strips(fitted.ambiguity_)
    assert np.asarray(strips.images[0].get_array())[1].tolist() == [0] * 3 + [3] * 5
    bars = plots.null_bars({"random": fitted.nulls_})
    assert bars.containers[0][0].get_height() == pytest.approx(fitted.nulls_.fitted)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: plots.descrambled_weights(torch.ones(2, 3), torch.ones(3, 2)), r"before, after: got shapes \(2, 3\)"),
        (lambda: plots.descrambled_weights(torch.ones(2), torch.ones(2)), r"want \(n, d\) with entries"),
        (lambda: plots.descrambled_weights(torch.ones(0, 2), torch.ones(0, 2)), r"want \(n, d\) with entries"),
        (
            lambda: plots.spectrum_curves(Spectrum(torch.ones(2), torch.ones(2)), others={"null": torch.ones(2, 2)}),
            r"null: got shape \(2, 2\), want \(n,\)",
        ),
        (lambda: plots.null_bars({}), "nulls: got none"),
    ],
)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()
