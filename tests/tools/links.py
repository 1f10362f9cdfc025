"""Links of the project's pages: to files, to headings, and by their syntax to the web. `make lint` runs this; no network."""

import re
import sys
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
GUIDE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / ".github").rglob("*.md")), *GUIDE]
_CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)]*)\)")


def prose(page):
    """The text of a page with its code blanked out."""
    return _CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), page.read_text(encoding="utf-8"))


@cache
def anchors(page):
    """The anchors of a page: its headings as GitHub and the site write them, and the names that the reference documents."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(
        r"^#+ +(.*?) *$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    slugs = {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", title)).lower().replace(" ", "-") for title in headings}
    return slugs | set(re.findall(r"^::: (\S+)", text, re.MULTILINE))


def fault(page, link):
    """What is wrong with a link of a page, or None."""
    place, _, anchor = link.partition("#")
    if "://" in link:
        url = urlsplit(link)
        bad = url.scheme not in ("http", "https") or "." not in url.netloc or re.search(r"[\s<>\"{}|\\^`]|[.,;]$", link)
        return "is no URL" if bad else None
    target = (page.parent / place).resolve() if place else page
    if "benchmarks/results/" in place and not (ROOT / "benchmarks" / "results").exists():
        return None  # a source archive has no records
    if ROOT not in target.parents or not target.exists():
        return "leads to no file"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return f"has no heading #{anchor} there"
    return None


def faults():
    """A line for each link that leads nowhere."""
    return [
        f"{page.relative_to(ROOT)}: ({link}) {why}"
        for page in PAGES
        for link in _LINK.findall(prose(page))
        if (why := fault(page, link)) is not None
    ]


if __name__ == "__main__":
    found = faults()
    print("\n".join(found) or f"links of {len(PAGES)} pages lead somewhere")
    sys.exit(bool(found))
