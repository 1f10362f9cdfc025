"""Twenty models of torchvision, timm and transformers, of random weights: converted, traced, trained, folded, exported."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from convertible import error
from torch import fx, nn
from torchvision_names import make_torchvision_importable

from interp_nn.convert import fold, summarize
from interp_nn.nn import SummaryConv2d, SummaryLinear, follow

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of packages that are not ours


@pytest.fixture(autouse=True, scope="module")
def _torchvision():
    make_torchvision_importable()


class Row(NamedTuple):
    """A model: how to build it, its inputs, the output to compare, whether torch.fx traces it, why layers stay plain."""

    build: Callable[..., nn.Module]
    inputs: dict[str, torch.Tensor]
    output: Callable[[Any], torch.Tensor] = lambda y: y
    fx: bool = True
    skipped: tuple[str, ...] = ()


IMAGES = torch.randn(2, 3, 64, 64, dtype=torch.float64)
TOKENS = {"input_ids": torch.arange(12).view(2, 6)}
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SEGFORMER = {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 1, 2, 2], "depths": [1] * 4}
WAV2VEC = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
CLIP = {
    k: {**SMALL, "num_hidden_layers": 1, "image_size": 64, "patch_size": 16} for k in ("text_config", "vision_config")
}
SUBCLASS = "a subclass of Linear, which may compute something else"
OTHER = "neither Linear nor Conv2d"


def tied(name):
    return f"its weight is tied to {name}.word_embeddings.weight"


def vision(name, argument="x", output=lambda y: y, **options):
    """Return the row of a model of torchvision, by a function or class of torchvision.models."""

    def build():
        models = pytest.importorskip("torchvision.models")
        return getattr(models if hasattr(models, name) else models.segmentation, name)(**options)

    return Row(build, {argument: IMAGES}, output)


def timm(name, size=64, fx=True, skipped=(), **options):
    def build():
        return pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=10, **options)

    return Row(build, {"x": torch.randn(2, 3, size, size, dtype=torch.float64)}, fx=fx, skipped=skipped)


def transformers(name, config, inputs, skipped=(), output="logits", **options):
    """Return the row of a model of transformers. None of these is traced by torch.fx, with or without summary layers."""

    def build():
        package = pytest.importorskip("transformers")
        return getattr(package, name)(getattr(package, config)(**options))

    return Row(build, inputs, lambda y: getattr(y, output), fx=False, skipped=skipped)


MODELS = {
    "DenseNet": vision("DenseNet", growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16, num_classes=10),
    "ShuffleNet": vision("shufflenet_v2_x0_5", num_classes=10),
    "SqueezeNet": vision("squeezenet1_1", num_classes=10),
    "MNASNet": vision("mnasnet0_5", num_classes=10),
    "RegNet": vision("regnet_y_400mf", num_classes=10),
    "EfficientNet": vision("efficientnet_b0", num_classes=10),
    "MaxViT": vision("MaxVit", input_size=(64, 64), stem_channels=16, partition_size=4, block_channels=[16, 32],
                     block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.0, num_classes=10),
    "LR-ASPP": vision("lraspp_mobilenet_v3_large", "input", lambda y: y["out"], weights_backbone=None, num_classes=5),
    "EdgeNeXt": timm("edgenext_xx_small"),
    "MobileViT": timm("mobilevit_xxs", fx=False),
    "LeViT": timm("levit_128s", size=224),
    "EVA-02": timm("eva02_tiny_patch14_224", size=56, img_size=56, depth=2),
    "LCNet": timm("lcnet_050", skipped=(SUBCLASS,)),
    "ALBERT": transformers("AlbertForMaskedLM", "AlbertConfig", TOKENS, (OTHER, tied("albert.embeddings")),
                           **SMALL, embedding_size=16),
    "DeBERTa": transformers("DebertaV2ForMaskedLM", "DebertaV2Config", TOKENS, (OTHER, tied("deberta.embeddings")), **SMALL),
    "GPT-NeoX": transformers("GPTNeoXForCausalLM", "GPTNeoXConfig", TOKENS, (OTHER,), **SMALL, use_cache=False),
    "BART": transformers("BartForConditionalGeneration", "BartConfig", TOKENS,
                         (OTHER, "its weight is tied to model.shared.weight"), vocab_size=50, d_model=32, encoder_ffn_dim=64,
                         decoder_ffn_dim=64, use_cache=False, **BART),
    "SegFormer": transformers("SegformerForSemanticSegmentation", "SegformerConfig", {"pixel_values": IMAGES},
                              decoder_hidden_size=16, **SEGFORMER),
    "wav2vec 2.0": transformers("Wav2Vec2ForCTC", "Wav2Vec2Config",
                                {"input_values": torch.randn(2, 800, dtype=torch.float64)}, (OTHER,),
                                **SMALL, **WAV2VEC, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2),
    "CLIP": transformers("CLIPModel", "CLIPConfig", {**TOKENS, "pixel_values": IMAGES}, (OTHER,), "logits_per_image",
                         **CLIP, projection_dim=16),
}  # fmt: skip


def traced(model):
    """Return a copy's graph by torch.fx, or None if torch.fx cannot trace it. Some models cache tensors of the trace."""
    try:
        return fx.symbolic_trace(copy.deepcopy(model))
    except Exception:
        return None


@pytest.mark.parametrize("row", MODELS.values(), ids=MODELS)
def test_converted_traced_trained_folded_and_exported(row):
    model = row.build().double().eval()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)  # scales that start at zero would hide their branch

    @torch.no_grad()
    def output(model):
        return row.output(model(**row.inputs))

    def exported(model):
        return torch.export.export(model, (), row.inputs).module()

    before = output(model)
    assert before.norm() > 1e-3 and (traced(model) is not None) == row.fx
    for polynomial in ("summary", "newton-schulz"):
        fold(model)
        assert error(output(model), before) <= 1e-9
        report = summarize(model, polynomial=polynomial)
        assert {r.reason for r in report.skipped} == set(row.skipped)
        plain = {name for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
        assert report.converted and plain <= {r.name for r in report.skipped}
        assert error(output(model), before) <= 1e-9

    graph = traced(model) if row.fx else exported(model)
    assert error(output(graph), before) <= 1e-9

    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    follow(optimizer, model)
    row.output(model.train()(**row.inputs)).square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert all(m.b.grad.any() for m in model.modules() if isinstance(m, SummaryLinear | SummaryConv2d))
    optimizer.step()
    trained = output(model.eval())
    assert trained.isfinite().all() and error(trained, before) > 1e-9

    assert not fold(model).skipped and not any(isinstance(m, SummaryLinear | SummaryConv2d) for m in model.modules())
    assert error(output(model), trained) <= 1e-9
    assert error(output(exported(model)), trained) <= 1e-9
