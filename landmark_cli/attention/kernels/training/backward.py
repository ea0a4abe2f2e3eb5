"""The two backward kernels.

`query_gradient_kernel` walks like the forward kernel, by rows, and recomputes the in-block softmaxes. For each row and
block it leaves three numbers behind: the shift that makes a logit its weight (weight = exp2(logit + shift)), the
block's delta, which is the mean of dP under its in-block softmax, and the gradient of the landmark logit.
`key_gradient_kernel` walks by blocks over the rows that see them and needs no reduction any more, thanks to these
numbers. Nothing is added atomically: results repeat bit by bit.

With dP = dO V^T, delta = rowsum(dO * O) - dLSE, w = outer(landmark), f = dropout's factor on it:
  earlier block: block_delta = sum(inner * dP), dS = w f inner (dP - block_delta),
                 dS(landmark) = w (f block_delta - delta)
  own block:     dS = outer (dP - delta), dS(landmark) = 0;
  sink:          dS = -outer delta, for it has no value; the others know of it by LSE.
In the joint softmax every block is as the own one: landmarks get no gradient.
Where logits are soft-capped, dS is times the cap's slope before it reaches queries and keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.logits import before_cap, capped
from ..common.softmax import dropout_factor, text_and_landmark, tile_logits
from ..common.statistics import statistics_index
from ..common.tiles import FLOOR, LOG2E, load_tile, store_tile
from .tiles import PACKED, block_tile, launch_order, query_blocks, query_rows, query_tile


@triton.jit
def query_gradient_block(q, dout, lse, delta, dq, keys, STATISTICS, plane, block, position, row_ok, row_number, scaling,
                         dropout, BLOCK: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr, KEY_TILES: tl.constexpr,
                         DROPOUT: tl.constexpr, JOINT: tl.constexpr, MASKED: tl.constexpr,
                         PRECISION: tl.constexpr):  # fmt: skip
    """One block's part of dq for a tile of rows, and its three statistics per row.

    q, dout, dq: (ROWS, DIM); lse (base 2), delta, position, row_ok, row_number, and STATISTICS, pointers to a block's
    first number of each row: (ROWS,). keys, JOINT: as in attend_block.
    """
    k_base, v_base, k_stride, v_stride, keys_left, col, dim = keys
    scale = scaling[0]
    start = block * BLOCK
    earlier = position >= start + BLOCK  # (ROWS,)
    if KEY_TILES == 1:
        # dP comes first: nothing waits for it while the logits' maximum and sum are found.
        dp, _ = tile_logits(dout, v_base, v_stride, start, keys_left, col, dim, D, MASKED, PRECISION)  # (ROWS, COLS)
        s, k = tile_logits(q, k_base, k_stride, start, keys_left, col, dim, D, MASKED, PRECISION)  # and (COLS, DIM)
        products = capped(s, scaling)  # (ROWS, COLS)
        s, landmark = text_and_landmark(products, start, col, position, scale, BLOCK, MASKED)  # (ROWS, COLS), (ROWS,)
        top = lse  # (ROWS,)
        if not JOINT:
            top = tl.max(s, 1) * scale
            if MASKED:
                top = tl.where(earlier, tl.maximum(top, FLOOR), lse)
        p = tl.exp2(s * scale - top[:, None])  # (ROWS, COLS)
        inner = tl.sum(p, 1)  # (ROWS,), as block_delta
        block_delta = tl.sum(p * dp, 1)
    elif JOINT:
        top = lse
    else:
        top = tl.zeros_like(lse) + FLOOR  # (ROWS,), as the next three
        inner = tl.zeros_like(lse)
        block_delta = tl.zeros_like(lse)
        landmark = tl.zeros_like(lse) + float("-inf")
        for part in tl.range(KEY_TILES, num_stages=1):
            first = start + part * COLS
            # (ROWS, COLS), as s and p.
            dp, _ = tile_logits(dout, v_base, v_stride, first, keys_left, col, dim, D, MASKED, PRECISION)
            s, _ = tile_logits(q, k_base, k_stride, first, keys_left, col, dim, D, MASKED, PRECISION)
            s = capped(s, scaling)
            s, found = text_and_landmark(s, start, part * COLS + col, position, scale, BLOCK, MASKED)
            landmark = tl.maximum(landmark, found)
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            rescale = tl.exp2(top - new_top)
            p = tl.exp2(s * scale - new_top[:, None])
            inner = inner * rescale + tl.sum(p, 1)
            block_delta = block_delta * rescale + tl.sum(p * dp, 1)
            top = new_top
        if MASKED:
            top = tl.where(earlier, top, lse)

    # All of these are (ROWS,).
    if JOINT:
        block_delta = delta
        shift = -lse
        share = tl.zeros_like(lse) + 1.0
        dlandmark = tl.zeros_like(lse)
    else:
        if MASKED:
            inner = tl.where(earlier, inner, 1.0)
        block_delta = block_delta / inner
        shift = landmark - lse - top - tl.log2(inner)
        outer = tl.exp2(landmark - lse)
        share = outer / inner
        dlandmark = outer * (block_delta - delta)
        if DROPOUT:
            factor = dropout_factor(dropout, row_number, block)
            shift += tl.log2(factor)
            share *= factor
            dlandmark = outer * (factor * block_delta - delta)
        if MASKED:
            block_delta = tl.where(earlier, block_delta, delta)
            shift = tl.where(earlier, shift, -lse)
            share = tl.where(earlier, share, 1.0)
            dlandmark = tl.where(earlier, dlandmark, 0.0)
    if MASKED:
        row_ok = row_ok & (position >= start)
    # One store of all three, for a store of a row's numbers makes the warps wait for each other.
    numbers = tl.join(tl.join(shift, dlandmark), tl.join(block_delta, block_delta))  # (ROWS, 2, 2)
    numbers = tl.reshape(numbers, [shift.shape[0], 4])
    which = tl.arange(0, 4)[None, :]  # (1, 4)
    tl.store(STATISTICS[:, None] + which * (plane * 4), numbers, mask=row_ok[:, None] & (which < 3))

    if KEY_TILES == 1:
        ds = p * (dp * share[:, None] - (block_delta * share)[:, None])  # (ROWS, COLS)
        ds = before_cap(tl.where(col[None, :] == BLOCK - 1, dlandmark[:, None], ds), products, scaling)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    else:
        for part in tl.range(KEY_TILES, num_stages=1):
            first = start + part * COLS
            # (ROWS, COLS), as s and p.
            dp, _ = tile_logits(dout, v_base, v_stride, first, keys_left, col, dim, D, MASKED, PRECISION)
            s, k = tile_logits(q, k_base, k_stride, first, keys_left, col, dim, D, MASKED, PRECISION)  # and (COLS, DIM)
            products = capped(s, scaling)
            s, _ = text_and_landmark(products, start, part * COLS + col, position, scale, BLOCK, MASKED)
            p = tl.exp2(s * scale - top[:, None])  # (ROWS, COLS), as ds
            ds = p * (dp * share[:, None] - (block_delta * share)[:, None])
            ds = tl.where(part * COLS + col[None, :] == BLOCK - 1, dlandmark[:, None], ds)
            ds = before_cap(ds, products, scaling)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["queries", "offset", "first_row", "last_row", "documents", "tiles", "first_head",
                               "heads", "query_heads", "heads_in_flight", "plane", "threshold"])  # fmt: skip
def query_gradient_kernel(Q, K, V, OUT, DOUT, LSE, DLSE, DQ, STATISTICS, BOUNDS, SEED, DELTA, q_strides, k_strides,
                          v_strides, out_strides, dout_strides, dq_strides, scaling, softmax_scale, queries, offset,
                          first_row, last_row, documents, tiles, first_head, heads, query_heads, heads_in_flight, plane,
                          threshold, keep_scale,
                          HEADS_PER_KEY: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
                          ROWS: tl.constexpr, COLS: tl.constexpr, KEY_TILES: tl.constexpr, LAYOUT: tl.constexpr,
                          DROPOUT: tl.constexpr, JOINT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dq of rows first_row..last_row of `heads` heads from first_head on, and STATISTICS (heads, 3, 4 * plane).

    DELTA (B, H, queries), unless None, becomes these rows' delta."""
    rank, head = launch_order(tiles, heads, heads_in_flight)
    STATISTICS += head.to(tl.int64) * 3 * plane * 4
    head += first_head
    batch = head // query_heads
    begin, row, row_end = query_tile(
        BOUNDS, documents, tiles - 1 - rank, batch, offset, first_row, last_row, ROWS, LAYOUT
    )
    if LAYOUT == PACKED:
        if row >= row_end:
            return
    batch, query_head, rows, row_ok, position, dim, keys = query_rows(
        K, V, k_strides, v_strides, batch, head, query_heads, begin, row, row_end, offset, queries, HEADS_PER_KEY,
        ROWS, COLS, DIM,
    )  # fmt: skip
    q_base = Q + batch * q_strides[0] + query_head * q_strides[1]
    q = load_tile(q_base, row, q_strides[2], rows, row_ok, dim, D, True)  # (ROWS, DIM), as dout and out
    dout_base = DOUT + batch * dout_strides[0] + query_head * dout_strides[1]
    dout = load_tile(dout_base, row, dout_strides[2], rows, row_ok, dim, D, True)
    out_base = OUT + batch * out_strides[0] + query_head * out_strides[1]
    out = load_tile(out_base, row, out_strides[2], rows, row_ok, dim, D, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)  # (ROWS,)

    lse_row = head.to(tl.int64) * queries + row
    row_number = (lse_row + rows).to(tl.uint32)  # (ROWS,)
    lse = tl.load(LSE + lse_row + rows, mask=row_ok, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse * LOG2E)
    if DLSE is not None:
        delta -= tl.load(DLSE + lse_row + rows, mask=row_ok, other=0.0)
    if DELTA is not None:
        tl.store(DELTA + lse_row + rows, delta, mask=row_ok)

    dropout = (0, threshold, keep_scale)
    if DROPOUT:
        dropout = (tl.load(SEED), threshold, keep_scale)
    dq = tl.zeros([ROWS, DIM], tl.float32)
    statistics = STATISTICS + (row - first_row) + rows  # (ROWS,) pointers
    count = last_row - first_row
    before = offset + first_row
    last = tl.minimum(row + ROWS, row_end) - 1 + offset - begin
    whole, touched = query_blocks(row + offset - begin, last, queries + offset - begin, BLOCK, COLS * KEY_TILES)
    for block in tl.range(0, whole):
        at = statistics + statistics_index(block, count, before, BLOCK)
        dq = query_gradient_block(q, dout, lse, delta, dq, keys, at, plane, block, position, row_ok, row_number,
                                  scaling, dropout, BLOCK, D, COLS, KEY_TILES, DROPOUT, JOINT, False,
                                  PRECISION)  # fmt: skip
    for block in tl.range(whole, touched, num_stages=1):
        at = statistics + statistics_index(block, count, before, BLOCK)
        dq = query_gradient_block(q, dout, lse, delta, dq, keys, at, plane, block, position, row_ok, row_number,
                                  scaling, dropout, BLOCK, D, COLS, KEY_TILES, DROPOUT, JOINT, True,
                                  PRECISION)  # fmt: skip

    dq_base = DQ + batch * dq_strides[0] + query_head * dq_strides[1]
    store_tile(dq_base, row, dq_strides[2], rows, row_ok, dim, dq * softmax_scale, D)


