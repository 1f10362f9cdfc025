import pytest


@pytest.fixture(autouse=True, scope="module")
def _on_one_thread(one_thread):
    pass
