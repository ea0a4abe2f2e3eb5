"""Studies: the shipped ones are the paper's, an interrupted one goes on, and mistakes are named."""

import csv
import json
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from landmark_cli.commands import study as command
from landmark_cli.commands import study_rows
from landmark_cli.commands.evaluate import PassKeyOptions, run_passkey
from landmark_cli.commands.longppl import LongPerplexityOptions
from landmark_cli.commands.longppl import run as run_longppl
from landmark_cli.commands.study import StudyOptions
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError, Stopped, UsageError
from landmark_cli.evaluation import longppl, passkey, studies
from landmark_cli.evaluation.perplexity import PerplexityResult
from landmark_cli.evaluation.report import draw_study, study_table, write_tables
from landmark_cli.evaluation.ruler import haystacks
from landmark_cli.evaluation.ruler import run as ruler_run
from landmark_cli.evaluation.score import Score
from landmark_cli.evaluation.studies import FinishedRows, Row, Study, describe, load_study
from landmark_cli.models import register
from landmark_cli.models.gpt import GPTConfig, GPTForCausalLM
from tests.gpt2 import small_gpt2

register()
STUDY = """
study: perplexity
title: A small study
roles: {landmark: with landmarks, xl: with a memory, miss: with a context-miss token}
rows:
  - {role: landmark, eval-length: 40, chunk: 8, top-k-blocks: 1, paper: {pg19: 16.5}}
  - {role: landmark, eval-length: 40, chunk: 8, top-k-blocks: 2, selection: max_over_heads}
  - {role: landmark, eval-length: 40, memory: false, chunk: 20}
  - {role: xl, eval-length: 40}
  - {role: miss, eval-length: 40, chunk: 8, top-k-blocks: 2, context-miss-cutoff: 0.2}
"""
SHAPES = {
    "landmark": {"landmark_freq": 4, "trained_length": 40},
    "xl": {"landmark_freq": None, "memory_length": 8, "segment_length": 8},
    "miss": {"landmark_freq": 4, "trained_length": 40, "context_miss_token": True},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A study file, a token file and tiny models of every role."""
    folder = tmp_path_factory.mktemp("study")
    tokenizer = small_gpt2(folder / "tokenizer")
    (folder / "small.yaml").write_text(STUDY)
    with TokenFileWriter(folder / "validation.bin", tokenizer, source="random ids") as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 8000, 130))
    # How many key tokens there are depends on the weights.
    torch.manual_seed(0)
    for role, shape in SHAPES.items():
        save(folder, role, **shape)
    return folder


def save(place, name, **shape):
    """A tiny model of the place's, under this name."""
    tokenizer = load_tokenizer(str(place / "tokenizer"))
    ids = {"vocab_size": tokenizer.landmark_id + 1, "eos_token_id": tokenizer.eot_id}
    ids["landmark_token_id"] = tokenizer.landmark_id
    GPTForCausalLM(GPTConfig(n_layer=1, n_head=2, n_embd=8, **ids | shape)).save_pretrained(place / name)
    tokenizer.save_pretrained(place / name)


def options(place, output, roles=("landmark", "xl", "miss"), **changes):
    chosen = [f"{role}={place / role}" for role in roles]
    settings = {"study": str(place / "small.yaml"), "role": chosen, "data": place / "validation.bin", "output": output}
    return StudyOptions(**settings | {"device": "cpu"} | changes)


def test_a_study_measures_every_row_and_writes_its_tables(place, tmp_path):
    command.run(options(place, tmp_path, plot=True))
    data = json.loads((tmp_path / "small.json").read_text())
    results = [row["result"] for row in data["rows"]]
    assert [result["eval_length"] for result in results] == [40] * 5
    assert [result["memory"] for result in results] == [True, True, False, True, True]
    assert results[0]["reading"]["top_k_blocks"] == 1 and results[1]["reading"]["selection"] == "max_over_heads"
    assert results[3]["chunk"] == 8 and results[3]["reading"] is None
    assert 0 <= results[4]["dropped_retrievals"] <= 1
    assert len({result["perplexity"] for result in results}) == 5
    with (tmp_path / "small.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["paper: pg19"] == "16.5" and rows[1]["paper: pg19"] == ""
    assert [float(row["perplexity"]) for row in rows] == [result["perplexity"] for result in results]
    assert (tmp_path / "small.md").read_text().count("\n| ") == 7
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["a$_{$b", "_hidden", "a|b", "[b]", ":smile:"])
def test_tables_and_pictures_show_names_as_they_are(tmp_path, monkeypatch, name):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **_: (figure.draw_without_rendering(), drawn.append(figure))
    )
    row = Row(name, {"eval-length": 40})
    study = Study("small", name, {name: "any model"}, [row, row])
    results = [{"eval_length": 40, "loss": 0.7, "perplexity": 2.0, "accuracy": 0.5, "dropped_retrievals": None}, None]
    draw_study(tmp_path / "small.png", study, results)
    (axes,) = drawn[0].axes
    assert axes.get_title() == name
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [name]
    write_tables(tmp_path, study, *study_table(study, results, []), {})
    table = (tmp_path / "small.md").read_text().splitlines()[2:]
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in table]
    assert [len(line) for line in cells] == [4] * 4
    assert cells[2][0].strip().replace("\\|", "|") == name


