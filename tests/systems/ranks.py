"""What two processes check together: each function runs in both, and raises in either where something is wrong.

Results are compared with the same computation in one process, in fp64 unless a check is of precision.
"""

import copy
import gc
import re
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from relative_error import randomize
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from interp_nn import functional
from interp_nn.nn import SummaryConv2d, SummaryHead, SummaryLayer, SummaryLinear, cached_weights, follow
from interp_nn.nn.gated.from_relu import to_dgn
from interp_nn.nn.gated.gates import HardGate
from interp_nn.nn.gated.networks import DGN, DLGN, DLGNValueTensor
from interp_nn.nn.gated.regimes import fix_gates, permute_gates
from interp_nn.nn.orthogonality import constrain, orthogonality_penalty, retract_
from interp_nn.nn.parallel import parallelize

TOLERANCE = 1e-6


def network():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 4, 6)), SummaryConv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), SummaryLinear(24, 10), nn.Tanh(),
        SummaryLinear(10, 6), nn.Tanh(), SummaryLinear(6, 4),
    )  # fmt: skip
    return randomize(model.double(), 0.4)


def polynomial_network():
    """The same with polynomials, norms and gains; `train` updates the norms."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 4, 6)), SummaryConv2d(1, 4, 3, polynomial="pc-1"), nn.Tanh(), nn.Flatten(),
        SummaryLinear(32, 10, polynomial="newton-schulz"), nn.Tanh(), SummaryLinear(10, 12, polynomial="pc-2"), nn.Tanh(),
        SummaryLinear(12, 4, polynomial="newton-schulz"),
    )  # fmt: skip
    randomize(model.double(), 0.4)
    for layer in model:
        if hasattr(layer, "gain"):
            layer.reset_norm()
    return model


def head():
    torch.manual_seed(1)
    return randomize(Loss(SummaryHead(24, 7, 4)).double(), 0.4)


def data(steps=4, n=12):
    torch.manual_seed(2)
    return [(torch.randn(n, 24, dtype=torch.float64), torch.randint(4, (n,))) for _ in range(steps)]


def classify(model, x, target):
    return F.cross_entropy(model(x), target)


def itself(model, x, target):
    return model(x, target)


class Loss(nn.Module):
    """A head whose forward is its loss, as DistributedDataParallel wants it."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x, target):
        return self.head.loss(x, target)


