"""Rows that sample in different ways, together and alone."""

import asyncio

from landmark_cli.inference.settings import SamplingSettings
from landmark_cli.serving.request import Request
from tests.serving.test_engine import NOVEL, engine_of

WAYS = [
    {"temperature": 0},
    {"temperature": 0.9, "top_k": 5, "seed": 3},
    {"temperature": 0.9, "top_k": 5, "seed": 4},
    {"temperature": 1.3, "top_p": 0.7, "top_k": 0, "seed": 3},
    {"temperature": 0, "repetition_penalty": 1.7},
    {"temperature": 0.9, "repetition_penalty": 1.7, "seed": 3},
    {"temperature": 0, "stop": ["h"]},
]


def answers(rows: int) -> list[list]:
    """The events of a request for each of the ways, by an engine of so many rows."""
    engine = engine_of(rows, queue=len(WAYS))
    engine.start()

    async def all_of_them():
        loop = asyncio.get_running_loop()
        requests = [
            Request(NOVEL[: 20 + number].tolist(), SamplingSettings(max_new_tokens=9, **way), loop)
            for number, way in enumerate(WAYS)
        ]
        engine.submit(requests)

        async def one(request):
            events = [event async for event in request.answer()]
            return "".join(events[:-1]), events[-1]

        return await asyncio.gather(*map(one, requests))

    try:
        return asyncio.run(asyncio.wait_for(all_of_them(), 120))
    finally:
        engine.close()


def test_each_row_gets_what_it_gets_alone():
    together = answers(len(WAYS))
    assert together == answers(1)
    assert len({text for text, _ in together}) == len(WAYS)
