"""The engine as layers use it: the tests of every engine, and what this one has besides."""

import engine_contract
import pytest
import torch
from engine_contract import *  # noqa: F403 - the tests of every engine
from harness import forced, inputs, targets
from interpreter import mutated
from processes import python
from torch.utils._python_dispatch import _disable_current_modes

import interp_nn
from interp_nn import functional
from interp_nn.engines import eager, select, verify
from interp_nn.engines.devices import spec_for
from interp_nn.engines.problem import HEAD_ORDERS, Config, LossOptions, Plan
from interp_nn.engines.triton import backward, launches
from interp_nn.engines.triton import engine as triton_engine


@pytest.fixture
def engine():
    names = ("stream", "summary_backward", "pair_loss", "flat_loss", "scale_gradients")
    return engine_contract.Engine("triton", forced, *names)


@pytest.fixture
def launched(monkeypatch):
    names, launch = [], triton_engine.launch

    def note(made, *rest):
        names.append(made.kernel.__name__)
        with _disable_current_modes():  # the interpreter works with tensors of its own
            launch(made, *rest)

    monkeypatch.setattr(triton_engine, "launch", note)
    monkeypatch.setattr(eager, "check_target", lambda *_: None)  # on the CPU only; a kernel checks for itself
    return names


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("order", HEAD_ORDERS)
def test_some_gradients_of_a_head(order, needs):
    x, b, a, c = (t.float() for t in inputs(40, 30, 12, 5))
    target = targets(40, 5)
    options, plan = LossOptions((1.0, 2.0, 3.0), -100, "mean"), Plan("triton", order)
    wanted = [i in needs for i in range(4)]
    exact = eager.loss(*(t.double() for t in (x, b, a, c)), target, options, plan, None, wanted)
    found = triton_engine.loss(x, b, a, c, target, options, plan, None, wanted)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-5, atol=0)
    assert len(found[1]) == len(needs)
    for f, e in zip(found[1], exact[1], strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-6)


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
    assert select.choose_engine(select.problem_of(x, 8, 6, 4, False, (True, True)))[0] == "eager"
    assert interp_nn.plan(8, 6, 4).engine == "eager"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("plan", [Plan("triton", "X(bG)"), Plan("triton", "(Xb)G", saves=True)])
def test_opcheck_of_many_columns(plan, transposed, engine):
    engine_contract.check_operators(engine, plan, transposed, 140)


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_the_flat_loss(transposed, engine):
    engine_contract.check_loss_operators(engine, Plan("triton", "logits_from_x"), transposed)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_compiled_without_a_break_for_many_columns(engine):
    engine_contract.check_compiled(engine, (40, 48, 140))


@pytest.mark.parametrize("d", [100, 512, 1600, 5760, 8192, 8704, 9216, 12288, 17408, 50000, 10**7])
def test_backwards_occupy_the_gpu(d):
    """Column tiles of 128 features on 132 multiprocessors: at most a sixth of the places is idle."""
    strips, spec = -(-d // 128), spec_for((9, 0))
    splits = launches.splits_of(spec, Config((64, 128, 16)), 65536, d, 128)
    turns = -(-strips * splits // spec.multiprocessors)
    assert strips * splits / (turns * spec.multiprocessors) > 5 / 6
    assert splits * d * 128 < 2**31  # kernels address the parts in 32 bits
    assert launches.splits_of(spec, Config((64, 128, 16)), 300, d, 128) <= 2


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
    for name in ("triton", "eager"):
        with interp_nn.use_engine(name):
            layer.zero_grad()
            call(layer, x, t).backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
print("done")
"""
    result = python("-c", code, TRITON_INTERPRET="1")
    assert result.returncode == 0 and result.stdout.endswith("done\n"), result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("degree", [None, 2])
def test_its_kernels_pass_their_verification(dtype, degree, monkeypatch):
    monkeypatch.setattr(verify, "_MOST_ROWS", 150)
    cpu, d, k = torch.device("cpu"), 96, 20
    polynomial = None if degree is None else (degree, True)
    order, more = ("(Xb)G", ()) if degree is None else ("(Xb)q", (True,))
    alone, pair = Plan("triton", order), Plan("triton", order, saves=True)
    asked = [
        ("forward", alone, (True, False), (d, k)),
        ("backward", alone, (False, True, True, True, True, degree is not None), (d, k)),
        ("forward", pair, (False, True), (d, k)),
        ("backward", pair, (True, True, True, True, False, degree is not None), (d, k)),
        ("loss", pair, (False, True, True, True, False, False, *more), (d, k)),
        ("loss", Plan("triton", "logits_from_latent"), (True, True, True, True, True, True, *more), (d, k, 7)),
        ("loss", Plan("triton", "logits_from_x"), (True, True, True, True, True, True, *more), (d, k, 7)),
    ]
    for call, plan, flags, sizes in asked:
        flags = (*flags, *(False,) * (7 - len(flags))) if call == "loss" else flags
        reduction = "mean" if call == "loss" else ""
        variant = verify.variant_of(
            "triton", call, dtype, 4096, sizes, True, plan, flags, cpu, reduction, polynomial, "ieee"
        )  # fmt: skip
        assert len(variant.plan.tiles) == 1
        assert verify.compare(variant, cpu, triton_engine) is None, variant
    scale = verify.Variant("triton", "scale", (torch.float32, dtype, torch.float32))
    assert verify.compare(scale, cpu, triton_engine) is None


def test_a_wrong_kernel_fails_its_verification(monkeypatch):
    monkeypatch.setattr(verify, "_MOST_ROWS", 150)
    cpu, plan, flags = torch.device("cpu"), Plan("triton", "(Xb)G"), (False, True, True, True, False, False)
    variant = verify.variant_of("triton", "backward", torch.bfloat16, 4096, (96, 20), True, plan, flags, cpu)
    with mutated(backward.symmetrized, "tl.load(T + at) + tl.trans(tl.load(T + at))", "2 * tl.load(T + at)"):
        assert verify.compare(variant, cpu, triton_engine).startswith("db: Frobenius error")
    assert verify.compare(variant, cpu, triton_engine) is None
