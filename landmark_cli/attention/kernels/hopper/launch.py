"""Launching the Hopper kernels: descriptors for the copy engine, schedules, a workspace that stays below a bound."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..common.configuration import padded
from ..common.launch import ALIGNMENT, Address, Launch, LaunchCache, Operand, launch
from ..common.statistics import Part
from ..common.tensors import empty_heads_last
from ..common.tiles import LOG2E
from .forward import forward_kernel
from .key_gradient import CONSUMERS, key_gradient_kernel
from .parts import backward_parts
from .query_gradient import query_gradient_kernel
from .schedule import key_schedule, query_schedule

GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}

KEY_CONSUMERS = CONSUMERS.value

FORWARD_CALLS, BACKWARD_CALLS = LaunchCache(), LaunchCache()


@dataclass(frozen=True)
class ForwardConfiguration:
    """consumers: warpgroups, of 64 query rows each; slots of the rings; step: blocks in one step of the pipeline.

    row_stages: tiles whose rows are there or on their way at a time.
    """

    consumers: int
    key_slots: int
    value_slots: int
    step: int
    row_stages: int = 1


@dataclass(frozen=True)
class BackwardConfiguration:
    """Slots of the rings of keys and of values (first kernel) and of rows (second kernel); consumers of the first."""

    key_slots: int
    value_slots: int
    row_slots: int
    consumers: int = 2


def launch_options(consumers: int) -> dict[str, int]:
    """maxnreg: registers a thread at the start, all there are: warpgroups then trade them."""
    return {"num_warps": 4, "maxnreg": 65536 // (128 * (consumers + 1)) // 8 * 8}


def forward_configuration(queries: int, dim: int, block_size: int) -> ForwardConfiguration:
    """The fastest of some five candidates on an H100 or H200.

    Short tiles end often: the next one's rows are on their way meanwhile. Where blocks fill their tiles, pairs of them
    overlap better; where they do not, more of them stand across a tile's rows and pairs cover fewer.
    """
    if dim == 64:
        return ForwardConfiguration(2, 4, 4, 2, row_stages=2)
    if queries <= 1024:
        return ForwardConfiguration(2, 3, 3, 1, row_stages=2)
    return ForwardConfiguration(2, 3, 4, 2 if block_size == padded(block_size) else 1)


def backward_configuration(queries: int, dim: int) -> BackwardConfiguration:
    """The fastest of some four candidates on an H100, by head dim and, for wide heads, by length."""
    if dim == 64:
        return BackwardConfiguration(4, 3, 4)
    return BackwardConfiguration(4, 3, 3 if queries <= 1024 else 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, *, choice: ForwardConfiguration | None = None
) -> tuple[Tensor, Tensor]:
    """(out (B, H, Tq, D), lse (B, H, Tq) float32) of q (B, H, Tq, D) and k, v (B, G, Tk, D), as training/ has it."""
    out = empty_heads_last(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    kind, tensors = (*_kind(q, k, v), block_size, scale, choice), (q, k, v, out, lse)
    # Strides are fit in calls of a known kind.
    if not FORWARD_CALLS.repeat(kind, tensors):
        inputs, copied = aligned(q, k, v)
        if copied:
            del out, lse, tensors
            return forward(*inputs, block_size, scale, choice=choice)
        chosen = choice or forward_configuration(q.shape[2], q.shape[3], block_size)
        FORWARD_CALLS.make(kind, tensors, lambda: [launch_forward(tensors, block_size, scale, chosen)])
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_size: int,
    scale: float, *, choice: BackwardConfiguration | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) for the gradients of out and, where there is one, of lse: in parts, as the portable kernels."""
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)
    parts, workspace = backward_parts(q, k, block_size)
    statistics = q.new_empty(workspace, dtype=torch.float32)
    kind = *_kind(q, k, v, out, dout), dlse is None, block_size, scale, choice
    tensors = q, k, v, out, dout, lse, dlse, dq, dk, dv, statistics
    if not BACKWARD_CALLS.repeat(kind, tensors):
        inputs, copied = aligned(q, k, v, out, dout)
        if copied:
            q, k, v, out, dout = inputs
            # Lest there be two of each.
            del dq, dk, dv, statistics, tensors
            return backward(dout, dlse, q, k, v, out, lse, block_size, scale, choice=choice)
        chosen = choice or backward_configuration(q.shape[2], q.shape[3])
        BACKWARD_CALLS.make(kind, tensors, lambda: launch_backward(tensors, parts, block_size, scale, chosen))
    return dq, dk, dv


