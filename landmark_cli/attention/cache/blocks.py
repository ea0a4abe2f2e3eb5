"""The blocks of one layer. A block of a row's stream is stored as it is read, and retrieved once its landmark has been
read. Keys are kept rotated by their offset in their block only, so they never have to be rotated again (arXiv
2305.16300, section 3.2)."""

from __future__ import annotations

import copy
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rotary import rotate
from .absent import Absent, Source
from .chunk import Chunk
from .origin import Origin
from .pages import Pages, Resident
from .rotations import SlotRotations
from .settings import RetrievalSettings

SMALLEST_CAPACITY, LARGEST_STEP = 16, 4096


class HeldBlocks(NamedTuple):
    """Of one row of a layer: blocks in order, the incomplete one last, (G, n, 2, block_size, D), which may lie
    elsewhere still, and their landmarks' keys, (G, n, D)."""

    blocks: Tensor | Source
    landmark_keys: Tensor


class LayerBlocks:
    """One layer's blocks: a ring in which block number b stands at slot b % capacity.

    blocks: (B, G, capacity, 2, block_size, D), the keys of a block, rotated by their offset in it, and its values.
    landmark_keys: (B, G, capacity, D), the last key of each block once more, side by side for scoring; with absolute
    positions it is rotated by its position in the row's stream instead.
    one_landmark_key: the landmarks of all blocks have one key before rotation; only rounding tells stored ones apart.

    With offloading, blocks lie in (pinned) host memory and `pages` holds copies of those used lately, in the layer's
    share of `resident`.

    What a row goes on from may lie in a file still (`fetching`); `require` fetches blocks that are about to be read,
    and whoever reads `blocks` calls it before.
    """

    def __init__(
        self,
        settings: RetrievalSettings,
        like: Tensor,
        rotations: SlotRotations,
        resident: Resident | None = None,
        number: int = 0,
        one_landmark_key: bool = False,
    ):
        """like: the layer's keys, (B, G, T, D). rotations: what the layers of a cache share. resident: what they share
        of the GPU's memory where blocks are offloaded. number: layers of the cache that were made before."""
        batch, heads, _, head_dim = like.shape
        self.settings, self.rotations, self.resident, self.number = settings, rotations, resident, number
        self.one_landmark_key = one_landmark_key
        self.landmark_keys = like.new_zeros(batch, heads, 0, head_dim)
        self._arrivals = like.new_zeros(0, dtype=torch.int32)
        self._absent = Absent(batch, heads, 0)
        # By row, as long as its slots may hold some of it.
        self._origins: dict[int, Origin] = {}
        self._is_staged = False
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

    @property
    def fetching(self) -> bool:
        """Whether there are blocks that have not been fetched yet."""
        return bool(self._absent)

    @property
    def pages(self) -> Pages | None:
        """Of offloaded blocks those that the GPU holds copies of; None where blocks lie on the model's device."""
        if self._is_staged:
            return None
        if self._pages is None and self.resident is not None:
            memory = self.resident.share(self.number, self.blocks, self.landmark_keys)
            self._pages = Pages(self.blocks.shape, memory)
        return self._pages

    def reserve(self, complete: Sequence[int], added: Sequence[int], expected: int = 0) -> bool:
        """Make room, by doubling at first, for each row's `complete` blocks and `added` more (the tail block too).

        A bounded cache needs room for its bound and one chunk only. expected: blocks to make room for in one go.
        The blocks that are added are written to. Returns whether the tensors are new ones.
        """
        grown = self.make_room(complete, added, expected)
        self._absent.overwrite(complete, added)
        for row, origin in self._origins.items():
            origin.write(complete[row], complete[row] + added[row])
        return grown

    def make_room(self, complete: Sequence[int], added: Sequence[int], expected: int = 0) -> bool:
        """As `reserve`, for blocks that are not written to by a chunk."""
        bound = self.settings.retrievable
        wanted = max(min(n, bound) + more for n, more in zip(complete, added, strict=True))
        if wanted <= self.capacity:
            return False
        capacity = capacity_for(wanted, expected, self.capacity, bound, max(added))
        if self.blocks.is_pinned():
            # The GPU may still be writing what the host is about to copy.
            torch.cuda.synchronize(self.landmark_keys.device)
        old, absent = (self.landmark_keys, self.blocks), self._absent.mask
        self._allocate(capacity)
        for row, n in enumerate(complete):
            # What a row still holds: its newest blocks and the tail block, in runs that wrap in neither ring.
            at = max(0, n + 1 - old[0].shape[2])
            while at <= n:
                source, to = at % old[0].shape[2], at % capacity
                run = min(n + 1 - at, old[0].shape[2] - source, capacity - to)
                self.landmark_keys[row, :, to : to + run] = old[0][row, :, source : source + run]
                self._absent.mask[row, :, to : to + run] = absent[row, :, source : source + run]
                if row in self._absent.sources:
                    head, slot = (~absent[row, :, source : source + run]).nonzero(as_tuple=True)
                    self.blocks[row, head, slot + to] = old[1][row, head, slot + source]
                else:
                    self.blocks[row, :, to : to + run] = old[1][row, :, source : source + run]
                at += run
        # A ring that never wraps has kept what rows go on from, but for rows that have been forgotten meanwhile.
        whole = self.settings.cache_blocks is None
        self._origins = {row: origin for row, origin in self._origins.items() if whole and complete[row] >= origin.last}
        return True

    def _allocate(self, capacity: int) -> None:
        batch, heads, _, head_dim = self.landmark_keys.shape
        shape = batch, heads, capacity, 2, self.settings.block_size, head_dim
        self.landmark_keys = self.landmark_keys.new_zeros(batch, heads, capacity, head_dim)
        self._pages: Pages | None = None
        self._absent.mask = torch.zeros(batch, heads, capacity, dtype=torch.bool)
        if self.resident is not None:
            self.blocks = self.resident.offload.empty(shape, self.landmark_keys)
        elif self.landmark_keys.device.type == "cpu":
            self.blocks = _untouched_zeros(shape, self.landmark_keys.dtype)
        else:
            self.blocks = self.landmark_keys.new_zeros(shape)

    def take(self, rows: Sequence[int], used: int) -> None:
        """Row r becomes what row rows[r] is; there may be more or fewer rows than before. used: slots that hold a block
        in any row. With as many rows as before the tensors stay where they are, so that recorded steps go on."""
        if self.resident is not None and self.landmark_keys.is_cuda:
            torch.cuda.synchronize(self.landmark_keys.device)
        old, used = (self.landmark_keys, self.blocks, self._absent.mask), min(used, self.capacity)
        target = list(range(len(rows)))
        if len(rows) == old[0].shape[0]:
            target = [row for row, source in enumerate(rows) if row != source]
        else:
            self.landmark_keys = old[0].new_zeros(len(rows), *old[0].shape[1:])
            self._arrivals = self._arrivals.new_zeros(0)
            self._allocate(old[0].shape[2])
        self._absent.take(rows)
        self._origins = {}
        for to, source in zip((self.landmark_keys, self.blocks, self._absent.mask), old, strict=True):
            # The right side is a copy, made before anything is overwritten.
            to[target, :, :used] = source[[rows[row] for row in target], :, :used]
        self.forget_pages()

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerBlocks:
        """A copy of what is stored, where it is stored; settings and rotations are shared."""
        other = copy.copy(self)
        other.resident = copy.deepcopy(self.resident, memo)
        other._arrivals = torch.zeros_like(self._arrivals)
        other._absent, other._origins = Absent(0, 0, 0), {}
        other._allocate(self.capacity)
        other._absent = self._absent.copy()
        other.landmark_keys.copy_(self.landmark_keys)
        if self.blocks.is_pinned():
            torch.cuda.synchronize(self.landmark_keys.device)
        if self.fetching:
            here = (~self._absent.mask).nonzero(as_tuple=True)
            other.blocks[here] = self.blocks[here]
        else:
            other.blocks.copy_(self.blocks)
        return other

    def arrivals(self, rows: int) -> Tensor:
        """(rows,) int32 zeros in which the programs of a decoding step count themselves; they leave zeros behind.

        rows: the same number every time, for the most tokens a step can have: recorded steps keep the tensor's address.
        """
        if len(self._arrivals) == 0:
            self._arrivals = self._arrivals.new_zeros(rows)
        if len(self._arrivals) != rows:
            raise ValueError(f"rows is {rows}, was {len(self._arrivals)}")
        return self._arrivals

    def copy_of(self, row: int, first: int, last: int) -> HeldBlocks:
        """Copies of the blocks numbered first .. last of a row, each where it lies."""
        if self.blocks.is_pinned():
            # The GPU may still be writing what the host is about to copy.
            torch.cuda.synchronize(self.landmark_keys.device)
        begin, count = first % self.capacity, last + 1 - first
        if begin + count <= self.capacity and not self.fetching:
            # Without an index, which the device would have to be waited for to get.
            here = slice(begin, begin + count)
            return HeldBlocks(self.blocks[row, :, here].clone(), self.landmark_keys[row, :, here].clone())
        slots = torch.arange(first, last + 1) % self.capacity
        if self.fetching:
            needed = torch.zeros_like(self._absent.mask)
            needed[row, :, slots] = True
            self.require(needed)
        return HeldBlocks(
            self.blocks[row][:, slots.to(self.blocks.device)],
            self.landmark_keys[row][:, slots.to(self.landmark_keys.device)],
        )

    def put(self, row: int, first: int, held: HeldBlocks) -> bool:
        """Store what `copy_of` gave, from anywhere, as blocks first, first + 1, .. of a row that has room for them. Of
        a source the incomplete block is fetched now, the others when they are first read.

        Returns whether the row went on from the same source last: then only what has been written over since is stored
        again, and what has been fetched stays.
        """
        blocks, landmark_keys = held
        if self.blocks.is_pinned():
            # The GPU may still be reading what the host is about to write.
            torch.cuda.synchronize(self.landmark_keys.device)
        self.forget(row)
        origin = self._origins.pop(row, None)
        again = origin is not None and origin.source is blocks and origin.first == first
        last = first + blocks.shape[1] - 1
        numbers = origin.lost(self.capacity) if again else torch.arange(first, last + 1)
        slots = numbers % self.capacity
        if len(slots):
            keys = landmark_keys[:, (numbers - first).to(landmark_keys.device)].to(self.landmark_keys.device)
            self.landmark_keys[row][:, slots.to(keys.device)] = keys
            self._leave_pages(row, slots)
        if isinstance(blocks, Tensor):
            self.blocks[row][:, slots.to(self.blocks.device)] = blocks.to(self.blocks.device)
            return False
        absent = origin.absent if again else None
        if len(slots) or absent is not None:
            absent = torch.zeros_like(self._absent.mask[row]) if absent is None else absent
            absent[:, slots] = True
            self._absent.add(row, first, blocks, absent)
        tail = last % self.capacity
        if again:
            self.blocks[row, :, tail], self.landmark_keys[row, :, tail] = origin.tail, origin.tail_key
            self._leave_pages(row, tail)
        else:
            needed = torch.zeros_like(self._absent.mask)
            needed[row, :, tail] = True
            self.require(needed)
            origin = Origin(blocks, first, self.blocks[row, :, tail].clone(), self.landmark_keys[row, :, tail].clone())
        self._origins[row] = replace(origin, written=[], absent=None)
        return again

    def forget(self, row: int) -> None:
        """Fetch nothing more of what a row went on from."""
        if row in self._origins and row in self._absent.sources:
            self._origins[row].absent = self._absent.mask[row].clone()
        self._absent.forget(row)

    def require(self, needed: Tensor) -> None:
        """Have blocks stand in their slots that are about to be read, if they do not yet; waits for the device.

        needed: (B, G, capacity) or (B * G, capacity) bool, on any device. Raises LandmarkError where they cannot be
        read.
        """
        if self.fetching:
            needed = needed.cpu().view(self._absent.mask.shape)
            device = self.blocks.device
            for row, head, slot, blocks in self._absent.fetch(needed, device):
                self.blocks[row, head.to(device), slot.to(device)] = blocks

    @contextmanager
    def staged(self, blocks: Tensor) -> Iterator[Tensor]:
        """For a while `blocks`, on the model's device and of the same shape, stands for the offloaded blocks; what was
        stored in it has to be copied back by the caller."""
        offloaded, self.blocks, self._is_staged = self.blocks, blocks, True
        try:
            yield blocks
        finally:
            self.blocks, self._is_staged = offloaded, False

    def _leave_pages(self, row: int, slots: Tensor | int) -> None:
        if self._pages is not None:
            self._pages.leave(row, slots)

    def forget_pages(self) -> None:
        """Hold copies of no blocks on the GPU any more."""
        if self._pages is not None:
            self._pages.forget()

    def fetch_all(self) -> None:
        """Have all blocks stand in their slots."""
        self.require(self._absent.mask)

    def gather(self, index: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Keys and values at (row, head, slot) or (row, head, slot, offset), broadcast, on the model's device."""
        device = self.landmark_keys.device
        index = tuple(x.to(self.blocks.device) for x in index)
        if self.fetching:
            needed = torch.zeros_like(self._absent.mask)
            needed[tuple(x.cpu() for x in index[:3])] = True
            self.require(needed)
        return self.keys[index].to(device), self.values[index].to(device)

    def window(self, k: Tensor, v: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """The tail block in front of the chunk, then the chunk: what a query attends to without retrieval.

        k, v: (B, G, T, D) of the chunk. Returns keys and values (B, G, P + T, D), P tokens of the longest tail block,
        and the first real key of each row, (B,), from which the row's blocks count.
        """
        longest = max(chunk.host_tail)
        first = chunk.start + longest - chunk.tail
        if longest == 0:
            return k, v, first
        index = torch.arange(longest + k.shape[2], device=k.device)
        in_chunk = (index >= longest + chunk.start[:, None])[:, None, :, None]
        # What stands before a row's first key is padding, for which memory may hold anything, nan too.
        padding = (index < first[:, None])[:, None, :, None]
        offset = (index - first[:, None]).clamp(0, self.settings.block_size - 1)
        heads = torch.arange(k.shape[1], device=k.device)
        slot = chunk.blocks % self.capacity
        tail = self.gather((chunk.rows[:, None, None], heads[:, None], slot[:, None, None], offset[:, None]))

        def join(stored: Tensor, fresh: Tensor) -> Tensor:
            stored = stored.masked_fill(padding, 0.0)
            return torch.where(in_chunk, torch.nn.functional.pad(fresh, (0, 0, longest, 0)), stored)

        return join(tail[0], k), join(tail[1], v), first

    def append(self, k: Tensor, v: Tensor, chunk: Chunk) -> None:
        """Store the chunk's keys (rotated at chunk.position_ids) and values, (B, G, T, D), in their blocks."""
        rotated = rotate(k, *chunk.shared("offsets", lambda: self._to_offsets(chunk)))
        landmark_keys = rotated
        if self.settings.positions == "absolute":
            cos, sin = chunk.stream_rotation
            landmark_keys = rotate(k, cos[:, None, None], sin[:, None, None])
        hosts = chunk.host_lengths, chunk.host_blocks, chunk.host_tail
        for row, (to_row, *counts) in enumerate(zip(chunk.host_rows, *hosts, strict=True)):
            for tokens, slots, offsets in self._runs(chunk.width, *counts):
                shape = slots.stop - slots.start, offsets.stop - offsets.start
                for to, source in ((self.keys, rotated), (self.values, v)):
                    to[to_row, :, slots, offsets] = source[row, :, tokens].unflatten(1, shape)
                if offsets.stop == self.settings.block_size:
                    self.landmark_keys[to_row, :, slots] = landmark_keys[row, :, tokens].unflatten(1, shape)[:, :, -1]

    def _to_offsets(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """cos and sin, (B, 1, T, rotary_dim / 2), of the rotation from the chunk's positions to offsets in blocks."""
        size = self.settings.block_size
        later = chunk.position_ids // size
        # From a table: forming the cosines anew takes longer than all else here.
        cos, sin = (x[later][:, None] for x in self.rotations.table(chunk.width // size + 2, later.device))
        return cos, -sin

    def _runs(self, width: int, length: int, blocks: int, tail: int) -> Iterator[tuple[slice, slice, slice]]:
        """A row's tokens in runs that go into a part of one block, or into whole blocks side by side: tokens of the
        chunk, slots, offsets in these. length, blocks, tail: of the row, see Chunk."""
        size, end = self.settings.block_size, tail + length
        while tail < end:
            number, offset = divmod(tail, size)
            slot, count, tokens = (blocks + number) % self.capacity, 1, min(size - offset, end - tail)
            if tokens == size:
                count = min((end - tail) // size, self.capacity - slot)
                tokens = count * size
            begin = width - (end - tail)
            yield slice(begin, begin + tokens), slice(slot, slot + count), slice(offset, offset + tokens // count)
            tail += tokens


def capacity_for(wanted: int, expected: int, capacity: int, bound: int, added: int) -> int:
    """For how many blocks room is made where there is room for `capacity` and `wanted` have to stand: by doubling at
    first, for all that are expected in one go, and of a bounded cache for its bound and the blocks of one chunk."""
    return min(max(wanted, expected, capacity + min(capacity, LARGEST_STEP), SMALLEST_CAPACITY), bound + added)


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in host memory that is taken page by page, as it is written to: blocks that are never fetched take none."""
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # A huge page holds a hundred blocks of small models, and all of it is taken and cleared with the first.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
