"""The first backward kernel for Hopper: dq by query rows, and three numbers per row and block for the second.

It walks like the forward kernel and recomputes the in-block softmaxes; training/backward.py has the formulas and says
what the three numbers are. Each step does three products, and the third one runs a step late:

    logits S = q K^T     dP = dO V^T     dq += dS K of the block before

so that the tensor cores have dP and dq to work on while the softmax of S is found. Rings, each in the order of blocks:
keys, values; and one slot a consumer for its rows of q and dO. A block's keys stay for one step more than its values.
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

from ..common import statistics as portable
from ..common.tiles import LOG2E
from .forward import tile_blocks, whole_blocks
from .pipeline import (
    MINUS_INFINITY,
    ROWS,
    allocate_ring,
    following,
    pack,
    produce,
    reciprocal,
    release,
    scheduled,
    start_product,
    store_tile,
    thread_barrier,
    volatile_exp2,
)

# Where a block's numbers lie: the portable kernels' layout.
statistics_index = gluon.jit(portable.statistics_index.fn)


@gluon.jit
def producer(q_desc, dout_desc, k_desc, v_desc, rings, SCHEDULE, sizes, HEADS_PER_KEY: gl.constexpr,
             BLOCK: gl.constexpr, CONSUMERS: gl.constexpr):  # fmt: skip
    """Fill the rings in the order in which the consumers read them."""
    q_ring, dout_ring, k_ring, v_ring = rings
    turns, queries, offset, first_head, query_heads, plane, numbers = sizes
    k_slot, k_phase, v_slot, v_phase, q_phase = 0, 1, 0, 1, 1
    for turn in range(turns):
        local_head, tile = scheduled(SCHEDULE, turn)
        if tile >= 0:
            head = local_head + first_head
            batch = head // query_heads
            query_head = head % query_heads
            row, touched = tile_blocks(tile, queries, offset, BLOCK, CONSUMERS)
            for which in gl.static_range(CONSUMERS):
                produce(q_desc, batch, query_head, row + ROWS * which, q_ring, which, q_phase)
                produce(dout_desc, batch, query_head, row + ROWS * which, dout_ring, which, q_phase)
            q_phase ^= 1
            for block in range(touched):
                k_slot, k_phase = produce(
                    k_desc, batch, query_head // HEADS_PER_KEY, block * BLOCK, k_ring, k_slot, k_phase
                )
                v_slot, v_phase = produce(
                    v_desc, batch, query_head // HEADS_PER_KEY, block * BLOCK, v_ring, v_slot, v_phase
                )


@gluon.jit
def load_rows(BASE, strides, batch, query_head, row, queries, D: gl.constexpr, LAYOUT: gl.constexpr):
    """(ROWS, D): rows of a head from `row` on, zeros behind its end."""
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))  # (ROWS,)
    dim = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))  # (D,)
    base = BASE + batch.to(gl.int64) * strides[0] + query_head.to(gl.int64) * strides[1]
    pointers = base + (rows.to(gl.int64) * strides[2])[:, None] + dim[None, :]
    return gl.load(pointers, mask=(rows < queries)[:, None], other=0.0)


@gluon.jit
def store_statistics(at, plane, shift, block_delta, dlandmark, row_ok):
    """Store a block's three numbers of each row; all but plane are (ROWS,), `at` of pointers."""
    gl.store(at, shift, mask=row_ok)
    gl.store(at + plane, block_delta, mask=row_ok)
    gl.store(at + 2 * plane, dlandmark, mask=row_ok)


