"""Choosing blocks for few queries, which leave nothing to do but read all landmarks: shared by programs.

Every program scores landmarks of its own and leaves its best as candidates; whoever needs the best of all picks them
from these. Source: arXiv 2305.16300, section 3.2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .select import NO_SCORE, far_query, keep_best, landmark_scores, ordered, rounded
from .tiles import place_of, query_rows


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity", "retrievable", "top_k", "one_key"])
def candidates_kernel(Q, LANDMARK_KEYS, COUNTERS, COS, SIN, STREAM_COS, STREAM_SIN, AGES, SCORES, q_strides, tokens,
                      batch, heads, capacity, retrievable, top_k, one_key, scale,
                      GROUP: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_PAD: tl.constexpr,
                      REST_PAD: tl.constexpr, K: tl.constexpr, NEAR: tl.constexpr, ROWS: tl.constexpr,
                      COLS: tl.constexpr, SPLITS: tl.constexpr, ABSOLUTE: tl.constexpr, EXACT: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """AGES and SCORES (B, H, T, SPLITS, K): of each query and head, the K best blocks among those of each split.

    Program (tile of rows, split, key head): rows are the queries of the GROUP heads on a key head. The first split has
    the newest K blocks (NEAR columns hold them), which are scored at their true distance and are all candidates; the
    others share the rest in tiles of COLS. Splits that have nothing write nothing.
    """
    split = tl.program_id(1)
    key_row = tl.program_id(2)
    batch_row = key_row // heads
    start, blocks, _ = place_of(COUNTERS, batch, batch_row)
    cached = tl.minimum(blocks, retrievable)
    taken = tl.minimum(cached, top_k)
    if (split - 1) * COLS >= cached - taken:
        return

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_range = row < GROUP * tokens
    real, _, _, offset = query_rows(row, tokens, start, key_row % heads, batch_row, q_strides, GROUP)
    q = far_query(Q, COS, SIN, STREAM_COS, STREAM_SIN, offset, real, batch_row, taken, HALF, REST, HALF_PAD, REST_PAD,
                  ABSOLUTE)  # fmt: skip
    out = ((tl.cast(key_row, tl.int64) * GROUP * tokens + row) * SPLITS + split) * K
    if split == 0:
        near = tl.arange(0, NEAR)
        near_scores = landmark_scores(q, LANDMARK_KEYS, COS, SIN, 1, near, key_row, blocks, taken, taken, capacity,
                                      one_key, scale, HALF, REST, HALF_PAD, REST_PAD, not ABSOLUTE,
                                      PRECISION)  # fmt: skip
        if not EXACT:
            near_scores = tl.where((near < taken)[None, :], rounded(ordered(near_scores), COLS), NO_SCORE)
        near_ages = tl.where(real[:, None] & (near < taken)[None, :], 1 + near[None, :], 0)
        mask = in_range[:, None] & (near < K)[None, :]
        tl.store(AGES + (out[:, None] + near[None, :]), near_ages, mask=mask)
        tl.store(SCORES + (out[:, None] + near[None, :]), near_scores, mask=mask)
    else:
        column = tl.arange(0, COLS)
        scores = (tl.full([ROWS], NO_SCORE, tl.float32),) * K
        ages = (tl.zeros([ROWS], tl.int32),) * K
        for tile in range(split - 1, tl.cdiv(cached - taken, COLS), SPLITS - 1):
            first_age = 1 + taken + tile * COLS
            s = landmark_scores(q, LANDMARK_KEYS, COS, SIN, first_age, column, key_row, blocks, cached, taken, capacity,
                                one_key, scale, HALF, REST, HALF_PAD, REST_PAD, False, PRECISION)  # fmt: skip
            scores, ages = keep_best(scores, ages, s, first_age, column, EXACT)
        for j in tl.static_range(K):
            tl.store(AGES + out + j, tl.where(real, ages[j], 0), mask=in_range)
            tl.store(SCORES + out + j, scores[j], mask=in_range)


@triton.jit
def best_candidates(AGES, SCORES, row, cached, taken, K: tl.constexpr, SPLITS: tl.constexpr, CANDIDATES: tl.constexpr,
                    COLS: tl.constexpr, K_PAD: tl.constexpr):  # fmt: skip
    """The ages of a row's K best of all splits' candidates, (K_PAD,), 0 where there are not so many."""
    index = tl.arange(0, CANDIDATES)
    left = (index < SPLITS * K) & ((index // K - 1) * COLS < cached - taken)
    at = tl.cast(row, tl.int64) * (SPLITS * K) + index
    score = tl.load(SCORES + at, mask=left, other=NO_SCORE)
    age = tl.load(AGES + at, mask=left, other=0)
    rank = tl.arange(0, K_PAD)
    best = tl.zeros([K_PAD], tl.int32)
    for j in tl.static_range(K):
        top = tl.max(score, 0)
        found = tl.min(tl.where(score == top, age, 2147483647), 0)
        best = tl.where(rank == j, tl.where(top > NO_SCORE, found, 0), best)
        score = tl.where(age == found, NO_SCORE, score)
    return best


@triton.jit(do_not_specialize=["rows_per_batch", "batch", "retrievable", "top_k"])
def pick_kernel(AGES, SCORES, COUNTERS, OUT, rows_per_batch, batch, retrievable, top_k, K: tl.constexpr,
                SPLITS: tl.constexpr, CANDIDATES: tl.constexpr, COLS: tl.constexpr,
                K_PAD: tl.constexpr):  # fmt: skip
    """Each row's best of the candidates that the splits of candidates_kernel left: OUT (rows, K)."""
    row = tl.program_id(0)
    _, blocks, _ = place_of(COUNTERS, batch, row // rows_per_batch)
    cached = tl.minimum(blocks, retrievable)
    best = best_candidates(AGES, SCORES, row, cached, tl.minimum(cached, top_k), K, SPLITS, CANDIDATES, COLS, K_PAD)
    rank = tl.arange(0, K_PAD)
    tl.store(OUT + tl.cast(row, tl.int64) * K + rank, best, mask=rank < K)
