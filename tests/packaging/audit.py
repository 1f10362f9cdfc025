"""Whether a wheel with the CUDA library may be published: `python tests/packaging/audit.py dist/*.whl`.

Needs binutils, and the headers of an installed PyTorch, which say since when each function of its stable ABI is there.
"""

import re
import runpy
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
FATBIN = runpy.run_path(str(ROOT / "interp_nn/engines/cuda/fatbin.py"))
LIBRARY = "interp_nn/_C.abi3.so"
MOST_BYTES = 5_000_000  # five kernels, three families of operands, up to three widths, five GPUs and a PTX
TAG = re.compile(rf"-{SETUP['OLDEST_PYTHON']}-abi3-manylinux_\d+_\d+_(x86_64|aarch64)\.whl$")
NEEDED = re.compile(r"lib(c10|torch|torch_cpu)\.so|(lib(c|dl|gcc_s|m|pthread|rt|stdc\+\+)|ld-linux[\w-]*)\.so\.\d+")
CPLUSPLUS = re.compile(r"_Z\w*?N[KRVO]*(3c10|2at|5torch)\d")  # a mangled name of PyTorch's unstable C++
STABLE = re.compile(r"(aoti_torch|torch)_\w+")


def audit(wheel: Path, headers: Path) -> Iterator[str]:
    """Prints what the wheel holds; each of what comes out is a sentence on why it may not be published."""
    if not TAG.search(wheel.name):
        yield f"{wheel.name} is not tagged {SETUP['OLDEST_PYTHON']}-abi3-manylinux_*"
    size = wheel.stat().st_size
    print(f"size     {size} bytes")
    if size > MOST_BYTES:
        yield f"{wheel.name} has {size} bytes, more than {MOST_BYTES}"
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        if LIBRARY not in archive.namelist():
            yield f"{wheel.name} has no {LIBRARY}"
            return
        library = archive.extract(LIBRARY, folder)
        yield from wrong_archs(FATBIN["archs"](Path(library).read_bytes()))
        yield from wrong_needed(_run("readelf", "--dynamic", "--wide", library))
        yield from wrong_symbols(_run("nm", "--dynamic", library), stable_since(headers))


def wrong_archs(archs: str) -> Iterator[str]:
    print(f"archs    {archs}")
    if archs != SETUP["ARCHS"]:
        yield f"it is compiled for {archs or 'no GPU'}, a release for {SETUP['ARCHS']}"


def wrong_needed(dynamic: str) -> Iterator[str]:
    """Of the libraries that the loader would load with it, by readelf."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    print(f"needs    {' '.join(needed)}")
    for name in needed:
        if not NEEDED.fullmatch(name):
            yield f"it needs {name}, which not every machine with PyTorch has"


def wrong_symbols(listing: str, since: dict[str, int]) -> Iterator[str]:
    """Of the dynamic symbols, by nm; `since` has the functions of the stable ABI."""
    oldest = 0
    for kind, symbol in re.findall(r"^\s*(?:[0-9a-f]+ )?(\w) (\S+)$", listing, re.MULTILINE):
        if CPLUSPLUS.match(symbol):
            yield f"{symbol} is C++ of PyTorch, not of its stable ABI"
        elif kind == "U" and STABLE.fullmatch(symbol):
            if symbol not in since:
                yield f"{symbol} is not in the headers of PyTorch's stable ABI"
            else:
                oldest = max(oldest, since[symbol])
        elif kind == "U" and "@" not in symbol and not re.match(r"_ZN?[KRVO]*St", symbol):
            yield f"{symbol} is of no library that it may need"
    print(f"torch    2.{oldest} or newer")
    if oldest > SETUP["OLDEST_TORCH"][1]:
        newer = sorted(symbol for symbol in set(listing.split()) if since.get(symbol, 0) > SETUP["OLDEST_TORCH"][1])
        yield f"{', '.join(newer)} came with PyTorch 2.{oldest}; the wheel is for 2.{SETUP['OLDEST_TORCH'][1]} and newer"


def stable_since(headers: Path) -> dict[str, int]:
    """Functions of the stable ABI and the minor version of PyTorch 2 that brought them; 10, also for what is older."""
    since: dict[str, int] = {}
    for header in ("csrc/inductor/aoti_torch/c/shim.h", "csrc/stable/c/shim.h"):
        minors = [10]  # of the open conditions
        for line in (headers / header).read_text(encoding="utf-8").splitlines():
            line = line.partition("//")[0]
            if line.startswith("#if"):
                guard = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(\d+)", line)
                minors.append(max(minors[-1], int(guard[1]) if guard else 0))
            elif line.startswith("#endif"):
                minors.pop()
            for symbol in re.findall(r"\b((?:aoti_torch|torch)_\w+)\(", line):
                since.setdefault(symbol, minors[-1])
    return since


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    import torch

    complaints = list(audit(Path(sys.argv[1]), Path(torch.__file__).parent / "include" / "torch"))
    sys.exit("\n".join(complaints) or None)
