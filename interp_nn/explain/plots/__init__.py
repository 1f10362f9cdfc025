"""Figures of exact explanations: contributions as images, constants by layer, clusters, regions and coverage, gates and kernels,
descrambled weights and spectra.

Every function draws on the axes or the figure it is given, or on a new one, and returns it; none shows or saves anything.
Colours of signed values are symmetric about zero, red for and blue against; the largest of a hundred values may be off their
scale. matplotlib is needed (`interp_nn[plot]`).
"""

from interp_nn.explain.plots.attribution import attribution_maps, bias_bars, bias_map
from interp_nn.explain.plots.clusters import cluster_coefficients, coverage_curve, region_plot
from interp_nn.explain.plots.gated import alignment_curves, gate_hyperplanes, kernel_matrix, regime_bars
from interp_nn.explain.plots.spectra import ambiguity_strips, descrambled_weights, null_bars, spectrum_curves

__all__ = [
    "alignment_curves",
    "ambiguity_strips",
    "attribution_maps",
    "bias_bars",
    "bias_map",
    "cluster_coefficients",
    "coverage_curve",
    "descrambled_weights",
    "gate_hyperplanes",
    "kernel_matrix",
    "null_bars",
    "regime_bars",
    "region_plot",
    "spectrum_curves",
]
