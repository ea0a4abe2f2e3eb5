"""Storing a chunk's keys and values in their blocks, and copying pages that come from host memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import cache_row, counts_of, load_columns, load_parts, rotate, store_parts


@triton.jit
def store_tokens(K, V, BLOCKS, LANDMARK_KEYS, PAGE_TABLE, COUNTERS, rotations, stream_rotation, k_strides, v_strides,
                 tile, key_row, tokens, batch, heads, capacity, PARTS: tl.constexpr, D_PAD: tl.constexpr,
                 BLOCK: tl.constexpr, ROWS: tl.constexpr, ABSOLUTE: tl.constexpr):  # fmt: skip
    """A tile of ROWS tokens of K and V (B, G, T, D), of a key head, into BLOCKS (B, G, capacity, 2, BLOCK, D), keys
    rotated back to their offset in the block.

    Landmarks' keys go to LANDMARK_KEYS (B, G, capacity, D) too. PAGE_TABLE, unless None: blocks begun anew lose their
    frame in the pool.
    """
    D: tl.constexpr = 2 * PARTS[0] + PARTS[1]
    batch_row = key_row // heads
    start, blocks, tail = counts_of(COUNTERS, batch, batch_row)
    token = tile * ROWS + tl.arange(0, ROWS)  # (ROWS,), as all down to `page`
    real = (token >= start) & (token < tokens)
    position = tl.maximum(token - start + tail, 0)
    later = position // BLOCK
    offset = position % BLOCK
    cache_key_row = cache_row(COUNTERS, batch, batch_row) * heads + key_row % heads
    page = tl.cast(cache_key_row, tl.int64) * capacity + (blocks + later) % capacity

    head = (key_row % heads).to(tl.int64)
    row = tl.cast(batch_row, tl.int64)
    token = token.to(tl.int64)
    at_k = row * k_strides[0] + head * k_strides[1] + token * k_strides[2]  # (ROWS,), as at_v and at
    at_v = row * v_strides[0] + head * v_strides[1] + token * v_strides[2]
    k = load_parts(K, at_k, real, PARTS)
    rotated = rotate(k, rotations, later[:, None], PARTS, True)
    at = (page * 2 * BLOCK + offset) * D
    store_parts(BLOCKS, at, real, rotated, PARTS)
    dim = tl.arange(0, D_PAD)  # (D_PAD,)
    v = load_columns(V, at_v, real, dim, D)  # (ROWS, D_PAD)
    tl.store(BLOCKS + BLOCK * D + at[:, None] + dim[None, :], v, mask=real[:, None] & (dim < D)[None, :])

    if ABSOLUTE:
        rotated = rotate(k, stream_rotation, batch_row, PARTS)
    store_parts(LANDMARK_KEYS, page * D, real & (offset == BLOCK - 1), rotated, PARTS)
    if PAGE_TABLE is not None:
        tl.store(PAGE_TABLE + page, -1, mask=real & (offset == 0))


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity"])
def store_kernel(K, V, BLOCKS, LANDMARK_KEYS, PAGE_TABLE, COUNTERS, rotations, stream_rotation, k_strides, v_strides,
                 tokens, batch, heads, capacity,
                 PARTS: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
                 ABSOLUTE: tl.constexpr):  # fmt: skip
    """Program (tile of tokens, key head) of `store_tokens`."""
    store_tokens(K, V, BLOCKS, LANDMARK_KEYS, PAGE_TABLE, COUNTERS, rotations, stream_rotation, k_strides, v_strides,
                 tl.program_id(0), tl.program_id(1), tokens, batch, heads, capacity, PARTS, D_PAD, BLOCK, ROWS,
                 ABSOLUTE)  # fmt: skip


@triton.jit
def fetch_kernel(BLOCKS, POOL, PAGES, FRAMES, COUNT, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Copy the first COUNT of PAGES in BLOCKS to FRAMES of the POOL; SIZE numbers each. Program (page)."""
    index = tl.program_id(0)
    if index < tl.load(COUNT):
        source = BLOCKS + tl.load(PAGES + index).to(tl.int64) * SIZE
        to = POOL + tl.load(FRAMES + index).to(tl.int64) * SIZE
        for first in range(0, SIZE, STEP):
            at = first + tl.arange(0, STEP)  # (STEP,)
            tl.store(to + at, tl.load(source + at, mask=at < SIZE), mask=at < SIZE)
