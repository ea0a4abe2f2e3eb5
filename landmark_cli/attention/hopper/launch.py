"""Launching the Hopper kernels: descriptors for the copy engine, schedules, a workspace that stays below a bound."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..fused.launch import LOG2E, empty_heads_last, work_groups
from ..fused.tiles import statistics_size
from .forward import forward_kernel
from .key_gradient import key_gradient_kernel
from .query_gradient import query_gradient_kernel
from .schedule import key_schedule, query_schedule

GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

# The copy engine takes addresses and strides that are multiples of this many bytes.
ALIGNMENT = 16

# Query heads to work on at a time, so that their keys and values stay in the L2 cache.
HEADS_IN_FLIGHT = 8


@dataclass(frozen=True)
class ForwardConfiguration:
    """consumers: warpgroups, of 64 query rows each; slots of the rings; step: blocks in one step of the pipeline."""

    consumers: int
    key_slots: int
    value_slots: int
    step: int

    @property
    def registers(self) -> int:
        """Registers a thread at the start, all there are: warpgroups then trade them."""
        return 65536 // (128 * (self.consumers + 1)) // 8 * 8


FORWARD = {
    128: ForwardConfiguration(2, 3, 4, 2),
    64: ForwardConfiguration(3, 4, 4, 1),
}


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, *, choice: ForwardConfiguration | None = None
) -> tuple[Tensor, Tensor]:
    """(out (B, H, Tq, D), lse (B, H, Tq) float32), as the portable kernel's."""
    q, k, v = aligned(q), aligned(k), aligned(v)
    batch, heads, queries, dim = q.shape
    offset = k.shape[2] - queries
    group = heads // k.shape[1]
    choice = choice or FORWARD[dim]
    out = empty_heads_last(q)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    cols = padded(block_size)
    in_flight = heads_in_flight(batch * heads, group)
    table = query_schedule(queries, offset, 64 * choice.consumers, block_size, batch * heads, in_flight, q.device)
    landmarks = k[:, :, block_size - 1 :: block_size]
    with torch.cuda.device(q.device):
        forward_kernel[(table.shape[1],)](
            descriptor(q, 64), descriptor(k, cols), descriptor(v, cols), descriptor(landmarks, cols),
            descriptor(out, 64), lse, table, table.shape[0], scale * LOG2E, queries, offset, heads,
            GROUP=group, BLOCK=block_size, CONSUMERS=choice.consumers, K_SLOTS=choice.key_slots,
            V_SLOTS=choice.value_slots, STEP=choice.step, num_warps=4, maxnreg=choice.registers,
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) for the gradients of out and, where there is one, of lse: in parts, as the portable kernels."""
    dout, q, k, v, out = (aligned(x) for x in (dout, q, k, v, out))
    batch, _, queries, _ = q.shape
    key_heads = k.shape[1]
    offset = k.shape[2] - queries
    dq, dk, dv = empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)
    head_step, row_step = work_groups(q, k, block_size)
    # From the last rows on, since only they reach all keys: what comes after adds to their dk and dv.
    for first_row in reversed(range(0, queries, row_step)):
        rows = slice(first_row, min(first_row + row_step, queries))
        keys = slice(offset + rows.stop)
        part = {
            **{name: x[:, :, rows] for name, x in (("q", q), ("dout", dout), ("out", out), ("dq", dq))},
            **{name: x[:, :, keys] for name, x in (("k", k), ("v", v), ("dk", dk), ("dv", dv))},
            "lse": lse[:, :, rows].contiguous(),
            "dlse": None if dlse is None else dlse[:, :, rows].contiguous(),
        }
        for first_head in range(0, batch * key_heads, head_step):
            heads = first_head, min(head_step, batch * key_heads - first_head)
            with torch.cuda.device(q.device):
                statistics = query_gradient(part, heads, block_size, scale)
                key_gradient(part, statistics, heads, block_size, scale, accumulate=rows.stop < queries)
                del statistics
    return dq, dk, dv


def query_gradient(part: dict, heads: tuple[int, int], block_size: int, scale: float) -> Tensor:
    """Launch the first backward kernel on a part and some key heads: (the first, how many). Returns statistics."""
    first_head, key_heads = heads
    q, k = part["q"], part["k"]
    queries = q.shape[2]
    offset = k.shape[2] - queries
    group = q.shape[1] // k.shape[1]
    cols = padded(block_size)
    statistics = q.new_empty(3 * key_heads * group, statistics_size(queries, offset, block_size), dtype=torch.float32)
    in_flight = heads_in_flight(key_heads * group, group)
    table = query_schedule(queries, offset, 128, block_size, key_heads * group, in_flight, q.device)
    query_gradient_kernel[(table.shape[1],)](
        descriptor(q, 64), descriptor(part["dout"], 64), descriptor(k, cols), descriptor(part["v"], cols),
        descriptor(part["dq"], 64), part["out"], part["out"].stride()[:3], part["lse"], part["dlse"], statistics, table,
        table.shape[0], scale * LOG2E, scale, queries, offset, first_head * group, q.shape[1], statistics.shape[1],
        GROUP=group, BLOCK=block_size, K_SLOTS=4, V_SLOTS=3, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return statistics


def key_gradient(
    part: dict, statistics: Tensor, heads: tuple[int, int], block_size: int, scale: float, *, accumulate: bool
) -> None:
    """Launch the second backward kernel on the same. accumulate: add to dk and dv."""
    first_head, key_heads = heads
    q, k, dk, dv = (part[name] for name in ("q", "k", "dk", "dv"))
    queries = q.shape[2]
    offset = k.shape[2] - queries
    group = q.shape[1] // k.shape[1]
    in_flight = heads_in_flight(key_heads * group, group) // group
    table = key_schedule(queries, offset, 2, block_size, group, key_heads, in_flight, q.device)
    of_statistics = TensorDescriptor(
        statistics, list(statistics.shape), list(statistics.stride()), [4, 64], statistics_layout()
    )
    key_gradient_kernel[(table.shape[1],)](
        descriptor(q, 64), descriptor(part["dout"], 64), descriptor(k, 64), descriptor(part["v"], 64), of_statistics,
        dk, dv, dk.stride()[:3], dv.stride()[:3], table, table.shape[0], scale * LOG2E, scale, queries, offset,
        first_head, k.shape[1],
        GROUP=group, BLOCK=block_size, SLOTS=2, ACCUMULATE=accumulate, num_warps=4, maxnreg=168,
    )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    """x (B, H, T, D) as the copy engine takes it, copied only where it is not."""
    width = x.element_size()
    steps = [stride * width for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    fits = all(step > 0 and step % ALIGNMENT == 0 for step in steps) and x.stride(3) == 1
    return x if fits and x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)


def padded(block_size: int) -> int:
    """Keys a tile: a block, padded to a power of two."""
    return max(16, triton.next_power_of_2(block_size))


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """What the copy engine needs to know of x (B, H, T, D) to copy tiles of `rows` tokens of one head."""
    found = object.__new__(TensorDescriptor)
    found.__dict__.update(_description(x.shape, x.stride(), x.dtype, rows), base=x)
    return found


@functools.lru_cache(maxsize=1024)
def _description(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, rows: int) -> dict:
    """A descriptor's fields for any such tensor: Triton's checks of them take the host longer than all the rest."""
    block = [1, 1, rows, shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_DTYPES[dtype])
    # Nothing steps along a dimension of size 1, but the engine wants an aligned number.
    steps = [stride if size > 1 else shape[3] for size, stride in zip(shape[:3], strides, strict=False)]
    example = torch.empty(0, dtype=dtype)
    return vars(TensorDescriptor(example, list(shape), [*steps, 1], block, layout))


@functools.cache
def statistics_layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([4, 64], gl.float32)


def heads_in_flight(query_heads: int, group: int) -> int:
    """How many query heads to work on at a time: whole groups, few enough for the L2 cache."""
    return min(query_heads, triton.cdiv(HEADS_IN_FLIGHT, group) * group)
