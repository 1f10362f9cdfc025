"""Build of interp_nn: pyproject.toml has the static metadata, this file builds the CUDA library where that is possible.

    INTERP_NN_BUILD_CUDA  auto (default): build the library if possible; 1: build it or fail with the reason; 0: leave it out
    INTERP_NN_CUDA_ARCHS  compute capabilities, "90" or "80;90+PTX"; default: those of a release
    INTERP_NN_PTXAS       1: ptxas reports the registers and spills of each kernel (tests/packaging/resources.py)

The library uses PyTorch's stable ABI and contains CUDA's runtime: one wheel serves every newer Python and PyTorch. PyTorch is
not a build requirement, because pip would download a second one. Build with --no-build-isolation.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import Any
from zlib import crc32

from setuptools import find_packages, setup

ARCHS = "75;80;86;89;90+PTX;100;120+PTX"
OLDEST_NVCC = (12, 8)  # the first with the archs above and --compress-mode
OLDEST_TORCH = (2, 10)
STABLE_ABI = "0x020a000000000000"  # of the oldest PyTorch
OLDEST_PYTHON = "cp310"


def parse_archs(text: str) -> list[tuple[int, bool]]:
    """Return pairs of a compute capability, 10 major + minor, and whether its PTX is included for newer GPUs."""
    archs = []
    for entry in filter(None, map(str.strip, text.split(";"))):
        if not re.fullmatch(r"\d{2,3}(\+PTX)?", entry):
            sys.exit(f"interp_nn: INTERP_NN_CUDA_ARCHS: got {entry!r}, want a list like 80;90+PTX")
        archs.append((int(entry.removesuffix("+PTX")), entry.endswith("+PTX")))
    if not archs:
        sys.exit(f"interp_nn: INTERP_NN_CUDA_ARCHS: got an empty list, want one like {ARCHS}")
    return archs


def gencode(archs: list[tuple[int, bool]]) -> list[str]:
    """Return nvcc's flags for the archs."""
    codes = [(arch, code) for arch, ptx in archs for code in (("sm", "compute") if ptx else ("sm",))]
    return [f"-gencode=arch=compute_{arch},code={code}_{arch}" for arch, code in codes]


def find_toolkit() -> Path | None:
    """Return the folder of the CUDA toolkit: CUDA_HOME; if it is not set, nvcc's on PATH, or /usr/local/cuda."""
    homes = [Path("/usr/local/cuda")]
    if "CUDA_HOME" in os.environ:
        homes = [Path(os.environ["CUDA_HOME"])]
    elif on_path := shutil.which("nvcc"):
        homes.insert(0, Path(on_path).resolve().parents[1])
    needed = ("bin/nvcc", "include/cuda_runtime.h")  # an nvcc on PATH may be a wrapper outside the toolkit
    return next((home for home in homes if all((home / file).exists() for file in needed)), None)


def unsupported_reason(toolkit: Path | None, archs: list[tuple[int, bool]]) -> str | None:
    """Return why the CUDA library cannot be built here, or None."""
    if sys.platform != "linux":
        return f"it is for Linux, and this is {sys.platform}"
    if toolkit is None:
        return f"nvcc and its headers are not in {os.environ.get('CUDA_HOME', 'PATH, /usr/local/cuda')}; set CUDA_HOME"
    try:
        import torch
    except ImportError:
        return "PyTorch cannot be imported by the build (install it first, then use pip's --no-build-isolation)"
    if _version(torch.__version__) < OLDEST_TORCH:
        return f"PyTorch {torch.__version__} is older than {_text(OLDEST_TORCH)}"
    nvcc = _version(_nvcc(toolkit, "--version").partition("release ")[2])
    if nvcc < OLDEST_NVCC:
        return f"the nvcc in {toolkit} is of CUDA {_text(nvcc)}, older than {_text(OLDEST_NVCC)}"
    # The library would need a driver of nvcc's major version. PyTorch refuses to build with another major version than its own.
    if torch.version.cuda is not None and nvcc[0] != _version(torch.version.cuda)[0]:
        return (
            f"the nvcc in {toolkit} is of CUDA {_text(nvcc)} and PyTorch of CUDA {torch.version.cuda}, which need "
            f"drivers of different major versions (set CUDA_HOME to a toolkit of CUDA {_version(torch.version.cuda)[0]})"
        )
    known = _nvcc(toolkit, "--list-gpu-code").split()
    unknown = [str(arch) for arch, _ in archs if f"sm_{arch}" not in known]
    if unknown:
        return f"nvcc {_text(nvcc)} cannot compile for {' '.join(unknown)} of INTERP_NN_CUDA_ARCHS; it knows {' '.join(known)}"
    return None


def _nvcc(toolkit: Path, flag: str) -> str:
    return subprocess.run([str(toolkit / "bin/nvcc"), flag], capture_output=True, text=True, check=True).stdout


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def extension(toolkit: Path, archs: list[tuple[int, bool]]) -> dict[str, Any]:
    """Return the arguments of setup() that build interp_nn/_C.abi3.so."""
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(toolkit)  # a PyTorch without CUDA does not look for it
    headers = sorted(glob("csrc/*.h"))
    flags = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden", "--compress-mode=size", *gencode(archs)]
    # With a PyTorch without CUDA, Ninja does not track the headers of .cu files, but it rebuilds when the command changes.
    flags.append(f"-DHEADERS={crc32(b''.join(Path(header).read_bytes() for header in headers))}")
    if os.environ.get("INTERP_NN_PTXAS") == "1":
        flags.append("-Xptxas=-v")
    module = cpp_extension.CppExtension(  # CUDAExtension would link PyTorch's CUDA libraries
        "interp_nn._C",
        sorted([*glob("csrc/*.cu"), *glob("csrc/*.cpp")]),
        depends=headers,
        include_dirs=[str(toolkit / "include")],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        library_dirs=[str(toolkit / "lib64")],
        py_limited_api=True,
        extra_compile_args={"cxx": ["-O2", "-fvisibility=hidden"], "nvcc": flags},
        extra_link_args=["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL", "-s"],
    )
    tag = {"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}}
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}, "options": tag}


def cuda_library() -> dict[str, Any]:
    """Return the arguments of setup() that build the CUDA library; none where it is left out."""
    wanted = os.environ.get("INTERP_NN_BUILD_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        sys.exit(f"interp_nn: INTERP_NN_BUILD_CUDA: got {wanted!r}, want auto, 1 or 0")
    if wanted == "0":
        return {}
    archs = parse_archs(os.environ.get("INTERP_NN_CUDA_ARCHS", ARCHS))
    toolkit = find_toolkit()
    reason = unsupported_reason(toolkit, archs)
    if reason is not None:
        if wanted == "1":
            sys.exit(f"interp_nn: the CUDA library cannot be built: {reason}")
        print(f"interp_nn: building without the CUDA library: {reason}", file=sys.stderr)
        return {}
    return extension(toolkit, archs)


if __name__ == "__main__":
    setup(
        # The sources are installed for INTERP_NN_JIT=1 (interp_nn/engines/cuda/compiled_library.py).
        packages=[*find_packages(include=["interp_nn*"]), "interp_nn.csrc"],
        package_dir={"interp_nn.csrc": "csrc"},
        **cuda_library(),
    )
