"""Descrambling a layer of a network: its values, the turned weights, orders written into the model, and errors."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from interp_nn.explain.descramble.descrambler import Descrambler
from interp_nn.explain.descramble.seriation import seriate
from interp_nn.explain.following.layer_values import reinitialised
from interp_nn.nn import SummaryConv2d, SummaryHead, SummaryLinear

close = torch.testing.assert_close
# The papers' orientation, features x samples
descrambler = partial(Descrambler, features_first=True)
ordered = partial(seriate, features_first=True)


class MLP(nn.Module):
    def __init__(self, dtype=torch.float64, layer=nn.Linear):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = layer(12, 8), layer(8, 6), layer(6, 3)
        self.act = nn.Tanh()
        self.to(dtype)

    def forward(self, x):
        return self.fc3(F.relu(self.fc2(self.act(self.fc1(x)))))


class CNN(nn.Module):
    """Batch norms, PReLU, pooling and a flattened map between layers."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.PReLU(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc, self.out = nn.Linear(6 * 4, 7), nn.Linear(7, 3)
        for bn in (self.bn1, self.bn2):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.uniform_(bn.bias)
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(self.act.weight)
        self.to(dtype).eval()

    def forward(self, x):
        x = F.max_pool2d(self.act(self.bn1(self.conv1(x))), 2)
        x = F.avg_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.out(F.relu(self.fc(x.flatten(1))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(6, 6).double() for _ in range(3))

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.last(x + F.relu(self.inner(x)))


def diff1(**parameters):
    return descrambler(operator="diff1", **parameters)


def points(*shape, n=50):
    return torch.randn(n, *shape, dtype=torch.float64)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Values of a layer


def test_values_before_and_after_the_activation():
    model, x = MLP(), points(12)
    z = model.fc1(x)
    pre, post = (diff1().fit_layer(model, "fc1", x, tap=tap) for tap in ("pre", "post"))
    close(pre.loss_, diff1().fit(z.detach().mT).loss_)
    close(post.loss_, diff1().fit(z.detach().tanh().mT).loss_)
    assert (pre.layer_, pre.following_) == ("fc1", "fc2")
    last = descrambler().fit_layer(model, "fc3", x)
    assert (last.layer_, last.following_) == ("fc3", None)


def test_values_are_those_before_they_are_written_over():
    model, x = (
        nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 2), nn.ReLU(inplace=True)).double(),
        points(5),
    )
    z = model[0](x).detach()
    close(diff1().fit_layer(model, "0", x).loss_, diff1().fit(z.mT).loss_)
    order = diff1(group="permutation").fit_layer(model, "0", x)
    out = model(x).detach()
    close(order.apply_(model)(x), out)


def test_channels_are_the_features_of_a_convolution():
    model, x = CNN(), points(1, 8, 8)
    z = model.conv1(x).detach()
    d = diff1().fit_layer(model, "conv1", x)
    close(d.P_, diff1().fit(z.movedim(1, 0).flatten(1)).P_)
    assert d.following_ == "conv2"
    h = F.max_pool2d(model.act(model.bn1(z)), 2).detach()
    post = diff1().fit_layer(model, "conv1", x, tap="post")
    close(post.loss_, diff1().fit(h.movedim(1, 0).flatten(1)).loss_)
    flat = diff1().fit_layer(model, "conv2", x, tap="post")
    h = F.avg_pool2d(F.relu(model.bn2(model.conv2(h))), 2).detach()
    assert flat.following_ == "fc" and flat.P_.shape == (6, 6)
    close(flat.loss_, diff1().fit(h.movedim(1, 0).flatten(1)).loss_)


def test_sequences_have_their_features_last():
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)).double()
    x = points(7, 4)
    for tap, h in (("pre", model[0](x)), ("post", model[:2](x))):
        d = diff1().fit_layer(model, "0", x, tap=tap)
        close(d.loss_, diff1().fit(h.detach().flatten(0, 1).mT).loss_)


def test_batches_of_any_kind():
    model, x = MLP(), points(12)
    whole = diff1().fit_layer(model, "fc2", x)
    loader = DataLoader(TensorDataset(x, torch.zeros(50)), batch_size=16)
    for data in (loader, list(x.split(7)), iter(x.split(1)), ((part, None) for part in x.split(20))):
        d = diff1().fit_layer(model, "fc2", data)
        close(d.loss_, whole.loss_)
        close(d.nulls_.held_out, whole.nulls_.held_out)
        close(d.nulls_.random_net, whole.nulls_.random_net)
    close(diff1().fit_layer(model.float(), "fc2", x).loss_, whole.loss_, rtol=1e-4, atol=0.0)


