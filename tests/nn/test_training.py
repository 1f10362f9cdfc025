import pytest
import torch
from relative_error import error, randomize
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from interp_nn.nn import SummaryClassifier, SummaryConv2d, SummaryHead, SummaryLinear, update_spectral_norms

# TorchDynamo itself instantiates an autograd Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


@pytest.fixture
def blobs():
    """1,000 points of ten classes around ten centres in 40 dimensions: (train x, train y, test x, test y)."""
    centres = torch.randn(10, 40)
    y = torch.arange(1000) % 10
    x = centres[y] + 0.7 * torch.randn(1000, 40)
    return x[:800], y[:800], x[800:], y[800:]


def fit(model, loss, x, y, steps):
    """Losses of `steps` steps on batches of 64."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=5e-3), []
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


def mlp():
    return nn.Sequential(SummaryLinear(40, 32), nn.ReLU(), SummaryLinear(32, 10))


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
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)
    wanted = model(x)
    assert error(compiled(x), wanted) <= 1e-6
    model.double()  # a conversion is noticed, compiled or not
    assert error(compiled(x.double()), wanted) <= 1e-6
    called = {str(node.target) for g in graphs for node in g.graph.nodes if node.op.startswith("call")}
    assert not any("summary" in name or "matmul" in name for name in called)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("mean", [None, get_ema_multi_avg_fn(0.5)], ids=["swa", "ema"])
def test_an_average_has_the_norm_of_its_b_after_an_update(mean, buffers):
    """The average of b has a smaller norm than each b. PyTorch copies or averages the buffers, and so has another one."""
    model = nn.Sequential(SummaryLinear(40, 16, polynomial="newton-schulz"))
    average = AveragedModel(model, multi_avg_fn=mean, use_buffers=buffers)
    for _ in range(10):
        with torch.no_grad():
            model[0].b.normal_()
        update_spectral_norms(model)
        average.update_parameters(model)
    layer = average.eval().module[0]
    exact = torch.linalg.matrix_norm(layer.b.detach(), 2)
    assert float(layer.scale * exact) < 0.9
    update_spectral_norms(average)
    torch.testing.assert_close(layer.scale * exact, torch.ones(()), rtol=5e-2, atol=0)
    b = layer.b.detach() * layer.scale
    torch.testing.assert_close(
        torch.Tensor(layer.weight.detach()), (1.5 * b - 0.5 * b @ b.T @ b).T, rtol=2e-2, atol=1e-2
    )


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
