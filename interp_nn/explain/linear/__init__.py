"""The affine map of a network at each input, attribution from it, and the region where it holds."""
