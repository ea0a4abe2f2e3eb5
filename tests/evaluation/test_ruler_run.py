"""RULER's tasks asked and judged: models that know every answer or none, batches, what is kept, tables and pictures."""

import signal
from dataclasses import replace

import pytest

from landmark_cli.errors import Stopped
from landmark_cli.evaluation.ruler import lists, run
from landmark_cli.evaluation.ruler.benchmark import GENERATED
from landmark_cli.evaluation.ruler.report import FoundByDepth, by_way, draw_ruler, mean_data, ruler_data, ruler_table
from landmark_cli.evaluation.ruler.run import Answer, Cell, judge, measure
from landmark_cli.evaluation.ruler.score import bootstrap_interval, found_in, score
from landmark_cli.evaluation.studies import FinishedRows
from landmark_cli.evaluation.ways import Way, ways_of
from landmark_cli.inference.settings import ReadingSettings
from landmark_cli.interrupts import Interrupts
from tests.evaluation.ruler import GPT2, Oracle, tasks_of
from tests.tiny import tiny_baseline, tiny_model

LENGTHS = [400, 500]
FEW = ["niah_single_1", "niah_multivalue", "fwe"]
FULL = Way(None, full=True)


@pytest.fixture(scope="module")
def tasks():
    return tasks_of(GPT2)


def oracle(tasks, says, lengths=LENGTHS, samples=2):
    """A model that answers sample s of a task by says(prompt, task)."""
    prompts = [(task, task.make(sample, length)) for task in tasks for length in lengths for sample in range(samples)]
    return Oracle(GPT2, {tuple(prompt.tokens.tolist()): says(prompt, task) for task, prompt in prompts})


def ask(model, tasks, output, lengths=LENGTHS, way=FULL, samples=2, asked=None, **more):
    asked = Interrupts("working") if asked is None else asked
    settings = {"samples": samples, "depends_on": {"model": "a"}, **more}
    return measure(model, GPT2, tasks, lengths, way, FinishedRows(output / "a.jsonl"), asked, **settings)


def right(prompt, task):
    return " " + ", ".join(prompt.references).upper() + "."


def wrong(prompt, task):
    """What stands in the prompt as well, but is not asked for: the references, turned round."""
    return " " + ", ".join(reference[::-1] + "!" for reference in prompt.references)[:60]


@pytest.mark.parametrize("says, expected", [(right, 1.0), (wrong, 0.0)])
def test_all_tasks_from_end_to_end(tasks, tmp_path, says, expected):
    assert list(tasks) == list(GENERATED)
    chosen = list(tasks.values())
    cells = ask(oracle(chosen, says, [1100]), chosen, tmp_path, [1100])
    assert [(cell.task, cell.length, cell.mean) for cell in cells] == [(name, 1100, expected) for name in GENERATED]
    assert all(cell.interval == (expected, expected) for cell in cells)


def test_a_part_of_the_references(tasks, tmp_path):
    task = tasks["niah_multivalue"]
    model = oracle([task], lambda prompt, _: " " + " ".join(prompt.references[1:]))
    cells = ask(model, [task], tmp_path)
    assert [cell.mean for cell in cells] == [0.75, 0.75]
    assert cells[0].answers[0].found == [False, True, True, True]


def test_judging():
    assert found_in("It is ABC-1, and d.", ["abc-1", "D", "e"]) == [True, True, False]
    assert score([True, False, False, True]) == 0.5
    assert (score([False, True], any_of=True), score([False], any_of=True)) == (1.0, 0.0)


def test_bootstrap_interval():
    half = bootstrap_interval([0.0, 1.0] * 25)
    # As for a share of 50: 1.96 standard errors of 0.07.
    assert abs(half[0] - 0.36) < 0.03 and abs(half[1] - 0.64) < 0.03
    assert bootstrap_interval([0.5] * 9) == (0.5, 0.5)
    assert bootstrap_interval([0.0, 1.0] * 25) == half
    # Of two groups each is drawn by itself: a sure one halves the other's width.
    low, high = bootstrap_interval([0.0, 1.0] * 25, [1.0] * 50)
    assert abs(low - (1 + half[0]) / 2) < 0.01 and abs(high - (1 + half[1]) / 2) < 0.01


def test_answers_are_kept_and_only_missing_ones_asked(tasks, tmp_path, capsys):
    chosen = [tasks[name] for name in FEW]
    model = oracle(chosen, right, samples=3)
    first = ask(model, chosen, tmp_path)
    assert model.asked == 2 * 2 * 3
    assert ask(model, chosen, tmp_path) == first and model.asked == 12
    assert "12 of 12 answers are kept from an earlier run" in capsys.readouterr().err
    # More samples, then another length: the answers so far count.
    assert [len(cell.answers) for cell in ask(model, chosen, tmp_path, samples=3)] == [3] * 6
    assert model.asked == 18
    # A line that was damaged is asked again, and so is all that depends on something that has changed.
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:4], lines[4].replace("true", "false"), *lines[5:]]) + "\n")
    assert ask(model, chosen, tmp_path) == first and model.asked == 19
    for changed in ({"depends_on": {"model": "b"}}, {"way": Way(None)}):
        before = model.asked
        ask(model, chosen, tmp_path, **changed)
        assert model.asked == before + 12
    ask(model, chosen, tmp_path, reading=ReadingSettings(chunk=3))
    assert model.asked == 19 + 24, "full attention has no settings of reading"


