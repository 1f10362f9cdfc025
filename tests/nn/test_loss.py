"""SummaryLoss against its formula, one row at a time in fp64."""

import pytest
import torch
from relative_error import error
from torch.nn import functional as F

from interp_nn.nn import SummaryLoss


def formula(logits, target, weights, codes, reduction, ignore_index):
    """The three terms of each row whose target counts."""
    rows = []
    values = (v.flatten(0, -2).double() for v in (*logits, *codes))
    for o1, o2, first, second, t in zip(*values, target.flatten(), strict=True):
        terms = [F.log_softmax(o1, 0)[max(t, 0)], F.log_softmax(o2, 0)[max(t, 0)], (first - second).square().mean()]
        w1, w2, w3 = weights if t != ignore_index else (0, 0, 0)
        rows.append(w3 * terms[2] - w1 * terms[0] - w2 * terms[1])
    rows = torch.stack(rows)
    if reduction == "none":
        return rows.view(target.shape)
    return rows.sum() / (target != ignore_index).sum() if reduction == "mean" else rows.sum()


@pytest.mark.parametrize("consistency", ["logits", "latent"])
@pytest.mark.parametrize(("ignored", "ignore_index"), [(False, -100), (True, -100), (True, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)], ids=str
)
def test_loss_and_gradients_are_those_of_the_formula(dtype, bound, reduction, ignored, ignore_index, consistency):
    logits = [torch.randn(2, 3, 5, dtype=dtype, requires_grad=True) for _ in range(2)]
    latents = [torch.randn(2, 3, 4, dtype=dtype, requires_grad=True) for _ in range(2)]
    target = torch.randint(5, (2, 3))
    if ignored:
        target[0, 1:] = ignore_index
    weights, codes = (0.5, 2.0, 3.0), latents if consistency == "latent" else logits
    value = SummaryLoss(weights, consistency, ignore_index, reduction)(logits, target, latents)
    wanted = formula(logits, target, weights, codes, reduction, ignore_index)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.shape == wanted.shape and error(value, wanted) <= bound
    used = [*logits, *(latents if consistency == "latent" else ())]
    bound = 1e-2 if dtype == torch.bfloat16 else bound  # its gradients are rounded to bf16
    for got, exact in zip(torch.autograd.grad(value.sum(), used), torch.autograd.grad(wanted.sum(), used), strict=True):
        assert got.dtype == dtype and error(got, exact) <= bound


def test_a_mean_over_no_rows_is_nan_as_in_pytorch():
    logits, target = torch.randn(2, 4, 3), torch.full((4,), -100)
    assert SummaryLoss()(logits.unbind(), target).isnan()


def test_the_logits_of_evaluation_are_refused_in_words():
    with pytest.raises(TypeError, match=r"logits: got a tensor, want the pair .*cross_entropy"):
        SummaryLoss()(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64))
