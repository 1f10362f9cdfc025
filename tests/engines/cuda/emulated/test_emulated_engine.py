"""The cuda engine as layers use it, with the emulator in the place of a GPU; and its limits."""

import contextlib
import itertools

import engine_contract
import pytest
import torch
from engine_contract import *  # noqa: F403 - the tests of every engine
from engine_contract import inputs, targets
from torch.library import opcheck

import interp_nn
from interp_nn.engines import eager, eager_polynomial, limits, select
from interp_nn.engines.cuda import engine as cuda_engine
from interp_nn.engines.devices import KNOWN, DeviceSpec
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.limits import unsupported_reason
from interp_nn.engines.problem import LossOptions, Plan, Problem
from interp_nn.ops import remembered

DEVICE = DeviceSpec((8, 0), 3, 163 * 1024, 1.0, 1.0)  # what csrc/device.h says


@pytest.fixture
def engine(emulated, monkeypatch):
    """use_engine("cuda") on the CPU."""
    monkeypatch.setitem(limits._machine_reasons, "cuda", None)
    monkeypatch.setattr(select, "interpreting", lambda: True)
    monkeypatch.setattr(select, "spec_of", lambda device: DEVICE)

    @contextlib.contextmanager
    def forced():
        remembered.plans.clear()
        with interp_nn.use_engine("cuda"):
            yield
        remembered.plans.clear()

    names = ("cuda_forward", "cuda_backward", "cuda_loss", "cuda_loss", "cuda_scale")
    return engine_contract.Engine("cuda", forced, *names)


@pytest.fixture
def launched(monkeypatch):
    names, launch = [], cuda_engine.launch

    def note(operator, *arguments):
        names.append(operator.overloadpacket.__name__)
        return launch(operator, *arguments)

    monkeypatch.setattr(cuda_engine, "launch", note)
    return names


# An odd number of barriers leaves the counter's sign changed, which `test_schema` sees.
WITH_THREE_BARRIERS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
ALL_TESTS = ("test_schema", *WITH_THREE_BARRIERS)