@gluon.jit
def masked_logit_gradients(s, dp, lse, delta, block, position, scale, BLOCK: gl.constexpr):
    """dS of one block that rows may stand in, before or behind: (dS, shift, block_delta, dS of the landmark).

    s, dp and dS: (ROWS, COLS); all others: (ROWS,).
    """
    COLS: gl.constexpr = s.shape[1]
    col = gl.arange(0, COLS, gl.SliceLayout(0, s.type.layout))  # (COLS,)
    start = block * BLOCK
    earlier = position >= start + BLOCK  # (ROWS,)
    text = (col[None, :] < BLOCK - 1) & (start + col[None, :] <= position[:, None])  # (ROWS, COLS)
    landmark = gl.max(gl.where(col[None, :] == BLOCK - 1, s, MINUS_INFINITY), 1) * scale  # (ROWS,)
    s = gl.where(text, s * scale, MINUS_INFINITY)
    top = gl.where(earlier, gl.max(s, 1), lse)  # (ROWS,)
    p = gl.exp2(s - top[:, None])  # (ROWS, COLS)
    inner = gl.where(earlier, gl.sum(p, 1), 1.0)  # (ROWS,), as all that follows but ds
    block_delta = gl.where(earlier, gl.sum(p * dp, 1) / inner, delta)
    outer = gl.exp2(landmark - lse)
    share = gl.where(earlier, outer / inner, 1.0)
    dlandmark = gl.where(earlier, outer * (block_delta - delta), 0.0)
    shift = gl.where(earlier, landmark - lse - top - gl.log2(inner), -lse)
    ds = p * share[:, None] * (dp - block_delta[:, None])
    ds = gl.where(col[None, :] == BLOCK - 1, dlandmark[:, None], ds)
    return ds, shift, block_delta, dlandmark


