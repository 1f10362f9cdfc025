"""Small random models, as text: a grammar of operations in several spellings, writes in place, and live views.

A program is a list of statements on values of shape (n, 6). `of_seed` draws one, `compiled` makes a module of it, and `verdict`
compares its affine map with finite differences.
"""

import random

import torch
from torch import nn
from torch.nn import functional as F

from interp_nn.explain import UnsupportedOperation, linearize, supported_ops

D, N = 6, 2
DTYPE = torch.float64

# Of each operation its spellings. {x} and {y} are values that depend on the input, {c} is a constant (6,), {s} a number.
OPERATIONS = {
    # piecewise linear
    "relu": [
        "F.relu({x})",
        "torch.relu({x})",
        "{x}.relu()",
        "torch.ops.aten.relu.default({x})",
        "torch.relu(input={x})",
    ],
    "leaky_relu": [
        "F.leaky_relu({x}, {s})",
        "F.leaky_relu({x}, negative_slope={s})",
        "torch.ops.aten.leaky_relu({x}, {s})",
        "F.leaky_relu(negative_slope={s}, input={x})",
        "torch._C._nn.leaky_relu({x})",
    ],
    "prelu": ["F.prelu({x}, {c}[:1])", "torch.prelu({x}, weight={c}[:1])", "torch.prelu(weight={c}, input={x})"],
    "rrelu": [
        "F.rrelu({x})",
        "F.rrelu({x}, lower=0.1, upper={s})",
        "torch.rrelu({x}, 0.1, 0.3)",
        "torch.ops.aten.rrelu({x}, 0.1)",
    ],
    "relu6": ["F.relu6(3 * {x})", "torch.ops.aten.relu6(3 * {x})"],
    "hardtanh": [
        "F.hardtanh({x})",
        "F.hardtanh({x}, -0.5, 0.7)",
        "F.hardtanh(max_val={s}, input={x})",
        "torch.ops.aten.hardtanh({x}, -0.3)",
        "torch._C._nn.hardtanh({x}, max_val=0.4)",
    ],
    "threshold": ["F.threshold({x}, 0.1, {s})", "torch.threshold({x}, value={s}, threshold=-0.2)"],
    "hardshrink": ["F.hardshrink({x})", "torch.hardshrink({x}, lambd={s})", "{x}.hardshrink(0.3)"],
    "softshrink": ["F.softshrink({x})", "F.softshrink({x}, lambd={s})", "torch.ops.aten.softshrink({x}, 0.2)"],
    "abs": ["{x}.abs()", "abs({x})", "torch.absolute({x})", "torch.abs(input={x})"],
    "clamp": [
        "{x}.clamp(-{s}, 0.5)",
        "torch.clamp({x}, max={s})",
        "torch.clip({x}, min={c} - 1)",
        "torch.clamp(min=-0.3, input={x})",
        "{x}.clamp(max={c}, min={c} - 1)",
        "torch.ops.aten.clamp({x}, None, {s})",
    ],
    "clamp_min": ["{x}.clamp_min({s})", "torch.clamp_min({x}, min={c})", "torch.clamp_min({x}, -{s})"],
    "clamp_max": ["{x}.clamp_max({s})", "torch.clamp_max(input={x}, max={c})"],
    "maximum": [
        "torch.maximum({x}, {y})",
        "torch.max({x}, other={y})",
        "torch.maximum(x1={x}, x2={y})",
        "torch.max({c}.expand({n}, 6), {x})",
    ],
    "minimum": [
        "torch.minimum({x}, {y})",
        "{x}.min({y})",
        "torch.minimum({c}, other={x})",
        "torch.minimum(a={x}, x2={y})",
    ],
    "max": [
        "{x}.max(1)[0].unsqueeze(1) + {y}",
        "torch.max({x}, axis=1)[0].unsqueeze(1) * {c}",
        "torch.max(input={x}, dim=1, keepdims=True).values + {y}",
        "torch.max({x}.view({n}, 2, 3), axis=1)[0].repeat(1, 2)",
        "{x}.view({n}, 2, 3).max(keepdim=True, dim=-2).values.expand({n}, 2, 3).flatten(1)",
        "torch.ops.aten.max.dim({x}, 1, True)[0] - {y}",
    ],
    "min": ["{x}.view({n}, 3, 2).min(axis=1).values.repeat(1, 3)", "torch.min({x}, 1, True)[0] + {y}"],
    "amax": [
        "{x}.amax(1, True) + {y}",
        "torch.amax({x}.view({n}, 2, 3), axis=1).repeat(1, 2)",
        "{x}.amax(dim=(1,), keepdims=True) - {y}",
    ],
    "amin": ["torch.amin({x}.view({n}, 3, 2), dim=2).repeat(1, 2)", "{x}.amin(keepdim=True, dim=-1) + {y}"],
    "max_pool1d": [
        "F.max_pool1d({x}.unsqueeze(1), 3, 1, 1).flatten(1)",
        "F.max_pool1d({x}.unsqueeze(1), kernel_size=2, padding=1, dilation=2, stride=1).flatten(1)",
        "torch.max_pool1d({x}.unsqueeze(1), 2).flatten(1).repeat(1, 2)",
        "F.max_pool1d({x}.unsqueeze(1), 3, 1, 1, 1, False, True)[0].flatten(1)",
    ],
    "max_pool2d": [
        "F.max_pool2d({x}.view({n}, 1, 2, 3), 2, 1, 1)[:, :, :2].flatten(1)[:, :6]",
        "torch.max_pool2d(input={x}.view({n}, 1, 2, 3), kernel_size=(2, 1)).repeat(1, 1, 1, 2).flatten(1)",
    ],
    "adaptive_max_pool1d": [
        "F.adaptive_max_pool1d({x}.unsqueeze(1), 3).flatten(1).repeat(1, 2)",
        "torch.adaptive_max_pool1d({x}.unsqueeze(1), output_size=3)[0].flatten(1).repeat(1, 2)",
        "F.adaptive_max_pool1d({x}.unsqueeze(1), 2, return_indices=True)[0].flatten(1).repeat(1, 3)",
    ],
    "topk": [
        "{x}.topk(3)[0].repeat(1, 2)",
        "torch.topk({x}, k=2, axis=1, largest=False).values.repeat(1, 3)",
        "{x}.topk(6, sorted=True, dim=1)[0]",
        "torch.topk({x}.view({n}, 2, 3), 2, 1)[0].flatten(1)",
    ],
    "sort": [
        "{x}.sort(1)[0]",
        "torch.sort({x}, axis=1, descending=True).values",
        "{x}.view({n}, 2, 3).sort(dim=1, stable=True).values.flatten(1)",
        "torch.ops.aten.sort.stable({x}, stable=True, descending=True, dim=1)[0]",
    ],
    "median": ["{x}.median(1, True)[0] + {y}", "torch.median({x}.view({n}, 3, 2), axis=1).values.repeat(1, 3)"],
    "kthvalue": [
        "{x}.kthvalue(2, keepdim=True)[0] + {y}",
        "torch.kthvalue({x}.view({n}, 3, 2), k=3, dim=1)[0].repeat(1, 3)",
    ],
    "argmax": ["{x} * F.one_hot({x}.argmax(1), 6)", "{x}.gather(1, torch.argmax({x}, axis=1, keepdims=True)) + {y}"],
    "argsort": ["{x}.gather(1, {y}.argsort(1))", "{x}.gather(1, torch.argsort({x}, axis=1, descending=True))"],
    "where": [
        "torch.where({x} > {s}, {x}, {y})",
        "{x}.where({y} <= 0, {c})",
        "torch.where({x} >= {c}, 2.0, -1.0) * {y}",
    ],
    "mask": [
        "{x} * ({y} > 0)",
        "{x} * torch.lt({y}, other={s})",
        "{x} * torch.ge(x1={x}, x2={y})",
        "{x}.masked_fill({y} < 0, {s})",
    ],
    "sign": ["{x} * {y}.sign()", "{x} + torch.sign({x})", "{x} * torch.sgn({y})"],
    "floor": [
        "{x} + {y}.floor()",
        "{x} * torch.round(3 * {y})",
        "{x} - torch.trunc(2 * {x})",
        "{x} * {y}.mul(2).long()",
    ],
    "eq": ["{x} + ({y} == 0)", "{x} * torch.ne({y}, 1.0)"],
    # affine
    "add": [
        "{x} + {y}",
        "torch.add({x}, {y}, alpha={s})",
        "torch.add(a={x}, x2={y})",
        "{x}.add({c})",
        "torch.add(other={y}, input={x}, alpha=3)",
    ],
    "sub": [
        "{x} - {y}",
        "torch.sub({x}, {y}, alpha=2)",
        "{s} - {x}",
        "torch.rsub({x}, {y})",
        "torch.subtract({c}, other={x})",
    ],
    "mul": ["{x} * {c}", "{s} * {x}", "torch.mul(other={c}, input={x})", "torch.multiply(x1={c}, x2={x})"],
    "div": ["{x} / 3", "torch.div({x}, other={c} + 3)", "torch.true_divide(x1={x}, x2={c} + 3)"],
    "neg": ["-{x}", "torch.negative(input={x})"],
    "linear": [
        "F.linear({x}, {m}, {c})",
        "F.linear(bias={c}, weight={m}, input={x})",
        "torch.ops.aten.linear({x}, {m})",
    ],
    "matmul": [
        "{x} @ {m}",
        "torch.matmul({x}, other={m})",
        "torch.mm(mat2={m}, input={x})",
        "({m} @ {x}.t()).t()",
        "{x}.matmul({m})",
    ],
    "addmm": ["torch.addmm({y}, {x}, {m}, beta=2)", "torch.addmm(input={c}, mat1={x}, mat2={m}, alpha={s})"],
    "baddbmm": [
        "torch.baddbmm({x}.view({n}, 2, 3), batch1={x}.view({n}, 2, 3), batch2={m}[:3, :3].expand({n}, 3, 3)).flatten(1)"
    ],
    "mv": ["torch.stack([torch.mv({m}, vec=row) for row in {x}])"],
    "einsum": ["torch.einsum('ni,ij->nj', {x}, {m})", "torch.einsum('ni,ij->nj', [{x}, {m}])"],
    "tensordot": ["torch.tensordot({x}, {m}, dims=1)", "torch.tensordot(b={m}, a={x}, dims=([1], [0]))"],
    "addcmul": ["torch.addcmul({x}, {y}, {c}, value={s})", "torch.addcmul(tensor2={x}, tensor1={c}, input={y})"],
    "lerp": ["torch.lerp({x}, {y}, 0.3)", "{x}.lerp(weight={c}, end={y})"],
    "cat": [
        "torch.cat([{x}[:, :3], {y}[:, 3:]], 1)",
        "torch.concat(tensors=[{x}[:, 3:], {y}[:, :3]], axis=1)",
        "torch.hstack([{x}[:, ::2], {y}[:, ::2]])",
    ],
    "stack": ["torch.stack([{x}[:, :3], {y}[:, 3:]], dim=2).flatten(1)", "torch.stack({x}.unbind(axis=1)[::-1], 1)"],
    "chunk": ["sum({x}.chunk(2, 1)).repeat(1, 2)", "torch.cat(torch.split({x}, [2, 4], dim=1)[::-1], axis=-1)"],
    "sum": [
        "{x}.sum(1, True) + {y}",
        "torch.sum({x}.view({n}, 2, 3), axis=1).repeat(1, 2)",
        "{x}.sum(keepdims=True, axis=-1) * {c}",
    ],
    "mean": ["{x} - {x}.mean(1, keepdim=True)", "torch.mean({x}.view({n}, 3, 2), axis=2).repeat(1, 2)"],
    "cumsum": ["{x}.cumsum(1)", "torch.cumsum({x}, axis=1)"],
    "diff": ["torch.diff({x}, dim=1, prepend={y}[:, :1])"],
    "flip": ["{x}.flip(1)", "torch.flip({x}, dims=(1,))", "torch.fliplr({x})"],
    "roll": ["{x}.roll(2, 1)", "torch.roll({x}, shifts=1, dims=1)"],
    "gather": [
        "{x}.gather(1, torch.tensor([[5, 4, 3, 2, 1, 0]]).expand({n}, 6))",
        "torch.take_along_dim({x}, torch.arange(6).view(1, 6).flip(1), dim=1)",
    ],
    "index": [
        "{x}[:, [5, 0, 1, 2, 3, 3]]",
        "{x}.index_select(1, torch.tensor([1, 1, 0, 5, 4, 2]))",
        "{x}[:, None].squeeze(axis=1)",
    ],
    "scatter": [
        "{x}.scatter(1, torch.zeros({n}, 1, dtype=torch.long), {y})",
        "{x}.scatter_add(1, torch.ones({n}, 2, dtype=torch.long), {y})",
    ],
    "index_add": [
        "{x}.index_add(1, torch.tensor([0, 2]), {y}[:, :2], alpha=2)",
        "{x}.index_copy(1, torch.tensor([3]), {y}[:, :1])",
    ],
    "transpose": [
        "{x}.view({n}, 2, 3).transpose(1, 2).flatten(1)",
        "{x}.view({n}, 2, 3).mT.reshape({n}, 6)",
        "torch.permute({x}.view({n}, 3, 2), (0, 2, 1)).flatten(1)",
    ],
    "pad": [
        "F.pad({x}[:, 1:], (1, 0), value={s})",
        "F.pad(input={x}.unsqueeze(1), pad=(1, 1), mode='reflect').flatten(1)[:, :6]",
    ],
    "tril": ["torch.tril({x}.view({n}, 2, 3), diagonal=0).flatten(1)", "{x}.view({n}, 2, 3).triu(1).flatten(1) + {y}"],
    "repeat": ["{x}[:, :2].repeat(1, 3)", "{x}[:, :3].repeat_interleave(2, dim=1)", "torch.tile({x}[:, :3], (1, 2))"],
    "unfold": ["{x}.unfold(1, 3, 3).flatten(1)", "{x}.unfold(dimension=1, size=2, step=2).flip(2).flatten(1)"],
    "conv1d": [
        "F.conv1d({x}.unsqueeze(1), {c}[:3].view(1, 1, 3), padding=1).flatten(1)",
        "F.conv1d(weight={c}[:3].view(1, 1, 3), bias={c}[:1], padding=1, input={x}.unsqueeze(1)).flatten(1)",
    ],
    "conv_transpose1d": ["F.conv_transpose1d({x}.unsqueeze(1)[:, :, :3], {c}[:2].view(1, 1, 2), stride=2).flatten(1)"],
    "avg_pool1d": [
        "F.avg_pool1d({x}.unsqueeze(1), 3, 1, 1, count_include_pad=False).flatten(1)",
        "F.adaptive_avg_pool1d({x}.unsqueeze(1), output_size=3).flatten(1).repeat(1, 2)",
    ],
    "interpolate": ["F.interpolate({x}[:, :3].unsqueeze(1), size=6, mode='linear').flatten(1)"],
    "batch_norm": [
        "F.batch_norm({x}, {c}, {c} + 3, weight={c}, eps=0.1)",
        "torch.batch_norm({x}, {c}, None, {c}, {c} + 3, False, 0.1, 0.1, False)",
    ],
    "bilinear": ["F.bilinear({x}, {c}.expand({n}, 6), {m}.expand(6, 6, 6))"],
    "complex": [
        "{x} + ({x} * 1j).imag",
        "torch.complex({x}, {y}).imag",
        "torch.view_as_real(torch.complex({x}, {y}) * (1 + 2j))[..., 0]",
        "(({x} + 1j * {y}).conj() * 2j).real",
    ],
    "cast": ["{x}.double()", "{x}.to(torch.complex128).real", "{x}.type_as({y})", "{x}.to(dtype=torch.float64)"],
    "view_as": ["{x}.view_as({y})", "{x}.expand_as({y})", "{x}.reshape_as({y})"],
    "detach": ["{x} + {y}.detach()", "{x}.data * 2", "torch.detach({x})"],
    "contiguous": [
        "{x}.t().contiguous().t()",
        "{x}.clone()",
        "{x}.view({n}, 2, 3, 1).contiguous(memory_format=torch.channels_last).flatten(1)",
    ],
    # secants and frozen values
    "elu": [
        "F.elu({x}, {s})",
        "torch.ops.aten.elu({x}, 1.0, 2.0, 0.5)",
        "torch._C._nn.elu({x}, scale=2.0, alpha={s})",
        "F.elu(alpha=1.5, input={x})",
    ],
    "celu": ["F.celu({x}, {s})", "torch.celu({x}, alpha=0.7)"],
    "selu": ["F.selu({x})", "torch.selu(input={x})"],
    "gelu": ["F.gelu({x})", "F.gelu({x}, approximate='tanh')", "torch.ops.aten.gelu({x}, approximate='tanh')"],
    "silu": ["F.silu({x})", "{x} * torch.sigmoid({x})", "torch.ops.aten.silu.default({x})"],
    "mish": ["F.mish({x})"],
    "softplus": ["F.softplus({x})", "F.softplus({x}, 2.0, 1.0)", "F.softplus({x}, threshold=0.5, beta={s})"],
    "sigmoid": ["{x}.sigmoid()", "torch.special.expit({x})", "F.logsigmoid({x})"],
    "tanh": ["{x}.tanh()", "F.tanhshrink({x})", "F.softsign({x})", "torch.sin({x})"],
    "hardswish": ["F.hardswish({x})", "F.hardsigmoid({x})"],
    "glu": [
        "F.glu({x}, dim=1).repeat(1, 2)",
        "torch._C._nn.glu({x}.view({n}, 2, 3), axis=1).repeat(1, 2, 1).flatten(1)",
    ],
    "product": [
        "{x} * {y}",
        "torch.mul(other={y}, input={x})",
        "torch.einsum('ni,ni->ni', {x}, {y})",
        "torch.addcmul({x}, {y}, {x}, value={s})",
        "torch.bmm({x}.view({n}, 2, 3), {y}.view({n}, 3, 2)).flatten(1).repeat(1, 2)[:, :6]",
        "{x} / (2 + {y}.abs())",
        "torch.lerp({x}, {y}, {x}.sigmoid())",
        "{x} ** 3",
    ],
    "softmax": ["{x} * torch.softmax({y}, axis=1)", "{x} * F.softmax({y}, dim=-1)"],
    "norm": [
        "{x} / (1 + {y}.norm(dim=1, keepdim=True))",
        "F.normalize({x}, dim=1)",
        "{x} * torch.rsqrt({x}.square().mean(1, keepdims=True) + 1)",
    ],
    "layer_norm": [
        "F.layer_norm({x}, (6,), {c}, eps=0.1)",
        "torch.layer_norm({x}, [6], None, {c}, 0.2)",
        "F.layer_norm(normalized_shape=[6], bias={c}, input={x})",
    ],
    "rms_norm": ["F.rms_norm({x}, (6,))", "torch.rms_norm({x}, [6], weight={c}, eps=0.3)"],
    "group_norm": ["F.group_norm({x}, 2, eps=0.1)", "torch.group_norm({x}, num_groups=3, weight={c}, bias={c})"],
    "instance_norm": [
        "F.instance_norm({x}.view({n}, 2, 3), eps=0.1).flatten(1)",
        "torch.instance_norm({x}.view({n}, 2, 3), {c}[:2], {c}[2:4], None, None, True, 0.1, 0.2, False).flatten(1)",
    ],
    # gradients switched off
    "no_grad": [
        "no_grad(lambda: F.relu({x}) + {y})",
        "inference_mode(lambda: {x} * 2 - {y})",
        "grad_disabled(lambda: {x}.abs())",
        "torch.no_grad()(F.relu)({x})",
    ],
    "hook": ["hooked({x})"],
    # calls that cannot be seen, or that leave PyTorch: refused
    "script": ["{x} + scripted({y})", "torch.no_grad()(scripted)({x})"],
    "leave": [
        "{x} * float({y}[0, 0])",
        "{x} + torch.from_numpy({y}.detach().numpy().copy())",
        "{x} + {y}.view(torch.int64).view(torch.float64)",
        "{x} + gradient({y})",
    ],
}

