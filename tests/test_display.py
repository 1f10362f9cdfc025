"""Bars are shown where they are asked for or watched, and nowhere else; tables are HTML in notebooks."""

import builtins
import io
import sys

import pytest
import torch
from torch import nn

from interp_nn import convert, display
from interp_nn.explain import (
    ActivationClusters,
    AffineMap,
    Descrambler,
    NPKMachine,
    Region,
    facets,
    linearize,
    npk,
    region,
    region_graph,
    seriate,
    supported_ops,
)


class Terminal(io.StringIO):
    def isatty(self):
        return not super().isatty()  # which raises where it is closed


def test_steps_are_passed_on_without_a_bar(capsys):
    steps = range(3)
    assert display.track(steps, "x", None) is steps and display.track(steps, "x", False) is steps
    assert not capsys.readouterr().err


def test_a_terminal_and_a_notebook_are_watched(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(display, "_DELAY", 0.0)
    assert list(display.track(range(3), "counting", None)) == [0, 1, 2]
    assert "counting" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", short := Terminal())
    monkeypatch.setattr(display, "_DELAY", 3600.0)
    assert list(display.track(range(3), "counting", None)) == [0, 1, 2] and not short.getvalue()
    closed = Terminal()
    closed.close()
    for other in (io.StringIO(), None, object(), closed):
        monkeypatch.setattr(sys, "stderr", other)
        assert not display._watched()

    class Notebook:
        kernel = None

        @classmethod
        def get_ipython(cls):
            return cls()

    monkeypatch.setitem(sys.modules, "IPython", Notebook)
    assert display._watched()


def test_a_loop_that_ends_early_closes_its_bar(capsys):
    for step in display.track(range(100), "counting", True):
        if step == 3:
            break
    assert capsys.readouterr().err.endswith("\n")


def test_a_missing_tqdm_is_named_where_a_bar_was_asked_for(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(display, "_DELAY", 0.0)
    assert list(display.track(range(2), "x", None)) == [0, 1]
    with pytest.raises(ImportError, match=r"progress=True needs tqdm: pip install tqdm"):
        display.track(range(2), "x", True)
    with pytest.raises(TypeError, match="progress: got str, want True, False or None"):
        display.track(range(2), "x", "yes")


torch.manual_seed(0)
NETWORK = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
X = torch.randn(40, 4, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:target")
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda on: linearize(NETWORK, X, progress=on).weight, "weight"),
        (lambda on: ActivationClusters(NETWORK, progress=on).fit(X), "patterns"),
        (lambda on: ActivationClusters(NETWORK, progress=False).set_params(progress=on).fit(X).merge(), "merging"),
        (lambda on: npk(NETWORK, X, progress=on), "kernel"),
        (lambda on: NPKMachine(NETWORK, progress=on).fit(X, X[:, 0]), "kernel"),
        (lambda on: NPKMachine(NETWORK, progress=False).fit(X, X[:, 0]).set_params(progress=on).predict(X), "kernel"),
        (lambda on: npk(NETWORK, X, method="montecarlo", draws=2, progress=on), "draws"),
        (lambda on: Descrambler(operator="diff1", progress=on).fit(X).nulls_, "null models"),
        (lambda on: seriate(torch.randn(5, 20), progress=on), "seriation"),
        (lambda on: seriate(torch.randn(5, 20), "diff2", progress=on), "seriation"),
        (lambda on: convert.summarize(nn.Sequential(nn.Linear(3, 2)), progress=on), "converting"),
    ],
)
def test_long_calls_have_a_bar(call, name, capsys):
    call(None)
    assert not capsys.readouterr().err
    call(True)
    assert f"{name}: " in capsys.readouterr().err


def test_tables_are_html_in_notebooks():
    assert display.html_table(["<a>"], [["1 & 2"]], above=["x < y"], below=["last"]) == (
        "<p>x &lt; y</p><table><tr><th>&lt;a&gt;</th></tr><tr><td>1 &amp; 2</td></tr></table><p>last</p>"
    )
    report = supported_ops(NETWORK, X)._repr_html_()
    assert report.count("<tr>") == 4 and "<td>relu</td><td>1</td><td>gate</td>" in report
    converted = convert.summarize(nn.Sequential(nn.Linear(3, 2), nn.Bilinear(2, 2, 2)), dry_run=True)._repr_html_()
    assert "<td>SummaryLinear</td>" in converted and "skipped: 1 Bilinear" in converted
    affine = linearize(NETWORK, X)
    assert "<td>40</td><td>(4,)</td><td>(2,)</td><td>output</td><td>while no gate changes</td>" in affine._repr_html_()
    assert "weight" not in vars(affine)  # which is not formed for it
    assert "<td>1</td><td>at x</td>" in linearize(NETWORK, X, layer="1", mode="tangent")._repr_html_()
    given = AffineMap.from_tensors((torch.ones(1, 2), torch.ones(1, 3, 4)), torch.ones(1))._repr_html_()
    assert "<td>1</td><td>(2,), (3, 4)</td><td>()</td></tr>" in given and "exact" not in given
    on = int((NETWORK[0](X[0]) > 0).sum())
    assert f"<td>6</td><td>{on}</td><td>4</td>" in region(NETWORK, X[:1])._repr_html_()


def test_reprs_are_short():
    wide = Region(torch.eye(784), torch.ones(784), torch.ones(784, dtype=torch.bool))
    boundary, ball = wide.nearest_boundary(torch.zeros(2, 784)), wide.chebyshev(box=(0.0, 1.0))
    assert repr(boundary).endswith("point=tensor of shape (2, 784))") and repr(boundary).startswith(
        "Boundary(distance="
    )
    assert repr(ball) == f"Ball(centre=tensor of shape (784,), radius={ball.radius!r})"
    one = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)).double().eval()
    graph = region_graph(one, torch.zeros(1, 2, dtype=torch.float64), box=(-1.0, 1.0))
    assert repr(graph) == f"RegionGraph({len(graph.regions)} regions, {len(graph.edges)} edges, complete=True)"
    sides = facets(region(NETWORK, X[:1]), box=(-9.0, 9.0))
    assert "points=tensor of shape" in repr(sides) or len(sides.units) < 4
    assert "tensor(" not in repr(graph.statistics(one, torch.zeros(1, 2, dtype=torch.float64)))
