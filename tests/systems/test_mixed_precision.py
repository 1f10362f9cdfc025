"""Training in 16 bits: scaled losses."""

import pytest
import torch
from system_networks import batch, cnn, head, mlp, plain
from torch.nn import functional as F

NETWORKS = {"mlp": mlp, "cnn": cnn}
networks = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


def distance(got, wanted):
    got, wanted = (torch.cat([p.detach().float().flatten() for p in ps]) for ps in (got, wanted))
    return float((got - wanted).norm() / wanted.norm())


def gradients(model, x, target, dtype=None, scaler=None):
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = F.cross_entropy(model(x).float(), target)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@networks
def test_scaled_losses_train_like_the_plain_network(build, dtype):
    """Gradients of autocast are fp32 and, unscaled, no farther from fp32's than twice the plain network's are."""
    model, (x, target) = build(), batch(32)
    exact = [g.clone() for g in gradients(plain(model), x, target)]
    found = []
    for twin in (model, plain(model)):
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(twin.parameters(), lr=0.1)
        gradients(twin, x, target, dtype, scaler)
        scaler.unscale_(optimizer)
        assert all(p.grad.dtype == torch.float32 for p in twin.parameters())
        found.append(distance([p.grad for p in twin.parameters()], exact))
        before = [p.detach().clone() for p in twin.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert distance(twin.parameters(), before) > 1e-3
    assert 0 < found[0] <= 2 * found[1] < 0.1


@pytest.mark.parametrize("build", [mlp, head])
def test_an_overflow_skips_the_step_and_lowers_the_scale(build):
    model, (x, target) = build(), batch(32)
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**40), torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", torch.float16):
        loss = model.loss(x, target) if build is head else F.cross_entropy(model(x), target)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
