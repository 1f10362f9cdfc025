import copy

import pytest
import torch
from explained_networks import functional, mlp, resnet, transformer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from interp_nn.explain import ActivationPatterns
from interp_nn.explain.following.calls import UnsupportedOperation
from interp_nn.explain.following.gate_record import frozen, record, supported_ops
from interp_nn.explain.linear.affine_map import linearize
from interp_nn.explain.linear.regions import region

DTYPE = torch.float64
LSTM = nn.LSTM(6, 6, dtype=DTYPE)
NETWORKS = {"resnet": (resnet, (3, 32, 32)), "functional": (functional, (6,)), "transformer": (transformer, (5, 8))}


def batch(shape, n=2):
    return torch.randn(n, *shape, dtype=DTYPE)


def test_sites_are_numbered_by_call_and_named_by_path():
    model, x = functional(), batch((6,))
    seen = record(model, x)
    assert [site.name for site in seen.sites] == [":relu#0", "relu", "relu#1"]
    assert [site.operation for site in seen.sites] == ["relu"] * 3 and seen.sites[0].shape == (12,)
    a = model.first(x)
    b = model.again(a.relu())
    c = model.again(b.relu()) - 0.3
    for i, z in enumerate((a, b, c)):
        assert torch.equal(seen.preactivations(i), z) and torch.equal(seen.gates(seen.sites[i].name), z > 0)
    assert torch.equal(seen.output, model(x)) and not seen.output.requires_grad
    assert seen.patterns() == ActivationPatterns.from_preactivations([a, b, c])
    assert seen.patterns(["relu#1", 0]) == ActivationPatterns.from_preactivations([c, a])
    assert torch.equal(seen.margin(), torch.cat([a, b, c], 1).abs().amin(1))
    assert repr(seen) == "GateRecord(2 samples, 3 sites, 36 gates)"


def test_sites_of_a_residual_network():
    names = [site.name for site in record(resnet(2), batch((3, 32, 32))).sites]
    assert names[:4] == ["relu", "maxpool", "layer1.0.relu", "layer1.0.relu#1"] and len(names) == 18


def test_in_place_calls_do_not_reach_what_is_recorded():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).to(DTYPE), batch((6,))
    before = x.clone()
    seen = record(nn.Sequential(nn.ReLU(inplace=True), model), x)
    assert torch.equal(x, before)
    assert torch.equal(seen.preactivations("0"), x) and torch.equal(seen.preactivations("1.1"), model[0](x.relu()))


def test_clipped_units_have_a_gate_for_each_breakpoint():
    z = torch.tensor([[-1.0, 0.0, 3.0, 6.0, 7.0]], dtype=DTYPE)
    seen = record(nn.ReLU6(), z)
    assert seen.sites[0].shape == (2, 5)
    assert torch.equal(seen.gates(0)[0], torch.stack([z[0] > 0, z[0] < 6]))
    pattern = record(nn.Hardtanh(), torch.tensor([[-2.0], [0.0], [2.0]])).patterns()
    assert len(pattern.groups().counts) == 3


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1, dilation=2), nn.AdaptiveMaxPool2d((2, 3))],
    ids=str,
)
def test_where_the_pattern_with_max_pooling_is_the_same_the_map_is(pool):
    shape = (1, 6, 6)
    start = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), pool, nn.Flatten()).to(DTYPE)
    model = nn.Sequential(start, nn.Linear(start(batch(shape)).shape[1], 4).to(DTYPE), nn.ReLU())
    x = batch(shape, 1)
    here, seen, affine = region(model, x), record(model, x), linearize(model, x)
    assert bool(here.contains(x.flatten()))
    others = x.flatten() + 0.03 * torch.randn(200, 36, dtype=DTYPE)
    patterns = record(model, others.view(-1, *shape)).patterns()
    inside = torch.tensor([patterns[i] == seen.patterns() for i in range(200)])
    assert torch.equal(here.contains(others), inside)
    boundary = here.nearest_boundary(x.flatten())
    for far, within in ((0.999, True), (1.001, False)):
        point = x.flatten() + far * (boundary.point - x.flatten())
        assert bool(here.contains(point)) == within
        assert (record(model, point.view(1, *shape)).patterns() == seen.patterns()) == within
    assert (model(point.view(1, *shape)) - affine(point.view(1, *shape))).detach().abs().max() < 1e-3
    assert 0 < float(seen.margin()) < torch.inf


