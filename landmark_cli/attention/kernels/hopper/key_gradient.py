"""The second backward kernel for Hopper: dk and dv by blocks of keys, over the query rows that see them.

Everything stands transposed, keys by rows. Thanks to the first kernel's numbers it needs no reductions:

    P^T = exp2(K q^T + shift)     dv += P^T dO     dS^T = P^T (V dO^T - block delta)     dk += dS^T q

A tile is a pair of blocks, one a consumer; both read the same rows. Rings: one slot a consumer for its block's keys
and values; and slots that hold 64 rows of q and dO with both blocks' statistics, in the order of `row_tiles`, one query
head of the group after the other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .pipeline import ROWS, allocate_ring, copy_tile, following, pack, produce, scheduled, start_product
from .query_gradient import statistics_index

KEYS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)


@gluon.jit
def row_tiles(tile, queries, offset, BLOCK: gl.constexpr):
    """Tiles of 64 rows that see a pair of blocks: (first row, where the complete ones end, whether one more follows).

    The incomplete one comes first, for it needs a mask, as those do that hold rows of the blocks themselves.
    """
    span: gl.constexpr = CONSUMERS * BLOCK
    row = gl.maximum(tile * span - offset, 0) // ROWS * ROWS
    end = row + gl.maximum(queries - row, 0) // ROWS * ROWS
    return row, end, (end < queries).to(gl.int32)


@gluon.jit
def produce_rows(q_desc, dout_desc, statistics_desc, rows_ring, batch, query_head, statistics_row, index0, index1, row,
                 slot, phase):  # fmt: skip
    """Fill the next slot with 64 rows and what the first kernel left for them and the two blocks."""
    q_tiles, dout_tiles, statistics, full, empty = rows_ring
    mbarrier.wait(empty.index(slot), phase)
    bytes: gl.constexpr = 2 * q_desc.block_type.nbytes + 2 * statistics_desc.block_type.nbytes
    mbarrier.expect(full.index(slot), bytes)
    copy_tile(q_desc, batch, query_head, row, full.index(slot), q_tiles.index(slot))
    tma.async_copy_global_to_shared(
        statistics_desc, [statistics_row, index0 + row], full.index(slot), statistics.index(2 * slot)
    )
    tma.async_copy_global_to_shared(
        statistics_desc, [statistics_row, index1 + row], full.index(slot), statistics.index(2 * slot + 1)
    )
    copy_tile(dout_desc, batch, query_head, row, full.index(slot), dout_tiles.index(slot))
    return following(slot, phase, q_tiles.shape[0])


@gluon.jit
def producer(q_desc, dout_desc, k_desc, v_desc, statistics_desc, rings, SCHEDULE, sizes, HEADS_PER_KEY: gl.constexpr,
             BLOCK: gl.constexpr):  # fmt: skip
    """Fill the rings in the order in which the consumers read them."""
    k_ring, v_ring, rows_ring = rings
    turns, queries, offset, first_head, key_heads = sizes
    slot, phase, k_phase = 0, 1, 1
    local_head, tile = scheduled(SCHEDULE, 0)
    for turn in range(turns):
        next_head, next_tile = scheduled(SCHEDULE, gl.minimum(turn + 1, turns - 1))
        if tile >= 0:
            head = local_head + first_head
            batch = head // key_heads
            key_head = head % key_heads
            for which in gl.static_range(CONSUMERS):
                first_key = (CONSUMERS * tile + which) * BLOCK
                produce(k_desc, batch, key_head, first_key, k_ring, which, k_phase)
                produce(v_desc, batch, key_head, first_key, v_ring, which, k_phase)
            k_phase ^= 1
            row, end, incomplete = row_tiles(tile, queries, offset, BLOCK)
            index0 = statistics_index(CONSUMERS * tile, queries, offset, BLOCK)
            index1 = statistics_index(CONSUMERS * tile + 1, queries, offset, BLOCK)
            for member in range(HEADS_PER_KEY):
                query_head = key_head * HEADS_PER_KEY + member
                statistics_row = (local_head * HEADS_PER_KEY + member) * 3
                for number in range(incomplete + (end - row) // ROWS):
                    at = gl.where(number < incomplete, end, row + (number - incomplete) * ROWS)
                    slot, phase = produce_rows(q_desc, dout_desc, statistics_desc, rows_ring, batch, query_head,
                                               statistics_row, index0, index1, at, slot, phase)  # fmt: skip
        local_head, tile = next_head, next_tile


@gluon.jit
def store_gradient(BASE, strides, batch, key_head, start, keys, value, BLOCK: gl.constexpr, ACCUMULATE: gl.constexpr):
    """Store the rows of a block's gradient, value (KEYS, D), or add them to what is there."""
    LAYOUT: gl.constexpr = value.type.layout
    key = gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))  # (KEYS,)
    dim = gl.arange(0, value.shape[1], gl.SliceLayout(0, LAYOUT))  # (D,)
    base = BASE + batch.to(gl.int64) * strides[0] + key_head.to(gl.int64) * strides[1]
    pointers = base + ((start + key).to(gl.int64) * strides[2])[:, None] + dim[None, :]
    mask = ((key < BLOCK) & (start + key < keys))[:, None]  # (KEYS, 1)
    if ACCUMULATE:
        value += gl.load(pointers, mask=mask, other=0.0).to(gl.float32)
    gl.store(pointers, value.to(BASE.dtype.element_ty), mask=mask)