@triton.jit
def key_gradient_rows(k, v, dk, dv, queries, STATISTICS, plane, row, row_end, shift, start, col, scaling,
                      BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """Add a tile of query rows to dk and dv of a tile of keys. Everything stands transposed: keys by rows.

    k, v, dk, dv: (COLS, DIM). MASKED: the rows may stand in the block itself or before it, or end. Row r stands at
    position r + shift, the block begins at `start`, col counts its keys. Keys that are no text hold rubbish in dv (and,
    past the block, in dk) until the end, which is safe: a row of a product of matrices never mixes with another.
    """
    q_base, dout_base, q_stride, dout_stride, dim = queries
    position = row + shift
    rows = tl.arange(0, ROWS)  # (ROWS,), as row_ok
    row_ok = (row + rows < row_end) & (position + rows >= start)
    q = load_tile(q_base, row, q_stride, rows, row_ok, dim, D, MASKED)  # (ROWS, DIM), as dout
    dout = load_tile(dout_base, row, dout_stride, rows, row_ok, dim, D, MASKED)
    statistics = STATISTICS + row + rows  # (ROWS,) pointers; what they point to is (ROWS,) too
    if MASKED:
        shift = tl.load(statistics, mask=row_ok, other=float("-inf"))
        block_delta = tl.load(statistics + plane * 4, mask=row_ok, other=0.0)
        dlandmark = tl.load(statistics + 2 * plane * 4, mask=row_ok, other=0.0)
    else:
        shift = tl.load(statistics)
        block_delta = tl.load(statistics + plane * 4)
        dlandmark = tl.load(statistics + 2 * plane * 4)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (COLS, ROWS), as p, dp and ds
    s = capped(s, scaling)
    p = tl.exp2(s * scaling[0] + shift[None, :])
    if MASKED:
        text = (col < BLOCK - 1)[:, None] & ((start + col)[:, None] <= (position + rows)[None, :])  # (COLS, ROWS)
        p = tl.where(text, p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    ds = p * (dp - block_delta[None, :])
    ds = before_cap(tl.where((col == BLOCK - 1)[:, None], dlandmark[None, :], ds), s, scaling)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["queries", "offset", "first_row", "last_row", "documents", "tiles", "first_head",
                               "heads", "key_heads", "heads_in_flight", "plane"])  # fmt: skip
def key_gradient_kernel(Q, K, V, DOUT, DK, DV, STATISTICS, BOUNDS, q_strides, k_strides, v_strides, dout_strides,
                        dk_strides, dv_strides, scaling, softmax_scale, queries, offset, first_row, last_row, documents,
                        tiles, first_head, heads, key_heads, heads_in_flight, plane,
                        HEADS_PER_KEY: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
                        ROWS: tl.constexpr, COLS: tl.constexpr, KEY_TILES: tl.constexpr, LAYOUT: tl.constexpr,
                        ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dk and dv of `heads` key heads from first_head on, from the query rows first_row..last_row.

    Each program takes one of the KEY_TILES tiles of a block and the key head's query heads one after the other.
    ACCUMULATE: add to DK and DV.
    """
    rank, head = launch_order(tiles, heads, heads_in_flight)
    STATISTICS += head.to(tl.int64) * HEADS_PER_KEY * 3 * plane * 4
    head += first_head
    batch = head // key_heads
    begin, start, end = block_tile(BOUNDS, documents, rank // KEY_TILES, batch, queries + offset, BLOCK, LAYOUT)
    col = rank % KEY_TILES * COLS + tl.arange(0, COLS)  # (COLS,), as key_ok
    key_ok = (begin + start + col < end) & (col < BLOCK)
    dim = tl.arange(0, DIM)  # (DIM,)

    batch = batch.to(tl.int64)
    key_head = (head % key_heads).to(tl.int64)
    k_base = K + batch * k_strides[0] + key_head * k_strides[1]
    v_base = V + batch * v_strides[0] + key_head * v_strides[1]
    k = load_tile(k_base, begin + start, k_strides[2], col, key_ok, dim, D, True)  # (COLS, DIM), as v
    v = load_tile(v_base, begin + start, v_strides[2], col, key_ok, dim, D, True)
    dk = tl.zeros([COLS, DIM], tl.float32)
    dv = tl.zeros([COLS, DIM], tl.float32)

    # Rows count from first_row, in whole tiles from a multiple of 4 on. A mask is needed in the tiles that hold the
    # block's own rows and in the last one where it is incomplete; all others lie between.
    shift = offset - begin + first_row
    row_end = tl.minimum(end - offset, last_row) - first_row
    row = tl.maximum(start - shift, 0) // 4 * 4
    own_tiles = tl.cdiv(tl.maximum(tl.minimum(start + BLOCK - shift, row_end) - row, 0), ROWS)
    inner = row + own_tiles * ROWS
    inner_end = inner + tl.maximum(row_end - inner, 0) // ROWS * ROWS
    masked_tiles = own_tiles + (inner_end < row_end).to(tl.int32)
    statistics = STATISTICS + statistics_index(start // BLOCK, last_row - first_row, offset + first_row, BLOCK)
    for member in range(HEADS_PER_KEY):
        query_head = key_head * HEADS_PER_KEY + member
        q_base = Q + batch * q_strides[0] + query_head * q_strides[1] + tl.cast(first_row, tl.int64) * q_strides[2]
        dout_base = DOUT + batch * dout_strides[0] + query_head * dout_strides[1]
        dout_base += tl.cast(first_row, tl.int64) * dout_strides[2]
        rows = (q_base, dout_base, q_strides[2], dout_strides[2], dim)
        for tile in tl.range(0, masked_tiles):
            at = tl.where(tile < own_tiles, row + tile * ROWS, inner_end)
            dk, dv = key_gradient_rows(k, v, dk, dv, rows, statistics, plane, at, row_end, shift, start, col, scaling,
                                       BLOCK, D, ROWS, True, PRECISION)  # fmt: skip
        for at in tl.range(inner, inner_end, ROWS):
            dk, dv = key_gradient_rows(k, v, dk, dv, rows, statistics, plane, at, row_end, shift, start, col, scaling,
                                       BLOCK, D, ROWS, False, PRECISION)  # fmt: skip
        statistics += 3 * plane * 4

    dk_base = DK + batch * dk_strides[0] + key_head * dk_strides[1]
    dv_base = DV + batch * dv_strides[0] + key_head * dv_strides[1]
    dk *= softmax_scale
    dv = tl.where((col == BLOCK - 1)[:, None], 0.0, dv)
    if ACCUMULATE:
        dk += load_tile(dk_base, begin + start, dk_strides[2], col, key_ok, dim, D, True).to(tl.float32)
        dv += load_tile(dv_base, begin + start, dv_strides[2], col, key_ok, dim, D, True).to(tl.float32)
    store_tile(dk_base, begin + start, dk_strides[2], col, key_ok, dim, dk, D)
    store_tile(dv_base, begin + start, dv_strides[2], col, key_ok, dim, dv, D)
