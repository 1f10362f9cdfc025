"""The sections of a report. Each is a function of the facts that returns a section, or a reason why it has nothing to say."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from interp_nn.explain import plots
from interp_nn.explain.clusters.activation_clusters import ActivationClusters
from interp_nn.explain.clusters.piecewise_affine import Fidelity
from interp_nn.explain.following.gate_record import frozen, record
from interp_nn.explain.heads.head_reading import HeadReading, read_head
from interp_nn.explain.linear.affine_map import linearize
from interp_nn.explain.linear.language_models import token_contributions
from interp_nn.explain.linear.regions import region
from interp_nn.explain.paths.kernel_machine import kernel_alignment
from interp_nn.explain.paths.path_kernel import npk
from interp_nn.explain.plots.canvas import array, scale, set_title
from interp_nn.explain.report import drawings
from interp_nn.explain.report.drawings import narrow, whole
from interp_nn.explain.report.facts import MOST_SAMPLES, Facts
from interp_nn.explain.report.linear_baseline import linear_predictions
from interp_nn.explain.report.page import Section, Table
from interp_nn.nn import SummaryHead, SummaryLinear
from interp_nn.nn.base import LinearForm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SectionOf = Callable[[Facts], "Section | str"]
_BASELINE = (
    "The linear model: ridge regression with a penalty of 1 on standardized inputs, fitted to four fifths of these samples and "
    "tested on the rest, five times. The network may have had more samples, or these. A difference below two standard errors may "
    "be chance."
)
_NO_Y = "No true answers were given, so this page cannot say whether that is right."
_DIRECTIONS, _LENGTHS = 32, (0.125, 0.25, 0.5, 1.0)  # lengths of steps, in median distances to the nearest sample
_REGIONS, _KERNEL_SAMPLES, _CLUSTER_FEATURES = 12, 200, 200
_CLASSES, _LAYERS = 12, 8  # that a figure shows
_ERRORS = 100  # that a table has
_LETTERS = 16  # of a line beside a row of images
_ROUNDING = 4  # distances to a gate below so many times the dtype's epsilon and the sample's length are 0
_UNITS_TIMES_INPUTS = 50_000_000  # numbers that a region may hold


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
            confused = f"{_first(ties)} ({most}{' each' if len(ties) > 1 else ''})"
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
        pair = _first(ties)
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
    if (k := max(facts.outputs.shape[1], 2)) <= _CLASSES:
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


def exactness(facts: Facts) -> Section | str:
    """Say which operations are affine or gates, which are secants, and the error of the maps."""
    found = facts.operations
    modules = dict(facts.model.named_modules())
    rows = [
        [operation, layer or "(model)", treatment, count, _arguments(modules.get(layer))]
        for operation, layer, treatment, count in found.rows
    ]
    table = Table("Operations", ("operation", "layer", "treatment", "calls", "arguments"), rows)
    title = "What is exact"
    if not found.supported:
        names = ", ".join(dict.fromkeys(f"{row[0]} in {row[1]}" for row in rows if row[2] == "not treated"))
        return Section(title, f"The network has operations that have no affine map: {names}.", tables=[table])
    secants = dict.fromkeys(str(row[0]) for row in rows if row[2] not in ("affine", "gate"))
    exact = (
        "Every operation is affine or a gate: at each sample, and around it up to the first gate that changes, the network is "
        "F(x) = W x + c, up to rounding."
        if found.exact
        else f"At each sample F(x) = W x + c, up to rounding. W depends on the sample through {_list(secants)} "
        "(secants), so it is not the derivative, and holds for this sample alone."
    )
    words = (
        "In F(x) = W x + c, the terms of W x are the contributions: input times coefficient. c is the constant. A gate, such as "
        "a ReLU, passes or blocks a value."
    ) + (" While no gate changes, W and c stay the same." if found.exact else "")
    if facts.kind == "tokens":
        return Section(title, exact, tables=[table], notes=[words])
    error = facts.maps.check()
    return Section(
        title, f"{exact} The largest error, relative to the largest output, is {error:.1e}.", tables=[table],
        notes=[f"Error by AffineMap.check() over {_which(facts)}.", words],
    )  # fmt: skip


def _arguments(module: nn.Module | None) -> str:
    """Return the arguments of a layer as its repr has them; "-" for a module with children."""
    return "-" if module is None or any(True for _ in module.children()) else module.extra_repr() or "-"


def reach(facts: Facts) -> Section | str:
    """Say how far around a sample its map holds."""
    if not facts.operations.exact:
        return "how far a map holds: the network has secants, whose maps change with every step"
    if facts.kind == "tokens":
        return "how far a map holds: tokens have no distances"
    gates = record(facts.model, facts.x[:1])
    units, d = sum(site.shape.numel() for site in gates.sites), facts.x[0].numel()
    if not units:
        return "how far a map holds: the network has no gates, so one map holds everywhere"
    if units * d > _UNITS_TIMES_INPUTS:
        return f"how far a map holds: {units} units times {d} inputs are too many numbers for a region"
    chosen = facts.some[torch.linspace(0, len(facts.some) - 1, min(_REGIONS, len(facts.some))).long()]
    spaced = len(chosen)
    chosen = torch.cat((chosen, torch.tensor(list(facts.shown.values())))).unique()
    flat = facts.x.flatten(1)
    if not bool((flat != flat[0]).any()):
        return "how far a map holds: all samples are equal, so there is no distance to compare with"
    rows, inside, radii = [], [], []
    for i in chosen.tolist():
        radius = abs(float(region(facts.model, facts.x[i : i + 1]).radius(flat[i])))
        others = (flat - flat[i]).norm(dim=1)
        nearest = float(others[others > 0].min())
        rounding = _ROUNDING * torch.finfo(flat.dtype).eps * float(flat[i].norm())
        rows.append([i, radius, nearest, radius / nearest])
        inside += [rows[-1]] * (radius > rounding)
        radii.append(radius if radius > rounding else 0.0)
    ties, finding, said = len(rows) - len(inside), "", "All samples lie on a boundary, within rounding"
    if ties:
        finding = (
            f"{ties} of {len(rows)} samples {'lies' if ties == 1 else 'lie'} on a boundary, within the rounding of "
            f"{str(flat.dtype).removeprefix('torch.')}: a unit is at 0, or two candidates of a maximum are equal. There the map "
            "holds at the sample, and not on all sides of it. "
        )
    if inside:
        distance, ratio = (float(torch.tensor([row[j] for row in inside]).double().quantile(0.5)) for j in (1, 3))
        near = sum(row[3] < 1 for row in inside)
        finding += (
            f"In the median of {'the other ' if ties else ''}{len(inside)} samples, the map holds up to a distance of "
            f"{distance:.2g}. There the first unit flips. This is {ratio:.2g} times the distance to the nearest other sample. "
            f"The gate is nearer than that sample for {near} of {len(inside)}."
        )
        said = (
            f"The nearest gate is {ratio:.2g} times as far as the nearest other sample, in the median of {len(inside)}"
        )
    names = [f"{row[0]}{'' if radius else ' (on a boundary)'}" for row, radius in zip(rows, radii, strict=True)]
    neighbours = [row[2] for row in rows]
    alt = f"{ties} of {len(rows)} samples {'lies' if ties == 1 else 'lie'} on a boundary."
    if inside:
        ends = min(row[3] for row in inside), max(row[3] for row in inside)
        alt = (
            f"The distance to the nearest gate is {ends[0]:.2g} to {ends[1]:.2g} times that to the nearest other sample"
            + (f"; {ties} samples on a boundary have only the second." if ties else ".")
        )
    median = float(torch.tensor([row[2] for row in rows]).double().quantile(0.5))
    beyond, columns, steps = _beyond(facts, chosen, median)
    several = facts.outputs.shape[1] > 1
    return Section(
        "How far around a sample", f"{finding.strip()} {beyond}",
        [(drawings.distances(names, radii, neighbours, said), alt)],
        [Table("Distance to the nearest gate", ("sample", "distance", "nearest sample", "ratio"), rows),
         Table("The map beyond its gates, in random directions", columns, steps)],
        [f"By region(model, x).radius(x), for {spaced} evenly spaced samples and those shown one by one, since each region takes "
         f"time. Euclidean, in the units of the inputs as the network gets them. On a boundary: less than {_ROUNDING} times the "
         "rounding of the sample.",
         f"Beyond the gates: frozen(model, x) against the network, at {_DIRECTIONS} random directions from each of these "
         f"{len(rows)} samples. Values are {'margins over the next class at the sample' if several else 'the output'}. Steps "
         "towards other samples may have larger errors."],
    )  # fmt: skip


def _beyond(facts: Facts, chosen: Tensor, median: float) -> tuple[str, list[str], list[list[object]]]:
    """Measure the maps of samples at random steps of several lengths: a sentence, and the columns and rows of a table."""
    x, n, outputs = facts.x[chosen], len(chosen), facts.outputs.shape[1]
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(_DIRECTIONS, n, x[0].numel(), generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=2, keepdim=True)).to(x).view(-1, *x.shape[1:])
    maps = frozen(facts.model, x)
    own = facts.predicted[chosen].repeat(_DIRECTIONS)
    rival = facts.next_class[chosen].repeat(_DIRECTIONS)

    def read(out: Tensor) -> tuple[Tensor, Tensor]:  # the value that is compared, and the answer
        out = out.reshape(len(out), -1)
        if outputs == 1:
            return out[:, 0], (out[:, 0] > 0).long()
        return (out.gather(1, own[:, None]) - out.gather(1, rival[:, None]))[:, 0], out.argmax(1)

    rows: list[list[object]] = []
    said = []
    for length in _LENGTHS:
        points = x.repeat(_DIRECTIONS, *[1] * (x.dim() - 1)) + length * median * directions
        with torch.no_grad():
            value, answer = read(torch.cat([facts.model(part) for part in points.split(256)]))
            mapped, answer_of_map = read(maps(points))
        error = (mapped - value).abs().double()
        row: list[object] = [length * median, length, float(error.quantile(0.5)), float(error.max())]
        if facts.classifies:
            row += [
                float((part == value_of).double().mean()) for part, value_of in ((answer_of_map, answer), (answer, own))
            ]
        rows.append(row)
        said.append(f"{row[4]:.1%}" if facts.classifies else f"{row[2]:.2g}")
    where = f"at distances of {_list(f'{length * median:.2g}' for length in _LENGTHS)}"
    where += ", the last of which is the median distance to the nearest other sample"
    columns = ["distance", "in median distances to the nearest sample", "median |error|", "largest |error|"]
    if not facts.classifies:
        spread = float(facts.outputs[:, 0].double().std(correction=0))
        return (
            f"Farther away the map is approximate: in random directions its median error is {_list(said)} {where}. The output's "
            f"standard deviation over the samples is {spread:.2g}."
        ), columns, rows  # fmt: skip
    columns += ["map's answer is the network's (share)", "network keeps its answer (share)"]
    return (
        f"Farther away the map is approximate: in random directions it gives the network's answer for {_list(said)} of the "
        f"points {where}. There the network itself keeps the sample's answer for {rows[-1][5]:.1%}."
    ), columns, rows  # fmt: skip


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
        first = _list(names[j] for j in order[: min(few, 5)])
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
        rows = [[i, *row] for i, row in enumerate(each.tolist())] if each.shape[1] <= _CLASSES else []
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
    return f"Contributions W x, inputs times coefficients, to {what}. They are those of {_which(facts)}."


def _which(facts: Facts) -> str:
    """Say which samples are linearized, and why."""
    n, all_of_them = len(facts.some), len(facts.x)
    if n == all_of_them:
        return f"all {n} samples"
    most = min(n, MOST_SAMPLES)
    return f"{n} of {all_of_them} samples: about {most} evenly spaced ones, to save time, and those shown one by one"


def _decided(facts: Facts) -> str:
    """Say for how many answers the constant is needed, and for which of the samples that are shown."""
    if not facts.classifies:
        return ""
    count, n = int(facts.decided.sum()), len(facts.some)
    does, none, outputs = "the answer would change", f"It decides none of {n} answers", facts.outputs.shape[1]
    if outputs > 1:
        does = "the other class would win"
    if outputs > 2:  # of which only the two that are explained are compared
        does, none = "another class would win", f"{none} against the class that they are explained over"
    shown = [str(i) for i in facts.shown.values() if facts.decided[facts.place(i)]]
    among = f", among them {_list(shown)}, shown below" if shown else ""
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


def few_maps(facts: Facts) -> Section | str:
    """Approximate the network by a few affine maps."""
    if facts.kind != "table":
        return (
            "a few maps for all samples: they are made for tables, where each coefficient has a feature's name"
            + "; for images, print ActivationClusters(model).fit(x).merge()" * (facts.kind == "image")
        )
    d = facts.x.shape[1]
    if d > _CLUSTER_FEATURES or len(facts.x) < 30:
        return f"a few maps for all samples: {len(facts.x)} samples of {d} features are too few or too wide"
    if not facts.operations.exact:
        return "a few maps for all samples: the network has secants"
    if not any(treatment == "gate" for _, _, treatment, _ in facts.operations.rows):
        return "a few maps for all samples: the network has no gates, so one map holds everywhere"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clusters = ActivationClusters(facts.model, progress=False).fit(facts.x)
        merged = clusters.merge()
    kept = merged.held_out_
    assert kept is not None  # merge() chose the number
    number, all_of_them = len(merged.counts_), len(clusters.counts_)
    maps = f"{number} affine maps" if number > 1 else "one affine map"
    output = int(torch.bincount(facts.predicted).argmax()) if facts.outputs.shape[1] > 1 else 0
    table = merged.table(output, rows=number, feature_names=facts.feature_list())
    short = merged.table(
        output, rows=number, feature_names=[drawings.in_two_lines(feature) for feature in table.features]
    )
    name = facts.class_name(output) if facts.outputs.shape[1] > 1 else "the output"
    c, j = divmod(int(table.coefficients.abs().argmax()), len(table.features))
    largest = f"{table.features[j]} has the largest, {float(table.coefficients[c, j]):+.2g}"
    columns = ["feature", *(f"map of {int(count)} samples" for count in table.count), "mean exact", "std exact"]
    order = table.importance.mean.argsort(descending=True).tolist()
    rows = [[table.features[j], *table.coefficients[:, j].tolist()] for j in order]

    def centred(out: Tensor) -> Tensor:  # as the coefficients of the table are
        out = out.reshape(len(out), -1)
        return out[:, output] - out.mean(1) if out.shape[1] > 1 else out[:, 0]

    constant = centred(merged.affine_.bias).tolist()
    single = linearize(facts.model, facts.x[facts.some], centred)
    exact = single.weight
    of_what = f"the output {name} less the mean of the outputs" if facts.outputs.shape[1] > 1 else "the output"
    of_what += ", which is half of its margin," if facts.outputs.shape[1] == 2 else ""
    for row, j in zip(rows, order, strict=True):
        row += [float(exact[:, j].mean()), float(exact[:, j].std(correction=0))]
    rows.append(["(constant)", *constant, float(single.bias.mean()), float(single.bias.std(correction=0))])
    turned = int((torch.minimum((exact > 0).double().mean(0), (exact < 0).double().mean(0)) >= 0.05).sum())
    mean = (merged.counts_.to(table.coefficients) / merged.counts_.sum()) @ table.coefficients
    other = int((mean * exact.mean(0).to(mean) < 0).sum())
    held_out = -(-int((clusters.labels_ >= 0).sum()) // 5)

    def fidelity(found: Fidelity) -> str:
        return f"{found.r2:.3f}, and the answer is the network's for {round(found.agreement * held_out)} of {held_out}"

    assert merged.one_map_ is not None
    single_map = f" (one map: R² is {fidelity(merged.one_map_)})" if number > 1 else ""
    return Section(
        "A few maps for all samples",
        f"{maps[0].upper()}{maps[1:]} can stand for the {all_of_them} activation patterns: on the held-out fifth of the samples, "
        f"which chose the number of maps, R² with the network is {fidelity(kept)}{single_map}. For {turned} of "
        f"{len(order)} features the exact coefficient has both signs among the samples; for {other} its mean has "
        f"another sign than in the {'maps' if number > 1 else 'map'}."
        + (" So the outputs agree, and the coefficients do not." if other and kept.r2 >= 0.95 else ""),
        [(whole(short.plot()), f"Coefficients of {maps} for {name}: {largest}.")],
        [Table(f"Coefficients for {name}", columns, rows)],
        ["By ActivationClusters(model).fit(x).merge(): "
         + ("the fewest maps with R² of at least 0.95" if kept.r2 >= 0.95 else "the number of maps with the best R²")
         + f". Tested: maps of four fifths of the samples. Shown: those of all. Coefficients are of {of_what} per unit of a "
         "feature. Their order is that of |coefficient| times the feature's standard deviation. Exact coefficients: mean and "
         f"standard deviation, by linearize, over {_which(facts)}. Both signs: each in at least 5% of these."],
    )  # fmt: skip


def head(facts: Facts) -> Section | str:
    """Read the last two linear layers, if nothing is between them."""
    reading = _last_pair(facts)
    if reading is None:
        return "the head's coordinates: the network does not end with two linear layers that have nothing between them"
    turned = reading.rotate("varimax")
    table = turned.summary()
    silent = int((table.importance < 1e-6).sum())
    agreement = table.agreement.tolist()
    enough = next(i for i, value in enumerate(agreement, 1) if value >= 0.99)
    n, k, m = len(facts.x), len(agreement), facts.outputs.shape[1]
    said = f"The {enough} most important of {k} latents give the network's answer for {agreement[enough - 1]:.1%} of {n} samples"
    if enough > 1:
        said += f", {enough - 1} for {agreement[enough - 2]:.1%}"
    why = f"{'This' if silent == k - m else f'At least {k - m}'} must be so: {m} outputs depend on at most {m} directions. "
    finding = (
        f"{said}. {f'{silent} of the {k} change no output. ' if silent else ''}{why if silent >= k - m > 0 else ''}"
        f"A linear map of the latents gives back {turned.explained_variance:.0%} of the variance of the values that enter "
        "the head."
    )
    rows = [list(row) for row in zip(*table._columns().values(), strict=True)]
    shares = {name: f"{name} (share)" for name in ("variance", "importance", "agreement", "accuracy")}
    axes = plots.head_contributions(turned, most=min(_CLASSES, max(k - silent, 1)))
    set_title(axes, f"{said}.")
    return Section(
        "The head", finding,
        [(whole(axes), "What a latent adds to each class when it grows by a standard deviation. A percentage: its importance.")],
        [Table("Latents, in varimax coordinates", [shares.get(name, name) for name in table._columns()], rows)],
        [f"By read_head(model, layer, x).rotate('varimax'). Contributions sum to the outputs with an error of "
         f"{turned.check():.1e}, relative to the largest output.",
         f"A latent is one of the {k} values between the head's two linear layers, in coordinates that varimax chose. Variance: "
         "of the latent, in that of all latents. Importance: its standard deviation times the norm of its weights, in the sum "
         "over all latents. Supports and opposes: the classes of its largest and smallest weight. Agreement: with the network's "
         "answer, by the latents down to this row, with the others at their means. Accuracy: the same with the true class."],
    )  # fmt: skip


def _last_pair(facts: Facts) -> HeadReading | None:
    if facts.kind == "tokens" or facts.outputs.shape[1] < 2:
        return None
    y = facts.y if facts.y is not None and not facts.y.dtype.is_floating_point else None
    layers = [
        (name, m) for name, m in facts.model.named_modules() if isinstance(m, nn.Linear | SummaryLinear | SummaryHead)
    ]
    tries: list[tuple[str, str | None]] = [(name, None) for name, m in layers if isinstance(m, SummaryHead)]
    tries += [(a, b) for (a, _), (b, _) in zip(layers[-2:-1], layers[-1:], strict=False)]
    for layer, output in tries:
        try:
            return read_head(facts.model, layer, facts.x, y, output=output, class_names=facts.classes)
        except (ValueError, TypeError):
            continue
    return None


def summary_layers(facts: Facts) -> Section | str:
    """Say how far the b of each summary layer is from orthonormal columns."""
    rows: list[list[object]] = []
    defects: dict[str, float] = {}
    spectra: dict[str, Tensor] = {}
    for name, module in facts.model.named_modules():
        if isinstance(module, LinearForm) and module.b.numel():
            name = name or "(model)"
            values = spectra[name] = module.spectrum()
            defects[name] = module.orthogonality_defect()
            rows.append([name, str(tuple(module.b.shape)), float(values.max()), float(values.min()), defects[name]])
    if not rows:
        return "summary layers: the network has none"
    worst = sorted(defects, key=lambda name: -defects[name])
    low, high = (float(end) ** 2 for end in spectra[worst[0]].aminmax())
    text = (
        f"The singular values of the matrix b are within {defects[worst[0]]:.2g} of 1"
        f"{f'; layer {worst[0]} is the farthest' if len(rows) > 1 else f' in layer {worst[0]}'}."
    )
    alt = f"The singular values of b in layer {worst[0]} go from {low**0.5:.3g} to {high**0.5:.3g}."
    return Section(
        "Summary layers",
        f"{text} " + (
            "So projection x b and summary x b (bᵀb) are equal to 3 digits." if defects[worst[0]] < 1e-3
            else f"So the summary x b (bᵀb) is the projection x b with its directions scaled by {low:.2g} to {high:.2g}."
        ),
        [(drawings.spectra({name: spectra[name] for name in worst[:_LAYERS]}, text), alt)],
        [Table("Singular values of b", ("layer", "shape of b", "largest", "smallest", "defect"), rows)],
        ["By layer.spectrum() and layer.orthogonality_defect(), the largest distance of a singular value from 1. b is "
         " the matrix of a summary layer, and x is here the layer's input."],
    )  # fmt: skip


def gates(facts: Facts) -> Section | str:
    """Count units that never or always pass, and measure the path kernel's alignment with the classes."""
    if not facts.operations.exact or facts.kind == "tokens":
        return (
            "gates: the network has secants, which are not only on or off"
            if facts.kind != "tokens"
            else "gates: not made for tokens"
        )
    found = record(facts.model, facts.x[facts.some])
    rows: list[list[object]] = []
    shares: list[Tensor] = []
    layers: list[tuple[str, int, int]] = []
    notes, candidates = [f"By record(model, x) over {_which(facts)}."], 0
    for site in found.sites:
        on = found.gates(site.name).flatten(1).double().mean(0)
        rows.append([site.name, len(on), int((on == 0).sum()), int((on == 1).sum()), float(on.mean())])
        if "max" in site.operation:
            candidates += len(on)
        else:
            shares.append(on)
            layers.append((site.name, int((on == 0).sum()), len(on)))
    if not shares:
        return "gates: the network has none"
    every = torch.cat(shares)
    never, always = int((every == 0).sum()), int((every == 1).sum())
    said = f"Of {len(every):,} units, {never:,} {'is' if never == 1 else 'are'} off for all of {len(facts.some)} samples, and "
    finding = said = f"{said}{always:,} {'is' if always == 1 else 'are'} on for all."
    if candidates:
        finding += (
            f" The {candidates:,} candidates of maxima are not among them; region(model, x) counts them as units."
        )
    name, dead, units = max(layers, key=lambda layer: layer[1] / layer[2])
    if never and len(layers) > 1:
        finding += f" Layer {name} has the largest share that is never on: {dead:,} of {units:,}."
    if facts.y is not None and facts.classifies and facts.kind == "table":
        index = facts.some[:_KERNEL_SAMPLES]
        try:
            value = kernel_alignment(npk(facts.model, facts.x[index]), facts.y[index])
            finding += f" The path kernel's alignment with the classes is {value:.2f} (0: none, 1: full)"
            linear = kernel_alignment(facts.x[index] @ facts.x[index].mT, facts.y[index])
            finding += f", that of the inputs' products {linear:.2f}."
            notes.append(
                "Path kernel, by npk(model, x): the inner product of two samples, weighted by the paths that are open for both. "
                "Alignment: the cosine between a kernel and the matrix of equal classes, both centred, by kernel_alignment."
            )
        except (ValueError, TypeError, NotImplementedError) as error:
            notes.append(f"No path kernel: {error}")
    alt = f"The median unit is on for {float(every.median()):.0%} of the samples."
    return Section(
        "Gates", finding, [(drawings.shares(every, said), alt)],
        [Table("Units", ("layer", "units", "never on", "always on", "mean on"), rows)], notes,
    )  # fmt: skip


DEFAULT: dict[str, SectionOf] = {
    "predictions": predictions,
    "exactness": exactness,
    "reach": reach,
    "importance": importance,
    "samples": samples,
    "constants": constants,
    "few_maps": few_maps,
    "head": head,
    "summary_layers": summary_layers,
    "gates": gates,
}


def _half(values: Tensor) -> float:
    """Return the share of the entries that make half of the sum, the largest first."""
    ordered = values.sort(descending=True).values.cumsum(0)
    return float((ordered < 0.5 * ordered[-1]).sum() + 1) / len(ordered)


def _pixel(values: Tensor) -> str:
    """Return the place of the largest |value| (h, w)."""
    row, column = divmod(int(values.abs().argmax()), values.shape[1])
    return f"row {row}, column {column}"


def _first(names: Sequence[str]) -> str:
    """Return the first three names as a list in a sentence, and how many there are more."""
    return _list(names if len(names) < 4 else [*names[:3], f"{len(names) - 3} more"])


def _list(names: Iterable[str]) -> str:
    """Return names as a list in a sentence."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
