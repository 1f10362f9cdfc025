"""What nvcc makes of csrc, where nvcc is: no GPU is needed."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOLKIT = runpy.run_path(str(ROOT / "setup.py"))["find_toolkit"]()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(TOOLKIT is None, reason="needs nvcc")]
# For 7.5; head_loss, with the same barrier, begins at 8.0.
WITH_A_BARRIER = ["pair_backward", "summary_backward", "pair_loss"]


@pytest.fixture(scope="module", params=["forward", *WITH_A_BARRIER, "head_loss"])
def compiled(request, tmp_path_factory):
    """A kernel's name, and its PTX for compute capability 7.5."""
    ptx = tmp_path_factory.mktemp("ptx") / "kernel.ptx"
    source = ROOT / f"csrc/{request.param}.cu"
    command = [TOOLKIT / "bin/nvcc", "-O3", "-std=c++17", "-arch=compute_75", "-ptx", source, "-o", ptx]
    subprocess.run(command, check=True, capture_output=True)
    return request.param, ptx.read_text()


def test_code_for_other_gpus_traps(compiled):
    """A newer GPU that compiles old PTX would find the kernels that it chooses empty, and its results unwritten."""
    found = dict(re.findall(r"^\.visible \.entry (\w+)\((.*?)^}", compiled[1], re.MULTILINE | re.DOTALL))
    lacking = {name for name in found if "ProductsF32" not in name}
    assert lacking and all("trap;" in found[name] for name in lacking)
    assert all("trap;" not in found[name] for name in found.keys() - lacking)


def test_the_barrier_orders_memory(compiled):
    """Arrival releases and the wait acquires, for the whole GPU, and no load uses a cache that may be stale."""
    kernel, ptx = compiled
    ordered = ["atom.add.acq_rel.gpu.global.u32", "ld.acquire.gpu.global.u32"]
    assert [text in ptx for text in ordered] == [kernel in WITH_A_BARRIER] * 2
    assert not re.search(r"\bld\.global(\.\w+)*\.nc\b", ptx)
