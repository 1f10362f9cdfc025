"""Uses of models that hold nn.Linear: the same on our layers, or refused in words."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from layers import make
from torch import fx, nn
from torch.fx.experimental import optimization
from torch.fx.passes.shape_prop import ShapeProp

from interp_nn.convert import fold, summarize
from interp_nn.nn import (
    SummaryClassifier,
    SummaryConv2d,
    SummaryHead,
    SummaryLayer,
    SummaryLinear,
    constrain,
    update_spectral_norms,
)
from interp_nn.nn.orthogonality import orthogonality_penalty

KINDS = ["linear", "conv"]
by_kind = pytest.mark.parametrize("kind", KINDS)


@by_kind
def test_the_input_is_called_input(kind):
    layer, x = make(kind)
    assert torch.equal(layer(input=x), layer(x))
    assert torch.equal(layer.freeze()(input=x), layer(x))


# Memory formats: PyTorch's list has the unfrozen layer


def last(t):
    return t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [1, 3], ids=["1x1", "3x3"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [4, 40], ids=["tall", "wide"])
@pytest.mark.parametrize("polynomial", ["summary", "newton-schulz", "pc-3"])
def test_channels_last_stays_wherever_nn_conv2d_keeps_it(size, groups, channels, polynomial):
    layer = SummaryConv2d(4, channels, size, groups=groups, dtype=torch.float64, polynomial=polynomial)
    with torch.no_grad():
        layer.b.mul_(torch.linspace(0.5, 1.5, layer.b.numel(), dtype=torch.float64).view_as(layer.b))
    update_spectral_norms(layer)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    plain, y = layer.fold(), layer(x)
    for module in (layer, plain):
        module.to(memory_format=torch.channels_last)
    assert layer.b.stride() == plain.weight.stride() == layer.fold().weight.stride() == layer.weight.stride()
    back = SummaryConv2d.from_conv2d(plain)
    assert back.b.stride() == plain.weight.stride()
    for frozen in (False, True):
        layer.freeze() if frozen else layer.unfreeze()
        for given in (x, x.to(memory_format=torch.channels_last)):
            got, want = layer(given), plain(given)
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [4, 40], ids=["tall", "wide"])
def test_the_penalty_of_a_channels_last_layer(channels):
    """bbᵀ of a wide b has the order of its rows, which the format changes."""
    layer = SummaryConv2d(4, channels, 3, dtype=torch.float64)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    b = layer.b * torch.linspace(0.5, 1.5, layer.b.numel()).view_as(layer.b)
    found = []
    for module in (layer, other):
        with torch.no_grad():
            module.b.copy_(b)
        constrain(module, "penalty")(torch.randn(1, 4, 5, 5, dtype=torch.float64))
        orthogonality_penalty(module).backward()
        found.append(module.b.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


# Copies


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
@by_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_compiled_layer_is_copied(kind, copied):
    layer, x = make(kind)
    layer.compile(backend="eager")
    y = layer(x)
    other = copied(layer)
    assert torch.equal(other(x), y) and other._compiled_call_impl is None and layer._compiled_call_impl is not None


@pytest.mark.parametrize(
    ("cls", "sizes"), [(SummaryLinear, (6, 4)), (SummaryConv2d, (6, 4, 3)), (SummaryHead, (6, 4, 3))]
)
def test_skip_init_and_the_meta_device(cls, sizes):
    state = torch.get_rng_state()
    layer = nn.utils.skip_init(cls, *sizes)
    assert layer.b.device.type == "cpu" and torch.equal(torch.get_rng_state(), state)
    layer.reset_parameters()
    assert layer.orthogonality_defect() < 1e-5
    meta = cls(*sizes, device="meta").eval()
    assert {name: t.shape for name, t in meta.state_dict().items()} == {
        n: t.shape for n, t in layer.state_dict().items()
    }
    assert meta.spectrum().is_meta


def _double(layers):
    with torch.no_grad():
        layers.get().b.mul_(2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # of Python 3.12
def test_memory_is_shared_between_processes():
    """It is pickled, as for any process; this one is forked, as another takes two seconds to import PyTorch."""
    layer = SummaryLinear(4, 3).share_memory()
    before = layer.b.clone()
    context = multiprocessing.get_context("fork")
    layers = context.SimpleQueue()
    process = context.Process(target=_double, args=(layers,))
    process.start()
    layers.put(layer)
    process.join(60)
    assert process.exitcode == 0 and torch.equal(layer.b, 2 * before)


# Initializers that walk a model


def _each(condition, initialize):
    def walk(model):
        for m in model.modules():
            if condition(m):
                initialize(m)

    return walk


WALKS = {
    "by class": _each(lambda m: isinstance(m, (nn.Linear, nn.Conv2d)), lambda m: nn.init.zeros_(m.weight)),
    "bias": _each(lambda m: getattr(m, "bias", None) is not None, lambda m: nn.init.ones_(m.bias)),
    "reset": _each(lambda m: hasattr(m, "reset_parameters"), lambda m: m.reset_parameters()),
    "parameters": lambda model: [nn.init.xavier_uniform_(p) for p in model.parameters() if p.dim() > 1],
}
REFUSED = {
    "weight": _each(lambda m: hasattr(m, "weight"), lambda m: nn.init.normal_(m.weight)),
    "weight.data": _each(lambda m: hasattr(m, "weight"), lambda m: m.weight.data.normal_()),
    "by the class's name": _each(lambda m: "Linear" in type(m).__name__, lambda m: nn.init.kaiming_normal_(m.weight)),
}


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_initializers_that_walk_a_model(walk):
    model = nn.Sequential(SummaryConv2d(2, 4, 3), nn.Flatten(), SummaryLinear(16, 3))
    before = {name: p.clone() for name, p in model.named_parameters()}
    walk(model)
    assert model(torch.ones(1, 2, 4, 4)).isfinite().all()
    if walk is WALKS["by class"]:  # ours are neither, and keep what they drew
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("walk", REFUSED.values(), ids=REFUSED)
def test_initializers_that_write_the_weight_are_refused(walk):
    with pytest.raises(ValueError, match=r"weight: is computed from b .*set_weight_"):
        walk(nn.Sequential(SummaryLinear(16, 3)))


# torch.fx


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            SummaryConv2d(3, 4, 3, polynomial="newton-schulz"), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
        )
        self.table = SummaryLinear(5, 64)
        self.register_buffer("positions", torch.randn(1, 5))
        self.heads = nn.ModuleDict(
            {"a": SummaryHead(64, 6, 2), "b": SummaryClassifier(64, 3), "c": SummaryLayer(64, 4)}
        )

    def forward(self, x):
        x = self.body(x) + self.table(input=self.positions)  # a constant input, as in Swin
        first, second = self.heads["c"](x)
        return self.heads["a"](x), self.heads["b"](x), first, second


LEAVES = ["body.0", "table", "heads.c", "heads.a", "heads.b"]


class Named(fx.Tracer):
    """A tracer of another class, which has leaves of its own and records where each call is."""

    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, nn.BatchNorm2d)

    def create_proxy(self, kind, target, args, kwargs, *rest, **options):
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        proxy.node.meta["scope"] = self.scope.module_path
        return proxy


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tracer", [fx.Tracer, Named])
def test_layers_are_leaves_for_every_tracer(tracer, frozen):
    model, x = Network().eval(), torch.randn(2, 3, 6, 6)
    if frozen:
        model.body[0].freeze()
        model.table.freeze()
    found = tracer()
    graph = found.trace(model)
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    assert [target for target in calls if target in LEAVES] == LEAVES and "heads.a.output" not in calls
    if tracer is Named:
        assert all(node.meta["scope"] == node.target for node in graph.nodes if node.target in LEAVES)
    traced = fx.GraphModule(model, graph)
    for mode in (False, True):
        got, want = traced.train(mode)(x), model.train(mode)(x)
        assert all(map(torch.equal, torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want)))
    model(x)[-1].sum().backward()  # nothing of the trace is left behind


class Attention(nn.Module):
    """A model that reads a layer's weight, as torchvision's Swin does; in a graph it must not be a copy."""

    def __init__(self):
        super().__init__()
        self.qkv = SummaryLinear(6, 9, dtype=torch.float64)

    def forward(self, x):
        return nn.functional.linear(x, self.qkv.weight, self.qkv.bias)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_weight_read_in_a_graph_is_the_layers(frozen):
    model, x = Attention(), torch.randn(2, 6, dtype=torch.float64)
    if frozen:
        model.qkv.freeze()
    traced = fx.symbolic_trace(model)
    for _ in range(2):
        assert torch.equal(traced(x), model(x))
        with torch.no_grad():
            model.qkv.b.mul_(1.5)
    traced.graph.lint()
    model.qkv.unfreeze()
    grads = [torch.autograd.grad(m(x).sum(), m.qkv.b)[0] for m in (model, traced)]
    assert torch.equal(*grads) and traced.qkv is model.qkv


@pytest.mark.parametrize("kind", ["linear", "conv", "head"])
def test_a_forward_that_a_graph_cannot_hold_is_refused(kind):
    """The graph has calls of modules by their paths; a subclass's forward would be in it twice, a traced layer has no path."""
    base, sizes = {
        "linear": (SummaryLinear, (6, 5)),
        "conv": (SummaryConv2d, (2, 3, 3)),
        "head": (SummaryHead, (6, 5, 3)),
    }[kind]

    class Doubled(base):
        def forward(self, x):
            return 2 * super().forward(x)

    class Derived(base):
        pass

    class Leaf(fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, Doubled)

    with pytest.raises(TypeError, match=rf"^torch\.fx: got a {base.__name__} to trace, want a module that holds it"):
        fx.symbolic_trace(base(*sizes))
    with pytest.raises(
        TypeError, match=r"^torch\.fx: cannot trace Doubled with a subclass's forward, .*is_leaf_module"
    ):
        fx.symbolic_trace(nn.Sequential(Doubled(*sizes)))
    assert "0" in {node.target for node in fx.symbolic_trace(nn.Sequential(Derived(*sizes))).graph.nodes}
    assert "0" in {node.target for node in Leaf().trace(nn.Sequential(Doubled(*sizes))).nodes}


