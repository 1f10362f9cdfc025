"""Linear layers whose weight is b (bᵀb), kernels for them, and the exact affine map of a ReLU network at each input.

With few rows the layers take longer than nn.Linear: README has the times. The GPU kernels have not yet run on a GPU.
"""

from interp_nn import convert, functional, nn
from interp_nn.engines.problem import Plan
from interp_nn.engines.select import plan, use_engine
from interp_nn.engines.verify import verify
from interp_nn.ops import flops as _flops  # noqa: F401 - registers formulas
from interp_nn.version import __version__

__all__ = ["Plan", "__version__", "convert", "functional", "nn", "plan", "use_engine", "verify"]
