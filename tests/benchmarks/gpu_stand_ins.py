"""What the tests of the GPU job have in the place of a GPU."""

import torch

from benchmarks.gpu import kernels
from interp_nn.engines.devices import DeviceSpec

CPU = torch.device("cpu")
BOTH = kernels.WITH_KERNELS
H100 = DeviceSpec((9, 0), 132, 232448, 1.0, 1.0)


def admitting(patch):
    """Every engine supports everything."""
    patch.setattr(kernels, "unsupported_reason", lambda *args: None)


class Graph:
    """Runs its call again, into the same tensors."""

    def __init__(self, call):
        self.call, self.out = call, call()

    def replay(self):
        for old, new in zip(self.out or (), self.call() or (), strict=True):
            old.copy_(new)
