"""Where a chunk's tokens and the text that a layer holds stand, worked out of the chunk's counters in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import on_device

T = TypeVar("T")


class Chunk(Protocol):
    """Where a chunk stands.

    width: tokens of each of its n rows. counters: (4, n) int32: padding in front of each row, its complete blocks
    before the chunk, tokens of its tail block, which of all rows it is. shared: what layers have in common, by a key.
    """

    width: int
    counters: Tensor

    def shared(self, key: Hashable, work_out: Callable[[], T]) -> T: ...


class Places(NamedTuple):
    """text: (n, T) bool, which of the chunk is text. first: (n, T) int32, of held text and chunk the first token that
    each of the chunk's may see. source: (n, held) int32, of these the ones to be held next. back, to_place, to_held:
    cos and sin, (n, T or held, rotary_dim / 2) float32, of the rotations of the chunk to its places, of held keys to
    theirs, and of the chunk's keys to what is held of them; None without positions."""

    text: Tensor
    first: Tensor
    source: Tensor
    back: tuple[Tensor | None, Tensor | None]
    to_place: tuple[Tensor | None, Tensor | None]
    to_held: tuple[Tensor | None, Tensor | None]


@triton.jit
def _turn(COS, SIN, FREQUENCIES, by, at, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Put cos and sin of `by` times the frequencies into row `at` of a table. Angles are formed in float64: see
    attention/rotary.py."""
    if COS is not None:
        dim = tl.arange(0, HALF_PAD)  # (HALF_PAD,), as angle
        angle = by.to(tl.float64) * tl.load(FREQUENCIES + dim, mask=dim < HALF, other=0.0).to(tl.float64)
        tl.store(COS + at * HALF + dim, tl.cos(angle).to(tl.float32), mask=dim < HALF)
        tl.store(SIN + at * HALF + dim, tl.sin(angle).to(tl.float32), mask=dim < HALF)


@triton.jit(do_not_specialize=["batch", "held", "tokens"])
def places_kernel(COUNTERS, FREQUENCIES, TEXT, FIRST, SOURCE, BACK_COS, BACK_SIN, PLACE_COS, PLACE_SIN, HOLD_COS,
                  HOLD_SIN, batch, held, tokens, BLOCK: tl.constexpr, HALF: tl.constexpr,
                  HALF_PAD: tl.constexpr):  # fmt: skip
    """The twin of local._ChunkPlaces: tensors as of Places. Program (number, row): the chunk's tokens, then what is
    held."""
    FREQ: tl.constexpr = BLOCK - 1
    number = tl.program_id(0)
    row = tl.program_id(1)
    start = tl.load(COUNTERS + row)
    tail = tl.load(COUNTERS + 2 * batch + row)
    if number < tokens:
        at = row.to(tl.int64) * tokens + number
        real = number >= start
        position = tl.maximum(number - start + tail, 0)
        block = position // BLOCK
        place = position - block
        tl.store(TEXT + at, (real & (position % BLOCK < FREQ)).to(tl.uint8))
        # The text `held` before a token is held where the chunk has no more than `count` before it.
        count = place - tail
        furthest = place - held
        first = tl.where(count < held, count, held + furthest + furthest // FREQ - tail + start)
        tl.store(FIRST + at, tl.where(real, first, held + number))
        _turn(BACK_COS, BACK_SIN, FREQUENCIES, -block, at, HALF, HALF_PAD)
        _turn(HOLD_COS, HOLD_SIN, FREQUENCIES, -block * BLOCK, at, HALF, HALF_PAD)
    else:
        slot = number - tokens
        at = row.to(tl.int64) * held + slot
        before = tail - held + slot
        # Of a number that may be below 0 the rest that is not.
        offset = (before + held * FREQ) % FREQ
        _turn(PLACE_COS, PLACE_SIN, FREQUENCIES, before - offset, at, HALF, HALF_PAD)
        end = tokens - start + tail
        source = slot + end - end // BLOCK - tail
        place = tail + source - held
        tl.store(SOURCE + at, tl.where(source < held, source, held + place + place // FREQ - tail + start))


def places_of(chunk: Chunk, held: int, block_size: int, frequencies: Tensor | None) -> Places:
    """Of a chunk in layers that hold so many tokens of text. frequencies: (rotary_dim / 2,) of the layers, None
    without positions."""
    batch, tokens, device = chunk.counters.shape[1], chunk.width, chunk.counters.device
    # A model's layers may be on several devices, with the angles on one.
    frequencies = None if frequencies is None else frequencies.to(device).contiguous()
    half = 0 if frequencies is None else len(frequencies)

    def table(length: int) -> tuple[Tensor | None, Tensor | None]:
        both = torch.empty(2, batch, length, half, device=device)
        return (both[0], both[1]) if half else (None, None)

    text = torch.empty(batch, tokens, dtype=torch.bool, device=device)
    first = torch.empty(batch, tokens, dtype=torch.int32, device=device)
    source = torch.empty(batch, held, dtype=torch.int32, device=device)
    back, to_place, to_held = table(tokens), table(held), table(tokens)
    with on_device(chunk.counters):
        places_kernel[(tokens + held, batch)](
            chunk.counters, frequencies, text.view(torch.uint8), first, source, *back, *to_place, *to_held, batch, held,
            tokens, BLOCK=block_size, HALF=half, HALF_PAD=triton.next_power_of_2(max(1, half)), num_warps=1,
        )  # fmt: skip
    return Places(text, first, source, back, to_place, to_held)
