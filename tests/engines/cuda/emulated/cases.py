"""Inputs, guard zones, and the expected results of the kernels."""

import os
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = 0 if os.environ.get("INTERP_NN_EMULATOR_NO_GUARDS") == "1" else 256  # AddressSanitizer has its own
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "TF32": torch.float32, "F32": torch.float32}


class Case(NamedTuple):
    kind: str
    n: int
    d: int
    k: int
    b_transposed: bool = False
    seed: int = 1


# Every size meets every kind, and each kind both memory orders of every number of padded columns.
COVER = [
    Case(kind, n, d, k, transposed != (kind in ("BF16", "F32")), seed)
    for kind in DTYPES
    for seed, (n, d, k, transposed) in enumerate(
        [
            (0, 7, 10, False),
            (1, 100, 1, True),
            (15, 1, 63, False),
            (16, 64, 20, True),
            (17, 7, 100, False),
            (127, 512, 64, True),
            (128, 64, 128, False),
            (129, 100, 65, True),
            (1000, 64, 10, False),
            (200, 512, 100, True),
            (1000, 100, 128, True),
            (33, 72, 24, False),
        ]
    )
]
EDGES = [case for case in COVER if case.n <= 129 and case.d <= 100]


def name(case):
    return f"{case.kind}-{case.n}x{case.d}x{case.k}{'T' if case.b_transposed else ''}"


def round_tf32(t):
    """fp32 to ten bits, the nearest, ties away from zero."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class TF32Products(TorchDispatchMode):
    """Every matrix product of fp32 operands rounds them to tf32 first, as on a GPU where PyTorch is allowed to."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        first = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}.get(function)
        if first is not None and args[first].dtype == torch.float32:
            operands = [round_tf32(t.contiguous()) for t in args[first : first + 2]]
            args = (*args[:first], *operands, *args[first + 2 :])
        return function(*args, **(kwargs or {}))


class Guarded:
    """A tensor between NaNs: reading past its ends shows in the results, and writing there in `check`."""

    def __init__(self, shape, dtype, values=None, shift=0):
        size = 1
        for extent in shape:
            size *= extent
        self.memory = torch.full((size + 2 * GUARD + shift,), float("nan"), dtype=dtype)
        self.tensor = self.memory[GUARD + shift : GUARD + shift + size].view(shape)
        if values is not None:
            self.tensor.copy_(values)
        self.ends = self.memory[: GUARD + shift], self.memory[GUARD + shift + size :]

    def check(self):
        for end in self.ends:
            assert bool(end.isnan().all()), "written outside of a result"


def array(t):
    """A numpy view of a tensor's memory, 16-bit numbers as integers."""
    if t is None:
        return None
    t = t.tensor if isinstance(t, Guarded) else t
    return (t.view(torch.int16) if t.dtype.itemsize == 2 else t).numpy()


class Problem:
    """x, b and upstream gradients of a case, in the kind's dtype, with b in the memory order asked for."""

    def __init__(self, case, shift=0):
        self.case = case
        self.dtype = DTYPES[case.kind]
        random = torch.Generator().manual_seed(case.n * 7919 + case.d * 31 + case.k)

        def normal(*shape):
            return torch.randn(shape, generator=random).to(self.dtype)

        n, d, k = case.n, case.d, case.k
        self.x, self.b, self.bias = normal(n, d), normal(d, k).div(d**0.5), normal(k)
        self.dp, self.dy = normal(n, k), normal(n, k)
        self.strides = (1, d) if case.b_transposed else (k, 1)
        self.inputs = {
            key: Guarded(value.shape, self.dtype, value, shift)
            for key, value in {
                "x": self.x,
                "b": self.b.T.contiguous() if case.b_transposed else self.b,
                "bias": self.bias,
                "dp": self.dp,
                "dy": self.dy,
            }.items()
        }

    def sizes(self, emulated):
        case = self.case
        return emulated.Sizes(case.n, case.d, case.k, *self.strides, getattr(emulated.Kind, case.kind))

    def empty(self, *shape):
        return Guarded(shape, self.dtype)

    def result_b(self):
        """Memory for db, in b's order."""
        d, k = self.case.d, self.case.k
        return self.empty(k, d) if self.case.b_transposed else self.empty(d, k)

    def of_b(self, result):
        return result.tensor.T if self.case.b_transposed else result.tensor

    def product(self, exact):
        """The function for a @ b: in fp64, or in the kind's precision as PyTorch computes it."""
        if exact:
            return torch.matmul
        if self.case.kind == "TF32":
            return lambda a, b: round_tf32(a.contiguous()) @ round_tf32(b.contiguous())
        return torch.matmul

    def tensors(self, exact, *names):
        return [getattr(self, key).double() if exact else getattr(self, key) for key in names]

    def forward(self, exact):
        """(P, Y, G)."""
        dot = self.product(exact)
        x, b, bias = self.tensors(exact, "x", "b", "bias")
        p, g = dot(x, b), dot(b.T, b)
        return p, dot(p, g) + bias, g

    def pair_backward(self, exact, p, g, with_p=True, with_y=True):
        """(dX, db) for P and G as forward stored them."""
        dot = self.product(exact)
        x, b, dp, dy = self.tensors(exact, "x", "b", "dp", "dy")
        p, g = (p.double(), g.double()) if exact else (p, g)
        if not with_y:
            return dot(dp, b.T), dot(x.T, dp)
        gradient = dot(dy, g) + dp if with_p else dot(dy, g)
        t = dot(p.T, dy)
        return dot(gradient, b.T), dot(x.T, gradient) + dot(b, t + t.T)

    def summary_backward(self, exact, g):
        """(dX, db, dbias) for G as forward stored it."""
        dot = self.product(exact)
        x, b, dy = self.tensors(exact, "x", "b", "dy")
        g = g.double() if exact else g
        s = dot(x.T, dy)
        t = dot(b.T, s)
        return dot(dy, dot(b, g).T), dot(s, g) + dot(b, t + t.T), dy.sum(0)
