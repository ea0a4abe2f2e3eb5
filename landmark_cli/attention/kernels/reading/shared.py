"""Selections shared by heads or by tokens: softmax over blocks, its maximum over those who share, then the k best. And
scores of all blocks that are written down for few queries, which propose many.

Source: arXiv 2305.16300, section 4.1 and appendix. Log-probabilities compare as the softmax does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .candidates import NO_NUMBER
from .parts import cache_row, counts_of, query_rows
from .top_k import NO_SCORE, after, far_query, keep_best, landmark_scores, numbered


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity", "retrievable", "top_k", "one_key"])
def normalizer_kernel(Q, LANDMARK_KEYS, COUNTERS, rotations, stream_rotation, LSE, q_strides, tokens, batch, heads,
                      capacity, retrievable, top_k, one_key,
                      scaling,
                      HEADS_PER_KEY: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                      ABSOLUTE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """LSE (B, H, T): the log-sum-exp of each query's scores over all blocks. Program (tile of rows, key head)."""
    key_row = tl.program_id(1)
    batch_row = key_row // heads
    start, blocks, _ = counts_of(COUNTERS, batch, batch_row)
    cached = tl.minimum(blocks, retrievable)
    near = tl.minimum(cached, top_k)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,), as real and offset
    real, _, _, offset = query_rows(row, tokens, start, key_row % heads, batch_row, q_strides, HEADS_PER_KEY)
    q = far_query(Q, rotations, stream_rotation, offset, real, batch_row, near, PARTS, ABSOLUTE)
    cache_key_row = cache_row(COUNTERS, batch, batch_row) * heads + key_row % heads
    column = tl.arange(0, COLS)  # (COLS,)
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for tile in range(tl.cdiv(cached, COLS)):
        s = landmark_scores(q, LANDMARK_KEYS, rotations, 1 + tile * COLS, column, cache_key_row, blocks, cached, near,
                            capacity, one_key, scaling, PARTS, not ABSOLUTE, PRECISION)  # (ROWS, COLS)  # fmt: skip
        new_top = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(s - new_top[:, None]), 1)
        top = new_top
    lse = top + tl.log(tl.where(total > 0, total, 1.0))  # (ROWS,)
    tl.store(LSE + tl.cast(key_row, tl.int64) * HEADS_PER_KEY * tokens + row, lse, mask=row < HEADS_PER_KEY * tokens)


@triton.jit
def log_probability(Q, LANDMARK_KEYS, COUNTERS, rotations, stream_rotation, LSE, q_strides, first_age, column, token,
                    batch_row, head, tokens, batch, heads, capacity, retrievable, top_k, one_key, scaling,
                    HEADS_PER_KEY: tl.constexpr, PARTS: tl.constexpr, ABSOLUTE: tl.constexpr,
                    PRECISION: tl.constexpr):  # fmt: skip
    """Log-probability, (ROWS, COLS), of blocks first_age + column, (COLS,), for the tokens, (ROWS,), of one head; minus
    infinity for padding."""
    start, blocks, _ = counts_of(COUNTERS, batch, batch_row)
    cached = tl.minimum(blocks, retrievable)
    near = tl.minimum(cached, top_k)
    key_head = head // HEADS_PER_KEY
    key_row = batch_row * heads + key_head
    row = (head % HEADS_PER_KEY) * tokens + token  # (ROWS,), as real and offset
    real, _, _, offset = query_rows(row, tokens, start, key_head, batch_row, q_strides, HEADS_PER_KEY)
    real = real & (token < tokens)
    q = far_query(Q, rotations, stream_rotation, offset, real, batch_row, near, PARTS, ABSOLUTE)
    cache_key_row = cache_row(COUNTERS, batch, batch_row) * heads + key_head
    s = landmark_scores(q, LANDMARK_KEYS, rotations, first_age, column, cache_key_row, blocks, cached, near, capacity,
                        one_key, scaling, PARTS, not ABSOLUTE, PRECISION)  # (ROWS, COLS)  # fmt: skip
    # (ROWS,)
    lse = tl.load(LSE + tl.cast(key_row, tl.int64) * HEADS_PER_KEY * tokens + row, mask=real, other=0.0)
    return tl.where(real[:, None], s - lse[:, None], NO_SCORE)


