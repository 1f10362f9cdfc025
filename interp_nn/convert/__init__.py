"""Convert whole models between plain and summary layers, and checkpoints of the reference network to a head."""

from interp_nn.convert.checkpoints import head_from_reference
from interp_nn.convert.models import Converted, Report, Skipped, fold, summarize

__all__ = ["Converted", "Report", "Skipped", "fold", "head_from_reference", "summarize"]
