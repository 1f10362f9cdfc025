"""Layers inside networks, compiled and exported: whole graphs, any batch, the values of eager mode."""

import copy
import functools

import pytest
import torch
from saving import reloaded
from system_networks import batch, cnn, head, mlp
from torch.nn import functional as F

# Dynamo makes an instance of a Function to trace it by, of which PyTorch's own Function warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
NETWORKS = {"mlp": mlp, "cnn": cnn, "head": head, "head in evaluation": lambda: head().eval()}
networks = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def steps(model, loss, sizes):
    """Losses of steps on batches of these sizes."""
    torch.manual_seed(5)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for n in sizes:
        x, target = batch(n)
        optimizer.zero_grad()
        value = loss(x, target)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses)


def loss_of(model, **options):
    if hasattr(model, "loss"):
        return functools.partial(model.loss, **options)
    return lambda x, target: F.cross_entropy(model(x), target)


def check_training(build, backend="inductor", **options):
    model = build()
    twin = copy.deepcopy(model)
    compiled = torch.compile(loss_of(twin, **options), fullgraph=True, dynamic=True, backend=backend)
    sizes = (16, 33, 7, 16)
    close(steps(twin, compiled, sizes), steps(model, loss_of(model, **options), sizes))
    close(list(twin.parameters()), list(model.parameters()))


@pytest.mark.parametrize(
    ("build", "options"),
    [
        pytest.param(mlp, {}, marks=pytest.mark.slow),  # the linear layer and tanh are in the cnn
        (cnn, {}),
        pytest.param(head, {}, marks=pytest.mark.slow),  # its loss is compiled by tests of the operator
        (head, {"consistency": "latent"}),
    ],
    ids=["mlp", "cnn", "head", "latent head"],
)
def test_training_on_batches_of_any_size_is_one_graph(build, options):
    check_training(build, "aot_eager", **options)


@pytest.mark.slow  # strict export, below, takes no break either
@networks
def test_no_graph_breaks(build):
    found = torch._dynamo.explain(build())(batch()[0])
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize("strict", [False, True])
@networks
def test_export_for_any_batch(build, strict):
    model = build()
    program = torch.export.export(model, (batch(5)[0],), dynamic_shapes=({0: torch.export.Dim("n")},), strict=strict)
    graphs = [module.graph for module in program.graph_module.modules() if hasattr(module, "graph")]
    names = {str(node.target) for graph in graphs for node in graph.nodes}
    operator = {"mlp": "interp_nn.summary.default", "head": "interp_nn.summary_pair.default"}.get(build.__name__)
    assert operator is None or operator in names
    for n in (5, 1, 64):
        x = batch(n)[0]
        close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of PyTorch 2.10's own loading
def test_export_is_saved_and_loaded():
    model, x = mlp(), batch()[0]
    loaded = reloaded(torch.export.export(model, (batch()[0],)), torch.export.save, torch.export.load)
    close(loaded.module()(x), model(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of inductor's own imports
@pytest.mark.parametrize("build", [mlp, head])
def test_training_in_inductor(build):
    check_training(build)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # of inductor's
def test_ahead_of_time_inductor(tmp_path):
    model = mlp()
    with torch.no_grad():
        program = torch.export.export(model, (batch(5)[0],), dynamic_shapes=({0: torch.export.Dim("n", max=512)},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for n in (5, 2, 77):
            x = batch(n)[0]
            close(loaded(x), model(x))
