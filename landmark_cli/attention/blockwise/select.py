"""Which blocks queries choose: scores in pieces, and of each query the k best."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import Chunk, LayerBlocks
from ..rerank import rerank, scored_distance
from ..retrieval import shared_scores
from ..rotary import rotate
from .pieces import pieces
from .retrieve import text_scores

MINUS_INFINITY = float("-inf")
# Scores a group: of a row of more than eight groups only the group that holds the best one is looked at again.
GROUP = 32
# So few scores are sorted in less time than it takes to begin as many operations as k maxima are.
FEW_SCORES = 4096


def select_blocks(q: Tensor, blocks: LayerBlocks, chunk: Chunk, scale: float) -> Tensor:
    """The twin of `retrieval.select_blocks`: ages, (B, H or 1, T or 1, k) int64 in time order, 0 for no block."""
    settings = blocks.settings
    chosen = _choose(q, blocks, chunk, scale)
    if chosen.shape[-1] > settings.top_k:

        def score(ages: Tensor) -> Tensor:
            return text_scores(q, blocks, chunk, ages, scored_distance(ages, chunk, settings), scale)

        chosen = rerank(chosen, score, settings.top_k)
    return chosen.sort(dim=-1, descending=True).values


def _choose(q: Tensor, blocks: LayerBlocks, chunk: Chunk, scale: float) -> Tensor:
    """What landmarks choose, or propose, in any order."""
    settings = blocks.settings
    batch, heads, tokens, dim = q.shape
    cached = [min(count, chunk.retrievable) for count in chunk.host_blocks]
    most, one_key = min(settings.proposed, max(cached)), blocks.one_landmark_key and settings.positions == "bounded"
    count = max(cached)
    if one_key and settings.selection == "per_token_and_head":
        # The far blocks have one score, so the best of them are the newest.
        count = min(count, settings.top_k + settings.proposed)
    keys = _landmark_keys(blocks, chunk, count)
    q = q.float() if settings.positions == "bounded" else rotate(q.float(), *_in_stream(chunk))
    q = (q * scale).reshape(batch * keys.shape[1], -1, tokens, dim)
    keys = keys.flatten(0, 1).transpose(1, 2)
    found: list[Tensor] = []
    for at in pieces(tokens, batch * heads * count):
        scores = q[:, :, at].flatten(1, 2) @ keys
        scores = scores.view(batch, heads, -1, count)
        for row, own in enumerate(cached):
            near = min(own, settings.top_k)
            if one_key and near < count:
                scores[row, ..., near + 1 :] = scores[row, ..., near : near + 1].clone()
            if own < count:
                scores[row, ..., own:] = MINUS_INFINITY
        if settings.selection != "per_token_and_head":
            scores = shared_scores(scores, blocks.landmark_keys.shape[1], chunk.real[:, at], settings.selection)
        if settings.selection == "max_over_tokens":
            found = [torch.maximum(scores, *found) if found else scores]
        else:
            found.append(newest_best(scores, most))
    if settings.selection == "max_over_tokens":
        found = [newest_best(found[0], most)]
    return torch.cat(found, dim=2)


def _landmark_keys(blocks: LayerBlocks, chunk: Chunk, count: int) -> Tensor:
    """(B, G, count, D) float32, the landmark keys of the newest blocks, the newest first, rotated to where each row
    scores them."""
    rows, slots, rotation = chunk.shared(("landmarks", count, blocks.capacity), lambda: _scored(blocks, chunk, count))
    keys = blocks.landmark_keys[rows, :, slots].transpose(1, 2).float()
    return keys if rotation is None else rotate(keys, *rotation)


def _scored(blocks: LayerBlocks, chunk: Chunk, count: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Rows (B, 1) and slots (B, count) of the newest blocks, and the rotation of their landmark keys, if there is one:
    cos and sin, (B, 1, count, rotary_dim / 2)."""
    ages = torch.arange(1, count + 1, device=chunk.counters.device)
    slots = (chunk.blocks[:, None] - ages) % blocks.capacity
    if blocks.settings.positions == "absolute":
        return chunk.rows[:, None], slots, None
    top_k = blocks.settings.top_k
    before = scored_distance(ages[None], chunk, blocks.settings)
    cos, sin = (table[before][:, None] for table in blocks.rotations.table(top_k + 2, ages.device))
    return chunk.rows[:, None], slots, (cos, -sin)


def _in_stream(chunk: Chunk) -> tuple[Tensor, Tensor]:
    cos, sin = chunk.stream_rotation
    return cos[:, None, None], sin[:, None, None]


def newest_best(scores: Tensor, top_k: int) -> Tensor:
    """The ages of the k best of scores (.., n), which are those of the blocks of ages 1 .. n and are overwritten; of
    equal ones the newer is the better. Returns (.., k) int64; 0 where a score is minus infinity.

    A maximum names the first of equal ones, which is the newest block. So k maxima are what a stable sort gives, and of
    many scores they take a small part of its time.
    """
    shape, count = scores.shape[:-1], scores.shape[-1]
    if scores.numel() <= FEW_SCORES:
        best, order = (x[..., :top_k] for x in scores.sort(dim=-1, descending=True, stable=True))
        return (order + 1).masked_fill_(best == MINUS_INFINITY, 0)
    if count > 8 * GROUP:
        return _best_of_groups(scores.reshape(-1, count), top_k).view(*shape, top_k)
    ages = []
    for last in range(top_k - 1, -1, -1):
        best, index = scores.max(dim=-1, keepdim=True)
        ages.append((index + 1).masked_fill_(best == MINUS_INFINITY, 0))
        if last:
            scores.scatter_(-1, index, MINUS_INFINITY)
    return torch.cat(ages, dim=-1)


def _best_of_groups(scores: Tensor, top_k: int) -> Tensor:
    """newest_best of (rows, n): the best group by its maximum, then the best in it."""
    missing = -scores.shape[1] % GROUP
    groups = torch.nn.functional.pad(scores, (0, missing), value=MINUS_INFINITY).view(len(scores), -1, GROUP)
    highest = groups.amax(dim=-1)
    ages = []
    for last in range(top_k - 1, -1, -1):
        best, group = highest.max(dim=-1, keepdim=True)
        at = group.unsqueeze(-1).expand(-1, 1, GROUP)
        members = groups.gather(1, at).squeeze(1)
        index = members.max(dim=-1, keepdim=True).indices
        ages.append((group * GROUP + index + 1).masked_fill_(best == MINUS_INFINITY, 0))
        if last:
            members.scatter_(-1, index, MINUS_INFINITY)
            groups.scatter_(1, at, members.unsqueeze(1))
            highest.scatter_(-1, group, members.amax(dim=-1, keepdim=True))
    return torch.cat(ages, dim=-1)
