"""`landmark prepare tasks` as a user runs it."""

import json


def test_documents_to_mix_into_training(landmark, workplace):
    arguments = ["prepare", "tasks", "--longest", "400", "--max-documents", "30", "--validation-share", "0.1"]
    result = landmark(*arguments, "--output", "tasks", "--json", "-")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert (data["train"]["documents"], data["validation"]["documents"]) == (27, 3)
    assert 27 * 250 < data["train"]["tokens"] < 27 * 410
    others = [["--seed", "1"], ["--absent", "0.9"], ["--kinds", "chain", "--kinds", "completion"]]
    for number, more in enumerate([*others, ["--haystack", str(workplace / "story.txt")]]):
        (workplace / "story.txt").write_text("A barge came down the river. It was late. " * 400)
        result = landmark(*arguments, "--output", f"other{number}", *more)
        assert result.code == 0, result.err
        other = workplace / f"other{number}/train.bin"
        assert (workplace / "tasks/train.bin").read_bytes() != other.read_bytes()
        assert f"haystack: {more[1] if '--haystack' in more else 'five novels'}" in result.err
    again = landmark(*arguments, "--output", "tasks")
    assert "holds token files made from this very source already" in again.err


def test_mistakes(landmark):
    assert "tasks makes its documents itself, of --haystack" in landmark("prepare", "tasks", "--source", "x").err
    result = landmark("prepare", "tasks", "--longest", "100")
    assert result.code == 2 and "of 256 to 100 tokens cannot be" in result.err
    result = landmark("prepare", "tasks", "--haystack", "nowhere.txt")
    assert result.code == 1 and "nowhere.txt" in result.err
    result = landmark("prepare", "tasks", "--kinds", "riddle")
    assert result.code == 2 and "riddle" in result.err
    assert "--kinds means nothing for sample: it is for tasks" in landmark("prepare", "--kinds", "chain").err
    assert "--haystack means nothing for text: it is for tasks" in landmark("prepare", "text", "--haystack", "x").err
