"""Launching the kernels: grids, strides, and a workspace that stays below a bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configuration import Configuration, is_exact, padded
from ..common.repeat import Kept, Launch, addresses, launch, on_device
from ..common.tensors import empty_heads_last
from ..common.tiles import PACKED, PADDED, PLAIN, statistics_size
from .backward import key_gradient_kernel, query_gradient_kernel
from .configurations import choices
from .forward import forward_kernel

LOG2E = math.log2(math.e)

# The statistics of the backward kernels may take this many times the memory of q.
WORKSPACE = 1.6

# Query heads to work on at a time, so that their keys and values stay in the L2 cache, and rows that fill the GPU.
HEADS_IN_FLIGHT = 8
ROWS_IN_FLIGHT = 16384


class Layout(NamedTuple):
    """What landmark_attention says beside q, k and v.

    start, cu_seqlens: int32 on their device, or None; dropout_seed: one int64 there, or None without dropout.
    """

    block_size: int
    scale: float
    start: Tensor | None = None
    cu_seqlens: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None

    @property
    def kind(self) -> int:
        if self.cu_seqlens is not None:
            return PACKED.value
        return PLAIN.value if self.start is None else PADDED.value

    @property
    def bounds(self) -> Tensor | None:
        return self.start if self.cu_seqlens is None else self.cu_seqlens

    @property
    def documents(self) -> int:
        return 0 if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def tiles(self, rows: int, size: int) -> int:
        """Tiles of `size` that cover `rows` rows; packed documents never share one."""
        return triton.cdiv(rows, size) if self.cu_seqlens is None else rows // size + self.documents

    @property
    def key(self) -> tuple:
        """All that launches depend on."""
        return self.block_size, self.scale, self.kind, self.documents, self.dropout_p

    def dropout(self) -> tuple[int, float]:
        """(threshold under which a 24-bit random number drops a block, what the others are multiplied by)."""
        p = torch.tensor(self.dropout_p, dtype=torch.float32).item()
        return math.ceil(p * (1 << 24)), 1.0 / (1.0 - self.dropout_p)


@dataclass
class BackwardCall:
    """What backward calls of one kind have in common: parts to work on one after the other, the numbers of workspace
    that the largest needs, and, once they ran, the launches."""

    parts: list[tuple[int, int, int, int, int]]
    workspace: int
    launches: list[Launch] = field(default_factory=list)


_forward_calls: Kept = Kept()
_backward_calls: Kept = Kept()


def forget_calls() -> None:
    """After a change of configurations."""
    _forward_calls.clear()
    _backward_calls.clear()


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """(out (B, H, Tq, D), lse (B, H, Tq) float32). out lies in memory as (B, Tq, H, D), as the next layer wants it."""
    out = empty_heads_last(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if layout.cu_seqlens is not None:
        out.zero_()
        lse.fill_(-math.inf)
    key = _key(q, k, v, layout)
    at = addresses(q, k, v, out, lse, layout.bounds, layout.dropout_seed)
    earlier = _forward_calls.get(key)
    with on_device(q):
        if earlier is not None and at is not None:
            earlier.again(at)
        else:
            found = choices("forward", q, layout.block_size)
            done = found.run(lambda choice: launch_forward(q, k, v, out, lse, layout, choice))
            if done is not None and at is not None:
                _forward_calls.keep(key, done)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for the gradients of out and, where there is one, of lse."""
    dq, dk, dv = empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)
    if layout.bounds is not None:
        dq, dk, dv = dq.zero_(), dk.zero_(), dv.zero_()
    key = (*_key(q, k, v, layout), out.stride(), dout.stride(), dlse is None)
    call = _backward_calls.get(key) or _backward_calls.keep(key, BackwardCall(*backward_parts(q, k, layout.block_size)))
    statistics = q.new_empty(call.workspace, dtype=torch.float32)
    tensors = q, k, v, out, dout, lse, dlse, dq, dk, dv, statistics, layout.bounds, layout.dropout_seed
    at = addresses(*tensors)
    with on_device(q):
        if call.launches and at is not None:
            for done in call.launches:
                done.again(at)
        else:
            launches = list(launch_backward(tensors, layout, call.parts))
            if None not in launches and at is not None:
                call.launches = launches
    return dq, dk, dv


