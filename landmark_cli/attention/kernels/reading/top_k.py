"""Choosing blocks: every query scores all landmarks and keeps the best k, without writing the scores.

Blocks are known by their age (1: the newest complete one). Tiles of landmarks come newest first, so a running list of
the best that only a strictly better score enters gives equal scores to the newer block. Scores are equal where they are
the same number (of 16-bit queries and keys: where they are after rounding down to 15 bits or more, far finer than such
keys are), and far blocks that share a landmark key have one score, for all read the key of the newest of them.

Source: arXiv 2305.16300, section 3.2; selections shared by heads or tokens: its section 4.1 and appendix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.logits import logits_of
from .parts import cache_row, counts_of, dot, load_parts, query_rows, rotate, sum_products

NO_SCORE = tl.constexpr(float("-inf"))


@triton.jit
def ordered(score):
    """Float32 as int32 in the same order."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def numbered(score, age):
    """One int64 number of a score and an age, by which the better score comes first, and of equal ones (0 and -0 too)
    the newer block."""
    return (ordered(score + 0.0).to(tl.int64) << 32) | (2147483647 - age).to(tl.int64)


@triton.jit
def rounded(number, COLS: tl.constexpr):
    """The score that `ordered` made an integer of, without the bits of a column of COLS."""
    bits = number & -COLS
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def sortable(score, column, EXACT: tl.constexpr):
    """What take_top works on, (ROWS, COLS): scores, or (faster) integers of their upper bits and the column below."""
    COLS: tl.constexpr = column.shape[0]
    if EXACT:
        return score
    else:
        return (ordered(score) & -COLS) | (COLS - 1 - column[None, :])


@triton.jit
def take_top(tile, column, EXACT: tl.constexpr):
    """Each row's best score and its column, (ROWS,) each, the first of equal ones; and the tile without them."""
    COLS: tl.constexpr = column.shape[0]
    top = tl.max(tile, 1)  # (ROWS,)
    if EXACT:
        found = tl.min(tl.where(tile == top[:, None], column[None, :], COLS - 1), 1)  # (ROWS,)
        return top, found, tl.where(column[None, :] == found[:, None], NO_SCORE, tile)
    else:
        # What is taken becomes the lowest integer, which read as a score is no number: it beats nothing.
        return rounded(top, COLS), COLS - 1 - (top & (COLS - 1)), tl.where(tile == top[:, None], -2147483648, tile)


@triton.jit
def insert(scores, ages, score, age):
    """Put each row's new score into its list, which falls; the last one drops out. All are (ROWS,)."""
    new_scores = ()
    new_ages = ()
    for j in tl.static_range(len(scores)):
        better = score > scores[j]
        new_scores = new_scores + (tl.where(better, score, scores[j]),)
        new_ages = new_ages + (tl.where(better, age, ages[j]),)
        score, age = tl.where(better, scores[j], score), tl.where(better, ages[j], age)
    return new_scores, new_ages


@triton.jit
def keep_best(scores, ages, tile, first_age, column, EXACT: tl.constexpr):
    """Bring a tile of scores, (ROWS, COLS), whose columns have ages first_age, .., into the running lists."""
    tile = sortable(tile, column, EXACT)
    score, found, tile = take_top(tile, column, EXACT)
    while tl.max((score > scores[len(scores) - 1]).to(tl.int32), 0) > 0:
        scores, ages = insert(scores, ages, score, first_age + found)
        score, found, tile = take_top(tile, column, EXACT)
    return scores, ages


@triton.jit
def after(tile, first_age, column, score, age, EXACT: tl.constexpr):
    """Strike out of a tile of scores, (ROWS, COLS), what an earlier pass kept: all up to a row's last (score, age)."""
    COLS: tl.constexpr = column.shape[0]
    if not EXACT:
        # As the lists know a score.
        tile = rounded(ordered(tile), COLS)
    older = (first_age + column)[None, :] > age[:, None]  # (ROWS, COLS)
    return tl.where((tile < score[:, None]) | ((tile == score[:, None]) & older), tile, NO_SCORE)


