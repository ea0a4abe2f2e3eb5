"""A file that is written from front to back, over several runs of the program if need be, and whose sha256 is known."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from landmark_cli.errors import LandmarkError
from landmark_cli.file_reading import hash_file


class HashedFile:
    """A file under way.

    size, sha256: of what an earlier run left, to go on behind it; without them the file is begun anew.

    Raises LandmarkError where the file is shorter, or not what had been written to it.
    """

    def __init__(self, path: Path, size: int = 0, sha256: str | None = None) -> None:
        self.path = path
        if sha256 is None:
            self._hash = hashlib.sha256()
            self._file = open(path, "wb")
        else:
            self._hash = check_hash(path, size, sha256)
            self._file = open(path, "r+b")
            self._file.truncate(size)
            self._file.seek(size)

    @property
    def sha256(self) -> str:
        """Of all that was written."""
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)

    def checkpoint(self) -> None:
        """Put everything on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file and leave it where it is."""
        # What a full disk did not take is lost in any case: who goes on starts from what a checkpoint put on the disk.
        with contextlib.suppress(OSError):
            self._file.close()

    def discard(self) -> None:
        """Remove the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def check_hash(file: Path, size: int, sha256: str) -> Any:
    """The running hash of a file's first `size` bytes, to go on with.

    Raises LandmarkError where these are not the bytes that were written there, of which `sha256` is the hash.
    """
    hashed = hash_file(file, size)
    if hashed.hexdigest() != sha256:
        raise LandmarkError(f"{file} is not what had been written to it")
    return hashed
