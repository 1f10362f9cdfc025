"""Small models of packages, of random weights: the same outputs converted and folded again, and what packages do to weights."""

from functools import partial

import pytest
import torch
from torch import nn
from torchvision_names import make_torchvision_importable

from interp_nn.convert import fold, from_pretrained, save_pretrained, summarize
from interp_nn.nn import SummaryConv2d, SummaryLinear

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of packages that are not ours


@pytest.fixture(autouse=True, scope="module")
def _torchvision():
    make_torchvision_importable()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


def is_kept(model, *inputs, skipped=(), output=lambda y: y, **named):
    """Check that both conversions keep the outputs and skip for these reasons; return the number of converted layers."""
    model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.1)  # heads that start at zero would keep any output
        before = output(model(*inputs, **named))
        plain = [type(m) for m in model.modules()]
        report = summarize(model)
        converted = output(model(*inputs, **named))
        assert {row.reason for row in report.skipped} == set(skipped) and report.error < 1e-7
        for name, module in model.named_modules():
            if type(module) in (nn.Linear, nn.Conv2d):
                assert name in {row.name for row in report.skipped}
        fold(model)
        folded = output(model(*inputs, **named))
    assert before.abs().max() > 1e-3 and [type(m) for m in model.modules()] == plain
    for after in (converted, folded):
        assert (after - before).norm() <= 1e-5 * before.norm()
    return len(report.converted)


SUBCLASS = "a subclass of Linear, which may compute something else"
OTHER = "neither Linear nor Conv2d"


# The ResNet is narrow: one of the usual width takes seconds of singular values and shows the same.
@pytest.mark.parametrize(
    ("build", "skipped", "count"),
    [
        (lambda models: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10), [], 13),
        (lambda models: models.mobilenet_v3_small(num_classes=10), [], 54),
        (lambda models: models.VisionTransformer(64, 16, 2, 2, 64, 128, num_classes=10), [SUBCLASS], 6),
        (
            lambda models: models.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=10),
            [],
            11,
        ),
    ],
    ids=["resnet", "mobilenet", "vit", "swin"],
)
def test_torchvision(images, build, skipped, count):
    models = pytest.importorskip("torchvision.models")
    assert is_kept(build(models), images, skipped=skipped) == count


def test_torchvisions_feature_extractor():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval(),
        torch.randn(2, 3, 6, 6),
    )
    for polynomial in ("summary", "newton-schulz"):
        summarize(model, polynomial=polynomial)
        features = extraction.create_feature_extractor(model, ["0", "3"])(x)
        assert torch.equal(features["0"], model[0](x)) and torch.equal(features["3"], model(x))
        fold(model)


@pytest.mark.parametrize(
    ("name", "options", "skipped", "count"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, [], 10),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, [], 17),
        ("beit_base_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 2},
         [], 10),
    ],
)  # fmt: skip
def test_timm(images, name, options, skipped, count):
    timm = pytest.importorskip("timm")
    assert (
        is_kept(timm.create_model(name, pretrained=False, num_classes=10, **options), images, skipped=skipped) == count
    )


@pytest.mark.parametrize("polynomial", ["summary", "newton-schulz"])
@pytest.mark.parametrize("name", ["mobileone_s0", "repvit_m0_9"])
def test_timm_reparameterizes_converted_layers(images, name, polynomial):
    """It reads their weights, and puts plain layers in the place of whole blocks."""
    model = pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    summarize(model, polynomial=polynomial)
    reparameterize = pytest.importorskip("timm.utils").reparameterize_model
    with torch.no_grad():
        before = model(images)
        fused = reparameterize(model)
        assert (fused(images) - before).norm() <= 1e-5 * before.norm()

    def left(m):
        return sum(type(layer) is SummaryConv2d for layer in m.modules())

    assert left(fused) < left(model) / 4


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TOKENS = torch.arange(12).view(2, 6)


def test_transformers_bert():
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **SMALL))
    assert is_kept(model, TOKENS, skipped=[OTHER], output=lambda y: y.logits) == 14


def test_transformers_bert_saved_and_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL)).eval()
    converted = [row.name for row in summarize(model, select="encoder.*").converted]
    save_pretrained(model, tmp_path)
    for load in (transformers.BertModel.from_pretrained, partial(from_pretrained, transformers.AutoModel)):
        loaded = load(tmp_path).eval()
        torch.testing.assert_close(loaded(TOKENS).pooler_output, model(TOKENS).pooler_output)
    assert [name for name, m in loaded.named_modules() if type(m) is SummaryLinear] == converted


READ_ONLY = r"^weight: is computed from b"


