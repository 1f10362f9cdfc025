"""The neural path kernel of any graph of layers, from covariances that are passed from layer to layer.

The weights are independent, with mean 0 and variance 1, and the gates are fixed. Then the channels of a layer's output are
independent and have the same distribution. One covariance S(q, q') for each pair of positions describes it completely. A term
that leads to the next layer multiplies S by the profiles of both samples. The next layer's weights sum the product over the
channels, which is a matrix product. The variance of the output is the neural path kernel (Lakshminarayanan & Singh, 2020,
arXiv 2006.10529). One pass through the graph computes it.

Pairs of positions that no output needs are skipped. Without pooling, the pairs with q = q' suffice. Where all pairs are needed,
`dense_covariances` computes them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from interp_nn.explain.paths import dense_covariances as dense
from interp_nn.explain.paths.path_terms import Layer, PositionMap
from interp_nn.explain.paths.tiling import largest_entry

_TILE_BYTES = 1 << 28
_BLOCK_BYTES = 1 << 23  # of the covariances of all pairs, which then stay in a processor's cache
_GATHER_BYTES = 1 << 25
_LARGEST_TILE = 1024
_SCALED_BEYOND = 32  # covariances are rescaled where their exponent of 2 is larger
_LOOKED_AT = 1 << 12  # covariances, for one that is not too small


class _Covariances(NamedTuple):
    """A layer's covariances: one tensor a group, each to be multiplied by 2 ** power; dense where the step is.

    No entry of the tensors is larger than `bound`.
    """

    groups: list[Tensor]
    power: int
    bound: float


_ONE = _Covariances([], 0, 1.0)  # of a layer without terms


class _Products(NamedTuple):
    """A term's covariances, as W products of two entries of its position map.

    left, right: the entries, (W,) each. source: the row of the layer's S that each product takes; None takes all rows in order.
    table: the products that each pair of positions of z sums, (pairs, width), with W for none; None gives each pair its own one.
    """

    left: Tensor
    right: Tensor
    source: Tensor | None
    table: Tensor | None


class _Run(NamedTuple):
    """Channels of z that a term takes from one group of its layer."""

    term: int
    channels: slice
    group: int


class _Step(NamedTuple):
    """The computation of one layer's covariances.

    pairs: the number of pairs of positions of z. products: for each term; their sum gives the covariances of z.
    table: the pairs of z that each pair of output positions sums over the window, (pairs of positions, K).
    None gives each pair its own one. runs: for each group. done: the layers whose covariances no later step needs. most: for
    each term, the most entries that lead to one position. dense: the computation of all pairs, without products and table.
    """

    pairs: int
    products: list[_Products]
    table: Tensor | None
    runs: list[list[_Run]]
    done: list[int]
    most: list[int]
    dense: dense.DenseStep | None = None


class Propagation:
    """The covariances that each layer of a network needs, and the steps that compute them. They are the same for all samples.

    Args:
        layers: The layers of the network at any sample.
        normalize: The weights have variance 1 / fan-in instead of 1.
    """

    def __init__(self, layers: list[Layer], normalize: bool) -> None:
        self._normalize, self._dtype = normalize, layers[-1].terms[0].profile.dtype
        needed: list[list[Tensor]] = [[] for _ in layers]
        needed[-1].append(torch.zeros(1, dtype=torch.int64, device=layers[-1].window.device))
        self._steps: dict[int, _Step] = {}
        self._rows = [0] * len(layers)
        coded: dict[int, Tensor] = {}
        complete: set[int] = set()  # layers of which all pairs are needed
        places: list[int] = []
        later: set[int] = set()
        self._entries = sum(term.profile[:, 0].numel() for layer in layers for term in layer.terms)
        for place in reversed(range(len(layers))):
            layer = layers[place]
            if not layer.terms or not (needed[place] or place in complete):
                continue
            done = {term.layer for term in layer.terms} - later
            later |= done
            runs = [_runs(layers, layer, group) for group in range(layer.groups)]
            most = [int(torch.bincount(term.position_map.outputs, minlength=1).max()) for term in layer.terms]
            if place not in complete:
                coded[place] = torch.cat(needed[place]).unique()
                complete |= {place} if len(coded[place]) == layer.positions**2 else set()
            if place in complete and dense.suits(layer):
                self._rows[place] = layer.positions**2
                complete |= {term.layer for term in layer.terms}
                places.append(place)
                self._steps[place] = _Step(0, [], None, runs, sorted(done), most)
                continue
            if place in complete:
                coded[place] = torch.arange(layer.positions**2, device=layer.window.device)
            self._rows[place] = len(coded[place])
            seen = [
                layer.window[:, index] for index in (coded[place] // layer.positions, coded[place] % layer.positions)
            ]
            inside, size = (seen[0] >= 0) & (seen[1] >= 0), int(layer.window.max()) + 1
            codes = seen[0] * size + seen[1]
            pairs = codes[inside].unique()
            table = torch.searchsorted(pairs, codes).masked_fill(~inside, len(pairs)).T.contiguous()
            products = [_products(term.position_map, pairs // size, pairs % size) for term in layer.terms]
            for term, product in zip(layer.terms, products, strict=True):
                inputs = term.position_map.inputs
                needed[term.layer].append(inputs[product.left] * layers[term.layer].positions + inputs[product.right])
            self._steps[place] = _Step(len(pairs), products, _unless_identity(table), runs, sorted(done), most)
        self._grids = dense.grids(layers, places)
        for place in places:
            plan = dense.dense_step(layers, place, self._grids[place], self._grids, self._dtype)
            self._steps[place] = self._steps[place]._replace(dense=plan)
            for term, source in zip(layers[place].terms, plan.sources, strict=True):
                taken = 1 if source.window is None else len(source.window)
                entries = max(len(term.profile), source.padded * taken) - len(term.profile)
                self._entries += entries * term.profile.shape[2]
        self._size = max(
            (max(step.dense.value.size, step.dense.output.size) for step in self._steps.values() if step.dense),
            default=0,
        )
        for place, step in self._steps.items():
            if step.dense:
                continue
            for i, term in enumerate(layers[place].terms):
                own = step.products[i]
                if layers[term.layer].terms:
                    inputs = term.position_map.inputs
                    rows = inputs[own.left] * layers[term.layer].positions + inputs[own.right]
                    if term.layer not in complete:
                        rows = torch.searchsorted(coded[term.layer], rows)
                    whole = len(rows) == self._rows[term.layer]
                    step.products[i] = own._replace(source=_unless_identity(rows) if whole else rows)
        self._groups = [layer.groups for layer in layers]

    def chunk_size(self) -> int:
        """Return the number of rows and columns of a tile of the kernel that takes at most 256 MiB."""
        if self._size:  # its blocks are smaller, so that the profiles are what takes memory
            return min(max(1, _TILE_BYTES // (2 * self._entries * self._dtype.itemsize)), _LARGEST_TILE)
        held, most = 0, 1
        for place, step in sorted(self._steps.items()):
            held += self._rows[place] * self._groups[place]
            summed = max((len(product.left) for product in step.products if product.table is not None), default=0)
            most = max(most, held + step.pairs + summed)
            held -= sum(self._rows[done] * self._groups[done] for done in step.done)
        return min(max(1, math.isqrt(_TILE_BYTES // (most * self._dtype.itemsize))), _LARGEST_TILE)

    def prepared(self, layers: list[Layer]) -> list[Layer]:
        """Return layers at some samples as `tile` takes them. The layers are changed in turn, to hold few profiles twice."""
        for place, step in self._steps.items():
            layer = layers[place]
            layer.terms = [replace(term, largest=largest_entry(term.profile)) for term in layer.terms]
            if step.dense:
                prepared = map(dense.prepared, step.dense.sources, [term.profile for term in layer.terms])
                layer.terms = [
                    replace(term, profile=profile, unit=unit)
                    for term, (profile, unit) in zip(layer.terms, prepared, strict=True)
                ]
        return layers

    def tile(self, left: list[Layer], right: list[Layer]) -> Tensor:
        """Return the kernel (a, b) in float64, from the `prepared` layers at a samples and at b samples.

        If both are the same object, the lower half may be zero.
        """
        buffers = dense.Buffers(self._dtype, left[-1].window.device)
        if not self._size:
            return self._block(left, right, buffers)
        n, m = (layers[-1].terms[0].profile.shape[1] for layers in (left, right))
        size = max(1, math.isqrt(_BLOCK_BYTES // (self._size**2 * self._dtype.itemsize)))
        kernel = torch.zeros(n, m, dtype=torch.float64, device=left[-1].window.device)
        columns = {start: _samples(right, slice(start, start + size)) for start in range(0, m, size)}
        for top in range(0, n, size):
            rows = columns[top] if left is right else _samples(left, slice(top, top + size))
            for start in range(top if left is right else 0, m, size):
                kernel[top : top + size, start : start + size] = self._block(rows, columns[start], buffers)
        return kernel

    def _block(self, left: list[Layer], right: list[Layer], buffers: dense.Buffers) -> Tensor:
        covariances: dict[int, _Covariances] = {}
        for place, step in sorted(self._steps.items()):
            a, b = left[place], right[place]
            power = max([covariances.get(term.layer, _ONE).power for term in a.terms] + [0] * bool(a.biases))
            fan_in = max(1, a.weight.shape[1:].numel())
            # The network's outputs are not weights. For several outputs, the kernel is their mean.
            scale = 1 / fan_in if self._normalize or place == len(left) - 1 else 1.0
            bias = len(a.biases) * 2.0**-power if a.biases else 0.0  # without biases the power may be any
            bound = max(_bound(step, a, b, runs, scale, power, covariances) for runs in step.runs) + bias
            groups = []
            for number, runs in enumerate(step.runs):
                if step.dense:
                    z, factor = self._values(step.dense, a, b, runs, scale, power, covariances, buffers)
                    if number == len(step.runs) - 1:
                        _release(step.done, covariances, buffers)
                    groups.append(dense.summed(step.dense, z, factor, bias, buffers))
                    continue
                shape = len(a.terms[0].profile[0]), len(b.terms[0].profile[0])
                like = a.terms[0].profile
                sums = like.new_zeros(step.pairs + 1, *shape)  # the last row stands for positions beyond the edge
                for term, channels, group in runs:
                    source, own = self._paired_source(a.terms[term].layer, group, covariances)
                    mine, others = (layer.terms[term].profile[:, :, channels] for layer in (a, b))
                    _add(sums, mine, others, step.products[term], source, 2.0 ** (own - power))
                sums = sums[:-1] if step.table is None else _summed(sums, step.table)
                if scale != 1:
                    sums = sums.div_(fan_in)
                groups.append(sums.add_(bias) if a.biases else sums)
            covariances[place] = _scaled(groups, power, bound)
            _release(step.done, covariances, buffers)
        kernel, power = self._paired_source(len(left) - 1, 0, covariances)
        assert kernel is not None
        return kernel[0].double() * 2.0 ** min(power, 1023)

    def _values(
        self,
        step: dense.DenseStep,
        a: Layer,
        b: Layer,
        runs: list[_Run],
        scale: float,
        power: int,
        covariances: dict[int, _Covariances],
        buffers: dense.Buffers,
    ) -> tuple[Tensor, float]:
        """Return the covariances of the inputs of one group of a layer, and their factor."""
        parts = []
        for term, channels, group in runs:
            mine, others = (layer.terms[term].profile[:, :, channels] for layer in (a, b))
            source, own = self._dense_source(a.terms[term].layer, group, covariances)
            factor = scale * a.terms[term].unit * b.terms[term].unit * 2.0 ** (own - power)
            parts.append((term, mine, others, source, factor))
        return dense.values(step, parts, buffers)

    def _paired_source(self, place: int, group: int, covariances: dict[int, _Covariances]) -> tuple[Tensor | None, int]:
        """Return a layer's covariances of pairs (rows, n, m), or None for 1, and their power."""
        groups, power, _ = covariances.get(place, _ONE)
        if not groups:
            return None, power
        grid = self._grids.get(place)
        return groups[group] if grid is None else dense.to_pairs(groups[group], grid), power

    def _dense_source(self, place: int, group: int, covariances: dict[int, _Covariances]) -> tuple[Tensor | None, int]:
        """Return a layer's covariances of all pairs (n, places, m, places), or None for 1, and their power."""
        groups, power, _ = covariances.get(place, _ONE)
        if not groups:
            return None, power
        if place in self._grids:
            return groups[group], power
        positions = math.isqrt(len(groups[group]))
        index = torch.arange(positions, device=groups[group].device)
        return dense.from_pairs(groups[group], dense.Grid((positions,), index)), power


