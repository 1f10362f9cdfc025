"""Build of interp_nn: pyproject.toml has the static metadata, this file builds the CUDA library where that is possible.

    INTERP_NN_BUILD_CUDA  auto (default): build the library if possible; 1: build it or fail with the reason; 0: leave it out
    INTERP_NN_CUDA_ARCHS  compute capabilities, "90" or "80;90+PTX"; default: TORCH_CUDA_ARCH_LIST, or those of a release
    INTERP_NN_PTXAS       1: ptxas reports the registers and spills of each kernel (tests/packaging/resources.py)

CUDA_HOME or a list of archs asks for the library: with one of them, auto means 1. A wheel without the library has the reason
in interp_nn/_no_library.txt, because pip hides what a successful build prints. `python -m interp_nn` prints it.

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

import setuptools
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

OLDEST_SETUPTOOLS = 77  # the first that reads `license = "MIT"` in pyproject.toml; older ones print a page about it
if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"interp_nn: it needs setuptools {OLDEST_SETUPTOOLS} or newer, and {setuptools.__version__} is installed: "
        f'pip install "setuptools>={OLDEST_SETUPTOOLS}"'
    )

# Code for 8.0 runs on 8.6, 8.7 and 8.9, code for 10.0 on 10.3, code for 12.0 on 12.1; other newer GPUs compile the PTX.
ARCHS = "75;80+PTX;90;100;120"
OLDEST_NVCC = (12, 8)  # the first with the archs above and --compress-mode
OLDEST_PTX = 80  # of older PTX newer GPUs could only run the kernels for GPUs without matrix units
OLDEST_GPU = 75
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
        if archs[-1][1] and archs[-1][0] < OLDEST_PTX:
            sys.exit(
                f"interp_nn: INTERP_NN_CUDA_ARCHS: got {entry!r}, want PTX of {OLDEST_PTX} or newer: newer GPUs would run "
                f"older PTX, which has no kernels for them"
            )
    if not archs:
        sys.exit(f"interp_nn: INTERP_NN_CUDA_ARCHS: got an empty list, want one like {ARCHS}")
    return archs


def archs_of_torch(text: str) -> str:
    """Return TORCH_CUDA_ARCH_LIST, "8.0 9.0+PTX", as INTERP_NN_CUDA_ARCHS without what is older than the kernels."""
    entries = re.split(r"[;\s]+", text.strip("; "))
    for entry in entries:
        if not re.fullmatch(r"\d{1,2}\.\d[af]?(\+PTX)?", entry):
            sys.exit(
                f"interp_nn: TORCH_CUDA_ARCH_LIST: got {entry!r}, want numbers like 8.0;9.0+PTX (or set INTERP_NN_CUDA_ARCHS, "
                "which comes first)"
            )
    archs = dict.fromkeys(re.sub(r"[.af]", "", entry) for entry in entries)
    served = ";".join(arch for arch in archs if int(arch.removesuffix("+PTX")) >= OLDEST_GPU)
    if not served:
        sys.exit(f"interp_nn: TORCH_CUDA_ARCH_LIST: got {text!r}, and the kernels are for 7.5 and newer")
    return served


def gencode(archs: list[tuple[int, bool]]) -> list[str]:
    """Return nvcc's flags for the archs."""
    codes = [(arch, code) for arch, ptx in archs for code in (("sm", "compute") if ptx else ("sm",))]
    return [f"-gencode=arch=compute_{arch},code={code}_{arch}" for arch, code in codes]


def find_toolkit() -> Path | None:
    """Return the folder of the CUDA toolkit: CUDA_HOME; if it is not set, nvcc's on PATH, or /usr/local/cuda."""
    homes = [Path("/usr/local/cuda")]
    if os.environ.get("CUDA_HOME"):
        homes = [Path(os.environ["CUDA_HOME"])]
    elif on_path := shutil.which("nvcc"):
        homes.insert(0, Path(on_path).resolve().parents[1])
    # An nvcc on PATH may be a wrapper outside the toolkit.
    return next((home for home in homes if (home / "bin/nvcc").exists() and folder_of(home, *HEADERS)), None)


# Where NVIDIA's, pip's and conda's toolkits have a file.
HEADERS = "cuda_runtime.h", "include", "targets/*/include"
RUNTIME = "libcudart_static.a", "lib64", "lib", "targets/*/lib"


