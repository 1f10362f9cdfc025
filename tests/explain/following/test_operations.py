"""Every operation of the table, by itself: its replay is the model at x, affine everywhere, and its map is found three ways."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from interp_nn.explain.following.calls import UnsupportedOperation
from interp_nn.explain.following.gate_record import frozen, supported_ops
from interp_nn.explain.linear.affine_map import linearize

DTYPE = torch.float64
VECTOR, IMAGE, LINE, SOLID, TOKENS = (6,), (3, 8, 8), (3, 8), (2, 4, 4, 4), (5, 8)


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


def model_of(operation):
    return (operation if isinstance(operation, nn.Module) else Calls(operation)).to(DTYPE).eval()


def tensor(*values):
    return torch.tensor(values, dtype=DTYPE)


def ones(*shape):
    return torch.ones(*shape, dtype=DTYPE)


def error(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


def written(x):
    out = x.new_zeros(len(x), 4)
    out[:, :2] = x[:, :2].relu()
    return out


def written_through_a_view(x):
    out = torch.zeros(len(x), 3, dtype=x.dtype)
    out[:, 0].copy_(x[:, 0])
    return out + 1


def masked_in_place(x):
    y = x.clone()
    y[y < 0] = 0.0
    return y


def augmented(x):
    y = x * 1
    y += x
    y -= 1
    y *= 3
    y /= 2
    return y


class Outputs(nn.Module):
    """The outputs of a recurrent layer, and the last states."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if self.layer.batch_first:
            outputs, states = self.layer(x)
        else:
            outputs, states = self.layer(x.transpose(0, 1))
            outputs = outputs.transpose(0, 1)
        states = states if isinstance(states, tuple) else (states,)
        return torch.cat([outputs.flatten(1), *(state.transpose(0, 1).flatten(1) for state in states)], 1)


