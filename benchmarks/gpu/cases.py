"""The cases of the correctness part: every pair of levels of sizes, dtypes, layouts and wanted results meets in one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

FEATURES = (1, 7, 64, 100, 512, 1024)
COLUMNS = (1, 10, 16, 63, 64, 65, 100, 128)
WIDE_COLUMNS = (200, 256)
# Numbers of rows that share a compiled kernel. Tables may have other tiles for many rows.
FEW_ROWS = (1, 15, 17, 127, 128, 129, 1000, 4096)
MANY_ROWS = (70001,)
CLASSES = (2, 10, 17, 128)
MODES = ("fp32", "tf32", "bf16", "fp16")
# Layouts of b: row by row, a layer's transposed weight, one with distant rows, a gap after each number.
LAYOUTS = ("rows", "transposed", "apart", "strided")

_COMMON = {"mode": MODES, "d": FEATURES, "k": COLUMNS, "rows": (FEW_ROWS, MANY_ROWS), "layout": LAYOUTS}
_SUMMARY = {"wanted": ("x b", "x", "b", "x b bias", "bias")}
_PAIR = {"wanted": ("projection summary", "projection", "summary")}
_LOSS = {"reduction": ("mean", "sum", "none"), "ignored": ("none", "some", "all"), "wanted": ("x b a c", "x", "b a c")}
_HEAD = {**_LOSS, "m": CLASSES, "bias": (False, True)}
FACTORS: dict[str, Mapping[str, Sequence[Any]]] = {
    "summary": {**_COMMON, **_SUMMARY}, "pair": {**_COMMON, **_PAIR}, "pair_loss": {**_COMMON, **_LOSS},
    "flat": {**_COMMON, **_HEAD}, "latent": {**_COMMON, **_HEAD},
    "wide summary": {**_COMMON, **_SUMMARY, "k": WIDE_COLUMNS}, "wide pair": {**_COMMON, **_PAIR, "k": WIDE_COLUMNS},
}  # fmt: skip


class Case(NamedTuple):
    """One computation (a key of FACTORS) in one mode and layout of b, for each number of rows in turn.

    wanted: the inputs whose gradients are computed (with "bias" the summary has one), or the outputs of a pair. m: classes.
    """

    what: str
    mode: str
    rows: tuple[int, ...]
    d: int
    k: int
    layout: str = "rows"
    wanted: str = "x b"
    bias: bool = False
    m: int | None = None
    reduction: str = "mean"
    ignored: str = "some"

    @property
    def name(self) -> str:
        """Return the case as text."""
        sizes = f"n {self.rows[0]}{'...' if len(self.rows) > 1 else ''}, d {self.d}, k {self.k}"
        extra = f", m {self.m}" if self.m else ""
        loss = f", {self.reduction}, {self.ignored} ignored" if self.loss else ""
        marks = (f", {self.layout}" if self.layout != "rows" else "") + (", bias" if self.bias else "")
        return f"{self.what} {self.mode}, {sizes}{extra}{loss}, {self.wanted}{marks}"

    @property
    def loss(self) -> bool:
        """Return whether the case is a loss."""
        return self.what in ("pair_loss", "flat", "latent")

    @property
    def empty_mean(self) -> bool:
        """Return whether the loss is the mean over no rows."""
        return self.loss and self.reduction == "mean" and self.ignored == "all"


def covering(factors: Mapping[str, Sequence[Any]], seed: int = 0, tries: int = 24) -> list[dict[str, Any]]:
    """Return rows with a level of every factor, so that any two levels of two factors meet; most pairs meet early."""
    draw = random.Random(seed)
    names = list(factors)
    open_pairs = {
        (one, i, other, j)
        for one, other in itertools.combinations(names, 2)
        for i in range(len(factors[one]))
        for j in range(len(factors[other]))
    }
    rows = []
    while open_pairs:
        candidates = [_filled(factors, names, open_pairs, draw) for _ in range(tries)]
        best = max(candidates, key=lambda row: len(open_pairs & _pairs(row, names)))
        open_pairs -= _pairs(best, names)
        rows.append({name: factors[name][best[name]] for name in names})
    return rows


def _pairs(row: Mapping[str, int], names: Sequence[str]) -> set[tuple[str, int, str, int]]:
    """Return the pairs of levels in a row or a part of one."""
    return {
        (one, row[one], other, row[other])
        for one, other in itertools.combinations(names, 2)
        if one in row and other in row
    }


def _filled(
    factors: Mapping[str, Sequence[Any]], names: Sequence[str], open_pairs: set[tuple[str, int, str, int]], draw: random.Random
) -> dict[str, int]:  # fmt: skip
    """Complete a row around an open pair; each further level meets the most open pairs."""
    one, i, other, j = draw.choice(sorted(open_pairs))
    row = {one: i, other: j}
    for name in draw.sample(names, len(names)):
        if name not in row:
            levels = draw.sample(range(len(factors[name])), len(factors[name]))
            row[name] = max(levels, key=lambda level: len(open_pairs & _pairs({**row, name: level}, names)))
    return row


def cases(seed: int = 0) -> list[Case]:
    """Return all cases, the kinds in turn, so that a run that is cut short has cases of each."""
    by_kind = [
        [Case(what=what, **row) for row in covering(factors, seed + i)]
        for i, (what, factors) in enumerate(FACTORS.items())
    ]
    mixed = itertools.zip_longest(*by_kind)
    return [case for cases in mixed for case in cases if case is not None]


def tiny_cases() -> list[Case]:
    """Return a few cases that are small enough for Triton's interpreter."""
    return [
        Case("summary", "fp32", (5, 17), 20, 3, "transposed", "x b bias"),
        Case("pair", "fp16", (9,), 7, 4, "strided", "projection summary"),
        Case("pair_loss", "fp32", (9,), 20, 3, "apart", "x b a c", ignored="all"),
        Case("latent", "fp16", (9,), 7, 5, "transposed", "x b a c", True, m=3, reduction="none"),
        Case("flat", "fp32", (17,), 7, 16, wanted="b a c", m=2, reduction="sum"),
        Case("wide pair", "fp32", (5,), 7, 130, wanted="summary"),
    ]
