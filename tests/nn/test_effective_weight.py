"""`weight` of a summary layer: the effective weight, to be read and differentiated, and not to be written."""

import copy
import io
import pickle

import pytest
import torch
from layers import CONVOLUTIONS, SIZES, make
from relative_error import error, naive_kernel
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from interp_nn.nn import SummaryClassifier, SummaryConv2d, SummaryHead, SummaryLayer, SummaryLinear
from interp_nn.nn.orthogonality import constrain

by_kind = pytest.mark.parametrize("kind", [*SIZES, *CONVOLUTIONS])
REFUSED = r"^weight: is computed from b .*set_weight_.*reset_parameters.*fold"


# Reading


@by_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_weight_is_that_of_the_plain_layer(kind, dtype):
    layer = make(kind, dtype)[0]
    plain = layer.fold()
    assert layer.weight.shape == plain.weight.shape and layer.weight.is_contiguous()
    assert layer.weight.dtype == dtype and isinstance(layer.weight, torch.Tensor)
    assert error(layer.weight, plain.weight) <= 4 * torch.finfo(dtype).eps
    assert "weight" not in layer.state_dict() and "weight" not in dict(layer.named_parameters())


@by_kind
def test_the_weight_is_differentiable(kind):
    layer, _ = make(kind)
    upstream = torch.randn_like(layer.weight)
    (got,) = torch.autograd.grad(layer.weight, layer.b, upstream)
    assert error(got, torch.autograd.grad(naive_kernel(layer.b, layer.groups), layer.b, upstream)[0]) <= 1e-12
    layer.weight.square().sum().backward()  # a penalty on the weight
    assert layer.b.grad.any()
    layer.b.requires_grad_(False)
    assert not layer.weight.requires_grad


def test_pairs_have_the_summarys_weight():
    x = torch.randn(5, 6, dtype=torch.float64)
    for layer in (SummaryLayer(6, 4), SummaryClassifier(6, 4)):
        layer.double()
        nn.init.normal_(layer.b)
        assert error(F.linear(x, layer.weight), layer(x).summary) <= 1e-12
    assert SummaryHead(6, 4, 3).weight.shape == (4, 6)


def test_results_are_plain_tensors():
    weight = SummaryLinear(4, 3).weight
    for result in (
        2 * weight,
        weight.clone(),
        weight.float().double(),
        F.linear(torch.ones(2, 4), weight),
        weight.sum(),
    ):
        assert type(result) is torch.Tensor and result.requires_grad
    assert all(type(t) is torch.Tensor for t in torch.linalg.svd(weight))
    assert torch.empty(3, 4).copy_(weight.detach()).equal(weight.plain())  # another tensor is written
    assert {weight: 1}[weight] == 1 and weight.shape == (3, 4) and weight.tolist() == weight.detach().numpy().tolist()


def test_a_weight_is_saved_and_copied_as_a_plain_tensor():
    weight = SummaryLinear(4, 3).weight.detach()
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    for other in (
        torch.load(file, weights_only=True)["weight"],
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
    ):
        assert type(other) is torch.Tensor and torch.equal(other, weight.plain())
        other.zero_()


def test_a_frozen_layers_weight_is_the_cached_one():
    layer = make("linear")[0].freeze()
    assert layer.weight.data_ptr() == layer.frozen_weight().data_ptr()
    with pytest.raises(ValueError, match=REFUSED):
        layer.weight.zero_()


def test_the_weight_of_a_parametrized_layer():
    layer = constrain(make("conv")[0], "parametrization")
    assert error(layer.weight, layer.fold().weight) <= 1e-12


