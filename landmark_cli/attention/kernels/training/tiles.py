"""Which query rows and which keys a program of the training kernels works on."""

from __future__ import annotations

import triton
import triton.language as tl

# How the blocks of a row are laid out: from its first key, from its first real key, or anew in each packed document.
PLAIN = tl.constexpr(0)
PADDED = tl.constexpr(1)
PACKED = tl.constexpr(2)


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
def query_rows(K, V, k_strides, v_strides, batch, head, query_heads, begin, row, row_end, offset, queries,
               HEADS_PER_KEY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """What a tile of query rows from `row` on works with: (its batch row and its head, in 64 bits; rows, (ROWS,), which
    of them there are, and their positions; dimensions, (DIM,); the keys, as softmax.attend_block takes them)."""
    rows = tl.arange(0, ROWS)  # (ROWS,), as row_ok and position
    row_ok = row + rows < row_end
    position = row + rows + (offset - begin)
    keys_left = queries + offset - begin
    dim = tl.arange(0, DIM)  # (DIM,)
    batch = batch.to(tl.int64)
    query_head = (head % query_heads).to(tl.int64)
    key_head = query_head // HEADS_PER_KEY
    k_base = K + batch * k_strides[0] + key_head * k_strides[1] + tl.cast(begin, tl.int64) * k_strides[2]
    v_base = V + batch * v_strides[0] + key_head * v_strides[1] + tl.cast(begin, tl.int64) * v_strides[2]
    keys = (k_base, v_base, k_strides[2], v_strides[2], keys_left, tl.arange(0, COLS), dim)
    return batch, query_head, rows, row_ok, position, dim, keys


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
