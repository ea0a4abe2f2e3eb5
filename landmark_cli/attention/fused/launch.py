"""Launching the kernels: grids, strides, and a workspace that stays below a bound."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward import key_gradient_kernel, query_gradient_kernel
from .configurations import Choices, Configuration, choices, is_exact
from .forward import forward_kernel
from .tiles import PACKED, PADDED, PLAIN, statistics_size

LOG2E = math.log2(math.e)

# The statistics of the backward kernels may take this many times the memory of q.
WORKSPACE = 1.6

# Query heads to work on at a time, so that their keys and values stay in the L2 cache, and rows that fill the GPU.
HEADS_IN_FLIGHT = 8
ROWS_IN_FLIGHT = 16384


@dataclass(frozen=True)
class Layout:
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

    def dropout(self) -> tuple[int, float]:
        """(threshold under which a 24-bit random number drops a block, what the others are multiplied by)."""
        p = torch.tensor(self.dropout_p, dtype=torch.float32).item()
        return math.ceil(p * (1 << 24)), 1.0 / (1.0 - self.dropout_p)


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, choice: Configuration | None = None):
    """(out (B, H, Tq, D), lse (B, H, Tq) float32). out lies in memory as (B, Tq, H, D), as the next layer wants it."""
    batch, heads, queries, dim = q.shape
    group = heads // k.shape[1]
    out = empty_heads_last(q)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if layout.kind == PACKED.value:
        out.zero_()
        lse.fill_(-math.inf)

    def launch(choice: Configuration) -> None:
        tiles = layout.tiles(queries, choice.rows)
        forward_kernel[(tiles * batch * heads,)](
            q, k, v, out, lse, layout.bounds, layout.dropout_seed, _strides(q), _strides(k), _strides(v), _strides(out),
            layout.scale * LOG2E, queries, k.shape[2] - queries, layout.documents, tiles, batch * heads, heads,
            _heads_in_flight(queries, batch * heads, group), *layout.dropout(),
            GROUP=group, DROPOUT=layout.dropout_seed is not None, **_constants(q, layout, choice),
            **choice.launch_options(),
        )  # fmt: skip

    with _on_device(q):
        (Choices([choice]) if choice else choices("forward", q, layout.block_size)).run(launch)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, *,
    query_choice: Configuration | None = None, key_choice: Configuration | None = None,
):  # fmt: skip
    """(dq, dk, dv) for the gradients of out and, where there is one, of lse."""
    batch, heads, queries, dim = q.shape
    group = heads // k.shape[1]
    keys = k.shape[2]
    offset = keys - queries
    block_size = layout.block_size
    fresh = empty_heads_last if layout.bounds is None else lambda x: empty_heads_last(x).zero_()
    dq, dk, dv = fresh(q), fresh(k), fresh(v)
    query_choices = Choices([query_choice]) if query_choice else choices("query_gradient", q, block_size)
    key_choices = Choices([key_choice]) if key_choice else choices("key_gradient", q, block_size)
    head_step, row_step = work_groups(q, k, block_size)
    for first_head in range(0, batch * k.shape[1], head_step):
        key_heads = min(head_step, batch * k.shape[1] - first_head)
        # From the last rows on, since only they reach all keys: what comes after adds to their dk and dv.
        for first_row in reversed(range(0, queries, row_step)):
            last_row = min(first_row + row_step, queries)
            plane = statistics_size(last_row - first_row, offset + first_row, block_size)
            statistics = torch.empty(key_heads * group * 3 * plane, dtype=torch.float32, device=q.device)
            part = first_row, last_row, first_head, key_heads, plane // 4
            with _on_device(q):
                run = functools.partial(query_gradient, dout, dlse, q, k, v, out, lse, dq, statistics, part, layout)
                query_choices.run(run)
                run = functools.partial(key_gradient, dout, q, k, v, dk, dv, statistics, part, layout)
                key_choices.run(run, repeatable=last_row == queries)
            del statistics
    return dq, dk, dv


def query_gradient(dout, dlse, q, k, v, out, lse, dq, statistics, part, layout, choice):
    """Launch the first backward kernel on a part: (first and last row, first key head, key heads, plane)."""
    first_row, last_row, first_head, key_heads, plane = part
    queries = q.shape[2]
    group = q.shape[1] // k.shape[1]
    tiles = layout.tiles(last_row - first_row, choice.rows)
    query_gradient_kernel[(tiles * key_heads * group,)](
        q, k, v, out, dout, lse, dlse, dq, statistics, layout.bounds, layout.dropout_seed, _strides(q), _strides(k),
        _strides(v), _strides(out), _strides(dout), _strides(dq), layout.scale * LOG2E, layout.scale, queries,
        k.shape[2] - queries, first_row, last_row, layout.documents, tiles, first_head * group, key_heads * group,
        q.shape[1], _heads_in_flight(queries, key_heads * group, group), plane, *layout.dropout(),
        GROUP=group, DROPOUT=layout.dropout_seed is not None, **_constants(q, layout, choice),
        **choice.launch_options(),
    )  # fmt: skip


def key_gradient(dout, q, k, v, dk, dv, statistics, part, layout, choice):
    """Launch the second backward kernel on the same part. It adds to dk and dv unless the part has the last row."""
    first_row, last_row, first_head, key_heads, plane = part
    queries = q.shape[2]
    offset = k.shape[2] - queries
    group = q.shape[1] // k.shape[1]
    tiles = layout.tiles(offset + last_row, layout.block_size) * triton.cdiv(layout.block_size, choice.cols)
    key_gradient_kernel[(tiles * key_heads,)](
        q, k, v, dout, dk, dv, statistics, layout.bounds, _strides(q), _strides(k), _strides(v), _strides(dout),
        _strides(dk), _strides(dv), layout.scale * LOG2E, layout.scale, queries, offset, first_row, last_row,
        layout.documents, tiles, first_head, key_heads, k.shape[1],
        _heads_in_flight(queries, key_heads * group, group) // group, plane,
        GROUP=group, **_constants(q, layout, choice), ACCUMULATE=last_row < queries, **choice.launch_options(),
    )  # fmt: skip


def work_groups(q: Tensor, k: Tensor, block_size: int) -> tuple[int, int]:
    """(key heads, query rows) that backward works on at a time, so that its statistics take at most WORKSPACE x q.

    Whole heads if one fits; else ranges of rows of one head, whose dk and dv are then added up in their own dtype.
    """
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    offset = k.shape[2] - queries
    bound = WORKSPACE * q.numel() * q.element_size()
    per_head = 12 * group * statistics_size(queries, offset, block_size)
    if per_head <= bound:
        rounds = triton.cdiv(batch * k.shape[1], int(bound // per_head))
        return triton.cdiv(batch * k.shape[1], rounds), queries
    parts = math.ceil(per_head / bound)
    while True:
        row_step = triton.cdiv(queries, parts)
        row_step = triton.cdiv(row_step, 128) * 128 if row_step > 128 else triton.cdiv(row_step, 16) * 16
        starts = range(0, queries, row_step)
        largest = max(statistics_size(min(row_step, queries - at), offset + at, block_size) for at in starts)
        if 12 * group * largest <= bound or row_step == 16:
            return 1, row_step
        parts += 1


def empty_heads_last(x: Tensor) -> Tensor:
    """An empty (B, H, T, D) like x that lies in memory as (B, T, H, D)."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _constants(q: Tensor, layout: Layout, choice: Configuration) -> dict:
    dim = q.shape[-1]
    return {
        "BLOCK": layout.block_size,
        "D": dim,
        "DIM": max(16, triton.next_power_of_2(dim)),
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


def _on_device(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
