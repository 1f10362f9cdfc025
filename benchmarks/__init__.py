"""The demo, the timings and the experiments of interp_nn: `python -m benchmarks`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, which counts memory, otherwise prints

from benchmarks.records.export import to_pandas
from benchmarks.timing.custom import provider

__all__ = ["provider", "to_pandas"]
