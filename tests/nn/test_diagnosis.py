"""One warning for a layer whose b is not finite or far from orthonormal; none in a forward, and none for what may well be so."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from layers import make
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from interp_nn import linalg
from interp_nn.convert import fold, summarize
from interp_nn.nn import SummaryConv2d, SummaryHead, SummaryLayer, SummaryLinear, constrain, diagnosis, retract_

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_values_are_finite(dtype):
    layer = SummaryLinear(4, 3, dtype=dtype)
    with torch.no_grad():
        layer.b.fill_(torch.finfo(dtype).max)
    layer.eval(), layer.state_dict()


def test_converted_layers_are_not_warned_of():
    """The singular values of a trained weight may be anything, and its b has their cube roots."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight.mul_(100)
    summarize(model)
    model.eval(), model.state_dict(), model[0].freeze(), model[0].fold(), model[0].orthogonality_defect(), fold(model)


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
    layer = spoiled(SummaryLinear(4, 3))
    torch.func.vmap(lambda b: torch.func.functional_call(layer, {"b": b}, torch.ones(4)))(torch.ones(2, 4, 3))
    SummaryLinear(4, 3, device="meta").eval().state_dict()
    with torch._subclasses.FakeTensorMode() as mode:
        SummaryLinear(4, 3).eval().state_dict()
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
