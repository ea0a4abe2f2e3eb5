"""Reading a chunk in a layer with a sliding window: one kernel puts together what it sees, one attends, one keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import triton
from torch import Tensor

from ..common.launch import Launch, LaunchCache, Operand, launch
from ..common.tensors import empty_heads_last
from . import launch as attention
from .hold import join_kernel, keep_kernel
from .places import Chunk, places_of

CALLS = LaunchCache()


class Held(Protocol):
    """What a layer holds: keys and values, (B, G, held, D) dense, and which of it there is, (B, held) bool."""

    block_size: int
    keys: Tensor
    values: Tensor
    real: Tensor


def attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Held,
    chunk: Chunk,
    frequencies: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The kernels' twin of what `landmark_cli.attention.local.attend_chunk` does: (n, H, T, D), which lies in memory as
    (n, T, H, D); held goes on. q: (n, H, T, D) and k, v: (n, G, T, D), rotated at the chunk's positions."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (batch, _, tokens, dim), key_heads, length = q.shape, k.shape[1], held.keys.shape[2]
    key = "places", length, held.block_size, id(frequencies)
    places = chunk.shared(key, lambda: places_of(chunk, length, held.block_size, frequencies))
    turned = empty_heads_last(q)
    keys, values = (x.new_empty(batch, key_heads, length + tokens, dim) for x in (k, v))
    seen = places.text.new_empty(batch, length + tokens)
    kept = [x.new_empty(batch, *x.shape[1:]) for x in (held.keys, held.values, held.real)]
    here = held.keys, held.values, held.real
    tables = *places.back, *places.to_place, *places.to_held
    joined = turned, keys, values, seen, *kept
    _call(_launch_join, (q, k, v, *here, chunk.counters, places.text, places.source, *tables, *joined))
    out, _ = attention.forward(turned, keys, values, attention.Seen(places.first, seen, scale, softcap), sinks)
    if length:
        _call(_launch_keep, (*kept, chunk.counters, *here))
    return out


def _call(launch_anew: Callable[[Sequence[Tensor | None]], Launch | None], tensors: Sequence[Tensor | None]) -> None:
    """Launch a kernel on its operands, in order, or repeat it."""
    # What says yes or no is read and written in bytes.
    tensors = [x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x for x in tensors]
    kind = tensors[0].device, *[x if x is None else (x.dtype, x.shape, x.stride()) for x in tensors]
    if not CALLS.repeat(kind, tensors):
        CALLS.make(kind, tensors, lambda: [launch_anew(tensors)])


def _launch_join(tensors: Sequence[Tensor | None]) -> Launch | None:
    q, k, v, held_keys, *_ = tensors
    tables, (turned, keys, _, _, kept_keys, _, _) = tensors[9:15:2], tensors[15:]
    batch, heads, tokens, _ = q.shape
    length, key_heads = held_keys.shape[2], k.shape[1]
    strides = [_strides(x) for x in (q, k, v, held_keys, turned, keys, kept_keys)]
    # As of a table for a single head: from row to row, head to head, token to token.
    strides += [(0, 0, 0) if table is None else (table.stride(0), 0, table.stride(1)) for table in tables]
    constants = _constants(held_keys, tables[0]) | {"HEADS": _at_once(heads)}
    arguments, programs = (*strides, length, tokens, key_heads, heads), (2 * length + tokens, batch)
    return launch(join_kernel, programs, tensors, _operands(tensors, 6), arguments, constants, {"num_warps": 1})


def _launch_keep(tensors: Sequence[Tensor]) -> Launch | None:
    kept_keys, _, _, _, held_keys, _, _ = tensors
    batch, key_heads, length, _ = kept_keys.shape
    arguments, programs = (_strides(kept_keys), _strides(held_keys), length, key_heads), (length, batch)
    constants = _constants(held_keys, None)
    return launch(keep_kernel, programs, tensors, _operands(tensors, 3), arguments, constants, {"num_warps": 1})


def _operands(tensors: Sequence[Tensor | None], counters: int) -> list[Operand | int]:
    """All of them, but of the counters, at that place, what says which rows the chunk's are: a tensor of its own would
    begin where no launch can be repeated."""
    places: list[Operand | int] = list(range(len(tensors)))
    places[counters] = Operand(counters, tensors[counters][3])
    return places


def _constants(keys: Tensor, table: Tensor | None) -> dict[str, int | tuple[int, ...]]:
    """How the kernels see a head's dimensions, of which the table rotates some, and how many heads they move at a
    time."""
    half = keys.shape[3] // 2 if table is None else table.shape[-1]
    rest = keys.shape[3] - 2 * half
    dims = half, rest, triton.next_power_of_2(half), triton.next_power_of_2(max(1, rest))
    return {"DIMS": dims, "KEY_HEADS": _at_once(keys.shape[1])}


def _at_once(heads: int) -> int:
    return min(16, triton.next_power_of_2(heads))


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]
