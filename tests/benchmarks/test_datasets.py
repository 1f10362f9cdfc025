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


def test_digits_are_split():
    images = datasets.load(None, None)
    assert images.name == "digits" and images.x_train.shape == (1347, 1, 8, 8) and images.x_test.shape == (450, 1, 8, 8)
    assert images.x_train.aminmax() == (-1, 1) and images.y_train.unique().tolist() == list(range(10))


@pytest.mark.parametrize(
    ("name", "train", "labels", "subfolder"),
    [
        ("cifar10", [f"data_batch_{i}" for i in range(1, 6)], b"labels", ""),
        ("cifar100", ["train"], b"fine_labels", "cifar-100-python"),
    ],
)
def test_cifar_official_files(name, train, labels, subfolder, tmp_path):
    folder = tmp_path / subfolder
    folder.mkdir(exist_ok=True)
    test, y = "test_batch" if name == "cifar10" else "test", [0, 9, 5, 7, 1, 2]
    x = _pixels(6, 32, 32, 3)

    def write(file, places):
        raw = x[places].transpose(0, 3, 1, 2).reshape(-1, 3072)
        content = {b"data": raw, labels: [y[i] for i in places], b"coarse_labels": [0] * len(places)}
        (folder / file).write_bytes(pickle.dumps(content))

    (folder / "meta").touch()
    for i, file in enumerate(train):
        write(file, [i] if len(train) > 1 else list(range(5)))
    write(test, [5])
    images = datasets.load(name, tmp_path)
    assert images.classes == int(name[5:]) and images.y_train.tolist() == y[:5] and images.y_test.tolist() == [2]
    assert torch.equal(images.x_train, _expected(x[:5])) and torch.equal(images.x_test, _expected(x[5:]))
    y[5] = 100
    write(test, [5])
    with pytest.raises(
        ValueError, match=rf"{name}: the files in .* are damaged: 1 images with 1 labels, want as many, 0 to"
    ):
        datasets.load(name, tmp_path)


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
        (lambda raw: b"", "begins with , want 00000803 and the 3 sizes of an idx file"),
        (lambda raw: raw[:9], "begins with 00000803, want"),
        (lambda raw: bytes(4) + raw[4:], "begins with 00000000, want"),
        (lambda raw: raw[:-1], r"5487 bytes with the sizes \(7, 28, 28\), want n x 28 x 28"),
        (lambda raw: raw + bytes(784), r"6272 bytes with the sizes \(7, 28, 28\), want"),
        (
            lambda raw: raw[:8] + raw[8:16].replace(b"\x1c", b"\x0e") + raw[16:],
            r"5488 bytes with the sizes \(7, 14, 14\)",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, change, message, idx):
    _mnist(tmp_path, idx, **change if isinstance(change, dict) else {})
    if not isinstance(change, dict):
        file = tmp_path / "t10k-images-idx3-ubyte"
        file.write_bytes(change(file.read_bytes()))
        message = f"ValueError: {file.name}: {message}"
    with pytest.raises(ValueError, match=f"mnist: the files in .* are damaged: {message}"):
        datasets.load(None, tmp_path)


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(bytes(99))[:-9]], ids=["no gzip", "cut"])
def test_damaged_archives_are_named(content, tmp_path, idx):
    _mnist(tmp_path, idx)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"mnist: the files in .* are damaged: ValueError: train-labels-idx1-ubyte.gz: "
    ):
        datasets.load("mnist", tmp_path)


def test_missing_images_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="cifar10: no folder given; pass --data DIR or set INTERP_NN_DATA"):
        datasets.load("cifar10", None)
    with pytest.raises(
        FileNotFoundError, match=r"cifar10 or mnist or cifar100: not found in .*; looked for data_batch_1..5"
    ):
        datasets.load(None, tmp_path)
    for value, folder in (("", None), ("there", Path("there"))):
        monkeypatch.setenv("INTERP_NN_DATA", value)
        assert datasets.usual_folder() == folder
