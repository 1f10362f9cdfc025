"""Convert whole models between plain and summary layers, and load and save their checkpoints."""

from interp_nn.convert.checkpoints import from_pretrained, head_from_reference, load_state_dict, save_pretrained
from interp_nn.convert.models import Converted, Report, Skipped, fold, summarize

__all__ = [
    "Converted",
    "Report",
    "Skipped",
    "fold",
    "from_pretrained",
    "head_from_reference",
    "load_state_dict",
    "save_pretrained",
    "summarize",
]
