"""Whole models converted in place and back: what changes, and what must not."""

import copy
import warnings

import pytest
import torch
from convertible import ResNet, classes, error
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from interp_nn import linalg
from interp_nn.convert import fold, summarize
from interp_nn.nn import SummaryClassifier, SummaryConv2d, SummaryHead, SummaryLayer, SummaryLinear, constrain, weights

FLOATS = [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)]


# Outputs, and the way back


@pytest.mark.parametrize(("dtype", "bound"), FLOATS)
def test_outputs_are_kept_and_fold_goes_back(dtype, bound):
    model, x = ResNet().eval().to(dtype), torch.randn(2, 3, 12, 12, dtype=dtype)
    before, kinds, state = model(x), classes(model), copy.deepcopy(model.state_dict())
    report = summarize(model)
    assert error(model(x), before) <= bound and report.error <= bound
    kinds_now = classes(model)
    assert {n for n in kinds if kinds[n] is not kinds_now[n]} == {row.name for row in report.converted}
    assert {kinds_now[row.name] for row in report.converted} == {SummaryLinear, SummaryConv2d}
    names = {f"{row.name}.weight": f"{row.name}.b" for row in report.converted}
    assert list(model.state_dict()) == [names.get(name, name) for name in state]
    assert error(model.fc.weight, state["fc.weight"]) <= bound and error(model.fc.b, state["fc.weight"].t()) > 0.1
    back = fold(model)
    assert classes(model) == kinds and not back.skipped
    assert error(model(x), before) <= bound
    for name, value in model.state_dict().items():
        assert not value.is_floating_point() or error(value, state[name]) <= bound or not state[name].any()
    vars_of_plain = set(vars(nn.Linear(1, 1)))
    assert set(vars(model.fc)) == vars_of_plain


def test_fold_after_training_keeps_the_trained_function():
    model, x = ResNet().double().eval(), torch.randn(3, 3, 12, 12, dtype=torch.float64)
    summarize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = model(x)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    trained = model(x).detach()
    assert error(trained, before) > 1e-2
    fold(model)
    assert error(model(x), trained) <= 1e-12
    model(x).sum().backward()  # and trains on, with the same optimizer
    optimizer.step()
    assert error(model(x), trained) > 1e-4


def test_preserving_weights_changes_outputs():
    model, x = ResNet().eval(), torch.randn(2, 3, 12, 12)
    before, state = model(x), copy.deepcopy(model.state_dict())
    report = summarize(model, preserve="weight")
    assert torch.equal(model.fc.b, state["fc.weight"].t()) and torch.equal(model.stem.b, state["stem.weight"])
    assert error(model(x), before) > 1e-2
    wanted = linalg.effective_weight(state["fc.weight"].double().t()).t()
    (row,) = (row for row in report.converted if row.name == "fc")
    assert row.error == pytest.approx(error(wanted, state["fc.weight"]), rel=1e-6)


def test_a_zero_and_a_rank_deficient_weight_keep_their_outputs():
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double(), torch.randn(9, 6, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[1:] = model[0].weight[:1]
        model[1].weight.zero_()
    before = model(x)
    with pytest.warns(
        RuntimeWarning, match=r"^1: the weight is zero.* would never train; take polynomial='newton-schulz'"
    ):
        report = summarize(model)
    assert error(model(x), before) <= 1e-12 and report.converted[1].error == 0
    model(x).square().sum().backward()
    assert not model[1].b.grad.any()


def test_a_zero_weight_that_trains_or_is_frozen():
    model, x = nn.Linear(6, 5), torch.randn(9, 6)
    nn.init.zeros_(model.weight)
    summarize(model, polynomial="newton-schulz")
    model(x).square().sum().backward()
    assert model.gain.grad.any()
    fold(model)
    model.weight.requires_grad_(False)
    summarize(model)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (1, 1), (7, 13)])
def test_odd_sizes(sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that it initializes nothing
        model = nn.Sequential(nn.Linear(*sizes, dtype=torch.float64))
    x = torch.randn(4, sizes[0], dtype=torch.float64)
    before = model(x)
    (row,) = summarize(model).converted
    assert row.shape == sizes
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-14)
    fold(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-14)