def test_another_haystack_is_asked_again(tmp_path):
    (tmp_path / "hay.txt").write_text("It was a fine day. " * 90)
    model, asked = None, []
    for haystack in (None, tmp_path / "hay.txt"):
        chosen = list(tasks_of(GPT2, ["niah_single_1", "niah_single_2"], haystack=haystack).values())
        model = oracle(chosen, right)
        ask(model, chosen, tmp_path)
        asked.append(model.asked)
    assert asked == [8, 4]


def test_an_interrupted_run_goes_on(tasks, tmp_path, monkeypatch):
    chosen = [tasks[name] for name in FEW]
    model = oracle(chosen, right)
    whole = ask(model, chosen, tmp_path / "whole")
    model.asked = 0
    asked, batches = Interrupts("finishing the prompts under way"), []
    real = run._ask

    def ask_and_be_stopped(*arguments):
        batches.append(1)
        if len(batches) == 3:
            asked.note(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(run, "_ask", ask_and_be_stopped)
    with pytest.raises(Stopped, match="what was answered is kept; go on with") as stopped:
        ask(model, chosen, tmp_path, asked=asked, batch_size=1)
    assert stopped.value.exit_code == 143 and model.asked == 3
    assert ask(model, chosen, tmp_path) == whole and model.asked == 12


def test_batches_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "FREQUENT_TOKENS", 12)
    model = tiny_model(landmark_token_id=50260, vocab_size=50304)
    chosen, way = list(tasks_of(GPT2, ["fwe"]).values()), Way(2)
    alone, together = (
        ask(model, chosen, tmp_path / str(size), [300], way, 3, batch_size=size, reading=ReadingSettings(chunk=100))
        for size in (1, 3)
    )
    assert alone == together and all(answer.answer for answer in alone[0].answers)
    other = ask(model, chosen, tmp_path, [300], Way(0), 3, reading=ReadingSettings(chunk=100))
    assert [a.answer for a in other[0].answers] != [a.answer for a in alone[0].answers]


def test_ways_of_reading():
    landmark, baseline = tiny_model(), tiny_baseline()
    assert ways_of(landmark, None, False) == [Way(2)]
    assert ways_of(landmark, [4, 0, 4], True) == [Way(4), Way(0), FULL]
    assert ways_of(baseline, None, False) == [Way(None)] and ways_of(baseline, None, True) == [FULL]
    assert [way.name for way in (Way(4), Way(None), FULL)] == ["top-k 4", "own window", "full attention"]


def test_full_attention_ends_at_the_positions(tasks, tmp_path, capsys):
    chosen = [tasks["niah_single_1"]]
    model = oracle(chosen, right)
    model.config.max_position_embeddings = 450
    assert [cell.length for cell in ask(model, chosen, tmp_path)] == [400]
    assert "full attention is not asked at 500: the model knows 450 positions" in capsys.readouterr().err


def cells():
    answer = Answer(["a", "b"], [True, False], [0.0, 1.0], "a", 0.5)
    none = replace(answer, depths=None, score=1.0)
    return [
        Cell(Way(2), "niah_multiquery", 100, [answer, answer]),
        Cell(Way(2), "cwe", 100, [none, none]),
        Cell(FULL, "niah_multiquery", 100, [answer]),
        Cell(Way(2), "niah_multiquery", 200, [answer]),
    ]


def test_tables_data_and_pictures(tmp_path):
    answer = cells()[0].answers[0]
    columns, rows = ruler_table(cells(), [100, 200])
    assert columns == ["reading", "task", "100", "200"]
    assert rows == [
        ["top-k 2", "niah_multiquery", "0.500 (0.50-0.50)", "0.500 (0.50-0.50)"],
        ["top-k 2", "cwe", "1.000 (1.00-1.00)", "-"],
        ["top-k 2", "mean", "0.750 (0.75-0.75)", "0.500 (0.50-0.50)"],
        ["full attention", "niah_multiquery", "0.500 (0.50-0.50)", "-"],
    ]
    begun = Cell(Way(2), "niah_single_2", 100, [replace(answer, begin=begin) for begin in (70, 0)])
    assert [one["begins"] for one in ruler_data([*cells()[:1], begun])] == [None, [70, 0]]
    data = ruler_data(cells())
    assert data[0]["answers"][0]["answer"] == "a" and data[0]["interval"] == (0.5, 0.5)
    assert mean_data(cells())[0] == {
        "reading": "top-k 2",
        "tokens": 100,
        "tasks": 2,
        "score": 0.75,
        "interval": (0.75, 0.75),
    }
    assert [(one["reading"], one["tokens"]) for one in mean_data(cells())][1:] == [
        ("top-k 2", 200),
        ("full attention", 100),
    ]
    found = FoundByDepth(by_way(cells())[Way(2)])
    shares = {depths[0]: found.cell(100, depths) for depths in found.depths}
    assert (shares[0.0].prompts, shares[0.0].found, shares[0.9].prompts, shares[0.9].found) == (2, 2, 2, 0)
    assert not FoundByDepth(cells()[1:2])
    for some in (cells(), cells()[1:2]):
        columns = {way.name: of_way for way, of_way in by_way(some).items()}
        draw_ruler(tmp_path / "new" / "map.png", columns, "a title of $_{$")
        assert (tmp_path / "new" / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_answer_is_judged_whole_and_kept_in_part(tasks):
    prompt = tasks["niah_single_1"].make(0, 600)
    answer = judge(tasks["niah_single_1"], prompt, "x" * 5000 + prompt.references[0])
    assert answer.score == 1.0 and len(answer.answer) == run.LONGEST_ANSWER
