"""Choosing blocks for few queries, which leave nothing to do but read all landmarks: shared by programs.

Every program scores landmarks of its own and leaves its best as candidates; whoever needs the best of all picks them
from these. Source: arXiv 2305.16300, section 3.2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import cache_row, counts_of, query_rows
from .store import store_tokens
from .top_k import NO_SCORE, far_query, keep_best, landmark_scores, numbered, ordered, rounded, sortable, take_top

# Below all that stand for a score.
NO_NUMBER = tl.constexpr(-(2**63))


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity", "retrievable", "top_k", "one_key"])
def candidates_kernel(Q, LANDMARK_KEYS, COUNTERS, rotations, stream_rotation, AGES, SCORES, KEYS, VALUES, BLOCKS,
                      PAGE_TABLE, q_strides, k_strides, v_strides, tokens, batch, heads, capacity, retrievable, top_k,
                      one_key, scaling,
                      HEADS_PER_KEY: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, NEAR: tl.constexpr,
                      ROWS: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr, ABSOLUTE: tl.constexpr,
                      EXACT: tl.constexpr, PRECISION: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
                      TOKENS: tl.constexpr):  # fmt: skip
    """AGES and SCORES (B, H, T, SPLITS, K): of each query and head, the K best blocks among those of each split.

    Program (tile of rows, split, key head): rows are the queries of the heads on a key head. The first split has the
    newest K blocks (NEAR columns hold them), which are scored at their true distance and are all candidates; the others
    share the rest in tiles of COLS. Splits that have nothing write nothing. batch, heads, capacity, retrievable,
    top_k, one_key: as in select_kernel. KEYS, unless None: a split behind the last stores the up to TOKENS tokens of
    KEYS and VALUES, which are not chosen from yet; see store.py for these and BLOCKS, PAGE_TABLE, D_PAD and BLOCK.
    """
    split = tl.program_id(1)
    key_row = tl.program_id(2)
    if KEYS is not None:
        if split == SPLITS:
            if tl.program_id(0) == 0:
                store_tokens(KEYS, VALUES, BLOCKS, LANDMARK_KEYS, PAGE_TABLE, COUNTERS, rotations, stream_rotation,
                             k_strides, v_strides, 0, key_row, tokens, batch, heads, capacity, PARTS, D_PAD, BLOCK,
                             TOKENS, ABSOLUTE)  # fmt: skip
            return
    batch_row = key_row // heads
    start, blocks, _ = counts_of(COUNTERS, batch, batch_row)
    cached = tl.minimum(blocks, retrievable)
    near = tl.minimum(cached, top_k)
    if (split - 1) * COLS >= cached - near:
        return

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,), as in_range, real, offset and out
    in_range = row < HEADS_PER_KEY * tokens
    real, _, _, offset = query_rows(row, tokens, start, key_row % heads, batch_row, q_strides, HEADS_PER_KEY)
    q = far_query(Q, rotations, stream_rotation, offset, real, batch_row, near, PARTS, ABSOLUTE)
    out = ((tl.cast(key_row, tl.int64) * HEADS_PER_KEY * tokens + row) * SPLITS + split) * K
    cache_key_row = cache_row(COUNTERS, batch, batch_row) * heads + key_row % heads
    if split == 0:
        # Names of their own: a variable has one shape in both branches.
        newest = tl.arange(0, NEAR)  # (NEAR,)
        near_s = landmark_scores(q, LANDMARK_KEYS, rotations, 1, newest, cache_key_row, blocks, near, near, capacity,
                                 one_key, scaling, PARTS, not ABSOLUTE, PRECISION)  # (ROWS, NEAR)  # fmt: skip
        if not EXACT:
            # As the other splits know a score.
            near_s = tl.where((newest < near)[None, :], rounded(ordered(near_s), COLS), NO_SCORE)
        near_age = tl.where(real[:, None] & (newest < near)[None, :], 1 + newest[None, :], 0)  # (ROWS, NEAR), as mask
        mask = in_range[:, None] & (newest < K)[None, :]
        tl.store(AGES + (out[:, None] + newest[None, :]), near_age, mask=mask)
        tl.store(SCORES + (out[:, None] + newest[None, :]), near_s, mask=mask)
    else:
        column = tl.arange(0, COLS)  # (COLS,)
        first_age = 1 + near + (split - 1) * COLS
        s = landmark_scores(q, LANDMARK_KEYS, rotations, first_age, column, cache_key_row, blocks, cached, near,
                            capacity, one_key, scaling, PARTS, False, PRECISION)  # (ROWS, COLS)  # fmt: skip
        tiles = tl.cdiv(cached - near, COLS)
        if split - 2 + SPLITS >= tiles:
            # There is no tile but this one. Not unrolled: a kernel that short waits for its instructions.
            left = sortable(s, column, EXACT)
            for j in range(K):
                score, found, left = take_top(left, column, EXACT)
                # What is taken is no number, and no score either.
                ok = score > NO_SCORE
                tl.store(AGES + out + j, tl.where(real & ok, first_age + found, 0), mask=in_range)
                tl.store(SCORES + out + j, tl.where(ok, score, NO_SCORE), mask=in_range)
        else:
            # The running lists: K tiles (ROWS,) each.
            scores = (tl.full([ROWS], NO_SCORE, tl.float32),) * K
            ages = (tl.zeros([ROWS], tl.int32),) * K
            scores, ages = keep_best(scores, ages, s, first_age, column, EXACT)
            for tile in range(split - 2 + SPLITS, tiles, SPLITS - 1):
                first_age = 1 + near + tile * COLS
                s = landmark_scores(q, LANDMARK_KEYS, rotations, first_age, column, cache_key_row, blocks, cached, near,
                                    capacity, one_key, scaling, PARTS, False, PRECISION)  # (ROWS, COLS)  # fmt: skip
                scores, ages = keep_best(scores, ages, s, first_age, column, EXACT)
            for j in tl.static_range(K):
                tl.store(AGES + out + j, tl.where(real, ages[j], 0), mask=in_range)
                tl.store(SCORES + out + j, scores[j], mask=in_range)


@triton.jit
def best_candidates(AGES, SCORES, row, cached, near, K: tl.constexpr, SPLITS: tl.constexpr, CANDIDATES: tl.constexpr,
                    COLS: tl.constexpr, K_PAD: tl.constexpr):  # fmt: skip
    """The ages of a row's K best of all splits' candidates, (K_PAD,), 0 where there are not so many."""
    index = tl.arange(0, CANDIDATES)  # (CANDIDATES,), as all down to `number`
    at = tl.cast(row, tl.int64) * (SPLITS * K) + index
    score = tl.load(SCORES + at, mask=index < SPLITS * K, other=NO_SCORE)
    age = tl.load(AGES + at, mask=index < SPLITS * K, other=0)
    left = (index < SPLITS * K) & ((index // K - 1) * COLS < cached - near) & (score > NO_SCORE)
    # What is best is found in one go.
    number = tl.where(left, numbered(score, tl.where(left, age, 0)), NO_NUMBER)
    rank = tl.arange(0, K_PAD)  # (K_PAD,), as best
    best = tl.zeros([K_PAD], tl.int32)
    # Not unrolled: a kernel that short waits for its instructions.
    for j in range(K):
        top = tl.max(number, 0)
        found = 2147483647 - (top & 0xFFFFFFFF).to(tl.int32)
        best = tl.where(rank == j, tl.where(top > NO_NUMBER, found, 0), best)
        number = tl.where(number == top, NO_NUMBER, number)
    return best


@triton.jit(do_not_specialize=["rows_per_batch", "batch", "retrievable", "top_k"])
def pick_kernel(AGES, SCORES, COUNTERS, OUT, rows_per_batch, batch, retrievable, top_k, K: tl.constexpr,
                SPLITS: tl.constexpr,
                CANDIDATES: tl.constexpr, COLS: tl.constexpr, K_PAD: tl.constexpr):  # fmt: skip
    """Each row's best of the candidates that the splits of candidates_kernel left: OUT (rows, K).

    retrievable: most blocks to choose from.
    """
    row = tl.program_id(0)
    _, blocks, _ = counts_of(COUNTERS, batch, row // rows_per_batch)
    cached = tl.minimum(blocks, retrievable)
    best = best_candidates(AGES, SCORES, row, cached, tl.minimum(cached, top_k), K, SPLITS, CANDIDATES, COLS, K_PAD)
    rank = tl.arange(0, K_PAD)  # (K_PAD,)
    tl.store(OUT + tl.cast(row, tl.int64) * K + rank, best, mask=rank < K)
