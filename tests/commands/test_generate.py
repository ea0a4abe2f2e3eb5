"""`landmark generate` as a user runs it."""

import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LogitsProcessor

import landmark_cli
from landmark_cli import console
from landmark_cli.commands.generate import stop_strings
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.plan import least_file

SAMPLING = ["--max-new-tokens", "8", "--temperature", "0"]


def test_three_ways_to_give_the_prompt(landmark, workplace, monkeypatch):
    prompt = "It was the best of times, it was the worst of times. " * 6
    (workplace / "prompt.txt").write_text(prompt)
    given = landmark("generate", "--prompt", prompt, *SAMPLING, "--json", "out.json")
    assert given.code == 0, given.err
    assert "using runs/landmark" in given.err and "generated 8" in given.err
    data = json.loads((workplace / "out.json").read_text())
    tokenizer = load_tokenizer(str(workplace / "tokenizer"))
    assert given.out == data["text"] + "\n" == tokenizer.decode(data["tokens"]) + "\n"
    assert (data["finish"], len(data["tokens"]), data["prompt_tokens"]) == ("length", 8, 85)
    assert landmark("generate", "--prompt-file", "prompt.txt", *SAMPLING).out == given.out
    # As some editors save it: the mark in front is no part of the text.
    (workplace / "marked.txt").write_text(prompt, encoding="utf-8-sig")
    marked = landmark("generate", "--prompt-file", "marked.txt", *SAMPLING)
    assert marked.out == given.out and "read 85 tokens" in marked.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"\ufeff{prompt}".encode())))
    assert landmark("generate", *SAMPLING).out == given.out


def test_seed_and_json_on_standard_output(landmark):
    arguments = ["generate", "--prompt", "Call me", "--max-new-tokens", "6", "--top-k", "0", "--json", "-"]
    first, again, other = (landmark(*arguments, "--seed", seed) for seed in (1, 1, 2))
    assert first.out == again.out != other.out
    assert set(json.loads(first.out)) == {"model", "text", "tokens", "prompt_tokens", "finish"}


def test_a_stop_string_ends_the_text(landmark):
    free = landmark("generate", "--prompt", "Call me", *SAMPLING).out
    stopped = landmark("generate", "--prompt", "Call me", *SAMPLING, "--stop", free[10:13])
    assert stopped.out == free[: free.index(free[10:13])] + "\n"
    assert "ended by stop string" in stopped.err


@pytest.mark.parametrize(
    ("typed", "strings", "told"),
    [
        ("CHAPTER", ["CHAPTER"], ""),
        ("\n", ["\n"], ""),
        (r"\n", ["\n"], r"--stop \n: read \n as a line break"),
        (r"\n\n", ["\n\n"], r"--stop \n\n: read \n as a line break"),
        (r"\r\n\t", ["\r\n\t"], r"\r as a carriage return, \n as a line break, \t as a tab"),
        (r"\nQ:", ["\nQ:", r"\nQ:"], r"read \n as a line break"),
        (r"\newpage", ["\newpage", r"\newpage"], r"read \n as a line break"),
        (r"\section", [r"\section"], ""),
        (r"\\", [r"\\"], ""),
    ],
)
def test_stop_strings_as_a_shell_hands_them_on(typed, strings, told, capsys):
    console.console.cache_clear()
    assert stop_strings([typed, "other"]) == [*strings, "other"]
    err = capsys.readouterr().err
    assert told in err if told else not err


def test_generation_ends_at_a_line_break_that_was_typed(landmark, workplace, monkeypatch):
    # The model, whatever its weights, says these.
    said = load_tokenizer(str(workplace / "tokenizer")).encode("one line\nand another")
    monkeypatch.setattr("landmark_cli.inference.generation.NeverGenerated", lambda *_, **__: Says(list(said)))
    result = landmark("generate", "--prompt", "Call me", *SAMPLING, "--stop", r"\n")
    assert result.out == "one line\n" and "ended by stop string" in result.err


class Says(LogitsProcessor):
    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        scores[:, self.tokens.pop(0)] = 1e9
        return scores


