"""Models of token ids, explained from their embeddings on."""

import threading

import pytest
import torch
from explained_networks import language_model
from torch import nn

from interp_nn.explain import frozen, linearize, record, supported_ops
from interp_nn.explain.linear.affine_map import AffineMap

DTYPE = torch.float64
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [0, 1, 2, 3, 4]])  # the last ones are positions too


def relative(got, wanted):
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("held", ["activated", "left", "right"])
def test_a_language_model_is_exact_at_its_embeddings(held, dtype, bound):
    model = language_model(dtype)
    wanted, before = model(IDS), IDS.clone()
    affine = linearize(model, IDS, held=held)
    e = affine.x
    assert torch.equal(e, model.tokens(IDS)) and affine.shape == (3, 5, 11, 5, 8) and torch.equal(IDS, before)
    weight = affine.weight  # reverse mode at e
    bias = frozen(model, IDS, held=held)(torch.zeros_like(e))  # the replay at 0
    assert relative(torch.einsum("ntvse,nse->ntv", weight, e) + bias, wanted) <= bound
    assert affine.check() <= bound and relative(affine(e), wanted) <= bound
    assert relative(sum(affine.bias_by_layer().values()), affine.bias) <= 10 * bound
    assert not weight[:, 1, :, 2:].any() and weight[:, 4].any()  # later tokens add nothing


def test_the_map_is_the_jacobian_of_the_network_with_its_factors_held():
    model = language_model()
    affine, tangent = linearize(model, IDS), linearize(model, IDS, mode="tangent")
    assert relative(tangent.weight, affine.weight) > 0.1 and tangent.check() <= 1e-12
    model.held = True
    jacobian = torch.stack(
        [torch.func.jacrev(lambda e: model.of_embeddings(e.unsqueeze(0))[0])(sample) for sample in affine.x]
    )
    assert relative(affine.weight, jacobian) <= 1e-13


def test_contributions_of_tokens_to_one_logit():
    model = language_model()
    affine = linearize(model, IDS, lambda logits: logits[:, -1, 7])
    by_token = affine.contributions(affine.x).sum(-1)
    assert by_token.shape == IDS.shape and relative(by_token.sum(1) + affine.bias, model(IDS)[:, -1, 7]) <= 1e-13
    parts = affine.bias_by_layer()
    assert [name for name, part in parts.items() if part.any()] == ["blocks.0.value", "blocks.1.value"]
    assert relative(sum(parts.values()), affine.bias) <= 1e-12


def test_its_operations_are_named():
    report = supported_ops(language_model(), IDS)
    assert report.supported and not report.exact
    found = {(name, treatment) for name, _, treatment, _ in report.rows}
    assert {("mul", "secant"), ("silu", "secant"), ("pow", "secant"), ("softmax", "frozen")} <= found
    assert {at for _, at, _, _ in report.rows} >= {"blocks.1.gate", "head", ""}


def test_integers_of_every_dtype():
    model = language_model()
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(linearize(model, IDS.to(dtype), 0).weight, linearize(model, IDS, 0).weight)
    with pytest.raises(TypeError, match=r"x: got torch\.bool, want floating-point inputs"):
        linearize(model, IDS > 2)


class Reader(nn.Module):
    """Reads words one after another."""

    def __init__(self, layer):
        super().__init__()
        self.words, self.layer, self.head = nn.Embedding(11, 6), layer, nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(self.layer(self.words(ids))[0][:, -1])


@pytest.mark.parametrize("kind", ["relu", "tanh", "lstm", "gru"])
def test_recurrent_layers(kind):
    given = {"batch_first": True} if kind in ("lstm", "gru") else {"batch_first": True, "nonlinearity": kind}
    layer = {"lstm": nn.LSTM, "gru": nn.GRU}.get(kind, nn.RNN)(6, 6, 2, **given)
    model = Reader(layer).to(DTYPE).eval()
    affine = linearize(model, IDS)
    assert affine.shape == (3, 3, 5, 6) and affine.check() <= 1e-13
    assert supported_ops(model, IDS).exact == (kind == "relu")
    tangent = linearize(model, IDS, mode="tangent")
    assert (relative(affine.weight, tangent.weight) <= 1e-13) == (kind == "relu")
    if kind == "relu":
        gates = linearize(model, IDS, layer="layer#5"), linearize(model, IDS, layer="layer#5", mode="tangent")
        assert relative(gates[0].weight, gates[1].weight) <= 1e-13 and gates[1].check() <= 1e-13
        assert len(record(model, IDS).sites) == 10


