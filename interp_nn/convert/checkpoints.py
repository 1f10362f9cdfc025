"""Checkpoints: of the reference network, of plain models and of interp_nn 0.1, and in the format of transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interp_nn.convert.models import fold, summarize
from interp_nn.nn.base import Freezable, LinearForm, b_of_weight
from interp_nn.nn.heads import SummaryHead
from interp_nn.nn.polynomial_layer import PolynomialLayer, solve

_SOURCES = ("linear", "summary-0.1")


def head_from_reference(
    state_dict: Mapping[str, Tensor], layer: str | None = None, output: str = "output"
) -> SummaryHead:
    """Make a SummaryHead from a checkpoint of the reference network, with the same two logits.

    The reference code forms b by sending an identity matrix through nn.Linear(d, k), so the bias c of that layer shifts
    every row of b: b = Wᵀ + 1 cᵀ.

    Args:
        state_dict: The checkpoint's state_dict.
        layer: Name of the summary layer in the checkpoint ("classifier" for VGG, "summary_layer1" for the small CNN). None
            takes the only one.
        output: Name of the output layer.

    Returns:
        The head, in the checkpoint's dtype and on its device.

    Raises:
        ValueError: The checkpoint has no such layer, or several and `layer` is None.

    Example:
        >>> layers = {"classifier.beta_func1": torch.nn.Linear(8, 4), "output": torch.nn.Linear(4, 3)}
        >>> head_from_reference({f"{n}.{p}": t.detach() for n, m in layers.items() for p, t in m.named_parameters()})
        SummaryHead(
          in_features=8, out_features=4
          (output): Linear(in_features=4, out_features=3, bias=True)
        )

    Source: AskExplain/Interpretable-Neural-Net (MIT).
    """
    suffix = ".beta_func1.weight"
    found = [name.removesuffix(suffix) for name in state_dict if name.endswith(suffix)]
    if layer is None and len(found) == 1:
        (layer,) = found
    if layer not in found:
        raise ValueError(f"layer: got {layer!r}, want one of the summary layers in the checkpoint: {found}")
    if f"{output}.weight" not in state_dict:
        raise ValueError(f"output: got {output!r}, but the checkpoint has no {output}.weight")
    weight = state_dict[layer + suffix] + state_dict[f"{layer}.beta_func1.bias"].unsqueeze(1)
    a, c = state_dict[f"{output}.weight"], state_dict[f"{output}.bias"]
    head = SummaryHead(weight.shape[1], weight.shape[0], a.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        head.b.copy_(weight.t())
        head.output.weight.copy_(a)
        head.output.bias.copy_(c)
    return head


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, source: str, strict: bool = True) -> Any:
    """Load a state whose summary layers have a `weight` where the model has b, and nothing else that differs.

    The model's own `load_state_dict` refuses such a state.

    Args:
        model: A model with summary layers.
        state: The state; it is not changed.
        source: "linear" for the state of the plain model: the layers get the same outputs, as by `summarize`. "summary-0.1" for
            the state of a model with summary layers of interp_nn 0.1, whose `weight` was b.
        strict: As in PyTorch's `load_state_dict`.

    Returns:
        The missing and the unexpected keys, as PyTorch's `load_state_dict` returns them.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: `source` is something else; a weight belongs to a parametrized b, or is not finite; for "linear", a weight
            belongs to a layer without a plain equal (SummaryLayer, SummaryHead). The message names the key.
        RuntimeError: As by PyTorch's `load_state_dict`.

    Example:
        >>> from interp_nn.nn import SummaryLinear
        >>> plain, model, x = nn.Linear(4, 3), SummaryLinear(4, 3), torch.ones(2, 4)
        >>> load_state_dict(model, plain.state_dict(), source="linear")
        <All keys matched successfully>
        >>> torch.allclose(model(x), plain(x), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    if source not in _SOURCES:
        raise ValueError(f"source: got {source!r}, want 'linear' or 'summary-0.1'")
    own = dict(state)
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = path + "." * bool(path)
        if not isinstance(module, LinearForm) or prefix + "weight" not in own:
            continue
        weight = own.pop(prefix + "weight")
        if source == "linear" and not isinstance(module, Freezable):
            raise ValueError(
                f"{prefix}weight: belongs to a {type(module).__name__}, which no plain layer's weight fits; load it into an "
                "nn.Linear, and make a head of that by SummaryHead.from_linear(linear)"
            )
        if parametrize.is_parametrized(module, "b"):
            raise ValueError(f"{prefix}weight: belongs to a parametrized layer; load the state before `constrain`")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{prefix}weight: is not finite")
        own |= {prefix + name: value for name, value in _values(module, weight, source, prefix).items()}
    return model.load_state_dict(own, strict)


def _values(layer: LinearForm, weight: Tensor, source: str, prefix: str) -> dict[str, Tensor]:
    """Return the entries of a layer's state for a `weight`."""
    if not isinstance(layer, PolynomialLayer) or layer.options().plain:
        return {"b": b_of_weight(weight, layer.groups, root=source == "linear")}
    if source != "linear":
        raise ValueError(f"{prefix}weight: belongs to a layer with polynomial={layer.polynomial!r}, which 0.1 had not")
    solved = solve(weight, layer.groups, layer.options(), f"{prefix}weight")
    values = {"b": solved.b}
    if layer.gain is not None:
        values["gain"] = solved.gain.to(weight.dtype)
    if layer.normalize and solved.norm is not None:
        values["scale"] = (1 / torch.where(solved.norm > 0, solved.norm, 1.0)).to(weight.dtype).view(layer.scale.shape)
        values |= {"u": torch.zeros_like(layer.u), "v": torch.zeros_like(layer.v)}
    return values


def save_pretrained(model: Any, directory: Any, **options: Any) -> None:
    """Save a converted model of transformers, folded, with a mark of the layers that `from_pretrained` converts again.

    The saved weights are effective weights, so that transformers' own from_pretrained loads a plain model with the same outputs.
    The mark is the entry `interp_nn` of config.json. Constraints are not saved.

    Args:
        model: A model with `config` and `save_pretrained`; it is not changed.
        directory: The folder.
        options: Passed on to the model's `save_pretrained`.

    Raises:
        TypeError: `model` has no `config` or no `save_pretrained`.
        ValueError: The model has no summary layer, one that cannot be folded, which the message names, or layers with different
            polynomials.

    Example:
        >>> save_pretrained(nn.Linear(2, 2), "checkpoint")
        Traceback (most recent call last):
        TypeError: model: got Linear, want a model of transformers, with config and save_pretrained
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"model: got {type(model).__name__}, want a model of transformers, with config and save_pretrained"
        )
    plain: Any = copy.deepcopy(model)
    report = fold(plain)
    if report.skipped:
        name, kind, reason = report.skipped[0]
        raise ValueError(f"model: {name} ({kind}) cannot be folded: {reason}")
    if not report.converted:
        raise ValueError("model: has no summary layer; use its own save_pretrained")
    layers = dict(model.named_modules(remove_duplicate=False))
    found = [layers[row.name].options().arguments() for row in report.converted]
    if any(arguments != found[0] for arguments in found):
        raise ValueError("model: has summary layers with different polynomials; want one for all")
    plain.config.interp_nn = {"summary_layers": [row.name for row in report.converted], **found[0]}
    plain.save_pretrained(directory, **options)


def from_pretrained(kind: Any, directory: Any, **options: Any) -> Any:
    """Load a model that `save_pretrained` saved, and convert the same layers again.

    b comes back as the cube root of the saved weight, which is the saved model's b up to rounding.

    Args:
        kind: The model's class, or any other object whose `from_pretrained` returns the model.
        directory: The folder.
        options: Passed on to `kind.from_pretrained`.

    Returns:
        The model.

    Raises:
        ValueError: The folder has no mark of `save_pretrained`, or a marked layer cannot be converted.

    Example:
        >>> class AutoModel:
        ...     def from_pretrained(directory):
        ...         return nn.Linear(2, 2)
        >>> from_pretrained(AutoModel, "checkpoint")
        Traceback (most recent call last):
        ValueError: directory: checkpoint was not saved by interp_nn.convert.save_pretrained; use summarize
    """
    model = kind.from_pretrained(directory, **options)
    mark = getattr(getattr(model, "config", None), "interp_nn", None)
    if not isinstance(mark, dict) or "summary_layers" not in mark:
        raise ValueError(f"directory: {directory} was not saved by interp_nn.convert.save_pretrained; use summarize")
    options = {name: value for name, value in mark.items() if name != "summary_layers"}
    summarize(model, select=mark["summary_layers"], **options)
    return model
