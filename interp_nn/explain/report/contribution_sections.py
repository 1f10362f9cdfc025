"""The sections of a report about contributions: what counts, single samples, the constant by layer."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp_nn.explain import plots
from interp_nn.explain.linear.language_models import token_contributions
from interp_nn.explain.plots.canvas import array, scale
from interp_nn.explain.report import drawings
from interp_nn.explain.report.drawings import narrow
from interp_nn.explain.report.facts import Facts
from interp_nn.explain.report.page import Section, Table
from interp_nn.explain.report.wording import listed, which_samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LETTERS = 16  # of a line beside a row of images


def importance(facts: Facts) -> Section | str:
    """Say which inputs count, over the samples."""
    if facts.kind == "tokens":
        return _tokens(facts)
    size = facts.contributions.abs()
    constant, total = facts.maps.bias.abs(), size.flatten(1).sum(1)
    share = float((constant / (constant + total)).median())
    name = "predicted over next class" if facts.outputs.shape[1] > 1 else "the output"
    part = "less than 1%" if share < 0.005 else f"{share:.0%}"
    sum_of = (
        f"In the median sample, the constant is {part} of the sum of the sizes of the contributions and the constant."
        f"{_decided(facts)}"
    )
    title = "What counts"
    if facts.kind == "table":
        names, means, parts_of, mixed = facts.feature_list(), size.mean(0), facts.contributions, ""
        if facts.outputs.shape[1] == 2:  # one direction for all samples, so that a feature's direction can be read
            name = f"{facts.class_name(1)} over {facts.class_name(0)}"
            parts_of = parts_of * (2 * facts.predicted[facts.some] - 1).unsqueeze(1)
        elif facts.outputs.shape[1] > 2:
            mixed = " The classes differ between samples, so that the figure does not show for which class a feature speaks."
        order = means.argsort(descending=True).tolist()
        parts = means / means.sum()
        few = next(i for i in range(1, len(order) + 1) if float(parts[order[:i]].sum()) >= 0.5 - 1e-9)
        axes = plots.contribution_beeswarm(parts_of, facts.x[facts.some], features=names, output=name)
        rows = [[names[j], float(means[j]), float(parts[j]), float(parts_of[:, j].mean())] for j in order]
        first = listed(names[j] for j in order[: min(few, 5)])
        which = f"; the largest are those of {first}" if few > 5 else f": {first}"
        finding = (
            f"{few} of {len(order)} feature{'s' * (len(order) > 1)} make{'s' * (few == 1)} half of all contributions{which}. "
            f"{sum_of}"
        )
        return Section(
            title, finding,
            [(narrow(axes), f"Contributions to {name}: {names[order[0]]} makes {float(parts[order[0]]):.0%} of them, the most.")],
            [Table(f"Mean contributions to {name}", ("feature", "mean |contribution|", "share", "mean"), rows)],
            [_what_is_explained(facts) + mixed, _zero(facts)],
        )  # fmt: skip
    if facts.kind == "image":
        each = size.sum(1).mean(0)
        half = f"Half of all contributions come from {_half(each.flatten()):.0%} of the pixels"
        figure = drawings.pixels(each, half)
        rows = [[i, *row] for i, row in enumerate(each.tolist())] if each.shape[1] <= drawings.MOST else []
        tables = (
            [Table("Mean |contribution| of each pixel", ["row", *map(str, range(each.shape[1]))], rows)] if rows else []
        )
        return Section(
            title, f"{half}. {sum_of}", [(figure, f"The pixel at {_pixel(each)} has the largest mean |contribution|.")], tables,
            [_what_is_explained(facts)],
        )  # fmt: skip
    return "what counts: inputs of this shape have no figure"


def _what_is_explained(facts: Facts) -> str:
    several = "the predicted class's output less the next one's, which is the margin"
    if bool(facts.wrong.any()):
        several += "; for a wrong sample, less the true class's"
    what = several if facts.outputs.shape[1] > 1 else "the output"
    return f"Contributions W x, inputs times coefficients, to {what}. They are those of {which_samples(facts)}."


def _decided(facts: Facts) -> str:
    """Say for how many answers the constant is needed, and for which of the samples that are shown."""
    if not facts.classifies:
        return ""
    count, n = int(facts.decided.sum()), len(facts.some)
    does, none, outputs = "the answer would change", f"It decides none of {n} answers", facts.outputs.shape[1]
    if outputs > 1:
        does = "the other class would win"
    if outputs > 2:  # of which only the two that are explained are compared
        does = "the predicted class would lose to the one that it is explained over"
        none = f"{none} against the class that they are explained over"
    shown = [str(i) for i in facts.shown.values() if facts.decided[facts.place(i)]]
    among = f", among them {listed(shown)}, shown below" if shown else ""
    return f" Without the constant, {does} in {count} of {n} samples{among}." if count else f" {none}."


def _zero(facts: Facts) -> str:
    """Say what an input of 0 is, which contributes nothing."""
    x = facts.x.double()
    if facts.kind == "image":
        low, high = float(x.min()), float(x.max())
        black = " So a dark pixel can contribute, since it is not 0." if low < 0 else ""
        return f"The network gets pixels from {low:.3g} to {high:.3g}. A pixel of 0 contributes nothing.{black}"
    means, sizes = x.mean(0), x.std(0, correction=0)
    return (
        f"A feature of 0 contributes nothing. As the network gets them, the features' means are {float(means.min()):.2g} to "
        f"{float(means.max()):.2g} and their standard deviations {float(sizes.min()):.2g} to {float(sizes.max()):.2g}."
    )


def _tokens(facts: Facts) -> Section:
    rows, largest, parts_of = [], [], []
    figures: list[tuple[Figure, str]] = []
    for why, i in facts.shown.items():
        found = token_contributions(facts.model, facts.x[i : i + 1], tokenizer=facts.tokenizer)
        parts = found.contributions[0]
        constant = torch.stack(list(found.constants.values())).sum() if found.constants else parts.new_zeros(())
        place = int(parts.abs().argmax())
        largest.append(len(parts) - 1 - place)
        parts_of.append(float(parts[place].abs() / (parts.abs().sum() + constant.abs())))
        names = [f"{token} (place {t})" for t, token in enumerate(found.tokens[0])]
        if len(figures) < 2:
            axes = plots.contribution_bars(parts, constant, features=names, output=f"logit {found.names[0]}")
            does = "adds most to" if float(parts[place]) > 0 else "takes most from"
            text = f"The {why} sample, {i}: token {names[place]} {does} logit {found.names[0]} ({float(parts[place]):+.2g})."
            figures.append((narrow(axes), text))
        rows.append([why, i, found.names[0], names[place], float(parts[place]), float(constant), found.check()])
    back = sorted(largest)[len(largest) // 2]
    which = (
        f"In all {len(rows)} samples, the last token adds most to the predicted logit or takes most from it"
        if not any(largest)
        else f"In the median of {len(rows)} samples, the token that adds most to the predicted logit or takes most from it is "
        f"{back} place{'s' * (back != 1)} before the last one"
    )
    share = sorted(parts_of)[len(parts_of) // 2]
    columns = ("sample", "index", "logit", "largest token", "its contribution", "constants", "error")
    return Section(
        "What counts", f"{which}. Its share of all contributions is {share:.0%} in the median.",
        figures, [Table("Tokens", columns, rows)],
        ["By token_contributions(model, ids). A contribution is the sum of W e over the entries of a token's embedding e. A "
         "place is counted from 0. Error: of the sum of all terms, relative to the largest.", _rule(facts)],
    )  # fmt: skip


def samples(facts: Facts) -> Section | str:
    """Show typical, borderline, wrong and right samples, each as an exact sum."""
    if facts.kind == "tokens":
        return "single samples: they are in the section What counts"
    rows: list[list[object]] = []
    figures: list[tuple[Figure, str]] = []
    if facts.kind == "image":
        figures.append(
            (
                _maps(facts),
                "Red pixels add to the first class over the second, blue pixels take from it. "
                + _colours(facts)
                + _concentration(facts),
            )
        )
    for why, i in facts.shown.items():
        place, value = facts.place(i), float(facts.explained[i])
        parts, constant = facts.contributions[place], float(facts.maps.bias[place])
        predicted = facts.class_name(int(facts.predicted[i])) if facts.classifies else f"{value:.3g}"
        true = "-"
        if facts.y is not None:
            true = facts.class_name(int(facts.y[i])) if facts.classifies else f"{float(facts.y[i]):.3g}"
        label, top = facts.explained_name(i), _pixel(parts.sum(0)) if facts.kind == "image" else "-"
        if facts.kind == "table":
            names = facts.feature_list()
            largest = int(parts.abs().argmax())
            top, does = names[largest], "adds most to" if float(parts[largest]) > 0 else "takes most from"
            axes = plots.contribution_waterfall(parts, constant, x=facts.x[i], features=names, output=label)
            figures.append(
                (
                    narrow(axes),
                    f"The {why} sample, {i}: {top} {does} {label} ({float(parts[largest]):+.2g}){_against(parts, names)}. "
                    "Red adds, blue takes.",
                )
            )
        error = abs(float(parts.sum()) + constant - value)
        second = facts.class_name(int(facts.other_class[i])) if facts.classifies else "-"
        rows.append([why, i, predicted, second, true, value, constant, top, error])
    columns = (
        "sample", "index", "predicted", "over", "true", "value", "constant", "largest |contribution|", "|error| of the sum",
    )  # fmt: skip
    i, several = facts.shown["borderline"], facts.outputs.shape[1] > 1
    finding = f"Sample {i} has the output nearest to 0, {float(facts.outputs[i, 0]):.2g}."
    if several:
        finding = (
            f"Sample {i} is the nearest to another answer: {facts.class_name(int(facts.predicted[i]))} is ahead of "
            f"{facts.class_name(int(facts.next_class[i]))} by {float(facts.margin[i]):.2g}."
        )
    if facts.y is not None and facts.classifies:
        true = facts.class_name(int(facts.y[i]))
        finding += f" The answer is wrong: the true class is {true}." if facts.wrong[i] else " The answer is right."
        if facts.decided[facts.place(i)]:
            finding += f" The constant, {float(facts.maps.bias[facts.place(i)]):.2g}, decides it."
    if several:
        finding += f" The median margin of all {len(facts.x)} samples is {float(facts.margin.median()):.2g}."
    if "wrong" in facts.shown:
        i, right = facts.shown["wrong"], facts.margin[~facts.wrong]
        below = float((right < facts.margin[i]).double().mean()) if len(right) else 0.0
        assert facts.y is not None
        finding += (
            f" Sample {i} is wrong with the largest margin, {float(facts.margin[i]):.2g}: "
            f"the true class is {facts.class_name(int(facts.y[i]))}, the answer {facts.class_name(int(facts.predicted[i]))}. "
            f"{below:.0%} of the right answers have a smaller margin."
        )
    what = (
        "Value: the output of the predicted class less that of the class in the column over"
        if several
        else "Value: the output"
    )
    if several and facts.y is not None:
        what += ", which is the true class of a wrong sample and else the next class"
    notes = [
        _rule(facts),
        f"{what}. It is the sum of the contributions and the constant. Errors are in the outputs' units.",
    ]
    notes += [_zero(facts)] * (facts.kind == "image")
    return Section("Single samples", finding, figures, [Table("Samples", columns, rows)], notes)


def _against(parts: Tensor, names: Sequence[str]) -> str:
    """Name the largest contribution of the other sign than the largest of all, for the end of a sentence."""
    signed = parts * -parts[parts.abs().argmax()].sign()
    j = int(signed.argmax())
    return f", and {names[j]} speaks most against that ({float(parts[j]):+.2g})" if float(signed[j]) > 0 else ""


def _rule(facts: Facts) -> str:
    """Say by which rule the shown samples were chosen."""
    judged = facts.y is not None and facts.classifies
    rules = {
        "typical": f"the median margin{' among right predictions' if judged else ''}", "borderline": "the smallest margin",
        "wrong": "the largest margin among wrong predictions", "right": "the largest margin among right predictions",
        "largest margin": "of all",
    }  # fmt: skip
    margin = "the predicted class's output less the next class's" if facts.outputs.shape[1] > 1 else "the output's size"
    shown = [f"{why[0].upper()}{why[1:]}: {rules[why]}." for why in facts.shown]
    return f"The margin is {margin}. {' '.join(shown)}"


def _colours(facts: Facts) -> str:
    """Say where the colours of the maps end, if a contribution is beyond."""
    sizes = facts.contributions[[facts.place(i) for i in facts.shown.values()]].sum(1)
    limit, beyond = scale(array(sizes))[0], float(sizes.abs().max())
    return (
        f"The colours end at ±{limit:.2g}; the largest contribution has the size {beyond:.2g}. "
        if beyond > limit
        else ""
    )


def _concentration(facts: Facts) -> str:
    """Say on how many pixels the contributions of one sample lie: of the wrong one, if there is one."""
    why = "wrong" if "wrong" in facts.shown else "borderline"
    half = _half(facts.contributions[facts.place(facts.shown[why])].abs().sum(0).flatten())
    return f"In the {why} sample, {facts.shown[why]}, {half:.0%} of the pixels make half of the |contributions|."


def _maps(facts: Facts) -> Figure:
    places = [facts.place(i) for i in facts.shown.values()]
    images = facts.x[list(facts.shown.values())]
    rows = []
    for why, i in facts.shown.items():
        lines = [f"{why} {i}", facts.explained_name(i)]
        if facts.y is not None and facts.classifies:
            lines.append(f"true {facts.class_name(int(facts.y[i]))}")
        rows.append("\n".join(part for line in lines for part in wrap(line, _LETTERS)))
    shown = images if images.shape[1] in (1, 3) else None
    maps = facts.contributions[places].unsqueeze(1)
    figure = plots.attribution_maps(maps, shown, rows=rows, columns=["contributions"])
    for axes in (
        axes for axes in figure.axes if axes.images
    ):  # level, since a label may be longer than its row is high
        axes.yaxis.label.set(rotation=0, ha="right", va="center", fontsize=8)
    if shown is not None:
        figure.axes[0].set_title(f"input: black {float(shown.min()):.2g},\nwhite {float(shown.max()):.2g}", fontsize=9)
    width, height = figure.get_size_inches()
    figure.set_size_inches(drawings.WIDTH, height * drawings.WIDTH / width)
    return figure


def constants(facts: Facts) -> Section | str:
    """Say which layers make the constant."""
    if facts.kind == "tokens":
        return "constants by layer: their sum is in the table of tokens"
    parts = facts.maps.bias_by_layer()
    if not parts:
        return "constants by layer: the network has none"
    notes, pairs = [], {layer: norm for layer, norm in facts.normed.items() if layer in parts and norm in parts}
    if pairs:
        notes = [
            "A layer and the batch norm right after it are one part, since a shift between the two changes no output."
        ]
    for layer, norm in pairs.items():
        parts = {
            f"{layer} and {norm}" if name == layer else name: part + parts[norm] if name == layer else part
            for name, part in parts.items()
            if name != norm
        }
    norms = {layer for operation, layer, *_ in facts.operations.rows if operation == "batch_norm"}
    if norms - set(facts.normed.values()):
        notes.append("Of a layer and any other batch norm after it, only the sum of the two parts has a meaning: a shift "
                     "between them changes no output.")  # fmt: skip
    sizes = {name: float(part.abs().mean()) for name, part in parts.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    shown = list(facts.shown.items())
    if facts.classifies:  # rather a sample that the constant decides
        shown.sort(key=lambda pair: not facts.decided[facts.place(pair[1])])
    why, sample = shown[0]
    one = {name: part[facts.place(sample)].reshape(1, 1) for name, part in parts.items()}
    first = max(one, key=lambda name: float(one[name].abs()))
    axes = plots.bias_bars(one)
    axes.set_title(f"Constant of {facts.explained_name(sample)}, sample {sample}", fontsize=10)
    axes.set_xlabel("part of the constant, in the outputs' units")
    rows = [[name, size, float(parts[name].mean())] for name, size in sizes.items()]
    error = float((torch.stack(list(parts.values())).sum(0) - facts.maps.bias).abs().max())
    share = sizes[largest] / (sum(sizes.values()) or 1)
    how_much = f"{share:.0%} of the sum of the parts' sizes" if len(parts) > 1 else "all of the constant"
    return Section(
        "The constant, by layer",
        f"Over {len(facts.some)} samples, layer {largest} makes {how_much}; the mean size of its part is {sizes[largest]:.2g}.",
        [(narrow(axes), f"The {why} sample, {sample}: layer {first} makes the largest part, {float(one[first]):+.2g}"
          f"{'' if first == largest else f'; over all samples layer {largest} does'}.")],
        [Table("Constants", ("layer", "mean |part|", "mean"), rows)],
        ["By AffineMap.bias_by_layer(). The parts sum to the constant "
         + (f"with an error of at most {error:.1e}, in the outputs' units." if error else "without an error."), *notes],
    )  # fmt: skip


def _half(values: Tensor) -> float:
    """Return the share of the entries that make half of the sum, the largest first."""
    ordered = values.sort(descending=True).values.cumsum(0)
    return float((ordered < 0.5 * ordered[-1]).sum() + 1) / len(ordered)


def _pixel(values: Tensor) -> str:
    """Return the place of the largest |value| (h, w)."""
    row, column = divmod(int(values.abs().argmax()), values.shape[1])
    return f"row {row}, column {column}"
