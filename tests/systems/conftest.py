import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Layers this small lose more to waking threads than they win from them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
