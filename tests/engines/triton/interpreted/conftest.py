"""Kernels run on Triton's interpreter here; a process that compiles kernels cannot, and leaves this folder out."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session", autouse=True)
def _interpreter():
    import interpreter

    interpreter.install()
