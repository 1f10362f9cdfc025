"""Tokens' contributions to a logit, and singular directions without W, against W of the network with its held factors."""

from types import SimpleNamespace

import pytest
import torch
from explained_networks import LanguageModel, language_model
from torch import nn

from interp_nn.explain import linearize, singular_directions, token_contributions
from interp_nn.explain.linear.operators import JacobianOperator

F64 = torch.float64
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
TEXT = "abcdefghijk".__getitem__


def relative(got, wanted):
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def with_biases(dtype=F64):
    torch.manual_seed(1)
    return language_model(dtype)


def held_at(model, e):
    """The network as a function of embeddings, with its scales, attention weights and gates at their values for e."""
    kept, last = [], []
    model.head.register_forward_pre_hook(lambda module, args: last.append(args[0]))

    def of(values, keep):
        model.keep = keep
        logits = model.of_embeddings(values)
        return logits, last.pop()

    of(e, lambda t: kept.append(t) or t)

    def function(values):
        factors = iter(kept)
        return of(values, lambda t: next(factors))

    return function


def test_the_map_by_finite_differences_of_the_network_with_its_held_factors():
    model, step = with_biases(), 0.25  # of an affine function: no step is too large
    affine = linearize(model, IDS, lambda logits: logits[:, -1])
    with torch.no_grad():
        held = held_at(with_biases(), affine.x)
        columns = []
        for i in range(affine.x[0].numel()):
            moved = torch.zeros_like(affine.x)
            moved.flatten(1)[:, i] = step
            columns.append((held(affine.x + moved)[0] - held(affine.x - moved)[0])[:, -1] / (2 * step))
        assert relative(affine.weight.flatten(2), torch.stack(columns, 2)) <= 1e-12
        far = torch.randn_like(affine.x)
        assert relative(affine(far), held(far)[0][:, -1]) <= 1e-12
        assert relative(affine.bias, held(torch.zeros_like(far))[0][:, -1]) <= 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (F64, 1e-13)])
def test_the_state_is_reconstructed_as_closely_as_is_published(dtype, bound):
    # Golden's measure, which the paper has below 1e-13 in double precision: |error| / |last hidden state|.
    model = with_biases(dtype)
    states = []
    model.head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    affine = linearize(model, IDS, lambda _: states.pop()[:, -1])
    with torch.no_grad():
        model(IDS)
    error = torch.einsum("nktd,ntd->nk", affine.weight, affine.x) + affine.bias - states.pop()[:, -1]
    with torch.no_grad():
        model(IDS)
    assert bool((error.norm(dim=1) <= bound * states.pop()[:, -1].norm(dim=1)).all())


@pytest.mark.parametrize("held", ["activated", "left", "right"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (F64, 1e-13)])
def test_tokens_and_layers_sum_to_the_logit(held, dtype, bound):
    model = with_biases(dtype)
    found = token_contributions(model, IDS, 7, held=held)
    with torch.no_grad():
        wanted = model(IDS)[:, -1, 7]
    assert relative(found.contributions.sum(1) + sum(found.constants.values()), wanted) <= bound
    assert found.check() <= bound and torch.equal(found.values, wanted) and found.position == 4
    affine = linearize(model, IDS, held=held)
    weight, bias = affine.weight[:, -1, 7], affine.bias[:, -1, 7]
    assert relative(found.contributions, (weight * affine.x).sum(2)) <= bound
    assert relative(sum(found.constants.values()), bias) <= 20 * bound


def test_the_logit_and_the_position():
    model = with_biases()
    with torch.no_grad():
        logits = model(IDS)
    largest = token_contributions(model, IDS, position=2)
    assert torch.equal(largest.logits, logits[:, 2].argmax(1)) and largest.position == 2 and largest.check() <= 1e-13
    assert not largest.contributions[:, 3:].any() and largest.contributions[:, :3].all()  # later tokens add nothing
    chosen = token_contributions(model, IDS, torch.tensor([3, 0]), position=-3)
    assert torch.equal(chosen.values, logits[[0, 1], 2, [3, 0]]) and chosen.names == ("3", "0")
    assert token_contributions(model, IDS.to(torch.int32), 3).contributions.dtype == F64


def test_constants_that_reach_held_factors_alone():
    model = with_biases()
    for block in model.blocks:
        block["value"].bias = None  # those of queries and keys are left
    found = token_contributions(model, IDS, 7)
    assert found.check() <= 1e-13 and found.constants and not any(part.any() for part in found.constants.values())
    assert "constant" not in set(found.to_pandas().part)


