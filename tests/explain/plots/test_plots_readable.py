"""Small figures, where space is scarce: no text is cut or lies on another one, and titles say a finding."""

import itertools

import pytest
import torch
from torch import nn

from interp_nn.explain import plots, read_head
from interp_nn.nn import DLGN

pytest.importorskip("matplotlib")


def small_head():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double().eval()
    return plots.head_contributions(read_head(model, "0", torch.randn(9, 4, dtype=torch.float64), output="1"))


def tree():
    return plots.tree_diagram(DLGN((2, 6, 3)).to_tree(torch.randn(100, 2)).prune(3))


FALLING = torch.tensor([-1.5, -2.0, 3.0])
FIGURES = {
    "waterfall": (lambda: plots.contribution_waterfall(FALLING, -0.4), "output -0.9 ="),
    "bars": (lambda: plots.contribution_bars(-FALLING.abs(), -0.4), "x2 contributes most"),
    "map of constants": (lambda: plots.bias_map({"0": torch.tensor([[0.1, -0.2]])}), "Constants by layer"),
    "head": (small_head, "latents alone predict"),
    "coefficients": (
        lambda: plots.cluster_coefficients(torch.tensor([[1.0, -9.0], [2.0, 3.0]]), torch.tensor([9, 1])),
        "x1 has the largest mean |coefficient|: 8.4",
    ),
    "kernel": (lambda: plots.kernel_matrix(torch.eye(3)), "mean on the diagonal 1, off it 0"),
    "curves": (
        lambda: plots.alignment_curves({"a long name": torch.tensor([0.9, 0.1]), "ReLU": torch.tensor([0.8, 0.6])}),
        "ReLU ends highest: 0.6",
    ),
    "regimes": (
        lambda: plots.regime_bars({"a": [0.5], "b": [0.6]}, published={"a": 0.55}),
        "b is most accurate: 60.0 %",
    ),
    "tree": (tree, "A tree of 3 leaves"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_small_figures_can_be_read(name):
    torch.manual_seed(0)
    make, title = FIGURES[name]
    axes = make()
    figure = axes.figure
    figure.canvas.draw()
    assert title in axes.get_title()
    shown = [text for one in figure.axes for text in (one.title, one.xaxis.label, one.yaxis.label, *one.texts)]
    boxes = {text: text.get_window_extent() for text in shown if text.get_text()}
    page = figure.bbox.padded(2)
    for text, box in boxes.items():
        assert page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1), text.get_text()
    inside = axes.bbox.padded(1)
    for text in axes.texts if name in ("waterfall", "bars") else ():
        assert inside.contains(boxes[text].x0, boxes[text].y0) and inside.contains(boxes[text].x1, boxes[text].y1)
    labels = [axes.xaxis.label, axes.yaxis.label, axes.title]
    legend = axes.get_legend()
    if legend is not None:
        box = legend.get_window_extent()
        assert not box.overlaps(axes.bbox) and not any(boxes[one].overlaps(box) for one in labels if one in boxes)
    for one, other in itertools.combinations([boxes[one] for one in labels if one in boxes], 2):
        assert not one.overlaps(other)
