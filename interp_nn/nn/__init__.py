"""Layers that compute the summary Y = X b (bᵀb), the reference network's head and loss, and gated networks."""

from interp_nn.nn.cached_weights import cached_weights
from interp_nn.nn.conv import SummaryConv2d
from interp_nn.nn.gated.from_relu import DualNetwork, to_dgn
from interp_nn.nn.gated.gates import GatedConv2d, GatedLinear, HardGate, SoftGate
from interp_nn.nn.gated.networks import DGN, DLGN, DLGNValueTensor, GatedNetwork, GateWeights
from interp_nn.nn.gated.oblique_tree import ObliqueTree
from interp_nn.nn.gated.regimes import copy_gates, fix_gates, permute_gates
from interp_nn.nn.gated.strongest_paths import Paths
from interp_nn.nn.heads import SummaryClassifier, SummaryHead, SummaryLayer
from interp_nn.nn.linear import SummaryLinear
from interp_nn.nn.loss import SummaryLoss
from interp_nn.nn.orthogonality import constrain, orthogonality_penalty, retract_
from interp_nn.nn.parameter_groups import parameter_groups
from interp_nn.nn.spectral_norm import follow, update_spectral_norms

__all__ = [
    "DGN",
    "DLGN",
    "DLGNValueTensor",
    "DualNetwork",
    "GateWeights",
    "GatedConv2d",
    "GatedLinear",
    "GatedNetwork",
    "HardGate",
    "ObliqueTree",
    "Paths",
    "SoftGate",
    "SummaryClassifier",
    "SummaryConv2d",
    "SummaryHead",
    "SummaryLayer",
    "SummaryLinear",
    "SummaryLoss",
    "cached_weights",
    "constrain",
    "copy_gates",
    "fix_gates",
    "follow",
    "orthogonality_penalty",
    "parameter_groups",
    "permute_gates",
    "retract_",
    "to_dgn",
    "update_spectral_norms",
]
