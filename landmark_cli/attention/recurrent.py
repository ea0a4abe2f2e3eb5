"""Transformer-XL's recurrence for the baseline: each segment also attends to the last keys and values before it.

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

    query: (B, H, T, D); key, value: (B, G, T, D), rotated at their positions in the stream. Returns (B, T, H, D), None.
    """
    if recurrent_memory is not None:
        key, value = recurrent_memory.extend(module.layer_idx, key, value)
    bias = causal_lower_right(query.shape[2], key.shape[2])
    grouped = query.shape[1] != key.shape[1]
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2), None
