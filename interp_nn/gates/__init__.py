"""A network's gates, shared by `nn` and `explain`: activation patterns, gate records and traced graphs."""

from interp_nn.gates.patterns import ActivationPatterns, PatternGroups
from interp_nn.gates.record import GateRecord, GateSite

__all__ = ["ActivationPatterns", "GateRecord", "GateSite", "PatternGroups"]
