"""Paths that rich would take for markup or emoji codes, in a whole command."""

import json

import pytest


@pytest.mark.parametrize("name", ["tok[/b]", "x[red]y", "[v2]", ":smile:"])
def test_prepare_shows_its_output_as_it_is(landmark, tmp_path, name):
    (tmp_path / "a.txt").write_text("Some text. " * 100)
    result = landmark("prepare", "text", "--source", tmp_path / "a.txt", "--output", tmp_path / name)
    assert result.code == 0, result.err
    assert str(tmp_path / name / "train.bin") in result.out
    assert (tmp_path / name / "train.bin").is_file()


def test_prepare_names_the_line_that_is_wrong(landmark, tmp_path):
    lines = [json.dumps({"text": "fine"})] * 150
    lines[99] = "not JSON"
    (tmp_path / "e.jsonl").write_text("\n".join(lines) + "\n")
    result = landmark("prepare", "text", "--source", tmp_path / "e.jsonl", "--output", tmp_path / "out")
    assert result.code == 1
    assert "e.jsonl:100: not JSON" in result.err
