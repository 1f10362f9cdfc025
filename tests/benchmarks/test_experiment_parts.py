"""The parts of experiments: measures, networks of the papers, passengers as they are read, and made data."""

import math

import pytest
import torch
from captum.attr import InputXGradient, IntegratedGradients
from torch import nn

from benchmarks import experiments
from benchmarks.experiments import (
    gating_regimes,
    head_comparison,
    linearize_cifar10,
    oblique_trees,
    signals,
    tabular,
    titanic,
)
from benchmarks.experiments.descent import descend
from benchmarks.timing import reference_networks
from interp_nn.convert import head_from_reference
from interp_nn.explain.descramble.brockett import brockett_min
from interp_nn.explain.descramble.derivatives import derivative_operator
from interp_nn.nn import SummaryHead
from interp_nn.nn.gated.gates import HardGate

HEADER = "survived,pclass,name,sex,age,sibsp,parch,ticket,fare,cabin,embarked"
GOOD = "\n1,3,A,male,1,0,0,T,1,,S"


def test_attributions_are_captums():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)).double()
    x, target = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 5
    expected = InputXGradient(network).attribute(x.clone().requires_grad_(), target=target)
    for method in (linearize_cifar10.exact, linearize_cifar10.gradient_times_input):
        torch.testing.assert_close(method(network, x, target), expected.detach())
    path = IntegratedGradients(network).attribute(x, target=target, n_steps=32, method="riemann_middle")
    torch.testing.assert_close(linearize_cifar10.integrated_gradients(network, x, target), path)


def test_the_references_networks():
    base, ours = (build(3, 32, "vgg11") for build in reference_networks.NETWORKS.values())
    assert [type(layer).__name__ for layer in base.head] == ["Dropout", "Linear", "ReLU"] * 2 + ["Linear"]
    assert ours.head.b.shape == (512, 100) and sum(isinstance(layer, nn.Conv2d) for layer in base.body) == 8
    assert base.body[3].weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    plain = head_comparison.build(head_comparison.STUDIES["summary_cnn"], "no ReLU: summary, orthogonal")
    assert [type(layer).__name__ for layer in plain.body] == ["Conv2d", "MaxPool2d"] * 2 + ["Flatten"]


@pytest.mark.filterwarnings("ignore:.*orthogonality defect above 1")
def test_the_references_b_is_drawn_and_trained_as_the_reference_does():
    head = SummaryHead(512, 100, 10)
    head_comparison.as_reference_(head)
    columns, c = head.parametrizations.b.original, head.parametrizations.b[0].c
    names = ("layer.beta_func1.weight", "layer.beta_func1.bias", "output.weight", "output.bias")
    loaded = head_from_reference(dict(zip(names, (columns.t(), c, head.output.weight, head.output.bias), strict=True)))
    assert torch.equal(loaded.b, head.b) and head.spectrum()[0] > 5 > 1 > head.spectrum()[1]
    head.loss(torch.randn(4, 512), torch.arange(4)).backward()
    torch.testing.assert_close(c.grad, columns.grad.sum(0))


def test_regimes_are_what_the_papers_mean():
    def backbone():
        return gating_regimes.relu_mlp(6, 5, 5, 3)

    def weights(net):
        return [module.weight for module in net.modules() if isinstance(module, nn.Linear)]

    def same(net):
        return [torch.equal(a, b) for a, b in zip(weights(net.gating), weights(net.value), strict=False)]

    relu, x = gating_regimes.build("ReLU", backbone), torch.randn(40, 6)
    names = ("FRNPF (DI)", "FRNPF (II)", "FLNPF")
    dependent, independent, learned = (gating_regimes.build(name, backbone, relu) for name in names)
    for net in (dependent, independent, learned):
        assert isinstance(net.gate, HardGate) and all(p.requires_grad for p in net.value.parameters())
        assert not any(p.requires_grad for p in net.gating.parameters())
    assert all(same(dependent)) and not any(same(independent))
    for gates, units in zip(learned.gate_values(x), (relu[1](relu[0](x)), relu[:4](x)), strict=True):
        assert torch.equal(gates, (units > 0).float())
    for name in ("DLNPF", "DGN(x)", "DGN(1)", "DLGN(x)", "DLGN(1)"):
        net = gating_regimes.build(name, backbone)
        assert (net.value_input == "ones") == name.endswith("(1)") and all(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match="FLNPF"):
        gating_regimes.build("FLNPF", backbone)


