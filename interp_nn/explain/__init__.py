"""Exact explanations of networks of linear maps and gates: affine maps, activation patterns, and the regions they stand for.

Where every unit of a ReLU network is either on or off, the network is an affine map. The units' states are its activation
pattern, and the inputs that share one are a convex region with flat sides.
"""

from interp_nn.explain.affine import AffineMap, SingularTriplets, linearize
from interp_nn.explain.attribution import InstanceLinearization
from interp_nn.explain.brockett import BrockettExtreme, brockett_max, brockett_min, smoothness
from interp_nn.explain.calls import UnsupportedOperation
from interp_nn.explain.clusters import ActivationClusters, MergedClusters, NotFittedError
from interp_nn.explain.descramble import Descrambler, Nulls
from interp_nn.explain.gates import GateRecord, GateSite, OperationReport, frozen, record, supported_ops
from interp_nn.explain.kernel_machine import NPKMachine, kernel_alignment
from interp_nn.explain.path_features import PathFeatures, path_features
from interp_nn.explain.path_kernel import npk, npk_model
from interp_nn.explain.path_sampling import SampledKernel, npk_montecarlo
from interp_nn.explain.regions import Ball, Boundary, Region, region
from interp_nn.explain.rewiring import DescrambledWeights
from interp_nn.explain.seriation import Seriation, seriate
from interp_nn.explain.smooth import Ambiguity, Spectrum
from interp_nn.explain.tangent_kernel import ntk
from interp_nn.explain.tsne import ParametricTSNE
from interp_nn.explain.waves import FourierView, fft_view
from interp_nn.patterns import ActivationPatterns, PatternGroups

__all__ = [
    "ActivationClusters",
    "ActivationPatterns",
    "AffineMap",
    "Ambiguity",
    "Ball",
    "Boundary",
    "BrockettExtreme",
    "DescrambledWeights",
    "Descrambler",
    "FourierView",
    "GateRecord",
    "GateSite",
    "InstanceLinearization",
    "MergedClusters",
    "NPKMachine",
    "NotFittedError",
    "Nulls",
    "OperationReport",
    "ParametricTSNE",
    "PathFeatures",
    "PatternGroups",
    "Region",
    "SampledKernel",
    "Seriation",
    "SingularTriplets",
    "Spectrum",
    "UnsupportedOperation",
    "brockett_max",
    "brockett_min",
    "fft_view",
    "frozen",
    "kernel_alignment",
    "linearize",
    "npk",
    "npk_model",
    "npk_montecarlo",
    "ntk",
    "path_features",
    "record",
    "region",
    "seriate",
    "smoothness",
    "supported_ops",
]
