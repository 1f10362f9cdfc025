"""Every kernel in every precision, at sizes around its tiles, against fp64 and PyTorch's own error; in guarded memory."""

import contextlib

import harness
import pytest
import torch
import triton
import triton.language as tl
from harness import Launches, forced, inputs, targets
from support import check_law, naive, naive_pair

from interp_nn.engines import orders, select
from interp_nn.engines.accuracy import SPLIT_ULPS, TF32_ULPS
from interp_nn.engines.triton import grid

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Each size of n in {0, 1, 15, 16, 17, 127, 128, 129, 1000}, of d in {1, 7, 64, 100, 512} and of k in {1, 10, 63, 64, 65, 100,
# 128} meets every kernel and every dtype.
SHAPES = [
    (0, 64, 10),
    (1, 7, 1),
    (15, 100, 63),
    (16, 512, 64),
    (17, 1, 65),
    (127, 64, 100),
    (128, 100, 128),
    (129, 7, 10),
    (1000, 64, 16),
]
WIDE = [(1, 7, 129), (17, 64, 200), (150, 100, 131), (129, 1, 160)]  # beyond 128 columns, n below and above d
WEIGHTS = (0.7, 1.3, 0.9)


def law(function, reference, given, outputs, dtype, kernels, monkeypatch, precision="exact"):
    """`function` on the engine obeys the law, in exactly these launches."""
    launches = Launches(monkeypatch)
    upstreams = [torch.randn(shape, dtype=torch.float64) for shape in outputs]
    emulation = harness.Tf32 if precision == "tf32" and dtype == torch.float32 else contextlib.nullcontext

    def emulated(*args):
        with emulation():
            return reference(*args)

    with forced(), emulation():
        ulps = None if dtype != torch.float32 else TF32_ULPS if precision == "tf32" else SPLIT_ULPS
        check_law(function, emulated, given, upstreams, dtype, ulps)
    assert launches.kernels == kernels


def ids(values):
    return [f"{str(v).removeprefix('torch.')}" for v in values]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_summary(shape, dtype, monkeypatch):
    n, _, k = shape
    given = [*inputs(*shape), torch.randn(k, dtype=torch.float64)]
    kernels = ["stream", "summary_backward"] if n else []
    law(harness.summary, naive, given, [(n, k)], dtype, kernels, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair(shape, dtype, monkeypatch):
    n, _, k = shape
    kernels = ["stream", "pair_backward"] if n else []
    law(harness.pair, naive_pair, inputs(*shape), [(n, k), (n, k)], dtype, kernels, monkeypatch)


@pytest.mark.parametrize("shape", [(17, 100, 10), (40, 7, 100), (40, 50, 140)], ids=str)
@pytest.mark.parametrize("place", [0, 1])
def test_one_output_of_a_pair(place, shape, monkeypatch):
    n, _, k = shape
    function = (harness.projection_alone, harness.summary_of_pair)[place]
    kernels = ["phased_forward", "phased_backward"] if k > 128 else ["stream", "pair_backward"]

    def reference(x, b):
        return naive_pair(x, b)[place]

    law(function, reference, inputs(*shape), [(n, k)], torch.float32, kernels, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids(DTYPES))
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_many_columns(shape, dtype, monkeypatch):
    n, _, k = shape
    kernels = ["phased_forward", "phased_backward"]
    given = [*inputs(*shape), torch.randn(k, dtype=torch.float64)]
    law(harness.summary, naive, given, [(n, k)], dtype, kernels, monkeypatch)
    monkeypatch.undo()
    law(harness.pair, naive_pair, given[:2], [(n, k), (n, k)], dtype, kernels, monkeypatch)


def loss_kernels(name, n, dtype, reduction):
    """One launch for value and gradients, or one each where the upstream must be known first; scaling is one more."""
    if not n:
        return []
    late = dtype == torch.float16 or reduction == "none"
    return [name, name] if late else [name, "scale_gradients"]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids(DTYPES))
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_pair_loss(shape, dtype, monkeypatch):
    n, _, k = shape
    reduction = ("mean", "sum", "none")[n % 3]
    options = {"weights": WEIGHTS, "reduction": reduction}
    target = targets(n, k)
    law(
        harness.pair_loss(target, **options),
        harness.pair_loss_reference(target, **options),
        inputs(*shape),
        [(n,) if reduction == "none" else ()],
        dtype,
        loss_kernels("pair_loss", n, dtype, reduction),
        monkeypatch,
    )


HEAD_ORDERS = {"latent_loss": "logits_from_latent", "flat_loss": "logits_from_x"}


@pytest.mark.parametrize("dtype", DTYPES, ids=ids(DTYPES))
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("kernel", ["latent_loss", "flat_loss"])
def test_head_loss(kernel, shape, dtype, monkeypatch):
    n = shape[0]
    m = {1: 1, 15: 2, 16: 10, 17: 17, 127: 100, 128: 64, 129: 3, 1000: 10}[n]
    reduction = ("mean", "sum", "none")[(n + 1) % 3]
    options = {"weights": WEIGHTS, "reduction": reduction}
    target = targets(n, m)
    monkeypatch.setattr(orders, "head_order", lambda *_: HEAD_ORDERS[kernel])
    monkeypatch.setattr(select, "can_form_logits_from_x", lambda *_: True)  # the interpreter has no shared memory
    law(
        harness.head_loss(target, **options),
        harness.head_loss_reference(target, **options),
        inputs(*shape, m),
        [(n,) if reduction == "none" else ()],
        dtype,
        loss_kernels(kernel, n, dtype, reduction),
        monkeypatch,
    )


@pytest.fixture
def tf32():
    """PyTorch's switch allows tf32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


@pytest.mark.parametrize("name", ["summary", "pair", "pair_loss", "latent_loss", "flat_loss", "wide"])
@pytest.mark.usefixtures("tf32")
def test_tf32(name, monkeypatch):
    """Where PyTorch's switch allows tf32 the kernels round as PyTorch's own products do."""
    monkeypatch.setattr(orders, "head_order", lambda *_: HEAD_ORDERS.get(name))
    n, d, k, m = 100, 96, 150 if name == "wide" else 40, 7
    if name in ("summary", "wide"):
        kernels = ["phased_forward", "phased_backward"] if name == "wide" else ["stream", "summary_backward"]
        given = [*inputs(n, d, k), torch.randn(k, dtype=torch.float64)]
        law(harness.summary, naive, given, [(n, k)], torch.float32, kernels, monkeypatch, "tf32")
    elif name == "pair":
        kernels = ["stream", "pair_backward"]
        law(harness.pair, naive_pair, inputs(n, d, k), [(n, k)] * 2, torch.float32, kernels, monkeypatch, "tf32")
    else:
        head = name != "pair_loss"
        target = targets(n, m if head else k)
        function = (harness.head_loss if head else harness.pair_loss)(target)
        reference = (harness.head_loss_reference if head else harness.pair_loss_reference)(target)
        kernels = [name, "scale_gradients"]
        given = inputs(n, d, k, m if head else None)
        law(function, reference, given, [()], torch.float32, kernels, monkeypatch, "tf32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["summary", "pair", "pair_loss", "latent_loss", "flat_loss", "wide"])
@pytest.mark.usefixtures("tf32")
def test_tf32_does_not_shrink_results(name, dtype, monkeypatch):
    """The matrix units cut fp32 operands off, by 0.04 % on average. Operands rounded before lose nothing on average.

    With 16-bit inputs the products of fp32 sums in db are such ones.
    """
    monkeypatch.setattr(orders, "head_order", lambda *_: HEAD_ORDERS.get(name))
    n, d, k, m = 200, 96, 150 if name == "wide" else 60, 7
    target = targets(n, m if name in HEAD_ORDERS else k)
    function, reference = {
        "summary": (harness.summary, naive),
        "wide": (harness.summary, naive),
        "pair": (harness.pair, naive_pair),
        "pair_loss": (harness.pair_loss(target), harness.pair_loss_reference(target)),
    }.get(name) or (harness.head_loss(target), harness.head_loss_reference(target))
    given = inputs(n, d, k, m if name in HEAD_ORDERS else None)
    given += [torch.zeros(k, dtype=torch.float64)] if name in ("summary", "wide") else []
    given = [t.to(dtype).double() for t in given]
    found, exact = [], []
    upstreams = None
    for results, call, of in ((exact, reference, torch.float64), (found, function, dtype)):
        leaves = [t.to(of).requires_grad_() for t in given]
        with forced() if call is function else contextlib.nullcontext():
            out = call(*leaves)
            out = (out,) if isinstance(out, torch.Tensor) else tuple(out)
            upstreams = upstreams or [
                torch.randn(o.shape).to(dtype).double() if o.dim() else o.new_ones(()) for o in out
            ]
            grads = torch.autograd.grad(out, leaves, [u.to(o.dtype) for u, o in zip(upstreams, out, strict=True)])
        results += [t.detach().double() for t in (*out, *grads)]
    for f, e in zip(found, exact, strict=True):
        if e.numel() >= d * 7:
            slope = float((f * e).sum() / e.square().sum())
            assert abs(slope - 1) < 2e-4, (tuple(e.shape), slope)


@triton.jit
def _count(OUT, size, BLOCK: tl.constexpr):
    tl.store(OUT, grid.blocks(size, BLOCK))
    tl.store(OUT + 1, tl.cdiv(size, BLOCK))


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 2**31 - 4096, 2**31 - 4095, 2**31 - 1, 2**31, 2**40])
def test_blocks_of_a_size_near_two_gigabytes(size):
    out = torch.zeros(2, dtype=torch.int64)
    _count[(1,)](out, size, 4096)
    assert out[0] == -(-size // 4096)
    assert (out[1] == out[0]) == (not 2**31 - 4095 <= size < 2**31)  # which is why
