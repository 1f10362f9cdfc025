"""interp_nn: interpretable linear-form layers, Y = X b (bᵀb), that train as fast as nn.Linear."""

from interp_nn import convert, functional, nn
from interp_nn.engines.problem import Plan
from interp_nn.engines.select import plan, use_engine
from interp_nn.version import __version__

__all__ = ["Plan", "__version__", "convert", "functional", "nn", "plan", "use_engine"]