HOOKED = {
    "forward hooks": lambda m: m.register_forward_hook(lambda module, args, y: 2 * y),
    "forward hooks, before": lambda m: m.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "a replaced forward": lambda m: setattr(m, "forward", lambda x, forward=m.forward: 2 * forward(x)),
}


@by_kind
@pytest.mark.parametrize(("name", "hook"), HOOKED.items(), ids=HOOKED)
def test_hooks_that_a_graph_would_run_twice_are_refused(kind, name, hook):
    model = nn.Sequential(make(kind)[0])
    hook(model[0])
    with pytest.raises(
        TypeError, match=rf"^torch\.fx: cannot trace Summary\w+ with {name.partition(',')[0]}, which would"
    ):
        fx.symbolic_trace(model)


def test_passes_over_a_graph():
    model, x = Network().eval(), torch.randn(2, 3, 6, 6)
    traced = fx.symbolic_trace(model)
    ShapeProp(traced).propagate(x)
    shapes = {n.target: n.meta["tensor_meta"].shape for n in traced.graph.nodes if n.target in ("body.0", "table")}
    assert shapes == {"body.0": (2, 4, 4, 4), "table": (1, 64)}
    summarized = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    summarize(summarized)
    fused = optimization.fuse(summarized)
    torch.testing.assert_close(fused(x), summarized(x))
    fold(summarized)
    fused = optimization.fuse(summarized)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    torch.testing.assert_close(fused(x), summarized(x), rtol=1e-4, atol=1e-5)


