"""Token files opened: the ids of a corpus, memory-mapped.

Nothing that was truncated or changed since is taken for whole. Sizes and the metadata's own checksum are checked
whenever a file is opened. The contents of a file that is small, or was written to since (by a copy, for instance), are
checked against their sha256 at the same time; those of a large file that nobody wrote to only when `landmark prepare`
is run on it again. token_file_metadata.py says which files there are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from landmark_cli.data.token_file_metadata import (
    FORMAT,
    TokenFileMetadata,
    answers_path,
    metadata_path,
    read_metadata,
    with_ending,
    write_metadata,
)
from landmark_cli.errors import LandmarkError
from landmark_cli.file_reading import hash_file

# Files up to this size take a fraction of a second to read and hash.
ALWAYS_CHECKED_BYTES = 64 << 20


@dataclass(frozen=True)
class TokenFile:
    """A token file opened for reading.

    Attributes:
        path: of the ids (`.bin`).
        tokens: (tokens,) uint16 or uint32, memory-mapped.
        metadata: what the file says of itself.
        answers: (tokens,) uint8, memory-mapped: 1 for tokens of answers, else 0. None where nothing says which are.
    """

    path: Path
    tokens: np.ndarray
    metadata: TokenFileMetadata
    answers: np.ndarray | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file as this one does, and takes its contents as checked."""
        return TokenFile._mapped, (self.path, self.metadata)

    @classmethod
    def _mapped(cls, path: Path, metadata: TokenFileMetadata) -> TokenFile:
        marks = None if metadata.answers is None else map_values(answers_path(path), "uint8", metadata.tokens)
        return cls(path, map_values(path, metadata.dtype, metadata.tokens), metadata, marks)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> TokenFile:
        """Open `<name>.bin` (the ending may be left out) and check that it is the file that was written.

        verify: check the contents of a large file even if it was not written to since.

        Raises:
            LandmarkError: the file is missing, unfinished, truncated, or was changed.
        """
        if Path(path).is_dir():
            raise LandmarkError(f"{path} is a directory, not a token file: name one in it, such as {path}/train.bin")
        path = with_ending(Path(path))
        metadata = read_metadata(path)
        size = metadata.tokens * np.dtype(metadata.dtype).itemsize
        written = _checked(path, size, metadata.sha256, metadata.modified_ns[:1], verify)
        found = dataclasses.replace(metadata, modified_ns=[written])
        answers = metadata.answers
        if answers is not None:
            beside = answers_path(path)
            written = _checked(beside, metadata.tokens, answers.sha256, [answers.modified_ns], verify)
            found = dataclasses.replace(found, answers=dataclasses.replace(answers, modified_ns=written))
        if (found.modified_ns, found.answers) != (metadata.modified_ns[:1], answers):
            _remember_modified(path, found)
        return cls._mapped(path, metadata)


def newest_corpus(data_root: Path) -> Path:
    """The directory under `data_root` whose `train` token file was finished last.

    Raises:
        LandmarkError: no directory has such a file.
    """
    finished = [file for file in data_root.glob("*/train.bin") if metadata_path(file).exists()]
    if not finished:
        raise LandmarkError(f"no prepared corpus under {data_root}/: run `landmark prepare` first, or name one")
    return max(finished, key=lambda file: file.stat().st_mtime_ns).parent


def map_values(path: Path, dtype: str, length: int) -> np.ndarray:
    """A file of `length` little-endian numbers, memory-mapped for reading."""
    little_endian = np.dtype(dtype).newbyteorder("<")
    if length == 0:
        return np.zeros(0, dtype=little_endian)
    return np.memmap(path, dtype=little_endian, mode="r", shape=(length,))


def _checked(path: Path, size: int, sha256: str, modified_ns: list[int], verify: bool) -> int:
    """Check a file, its contents only where that is wanted, cheap, or due since it was written to; returns when it was
    written last. modified_ns: when its contents were last known to be right."""
    _check_size(path, size)
    written = path.stat().st_mtime_ns
    if verify or [written] != modified_ns or size <= ALWAYS_CHECKED_BYTES:
        if hash_file(path).hexdigest() != sha256:
            raise _changed(path, "its contents are not those that were written")
    return written


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise _changed(path, "it is missing") from None
    if size != expected:
        raise _changed(path, f"it has {size} bytes instead of {expected}")


def _changed(path: Path, what: str) -> LandmarkError:
    return LandmarkError(f"{path} was truncated or changed after it was prepared: {what}; prepare the corpus again")


def _remember_modified(path: Path, metadata: TokenFileMetadata) -> None:
    """Note that the contents were found right as of now, so that the next opening is cheap. Errors are passed over."""
    try:
        write_metadata(path, dataclasses.replace(metadata, format=FORMAT))
    except OSError:
        return
