"""Launching the kernels of layers with a sliding window."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configuration import Configuration, padded, product_precision
from ..common.launch import Launch, LaunchCache, launch
from ..common.logits import scaling_of
from ..common.operands import operand
from ..common.sinks import sink_gradient
from ..common.tensors import empty_heads_last
from ..common.tiles import LOG2E
from .backward import key_gradient_kernel, query_gradient_kernel
from .configurations import choices
from .forward import forward_kernel

FORWARD_CALLS, BACKWARD_CALLS = LaunchCache(), LaunchCache()


class Seen(NamedTuple):
    """What queries see, and what makes logits.

    first: (B or 1, Tq) int32, the first key that each may see, beside itself. text: (B or 1, Tk) bool, what others may
    see. softcap: bound of the logits, or None. Backward needs numbers in `first` that never fall from query to query.
    """

    first: Tensor
    text: Tensor
    scale: float
    softcap: float | None


def forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out (B, H, Tq, D), lse (B, H, Tq) float32) of q (B, H, Tq, D) and k, v (B, G, Tk, D), any strides; the
    queries are the last Tq of the keys.

    sinks: (H,) logits of attention sinks. out lies in memory as (B, Tq, H, D), as the next layer wants it.
    """
    dtype = q.dtype
    q, k, v = (operand(x) for x in (q, k, v))
    sinks = None if sinks is None else operand(sinks)
    out = empty_heads_last(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors = q, k, v, out, lse, *_places(seen), sinks
    kind = _kind(q, k, v, seen, sinks)
    if not FORWARD_CALLS.repeat(kind, tensors):
        found = choices("forward", q)
        FORWARD_CALLS.make(kind, tensors, lambda: [found.run(lambda choice: launch_forward(tensors, seen, choice))])
    return out.to(dtype), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Seen, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv and, where there are sinks, theirs) for the gradient of out."""
    dtype = q.dtype
    dout, q, k, v, out = (operand(x) for x in (dout, q, k, v, out))
    dq, dk, dv = empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)
    delta = torch.empty_like(lse)
    first, text = _places(seen)
    # The end of the queries that may see a key.
    keys = torch.arange(k.shape[2], device=k.device, dtype=first.dtype).expand(len(first), -1).contiguous()
    last = torch.searchsorted(first, keys, right=True, out_int32=True).expand(len(text), -1).contiguous()
    if len(text) < len(last):
        text = text.expand(len(last), -1).contiguous()
    tensors = q, k, v, out, dout, lse, dq, dk, dv, delta, first, text, last
    kind = (*_kind(q, k, v, seen, sinks), out.stride(), dout.stride())
    if not BACKWARD_CALLS.repeat(kind, tensors):
        query, key = (choices(kernel, q) for kernel in ("query_gradient", "key_gradient"))
        BACKWARD_CALLS.make(
            kind,
            tensors,
            lambda: [
                query.run(lambda choice: launch_query_gradient(tensors, seen, choice)),
                key.run(lambda choice: launch_key_gradient(tensors, seen, choice)),
            ],
        )
    dsinks = None if sinks is None else sink_gradient(sinks, lse, delta)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dsinks


def launch_forward(tensors: tuple, seen: Seen, choice: Configuration) -> Launch | None:
    """Launch the forward kernel in a configuration."""
    q, k, v, out, _, first, text, _ = tensors
    batch, heads, queries, _ = q.shape
    tiles = triton.cdiv(queries, choice.rows)
    arguments = (
        *map(_strides, (q, k, v, out)), *map(_row_stride, (first, text)), _scaling(seen), queries,
        k.shape[2] - queries, tiles, heads,
    )  # fmt: skip
    programs = batch * heads * tiles
    constants = _constants(q, k, choice)
    return launch(forward_kernel, programs, tensors, range(8), arguments, constants, choice.launch_options())


def launch_query_gradient(tensors: tuple, seen: Seen, choice: Configuration) -> Launch | None:
    """Launch the first backward kernel."""
    q, k, v, out, dout, _, dq, _, _, _, first, text, _ = tensors
    batch, heads, queries, _ = q.shape
    tiles = triton.cdiv(queries, choice.rows)
    arguments = (
        *map(_strides, (q, k, v, out, dout, dq)), *map(_row_stride, (first, text)), _scaling(seen), seen.scale,
        queries, k.shape[2] - queries, tiles, heads,
    )  # fmt: skip
    programs, constants = batch * heads * tiles, _constants(q, k, choice)
    which = 0, 1, 2, 3, 4, 5, 6, 9, 10, 11
    return launch(query_gradient_kernel, programs, tensors, which, arguments, constants, choice.launch_options())


def launch_key_gradient(tensors: tuple, seen: Seen, choice: Configuration) -> Launch | None:
    """Launch the second backward kernel, which needs what the first leaves."""
    q, k, v, _, dout, _, _, dk, dv, _, first, text, _ = tensors
    batch, heads, keys, _ = k.shape
    tiles = triton.cdiv(keys, choice.cols)
    arguments = (
        *map(_strides, (q, k, v, dout, dk, dv)), *map(_row_stride, (first, text)), _scaling(seen), seen.scale,
        q.shape[2], keys - q.shape[2], tiles, heads,
    )  # fmt: skip
    programs, constants = batch * heads * tiles, _constants(q, k, choice)
    which = 0, 1, 2, 4, 5, 9, 7, 8, 10, 11, 12
    return launch(key_gradient_kernel, programs, tensors, which, arguments, constants, choice.launch_options())


def _places(seen: Seen) -> tuple[Tensor, Tensor]:
    """first, and text in bytes, with dense rows."""
    return seen.first.contiguous(), seen.text.contiguous().view(torch.uint8)


def _scaling(seen: Seen) -> tuple[float, float | None]:
    return scaling_of(seen.scale, seen.softcap, LOG2E.value)


def _constants(q: Tensor, k: Tensor, choice: Configuration) -> dict:
    dim = q.shape[-1]
    return {
        "HEADS_PER_KEY": q.shape[1] // k.shape[1],
        "D": dim,
        "DIM": padded(dim),
        "ROWS": choice.rows,
        "COLS": choice.cols,
        "PRECISION": product_precision(q.dtype),
    }


def _strides(x: Tensor) -> tuple[int, int, tl.constexpr]:
    # A token's is a constant, as in training: it does not change with the input's length.
    batch, head, token = x.stride()[:3]
    return batch, head, tl.constexpr(token)


def _row_stride(x: Tensor) -> int:
    """From row to row; 0 where rows are alike."""
    return x.stride(0) if len(x) > 1 else 0


def _kind(q: Tensor, k: Tensor, v: Tensor, seen: Seen, sinks: Tensor | None) -> tuple:
    """All that a call's launches depend on beside addresses."""
    numbers = q.dtype, q.device, product_precision(q.dtype), None if sinks is None else sinks.dtype
    given = seen.first.shape, seen.text.shape, seen.scale, seen.softcap
    return q.shape, k.shape, q.stride(), k.stride(), v.stride(), numbers, given
