"""Documents -> token files: read, encode and write at the same time, and go on after an interruption.

One thread reads batches of text ahead, one encodes (with as many threads as the tokenizer uses), the caller's writes.
Every few seconds everything written is put on the disk and the place reached is noted, so that a run that was killed
goes on there. Several processes (torchrun, `accelerate launch`) take turns of a few documents each and write parts,
which the first one puts together: the token files are the same as one process's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from landmark_cli.console import info, progress, warn
from landmark_cli.data.corpora import SPLITS, Corpus
from landmark_cli.data.merge import Process, merge
from landmark_cli.data.prefetch import prefetched
from landmark_cli.data.readers import BadText
from landmark_cli.data.token_file import (
    FORMAT,
    TokenFile,
    TokenFileMetadata,
    TokenFileWriter,
    remove_token_file,
)
from landmark_cli.data.tokenizers import TextTokenizer
from landmark_cli.errors import LandmarkError
from landmark_cli.files import write_json
from landmark_cli.locks import LOCK, sole_writer

BATCH_DOCUMENTS = 4096
CHECKPOINT_SECONDS = 5.0


def prepare(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    output: Path,
    *,
    skip_bad_text: bool = False,
    process: Process | None = None,
) -> dict[str, TokenFileMetadata]:
    """Write a corpus's token files into a directory, or find that they are there already.

    Returns:
        The metadata by split; of processes other than the first, nothing.

    Raises:
        LandmarkError: a document is no text (unless those are skipped), there is no text to train on, the disk is
            full, or another process prepares into the same directory.
    """
    process = process or Process()
    made_from = _fingerprint(corpus, tokenizer)
    if finished := _finished(output, made_from):
        info(f"{output} holds token files made from this very source already; delete it to make them again")
        return finished if process.rank == 0 else {}
    with contextlib.ExitStack() as held:
        if process.rank == 0:
            held.enter_context(sole_writer(output))
        if process.count > 1:
            # The processes of a second launch must keep their hands off the parts of this one's, whoever is first.
            held.enter_context(sole_writer(output, f"{LOCK}{process.suffix}"))
        try:
            with contextlib.closing(_Part(corpus, tokenizer, output, made_from, process)) as part:
                part.run(skip_bad_text)
                if process.rank > 0:
                    return {}
                writers, skipped = part.writers, part.skipped
                if process.count > 1:
                    info(f"putting the parts of {process.count} processes together")
                    writers, skipped = merge(output, made_from, process.count, part.new_writer)
                    for message in skipped[len(part.skipped) :]:
                        warn(f"left out {message}")
                if skipped:
                    warn(f"{len(skipped)} documents were left out because they are no text")
                return _finish(writers, output, corpus)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise LandmarkError(
                f"{output} is on a disk that is full: make room and run the same command again to go on from there"
            ) from error


@dataclass
class _Batch:
    """Text to encode together: pieces of documents in order."""

    pieces: list[bytes] = field(default_factory=list)
    places: list[tuple[str, bool]] = field(default_factory=list)  # a piece's split; whether its document ends
    text_bytes: int = 0
    read: int = 0  # bytes its documents take where they are stored
    next_document: int = 0
    whole: bool = True  # no document goes on in the next batch
    skipped: list[str] = field(default_factory=list)

    def add(self, piece: bytes, split: str, ends: bool) -> None:
        self.pieces.append(piece)
        self.places.append((split, ends))
        self.text_bytes += len(piece)


class _Part:
    """What one process prepares: all documents, or those whose turn is its own."""

    def __init__(
        self, corpus: Corpus, tokenizer: TextTokenizer, output: Path, made_from: str, process: Process
    ) -> None:
        self._corpus, self._tokenizer, self._output, self._process = corpus, tokenizer, output, process
        self._made_from = made_from
        self.writers: dict[str, TokenFileWriter] = {}
        self._turns: Any = None
        state = self._load()
        try:
            self._resume(state)
        except (OSError, LandmarkError):
            # What was noted is not there any more.
            state = self._clean()
            self._resume(state)
        self._next_document: int = state["next_document"]
        self._read: int = state["read"]
        self.skipped: list[str] = state["skipped"]
        self._whole: bool = state["finished"]

    def new_writer(self, split: str, suffix: str = ".partial", resume: dict[str, int] | None = None) -> TokenFileWriter:
        path = self._output / f"{split}.bin"
        source, made_from = self._corpus.source, self._made_from
        return TokenFileWriter(
            path, self._tokenizer, source=source, made_from=made_from, resume=resume, partial_suffix=suffix
        )

    def run(self, skip_bad_text: bool) -> None:
        if self._whole:
            return
        if self._next_document:
            info(f"going on after the first {self._next_document} documents, which an earlier run prepared")
        total = self._corpus.total_bytes and self._corpus.total_bytes / self._process.count
        saved = time.monotonic()
        with (
            contextlib.closing(prefetched(self._encoded(skip_bad_text), 1)) as encoded,
            progress(f"preparing {self._corpus.name}", total, "B", initial=self._read) as shown,
        ):
            for batch, ids in encoded:
                self._write(batch, ids)
                documents = sum(writer.documents for writer in self.writers.values())
                tokens = sum(writer.tokens for writer in self.writers.values())
                shown.advance(batch.read, documents=documents, tokens=f"{tokens / 1e6:.1f}M")
                if batch.whole and time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self._save()
                    saved = time.monotonic()
        if self._process.count > 1:
            self._save(finished=True)

    def close(self) -> None:
        """Let go of its files; those that are finished do not mind."""
        for file in [*self.writers.values(), *([self._turns] if self._turns else [])]:
            file.close()

    def _encoded(self, skip_bad_text: bool) -> Iterator[tuple[_Batch, list[np.ndarray]]]:
        with contextlib.closing(prefetched(self._batches(skip_bad_text), 1)) as batches:
            for batch in batches:
                yield batch, self._tokenizer.encode_documents(batch.pieces)

    def _batches(self, skip_bad_text: bool) -> Iterator[_Batch]:
        piece_limit, limit = self._tokenizer.piece_bytes, self._tokenizer.batch_bytes
        batch = _Batch()
        for number, (split, document) in enumerate(self._corpus.documents()):
            if number < self._next_document or not self._process.takes(number):
                continue
            last, counted = b"", 0
            try:
                for count, piece in enumerate(document.pieces(piece_limit)):
                    if count:
                        batch.add(last, split, ends=False)
                        batch.read += len(last)
                        counted += len(last)
                        batch.whole = False
                        if batch.text_bytes >= limit:
                            yield batch
                            batch = _Batch()
                    last = piece
            except BadText as bad:
                if not skip_bad_text:
                    raise LandmarkError(f"{bad}; --on-bad-text skip leaves such documents out") from None
                batch.skipped.append(str(bad))
            batch.add(last, split, ends=True)
            batch.read += document.size - counted
            batch.next_document, batch.whole = number + 1, True
            if batch.text_bytes >= limit or len(batch.pieces) >= BATCH_DOCUMENTS:
                yield batch
                batch = _Batch()
        yield batch

    def _write(self, batch: _Batch, encoded: list[np.ndarray]) -> None:
        for message in batch.skipped:
            warn(f"left out {message}")
        self.skipped += batch.skipped
        for piece, ids, (split, ends) in zip(batch.pieces, encoded, batch.places, strict=True):
            if split not in self.writers:
                self.writers[split] = self.new_writer(split, self._process.suffix)
            writer = self.writers[split]
            writer.append(ids, text_bytes=len(piece))
            if ends:
                # A document without any text gets no end-of-text token either.
                length = writer.document_tokens + 1 if writer.document_tokens else 0
                if length:
                    writer.end_document()
                if self._turns:
                    self._turns.write(np.array([SPLITS.index(split), length], dtype="<i8").tobytes())
        self._read += batch.read
        self._next_document = batch.next_document or self._next_document

    def _save(self, finished: bool = False) -> None:
        """Put everything on the disk and note the place."""
        state = {
            "made_from": self._made_from,
            "finished": finished,
            "next_document": self._next_document,
            "read": self._read,
            "skipped": self.skipped,
            "splits": {split: writer.checkpoint() for split, writer in self.writers.items()},
            "turns": 0,
        }
        if self._turns:
            self._turns.flush()
            os.fsync(self._turns.fileno())
            state["turns"] = self._turns.tell()
        write_json(self._process.state_file(self._output), state)

    def _load(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(self._process.state_file(self._output).read_text(encoding="utf-8"))
            if state["made_from"] == self._made_from:
                return state
        return self._clean()

    def _clean(self) -> dict[str, Any]:
        """Remove what an earlier run of another kind left."""
        self.close()
        self.writers.clear()
        for file in self._output.glob(f"*{self._process.suffix}"):
            if not file.name.startswith(LOCK):
                file.unlink()
        return {"finished": False, "next_document": 0, "read": 0, "skipped": [], "splits": {}, "turns": 0}

    def _resume(self, state: dict[str, Any]) -> None:
        for split, written in state["splits"].items():
            self.writers[split] = self.new_writer(split, self._process.suffix, resume=written)
        if self._process.count > 1:
            self._turns = open(self._process.turns_file(self._output), "ab")
            self._turns.truncate(state["turns"])
            self._turns.seek(state["turns"])


def _finish(writers: dict[str, TokenFileWriter], output: Path, corpus: Corpus) -> dict[str, TokenFileMetadata]:
    """Give the token files their names: training text last, since its file stands for all of them."""
    if "train" not in writers or not writers["train"].documents:
        for writer in writers.values():
            writer.discard()
        for file in output.glob("*.partial"):
            file.unlink(missing_ok=True)
        raise LandmarkError(
            f"no text to train on in {corpus.source}: "
            + ("all of it became validation text (see --validation-share)" if writers else "it holds no documents")
        )
    finished = {}
    for split in reversed(SPLITS):
        if split in writers and writers[split].documents:
            finished[split] = writers[split].finish()
        else:
            remove_token_file(output / split)
    for file in output.glob("*.partial"):
        file.unlink(missing_ok=True)
    return {split: finished[split] for split in SPLITS if split in finished}


def _finished(output: Path, made_from: str) -> dict[str, TokenFileMetadata] | None:
    """The token files in a directory, if they are whole and were made from the same."""
    with contextlib.suppress(LandmarkError):
        there = [split for split in SPLITS if (output / f"{split}.json").exists()]
        found = {split: TokenFile.open(output / f"{split}.bin").metadata for split in there}
        if "train" in found and all(metadata.made_from == made_from for metadata in found.values()):
            return found
    return None


def _fingerprint(corpus: Corpus, tokenizer: TextTokenizer) -> str:
    """Tells whether two runs would write the same files."""
    made_from = [FORMAT, corpus.identity, tokenizer.name, tokenizer.fingerprint, tokenizer.eot_id]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