# Writes in place and live views; {v} is a new name. A statement may make several values.
WRITES = [
    "{v} = {x}[:]; {x}.mul_({s})",
    "{v} = {x}[:, :]; {x}.pow_(2)",
    "{v} = {x} + 0; {v}.relu_()",
    "{v} = {x} * 1; torch.ops.aten.relu_.default({v})",
    "{v} = {x} * 1; torch.relu_(input={v})",
    "{v} = {x} * 1; F.leaky_relu({v}, {s}, True)",
    "{v} = {x} * 1; F.hardtanh({v}, -0.4, 0.4, inplace=True)",
    "{v} = {x}.clone(); {v}[:, 0] = {y}[:, 1]",
    "{v} = {x}.clone(); {v}[:, 2:4].copy_({y}[:, :2])",
    "{v} = {x}.clone(); {v}[{v} < 0] = {s}",
    "{v} = {x}.clone(); {v} += {y}; {v} *= 2; {v} -= {c}; {v} /= 4",
    "{v} = {x} * 1; {v}.mul_({y}); {v} *= {v}",
    "{v} = {x}.view({n}, 2, 3); {v}[:, 0].mul_(2); {v} = {v}.flatten(1)",
    "{v} = {x}.t(); {x}.add_({y}); {v} = {v}.t()",
    "{v} = torch.zeros({n}, 6, dtype=torch.float64); w = {v}[:, 3:]; {v}[:, 3:] = {x}[:, :3]; {v}[:, :3] = w",
    "{v} = torch.zeros({n}, 6, dtype=torch.float64); w = {v}.detach(); w.copy_({x}); {v} = {v} + {y}",
    "{v} = {x} * 1; w = {v}[:, :2]; u = {v}[:, 2:]; w.exp_(); u.copy_({y}[:, 2:])",
    "{v} = {x} * 1; w = {v}[:, :2]; {v}.exp_(); {v} = {x} + w.sum(1, keepdim=True)",
    "{v} = F.max_pool1d({x}.unsqueeze(1), 3, 1, 1).flatten(1); {x}.neg_()",
    "{v} = {x}.sort(1)[0]; {x}.zero_(); {x}.add_({y})",
    "{v} = {x}.detach(); {x}.mul_(2)",
    "{v} = {x}.data; {v}.abs_()",
    "{v} = {x} * 1; w = {v}.unbind(1)[2]; {v}[:, 2].fill_({s}); {v} = {v} + w.unsqueeze(1)",
    "{v} = ({x} * 1).masked_fill_({y} > 0, {s})",
    "{v} = {x} * 1; {v}.clamp_(min=-0.2).clamp_(max={s})",
    "{v} = ({x} * 1).squeeze_(0).unsqueeze_(1).squeeze_(1)",
    "{v} = {x} * 1; w = {v}.view({n}, 3, 2)[..., 0]; {v}[:, ::2].floor_(); {v} = {v} + w.repeat(1, 2)",
    "{v} = torch.view_as_complex({x}.view({n}, 3, 2).clone()); w = torch.view_as_real({v}); {v}.mul_(1j); {v} = w.flatten(1)",
]


