"""Landmark attention of tensors, in the backend that can serve: of a whole input, of a chunk through the block cache,
and of a training window that is read chunk by chunk."""

from __future__ import annotations

import operator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import operators, reference, retrieval_window, window_operators
from .backends import BACKENDS, FEW_QUERIES, Problem, choose
from .cache import BlockCache, Chunk
from .window import ReadingWindow


@overload
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int | None = None,
    *,
    return_lse: Literal[False] = False,
    **arguments: Any,
) -> Tensor: ...
@overload
def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: int | None = None, *, return_lse: Literal[True], **arguments: Any
) -> tuple[Tensor, Tensor]: ...
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int | None = None,
    *,
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention in which a query reaches an earlier block only through that block's landmark (arXiv 2305.16300,
    section 3.1): what a model of one's own puts in place of `scaled_dot_product_attention(q, k, v, is_causal=True)`.

    q: (B, H, T, D), rotated, as k is: rotary embedding comes first. k, v: (B, G, T, D), where G divides H. Of each
    block of `block_size` tokens the last is its landmark; `landmark_cli.insert_landmarks` puts landmarks into text.
    Returns (B, H, T, D) in q's dtype, and can be differentiated and compiled. Fused kernels run on an NVIDIA GPU, on
    any other device plain PyTorch. Landmarks predict nothing: their outputs have no target.

    landmark_mask: (B, T) bool in place of block_size, for blocks of any size. scale: factor on the logits, 1 / sqrt(D).
    start: (B,) the first real key of each row. cu_seqlens: (n + 1,) documents packed into a single row. dropout_p,
    dropout_seed: group dropout. context_miss_key, controlled: see docs/semantics.md, section 5. softcap: bound of
    the logits. sinks: (H,) logits of attention sinks. joint: one softmax over the text of all blocks, as if there were
    no landmarks, in place of the paper's grouped softmax; not with dropout_p or context_miss_key. return_lse: also
    return the log-sum-exp of the outer softmax, (B, H, T) float32. backend: the name of one, instead of what
    `backends.choose` finds. `reference.landmark_attention` is the definition of all of these.

    Under autocast it computes in autocast's dtype, as torch's own attention: rotated queries and keys come in float32,
    values do not. Raises ValueError naming an argument that cannot be.

    >>> import torch
    >>> q = torch.randn(2, 8, 128, 64)
    >>> k, v = torch.randn(2, 2, 2, 128, 64)
    >>> landmark_cli.landmark_attention(q, k, v, block_size=32).shape
    torch.Size([2, 8, 128, 64])
    """
    q, k, v, context_miss_key = as_autocast(q, k, v, context_miss_key)
    reference.check_shapes(q, k, v)
    # Numbers also where a compiled model's lengths are symbols, for a choice is made of constants.
    block_size = None if block_size is None else operator.index(block_size)
    few_queries = True if q.shape[2] < FEW_QUERIES else False
    earlier_keys = True if k.shape[2] > q.shape[2] else False
    dropout = True if dropout_p > 0.0 else False
    problem = Problem(
        str(q.device),
        q.dtype,
        operator.index(q.shape[-1]),
        None if landmark_mask is not None else block_size,
        few_queries=few_queries,
        padded=start is not None,
        packed=cu_seqlens is not None,
        dropout=dropout,
        context_miss=context_miss_key is not None,
        softcap=softcap is not None,
        sinks=sinks is not None,
        joint=joint,
        earlier_keys=earlier_keys,
        lse=return_lse,
        differentiated=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
    )
    name = choose(problem, backend)
    arguments = {
        "block_size": block_size,
        "scale": scale,
        "start": start,
        "cu_seqlens": cu_seqlens,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
        "softcap": softcap,
        "sinks": sinks,
        "joint": joint,
        "return_lse": return_lse,
    }
    if BACKENDS[name].forward is not None:
        return operators.attend(q, k, v, backend=name, **arguments)
    arguments |= {"landmark_mask": landmark_mask, "context_miss_key": context_miss_key, "controlled": controlled}
    return _definition(q, k, v, **arguments)


def as_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype, where there is autocast."""
    kind = tensors[0].device.type
    if kind not in ("cuda", "cpu") or not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(x if x is None else x.to(torch.get_autocast_dtype(kind)) for x in tensors)


# They ask tensors for numbers, so torch.compile would cut them in pieces: a compiled model calls them as they are.
_definition = torch.compiler.disable(reference.landmark_attention)
_retrieve_by_definition = torch.compiler.disable(retrieval_window.retrieve_window)
_select_by_definition = torch.compiler.disable(retrieval_window.select_in_window)


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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rotated: bool = True,
) -> Tensor:
    """`retrieval.attend_chunk` of a layer in the backend that `backends.choose` finds, or is named: (B, H, T, D).

    q: (B, H, T, D) and k, v: (B, G, T, D), rotated at chunk.position_ids, unless `rotated` says that the layer has no
    positions. The cache's trace holds what was read.

    Raises LandmarkError where more blocks are to be retrieved than the kernels can.
    """
    chunk = chunk.to(k.device)
    chunk = chunk if rotated else chunk.unrotated
    blocks = cache.layer(layer, k, chunk, rotated)
    name = reader_name(q, blocks.settings.block_size, context_miss_key, softcap, sinks, backend)
    cache.backends.add(name)
    # Who cannot have these is not chosen where there are some.
    given = {name: value for name, value in (("softcap", softcap), ("sinks", sinks)) if value is not None}
    read = BACKENDS[name].read(q, k, v, blocks, chunk, scale, context_miss_key, cache.trace is not None, **given)
    cache.record(layer, chunk, read.ages, read.shares, read.dropped)
    return read.out


