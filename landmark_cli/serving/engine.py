"""The engine: one reader whose rows are requests, each at its own pace, in a thread of its own.

A round is a chunk of the prompts that are still to be read, then one token for every row that is answering, so a long
prompt delays the answers of others by a chunk at a time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.console import warn
from landmark_cli.errors import LandmarkError
from landmark_cli.failures import describe
from landmark_cli.inference import memory
from landmark_cli.inference.generation import draw, end_tokens, logits_processors
from landmark_cli.inference.readers import are_finite, has_landmarks, open_reader
from landmark_cli.inference.settings import ReadingSettings, SamplingSettings
from landmark_cli.inference.text import CONTEXT, TextStream
from landmark_cli.serving.memories import PrefixMemories
from landmark_cli.serving.request import End, Request

# Chunks that a request has to have read itself for its memory to be kept.
WORTH_KEEPING = 2


class Watch(Protocol):
    """Who counts what the engine does."""

    def first_token(self, seconds: float) -> None: ...
    def ended(self, end: End, seconds: float) -> None: ...


class Full(Exception):
    """As many requests wait as may."""


class Closing(Exception):
    """The server is being stopped and takes no more requests."""


@dataclass
class _Row:
    """A request that has a row. left: what is still to be read of its prompt. logits: (vocabulary,) after all that was
    read."""

    request: Request
    left: Tensor
    reused: int
    stream: TextStream
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    logits: Tensor | None = None


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
        if memories is not None:
            memories.find(lambda found: memory.require_fit(self.reader, found))
        self.most_waiting = queue
        self._ends = set(end_tokens(model, tokenizer))
        self._rows: list[_Row | None] = [None] * rows
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._processors: dict[tuple, LogitsProcessorList] = {}
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
                    self._changed.wait()
            try:
                self._round()
            except Exception as error:
                self._fail(error)

    def _round(self) -> None:
        for index, row in enumerate(self._rows):
            if row is not None and row.request.cancelled.is_set():
                self._free(index)
            if self._rows[index] is None:
                self._admit(index)
        self._read_chunk()
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
        row = self._rows[index] = _Row(
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
            memory.give(self.reader, [found], index)
        except LandmarkError as error:
            warn(f"a memory is not used: {error}")
            return 0
        return len(found.text)

    def _read_chunk(self) -> None:
        """Read the next chunk of every prompt that is not read to its end."""
        size, none = self.reader.chunk, torch.empty(0, dtype=torch.long)
        texts = [none if row is None else row.left[:size] for row in self._rows]
        if not any(map(len, texts)):
            return
        (part,) = self.reader.read(texts, last_only=True)
        for index, (row, text) in enumerate(zip(self._rows, texts, strict=True)):
            if not len(text):
                continue
            row.left = row.left[size:]
            if len(row.left) == 0:
                row.logits = part.logits[index, -1]
            # Others go on from the end of a chunk, and layers with a sliding window from nowhere but the end of what is
            # kept: so that is the end of the last whole chunk. What is not much longer than what it went on from is not
            # worth as much memory as that again.
            ends_here = len(text) == size > len(row.left)
            if self.memories is not None and ends_here and len(row.request.ids) - row.reused >= WORTH_KEEPING * size:
                self.memories.keep(memory.take(self.reader, index))

    def _answer(self) -> None:
        """Sample a token of every row whose prompt is read, hand it on, and read it where the row goes on."""
        ready = [index for index, row in enumerate(self._rows) if row is not None and row.logits is not None]
        if not ready:
            return
        tokens: list[int | None] = [None] * len(self._rows)
        for index, token in zip(ready, self._sample(ready), strict=True):
            if token is None:
                self._refuse(index)
            elif not self._hand_on(index, token):
                tokens[index] = token
        if any(token is not None for token in tokens):
            logits = self.reader.step(tokens)
            for index, token in enumerate(tokens):
                if token is not None:
                    self._rows[index].logits = logits[index]

    def _sample(self, ready: list[int]) -> list[int | None]:
        """The next token of each of these rows, None where its logits are not finite. Rows that sample alike do so
        together, and the device is waited for once."""
        rows = [self._rows[index] for index in ready]
        logits = torch.stack([row.logits for row in rows]).float()
        finite = are_finite(logits)
        logits = torch.where(finite[:, None], logits, 0.0)
        drawn = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
        alike: dict[tuple, list[int]] = {}
        for place, row in enumerate(rows):
            chosen = row.request.sampling
            key = chosen.temperature, chosen.top_p, chosen.top_k, chosen.repetition_penalty
            # A repetition penalty looks at each row's own tokens; nothing else does.
            alike.setdefault((*key, place if chosen.repetition_penalty != 1.0 else None), []).append(place)
        for places in alike.values():
            first = rows[places[0]]
            sampling = first.request.sampling
            seen = [first.request.ids + first.tokens] if sampling.repetition_penalty != 1.0 else [[]] * len(places)
            scores = self._processors_of(sampling)(torch.tensor(seen, device=logits.device), logits[places])
            if sampling.temperature == 0:
                drawn[places] = scores.argmax(-1)
            else:
                drawn[places] = draw(scores, [rows[place].generator for place in places])
        numbers = torch.stack([drawn, finite.long()]).tolist()
        return [token if fine else None for token, fine in zip(*numbers, strict=True)]

    def _processors_of(self, sampling: SamplingSettings) -> LogitsProcessorList:
        key = sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty
        if key not in self._processors:
            if len(self._processors) > 1000:
                self._processors.clear()
            self._processors[key] = logits_processors(self.model, self.tokenizer, sampling)
        return self._processors[key]

    def _hand_on(self, index: int, token: int) -> bool:
        """Give a token to whoever asked; returns whether the row has ended with it."""
        row = self._rows[index]
        request, row.logits = row.request, None
        if not row.tokens and self.watch is not None:
            self.watch.first_token(time.monotonic() - request.begun)
        row.tokens.append(token)
        ended = token in self._ends
        piece = "" if ended else row.stream.add(token)
        if piece:
            request.send(piece)
        full = len(row.tokens) >= request.sampling.max_new_tokens
        if not (ended or full or row.stream.stopped):
            return False
        rest = row.stream.end()
        if rest:
            request.send(rest)
        finish = "stop string" if row.stream.stopped else "end of text" if ended else "length"
        self._end(index, End(finish, len(request.ids), row.reused, len(row.tokens)))
        return True

    def _end(self, index: int, end: End) -> None:
        request = self._rows[index].request
        request.send(end)
        if self.watch is not None:
            self.watch.ended(end, time.monotonic() - request.begun)
        self._free(index)

    def _refuse(self, index: int) -> None:
        """Say that the model's logits mean nothing."""
        try:
            self.reader.require_finite(False)
        except LandmarkError as error:
            self._rows[index].request.send(error)
        self._free(index)

    def _free(self, index: int) -> None:
        self.reader.forget(index)
        self._rows[index] = None

    def _fail(self, error: Exception) -> None:
        """Something went wrong that is nobody's fault: all rows are given up, and later requests start anew."""
        message = str(error) if isinstance(error, LandmarkError) else describe(error)
        warn(f"{self.running} requests failed: {message}")
        for index, row in enumerate(self._rows):
            if row is not None:
                row.request.send(LandmarkError(message))
                self._rows[index] = None
        self.reader.reset()
