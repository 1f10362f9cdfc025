"""Figures laid out but not coloured."""


def lay_out_only(monkeypatch):
    """Lay saved figures out, with all warnings, but colour no pixels, which takes as long."""
    from matplotlib.figure import Figure
    from PIL import Image

    def savefig(self, file, **_):
        self.draw_without_rendering()
        Image.new("RGB", (1, 1)).save(file, "png")

    monkeypatch.setattr(Figure, "savefig", savefig)