def hooked(x):
    h = x * 2
    if h.requires_grad:
        h.register_hook(lambda g: -g)
    return h


def gradient(x):
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        return torch.autograd.grad((z**3).sum(), z)[0]


def inside(context):
    def run(function):
        with context():
            return function()

    return run


def scripted_swish():
    if not hasattr(scripted_swish, "kept"):
        scripted_swish.kept = torch.jit.script(_swish)
    return scripted_swish.kept


def _swish(x):
    return x * torch.sigmoid(x)


def of_seed(seed: int, length: int | None = None) -> str:
    """Draw a program: statements on values h0, h1, ..., and the names that are summed up."""
    draw = random.Random(seed)
    lines, values = [], ["h0"]
    writes_left = 1 if seed % 3 == 0 else 0  # a third of the programs write in place at least once
    length = length or draw.randint(1, 6)
    for step in range(length):
        fields = {
            "x": draw.choice(values[-3:]),
            "y": draw.choice(values),
            "c": f"c{draw.randint(0, 3)}",
            "m": f"m{draw.randint(0, 1)}",
            "s": draw.choice(["0.3", "0.25", "1.7"]),
            "n": "len(h0)",
            "v": f"h{len(lines) + 1}",
        }
        if seed % 3 == 0 and (draw.random() < 0.5 or step + writes_left == length):
            writes_left = 0
            if fields["x"] == "h0":  # the caller's own tensor
                lines.append(f"{fields['v']} = F.linear(h0, {fields['m']})")
                values.append(fields["v"])
                fields |= {"x": fields["v"], "v": f"h{len(lines) + 1}"}
            lines.append(draw.choice(WRITES).format(**fields))
        else:
            template = draw.choice(OPERATIONS[draw.choice(sorted(OPERATIONS))])
            lines.append(f"{fields['v']} = {template.format(**fields)}")
        values.append(fields["v"])
    kept = {values[-1], *draw.sample(values[1:], min(2, len(values) - 1))}
    return "\n".join([*lines, "out = " + " + ".join(sorted(kept))])


