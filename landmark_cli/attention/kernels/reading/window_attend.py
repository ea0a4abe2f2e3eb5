"""Reading a whole window at once, forward: every block for all queries of later chunks that chose it, then the pairs of
each query put together. Source: arXiv 2305.16300, section 3; attend.py and merge.py do the same for one chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.tiles import FLOOR, LN2, LOG2E, load_tile, store_tile
from .attend import attend_rows
from .merge import add_pairs
from .parts import load_parts, rotate
from .window_route import listed_block, listed_pairs


@triton.jit(do_not_specialize=["tokens", "first_head", "blocks", "lists", "pairs"])
def attend_in_window_kernel(Q, K_, V, cos, sin, BLOCKS, ENTRIES, BOUNDS, ITEM_LIST, FIRST_ITEM, PAIR_OUT,
                            OUTER_LOGIT, q_strides, k_strides, v_strides, tokens, first_head, blocks, lists, pairs,
                            scaling,
                            HEADS_PER_KEY: tl.constexpr, PARTS: tl.constexpr, D_PAD: tl.constexpr, K: tl.constexpr,
                            BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                            PRECISION: tl.constexpr, JOINT: tl.constexpr):  # fmt: skip
    """PAIR_OUT (key heads, pairs, D): a block's values by its inner softmax; OUTER_LOGIT (key heads, pairs): its logit
    in the outer softmax, base 2, see attend_rows. scaling: see common/logits.py. Program (item of ROWS pairs); the last
    ones have nothing to do."""
    item = tl.program_id(0)
    if tl.load(ITEM_LIST + item) >= lists:
        return
    D: tl.constexpr = 2 * PARTS[0] + PARTS[1]
    key_head, batch_row, token, begin, end = listed_block(ITEM_LIST, FIRST_ITEM, BOUNDS, BLOCKS, item, blocks, ROWS)
    number = begin + tl.arange(0, ROWS)  # (ROWS,), as ok, pair, turn, head, row and offset
    ok = number < end
    pair, turn, head, row = listed_pairs(ENTRIES, number, ok, key_head, first_head, tokens, pairs, K, HEADS_PER_KEY)
    batch_row = tl.cast(batch_row, tl.int64)
    offset = batch_row * q_strides[0] + head.to(tl.int64) * q_strides[1] + row.to(tl.int64) * q_strides[2]
    q = rotate(load_parts(Q, offset, ok, PARTS), (cos, sin), turn[:, None], PARTS)
    head = tl.cast(first_head + key_head, tl.int64)
    token = tl.cast(token, tl.int64)
    k_base = K_ + batch_row * k_strides[0] + head * k_strides[1] + token * k_strides[2]
    v_base = V + batch_row * v_strides[0] + head * v_strides[1] + token * v_strides[2]
    dim = tl.arange(0, D_PAD)  # (D_PAD,)
    out, logit = attend_rows(q, k_base, v_base, k_strides[2], v_strides[2], dim, scaling, PARTS, BLOCK, COLS,
                             PRECISION, JOINT, True)  # fmt: skip
    at = tl.cast(key_head, tl.int64) * pairs + pair  # (ROWS,)
    pointers = PAIR_OUT + at[:, None] * D + dim[None, :]  # (ROWS, D_PAD)
    tl.store(pointers, out.to(PAIR_OUT.dtype.element_ty), mask=ok[:, None] & (dim < D)[None, :])
    tl.store(OUTER_LOGIT + at, logit, mask=ok)


@triton.jit
def window_rows(tokens, group_heads, heads, first_head, ROWS: tl.constexpr, HEADS_PER_KEY: tl.constexpr):
    """The query rows of a program (tile of tokens, batch row and head of a group of key heads from first_head on).

    Returns (key head in the group, batch row, head, first token; which of its rows there are, (ROWS,); their number
    among the key head's query rows and among all of (B, H, T), (ROWS,) in 64 bits). group_heads, heads:
    query heads in the group and of a batch row.
    """
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)  # (ROWS,)
    batch_row = tl.program_id(1) // group_heads
    member = tl.program_id(1) % group_heads
    key_head = member // HEADS_PER_KEY
    head = first_head * HEADS_PER_KEY + member
    in_list = (tl.cast(batch_row, tl.int64) * HEADS_PER_KEY + member % HEADS_PER_KEY) * tokens + rows
    stats = (tl.cast(batch_row, tl.int64) * heads + head) * tokens + rows
    return key_head, tl.cast(batch_row, tl.int64), tl.cast(head, tl.int64), first, rows < tokens, in_list, stats


@triton.jit(do_not_specialize=["tokens", "group_heads", "heads", "first_head", "pairs"])
def merge_in_window_kernel(PAIR_OUT, OUTER_LOGIT, OWN, OWN_LSE, OUT, LSE, own_strides, out_strides, tokens,
                           group_heads, heads, first_head, pairs,
                           HEADS_PER_KEY: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, K: tl.constexpr,
                           ROWS: tl.constexpr):  # fmt: skip
    """OUT (B, H, T, D) and LSE (B, H, T): the pairs by the outer softmax, with OWN and OWN_LSE unless they are None.

    Program (tile of tokens, batch row and head), see window_rows. A row that has nothing gets 0 and minus infinity.
    """
    key_head, batch_row, head, first, real, in_list, stats = window_rows(
        tokens, group_heads, heads, first_head, ROWS, HEADS_PER_KEY
    )
    rows = tl.arange(0, ROWS)  # (ROWS,), as top and total; acc: (ROWS, D_PAD)
    dim = tl.arange(0, D_PAD)  # (D_PAD,)
    top = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    if OWN is not None:
        own_lse = tl.load(OWN_LSE + stats, mask=real, other=float("-inf"))
        seen = own_lse > float("-inf")
        top = tl.where(seen, own_lse * LOG2E, top)
        total = seen.to(tl.float32)
        own = OWN + batch_row * own_strides[0] + head * own_strides[1]
        acc = load_tile(own, first, own_strides[2], rows, real & seen, dim, D, True).to(tl.float32)
    at = tl.cast(key_head, tl.int64) * pairs
    top, total, acc = add_pairs(PAIR_OUT + at * D, OUTER_LOGIT + at, in_list, real, dim, top, total, acc, K, D)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out = OUT + batch_row * out_strides[0] + head * out_strides[1]
    store_tile(out, first, out_strides[2], rows, real, dim, acc, D)
    tl.store(LSE + stats, tl.where(total > 0, (top + tl.log2(total)) * LN2, float("-inf")), mask=real)
