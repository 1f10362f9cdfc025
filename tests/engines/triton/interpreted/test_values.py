"""Every kernel in every precision, at sizes around its tiles, against fp64 and PyTorch's own error; in guarded memory."""

import contextlib

import harness
import pytest
import torch
from harness import Launches, forced, inputs, targets
from support import check_law, naive, naive_pair

from benchmarks.timing.tolerances import SPLIT_ULPS
from interp_nn.engines import orders, select

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
TF32_ULPS = 2**13  # one of tf32


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


@pytest.mark.parametrize("shape", [(17, 100, 10), (40, 7, 100)], ids=str)
@pytest.mark.parametrize("place", [0, 1])
def test_one_output_of_a_pair(place, shape, monkeypatch):
    n, _, k = shape
    function = (harness.projection_alone, harness.summary_of_pair)[place]
    kernels = ["stream", "pair_backward"]
    law(
        function,
        lambda x, b: naive_pair(x, b)[place],
        inputs(*shape),
        [(n, k)],
        torch.float32,
        kernels,
        monkeypatch,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=ids(DTYPES))
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_many_columns(shape, dtype, monkeypatch):
    n, _, k = shape
    kernels = ["phased_forward", "phased_backward"]
    given = [*inputs(*shape), torch.randn(k, dtype=torch.float64)]
    law(harness.summary, naive, given, [(n, k)], dtype, kernels, monkeypatch)
    monkeypatch.undo()
    law(harness.pair, naive_pair, given[:2], [(n, k), (n, k)], dtype, kernels, monkeypatch)


@pytest.mark.parametrize("place", [0, 1])
def test_one_output_of_a_pair_with_many_columns(place, monkeypatch):
    function = (harness.projection_alone, harness.summary_of_pair)[place]
    kernels = ["phased_forward", "phased_backward"]
    law(
        function,
        lambda x, b: naive_pair(x, b)[place],
        inputs(40, 50, 140),
        [(40, 140)],
        torch.float32,
        kernels,
        monkeypatch,
    )


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


@pytest.mark.parametrize("name", ["summary", "pair", "pair_loss", "latent_loss", "flat_loss", "wide"])
def test_tf32(name, monkeypatch):
    """Where PyTorch's switch allows tf32 the kernels round as PyTorch's own products do."""
    monkeypatch.setattr(orders, "head_order", lambda *_: HEAD_ORDERS.get(name))
    matmul = torch.backends.cuda.matmul
    before, n, d, k, m = matmul.fp32_precision, 100, 96, 150 if name == "wide" else 40, 7
    matmul.fp32_precision = "tf32"
    try:
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
    finally:
        matmul.fp32_precision = before
