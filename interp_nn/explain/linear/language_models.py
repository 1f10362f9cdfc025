"""Language models: what each token and each layer's constants add to a logit, and the directions that a position's state takes.

Source: Golden, Equivalent Linear Mappings of Large Language Models, TMLR 2025 (arXiv 2505.24293), for the directions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp_nn.explain.following.replay import check_model
from interp_nn.explain.linear.affine_map import AffineMap, linearize

_SHOWN = 8  # rows of a printed table
_WORDS = 5  # tokens that a direction is decoded to


@dataclass(frozen=True, eq=False)
class TokenContributions:
    """What each token and each layer's constants add to one logit of each of n samples; `str` gives the largest.

    The logit is the sum of its tokens' contributions and of the layers' constants.

    Attributes:
        tokens: The t tokens of each sample, as text.
        position: The position whose logit it is.
        logits: Index of the logit (n,).
        names: The n logits, as text.
        values: The logits' values by the model itself, (n,).
        contributions: What each token adds, (n, t): the sum of W e over the entries of its embedding e.
        constants: By layer, in call order, its part of the constant, (n,).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).eval()
        >>> found = token_contributions(model, torch.tensor([[3, 1]]), 2)
        >>> found.contributions.shape, list(found.constants), found.check() < 1e-6
        (torch.Size([1, 2]), ['1'], True)
    """

    tokens: tuple[tuple[str, ...], ...]
    position: int
    logits: Tensor
    names: tuple[str, ...]
    values: Tensor
    contributions: Tensor
    constants: dict[str, Tensor]

    def check(self) -> float:
        """Compute |sum of the contributions and constants - the model's logit|, relative to the largest of them all."""
        terms = torch.cat([self.contributions, *(part.unsqueeze(1) for part in self.constants.values())], 1).double()
        scale = float(torch.maximum(terms.abs().amax(), self.values.abs().amax()))
        return float((terms.sum(1) - self.values.double()).abs().max()) / (scale or 1.0)

    def to_pandas(self, k: int | None = None) -> Any:
        """Return a pandas.DataFrame: each sample's k largest tokens and layers, and the sums of the others; needs pandas.

        Layers whose constants add nothing are left out.

        Args:
            k: Number of tokens and of layers. None is all.

        Returns:
            A data frame with the columns sample, part ("token" or "constant"), position, name and contribution. The sum over
            a sample is its logit. The position of a layer or a sum is missing.
        """
        columns = ("sample", "part", "position", "name", "contribution")
        rows = [(i, *row) for i in range(len(self.tokens)) for row in self._rows(i, k)]
        return _data_frame(columns, rows).astype({"position": "Int64"})

    def __str__(self) -> str:
        lines = []
        for i, name in enumerate(self.names):
            lines.append(f"sample {i}: logit {name!r} at position {self.position} = {float(self.values[i]):.4g}")
            rows = [
                ("" if at is None else str(at), what, f"{value:+.4f}") for _, at, what, value in self._rows(i, _SHOWN)
            ]
            lines += _aligned(rows, "><>")
        return "\n".join([*lines, f"the sums differ from the model by {self.check():.1e} of the largest term"])

    def _rows(self, i: int, k: int | None) -> list[tuple[str, int | None, str, float]]:
        """Return (part, position, name, contribution) of the k largest tokens and layers of a sample, and of the rests."""
        if k is not None and k < 1:
            raise ValueError(f"k: got {k}, want at least 1, or None for all")
        rows: list[tuple[str, int | None, str, float]] = []
        own = {layer: part[i] for layer, part in self.constants.items() if part[i] != 0}
        layers = torch.stack(list(own.values())) if own else self.values[:0]
        for part, terms, names in (
            ("token", self.contributions[i], [repr(token) for token in self.tokens[i]]),
            ("constant", layers, list(own)),
        ):
            order = terms.abs().argsort(descending=True, stable=True)[:k].tolist()
            rows += [(part, j if part == "token" else None, names[j], float(terms[j])) for j in order]
            if left := len(terms) - len(order):
                rest = torch.ones(len(terms), dtype=torch.bool, device=terms.device)
                rest[order] = False
                what = "tokens" if part == "token" else "layers"
                rows.append((part, None, f"{left} other {what}", float(terms[rest].double().sum())))
        return rows


