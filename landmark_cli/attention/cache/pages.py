"""Blocks in host memory: which of them the GPU holds copies of, and whether host memory holds them all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark_cli.errors import LandmarkError

GIB = 2**30
# Of the parts of memory on the GPU, in bytes.
ALIGNMENT = 16
# For whole layers: one reads in a room while the next one's blocks arrive in the other.
ROOMS = 2


@dataclass(frozen=True)
class Offload:
    """Keep the block cache in host memory; the GPU reads it there and keeps the blocks it used last.

    layers: of the model. resident_bytes: GPU memory for blocks kept there, all layers together.
    """

    layers: int
    resident_bytes: int = 2 * GIB

    @property
    def bytes_per_layer(self) -> int:
        return self.resident_bytes // self.layers

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Host memory that like's device can read; pinned where that is a GPU."""
        return torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)


class Resident:
    """The memory of the GPU for offloaded blocks: each layer has a share for the pages that it used last, and while a
    passage is read all of it is for whole layers (see streaming.py)."""

    def __init__(self, offload: Offload, device: torch.device):
        """device: that of the layers; what is elsewhere has its share there."""
        self.offload, self.device = offload, device
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Resident:
        """Memory of its own, with nothing in it."""
        return Resident(self.offload, self.device)

    def share(self, layer: int, blocks: Tensor, like: Tensor) -> Tensor:
        """The share, (n,) numbers on like's device, of the layer that was made as number `layer` and has these
        blocks."""
        if like.device != self.device or layer >= self.offload.layers:
            size = min(self.offload.bytes_per_layer, blocks.nbytes)
            return torch.empty(size, dtype=torch.uint8, device=like.device)[: _whole(size)].view(like.dtype)
        return self._parts(self.offload.layers, blocks)[layer].view(like.dtype)

    def fits(self, blocks: Tensor) -> bool:
        """Whether a room has space for so many blocks of a layer."""
        return ROOMS * room_bytes(blocks) <= self.offload.resident_bytes

    def rooms(self, blocks: Tensor) -> list[Tensor]:
        """All of it as rooms, (n,) numbers each, for a layer that has no more blocks than these. Layers have to forget
        the pages that they had there."""
        return [part.view(blocks.dtype) for part in self._parts(ROOMS, blocks)]

    def _parts(self, count: int, blocks: Tensor) -> list[Tensor]:
        """All of it in so many parts, (n,) bytes; as much as all layers with so many blocks need, if that is less than
        they may have."""
        layers = max(self.offload.layers, ROOMS)
        wanted = min(self.offload.resident_bytes, layers * room_bytes(blocks))
        if len(self._memory) < wanted:
            self._memory = torch.empty(wanted, dtype=torch.uint8, device=self.device)
        size = _whole(len(self._memory) // count)
        return [self._memory[part * size : (part + 1) * size] for part in range(count)]


def room_bytes(blocks: Tensor) -> int:
    return -(-blocks.nbytes // ALIGNMENT) * ALIGNMENT


def _whole(size: int) -> int:
    """Bytes that begin and end where kernels like it."""
    return size // ALIGNMENT * ALIGNMENT


class Pages:
    """The pages of one layer's blocks that the GPU holds copies of; the least recently used make room for others.

    A page is one block of one key head of one row, numbered (row * G + head) * capacity + slot. The copies lie in the
    frames of a pool.

    pool: (frames, 2, block_size, D). page_table: (pages + 1,) int32, which frame holds a page, -1 where none does.
    held, used: (frames + 1,) int32, which page a frame holds (-1: none) and when it was last used.
    The last entry of each is a dummy, so that everything below has a fixed shape and runs without the host.
    """

    def __init__(self, shape: tuple[int, ...], memory: Tensor):
        """shape: of the blocks, (B, G, capacity, 2, block_size, D). memory: for the pool, (n,) numbers."""
        page = torch.Size(shape[3:])
        self.shape = torch.Size(shape[:3])
        self.pages = self.shape.numel()
        if len(memory) < page.numel():
            memory = memory.new_empty(page.numel())
        self.frames = min(self.pages, len(memory) // page.numel())
        self.pool = memory[: self.frames * page.numel()].view(self.frames, *page)

        def filled(count: int, value: int) -> Tensor:
            return torch.full((count + 1,), value, dtype=torch.int32, device=memory.device)

        self.page_table, self.held, self.used = filled(self.pages, -1), filled(self.frames, -1), filled(self.frames, 0)
        self.now = torch.zeros((), dtype=torch.int32, device=memory.device)

    def forget(self) -> None:
        """Hold no copies any more: what they are copies of has been replaced."""
        self.page_table.fill_(-1)
        self.held.fill_(-1)
        self.used.fill_(0)

    def leave(self, row: int, slots: Tensor | int) -> None:
        """Hold no copies any more of what these slots of a row held: it has been replaced."""
        slots = slots.to(self.page_table.device) if isinstance(slots, Tensor) else slots
        self.page_table[:-1].view(self.shape)[row, :, slots] = -1

    def admit(self, needed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give needed pages that no frame holds a frame, as far as there are frames that this call does not need.

        needed: (pages,) bool. Returns (pages, frames, count): the first `count` of `pages` have to be copied to the
        first `count` of `frames`; both (frames,) int32, count a tensor without dimensions.
        """
        self.now += 1
        frames, dummy_page = self.frames, self.pages
        frame = self.page_table[:-1]
        self.used[torch.where(needed & (frame >= 0), frame, frames).long()] = self.now
        missing = needed & (frame < 0)
        rank = missing.cumsum(0) - 1
        oldest = self.used[:-1].argsort(stable=True)
        count = torch.minimum(missing.sum(), (self.used[:-1] < self.now).sum())
        taken = torch.arange(frames, device=needed.device) < count

        arriving = torch.full_like(self.held, dummy_page)
        target = torch.where(missing & (rank < count), rank, frames)
        arriving[target] = torch.arange(self.pages, dtype=torch.int32, device=needed.device)
        arriving = arriving[:-1]

        # A page may have been overwritten since: then it has left its frame already.
        leaving = self.held[oldest]
        left = taken & (leaving >= 0) & (self.page_table[leaving.long()] == oldest)
        # Not by an index and "= -1", which would copy the number from the host and cannot be recorded.
        self.page_table.index_fill_(0, torch.where(left, leaving, dummy_page).long(), -1)
        self.page_table[torch.where(taken, arriving, dummy_page).long()] = oldest.int()
        self.held[torch.where(taken, oldest, frames)] = arriving
        self.used[torch.where(taken, oldest, frames)] = self.now
        return arriving, oldest.int(), count


def pinned_bytes(size: int) -> int:
    """What so many bytes take in pinned memory, which is handed out in powers of two."""
    return 1 << (size - 1).bit_length()


def require_host_memory(tokens: int, layers: int, layer_bytes: int) -> None:
    """Raise LandmarkError where blocks will not fit into this machine's memory.

    tokens: of each row, which the error names. layer_bytes: of all blocks of one of the layers.
    """
    needed, available = layers * pinned_bytes(layer_bytes), available_host_memory()
    if available is not None and needed > available:
        raise LandmarkError(
            f"offloading {tokens:,} tokens needs {needed / GIB:.1f} GiB of host memory, {available / GIB:.1f} GiB are "
            "available; read less, or keep fewer blocks with --cache-blocks"
        )


def available_host_memory() -> int | None:
    """Bytes that programs can still take, by the system's estimate; None where it gives none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return int(found["MemAvailable"]) * 1024 if "MemAvailable" in found else None
