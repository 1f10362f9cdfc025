"""A report: valid HTML that loads nothing, numbers that are those of the calls it names, and findings that follow them."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from torch import Tensor, nn

from interp_nn.explain import (
    ActivationClusters,
    Report,
    Section,
    kernel_alignment,
    linearize,
    npk,
    plots,
    read_head,
    record,
    region,
    report,
    report_sections,
)
from interp_nn.explain.report import report_command
from interp_nn.explain.report.contribution_sections import _maps
from interp_nn.explain.report.facts import Facts
from interp_nn.explain.report.linear_baseline import linear_predictions
from interp_nn.explain.report.page import Table
from interp_nn.explain.report.report_command import load_model, load_table, main
from interp_nn.nn import SummaryHead

VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """Checks that elements nest, and collects anchors, links, sources and tables."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._summary = self._text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), "an attribute twice"
        assert tag != "script"
        if tag not in VOID:
            self.open.append(tag)
        if "id" in given:
            self.ids.append(str(given["id"]))
        for name in ("src", "href"):
            if name in given:
                (self.links if str(given[name]).startswith("#") else self.sources).append(str(given[name]))
        if tag == "img":
            self.images.append(given)
        self._text = ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "summary":
            self._summary = self._text.removesuffix(", as CSV")
        if tag == "textarea":
            self.tables[self._summary] = list(csv.reader(io.StringIO(self._text)))
        self._text = ""

    def handle_data(self, data: str) -> None:
        self._text += data


def checked(html: str) -> Page:
    page = Page(html)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"url\(|@import|https?://", html)
    assert all(image["alt"] for image in page.images)
    assert len(html) < 1_000_000
    return page


@pytest.fixture(scope="module")
def table() -> tuple[nn.Sequential, Tensor, Tensor, list[str]]:
    """A trained network of three features, of which the last does not count."""
    torch.manual_seed(0)
    x = torch.randn(120, 3, dtype=torch.float64)
    y = (x[:, 0] - x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.Linear(4, 2)).double()
    adam = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(60):
        adam.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
    return model.eval(), x, y, ["<age>", "fare & fee", "luck"]


