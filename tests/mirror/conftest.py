"""Tests of the CUDA C++ kernels on the CPU; asked for by INTERP_NN_MIRROR_TESTS=1, since they compile for a minute."""

import os

import pytest

if os.environ.get("INTERP_NN_MIRROR_TESTS") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def mirror():
    import mirror_build

    return mirror_build.load()
