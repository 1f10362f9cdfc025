"""Every test starts from the same seed, on one thread, and with the engine that the library itself chooses."""

import logging

import hypothesis
import pytest
import torch

import interp_nn
from interp_nn.engines.problem import plan_to_text

torch.set_num_threads(1)
# pytest attaches its handlers, six times a test, to each logger that does not propagate: PyTorch has fifty of them.
for logger in logging.root.manager.loggerDict.values():
    if isinstance(logger, logging.Logger):
        logger.propagate = True

hypothesis.settings.register_profile("interp_nn", derandomize=True, database=None, deadline=None, max_examples=40)
hypothesis.settings.load_profile("interp_nn")


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