def test_numbers_are_those_of_the_calls(table: tuple[nn.Sequential, Tensor, Tensor, list[str]]) -> None:
    model, x, y, names = table
    made = report(model, x, y, feature_names=names, class_names=["no", "yes"])
    page = checked(made.html)
    predicted = model(x).argmax(1)
    by_class = {row[0]: row for row in page.tables["By class, the worst first"][1:]}
    for c, name in enumerate(("no", "yes")):
        assert int(by_class[name][1]) == int((y == c).sum())
        assert float(by_class[name][2]) == pytest.approx(float((predicted == y)[y == c].double().mean()))
    assert f"right for {float((predicted == y).double().mean()):.1%} of 120" in made.findings["How good it is"]

    rows = torch.arange(len(x))
    affine = linearize(model, x, lambda output: output[rows, predicted] - output[rows, 1 - predicted])
    contributions = affine.contributions(x)
    means = {row[0]: float(row[1]) for row in page.tables["Mean contributions to yes over no"][1:]}
    assert means == pytest.approx(dict(zip(names, contributions.abs().mean(0).tolist(), strict=True)))
    assert list(means)[-1] == "luck"
    for _, index, first, second, _, value, constant, largest, error in page.tables["Samples"][1:]:
        outputs = model(x)[int(index)].detach()
        assert (first, second) == (("yes", "no") if outputs[1] > outputs[0] else ("no", "yes"))
        assert float(value) == pytest.approx(float(outputs.max() - outputs.min()))
        assert float(constant) == pytest.approx(float(affine.bias[int(index)]))
        assert largest == names[int(contributions[int(index)].abs().argmax())]
        assert float(error) < 1e-12
    assert "error| of the sum" in made.html and "Errors are in the outputs" in made.html
    decided = contributions.sum(1) <= 0  # the margin is positive
    assert f"in {int(decided.sum())} of 120 samples" in made.findings["What counts"] or not decided.any()
    parts = {row[0]: float(row[1]) for row in page.tables["Constants"][1:]}
    assert parts == pytest.approx({name: float(part.abs().mean()) for name, part in affine.bias_by_layer().items()})
    units = page.tables["Units"][1:]
    on = record(model, x).gates(0).double().mean(0)
    assert (int(units[0][2]), int(units[0][3])) == (int((on == 0).sum()), int((on == 1).sum()))
    assert f"with the classes is {kernel_alignment(npk(model, x), y):.2f}" in made.findings["Gates"]
    for index, radius, nearest, _ in page.tables["Distance to the nearest gate"][1:]:
        i = int(index)
        assert float(radius) == pytest.approx(float(region(model, x[i : i + 1]).radius(x[i])))
        assert float(nearest) == pytest.approx(float((x - x[i]).norm(dim=1).sort().values[1]))
    merged = ActivationClusters(model, progress=False).fit(x).merge()
    output = int(predicted.bincount().argmax())
    coefficients = merged.table(output, feature_names=names).coefficients
    exact = linearize(model, x, lambda out: out[:, output] - out.mean(1)).weight
    *shown, (last, *constant, at, _) = page.tables[f"Coefficients for {['no', 'yes'][output]}"][1:]
    for name, *row, mean, spread in shown:
        assert [float(value) for value in row] == pytest.approx(coefficients[:, names.index(name)].tolist())
        assert float(mean) == pytest.approx(float(exact[:, names.index(name)].mean()))
        assert float(spread) == pytest.approx(float(exact[:, names.index(name)].std(correction=0)))
    bias = linearize(model, x, lambda out: out[:, output] - out.mean(1)).bias
    assert last == "(constant)" and float(at) == pytest.approx(float(bias.mean()))
    assert [float(value) for value in constant] == pytest.approx(
        (merged.affine_.bias[:, output] - merged.affine_.bias.mean(1)).tolist()
    )
    weight = merged.affine_.weight
    torch.testing.assert_close(coefficients, weight[:, output] - weight.mean(1))
    signed = contributions * (2 * predicted - 1).unsqueeze(1)
    directions = {row[0]: float(row[3]) for row in page.tables["Mean contributions to yes over no"][1:]}
    assert directions == pytest.approx(dict(zip(names, signed.mean(0).tolist(), strict=True)))
    assert (
        merged.held_out_ is not None
        and f"is {merged.held_out_.r2:.3f}, and" in made.findings["A few maps for all samples"]
    )
    head = read_head(model, "2", x, y, output="3").rotate("varimax").summary()
    latents = page.tables["Latents, in varimax coordinates"][1:]
    assert [float(row[2]) for row in latents] == pytest.approx(head.importance.tolist())
    assert "importance (share)" in page.tables["Latents, in varimax coordinates"][0]
    enough = next(i for i, value in enumerate(head.agreement.tolist(), 1) if value >= 0.99)
    answers = f"give the network's answer for {float(head.agreement[enough - 1]):.1%} of 120 samples"
    assert made.findings["The head"].startswith(f"The {enough} most important of 4 latents {answers}")
    assert "must be so: 2 outputs depend on at most 2 directions" in made.findings["The head"]
    assert "Every operation is affine or a gate" in made.findings["What is exact"]
    assert len(page.images) <= 12
    assert "&lt;age&gt;" in made.html


def test_wrong_labels_are_called_out(table: tuple[nn.Sequential, Tensor, Tensor, list[str]]) -> None:
    model, x, y, _ = table
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    found = report(model, x, shuffled, sections=["predictions"]).findings["How good it is"]
    assert "no better than always answering the most frequent class" in found
    assert "no better" not in report(model, x, y, sections=["predictions"]).findings["How good it is"]


def test_findings_follow_the_numbers() -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 4.0]])
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    model = nn.Linear(2, 2).eval()
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
        model.bias.zero_()
    said = {}
    for wrong in range(4):
        given = y.clone()
        given[:wrong] = 1
        said[wrong] = report(model, x, given, sections=["predictions", *["samples"] * (wrong == 2)]).findings
    assert "There is no error." in said[0]["How good it is"]
    assert "The only error takes 1 for 0." in said[1]["How good it is"]
    assert "Both errors take 1 for 0." in said[2]["How good it is"]
    assert "All 3 errors take 1 for 0." in said[3]["How good it is"]
    # The wrong sample has a margin of 2, and the right ones have 3, 1, 2 and 4.
    assert "25% of the right answers have a smaller margin" in said[2]["Single samples"]