@pytest.mark.parametrize("polynomial", ["summary", "newton-schulz"])
def test_peft_before_and_after_the_conversion(polynomial):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    def bert():
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **SMALL)).eval()

    lora = peft.LoraConfig(target_modules=["query", "value"])
    converted = bert()
    summarize(converted, polynomial=polynomial)
    with pytest.raises(ValueError, match=r"Target module SummaryLinear\(.*is not supported.*`torch.nn.Linear`"):
        peft.get_peft_model(converted, lora)
    adapted = peft.get_peft_model(bert(), lora)
    before = adapted(TOKENS).logits
    if polynomial == "summary":
        with pytest.warns(RuntimeWarning, match=r"query.lora_B.default, .*: the weight is zero.* never train"):
            summarize(adapted, dry_run=True)
    summarize(adapted, select="*base_layer", polynomial=polynomial)
    torch.testing.assert_close(adapted(TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 8 and all("lora" in name for name in trained)  # no gain of a frozen layer
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        adapted(TOKENS, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    wanted = adapted(TOKENS).logits
    assert (wanted - before).norm() > 1e-3 * before.norm()
    with pytest.raises(ValueError, match=READ_ONLY):
        adapted.merge_and_unload()
    fold(adapted)
    torch.testing.assert_close(adapted.merge_and_unload()(TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_torchao_leaves_the_layers_or_is_refused_and_takes_folded_ones():
    quantization = pytest.importorskip("torchao.quantization")
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(4, 64)
    summarize(model)
    wanted, config = model(x), quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, config)
    assert torch.equal(model(x), wanted)
    with pytest.raises(ValueError, match=READ_ONLY):
        quantization.quantize_(model, config, filter_fn=lambda module, name: hasattr(module, "weight"))
    fold(model)
    quantization.quantize_(model, config)
    assert type(model[0].weight) is not nn.Parameter and (model(x) - wanted).norm() < 5e-2 * wanted.norm()
    assert all("sharded or quantized" in row.reason for row in summarize(model).skipped)


@pytest.mark.parametrize("polynomial", ["summary", "newton-schulz"])
def test_transformers_prunes_a_layer(polynomial):
    utilities = pytest.importorskip("transformers.pytorch_utils")
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    summarize(model, polynomial=polynomial)
    pruned = utilities.prune_linear_layer(model[0], torch.tensor([0, 2, 5]))
    assert type(pruned) is nn.Linear
    torch.testing.assert_close(pruned(x), model(x)[:, [0, 2, 5]])


def llama(transformers, tied, **options):
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=50, tie_word_embeddings=tied, **SMALL)
    ).eval()
    summarize(model, **options)
    return model


def test_transformers_resizes_and_ties_embeddings():
    transformers = pytest.importorskip("transformers")
    model = llama(transformers, tied=True)  # whose lm_head is tied, and stays plain
    before = model(TOKENS).logits
    model.resize_token_embeddings(60)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(TOKENS).logits[..., :50], before)
    model = llama(transformers, tied=False)
    with pytest.raises(TypeError, match=r"head is of type <class 'interp_nn.nn.linear.SummaryLinear'>, which is not"):
        model.resize_token_embeddings(60)
    model = llama(transformers, tied=False)
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match=READ_ONLY):
        model.tie_weights()
    model = llama(transformers, tied=False, select="model.*")
    before = model(TOKENS).logits
    model.resize_token_embeddings(60)
    torch.testing.assert_close(model(TOKENS).logits[..., :50], before)


@pytest.mark.parametrize("polynomial", ["summary", "newton-schulz"])
def test_transformers_names_what_it_does_not_load_of_a_model_saved_unfolded(polynomial, tmp_path):
    transformers = pytest.importorskip("transformers")
    llama(transformers, tied=False, polynomial=polynomial).save_pretrained(tmp_path)
    model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    layers = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    assert {f"{name}.weight" for name in layers} == set(info["missing_keys"])
    assert {f"{name}.b" for name in layers} <= set(info["unexpected_keys"])


def test_peft_merges_no_adapter_into_a_summary_layer():
    peft = pytest.importorskip("peft")
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["0"], init_lora_weights=False), nn.Sequential(nn.Linear(6, 5))
    )
    summarize(adapted, select="0.base_layer")
    for safe in (False, True):
        with pytest.raises(ValueError, match=r"^weight: is computed from b"):
            adapted[0].merge(safe_merge=safe)


def test_transformers_vit(images):
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=64, **SMALL))
    assert is_kept(model, images, output=lambda y: y.logits) == 14


def test_transformers_llama():
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **SMALL))
    assert is_kept(model, TOKENS, skipped=[OTHER], output=lambda y: y.logits) == 15


def test_transformers_gpt2_whose_layers_are_its_own():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    tied = "its weight is tied to transformer.wte.weight"
    assert is_kept(model, TOKENS, skipped=[OTHER, tied], output=lambda y: y.logits) == 0
    with pytest.raises(ValueError, match=r"cannot convert transformer.h.0.attn.c_attn: neither Linear nor Conv2d"):
        summarize(model, select="transformer.h.0.attn.c_attn")


def test_transformers_t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=32, num_layers=1, d_ff=64, num_heads=2, d_kv=16, vocab_size=50)
    model = transformers.T5ForConditionalGeneration(config)
    tied = "its weight is tied to shared.weight"
    kept = is_kept(model, TOKENS, skipped=[OTHER, tied], output=lambda y: y.logits, decoder_input_ids=TOKENS)
    assert kept == 16
