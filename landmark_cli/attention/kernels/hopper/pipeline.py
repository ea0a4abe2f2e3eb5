"""What the Hopper kernels share: rings of tiles between a producer warp and its consumers, schedules, assembly.

A ring is a tuple (tiles, full, empty): `tiles` holds so many slots of shared memory, and each slot has two barriers.

    producer:  wait(empty) -> the copy engine fills the slot and completes `full` when its bytes have landed
    consumer:  wait(full)  -> products read the slot, are waited for -> arrive(empty)

Both sides count slots in the same order, so a place in a ring is (slot, phase): phase is the parity of the round that
`full` or `empty` completes. The producer begins with phase 1: waiting for the round before the first returns at once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

# Query rows of a tile, as many as a warpgroup multiplies at a time.
ROWS = gl.constexpr(64)
MINUS_INFINITY = gl.constexpr(float("-inf"))

# All threads of a partition wait for each other; the name changed between versions.
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def allocate_ring(tiles, SLOTS: gl.constexpr, CONSUMERS: gl.constexpr):
    """A ring around `tiles`, of which every slot is read by CONSUMERS warpgroups."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], layout)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    return tiles, full, empty


@gluon.jit
def following(slot, phase, SLOTS: gl.constexpr):
    """The place in a ring after (slot, phase)."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def copy_tile(descriptor, batch, head, row, full, tile):
    """Start the copy of rows row... of a head into a tile; rows outside the tensor become 0."""
    whole: gl.constexpr = descriptor.block_type.shape
    view = tile._reinterpret(tile.dtype, whole, descriptor.layout)
    tma.async_copy_global_to_shared(descriptor, [batch, head, row, 0], full, view)


@gluon.jit
def produce(descriptor, batch, head, row, ring, slot, phase):
    """Fill the next slot of a ring with one tile; returns the place after it."""
    tiles, full, empty = ring
    mbarrier.wait(empty.index(slot), phase)
    mbarrier.expect(full.index(slot), descriptor.block_type.nbytes)
    copy_tile(descriptor, batch, head, row, full.index(slot), tiles.index(slot))
    return following(slot, phase, tiles.shape[0])


@gluon.jit
def release(ring, slot, phase):
    """A consumer has read a slot; returns the place after it."""
    tiles, full, empty = ring
    mbarrier.arrive(empty.index(slot), count=1)
    return following(slot, phase, tiles.shape[0])


@gluon.jit
def start_product(a, tile, zeros):
    """Begin a @ tile^T, (rows of a, rows of tile) in float32; to be waited for."""
    return warpgroup_mma(a, tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def store_tile(descriptor, batch, head, row, tile):
    """Start the copy of a tile to rows row... of a head; rows outside the tensor are left out."""
    whole: gl.constexpr = descriptor.block_type.shape
    view = tile._reinterpret(tile.dtype, whole, descriptor.layout)
    tma.async_copy_shared_to_global(descriptor, [batch, head, row, 0], view)


@gluon.jit
def scheduled(SCHEDULE, turn):
    """(head, tile) of this program's turn; a tile of -1 means that it has nothing more to do."""
    entry = SCHEDULE + 2 * (turn * gl.num_programs(0) + gl.program_id(0))
    return gl.load(entry), gl.load(entry + 1)


@gluon.jit
def pack(x, DTYPE: gl.constexpr):
    """x in 16 bits. Volatile, so that the compiler cannot move it below the wait for the products that follow."""
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=False, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=False, pack=2
        )


@gluon.jit
def volatile_exp2(x):
    """2^x that stays where it stands."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def reciprocal(x):
    """1 / x, to about a unit in the last place."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)
