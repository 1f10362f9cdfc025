"""Layers inside checkpointed blocks: nothing but memory and time is different."""

import copy

import pytest
import torch
from system_networks import batch, cnn, mlp
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


def gradients(model, call, x, target, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(call(x).float(), target)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("build", [mlp, cnn])
def test_the_same_bits(build, reentrant, autocast):
    model, (x, target) = build(), batch(32)
    x.requires_grad_()  # which a reentrant checkpoint needs
    twin = copy.deepcopy(model)
    wanted = gradients(model, model, x, target, autocast)
    got = gradients(twin, lambda x: checkpoint(twin, x, use_reentrant=reentrant), x, target, autocast)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
    got = gradients(twin, lambda x: checkpoint_sequential(twin, 2, x, use_reentrant=reentrant), x, target, autocast)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
