"""What stands beside the ids of a token file, and what the metadata there say of it.

`train.bin` holds the ids, little-endian uint16 or uint32, every document followed by the end-of-text token, and
`train.json` beside it the metadata. Where the documents have answers, `train.loss.bin` holds a uint8 for each token: 1
for one of an answer, else 0. The metadata comes last: a token file without it is an unfinished one.

Up to format 2 `train.offsets` stood there too, with the place of every document, which nothing ever read. Token files
of those formats open as they are, with that file or without it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from landmark_cli.data.left_out import LeftOut
from landmark_cli.errors import LandmarkError
from landmark_cli.file_reading import read_sealed
from landmark_cli.file_writing import write_sealed

FORMAT = 3
UNSEALED = {"format": 1}
"""What metadata without a checksum, of an earlier version, says of itself."""


@dataclass(frozen=True)
class Answers:
    """What a token file's metadata says of its answers.

    Attributes:
        tokens: how many are of an answer.
        sha256: of the file that says which.
        modified_ns: when that file was last written, in the file system's nanoseconds.
    """

    tokens: int
    sha256: str
    modified_ns: int


@dataclass(frozen=True)
class TokenFileMetadata:
    """What `<name>.json` says of a token file.

    Attributes:
        tokenizer: name, directory or hub id of the tokenizer that made the ids.
        tokenizer_fingerprint: see `text_tokenizer.tokenizer_fingerprint`.
        vocab_size: ids are below this.
        eot_id: the token after every document.
        tokens: how many, end-of-text tokens included.
        documents: how many.
        text_bytes: size of the text in UTF-8.
        dtype: "uint16" or "uint32".
        sha256: of the file with the ids.
        source: where the text came from, in words.
        made_from: fingerprint of all that the file was made from; empty if nobody needs it.
        modified_ns: when the file with the ids was last written, in the file system's nanoseconds, as a list of one;
            up to format 2, the time of a second file follows.
        left_out: what the preparation left out, of all splits, since it is no text; noted in `train.json`.
        answers: of the file that says which tokens are of answers; None where there is none.
    """

    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    eot_id: int
    tokens: int
    documents: int
    text_bytes: int
    dtype: Literal["uint16", "uint32"]
    sha256: str
    source: str
    made_from: str
    modified_ns: list[int]
    format: int = FORMAT
    left_out: LeftOut | None = None
    answers: Answers | None = None


def read_metadata(path: str | Path) -> TokenFileMetadata:
    """What a token file says of itself, without looking at its ids.

    Raises:
        LandmarkError: there is no such file, it was never finished, or its metadata cannot be read.
    """
    path = with_ending(Path(path))
    described = metadata_path(path)
    if not described.exists():
        if path.exists():
            found = f"{path} has no {described.name} beside it: it was not finished, or is not a token file"
        else:
            found = f"there is no token file {path}"
        raise LandmarkError(f"{found}; make one with: landmark prepare")
    metadata = read_sealed(TokenFileMetadata, described, unsealed=UNSEALED, to_do="prepare the corpus again")
    if (
        metadata.format not in range(UNSEALED["format"], FORMAT + 1)
        or min(metadata.tokens, metadata.documents, metadata.vocab_size) < 0
    ):
        raise LandmarkError(f"{described} is not of a kind that this version reads: prepare the corpus again")
    return metadata


def write_metadata(path: Path, metadata: TokenFileMetadata) -> None:
    content = dataclasses.asdict(metadata)
    if metadata.answers is None:
        # As metadata was before there were answers.
        del content["answers"]
    write_sealed(metadata_path(path), content)


def remove_token_file(path: str | Path) -> None:
    """Delete a token file and what stands beside it, metadata first. Nothing happens where there is none."""
    path = with_ending(Path(path))
    for file in (metadata_path(path), path, offsets_path(path), answers_path(path)):
        file.unlink(missing_ok=True)


def with_ending(path: Path) -> Path:
    return path if path.suffix == ".bin" else path.with_name(path.name + ".bin")


def answers_path(path: Path) -> Path:
    """The file beside a token file that says which tokens are of answers."""
    return path.with_suffix(".loss.bin")


def offsets_path(path: Path) -> Path:
    """What stands beside a token file of format 1 or 2."""
    return path.with_suffix(".offsets")


def metadata_path(path: Path) -> Path:
    return path.with_suffix(".json")
