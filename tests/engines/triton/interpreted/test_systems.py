"""PyTorch's systems around the triton engine: DTensors of rows, checkpoints and compiled graphs launch its kernels."""

import pytest
import torch
import torch.distributed as dist
from harness import forced
from support import errors, leaves, naive
from torch.utils.checkpoint import checkpoint

from interp_nn import functional
from interp_nn.engines.triton import engine

pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")


@pytest.fixture
def launches(monkeypatch):
    seen, launch = [], engine.launch
    monkeypatch.setattr(engine, "launch", lambda kernel, *args: seen.append(kernel) or launch(kernel, *args))
    return seen


def inputs():
    return tuple(torch.randn(*shape) for shape in ((33, 20), (20, 7), (7,)))


def gradients(function, given):
    given = leaves(*given)
    y = function(*given)
    found = torch.autograd.grad(y.square().sum(), given)
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (y.detach(), *found)]


def compare(function, given, place=lambda t: t):
    with forced():
        found = gradients(function, [place(t) for t in given])
    for got, exact in zip(found, gradients(naive, [t.double() for t in given]), strict=True):
        assert errors(got, exact)[0] < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.distributed's own imports
def test_a_dtensor_of_rows_is_one_launch_each_way(launches):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

        mesh = init_device_mesh("cpu", (1,))
        compare(functional.summary, inputs(), lambda t: DTensor.from_local(t, mesh, [Replicate()]))
    finally:
        dist.destroy_process_group()
    assert len(launches) == 2


def test_a_checkpoint_launches_the_forward_again(launches):
    compare(lambda *given: checkpoint(functional.summary, *given, use_reentrant=False), inputs())
    assert len(launches) == 3


def test_a_compiled_graph_launches_each_once(launches):
    torch.compiler.reset()
    compare(torch.compile(functional.summary, fullgraph=True, backend="aot_eager"), inputs())
    assert len(launches) == 2
    torch.compiler.reset()