@triton.jit
def landmark_scores(q, LANDMARK_KEYS, rotations, first_age, column, key_row, blocks, cached, near, capacity, one_key,
                    scaling, PARTS: tl.constexpr, WITH_NEAR: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores of the blocks of ages first_age + column, (ROWS, COLS), minus infinity where there is no such block.

    q, in parts, stands at the distance of far blocks. WITH_NEAR: the tile may hold some of the last `near` blocks,
    which are scored at their true distance: their keys are rotated by the difference. one_key, 1 or 0: whether far
    blocks share a landmark key. scaling: see common/logits.py.
    """
    age = first_age + column  # (COLS,), as ok and slot
    ok = age <= cached
    slot = blocks % capacity - tl.where(one_key != 0, tl.minimum(age, near + 1), age)
    slot = tl.where(ok, tl.where(slot < 0, slot + capacity, slot), 0)
    D: tl.constexpr = 2 * PARTS[0] + PARTS[1]
    base = LANDMARK_KEYS + tl.cast(key_row, tl.int64) * capacity * D
    k = load_parts(base, slot.to(tl.int64) * D, ok, PARTS)
    if WITH_NEAR:
        k = rotate(k, rotations, tl.maximum(near + 1 - age, 0)[:, None], PARTS)
    if q[0].shape[0] == 1:
        # The matrix unit would work on 16 rows.
        s = sum_products(q, k)[None, :]
    else:
        s = dot(q, k, PRECISION)
    return tl.where(ok[None, :], logits_of(s, scaling), NO_SCORE)


@triton.jit
def far_query(Q, rotations, stream_rotation, offset, real, batch_row, near, PARTS: tl.constexpr,
              ABSOLUTE: tl.constexpr):  # fmt: skip
    """Queries, in parts, rotated to the distance of far blocks or, with absolute positions, to those in the stream."""
    q = load_parts(Q, offset, real, PARTS)
    if ABSOLUTE:
        return rotate(q, stream_rotation, batch_row, PARTS)
    else:
        return rotate(q, rotations, near + 1, PARTS)


@triton.jit
def best_blocks(q, LANDMARK_KEYS, rotations, key_row, blocks, cached, near, capacity, one_key, scaling, real, last,
                column, PARTS: tl.constexpr, K: tl.constexpr, LATER: tl.constexpr, ABSOLUTE: tl.constexpr,
                EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores and ages of the K best blocks of a tile of queries: K tiles (ROWS,) of each, from the best one on.

    q, in parts, as far_query gives; real: (ROWS,). LATER: only of what comes after `last`, the score and the age,
    (ROWS,) each, of the worst block of an earlier pass. The rest as in landmark_scores.
    """
    ROWS: tl.constexpr = q[0].shape[0]
    COLS: tl.constexpr = column.shape[0]
    # The running lists: K tiles (ROWS,) each.
    scores = (tl.full([ROWS], NO_SCORE, tl.float32),) * K
    ages = (tl.zeros([ROWS], tl.int32),) * K
    # A tile of padding looks at nothing.
    tiles = tl.where(tl.max(real.to(tl.int32), 0) > 0, tl.cdiv(cached, COLS), 0)
    if tiles > 0:
        s = landmark_scores(q, LANDMARK_KEYS, rotations, 1, column, key_row, blocks, cached, near, capacity, one_key,
                            scaling, PARTS, not ABSOLUTE, PRECISION)  # (ROWS, COLS)  # fmt: skip
        if LATER:
            s = after(s, 1, column, last[0], last[1], EXACT)
        scores, ages = keep_best(scores, ages, s, 1, column, EXACT)
    for tile in range(1, tiles):
        first_age = 1 + tile * COLS
        s = landmark_scores(q, LANDMARK_KEYS, rotations, first_age, column, key_row, blocks, cached, near, capacity,
                            one_key, scaling, PARTS, False, PRECISION)  # (ROWS, COLS)  # fmt: skip
        if LATER:
            s = after(s, first_age, column, last[0], last[1], EXACT)
        scores, ages = keep_best(scores, ages, s, first_age, column, EXACT)
    return scores, ages


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity", "retrievable", "top_k", "one_key", "first"])
def select_kernel(Q, LANDMARK_KEYS, COUNTERS, rotations, stream_rotation, AGES, SCORES, q_strides, tokens, batch,
                  heads, capacity, retrievable, top_k, one_key, first, scaling,
                  HEADS_PER_KEY: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
                  ROWS: tl.constexpr, COLS: tl.constexpr, LATER: tl.constexpr, ABSOLUTE: tl.constexpr,
                  EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The ages of the K best blocks of each query and head, into columns first.. of AGES (B, H, T, WIDTH).

    Program (tile of rows, key head): rows are the queries of the heads on a key head. SCORES, unless None, has the same
    shape. LATER: look only at what comes after column first - 1, which an earlier pass has filled. retrievable: most
    blocks to choose from. one_key: whether far blocks share a landmark key.
    """
    key_row = tl.program_id(1)
    batch_row = key_row // heads
    start, blocks, _ = counts_of(COUNTERS, batch, batch_row)
    cached = tl.minimum(blocks, retrievable)
    near = tl.minimum(cached, top_k)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,), as real and offset
    real, _, _, offset = query_rows(row, tokens, start, key_row % heads, batch_row, q_strides, HEADS_PER_KEY)
    q = far_query(Q, rotations, stream_rotation, offset, real, batch_row, near, PARTS, ABSOLUTE)
    column = tl.arange(0, COLS)  # (COLS,)
    out = (tl.cast(key_row, tl.int64) * HEADS_PER_KEY * tokens + row) * WIDTH  # (ROWS,), as all that is loaded there
    in_range = row < HEADS_PER_KEY * tokens
    last_score = 0.0
    last_age = 0
    if LATER:
        last_score = tl.load(SCORES + out + first - 1, mask=in_range, other=0.0)
        last_age = tl.load(AGES + out + first - 1, mask=in_range, other=0)
    cache_key_row = cache_row(COUNTERS, batch, batch_row) * heads + key_row % heads
    scores, ages = best_blocks(q, LANDMARK_KEYS, rotations, cache_key_row, blocks, cached, near, capacity, one_key,
                               scaling, real, (last_score, last_age), column, PARTS, K, LATER, ABSOLUTE, EXACT,
                               PRECISION)  # fmt: skip
    for j in tl.static_range(K):
        tl.store(AGES + out + first + j, tl.where(real, ages[j], 0), mask=in_range)
        if SCORES is not None:
            tl.store(SCORES + out + first + j, scores[j], mask=in_range)


@triton.jit(do_not_specialize=["chunk", "first_head", "blocks", "top_k", "one_key", "first"])
def select_in_window_kernel(Q, LANDMARK_KEYS, CHUNKS, cos, sin, AGES, SCORES, q_strides, age_strides, chunk,
                            first_head, blocks, top_k, one_key, first, scaling,
                            HEADS_PER_KEY: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
                            COLS: tl.constexpr, LATER: tl.constexpr, EXACT: tl.constexpr,
                            PRECISION: tl.constexpr):  # fmt: skip
    """The same for all chunks of a window at once: ages count back from the last block before each query's chunk.

    Program (tile of rows, chunk, key head, counted from first_head on): rows are the queries of the heads on a key head
    in a chunk of at most `chunk` tokens. LANDMARK_KEYS (G, blocks, D) of all rows' blocks, rotated by their offset in
    their block only. CHUNKS, cos, sin: as in attention/window.py. AGES and, unless None, SCORES have strides (key head,
    batch row, head on the key head, token); their last dimension is dense. Padding is left out.
    """
    # The last chunks have most to look at: they go first.
    at = CHUNKS + (tl.num_programs(1) - 1 - tl.program_id(1)) * 5
    count = tl.load(at + 2)
    cached = tl.load(at + 4)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,), as real, token, head, offset and out
    if count == 0:
        return
    batch_row = tl.load(at)
    begin = tl.load(at + 1)
    key_head = first_head + tl.program_id(2)
    near = tl.minimum(cached, top_k)
    base = Q + tl.cast(begin, tl.int64) * q_strides[2]
    real, token, head, offset = query_rows(row, chunk, 0, key_head, batch_row, q_strides, HEADS_PER_KEY)
    real = real & (token < count)
    q = far_query(base, (cos, sin), None, offset, real, batch_row, near, PARTS, False)
    column = tl.arange(0, COLS)  # (COLS,)
    out = tl.program_id(2).to(tl.int64) * age_strides[0] + tl.cast(batch_row, tl.int64) * age_strides[1]
    out = out + (head - key_head * HEADS_PER_KEY).to(tl.int64) * age_strides[2]
    out = out + (begin + token).to(tl.int64) * age_strides[3]
    last_score = 0.0
    last_age = 0
    if LATER:
        last_score = tl.load(SCORES + out + first - 1, mask=real, other=0.0)
        last_age = tl.load(AGES + out + first - 1, mask=real, other=0)
    scores, ages = best_blocks(q, LANDMARK_KEYS, (cos, sin), key_head, tl.load(at + 3) + cached, cached, near, blocks,
                               one_key, scaling, real, (last_score, last_age), column, PARTS, K, LATER, False, EXACT,
                               PRECISION)  # fmt: skip
    for j in tl.static_range(K):
        tl.store(AGES + out + first + j, ages[j], mask=real)
        if SCORES is not None:
            tl.store(SCORES + out + first + j, scores[j], mask=real)
