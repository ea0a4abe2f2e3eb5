"""What a row of a reader has read, copied out of it, and given to a row to go on from: as a memory, or by its file."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reading
from landmark_cli.inference.memory import Memory
from landmark_cli.inference.memory_fit import about, require_fit
from landmark_cli.inference.memory_parts import joined

if TYPE_CHECKING:
    from landmark_cli.inference.block_reader import BlockReader


def take(reader: BlockReader, row: int = 0) -> Memory:
    """A copy of what a row of a reader has read, on the device where its blocks lie. Raises LandmarkError where that is
    nothing."""
    cache = reader.cache
    if not reader.texts[row]:
        raise LandmarkError("nothing has been read yet, so there is no memory to keep")
    text = torch.frombuffer(reader.texts[row], dtype=torch.int32).clone()
    name = reader.model.name_or_path or type(reader.model).__name__
    return Memory(about(reader), name, cache.host_blocks[row], cache.host_tail[row], cache.copy_of(row), text)


def give(reader: BlockReader, memories: Sequence[Memory], row: int = 0) -> None:
    """Have a row of a reader go on from what was read, instead of what it has read itself: several memories are a
    library, read in order (see `joined`).

    Raises UsageError naming what does not fit the reader.
    """
    for memory in memories:
        require_fit(reader, memory)
    _put(reader, joined(memories), row)


def recall(reader: BlockReader, paths: Sequence[str | Path], row: int = 0, what: str = "") -> None:
    """Have a row of a reader go on from files, as `give` does. Files that the row went on from last, and that are what
    they were then, are not opened again: what of them the row still holds stays there.

    Raises LandmarkError where they cannot be read, UsageError naming what does not fit the reader.
    """
    files = tuple(_identity(path, what) for path in paths)
    before, memory = reader.recalled.pop(row, (None, None))
    if before != files:
        opened = [Memory.open(path, what) for path in paths]
        for each in opened:
            require_fit(reader, each)
        memory = joined(opened)
    _put(reader, memory, row)
    reader.recalled[row] = files, memory


def _identity(path: str | Path, what: str) -> tuple[int, ...]:
    """What differs where a path leads to another file than before, or to one that was written to."""
    with reading(path, what):
        found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _put(reader: BlockReader, memory: Memory, row: int) -> None:
    try:
        reader.cache.put(row, memory.layers, memory.blocks, memory.tail)
    except LandmarkError:
        # A part of the layers has it: the row has read nothing.
        reader.forget(row)
        raise
    reader.texts[row] = array("i", memory.text.numpy().tobytes())
