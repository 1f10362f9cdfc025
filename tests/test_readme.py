"""README: short, and its numbers are those of records and of the pages that are held to them."""

import json
import re
from pathlib import Path

from support import needs_records

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())
RESULTS = ROOT / "benchmarks" / "results" / "cpu"


def rows(page, title):
    """The rows of the first table after a title, by their first cell, as dictionaries by column."""
    lines = iter((ROOT / page).read_text(encoding="utf-8").split(title, 1)[1].splitlines())
    table = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
        elif table:
            break
    return {row[0]: dict(zip(table[0], row, strict=True)) for row in table[2:]}


def test_length():
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 9_000


@needs_records
def test_costs_are_those_of_the_record():
    cost = rows("README.md", "## Cost")
    both = rows("docs/performance.md", "**summary, forward + backward**")
    loss = rows("docs/performance.md", "**cross entropy of the pair, loss and gradients**")
    assert cost.keys() <= both.keys() and cost.keys() <= loss.keys()
    for shape, row in cost.items():
        wanted = [both[shape][name] for name in ("ours / linear", "unfused / ours", "inverse / ours")]
        wanted.append(loss[shape]["ours / linear"])
        assert list(row.values())[1:] == [cell.partition(" ")[0] for cell in wanted]  # without its interval
    shapes = ("32, 512, 100", "4096, 512, 100", "65536, 512, 64")
    small, middle, large = (float(both[shape]["ours / linear"].partition(" ")[0].strip("≈")) for shape in shapes)
    assert f"{small:.1f} times `nn.Linear`'s time at 32 rows, {middle:.1f} at 4,096, {large:.1f} at 65,536" in README


@needs_records
def test_gains_are_those_of_the_records():
    demo = json.loads((RESULTS / "demo-digits.json").read_text(encoding="utf-8"))["results"]["runs"]
    for head, text in (("summary", "{:.1f} ± {:.1f} % on digits"), ("mlp", "{:.1f} ± {:.1f} % of an MLP head")):
        found = [100 * one["test_accuracy"][-1] for one in demo if one["head"] == head]
        mean = sum(found) / len(found)
        spread = (sum((value - mean) ** 2 for value in found) / (len(found) - 1)) ** 0.5
        assert text.format(mean, spread) in README
    agree = [one["agreement"] for one in demo if one["head"] == "summary"]
    assert f"{100 * sum(agree) / len(agree):.2f} % of images" in README
    defect = max(one["orthogonality_defect"] for one in demo if one["head"] == "summary")
    assert f"singular values of b end within {defect + 0.005:.2f} of 1" in PROSE

    sweep = (ROOT / "docs" / "polynomials.md").read_text(encoding="utf-8")
    assert "| SummaryLinear, newton-schulz | 28 of 28 | 9 of 9 | 6 of 6 |" in sweep
    assert (
        "28 of 28 optimizers and rates at which `nn.Linear` trains well, a CNN at 9 of 9, a transformer at 6 of 6"
        in PROSE
    )
    assert (
        "| summary | 18 of 28, 26 failed |" in sweep and "18 of the same 28 optimizers and rates, with 26 runs" in PROSE
    )

    heads = json.loads((RESULTS / "experiments" / "readable_heads.json").read_text(encoding="utf-8"))["results"]
    heads = heads["digits"]["heads"]
    own, turned = (heads["summary"][name]["sparsity"]["mean"] for name in ("own", "varimax"))
    assert f"the sparsity of these contributions from {own:.2f} to {turned:.2f}" in PROSE
    plain = heads["linear latent"]
    assert round(plain["varimax"]["sparsity"]["mean"], 1) == round(turned, 1)  # "gain as much"
    accuracies = {f"{100 * heads[name]['accuracy']['mean']:.1f} % both" for name in ("summary", "linear latent")}
    assert len(accuracies) == 1 and accuracies.pop() in PROSE

    exact = (RESULTS / "experiments" / "digits_attribution.json").read_text(encoding="utf-8")
    (error,) = re.findall(r"to (\S+) in fp64", README)
    assert re.search(rf"\b{error.replace('e-', '[0-9]*e-')}", exact)
    papers = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    (constant,) = re.findall(r"the constant of the predicted logit, median, % \| - \| (\S+) \|", papers)
    assert f"{float(constant):.0f} % of vgg11's predicted logit" in PROSE