def test_errors_are_explained_over_the_true_class() -> None:
    model = nn.Linear(3, 3).eval()
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
        model.bias.copy_(torch.tensor([0.0, 0.0, 0.5]))
    x = torch.tensor([[3.0, 1, 0], [1, 3, 0], [3, 2, -1], [0, 3, 2], [1.1, 0, 1], [4, 0, 0]])
    chosen = ["predictions", "importance", "samples"]
    made = report(model, x, torch.tensor([0, 1, 2, 0, 0, 1]), sections=chosen)
    rows = {row[1]: row for row in checked(made.html).tables["Samples"][1:]}
    assert rows["5"][2:5] == ["0", "1", "1"]  # wrong with the largest margin; class 2 has the second largest output
    assert float(rows["5"][5]) == pytest.approx(4)
    assert rows["4"][2:5] == ["2", "0", "0"] and float(rows["4"][6]) == pytest.approx(0.5)
    said = made.findings["Single samples"]
    assert "Sample 4 is the nearest to another answer: 2 is ahead of 0 by 0.4." in said
    assert "The answer is wrong: the true class is 0. The constant, 0.5, decides it." in said
    assert (
        "Without the constant, the predicted class would lose to the one that it is explained over in 1 of 6 samples, "
        "among them 4, shown below." in made.findings["What counts"]
    )
    # 2 for 0, 0 for 2, 1 for 0 and 0 for 1: once each.
    assert "The 4 errors are all different" in made.findings["How good it is"]
    by_class = {row[0]: row for row in checked(made.html).tables["By class, the worst first"][1:]}
    assert by_class["0"][3] == "1 and 2 (1 each)" and by_class["2"][3] == "0 (1)"
    assert "Without true" not in made.html and "With one output" not in made.html


def test_a_linear_model_is_compared() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 2, generator=generator)
    exclusive = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        exclusive[0].weight.copy_(torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]]))
        exclusive[0].bias.zero_()
        exclusive[2].weight.copy_(torch.tensor([[0.0, 0, 1, 1], [1, 1, 0, 0]]))
        exclusive[2].bias.zero_()
    y = (x[:, 0] * x[:, 1] > 0).long()
    found = report(exclusive, x, y, sections=["predictions"]).findings["How good it is"]
    assert "right for 100.0%" in found and found.count("the network is better") == 1
    linear = report(exclusive, x, (x[:, 0] > 0).long(), sections=["predictions"]).findings["How good it is"]
    assert "the network is worse" in linear
    assert "linear model" not in report(exclusive, x[:20], y[:20], sections=["predictions"]).html
    wide = torch.randn(60, 200, generator=generator).double()
    wide[:, 1] = 0.1  # constant
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for inputs in (wide, wide[:, :5]):
        target = inputs[:, :1] + 1
        got = linear_predictions(inputs, target)
        assert got is not None
        fold = torch.randperm(60, generator=torch.Generator().manual_seed(0)) % 5
        for k in range(5):
            kept, out = inputs[fold != k].numpy(), inputs[fold == k].numpy()
            scale = (47 / 48) ** 0.5  # of the standard deviations
            theirs = make_pipeline(StandardScaler(), Ridge(1 / scale**2)).fit(kept, target[fold != k].numpy())
            torch.testing.assert_close(got[fold == k][:, 0], torch.from_numpy(theirs.predict(out)).reshape(-1))


