"""Every command that reads warns, once, where chunks take more positions than the model was trained at; a study says of
which of its rows that is to be expected, before it measures any."""

import json

import pytest

READ = {
    "generate": ["generate", "--prompt", "It was the best of times " * 40, "--max-new-tokens", "2"],
    "eval perplexity": ["eval", "perplexity", "--data", "data/mine", "--eval-length", "200"],
    "eval passkey": ["eval", "passkey", "--lengths", "200,300", "--prompts", "2"],
    "eval ruler": ["eval", "ruler", "--tasks", "fwe", "--lengths", "300", "--samples", "1"],
    "eval longppl": ["eval", "longppl", "--data", "data/mine", "--eval-length", "200", "--short-context", "30"]
    + ["--stride", "30", "--evaluator", "runs/landmark"],
}
SAID = "100 text tokens beside 2 blocks take up to"


@pytest.mark.parametrize("words", READ)
def test_chunks_beyond_the_trained_length_are_warned_of_once(landmark, tmp_path, words):
    given = READ[words] + (["--output", tmp_path] if words in ("eval ruler", "eval longppl") else [])
    done = landmark(*given, "--model", "runs/landmark", "--chunk", "100", "--quiet")
    assert done.code == 0
    assert done.err.count(SAID) == 1 and "more than the 40 that runs/landmark was trained at" in done.err


@pytest.mark.parametrize("words", READ)
def test_what_was_trained_is_not_warned_of(landmark, tmp_path, words):
    given = READ[words] + (["--output", tmp_path] if words in ("eval ruler", "eval longppl") else [])
    done = landmark(*given, "--model", "runs/landmark", "--quiet")
    assert done.code == 0 and "may mislead" not in done.err


def study_of(path, kind, **rows):
    """A study of so many rows, by the role's model."""
    content = {"study": kind, "roles": {"a": "a model"}, "rows": [{"role": "a", **row} for row in rows.values()]}
    path.write_text(json.dumps(content))
    return path


def test_a_study_names_the_rows_that_may_mislead_before_it_measures(landmark, tmp_path, monkeypatch):
    monkeypatch.setattr("landmark_cli.commands.study_rows.open_model", lambda *_, **__: pytest.fail("measured"))
    study = study_of(
        tmp_path / "some.yaml",
        "perplexity",
        fine={"eval-length": 200},
        long={"eval-length": 200, "chunk": 100},
        alone={"eval-length": 200, "chunk": 90, "memory": False},
        short={"eval-length": 8, "chunk": 100},
        again={"eval-length": 300, "chunk": 100},
    )
    said = landmark("eval", "study", study, "--role", "a=runs/landmark", "--data", "data/mine", "--output", tmp_path)
    assert f"warning: study some, rows 2, 5: chunks of {SAID}" in said.err
    assert "warning: study some, row 3: chunks of 90 text tokens are longer than the 32 that" in said.err
    assert said.err.count("warning:") == 2


def test_a_study_names_the_rows_that_stay_empty(landmark, tmp_path):
    rows = {"tasks": ["fwe"], "length": 300}
    study = study_of(tmp_path / "asked.yaml", "ruler", full=rows | {"full-attention": True}, own=rows)
    given = ["--role", "a=runs/landmark", "--samples", "1", "--output", tmp_path]
    done = landmark("eval", "study", study, *given)
    assert done.code == 0
    warned = [line for line in done.err.splitlines() if line.startswith("warning:")]
    (full,) = warned
    assert full == "warning: study asked, row 1: full attention is not asked at 300: the model knows 40 positions"
