"""The compiled CUDA kernels: the engine that launches them, the library that holds them, and its list of GPUs."""
