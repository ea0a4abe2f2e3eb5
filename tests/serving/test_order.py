"""In which order the engine does what it has to do, and that nothing waits for what it need not wait for."""

import threading

import pytest
import torch

from landmark_cli.inference import reader_memory
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.memory import Memory
from landmark_cli.serving import engine as engines
from landmark_cli.serving import memories as memories_module
from landmark_cli.serving.engine import Engine
from landmark_cli.serving.memories import PrefixMemories
from landmark_cli.serving.request import End
from tests.serving.test_engine import MODEL, NOVEL, ask, engine_of, lengths, read
from tests.tiny import tiny_text

# None of these ends by itself within a few tokens, nor makes half characters alone.
PROMPTS = [tiny_text(length, seed=length).tolist() for length in (5, 34, 37, 39)]


def noted(engine: Engine, monkeypatch) -> list[tuple[str, int]]:
    """What the reader is asked for: a chunk or a step, and for how many rows."""
    calls, reader = [], engine.reader
    chunk, step = reader.read, reader.step

    def noting_chunk(texts, **how):
        calls.append(("chunk", sum(len(text) > 0 for text in texts)))
        return chunk(texts, **how)

    def noting_step(tokens):
        calls.append(("step", sum(token is not None for token in tokens)))
        return step(tokens)

    monkeypatch.setattr(reader, "read", noting_chunk)
    monkeypatch.setattr(reader, "step", noting_step)
    return calls


@pytest.mark.parametrize(
    ("patience", "expected"),
    [
        (1e9, [("chunk", 4), *[("chunk", 3)] * 4, *[("step", 4)] * 5]),
        (-1, [("chunk", 4), ("step", 1), *[("chunk", 3), ("step", 1)] * 3, ("chunk", 3), ("step", 4), ("step", 3)]),
    ],
    ids=["for long", "never"],
)
def test_who_answers_waits_for_more_who_read_but_not_for_long(monkeypatch, patience, expected):
    monkeypatch.setattr(engines, "PATIENCE", patience)
    made = engine_of(4)
    calls = noted(made, monkeypatch)
    made.start()
    answers = ask(made, *PROMPTS, tokens=6)
    made.close()
    assert calls[: len(expected)] == expected
    alone = engine_of(1)
    alone.start()
    # How many pieces are handed on together is a question of time.
    expected = [ask(alone, prompt, tokens=6)[0] for prompt in PROMPTS]
    assert [("".join(pieces), end) for *pieces, end in answers] == [("".join(pieces), end) for *pieces, end in expected]
    alone.close()


@pytest.mark.parametrize("pieces", [1e9, 1e-9])
def test_pieces_are_handed_on_together_but_the_first_and_the_last_at_once(monkeypatch, pieces):
    monkeypatch.setattr(engines, "PIECES_PER_SECOND", pieces)
    made = engine_of(4)
    made.start()
    answers = ask(made, *PROMPTS, tokens=9)
    made.close()
    monkeypatch.setattr(engines, "PIECES_PER_SECOND", 1e9)
    alone = engine_of(1)
    alone.start()
    for prompt, events in zip(PROMPTS, answers, strict=True):
        (expected,) = ask(alone, prompt, tokens=9)
        assert events[-1] == expected[-1] == End("length", len(prompt), 0, 9)
        assert "".join(events[:-1]) == "".join(expected[:-1])
        # The first, what has come of the others until the first round of all is over, and the rest.
        assert events[0] == expected[0] and (len(events) <= 4) == (pieces < 1)
    alone.close()


def test_steps_are_recorded_before_the_first_of_them_and_when_the_cache_has_grown(monkeypatch):
    made = engine_of(1)
    recorded = []
    monkeypatch.setattr(
        made.reader.forward, "record_steps", lambda kinds: recorded.append(made.reader.cache.generation)
    )
    made.start()
    for _ in range(2):
        ask(made, NOVEL.tolist())
    once = list(recorded)
    ask(made, tiny_text(400).tolist())
    made.close()
    assert len(once) == 1 and len(recorded) == 2 and recorded[0] < recorded[1]


