"""Builds of csrc under the emulator: all launchers as a Python module, and libraries of single kernels that may be patched.

The module contains csrc's binding. When imported, it registers the private operators for tensors on the CPU.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # as in setup.py


def load():
    """Build the module with ninja and import it."""
    from torch.utils import cpp_extension

    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja lives there
    return cpp_extension.load(
        name="interp_nn_emulated",
        sources=[
            str(CSRC / "binding.cpp"),
            *(str(path) for path in sorted(HERE.glob("*.cpp")) if path.name != "single.cpp"),
        ],
        extra_include_paths=[str(CSRC), str(HERE)],
        extra_cflags=["-std=c++17", "-Wall", "-Wextra", "-Werror", "-O2", "-DINTERP_NN_EMULATED", STABLE_ABI],
        is_python_module=True,
    )


def sanitizer_runtime():
    """Return the path of libasan, or None."""
    found = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return found if os.path.isabs(found) else None


def build_mutant(folder, name, patches):
    """Build single.cpp with (file, text, replacement) patches applied to a copy of csrc; each text must occur once.

    With INTERP_NN_EMULATOR_SANITIZE=1 the library uses AddressSanitizer, whose runtime must be loaded before Python.
    """
    source = folder / name
    shutil.copytree(CSRC, source)
    for file, text, replacement in patches:
        path = source / file
        content = path.read_text()
        assert content.count(text) == 1, f"{name}: the text to be patched occurs {content.count(text)} times in {file}"
        path.write_text(content.replace(text, replacement))
    library = source / "single.so"
    # Without unique symbols, or all mutants in one process would share the emulator's state.
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fno-gnu-unique", f"-I{source}", f"-I{HERE}"]
    if os.environ.get("INTERP_NN_EMULATOR_SANITIZE") == "1":
        flags += ["-g", "-fsanitize=address"]
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}  # not for the compiler
    subprocess.run(["g++", *flags, str(HERE / "single.cpp"), "-o", str(library)], env=environment, check=True)
    return ctypes.CDLL(str(library))
