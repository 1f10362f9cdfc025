"""Layers around the summary Y = X b (bᵀb): drop-in replacements, the reference network's head, and its loss."""

from interp_nn.nn.convert import head_from_reference
from interp_nn.nn.loss import SummaryLoss
from interp_nn.nn.summary import SummaryClassifier, SummaryConv2d, SummaryHead, SummaryLayer, SummaryLinear

__all__ = [
    "SummaryClassifier",
    "SummaryConv2d",
    "SummaryHead",
    "SummaryLayer",
    "SummaryLinear",
    "SummaryLoss",
    "head_from_reference",
]
