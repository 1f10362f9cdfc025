"""What nvcc makes of csrc, where nvcc is: no GPU is needed."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOLKIT = runpy.run_path(str(ROOT / "setup.py"))["find_toolkit"]()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(TOOLKIT is None, reason="needs nvcc")]


def entries(kernel, arch, folder):
    """Return the PTX of each instance of a kernel, by its mangled name."""
    ptx = folder / f"{kernel}.ptx"
    command = [TOOLKIT / "bin/nvcc", "-O3", "-std=c++17", f"-arch=compute_{arch}", "-ptx", ROOT / f"csrc/{kernel}.cu"]
    subprocess.run([*command, "-o", ptx], check=True, capture_output=True)
    return dict(re.findall(r"^\.visible \.entry (\w+)\((.*?)^}", ptx.read_text(), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("kernel", ["forward", "pair_backward", "summary_backward", "pair_loss", "head_loss"])
def test_code_for_other_gpus_traps(kernel, tmp_path):
    """A newer GPU that compiles old PTX would find the kernels that it chooses empty, and its results unwritten."""
    found = entries(kernel, 75, tmp_path)
    lacking = {name for name in found if "ProductsF32" not in name}
    assert lacking and all("trap;" in found[name] for name in lacking)
    assert all("trap;" not in found[name] for name in found.keys() - lacking)