def token_contributions(
    model: nn.Module,
    ids: Tensor,
    logit: int | Tensor | None = None,
    *,
    position: int = -1,
    tokenizer: Any = None,
    held: str = "activated",
    embedding: str | None = None,
) -> TokenContributions:
    """Compute what each token and each layer's constants add to a logit of a language model.

    The model is F = W e + b in the embeddings e of its tokens, with held factors, see `linearize`. W is not formed: this takes
    one product with Wᵀ. Memory is that of a backward pass that also keeps what is held: for t tokens and each layer with h
    heads, attention's h t² weights, and a few values for each activation.

    Args:
        model: The network, in evaluation mode: token ids to logits (n, t, vocabulary), or to an object with these as `logits`,
            as transformers returns it.
        ids: Token ids (n, t) of an integer dtype, without padding.
        logit: Index of the logit, or a tensor (n,) int64 of one for each sample. By default, each sample's largest logit.
        position: The position whose logit it is; by default the last.
        tokenizer: An object with `decode([id])`, as transformers' tokenizers, or a function of an id; either returns text. By
            default, tokens are shown by their ids.
        held: The factor that a product holds: 'activated', 'left' or 'right', see `linearize`.
        embedding: Path of the layer that looks the ids up, if it is not found, see `linearize`.

    Returns:
        The contributions, whose sums are the logits to rounding.

    Raises:
        UnsupportedOperation: An operation without an affine map.
        ValueError: A logit or position out of range, or as `linearize` raises it.
        TypeError: No token ids, no logits, another tokenizer, or as `linearize` raises it.

    Example:
        >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3)).eval()
        >>> _ = nn.init.ones_(model[0].weight), nn.init.constant_(model[1].weight, 2.0), nn.init.ones_(model[1].bias)
        >>> print(token_contributions(model, torch.tensor([[0, 1]]), 2, tokenizer="abc".__getitem__))
        sample 0: logit 'c' at position 1 = 5
        1  'b'  +4.0000
        0  'a'  +0.0000
           1    +1.0000
        the sums differ from the model by 0.0e+00 of the largest term
    """
    text = _reader(tokenizer)
    position, logits = _at_position(model, ids, position)
    chosen = _chosen(logit, logits)
    rows = torch.arange(len(ids), device=logits.device)
    affine = _linearized(model, ids, lambda output: _logits(output)[:, position][rows, chosen], held, embedding)
    contributions = affine.contributions(affine.x).flatten(2).sum(2).detach()
    constants = {layer: part.detach() for layer, part in affine.bias_by_layer().items()}
    names = tuple(map(text, chosen.tolist()))
    values = logits[rows, chosen]
    return TokenContributions(_texts(ids, text), position, chosen, names, values, contributions, constants)


@dataclass(frozen=True, eq=False)
class SingularDirections:
    """The k leading singular directions of the map to a position's last hidden state; `str` gives their tokens.

    The state h = W e + b is the input of the unembedding, and e are the embeddings of all t tokens. At this input, direction i
    adds `strengths[i]` times its left vector to the state.

    Attributes:
        tokens: The t tokens of each sample, as text.
        position: The position whose state it is.
        values: Singular values σ of W (n, k), largest first.
        strengths: σ vᵀe (n, k): at least 0, by the choice of the vectors' signs.
        left: Left singular vectors u (n, k, d).
        right: Right singular vectors v (n, k, t, d').
        logits: The left vectors decoded by the unembedding, without its constant, (n, k, vocabulary).
        shares: Share of each token in v, the squared norm of its part, (n, k, t).
        text: The function from an id to text.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)).eval()
        >>> found = singular_directions(model, torch.tensor([[3, 1]]), 2)
        >>> found.values.shape, found.logits.shape, found.shares.sum(-1)
        (torch.Size([1, 2]), torch.Size([1, 2, 5]), tensor([[1.0000, 1.0000]]))
    """

    tokens: tuple[tuple[str, ...], ...]
    position: int
    values: Tensor
    strengths: Tensor
    left: Tensor
    right: Tensor
    logits: Tensor
    shares: Tensor
    text: Callable[[int], str]

    def to_pandas(self, k: int = _WORDS) -> Any:
        """Return a pandas.DataFrame with the k tokens that each direction raises, lowers and reads most; needs pandas.

        Args:
            k: Number of tokens in each list.

        Returns:
            A data frame with the columns sample, direction, value, strength, raises, lowers and reads; the last three are
            lists of pairs (token, logit or share).
        """
        columns = ("sample", "direction", "value", "strength", "raises", "lowers", "reads")
        return _data_frame(columns, list(self._rows(k)))

    def __str__(self) -> str:
        lines = [f"{self.values.shape[1]} leading directions of the state at position {self.position}"]
        rows = [("sample", "σ", "σ vᵀe", "raises", "lowers", "reads")]
        for i, _, value, strength, *lists in self._rows(_WORDS):
            raised, lowered = (" ".join(repr(word) for word, _ in pairs) for pairs in lists[:2])
            read = ", ".join(f"{word!r} {100 * share:.0f} %" for word, share in lists[2][:3])
            rows.append((str(i), f"{value:.3g}", f"{strength:.3g}", raised, lowered, read))
        return "\n".join([*lines, *_aligned(rows, ">>><<<")])

    def _rows(self, k: int) -> Iterator[tuple[Any, ...]]:
        if k < 1:
            raise ValueError(f"k: got {k}, want at least 1")

        def words(values: Tensor, sign: int) -> list[tuple[str, float]]:
            order = (sign * values).argsort(descending=True, stable=True)[:k].tolist()
            return [(self.text(j), float(values[j])) for j in order]

        for i in range(len(self.values)):
            for j in range(self.values.shape[1]):
                reads = self.shares[i, j].argsort(descending=True, stable=True)[:k].tolist()
                yield (
                    i, j, float(self.values[i, j]), float(self.strengths[i, j]), words(self.logits[i, j], 1),
                    words(self.logits[i, j], -1), [(self.tokens[i][at], float(self.shares[i, j, at])) for at in reads],
                )  # fmt: skip


