"""The two backward kernels: by landmarks for queries' gradients, by tiles of text for those of keys and values.

With dP = dO V^T and delta = rowsum(dO * O): dS = P (dP - delta). Nothing is added atomically: results repeat bit by
bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.tiles import LOG2E, load_tile, store_tile
from .forward import masked_logits, spans


@triton.jit
def query_gradient_tile(q, dout, lse, delta, dq, keys, start, landmark, scale, TEXT: tl.constexpr, D: tl.constexpr,
                        MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dq (ROWS, DIM) after the keys from `start` on, less a factor of scale. lse (base 2), delta: (ROWS,). keys: as in
    forward.attend_tile."""
    k_base, v_base, k_stride, v_stride, count, col, dim = keys
    key_ok = start + col < count
    k = load_tile(k_base, start, k_stride, col, key_ok, dim, D, MASKED)  # (COLS, DIM), as v
    v = load_tile(v_base, start, v_stride, col, key_ok, dim, D, MASKED)
    s = masked_logits(q, k, landmark, start + col, scale, TEXT, MASKED, PRECISION)  # (ROWS, COLS), as dp and ds
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["landmarks", "heads"])
def query_gradient_kernel(Q, K, V, DOUT, LSE, DELTA, DQ, q_strides, k_strides, v_strides, dout_strides, dq_strides,
                          scale, landmarks, heads,
                          HEADS_PER_KEY: tl.constexpr, TEXT: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
                          ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """DQ (B, H, N, D); LSE (natural) and DELTA: (B, H, N) float32. The rest: see forward.forward_kernel."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.arange(0, ROWS)  # (ROWS,), as row_ok
    row_ok = row + rows < landmarks
    dim = tl.arange(0, DIM)  # (DIM,)
    q = load_tile(Q + batch * q_strides[0] + head * q_strides[1], row, q_strides[2], rows, row_ok, dim, D, True)
    dout_base = DOUT + batch * dout_strides[0] + head * dout_strides[1]
    dout = load_tile(dout_base, row, dout_strides[2], rows, row_ok, dim, D, True)  # (ROWS, DIM), as q and dq
    numbers = tl.program_id(1).to(tl.int64) * landmarks + row + rows
    lse = tl.load(LSE + numbers, mask=row_ok, other=0.0) * LOG2E
    delta = tl.load(DELTA + numbers, mask=row_ok, other=0.0)
    k_base = K + batch * k_strides[0] + head // HEADS_PER_KEY * k_strides[1]
    v_base = V + batch * v_strides[0] + head // HEADS_PER_KEY * v_strides[1]
    keys = (k_base, v_base, k_strides[2], v_strides[2], landmarks * TEXT, tl.arange(0, COLS), dim)

    dq = tl.zeros([ROWS, DIM], tl.float32)
    whole, end = spans(row, tl.minimum(row + ROWS, landmarks) - 1, TEXT, COLS)
    for start in tl.range(0, whole, COLS):
        dq = query_gradient_tile(q, dout, lse, delta, dq, keys, start, row + rows, scale, TEXT, D, False, PRECISION)
    for start in tl.range(whole, end, COLS, num_stages=1):
        dq = query_gradient_tile(q, dout, lse, delta, dq, keys, start, row + rows, scale, TEXT, D, True, PRECISION)
    store_tile(DQ + batch * dq_strides[0] + head * dq_strides[1], row, dq_strides[2], rows, row_ok, dim, dq * scale, D)


@triton.jit(do_not_specialize=["landmarks", "heads", "key_heads"])
def key_gradient_kernel(Q, K, V, DOUT, LSE, DELTA, DK, DV, q_strides, k_strides, v_strides, dout_strides, dk_strides,
                        dv_strides, scale, landmarks, heads, key_heads,
                        HEADS_PER_KEY: tl.constexpr, TEXT: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
                        ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """DK, DV (B, G, N * TEXT, D); programs (tiles of text, B * G), each of which takes the landmarks behind its first
    key, of its key head's query heads one after the other. The rest: see query_gradient_kernel."""
    start = tl.program_id(0) * COLS
    batch = (tl.program_id(1) // key_heads).to(tl.int64)
    key_head = (tl.program_id(1) % key_heads).to(tl.int64)
    col = tl.arange(0, COLS)  # (COLS,), as key_ok
    key_ok = start + col < landmarks * TEXT
    rows = tl.arange(0, ROWS)  # (ROWS,)
    dim = tl.arange(0, DIM)  # (DIM,)
    k_base = K + batch * k_strides[0] + key_head * k_strides[1]
    v_base = V + batch * v_strides[0] + key_head * v_strides[1]
    k = load_tile(k_base, start, k_strides[2], col, key_ok, dim, D, True)  # (COLS, DIM), as v, dk and dv
    v = load_tile(v_base, start, v_strides[2], col, key_ok, dim, D, True)
    dk = tl.zeros([COLS, DIM], tl.float32)
    dv = tl.zeros([COLS, DIM], tl.float32)

    for member in range(HEADS_PER_KEY):
        head = key_head * HEADS_PER_KEY + member
        q_base = Q + batch * q_strides[0] + head * q_strides[1]
        dout_base = DOUT + batch * dout_strides[0] + head * dout_strides[1]
        first = (batch * heads + head) * landmarks
        for row in tl.range(start // TEXT, landmarks, ROWS):
            row_ok = row + rows < landmarks  # (ROWS,), as lse and delta
            q = load_tile(q_base, row, q_strides[2], rows, row_ok, dim, D, True)  # (ROWS, DIM), as dout
            dout = load_tile(dout_base, row, dout_strides[2], rows, row_ok, dim, D, True)
            lse = tl.load(LSE + first + row + rows, mask=row_ok, other=0.0) * LOG2E
            delta = tl.load(DELTA + first + row + rows, mask=row_ok, other=0.0)
            s = masked_logits(q, k, row + rows, start + col, scale, TEXT, True, PRECISION)  # (ROWS, COLS), as p and ds
            p = tl.exp2(s - lse[:, None])
            dv = tl.dot(tl.trans(p.to(dout.dtype)), dout, dv, input_precision=PRECISION)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)

    dk_base = DK + batch * dk_strides[0] + key_head * dk_strides[1]
    dv_base = DV + batch * dv_strides[0] + key_head * dv_strides[1]
    store_tile(dk_base, start, dk_strides[2], col, key_ok, dim, dk * scale, D)
    store_tile(dv_base, start, dv_strides[2], col, key_ok, dim, dv, D)