def launch_backward(tensors: tuple, layout: Layout, parts: list[tuple]) -> Iterator[Launch | None]:
    """Launch both backward kernels on one part after the other, as they are asked for."""
    q = tensors[0]
    query_choices, key_choices = (
        choices(kernel, q, layout.block_size) for kernel in ("query_gradient", "key_gradient")
    )
    for part in parts:
        yield query_choices.run(lambda choice, part=part: launch_query_gradient(tensors, layout, part, choice))
        yield key_choices.run(
            lambda choice, part=part: launch_key_gradient(tensors, layout, part, choice),
            repeatable=part[1] == q.shape[2],
        )


def launch_forward(q, k, v, out, lse, layout: Layout, choice: Configuration) -> Launch | None:
    """Launch the forward kernel in a configuration."""
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    tiles = layout.tiles(queries, choice.rows)
    tensors = q, k, v, out, lse, layout.bounds, layout.dropout_seed
    arguments = (
        _strides(q), _strides(k), _strides(v), _strides(out), layout.scale * LOG2E, queries, k.shape[2] - queries,
        layout.documents, tiles, batch * heads, heads, _heads_in_flight(queries, batch * heads, group),
        *layout.dropout(),
    )  # fmt: skip
    constants = {"GROUP": group, "DROPOUT": layout.dropout_seed is not None, **_constants(q, layout, choice)}
    return launch(forward_kernel, tiles * batch * heads, tensors, range(7), arguments, constants, choice)


def launch_query_gradient(tensors: tuple, layout: Layout, part: tuple, choice: Configuration) -> Launch | None:
    """Launch the first backward kernel on a part: (first and last row, first key head, key heads, plane)."""
    q, k, v, out, dout, _, _, dq, *_ = tensors
    first_row, last_row, first_head, key_heads, plane = part
    queries = q.shape[2]
    group = q.shape[1] // k.shape[1]
    tiles = layout.tiles(last_row - first_row, choice.rows)
    arguments = (
        _strides(q), _strides(k), _strides(v), _strides(out), _strides(dout), _strides(dq), layout.scale * LOG2E,
        layout.scale, queries, k.shape[2] - queries, first_row, last_row, layout.documents, tiles, first_head * group,
        key_heads * group, q.shape[1], _heads_in_flight(queries, key_heads * group, group), plane, *layout.dropout(),
    )  # fmt: skip
    constants = {"GROUP": group, "DROPOUT": layout.dropout_seed is not None, **_constants(q, layout, choice)}
    which = 0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12
    return launch(query_gradient_kernel, tiles * key_heads * group, tensors, which, arguments, constants, choice)


def launch_key_gradient(tensors: tuple, layout: Layout, part: tuple, choice: Configuration) -> Launch | None:
    """Launch the second backward kernel on the same part. It adds to dk and dv unless the part has the last row."""
    q, k, v, _, dout, _, _, _, dk, dv, *_ = tensors
    first_row, last_row, first_head, key_heads, plane = part
    queries = q.shape[2]
    offset = k.shape[2] - queries
    group = q.shape[1] // k.shape[1]
    tiles = layout.tiles(offset + last_row, layout.block_size) * triton.cdiv(layout.block_size, choice.cols)
    arguments = (
        _strides(q), _strides(k), _strides(v), _strides(dout), _strides(dk), _strides(dv), layout.scale * LOG2E,
        layout.scale, queries, offset, first_row, last_row, layout.documents, tiles, first_head, key_heads, k.shape[1],
        _heads_in_flight(queries, key_heads * group, group) // group, plane,
    )  # fmt: skip
    constants = {"GROUP": group, "ACCUMULATE": last_row < queries, **_constants(q, layout, choice)}
    which = 0, 1, 2, 4, 8, 9, 10, 11
    return launch(key_gradient_kernel, tiles * key_heads, tensors, which, arguments, constants, choice)


