"""The sections of a report, by name. Each is a function of the facts: it returns a section, or why it has nothing to say."""

from __future__ import annotations

from collections.abc import Callable

from interp_nn.explain.report.contribution_sections import constants, importance, samples
from interp_nn.explain.report.facts import Facts
from interp_nn.explain.report.layer_sections import gates, head, summary_layers
from interp_nn.explain.report.map_sections import exactness, few_maps, reach
from interp_nn.explain.report.page import Section
from interp_nn.explain.report.prediction_sections import predictions

SectionOf = Callable[[Facts], "Section | str"]

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
