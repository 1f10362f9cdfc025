"""The sections of a report. Each is a function of the facts that returns a section, or a reason why it has nothing to say."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from interp_nn.explain import plots
from interp_nn.explain.clusters.activation_clusters import ActivationClusters
from interp_nn.explain.following.gate_record import record
from interp_nn.explain.heads.head_reading import HeadReading, read_head
from interp_nn.explain.linear.language_models import token_contributions
from interp_nn.explain.linear.regions import region
from interp_nn.explain.paths.kernel_machine import kernel_alignment
from interp_nn.explain.paths.path_kernel import npk
from interp_nn.explain.report import drawings
from interp_nn.explain.report.drawings import narrow, whole
from interp_nn.explain.report.facts import Facts
from interp_nn.explain.report.page import Section, Table
from interp_nn.nn import SummaryHead, SummaryLinear
from interp_nn.nn.base import LinearForm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SectionOf = Callable[[Facts], "Section | str"]
_RULE = (
    "The margin is the predicted class's output less the next class's; with one output, its size. Typical: the median margin "
    "of right predictions. Borderline: the smallest margin. Wrong and right: the largest among wrong and right predictions. "
    "Without true answers, typical is the median of all, and the largest margin stands for right."
)
_NO_Y = "No true answers were given, so this page cannot say whether that is right."
_REGIONS, _KERNEL_SAMPLES, _CLUSTER_FEATURES = 12, 200, 200
_CLASSES, _LAYERS = 12, 8  # that a figure shows
_ROUNDING = 1e-5  # of the distance to the nearest other sample
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
        worse = " It is no better than the mean." if r2 <= 0.05 else ""
        figure = drawings.against(y, facts.outputs[:, 0], f"R² is {r2:.3f}; on the line a prediction is right")
        return Section(
            title, f"R² is {r2:.3f} on {n} samples.{worse}", [(figure, f"Predictions against true values: R² is {r2:.3f}.")],
            [Table("Prediction errors", ("R²", "mean y", "mean prediction"), [[r2, float(y.mean()), float(average[0])]])],
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
        confused = facts.class_name(int(torch.bincount(taken).argmax())) if len(taken) else "-"
        rows.append([facts.class_name(c), int(own.sum()), float(right[own].double().mean()), confused])
    rows.sort(key=lambda row: row[2])  # type: ignore[arg-type, return-value]
    margin = 2 * (accuracy * (1 - accuracy) / n) ** 0.5
    finding = f"The network is right for {accuracy:.1%} (± {margin:.1%}) of {n} samples. {verdict}"
    said = "There is no error."
    if wrong := n - int(right.sum()):
        pairs, counted = torch.stack((facts.y[~right], facts.predicted[~right])).unique(dim=1, return_counts=True)
        pair = " for ".join(facts.class_name(c) for c in pairs[:, counted.argmax()].tolist())
        most = int(counted.max())
        said = f"The most frequent error takes {pair} ({most} of {wrong} errors)."
        if most == wrong:
            said = (
                f"The only error takes {pair}."
                if wrong == 1
                else f"{'Both' if wrong == 2 else f'All {wrong}'} errors take {pair}."
            )
    figures: list[tuple[Figure, str]] = []
    if (k := max(facts.outputs.shape[1], 2)) <= _CLASSES:
        names = [facts.class_name(c) for c in range(k)]
        table = torch.bincount(k * facts.y + facts.predicted, minlength=k * k).view(k, k)
        figures.append(
            (
                drawings.confusion(table, names, said),
                f"True classes and answers: {wrong} of {n} samples lie off the diagonal.",
            )
        )
    return Section(
        title, f"{finding} {said}", figures,
        [Table("By class, the worst first", ("class", "samples", "right", "most often taken for"), rows)],
        ["This page does not know whether these samples were used in training. ± is two standard errors."],
    )  # fmt: skip


def exactness(facts: Facts) -> Section | str:
    """Say which operations are affine or gates, which are secants, and the error of the maps."""
    found = facts.operations
    rows = [[operation, layer or "(model)", treatment, count] for operation, layer, treatment, count in found.rows]
    table = Table("Operations", ("operation", "layer", "treatment", "calls"), rows)
    title = "What is exact"
    if not found.supported:
        names = ", ".join(dict.fromkeys(f"{row[0]} in {row[1]}" for row in rows if row[2] == "not treated"))
        return Section(title, f"The network has operations that have no affine map: {names}.", tables=[table])
    secants = dict.fromkeys(str(row[0]) for row in rows if row[2] not in ("affine", "gate"))
    exact = (
        "Every operation is affine or a gate: around each sample the network is F(x) = W x + b, exactly."
        if found.exact
        else f"At each sample F(x) = W x + b, exactly. W depends on the sample through {_list(secants)} (secants), so it is "
        "not the derivative, and holds for this sample alone."
    )
    words = (
        "In F(x) = W x + b, the terms of W x are the contributions: input times coefficient. b is the constant. A gate, such as "
        "a ReLU, passes or blocks a value."
    ) + (" While no gate changes, W and b stay the same." if found.exact else "")
    if facts.kind == "tokens":
        return Section(title, exact, tables=[table], notes=[words])
    error = facts.maps.check()
    return Section(
        title, f"{exact} The largest error, relative to the largest output, is {error:.1e}.", tables=[table],
        notes=[f"Error by AffineMap.check() over {len(facts.some)} samples.", words],
    )  # fmt: skip


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
    flat = facts.x.flatten(1)
    if not bool((flat != flat[0]).any()):
        return "how far a map holds: all samples are equal, so there is no distance to compare with"
    rows = []
    for i in chosen.tolist():
        radius = abs(float(region(facts.model, facts.x[i : i + 1]).radius(flat[i])))
        others = (flat - flat[i]).norm(dim=1)
        nearest = float(others[others > 0].min())
        rows.append([i, radius, nearest, radius / nearest])
    ratios = [row[3] for row in rows]
    inside = [row for row in rows if row[3] >= _ROUNDING] or rows
    distance, ratio = (float(torch.tensor([row[j] for row in inside]).double().quantile(0.5)) for j in (1, 3))
    verdict = (
        "the map reaches the nearest other sample" if ratio >= 1
        else "the map ends before the nearest other sample" if ratio >= 0.1
        else "nearly every sample has a map of its own"
    )  # fmt: skip
    ties = sum(value < _ROUNDING for value in ratios)
    finding = ""
    if ties:
        finding = (
            f"{ties} of {len(rows)} samples {'lies' if ties == 1 else 'lie'} on a boundary to rounding: a unit is at 0, or two "
            "candidates of a maximum are equal. "
        )
    if ties < len(rows):
        finding += (
            f"In the median of {'the other ' if ties else ''}{len(inside)} samples, the map holds up to a distance of "
            f"{distance:.2g}. There the first unit flips. This is {ratio:.2g} times the distance to the nearest other sample, so "
            f"{verdict}."
        )
    names, (radii, neighbours) = [str(row[0]) for row in rows], zip(*(row[1:3] for row in rows), strict=True)
    said = f"The nearest gate is {ratio:.2g} times as far as the nearest other sample, in the median of {len(inside)}"
    alt = f"The distance to the nearest gate is {min(ratios):.2g} to {max(ratios):.2g} times that to the nearest other sample."
    return Section(
        "How far around a sample", finding.strip(),
        [(drawings.distances(names, radii, neighbours, said), alt)],
        [Table("Distance to the nearest gate", ("sample", "distance", "nearest sample", "ratio"), rows)],
        [f"By region(model, x).radius(x), for {len(rows)} evenly spaced samples. Euclidean, in the inputs' units."],
    )  # fmt: skip


def importance(facts: Facts) -> Section | str:
    """Say which inputs count, over the samples."""
    if facts.kind == "tokens":
        return _tokens(facts)
    size = facts.contributions.abs()
    constant, total = facts.maps.bias.abs(), size.flatten(1).sum(1)
    share = float((constant / (constant + total)).median())
    name = "predicted over next class" if facts.outputs.shape[1] > 1 else "the output"
    sum_of = f"The constant is {'less than 1%' if share < 0.005 else f'{share:.0%}'} of the median sample's terms."
    title = "What counts"
    if facts.kind == "table":
        names, means = facts.feature_list(), size.mean(0)
        order = means.argsort(descending=True).tolist()
        parts = means / means.sum()
        few = next(i for i in range(1, len(order) + 1) if float(parts[order[:i]].sum()) >= 0.5 - 1e-9)
        axes = plots.contribution_beeswarm(facts.contributions, facts.x[facts.some], features=names, output=name)
        rows = [[names[j], float(means[j]), float(parts[j]), float(facts.contributions[:, j].mean())] for j in order]
        first = _list(names[j] for j in order[: min(few, 5)])
        which = f"; the largest are those of {first}" if few > 5 else f": {first}"
        finding = (
            f"{few} of {len(order)} feature{'s' * (len(order) > 1)} make{'s' * (few == 1)} half of all contributions{which}. "
            f"{sum_of}"
        )
        return Section(
            title, finding,
            [(narrow(axes), f"Contributions to {name}: {names[order[0]]} makes {float(parts[order[0]]):.0%} of them, the most.")],
            [Table("Mean contributions", ("feature", "mean |contribution|", "share", "mean"), rows)],
            [_what_is_explained(facts)],
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
    what = several if facts.outputs.shape[1] > 1 else "the output"
    return f"Contributions W x of {len(facts.some)} samples, inputs times coefficients, to {what}."


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
         "place is counted from 0. Error: of the sum of all terms, relative to the largest.", _RULE],
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
                "Red pixels add to the predicted class over the next one, blue pixels take from it. "
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
                (narrow(axes), f"The {why} sample, {i}: {top} {does} {label} ({float(parts[largest]):+.2g}).")
            )
        error = abs(float(parts.sum()) + constant - value) / (abs(value) or 1.0)
        second = facts.class_name(int(facts.next_class[i])) if facts.classifies else "-"
        rows.append([why, i, predicted, second, true, value, constant, top, error])
    columns = (
        "sample", "index", "predicted", "next class", "true", "value", "constant", "largest |contribution|", "error of the sum",
    )  # fmt: skip
    borderline = facts.shown["borderline"]
    finding = f"Sample {borderline} is the nearest to another answer: {facts.explained_name(borderline)} by "
    finding += f"{float(facts.margin[borderline]):.2g}, where the median margin is {float(facts.margin.median()):.2g}."
    if facts.outputs.shape[1] == 1:
        finding = f"Sample {borderline} has the output nearest to 0, {float(facts.outputs[borderline, 0]):.2g}."
    if "wrong" in facts.shown:
        wrong, right = facts.shown["wrong"], facts.margin[facts.predicted == facts.y]
        below = float((right < facts.margin[wrong]).double().mean()) if len(right) else 0.0
        finding += f" Sample {wrong} is wrong with the largest margin, {float(facts.margin[wrong]):.2g}; "
        finding += f"{below:.0%} of the right answers have a smaller one."
    return Section("Single samples", finding, figures, [Table("Samples", columns, rows)], [_RULE])


def _concentration(facts: Facts) -> str:
    """Say on how many pixels the contributions of one sample lie: of the wrong one, if there is one."""
    why = "wrong" if "wrong" in facts.shown else "borderline"
    half = _half(facts.contributions[facts.place(facts.shown[why])].abs().sum(0).flatten())
    return f"In the {why} sample, {facts.shown[why]}, {half:.0%} of the pixels make half of the contributions."


def _maps(facts: Facts) -> Figure:
    places = [facts.place(i) for i in facts.shown.values()]
    images = facts.x[list(facts.shown.values())]
    rows = []
    for why, i in facts.shown.items():
        true = "" if facts.y is None or not facts.classifies else f"\ntrue {facts.class_name(int(facts.y[i]))}"
        rows.append(f"{why} {i}\n{facts.explained_name(i)}{true}")
    shown = images if images.shape[1] in (1, 3) else None
    maps = facts.contributions[places].unsqueeze(1)
    figure = plots.attribution_maps(maps, shown, rows=rows, columns=["contributions"])
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
    sizes = {name: float(part.abs().mean()) for name, part in parts.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    why, sample = next(iter(facts.shown.items()))
    one = {name: part[facts.place(sample)].reshape(1, 1) for name, part in parts.items()}
    first = max(one, key=lambda name: float(one[name].abs()))
    axes = plots.bias_bars(one)
    axes.set_title(f"Constant of {facts.explained_name(sample)}, sample {sample}", fontsize=10)
    rows = [[name, size, float(parts[name].mean())] for name, size in sizes.items()]
    error = float((torch.stack(list(parts.values())).sum(0) - facts.maps.bias).abs().max())
    share = sizes[largest] / (sum(sizes.values()) or 1)
    how_much = f"{share:.0%} of the constant's parts" if len(parts) > 1 else "all of the constant"
    return Section(
        "The constant, by layer",
        f"Over {len(facts.some)} samples, layer {largest} makes {how_much}, {sizes[largest]:.2g} in the mean.",
        [(narrow(axes), f"The {why} sample, {sample}: layer {first} makes the largest part, {float(one[first]):+.2g}.")],
        [Table("Constants", ("layer", "mean |part|", "mean"), rows)],
        ["By AffineMap.bias_by_layer(). The parts sum to the constant "
         + (f"with an error of {error:.1e}." if error else "without an error.")],
    )  # fmt: skip


def few_maps(facts: Facts) -> Section | str:
    """Approximate the network by a few affine maps."""
    if facts.kind != "table":
        return "a few maps for all samples: the inputs are not a table"
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
    table = merged.table(output, feature_names=facts.feature_list())
    short = merged.table(output, feature_names=[drawings.in_two_lines(feature) for feature in table.features])
    name = facts.class_name(output) if facts.outputs.shape[1] > 1 else "the output"
    c, j = divmod(int(table.coefficients.abs().argmax()), len(table.features))
    largest = f"{table.features[j]} has the largest, {float(table.coefficients[c, j]):+.2g}"
    columns = ["feature", *(f"map of {int(count)} samples" for count in table.count)]
    rows = [
        [table.features[j], *table.coefficients[:, j].tolist()]
        for j in table.importance.mean.argsort(descending=True).tolist()
    ]
    near = " So the network is nearly affine on these samples." if number == 1 and kept.r2 >= 0.95 else ""
    return Section(
        "A few maps for all samples",
        f"{maps[0].upper()}{maps[1:]} can stand for the {all_of_them} activation patterns: on a held-out fifth of the samples R² "
        f"with the network is {kept.r2:.3f}, and the answer is the network's for {kept.agreement:.1%}.{near}",
        [(whole(short.plot()), f"Coefficients of {maps} for {name}: {largest}.")],
        [Table(f"Coefficients for {name}", columns, rows)],
        ["By ActivationClusters(model).fit(x).merge(): the fewest maps with R² of at least 0.95, or the best number. "
         "Coefficients are per unit of a feature; the contributions above are coefficients times values."],
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
    finding = (
        f"{enough} of {len(agreement)} latents give the network's answer for 99% of samples"
        f"{f'; {silent} change no output' if silent else ''}. "
        f"The codes explain {turned.explained_variance:.0%} of the features' variance."
    )
    rows = [list(row) for row in zip(*table._columns().values(), strict=True)]
    return Section(
        "The head", finding,
        [(whole(turned.plot()), f"What the latents add to the classes; {enough} are enough for 99% of samples.")],
        [Table("Latents, in varimax coordinates", list(table._columns()), rows)],
        [f"By read_head(model, layer, x).rotate('varimax'); contributions sum to the outputs to {turned.check():.1e}.",
         "Variance: of the codes. Importance: standard deviation of a code times the size of its weights. Agreement: with the "
         "latents down to this row alone."],
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
        f"The singular values of b are within {defects[worst[0]]:.2g} of 1"
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
        ["By layer.spectrum() and layer.orthogonality_defect(), the largest distance of a singular value from 1."],
    )  # fmt: skip


def gates(facts: Facts) -> Section | str:
    """Count units that never or always pass, and measure the path kernel's alignment with the classes."""
    if not facts.operations.exact or facts.kind == "tokens":
        return "gates: the network has secants, or no inputs with gates"
    found = record(facts.model, facts.x[facts.some])
    rows: list[list[object]] = []
    shares, notes = [], ["By record(model, x)."]
    for site in found.sites:
        on = found.gates(site.name).flatten(1).double().mean(0)
        rows.append([site.name, len(on), int((on == 0).sum()), int((on == 1).sum()), float(on.mean())])
        if "max" not in site.operation:  # whose gates are candidates
            shares.append(on)
    if not shares:
        return "gates: the network has none"
    if len(shares) < len(rows):
        notes.append("A maximum has a gate for each candidate; these are in the table, not in the sentence.")
    every = torch.cat(shares)
    never, always = int((every == 0).sum()), int((every == 1).sum())
    said = f"Of {len(every):,} units, {never:,} {'is' if never == 1 else 'are'} off for all of {len(facts.some)} samples, and "
    finding = said = f"{said}{always:,} {'is' if always == 1 else 'are'} on for all."
    if facts.y is not None and facts.classifies and facts.kind == "table":
        index = facts.some[:_KERNEL_SAMPLES]
        try:
            value = kernel_alignment(npk(facts.model, facts.x[index]), facts.y[index])
            finding += f" The path kernel's alignment with the classes is {value:.2f} (0: none, 1: full)."
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


def _list(names: Iterable[str]) -> str:
    """Return names as a list in a sentence."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
