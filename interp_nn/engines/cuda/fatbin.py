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
    return ";".join(f"{arch}+PTX" if arch in found[_PTX] else f"{arch}" for arch in sorted(found[_SASS] | found[_PTX]))
