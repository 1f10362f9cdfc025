"""The site: each page has its place, links lead somewhere, and what pages list is what there is."""

import importlib
import importlib.util
import inspect
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import links
import pytest
from support import needs_records

from benchmarks.__main__ import main as benchmarks_main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PUBLIC = (
    "convert",
    "explain",
    "explain.plots",
    "explain.descramble.derivatives",
    "functional",
    "gates",
    "linalg",
    "nn",
)
MODULES = ["interp_nn", *(f"interp_nn.{name}" for name in PUBLIC), "benchmarks"]
# Methods of base classes for PyTorch, for scikit-learn and for the library itself.
UNLISTED = {"train", "register_parameter", "extra_repr", "get_params", "set_params", "whole_matrix", "exact_weight",
            "reset_orthogonal_", "options", "reset_norm", "formed_weight", "frozen_weight"}  # fmt: skip
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))


def test_links_lead_somewhere():
    assert links.faults() == []


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("training.md", None),
        ("training.md#b-and-weight", None),
        ("#where-to-begin", None),
        ("reference/nn.md#interp_nn.nn.follow", None),
        ("https://arxiv.org/abs/2310.16295", None),
        ("trainings.md", "leads to no file"),
        ("../../elsewhere", "leads to no file"),
        ("training.md#no-such", "has no heading #no-such there"),
        ("#nowhere", "has no heading #nowhere there"),
        ("https://arxiv/abs", "is no URL"),
        ("https://arxiv.org/abs/2310.16295.", "is no URL"),
        ("htps://arxiv.org", "is no URL"),
    ],
)
def test_the_check_of_links(link, why):
    assert links.fault(DOCS / "index.md", link) == why


def test_every_page_has_one_place_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"[\w/-]+\.md\b", navigation)
    pages = [str(page.relative_to(DOCS)) for page in links.GUIDE]
    assert sorted(listed) == sorted([*pages, "CONTRIBUTING.md", "CHANGELOG.md"])


def test_no_page_of_prose_is_long():
    """Generated tables and the changelog do not count."""
    for page in {*links.PAGES} - {ROOT / "CHANGELOG.md"}:
        text = page.read_text(encoding="utf-8")
        prose = re.sub(r"^<!-- begin: .*?^<!-- end -->$", "", text, flags=re.DOTALL | re.MULTILINE)
        assert prose.count("\n") <= 150, page


def documented():
    """The objects of the reference, by the name there."""
    for name in re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        # where a module has the name, the site would show that
        parent = importlib.import_module(module)
        assert not hasattr(parent, "__path__") or importlib.util.find_spec(name) is None, f"{name} is a module, too"
        yield name, getattr(parent, attribute)


def test_every_public_name_is_in_the_reference():
    found = {id(thing) for _, thing in documented()}
    missing = []
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.ismodule(thing) and not isinstance(thing, str) and id(thing) not in found:
                missing.append(f"{module.__name__}.{name}")
    assert not missing


def test_no_name_is_in_the_reference_twice():
    names = [name for name, _ in documented()]
    assert sorted(set(names)) == sorted(names)


def test_inherited_methods_are_in_the_reference():
    """The site shows what a class defines itself; options name what it inherits from classes that are not public."""
    listed = set(re.findall(r"\w+", " ".join(re.findall(r"members: \[(.*?)\]", REFERENCE))))
    classes = {thing for name, thing in documented() if inspect.isclass(thing)}
    known = {cls for cls in classes if cls.__name__ not in ("LinearForm", "Freezable")}
    bases = {base for cls in classes for base in cls.__mro__ if base.__module__.startswith("interp_nn")} - known
    names = {
        name: base
        for base in bases
        for name, value in vars(base).items()
        if name[0] != "_" and (callable(value) or isinstance(value, property | classmethod | staticmethod))
    }
    own = {name for cls in known for name in vars(cls)}
    assert {name: base for name, base in names.items() if name not in listed | own | UNLISTED} == {}


