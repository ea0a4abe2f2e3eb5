"""Launching the Hopper kernels: descriptors for the copy engine, schedules, a workspace that stays below a bound."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..common.configuration import padded
from ..common.repeat import Kept, addresses, on_device
from ..common.tensors import empty_heads_last
from ..training.launch import LOG2E, BackwardCall, backward_parts
from .forward import forward_kernel
from .key_gradient import CONSUMERS, key_gradient_kernel
from .query_gradient import query_gradient_kernel
from .schedule import key_schedule, query_schedule

GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}

KEY_CONSUMERS = CONSUMERS.value

# The copy engine takes addresses and strides that are multiples of this many bytes.
ALIGNMENT = 16


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


def registers(consumers: int) -> int:
    """Registers a thread at the start, all there are: warpgroups then trade them."""
    return 65536 // (128 * (consumers + 1)) // 8 * 8


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


class Operand(NamedTuple):
    """What a kernel works on: a piece of one of a call's tensors, given by its place.

    piece: None where the call has no such tensor; tile: what the copy engine takes at a time, where it is the engine's.
    """

    place: int
    piece: Tensor | None
    tile: tuple[int, ...] | None = None


class Address(NamedTuple):
    """The beginning of a tensor, for who asks a tensor for no more than that."""

    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class Launch:
    """A launch that was made. operands: (place, bytes behind that tensor's beginning, fields of the descriptor).

    given: what it was launched on, by the addresses of calls' tensors; training comes back to the same ones.
    """

    run: Callable
    operands: list[tuple[int, int, dict | None]]
    table: Tensor
    arguments: tuple
    given: Kept = field(default_factory=Kept)

    def again(self, at: tuple[int | None, ...]) -> None:
        """Launch it on the tensors of another call, given by their addresses."""
        self.run(*(self.given.get(at) or self.given.keep(at, self.arguments_at(at))))

    def arguments_at(self, at: tuple[int | None, ...]) -> tuple:
        """All arguments for tensors at these addresses."""
        operands = []
        for place, start, fields in self.operands:
            address = None if at[place] is None else at[place] + start
            operands.append(address if fields is None else described(fields, Address(address)))
        return *operands, self.table.data_ptr(), *self.arguments


def launch(
    kernel, tensors: tuple, operands: list[Operand], table: Tensor, arguments: tuple, constants: dict, registers: int
) -> Launch | None:
    """Launch a kernel, whose parameters are operands, the schedule, arguments and, in any order, constants.

    None where nothing was compiled that could be launched again.
    """
    given, kept = [], []
    for place, piece, tile in operands:
        fields = None if tile is None else _description(piece.shape, piece.stride(), piece.dtype, tile)
        given.append(piece if fields is None else described(fields, piece))
        kept.append((place, 0 if piece is None else piece.data_ptr() - tensors[place].data_ptr(), fields))
    grid = table.shape[1], 1, 1
    compiled = kernel[grid](*given, table, *arguments, **constants, num_warps=4, maxnreg=registers)
    if compiled is None:
        return None
    rest = [constants[name] for name in kernel.arg_names if name in constants]
    return Launch(compiled[grid], kept, table, (*arguments, *rest))


_forward_calls: Kept = Kept()
_backward_calls: Kept = Kept()


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, *, choice: ForwardConfiguration | None = None
) -> tuple[Tensor, Tensor]:
    """(out (B, H, Tq, D), lse (B, H, Tq) float32), as the portable kernel's."""
    key = *kind(q, k, v), block_size, scale, choice
    earlier = _forward_calls.get(key)
    # Strides are fit in calls of a known kind.
    if earlier is None or addresses(q, k, v) is None:
        inputs, copied = aligned(q, k, v)
        if copied:
            return forward(*inputs, block_size, scale, choice=choice)
    out = empty_heads_last(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors = q, k, v, out, lse
    at = addresses(*tensors)
    with on_device(q):
        if earlier is not None and at is not None:
            earlier.again(at)
        else:
            choice = choice or forward_configuration(q.shape[2], q.shape[3], block_size)
            done = launch_forward(tensors, block_size, scale, choice)
            if done is not None and at is not None:
                _forward_calls.keep(key, done)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_size: int,
    scale: float, *, choice: BackwardConfiguration | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) for the gradients of out and, where there is one, of lse: in parts, as the portable kernels."""
    key = *kind(q, k, v, out, dout), dlse is None, block_size, scale, choice
    call = _backward_calls.get(key)
    if call is None or addresses(q, k, v, out, dout) is None:
        (q, k, v, out, dout), copied = aligned(q, k, v, out, dout)
        if copied:
            return backward(dout, dlse, q, k, v, out, lse, block_size, scale, choice=choice)
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)
    call = call or _backward_calls.keep(key, BackwardCall(*backward_parts(q, k, block_size)))
    statistics = q.new_empty(call.workspace, dtype=torch.float32)
    tensors = q, k, v, out, dout, lse, dlse, dq, dk, dv, statistics
    at = addresses(*tensors)
    with on_device(q):
        if call.launches and at is not None:
            for done in call.launches:
                done.again(at)
        else:
            choice = choice or backward_configuration(q.shape[2], q.shape[3])
            launches = [
                done for part in call.parts for done in launch_backward(tensors, part, block_size, scale, choice)
            ]
            if None not in launches and at is not None:
                call.launches = launches
    return dq, dk, dv


def launch_forward(tensors: tuple, block_size: int, scale: float, choice: ForwardConfiguration) -> Launch | None:
    """Launch the forward kernel in a configuration."""
    q, k, v, out, lse = tensors
    batch, heads, queries, dim = q.shape
    offset, group = k.shape[2] - queries, heads // k.shape[1]
    rows, cols = (1, 1, 64, dim), (1, 1, padded(block_size), dim)
    operands = [
        Operand(0, q, rows),
        Operand(1, k, cols),
        Operand(2, v, cols),
        Operand(1, k[:, :, block_size - 1 :: block_size], cols),
        Operand(3, out, rows),
        Operand(4, lse),
    ]
    table = query_schedule(queries, offset, 64 * choice.consumers, block_size, batch * heads, group, dim, q.device)
    arguments = table.shape[0], scale * LOG2E, queries, offset, heads
    constants = {**row_constants(choice, group, block_size), "STAGES": choice.row_stages, "STEP": choice.step}
    return launch(forward_kernel, tensors, operands, table, arguments, constants, registers(choice.consumers))


def launch_backward(
    tensors: tuple, part: tuple[int, int, int, int, int], block_size: int, scale: float, choice: BackwardConfiguration
) -> tuple[Launch | None, Launch | None]:
    """Launch both backward kernels on a part of `backward_parts`. They add to dk and dv unless it has the last row."""
    q, k, v, out, dout, lse, dlse, dq, dk, dv, workspace = tensors
    first_row, last_row, first_head, key_heads, plane = part
    total, dim = q.shape[2:]
    group = q.shape[1] // k.shape[1]
    queries, offset = last_row - first_row, k.shape[2] - total + first_row
    query_heads, plane = key_heads * group, 4 * plane
    statistics = workspace[: 3 * query_heads * plane].view(3 * query_heads, plane)
    rows, cols, pair = slice(first_row, last_row), slice(offset + queries), (1, 1, padded(block_size), dim)
    tile = 1, 1, 64, dim

    operands = [
        Operand(0, q[:, :, rows], tile),
        Operand(4, dout[:, :, rows], tile),
        Operand(1, k[:, :, cols], pair),
        Operand(2, v[:, :, cols], pair),
        Operand(7, dq[:, :, rows], tile),
        Operand(3, out[:, :, rows]),
        Operand(5, lse[:, :, rows]),
        Operand(6, None if dlse is None else dlse[:, :, rows]),
        Operand(10, statistics),
    ]
    table = query_schedule(queries, offset, 64 * choice.consumers, block_size, query_heads, group, dim, q.device)
    arguments = (
        out.stride()[:3], table.shape[0], scale * LOG2E, scale, queries, offset, first_head * group, q.shape[1], plane,
        total,
    )  # fmt: skip
    rest = arguments, row_constants(choice, group, block_size), registers(choice.consumers)
    first = launch(query_gradient_kernel, tensors, operands, table, *rest)

    operands = [
        Operand(0, q[:, :, rows], tile),
        Operand(4, dout[:, :, rows], tile),
        Operand(1, k[:, :, cols], tile),
        Operand(2, v[:, :, cols], tile),
        Operand(10, statistics, (4, 64)),
        Operand(8, dk),
        Operand(9, dv),
    ]
    table = key_schedule(queries, offset, KEY_CONSUMERS, block_size, key_heads, group, dim, q.device)
    arguments = (
        dk.stride()[:3], dv.stride()[:3], table.shape[0], scale * LOG2E, scale, queries, offset, first_head, k.shape[1]
    )  # fmt: skip
    constants = {
        "GROUP": group,
        "BLOCK": block_size,
        "SLOTS": choice.row_slots,
        "ACCUMULATE": last_row < total,
    }
    return first, launch(key_gradient_kernel, tensors, operands, table, arguments, constants, registers(KEY_CONSUMERS))


def row_constants(choice: ForwardConfiguration | BackwardConfiguration, group: int, block_size: int) -> dict[str, int]:
    """What both kernels that walk by query rows are compiled for."""
    return {
        "GROUP": group,
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
    return (
        x.data_ptr() % ALIGNMENT == 0 and all(step > 0 and step % ALIGNMENT == 0 for step in steps) and x.stride(3) == 1
    )


def kind(q: Tensor, k: Tensor, *others: Tensor) -> tuple:
    """All of a call's tensors that launches depend on beside addresses; others: with the shape of q or k."""
    return q.dtype, q.device, q.shape, k.shape, q.stride(), k.stride(), *[x.stride() for x in others]


def described(fields: dict, base: Tensor | Address) -> TensorDescriptor:
    """The descriptor with these fields of what begins at `base`."""
    found = object.__new__(TensorDescriptor)
    found.__dict__.update(fields, base=base)
    return found


@functools.lru_cache(maxsize=1024)
def _description(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, tile: tuple[int, ...]) -> dict:
    """A descriptor's fields, for the copy engine to copy such tiles; beyond the tensor they are 0."""
    layout = gl.NVMMASharedLayout.get_default_for(list(tile), GLUON_DTYPES[dtype])
    # Nothing steps along a dimension of size 1, but the engine wants an aligned number.
    steps = [stride if size > 1 else shape[-1] for size, stride in zip(shape[:-1], strides, strict=False)]
    return vars(TensorDescriptor(torch.empty(0, dtype=dtype), list(shape), [*steps, 1], list(tile), layout))
