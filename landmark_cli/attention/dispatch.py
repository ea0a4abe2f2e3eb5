"""Where transformers' attention layers enter: which landmark attention runs, in which implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import reference, retrieval
from .cache import Chunk
from .recurrent import recurrent_attention_forward


@dataclass(frozen=True)
class LandmarkLayout:
    """Blocks of a forward pass where the model's even ones do not say it all; the fields are landmark_attention's.

    Give it to any landmark model as `model(..., landmark_layout=LandmarkLayout(...))`.
    """

    block_size: int | None = None
    landmark_mask: Tensor | None = None
    start: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    controlled: Tensor | None = None


def landmark_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    landmark_chunk: Chunk | None = None,
    landmark_layout: LandmarkLayout | None = None,
    context_miss_key: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls for `attn_implementation="landmark"`.

    query: (B, H, T, D); key, value: (B, G, T, D), rotated. landmark_chunk: read on through a block cache;
    otherwise attend within the input, whose landmarks stand at every (module.config.landmark_freq + 1)-th position
    unless landmark_layout says otherwise. Returns (B, T, H, D) and None: attention weights are never formed.
    """
    if landmark_chunk is not None:
        blocks = landmark_chunk.cache.layer(module.layer_idx, key, landmark_chunk)
        out = retrieval.attend_chunk(query, key, value, blocks, landmark_chunk, scaling)
        return out.transpose(1, 2), None
    layout = landmark_layout or LandmarkLayout()
    block_size = layout.block_size
    if block_size is None and layout.landmark_mask is None:
        block_size = module.config.landmark_freq + 1
    out = reference.landmark_attention(
        query,
        key,
        value,
        block_size=block_size,
        landmark_mask=layout.landmark_mask,
        scale=scaling,
        start=layout.start,
        cu_seqlens=layout.cu_seqlens,
        dropout_p=layout.dropout_p,
        dropout_seed=layout.dropout_seed,
        context_miss_key=context_miss_key,
        controlled=layout.controlled,
    )
    return out.transpose(1, 2), None


def no_mask(*args, **kwargs) -> None:
    """transformers' mask function for "landmark": the attention itself is causal, so no mask tensor is ever made."""
    return None


def register() -> None:
    """Make "landmark" an attention implementation of the transformers library."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("landmark", landmark_attention_forward)
    AttentionMaskInterface.register("landmark", no_mask)
    AttentionInterface.register("transformer_xl", recurrent_attention_forward)
    AttentionMaskInterface.register("transformer_xl", no_mask)


__all__ = ["LandmarkLayout", "landmark_attention_forward", "register", "torch"]