@pytest.fixture
def gpu(monkeypatch):
    """Memories are as if they lay in a GPU's memory, and are copied when the test lets them be: what lets one, and the
    texts of those that were."""
    allowed, copied = threading.Semaphore(0), []

    def on_host(found: Memory, made: None) -> Memory:
        assert allowed.acquire(timeout=60)
        copied.append(found.text.tolist())
        return found

    monkeypatch.setattr(Memory, "gpu", torch.device("cuda:0"))
    monkeypatch.setattr(memories_module, "made_by_now", lambda device: None)
    monkeypatch.setattr(memories_module, "on_host", on_host)
    return allowed, copied


def test_a_memory_serves_while_it_is_copied_and_what_has_left_is_not(monkeypatch, gpu):
    allowed, copied = gpu
    monkeypatch.setattr(memories_module, "free_memory", lambda device: 1 << 40)
    made = [reader_memory.take(read(tiny_text(30, seed=seed))) for seed in range(4)]
    texts = [found.text.tolist() for found in made]
    memories = PrefixMemories(2 * made[0].nbytes)
    for found in made:
        memories.keep(found)
    # Nobody has waited for a copy, and the second has left before its turn; the first may be in the middle of it.
    assert lengths(memories, *texts) == [0, 0, 24, 24] and copied == []
    allowed.release(3)
    memories._mover.submit(lambda: None).result()
    assert copied[-2:] == texts[2:] and texts[1] not in copied
    memories.close()


def test_what_waits_to_be_copied_has_so_much_room(monkeypatch, gpu):
    allowed, copied = gpu
    made = [reader_memory.take(read(tiny_text(30, seed=seed))) for seed in range(3)]
    room = int(2.5 * made[0].nbytes / memories_module.GPU_SHARE)
    monkeypatch.setattr(memories_module, "free_memory", lambda device: room)
    memories = PrefixMemories(1 << 30)
    memories.keep(made[0])
    memories.keep(made[1])
    assert copied == []
    waiting = threading.Thread(target=memories.keep, args=[made[2]])
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and copied == []
    allowed.release()
    waiting.join(60)
    assert not waiting.is_alive() and len(copied) == 1 and len(memories) == 3
    allowed.release(2)
    memories.close()


def test_a_memory_that_cannot_be_copied_is_not_kept(monkeypatch, gpu, capsys):
    monkeypatch.setattr(memories_module, "free_memory", lambda device: 0)

    def fails(found, made):
        raise RuntimeError("no room\nsomewhere")

    monkeypatch.setattr(memories_module, "on_host", fails)
    made = engine_of(memories=PrefixMemories(1 << 30))
    made.start()
    answers = [ask(made, NOVEL.tolist())[0] for _ in range(2)]
    made.close()
    assert answers[0] == answers[1] and answers[0][-1].reused == 0
    assert "a memory is not kept: no room" in capsys.readouterr().err


@pytest.mark.gpu
def test_memories_of_a_gpu_come_to_host_memory_and_are_those_of_the_text(tmp_path):
    model = MODEL.cuda()
    try:
        for directory in (None, tmp_path):
            memories = PrefixMemories(1 << 20, directory)
            reader = BlockReader(model, chunk=8)
            list(reader.read([NOVEL]))
            kept, expected = reader_memory.take(reader), reader_memory.take(reader)
            memories.keep(kept)
            # What comes after does not change it.
            reader.reset()
            list(reader.read([tiny_text(53, seed=9)]))
            memories._mover.submit(lambda: None).result()
            (entry,) = memories._entries.values()
            assert expected.gpu is not None and entry.memory.gpu is None
            for held, of_layer in zip(entry.memory.layers, expected.layers, strict=True):
                for part, there in zip(held, of_layer, strict=True):
                    assert torch.equal(part, there.cpu())
            memories.close()
    finally:
        MODEL.cpu()