RULER = """
study: ruler
roles: {landmark: with landmarks, plain: without}
rows:
  - {role: landmark, length: 300, chunk: 100, top-k-blocks: 1, tasks: fwe}
  - {role: landmark, length: 300, chunk: 100, top-k-blocks: 2, tasks: [fwe, niah_single_1]}
  - {role: plain, length: 300, full-attention: true, tasks: [fwe]}
  - {role: plain, length: 400, full-attention: true, tasks: [fwe]}
"""


def test_a_study_of_ruler(place, tmp_path, monkeypatch, capsys):
    """Rows as `eval ruler` measures them, every answer kept."""
    save(place, "plain", landmark_freq=None, max_position_embeddings=300)
    (tmp_path / "asked.yaml").write_text(RULER)
    said = iter(range(100))

    def generate(model, tokenizer, prompts, sampling, *, reader):
        return [SimpleNamespace(text=f" answer {next(said)}") for _ in prompts]

    monkeypatch.setattr(ruler_run, "generate", generate)
    # Every third answer is right.
    monkeypatch.setattr(ruler_run, "found_in", lambda answer, references: [answer.endswith(("0", "3", "6"))])
    haystacks_made = []

    class Counted(haystacks.Prose):
        def __init__(self, *arguments):
            haystacks_made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(haystacks, "Prose", Counted)
    chosen = {"study": str(tmp_path / "asked.yaml"), "roles": ("landmark", "plain"), "samples": 2, "plot": True}
    command.run(options(place, tmp_path, **chosen))
    data = json.loads((tmp_path / "asked.json").read_text())
    results = [row["result"] for row in data["rows"]]
    # A text is encoded once for all rows of a model.
    assert len(haystacks_made) == 2
    assert (data["samples"], data["text"]) == (2, "the shipped novels")
    # Answers of the first row: 0 and 1; the second: 2 and 3, 4 and 5; the third: 6 and 7; none beyond the positions.
    assert [result["score"] for result in results] == [0.5, 0.25, 0.5, None]
    assert [result["reading"] for result in results] == ["top-k 1", "top-k 2", "full attention", "full attention"]
    assert results[1]["tasks"] == {"niah_single_1": 0.5, "fwe": 0.0} and results[1]["interval"] == [0.0, 0.5]
    assert "full attention is not asked at 400: the model knows 300 positions" in capsys.readouterr().err
    with (tmp_path / "asked.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["score"] for row in rows] == ["0.5", "0.25", "0.5", ""] and rows[1]["tasks"] == "fwe, niah_single_1"
    assert rows[1]["95 % interval"] == "0.00-0.50" and rows[1]["answers"] == "4"
    assert (tmp_path / "asked.png").read_bytes().startswith(b"\x89PNG")
    # Rows that were lost are made of the answers that were kept.
    (tmp_path / "rows.jsonl").unlink()
    command.run(options(place, tmp_path, **chosen))
    assert json.loads((tmp_path / "asked.json").read_text()) == data and next(said) == 8
    command.run(options(place, tmp_path, **chosen | {"samples": 3}))
    assert next(said) == 13
    (tmp_path / "asked.yaml").write_text(RULER.replace("[fwe]", "[fwee]"))
    with pytest.raises(UsageError, match="study asked, row 3: --tasks fwee: there is no such task; did you mean fwe"):
        command.run(options(place, tmp_path, **chosen))


LONG = """
study: longppl
roles: {judge: another model, landmark: with landmarks}
evaluator: judge
rows:
  - {role: landmark, eval-length: 40, short-context: 8, stride: 4, chunk: 8, top-k-blocks: 1}
  - {role: landmark, eval-length: 40, short-context: 8, stride: 4, chunk: 8, top-k-blocks: 2}
  - {role: judge, eval-length: 40, short-context: 8, stride: 4}
  - {role: landmark, eval-length: 60, short-context: 8, stride: 4, chunk: 8, top-k-blocks: 2}
"""


def test_a_study_of_longppl(place, tmp_path, monkeypatch, capsys):
    """Rows as `eval longppl` measures them, on the key tokens that one evaluator has found."""
    monkeypatch.setattr(longppl, "GAIN", 0.001)
    monkeypatch.setattr(longppl, "MOST_LOSS", 30.0)
    (tmp_path / "long.yaml").write_text(LONG)
    chosen = {"study": str(tmp_path / "long.yaml"), "role": [f"landmark={place / 'landmark'}", f"judge={place / 'xl'}"]}
    command.run(options(place, tmp_path / "out", (), **chosen, plot=True))
    data = json.loads((tmp_path / "out" / "long.json").read_text())
    results = [row["result"] for row in data["rows"]]
    key, every = ([result[name] for result in results] for name in ("key_tokens", "all_tokens"))
    assert key[0]["tokens"] == key[1]["tokens"] == key[2]["tokens"] > 3 and key[3]["tokens"] > 3
    assert len({one["perplexity"] for one in key}) == len({one["perplexity"] for one in every}) == 4
    assert [result["reading"] for result in results] == ["top-k 1", "top-k 2", "recurrence", "top-k 2"]
    by_command = LongPerplexityOptions(
        model=place / "landmark",
        evaluator=place / "xl",
        data=place / "validation.bin",
        eval_length=40,
        short_context=8,
        stride=4,
        chunk=8,
        top_k_blocks=[1, 2],
        output=tmp_path / "command",
        device="cpu",
    )
    alone = run_longppl(by_command)["results"]
    assert [one["key_tokens"]["tokens"] for one in alone] == [key[0]["tokens"]] * 2
    assert [one["all_tokens"]["loss"] for one in alone] == [one["loss"] for one in every[:2]]
    with (tmp_path / "out" / "long.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["key perplexity"]) == key[0]["perplexity"] and rows[0]["key tokens"] == str(key[0]["tokens"])
    assert (tmp_path / "out" / "long.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "out" / "rows.jsonl").unlink()
    capsys.readouterr()
    command.run(options(place, tmp_path / "out", (), **chosen, plot=True))
    assert json.loads((tmp_path / "out" / "long.json").read_text()) == data
    # Two sets of windows whose key tokens are kept, and four rows.
    assert capsys.readouterr().err.count("windows are kept from an earlier run") == 6
    with pytest.raises(UsageError, match="finds key tokens with the model of judge: give --role judge=MODEL"):
        command.run(options(place, tmp_path / "out", ("landmark",), study=chosen["study"]))


SEVERAL = """
study: passkey
roles: {landmark: with landmarks, plain: without}
rows:
  - {role: landmark, length: 200, chunk: 100, top-k-blocks: 2, prompts: 3}
  - {role: landmark, length: 200, chunk: 100, prompts: 1, depths: 2}
  - {role: landmark, study: ruler, length: 300, chunk: 100, tasks: [niah_single_2]}
  - {role: landmark, study: perplexity, eval-length: 40, chunk: 8, top-k-blocks: 1}
  - {role: plain, length: 200, full-attention: true}
"""


def test_rows_that_measure_several_things_open_a_model_once(place, tmp_path, monkeypatch, capsys):
    """Each row as the command measures it that measures nothing else."""
    save(place, "plain", landmark_freq=None, max_position_embeddings=300)
    opened = []

    def open_model(name, *arguments, **attention):
        opened.append(name.rsplit("/", 1)[-1])
        return real(name, *arguments, **attention)

    real = study_rows.open_model
    monkeypatch.setattr(study_rows, "open_model", open_model)
    # Every second key is found.
    monkeypatch.setattr(passkey.Trial, "found", property(lambda trial: trial.key % 2 == 0))
    (tmp_path / "several.yaml").write_text(SEVERAL)
    (tmp_path / "prose.txt").write_text("".join(f"This is sentence number {n} of the prose. " for n in range(900)))
    given = {"study": str(tmp_path / "several.yaml"), "roles": ("landmark", "plain"), "samples": 1}
    given["haystack"] = tmp_path / "prose.txt"
    data = command.run(options(place, tmp_path / "out", **given))
    assert opened == ["landmark", "plain"]
    assert [row["kind"] for row in data["rows"]] == ["passkey", "passkey", "ruler", "perplexity", "passkey"]
    assert data["measured"].keys() == {"passkey", "ruler", "perplexity"}
    keys, grid, asked, read, whole = (row["result"] for row in data["rows"])
    alone = {"lengths": [200], "device": "cpu", "haystack": tmp_path / "prose.txt"}
    by_command = [
        PassKeyOptions(**alone, model=place / "landmark", chunk=100, top_k_blocks=2, prompts=3),
        PassKeyOptions(**alone, model=place / "landmark", chunk=100, prompts=1, depths=2),
        PassKeyOptions(**alone, model=place / "plain", full_attention=True),
    ]
    for one, expected in zip((keys, grid, whole), map(run_passkey, by_command), strict=True):
        (cell,) = expected["lengths"]
        assert (one["trials"], one["found"]) == (expected["trials"], cell["found"])
        assert tuple(one["interval"]) == cell["interval"]
    assert (keys["reading"], whole["reading"], whole["prompts"]) == ("top-k 2", "full attention", 10)
    assert {trial["depth"] for trial in grid["trials"]} == {0.0, 1.0} and 0 < whole["found"] < 10
    assert asked["answers"] == 1 and read["eval_length"] == 40
    with (tmp_path / "out" / "several.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["study"] for row in rows] == ["passkey", "passkey", "ruler", "perplexity", "passkey"]
    assert [bool(row["keys found"]) for row in rows] == [True, True, False, False, True]
    assert [row["keys asked for"] for row in rows] == ["3", "2", "", "", "10"]
    assert float(rows[4]["keys found"]) == whole["accuracy"] and rows[3]["score"] == "" != rows[3]["perplexity"]
    with pytest.raises(UsageError, match="--plot: several measures passkey, ruler, perplexity, and one picture shows"):
        command.run(options(place, tmp_path / "out", **given, plot=True))
    # Another number of samples changes RULER's row alone; another haystack the keys too.
    for changes, kept in (({"samples": 2}, 4), ({"haystack": None}, 1)):
        capsys.readouterr()
        command.run(options(place, tmp_path / "out", **given | changes))
        assert capsys.readouterr().err.count(": kept from an earlier run") == kept


def test_a_study_of_pass_keys_is_drawn(place, tmp_path):
    rows = "rows: [{role: landmark, length: 200, chunk: 100}, {role: landmark, length: 300, chunk: 100}]"
    (tmp_path / "keys.yaml").write_text(f"study: passkey\nroles: {{landmark: x}}\n{rows}")
    chosen = options(place, tmp_path / "out", ("landmark",), study=str(tmp_path / "keys.yaml"), plot=True)
    assert command.run(chosen)["text"] == "the paper's filler"
    assert (tmp_path / "out" / "keys.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_study_measures_only_what_is_missing(place, tmp_path, monkeypatch, capsys):
    command.run(options(place, tmp_path))
    whole = (tmp_path / "small.json").read_text()
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:3], lines[3][: len(lines[3]) // 2]]) + "\n")
    capsys.readouterr()
    command.run(options(place, tmp_path))
    said = capsys.readouterr().err
    assert said.count("kept from an earlier run") == 3
    assert (tmp_path / "small.json").read_text() == whole
    # The same settings over another choice of text are another measurement.
    command.run(options(place, tmp_path, sample_tokens=40))
    assert capsys.readouterr().err.count("kept from an earlier run") == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_row_end_and_keeps_it(place, tmp_path, monkeypatch, capsys, number, code):
    measured = []

    def measure(*_, **__):
        measured.append(1)
        if len(measured) == 2:
            os.kill(os.getpid(), number)
        score = Score(10, 20.0, 1)
        return PerplexityResult(score, [score], windows=1, eval_length=40, chunk=8, memory=False)

    monkeypatch.setattr("landmark_cli.evaluation.perplexity.evaluate_perplexity", measure)
    with pytest.raises(
        Stopped, match="what was measured is kept; row 3 of 5, landmark, comes next; go on with"
    ) as stopped:
        command.run(options(place, tmp_path))
    assert stopped.value.exit_code == code and len(measured) == 2
    assert "finishing the row; once more stops at once" in capsys.readouterr().err
    command.run(options(place, tmp_path))
    assert len(measured) == 5 and capsys.readouterr().err.count("kept from an earlier run") == 2


def test_a_row_that_was_changed_is_measured_anew(tmp_path, capsys):
    """Every byte of a finished row counts: flipped, it is not taken for what was measured."""
    finished = FinishedRows(tmp_path / "rows.jsonl")
    results = {str(number): {"perplexity": 1.5 * number, "chunks": [1, 2]} for number in range(3)}
    for key, result in results.items():
        finished.add(key, result)
    assert FinishedRows(tmp_path / "rows.jsonl").rows == results and not capsys.readouterr().err
    content = (tmp_path / "rows.jsonl").read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 7
        (tmp_path / "rows.jsonl").write_bytes(damaged)
        found = FinishedRows(tmp_path / "rows.jsonl").rows
        assert all(found[key] == results[key] for key in found), (at, damaged[at])
        if content[at] != ord("\n"):
            assert "damaged line" in capsys.readouterr().err


def test_an_infinite_perplexity_is_told_and_stored_as_json(place, tmp_path, monkeypatch):
    score = Score(10, 8000.0, 1)
    result = PerplexityResult(score, [score], windows=1, eval_length=40, chunk=8, memory=False)
    monkeypatch.setattr("landmark_cli.evaluation.perplexity.evaluate_perplexity", lambda *_, **__: result)
    for _ in range(2):
        command.run(options(place, tmp_path, plot=True, json=str(tmp_path / "out.json")))
        for file in ("out.json", "small.json", "rows.jsonl"):
            text = (tmp_path / file).read_text()
            assert "Infinity" not in text and '"perplexity": null' in text and '"loss": 800.0' in text
        assert "| inf | 0.10 |" in (tmp_path / "small.md").read_text()


def test_a_changed_model_is_measured_anew(place, tmp_path, capsys):
    for seed in range(2):
        save(place, "changed", initializer_range=0.1, **SHAPES["landmark"])
        command.run(options(place, tmp_path / "out", roles=(), role=[f"landmark={place / 'changed'}"]))
        said = capsys.readouterr().err
        assert "kept from an earlier run" not in said, seed
        assert "no model for xl, miss" in said
    assert len(FinishedRows(tmp_path / "out" / "rows.jsonl").rows) == 6


@pytest.mark.parametrize(("name", "rows"), [("table1", 13), ("table2", 9), ("table3", 2)])
def test_the_paper_s_tables_are_shipped(name, rows):
    study = load_study(name)
    assert len(study.rows) == rows
    assert all(row.paper for row in study.rows)
    for row in study.rows:
        assert row.role in study.roles
        assert row.settings["eval-length"] in (360, 512, 2048, 4096)
        assert (row.reading().top_k_blocks is not None) == (row.role in ("landmark", "context-miss"))


ROLES = "study: perplexity\nroles: {a: x}\n"
WRONG = {
    "[1, 2]": "expected lines of",
    "study: [": "not YAML",
    "study: keys\nrows: [{}]": "study should be 'perplexity' or 'longppl' or 'ruler' or 'passkey', found 'keys'",
    ROLES + "rows: [{role: a, study: keys}]": "row 1.study should be 'perplexity' or .*, found 'keys'",
    ROLES + "rows: [{role: a, study: longppl}]": 'rows of longppl need a line "evaluator: ROLE"',
    ROLES + "rows: [{role: a, study: passkey, eval-length: 8}]": 'row 1: unknown key "eval-length"',
    "study: longppl\nroles: {a: x}\nrows: [{role: a}]": 'rows of longppl need a line "evaluator: ROLE"',
    ROLES + "evaluator: a\nrows: [{role: a}]": "it names an evaluator, .* but has no row of that",
    "study: longppl\nroles: {a: x}\nevaluator: b\nrows: [{role: a}]": "evaluator \"?'?b.* is none of the roles",
    "study: ruler\nroles: {a: x}\nrows: [{role: a, eval-length: 8}]": 'row 1: unknown key "eval-length"',
    "study: ruler\nroles: {a: x}\nrows: [{role: a, length: 0}]": "row 1: length: must be at least 1",
    ROLES + "rows: [{role: a, full-attention: true}]": 'row 1: unknown key "full-attention"',
    ROLES + "rows: []": "at least one row",
    ROLES + "rows: 3": "rows should be a list, found 3",
    ROLES + "rows: [a]": r"rows\[0\] should be an object",
    ROLES + "rows: [{role: [a]}]": "row 1: role \\['a'\\] is none of",
    ROLES + "rows: [{role: a, eval-length: many}]": "row 1: eval-length: expected a whole number, found 'many'",
    ROLES + "rows: [{role: a, eval-length: 0}]": "eval-length: must be at least 1",
    ROLES + "rows: [{role: a, memory: 1}]": "memory: expected true or false",
    ROLES + "rows: [{role: a, paper: {pg19: x}}]": "row 1.paper.pg19 should be a number",
    "study: perplexity\nroles: [a]\nrows: [{role: a}]": "roles should be an object",
}


def test_mistakes_are_named(place, tmp_path):
    with pytest.raises(UsageError, match="did you mean table1"):
        load_study("tabel1")
    with pytest.raises(UsageError, match=r'row 1: unknown key "top-k"; did you mean top-k-blocks'):
        (tmp_path / "s.yaml").write_text("study: perplexity\nroles: {a: x}\nrows: [{role: a, top-k: 1}]")
        load_study(tmp_path / "s.yaml")
    with pytest.raises(UsageError, match="row 1: role 'b' is none of"):
        (tmp_path / "s.yaml").write_text("study: perplexity\nroles: {a: x}\nrows: [{role: b}]")
        load_study(tmp_path / "s.yaml")
    with pytest.raises(UsageError, match="it lacks rows"):
        (tmp_path / "s.yaml").write_text("study: perplexity\n")
        load_study(tmp_path / "s.yaml")
    for content, message in WRONG.items():
        (tmp_path / "s.yaml").write_text(content)
        with pytest.raises(UsageError, match=message):
            load_study(tmp_path / "s.yaml")
    with pytest.raises(UsageError, match="needs models: give --role landmark=DIRECTORY"):
        command.run(options(place, tmp_path, roles=()))
    with pytest.raises(UsageError, match='no role "landmrk"; did you mean landmark'):
        command.run(options(place, tmp_path, role=["landmrk=x"]))
    with pytest.raises(UsageError, match="expected role=model"):
        command.run(options(place, tmp_path, role=["landmark"]))
    with pytest.raises(UsageError, match="--compare books: small has figures of pg19"):
        command.run(options(place, tmp_path, compare="books"))
    with pytest.raises(LandmarkError, match="is not there"):
        command.run(options(place, tmp_path, roles=(), role=[f"landmark={tmp_path / 'nowhere'}"]))


ROLE = "roles: {landmark: x, plain: y}\n"
FINE = {
    "perplexity": "{role: landmark, eval-length: 40, chunk: 8}",
    "longppl": "{role: landmark, eval-length: 60, short-context: 8, stride: 4, chunk: 8, top-k-blocks: 2}",
    "ruler": "{role: landmark, length: 300, chunk: 100, tasks: [fwe]}",
    "passkey": "{role: landmark, length: 200, chunk: 100}",
}
# What the last of several rows asks for that cannot be, and how it is told.
IMPOSSIBLE = [
    ("perplexity", "{role: landmark, eval-length: 999}", "too few for one window of 999"),
    ("perplexity", "{role: landmark, eval-length: 40, top-k-blocks: 30}", "retrieving 30 blocks leaves no room"),
    ("longppl", "{role: landmark, eval-length: 999, short-context: 8}", "too few for one window of 999"),
    ("longppl", "{role: landmark, eval-length: 60, short-context: 60}", "behind the first 60 of a window"),
    ("longppl", "{role: landmark, eval-length: 60, short-context: 8, top-k-blocks: 30}", "leaves no room"),
    ("longppl", "{role: plain, eval-length: 60, short-context: 8, top-k-blocks: 1}", "so it retrieves no blocks"),
    ("longppl", "{role: plain, eval-length: 60, short-context: 8}", "knows 50 positions; give 50 or less"),
    ("ruler", "{role: landmark, length: 200, chunk: 100, tasks: [fwe]}", "200: too short for fwe, .* at least 2"),
    ("ruler", "{role: landmark, length: 300, chunk: 100, tasks: [fwe, cwe]}", "300: too short for cwe"),
    ("ruler", "{role: landmark, length: 300, top-k-blocks: 30, tasks: [fwe]}", "leaves no room"),
    ("ruler", "{role: plain, length: 300, top-k-blocks: 1, tasks: [fwe]}", "so it retrieves no blocks"),
    ("passkey", "{role: landmark, length: 20, chunk: 10}", "a pass-key prompt of 20 tokens cannot be"),
    ("passkey", "{role: landmark, length: 200, top-k-blocks: 30}", "leaves no room"),
    ("passkey", "{role: plain, length: 200, top-k-blocks: 1}", "so it retrieves no blocks"),
    ("passkey", "{role: landmark, study: ruler, length: 200, chunk: 100, tasks: [fwe]}", "200: too short for fwe"),
]


@pytest.mark.parametrize(("kind", "row", "message"), IMPOSSIBLE)
def test_a_row_that_cannot_be_measured_is_told_before_any_is(place, tmp_path, monkeypatch, kind, row, message):
    save(place, "short", landmark_freq=None, max_position_embeddings=50)
    extra = "evaluator: landmark\n" if kind == "longppl" else ""
    (tmp_path / "s.yaml").write_text(f"study: {kind}\n{extra}{ROLE}rows: [{FINE[kind]}, {row}]")
    monkeypatch.setattr(studies, "run_study", lambda *_: pytest.fail("a row was measured"))
    chosen = {"study": str(tmp_path / "s.yaml"), "samples": 2}
    roles = [f"landmark={place / 'landmark'}", f"plain={place / 'short'}"]
    with pytest.raises(LandmarkError, match=f"study s, row 2: .*{message}"):
        command.run(options(place, tmp_path / "out", (), role=roles, **chosen))


def test_a_row_is_described_in_words():
    assert describe({"length": 512, "tasks": ["vt", "fwe"]}) == "length 512, tasks vt and fwe"
