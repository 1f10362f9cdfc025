"""Tests of the kernels on Triton's interpreter; a process that compiles kernels cannot run them and leaves them out."""

import os

import pytest

pytest.register_assert_rewrite("engine_contract")
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session", autouse=True)
def _interpreter():
    import interpreter

    interpreter.install()
