"""metrics.jsonl, what a run has measured: written line by line, read again when it is resumed or drawn."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from landmark_cli.console import counted, finite, warn
from landmark_cli.file_errors import writing
from landmark_cli.file_reading import read_json_lines
from landmark_cli.file_writing import append_line, write_whole

METRICS = "metrics.jsonl"
CHECKSUM = "crc32"


class MetricsFile:
    """metrics.jsonl: one JSON object a line, in the order of the steps. Only the main process writes.

    The last field of a line, "crc32", is the checksum of the line without it, in hexadecimal digits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; a number that is not finite becomes null. Raises LandmarkError where the file cannot be
        written."""
        with writing(self.path):
            append_line(self.path, _line(finite(record)))

    def rewind(self, step: int) -> None:
        """Drop what was written after `step`: a resumed run writes those steps again. Lines that are damaged, as the
        last one may be where a run was killed, are dropped too, and the user is told how many there were."""
        if not self.path.exists():
            return
        kept = [f"{_line(record)}\n" for record in read_metrics(self.path) if record["step"] <= step]
        with writing(self.path):
            write_whole(self.path, "".join(kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run, in their order. Damaged lines are left out, and the user is told how many there were.

    Raises LandmarkError where the file cannot be read.
    """
    damaged: list[int] = []
    records = []
    for record in read_json_lines(path, damaged=lambda number, _: damaged.append(number)):
        checksum = record.pop(CHECKSUM, None)
        if type(record.get("step")) is not int or checksum not in (None, _checksum(record)):
            damaged.append(0)
        else:
            records.append(record)
    if damaged:
        warn(f"{path}: {counted(len(damaged), 'damaged line')} left out")
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record | {CHECKSUM: _checksum(record)})


def _checksum(record: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record).encode()):08x}"
