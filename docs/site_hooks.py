"""Hooks of mkdocs: what `make docs` makes of the pages' text. Each page also reads well without them.

- A file of the repository outside of docs/ that a page links to is copied into the site. CONTRIBUTING and CHANGELOG are pages.
- `plots*.md`: their Python runs, and each block is followed by the figures that it draws.
- A block ```help has a command line in each line; the output of its `--help` takes its place.
- Griffe expects doctests below `Examples:`; our docstrings have them below `Example:`.
"""

import contextlib
import importlib
import io
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
_LINK = re.compile(r"(?<=\]\()[^)\s#]+")
_PYTHON = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
_HELP = re.compile(r"^```help\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside of docs/."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for page in files.documentation_pages():
        for target in filter(None, (_file(page, link) for link in _LINK.findall(page.content_string))):
            if DOCS not in target.parents and _place(target) not in files.src_uris:
                files.append(File.generated(config, _place(target), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw figures, print the help of commands, and make links lead to where files are in the site."""
    if page.file.src_uri.startswith("plots"):
        markdown = _drawn(markdown, config, files)
    markdown = _HELP.sub(lambda block: "\n\n".join(map(_help, block[1].splitlines())) + "\n", markdown)
    return _LINK.sub(lambda link: _moved(page.file, link[0]), markdown)


def _file(page: File, link: str) -> Path | None:
    """Return the file of the repository that a page links to."""
    target = (Path(str(page.abs_src_path)).parent / link).resolve()
    return target if ROOT in target.parents and target.is_file() else None


def _place(target: Path) -> str:
    return target.relative_to(DOCS if DOCS in target.parents else ROOT).as_posix()


def _moved(page: File, link: str) -> str:
    target = _file(page, link)
    return link if target is None else Path(os.path.relpath(_place(target), Path(page.src_uri).parent)).as_posix()


def _drawn(markdown: str, config: MkDocsConfig, files: Files) -> str:
    import matplotlib

    matplotlib.use("agg")
    import torch
    from matplotlib import pyplot

    names: dict[str, object] = {}
    torch.set_num_threads(1)  # networks this small lose more to waking threads than they gain

    def figures() -> Iterator[str]:
        for number in pyplot.get_fignums():
            figure, png = pyplot.figure(number), io.BytesIO()
            figure.savefig(png, format="png", dpi=90, bbox_inches="tight")
            place = f"plots/{len([uri for uri in files.src_uris if uri.startswith('plots/')])}.png"
            files.append(File.generated(config, place, content=png.getvalue()))
            says = [" ".join((axes.get_title() or axes.get_ylabel()).split()) for axes in figure.axes]
            yield f"\n![{'; '.join(filter(None, says))}]({place})\n"
        pyplot.close("all")

    def run(block: re.Match[str]) -> str:
        exec(compile(block[1], "docs/plots.md", "exec"), names)
        return block[0] + "".join(figures())

    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        return _PYTHON.sub(run, markdown)


def _help(command: str) -> str:
    """Run `python -m MODULE ... --help` in this process."""
    python, option, module, *words = command.split()
    assert (python, option) == ("python", "-m"), command
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [module, *words, "--help"]),
        mock.patch.dict(os.environ, COLUMNS="90"),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        runpy.run_module(module, run_name="__main__")
    return f"```text\n{printed.getvalue().strip()}\n```\n"


class Docstrings(griffe.Extension):
    """Read `Example:` as `Examples:`, and show the value of a default instead of a private name."""

    def on_function(self, *, func: griffe.Function, **_: object) -> None:
        """Replace defaults such as `_ONE`."""
        for parameter in func.parameters:
            name = str(parameter.default)
            if re.fullmatch(r"_[A-Za-z]\w*", name):
                value = getattr(importlib.import_module(func.module.path), name)
                parameter.default = re.sub(r"<object .*>", "...", repr(value))

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rename the section of an object's docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
