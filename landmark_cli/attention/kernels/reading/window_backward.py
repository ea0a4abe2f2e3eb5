"""Reading a whole window at once, backward. Nothing is added atomically: results repeat bit by bit.

With w = exp(landmark logit - lse) a pair's share, p its inner softmax, dp = dO V^T, and delta = rowsum(dO * O) - dlse:
  pair_delta = sum(p * dp), dS = w p (dp - pair_delta), dS(landmark) = w (pair_delta - delta), dP of a value = w p.
Where text shares one softmax, p = exp(s - lse) and dS = p (dp - delta), and a landmark has no gradient.
Where logits are soft-capped, dS is times the cap's slope before it reaches queries and keys. All of that is recomputed
from a query's row, its lse and its delta: a block is in one tile, so no statistics are kept.

`pair_gradient_kernel` takes some pairs of a block's list: it adds up their part of dk and dv in registers and writes
their dq, pair by pair. `sum_keys_kernel` adds a block's parts in their order; `sum_queries_kernel` rotates each query's
K back and adds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.logits import before_cap, capped
from ..common.tiles import LOG2E, load_tile, store_tile
from .parts import dot, load_columns, load_parts, rotate, store_parts
from .window_attend import window_rows
from .window_route import listed_block, listed_pairs


@triton.jit(do_not_specialize=["tokens", "heads"])
def own_gradient_kernel(DOUT, OUT, LSE, DLSE, OWN, OWN_LSE, DELTA, DOWN, DOWN_LSE, dout_strides, out_strides,
                        own_strides, down_strides, tokens, heads,
                        D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """DELTA (B, H, T): rowsum(dO * O) - dlse; and, unless OWN is None, the gradients of the chunk's own part, DOWN
    (B, H, T, D), and of its log-sum-exp, DOWN_LSE (B, H, T). Program (tile of tokens, batch row and head)."""
    first = tl.program_id(0) * ROWS
    batch_row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    rows = tl.arange(0, ROWS)  # (ROWS,), as real, stats, delta, lse and share
    real = first + rows < tokens
    stats = tl.program_id(1).to(tl.int64) * tokens + first + rows
    dim = tl.arange(0, D_PAD)  # (D_PAD,)
    base = DOUT + batch_row * dout_strides[0] + head * dout_strides[1]
    dout = load_tile(base, first, dout_strides[2], rows, real, dim, D, True).to(tl.float32)  # (ROWS, D_PAD), as out
    base = OUT + batch_row * out_strides[0] + head * out_strides[1]
    out = load_tile(base, first, out_strides[2], rows, real, dim, D, True).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + stats, mask=real, other=0.0)
    tl.store(DELTA + stats, delta, mask=real)
    if OWN is not None:
        own_lse = tl.load(OWN_LSE + stats, mask=real, other=float("-inf"))
        seen = own_lse > float("-inf")
        lse = tl.load(LSE + stats, mask=real, other=0.0)
        share = tl.where(seen, tl.exp2((own_lse - tl.where(seen, lse, 0.0)) * LOG2E), 0.0)
        base = OWN + batch_row * own_strides[0] + head * own_strides[1]
        own = load_tile(base, first, own_strides[2], rows, real & seen, dim, D, True).to(tl.float32)
        tl.store(DOWN_LSE + stats, share * (tl.sum(dout * own, 1) - delta), mask=real)
        base = DOWN + batch_row * down_strides[0] + head * down_strides[1]
        store_tile(base, first, down_strides[2], rows, real, dim, share[:, None] * dout, D)


@triton.jit
def zero_parts(ROWS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """Zeros (ROWS, HALF_PAD) .. in parts, or, unless PART is -1, of one part alone: a tuple of one."""
    HALF_PAD: tl.constexpr = PARTS[2]
    REST_PAD: tl.constexpr = PARTS[3]
    if PART == 2:
        return (tl.zeros([ROWS, REST_PAD], tl.float32),)
    else:
        zeros = tl.zeros([ROWS, HALF_PAD], tl.float32)
        if PART >= 0:
            return (zeros,)
        elif PARTS[1] == 0:
            return zeros, zeros
        else:
            return zeros, zeros, tl.zeros([ROWS, REST_PAD], tl.float32)


@triton.jit
def add_products(sums, weights, rows, PART: tl.constexpr, PRECISION: tl.constexpr):
    """sums + weights rows, of rows in parts; sums as zero_parts gives."""
    weights = weights.to(rows[0].dtype)
    if PART >= 0:
        return (tl.dot(weights, rows[PART], sums[0], input_precision=PRECISION),)
    else:
        first = tl.dot(weights, rows[0], sums[0], input_precision=PRECISION)
        second = tl.dot(weights, rows[1], sums[1], input_precision=PRECISION)
        if len(rows) == 2:
            return first, second
        else:
            return first, second, tl.dot(weights, rows[2], sums[2], input_precision=PRECISION)


@triton.jit
def store_sums(base, offset, ok, sums, PARTS: tl.constexpr, PART: tl.constexpr):
    """Store what zero_parts and add_products give into rows that begin at base + offset."""
    if PART < 0:
        store_parts(base, offset, ok, sums, PARTS)
    else:
        WIDTH: tl.constexpr = PARTS[0] if PART < 2 else PARTS[1]
        dim = tl.arange(0, sums[0].shape[1])
        pointers = base + PART * PARTS[0] + (offset[:, None] + dim[None, :])
        tl.store(pointers, sums[0].to(base.dtype.element_ty), mask=ok[:, None] & (dim < WIDTH)[None, :])


@triton.jit(do_not_specialize=["tokens", "heads", "first_head", "blocks", "lists", "pairs"])
def pair_gradient_kernel(Q, K_, V, DOUT, LSE, DELTA, cos, sin, BLOCKS, ENTRIES, BOUNDS, ITEM_LIST, FIRST_ITEM, PAIR_DQ,
                         SUMS, q_strides, k_strides, v_strides, dout_strides, tokens, heads, first_head, blocks, lists,
                         pairs, scaling, softmax_scale,
                         HEADS_PER_KEY: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
                         ROWS: tl.constexpr, COLS: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr,
                         PRECISION: tl.constexpr, JOINT: tl.constexpr):  # fmt: skip
    """PAIR_DQ (key heads, pairs, D): the gradient of each pair's rotated query. SUMS (items, 2, BLOCK, D) float32: what
    an item's pairs add to dk and to dv of their block.

    Program (item of SIZE pairs); the last ones have nothing to do. COLS: at least BLOCK. PART: which part of the
    dimensions this launch does, where all parts of dk and dv together take too many registers; -1: all. JOINT: text of
    all blocks shares one softmax.
    """
    item = tl.program_id(0)
    if tl.load(ITEM_LIST + item) >= lists:
        return
    D: tl.constexpr = 2 * PARTS[0] + PARTS[1]
    key_head, batch_row, token, begin, end = listed_block(ITEM_LIST, FIRST_ITEM, BOUNDS, BLOCKS, item, blocks, SIZE)
    end = tl.minimum(end, begin + SIZE)
    batch_row = tl.cast(batch_row, tl.int64)
    head = tl.cast(first_head + key_head, tl.int64)
    token = tl.cast(token, tl.int64)
    column = tl.arange(0, COLS)  # (COLS,)
    k_base = K_ + batch_row * k_strides[0] + head * k_strides[1] + token * k_strides[2]
    v_base = V + batch_row * v_strides[0] + head * v_strides[1] + token * v_strides[2]
    k = load_parts(k_base, column * k_strides[2], column < BLOCK, PARTS)
    v = load_parts(v_base, column * v_strides[2], column < BLOCK, PARTS)
    dk = zero_parts(COLS, PARTS, PART)
    dv = zero_parts(COLS, PARTS, PART)
    for first in range(begin, end, ROWS):
        number = first + tl.arange(0, ROWS)  # (ROWS,), as all vectors below
        ok = number < end
        pair, turn, member, row = listed_pairs(
            ENTRIES, number, ok, key_head, first_head, tokens, pairs, K, HEADS_PER_KEY
        )
        member = member.to(tl.int64)
        at = batch_row * q_strides[0] + member * q_strides[1] + row.to(tl.int64) * q_strides[2]
        q = rotate(load_parts(Q, at, ok, PARTS), (cos, sin), turn[:, None], PARTS)
        at = batch_row * dout_strides[0] + member * dout_strides[1] + row.to(tl.int64) * dout_strides[2]
        dout = load_parts(DOUT, at, ok, PARTS)
        stats = (batch_row * heads + member) * tokens + row
        lse = tl.load(LSE + stats, mask=ok, other=0.0) * LOG2E
        delta = tl.load(DELTA + stats, mask=ok, other=0.0)

        # products, s, p, dp and ds: (ROWS, COLS).
        products = capped(dot(q, k, PRECISION), scaling)
        s = products * scaling[0]
        if JOINT:
            p = tl.exp2(tl.where(column[None, :] < BLOCK - 1, s - lse[:, None], float("-inf")))
            ds = p * (dot(dout, v, PRECISION) - delta[:, None])
        else:
            landmark = tl.max(tl.where(column[None, :] == BLOCK - 1, s, float("-inf")), 1)
            s = tl.where(column[None, :] < BLOCK - 1, s, float("-inf"))
            p = tl.exp2(s - tl.max(s, 1)[:, None])
            p = p / tl.sum(p, 1)[:, None]
            dp = dot(dout, v, PRECISION)
            pair_delta = tl.sum(p * dp, 1)
            share = tl.exp2(landmark - lse)
            p = p * share[:, None]
            ds = p * (dp - pair_delta[:, None])
            ds = tl.where(column[None, :] == BLOCK - 1, (share * (pair_delta - delta))[:, None], ds)
        ds = before_cap(ds, products, scaling)
        dv = add_products(dv, tl.trans(p), dout, PART, PRECISION)
        dk = add_products(dk, tl.trans(ds), q, PART, PRECISION)
        dq = add_products(zero_parts(ROWS, PARTS, PART), ds * softmax_scale, k, PART, PRECISION)
        store_sums(PAIR_DQ, (tl.cast(key_head, tl.int64) * pairs + pair) * D, ok, dq, PARTS, PART)

    at = tl.cast(item, tl.int64) * (2 * BLOCK * D) + column * D  # (COLS,)
    dk_sums = ()
    for part in tl.static_range(len(dk)):
        dk_sums = dk_sums + (dk[part] * softmax_scale,)
    store_sums(SUMS, at, column < BLOCK, dk_sums, PARTS, PART)
    store_sums(SUMS + BLOCK * D, at, column < BLOCK, dv, PARTS, PART)


@triton.jit(do_not_specialize=["first_head", "blocks", "which"])
def sum_keys_kernel(SUMS, FIRST_ITEM, BLOCKS, GRADIENT, strides, first_head, blocks, which,
                    BLOCK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """GRADIENT (B, G, T, D) of keys (which 0) or values (1) of the complete blocks: the sum of each one's items.

    FIRST_ITEM: each list's first item, and the number of all. Program (block, key head, tile of ROWS tokens)."""
    block = tl.program_id(0)
    batch_row = tl.load(BLOCKS + block * 3)
    if batch_row < 0:
        return
    listed = tl.program_id(1) * blocks + block
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    dim = tl.arange(0, D_PAD)  # (D_PAD,)
    total = tl.zeros([ROWS, D_PAD], tl.float32)
    for item in tl.range(tl.load(FIRST_ITEM + listed), tl.load(FIRST_ITEM + listed + 1), num_stages=3):
        base = SUMS + (tl.cast(item, tl.int64) * 2 + which) * (BLOCK * D)
        total += load_columns(base, row * D, row < BLOCK, dim, D)
    token = tl.load(BLOCKS + block * 3 + 1)
    base = GRADIENT + tl.cast(batch_row, tl.int64) * strides[0]
    base += tl.cast(first_head + tl.program_id(1), tl.int64) * strides[1]
    store_tile(base, token, strides[2], row, row < BLOCK, dim, total, D)


