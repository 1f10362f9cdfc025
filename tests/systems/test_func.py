"""torch.func on whole layers and networks, and gradients of gradients in training."""

import copy

import pytest
import torch
from system_networks import batch, cnn, mlp, plain
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, stack_module_state, vmap
from torch.nn import functional as F

NETWORKS = {"mlp": mlp, "cnn": cnn}
networks = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
close = torch.testing.assert_close


def made(build):
    model, (x, target) = build(torch.float64), batch(6, torch.float64)
    return model, plain(model), x, target


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def loss(model):
    return lambda given, x, target: F.cross_entropy(functional_call(model, given, (x,)), target)


@networks
def test_vmap_over_inputs(build):
    model, naive, x, _ = made(build)
    close(vmap(model, in_dims=1, out_dims=1)(x.unflatten(0, (2, 3))), naive(x).unflatten(0, (2, 3)))


@networks
def test_per_sample_gradients(build):
    model, _, x, target = made(build)
    each = vmap(grad(loss(model)), (None, 0, 0))(parameters(model), x[:, None], target[:, None])
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), target[i : i + 1]).backward()
        close({name: g[i] for name, g in each.items()}, {name: p.grad for name, p in model.named_parameters()})


@networks
def test_ensembles(build):
    """Many networks in one call, their outputs and their gradients."""
    models = [build(torch.float64) for _ in range(4)]
    x, target = batch(6, torch.float64)
    base = copy.deepcopy(models[0]).to("meta")
    given, buffers = stack_module_state(models)
    found = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(given, buffers)
    close(found, torch.stack([plain(model)(x) for model in models]))
    gradients = vmap(grad(loss(base)), (0, None, None))({n: p.detach() for n, p in given.items()}, x, target)
    for i, model in enumerate(models):
        F.cross_entropy(model(x), target).backward()
        close({n: g[i] for n, g in gradients.items()}, {n: p.grad for n, p in model.named_parameters()})


@networks
def test_jacobians_by_parameters_and_inputs(build):
    model, naive, x, _ = made(build)

    def outputs(model):
        return lambda given, x: functional_call(model, given, (x,))

    wanted = jacrev(outputs(naive), (0, 1))(parameters(model), x[:2])
    for jacobian in (jacrev, jacfwd):
        close(jacobian(outputs(model), (0, 1))(parameters(model), x[:2]), wanted)


@networks
def test_hessian_by_a_weight(build):
    model, naive, x, target = made(build)
    name, weight = list(parameters(model).items())[-2]

    def value(model):
        return lambda w: loss(model)({**parameters(model), name: w}, x, target)

    close(hessian(value(model))(weight), hessian(value(naive))(weight))
    close(jacrev(jacrev(value(model)))(weight), hessian(value(naive))(weight))


@networks
def test_training_with_a_gradient_penalty_follows_the_plain_network(build):
    model, naive, x, target = made(build)

    def train(model):
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.02), []
        for _ in range(6):
            given = x.clone().requires_grad_()
            value = F.cross_entropy(model(given), target)
            (slope,) = torch.autograd.grad(value, given, create_graph=True)
            value = value + slope.square().sum()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.detach())
        return torch.stack(losses)

    losses = train(model)
    assert losses[-1] < losses[0]
    close(losses, train(naive))
    close(list(model.parameters()), list(naive.parameters()))