@triton.jit(do_not_specialize=["tokens", "first_token", "shared_tokens", "batch", "heads", "capacity", "retrievable",
                               "top_k", "one_key"])  # fmt: skip
def shared_scores_kernel(Q, LANDMARK_KEYS, COUNTERS, rotations, stream_rotation, LSE, SHARED, q_strides, tokens,
                         first_token, shared_tokens, batch, heads, capacity, retrievable, top_k, one_key, scaling,
                         HEADS_PER_KEY: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                         OVER_HEADS: tl.constexpr, OF_KEY_HEAD: tl.constexpr, ABSOLUTE: tl.constexpr,
                         PRECISION: tl.constexpr):  # fmt: skip
    """SHARED: the best log-probability that those who share a selection give each block, by age from 1 on.

    OVER_HEADS: (B, shared_tokens, capacity), tokens from first_token on; program (tile of blocks, tile of tokens, batch
    row). With OF_KEY_HEAD (B, G, shared_tokens, capacity), the maximum over the query heads of a key head; program
    (tile of blocks, tile of tokens, batch row and key head). Else (B, H, capacity), the maximum over all tokens;
    program (tile of blocks, 0, batch row and head).
    """
    column = tl.arange(0, COLS)  # (COLS,), as age
    first_age = 1 + tl.program_id(0) * COLS
    age = first_age + column
    token = tl.arange(0, ROWS)  # (ROWS,)
    if OVER_HEADS:
        batch_row = tl.program_id(2)
        token += tl.program_id(1) * ROWS
        best = tl.full([ROWS, COLS], NO_SCORE, tl.float32)
        if OF_KEY_HEAD:
            first_head = batch_row % heads * HEADS_PER_KEY
            end_head = first_head + HEADS_PER_KEY
            batch_row = batch_row // heads
        else:
            first_head = 0
            end_head = heads * HEADS_PER_KEY
        for head in range(first_head, end_head):
            s = log_probability(Q, LANDMARK_KEYS, COUNTERS, rotations, stream_rotation, LSE, q_strides, first_age,
                                column, first_token + token, batch_row, head, tokens, batch, heads, capacity,
                                retrievable, top_k, one_key, scaling,
                                HEADS_PER_KEY, PARTS, ABSOLUTE, PRECISION)  # (ROWS, COLS)  # fmt: skip
            best = tl.maximum(best, s)
        at = (tl.cast(tl.program_id(2), tl.int64) * shared_tokens + token) * capacity  # (ROWS,)
        mask = (token < shared_tokens)[:, None] & (age <= capacity)[None, :]  # (ROWS, COLS)
        tl.store(SHARED + at[:, None] + age[None, :] - 1, best, mask=mask)
    else:
        batch_row = tl.program_id(2) // (heads * HEADS_PER_KEY)
        head = tl.program_id(2) % (heads * HEADS_PER_KEY)
        best = tl.full([COLS], NO_SCORE, tl.float32)
        for first in range(0, tokens, ROWS):
            s = log_probability(Q, LANDMARK_KEYS, COUNTERS, rotations, stream_rotation, LSE, q_strides, first_age,
                                column, first + token, batch_row, head, tokens, batch, heads, capacity, retrievable,
                                top_k, one_key, scaling, HEADS_PER_KEY,
                                PARTS, ABSOLUTE, PRECISION)  # (ROWS, COLS)  # fmt: skip
            best = tl.maximum(best, tl.max(s, 0))
        at = tl.cast(tl.program_id(2), tl.int64) * capacity
        tl.store(SHARED + at + age - 1, best, mask=age <= capacity)