@gluon.jit
def consumer(CONSUMER: gl.constexpr, rings, dq_desc, OUT, out_strides, LSE, DLSE, STATISTICS, SCHEDULE, scales, sizes,
             BLOCK: gl.constexpr, CONSUMERS: gl.constexpr):  # fmt: skip
    """dq and statistics of 64 query rows of every tile."""
    q_ring, dout_ring, k_ring, v_ring = rings
    turns, queries, offset, first_head, query_heads, plane, numbers = sizes
    scale, softmax_scale = scales
    q_tiles, q_full, q_empty = q_ring
    dout_tiles, dout_full, dout_empty = dout_ring
    k_tiles, k_full, k_empty = k_ring
    v_tiles, v_full, v_empty = v_ring
    K_SLOTS: gl.constexpr = k_tiles.shape[0]
    COLS: gl.constexpr = k_tiles.shape[1]
    D: gl.constexpr = k_tiles.shape[2]
    DTYPE: gl.constexpr = k_tiles.dtype
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    ACROSS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    col = gl.arange(0, COLS, gl.SliceLayout(0, LOGITS))  # (COLS,)
    zeros = gl.zeros([ROWS, COLS], gl.float32, LOGITS)
    k_slot, k_phase, v_slot, v_phase, q_phase = 0, 0, 0, 0, 0
    for turn in range(turns):
        local_head, tile = scheduled(SCHEDULE, turn)
        if tile >= 0:
            head = local_head + first_head
            row, touched = tile_blocks(tile, queries, offset, BLOCK, CONSUMERS)
            row += ROWS * CONSUMER
            whole = whole_blocks(row, touched, offset, BLOCK, 1)
            rows = row + gl.arange(0, ROWS, ROW)  # (ROWS,), as all down to `statistics`
            position = rows + offset
            row_ok = rows < queries
            number = head.to(gl.int64) * numbers + rows
            lse = gl.load(LSE + number, mask=row_ok, other=0.0) * LOG2E
            statistics = STATISTICS + local_head.to(gl.int64) * 3 * plane + rows
            q = q_tiles.index(CONSUMER)  # (ROWS, D) in shared memory, as dout
            dout = dout_tiles.index(CONSUMER)
            mbarrier.wait(q_full.index(CONSUMER), q_phase)
            mbarrier.wait(dout_full.index(CONSUMER), q_phase)
            # (ROWS, D) and (ROWS,).
            out = load_rows(OUT, out_strides, head // query_heads, head % query_heads, row, queries, D, ACROSS)
            delta = gl.convert_layout(gl.sum(out.to(gl.float32) * dout.load(ACROSS).to(gl.float32), 1), ROW)
            if DLSE is not None:
                delta -= gl.load(DLSE + number, mask=row_ok, other=0.0)

            # dS of the block before the first is 0, and its keys are whatever the first block's slot holds.
            dq = gl.zeros([ROWS, D], gl.float32, OUTPUT)
            ds = gl.zeros([ROWS, COLS], DTYPE, OPERAND)
            # The + 0 makes `before` another value than k_slot: Triton carries no variable through a loop whose first
            # turn would leave it the very value it had.
            before = k_slot + 0
            mbarrier.wait(k_full.index(k_slot), k_phase)
            for block in range(whole):
                s = start_product(q, k_tiles.index(k_slot), zeros)  # (ROWS, COLS), as dp, p and next_ds
                mbarrier.wait(v_full.index(v_slot), v_phase)
                dp = start_product(dout, v_tiles.index(v_slot), zeros)
                sum_ = warpgroup_mma(ds, k_tiles.index(before), dq, is_async=True)
                s = warpgroup_mma_wait(2, deps=(s,))
                # (ROWS,), as top, inner, outer, shift, block_delta, dlandmark and share.
                landmark = gl.max(gl.where(col[None, :] == BLOCK - 1, s, MINUS_INFINITY), 1) * scale
                s = gl.where(col[None, :] < BLOCK - 1, s, MINUS_INFINITY)
                top = gl.max(s, 1) * scale
                p = volatile_exp2(s * scale - top[:, None])
                inner = gl.sum(p, 1)
                outer = gl.exp2(landmark - lse)
                shift = landmark - lse - top - gl.log2(inner)
                # This wait is over already; it keeps the compiler from moving the wait for dP above the softmax.
                mbarrier.wait(v_full.index(v_slot), v_phase)
                dp = warpgroup_mma_wait(1, deps=(dp,))
                v_slot, v_phase = release(v_ring, v_slot, v_phase)
                inverse = reciprocal(inner)
                block_delta = gl.sum(p * dp, 1) * inverse
                dlandmark = outer * (block_delta - delta)
                share = outer * inverse
                next_ds = p * (dp * share[:, None] - (block_delta * share)[:, None])
                next_ds = gl.where(col[None, :] == BLOCK - 1, dlandmark[:, None], next_ds)
                next_ds = gl.convert_layout(pack(next_ds, DTYPE), OPERAND)
                at = statistics + statistics_index(block, queries, offset, BLOCK)
                store_statistics(at, plane, shift, block_delta, dlandmark, row_ok)
                next_slot, k_phase = following(k_slot, k_phase, K_SLOTS)
                mbarrier.wait(k_full.index(next_slot), k_phase)
                dq, ds, next_ds = warpgroup_mma_wait(0, deps=(sum_, ds, next_ds))
                mbarrier.arrive(k_empty.index(before), count=1, pred=block > 0)
                ds = next_ds
                before = k_slot
                k_slot = next_slot
            dq = warpgroup_mma(ds, k_tiles.index(before), dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            mbarrier.arrive(k_empty.index(before), count=1, pred=whole > 0)

            last = (row + ROWS - 1 + offset) // BLOCK
            for block in range(whole, touched):
                mbarrier.wait(k_full.index(k_slot), k_phase)
                mbarrier.wait(v_full.index(v_slot), v_phase)
                if (block <= last) & (row < queries):
                    s = start_product(q, k_tiles.index(k_slot), zeros)
                    dp = start_product(dout, v_tiles.index(v_slot), zeros)
                    s, dp = warpgroup_mma_wait(0, deps=(s, dp))
                    next_ds, shift, block_delta, dlandmark = masked_logit_gradients(
                        s, dp, lse, delta, block, position, scale, BLOCK
                    )
                    at = statistics + statistics_index(block, queries, offset, BLOCK)
                    store_statistics(at, plane, shift, block_delta, dlandmark, row_ok & (position >= block * BLOCK))
                    next_ds = gl.convert_layout(next_ds.to(DTYPE), OPERAND)
                    dq = warpgroup_mma(next_ds, k_tiles.index(k_slot), dq, is_async=True)
                    dq = warpgroup_mma_wait(0, deps=(dq,))
                k_slot, k_phase = release(k_ring, k_slot, k_phase)
                v_slot, v_phase = release(v_ring, v_slot, v_phase)

            if row < queries:
                q.store((dq * softmax_scale).to(DTYPE))
                fence_async_shared()
                store_tile(dq_desc, head // query_heads, head % query_heads, row, q)
                tma.store_wait(0)
            thread_barrier()
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
            mbarrier.arrive(dout_empty.index(CONSUMER), count=1)
            q_phase ^= 1


@gluon.jit(do_not_specialize=["turns", "queries", "offset", "first_head", "query_heads", "plane", "numbers"])
def query_gradient_kernel(q_desc, dout_desc, k_desc, v_desc, dq_desc, OUT, LSE, DLSE, STATISTICS, SCHEDULE, out_strides,
                          turns, scale, softmax_scale, queries, offset, first_head, query_heads, plane, numbers,
                          HEADS_PER_KEY: gl.constexpr, BLOCK: gl.constexpr, CONSUMERS: gl.constexpr,
                          K_SLOTS: gl.constexpr, V_SLOTS: gl.constexpr):  # fmt: skip
    """dq of the scheduled heads, counted from first_head on, and their STATISTICS (heads, 3, plane).

    LSE and DLSE hold `numbers` for each head; they begin with those of the queries.
    """
    COLS: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = k_desc.block_type.shape[3]
    DTYPE: gl.constexpr = k_desc.dtype
    Q_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    K_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLS, D], DTYPE)
    q_ring = allocate_ring(gl.allocate_shared_memory(DTYPE, [CONSUMERS, ROWS, D], Q_TILE), CONSUMERS, 1)
    dout_ring = allocate_ring(gl.allocate_shared_memory(DTYPE, [CONSUMERS, ROWS, D], Q_TILE), CONSUMERS, 1)
    k_ring = allocate_ring(gl.allocate_shared_memory(DTYPE, [K_SLOTS, COLS, D], K_TILE), K_SLOTS, CONSUMERS)
    v_ring = allocate_ring(gl.allocate_shared_memory(DTYPE, [V_SLOTS, COLS, D], K_TILE), V_SLOTS, CONSUMERS)
    fence_async_shared()
    rings = (q_ring, dout_ring, k_ring, v_ring)
    sizes = (turns, queries, offset, first_head, query_heads, plane, numbers)
    scales = (scale, softmax_scale)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consumer, (0, rings, dq_desc, OUT, out_strides, LSE, DLSE, STATISTICS, SCHEDULE, scales, sizes, BLOCK,
                        CONSUMERS)),
            (consumer, (1, rings, dq_desc, OUT, out_strides, LSE, DLSE, STATISTICS, SCHEDULE, scales, sizes, BLOCK,
                        CONSUMERS)),
            (producer, (q_desc, dout_desc, k_desc, v_desc, rings, SCHEDULE, sizes, HEADS_PER_KEY, BLOCK, CONSUMERS)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer, (0, rings, dq_desc, OUT, out_strides, LSE, DLSE, STATISTICS, SCHEDULE, scales, sizes, BLOCK,
                        CONSUMERS)),
            (consumer, (1, rings, dq_desc, OUT, out_strides, LSE, DLSE, STATISTICS, SCHEDULE, scales, sizes, BLOCK,
                        CONSUMERS)),
            (consumer, (2, rings, dq_desc, OUT, out_strides, LSE, DLSE, STATISTICS, SCHEDULE, scales, sizes, BLOCK,
                        CONSUMERS)),
            (producer, (q_desc, dout_desc, k_desc, v_desc, rings, SCHEDULE, sizes, HEADS_PER_KEY, BLOCK, CONSUMERS)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