class Steps(nn.Module):
    """A recurrent cell called step by step."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for given in x.unbind(1):
            state = self.cell(given, state)
        return torch.cat(state, 1) if isinstance(state, tuple) else state


EXACT = {
    "nn.ReLU": (nn.ReLU(), VECTOR),
    "nn.ReLU in place": (nn.ReLU(inplace=True), VECTOR),
    "F.relu": (F.relu, VECTOR),
    "F.relu in place": (lambda x: F.relu(x + 0, True), VECTOR),
    "F.relu_": (lambda x: F.relu_(x + 0), VECTOR),
    "torch.relu": (torch.relu, VECTOR),
    "torch.relu_": (lambda x: torch.relu_(x + 0), VECTOR),
    "Tensor.relu": (lambda x: x.relu(), VECTOR),
    "Tensor.relu_": (lambda x: (x + 0).relu_(), VECTOR),
    "aten.relu": (lambda x: torch.ops.aten.relu(x), VECTOR),
    "aten.relu.default": (lambda x: torch.ops.aten.relu.default(x), VECTOR),
    "threshold": (nn.Threshold(0.1, 0.5), VECTOR),
    "threshold_": (lambda x: F.threshold_(x + 0, 0, 0), VECTOR),
    "leaky_relu": (nn.LeakyReLU(0.2), VECTOR),
    "leaky_relu_": (lambda x: F.leaky_relu_(x + 0, 0.2), VECTOR),
    "leaky_relu in place": (lambda x: F.leaky_relu(x + 0, 0.2, True), VECTOR),
    "prelu": (nn.PReLU(), VECTOR),
    "prelu of channels": (nn.PReLU(3), IMAGE),
    "rrelu": (nn.RReLU(), VECTOR),
    "relu6": (nn.ReLU6(), VECTOR),
    "relu6 in place": (nn.Sequential(nn.Linear(6, 6), nn.ReLU6(inplace=True)), VECTOR),
    "hardtanh": (nn.Hardtanh(-0.5, 0.7), VECTOR),
    "hardtanh_": (lambda x: F.hardtanh_(x + 0, -0.5, 0.7), VECTOR),
    "abs": (abs, VECTOR),
    "abs_": (lambda x: (x + 0).abs_(), VECTOR),
    "hardshrink": (nn.Hardshrink(), VECTOR),
    "softshrink": (nn.Softshrink(), VECTOR),
    "clamp": (lambda x: x.clamp(-1, 1), VECTOR),
    "clamp from below": (lambda x: x.clamp(min=0.0), VECTOR),
    "clamp from above": (lambda x: torch.clamp(x, max=0.5), VECTOR),
    "clamp by tensors": (lambda x: torch.clamp(x, torch.linspace(-1, 0, 6, dtype=DTYPE)), VECTOR),
    "clamp_min": (lambda x: x.clamp_min(0), VECTOR),
    "clamp_max_": (lambda x: (x + 0).clamp_max_(0.3), VECTOR),
    "clip": (lambda x: x.clip(-0.1), VECTOR),
    "maximum": (lambda x: torch.maximum(x, tensor(0.0)), VECTOR),
    "maximum of a constant first": (lambda x: torch.maximum(tensor(0.0), x), VECTOR),
    "minimum": (lambda x: torch.minimum(x, tensor(0.4)), VECTOR),
    "torch.max of two": (lambda x: torch.max(x, torch.zeros_like(x)), VECTOR),
    "maxout": (lambda x: torch.maximum(x[:, :3], x[:, 3:]), VECTOR),
    "where": (lambda x: torch.where(x > 0, x, 0.1 * x), VECTOR),
    "product with a mask": (lambda x: x * (x > 0), VECTOR),
    "product with a cast mask": (lambda x: (x > 0).to(x.dtype) * x, VECTOR),
    "product with a negated mask": (lambda x: x * (~(x > 0) & (x < 1)), VECTOR),
    "product with chosen constants": (lambda x: x * torch.where(x > 0, 2.0, -1.0), VECTOR),
    "sum with chosen constants": (lambda x: x + torch.where(x > 0, 2.0, -1.0), VECTOR),
    "sum with a mask": (lambda x: x + (x > 0), VECTOR),
    "masked_fill": (lambda x: x.masked_fill(x < 0, 0.0), VECTOR),
    "assignment to a mask": (masked_in_place, VECTOR),
    "max along a dimension": (lambda x: x.max(1)[0], VECTOR),
    "max by keyword": (lambda x: torch.max(x, dim=-1, keepdim=True).values, VECTOR),
    "min along a dimension": (lambda x: x.min(dim=1).values, VECTOR),
    "amax": (lambda x: x.amax(1), VECTOR),
    "amin": (lambda x: torch.amin(x, dim=1, keepdim=True), VECTOR),
    "amax of images": (lambda x: x.amax((2, 3)), IMAGE),
    "topk": (lambda x: x.topk(3)[0], VECTOR),
    "sort": (lambda x: torch.sort(x, dim=1, descending=True)[0], VECTOR),
    "median": (lambda x: x.median(1)[0], VECTOR),
    "kthvalue": (lambda x: x.kthvalue(2)[0], VECTOR),
    "gather by argmax": (lambda x: x.gather(1, x.argmax(1, keepdim=True)), VECTOR),
    "linear": (nn.Linear(6, 3), VECTOR),
    "linear by keyword": (lambda x: F.linear(input=x, weight=ones(2, 6), bias=ones(2)), VECTOR),
    "matmul": (lambda x: x @ ones(6, 2), VECTOR),
    "matmul from the left": (lambda x: (ones(2, 6) @ x.t()).t(), VECTOR),
    "addmm": (lambda x: torch.addmm(ones(3), x, ones(6, 3)), VECTOR),
    "addcmul": (lambda x: torch.addcmul(x, x, ones(6)), VECTOR),
    "lerp": (lambda x: torch.lerp(x, ones(6), 0.3), VECTOR),
    "einsum": (lambda x: torch.einsum("ni,ij->nj", x, ones(6, 2)), VECTOR),
    "batch_norm": (nn.BatchNorm1d(6), VECTOR),
    "dropout": (nn.Dropout(), VECTOR),
    "arithmetic": (lambda x: 2 * (1 - x) / 3 + (-x) - 1, VECTOR),
    "augmented assignment": (augmented, VECTOR),
    "assignment": (written, VECTOR),
    "assignment through a view": (written_through_a_view, VECTOR),
    "chunk": (lambda x: sum(x.chunk(2, 1)), VECTOR),
    "split and cat": (lambda x: torch.cat(x.split([2, 4], 1)[::-1], 1), VECTOR),
    "unbind and stack": (lambda x: torch.stack(x.unbind(1)[::-1], 1), VECTOR),
    "iteration": (lambda x: torch.stack([row * 2 + 1 for row in x]), VECTOR),
    "indexing": (lambda x: x[:, None, [0, 2]], VECTOR),
    "likeness": (lambda x: x * ones(6).expand_as(x).to(x) + ones(6).type_as(x), VECTOR),
    "cumsum and flip": (lambda x: x.cumsum(1).flip(1), VECTOR),
    "nn.RNN": (Outputs(nn.RNN(8, 4, 2, nonlinearity="relu", batch_first=True, bidirectional=True)), LINE),
    "nn.RNNCell": (Steps(nn.RNNCell(8, 4, nonlinearity="relu")), LINE),
    "conv2d": (nn.Conv2d(3, 4, 3, 2, 1, padding_mode="reflect"), IMAGE),
    "conv2d of groups": (nn.Conv2d(3, 3, 3, groups=3, dilation=2), IMAGE),
    "conv_transpose2d": (nn.ConvTranspose2d(3, 4, 3, 2), IMAGE),
    "conv1d": (nn.Conv1d(3, 2, 3), LINE),
    "conv3d": (nn.Conv3d(2, 2, 2), SOLID),
    "instance_norm of running statistics": (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), IMAGE),
    "max_pool1d": (nn.MaxPool1d(3, 2, 1), LINE),
    "torch.max_pool1d": (lambda x: torch.max_pool1d(x, 3, 2, 1), LINE),
    "max_pool2d": (nn.MaxPool2d(3, 2, 1), IMAGE),
    "max_pool2d rounded up": (nn.MaxPool2d(3, 2, ceil_mode=True), IMAGE),
    "max_pool2d dilated": (nn.MaxPool2d(2, 1, dilation=2), IMAGE),
    "torch.max_pool2d": (lambda x: torch.max_pool2d(x, 2), IMAGE),
    "max_pool3d": (nn.MaxPool3d(2), SOLID),
    "adaptive_max_pool1d": (nn.AdaptiveMaxPool1d(3), LINE),
    "adaptive_max_pool2d": (nn.AdaptiveMaxPool2d((2, 3)), IMAGE),
    "adaptive_max_pool3d": (nn.AdaptiveMaxPool3d(2), SOLID),
    "avg_pool2d": (nn.AvgPool2d(2), IMAGE),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d(3), IMAGE),
    "constant padding": (nn.ConstantPad2d(1, 2.0), IMAGE),
    "F.pad": (lambda x: F.pad(x, (1, 0, 2, 1), value=-1.0), IMAGE),
    "reflection padding": (nn.ReflectionPad2d(1), IMAGE),
    "upsampling": (nn.Upsample(scale_factor=2), IMAGE),
    "bicubic interpolation": (lambda x: F.interpolate(x, size=(5, 5), mode="bicubic"), IMAGE),
    "pixel_unshuffle": (nn.PixelUnshuffle(2), IMAGE),
    "unfold and fold": (lambda x: F.fold(F.unfold(x, 2), (8, 8), 2), IMAGE),
}


class Squeeze(nn.Module):
    """Squeeze and excitation: channels are scaled by a gate computed from all of them."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Attention(nn.Module):
    """Attention by hand, in one of several spellings."""

    def __init__(self, spelling):
        super().__init__()
        self.project, self.spelling = nn.Linear(8, 24), spelling

    def forward(self, x):
        query, key, value = self.project(x).chunk(3, -1)
        if self.spelling == "matmul":
            scores = (query @ key.transpose(-2, -1) / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
            return scores.softmax(-1) @ value
        if self.spelling == "einsum":
            weights = F.softmax(torch.einsum("nqd,nkd->nqk", query, key), dim=-1)
            return torch.einsum("nqk,nkd->nqd", weights, value)
        query, key, value = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (query, key, value))
        if self.spelling == "causal":
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mask = torch.ones(5, 5, dtype=torch.bool).tril(-1)  # the first query sees nothing
            out = F.scaled_dot_product_attention(
                query, key[:, :1], value[:, :1], attn_mask=mask, scale=0.7, enable_gqa=True
            )
        return out.transpose(1, 2).flatten(2)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.both = nn.Linear(6, 4), nn.Linear(6, 4), nn.Bilinear(6, 4, 3)

    def forward(self, x):
        return self.left(x)[:, :3] * self.right(x)[:, :3] + self.both(x, self.left(x))


