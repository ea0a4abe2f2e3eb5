"""Landmark attention by its definition, in plain PyTorch: what every faster version must agree with.

Source: arXiv 2305.16300, section 3.1 and its grouped softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import group_dropout_scale
from .layout import KeyLayout, key_layout

MINUS_INFINITY = float("-inf")


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int | None = None,
    landmark_mask: Tensor | None = None,
    scale: float | None = None,
    start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    context_miss_key: Tensor | None = None,
    controlled: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    joint: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which a query reaches an earlier block only through that block's landmark.

    q: (B, H, Tq, D); the queries are the last Tq of the keys. k, v: (B, G, Tk, D), G divides H.
    block_size: tokens a block, its landmark (the last) included. landmark_mask: (B, Tk) bool instead: uneven blocks.
    scale: factor on the logits, 1 / sqrt(D) by default.
    start: (B,) first real key of each row; queries before it give zeros. cu_seqlens: (n + 1,) packed documents, B = 1.
    dropout_p: group dropout, the probability that an earlier block's share is zeroed for a query and head (the others
    are divided by 1 - p); dropout_seed: the 64-bit seed of its random numbers, a number or
    a tensor of one.
    context_miss_key: (B, G, 1, D) key of a context-miss token, which joins the outer softmax and has no value: its
    share is lost, unless controlled, (B, Tk) bool, marks landmarks: these leave the outer softmax, are normalised
    among themselves, and share out what the context-miss token got (paper, section 4.1.3).
    softcap: bound of the logits, each of which becomes softcap * tanh(logit / softcap) before any softmax.
    sinks: (H,) logits of the heads' attention sinks; a sink joins the outer softmax and has no value: its share is
    lost. Not together with context_miss_key.
    joint: one softmax over all text in place of the grouped one, see below. Not together with dropout_p or
    context_miss_key.
    return_lse: also return the log-sum-exp of the outer softmax's logits, (B, H, Tq) float32.

    The weight of a text token of an earlier block is outer(its landmark) * inner(token in its block); of a token of the
    query's own block, outer(token). Landmarks' values are never used. Softmaxes are computed in float32.
    With joint the outer softmax knows an earlier block by the log-sum-exp of its text's logits in place of its
    landmark's logit: text is weighted as if there were no landmarks, and no landmark's key takes part.
    A query with nothing to attend to gives zeros and a log-sum-exp of minus infinity.

    Returns (B, H, Tq, D) in q's dtype. Raises ValueError naming an argument that cannot be.
    """
    check_shapes(q, k, v)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it must be in [0, 1)")
    if dropout_p > 0.0 and dropout_seed is None:
        raise ValueError("dropout_p needs dropout_seed, so that backward and other implementations can repeat it")
    if context_miss_key is not None and sinks is not None:
        raise ValueError("context_miss_key and sinks exclude each other")
    if joint:
        check_joint(dropout_p, context_miss_key)
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs documents into one row, but q has {q.shape[0]} rows")

    keys = key_layout(
        k.shape[2],
        device=q.device,
        block_size=block_size,
        landmark_mask=landmark_mask,
        start=start,
        cu_seqlens=cu_seqlens,
    )
    logits = attention_logits(q, k, scale, softcap)
    own, allowed = _visibility(keys, q.shape[2])
    text = allowed & ~keys.landmark[:, None, None, :]
    landmark = allowed & keys.landmark[:, None, None, :] & ~own

    # (B, H, Tq, N): log-sum-exp of each block's text, and the logit by which the outer softmax knows the block.
    text_lse = _block_logsumexp(logits, text, keys)
    query_block = keys.block[:, -q.shape[2] :, None]
    is_own = (torch.arange(keys.blocks, device=q.device) == query_block)[:, None]
    group = text_lse
    if not joint:
        group = torch.where(is_own, text_lse, _block_value(logits, landmark, keys))
        group = group.masked_fill(text_lse == MINUS_INFINITY, MINUS_INFINITY)
    if context_miss_key is None:
        # A sink is one more logit, whose share nobody gets.
        sink = None if sinks is None else sinks.to(group.dtype)[:, None, None].expand(*group.shape[:3], 1)
        lse = masked_logsumexp(group if sink is None else torch.cat([group, sink], dim=-1))
        share = group - lse.unsqueeze(-1)
    else:
        miss = attention_logits(q, context_miss_key, scale, softcap)
        share, lse = _context_miss_share(group, miss, _controlled_blocks(keys, controlled) & ~is_own)

    shift = torch.where(group > MINUS_INFINITY, share - text_lse, MINUS_INFINITY)
    shift = shift.gather(-1, keys.block[:, None, None, :].expand(*logits.shape[:3], -1).contiguous())
    weights = torch.exp((logits + shift).masked_fill(~text, MINUS_INFINITY))
    if dropout_p > 0.0:
        factor = group_dropout_scale(dropout_seed, dropout_p, q.shape[:3], keys.block_in_document)
        weights = torch.where(own, weights, weights * factor)
    out = (weights @ repeat_heads(v, q.shape[1]).to(weights.dtype)).to(q.dtype)
    return (out, lse) if return_lse else out


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError naming what does not fit among q (B, H, Tq, D) and k, v (B, G, Tk, D)."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v are (B, H, T, D); found {q.dim()}, {k.dim()} and {v.dim()} dimensions")
    if k.shape != v.shape:
        raise ValueError(f"k and v differ in shape: {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head dim")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, not a multiple of the {k.shape[1]} key heads of k")
    if not 0 < q.shape[2] <= k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} tokens; it must have at least one and at most k's {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v are on different devices: {q.device}, {k.device}, {v.device}")