def test_halves_are_of_samples_and_not_of_positions():
    """Neighbouring positions of one image are alike, so they belong to one half."""
    model, x = nn.Sequential(nn.Conv2d(1, 6, 1)).double(), points(1, 1, 1, n=8).expand(-1, -1, 9, 9)
    x = x.contiguous()
    x[::2] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one channel gives rank 2
        d = diff1().fit_layer(model, "0", x)
    first, second = d._samples.halves
    assert first.count == second.count == 4 * 81
    close(first.gram(), 4 * 81 * torch.outer(model[0].bias, model[0].bias).detach())
    assert not torch.allclose(first.gram(), second.gram())


def test_the_weights_of_the_next_layer_join_the_samples():
    model, x = MLP(), points(12)
    h, w = model.fc1(x).detach().tanh().mT, model.fc2.weight.detach()
    scale = torch.linalg.matrix_norm(h, 2) / torch.linalg.matrix_norm(w, 2)
    d = diff1().fit_layer(model, "fc1", x, tap="post", joint=True)
    close(d.loss_, diff1().fit(torch.cat((h, scale * w.mT), 1)).loss_)
    cnn = CNN()
    d = diff1().fit_layer(cnn, "conv2", points(1, 8, 8), tap="post", joint=True)
    assert d._samples.all.count == 50 * 4 + 7 * 4  # 4 positions, and 7 filters of 4 positions
    model.fc2.weight.data.zero_()
    zero = diff1().fit_layer(model, "fc1", x, tap="post", joint=True)
    close(zero.loss_, diff1().fit(h).loss_)


def test_the_model_is_left_as_it_is():
    model, x = CNN(), points(1, 8, 8)
    before, generator = state(model), torch.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    d = descrambler().fit_layer(model, "conv2", x, tap="post", joint=True)
    assert d.nulls_ and same(model, before) and torch.equal(torch.get_rng_state(), generator)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_layer_called_twice_gives_all_its_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 5).double()

        def forward(self, x):
            return self.fc(F.relu(self.fc(x)))

    model, x = Twice(), points(5)
    first = model.fc(x).detach()
    both = torch.cat((first, model.fc(first.relu()).detach())).mT
    close(diff1().fit_layer(model, "fc", x).loss_, diff1().fit(both).loss_)


def test_compiled_and_shared_modules():
    model, x = MLP(), points(12)
    compiled = torch.compile(model, backend="eager")
    d, plain = (diff1().fit_layer(m, "fc1", x) for m in (compiled, model))
    close(d.P_, plain.P_)
    shared = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double()
    model = nn.Sequential(shared, shared)
    assert descrambler().fit_layer(model, "1.0", points(4)).layer_ == "0.0"


def test_summary_layers():
    model, x = MLP(layer=SummaryLinear), points(12)
    d = diff1().fit_layer(model, "fc1", x)
    close(d.weights().weight, d.P_ @ model.fc1.effective_weight().detach())
    close(d.weights().following, model.fc2.effective_weight().detach() @ d.P_.mT)
    out, b = model(x).detach(), model.fc1.b.detach().clone()
    order = diff1(group="permutation").fit_layer(model, "fc1", x)
    close(order.apply_(model)(x), out)
    close(model.fc1.b, b @ order.P_.mT)
    head = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), SummaryHead(9, 5, 3)).double().eval()
    d = diff1().fit_layer(head, "0", x, tap="post")
    assert d.following_ == "2" and d.P_.shape == (9, 9)
    conv = nn.Sequential(SummaryConv2d(1, 4, 3), nn.ReLU(), SummaryConv2d(4, 2, 3)).double()
    d = diff1(group="permutation").fit_layer(conv, "0", points(1, 8, 8))
    images = points(1, 8, 8)
    before = conv(images)
    close(d.apply_(conv)(images), before)


# Nulls


def test_training_is_told_from_the_architecture():
    """The network learns to copy smooth signals through a narrow layer; with random weights its values are not smooth."""
    torch.manual_seed(1)
    x = torch.cumsum(points(16, n=400), 1) / 4
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()
    trained = diff1().fit_layer(model, "0", x)
    again = diff1().fit_layer(model, "0", x)
    nulls = trained.nulls_
    assert nulls == again.nulls_ and 0 < nulls.fitted < nulls.shuffled
    fresh = diff1().fit_layer(reinitialised(model), "0", x)
    assert nulls.random_net == pytest.approx(fresh.nulls_.fitted) and nulls.random_net != nulls.fitted
    assert math.isnan(trained.partial_fit(points(20).mT[:12]).nulls_.random_net)