def test_every_command_is_in_the_reference(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        benchmarks_main(["--help"])
    commands = {f"benchmarks {name}" for name in re.search(r"{([\w,]+)}", capsys.readouterr().out)[1].split(",")}
    monkeypatch.delitem(sys.modules, "interp_nn.__main__", raising=False)  # runpy warns if another test has imported it
    monkeypatch.setattr(sys, "argv", ["interp_nn", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("interp_nn", run_name="__main__")
    commands |= {f"interp_nn {name}" for name in re.search(r"{([\w,]+)}", capsys.readouterr().out)[1].split(",")}
    blocks = re.findall(r"^```help\n(.*?)^```", REFERENCE, re.DOTALL | re.MULTILINE)
    listed = [line.removeprefix("python -m ") for block in blocks for line in block.splitlines()]
    assert sorted(listed) == sorted([*commands, "benchmarks", "interp_nn"])


def test_environment_variables_are_those_of_the_code():
    text = (DOCS / "environment.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    sources = [file for folder in ("interp_nn", "benchmarks", "tests") for file in (ROOT / folder).rglob("*.py")]
    sources += [ROOT / "setup.py", ROOT / "Makefile", ROOT / ".ci" / "run"]
    used = {name for file in sources for name in re.findall(r"INTERP_NN_[A-Z_]+", file.read_text(encoding="utf-8"))}
    macros = {
        name
        for file in [*(ROOT / "csrc").iterdir(), *(ROOT / "tests" / "tools").rglob("*.[ch]*")]
        for name in re.findall(r"INTERP_NN_[A-Z_]+", file.read_text(encoding="utf-8"))
    }
    assert used - macros == {name for name in told if name.startswith("INTERP_NN_")}
    reads = r"environ(?:\.get\(|\[)\"([A-Z_]+)\"|\"([A-Z_]+)\" (?:not )?in os\.environ"
    files = [*(ROOT / "interp_nn").rglob("*.py"), ROOT / "setup.py"]
    found = {name for file in files for pair in re.findall(reads, file.read_text(encoding="utf-8")) for name in pair}
    assert found - {""} <= told and {"CUDA_HOME", "TRITON_INTERPRET"} <= found


def test_the_page_on_adding_a_part_is_true():
    """Files exist, and hold the names in capitals that the same item names; a section has 10 to 25 lines."""
    text = (DOCS / "adding.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
        "A kernel", "An engine", "An operation of the table", "An estimator", "An experiment",
    ]  # fmt: skip
    for section in text.split("\n## ")[1:]:
        assert 10 <= len(section.strip().splitlines()) <= 25, section.partition("\n")[0]
        for item in re.split(r"\n(?=\d\. )|\n\n", section):
            named = re.findall(r"`([^`]+)`", item)
            files = [name for name in named if re.fullmatch(r"(interp_nn|tests|csrc|benchmarks|docs)/[a-z_/.]*", name)]
            assert [name for name in files if not (ROOT / name).exists()] == []
            held = "".join((ROOT / name).read_text(encoding="utf-8") for name in files if (ROOT / name).is_file())
            capitals = [name for name in named if re.fullmatch(r"_?[A-Z][A-Z_]{3,}", name) and name[:9] != "INTERP_NN"]
            assert [name for name in capitals if files and name not in held] == [], item


def test_the_glossary_is_in_order_and_links():
    lines = (DOCS / "glossary.md").read_text(encoding="utf-8").splitlines()[2:]
    terms = [re.fullmatch(r"- \*\*(.+?)\*\*: [A-Zqmx<WFG].*\]\(\S+\)\.", line)[1] for line in lines]
    assert terms == sorted(terms, key=str.lower) and 30 <= len(terms) <= 50


def test_the_changelog_has_the_version():
    version = re.search(r'"(\d+\.\d+\.\d+)', (ROOT / "interp_nn" / "version.py").read_text(encoding="utf-8"))[1]
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """What a page of the site loads, links to and names."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.links, self.names = [], [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loads.append(given["src"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site: strict, so that a warning is an error."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path_factory.mktemp("site")
    made = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


@needs_records
@pytest.mark.slow
def test_the_site_needs_no_network_and_its_links_lead_somewhere(site):
    pages = {page: Tags(page) for page in site.rglob("*.html") if "benchmarks/results" not in str(page)}
    assert len(pages) > 40
    for page, tags in pages.items():
        assert not [source for source in tags.loads if urlsplit(source).scheme not in ("", "data")], page.name
        if page.name == "404.html":
            continue  # its links are from the root of a server
        for source in (source for source in tags.loads if not source.startswith("data:")):
            assert (page.parent / urlsplit(source).path).exists(), f"{page}: {source}"
        for link in tags.links:
            url = urlsplit(link)
            if url.scheme:
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            if target.is_dir():
                target = target / "index.html"
            assert target.exists(), f"{page.name}: {link}"
            if url.fragment and target in pages:
                assert unquote(url.fragment) in pages[target].names | {"__top"}, f"{page.name}: {link}"
    for file in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?https?:", file.read_text(encoding="utf-8")), file
    assert (site / "search" / "search_index.js").exists()


@needs_records
@pytest.mark.slow
def test_the_site_has_pictures_help_and_names(site):
    pictures = sum(
        (site / page).read_text(encoding="utf-8").count('src="plots/')
        for page in ("plots.html", "plots_of_structure.html")
    )
    assert pictures >= len(importlib.import_module("interp_nn.explain.plots").__all__)
    assert "usage: python -m benchmarks run" in (site / "reference" / "commands.html").read_text(encoding="utf-8")
    named = set().union(*(Tags(page).names for page in (site / "reference").glob("*.html")))
    assert {name for name, _ in documented()} <= named
    assert not [
        page for page in (site / "reference").glob("*.html") if "doc-symbol-module" in page.read_text(encoding="utf-8")
    ]
