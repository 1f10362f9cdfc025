"""Image folders as users have them, written small."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.experiments import datasets


def _pixels(n, *shape):
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def _expected(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_digits_are_split_without_overlap():
    images = datasets.load(None, None)
    assert images.name == "digits"
    assert images.x_train.shape == (1347, 1, 8, 8)
    assert images.x_test.shape == (450, 1, 8, 8)
    assert images.x_train.min() >= -1
    assert images.x_train.max() <= 1
    assert images.y_train.unique().tolist() == list(range(10))


@pytest.mark.parametrize("subfolder", ["", "cifar-10-batches-py"])
def test_cifar10_official_batches(tmp_path, subfolder):
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    x, y = _pixels(12, 32, 32, 3), np.arange(12) % 10
    for i, name in enumerate([f"data_batch_{j}" for j in range(1, 6)] + ["test_batch"]):
        part = slice(2 * i, 2 * i + 2)
        batch = {b"data": x[part].transpose(0, 3, 1, 2).reshape(2, -1), b"labels": y[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    images = datasets.load("cifar10", tmp_path)
    assert torch.equal(images.x_train, _expected(x[:10]))
    assert torch.equal(images.x_test, _expected(x[10:]))
    assert images.y_train.tolist() == y[:10].tolist()


def test_cifar100_official_files(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    x, y = _pixels(4, 32, 32, 3), [0, 99, 50, 7]
    for name, part in (("train", slice(0, 3)), ("test", slice(3, 4)), ("meta", slice(0, 0))):
        raw = x[part].transpose(0, 3, 1, 2).reshape(-1, 3072)
        (folder / name).write_bytes(
            pickle.dumps({b"data": raw, b"fine_labels": y[part], b"coarse_labels": [0] * len(raw)})
        )
    images = datasets.load(None, tmp_path)
    assert images.name == "cifar100" and images.classes == 100
    assert torch.equal(images.x_train, _expected(x[:3])) and torch.equal(images.x_test, _expected(x[3:]))
    assert images.y_train.tolist() == [0, 99, 50] and images.y_test.tolist() == [7]
    (folder / "test").write_bytes(pickle.dumps({b"data": raw, b"fine_labels": [100]}))
    with pytest.raises(
        ValueError, match=r"cifar100: the files in .* are damaged: 0 images with 1 labels, want as many, 0 to 99"
    ):
        datasets.load("cifar100", tmp_path)


def test_cifar10_sheets(tmp_path):
    x, y = _pixels(1000, 32, 32, 3), (np.arange(1000) % 10).astype(np.uint8)
    sheet = x.reshape(25, 40, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(800, 1280, 3)
    for split in ("train", "test"):
        Image.fromarray(sheet).save(tmp_path / f"{split}_00.webp", lossless=True, exact=True)
        np.save(tmp_path / f"{split}_labels.npy", y)
    images = datasets.load(None, tmp_path)
    assert images.name == "cifar10"
    assert torch.equal(images.x_train, _expected(x))
    assert images.y_test.tolist() == y.tolist()


@pytest.mark.parametrize("packed", [True, False])
def test_mnist(tmp_path, packed, idx):
    x, y = _pixels(7, 28, 28), np.arange(7, dtype=np.uint8)
    (tmp_path / "mnist").mkdir()
    for split in ("train", "t10k"):
        for kind, payload in (("images-idx3-ubyte", idx(x)), ("labels-idx1-ubyte", idx(y))):
            path = tmp_path / "mnist" / f"{split}-{kind}{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(payload) if packed else payload)
    images = datasets.load("mnist", tmp_path)
    assert torch.equal(images.x_train, _expected(x[..., None]))
    assert images.y_test.tolist() == y.tolist()


def _mnist(folder, idx, images=7, labels=7, last=6):
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(_pixels(images, 28, 28)))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.full(labels, last, dtype=np.uint8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": 6}, "7 images with 6 labels, want as many, 0 to 9"),
        ({"last": 10}, "7 images with 7 labels, want as many, 0 to 9"),
        ({"images": 0, "labels": 0}, "0 images with 0 labels"),
        (
            lambda raw: b"",
            "ValueError: t10k-images-idx3-ubyte: begins with , want 00000803 and the 3 sizes of an idx file",
        ),
        (lambda raw: raw[:9], "ValueError: t10k-images-idx3-ubyte: begins with 00000803, want"),
        (lambda raw: bytes(4) + raw[4:], "ValueError: t10k-images-idx3-ubyte: begins with 00000000, want"),
        (
            lambda raw: raw[:-1],
            r"ValueError: t10k-images-idx3-ubyte: 5487 bytes with the sizes \(7, 28, 28\), want n x 28 x 28",
        ),
        (
            lambda raw: raw + bytes(784),
            r"ValueError: t10k-images-idx3-ubyte: 6272 bytes with the sizes \(7, 28, 28\), want",
        ),
        (
            lambda raw: raw[:8] + raw[8:16].replace(b"\x1c", b"\x0e") + raw[16:],
            r"ValueError: t10k-images-idx3-ubyte: 5488 bytes with the sizes \(7, 14, 14\), want n x 28 x 28",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, change, message, idx):
    _mnist(tmp_path, idx, **change if isinstance(change, dict) else {})
    if not isinstance(change, dict):
        file = tmp_path / "t10k-images-idx3-ubyte"
        file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=f"mnist: the files in .* are damaged: {message}"):
        datasets.load(None, tmp_path)


@pytest.mark.parametrize(
    ("dataset", "files", "content", "message"),
    [
        ("mnist", ["train-labels-idx1-ubyte.gz"], b"no gzip", "ValueError: train-labels-idx1-ubyte.gz: "),
        (
            "mnist",
            ["train-labels-idx1-ubyte.gz"],
            gzip.compress(bytes(99))[:-9],
            "ValueError: train-labels-idx1-ubyte.gz: ",
        ),
        ("cifar10", [*(f"data_batch_{j}" for j in range(1, 6)), "test_batch"], b"no pickle", "UnpicklingError"),
    ],
)
def test_damaged_archives_are_named(dataset, files, content, message, tmp_path, idx):
    _mnist(tmp_path, idx)
    for name in files:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{dataset}: the files in .* are damaged: {message}"):
        datasets.load(dataset, tmp_path)


@pytest.mark.parametrize(
    ("dataset", "here", "message"),
    [
        ("cifar10", False, r"cifar10: no folder given; pass --data DIR or set INTERP_NN_DATA"),
        ("mnist", True, "mnist: not found in"),
        (
            None,
            True,
            "cifar10 or mnist or cifar100: not found in .*; looked for data_batch_1..5.*; train, test and meta",
        ),
    ],
)
def test_missing_images_are_named(dataset, here, message, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=message):
        datasets.load(dataset, tmp_path if here else None)
    for value, folder in (("", None), ("there", Path("there"))):
        monkeypatch.setenv("INTERP_NN_DATA", value)
        assert datasets.usual_folder() == folder
