"""Benchmarks, the papers' tables, and the main job of interp_nn: `python -m benchmarks`."""

import os

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # PyTorch's profiler, which counts memory, else prints when it starts and stops
