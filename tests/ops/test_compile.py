"""torch.compile, torch.export and checkpointing see one operator, and give what eager mode gives."""

import functools

import pytest
import torch
from functorch.compile import make_boxed_func
from support import leaves
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from interp_nn import functional
from interp_nn.ops import remembered

# Dynamo makes an instance of a Function to trace it by, of which PyTorch's own Function warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")


def summary(x, b, bias):
    return functional.summary(x, b, bias)


def without_bias(x, b, _):
    return functional.summary(x, b)


def of_a_weight(x, b, _):
    return functional.summary(x, b.t().contiguous().t())


def batched(x, b, bias):
    return functional.summary(x.unflatten(0, (2, -1)), b, bias)


def pair(x, b, _):
    return torch.cat(functional.summary_pair(x.unflatten(0, (2, -1)), b), -1).flatten(0, 1)


def target_for(x):
    return (torch.arange(x.shape[0]) % 4).where(torch.arange(x.shape[0]) % 4 < 3, -100)


def cross_entropy(x, b, _):
    return functional.summary_cross_entropy(x, b, target_for(x))


def cross_entropy_of_rows(x, b, _):
    return functional.summary_cross_entropy(x, b, target_for(x), reduction="none", weights=(1.0, 0.5, 2.0))


def head(x, b, c):
    return functional.summary_head_cross_entropy(
        x, b, torch.arange(12.0, dtype=x.dtype).view(4, 3) / 12, c, target_for(x)
    )


# Each with the operator that must be in its graph, and the length of its last argument.
CALLS = {
    summary: ("summary", 3),
    without_bias: ("summary", 3),
    of_a_weight: ("summary", 3),
    batched: ("summary", 3),
    pair: ("summary_pair", 3),
    cross_entropy: ("summary_cross_entropy", 3),
    cross_entropy_of_rows: ("summary_cross_entropy", 3),
    head: ("summary_cross_entropy", 4),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs(call, n=8, dtype=torch.float32):
    return tuple(0.5 * torch.randn(*shape, dtype=dtype) for shape in ((n, 5), (5, 3), (CALLS[call][1],)))


def run(function, given):
    given = leaves(*given)
    out = function(*given)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), given, allow_unused=True)]


def recording(targets):
    """An aot_eager backend that notes the names of what is in its graphs."""

    def note(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    return aot_autograd(fw_compiler=note, bw_compiler=note)


def marked(call, dynamic):
    """Slow where another case traces the same lines: with a bias, without a reduction, of any size; a head's loss as trained."""
    slow = not dynamic or call in (without_bias, of_a_weight, batched, cross_entropy, head)
    return pytest.param(call, dynamic, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(
    ("call", "dynamic"),
    [*(marked(call, True) for call in CALLS), *(marked(call, False) for call in (summary, pair, head))],
)
def test_compiled_equals_eager(call, dynamic):
    targets = []
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=recording(targets))
    for n in (8, 200) if dynamic else (8,):
        given = inputs(call, n)
        torch.testing.assert_close(run(compiled, given), run(call, given), rtol=1e-5, atol=1e-5)
    operator = CALLS[call][0]
    assert f"interp_nn.{operator}.default" in targets
    backward = "summary_backward" if operator != "summary_cross_entropy" else "summary_cross_entropy_backward"
    assert (f"interp_nn.{backward}.default" in targets) == (call not in (cross_entropy, head))


def test_many_sizes_share_few_graphs():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(summary, fullgraph=True, backend=counter)
    for n in (8, 9, 13, 23):
        given = inputs(summary, n)
        torch.testing.assert_close(run(compiled, given), run(summary, given), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 3


def test_no_gradients():
    compiled = torch.compile(summary, fullgraph=True, backend="aot_eager")
    given = inputs(summary)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), summary(*given))


