"""Read a deep linearly gated network back as an oblique decision tree, whose splits are hyperplanes of its gates.

The tree is grown from the root: at each node it takes the gate across whose hyperplane the network jumps most often, measured at
the node's samples. Banerjee et al. (ICLR 2025, "Deep Networks Learn Features From Local Discontinuities in the Label Function")
extract trees by such discontinuities; the search, the stopping rule and the pruning here are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Task = Literal["classification", "regression"]
Outputs = Callable[[Tensor], Tensor]
_NEAREST = 100  # samples at which the jump across a hyperplane is measured
_STEP = 0.05  # to either side of it, in standard deviations of the samples' distances
_GAIN = 1e-3  # weight of the gain in the response's variance, which decides between gates with equal jumps
_ENTRIES = 1 << 22  # of the points at a time


class _Nodes(NamedTuple):
    """The nodes of a tree, each before those below it; the root is node 0, and -1 stands for none."""

    no: Tensor  # (nodes,) child where the gate is off
    yes: Tensor  # (nodes,) child where it is on
    gate: Tensor  # (nodes, 2) its layer and unit
    weight: Tensor  # (nodes, d)
    bias: Tensor  # (nodes,)
    samples: Tensor  # (nodes,) how many
    value: Tensor  # (nodes, k) mean response
    error: Tensor  # (nodes,) sum of squared deviations from it


class ObliqueTree:
    """An oblique decision tree of a gated network: `to_tree` makes it, and it prints as text.

    A split sends x to `yes` where weight x + bias > 0, the half-space in which a gate of the network is on, else to `no`.
    The value of a node is the mean response of the network at its samples: the shares of the network's classes, or its outputs.

    Attributes:
        task: 'classification' or 'regression'.
        no: Child of each node where its gate is off, (nodes,) int64; -1 at leaves. Node 0 is the root.
        yes: Child where the gate is on.
        gate: Layer and unit of each node's gate, (nodes, 2) int64, as in `effective_gate_weights`; -1 at leaves.
        weight: Normal of each node's hyperplane, (nodes, d); 0 at leaves.
        bias: Offset of each node's hyperplane, (nodes,).
        count: Number of samples in each node, (nodes,) int64.
        value: Value of each node, (nodes, classes or outputs).

    Example:
        >>> import torch
        >>> from interp_nn.nn import DLGN, HardGate
        >>> _ = torch.manual_seed(0)
        >>> model, x = DLGN((2, 3, 1), gate=HardGate()), torch.randn(200, 2)
        >>> tree = model.to_tree(x, task="regression")
        >>> tree.leaves, torch.allclose(tree(x), model(x), atol=1e-6)
        (6, True)
    """

    def __init__(self, task: Task, outputs: Outputs, nodes: _Nodes) -> None:
        self.task, self._outputs, self._nodes = task, outputs, nodes
        self.no, self.yes, self.gate, self.weight, self.bias, self.count, self.value, _ = nodes

    @property
    def is_leaf(self) -> Tensor:
        """Return (nodes,) bool: True for each leaf."""
        return self.no < 0

    @property
    def leaves(self) -> int:
        """Return the number of leaves."""
        return int(self.is_leaf.sum())

    @property
    def depth(self) -> int:
        """Return the largest number of splits from the root to a leaf."""
        depths = [0] * len(self.no)
        for node, (no, yes) in enumerate(zip(self.no.tolist(), self.yes.tolist(), strict=True)):
            if no >= 0:
                depths[no] = depths[yes] = depths[node] + 1
        return max(depths)

    @property
    def coverage(self) -> Tensor:
        """Return the share of the samples in each node, (nodes,)."""
        return self.count / self.count[0]

    def apply(self, x: Tensor) -> Tensor:
        """Return the leaf of each x (n, d), as (n,) int64 numbers of nodes.

        Raises:
            ValueError: x has another shape.
        """
        if x.dim() != 2 or x.shape[1] != self.weight.shape[1]:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want (n, {self.weight.shape[1]})")
        node = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        while bool((inner := self.no[node] >= 0).any()):
            at = node[inner]
            on = (x[inner] * self.weight[at]).sum(1) + self.bias[at] > 0
            node[inner] = torch.where(on, self.yes[at], self.no[at])
        return node

    def __call__(self, x: Tensor) -> Tensor:
        """Return the value of each x (n, d): class shares, or outputs (n, k)."""
        return self.value[self.apply(x)]

    def predict(self, x: Tensor) -> Tensor:
        """Return the class of each x (n, d), (n,) int64; for regression the outputs (n, k)."""
        return self(x).argmax(1) if self.task == "classification" else self(x)

    @torch.no_grad()
    def fidelity(self, x: Tensor) -> float:
        """Compare the tree with the network as it is now.

        Args:
            x: Samples (n, d).

        Returns:
            The share of samples to which both give the same class. For regression R² = 1 - sum |F - tree|² / sum |F - mean F|²;
            NaN if F is constant.
        """
        found, wanted = self(x), response(self._outputs, x, self.task)
        if self.task == "classification":
            return float((found.argmax(1) == wanted.argmax(1)).double().mean())
        if bool((wanted == wanted[:1]).all()):
            return torch.nan
        return float(1 - (wanted - found).square().sum() / (wanted - wanted.mean(0)).square().sum())

    def prune(self, leaves: int) -> ObliqueTree:
        """Make a smaller tree: merge the leaves below a node, one node after another, where this costs least (weakest links).

        The cost is the growth of the squared error against the network's response at the samples of `to_tree`, divided by the
        number of leaves that go.

        Args:
            leaves: Largest number of leaves.

        Returns:
            A new tree.

        Raises:
            ValueError: `leaves` is below 1.
        """
        if leaves < 1:
            raise ValueError(f"leaves: got {leaves}, want at least 1")
        no, yes, error = self.no.tolist(), self.yes.tolist(), self._nodes.error.tolist()
        while True:
            size, below = [1] * len(no), list(error)
            for node in reversed(range(len(no))):  # children come after their parents
                if no[node] >= 0:
                    size[node] = size[no[node]] + size[yes[node]]
                    below[node] = below[no[node]] + below[yes[node]]
            if size[0] <= leaves:
                break
            reached = self._reached(no, yes)
            cost = {i: (error[i] - below[i]) / (size[i] - 1) for i in reached if no[i] >= 0}
            weakest = min(cost, key=lambda i: (cost[i], -i))
            no[weakest] = yes[weakest] = -1
        kept = sorted(self._reached(no, yes))
        number = {-1: -1, **{node: i for i, node in enumerate(kept)}}
        like = self.no
        links = [torch.tensor([number[side[i]] for i in kept], device=like.device) for side in (no, yes)]
        rest = [part[torch.tensor(kept, device=like.device)] for part in self._nodes[2:]]
        for part, empty in zip(rest[:3], (-1, 0, 0), strict=True):
            part[links[0] < 0] = empty
        return ObliqueTree(self.task, self._outputs, _Nodes(*links, *rest))

    def to_text(
        self, feature_names: Sequence[str] | None = None, class_names: Sequence[str] | None = None, *, terms: int = 4
    ) -> str:
        """Write the tree as text: a line for each split and leaf, indented by depth.

        Args:
            feature_names: Names of the d inputs; by default x0, x1, ...
            class_names: Names of the classes; by default 0, 1, ...
            terms: Number of terms of each hyperplane, those of largest |weight|; the rest is counted.

        Returns:
            The text. Hyperplanes have normals of length 1.

        Raises:
            ValueError: Another number of names.
        """
        lines = [f"{int(self.count[0])} samples, {self.leaves} leaves, depth {self.depth}"]
        waiting = [(0, 0, "")]
        while waiting:
            node, depth, answer = waiting.pop()
            lines.append(f"{'|  ' * depth}{answer}{self.label(node, feature_names, class_names, terms=terms)}")
            if self.no[node] >= 0:
                waiting += [(int(self.no[node]), depth + 1, "no:  "), (int(self.yes[node]), depth + 1, "yes: ")]
        return "\n".join(lines)

    def label(
        self,
        node: int,
        feature_names: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        *,
        terms: int = 4,
    ) -> str:
        """Return the line of a node in `to_text`: its hyperplane and gate, or its value and coverage at a leaf."""
        names = _names(feature_names, self.weight.shape[1], "feature_names", "x")
        classes = _names(class_names, self.value.shape[1], "class_names", "")
        if self.no[node] >= 0:
            layer, unit = self.gate[node].tolist()
            length = self.weight[node].norm()
            normal, threshold = (self.weight[node] / length).tolist(), 0.0 - float(self.bias[node] / length)
            order = sorted((j for j in range(len(normal)) if normal[j]), key=lambda j: -abs(normal[j]))
            shown = " ".join(f"{'-' if normal[j] < 0 else '+'} {abs(normal[j]):.2f} {names[j]}" for j in order[:terms])
            more = f" + {len(order) - terms} more" if len(order) > terms else ""
            return f"{shown.removeprefix('+ ')}{more} > {threshold:.3g}?  [layer {layer}, gate {unit}]"
        value, share = self.value[node], f"{100 * float(self.coverage[node]):.1f} % of samples"
        if self.task == "classification":
            best = int(value.argmax())
            pure = "" if value[best] == 1 else f" ({100 * float(value[best]):.0f} %)"
            return f"{classes[best]}{pure}, {share}"
        return f"{', '.join(f'{v:.4g}' for v in value.tolist())}, {share}"

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return f"ObliqueTree({self.task}, {self.leaves} leaves, depth {self.depth}, {int(self.count[0])} samples)"

    @staticmethod
    def _reached(no: list[int], yes: list[int]) -> list[int]:
        reached = [0]
        for node in reached:  # grows while it is read
            reached += [child for child in (no[node], yes[node]) if child >= 0]
        return reached


def response(outputs: Outputs, x: Tensor, task: Task) -> Tensor:
    """Compute what a tree approximates: outputs (n, k) for regression, or the class as rows of 0 and 1.

    The class is the largest output, or the sign of a single one.
    """
    out = outputs(x)
    if task == "regression":
        return out
    classes = (out[:, 0] > 0).long() if out.shape[1] == 1 else out.argmax(1)
    return F.one_hot(classes, max(2, out.shape[1])).to(out.dtype)


@torch.no_grad()
def grow(
    outputs: Outputs,
    hard_outputs: Outputs,
    hyperplanes: Sequence[tuple[Tensor, Tensor]],
    x: Tensor,
    task: Task,
    min_samples: int,
) -> ObliqueTree:
    """Grow the tree of a network until the response is constant in each leaf or no gate divides it.

    Args:
        outputs: The network, from (n, d) to (n, k).
        hard_outputs: The same with gates that are 0 or 1.
        hyperplanes: Weight (units, d) and bias (units,) of each layer's gates.
        x: Samples (n, d).
        task: What the tree approximates.
        min_samples: Smallest number of samples in a leaf.

    Raises:
        TypeError: x is no tensor of the network's dtype.
        ValueError: No samples, samples that are not finite or of another shape, another task, or a `min_samples` below 1.
    """
    weight, bias = (torch.cat(parts).detach() for parts in zip(*hyperplanes, strict=True))
    if not isinstance(x, Tensor) or x.dtype != weight.dtype:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: got {got}, want a tensor of the network's dtype {weight.dtype}")
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or not len(x) or not bool(x.isfinite().all()):
        raise ValueError(f"x: got shape {tuple(x.shape)}, want finite samples (n, {weight.shape[1]}) with n > 0")
    if task not in get_args(Task):
        raise ValueError(f"task: got {task!r}, want 'classification' or 'regression'")
    if min_samples < 1:
        raise ValueError(f"min_samples: got {min_samples}, want at least 1")
    where = torch.tensor([(i, j) for i, (w, _) in enumerate(hyperplanes) for j in range(len(w))], device=x.device)
    gates = _Gates(x, weight, bias, response(outputs, x, task), lambda points: response(hard_outputs, points, task))
    rows: list[list[Any]] = []
    waiting: list[tuple[Tensor, int, int]] = [(torch.arange(len(x), device=x.device), -1, 0)]
    while waiting:
        samples, parent, side = waiting.pop()
        node = len(rows)
        if parent >= 0:
            rows[parent][side] = node
        own = gates.response[samples]
        mean = own.mean(0)
        best = gates.best(samples, min_samples)
        empty = (where.new_full((2,), -1), x.new_zeros(x.shape[1]), x.new_zeros(()))
        split = empty if best is None else (where[best], weight[best], bias[best])
        rows.append([-1, -1, *split, len(samples), mean, (own - mean).square().sum()])
        if best is not None:
            on = gates.on[samples, best]
            waiting += [(samples[on], node, 1), (samples[~on], node, 0)]
    columns = [
        torch.stack(column) if isinstance(column[0], Tensor) else torch.tensor(column, device=x.device)
        for column in zip(*rows, strict=True)
    ]
    return ObliqueTree(task, outputs, _Nodes(*columns))


class _Gates:
    """The gates of a network at samples x, and the best one to divide some of them."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, response: Tensor, hard: Outputs) -> None:
        lengths = weight.norm(dim=1)
        lengths = torch.where(lengths > 0, lengths, 1)  # a zero normal divides no samples
        self.normals = weight / lengths.unsqueeze(1)
        self.x, self.response, self.hard = x, response, hard
        # As `ObliqueTree.apply` computes them, so that no sample changes sides by rounding.
        self.distance = torch.stack([(x * w).sum(1) + b for w, b in zip(weight, bias, strict=True)], 1) / lengths
        self.on = self.distance > 0
        self.step = _STEP * self.distance.std(0, correction=0)
        self.spread = float((response - response.mean(0)).square().sum(1).mean())

    def best(self, samples: Tensor, min_samples: int) -> int | None:
        """Return the gate that divides the samples (indices), or None where nothing is to be gained."""
        own, on = self.response[samples], self.on[samples].to(self.response.dtype)
        rounding = 64 * torch.finfo(own.dtype).eps * float(self.response.abs().amax())
        if float((own.amax(0) - own.amin(0)).amax()) <= rounding:
            return None
        yes = on.sum(0)
        no = len(samples) - yes
        able = ((yes >= min_samples) & (no >= min_samples)).nonzero().squeeze(1)
        if not len(able):
            return None
        # The part of the variance that lies between the two sides, for each gate.
        centred = own - own.mean(0)
        gain = (on[:, able].T @ centred).square().sum(1) * len(samples) / (yes[able] * no[able])
        score = _GAIN * gain / centred.square().sum() + self._jumps(samples, able) / self.spread
        return int(able[score.argmax()])

    def _jumps(self, samples: Tensor, gates: Tensor) -> Tensor:
        """Compute the mean squared jump of the network's response across each hyperplane, beside the nearest samples."""
        nearest = min(_NEAREST, len(samples))
        found = []
        for part in gates.split(max(1, _ENTRIES // (2 * nearest * self.x.shape[1]))):
            distance = self.distance[samples][:, part]
            near = distance.abs().topk(nearest, 0, largest=False).indices  # (nearest, gates)
            normals = self.normals[part]
            points = self.x[samples][near] - distance.gather(0, near).unsqueeze(2) * normals
            step = self.step[part].unsqueeze(1) * normals
            sides = [self.hard((points + sign * step).flatten(0, 1)) for sign in (1, -1)]
            found.append((sides[0] - sides[1]).square().sum(1).view(nearest, len(part)).mean(0))
        return torch.cat(found)


def _names(given: Sequence[str] | None, count: int, argument: str, prefix: str) -> list[str]:
    names = [f"{prefix}{j}" for j in range(count)] if given is None else [str(name) for name in given]
    if len(names) != count:
        raise ValueError(f"{argument}: got {len(names)} names, want {count}")
    return names
