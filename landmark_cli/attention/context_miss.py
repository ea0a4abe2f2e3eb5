"""Reading with a context-miss token: its share of the outer softmax says whether to retrieve at all.

Source: arXiv 2305.16300, section 4.1.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import Chunk, LayerBlocks
from .reference import attention_logits, check_joint, landmark_attention
from .retrieval import Read, read_blocks, select_blocks


def attend_chunk_with_context_miss(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_miss_key: Tensor,
    blocks: LayerBlocks,
    chunk: Chunk,
    scale: float | None = None,
) -> Read:
    """attend_chunk for a model with a context-miss token; context_miss_key: (B, G, 1, D), its key in this layer.

    Retrieved blocks do not compete in the outer softmax: they share out, by a softmax among their landmarks, what the
    context-miss token got there. A share under settings.context_miss_cutoff counts as 0, and its blocks as dropped.

    Raises ValueError where the blocks are read with joint.
    """
    settings = blocks.settings
    if settings.joint:
        check_joint(0.0, context_miss_key)
    window_k, window_v, first = blocks.window(k, v, chunk)
    out, lse = landmark_attention(
        q,
        window_k,
        window_v,
        block_size=settings.block_size,
        scale=scale,
        start=first,
        context_miss_key=context_miss_key,
        return_lse=True,
    )
    out = out.masked_fill(~chunk.real[:, None, :, None], 0.0)
    read = Read(out)
    if min(settings.top_k, chunk.most_cached) > 0:
        ages = select_blocks(q, blocks, chunk, scale)
        logits, outputs = read_blocks(q, blocks, chunk, ages, scale)
        miss = torch.exp(attention_logits(q, context_miss_key, scale).squeeze(-1) - lse).unsqueeze(-1)
        retrieved = (logits > float("-inf")) & chunk.real[:, None, :, None]
        dropped = retrieved & (miss < settings.context_miss_cutoff)
        kept = retrieved & ~dropped
        share = torch.softmax(logits, dim=-1).nan_to_num(0.0) * miss * kept
        out = (out + (outputs * share.unsqueeze(-1)).sum(-2)).to(q.dtype)
        read = Read(out, ages.expand(kept.shape).masked_fill(~kept, 0), share, dropped)
    blocks.append(k, v, chunk)
    return read
