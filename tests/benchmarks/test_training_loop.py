"""The loop of all experiments: what it minimises, when it stops, and that what is resumed goes on exactly."""

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


def test_it_is_adam_on_shuffled_batches():
    ours, plain = network(), network()
    history = fit(ours, seed=3)
    torch.manual_seed(7), network()  # the generator of dropout is where it was
    adam, order = torch.optim.Adam(plain.parameters(), 1e-2), torch.Generator().manual_seed(3)
    losses = []
    for _ in range(5):
        batches = torch.randperm(45, generator=order).split(10)
        values = []
        for index in batches:
            adam.zero_grad()
            value = nn.functional.cross_entropy(plain(X[index]), Y[index])
            value.backward()
            adam.step()
            values.append(value.item() * len(index))
        losses.append(sum(values) / 45)
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert history["loss"] == pytest.approx(losses, rel=1e-6)
    assert len(history["seconds"]) == 5 and min(history["seconds"]) > 0 and not ours.training


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_what_is_resumed_goes_on_exactly(tmp_path, cut):
    whole, file = network(), tmp_path / "folder" / "run.pt"
    wanted = fit(whole, seed=2, measure=measured)
    if cut:
        torch.manual_seed(0)
        part = network()
        fit(part, epochs=cut, seed=2, measure=measured, checkpoint=file)
    resumed = network()
    torch.manual_seed(7), network()
    if cut:  # neither the initial weights nor the generators matter any more
        nn.init.zeros_(resumed[0].weight)
        torch.manual_seed(99)
    found = fit(resumed, seed=2, measure=measured, checkpoint=file)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for name in ("loss", "accuracy"):
        assert found[name] == wanted[name]
    assert [path.name for path in file.parent.iterdir()] == ["run.pt"]
    again = network()
    assert fit(again, seed=2, checkpoint=file) == found  # nothing is left to do
    assert torch.equal(again[0].weight, whole[0].weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 9}, r"another training, \{'batch': 10\} instead of \{'batch': 9\}"),
        ({"seed": 1}, r"another training, \{'seed': 0\} instead of"),
        ({"settings": {"test_images": 9}}, r"another training, \{'test_images': 8\} instead of \{'test_images': 9\}"),
        ({"settings": {}}, r"another training, \{'test_images': 8\} instead of \{'test_images': None\}"),
        ({"epochs": 1}, "after 2 epochs, more than the 1 asked for"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, change, message):
    file = tmp_path / "run.pt"
    same = {"epochs": 2, "settings": {"test_images": 8}, "checkpoint": file}
    fit(network(), **same)
    with pytest.raises(ValueError, match=message):
        fit(network(), **{**same, **change})


def test_a_checkpoint_that_lacks_settings_is_resumed(tmp_path):
    file = tmp_path / "run.pt"
    fit(network(), epochs=1, checkpoint=file)
    assert len(fit(network(), epochs=2, settings={"test_images": 8}, checkpoint=file)["loss"]) == 2


def test_it_is_known_where_epochs_were_made(tmp_path, monkeypatch):
    def trained(epochs, commit=None, **named):
        if commit is not None:
            here = {"git_sha": commit, "device": "a device", "versions": {"torch": "2"}}
            monkeypatch.setattr(environment, "environment", lambda device: {"utc": "now", **here})
        return training.train(network(), X, Y, Recipe(epochs, 10, 1e-2), label="mlp", **named).made

    real = environment.facts("cpu")
    assert trained(2) == [{"epochs": 2, **{key: value for key, value in real.items() if key != "utc"}}]
    file = tmp_path / "run.pt"
    rest = {"device": "a device", "versions": {"torch": "2"}}
    for epochs, commit in ((1, "first"), (3, "first"), (4, "second"), (4, "third")):
        made = trained(epochs, commit, checkpoint=file)
    assert made == [{"epochs": 3, "git_sha": "first", **rest}, {"epochs": 1, "git_sha": "second", **rest}]

    kept = torch.load(file, weights_only=True)
    del kept["made"]  # as checkpoints were before it was kept
    torch.save(kept, file)
    unknown = {"epochs": 4, "git_sha": None, "device": None, "versions": None}
    assert trained(5, "first", checkpoint=file) == [unknown, {"epochs": 1, "git_sha": "first", **rest}]


def test_a_damaged_checkpoint_is_named(tmp_path):
    file = tmp_path / "run.pt"
    fit(network(), epochs=1, checkpoint=file)
    for damaged in (b"", b"something else", file.read_bytes()[:1000]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"run\.pt: not a whole checkpoint"):
            fit(network(), checkpoint=file)


def test_a_limit_of_time_stops_between_epochs(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    assert len(fit(network(), epochs=50, seconds=0)["loss"]) == 1  # the first is always there
    # An epoch reads the clock three times, so that it takes 3 from its begin to the next one's.
    reached = len(fit(network(), epochs=50, seconds=20)["loss"])
    assert 4 <= reached <= 7
    assert len(fit(network(), epochs=4, seconds=1e9)["loss"]) == 4


def test_minutes_are_shared_by_the_trainings_that_are_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    allowance = training.Allowance(1.0, 3)
    assert allowance.seconds() == pytest.approx(20)
    now[0] += 10  # less than its share, so the others have more
    assert allowance.seconds() == pytest.approx(25)
    now[0] += 60
    assert allowance.seconds() == 0
    assert training.Allowance(None, 2).seconds() is None


def test_only_what_requires_gradients_is_trained():
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone(), model[4].weight.clone()
    fit(model, epochs=1)
    assert torch.equal(model[0].weight, before[0]) and not torch.equal(model[4].weight, before[1])


def test_another_loss_and_one_output():
    model = nn.Linear(6, 1)
    labels = (X[:, 0] > 0).float()
    history = training.train(
        model, X, labels, Recipe(60, 15, 0.1), label="sign",
        loss=lambda net, x, y: nn.functional.binary_cross_entropy_with_logits(net(x)[:, 0], y),
        measure=lambda net: {"accuracy": training.accuracy(net, X, labels, batch=7)},
    ).history  # fmt: skip
    assert history["loss"][-1] < 0.2 * history["loss"][0] and history["accuracy"][-1] > 0.95


def test_accuracy_counts_by_the_largest_output():
    assert training.accuracy(nn.Identity(), torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 0]), batch=3) == 0.75


def test_what_goes_wrong_is_named():
    with pytest.raises(ValueError, match="batch: got 0, want at least 1"):
        fit(network(), batch=0)
    with pytest.raises(FloatingPointError, match="mlp: the loss is nan in epoch 1"):
        fit(network(), loss=lambda net, x, y: net(x).mean() * float("nan"))
