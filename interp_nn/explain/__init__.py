"""Exact explanations of networks of linear maps and gates: activation patterns and the regions that they stand for.

Where every unit of a ReLU network is either on or off, the network is an affine map. The units' states are its activation
pattern, and the inputs that share one are a convex region with flat sides.
"""

from interp_nn.explain.patterns import ActivationPatterns, PatternGroups
from interp_nn.explain.regions import Region

__all__ = ["ActivationPatterns", "PatternGroups", "Region"]
