"""A hundred clients at once, without a network: no answer is lost, or somebody else's."""

import asyncio
import json

import httpx2

import landmark_cli
from landmark_cli.serving.api import Limits, Service, build_app
from landmark_cli.serving.engine import Engine
from landmark_cli.serving.memories import PrefixMemories
from landmark_cli.serving.metrics import Metrics
from tests.serving.test_engine import MODEL, TOKENIZER

CLIENTS, TOKENS = 100, 5
READING = landmark_cli.ReadingSettings(chunk=8)
# Some begin alike for several chunks, so that they go on from each other's memories; lengths from 1 to 63.
PROMPTS = [
    ("It was the best of times, " if number % 2 else "") + "abcdefghij"[: 1 + number // 2] * 4 for number in range(20)
]


def alone() -> list[str]:
    sampling = landmark_cli.SamplingSettings(max_new_tokens=TOKENS, temperature=0)
    return [landmark_cli.generate(MODEL, TOKENIZER, [p], sampling, reading=READING)[0].text for p in PROMPTS]


async def ask(client: httpx2.AsyncClient, number: int) -> tuple[str, str]:
    """One client's answer and why it ended; every second one has it streamed."""
    asked = {"model": "tiny", "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": TOKENS, "temperature": 0}
    stream = number // len(PROMPTS) % 2 == 1
    answer = await client.post("/v1/completions", json={**asked, "stream": stream})
    assert answer.status_code == 200, answer.text
    if not stream:
        (choice,) = answer.json()["choices"]
        return choice["text"], choice["finish_reason"]
    *events, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert done == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


def test_a_hundred_clients_get_what_each_gets_alone():
    metrics = Metrics()
    engine = Engine(MODEL, TOKENIZER, READING, rows=8, queue=CLIENTS, memories=PrefixMemories(1 << 20), watch=metrics)
    metrics.follow(engine)
    app = build_app(Service(engine, TOKENIZER, "tiny", Limits(1000, 100), None), metrics)
    engine.start()

    async def all_of_them() -> list[tuple[str, str]]:
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app), base_url="http://tiny", timeout=120
        ) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(CLIENTS)))

    try:
        answers = asyncio.run(all_of_them())
    finally:
        engine.close()
    expected = alone()
    assert answers == [(expected[number % len(PROMPTS)], "length") for number in range(CLIENTS)]
    assert (metrics.given, engine.running, engine.waiting) == (CLIENTS, 0, 0)