@pytest.mark.parametrize("name", NETWORKS)
def test_the_replay_is_the_model_at_x_and_affine_far_from_it(name):
    make, shape = NETWORKS[name]
    model, x = make(), batch(shape)
    replay = frozen(model, x)
    with torch.no_grad():
        scale = model(x).abs().max()
        assert (replay(x) - model(x)).abs().max() <= 1e-13 * scale
        far, other = 10 * batch(shape), 10 * batch(shape)
        a, b, mixed = replay(far), replay(other), replay(0.4 * far + 0.6 * other)
        assert (0.4 * a + 0.6 * b - mixed).abs().max() <= 1e-12 * mixed.abs().max()
        assert (replay(torch.cat([far, other])) - torch.cat([a, b])).abs().max() <= 1e-12 * a.abs().max()
        assert (model(far) - a).abs().max() > 1e-3 * scale  # which the model is not


def test_the_replay_under_transforms():
    model, x = functional(), batch((6,))
    replay = frozen(model, x)
    rows = torch.func.jacrev(replay)(x)
    columns = torch.func.jacfwd(replay)(x)
    assert torch.allclose(rows, columns, rtol=0, atol=1e-15)
    assert not rows[0, :, 1].any()  # samples do not depend on one another
    stacked = torch.stack([x, 2 * x, -x])
    assert torch.allclose(torch.vmap(replay)(stacked), torch.stack([replay(v) for v in stacked]), rtol=0, atol=1e-14)


def test_the_tangent_replay():
    model, x, v = transformer(), batch((5, 8)), batch((5, 8))
    replay, step = frozen(model, x, mode="tangent"), 1e-6
    assert (replay(x) - model(x)).abs().max() <= 1e-14
    slope = (model(x + step * v) - model(x - step * v)) / (2 * step)
    assert (replay(x + v) - model(x) - slope).abs().max() <= 1e-7
    with pytest.raises(ValueError, match=r"v: got shapes \[\(1, 5, 8\)\], want \[\(2, 5, 8\)\]"):
        replay(x[:1])


class Watched(nn.Module):
    """Notes in which state it is run; draws nothing."""

    def __init__(self):
        super().__init__()
        self.inner = resnet(2)
        self.calls = 0
        self.inner.fc.register_forward_hook(self.note)

    def note(self, *_):
        self.calls += 1

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("grad", [True, False])
def test_the_model_is_left_as_it_was(grad):
    model, x = Watched(), batch((3, 32, 32))
    model.inner.layer1.requires_grad_(False)
    model.inner.layer2.train(False)
    model.inner.avgpool.train()
    for parameter in model.inner.fc.parameters():
        parameter.grad = torch.ones_like(parameter)
    x.requires_grad_(grad)
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    needs, grads = [p.requires_grad for p in model.parameters()], [copy.copy(p.grad) for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    versions = [t._version for t in tensors]
    random, before, globally = torch.get_rng_state(), model(x).detach(), len(nn.modules.module._global_forward_hooks)
    with torch.set_grad_enabled(grad):
        record(model, x)
        supported_ops(model, x)
        frozen(model, x)(2 * x)
        for mode in ("secant", "tangent"):
            affine = linearize(model, x, mode=mode)
            assert (
                affine.weight.shape == (2, 10, 3, 32, 32) and affine.check() < 1e-12 and not affine.bias.requires_grad
            )
        linearize(model, x).bias_by_layer()
    assert torch.equal(model(x), before) and model.calls > 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert [m.training for m in model.modules()] == flags and [p.requires_grad for p in model.parameters()] == needs
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    after = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(tensors, after, strict=True)) and versions == [t._version for t in after]
    assert x.grad is None
    for parameter, grad_before in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (grad_before is None)
    assert torch.equal(torch.get_rng_state(), random)
    assert len(nn.modules.module._global_forward_hooks) == globally


