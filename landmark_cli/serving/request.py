"""One text to go on from, on its way through the engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from landmark_cli.errors import LandmarkError
from landmark_cli.inference.generation import Finish
from landmark_cli.inference.settings import SamplingSettings


class End(NamedTuple):
    """How a request ended. reused: tokens of the prompt that a memory held, so that they were not read again."""

    finish: Finish
    prompt_tokens: int
    reused: int
    tokens: int


@dataclass
class Request:
    """A prompt's ids, how to sample, and where the answer goes: to an event loop, from the engine's thread."""

    ids: list[int]
    sampling: SamplingSettings
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    begun: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        """Nobody waits for the answer any more. May be called again, and after the end."""
        self.cancelled.set()

    async def answer(self) -> AsyncIterator[str | End]:
        """Pieces of text as they come, then the end. Leaving before that gives the row to another request.

        Raises LandmarkError where there is no answer.
        """
        try:
            while True:
                event = await self.events.get()
                if isinstance(event, LandmarkError):
                    raise event
                yield event
                if isinstance(event, End):
                    return
        finally:
            self.cancel()


def deliver(events: Sequence[tuple[Request, str | End | LandmarkError]]) -> None:
    """Pieces of texts, ends, and why there is no answer: from the engine's thread, all at once, for what an event loop
    is asked for from outside wakes it up."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Request, str | End | LandmarkError]]] = {}
    for request, event in events:
        by_loop.setdefault(request.loop, []).append((request, event))
    for loop, theirs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, theirs)
        except RuntimeError:
            # The loop has been closed: the server was stopped at once.
            for request, _ in theirs:
                request.cancel()


def _put(events: Sequence[tuple[Request, str | End | LandmarkError]]) -> None:
    for request, event in events:
        request.events.put_nowait(event)
