"""Blocks that stay in a memory's file until they are read: each is compared with what was written when it is fetched.

They are read by position, not through a mapping: where a file is cut short or its disk fails meanwhile, a read is an
error that can be told, and an access to a mapping the end of the process. The bytes that were compared are those that
are used, whatever happens to the file later.
"""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark_cli.files import parse_json, reading

# zlib and reads let go of Python's global lock, so blocks are compared side by side; few are not worth the threads.
THREADS = 8
FEW = 64


class BlockFile:
    """A file that stays open as long as anybody reads blocks of it. what: the option that names it, for messages."""

    def __init__(self, path: Path, what: str = "") -> None:
        self.path, self.what = path, what
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def header(self) -> tuple[int, dict[str, Any]]:
        """Where the tensors' bytes begin, and what the header of safetensors says of each tensor."""
        length = bytearray(8)
        self.read_into(memoryview(length), 0)
        content = bytearray(int.from_bytes(length, "little"))
        self.read_into(memoryview(content), len(length))
        return len(length) + len(content), parse_json(bytes(content))

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with what stands from a byte on. Raises OSError, or EOFError where there is less."""
        while len(buffer):
            count = os.preadv(self._file, [buffer], offset)
            if count == 0:
                raise EOFError
            buffer, offset = buffer[count:], offset + count


@dataclass(frozen=True)
class Span:
    """One layer's blocks in a file: a tensor of `shape`, (G, n, 2, block_size, D), from byte `offset` on. checksums:
    (G, n) int64, see `checksums_of`. name: the tensor's, for messages."""

    file: BlockFile = field(repr=False)
    offset: int
    shape: torch.Size
    dtype: torch.dtype
    checksums: Tensor = field(repr=False)
    name: str

    def read(self, heads: Tensor, blocks: Tensor) -> Tensor:
        found = torch.empty(len(heads), *self.shape[2:], dtype=self.dtype)
        buffers = found.view(len(heads), -1).view(torch.uint8).numpy()
        places = (heads * self.shape[1] + blocks).tolist()
        expected = self.checksums[heads, blocks].tolist()

        def fill(indices: range) -> None:
            for index in indices:
                self.file.read_into(memoryview(buffers[index]), self.offset + places[index] * buffers.shape[1])
                if zlib.crc32(buffers[index]) != expected[index]:
                    place = f"block {blocks[index]} of head {heads[index]} in {self.name}"
                    raise ValueError(f"{place} is not what was written to it")

        with reading(self.file.path, self.file.what, to_do="read the text anew"):
            _side_by_side(fill, len(places))
        return found


class StoredBlocks:
    """Blocks of one layer of one row, (G, n, 2, block_size, D): runs of blocks of files, and of tensors, one after
    another. What attention/cache/absent.py calls a source."""

    def __init__(self, runs: list[tuple[Span | Tensor, int, int]]) -> None:
        """runs: of what, from which block on, and how many."""
        self.runs = runs
        kind = runs[0][0]
        self.dtype = kind.dtype
        self.shape = torch.Size([kind.shape[0], sum(count for *_, count in runs), *kind.shape[2:]])

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def read(self, heads: Tensor, blocks: Tensor) -> Tensor:
        """The blocks (m,) of heads (m,), both int64: (m, 2, block_size, D) on the host.

        Raises LandmarkError where they cannot be read, or are not what was written.
        """
        found = torch.empty(len(heads), *self.shape[2:], dtype=self.dtype)
        begin = 0
        for stored, first, count in self.runs:
            here = ((blocks >= begin) & (blocks < begin + count)).nonzero().squeeze(-1)
            if len(here):
                head, block = heads[here], blocks[here] - begin + first
                found[here] = stored.read(head, block) if isinstance(stored, Span) else stored[head, block].cpu()
            begin += count
        return found

    def whole(self) -> Tensor:
        """All blocks. Raises LandmarkError as `read` does."""
        parts = []
        for stored, first, count in self.runs:
            if isinstance(stored, Tensor):
                parts.append(stored[:, first : first + count].cpu())
                continue
            heads = torch.arange(self.shape[0]).repeat_interleave(count)
            blocks = torch.arange(first, first + count).repeat(self.shape[0])
            parts.append(stored.read(heads, blocks).view(self.shape[0], count, *self.shape[2:]))
        return torch.cat(parts, dim=1)


def cut(blocks: Tensor | StoredBlocks, first: int, last: int) -> StoredBlocks:
    """Blocks first .. last - 1, without reading any."""
    runs, begin = [], 0
    for stored, start, count in [(blocks, 0, blocks.shape[1])] if isinstance(blocks, Tensor) else blocks.runs:
        low, high = max(first, begin), min(last, begin + count)
        if low < high:
            runs.append((stored, start + low - begin, high - low))
        begin += count
    return StoredBlocks(runs)


def in_order(parts: list[StoredBlocks]) -> StoredBlocks:
    """The blocks of several one after another, without reading any."""
    return StoredBlocks([run for part in parts for run in part.runs])


def checksums_of(blocks: Tensor) -> Tensor:
    """The CRC-32 of the bytes of each block of each head, (G, n) int64; blocks: (G, n, 2, block_size, D), contiguous
    and on the host."""
    rows = blocks.view(blocks.shape[:2].numel(), -1).view(torch.uint8).numpy()
    sums = torch.empty(len(rows), dtype=torch.int64)

    def fill(indices: range) -> None:
        sums[indices.start : indices.stop] = torch.tensor([zlib.crc32(rows[index]) for index in indices])

    _side_by_side(fill, len(rows))
    return sums.view(blocks.shape[:2])


def _side_by_side(work: Callable[[range], None], count: int) -> None:
    """Do work(indices) for all of `count` indices, by several threads where that is worth it."""
    if count <= FEW:
        work(range(count))
        return
    share = -(-count // THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, [range(begin, min(begin + share, count)) for begin in range(0, count, share)]))
