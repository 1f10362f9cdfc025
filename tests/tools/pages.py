"""Pages whose Python runs: each block in order, and its output beside the block of text that follows it.

`PYTHONPATH=. python tests/tools/pages.py docs/howto/errors.md ...` writes the outputs of pages again: the blocks ```text that
stand directly after a block of Python. A new page begins with empty ones.
"""

import contextlib
import io
import re
import sys
import time
from pathlib import Path

import torch

import interp_nn

NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*\.?\d*(?:e[+-]?\d+)?|[+-]?nan\b")


def blocks(page):
    """(language, first line, lines) of each fenced block; a language of "" has the prose between them."""
    found, language, body, first = [], "", [], 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines()):
        if line.startswith("```"):
            found.append((language, first, body))
            language, body, first = ("" if language else line[3:].strip() or "none"), [], number + 1
        else:
            body.append(line)
    return [*found, (language, first, body)]


def python_and_output(page):
    """(first line, code, first line of its output or None, the output) for each block of Python."""
    found = blocks(page)
    for i, (language, first, body) in enumerate(found):
        if language == "python":
            after = found[i + 2] if i + 2 < len(found) and not "".join(found[i + 1][2]).strip() else ("", 0, [])
            yield first, "\n".join(body), *((after[1], after[2]) if after[0] == "text" else (None, []))


def close(wanted, got):
    """Two numbers as printed: 5 %, or two units of the last decimal place, apart; errors below 1e-4 at most tenfold."""
    if "nan" in wanted + got:
        return wanted == got
    a, b = (float(text.replace(",", "")) for text in (wanted, got))
    if 0 < abs(a) < 1e-4:
        return abs(b) <= 10 * abs(a)
    places = 0 if "e" in wanted else len(wanted.partition(".")[2])
    return abs(a - b) <= max(0.05 * abs(a), 2.0 * 10**-places if places else 0)


def same(wanted, got):
    """Lines that differ in spaces, and in numbers by little."""
    if re.sub(r"\s+", "", NUMBER.sub("#", wanted)) != re.sub(r"\s+", "", NUMBER.sub("#", got)):
        return False
    return all(close(a, b) for a, b in zip(NUMBER.findall(wanted), NUMBER.findall(got), strict=True))


def run(page):
    """(first line of its output or None, the output in the page, what was printed) for each block, from top to bottom."""
    names = {"torch": torch, "interp_nn": interp_nn}
    with interp_nn.use_engine("auto"), torch.random.fork_rng():
        for first, code, at, wanted in python_and_output(page):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * first + code, str(page), "exec"), names)  # so that an error has the page's own line
            yield at, wanted, printed.getvalue().rstrip().splitlines()


def check(page):
    """Run a page; an output that differs from the page's is an AssertionError with both."""
    for at, wanted, got in run(page):
        if at is not None and not (
            len(wanted) == len(got) and all(same(a, b) for a, b in zip(wanted, got, strict=True))
        ):
            raise AssertionError("\n".join((f"{page}:{at + 1}", "the page has:", *wanted, "the code prints:", *got)))


def rewrite(page):
    """Run a page and put what its code prints into its blocks of text."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for at, wanted, got in reversed(list(run(page))):
        if at is not None:
            lines[at : at + len(wanted)] = [line.rstrip() for line in got]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        began = time.process_time()
        rewrite(Path(name))
        print(f"{name}: {time.process_time() - began:.1f} s")
