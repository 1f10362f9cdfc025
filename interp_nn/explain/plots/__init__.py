"""Figures of explanations: attributions, constants by layer, clusters, regions, gates, kernels and descrambled weights.

Each function draws on the axes or figure that it is given, or on new ones, and returns them. It does not show or save
anything. Colours of signed values are symmetric about zero: red is positive, blue is negative. The scale holds 99 % of the
values. Other colours are Okabe and Ito's. Titles say what the figure shows of the given data. The figures need matplotlib
(`pip install matplotlib`).
"""

from interp_nn.explain.plots.attribution import attribution_maps, bias_bars, bias_map
from interp_nn.explain.plots.clusters import cluster_coefficients, coverage_curve, region_plot, region_polygon
from interp_nn.explain.plots.contributions import contribution_bars, contribution_beeswarm, contribution_waterfall
from interp_nn.explain.plots.gated import alignment_curves, gate_hyperplanes, kernel_matrix, regime_bars, tree_diagram
from interp_nn.explain.plots.head_contributions import head_contributions
from interp_nn.explain.plots.spectra import ambiguity_strips, descrambled_weights, null_bars, spectrum_curves

__all__ = [
    "alignment_curves",
    "ambiguity_strips",
    "attribution_maps",
    "bias_bars",
    "bias_map",
    "cluster_coefficients",
    "contribution_bars",
    "contribution_beeswarm",
    "contribution_waterfall",
    "coverage_curve",
    "descrambled_weights",
    "gate_hyperplanes",
    "head_contributions",
    "kernel_matrix",
    "null_bars",
    "regime_bars",
    "region_plot",
    "region_polygon",
    "spectrum_curves",
    "tree_diagram",
]
