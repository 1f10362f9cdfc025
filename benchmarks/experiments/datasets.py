"""Images: scikit-learn's digits, and MNIST, CIFAR-10 or CIFAR-100 from a folder of the user's."""

from __future__ import annotations

import argparse
import gzip
import io
import math
import os
import pickle
import re
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Pixels = NDArray[np.uint8]


class Images(NamedTuple):
    """Images (n, channels, height, width) fp32 in [-1, 1] and their classes (n,) int64, for training and testing."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def classes(self) -> int:
        """Return the number of classes."""
        return _CLASSES.get(self.name, 10)

    def to(self, device: str) -> Images:
        """Return the images on a device."""
        return Images(self.name, *(part.to(device) for part in self[1:]))


def add_folder(parser: argparse.ArgumentParser, about: str) -> None:
    """Add the option --data, a folder with data."""
    parser.add_argument("--data", type=Path, default=usual_folder(), metavar="DIR", help=about)


def usual_folder() -> Path | None:
    """Return $INTERP_NN_DATA, None where it is not set or empty."""
    folder = os.environ.get("INTERP_NN_DATA")
    return Path(folder) if folder else None


def load(dataset: str | None, directory: Path | None) -> Images:
    """Load "digits", "mnist", "cifar10" or "cifar100"; without a name what the folder holds, digits without a folder.

    The folder, or `cifar10`, `cifar100` or `mnist` inside, has: for CIFAR-10 the official python batches, or lossless WebP
    sheets of 1,000 images (25 rows of 40) with `*_labels.npy`; for CIFAR-100 the official python files, of which the fine
    labels are used; for MNIST the four idx files, gzipped or not.

    Raises:
        FileNotFoundError: There are no such files. The message says what was looked for, and where.
        ValueError: The files are damaged, or hold what would run code.
    """
    if dataset == "digits" or (dataset is None and directory is None):
        return digits()
    if directory is None:
        raise FileNotFoundError(f"{dataset}: no folder given; pass --data DIR or set INTERP_NN_DATA")
    for name, (subfolders, read) in _READERS.items():
        if dataset not in (None, name):
            continue
        for folder in (directory, *(directory / sub for sub in subfolders)):
            found = _whole(name, folder, read) if folder.is_dir() else None
            if found is not None:
                return Images(name, *found)
    wanted = [dataset] if dataset else list(_READERS)
    looked_for = "; ".join(_LOOKED_FOR[name] for name in wanted)
    raise FileNotFoundError(f"{' or '.join(wanted)}: not found in {directory}; looked for {looked_for}")


def digits() -> Images:
    """Load scikit-learn's 1,797 handwritten digits (8 x 8), three quarters for training, split by a fixed shuffle."""
    images, labels = _digits()
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy((images / 8.0 - 1.0)[order]).float().unsqueeze(1)
    y = torch.from_numpy(labels[order]).long()
    split = 3 * len(y) // 4
    return Images("digits", x[:split], y[:split], x[split:], y[split:])


@cache
def _digits() -> tuple[NDArray[np.floating], NDArray[np.integer]]:
    """Return images and labels as scikit-learn has them, as text, which takes longer to read than a small network to train."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target


_Split = tuple[Tensor, Tensor, Tensor, Tensor]


def _whole(name: str, folder: Path, read: Callable[[Path], _Split | None]) -> _Split | None:
    """Return what `read` finds, if each image has a label; None where there is nothing."""
    last = _CLASSES.get(name, 10) - 1
    try:
        found = read(folder)
    except (ImportError, FileNotFoundError):
        raise
    except Exception as error:  # formats differ in their errors on damaged files
        raise ValueError(f"{name}: the files in {folder} are damaged: {type(error).__name__}: {error}") from error
    for images, labels in () if found is None else (found[:2], found[2:]):
        if len(images) != len(labels) or not len(labels) or int(labels.min()) < 0 or int(labels.max()) > last:
            raise ValueError(
                f"{name}: the files in {folder} are damaged: {len(images)} images with {len(labels)} labels, want as many, "
                f"0 to {last}"
            )
    return found


def _tensors(x: _Pixels, y: NDArray[np.integer]) -> tuple[Tensor, Tensor]:
    """Convert pixels (n, height, width, channels) and labels to the tensors of `Images`."""
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1.0, torch.from_numpy(y.astype(np.int64))


def _cifar10_batches(folder: Path) -> _Split | None:
    return _pickled(folder, [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], b"labels")


def _cifar100(folder: Path) -> _Split | None:
    return _pickled(folder, ["train"], ["test"], b"fine_labels") if (folder / "meta").is_file() else None


def _pickled(folder: Path, train: list[str], test: list[str], labels: bytes) -> _Split | None:
    """Read the official python-version batches of CIFAR."""
    if not all((folder / name).is_file() for name in train + test):
        return None
    halves: list[Tensor] = []
    for part in (train, test):
        batches = [_unpickled(folder / name) for name in part]
        pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        halves += _tensors(pixels, np.concatenate([batch[labels] for batch in batches]))
    return halves[0], halves[1], halves[2], halves[3]


def _unpickled(file: Path) -> dict[bytes, Any]:
    """Read a pickled dictionary of arrays and lists. Another object is refused and nothing of the file is run."""
    try:
        found = _Unpickler(io.BytesIO(file.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle fails in many ways
        raise ValueError(f"{file.name}: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file.name}: holds a {type(found).__name__}, want a dictionary")
    return found


class _Unpickler(pickle.Unpickler):
    """Builds numbers, text, bytes, lists, dictionaries and arrays of numbers.

    NumPy's own functions are not called: `numpy.ndarray` makes an array at any address that a pickle names.
    """

    def find_class(self, module: str, name: str) -> Any:
        for package in ("numpy._core.", "numpy.core."):  # of NumPy 2, and of those before
            module = module.replace(package, "numpy.", 1) if module.startswith(package) else module
        allowed = {
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): self._dtype,
            ("numpy.multiarray", "_reconstruct"): self._array,
            ("numpy.numeric", "_frombuffer"): self._array_of,  # protocol 5
            ("_codecs", "encode"): self._bytes,  # protocol 2 of Python 3
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(
                f"holds {module}.{name}, want arrays, text, numbers, lists and dictionaries alone"
            )
        return allowed[module, name]

    def _dtype(self, code: Any, *_: Any) -> _Dtype:
        return _Dtype(code)

    def _array(self, *_: Any) -> _Array:
        return _Array()

    def _array_of(self, data: Any, dtype: _Dtype, shape: Any, order: Any, *_: Any) -> _Array:
        array = _Array()
        array.__setstate__((1, shape, dtype, order == "F", data))
        return array

    def _bytes(self, text: str, encoding: Any) -> bytes:
        if encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError(f"bytes as {encoding!r}, want latin1")
        return text.encode("latin1")


class _Dtype:
    """The type of an array in a pickle: one of numbers."""

    def __init__(self, code: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(self.code, str) or not re.fullmatch("b1|[iu][1248]|f[248]", self.code):
            raise pickle.UnpicklingError(f"an array of {code!r}, want numbers")

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("|", "<", ">", "="):
            raise pickle.UnpicklingError(f"the byte order {order!r}, want one of | < > =")
        self.code = order + self.code[-2:]


class _Array:
    """An array in a pickle, which `numpy.concatenate` takes."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)):
            raise pickle.UnpicklingError("an array without a type or without bytes")
        self._array = np.frombuffer(data, dtype.code).reshape(shape, order="F" if by_columns else "C")

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[Any]:
        return np.array(self._array, dtype)


