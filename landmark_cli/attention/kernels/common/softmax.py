"""One block in the online outer softmax of a tile of queries: what training's forward kernel and reading share.

Two observations make it one function. An in-block softmax is complete inside a block's tile of keys, so only the outer
softmax runs online. And with g = the landmark logit for an earlier block, g = log-sum-exp of the visible text for the
own one, the output is the sum over blocks of softmax(g) * in-block softmax * V, whichever kind a block is: so rows of
one tile may stand in different blocks, and a block need not be a power of two. In the joint softmax every block is as
the own one.

Source: arXiv 2305.16300, section 3.1. Logits are kept times log2(e): exp2 is what the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logits import capped
from .tiles import FLOOR, LOG2E, load_tile


@triton.jit
def tile_logits(q, base, stride, first, keys_left, col, dim, D: tl.constexpr, MASKED: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """(q k^T, unscaled, (ROWS, COLS); k, (COLS, DIM)) of a tile of queries and the tile of keys from `first` on."""
    k = load_tile(base, first, stride, col, first + col < keys_left, dim, D, MASKED)  # (COLS, DIM)
    return tl.dot(q, tl.trans(k), input_precision=PRECISION), k


@triton.jit
def text_and_landmark(s, start, col, position, scale, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(s, (ROWS, COLS), minus infinity but for visible text; the scaled landmark logit, (ROWS,), if it is among these).

    s: products as logits.capped gives them. start: position of the block's first key; col: (COLS,) of each key in the
    block; position: (ROWS,) of each query.
    """
    landmark = tl.max(tl.where(col[None, :] == BLOCK - 1, s, float("-inf")), 1) * scale  # (ROWS,)
    text = col[None, :] < BLOCK - 1  # (1, COLS), or (ROWS, COLS) below
    if MASKED:
        text = text & (start + col[None, :] <= position[:, None])
    return tl.where(text, s, float("-inf")), landmark


@triton.jit
def before_blocks(SINKS, head, ROWS: tl.constexpr):
    """(top, total), (ROWS,) each, with which the online outer softmax of a head's queries begins: those of nothing, or
    of its sink, a key without a value. SINKS: (H,) natural logits, or None."""
    top = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS is not None:
        top = tl.maximum(top, tl.load(SINKS + head).to(tl.float32) * LOG2E)
        total = total + 1.0
    return top, total


@triton.jit
def attend_block(q, top, total, acc, keys, block, position, row_number, scaling, dropout, BLOCK: tl.constexpr,
                 D: tl.constexpr, COLS: tl.constexpr, KEY_TILES: tl.constexpr, DROPOUT: tl.constexpr,
                 JOINT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add one block to the online outer softmax of a tile of queries: (top, total, acc) are its maximum, sum, output.

    q, acc: (ROWS, DIM); top, total, position, row_number: (ROWS,). keys: where keys and values are, their strides, keys
    that are left, and the numbers of a tile's keys, (COLS,), and dimensions, (DIM,). scaling: see logits.py. KEY_TILES:
    tiles of COLS keys that a block fills. JOINT: the outer softmax is over all blocks' text, and top is the maximum
    of its logits; there is no dropout then. MASKED: rows may stand in this block or before it, and the block may be
    incomplete.
    """
    k_base, v_base, k_stride, v_stride, keys_left, col, dim = keys
    scale = scaling[0]
    start = block * BLOCK
    if KEY_TILES == 1:
        s, _ = tile_logits(q, k_base, k_stride, start, keys_left, col, dim, D, MASKED, PRECISION)  # (ROWS, COLS)
        s = capped(s, scaling)
        s, landmark = text_and_landmark(s, start, col, position, scale, BLOCK, MASKED)  # (ROWS, COLS), (ROWS,)
        inner_top = tl.max(s, 1) * scale  # (ROWS,)
        if MASKED:
            inner_top = tl.maximum(inner_top, FLOOR)
        p = tl.exp2(s * scale - inner_top[:, None])  # (ROWS, COLS)
        inner = tl.sum(p, 1)  # (ROWS,)
    else:
        # The block is too wide for one tile: its maximum and sum first, and the logits once more below.
        inner_top = tl.zeros_like(top) + FLOOR  # (ROWS,), as the next two
        inner = tl.zeros_like(top)
        landmark = tl.zeros_like(top) + float("-inf")
        for part in tl.range(KEY_TILES, num_stages=1):
            first = start + part * COLS
            s, _ = tile_logits(q, k_base, k_stride, first, keys_left, col, dim, D, MASKED, PRECISION)  # (ROWS, COLS)
            s = capped(s, scaling)
            s, found = text_and_landmark(s, start, part * COLS + col, position, scale, BLOCK, MASKED)
            landmark = tl.maximum(landmark, found)
            new_top = tl.maximum(inner_top, tl.max(s, 1) * scale)
            inner = inner * tl.exp2(inner_top - new_top) + tl.sum(tl.exp2(s * scale - new_top[:, None]), 1)
            inner_top = new_top

    # The block's logit in the outer softmax, and its share of that over the sum of its in-block softmax: (ROWS,) each.
    earlier = position >= start + BLOCK
    logit = landmark
    if JOINT:
        # Each text token joins the outer softmax itself, so what is added up is the sum as it is.
        logit = inner_top
    elif MASKED:
        logit = tl.where(earlier, landmark, inner_top + tl.log2(inner))
        inner = tl.where(inner > 0, inner, 1.0)
    new_top = tl.maximum(top, logit)
    rescale = tl.exp2(top - new_top)
    outer = tl.exp2(logit - new_top)
    total = total * rescale + (outer * inner if JOINT else outer)
    acc = acc * rescale[:, None]
    share = outer if JOINT else outer / inner
    if DROPOUT:
        share = tl.where(earlier, share * dropout_factor(dropout, row_number, block), share)

    if KEY_TILES == 1:
        v = load_tile(v_base, start, v_stride, col, start + col < keys_left, dim, D, MASKED)  # (COLS, DIM)
        acc = tl.dot((p * share[:, None]).to(v.dtype), v, acc, input_precision=PRECISION)
    else:
        for part in tl.range(KEY_TILES, num_stages=1):
            first = start + part * COLS
            s, _ = tile_logits(q, k_base, k_stride, first, keys_left, col, dim, D, MASKED, PRECISION)  # (ROWS, COLS)
            s = capped(s, scaling)
            s, _ = text_and_landmark(s, start, part * COLS + col, position, scale, BLOCK, MASKED)
            p = tl.exp2(s * scale - inner_top[:, None]) * share[:, None]
            v = load_tile(v_base, first, v_stride, col, first + col < keys_left, dim, D, MASKED)  # (COLS, DIM)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def dropout_factor(dropout, row_number, block):
    """Group dropout of one block for a tile of rows, (ROWS,): 0, or 1 / (1 - p). See attention/dropout.py."""
    seed, threshold, keep_scale = dropout
    zero = row_number * 0
    word, _, _, _ = tl.philox(seed, row_number, zero + block, zero, zero)  # (ROWS,)
    return tl.where((word >> 8).to(tl.int32) >= threshold, keep_scale, 0.0)
