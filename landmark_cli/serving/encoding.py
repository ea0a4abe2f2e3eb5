"""Texts to ids, for many requests at once."""

from __future__ import annotations

import asyncio

from transformers import PreTrainedTokenizerBase

from landmark_cli.inference.generation import encode_prompts


class Encoder:
    """Encodes prompts in a thread, since a long one would hold up everybody's streams. A tokenizer is not for several
    threads at once, but works on several texts side by side: each call is for all that have come since the last."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._waiting: list[tuple[str, asyncio.Future[list[int]]]] = []
        self._working: asyncio.Task | None = None

    async def ids(self, prompt: str) -> list[int]:
        """The ids of a prompt. Raises LandmarkError where it cannot be encoded."""
        found: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, found))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await found

    async def _work(self) -> None:
        while self._waiting:
            taken, self._waiting = self._waiting, []
            encoded = await asyncio.to_thread(self._encode, [prompt for prompt, _ in taken])
            for (_, found), ids in zip(taken, encoded, strict=True):
                if found.done():
                    # Nobody waits for it any more.
                    continue
                if isinstance(ids, Exception):
                    found.set_exception(ids)
                else:
                    found.set_result(ids)

    def _encode(self, prompts: list[str]) -> list[list[int] | Exception]:
        try:
            return encode_prompts(self.tokenizer, prompts)
        except Exception as error:
            if len(prompts) == 1:
                return [error]
            # One of them is to blame, and the others have their ids.
            return [found for prompt in prompts for found in self._encode([prompt])]
