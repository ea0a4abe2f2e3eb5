"""What the kernels of one layer's call have in common, and what they need of the block cache."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..common.configuration import padded, product_precision
from ..common.logits import scaling_of
from ..common.operands import operand
from ..common.tiles import LOG2E

# Landmarks a tile: all blocks that are scored at their true distance must lie in the first.
TILE = 64
MAX_TOP_K = TILE
# The running lists of a selection hold so many; more are found in several passes.
PASS = 16
# A step of at most so many tokens is worked off block by block and query by query.
STEP_TOKENS = 4


class Settings(Protocol):
    """How blocks are retrieved; attention/cache/settings.py says more."""

    block_size: int
    top_k: int
    selection: str
    positions: str
    joint: bool
    block_temperature: float
    proposed: int
    retrievable: int


class Rotations(Protocol):
    """Rotations by whole block slots."""

    def table(self, slots: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotations by 0, 1, .. block slots, (at least `slots`, rotary_dim / 2) each."""


class Pages(Protocol):
    """The pages of offloaded blocks that the GPU holds copies of.

    pool: (frames, 2, block_size, D). page_table: int32, which frame holds a page, -1 where none does.
    """

    frames: int
    pool: Tensor
    page_table: Tensor

    def admit(self, needed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of needed pages, (pages,) bool, those to be copied and the frames to copy them to, so many of both."""


class Blocks(Protocol):
    """One layer's blocks: a ring in which block number b stands at slot b % capacity.

    blocks: (B, G, capacity, 2, block_size, D), keys and values. landmark_keys: (B, G, capacity, D). pages: None where
    blocks are not offloaded. one_landmark_key: whether all landmarks have one key before rotation. fetching: whether
    some blocks have still to be fetched.
    """

    settings: Settings
    rotations: Rotations
    blocks: Tensor
    landmark_keys: Tensor
    capacity: int
    pages: Pages | None
    one_landmark_key: bool
    fetching: bool

    def require(self, needed: Tensor) -> None:
        """Have blocks stand in their slots that are about to be read, (B * G, capacity) bool; waits for the device."""

    def arrivals(self, rows: int) -> Tensor:
        """(rows,) int32 zeros in which programs count themselves."""


class Chunk(Protocol):
    """Where a chunk stands.

    width: tokens. counters: (4, B) int32: padding in front of each row, its complete blocks before the chunk, tokens of
    its tail block, the cache's row that it is (rows). most_cached: blocks that can be retrieved in the row that has
    most. stream_rotation: with absolute positions, cos and sin, (B, rotary_dim / 2), of the rotation to positions in
    each row's stream.
    """

    width: int
    counters: Tensor
    rows: Tensor
    most_cached: int
    stream_rotation: tuple[Tensor, Tensor] | None


class Call:
    """One layer's chunk on its way through the kernels.

    q: (B, H, T, D); k, v: (B, G, T, D). rotations: cos and sin of whole block slots. stream_rotation: as a chunk's.
    page_table, pool: where copies of offloaded blocks are. parts: how the kernels see a head's dimensions, see
    parts.py. precision: of products. softcap: bound of the logits. sinks: (H,) logits of attention sinks.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Blocks,
        chunk: Chunk,
        scale: float | None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ):
        self.q, self.k, self.v, self.blocks, self.chunk = q, k, v, blocks, chunk
        self.settings = blocks.settings
        self.batch, self.heads, self.tokens, self.dim = q.shape
        self.key_heads = k.shape[1]
        self.heads_per_key = self.heads // self.key_heads
        self.key_rows, self.query_rows = self.batch * self.key_heads, self.heads_per_key * self.tokens
        self.scale, self.softcap = self.dim**-0.5 if scale is None else scale, softcap
        self.sinks = None if sinks is None else operand(sinks)
        self.top_k, self.proposed, self.capacity = self.settings.top_k, self.settings.proposed, blocks.capacity
        self.absolute = self.settings.positions == "absolute"
        slots = max(self.top_k, self.capacity if self.absolute else 0, chunk.width // self.settings.block_size) + 2
        self.rotations = blocks.rotations.table(slots, q.device, torch.float32)
        self.stream_rotation = chunk.stream_rotation if self.absolute else (None, None)
        pages = blocks.pages
        self.page_table, self.pool = (None, blocks.blocks) if pages is None else (pages.page_table, pages.pool)

        half = self.rotations[0].shape[1]
        rest = self.dim - 2 * half
        self.parts = half, rest, padded(half), padded(rest)
        self.dim_pad = padded(self.dim)
        self.exact = q.dtype == torch.float32
        self.precision = product_precision(q.dtype)

    @property
    def temperature(self) -> float | None:
        """Of the softmax among retrieved blocks, where it changes anything."""
        return None if self.settings.block_temperature == 1.0 else self.settings.block_temperature

    @property
    def is_step(self) -> bool:
        """Whether this is a decoding step, for which the step's kernels are made."""
        few = self.tokens <= min(STEP_TOKENS, self.settings.block_size) and self.top_k <= PASS
        return few and self.settings.selection == "per_token_and_head" and self.proposed == self.top_k

    @property
    def ring(self) -> tuple[int, int, int]:
        return self.batch, self.key_heads, self.capacity

    @property
    def reach(self) -> tuple[int, int]:
        return self.settings.retrievable, self.top_k

    @property
    def scoring(self) -> tuple[int, int, int]:
        """What kernels that score landmarks have to know: reach, and whether far blocks share a landmark key."""
        return *self.reach, int(self.blocks.one_landmark_key and not self.absolute)

    @property
    def score_scaling(self) -> tuple[float, float | None]:
        """What makes scores of products of queries and landmark keys: natural logits, see common/logits.py."""
        return scaling_of(self.scale, self.softcap)

    @property
    def scaling(self) -> tuple[float, float | None]:
        """What makes base-2 logits of products."""
        return scaling_of(self.scale, self.softcap, LOG2E.value)

    @property
    def heads_and_parts(self) -> dict[str, int | tuple[int, ...]]:
        """Constants of the kernels that take queries."""
        return {"HEADS_PER_KEY": self.heads_per_key, "PARTS": self.parts}

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one head, which decide how large tiles can be."""
        return self.dim_pad * self.q.element_size()

    def empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)


def strides(x: Tensor) -> tuple[int, int, int]:
    """In elements, of all dimensions but the last, which is dense."""
    return x.stride()[:3]
