"""Kind: arguments without a meaning that were accepted, or refused by an error that does not name them."""

import pytest
import torch
from torch.func import vmap

import interp_nn
from interp_nn import functional, linalg, nn

X, B, TARGET = torch.randn(4, 3), torch.randn(3, 2), torch.tensor([0, 1, 1, 0])


def loss(**options):
    return functional.summary_cross_entropy(X, B, options.pop("target", TARGET), **options)


CALLS = {
    "weights of text": (lambda: loss(weights="111"), TypeError, "weights: got '111'"),
    "weights that want a gradient": (
        lambda: loss(weights=(torch.ones((), requires_grad=True), 1, 1)),
        TypeError,
        "weights: got",
    ),
    "weights of classes": (lambda: loss(weights=torch.ones(3)), TypeError, r"shape \(3,\), .*weights of classes"),
    "weights of classes in a head": (
        lambda: nn.SummaryHead(3, 2, 3).loss(X, TARGET, weights=torch.ones(3)),
        TypeError,
        "weights of classes are not taken",
    ),
    "weights of classes in a module": (lambda: nn.SummaryLoss(torch.ones(3)), TypeError, "weights of classes"),
    "weights beyond floats": (lambda: loss(weights=(10**400, 1, 1)), ValueError, "weights: got"),
    "weights of numerals": (lambda: loss(weights=("1", "1", "1")), TypeError, "weights: got \\('1', '1', '1'\\)"),
    "weights without an order": (lambda: loss(weights={1, 2, 3}), TypeError, "weights: got {1, 2, 3}"),
    "weights that are truths": (lambda: loss(weights=(True, 1, 1)), TypeError, "weights: got"),
    "ignore_index of a truth": (lambda: loss(ignore_index=True), TypeError, "ignore_index: got bool"),
    "sparse targets": (lambda: loss(target=TARGET.to_sparse()), TypeError, "target: got layout torch.sparse_coo"),
    "no iterations": (lambda: functional.orthogonalize(B, max_iterations=-5), ValueError, "max_iterations: got -5"),
    "truth of iterations": (
        lambda: functional.orthogonalize(B, max_iterations=True),
        TypeError,
        "max_iterations: got True",
    ),
    "tolerance nan": (lambda: functional.orthogonalize(B, tolerance=float("nan")), ValueError, "tolerance: got nan"),
    "negative tolerance": (lambda: functional.orthogonalize(B, tolerance=-1.0), ValueError, "tolerance: got -1.0"),
    "plan without classes": (lambda: interp_nn.plan(8, 4, 2, classes=0), ValueError, "classes must be an integer >= 1"),
    "plan of no gradients": (lambda: interp_nn.plan(8, 4, 2, grad=None), TypeError, "plan: grad"),
    "plan of a named dtype": (lambda: interp_nn.plan(8, 4, 2, dtype="fp32"), TypeError, "plan: dtype"),
    "plan of integers": (lambda: interp_nn.plan(8, 4, 2, dtype=torch.int32), TypeError, "plan: dtype: got torch.int32"),
    "plan of an unknown device": (
        lambda: interp_nn.plan(8, 4, 2, device="tpu"),
        ValueError,
        "plan: device: got 'tpu'",
    ),
    "defect of a vector": (lambda: linalg.orthogonality_defect(B[0]), ValueError, r"b: got shape \(2,\)"),
    "plan of no device": (lambda: interp_nn.plan(8, 4, 2, device=None), TypeError, "plan: device"),
    "head without classes": (lambda: nn.SummaryHead(4, 3, 0), ValueError, "num_classes: got 0"),
    "classifier without classes": (lambda: nn.SummaryClassifier(4, 0), ValueError, "num_classes: got 0"),
    "constraint of a number": (lambda: nn.constrain(3, "retract"), TypeError, "model: got int"),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_refused_by_name(name):
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (2, 4, 3), (2, 3)], ids=str)
def test_inverse_summary_under_vmap(shape):
    x, b = torch.randn(shape, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    found = vmap(functional.inverse_summary, (0, None))(x, b)
    torch.testing.assert_close(found, x @ b @ (b.T @ b).inverse())
    many = torch.randn(2, 3, 2, dtype=torch.float64)
    found = vmap(functional.inverse_summary)(x, many)
    wanted = torch.stack([functional.inverse_summary(one, of) for one, of in zip(x, many, strict=True)])
    torch.testing.assert_close(found, wanted)
