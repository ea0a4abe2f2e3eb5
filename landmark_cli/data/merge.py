"""Several processes prepare one corpus: whose turn a document is, and how their parts become the same token files."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from landmark_cli.data.corpora import SPLITS
from landmark_cli.data.token_file import TokenFileWriter, map_values

TURN = 16
"""Documents that a process takes before it is the next one's turn."""
WAIT_SECONDS = 0.1


@dataclass(frozen=True)
class Process:
    """Which of how many processes this one is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> Process:
        """As torchrun and `accelerate launch` say it."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def suffix(self) -> str:
        """What the names of its unfinished files end with."""
        return ".partial" if self.count == 1 else f".{self.rank}of{self.count}.partial"

    def takes(self, number: int) -> bool:
        """Whether document `number` is its own."""
        return number // TURN % self.count == self.rank

    def state_file(self, output: Path) -> Path:
        """Where it notes how far it is."""
        return output / f"prepare.json{self.suffix}"

    def turns_file(self, output: Path) -> Path:
        """Where it notes what became of each of its documents: (number of the split, ids with end of text) int64."""
        return output / f"turns{self.suffix}"


def merge(
    output: Path, made_from: str, count: int, open_writer: Callable[[str], TokenFileWriter]
) -> tuple[dict[str, TokenFileWriter], list[str]]:
    """Wait for the parts of all `count` processes and write their documents in the corpus's order.

    open_writer: starts the token file of a split.

    Returns:
        The writers by split, not finished yet, and what the processes left out.
    """
    parts = [Process(rank, count) for rank in range(count)]
    states = [_await(part.state_file(output), made_from) for part in parts]
    turns = [np.fromfile(part.turns_file(output), dtype="<i8").reshape(-1, 2) for part in parts]
    writers: dict[str, TokenFileWriter] = {}
    ids: dict[tuple[int, str], np.ndarray] = {}
    for rank, state in enumerate(states):
        for split, written in state["splits"].items():
            if split not in writers:
                writers[split] = open_writer(split)
            writer = writers[split]
            writer.text_bytes += written["text_bytes"]
            file = output / f"{split}.bin{parts[rank].suffix}"
            ids[rank, split] = map_values(file, writer.dtype.name, written["tokens"])
    used = dict.fromkeys(ids, 0)
    longest = max(map(len, turns))
    for first in range(0, longest, TURN):
        for rank in range(count):
            for number, length in turns[rank][first : first + TURN].tolist():
                if length:
                    place = (rank, SPLITS[number])
                    start = used[place]
                    writers[SPLITS[number]].add_document(ids[place][start : start + length - 1])
                    used[place] = start + length
    return writers, [message for state in states for message in state["skipped"]]


def _await(state_file: Path, made_from: str) -> dict[str, Any]:
    """A process's last state, once its part is whole. (A launcher ends every process when one of them fails.)"""
    while True:
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(state_file.read_text(encoding="utf-8"))
            if state["made_from"] == made_from and state["finished"]:
                return state
        time.sleep(WAIT_SECONDS)
