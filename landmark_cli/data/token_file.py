"""Token files: the ids of a corpus in one memory-mapped file, with what is needed to trust and use them.

`train.bin` holds the ids, little-endian uint16 or uint32, every document followed by the end-of-text token, and
`train.json` beside it the metadata. Where the documents have answers, `train.loss.bin` holds a uint8 for each token: 1
for one of an answer, else 0. The metadata comes last: a token file without it is an unfinished one.

Nothing that was truncated or changed since is taken for whole. Sizes and the metadata's own checksum are checked
whenever a file is opened. The contents of a file that is small, or was written to since (by a copy, for instance), are
checked against their sha256 at the same time; those of a large file that nobody wrote to only when `landmark prepare`
is run on it again.

Up to format 2 `train.offsets` stood there too, with the place of every document, which nothing ever read. Token files
of those formats open as they are, with that file or without it.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from landmark_cli.data.hashed_file import HashedFile
from landmark_cli.data.left_out import LeftOut
from landmark_cli.errors import LandmarkError
from landmark_cli.file_reading import hash_file, read_sealed
from landmark_cli.file_writing import write_sealed

FORMAT = 3
UNSEALED = {"format": 1}
"""What metadata without a checksum, of an earlier version, says of itself."""
# Files up to this size take a fraction of a second to read and hash.
ALWAYS_CHECKED_BYTES = 64 << 20


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


@dataclass
class Written:
    """How much of a token file was on the disk at a checkpoint, and its sha256 up to there; of answers, how many of the
    tokens are of some, and the sha256 of the file that says which, where there is one."""

    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    sha256: str = ""
    answers: int = 0
    answers_sha256: str = ""


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
        path = _with_ending(Path(path))
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


class TokenFileWriter:
    """Writes a token file; nothing stands under its final name before it is whole.

        with TokenFileWriter("data/mine/train.bin", tokenizer, source="my texts") as writer:
            writer.add_document(ids)

    Leaving the block in order finishes the file; leaving it by an error removes what was written. Long work calls
    `checkpoint` now and then and, instead of the block, `finish` or `close`; a later writer takes the returned state
    as `resume` and goes on there.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Any,
        *,
        source: str,
        made_from: str = "",
        resume: Written | None = None,
        partial_suffix: str = ".partial",
        answers: bool = False,
    ) -> None:
        """Start a file, or go on with the one that `checkpoint` left in the state `resume`.

        tokenizer: a `TextTokenizer`, whose name, size and end of text the file is for. answers: whether to write which
        tokens are of answers, too.

        Raises:
            LandmarkError: what a checkpoint left is shorter or not what was written.
        """
        self.path = _with_ending(Path(path))
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._tokenizer = tokenizer
        self._source, self._made_from = source, made_from
        state = resume or Written()
        self.tokens, self.documents, self.text_bytes = state.tokens, state.documents, state.text_bytes
        self.answers, self._ends_with_answer = state.answers, False
        self._document_start = self.tokens
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + partial_suffix)
        self._ids = HashedFile(partial, self.tokens * self.dtype.itemsize, state.sha256 if resume else None)
        self._marks = None
        if answers:
            beside = answers_path(self.path)
            partial = beside.with_name(beside.name + partial_suffix)
            self._marks = HashedFile(partial, self.tokens, state.answers_sha256 if resume else None)

    def __enter__(self) -> TokenFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    @property
    def _files(self) -> list[HashedFile]:
        return [self._ids] if self._marks is None else [self._ids, self._marks]

    def append(self, ids: np.ndarray, text_bytes: int = 0, marks: np.ndarray | None = None) -> None:
        """Write ids of the document under way. marks: which are of answers, by 1 and 0; None where none is.

        Raises:
            ValueError: an id is not of the tokenizer.
        """
        if len(ids) and int(ids.max()) >= self._tokenizer.vocab_size:
            raise ValueError(f"ids must be below the vocabulary's {self._tokenizer.vocab_size}, found {ids.max()}")
        self._ids.write(np.asarray(ids, dtype=self.dtype).tobytes())
        if self._marks is not None:
            marks = np.zeros(len(ids), dtype=np.uint8) if marks is None else marks
            self._marks.write(np.asarray(marks, dtype=np.uint8).tobytes())
            self.answers += int(np.count_nonzero(marks))
            self._ends_with_answer = bool(marks[-1]) if len(marks) else self._ends_with_answer
        self.tokens += len(ids)
        self.text_bytes += text_bytes

    def end_document(self) -> None:
        """Write the end-of-text token after the document under way. Behind an answer it is of the answer, so that a
        model learns where to end."""
        self.append(np.array([self._tokenizer.eot_id]), marks=np.array([self._ends_with_answer]))
        self._ends_with_answer = False
        self._document_start = self.tokens
        self.documents += 1

    @property
    def document_tokens(self) -> int:
        """Ids of the document under way so far."""
        return self.tokens - self._document_start

    def add_document(self, ids: np.ndarray, text_bytes: int = 0, marks: np.ndarray | None = None) -> None:
        """Write a whole document and its end-of-text token. Arguments: as `append` takes them."""
        self.append(ids, text_bytes, marks)
        self.end_document()

    def checkpoint(self) -> Written:
        """Put everything on the disk and return the state to `resume` from. Call it between documents only."""
        for file in self._files:
            file.checkpoint()
        marked = (self.answers, self._marks.sha256) if self._marks else ()
        return Written(self.tokens, self.documents, self.text_bytes, self._ids.sha256, *marked)

    def close(self) -> None:
        """Let go of the unfinished file and leave it where it is."""
        for file in self._files:
            file.close()

    def discard(self) -> None:
        """Remove the unfinished file."""
        for file in self._files:
            file.discard()

    def finish(self, left_out: LeftOut | None = None) -> TokenFileMetadata:
        """Give the file its name, then write its metadata. What stood there before is replaced."""
        self.checkpoint()
        self.close()
        _metadata_path(self.path).unlink(missing_ok=True)
        os.replace(self._ids.path, self.path)
        _offsets_path(self.path).unlink(missing_ok=True)
        beside, answers = answers_path(self.path), None
        if self._marks is None:
            beside.unlink(missing_ok=True)
        else:
            os.replace(self._marks.path, beside)
            answers = Answers(self.answers, self._marks.sha256, beside.stat().st_mtime_ns)
        metadata = TokenFileMetadata(
            tokenizer=self._tokenizer.name,
            tokenizer_fingerprint=self._tokenizer.fingerprint,
            vocab_size=self._tokenizer.vocab_size,
            eot_id=self._tokenizer.eot_id,
            tokens=self.tokens,
            documents=self.documents,
            text_bytes=self.text_bytes,
            dtype=self.dtype.name,
            sha256=self._ids.sha256,
            source=self._source,
            made_from=self._made_from,
            modified_ns=[self.path.stat().st_mtime_ns],
            left_out=left_out,
            answers=answers,
        )
        _write_metadata(self.path, metadata)
        return metadata


