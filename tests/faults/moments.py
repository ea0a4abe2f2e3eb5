"""Moments at which a command can be stopped: before its nth change of a file or directory, or after so many seconds."""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
ROOM = 512


class Changes:
    """Counts a fork's changes below a folder, and sends the fork a signal right before one of them.

    Made before the fork; `watch` is called in it; `count` and `last` are read by the parent afterwards.
    """

    def __init__(self, below: Path) -> None:
        self._below = os.path.realpath(below)
        self._shared = mmap.mmap(-1, 8 + ROOM)

    @property
    def count(self) -> int:
        return int.from_bytes(self._shared[:8], "little")

    @property
    def last(self) -> str:
        """The change that was about to be made last."""
        return self._shared[8:].rstrip(b"\0").decode(errors="replace")

    def watch(self, stop_at: int = 0, number: int = signal.SIGKILL, then: Callable[[], None] | None = None) -> None:
        """Count from now on, in this process; at change `stop_at` send it the signal `number`, or do `then`."""

        def count(event: str, arguments: tuple) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
            if not (writes or event in CHANGES) or isinstance(arguments[0], int):
                return
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith(self._below):
                return
            self._shared[:8] = (self.count + 1).to_bytes(8, "little")
            what = f"{event} {path[len(self._below) + 1 :]}".encode()[-ROOM:]
            self._shared[8:] = what + bytes(ROOM - len(what))
            if self.count != stop_at:
                return
            if then is None:
                os.kill(os.getpid(), number)
            else:
                then()

        sys.addaudithook(count)


@dataclass(frozen=True)
class Length:
    """How long a command is that nobody stops: its changes of files, and its seconds."""

    changes: int
    seconds: float


@dataclass(frozen=True)
class Moment:
    """When to stop a command: at a change, or after some seconds."""

    change: int = 0
    seconds: float = 0.0

    @classmethod
    def choose(cls, chance: random.Random, length: Length) -> Moment:
        if chance.random() < 0.6:
            return cls(change=chance.randint(1, length.changes))
        return cls(seconds=chance.uniform(0.0, length.seconds))

    def __str__(self) -> str:
        return f"before change {self.change}" if self.change else f"after {self.seconds:.3f} s"
