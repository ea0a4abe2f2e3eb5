"""Programs of others, started with our models known."""

import sys
from importlib.metadata import EntryPoint

import pytest

from landmark_cli import beside


def other_program() -> int:
    """Stands for a program that uses transformers and knows nothing of us."""
    from transformers import AutoConfig

    assert AutoConfig.for_model("landmark_gpt").landmark_freq == 50
    assert sys.argv == ["other", "serve", "--device", "cpu"]
    return 7


def test_a_program_runs_with_our_models_known(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    found = EntryPoint("other", "tests.test_beside:other_program", "console_scripts")
    monkeypatch.setattr(beside, "entry_points", lambda group, name: [found] if name == "other" else [])
    monkeypatch.setattr(EntryPoint, "load", lambda self: other_program)
    assert beside.main(["other", "serve", "--device", "cpu"]) == 7


@pytest.mark.parametrize("words", [[], ["--help"], ["no-such-program-anywhere"]])
def test_no_such_program(words, capsys):
    assert beside.main(words) == 2
    said = capsys.readouterr().err
    assert "PROGRAM" in said or "no-such-program-anywhere" in said
