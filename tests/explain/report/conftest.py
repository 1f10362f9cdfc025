"""Figures are drawn without a window, and closed."""

import pytest


@pytest.fixture(autouse=True)
def _no_window(monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("a plot was shown"))
    yield
    plt.close("all")


@pytest.fixture(autouse=True)
def _not_coloured_in(request, monkeypatch):
    """Lay figures out, with all warnings, but colour no pixels, which takes as long; the browser's tests look at pixels."""
    if request.path.stem == "test_browser":
        return
    image, figure = pytest.importorskip("PIL.Image"), pytest.importorskip("matplotlib.figure")

    def savefig(self, file, **_):
        self.draw_without_rendering()
        image.new("RGB", (1, 1)).save(file, "png")

    monkeypatch.setattr(figure.Figure, "savefig", savefig)
