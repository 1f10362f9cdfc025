import pytest
import torch
from torch import nn

from interp_nn.explain.linear.affine_map import linearize
from interp_nn.explain.linear.instance_linearization import InstanceLinearization

F64 = torch.float64


class Residual(nn.Module):
    """Batch norm, max-pooling, in-place ReLU and a residual; each module is used once."""

    def __init__(self, outputs=5):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 16, outputs))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.normal_(module.bias)

    def forward(self, x):
        h = self.stem(x)
        return self.head(self.act(h + self.block(h)))


class TwoInputs(nn.Module):
    """A branch for each input, a mask and a scale that are not explained, and outputs of two dimensions (3, 2)."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 6)

    def forward(self, a, b, mask=None, scale=1.0):
        h = torch.relu(self.left(a)) + torch.relu(self.right(b))
        h = h if mask is None else h * mask
        return scale * self.out(h).unflatten(1, (3, 2))


def residual(dtype=F64):
    return Residual().to(dtype).eval(), torch.randn(6, 2, 8, 8, dtype=dtype)


def total(contributions):
    contributions = contributions if isinstance(contributions, tuple) else (contributions,)
    return sum(part.flatten(1).sum(1) for part in contributions)


@pytest.mark.parametrize(("dtype", "close"), [(F64, 1e-12), (torch.float32, 1e-5)])
def test_contributions_and_the_constant_add_up_to_the_output(dtype, close):
    model, x = residual(dtype)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    attributions, delta = InstanceLinearization(model).attribute(x, target=target, return_convergence_delta=True)
    linear = linearize(model, x)
    rows = torch.arange(6)
    torch.testing.assert_close(attributions, linear.weight[rows, target] * x, atol=close, rtol=close)
    outputs = model(x).detach()[rows, target]
    constant = linear.bias[rows, target]
    scale = model(x).detach().abs().max()
    assert delta.shape == (6,) and float(delta.abs().max() / scale) <= close
    assert float((outputs - total(attributions) - constant).abs().max() / scale) <= close
    assert float(constant.abs().max() / scale) > 0.05  # the inputs alone do not account for the output


def test_delta_tells_a_wrong_map(monkeypatch):
    model, x = residual()
    from interp_nn.explain.linear import instance_linearization

    def of_other_samples(model, points, **named):
        return linearize(model, tuple(point.flip(0) for point in points), **named)

    monkeypatch.setattr(instance_linearization, "linearize", of_other_samples)
    _, delta = InstanceLinearization(model).attribute(x, target=1, return_convergence_delta=True)
    assert float(delta.abs().min()) > 1e-3


@pytest.mark.parametrize(
    "target", [2, torch.tensor(2), torch.tensor([2]), (2,), [2] * 6, torch.tensor([2] * 6), [(2,)] * 6, -3]
)
def test_one_output_is_chosen_in_every_manner_of_captum(target):
    model, x = residual()
    torch.testing.assert_close(
        InstanceLinearization(model).attribute(x, target=target),
        linearize(model, x, target=2).weight * x,
        atol=1e-12,
        rtol=1e-12,
    )


@pytest.mark.parametrize("target", [(2, 1), [(2, 1), (0, 0), (1, 1), (2, 0)], [(0, 1)] * 4])
def test_inputs_in_a_tuple_targets_in_two_dimensions_and_further_arguments(target):
    model = TwoInputs().double().eval()
    a, b, mask = torch.randn(4, 4, dtype=F64), torch.randn(4, 3, dtype=F64), torch.rand(4, 8, dtype=F64)
    result, delta = InstanceLinearization(model).attribute(
        (a, b), target=target, additional_forward_args=(mask, 3.0), return_convergence_delta=True
    )
    assert isinstance(result, tuple) and [part.shape for part in result] == [a.shape, b.shape]
    a, b = a.requires_grad_(), b.requires_grad_()
    output = model(a, b, mask, 3.0)
    chosen = torch.stack([output[(i, *t)] for i, t in enumerate(target if isinstance(target, list) else [target] * 4)])
    for part, x, gradient in zip(result, (a, b), torch.autograd.grad(chosen.sum(), (a, b)), strict=True):
        torch.testing.assert_close(part, (gradient * x).detach(), atol=1e-12, rtol=1e-12)
    assert float(delta.abs().max()) <= 1e-12


def test_models_of_one_output_need_no_target():
    for head in (nn.Linear(4, 1), nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), head).double()
        x = torch.randn(5, 3, dtype=F64)
        attributions, delta = InstanceLinearization(model).attribute(x, return_convergence_delta=True)
        assert attributions.shape == (5, 3) and delta.shape == (5,) and float(delta.abs().max()) <= 1e-12


@pytest.mark.parametrize("size", [1, 4, 100])
def test_parts_of_a_batch_give_the_same(size):
    model = TwoInputs().double().eval()
    a, b, mask = torch.randn(6, 4, dtype=F64), torch.randn(6, 3, dtype=F64), torch.rand(6, 8, dtype=F64)
    method = InstanceLinearization(model)
    targets = [(i % 3, i % 2) for i in range(6)]
    arguments = {"target": targets, "additional_forward_args": mask, "baselines": (torch.rand(6, 4, dtype=F64), 0.1)}
    whole, delta = method.attribute((a, b), **arguments, return_convergence_delta=True)
    parts, part_delta = method.attribute((a, b), **arguments, internal_batch_size=size, return_convergence_delta=True)
    for one, other in zip((*whole, delta), (*parts, part_delta), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("baseline", [0.5, torch.full((2, 1, 1), 0.5), torch.full((6, 2, 8, 8), 0.5)])
def test_baselines_are_taken_from_the_inputs(baseline):
    model, x = residual()
    baseline = baseline.double() if isinstance(baseline, torch.Tensor) else baseline
    method, linear = InstanceLinearization(model), linearize(model, x, target=3)
    attributions, delta = method.attribute(x, baseline, target=3, return_convergence_delta=True)
    torch.testing.assert_close(attributions, linear.weight * (x - 0.5), atol=1e-12, rtol=1e-12)
    at_baseline = (linear.weight * 0.5).flatten(1).sum(1) + linear.bias
    torch.testing.assert_close(model(x)[:, 3].detach(), total(attributions) + at_baseline, atol=1e-12, rtol=1e-12)
    assert float(delta.abs().max()) <= 1e-12


def test_the_model_and_the_inputs_stay_as_they_were():
    model, x = residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x.requires_grad_()
    attributions, delta = InstanceLinearization(model).attribute(x, target=1, return_convergence_delta=True)
    assert not attributions.requires_grad and not delta.requires_grad and x.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not model.training


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_contributions_are_captums_gradient_times_input(dtype):
    captum = pytest.importorskip("captum.attr")
    model, x = residual(dtype)
    for target in (4, torch.tensor([0, 1, 2, 3, 4, 0])):
        wanted = captum.InputXGradient(model).attribute(x.clone().requires_grad_(), target=target).detach()
        found = InstanceLinearization(model).attribute(x, target=target)
        assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-6


def test_captums_metrics_take_it():
    metrics = pytest.importorskip("captum.metrics")
    model, x = residual(torch.float32)
    method = InstanceLinearization(model)
    sensitivity = metrics.sensitivity_max(method.attribute, x, target=1, perturb_radius=1e-6, n_perturb_samples=2)
    assert sensitivity.shape == (6,) and bool(sensitivity.isfinite().all())
    attributions = method.attribute(x, target=1)
    small = 1e-4  # so that no gate flips: the map then explains the change of the output exactly

    def perturb(inputs):
        noise = small * torch.randn_like(inputs)
        return noise / inputs, inputs - noise  # captum takes the product with the attributions

    infidelity = metrics.infidelity(model, perturb, x, attributions, target=1, n_perturb_samples=4)
    change = metrics.infidelity(model, perturb, x, torch.zeros_like(attributions), target=1, n_perturb_samples=4)
    assert float(infidelity.mean()) <= 0.02 * float(change.mean())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"target": 5}, ValueError, r"target: got 5 for outputs of shape \(6, 5\)"),
        ({"target": -6}, ValueError, "target: got -6"),
        ({}, ValueError, r"target: got None for outputs of shape \(6, 5\)"),
        ({"target": (1, 1)}, ValueError, r"target: got \(1, 1\)"),
        ({"target": [0, 1]}, ValueError, "target: got 2, want one index, or one for each of 6 samples"),
        ({"target": torch.zeros(2, 3).long()}, ValueError, r"target: got \(2, 3\)"),
        ({"target": [0, 1, 2, 3, 4, 9]}, ValueError, r"target: got \(9,\)"),
        ({"target": 1.5}, TypeError, "target: got 1.5, want integers"),
        ({"target": "cat"}, TypeError, "target: got 'cat', want integers"),
        ({"target": 1, "internal_batch_size": 0}, ValueError, "internal_batch_size: got 0"),
        ({"target": 1, "baselines": torch.ones(3)}, ValueError, r"baselines: got shape \(3,\)"),
        ({"target": 1, "baselines": (0.0, 0.0)}, ValueError, "baselines: got 2, want one for each of 1 inputs"),
    ],
)
def test_bad_arguments_are_named(arguments, error, text):
    model, x = residual()
    with pytest.raises(error, match=text):
        InstanceLinearization(model).attribute(x, **arguments)


def test_bad_inputs_and_models_are_named():
    model, x = residual()
    method = InstanceLinearization(model)
    with pytest.raises(ValueError, match=r"inputs\[1\]: got \(5, 2, 8, 8\)"):
        method.attribute((x, x[:5]), target=0)
    with pytest.raises(TypeError, match=r"inputs\[0\]: got list, want a torch.Tensor"):
        method.attribute([x], target=0)
    with pytest.raises(ValueError, match=r"inputs: got no samples"):
        method.attribute(x[:0], target=0)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        method.attribute(x.long(), target=0)
    with pytest.raises(ValueError, match=r"stem.1.*training mode"):
        InstanceLinearization(Residual().double()).attribute(x, target=0)
    with pytest.raises(TypeError, match=r"model: got function, want an nn\.Module"):
        InstanceLinearization(lambda x: x)
    with pytest.raises(TypeError, match="model: returned tuple, want a tensor"):
        InstanceLinearization(Pair()).attribute(torch.ones(2, 3), target=0)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_inputs_of_one_dimension_and_scalar_outputs():
    class Kinked(nn.Module):
        def forward(self, x):
            return 3 * x.relu() + 1

    x = torch.tensor([2.0, -1.0, 0.5], dtype=F64)
    result, delta = InstanceLinearization(Kinked()).attribute(x, return_convergence_delta=True)
    assert result.tolist() == [6, 0, 1.5] and delta.tolist() == [0, 0, 0]
    result, delta = InstanceLinearization(Kinked()).attribute(x, baselines=1.0, return_convergence_delta=True)
    assert result.tolist() == [3, 0, -1.5] and delta.abs().max() <= 1e-15

    class Scalar(nn.Module):
        def forward(self, x):
            return x.relu().sum()

    one = torch.tensor([[1.0, -2.0, 3.0]], dtype=F64)
    result, delta = InstanceLinearization(Scalar()).attribute(one, return_convergence_delta=True)
    assert result.tolist() == [[1, 0, 3]] and delta.tolist() == [0]
    with pytest.raises(ValueError, match=r"target: selected shape \(1,\), want \(2, ...\)"):
        InstanceLinearization(Scalar()).attribute(torch.cat([one, one]))


def test_captums_noise_tunnel_takes_it():
    attr = pytest.importorskip("captum.attr")
    model, x = residual(torch.float32)
    method = InstanceLinearization(model)
    tunnel = attr.NoiseTunnel(method)
    got = tunnel.attribute(x, nt_samples=3, stdevs=0.0, target=1)
    torch.testing.assert_close(got, method.attribute(x, target=1), atol=1e-6, rtol=1e-5)
    got, delta = tunnel.attribute(x, nt_samples=2, stdevs=0.01, target=1, return_convergence_delta=True)
    assert got.shape == x.shape and delta.shape == (2 * len(x),) and bool(got.isfinite().all())
