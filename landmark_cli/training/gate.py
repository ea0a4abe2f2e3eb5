"""The gate's own loss: how a student's layers share their attention out among blocks, beside how the teacher's do.

Landmark attention is full attention where the landmark's logit is the log-sum-exp of its block's logits: the outer
softmax then gives each earlier block what full attention gives all of its tokens together. So the loss is the
divergence of the student's outer softmax, the query's own block taken as one, from the teacher's attention summed by
blocks: for a sample of queries, the mean over heads and layers.

Where landmarks only choose blocks (softmax.py), it is all that they learn by. What they have to get right is
how earlier blocks compare: the divergence is among these alone, and the own block, which is always read, has no part in
it. Of queries that are spaced evenly few need a block that is far away, so there others are asked besides: of what a
text repeats, and of answers and the questions before them.

Nothing of queries x keys is formed but for the sampled queries (gate_queries.py), S of a row: in each layer of the
teacher, without gradients, their logits with all text, of which on a GPU one number a block is ever written, and of the
student heads x S x (blocks + tokens of a block) float32. In windows that are read chunk by chunk the student's are made
for each distance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from landmark_cli.attention.layer_kind import kind_of
from landmark_cli.attention.operator_library import define
from landmark_cli.attention.rotary import rotate
from landmark_cli.attention.window import ReadingWindow
from landmark_cli.training.compiled import called_by
from landmark_cli.training.gate_queries import Sample


@torch.no_grad()
def block_logits(q: Tensor, k: Tensor, chosen: Sample, scale: float, reach: int | None = None) -> Tensor:
    """The log-sum-exp of full attention's logits over every block's text, (B, H, S, M) float32 (float64 if q is), of
    the sampled queries; minus infinity where a query sees nothing of a block. Their softmax over blocks is what these
    get of the attention.

    q: (B, H, n, D) and k: (B, G, n, D), the teacher's, rotated. reach: how many tokens, itself the last, a query
    sees, where the teacher's layer has a sliding window. On a GPU `fused_gate.block_logits` does it in one kernel.
    """
    return _block_logits(q, k, chosen.text, chosen.spans, chosen.text_blocks, float(scale), reach)


def _compute_block_logits(
    q: Tensor, k: Tensor, text: Tensor, spans: Tensor, text_blocks: Tensor, scale: float, reach: int | None
) -> Tensor:
    fused = _fused() if q.is_cuda and q.dtype != torch.float64 else None
    if fused is not None:
        return fused.block_logits(q, k, text, spans, scale, reach)
    place = torch.arange(k.shape[2], device=k.device)
    found = []
    # A row at a time, as many logits as S x n are.
    for row in range(q.shape[0]):
        queries = _sampled(q[row : row + 1], text[row : row + 1])
        logits = _products(queries, _widened(k[row : row + 1]), scale)
        own = text[row, :, None]
        seen = place <= own
        if reach is not None:
            seen &= place > own - reach
        logits = logits.masked_fill(~seen, -torch.inf)
        blocks = text_blocks[row].expand(logits.shape)
        shape = (*logits.shape[:3], spans.shape[1])
        largest = logits.new_full(shape, -torch.inf).scatter_reduce(-1, blocks, logits, "amax")
        largest = largest.masked_fill(largest == -torch.inf, 0.0)
        weights = torch.exp(logits - largest.gather(-1, blocks))
        found.append(logits.new_zeros(shape).scatter_add(-1, blocks, weights).log() + largest)
    return torch.cat(found)


def _block_logits_shape(q: Tensor, k: Tensor, text: Tensor, spans: Tensor, *_: Any) -> Tensor:
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:2], text.shape[1], spans.shape[1]), dtype=dtype)


# An operator, for a kernel that Triton launches would cut what torch.compile makes of the teacher's layers in two.
_block_logits = define(
    "block_logits(Tensor q, Tensor k, Tensor text, Tensor spans, Tensor text_blocks, float scale, int? reach)"
    " -> Tensor",
    _compute_block_logits,
    _block_logits_shape,
)


def block_shares(logits: Tensor, chosen: Sample) -> Tensor:
    """What full attention gives every block, of logits (..., B, H, S, M) as `block_logits` has them: as many columns,
    and one for the query's own block behind them; that and later ones' have 0 in their own columns. Where landmarks
    only choose no column more: what earlier blocks get, of all that these get."""
    if chosen.joint:
        # A query that sees nothing of any has nothing to give, and no number may be nan.
        return torch.softmax(logits.masked_fill(~chosen.choosable()[:, None], -torch.inf), dim=-1).nan_to_num(nan=0.0)
    begun = torch.arange(logits.shape[-1], device=logits.device) >= chosen.first[..., None]
    shares = torch.softmax(logits.masked_fill(~begun[:, None], -torch.inf), dim=-1)
    own = chosen.own[:, None, :, None].expand(*shares.shape[:-1], 1)
    return torch.cat([shares.scatter(-1, own, 0.0), shares.gather(-1, own)], -1)


def landmark_logits(q: Tensor, k: Tensor, chosen: Sample, scale: float, window: ReadingWindow | None = None) -> Tensor:
    """Logits of the sampled queries with every block's landmark, (B, H, S, M), and, unless landmarks only choose, a
    column more with the log-sum-exp of those with the tokens of their own block. Differentiable in q and k.

    q: (B, H, T, D) and k: (B, G, T, D), the student's, rotated. window: how windows are read chunk by chunk, where they
    are; q and k are then rotated at its position_ids, half-split.
    """
    queries = _sampled(q, chosen.stream)
    keys = _sampled(k, chosen.landmarks)
    logits = _products(queries, keys, scale) if window is None else _scored(queries, keys, chosen, scale, window)
    if chosen.joint:
        return logits
    # (B, S, block_size): the places of a query's own block, up to itself.
    places = chosen.begin[..., None] + torch.arange(chosen.block_size, device=k.device)
    within = places <= chosen.stream[..., None]
    batch, groups, _, dim = k.shape
    keys = _taken(k, places.clamp(max=k.shape[2] - 1).flatten(1)).view(batch, groups, *places.shape[1:], dim)
    own = torch.einsum("bgrsd,bgsjd->bgrsj", queries.unflatten(1, (groups, -1)), _widened(keys)).flatten(1, 2) * scale
    return torch.cat([logits, own.masked_fill(~within[:, None], -torch.inf).logsumexp(-1, keepdim=True)], -1)


def outer_shares(logits: Tensor, chosen: Sample) -> Tensor:
    """Logarithms of what landmark attention's outer softmax gives every block, in the columns of `block_shares`; minus
    infinity where nothing is. logits: (..., B, H, S, M) or one column more, as `landmark_logits` has them."""
    earlier = chosen.choosable()
    if chosen.joint:
        # Where there is no earlier block nothing is asked, and no number may be nan.
        asked = earlier | (chosen.end == chosen.first)[..., None]
    else:
        asked = nn.functional.pad(earlier, (0, 1), value=True)
    return torch.log_softmax(logits.masked_fill(~asked[:, None], -torch.inf), dim=-1)


def _scored(queries: Tensor, keys: Tensor, chosen: Sample, scale: float, window: ReadingWindow) -> Tensor:
    """Logits of the blocks' landmarks where reading scores them (retrieval.score_bounded): the last top_k before a
    chunk at their true distance, all older ones just behind. (B, H, S, M) of queries (B, H, S, D), rotated in their
    chunk, and landmark keys (B, G, M, D), rotated in theirs.

    All of them for each distance, of which one is taken: no key is gathered for several queries, whose gradients would
    be added up in an order of their own.
    """
    cos, sin = window.by(-chosen.numbers)
    keys = rotate(keys, cos[:, None], sin[:, None])
    slots = torch.arange(1, window.top_k + 2, device=keys.device)
    cos, sin = (table[slots, None, None, None] for table in (window.cos, window.sin))
    # (k + 1, B, H, S, D), and as many times (B, H, S, M).
    logits = _products(rotate(queries.expand(len(slots), *queries.shape), cos, sin), keys, scale)
    age = chosen.end[..., None] - torch.arange(keys.shape[2], device=keys.device)
    slot = age.clamp(1, window.top_k + 1)[None, :, None] - 1
    return logits.gather(0, slot.expand(1, *logits.shape[1:])).squeeze(0)


def divergence(shares: Tensor, outer: Tensor) -> Tensor:
    """KL(shares || outer), the mean over heads: (..., S). shares: (..., H, S, M + 1), or (..., H, S, M) where landmarks
    only choose; outer: its logarithms."""
    # Where the teacher gives nothing, nothing is asked, whatever the student gives; and nothing flows back.
    given = shares > 0
    outer = outer.masked_fill(~given, 0.0)
    tiny = torch.finfo(shares.dtype).tiny
    return torch.where(given, shares * (shares.clamp(min=tiny).log() - outer), 0.0).sum(-1).mean(-2)


class Gate:
    """The gate's loss of one forward pass. The teacher's layers tell it of their queries and keys (`teach`), then the
    student's (`ask`): each is what `landmark_observer` takes in a model's call. A layer is asked for logits alone; what
    becomes of them is worked out for all layers at once, as each alone would be many small kernels.

    layers: those of the student that have landmarks, which alone ask. window: how the student reads chunk by chunk,
    where it does.
    """

    def __init__(self, chosen: Sample, layers: Collection[int], window: ReadingWindow | None = None) -> None:
        self.chosen = chosen
        self.layers = layers
        self.window = window
        self._taught: dict[int, Tensor] = {}
        self._asked: dict[int, Tensor] | None = {}
        # Of layers that are compiled one by one: that they are, whether the one that runs has landmarks in the student,
        # and what it told.
        self._compiled = False
        self._wanted = False
        self._told: Tensor | None = None

    def taught_by(self, layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """While the block runs the teacher reads, of which these are the layers, in their order."""
        return self._hearing(layers, self._taught)

    def asked_by(self, layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """The same of the student."""
        return self._hearing(layers, self._asked)

    @contextmanager
    def _hearing(self, layers: Sequence[nn.Module], found: dict[int, Tensor]) -> Iterator[None]:
        # What is compiled of one layer serves all others, so it knows no layer's number: it leaves what it tells here,
        # and who calls it takes that.
        def call(number: int, code: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
            self._wanted = number in self.layers
            output = code(*inputs, **options)
            told, self._told = self._told, None
            if told is not None:
                found[number] = told
            return output

        # It stays so behind the block: a layer that is computed again in the backward pass is to run the same code.
        self._compiled = bool(layers) and all(layer._compiled_call_impl is not None for layer in layers)
        with ExitStack() as stack:
            for number, layer in enumerate(layers if self._compiled else ()):
                stack.enter_context(called_by(layer, functools.partial(call, number)))
            yield

    def teach(self, module: nn.Module, q: Tensor, k: Tensor, scale: float | None, reach: int | None = None) -> None:
        """Of a layer of the teacher's: see `block_logits`. Nothing where the student has no landmarks."""
        if not self._compiled:
            self._note_taught(module, q, k, scale, reach)
        elif self._wanted:
            self._told = self._block_logits(q, k, scale, reach)

    def ask(self, module: nn.Module, q: Tensor, k: Tensor, scale: float | None) -> None:
        """Of a layer of the student's: see `landmark_logits`."""
        if not self._compiled:
            self._note_asked(module, q, k, scale)
        else:
            self._told = self._landmark_logits(module, q, k, scale)

    # Where not each layer is compiled by itself they are told of it by its module, and run as they are.
    @torch.compiler.disable
    def _note_taught(self, module: nn.Module, *given: Any) -> None:
        if module.layer_idx in self.layers:
            self._taught[module.layer_idx] = self._block_logits(*given)

    @torch.compiler.disable
    def _note_asked(self, module: nn.Module, *given: Any) -> None:
        found = self._landmark_logits(module, *given)
        # A layer that is computed again in the backward pass says nothing new.
        if self._asked is not None:
            self._asked[module.layer_idx] = found

    def _block_logits(self, q: Tensor, k: Tensor, scale: float | None, reach: int | None) -> Tensor:
        return block_logits(q, k, self.chosen, q.shape[-1] ** -0.5 if scale is None else scale, reach)

    def _landmark_logits(self, module: nn.Module, q: Tensor, k: Tensor, scale: float | None) -> Tensor:
        kind, window = kind_of(module), self.window
        if window is not None:
            q, k = kind.half_split(q, k)
            window = window.unrotated if kind.turns == "none" else window
        # Autocast would make the products in half precision.
        with torch.autocast(q.device.type, enabled=False):
            return landmark_logits(q, k, self.chosen, q.shape[-1] ** -0.5 if scale is None else scale, window)

    def loss(self) -> Tensor:
        """The sum over the sampled queries that count, the mean over heads and layers. It is asked for once."""
        asked, self._asked = self._asked, None
        found = []
        # Layers of as many heads together.
        for heads in sorted({logits.shape[1] for logits in asked.values()}):
            layers = [layer for layer, logits in asked.items() if logits.shape[1] == heads]
            shares = block_shares(torch.stack([self._taught.pop(layer) for layer in layers]), self.chosen)
            outer = outer_shares(torch.stack([asked.pop(layer) for layer in layers]), self.chosen)
            found.append((divergence(shares, outer) * self.chosen.real).sum((1, 2)))
        return torch.cat(found).mean()


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """x: (B, G, T, D); places: (B, S). Returns (B, G, S, D)."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _sampled(x: Tensor, places: Tensor) -> Tensor:
    """As `_taken`, `_widened`."""
    return _widened(_taken(x, places))


def _widened(x: Tensor) -> Tensor:
    """x in float32, or float64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def _products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q: (..., B, H, S, D); k: (B, G, M, D). Returns (..., B, H, S, M)."""
    groups = k.shape[1]
    return (q.unflatten(-3, (groups, -1)) @ k.unsqueeze(2).transpose(-1, -2)).flatten(-4, -3) * scale


@functools.cache
def _fused() -> ModuleType | None:
    """The kernels, where Triton is there."""
    try:
        from landmark_cli.training import fused_gate
    except ImportError:
        return None
    return fused_gate