def test_an_error_in_the_model_leaves_nothing_behind():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(()))
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            self.n += 1
            return self.linear(x) @ x

    model = Broken()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        record(model, torch.randn(4, 3))
    assert model.n == 0 and not nn.modules.module._global_forward_hooks
    assert torch.equal(F.relu(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))


def test_the_report():
    report = supported_ops(functional(), batch((6,)))
    assert report.exact and report.supported
    assert report.rows == (
        ("linear", "first", "affine", 1),
        ("relu", "", "gate", 1),
        ("linear", "again", "affine", 2),
        ("relu", "relu", "gate", 2),
        ("sub", "", "affine", 1),
        ("cat", "", "affine", 1),
        ("linear", "head", "affine", 1),
    )
    assert str(report).splitlines()[2] == "relu       (model)  gate       1"
    report = supported_ops(transformer(), batch((5, 8)))
    assert report.supported and not report.exact
    assert {row[:3] for row in report.rows if row[2] == "secant"} == {
        ("layer_norm", "norm1", "secant"),
        ("layer_norm", "norm2", "secant"),
        ("scaled_dot_product_attention", "attention", "secant"),
        ("gelu", "feed.1", "secant"),
    }


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return -grad


def swish(x):
    return x * torch.sigmoid(x)


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(6, 6), function

    def forward(self, x):
        return self.linear(self.function(self.linear(x)))


class Buffered(nn.Module):
    def __init__(self, replace):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6, dtype=DTYPE))
        self.replace = replace

    def forward(self, x):
        if self.replace:
            self.mean = self.mean + x.mean(0)
        else:
            self.mean += x.mean(0)
        return x - self.mean


class Alternating(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = False

    def forward(self, x):
        self.odd = not self.odd
        return F.relu(x) if self.odd else 2 * x


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        (
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).train(),
            ValueError,
            r"layer '1' \(BatchNorm1d\) is in training",
        ),
        (
            nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2)).train(),
            ValueError,
            r"layer '1' \(Dropout\) is in training mode",
        ),
        (nn.Sequential(nn.RReLU()).train(), ValueError, r"layer '0' \(RReLU\) is in training mode"),
        (
            nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False)).eval(),
            UnsupportedOperation,
            "batch_norm in layer '0'",
        ),
        (Wrapped(lambda h: F.dropout(h)), UnsupportedOperation, "dropout in layer '': it draws random numbers"),
        (
            Wrapped(Reverse.apply),
            UnsupportedOperation,
            "linear in layer 'linear': the autograd.Function Reverse has a gradient",
        ),
        (
            Wrapped(lambda h: checkpoint(F.gelu, h, use_reentrant=False)),
            RuntimeError,
            "want no activation checkpointing|Function _NoopSaveInputs has a gradient",  # the second: PyTorch 2.10
        ),
        (Wrapped(lambda h: checkpoint(F.gelu, h, use_reentrant=True)), UnsupportedOperation, "CheckpointFunction"),
        (Buffered(True), UnsupportedOperation, "changes the buffers mean"),
        (Buffered(False), UnsupportedOperation, "changes the buffers mean"),
        (
            Wrapped(lambda h: LSTM(PackedSequence(h, torch.tensor([2])))[0].data),
            UnsupportedOperation,
            "lstm in layer '': its sequences are packed",
        ),
        (nn.GRU(6, 3, 2, dropout=0.5).train(), UnsupportedOperation, "gru in layer '': it draws random numbers"),
        (lambda x: x, TypeError, "model: got function, want an nn.Module"),
    ],
)
def test_models_that_are_refused(model, error, text):
    model = model.to(DTYPE) if isinstance(model, nn.Module) else model
    buffers = copy.deepcopy(dict(model.named_buffers())) if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=text):
        linearize(model, batch((1, 6)) if isinstance(model, nn.LSTM) else batch((6,)))
    for name, value in buffers.items():
        assert torch.equal(dict(model.named_buffers())[name], value)


