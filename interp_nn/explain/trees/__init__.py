"""Trees that are read from gated networks."""
