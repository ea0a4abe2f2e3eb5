"""Attention of a chunk to the incomplete block before it and to itself, and merging the retrieved blocks into it.

The online outer softmax that walks over the chunk's own blocks begins with the retrieved ones, each with its
landmark's logit: so the local part is never written. An in-block softmax is complete inside a block, so only the outer
one runs online; with a block's weight the landmark's logit, or for a query's own block the log-sum-exp of the text it
sees, both kinds of block are one case. Source: arXiv 2305.16300, section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import place_of

# Stands for minus infinity where a difference of two of them must not become NaN.
FLOOR = tl.constexpr(-1.0e30)


@triton.jit
def load_rows(base, first, stride, row, row_ok, dim, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows first + row of a matrix at base, 0 where there are none; MASKED: there may be none."""
    pointers = base + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + dim[None, :])
    if MASKED:
        return tl.load(pointers, mask=row_ok[:, None] & (dim < D)[None, :], other=0.0)
    elif D == dim.shape[0]:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(dim < D)[None, :], other=0.0)


@triton.jit
def block_logits(q, k_base, k_stride, start, part, position, keys_left, scale, col, dim, BLOCK: tl.constexpr,
                 D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(logits of the text that is seen, minus infinity elsewhere; the landmark's) of one part of a block's keys."""
    first = start + part * col.shape[0]
    k = load_rows(k_base, first, k_stride, col, first + col < keys_left, dim, D, MASKED)
    col += part * col.shape[0]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    landmark = tl.max(tl.where(col[None, :] == BLOCK - 1, s, float("-inf")), 1)
    seen = col[None, :] < BLOCK - 1
    if MASKED:
        seen = seen & (start + col[None, :] <= position[:, None])
    return tl.where(seen, s, float("-inf")), landmark


@triton.jit
def attend_own(q, top, total, acc, k_base, v_base, k_stride, v_stride, start, position, keys_left, scale, col, dim,
               BLOCK: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, MASKED: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Add the block that begins at position `start` to the outer softmax (its maximum, sum and output so far).

    MASKED: rows may stand in this block or before it, and it may be incomplete. PARTS: tiles that its keys fill.
    """
    if PARTS == 1:
        s, landmark = block_logits(q, k_base, k_stride, start, 0, position, keys_left, scale, col, dim, BLOCK, D,
                                   MASKED, PRECISION)  # fmt: skip
        inner_top = tl.max(s, 1)
        if MASKED:
            inner_top = tl.maximum(inner_top, FLOOR)
        p = tl.exp2(s - inner_top[:, None])
        inner = tl.sum(p, 1)
    else:
        # Too wide for one tile: its maximum and sum first, and the logits once more below.
        inner_top = tl.zeros_like(top) + FLOOR
        inner = tl.zeros_like(top)
        landmark = tl.zeros_like(top) + float("-inf")
        for part in tl.range(PARTS, num_stages=1):
            s, found = block_logits(q, k_base, k_stride, start, part, position, keys_left, scale, col, dim, BLOCK, D,
                                    MASKED, PRECISION)  # fmt: skip
            landmark = tl.maximum(landmark, found)
            higher = tl.maximum(inner_top, tl.max(s, 1))
            inner = inner * tl.exp2(inner_top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
            inner_top = higher

    group = landmark
    if MASKED:
        group = tl.where(position >= start + BLOCK, landmark, inner_top + tl.log2(inner))
        inner = tl.where(inner > 0, inner, 1.0)
    higher = tl.maximum(top, group)
    fade = tl.exp2(top - higher)
    outer = tl.exp2(group - higher)
    total = total * fade + outer
    acc = acc * fade[:, None]
    share = outer / inner
    if PARTS == 1:
        v = load_rows(v_base, start, v_stride, col, start + col < keys_left, dim, D, MASKED)
        acc = tl.dot((p * share[:, None]).to(v.dtype), v, acc, input_precision=PRECISION)
    else:
        for part in tl.range(PARTS, num_stages=1):
            s, _ = block_logits(q, k_base, k_stride, start, part, position, keys_left, scale, col, dim, BLOCK, D,
                                MASKED, PRECISION)  # fmt: skip
            first = start + part * col.shape[0]
            v = load_rows(v_base, first, v_stride, col, first + col < keys_left, dim, D, MASKED)
            p = tl.exp2(s - inner_top[:, None]) * share[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return higher, total, acc


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity"])
def finish_kernel(Q, K, V, HOME, COUNTERS, PAIR_OUT, GROUP_LOGIT, LOCAL, LSE, OUT, q_strides, k_strides, v_strides,
                  out_strides, tokens, batch, heads, capacity, scale,
                  GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, RETRIEVED: tl.constexpr,
                  BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
                  MERGE_ONLY: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """OUT (B, H, T, D) and, unless None, LSE (B, H, T), the log-sum-exp (base 2) of the outer softmax.

    HOME holds the incomplete block already. RETRIEVED: pairs a query in PAIR_OUT (B, H, T, RETRIEVED, D) and
    GROUP_LOGIT. MERGE_ONLY: the local part is done already, in OUT and LOCAL (its LSE). Program (tile of rows, head).
    """
    # The last rows have most to do: they go first.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    batch_row = tl.cast(head // (heads * GROUP), tl.int64)
    query_head = (head % (heads * GROUP)).to(tl.int64)
    key_head = query_head // GROUP
    start, blocks, partial = place_of(COUNTERS, batch, batch_row)

    rows = tl.arange(0, ROWS)
    row = first_row + rows
    real = (row >= start) & (row < tokens)
    shift = partial - start
    dim = tl.arange(0, D_PAD)
    out_base = OUT + batch_row * out_strides[0] + query_head * out_strides[1]
    stats = tl.cast(head, tl.int64) * tokens + row
    if MERGE_ONLY:
        top = tl.maximum(tl.load(LOCAL + stats, mask=real, other=FLOOR), FLOOR)
        total = real.to(tl.float32)
        acc = load_rows(out_base, first_row, out_strides[2], rows, real, dim, D, True).to(tl.float32)
    else:
        top = tl.full([ROWS], FLOOR, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D_PAD], tl.float32)

    if RETRIEVED > 0:
        # Before the chunk's own blocks: here nothing is multiplied yet, so the output lies as it is best loaded.
        for j in tl.range(RETRIEVED, num_stages=3):
            group = tl.load(GROUP_LOGIT + stats * RETRIEVED + j, mask=real, other=float("-inf"))
            pointers = PAIR_OUT + (stats * RETRIEVED + j)[:, None] * D + dim[None, :]
            pair = tl.load(pointers, mask=real[:, None] & (dim < D)[None, :], other=0.0)
            pair = tl.where((group > float("-inf"))[:, None], pair, 0.0).to(tl.float32)
            higher = tl.maximum(top, group)
            fade = tl.exp2(top - higher)
            share = tl.exp2(group - higher)
            acc = acc * fade[:, None] + pair * share[:, None]
            total = total * fade + share
            top = higher

    if not MERGE_ONLY:
        col = tl.arange(0, COLS)
        position = tl.where(real, row + shift, -1)
        q_base = Q + batch_row * q_strides[0] + query_head * q_strides[1]
        q = load_rows(q_base, first_row, q_strides[2], rows, real, dim, D, True)
        # Where position 0 would be among the chunk's keys: in front of them if there is an incomplete block.
        k_base = K + batch_row * k_strides[0] + key_head * k_strides[1] - tl.cast(shift, tl.int64) * k_strides[2]
        v_base = V + batch_row * v_strides[0] + key_head * v_strides[1] - tl.cast(shift, tl.int64) * v_strides[2]
        keys_left = tokens + shift
        # Blocks before every row's own need no mask, as far as whole tiles of keys can be read.
        whole = tl.minimum(tl.maximum(first_row + shift, 0), tl.maximum(keys_left - COLS * PARTS + BLOCK, 0)) // BLOCK
        touched = (tl.minimum(first_row + ROWS, tokens) - 1 + shift) // BLOCK + 1
        touched = tl.where(tl.max(real.to(tl.int32), 0) > 0, touched, 0)
        first_block = 0
        if (partial > 0) & (touched > 0):
            # The incomplete block and what the chunk adds to it lie in the cache.
            unit = (batch_row * heads + key_head) * capacity + blocks % capacity
            stored = HOME + unit * (2 * BLOCK * D)
            stored_keys = tl.minimum(keys_left, BLOCK)
            top, total, acc = attend_own(
                q, top, total, acc, stored, stored + BLOCK * D, D, D, 0, position, stored_keys, scale, col, dim,
                BLOCK, D, PARTS, True, PRECISION,
            )  # fmt: skip
            first_block = 1
        for block in tl.range(first_block, whole):
            top, total, acc = attend_own(
                q, top, total, acc, k_base, v_base, k_strides[2], v_strides[2], block * BLOCK, position, keys_left,
                scale, col, dim, BLOCK, D, PARTS, False, PRECISION,
            )  # fmt: skip
        for block in tl.range(tl.maximum(whole, first_block), touched, num_stages=1):
            top, total, acc = attend_own(
                q, top, total, acc, k_base, v_base, k_strides[2], v_strides[2], block * BLOCK, position, keys_left,
                scale, col, dim, BLOCK, D, PARTS, True, PRECISION,
            )  # fmt: skip

    # Padding has seen nothing: 0.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    pointers = out_base + row[:, None].to(tl.int64) * out_strides[2] + dim[None, :]
    tl.store(pointers, acc.to(OUT.dtype.element_ty), mask=(row < tokens)[:, None] & (dim < D)[None, :])
    if LSE is not None:
        tl.store(LSE + stats, top + tl.log2(total), mask=row < tokens)