def test_transforms_and_compiled_code_read_it():
    layer, x = make("linear")

    def value(b):
        return torch.func.functional_call(Reads(layer), {"layer.b": b}, (x,)).sum()

    wanted = torch.autograd.grad(F.linear(x, layer.weight).sin().sum(), layer.b)[0]
    assert error(torch.func.grad(value)(layer.b.detach()), wanted) <= 1e-12
    several = torch.stack((layer.b, 2 * layer.b)).detach()
    assert error(torch.vmap(value)(several)[0], value(layer.b)) <= 1e-12
    compiled = torch.compile(Reads(layer), backend="aot_eager", fullgraph=True)
    assert error(torch.autograd.grad(compiled(x).sum(), layer.b)[0], wanted) <= 1e-12
    torch.export.export(Reads(layer), (x,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing_does_not_compile_the_property():
    layer, x = make("linear")
    assert error(torch.jit.trace(layer, x)(x), layer(x)) <= 1e-12


class Reads(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return F.linear(x, self.layer.weight).sin()


def test_a_layer_without_b_says_so():
    layer = SummaryLinear(4, 3)
    del layer.b
    with pytest.raises(RuntimeError, match=r"^weight: cannot be computed from b: .*no attribute 'b'"):
        _ = layer.weight


# Writing

WRITES = {
    "in place": lambda w: w.mul_(2),
    "augmented": lambda w: w.__iadd__(1),
    "an entry": lambda w: w.__setitem__(0, 1.0),
    "copy_": lambda w: w.copy_(torch.ones(w.shape)),
    "data =": lambda w: setattr(w, "data", torch.ones(w.shape)),
    "data.": lambda w: w.data.normal_(),
    "data +=": lambda w: w.data.__iadd__(1),
    "detach": lambda w: w.detach().zero_(),
    "a view": lambda w: w.flatten().view(-1)[2:].zero_(),
    "a part": lambda w: w.chunk(2)[1].zero_(),
    "out": lambda w: torch.add(w, 1, out=w),
    "out of a detached": lambda w: torch.eye(2, out=w.detach()),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "requires_grad": lambda w: setattr(w, "requires_grad", False),
    "inplace": lambda w: F.relu(w, inplace=True),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "normal_": nn.init.normal_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "xavier_normal_": nn.init.xavier_normal_,
    "trunc_normal_": nn.init.trunc_normal_,
    "orthogonal_": nn.init.orthogonal_,
    "constant_": lambda w: nn.init.constant_(tensor=w, val=0.0),
    "zeros_": nn.init.zeros_,
    "parameter": lambda w: nn.Parameter(w.detach()),
}


@pytest.mark.parametrize("kind", ["linear", "grouped"])
@pytest.mark.parametrize("grad", [True, False])
def test_writes_are_refused(kind, grad):
    layer, x = make(kind)
    before = layer(x)
    for write in WRITES.values():
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=REFUSED):
            write(layer.weight)
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", ["linear", "grouped"])
@pytest.mark.parametrize(
    "value", [lambda w: nn.Parameter(w.clone()), torch.clone, lambda w: None], ids=["parameter", "tensor", "none"]
)
def test_assignments_are_refused(kind, value):
    layer, x = make(kind)
    before, value = layer(x), value(layer.weight.detach())
    with pytest.raises(ValueError, match=REFUSED):
        layer.weight = value
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter):
        with pytest.raises(ValueError, match=REFUSED):
            layer.register_parameter("weight", value)
    assert torch.equal(layer(x), before) and list(layer._parameters) == ["b", "bias"]


def test_an_embedding_is_not_tied_to_the_weight():
    layer, embedding = SummaryLinear(4, 7), nn.Embedding(7, 4)
    with pytest.raises(ValueError, match=REFUSED):
        layer.weight = embedding.weight
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight'"):
        embedding.weight = layer.weight


@pytest.mark.filterwarnings("ignore:.*an orthogonality defect above 1:RuntimeWarning")
@by_kind
@pytest.mark.parametrize("state", ["plain", "frozen", "penalty", "parametrization"])
def test_set_weight(kind, state):
    layer, x = make(kind)
    b = layer.b
    if state == "frozen":
        layer.freeze()
    elif state != "plain":
        constrain(layer, state)(x)
    wanted = torch.randn_like(layer.weight)
    if state == "parametrization":
        wanted = copy.deepcopy(layer)
        wanted.reset_orthogonal_()
        wanted = wanted.weight.detach()
    layer.set_weight_(wanted)
    assert error(layer.weight, wanted) <= 1e-11 and (state == "parametrization" or layer.b is b)
    plain = layer.fold()
    assert error(layer(x), plain(x)) <= 1e-11 and error(plain.weight, wanted) <= 1e-11


def test_set_weight_of_other_types_and_values():
    layer = SummaryLinear(4, 3)
    wanted = torch.randn(3, 4, dtype=torch.float64)
    layer.set_weight_(wanted)
    assert layer.b.dtype == torch.float32 and error(layer.weight, wanted) <= 1e-6
    layer.set_weight_(SummaryLinear(4, 3).weight)
    layer.set_weight_(torch.zeros(3, 4))
    assert not layer.weight.any()
    with pytest.raises(ValueError, match=r"^weight: got shape \(4, 3\), want \(3, 4\)"):
        layer.set_weight_(wanted.t())
    with pytest.raises(ValueError, match=r"^weight: got a value that is not finite in torch.float32"):
        layer.set_weight_(wanted * 1e300)


# Tools that read or write weights


def test_fusion_with_batch_norm():
    """The tools write a copy of the layer: the layer as it is is refused, the folded one is right."""
    conv, bn, x = SummaryConv2d(2, 3, 3).eval(), nn.BatchNorm2d(3).eval(), torch.randn(1, 2, 6, 6)
    linear, bn1, rows = SummaryLinear(5, 3).eval(), nn.BatchNorm1d(3).eval(), torch.randn(4, 5)
    for layer, norm, fuse, data in ((conv, bn, fuse_conv_bn_eval, x), (linear, bn1, fuse_linear_bn_eval, rows)):
        nn.init.normal_(layer.b), norm.running_var.fill_(4.0), norm.running_mean.fill_(0.3)
        with pytest.raises(ValueError, match=REFUSED):
            fuse(layer, norm)
        assert error(fuse(layer.fold(), norm)(data), norm(layer(data))) <= 1e-5
        weight, bias = torch.nn.utils.fusion.fuse_linear_bn_weights(
            layer.weight.flatten(1), layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        plain = layer.fold()
        plain.weight, plain.bias = nn.Parameter(weight.view_as(plain.weight).detach()), bias
        assert error(plain(data), norm(layer(data))) <= 1e-5


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_pytorchs_encoder_layer_in_evaluation():
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    layer.linear1, layer.linear2 = SummaryLinear(8, 16), SummaryLinear(16, 8)
    for part in (layer.linear1, layer.linear2):
        nn.init.normal_(part.b, std=0.4)
    plain = copy.deepcopy(layer)
    plain.linear1, plain.linear2 = layer.linear1.fold(), layer.linear2.fold()
    with torch.no_grad():
        assert error(layer(x), plain(x)) <= 1e-5
        assert error(nn.TransformerEncoder(layer, 2)(x), nn.TransformerEncoder(plain, 2)(x)) <= 1e-5


def test_a_merge_of_an_adapter():
    """As peft merges: it adds to the base layer's `weight.data`, or assigns it."""
    layer, delta = SummaryLinear(6, 4), torch.randn(4, 6)
    with pytest.raises(ValueError, match=REFUSED):
        layer.weight.data += delta
    merged = layer.weight.data.clone()
    merged += delta
    with pytest.raises(ValueError, match=REFUSED):
        layer.weight.data = merged
    layer.set_weight_(merged)
    assert error(layer.weight, merged) <= 1e-6


@pytest.mark.parametrize(
    "change",
    [
        lambda m: nn.utils.parametrizations.weight_norm(m),
        lambda m: nn.utils.parametrizations.spectral_norm(m),
        lambda m: nn.utils.parametrize.register_parametrization(m, "weight", nn.Identity()),
        lambda m: prune.l1_unstructured(m, "weight", 2),
    ],
    ids=["weight norm", "spectral norm", "parametrization", "pruning"],
)
def test_transformations_of_the_weight_are_refused(change):
    layer, x = make("linear")
    before = layer(x)
    with pytest.raises((TypeError, ValueError)):
        change(layer)
    assert torch.equal(layer(x), before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("change", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("kind", ["linear", "conv", "head"])
def test_the_old_hooks_of_the_weight_are_refused_in_words(kind, change):
    layer = SummaryHead(6, 4, 3).eval() if kind == "head" else make(kind)[0]
    x = torch.randn(2, 6) if kind == "head" else make(kind)[1]
    before = layer(x)
    with pytest.raises(ValueError, match=r"^weight: is computed from b .*layer\.fold\(\).* take name='b'"):
        change(layer)
    assert torch.equal(layer(x), before) and not layer._forward_pre_hooks
    change(layer, "b")


def test_the_parameters_are_a_dictionary_to_everyone_else():
    layer = SummaryLinear(4, 3)
    assert type(layer._parameters) is dict and layer._parameters is vars(layer)["_parameters"]
    name = "weight"  # as the hooks' local variable
    assert name not in layer._parameters
    with pytest.raises(KeyError):
        layer._parameters[name]
    replica = layer._replicate_for_data_parallel()
    assert replica._parameters == {} and list(layer._parameters) == ["b", "bias"]

    @torch.compile(backend="eager", fullgraph=True)
    def sizes(x):
        return x * sum(p.numel() for p in layer.parameters()) + layer._parameters["b"].sum()

    assert sizes(torch.ones(1)).item() == pytest.approx(15 + layer.b.sum().item(), rel=1e-5)
