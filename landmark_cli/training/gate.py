"""The gate's own loss: how a student's layers share their attention out among blocks, beside how the teacher's do.

Landmark attention is full attention where the landmark's logit is the log-sum-exp of its block's logits: the outer
softmax then gives each earlier block what full attention gives all of its tokens together. So the loss is the
divergence of the student's outer softmax, the query's own block taken as one, from the teacher's attention summed by
blocks: for a sample of queries, the mean over heads and layers.

Where landmarks only choose blocks (softmax.py), it is all that they learn by. What they have to get right is
how earlier blocks compare: the divergence is among these alone, and the own block, which is always read, has no part in
it. There half of the queries are of answers and of the questions before them, where a text has any: prose seldom needs
a block that is far away, and a question does.

Nothing of queries x keys is formed but for the sampled queries: in each layer, for a row, heads x S x tokens float32 of
the teacher, without gradients, and of the student heads x S x (blocks + tokens of a block), S being `SAMPLED` of
gate_queries.py, or twice that where landmarks only choose. With windows of 8192 that is 64 or 128 / 4096 of the
products of full attention, once more; in windows that are read chunk by chunk the student's are made for each distance.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from landmark_cli.attention.layer_kind import kind_of
from landmark_cli.attention.rotary import rotate
from landmark_cli.attention.window import ReadingWindow
from landmark_cli.training.gate_queries import Sample


@torch.no_grad()
def block_shares(q: Tensor, k: Tensor, chosen: Sample, scale: float, reach: int | None = None) -> Tensor:
    """What full attention gives every block: (B, H, S, M + 1) float32 (float64 if q is), of the sampled queries. The
    last column is their own block's; that and later ones' have 0 in their own columns. Where landmarks only choose,
    (B, H, S, M): what earlier blocks get, of all that these get.

    q: (B, H, n, D) and k: (B, G, n, D), the teacher's, rotated. reach: how many tokens, itself the last, a query
    sees, where the teacher's layer has a sliding window.
    """
    place = torch.arange(k.shape[2], device=k.device)
    found = []
    # A row at a time, as many logits as S x n are.
    for row in range(q.shape[0]):
        queries = _sampled(q[row : row + 1], chosen.text[row : row + 1])
        logits = _logits(queries, _widened(k[row : row + 1]), scale)
        blocks, text = chosen.text_blocks[row], chosen.text[row, :, None]
        seen = (place <= text) & (blocks >= chosen.first[row, :, None])
        if reach is not None:
            seen &= place > text - reach
        weights = torch.softmax(logits.masked_fill(~seen, -torch.inf), dim=-1)
        shares = weights.new_zeros(*weights.shape[:3], chosen.landmarks.shape[1])
        shares.scatter_add_(-1, blocks.expand(weights.shape), weights)
        own = chosen.own[row : row + 1, None, :, None].expand(*shares.shape[:3], 1)
        if chosen.joint:
            earlier = torch.arange(shares.shape[-1], device=k.device) < chosen.end[row, :, None]
            shares = torch.where(earlier, shares, 0.0)
            found.append(shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny))
        else:
            found.append(torch.cat([shares.scatter(-1, own, 0.0), shares.gather(-1, own)], -1))
    return torch.cat(found)


def outer_shares(q: Tensor, k: Tensor, chosen: Sample, scale: float, window: ReadingWindow | None = None) -> Tensor:
    """Logarithms of what landmark attention's outer softmax gives every block, in the columns of `block_shares`; minus
    infinity where nothing is. Differentiable in q and k.

    q: (B, H, T, D) and k: (B, G, T, D), the student's, rotated. window: how windows are read chunk by chunk, where they
    are; q and k are then rotated at its position_ids, half-split.
    """
    queries = _sampled(q, chosen.stream)
    blocks = torch.arange(chosen.landmarks.shape[1], device=k.device)
    earlier = (blocks >= chosen.first[..., None]) & (blocks < chosen.end[..., None])
    keys = _widened(_taken(k, chosen.landmarks))
    logits = _logits(queries, keys, scale) if window is None else _scored(queries, keys, chosen, scale, window)
    if chosen.joint:
        # Where there is no earlier block nothing is asked, and no number may be nan.
        earlier = earlier | (chosen.end == chosen.first)[..., None]
        return torch.log_softmax(logits.masked_fill(~earlier[:, None], -torch.inf), dim=-1)
    logits = logits.masked_fill(~earlier[:, None], -torch.inf)
    # (B, S, block_size): the places of a query's own block, up to itself.
    places = chosen.begin[..., None] + torch.arange(chosen.block_size, device=k.device)
    within = places <= chosen.stream[..., None]
    batch, groups, _, dim = k.shape
    keys = _taken(k, places.clamp(max=k.shape[2] - 1).flatten(1)).view(batch, groups, *places.shape[1:], dim)
    own = torch.einsum("bgrsd,bgsjd->bgrsj", queries.unflatten(1, (groups, -1)), _widened(keys)).flatten(1, 2) * scale
    own = own.masked_fill(~within[:, None], -torch.inf).logsumexp(-1, keepdim=True)
    return torch.log_softmax(torch.cat([logits, own], -1), dim=-1)


def _scored(queries: Tensor, keys: Tensor, chosen: Sample, scale: float, window: ReadingWindow) -> Tensor:
    """Logits of the blocks' landmarks where reading scores them (retrieval.score_bounded): the last top_k before a
    chunk at their true distance, all older ones just behind. (B, H, S, M) of queries (B, H, S, D), rotated in their
    chunk, and landmark keys (B, G, M, D), rotated in theirs.

    All of them for each distance, of which one is taken: no key is gathered for several queries, whose gradients would
    be added up in an order of their own.
    """
    cos, sin = window.by(-chosen.numbers)
    keys = rotate(keys, cos[:, None], sin[:, None])
    age = chosen.end[..., None] - torch.arange(keys.shape[2], device=keys.device)
    logits = None
    for slots in range(window.top_k + 1, 0, -1):
        found = _logits(rotate(queries, window.cos[slots], window.sin[slots]), keys, scale)
        logits = found if logits is None else torch.where((age == slots)[:, None], found, logits)
    return logits


def divergence(shares: Tensor, outer: Tensor) -> Tensor:
    """KL(shares || outer), the mean over heads: (B, S). shares: (B, H, S, M + 1), or (B, H, S, M) where landmarks only
    choose; outer: its logarithms."""
    # Where the teacher gives nothing, nothing is asked, whatever the student gives; and nothing flows back.
    given = shares > 0
    outer = outer.masked_fill(~given, 0.0)
    return (
        torch.where(given, shares * (shares.clamp(min=torch.finfo(shares.dtype).tiny).log() - outer), 0.0)
        .sum(-1)
        .mean(1)
    )


class Gate:
    """The gate's loss of one forward pass. The teacher's layers tell it of their queries and keys (`teach`), then the
    student's (`ask`): each is what `landmark_observer` takes in a model's call.

    layers: those of the student that have landmarks, which alone ask. window: how the student reads chunk by chunk,
    where it does.
    """

    def __init__(self, chosen: Sample, layers: Collection[int], window: ReadingWindow | None = None) -> None:
        self.chosen = chosen
        self.layers = layers
        self.window = window
        self._shares: dict[int, Tensor] = {}
        self._found: dict[int, Tensor] | None = {}

    # They are told of a layer by its module, and run as they are: what is compiled of one layer serves all others.
    @torch.compiler.disable
    def teach(self, module: nn.Module, q: Tensor, k: Tensor, scale: float | None, reach: int | None = None) -> None:
        """Of a layer of the teacher's: see `block_shares`. Nothing where the student has no landmarks."""
        layer = module.layer_idx
        if layer not in self.layers:
            return
        self._shares[layer] = block_shares(q, k, self.chosen, q.shape[-1] ** -0.5 if scale is None else scale, reach)

    @torch.compiler.disable
    def ask(self, module: nn.Module, q: Tensor, k: Tensor, scale: float | None) -> None:
        """Of a layer of the student's: see `outer_shares`."""
        layer, kind, window = module.layer_idx, kind_of(module), self.window
        if window is not None:
            q, k = kind.half_split(q, k)
            window = window.unrotated if kind.turns == "none" else window
        # Autocast would make the products in half precision.
        with torch.autocast(q.device.type, enabled=False):
            outer = outer_shares(q, k, self.chosen, q.shape[-1] ** -0.5 if scale is None else scale, window)
        found = (divergence(self._shares[layer], outer) * self.chosen.real).sum()
        # A layer that is computed again in the backward pass says nothing new.
        if self._found is not None:
            self._found[layer] = found

    def loss(self) -> Tensor:
        """The sum over the sampled queries that count, the mean over heads and layers. It is asked for once."""
        found, self._found = self._found, None
        return torch.stack(list(found.values())).mean()


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """x: (B, G, T, D); places: (B, S). Returns (B, G, S, D)."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _sampled(q: Tensor, places: Tensor) -> Tensor:
    return _widened(_taken(q, places))


def _widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q: (B, H, S, D); k: (B, G, M, D). Returns (B, H, S, M)."""
    groups = k.shape[1]
    return (q.unflatten(1, (groups, -1)) @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scale
