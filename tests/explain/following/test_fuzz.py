"""Random models against finite differences: none has a wrong map in silence, and bugs that are put in on purpose are found."""

import re
from functools import cache

import pytest
from fuzzed_models import OPERATIONS, WRITES, of_seed, verdict

from interp_nn.explain.following import calls, operations, piecewise_linear, recorder, secants

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def counts(seeds):
    found = {}
    for seed in seeds:
        text = of_seed(seed)
        result = verdict(text, seed)
        assert not result.startswith("WRONG"), f"seed {seed}: {result}\n{text}"
        found[result] = found.get(result, 0) + 1
    return found


def test_200_models_have_no_wrong_map_in_silence():
    assert len(OPERATIONS) >= 80
    assert sum(bool(re.search(r"\w_\(|;", of_seed(seed))) for seed in range(0, 300, 3)) == 100  # a third, which write
    found = counts(range(200))
    assert found["exact"] > 90 and found["secant"] > 50 and found.get("fails", 0) < 10


@pytest.mark.slow
def test_2000_models_have_no_wrong_map_in_silence():
    found = counts(range(1000, 3000))
    assert found["exact"] > 900 and found["secant"] > 500 and found.get("fails", 0) < 50


def constant(call):
    return calls.piecewise_constant(call, treatment="gate")


def sort_without_dim(call):
    call.named["dim"] = -1
    return piecewise_linear.selection(call)


def elu_without_alpha(call):
    return secants._elu(call.input, 1.0, call.argument("scale", 1)), None


def leaky_with_the_default(call):
    return piecewise_linear.activation(lambda call: piecewise_linear.Pieces((0,), (0.01, 1), (0, 0)))(call)


def complex_as_constant(call, multiply=operations.TABLE["mul"]):
    return constant(call) if any(isinstance(value, complex) for value in call.args) else multiply(call)


def bounds_in_order(self, name, default=None, argument=calls.Call.argument):
    both = name in ("min", "max") and self.kwargs.keys() >= {"min", "max"}
    return list(self.kwargs.values())[name == "max"] if both else argument(self, name, default)


# Bugs by name: what to replace (owner, name, by what), and a statement of the grammar that shows it.
BUGS = {
    "sort knows no dim": (
        [(operations.TABLE, "sort", sort_without_dim)],
        "{x}.view({n}, 2, 3).sort(dim=1, stable=True).values.flatten(1)",
    ),
    "elu knows no alpha": ([(secants.SLOPES, "elu", elu_without_alpha)], "F.elu({x}, {s})"),
    "leaky_relu knows no slope": (
        [(operations.TABLE, "leaky_relu", leaky_with_the_default)],
        "F.leaky_relu({x}, {s})",
    ),
    "clamp reads its bounds in order": (
        [(calls.Call, "argument", bounds_in_order)],
        "{x}.clamp(max={c}, min={c} - 1)",
    ),
    "a write is not seen through views": (
        [(recorder.DependencyMap, "write", lambda self, t, dependence: self.set(t, dependence))],
        "{v} = {x}[:, :]; {x}.pow_(2)",
    ),
    "aten operators that write in place are not known": (
        [(operations, "writes_first", lambda function: None)],
        "{v} = {x} * 1; torch.ops.aten.relu_.default({v})",
    ),
    "complex values count as piecewise constant": (
        [(operations.TABLE, "mul", complex_as_constant)],
        "{x} + ({x} * 1j).imag",
    ),
    "detach gives a constant": ([(operations.TABLE, "detach", constant)], "{x} + {y}.detach()"),
    "calls in TorchScript are not seen": (
        [
            (recorder.Recorder, "see", lambda self, *_: None),
            (recorder.Recorder, "unrecorded_reason", lambda self, _: None),
        ],
        "{x} + scripted({y})",
    ),
    "hooks on tensors run": ([(operations, "_OF_GRADIENTS", frozenset())], "hooked({x})"),
    "a mean has the wrong sign": (
        [(operations.TABLE, "mean", lambda call: calls.RuleResult("affine", lambda now: -now.run()))],
        "{x} - {x}.mean(1, keepdim=True)",
    ),
    "a floor is an identity": (
        [(operations.TABLE, "floor", lambda call: calls.RuleResult("affine", lambda now: now.input * 1))],
        "{x} + {y}.floor()",
    ),
}


@cache
def programs():
    return [of_seed(seed) for seed in range(4000)]


def found(text, seed):
    """Return True if the map is wrong, or if `linearize` itself saw that the replay is not the model."""
    try:
        return verdict(text, seed).startswith("WRONG")
    except RuntimeError as error:
        return "the replay is not the model" in str(error)


@pytest.mark.parametrize("name", BUGS)
def test_bugs_that_are_put_in_are_found(name, monkeypatch):
    patches, statement = BUGS[name]
    assert any(statement in spellings for spellings in (*OPERATIONS.values(), WRITES))
    pattern = re.sub(r"\\\{n\\\}", r"len\\(h0\\)", re.escape(statement))
    pattern = re.compile(re.sub(r"\\\{\w\\\}", r"[\\w.]+", pattern))
    chosen = [(text, seed) for seed, text in enumerate(programs()) if pattern.search(text)][:6]
    assert len(chosen) == 6 and not any(found(*one) for one in chosen)
    for owner, key, value in patches:
        if isinstance(owner, dict):
            monkeypatch.setitem(owner, key, value)
        else:
            monkeypatch.setattr(owner, key, value)
    assert any(found(*one) for one in chosen)
