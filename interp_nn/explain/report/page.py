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

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --line: #d0d0d0; --soft: #f4f4f2; --link: #0b5394; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181b; --line: #454545; --soft: #23262a; --link: #8ab8f0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 56rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
a { color: var(--link); }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.finding { font-weight: 600; }
.note { background: var(--soft); padding: 0.5rem 0.8rem; border-radius: 4px; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
figcaption { font-size: 0.9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.2rem 0.6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; background: var(--soft); padding: 0.5rem; font-size: 0.8rem; }
@media print { details { display: none; } body { max-width: none; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


@dataclass
class Table:
    """A table: a caption, the names of its columns, and rows of text or numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def html(self) -> str:
        """Return the table's first rows, and all of them as CSV to copy."""
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(text(value))}</td>" for value in row) + "</tr>" for row in self.rows[:_ROWS]
        )
        left = len(self.rows) - _ROWS
        more = f"<p>and {left} more rows, in the CSV</p>" if left > 0 else ""
        caption = escape(self.caption)
        return (
            f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}"
            f"<details><summary>{caption}, as CSV</summary><pre>{escape(self.csv())}</pre></details>"
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


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG, and close it."""
    from matplotlib import pyplot

    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=80, facecolor="white")
    pyplot.close(figure)
    return out.getvalue()


def identifiers(titles: Sequence[str]) -> list[str]:
    """Return an anchor for each title."""
    return [f"{i}-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") for i, title in enumerate(titles, 1)]


def render(title: str, about: str, sections: Sequence[tuple[Section, Sequence[tuple[bytes, str]]]]) -> str:
    """Return the page; each section comes with its figures as PNGs."""
    anchors = identifiers([section.title for section, _ in sections])
    contents = "".join(
        f'<li><a href="#{anchor}">{escape(section.title)}</a>: {escape(section.finding)}</li>'
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


def _section(anchor: str, section: Section, images: Sequence[tuple[bytes, str]]) -> str:
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(image).decode()}" alt="{escape(alt)}">'
        f"<figcaption>{escape(alt)}</figcaption></figure>"
        for image, alt in images
    )
    tables = "".join(table.html() for table in section.tables)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in section.notes)
    return (
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(section.title)}</h2>'
        f'<p class="finding">{escape(section.finding)}</p>{figures}{tables}{notes}</section>'
    )
