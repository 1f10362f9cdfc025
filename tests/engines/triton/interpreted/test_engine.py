"""The engine as layers use it: one launch each and nothing around them, identities, training, forms, refusals, host cost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import forced, inputs, targets
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import interp_nn
from interp_nn import functional
from interp_nn.engines import eager, select
from interp_nn.engines.triton import engine
from interp_nn.nn import SummaryClassifier, SummaryHead, SummaryLinear

ROOT = Path(interp_nn.__file__).parents[1]


ALLOCATIONS = ("empty", "empty_strided", "new_empty", "empty_like")
VIEWS = (
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "detach",
    "alias",
    "expand",
    "slice",
    "as_strided",
    "split",
    "select",
)


class OnlyAllocations(TorchDispatchMode):
    """Lets pass our operators, allocations and views; anything else would be a launch of its own."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if operator.namespace != "interp_nn" and name not in ALLOCATIONS + VIEWS and not self.harmless(name, args):
            raise AssertionError(f"{operator} between the launches")
        return operator(*args, **(kwargs or {}))

    @staticmethod
    def harmless(name, args):
        """The counter, which a GPU has already, and the gradient of the loss itself, which is PyTorch's."""
        return (name == "zeros" and list(args[0]) == [1]) or (name == "ones_like" and args[0].dim() == 0)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched since."""
    names, launch = [], engine.launch

    def note(plan, *rest):
        names.append(plan.kernel.__name__)
        with _disable_current_modes():  # the interpreter works with tensors of its own
            launch(plan, *rest)

    monkeypatch.setattr(engine, "launch", note)
    monkeypatch.setattr(eager, "check_target", lambda *_: None)  # on the CPU only; a kernel checks for itself
    return names


@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_of_a_layer_are_one_launch_each(bias, launched):
    layer = SummaryLinear(48, 20, bias=bias)
    x, upstream = torch.randn(40, 48, requires_grad=True), torch.randn(40, 20)
    with forced(), OnlyAllocations():
        y = layer(x)
        assert launched == ["stream"]
        y.backward(upstream)
    assert launched == ["stream", "summary_backward"]
    assert layer.weight.grad.stride() == layer.weight.stride()


@pytest.mark.parametrize("name", ["classifier", "head"])
def test_a_loss_with_its_gradients_is_one_launch(name, launched):
    """Backward adds at most one, which scales by the upstream gradient, and finds it to be 1."""
    layer = SummaryClassifier(48, 20) if name == "classifier" else SummaryHead(48, latent=30, num_classes=7)
    x, target = torch.randn(40, 48, requires_grad=True), targets(40, 7)
    with forced(), OnlyAllocations():
        loss = layer.loss(x, target)
        assert launched == ["pair_loss" if name == "classifier" else "flat_loss"]
        loss.backward()
    assert launched[1:] == ["scale_gradients"]
    assert all(p.grad is not None for p in layer.parameters()) and x.grad is not None


def test_a_loss_without_gradients_is_one_launch(launched):
    layer = SummaryHead(48, latent=30, num_classes=7)
    x, target = torch.randn(40, 48), targets(40, 7)
    with forced(), torch.no_grad(), OnlyAllocations():
        layer.loss(x, target)
    assert launched == ["flat_loss"]


def test_a_graph_kept_for_a_second_backward_gives_its_gradients_again(launched):
    x, b = (t.float().requires_grad_() for t in inputs(30, 20, 10))
    target = targets(30, 10)
    with forced():
        loss = functional.summary_cross_entropy(x, b, target)
        first = [g.clone() for g in torch.autograd.grad(loss, (x, b), torch.tensor(3.0), retain_graph=True)]
        second = torch.autograd.grad(loss, (x, b), torch.tensor(0.5))
    exact = torch.autograd.grad(functional.summary_cross_entropy(x.double(), b.double(), target), (x, b))
    for one, two, reference_gradient in zip(first, second, exact, strict=True):
        torch.testing.assert_close(one, 3 * reference_gradient.float(), rtol=2e-5, atol=1e-7)
        torch.testing.assert_close(two, 0.5 * reference_gradient.float(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("needs", ["x", "b", "bias"])
def test_one_gradient_alone(needs):
    x, b = (t.float() for t in inputs(40, 30, 12))
    given = {"x": x, "b": b, "bias": torch.randn(12)}
    given[needs].requires_grad_()
    with forced():
        functional.summary(**given).square().sum().backward()
    found, given[needs].grad = given[needs].grad, None
    functional.summary(**given).square().sum().backward()
    torch.testing.assert_close(found, given[needs].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("form", ["latent", "flat"])
def test_some_gradients_of_a_head(form, needs):
    x, b, a, c = (t.float() for t in inputs(40, 30, 12, 5))
    target = targets(40, 5)
    options = eager.LossOptions((1.0, 2.0, 3.0), -100, "mean")
    wanted = [i in needs for i in range(4)]
    exact = eager.loss(*(t.double() for t in (x, b, a, c)), target, options, form, None, wanted)
    found = engine.loss(x, b, a, c, target, options, form, None, wanted)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=0)
    assert len(found[1]) == len(needs)
    for f, e in zip(found[1], exact[1], strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", [False, True])
def test_a_loss_of_no_rows(head):
    x, b, a, c = (t.float().requires_grad_() for t in inputs(0, 8, 4, 3))
    target = torch.zeros(0, dtype=torch.int64)
    given = (x, b, a, c) if head else (x, b)
    function = functional.summary_head_cross_entropy if head else functional.summary_cross_entropy
    with forced():
        mean, total = (function(*given, target, reduction=reduction) for reduction in ("mean", "sum"))
        grads = torch.autograd.grad(total, given)
    assert torch.isnan(mean) and total == 0
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, given, strict=True))


@pytest.mark.parametrize("name", ["summary", "loss"])
def test_second_derivatives(name):
    """A gradient penalty: the backward of a backward, after kernels have computed the first one."""

    def penalty(x, b, target):
        y = (
            functional.summary(x, b).square().sum()
            if name == "summary"
            else functional.summary_cross_entropy(x, b, target)
        )
        (gx,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(gx.square().sum(), (x, b))

    given, target = inputs(20, 12, 6), targets(20, 6)
    with forced():
        found = penalty(*(t.float().requires_grad_() for t in given), target)
    exact = penalty(*(t.float().double().requires_grad_() for t in given), target)
    for f, e in zip(found, exact, strict=True):
        assert float((f.double() - e).norm() / e.norm()) < 1e-5


def test_no_kept_row():
    x, b = (t.float().requires_grad_() for t in inputs(9, 8, 4))
    with forced():
        loss = functional.summary_cross_entropy(x, b, torch.full((9,), -100))
        gx, gb = torch.autograd.grad(loss, (x, b))
    assert torch.isnan(loss) and not gx.any() and not gb.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_that_is_not_finite_spoils_no_other(dtype):
    x, b = (t.to(dtype) for t in inputs(40, 30, 12))
    bad = x.clone()
    bad[7, 3], bad[20, 29] = float("inf"), float("nan")
    with forced():
        clean, spoilt = functional.summary_pair(x, b), functional.summary_pair(bad, b)
    rest = [i for i in range(40) if i not in (7, 20)]
    for c, s in zip(clean, spoilt, strict=True):
        assert torch.equal(c[rest], s[rest])
        assert not torch.isfinite(s[[7, 20]]).all(1).any()


@pytest.mark.parametrize("layout", ["sliced x", "strided b", "expanded upstream", "batched x"])
def test_any_strides(layout):
    x, b = (t.float() for t in inputs(24, 30, 12))
    upstream = torch.randn(24, 12)
    if layout == "sliced x":
        x = torch.randn(24, 70)[:, 3:63:2]
    elif layout == "strided b":
        b = torch.randn(60, 36)[::2, ::3]
    elif layout == "expanded upstream":
        upstream = torch.randn(1, 1).expand(24, 12)
    else:
        x, upstream = x.view(4, 6, 30), upstream.view(4, 6, 12)
    exact_x, exact_b = x.double().requires_grad_(), b.double().requires_grad_()
    x, b = x.requires_grad_(), b.requires_grad_()
    with forced():
        found = torch.autograd.grad(functional.summary(x, b), (x, b), upstream)
    exact = torch.autograd.grad(functional.summary(exact_x, exact_b), (exact_x, exact_b), upstream.double())
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-4)


def test_homogeneity_is_exact():
    """f(2X, b) = 2 f(X, b) and f(X, 2b) = 8 f(X, b), bit for bit."""
    x, b = (t.float() for t in inputs(40, 30, 12))
    with forced():
        y = functional.summary(x, b)
        assert torch.equal(functional.summary(2 * x, b), 2 * y)
        assert torch.equal(functional.summary(x, 2 * b), 8 * y)


def test_euler_identities():
    """<X, dX> = <dP, P> + <dY, Y> and <b, db> = <dP, P> + 3 <dY, Y>, Y being linear in X and cubic in b."""
    x, b = (t.float().requires_grad_() for t in inputs(40, 30, 12))
    dp, dy = torch.randn(40, 12), torch.randn(40, 12)
    with forced():
        p, y = functional.summary_pair(x, b)
        gx, gb = torch.autograd.grad((p, y), (x, b), (dp, dy))
    along_p, along_y = (dp * p).sum(), (dy * y).sum()
    torch.testing.assert_close((x * gx).sum(), along_p + along_y, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((b * gb).sum(), along_p + 3 * along_y, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "classifier", "head"])
def test_training_follows_the_reference_engine(name):
    """Twelve steps of SGD: the loss curve of the reference engine, to 1e-5 of it, in fp32."""

    def train():
        torch.manual_seed(3)
        x, target = torch.randn(48, 20), torch.randint(5, (48,))
        layer = {
            "linear": lambda: SummaryLinear(20, 5),
            "classifier": lambda: SummaryClassifier(20, 5),
            "head": lambda: SummaryHead(20, latent=16, num_classes=5),
        }[name]()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(layer(x), target) if name == "linear" else layer.loss(x, target)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return torch.tensor(losses)

    with forced():
        ours = train()
    theirs = train()
    assert theirs[-1] < theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_half_precision_under_a_loss_scaler():
    """fp16 gradients are computed with the scale in fp32: a scale of 2^10 is in the result, and in nothing that overflows."""
    x, b = (t.half().requires_grad_() for t in inputs(64, 20, 10))
    target, scale = targets(64, 10), torch.tensor(2.0**10)
    with forced():
        found = torch.autograd.grad(functional.summary_cross_entropy(x, b, target), (x, b), scale)
    exact_inputs = [t.detach().double().requires_grad_() for t in (x, b)]
    exact = torch.autograd.grad(functional.summary_cross_entropy(*exact_inputs, target), exact_inputs)
    for f, e in zip(found, exact, strict=True):
        assert float((f.double() / scale - e).norm() / e.norm()) < 2e-3


def test_bad_targets_are_refused():
    x, b = (t.float() for t in inputs(8, 6, 4))
    with forced(), pytest.raises(ValueError, match="target: got class index 4, want 0 <= index < 4"):
        functional.summary_cross_entropy(x, b, torch.tensor([0, 1, 2, 3, 4, 0, 0, 0]))


def test_what_it_cannot_compute_is_refused_with_the_reason():
    with forced():
        x, b = inputs(8, 6, 4)
        with pytest.raises(RuntimeError, match="asked for, but it has no float64 kernels"):
            functional.summary(x, b)
        x, b = (t.float() for t in inputs(8, 6, 200))
        with pytest.raises(RuntimeError, match="at most 128 columns and classes, not 200 and 200"):
            functional.summary_cross_entropy(x, b, torch.zeros(8, dtype=torch.int64))
        functional.summary(x, b)


def test_automatic_choice_does_not_interpret():
    x = inputs(8, 6, 4)[0].float()
    assert select.engine(select.problem_of(x, 8, 6, 4, False, (True, True)))[0] == "reference"
    assert interp_nn.plan(8, 6, 4).engine == "reference"


OPS = torch.ops.interp_nn


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("form", "k"), [("A", 12), ("A+", 12), ("B", 140), ("A+", 140)])
def test_opcheck(form, k, transposed):
    """Fake kernels promise the shapes and strides that this engine returns too."""
    token, dy = f"triton:{form}", torch.randn(20, k)
    x, b = torch.randn(20, 10), torch.randn(k, 10).t() if transposed else torch.randn(10, k)
    opcheck(OPS.summary.default, (x, b, torch.randn(k), token))
    if form == "A+":
        p, _, kept = OPS.summary_pair(x, b, token)
        opcheck(OPS.summary_pair.default, (x, b, token))
        arguments = (dy, dy, x, b, [p, *kept], token, [True, True, False], transposed)
    else:
        _, kept = OPS.summary(x, b, None, token)
        arguments = (None, dy, x, b, kept, token, [True] * 3, transposed)
    opcheck(OPS.summary_backward.default, arguments)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["A+", "latent", "flat"])
def test_opcheck_of_a_loss(form, transposed):
    head = form != "A+"
    x, b, a, c = (t.float() for t in inputs(20, 10, 6, 4))
    b = b.t().contiguous().t() if transposed else b
    a, c, needs = (a, c, [True] * 4) if head else (None, None, [True, True, False, False])
    arguments = (x, b, a, c, targets(20, 4), [1.0] * 3, -100, "mean", f"triton:{form}", needs, transposed)
    opcheck(OPS.summary_cross_entropy.default, arguments)
    opcheck(OPS.summary_cross_entropy_backward.default, (torch.tensor(2.0), *arguments))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@pytest.mark.parametrize("shape", [(40, 48, 20), (40, 48, 140)], ids=str)
def test_compiled_whole(shape):
    """torch.compile(fullgraph=True) of the operators, forward and backward."""
    x, b = (t.float().requires_grad_() for t in inputs(*shape))
    compiled = torch.compile(
        lambda x, b: functional.summary(x.sin(), b.t().contiguous().t()).cos(), fullgraph=True, backend="aot_eager"
    )
    eager = functional.summary(x.sin(), b).cos()
    with forced():
        out = compiled(x, b)
        found = torch.autograd.grad(out.sum(), (x, b))
    exact = torch.autograd.grad(eager.sum(), (x, b))
    torch.testing.assert_close(out, eager, rtol=1e-4, atol=1e-5)
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_nothing_needs_to_be_patched():
    """With TRITON_INTERPRET=1 alone: grids of one program, on Triton's interpreter as it is."""
    code = """
import torch, interp_nn
from interp_nn.nn import SummaryHead, SummaryLinear
torch.manual_seed(0)
square = lambda layer, x, t: layer(x).square().mean()
head = SummaryHead(40, latent=30, num_classes=7)
for layer, call in ((SummaryLinear(40, 20), square), (SummaryLinear(40, 150), square), (head, SummaryHead.loss)):
    x, t, grads = torch.randn(70, 40), torch.randint(7, (70,)), []
    for name in ("triton", "reference"):
        with interp_nn.use_engine(name):
            layer.zero_grad()
            call(layer, x, t).backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
print("done")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.endswith("done\n"), result.stderr