def train(model, loss=classify, part=slice(None), clip=False):
    """Losses of a few steps of Adam on this part of each batch."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.05), []
    if any(getattr(layer, "normalize", False) for layer in model.modules()):
        follow(optimizer, model)
    for x, target in data():
        optimizer.zero_grad()
        value = loss(model, x[part], target[part])
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses)


def half():
    return slice(6 * dist.get_rank(), 6 * dist.get_rank() + 6)


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def same(got, wanted, tolerance=TOLERANCE):
    got, wanted = full(got.detach()), full(wanted.detach())
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    distance = (got - wanted).norm() / wanted.norm()
    assert distance <= tolerance, f"relative error {distance:.3g}"


def all_same(found, wanted, tolerance=1e-10):
    pairs = list(zip(found, wanted, strict=True))
    assert pairs
    for got, exact in pairs:
        same(got, exact, tolerance)


def same_parameters(model, alone, tolerance=TOLERANCE):
    all_same(model.parameters(), alone.parameters(), tolerance)


def averaged(t):
    dist.all_reduce(t)
    return t / dist.get_world_size()


def mesh():
    return dist.device_mesh.init_device_mesh("cpu", (2,))


# Data-parallel training


def check_training(start, share, loss=classify, clip=False):
    """Train a shared copy on halves of the batches and a copy alone on all of them; both must end equal."""
    model, alone = share(copy.deepcopy(start)), copy.deepcopy(start)
    same(averaged(train(model, loss, half(), clip)), train(alone, loss, clip=clip))
    same_parameters(model, alone)
    return model, alone


def shard_whole(model):
    return fully_shard(model, mesh=mesh())


def shard_layers(model):
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh())
    return shard_whole(model)


def ddp():
    start = network()
    _, alone = check_training(start, DistributedDataParallel)
    assert (start[4].b - alone[4].b).abs().max() > 1e-2  # they did move


def ddp_of_a_head():
    check_training(head(), DistributedDataParallel, itself)


def ddp_of_gated_networks():
    convolutions = nn.Sequential(
        nn.Unflatten(1, (1, 4, 6)), nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 4)
    ).double()
    torch.manual_seed(1)
    for start in (
        DLGN((24, 5, 5, 4), dtype=torch.float64),
        permute_gates(DGN((24, 5, 5, 4), bias=True, dtype=torch.float64), (1, 0)),
        fix_gates(DGN((24, 5, 5, 4), gate=HardGate(), dtype=torch.float64)),
        DLGNValueTensor((24, 5, 4, 4), dtype=torch.float64),
        to_dgn(convolutions),
        to_dgn(convolutions, gating="relu", value_input="x"),
    ):
        _, alone = check_training(start, DistributedDataParallel)
        assert not any(map(torch.equal, start.value.parameters(), alone.value.parameters()))


def ddp_without_synchronisation():
    """Gradients of two micro-batches, of which the first is not reduced."""
    start = network()
    model, alone = DistributedDataParallel(copy.deepcopy(start)), copy.deepcopy(start)
    (x, target), _ = data(2)
    mine = half()
    with model.no_sync():
        classify(model, x[mine][:3], target[mine][:3]).backward()
    classify(model, x[mine][3:], target[mine][3:]).backward()
    (2 * classify(alone, x, target)).backward()
    all_same(*([p.grad for p in m.parameters()] for m in (model, alone)), TOLERANCE)


def ddp_with_polynomials():
    start = polynomial_network()
    model, alone = check_training(start, DistributedDataParallel)
    all_same(model.buffers(), alone.buffers(), TOLERANCE)


def ddp_with_cached_weights():
    """Weights formed once for two micro-batches; gradients are pulled back in the backward that synchronises."""
    start = polynomial_network()
    model, alone = DistributedDataParallel(copy.deepcopy(start)), copy.deepcopy(start)
    (x, target), _ = data(2)
    mine = half()
    for _ in range(2):
        model.zero_grad()
        with cached_weights(model):
            with model.no_sync():
                classify(model, x[mine][:3], target[mine][:3]).backward()
            classify(model, x[mine][3:], target[mine][3:]).backward()
    (2 * classify(alone, x, target)).backward()
    all_same(*([p.grad for p in m.parameters()] for m in (model, alone)), TOLERANCE)

    def twice():
        with cached_weights(model):
            for _ in range(2):
                classify(model, x[mine], target[mine]).backward()

    raises(RuntimeError, "1 (SummaryConv2d) has synchronised its gradients already; run all", twice)


def fsdp_with_polynomials():
    model, alone = check_training(polynomial_network(), shard_layers, clip=True)
    all_same(model.buffers(), alone.buffers(), TOLERANCE)
    for layer in (model[4], model[8]):
        everywhere = [torch.empty_like(layer.scale) for _ in range(2)]
        dist.all_gather(everywhere, layer.scale)
        assert torch.equal(*everywhere)
    raises(RuntimeError, "cached_weights: b of 1 (FSDPSummaryConv2d) is sharded", cached_weights(model).__enter__)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        again = polynomial_network()
        again.load_state_dict(whole)
        x = data(1)[0][0]
        same(again(x), alone(x))
    spectrum = model[4].spectrum(weight=True)
    same(spectrum, torch.linalg.svdvals(full(model[4].weight).detach()))
    grouped = SummaryConv2d(4, 6, 3, groups=2, polynomial="newton-schulz").double()
    dist.broadcast(grouped.b.data, 0)
    wanted = grouped.weight
    fully_shard(grouped, mesh=mesh())
    same(grouped.weight, wanted)
    model[4].set_weight_(torch.ones(10, 32))
    same(model[4].weight, torch.ones(10, 32).double())


def fsdp():
    model, _ = check_training(network(), shard_layers, clip=True)
    assert model[4].b.to_local().shape == (12, 10)


def fsdp_of_a_head():
    check_training(head(), shard_whole, itself)


def fsdp_in_bfloat16():
    """bf16 parameters and activations on sharded fp32 masters: no farther from fp32 than twice a bf16 model on one device."""
    start = network().float()
    model, exact, rounded = copy.deepcopy(start), copy.deepcopy(start), copy.deepcopy(start).bfloat16()
    seen = []
    model[6].register_forward_pre_hook(lambda module, inputs: seen.append((module.b.dtype, inputs[0].dtype)))
    fully_shard(model, mesh=mesh(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    x, target = data(1)[0]
    for twin, part, dtype in (
        (model, half(), torch.float32),
        (exact, slice(None), torch.float32),
        (rounded, slice(None), torch.bfloat16),
    ):
        F.cross_entropy(twin(x[part].to(dtype)).float(), target[part]).backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    for got, wanted, plain in zip(model.parameters(), exact.parameters(), rounded.parameters(), strict=True):
        assert got.dtype == got.grad.dtype == torch.float32
        same(got.grad, wanted.grad, 2 * float((plain.grad - wanted.grad).norm() / wanted.grad.norm()))


def penalised(model, x, target):
    return classify(model, x, target) + 0.1 * orthogonality_penalty(model)


def fsdp_with_a_constraint():
    for share in (shard_layers, shard_whole):
        check_training(constrain(network(), "penalty"), share, penalised)
    retracted = check_training(constrain(network(), "retract"), shard_layers)
    for twin in retracted:
        retract_(twin)
    same_parameters(*retracted)


def sharded_weights_are_constrained():
    start = network()
    for share in (shard_whole, lambda m: parallelize(m, mesh(), {"4": "outputs", "6": "inputs", "8": "rows"})):
        model, alone = copy.deepcopy(start), copy.deepcopy(start)
        share(model)
        for twin in (model, alone):
            constrain(twin, "penalty")
            orthogonality_penalty(twin).backward()
        for got, wanted in zip(model.parameters(), alone.parameters(), strict=True):
            assert (got.grad is None) is (wanted.grad is None)
            if got.grad is not None:
                same(got.grad, wanted.grad)
        same(orthogonality_penalty(model), orthogonality_penalty(alone))
        raises(TypeError, "its b is a DTensor; parametrize it before", constrain, model, "parametrization")
        for twin in (model, alone):
            constrain(twin, "retract")
        same_parameters(model, alone)
        assert model[4].orthogonality_defect() < 1e-10 and model[1].constraint == "retract"
        same(model[6].spectrum(), alone[6].spectrum())


def tensor_parallel_with_a_penalty():
    start = constrain(network(), "penalty")
    model, alone = copy.deepcopy(start), copy.deepcopy(start)
    parallelize(model, mesh(), {"4": "outputs", "6": "inputs", "8": "outputs"})
    same(train(model, penalised), train(alone, penalised))
    same_parameters(model, alone)


def sharded_weights_are_read_together():
    """A read of `weight` is collective; nothing else reads it: a check that did would wait for the other process here."""
    start = network()
    for share in (shard_layers, lambda m: parallelize(m, mesh(), {"4": "outputs", "6": "inputs", "8": "rows"})):
        model, alone = copy.deepcopy(start), copy.deepcopy(start)
        share(model)
        for number in (4, 6, 8):
            same(model[number].weight, alone[number].weight)
            model[number].weight.sum().backward()
            same(model[number].b.grad, torch.autograd.grad(alone[number].weight.sum(), alone[number].b)[0])
            raises(ValueError, "weight: is computed from b", setattr, model[number], "weight", None)
            wanted = alone[number].weight.detach().flip(0).clone()
            model[number].set_weight_(wanted)
            same(model[number].weight, wanted)
        if dist.get_rank() == 0:
            assert "SummaryLinear" in repr(model) and not model[4].constraint and model[4].frozen_weight() is None
            assert len(list(model.named_parameters())) == len(list(alone.named_parameters()))


def fsdp_state_dict():
    start = network()
    model = shard_whole(copy.deepcopy(start))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        fresh = network()
        fresh.load_state_dict(state)
        same_parameters(fresh, start, 0.0)


# DTensors


def operands(n=8, d=6, k=4):
    torch.manual_seed(3)
    return [torch.randn(*shape, dtype=torch.float64) for shape in ((n, d), (d, k), (k,), (n, k))]


def place(tensors, over):
    on = mesh()
    return [distribute_tensor(t, on, [p]) for t, p in zip(tensors, over, strict=True)]


def derivatives(function, x, b, bias, dy):
    """The value, the gradients, the same to be differentiated, and the gradients of their norms."""
    given = [t.detach().requires_grad_() for t in (x, b, bias)]
    y = function(*given)
    plain = torch.autograd.grad(y, given, dy, retain_graph=True)
    first = torch.autograd.grad(y, given, dy, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), given[:2])
    return [y, *plain, *first, *second]


def placements():
    R, S0, S1 = Replicate(), Shard(0), Shard(1)
    return {
        "rows": (S0, R, R, S0),
        "rows, upstream on every device": (S0, R, R, R),
        "everywhere": (R, R, R, R),
        "inputs": (S1, S0, R, R),
        "inputs of x alone": (S1, R, R, R),
        "outputs": (R, S1, S0, S1),
        "rows and outputs": (S0, S1, R, S0),
        "rows of all": (S0, S0, S0, S0),
        "partial sums": (Partial(), R, R, R),
    }


SPLIT = ("rows", "inputs", "outputs", "rows and outputs", "partial sums")


def check_placements(shape, names):
    tensors = operands(*shape)
    wanted = derivatives(functional.summary, *tensors)
    for name in names:
        found = derivatives(functional.summary, *place(tensors, placements()[name]))
        try:
            all_same(found, wanted)
        except AssertionError as e:
            raise AssertionError(f"{shape}, {name}: {e}") from e


def dtensors():
    check_placements((7, 5, 3), placements())


def dtensors_of_few_inputs():
    check_placements((4, 2, 6), SPLIT)


def dtensors_of_rows_take_the_operator():

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, b, bias, dy = place(operands(), placements()["rows"])
    with Names() as names:
        y = functional.summary(x, b.requires_grad_(), bias)
        (db,) = torch.autograd.grad(y, b, dy)
    assert y.placements[0].is_shard(0) and db.placements[0].is_partial()
    assert "interp_nn.summary_of_rows.default" in names.seen
    assert not any("c10d" in name or "all_" in name for name in names.seen)  # nothing was sent


def dtensors_of_more_dimensions():

    torch.manual_seed(4)
    x, dy = torch.randn(4, 6, 5, dtype=torch.float64), torch.randn(4, 6, 3, dtype=torch.float64)
    _, b, bias, _ = operands(1, 5, 3)
    wanted = derivatives(functional.summary, x, b, bias, dy)
    for dim in (0, 1):
        over = Shard(dim), Replicate(), Replicate(), Shard(dim)
        try:
            place([x], [Shard(dim)])[0].reshape(24, 5)
        except RuntimeError:  # PyTorch 2.10 flattens no sharded dimension but the first, and second derivatives need it
            continue
        found = derivatives(functional.summary, *place((x, b, bias, dy), over))
        all_same(found, wanted)


def dtensor_pairs_and_matrices():
    x, b, bias, dy = operands()

    def pair(x, b, bias):
        p, y = functional.summary_pair(x, b)
        return p.sin() * y + bias

    wanted = derivatives(pair, x, b, bias, dy)
    for over in map(placements().get, SPLIT):
        all_same(derivatives(pair, *place((x, b, bias, dy), over)), wanted)
        (shared,) = place((b,), over[1:2])
        same(functional.gram(shared), functional.gram(b), 1e-10)
        same(functional.effective_weight(shared), functional.effective_weight(b), 1e-10)


def dtensors_of_polynomials():
    x, b, bias, dy = operands()
    q = {"polynomial": (1.5, -0.5, 0.2), "scale": 0.7}

    def of_numbers(x, b, bias):
        p, y = functional.summary_pair(x, b, **q)
        return functional.summary(x, b, bias, **q) + p.sin() * y

    def learned(x, b, c, a, dy):
        y = functional.summary(x, b, polynomial=c, scale=a)
        return torch.autograd.grad(y, (b, c, a), dy)

    c, a = torch.tensor(q["polynomial"], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    values = derivatives(of_numbers, x, b, bias, dy)
    gradients = learned(x, *(t.clone().requires_grad_() for t in (b, c, a)), dy)
    for over in map(placements().get, SPLIT):
        all_same(derivatives(of_numbers, *place((x, b, bias, dy), over)), values)
        placed = place((x, b, c, a, dy), (*over[:2], Replicate(), Replicate(), over[3]))
        all_same(learned(placed[0], *(t.requires_grad_() for t in placed[1:4]), placed[4]), gradients)
        same(functional.effective_weight(placed[1], **q), functional.effective_weight(b, **q), 1e-10)
    local = "polynomial: got a local tensor, want a DTensor on the mesh of x"
    raises(TypeError, local, lambda: functional.summary(*placed[:2], polynomial=c))


def dtensors_under_autocast_and_without_gradients():
    tensors = [t.float() for t in operands()]
    for over in ("rows", "outputs"):
        x, b, bias, _ = place(tensors, placements()[over])
        with torch.autocast("cpu", torch.bfloat16):
            y = functional.summary(x, b.requires_grad_(), bias)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and b.grad.dtype == torch.float32
        with torch.no_grad():
            same(functional.summary(x, b, bias), functional.summary(*tensors[:3]))
        same(y.float(), functional.summary(*tensors[:3]), 2e-2)


def raises(error, message, function, *args):
    with pytest.raises(error, match=re.escape(message)):
        function(*args)


def dtensors_that_are_refused():

    x, b, bias, _ = operands()
    over = placements()["rows"]
    dx, db, dbias, _ = place(operands(), over)
    raises(TypeError, "x: got a local tensor, want a DTensor on the mesh of b", functional.summary, x, db, dbias)
    raises(TypeError, "b: got a local tensor, want a DTensor on the mesh of x", functional.summary, dx, b, dbias)
    raises(TypeError, "bias: got a local tensor, want a DTensor on the mesh of b", functional.summary, dx, db, bias)
    raises(TypeError, "x: got a local tensor", functional.summary_pair, x, db)
    other = dist.device_mesh.init_device_mesh("cpu", (1, 2))
    far = distribute_tensor(b, other, [Replicate(), Replicate()])
    raises(ValueError, "b: got a DTensor on DeviceMesh", functional.summary_pair, dx, far)
    target = torch.zeros(8, dtype=torch.int64)
    without = "x: got a DTensor, which has no sharding rule here"
    raises(TypeError, without, functional.summary_cross_entropy, dx, db, target)
    raises(TypeError, without, functional.inverse_summary, dx, db)
    raises(TypeError, "b: got a DTensor, which has no sharding rule here", functional.orthogonalize, db)


# Tensor parallel


def tensor_parallel():
    start = network()
    for plan in ({"4": "outputs", "6": "inputs"}, {"4": "inputs", "6": "outputs", "8": "outputs"}):
        model, alone = parallelize(copy.deepcopy(start), mesh(), plan), copy.deepcopy(start)
        same(train(model), train(alone))
        same_parameters(model, alone)
        assert model[4].b.to_local().shape == ((24, 5) if plan["4"] == "outputs" else (12, 10))


def check_parallel_polynomials(plan):
    start = polynomial_network()
    model, alone = parallelize(copy.deepcopy(start), mesh(), plan), copy.deepcopy(start)
    same(train(model), train(alone))
    same_parameters(model, alone)
    all_same(model.buffers(), alone.buffers(), TOLERANCE)


def tensor_parallel_with_polynomials():
    check_parallel_polynomials({"4": "inputs", "6": "outputs", "8": "outputs"})


def tensor_parallel_with_polynomials_and_a_plain_layer():
    check_parallel_polynomials({"4": "outputs", "6": "inputs"})


def polynomials_over_rows():
    start = polynomial_network()[4:]
    model, alone = copy.deepcopy(start), copy.deepcopy(start)
    parallelize(model, mesh(), {name: "rows" for name in ("4", "6", "8")})
    x = data(1)[0][0].repeat(1, 2)[:, :32]
    model(x[half()]).square().sum().backward()
    alone(x).square().sum().backward()
    all_same(*([p.grad for p in m.parameters()] for m in (model, alone)), TOLERANCE)


def tensor_parallel_over_rows():
    start = network()[4:]
    model, alone = copy.deepcopy(start), copy.deepcopy(start)
    parallelize(model, mesh(), {name: "rows" for name in ("4", "6", "8")})

    def total(model, x, target):
        return F.cross_entropy(model(x), target, reduction="sum")

    losses = train(model, total, half())
    dist.all_reduce(losses)
    same(losses, train(alone, total))
    same_parameters(model, alone)


def tensor_parallel_of_a_pair():
    layer = randomize(SummaryLayer(24, 6).double(), 0.4)
    dist.broadcast(layer.b.data, 0)
    x = data(1)[0][0]
    wanted = layer(x)
    for over in ("inputs", "outputs"):
        found = parallelize(nn.Sequential(copy.deepcopy(layer)), mesh(), {"0": over})(x)
        assert type(found) is type(wanted)
        same(found.projection, wanted.projection)
        same(found.summary, wanted.summary)


def tensor_parallel_that_is_refused():
    model = nn.Sequential(nn.Sequential(network()[4], nn.Tanh()), nn.Linear(10, 4))
    raises(ValueError, "plan: no module '0.3' in the model; near it: 0.", parallelize, model, mesh(), {"0.3": "rows"})
    raises(ValueError, "0.0: got 'columns', want one of 'rows'", parallelize, model, mesh(), {"0.0": "columns"})
    raises(TypeError, "1: got Linear, want SummaryLinear", parallelize, model, mesh(), {"1": "rows"})
    wide = dist.device_mesh.init_device_mesh("cpu", (1, 2))
    raises(ValueError, "mesh: got 2 dimensions", parallelize, model, wide, {"0.0": "rows"})
    parallelize(model, mesh(), {"0.0": "inputs"})
    raises(ValueError, "0.0: its parameters are DTensors already", parallelize, model, mesh(), {"0.0": "rows"})
    raises(ValueError, "0.0: x: got shape (3, 12), want (..., n, 24)", model, torch.zeros(3, 12).double())
    raises(TypeError, "0.0: x: got NoneType", model, None)
    raises(TypeError, "0.0: x: got DTensor", model, place(operands(4, 24, 1), placements()["everywhere"])[0])


def tied_weights_and_shared_modules():
    torch.manual_seed(5)
    model = nn.Sequential(SummaryLinear(6, 6), nn.Linear(6, 6), SummaryLinear(6, 6)).double()
    for other, name in ((1, "weight"), (2, "b")):
        setattr(model[other], name, model[0].b)
        for plan in ({"0": "rows"}, {"0": "rows", "2": "rows"}):
            raises(ValueError, f"0: its b is tied to {other}.{name}, and", parallelize, model, mesh(), plan)
        assert type(model[0].b) is nn.Parameter
        setattr(model[other], name, nn.Parameter(model[0].b.detach().clone()))
    shared = nn.ModuleDict({"a": model[0], "b": model[0]})
    raises(ValueError, "b: is the same module as 'a'", parallelize, shared, mesh(), {"a": "rows", "b": "rows"})
    x = torch.randn(4, 6, dtype=torch.float64)
    wanted = model[0](x)
    parallelize(shared, mesh(), {"b": "outputs"})
    same(shared["a"](x), wanted)


CHECKS = [
    ddp, ddp_of_a_head, ddp_of_gated_networks, ddp_without_synchronisation, ddp_with_polynomials,
    ddp_with_cached_weights, fsdp, fsdp_with_polynomials, fsdp_of_a_head, fsdp_in_bfloat16,
    fsdp_state_dict, fsdp_with_a_constraint, sharded_weights_are_constrained,
    sharded_weights_are_read_together, tensor_parallel_with_a_penalty,
    tied_weights_and_shared_modules,
    dtensors, dtensors_of_rows_take_the_operator, dtensors_of_more_dimensions, dtensor_pairs_and_matrices,
    dtensors_of_polynomials, dtensors_under_autocast_and_without_gradients, dtensors_that_are_refused,
    tensor_parallel, tensor_parallel_with_polynomials, polynomials_over_rows, tensor_parallel_over_rows,
    tensor_parallel_of_a_pair, tensor_parallel_that_is_refused,
]  # fmt: skip
# Each has a neighbour above: other placements of the same operator or layer.
SLOW = [dtensors_of_few_inputs, tensor_parallel_with_polynomials_and_a_plain_layer]


def run(rank, folder, names):
    """The checks of these names on one of the two processes; a file each, empty or with what went wrong."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    for name in names:
        try:
            globals()[name]()
            said = ""
        except Exception:
            said = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(said)
    dist.destroy_process_group()


if __name__ == "__main__":
    import torch._dynamo  # optimizers import it

    # Forks, so that PyTorch is imported once.
    gc.disable()  # as in tests/conftest.py
    arguments = Path(sys.argv[1]), sys.argv[2:]
    torch.multiprocessing.start_processes(run, arguments, nprocs=2, start_method="fork")