class Program(nn.Module):
    """A program as a module."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.code = text, compile(text.replace("; ", "\n"), "<program>", "exec")
        generator = torch.Generator().manual_seed(len(text))
        for i in range(4):
            self.register_buffer(f"c{i}", torch.randn(D, dtype=DTYPE, generator=generator))
        for i in range(2):
            self.register_buffer(f"m{i}", torch.randn(D, D, dtype=DTYPE, generator=generator) / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        names = {
            "torch": torch,
            "F": F,
            "h0": x,
            "hooked": hooked,
            "gradient": gradient,
            "no_grad": inside(torch.no_grad),
            "inference_mode": inside(torch.inference_mode),
            "grad_disabled": inside(lambda: torch.autograd.set_grad_enabled(False)),
            **({"scripted": scripted_swish()} if "scripted" in self.text else {}),
            **dict(self.named_buffers()),
        }
        exec(self.code, names)
        return names["out"]


def differences(model: nn.Module, x: torch.Tensor, step: float) -> torch.Tensor:
    """Return the Jacobian (n, outputs, d) of each sample by central differences."""
    n, d = x.shape
    shifts = step * torch.eye(d, dtype=x.dtype)
    with torch.no_grad():
        sides = [model((x.unsqueeze(1) + sign * shifts).reshape(n * d, d)).view(n, d, -1) for sign in (1, -1)]
    return ((sides[0] - sides[1]) / (2 * step)).transpose(1, 2)


def verdict(text: str, seed: int = 0) -> str:
    """Return 'exact', 'secant', 'refused' or 'fails' (the model itself), or 'WRONG: ...' for a wrong map in silence."""
    model, generator = Program(text), torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, dtype=DTYPE, generator=generator)
    try:
        with torch.no_grad():
            wanted = model(x.clone())
        alone = model(x[:1].clone())
        if not torch.allclose(alone, wanted[:1]) or not wanted.isfinite().all() or wanted.dtype != DTYPE:
            return "fails"
    except (RuntimeError, TypeError, IndexError, ValueError):
        return "fails"
    try:
        affine, report = linearize(model, x), supported_ops(model, x)
        first = affine.bias if seed % 2 else affine.weight  # whichever is read first, the map is the same
        weight, bias = affine.weight, affine.bias
    except UnsupportedOperation:
        return "refused"
    scale = max(1.0, float(wanted.abs().max()), float(weight.abs().max()))
    del first
    residual = torch.einsum("nkd,nd->nk", weight, x) + bias - wanted
    if float(residual.abs().max()) > 1e-9 * scale:
        return f"WRONG: W x + c is {float(residual.abs().max()):.3g} off"
    if not report.exact:
        return "secant"
    for step in (1e-6, 1e-7, 1e-5):
        error = float((weight - differences(model, x, step)).abs().max())
        if error <= 1e-5 * scale:
            return "exact"
    return f"WRONG: W is {error:.3g} off"
