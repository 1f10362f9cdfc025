"""What each kernel takes on each GPU, from the log of a build with INTERP_NN_PTXAS=1.

    INTERP_NN_PTXAS=1 make wheel 2>&1 | tee build.log
    python tests/packaging/resources.py build.log ['^forward_kernel']

prints a table, and fails if the log has no kernels or one of a name that the expression finds spills registers.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Kernel(NamedTuple):
    """Registers are a thread's, spills the bytes it stores and loads, shared the bytes of a block known to the compiler."""

    arch: int
    name: str
    registers: int
    spills: int
    shared: int


REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)a?'\n"
    r"(?:(?!.*Compiling entry).*\n)*?"
    r".*Function properties for (?P=name)\n"
    r".* (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"(?:(?!.*Compiling entry).*\n)*?"
    r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
)


def kernels(log: str) -> list[Kernel]:
    """Every kernel in the log, by name and architecture."""
    reports = list(REPORT.finditer(log))
    names = demangled([report["name"] for report in reports])
    return sorted(
        Kernel(
            int(report["arch"]),
            name,
            int(report["registers"]),
            int(report["stores"]) + int(report["loads"]),
            sum(map(int, re.findall(r"(\d+) bytes smem", report["rest"]))),
        )
        for report, name in zip(reports, names, strict=True)
    )


def demangled(names: list[str]) -> list[str]:
    """Names as in the source, without namespace, result and parameters; as they are where c++filt is missing."""
    if not names or shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |interp_nn::|\([^()]*\)$", "", line) for line in text.splitlines()]


def main(log: str, unspilled: str | None = None) -> None:
    found = kernels(Path(log).read_text(encoding="utf-8", errors="replace"))
    if not found:
        sys.exit(f"{log} reports no kernels: was it built with INTERP_NN_PTXAS=1, and from scratch?")
    print("  sm  registers  spills  shared  kernel")
    for kernel in found:
        print(f"{kernel.arch:4d} {kernel.registers:10d} {kernel.spills:7d} {kernel.shared:7d}  {kernel.name}")
    if unspilled is not None:
        chosen = [kernel for kernel in found if re.search(unspilled, kernel.name)]
        spilling = sorted({f"{kernel.name} on sm_{kernel.arch}" for kernel in chosen if kernel.spills})
        if spilling or not chosen:
            sys.exit(f"must not spill: {', '.join(spilling)}" if spilling else f"no kernel is called {unspilled}")


if __name__ == "__main__":
    main(*sys.argv[1:])
