"""One warning for a layer whose b is not finite or far from orthonormal; none in a forward, and none for what may well be so."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from layers import make
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from interp_nn import linalg
from interp_nn.convert import fold, summarize
from interp_nn.nn import (
    SummaryConv2d,
    SummaryHead,
    SummaryLayer,
    SummaryLinear,
    constrain,
    diagnosis,
    follow,
    retract_,
)
from interp_nn.nn.base import as_parameter
from interp_nn.nn.parallel import parallelize

KINDS = ["linear", "wide", "conv", "grouped"]
by_kind = pytest.mark.parametrize("kind", KINDS)
LOOKS = {
    "eval": lambda m: m.eval(),
    "state_dict": lambda m: m.state_dict(),
    "fold": lambda m: m.fold(),
    "fold of a model": fold,
    "freeze": lambda m: m.freeze(),
}


def spoiled(layer, value=float("nan")):
    with torch.no_grad():
        layer.b.view(-1)[-1] = value
    return layer


@by_kind
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_b_that_is_not_finite_is_warned_of_once(kind, look, value):
    layer = spoiled(make(kind)[0], value)
    name = (
        rf"^b of {type(layer).__name__}\(.* has a value that is not finite.*(lower the learning rate|reset_parameters)"
    )
    with pytest.warns(RuntimeWarning, match=name):
        look(layer)
    for again in LOOKS.values():
        if type(layer) in (SummaryLinear, SummaryConv2d):
            again(layer)


@pytest.mark.parametrize("look", ["state_dict", "fold", "retract"])
def test_the_path_is_named_where_it_is_known(look):
    model = nn.Sequential(nn.ModuleDict({"a": SummaryLinear(4, 3), "b": SummaryLinear(4, 3)}), SummaryHead(4, 3, 2))
    constrain(model[0]["b"], "retract")
    spoiled(model[0]["b"])
    with pytest.warns(RuntimeWarning, match=r"^0\.b\.b has a value") as found:
        {"state_dict": nn.Module.state_dict, "fold": fold, "retract": retract_}[look](model)
    assert len(found) == 1
    spoiled(model[1])
    with pytest.warns(RuntimeWarning, match=r"^1\.b has a value"):
        model.state_dict()


@by_kind
def test_a_spectrum_that_is_not_finite_is_refused(kind):
    layer = spoiled(make(kind)[0])
    for call in (layer.spectrum, layer.orthogonality_defect, lambda: linalg.orthogonality_defect(layer.matrix())):
        with pytest.raises(ValueError, match=r"^b: got a value that is not finite"):
            call()


@by_kind
def test_no_forward_looks(kind):
    layer, x = make(kind)
    layer.eval()
    spoiled(layer)
    layer(x), layer.unfreeze()(x), layer.train()(x)
    constrain(layer, "penalty")(x)
    far(constrain(make(kind)[0], "penalty"))(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_values_are_finite(dtype):
    layer = SummaryLinear(4, 3, dtype=dtype)
    with torch.no_grad():
        layer.b.fill_(torch.finfo(dtype).max)
    layer.eval(), layer.state_dict()


def far(layer, size=3.0):
    """Give one direction of an orthonormal b this singular value."""
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(layer.matrix(), full_matrices=False)
        s.fill_(1)[..., 0] = size
        layer.b.copy_(as_parameter(u * s.unsqueeze(-2) @ vh, layer.b.shape))
    return layer


def test_converted_layers_are_not_warned_of():
    """The singular values of a trained weight may be anything, and its b has their cube roots."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight.mul_(100)
    summarize(model)
    model.eval(), model.state_dict(), model[0].freeze(), model[0].fold(), model[0].orthogonality_defect(), fold(model)


@by_kind
def test_a_large_b_without_a_constraint_is_not_warned_of(kind):
    layer = far(make(kind)[0])
    for name in ("eval", "state_dict", "fold", "freeze"):
        LOOKS[name](layer)


@by_kind
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize(("constraint", "advice"), [("penalty", "more weight in the loss"), ("retract", "nn.follow")])
def test_a_defect_above_1_under_a_constraint_is_warned_of_once(kind, look, constraint, advice):
    layer = far(constrain(make(kind)[0], constraint), 1.9)
    for each in ("eval", "state_dict", "fold", "freeze"):
        LOOKS[each](layer)
    name = rf"^b of {type(layer).__name__}\(.* singular value of at least (2\.9\d*|3), an orthogonality defect above 1.*{advice}"
    with pytest.warns(RuntimeWarning, match=name):
        look(far(layer))
    layer.eval(), layer.state_dict()


@pytest.mark.parametrize("look", [nn.Module.state_dict, fold, retract_, lambda m: follow_one_step(m)])
def test_the_path_is_named_of_a_defect(look):
    model = nn.Sequential(nn.ModuleDict({"a": SummaryLinear(4, 3), "b": SummaryLinear(4, 3)}))
    constrain(model, "retract")
    far(model[0]["b"])
    with pytest.warns(RuntimeWarning, match=r"^0\.b\.b has a singular value of at least 3, .*defect above 1") as found:
        look(model)
    assert len(found) == 1


def follow_one_step(model):
    sgd = torch.optim.SGD(model.parameters(), 0.0)
    follow(sgd, model)
    model[0]["b"](torch.ones(1, 4)).sum().backward()
    sgd.step()


def test_a_step_that_stays_near_costs_no_look(monkeypatch):
    monkeypatch.setattr(diagnosis, "look", lambda *_: pytest.fail("looked"))
    layer = constrain(SummaryLinear(6, 4), "retract")
    with torch.no_grad():
        layer.b.mul_(1.2)
    retract_(layer)


