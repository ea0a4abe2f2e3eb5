"""Blocks in host memory: which of them the GPU holds copies of, and whether host memory holds them all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from landmark_cli.errors import LandmarkError

GIB = 2**30


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


class Pages:
    """The pages of one layer's blocks that the GPU holds copies of; the least recently used make room for others.

    A page is one block of one key head of one row, numbered (row * G + head) * capacity + slot. The copies lie in the
    frames of a pool.

    pool: (frames, 2, block_size, D). page_table: (pages + 1,) int32, which frame holds a page, -1 where none does.
    held, used: (frames + 1,) int32, which page a frame holds (-1: none) and when it was last used.
    The last entry of each is a dummy, so that everything below has a fixed shape and runs without the host.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor, room: int):
        """shape: of the blocks, (B, G, capacity, 2, block_size, D). like: a tensor on the GPU. room: bytes there."""
        page = torch.Size(shape[3:])
        self.pages = torch.Size(shape[:3]).numel()
        self.frames = max(1, min(self.pages, room // (page.numel() * like.element_size())))
        self.pool = like.new_zeros(self.frames, *page)

        def filled(count: int, value: int) -> Tensor:
            return torch.full((count + 1,), value, dtype=torch.int32, device=like.device)

        self.page_table, self.held, self.used = filled(self.pages, -1), filled(self.frames, -1), filled(self.frames, 0)
        self.now = torch.zeros((), dtype=torch.int32, device=like.device)

    def forget(self) -> None:
        """Hold no copies any more: what they are copies of has been replaced."""
        self.page_table.fill_(-1)
        self.held.fill_(-1)
        self.used.fill_(0)

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


def require_host_memory(tokens: int, layers: int, layer_bytes: int) -> None:
    """Raise LandmarkError where blocks will not fit into this machine's memory.

    tokens: of each row, which the error names. layer_bytes: of all blocks of one of the layers; pinned memory is handed
    out in powers of two.
    """
    needed, available = layers * (1 << (layer_bytes - 1).bit_length()), available_host_memory()
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
