"""The sections of a report about the affine maps: what is exact, how far a map holds, a few maps for all samples."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from interp_nn.explain.clusters.activation_clusters import ActivationClusters
from interp_nn.explain.clusters.piecewise_affine import Fidelity
from interp_nn.explain.following.gate_record import frozen, record
from interp_nn.explain.linear.affine_map import linearize
from interp_nn.explain.linear.regions import region
from interp_nn.explain.report import drawings
from interp_nn.explain.report.drawings import whole
from interp_nn.explain.report.facts import Facts
from interp_nn.explain.report.page import Section, Table
from interp_nn.explain.report.wording import listed, which_samples

_DIRECTIONS, _LENGTHS = 32, (0.125, 0.25, 0.5, 1.0)  # lengths of steps, in median distances to the nearest sample
_REGIONS, _CLUSTER_FEATURES = 12, 200
_ROUNDING = 4  # distances to a gate below so many times the dtype's epsilon and the sample's length are 0
_UNITS_TIMES_INPUTS = 50_000_000  # numbers that a region may hold


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
        else f"At each sample F(x) = W x + c, up to rounding. W depends on the sample through {listed(secants)} "
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
        notes=[f"Error by AffineMap.check() over {which_samples(facts)}.", words],
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
    where = f"at distances of {listed(f'{length * median:.2g}' for length in _LENGTHS)}"
    where += ", the last of which is the median distance to the nearest other sample"
    columns = ["distance", "in median distances to the nearest sample", "median |error|", "largest |error|"]
    if not facts.classifies:
        spread = float(facts.outputs[:, 0].double().std(correction=0))
        return (
            f"Farther away the map is approximate: in random directions its median error is {listed(said)} {where}. The output's "
            f"standard deviation over the samples is {spread:.2g}."
        ), columns, rows  # fmt: skip
    columns += ["map's answer is the network's (share)", "network keeps its answer (share)"]
    return (
        f"Farther away the map is approximate: in random directions it gives the network's answer for {listed(said)} of the "
        f"points {where}. There the network itself keeps the sample's answer for {rows[-1][5]:.1%}."
    ), columns, rows  # fmt: skip


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
         f"standard deviation, by linearize, over {which_samples(facts)}. Both signs: each in at least 5% of these."],
    )  # fmt: skip