class LinearAttention(nn.Module):
    """Attention without a softmax, divided by its weights' sum."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x):
        query, key, value = self.project(x).chunk(3, -1)
        query, key = F.elu(query) + 1, F.elu(key) + 1
        return query @ (key.mT @ value) / (query @ key.sum(1, keepdim=True).mT)


class Gated(nn.Module):
    """A gated feed-forward layer: activation(gate) * value."""

    def __init__(self, activation):
        super().__init__()
        self.gate, self.value, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.activation = activation

    def forward(self, x):
        return self.down(self.value(x) * self.activation(self.gate(x)))


class SelfAttention(nn.Module):
    def __init__(self, batch_first, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x):
        h = x if self.attention.batch_first else x.transpose(0, 1)
        out = self.attention(h, h, h, need_weights=self.need_weights)[0]
        return out if self.attention.batch_first else out.transpose(0, 1)


class Recurrent(nn.Module):
    """An LSTM by hand: three sigmoids gate, the tanh do not."""

    def __init__(self):
        super().__init__()
        self.inputs, self.states = nn.Linear(6, 16), nn.Linear(4, 16)

    def forward(self, x):
        h = c = x.new_zeros(len(x), 4)
        for _ in range(3):
            i, f, o, g = (self.inputs(x) + self.states(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


SECANT = {
    "gelu": (nn.GELU(), VECTOR),
    "gelu by tanh": (nn.GELU("tanh"), VECTOR),
    "silu": (nn.SiLU(), VECTOR),
    "silu in place": (nn.Sequential(nn.Linear(6, 6), nn.SiLU(inplace=True)), VECTOR),
    "mish": (nn.Mish(), VECTOR),
    "hardswish": (nn.Hardswish(), VECTOR),
    "sigmoid": (nn.Sigmoid(), VECTOR),
    "sigmoid_": (lambda x: torch.sigmoid_(x + 0), VECTOR),
    "expit": (torch.special.expit, VECTOR),
    "tanh": (nn.Tanh(), VECTOR),
    "softplus": (nn.Softplus(2.0, 5.0), VECTOR),
    "elu": (nn.ELU(1.5), VECTOR),
    "celu": (nn.CELU(0.7), VECTOR),
    "selu": (nn.SELU(), VECTOR),
    "logsigmoid": (nn.LogSigmoid(), VECTOR),
    "softsign": (nn.Softsign(), VECTOR),
    "tanhshrink": (nn.Tanhshrink(), VECTOR),
    "sin": (torch.sin, VECTOR),
    "glu": (nn.GLU(), VECTOR),
    "silu by hand": (lambda x: x * torch.sigmoid(1.7 * x), VECTOR),
    "hardswish by hand": (lambda x: (x + 0).mul_(F.relu6(x + 3).div_(6.0)), VECTOR),
    "gate in place": (lambda x: torch.sigmoid(x).mul_(x), VECTOR),
    "gate of one's own": (lambda x: x * torch.sigmoid(x[:, :1]).expand_as(x), VECTOR),
    "highway": (lambda x: (1 - torch.sigmoid(x)) * x + torch.sigmoid(x) * torch.tanh(x), VECTOR),
    "normalize": (lambda x: F.normalize(x, dim=1), VECTOR),
    "division by a norm": (lambda x: x / (1e-3 + x.norm(dim=1, keepdim=True)), VECTOR),
    "product with a softmax": (lambda x: x * x.softmax(-1), VECTOR),
    "product with a square": (lambda x: x * x**2, VECTOR),
    "square": (lambda x: x * x + x.square() + x**2, VECTOR),
    "powers in place": (lambda x: (x + 0).pow_(3) + (x + 1).square_(), VECTOR),
    "square in place": (lambda x: (y := x + 1).mul_(y), VECTOR),
    "product in place": (lambda x: (x + 0).mul_(x.flip(1).view(-1, 6)), VECTOR),
    "product by keyword": (lambda x: torch.mul(other=x[:, :3], input=x[:, 3:]), VECTOR),
    "quotient": (lambda x: x / (1 + x.abs().sum(1, keepdim=True)), VECTOR),
    "quotient in place": (lambda x: (x + 0).div_(x.abs() + 1), VECTOR),
    "lerp by a gate": (lambda x: torch.lerp(x, x.flip(1), x.sigmoid()), VECTOR),
    "lerp of constants": (lambda x: torch.lerp(ones(6), tensor(0.0), x.tanh()), VECTOR),
    "bilinear": (Bilinear(), VECTOR),
    "matmul of two": (lambda x: x.mT @ x, TOKENS),
    "bmm by keyword": (lambda x: torch.bmm(mat2=x.mT, input=x), TOKENS),
    "einsum of three": (lambda x: torch.einsum("nij,nkj,nkl->nil", x, x.relu(), x), TOKENS),
    "einsum of a list": (lambda x: torch.einsum("nij,nkj->nik", [x, x + 1]), TOKENS),
    "addcmul of two": (lambda x: torch.addcmul(x, x, x, value=2), VECTOR),
    "baddbmm of three": (lambda x: torch.baddbmm(x[:, :, :5], x, x.mT), TOKENS),
    "linear attention": (LinearAttention(), TOKENS),
    "dynamic convolution": (
        lambda x: F.conv1d(x.view(1, -1, 8), x.view(-1, 1, 8), groups=5 * len(x)).view(-1, 5),
        TOKENS,
    ),
    "gelu by erf": (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), VECTOR),
    "softsign by hand": (lambda x: x / (1 + abs(x)), VECTOR),
    "SwiGLU": (Gated(F.silu), VECTOR),
    "GeGLU": (Gated(F.gelu), VECTOR),
    "ReGLU": (Gated(F.relu), VECTOR),
    "squeeze and excitation by tanh": (lambda x: x.tanh().mean((2, 3), keepdim=True) * x, IMAGE),
    "recurrence": (Recurrent(), VECTOR),
    "nn.RNN by tanh": (Outputs(nn.RNN(8, 4, 2, bias=False)), LINE),
    "nn.LSTM": (Outputs(nn.LSTM(8, 4, batch_first=True, bidirectional=True)), LINE),
    "nn.LSTM with a projection": (Outputs(nn.LSTM(8, 4, bias=False, batch_first=True, proj_size=3)), LINE),
    "nn.GRU": (Outputs(nn.GRU(8, 4, 2)), LINE),
    "nn.RNNCell by tanh": (Steps(nn.RNNCell(8, 4)), LINE),
    "nn.LSTMCell": (Steps(nn.LSTMCell(8, 4, bias=False)), LINE),
    "nn.GRUCell": (Steps(nn.GRUCell(8, 4)), LINE),
    "layer_norm": (nn.LayerNorm(6), VECTOR),
    "layer_norm of images": (nn.LayerNorm((3, 8, 8)), IMAGE),
    "layer_norm by hand": (
        lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt() * 2 + 1,
        VECTOR,
    ),
    "rms_norm": (nn.RMSNorm(6), VECTOR),
    "group_norm": (nn.GroupNorm(3, 3), IMAGE),
    "instance_norm": (nn.InstanceNorm2d(3, affine=True), IMAGE),
    "squeeze and excitation": (Squeeze(), IMAGE),
    "attention by matmul": (Attention("matmul"), TOKENS),
    "attention by einsum": (Attention("einsum"), TOKENS),
    "causal attention": (Attention("causal"), TOKENS),
    "grouped attention": (Attention("grouped"), TOKENS),
    "MultiheadAttention": (SelfAttention(True, False), TOKENS),
    "MultiheadAttention with weights": (SelfAttention(True, True), TOKENS),
    "MultiheadAttention, sequence first": (SelfAttention(False, True), TOKENS),
    "TransformerEncoderLayer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), TOKENS),
    "TransformerEncoder": (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2, enable_nested_tensor=False
        ),
        TOKENS,
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap and bilinear
@pytest.mark.parametrize(
    ("operation", "shape", "exact"),
    [
        pytest.param(*case, exact, id=name)
        for cases, exact in ((EXACT, True), (SECANT, False))
        for name, case in cases.items()
    ],
)
def test_an_operation_is_affine_once_its_gates_are_frozen(operation, shape, exact):
    model = model_of(operation)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = 2 * torch.randn(2, *shape, dtype=DTYPE)
    with torch.no_grad():
        wanted = model(x.clone())
    replay, tangent = frozen(model, x), torch.randn_like(x)

    with torch.no_grad():
        assert error(replay(x), wanted) <= 1e-13
        far, other = 10 * torch.randn_like(x), 10 * torch.randn_like(x)
        mixed = replay(0.3 * far + 0.7 * other)
        assert error(0.3 * replay(far) + 0.7 * replay(other), mixed) <= 1e-12
        assert error(replay(torch.cat([far, other])), torch.cat([replay(far), replay(other)])) <= 1e-12

    affine = linearize(model, x)
    assert affine.check() <= 1e-12
    # Rows by reverse mode against forward mode, and against the original where it is piecewise linear.
    middle = (1,) * (wanted.dim() - 1)
    pushed = (affine.weight * tangent.view(2, *middle, *shape)).flatten(wanted.dim()).sum(-1)
    assert error(pushed, affine.matvec(tangent)) <= 1e-12
    if affine.bias.any():
        assert error(sum(affine.bias_by_layer().values()), affine.bias) <= 1e-12
    assert supported_ops(model, x).exact == exact and supported_ops(model, x).supported
    if exact:
        assert (linearize(model, x, mode="tangent").weight - affine.weight).abs().max() <= 1e-12
    elif operation not in (SECANT["gate in place"][0], SECANT["square in place"][0]):  # which autograd refuses
        tangent_map = linearize(model, x, mode="tangent")
        assert tangent_map.check() <= 1e-12 and (tangent_map.weight - affine.weight).abs().max() > 1e-6


def test_hardsigmoid():
    # PyTorch's own gradient of it is 1/6 in single precision.
    x = torch.tensor([[-4.0, -1.0, 2.0, 5.0]], dtype=DTYPE)
    affine = linearize(model_of(nn.Hardsigmoid()), x)
    assert affine.check() <= 1e-15
    assert torch.equal(affine.weight[0].diagonal(), tensor(0, 1 / 6, 1 / 6, 0)) and torch.equal(
        affine.bias[0], tensor(0, 0.5, 0.5, 1)
    )


@pytest.mark.parametrize("function", [lambda x: x.detach() * 2, lambda x: x.data * 2, torch.no_grad()(lambda x: 2 * x)])
def test_stopped_gradients_do_not_stop_the_map(function):
    x = torch.randn(2, 6, dtype=DTYPE)
    affine = linearize(model_of(function), x)
    assert torch.equal(affine.weight, 2 * torch.eye(6, dtype=DTYPE).expand(2, 6, 6)) and affine.check() == 0
    assert linearize(model_of(function), x, mode="tangent").weight.abs().max() <= 2


@pytest.mark.parametrize(
    "name",
    [
        "gelu",
        "gelu by tanh",
        "silu",
        "mish",
        "hardswish",
        "sigmoid",
        "tanh",
        "softplus",
        "elu",
        "celu",
        "selu",
        "logsigmoid",
        "sin",
    ],
)
def test_secants_at_and_around_zero(name):
    model = model_of(SECANT[name][0])
    x = torch.tensor([[0.0, 1e-300, -1e-12, 1e-8, -1e-4, 0.3, -0.999, 1.001, -30.0, 30.0]], dtype=DTYPE)
    affine = linearize(model, x)
    assert affine.check() <= 1e-14 and bool(affine.weight.isfinite().all())
    # At zero the secant is the tangent; it is continuous there.
    derivative = torch.func.grad(lambda z: model(z.view(1, 1)).sum())(tensor(0.0)[0])
    slopes = affine.weight[0].diagonal()
    assert (slopes[0] - derivative).abs() <= 1e-7  # PyTorch rounds some constants to single precision
    if name not in ("elu", "selu"):  # these have a breakpoint there
        assert (slopes[1:4] - derivative).abs().max() <= 1e-7


def test_conventions_at_breakpoints():
    zero = torch.zeros(1, 4, dtype=DTYPE)
    for function, slope in ((torch.relu, 0), (lambda x: F.leaky_relu(x, 0.2), 0.2)):
        affine, tangent = linearize(model_of(function), zero), linearize(model_of(function), zero, mode="tangent")
        assert torch.equal(affine.weight[0].diagonal(), torch.full((4,), slope, dtype=DTYPE))
        assert torch.equal(affine.weight, tangent.weight)
    # PyTorch's gradient of |x| is 0 there, which neither piece has; a pattern tells two pieces apart.
    assert torch.equal(linearize(model_of(torch.abs), zero).weight[0], -torch.eye(4, dtype=DTYPE))
    pool = linearize(model_of(nn.MaxPool1d(4)), zero.unsqueeze(1))
    assert pool.weight.flatten().tolist() == [1, 0, 0, 0]
    network = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False)).to(DTYPE)
    assert not linearize(network, zero).weight.any()


REFUSED = {
    "exp": torch.exp,
    "pow": lambda x: x**-1,
    "__rdiv__": lambda x: 1 / x,
    "norm": lambda x: x.norm(dim=1),
    "softmax": lambda x: x + x.softmax(-1),
    "argmax": lambda x: x.argmax(1).double(),
    "item": lambda x: x * x.norm().item(),
    "__float__": lambda x: x * float(x[0, 0]),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "tolist": lambda x: x * x[0].tolist()[0],
    "dropout": lambda x: F.dropout(x),
    "rand": lambda x: x + torch.rand(6),
    "randn_like": lambda x: x + torch.randn_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full((6,), 0.5)),
    "fft_fft": lambda x: torch.fft.fft(x).real,
    "as_tensor": lambda x: torch.as_tensor(x),
    "std": lambda x: x.std(1),
    "linalg_svdvals": lambda x: x * torch.linalg.svdvals(x)[0],
    "erfinv": lambda x: torch.erfinv(x / 10),
    "cumprod": lambda x: x.cumprod(1),
    "add": lambda x: torch.add(x, 1, out=torch.empty(2, 6, dtype=DTYPE)),
    "clamp": lambda x: x.clamp(max=x.mean(1, keepdim=True)),
    "log_softmax": nn.LogSoftmax(-1),
    "prelu": lambda x: F.prelu(x, x.mean().view(1)),
    "layer_norm": lambda x: F.layer_norm(x, (6,), x[0]),
    "batch_norm": lambda x: F.batch_norm(x, ones(6), ones(6), x[0]),
    "mul": lambda x: (y := x + 0).mul_(y[:, :1]),  # which entries it reads before it writes to them is not defined
    "div": lambda x: torch.div(1, x),
    "scatter": lambda x: x.scatter(1, torch.zeros(2, 1, dtype=torch.int64), 2.0, reduce="multiply"),
    "max": lambda x: x + x.max(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_affine_is_refused_by_name_and_listed(name):
    model = nn.Sequential(nn.Identity(), nn.Sequential(model_of(REFUSED[name])))
    x = torch.randn(2, 6, dtype=DTYPE)
    with pytest.raises(UnsupportedOperation, match=rf"^{name} in layer '1\.0'"):
        linearize(model, x)
    with pytest.raises(UnsupportedOperation, match=name):
        frozen(model, x)
    report = supported_ops(model, x)
    assert not report.exact and not report.supported
    assert (name, "1.0", "not treated", 1) in report.rows and "not treated" in str(report)


def test_a_gate_written_through_a_view_is_not_taken_for_a_constant():
    def function(x):
        out = torch.zeros(2, 6, dtype=DTYPE)
        out[:, 0].copy_(x[:, 0].exp())
        return out + x

    with pytest.raises(UnsupportedOperation, match="exp in layer ''"):
        linearize(model_of(function), torch.randn(2, 6, dtype=DTYPE))


@pytest.mark.parametrize("held", ["activated", "left", "right"])
def test_which_factor_of_a_product_is_held(held):
    x = torch.randn(3, 6, dtype=DTYPE)
    a, b = x[:, :3], x[:, 3:]
    halves = {  # of each product: the slopes in a if it is free, those in b, and the one that "activated" leaves free
        "plain": (lambda x: x[:, :3] * x[:, 3:], b, a, "b"),
        "gate on the left": (lambda x: F.silu(x[:, :3]) * x[:, 3:], b * a.sigmoid(), F.silu(a), "b"),
        "gate on the right": (lambda x: x[:, :3] * torch.tanh(x[:, 3:]), b.tanh(), a * b.tanh() / b, "a"),
        "sigmoid before tanh": (lambda x: x[:, :3].tanh() * x[:, 3:].sigmoid(), a.tanh() / a * b.sigmoid(), None, "a"),
        "glu": (lambda x: F.glu(x), b.sigmoid(), a * (b.sigmoid() - 0.5) / b, "a"),
        "product of a dropout": (
            lambda x: x[:, :3] * F.dropout(x[:, 3:].relu() + 1, 0.5, False),
            b.relu() + 1,
            None,
            "a",
        ),
        "einsum": (lambda x: torch.einsum("ni,ni->ni", x[:, :3], x[:, 3:]), b, a, "b"),
        "piecewise constant": (
            lambda x: x[:, :3] * torch.where(x[:, 3:] > 0, 2.0, -1.0),
            torch.where(b > 0, tensor(2.0), -1.0),
            None,
            "a always",
        ),
        "quotient": (lambda x: x[:, :3] / (2 + x[:, 3:].tanh()), 1 / (2 + b.tanh()), None, "a always"),
    }
    for name, (function, of_a, of_b, activated) in halves.items():
        model = model_of(function)
        affine = linearize(model, x, held=held)
        free = activated if held == "activated" or "always" in activated else "ba"[held == "right"]
        slopes = affine.weight.diagonal(0 if free[0] == "a" else 3, 1, 2)
        if (wanted := of_a if free[0] == "a" else of_b) is not None:
            torch.testing.assert_close(slopes, wanted, rtol=1e-12, atol=1e-12, msg=name)
        assert affine.weight.count_nonzero() <= 9, name  # of one factor alone
        assert affine.check() <= 1e-14 and error(frozen(model, x, held=held)(x), model(x)) <= 1e-14


def test_products_are_named_as_secants():
    report = supported_ops(model_of(Gated(F.silu)), torch.randn(2, 6, dtype=DTYPE))
    assert ("mul", "", "secant", 1) in report.rows and not report.exact and report.supported


def test_held_factors_that_do_not_exist():
    x = torch.randn(2, 6, dtype=DTYPE)
    for explain in (linearize, frozen):
        with pytest.raises(ValueError, match=r"held: got 'both', want one of \('activated', 'left', 'right'\)"):
            explain(model_of(Gated(F.silu)), x, held="both")
        with pytest.raises(ValueError, match="held: got 'left' in mode 'tangent'"):
            explain(model_of(Gated(F.silu)), x, held="left", mode="tangent")


def test_products_of_samples_with_one_another_are_refused():
    for function in (lambda x: x @ x.t(), lambda x: x.mm(mat2=x.t())):
        with pytest.raises(ValueError, match="lets samples depend on one another"):
            linearize(model_of(function), torch.randn(2, 6, dtype=DTYPE))
