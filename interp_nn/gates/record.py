"""The gates of a network at its inputs, as they were seen: the record that explanations and gated networks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp_nn.gates.patterns import ActivationPatterns


class GateSite(NamedTuple):
    """A call with on/off gates. name: the module's path ('features.3', 'relu#1' for its second call), or path, operation and
    count of a functional call ('layer1.0:relu#0'). shape: of one sample's gates.
    """

    name: str
    operation: str
    shape: torch.Size


def least(dtype: torch.dtype) -> float:
    """The smallest number above zero: what a gate looks at that is on by a tie."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


class GateRecord:
    """What `record` saw: `output`, the model's own result, and `sites`, the calls with on/off gates in call order."""

    def __init__(
        self,
        output: Any,
        sites: Sequence[GateSite],
        preactivations: Sequence[Tensor],
        samples: int,
        zeros: Sequence[Tensor | None] = (),
    ) -> None:
        """zeros: for each site None, or of a max-pooling, say, which of its windows (n, ..., p) have 0 as their largest."""
        self.output, self.sites = output, tuple(sites)
        self._preactivations, self._samples = tuple(preactivations), samples
        self._zeros = tuple(zeros) or (None,) * len(self.sites)

    def preactivations(self, site: str | int | GateSite) -> Tensor:
        """What a site's gates look at, (n, *shape): ReLU's input, say. With several kinks a unit, one slice for each."""
        return self._preactivations[self._index(site)]

    def gates(self, site: str | int | GateSite) -> Tensor:
        """Which of a site's gates are on, (n, *shape) bool: those whose preactivation is positive."""
        return self.preactivations(site) > 0

    def patterns(self, sites: Sequence[str | int | GateSite] | None = None) -> ActivationPatterns:
        """The patterns over the units of some sites (default: all), concatenated in the order given (of the calls).

        Raises ValueError where there is no site.
        """
        chosen = range(len(self.sites)) if sites is None else [self._index(site) for site in sites]
        if not chosen:
            names = ", ".join(site.name for site in self.sites)
            raise ValueError(
                f"sites: got none, {f'want at least one of {names}' if names else 'as the model has no gates'}"
            )
        return ActivationPatterns.from_preactivations([self._preactivations[i] for i in chosen])

    def margin(self) -> Tensor:
        """The smallest |preactivation| of each sample, (n,); infinite without gates. Patterns are unstable where it is tiny.

        Ties of zeros in a max-pooling are left out: they are what a ReLU before it cut off.
        """
        smallest = []
        for z, zero in zip(self._preactivations, self._zeros, strict=True):
            size = z.abs()
            if zero is not None:
                size = size.masked_fill((size <= least(z.dtype)) & zero.unsqueeze(-1), torch.inf)
            if z.numel():
                smallest.append(size.reshape(len(size), -1).amin(1))
        return torch.stack(smallest).amin(0) if smallest else torch.full((self._samples,), torch.inf)

    def __repr__(self) -> str:
        units = sum(site.shape.numel() for site in self.sites)
        return f"GateRecord({self._samples} samples, {len(self.sites)} sites, {units} gates)"

    def _index(self, site: str | int | GateSite) -> int:
        return place_of([s.name for s in self.sites], site.name if isinstance(site, GateSite) else site)


def place_of(names: Sequence[str], site: str | int) -> int:
    """The index of a gate site given by index or name. Raises ValueError that lists the sites."""
    if isinstance(site, int) and -len(names) <= site < len(names):
        return site % len(names)
    if isinstance(site, str) and site in names:
        return names.index(site)
    raise ValueError(f"site: got {site!r}, want an index below {len(names)} or one of {', '.join(names)}")
