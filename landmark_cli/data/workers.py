"""Documents that this program makes, made and encoded in several processes beside this one: the same batches in the
same order as one process's, whatever their number.

Workers take turns of a few documents each, as processes of a launch do (see merge.py), and this process reads what they
write in that order. Each is a fresh interpreter that imports neither torch nor transformers, since a fork of a process
that has threads and a GPU may hang or crash. A worker waits where nobody reads what it has made, so little is ever held
in memory, and ends when this process does. Where workers cannot begin, documents are made without them.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, groupby
from typing import TYPE_CHECKING, Any, BinaryIO

from landmark_cli.console import warn
from landmark_cli.cores import available_cores, processes_here
from landmark_cli.data.merge import TURN, Process
from landmark_cli.data.prefetch import prefetched
from landmark_cli.data.text_batches import Encoded, encoded, taken, text_batches
from landmark_cli.data.text_tokenizer import tokenizer_fingerprint
from landmark_cli.errors import LandmarkError
from landmark_cli.file_errors import reason

if TYPE_CHECKING:
    from landmark_cli.data.corpora import Corpus
    from landmark_cli.data.text_tokenizer import TextTokenizer

MOST = 16
LEAST_BYTES = 4 << 20
"""Of text for each worker: two seconds of work, of which half a second is what a worker takes to begin."""
MOST_HANDED = 1 << 29
"""Bytes of corpus and tokenizer that all workers together are handed, each of which holds them in memory."""
BATCH_BYTES = 1 << 20
BATCHES_AHEAD = 2
# Whoever stops the work may stop all its processes: it is for the first of them to say what becomes of it.
CHILD = """
import pickle, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
sys.path[:] = pickle.load(sys.stdin.buffer)
from landmark_cli.data.workers import serve
serve()
"""
THREADS = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Share:
    """What one worker is to do: the documents from number `first` on whose turn is its own. process: it is one of as
    many as there are workers of all processes together. skip_bad_text: see `text_batches`."""

    process: Process
    first: int
    skip_bad_text: bool


def how_many(corpus: Corpus, left: int) -> int:
    """How many workers are worth their start. left: bytes of the documents that are to be made. 0 where the documents
    are made faster here."""
    if not corpus.is_made:
        return 0
    workers = min(available_cores(), MOST, left // LEAST_BYTES)
    return workers if workers > 1 else 0


def handed(corpus: Corpus, tokenizer: TextTokenizer, workers: int) -> tuple[bytes, int]:
    """What workers are given to make documents of, and how many of them it can be given to: 0 where it cannot be handed
    to another process."""
    if not workers:
        return b"", 0
    try:
        data = pickle.dumps((corpus, tokenizer))
    except Exception:
        # Of tokenizers that have Python in them, each fails in a way of its own.
        return b"", 0
    workers = min(workers, MOST_HANDED // len(data))
    return (data, workers) if workers > 1 else (b"", 0)


@contextlib.contextmanager
def started(
    corpus: Corpus, tokenizer: TextTokenizer, process: Process, first: int, left: int, *, skip_bad_text: bool
) -> Iterator[list[_Worker]]:
    """Workers that make the documents from number `first` on that are for this process, and end with the block. None
    where they are not worth their start (left: see `how_many`) or cannot begin, of which the user is told."""
    data, workers = handed(corpus, tokenizer, how_many(corpus, left))
    begun: list[_Worker] = []
    try:
        try:
            environment = _environment(workers)
            for _ in range(workers):
                begun.append(_Worker(environment))
            for number, worker in enumerate(begun):
                part = Process(process.rank + process.count * number, process.count * workers)
                worker.begin(Share(part, first, skip_bad_text), data)
            for worker in begun:
                worker.check(tokenizer)
        except _CannotBegin as error:
            _close(begun)
            begun.clear()
            warn(f"this process alone makes the documents, one after the other: {error}")
        yield begun
    finally:
        _close(begun)


def made_by(workers: list[_Worker], process: Process, first: int) -> Iterator[Encoded]:
    """What the workers make, in the order of the documents. process, first: as of `started`.

    Raises LandmarkError where a worker does, in the place of the document that it could not make, or where one ends
    before its work.
    """
    turn = first // TURN
    while not process.takes(turn * TURN):
        turn += 1
    for number in count(turn // process.count):
        for kind, value in workers[number % len(workers)].turn():
            if kind == "end":
                return
            yield value


class _CannotBegin(Exception):
    """Why a worker does not do what it is for."""


class _Worker:
    """A process that has been started, and waits for its share. environment: all of it."""

    def __init__(self, environment: dict[str, str]) -> None:
        try:
            # In a session of its own: a terminal's Ctrl-C is for us.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
            )
        except OSError as error:
            raise _CannotBegin(f"none could be started beside it ({reason(error)})") from None

    def begin(self, share: Share, data: bytes) -> None:
        # One that has ended is noticed when it is to be read from.
        with contextlib.suppress(OSError), self._process.stdin as to:
            for part in (pickle.dumps([str(path) for path in sys.path]), pickle.dumps(share), data):
                to.write(part)

    def check(self, tokenizer: TextTokenizer) -> None:
        """Wait until it has begun. Raises _CannotBegin where it does not, or reads text otherwise than we do."""
        kind, value = self._hear()
        if kind == "ended":
            raise _CannotBegin(f"one beside it ended at once ({value})")
        if kind != "begun":
            raise _CannotBegin(f"one beside it cannot read what it is handed ({str(value).strip().splitlines()[-1]})")
        if value != tokenizer.fingerprint:
            raise _CannotBegin(f"the tokenizer {tokenizer.name} gives other ids in one beside it")

    def turn(self) -> Iterator[tuple[str, Any]]:
        """What comes until its turn is over: ("made", a batch), or ("end", None) where it has no turns any more."""
        while True:
            kind, value = self._hear()
            if kind == "ended":
                raise LandmarkError(
                    f"a process that makes documents ended in the middle of it ({value}), as it does where memory is "
                    "short; run the same command again to go on from the place that was noted last"
                )
            if kind == "failed":
                raise value
            if kind == "broken":
                raise RuntimeError(f"in a process that makes documents:\n{value}")
            if kind == "turn":
                return
            yield kind, value

    def _hear(self) -> tuple[str, Any]:
        """What it says next: ("ended", how) where it says nothing any more."""
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            code = self._process.wait()
            return "ended", f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


def _close(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.close()


def _environment(workers: int) -> dict[str, str]:
    """Of workers: one thread each, since there are as many of them as cores."""
    own = {"TOKENIZERS_PARALLELISM": "false", "LOCAL_WORLD_SIZE": str(processes_here() * workers)}
    return os.environ | own | dict.fromkeys(THREADS, "1")


def serve() -> None:
    """What a worker does: read its share, the corpus and the tokenizer from standard input, write what comes of them to
    standard output."""
    to = os.fdopen(os.dup(1), "wb")
    # What else is printed goes where messages go.
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):
        try:
            share = pickle.load(sys.stdin.buffer)
            corpus, tokenizer = pickle.load(sys.stdin.buffer)
            _say(to, "begun", tokenizer_fingerprint(tokenizer.encode))
            with contextlib.closing(prefetched(_turns(corpus, tokenizer, share), BATCHES_AHEAD)) as turns:
                for made in turns:
                    _say(to, *(("made", made) if made else ("turn",)))
            _say(to, "end")
        except BrokenPipeError:
            raise
        except LandmarkError as error:
            _say(to, "failed", error)
        except BaseException:
            _say(to, "broken", traceback.format_exc())
    # Nothing is left to do, and a pipe whose reader has gone cannot be flushed.
    os._exit(0)


def _say(to: BinaryIO, kind: str, value: Any = None) -> None:
    pickle.dump((kind, value), to)
    to.flush()


def _turns(corpus: Corpus, tokenizer: TextTokenizer, share: Share) -> Iterator[Encoded | None]:
    """A worker's documents in batches, with None behind each turn."""
    documents = taken(corpus, share.process, share.first)
    for _, turn in groupby(documents, lambda document: document[0] // TURN):
        batches = text_batches(
            turn,
            piece_bytes=tokenizer.piece_bytes,
            batch_bytes=BATCH_BYTES,
            batch_documents=TURN,
            skip_bad_text=share.skip_bad_text,
        )
        yield from encoded((batch for batch in batches if batch.places), tokenizer, marked=corpus.has_answers)
        yield None