def test_other_calls_in_the_replay_are_noticed():
    replay = frozen(Alternating(), batch((6,)))
    with pytest.raises(RuntimeError, match="the replay's call 0 is mul, the recording's was relu in layer ''"):
        replay(batch((6,)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_calls_that_are_not_seen_are_noticed():
    model, x = Wrapped(lambda h: h), batch((6,))
    scripted = torch.jit.script(swish)
    model.function = lambda h: h + scripted(h)
    for function in (frozen, linearize):
        with pytest.raises(
            UnsupportedOperation, match="add in layer '': an argument was computed by calls that cannot be recorded"
        ):
            function(model.to(DTYPE), x)
    assert not supported_ops(model, x).supported


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_script_and_quantized_modules_are_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(TypeError, match="layer '1' is a ScriptModule"):
        record(nn.Sequential(nn.Linear(6, 4), torch.jit.script(nn.ReLU())), torch.randn(2, 6))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedOperation, match="quantized::linear_dynamic in layer '0'"):
        linearize(quantized, torch.randn(2, 6))
    assert not supported_ops(quantized, torch.randn(2, 6)).supported


def test_compiled_models_are_seen_through():
    inner, x = mlp(6, 8, 3), batch((6,))
    outer = nn.Sequential(inner, torch.compile(mlp(3, 4, 2), backend="eager"))
    for model in (torch.compile(outer, backend="eager"), outer):
        assert [site.name for site in record(model, x).sites] == ["0.1", "1.1"]
        assert linearize(model, x).check() <= 1e-14
    inner.compile(backend="eager")
    assert linearize(inner, x).check() <= 1e-14


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.ones(2, 6, dtype=torch.int64), TypeError, "x: got torch.int64, want floating-point inputs"),
        (torch.ones(2, 6, dtype=torch.complex64), TypeError, "x: got torch.complex64"),
        ([1.0], TypeError, "x: got list, want a torch.Tensor"),
        ((), ValueError, "x: got no inputs"),
        (torch.ones(0, 6), ValueError, r"x: got shapes \[\(0, 6\)\], want \(n, \.\.\.\) with one n > 0"),
        ((torch.ones(2, 6), torch.ones(3, 6)), ValueError, r"x: got shapes \[\(2, 6\), \(3, 6\)\]"),
        (torch.tensor(1.0), ValueError, r"x: got shapes \[\(\)\]"),
        (
            torch.tensor([[1.0] * 6, [torch.nan] * 6]),
            ValueError,
            "x: 1 of its 2 samples have values that are not finite",
        ),
        ((torch.ones(1, 6), torch.tensor([[torch.inf]])), ValueError, "x: 1 of its 1 samples have values that are not"),
    ],
)
def test_inputs_that_are_refused(x, error, text):
    for function in (record, frozen, supported_ops, linearize):
        with pytest.raises(error, match=text):
            function(mlp(6, 4, 2, dtype=torch.float32), x)


def test_other_bad_arguments():
    model, x = functional(), batch((6,))
    with pytest.raises(ValueError, match=r"mode: got 'exact', want one of \('secant', 'tangent'\)"):
        record(model, x, mode="exact")
    with pytest.raises(ValueError, match="layer: got 'relu#2', want an index below 3 or one of :relu#0, relu, relu#1"):
        record(model, x).gates("relu#2")
    with pytest.raises(ValueError, match="layer: got 3"):
        record(model, x).gates(3)
    with pytest.raises(ValueError, match=r"v: got shapes \[\(3, 6\)\], want \[\(2, 6\)\]"):
        frozen(model, x)(torch.ones(3, 6, dtype=DTYPE))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 6\), want one sample"):
        region(model, x)
    with pytest.raises(ValueError, match="model: has no gates"):
        region(nn.Linear(6, 2).to(DTYPE), x[:1])
    with pytest.raises(ValueError, match="layers: got none, as the model has no gates"):
        record(nn.Linear(6, 2).to(DTYPE), x).patterns()
    with pytest.raises(ValueError, match="layers: got none, want at least one of :relu#0"):
        record(model, x).patterns([])