def backward_parts(q: Tensor, k: Tensor, block_size: int) -> tuple[list[tuple[int, int, int, int, int]], int]:
    """(parts of (first row, last row, first key head, key heads, plane), numbers of workspace for the largest).

    A part's statistics are heads x 3 x 4 planes. Its heads' last rows come first, since only they reach all keys: what
    comes after adds to their dk and dv.
    """
    batch, heads, queries, _ = q.shape
    key_heads, offset = batch * k.shape[1], k.shape[2] - queries
    head_step, row_step = work_groups(q, k, block_size)
    parts = []
    for first_head in range(0, key_heads, head_step):
        for first_row in reversed(range(0, queries, row_step)):
            last_row = min(first_row + row_step, queries)
            plane = statistics_size(last_row - first_row, offset + first_row, block_size) // 4
            parts.append((first_row, last_row, first_head, min(head_step, key_heads - first_head), plane))
    return parts, max(12 * (heads // k.shape[1]) * part[3] * part[4] for part in parts)


def work_groups(q: Tensor, k: Tensor, block_size: int) -> tuple[int, int]:
    """(key heads, query rows) that backward works on at a time, so that its statistics take at most WORKSPACE x q.

    Whole heads if one fits, of many a multiple of those that are in flight together, lest the last ones leave much of
    the GPU idle; else ranges of rows of one head, whose dk and dv are then added up in their own dtype.
    """
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    offset = k.shape[2] - queries
    bound = WORKSPACE * q.numel() * q.element_size()
    per_head = 12 * group * statistics_size(queries, offset, block_size)
    if per_head <= bound:
        rounds = triton.cdiv(batch * k.shape[1], int(bound // per_head))
        step, in_flight = triton.cdiv(batch * k.shape[1], rounds), max(1, HEADS_IN_FLIGHT // group)
        return step if rounds == 1 or step < in_flight else step // in_flight * in_flight, queries
    parts = math.ceil(per_head / bound)
    while True:
        row_step = triton.cdiv(queries, parts)
        row_step = triton.cdiv(row_step, 128) * 128 if row_step > 128 else triton.cdiv(row_step, 16) * 16
        starts = range(0, queries, row_step)
        largest = max(statistics_size(min(row_step, queries - at), offset + at, block_size) for at in starts)
        if 12 * group * largest <= bound or row_step == 16:
            return 1, row_step
        parts += 1


def _constants(q: Tensor, layout: Layout, choice: Configuration) -> dict:
    dim = q.shape[-1]
    return {
        "BLOCK": layout.block_size,
        "D": dim,
        "DIM": padded(dim),
        "ROWS": choice.rows,
        "COLS": choice.cols,
        "SPLIT": triton.cdiv(layout.block_size, choice.cols),
        "LAYOUT": layout.kind,
        "PRECISION": "tf32x3" if is_exact(q.dtype) else "tf32",
    }


def _heads_in_flight(queries: int, query_heads: int, group: int) -> int:
    """How many query heads to work on at a time: few enough for the L2 cache, enough to fill the GPU."""
    wanted = max(HEADS_IN_FLIGHT, ROWS_IN_FLIGHT // queries)
    return min(query_heads, triton.cdiv(wanted, group) * group)


def _strides(x: Tensor) -> tuple[int, int, tl.constexpr]:
    batch, head, token = x.stride()[:3]
    return batch, head, tl.constexpr(token)


def _key(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple:
    """All that a call's launches depend on beside addresses."""
    numbers = q.dtype, q.device, is_exact(q.dtype)
    return q.shape, k.shape, q.stride(), k.stride(), v.stride(), numbers, layout.key