def test_the_model_itself_may_be_the_layer():
    layer, x = nn.Linear(5, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    before = layer(x)
    report = summarize(layer)
    assert type(layer) is SummaryLinear and error(layer(x), before) <= 1e-12
    assert "(model)" in str(report) and report.converted[0].name == ""
    fold(layer)
    assert type(layer) is nn.Linear


def test_nothing_random_is_drawn():
    model, state = ResNet(), torch.get_rng_state()
    summarize(model), fold(model)
    assert torch.equal(torch.get_rng_state(), state)


# A layer stays itself


def test_modules_parameters_hooks_and_flags_stay():
    model = ResNet().eval()
    model.stem.train()
    model.stem.weight.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    model.fc.tag = "mine"
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    calls = []
    handles = [
        model.fc.register_forward_hook(lambda m, i, o: calls.append(("forward", type(m)))),
        model.fc.register_forward_pre_hook(lambda m, i: calls.append(("before", type(m)))),
        model.fc.register_full_backward_hook(lambda m, i, o: calls.append(("backward", type(m)))),
        model.fc.weight.register_hook(lambda g: calls.append(("gradient", g.shape))),
    ]
    for convert, kind in ((summarize, SummaryLinear), (fold, nn.Linear)):
        convert(model)
        assert all(modules[name] is m for name, m in model.named_modules())
        renamed = {name.removesuffix(".b") + ".weight" * name.endswith(".b"): p for name, p in model.named_parameters()}
        assert list(renamed) == list(parameters) and all(renamed[name] is p for name, p in parameters.items())
        stem, fc = (layer.b if kind is SummaryLinear else layer.weight for layer in (model.stem, model.fc))
        assert model.stem.training and not model.fc.training and model.fc.tag == "mine"
        assert not stem.requires_grad and not model.fc.bias.requires_grad and fc.requires_grad
        calls.clear()
        model(torch.randn(1, 3, 12, 12, requires_grad=True)).sum().backward()
        assert calls[:2] == [("before", kind), ("forward", kind)]
        assert ("backward", kind) in calls and ("gradient", fc.shape) in calls
    for handle in handles:
        handle.remove()
    calls.clear()
    model(torch.randn(1, 3, 12, 12))
    assert not calls


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_a_compiled_model_is_compiled_again():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double(), torch.randn(6, 5).double()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(x)
    summarize(model)
    assert error(compiled(x), before) <= 1e-12
    with torch.no_grad():
        model[0].b.mul_(2)  # eight times the effective weight
    assert torch.equal(compiled(x), model(x)) and error(compiled(x), before) > 0.5


def test_a_frozen_layer_folds_into_a_plain_one():
    model, x = nn.Sequential(SummaryLinear(5, 4)).eval(), torch.randn(3, 5)
    model[0].freeze()
    before = model(x)
    fold(model)
    assert error(model(x), before) <= 1e-6 and set(vars(model[0])) == set(vars(nn.Linear(1, 1)))
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(model(x), model[0].bias.expand(3, 4))


@pytest.mark.parametrize("conversion", ["summarize", "fold"])
def test_inside_other_modes(conversion):
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    before = model(x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        summarize(model)
        if conversion == "fold":
            fold(model)
    assert error(model(x), before) <= 1e-5 and all(p.requires_grad for p in model.parameters())


# fold


def test_fold_leaves_what_has_no_plain_equal():
    class Mine(SummaryLinear):
        pass

    tied = SummaryLinear(6, 5)
    embedding = nn.Embedding(5, 6)
    embedding.weight = nn.Parameter(tied.b.data.t())
    model = nn.ModuleList([SummaryLinear(4, 3), SummaryLayer(4, 3), SummaryHead(4, 3, 2), Mine(4, 3), tied, embedding])
    model.append(SummaryClassifier(4, 3))
    report = fold(model)
    neither = "neither SummaryLinear nor SummaryConv2d"
    head = f"{neither}; its own fold() returns the plain layers of evaluation mode"
    assert [type(m) for m in model][:2] == [nn.Linear, SummaryLayer] and type(model[4]) is SummaryLinear
    assert {row.name: row.reason for row in report.skipped} == {
        "1": f"{neither}; an nn.Linear with weight b.T and no bias computes its projection",
        "2": head,
        "3": "a subclass of SummaryLinear, which may compute something else",
        "4": "its b is tied to 5.weight",
        "6": head,
    }
    assert {row.reason for row in summarize(model, dry_run=True).skipped if row.name in "126"} <= {
        "neither Linear nor Conv2d"
    }


def test_fold_leaves_a_pruned_layer():
    model = nn.Sequential(prune.l1_unstructured(SummaryLinear(6, 4), "b", 3))
    (skipped,) = fold(model).skipped
    assert skipped.reason.startswith("its b is computed from other parameters") and type(model[0]) is SummaryLinear


def test_scripted_parts_are_not_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model, x = nn.Sequential(scripted, nn.Linear(4, 3)), torch.randn(2, 4)
    before = model(x)
    report = summarize(model)
    assert [row.name for row in report.converted] == ["1"] and [row.name for row in report.skipped] == ["0.0"]
    assert error(model(x), before) <= 1e-6


def test_fold_ends_parametrizations():
    model = nn.Sequential(SummaryLinear(6, 4), SummaryConv2d(1, 4, 3)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    parametrizations.orthogonal(model[0], "b")
    before = model[0](x)
    assert not fold(model).skipped
    assert type(model[0]) is nn.Linear and not parametrize.is_parametrized(model[0])
    assert error(model[0](x), before) <= 1e-12 and list(model[0].state_dict()) == ["bias", "weight"]


@pytest.mark.parametrize("end", [fold, lambda model: constrain(model, None)], ids=["fold", "constrain"])
def test_a_copy_that_ends_its_parametrization_leaves_the_original(end):
    model, x = constrain(nn.Sequential(SummaryLinear(6, 4)), "parametrization"), torch.randn(5, 6)
    before, copied = model(x), copy.deepcopy(model)
    end(copied)
    assert parametrize.is_parametrized(model[0], "b") and torch.equal(model(x), before)
    assert not parametrize.is_parametrized(copied[0]) and error(copied(x), before) <= 1e-6
    fold(model)
    assert error(model(x), before) <= 1e-6


def test_fold_of_parametrized_layers_beside_others():
    model = nn.Sequential(*(SummaryLinear(4, 4) for _ in range(6)), SummaryConv2d(1, 4, 3)).double()
    for layer in model:
        with torch.no_grad():
            layer.b.copy_(torch.randn_like(layer.b))
    for layer in [model[i] for i in (0, 2, 3, 5)]:
        parametrize.register_parametrization(layer, "b", nn.Identity())
    wanted = [layer.effective_weight() for layer in model]
    report = fold(model)
    assert all(error(layer.weight, w) <= 1e-12 for layer, w in zip(model, wanted, strict=True))
    assert [row.parameters for row in report.converted] == [20] * 6 + [40]
    assert {row.was for row in report.converted} == {"SummaryLinear", "SummaryConv2d"}


# All or nothing


def test_an_engine_that_cannot_compute_a_layer_is_no_plan(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double(), torch.randn(3, 4).double()
    before = model(x)
    with monkeypatch.context() as patch:
        patch.setattr("interp_nn.engines.select.requested", lambda: "triton")  # which has no float64 kernels
        report = summarize(model)
    assert [row.plan for row in report.converted] == [None, None] and error(model(x), before) <= 1e-12


def test_a_conversion_that_fails_changes_nothing(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    state, computed = copy.deepcopy(model.state_dict()), weights.solved_from

    def failing(name, *rest):
        if name == "2":
            raise torch.linalg.LinAlgError
        return computed(name, *rest)

    monkeypatch.setattr("interp_nn.convert.models.solved_from", failing)
    with pytest.raises(torch.linalg.LinAlgError):
        summarize(model)
    assert all(type(layer) is nn.Linear for layer in model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_weights_that_cannot_be_written_are_skipped():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.randn(4).expand(4, 4))
    with torch.inference_mode():
        model[2] = nn.Linear(4, 4)
    report = summarize(model)
    assert [row.name for row in report.converted] == ["0"]
    assert [row.reason.split(";")[0] for row in report.skipped] == [
        "its weight's entries share memory with each other (an expanded tensor?)",
        "its weight is an inference tensor",
    ]
    with torch.inference_mode():
        assert [row.name for row in summarize(model).converted] == ["2"]


# The report


def test_a_dry_run_tells_and_changes_nothing():
    model, x = ResNet().eval(), torch.randn(2, 3, 12, 12)
    before, kinds, state = model(x), classes(model), copy.deepcopy(model.state_dict())
    told = summarize(model, dry_run=True)
    assert torch.equal(model(x), before) and classes(model) == kinds
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    done = summarize(model)
    assert told.converted == done.converted and told.skipped == done.skipped
    assert "dry run" in str(told) and "dry run" not in str(done)


def test_the_report_counts_and_prints():
    model = ResNet()
    report = summarize(model, rows=64)
    rows = {row.name: row for row in report.converted}
    assert rows["blocks.0.conv2"].shape == (36, 2) and rows["blocks.0.conv2"].groups == 2
    assert rows["fc"].shape == (4, 7) and rows["stem"].shape == (27, 4)
    assert rows["fc"].plan.engine == "eager" and rows["stem"].plan is None
    wanted = sum(p.numel() for name, m in model.named_modules() if name in rows for p in m.parameters())
    assert sum(row.parameters for row in report.converted) == wanted
    lines = str(report).splitlines()
    assert lines[0] == f"summarize, function kept: 6 layers, {wanted:,} parameters"
    assert lines[1].split() == ["layer", "was", "now", "b", "parameters", "plan", "error"]
    (fc,) = (line for line in lines if line.startswith("fc "))
    assert "Linear  SummaryLinear  4 x 7 " in fc
    assert f"eager {rows['fc'].plan.order}" in fc and "36 x 2, 2 groups" in str(report)
    assert max(row.error for row in report.converted) == report.error < 1e-6


def test_the_report_says_what_is_slower_and_what_training_needs():
    model = ResNet().bfloat16()
    layers, polynomial = summarize(copy.deepcopy(model), dry_run=True), "newton-schulz"
    slower, approximate, training, rate = layers.notes
    assert slower.startswith("slower: each forward of 5 convolutions forms the weight")
    assert approximate.startswith("approximate: b is rounded to torch.bfloat16")
    assert training.startswith("training: whole networks of summaries diverge")
    assert "rate divided by 3 s²" in rate and summarize(nn.Linear(4, 3)).notes == (rate,)
    assert str(layers).splitlines()[-5:] == ["notes:", *layers.notes]
    *_, gains, norms = summarize(model, polynomial=polynomial).notes
    assert gains == "training: 6 new parameters `gain`; make the optimizer after the conversion"
    assert norms.startswith("training: call interp_nn.nn.follow(optimizer, model) once")
    assert fold(model).notes == ()
    frozen = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).requires_grad_(False)
    assert summarize(copy.deepcopy(frozen), polynomial=polynomial).notes == () and summarize(frozen).notes == ()


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_a_step_of_b_moves_the_weight_up_to_three_squares_as_far(scale):
    torch.manual_seed(0)
    layer = nn.Linear(12, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(scale / torch.linalg.matrix_norm(layer.weight, 2))
    summarize(layer)
    u, s, v = torch.linalg.svd(layer.b.detach(), full_matrices=False)
    assert s[0].item() == pytest.approx(scale ** (1 / 3)) and layer.spectrum().max().item() == pytest.approx(
        s[0].item()
    )

    def moved(step):
        step = step / torch.linalg.matrix_norm(step)
        _, found = torch.func.jvp(lambda b: b @ (b.mT @ b), (layer.b.detach(),), (step,))
        return torch.linalg.matrix_norm(found) / (3 * s[0] ** 2)

    assert moved(torch.outer(u[:, 0], v[0])).item() == pytest.approx(1)
    assert max(moved(torch.randn_like(layer.b)) for _ in range(20)) < 1


def test_a_gain_is_frozen_where_the_weight_is():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    assert not SummaryLinear.from_linear(model[0], polynomial="newton-schulz").gain.requires_grad
    summarize(model, polynomial="newton-schulz")
    assert [layer.gain.requires_grad for layer in model] == [False, True]
