"""Documents -> token files: read, encode and write at the same time, and go on after an interruption.

One thread reads batches of text ahead, one encodes (with as many threads as the tokenizer uses), the caller's writes.
Documents that this program makes come from processes beside this one where there is much to make (workers.py).
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
from pathlib import Path
from typing import Any

import numpy as np

from landmark_cli.console import counted, info, progress, quantity, warn
from landmark_cli.data.corpora import Corpus
from landmark_cli.data.hashed_file import check_hash
from landmark_cli.data.left_out import LeftOut
from landmark_cli.data.merge import GO_ON, Process, merge
from landmark_cli.data.place import Place
from landmark_cli.data.prefetch import prefetched
from landmark_cli.data.sources import SPLITS
from landmark_cli.data.text_batches import Batch, Encoded, encoded, or_skip, taken, text_batches
from landmark_cli.data.text_tokenizer import TextTokenizer
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_metadata import TokenFileMetadata, read_metadata, remove_token_file
from landmark_cli.data.token_file_writer import TokenFileWriter, Written
from landmark_cli.data.workers import made_by, started
from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import writing
from landmark_cli.interrupts import Interrupts, interrupts
from landmark_cli.locks import LOCK, sole_writer

# Counts up when a version of this program gives other ids or places to the same source.
CONTENTS = 1
BATCH_DOCUMENTS = 4096
CHECKPOINT_SECONDS = 5.0
# What a run leaves that is not at its end yet.
UNFINISHED = "*.partial"


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
        Stopped: SIGTERM or SIGINT came; the place is noted, and the next run goes on there.
    """
    process = process or Process()
    made_from = _fingerprint(corpus, tokenizer)
    if finished := _finished(output, made_from, skip_bad_text):
        info(f"{output} holds token files made from this very source already; delete it to make them again")
        if left_out := finished["train"].left_out:
            warn(left_out.summary())
        if process.rank > 0:
            return {}
        if list(output.glob(UNFINISHED)):
            # A run was killed when its token files had their names already. What cannot be removed does no harm.
            with contextlib.suppress(LandmarkError, OSError), sole_writer(output):
                _remove_unfinished(output)
        return finished
    with contextlib.ExitStack() as held:
        if process.rank == 0:
            held.enter_context(sole_writer(output))
        if process.count > 1:
            # The processes of a second launch must keep their hands off the parts that this launch writes, whoever is
            # first.
            held.enter_context(sole_writer(output, f"{LOCK}{process.suffix}"))
        asked = held.enter_context(interrupts("noting the place"))
        held.enter_context(_disk_errors(output))
        part = held.enter_context(contextlib.closing(_Part(corpus, tokenizer, output, made_from, process)))
        part.run(skip_bad_text, asked)
        if process.rank > 0:
            return {}
        writers, left_out, documents = part.writers, part.left_out, part.next_document
        if process.count > 1:
            info(f"putting the parts of {counted(process.count, 'process')} together")
            writers, places = merge(output, made_from, process.count, part.new_writer, asked)
            documents = max(place.next_document for place in places)
            for place in places[1:]:
                for message in left_out.merge(place.left_out):
                    warn(f"left out {message}")
        if left_out:
            warn(left_out.summary())
        return _finish(writers, output, corpus, left_out, documents)


def finished_files(directory: Path) -> list[Path]:
    """The token files of a directory; none where it is not finished."""
    there = [directory / f"{split}.bin" for split in SPLITS if (directory / f"{split}.json").exists()]
    return there if directory / "train.bin" in there else []


def are_whole(directory: Path) -> bool:
    """Whether a directory has finished token files, without damage, whatever they were made from."""
    try:
        return bool([TokenFile.open(file, verify=True) for file in finished_files(directory)])
    except LandmarkError:
        return False


