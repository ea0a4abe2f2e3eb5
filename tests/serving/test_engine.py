"""The engine without a network, and the memories it keeps."""

import asyncio

import pytest
import torch

from landmark_cli.console import of_one_command
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference import reader_memory
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.settings import ReadingSettings, SamplingSettings
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.serving.engine import Closing, Engine, Full
from landmark_cli.serving.memories import PrefixMemories
from landmark_cli.serving.request import End, Request
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.tiny import tiny_baseline, tiny_model, tiny_text

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(vocab_size=300, landmark_token_id=299, top_k_blocks=2)
NOVEL = tiny_text(53)


def engine_of(rows=2, queue=4, model=MODEL, **settings):
    return Engine(model, TOKENIZER, ReadingSettings(chunk=8), rows=rows, queue=queue, **settings)


def ask(engine, *prompts, tokens=4):
    """The events of each prompt, in a loop of their own."""

    async def all_of_it():
        loop = asyncio.get_running_loop()
        requests = [
            Request(list(prompt), SamplingSettings(max_new_tokens=tokens, temperature=0), loop) for prompt in prompts
        ]
        engine.submit(requests)

        async def one(request):
            try:
                return [event async for event in request.answer()]
            except LandmarkError as error:
                return error

        return await asyncio.gather(*map(one, requests))

    return asyncio.run(asyncio.wait_for(all_of_it(), 120))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_a_second_question_goes_on_behind_what_it_has_in_common_with_the_first(family, tmp_path):
    model = tiny_decoder(family)
    add_landmarks(model, tiny_tokenizer(), landmark_freq=7, trained_length=64, top_k_blocks=2)
    novel, questions = tiny_text(43).tolist(), [tiny_text(n, seed=n).tolist() for n in (4, 6)]
    answers = []
    for memories in (None, PrefixMemories(1 << 20), PrefixMemories(0, tmp_path)):
        engine = engine_of(1, model=model, memories=memories)
        engine.start()
        answers.append([ask(engine, novel + question)[0] for question in questions])
        engine.close()
    texts = [["".join(events[:-1]) for events in way] for way in answers]
    assert texts[0] == texts[1] == texts[2]
    assert [[events[-1].reused for events in way] for way in answers] == [[0, 0], [0, 40], [0, 40]]


def test_a_memory_that_is_damaged_is_not_used(tmp_path, capsys):
    """Its blocks are looked at when a request begins with them, and the request is answered all the same."""
    text, path = tiny_text(40, seed=3), tmp_path / "kept.memory"
    read(text).save(path)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    answers = []
    for content in (whole, whole[:begin] + bytes(byte ^ 1 for byte in whole[begin:])):
        path.write_bytes(content)
        memories = PrefixMemories(1 << 20, tmp_path)
        memories.find(lambda found: None)
        if content is not whole:
            assert len(memories) == 0
            # As if the damage had come later, or lay in the blocks alone.
            path.write_bytes(whole)
            memories.find(lambda found: None)
            path.write_bytes(content)
        assert len(memories) == 1
        made = engine_of(memories=memories)
        made.start()
        (events,) = ask(made, [*text.tolist(), 5, 6])
        made.close()
        answers.append(("".join(events[:-1]), events[-1].reused))
    assert answers[0][0] == answers[1][0] and [reused for _, reused in answers] == [40, 0]
    assert f"a memory is not used: --memory-dir {path} cannot be read" in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def engine():
    made = engine_of()
    made.start()
    yield made
    made.close()


def read(text, **settings):
    reader = BlockReader(MODEL, **{"chunk": 8, **settings})
    list(reader.read([text]))
    return reader


def lengths(memories, *texts):
    """How much of each text there is a memory of."""
    found = [memories.longest(list(text)) for text in texts]
    return [0 if memory is None else len(memory.text) for memory in found]