def test_samples_that_are_equal_or_on_a_boundary() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
    x = torch.tensor([[1.0, 3.0], [1.0, 3.0], [0.0, 3.0], [1.0, 5.0]])
    made = report(model, x, sections=["reach"])
    rows = [[float(value) for value in row] for row in checked(made.html).tables["Distance to the nearest gate"][1:]]
    assert [row[1] for row in rows] == pytest.approx([1, 1, 0, 1], abs=1e-6)
    assert [row[2] for row in rows] == pytest.approx([1, 1, 1, 2])
    assert float(rows[2][1]) == 0
    assert made.findings["How far around a sample"].startswith("1 of 4 samples lies on a boundary")
    assert "within the rounding of float32" in made.findings["How far around a sample"]
    assert re.search(r"nearer than that sample for [123] of 3", made.findings["How far around a sample"])
    assert "of the other 3 samples, the map holds up to a distance of 1. " in made.findings["How far around a sample"]
    assert "all samples are equal" in report(model, x[:2], sections=["reach"]).sections[-1].notes[-1]
    x[0, 0], x[2, 1] = 5e-6, 6.0  # near a boundary, and more than rounding away from it; far from the sample on one
    near = report(model, x, sections=["reach"]).findings["How far around a sample"]
    assert near.startswith("1 of 4 samples lies on a boundary")
    x[2, 0] = 1e-8  # on no boundary, and nearer to one than rounding: the table has the distance
    made = report(model, x, sections=["reach"])
    assert made.findings["How far around a sample"].startswith("1 of 4 samples lies on a boundary, within the rounding")
    assert float(checked(made.html).tables["Distance to the nearest gate"][3][1]) == pytest.approx(1e-8)


def test_a_head_that_needs_all_its_latents() -> None:
    torch.manual_seed(0)
    for latents, said in (
        (2, r"All 2 latents are needed for .*: 1 of them give it for \d+\.\d% of 60 samples"),
        (1, "There is one latent"),
    ):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, latents), nn.Linear(latents, 3)).eval()
        with torch.no_grad():
            model[-1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])[:, :latents])
            model[-1].bias.zero_()
            model[-2].bias.sub_(model[:3](torch.randn(200, 4)).mean(0))
        made = report(model, torch.randn(60, 4), sections=["head"])
        assert re.match(said, made.findings["The head"])


def test_the_map_beyond_its_gates(table: tuple[nn.Sequential, Tensor, Tensor, list[str]]) -> None:
    model, x, y, _ = table
    made = report(model, x, y, sections=["reach"])
    rows = [
        list(map(float, row)) for row in checked(made.html).tables["The map beyond its gates, in random directions"][1:]
    ]
    assert [row[1] for row in rows] == [0.125, 0.25, 0.5, 1]
    nearest = [float(row[2]) for row in checked(made.html).tables["Distance to the nearest gate"][1:]]
    assert rows[-1][0] == pytest.approx(float(torch.tensor(nearest).double().quantile(0.5)))
    assert all(a[2] <= b[2] and a[3] <= b[3] for a, b in pairwise(rows)) and rows[-1][3] > 0
    said = made.findings["How far around a sample"]
    assert (
        f"the network's answer for {rows[0][4]:.1%}, {rows[1][4]:.1%}, {rows[2][4]:.1%} and {rows[3][4]:.1%} of" in said
    )
    assert said.endswith(f"There the network itself keeps the sample's answer for {rows[3][5]:.1%}.")

    class Kink(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    x = torch.tensor([[1.0], [1.5], [2.5]], dtype=torch.float64)
    made = report(Kink().eval(), x - 1.25, sections=["reach"])  # nearest samples at 0.5, 0.5 and 1; steps to 0.5
    rows = [
        list(map(float, row)) for row in checked(made.html).tables["The map beyond its gates, in random directions"][1:]
    ]
    assert [row[0] for row in rows] == pytest.approx([0.0625, 0.125, 0.25, 0.5])
    # From -0.25 to 0.25, the map says 0 and the network 0.25; from 0.25 to -0.25, -0.25 and 0.
    assert [row[3] for row in rows] == pytest.approx([0, 0, 0, 0.25])
    assert "its median error is 0, 0, 0 and " in made.findings["How far around a sample"]


def test_a_layer_and_its_batch_norm_are_one_constant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(2)),
        *(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)),
    ).eval()  # fmt: skip
    x = torch.randn(12, 1, 6, 6)
    with torch.no_grad():
        for norm in (model[1], model[5], model[6]):
            norm.running_mean.normal_()

    def constants() -> tuple[dict[str, float], str]:
        made = report(model, x, sections=["constants"])
        table = checked(made.html).tables["Constants"][1:]
        return {row[0]: float(row[1]) for row in table}, " ".join(made.sections[0].notes)

    before, said = constants()
    assert list(before) == ["0 and 1", "3", "5", "6", "8"]  # the ReLU before layer 5 works in place
    assert "A layer and the batch norm right after it are one part" in said and "any other batch norm" in said
    with torch.no_grad():
        model[0].bias.add_(3)
        model[1].running_mean.add_(3)
    assert constants()[0] == pytest.approx(before, rel=1e-3)

    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x + 1, x.new_zeros(2), x.new_ones(2)).sum(1)

    said = " ".join(report(Functional().eval(), torch.randn(9, 2), sections=["constants"]).sections[0].notes)
    assert "any other batch norm" in said