@pytest.mark.parametrize("call", [summary, pair, cross_entropy], ids=lambda call: call.__name__)
def test_compiled_under_autocast(call):
    given = inputs(call)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = run(compiled, given), run(call, given)
    assert got[0].dtype == (torch.float32 if call is cross_entropy else torch.bfloat16)
    assert all(g is None or g.dtype == torch.float32 for g in got[1:])
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_errors_are_raised_while_compiling():
    compiled = torch.compile(lambda x, b: functional.summary(x, b), backend="aot_eager")
    with pytest.raises(ValueError, match=r"x: got shape \(8, 5\), want \(\.\.\., 4\)"):
        compiled(torch.randn(8, 5), torch.randn(4, 3))


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda b, x: f(x, b).square().sum()),
    "vmap": lambda f: torch.vmap(lambda b, x: f(x, b), (None, 0)),
    "jvp": lambda f: lambda b, x: torch.func.jvp(lambda b: f(x, b), (b,), (b,)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_inside_of_compiled_code(name):
    def both(x, b):
        return functional.summary(x, b).sum() + torch.cat(functional.summary_pair(x, b)).square().sum()

    def loss(x, b):
        return functional.summary_cross_entropy(x, b, torch.arange(8) % 3)

    b, x = torch.randn(5, 3), torch.randn(2, 8, 5)
    x = x if name == "vmap" else x[0]
    for call in (both, loss) if name == "grad" else (both,):
        function = TRANSFORMS[name](call)
        got = torch.compile(function, fullgraph=True, backend="aot_eager")(b, x)
        torch.testing.assert_close(got, function(b, x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of inductor's own imports
@pytest.mark.parametrize("n", [8, 4096])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_inductor(call, n):
    """Many rows and few columns make the engine choose its memory orders, which the generated code takes at its word."""
    given = inputs(call, n, torch.float64)
    torch.testing.assert_close(run(torch.compile(call, fullgraph=True), given), run(call, given))


@pytest.mark.parametrize("of_a_head", [False, True])
def test_export_of_a_loss(of_a_head):
    """Also with a symbolic number of rows."""

    class Loss(torch.nn.Module):
        def forward(self, x, b, a, target):
            if of_a_head:
                return functional.summary_head_cross_entropy(x, b, a, None, target)
            return functional.summary_cross_entropy(x, b, target)

    b, a = torch.randn(9, 4), torch.randn(3, 4)
    rows = torch.export.Dim("n")

    def arguments(n):
        return torch.randn(n, 9), b, a, torch.arange(n) % 3

    program = torch.export.export(Loss(), arguments(5), dynamic_shapes=({0: rows}, None, None, {0: rows}))
    for n in (5, 2, 40):
        given = arguments(n)
        torch.testing.assert_close(program.module()(*given), Loss()(*given))


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing_by_operator(policy, monkeypatch):
    """Saved, the operator runs once; recomputed, twice; the gradients are the same bits either way."""
    from interp_nn.engines import eager, orders

    monkeypatch.setattr(orders, "OPERATOR_OVERHEAD", 0)  # an operator even at this size
    monkeypatch.setattr(remembered, "plans", {})
    calls, forward = [], eager.forward
    monkeypatch.setattr(eager, "forward", lambda *args: calls.append(1) or forward(*args))

    def choose(ctx, operator, *args, **kwargs):
        return policy if operator is torch.ops.interp_nn.summary.default else CheckpointPolicy.PREFER_RECOMPUTE

    def function(x, b, bias):
        return functional.summary(x.sin(), b, bias).cos()

    def checkpointed(*given):
        context = functools.partial(create_selective_checkpoint_contexts, choose)
        return checkpoint(function, *given, use_reentrant=False, context_fn=context)

    given = inputs(summary)
    got = run(checkpointed, given)
    assert len(calls) == (1 if policy == CheckpointPolicy.MUST_SAVE else 2)
    assert all(torch.equal(g, e) for g, e in zip(got, run(function, given), strict=True))
