import struct

import pytest


@pytest.fixture(scope="session")
def idx():
    """The bytes of an idx file that holds an array of bytes."""

    def written(array):
        return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()

    return written
