"""The joint softmax by PyTorch's own attention, whose kernels are a library's.

Where landmarks only choose and everything is read, they are never keys: queries of text attend as if there were no
landmarks, which is plain causal attention of the text alone. It is copied out of the stream for that. The landmarks'
own queries, one in block_size, see all text up to their block's end, and are attended for apart. Packed documents are
attended for one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from .kernels.common.tensors import empty_heads_last
from .layout import check_bounds
from .reference import attention_logits, repeat_heads

aten = torch.ops.aten

# The first cuDNN that PyTorch chooses unasked, for ones up to 9.15 were wrong at lengths that are no multiple of 128;
# and the widest heads that all of these go backward through.
CUDNN, MAX_HEAD_DIM = 91501, 128
DTYPES = torch.bfloat16, torch.float16


def why_not(kind: str, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why PyTorch's attention cannot serve on a kind of device ("cuda"), naming what is allowed; None if it can."""
    if block_size < 2:
        return f"block_size is {block_size}; a block has a text token and a landmark, so at least 2"
    if kind == "cpu":
        return "q is float64, which only the definition keeps" if dtype == torch.float64 else None
    if kind != "cuda":
        return f"PyTorch's attention is used on an NVIDIA GPU or a CPU, and q is on {kind}"
    if dtype not in DTYPES:
        return f"q is {dtype}; cuDNN's attention takes {' and '.join(map(str, DTYPES))}"
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return f"q has head dim {head_dim}; cuDNN's attention takes multiples of 8 up to {MAX_HEAD_DIM}"
    found = torch.backends.cudnn.version() or 0
    return None if found >= CUDNN else f"cuDNN is {found}; its attention is used from {CUDNN} on"


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out (B, H, T, D), lse (B, H, T) float32) of q (B, H, T, D) and k, v (B, G, T, D), of which every block_size-th
    token is a landmark. out lies in memory as (B, T, H, D).

    cu_seqlens: (n + 1,) documents that do not see each other, of which landmarks count; B = 1.
    """
    out, lse = empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if cu_seqlens is not None:
        return _by_documents(forward, cu_seqlens, (q, k, v), (out, lse), block_size, scale)
    text = [text_of(x, block_size) for x in (q, k, v)]
    for whole, of_text in zip((out, lse), attend_text(*text, scale), strict=True):
        put_text(whole, block_size, of_text)
    if q.shape[2] >= block_size:
        before = seen_by_landmarks(q, block_size)
        given = landmarks_of(q, block_size), *(x[:, :, :before] for x in text[1:])
        for whole, rows in zip((out, lse), _landmarks(q).forward(*given, block_size - 1, scale), strict=True):
            landmarks_of(whole, block_size).copy_(rows)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for the gradient of out, each in memory as (B, T, heads, D). cu_seqlens: as of `forward`."""
    gradients = tuple(empty_heads_last(x) for x in (q, k, v))
    if cu_seqlens is not None:
        return _by_documents(backward, cu_seqlens, (dout, q, k, v, out, lse), gradients, block_size, scale)
    text = [text_of(x, block_size) for x in (dout, q, k, v, out, lse)]
    found = attend_text_backward(*text, scale)
    rows = [None] * 3
    if q.shape[2] >= block_size:
        before = seen_by_landmarks(q, block_size)
        _, _, text_k, text_v, _, _ = text
        dout, q, out, lse = (landmarks_of(x, block_size) for x in (dout, q, out, lse))
        given = dout, q, text_k[:, :, :before], text_v[:, :, :before], out, lse
        rows = _landmarks(q).backward(*given, block_size - 1, scale)
    for number, (gradient, of_text, of_landmarks) in enumerate(zip(gradients, found, rows, strict=True)):
        # A landmark is never a key, so what its own query adds goes to the text's keys and values.
        put_text(gradient, block_size, of_text, of_landmarks if number else None)
        own = landmarks_of(gradient, block_size)
        own.zero_() if number or of_landmarks is None else own.copy_(of_landmarks)
    return gradients


def _by_documents(
    function: Callable[..., Sequence[Tensor]],
    cu_seqlens: Tensor,
    given: Sequence[Tensor],
    found: tuple[Tensor, ...],
    *settings,
) -> tuple[Tensor, ...]:
    """found, (1, H, T, ...), filled with what a function gives of each document of the given, (1, H, T, ...)."""
    check_bounds(cu_seqlens, given[0].shape[2])
    for first, end in pairwise(cu_seqlens.tolist()):
        # Boundaries that stand at the end to fill up their number make documents of no tokens.
        if first < end:
            of_document = function(*(x[:, :, first:end] for x in given), *settings)
            for whole, part in zip(found, of_document, strict=True):
                whole[:, :, first:end] = part
    return found


# --- where text and landmarks are


def text_of(x: Tensor, block_size: int) -> Tensor:
    """The text of a stream (B, H, T, ...), in memory as (B, n, H, ...), or, of one number a token, as (B, H, n)."""
    blocks = x.shape[2] // block_size
    tokens = x.shape[2] - blocks
    found = empty_heads_last(x, tokens) if x.dim() == 4 else x.new_empty((*x.shape[:2], tokens))
    for there, here in zip(_of_text(found, block_size, blocks), _of_stream(x, block_size, blocks), strict=True):
        there.copy_(here)
    return found