def launch_forward(tensors: tuple, block_size: int, scale: float, choice: ForwardConfiguration) -> Launch | None:
    """Launch the forward kernel in a configuration."""
    q, k, v, out, lse = tensors
    batch, heads, queries, dim = q.shape
    offset, group = k.shape[2] - queries, heads // k.shape[1]
    rows, cols = (1, 1, 64, dim), (1, 1, padded(block_size), dim)
    operands = [
        _tiled(0, q, rows),
        _tiled(1, k, cols),
        _tiled(2, v, cols),
        _tiled(1, k[:, :, block_size - 1 :: block_size], cols),
        _tiled(3, out, rows),
        Operand(4, lse),
    ]
    table = query_schedule(queries, offset, 64 * choice.consumers, block_size, batch * heads, group, dim, q.device)
    arguments = table, table.shape[0], scale * LOG2E.value, queries, offset, heads
    constants = {**row_constants(choice, group, block_size), "STAGES": choice.row_stages, "STEP": choice.step}
    options = launch_options(choice.consumers)
    return launch(forward_kernel, table.shape[1], tensors, operands, arguments, constants, options)


def launch_backward(
    tensors: tuple, parts: list[Part], block_size: int, scale: float, choice: BackwardConfiguration
) -> Iterator[Launch | None]:
    """Launch both backward kernels on one part after the other."""
    for part in parts:
        yield launch_query_gradient(tensors, part, block_size, scale, choice)
        yield launch_key_gradient(tensors, part, block_size, scale, choice)


def launch_query_gradient(
    tensors: tuple, part: Part, block_size: int, scale: float, choice: BackwardConfiguration
) -> Launch | None:
    """Launch the first backward kernel on a part."""
    q, k, v, out, dout, lse, dlse, dq, _, _, workspace = tensors
    queries, offset, rows, cols = _ranges(q, k, part)
    group, dim = q.shape[1] // k.shape[1], q.shape[3]
    query_heads, plane = part.key_heads * group, 4 * part.plane
    row_tile, key_tile = (1, 1, 64, dim), (1, 1, padded(block_size), dim)
    operands = [
        _tiled(0, q[:, :, rows], row_tile),
        _tiled(4, dout[:, :, rows], row_tile),
        _tiled(1, k[:, :, cols], key_tile),
        _tiled(2, v[:, :, cols], key_tile),
        _tiled(7, dq[:, :, rows], row_tile),
        Operand(3, out[:, :, rows]),
        Operand(5, lse[:, :, rows]),
        Operand(6, None if dlse is None else dlse[:, :, rows]),
        Operand(10, _statistics(workspace, query_heads, plane)),
    ]
    table = query_schedule(queries, offset, 64 * choice.consumers, block_size, query_heads, group, dim, q.device)
    arguments = (
        table, out.stride()[:3], table.shape[0], scale * LOG2E.value, scale, queries, offset, part.first_head * group,
        q.shape[1], plane, q.shape[2],
    )  # fmt: skip
    constants, options = row_constants(choice, group, block_size), launch_options(choice.consumers)
    return launch(query_gradient_kernel, table.shape[1], tensors, operands, arguments, constants, options)


