"""Where transformers' attention layers enter: what is asked of landmark attention, and the backend that answers."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import operators, reference
from .backends import BACKENDS, FEW_QUERIES, Problem, choose
from .cache import BlockCache, Chunk
from .recurrent import recurrent_attention_forward


@dataclass(frozen=True)
class LandmarkLayout:
    """Blocks of a forward pass where the model's even ones do not say it all; the fields are landmark_attention's.

    backend: the name of one of `backends.BACKENDS`, instead of what `backends.choose` finds.
    Give it to any landmark model as `model(..., landmark_layout=LandmarkLayout(...))`.
    """

    block_size: int | None = None
    landmark_mask: Tensor | None = None
    start: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    controlled: Tensor | None = None
    backend: str | None = None


def landmark_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    landmark_cache: BlockCache | None = None,
    landmark_chunk: Chunk | None = None,
    landmark_layout: LandmarkLayout | None = None,
    context_miss_key: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls for `attn_implementation="landmark"`.

    query: (B, H, T, D); key, value: (B, G, T, D), rotated. landmark_cache, landmark_chunk: read on through the cache,
    of which the input is this chunk (see BlockCache.inputs); otherwise attend within the input, whose landmarks stand
    at every (module.config.landmark_freq + 1)-th position unless landmark_layout says otherwise. attention_mask: (B, T)
    bool where some row is padded on the left, from which its blocks then count. Returns (B, T, H, D) and None:
    attention weights are never formed.

    Raises ValueError for what would change the result and cannot be honoured: a 4-D mask, logit soft-capping, attention
    sinks, a sliding window shorter than the input.
    """
    _check_arguments(key, attention_mask, **kwargs)
    if landmark_chunk is not None:
        given = landmark_cache, landmark_chunk, scaling, context_miss_key
        out = attend_chunk(module.layer_idx, query, key, value, *given)
        return out.transpose(1, 2), None
    layout = landmark_layout or LandmarkLayout()
    block_size = layout.block_size
    if block_size is None and layout.landmark_mask is None:
        block_size = _block_size(module.config)
    start = layout.start
    if start is None and attention_mask is not None:
        start = (attention_mask.cumsum(-1) == 0).sum(-1)
    out = landmark_attention(
        query,
        key,
        value,
        block_size=block_size,
        landmark_mask=layout.landmark_mask,
        scale=scaling,
        start=start,
        cu_seqlens=layout.cu_seqlens,
        dropout_p=layout.dropout_p,
        dropout_seed=_layer_seed(layout.dropout_seed, module.layer_idx),
        context_miss_key=context_miss_key,
        controlled=layout.controlled,
        backend=layout.backend,
    )
    return out.transpose(1, 2), None


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int | None = None,
    landmark_mask: Tensor | None = None,
    start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    context_miss_key: Tensor | None = None,
    controlled: Tensor | None = None,
    backend: str | None = None,
    **arguments,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.landmark_attention` in the backend that `backends.choose` finds for these arguments, or that is named.

    Under autocast in its dtype, as torch's own attention: rotated queries and keys come in float32, values do not.
    """
    if q.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        context_miss_key = None if context_miss_key is None else context_miss_key.to(dtype)
    reference.check_shapes(q, k, v)
    # Numbers also where a compiled model's lengths are symbols, for a choice is made of constants.
    block_size = None if block_size is None else operator.index(block_size)
    few_queries = True if q.shape[2] < FEW_QUERIES else False
    problem = Problem(
        str(q.device),
        q.dtype,
        operator.index(q.shape[-1]),
        None if landmark_mask is not None else block_size,
        few_queries=few_queries,
        padded=start is not None,
        packed=cu_seqlens is not None,
        dropout=dropout_p > 0.0,
        context_miss=context_miss_key is not None,
    )
    name = choose(problem, backend)
    arguments |= {"block_size": block_size, "start": start, "cu_seqlens": cu_seqlens, "dropout_p": dropout_p}
    if BACKENDS[name].forward is not None:
        return operators.attend(q, k, v, backend=name, **arguments)
    arguments |= {"landmark_mask": landmark_mask, "context_miss_key": context_miss_key, "controlled": controlled}
    return _definition(q, k, v, **arguments)


# It asks tensors for numbers, so torch.compile would cut it in pieces: a compiled model calls it as it is.
_definition = torch.compiler.disable(reference.landmark_attention)


def attend_chunk(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: BlockCache,
    chunk: Chunk,
    scale: float | None = None,
    context_miss_key: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`retrieval.attend_chunk` of a layer in the backend that `backends.choose` finds, or is named: (B, H, T, D).

    q: (B, H, T, D) and k, v: (B, G, T, D), rotated at chunk.position_ids. The cache's trace holds what was read.

    Raises LandmarkError where more blocks are to be retrieved than the kernels can.
    """
    chunk = chunk.to(k.device)
    blocks = cache.layer(layer, k, chunk)
    problem = Problem(
        str(q.device),
        q.dtype,
        q.shape[-1],
        blocks.settings.block_size,
        context_miss=context_miss_key is not None,
        reading=True,
        differentiated=torch.is_grad_enabled() and q.requires_grad,
    )
    name = choose(problem, backend)
    cache.backends.add(name)
    read = BACKENDS[name].read(q, k, v, blocks, chunk, scale, context_miss_key, cache.trace is not None)
    cache.record(layer, chunk, read.ages, read.shares, read.dropped)
    return read.out


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
        raise ValueError(
            f"attention_mask has {attention_mask.dim()} dimensions; landmark attention takes (B, T) padding"
        )
    if softcap is not None:
        raise ValueError("softcap: landmark attention has no logit soft-capping")
    if s_aux is not None:
        raise ValueError("s_aux: landmark attention has no attention sinks")
    if sliding_window is not None and key.shape[2] > sliding_window:
        raise ValueError(f"sliding_window is {sliding_window}, shorter than the input of {key.shape[2]} tokens")


def _layer_seed(seed: int | Tensor | None, layer: int) -> int | Tensor | None:
    """Another seed for every layer, so that a block lost in one layer may be kept in the next."""
    return None if seed is None else (seed + layer * 0x9E3779B97F4A7C15 % (1 << 61)) % (1 << 62)


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


__all__ = ["LandmarkLayout", "landmark_attention", "landmark_attention_forward", "register"]
