"""Small networks to explain, in evaluation mode and, by default, in double precision."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut; one ReLU module, in place, called twice, and an in-place addition."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet18's shape: stem with max-pooling, four stages of two blocks, global average, linear head."""

    def __init__(self, width=8, classes=10, stem_stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for stage in range(4):
            blocks = [
                BasicBlock(widths[stage], widths[stage + 1], 1 if stage == 0 else 2),
                BasicBlock(widths[stage + 1], widths[stage + 1], 1),
            ]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def seasoned(model, dtype=torch.float64):
    """Return the model in evaluation mode, with random statistics, weights and shifts in its batch norms."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model.to(dtype).eval()


def resnet(width=8, dtype=torch.float64, classes=10):
    """Return a `ResNet` that has seen something."""
    return seasoned(ResNet(width, classes), dtype)


class Functional(nn.Module):
    """Calls F.relu, reuses one ReLU module and one linear layer, and concatenates."""

    def __init__(self, inputs=6, width=12, outputs=4):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.again = nn.Linear(width, width)
        self.relu = nn.ReLU()
        self.head = nn.Linear(2 * width, outputs)

    def forward(self, x):
        a = F.relu(self.first(x))
        b = self.relu(self.again(a))
        b = self.relu(self.again(b) - 0.3)
        return self.head(torch.cat([a, b], 1))


def functional(dtype=torch.float64):
    """Return a `Functional` network."""
    return Functional().to(dtype).eval()


class PreNorm(nn.Module):
    """A pre-norm transformer block: attention and a GELU feed-forward, each after a layer norm and beside a shortcut."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.feed(self.norm2(x))


def transformer(dtype=torch.float64):
    """Return a `PreNorm` block with random parameters."""
    model = PreNorm()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.to(dtype).eval()


class LanguageModel(nn.Module):
    """Token ids (n, t) to logits (n, t, vocabulary): blocks of RMS norm, grouped-query attention with rotary positions, SwiGLU.

    With `held`, the scales of norms, the attention's weights and the activated gates are detached, so that autograd's Jacobian is
    that of the network with these factors held.
    """

    def __init__(self, vocabulary=11, width=8, heads=2, blocks=2):
        super().__init__()
        self.heads, self.held = heads, False
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "query": nn.Linear(width, width),
                    "key": nn.Linear(width, width // heads),
                    "value": nn.Linear(width, width // heads),
                    "out": nn.Linear(width, width, bias=False),
                    "gate": nn.Linear(width, 2 * width, bias=False),
                    "up": nn.Linear(width, 2 * width, bias=False),
                    "down": nn.Linear(2 * width, width, bias=False),
                }
            )
            for _ in range(blocks)
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(width) + 0.5) for _ in range(2 * blocks + 1))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def keep(self, t):
        return t.detach() if self.held else t

    def norm(self, x, scale):
        return scale * (x * self.keep(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))

    @staticmethod
    def rotated(x):
        """Rotary positions of x (n, heads, t, d)."""
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[-2], dtype=x.dtype).unsqueeze(1) * 100.0 ** -(
            torch.arange(half, dtype=x.dtype) / half
        )
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def attention(self, x, block):
        query = self.rotated(block["query"](x).unflatten(-1, (self.heads, -1)).transpose(1, 2))
        key = self.rotated(block["key"](x).unsqueeze(1)).repeat_interleave(self.heads, 1)
        value = block["value"](x).unsqueeze(1).expand(-1, self.heads, -1, -1)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = self.keep(scores.masked_fill(future, -torch.inf).softmax(-1))
        return block["out"]((weights @ value).transpose(1, 2).flatten(2))

    def forward(self, ids):
        return self.of_embeddings(self.tokens(ids))

    def of_embeddings(self, x):
        for i, block in enumerate(self.blocks):
            x = x + self.attention(self.norm(x, self.scales[2 * i]), block)
            h = self.norm(x, self.scales[2 * i + 1])
            x = x + block["down"](self.keep(F.silu(block["gate"](h))) * block["up"](h))
        return self.head(self.norm(x, self.scales[-1]))


def language_model(dtype=torch.float64):
    """Return a `LanguageModel` of random weights."""
    return LanguageModel().to(dtype).eval()


def mlp(*widths, bias=True, dtype=torch.float64):
    """Return linear layers with ReLU between them."""
    layers = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o, bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype).eval()
