"""Where transformers' attention layers enter: which landmark attention runs, in which implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import reference, retrieval
from .cache import Chunk
from .context_miss import attend_chunk_with_context_miss
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
    unless landmark_layout says otherwise. attention_mask: (B, T) bool where some row is padded on the left, from which
    its blocks then count. Returns (B, T, H, D) and None: attention weights are never formed.

    Raises ValueError for what would change the result and cannot be honoured: a 4-D mask, logit soft-capping, attention
    sinks, a sliding window shorter than the input.
    """
    _check_arguments(key, attention_mask, **kwargs)
    if landmark_chunk is not None:
        blocks = landmark_chunk.cache.layer(module.layer_idx, key, landmark_chunk)
        if context_miss_key is not None:
            out = attend_chunk_with_context_miss(
                query, key, value, context_miss_key, blocks, landmark_chunk, scaling
            )
        else:
            out = retrieval.attend_chunk(query, key, value, blocks, landmark_chunk, scaling)
        return out.transpose(1, 2), None
    layout = landmark_layout or LandmarkLayout()
    block_size = layout.block_size
    if block_size is None and layout.landmark_mask is None:
        block_size = _block_size(module.config)
    start = layout.start
    if start is None and attention_mask is not None:
        start = (attention_mask.cumsum(-1) == 0).sum(-1)
    out = reference.landmark_attention(
        query,
        key,
        value,
        block_size=block_size,
        landmark_mask=layout.landmark_mask,
        scale=scaling,
        start=start,
        cu_seqlens=layout.cu_seqlens,
        dropout_p=layout.dropout_p,
        dropout_seed=layout.dropout_seed,
        context_miss_key=context_miss_key,
        controlled=layout.controlled,
    )
    return out.transpose(1, 2), None


def padding_mask(*args, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """transformers' mask function for "landmark": the attention is causal by itself, so only left padding is passed on.

    attention_mask: (B, T) bool, the model's own argument. Returns it where a row begins with padding and None
    otherwise: padding at the end is seen by nothing. Raises ValueError for padding between tokens.
    """
    if attention_mask is None:
        return None
    begins = attention_mask[:, :1].sum(-1) + (attention_mask[:, 1:] & ~attention_mask[:, :-1]).sum(-1)
    if (begins > 1).any():
        raise ValueError("attention_mask hides tokens in the middle of a row; only its ends may be padding")
    return None if attention_mask[:, 0].all() else attention_mask


def no_mask(*args, **kwargs) -> None:
    """transformers' mask function for an attention that is causal by itself and knows no padding."""
    return None


def _check_arguments(
    key: Tensor,
    attention_mask: Tensor | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> None:
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has {attention_mask.dim()} dimensions; landmark attention takes (B, T) padding")
    if softcap is not None:
        raise ValueError("softcap: landmark attention has no logit soft-capping")
    if s_aux is not None:
        raise ValueError("s_aux: landmark attention has no attention sinks")
    if sliding_window is not None and key.shape[2] > sliding_window:
        raise ValueError(f"sliding_window is {sliding_window}, shorter than the input of {key.shape[2]} tokens")


def _block_size(config) -> int:
    landmark_freq = getattr(config, "landmark_freq", None)
    if landmark_freq is None:
        raise ValueError(
            'attn_implementation "landmark" needs config.landmark_freq; '
            "landmark_cli.models.decoders.add_landmarks prepares a model"
        )
    return landmark_freq + 1


def register() -> None:
    """Make "landmark" an attention implementation of the transformers library."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("landmark", landmark_attention_forward)
    AttentionMaskInterface.register("landmark", padding_mask)
    AttentionInterface.register("transformer_xl", recurrent_attention_forward)
    AttentionMaskInterface.register("transformer_xl", no_mask)


__all__ = ["LandmarkLayout", "landmark_attention_forward", "register", "torch"]
