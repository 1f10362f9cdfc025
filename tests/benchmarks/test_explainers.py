"""The comparison with captum, shap and zennit runs without them, and its pages have the tables of its record."""

import json

import pytest
import torch
from matplotlib.figure import Figure
from support import needs_records

from benchmarks import experiments
from benchmarks.experiments import explainers
from benchmarks.records.environment import ROOT

RECORD = ROOT / "benchmarks/results/cpu/experiments/explainers.json"


def test_explainers(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.touch())
    monkeypatch.setattr(explainers, "NOISES", 1)
    absent = explainers.METHODS["shap KernelExplainer"]._replace(make=lambda case: __import__("no_such_package"))
    used = ("linearize", "captum InputXGradient", "captum DeepLift", "captum LRP", "shap DeepExplainer")
    methods = {name: explainers.METHODS[name] for name in used}
    monkeypatch.setattr(explainers, "METHODS", methods | {"shap KernelExplainer": absent})
    page = tmp_path / "page.md"
    page.write_text("<!-- begin: python -m benchmarks experiments explainers -->\n<!-- end -->\n")
    arguments = ["--quick", "--output", str(tmp_path), "--page", str(page)]
    assert experiments.find("explainers")(arguments) == 0
    results = json.loads((tmp_path / "explainers.json").read_text(), parse_constant=pytest.fail)["results"]
    assert explainers.markdown(results) in page.read_text()
    assert "skipped" in results["cases"]["table row"]["methods"]["shap KernelExplainer"]
    for case in results["cases"].values():
        found = case["methods"]
        assert found["linearize"]["claim_error"] < 1e-12 > case["error_of_the_constants_sum"]
        constants = sum(case["constants_by_layer"].values()) / case["logit"]
        assert found["linearize"]["outside"] == pytest.approx(constants)
        if "captum" in results["packages"]:
            assert found["captum InputXGradient"]["difference_to_linearize"] < 1e-12
            assert found["captum DeepLift"]["claim_error"] < 1e-12 < found["captum DeepLift"]["difference_to_linearize"]
    if "captum" in results["packages"]:
        spelled = results["functions"]
        assert spelled["linearize"]["change"] < 1e-12 and spelled["captum InputXGradient"]["change"] < 1e-12
        assert spelled["captum DeepLift"]["claim_error"] > 1e-3 and spelled["captum LRP"]["change"] > 1


def test_a_method_that_raises_is_named():
    case = explainers.Case(torch.nn.Linear(2, 2), torch.ones(1, 2), 0, torch.ones(3, 2), torch.ones(1, 2), 1.0, "")

    def refuses(case):
        raise TypeError("no rule\nmore")

    made = {"one": explainers.Method("x", "", refuses)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explainers, "METHODS", made)
        _, notes, _ = explainers._ready(case)
    assert notes == {"one": {"raised": "TypeError: no rule"}}


@needs_records
def test_the_pages_have_the_tables():
    record = json.loads(RECORD.read_text())
    assert not record["dirty"] and not record["quick"] and all(record["results"]["packages"].values())
    pages = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("comparison.md", "explaining.md")}
    assert explainers.markdown(record["results"]) in pages["comparison.md"]
    assert explainers.short(record["results"]) in pages["explaining.md"]
    assert len(pages["comparison.md"].splitlines()) <= 150
    for case in record["results"]["cases"].values():
        equal = [
            row["difference_to_linearize"]
            for name, row in case["methods"].items()
            if "radient x" in name or "InputX" in name
        ]
        assert len(equal) == 2 and max(equal) < 1e-12


@needs_records
def test_the_sentences_of_the_page_are_of_the_record():
    page = " ".join((ROOT / "docs" / "comparison.md").read_text(encoding="utf-8").split())
    cases = json.loads(RECORD.read_text())["results"]["cases"]
    image = cases["image"]["methods"]
    noise = {name: 100 * row["change_by_noise"] for name, row in image.items()}
    shap = sorted(noise[f"shap {kind}Explainer"] for kind in ("Deep", "Gradient"))
    assert f"On the image they are {100 * image['linearize']['outside']:.0f} % of it" in page
    assert image["linearize"]["sum"] < 0
    listing = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    shares = [f"{100 * case['methods']['linearize']['outside']:.0f}" for case in cases.values()]
    assert "Its constants are {}, {} and {} % of the logit".format(*shares) in listing
    assert (
        f"changes them by {noise['linearize']:.0f} %, integrated gradients by {noise['captum IntegratedGradients']:.0f} %, "
        f"shap's means by {shap[0]:.0f} to {shap[1]:.0f} %, EpsilonPlus by {noise['zennit EpsilonPlus']:.0f} %" in page
    )
    gradient, ours = ([c["methods"][name] for c in cases.values()] for name in ("captum InputXGradient", "linearize"))
    for key, text in (
        ("ms", "takes {:.1f} to {:.1f} times"),
        ("ms_without_constants", "{:.1f} to {:.1f} times without"),
    ):
        ratios = [one[key] / other["ms"] for one, other in zip(ours, gradient, strict=True)]
        assert text.format(min(ratios), max(ratios)) in page
        assert key != "ms" or text.format(min(ratios), max(ratios)).removeprefix("takes ") in listing
