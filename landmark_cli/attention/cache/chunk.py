"""A chunk: the next tokens of every row, and where they stand.

Positions of a chunk are counted from the start of the tail block it continues, the row's incomplete block (0 ..
block_size - 1 in front of the chunk, then on). A block standing d block slots before that start is reached by rotating
the query by +d * block_size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# What kernels make on the way of chunks that they read side by side: an output of every block that a query reads.
SIDE_BY_SIDE_BYTES = 1 << 28
# Programs along a grid's second axis, at most: one for each head of each row.
MOST_PROGRAMS = 65535
# Narrower chunks are steps to the kernels, which count themselves in memory for the cache's own rows.
NARROWEST = 16


class Chunk:
    """Lengths, positions and counts of the next tokens of every row. Rows of unequal length are padded on the left.

    Its B rows may be some of the cache's only: the others rest, and no work is done for them.

    width: tokens, padding included. host_lengths, host_blocks, host_tail, host_rows: on the host, tokens of each row in
    the chunk, and blocks, tail and rows as below. retrievable: the most complete blocks that a row can choose from.
    counters: (4, B) int32, on the model's device: start, the padding in front of each row; blocks, its complete blocks
    before the chunk, evicted ones counted; tail, tokens of its tail block before the chunk; rows, which of the cache's
    rows it is.
    stream_rotation: with absolute positions, cos and sin, (B, rotary_dim / 2), of the rotation from chunk positions to
    positions in each row's stream.
    """

    # No dataclass, for it is an argument of layers (see dispatch.landmark_attention_forward).
    def __init__(
        self,
        width: int,
        host_lengths: list[int],
        host_blocks: list[int],
        host_tail: list[int],
        host_rows: list[int],
        retrievable: int,
        counters: Tensor,
        stream_rotation: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.width = width
        self.host_lengths = host_lengths
        self.host_blocks = host_blocks
        self.host_tail = host_tail
        self.host_rows = host_rows
        self.retrievable = retrievable
        self.counters = counters
        self.stream_rotation = stream_rotation
        self._moved: dict[torch.device, Chunk] = {}
        self._shared: dict[Hashable, Any] = {}

    @property
    def start(self) -> Tensor:
        return self.counters[0]

    @property
    def blocks(self) -> Tensor:
        return self.counters[1]

    @property
    def tail(self) -> Tensor:
        return self.counters[2]

    @property
    def rows(self) -> Tensor:
        return self.counters[3]

    def to(self, device: torch.device) -> Chunk:
        """The same chunk for a layer that lives on another device."""
        if device == self.counters.device:
            return self
        if device not in self._moved:
            rotation = self.stream_rotation and tuple(x.to(device) for x in self.stream_rotation)
            self._moved[device] = self._with(self.counters.to(device), rotation)
        return self._moved[device]

    def shared(self, key: Hashable, work_out: Callable[[], T]) -> T:
        """What the layers have in common, worked out for the first that asks. key: what it is and depends on."""
        if key not in self._shared:
            self._shared[key] = work_out()
        return self._shared[key]

    @cached_property
    def unrotated(self) -> Chunk:
        """The same chunk for a layer without positions."""
        # Another chunk in any case: what layers share of this one is rotated.
        rotation = self.stream_rotation and (
            torch.ones_like(self.stream_rotation[0]),
            torch.zeros_like(self.stream_rotation[1]),
        )
        return self._with(self.counters, rotation)

    def _with(self, counters: Tensor, stream_rotation: tuple[Tensor, Tensor] | None) -> Chunk:
        hosts = self.host_lengths, self.host_blocks, self.host_tail, self.host_rows
        return Chunk(self.width, *hosts, self.retrievable, counters, stream_rotation)

    @cached_property
    def position_ids(self) -> Tensor:
        """(B, T) int64, counted from the start of the tail block; on padding a number without meaning."""
        index = torch.arange(self.width, device=self.counters.device)
        return (index + (self.tail - self.start)[:, None]).clamp_(min=0)

    @cached_property
    def real(self) -> Tensor:
        """(B, T) bool: no padding."""
        return torch.arange(self.width, device=self.counters.device) >= self.start[:, None]

    @property
    def most_cached(self) -> int:
        """Complete blocks that can be retrieved in the row that has most."""
        return min(max(self.host_blocks), self.retrievable)

    @property
    def cached(self) -> Tensor:
        """(B,) complete blocks that can be retrieved."""
        return self.blocks.clamp(max=self.retrievable)


class Passage:
    """Chunks that follow one another and are read by one call of a model: a layer reads all of them, in order, before
    the next layer reads any. To layers it is what a chunk is.

    width: tokens of the widest chunk, padding included.
    """

    # No dataclass, for it is an argument of layers (see dispatch.landmark_attention_forward).
    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = list(chunks)
        self.width = max(chunk.width for chunk in self.chunks)
        self._runs: dict[int, list[tuple[Chunk, int]]] = {}

    @cached_property
    def position_ids(self) -> Tensor:
        """(B, T) int64, those of the chunks side by side."""
        return torch.cat([chunk.position_ids for chunk in self.chunks], dim=1)

    def read(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *, most: int = 0) -> Tensor:
        """What `attend(q, k, v, chunk)` gives for the chunks, each with its columns of q (B, H, T, D) and of k and v
        (B, G, T, D), side by side: (B, H, T, D). most: where attend stores a chunk before it reads, chunks come to it
        as rows of one, up to so many tokens at a time (see `side_by_side`)."""
        found, begin = [], 0
        for chunk, count in self.runs(most):
            columns = slice(begin, begin + chunk.width * count)
            given = (_as_rows(x[:, :, columns], count) for x in (q, k, v))
            out = attend(*given, chunk).transpose(1, 2)  # (B * count, width, H, D)
            found.append(out.reshape(q.shape[0], -1, *out.shape[2:]))
            begin = columns.stop
        return torch.cat(found, dim=1).transpose(1, 2)

    def runs(self, most: int) -> list[tuple[Chunk, int]]:
        """The chunks, as many as may be as rows of one, of all of which together there are `most` tokens at most, and
        how many each of these is. The same ones for all layers that ask for as many."""
        if most in self._runs:
            return self._runs[most]
        runs: list[list[Chunk]] = []
        for chunk in self.chunks:
            last = runs[-1] if runs else []
            tokens = (len(last) + 1) * chunk.width * len(chunk.host_rows)
            if last and chunk.width == last[0].width >= NARROWEST and tokens <= most:
                last.append(chunk)
            else:
                runs.append([chunk])
        return self._runs.setdefault(most, [(side_by_side(run), len(run)) for run in runs])


def most_side_by_side(q: Tensor, top_k: int) -> int:
    """How many tokens, of all rows together, may be read side by side; q: (B, H, T, D), each reading top_k blocks."""
    _, heads, _, dim = q.shape
    by_memory = SIDE_BY_SIDE_BYTES // (heads * dim * q.element_size() * max(1, top_k))
    return min(by_memory, MOST_PROGRAMS // heads * NARROWEST)


def side_by_side(chunks: Sequence[Chunk]) -> Chunk:
    """Chunks of one width that follow one another, as rows of one chunk: all of the first row, then all of the next.

    Blocks are numbered, so each finds what stands before it where all have been stored before any is read, in a cache
    with room for all of them. Their keys and values are rotated as those of the chunks are.
    """
    first = chunks[0]
    if len(chunks) == 1:
        return first

    def in_order(of_chunks: Sequence[list[int]]) -> list[int]:
        return [number for of_row in zip(*of_chunks, strict=True) for number in of_row]

    hosts = (
        in_order([getattr(chunk, name) for chunk in chunks])
        for name in ("host_lengths", "host_blocks", "host_tail", "host_rows")
    )
    counters = torch.stack([chunk.counters for chunk in chunks], dim=2).flatten(1)
    rotation = None
    if first.stream_rotation is not None:
        of_chunks = zip(*(chunk.stream_rotation or () for chunk in chunks), strict=True)
        cos, sin = (torch.stack(parts, dim=1).flatten(0, 1) for parts in of_chunks)
        rotation = cos, sin
    return Chunk(first.width, *hosts, first.retrievable, counters, rotation)


def _as_rows(x: Tensor, count: int) -> Tensor:
    """Chunks side by side, (B, H, count * T, D), as rows, (B * count, H, T, D), of one that lies in memory as they do,
    if they can be viewed so."""
    if count == 1:
        return x
    return x.transpose(1, 2).unflatten(1, (count, -1)).flatten(0, 1).transpose(1, 2)
