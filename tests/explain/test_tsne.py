import builtins
import copy

import pytest
import torch
from torch import nn

from interp_nn.explain.estimator import NotFittedError
from interp_nn.explain.tsne import (
    ParametricTSNE,
    _conditional,
    _divergence_and_gradient,
    conditional_probabilities,
    joint_probabilities,
    tsne_loss,
)

F64 = torch.float64


def perplexities(conditional):
    return torch.special.entr(conditional).sum(1).exp()


def gaussians(n, d=10, classes=5, spread=8.0, seed=1):
    """Points of well-separated Gaussians, and which one each is of."""
    generator = torch.Generator().manual_seed(seed)
    centres = spread * torch.randn(classes, d, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % classes
    return centres[labels] + torch.randn(n, d, generator=generator), labels


def small_encoder(d=10, out=2, dtype=None):
    return nn.Sequential(nn.Linear(d, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, out)).to(dtype)


def neighbours_accuracy(points, labels, new, new_labels, k=5):
    votes = labels[torch.cdist(new, points).topk(k, largest=False).indices]
    return float((votes.mode(1).values == new_labels).double().mean())


@pytest.mark.parametrize("perplexity", [1.5, 5.0, 30.0, 77.5])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_perplexity_is_reached(perplexity, scale):
    x = scale * torch.randn(80, 3, 4, dtype=F64) * torch.logspace(-3, 1, 80, dtype=F64).view(80, 1, 1)
    p = conditional_probabilities(x, perplexity)
    assert p.dtype == F64 and bool((p.diagonal() == 0).all()) and bool((p >= 0).all())
    torch.testing.assert_close(p.sum(1), torch.ones(80, dtype=F64), atol=1e-12, rtol=0)
    assert float((perplexities(p) - perplexity).abs().max()) <= 1e-5
    squared = torch.cdist(x.flatten(1), x.flatten(1)).square()
    # A row is a Gaussian: its logarithm is linear in the squared distances.
    for i in (0, 40, 79):
        others = (torch.arange(80) != i) & (p[i] > 1e-12)
        line = torch.stack([squared[i, others], torch.ones_like(squared[i, others])], 1)
        fit = torch.linalg.lstsq(line / line.amax(0), p[i, others].log().unsqueeze(1)).solution
        assert float((line / line.amax(0) @ fit - p[i, others].log().unsqueeze(1)).abs().max()) < 1e-6


def test_joint_probabilities_are_symmetric_and_sum_to_one():
    x = torch.randn(40, 6)
    joint, conditional = joint_probabilities(x, 10), conditional_probabilities(x, 10)
    assert torch.equal(joint, joint.T) and float(joint.sum()) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(joint, (conditional + conditional.T) / 80, rtol=0, atol=1e-18)


def test_points_that_coincide_share_their_row():
    x = torch.randn(30, 4).repeat_interleave(10, 0)  # nine others at no distance, more than the perplexity asks for
    p = conditional_probabilities(x, 4)
    same = torch.arange(300).div(10, rounding_mode="floor")
    same = (same.unsqueeze(1) == same) & ~torch.eye(300, dtype=torch.bool)
    torch.testing.assert_close(p, same / 9.0, check_dtype=False, atol=1e-9, rtol=0)
    everywhere = conditional_probabilities(torch.zeros(20, 3), 5)
    torch.testing.assert_close(perplexities(everywhere), torch.full((20,), 19.0, dtype=F64))


@pytest.mark.parametrize("d", [1, 2, 3, 7])
@pytest.mark.parametrize("exaggeration", [1.0, 4.0])
def test_gradients_are_those_of_the_closed_form(d, exaggeration):
    freedom = max(d - 1, 1)
    p = joint_probabilities(torch.randn(50, 5, dtype=F64), 12)
    y = (3 * torch.randn(50, d, dtype=F64)).requires_grad_()
    loss = tsne_loss(y, p, exaggeration)
    (gradient,) = torch.autograd.grad(loss, y)
    with torch.no_grad():
        difference = y.unsqueeze(1) - y
        kernel = 1 / (1 + difference.square().sum(2) / freedom)
        unnormalised = (kernel ** ((freedom + 1) / 2)).fill_diagonal_(0)
        q = unnormalised / unnormalised.sum()
        forces = ((exaggeration * p - q) * kernel).unsqueeze(2) * difference
        closed = (2 * freedom + 2) / freedom * forces.sum(1)
        divergence = torch.xlogy(p, p).sum() - torch.xlogy(p, q).sum()
    assert float((gradient - closed).norm() / closed.norm()) <= 1e-12
    value, trained = _divergence_and_gradient(y, p, exaggeration)
    assert float((trained - closed).norm() / closed.norm()) <= 1e-12
    assert float(value) == pytest.approx(float(divergence), rel=1e-12) and float(divergence) > 0
    if exaggeration == 1:
        assert float(loss.detach()) == pytest.approx(float(divergence), rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 4096.0])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 1e4])