def test_gates_of_models_that_cannot_be_linearized():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(-1)).to(DTYPE)
    x = batch((6,))
    with pytest.raises(UnsupportedOperation, match=r"softmax in layer '3'.*mode='tangent'"):
        record(model, x)
    assert torch.equal(record(model, x, mode="tangent").gates("1"), model[0](x) > 0)


class Shared(nn.Module):
    """One network for both halves of a sample, one batch after the other."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.ReLU())

    def forward(self, x):
        first, second = self.encoder(torch.cat([x[:, :2], x[:, 2:]])).chunk(2)
        return first - second


class TimeFirst(Shared):
    """Steps before samples."""

    def forward(self, x):
        return self.encoder(x.unflatten(1, (-1, 2)).transpose(0, 1)).sum(0)


class Parts(Shared):
    """The parts of a sample beside one another in the first dimension."""

    def forward(self, x):
        return self.encoder(x.reshape(-1, 2)).view(len(x), -1)


class Coupled(nn.Module):
    """A function of the batch before the gates, or after them."""

    def __init__(self, function, before=True):
        super().__init__()
        self.function, self.before = function, before

    def forward(self, x):
        return F.relu(self.function(x)) if self.before else self.function(F.relu(x))


COUPLINGS = {
    "mean": lambda z: z - z.mean(0),
    "softmax": lambda z: z * z.softmax(0),
    "cumsum": lambda z: z.cumsum(0),
    "reversed cumsum": lambda z: z.flip(0).cumsum(0).flip(0),
    "roll": lambda z: z.roll(1, 0),
    "flip": lambda z: z.flip(0),
    "std": lambda z: z / (1 + z.std(0)),
}


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", COUPLINGS)
def test_samples_that_depend_on_one_another_are_refused(name, before, n):
    model, x = Coupled(COUPLINGS[name], before), batch((4,), n) + 1
    for mode in ("secant", "tangent"):
        with pytest.raises(
            ValueError, match=r"model: the (gates of :relu#0|outputs) change with the rest of the batch"
        ):
            record(model, x, mode=mode, check=True)
        assert record(model, x, mode=mode).patterns().width == 4


def test_a_batch_norm_in_training_is_refused_with_its_tangent():
    model = Coupled(lambda z: F.batch_norm(z, None, None, training=True), before=False)
    with pytest.raises(ValueError, match="model: the outputs change with the rest of the batch"):
        record(model, batch((4,), 5), mode="tangent", check=True)


@pytest.mark.parametrize(
    ("function", "mode"),
    [
        (lambda z: z.view(5, 2, 2).flatten(1), "secant"),  # for batches of 5 samples only
        (lambda z: z.squeeze(), "secant"),
        (lambda z: z + torch.rand_like(z), "tangent"),
    ],
)
def test_samples_that_only_look_coupled_are_recorded(function, mode):
    x = batch((4,), 5)
    assert torch.equal(record(Coupled(function, before=False), x, mode=mode, check=True).gates(0), x > 0)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("make", [Shared, TimeFirst])
def test_gates_that_do_not_lie_by_sample_are_refused(make, n):
    model, x = make().to(DTYPE), batch((8 if make is TimeFirst else 4,), n)
    with pytest.raises(ValueError, match=r"model: the gates of .* one sample at a time \(chunk_size=1\)"):
        record(model, x, check=True)
    assert len(record(model, x[:1]).patterns()) == 1


def test_one_sample_that_has_its_own_gates_does_not_stand_for_the_rest():
    model, x = Shared().to(DTYPE), batch((4,), 3)
    x[1, :2] = x[0, 2:]  # which comes second of the first halves
    with pytest.raises(ValueError, match="one sample at a time"):
        record(model, x)


def test_gates_of_several_parts_of_a_sample():
    model, x = Parts().to(DTYPE), batch((6,), 4)
    patterns = record(model, x).patterns()
    assert patterns.width == 9
    for order in (torch.arange(4).flip(0), torch.arange(4).roll(1)):
        assert record(model, x[order]).patterns() == patterns[order]
    assert all(record(model, x[i : i + 1]).patterns() == patterns[i] for i in range(4))
