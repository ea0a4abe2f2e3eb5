"""Attention of a chunk to its tail block and to itself, and merging the retrieved blocks into it.

The online outer softmax that walks over the chunk's own blocks begins with the retrieved ones, each with its logit: so
the local part is never written. Source: arXiv 2305.16300, section 3; common/softmax.py has what is done with a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.softmax import attend_block, before_blocks
from ..common.tiles import load_tile
from .parts import cache_row, counts_of


@triton.jit
def add_pairs(PAIR_OUT, OUTER_LOGIT, rows, real, dim, top, total, acc, RETRIEVED: tl.constexpr, D: tl.constexpr):
    """Add RETRIEVED pairs of each query to the online outer softmax of a tile: (top, total, acc) are its maximum, sum,
    (ROWS,) each, and output, (ROWS, D_PAD). rows: (ROWS,), where the queries stand in PAIR_OUT (.., RETRIEVED, D) and
    OUTER_LOGIT (.., RETRIEVED); the logit is minus infinity where there is no pair."""
    for j in tl.range(RETRIEVED, num_stages=3):
        logit = tl.load(OUTER_LOGIT + rows * RETRIEVED + j, mask=real, other=float("-inf"))  # (ROWS,)
        pointers = PAIR_OUT + (rows * RETRIEVED + j)[:, None] * D + dim[None, :]  # (ROWS, D_PAD), as pair
        pair = tl.load(pointers, mask=real[:, None] & (dim < D)[None, :], other=0.0)
        pair = tl.where((logit > float("-inf"))[:, None], pair, 0.0).to(tl.float32)
        new_top = tl.maximum(top, logit)
        rescale = tl.exp2(top - new_top)
        share = tl.exp2(logit - new_top)
        acc = acc * rescale[:, None] + pair * share[:, None]
        total = total * rescale + share
        top = new_top
    return top, total, acc


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity"])
def merge_kernel(Q, K, V, BLOCKS, COUNTERS, PAIR_OUT, OUTER_LOGIT, LSE, OUT, SINKS, q_strides, k_strides,
                 v_strides, out_strides, tokens, batch, heads, capacity, scaling,
                 HEADS_PER_KEY: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, RETRIEVED: tl.constexpr,
                 BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, KEY_TILES: tl.constexpr,
                 PRECISION: tl.constexpr, JOINT: tl.constexpr):  # fmt: skip
    """OUT (B, H, T, D) and, unless None, LSE (B, H, T), the log-sum-exp (base 2) of the outer softmax.

    BLOCKS holds the tail block already. RETRIEVED: pairs a query in PAIR_OUT (B, H, T, RETRIEVED, D) and OUTER_LOGIT.
    A block's keys fill KEY_TILES tiles of COLS. SINKS: (H,) natural logits of keys without values, or None. scaling:
    see common/logits.py, JOINT: common/softmax.py. Program (tile of rows, head).
    """
    # The last rows have most to do: they go first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    batch_row = tl.cast(head // (heads * HEADS_PER_KEY), tl.int64)
    query_head = (head % (heads * HEADS_PER_KEY)).to(tl.int64)
    key_head = query_head // HEADS_PER_KEY
    start, blocks, tail = counts_of(COUNTERS, batch, batch_row)

    rows = tl.arange(0, ROWS)  # (ROWS,), as row, real and stats
    row = first_row + rows
    real = (row >= start) & (row < tokens)
    shift = tail - start
    dim = tl.arange(0, D_PAD)  # (D_PAD,)
    out_base = OUT + batch_row * out_strides[0] + query_head * out_strides[1]
    stats = tl.cast(head, tl.int64) * tokens + row
    # top, total: (ROWS,); acc: (ROWS, D_PAD).
    top, total = before_blocks(SINKS, query_head, ROWS)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)

    if RETRIEVED > 0:
        # Before the chunk's own blocks: here nothing is multiplied yet, so the output lies as it is best loaded.
        top, total, acc = add_pairs(PAIR_OUT, OUTER_LOGIT, stats, real, dim, top, total, acc, RETRIEVED, D)

    col = tl.arange(0, COLS)  # (COLS,)
    position = tl.where(real, row + shift, -1)  # (ROWS,)
    q_base = Q + batch_row * q_strides[0] + query_head * q_strides[1]
    q = load_tile(q_base, first_row, q_strides[2], rows, real, dim, D, True)  # (ROWS, D_PAD)
    # Where position 0 would be among the chunk's keys: in front of them if there is a tail block.
    k_base = K + batch_row * k_strides[0] + key_head * k_strides[1] - tl.cast(shift, tl.int64) * k_strides[2]
    v_base = V + batch_row * v_strides[0] + key_head * v_strides[1] - tl.cast(shift, tl.int64) * v_strides[2]
    keys_left = tokens + shift
    keys = (k_base, v_base, k_strides[2], v_strides[2], keys_left, col, dim)
    dropout = (0, 0, 0.0)
    # Blocks before every row's own need no mask, as far as whole tiles of keys can be read.
    room = tl.maximum(keys_left - COLS * KEY_TILES + BLOCK, 0)
    whole = tl.minimum(tl.maximum(first_row + shift, 0), room) // BLOCK
    touched = (tl.minimum(first_row + ROWS, tokens) - 1 + shift) // BLOCK + 1
    touched = tl.where(tl.max(real.to(tl.int32), 0) > 0, touched, 0)
    first_block = 0
    if (tail > 0) & (touched > 0):
        # The tail block and what the chunk adds to it lie in the cache.
        row_of_cache = cache_row(COUNTERS, batch, head // (heads * HEADS_PER_KEY)).to(tl.int64)
        page = (row_of_cache * heads + key_head) * capacity + blocks % capacity
        stored = BLOCKS + page * (2 * BLOCK * D)
        stored_keys = (stored, stored + BLOCK * D, D, D, tl.minimum(keys_left, BLOCK), col, dim)
        top, total, acc = attend_block(q, top, total, acc, stored_keys, 0, position, row, scaling, dropout, BLOCK,
                                       D, COLS, KEY_TILES, False, JOINT, True, PRECISION)  # fmt: skip
        first_block = 1
    for block in tl.range(first_block, whole):
        top, total, acc = attend_block(q, top, total, acc, keys, block, position, row, scaling, dropout, BLOCK, D,
                                       COLS, KEY_TILES, False, JOINT, False, PRECISION)  # fmt: skip
    for block in tl.range(tl.maximum(whole, first_block), touched, num_stages=1):
        top, total, acc = attend_block(q, top, total, acc, keys, block, position, row, scaling, dropout, BLOCK, D,
                                       COLS, KEY_TILES, False, JOINT, True, PRECISION)  # fmt: skip

    # Padding has seen nothing: 0.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    pointers = out_base + row[:, None].to(tl.int64) * out_strides[2] + dim[None, :]  # (ROWS, D_PAD)
    tl.store(pointers, acc.to(OUT.dtype.element_ty), mask=(row < tokens)[:, None] & (dim < D)[None, :])
    if LSE is not None:
        tl.store(LSE + stats, top + tl.log2(total), mask=row < tokens)
