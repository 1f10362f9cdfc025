"""One run of a network's graph on samples, which derives the terms of each value from the terms of its inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from interp_nn.explain.following.calls import UnsupportedOperation
from interp_nn.explain.paths.path_terms import Layer, PositionMap, Term
from interp_nn.gates.graph import first, kind, where
from interp_nn.nn.base import LinearForm

GATE = "interp_nn_gate_"  # prefix of the names of buffers that stand for gates
Pool = Callable[[Tensor], Tensor]
Node = Any  # an fx.Node, whose arguments have the types that its kind implies
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Walk(fx.Interpreter):
    """Runs the graph on samples and derives the terms of each value.

    Args:
        graph: The traced network.
        gates: The gates of a gated network, then the positions that its max-poolings choose.
        pools: The max-poolings of a gated network.
        dtype: Dtype of the profiles.
        resampled: Position maps of operations on positions, kept from run to run.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        gates: Sequence[Tensor],
        pools: Sequence[Pool],
        dtype: torch.dtype,
        resampled: dict[fx.Node, Any],
    ) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # keeps error messages as they are
        self.layers: list[Layer] = []
        self._graph, self._gates, self._pools, self._dtype, self._resampled = graph, gates, pools, dtype, resampled
        self._terms: dict[fx.Node, list[Term]] = {}
        self._made: dict[fx.Node, Layer] = {}  # the layer of weights of each node that has one
        self._used: dict[int, str] = {}
        self.computed: dict[fx.Node, Tensor] = {}  # values of nodes that compute from the input without weights

    def fetch_attr(self, target: str) -> Any:
        """Return a parameter, a buffer or a gate."""
        return self._gates[int(target[len(GATE) :])] if target.startswith(GATE) else super().fetch_attr(target)

    def run_node(self, n: Node) -> Any:
        """Run one node of the graph, and derive the terms of its result."""
        result = super().run_node(n)
        what = kind(self._graph, n)
        used = [node for node in n.all_input_nodes if node in self._terms]
        if what == "input":
            one = torch.zeros(1, 1, dtype=torch.int64, device=result.device)
            self.layers.append(Layer("input", [], result.new_empty(0), one, 1, []))
            self._samples, self._terms[n] = len(result), self._raw(result)
        elif used:
            rule: Callable[[fx.Node, Any], list[Term]] | None = getattr(self, f"_on_{what}", None)
            if rule is not None:
                self._terms[n] = rule(n, result)
            elif what != "shape":
                self._terms[n] = self._other(n, result, used)
            if n in self._terms and isinstance(result, Tensor) and result.shape[:1] != (self._samples,):
                self._refuse(n, f"it returns shape {tuple(result.shape)} for {self._samples} samples")
        return result

    def _other(self, n: Node, result: Any, used: list[fx.Node]) -> list[Term]:
        if self._reads_parameters(n):
            self._refuse(n, "it reads parameters, and paths are not followed through it")
        weightless = all(term.layer == 0 and not term.norms for node in used for term in self._terms[node])
        if weightless and isinstance(result, Tensor) and result.dim() > 1:
            self.computed[n] = result
            return self._raw(result)
        if (
            kind(self._graph, n) in ("reshape", "rearrange")
            and [user.op for user in n.users] == ["output"]
            and self._only_reorders(n)
        ):
            return self._terms[used[0]]  # the order of the outputs does not matter
        self._refuse(n, "paths are not followed through it")

    def _reads_parameters(self, n: Node) -> bool:
        """Return True if a node, or a constant among its arguments, depends on parameters."""
        if n.op == "call_module":
            return any(True for _ in self._graph.get_submodule(str(n.target)).parameters())
        if n.op == "get_attr":
            return isinstance(super().fetch_attr(str(n.target)), nn.Parameter)
        constants = (node for node in n.all_input_nodes if node not in self._terms)
        return any(self._reads_parameters(node) for node in constants)

    def _only_reorders(self, n: Node) -> bool:
        """Return True if a node returns each entry of each sample exactly once."""
        z = self._input(n)
        numbers = torch.arange(z.numel(), device=z.device).view_as(z)
        moved = self._applied(n, numbers)
        return (
            isinstance(moved, Tensor)
            and moved.numel() == z.numel()
            and torch.equal(moved.reshape(self._samples, -1).sort(1).values, numbers.view(self._samples, -1))
        )

    def _raw(self, x: Tensor) -> list[Term]:
        """Return the term of the input, or of a value computed from it without weights: its paths begin at every entry."""
        x = x.real if x.is_complex() else x  # a function of complex values becomes real before it meets weights
        profile = _by_position(x, x.shape[1]).to(self._dtype)
        outputs = torch.arange(len(profile), device=x.device)
        return [Term(0, PositionMap(torch.zeros_like(outputs), outputs), profile, 0, x.new_ones(x.shape[1]))]

    def _on_output(self, n: Node, result: Any) -> list[Term]:
        if not isinstance(result, Tensor) or not result.is_floating_point():
            got = result.dtype if isinstance(result, Tensor) else type(result).__name__
            raise TypeError(f"model: got {got} from it, want one tensor of a floating-point dtype")
        terms = self._input_terms(n)
        channels = terms[0].profile.shape[2]
        window = torch.arange(result[0].numel() // channels, device=result.device).unsqueeze(1)
        self.layers.append(Layer("output", terms, result.new_ones(1, channels, len(window)), window, 1, []))
        return terms

    # Layers of weights

    def _on_linear(self, n: Node, result: Tensor) -> list[Term]:
        z, module = self._input(n), self._module(n)
        if z.dim() != 2:
            self._refuse(n, f"it shares its weights along all but the last of the dimensions {tuple(z.shape)}")
        channels = self._channels(first(n))
        window = torch.arange(z.shape[1] // channels, device=z.device).unsqueeze(1)
        return self._weighted(n, module, window, 1, (channels, len(window)))

    def _on_conv(self, n: Node, result: Tensor) -> list[Term]:
        z, module = self._input(n), self._module(n)
        if z.dim() != module.weight.dim():
            self._refuse(n, f"it takes the dimensions {tuple(z.shape)} for one sample's")
        width = module.weight.shape[2:].numel()
        # The window is found by convolving the positions' numbers, from 1 on, with kernels that have a single weight of 1.
        numbers = torch.arange(1, z.shape[2:].numel() + 1, dtype=torch.float64, device=z.device)
        sizes = module.kernel_size, module.stride, module.padding, module.dilation
        finder = _CONVOLUTIONS[z.dim() - 3](1, width, *sizes, bias=False, padding_mode=module.padding_mode).to(numbers)
        finder.weight.copy_(torch.eye(width).view_as(finder.weight))
        window = finder(numbers.view(1, 1, *z.shape[2:])).view(width, -1).round().long() - 1
        terms = self._weighted(n, module, window, module.groups, (module.weight.shape[1], width))
        self._made[n].shape = tuple(result.shape[2:])
        if result.shape[2:] == z.shape[2:] and max(module.stride) == 1:
            spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            before = [span // 2 for span in spans] if isinstance(module.padding, str) else module.padding
            self._made[n].shifts = tuple(
                tuple(range(-start, span - start + 1, step))
                for start, span, step in zip(before, spans, module.dilation, strict=True)
            )
        return terms

    def _weighted(self, n: Node, module: Any, window: Tensor, groups: int, shape: tuple[int, int]) -> list[Term]:
        weight = module.effective_weight() if isinstance(module, LinearForm) else module.weight
        biases = [] if module.bias is None else [module.bias]
        terms = self._input_terms(n)
        self._made[n] = Layer(str(n.target), terms, weight.reshape(-1, *shape), window, groups, biases)
        self.layers.append(self._made[n])
        positions = torch.arange(window.shape[1], device=window.device)
        return [self._ones(PositionMap(positions, positions))]

    def _ones(self, position_map: PositionMap) -> Term:
        """Return a term with profile 1 that leads on from the newest layer's output."""
        weight = self.layers[-1].weight
        profile = torch.ones(
            len(position_map.inputs), self._samples, len(weight), dtype=self._dtype, device=weight.device
        )
        return Term(len(self.layers) - 1, position_map, profile, 0, weight.new_ones(len(weight)))

    def _on_batch_norm(self, n: Node, result: Tensor) -> list[Term]:
        """Treat the scale as a weight of the paths, and the shift as a layer where paths begin."""
        module, terms, channels = self._module(n), self._input_terms(n), self._channels(first(n))
        if module.running_mean is None:
            self._refuse(n, "it uses the statistics of the batch, which couple its samples")
        if module.num_features != channels:
            self._refuse(n, f"it scales each of {module.num_features} features, want one scale for each channel")
        scale = (module.running_var + module.eps).rsqrt()
        scale = scale if module.weight is None else scale * module.weight
        shift = -module.running_mean * scale
        shift = shift if module.bias is None else shift + module.bias
        before = self._made.get(first(n))
        if before is not None and len(first(n).users) == 1:  # fold the norm into the layer before it
            before.weight = before.weight * scale[:, None, None]
            before.biases = [*(bias * scale for bias in before.biases), shift]
            return terms
        one = torch.zeros(1, 1, dtype=torch.int64, device=shift.device)
        self.layers.append(Layer(str(n.target), [], shift.new_empty(len(shift), 0, 1), one, 1, [shift]))
        everywhere = torch.arange(result[0].numel() // channels, device=shift.device)
        scaled = [replace(t, scale=t.scale * scale, norms=(*t.norms, str(n.target))) for t in terms]
        return [*scaled, self._ones(PositionMap(torch.zeros_like(everywhere), everywhere))]

    # Operations without weights

    def _on_relu(self, n: Node, result: Tensor) -> list[Term]:
        return self._gated(n, self._input(n) > 0)

    def _on_gate(self, n: Node, result: Tensor) -> list[Term]:
        return self._gated(n, self.env[n.args[1]])

    def _gated(self, n: Node, gate: Tensor) -> list[Term]:
        terms = self._input_terms(n)
        gate = _by_position(gate, terms[0].profile.shape[2])
        return [replace(t, profile=t.profile * gate[t.position_map.outputs]) for t in terms]

    def _same(self, n: Node, result: Tensor) -> list[Term]:
        return self._input_terms(n)

    _on_flatten = _on_identity = _same

    def _on_dropout(self, n: Node, result: Tensor) -> list[Term]:
        if n.op != "call_module" and not torch.equal(result, self._input(n)):
            self._refuse(n, "it draws random numbers; want training=False")
        return self._input_terms(n)

    def _resampled_by(self, n: Node, result: Tensor) -> list[Term]:
        """Follow an operation on positions that is linear and the same for all channels and samples."""
        if self._input(n).dim() < 3:
            return self._other(n, result, [first(n)])
        known = n in self._resampled
        position_map, weights = self._resampling(n, lambda z: self._applied(n, z))
        if not known:
            z = self._input(n)[:1].flatten(2).double()
            want = z.new_zeros(*z.shape[:2], result.shape[2:].numel())
            want.index_add_(2, position_map.outputs, z[:, :, position_map.inputs] * weights)
            self._expect(n, result, want)
        weights = weights.to(self._dtype)[:, None, None]
        return [self._through(t, position_map, weights) for t in self._input_terms(n)]

    _on_avg_pool = _on_adaptive_avg_pool = _on_global_avg_pool = _on_pad = _on_upsample = _resampled_by

    def _on_mean(self, n: Node, result: Tensor) -> list[Term]:
        dims = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", n.kwargs.get("axis"))
        dims = [dims] if isinstance(dims, int) else dims or [0]
        if any(d % self._input(n).dim() < 2 for d in dims):
            self._refuse(n, "it is not a mean over positions alone")
        return self._resampled_by(n, result)

    def _on_max_pool(self, n: Node, result: Tensor) -> list[Term]:
        if not isinstance(result, Tensor):
            self._refuse(n, "it returns indices too")
        if self._input(n).dim() < 3:
            return self._other(n, result, [first(n)])
        if n.op == "call_module":
            pool = copy.copy(self.fetch_attr(str(n.target)))
            pool.return_indices = True
            _, index = pool(self._input(n))
        else:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            _, index = getattr(F, n.target.__name__)(*args, **{**kwargs, "return_indices": True})
        return self._chosen(n, result, index, lambda z: self._applied(n, z))

    def _on_route(self, n: Node, result: Tensor) -> list[Term]:
        place = int(n.args[1].target[len(GATE) :])
        pool = self._pools[place - len(self._gates)]  # the pools' choices are the last entries of the gates
        return self._chosen(n, result, self.env[n.args[1]], pool)

    def _chosen(self, n: Node, result: Tensor, index: Tensor, pool: Pool) -> list[Term]:
        """Treat the choice of a position as a gate of each position that could have been chosen."""
        known = n in self._resampled
        position_map, _ = self._resampling(n, pool)
        if not known:
            z, chosen = self._input(n)[:1].flatten(2), index[:1].flatten(2)
            self._expect(n, result, z.gather(2, chosen) if int(chosen.max()) < z.shape[2] else z[:, :, :0])
        chosen = _by_position(index, index.shape[1])[position_map.outputs] == position_map.inputs[:, None, None]
        return [self._through(t, position_map, chosen) for t in self._input_terms(n)]

    def _on_scale(self, n: Node, result: Tensor) -> list[Term]:
        (scaled,) = (node for node in n.all_input_nodes if node in self._terms)
        if len(n.all_input_nodes) > 1:
            return self._other(n, result, [scaled])
        if result.is_complex():
            self._refuse(n, "it multiplies by a complex number")
        factor = float(self._applied(n, torch.ones((), dtype=torch.float64)))
        return [replace(t, profile=t.profile * factor) for t in self._terms[scaled]]

    def _on_add(self, n: Node, result: Tensor) -> list[Term]:
        parts = [arg for arg in n.args[:2] if arg in self._terms]
        if len(parts) < 2 or n.kwargs or any(self.env[part].shape != result.shape for part in parts):
            self._refuse(n, "want a sum of two values of one shape that both depend on the input")
        if len({self._channels(part) for part in parts}) > 1:
            self._refuse(n, "its values were flattened from different numbers of channels")
        terms: list[Term] = []
        for term in (t for part in parts for t in self._terms[part]):
            same = next((i for i, t in enumerate(terms) if t.adds_to(term)), None)
            if same is None:
                terms.append(term)
            else:
                terms[same] = replace(term, profile=terms[same].profile + term.profile)
        return terms

    def _on_cat(self, n: Node, result: Tensor) -> list[Term]:
        parts = n.args[0] if n.args else n.kwargs["tensors"]
        dim = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", n.kwargs.get("axis", 0))
        if dim % result.dim() != 1 or any(part not in self._terms for part in parts):
            self._refuse(n, "want values that depend on the input, side by side as channels (dim=1)")
        widths = [self._channels(part) for part in parts]
        if sum(widths) != result.shape[1]:
            self._refuse(n, "its values were flattened, want them side by side before that")
        terms = []
        for i, part in enumerate(parts):
            sides = sum(widths[:i]), sum(widths[i + 1 :])
            for t in self._terms[part]:
                # All channels of the input are the same constant 1; their values are in the profile. So they need no shift.
                shift = t.shift + sides[0] if t.layer or t.norms else 0
                scale = F.pad(t.scale, sides, value=1.0)
                terms.append(replace(t, profile=F.pad(t.profile, sides), scale=scale, shift=shift))
        return terms

    def _resampling(self, n: Node, operation: Pool) -> tuple[PositionMap, Tensor]:
        """Return the position map of an operation on positions and its weights (T,), from its result for each position alone."""
        if n not in self._resampled:
            z = self._input(n)
            positions = z.shape[2:].numel()
            each = torch.eye(positions, dtype=torch.float64, device=z.device).view(positions, 1, *z.shape[2:])
            try:
                constant, matrix = operation(torch.zeros_like(each[:1])), operation(each)
            except RuntimeError as error:  # more dimensions than the positions have
                self._refuse(n, f"it is not an operation on positions alone: {error}")
            if bool(constant.any()):
                self._refuse(n, "it adds a constant")
            if matrix.shape[:2] != (positions, 1):
                self._refuse(n, "it is not an operation on positions alone")
            matrix = matrix.reshape(positions, -1)
            inputs, outputs = matrix.nonzero().unbind(1)
            self._resampled[n] = PositionMap(inputs, outputs), matrix[inputs, outputs]
        return self._resampled[n]

    def _through(self, term: Term, position_map: PositionMap, factor: Tensor) -> Term:
        """Compose a term with a position map whose entries multiply by a factor (T or T, n, channels)."""
        outputs = term.position_map.outputs
        if torch.equal(outputs, torch.arange(len(outputs), device=outputs.device)):
            before, then = position_map.inputs.sort(stable=True)  # the order that the search below finds
        else:
            before, then = (outputs.unsqueeze(1) == position_map.inputs).nonzero().unbind(1)
        if not len(before):  # as where padding takes the place of all positions: one entry stays, of zeros
            nowhere = PositionMap(term.position_map.inputs[:1], torch.zeros_like(outputs[:1]))
            return replace(term, position_map=nowhere, profile=torch.zeros_like(term.profile[:1]))
        both = PositionMap(term.position_map.inputs[before], position_map.outputs[then])
        return replace(term, position_map=both, profile=term.profile[before] * factor[then])

    def _expect(self, n: Node, result: Tensor, want: Tensor) -> None:
        """Refuse an operation whose result is not that of its position map, (1, channels, positions) for the first sample."""
        got = result[:1].reshape(*result[:1].shape[:2], -1)
        tolerance = torch.finfo(result.dtype).eps ** 0.5
        if got.shape != want.shape or not torch.allclose(
            got.double(), want.double(), rtol=tolerance, atol=tolerance * float(want.abs().amax()), equal_nan=True
        ):
            self._refuse(n, "it is not an operation on positions alone, the same for all channels")

    # About the current node

    def _module(self, n: Node) -> Any:
        """Return the module that the node calls. Refuses a module whose parameters another call uses too."""
        if n.op != "call_module":
            self._refuse(n, "its weights are not those of a module of its own")
        module = self._graph.get_submodule(str(n.target))
        for owned in (module, *module.parameters()):
            if self._used.setdefault(id(owned), n.name) != n.name:
                self._refuse(n, "its weights are used more than once")
        return module

    def _input(self, n: Node) -> Tensor:
        return self.env[first(n)]

    def _input_terms(self, n: Node) -> list[Term]:
        return self._terms[first(n)]

    def _channels(self, node: Any) -> int:
        return self._terms[node][0].profile.shape[2]

    def _applied(self, n: Node, value: Tensor) -> Tensor:
        """Return the node's result for another value in the place of its input."""

        def given(node: Node) -> Any:
            return value if node in self._terms else self.env[node]

        args, kwargs = fx.node.map_arg(n.args, given), fx.node.map_arg(n.kwargs, given)
        return getattr(self, n.op)(n.target, args, kwargs)

    def _refuse(self, n: Node, reason: str) -> NoReturn:
        raise UnsupportedOperation(f"{where(self._graph, n)}: {reason}; method='montecarlo' needs no paths")


def _by_position(value: Tensor, channels: int) -> Tensor:
    """Reshape a value (n, channels, *positions), which may be flattened, to (positions, n, channels)."""
    return value.reshape(len(value), channels, value[0].numel() // channels).permute(2, 0, 1)
