"""Blocks that stay in a memory's file until they are read: each is compared with what was written when it is fetched.

They are read by position, not through a mapping: where a file is cut short or its disk fails meanwhile, a read is an
error that can be told, and an access to a mapping the end of the process. The bytes that were compared are those that
are used, whatever happens to the file later.
"""

from __future__ import annotations

import functools
import hashlib
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from landmark_cli.file_errors import reading
from landmark_cli.file_reading import parse_json

# Reads and sums let go of Python's global lock, so they go side by side; few blocks are not worth the threads.
THREADS = 8
FEW = 64
# Blocks that a GPU adds up at a time, for what is worked out on the way takes as much memory again. A host takes few.
MANY = 4096
HOST = torch.device("cpu")


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

    def read(self, heads: Tensor, blocks: Tensor, device: torch.device = HOST) -> Tensor:
        found = torch.empty(len(heads), *self.shape[2:], dtype=self.dtype, pin_memory=device.type == "cuda")
        rows = found.view(len(heads), -1).view(torch.uint8).numpy()
        places = (heads * self.shape[1] + blocks).tolist()

        def fill(indices: range) -> None:
            begin = indices.start
            while begin < indices.stop:
                end = begin + 1
                while end < indices.stop and places[end] == places[end - 1] + 1:
                    end += 1
                offset = self.offset + places[begin] * rows.shape[1]
                self.file.read_into(memoryview(rows[begin:end].reshape(-1)), offset)
                begin = end

        with reading(self.file.path, self.file.what, to_do="read the text anew"):
            _side_by_side(fill, len(places))
            # Compared where they are used: a device adds up faster than the host reads.
            found = found.to(device, non_blocking=True)
            wrong = (checksums_of(found).cpu() != self.checksums[heads, blocks]).nonzero()
            if len(wrong):
                block, head = (int(of[wrong[0]]) for of in (blocks, heads))
                raise ValueError(f"block {block} of head {head} in {self.name} is not what was written to it")
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

    def read(self, heads: Tensor, blocks: Tensor, device: torch.device = HOST) -> Tensor:
        """The blocks (m,) of heads (m,), both int64: (m, 2, block_size, D) on the device.

        Raises LandmarkError where they cannot be read, or are not what was written.
        """

        def read(stored: Span | Tensor, heads: Tensor, blocks: Tensor) -> Tensor:
            if isinstance(stored, Span):
                return stored.read(heads, blocks, device)
            return stored[heads.to(stored.device), blocks.to(stored.device)].to(device)

        if len(self.runs) == 1:
            ((stored, first, _),) = self.runs
            return read(stored, heads, blocks + first)
        found = torch.empty(len(heads), *self.shape[2:], dtype=self.dtype, device=device)
        begin = 0
        for stored, first, count in self.runs:
            here = ((blocks >= begin) & (blocks < begin + count)).nonzero().squeeze(-1)
            if len(here):
                found[here.to(device)] = read(stored, heads[here], blocks[here] - begin + first)
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
    """What the bits of each block add up to, (..) int64, worked out where the blocks lie; blocks: (.., 2, block_size,
    D), contiguous.

    A sum modulo 2^64 of a block's words of 32 bits, each times a random weight: blocks that differ have the same sum
    with a chance of less than 2^-32 (D. Lemire and O. Kaser, Strongly universal string hashing is fast, 2014). Words
    are taken in pairs: of hi * 2^32 + lo the low one counts m * lo, the high one (m * 2^32 + n) * hi.
    """
    words = blocks.reshape(-1, blocks.shape[-3:].numel()).view(torch.int64)
    weights = _weights(words.shape[1], words.device)
    if words.device.type == "cpu":
        sums = torch.from_numpy(_sums_on_host(words.numpy(), *weights.numpy()))
    else:
        low, high = weights
        sums = torch.cat([(part * low).sum(-1) + ((part >> 32) * high).sum(-1) for part in words.split(MANY)])
    return sums.view(blocks.shape[:-3])


def _sums_on_host(words: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(m, n) int64, (n,), (n,) -> (m,), modulo 2^64. By numpy, which is several times as fast as torch, stays in its
    thread, where torch would have each of several threads start threads of its own, and knows no inference mode, which
    threads begin outside of."""
    sums = np.empty(len(words), np.int64)

    def add_up(indices: range) -> None:
        for begin in range(indices.start, indices.stop, FEW):
            part = slice(begin, min(begin + FEW, indices.stop))
            sums[part] = words[part] @ low + (words[part] >> 32) @ high

    _side_by_side(add_up, len(words))
    return sums


@functools.cache
def _weights(words: int, device: torch.device) -> Tensor:
    """(2, words) int64, the same everywhere and always."""
    random = np.frombuffer(hashlib.shake_256(b"landmark").digest(16 * words), "<i8").reshape(2, words)
    return torch.from_numpy(random.copy()).to(device)


def _side_by_side(work: Callable[[range], None], count: int) -> None:
    """Do work(indices) for all of `count` indices, by several threads where that is worth it."""
    if count <= FEW:
        work(range(count))
        return
    share = -(-count // THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, [range(begin, min(begin + share, count)) for begin in range(0, count, share)]))
