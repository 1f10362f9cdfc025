import numpy as np
import pytest
import torch
from torch import nn

from interp_nn.explain import plots
from interp_nn.nn import DLGN, HardGate

matplotlib = pytest.importorskip("matplotlib")
plt = pytest.importorskip("matplotlib.pyplot")


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_hyperplanes_have_their_best_gates_on_the_diagonal():
    truth = torch.eye(3, 5)
    found = torch.tensor([[1.0, 1, 1, 1, 1], [0, 0, -7, 0, 0], [0, 0.5, 0, 0, 0], [3, 0, 0, 4, 0], [0, 0, 0, 0, 1]])
    axes = plots.gate_hyperplanes(found, truth)
    image = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(image[:, :3], np.diag([0.6, 1, 1]), atol=1e-12)
    np.testing.assert_allclose(image[:, 3], 5**-0.5)
    np.testing.assert_array_equal(image[:, 4], 0)
    assert axes.get_title() == "2 of 3 hyperplanes found at |cos| ≥ 0.99"
    assert ticks(axes.yaxis) == ["0: 0.600", "1: 1.000", "2: 1.000"]
    axes.figure.canvas.draw()
    assert "3 of 3" in plots.gate_hyperplanes(found, truth, level=0.5).get_title()


def test_one_gate_may_be_the_best_of_two_hyperplanes():
    axes = plots.gate_hyperplanes(torch.ones(1, 2), torch.eye(2, dtype=torch.float64))
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.5**0.5], [0.5**0.5]])
    zero = plots.gate_hyperplanes(torch.zeros(2, 2), torch.eye(2))
    assert "0 of 2" in zero.get_title()


def test_a_kernel_is_sorted_by_class():
    kernel = torch.arange(16.0).reshape(4, 4)
    axes = plots.kernel_matrix(kernel, torch.tensor([7, 3, 7, 3]))
    order = [1, 3, 0, 2]
    np.testing.assert_array_equal(axes.images[0].get_array(), kernel[order][:, order])
    assert ticks(axes.xaxis) == ticks(axes.yaxis) == ["3", "7"] and axes.get_xticks().tolist() == [0.5, 2.5]
    assert [line.get_ydata()[0] for line in axes.lines[::2]] == [1.5]
    assert axes.images[0].get_clim() == (0, 15)
    axes.figure.canvas.draw()
    signed = plots.kernel_matrix(kernel - 5)
    assert signed.images[0].get_clim() == (-10, 10) and not signed.lines
    _, given = plt.subplots()
    assert plots.kernel_matrix(torch.ones(1, 1, dtype=torch.bfloat16), axes=given) is given


def test_alignment_begins_before_training():
    curves = {"ReLU": torch.tensor([[0.1, 0.5, 0.9], [0.3, 0.7, 0.7]]), "fixed": torch.tensor([0.2, 0.2])}
    axes = plots.alignment_curves(curves)
    thick = [line for line in axes.lines if line.get_label() in curves]
    assert len(axes.lines) == 4 and [line.get_label() for line in thick] == ["ReLU", "fixed"]
    np.testing.assert_allclose(thick[0].get_ydata(), [0.2, 0.6, 0.8], rtol=1e-6)
    assert thick[0].get_xdata().tolist() == [0, 1, 2]
    axes.figure.canvas.draw()


def test_regimes_are_compared_with_what_was_published():
    axes = plots.regime_bars({"ReLU": [0.97, 0.99], "fixed": [0.9]}, published={"ReLU": 0.975, "other": 0.2})
    assert [text.get_text() for text in axes.texts] == ["98.0", "90.0"] and ticks(axes.yaxis) == ["ReLU", "fixed"]
    means, dots, _, crosses = axes.lines
    np.testing.assert_allclose(means.get_xdata(), [98, 90])
    np.testing.assert_allclose(dots.get_xdata(), [97, 99])
    assert crosses.get_xdata() == pytest.approx([97.5]) and crosses.get_ydata() == [0]
    assert axes.get_xlim()[0] < 90 and axes.get_xlim()[1] > 99
    axes.figure.canvas.draw()
    assert plots.regime_bars({"one": [0.5]}).get_legend() is None


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: plots.gate_hyperplanes(torch.ones(2, 3), torch.ones(2, 4)), "normals of 3 and 4 dimensions"),
        (lambda: plots.gate_hyperplanes(torch.ones(3), torch.ones(2, 3)), r"found: got shape \(3,\)"),
        (lambda: plots.gate_hyperplanes(torch.ones(2, 3), torch.ones(0, 3)), r"truth: got shape \(0, 3\)"),
        (lambda: plots.gate_hyperplanes(torch.full((2, 3), torch.nan), torch.ones(1, 3)), "found: has values that are"),
        (lambda: plots.kernel_matrix(torch.ones(2, 3)), r"kernel: got shape \(2, 3\), want \(n, n\)"),
        (lambda: plots.kernel_matrix(torch.ones(0, 0)), r"kernel: got shape \(0, 0\)"),
        (lambda: plots.kernel_matrix(torch.ones(2, 2), torch.ones(3)), r"labels: got shape \(3,\), want \(2,\)"),
        (lambda: plots.alignment_curves({"a": torch.ones(0)}), r"curves: a has shape \(0,\)"),
        (lambda: plots.alignment_curves({"a": torch.ones(1, 2, 3)}), r"curves: a has shape \(1, 2, 3\)"),
        (lambda: plots.regime_bars({"a": []}), "accuracies: a has none"),
        (lambda: plots.regime_bars({}), "accuracies: got no regimes"),
        (lambda: plots.alignment_curves({}), "curves: got none"),
    ],
)
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_gates_in_training_are_drawn_without_their_gradients():
    layer = nn.Linear(3, 4)
    plots.gate_hyperplanes(layer.weight, torch.eye(3))
    plots.kernel_matrix(layer.weight @ layer.weight.T)


def test_a_tree_has_the_text_of_each_node_and_the_colours_of_its_classes():
    torch.manual_seed(0)
    tree = DLGN((2, 6, 6, 3), gate=HardGate()).to_tree(torch.randn(300, 2)).prune(5)
    axes = plots.tree_diagram(tree, ["age", "fare"], ["a", "b", "c"], terms=1)
    texts = [text for text in axes.texts if text.get_text() not in ("yes", "no")]
    wanted = [
        tree.label(i, ["age", "fare"], ["a", "b", "c"], terms=1).replace("  [", "\n[") for i in range(len(tree.no))
    ]
    assert sorted(text.get_text() for text in texts) == sorted(wanted)
    assert len(axes.lines) == len(axes.texts) - len(texts) == 2 * (tree.leaves - 1) > 0
    shares = sorted((line.get_linewidth() - 0.5) / 7 for line in axes.lines)
    np.testing.assert_allclose(shares, sorted(tree.coverage[1:].tolist()), rtol=1e-6)
    leaves = {text.get_text()[0]: text.get_bbox_patch().get_facecolor() for text in texts if "%" in text.get_text()}
    assert len(set(leaves.values())) == len(leaves) > 1
    heights = [text.get_position()[1] for text in texts if "%" in text.get_text()]
    assert sorted(heights) == [-float(i) for i in reversed(range(tree.leaves))]
    axes.figure.canvas.draw()
    with pytest.raises(ValueError, match="feature_names: got 1 names, want 2"):
        plots.tree_diagram(tree, ["age"])