def read_metadata(path: str | Path) -> TokenFileMetadata:
    """What a token file says of itself, without looking at its ids.

    Raises:
        LandmarkError: there is no such file, it was never finished, or its metadata cannot be read.
    """
    path = _with_ending(Path(path))
    described = _metadata_path(path)
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


def remove_token_file(path: str | Path) -> None:
    """Delete a token file and what stands beside it, metadata first. Nothing happens where there is none."""
    path = _with_ending(Path(path))
    for file in (_metadata_path(path), path, _offsets_path(path), answers_path(path)):
        file.unlink(missing_ok=True)


def find_corpus(data_root: str | Path = "data") -> Path:
    """The directory under `data_root` whose `train` token file was finished last.

    Raises:
        LandmarkError: no directory has such a file.
    """
    finished = [file for file in Path(data_root).glob("*/train.bin") if _metadata_path(file).exists()]
    if not finished:
        raise LandmarkError(f"no prepared corpus under {data_root}/: run `landmark prepare` first, or name one")
    return max(finished, key=lambda file: file.stat().st_mtime_ns).parent


def _with_ending(path: Path) -> Path:
    return path if path.suffix == ".bin" else path.with_name(path.name + ".bin")


def answers_path(path: Path) -> Path:
    """The file beside a token file that says which tokens are of answers."""
    return path.with_suffix(".loss.bin")


def _offsets_path(path: Path) -> Path:
    """What stands beside a token file of format 1 or 2."""
    return path.with_suffix(".offsets")


def _metadata_path(path: Path) -> Path:
    return path.with_suffix(".json")


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
        _write_metadata(path, dataclasses.replace(metadata, format=FORMAT))
    except OSError:
        return


def _write_metadata(path: Path, metadata: TokenFileMetadata) -> None:
    content = dataclasses.asdict(metadata)
    if metadata.answers is None:
        # As metadata was before there were answers.
        del content["answers"]
    write_sealed(_metadata_path(path), content)
