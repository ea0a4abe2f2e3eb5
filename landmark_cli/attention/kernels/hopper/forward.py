"""The forward kernel for Hopper: a producer warp copies tiles, consumer warpgroups each attend with 64 query rows.

The mathematics is that of the portable kernel (training/forward.py): one loop over blocks, whichever kind a block is.
Two things differ, both because the blocks before every row of the tile ("whole" blocks) need no mask:

- Their outer softmax runs once per chunk of blocks: one product of the queries with the chunk's landmarks gives the
  shares of all its blocks at once, which wait in shared memory, so `acc` is not rescaled block by block.
- Where registers suffice two blocks make a step: while the tensor cores multiply the weights of the second by its
  values, the softmaxes of the next two run.

Rings and their order, for a tile that touches blocks 0..m-1, of which n are whole to one of its consumers at least (c:
blocks in a chunk):

    keys:    landmarks of chunk 0, blocks 0..c-1, landmarks of chunk 1, blocks c..2c-1, ..., landmarks of the chunk that
             ends with block n-1, its blocks, blocks n..m-1
    values:  blocks 0..m-1
    queries: STAGES slots a consumer; one is empty again when the consumer's output has left it

Source: arXiv 2305.16300, section 3.1. Logits are kept times log2(e): exp2 is what the hardware has.
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

from ..common.tiles import LN2
from .forward_blocks import consume_pairs, consume_singles, masked_weights
from .pipeline import (
    ROWS,
    allocate_ring,
    following,
    produce,
    release,
    scheduled,
    start_product,
    store_tile,
    thread_barrier,
)


@gluon.jit
def tile_blocks(tile, queries, offset, BLOCK: gl.constexpr, CONSUMERS: gl.constexpr):
    """(first row of a tile, blocks that it touches)."""
    row = tile * (ROWS * CONSUMERS)
    last = gl.minimum(row + ROWS * CONSUMERS, queries) - 1 + offset
    return row, last // BLOCK + 1


@gluon.jit
def whole_blocks(row, touched, offset, BLOCK: gl.constexpr, STEP: gl.constexpr):
    """Blocks before all rows of a consumer, which begin at `row`: a multiple of STEP.

    One whose rows are all behind the last query goes along with the tile. (None for it, by gl.where, would be nearer,
    but has ptxas order the instructions of the query gradient's loop so that it takes a tenth longer.)
    """
    return gl.minimum((row + offset) // BLOCK, touched - 1) // STEP * STEP


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """As `following`; where there is one stage it stays a constant."""
    if STAGES == 1:
        return stage, phase ^ 1
    else:
        return following(stage, phase, STAGES)


@gluon.jit
def producer(q_desc, k_desc, v_desc, landmark_desc, rings, SCHEDULE, sizes, HEADS_PER_KEY: gl.constexpr,
             BLOCK: gl.constexpr, CONSUMERS: gl.constexpr, STEP: gl.constexpr):  # fmt: skip
    """Fill the rings in the order in which the consumers read them."""
    q_ring, k_ring, v_ring = rings
    turns, queries, offset, query_heads = sizes
    CHUNK: gl.constexpr = k_ring[0].shape[1]
    STAGES: gl.constexpr = q_ring[0].shape[0] // CONSUMERS
    k_slot, k_phase, v_slot, v_phase, stage, q_phase = 0, 1, 0, 1, 0, 1
    for turn in range(turns):
        head, tile = scheduled(SCHEDULE, turn)
        if tile >= 0:
            batch = head // query_heads
            key_head = head % query_heads // HEADS_PER_KEY
            row, touched = tile_blocks(tile, queries, offset, BLOCK, CONSUMERS)
            most_whole = whole_blocks(row + ROWS * (CONSUMERS - 1), touched, offset, BLOCK, STEP)
            for which in gl.static_range(CONSUMERS):
                slot = stage * CONSUMERS + which
                produce(q_desc, batch, head % query_heads, row + ROWS * which, q_ring, slot, q_phase)
            stage, q_phase = next_stage(stage, q_phase, STAGES)
            for block in range(touched):
                if (block < most_whole) & (block % CHUNK == 0):
                    k_slot, k_phase = produce(landmark_desc, batch, key_head, block, k_ring, k_slot, k_phase)
                k_slot, k_phase = produce(k_desc, batch, key_head, block * BLOCK, k_ring, k_slot, k_phase)
                v_slot, v_phase = produce(v_desc, batch, key_head, block * BLOCK, v_ring, v_slot, v_phase)


@gluon.jit
def consumer(CONSUMER: gl.constexpr, rings, shares, out_desc, LSE, SCHEDULE, scale, sizes, BLOCK: gl.constexpr,
             CONSUMERS: gl.constexpr, STEP: gl.constexpr):  # fmt: skip
    """64 query rows of every tile: all blocks, the softmax's end, the output."""
    q_ring, k_ring, v_ring = rings
    turns, queries, offset, query_heads = sizes
    q_tiles, q_full, q_empty = q_ring
    k_tiles, k_full, k_empty = k_ring
    v_tiles, v_full, v_empty = v_ring
    COLS: gl.constexpr = k_tiles.shape[1]
    D: gl.constexpr = k_tiles.shape[2]
    DTYPE: gl.constexpr = k_tiles.dtype
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    STAGES: gl.constexpr = q_tiles.shape[0] // CONSUMERS
    zeros = gl.zeros([ROWS, COLS], gl.float32, LOGITS)
    k_slot, k_phase, v_slot, v_phase, stage, q_phase = 0, 0, 0, 0, 0, 0
    for turn in range(turns):
        head, tile = scheduled(SCHEDULE, turn)
        if tile >= 0:
            row, touched = tile_blocks(tile, queries, offset, BLOCK, CONSUMERS)
            most_whole = whole_blocks(row + ROWS * (CONSUMERS - 1), touched, offset, BLOCK, STEP)
            row += ROWS * CONSUMER
            whole = whole_blocks(row, touched, offset, BLOCK, STEP)
            rows = row + gl.arange(0, ROWS, ROW)  # (ROWS,), as position
            position = rows + offset
            slot = stage * CONSUMERS + CONSUMER
            q_tile = q_tiles.index(slot)
            mbarrier.wait(q_full.index(slot), q_phase)
            q = q_tile.load(gl.DotOperandLayout(0, LOGITS, 2))  # (ROWS, D)
            top = gl.full([ROWS], float("-inf"), gl.float32, ROW)
            total = gl.zeros([ROWS], gl.float32, ROW)
            acc = gl.zeros([ROWS, D], gl.float32, OUT)
            if STEP == 2:
                k_slot, k_phase, v_slot, v_phase, top, total, acc = consume_pairs(
                    q, zeros, k_ring, v_ring, shares.index(CONSUMER), k_slot, k_phase, v_slot, v_phase, top, total,
                    acc, whole, scale, BLOCK, DTYPE, WEIGHTS)  # fmt: skip
            else:
                k_slot, k_phase, v_slot, v_phase, top, total, acc = consume_singles(
                    q, zeros, k_ring, v_ring, shares.index(CONSUMER), k_slot, k_phase, v_slot, v_phase, top, total,
                    acc, whole, scale, BLOCK, DTYPE, WEIGHTS)  # fmt: skip

            last = (row + ROWS - 1 + offset) // BLOCK
            for block in range(whole, touched):
                if (block < most_whole) & (block % COLS == 0):
                    # Another consumer's chunk begins here; this one has no use for its landmarks.
                    mbarrier.wait(k_full.index(k_slot), k_phase)
                    k_slot, k_phase = release(k_ring, k_slot, k_phase)
                mbarrier.wait(k_full.index(k_slot), k_phase)
                mbarrier.wait(v_full.index(v_slot), v_phase)
                if block <= last:
                    s = start_product(q, k_tiles.index(k_slot), zeros)  # (ROWS, COLS), as p
                    s = warpgroup_mma_wait(0, deps=(s,))
                    top, total, acc, p = masked_weights(
                        s, top, total, acc, block, position, scale, BLOCK, DTYPE, WEIGHTS
                    )
                    acc = warpgroup_mma(p, v_tiles.index(v_slot), acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=(acc,))
                k_slot, k_phase = release(k_ring, k_slot, k_phase)
                v_slot, v_phase = release(v_ring, v_slot, v_phase)

            if row < queries:
                acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, OUT))[:, None]
                lse = (top + gl.log2(total)) * LN2  # (ROWS,)
                gl.store(LSE + head.to(gl.int64) * queries + rows, lse, mask=rows < queries)
                q_tile.store(acc.to(DTYPE))
                fence_async_shared()
                store_tile(out_desc, head // query_heads, head % query_heads, row, q_tile)
                tma.store_wait(0)
            thread_barrier()
            mbarrier.arrive(q_empty.index(slot), count=1)
            stage, q_phase = next_stage(stage, q_phase, STAGES)


@gluon.jit(do_not_specialize=["turns", "queries", "offset", "query_heads"])
def forward_kernel(q_desc, k_desc, v_desc, landmark_desc, out_desc, LSE, SCHEDULE, turns, scale, queries, offset,
                   query_heads, HEADS_PER_KEY: gl.constexpr, BLOCK: gl.constexpr, CONSUMERS: gl.constexpr,
                   K_SLOTS: gl.constexpr, V_SLOTS: gl.constexpr, STAGES: gl.constexpr,
                   STEP: gl.constexpr):  # fmt: skip
    """OUT (B, H, queries, D) and LSE (B, H, queries), natural, of the queries behind `offset` keys."""
    COLS: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = k_desc.block_type.shape[3]
    DTYPE: gl.constexpr = k_desc.dtype
    Q_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    K_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLS, D], DTYPE)
    ROW_SLOTS: gl.constexpr = STAGES * CONSUMERS
    q_ring = allocate_ring(gl.allocate_shared_memory(DTYPE, [ROW_SLOTS, ROWS, D], Q_TILE), ROW_SLOTS, 1)
    k_ring = allocate_ring(gl.allocate_shared_memory(DTYPE, [K_SLOTS, COLS, D], K_TILE), K_SLOTS, CONSUMERS)
    v_ring = allocate_ring(gl.allocate_shared_memory(DTYPE, [V_SLOTS, COLS, D], K_TILE), V_SLOTS, CONSUMERS)
    shares = gl.allocate_shared_memory(gl.float32, [CONSUMERS, COLS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    fence_async_shared()
    rings = (q_ring, k_ring, v_ring)
    sizes = (turns, queries, offset, query_heads)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consumer, (0, rings, shares, out_desc, LSE, SCHEDULE, scale, sizes, BLOCK, CONSUMERS, STEP)),
            (consumer, (1, rings, shares, out_desc, LSE, SCHEDULE, scale, sizes, BLOCK, CONSUMERS, STEP)),
            (producer, (q_desc, k_desc, v_desc, landmark_desc, rings, SCHEDULE, sizes, HEADS_PER_KEY, BLOCK, CONSUMERS,
                        STEP)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer, (0, rings, shares, out_desc, LSE, SCHEDULE, scale, sizes, BLOCK, CONSUMERS, STEP)),
            (consumer, (1, rings, shares, out_desc, LSE, SCHEDULE, scale, sizes, BLOCK, CONSUMERS, STEP)),
            (consumer, (2, rings, shares, out_desc, LSE, SCHEDULE, scale, sizes, BLOCK, CONSUMERS, STEP)),
            (producer, (q_desc, k_desc, v_desc, landmark_desc, rings, SCHEDULE, sizes, HEADS_PER_KEY, BLOCK, CONSUMERS,
                        STEP)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
