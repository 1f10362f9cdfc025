"""Every test starts from the same seed, on one thread, and with the engine that the library itself chooses."""

import logging
import os

import hypothesis
import pytest
import torch

import interp_nn
from interp_nn.engines.problem import plan_to_text

# Problems as small as the tests' lose more to waking threads than they gain; the variable is for the processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# pytest attaches its handlers, six times a test, to each logger that does not propagate: PyTorch has fifty of them.
for logger in logging.root.manager.loggerDict.values():
    if isinstance(logger, logging.Logger):
        logger.propagate = True

hypothesis.settings.register_profile("interp_nn", derandomize=True, database=None, deadline=None, max_examples=40)
hypothesis.settings.load_profile("interp_nn")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Processes for `-n auto`: one a core, at most 8; on a single core none beside this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8) if cores > 1 else 0


def pytest_collectstart():
    """Seed the tensors that a module draws while it is imported, such as its parameters of tests."""
    torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _reproducible():
    # torch.manual_seed takes a millisecond: for every kind of device that is not there it records the stack.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    yield
    interp_nn.use_engine("auto")


def pytest_make_parametrize_id(config, val, argname):
    """A plan in the name of a test."""
    return plan_to_text(val) + "*" * val.autograd if isinstance(val, interp_nn.Plan) else None
