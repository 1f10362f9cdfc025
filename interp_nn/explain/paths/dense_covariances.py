"""Covariances of all pairs of positions at once, for networks that pool: matrix products and shifts instead of lists of pairs.

The covariances S(q, q') of a layer are one tensor (n, P, m, P). A convolution of stride 1 adds S at the same shift of q and q'.
On a grid whose rows begin with zeros, that shift is one offset in memory, so that each dimension of the kernel takes a few
additions of whole tensors. The profiles are zero at the added positions, which makes the covariances there zero where they are
read. In float32 on a processor, one convolution of the memory makes these sums for two dimensions in one pass: offsets m P + 1
apart are neighbours in rows of so many entries. It multiplies by the factor and adds the bias too.

Most profiles are gates: 0 or one number. Where the processor multiplies 8-bit integers, int8 holds 0 or 1 in their place. Their
products are exact, and take a quarter of the time.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from interp_nn.explain.paths.path_terms import Layer, PositionMap

_MOST_TAKEN = 32  # entries of the input that a window takes, for a product of them instead of shifts
_MOST_CONVOLVED = 16  # the same instead of one convolution
_MOST_TAPS = 25  # of a kernel's last two dimensions, for one convolution instead of shifts
_LEAST_SHARE = 0.05  # of the pairs that must be needed for all of them to be computed


class Grid(NamedTuple):
    """The places of positions in memory. sizes: of each dimension. places: of each position, (P,) int64."""

    sizes: tuple[int, ...]
    places: Tensor

    @property
    def size(self) -> int:
        """The number of places."""
        return torch.Size(self.sizes).numel()


class Buffers:
    """Memory that one step after another uses, since new memory costs more than the additions."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._free: dict[int, list[Tensor]] = {}
        self._made: set[int] = set()

    def take(self, size: int, spare: int = 0) -> Tensor:
        """Return a vector whose entries may be anything, with room for `spare` more behind its end."""
        free = self._free.get(size + spare)
        if free:
            return free.pop()[:size]
        made = torch.empty(size + spare, dtype=self._dtype, device=self._device)
        self._made.add(made.data_ptr())
        return made[:size]

    def give(self, z: Tensor) -> None:
        """Take back the memory of a tensor that `take` made and nobody reads any more."""
        if z.data_ptr() in self._made:
            whole = z.untyped_storage().nbytes() // z.element_size()
            self._free.setdefault(whole, []).append(z.as_strided((whole,), (1,)))


class _Source(NamedTuple):
    """The way from a layer's positions to a value's.

    how: "same" for one entry a position, with the place of the value. "total" for a sum over all positions of the layer. Else
    "entries", sorted by output. order: of the term's entries, None if they have it. places: the places in the grid of each of
    them. width: the number of entries for each position of the value; 0 if it differs. outputs: the position of each entry.
    padded: the number of rows of the profile at these places, zeros included; 0 if it has one row an entry. window: the entries
    that each position of the layer's output takes, if the profile holds them all, (K, P).
    """

    how: Literal["same", "total", "entries"]
    order: Tensor | None
    places: Tensor
    width: int
    outputs: Tensor
    padded: int = 0
    window: Tensor | None = None


class DenseStep(NamedTuple):
    """The computation of all covariances of one layer.

    value, output: the grids of the layer's input and output. sources: for each term. offsets: for each dimension of a convolution
    of stride 1, the offsets of its shifts in the grid; None if `window` holds the place of each position that is summed, (K, P).
    kernel: ones (height, width) for the last two dimensions of `offsets`, where one convolution with this dilation sums them.
    """

    value: Grid
    output: Grid
    sources: list[_Source]
    offsets: list[list[int]] | None
    window: Tensor
    kernel: Tensor | None = None
    dilation: tuple[int, int] = (1, 1)


def suits(layer: Layer) -> bool:
    """Return True if a layer whose covariances are all needed needs enough pairs of its input's positions."""
    width, positions = layer.window.shape
    inputs = int(layer.window.max()) + 1
    several = inputs > 1 or any(len(term.position_map.outputs) > 1 for term in layer.terms)
    return several and (positions > 1 or width == 1) and width * positions**2 >= _LEAST_SHARE * inputs**2


