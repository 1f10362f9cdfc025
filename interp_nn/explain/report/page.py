"""The HTML of a report: sections with findings, figures and tables, in one file that loads nothing else."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS = 12  # of a table that a page shows; the copy as CSV has all
_DOTS, _COLOURS = 144, 256  # of a figure: per inch, and in all
_WIDTH, _LEAST_WIDTH = 100, 72  # of a figure in CSS pixels per inch; text of 8 points has then 11 and 8 pixels
_PHONE = 340  # pixels that a phone has for a figure
_UNBROKEN = re.compile(r"± \S+|\d[\d.]*e-\d+")

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --line: #d0d0d0; --soft: #f4f4f2; --link: #0b5394; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181b; --line: #454545; --soft: #23262a; --link: #8ab8f0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 56rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: break-word; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.finding { font-weight: 600; }
.note { background: var(--soft); padding: 0.5rem 0.8rem; border-radius: 4px; }
.whole { white-space: nowrap; }
figure { margin: 1.5rem 0; } figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figcaption { margin-top: 0.3rem; font-size: 0.9rem; }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
caption { text-align: left; padding: 0.2rem 0; font-weight: 600; }
th, td { border-bottom: 1px solid var(--line); padding: 0.2rem 0.5rem; text-align: left; vertical-align: bottom; }
td { vertical-align: top; min-width: 4rem; } .number { text-align: right; } td.number { white-space: nowrap; }
textarea { width: 100%; height: 10rem; font: 0.8rem/1.4 monospace; color: var(--ink); background: var(--soft);
  border: 1px solid var(--line); }
@media print { details { display: none; } body { max-width: none; padding: 0; } h2, caption { break-after: avoid; }
  figure, tr, .note { break-inside: avoid; } .scroll { overflow: visible; } figure img { min-width: 0 !important; }
  table { font-size: 0.75rem; } th, td { padding: 0.1rem 0.3rem; min-width: 0; overflow-wrap: anywhere; } }
"""


@dataclass
class Table:
    """A table: a caption, the names of its columns, and rows of text or numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def html(self) -> str:
        """Return the table's first rows, and all of them as CSV to copy."""
        kinds = [
            ' class="number"' * all(isinstance(row[j], int | float) for row in self.rows)
            for j in range(len(self.columns))
        ]
        head = "".join(
            f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(kinds, self.columns, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(f"<td{kind}>{escape(text(value))}</td>" for kind, value in zip(kinds, row, strict=True))
            + "</tr>"
            for row in self.rows[:_ROWS]
        )
        left = len(self.rows) - _ROWS
        more = f"<p>The CSV has {left} more row{'s' * (left > 1)}.</p>" if left > 0 else ""
        caption = escape(self.caption)
        return (
            f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}"
            f"<details><summary>{caption}, as CSV</summary>"
            f'<textarea readonly aria-label="{caption}, as CSV">{escape(self.csv())}</textarea></details>'
        )

    def csv(self) -> str:
        """Return all rows as CSV."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.columns, *self.rows])
        return out.getvalue()


@dataclass
class Section:
    """One section of a report.

    Attributes:
        title: Its heading.
        finding: What the numbers say, in a sentence or two.
        figures: Figures, each with a text that says what it shows.
        tables: Tables.
        notes: Further sentences: how the numbers were made, and their checks.

    Example:
        >>> Section("Size", "The network has 100 parameters.").title
        'Size'
    """

    title: str
    finding: str
    figures: list[tuple[Figure, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def text(value: Any) -> str:
    """Return a value as the page shows it: numbers with three digits."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def image(figure: Figure, alt: str) -> str:
    """Return a figure as HTML with this text, and close it. On a phone a wide one scrolls, so that it stays readable."""
    from matplotlib import pyplot
    from PIL import Image

    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DOTS, facecolor="white")
    pyplot.close(figure)
    Image.open(drawn).convert("RGB").quantize(_COLOURS).save(out, format="png", optimize=True)  # a third of the size
    width, least = (round(float(figure.get_size_inches()[0]) * pixels) for pixels in (_WIDTH, _LEAST_WIDTH))
    text, data = escape(alt), base64.b64encode(out.getvalue()).decode()
    shown = f'<img src="data:image/png;base64,{data}" alt="{text}" style="width: {width}px; min-width: {least}px">'
    if least > _PHONE:
        shown = f'<div class="scroll" role="region" aria-label="{text}" tabindex="0">{shown}</div>'
    return f"<figure>{shown}<figcaption>{_prose(alt)}</figcaption></figure>"


def identifiers(titles: Sequence[str]) -> list[str]:
    """Return an anchor for each title."""
    return [f"{i}-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for i, title in enumerate(titles, 1)]


def render(title: str, about: str, sections: Sequence[tuple[Section, str]]) -> str:
    """Return the page; each section comes with the HTML of its figures."""
    anchors = identifiers([section.title for section, _ in sections])
    contents = "".join(
        f'<li><a href="#{anchor}">{escape(section.title)}</a>: {_prose(section.finding)}</li>'
        for anchor, (section, _) in zip(anchors, sections, strict=True)
    )
    body = "".join(_section(anchor, *part) for anchor, part in zip(anchors, sections, strict=True))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p></header>"
        f'<nav aria-label="Contents"><h2 id="contents">What this page says</h2><ol>{contents}</ol></nav>'
        f"<main>{body}</main></body></html>\n"
    )


def _section(anchor: str, section: Section, figures: str) -> str:
    tables = "".join(table.html() for table in section.tables)
    notes = "".join(f'<p class="note">{_prose(note)}</p>' for note in section.notes)
    return (
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(section.title)}</h2>'
        f'<p class="finding">{_prose(section.finding)}</p>{figures}{tables}{notes}</section>'
    )


def _prose(sentences: str) -> str:
    """Return text as HTML in which no line breaks inside of a number."""
    return _UNBROKEN.sub(r'<span class="whole">\g<0></span>', escape(sentences))
