"""Attention to the selected blocks, block by block: each is read once, for all queries that chose it.

Nothing is gathered per query: what a pair of query and block gives, an output and the block's logit in the outer
softmax, is all that is written. Logits are kept times log2(e): exp2 is what the hardware has. Source: arXiv 2305.16300,
section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.logits import logits_of
from .parts import cache_row, dot, load_columns, load_parts, page_base, query_rows, rotate


@triton.jit
def attend_rows(q, k_base, v_base, k_stride, v_stride, dim, scaling, PARTS: tl.constexpr, BLOCK: tl.constexpr,
                COLS: tl.constexpr, PRECISION: tl.constexpr, JOINT: tl.constexpr, VALUES: tl.constexpr):  # fmt: skip
    """What queries, in parts, find in a block: its values by its inner softmax, (ROWS, D_PAD), and its logit in the
    outer softmax, (ROWS,), base 2: its landmark's, or, if JOINT, the log-sum-exp of its text's. Strides: from token to
    token. dim: (D_PAD,). scaling: see common/logits.py. Without VALUES the log-sum-exp alone, twice."""
    D: tl.constexpr = 2 * PARTS[0] + PARTS[1]
    ROWS: tl.constexpr = q[0].shape[0]
    landmark = tl.full([ROWS], float("-inf"), tl.float32)
    for part in tl.static_range((BLOCK + COLS - 1) // COLS):
        column = part * COLS + tl.arange(0, COLS)  # (COLS,)
        k = load_parts(k_base, column * k_stride, column < BLOCK, PARTS)
        s = logits_of(dot(q, k, PRECISION), scaling)  # (ROWS, COLS)
        if not JOINT:
            landmark = tl.maximum(landmark, tl.max(tl.where(column[None, :] == BLOCK - 1, s, float("-inf")), 1))
        s = tl.where(column[None, :] < BLOCK - 1, s, float("-inf"))
        if VALUES:
            v = load_columns(v_base, column * v_stride, column < BLOCK, dim, D)  # (COLS, D_PAD)
        # top, total and rescale: (ROWS,); p: (ROWS, COLS); out: (ROWS, D_PAD).
        if part == 0:
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            total = tl.sum(p, 1)
            if VALUES:
                out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        else:
            new_top = tl.maximum(top, tl.max(s, 1))
            rescale = tl.exp2(top - new_top)
            p = tl.exp2(s - new_top[:, None])
            total = total * rescale + tl.sum(p, 1)
            if VALUES:
                out = tl.dot(p.to(v.dtype), v, out * rescale[:, None], input_precision=PRECISION)
            top = new_top
    if VALUES:
        if JOINT:
            return out / total[:, None], top + tl.log2(total)
        else:
            return out / total[:, None], landmark
    else:
        logit = top + tl.log2(total)
        return logit, logit


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity", "pairs", "most_tiles"])
def attend_kernel(Q, BLOCKS, POOL, PAGE_TABLE, COUNTERS, rotations, COUNT, FIRST, TILES, TOTAL, LIST, PAIR_OUT,
                  OUTER_LOGIT, q_strides, tokens, batch, heads, capacity, pairs, most_tiles, scaling,
                  HEADS_PER_KEY: tl.constexpr, PARTS: tl.constexpr, D_PAD: tl.constexpr, K: tl.constexpr,
                  BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
                  JOINT: tl.constexpr):  # fmt: skip
    """PAIR_OUT (B, H, T, K, D), unless None, and OUTER_LOGIT (B, H, T, K): of each query and block what attend_rows
    gives.

    Program (tile of a block's list, key head); programs beyond the last tile have nothing to
    do.
    """
    tile = tl.program_id(0)
    key_row = tl.program_id(1)
    if tile >= tl.load(TOTAL + key_row):
        return
    D: tl.constexpr = 2 * PARTS[0] + PARTS[1]
    entry = tl.load(TILES + tl.cast(key_row, tl.int64) * most_tiles + tile)
    slot = entry.to(tl.int32)
    number = (entry >> 32).to(tl.int32) * ROWS + tl.arange(0, ROWS)  # (ROWS,), as all down to `offset`
    at = tl.cast(key_row, tl.int64) * capacity + slot
    ok = number < tl.load(COUNT + at)
    listed = LIST + tl.cast(key_row, tl.int64) * pairs + tl.load(FIRST + at)
    entry = tl.load(listed + number, mask=ok, other=0)
    pair = entry.to(tl.int32)
    distance = (entry >> 32).to(tl.int32)

    _, _, _, offset = query_rows(pair // K, tokens, 0, key_row % heads, key_row // heads, q_strides, HEADS_PER_KEY)
    q = load_parts(Q, offset, ok, PARTS)
    q = rotate(q, rotations, distance[:, None], PARTS)
    cache_key_row = cache_row(COUNTERS, batch, key_row // heads) * heads + key_row % heads
    page = tl.cast(cache_key_row, tl.int64) * capacity + slot
    base = page_base(BLOCKS, POOL, PAGE_TABLE, page, 2 * BLOCK * D)
    dim = tl.arange(0, D_PAD)  # (D_PAD,)
    out, logit = attend_rows(q, base, base + BLOCK * D, D, D, dim, scaling, PARTS, BLOCK, COLS, PRECISION, JOINT,
                             PAIR_OUT is not None)  # fmt: skip

    at = tl.cast(key_row, tl.int64) * pairs + pair  # (ROWS,)
    if PAIR_OUT is not None:
        pointers = PAIR_OUT + at[:, None] * D + dim[None, :]  # (ROWS, D_PAD)
        tl.store(pointers, out.to(PAIR_OUT.dtype.element_ty), mask=ok[:, None] & (dim < D)[None, :])
    tl.store(OUTER_LOGIT + at, logit, mask=ok)