def test_units_of_the_report_and_of_a_region() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)).eval()
    x = torch.randn(12, 1, 6, 6)
    made = report(model, x, sections=["gates", "few_maps"])
    assert made.findings["Gates"].startswith("Of 32 units, ")
    assert "The 32 candidates of maxima are not among them" in made.findings["Gates"]
    assert len(region(model, x[:1]).on) == 32 + 32
    assert "for images, print ActivationClusters(model).fit(x).merge()" in made.findings["What was not done"]


def test_images_with_a_summary_head() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8), nn.ReLU(), SummaryHead(8, 4, 3)
    ).eval()
    x = torch.randn(12, 1, 6, 6)
    top = model(x).topk(2, 1).indices
    rows = torch.arange(12)

    y = torch.randint(0, 3, (12,))
    over = torch.where(y == top[:, 0], top[:, 1], y)

    def margin(output: Tensor) -> Tensor:
        return output[rows, top[:, 0]] - output[rows, over]

    made = report(model, x, y)
    page = checked(made.html)
    assert {"The head", "Summary layers", "Single samples"} <= set(made.findings)
    assert "within" in made.findings["Summary layers"]
    assert float(page.tables["Singular values of b"][1][4]) < 1e-5
    assert "equal to 3 digits" in made.findings["Summary layers"]
    size = linearize(model, x, margin).contributions(x).abs().sum(1).mean(0)
    each = [[float(value) for value in row[1:]] for row in page.tables["Mean |contribution| of each pixel"][1:]]
    torch.testing.assert_close(torch.tensor(each), size, check_dtype=False)
    row, column = divmod(int(size.argmax()), 6)
    assert f'alt="The pixel at row {row}, column {column} has the largest' in made.html
    ends = f"from {float(x.min()):.3g} to {float(x.max()):.3g}"
    assert f"The network gets inputs {ends}." in made.html and "a dark pixel can contribute" in made.html
    never = {row[0]: (int(row[2]), int(row[1])) for row in page.tables["Units"][1:]}
    worst = max(never, key=lambda name: never[name][0] / never[name][1])
    share = f"Layer {worst} has the largest share that is never on: {never[worst][0]} of {never[worst][1]}."
    assert share in made.findings["Gates"] or not never[worst][0]
    assert "not measured: robustness" in made.html.lower()
    with torch.no_grad():
        model[5].b.mul_(1.5)
    assert "scaled by 2.2 to 2.3" in report(model, x, sections=["summary_layers"]).findings["Summary layers"]


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.gate = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.unembedding = nn.Linear(6, 11)

    def forward(self, ids: Tensor) -> Tensor:
        e = self.embedding(ids)
        return self.unembedding((e + self.up(e) * nn.functional.silu(self.gate(e))).cumsum(1))


def test_tokens_and_secants() -> None:
    torch.manual_seed(0)
    made = report(LanguageModel().eval(), torch.randint(0, 11, (4, 5)), tokenizer="abcdefghijk".__getitem__)
    page = checked(made.html)
    assert "right" not in [row[0] for row in page.tables["Tokens"]]  # nobody knows
    assert "silu and mul (secants)" in made.findings["What is exact"] and "stay the same" not in made.html
    assert "places before the last one" in made.findings["What counts"]
    assert any("secants" in note for note in made.sections[-1].notes)


def test_regression_and_what_cannot_be_done() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 2)
    linear = nn.Linear(2, 1).eval()
    with torch.no_grad():
        y = linear(x)[:, 0].clone()
    made = report(linear, x, y)
    checked(made.html)
    assert made.findings["How good it is"].startswith("R² is 1.000")
    assert made.findings["What was not done"].startswith("This page has no section on: ")
    assert report(linear, x, torch.randn(40)).findings["How good it is"].count("no better than the mean.") == 1

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).abs() @ x.new_ones(2, 2)

    odd = report(Odd().eval(), x)
    checked(odd.html)
    assert "no affine map" in odd.findings["What is exact"]
    assert len(odd.sections[-1].notes) >= 5


