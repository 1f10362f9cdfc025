import copy

import pytest
import torch
from relative_error import error, naive_linear, randomize
from torch import nn
from torch.nn import functional as F

from interp_nn.nn import SummaryClassifier, SummaryConv2d, SummaryHead, SummaryLinear

# TorchDynamo itself instantiates an autograd Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


@pytest.fixture
def blobs():
    """1,000 points of ten classes around ten centres in 40 dimensions: (train x, train y, test x, test y)."""
    centres = torch.randn(10, 40)
    y = torch.arange(1000) % 10
    x = centres[y] + 0.7 * torch.randn(1000, 40)
    return x[:800], y[:800], x[800:], y[800:]


def fit(model, loss, x, y, steps, optimizer=None):
    """Losses of `steps` steps on batches of 64."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for step in range(steps):
        at = (torch.arange(64) + 64 * step) % len(x)
        optimizer.zero_grad()
        value = loss(x[at], y[at])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda: SummaryHead(40, 16, 10), {}),
        (lambda: SummaryHead(40, 16, 10), {"consistency": "latent"}),
        (lambda: SummaryClassifier(40, 10), {}),
    ],
    ids=["head", "head, latent", "classifier"],
)
def test_training_on_the_three_term_loss(blobs, build, options):
    x, y, x_test, y_test = blobs
    model = build()
    losses = fit(model, lambda a, t: model.loss(a, t, **options), x, y, 300)
    assert 1 < losses[0] < 10
    assert sum(losses[-10:]) / 10 < 0.25
    o1, o2 = model(x_test)
    assert (o1.argmax(1) == o2.argmax(1)).float().mean() >= 0.99
    assert (model.eval()(x_test).argmax(1) == y_test).float().mean() >= 0.97


def mlp(summary=SummaryLinear):
    return nn.Sequential(summary(40, 32), nn.ReLU(), summary(32, 10))


@pytest.mark.parametrize("autocast", [False, True])
def test_summary_linear_trains_in_a_sequential(blobs, autocast):
    x, y, x_test, y_test = blobs
    model = mlp()

    def loss(a, t):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(a)
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        return F.cross_entropy(out.float(), t)

    losses = fit(model, loss, x, y, 150)
    assert losses[0] > 1 and sum(losses[-10:]) / 10 < 0.1
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert (model(x_test).argmax(1) == y_test).float().mean() >= 0.97


def test_summary_conv_trains():
    x = torch.randn(128, 1, 8, 8)
    y = (F.avg_pool2d(x, 4).flatten(1).argmax(1)).long()
    model = nn.Sequential(SummaryConv2d(1, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), SummaryLinear(32, 4))
    losses = fit(model, lambda a, t: F.cross_entropy(model(a), t), x, y, 250)
    assert losses[0] > 1 and sum(losses[-10:]) / 10 < 0.1


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_foreach_optimizers_take_the_same_steps(blobs, optimizer):
    x, y, *_ = blobs
    first = mlp()
    second = copy.deepcopy(first)
    trajectories = []
    for model, foreach in ((first, True), (second, False)):
        steps = optimizer(model.parameters(), lr=1e-2, foreach=foreach)
        trajectories.append(fit(model, lambda a, t, m=model: F.cross_entropy(m(a), t), x, y, 30, steps))
    assert trajectories[0][-1] < trajectories[0][0]
    assert trajectories[0] == pytest.approx(trajectories[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv", "head", "latent head"])
def test_compiled_training_follows_eager(blobs, kind):
    x, y, *_ = blobs
    if kind == "conv":
        model = nn.Sequential(
            nn.Unflatten(1, (1, 5, 8)), SummaryConv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)
        )
    else:
        model = SummaryHead(40, 16, 10) if "head" in kind else mlp()

    def compute(module, a, t):
        if "head" in kind:
            return module.loss(a, t, consistency="latent" if kind == "latent head" else "logits")
        return F.cross_entropy(module(a), t)

    twin = copy.deepcopy(model)
    compiled = torch.compile(lambda a, t: compute(twin, a, t), fullgraph=True, backend="aot_eager")
    eager = fit(model, lambda a, t: compute(model, a, t), x, y, 20)
    assert eager[-1] < eager[0]
    steps = torch.optim.Adam(twin.parameters(), lr=5e-3)
    assert fit(twin, compiled, x, y, 20, steps) == pytest.approx(eager, rel=1e-5)


def test_compiled_autocast_strays_from_fp32_no_farther_than_naive_autocast(blobs):
    class Naive(SummaryLinear):
        def forward(self, x):
            return F.linear(x @ self.weight.t(), self.weight @ self.weight.t(), self.bias)

    x, y, *_ = blobs
    start = mlp()

    def trajectory(model, autocast, compiled=False):
        model.load_state_dict(start.state_dict())

        def loss(a, t):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return F.cross_entropy(model(a).float(), t)

        loss = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        return torch.tensor(fit(model, loss, x, y, 40))

    exact = trajectory(mlp(), False)
    allowed = 2 * error(trajectory(mlp(Naive), True), exact)
    assert 0 < allowed < 0.1
    assert error(trajectory(mlp(), True), exact) <= allowed
    assert error(trajectory(mlp(), True, compiled=True), exact) <= allowed


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_frozen_model_compiles(kind):
    if kind == "linear":
        model, x = mlp(), torch.randn(9, 40)
    else:
        model, x = nn.Sequential(SummaryConv2d(3, 8, 3, groups=1), nn.ReLU()), torch.randn(2, 3, 6, 6)
    randomize(model).eval()
    for layer in model:
        if isinstance(layer, (SummaryLinear, SummaryConv2d)):
            layer.freeze()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted = model(x)
    assert error(compiled(x), wanted) <= 1e-6
    model.double()  # a conversion is noticed, compiled or not
    assert error(compiled(x.double()), wanted) <= 1e-6
    graphs = []
    torch.compile(lambda a: model(a), fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)(x.double())
    called = {str(node.target) for node in graphs[0].graph.nodes if node.op.startswith("call")}
    assert not any("summary" in name or "matmul" in name for name in called)


def test_gradient_penalty_step_is_the_naive_models():
    layer = randomize(SummaryLinear(60, 24, dtype=torch.float64), 0.2)
    x = torch.randn(50, 60, dtype=torch.float64, requires_grad=True)

    def penalized_gradients(output):
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        return torch.autograd.grad(output.square().mean() + slope.square().mean(), list(layer.parameters()))

    got = penalized_gradients(layer(x))
    wanted = penalized_gradients(naive_linear(x, layer.weight, layer.bias))
    assert all(error(g, w) <= 1e-10 for g, w in zip(got, wanted, strict=True))


def test_gradient_penalty_through_a_heads_loss():
    head = randomize(SummaryHead(60, 12, 5, dtype=torch.float64), 0.2)
    x, target = torch.randn(50, 60, dtype=torch.float64, requires_grad=True), torch.randint(5, (50,))

    def naive():
        codes = x @ head.weight.t(), naive_linear(x, head.weight)
        o1, o2 = map(head.output, codes)
        return F.cross_entropy(o1, target) + F.cross_entropy(o2, target) + F.mse_loss(o1, o2)

    def penalized_gradients(loss):
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(loss + 1e4 * slope.square().sum(), list(head.parameters()))

    got, wanted = penalized_gradients(head.loss(x, target)), penalized_gradients(naive())
    assert all(error(g, w) <= 1e-10 for g, w in zip(got, wanted, strict=True))


def test_layers_use_no_parametrization_and_take_pytorchs():
    layer, x = SummaryLinear(12, 5), torch.randn(7, 12)
    assert not nn.utils.parametrize.is_parametrized(layer)
    randomize(layer)
    nn.utils.parametrizations.orthogonal(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert layer.orthogonality_defect() < 1e-5
    assert error(layer(x), F.linear(x, layer.weight, layer.bias)) <= 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_grad_scaler_on_a_gpu(blobs):
    x, y, *_ = (t.cuda() for t in blobs)
    model, scaler = mlp().cuda(), torch.amp.GradScaler("cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