def reader_name(
    q: Tensor,
    block_size: int,
    context_miss_key: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str | None = None,
) -> str:
    """The name of the backend that reads chunks through the cache; arguments as of `attend_chunk`."""
    problem = Problem(
        str(q.device),
        q.dtype,
        q.shape[-1],
        block_size,
        context_miss=context_miss_key is not None,
        reading=True,
        differentiated=torch.is_grad_enabled() and q.requires_grad,
        softcap=softcap is not None,
        sinks=sinks is not None,
    )
    return choose(problem, backend)


def attend_window(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: ReadingWindow,
    scale: float | None = None,
    backend: str | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    first: bool | None = None,
) -> Tensor:
    """Read a window's chunks, each through the blocks of those before it, all at once: (B, H, N, D), differentiable.

    The same as `attend_chunk` for one chunk after the other. q: (B, H, N, D) and k, v: (B, G, N, D), rotated at
    window.position_ids. Each part, within chunks and of retrieved blocks, is made by the backend that `backends.choose`
    finds for it, or that is named; padding gives zeros. first: whether this is layer 0, where who calls knows it.
    """
    q, k, v = as_autocast(q, k, v)
    given = {"scale": scale, "softcap": softcap, "sinks": sinks}
    out, lse = _attend_within_chunks(q, k, v, window, backend, given)
    if min(window.top_k, window.most_earlier) == 0:
        return out
    dim, block_size, top_k = (operator.index(n) for n in (q.shape[-1], window.block_size, window.top_k))
    # Sinks have their share of what was found within the chunks already.
    problem = Problem(str(q.device), q.dtype, dim, block_size, retrieving=top_k, softcap=softcap is not None)
    name = choose(problem, backend)
    if BACKENDS[name].retrieve_forward is None:
        return _join(out, lse, *_retrieve_by_definition(q, k, v, window, scale, layer, softcap=softcap))
    # Only selections that nobody shares are made by kernels.
    shared = window.selection != "per_token_and_head"
    ages = _select_by_definition(q, k, window, scale, layer, softcap) if shared else None
    given = {"backend": name, "ages": ages, "softcap": softcap, "first": first}
    return window_operators.retrieve(q, k, v, window, scale, layer, (out, lse), **given)[0]


def _attend_within_chunks(
    q: Tensor, k: Tensor, v: Tensor, window: ReadingWindow, backend: str | None, given: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, D), lse (B, H, N)) of what each token finds in its own chunk: a batch of chunks. given: what makes
    its logits."""
    batch, heads, tokens, dim = q.shape
    given = given | {"block_size": window.block_size, "joint": window.joint, "backend": backend, "return_lse": True}
    if not window.even:
        out, lse = landmark_attention(*map(one_row, (q, k, v)), cu_seqlens=window.own_bounds, **given)
        out, lse = in_rows(out, batch), lse.view(heads, batch, tokens).transpose(0, 1)
        padding = (window.chunk_of < 0)[:, None]
        return out.masked_fill(padding.unsqueeze(-1), 0.0), lse.masked_fill(padding, -torch.inf)
    chunks = -(-tokens // window.chunk)
    if chunks == 1:
        return landmark_attention(q, k, v, **given)
    # The last chunk is filled up behind its tokens, where none of them looks.
    missing = chunks * window.chunk - tokens

    def fold(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        return x.reshape(batch * chunks, window.chunk, *x.shape[2:]).transpose(1, 2)

    out, lse = landmark_attention(fold(q), fold(k), fold(v), **given)
    out = out.transpose(1, 2).reshape(batch, -1, heads, dim)[:, :tokens].transpose(1, 2)
    lse = lse.view(batch, chunks, heads, -1).transpose(1, 2).reshape(batch, heads, -1)[..., :tokens]
    return out, lse


def _join(out: Tensor, lse: Tensor, retrieved: Tensor, retrieved_lse: Tensor) -> Tensor:
    """One attention out of two over different keys: outputs (B, H, N, D), log-sum-exps of their logits (B, H, N)."""
    both = torch.stack([lse, retrieved_lse])
    total = torch.logsumexp(both.masked_fill(both == -torch.inf, torch.finfo(both.dtype).min), dim=0)
    share = torch.exp(both - total).unsqueeze(-1)
    return (out * share[0] + retrieved * share[1]).to(out.dtype)


def one_row(x: Tensor) -> Tensor:
    """(B, H, T, D) -> (1, H, B * T, D), a view where a token's heads lie side by side."""
    return x.transpose(1, 2).reshape(1, -1, x.shape[1], x.shape[3]).transpose(1, 2)


def in_rows(x: Tensor, rows: int) -> Tensor:
    """The inverse of `one_row`."""
    return x.transpose(1, 2).reshape(rows, -1, x.shape[1], x.shape[3]).transpose(1, 2)
