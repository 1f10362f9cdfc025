"""Every wrong argument is named, with what was got and what would do, and nothing is modified."""

import math
import re

import pytest
import torch

import interp_nn
from interp_nn import functional as f
from interp_nn.ops import remembered


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
    "nested x": (
        lambda: (torch.nested.nested_tensor([t(*X)], layout=torch.jagged), t(*B)),
        TypeError,
        "x: got a nested tensor, want a dense tensor (call .to_padded_tensor(0.0))",
    ),
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


FOR_B, ROWS, NUMBERS = "for b of shape (4, 2)", "want (3,), x's without its last", "want three finite numbers"
BAD_LOSS = {
    "target's type": ({"target": [0, 1, 1]}, TypeError, "target: got list, want a torch.Tensor of class indices"),
    "target's dtype": ({"target": TARGET.int()}, TypeError, "target: got dtype torch.int32, want int64 class indices"),
    "probabilities": ({"target": t(3, 2)}, TypeError, "target: got dtype torch.float32, want int64 class indices"),
    "target's length": ({"target": TARGET[:2]}, ValueError, f"target: got shape (2,), {ROWS}"),
    "target's rank": ({"target": TARGET[None]}, ValueError, f"target: got shape (1, 3), {ROWS}"),
    "target's device": (
        {"target": TARGET.to("meta")},
        ValueError,
        "target: got device meta, want cpu, the device of x",
    ),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: got 'avg', want one of ('mean', 'sum', 'none')"),
    "no reduction": ({"reduction": None}, ValueError, "reduction: got None, want one of ('mean', 'sum', 'none')"),
    "two weights": ({"weights": (1, 2)}, ValueError, f"weights: got (1.0, 2.0), {NUMBERS}"),
    "infinite weight": ({"weights": (1, 2, math.inf)}, ValueError, f"weights: got (1.0, 2.0, inf), {NUMBERS}"),
    "NaN weight": ({"weights": (1, math.nan, 2)}, ValueError, f"weights: got (1.0, nan, 2.0), {NUMBERS}"),
    "one weight": ({"weights": 1.0}, TypeError, f"weights: got 1.0, {NUMBERS} (of CE, CE and MSE)"),
    "no weights": ({"weights": None}, TypeError, f"weights: got None, {NUMBERS}"),
    "weights in words": ({"weights": "abc"}, TypeError, f"weights: got 'abc', {NUMBERS}"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index: got float, want an int"),
    "large ignore_index": ({"ignore_index": 2**70}, ValueError, f"ignore_index: got {2**70}, want an int of 64 bits"),
}


@pytest.mark.parametrize("case", BAD_LOSS)
@pytest.mark.parametrize("function", [loss, head])
def test_losses(function, case):
    options, error, message = BAD_LOSS[case]
    refuse(error, message, function, **options)


def plan(n=3, d=4, k=2, **options):
    return interp_nn.plan(n, d, k, **options)


def biased(bias):
    return {"x": t(*X), "b": t(*B), "bias": bias}


# Function, its arguments, and what is said of them.
OTHERS = [
    (f.summary, biased(t(3)), ValueError, f"bias: got shape (3,), want (2,) {FOR_B}"),
    (f.summary, biased(t(1, 2)), ValueError, f"bias: got shape (1, 2), want (2,) {FOR_B}"),
    (f.summary, biased(t()), ValueError, f"bias: got shape (), want (2,) {FOR_B}"),
    (f.summary, biased(t(2).double()), TypeError, "bias: got dtype torch.float64, want torch.float32, the dtype of b"),
    (f.summary, biased(t(2, device="meta")), ValueError, "bias: got device meta, want cpu, the device of b"),
    (f.summary, biased(True), TypeError, "bias: got bool, want a torch.Tensor"),
    (f.summary, biased(t(2).long()), TypeError, f"bias: got dtype torch.int64, {REAL}"),
    (head, {"a": t(5, 3)}, ValueError, f"output_weight: got shape (5, 3), want (classes, 2) {FOR_B}"),
    (head, {"a": t(5)}, ValueError, f"output_weight: got shape (5,), want (classes, 2) {FOR_B}"),
    (head, {"a": t(*A).half()}, TypeError, "output_weight: got dtype torch.float16, want torch.float32"),
    (head, {"c": t(4)}, ValueError, "output_bias: got shape (4,), want (5,) for output_weight (5, 2)"),
    (head, {"c": t(1, 5)}, ValueError, "output_bias: got shape (1, 5), want (5,) for output_weight (5, 2)"),
    (head, {"c": t(5, device="meta")}, ValueError, "output_bias: got device meta, want cpu"),
    (head, {"c": 0.5}, TypeError, "output_bias: got float, want a torch.Tensor"),
    (f.orthogonalize, {"b": t(*B), "tolerance": "x"}, TypeError, "tolerance: got 'x', want a number or None"),
    (
        f.orthogonalize,
        {"b": t(*B), "tolerance": torch.ones(2)},
        TypeError,
        "tolerance: got tensor([1., 1.]), want a number or None",
    ),
    (f.orthogonalize, {"b": t(*B), "max_iterations": "many"}, TypeError, "max_iterations: got 'many', want an int"),
    (f.orthogonalize, {"b": t(*B), "max_iterations": None}, TypeError, "max_iterations: got None, want an int"),
    (plan, {"n": -1}, ValueError, "plan: n must be an integer >= 0, got -1"),
    (plan, {"d": 4.0}, ValueError, "plan: d must be an integer >= 0, got 4.0"),
    (plan, {"k": "2"}, ValueError, "plan: k must be an integer >= 0, got '2'"),
    (plan, {"n": True}, ValueError, "plan: n must be an integer >= 0, got True"),
    (plan, {"grad": ("x", "bias")}, ValueError, "plan: grad may hold 'x' and 'b', got ['bias', 'x']"),
]


@pytest.mark.parametrize(("function", "options", "error", "message"), OTHERS)
def test_other_arguments(function, options, error, message):
    refuse(error, message, function, **options)


def test_output_weight_is_not_optional():
    refuse(ValueError, "output_weight: got shape None", f.summary_head_cross_entropy, t(*X), t(*B), None, None, TARGET)


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
    monkeypatch.setattr(remembered, "plans", {})
    monkeypatch.setattr(remembered, "_MOST_PLANS", 3)
    for n in range(6):
        assert f.summary(t(n, 4), t(*B)).shape == (n, 2)
    assert len(remembered.plans) == 3


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
