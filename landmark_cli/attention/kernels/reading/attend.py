"""Attention to the selected blocks, block by block: each is read once, for all queries that chose it.

Nothing is gathered per query: what a pair of query and block gives, an output and the landmark's logit, is all that is
written. Logits are kept times log2(e): exp2 is what the hardware has. Source: arXiv 2305.16300, section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import block_base, dot, load_columns, load_parts, query_rows, turn


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity", "pairs", "most_tiles"])
def attend_kernel(Q, HOME, POOL, PLACE, COS, SIN, COUNT, FIRST, TILES, TOTAL, LIST, PAIR_OUT, GROUP_LOGIT, q_strides,
                  tokens, batch, heads, capacity, pairs, most_tiles, scale,
                  GROUP: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HALF_PAD: tl.constexpr,
                  REST_PAD: tl.constexpr, D_PAD: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
                  ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """PAIR_OUT (B, H, T, K, D): a block's values by its inner softmax; GROUP_LOGIT (B, H, T, K): its landmark's logit.

    Program (tile of a block's list, key head); programs beyond the last tile have nothing to do.
    """
    tile = tl.program_id(0)
    key_row = tl.program_id(1)
    if tile >= tl.load(TOTAL + key_row):
        return
    D: tl.constexpr = 2 * HALF + REST
    entry = tl.load(TILES + tl.cast(key_row, tl.int64) * most_tiles + tile)
    slot = entry.to(tl.int32)
    number = (entry >> 32).to(tl.int32) * ROWS + tl.arange(0, ROWS)
    unit = tl.cast(key_row, tl.int64) * capacity + slot
    ok = number < tl.load(COUNT + unit)
    listed = LIST + tl.cast(key_row, tl.int64) * pairs + tl.load(FIRST + unit)
    entry = tl.load(listed + number, mask=ok, other=0)
    pair = entry.to(tl.int32)
    distance = (entry >> 32).to(tl.int32)

    _, _, _, offset = query_rows(pair // K, tokens, 0, key_row % heads, key_row // heads, q_strides, GROUP)
    q = load_parts(Q, offset, ok, HALF, REST, HALF_PAD, REST_PAD)
    q = turn(q, COS, SIN, distance[:, None], HALF, HALF_PAD)
    base = block_base(HOME, POOL, PLACE, unit, 2 * BLOCK * D)
    dim = tl.arange(0, D_PAD)
    landmark = tl.full([ROWS], float("-inf"), tl.float32)
    for part in tl.static_range((BLOCK + COLS - 1) // COLS):
        column = part * COLS + tl.arange(0, COLS)
        k = load_parts(base, column * D, column < BLOCK, HALF, REST, HALF_PAD, REST_PAD)
        s = dot(q, k, PRECISION) * scale
        landmark = tl.maximum(landmark, tl.max(tl.where(column[None, :] == BLOCK - 1, s, float("-inf")), 1))
        s = tl.where(column[None, :] < BLOCK - 1, s, float("-inf"))
        v = load_columns(base + BLOCK * D, column * D, column < BLOCK, dim, D)
        if part == 0:
            top = tl.max(s, 1)
            p = tl.exp2(s - top[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        else:
            higher = tl.maximum(top, tl.max(s, 1))
            fade = tl.exp2(top - higher)
            p = tl.exp2(s - higher[:, None])
            total = total * fade + tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, out * fade[:, None], input_precision=PRECISION)
            top = higher

    at = tl.cast(key_row, tl.int64) * pairs + pair
    pointers = PAIR_OUT + at[:, None] * D + dim[None, :]
    tl.store(pointers, (out / total[:, None]).to(PAIR_OUT.dtype.element_ty), mask=ok[:, None] & (dim < D)[None, :])
    tl.store(GROUP_LOGIT + at, landmark, mask=ok)
