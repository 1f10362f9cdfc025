"""Two processes give what one gives: data-parallel, sharded and tensor-parallel training, and the operator on DTensors.

The checks are in `ranks.py`. All run in one pair of processes, as starting one takes longer than a check.
"""

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)
import ranks


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each process said of a check; empty where it passed."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(ranks.fork, (folder,), nprocs=1)
    return lambda name: [(folder / f"{name}.{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize("check", ranks.CHECKS)
def test_on_two_processes(said, check):
    for rank, text in enumerate(said(check)):
        assert not text, f"process {rank}: {text}"
