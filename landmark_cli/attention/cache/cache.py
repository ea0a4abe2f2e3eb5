"""The block cache: every layer's keys and values, block by block, and the place of a chunk in the stream.

A block of a row's stream is stored as it is read; once its landmark has been read it can be retrieved. Keys are kept
rotated by their offset in their block only, so they never have to be rotated again (arXiv 2305.16300, section 3.2).

Positions of a chunk are counted from the start of the incomplete block it continues (0 .. block_size - 1 in front of
it, then on). A block standing d block slots before that start is reached by turning the query by +d * block_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ..rotary import rotate, rotation_table

if TYPE_CHECKING:
    from .pages import Offload, ResidentBlocks
    from .trace import Trace

Selection = Literal["per_token_and_head", "max_over_heads", "max_over_tokens"]
Positions = Literal["bounded", "absolute"]
SMALLEST_CAPACITY, LARGEST_STEP = 16, 4096


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

    @property
    def retrievable(self) -> int:
        """The most complete blocks a row can choose from."""
        return 2**31 - 1 if self.cache_blocks is None else self.cache_blocks


class LayerBlocks:
    """One layer's blocks: a ring in which block number b stands at slot b % capacity.

    blocks: (B, G, capacity, 2, block_size, D), the keys of a block, rotated by their offset in it, and its values.
    landmark_keys: (B, G, capacity, D), the last key of each block once more, side by side for scoring; with absolute
    positions it is rotated by its position in the row's stream instead.
    one_landmark_key: the landmarks of all blocks have one key before rotation; only rounding tells stored ones apart.

    With offloading, blocks lie in (pinned) host memory and `resident` holds copies of those used lately.
    """

    def __init__(
        self,
        settings: RetrievalSettings,
        index: int,
        like: Tensor,
        offload: Offload | None = None,
        one_landmark_key: bool = False,
    ):
        """index: of the layer. like: its keys, (B, G, T, D)."""
        batch, heads, _, head_dim = like.shape
        self.settings, self.index, self.one_landmark_key = settings, index, one_landmark_key
        self.offload = offload
        self.landmark_keys = like.new_zeros(batch, heads, 0, head_dim)
        self.resident: ResidentBlocks | None = None
        self._arrivals = like.new_zeros(0, dtype=torch.int32)
        self._allocate(0)

    @property
    def capacity(self) -> int:
        return self.landmark_keys.shape[2]

    @property
    def keys(self) -> Tensor:
        """(B, G, capacity, block_size, D), a view of blocks."""
        return self.blocks[:, :, :, 0]

    @property
    def values(self) -> Tensor:
        """(B, G, capacity, block_size, D), a view of blocks."""
        return self.blocks[:, :, :, 1]

    def reserve(self, complete: Sequence[int], added: Sequence[int], expected: int = 0) -> bool:
        """Make room, by doubling at first, for each row's `complete` blocks and `added` more (the incomplete one too).

        A bounded cache needs room for its bound and one chunk only. expected: blocks to make room for in one go.
        Returns whether the tensors are new ones.
        """
        bound = self.settings.retrievable
        wanted = max(min(n, bound) + more for n, more in zip(complete, added, strict=True))
        if wanted <= self.capacity:
            return False
        capacity = max(wanted, expected, self.capacity + min(self.capacity, LARGEST_STEP), SMALLEST_CAPACITY)
        capacity = min(capacity, bound + max(added))
        if self.blocks.is_pinned():
            # The GPU may still be writing what the host is about to copy.
            torch.cuda.synchronize(self.landmark_keys.device)
        old = self.landmark_keys, self.blocks
        self._allocate(capacity)
        for row, n in enumerate(complete):
            # What a row still holds: its newest blocks and the incomplete one, in runs that wrap in neither ring.
            at = max(0, n + 1 - old[0].shape[2])
            while at <= n:
                source, to = at % old[0].shape[2], at % capacity
                run = min(n + 1 - at, old[0].shape[2] - source, capacity - to)
                self.landmark_keys[row, :, to : to + run] = old[0][row, :, source : source + run]
                self.blocks[row, :, to : to + run] = old[1][row, :, source : source + run]
                at += run
        return True

    def _allocate(self, capacity: int) -> None:
        batch, heads, _, head_dim = self.landmark_keys.shape
        shape = batch, heads, capacity, 2, self.settings.block_size, head_dim
        self.landmark_keys = self.landmark_keys.new_zeros(batch, heads, capacity, head_dim)
        if self.offload is None:
            self.blocks = self.landmark_keys.new_zeros(shape)
        else:
            self.blocks = self.offload.empty(shape, self.landmark_keys)
            self.resident = None

    def arrivals(self, rows: int) -> Tensor:
        """(rows,) int32 zeros in which the programs of a decoding step count themselves; they leave zeros behind.

        rows: the same number every time, for the most tokens a step can have: recorded steps keep the tensor's address.
        """
        if len(self._arrivals) == 0:
            self._arrivals = self._arrivals.new_zeros(rows)
        if len(self._arrivals) != rows:
            raise ValueError(f"rows is {rows}, was {len(self._arrivals)}")
        return self._arrivals

    def gather(self, index: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Keys and values at (row, head, slot) or (row, head, slot, offset), broadcast, on the model's device."""
        device = self.landmark_keys.device
        index = tuple(x.to(self.blocks.device) for x in index)
        return self.keys[index].to(device), self.values[index].to(device)

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
        heads = torch.arange(k.shape[1], device=k.device)
        slot = chunk.blocks % self.capacity
        incomplete = self.gather((rows[:, None, None], heads[:, None], slot[:, None, None], offset[:, None]))

        def join(stored: Tensor, fresh: Tensor) -> Tensor:
            return torch.where(in_chunk, torch.nn.functional.pad(fresh, (0, 0, longest, 0)), stored)

        return join(incomplete[0], k), join(incomplete[1], v), first

    def append(self, k: Tensor, v: Tensor, chunk: Chunk) -> None:
        """Store the chunk's keys (rotated at chunk.position_ids) and values, (B, G, T, D), in their blocks."""
        size = self.settings.block_size
        block = chunk.blocks[:, None] + chunk.position_ids // size
        row, token = chunk.real.nonzero(as_tuple=True)
        slot, offset = (block % self.capacity)[row, token], (chunk.position_ids % size)[row, token]

        turn = -(chunk.position_ids // size * size)
        cos, sin = rotation_table(turn, chunk.inverse_frequencies)
        turned = rotate(k, cos[:, None], sin[:, None])[row, :, token]
        where = tuple(x.to(self.blocks.device) for x in (row, slot, offset))
        self.keys[where[0], :, where[1], where[2]] = turned.to(self.blocks.device)
        self.values[where[0], :, where[1], where[2]] = v[row, :, token].to(self.blocks.device)
        landmark = offset == size - 1
        if self.settings.positions == "absolute":
            cos, sin = chunk.stream_turn
            turned = rotate(k, cos[:, None, None], sin[:, None, None])[row, :, token]
        self.landmark_keys[row[landmark], :, slot[landmark]] = turned[landmark]


@dataclass
class Chunk:
    """The next tokens of every row, and where they stand. Rows of unequal length are padded on the left.

    counters: (3, B) int32, on the model's device: start, the padding in front of each row; blocks, its complete blocks
    before the chunk, evicted ones counted; partial, tokens of the incomplete block before the chunk.
    host_lengths, host_blocks, host_partial: tokens of each row in the chunk, and blocks and partial, on the host.
    """

    cache: BlockCache
    width: int
    host_lengths: list[int]
    host_blocks: list[int]
    host_partial: list[int]
    counters: Tensor
    _moved: dict[torch.device, Chunk] = field(default_factory=dict, init=False, repr=False)

    @property
    def start(self) -> Tensor:
        return self.counters[0]

    @property
    def blocks(self) -> Tensor:
        return self.counters[1]

    @property
    def partial(self) -> Tensor:
        return self.counters[2]

    def to(self, device: torch.device) -> Chunk:
        """The same chunk for a layer that lives on another device."""
        if device == self.counters.device:
            return self
        if device not in self._moved:
            self._moved[device] = replace(self, counters=self.counters.to(device))
        return self._moved[device]

    @cached_property
    def position_ids(self) -> Tensor:
        """(B, T) int64, counted from the start of the incomplete block; on padding a number without meaning."""
        index = torch.arange(self.width, device=self.counters.device)
        return (index + (self.partial - self.start)[:, None]).clamp_(min=0)

    @cached_property
    def real(self) -> Tensor:
        """(B, T) bool: no padding."""
        return torch.arange(self.width, device=self.counters.device) >= self.start[:, None]

    @cached_property
    def inverse_frequencies(self) -> Tensor:
        return self.cache.inverse_frequencies.to(self.counters.device)

    @cached_property
    def stream_turn(self) -> tuple[Tensor, Tensor]:
        """cos and sin, (B, rotary_dim / 2), of the turn from chunk positions to positions in each row's stream."""
        return rotation_table(self.blocks * self.cache.settings.block_size, self.inverse_frequencies)

    @property
    def most_cached(self) -> int:
        """Complete blocks that can be retrieved in the row that has most."""
        return min(max(self.host_blocks), self.cache.settings.retrievable)

    @property
    def cached(self) -> Tensor:
        """(B,) complete blocks that can be retrieved."""
        return self.blocks.clamp(max=self.cache.settings.retrievable)

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
    offload: keep blocks in host memory, see offload.Offload; landmark keys stay on the model's device.
    one_landmark: every landmark enters the model as the same vector, as a token id does. In the first layer, which has
    seen nothing else yet, all landmark keys are then one vector.

    trace: set to a trace.Trace to record which blocks queries read.
    generation: rises whenever tensors of the cache are replaced by larger ones.
    implementations: names of those that have read, "eager" or "fused".
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
        offload: Offload | None = None,
        one_landmark: bool = False,
    ):
        self.settings = settings
        self.one_landmark = one_landmark
        self.device = torch.device(device)
        self.inverse_frequencies = inverse_frequencies.to(self.device)
        self.batch = batch
        self.offload = offload
        self.trace: Trace | None = None
        self.generation = 0
        self.implementations: set[str] = set()
        self.expected_blocks = 0
        self._turns: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.layers: dict[int, LayerBlocks] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything read; the memory stays for the next text."""
        self.host_blocks = [0] * self.batch
        self.host_partial = [0] * self.batch
        self.retrievals = self.dropped_retrievals = 0

    def expect(self, tokens: int) -> None:
        """Say how many stream tokens (landmarks too) the longest row will have in the end: room for all of them is then
        made at once, where doubling would hold up to twice as much, and old and new room at the same time."""
        self.expected_blocks = tokens // self.settings.block_size + 1

    def begin_chunk(self, lengths: Sequence[int], width: int | None = None) -> Chunk:
        """Place the next chunk: `lengths` stream tokens (landmarks too) of each row, padded on the left to `width`."""
        lengths = list(lengths)
        width = max(lengths) if width is None else width
        if len(lengths) != self.batch or min(lengths) < 0 or max(lengths) > width or width == 0:
            raise ValueError(f"lengths {lengths} do not fit a chunk of {self.batch} rows of {width} tokens")
        if self.trace is not None:
            # A chunk that has no blocks to read leaves it empty.
            self.trace.layers = {}
        counters = self.counters(lengths, width)
        # Copied from pinned memory, so that the host need not wait for the device.
        counters = counters.pin_memory() if self.device.type == "cuda" else counters
        counters = counters.to(self.device, non_blocking=True)
        return Chunk(self, width, lengths, list(self.host_blocks), list(self.host_partial), counters)

    def counters(self, lengths: Sequence[int], width: int) -> Tensor:
        """The counters of the next chunk, on the host."""
        return torch.tensor([[width - n for n in lengths], self.host_blocks, self.host_partial], dtype=torch.int32)

    def layer(self, index: int, k: Tensor, chunk: Chunk) -> LayerBlocks:
        """Layer `index`'s blocks with room for the chunk; made on first use, shaped after its keys k (B, G, T, D)."""
        if index not in self.layers:
            one_key = self.one_landmark and index == 0
            self.layers[index] = LayerBlocks(self.settings, index, k, self.offload, one_key)
        blocks = self.layers[index]
        added = self._added_blocks(chunk.host_lengths, chunk.host_partial)
        self.generation += blocks.reserve(chunk.host_blocks, added, self.expected_blocks)
        return blocks

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make room for a chunk of `lengths` stream tokens in every layer that has been used."""
        added = self._added_blocks(lengths, self.host_partial)
        for blocks in self.layers.values():
            self.generation += blocks.reserve(self.host_blocks, added, self.expected_blocks)

    def turns(self, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of 0, 1, .. block slots' turn, (at least `rows`, rotary_dim / 2)."""
        if (device, dtype) not in self._turns or self._turns[device, dtype][0].shape[0] < rows:
            slots = torch.arange(1 << (rows - 1).bit_length(), device=device)
            frequencies = self.inverse_frequencies.to(device)
            cos, sin = rotation_table(slots * self.settings.block_size, frequencies)
            self._turns[device, dtype] = cos.to(dtype), sin.to(dtype)
            self.generation += 1
        return self._turns[device, dtype]

    def end_chunk(self, chunk: Chunk) -> None:
        """Count the chunk as read, after every layer has seen it."""
        size = self.settings.block_size
        for row, new in enumerate(chunk.host_lengths):
            total = self.host_partial[row] + new
            self.host_blocks[row] += total // size
            self.host_partial[row] = total % size

    def _added_blocks(self, lengths: Sequence[int], partial: Sequence[int]) -> list[int]:
        """Blocks each row touches in a chunk, plus one: the next incomplete one."""
        return [(r + new) // self.settings.block_size + 1 for r, new in zip(partial, lengths, strict=True)]