def check_joint(dropout_p: float, context_miss_key: Tensor | None) -> None:
    """Raise ValueError naming what the joint softmax cannot be asked for together with."""
    if dropout_p > 0.0:
        raise ValueError(
            f"joint and dropout_p exclude each other, and dropout_p is {dropout_p}: dropout_p drops blocks' shares of "
            "the grouped softmax, which joint=True does not have; leave out one of the two"
        )
    if context_miss_key is not None:
        raise ValueError(
            "joint and context_miss_key exclude each other: a context-miss token competes with landmarks' logits in "
            "the grouped softmax, which joint=True does not have; leave out one of the two"
        )


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, G, T, D) -> (B, heads, T, D): each key head serves heads / G query heads in a row."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def attention_logits(q: Tensor, k: Tensor, scale: float | None = None, softcap: float | None = None) -> Tensor:
    """q k^T * scale, soft-capped where softcap is given, in float32 (float64 if q is): (B, H, Tq, Tk)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return capped((q.to(dtype) @ repeat_heads(k, q.shape[1]).to(dtype).transpose(-1, -2)) * scale, softcap)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits kept within -softcap .. softcap, softly; as they are where softcap is None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def masked_logsumexp(x: Tensor) -> Tensor:
    """log-sum-exp over the last dimension, minus infinity (with zero gradient) where every entry is."""
    top = x.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == MINUS_INFINITY, 0.0)
    total = torch.exp(x - top).sum(-1)
    empty = total == 0
    return (total.masked_fill(empty, 1.0).log() + top.squeeze(-1)).masked_fill(empty, MINUS_INFINITY)


def _visibility(keys: KeyLayout, queries: int) -> tuple[Tensor, Tensor]:
    """(own, allowed), each (B or 1, 1, Tq, Tk): key in the query's block; key not later, real, of the same document."""
    length = keys.block.shape[1]
    index = torch.arange(length, device=keys.block.device)
    causal = index[None] <= index[length - queries :, None]
    document = keys.document[:, -queries:, None]
    allowed = causal & (document == keys.document[:, None]) & (document >= 0)
    own = keys.block[:, -queries:, None] == keys.block[:, None]
    return own[:, None], allowed[:, None]


def _block_logsumexp(logits: Tensor, mask: Tensor, keys: KeyLayout) -> Tensor:
    """log-sum-exp of the masked-in logits of each block: (B, H, Tq, N)."""
    masked = logits.masked_fill(~mask, MINUS_INFINITY)
    if keys.even_size:
        return masked_logsumexp(_fold(masked, keys))
    index = keys.block[:, None, None, :].expand(logits.shape).contiguous()
    top = masked.new_full((*logits.shape[:3], keys.blocks), MINUS_INFINITY)
    top = top.scatter_reduce(-1, index, masked.detach(), "amax")
    top = top.masked_fill(top == MINUS_INFINITY, 0.0)
    total = torch.zeros_like(top).scatter_add(-1, index, torch.exp(masked - top.gather(-1, index)))
    empty = total == 0
    return (total.masked_fill(empty, 1.0).log() + top).masked_fill(empty, MINUS_INFINITY)


def _block_value(logits: Tensor, mask: Tensor, keys: KeyLayout) -> Tensor:
    """The one masked-in logit of each block, minus infinity where there is none: (B, H, Tq, N)."""
    if keys.even_size:
        return _fold(logits.masked_fill(~mask, MINUS_INFINITY), keys)[..., -1]
    index = keys.block[:, None, None, :].expand(logits.shape).contiguous()
    shape = (*logits.shape[:3], keys.blocks)
    value = logits.new_zeros(shape).scatter_add(-1, index, logits.masked_fill(~mask, 0.0))
    found = logits.new_zeros(shape).scatter_add(-1, index, mask.expand(logits.shape).to(logits.dtype))
    return value.masked_fill(found == 0, MINUS_INFINITY)


def _controlled_blocks(keys: KeyLayout, controlled: Tensor | None) -> Tensor:
    """(B or 1, 1, 1, N) bool: blocks whose landmark is controlled."""
    if controlled is None:
        return torch.zeros(1, 1, 1, keys.blocks, dtype=torch.bool, device=keys.block.device)
    marked = (controlled & keys.landmark).long()
    counts = torch.zeros(marked.shape[0], keys.blocks, dtype=torch.long, device=marked.device)
    return (counts.scatter_add(-1, keys.block.expand(marked.shape), marked) > 0)[:, None, None]


def _context_miss_share(group: Tensor, miss: Tensor, controlled: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of each block's share, (B, H, Tq, N), and the outer log-sum-exp, (B, H, Tq).

    group: (B, H, Tq, N) logits of the outer softmax. miss: (B, H, Tq, 1) that of the context-miss token.
    """
    lse = masked_logsumexp(torch.cat([group.masked_fill(controlled, MINUS_INFINITY), miss], dim=-1)).unsqueeze(-1)
    among = masked_logsumexp(group.masked_fill(~controlled, MINUS_INFINITY)).unsqueeze(-1)
    among = among.masked_fill(among == MINUS_INFINITY, 0.0)
    return torch.where(controlled, miss - lse + group - among, group - lse), lse.squeeze(-1)


def _fold(x: Tensor, keys: KeyLayout) -> Tensor:
    """(..., T) -> (..., N, even_size), the last block filled up with minus infinity."""
    size = keys.even_size
    x = torch.nn.functional.pad(x, (0, keys.blocks * size - x.shape[-1]), value=MINUS_INFINITY)
    return x.view(*x.shape[:-1], keys.blocks, size)
