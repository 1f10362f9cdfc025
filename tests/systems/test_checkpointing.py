"""Layers inside checkpointed blocks: nothing but memory and time is different; the operator's name says what is kept."""

import copy
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from system_networks import batch, cnn, mlp
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from interp_nn.nn import SummaryLinear

pytestmark = pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")


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


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_compiled_blocks_keep_or_recompute_the_operator_by_name(policy):
    """Where the operator's result is saved, the compiled backward has no forward of it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = SummaryLinear(12, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.last(self.layer(x.sin()).cos())

    def choose(ctx, operator, *args, **kwargs):
        return policy if operator is torch.ops.interp_nn.summary.default else CheckpointPolicy.PREFER_RECOMPUTE

    backward = []

    def note(graph, _):
        backward.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    def keep(graph, _):
        return make_boxed_func(graph)

    torch.compiler.reset()
    block, (x, target) = Block(), batch(32)
    context = partial(create_selective_checkpoint_contexts, choose)
    twin = copy.deepcopy(block)
    compiled = torch.compile(
        lambda x: checkpoint(twin, x, use_reentrant=False, context_fn=context),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=keep, bw_compiler=note),
    )
    got, wanted = gradients(twin, compiled, x, target), gradients(block, block, x, target)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert "interp_nn.summary_backward.default" in backward
    assert ("interp_nn.summary.default" in backward) == (policy == CheckpointPolicy.PREFER_RECOMPUTE)
    torch.compiler.reset()
