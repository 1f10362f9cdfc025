"""Trainers of other packages on converted models: trained, saved, resumed with the same bits, folded and exported."""

import functools

import pytest
import torch
from convertible import error
from torch import nn
from torchvision_names import make_torchvision_importable

from interp_nn.convert import fold, summarize
from interp_nn.nn import SummaryLinear, follow

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of packages that are not ours
STEPS, HALF = 4, 2
KINDS = ["head", "whole"]  # a summary head, and newton-schulz in every layer with `follow`
by_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True, scope="module")
def torchvision():
    make_torchvision_importable()


def convert(model, kind, head):
    report = summarize(model, select=head) if kind == "head" else summarize(model, polynomial="newton-schulz")
    assert len(report.converted) == 1 if kind == "head" else len(report.converted) > 1
    return model


def check(start, whole, resumed, call):
    """Check that both ways to train end with the same bits, far from the start; and the folded and exported model."""
    states = [model.state_dict() for model in (start, whole, resumed)]
    for name, value in states[1].items():
        assert torch.equal(value, states[2][name]), name
        assert not name.endswith((".b", ".scale", ".gain")) or not torch.equal(value, states[0][name]), name
    for layer in whole.modules():
        if getattr(layer, "normalize", False):
            assert abs(float(layer.spectrum()[0] * layer.scale) - 1) < 2e-2
    with torch.no_grad():
        wanted = call(whole.eval())
        assert not fold(whole).skipped and not any(isinstance(m, SummaryLinear) for m in whole.modules())
        assert error(call(whole), wanted) <= 1e-4
    return wanted


def exports(model, wanted, *args, output=lambda y: y, **named):
    exported = torch.export.export(model.eval(), args, named).module()
    assert error(output(exported(*args, **named)), wanted) <= 1e-4


# transformers

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS = torch.arange(48).view(8, 6) % 50


def bert(transformers):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **SMALL))
    return model, "classifier", {"input_ids": TOKENS, "labels": torch.arange(8) % 2}


class Wrapped(nn.Module):
    """A module that is no model of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels=None):
        return self.model(pixel_values, labels=labels)


def vit(transformers):
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SMALL)
    images = torch.linspace(-1, 1, 8 * 3 * 16 * 16).sin().view(8, 3, 16, 16)
    # The Trainer of transformers 5.24 saves a ViT by other names than it loads, so a plain ViT does not resume there either.
    model = Wrapped(transformers.ViTForImageClassification(config))
    return model, "model.classifier", {"pixel_values": images, "labels": torch.arange(8) % 2}


def llama(transformers):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **SMALL))
    return model, "lm_head", {"input_ids": TOKENS, "labels": TOKENS}


@by_kind
@pytest.mark.parametrize("build", [bert, vit, llama])
def test_the_trainer_of_transformers(build, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Follow(transformers.TrainerCallback):
        def on_train_begin(self, *_, model, optimizer, **__):
            follow(optimizer, model)

    def start():
        torch.manual_seed(0)
        model, head, data = build(transformers)
        return convert(model, kind, head), data

    def trained(folder, **options):
        model, data = start()
        rows = [{name: t[i] for name, t in data.items()} for i in range(8)]
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=STEPS, per_device_train_batch_size=4, save_steps=HALF, use_cpu=True, report_to="none",
            disable_tqdm=True, logging_strategy="no", learning_rate=1e-2,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Follow()])
        trainer.train(**options)
        return model

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{HALF}"))
    model, data = start()
    given = {name: t for name, t in data.items() if name != "labels"}
    wanted = check(model, whole, resumed, lambda m: m(**given).logits)
    exports(whole, wanted, output=lambda y: y.logits, **given)


# A plain network for the others


def network(kind):
    torch.manual_seed(0)
    return convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3)), kind, "3")


X, Y = torch.linspace(-2, 2, 16 * 6).sin().view(16, 6), torch.arange(16) % 3
batches = functools.partial(
    torch.utils.data.DataLoader, torch.utils.data.TensorDataset(X, Y), batch_size=4
)  # four of them: STEPS


@by_kind
@pytest.mark.parametrize("followed", ["before prepare", "after prepare"])
def test_accelerate(kind, followed, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def trained(first, last, load=None, save=None):
        accelerator, model = accelerate.Accelerator(cpu=True), network(kind)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        if followed == "before prepare":
            follow(optimizer, model)
        model, optimizer, loader = accelerator.prepare(model, optimizer, batches())
        if followed == "after prepare":
            follow(optimizer, model)
        rows = list(loader)  # which draws a number
        torch.manual_seed(1)
        if load:
            accelerator.load_state(load)
        for x, y in rows[first:last]:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
        if save:
            accelerator.save_state(save)
        return accelerator.unwrap_model(model)

    whole = trained(0, STEPS)
    trained(0, HALF, save=str(tmp_path))
    resumed = trained(HALF, STEPS, load=str(tmp_path))
    wanted = check(network(kind), whole, resumed, lambda m: m(X))
    exports(whole, wanted, X)


@by_kind
def test_lightning(kind, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network(kind)

        def training_step(self, batch, index):
            torch.manual_seed(100 * self.current_epoch + index)  # Lightning does not restore the state of generators
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
            follow(optimizer, self)
            return optimizer

    def trained(epochs, load=None, save=None):
        module = Module()
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, batches(), ckpt_path=load)
        if save:
            trainer.save_checkpoint(save)
        return module.model

    whole = trained(2)
    trained(1, save=tmp_path / "half.ckpt")
    resumed = trained(2, load=tmp_path / "half.ckpt")
    wanted = check(network(kind), whole, resumed, lambda m: m(X))
    exports(whole, wanted, X)


@by_kind
def test_skorch(kind, tmp_path):
    skorch = pytest.importorskip("skorch")

    class Follow(skorch.callbacks.Callback):
        def on_train_begin(self, net, **_):
            self.handle = follow(net.optimizer_, net.module_)

        def on_train_end(self, net, **_):
            self.handle.remove()

    def net():
        return skorch.NeuralNetClassifier(
            network(kind), criterion=nn.CrossEntropyLoss, optimizer=torch.optim.AdamW, lr=1e-2, batch_size=4,
            train_split=None, verbose=0, callbacks=[Follow()],
        ).initialize()  # fmt: skip

    def fitted(net, seed):
        torch.manual_seed(seed)
        return net.partial_fit(X.numpy(), Y.numpy())

    whole = fitted(fitted(net(), 1), 2)
    files = {f"f_{part}": str(tmp_path / part) for part in ("params", "optimizer", "history")}
    fitted(net(), 1).save_params(**files)
    resumed = net()
    resumed.load_params(**files)
    fitted(resumed, 2)
    probabilities = torch.from_numpy(whole.predict_proba(X.numpy()))
    wanted = check(network(kind), whole.module_, resumed.module_, lambda m: m(X))
    assert error(wanted.softmax(-1), probabilities) <= 1e-5
    exports(whole.module_, wanted, X)