def singular_directions(
    model: nn.Module,
    ids: Tensor,
    k: int = 4,
    *,
    position: int = -1,
    tokenizer: Any = None,
    unembedding: str | None = None,
    held: str = "activated",
    embedding: str | None = None,
) -> SingularDirections:
    """Compute the leading singular directions of the map from the embeddings to a position's state, read as tokens.

    W is not formed, see `AffineMap.svd(k, form_weight=False)`. Memory is that of `token_contributions`, twice what autograd
    keeps in it, and up to 64 k vectors of the embeddings' size.

    Args:
        model: The network, as for `token_contributions`.
        ids: Token ids (n, t) of an integer dtype, without padding.
        k: Number of directions.
        position: The position whose state it is; by default the last.
        tokenizer: As for `token_contributions`.
        unembedding: Path of the layer that turns states into logits. By default, the layer whose output the logits are, or the
            one that `get_output_embeddings` of transformers' models returns.
        held: The factor that a product holds: 'activated', 'left' or 'right', see `linearize`.
        embedding: Path of the layer that looks the ids up, if it is not found, see `linearize`.

    Returns:
        The directions.

    Raises:
        UnsupportedOperation: An operation without an affine map.
        ValueError: A position or k out of range, an unembedding that is not found or not affine, or as `linearize` raises it.
        TypeError: As for `token_contributions`.
        RuntimeError: The products did not converge, see `AffineMap.svd`.

    Example:
        >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), nn.Linear(2, 3)).eval()
        >>> weights = torch.ones(3, 2), torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([[1.0, 0], [-1, 0], [0, 1]])
        >>> for layer, weight in zip(model, weights):
        ...     _ = layer.weight.data.copy_(weight)
        >>> print(singular_directions(model, torch.tensor([[0, 1]]), 1, tokenizer="abc".__getitem__))
        1 leading directions of the state at position 1
        sample  σ  σ vᵀe  raises       lowers       reads
             0  3      3  'a' 'c' 'b'  'b' 'c' 'a'  'b' 100 %, 'a' 0 %

    Source: Golden, TMLR 2025 (arXiv 2505.24293).
    """
    text = _reader(tokenizer)
    position, _ = _at_position(model, ids, position)
    layer = _unembedding(model, ids, unembedding)
    with _inputs_of(layer) as last:

        def state(output: Any) -> Tensor:
            return last()[:, position]

        affine = _linearized(model, ids, state, held, embedding)
        left, values, right = affine.svd(k, form_weight=False)
        e = affine.x
    strengths = values * (right * e.unsqueeze(1)).flatten(2).sum(2)
    signs = torch.where(strengths < 0, -1.0, 1.0).to(values)
    left = left * signs.unsqueeze(2)
    right = right * signs.reshape(*signs.shape, *[1] * (right.dim() - 2))
    logits = _decoded(layer, left)
    return SingularDirections(
        _texts(ids, text),
        position,
        values,
        strengths.abs(),
        left,
        right,
        logits,
        right.square().flatten(3).sum(3),
        text,
    )


def _linearized(
    model: nn.Module, ids: Tensor, target: Callable[[Any], Tensor], held: str, embedding: str | None
) -> AffineMap:
    affine = linearize(model, ids, target, held=held, embedding=embedding)
    if affine.x.shape[:2] != ids.shape:
        raise ValueError(
            f"embedding: {embedding!r} returns {tuple(affine.x.shape)} for ids {tuple(ids.shape)}, want one vector for each token"
        )
    return affine