def test_new_weights_are_drawn_as_a_new_model_draws_them():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(100, 100), nn.Parameter(torch.arange(50.0))
            self.attention = nn.MultiheadAttention(8, 2)

    model = Scaled()
    with torch.no_grad():
        model.fc.weight.fill_(7)
        model.attention.in_proj_weight.fill_(7)
    before, generator = state(model), torch.get_rng_state()
    fresh = reinitialised(model)
    assert same(model, before) and torch.equal(torch.get_rng_state(), generator)
    assert fresh.fc.weight.abs().max() <= 0.1 and float(fresh.fc.weight.detach().std()) == pytest.approx(
        0.1 / math.sqrt(3), rel=0.05
    )
    assert fresh.attention.in_proj_weight.abs().max() < 1
    assert sorted(fresh.scale.tolist()) == model.scale.tolist() != fresh.scale.tolist()
    assert torch.equal(reinitialised(model).fc.weight, fresh.fc.weight)


# Weights


def test_weights_are_turned_from_the_side_of_the_features():
    model, x = CNN(), points(1, 8, 8)
    d = diff1().fit_layer(model, "conv2", x)
    weight, following = d.weights()
    close(weight, torch.einsum("ij,jcab->icab", d.P_, model.conv2.weight.detach()))
    assert weight.shape == model.conv2.weight.shape and weight.dtype == torch.float64
    turned = torch.einsum("ij,mjs->mis", d.P_, model.fc.weight.detach().view(7, 6, 4)).reshape(7, 24)
    close(following, turned)
    W, following = torch.randn(6, 9), torch.randn(2, 6)
    got = d.weights(W, following)
    close(got.weight, d.P_ @ W.double())
    close(got.following, following.double() @ d.P_.mT)
    assert d.weights(W).following is None


def test_p_after_the_activation_is_undone_by_the_next_layer():
    """W (Pᵀ P) f(z) = W f(z), while W Pᵀ f(P z) is another network."""
    model, x = MLP(), points(12)
    d = diff1().fit_layer(model, "fc1", x, tap="post")
    following = d.weights().following
    out = model.fc2(model.fc1(x).tanh()).detach()
    after = (model.fc1(x).tanh() @ d.P_.mT @ following.mT + model.fc2.bias).detach()
    assert (after - out).abs().max() < 1e-14 * 100
    before = ((model.fc1(x) @ d.P_.mT).tanh() @ following.mT + model.fc2.bias).detach()
    assert (before - out).norm() > 0.1 * out.norm()


# Orders and mixtures written into the model


@pytest.mark.parametrize(("name", "tap"), [("fc1", "pre"), ("fc1", "post"), ("fc2", "pre")])
@pytest.mark.parametrize("layer", [nn.Linear, SummaryLinear])
def test_an_order_leaves_the_function_as_it_is(name, tap, layer):
    model, x = MLP(torch.float32, layer), points(12).float()
    before, out = state(model), model(x).detach()
    d = diff1(group="permutation").fit_layer(model, name, x, tap=tap)
    assert d.apply_(model) is model
    assert (model(x) - out).abs().max() <= 1e-6 and not same(model, before)
    order = d.P_.argmax(1)
    assert torch.equal(getattr(model, name).bias, before[f"{name}.bias"][order])
    again = diff1(group="permutation").fit_layer(model, name, x, tap=tap)
    assert again.P_.argmax(1).tolist() == list(range(len(order)))


@pytest.mark.parametrize("name", ["conv1", "conv2", "fc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_an_order_of_channels_takes_batch_norms_and_flattened_maps_with_it(name, dtype):
    model, x = CNN(dtype), points(1, 8, 8).to(dtype)
    before, out = state(model), model(x).detach()
    d = diff1(group="permutation").fit_layer(model, name, x)
    assert not torch.equal(d.P_, torch.eye(len(d.P_)).to(d.P_))
    d.apply_(model)
    assert (model(x) - out).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-14) * out.abs().max().clamp_min(1)
    assert not same(model, before)
    if name == "conv1":
        order = d.P_.argmax(1)
        for value in ("bn1.weight", "bn1.running_mean", "bn1.running_var", "act.weight"):
            assert torch.equal(model.state_dict()[value], before[value][order])


def test_the_order_is_seriation_of_the_layers_values():
    model, x = MLP(), points(12)
    d = diff1(group="permutation").fit_layer(model, "fc1", x)
    best = ordered(model.fc1(x).detach().mT)
    assert d.P_.argmax(1).tolist() == best.order.tolist()
    close((d.loss_, d.lower_bound_), (best.loss, best.lower_bound))
    assert d.lower_bound_ <= d.loss_ and d.check() == pytest.approx(best.loss / best.lower_bound - 1)


def test_an_orthogonal_p_goes_between_linear_layers_alone():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).double()
    x = points(5)
    d = diff1().fit_layer(model, "0", x)
    out, weight = model(x).detach(), model[0].weight.detach().clone()
    d.apply_(model)
    close(model(x), out)
    close(model[0].weight, d.P_ @ weight)
    close(float(model[0](x).detach().diff(dim=1).square().sum()), d.loss_)


