"""Reading with a context-miss token: its share of the outer softmax says whether to retrieve at all.

Source: arXiv 2305.16300, section 4.1.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import Chunk, LayerBlocks
from .reference import attention_logits, landmark_attention
from .retrieval import read_blocks, select_blocks


def attend_chunk_with_context_miss(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_miss_key: Tensor,
    blocks: LayerBlocks,
    chunk: Chunk,
    scale: float | None = None,
) -> Tensor:
    """attend_chunk for a model with a context-miss token; context_miss_key: (B, G, 1, D), its key in this layer.

    Retrieved blocks do not compete in the outer softmax: they share out, by a softmax among their landmarks, what the
    context-miss token got there. A share under settings.context_miss_cutoff counts as 0; cache.dropped_retrievals of
    cache.retrievals says how often that was so.
    """
    settings = blocks.settings
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
    if min(settings.top_k, chunk.most_cached) > 0:
        ages = select_blocks(q, blocks, chunk, scale)
        group, outputs = read_blocks(q, blocks, chunk, ages, scale)
        miss = torch.exp(attention_logits(q, context_miss_key, scale).squeeze(-1) - lse)
        retrieved = (group > float("-inf")) & chunk.real[:, None, :, None]
        dropped = retrieved & (miss < settings.context_miss_cutoff).unsqueeze(-1)
        chunk.cache.retrievals += int(retrieved.sum())
        chunk.cache.dropped_retrievals += int(dropped.sum())
        read = retrieved & ~dropped
        share = torch.softmax(group, dim=-1).nan_to_num(0.0) * miss.unsqueeze(-1) * read
        if chunk.cache.trace is not None:
            chunk.cache.trace.record(blocks.index, chunk, ages.expand(read.shape).masked_fill(~read, 0), share)
        out = (out + (outputs * share.unsqueeze(-1)).sum(-2)).to(q.dtype)
    blocks.append(k, v, chunk)
    return out
