"""What forward does with blocks: with those before all its rows ("whole"), chunk by chunk, and with those to be masked.

The whole ones are a pipeline, one block or two a step: while the tensor cores multiply a step's weights by its values,
the next step's softmaxes run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .pipeline import MINUS_INFINITY, ROWS, following, pack, reciprocal, release, start_product


@gluon.jit
def landmark_logits(q, zeros, k_ring, slot, phase):
    """A chunk's landmark logits, (ROWS, COLS), whose keys come before its blocks': (logits, the place after them).

    q: (ROWS, D); zeros: (ROWS, COLS).
    """
    tiles, full, empty = k_ring
    mbarrier.wait(full.index(slot), phase)
    s = start_product(q, tiles.index(slot), zeros)
    s = warpgroup_mma_wait(0, deps=(s,))
    slot, phase = release(k_ring, slot, phase)
    return s, slot, phase


@gluon.jit
def chunk_shares(s, top, total, acc, shares, first, whole, scale):
    """Outer softmax over a chunk's landmark logits s, (ROWS, COLS), whose shares are left in shared memory.

    shares: (COLS, ROWS). top, total: (ROWS,) and acc: (ROWS, D), the softmax's maximum, sum and output so far.
    """
    COLS: gl.constexpr = s.shape[1]
    col = gl.arange(0, COLS, gl.SliceLayout(0, s.type.layout))  # (COLS,)
    s = gl.where((first + col)[None, :] < whole, s * scale, MINUS_INFINITY)
    new_top = gl.maximum(top, gl.max(s, 1))
    rescale = gl.exp2(top - new_top)
    outer = gl.exp2(s - new_top[:, None])  # (ROWS, COLS)
    shares.permute((1, 0)).store(outer)
    total = total * rescale + gl.sum(outer, 1)
    return new_top, total, acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def weights(s, share, scale, BLOCK: gl.constexpr, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """A whole block's in-block softmax times its share, as the left operand of the product with its values.

    s, and what it gives: (ROWS, COLS). share: (ROWS,).
    """
    COLS: gl.constexpr = s.shape[1]
    col = gl.arange(0, COLS, gl.SliceLayout(0, s.type.layout))  # (COLS,)
    s = gl.where(col[None, :] < BLOCK - 1, s, MINUS_INFINITY)
    p = gl.exp2(s * scale - (gl.max(s, 1) * scale)[:, None])  # (ROWS, COLS)
    p = p * (share * reciprocal(gl.sum(p, 1)))[:, None]
    return gl.convert_layout(pack(p, DTYPE), LAYOUT)


@gluon.jit
def consume_singles(q, zeros, k_ring, v_ring, shares, k_slot, k_phase, v_slot, v_phase, top, total, acc, whole, scale,
                    BLOCK: gl.constexpr, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """All whole blocks of a tile, one a step. Logits s and weights p are (ROWS, COLS), shares (ROWS,)."""
    k_tiles, k_full, k_empty = k_ring
    v_tiles, v_full, v_empty = v_ring
    CHUNK: gl.constexpr = k_tiles.shape[1]
    ROW: gl.constexpr = gl.SliceLayout(1, zeros.type.layout)
    share_rows = shares._reinterpret(gl.float32, [CHUNK, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for first in range(0, whole, CHUNK):
        landmarks, k_slot, k_phase = landmark_logits(q, zeros, k_ring, k_slot, k_phase)

        mbarrier.wait(k_full.index(k_slot), k_phase)
        s = start_product(q, k_tiles.index(k_slot), zeros)
        top, total, acc = chunk_shares(landmarks, top, total, acc, shares, first, whole, scale)
        s = warpgroup_mma_wait(0, deps=(s,))
        k_slot, k_phase = release(k_ring, k_slot, k_phase)
        p = weights(s, share_rows.index(0).load(ROW), scale, BLOCK, DTYPE, LAYOUT)

        last = gl.minimum(first + CHUNK, whole)
        mbarrier.wait(k_full.index(k_slot), k_phase, pred=first + 1 < last)
        for block in range(first + 1, last):
            s = start_product(q, k_tiles.index(k_slot), zeros)
            mbarrier.wait(v_full.index(v_slot), v_phase)
            sum_ = warpgroup_mma(p, v_tiles.index(v_slot), acc, is_async=True)
            share = share_rows.index(block - first).load(ROW)
            s = warpgroup_mma_wait(1, deps=(s,))
            k_slot, k_phase = release(k_ring, k_slot, k_phase)
            next_p = weights(s, share, scale, BLOCK, DTYPE, LAYOUT)
            mbarrier.wait(k_full.index(k_slot), k_phase, pred=block + 1 < last)
            acc, p, next_p = warpgroup_mma_wait(0, deps=(sum_, p, next_p))
            v_slot, v_phase = release(v_ring, v_slot, v_phase)
            p = next_p
        mbarrier.wait(v_full.index(v_slot), v_phase)
        acc = warpgroup_mma(p, v_tiles.index(v_slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        v_slot, v_phase = release(v_ring, v_slot, v_phase)
    return k_slot, k_phase, v_slot, v_phase, top, total, acc


@gluon.jit
def consume_pairs(q, zeros, k_ring, v_ring, shares, k_slot, k_phase, v_slot, v_phase, top, total, acc, whole, scale,
                  BLOCK: gl.constexpr, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """All whole blocks of a tile, two a step. Logits s0, s1 and weights p0, p1 are (ROWS, COLS), shares (ROWS,)."""
    k_tiles, k_full, k_empty = k_ring
    v_tiles, v_full, v_empty = v_ring
    K_SLOTS: gl.constexpr = k_tiles.shape[0]
    V_SLOTS: gl.constexpr = v_tiles.shape[0]
    CHUNK: gl.constexpr = k_tiles.shape[1]
    ROW: gl.constexpr = gl.SliceLayout(1, zeros.type.layout)
    share_rows = shares._reinterpret(gl.float32, [CHUNK, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for first in range(0, whole, CHUNK):
        landmarks, k_slot, k_phase = landmark_logits(q, zeros, k_ring, k_slot, k_phase)

        mbarrier.wait(k_full.index(k_slot), k_phase)
        s0 = start_product(q, k_tiles.index(k_slot), zeros)
        k_slot1, k_phase1 = following(k_slot, k_phase, K_SLOTS)
        top, total, acc = chunk_shares(landmarks, top, total, acc, shares, first, whole, scale)
        mbarrier.wait(k_full.index(k_slot1), k_phase1)
        s1 = start_product(q, k_tiles.index(k_slot1), zeros)
        s0 = warpgroup_mma_wait(1, deps=(s0,))
        mbarrier.arrive(k_empty.index(k_slot), count=1)
        p0 = weights(s0, share_rows.index(0).load(ROW), scale, BLOCK, DTYPE, LAYOUT)
        s1 = warpgroup_mma_wait(0, deps=(s1,))
        k_slot, k_phase = release(k_ring, k_slot1, k_phase1)
        p1 = weights(s1, share_rows.index(1).load(ROW), scale, BLOCK, DTYPE, LAYOUT)

        last = gl.minimum(first + CHUNK, whole)
        mbarrier.wait(k_full.index(k_slot), k_phase, pred=first + 2 < last)
        for block in range(first + 2, last, 2):
            s0 = start_product(q, k_tiles.index(k_slot), zeros)
            mbarrier.wait(v_full.index(v_slot), v_phase)
            sum_ = warpgroup_mma(p0, v_tiles.index(v_slot), acc, is_async=True)
            k_slot1, k_phase1 = following(k_slot, k_phase, K_SLOTS)
            mbarrier.wait(k_full.index(k_slot1), k_phase1)
            s1 = start_product(q, k_tiles.index(k_slot1), zeros)
            v_slot1, v_phase1 = following(v_slot, v_phase, V_SLOTS)
            mbarrier.wait(v_full.index(v_slot1), v_phase1)
            sum_ = warpgroup_mma(p1, v_tiles.index(v_slot1), sum_, is_async=True)
            share0 = share_rows.index(block - first).load(ROW)
            share1 = share_rows.index(block - first + 1).load(ROW)
            s0, s1, p0 = warpgroup_mma_wait(1, deps=(s0, s1, p0))
            mbarrier.arrive(k_empty.index(k_slot), count=1)
            k_slot, k_phase = release(k_ring, k_slot1, k_phase1)
            mbarrier.arrive(v_empty.index(v_slot), count=1)
            next0 = weights(s0, share0, scale, BLOCK, DTYPE, LAYOUT)
            next1 = weights(s1, share1, scale, BLOCK, DTYPE, LAYOUT)
            mbarrier.wait(k_full.index(k_slot), k_phase, pred=block + 2 < last)
            acc, p1, next0, next1 = warpgroup_mma_wait(0, deps=(sum_, p1, next0, next1))
            v_slot, v_phase = release(v_ring, v_slot1, v_phase1)
            p0 = next0
            p1 = next1
        mbarrier.wait(v_full.index(v_slot), v_phase)
        sum_ = warpgroup_mma(p0, v_tiles.index(v_slot), acc, is_async=True)
        v_slot1, v_phase1 = following(v_slot, v_phase, V_SLOTS)
        mbarrier.wait(v_full.index(v_slot1), v_phase1)
        sum_ = warpgroup_mma(p1, v_tiles.index(v_slot1), sum_, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(sum_,))
        mbarrier.arrive(v_empty.index(v_slot), count=1)
        v_slot, v_phase = release(v_ring, v_slot1, v_phase1)
    return k_slot, k_phase, v_slot, v_phase, top, total, acc


@gluon.jit
def masked_weights(s, top, total, acc, block, position, scale, BLOCK: gl.constexpr, DTYPE: gl.constexpr,
                   LAYOUT: gl.constexpr):  # fmt: skip
    """One block that rows may stand in, before or behind: (top, total, acc rescaled, weights (ROWS, COLS))."""
    COLS: gl.constexpr = s.shape[1]
    col = gl.arange(0, COLS, gl.SliceLayout(0, s.type.layout))  # (COLS,)
    start = block * BLOCK
    earlier = position >= start + BLOCK  # (ROWS,)
    text = (col[None, :] < BLOCK - 1) & (start + col[None, :] <= position[:, None])  # (ROWS, COLS)
    landmark = gl.max(gl.where(col[None, :] == BLOCK - 1, s, MINUS_INFINITY), 1) * scale  # (ROWS,)
    s = gl.where(text, s, MINUS_INFINITY)
    inner_top = gl.max(s, 1) * scale
    inner_top = gl.where(inner_top == MINUS_INFINITY, 0.0, inner_top)
    p = gl.exp2(s * scale - inner_top[:, None])  # (ROWS, COLS)
    inner = gl.sum(p, 1)  # (ROWS,), as all that follows but p and acc
    logit = gl.where(earlier, landmark, inner_top + gl.log2(inner))
    new_top = gl.maximum(top, logit)
    finite = gl.where(new_top == MINUS_INFINITY, 0.0, new_top)
    rescale = gl.exp2(top - finite)
    outer = gl.exp2(logit - finite)
    total = total * rescale + outer
    p = p * gl.where(inner > 0, outer / inner, 0.0)[:, None]
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    return new_top, total, acc, gl.convert_layout(p.to(DTYPE), LAYOUT)
