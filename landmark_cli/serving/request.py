"""One text to go on from, on its way through the engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
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

    def send(self, event: str | End | LandmarkError) -> None:
        """A piece of text, the end, or why there is none; from the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:
            # The loop has been closed: the server was stopped at once.
            self.cancel()

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
