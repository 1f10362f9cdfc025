"""Tests of the CUDA C++ kernels on the CPU. INTERP_NN_EMULATOR_TESTS=1 asks for them; they compile for a minute."""

import os

import pytest

pytest.register_assert_rewrite("engine_contract")
if os.environ.get("INTERP_NN_EMULATOR_TESTS") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def emulated():
    import emulator_build

    return emulator_build.load()
