"""The Gram matrix of the penalty is an output of the forward's one launch."""

import pytest
import torch
from harness import forced

from interp_nn.engines.triton import engine
from interp_nn.nn import SummaryLinear
from interp_nn.nn.orthogonality import constrain, orthogonality_penalty


@pytest.mark.parametrize("k", [16, 160])
def test_the_penalty_takes_the_gram_matrix_of_the_launch(k, monkeypatch):
    launched, launch = [], engine.launch
    monkeypatch.setattr(engine, "launch", lambda plan, *rest: (launched.append(plan), launch(plan, *rest))[1])
    layer, x = SummaryLinear(192, k), torch.randn(24, 192)
    with torch.no_grad():
        layer.b.mul_(1.2)
    constrain(layer, "penalty")
    with forced():
        y = layer(x)
    assert len(launched) == 1
    assert torch.allclose(layer.cached_gram(), layer.gram(), atol=1e-5)
    (y.sum() + orthogonality_penalty(layer)).backward()
    assert len(launched) == 2  # the backward
    assert orthogonality_penalty(layer).item() == pytest.approx(k * 0.44**2, rel=1e-4)
