"""Reading a whole window at once: from "which blocks does a query read" to "which queries read a block".

A pair is one query row of a key head and one of its K blocks, numbered row * K + j. Rows count the queries of all batch
rows and of the heads on the key head: (batch row * HEADS_PER_KEY + head) * tokens + token. The list of a block holds
its pairs in rising order, whatever order programs run in, so sums over a list repeat bit by bit: blocks are written
down pair by pair (`place_kernel`), sorted by a stable sort, and the sorted pairs get what is needed to read
(`list_kernel`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .route import distance_of


@triton.jit
def pair_rows(row, tokens, key_head, HEADS_PER_KEY: tl.constexpr):
    """(batch row, head, token) of query rows of a key head, (ROWS,) each."""
    rest = row // tokens
    return rest // HEADS_PER_KEY, key_head * HEADS_PER_KEY + rest % HEADS_PER_KEY, row % tokens


@triton.jit
def explored(age, AGES, at, j, row_number, earlier, real, SEED, threshold, top_k, K: tl.constexpr):
    """`age`, (ROWS, K_PAD), with some rows' last choice replaced by a random earlier block that they did not choose;
    and (which rows, (ROWS,), their new age). See ReadingWindow in attention/window.py."""
    seed = tl.load(SEED)
    zero = row_number * 0
    word, _, _, _ = tl.philox(seed, row_number, zero, zero, zero)  # (ROWS,), as all down to `new`
    other_word, _, _, _ = tl.philox(seed, row_number, zero + 1, zero, zero)
    which = real & (earlier > top_k) & ((word >> 8).to(tl.int32) < threshold)
    drawn = ((other_word >> 8).to(tl.int64) * (earlier - top_k).to(tl.int64) >> 24).to(tl.int32)
    # The drawn-th newest of what is not chosen: as many ages later as chosen ones are at or before it.
    new = drawn + 1
    for _ in range(K):
        chosen = tl.zeros_like(new)
        for other in range(K):
            chosen += (tl.load(AGES + at + other, mask=real, other=0) <= new).to(tl.int32)
        new = drawn + 1 + chosen
    return tl.where(which[:, None] & (j == K - 1)[None, :], new[:, None], age), which, new


@triton.jit(do_not_specialize=["tokens", "rows", "heads", "first_head", "blocks", "top_k", "threshold"])
def place_kernel(AGES, CHUNKS, CHUNK_OF, BLOCKS, SEED, TURN, KEY, OUTER_LOGIT, age_strides, tokens, rows, heads,
                 first_head, blocks, top_k, threshold,
                 HEADS_PER_KEY: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr,
                 BIAS: tl.constexpr, EXPLORE: tl.constexpr):  # fmt: skip
    """For each pair, in time order of a query's blocks: KEY, its block (`blocks`: none), less BIAS, and TURN, the block
    slots that its query is to be rotated by (-1: no block). OUTER_LOGIT becomes minus infinity where there is none.

    AGES has strides (key head, batch row, head on the key head, token) and a dense last dimension, 0 (at the end) for
    no block. CHUNKS, CHUNK_OF, BLOCKS: as in attention/window.py. heads: query heads of a batch row. Program (rows, key
    head, counted from first_head on).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,), as all down to `at`
    key_head = first_head + tl.program_id(1)
    batch_row, head, token = pair_rows(row, tokens, key_head, HEADS_PER_KEY)
    in_range = row < rows
    chunk = tl.load(CHUNK_OF + batch_row.to(tl.int64) * tokens + token, mask=in_range, other=-1)
    real = in_range & (chunk >= 0)
    earlier = tl.load(CHUNKS + chunk * 5 + 4, mask=real, other=0)
    last = tl.load(CHUNKS + chunk * 5 + 3, mask=real, other=0) + earlier
    near = tl.minimum(earlier, top_k)
    at = tl.program_id(1).to(tl.int64) * age_strides[0] + batch_row.to(tl.int64) * age_strides[1]
    at += (head - key_head * HEADS_PER_KEY).to(tl.int64) * age_strides[2] + token.to(tl.int64) * age_strides[3]
    j = tl.arange(0, K_PAD)  # (K_PAD,)
    # (ROWS, K_PAD), as all that follows but `swapped` and `new`.
    age = tl.load(AGES + at[:, None] + j[None, :], mask=real[:, None] & (j < K)[None, :], other=0)
    if EXPLORE:
        row_number = ((batch_row * heads + head) * tokens + token).to(tl.uint32)
        age, swapped, new = explored(age, AGES, at, j, row_number, earlier, real, SEED, threshold, top_k, K)
    rank = tl.zeros([ROWS, K_PAD], tl.int32)
    for other in range(K):
        other_age = tl.load(AGES + at + other, mask=real, other=0)
        if EXPLORE:
            other_age = tl.where(swapped & (other == K - 1), new, other_age)
        rank += (other_age[:, None] > age).to(tl.int32)

    ok = age > 0
    rank = tl.where(ok, rank, j[None, :])
    block = last[:, None] - age
    number = tl.load(BLOCKS + block * 3 + 2, mask=ok, other=0)
    turn = distance_of(age, rank, near[:, None], False) + number
    pair = (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * K + rank
    mask = in_range[:, None] & (j < K)[None, :]
    tl.store(KEY + pair, (tl.where(ok, block, blocks) - BIAS).to(KEY.dtype.element_ty), mask=mask)
    tl.store(TURN + pair, tl.where(ok, turn, -1).to(TURN.dtype.element_ty), mask=mask)
    tl.store(OUTER_LOGIT + pair, float("-inf"), mask=mask & (age == 0))


@triton.jit(do_not_specialize=["pairs"])
def list_kernel(ENTRIES, TURN, pairs, SIZE: tl.constexpr):
    """ENTRIES (key heads, pairs): sorted pairs, to which turn << 32 of each is added. Program (pairs, key head)."""
    number = tl.program_id(0) * SIZE + tl.arange(0, SIZE)  # (SIZE,), as all below
    ok = number < pairs
    base = tl.program_id(1).to(tl.int64) * pairs
    pair = tl.load(ENTRIES + base + number, mask=ok, other=0)
    turn = tl.load(TURN + base + pair, mask=ok, other=0)
    tl.store(ENTRIES + base + number, pair + (turn.to(tl.int64) << 32), mask=ok)


@triton.jit
def listed_block(ITEM_LIST, FIRST_ITEM, BOUNDS, BLOCKS, item, blocks, SIZE: tl.constexpr):
    """What an item of work is: SIZE pairs, or fewer at the end, of a block's list. ITEM_LIST: its list; lists are those
    of all blocks of one key head after another. FIRST_ITEM: each list's first item. BOUNDS (key heads, blocks + 1).

    Returns (key head, batch row, first token of the block, first pair, end of the list).
    """
    listed = tl.load(ITEM_LIST + item)
    key_head = listed // blocks
    block = listed % blocks
    bounds = BOUNDS + key_head * (blocks + 1) + block
    begin = tl.load(bounds) + (item - tl.load(FIRST_ITEM + listed)) * SIZE
    return key_head, tl.load(BLOCKS + block * 3), tl.load(BLOCKS + block * 3 + 1), begin, tl.load(bounds + 1)


@triton.jit
def listed_pairs(ENTRIES, number, ok, key_head, first_head, tokens, pairs, K: tl.constexpr,
                 HEADS_PER_KEY: tl.constexpr):  # fmt: skip
    """(pair, turn, head, token) of entries `number` of a key head, (ROWS,) each; key_head counts from first_head on."""
    entry = tl.load(ENTRIES + tl.cast(key_head, tl.int64) * pairs + number, mask=ok, other=0)
    pair = entry.to(tl.int32)
    _, head, token = pair_rows(pair // K, tokens, first_head + key_head, HEADS_PER_KEY)
    return pair, (entry >> 32).to(tl.int32), head, token
