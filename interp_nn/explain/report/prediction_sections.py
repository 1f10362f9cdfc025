"""The section of a report about the predictions: how good they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from interp_nn.explain.report import drawings
from interp_nn.explain.report.facts import Facts
from interp_nn.explain.report.linear_baseline import linear_predictions
from interp_nn.explain.report.page import Section, Table
from interp_nn.explain.report.wording import first_three

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BASELINE = (
    "The linear model: ridge regression with a penalty of 1 on standardized inputs, fitted to four fifths of these samples and "
    "tested on the rest, five times. The network may have had more samples, or these. A difference below two standard errors may "
    "be chance."
)
_NO_Y = "No true answers were given, so this page cannot say whether that is right."
_ERRORS = 100  # that a table has


def predictions(facts: Facts) -> Section | str:
    """Say how often the network is right, and whether that is more than always answering the most frequent class."""
    n = len(facts.x)
    counts = torch.bincount(facts.predicted)
    rows: list[list[object]] = []
    title, average = "How good it is", facts.outputs.mean(0)
    if not facts.classifies:
        if facts.y is None:
            values = facts.outputs[:, 0]
            return Section(
                title, f"The output goes from {float(values.min()):.3g} to {float(values.max()):.3g} on {n} samples. {_NO_Y}"
            )  # fmt: skip
        y = facts.y.to(facts.outputs)
        r2 = float(1 - (facts.outputs[:, 0] - y).square().sum() / (y - y.mean()).square().sum())
        linear = _linear_r2(facts, y)
        worse = " It is no better than the mean." if r2 <= 0.05 else ""
        figure = drawings.against(y, facts.outputs[:, 0], f"R² is {r2:.3f}; on the line a prediction is right")
        return Section(
            title, f"R² is {r2:.3f} on {n} samples.{worse}{linear}",
            [(figure, f"Predictions against true values: R² is {r2:.3f}.")],
            [Table("Prediction errors", ("R²", "mean y", "mean prediction"), [[r2, float(y.mean()), float(average[0])]])],
            [_BASELINE] * bool(linear),
        )  # fmt: skip
    if facts.y is None:
        top = int(counts.argmax())
        often = f"{int(counts[top])} of {n}" if int(counts[top]) < n else f"all {n}"
        return Section(title, f"{facts.class_name(top)} is the answer for {often} samples. {_NO_Y}")
    right = facts.predicted == facts.y
    accuracy, frequent = float(right.double().mean()), float(torch.bincount(facts.y).max()) / n
    spread = (frequent * (1 - frequent) / n) ** 0.5
    verdict = (
        f"This is no better than always answering the most frequent class ({frequent:.1%}): do not trust the rest of this "
        "page as an account of the classes."
        if accuracy <= frequent + 2 * spread
        else f"Always answering the most frequent class would be right for {frequent:.1%}."
    )
    for c in torch.unique(facts.y).tolist():
        own = facts.y == c
        taken = facts.predicted[own & ~right]
        confused = "-"
        if len(taken):
            times = torch.bincount(taken)
            most = int(times.max())
            ties = [facts.class_name(i) for i in (times == most).nonzero()[:, 0].tolist()]
            confused = f"{first_three(ties)} ({most}{' each' if len(ties) > 1 else ''})"
        rows.append([facts.class_name(c), int(own.sum()), float(right[own].double().mean()), confused])
    rows.sort(key=lambda row: row[2])  # type: ignore[arg-type, return-value]
    centre, half = (accuracy + 2 / n) / (1 + 4 / n), 2 * (accuracy * (1 - accuracy) / n + 1 / n**2) ** 0.5 / (1 + 4 / n)
    interval = f"{max(centre - half, 0):.1%} to {min(centre + half, 1):.1%}"
    finding = f"The network is right for {accuracy:.1%} of {n} samples (interval {interval}). {verdict}"
    said = "There is no error."
    if wrong := n - int(right.sum()):
        pairs, counted = torch.stack((facts.y[~right], facts.predicted[~right])).unique(dim=1, return_counts=True)
        most = int(counted.max())
        ties = [" for ".join(map(facts.class_name, pairs[:, i].tolist())) for i in (counted == most).nonzero()[:, 0]]
        pair = first_three(ties)
        said = f"The most frequent error takes {pair} ({most} of {wrong} errors)."
        if len(ties) > 1:
            said = f"The most frequent errors take {pair} ({most} each of {wrong} errors)."
            if most == 1:
                said = f"The {wrong} errors are all different: no class is taken for the same other class twice."
        elif most == wrong:
            said = (
                f"The only error takes {pair}."
                if wrong == 1
                else f"{'Both' if wrong == 2 else f'All {wrong}'} errors take {pair}."
            )
    figures: list[tuple[Figure, str]] = []
    linear = _linear_accuracy(facts, right)
    if (k := max(facts.outputs.shape[1], 2)) <= drawings.MOST:
        names = [facts.class_name(c) for c in range(k)]
        table = torch.bincount(k * facts.y + facts.predicted, minlength=k * k).view(k, k)
        figures.append(
            (
                drawings.confusion(table, names, said),
                f"True classes and answers: {wrong} of {n} samples lie off the diagonal. A darker cell has more errors; right "
                "answers are pale.",
            )
        )
    return Section(
        title, f"{finding}{linear} {said}", figures,
        [Table("By class, the worst first", ("class", "samples", "right (share)", "most often taken for"), rows),
         *[_errors(facts)] * bool(wrong)],
        ["This page does not know whether these samples were used in training. The interval is Wilson's for two standard errors.",
         *[_BASELINE] * bool(linear)],
    )  # fmt: skip


def _errors(facts: Facts) -> Table:
    """List the errors, those with the largest margins first."""
    assert facts.y is not None
    found = facts.wrong.nonzero()[:, 0]
    found = found[facts.margin[found].argsort(descending=True, stable=True)]
    rows = [
        [i, facts.class_name(int(facts.y[i])), facts.class_name(int(facts.predicted[i])), float(facts.margin[i])]
        for i in found[:_ERRORS].tolist()
    ]
    many = f", the first {_ERRORS} of {len(found)}" if len(found) > _ERRORS else ""
    return Table(f"Errors, the largest margin first{many}", ("sample", "true", "answer", "margin"), rows)


def _linear_accuracy(facts: Facts, right: Tensor) -> str:
    """Compare the network's answers with those of a linear model on the same inputs."""
    assert facts.y is not None
    found = None
    if facts.kind != "tokens":
        found = linear_predictions(facts.x, nn.functional.one_hot(facts.y.long()))
    if found is None:
        return ""
    theirs = found.argmax(1) == facts.y
    lead = int((right & ~theirs).sum()) - int((theirs & ~right).sum())
    noise = 2 * int((right ^ theirs).sum()) ** 0.5  # two standard errors of the lead
    verdict = (
        "the network is better"
        if lead > noise
        else "the network is worse"
        if -lead > noise
        else "the difference may be chance"
    )
    return f" A linear model on the same inputs is right for {float(theirs.double().mean()):.1%}: {verdict}."


def _linear_r2(facts: Facts, y: Tensor) -> str:
    found = None if facts.kind == "tokens" else linear_predictions(facts.x, y[:, None])
    if found is None:
        return ""
    r2 = 1 - float((found[:, 0] - y).square().sum() / (y - y.mean()).square().sum())
    return f" A linear model on the same inputs has an R² of {r2:.3f}."