def test_an_orthogonal_p_is_refused_across_a_nonlinearity():
    model, x = MLP(), points(12)
    before = state(model)
    d = diff1().fit_layer(model, "fc1", x)
    with pytest.raises(
        ValueError, match=r"between 'fc1' and 'fc2' lies act \(Tanh\), which does not commute with an orth"
    ):
        d.apply_(model)
    d = diff1().fit_layer(model, "fc2", x)
    with pytest.raises(ValueError, match=r"between 'fc2' and 'fc3' lies a function.* want group='permutation'"):
        d.apply_(model)
    assert same(model, before)


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(5, 6), nn.Linear(6, 2), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize("function", [F.relu, F.relu_, nn.ReLU(), nn.ReLU(inplace=True), F.relu6], ids=range(5))
@pytest.mark.parametrize("inference", [False, True])
def test_an_orthogonal_p_is_refused_across_a_nonlinearity_that_does_nothing_to_the_data(function, inference):
    model, x = Functional(function).double(), points(5)
    nn.init.constant_(model.first.bias, 3.0)
    nn.init.uniform_(model.first.weight, -0.01, 0.01)
    before = state(model)
    with torch.inference_mode(inference):
        d = diff1().fit_layer(model, "first", x + 0)
        with pytest.raises(ValueError, match="want group='permutation'"):
            d.apply_(model)
    assert same(model, before)


def test_an_orthogonal_p_goes_across_what_does_nothing():
    between = nn.Sequential(nn.Identity(), nn.Dropout(0.3), nn.Dropout(0.0)).eval()
    model, x = Functional(between).double(), points(5)
    out = model(x).detach()
    close(diff1().fit_layer(model, "first", x).apply_(model)(x), out)


def test_layers_in_containers_and_with_scales_of_their_own():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.act = nn.Parameter(torch.rand(6, dtype=torch.float64)), nn.ReLU()

        def forward(self, z):
            return self.scale * self.act(z)

    first = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
    model, x = nn.Sequential(first, Scaled(), nn.Sequential(nn.Linear(6, 3))).double(), points(5)
    out = model(x).detach()
    d = diff1().fit_layer(model, "0.0", x)
    with pytest.raises(ValueError, match=r"between '0.0' and '2.0' lies 0.1 \(Tanh\), 1.act \(ReLU\), which"):
        d.apply_(model)
    scale = model[1].scale.detach().clone()
    d = diff1(group="permutation").fit_layer(model, "0.0", x)
    close(d.apply_(model)(x), out)
    assert torch.equal(model[1].scale, scale[d.P_.argmax(1)])


def test_calls_that_depend_on_the_values():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left, self.right = (nn.Linear(4, 4).double() for _ in range(3))

        def forward(self, x):
            z = self.first(x)
            return self.left(z.relu()) if z[0, 0] > z[1, 0] else self.right(z.relu())

    x = points(4, n=2)
    d = diff1()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # two samples
        assert d.fit_layer(Branching(), "first", x).following_ is None


@pytest.mark.parametrize(
    ("make", "name", "shape", "following", "message"),
    [
        (Residual, "first", (6,), "inner", "with the features of 'first' exchanged, the model's output changes by"),
        (Residual, "inner", (6,), None, "no layer after 'inner' receives a function of its values alone"),
        (
            lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 1, groups=2)),
            *("0", (4, 9), "2", "layer '2' has 2 groups, whose channels cannot be mixed"),
        ),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 2)),
            *("0", (5,), "2", "weight of layer '0' is parametrized"),
        ),
        (
            lambda: nn.Sequential(nn.ConvTranspose1d(5, 5, 1), nn.ReLU(), nn.Conv1d(5, 2, 1)),
            *("0", (5, 9), "2", "layer '0' is ConvTranspose1d, want a layer with a weight"),
        ),
    ],
)
def test_layers_that_cannot_be_exchanged_alone(make, name, shape, following, message):
    model = make().double()
    before = state(model)
    d = diff1(group="permutation").fit_layer(model, name, points(*shape))
    assert d.following_ == following
    with pytest.raises(ValueError, match=message):
        d.apply_(model)
    assert same(model, before)


