"""Reading a head: contributions that sum to the outputs, rotations that keep them, and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from interp_nn.explain import read_head
from interp_nn.explain.heads.head_table import gini
from interp_nn.nn import SummaryClassifier, SummaryHead, SummaryLinear, update_spectral_norms

N, D, K, M = 50, 12, 6, 4


def network(*head: nn.Module) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, D), nn.ReLU(), *head).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if "b" in module._parameters:  # away from orthonormal
                module.b.mul_(1 + torch.rand_like(module.b))
    update_spectral_norms(model)
    return model


HEADS = {
    "head": (lambda: [SummaryHead(D, K, M)], None),
    "linear": (lambda: [nn.Linear(D, K), nn.Linear(K, M)], "3"),
    "summary": (lambda: [SummaryLinear(D, K), nn.Dropout(), SummaryLinear(K, M, bias=False)], "4"),
    "polynomial": (lambda: [SummaryLinear(D, K, polynomial="newton-schulz"), nn.Linear(K, M, bias=False)], "3"),
    "both": (lambda: [SummaryLinear(D, K, polynomial="pc-2"), SummaryLinear(K, M, polynomial="newton-schulz")], "3"),
}


@pytest.fixture(params=HEADS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Tensor, Tensor, str | None]:
    torch.manual_seed(0)
    make, output = HEADS[request.param]
    return network(*make()), torch.randn(N, 5).double(), torch.randint(0, M, (N,)), output


@pytest.mark.parametrize("to", ["variance", "classes", "varimax"])
def test_rotations_keep_the_function(case: tuple[nn.Sequential, Tensor, Tensor, str | None], to: str) -> None:
    model, x, y, output = case
    expected, own = model(x).detach(), read_head(model, "2", x, y, output=output)
    assert own.check() < 1e-14
    rotated = own.rotate(to)
    assert rotated.check() < 1e-13
    largest = rotated.weight.gather(0, rotated.weight.abs().argmax(0, keepdim=True))[0]
    assert bool((largest > -1e-12).all())
    k = own.codes.shape[1]
    torch.testing.assert_close(rotated.rotation.mT @ rotated.rotation, torch.eye(k, dtype=torch.float64))
    made = rotated.contributions().sum(1) + rotated.bias
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    assert rotated.explained_variance == pytest.approx(own.explained_variance)

    written = copy.deepcopy(model)
    read = read_head(written, "2", x, y, output=output).rotate(to).apply_()
    torch.testing.assert_close(written(x), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    torch.testing.assert_close(read.codes, rotated.codes, rtol=0, atol=1e-12 * float(rotated.codes.abs().max()))
    if isinstance(written[2], SummaryHead):  # both codes
        torch.testing.assert_close(written.train()(x).summary, model.train()(x).summary)


def test_coordinates_are_what_they_say() -> None:
    torch.manual_seed(0)
    model, x = network(nn.Linear(D, K), nn.Linear(K, M)), torch.randn(N, 5).double()
    own = read_head(model, "2", x, output="3")
    covariance = torch.cov(own.rotate("variance").codes.mT)
    variances = covariance.diagonal()
    torch.testing.assert_close(covariance, variances.diag(), rtol=0, atol=1e-12 * float(variances.max()))
    assert bool((variances.diff() <= 1e-12).all())
    weight = own.rotate("classes").weight
    sizes = torch.linalg.vector_norm(weight, dim=0)
    torch.testing.assert_close(weight.mT @ weight, sizes.square().diag(), rtol=0, atol=1e-12)
    assert float(sizes[M:].max()) < 1e-12 < float(sizes[M - 1])

    def criterion(weight: Tensor) -> float:
        return float(weight.square().var(0, correction=0).sum())

    best = criterion(own.rotate("varimax").weight)
    for _ in range(20):
        random = torch.linalg.qr(torch.randn(K, K, dtype=torch.float64)).Q
        assert criterion(own.rotate(random).weight) < best
    assert own.rotate("varimax").sparsity() > own.sparsity()


def test_hidden_rotation_is_found() -> None:
    """Codes that are a rotation of sparse ones come back, up to sign and order."""
    torch.manual_seed(0)
    hidden = torch.linalg.qr(torch.randn(K, K, dtype=torch.float64)).Q
    model = network(nn.Linear(D, K), nn.Linear(K, K))
    with torch.no_grad():
        model[3].weight.copy_(torch.diag(torch.arange(1.0, K + 1).double()) @ hidden.mT)
    weight = read_head(model, "2", torch.randn(N, 5).double(), output="3").rotate("varimax").weight
    torch.testing.assert_close(weight.abs().sum(0), torch.arange(K, 0, -1.0).double())
    assert int((weight.abs() > 1e-9).sum()) == K


def test_kept_latents_end_at_the_network(case: tuple[nn.Sequential, Tensor, Tensor, str | None]) -> None:
    model, x, y, output = case
    reading = read_head(model, "2", x, y, output=output).rotate("classes")
    kept = reading.kept_latents()
    assert kept.accuracy is not None
    predicted = model(x).argmax(1)
    assert kept.agreement[-1] == 1
    assert kept.accuracy[-1] == (predicted == y).double().mean()
    order, mean = kept.latents, reading.codes.mean(0)
    held = mean.expand(N, -1).clone()
    held[:, order[:2]] = reading.codes[:, order[:2]]
    by_hand = (held @ reading.weight.mT + reading.bias).argmax(1)
    assert kept.agreement[2] == (by_hand == predicted).double().mean()
    assert float(reading.importance.sum()) == pytest.approx(1)


def test_input_maps_are_the_codes(case: tuple[nn.Sequential, Tensor, Tensor, str | None]) -> None:
    model, x, _, output = case
    reading = read_head(model, "2", x, output=output).rotate("varimax")
    maps = reading.input_maps(slice(0, 5))
    torch.testing.assert_close(maps(x[:5]), reading.codes[:5])
    assert maps.check() < 1e-12


def test_top_samples_table_and_target() -> None:
    torch.manual_seed(0)
    model, x, y = network(SummaryHead(D, K, M)), torch.randn(N, 5).double(), torch.randint(0, M, (N,))
    reading = read_head(model, "2", x, y, class_names="abcd").rotate("classes")
    top = reading.top_samples(1, 3)
    assert top.largest.tolist() == reading.codes[:, 1].topk(3).indices.tolist()
    assert top.smallest.tolist() == reading.codes[:, 1].topk(3, largest=False).indices.tolist()
    torch.testing.assert_close(reading.contributions(y), reading.contributions()[torch.arange(N), :, y])
    table = reading.summary()
    frame = reading.to_pandas()
    assert list(frame.index) == table.latents.tolist()
    assert table.supports[0] == "abcd"[int(reading.weight[:, table.latents[0]].argmax())]
    assert table.supports[-1] == "-"
    assert "classes coordinates" in str(table)
    assert reading._repr_html_().count("<tr>") == K + 1


def test_stability() -> None:
    torch.manual_seed(0)
    model, x = network(nn.Linear(D, K), nn.Linear(K, M)), torch.randn(N, 5).double()
    reading = read_head(model, "2", x, output="3").rotate("variance")
    other = copy.deepcopy(model)
    turned = read_head(other, "2", x, output="3").rotate("classes").apply_()
    torch.testing.assert_close(turned.rotate("variance").stability(reading), torch.ones(K, dtype=torch.float64))
    halves = [read_head(model, "2", half, output="3").rotate("variance") for half in (x[::2], x[1::2])]
    assert bool((halves[0].stability(halves[1]) < 1 - 1e-6).any())
    with pytest.raises(ValueError, match="other: got a reading of another network"):
        halves[0].stability(turned)


def test_gini() -> None:
    assert gini(torch.ones(7)) == pytest.approx(0)
    assert gini(torch.tensor([0.0, 0, 0, 1])) == pytest.approx(0.75)
    assert gini(torch.zeros(3)) == 0


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(2 * x)


def test_refusals() -> None:
    torch.manual_seed(0)
    x, pair = torch.randn(9, 5).double(), [nn.Linear(D, K), nn.Linear(K, M)]
    positive = nn.Linear(D, K)
    with torch.no_grad():
        positive.weight.abs_()
        positive.bias.fill_(1.0)  # a ReLU after it changes nothing at x

    def refused(
        model: nn.Module, match: str, layer: str = "2", output: str | None = "3", error: type = ValueError
    ) -> None:
        with pytest.raises(error, match=match):
            read_head(model.double(), layer, x, output=output)

    refused(network(positive, nn.ReLU(), nn.Linear(K, M)), "the codes change between '2' and '4'", output="4")
    refused(network(*pair, nn.Softmax(1)), "its outputs are not those of '3'")
    refused(Twice(*network(*pair)), "calls '2' 2 times, want once")
    refused(network(*pair), "output: got None.*; linear layers after it: '3'$", output=None)
    refused(
        network(*pair),
        "two linear layers without a nonlinearity.*after it: none; SummaryHead.from_linear",
        layer="3",
        output=None,
    )
    folded = network(SummaryHead(D, K, M).fold())
    refused(folded, "got Sequential, .*: for example layer='2.0', output='2.1'$", output=None, error=TypeError)
    nested = network(nn.Sequential(SummaryHead(D, K, M)))
    refused(nested, "got Sequential, .*: for example layer='2.0'$", output=None, error=TypeError)
    refused(network(*pair), "layer: got 'x'", layer="x")
    refused(network(*pair), "want SummaryHead, nn.Linear or SummaryLinear", layer="1", error=TypeError)
    refused(network(SummaryClassifier(D, M)), "whose codes are its logits", error=TypeError)
    refused(network(SummaryHead(D, K, M)).train(), "in training mode", output=None)
    refused(network(SummaryHead(D, K, M)), "want None for a SummaryHead", output="2.output")
    with pytest.raises(ValueError, match="y: got shape"):
        read_head(network(*pair), "2", x, torch.full((9,), M), output="3")
    with pytest.raises(ValueError, match="to: got 'x'"):
        read_head(network(*pair), "2", x, output="3").rotate("x")


def test_apply_refuses_what_it_cannot_write() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 5).double()
    parametrized = network(weight_norm(nn.Linear(D, K)), nn.Linear(K, M))
    with pytest.raises(ValueError, match=r"2.weight is parametrized"):
        read_head(parametrized, "2", x, output="3").rotate("variance").apply_()
    tied = network(nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D))
    tied[3].weight = tied[2].weight
    before = tied[2].weight.detach().clone()
    with pytest.raises(ValueError, match=r"2.weight is shared by \['2.weight', '3.weight'\]"):
        read_head(nn.Sequential(*tied[:4]), "2", x, output="3").rotate("variance").apply_()
    assert torch.equal(tied[2].weight, before)
    changed = network(nn.Linear(D, K), nn.Linear(K, M))
    reading = read_head(changed, "2", x, output="3").rotate("variance")
    with torch.no_grad():
        changed[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="have changed since read_head"):
        reading.apply_()
