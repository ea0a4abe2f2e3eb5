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

from .tiles import dot, load_parts, place_of, query_rows, sum_products, turn

NO_SCORE = tl.constexpr(float("-inf"))


@triton.jit
def ordered(score):
    """Float32 as int32 in the same order."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def rounded(number, COLS: tl.constexpr):
    """The score that `ordered` made an integer of, without the bits of a column of COLS."""
    bits = number & -COLS
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def sortable(score, column, EXACT: tl.constexpr):
    """What take_top works on: the scores themselves, or (faster) integers of their upper bits and the column below."""
    COLS: tl.constexpr = column.shape[0]
    if EXACT:
        return score
    else:
        return (ordered(score) & -COLS) | (COLS - 1 - column[None, :])


@triton.jit
def take_top(tile, column, EXACT: tl.constexpr):
    """Each row's best score and its column, the first of equal ones; and the tile without them."""
    COLS: tl.constexpr = column.shape[0]
    top = tl.max(tile, 1)
    if EXACT:
        found = tl.min(tl.where(tile == top[:, None], column[None, :], COLS - 1), 1)
        return top, found, tl.where(column[None, :] == found[:, None], NO_SCORE, tile)
    else:
        # What is taken becomes the lowest integer, which read as a score is no number: it beats nothing.
        return rounded(top, COLS), COLS - 1 - (top & (COLS - 1)), tl.where(tile == top[:, None], -2147483648, tile)


@triton.jit
def insert(scores, ages, score, age):
    """Put each row's new score into its list, which falls; the last one drops out."""
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
    """Bring a tile of scores, whose columns have ages first_age, .., into the running lists."""
    tile = sortable(tile, column, EXACT)
    score, found, tile = take_top(tile, column, EXACT)
    while tl.max((score > scores[len(scores) - 1]).to(tl.int32), 0) > 0:
        scores, ages = insert(scores, ages, score, first_age + found)
        score, found, tile = take_top(tile, column, EXACT)
    return scores, ages


@triton.jit
def after(tile, first_age, column, score, age, EXACT: tl.constexpr):
    """Strike out what an earlier pass kept: all up to a row's last (score, age)."""
    COLS: tl.constexpr = column.shape[0]
    if not EXACT:
        # As the lists know a score.
        tile = rounded(ordered(tile), COLS)
    older = (first_age + column)[None, :] > age[:, None]
    return tl.where((tile < score[:, None]) | ((tile == score[:, None]) & older), tile, NO_SCORE)


