"""Token files written, document by document, over several runs of the program if need be."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from landmark_cli.data.hashed_file import HashedFile
from landmark_cli.data.left_out import LeftOut
from landmark_cli.data.token_file_metadata import (
    Answers,
    TokenFileMetadata,
    answers_path,
    metadata_path,
    offsets_path,
    with_ending,
    write_metadata,
)


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
        self.path = with_ending(Path(path))
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
        metadata_path(self.path).unlink(missing_ok=True)
        os.replace(self._ids.path, self.path)
        offsets_path(self.path).unlink(missing_ok=True)
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
        write_metadata(self.path, metadata)
        return metadata
