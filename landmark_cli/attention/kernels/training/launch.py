"""Launching the training kernels: grids, strides, parts of backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configuration import Configuration, padded, product_precision
from ..common.launch import HEADS_IN_FLIGHT, Launch, LaunchCache, launch
from ..common.operands import operand
from ..common.sinks import sink_gradient
from ..common.statistics import Part, backward_parts
from ..common.tensors import empty_heads_last
from .backward import key_gradient_kernel, query_gradient_kernel
from .configurations import choices
from .forward import forward_kernel
from .layout import Layout

# Query rows that fill the GPU.
ROWS_IN_FLIGHT = 16384

FORWARD_CALLS, BACKWARD_CALLS = LaunchCache(), LaunchCache()


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out (B, H, Tq, D), lse (B, H, Tq) float32) of q (B, H, Tq, D) and k, v (B, G, Tk, D), any strides.

    sinks: (H,) logits of attention sinks. out lies in memory as (B, Tq, H, D), as the next layer wants it.
    """
    dtype = q.dtype
    q, k, v = (operand(x) for x in (q, k, v))
    sinks = None if sinks is None else operand(sinks)
    out = empty_heads_last(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if layout.cu_seqlens is not None:
        out.zero_()
        lse.copy_(torch.tensor(-math.inf) if sinks is None else sinks[:, None])
    tensors = q, k, v, out, lse, layout.bounds, layout.dropout_seed, sinks
    kind = _kind(q, k, v, layout, sinks)
    if not FORWARD_CALLS.repeat(kind, tensors):
        found = choices("forward", q, layout.block_size)
        run = functools.partial(launch_forward, tensors, layout)
        FORWARD_CALLS.make(kind, tensors, lambda: [found.run(run)])
    return out.to(dtype), lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv and, where there are sinks, theirs) for the gradients of out and, where there is one, of lse."""
    dtype = q.dtype
    dout, q, k, v, out = (operand(x) for x in (dout, q, k, v, out))
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)
    if layout.bounds is not None:
        dq, dk, dv = dq.zero_(), dk.zero_(), dv.zero_()
    parts, workspace = backward_parts(q, k, layout.block_size)
    statistics = q.new_empty(workspace, dtype=torch.float32)
    delta = None if sinks is None else torch.zeros_like(lse)
    tensors = q, k, v, out, dout, lse, dlse, dq, dk, dv, statistics, layout.bounds, layout.dropout_seed, delta
    kind = (*_kind(q, k, v, layout, sinks), out.stride(), dout.stride(), dlse is None)
    if not BACKWARD_CALLS.repeat(kind, tensors):
        BACKWARD_CALLS.make(kind, tensors, lambda: launch_backward(tensors, layout, parts))
    dsinks = None if sinks is None else sink_gradient(sinks, lse, delta)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dsinks


def launch_backward(tensors: tuple, layout: Layout, parts: list[Part]) -> Iterator[Launch | None]:
    """Launch both backward kernels on one part after the other, as they are asked for."""
    q = tensors[0]
    query_choices, key_choices = (
        choices(kernel, q, layout.block_size) for kernel in ("query_gradient", "key_gradient")
    )
    for part in parts:
        yield query_choices.run(lambda choice, part=part: launch_query_gradient(tensors, layout, part, choice))
        yield key_choices.run(
            lambda choice, part=part: launch_key_gradient(tensors, layout, part, choice),
            repeatable=part.last_row == q.shape[2],
        )


def launch_forward(tensors: tuple, layout: Layout, choice: Configuration) -> Launch | None:
    """Launch the forward kernel in a configuration."""
    q, k, v, out, *_ = tensors
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    tiles = layout.tiles(queries, choice.rows)
    arguments = (
        _strides(q), _strides(k), _strides(v), _strides(out), layout.scaling, queries,
        k.shape[2] - queries, layout.documents, tiles, batch * heads, heads,
        _heads_in_flight(queries, batch * heads, group), *layout.dropout(),
    )  # fmt: skip
    constants = _constants(q, group, layout, choice) | _weighting(layout)
    return launch(
        forward_kernel, tiles * batch * heads, tensors, range(8), arguments, constants, choice.launch_options()
    )


def launch_query_gradient(tensors: tuple, layout: Layout, part: Part, choice: Configuration) -> Launch | None:
    """Launch the first backward kernel on a part."""
    q, k, v, out, dout, _, _, dq, *_ = tensors
    first_row, last_row, first_head, key_heads, plane = part
    queries = q.shape[2]
    group = q.shape[1] // k.shape[1]
    tiles = layout.tiles(last_row - first_row, choice.rows)
    arguments = (
        _strides(q), _strides(k), _strides(v), _strides(out), _strides(dout), _strides(dq), layout.scaling,
        layout.scale, queries, k.shape[2] - queries, first_row, last_row, layout.documents, tiles, first_head * group,
        key_heads * group, q.shape[1], _heads_in_flight(queries, key_heads * group, group), plane, *layout.dropout(),
    )  # fmt: skip
    constants = _constants(q, group, layout, choice) | _weighting(layout)
    which = 0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13
    programs = tiles * key_heads * group
    return launch(query_gradient_kernel, programs, tensors, which, arguments, constants, choice.launch_options())


def launch_key_gradient(tensors: tuple, layout: Layout, part: Part, choice: Configuration) -> Launch | None:
    """Launch the second backward kernel on the same part. It adds to dk and dv unless the part has the last row."""
    q, k, v, _, dout, _, _, _, dk, dv, *_ = tensors
    first_row, last_row, first_head, key_heads, plane = part
    queries = q.shape[2]
    offset = k.shape[2] - queries
    group = q.shape[1] // k.shape[1]
    tiles = layout.tiles(offset + last_row, layout.block_size) * triton.cdiv(layout.block_size, choice.cols)
    arguments = (
        _strides(q), _strides(k), _strides(v), _strides(dout), _strides(dk), _strides(dv), layout.scaling,
        layout.scale, queries, offset, first_row, last_row, layout.documents, tiles, first_head, key_heads, k.shape[1],
        _heads_in_flight(queries, key_heads * group, group) // group, plane,
    )  # fmt: skip
    constants = _constants(q, group, layout, choice) | {"ACCUMULATE": last_row < queries}
    which = 0, 1, 2, 4, 8, 9, 10, 11
    programs = tiles * key_heads
    return launch(key_gradient_kernel, programs, tensors, which, arguments, constants, choice.launch_options())


def _constants(q: Tensor, group: int, layout: Layout, choice: Configuration) -> dict:
    dim = q.shape[-1]
    return {
        "HEADS_PER_KEY": group,
        "BLOCK": layout.block_size,
        "D": dim,
        "DIM": padded(dim),
        "ROWS": choice.rows,
        "COLS": choice.cols,
        "KEY_TILES": triton.cdiv(layout.block_size, choice.cols),
        "LAYOUT": layout.kind,
        "PRECISION": product_precision(q.dtype),
    }


def _weighting(layout: Layout) -> dict:
    """What the kernels that go by rows have to know of softmaxes; by keys all are the same."""
    return {"DROPOUT": layout.dropout_seed is not None, "JOINT": layout.joint}


def _heads_in_flight(queries: int, query_heads: int, group: int) -> int:
    """How many query heads to work on at a time: few enough for the L2 cache, enough to fill the GPU."""
    wanted = max(HEADS_IN_FLIGHT, ROWS_IN_FLIGHT // queries)
    return min(query_heads, triton.cdiv(wanted, group) * group)


def _strides(x: Tensor) -> tuple[int, int, tl.constexpr]:
    batch, head, token = x.stride()[:3]
    return batch, head, tl.constexpr(token)


def _kind(q: Tensor, k: Tensor, v: Tensor, layout: Layout, sinks: Tensor | None) -> tuple:
    """All that a call's launches depend on beside addresses."""
    numbers = q.dtype, q.device, product_precision(q.dtype)
    sinks_dtype = None if sinks is None else sinks.dtype
    return q.shape, k.shape, q.stride(), k.stride(), v.stride(), numbers, layout.key, sinks_dtype
