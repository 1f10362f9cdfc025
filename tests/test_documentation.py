"""The Python of README and of the guide runs, a page from top to bottom, and their links lead somewhere."""

import re
import sys
from pathlib import Path

import pytest
import torch

import interp_nn

ROOT = Path(__file__).parents[1]
GUIDE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDE]


def blocks(page):
    """The page with all but its Python blanked out, so that an error has the page's own line."""
    kept, python = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        python = fence and line == "```python" if fence else python
        kept.append("" if fence or not python else line)
    return "\n".join(kept)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page).strip()], ids=lambda page: page.stem)
def test_python_runs(page, capsys):
    with interp_nn.use_engine("auto"), torch.random.fork_rng():
        exec(compile(blocks(page), str(page), "exec"), {"torch": torch, "interp_nn": interp_nn})
    capsys.readouterr()
    if plots := sys.modules.get("matplotlib.pyplot"):
        plots.close("all")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        archived = not (ROOT / "benchmarks/results").exists()  # a source archive, without records and figures
        left_out = archived and ("benchmarks/results/" in link or link.endswith(".png"))
        assert "://" in link or left_out or (page.parent / link).exists(), link


def test_the_guide_has_its_pages():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert {page.name for page in GUIDE} == {"index.md", *re.findall(r"\]\(([\w-]+\.md)\)", index)}
