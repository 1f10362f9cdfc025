"""Figures are drawn without a window, and closed."""

import pytest


@pytest.fixture(autouse=True)
def _no_window(monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("a plot was shown"))
    yield
    plt.close("all")
