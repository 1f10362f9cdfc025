"""`report`: one HTML page about a network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from interp_nn.explain.following.calls import UnsupportedOperation
from interp_nn.explain.plots.canvas import closing
from interp_nn.explain.report.facts import Facts
from interp_nn.explain.report.page import Section, image, render
from interp_nn.explain.report.sections import DEFAULT, SectionOf

_FIGURES = 12
_UNKNOWN = (
    "Not known: where the samples come from, how they were scaled before the network got them, and whether it was trained on "
    "them. Not measured: robustness to changed or shifted inputs, and calibration of the probabilities."
)


class Report:
    """One page about a network, as `report` makes it.

    Attributes:
        title: Title of the page.
        sections: The sections, in order.
        html: The page.

    Example:
        >>> page = Report("A network", "It is small.", [Section("Size", "It has 100 parameters.")])
        >>> page.findings, page.html.startswith("<!DOCTYPE html>")
        ({'Size': 'It has 100 parameters.'}, True)
    """

    def __init__(self, title: str, about: str, sections: Sequence[Section]) -> None:
        self.title, self.sections = title, tuple(sections)
        left = _FIGURES
        parts = []
        for section in self.sections:
            shown = section.figures[:left]
            left -= len(shown)
            more = len(section.figures) - len(shown)
            note = f"<p>{more} more figures are left out: a page has at most {_FIGURES}.</p>" if more else ""
            parts.append((section, "".join(image(figure, alt) for figure, alt in shown) + note))
        self.html = render(title, about, parts)

    @property
    def findings(self) -> dict[str, str]:
        """The finding of each section, by its title."""
        return {section.title: section.finding for section in self.sections}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page in one step, so that a file is never half a page; return its path.

        Raises:
            OSError: The file cannot be written.
        """
        target = Path(path)
        part = target.with_name(f".{target.name}-{os.getpid()}.part")
        try:
            part.write_text(self.html, encoding="utf-8")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target

    def __repr__(self) -> str:
        lines = [f"  {title}: {finding}" for title, finding in self.findings.items()]
        return "\n".join([f"Report({self.title!r}, {len(self.html):,} characters)", *lines])

    def _repr_html_(self) -> str:
        style = "width:100%;height:40rem;border:0"
        return f'<iframe srcdoc="{escape(self.html)}" style="{style}" title="{escape(self.title)}"></iframe>'


def report(
    model: nn.Module,
    x: Any,
    y: Any = None,
    *,
    feature_names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    tokenizer: Any = None,
    title: str | None = None,
    sections: Sequence[str] | Mapping[str, SectionOf] | None = None,
) -> Report:
    """Explain a network on one page: what is exact, what counts, where it fails, and what was not done.

    Needs matplotlib.

    Args:
        model: The network, in evaluation mode, or scikit-learn's, see `from_sklearn`.
        x: Samples: a table (n, d) or a data frame, images (n, channels, h, w), or token ids (n, t) of an integer dtype.
        y: Classes (n,) of an integer dtype, values (n,) of a floating dtype, or None.
        feature_names: Names of a table's features. A data frame has its own.
        class_names: Names of the outputs.
        tokenizer: For token ids, as in `token_contributions`.
        title: Title of the page; by default the class of the model.
        sections: Names of sections to make, those of `report_sections()`; or functions by name, of your own too: each takes the
            facts and returns a `Section`, or a sentence on why there is none. By default all.

    Returns:
        The report.

    Raises:
        TypeError: A model or samples of another type.
        ValueError: Shapes, names or sections that do not fit.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> page = report(network, torch.randn(20, 4), sections=["exactness", "constants"])
        >>> list(page.findings)
        ['What is exact', 'The constant, by layer', 'What was not done']
    """
    chosen: dict[str, SectionOf]
    if sections is None or isinstance(sections, Mapping):
        chosen = dict(DEFAULT if sections is None else sections)
    else:
        unknown = [name for name in sections if name not in DEFAULT]
        if unknown or isinstance(sections, str):
            raise ValueError(f"sections: got {sections!r}, want names of {list(DEFAULT)}")
        chosen = {name: DEFAULT[name] for name in sections}
    with closing():
        return _report(chosen, Facts(model, x, y, feature_names, class_names, tokenizer), title, sections is not None)


def _report(chosen: Mapping[str, SectionOf], facts: Facts, title: str | None, asked: bool) -> Report:
    """Make the sections, and the page of them; `asked` says that the user chose them."""
    made: list[Section] = []
    left = [f"{name}: not asked for" for name in DEFAULT if name not in chosen]
    missed: list[str] = []
    for name, section in chosen.items():
        try:
            found = section(facts)
        except UnsupportedOperation as error:
            found = f"{name}: {error}"
        if isinstance(found, str):
            missed.append(found)
        else:
            made.append(found)
    finding = f"Asked for, and not made: {'; '.join(missed)}. " if asked and missed else ""
    left += missed
    made.append(
        Section(
            "What was not done", finding + _left_out(left),
            notes=[_UNKNOWN, *(f"{note[0].upper()}{note[1:]}." for note in left)],
        )
    )  # fmt: skip
    shape = facts.x.shape[1:]
    named = {"table": " features", "tokens": " tokens", "image": " (channels, height, width)"}
    units = named.get(facts.kind, " values" if len(shape) == 1 else "")
    about = (
        f"{type(facts.model).__name__} with {_parameters(facts.model):,} parameters, at {len(facts.x):,} samples of "
        f"{' × '.join(map(str, shape))}{units}."
    )
    if facts.kind != "tokens":
        about += f" The network gets inputs from {float(facts.x.min()):.3g} to {float(facts.x.max()):.3g}."
    return Report(title or type(facts.model).__name__, about, made)


def report_sections() -> dict[str, SectionOf]:
    """Return the sections that `report` makes by default, by name; add your own and pass the result to `report`.

    Example:
        >>> list(report_sections())[:2]
        ['predictions', 'exactness']
    """
    return dict(DEFAULT)


def _left_out(left: Sequence[str]) -> str:
    names = "; ".join(reason.partition(":")[0] for reason in left)
    missing = f"This page has no section on: {names}." if left else "Every section was made."
    return f"{missing} It does not know where the data come from, and did not measure robustness or calibration."


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
