"""Attention of a chunk over retrieved blocks, the tail block before it, and itself: the definition.

Source: arXiv 2305.16300, section 3.2 (inference) and appendix; positions as stated in cache/chunk.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cache import Chunk, LayerBlocks, RetrievalSettings
from .reference import attention_logits, landmark_attention, masked_logsumexp
from .rotary import rotate

MINUS_INFINITY = float("-inf")


class Read(NamedTuple):
    """What attention read of a chunk.

    out: (B, H, T, D), zeros on padding. Where there were blocks to retrieve, ages: (B, H or 1, T or 1, k), in any
    order, which blocks each query and head read (age a: the a-th newest complete one; 0: none), and shares: (B, H, T,
    k) float, what of the outer softmax each of them got. dropped: (B, H, T, k) bool, of a model with a context-miss
    token, blocks that were chosen and not read.
    """

    out: Tensor
    ages: Tensor | None = None
    shares: Tensor | None = None
    dropped: Tensor | None = None


def attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, blocks: LayerBlocks, chunk: Chunk, scale: float | None = None
) -> Read:
    """Attend from a chunk to the retrieved blocks and to what stands directly before, then store the chunk.

    q: (B, H, T, D) and k, v: (B, G, T, D), rotated at chunk.position_ids. scale: factor on the logits, 1 / sqrt(D).
    """
    window_k, window_v, first = blocks.window(k, v, chunk)
    out, lse = landmark_attention(
        q, window_k, window_v, block_size=blocks.settings.block_size, scale=scale, start=first, return_lse=True
    )
    read = Read(out)
    if min(blocks.settings.top_k, chunk.most_cached) > 0:
        ages = select_blocks(q, blocks, chunk, scale)
        logits, outputs = read_blocks(q, blocks, chunk, ages, scale)
        # The outer softmax over what is before the chunk and in it, and the selected blocks: (B, H, T, 1 + k).
        logits = torch.cat([lse.unsqueeze(-1), logits], dim=-1)
        outputs = torch.cat([out.to(outputs.dtype).unsqueeze(-2), outputs], dim=-2)
        share = torch.exp(logits - masked_logsumexp(logits).unsqueeze(-1)) * chunk.real[:, None, :, None]
        share = share.nan_to_num(0.0)
        read = Read((outputs * share.unsqueeze(-1)).sum(-2).to(q.dtype), ages, share[..., 1:])
    blocks.append(k, v, chunk)
    return read


def select_blocks(q: Tensor, blocks: LayerBlocks, chunk: Chunk, scale: float | None = None) -> Tensor:
    """Choose the blocks each query and head reads.

    Returns ages, (B, H or 1, T or 1, k) int64 in time order: age a is the a-th newest complete block, and 0 (at the
    end) stands for no block where a row has fewer than k.

    Of equal scores the newer block's is the better one. Scores are equal where they are the same float32 number, and
    by definition where they belong to far blocks that share a landmark key (see LayerBlocks.one_landmark_key): rounding
    would tell these apart, so all of them have the score of the newest one. No tolerance decides anything.
    """
    settings = blocks.settings
    ages = torch.arange(1, chunk.most_cached + 1, device=q.device)
    cached = chunk.cached[:, None]
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    keys = blocks.landmark_keys[rows, :, (chunk.blocks[:, None] - ages) % blocks.capacity].transpose(1, 2)
    if settings.positions == "absolute":
        cos, sin = chunk.stream_rotation
        scores = attention_logits(rotate(q, cos[:, None, None], sin[:, None, None]), keys, scale)
    else:
        # The last k blocks are scored at their true distance, all older ones just behind them.
        distance = torch.minimum(ages, cached.clamp(max=settings.top_k) + 1)
        cos, sin = blocks.rotations.by(-distance)
        scores = attention_logits(q, rotate(keys, cos[:, None], sin[:, None]), scale)
        if blocks.one_landmark_key:
            # (B, 1), (B, n): the newest far block's place among the ages, and which blocks are far.
            newest, far = cached.clamp(max=settings.top_k), ages > cached.clamp(max=settings.top_k)
            newest = newest.clamp(max=len(ages) - 1).long()[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.where(far[:, None, None], scores.gather(-1, newest), scores)
    scores = scores.masked_fill((ages > cached)[:, None, None], MINUS_INFINITY)

    if settings.selection != "per_token_and_head":
        # Logarithms of a softmax compare as the softmax does. A row that has no block yet has none.
        scores = torch.log_softmax(scores, dim=-1).nan_to_num(MINUS_INFINITY, neginf=MINUS_INFINITY)
        if settings.selection == "max_over_heads":
            scores = scores.amax(1, keepdim=True)
        elif settings.selection == "max_over_tokens":
            scores = scores.masked_fill(~chunk.real[:, None, :, None], MINUS_INFINITY).amax(2, keepdim=True)
        else:
            raise NotImplementedError(f"selection {settings.selection}")
    # Ages rise, so a stable order leaves the newer of equal scores in front.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    best = ages[order[..., : min(settings.top_k, chunk.most_cached)]]
    best = best.masked_fill(best > cached[:, None, None], 0)
    return best.sort(dim=-1, descending=True).values


def block_distance(ages: Tensor, chunk: Chunk, settings: RetrievalSettings) -> Tensor:
    """How many block slots before the chunk's tail block each selected block stands; ages as select_blocks gives.

    Bounded positions: the j-th selected block (j = 0 ..) of k stands at slot j + 1 of the window's k + 1 slots if it is
    one of the last k cached blocks, else at slot j.
    """
    if settings.positions == "absolute":
        return ages
    near = chunk.cached.clamp(max=settings.top_k)[:, None, None, None]
    rank = torch.arange(ages.shape[-1], device=ages.device)
    return near - rank + (ages > near)


def read_blocks(
    q: Tensor, blocks: LayerBlocks, chunk: Chunk, ages: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """What each query finds in each of its selected blocks; ages as select_blocks gives.

    Returns the landmark logits, (B, H, T, k), minus infinity where there is no block, and the blocks' outputs by their
    inner softmax, (B, H, T, k, D), both float32 (float64 if q is).
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // blocks.keys.shape[1])
    rows = torch.arange(q.shape[0], device=q.device)
    where = rows[:, None, None], heads[None, :, None]
    distance = block_distance(ages, chunk, blocks.settings)

    # One block a query at a time: all k at once would be k times the memory.
    landmark_logits, outputs = [], []
    for j in range(ages.shape[-1]):
        age = ages[..., j].expand(q.shape[:3])
        slot = (chunk.blocks[:, None, None] - age) % blocks.capacity
        cos, sin = blocks.rotations.by(distance[..., j].expand(q.shape[:3]))
        rotated = rotate(q, cos, sin).to(dtype).unsqueeze(-2)
        k, v = blocks.gather((*where, slot))
        logits = (rotated @ k.to(dtype).transpose(-1, -2)).squeeze(-2) * scale
        inner = torch.softmax(logits[..., :-1], dim=-1).unsqueeze(-2)
        outputs.append((inner @ v[..., :-1, :].to(dtype)).squeeze(-2))
        landmark_logits.append(logits[..., -1].masked_fill(age == 0, MINUS_INFINITY))
    return torch.stack(landmark_logits, dim=-1), torch.stack(outputs, dim=-2)
