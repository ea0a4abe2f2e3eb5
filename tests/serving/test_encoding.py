"""Prompts that come while others are encoded are encoded together, and each has its own ids or its own error."""

import asyncio
import threading

import pytest

from landmark_cli.errors import LandmarkError
from landmark_cli.inference.generation import encode_prompt
from landmark_cli.serving import encoding
from landmark_cli.serving.encoding import Encoder
from tests.models.families import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = ["Call me", "It was the best of times", "9", "a" * 40, ""]


@pytest.mark.parametrize("bad", [None, 2])
def test_prompts_that_wait_are_encoded_together(monkeypatch, bad):
    calls, whole, going = [], encoding.encode_prompts, threading.Event()

    def slow(tokenizer, prompts):
        calls.append(len(prompts))
        # The first call takes until all have come.
        assert going.wait(60)
        if bad is not None and PROMPTS[bad] in prompts:
            raise LandmarkError("not this one")
        return whole(tokenizer, prompts)

    monkeypatch.setattr(encoding, "encode_prompts", slow)

    async def ask():
        encoder = Encoder(TOKENIZER)
        tasks = [asyncio.create_task(encoder.ids(prompt)) for prompt in PROMPTS[:1]]
        while not calls:
            await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(encoder.ids(prompt)) for prompt in [*PROMPTS[1:], "nobody waits"]]
        await asyncio.sleep(0)
        tasks.pop().cancel()
        going.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        # Later ones are served too.
        return found, await encoder.ids("Call me")

    found, later = asyncio.run(ask())
    expected = [encode_prompt(TOKENIZER, prompt) for prompt in PROMPTS]
    assert calls == [1, 5, *([1] * 5 if bad is not None else []), 1] and later == expected[0]
    for number, (ids, alone) in enumerate(zip(found, expected, strict=True)):
        assert str(ids) == "not this one" if number == bad else ids == alone
