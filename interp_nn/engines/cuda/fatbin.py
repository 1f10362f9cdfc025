"""List the GPUs that a compiled library has code for, from its file."""

from __future__ import annotations

import struct

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")  # magic, version, size of this header, size of the entries after it
_ENTRY = struct.Struct("<HHIQ")  # kind, version, size of this header, size of the code, which may be compressed
_ARCH_AT = 28  # in the header of an entry
_PTX, _SASS = 1, 2


def archs(blob: bytes) -> str:
    """Return the compute capabilities of all machine code and PTX in the library, as setup.py spells them: "80;90+PTX"."""
    sass, ptx = codes(blob)
    return ";".join(f"{arch}+PTX" if arch in ptx else f"{arch}" for arch in sorted(sass | ptx))


def serves(sass: set[int], ptx: set[int], capability: tuple[int, int]) -> bool:
    """Return True if a GPU can run the library: by machine code of its generation that is not newer, or by PTX.

    From 8.0 on a GPU uses other kernels, and older PTX lacks them.
    """
    gpu = 10 * capability[0] + capability[1]
    by_sass = any(arch // 10 == capability[0] and arch <= gpu for arch in sass)
    return by_sass or any(arch <= gpu and (arch >= 80 or gpu < 80) for arch in ptx)


def codes(blob: bytes) -> tuple[set[int], set[int]]:
    """Return the compute capabilities of the library's machine code and of its PTX, as 10 major + minor."""
    found: dict[int, set[int]] = {_PTX: set(), _SASS: set()}
    at = -1
    while 0 <= (at := blob.find(_MAGIC, at + 1)) <= len(blob) - _HEADER.size:
        _, version, header, size = _HEADER.unpack_from(blob, at)
        entry, end = at + header, at + header + size
        if (version, header) != (1, _HEADER.size) or end > len(blob):
            continue
        while entry + _ARCH_AT < end:
            kind, _, header, size = _ENTRY.unpack_from(blob, entry)
            if kind in found:
                found[kind].update(struct.unpack_from("<I", blob, entry + _ARCH_AT))
            entry += max(header + size, _ENTRY.size)
    return found[_SASS], found[_PTX]
