"""An installed package, with the CUDA library or without: needs nothing but PyTorch, NumPy and pytest, and no checkout."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import interp_nn
from interp_nn import chips, dispatch, engines, fatbin, linalg, native, ops
from interp_nn import functional as F

LIBRARY = Path(interp_nn.__file__).parent / "_C.abi3.so"
with_library = pytest.mark.skipif(not LIBRARY.exists(), reason="installed without the CUDA library")


def main():
    return subprocess.run([sys.executable, "-m", "interp_nn"], capture_output=True, text=True, check=True).stdout


def test_each_part_works():
    x, b = torch.randn(6, 8), torch.randn(8, 4, requires_grad=True)
    target = torch.randint(4, (6,))
    for out in (F.summary(x, b), *F.summary_pair(x, b), F.summary_cross_entropy(x, b, target)):
        assert out.isfinite().all()
    layer = interp_nn.nn.SummaryLinear(8, 4)
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert linalg.gram(b).shape == (4, 4)
    assert all(part.__doc__ for part in (chips, dispatch, engines, ops))


def test_main_names_every_engine():
    printed = main()
    for name in engines.availability():
        assert re.search(rf"^engine +{name}: \S", printed, re.MULTILINE)


def test_sources_are_there_to_compile():
    folders = [folder for folder in (LIBRARY.parent / "csrc", LIBRARY.parents[1] / "csrc") if folder.is_dir()]
    assert list(folders[0].glob("*.cu")) and list(folders[0].glob("*.h"))


@pytest.mark.skipif(LIBRARY.exists(), reason="installed with the CUDA library")
def test_without_the_library_main_says_how_to_get_it():
    assert re.search(r"^library +none: .*without the CUDA library .*no-build-isolation", main(), re.MULTILINE)
    assert "without the CUDA library" in native.load()


@with_library
def test_the_library_loads():
    assert native.load() is None
    built, served, streams = native.versions()
    assert built >= 12080 and served >= 0
    assert streams == (torch.version.cuda is not None)
    assert re.search(rf"^library +{re.escape(str(LIBRARY))}, CUDA {native.dotted(built)}, for \d", main(), re.MULTILINE)
    assert fatbin.archs(LIBRARY.read_bytes())


@with_library
def test_private_operators_have_cuda_kernels():
    native.load()
    private = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("interp_nn::cuda_")}
    assert len(private) > 1
    for name in private - {"interp_nn::cuda_versions"}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


# Schemas, fake kernels and opcheck of the private operators: here.