def launch_key_gradient(
    tensors: tuple, part: Part, block_size: int, scale: float, choice: BackwardConfiguration
) -> Launch | None:
    """Launch the second backward kernel on the same part. It adds to dk and dv unless the part has the last row."""
    q, k, v, _, dout, _, _, _, dk, dv, workspace = tensors
    queries, offset, rows, cols = _ranges(q, k, part)
    group, dim = q.shape[1] // k.shape[1], q.shape[3]
    tile = 1, 1, 64, dim
    operands = [
        _tiled(0, q[:, :, rows], tile),
        _tiled(4, dout[:, :, rows], tile),
        _tiled(1, k[:, :, cols], tile),
        _tiled(2, v[:, :, cols], tile),
        _tiled(10, _statistics(workspace, part.key_heads * group, 4 * part.plane), (4, 64)),
        Operand(8, dk),
        Operand(9, dv),
    ]
    table = key_schedule(queries, offset, KEY_CONSUMERS, block_size, part.key_heads, group, dim, q.device)
    arguments = (
        table, dk.stride()[:3], dv.stride()[:3], table.shape[0], scale * LOG2E.value, scale, queries, offset,
        part.first_head, k.shape[1],
    )  # fmt: skip
    constants = {
        "HEADS_PER_KEY": group,
        "BLOCK": block_size,
        "SLOTS": choice.row_slots,
        "ACCUMULATE": part.last_row < q.shape[2],
    }
    options = launch_options(KEY_CONSUMERS)
    return launch(key_gradient_kernel, table.shape[1], tensors, operands, arguments, constants, options)


def _ranges(q: Tensor, k: Tensor, part: Part) -> tuple[int, int, slice, slice]:
    """Of a part: its queries, keys before the first of them, its rows of q, and the keys that any of them sees."""
    queries, offset = part.last_row - part.first_row, k.shape[2] - q.shape[2] + part.first_row
    return queries, offset, slice(part.first_row, part.last_row), slice(offset + queries)


def _statistics(workspace: Tensor, query_heads: int, plane: int) -> Tensor:
    """A part's statistics, (3 * query heads, plane)."""
    return workspace[: 3 * query_heads * plane].view(3 * query_heads, plane)


def row_constants(choice: ForwardConfiguration | BackwardConfiguration, group: int, block_size: int) -> dict[str, int]:
    """What both kernels that walk by query rows are compiled for."""
    return {
        "HEADS_PER_KEY": group,
        "BLOCK": block_size,
        "CONSUMERS": choice.consumers,
        "K_SLOTS": choice.key_slots,
        "V_SLOTS": choice.value_slots,
    }


def aligned(*tensors: Tensor) -> tuple[list[Tensor], bool]:
    """Tensors (B, H, T, D) as the copy engine takes them, copied only where they are not; and whether one was."""
    found = [x if _fits(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]
    return found, any(a is not b for a, b in zip(tensors, found, strict=True))


def _fits(x: Tensor) -> bool:
    steps = [stride * x.element_size() for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1]
    # The copy engine takes addresses and strides that are multiples of 16 bytes, too.
    return (
        x.data_ptr() % ALIGNMENT == 0 and all(step > 0 and step % ALIGNMENT == 0 for step in steps) and x.stride(3) == 1
    )


def _kind(q: Tensor, k: Tensor, *others: Tensor) -> tuple:
    """All of a call's tensors that launches depend on beside addresses; others: with the shape of q or k."""
    return q.dtype, q.device, q.shape, k.shape, q.stride(), k.stride(), *[x.stride() for x in others]


def _tiled(place: int, piece: Tensor, tile: tuple[int, ...]) -> Operand:
    """An operand that the copy engine takes such tiles of."""
    return Operand(place, piece, _describer(piece.shape, piece.stride(), piece.dtype, tile))


@functools.lru_cache(maxsize=1024)
def _describer(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, tile: tuple[int, ...]):
    """What makes the copy engine's descriptor of a tensor that begins at an address; beyond the tensor it reads 0."""
    layout = gl.NVMMASharedLayout.get_default_for(list(tile), GLUON_DTYPES[dtype])
    # Nothing steps along a dimension of size 1, but the engine wants an aligned number.
    steps = [stride if size > 1 else shape[-1] for size, stride in zip(shape[:-1], strides, strict=False)]
    fields = vars(TensorDescriptor(torch.empty(0, dtype=dtype), list(shape), [*steps, 1], list(tile), layout))

    def describe(base: Tensor | Address) -> TensorDescriptor:
        # Its fields have been checked once already.
        found = object.__new__(TensorDescriptor)
        found.__dict__.update(fields, base=base)
        return found

    return describe