def _bound(
    step: _Step,
    a: Layer,
    b: Layer,
    runs: list[_Run],
    scale: float,
    power: int,
    covariances: dict[int, _Covariances],
) -> float:
    """Return a number that no covariance of a group of a layer's outputs exceeds, without its biases."""
    total = 0.0
    for term, channels, _ in runs:
        own = covariances.get(a.terms[term].layer, _ONE)
        largest = a.terms[term].largest * b.terms[term].largest * step.most[term] ** 2
        total += (channels.stop - channels.start) * largest * own.bound * 2.0 ** (own.power - power)
    return total * len(a.window) * scale


def _release(places: list[int], covariances: dict[int, _Covariances], buffers: dense.Buffers) -> None:
    """Give the memory of the covariances of layers to the next ones."""
    for place in places:
        for matrix in covariances.pop(place, _ONE).groups:
            buffers.give(matrix)


def _samples(layers: list[Layer], rows: slice) -> list[Layer]:
    """Return the layers at some of their samples."""
    return [
        replace(layer, terms=[replace(term, profile=term.profile[:, rows]) for term in layer.terms]) for layer in layers
    ]


def _products(position_map: PositionMap, left: Tensor, right: Tensor) -> _Products:
    """Find the products of entries that lead to the pairs (left, right) of positions of z; their source is set later."""
    outputs, order = position_map.outputs.sort(stable=True)
    counts = torch.bincount(outputs, minlength=int(max(left.max(), right.max())) + 1 if len(left) else 1)
    width = int(counts.max())
    number = torch.arange(len(outputs), device=outputs.device) - (counts.cumsum(0) - counts)[outputs]
    by_output = order.new_full((len(counts), width), -1)
    by_output[outputs, number] = order
    first, second = (index.flatten(1) for index in _each_with_each(by_output[left], by_output[right]))
    there = (first >= 0) & (second >= 0)
    if width == 1 and bool(there.all()):
        return _Products(first.flatten(), second.flatten(), None, None)
    table = torch.where(there, there.flatten().cumsum(0).view_as(there) - 1, there.sum())
    return _Products(first[there], second[there], None, table)


