"""Layers around the summary Y = X b (bᵀb), the reference network's head and its loss; and gated networks."""

from interp_nn.nn.constraints import constrain, orthogonality_penalty, retract_
from interp_nn.nn.convert import head_from_reference
from interp_nn.nn.dual import DualNetwork, to_dgn
from interp_nn.nn.gated import DGN, DLGN, DLGNValueTensor, GatedNetwork, GateWeights
from interp_nn.nn.gates import GatedConv2d, GatedLinear, HardGate, SoftGate
from interp_nn.nn.loss import SummaryLoss
from interp_nn.nn.paths import Paths
from interp_nn.nn.regimes import copy_gates, fix_gates, permute_gates
from interp_nn.nn.summary import SummaryClassifier, SummaryConv2d, SummaryHead, SummaryLayer, SummaryLinear

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
    "Paths",
    "SoftGate",
    "SummaryClassifier",
    "SummaryConv2d",
    "SummaryHead",
    "SummaryLayer",
    "SummaryLinear",
    "SummaryLoss",
    "constrain",
    "copy_gates",
    "fix_gates",
    "head_from_reference",
    "orthogonality_penalty",
    "permute_gates",
    "retract_",
    "to_dgn",
]