@triton.jit
def landmark_scores(q, LANDMARK_KEYS, COS, SIN, first_age, column, key_row, blocks, cached, taken, capacity, one_key,
                    scale, HALF: tl.constexpr, REST: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr,
                    NEAR: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scores of the blocks of ages first_age + column, (rows, columns), minus infinity where there is no such block.

    q stands at the distance of far blocks. NEAR: the tile may hold some of the last `taken` blocks, which are scored at
    their true distance: their keys are turned by the difference. one_key, 1 or 0: whether far blocks share a key.
    """
    age = first_age + column
    ok = age <= cached
    slot = blocks % capacity - tl.where(one_key != 0, tl.minimum(age, taken + 1), age)
    slot = tl.where(ok, tl.where(slot < 0, slot + capacity, slot), 0)
    base = LANDMARK_KEYS + tl.cast(key_row, tl.int64) * capacity * (2 * HALF + REST)
    k = load_parts(base, slot.to(tl.int64) * (2 * HALF + REST), ok, HALF, REST, HALF_PAD, REST_PAD)
    if NEAR:
        k = turn(k, COS, SIN, tl.maximum(taken + 1 - age, 0)[:, None], HALF, HALF_PAD)
    if q[0].shape[0] == 1:
        # The matrix unit would work on 16 rows.
        s = sum_products(q, k)[None, :]
    else:
        s = dot(q, k, PRECISION)
    return tl.where(ok[None, :], s * scale, NO_SCORE)


@triton.jit
def far_query(Q, COS, SIN, STREAM_COS, STREAM_SIN, offset, real, batch_row, taken, HALF: tl.constexpr,
              REST: tl.constexpr, HALF_PAD: tl.constexpr, REST_PAD: tl.constexpr, ABSOLUTE: tl.constexpr):  # fmt: skip
    """Queries turned to the distance of far blocks or, with absolute positions, to their positions in the stream."""
    q = load_parts(Q, offset, real, HALF, REST, HALF_PAD, REST_PAD)
    if ABSOLUTE:
        return turn(q, STREAM_COS, STREAM_SIN, batch_row, HALF, HALF_PAD)
    else:
        return turn(q, COS, SIN, taken + 1, HALF, HALF_PAD)


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity", "retrievable", "top_k", "one_key",
                               "first"])  # fmt: skip
def select_kernel(Q, LANDMARK_KEYS, COUNTERS, COS, SIN, STREAM_COS, STREAM_SIN, AGES, SCORES, q_strides, tokens, batch,
                  heads, capacity, retrievable, top_k, one_key, first, scale,
                  GROUP: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_PAD: tl.constexpr,
                  REST_PAD: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                  LATER: tl.constexpr, ABSOLUTE: tl.constexpr, EXACT: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """The ages of the K best blocks of each query and head, into columns first.. of AGES (B, H, T, WIDTH).

    Program (tile of rows, key head): rows are the queries of the GROUP heads on a key head. SCORES, unless None, has
    the same shape. LATER: look only at what comes after column first - 1, which an earlier pass has filled.
    """
    key_row = tl.program_id(1)
    batch_row = key_row // heads
    start, blocks, _ = place_of(COUNTERS, batch, batch_row)
    cached = tl.minimum(blocks, retrievable)
    taken = tl.minimum(cached, top_k)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real, _, _, offset = query_rows(row, tokens, start, key_row % heads, batch_row, q_strides, GROUP)
    q = far_query(Q, COS, SIN, STREAM_COS, STREAM_SIN, offset, real, batch_row, taken, HALF, REST, HALF_PAD, REST_PAD,
                  ABSOLUTE)  # fmt: skip
    column = tl.arange(0, COLS)
    out = (tl.cast(key_row, tl.int64) * GROUP * tokens + row) * WIDTH
    in_range = row < GROUP * tokens
    if LATER:
        last_score = tl.load(SCORES + out + first - 1, mask=in_range, other=0.0)
        last_age = tl.load(AGES + out + first - 1, mask=in_range, other=0)

    scores = (tl.full([ROWS], NO_SCORE, tl.float32),) * K
    ages = (tl.zeros([ROWS], tl.int32),) * K
    # A tile of padding looks at nothing.
    tiles = tl.where(tl.max(real.to(tl.int32), 0) > 0, tl.cdiv(cached, COLS), 0)
    if tiles > 0:
        s = landmark_scores(q, LANDMARK_KEYS, COS, SIN, 1, column, key_row, blocks, cached, taken, capacity,
                            one_key, scale, HALF, REST, HALF_PAD, REST_PAD, not ABSOLUTE, PRECISION)  # fmt: skip
        if LATER:
            s = after(s, 1, column, last_score, last_age, EXACT)
        scores, ages = keep_best(scores, ages, s, 1, column, EXACT)
    for tile in range(1, tiles):
        first_age = 1 + tile * COLS
        s = landmark_scores(q, LANDMARK_KEYS, COS, SIN, first_age, column, key_row, blocks, cached, taken, capacity,
                            one_key, scale, HALF, REST, HALF_PAD, REST_PAD, False, PRECISION)  # fmt: skip
        if LATER:
            s = after(s, first_age, column, last_score, last_age, EXACT)
        scores, ages = keep_best(scores, ages, s, first_age, column, EXACT)

    for j in tl.static_range(K):
        tl.store(AGES + out + first + j, tl.where(real, ages[j], 0), mask=in_range)
        if SCORES is not None:
            tl.store(SCORES + out + first + j, scores[j], mask=in_range)
