"""What was read for earlier requests, by the beginning of its text: one that begins alike goes on from there."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from landmark_cli.console import warn
from landmark_cli.errors import LandmarkError
from landmark_cli.inference.memory import Memory, sha256_of
from landmark_cli.inference.memory_parts import beginning
from landmark_cli.inference.readers import free_memory

SUFFIX = ".memory"
# Of a GPU's free memory, what memories may take that wait to be copied to host memory.
GPU_SHARE = 0.25


@dataclass
class _Entry:
    """A memory where its blocks lay, in host memory, in a file, or on its way there. text: (tokens,) int32. chunk: of
    the reader. moving: to host memory."""

    text: Tensor
    chunk: int
    memory: Memory | None
    path: Path | None = None
    moving: Future | None = None
    writing: Future | None = None

    @property
    def nbytes(self) -> int:
        """Of the memory, as long as it is no file's."""
        held = self.memory
        return 0 if held is None else held.nbytes

    @cached_property
    def beginning(self) -> bytes:
        """The text's first chunk."""
        return self.text[: self.chunk].numpy().tobytes()


class PrefixMemories:
    """Memories by their texts. Those used least lately leave once all together have more than `budget` bytes: to files
    in `directory`, or for good where there is none.

    Only the engine's thread calls this. It does not wait while a memory is copied from a GPU to host memory, which
    takes as long as many tokens of all rows, or written to a file: both have a thread of their own.
    """

    def __init__(self, budget: int, directory: Path | None = None) -> None:
        self.budget, self.directory = budget, directory
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._mover, self._writer = (ThreadPoolExecutor(1, f"landmark-{name}") for name in ("copies", "memories"))
        self._moving: deque[_Entry] = deque()

    def find(self, check: Callable[[Memory], None]) -> None:
        """Take in what the directory holds from before. check: raises LandmarkError for what does not fit the reader;
        such files, and damaged ones, are left alone."""
        for path in sorted(self.directory.glob(f"*{SUFFIX}")) if self.directory is not None else ():
            try:
                memory = Memory.open(path, "--memory-dir")
                check(memory)
            except LandmarkError as error:
                warn(f"{error} (the file is left alone)")
                continue
            text = memory.text.clone()
            self._entries[sha256_of(text)] = _Entry(text, memory.about.chunk, None, path)

    @property
    def nbytes(self) -> int:
        """What is held in host memory, or on its way there."""
        return sum(entry.nbytes for entry in list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, ids: list[int]) -> Memory | None:
        """The memory of the longest beginning of a text that ends with a chunk and leaves a token of the text to be
        read; None where there is none. Raises LandmarkError where the file that holds it cannot be read: it is
        forgotten then.

        As chunks are cut where they would be without it, what is read after it is the same, too.
        """
        text = torch.tensor(ids[:-1], dtype=torch.int32)
        content = text.numpy().tobytes()
        found = [
            (_common(text, entry.text) // entry.chunk * entry.chunk, key)
            for key, entry in self._entries.items()
            if content.startswith(entry.beginning)
        ]
        for length, key in sorted(found, reverse=True):
            if length == 0:
                return None
            entry = self._entries[key]
            try:
                held = entry.memory
                if held is None and entry.path is None:
                    raise LandmarkError("it could not be copied to host memory, or written to --memory-dir")
                memory = beginning(held or Memory.open(entry.path, "--memory-dir"), length)
            except LandmarkError:
                del self._entries[key]
                raise
            if memory is not None:
                self._entries.move_to_end(key)
                return memory
        return None

    def keep(self, memory: Memory) -> None:
        """Hold a memory. It replaces those of which its text is a continuation."""
        content = memory.text.numpy().tobytes()
        for key, entry in list(self._entries.items()):
            if content.startswith(entry.beginning) and _common(entry.text, memory.text) == len(entry.text):
                self._forget(key)
        self._entries[sha256_of(memory.text)] = kept = _Entry(memory.text, memory.about.chunk, memory)
        self._move(kept)
        held = self.nbytes
        for key, entry in list(self._entries.items()):
            if held <= self.budget:
                break
            if (size := entry.nbytes) > 0:
                held -= size
                self._leave(key, entry)

    def close(self) -> None:
        """Write what is held to the directory, if there is one, and wait until it is written."""
        for key, entry in list(self._entries.items()):
            if entry.memory is not None:
                self._leave(key, entry)
        self._mover.shutdown()
        self._writer.shutdown()

    def _move(self, entry: _Entry) -> None:
        """Have a memory that lies in a GPU's memory copied to host memory, behind those that wait for that. As many
        wait as have room."""
        device = entry.memory.gpu
        if device is None:
            return
        entry.moving = self._mover.submit(self._copy, entry, made_by_now(device))
        self._moving.append(entry)
        while self._moving and (
            self._moving[0].moving.done() or sum(each.nbytes for each in self._moving) > GPU_SHARE * free_memory(device)
        ):
            self._moving.popleft().moving.result()

    def _copy(self, entry: _Entry, made: torch.cuda.Event) -> None:
        memory = entry.memory
        if memory is None:
            # It has left already.
            return
        try:
            memory = on_host(memory, made)
        except RuntimeError as error:
            warn(f"a memory is not kept: {str(error).splitlines()[0]}")
            memory = None
        if entry.memory is not None:
            entry.memory = memory

    def _leave(self, key: str, entry: _Entry) -> None:
        if self.directory is None:
            del self._entries[key]
            entry.memory = None
            return
        if entry.writing is None:
            entry.path = self.directory / f"{key[:32]}{SUFFIX}"
            entry.writing = self._writer.submit(self._write, entry)

    def _write(self, entry: _Entry) -> None:
        if entry.moving is not None:
            entry.moving.result()
        if entry.memory is None:
            entry.path = None
            return
        try:
            entry.memory.save(entry.path, "--memory-dir")
        except LandmarkError as error:
            warn(str(error))
            entry.path = None
        # From here on it is found in its file, if at all.
        entry.memory = None

    def _forget(self, key: str) -> None:
        entry = self._entries.pop(key)
        if entry.writing is None:
            entry.memory = None
        if entry.path is not None:

            def remove() -> None:
                entry.path.unlink(missing_ok=True)

            # Behind a write of it that may be waiting.
            self._writer.submit(remove)


def made_by_now(device: torch.device) -> torch.cuda.Event:
    """What comes to pass once a GPU has done what it was asked for so far."""
    made = torch.cuda.Event()
    made.record(torch.cuda.current_stream(device))
    return made


def on_host(memory: Memory, made: torch.cuda.Event) -> Memory:
    """A memory with copies in host memory of what lies in a GPU's, once that is made; the GPU goes on meanwhile."""
    stream = torch.cuda.Stream(memory.gpu)

    def copy(part: Tensor) -> Tensor:
        if not part.is_cuda:
            return part
        # Over pinned memory, which is used again for the next: the driver does not hold up others while it copies.
        pinned = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        pinned.copy_(part, non_blocking=True)
        stream.synchronize()
        # By this thread alone, where PyTorch would take every core from those who make and send tokens.
        host = torch.empty(part.shape, dtype=part.dtype)
        np.copyto(host.view(torch.uint8).numpy(), pinned.view(torch.uint8).numpy())
        return host

    with torch.cuda.stream(stream):
        stream.wait_event(made)
        return replace(memory, layers=[type(of_layer)(*map(copy, of_layer)) for of_layer in memory.layers])


def _common(a: Tensor, b: Tensor) -> int:
    """How many tokens two texts have in common at their beginning."""
    length = min(len(a), len(b))
    differ = (a[:length] != b[:length]).nonzero()
    return int(differ[0]) if len(differ) else length
