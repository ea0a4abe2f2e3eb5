"""The block cache: every layer's keys and values, block by block, and the place of a chunk in the stream.

A block of a row's stream is stored as it is read; once its landmark has been read it can be retrieved. Keys are kept
rotated by their offset in their block only, so they never have to be rotated again (arXiv 2305.16300, section 3.2).

Positions of a chunk are counted from the start of the incomplete block it continues (0 .. block_size - 1 in front of
it, then on). A block standing d block slots before that start is reached by turning the query by +d * block_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from .rotary import rotate, rotation_table

Selection = Literal["per_token_and_head", "max_over_heads", "max_over_tokens"]
Positions = Literal["bounded", "absolute"]
SMALLEST_CAPACITY = 16


@dataclass(frozen=True)
class RetrievalSettings:
    """How blocks are retrieved.

    block_size: tokens a block, landmark included.
    top_k: blocks retrieved per query; 0 retrieves nothing, more than are cached retrieves all.
    selection: who shares a selection: nobody, all heads of a token, or all tokens of a chunk (paper, section 4.1).
    cache_blocks: newest complete blocks kept; None keeps all.
    context_miss_cutoff: share of a context-miss token under which a query retrieves nothing (models that have one).
    positions: "bounded" places retrieved blocks in the window in front of the chunk, so no distance exceeds the trained
    length; "absolute" leaves every block at its true distance.
    """

    block_size: int
    top_k: int
    selection: Selection = "per_token_and_head"
    cache_blocks: int | None = None
    positions: Positions = "bounded"
    context_miss_cutoff: float = 0.0

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size}; a text token and a landmark make it at least 2")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 or more")
        if self.selection not in get_args(Selection):
            raise ValueError(f"selection is {self.selection!r}; choose one of {', '.join(get_args(Selection))}")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions is {self.positions!r}; choose one of {', '.join(get_args(Positions))}")
        if not 0.0 <= self.context_miss_cutoff <= 1.0:
            raise ValueError(f"context_miss_cutoff is {self.context_miss_cutoff}; a share is between 0 and 1")
        if self.cache_blocks is not None and self.cache_blocks < 0:
            raise ValueError(f"cache_blocks is {self.cache_blocks}; it must be 0 or more, or None to keep all")


class LayerBlocks:
    """One layer's blocks: a ring in which block number b stands at slot b % capacity.

    keys, values: (B, G, capacity, block_size, D), keys rotated by their offset in the block.
    landmark_keys: (B, G, capacity, D), the last key of each block once more, side by side for scoring.
    """

    def __init__(self, settings: RetrievalSettings, batch: int, heads: int, head_dim: int, like: Tensor):
        self.settings = settings
        size = settings.block_size
        self.keys = like.new_empty(batch, heads, 0, size, head_dim)
        self.values = like.new_empty(batch, heads, 0, size, head_dim)
        self.landmark_keys = like.new_empty(batch, heads, 0, head_dim)

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def reserve(self, blocks: int) -> None:
        """Make room for `blocks` blocks, the incomplete one too, by doubling; a bounded cache stops at its bound."""
        bound = self.settings.cache_blocks
        wanted = blocks if bound is None else min(blocks, bound + 1)
        if wanted <= self.capacity:
            return
        capacity = max(wanted, 2 * self.capacity, SMALLEST_CAPACITY)
        if bound is not None:
            capacity = min(capacity, bound + 1)
        # The ring has not wrapped yet: it wraps only once its capacity is final.
        for name in ("keys", "values", "landmark_keys"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def window(self, k: Tensor, v: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """The incomplete block in front of the chunk, then the chunk: what a query attends to without retrieval.

        k, v: (B, G, T, D) of the chunk. Returns keys and values (B, G, P + T, D), P the longest incomplete block, and
        the first real key of each row, (B,), from which the row's blocks count.
        """
        longest = max(chunk.host_partial)
        first = chunk.start + longest - chunk.partial
        if longest == 0:
            return k, v, first
        index = torch.arange(longest + k.shape[2], device=k.device)
        in_chunk = (index >= longest + chunk.start[:, None])[:, None, :, None]
        offset = (index - first[:, None]).clamp(0, self.settings.block_size - 1)
        rows = torch.arange(k.shape[0], device=k.device)
        slot = chunk.blocks % self.capacity

        def join(stored: Tensor, fresh: Tensor) -> Tensor:
            incomplete = stored[rows, :, slot].gather(
                2, offset[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[-1])
            )
            return torch.where(in_chunk, torch.nn.functional.pad(fresh, (0, 0, longest, 0)), incomplete)

        return join(self.keys, k), join(self.values, v), first

    def append(self, k: Tensor, v: Tensor, chunk: Chunk) -> None:
        """Store the chunk's keys (rotated at chunk.position_ids) and values, (B, G, T, D), in their blocks."""
        size = self.settings.block_size
        block = chunk.blocks[:, None] + chunk.position_ids // size
        # Of a chunk longer than the ring only the end is kept.
        keep = (chunk.real) & (block > chunk.last_block[:, None] - self.capacity)
        row, token = keep.nonzero(as_tuple=True)
        slot, offset = (block % self.capacity)[row, token], (chunk.position_ids % size)[row, token]

        turn = -(chunk.position_ids // size * size)
        cos, sin = rotation_table(turn, chunk.cache.inverse_frequencies)
        k = rotate(k, cos[:, None], sin[:, None])[row, :, token]
        self.keys[row, :, slot, offset] = k
        self.values[row, :, slot, offset] = v[row, :, token]
        landmark = offset == size - 1
        self.landmark_keys[row[landmark], :, slot[landmark]] = k[landmark]


@dataclass
class Chunk:
    """The next tokens of every row, and where they stand. Rows of unequal length are padded on the left.

    start: (B,) padding in front of each row. blocks: (B,) complete blocks before the chunk, evicted ones counted.
    partial: (B,) tokens of the incomplete block before the chunk. position_ids: (B, T), counted from the start of the
    incomplete block, 0 on padding. real: (B, T) bool. host_*: the same numbers on the host.
    """

    cache: BlockCache
    width: int
    host_lengths: list[int]
    host_blocks: list[int]
    host_partial: list[int]
    start: Tensor
    blocks: Tensor
    partial: Tensor
    position_ids: Tensor = field(init=False)
    real: Tensor = field(init=False)
    last_block: Tensor = field(init=False)

    def __post_init__(self) -> None:
        index = torch.arange(self.width, device=self.start.device)
        self.real = index >= self.start[:, None]
        self.position_ids = (index - self.start[:, None] + self.partial[:, None]).clamp(min=0) * self.real
        last = self.partial + self.width - self.start - 1
        self.last_block = self.blocks + last.clamp(min=0) // self.cache.settings.block_size

    @property
    def most_cached(self) -> int:
        """Complete blocks that can be retrieved in the row that has most."""
        bound = self.cache.settings.cache_blocks
        most = max(self.host_blocks)
        return most if bound is None else min(most, bound)

    @property
    def cached(self) -> Tensor:
        """(B,) complete blocks that can be retrieved."""
        bound = self.cache.settings.cache_blocks
        return self.blocks if bound is None else self.blocks.clamp(max=bound)

    @property
    def window_start(self) -> Tensor:
        """(B,) where the window of retrieved blocks begins: one slot more than blocks are retrieved, before position 0.

        With absolute positions, where the row's stream begins.
        """
        settings = self.cache.settings
        slots = self.blocks if settings.positions == "absolute" else self.cached.clamp(max=settings.top_k) + 1
        return -slots * settings.block_size


class BlockCache:
    """The blocks of all layers of one model, and how far each row of the batch has been read.

    inverse_frequencies: (rotary_dim / 2,) angle per position of the model's rotary embedding.
    batch: rows. device: where the counters live (keys and values live where the model puts them).

    retrievals, dropped_retrievals: of models with a context-miss token, how many blocks queries chose, and how many of
    these a share under the cutoff dropped.

    Use: chunk = begin_chunk(lengths); model(ids, position_ids=chunk.position_ids, landmark_chunk=chunk);
    end_chunk(chunk).
    """

    def __init__(
        self,
        settings: RetrievalSettings,
        inverse_frequencies: Tensor,
        *,
        batch: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.settings = settings
        self.device = torch.device(device)
        self.inverse_frequencies = inverse_frequencies.to(self.device)
        self.batch = batch
        self.reset()

    def reset(self) -> None:
        """Forget everything read."""
        self.layers: dict[int, LayerBlocks] = {}
        self.host_blocks = [0] * self.batch
        self.host_partial = [0] * self.batch
        self.retrievals = self.dropped_retrievals = 0

    def begin_chunk(self, lengths: Sequence[int], width: int | None = None) -> Chunk:
        """Place the next chunk: `lengths` stream tokens (landmarks too) of each row, padded on the left to `width`."""
        lengths = list(lengths)
        width = max(lengths) if width is None else width
        if len(lengths) != self.batch or min(lengths) < 0 or max(lengths) > width or width == 0:
            raise ValueError(f"lengths {lengths} do not fit a chunk of {self.batch} rows of {width} tokens")

        def tensor(x: list[int]) -> Tensor:
            return torch.tensor(x, dtype=torch.long, device=self.device)

        return Chunk(
            cache=self,
            width=width,
            host_lengths=lengths,
            host_blocks=list(self.host_blocks),
            host_partial=list(self.host_partial),
            start=tensor([width - n for n in lengths]),
            blocks=tensor(self.host_blocks),
            partial=tensor(self.host_partial),
        )

    def layer(self, index: int, k: Tensor, chunk: Chunk) -> LayerBlocks:
        """Layer `index`'s blocks with room for the chunk; made on first use, shaped after its keys k (B, G, T, D)."""
        if index not in self.layers:
            self.layers[index] = LayerBlocks(self.settings, k.shape[0], k.shape[1], k.shape[3], k)
        blocks = self.layers[index]
        size = self.settings.block_size
        blocks.reserve(
            max(
                n + (r + new) // size + 1
                for n, r, new in zip(chunk.host_blocks, chunk.host_partial, chunk.host_lengths, strict=True)
            )
        )
        return blocks

    def end_chunk(self, chunk: Chunk) -> None:
        """Count the chunk as read, after every layer has seen it."""
        size = self.settings.block_size
        for row, new in enumerate(chunk.host_lengths):
            total = self.host_partial[row] + new
            self.host_blocks[row] += total // size
            self.host_partial[row] = total % size
