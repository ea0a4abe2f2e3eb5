"""Storing a chunk's keys and values in their blocks, and copying blocks that come from host memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_columns, load_parts, place_of, store_parts, turn


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity"])
def store_kernel(K, V, HOME, LANDMARK_KEYS, PLACE, COUNTERS, COS, SIN, STREAM_COS, STREAM_SIN, k_strides, v_strides,
                 tokens, batch, heads, capacity,
                 HALF: tl.constexpr, REST: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr,
                 D_PAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ABSOLUTE: tl.constexpr):  # fmt: skip
    """K and V (B, G, T, D) into HOME (B, G, capacity, 2, BLOCK, D), keys turned back to their offset in the block.

    Landmarks' keys go to LANDMARK_KEYS (B, G, capacity, D) too. PLACE, unless None: blocks begun anew lose their place
    in the pool. Program (tile of tokens, key head).
    """
    D: tl.constexpr = 2 * HALF + REST
    key_row = tl.program_id(1)
    batch_row = key_row // heads
    start, blocks, partial = place_of(COUNTERS, batch, batch_row)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = (token >= start) & (token < tokens)
    position = tl.maximum(token - start + partial, 0)
    later = position // BLOCK
    offset = position % BLOCK
    unit = tl.cast(key_row, tl.int64) * capacity + (blocks + later) % capacity

    head = (key_row % heads).to(tl.int64)
    row = tl.cast(batch_row, tl.int64)
    token = token.to(tl.int64)
    at_k = row * k_strides[0] + head * k_strides[1] + token * k_strides[2]
    at_v = row * v_strides[0] + head * v_strides[1] + token * v_strides[2]
    k = load_parts(K, at_k, real, HALF, REST, HALF_PAD, REST_PAD)
    turned = turn(k, COS, SIN, later[:, None], HALF, HALF_PAD, True)
    at = (unit * 2 * BLOCK + offset) * D
    store_parts(HOME, at, real, turned, HALF, REST, HALF_PAD, REST_PAD)
    dim = tl.arange(0, D_PAD)
    v = load_columns(V, at_v, real, dim, D)
    tl.store(HOME + BLOCK * D + at[:, None] + dim[None, :], v, mask=real[:, None] & (dim < D)[None, :])

    if ABSOLUTE:
        turned = turn(k, STREAM_COS, STREAM_SIN, batch_row, HALF, HALF_PAD)
    store_parts(LANDMARK_KEYS, unit * D, real & (offset == BLOCK - 1), turned, HALF, REST, HALF_PAD, REST_PAD)
    if PLACE is not None:
        tl.store(PLACE + unit, -1, mask=real & (offset == 0))


@triton.jit
def fetch_kernel(HOME, POOL, UNITS, PLACES, COUNT, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Copy the first COUNT of blocks UNITS at HOME to PLACES in the POOL; SIZE elements each. Program (block)."""
    index = tl.program_id(0)
    if index < tl.load(COUNT):
        source = HOME + tl.load(UNITS + index).to(tl.int64) * SIZE
        to = POOL + tl.load(PLACES + index).to(tl.int64) * SIZE
        for first in range(0, SIZE, STEP):
            at = first + tl.arange(0, STEP)
            tl.store(to + at, tl.load(source + at, mask=at < SIZE), mask=at < SIZE)
