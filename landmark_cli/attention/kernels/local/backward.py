"""The two backward kernels. Nothing is added atomically: results repeat bit by bit.

With dP = dO V^T and delta = rowsum(dO * O), dS = p (dP - delta), and a sink's is -p delta, for it has no value. Where
logits are soft-capped, dS is times the cap's slope before it reaches queries and keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.logits import before_cap, capped
from ..common.softmax import tile_logits
from ..common.tiles import LOG2E, load_tile, store_tile
from .tiles import key_tile, query_tile, sees


@triton.jit(do_not_specialize=["queries", "offset", "tiles", "query_heads", "first_stride", "text_stride"])
def query_gradient_kernel(Q, K, V, OUT, DOUT, LSE, DQ, DELTA, FIRST, TEXT, q_strides, k_strides, v_strides,
                          out_strides, dout_strides, dq_strides, first_stride, text_stride, scaling, softmax_scale,
                          queries, offset, tiles, query_heads,
                          HEADS_PER_KEY: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
                          COLS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """DQ (B, H, queries, D), and DELTA (B, H, queries) for the second kernel; programs as in the forward kernel."""
    program = tl.program_id(0)
    query_head = (program % query_heads).to(tl.int64)
    row = program // query_heads % tiles * ROWS
    batch = (program // query_heads // tiles).to(tl.int64)
    rows, row_ok, index, first = query_tile(FIRST, first_stride, batch, row, queries, offset, ROWS)  # (ROWS,) each
    dim = tl.arange(0, DIM)  # (DIM,)
    col = tl.arange(0, COLS)  # (COLS,)
    q_base = Q + batch * q_strides[0] + query_head * q_strides[1]
    q = load_tile(q_base, row, q_strides[2], rows, row_ok, dim, D, True)  # (ROWS, DIM), as dout and out
    dout_base = DOUT + batch * dout_strides[0] + query_head * dout_strides[1]
    dout = load_tile(dout_base, row, dout_strides[2], rows, row_ok, dim, D, True)
    out_base = OUT + batch * out_strides[0] + query_head * out_strides[1]
    out = load_tile(out_base, row, out_strides[2], rows, row_ok, dim, D, True)
    k_base = K + batch * k_strides[0] + query_head // HEADS_PER_KEY * k_strides[1]
    v_base = V + batch * v_strides[0] + query_head // HEADS_PER_KEY * v_strides[1]
    lse_row = (batch * query_heads + query_head) * queries + row
    lse = tl.load(LSE + lse_row + rows, mask=row_ok, other=0.0) * LOG2E  # (ROWS,), as delta
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(DELTA + lse_row + rows, delta, mask=row_ok)

    dq = tl.zeros([ROWS, DIM], tl.float32)
    keys = queries + offset
    begin = tl.min(first, 0) // COLS * COLS
    for start in tl.range(begin, tl.minimum(row + ROWS, queries) + offset, COLS):
        key, text = key_tile(TEXT, text_stride, batch, start, keys, COLS)  # (COLS,) each
        dp, _ = tile_logits(dout, v_base, v_strides[2], start, keys, col, dim, D, True, PRECISION)  # (ROWS, COLS)
        s, k = tile_logits(q, k_base, k_strides[2], start, keys, col, dim, D, True, PRECISION)  # and (COLS, DIM)
        s = capped(s, scaling)
        p = tl.exp2(s * scaling[0] - lse[:, None])  # (ROWS, COLS), as ds
        p = tl.where(sees(index[:, None], first[:, None], key[None, :], text[None, :]), p, 0.0)
        ds = before_cap(p * (dp - delta[:, None]), s, scaling)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_base = DQ + batch * dq_strides[0] + query_head * dq_strides[1]
    store_tile(dq_base, row, dq_strides[2], rows, row_ok, dim, dq * softmax_scale, D)


@triton.jit(do_not_specialize=["queries", "offset", "tiles", "key_heads", "first_stride", "text_stride"])
def key_gradient_kernel(Q, K, V, DOUT, LSE, DELTA, DK, DV, FIRST, TEXT, LAST, q_strides, k_strides, v_strides,
                        dout_strides, dk_strides, dv_strides, first_stride, text_stride, scaling, softmax_scale,
                        queries, offset, tiles, key_heads,
                        HEADS_PER_KEY: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
                        COLS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """DK and DV (B, G, queries + offset, D): a program takes a tile of keys and the key head's query heads one after
    the other. LAST: of each key the end of the queries that may see it, which never falls from key to key; its rows are
    as long and as far apart as those of TEXT. Everything stands transposed: keys by rows."""
    program = tl.program_id(0)
    key_head = (program % key_heads).to(tl.int64)
    start = program // key_heads % tiles * COLS
    batch = (program // key_heads // tiles).to(tl.int64)
    keys = queries + offset
    key, text = key_tile(TEXT, text_stride, batch, start, keys, COLS)  # (COLS,) each
    dim = tl.arange(0, DIM)  # (DIM,)
    col = tl.arange(0, COLS)  # (COLS,)
    k_base = K + batch * k_strides[0] + key_head * k_strides[1]
    v_base = V + batch * v_strides[0] + key_head * v_strides[1]
    k = load_tile(k_base, start, k_strides[2], col, key < keys, dim, D, True)  # (COLS, DIM), as v, dk, dv
    v = load_tile(v_base, start, v_strides[2], col, key < keys, dim, D, True)
    dk = tl.zeros([COLS, DIM], tl.float32)
    dv = tl.zeros([COLS, DIM], tl.float32)

    begin = tl.maximum(start - offset, 0) // ROWS * ROWS
    behind = tl.minimum(start + COLS, keys)
    # The last key's own query sees it, whatever its first key is.
    end = tl.maximum(tl.load(LAST + batch * text_stride + behind - 1), behind - offset)
    for member in range(HEADS_PER_KEY):
        query_head = key_head * HEADS_PER_KEY + member
        q_base = Q + batch * q_strides[0] + query_head * q_strides[1]
        dout_base = DOUT + batch * dout_strides[0] + query_head * dout_strides[1]
        lse_row = (batch * key_heads * HEADS_PER_KEY + query_head) * queries
        for row in tl.range(begin, end, ROWS):
            rows, row_ok, index, first = query_tile(FIRST, first_stride, batch, row, queries, offset, ROWS)
            q = load_tile(q_base, row, q_strides[2], rows, row_ok, dim, D, True)  # (ROWS, DIM), as dout
            dout = load_tile(dout_base, row, dout_strides[2], rows, row_ok, dim, D, True)
            lse = tl.load(LSE + lse_row + row + rows, mask=row_ok, other=0.0) * LOG2E  # (ROWS,), as delta
            delta = tl.load(DELTA + lse_row + row + rows, mask=row_ok, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (COLS, ROWS), as p, dp and ds
            s = capped(s, scaling)
            p = tl.exp2(s * scaling[0] - lse[None, :])
            p = tl.where(sees(index[None, :], first[None, :], key[:, None], text[:, None]), p, 0.0)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            ds = before_cap(p * (dp - delta[None, :]), s, scaling)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    dk_base = DK + batch * dk_strides[0] + key_head * dk_strides[1]
    dv_base = DV + batch * dv_strides[0] + key_head * dv_strides[1]
    store_tile(dk_base, start, dk_strides[2], col, key < keys, dim, dk * softmax_scale, D)
    store_tile(dv_base, start, dv_strides[2], col, key < keys, dim, dv, D)