def test_the_gradient_that_trains_is_as_exact_as_autograd(spread, offset):
    p = joint_probabilities(torch.randn(60, 5), 12)
    y = spread * (torch.randn(60, 2) + offset)
    exact = _gradient(y.double(), p)

    def error(gradient):
        return float((gradient - exact).norm() / exact.norm())

    _, trained = _divergence_and_gradient(y, p.float(), 4.0)
    assert error(trained) <= 2 * error(_gradient(y, p)) + 64 * torch.finfo(torch.float32).eps


def _gradient(y, p):
    y = y.clone().requires_grad_()
    return torch.autograd.grad(tsne_loss(y, p, 4.0), y)[0]


def test_a_step_forms_no_graph_of_pairs():
    """The gradient has a closed form, which is cheaper than autograd over the (batch, batch) matrices."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Spy():
        ParametricTSNE(small_encoder(), perplexity=8, epochs=1).fit(gaussians(60)[0])
    assert torch.ops.aten._cdist_forward in seen and torch.ops.aten._cdist_backward not in seen


def test_points_that_coincide_have_finite_gradients():
    y = torch.zeros(12, 2, requires_grad=True)
    tsne_loss(y, joint_probabilities(torch.randn(12, 3), 4)).backward()
    assert torch.equal(y.grad, torch.zeros_like(y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_the_loss_of_16_bit_points_is_fp32(dtype):
    y, p = torch.randn(30, 2).to(dtype), joint_probabilities(torch.randn(30, 4), 8)
    loss = tsne_loss(y, p)
    assert loss.dtype == (F64 if dtype == F64 else torch.float32)
    assert float(loss) == pytest.approx(float(tsne_loss(y.double(), p)), rel=1e-5)


def test_distances_are_exact_far_from_the_origin():
    y, p = torch.randn(60, 2).round(decimals=2), joint_probabilities(torch.randn(60, 4), 8)
    assert float(tsne_loss(y + 4096, p)) == pytest.approx(float(tsne_loss(y, p)), rel=1e-3)


def test_separate_clusters_stay_separate_and_new_points_fall_into_theirs():
    x, labels = gaussians(400)
    new, new_labels = gaussians(150, seed=2)
    tsne = ParametricTSNE(small_encoder(), perplexity=20, batch_size=150, epochs=25, exaggeration_epochs=5)
    embedded = tsne.fit_transform(x)
    assert embedded.shape == (400, 2)
    assert neighbours_accuracy(embedded, labels, tsne.transform(new), new_labels) >= 0.95
    assert len(tsne.kl_) == 25 and 0 < tsne.kl_[-1] < 0.6 * tsne.kl_[0]


def test_the_default_encoder():
    x, labels = gaussians(120, d=12)
    tsne = ParametricTSNE(perplexity=10, epochs=8, exaggeration_epochs=2).fit(x.view(120, 3, 4).double())
    widths = [(m.in_features, m.out_features) for m in tsne.encoder_ if isinstance(m, nn.Linear)]
    assert widths == [(12, 256), (256, 256), (256, 1024), (1024, 2)] and isinstance(tsne.encoder_[-1], nn.Linear)
    placed = tsne.transform(x.view(120, 3, 4))
    assert placed.dtype == F64 and neighbours_accuracy(placed, labels, placed, labels) >= 0.95


def test_equal_seeds_give_equal_networks_and_leave_the_generators_alone():
    x, _ = gaussians(90)
    encoder = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Dropout(0.2), nn.BatchNorm1d(32), nn.Linear(32, 2))
    before, state = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()

    def fitted(seed, template=encoder):
        torch.randn(seed + 3)  # what was drawn before does not matter
        return ParametricTSNE(template, perplexity=8, batch_size=40, epochs=3, seed=seed).fit(x)

    first, second, other = fitted(0), fitted(0), fitted(1)
    assert torch.equal(first.transform(x), second.transform(x)) and first.kl_ == second.kl_
    assert torch.equal(first.transform(x), first.fit(x).transform(x))  # fitting again starts afresh
    assert not torch.equal(first.transform(x), other.transform(x))
    assert torch.equal(fitted(0, None).transform(x), fitted(0, None).transform(x))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items()) and encoder.training
    torch.set_rng_state(state)
    fitted(0)
    torch.testing.assert_close(torch.randn(1), _after(state, 3), rtol=0, atol=0)


def _after(state, drawn):
    torch.set_rng_state(state)
    torch.randn(drawn)
    return torch.randn(1)


def test_exaggeration_ends_and_the_encoder_trains():
    x, _ = gaussians(60)
    encoder = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    def divergences(**arguments):
        tsne = ParametricTSNE(encoder, perplexity=8, epochs=4, **arguments).fit(x)
        assert tsne.encoder_[1].num_batches_tracked == 4  # batch norm was in training mode
        return tsne.kl_

    plain = divergences(early_exaggeration=1)
    assert divergences(exaggeration_epochs=0) == plain
    some, all_of_them = divergences(exaggeration_epochs=2), divergences(exaggeration_epochs=4)
    # The first divergence is that of the start, and what is exaggerated in an epoch shows in the next.
    assert some[0] == plain[0] and some[1] != plain[1]
    assert some[:3] == all_of_them[:3] and some[3] != all_of_them[3]


def test_batches_are_of_nearly_one_size():
    seen = []

    class Recorder(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    x, _ = gaussians(101)
    tsne = ParametricTSNE(Recorder(10, 2), perplexity=5, batch_size=50, epochs=2).fit(x)
    assert seen[1:] == [34, 34, 33] * 2  # the first call only looks at the output's shape
    assert tsne.transform(x).shape == (101, 2) and seen[7:] == [50, 50, 1]


def test_the_encoder_decides_dtype_and_keeps_evaluation_mode():
    x, _ = gaussians(60)
    tsne = ParametricTSNE(small_encoder(dtype=F64), perplexity=8, epochs=1).fit(x)
    assert tsne.transform(x).dtype == F64 and not tsne.encoder_.training
    assert not tsne.transform(x).requires_grad


def test_the_embedding_is_an_affine_map_around_each_point():
    x, _ = gaussians(80)
    tsne = ParametricTSNE(small_encoder(dtype=F64), perplexity=10, epochs=4).fit(x.double())
    x = x[:20].double()
    linear = tsne.linearize(x)
    placed = tsne.transform(x)
    assert linear.weight.shape == (20, 2, 10) and linear.bias.shape == (20, 2)
    mapped = torch.einsum("nkd,nd->nk", linear.weight, x) + linear.bias
    assert float((mapped - placed).abs().max() / placed.abs().max()) <= 1e-12
    # Two points in one region differ by exactly W (x - x'); far enough apart that a gate flips, they do not.
    step = torch.randn(20, 10, dtype=F64)

    def error(size):
        moved = tsne.transform(x + size * step) - placed
        return ((moved - torch.einsum("nkd,nd->nk", linear.weight, size * step)).norm(dim=1) / moved.norm(dim=1)).max()

    assert float(error(1e-6)) <= 1e-7
    assert float(error(1.0)) >= 1e-2


def test_a_progress_bar_is_shown_where_asked(capsys, monkeypatch):
    x, _ = gaussians(40)
    arguments = {"perplexity": 5, "epochs": 2}
    ParametricTSNE(small_encoder(), **arguments).fit(x)
    assert capsys.readouterr().err == ""
    ParametricTSNE(small_encoder(), progress=True, **arguments).fit(x)
    assert "t-SNE: 100%" in capsys.readouterr().err
    real = builtins.__import__

    def without_tqdm(name, *rest, **named):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm: pip install"):
        ParametricTSNE(small_encoder(), progress=True, **arguments).fit(x)


class FunctionalReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 2)

    def forward(self, x):
        return torch.relu(self.linear(x)).unsqueeze(0).squeeze(0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: nn.Sequential(nn.Linear(10, 2), nn.ReLU()), "ends in a ReLU"),
        (lambda: nn.Sequential(nn.Linear(10, 2), nn.ReLU(inplace=True), nn.Flatten()), "ends in a ReLU"),
        (FunctionalReLU, "ends in a ReLU"),
        (lambda: nn.Unflatten(1, (5, 2)), "has no parameters"),
        (lambda: nn.Sequential(nn.Linear(10, 4), nn.Unflatten(1, (2, 2))), r"returned \(2, 2, 2\) for 2 points"),
    ],
)
def test_encoders_that_cannot_embed_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        ParametricTSNE(make(), perplexity=5).fit(gaussians(40)[0])


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ([["a"]], TypeError, "x: got <U1, want numbers"),
        (torch.ones(40, 10).to_sparse(), TypeError, "x: got a sparse tensor"),
        (torch.ones(40), ValueError, r"x: got shape \(40,\)"),
        (torch.full((40, 10), torch.nan), ValueError, "not finite"),
        (torch.ones(6, 10), ValueError, "perplexity: got 5 for batches of 6 points .* less than 5"),
        (torch.ones(0, 10), ValueError, r"x: got shape \(0, 10\), want \(n, ...\) with n > 0"),
    ],
)
def test_points_that_cannot_be_embedded_are_refused(x, error, text):
    with pytest.raises(error, match=text):
        ParametricTSNE(small_encoder(), perplexity=5).fit(x)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"encoder": torch.relu}, TypeError, "encoder: got builtin_function_or_method"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0, want at least 4"),
        ({"epochs": 0}, ValueError, "epochs: got 0"),
        ({"early_exaggeration": 0.5}, ValueError, "early_exaggeration: got 0.5"),
        ({"exaggeration_epochs": -1}, ValueError, "exaggeration_epochs: got -1"),
        ({"learning_rate": 0}, ValueError, "learning_rate: got 0, want more than 0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        ParametricTSNE(**arguments).fit(gaussians(40)[0])


@pytest.mark.parametrize("perplexity", [1.0, 9.0, 40.0, float("nan")])
def test_perplexities_that_cannot_be_reached(perplexity):
    with pytest.raises(ValueError, match="for 10 points, want more than 1 and less than 9"):
        conditional_probabilities(torch.randn(10, 2), perplexity)


def test_nothing_is_placed_before_the_fit():
    with pytest.raises(NotFittedError, match="not fitted yet"):
        ParametricTSNE().transform(torch.ones(3, 2))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_it_trains_where_gradients_are_switched_off(off):
    x, _ = gaussians(60)
    on = ParametricTSNE(small_encoder(), perplexity=8, epochs=2)
    with off():
        points = x.clone()
        placed = on.fit(points).transform(points)
    assert torch.equal(placed, on.fit(x).transform(x)) and on.kl_[1] < on.kl_[0]


def test_frozen_parameters_stay_and_an_encoder_of_them_is_refused():
    x, encoder = gaussians(60)[0], small_encoder()
    encoder[0].requires_grad_(False)
    tsne = ParametricTSNE(encoder, perplexity=8, epochs=2).fit(x)
    assert torch.equal(tsne.encoder_[0].weight, encoder[0].weight)
    assert not torch.equal(tsne.encoder_[2].weight, encoder[2].weight)
    with pytest.raises(ValueError, match="encoder: requires no gradient in any of its parameters"):
        ParametricTSNE(encoder.requires_grad_(False), perplexity=8).fit(x)


def test_the_search_may_start_anywhere():
    x = torch.randn(80, 3, dtype=F64) * torch.logspace(-3, 1, 80, dtype=F64).unsqueeze(1)
    squared = torch.cdist(x, x).square()
    p, position = _conditional(squared.clone(), 20, None)
    for start in (position + torch.randn(80, 1, dtype=F64), torch.full((80, 1), -40.0), torch.full((80, 1), 40.0)):
        torch.testing.assert_close(_conditional(squared.clone(), 20, start.double())[0], p, rtol=0, atol=1e-9)
        in_training, _ = _conditional(squared.float(), 20, start.float(), 1e-5)
        assert float((perplexities(in_training.double()) / 20 - 1).abs().max()) < 2e-5


def test_divergence_is_reported():
    with pytest.raises(FloatingPointError, match="try a smaller learning_rate"):
        ParametricTSNE(small_encoder(), perplexity=5, epochs=3, learning_rate=1e30).fit(gaussians(40)[0])


def test_points_that_require_a_gradient_get_none():
    x = torch.randn(60, 5, requires_grad=True)
    fitted = ParametricTSNE(nn.Linear(5, 2), perplexity=5, epochs=2, batch_size=30).fit(x)
    assert torch.equal(
        fitted.transform(x),
        ParametricTSNE(fitted.encoder, perplexity=5, epochs=2, batch_size=30).fit_transform(x.detach()),
    )
    assert x.grad is None