def folder_of(toolkit: Path, file: str, *folders: str) -> Path | None:
    """Return the first of the toolkit's folders that has a file."""
    found = (path for folder in folders for path in sorted(toolkit.glob(f"{folder}/{file}")))
    return next((path.parent for path in found), None)


def unsupported_reason(toolkit: Path | None, archs: list[tuple[int, bool]]) -> str | None:
    """Return why the CUDA library cannot be built here, or None."""
    if sys.platform != "linux":
        return f"it is for Linux, and this is {sys.platform}"
    if toolkit is None:
        home = os.environ.get("CUDA_HOME")
        where = f"CUDA_HOME, {home}" if home else "PATH or /usr/local/cuda"
        return f"bin/nvcc and include/cuda_runtime.h are not in {where}; set CUDA_HOME to the folder of a CUDA toolkit"
    if folder_of(toolkit, *RUNTIME) is None:
        return f"{toolkit} has no {RUNTIME[0]} in {', '.join(RUNTIME[1:])} (install CUDA's runtime for development)"
    try:
        import torch
    except ImportError:
        return "PyTorch cannot be imported by the build (install it first, then use pip's --no-build-isolation)"
    if _version(torch.__version__) < OLDEST_TORCH:
        return f"PyTorch {torch.__version__} is older than {_text(OLDEST_TORCH)}"
    if torch.version.hip is not None:
        return f"it is for CUDA, and PyTorch {torch.__version__} is of ROCm"
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
        return f"nvcc {_text(nvcc)} cannot compile for {' '.join(unknown)}; it knows {' '.join(known)} (set INTERP_NN_CUDA_ARCHS)"
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
        include_dirs=[str(folder_of(toolkit, *HEADERS))],
        define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
        library_dirs=[str(folder_of(toolkit, *RUNTIME))],
        py_limited_api=True,
        # Messages name source files; without their folder, builds in two folders are equal.
        extra_compile_args={
            "cxx": ["-O2", "-fvisibility=hidden", f"-ffile-prefix-map={Path.cwd()}=."],
            "nvcc": flags,
        },
        extra_link_args=["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL", "-s"],
    )
    tag = {"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}}
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}, "options": tag}


def without_library(reason: str) -> dict[str, Any]:
    """Return the arguments of setup() that store in the package why it has no CUDA library."""

    class BuildWithReason(build_py):
        def run(self) -> None:
            super().run()
            if not self.editable_mode:
                Path(self.build_lib, "interp_nn/_no_library.txt").write_text(f"{reason}\n", encoding="utf-8")

    return {"cmdclass": {"build_py": BuildWithReason}}


def cuda_library() -> dict[str, Any]:
    """Return the arguments of setup() that build the CUDA library, or leave it out."""
    wanted = os.environ.get("INTERP_NN_BUILD_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        sys.exit(f"interp_nn: INTERP_NN_BUILD_CUDA: got {wanted!r}, want auto, 1 or 0")
    if wanted == "0":
        return without_library("INTERP_NN_BUILD_CUDA=0 left it out")
    given = [name for name in ("INTERP_NN_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME") if os.environ.get(name)]
    text = os.environ.get("INTERP_NN_CUDA_ARCHS")
    if text is None:
        text = archs_of_torch(os.environ["TORCH_CUDA_ARCH_LIST"]) if os.environ.get("TORCH_CUDA_ARCH_LIST") else ARCHS
    archs = parse_archs(text)
    toolkit = find_toolkit()
    reason = unsupported_reason(toolkit, archs)
    if reason is None:
        return extension(toolkit, archs)
    if wanted == "1":
        sys.exit(f"interp_nn: the CUDA library cannot be built: {reason}")
    if given:
        sys.exit(
            f"interp_nn: {given[0]} asks for the CUDA library, which cannot be built: {reason}. INTERP_NN_BUILD_CUDA=0 "
            "builds without it"
        )
    print(f"interp_nn: building without the CUDA library: {reason}", file=sys.stderr)
    return without_library(reason)


if __name__ == "__main__":
    setup(
        # The sources are installed for INTERP_NN_JIT=1 (interp_nn/engines/cuda/compiled_library.py).
        packages=[*find_packages(include=["interp_nn*"]), "interp_nn.csrc"],
        package_dir={"interp_nn.csrc": "csrc"},
        **cuda_library(),
    )
