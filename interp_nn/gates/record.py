"""Gate records: a network's gates at its inputs, which explanations and gated networks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp_nn.gates.patterns import ActivationPatterns


class GateSite(NamedTuple):
    """Identify a call with on/off gates.

    Attributes:
        name: The module's path, or path, operation and count of a functional call: 'features.3', 'relu#1' for the second call
            of one module, 'layer1.0:relu#0' for a function.
        operation: Name of the operation, such as 'relu' or 'max_pool2d'.
        shape: Shape of one sample's gates.

    Example:
        >>> from interp_nn.explain import record
        >>> record(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()), torch.ones(2, 3)).sites
        (GateSite(name='1', operation='relu', shape=torch.Size([4])),)
    """

    name: str
    operation: str
    shape: torch.Size


def smallest_positive(dtype: torch.dtype) -> float:
    """Return the smallest number above zero, the preactivation of a gate that a tie turned on."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


class GateRecord:
    """Hold the gates of n samples, and the network's output, as `record` and `GatedNetwork.gates` return them.

    Args:
        output: The model's result for the samples.
        sites: The calls with on/off gates, in call order.
        preactivations: The values that each site's gates depend on, each of shape (n, *shape).
        samples: The number of samples, n.
        zeros: For each site None, or a bool tensor that marks a max-pooling's windows whose largest entry is 0. It has the
            shape of the preactivations without their last dimension.

    Example:
        >>> from interp_nn.explain import record
        >>> seen = record(torch.nn.ReLU(), torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        >>> seen.gates(0)
        tensor([[ True, False],
                [ True,  True]])
        >>> seen.margin()
        tensor([1., 3.])
    """

    def __init__(
        self,
        output: Any,
        sites: Sequence[GateSite],
        preactivations: Sequence[Tensor],
        samples: int,
        zeros: Sequence[Tensor | None] = (),
    ) -> None:
        self.output, self.sites = output, tuple(sites)
        self._preactivations, self._samples = tuple(preactivations), samples
        self._zeros = tuple(zeros) or (None,) * len(self.sites)

    def preactivations(self, layer: str | int | GateSite) -> Tensor:
        """Return the values that a site's gates depend on, such as a ReLU's input.

        Args:
            layer: The site, its name, or its index in `sites`.

        Returns:
            Tensor of shape (n, *shape). An operation with several kinks a unit has one slice for each.

        Raises:
            ValueError: There is no such site. The message lists the sites.
        """
        return self._preactivations[self._index(layer)]

    def gates(self, layer: str | int | GateSite) -> Tensor:
        """Return the gates of a site, which are on where the preactivation is positive.

        Args:
            layer: The site, its name, or its index in `sites`.

        Returns:
            Bool tensor of shape (n, *shape).

        Raises:
            ValueError: There is no such site. The message lists the sites.
        """
        return self.preactivations(layer) > 0

    def patterns(self, layers: Sequence[str | int | GateSite] | None = None) -> ActivationPatterns:
        """Return the patterns over the units of some sites.

        Args:
            layers: The sites, by name, index or themselves. The patterns are concatenated in this order. None takes all sites
                in call order.

        Returns:
            The patterns of the n samples.

        Raises:
            ValueError: `layers` is empty, names no site of the record, or the model has no gates.
        """
        chosen = range(len(self.sites)) if layers is None else [self._index(layer) for layer in layers]
        if not chosen:
            names = ", ".join(site.name for site in self.sites)
            raise ValueError(
                f"layers: got none, {f'want at least one of {names}' if names else 'as the model has no gates'}"
            )
        return ActivationPatterns.from_preactivations([self._preactivations[i] for i in chosen])

    def margin(self) -> Tensor:
        """Return the smallest |preactivation| of each sample, (n,). Patterns are unstable where it is tiny.

        Without gates it is infinite. A max-pooling counts the difference of its two largest values, unless both are 0, as
        after a ReLU.
        """
        smallest = []
        for z, zero in zip(self._preactivations, self._zeros, strict=True):
            size = z.abs()
            if zero is not None:
                size = size.masked_fill((size <= smallest_positive(z.dtype)) & zero.unsqueeze(-1), torch.inf)
            if z.numel():
                smallest.append(size.reshape(len(size), -1).amin(1))
        return torch.stack(smallest).amin(0) if smallest else torch.full((self._samples,), torch.inf)

    def __repr__(self) -> str:
        units = sum(site.shape.numel() for site in self.sites)
        return f"GateRecord({self._samples} samples, {len(self.sites)} sites, {units} gates)"

    def _index(self, layer: str | int | GateSite) -> int:
        return place_of([s.name for s in self.sites], layer.name if isinstance(layer, GateSite) else layer)


def place_of(names: Sequence[str], layer: str | int) -> int:
    """Return the index of a gate site given by index or name. Raises ValueError that lists the sites."""
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        return layer % len(names)
    if isinstance(layer, str) and layer in names:
        return names.index(layer)
    raise ValueError(f"layer: got {layer!r}, want an index below {len(names)} or one of {', '.join(names)}")
