"""A launch by a remembered kernel is the launch that Triton itself would make; kernels are replaced by nothing."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.timing import host
from interp_nn import functional
from interp_nn.engines.devices import interpreting
from interp_nn.engines.problem import LossOptions, Plan
from interp_nn.engines.triton import configs, engine

if interpreting():
    pytest.skip("Triton interprets in this process", allow_module_level=True)


class Ran:
    """Launches that reached the driver, and how many of them Triton's own call made."""

    def __init__(self, monkeypatch):
        from triton.runtime.jit import JITFunction

        self.given, self.by_triton = [], 0
        run = JITFunction.run

        def count(*args, **kwargs):
            self.by_triton += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(JITFunction, "run", count)
        monkeypatch.setattr(host._Kernel, "run", staticmethod(lambda *given: self.given.append(given)))

    def last(self):
        """The last launch: grid, stream, function and metadata; then its arguments, tensors as addresses."""
        head, arguments = self.given[-1][:6], self.given[-1][9:]
        return head, [a.data_ptr() if isinstance(a, torch.Tensor) else 0 if a is None else a for a in arguments]


@pytest.fixture
def ran(monkeypatch):
    configs._forget()
    with host._stubbed_launches():
        yield Ran(monkeypatch)
    configs._forget()


def stream(n=64, d=64, k=16, dtype=torch.bfloat16, bias=True, offset=0):
    """The arguments of a launch of the forward, its first tensor so many elements from an aligned address."""
    made = engine._stream_launch((), engine._spec(torch.device("cpu")), dtype, n, d, k, False, "tf32", None)
    x = torch.zeros(n * d + 8, dtype=dtype)[offset : offset + n * d].view(n, d)
    b, y, g = (torch.zeros(*shape, dtype=dtype) for shape in ((d, k), (n, k), (k, k)))
    return made, x.device, x, b, torch.zeros(k, dtype=dtype) if bias else None, None, y, g, None, None, None, n, d


def test_a_remembered_kernel_gets_what_triton_gives_it(ran):
    given = stream()
    for _ in range(2):
        engine.launch(*given)
    by_triton = ran.last()
    for _ in range(3):
        engine.launch(*given)
        assert ran.last() == by_triton
    assert ran.by_triton == 2 and len(ran.given) == 5


@pytest.mark.parametrize(
    "other", [{"bias": False}, {"offset": 1}, {"dtype": torch.float16}, {"n": 65}, {"d": 63}], ids=str
)
def test_another_launch_is_another_kernel(other, ran):
    """An argument that is None, an address that is not aligned, another dtype or size."""
    for _ in range(3):
        engine.launch(*stream())
    kernel = ran.given[-1]
    mixed = stream(**other)
    if "dtype" in other:  # the same launch, which an operator can be given tensors of other dtypes for
        mixed = (stream()[0], *mixed[1:])
    before = ran.by_triton
    for _ in range(3):
        engine.launch(*mixed)
    assert ran.by_triton - before == (3 if "offset" in other else 1 if {"bias", "dtype"} & set(other) else 2)
    before = ran.by_triton
    engine.launch(*stream())
    assert ran.by_triton == before and ran.given[-1][:6] == kernel[:6]


def test_hooks_and_other_versions_go_by_triton(ran, monkeypatch):
    from triton import knobs

    called = []
    for _ in range(3):
        engine.launch(*stream())
    before = ran.by_triton
    knobs.runtime.launch_enter_hook.add(called.append)
    try:
        engine.launch(*stream())
    finally:
        knobs.runtime.launch_enter_hook.remove(called.append)
    assert ran.by_triton == before + 1
    configs._forget()
    monkeypatch.setattr(engine, "_TESTED", False)
    before = ran.by_triton
    for _ in range(4):
        engine.launch(*stream())
    assert ran.by_triton == before + 4


def test_tensors_of_another_device_go_by_triton(ran, monkeypatch):
    """Triton's own launch raises for them, and a remembered one would read from a foreign address."""
    for _ in range(3):
        engine.launch(*stream())
    before = ran.by_triton

    class OnGpu(torch.Tensor):
        is_cuda = True

    made, device, x, *rest = stream()
    engine.launch(made, device, x.as_subclass(OnGpu), *rest)
    engine.launch(made, device, x.as_subclass(OnGpu), *rest)
    assert ran.by_triton == before + 2


@pytest.mark.parametrize("call", ["forward", "backward", "pair", "loss", "head", "scale", "wide"])
def test_every_kernel_is_remembered(call, ran):
    n, d, k, m = 64, 48, 16, 4
    k = 160 if call == "wide" else k
    x, b, dy, a, c = (torch.randn(*shape) for shape in ((n, d), (d, k), (n, k), (m, k), (m,)))
    target, g, options = (
        torch.zeros(n, dtype=torch.int64),
        torch.randn(k, k),
        LossOptions((1.0, 0.5, 1.0), -100, "mean"),
    )
    alone, pair = Plan("triton", "(Xb)G"), Plan("triton", "(Xb)G", saves=True)
    calls = {
        "forward": lambda: engine.forward(x, b, None, alone, False),
        "backward": lambda: engine.backward(None, dy, x, b, [g], alone, True, True, True),
        "pair": lambda: engine.backward(dy, dy, x, b, [dy, g], pair, True, True),
        "loss": lambda: engine.loss(x, b, None, None, target, options, pair, None, (True, True, False, False)),
        "head": lambda: engine.loss(x, b, a, c, target, options, Plan("triton", "logits_from_x"), None, (True,) * 4),
        "scale": lambda: engine.scale([x, b], torch.ones(())),
        "wide": lambda: engine.forward(x, b, None, pair, True),
    }
    for _ in range(2):
        calls[call]()
    before = ran.by_triton
    calls[call]()
    assert ran.by_triton == before and len(ran.given) == 3


def test_the_precision_follows_pytorchs_switch(ran, monkeypatch):
    """Also of the remembered plan."""
    x, b = torch.randn(64, 64), torch.randn(64, 16)
    place = engine._stream_launch((), engine._spec(x.device), x.dtype, 64, 64, 16, False, "tf32", None).kernel.arg_names

    def precision():
        functional.summary(x, b)
        return ran.given[-1][9 + place.index("PRECISION")]

    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        for _ in range(3):
            for setting, wanted in (("tf32", "tf32"), ("ieee", "tf32x3")):
                switch.fp32_precision = setting
                assert precision() == wanted
    finally:
        switch.fp32_precision = before