def grids(layers: list[Layer], places: list[int]) -> dict[int, Grid]:
    """Return the grid of the output of each of these layers. Convolutions of one shape share one, with zeros for all shifts."""
    radius: dict[tuple[int, ...], list[int]] = {}
    for place in places:
        layer = layers[place]
        if shifts(layer):
            own = [max(map(abs, steps)) for steps in layer.shifts]
            radius[layer.shape] = [max(pair) for pair in zip(own, radius.get(layer.shape, own), strict=True)]
    found = {}
    for place in places:
        layer = layers[place]
        padding = radius.get(layer.shape, [0] * len(layer.shape))
        shape = layer.shape or (layer.positions,)
        sizes = tuple(size + more for size, more in zip(shape, padding or [0], strict=True))
        numbers = torch.arange(torch.Size(sizes).numel(), device=layer.window.device).view(sizes)
        found[place] = Grid(
            sizes, numbers[tuple(slice(n - size, n) for n, size in zip(sizes, shape, strict=True))].flatten()
        )
    return found


def shifts(layer: Layer) -> bool:
    """Return True if a layer is a convolution of stride 1 with zeros at the edges, from its window."""
    if not layer.shifts or not layer.shape or layer.positions != torch.Size(layer.shape).numel():
        return False
    numbers = torch.arange(layer.positions, device=layer.window.device).view(layer.shape)
    rows = []
    for step in product(*layer.shifts):
        row = torch.full_like(numbers, -1)
        here = tuple(slice(max(0, -s), max(0, n - max(0, s))) for s, n in zip(step, layer.shape, strict=True))
        there = tuple(slice(max(0, s), max(0, n - max(0, -s))) for s, n in zip(step, layer.shape, strict=True))
        row[here] = numbers[there]
        rows.append(row.flatten())
    return torch.equal(torch.stack(rows), layer.window)


def dense_step(layers: list[Layer], place: int, output: Grid, found: dict[int, Grid], dtype: torch.dtype) -> DenseStep:
    """Plan the covariances of a layer in a dtype; `found` holds the grids of the layers whose covariances are dense."""
    layer = layers[place]
    offsets, window, value = None, layer.window, output
    kernel, dilation = None, (1, 1)
    if shifts(layer):
        inner = [torch.Size(output.sizes[d + 1 :]).numel() for d in range(len(output.sizes))]
        offsets = [[step * stride for step in steps] for steps, stride in zip(layer.shifts, inner, strict=True)]
        if _convolves(dtype, window.device):
            kernel, dilation = _kernel(layer.shifts, output.places)
    else:  # where positions lie beyond the edge, one more place, of a zero, stands for them
        inputs = 1 + max(int(t.max()) for t in (layer.window, *(term.position_map.outputs for term in layer.terms)))
        beyond = layer.window < 0
        value = Grid((inputs + int(beyond.any()),), torch.arange(inputs, device=layer.window.device))
        window = torch.where(beyond, inputs, layer.window)
    sources = []
    for term in layer.terms:
        own = layers[term.layer]
        grid = found.get(term.layer)
        if grid is None:
            grid = Grid((own.positions,), torch.arange(own.positions, device=window.device))
        sources.append(_source(term.position_map, grid, value, bool(own.terms)))
    few = layer.weight.shape[1:].numel() <= (_MOST_TAKEN if kernel is None else _MOST_CONVOLVED) and len(sources) == 1
    if offsets and few and sources[0].how == "same" and not layers[layer.terms[0].layer].terms:
        sources, offsets, kernel = [sources[0]._replace(window=window)], [], None  # one product instead of shifts
    return DenseStep(value, output, sources, offsets, window, kernel, dilation)


