"""The forward kernel: one program takes a tile of query rows and walks over the blocks of keys.

Source: arXiv 2305.16300, section 3.1; common/softmax.py has what is done with a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.softmax import attend_block, before_blocks
from ..common.tiles import LN2, load_tile, store_tile
from .tiles import PACKED, launch_order, query_blocks, query_rows, query_tile


@triton.jit(do_not_specialize=["queries", "offset", "documents", "tiles", "heads", "query_heads", "heads_in_flight",
                               "threshold"])  # fmt: skip
def forward_kernel(Q, K, V, OUT, LSE, BOUNDS, SEED, SINKS, q_strides, k_strides, v_strides, out_strides, scaling,
                   queries, offset, documents, tiles, heads, query_heads, heads_in_flight, threshold, keep_scale,
                   HEADS_PER_KEY: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
                   ROWS: tl.constexpr, COLS: tl.constexpr, KEY_TILES: tl.constexpr, LAYOUT: tl.constexpr,
                   DROPOUT: tl.constexpr, JOINT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """OUT (B, H, queries, D) and LSE (B, H, queries), natural, of the queries behind `offset` keys.

    SINKS: (H,) natural logits of keys without values, one in each head's outer softmax; None: no such keys. scaling:
    see common/logits.py. heads = B * H programs a tile. D dimensions fill DIM columns, a block's keys KEY_TILES tiles
    of COLS. Strides are (batch, head, token) in elements; a token's is a constant, since it does not change with the
    input's length and then costs neither registers nor time.
    """
    rank, head = launch_order(tiles, heads, heads_in_flight)
    batch = head // query_heads
    begin, row, row_end = query_tile(BOUNDS, documents, tiles - 1 - rank, batch, offset, 0, queries, ROWS, LAYOUT)
    if LAYOUT == PACKED:
        if row >= row_end:
            return
    batch, query_head, rows, row_ok, position, dim, keys = query_rows(
        K, V, k_strides, v_strides, batch, head, query_heads, begin, row, row_end, offset, queries, HEADS_PER_KEY,
        ROWS, COLS, DIM,
    )  # fmt: skip
    q_base = Q + batch * q_strides[0] + query_head * q_strides[1]
    q = load_tile(q_base, row, q_strides[2], rows, row_ok, dim, D, True)  # (ROWS, DIM)

    lse_row = head.to(tl.int64) * queries + row
    row_number = (lse_row + rows).to(tl.uint32)  # (ROWS,)
    dropout = (0, threshold, keep_scale)
    if DROPOUT:
        dropout = (tl.load(SEED), threshold, keep_scale)
    top, total = before_blocks(SINKS, query_head, ROWS)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    last = tl.minimum(row + ROWS, row_end) - 1 + offset - begin
    whole, touched = query_blocks(row + offset - begin, last, queries + offset - begin, BLOCK, COLS * KEY_TILES)
    for block in tl.range(0, whole):
        top, total, acc = attend_block(q, top, total, acc, keys, block, position, row_number, scaling, dropout,
                                       BLOCK, D, COLS, KEY_TILES, DROPOUT, JOINT, False, PRECISION)  # fmt: skip
    for block in tl.range(whole, touched, num_stages=1):
        top, total, acc = attend_block(q, top, total, acc, keys, block, position, row_number, scaling, dropout,
                                       BLOCK, D, COLS, KEY_TILES, DROPOUT, JOINT, True, PRECISION)  # fmt: skip

    # A row of padding has seen nothing: 0 and minus infinity, or with a sink its logit.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    lse = (top + tl.log2(total)) * LN2
    out_base = OUT + batch * out_strides[0] + query_head * out_strides[1]
    store_tile(out_base, row, out_strides[2], rows, row_ok, dim, acc, D)
    tl.store(LSE + lse_row + rows, lse, mask=row_ok)
