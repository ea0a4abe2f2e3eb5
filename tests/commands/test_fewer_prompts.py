"""Evaluations that read several prompts at a time, where memory runs out over them: they go on with fewer."""

import json
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import memory

from landmark_cli.evaluation import passkey, prompts
from landmark_cli.evaluation.ruler import lists, needles, run

RULER = ["eval", "ruler", "--tasks", "fwe,niah_single_2", "--lengths", "260,300", "--samples", "5", "--chunk", "100"]
PASSKEY = ["eval", "passkey", "--lengths", "140,150", "--prompts", "5", "--chunk", "64"]
COMMANDS = {"ruler": (RULER, 5 * 2 * (260 + 300)), "passkey": (PASSKEY, 5 * (140 + 150))}
SAID = "less memory is free than was: {} at a time from here on"
PLACES = ["opening", "reading", "answering"]


def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 376.00 MiB. GPU 0 has a total capacity of")


def read_in_part(reader):
    """Its `read`, which ends behind the first chunk."""
    real = reader.read

    def read(*rows, **how):
        yield next(real(*rows, **how))
        full()

    return read


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose memory has room for readers of up to `most` prompts, with `answered` prompts so far.

    opened: prompts that readers were opened for. emptied: how often memory was given back. held: readers that were too
    large and were still there when the next one was opened.
    """
    gpu = SimpleNamespace(most=lambda answered: 100, place="", answered=[], opened=[], emptied=0, held=[])
    real, too_large = prompts.open_reader, []

    def open_reader(model, reading, batch, **more):
        gpu.held += [reader for reader in too_large if reader() is not None]
        gpu.opened.append(batch)
        if gpu.place == "opening" and batch > gpu.most(len(gpu.answered)):
            full()
        reader = real(model, reading, batch, **more)
        if batch > gpu.most(len(gpu.answered)):
            too_large.append(weakref.ref(reader))
            if gpu.place == "reading":
                reader.read = read_in_part(reader)
            else:
                reader.step = full
        return reader

    def emptied():
        gpu.emptied += 1

    monkeypatch.setattr(prompts, "open_reader", open_reader)
    monkeypatch.setattr(memory, "is_cuda_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    for module in (run, passkey):
        monkeypatch.setattr(module, "generate", noting(gpu.answered, module.generate))
    monkeypatch.setattr(needles, "NEEDLE_TOKENS", 12)
    monkeypatch.setattr(lists, "FREQUENT_TOKENS", 8)
    return gpu


def noting(answered, generate):
    """`generate`, which notes the prompts that it has answered."""

    def answer(model, tokenizer, rows, *settings, **how):
        answers = generate(model, tokenizer, rows, *settings, **how)
        answered.extend((how["reader"].batch, tuple(row.tolist())) for row in rows)
        return answers

    return answer


def arguments_of(name, output):
    arguments, tokens = COMMANDS[name]
    return [*arguments, *(["--output", output] if name == "ruler" else []), "--json", "-"], tokens


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", COMMANDS)
def test_it_goes_on_with_half_as_many(landmark, gpu, tmp_path, name, place):
    arguments, tokens = arguments_of(name, tmp_path / "whole")
    whole = landmark(*arguments)
    assert whole.code == 0 and gpu.emptied == 0 and "at a time" not in whole.err
    assert {batch for batch, _ in gpu.answered} == {5}
    expected = sorted(prompt for _, prompt in gpu.answered)
    gpu.answered.clear()

    gpu.most, gpu.place = lambda answered: 2, place
    result = landmark(*arguments_of(name, tmp_path / "fewer")[0])
    assert result.code == 0, result.err
    assert json.loads(result.out) == json.loads(whole.out)
    # Every prompt once, at most two at a time, and counted once.
    assert sorted(prompt for _, prompt in gpu.answered) == expected and len(set(expected)) == len(expected)
    assert {batch for batch, _ in gpu.answered} == {1, 2}
    assert re.search(rf"100%  {tokens}/{tokens} tokens", result.err), result.err
    # Of each of two lengths once, whose first try was of five; all memory was given back before the next.
    assert result.err.count(SAID.format("2 prompts")) == 2 == result.err.count("at a time")
    assert gpu.emptied == 2 and not gpu.held
    if name == "ruler":
        kept = (tmp_path / "fewer" / "answers.jsonl").read_text().splitlines()
        assert len({json.loads(line)["key"] for line in kept}) == len(kept) == len(expected)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_was_answered_before_memory_ran_out_is_not_asked_again(landmark, gpu, tmp_path, monkeypatch, name):
    """Three at a time; after the first three another process takes memory."""
    monkeypatch.setattr(prompts, "HOST_TOKENS", 1000 if name == "ruler" else 500)
    arguments, tokens = arguments_of(name, tmp_path / "whole")
    whole = landmark(*arguments)
    assert {batch for batch, _ in gpu.answered} == {3, 2}
    number = len(gpu.answered)
    gpu.answered.clear()
    gpu.most, gpu.place = lambda answered: 3 if answered < 3 else 1, "reading"
    result = landmark(*arguments_of(name, tmp_path / "fewer")[0])
    assert result.code == 0, result.err
    assert json.loads(result.out) == json.loads(whole.out)
    assert [batch for batch, _ in gpu.answered] == [3] * 3 + [1] * (number - 3)
    assert len({prompt for _, prompt in gpu.answered}) == number
    assert f"{tokens}/{tokens} tokens" in result.err and not gpu.held


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_number_of_ones_own_is_kept(landmark, gpu, tmp_path, name, place):
    gpu.most, gpu.place = lambda answered: 2, place
    result = landmark(*arguments_of(name, tmp_path)[0], "--batch-size", "4")
    assert (result.code, gpu.answered, gpu.emptied) == (1, [], 0)
    assert "out of GPU memory (376.00 MiB more were asked for); what takes less: " in result.err
    assert "shorter --lengths" in result.err and "a smaller --batch-size" in result.err
    assert "at a time" not in result.err and gpu.opened == [4]


@pytest.mark.parametrize("name", COMMANDS)
def test_one_prompt_that_is_too_long_ends_it(landmark, gpu, tmp_path, name):
    gpu.most, gpu.place = lambda answered: 0, "reading"
    result = landmark(*arguments_of(name, tmp_path)[0])
    assert (result.code, gpu.answered, gpu.emptied) == (1, [], 2)
    assert [line for line in result.err.splitlines() if "at a time" in line] == [
        SAID.format("2 prompts"),
        SAID.format("1 prompt"),
    ]
    assert "out of GPU memory (376.00 MiB more were asked for); what takes less: " in result.err
    # Fewer at a time than one there are not.
    assert "shorter --lengths" in result.err and "--batch-size" not in result.err
