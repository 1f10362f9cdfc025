"""Make torchvision importable beside a PyTorch for the CPU."""

import importlib.util

import torch

_KEPT = []


def make_torchvision_importable():
    """Make torchvision importable, which timm and transformers import too.

    PyPI's builds for Linux have their operators in a library for CUDA. Beside a PyTorch for the CPU that does not load, and
    torchvision fails where it gives fake kernels to two of them; its models need none, so the names are enough.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