@gluon.jit
def consumer(CONSUMER: gl.constexpr, rings, DK, DV, dk_strides, dv_strides, SCHEDULE, scales, sizes,
             HEADS_PER_KEY: gl.constexpr, BLOCK: gl.constexpr, ACCUMULATE: gl.constexpr):  # fmt: skip
    """dk and dv of one block of every pair."""
    k_ring, v_ring, rows_ring = rings
    turns, queries, offset, first_head, key_heads = sizes
    scale, softmax_scale = scales
    k_tiles, k_full, k_empty = k_ring
    v_tiles, v_full, v_empty = v_ring
    q_tiles, dout_tiles, statistics, full, empty = rows_ring
    SLOTS: gl.constexpr = q_tiles.shape[0]
    D: gl.constexpr = q_tiles.shape[2]
    DTYPE: gl.constexpr = q_tiles.dtype
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    key = gl.arange(0, KEYS, gl.SliceLayout(1, LOGITS))  # (KEYS,)
    zeros = gl.zeros([KEYS, ROWS], gl.float32, LOGITS)
    slot, phase, k_phase = 0, 0, 0
    # What comes next is looked up a turn ahead: one to three percent faster in this kernel, no faster in the others.
    local_head, tile = scheduled(SCHEDULE, 0)
    for turn in range(turns):
        next_head, next_tile = scheduled(SCHEDULE, gl.minimum(turn + 1, turns - 1))
        if tile >= 0:
            head = local_head + first_head
            start = (CONSUMERS * tile + CONSUMER) * BLOCK
            dk = gl.zeros([KEYS, D], gl.float32, OUTPUT)
            dv = gl.zeros([KEYS, D], gl.float32, OUTPUT)
            k = k_tiles.index(CONSUMER)  # (KEYS, D) in shared memory, as v
            v = v_tiles.index(CONSUMER)
            mbarrier.wait(k_full.index(CONSUMER), k_phase)
            mbarrier.wait(v_full.index(CONSUMER), k_phase)
            row, end, incomplete = row_tiles(tile, queries, offset, BLOCK)
            # Complete tiles with rows that do not see this consumer's block whole.
            own = gl.cdiv(gl.maximum(gl.minimum(start + BLOCK - offset, end) - row, 0), ROWS)
            # The first of them, if all its rows are before the block.
            unseen = gl.where(row + ROWS + offset <= start, incomplete, -1)
            for _ in range(HEADS_PER_KEY):
                for number in range(incomplete + own):
                    first = gl.where(number < incomplete, end, row + (number - incomplete) * ROWS)
                    mbarrier.wait(full.index(slot), phase)
                    if number != unseen:
                        rows = first + gl.arange(0, ROWS, gl.SliceLayout(0, LOGITS))  # (ROWS,)
                        position = gl.where(rows < queries, rows + offset, -1)[None, :]  # (1, ROWS)
                        numbers = statistics.index(2 * slot + CONSUMER)  # (4, ROWS) in shared memory
                        q = q_tiles.index(slot)  # (ROWS, D) in shared memory, as dout
                        dout = dout_tiles.index(slot)
                        s = start_product(k, q, zeros)  # (KEYS, ROWS), as all down to ds
                        dp = start_product(v, dout, zeros)
                        s, dp = warpgroup_mma_wait(0, deps=(s, dp))
                        text = (key[:, None] < BLOCK - 1) & (start + key[:, None] <= position)
                        landmark = (key[:, None] == BLOCK - 1) & (start + BLOCK <= position)
                        p = gl.where(text, gl.exp2(s * scale + numbers.slice(0, 1).load(LOGITS)), 0.0)
                        ds = gl.where(text, p * (dp - numbers.slice(1, 1).load(LOGITS)), 0.0)
                        ds = gl.where(landmark, numbers.slice(2, 1).load(LOGITS), ds)
                        p = gl.convert_layout(p.to(DTYPE), OPERAND)
                        ds = gl.convert_layout(ds.to(DTYPE), OPERAND)
                        dv = warpgroup_mma(p, dout, dv, is_async=True)
                        dk = warpgroup_mma(ds, q, dk, is_async=True)
                        dv, dk = warpgroup_mma_wait(0, deps=(dv, dk))
                    mbarrier.arrive(empty.index(slot), count=1)
                    slot, phase = following(slot, phase, SLOTS)
                for _ in range(row + own * ROWS, end, ROWS):
                    mbarrier.wait(full.index(slot), phase)
                    numbers = statistics.index(2 * slot + CONSUMER)
                    s = start_product(k, q_tiles.index(slot), zeros)  # (KEYS, ROWS), as dp, p and ds
                    dp = start_product(v, dout_tiles.index(slot), zeros)
                    shift = numbers.slice(0, 1).load(LOGITS)  # (1, ROWS)
                    s = warpgroup_mma_wait(1, deps=(s,))
                    p = gl.exp2(s * scale + shift)
                    p16 = gl.convert_layout(pack(p, DTYPE), OPERAND)
                    dv_sum = warpgroup_mma(p16, dout_tiles.index(slot), dv, is_async=True)
                    dp = warpgroup_mma_wait(1, deps=(dp,))
                    ds = p * (dp - numbers.slice(1, 1).load(LOGITS))
                    ds = gl.where(key[:, None] == BLOCK - 1, numbers.slice(2, 1).load(LOGITS), ds)
                    ds16 = gl.convert_layout(pack(ds, DTYPE), OPERAND)
                    dk_sum = warpgroup_mma(ds16, q_tiles.index(slot), dk, is_async=True)
                    dv, dk = warpgroup_mma_wait(0, deps=(dv_sum, dk_sum))
                    mbarrier.arrive(empty.index(slot), count=1)
                    slot, phase = following(slot, phase, SLOTS)
            mbarrier.arrive(k_empty.index(CONSUMER), count=1)
            mbarrier.arrive(v_empty.index(CONSUMER), count=1)
            k_phase ^= 1

            # Landmarks have no value. Keys behind the block hold rubbish, which is not stored.
            is_landmark = gl.arange(0, KEYS, gl.SliceLayout(1, OUTPUT)) == BLOCK - 1
            dv = gl.where(is_landmark[:, None], 0.0, dv)
            batch = head // key_heads
            key_head = head % key_heads
            dk *= softmax_scale
            store_gradient(DK, dk_strides, batch, key_head, start, queries + offset, dk, BLOCK, ACCUMULATE)
            store_gradient(DV, dv_strides, batch, key_head, start, queries + offset, dv, BLOCK, ACCUMULATE)
        local_head, tile = next_head, next_tile