@pytest.mark.parametrize("polynomial", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_opcheck_of_forward_and_backward(pair, polynomial, emulated):
    x, b = inputs(9, 16, 5)
    p, dy, bias = torch.randn(9, 5), torch.randn(9, 5), torch.randn(5)
    q = (torch.tensor([1.5, -0.5]), torch.tensor(0.7)) if polynomial else (None, None)
    opcheck(engine_contract.OPS.cuda_forward.default, (x, b, None if pair else bias, *q, pair, False))
    counter = torch.zeros(1, dtype=torch.int32)
    gram = torch.randn(5, 5)
    given = (p, dy, x, b, p, gram) if pair else (None, dy, x, b, None, gram)
    given += (gram if polynomial else None, *q, counter)
    needs = (True, True, not pair, polynomial)
    tests = WITH_THREE_BARRIERS if polynomial else ALL_TESTS
    opcheck(engine_contract.OPS.cuda_backward.default, (*given, pair, *needs, True, False), test_utils=tests)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck_of_a_loss(head, reduction, emulated):
    x, b, a, c = inputs(9, 16, 5, 5)
    counter, target = torch.zeros(1, dtype=torch.int32), torch.arange(9) % 5
    q = (torch.tensor([1.5, -0.5, 0.1]), None) if reduction else (None, None)
    needs = (True, True, head, head, reduction == 1)
    given = (x, b, a if head else None, c if head else None, *q, target, None, counter, 1.0, 1.0, 1.0, -100, reduction)
    tests = WITH_THREE_BARRIERS if reduction else ALL_TESTS
    opcheck(engine_contract.OPS.cuda_loss.default, (*given, *needs, False, False), test_utils=tests)


def test_opcheck_of_scale(emulated):
    given = [torch.randn(3, 4).half(), torch.randn(7).half(), torch.randn(2)]
    scaled = [t.clone() for t in given]
    opcheck(engine_contract.OPS.cuda_scale.default, (torch.tensor(0.5), given))
    engine_contract.OPS.cuda_scale.default(torch.tensor(0.5), scaled)
    assert all(torch.equal(half, t / 2) for half, t in zip(scaled, given, strict=True))


PAIR, SUMMARY, HEAD = Plan("cuda", "(Xb)q", saves=True), Plan("cuda", "(Xb)q"), Plan("cuda", "logits_from_latent")


def polynomial(dtype=torch.float32, scale=0.7):
    return Polynomial(torch.tensor([1.5, -0.75, 0.25], dtype=dtype), torch.tensor(scale, dtype=dtype))


@pytest.mark.parametrize("shape", [(33, 40, 20), (0, 40, 20), (33, 0, 20), (33, 40, 0)], ids=str)
@pytest.mark.parametrize("plan", [SUMMARY, PAIR], ids=str)
def test_a_polynomial_is_one_launch_each_way(plan, shape, emulated, launched):
    x, b = inputs(*shape)
    dy, bias = torch.randn(shape[0], shape[2]), torch.randn(shape[2])
    q = polynomial(torch.float16)  # whatever its dtype, the kernels read fp32
    exact = Polynomial(q.coefficients.double(), q.scale.double())
    p, y, saved = cuda_engine.forward(x, b, None if plan.saves else bias, plan, plan.saves, q)
    assert (p is None) != plan.saves
    dp = torch.randn_like(dy) if plan.saves else None
    found = cuda_engine.backward(dp, dy, x, b, saved, plan, True, True, not plan.saves, True, q)
    assert launched == (["cuda_forward", "cuda_backward"] if x.numel() * b.shape[1] else [])
    leaves = [x.double(), b.double(), bias.double(), exact.coefficients]
    left, right, shift, coefficients = (t.requires_grad_() for t in leaves)
    projection, out, _ = eager_polynomial.forward(
        left, right, None if plan.saves else shift, Polynomial(coefficients, exact.scale), eager_polynomial.SAVING, True
    )
    total = (out * dy).sum() + (0 if dp is None else (projection * dp).sum())
    grads = torch.autograd.grad(total, (left, right, shift, coefficients), allow_unused=True)
    if plan.saves:
        torch.testing.assert_close(p.double(), projection, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.double(), out, rtol=1e-4, atol=1e-4)
    assert found[3].dtype == torch.float32
    for got, expected in zip(found, grads, strict=True):
        if expected is None:
            assert got is None
        else:
            torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("shape", [(33, 40, 20), (0, 40, 20), (33, 0, 20)], ids=str)
def test_the_loss_of_a_polynomial_is_one_launch(head, shape, emulated, launched):
    x, b, a, c = inputs(*shape, 7)
    a, c = (a, c) if head else (None, None)
    target, q = targets(shape[0], 7), polynomial()
    options, needs = LossOptions((0.7, 1.3, 0.9), -100, "sum"), (True, True, head, head, True)
    plan = HEAD if head else PAIR
    value, found = cuda_engine.loss(x, b, a, c, target, options, plan, torch.tensor(0.5), needs, q)
    assert launched == (["cuda_loss"] if x.numel() else [])
    leaves = [t.double().requires_grad_() for t in (x, b, a, c, q.coefficients) if t is not None]
    exact = Polynomial(leaves[-1], q.scale.double())
    if head:
        o1, o2 = eager_polynomial.logits(*leaves[:4], exact, HEAD)
    else:
        o1, o2, _ = eager_polynomial.forward(*leaves[:2], None, exact, eager_polynomial.SAVING, True)
    expected = eager.three_terms(o1, o2, target, options, True)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    for got, grad in zip(found, torch.autograd.grad(expected / 2, leaves), strict=True):
        torch.testing.assert_close(got.double(), grad, rtol=1e-3, atol=1e-3)
    before = [t.clone() for t in found]
    for scaled, t in zip(cuda_engine.scale(found, torch.tensor(0.25)), before, strict=True):
        assert torch.equal(scaled, t / 4)


def test_kernels_leave_the_carve_out_to_other_work(emulated):
    x, b = inputs(600, 64, 16)
    dy, plan, blocks = torch.randn(600, 16), Plan("cuda", "(Xb)G"), []
    before = torch._C._get_sm_carveout_experimental()
    try:
        for kept in (None, 1, 5):
            torch._C._set_sm_carveout_experimental(kept)
            _, _, saved = cuda_engine.forward(x, b, None, plan, False)
            blocks.append(emulated.blocks())
            cuda_engine.backward(None, dy, x, b, saved, plan, True, True)
            blocks.append(emulated.blocks())
    finally:
        torch._C._set_sm_carveout_experimental(before)
    assert blocks == [3, 3, 2, 2, 1, 1]


# Shared memory of a block, in KiB, that GPUs have: of compute capability 7.5, and of newer ones.
SHARED_7, SHARED_8 = (64,), (99, 163, 227)
COLUMNS, CLASSES = (1, 16, 17, 64, 65, 128, 129), (None, 1, 16, 17, 128, 129)
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def refused(function, *arguments):
    """Return whether csrc has no kernel for a call."""
    try:
        function(*arguments)
    except ValueError as error:
        if "no CUDA kernel" not in str(error):
            raise
        return True
    return False


def verdicts(emulated, device, dtype, k, m):
    """Yield (kernels, whether interp_nn refuses the problem, whether csrc does) for one row; m None is no head."""
    t = torch.zeros(1).numpy()  # never read
    terms = emulated.LossTerms(t, None, t, -100, 1.0, 1.0, 1.0, emulated.Reduction.mean)
    sizes = emulated.Sizes(1, 16, k, 1, 16, getattr(emulated.Kind, DTYPES[dtype]))
    major, minor = device.capability
    tail = sizes, emulated.DeviceSpec(1, device.shared, 10 * major + minor), 1

    def ours(classes, head):
        problem = Problem(1, 16, k, classes=classes, head=head, dtype=dtype, spec=device, device=device.name)
        return unsupported_reason("cuda", problem) is not None

    if m is not None:
        call = emulated.head_loss, t, t, t, None, terms, t, t, t, None, m, True
        yield "head_loss", ours(m, True), refused(*call, *tail)
        return
    calls = [
        (emulated.forward, t, t, None, t, t, t),
        (emulated.pair_backward, t, t, t, t, t, t, t, t, True),
        (emulated.summary_backward, t, t, t, t, t, t, None, True),
    ]
    yield "summary and pair", ours(None, False), any([refused(*call, *tail) for call in calls])
    yield "pair_loss", ours(k, False), refused(emulated.pair_loss, t, t, terms, t, t, True, *tail)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", [device.capability for device in KNOWN], ids=str)
def test_the_limits_are_those_of_the_library(emulated, capability, dtype):
    """Python, where all limits are, refuses exactly what csrc has no kernel for.

    For amounts of shared memory that no GPU has, it may refuse more.
    """
    existing = SHARED_7 if capability < (8, 0) else SHARED_8
    emulated.skip_kernels(True)
    try:
        for shared, k, m in itertools.product({*existing, *range(existing[0], 240, 4)}, COLUMNS, CLASSES):
            device = DeviceSpec(capability, 1, shared << 10, 1.0, 1.0)
            for kernels, ours, library in verdicts(emulated, device, dtype, k, m):
                assert ours == library or (ours and shared not in existing), (kernels, shared, k, m)
    finally:
        emulated.skip_kernels(False)
