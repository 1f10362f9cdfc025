"""Models of transformers, small ones of random weights: W e + b is the model, with constants found at zero."""

import pytest
import torch
from torch import nn
from torchvision_names import make_torchvision_importable

from interp_nn.explain import frozen, linearize, singular_directions, supported_ops, token_contributions

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of packages that are not ours

IDS = torch.tensor([[5, 7, 11, 3, 9], [4, 6, 8, 10, 12]])
SPECIAL = {"vocab_size": 37, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SPECIAL, **SMALL, "num_key_value_heads": 2, "max_position_embeddings": 32}
MODELS = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 4}),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", {**DECODER, "head_dim": 4}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 4, "sliding_window": 3}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "head_dim": 4, "sliding_window": 3}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 3}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {**SPECIAL, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "BERT": ("BertForSequenceClassification", "BertConfig", {"vocab_size": 37, **SMALL}),
    "ViT": ("ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 16, "patch_size": 8, "num_labels": 5}),
    "Mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {**SPECIAL, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    ),
}
EAGER_ONLY = ("Gemma 2", "Mamba")


@pytest.fixture(autouse=True, scope="module")
def _torchvision():
    make_torchvision_importable()


def model_of(name, attention):
    transformers = pytest.importorskip("transformers")
    kind, config, given = MODELS[name]
    chosen = {} if name == "Mamba" else {"attn_implementation": attention}
    model = getattr(transformers, kind)(getattr(transformers, config)(**given, **chosen)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.3 if parameter.dim() == 1 else 0, 0.3)
    return model, torch.randn(2, 3, 16, 16, dtype=torch.float64) if name == "ViT" else IDS


def without_single_precision(model, name):
    """RMS norms of transformers compute in single precision whatever the dtype of the model; here in the model's."""

    def normed(module):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", 0.0))
        shift = 1.0 if name.startswith("Gemma") else 0.0
        return lambda x: (module.weight + shift) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = normed(module)


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, how) for name in MODELS for how in ("eager", "sdpa") if how == "eager" or name not in EAGER_ONLY],
)
def test_models_of_transformers(name, attention):
    model, x = model_of(name, attention)
    assert supported_ops(model, x).supported
    for bound in (1e-6, 1e-12)[: 1 if name == "Mamba" else 2]:  # its state is in single precision
        affine = linearize(model, x, lambda output: output.logits)
        bias = frozen(model, x)(torch.zeros_like(affine.x)).logits
        with torch.no_grad():
            wanted = model(x).logits
        rows = affine.weight.flatten(wanted.dim()).to(wanted.dtype)
        got = torch.einsum("n...d,nd->n...", rows, affine.x.flatten(1).to(wanted.dtype)) + bias
        assert float((got - wanted).abs().max() / wanted.abs().max()) <= bound and affine.check() <= bound
        parts = affine.bias_by_layer()
        assert not parts or float((sum(parts.values()) - affine.bias).abs().max()) <= bound * float(wanted.abs().max())
        without_single_precision(model, name)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("BERT", "ViT")])
def test_contributions_and_directions_of_models_of_transformers(name):
    model, ids = model_of(name, "eager")
    found = token_contributions(model, ids, 5)
    assert found.check() <= 1e-6 and len(found.to_pandas(3)) >= 8
    directions = singular_directions(model, ids, 2)  # Gemma 2 caps its logits; Mamba's are in single precision
    states = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    affine = linearize(model, ids, lambda output: states.pop()[:, -1])
    assert torch.allclose(directions.values, affine.svd(2).values, rtol=1e-5)
    handle.remove()