def _each_with_each(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Expand a (n, v) and b (n, w) to all pairs in a row, (n, v, w)."""
    shape = len(a), a.shape[1], b.shape[1]
    return a.unsqueeze(2).expand(shape), b.unsqueeze(1).expand(shape)


def _runs(layers: list[Layer], layer: Layer, group: int) -> list[_Run]:
    """List the channels of z that a group of a layer's outputs sums, split where a term's own layer changes its group."""
    inputs = layer.weight.shape[1]
    start, stop = group * inputs, (group + 1) * inputs
    runs = []
    for i, term in enumerate(layer.terms):
        own = layers[term.layer]
        if not own.terms:  # its covariances are the same for all channels
            runs.append(_Run(i, slice(start, stop), 0))
            continue
        outputs = len(own.weight) // own.groups
        edges = [term.shift + k * outputs for k in range(own.groups + 1)]
        for k, (low, high) in enumerate(itertools.pairwise(edges)):
            if max(low, start) < min(high, stop):
                runs.append(_Run(i, slice(max(low, start), min(high, stop)), k))
    return runs


def _unless_identity(table: Tensor) -> Tensor | None:
    """Return None for a table that names each row once and in order, else the table."""
    rows = torch.arange(len(table), device=table.device)
    return None if table.numel() == len(rows) and torch.equal(table.flatten(), rows) else table


def _add(sums: Tensor, a: Tensor, b: Tensor, products: _Products, source: Tensor | None, scale: float) -> None:
    """Add a term's covariances to `sums` (pairs + 1, n, m), from profiles a (T, n, channels) and b (T, m, channels)."""
    count, room = len(products.left), (a.shape[1] + b.shape[1]) * a.shape[2] * a.element_size()
    whole = sums if products.table is None else sums.new_zeros(count + 1, *sums.shape[1:])
    size = max(1, _GATHER_BYTES // max(1, room))
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        product = torch.bmm(a[products.left[part]], b[products.right[part]].mT)
        if source is not None:
            product *= source[part] if products.source is None else source[products.source[part]]
        if scale != 1:
            product *= scale
        whole[part] += product
    if products.table is not None:
        sums[:-1] += _summed(whole, products.table)


def _summed(rows: Tensor, table: Tensor) -> Tensor:
    """Sum the rows (W + 1, n, m) that a table (pairs, width) names, to (pairs, n, m). The last row must be zero."""
    total = F.embedding_bag(table, rows.flatten(1), mode="sum", padding_idx=len(rows) - 1)
    return total.view(len(table), *rows.shape[1:])


def _scaled(groups: list[Tensor], power: int, bound: float) -> _Covariances:
    """Rescale covariances by a power of 2 where they are near the limits of their dtype, as in deep networks."""
    middle = groups[0].view(-1)[groups[0].numel() // 2 :][:_LOOKED_AT]
    if bound < 2.0**_SCALED_BEYOND and largest_entry(middle) > 2.0**-_SCALED_BEYOND:
        return _Covariances(groups, power, bound)  # without a look at all of them
    largest = max((largest_entry(group) for group in groups), default=0.0)
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    if abs(exponent) <= _SCALED_BEYOND:
        return _Covariances(groups, power, largest)
    return _Covariances([group.mul_(2.0**-exponent) for group in groups], power + exponent, 1.0)
