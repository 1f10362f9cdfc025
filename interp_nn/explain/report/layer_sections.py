"""The sections of a report about layers: the head, summary layers, gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interp_nn.explain import plots
from interp_nn.explain.following.gate_record import record
from interp_nn.explain.heads.head_reading import HeadReading, read_head
from interp_nn.explain.paths.kernel_machine import kernel_alignment
from interp_nn.explain.paths.path_kernel import npk
from interp_nn.explain.plots.canvas import set_title
from interp_nn.explain.report import drawings
from interp_nn.explain.report.drawings import whole
from interp_nn.explain.report.facts import Facts
from interp_nn.explain.report.page import Section, Table
from interp_nn.explain.report.wording import which_samples
from interp_nn.nn import SummaryHead, SummaryLinear
from interp_nn.nn.base import LinearForm

_LAYERS = 8  # that a figure shows
_KERNEL_SAMPLES = 200


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
    if enough < k:
        said = f"The {enough} most important of {k} latents give the network's answer for "
        said += f"{agreement[enough - 1]:.1%} of {n} samples"
        said += f", {enough - 1} for {agreement[enough - 2]:.1%}" if enough > 1 else ""
    elif k > 1:
        said = f"All {k} latents are needed for the network's answer: {k - 1} of them give it for "
        said += f"{agreement[-2]:.1%} of {n} samples"
    else:
        said = "There is one latent"
    why = f"{'This' if silent == k - m else f'At least {k - m}'} must be so: {m} outputs depend on at most {m} directions. "
    finding = (
        f"{said}. {f'{silent} of the {k} change no output. ' if silent else ''}{why if silent >= k - m > 0 else ''}"
        f"A linear map of the latents gives back {turned.explained_variance:.0%} of the variance of the values that enter "
        "the head."
    )
    rows = [list(row) for row in zip(*table._columns().values(), strict=True)]
    shares = {name: f"{name} (share)" for name in ("variance", "importance", "agreement", "accuracy")}
    axes = plots.head_contributions(turned, most=min(drawings.MOST, max(k - silent, 1)))
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
    notes, candidates = [f"By record(model, x) over {which_samples(facts)}."], 0
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