def test_the_table_of_contributions():
    found = token_contributions(with_biases(), IDS, 7, tokenizer=TEXT)
    table = found.to_pandas(2)
    assert list(table.columns) == ["sample", "part", "position", "name", "contribution"] and len(table) == 10
    for i, rows in table.groupby("sample"):
        assert rows.contribution.sum() == pytest.approx(float(found.values[i]), rel=1e-12)
        tokens, constants = (rows[rows.part == part] for part in ("token", "constant"))
        order = found.contributions[i].abs().argsort(descending=True)
        assert tokens.position.tolist()[:2] == order[:2].tolist() and tokens.name.tolist()[2] == "3 other tokens"
        assert tokens.name.tolist()[:2] == [repr(TEXT(int(IDS[i, j]))) for j in order[:2]]
        assert set(constants.name) == {"blocks.0.value", "blocks.1.value"} and constants.position.isna().all()
    assert len(found.to_pandas()) == 14 and len(found.to_pandas(9)) == 14
    lines = str(found).splitlines()
    assert lines[0] == f"sample 0: logit 'h' at position 4 = {float(found.values[0]):.4g}" and len(lines) == 17
    assert lines[-1].startswith("the sums differ from the model by")
    with pytest.raises(ValueError, match="k: got 0, want at least 1, or None"):
        found.to_pandas(0)


@pytest.mark.parametrize("position", [-1, 1])
def test_singular_directions_are_those_of_the_held_networks_jacobian(position):
    model = with_biases()
    found = singular_directions(model, IDS, 3, position=position, tokenizer=TEXT)
    for i, e in enumerate(model.tokens(IDS).detach()):
        held = held_at(with_biases(), e.unsqueeze(0))
        jacobian = torch.func.jacrev(lambda v: held(v.unsqueeze(0))[1][0, position])(e)  # noqa: B023
        left, values, right = torch.linalg.svd(jacobian.flatten(1), full_matrices=False)
        assert relative(found.values[i], values[:3]) <= 1e-13
        strengths = values[:3] * (right[:3] @ e.flatten())
        assert relative(found.strengths[i], strengths.abs()) <= 1e-6
        signs = strengths.sign().unsqueeze(1)
        assert relative(found.left[i], signs * left.mT[:3]) <= 1e-6
        assert relative(found.right[i].flatten(1), signs * right[:3]) <= 1e-6
        assert relative(found.logits[i], found.left[i] @ model.head.weight.T) <= 1e-13
        assert relative(found.shares[i].sum(1), torch.ones(3, dtype=F64)) <= 1e-13
    assert not found.right[:, :, found.position + 1 :].any()
    full = singular_directions(model, IDS, 8, position=position)  # all of them: W e
    with torch.no_grad():
        states = linearize(model, IDS, lambda logits: logits[:, position])
    assert relative(torch.einsum("nk,nkv->nv", full.strengths, full.logits), states.matvec(states.x)) <= 1e-12


def test_the_table_of_directions():
    found = singular_directions(with_biases(), IDS, 2, tokenizer=TEXT)
    table = found.to_pandas(3)
    assert list(table.columns) == ["sample", "direction", "value", "strength", "raises", "lowers", "reads"]
    assert len(table) == 4 and table["sample"].tolist() == [0, 0, 1, 1]
    for (_, row), logits in zip(table.iterrows(), found.logits.flatten(0, 1), strict=True):
        order = logits.argsort(descending=True).tolist()
        assert [word for word, _ in row["raises"]] == [TEXT(j) for j in order[:3]]
        assert [word for word, _ in row["lowers"]] == [TEXT(j) for j in order[:-4:-1]]
        assert row["reads"][0][0] == TEXT(int(IDS[row["sample"], -1])) and row["reads"][0][1] > 0.5
    assert len(str(found).splitlines()) == 6
    with pytest.raises(ValueError, match="k: got 0, want at least 1"):
        found.to_pandas(0)


class Scaled(LanguageModel):
    """Logits in an object, as transformers returns them, behind a cap, as Gemma 2 has it."""

    def forward(self, ids):
        return SimpleNamespace(logits=3 * torch.tanh(super().forward(ids) / 3))


