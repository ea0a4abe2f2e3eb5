"""What the first backward kernel of a training step leaves for the second: where it lies, and how much there may be.

For every query row and every block at or before it these are three float32 numbers; training/backward.py says which.
Backward works on some key heads and rows at a time, a part, so that they take little memory: a part's statistics are
(query heads x 3, 4 x plane) numbers, one row for each kind of number.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import HEADS_IN_FLIGHT

# The statistics of a part may take this many times the memory of q.
WORKSPACE = 1.6


@triton.jit
def statistics_index(block, rows, offset, BLOCK: tl.constexpr):
    """Where a block's statistics begin, less its first row: add the row to find a row's. Always a multiple of 4.

    Only rows at or after the block have any, so block after block takes the rows from block * BLOCK - offset on, both
    numbers rounded so that every start is a multiple of 4 and loads can be wide.
    """
    rows = (rows + 3) // 4
    offset = (offset + 3) // 4
    step = BLOCK // 4
    if step == 0:
        return block * rows * 4
    else:
        whole = offset // step + 1
        later = tl.maximum(block - whole, 0)
        index = tl.minimum(block, whole) * rows
        index += later * (rows + offset) - step * (whole * later + later * (later - 1) // 2)
        return (index - tl.maximum(block * step - offset, 0)) * 4


def statistics_size(rows: int, offset: int, block_size: int) -> int:
    """Entries a head needs for `rows` queries behind `offset` keys: where a block after the last would begin."""
    blocks = triton.cdiv(offset + rows, block_size)
    rows, offset, step = triton.cdiv(rows, 4), triton.cdiv(offset, 4), block_size // 4
    if step == 0:
        return blocks * rows * 4
    later = max(0, blocks - offset // step - 1)
    whole = blocks - later
    return (whole * rows + later * (rows + offset) - step * (whole * later + later * (later - 1) // 2)) * 4


class Part(NamedTuple):
    """What backward works on at a time: query rows first_row..last_row of key_heads key heads from first_head on."""

    first_row: int
    last_row: int
    first_head: int
    key_heads: int
    plane: int


def backward_parts(q: Tensor, k: Tensor, block_size: int) -> tuple[list[Part], int]:
    """The parts that backward works on, one after the other, and the float32 numbers that the largest one's statistics
    take. q: (B, H, Tq, D); k: (B, G, Tk, D)."""
    return _backward_parts(q.shape, k.shape, block_size, usual_bound(q))


def usual_bound(q: Tensor) -> int:
    """Bytes that a part's statistics may take, by the memory of q."""
    return int(WORKSPACE * q.numel() * q.element_size())


@functools.lru_cache(maxsize=1024)
def _backward_parts(q_shape: torch.Size, k_shape: torch.Size, block_size: int, bound: int) -> tuple[list[Part], int]:
    return split(q_shape, k_shape, block_size, *part_size(q_shape, k_shape, block_size, bound))


def split(
    q_shape: torch.Size, k_shape: torch.Size, block_size: int, head_step: int, row_step: int
) -> tuple[list[Part], int]:
    """`backward_parts`, of so many key heads and query rows each.

    Of the same heads the last rows come first, since only they reach all keys: what comes after adds to dk and dv.
    """
    batch, heads, queries, _ = q_shape
    key_heads, offset = batch * k_shape[1], k_shape[2] - queries
    parts = []
    for first_head in range(0, key_heads, head_step):
        for first_row in reversed(range(0, queries, row_step)):
            last_row = min(first_row + row_step, queries)
            plane = statistics_size(last_row - first_row, offset + first_row, block_size) // 4
            parts.append(Part(first_row, last_row, first_head, min(head_step, key_heads - first_head), plane))
    return parts, max(12 * (heads // k_shape[1]) * part.key_heads * part.plane for part in parts)


def head_bytes(q_shape: torch.Size, k_shape: torch.Size, block_size: int) -> int:
    """Bytes that the statistics of one key head take."""
    return 12 * (q_shape[1] // k_shape[1]) * statistics_size(q_shape[2], k_shape[2] - q_shape[2], block_size)


def part_size(q_shape: torch.Size, k_shape: torch.Size, block_size: int, bound: int) -> tuple[int, int]:
    """(key heads, query rows) of a part, whose statistics take at most `bound` bytes.

    Whole heads if one fits, of many a multiple of those that are in flight together, lest the last ones leave much of
    the GPU idle; else ranges of rows of one head, whose dk and dv are then added up in their own dtype.
    """
    batch, heads, queries, _ = q_shape
    group = heads // k_shape[1]
    offset = k_shape[2] - queries
    per_head = head_bytes(q_shape, k_shape, block_size)
    if per_head <= bound:
        rounds = triton.cdiv(batch * k_shape[1], bound // per_head)
        step, in_flight = triton.cdiv(batch * k_shape[1], rounds), max(1, HEADS_IN_FLIGHT // group)
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