def _at_position(model: nn.Module, ids: Tensor, position: int) -> tuple[int, Tensor]:
    """Return the position as an index from 0, and the model's logits there (n, vocabulary)."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids: got {got}, want a tensor of token ids (n, t) of an integer dtype")
    check_model(model)
    if ids.dim() != 2 or not ids.numel():
        raise ValueError(f"ids: got shape {tuple(ids.shape)}, want (n, t) with n and t above 0")
    t = ids.shape[1]
    if not -t <= position < t:
        raise ValueError(f"position: got {position}, want an index of {t} tokens")
    with torch.inference_mode(False), torch.no_grad():
        logits = _logits(model(ids.detach().long()))
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"model: returned logits of shape {tuple(logits.shape)}, want {tuple(ids.shape)} and a vocabulary"
        )
    return position % t, logits[:, position]


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: returned {type(output).__name__}, want a tensor of logits, or an object with `logits`")
    return logits


def _chosen(logit: int | Tensor | None, logits: Tensor) -> Tensor:
    n, vocabulary = logits.shape
    if logit is None:
        return logits.argmax(1)
    if isinstance(logit, bool) or not isinstance(logit, (int, Tensor)):
        raise TypeError(f"logit: got {type(logit).__name__}, want an int, a tensor of them, or None")
    chosen = torch.as_tensor(logit, device=logits.device)
    if chosen.dtype != torch.int64 or chosen.shape not in ((), (n,)):
        raise ValueError(f"logit: got {chosen.dtype} of shape {tuple(chosen.shape)}, want int64 of shape ({n},)")
    if not 0 <= int(chosen.min()) <= int(chosen.max()) < vocabulary:
        raise ValueError(f"logit: got {logit}, want indices from 0 to {vocabulary - 1}")
    return chosen.expand(n)


def _reader(tokenizer: Any) -> Callable[[int], str]:
    """Return the function from an id to text."""
    if tokenizer is None:
        return str
    decode = getattr(tokenizer, "decode", None)
    if callable(decode):
        return lambda i: str(decode([i]))
    if not callable(tokenizer):
        raise TypeError(
            f"tokenizer: got {type(tokenizer).__name__}, want an object with `decode`, or a function of an id"
        )
    return lambda i: str(tokenizer(i))


def _texts(ids: Tensor, text: Callable[[int], str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(map(text, row)) for row in ids.tolist())


def _unembedding(model: nn.Module, ids: Tensor, path: str | None) -> nn.Module:
    """Return the layer at a path, or the innermost layer that returns the model's logits."""
    layers = dict(model.named_modules())
    if path is not None:
        if path not in layers:
            raise ValueError(f"unembedding: got {path!r}, want the path of a layer, such as {list(layers)[-1]!r}")
        return layers[path]
    returned: list[tuple[nn.Module, Any]] = []
    with ExitStack() as hooks, torch.inference_mode(False), torch.no_grad():
        for layer in layers.values():
            if layer is not model:
                hook = layer.register_forward_hook(lambda module, args, output: returned.append((module, output)))
                hooks.callback(hook.remove)
        logits = _logits(model(ids.detach().long()))
    named = getattr(model, "get_output_embeddings", lambda: None)()
    found = next((layer for layer, output in returned if output is logits), named)
    if found is None:
        raise ValueError("unembedding: got None, but no layer returns the model's logits; want the path of one")
    return found


@contextmanager
def _inputs_of(layer: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Yield a function that returns the input of the layer's last call in this thread."""
    thread, seen = threading.get_ident(), list[Tensor]()

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == thread:
            seen[:] = args[:1]

    def last() -> Tensor:
        if not seen or not isinstance(seen[0], Tensor):
            raise ValueError("unembedding: the model does not call this layer with a tensor; want another one")
        return seen.pop()

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield last
    finally:
        handle.remove()


def _decoded(layer: nn.Module, states: Tensor) -> Tensor:
    """Return the layer's linear part of states (..., d). Raises ValueError for a layer that is not affine."""
    with torch.no_grad():
        constant = layer(torch.zeros_like(states))
        decoded = layer(states) - constant
        error = (layer(2 * states) - constant - 2 * decoded).abs().max()
    if float(error) > torch.finfo(decoded.dtype).eps ** 0.5 * float(decoded.abs().max() + constant.abs().max()):
        raise ValueError(f"unembedding: got a layer {type(layer).__name__} that is not affine, want one that is")
    return decoded


def _data_frame(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    try:
        import pandas  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install pandas") from error
    return pandas.DataFrame(list(rows), columns=list(columns))


def _aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Return the rows as lines, with columns to the left (<) or right (>)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
