"""Explanations of networks: the exact affine map of linear maps and gates, activation patterns, and the regions they stand for.

Where every unit of a ReLU network is either on or off, the network is an affine map. The units' states are its activation
pattern, and the inputs that share one are a convex region with flat sides.
"""

from interp_nn.explain.clusters.activation_clusters import ActivationClusters, MergedClusters
from interp_nn.explain.descramble.brockett import BrockettExtreme, brockett_min, smoothness
from interp_nn.explain.descramble.derivatives import (
    DerivativeOperator,
    derivative_operator,
    graph_operator,
    matrix_operator,
)
from interp_nn.explain.descramble.descrambler import Descrambler, Nulls
from interp_nn.explain.descramble.fourier import FourierView, fft_view
from interp_nn.explain.descramble.optimum import Ambiguity, Spectrum
from interp_nn.explain.descramble.rewiring import DescrambledWeights
from interp_nn.explain.descramble.seriation import Seriation, seriate
from interp_nn.explain.estimator import NotFittedError
from interp_nn.explain.following.calls import UnsupportedOperation
from interp_nn.explain.following.gate_record import OperationReport, frozen, record, supported_ops
from interp_nn.explain.following.scikit_learn import from_sklearn
from interp_nn.explain.heads.head_reading import HeadReading, KeptLatents, TopSamples, read_head
from interp_nn.explain.heads.head_table import HeadTable
from interp_nn.explain.linear.affine_map import AffineMap, SingularTriplets, linearize
from interp_nn.explain.linear.instance_linearization import InstanceLinearization
from interp_nn.explain.linear.language_models import (
    SingularDirections,
    TokenContributions,
    singular_directions,
    token_contributions,
)
from interp_nn.explain.linear.region_graph import Facets, RegionGraph, RegionStatistics, facets, region_graph
from interp_nn.explain.linear.regions import Ball, Boundary, Region, region
from interp_nn.explain.paths.enumeration import PathFeatures, path_features
from interp_nn.explain.paths.kernel_machine import NPKMachine, kernel_alignment
from interp_nn.explain.paths.monte_carlo import SampledKernel, npk_montecarlo
from interp_nn.explain.paths.path_kernel import npk, npk_from_gates
from interp_nn.explain.paths.tangent_kernel import ntk
from interp_nn.explain.report.network_report import Report, report, report_sections
from interp_nn.explain.report.page import Section
from interp_nn.explain.trees.dlgn_estimators import DLGNClassifier, DLGNRegressor
from interp_nn.explain.tsne import ParametricTSNE
from interp_nn.gates.patterns import ActivationPatterns, PatternGroups
from interp_nn.gates.record import GateRecord, GateSite

__all__ = [
    "ActivationClusters",
    "ActivationPatterns",
    "AffineMap",
    "Ambiguity",
    "Ball",
    "Boundary",
    "BrockettExtreme",
    "DLGNClassifier",
    "DLGNRegressor",
    "DerivativeOperator",
    "DescrambledWeights",
    "Descrambler",
    "Facets",
    "FourierView",
    "GateRecord",
    "GateSite",
    "HeadReading",
    "HeadTable",
    "InstanceLinearization",
    "KeptLatents",
    "MergedClusters",
    "NPKMachine",
    "NotFittedError",
    "Nulls",
    "OperationReport",
    "ParametricTSNE",
    "PathFeatures",
    "PatternGroups",
    "Region",
    "RegionGraph",
    "RegionStatistics",
    "Report",
    "SampledKernel",
    "Section",
    "Seriation",
    "SingularDirections",
    "SingularTriplets",
    "Spectrum",
    "TokenContributions",
    "TopSamples",
    "UnsupportedOperation",
    "brockett_min",
    "derivative_operator",
    "facets",
    "fft_view",
    "from_sklearn",
    "frozen",
    "graph_operator",
    "kernel_alignment",
    "linearize",
    "matrix_operator",
    "npk",
    "npk_from_gates",
    "npk_montecarlo",
    "ntk",
    "path_features",
    "read_head",
    "record",
    "region",
    "region_graph",
    "report",
    "report_sections",
    "seriate",
    "singular_directions",
    "smoothness",
    "supported_ops",
    "token_contributions",
]
