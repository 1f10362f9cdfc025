import struct

import pytest

from benchmarks.gpu.log import Log, read
from benchmarks.records import rows


@pytest.fixture(scope="session")
def idx():
    """The bytes of an idx file that holds an array of bytes."""

    def written(array):
        return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()

    return written


@pytest.fixture(scope="session")
def shared():
    return rows.common()


@pytest.fixture
def log(tmp_path, shared):
    """Of a part of the GPU job."""
    return Log(tmp_path / "log.jsonl", "part", 60.0, shared)


@pytest.fixture
def lines(log):
    return lambda: read(log.path)
