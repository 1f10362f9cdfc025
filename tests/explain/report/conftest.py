"""Figures are drawn without a window, and closed."""

import pytest
from uncoloured import lay_out_only


@pytest.fixture(autouse=True)
def _no_window(monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("a plot was shown"))
    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def _not_coloured_in(request, monkeypatch):
    """The browser's tests look at pixels."""
    if request.path.stem != "test_browser":
        lay_out_only(monkeypatch)
