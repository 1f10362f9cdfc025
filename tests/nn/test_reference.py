"""The head against a port of AskExplain/Interpretable-Neural-Net, checkpoint by checkpoint."""

import pytest
import torch
from relative_error import error, randomize
from torch import nn
from torch.nn import functional as F

from interp_nn.convert import head_from_reference
from interp_nn.nn import SummaryLoss


class ReferenceLayer(nn.Module):
    """b is a Linear's answer to the identity matrix, so the Linear's bias shifts every row of it."""

    def __init__(self, d, k):
        super().__init__()
        self.beta_I = torch.eye(d)
        self.beta_func1 = nn.Linear(d, k)

    def beta(self):
        return self.beta_func1(self.beta_I.to(self.beta_func1.weight.dtype))

    def forward(self, x):
        beta = self.beta()
        return x @ beta, x @ beta @ (beta.T @ beta)


class ReferenceNet(nn.Module):
    """Convolutions, flattened, then the summary layer and the output layer that both of its codes share."""

    def __init__(self, layer, d, k, classes=10, **convolutions):
        super().__init__()
        for name, module in convolutions.items():
            self.add_module(name, module)
        self.layer = layer
        self.add_module(layer, ReferenceLayer(d, k))
        self.output = nn.Linear(k, classes)

    def forward(self, x):
        return tuple(map(self.output, self.get_submodule(self.layer)(x)))

    def loss(self, x, target):
        o1, o2 = self(x)
        return F.cross_entropy(o1, target) + F.mse_loss(o1, o2) + F.cross_entropy(o2, target)


def vgg():
    return ReferenceNet("classifier", 512, 100, features=nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU()))


def cnn():
    return ReferenceNet("summary_layer1", 1600, 120, conv1=nn.Conv2d(3, 32, 5), conv2=nn.Conv2d(32, 64, 5))


by_net = pytest.mark.parametrize("build", [vgg, cnn])


def batch(net, n=32):
    return torch.randn(n, net.get_submodule(net.layer).beta_func1.in_features), torch.randint(10, (n,))


@by_net
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_converted_head_gives_the_references_logits_loss_and_gradients(build, dtype, bound):
    net = build().to(dtype)
    linear = net.get_submodule(net.layer).beta_func1
    assert {"output.weight", f"{net.layer}.beta_func1.bias"} < set(net.state_dict())
    assert any(key.startswith(("features.0", "conv1")) for key in net.state_dict())
    head = head_from_reference(net.state_dict())
    x, target = batch(net)
    x = x.to(dtype)
    for got, wanted in zip(head(x), net(x), strict=True):
        assert error(got, wanted) <= bound
    loss, of_the_reference = head.loss(x, target), net.loss(x, target)
    assert error(loss, of_the_reference) <= bound
    assert error(SummaryLoss()(head(x), target), of_the_reference) <= bound
    if dtype == torch.float64:
        loss.backward()
        of_the_reference.backward()
        assert error(head.b.grad.t(), linear.weight.grad) <= 1e-11
        assert error(head.b.grad.sum(0), linear.bias.grad) <= 1e-11
        assert error(head.output.weight.grad, net.output.weight.grad) <= 1e-11
        assert error(head.output.bias.grad, net.output.bias.grad) <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversion_keeps_dtype_and_leaves_the_checkpoint_alone(dtype):
    checkpoint = vgg().to(dtype).state_dict()
    before = {name: value.clone() for name, value in checkpoint.items()}
    head = head_from_reference(checkpoint)
    assert head.b.dtype == head.output.weight.dtype == dtype
    assert all(p.requires_grad for p in head.parameters())
    randomize(head)
    assert all(torch.equal(checkpoint[name], value) for name, value in before.items())


def _two_layers():
    checkpoint, other = cnn().state_dict(), vgg().state_dict()
    return checkpoint | {name: value for name, value in other.items() if name.startswith("classifier")}


def test_layer_is_asked_for_where_there_are_two():
    checkpoint = _two_layers()
    with pytest.raises(ValueError, match=r"^layer: got None.*summary_layer1.*classifier"):
        head_from_reference(checkpoint)
    assert head_from_reference(checkpoint, "summary_layer1").in_features == 1600


@pytest.mark.parametrize(
    ("drop", "options", "message"),
    [
        ("none", {"layer": "classifier"}, r"^layer: got 'classifier', want .*'summary_layer1'"),
        ("beta_func1", {}, r"^layer: got None.*\[\]"),
        ("none", {"output": "fc"}, r"^output: got 'fc', but the checkpoint has no fc\.weight"),
        ("output", {}, r"^output: got 'output', but the checkpoint has no output\.weight"),
    ],
)
def test_missing_names_are_named(drop, options, message):
    checkpoint = {name: value for name, value in cnn().state_dict().items() if drop not in name}
    with pytest.raises(ValueError, match=message):
        head_from_reference(checkpoint, **options)


def test_names_inside_a_larger_model_and_a_renamed_output():
    net = cnn()
    checkpoint = {f"module.{name}": value for name, value in net.state_dict().items()}
    head = head_from_reference(checkpoint, output="module.output")
    x, _ = batch(net)
    assert error(head(x)[1], net(x)[1]) <= 1e-6
