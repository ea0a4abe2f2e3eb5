"""Reading a chunk: its attention to itself and the tail block, to the blocks it retrieves, and both put together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import Chunk, LayerBlocks
from ..reference import attention_logits, check_joint
from ..retrieval import Read
from .retrieve import Found, read_blocks
from .select import select_blocks
from .window import attend_window


def attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: LayerBlocks,
    chunk: Chunk,
    scale: float | None = None,
    context_miss_key: Tensor | None = None,
    traced: bool = False,
) -> Read:
    """The twin of `retrieval.attend_chunk` and, with a context_miss_key, (B, G, 1, D), of
    `context_miss.attend_chunk_with_context_miss`: same values, no gradients.

    q: (B, H, T, D) and k, v: (B, G, T, D), rotated at the chunk's positions. Ages and shares are returned if traced,
    and what was dropped wherever there is a context-miss token. Computes in float32. Raises ValueError where there is
    one and the blocks are read with joint.
    """
    if blocks.settings.joint:
        check_joint(0.0, context_miss_key)
    # Under autocast products would be in 16 bits.
    with torch.autocast(q.device.type, enabled=False):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return _attend_chunk(q, k, v, blocks, chunk, scale, context_miss_key, traced)


def _attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: LayerBlocks,
    chunk: Chunk,
    scale: float,
    context_miss_key: Tensor | None,
    traced: bool,
) -> Read:
    out, lse = _attend_before(q, k, v, blocks, chunk, scale)
    miss = None
    if context_miss_key is not None:
        logit = attention_logits(q, context_miss_key, scale).squeeze(-1)
        total = torch.logaddexp(lse, logit)
        out.mul_(torch.exp(lse - total).unsqueeze(-1))
        miss = torch.exp(logit - total)
    read = Read(out)
    if min(blocks.settings.top_k, chunk.most_cached) > 0:
        ages = select_blocks(q, blocks, chunk, scale)
        found = read_blocks(q, blocks, chunk, ages, scale)
        if miss is None:
            read = _merge(out, lse, found, ages)
        else:
            read = _merge_controlled(out, miss, found, ages, blocks.settings.context_miss_cutoff)
        if not traced and miss is None:
            read = Read(read.out)
    blocks.append(k, v, chunk)
    # In memory a token's heads lie side by side, as the model takes them.
    result = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    result.copy_(read.out)
    if min(chunk.host_lengths) < chunk.width:
        result.masked_fill_(~chunk.real[:, None, :, None], 0.0)
    return read._replace(out=result)


def _attend_before(
    q: Tensor, k: Tensor, v: Tensor, blocks: LayerBlocks, chunk: Chunk, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (B, H, T, D), lse (B, H, T)), float32, of a chunk's attention to itself and the tail block; on padding
    numbers without meaning."""
    size, joint = blocks.settings.block_size, blocks.settings.joint
    lengths, tails = chunk.host_lengths, chunk.host_tail
    alike = len(set(tails)) == 1 and min(lengths) == chunk.width
    if alike and tails[0] == 0:
        return attend_window(q, k, v, size, scale, joint=joint)
    # Every row from its tail block on, in whole blocks: nothing sees what stands behind its last token.
    first, last = min(tails), max(tail + length for tail, length in zip(tails, lengths, strict=True))
    stored = blocks.blocks[chunk.shared(("tail", blocks.capacity), lambda: _tail_blocks(blocks, chunk))].to(k.device)
    window = torch.zeros(*k.shape[:2], 2, -(-last // size) * size, k.shape[3], device=k.device)
    queries = q if alike else q.new_zeros(*q.shape[:2], last - first, q.shape[3])
    # Rows that stand alike are copied together.
    which = [slice(None)] if alike else [slice(row, row + 1) for row in range(len(tails))]
    for row in which:
        tail, length = tails[row][0], lengths[row][0]
        window[row, :, :, :tail] = stored[row, :, :, :tail]
        window[row, :, 0, tail : tail + length] = k[row, :, k.shape[2] - length :]
        window[row, :, 1, tail : tail + length] = v[row, :, k.shape[2] - length :]
        if not alike:
            queries[row, :, tail - first : tail - first + length] = q[row, :, q.shape[2] - length :]
    out, lse = attend_window(queries, window[:, :, 0], window[:, :, 1], size, scale, last, joint)
    if alike:
        return out, lse
    placed, placed_lse = out.new_zeros(q.shape), lse.new_zeros(q.shape[:3])
    for row, (tail, length) in enumerate(zip(tails, lengths, strict=True)):
        begin = q.shape[2] - length
        placed[row, :, begin:] = out[row, :, tail - first : tail - first + length]
        placed_lse[row, :, begin:] = lse[row, :, tail - first : tail - first + length]
    return placed, placed_lse


def _tail_blocks(blocks: LayerBlocks, chunk: Chunk) -> tuple[Tensor | slice, ...]:
    """Where each row's tail block lies in LayerBlocks.blocks."""
    rows = chunk.rows.to(blocks.blocks.device)
    return rows, slice(None), (chunk.blocks % blocks.capacity).to(rows.device)


def _merge(out: Tensor, lse: Tensor, found: Found, ages: Tensor) -> Read:
    """The outer softmax over what is before the chunk and in it, (out, lse), and the chosen blocks; overwrites out."""
    own, *shares = torch.softmax(torch.cat([lse.unsqueeze(0), found.logits]), dim=0)
    found.add_to(out.mul_(own.unsqueeze(-1)), shares)
    return Read(out, ages, torch.stack(shares, dim=-1))


def _merge_controlled(out: Tensor, miss: Tensor, found: Found, ages: Tensor, cutoff: float) -> Read:
    """The chosen blocks share out what the context-miss token got, miss (B, H, T), unless that is under the cutoff; out
    is overwritten."""
    retrieved = found.logits > float("-inf")
    dropped = retrieved & (miss < cutoff)
    kept = retrieved & ~dropped
    share = torch.softmax(found.logits, dim=0).nan_to_num(0.0) * miss * kept
    found.add_to(out, share)
    kept, dropped, share = (x.permute(1, 2, 3, 0) for x in (kept, dropped, share))
    return Read(out, ages.expand(kept.shape).masked_fill(~kept, 0), share, dropped)
