"""Transformer-XL's recurrence for the baseline: each segment also attends to the last keys and values before it.

A layer remembers what it made of the segment before, which that segment's own layers below were enough for. So a whole
input can go through layer by layer, all its segments at once; only what comes in parts needs a memory between them.

Source: arXiv 1901.02860, section 3.2, with rotary positions; arXiv 2305.16300, section 4.1 compares against it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right


class RecurrentMemory:
    """The last `length` keys and values of every layer, detached: no gradient reaches an earlier segment.

    tokens_read: tokens of the stream before the next segment, where its positions go on.
    """

    def __init__(self, length: int):
        self.length = length
        self.tokens_read = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the remembered keys and values in front of a segment's k, v (B, G, T, D), and remember its end."""
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        kept = slice(max(0, k.shape[2] - self.length), None)
        self.layers[layer] = k[:, :, kept].detach(), v[:, :, kept].detach()
        return k, v


def recurrent_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    recurrent_memory: RecurrentMemory | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls for `attn_implementation="transformer_xl"`: causal attention over memory and segment.

    query: (B, H, T, D); key, value: (B, G, T, D), rotated at their positions in the stream. recurrent_memory: they are
    one segment, which goes on from it; otherwise all segments of an input. Returns (B, T, H, D), None.
    """
    if recurrent_memory is not None:
        key, value = recurrent_memory.extend(module.layer_idx, key, value)
        out = causal_attention(query, key, value, scaling, dropout)
    else:
        lengths = module.config.segment_length, module.config.memory_length
        out = segmented_attention(query, key, value, *lengths, scaling, dropout)
    return out.transpose(1, 2), None


def segmented_attention(
    q: Tensor, k: Tensor, v: Tensor, segment: int, memory: int, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention of every segment over itself and the `memory` keys before it, through which no gradient goes.

    q: (B, H, T, D); k, v: (B, G, T, D). Returns (B, H, T, D).
    """
    batch, tokens = q.shape[0], q.shape[2]

    def with_past(x: Tensor, begin: int) -> Tensor:
        return torch.cat([x.detach()[:, :, max(0, begin - memory) : begin], x[:, :, begin : begin + segment]], 2)

    def alone(begin: int) -> Tensor:
        queries = q[:, :, begin : begin + segment]
        return causal_attention(queries, with_past(k, begin), with_past(v, begin), scale, dropout)

    # Whole segments with a full memory before them are as many rows of a larger batch; the others stand alone.
    full = -(-memory // segment) * segment
    count = max(0, tokens - full) // segment
    outs = [alone(begin) for begin in range(0, min(full, tokens), segment)]
    if count:

        def own(x: Tensor) -> Tensor:
            x = x[:, :, full : full + count * segment].unflatten(2, (count, segment))
            return x.transpose(1, 2).flatten(0, 1)

        def past(x: Tensor) -> Tensor:
            x = x.detach()[:, :, full - memory : full + (count - 1) * segment].unfold(2, memory, segment)
            return x.permute(0, 2, 1, 4, 3).flatten(0, 1)

        keys, values = torch.cat([past(k), own(k)], 2), torch.cat([past(v), own(v)], 2)
        out = causal_attention(own(q), keys, values, scale, dropout)
        outs.append(out.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3))
    if full + count * segment < tokens:
        outs.append(alone(full + count * segment))
    return torch.cat(outs, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Ordinary attention of queries (B, H, Tq, D) that are the last of Tk keys (B, G, Tk, D)."""
    queries, keys = q.shape[2], k.shape[2]
    if torch.compiler.is_compiling():
        # What torch has for this kind of mask, and a faster kernel for, does not compile.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    else:
        mask = causal_lower_right(queries, keys)
    grouped = q.shape[1] != k.shape[1]
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )
