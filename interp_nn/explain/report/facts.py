"""What a report knows of a network: its inputs, outputs, predictions and names, and the samples that it shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from interp_nn.explain.estimator import feature_names, to_tensor
from interp_nn.explain.following.gate_record import OperationReport, supported_ops
from interp_nn.explain.following.scikit_learn import from_estimator
from interp_nn.explain.linear.affine_map import AffineMap, linearize
from interp_nn.nn.base import LinearForm

Kind = Literal["table", "image", "tokens", "other"]
MOST_SAMPLES = 200  # that are linearized


class Facts:
    """A network at samples x, with the results that several sections share.

    Args:
        model: The network, in evaluation mode.
        x: Samples: features (n, d), images (n, channels, h, w), or token ids (n, t) of an integer dtype.
        y: Classes (n,) of an integer dtype, values (n,) of a floating dtype, or None.
        features: Names of the d features, or None.
        classes: Names of the outputs, or None.
        tokenizer: For token ids: gives their text, see `token_contributions`.

    Raises:
        TypeError: A model or samples of another type.
        ValueError: Shapes, or numbers of names, that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        y: Any = None,
        features: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        tokenizer: Any = None,
    ) -> None:
        named = feature_names(x)
        model, x = from_estimator(model, x)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
        self.model, self.tokenizer = model, tokenizer
        self.x = x if isinstance(x, Tensor) else to_tensor(x, "x")
        if self.x.dim() < 2 or not len(self.x):
            raise ValueError(f"x: got shape {tuple(self.x.shape)}, want samples (n, ...), n > 0")
        looked_up = any(isinstance(module, nn.Embedding) for module in model.modules())
        integer = looked_up and not self.x.dtype.is_floating_point
        shapes: dict[int, Kind] = {2: "table", 4: "image"}
        self.kind: Kind = "tokens" if integer else shapes.get(self.x.dim(), "other")
        if not integer:
            parameter = next(model.parameters(), None)
            self.x = self.x if parameter is None else self.x.to(parameter.device, parameter.dtype)
        self.y = None if y is None else y if isinstance(y, Tensor) else to_tensor(y, "y")
        if self.y is not None and self.y.shape != (len(self.x),):
            raise ValueError(f"y: got shape {tuple(self.y.shape)}, want ({len(self.x)},), one value for each sample")
        given = features if features is not None else None if named is None else list(named)
        self.features = None if given is None else [str(name) for name in given]
        if self.features is not None and (self.kind != "table" or len(self.features) != self.x.shape[1]):
            raise ValueError(
                f"feature_names: got {len(self.features)}, want one for each feature of x {tuple(self.x.shape)}"
            )
        m = self.outputs.shape[1]
        self.classes = [str(i) for i in range(m)] if classes is None else [str(name) for name in classes]
        binary = m == 1 and len(self.classes) == 2
        if len(self.classes) != m and not binary:
            raise ValueError(f"class_names: got {len(self.classes)}, want {m} for outputs {tuple(self.outputs.shape)}")
        if self.y is not None and self.classifies and not 0 <= int(self.y.min()) <= int(self.y.max()) < max(m, 2):
            raise ValueError(f"y: got classes {int(self.y.min())} to {int(self.y.max())}, want 0 to {max(m, 2) - 1}")

    @cached_property
    def outputs(self) -> Tensor:
        """The outputs (n, m); of a language model the logits at the last position."""
        parts = []
        with torch.no_grad():
            for part in self.x.split(256):
                found = self.model(part)
                found = found if isinstance(found, Tensor) else getattr(found, "logits", None)
                if not isinstance(found, Tensor):
                    raise TypeError("model: returned no tensor of outputs and no `logits`, want one of them")
                parts.append(
                    found[:, -1] if self.kind == "tokens" and found.dim() == 3 else found.reshape(len(part), -1)
                )
        return torch.cat(parts)

    @property
    def classifies(self) -> bool:
        """True if the outputs are read as logits of classes: there are several, or y has integer classes."""
        return self.outputs.shape[1] > 1 or (self.y is not None and not self.y.dtype.is_floating_point)

    @cached_property
    def predicted(self) -> Tensor:
        """The predicted class of each sample, (n,) int64; with one output, 1 where it is positive."""
        outputs = self.outputs
        return (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)

    @cached_property
    def margin(self) -> Tensor:
        """The predicted class's logit less the next one's, (n,); with one output, its size."""
        if self.outputs.shape[1] == 1:
            return self.outputs[:, 0].abs()
        top = self.outputs.topk(2, 1).values
        return top[:, 0] - top[:, 1]

    @cached_property
    def explained(self) -> Tensor:
        """What is explained, (n,): of several outputs the predicted class's less the `other_class`'s; else the output."""
        if self.outputs.shape[1] == 1:
            return self.outputs[:, 0]
        first, second = (self.outputs.gather(1, index[:, None])[:, 0] for index in (self.predicted, self.other_class))
        return first - second

    @cached_property
    def next_class(self) -> Tensor:
        """The class with the second largest output, (n,) int64; with one output, the other one."""
        if self.outputs.shape[1] == 1:
            return 1 - self.predicted
        return self.outputs.scatter(1, self.predicted[:, None], -torch.inf).argmax(1)

    @cached_property
    def wrong(self) -> Tensor:
        """True for a sample whose predicted class is not its true class, (n,) bool; False for all where this is not known."""
        if self.y is None or not self.classifies:
            return torch.zeros_like(self.predicted, dtype=torch.bool)
        return self.predicted != self.y

    @cached_property
    def other_class(self) -> Tensor:
        """The class that the predicted one is explained over, (n,) int64: the true one of a wrong sample, else the next one."""
        return (
            self.next_class if self.y is None else torch.where(self.wrong, self.y.to(self.predicted), self.next_class)
        )

    def explained_name(self, sample: int) -> str:
        """Return the name of what is explained for a sample."""
        if self.outputs.shape[1] == 1:
            return "the output"
        return f"{self.class_name(int(self.predicted[sample]))} over {self.class_name(int(self.other_class[sample]))}"

    @cached_property
    def operations(self) -> OperationReport:
        """The operations of the model."""
        return supported_ops(self.model, self.x[:2])

    @cached_property
    def shown(self) -> dict[str, int]:
        """The samples that are shown, by why: the first that a rule finds, each sample once.

        Typical: the median margin among right predictions (all, without y). Borderline: the smallest margin. Wrong: the largest
        margin among wrong predictions. Right: the largest margin among right ones; without y its name is "largest margin".
        """
        right = torch.ones_like(self.predicted, dtype=torch.bool)
        largest = "largest margin"
        if self.y is not None and self.classifies:
            right, largest = ~self.wrong, "right"
        order = self.margin.argsort()
        good, bad = order[right[order]], order[~right[order]]
        found: dict[str, int] = {}
        for why, candidates in (
            ("typical", good[len(good) // 2 :]),
            ("borderline", order),
            ("wrong", bad.flip(0)),
            (largest, good.flip(0)),
        ):
            taken = [int(i) for i in candidates[:3] if int(i) not in found.values()]
            if taken:
                found[why] = taken[0]
        return found

    @cached_property
    def some(self) -> Tensor:
        """Indices of the samples that are linearized: at most 200, evenly spaced, and those that are shown."""
        most = MOST_SAMPLES if self.x[0].numel() <= 4096 else 8
        spaced = torch.linspace(0, len(self.x) - 1, min(most, len(self.x))).long()
        return torch.cat((spaced, torch.tensor(list(self.shown.values())))).unique()

    @cached_property
    def maps(self) -> AffineMap:
        """The maps of the samples `some` to what is explained."""
        x = self.x[self.some]
        if self.outputs.shape[1] == 1:
            return linearize(self.model, x, lambda output: output.reshape(len(output)))
        rows, first, second = torch.arange(len(x)), self.predicted[self.some], self.other_class[self.some]
        return linearize(self.model, x, lambda output: output[rows, first] - output[rows, second])

    @cached_property
    def normed(self) -> dict[str, str]:
        """By linear layer or convolution, the batch norm that takes its output; layers and norms that are called once.

        Only modules are found, so that a model of functional calls has none.
        """
        made: list[tuple[str, Tensor, int]] = []  # outputs are kept, so that no other tensor gets their identity
        taken: list[tuple[str, str | None]] = []

        def note(name: str, module: nn.Module) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if isinstance(module, _BatchNorm):
                    own = (layer for layer, t, version in made if args and t is args[0] and t._version == version)
                    taken.append((name, next(own, None)))
                else:
                    made.append((name, output, output._version))

            return hook

        known = (nn.Linear, _ConvNd, LinearForm, _BatchNorm)
        modules = ((name, module) for name, module in self.model.named_modules() if isinstance(module, known))
        hooks = [module.register_forward_hook(note(name, module)) for name, module in modules]
        try:
            with torch.inference_mode(False), torch.no_grad():
                self.model(self.x[:1])
        finally:
            for hook in hooks:
                hook.remove()
        calls = Counter(name for name, *_ in (*made, *taken))
        return {layer: norm for norm, layer in taken if layer is not None and calls[layer] == calls[norm] == 1}

    @cached_property
    def contributions(self) -> Tensor:
        """What each input adds to what is explained, (len(some), *input)."""
        return self.maps.contributions(self.x[self.some])

    @cached_property
    def decided(self) -> Tensor:
        """True for samples (len(some),) whose answer needs the constant: without it, what is explained changes its sign."""
        value = self.explained[self.some]
        return (value > 0) != (value - self.maps.bias > 0)

    def place(self, sample: int) -> int:
        """Return the place of a sample among `some`."""
        return int((self.some == sample).nonzero()[0])

    def class_name(self, index: int) -> str:
        """Return the name of a class."""
        if self.tokenizer is not None and self.kind == "tokens":
            decode = getattr(self.tokenizer, "decode", None)
            return repr(decode([index]) if decode is not None else self.tokenizer(index))
        return self.classes[index] if index < len(self.classes) else str(index)

    def feature_list(self) -> list[str]:
        """Return the names of a table's features."""
        return self.features or [f"x{j}" for j in range(self.x.shape[1])]
