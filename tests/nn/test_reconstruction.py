"""The reconstruction from codes: its loss against plain products, and the layers' methods."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import explained_variance_score

from interp_nn.functional import reconstruction_loss
from interp_nn.nn import SummaryClassifier, SummaryHead, SummaryLayer, SummaryLoss
from interp_nn.ops import reconstruction


def by_products(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x, b = x.double(), b.double()
    return (x - x @ b @ b.t()).square().sum() / x.square().sum()


@pytest.mark.parametrize("k", [3, 20])
def test_loss_is_the_missed_share(k: int) -> None:
    torch.manual_seed(0)
    x, b = torch.randn(4, 9, 12, dtype=torch.float64), torch.randn(12, k, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(reconstruction_loss(x, b), by_products(x, b))
    assert torch.autograd.gradcheck(reconstruction_loss, (x.requires_grad_(), b))
    assert torch.autograd.gradgradcheck(lambda b: reconstruction_loss(x.detach(), b), b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_sixteen_bits_are_not_rounded_on_the_way(dtype: torch.dtype, wide: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5000, 24).to(dtype)  # several parts
    b = (
        (torch.linalg.qr(torch.randn(24, 20)).Q.to(dtype)).float()
        if wide
        else torch.linalg.qr(torch.randn(24, 20)).Q.to(dtype)
    )
    b.requires_grad_()
    exact = b.detach().double().requires_grad_()
    value, expected = reconstruction_loss(x, b), by_products(x, exact)
    assert value.dtype == torch.float32
    assert abs(value.item() - expected.item()) < 1e-6
    (db,), (reference,) = torch.autograd.grad(value, b), torch.autograd.grad(expected, exact)
    assert db.dtype == b.dtype
    error = torch.linalg.vector_norm(db.double() - reference) / torch.linalg.vector_norm(reference)
    assert error < (1e-5 if wide else torch.finfo(dtype).eps)


def test_perfect_reconstruction_is_not_negative() -> None:
    torch.manual_seed(0)
    b = torch.linalg.qr(torch.randn(64, 64)).Q
    for _ in range(20):
        assert 0 <= float(reconstruction_loss(torch.randn(8, 64), b)) < 1e-5
    assert float(reconstruction_loss(torch.zeros(3, 64), b)) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("consistency", ["logits", "latent"])
def test_heads_add_it_to_their_loss(reduction: str, consistency: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (10,))
    target[2] = -100
    head = SummaryHead(8, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        head.b.mul_(1.3)
    options = {"reduction": reduction, "consistency": consistency}
    plain = head.loss(x, target, **options)  # type: ignore[arg-type]
    added = head.loss(x, target, reconstruction=0.5, **options)  # type: ignore[arg-type]
    kept = x.detach()[target >= 0]
    share = 0.5 * by_products(kept, head.b) * (1 if reduction == "mean" else len(kept))
    torch.testing.assert_close((added - plain).sum(), share)
    if reduction == "none":
        assert added[2] == plain[2] == 0
    grads = [torch.autograd.grad(value.sum(), (x, head.b), retain_graph=True) for value in (plain, added)]
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=0, atol=0)  # none to the features
    assert not torch.equal(grads[0][1], grads[1][1])
    criterion = SummaryLoss(consistency=consistency, reduction=reduction, reconstruction=0.5)
    codes = super(SummaryHead, head).forward(x)
    by_loss = criterion(tuple(map(head.output, codes)), target, codes, features=x, b=head.b)
    torch.testing.assert_close(by_loss, added)


def test_classifier_adds_it_and_autocast_does_not_round() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(10, 8), torch.randint(0, 3, (10,))
    classifier = SummaryClassifier(8, 3)
    with torch.no_grad():
        classifier.b.mul_(1.3)
    difference = classifier.loss(x, target, reconstruction=2.0) - classifier.loss(x, target)
    torch.testing.assert_close(difference.double(), 2 * by_products(x, classifier.b), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(reconstruction_loss(x, classifier.b), by_products(x, classifier.b).float())
        assert torch.isfinite(classifier.loss(x.bfloat16(), target, reconstruction=2.0))


def test_reconstruct_and_explained_variance() -> None:
    torch.manual_seed(0)
    layer, x = SummaryLayer(8, 3, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64) + 2
    codes = layer.projection(x)
    torch.testing.assert_close(layer.reconstruct(codes), codes @ layer.b.t())
    with torch.no_grad():
        layer.b.mul_(torch.tensor([0.5, 2.0, 3.0]))
    made = layer.reconstruct(layer.projection(x))
    torch.testing.assert_close(made @ layer.b, layer.projection(x))
    expected = explained_variance_score(x, made.detach(), multioutput="variance_weighted")
    assert layer.explained_variance(x) == pytest.approx(expected)
    with pytest.raises(ValueError, match="x: got features without variance"):
        layer.explained_variance(x[:1])
    with pytest.raises(ValueError, match=r"codes: got shape \(2, 4\)"):
        layer.reconstruct(torch.ones(2, 4))


def test_bad_arguments() -> None:
    x, b, target = torch.randn(4, 3), torch.randn(3, 2), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="x, b: got shapes"):
        reconstruction_loss(x, b.t())
    with pytest.raises(TypeError, match=r"b: got dtype torch.float64, want torch.float32"):
        reconstruction_loss(x, b.double())
    with pytest.raises(ValueError, match=r"reduction: got 'max'"):
        reconstruction_loss(x, b, reduction="max")
    with pytest.raises(ValueError, match=r"reconstruction: got -1.0"):
        SummaryLoss(reconstruction=-1.0)
    with pytest.raises(TypeError, match="reconstruction: got None"):
        SummaryHead(3, 2, 2).loss(x, target, reconstruction=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="features, b: got None"):
        SummaryLoss(reconstruction=1.0)((x, x), target)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [False, True])
def test_few_rows_and_many_are_computed_alike(reduction: str, ignored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, b = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 5), (5, 3)))
    target = torch.tensor([0, 1, -100, 3, 0, 1])

    def share(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return reconstruction_loss(x, b, target=target, reduction=reduction)

    found = []
    for few in (0, 100):
        monkeypatch.setattr(reconstruction, "_FEW", few)
        value = share(x, b)
        found.append((value, *torch.autograd.grad(value.sum(), (x, b))))
    torch.testing.assert_close(*found)