def _convolves(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if oneDNN convolves in a dtype, as exactly as sums are."""
    onednn: Any = torch.backends.mkldnn  # whose type lacks what it has
    usable = dtype == torch.float32 and device.type == "cpu" and onednn.is_available() and onednn.enabled
    return usable and onednn.conv.fp32_precision in ("none", "ieee")


def _kernel(shifts: tuple[tuple[int, ...], ...], places: Tensor) -> tuple[Tensor | None, tuple[int, int]]:
    """Return the kernel of a convolution's last two dimensions and its dilation; None where shifts are as fast, or needed."""
    height, width = last = ((0,), *shifts)[-2:]
    suited = 1 < len(height) * len(width) <= _MOST_TAPS and all(steps[0] == -steps[-1] for steps in last)
    if not suited:
        return None, (1, 1)
    rows, columns = (steps[1] - steps[0] if len(steps) > 1 else 1 for steps in last)
    return torch.ones(len(height), len(width), device=places.device), (rows, columns)


def _source(position_map: PositionMap, grid: Grid, value: Grid, followed: bool) -> _Source:
    outputs, order = position_map.outputs.sort(stable=True)
    inputs, positions = position_map.inputs[order], len(value.places)
    sorted_by = None if torch.equal(order, torch.arange(len(order), device=order.device)) else order
    each = torch.arange(positions, device=outputs.device)
    counts = torch.bincount(outputs, minlength=positions)
    width = int(counts[0]) if bool((counts == counts[0]).all()) else 0
    if torch.equal(outputs, each) and (
        not followed or (grid.size == value.size and torch.equal(grid.places[inputs], value.places))
    ):
        return _Source("same", sorted_by, value.places, 1, outputs, value.size)
    places = grid.places[inputs] if followed else inputs
    if followed and positions == 1 and torch.equal(places.sort().values, grid.places):
        return _Source("total", sorted_by, places, width, outputs, grid.size)
    return _Source("entries", sorted_by, places, width, outputs)


def prepared(source: _Source, profile: Tensor) -> tuple[Tensor, float]:
    """Return a profile (T, n, channels) as `covariances` takes it, and its unit: sorted, padded, one sample after another."""
    unit = _unit(profile)
    rows = (profile if unit is None else (profile != 0).to(torch.int8)).transpose(0, 1)
    if source.order is not None:
        rows = rows[:, source.order]
    if source.window is not None:  # the row -1 stands for positions beyond the edge
        rows = F.pad(rows, (0, 0, 0, 1))[:, source.window].permute(0, 2, 3, 1)
    if source.padded > 1:
        padded = rows.new_zeros(rows.shape[0], source.padded, *rows.shape[2:])
        rows = padded.index_copy_(1, source.places, rows)
    return rows.contiguous().transpose(0, 1), 1.0 if unit is None else unit


def _unit(profile: Tensor) -> float | None:
    """Return the one number beside 0 in a profile, where 8-bit integers are multiplied faster than its dtype; else None."""
    if profile.dtype != torch.float32 or profile.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    supported = getattr(torch.cpu, "_is_vnni_supported", None)  # a private name, as _int_mm is
    if supported is None or not supported() or not hasattr(torch, "_int_mm") or not profile.numel():
        return None
    unit = profile.max()
    return float(unit) if bool(((profile == 0) | (profile == unit)).all()) else None


def values(
    step: DenseStep, terms: list[tuple[int, Tensor, Tensor, Tensor | None, float]], buffers: Buffers
) -> tuple[Tensor, float]:
    """Return the covariances (n, places, m, places) of one group of a layer's inputs, to be multiplied by a factor.

    terms: for each run of channels the term's number, its `prepared` profiles (T, n, channels) and (T, m, channels), the dense
    covariances of its layer (None: 1), and the factor of the products.
    """
    z: Tensor | None = None
    later = 1.0  # a factor of integers, which cannot hold it
    for number, a, b, source, factor in terms:
        if a.dtype != b.dtype:
            a, b = (profile.to(torch.promote_types(a.dtype, b.dtype)) for profile in (a, b))
        integers = a.dtype == torch.int8
        part = _value(step, step.sources[number], a if integers else a * factor, b, source, buffers)
        if z is None:
            z, later = part, factor if integers else 1.0
            if len(terms) > 1 and integers:
                z, later = z.mul_(factor), 1.0
        else:
            z.add_(part, alpha=factor if integers else 1)
            buffers.give(part)
    assert z is not None
    return z, later


def summed(step: DenseStep, z: Tensor, factor: float, bias: float, buffers: Buffers) -> Tensor:
    """Return the covariances (n, places, m, places) of a layer's outputs from the `values` z of its inputs, whose memory it uses.

    Each is the sum over the window, times the factor, and the bias.
    """
    n, m = z.shape[0], z.shape[2]
    if step.offsets is None:
        total = None
        for row in step.window:
            picked = _picked(z, row, buffers)
            if total is None:
                total = picked
            else:
                total.add_(picked)
                buffers.give(picked)
        assert total is not None
        buffers.give(z)
        z = _placed(total, step.output)
    else:
        flat = z.reshape(-1)
        convolved = step.kernel is not None and n <= m  # else an offset leads further than the zeros of the grid
        for offsets in step.offsets[:-2] if convolved else step.offsets:
            flat = _shifted(flat, [offset * (m * step.value.size + 1) for offset in offsets], buffers)
        z = flat.view(n, step.output.size, m, step.output.size)
        if convolved:
            return _convolved(step, z, factor, bias, buffers)
    if factor != 1:  # in one pass with the bias
        return torch.add(z.new_tensor(bias), z, alpha=factor, out=z)
    return z.add_(bias) if bias else z


def _value(
    step: DenseStep, source: _Source, a: Tensor, b: Tensor, covariances: Tensor | None, buffers: Buffers
) -> Tensor:
    """Return what a term adds to the covariances of the layer's input, (n, places, m, places)."""
    if source.how == "total" and covariances is not None and a.dtype != torch.int8:
        a, b = a.transpose(0, 1), b.transpose(0, 1)
        columns = [((covariances[:, :, j] @ b[j]) * a).sum((1, 2)) for j in range(len(b))]
        return _placed(torch.stack(columns, 1)[:, None, :, None], step.value)
    product = _products(a, b, buffers)
    if source.how == "same":
        return product if covariances is None else product.mul_(covariances)
    if source.how == "total" and covariances is not None:
        total = product.mul_(covariances).sum((1, 3), keepdim=True)
        buffers.give(product)
        return _placed(total, step.value)
    if covariances is not None:
        picked = _picked(covariances, source.places, buffers)
        product *= picked
        buffers.give(picked)
    n, entries, m, _ = product.shape
    positions = len(step.value.places)
    if source.width:
        width = source.width
        product = product.view(n, positions, width, m, positions, width).sum((2, 5)) if width > 1 else product
    else:
        rows = product.new_zeros(n, positions, m, entries).index_add_(1, source.outputs, product)
        product = product.new_zeros(n, positions, m, positions).index_add_(3, source.outputs, rows)
    return _placed(product, step.value)


def _products(a: Tensor, b: Tensor, buffers: Buffers) -> Tensor:
    """Return the sums over channels (n, T, m, U) of products of (T, n, channels) and (U, m, channels)."""
    a, b = a.transpose(0, 1), b.transpose(0, 1)
    left, right = a.reshape(*a.shape[:2], -1).flatten(0, 1), b.reshape(*b.shape[:2], -1).flatten(0, 1)
    flat = buffers.take(len(left) * len(right), len(left)).view(len(left), len(right))
    if a.dtype == torch.int8 and left.shape[1] > 1:  # _int_mm of one column is wrong, at least up to PyTorch 2.13
        flat.copy_(torch._int_mm(left, right.T, out=flat.view(torch.int32)))  # each entry at its own place
    else:
        torch.mm(left.to(flat.dtype), right.T.to(flat.dtype), out=flat)
    return flat.view(a.shape[0], a.shape[1], b.shape[0], b.shape[1])


def _picked(z: Tensor, places: Tensor, buffers: Buffers) -> Tensor:
    """Return the covariances (n, Q, m, Q) of places of z (n, P, m, P). PyTorch selects columns of a matrix faster than of z."""
    n, before, m, _ = z.shape
    after = len(places)
    rows = buffers.take(n * after * m * before).view(n, after, m * before)
    torch.index_select(z.reshape(n, before, m * before), 1, places, out=rows)
    picked = buffers.take(n * after * m * after).view(n * after * m, after)
    torch.index_select(rows.view(-1, before), 1, places, out=picked)
    buffers.give(rows)
    return picked.view(n, after, m, after)


def _placed(z: Tensor, grid: Grid) -> Tensor:
    """Return covariances of positions (n, P, m, P) at the places of a grid, with zeros elsewhere."""
    if z.shape[1] == grid.size:
        return z
    rows = z.new_zeros(z.shape[0], grid.size, *z.shape[2:]).index_copy_(1, grid.places, z)
    return z.new_zeros(*rows.shape[:3], grid.size).index_copy_(3, grid.places, rows)


def _shifted(z: Tensor, offsets: list[int], buffers: Buffers) -> Tensor:
    """Return the sum over the offsets o of z[i + o], with zeros beyond its ends. z is given to the buffers."""
    if offsets == [0]:
        return z
    room = int(z.untyped_storage().nbytes() // z.element_size() - z.storage_offset())
    total, rest = buffers.take(len(z), room - len(z)), [offset for offset in offsets if offset]
    later = [offset for offset in rest if 0 < offset < len(z)]
    if 0 in offsets and later:  # the first sum writes to all entries
        rest.remove(first := later[0])
        torch.add(z[:-first], z[first:], out=total[:-first])
        total[-first:] = z[-first:]
    elif 0 in offsets:
        total.copy_(z)
    else:
        total.zero_()
    for offset in rest:
        if 0 < offset < len(z):
            total[:-offset] += z[offset:]
        elif -len(z) < offset < 0:
            total[-offset:] += z[:offset]
    buffers.give(z)
    return total


def _convolved(step: DenseStep, z: Tensor, factor: float, bias: float, buffers: Buffers) -> Tensor:
    """Return the sums of z (n, places, m, places) over a convolution's last two dimensions, times a factor, and a bias.

    Rows of m P + 1 entries put z[i, q, j, q'] before z[i, q + 1, j, q' + 1]. The edges of the convolved image are at zeros of
    the grid, as n <= m. z is given to the buffers.
    """
    assert step.kernel is not None
    n, size, m, _ = z.shape
    rows, width, channels = n * size, step.value.sizes[-1], m * size + 1
    if z.untyped_storage().nbytes() < (z.storage_offset() + rows * channels) * z.element_size():
        z = buffers.take(z.numel(), rows).view_as(z).copy_(z)
    flat = z.as_strided((rows * channels,), (1,))
    flat[z.numel() :] = 0
    image = flat.view(1, rows // width, width, channels).permute(0, 3, 1, 2)
    kernel = (factor * step.kernel).expand(channels, 1, *step.kernel.shape)
    sizes = zip(step.dilation, step.kernel.shape, strict=True)
    total = F.conv2d(
        image,
        kernel,
        z.new_full((channels,), bias) if bias else None,
        padding=[d * (k // 2) for d, k in sizes],
        dilation=step.dilation,
        groups=channels,
    )
    buffers.give(z)
    return total.permute(0, 2, 3, 1).reshape(-1)[: z.numel()].view_as(z)


def from_pairs(rows: Tensor, grid: Grid) -> Tensor:
    """Return dense covariances on a grid from those of all pairs in a row, (P P, n, m)."""
    positions = len(grid.places)
    return _placed(rows.view(positions, positions, *rows.shape[1:]).permute(2, 0, 3, 1), grid)


def to_pairs(z: Tensor, grid: Grid) -> Tensor:
    """Return the covariances of all pairs of positions in a row, (P P, n, m), from dense ones."""
    picked = z if len(grid.places) == grid.size else z.index_select(1, grid.places).index_select(3, grid.places)
    return picked.permute(1, 3, 0, 2).reshape(-1, z.shape[0], z.shape[2])
