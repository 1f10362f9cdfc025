"""Every wrong argument is named, with what was got and what would do, and nothing is modified."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import interp_nn
from interp_nn import functional as f


def t(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device) + 0.5


X, B, BIAS, A, C = (3, 4), (4, 2), (2,), (5, 2), (5,)
TARGET = torch.tensor([0, 1, 1])


def head(x=None, b=None, a=None, c=None, target=TARGET, **options):
    given = (t(*shape) if value is None else value for value, shape in ((x, X), (b, B), (a, A), (c, C)))
    return f.summary_head_cross_entropy(*given, target, **options)


def loss(**options):
    target = options.pop("target", TARGET)
    return f.summary_cross_entropy(t(*X), t(*B), target, **options)


# What takes (x, b), and so shares their checks.
TWO = {
    "summary": f.summary,
    "summary_pair": f.summary_pair,
    "summary_cross_entropy": lambda x, b: f.summary_cross_entropy(x, b, TARGET),
    "summary_head_cross_entropy": lambda x, b: f.summary_head_cross_entropy(x, b, t(*A), t(*C), TARGET),
    "inverse_summary": f.inverse_summary,
}
SPARSE = "want a dense tensor (call .to_dense())"
REAL = "want float64, float32, bfloat16 or float16"
BAD_TWO = {
    "b of one dimension": (lambda: (t(*X), t(4)), ValueError, "b: got shape (4,), want a matrix (d, k)"),
    "b of three dimensions": (lambda: (t(*X), t(1, 4, 2)), ValueError, "b: got shape (1, 4, 2), want a matrix (d, k)"),
    "scalar x": (lambda: (t(), t(*B)), ValueError, "x: got a scalar, want (..., d)"),
    "other d": (lambda: (t(3, 5), t(*B)), ValueError, "x: got shape (3, 5), want (..., 4) for b of shape (4, 2)"),
    "integer x": (lambda: (t(*X).long(), t(*B)), TypeError, f"x: got dtype torch.int64, {REAL}"),
    "boolean b": (lambda: (t(*X), t(*B).bool()), TypeError, f"b: got dtype torch.bool, {REAL}"),
    "complex x": (lambda: (t(*X) + 0j, t(*B)), TypeError, f"x: got dtype torch.complex64, {REAL}"),
    "float8 b": (
        lambda: (t(*X), t(*B).to(torch.float8_e4m3fn)),
        TypeError,
        f"b: got dtype torch.float8_e4m3fn, {REAL}",
    ),
    "mixed dtypes": (
        lambda: (t(*X), t(*B).double()),
        TypeError,
        "b: got dtype torch.float64, want torch.float32, the dtype of x",
    ),
    "mixed devices": (
        lambda: (t(*X), t(*B, device="meta")),
        ValueError,
        "b: got device meta, want cpu, the device of x",
    ),
    "no tensor x": (lambda: ([[0.5] * 4] * 3, t(*B)), TypeError, "x: got list, want a torch.Tensor"),
    "no tensor b": (lambda: (t(*X), None), TypeError, "b: got NoneType, want a torch.Tensor"),
    "numpy b": (lambda: (t(*X), t(*B).numpy()), TypeError, "b: got ndarray, want a torch.Tensor"),
    "sparse x": (lambda: (t(*X).to_sparse(), t(*B)), TypeError, f"x: got layout torch.sparse_coo, {SPARSE}"),
    "sparse b": (lambda: (t(*X), t(*B).to_sparse()), TypeError, f"b: got layout torch.sparse_coo, {SPARSE}"),
}


def check_untouched(call, tensors):
    tensors = [
        v for v in tensors if isinstance(v, torch.Tensor) and v.layout is torch.strided and v.device.type == "cpu"
    ]
    before = [(v.clone(), v._version) for v in tensors]
    call()
    assert all(torch.equal(v, old) and v._version == version for v, (old, version) in zip(tensors, before, strict=True))


def refuse(error, message, function, *arguments, **options):
    def call():
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            function(*arguments, **options)

    check_untouched(call, [*arguments, *options.values()])


@pytest.mark.parametrize("case", BAD_TWO)
@pytest.mark.parametrize("function", TWO.values(), ids=TWO)
def test_x_and_b(function, case):
    make, error, message = BAD_TWO[case]
    refuse(error, message, function, *make())


ONE = {"gram": f.gram, "effective_weight": f.effective_weight, "orthogonalize": f.orthogonalize}


@pytest.mark.parametrize(
    "case", ["b of one dimension", "b of three dimensions", "boolean b", "no tensor b", "sparse b"]
)
@pytest.mark.parametrize("function", ONE.values(), ids=ONE)
def test_b_alone(function, case):
    make, error, message = BAD_TWO[case]
    refuse(error, message, function, make()[1])


BAD_BIAS = {
    "length": (lambda: t(3), ValueError, "bias: got shape (3,), want (2,) for b of shape (4, 2)"),
    "rank": (lambda: t(1, 2), ValueError, "bias: got shape (1, 2), want (2,) for b of shape (4, 2)"),
    "scalar": (lambda: t(), ValueError, "bias: got shape (), want (2,) for b of shape (4, 2)"),
    "dtype": (lambda: t(2).double(), TypeError, "bias: got dtype torch.float64, want torch.float32, the dtype of b"),
    "device": (lambda: t(2, device="meta"), ValueError, "bias: got device meta, want cpu, the device of b"),
    "type": (lambda: True, TypeError, "bias: got bool, want a torch.Tensor"),
    "integer": (lambda: t(2).long(), TypeError, f"bias: got dtype torch.int64, {REAL}"),
}


@pytest.mark.parametrize("case", BAD_BIAS)
def test_bias(case):
    make, error, message = BAD_BIAS[case]
    refuse(error, message, f.summary, t(*X), t(*B), make())


BAD_HEAD = {
    "weight's columns": (
        {"a": t(5, 3)},
        ValueError,
        "output_weight: got shape (5, 3), want (classes, 2) for b of shape",
    ),
    "weight's rank": (
        {"a": t(5)},
        ValueError,
        "output_weight: got shape (5,), want (classes, 2) for b of shape (4, 2)",
    ),
    "weight's dtype": ({"a": t(*A).half()}, TypeError, "output_weight: got dtype torch.float16, want torch.float32"),
    "bias's length": ({"c": t(4)}, ValueError, "output_bias: got shape (4,), want (5,) for output_weight (5, 2)"),
    "bias's rank": ({"c": t(1, 5)}, ValueError, "output_bias: got shape (1, 5), want (5,) for output_weight (5, 2)"),
    "bias's device": ({"c": t(5, device="meta")}, ValueError, "output_bias: got device meta, want cpu"),
    "bias's type": ({"c": 0.5}, TypeError, "output_bias: got float, want a torch.Tensor"),
}


@pytest.mark.parametrize("case", BAD_HEAD)
def test_output_layer(case):
    options, error, message = BAD_HEAD[case]
    refuse(error, message, head, **options)


def test_output_weight_is_not_optional():
    refuse(ValueError, "output_weight: got shape None", f.summary_head_cross_entropy, t(*X), t(*B), None, None, TARGET)


BAD_LOSS = {
    "target's type": ({"target": [0, 1, 1]}, TypeError, "target: got list, want a torch.Tensor of class indices"),
    "target's dtype": ({"target": TARGET.int()}, TypeError, "target: got dtype torch.int32, want int64 class indices"),
    "probabilities": ({"target": t(3, 2)}, TypeError, "target: got dtype torch.float32, want int64 class indices"),
    "target's length": ({"target": TARGET[:2]}, ValueError, "target: got shape (2,), want (3,), x's without its last"),
    "target's rank": (
        {"target": TARGET[None]},
        ValueError,
        "target: got shape (1, 3), want (3,), x's without its last",
    ),
    "target's device": (
        {"target": TARGET.to("meta")},
        ValueError,
        "target: got device meta, want cpu, the device of x",
    ),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: got 'avg', want one of ('mean', 'sum', 'none')"),
    "no reduction": ({"reduction": None}, ValueError, "reduction: got None, want one of ('mean', 'sum', 'none')"),
    "two weights": ({"weights": (1, 2)}, ValueError, "weights: got (1.0, 2.0), want three finite numbers"),
    "infinite weight": (
        {"weights": (1, 2, float("inf"))},
        ValueError,
        "weights: got (1.0, 2.0, inf), want three finite",
    ),
    "NaN weight": ({"weights": (1, float("nan"), 2)}, ValueError, "weights: got (1.0, nan, 2.0), want three finite"),
    "one weight": ({"weights": 1.0}, TypeError, "weights: got 1.0, want three finite numbers (of CE, CE and MSE)"),
    "no weights": ({"weights": None}, TypeError, "weights: got None, want three finite numbers"),
    "weights in words": ({"weights": "abc"}, TypeError, "weights: got 'abc', want three finite numbers"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index: got float, want an int"),
    "large ignore_index": ({"ignore_index": 2**70}, ValueError, f"ignore_index: got {2**70}, want an int of 64 bits"),
}


@pytest.mark.parametrize("case", BAD_LOSS)
@pytest.mark.parametrize("function", [loss, head])
def test_losses(function, case):
    options, error, message = BAD_LOSS[case]
    refuse(error, message, function, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tolerance": "x"}, TypeError, "tolerance: got 'x', want a number or None"),
        ({"tolerance": torch.ones(2)}, TypeError, "tolerance: got tensor([1., 1.]), want a number or None"),
        ({"max_iterations": "many"}, TypeError, "max_iterations: got 'many', want an int"),
        ({"max_iterations": None}, TypeError, "max_iterations: got None, want an int"),
    ],
)
def test_the_limits_of_orthogonalize(options, error, message):
    refuse(error, message, f.orthogonalize, t(*B), **options)


def test_no_classes():
    refuse(ValueError, "target: got zero classes to choose from", f.summary_cross_entropy, t(3, 4), t(4, 0), TARGET)


# A problem that was checked once is remembered; a different one must not be taken for it.


@pytest.mark.parametrize("case", [case for case in BAD_TWO if "scalar" not in case])
@pytest.mark.parametrize("pair", [False, True])
def test_a_bad_call_after_a_good_one_is_still_caught(pair, case):
    function = f.summary_pair if pair else f.summary
    make, error, message = BAD_TWO[case]
    for _ in range(2):
        function(t(*X), t(*B))
        refuse(error, message, function, *make())


def test_a_remembered_problem_still_checks_its_bias():
    for bias, expected in ((t(2), None), (t(3), ValueError), (None, None), (t(2).half(), TypeError)):
        if expected is None:
            f.summary(t(*X), t(*B), bias)
        else:
            with pytest.raises(expected, match=r"^bias: got"):
                f.summary(t(*X), t(*B), bias)


def test_a_remembered_problem_is_cast_under_autocast_and_only_there():
    x, b = t(*X), t(*B)
    for _ in range(2):
        assert f.summary(x, b).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert f.summary(x, b).dtype == torch.bfloat16
            refuse(TypeError, "b: got dtype torch.float64, want torch.bfloat16", f.summary, x, b.double())


def test_a_remembered_problem_on_another_device_stays_there():
    assert f.summary(t(*X), t(*B)).device.type == "cpu"
    assert f.summary(t(*X, device="meta"), t(*B, device="meta")).device.type == "meta"


def test_remembered_problems_are_bounded(monkeypatch):
    monkeypatch.setattr(f, "_plans", {})
    monkeypatch.setattr(f, "_MOST_PLANS", 3)
    for n in range(6):
        assert f.summary(t(n, 4), t(*B)).shape == (n, 2)
    assert len(f._plans) == 3


# Engines


def test_an_unknown_engine():
    with pytest.raises(ValueError, match=r"^use_engine: unknown engine 'warp'; this build has eager.*'auto'"):
        interp_nn.use_engine("warp")
    assert f.summary(t(*X), t(*B)).shape == (3, 2)


def test_an_unknown_engine_in_the_environment_fails_at_use_not_at_import():
    code = (
        "import torch, interp_nn; print('imported'); interp_nn.functional.summary(torch.ones(3, 4), torch.ones(4, 2))"
    )
    path = os.pathsep.join([str(Path(interp_nn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "INTERP_NN_ENGINE": "warp"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == "imported\n"
    assert re.search(r"ValueError: INTERP_NN_ENGINE: unknown engine 'warp'; this build has eager", result.stderr)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((-1, 4, 2), {}, "plan: n must be an integer >= 0, got -1"),
        ((3, 4.0, 2), {}, "plan: d must be an integer >= 0, got 4.0"),
        ((3, 4, "2"), {}, "plan: k must be an integer >= 0, got '2'"),
        ((True, 4, 2), {}, "plan: n must be an integer >= 0, got True"),
        ((3, 4, 2), {"grad": ("x", "bias")}, "plan: grad may hold 'x' and 'b', got ['bias', 'x']"),
    ],
)
def test_plan(arguments, options, message):
    refuse(ValueError, message, interp_nn.plan, *arguments, **options)


# Tensors that are not plain


class Tagged(torch.Tensor):
    pass


def test_a_plain_subclass_is_welcome():
    assert f.summary(t(*X).as_subclass(Tagged), t(*B)).shape == (3, 2)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.distributed's own imports
def test_a_dtensor_is_refused_where_there_is_no_rule_for_it():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.tensor import DTensor, init_device_mesh

        mesh = init_device_mesh("cpu", (1,))
        x, b = (DTensor.from_local(v, mesh) for v in (t(*X), t(*B)))
        for name, function in TWO.items():
            if name in ("summary", "summary_pair"):
                with pytest.raises(TypeError, match=r"^x: got a local tensor, want a DTensor on the mesh of b"):
                    function(t(*X), b)
                continue
            with pytest.raises(TypeError, match=r"^x: got a DTensor, which has no sharding rule here; want a local"):
                function(x, b)
            with pytest.raises(TypeError, match=r"^b: got a DTensor"):
                function(t(*X), b)
    finally:
        dist.destroy_process_group()
