"""Form effective weights once for several microbatches, and pull their gradients back to b once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.optim.optimizer import register_optimizer_step_pre_hook

from interp_nn import linalg
from interp_nn.nn.polynomial_layer import PolynomialLayer
from interp_nn.ops.library import any_autocast_enabled, is_dtensor, transforming


class _AddCollected(Function):
    """Return the weight; its backward adds what the leaf has collected."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, cache: _Cache) -> Tensor:
        ctx.cache = cache
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        collected = ctx.cache.collected()
        ctx.cache.pulled = True
        return grad if collected is None else grad + collected, None


class cached_weights:  # noqa: N801 - used like a function, as torch.no_grad is
    """Form the effective weight of each SummaryLinear and SummaryConv2d once for all forwards inside of a `with` block.

    Inside, a layer is the plain layer with its effective weight. The gradient of the weight is summed over the microbatches, and
    pulled back to b, and to a gain, once, at the end of the block. So clip gradients, unscale them by a GradScaler, and step
    the optimizer, after the block. A step inside of it raises RuntimeError.

    Under DistributedDataParallel pass the wrapped model: gradients are pulled back in the one backward that synchronises, which
    has to be the last one of the block; the others run under `no_sync()`.

    Forwards under torch.no_grad, torch.func, torch.compile and of frozen layers compute as outside.

    Args:
        model: The model.

    Raises:
        TypeError: `model` is not an nn.Module.
        RuntimeError: A layer's b is sharded (a DTensor); b changes inside of the block; an optimizer steps inside of it; blocks
            of one layer are nested; a backward under DistributedDataParallel that synchronises was not the last. The message
            names the layer.

    Example:
        >>> from interp_nn.nn import SummaryLinear
        >>> model, x = SummaryLinear(4, 3), torch.ones(8, 4)
        >>> with cached_weights(model):
        ...     for microbatch in x.split(2):
        ...         model(microbatch).sum().backward()
        >>> model.b.grad.shape
        torch.Size([4, 3])
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
        self._model = model
        self._caches: list[_Cache] = []

    def __enter__(self) -> cached_weights:
        layers = {m: name for name, m in self._model.named_modules() if isinstance(m, PolynomialLayer)}
        for layer, name in layers.items():
            where = f"{name or 'model'} ({type(layer).__name__})"
            b = layer._parameters.get("b")
            if type(b) is not nn.Parameter and is_dtensor(layer.b):
                raise RuntimeError(
                    f"cached_weights: b of {where} is sharded, a DTensor; train it without cached_weights"
                )
            if layer._cache is not None:
                raise RuntimeError(f"cached_weights: {where} is in another block already")
        caches = [
            _Cache(layer, f"{name or 'model'} ({type(layer).__name__})", self._model)
            for layer, name in layers.items()
            if layer.frozen_weight() is None
        ]
        for cache in caches:  # once all are formed
            vars(cache.layer)["_cache"] = cache
        self._caches = caches
        self._handle = register_optimizer_step_pre_hook(self._before_step)
        return self

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for cache in self._caches:
            if stepped & {id(p) for p in cache.layer.parameters()}:
                raise RuntimeError(
                    f"cached_weights: the optimizer steps {cache.name} inside of the block, before its b has a gradient; step "
                    "after the block"
                )

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()
        caches, self._caches = self._caches, []
        for cache in caches:
            vars(cache.layer)["_cache"] = None
        for cache in caches if kind is None else ():
            cache.pull_back()


def _full_precision(t: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the tensor's device; making one takes a while, so only where autocast is on."""
    return linalg.autocast_off(t.device) if any_autocast_enabled() else nullcontext()


class _Cache:
    """The cached weight of one layer inside of a block.

    It is formed when the block begins: inside of a checkpoint, whose hooks save other tensors, it would be formed twice.

    Attributes:
        formed: The weight, with its graph to b; not where it is formed without one.
        leaf: A leaf with its values, which layers use and whose `grad` collects the gradients.
        pulled: True if the gradients have been pulled back under DistributedDataParallel.
    """

    def __init__(self, layer: PolynomialLayer, name: str, model: nn.Module) -> None:
        self.layer, self.name = layer, name
        self._ddp = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        with _full_precision(layer.b):
            self._graphless = layer._graphless_weight() if self._ddp is None else None
            if self._graphless is not None:
                self.leaf = self._graphless.weight
            else:
                with torch.enable_grad():
                    self.formed = layer.effective_weight().contiguous()
                self.leaf = self.formed.detach().requires_grad_(self.formed.requires_grad)
        self.pulled = False
        self._identity = self._identity_now()

    def _identity_now(self) -> tuple[Any, ...]:
        """Return the layer's identity: in a fourth of the time for plain parameters, because a block reads it twice."""
        if self._graphless is None:
            return self.layer._identity()
        parameters, buffers = self.layer._parameters, self.layer._buffers
        held = parameters.get("b"), parameters.get("gain"), buffers.get("scale")
        return tuple([(t.data_ptr(), 0 if t.is_inference() else t._version) for t in held if t is not None])

    def weight(self) -> Tensor | None:
        """Return the weight for a forward; None where it has to be computed as outside of the block."""
        if not torch.is_grad_enabled() or is_compiling() or transforming():
            return None
        if self._ddp is None or not self._ddp.require_backward_grad_sync or not self.leaf.requires_grad:
            return self.leaf
        if self.pulled:
            raise RuntimeError(
                f"cached_weights: {self.name} has synchronised its gradients already; run all microbatches but the last one "
                "under no_sync()"
            )
        connected: Tensor = _AddCollected.apply(self.formed, self)
        return connected

    def collected(self) -> Tensor | None:
        """Return the gradient that the leaf has collected, and clear it."""
        grad, self.leaf.grad = self.leaf.grad, None
        return grad

    def pull_back(self) -> None:
        """Add the collected gradient to those of the parameters."""
        if self._identity != self._identity_now():
            raise RuntimeError(
                f"cached_weights: b of {self.name} has changed inside of the block; change parameters after the block"
            )
        if self.leaf.grad is None:
            return
        if self.pulled:
            raise RuntimeError(f"cached_weights: the microbatch of {self.name} that synchronises was not the last one")
        with _full_precision(self.leaf):
            if self._graphless is not None:
                self._graphless.pull_back(self.leaf.grad)
            else:
                torch.autograd.backward(self.formed, self.leaf.grad)
