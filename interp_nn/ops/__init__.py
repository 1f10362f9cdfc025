"""Operators registered with PyTorch: schemas, fake kernels, autocast rules and gradients. The plan names the engine."""
