"""The cuda engine as layers use it, with the emulator in the place of a GPU."""

import contextlib

import pytest
import torch
from support import naive, naive_cross_entropy, naive_head_cross_entropy, naive_pair
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import interp_nn
from interp_nn import engines, functional
from interp_nn.engines import select
from interp_nn.engines.cuda import engine
from interp_nn.engines.devices import KNOWN, Chip
from interp_nn.nn import SummaryClassifier, SummaryHead, SummaryLinear

OPS = torch.ops.interp_nn


CHIP = (3, 163 * 1024, 80)  # what csrc/device.h says


@pytest.fixture
def forced(mirror, monkeypatch):
    """use_engine("cuda") on the CPU."""
    chip = Chip((8, 0), CHIP[0], CHIP[1], 1.0, 1.0)
    monkeypatch.setitem(engines._reasons, "cuda", None)
    monkeypatch.setattr(select, "interpreting", lambda: True)
    monkeypatch.setattr(select, "chip_of", lambda device: chip)

    @contextlib.contextmanager
    def force():
        functional._plans.clear()
        with interp_nn.use_engine("cuda"):
            yield
        functional._plans.clear()

    return force


@pytest.fixture
def launched(monkeypatch):
    """The names of the operators launched since."""
    names, launch = [], engine.launch

    def note(operator, *arguments):
        names.append(operator.overloadpacket.__name__)
        return launch(operator, *arguments)

    monkeypatch.setattr(engine, "launch", note)
    return names


class OnlyLaunches(TorchDispatchMode):
    """Lets pass our operators, allocations and views; anything else would be a launch of its own."""

    HARMLESS = ("empty", "empty_strided", "new_empty", "view", "t", "transpose", "detach", "alias", "expand")

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        counter = name == "zeros" and list(args[0]) == [1]
        own = name == "ones_like" and args[0].dim() == 0  # of autograd itself
        if operator.namespace != "interp_nn" and name not in self.HARMLESS and not counter and not own:
            raise AssertionError(f"{operator} between the launches")
        with torch.utils._python_dispatch._disable_current_modes():
            return operator(*args, **(kwargs or {}))


