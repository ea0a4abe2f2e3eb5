"""Readers of prompts: opened once for all batches of a length, forgetful between them; how many prompts fit."""

from types import SimpleNamespace

import pytest
import torch

from landmark_cli.evaluation import passkey, prompts
from landmark_cli.evaluation.passkey import evaluate_passkey
from landmark_cli.evaluation.prompts import PromptReaders, at_a_time
from landmark_cli.evaluation.ruler import run
from landmark_cli.evaluation.ruler.run import measure
from landmark_cli.evaluation.studies import FinishedRows
from landmark_cli.evaluation.ways import Way
from landmark_cli.inference.readers import layer_token_bytes
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.interrupts import Interrupts
from tests.evaluation.ruler import GPT2, tasks_of
from tests.tiny import tiny_llama, tiny_model, tiny_text


@pytest.fixture
def opened(monkeypatch):
    """The numbers of prompts that readers were opened for."""
    numbers, real = [], prompts.open_reader

    def open_reader(model, reading, batch, **more):
        numbers.append(batch)
        return real(model, reading, batch, **more)

    monkeypatch.setattr(prompts, "open_reader", open_reader)
    return numbers


def test_a_reader_serves_all_batches_of_a_length(tmp_path, opened, monkeypatch):
    for module in (run, passkey):
        monkeypatch.setattr(module, "generate", lambda *given, reader: [SimpleNamespace(text="")] * reader.batch)
    model, reading = tiny_model(landmark_token_id=50260, vocab_size=50304), ReadingSettings(chunk=100)
    tasks = list(tasks_of(GPT2, ["fwe", "niah_single_1"]).values())
    finished, settings = FinishedRows(tmp_path / "a.jsonl"), {"depends_on": {}, "reading": reading}
    cells = measure(
        model, GPT2, tasks, [260, 280], Way(2), finished, Interrupts(""), samples=5, batch_size=2, **settings
    )
    # Two prompts, and the one that is left over, at either length, whatever the number of batches and tasks.
    assert opened == [2, 1, 2, 1]
    assert [(cell.task, cell.length) for cell in cells] == [
        (name, length) for name in ("fwe", "niah_single_1") for length in (260, 280)
    ]
    opened.clear()
    evaluate_passkey(model, GPT2, [140, 150], prompts=4, batch_size=2, reading=reading)
    assert opened == [2, 2]


def test_a_reader_forgets_between_batches():
    model, text = tiny_model(), tiny_text(30)
    readers = PromptReaders(model, ReadingSettings())
    first = readers.of(1, 40)
    alone = [part.logits for part in first.read([text])]
    assert readers.of(1, 40) is first and readers.of(2, 40) is not first
    again = [part.logits for part in readers.of(1, 40).read([text])]
    assert all((a == b).all() for a, b in zip(alone, again, strict=True))
    assert readers.of(1, 41) is not first


def test_full_attention_has_a_window_for_prompt_and_answer():
    assert PromptReaders(tiny_llama(), ReadingSettings(), full_attention=True).of(1, 77).window == 77


def asked_of(readers, number, most, error=None):
    """Has `number` prompts asked where memory holds readers of `most` prompts together: the sizes of all batches, and
    what came of each."""
    tries, error = [], error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    def ask(batch, reader):
        tries.append(len(batch))
        assert reader.batch == len(batch)
        if sum(readers._readers) > most:
            raise error
        return [-prompt for prompt in batch]

    return tries, [list(zip(*answered, strict=True)) for answered in readers.ask(iter(range(number)), 100, ask)]


@pytest.fixture
def readers(monkeypatch):
    """Eight prompts at a time, as long as there is room."""
    monkeypatch.setattr(prompts, "HOST_TOKENS", 800)
    return PromptReaders(tiny_model(), ReadingSettings())


