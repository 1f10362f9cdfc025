"""The loop of all experiments: the loss that it minimises, its limits, and that a resumed training goes on exactly."""

import itertools
import time

import pytest
import torch
from torch import nn

from benchmarks.experiments import training
from benchmarks.experiments.training import Recipe
from benchmarks.records import environment

X, Y = torch.randn(45, 6, generator=torch.Generator().manual_seed(1)), torch.arange(45) % 3


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def fit(model, epochs=5, batch=10, rate=1e-2, **named):
    return training.train(model, X, Y, Recipe(epochs, batch, rate), label="mlp", **named).history


def measured(model):
    assert not model.training
    return {"accuracy": training.accuracy(model, X, Y)}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_it_is_adam_on_shuffled_batches_of_what_requires_gradients():
    ours, plain = network(), network()
    for model in (ours, plain):
        model[0].requires_grad_(False)
    history = fit(ours, seed=3)
    torch.manual_seed(7), network()  # the generator of dropout is where it was
    adam, order = torch.optim.Adam(list(plain.parameters())[2:], 1e-2, fused=True), torch.Generator().manual_seed(3)
    losses = []
    for _ in range(5):
        values = []
        for index in torch.randperm(45, generator=order).split(10):
            adam.zero_grad()
            value = nn.functional.cross_entropy(plain(X[index]), Y[index])
            value.backward()
            adam.step()
            values.append(value.item() * len(index))
        losses.append(sum(values) / 45)
    assert same(ours, plain) and torch.equal(ours[0].weight, network()[0].weight) and not ours.training
    assert history["loss"] == pytest.approx(losses, rel=1e-6) and len(history["seconds"]) == 5


def test_without_shuffle_the_batches_are_in_the_samples_order():
    seen = []

    def loss(model, x, y):
        seen.append(x)
        return training.cross_entropy(model, x, y)

    training.train(network(), X, Y, Recipe(2, 20, 1e-2, shuffle=False), label="mlp", loss=loss)
    assert torch.equal(torch.cat(seen), torch.cat((X, X)))


def test_the_learning_rate_decays_to_nothing_also_where_it_is_resumed(tmp_path):
    def decayed(model, epochs, **named):
        return training.train(model, X, Y, Recipe(epochs, 10, 1e-2, decay=True), label="mlp", **named)

    decayed(whole := network(), 3)
    decayed(network(), 3, seconds=0, checkpoint=tmp_path / "run.pt")  # one epoch
    with pytest.raises(ValueError, match="'decayed_over_epochs': 3"):
        decayed(network(), 4, checkpoint=tmp_path / "run.pt")
    decayed(cut := network(), 3, checkpoint=tmp_path / "run.pt")
    plain = network()
    adam, order = torch.optim.Adam(plain.parameters(), 1e-2, fused=True), torch.Generator().manual_seed(0)
    rate = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, 15)
    for index in (part for _ in range(3) for part in torch.randperm(45, generator=order).split(10)):
        adam.zero_grad()
        nn.functional.cross_entropy(plain(X[index]), Y[index]).backward()
        adam.step()
        rate.step()
    assert same(whole, cut)
    for ours, theirs in zip(whole.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_resumed_training_goes_on_exactly(tmp_path, cut):
    whole, file = network(), tmp_path / "folder" / "run.pt"
    wanted = fit(whole, seed=2, measure=measured)
    if cut:
        torch.manual_seed(0)
        fit(network(), epochs=cut, seed=2, measure=measured, checkpoint=file)
    resumed = network()
    torch.manual_seed(7), network()
    if cut:  # neither the initial weights nor the generators matter any more
        nn.init.zeros_(resumed[0].weight)
        torch.manual_seed(99)
    found = fit(resumed, seed=2, measure=measured, checkpoint=file)
    assert same(whole, resumed) and all(found[name] == wanted[name] for name in ("loss", "accuracy"))
    assert [path.name for path in file.parent.iterdir()] == ["run.pt"]
    again = network()
    assert fit(again, seed=2, checkpoint=file) == found and same(again, whole)  # nothing is left to do


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 9}, r"another training, \{'batch': 10\} instead of \{'batch': 9\}"),
        ({"seed": 1}, r"another training, \{'seed': 0\} instead of"),
        ({"settings": {}}, r"another training, \{'test_images': 8\} instead of \{'test_images': None\}"),
        ({"epochs": 1}, "after 2 epochs, more than the 1 asked for"),
        (b"something else", r"run\.pt: not a whole checkpoint"),
        (1000, r"run\.pt: not a whole checkpoint"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, change, message):
    file = tmp_path / "run.pt"
    given = {"epochs": 2, "settings": {"test_images": 8}, "checkpoint": file}
    fit(network(), **given)
    if not isinstance(change, dict):
        file.write_bytes(change if isinstance(change, bytes) else file.read_bytes()[:change])
        change = {}
    with pytest.raises(ValueError, match=message):
        fit(network(), **{**given, **change})


def test_a_record_says_where_epochs_were_made(tmp_path, monkeypatch):
    def trained(epochs, commit):
        here = {"git_sha": commit, "device": "a device"}
        monkeypatch.setattr(environment, "facts", lambda device: {"utc": "now", **here})
        named = {"label": "mlp", "checkpoint": file, "settings": {"test_images": 8} if epochs > 1 else None}
        return training.train(network(), X, Y, Recipe(epochs, 10, 1e-2), **named).made

    file = tmp_path / "run.pt"
    for epochs, commit in ((1, "first"), (3, "first"), (4, "second"), (4, "third")):  # the first lacks settings
        made = trained(epochs, commit)
    rest = {"device": "a device"}
    assert made == [{"epochs": 3, "git_sha": "first", **rest}, {"epochs": 1, "git_sha": "second", **rest}]


def test_a_limit_of_time_stops_between_epochs(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    assert len(fit(network(), epochs=50, seconds=0)["loss"]) == 1  # the first is always there
    # An epoch reads the clock three times, so that it takes 3 from its begin to the next one's.
    assert 4 <= len(fit(network(), epochs=50, seconds=20)["loss"]) <= 7
    assert len(fit(network(), epochs=4, seconds=1e9)["loss"]) == 4


def test_errors_name_the_training():
    with pytest.raises(ValueError, match="batch: got 0, want at least 1"):
        fit(network(), batch=0)
    with pytest.raises(FloatingPointError, match="mlp: the loss is nan in epoch 1"):
        fit(network(), loss=lambda net, x, y: net(x).mean() * float("nan"))