class Classifier(nn.Module):
    """Words, and positions and segments too; entries of token 0 are left out."""

    def __init__(self, segments=False):
        super().__init__()
        self.words, self.positions, self.segments = nn.Embedding(11, 6), nn.Embedding(5, 6), nn.Embedding(11, 6)
        self.mix, self.head, self.of_segments = nn.Linear(6, 6), nn.Linear(6, 3), segments

    def forward(self, ids):
        e = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        if self.of_segments:
            e += self.segments(ids)
        h = self.mix(e).relu() * (ids != 0).unsqueeze(-1)
        return self.head(h.sum(1))


def test_the_layer_that_looks_up_is_found_or_named():
    model = Classifier().to(DTYPE).eval()
    affine = linearize(model, IDS)
    assert torch.equal(affine.x, model.words(IDS)) and affine.check() <= 1e-14
    assert relative(linearize(model, IDS, embedding="words").weight, affine.weight) == 0
    assert supported_ops(model, IDS).exact
    assert record(model, IDS, check=True).sites[0].shape == (5, 6)

    both = Classifier(segments=True).to(DTYPE).eval()
    with pytest.raises(ValueError, match="embedding: the model also looks x up in 'segments'; want embedding="):
        linearize(both, IDS)
    for name in ("words", "segments"):
        affine = linearize(both, IDS, embedding=name)
        assert torch.equal(affine.x, both.get_submodule(name)(IDS)) and affine.check() <= 1e-14


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.unused = nn.Parameter(torch.randn(11, 6)), nn.Embedding(3, 3)

    def forward(self, ids):
        return self.table[ids].relu().sum(1)


class Twice(Classifier):
    def forward(self, ids):
        return self.head((self.words(ids) - self.words(ids.flip(1))).sum(1))


@pytest.mark.parametrize(
    ("model", "arguments", "text"),
    [
        (
            Raw(),
            {"embedding": "unused"},
            r"embedding: got 'unused', which the model does not call; want .*\['unused'\]",
        ),
        (
            Classifier(),
            {"embedding": "word"},
            r"embedding: got 'word', want one of \['words', 'positions', 'segments'\]",
        ),
        (
            Classifier(),
            {"embedding": "positions"},
            r"embedding: 'positions' returns \(5, 6\), want a layer .* \(3, ...\) of x",
        ),
        (
            nn.Sequential(nn.Embedding(11, 6, max_norm=1.0)),
            {"embedding": "0"},
            "embedding: '0' changes its weight in each call; want max_norm=None",
        ),
        (Twice(), {}, "model: calls its embedding 'words' several times"),
    ],
)
def test_what_looks_up_in_another_way_is_refused(model, arguments, text):
    for explain in (linearize, frozen, record, supported_ops):
        with pytest.raises(ValueError, match=text):
            explain(model.eval(), IDS, **arguments)


def test_bad_inputs():
    model = language_model()
    for explain in (linearize, frozen, record, supported_ops):
        with pytest.raises(
            TypeError, match=r"x: got torch\.int64, want floating-point inputs, or token ids that an nn"
        ):
            explain(Raw(), IDS)
    with pytest.raises(ValueError, match=r"embedding: got 'tokens' for inputs of torch.float64, want token ids"):
        linearize(model, torch.ones(2, 3, dtype=DTYPE), embedding="tokens")
    with pytest.raises(ValueError, match=r"x: got token ids of shape \(0, 3\), want \(n, ...\)"):
        linearize(model, IDS[:0, :3])
    with pytest.raises(ValueError, match="x: got a map without its inputs"):
        AffineMap.from_tensors(torch.ones(1, 2, 3), torch.ones(1, 2)).x  # noqa: B018
    assert not model.tokens._forward_hooks


def test_another_thread_uses_the_model_meanwhile():
    model = Classifier().to(DTYPE).eval()
    wanted, found = model(IDS), []

    def other():
        thread = threading.Thread(target=lambda: found.append(model(IDS)))
        thread.start()
        thread.join()

    model.mix.register_forward_hook(
        lambda *_: other() if threading.current_thread() is threading.main_thread() else None
    )
    replay = frozen(model, IDS)
    replay(torch.zeros(3, 5, 6, dtype=DTYPE))
    assert len(found) == 2 and all(torch.equal(one, wanted) for one in found)