def test_where_memory_runs_out_half_as_many_are_asked_again(readers, capsys):
    tries, answered = asked_of(readers, 13, 3)
    # What is left of the first eight is filled up from those that wait.
    assert tries == [8, 4] + [2] * 6 + [1]
    assert sum(answered, []) == [(prompt, -prompt) for prompt in range(13)]
    said = ["less memory is free than was: 4 prompts at a time from here on"]
    said += ["less memory is free than was: 2 prompts at a time from here on"]
    assert capsys.readouterr().err.splitlines() == said
    # The same length goes on so, another one begins anew.
    assert (readers.at_a_time(100), readers.at_a_time(200), readers.at_a_time(100)) == (2, 4, 8)


def test_the_last_prompts_are_not_fewer_where_an_idle_reader_has_their_room(readers, capsys):
    tries, answered = asked_of(readers, 19, 9)
    assert tries == [8, 8, 3, 3] and [len(one) for one in answered] == [8, 8, 3]
    assert readers.at_a_time(100) == 8 and not capsys.readouterr().err


def test_one_prompt_has_no_half_but_an_idle_readers_room(readers, capsys):
    assert asked_of(readers, 9, 8)[0] == [8, 1, 1] and not capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):
        asked_of(readers, 1, 0)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_memory_runs_out_in_other_words_too(readers, words):
    assert asked_of(readers, 8, 4, RuntimeError(words))[0] == [8, 4, 4]


def test_other_errors_and_numbers_that_were_given_are_as_they_were(readers):
    with pytest.raises(RuntimeError, match="CUDA error: an illegal memory access"):
        asked_of(readers, 8, 4, RuntimeError("CUDA error: an illegal memory access was encountered"))
    given = PromptReaders(tiny_model(), ReadingSettings(), batch_size=5)
    assert asked_of(given, 6, 10)[0] == [5, 1]
    with pytest.raises(torch.OutOfMemoryError):
        asked_of(given, 6, 4)


@pytest.mark.parametrize(
    ("length", "chunk", "memory", "expected"),
    [
        (1024, 8000, 10**12, 128),  # as many as one pass takes
        (65536, 8192, 10**12, 16),  # of longer prompts a chunk at a time counts
        (65536, 8192, 65536 * 100 * 5 + 1, 5),  # what fits into memory
        (65536, 8192, 0, 1),  # but one in any case
        (1_000_000, 200_000, 10**15, 1),
    ],
)
def test_how_many_fit(length, chunk, memory, expected):
    assert at_a_time(length, chunk, 100, memory) == expected


def test_memory_is_asked_for_where_keys_and_values_lie(monkeypatch):
    """On a GPU what is free there, and what this process has reserved and not filled; else the host's."""
    monkeypatch.setattr("landmark_cli.attention.cache.pages.available_host_memory", lambda: 400_000)
    for name, value in {
        "mem_get_info": (300_000, 10**9),
        "memory_reserved": 60_000,
        "memory_allocated": 40_000,
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, value=value: value)
    model = tiny_model()
    # 2 layers, keys and values of 16 numbers of 4 bytes; 100 tokens of a prompt.
    prompt_bytes = 100 * 2 * 2 * 16 * 4
    found = {}
    for offload, full in (("none", False), ("cpu", False), ("cpu", True)):
        readers = PromptReaders(model, ReadingSettings(chunk=1), full_attention=full)
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        readers._open = lambda *_: SimpleNamespace(chunk=1)
        readers._reading = ReadingSettings(offload=offload)
        found[offload, full] = readers.fitting(100)
    free = 320_000
    assert found == {
        ("none", False): free // 4 // prompt_bytes,
        ("cpu", False): 400_000 // 4 // prompt_bytes,
        ("cpu", True): free // 4 // prompt_bytes,
    }


def test_bytes_of_a_token():
    # Keys and values of 1 head of 8 numbers in float32; of 2 heads in bfloat16.
    assert layer_token_bytes(tiny_llama()) == 2 * 8 * 4
    assert layer_token_bytes(tiny_model().bfloat16()) == 2 * 2 * 8 * 2
