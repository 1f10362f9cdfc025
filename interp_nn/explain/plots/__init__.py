"""Figures of exact explanations: contributions as images, constants by layer, clusters, regions and coverage, gates and kernels.

Every function draws on the axes or the figure it is given, or on a new one, and returns it; none shows or saves anything.
Colours of signed values are symmetric about zero, red for and blue against; the largest of a hundred values may be off their
scale. matplotlib is needed (`interp_nn[plot]`).
"""

from interp_nn.explain.plots.attribution import attribution_maps, bias_bars, bias_map
from interp_nn.explain.plots.clusters import cluster_coefficients, coverage_curve, region_plot
from interp_nn.explain.plots.gated import alignment_curves, gate_hyperplanes, kernel_matrix, regime_bars

__all__ = [
    "alignment_curves",
    "attribution_maps",
    "bias_bars",
    "bias_map",
    "cluster_coefficients",
    "coverage_curve",
    "gate_hyperplanes",
    "kernel_matrix",
    "regime_bars",
    "region_plot",
]
