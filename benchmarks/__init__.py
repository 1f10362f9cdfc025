"""The demo, the timings and the experiments of interp_nn: `python -m benchmarks`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, which counts memory, otherwise prints
