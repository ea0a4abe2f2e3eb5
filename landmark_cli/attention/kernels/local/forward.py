"""The forward kernel: one program takes a tile of queries and walks over the keys that one of them may see."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.logits import capped
from ..common.softmax import before_blocks, tile_logits
from ..common.tiles import LN2, load_tile, store_tile
from .tiles import key_tile, query_tile, sees


@triton.jit(do_not_specialize=["queries", "offset", "tiles", "query_heads", "first_stride", "text_stride"])
def forward_kernel(Q, K, V, OUT, LSE, FIRST, TEXT, SINKS, q_strides, k_strides, v_strides, out_strides, first_stride,
                   text_stride, scaling, queries, offset, tiles, query_heads,
                   HEADS_PER_KEY: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
                   COLS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """OUT (B, H, queries, D) and LSE (B, H, queries), natural, of the queries behind `offset` keys.

    FIRST, TEXT: see tiles.py. SINKS: (H,) natural logits of keys without values, or None. scaling: see
    common/logits.py. Strides are (batch, head, token) in elements. Programs of one tile, whose heads share keys, come
    one after the other.
    """
    program = tl.program_id(0)
    query_head = (program % query_heads).to(tl.int64)
    row = program // query_heads % tiles * ROWS
    batch = (program // query_heads // tiles).to(tl.int64)
    rows, row_ok, index, first = query_tile(FIRST, first_stride, batch, row, queries, offset, ROWS)  # (ROWS,) each
    dim = tl.arange(0, DIM)  # (DIM,)
    col = tl.arange(0, COLS)  # (COLS,)
    q_base = Q + batch * q_strides[0] + query_head * q_strides[1]
    q = load_tile(q_base, row, q_strides[2], rows, row_ok, dim, D, True)  # (ROWS, DIM)
    k_base = K + batch * k_strides[0] + query_head // HEADS_PER_KEY * k_strides[1]
    v_base = V + batch * v_strides[0] + query_head // HEADS_PER_KEY * v_strides[1]

    scale = scaling[0]
    top, total = before_blocks(SINKS, query_head, ROWS)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    keys = queries + offset
    begin = tl.min(first, 0) // COLS * COLS
    for start in tl.range(begin, tl.minimum(row + ROWS, queries) + offset, COLS):
        key, text = key_tile(TEXT, text_stride, batch, start, keys, COLS)  # (COLS,) each
        s, _ = tile_logits(q, k_base, k_strides[2], start, keys, col, dim, D, True, PRECISION)  # (ROWS, COLS)
        s = capped(s, scaling)
        s = tl.where(sees(index[:, None], first[:, None], key[None, :], text[None, :]), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)  # (ROWS,)
        rescale = tl.exp2(top - new_top)
        p = tl.exp2(s * scale - new_top[:, None])  # (ROWS, COLS)
        total = total * rescale + tl.sum(p, 1)
        v = load_tile(v_base, start, v_strides[2], col, key < keys, dim, D, True)  # (COLS, DIM)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        top = new_top

    # Every query sees itself, so only rows that are not there have seen nothing.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_base = OUT + batch * out_strides[0] + query_head * out_strides[1]
    store_tile(out_base, row, out_strides[2], rows, row_ok, dim, acc, D)
    lse_row = (batch * query_heads + query_head) * queries + row
    tl.store(LSE + lse_row + rows, (top + tl.log2(total)) * LN2, mask=row_ok)
