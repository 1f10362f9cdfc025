"""Layers and models saved and loaded: by PyTorch's formats, by safetensors, by pickle, and from nn.Linear's and back."""

import copy
import pickle

import pytest
import torch
from saving import reloaded
from torch import nn

from interp_nn.convert import fold, summarize
from interp_nn.nn import SummaryClassifier, SummaryConv2d, SummaryHead, SummaryLayer, SummaryLinear
from interp_nn.nn.orthogonality import constrain


def network():
    return nn.Sequential(
        SummaryConv2d(2, 6, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        SummaryLinear(24, 9),
        SummaryLinear(9, 16, bias=False),
        SummaryHead(16, 8, 5),
    )


def randomized(model):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / 3)
    return model.eval()


X = torch.linspace(-1, 1, 2 * 2 * 16).view(2, 2, 4, 4)


@pytest.fixture(params=[False, True], ids=["copied", "swapped"])
def _swapping(request):
    """Both ways in which PyTorch can move and load parameters."""
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


by_both_ways = pytest.mark.usefixtures("_swapping")


# A state dict


@by_both_ways
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
def test_a_state_dict_of_weights_only(tmp_path, assign, mmap):
    model, other = randomized(network()), network().eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True, mmap=mmap)
    assert not any(torch.equal(other.state_dict()[name], value) for name, value in state.items())
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(X), model(X))
    assert all(p.requires_grad and p.is_leaf for p in other.parameters())


@by_both_ways
def test_a_model_made_on_the_meta_device():
    model = randomized(network())
    with torch.device("meta"):
        other = network().eval()
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(X), model(X))


def plain_network():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 9), nn.Linear(9, 16, bias=False)
    )


@by_both_ways
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_plain_models_state_is_refused(strict, assign):
    model = network()[:5]
    state = plain_network().state_dict()
    with pytest.raises(
        RuntimeError, match=r"3\.weight: is a plain layer's weight.*load_state_dict\(model, state"
    ) as raised:
        model.load_state_dict(state, strict, assign)
    assert all(f"{name}.weight: is a plain" in str(raised.value) for name in (0, 3, 4))
    with pytest.raises(RuntimeError, match=r"weight: is a plain layer's weight, or b of interp_nn 0.1"):
        model[3].load_state_dict(nn.Linear(24, 9).state_dict(), strict, assign)


@by_both_ways
@pytest.mark.parametrize("strict", [True, False])
def test_our_state_in_a_plain_model_is_refused_by_pytorch(strict):
    state, plain = network()[:5].state_dict(), plain_network()
    if strict:
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0.b", "3.b", "4.b"'):
            plain.load_state_dict(state)
    else:  # PyTorch says so, and raises nothing
        assert plain.load_state_dict(state, strict=False).unexpected_keys == ["0.b", "3.b", "4.b"]


@by_both_ways
def test_the_checkpoint_of_a_converted_model_loads_into_a_converted_model_alone():
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    converted, fresh = copy.deepcopy(plain), copy.deepcopy(plain)
    summarize(converted)
    with pytest.raises(RuntimeError, match=r'"0\.b"'):
        fresh.load_state_dict(converted.state_dict())
    summarize(fresh, preserve="weight")
    fresh.load_state_dict(converted.state_dict())
    torch.testing.assert_close(fresh(x), plain(x), rtol=1e-12, atol=1e-14)
    fold(fresh)
    torch.testing.assert_close(fresh(x), plain(x), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*an orthogonality defect above 1:RuntimeWarning")
@by_both_ways
def test_loading_into_a_frozen_and_into_a_penalised_layer():
    model, other = randomized(network()), randomized(network())
    constrain(other, "penalty")
    other(X).sum().backward()
    other[3].freeze()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X)) and other[3].cached_gram() is None


# Devices and types


@by_both_ways
@pytest.mark.parametrize("state", ["plain", "frozen", "penalty"])
def test_a_change_of_dtype_and_back(state):
    model = randomized(network())
    wanted = model(X).detach()  # a graph would hold on to the parameters
    if state == "frozen":
        model[0].freeze(), model[3].freeze()
    if state == "penalty":
        constrain(model, "penalty")(X).sum().backward()
    parameters = list(model.parameters())
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    assert all((a is b) for a, b in zip(parameters, model.parameters(), strict=True)) or not swapped
    exact = model(X.double()).detach()
    torch.testing.assert_close(exact.float(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.float()(X).detach(), wanted, rtol=1e-6, atol=1e-6)
    assert model.to(torch.bfloat16)(X.bfloat16()).dtype == torch.bfloat16


# Whole modules

MODULES = {
    "linear": lambda: SummaryLinear(6, 4),
    "conv2d": lambda: SummaryConv2d(2, 4, 3, groups=2),
    "layer": lambda: SummaryLayer(6, 4),
    "classifier": lambda: SummaryClassifier(6, 4),
    "head": lambda: SummaryHead(6, 4, 3),
    "frozen": lambda: SummaryLinear(6, 4).freeze(),
    "penalty": lambda: constrain(SummaryLinear(6, 4), "penalty"),
    "retract": lambda: constrain(SummaryLinear(6, 4), "retract"),
    "converted": lambda: _converted(nn.Linear(6, 4)),
    "folded": lambda: _folded(SummaryLinear(6, 4)),
}
DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: reloaded(m, weights_only=False),
}


def _converted(layer):
    summarize(layer)
    return layer


def _folded(layer):
    fold(layer)
    return layer


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_a_duplicate_is_the_same_and_its_own(make, duplicate):
    module = make()
    x = torch.randn(3, 6) if not isinstance(module, SummaryConv2d) else torch.randn(3, 2, 5, 5)
    module(x)
    other = duplicate(module)
    assert type(other) is type(module) and repr(other) == repr(module) and other.training == module.training
    before = flat(module(x))
    assert torch.equal(flat(other(x)), before)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert not torch.equal(flat(other(x)), before) and torch.equal(flat(module(x)), before)


def flat(y):
    """Any layer's output, of one tensor or a pair, as one vector."""
    return torch.cat([t.flatten() for t in y]) if isinstance(y, tuple) else y.flatten()


# safetensors


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = randomized(network()), network().eval()
    file = tmp_path / "model.safetensors"
    safetensors.save_model(model, str(file))
    assert sorted(safetensors.load_file(file)) == sorted(model.state_dict())
    assert safetensors.load_model(other, str(file)) == (set(), [])
    assert torch.equal(other(X), model(X))
    fold(other)
    safetensors.save_file(other.state_dict(), file)
    plain = nn.Linear(24, 9)
    plain.load_state_dict({key: safetensors.load_file(file)[f"3.{key}"] for key in ("weight", "bias")})
    assert torch.equal(plain.weight, other[3].weight)