# TorchScript


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: nn.Sequential(nn.ReLU(), nn.Sequential(m))], ids=["itself", "inside"]
)
@pytest.mark.parametrize(
    "layer", [SummaryLinear(4, 3), SummaryConv2d(2, 3, 3), SummaryHead(4, 3, 2)], ids=lambda m: type(m).__name__
)
def test_scripting_is_refused_in_words(layer, wrap):
    name = type(layer).__name__
    with pytest.raises(TypeError, match=rf"^torch\.jit\.script: cannot compile {name}; call interp_nn\.convert\.fold"):
        torch.jit.script(wrap(layer))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.*:DeprecationWarning")
def test_what_the_refusal_names_works():
    model, x = nn.Sequential(SummaryConv2d(2, 3, 3), nn.Flatten(), SummaryLinear(12, 3)).eval(), torch.randn(2, 2, 4, 4)
    y, file = model(x), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x[:1]), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), y)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)
    fold(model)
    torch.testing.assert_close(torch.jit.script(model)(x), y)


def test_a_sharded_layer_wants_its_input_by_position():
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import DeviceMesh

    from interp_nn.nn.parallel import parallelize

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        model = parallelize(nn.Sequential(SummaryLinear(4, 3)), DeviceMesh("cpu", [0]), {"0": "rows"})
        assert model(torch.ones(2, 4)).shape == (2, 3)
        with pytest.raises(TypeError, match=r"^0: input: got it by keyword, want it by position"):
            model[0](input=torch.ones(2, 4))
    finally:
        distributed.destroy_process_group()