def put_text(stream: Tensor, block_size: int, text: Tensor, added: Tensor | None = None) -> None:
    """Put text (B, H, n, ...) back where `text_of` found it. added: (B, H, n', ...), which is added to the text of
    blocks that have a landmark."""
    blocks = stream.shape[2] // block_size
    whole, *rest = zip(_of_stream(stream, block_size, blocks), _of_text(text, block_size, blocks), strict=True)
    there, here = whole
    if added is None:
        there.copy_(here)
    else:
        torch.add(here, _in_blocks(added, blocks, block_size - 1, block_size - 1), out=there)
    for there, here in rest:
        there.copy_(here)


def landmarks_of(x: Tensor, block_size: int) -> Tensor:
    """A view of a stream's landmarks, (B, H, N, ...)."""
    return x[:, :, block_size - 1 :: block_size]


def seen_by_landmarks(x: Tensor, block_size: int) -> int:
    """How many of a stream's text tokens stand in blocks that have a landmark."""
    return x.shape[2] // block_size * (block_size - 1)


def _of_stream(x: Tensor, block_size: int, blocks: int) -> list[Tensor]:
    """Views of a stream's text: of blocks that have a landmark, (B, H, N, block_size - 1, ...), and of what follows, if
    something does."""
    whole = _in_blocks(x, blocks, block_size, block_size - 1)
    end = blocks * block_size
    return [whole] if end == x.shape[2] else [whole, x[:, :, end:]]


def _of_text(x: Tensor, block_size: int, blocks: int) -> list[Tensor]:
    """The same views of text alone, of as many blocks."""
    whole = _in_blocks(x, blocks, block_size - 1, block_size - 1)
    end = blocks * (block_size - 1)
    return [whole] if end == x.shape[2] else [whole, x[:, :, end:]]


def _in_blocks(x: Tensor, blocks: int, size: int, taken: int) -> Tensor:
    """A view of x (B, H, T, ...): of so many blocks of `size` tokens the first ones, (B, H, blocks, taken, ...). It is
    made in one operation, for a training step, which waits for its host, asks for a thousand of them."""
    batch, heads, token, *rest = x.stride()
    shape = (*x.shape[:2], blocks, taken, *x.shape[3:])
    return x.as_strided(shape, (batch, heads, size * token, token, *rest))


# --- queries of text: a library's causal attention

# Of the log-sum-exp that cuDNN's attention gives, and takes back: (B, H, n, 1) or, in some versions, (B, H, n).
_cudnn_lse_dimensions = 4


def attend_text(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention: (out (B, H, n, D), lse (B, H, n) float32)."""
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    global _cudnn_lse_dimensions
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    _cudnn_lse_dimensions = lse.dim()
    return out, lse.reshape(q.shape[:3])


def attend_text_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `attend_text`. lse is contiguous."""
    if not q.is_cuda:
        given = dout, q, k, v, out, lse, 0.0, True
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, scale=scale)
    # It has no dropout, so its random numbers are any.
    seed = q.new_empty((), dtype=torch.int64)
    beside = seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, True
    lse = lse.view(*q.shape[:3], *(1,) * (_cudnn_lse_dimensions - 3))
    return aten._scaled_dot_product_cudnn_attention_backward(dout, q, k, v, out, lse, *beside, scale=scale)


# --- landmarks' own queries: the definition, and the kernels


def attend_landmarks(q: Tensor, k: Tensor, v: Tensor, text: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of N landmarks, the i-th of which sees the first (i + 1) * text keys: (out, lse (B, H, N) float32).

    q: (B, H, N, D). k, v: (B, G, N * text, D).
    """
    logits = _landmark_logits(q, k, text, scale)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.unsqueeze(-1))
    return (weights @ repeat_heads(v, q.shape[1]).float()).to(q.dtype), lse


def attend_landmarks_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, text: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `attend_landmarks`."""
    weights = torch.exp(_landmark_logits(q, k, text, scale) - lse.unsqueeze(-1))
    dout = dout.float()
    delta = (dout * out.float()).sum(-1, keepdim=True)
    dlogits = weights * (dout @ repeat_heads(v, q.shape[1]).float().transpose(-1, -2) - delta) * scale
    dq = dlogits @ repeat_heads(k, q.shape[1]).float()
    dk, dv = dlogits.transpose(-1, -2) @ q.float(), weights.transpose(-1, -2) @ dout
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


DEFINITION = SimpleNamespace(forward=attend_landmarks, backward=attend_landmarks_backward)


@functools.cache
def _kernels() -> ModuleType:
    """The kernels' launches, imported where they are wanted: not every machine has Triton."""
    from .kernels.landmarks import launch

    return launch


def _landmarks(q: Tensor) -> ModuleType | SimpleNamespace:
    """Who attends for landmarks where q is."""
    return _kernels() if q.is_cuda else DEFINITION


def _landmark_logits(q: Tensor, k: Tensor, text: int, scale: float) -> Tensor:
    """(B, H, N, N * text) float32, minus infinity of what a landmark does not see."""
    block = torch.arange(k.shape[2], device=k.device) // text
    later = block > torch.arange(q.shape[2], device=q.device)[:, None]
    return attention_logits(q, k, scale).masked_fill(later, -torch.inf)