def test_passengers_are_read_as_they_are(tmp_path):
    rows = ["1,1,A,female,30,1,2,T,7.25,,C", "0,3,B,male,,0,0,T,0,,S", "0,2,C,male,50,0,1,T,20,,"]
    (tmp_path / "titanic.csv").write_text("\n".join([HEADER, *rows]))
    x, y, features = titanic.read_passengers(tmp_path)
    column = dict(zip(features, x.T.tolist(), strict=True))
    assert y.tolist() == [1, 0, 0] and column["siblings, spouse"] == [1, 0, 0] and column["from C"] == [1, 0, 0]
    assert column["1st class"] == [1, 0, 0] and column["3rd class"] == [0, 1, 0] and column["female"] == [1, 0, 0]
    assert column["age unknown"] == [0, 1, 0] and column["age"][::2] == [30, 50] and math.isnan(column["age"][1])
    assert column["fare"] == pytest.approx([math.log(8.25), 0, math.log(21)])


def made_passengers(n=60):
    x = torch.rand(n, len(titanic.FEATURES), dtype=torch.float64)
    x[::7, titanic.FEATURES.index("age")] = torch.nan
    return tabular.Table(x, (x[:, 2] + 0.5 * torch.rand(n) > 0.7).double(), titanic.FEATURES)


def test_held_out_passengers_are_prepared_by_the_fitted_ones():
    part, rest = titanic._split(made_passengers(), 3)
    fitted, held_out = titanic._prepared(part, rest)
    columns = fitted.x[:, [titanic.FEATURES.index(name) for name in titanic.MEASURED]]
    assert columns.mean(0).abs().max() < 1e-12 and columns.std(0).tolist() == pytest.approx([1] * columns.shape[1])
    again, other = titanic._prepared(part, rest._replace(x=2 * rest.x))
    assert torch.equal(again.x, fitted.x) and fitted.x.isfinite().all() and held_out.x.isfinite().all()
    assert torch.equal(other.x[:, 2], 2 * held_out.x[:, 2])  # 0 or 1 is left as it is


def test_steps_are_chosen_by_a_fifth_of_the_fitted():
    part, _ = titanic._split(made_passengers(), 3)
    inner, validation = titanic._prepared(*titanic._split(part, 5))
    losses = []
    for steps in range(1, 26):
        logits = titanic._network(inner, steps, 5)(validation.x).squeeze(1)
        losses.append(nn.functional.binary_cross_entropy_with_logits(logits, validation.y).item())
    assert titanic._chosen_steps(part, 25, 5) == 1 + losses.index(min(losses))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "titanic: not found in"),
        ("survived,sex\n1,male", "has no column pclass, age, sibsp, parch, fare, embarked"),
        (HEADER + GOOD.replace(",3,", ",4,"), "line 2: pclass is '4', want one of"),
        (HEADER + GOOD + "\n1,3,A,male,30", "line 3: got 5 columns, want 11"),
        (HEADER + GOOD.replace("T,1,", "T,nan,"), "line 2: fare is 'nan', want a number"),
        (HEADER + GOOD.replace("male,1,", "male,NA,"), "line 2: age is 'NA', want a number"),
    ],
)
def test_missing_or_broken_passengers_are_named(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "titanic.csv").write_text(text)
    assert experiments.find("titanic")(["--data", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_labels_are_those_of_a_walk_through_the_tree():
    data = oblique_trees.load("SDI", points=400)
    assert data.x_train.shape == (200, 20) and data.x_test.shape == (100, 20) and data.normals.shape == (15, 20)
    for x, y in zip(data.x_train.double(), data.y_train, strict=True):
        node = 0
        for _ in range(oblique_trees.DEPTH):
            right = bool(x @ data.normals[node] > 0)
            node = 2 * node + 1 + right
        assert y == 1 - right
    assert not torch.equal(data.normals, oblique_trees.load("SDI", points=8, seed=1).normals)


def test_the_loss_is_the_cross_entropy_of_a_logit_and_its_negative():
    x, y = torch.tensor([[-1.5], [0.2], [3.0]]), torch.tensor([0.0, 1.0, 0.0])
    wanted = torch.nn.functional.cross_entropy(torch.cat((-x, x), 1), y.long())
    torch.testing.assert_close(oblique_trees._loss(torch.nn.Identity(), x, y), wanted)


@pytest.mark.parametrize(("n", "operator"), [(2, "diff1"), (7, "diff1"), (7, "fourier2")])
def test_descents_solve_small_problems(n, operator):
    d, h = derivative_operator(n, operator).matrix(), signals.scrambled(n, 4 * n).mixed
    found, best = descend(d.mT @ d, h @ h.mT), brockett_min(d.mT @ d, h @ h.mT).value
    assert found.converged and best * (1 - 1e-10) <= found.loss == pytest.approx(best, rel=1e-6)
