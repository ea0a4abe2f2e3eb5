"""Where transformers' attention layers enter: which landmark attention runs, in which implementation."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import LandmarkError, UsageError
from . import reference, retrieval
from .cache import Chunk
from .context_miss import attend_chunk_with_context_miss
from .kernels.hopper import support
from .recurrent import recurrent_attention_forward


@dataclass(frozen=True)
class LandmarkLayout:
    """Blocks of a forward pass where the model's even ones do not say it all; the fields are landmark_attention's.

    implementation: "eager", "fused" or "hopper" instead of what `choose_implementation` finds.
    Give it to any landmark model as `model(..., landmark_layout=LandmarkLayout(...))`.
    """

    block_size: int | None = None
    landmark_mask: Tensor | None = None
    start: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    controlled: Tensor | None = None
    implementation: str | None = None


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
        out = attend_chunk(module.layer_idx, query, key, value, landmark_chunk, scaling, context_miss_key)
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
        implementation=layout.implementation,
    )
    return out.transpose(1, 2), None


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int | None = None,
    landmark_mask: Tensor | None = None,
    context_miss_key: Tensor | None = None,
    controlled: Tensor | None = None,
    implementation: str | None = None,
    **arguments,
) -> Tensor | tuple[Tensor, Tensor]:
    """`reference.landmark_attention` in the implementation that `choose_implementation` picks for these arguments.

    Under autocast in its dtype, as torch's own attention: rotated queries and keys come in float32, values do not.
    """
    if q.device.type in ("cuda", "cpu") and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        context_miss_key = None if context_miss_key is None else context_miss_key.to(dtype)
    needs = None
    if landmark_mask is not None:
        needs = "landmark_mask makes blocks of any size"
    elif context_miss_key is not None:
        needs = "context_miss_key gives the outer softmax a key of its own"
    layout = (arguments.get(name) for name in ("start", "cu_seqlens", "dropout_p"))
    name = choose_implementation(
        str(q.device), q.dtype, q.shape[-1], block_size, needs_eager=needs,
        needs_portable=support.why_not_for(q.shape[2], *layout), requested=implementation,
    )  # fmt: skip
    if name in ("fused", "hopper"):
        from .kernels.training import landmark_attention as fused

        return fused(q, k, v, block_size=block_size, **arguments, hopper=name == "hopper")
    return _definition(
        q,
        k,
        v,
        block_size=block_size,
        landmark_mask=landmark_mask,
        context_miss_key=context_miss_key,
        controlled=controlled,
        **arguments,
    )


# It asks tensors for numbers, so torch.compile would cut it in pieces: a compiled model calls it as it is.
_definition = torch.compiler.disable(reference.landmark_attention)


def attend_chunk(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: Chunk,
    scale: float | None = None,
    context_miss_key: Tensor | None = None,
) -> Tensor:
    """`retrieval.attend_chunk` of a layer, in the implementation that `choose_implementation` picks.

    Raises LandmarkError where more blocks are to be retrieved than the fused kernels can.
    """
    chunk = chunk.to(k.device)
    blocks = chunk.cache.layer(layer, k, chunk)
    needs = None
    if context_miss_key is not None:
        needs = "context_miss_key gives the outer softmax a key of its own"
    elif torch.is_grad_enabled() and q.requires_grad:
        needs = "gradients are asked for"
    # Who asks for the Hopper kernels means attention that has them, which retrieval has not.
    requested = "fused" if os.environ.get("LANDMARK_ATTENTION") == "hopper" else None
    name = choose_implementation(
        str(q.device), q.dtype, q.shape[-1], blocks.settings.block_size, needs_eager=needs,
        needs_portable="retrieval has no Hopper kernels of its own", requested=requested,
    )  # fmt: skip
    chunk.cache.implementations.add(name)
    if name == "fused":
        from .kernels import reading

        reason = reading.why_not(blocks.settings, scale)
        if reason is not None:
            raise LandmarkError(f"{reason}; or set LANDMARK_ATTENTION=eager, which is slow")
        return reading.attend_chunk(q, k, v, blocks, chunk, scale)
    if context_miss_key is not None:
        return attend_chunk_with_context_miss(q, k, v, context_miss_key, blocks, chunk, scale)
    return retrieval.attend_chunk(q, k, v, blocks, chunk, scale)


@torch.compiler.assume_constant_result
def choose_implementation(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int | None,
    *,
    needs_eager: str | None = None,
    needs_portable: str | None = None,
    requested: str | None = None,
) -> str:
    """Wherever their kernels can serve, "hopper" on an H100 or H200 and "fused" on any NVIDIA GPU; "eager" elsewhere.

    The user is told once. device: "cpu", "cuda:1", ...; needs_eager: why only the eager definition knows these
    arguments, if so; needs_portable: why the Hopper kernels do not know them. requested, or else the environment's
    LANDMARK_ATTENTION: "eager", "fused" or "hopper", to have that one.

    Raises ValueError where what is asked for cannot serve, naming the argument, or where no such name exists, and
    UsageError where it is the environment that asks.
    """
    kind = device.partition(":")[0]
    environment = None if requested else os.environ.get("LANDMARK_ATTENTION")
    requested = requested or environment or None

    def refusal(message: str) -> Exception:
        return UsageError(f"LANDMARK_ATTENTION={environment}: {message}") if environment else ValueError(message)

    if requested not in (None, "eager", "fused", "hopper"):
        raise refusal(
            f'landmark attention has the implementations "eager", "fused" and "hopper"; {requested!r} was asked for'
        )
    if requested == "eager":
        return _announce("eager", "as asked for")
    if requested == "hopper":
        obstacle = needs_eager or needs_portable or support.why_not(device, dtype, head_dim, block_size)
        if obstacle is not None:
            raise refusal(f"Hopper kernels were asked for, but {obstacle}; unasked, what can serve runs")
        return _announce("hopper", "as asked for")
    obstacle = needs_eager or _obstacle(kind, dtype, head_dim, block_size, asked=requested == "fused")
    if obstacle is None and requested is None and support.is_hopper(device):
        obstacle = needs_portable or support.why_not(device, dtype, head_dim, block_size)
        return _announce("fused", f"on {kind}; {obstacle}") if obstacle else _announce("hopper", f"on {kind}")
    if obstacle is None:
        return _announce("fused", "as asked for" if requested else f"on {kind}")
    if requested == "fused":
        raise refusal(f"fused landmark attention was asked for, but {obstacle}; unasked, what can serve runs")
    return _announce("eager", obstacle)


def _obstacle(device: str, dtype: torch.dtype, head_dim: int, block_size: int | None, asked: bool) -> str | None:
    """Why the fused kernels cannot serve. On the CPU they run in Triton's interpreter, but only when asked for."""
    if device != "cuda" and not asked:
        return f"the fused kernels need an NVIDIA GPU and q is on {device}"
    try:
        from .kernels.training import why_not
    except ImportError as error:
        return f"{error.name or 'triton'} is not installed"
    return why_not(device, dtype, head_dim, block_size)


@functools.cache
def _announce(name: str, reason: str) -> str:
    from ..console import info

    info(f"landmark attention: {name} ({reason})")
    return name


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


__all__ = ["LandmarkLayout", "choose_implementation", "landmark_attention", "landmark_attention_forward", "register"]
