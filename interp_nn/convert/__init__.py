"""Convert whole models: plain layers to summary layers and back, and checkpoints of the reference network to layers."""

from interp_nn.convert.checkpoints import head_from_reference
from interp_nn.convert.models import Converted, Left, Report, fold, summarize

__all__ = ["Converted", "Left", "Report", "fold", "head_from_reference", "summarize"]
