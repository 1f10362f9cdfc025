"""Exact explanations of networks of linear maps and gates: affine maps, activation patterns, and the regions they stand for.

Where every unit of a ReLU network is either on or off, the network is an affine map. The units' states are its activation
pattern, and the inputs that share one are a convex region with flat sides.
"""

from interp_nn.explain.affine import AffineMap, SingularTriplets, linearize
from interp_nn.explain.attribution import InstanceLinearization
from interp_nn.explain.calls import UnsupportedOperation
from interp_nn.explain.clusters import ActivationClusters, MergedClusters, NotFittedError
from interp_nn.explain.gates import GateRecord, GateSite, OperationReport, frozen, record, supported_ops
from interp_nn.explain.regions import Ball, Boundary, Region, region
from interp_nn.explain.tsne import ParametricTSNE
from interp_nn.patterns import ActivationPatterns, PatternGroups

__all__ = [
    "ActivationClusters",
    "ActivationPatterns",
    "AffineMap",
    "Ball",
    "Boundary",
    "GateRecord",
    "GateSite",
    "InstanceLinearization",
    "MergedClusters",
    "NotFittedError",
    "OperationReport",
    "ParametricTSNE",
    "PatternGroups",
    "Region",
    "SingularTriplets",
    "UnsupportedOperation",
    "frozen",
    "linearize",
    "record",
    "region",
    "supported_ops",
]
