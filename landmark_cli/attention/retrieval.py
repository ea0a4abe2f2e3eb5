"""Attention of a chunk over retrieved blocks, the tail block before it, and itself: the definition.

Source: arXiv 2305.16300, section 3.2 (inference) and appendix; positions as stated in cache/chunk.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .cache import Chunk, LayerBlocks, RetrievalSettings
from .reference import attention_logits, capped, landmark_attention, masked_logsumexp
from .rerank import bounded_scored_distance, rerank, scored_distance, sharpened
from .rotary import rotate

MINUS_INFINITY = float("-inf")


class Rotations(Protocol):
    """Rotations by whole block slots: see cache/rotations.py, and window.py."""

    def by(self, slots: Tensor) -> tuple[Tensor, Tensor]: ...


class Read(NamedTuple):
    """What attention read of a chunk.

    out: (B, H, T, D), zeros on padding. Where there were blocks to retrieve, ages: (B, H or 1, T or 1, k), in any
    order, which blocks each query and head read (age a: the a-th newest complete one; 0: none), and shares: (B, H, T,
    k) float, what of the outer softmax, or with joint of the one softmax, each of them got. dropped: (B, H, T, k) bool,
    of a model with a context-miss token, blocks that were chosen and not read.
    """

    out: Tensor
    ages: Tensor | None = None
    shares: Tensor | None = None
    dropped: Tensor | None = None


def attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: LayerBlocks,
    chunk: Chunk,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Read:
    """Attend from a chunk to the retrieved blocks and to what stands directly before, then store the chunk.

    q: (B, H, T, D) and k, v: (B, G, T, D), rotated at chunk.position_ids. scale: factor on the logits, 1 / sqrt(D).
    softcap, sinks: see reference.landmark_attention, and for `joint` of the blocks' settings too.
    """
    window_k, window_v, first = blocks.window(k, v, chunk)
    # A sink is a key of the outer softmax once, here: lse has its share in it.
    out, lse = landmark_attention(
        q,
        window_k,
        window_v,
        block_size=blocks.settings.block_size,
        scale=scale,
        start=first,
        softcap=softcap,
        sinks=sinks,
        joint=blocks.settings.joint,
        return_lse=True,
    )
    # A row that rests has its tail block in its padding's place, which sees it.
    out = out.masked_fill(~chunk.real[:, None, :, None], 0.0)
    read = Read(out)
    if min(blocks.settings.top_k, chunk.most_cached) > 0:
        ages = select_blocks(q, blocks, chunk, scale, softcap)
        logits, outputs = read_blocks(q, blocks, chunk, ages, scale, softcap)
        # The outer softmax over what is before the chunk and in it, and the selected blocks: (B, H, T, 1 + k).
        logits = torch.cat([lse.unsqueeze(-1), logits], dim=-1)
        outputs = torch.cat([out.to(outputs.dtype).unsqueeze(-2), outputs], dim=-2)
        share = torch.exp(logits - masked_logsumexp(logits).unsqueeze(-1)) * chunk.real[:, None, :, None]
        share = share.nan_to_num(0.0)
        read = Read((outputs * share.unsqueeze(-1)).sum(-2).to(q.dtype), ages, share[..., 1:])
    blocks.append(k, v, chunk)
    return read


def select_blocks(
    q: Tensor, blocks: LayerBlocks, chunk: Chunk, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """Choose the blocks each query and head reads: see `choose_blocks`, which says in which shape and order.

    Of equal scores the newer block's is the better one. Scores are equal where they are the same float32 number, and
    by definition where they belong to far blocks that share a landmark key (see LayerBlocks.one_landmark_key): rounding
    would tell these apart, so all of them have the score of the newest one. No tolerance decides anything.

    With settings.rerank_blocks these are what landmarks propose, and the text of these blocks decides: see rerank.py.
    """
    settings = blocks.settings
    ages = torch.arange(1, chunk.most_cached + 1, device=q.device)
    keys = blocks.landmark_keys[chunk.rows[:, None], :, (chunk.blocks[:, None] - ages) % blocks.capacity].transpose(
        1, 2
    )
    if settings.positions == "absolute":
        cos, sin = chunk.stream_rotation
        scores = attention_logits(rotate(q, cos[:, None, None], sin[:, None, None]), keys, scale, softcap)
    else:
        near = chunk.cached, settings.top_k
        scores = score_bounded(q, keys, *near, blocks.rotations, blocks.one_landmark_key, scale, softcap)
    chosen = choose_blocks(scores, keys.shape[1], chunk.cached, chunk.real, settings.proposed, settings.selection)
    if chosen.shape[-1] > settings.top_k:

        def score(ages: Tensor) -> Tensor:
            given = scored_distance(ages, chunk, settings), _gather(q, blocks, chunk), blocks.rotations, scale, softcap
            found = []
            for age, logits, _ in _by_block(q, ages, *given):
                found.append(masked_logsumexp(logits[..., :-1]).masked_fill(age == 0, MINUS_INFINITY))
            return torch.stack(found, dim=-1)

        chosen = rerank(chosen, score, settings.top_k)
    return chosen.sort(dim=-1, descending=True).values


def score_bounded(
    q: Tensor,
    keys: Tensor,
    cached: Tensor,
    top_k: int,
    rotations: Rotations,
    one_landmark_key: bool,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Logits of blocks' landmarks with bounded positions: (B, H, T, n) float32 (float64 if q is).

    q: (B, H, T, D). keys: (B, G, n, D), landmark keys of the newest n blocks, the newest first, rotated by their offset
    in their block. cached: (B,) how many of these a row has. The last top_k blocks are scored at their true distance,
    all older ones just behind them.
    """
    ages = torch.arange(1, keys.shape[2] + 1, device=q.device)
    near = cached[:, None].clamp(max=top_k)
    cos, sin = rotations.by(-bounded_scored_distance(ages[None], cached, top_k))
    scores = attention_logits(q, rotate(keys, cos[:, None], sin[:, None]), scale, softcap)
    if one_landmark_key:
        # (B, 1), (B, n): the newest far block's place among the ages, and which blocks are far.
        newest = near.clamp(max=len(ages) - 1).long()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.where((ages > near)[:, None, None], scores.gather(-1, newest), scores)
    return scores


