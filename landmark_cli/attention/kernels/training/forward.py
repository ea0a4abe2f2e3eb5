"""The forward kernel: one program takes a tile of query rows and walks over the blocks of keys.

Two observations make it one loop. An in-block softmax is complete inside a block's tile of keys, so only the outer
softmax runs online. And with g = the landmark's logit for an earlier block, g = log-sum-exp of the visible text for the
own one, the output is the sum over blocks of softmax(g) * in-block softmax * V, whichever kind a block is: so rows of
one tile may stand in different blocks, and a block need not be a power of two.

Source: arXiv 2305.16300, section 3.1. Logits are kept times log2(e): exp2 is what the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.tiles import FLOOR, PACKED, dropout_factor, launch_order, load_tile, query_blocks, query_tile, store_tile


@triton.jit
def tile_logits(q, base, stride, first, keys_left, col, dim, D: tl.constexpr, MASKED: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """(q k^T, k) for a tile of queries and the tile of keys that begins at `first`."""
    k = load_tile(base, first, stride, col, first + col < keys_left, dim, D, MASKED)
    return tl.dot(q, tl.trans(k), input_precision=PRECISION), k


@triton.jit
def text_and_landmark(s, start, col, position, scale, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(logits of visible text, minus infinity elsewhere; the scaled logit of the landmark where it is among the keys).

    start: position of the block's first key; col: of each key in the block.
    """
    landmark = tl.max(tl.where(col[None, :] == BLOCK - 1, s, float("-inf")), 1) * scale
    text = col[None, :] < BLOCK - 1
    if MASKED:
        text = text & (start + col[None, :] <= position[:, None])
    return tl.where(text, s, float("-inf")), landmark


