"""The compiled CUDA library: load it once, or say why it cannot be loaded.

It is `_C.abi3.so` in the package's folder, where the wheel has it or setup.py has built it. INTERP_NN_JIT=1 asks for one that is
compiled on this machine instead, from the same sources, for its GPU.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import torch

from interp_nn.engines.cuda import fatbin

_PACKAGE = Path(__file__).resolve().parents[2]
_LIBRARY = _PACKAGE / "_C.abi3.so"
_REASON = _PACKAGE / "_no_library.txt"  # where a wheel was built without the library
_OLDEST_DRIVER = {13: "driver 580"}  # that serves a major version of CUDA
# setup.py compresses the kernels with CUDA 12.8 and newer. Drivers before 550.54 cannot read that.
_COMPRESSING, _OLDEST_DRIVER_OF_COMPRESSED = 12080, 12040
_SCHEMAS = torch.library.Library("interp_nn", "FRAGMENT")
_SCHEMAS.define("cuda_versions() -> int[]")

_attempt: tuple[Path, str | None] | None = None


def load() -> str | None:
    """Load the library at the first call. Return None, or the reason why it is not loaded."""
    return _load()[1]


load._dynamo_marked_constant = True  # type: ignore[attr-defined] # see devices.spec_of


def path() -> Path:
    """Return the file of the library that `load` has loaded."""
    return _load()[0]


def versions() -> tuple[int, int, bool]:
    """Return (CUDA version of the library, newest CUDA version of the driver, streams).

    Versions are 1000 major + 10 minor, 0 without a driver. streams: this PyTorch can tell the library its CUDA streams.
    """
    built, served, streams = torch.ops.interp_nn.cuda_versions()
    return built, served, bool(streams)


versions._dynamo_marked_constant = True  # type: ignore[attr-defined] # see devices.spec_of


def driver_reason() -> str | None:
    """Return why the driver cannot run the loaded library; None if it can."""
    built, served, _ = versions()
    if served == 0:
        return "there is no CUDA driver"
    if served // 1000 >= built // 1000:
        if path() == _LIBRARY and built >= _COMPRESSING and served < _OLDEST_DRIVER_OF_COMPRESSED:
            return (
                f"the driver serves CUDA {dotted(served)} and cannot read the library's compressed kernels "
                f"(driver 550.54 or newer, or INTERP_NN_JIT=1)"
            )
        return None
    major = built // 1000
    return (
        f"the driver serves CUDA {dotted(served)} and the library needs CUDA {major} "
        f"({_OLDEST_DRIVER.get(major, 'a driver of that time')} or newer, or a library built with CUDA {served // 1000})"
    )


driver_reason._dynamo_marked_constant = True  # type: ignore[attr-defined] # see devices.spec_of


launch_failures: dict[torch.device, str] = {}  # of the engine: the error of a device, which it then leaves alone


def device_reason(capability: tuple[int, int]) -> str | None:
    """Return why the loaded library has nothing for this machine's GPUs of a compute capability; None if it has."""
    for device, error in launch_failures.items():
        if device.type == "cuda" and torch.cuda.get_device_capability(device) == capability:
            return f"a launch failed on {device}: {error}"
    reason = load()
    if reason is not None or fatbin.serves(*_codes(path()), capability):
        return reason
    sass, ptx = (" ".join(f"{arch // 10}.{arch % 10}" for arch in sorted(archs)) for archs in _codes(path()))
    has = " and ".join([f"code for {sass}"] * bool(sass) + [f"PTX of {ptx}"] * bool(ptx)) or "no code"
    return (
        f"the library has {has}, which a GPU of compute capability {capability[0]}.{capability[1]} cannot run "
        f"(build it with INTERP_NN_CUDA_ARCHS={capability[0]}{capability[1]}, or INTERP_NN_JIT=1)"
    )


device_reason._dynamo_marked_constant = True  # type: ignore[attr-defined] # see devices.spec_of


@functools.cache
def _codes(library: Path) -> tuple[set[int], set[int]]:
    return fatbin.codes(library.read_bytes())


def dotted(version: int) -> str:
    """Return CUDA's number of a version, 12080, as people write it: 12.8."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _load() -> tuple[Path, str | None]:
    global _attempt
    if _attempt is None:
        _attempt = _attempt_once()
    return _attempt


def _attempt_once() -> tuple[Path, str | None]:
    jit = os.environ.get("INTERP_NN_JIT") == "1"
    if not jit and not _LIBRARY.exists():
        return _LIBRARY, _missing_reason()
    try:
        file = _compile() if jit else _LIBRARY
        torch.ops.load_library(str(file))
    except Exception as error:  # whatever a compiler or a linker dislikes, PyTorch's own operators still compute
        return _LIBRARY, _reason(error)
    return file, None


def _missing_reason() -> str:
    if sys.platform != "linux":
        return f"the CUDA library is for Linux, and this is {sys.platform}"
    if torch.version.hip is not None:
        return "the CUDA library is for CUDA, and this PyTorch is of ROCm"
    here = "interp_nn was built without the CUDA library"
    if _REASON.exists():
        here += f": {_REASON.read_text(encoding='utf-8').strip()}"
    return f"{here} (to build it, in a copy of the source: INTERP_NN_BUILD_CUDA=1 pip install --no-build-isolation .)"


def _reason(error: Exception) -> str:
    """Return the linker's cause of an OSError, or the first lines of a failed compilation that name an error."""
    if isinstance(error, OSError):
        return str(error.__cause__ or error)
    lines = str(error).splitlines()
    mattering = [line.strip() for line in lines[1:] if "error" in line.lower() or "cannot" in line]
    return ": ".join([lines[0].split(":")[0], *mattering[:2]]) if mattering else str(error)


def _compile() -> Path:
    """Compile the library for the current device. PyTorch keeps it and compiles again when a source changes."""
    if not torch.cuda.is_available():
        raise RuntimeError("INTERP_NN_JIT=1 needs a PyTorch with CUDA and a CUDA device")
    from torch.utils import cpp_extension  # slow to import

    if cpp_extension.CUDA_HOME is None:
        raise RuntimeError("INTERP_NN_JIT=1 needs nvcc (on PATH, or CUDA_HOME set to the folder of its toolkit)")
    folder = _PACKAGE / "csrc" if (_PACKAGE / "csrc").is_dir() else _PACKAGE.parent / "csrc"  # installed; a checkout
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    built = cpp_extension.load(
        "interp_nn_cuda",
        sorted(str(file) for file in folder.iterdir() if file.suffix in (".cpp", ".cu")),
        extra_cflags=["-O2", "-DTORCH_TARGET_VERSION=0x020a000000000000"],  # as in setup.py
        extra_cuda_cflags=["-O3", "-std=c++17", "-lineinfo", f"-gencode=arch=compute_{arch},code=sm_{arch}"],
        is_python_module=False,
    )
    return Path(built)