class _Part:
    """What one process prepares: all documents, or those whose turn is its own."""

    def __init__(
        self, corpus: Corpus, tokenizer: TextTokenizer, output: Path, made_from: str, process: Process
    ) -> None:
        self._corpus, self._tokenizer, self._output, self._process = corpus, tokenizer, output, process
        self._made_from = made_from
        self._state_file = process.state_file(output)
        self.writers: dict[str, TokenFileWriter] = {}
        self._turns: Any = None
        self._turns_hash: Any = hashlib.sha256()
        try:
            place = self._noted()
            self._resume(place)
        except LandmarkError as error:
            warn(f"{error}: preparing from the first document on")
            place = self._clean()
            self._resume(place)
        self.next_document, self.left_out = place.next_document, place.left_out
        self._read, self._whole = place.read, place.finished

    def new_writer(self, split: str, suffix: str = ".partial", resume: Written | None = None) -> TokenFileWriter:
        path = self._output / f"{split}.bin"
        return TokenFileWriter(
            path,
            self._tokenizer,
            source=self._corpus.source,
            made_from=self._made_from,
            resume=resume,
            partial_suffix=suffix,
            answers=self._corpus.has_answers,
        )

    def run(self, skip_bad_text: bool, asked: Interrupts) -> None:
        if self.left_out and not skip_bad_text:
            raise LandmarkError(or_skip(next(iter(self.left_out.files.values())).first))
        if self._whole:
            return
        if self.next_document:
            info(f"going on after the first {counted(self.next_document, 'document')}, which an earlier run prepared")
        total = self._corpus.total_bytes and self._corpus.total_bytes / self._process.count
        saved = time.monotonic()
        with (
            contextlib.closing(prefetched(self._encoded(total, skip_bad_text), 1)) as encoded,
            progress(f"preparing {self._corpus.name}", total, "B", initial=self._read) as shown,
        ):
            for batch, ids, marks in encoded:
                self._write(batch, ids, marks)
                documents = sum(writer.documents for writer in self.writers.values())
                tokens = sum(writer.tokens for writer in self.writers.values())
                shown.advance(batch.read, documents=documents, tokens=quantity(tokens))
                if batch.whole and (asked or time.monotonic() - saved > CHECKPOINT_SECONDS):
                    self._save()
                    saved = time.monotonic()
                if asked:
                    # In the middle of a document the place is the one that was noted last, a few seconds before.
                    raise asked.stopped(GO_ON)
        if self._process.count > 1:
            self._save(finished=True)

    def close(self) -> None:
        """Let go of the files; closing one that is finished changes nothing."""
        for file in [*self.writers.values(), *([self._turns] if self._turns else [])]:
            file.close()

    def _encoded(self, total: float | None, skip_bad_text: bool) -> Iterator[Encoded]:
        """What is left to write. total: bytes of all documents of this process."""
        first, left = self.next_document, int(total or 0) - self._read
        given = self._corpus, self._tokenizer, self._process, first
        with started(*given, left, skip_bad_text=skip_bad_text) as workers:
            if workers:
                yield from made_by(workers, self._process, first)
                return
        batches = text_batches(
            taken(self._corpus, self._process, first),
            piece_bytes=self._tokenizer.piece_bytes,
            batch_bytes=self._tokenizer.batch_bytes,
            batch_documents=BATCH_DOCUMENTS,
            skip_bad_text=skip_bad_text,
        )
        with contextlib.closing(prefetched(batches, 1)) as ahead:
            yield from encoded(ahead, self._tokenizer, marked=self._corpus.has_answers)

    def _write(self, batch: Batch, encoded: list[np.ndarray], marked: list[np.ndarray | None]) -> None:
        for bad in batch.bad:
            if self.left_out.add(bad):
                warn(f"left out {bad}")
        for piece, ids, marks, (split, ends) in zip(batch.pieces, encoded, marked, batch.places, strict=True):
            if split not in self.writers:
                self.writers[split] = self.new_writer(split, self._process.suffix)
            writer = self.writers[split]
            writer.append(ids, len(piece), marks)
            if ends:
                # A document without any text gets no end-of-text token either.
                length = writer.document_tokens + 1 if writer.document_tokens else 0
                if length:
                    writer.end_document()
                if self._turns:
                    data = np.array([SPLITS.index(split), length], dtype="<i8").tobytes()
                    self._turns.write(data)
                    self._turns_hash.update(data)
        self._read += batch.read
        self.next_document = batch.next_document or self.next_document

    def _save(self, finished: bool = False) -> None:
        """Put everything on the disk and note the place."""
        place = Place(self._made_from, finished, self.next_document, self._read, self.left_out)
        place.splits = {split: writer.checkpoint() for split, writer in self.writers.items()}
        if self._turns:
            self._turns.flush()
            os.fsync(self._turns.fileno())
            place.turns, place.turns_sha256 = self._turns.tell(), self._turns_hash.hexdigest()
        place.write_to(self._state_file)

    def _noted(self) -> Place:
        """Where an earlier run was, or the beginning where it prepared something else."""
        if not self._state_file.exists():
            return self._clean()
        place = Place.read_from(self._state_file)
        if place.made_from != self._made_from:
            info(f"{self._output} holds an unfinished preparation of another source or other settings: starting anew")
            return self._clean()
        return place

    def _clean(self) -> Place:
        """Remove what an earlier run left."""
        self.close()
        self.writers.clear()
        for file in self._output.glob(f"*{self._process.suffix}"):
            if not file.name.startswith(LOCK):
                file.unlink()
        return Place(self._made_from)

    def _resume(self, place: Place) -> None:
        """Open the files that an earlier run left, at that place. LandmarkError where the files are not what that run
        wrote."""
        for split, written in place.splits.items():
            self.writers[split] = self.new_writer(split, self._process.suffix, resume=written)
        if self._process.count > 1:
            file = self._process.turns_file(self._output)
            self._turns_hash = check_hash(file, place.turns, place.turns_sha256) if place.turns else hashlib.sha256()
            self._turns = open(file, "ab")
            self._turns.truncate(place.turns)
            self._turns.seek(place.turns)