def test_sections_of_ones_own(table: tuple[nn.Sequential, Tensor, Tensor, list[str]]) -> None:
    model, x, _, _ = table
    own = report_sections() | {
        "mine": lambda facts: Section("Mine", f"{len(facts.x)} samples.", tables=[Table("T", "ab", [[1, 2]])])
    }
    chosen = {name: own[name] for name in ("mine", "exactness")}
    made = report(model, x, sections=chosen)
    assert list(made.findings) == ["Mine", "What is exact", "What was not done"]
    assert checked(made.html).tables["T"] == [["a", "b"], ["1", "2"]]
    axes = plots.bias_bars({"0": torch.ones(1, 1)})
    many = Report("Many", "", [Section("Figures", "", [(axes.figure, f"Figure {i}.") for i in range(14)])])  # type: ignore[misc]
    assert len(checked(many.html).images) == 12 and "2 more figures are left out" in many.html
    with pytest.raises(ValueError, match=r"sections: got \['reaches'\]"):
        report(model, x, sections=["reaches"])


def test_a_section_that_was_asked_for_and_does_not_apply_says_why() -> None:
    made = report(nn.Linear(2, 1).eval(), torch.randn(5, 2), sections=["few_maps", "gates"])
    assert list(made.findings) == ["What was not done"]
    said = made.findings["What was not done"]
    assert said.startswith(
        "Asked for, and not made: a few maps for all samples: 5 samples of 2 features are too few or too wide; gates"
    )
    assert "not made: a few maps for all samples: 5 samples" in made.html and "5 samples" in repr(made)


def test_figures_are_closed_and_not_warned_of() -> None:
    from matplotlib import pyplot

    mine = pyplot.figure()

    def figures(facts: Facts) -> Section:
        return Section("F", "", [(pyplot.figure(figsize=(1, 1)), "A figure.") for _ in range(21)])

    def fails(facts: Facts) -> Section:
        pyplot.figure()
        raise RuntimeError("mine")

    x = torch.randn(5, 2)
    assert "9 more figures are left out" in report(nn.Linear(2, 1).eval(), x, sections={"f": figures}).html
    with pytest.raises(RuntimeError, match="mine"):
        report(nn.Linear(2, 1).eval(), x, sections={"f": fails})
    assert pyplot.get_fignums() == [mine.number]


