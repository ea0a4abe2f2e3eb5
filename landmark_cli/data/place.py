"""How far a preparation is: noted beside its unfinished files, so that the same command goes on there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from landmark_cli.data.left_out import LeftOut
from landmark_cli.data.token_file_writer import Written
from landmark_cli.file_reading import read_sealed
from landmark_cli.file_writing import write_sealed


@dataclass
class Place:
    """What one process has done.

    Attributes:
        made_from: fingerprint of all that the token files are made from.
        finished: whether all documents of the process are done.
        next_document: the number of the first document that is not done.
        read: bytes that the documents before that one take where they are stored.
        left_out: what was no text.
        splits: what is on the disk of each split's token file.
        turns: bytes of the file that says what became of each document (see `Process.turns_file`).
        turns_sha256: of these bytes of that file.
    """

    made_from: str
    finished: bool = False
    next_document: int = 0
    read: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    splits: dict[str, Written] = field(default_factory=dict)
    turns: int = 0
    turns_sha256: str = ""

    @classmethod
    def read_from(cls, file: Path) -> Place:
        """The place noted in a file. Raises LandmarkError where there is none, or the file is not what was written."""
        return read_sealed(cls, file)

    def write_to(self, file: Path) -> None:
        write_sealed(file, asdict(self))
