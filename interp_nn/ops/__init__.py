"""The operators PyTorch knows: schemas, fake kernels, autocast rules and gradients, over whichever engine the plan names."""
