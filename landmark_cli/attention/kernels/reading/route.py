"""From "which blocks does a query read" to "which queries read a block": lists of pairs, block by block.

A pair is one query row of a key head and one of its k blocks, numbered row * K + j; rows count the queries of all heads
on the key head, head by head. Three small kernels: count each block's pairs, add the counts up, fill the lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import counts_of


@triton.jit
def distance_of(age, rank, near, ABSOLUTE: tl.constexpr):
    """Block slots from a selected block to the chunk's tail block; rank: how many of the selected ones are older."""
    if ABSOLUTE:
        return age
    else:
        return near - rank + (age > near).to(tl.int32)


@triton.jit
def scored_distance(age, near, ABSOLUTE: tl.constexpr):
    """Block slots from a block to the chunk's tail block while it is compared with others: see attention/rerank.py."""
    if ABSOLUTE:
        return age
    else:
        return tl.minimum(age, near + 1)


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity", "retrievable", "top_k"])
def count_kernel(AGES, COUNTERS, COUNT, SLOT, NUMBER, DISTANCE, OUTER_LOGIT, age_strides, tokens, batch, heads,
                 capacity, retrievable, top_k,
                 HEADS_PER_KEY: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr,
                 ABSOLUTE: tl.constexpr, SCORING: tl.constexpr):  # fmt: skip
    """For each pair: SLOT of its block in the ring (-1: none), its NUMBER in the block's list, DISTANCE to the block.

    COUNT (B, G, capacity) rises from 0 by each block's pairs. OUTER_LOGIT (B, H, T, K) becomes minus infinity where
    there is no block. AGES has strides (batch, head, token), its last dimension is dense.
    retrievable: most blocks to choose from. SCORING: the distance is that at which blocks are compared with others, not
    where they stand among the selected ones. Program (rows, key head).
    """
    key_row = tl.program_id(1)
    batch_row = key_row // heads
    start, blocks, _ = counts_of(COUNTERS, batch, batch_row)
    near = tl.minimum(tl.minimum(blocks, retrievable), top_k)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,), as all down to `at`
    token = row % tokens
    in_range = row < HEADS_PER_KEY * tokens
    real = in_range & (token >= start)
    head = (key_row % heads) * HEADS_PER_KEY + row // tokens
    at = tl.cast(batch_row, tl.int64) * age_strides[0] + head.to(tl.int64) * age_strides[1]
    at += token.to(tl.int64) * age_strides[2]
    j = tl.arange(0, K_PAD)  # (K_PAD,)
    # (ROWS, K_PAD), as all that follows but first_pair.
    age = tl.load(AGES + at[:, None] + j[None, :], mask=real[:, None] & (j < K)[None, :], other=0)
    if not SCORING:
        rank = tl.zeros([ROWS, K_PAD], tl.int32)
        for other in range(K):
            rank += (tl.load(AGES + at + other, mask=real, other=0)[:, None] > age).to(tl.int32)

    ok = age > 0
    slot = tl.where(ok, (blocks - age) % capacity, -1)
    pair = row[:, None] * K + j[None, :]
    first_pair = tl.cast(key_row, tl.int64) * HEADS_PER_KEY * tokens * K
    number = tl.atomic_add(COUNT + tl.cast(key_row, tl.int64) * capacity + slot, 1, mask=ok, sem="relaxed")
    mask = in_range[:, None] & (j < K)[None, :]
    tl.store(SLOT + first_pair + pair, slot, mask=mask)
    tl.store(NUMBER + first_pair + pair, number, mask=ok)
    if SCORING:
        tl.store(DISTANCE + first_pair + pair, scored_distance(age, near, ABSOLUTE), mask=ok)
    else:
        tl.store(DISTANCE + first_pair + pair, distance_of(age, rank, near, ABSOLUTE), mask=ok)
    tl.store(OUTER_LOGIT + first_pair + pair, float("-inf"), mask=mask & (age == 0))


@triton.jit(do_not_specialize=["capacity", "most_tiles"])
def scan_kernel(COUNT, FIRST, TILES, TOTAL, capacity, most_tiles, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """FIRST (B, G, capacity): where each block's list begins. TILES (B, G, most_tiles): the tiles of ROWS pairs that
    blocks are worked off in, slot + (tile in the block << 32), TOTAL (B, G) of them. Program (key head)."""
    key_row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)  # (SLOTS,), as all vectors below
    pairs = 0
    tiles = 0
    for first in range(0, capacity, SLOTS):
        at = key_row * capacity + first + slot
        count = tl.load(COUNT + at, mask=first + slot < capacity, other=0)
        tl.store(FIRST + at, pairs + tl.cumsum(count, 0) - count, mask=first + slot < capacity)
        needed = (count + ROWS - 1) // ROWS
        begin = key_row * most_tiles + tiles + tl.cumsum(needed, 0) - needed
        for part in range(tl.max(needed, 0)):
            tile = (first + slot).to(tl.int64) + (tl.cast(part, tl.int64) << 32)
            tl.store(TILES + begin + part, tile, mask=part < needed)
        pairs += tl.sum(count, 0)
        tiles += tl.sum(needed, 0)
    tl.store(TOTAL + key_row, tiles)


@triton.jit(do_not_specialize=["pairs", "capacity"])
def fill_kernel(SLOT, NUMBER, DISTANCE, FIRST, LIST, pairs, capacity, SIZE: tl.constexpr):
    """LIST (B, G, pairs): the blocks' pairs one after the other, pair + (distance << 32). Program (pairs, key head)."""
    key_row = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * SIZE + tl.arange(0, SIZE)  # (SIZE,), as all below
    at = key_row * pairs + pair
    slot = tl.load(SLOT + at, mask=pair < pairs, other=-1)
    ok = slot >= 0
    to = tl.load(FIRST + key_row * capacity + slot, mask=ok, other=0) + tl.load(NUMBER + at, mask=ok, other=0)
    distance = tl.load(DISTANCE + at, mask=ok, other=0)
    tl.store(LIST + key_row * pairs + to, pair.to(tl.int64) + (distance.to(tl.int64) << 32), mask=ok)
