"""benchmarks/long_training.py: the row of whole steps over a million tokens says what it measured, whatever follows.

On a CPU and at lengths of hundreds of tokens: what is timed is no matter here.
"""

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.modules import load_script

SHORT = 512
TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "landmark_token_id": 95}  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root)
    return load_script(root / "benchmarks/long_training.py")


@pytest.fixture
def steps(script, monkeypatch):
    import benchmarks.long_context_steps as models
    import benchmarks.long_training_steps as steps
    import benchmarks.reading_windows as windows

    cpu = torch.device("cpu")
    for module, name, value in (
        (models, "DEVICE", cpu), (windows, "DEVICE", cpu), (windows, "CHUNK", 128), (steps, "DEVICE", cpu),
        (steps, "LENGTHS", (SHORT, 2 * SHORT)), (steps, "milliseconds", timed), (steps, "gibibytes", peak),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.setitem(models.SHAPES, "smollm2", TINY)
    return steps


def timed(work):
    work()
    return 2.0


def peak(work):
    work()
    return 1.5


def test_steps_of_both_lengths_and_what_they_come_to(script, steps, monkeypatch, tmp_path, capsys):
    output = tmp_path / "rows.md"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    monkeypatch.setattr(script, "compile_first", lambda rows: lambda: None)
    monkeypatch.setattr(sys, "argv", ["long_training.py", "--rows", "1m-step", "--output", str(output)])
    script.main()
    found = [re.sub(r" \(\d+ s\)$", "", line) for line in output.read_text().splitlines()]
    at = found.index("0k: first step 2 ms, 1.5 GiB")
    assert found[at:] == [
        "0k: first step 2 ms, 1.5 GiB",
        "0k: 2 ms, 256000 tokens/s, 1.5 GiB",
        "1k: first step 2 ms, 1.5 GiB",
        "1k: 2 ms, 512000 tokens/s, 1.5 GiB",
        "1k at 2.00 of the speed at 0k (target 0.6)",
        "1k, blocks chosen and read twice: first step 2 ms, 1.5 GiB",
        "1k, blocks chosen and read twice: 2 ms, 512000 tokens/s, 1.5 GiB",
        "1k at 2.00 of the speed at 0k (target 0.6)",
    ]
    assert "no GPU" in found[0] and found[at] in capsys.readouterr().out


def test_what_there_is_no_time_for_is_left_out(steps):
    *_, last = steps.million_step_row(1, lambda: 99.999, limit=100.0)
    assert last == "1k, blocks chosen and read twice: left out, there is no time for it"


def test_a_length_that_takes_too_much_memory_loses_no_other(steps, monkeypatch):
    usual = steps.training_step("smollm2", None)

    def full(tokens, keep_retrieved=True):
        if keep_retrieved and tokens > SHORT:
            raise torch.cuda.OutOfMemoryError("full")
        return usual(tokens, keep_retrieved=keep_retrieved)

    monkeypatch.setattr(steps, "training_step", lambda *shape: full)
    found = list(steps.million_step_row(1, lambda: 0.0))
    assert "1k: out of memory" in found and found[-1] == "1k at 2.00 of the speed at 0k (target 0.6)"


def test_a_row_that_fails_loses_nothing_that_it_said(script):
    def row():
        yield "32k: 5 ms"
        raise RuntimeError("device lost")

    assert list(script.saying("1m-step", row)) == ["32k: 5 ms", "## 1m-step: RuntimeError: device lost"]
    assert list(script.saying("check", lambda: "fine")) == ["fine"]


def test_lengths_are_named_as_they_are_spoken_of(steps):
    assert [steps.named(n) for n in (32 << 10, 1 << 20)] == ["32k", "1M"]
