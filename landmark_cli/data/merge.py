"""Several processes prepare one corpus: whose turn a document is, and how their parts become the same token files."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from landmark_cli.data.hashed_file import check_hash
from landmark_cli.data.place import Place
from landmark_cli.data.sources import SPLITS
from landmark_cli.data.token_file import map_values
from landmark_cli.data.token_file_metadata import answers_path
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.errors import LandmarkError
from landmark_cli.interrupts import Interrupts

TURN = 16
"""Documents that a process takes before it is the next one's turn."""
WAIT_SECONDS = 0.1
GO_ON = "what is prepared so far is kept; run the same command again to go on"


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
        """What the names of this process's unfinished files end with."""
        return ".partial" if self.count == 1 else f".{self.rank}of{self.count}.partial"

    def takes(self, number: int) -> bool:
        """Whether document `number` is for this process."""
        return number // TURN % self.count == self.rank

    def state_file(self, output: Path) -> Path:
        """Where this process notes how far it is."""
        return output / f"prepare.json{self.suffix}"

    def place_in(self, output: Path) -> str | None:
        """What is kept where this process is stopped outside of its work, and how to go on; None where nothing is."""
        return GO_ON if self.state_file(output).exists() else None

    def turns_file(self, output: Path) -> Path:
        """Where this process notes what became of each of its documents: (number of the split, ids with end of text)
        int64."""
        return output / f"turns{self.suffix}"


def merge(
    output: Path, made_from: str, count: int, open_writer: Callable[[str], TokenFileWriter], asked: Interrupts
) -> tuple[dict[str, TokenFileWriter], list[Place]]:
    """Wait for the parts of all `count` processes and write their documents in the corpus's order.

    open_writer: starts the token file of a split. asked: true from the moment on when somebody asks for a stop.

    Returns:
        The writers by split, not finished yet, and the processes' places.

    Raises:
        LandmarkError: a part is not what its process wrote.
        Stopped: somebody asked for a stop; the parts stay for the next run.
    """
    parts = [Process(rank, count) for rank in range(count)]
    places = [_await(part.state_file(output), made_from, asked) for part in parts]
    turns = []
    for part, place in zip(parts, places, strict=True):
        file = part.turns_file(output)
        check_hash(file, place.turns, place.turns_sha256)
        turns.append(np.fromfile(file, dtype="<i8").reshape(-1, 2))
    writers: dict[str, TokenFileWriter] = {}
    ids: dict[tuple[int, str], np.ndarray] = {}
    marks: dict[tuple[int, str], np.ndarray] = {}
    for rank, place in enumerate(places):
        for split, written in place.splits.items():
            if split not in writers:
                writers[split] = open_writer(split)
            writer = writers[split]
            writer.text_bytes += written.text_bytes
            file = output / f"{split}.bin{parts[rank].suffix}"
            check_hash(file, written.tokens * writer.dtype.itemsize, written.sha256)
            ids[rank, split] = map_values(file, writer.dtype.name, written.tokens)
            if written.answers_sha256:
                file = output / f"{answers_path(output / split).name}{parts[rank].suffix}"
                check_hash(file, written.tokens, written.answers_sha256)
                marks[rank, split] = map_values(file, "uint8", written.tokens)
    used = dict.fromkeys(ids, 0)
    longest = max(map(len, turns))
    for first in range(0, longest, TURN):
        if asked:
            raise asked.stopped(GO_ON)
        for rank in range(count):
            for number, length in turns[rank][first : first + TURN].tolist():
                if length:
                    place = (rank, SPLITS[number])
                    start = used[place]
                    text = slice(start, start + length - 1)
                    writers[SPLITS[number]].add_document(ids[place][text], marks=marks[place][text] if marks else None)
                    used[place] = start + length
    return writers, places


def _await(file: Path, made_from: str, asked: Interrupts) -> Place:
    """A process's last place, once its part is whole. (A launcher ends every process when one of them fails.)"""
    while True:
        with contextlib.suppress(LandmarkError):
            place = Place.read_from(file)
            if place.made_from == made_from and place.finished:
                return place
        if asked:
            raise asked.stopped(GO_ON)
        time.sleep(WAIT_SECONDS)