def choose_blocks(scores: Tensor, key_heads: int, cached: Tensor, real: Tensor, top_k: int, selection: str) -> Tensor:
    """The best blocks of each query and head, by their ages: age a is that of the a-th newest block.

    scores: (B, H, T, n) of the blocks of ages 1 .. n. key_heads: among how many the H are shared out. cached: (B,) how
    many of these blocks a row has. real: (B, T) bool, no padding. Returns (B, H or 1, T or 1, min(top_k, n)) int64, the
    best first; 0, at the end, stands for no block where a row has fewer.
    """
    ages = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    scores = scores.masked_fill((ages > cached[:, None])[:, None, None], MINUS_INFINITY)
    if selection != "per_token_and_head":
        scores = shared_scores(scores, key_heads, real, selection)
    # Ages rise, so a stable order leaves the newer of equal scores in front.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    best = ages[order[..., :top_k]]
    return best.masked_fill(best > cached[:, None, None, None], 0)


def shared_scores(scores: Tensor, key_heads: int, real: Tensor, selection: str) -> Tensor:
    """Of scores (B, H, T, n), minus infinity where there is no block, those by which a selection is made that heads or
    tokens share: (B, H or 1, T, n) or (B, H, 1, n). key_heads: among how many the H are shared out. real: (B, T) bool,
    no padding."""
    # Logarithms of a softmax compare as the softmax does. A row that has no block yet has none.
    scores = torch.log_softmax(scores, dim=-1).nan_to_num(MINUS_INFINITY, neginf=MINUS_INFINITY)
    if selection == "max_over_query_heads":
        return scores.unflatten(1, (key_heads, -1)).amax(2).repeat_interleave(scores.shape[1] // key_heads, dim=1)
    if selection == "max_over_heads":
        return scores.amax(1, keepdim=True)
    if selection == "max_over_tokens":
        return scores.masked_fill(~real[:, None, :, None], MINUS_INFINITY).amax(2, keepdim=True)
    raise NotImplementedError(f"selection {selection}")


def block_distance(ages: Tensor, chunk: Chunk, settings: RetrievalSettings) -> Tensor:
    """How many block slots before the chunk's tail block each selected block stands; ages as select_blocks gives."""
    return ages if settings.positions == "absolute" else bounded_distance(ages, chunk.cached, settings.top_k)


def bounded_distance(ages: Tensor, cached: Tensor, top_k: int) -> Tensor:
    """Bounded positions: the j-th selected block (j = 0 ..) of k stands at slot j + 1 of the window's k + 1 slots if it
    is one of the last k cached blocks, else at slot j.

    ages: (B, H or 1, T or 1, k) in time order, the oldest first. cached: (B,).
    """
    near = cached.clamp(max=top_k)[:, None, None, None]
    rank = torch.arange(ages.shape[-1], device=ages.device)
    return near - rank + (ages > near)


def read_blocks(
    q: Tensor,
    blocks: LayerBlocks,
    chunk: Chunk,
    ages: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What each query finds in each of its selected blocks; ages as select_blocks gives.

    Returns the blocks' logits in the outer softmax, (B, H, T, k), minus infinity where there is no block, and their
    outputs by their inner softmax, (B, H, T, k, D), both float32 (float64 if q is). A block's logit is its landmark's,
    or with joint the log-sum-exp of its text's logits: then the outer softmax gives every text token what one softmax
    over all of them would. Of another settings.block_temperature than 1 they are sharpened: see rerank.py.
    """
    settings = blocks.settings
    distance, gather = block_distance(ages, chunk, settings), _gather(q, blocks, chunk)
    logits, outputs = read_selected(q, ages, distance, gather, blocks.rotations, scale, softcap, settings.joint)
    return sharpened(logits, settings.block_temperature), outputs


def _gather(q: Tensor, blocks: LayerBlocks, chunk: Chunk) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Keys and values of blocks of given ages, (B, H, T): see read_selected."""
    heads = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // blocks.keys.shape[1])

    def gather(ages: Tensor) -> tuple[Tensor, Tensor]:
        slot = (chunk.blocks[:, None, None] - ages) % blocks.capacity
        return blocks.gather((chunk.rows[:, None, None], heads[None, :, None], slot))

    return gather


def read_selected(
    q: Tensor,
    ages: Tensor,
    distance: Tensor,
    gather: Callable[[Tensor], tuple[Tensor, Tensor]],
    rotations: Rotations,
    scale: float | None = None,
    softcap: float | None = None,
    joint: bool = False,
) -> tuple[Tensor, Tensor]:
    """As read_blocks. distance: (B, H or 1, T or 1, k) block slots from each block to the chunk's tail block. gather:
    keys, rotated by their offset in their block, and values of blocks of given ages (B, H, T): (B, H, T, size, D) each.
    joint: in place of a landmark's logit stands the log-sum-exp of its block's text logits.
    """
    outer_logits, outputs = [], []
    for age, logits, v in _by_block(q, ages, distance, gather, rotations, scale, softcap):
        inner = torch.softmax(logits[..., :-1], dim=-1).unsqueeze(-2)
        # Where there is no block, memory may hold anything, and nan times a weight of nothing is nan.
        found = (inner @ v[..., :-1, :].to(logits.dtype)).squeeze(-2)
        outputs.append(found.masked_fill((age == 0)[..., None], 0.0))
        outer = masked_logsumexp(logits[..., :-1]) if joint else logits[..., -1]
        outer_logits.append(outer.masked_fill(age == 0, MINUS_INFINITY))
    return torch.stack(outer_logits, dim=-1), torch.stack(outputs, dim=-2)


def _by_block(
    q: Tensor,
    ages: Tensor,
    distance: Tensor,
    gather: Callable[[Tensor], tuple[Tensor, Tensor]],
    rotations: Rotations,
    scale: float | None,
    softcap: float | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One block a query at a time, for all at once would be as many times the memory: its age, (B, H, T), the query's
    logits with all that is in it, (B, H, T, size), and its values. As of read_selected."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for j in range(ages.shape[-1]):
        age = ages[..., j].expand(q.shape[:3])
        rotated = rotate(q, *rotations.by(distance[..., j].expand(q.shape[:3]))).to(dtype).unsqueeze(-2)
        k, v = gather(age)
        yield age, capped((rotated @ k.to(dtype).transpose(-1, -2)).squeeze(-2) * scale, softcap), v