def _cifar10_sheets(folder: Path) -> _Split | None:
    """Read lossless WebP sheets of 25 x 40 tiles, row by row."""
    sheets = {split: sorted(folder.glob(f"{split}_[0-9][0-9].webp")) for split in ("train", "test")}
    if not all(sheets.values()):
        return None
    from PIL import Image

    halves: list[Tensor] = []
    for split, paths in sheets.items():
        tiles = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        pixels = np.concatenate(
            [t.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3) for t in tiles]
        )
        halves += _tensors(pixels, np.load(folder / f"{split}_labels.npy", allow_pickle=False))
    return halves[0], halves[1], halves[2], halves[3]


def _mnist(folder: Path) -> _Split | None:
    """Read the four idx files."""
    halves: list[Tensor] = []
    for split in ("train", "t10k"):
        parts: list[_Pixels] = []
        for kind, size in (("images-idx3-ubyte", (28, 28)), ("labels-idx1-ubyte", ())):
            plain = folder / f"{split}-{kind}"
            files = [file for file in (plain.with_name(f"{plain.name}.gz"), plain) if file.is_file()]
            if not files:
                return None
            parts.append(_idx(files[0], size))
        halves += _tensors(parts[0][..., None].copy(), parts[1])
    return halves[0], halves[1], halves[2], halves[3]


def _idx(file: Path, size: tuple[int, ...]) -> _Pixels:
    """Read items of this size from an idx file of bytes, after a check of its header."""
    raw = file.read_bytes()
    if file.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{file.name}: {error}") from error
    start = bytes((0, 0, 8, 1 + len(size)))  # the mark of bytes with so many axes
    header = len(start) + 4 * start[3]
    if not raw.startswith(start) or len(raw) < header:
        raise ValueError(
            f"{file.name}: begins with {raw[:4].hex()}, want {start.hex()} and the {start[3]} sizes of an idx file"
        )
    shape = struct.unpack_from(f">{start[3]}I", raw, len(start))
    if shape[1:] != size or len(raw) - header != math.prod(shape):
        wanted = " x ".join(map(str, ("n", *size)))
        raise ValueError(
            f"{file.name}: {len(raw) - header} bytes with the sizes {shape}, want {wanted} and as many bytes"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _cifar10(folder: Path) -> _Split | None:
    return _cifar10_batches(folder) or _cifar10_sheets(folder)


_READERS: dict[str, tuple[tuple[str, ...], Callable[[Path], _Split | None]]] = {
    "cifar10": (("cifar10", "cifar-10-batches-py"), _cifar10),
    "mnist": (("mnist", "MNIST/raw", "raw"), _mnist),
    "cifar100": (("cifar100", "cifar-100-python"), _cifar100),
}
_CLASSES = {"cifar100": 100}
_LOOKED_FOR = {
    "cifar10": "data_batch_1..5 and test_batch, or train_NN.webp and test_NN.webp",
    "mnist": "train-images-idx3-ubyte[.gz] ...",
    "cifar100": "train, test and meta",
}