def test_labels_of_samples_are_within_the_figure() -> None:
    """Rows of long class names, whose labels are longer than a row is high."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval()
    x, names = torch.randn(12, 1, 6, 6), ["Ankle boot of leather", "T-shirt, top or pullover", "Trouser"]
    figure = _maps(Facts(model, x, torch.randint(0, 3, (12,)), classes=names))
    figure.draw_without_rendering()
    rows = [axes.yaxis.label for axes in figure.axes if axes.images and axes.get_ylabel()]
    boxes = [label.get_window_extent() for label in rows]
    assert len(rows) == 4 and any(names[0] in label.get_text().replace("\n", " ") for label in rows)
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert all(below.y1 <= above.y0 for above, below in pairwise(boxes))


def test_bad_arguments(table: tuple[nn.Sequential, Tensor, Tensor, list[str]]) -> None:
    model, x, y, _ = table
    with pytest.raises(TypeError, match="model: got int"):
        report(3, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"y: got shape \(5,\)"):
        report(model, x, y[:5])
    with pytest.raises(ValueError, match="feature_names: got 2"):
        report(model, x, feature_names=["a", "b"])
    with pytest.raises(ValueError, match="class_names: got 3, want 2"):
        report(model, x, class_names="abc")
    with pytest.raises(ValueError, match="y: got classes 0 to 2, want 0 to 1"):
        report(model, x, y + (y == y.max()) * (torch.arange(len(y)) == int(y.argmax())))


def test_save_is_whole_or_nothing(table: tuple[nn.Sequential, Tensor, Tensor, list[str]], tmp_path: Path) -> None:
    model, x, _, _ = table
    made = report(model, x, sections=["exactness"])
    assert made.save(tmp_path / "page.html").read_text(encoding="utf-8") == made.html
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(OSError, match="no_folder"):
        made.save(tmp_path / "no_folder" / "page.html")


def test_a_users_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--data", str(tmp_path / "nothing.csv"), "--output", str(tmp_path / "page.html")]
    assert main(["torch.nn:Identity", *data]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    (tmp_path / "nothing.csv").write_text("a,b\n1,2\n")
    monkeypatch.setattr(report_command, "report", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):  # any other error
        main(["torch.nn:Identity", *data])
    assert [file.name for file in tmp_path.iterdir()] == ["nothing.csv"]
    (tmp_path / "page.html").write_text("")  # of the user
    with pytest.raises(RuntimeError):
        main(["torch.nn:Identity", *data])
    assert (tmp_path / "page.html").exists()


def test_labels_of_the_commands_target(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("a,level\n1,low\n3,high\n5,low\n")
    with pytest.raises(
        ValueError, match=r"line 2, level: got 'low', want a finite number, or --classes with all labels in order"
    ):
        load_table(file, "level")
    names, x, y = load_table(file, "level", ["high", "low"])
    assert (names, x.tolist()) == (["a"], [[1.0], [3.0], [5.0]])
    assert y is not None
    assert y.dtype == torch.int64 and y.tolist() == [1, 0, 1]
    with pytest.raises(
        ValueError, match=r"line 3, level: got 'high', want a finite number, or one of --classes low mid"
    ):
        load_table(file, "level", ["low", "mid"])
    with pytest.raises(ValueError, match=r"line 2, level: got 'low', want a finite number$"):
        load_table(file, None, ["low", "high"])
    file.write_text("a,level\n1,1\n3,0\n")
    y = load_table(file, "level", ["1", "0"])[2]
    assert y is not None
    assert y.tolist() == [1, 0]  # numbers are the classes themselves


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    (tmp_path / "networks.py").write_text(
        "import torch\n\ndef make():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Linear(2, 4), "
        "torch.nn.ReLU(), "
        "torch.nn.Linear(4, 2))\n"
    )
    (tmp_path / "data.csv").write_text("age,fare,survived\n" + "".join(f"{i},{i % 7},{i % 2}\n" for i in range(40)))

    def run(model: str, *more: str) -> Any:
        data = ("--data", str(tmp_path / "data.csv"), "--output", str(tmp_path / "page.html"))
        return python("-m", "interp_nn", "report", model, *data, *more, PYTHONPATH=str(tmp_path))

    done = run("networks:make", "--target", "survived")
    assert done.returncode == 0, done.stderr
    assert "How good it is" in done.stdout
    checked((tmp_path / "page.html").read_text(encoding="utf-8"))
    wrong = run("networks:nothing")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "networks:nothing is NoneType" in wrong.stderr


def test_tables_of_the_command(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("a,b\n1,2\n3,x\n")
    with pytest.raises(ValueError, match=r"data.csv, line 3, b: got 'x'"):
        load_table(file, None)
    file.write_text("a,b\n1,2.5\n3,4\n")
    names, x, y = load_table(file, "b")
    assert (names, x.tolist()) == (["a"], [[1.0], [3.0]])
    assert y is not None
    assert y.tolist() == [2.5, 4.0]
    with pytest.raises(ValueError, match="--target: got 'c', want one of a, b"):
        load_table(file, "c")
    with pytest.raises(ValueError, match="want MODULE:NAME"):
        load_model("nothing")
    program = torch.export.export(
        nn.Linear(1, 2).eval(), (torch.ones(3, 1),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = load_model(str(tmp_path / "model.pt2"))
    assert report(loaded, x.float(), sections=["exactness"]).findings["What is exact"].startswith("Every operation")


def test_as_many_maps_as_a_merge_may_have() -> None:
    """More than the rows that a table of clusters shows by itself."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    page = report(model, torch.randn(300, 6).double(), sections=["few_maps"])
    rows = next(rows for title, rows in checked(page.html).tables.items() if title.startswith("Coefficients"))
    assert len(rows[0]) == len(rows[1]) == 1 + 12 + 2
