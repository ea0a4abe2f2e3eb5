"""The forward kernel: one program takes a tile of landmarks and walks over the text before them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.tiles import FLOOR, LN2, LOG2E, load_tile, store_tile


@triton.jit
def masked_logits(q, k, landmark, key, scale, TEXT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Base-2 logits (ROWS, COLS) of landmarks (ROWS,) and keys (COLS,); MASKED: minus infinity of later text."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    if MASKED:
        s = tl.where(key[None, :] < ((landmark + 1) * TEXT)[:, None], s, float("-inf"))
    return s


@triton.jit
def spans(first, last, TEXT: tl.constexpr, COLS: tl.constexpr):
    """Keys that all of the landmarks first..last see, in whole tiles, and those that one of them sees."""
    return (first + 1) * TEXT // COLS * COLS, (last + 1) * TEXT


@triton.jit
def attend_tile(q, top, total, acc, keys, start, landmark, scale, TEXT: tl.constexpr, D: tl.constexpr,
                MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(top, total, acc) of a softmax by rows, after the keys from `start` on. keys: (K, V, their strides from token to
    token, how many there are, a tile's columns (COLS,), dimensions (DIM,))."""
    k_base, v_base, k_stride, v_stride, count, col, dim = keys
    key_ok = start + col < count
    k = load_tile(k_base, start, k_stride, col, key_ok, dim, D, MASKED)  # (COLS, DIM), as v
    s = masked_logits(q, k, landmark, start + col, scale, TEXT, MASKED, PRECISION)  # (ROWS, COLS), as p
    new_top = tl.maximum(top, tl.max(s, 1))  # (ROWS,)
    rescale = tl.exp2(top - new_top)
    p = tl.exp2(s - new_top[:, None])
    v = load_tile(v_base, start, v_stride, col, key_ok, dim, D, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return new_top, total * rescale + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["landmarks", "heads"])
def forward_kernel(Q, K, V, OUT, LSE, q_strides, k_strides, v_strides, out_strides, scale, landmarks, heads,
                   HEADS_PER_KEY: tl.constexpr, TEXT: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
                   ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """OUT (B, H, N, D) and LSE (B, H, N), natural, of N = `landmarks` queries, the i-th of which sees the first
    (i + 1) * TEXT of the keys K (B, G, N * TEXT, D). Strides are (batch, head, token) in elements; programs (tiles of
    landmarks, B * H), those with most to read first."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.arange(0, ROWS)  # (ROWS,), as row_ok
    row_ok = row + rows < landmarks
    dim = tl.arange(0, DIM)  # (DIM,)
    q = load_tile(Q + batch * q_strides[0] + head * q_strides[1], row, q_strides[2], rows, row_ok, dim, D, True)
    k_base = K + batch * k_strides[0] + head // HEADS_PER_KEY * k_strides[1]
    v_base = V + batch * v_strides[0] + head // HEADS_PER_KEY * v_strides[1]
    keys = (k_base, v_base, k_strides[2], v_strides[2], landmarks * TEXT, tl.arange(0, COLS), dim)

    top = tl.zeros([ROWS], tl.float32) + FLOOR
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    whole, end = spans(row, tl.minimum(row + ROWS, landmarks) - 1, TEXT, COLS)
    for start in tl.range(0, whole, COLS):
        top, total, acc = attend_tile(q, top, total, acc, keys, start, row + rows, scale, TEXT, D, False, PRECISION)
    for start in tl.range(whole, end, COLS, num_stages=1):
        top, total, acc = attend_tile(q, top, total, acc, keys, start, row + rows, scale, TEXT, D, True, PRECISION)

    out_base = OUT + batch * out_strides[0] + head * out_strides[1]
    store_tile(out_base, row, out_strides[2], rows, row_ok, dim, acc / total[:, None], D)
    tl.store(LSE + tl.program_id(1).to(tl.int64) * landmarks + row + rows, (top + tl.log2(total)) * LN2, mask=row_ok)
