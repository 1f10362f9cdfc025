"""Clusters of inputs that share an activation pattern, their affine maps, importance and tables."""