def _finish(
    writers: dict[str, TokenFileWriter], output: Path, corpus: Corpus, left_out: LeftOut, documents: int
) -> dict[str, TokenFileMetadata]:
    """Give the token files their names: training text last, since that file's being there says that all are."""
    if "train" not in writers or not writers["train"].documents:
        others = any(writer.documents for writer in writers.values())
        for writer in writers.values():
            writer.discard()
        _remove_unfinished(output)
        why = _why_nothing(others, left_out, documents)
        raise LandmarkError(f"no text to train on in {corpus.source}: {why}")
    finished = {}
    for split in reversed(SPLITS):
        if split in writers and writers[split].documents:
            finished[split] = writers[split].finish(left_out if split == "train" and left_out else None)
        else:
            remove_token_file(output / split)
    _remove_unfinished(output)
    return {split: finished[split] for split in SPLITS if split in finished}


def _remove_unfinished(output: Path) -> None:
    """Remove the unfinished files of all processes."""
    for file in output.glob(UNFINISHED):
        file.unlink(missing_ok=True)


def _why_nothing(others: bool, left_out: LeftOut, documents: int) -> str:
    """Why no document is left for training. others: whether there are documents of other splits. documents: how many
    documents were looked at."""
    if left_out:
        good = (
            "what is good of it became text of other splits (see --validation-share)"
            if others
            else "none of it is good"
        )
        return f"{good}; the first that was left out: {next(iter(left_out.files.values())).first}"
    if others:
        return "all of it became validation text (see --validation-share)"
    if documents:
        return "its only document is empty" if documents == 1 else "all of its documents are empty"
    return "it holds no documents"


def _finished(output: Path, made_from: str, skip_bad_text: bool) -> dict[str, TokenFileMetadata] | None:
    """The token files in a directory, if they are whole, were made from the same, and skipped nothing or may skip."""
    files = finished_files(output)
    if not files:
        return None
    try:
        found = {file.stem: read_metadata(file) for file in files}
        if any(metadata.made_from != made_from for metadata in found.values()):
            return None
        if found["train"].left_out and not skip_bad_text:
            return None
        return {file.stem: TokenFile.open(file, verify=True).metadata for file in files}
    except LandmarkError as error:
        warn(f"making the token files again: {error}")
        return None


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """What the system says while token files are written; errors of reading have been put into words by whoever
    reads."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LandmarkError(
                f"{output} is on a disk that is full: make room and run the same command again to go on from there"
            ) from error
        with writing(output):
            raise


def _fingerprint(corpus: Corpus, tokenizer: TextTokenizer) -> str:
    """Tells whether two runs would write the same files."""
    made_from = [CONTENTS, corpus.identity, tokenizer.name, tokenizer.fingerprint, tokenizer.eot_id]
    made_from += ["answers"] * corpus.has_answers
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
