"""Pages in a real browser: they load nothing, fit a phone, work by keyboard, and are readable light, dark and on paper."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import NAMES, Browser, find_browser, running
from torch import nn

from interp_nn.explain import report

EXECUTABLE = find_browser()
pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")
RESULTS = Path(__file__).parents[3] / "benchmarks/results/cpu/experiments"
PAGES = sorted(RESULTS.glob("report_pages-*.html"))

FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
FIGURES = """[...document.querySelectorAll("img, svg")].filter(figure => {
  const box = figure.getBoundingClientRect();
  return !(box.width > 0 && box.height > 0 && (figure.tagName != "IMG" || figure.naturalWidth > 0));
}).map(figure => figure.alt)"""
TAGS = "[...document.querySelectorAll('*')].map(element => element.localName)"
# Text of 8 points has 8 pixels where an inch has 72; figures have 144 dots per inch.
SMALL = (
    """[...document.images].filter(figure => figure.width / figure.naturalWidth * 144 < 70).map(figure => figure.alt)"""
)
BROKEN = """[...document.querySelectorAll(".whole")].filter(number => number.getClientRects().length > 1)
  .map(number => number.textContent)"""
# A link has scrolled when its target is at the top of the window, or the page is at its end.
CONTENTS = """[...document.querySelectorAll('a[href^="#"]')].filter(link => {
  scrollTo(0, 0);
  link.click();
  const target = document.getElementById(link.hash.slice(1)), root = document.documentElement;
  return !target || location.hash != link.hash
    || (Math.abs(target.getBoundingClientRect().top) > 2 && scrollY + innerHeight < root.scrollHeight - 2);
}).map(link => link.hash)"""
STOPS = """document.activeElement.blur(); scrollTo(0, 0); window.visited = [];
window.stops = [...document.querySelectorAll("*")].filter(e => e.matches("a[href], button, summary, textarea, [tabindex]")
  || (e.scrollWidth > e.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(e).overflowX)));
stops.length"""
VISIT = """visited.push(document.activeElement);
getComputedStyle(document.activeElement).outlineStyle != "none" || document.activeElement == document.body"""
MISSED = "stops.filter(stop => !visited.includes(stop)).map(stop => stop.outerHTML.slice(0, 80))"
CONTRASTS = """(() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => channels(colour).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((channels(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = {};
  for (const e of document.body.querySelectorAll("*"))
    if ([...e.childNodes].some(node => node.nodeType == 3 && node.data.trim()) && e.checkVisibility()) {
      const [low, high] = [getComputedStyle(e).color, behind(e)].map(luminance).sort((a, b) => a - b);
      const contrast = (high + 0.05) / (low + 0.05);
      found[e.tagName] = Math.min(found[e.tagName] ?? contrast, contrast);
    }
  return found;
})()"""
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


def problems(browser: Browser, file: Path) -> list[str]:
    """Look at a page at two widths, in two schemes, by keyboard and on paper; return what is wrong, by kind."""
    found: list[str] = []
    browser.scheme("light")
    browser.resize(1280)
    browser.open(file.as_uri())
    browser.evaluate(FRAMES)
    found += [f"console: {text}" for text in map(_message, browser.events) if text]
    requests = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    found += [f"request: {url}" for url in requests if url != file.as_uri() and not url.startswith("data:")]
    tags = re.findall(r"<([a-z][a-z0-9]*)", file.read_text(encoding="utf-8"))
    found += ["repaired: the browser has other elements"] * (tags != browser.evaluate(TAGS))
    found += [f"figure: {alt}" for alt in browser.evaluate(FIGURES)]
    found += [f"link: {link}" for link in browser.evaluate(CONTENTS)]

    browser.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    backgrounds: set[str] = set()
    for width in (1280, 375):
        browser.resize(width)
        wide = browser.evaluate(f"{FRAMES}.then(() => document.documentElement.scrollWidth)")
        found += [f"wide: {wide} px at {width}"] * (wide > width)
        found += [f"small: {alt}" for alt in browser.evaluate(SMALL)]
        found += [f"broken: {text}" for text in browser.evaluate(BROKEN)]
        if width == 375:  # where most scrolls sideways
            for _ in range(browser.evaluate(STOPS) + 1):
                browser.press("Tab")
                found += ["keyboard: no outline"] * (not browser.evaluate(VISIT))
            found += [f"keyboard: {stop}" for stop in browser.evaluate(MISSED)]
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        backgrounds.add(browser.evaluate(BACKGROUND))
        contrasts = browser.evaluate(CONTRASTS)
        found += [f"contrast: {tag} {ratio:.2f}, {scheme}" for tag, ratio in contrasts.items() if ratio < 4.5]
    found += ["dark: the same background"] * (len(backgrounds) == 1)
    # Paper is white, whatever the reader prefers. A4 has 718 pixels between Chromium's margins, and a wider page is shrunk.
    browser.command("Emulation.setEmulatedMedia", media="print")
    browser.resize(718)
    wide = browser.evaluate(f"{FRAMES}.then(() => document.documentElement.scrollWidth)")
    found += [f"paper: {wide} px"] * (wide > 718)
    found += ["paper: it is dark"] * (browser.evaluate(BACKGROUND) not in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)"))
    browser.command("Emulation.setEmulatedMedia", media="")
    pdf = base64.b64decode(browser.command("Page.printToPDF", preferCSSPageSize=True)["data"])
    found += ["paper: no PDF"] * (not pdf.startswith(b"%PDF-") or len(pdf) < 1_000)
    return found


def _message(event: dict[str, Any]) -> str | None:
    """Return the text of a message of the console that is a warning or an error."""
    parameters = event["params"]
    if event["method"] == "Runtime.exceptionThrown":
        return str(parameters["exceptionDetails"]["text"])
    if event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
        return str(parameters["args"])
    if event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
        return str(parameters["entry"]["text"])
    return None


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert EXECUTABLE is not None
    with running(EXECUTABLE) as started:
        yield started


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem.removeprefix("report_pages-"))
def test_committed_pages(browser: Browser, file: Path) -> None:
    assert problems(browser, file) == []


def test_a_fresh_page(browser: Browser, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    names = [f"a feature with a name that a phone has no room for, number {i}" for i in range(2)]
    sections = ["exactness", "importance"]
    page = report(model, torch.randn(12, 2), torch.randint(0, 2, (12,)), feature_names=names, sections=sections)
    assert problems(browser, page.save(tmp_path / "page.html")) == []
    browser.resize(1280)
    browser.open((tmp_path / "page.html").as_uri())
    browser.evaluate("document.querySelector('summary').focus()")
    browser.press("Enter")
    assert browser.evaluate("document.querySelector('details').open")


def test_what_is_wrong_is_found(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<!DOCTYPE html><html lang="en"><title>Wrong</title><body style="background: white"><script>console.error("no")'
        '</script><img src="missing.png" alt="none"><img src="data:image/svg+xml,'
        "%3Csvg xmlns='http://www.w3.org/2000/svg' width='800' height='9'/%3E\" alt=\"small\" width=\"100\">"
        '<span class="whole">1<br>2</span><a href="#nowhere" style="outline: none">Nowhere</a>'
        '<p tabindex="-1" style="width: 2000px; color: #999">Wide and pale</p></body></html>',
        encoding="utf-8",
    )
    found = problems(browser, tmp_path / "page.html")
    assert {line.partition(":")[0] for line in found} == {
        "broken", "console", "contrast", "dark", "figure", "keyboard", "link", "paper", "repaired", "request", "small", "wide",
    }  # fmt: skip
    assert len([line for line in found if line.startswith("keyboard")]) >= 2
