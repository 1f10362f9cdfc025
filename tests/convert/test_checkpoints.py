"""States and checkpoints of plain models and of 0.1 loaded into summary layers, and a stand-in for a model of transformers."""

import json
from types import SimpleNamespace

import pytest
import torch
from relative_error import error, randomize
from torch import nn

from interp_nn.convert import from_pretrained, load_state_dict, save_pretrained, summarize
from interp_nn.nn import SummaryConv2d, SummaryHead, SummaryLinear
from interp_nn.nn.orthogonality import constrain

X = torch.linspace(-1, 1, 2 * 2 * 16, dtype=torch.float64).view(2, 2, 4, 4)


def plain_network():
    return randomize(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 9), nn.Linear(9, 16, bias=False)
        )
    ).double().eval()  # fmt: skip


def network():
    layers = SummaryConv2d(2, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Flatten(), SummaryLinear(24, 9)
    return nn.Sequential(*layers, SummaryLinear(9, 16, bias=False)).double().eval()


def test_the_state_of_a_plain_model():
    plain, model = plain_network(), network()
    state = plain.state_dict()
    keys = list(state)
    assert load_state_dict(model, state, source="linear") == ([], [])
    assert error(model(X), plain(X)) <= 1e-12 and list(state) == keys
    layer, given = model[3], plain[3]
    randomize(layer)
    load_state_dict(layer, given.state_dict(), source="linear")
    assert error(layer.weight, given.weight) <= 1e-12


def test_the_state_of_version_0_1():
    model, other = randomize(network()), network()
    old = {}
    for name, value in model.state_dict().items():  # as 0.1 names b, and transposes it in linear layers
        path, _, parameter = name.rpartition(".")
        transposed = parameter == "b" and value.dim() == 2
        old[f"{path}.weight" if parameter == "b" else name] = value.t() if transposed else value
    load_state_dict(other, old, source="summary-0.1")
    assert torch.equal(other(X), model(X))
    head, again = randomize(SummaryHead(6, 4, 3)), SummaryHead(6, 4, 3)
    load_state_dict(again, {"weight": head.b.t(), **head.output.state_dict(prefix="output.")}, source="summary-0.1")
    assert torch.equal(again.b, head.b) and again.b.is_contiguous()


def test_other_entries_are_loaded_as_by_pytorch():
    model, state = network(), network().state_dict() | {"more": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected.*more"):
        load_state_dict(model, state, source="linear")
    assert load_state_dict(model, state, source="linear", strict=False).unexpected_keys == ["more"]
    with pytest.raises(RuntimeError, match=r"size mismatch for 3\.b"):
        load_state_dict(model, plain_network().state_dict() | {"3.weight": torch.ones(4, 4)}, source="linear")


@pytest.mark.parametrize(
    ("model", "state", "options", "kind", "message"),
    [
        (network, {}, {"source": "plain"}, ValueError, "source: got 'plain', want 'linear' or 'summary-0.1'"),
        (dict, {}, {"source": "linear"}, TypeError, "model: got dict, want a torch.nn.Module"),
        (
            lambda: nn.Sequential(SummaryHead(4, 3, 2)),
            {"0.weight": torch.ones(3, 4)},
            {"source": "linear"},
            ValueError,
            "0.weight: belongs to a SummaryHead, which no plain layer's weight fits",
        ),
        (
            lambda: constrain(SummaryLinear(4, 3), "parametrization"),
            {"weight": torch.ones(3, 4)},
            {"source": "linear"},
            ValueError,
            "weight: belongs to a parametrized layer; load the state before `constrain`",
        ),
        (
            lambda: SummaryLinear(4, 3),
            {"weight": torch.full((3, 4), torch.nan)},
            {"source": "linear"},
            ValueError,
            "weight: is not finite",
        ),
    ],
)
def test_errors_name_the_argument_or_the_key(model, state, options, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        load_state_dict(model(), state, **options)


# A stand-in for a model of transformers, whose from_pretrained loads by names and says nothing


class Pretrained(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.body = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.body(x))

    def save_pretrained(self, directory, name="model.pt"):
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(vars(self.config)))
        torch.save(self.state_dict(), directory / name)

    @classmethod
    def from_pretrained(cls, directory, name="model.pt"):
        model = cls(SimpleNamespace(**json.loads((directory / "config.json").read_text())))
        model.load_state_dict(torch.load(directory / name), strict=False)
        return model


def test_a_pretrained_model_is_saved_and_converted_again(tmp_path):
    model, x = Pretrained(SimpleNamespace(size=6)).double(), torch.randn(3, 6).double()
    with pytest.raises(ValueError, match="model: has no summary layer; use its own save_pretrained"):
        save_pretrained(model, tmp_path / "plain")
    summarize(model, select=["body.0", "out"])
    before = model(x)
    save_pretrained(model, tmp_path / "saved", name="weights.pt")
    assert torch.equal(model(x), before) and vars(model.config) == {"size": 6}
    plain = Pretrained.from_pretrained(tmp_path / "saved", name="weights.pt").double()
    assert error(plain(x), before) <= 1e-6 and type(plain.out) is nn.Linear
    again = from_pretrained(Pretrained, tmp_path / "saved", name="weights.pt").double()
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert error(again(x), before) <= 1e-5 and error(again.out.b, model.out.b) <= 1e-5
    options = {"polynomial": "summary", "normalize": False, "gain": False}
    assert again.config.interp_nn == {"summary_layers": ["body.0", "out"], **options}


def test_a_pretrained_model_with_polynomials_is_converted_again(tmp_path):
    model, x = Pretrained(SimpleNamespace(size=6)).double(), torch.randn(3, 6).double()
    summarize(model, polynomial="pc-1")
    before = model(x)
    save_pretrained(model, tmp_path / "saved", name="weights.pt")
    again = from_pretrained(Pretrained, tmp_path / "saved", name="weights.pt").double()
    assert again.out.polynomial == "pc-1" and error(again(x), before) <= 1e-5
    model.out = SummaryLinear(model.out.in_features, model.out.out_features).double()
    with pytest.raises(ValueError, match="model: has summary layers with different polynomials"):
        save_pretrained(model, tmp_path / "mixed")


def test_what_is_not_saved_is_named(tmp_path):
    model = Pretrained(SimpleNamespace())
    model.out = SummaryHead(6, 4, 3)
    with pytest.raises(ValueError, match=r"model: out \(SummaryHead\) cannot be folded: neither SummaryLinear nor"):
        save_pretrained(model, tmp_path / "saved")
    for other in (nn.Linear(4, 3), 3):
        with pytest.raises(TypeError, match=f"model: got {type(other).__name__}, want a model of transformers"):
            save_pretrained(other, tmp_path / "saved")
    Pretrained(SimpleNamespace()).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"directory: .* was not saved by interp_nn.convert.save_pretrained"):
        from_pretrained(Pretrained, tmp_path / "plain")