def test_a_converted_layer_that_is_constrained_afterwards():
    model = nn.Sequential(nn.Linear(6, 5))
    with torch.no_grad():
        model[0].weight.mul_(100)
    summarize(model)
    constrain(model, "penalty")
    with pytest.warns(RuntimeWarning, match="orthogonality defect above 1"):
        model.eval()
    summarize(other := nn.Sequential(nn.Linear(6, 5)))
    with torch.no_grad():
        other[0].b.mul_(100)
    constrain(other, "retract"), other.eval(), other.state_dict()  # which has made b orthonormal


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 7), (7, 300), (40, 40), (5, 1), (1, 5)])
def test_the_bound_on_the_norm(shape, dtype):
    b = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = torch.linalg.matrix_norm(b.double(), 2).item()
    assert 0.85 * norm < diagnosis._norm_at_least(b) < norm * (1 + 1e-6)
    assert diagnosis._norm_at_least(torch.zeros(shape, dtype=dtype)) == 0
    one = torch.zeros(shape, dtype=dtype)
    one[-1, -1] = 4  # a direction among many others
    assert diagnosis._norm_at_least(one) == pytest.approx(4, rel=1e-6)
    assert diagnosis._norm_at_least(torch.stack([one, 0 * one]).float()) == pytest.approx(4, rel=1e-6)
    assert diagnosis._norm_at_least(torch.full(shape, torch.finfo(dtype).max, dtype=dtype)) > 60000


@pytest.mark.parametrize("size", [2.5, 4.0])
def test_one_large_singular_value_among_many_is_found(size):
    assert diagnosis._norm_at_least(far(SummaryLinear(512, 512), size).b.detach()) > 2


def test_a_sharded_b_is_not_gathered(monkeypatch):
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        model = nn.Sequential(far(constrain(SummaryLinear(4, 3), "penalty")))
        parallelize(model, DeviceMesh("cpu", [0]), {"0": "outputs"})
        monkeypatch.setattr(DTensor, "full_tensor", lambda *_: pytest.fail("gathered"))
        monkeypatch.setattr(DTensor, "redistribute", lambda *_: pytest.fail("gathered"))
        model.eval(), model.state_dict()
    finally:
        distributed.destroy_process_group()


def test_a_defect_above_1_is_warned_of_with_the_spectrum():
    layer = SummaryLinear(6, 5)
    with torch.no_grad():
        layer.b.mul_(1.9)
    layer.spectrum()
    with torch.no_grad():
        layer.b.mul_(1.2)
    layer.eval()
    with pytest.warns(RuntimeWarning, match=r"singular value of at least 2\.28, an orthogonality defect above 1"):
        layer.spectrum()
    layer.spectrum()


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_what_has_no_values_of_its_own_is_not_looked_at():
    layer = constrain(spoiled(SummaryLinear(4, 3)), "penalty")
    torch.func.vmap(lambda b: torch.func.functional_call(layer, {"b": b}, torch.ones(4)))(torch.ones(2, 4, 3))
    constrain(SummaryLinear(4, 3, device="meta"), "penalty").eval().state_dict()
    torch.export.export(far(constrain(SummaryLinear(4, 3), "penalty")), (torch.ones(1, 4),))
    with torch._subclasses.FakeTensorMode() as mode:
        constrain(SummaryLinear(4, 3), "penalty").eval().state_dict()
        with mode:
            layer.eval()

    @torch.compile(backend="eager", fullgraph=True)
    def call(x):
        return layer(x)

    call(torch.ones(1, 4))
    del layer.b
    layer.eval().state_dict()
    with FlopCounterMode(display=False) as counter:
        layer.eval()
    assert counter.get_total_flops() == 0


def test_polynomial_layers():
    """The norm of b divides it, so that its singular values tell nothing; its gain may fail too."""
    layer = SummaryLinear(4, 3, polynomial="newton-schulz")
    with torch.no_grad():
        layer.b.mul_(5)
    layer.spectrum(), layer.spectrum(weight=True)
    with torch.no_grad():
        layer.gain.fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match=r"^gain of SummaryLinear\(.* not finite"):
        layer.eval()
    with pytest.raises(ValueError, match=r"^gain: got a value that is not finite"):
        layer.spectrum(weight=True)
    assert layer.spectrum().isfinite().all()


def test_parametrized_layers_and_those_that_return_pairs():
    layer = constrain(SummaryLinear(4, 3), "parametrization")
    with torch.no_grad():
        layer.parametrizations.b.original[0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer.eval()
    with pytest.warns(RuntimeWarning, match=r"^b of SummaryLayer"):
        spoiled(SummaryLayer(4, 3)).eval()


def test_a_warning_is_no_state():
    layer = spoiled(SummaryLinear(4, 3))
    with pytest.warns(RuntimeWarning, match="not finite"):
        layer.eval()
    assert layer.state_dict().keys() == {"b", "bias"} and vars(layer).keys() == vars(SummaryLinear(4, 3)).keys()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.warns(RuntimeWarning, match="not finite"):
            torch.save(other.state_dict(), io.BytesIO())


def test_a_look_is_one_reduction():
    layer = SummaryLinear(64, 32)
    with torch.profiler.profile() as profile:
        layer.eval()
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("aten::")}
    assert calls.pop("aten::sum") == 1
    assert not {"aten::isfinite", "aten::all", "aten::abs", "aten::linalg_svd", "aten::mm"} & calls.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagnosis.look(layer)