def test_memories_leave_in_the_order_of_their_last_use():
    made = [reader_memory.take(read(tiny_text(30, seed=seed))) for seed in range(3)]
    texts = [found.text.tolist() for found in made]
    memories = PrefixMemories(2 * made[0].nbytes)
    memories.keep(made[0]), memories.keep(made[1])
    assert lengths(memories, [*texts[0], 1], texts[0][:24], texts[0][:25], [38, *texts[0]]) == [24, 16, 24, 0]
    memories.keep(made[2])
    assert len(memories) == 2 and memories.nbytes == 2 * made[0].nbytes
    assert lengths(memories, *texts) == [24, 0, 24]
    memories.budget *= 2
    memories.keep(reader_memory.take(read(torch.tensor([*texts[0], 5, 6]))))
    assert len(memories) == 2, "it takes the place of its beginning"
    assert lengths(memories, [*texts[0], 5, 6, 7], [*texts[0], 5, 6]) == [32, 24]


def test_memories_go_to_the_directory_and_come_back(tmp_path):
    made = [reader_memory.take(read(tiny_text(30, seed=seed))) for seed in range(3)]
    memories = PrefixMemories(made[0].nbytes, tmp_path)
    for found in made:
        memories.keep(found)
    assert lengths(memories, *(found.text.tolist() for found in made)) == [24, 24, 24]
    memories.close()
    assert len(list(tmp_path.glob("*.memory"))) == 3 and memories.nbytes == 0
    next(tmp_path.glob("*.memory")).write_bytes(b"damaged")
    again = PrefixMemories(0, tmp_path)
    again.find(lambda found: None)
    assert len(again) == 2

    def refuse(found):
        raise UsageError("another model's")

    third = PrefixMemories(0, tmp_path)
    third.find(refuse)
    assert len(third) == 0 and len(list(tmp_path.glob("*.memory"))) == 3


def test_a_queue_has_an_end(engine):
    with pytest.raises(Full):
        ask(engine, *[NOVEL.tolist()] * 7)
    answers = ask(engine, *[NOVEL.tolist()] * 6)
    assert all(answer[-1] == End("length", 53, 0, 4) for answer in answers) and len({str(a) for a in answers}) == 1


def test_who_has_gone_takes_no_place_in_the_queue():
    made = engine_of(rows=1, queue=1)

    def request():
        return Request([7], SamplingSettings(max_new_tokens=1), None)

    gone = [request(), request()]
    made.submit(gone)
    with pytest.raises(Full):
        made.submit([request()])
    gone[1].cancel()
    later = request()
    made.submit([later])
    with pytest.raises(Full):
        made.submit([request()])
    assert made.waiting == 2 and list(made._waiting) == [gone[0], later]


def test_a_stopped_engine_takes_nothing():
    made = engine_of()
    made.start()
    made.close()
    with pytest.raises(Closing):
        ask(made, [1])


def test_what_fails_is_told_and_later_requests_are_served(engine, monkeypatch, capsys):
    expected = ask(engine, NOVEL.tolist())
    step = engine.reader.step
    monkeypatch.setattr(engine.reader, "step", lambda tokens: 1 // 0)
    (error,) = ask(engine, NOVEL.tolist())
    assert isinstance(error, LandmarkError) and "ZeroDivisionError" in str(error)
    monkeypatch.setattr(engine.reader, "step", step)
    assert ask(engine, NOVEL.tolist()) == expected


def test_logits_that_are_not_finite_are_refused(engine, monkeypatch):
    whole = engine.reader.read

    def poisoned(texts, **how):
        for part in whole(texts, **how):
            for row, text in enumerate(texts):
                if text[:1].tolist() == [7]:
                    part.logits[row, :, 3] = float("nan")
            yield part

    monkeypatch.setattr(engine.reader, "read", poisoned)
    bad, good = ask(engine, [7], [8])
    assert isinstance(bad, LandmarkError) and "nan or infinite" in str(bad) and isinstance(good[-1], End)


def test_chunks_beyond_what_was_trained_are_warned_of_before_anybody_asks(capsys):
    with of_one_command(quiet=False):
        for chunk, said in ((8, 0), (100, 1)):
            Engine(MODEL, TOKENIZER, ReadingSettings(chunk=chunk), rows=1, queue=1)
            assert capsys.readouterr().err.count("may mislead") == said


def test_a_model_without_landmarks_is_refused():
    with pytest.raises(LandmarkError, match="has no landmarks"):
        engine_of(model=tiny_baseline())