@gluon.jit(do_not_specialize=["turns", "queries", "offset", "first_head", "key_heads"])
def key_gradient_kernel(q_desc, dout_desc, k_desc, v_desc, statistics_desc, DK, DV, SCHEDULE, dk_strides, dv_strides,
                        turns, scale, softmax_scale, queries, offset, first_head, key_heads,
                        HEADS_PER_KEY: gl.constexpr, BLOCK: gl.constexpr, SLOTS: gl.constexpr,
                        ACCUMULATE: gl.constexpr):  # fmt: skip
    """dk and dv of the scheduled key heads, counted from first_head on. ACCUMULATE: add to DK and DV."""
    D: gl.constexpr = k_desc.block_type.shape[3]
    DTYPE: gl.constexpr = k_desc.dtype
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    k_ring = allocate_ring(gl.allocate_shared_memory(DTYPE, [CONSUMERS, KEYS, D], TILE), CONSUMERS, 1)
    v_ring = allocate_ring(gl.allocate_shared_memory(DTYPE, [CONSUMERS, KEYS, D], TILE), CONSUMERS, 1)
    dout_tiles = gl.allocate_shared_memory(DTYPE, [SLOTS, ROWS, D], TILE)
    statistics = gl.allocate_shared_memory(gl.float32, [2 * SLOTS, 4, ROWS], statistics_desc.layout)
    q_tiles, full, empty = allocate_ring(gl.allocate_shared_memory(DTYPE, [SLOTS, ROWS, D], TILE), SLOTS, CONSUMERS)
    fence_async_shared()
    rings = (k_ring, v_ring, (q_tiles, dout_tiles, statistics, full, empty))
    sizes = (turns, queries, offset, first_head, key_heads)
    scales = (scale, softmax_scale)
    gl.warp_specialize([
        (consumer, (0, rings, DK, DV, dk_strides, dv_strides, SCHEDULE, scales, sizes, HEADS_PER_KEY, BLOCK,
                    ACCUMULATE)),
        (consumer, (1, rings, DK, DV, dk_strides, dv_strides, SCHEDULE, scales, sizes, HEADS_PER_KEY, BLOCK,
                    ACCUMULATE)),
        (producer, (q_desc, dout_desc, k_desc, v_desc, statistics_desc, rings, SCHEDULE, sizes, HEADS_PER_KEY, BLOCK)),
    ], [4, 1], [240, 24])  # fmt: skip
