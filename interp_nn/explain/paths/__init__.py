"""The neural path kernel, exact and sampled, kernel machines on it, and the neural tangent kernel."""
