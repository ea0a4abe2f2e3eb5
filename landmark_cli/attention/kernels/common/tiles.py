"""What the forward and backward kernels share: which rows a program works on, loads, dropout, where statistics lie.

Every index is a 32-bit number inside a tile and a 64-bit one between tiles, so that no tensor is too long.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How the blocks of a row are laid out: from its first key, from its first real key, or anew in each packed document.
PLAIN = tl.constexpr(0)
PADDED = tl.constexpr(1)
PACKED = tl.constexpr(2)

# Stands for minus infinity where a difference of two of them must not become NaN.
FLOOR = tl.constexpr(-1.0e30)


@triton.jit
def launch_order(tiles, heads, heads_in_flight):
    """(rank, head) of this program: ranks in rising order, for heads_in_flight heads at a time.

    Those heads' keys and values stay in the L2 cache together; heavy tiles get low ranks, so that light ones fill the
    multiprocessors at the end.
    """
    program = tl.program_id(0)
    first_head = program // (tiles * heads_in_flight) * heads_in_flight
    width = tl.minimum(heads_in_flight, heads - first_head)
    rest = program - first_head * tiles
    return rest // width, first_head + rest % width


@triton.jit
def packed_document(BOUNDS, documents, slot, shift, low, high, SIZE: tl.constexpr):
    """Which packed document a slot of the grid serves: (begin and end of the document, first row of its tile, its end).

    A tile never straddles two documents. Rows are low..high, keys are `shift` more. Document i, whose first row is e,
    owns the slots from (e - low) // SIZE + i on: at least as many as it has tiles, so some slots stay empty (their
    first row lies behind their end) and the grid needs no count of tiles: (high - low) // SIZE + documents is enough.
    """
    document = -1
    for first in range(0, documents, 64):
        index = first + tl.arange(0, 64)
        edge = tl.load(BOUNDS + index, mask=index < documents, other=0) - shift
        edge = tl.minimum(tl.maximum(edge, low), high) - low
        document += tl.sum(((edge // SIZE + index <= slot) & (index < documents)).to(tl.int32), 0)
    begin = tl.load(BOUNDS + document)
    end = tl.load(BOUNDS + document + 1)
    edge = tl.minimum(tl.maximum(begin - shift, low), high)
    tile = slot - (edge - low) // SIZE - document
    return begin, end, edge + tile * SIZE, tl.minimum(tl.maximum(end - shift, low), high)


@triton.jit
def query_tile(BOUNDS, documents, tile, batch, offset, first_row, last_row, ROWS: tl.constexpr, LAYOUT: tl.constexpr):
    """(key at which blocks begin to count, first row of the tile, end of its rows)."""
    begin = 0
    row = first_row + tile * ROWS
    end = last_row
    if LAYOUT == PADDED:
        begin = tl.maximum(tl.load(BOUNDS + batch), 0)
    if LAYOUT == PACKED:
        begin, _, row, end = packed_document(BOUNDS, documents, tile, offset, first_row, last_row, ROWS)
    return begin, row, end


@triton.jit
def block_tile(BOUNDS, documents, tile, batch, keys, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    """(key at which blocks begin to count, first key of the block after that, end of the keys of its document)."""
    begin = 0
    start = tile * BLOCK
    end = keys
    if LAYOUT == PADDED:
        begin = tl.maximum(tl.load(BOUNDS + batch), 0)
    if LAYOUT == PACKED:
        begin, end, start, _ = packed_document(BOUNDS, documents, tile, 0, 0, keys, BLOCK)
        start -= begin
    return begin, start, end


@triton.jit
def query_blocks(first, last, keys_left, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """Blocks of a tile of queries at positions first..last: (those before every row's own, all that it touches).

    The first kind needs no mask, so it also has to end early enough for SPAN keys to be loaded from its last block on.
    """
    whole = tl.maximum(first, 0) // BLOCK
    if SPAN != BLOCK:
        room = keys_left - SPAN
        whole = tl.where(room < 0, 0, tl.minimum(whole, room // BLOCK + 1))
    touched = tl.where(last < 0, 0, last // BLOCK + 1)
    return whole, touched


@triton.jit
def load_tile(base, first, stride, row, row_ok, dim, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows first + row of a matrix at base (row counts within the tile, first may be far away); outside it is 0."""
    pointers = base + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + dim[None, :])
    if MASKED:
        if D == dim.shape[0]:
            return tl.load(pointers, mask=row_ok[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=row_ok[:, None] & (dim < D)[None, :], other=0.0)
    else:
        if D == dim.shape[0]:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(dim < D)[None, :], other=0.0)


@triton.jit
def store_tile(base, first, stride, row, row_ok, dim, value, D: tl.constexpr):
    """Store the rows that load_tile would load."""
    pointers = base + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + dim[None, :])
    tl.store(pointers, value.to(base.dtype.element_ty), mask=row_ok[:, None] & (dim < D)[None, :])


@triton.jit
def dropout_factor(dropout, row_number, block):
    """Group dropout of one block for a tile of rows: 0, or 1 / (1 - p). See attention/dropout.py for the numbers."""
    seed, threshold, keep_scale = dropout
    zero = row_number * 0
    word, _, _, _ = tl.philox(seed, row_number, zero + block, zero, zero)
    return tl.where((word >> 8).to(tl.int32) >= threshold, keep_scale, 0.0)


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