def inputs(*shape, dtype=torch.float32):
    n, d, k, *m = shape
    x, b = torch.randn(n, d, dtype=dtype), torch.randn(k, d, dtype=dtype).mul_(d**-0.5).T
    if not m:
        return x, b
    return x, b, torch.randn(m[0], k, dtype=dtype).mul_(k**-0.5), torch.randn(m[0], dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_of_a_layer_are_one_launch_each(bias, forced, launched):
    layer = SummaryLinear(48, 20, bias=bias)
    x, upstream = torch.randn(40, 48, requires_grad=True), torch.randn(40, 20)
    with forced(), OnlyLaunches():
        y = layer(x)
        assert launched == ["cuda_forward"]
        y.backward(upstream)
    assert launched == ["cuda_forward", "cuda_backward"]
    assert layer.weight.grad.stride() == layer.weight.stride()


@pytest.mark.parametrize("name", ["classifier", "head"])
def test_a_loss_with_its_gradients_is_one_launch(name, forced, launched):
    """Backward adds at most one, which scales by the upstream gradient, and finds it to be 1."""
    layer = SummaryClassifier(48, 7) if name == "classifier" else SummaryHead(48, latent=30, num_classes=7)
    x, target = torch.randn(40, 48, requires_grad=True), torch.randint(7, (40,))
    with forced(), OnlyLaunches():
        loss = layer.loss(x, target)
        assert launched == ["cuda_loss"]
        loss.backward()
    assert launched[1:] == ["cuda_scale"]
    assert all(p.grad is not None for p in layer.parameters()) and x.grad is not None


FUNCTIONS = {
    "summary": (functional.summary, naive, (33, 40, 20)),
    "pair": (lambda x, b: tuple(functional.summary_pair(x, b)), naive_pair, (33, 40, 20)),
    "projection": (
        lambda x, b: functional.summary_pair(x, b).projection,
        lambda x, b: naive_pair(x, b)[0],
        (33, 40, 20),
    ),
    "loss": (
        lambda x, b: functional.summary_cross_entropy(x, b, TARGET, weights=(0.7, 1.3, 0.9)),
        lambda x, b: naive_cross_entropy(x, b, TARGET, weights=(0.7, 1.3, 0.9)),
        (33, 40, 10),
    ),
    "head": (
        lambda x, b, a, c: functional.summary_head_cross_entropy(x, b, a, c, TARGET),
        lambda x, b, a, c: naive_head_cross_entropy(x, b, a, c, TARGET),
        (33, 40, 20, 10),
    ),
}
TARGET = (torch.arange(33) % 11).where(torch.arange(33) % 11 < 10, -100)


def both(function, tensors, scale):
    """The results and gradients of a function."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((o.double() * torch.linspace(0.5, 1.5, o.numel()).view(o.shape)).sum() for o in out)
    return [*out, *torch.autograd.grad(total * scale, tensors)]


@pytest.mark.parametrize("order", ["layer's", "row-major", "strided"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name, order, forced):
    function, expression, shape = FUNCTIONS[name]
    tensors = list(inputs(*shape))
    if order != "layer's":
        tensors[1] = tensors[1].contiguous()
    if order == "strided":
        tensors[1] = torch.stack((tensors[1], tensors[1]), 2)[:, :, 0]
    with forced():
        found = both(function, tensors, 0.25)
    exact = both(expression, [t.double() for t in tensors], 0.25)
    for got, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(got, truth.float(), rtol=1e-4, atol=1e-5)


def test_under_a_loss_scaler_half_precision_does_not_underflow(forced):
    x, b = inputs(64, 24, 10, dtype=torch.float16)
    x, b, target = x.requires_grad_(), b.requires_grad_(), torch.arange(64) % 10
    scale = torch.tensor(2.0**14)
    with forced():
        found = torch.autograd.grad(functional.summary_cross_entropy(x, b, target), (x, b), scale)
    exact = [t.detach().double().requires_grad_() for t in (x, b)]
    truth = torch.autograd.grad(functional.summary_cross_entropy(*exact, target), exact)
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got.double() / scale, want, rtol=2e-2, atol=2e-5)


def test_a_graph_kept_for_a_second_backward_gives_its_gradients_again(forced):
    x, b = (t.requires_grad_() for t in inputs(30, 20, 10))
    target = torch.arange(30) % 10
    with forced():
        loss = functional.summary_cross_entropy(x, b, target)
        first = [g.clone() for g in torch.autograd.grad(loss, (x, b), torch.tensor(3.0), retain_graph=True)]
        second = torch.autograd.grad(loss, (x, b), torch.tensor(0.5))
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, 6 * two)


@pytest.mark.parametrize("shape", [(0, 8, 4), (5, 0, 4), (3, 2, 0)], ids=str)
def test_what_is_empty_is_left_to_the_reference_engine(shape, forced, launched):
    x, b = (
        (t.requires_grad_() for t in inputs(*shape[:2], shape[2])) if shape[1] else (torch.ones(5, 0), torch.ones(0, 4))
    )
    with forced():
        y = functional.summary(x, b)
    assert y.shape == (shape[0], shape[2]) and not bool(y.any()) and not launched


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_compiled_without_a_break(forced):
    layer = SummaryLinear(24, 12)
    x = torch.randn(30, 24)
    with forced():
        compiled = torch.compile(lambda t: layer(t).square().sum(), fullgraph=True, backend="aot_eager")
        compiled(x).backward()
        found, layer.weight.grad = layer.weight.grad, None
        layer(x).square().sum().backward()
    torch.testing.assert_close(found, layer.weight.grad)


@pytest.mark.parametrize("pair", [False, True])
def test_opcheck_of_forward_and_backward(pair, mirror):
    x, b = inputs(9, 16, 5)
    p, dy, bias = torch.randn(9, 5), torch.randn(9, 5), torch.randn(5)
    opcheck(OPS.cuda_forward.default, (x, b, None if pair else bias, pair, False))
    counter = torch.zeros(1, dtype=torch.int32)
    gram = torch.randn(5, 5)
    given = (p, dy, x, b, p, gram) if pair else (None, dy, x, b, None, gram)
    opcheck(OPS.cuda_backward.default, (*given, counter, pair, True, True, not pair, True, False))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck_of_a_loss(head, reduction, mirror):
    x, b, a, c = inputs(9, 16, 5, 5)
    counter, target = torch.zeros(1, dtype=torch.int32), torch.arange(9) % 5
    needs = (True, True, head, head)
    given = (x, b, a if head else None, c if head else None, target, None, counter, 1.0, 1.0, 1.0, -100, reduction)
    opcheck(OPS.cuda_loss.default, (*given, *needs, False, False))


def test_opcheck_of_scale(mirror):
    opcheck(OPS.cuda_scale.default, (torch.tensor(0.5), [torch.randn(3, 4), torch.randn(7)]))


@pytest.mark.parametrize("form", ["A", "A+"])
def test_opcheck_of_the_public_operators(form, mirror):
    x, b = inputs(9, 16, 5)
    operator = OPS.summary.default if form == "A" else OPS.summary_pair.default
    opcheck(operator, (x, b, None, "cuda:A") if form == "A" else (x, b, "cuda:A+"))


CHIPS = [*KNOWN, Chip((9, 0), 1, 99 * 1024, 1.0, 1.0)]


def complaint(function, *arguments):
    """What a launcher says it cannot do, or None."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("k", [16, 64, 65, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda c: f"{c.name}-{c.shared}")
def test_dispatch_refuses_what_the_library_refuses(mirror, chip, dtype, k):
    """Run for one row: what does not fit is refused with a reason by both, and everything else by neither."""
    kind = mirror.Kind.F32 if dtype == torch.float32 else mirror.Kind.BF16

    def array(*shape):
        return torch.zeros(shape, dtype=torch.int16 if dtype == torch.bfloat16 else torch.float32).numpy()

    def refused(classes=None, head=False):
        return engines.refusal("cuda", chip, chip.name, dtype, 1, 16, k, classes, head) is not None

    x, b, g, y = array(1, 16), array(k, 16), array(k, k), array(1, k)
    target, value = torch.zeros(1, dtype=torch.int64).numpy(), torch.zeros(1).numpy()
    terms = mirror.LossTerms(target, None, value, -100, 1.0, 1.0, 1.0, mirror.Reduction.mean)
    given = mirror.Chip(1, chip.shared, 10 * chip.capability[0] + chip.capability[1])
    tail = mirror.Sizes(1, 16, k, 1, 16, kind), given, 1
    said = [
        complaint(mirror.forward, x, b, None, y, y, g, *tail),
        complaint(mirror.pair_backward, x, b, y, g, y, y, x, b, True, *tail),
        complaint(mirror.summary_backward, x, b, g, y, x, b, None, True, *tail),
    ]
    assert refused() == any(said), said
    said = complaint(mirror.pair_loss, x, b, terms, x, b, True, *tail)
    assert refused(k) == (said is not None), said
    for m in (10, 16, 17, 128):
        a = array(m, k)
        said = complaint(mirror.head_loss, x, b, a, None, terms, x, b, a, None, m, True, *tail)
        assert refused(m, head=True) == (said is not None), f"{m} classes: {said}"
