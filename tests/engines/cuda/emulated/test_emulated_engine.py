"""The cuda engine as layers use it, with the emulator in the place of a GPU; and its limits."""

import contextlib
import itertools

import engine_contract
import pytest
import torch
from engine_contract import *  # noqa: F403 - the tests of every engine
from engine_contract import inputs
from torch.library import opcheck

import interp_nn
from interp_nn import functional
from interp_nn.engines import limits, select
from interp_nn.engines.cuda import engine as cuda_engine
from interp_nn.engines.devices import KNOWN, DeviceSpec
from interp_nn.engines.limits import unsupported_reason
from interp_nn.engines.problem import Problem

DEVICE = DeviceSpec((8, 0), 3, 163 * 1024, 1.0, 1.0)  # what csrc/device.h says


@pytest.fixture
def engine(emulated, monkeypatch):
    """use_engine("cuda") on the CPU."""
    monkeypatch.setitem(limits._machine_reasons, "cuda", None)
    monkeypatch.setattr(select, "interpreting", lambda: True)
    monkeypatch.setattr(select, "spec_of", lambda device: DEVICE)

    @contextlib.contextmanager
    def forced():
        functional._plans.clear()
        with interp_nn.use_engine("cuda"):
            yield
        functional._plans.clear()

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


@pytest.mark.parametrize("pair", [False, True])
def test_opcheck_of_forward_and_backward(pair, emulated):
    x, b = inputs(9, 16, 5)
    p, dy, bias = torch.randn(9, 5), torch.randn(9, 5), torch.randn(5)
    opcheck(engine_contract.OPS.cuda_forward.default, (x, b, None if pair else bias, pair, False))
    counter = torch.zeros(1, dtype=torch.int32)
    gram = torch.randn(5, 5)
    given = (p, dy, x, b, p, gram) if pair else (None, dy, x, b, None, gram)
    opcheck(engine_contract.OPS.cuda_backward.default, (*given, counter, pair, True, True, not pair, True, False))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck_of_a_loss(head, reduction, emulated):
    x, b, a, c = inputs(9, 16, 5, 5)
    counter, target = torch.zeros(1, dtype=torch.int32), torch.arange(9) % 5
    needs = (True, True, head, head)
    given = (x, b, a if head else None, c if head else None, target, None, counter, 1.0, 1.0, 1.0, -100, reduction)
    opcheck(engine_contract.OPS.cuda_loss.default, (*given, *needs, False, False))


def test_opcheck_of_scale(emulated):
    opcheck(engine_contract.OPS.cuda_scale.default, (torch.tensor(0.5), [torch.randn(3, 4), torch.randn(7)]))


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