@triton.jit
def attend_block(q, top, total, acc, keys, block, position, row_number, scale, dropout, BLOCK: tl.constexpr,
                 D: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr, DROPOUT: tl.constexpr,
                 MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add one block to a tile's online outer softmax: (top, total, acc) are its maximum, sum and output.

    MASKED: rows may stand in this block or before it, and the block may be incomplete.
    """
    k_base, v_base, k_stride, v_stride, keys_left, col, dim = keys
    start = block * BLOCK
    if SPLIT == 1:
        s, _ = tile_logits(q, k_base, k_stride, start, keys_left, col, dim, D, MASKED, PRECISION)
        s, landmark = text_and_landmark(s, start, col, position, scale, BLOCK, MASKED)
        inner_top = tl.max(s, 1) * scale
        if MASKED:
            inner_top = tl.maximum(inner_top, FLOOR)
        p = tl.exp2(s * scale - inner_top[:, None])
        inner = tl.sum(p, 1)
    else:
        # The block is too wide for one tile: its maximum and sum first, and the logits once more below.
        inner_top = tl.zeros_like(top) + FLOOR
        inner = tl.zeros_like(top)
        landmark = tl.zeros_like(top) + float("-inf")
        for part in tl.range(SPLIT, num_stages=1):
            first = start + part * COLS
            s, _ = tile_logits(q, k_base, k_stride, first, keys_left, col, dim, D, MASKED, PRECISION)
            s, found = text_and_landmark(s, start, part * COLS + col, position, scale, BLOCK, MASKED)
            landmark = tl.maximum(landmark, found)
            higher = tl.maximum(inner_top, tl.max(s, 1) * scale)
            inner = inner * tl.exp2(inner_top - higher) + tl.sum(tl.exp2(s * scale - higher[:, None]), 1)
            inner_top = higher

    earlier = position >= start + BLOCK
    group = landmark
    if MASKED:
        group = tl.where(earlier, landmark, inner_top + tl.log2(inner))
        inner = tl.where(inner > 0, inner, 1.0)
    higher = tl.maximum(top, group)
    fade = tl.exp2(top - higher)
    outer = tl.exp2(group - higher)
    total = total * fade + outer
    acc = acc * fade[:, None]
    share = outer / inner
    if DROPOUT:
        share = tl.where(earlier, share * dropout_factor(dropout, row_number, block), share)

    if SPLIT == 1:
        v = load_tile(v_base, start, v_stride, col, start + col < keys_left, dim, D, MASKED)
        acc = tl.dot((p * share[:, None]).to(v.dtype), v, acc, input_precision=PRECISION)
    else:
        for part in tl.range(SPLIT, num_stages=1):
            first = start + part * COLS
            s, _ = tile_logits(q, k_base, k_stride, first, keys_left, col, dim, D, MASKED, PRECISION)
            s, _ = text_and_landmark(s, start, part * COLS + col, position, scale, BLOCK, MASKED)
            p = tl.exp2(s * scale - inner_top[:, None]) * share[:, None]
            v = load_tile(v_base, first, v_stride, col, first + col < keys_left, dim, D, MASKED)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return higher, total, acc


@triton.jit(do_not_specialize=["queries", "offset", "documents", "tiles", "heads", "query_heads", "heads_in_flight",
                               "threshold"])  # fmt: skip
def forward_kernel(Q, K, V, OUT, LSE, BOUNDS, SEED, q_strides, k_strides, v_strides, out_strides, scale, queries,
                   offset, documents, tiles, heads, query_heads, heads_in_flight, threshold, keep_scale,
                   GROUP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
                   COLS: tl.constexpr, SPLIT: tl.constexpr, LAYOUT: tl.constexpr, DROPOUT: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """OUT (B, H, queries, D) and LSE (B, H, queries), natural, of the queries behind `offset` keys.

    heads = B * H programs a tile; GROUP query heads share a key head. Strides are (batch, head, token) in elements; a
    token's is a constant, since it does not change with the input's length and then costs neither registers nor time.
    """
    rank, head = launch_order(tiles, heads, heads_in_flight)
    batch = head // query_heads
    begin, row, row_end = query_tile(BOUNDS, documents, tiles - 1 - rank, batch, offset, 0, queries, ROWS, LAYOUT)
    if LAYOUT == PACKED:
        if row >= row_end:
            return
    rows = tl.arange(0, ROWS)
    row_ok = row + rows < row_end
    position = row + rows + (offset - begin)
    keys_left = queries + offset - begin
    dim = tl.arange(0, DIM)

    batch = batch.to(tl.int64)
    query_head = (head % query_heads).to(tl.int64)
    key_head = query_head // GROUP
    k_base = K + batch * k_strides[0] + key_head * k_strides[1] + tl.cast(begin, tl.int64) * k_strides[2]
    v_base = V + batch * v_strides[0] + key_head * v_strides[1] + tl.cast(begin, tl.int64) * v_strides[2]
    keys = (k_base, v_base, k_strides[2], v_strides[2], keys_left, tl.arange(0, COLS), dim)
    q_base = Q + batch * q_strides[0] + query_head * q_strides[1]
    q = load_tile(q_base, row, q_strides[2], rows, row_ok, dim, D, True)

    lse_row = head.to(tl.int64) * queries + row
    row_number = (lse_row + rows).to(tl.uint32)
    dropout = (0, threshold, keep_scale)
    if DROPOUT:
        dropout = (tl.load(SEED), threshold, keep_scale)
    top = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    last = tl.minimum(row + ROWS, row_end) - 1 + offset - begin
    whole, touched = query_blocks(row + offset - begin, last, keys_left, BLOCK, COLS * SPLIT)
    for block in tl.range(0, whole):
        top, total, acc = attend_block(q, top, total, acc, keys, block, position, row_number, scale, dropout,
                                       BLOCK, D, COLS, SPLIT, DROPOUT, False, PRECISION)  # fmt: skip
    for block in tl.range(whole, touched, num_stages=1):
        top, total, acc = attend_block(q, top, total, acc, keys, block, position, row_number, scale, dropout,
                                       BLOCK, D, COLS, SPLIT, DROPOUT, True, PRECISION)  # fmt: skip

    # A row of padding has seen nothing: 0 and minus infinity.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    lse = (top + tl.log2(total)) * 0.6931471805599453
    out_base = OUT + batch * out_strides[0] + query_head * out_strides[1]
    store_tile(out_base, row, out_strides[2], rows, row_ok, dim, acc, D)
    tl.store(LSE + lse_row + rows, lse, mask=row_ok)
