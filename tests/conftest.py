"""Every test starts from the same seed and from dispatch's own choice of engine."""

import hypothesis
import pytest
import torch

import interp_nn
from interp_nn.engines.problem import plan_to_text

hypothesis.settings.register_profile("interp_nn", derandomize=True, database=None, deadline=None, max_examples=40)
hypothesis.settings.load_profile("interp_nn")


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    yield
    interp_nn.use_engine("auto")


@pytest.fixture(scope="module")
def one_thread():
    """Layers this small lose more to waking threads than they win from them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_make_parametrize_id(config, val, argname):
    """A plan in the name of a test."""
    return plan_to_text(val) + "*" * val.autograd if isinstance(val, interp_nn.Plan) else None