def test_arguments_of_apply_and_weights():
    model, x = MLP(), points(12)
    d = diff1(group="permutation").fit(points(5).mT)
    with pytest.raises(TypeError, match="layer: got ConvTranspose1d, want a matrix or a layer"):
        d.weights(nn.ConvTranspose1d(5, 5, 1))
    with pytest.raises(ValueError, match="apply_: fit_layer was not called; want fit_layer first"):
        d.apply_(model)
    with pytest.raises(ValueError, match="layer: got None, but fit_layer was not called"):
        d.weights()
    with pytest.raises(TypeError, match="layer: got ReLU, want a matrix or a layer with a weight"):
        d.weights(nn.ReLU())
    with pytest.raises(
        ValueError, match=r"following: got a weight of shape \(2, 4\), want \(m, 5, ...\) or a multiple"
    ):
        d.weights(torch.zeros(5, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"layer: got a weight of shape \(4, 3\), want \(5, ...\)"):
        d.weights(torch.zeros(4, 3))
    d.fit_layer(model, "fc1", x)
    with pytest.raises(ValueError, match=r"layer: got 'fc1', which the model does not have"):
        d.apply_(nn.Sequential(nn.Linear(12, 8)))


# Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d, m, x: d.fit_layer(m, "fc4", x), ValueError, "layer: got 'fc4', .*; nearest are fc3, fc2, fc1"),
        (lambda d, m, x: d.fit_layer(m, "activ", x), ValueError, "layer: got 'activ', .*; nearest are act"),
        (lambda d, m, x: d.fit_layer(m, "", x), ValueError, "layer: got '', which the model does not have"),
        (lambda d, m, x: d.fit_layer(m, "unused", x), ValueError, "layer: the model does not call 'unused'"),
        (lambda d, m, x: d.fit_layer(m, "fc1", x, tap="mid"), ValueError, "tap: got 'mid', want one of pre, post"),
        (
            lambda d, m, x: d.fit_layer(m, "fc3", x, tap="post"),
            ValueError,
            "no layer receives a function of 'fc3' alone",
        ),
        (lambda d, m, x: d.fit_layer(m, "fc1", x, joint=True), ValueError, "joint: got True with tap='pre'"),
        (lambda d, m, x: d.fit_layer(m, "fc1", []), ValueError, "data: got no samples"),
        (lambda d, m, x: d.fit_layer(m, "fc1", x[:0]), ValueError, "data: got no samples"),
        (lambda d, m, x: d.fit_layer(m, "fc1", ["a"]), TypeError, "data: got a batch of str, want tensors"),
        (lambda d, m, x: d.fit_layer(m, "fc1", [{"x": x}]), TypeError, "data: got a batch of dict"),
        (lambda d, m, x: d.fit_layer(m, "fc1", 3), TypeError, "data: got int, want a tensor or an iterable"),
        (
            lambda d, m, x: d.fit_layer(m, "fc1", x / 0),
            ValueError,
            "data: layer 'fc1' has no values, or some that are not finite",
        ),
        (lambda d, m, x: d.fit_layer(lambda x: x, "fc1", x), TypeError, "model: got function, want an nn.Module"),
        (lambda d, m, x: d.set_params(operator="no").fit_layer(m, "fc1", x), ValueError, "kind: got 'no'"),
        (
            lambda d, m, x: d.set_params(criterion="diag_sum").fit_layer(m, "fc1", x),
            ValueError,
            r"takes one square matrix; want fit\(layer.weight\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    model = MLP()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(error, match=message):
        call(diff1(), model, points(12))


def test_training_mode_is_refused_where_it_matters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match=r"model: layer '1' \(Dropout\) is in training mode"):
        descrambler().fit_layer(model, "0", points(4))


def test_a_failed_fit_keeps_what_was_fitted():
    d = diff1().fit(points(5).mT)
    P = d.P_
    with pytest.raises(ValueError, match="layer: got"):
        d.fit_layer(MLP(), "nothing", points(12))
    with pytest.raises(ValueError, match="data: layer 'fc1' has no values, or some that are not finite"):
        d.fit_layer(MLP(), "fc1", points(12) / 0)
    assert d.P_ is P
    assert copy.deepcopy(d).loss_ == d.loss_