@triton.jit(do_not_specialize=["tokens", "group_heads", "heads", "first_head", "pairs"])
def sum_queries_kernel(PAIR_DQ, TURN, cos, sin, DQ, dq_strides, tokens, group_heads, heads, first_head, pairs,
                       HEADS_PER_KEY: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr,
                       ROWS: tl.constexpr):  # fmt: skip
    """DQ (B, H, T, D): the gradients of a query's pairs, rotated back and added. Program as of the merging kernel."""
    D: tl.constexpr = 2 * PARTS[0] + PARTS[1]
    key_head, batch_row, head, first, real, in_list, _ = window_rows(
        tokens, group_heads, heads, first_head, ROWS, HEADS_PER_KEY
    )
    total = zero_parts(ROWS, PARTS, -1)
    at = tl.cast(key_head, tl.int64) * pairs + in_list * K  # (ROWS,), as turn and ok
    for j in tl.range(K, num_stages=3):
        turn = tl.load(TURN + at + j, mask=real, other=-1).to(tl.int32)
        ok = turn >= 0
        pair = load_parts(PAIR_DQ, (at + j) * D, ok, PARTS)
        exact = ()
        for part in tl.static_range(len(pair)):
            exact = exact + (pair[part].to(tl.float32),)
        turned = rotate(exact, (cos, sin), tl.maximum(turn, 0)[:, None], PARTS, True)
        added = ()
        for part in tl.static_range(len(pair)):
            added = added + (total[part] + turned[part],)
        total = added
    base = DQ + batch_row * dq_strides[0] + head * dq_strides[1] + tl.cast(first, tl.int64) * dq_strides[2]
    store_parts(base, tl.arange(0, ROWS) * dq_strides[2], real, total, PARTS)