@triton.jit(do_not_specialize=["rows", "rows_per_batch", "batch", "capacity", "retrievable", "first"])
def top_kernel(SHARED, COUNTERS, AGES, SCORES, rows, rows_per_batch, batch, capacity, retrievable, first,
               K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
               LATER: tl.constexpr):  # fmt: skip
    """The ages of the K best of each row of SHARED (rows, capacity), into columns first.. of AGES (rows, WIDTH)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,), as all down to the running lists
    in_range = row < rows
    blocks = tl.load(COUNTERS + batch + row // rows_per_batch, mask=in_range, other=0)
    cached = tl.minimum(blocks, retrievable)
    column = tl.arange(0, COLS)  # (COLS,), as age
    base = row.to(tl.int64) * capacity
    out = row.to(tl.int64) * WIDTH + first
    if LATER:
        last_score = tl.load(SCORES + out - 1, mask=in_range, other=0.0)
        last_age = tl.load(AGES + out - 1, mask=in_range, other=0)
    scores = (tl.full([ROWS], NO_SCORE, tl.float32),) * K
    ages = (tl.zeros([ROWS], tl.int32),) * K
    for tile in range(tl.cdiv(tl.max(cached, 0), COLS)):
        first_age = 1 + tile * COLS
        age = first_age + column
        mask = age[None, :] <= cached[:, None]  # (ROWS, COLS), as s
        s = tl.load(SHARED + base[:, None] + age[None, :] - 1, mask=mask, other=NO_SCORE)
        if LATER:
            s = after(s, first_age, column, last_score, last_age, True)
        scores, ages = keep_best(scores, ages, s, first_age, column, True)
    for j in tl.static_range(K):
        tl.store(AGES + out + j, ages[j], mask=in_range)
        tl.store(SCORES + out + j, scores[j], mask=in_range)


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity", "retrievable", "top_k", "one_key"])
def number_kernel(Q, LANDMARK_KEYS, COUNTERS, rotations, stream_rotation, NUMBERS, q_strides, tokens, batch, heads,
                  capacity, retrievable, top_k, one_key, scaling, HEADS_PER_KEY: tl.constexpr, PARTS: tl.constexpr,
                  ROWS: tl.constexpr, COLS: tl.constexpr, ABSOLUTE: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """NUMBERS (B, H, T, capacity) int64: what `numbered` makes of every block, by age from 1 on; NO_NUMBER where there
    is none. Program (tile of blocks, tile of rows, key head)."""
    key_row = tl.program_id(2)
    batch_row = key_row // heads
    start, blocks, _ = counts_of(COUNTERS, batch, batch_row)
    cached = tl.minimum(blocks, retrievable)
    near = tl.minimum(cached, top_k)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # (ROWS,), as real and offset
    real, _, _, offset = query_rows(row, tokens, start, key_row % heads, batch_row, q_strides, HEADS_PER_KEY)
    q = far_query(Q, rotations, stream_rotation, offset, real, batch_row, near, PARTS, ABSOLUTE)
    cache_key_row = cache_row(COUNTERS, batch, batch_row) * heads + key_row % heads
    column = tl.arange(0, COLS)  # (COLS,), as age
    first_age = 1 + tl.program_id(0) * COLS
    s = landmark_scores(q, LANDMARK_KEYS, rotations, first_age, column, cache_key_row, blocks, cached, near, capacity,
                        one_key, scaling, PARTS, not ABSOLUTE, PRECISION)  # (ROWS, COLS)  # fmt: skip
    age = first_age + column
    number = tl.where(real[:, None] & (age <= cached)[None, :], numbered(s, age[None, :]), NO_NUMBER)
    at = ((tl.cast(key_row, tl.int64) * HEADS_PER_KEY * tokens + row) * capacity)[:, None] + (age - 1)[None, :]
    mask = (row < HEADS_PER_KEY * tokens)[:, None] & (age <= capacity)[None, :]
    tl.store(NUMBERS + at, number, mask=mask)
