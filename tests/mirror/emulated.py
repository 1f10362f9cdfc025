"""The private operators of the CUDA library on CPU tensors: their kernels under the emulator."""

import torch
from cases import array

CHIP = (3, 163 * 1024, 80)
KINDS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
REDUCTIONS = ("none", "mean", "sum")


class Kernels:
    """Registers them, once in a process."""

    def __init__(self, mirror):
        self.mirror = mirror
        self.library = torch.library.Library("interp_nn", "IMPL")
        for name in ("forward", "backward", "loss", "scale"):
            self.library.impl(f"cuda_{name}", getattr(self, name), "CPU")

    def common(self, x, b, tf32):
        (n, d), k = x.shape, b.shape[1]
        kind = "TF32" if tf32 else KINDS[x.dtype]
        sizes = self.mirror.Sizes(n, d, k, *b.stride(), getattr(self.mirror.Kind, kind))
        return sizes, self.mirror.Chip(*CHIP), 1

    @staticmethod
    def empty(like, rows, columns, transposed=False):
        strides = (1, rows) if transposed else (columns, 1)
        return like.new_empty_strided((rows, columns), strides).fill_(float("nan"))

    def forward(self, x, b, bias, pair, tf32):
        (n, _), k = x.shape, b.shape[1]
        y, g, p = self.empty(x, n, k), self.empty(x, k, k), self.empty(x, n, k) if pair else None
        self.mirror.forward(*map(array, (x, b, bias, p, y, g)), *self.common(x, b, tf32))
        return [y, g, p] if pair else [y, g]

    def backward(self, dp, dy, x, b, p, g, counter, pair, need_x, need_b, need_bias, transposed, tf32):
        dx = self.empty(x, *x.shape) if need_x else None
        db = self.empty(x, *b.shape, transposed) if need_b else None
        dbias = self.empty(x, 1, b.shape[1])[0] if need_bias else None
        common = self.common(x, b, tf32)
        if pair:
            self.mirror.pair_backward(*map(array, (x, b, p, g, dp, dy, dx, db)), transposed, *common)
        else:
            self.mirror.summary_backward(*map(array, (x, b, g, dy, dx, db, dbias)), transposed, *common)
        return [t for t in (dx, db, dbias) if t is not None]

    def loss(
        self, x, b, weight, bias, target, upstream, counter, w1, w2, w3, ignore_index, reduction, need_x, need_b,
        need_weight, need_bias, transposed, tf32,
    ):  # fmt: skip
        value = torch.empty(target.shape if REDUCTIONS[reduction] == "none" else ())
        made = [
            self.empty(x, *x.shape) if need_x else None,
            self.empty(x, *b.shape, transposed) if need_b else None,
            self.empty(x, *weight.shape) if need_weight else None,
            self.empty(x, 1, weight.shape[0])[0] if need_bias else None,
        ]
        named = getattr(self.mirror.Reduction, REDUCTIONS[reduction])
        terms = self.mirror.LossTerms(*map(array, (target, upstream, value)), ignore_index, w1, w2, w3, named)
        common = self.common(x, b, tf32)
        if weight is None:
            self.mirror.pair_loss(*map(array, (x, b)), terms, *map(array, made[:2]), transposed, *common)
        else:
            inputs = map(array, (x, b, weight, bias))
            self.mirror.head_loss(*inputs, terms, *map(array, made), weight.shape[0], transposed, *common)
        return [value, *(t for t in made if t is not None)]

    def scale(self, upstream, gradients):
        kind = getattr(self.mirror.Kind, KINDS[gradients[0].dtype])
        self.mirror.scale(array(upstream), list(map(array, gradients)), kind, self.mirror.Chip(*CHIP))