def test_a_baseline_sees_its_window(landmark):
    result = landmark("generate", "--model", "runs/baseline", "--prompt", "word " * 100, *SAMPLING)
    assert result.code == 0 and "it sees the last 30 at most" in result.err and "generated 8" in result.err
    short = landmark("generate", "--model", "runs/baseline", "--prompt", "word", *SAMPLING)
    assert short.code == 0 and "it sees" not in short.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompt", "a", "--prompt-file", "b"], 2, "both given"),
        (["--prompt-file", "none.txt"], 1, "none.txt cannot be read: No such file"),
        (["--prompt-file", "latin.txt"], 1, "latin.txt is not UTF-8 text (byte 3)"),
        (["--prompt", "a", "--chat"], 2, "no chat template"),
        (["--prompt", "a <landmark> b"], 1, "contains the landmark token"),
        (["--prompt", "a", "--temperature", "-1"], 2, "must be at least 0"),
        (["--prompt", "a", "--stop", ""], 2, "--stop: an empty text"),
    ],
)
def test_mistakes(landmark, workplace, arguments, code, message):
    (workplace / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    result = landmark("generate", *arguments)
    assert (result.code, message in result.err) == (code, True), result.err
    assert "Traceback" not in result.err and not result.out


def test_a_trace(landmark, workplace):
    prompt = "word " * 40
    result = landmark("generate", "--prompt", prompt, *SAMPLING, "--trace", "new/trace.json", "--offload", "cpu")
    assert result.code == 0 and "wrote new/trace.json" in result.err, result.err
    trace = json.loads((workplace / "new" / "trace.json").read_text())
    assert (trace["model"], trace["landmark_freq"], trace["prompt_tokens"]) == ("runs/landmark", 4, 41)
    assert "".join(token["text"] for token in trace["tokens"]) == result.out.removesuffix("\n")
    assert "".join(trace["blocks"]).startswith(prompt) and trace["blocks"][:2] == ["word word word word", " word" * 4]
    assert len(trace["tokens"]) == 8 and set(trace["tokens"][3]["reads"][0]) == {"layer", "head", "block", "share"}
    page = landmark("generate", "--prompt", prompt, *SAMPLING, "--trace", "new/trace.html")
    assert page.code == 0 and page.out == result.out
    content = (workplace / "new" / "trace.html").read_text().split('id="trace">')[1].split("</script>")[0]
    assert json.loads(content)["blocks"] == trace["blocks"]
    refused = landmark("generate", "--model", "runs/baseline", "--prompt", "word", "--trace", "trace.json")
    assert refused.code == 2 and "has no landmarks" in refused.err


def test_a_trace_of_no_known_kind_is_refused_before_the_work(landmark, monkeypatch):
    monkeypatch.setattr("landmark_cli.commands.generate.open_model", lambda *_: pytest.fail("work was begun"))
    for name, found in (("trace.txt", ".txt is"), ("trace", "no ending is")):
        result = landmark("generate", "--prompt", "word", "--trace", name)
        message = f"--trace {name}: {found} no kind of trace: name a file .html (a page to look at) or .json (data)"
        assert (result.code, result.out) == (2, "") and message in result.err, result.err


def test_a_text_is_read_once_and_asked_many_times(landmark, workplace):
    novel, question = "It was the best of times, it was the worst of times. " * 6, " What was it? It was"
    (workplace / "novel.txt").write_text(novel)
    kept = landmark("generate", "--prompt-file", "novel.txt", "--save-memory", "kept/novel", "--max-new-tokens", "0")
    assert (kept.code, kept.out) == (0, "\n") and "wrote kept/novel: " in kept.err and "generated 0" in kept.err
    asked = landmark("generate", "--memory", "kept/novel", "--prompt", question, *SAMPLING)
    again = landmark("generate", "--memory", "kept/novel", "--prompt", question, *SAMPLING, "--offload", "cpu")
    assert asked.code == 0 and asked.out == again.out and "read 6 tokens" in asked.err, asked.err
    # As from Python, where nothing came between.
    model, tokenizer = landmark_cli.load("runs/landmark", device="cpu")
    reader = landmark_cli.Reader(model)
    list(reader.read([tokenizer(novel).input_ids]))
    settings = landmark_cli.SamplingSettings(max_new_tokens=8, temperature=0)
    (expected,) = landmark_cli.generate(model, tokenizer, [question], settings, reader=reader)
    assert asked.out == expected.text + "\n"
    before = (workplace / "kept" / "novel").read_bytes()
    added = landmark("generate", "--memory", "kept/novel", "--append", "--prompt", question, "--max-new-tokens", "0")
    assert added.code == 0 and (workplace / "kept" / "novel").read_bytes() != before
    reader.reset()
    list(reader.read([tokenizer(novel).input_ids]))
    list(reader.read([tokenizer(question).input_ids]))
    reader.save(workplace / "kept" / "expected")
    names = [load_file(workplace / "kept" / name) for name in ("novel", "expected")]
    assert all(torch.equal(names[0][key], names[1][key]) for key in names[1])
    library = landmark("generate", *["--memory", "kept/novel"] * 2, "--prompt", question, *SAMPLING)
    assert library.code == 0 and library.out != asked.out


def test_a_disk_without_room_for_a_memory_is_seen_before_reading(landmark, workplace, monkeypatch):
    text = "It was the best of times, it was the worst of times. " * 6
    novel = ["generate", "--prompt", text, "--max-new-tokens", "0"]
    assert landmark(*novel, "--save-memory", "roomy").code == 0
    takes = (workplace / "roomy").stat().st_size
    model, _ = landmark_cli.load("runs/landmark", device="cpu")
    least, bounded = (least_file(model, 84, landmark_cli.ReadingSettings(cache_blocks=kept)) for kept in (None, 1))
    assert takes / 2 < least < takes and bounded < least
    free = least - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with monkeypatch.context() as unread:
        unread.setattr(BlockReader, "read", lambda *_, **__: pytest.fail("it was read"))
        full = landmark(*novel, "--save-memory", "full")
        assert full.code == 1 and "--save-memory full: the result takes" in full.err, full.err
        assert not (workplace / "full").exists()
        # What is read on from is part of the new file, which is written beside the old one.
        free = takes + least - 1
        assert "--append roomy: the result takes" in landmark(*novel, "--memory", "roomy", "--append").err
    free = 3 * takes
    assert landmark(*novel, "--memory", "roomy", "--append").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--append"], 2, "--append writes back to one --memory FILE"),
        (["--memory", "a", "--memory", "b", "--append"], 2, "--append writes back to one"),
        (["--memory", "a", "--append", "--save-memory", "b"], 2, "and no --save-memory"),
        (["--save-memory", "pipe"], 1, "--save-memory pipe cannot be written: it is no ordinary file"),
        (["--memory", "none"], 1, "--memory none cannot be read: No such file"),
        (["--memory", "runs/landmark/model.safetensors"], 1, "it holds no memory of a reader"),
        (["--model", "runs/baseline", "--memory", "none"], 2, "--memory: runs/baseline has no landmarks"),
        (["--model", "runs/baseline", "--save-memory", "unkept"], 2, "--save-memory: runs/baseline has no landmarks"),
        (["--memory", "runs/landmark/config.json", "--top-k-blocks", "1"], 1, "--memory runs/landmark/config.json"),
    ],
)
def test_mistakes_with_memories(landmark, workplace, arguments, code, message):
    if not (workplace / "pipe").exists():
        os.mkfifo(workplace / "pipe")
    result = landmark("generate", "--prompt", "a", *arguments)
    assert (result.code, message in result.err) == (code, True), result.err
    assert "Traceback" not in result.err and not result.out and not (workplace / "unkept").exists()
    assert (workplace / "pipe").is_fifo()


def test_nothing_to_ask(landmark, workplace):
    landmark("generate", "--prompt", "It was", "--save-memory", "short", "--max-new-tokens", "0")
    result = landmark("generate", "--memory", "short", "--prompt", "")
    assert result.code == 2 and "the prompt is empty" in result.err
    result = landmark("generate", "--memory", "short", "--prompt", "a", "--top-k-blocks", "1")
    assert result.code == 2 and "was read with --top-k-blocks 2, and this is to be read with 1" in result.err
