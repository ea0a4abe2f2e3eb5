"""Attention of a chunk to the incomplete block before it and to itself, and merging the retrieved blocks into it.

The online outer softmax that walks over the chunk's own blocks takes in the retrieved ones at its end, each with its
landmark's logit: so the local part is never written. Source: arXiv 2305.16300, section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..fused.forward import attend_block
from ..fused.tiles import FLOOR, load_tile, query_blocks, store_tile
from .tiles import place_of


@triton.jit(do_not_specialize=["tokens", "batch", "heads", "capacity"])
def finish_kernel(Q, K, V, HOME, COUNTERS, PAIR_OUT, GROUP_LOGIT, LOCAL, LSE, OUT, q_strides, k_strides, v_strides,
                  out_strides, tokens, batch, heads, capacity, scale,
                  GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, RETRIEVED: tl.constexpr,
                  BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr,
                  MERGE_ONLY: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """OUT (B, H, T, D) and, unless None, LSE (B, H, T), the log-sum-exp (base 2) of the outer softmax.

    HOME holds the incomplete block already. RETRIEVED: pairs a query in PAIR_OUT (B, H, T, RETRIEVED, D) and
    GROUP_LOGIT. MERGE_ONLY: the local part is done already, in OUT and LOCAL (its LSE). Program (tile of rows, head).
    """
    # The last rows have most to do: they go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch_row = head // (heads * GROUP)
    query_head = (head % (heads * GROUP)).to(tl.int64)
    key_head = query_head // GROUP
    start, blocks, partial = place_of(COUNTERS, batch, batch_row)
    row64 = tl.cast(batch_row, tl.int64)

    rows = tl.arange(0, ROWS)
    first_row = tile * ROWS
    row = first_row + rows
    real = (row >= start) & (row < tokens)
    shift = partial - start
    position = tl.where(real, row + shift, -1)
    dim = tl.arange(0, D_PAD)
    col = tl.arange(0, COLS)
    out_base = OUT + row64 * out_strides[0] + query_head * out_strides[1]
    stats = tl.cast(head, tl.int64) * tokens + row

    if MERGE_ONLY:
        top = tl.maximum(tl.load(LOCAL + stats, mask=real, other=FLOOR), FLOOR)
        total = real.to(tl.float32)
        acc = load_tile(out_base, first_row, out_strides[2], rows, real, dim, D, True).to(tl.float32)
    else:
        top = tl.full([ROWS], FLOOR, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D_PAD], tl.float32)
        q_base = Q + row64 * q_strides[0] + query_head * q_strides[1]
        q = load_tile(q_base, first_row, q_strides[2], rows, real, dim, D, True)
        # Where position 0 would be among the chunk's keys: in front of them if there is an incomplete block.
        k_base = K + row64 * k_strides[0] + key_head * k_strides[1] - shift.to(tl.int64) * k_strides[2]
        v_base = V + row64 * v_strides[0] + key_head * v_strides[1] - shift.to(tl.int64) * v_strides[2]
        keys_left = tokens + shift
        last = tl.minimum(first_row + ROWS, tokens) - 1 + shift
        whole, touched = query_blocks(first_row + shift, last, keys_left, BLOCK, COLS * SPLIT)
        touched = tl.where(tl.max(real.to(tl.int32), 0) > 0, touched, 0)
        first_block = 0
        if partial > 0:
            # The incomplete block and what the chunk adds to it lie in the cache.
            if touched > 0:
                unit = (row64 * heads + key_head) * capacity + blocks % capacity
                stored = HOME + unit * (2 * BLOCK * D)
                stored_keys = tl.minimum(keys_left, BLOCK)
                top, total, acc = attend_block(
                    q, top, total, acc, stored, stored + BLOCK * D, D, D, 0, position, row, stored_keys, scale,
                    0, 0, 0, 1.0, col, dim, BLOCK, D, COLS, SPLIT, False, True, PRECISION,
                )  # fmt: skip
            first_block = 1
        for block in tl.range(first_block, whole):
            top, total, acc = attend_block(
                q, top, total, acc, k_base, v_base, k_strides[2], v_strides[2], block, position, row, keys_left, scale,
                0, 0, 0, 1.0, col, dim, BLOCK, D, COLS, SPLIT, False, False, PRECISION,
            )  # fmt: skip
        for block in tl.range(tl.maximum(whole, first_block), touched, num_stages=1):
            top, total, acc = attend_block(
                q, top, total, acc, k_base, v_base, k_strides[2], v_strides[2], block, position, row, keys_left, scale,
                0, 0, 0, 1.0, col, dim, BLOCK, D, COLS, SPLIT, False, True, PRECISION,
            )  # fmt: skip

    if RETRIEVED > 0:
        for j in range(RETRIEVED):
            group = tl.load(GROUP_LOGIT + stats * RETRIEVED + j, mask=real, other=float("-inf"))
            found = group > float("-inf")
            higher = tl.maximum(top, group)
            fade = tl.exp2(top - higher)
            share = tl.exp2(group - higher)
            pointers = PAIR_OUT + (stats * RETRIEVED + j)[:, None] * D + dim[None, :]
            pair = tl.load(pointers, mask=found[:, None] & (dim < D)[None, :], other=0.0).to(tl.float32)
            acc = acc * fade[:, None] + pair * share[:, None]
            total = total * fade + share
            top = higher

    # Padding has seen nothing: 0.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_tile(out_base, first_row, out_strides[2], rows, row < tokens, dim, acc, D)
    if LSE is not None:
        tl.store(LSE + stats, top + tl.log2(total), mask=row < tokens)
