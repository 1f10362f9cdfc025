"""PyTorch's checks of modules, in a process of their own."""

from pathlib import Path

import pytest
from processes import python

CHECKS = Path(__file__).with_name("module_checks.py")


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_pytorchs_checks_of_modules_pass(which):
    """Our layers pass them; in the slow tier PyTorch's own do too."""
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", which, str(CHECKS))
    lines = done.stdout.splitlines()
    if done.returncode == 5:  # nothing to run
        pytest.skip(next((line for line in lines if line.startswith("SKIPPED")), done.stdout))
    assert done.returncode == 0, done.stdout + done.stderr
    print(*(line for line in lines if line.startswith("SKIPPED")), lines[-1], sep="\n")
