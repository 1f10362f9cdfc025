"""The Python of README and of the guide runs, a page from top to bottom, and prints what the page says."""

import sys
import tempfile
from pathlib import Path

import pages
import pytest
from uncoloured import lay_out_only

ROOT = Path(__file__).parents[1]
GUIDE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *GUIDE]


def name(page):
    return page.relative_to(ROOT).with_suffix("").as_posix()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name(page), marks=[pytest.mark.slow] * (page.parent.name == "tutorials"))
        for page in PAGES
        if any(pages.python_and_output(page))
    ],
)
def test_python_runs_and_prints_what_the_page_says(page, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lay_out_only(monkeypatch)  # reports; the tests of a browser look at their pixels
    pages.check(page)
    capsys.readouterr()
    if plots := sys.modules.get("matplotlib.pyplot"):
        plots.close("all")


@pytest.mark.parametrize(
    ("wanted", "got", "equal"),
    [
        ("98.9 % of 500", "98.8 % of 500", True),
        ("98.9 % of 500", "90.0 % of 500", False),
        ("9 layers", "8 layers", False),
        ("error 2e-16", "error 9e-16", True),
        ("error 2e-16", "error 3e-08", False),
        ("-0.0  1,200", " 0.0 1,210", True),
        ("loss nan", "loss 2.1", False),
        ("ValueError: x", "TypeError: x", False),
    ],
)
def test_outputs_are_compared_within_a_tolerance(wanted, got, equal, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n```python\nprint({got!r})\n```\n\n```text\n{wanted}\n```\n", encoding="utf-8")
    if equal:
        return pages.check(page)
    with pytest.raises(AssertionError, match=r"page\.md:8"):
        pages.check(page)
    pages.rewrite(page)
    pages.check(page)
    assert page.read_text(encoding="utf-8").endswith(f"```text\n{got}\n```\n")
