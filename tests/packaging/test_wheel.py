"""An installed package, with the CUDA library or without: needs nothing but PyTorch, NumPy and pytest, and no checkout."""

import functools
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import interp_nn
from interp_nn import engines, linalg, ops
from interp_nn import functional as F
from interp_nn.engines import devices, select
from interp_nn.engines.cuda import compiled_library, fatbin

LIBRARY = Path(interp_nn.__file__).parent / "_C.abi3.so"
with_library = pytest.mark.skipif(not LIBRARY.exists(), reason="installed without the CUDA library")


@functools.cache
def main():
    """Return the output of `python -m interp_nn` where the environment names an engine."""
    environment = {**os.environ, "INTERP_NN_ENGINE": "eager"}
    command = [sys.executable, "-m", "interp_nn"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_each_part_works():
    x, b = torch.randn(6, 8), torch.randn(8, 4, requires_grad=True)
    target = torch.randint(4, (6,))
    for out in (F.summary(x, b), *F.summary_pair(x, b), F.summary_cross_entropy(x, b, target)):
        assert out.isfinite().all()
    layer = interp_nn.nn.SummaryLinear(8, 4)
    layer(x).sum().backward()
    assert layer.b.grad.isfinite().all()
    assert linalg.gram(b).shape == (4, 4)
    assert all(part.__doc__ for part in (devices, select, engines, ops))


def test_main_prints_the_version_and_every_engine():
    printed = main()
    assert f"interp_nn {interp_nn.__version__}\n" in printed
    for name in engines.availability():
        assert re.search(rf"^engine +{name}: \S", printed, re.MULTILINE)
    assert "\nrequested eager (INTERP_NN_ENGINE" in printed


def test_sources_are_there_to_compile():
    folders = [folder for folder in (LIBRARY.parent / "csrc", LIBRARY.parents[1] / "csrc") if folder.is_dir()]
    assert list(folders[0].glob("*.cu")) and list(folders[0].glob("*.h"))


@pytest.mark.skipif(LIBRARY.exists(), reason="installed with the CUDA library")
def test_without_the_library_main_says_how_to_get_it():
    assert re.search(r"^library +none: .*without the CUDA library.*no-build-isolation", main(), re.MULTILINE)
    assert "without the CUDA library" in compiled_library.load()


@with_library
def test_the_library_loads():
    assert compiled_library.load() is None
    built, served, streams = compiled_library.versions()
    assert built >= 12080 and served >= 0
    assert streams == (torch.version.cuda is not None)
    assert re.search(
        rf"^library +{re.escape(str(LIBRARY))}, CUDA {compiled_library.dotted(built)}, for \d", main(), re.MULTILINE
    )
    assert fatbin.archs(LIBRARY.read_bytes())


@with_library
def test_private_operators_have_cuda_kernels():
    compiled_library.load()
    importlib.import_module("interp_nn.engines.cuda.engine")  # which has their schemas
    private = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("interp_nn::cuda_")}
    assert {f"interp_nn::cuda_{name}" for name in ("forward", "backward", "loss", "scale")} <= private
    for name in private - {"interp_nn::cuda_versions"}:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


def private_calls(device, dtype, transposed):
    """Each private operator with arguments that it could be called with, on a device; b as a layer has it, or row-major."""

    def made(*shape, dtype=dtype):
        return torch.zeros(shape, dtype=dtype, device=device)

    x, b = made(9, 16), made(5, 16).mT if transposed else made(16, 5)
    p, g, a, c = made(9, 5), made(5, 5), made(3, 5), made(3)
    target, counter = made(9, dtype=torch.int64), made(1, dtype=torch.int32)
    loss, layout = (1.0, 1.0, 1.0, -100, 1), (transposed, False)
    q = made(3, dtype=torch.float32), made(dtype=torch.float32)  # coefficients and scale of a polynomial
    return {
        "forward": (x, b, c.new_zeros(5), None, None, True, False),
        "forward of a polynomial": (x, b, c.new_zeros(5), *q, True, False),
        "backward": (None, p, x, b, None, g, None, None, None, counter, False, True, True, True, False, *layout),
        "backward of a polynomial": (None, p, x, b, None, g, g, *q, counter, False, True, True, True, True, *layout),
        "loss": (x, b, a, c, None, None, target, None, counter, *loss, True, True, True, True, False, *layout),
        "loss of a polynomial": (x, b, a, c, *q, target, None, counter, *loss, True, True, True, True, True, *layout),
        "scale": (made(dtype=torch.float32), [x, p]),
    }


def called(name):
    return getattr(torch.ops.interp_nn, f"cuda_{name.split()[0]}").default


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_private_operators_have_fake_kernels(device, dtype, transposed):
    importlib.import_module("interp_nn.engines.cuda.engine")

    with FakeTensorMode():  # needs no GPU
        for name, arguments in private_calls(device, dtype, transposed).items():
            results = called(name)(*arguments)
            if name == "scale":
                assert results is None
                continue
            assert all(r.device.type == device for r in results)
            x, b = arguments[2:4] if "backward" in name else arguments[:2]
            polynomial = "polynomial" in name
            if "forward" in name:
                wanted = [(9, 5), (5, 5), (9, 5), (5, 5)][: 4 if polynomial else 3]
                assert [tuple(r.shape) for r in results] == wanted
                continue
            if polynomial:
                assert (results[-1].shape, results[-1].dtype) == ((3,), torch.float32)
            dx, db = results[1:3] if "loss" in name else results[:2]
            assert dx.shape == x.shape and (db.shape, db.stride()) == (b.shape, b.stride()) and db.dtype == dtype


@with_library
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_of_the_private_operators(dtype):
    assert engines.unsupported_reason("cuda") is None
    for name, arguments in private_calls("cuda", dtype, True).items():
        torch.library.opcheck(called(name), arguments)


@with_library
def test_opcheck_of_the_public_operators_beside_the_library():
    assert compiled_library.load() is None
    x, b = torch.randn(9, 16), torch.randn(16, 5)
    torch.library.opcheck(torch.ops.interp_nn.summary.default, (x, b, None, "eager:(Xb)G"))
    torch.library.opcheck(torch.ops.interp_nn.summary_pair.default, (x, b, "eager:(Xb)G:saves"))


@with_library
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_asked_for_without_a_gpu_the_engine_says_why_not():
    with pytest.raises(RuntimeError, match=r"the cuda engine is off: (PyTorch is built without CUDA|no CUDA device)"):
        interp_nn.use_engine("cuda")