def test_the_unembedding_is_found_or_named():
    torch.manual_seed(1)
    model, plain = Scaled().double().eval(), with_biases()
    with pytest.raises(
        ValueError, match="unembedding: got None, but no layer returns the model's logits; want the path"
    ):
        singular_directions(model, IDS)
    found = singular_directions(model, IDS, 2, unembedding="head")
    assert relative(found.logits, singular_directions(plain, IDS, 2).logits) <= 1e-13
    assert token_contributions(model, IDS, 2).check() <= 1e-13
    model.get_output_embeddings = lambda: model.head
    assert torch.equal(singular_directions(model, IDS, 2).logits, found.logits)
    with pytest.raises(ValueError, match="unembedding: got 'heads', want the path of a layer"):
        singular_directions(model, IDS, unembedding="heads")
    curved = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 5))).eval()
    with pytest.raises(ValueError, match="unembedding: got a layer Sequential that is not affine"):
        singular_directions(curved, IDS % 5, 1, unembedding="2")
    with pytest.raises(ValueError, match="unembedding: the model does not call this layer with a tensor"):
        singular_directions(model, IDS, unembedding="blocks.0")
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.modules())


class Decodes:
    def decode(self, ids):
        return "-".join(map(str, ids)) + "!"


def test_bad_arguments():
    model = with_biases()
    assert token_contributions(model, IDS, 1, tokenizer=Decodes()).names == ("1!", "1!")
    for explain in (token_contributions, singular_directions):
        for ids, arguments, error, text in (
            (IDS.double(), {}, TypeError, r"ids: got torch.float64, want a tensor of token ids \(n, t\)"),
            (IDS.tolist(), {}, TypeError, "ids: got list, want a tensor"),
            (IDS[0], {}, ValueError, r"ids: got shape \(5,\), want \(n, t\)"),
            (IDS, {"position": 5}, ValueError, "position: got 5, want an index of 5 tokens"),
            (IDS, {"tokenizer": 3}, TypeError, "tokenizer: got int, want an object with `decode`"),
            (IDS, {"held": "both"}, ValueError, "held: got 'both'"),
        ):
            with pytest.raises(error, match=text):
                explain(model, ids, **arguments)
        with pytest.raises(TypeError, match="model: got function, want an nn"):
            explain(lambda ids: ids, IDS)
        flat = nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(20, 3)).eval()
        with pytest.raises(
            ValueError, match=r"model: returned logits of shape \(2, 3\), want \(2, 5\) and a vocabulary"
        ):
            explain(flat, IDS)
        pair = nn.Sequential(nn.Embedding(11, 4), nn.LSTM(4, 4)).eval()
        with pytest.raises(
            TypeError, match="model: returned tuple, want a tensor of logits, or an object with `logits`"
        ):
            explain(pair, IDS)
    for logit, error, text in (
        (11, ValueError, "logit: got 11, want indices from 0 to 10"),
        (True, TypeError, "logit: got bool"),
        (torch.tensor([1, 2, 3]), ValueError, r"logit: got torch.int64 of shape \(3,\), want int64 of shape \(2,\)"),
        (torch.tensor([1.0, 2]), ValueError, "logit: got torch.float32"),
    ):
        with pytest.raises(error, match=text):
            token_contributions(model, IDS, logit)
    with pytest.raises(ValueError, match="k: got 9, want between 1 and 8"):
        singular_directions(model, IDS, 9)


class Hidden(torch.autograd.Function):
    """x ↦ 2 x, whose backward autograd does not see."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, u):
        return 2 * u.detach()

    @staticmethod
    def jvp(ctx, v):
        return 2 * v


class Once(Hidden):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, u):
        return 2 * u


def partly_hidden(x):
    return x / 2 + 3 * Hidden.apply(x) / 4


def test_products_use_forward_mode_where_autograd_does_not_differentiate_twice():
    x, v, u = torch.randn(2, 4, dtype=F64), torch.randn(3, 2, 4, dtype=F64), torch.randn(3, 2, 4, dtype=F64)
    for function, double in (
        (lambda x: 2 * x, True),
        (Hidden.apply, False),
        (Once.apply, False),
        (partly_hidden, False),
    ):
        operator = JacobianOperator(function, (x,), x, affine=True, check=lambda: None)
        push, pull = operator.products()
        assert (push != operator.columns) == double
        assert relative(push((v,)) if double else push((v[:1],)), 2 * (v if double else v[:1])) <= 1e-15
        assert relative(pull(u[:1])[0], 2 * u[:1]) <= 1e-15
