"""The engine: one reader whose rows are requests, each at its own pace, in a thread of its own.

A round is a chunk of the prompts that are still to be read, then one token for every row that is answering, so a long
prompt delays the answers of others by a chunk at a time. Where more prompts are to be read than rows answer, as when
many come at once, these go first, for a moment.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.console import warn, warn_once
from landmark_cli.errors import LandmarkError
from landmark_cli.failures import describe
from landmark_cli.inference import reader_memory
from landmark_cli.inference.generation import end_tokens
from landmark_cli.inference.memory_fit import require_fit
from landmark_cli.inference.readers import has_landmarks, open_reader
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.inference.text import CONTEXT, TextStream
from landmark_cli.models.device import to_device
from landmark_cli.options import LONGEST
from landmark_cli.serving.memories import PrefixMemories
from landmark_cli.serving.request import End, Request, deliver
from landmark_cli.serving.sampling import Row, Sampler

# Pieces of text that are handed on in a second, of all answers together: the interpreter can make and send a few
# thousand, and is needed for the tokens too.
PIECES_PER_SECOND = 1000
# Seconds for which those who answer wait while more prompts are read.
PATIENCE = 0.1
# Kinds of steps: stream tokens of a row, and which of them give logits. Where some rows end a block they read its
# landmark too, and the others stand beside it.
STEPS = [(1, [0]), (2, [0, 1]), (2, [0])]
# Chunks that a request has to have read itself for its memory to be kept.
WORTH_KEEPING = 2


class Watch(Protocol):
    """Who counts what the engine does."""

    def first_token(self, seconds: float) -> None: ...
    def ended(self, end: End, seconds: float) -> None: ...
    def spent(self, part: str, seconds: float) -> None: ...


class Full(Exception):
    """As many requests wait as may."""


class Closing(Exception):
    """The server is being stopped and takes no more requests."""


class Engine:
    """Reads and answers requests together.

    rows: how many at once. queue: how many more may wait. memories: what was read before; None to read every prompt
    from its beginning.

    Raises LandmarkError where the model has no landmarks or the settings do not fit it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reading: ReadingSettings,
        *,
        rows: int,
        queue: int,
        memories: PrefixMemories | None = None,
        watch: Watch | None = None,
    ) -> None:
        if not has_landmarks(model):
            raise LandmarkError(f"{model.name_or_path} has no landmarks: rows of a server read through a block cache")
        self.model, self.tokenizer, self.memories, self.watch = model, tokenizer, memories, watch
        self.reader = open_reader(model, reading, batch=rows)
        if said := self.reader.beyond_training(LONGEST):
            warn_once(said)
        self.reader.forward.steps_alone = True
        if memories is not None:
            memories.find(lambda found: require_fit(self.reader, found))
        self.most_waiting = queue
        self._ends = set(end_tokens(model, tokenizer))
        self._rows: list[Row | None] = [None] * rows
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._recorded_for: int | None = None
        self._sampler = Sampler(model, tokenizer)
        # (rows, vocabulary), of which those are used whose rows answer.
        self._logits: Tensor | None = None
        self._has_read = False
        self._leaving: list[tuple[Request, str | End | LandmarkError]] = []
        self._answered = self._due = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="landmark-engine", daemon=True)

    @property
    def running(self) -> int:
        return sum(row is not None for row in self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        self._thread.start()

    def submit(self, requests: list[Request]) -> None:
        """Take requests in, all or none. Raises Full or Closing."""
        with self._changed:
            if self._closing:
                raise Closing
            # Whoever has gone waits no more.
            self._waiting = deque(request for request in self._waiting if not request.cancelled.is_set())
            free = self._rows.count(None) + self.most_waiting - len(self._waiting)
            if len(requests) > free:
                raise Full
            self._waiting.extend(requests)
            self._changed.notify()

    def close(self) -> None:
        """Answer what was taken in, then stop, and keep what memories there are."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self.memories is not None:
            self.memories.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self.running:
                    if self._closing:
                        return
                    with self._timed("waiting"):
                        self._changed.wait()
            try:
                self._round()
            except Exception as error:
                self._fail(error)

    def _round(self) -> None:
        with self._timed("admitting"):
            for index, row in enumerate(self._rows):
                if row is not None and row.request.cancelled.is_set():
                    self._free(index)
                if self._rows[index] is None and self._waiting:
                    self._admit(index)
        rows = [row for row in self._rows if row is not None]
        reading = sum(len(row.left) > 0 for row in rows)
        if reading:
            self._read_chunk()
            reading = sum(len(row.left) > 0 for row in rows)
        # Steps take about as long for few rows as for many, so as long as more prompts are to be read than rows answer,
        # these wait for the others, but never long.
        if reading <= len(rows) - reading or time.monotonic() - self._answered >= PATIENCE:
            self._answer()

    def _admit(self, index: int) -> None:
        """Give a row to the request that has waited longest."""
        request = None
        with self._changed:
            while self._waiting and request is None:
                first = self._waiting.popleft()
                request = None if first.cancelled.is_set() else first
        if request is None:
            return
        row = self._rows[index] = Row(
            request,
            torch.tensor(request.ids),
            0,
            TextStream(self.tokenizer, request.ids[-CONTEXT:], request.sampling.stop or ()),
            torch.Generator(self.model.device).manual_seed(request.sampling.seed),
        )
        self.reader.forget(index)
        row.reused = self._recall(index, request.ids)
        row.left = row.left[row.reused :]

    def _recall(self, index: int, ids: list[int]) -> int:
        """Have a row go on from what was read before of a text; returns how many of its tokens that is."""
        if self.memories is None:
            return 0
        try:
            found = self.memories.longest(ids)
            if found is None:
                return 0
            reader_memory.give(self.reader, [found], index)
        except LandmarkError as error:
            warn(f"a memory is not used: {error}")
            return 0
        return len(found.text)

    def _read_chunk(self) -> None:
        """Read the next chunk of every prompt that is not read to its end."""
        size, none = self.reader.chunk, torch.empty(0, dtype=torch.long)
        texts = [none if row is None else row.left[:size] for row in self._rows]
        with self._timed("reading"):
            (part,) = self.reader.read(texts, last_only=True)
            self._has_read = True
            read = []
            for index, text in enumerate(texts):
                if len(text):
                    self._rows[index].left = self._rows[index].left[size:]
                    if len(self._rows[index].left) == 0:
                        read.append(index)
            self._take_logits(read, part.logits[:, -1])
        if self.memories is None:
            return
        with self._timed("keeping"):
            for index, text in enumerate(texts):
                row = self._rows[index]
                # Others go on from the end of a chunk, and layers with a sliding window from nowhere but the end of
                # what is kept: so that is the end of the last whole chunk. What is not much longer than what it went on
                # from is not worth as much memory as that again.
                ends_here = row is not None and len(text) == size > len(row.left)
                if ends_here and len(row.request.ids) - row.reused >= WORTH_KEEPING * size:
                    self.memories.keep(reader_memory.take(self.reader, index))

    def _take_logits(self, rows: list[int], logits: Tensor) -> None:
        """Take up these rows of logits (B, vocabulary), from which their next tokens are sampled."""
        if self._logits is None:
            self._logits = torch.zeros_like(logits)
        if rows:
            index = to_device(torch.tensor(rows), logits.device)
            self._logits[index] = logits[index]

    def _answer(self) -> None:
        """Sample a token of every row whose prompt is read, read it where the row goes on, and hand it on: while the
        device reads, for only what ends a row of itself is known before."""
        ready = {index: row for index, row in enumerate(self._rows) if row is not None and len(row.left) == 0}
        self._answered = time.monotonic()
        if not ready:
            return
        with self._timed("reading" if self._has_read else "decoding"):
            # The device is waited for, which then has done what was asked of it before.
            drawn = self._sampler.sample(ready, self._logits)
            self._has_read = False
        with self._timed("decoding"):
            self._record_steps()
            going = [None] * len(self._rows)
            for index, row in ready.items():
                token = drawn[index]
                if token is not None:
                    row.tokens.append(token)
                    if not self._ended(row):
                        going[index] = token
            if any(token is not None for token in going):
                self._logits = self.reader.step(going)
        with self._timed("handing on"):
            for index, row in ready.items():
                if drawn[index] is None:
                    self._refuse(index)
                else:
                    self._take_token(index, row, drawn[index])
            self._hand_on()

    def _record_steps(self) -> None:
        """Have graphs of all kinds of steps, and again whenever the cache has grown, so that none is recorded while
        many answer."""
        cache = self.reader.cache
        if cache.generation != self._recorded_for and max(cache.host_blocks) > 0:
            self.reader.forward.record_steps(STEPS)
            self._recorded_for = cache.generation

    def _ended(self, row: Row) -> bool:
        """Whether a row ends with its newest token, whatever text that makes."""
        return row.tokens[-1] in self._ends or len(row.tokens) >= row.request.sampling.max_new_tokens

    def _take_token(self, index: int, row: Row, token: int) -> None:
        """Make text of a row's newest token, and end the row where it ends."""
        if len(row.tokens) == 1 and self.watch is not None:
            self.watch.first_token(time.monotonic() - row.request.begun)
        if token not in self._ends:
            row.unsent += row.stream.add(token)
        if not (self._ended(row) or row.stream.stopped):
            return
        row.unsent += row.stream.end()
        finish = "stop string" if row.stream.stopped else "end of text" if token in self._ends else "length"
        end = End(finish, len(row.request.ids), row.reused, len(row.tokens))
        self._leave(index, end)
        if self.watch is not None:
            self.watch.ended(end, time.monotonic() - row.request.begun)

    def _hand_on(self) -> None:
        """Give texts to whoever asked: what ended and a first piece at once, else so many pieces a second as cost
        little beside the tokens."""
        now = time.monotonic()
        due = now >= self._due
        running = [row for row in self._rows if row is not None]
        for row in running:
            if row.unsent and (due or not row.begun):
                self._leaving.append((row.request, row.unsent))
                row.unsent, row.begun = "", True
        if due:
            self._due = now + sum(row.begun for row in running) / PIECES_PER_SECOND
        if self._leaving:
            leaving, self._leaving = self._leaving, []
            deliver(leaving)

    def _leave(self, index: int, last: End | LandmarkError) -> None:
        """A row's request has its end, or is told why there is none, with the next that is handed on."""
        row = self._rows[index]
        if row.unsent:
            self._leaving.append((row.request, row.unsent))
        self._leaving.append((row.request, last))
        self._free(index)

    def _refuse(self, index: int) -> None:
        """Say that the model's logits mean nothing."""
        try:
            self.reader.require_finite(False)
        except LandmarkError as error:
            self._leave(index, error)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            if self.watch is not None:
                self.watch.spent(part, time.monotonic() - began)

    def _free(self, index: int) -> None:
        self.reader.forget(index)
        self._rows[index] = None

    def _fail(self, error: Exception) -> None:
        """Something went wrong that is nobody's fault: all rows are given up, and later requests start anew."""
        message = str(error) if isinstance(error, LandmarkError) else describe(error)
        warn(f"{self.running} requests failed: {message}")
        failed = LandmarkError(message)
        deliver([*self._leaving, *((row.request, failed) for row in self._rows if row is not None)])
        self._rows, self._leaving = [None] * len(self._rows), []
        self._logits, self._has_read = None, False
        self.reader.reset()
