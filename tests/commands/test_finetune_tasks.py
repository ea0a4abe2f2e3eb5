"""`landmark finetune` with tasks mixed in: unasked beside a teacher, and what a user hears where they cannot be."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from landmark_cli.commands import finetune_data
from landmark_cli.commands.finetune import FinetuneOptions, run
from landmark_cli.data import corpora
from landmark_cli.data.corpora import novels
from landmark_cli.data.tasks import corpus
from landmark_cli.data.token_file import TokenFile
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.options import load_recipe
from landmark_cli.training.setup import LossModel
from tests.awkward_tokenizers import BEGIN, byte_tokenizer
from tests.closeness import assert_close_norm
from tests.data.test_mixing import prose
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.training.command import as_an_earlier_version_saved, environment, records
from tests.training.tiny import write_questions

# Of a tokenizer with a token a byte, tasks take windows of 1041 text tokens.
LONG = {"landmark_freq": 63, "sequence_length": 1088, "steps": 1, "batch_size": 2, "accumulation": 1, "log_every": 1}
LONG |= {"eval_every": 0, "device": "cpu", "eval_ruler": "none"}
SHORT = LONG | {"landmark_freq": 7, "sequence_length": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    model = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 2048}
    tiny_decoder("llama", **model, num_attention_heads=2, num_key_value_heads=1).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    (root / "barges.txt").write_text(prose("barge", 300))
    write_questions(root / "asked", root / "base")
    return root


@pytest.fixture(autouse=True)
def in_the_place(place, fresh_accelerator, monkeypatch):
    monkeypatch.chdir(place)
    texts = {title: text[30_000:50_000] for title, text in novels().items()}
    monkeypatch.setattr(corpora, "novels", lambda: texts)


def finetune(output, **changes):
    run(FinetuneOptions(**(LONG | {"model": "base", "output": Path(output)} | changes)))
    return Path(output)


def test_windows_begin_as_the_tokenizer_begins_a_text(tmp_path, monkeypatch):
    """Those of the text and those of tasks, trained on and held out."""
    shutil.copytree("base", tmp_path / "base")
    byte_tokenizer(adds="<s> $A").save_pretrained(tmp_path / "base")
    seen = []
    forward = LossModel.forward
    monkeypatch.setattr(
        LossModel, "forward", lambda self, **batch: seen.append(batch["input_ids"]) or forward(self, **batch)
    )
    how = {"model": str(tmp_path / "base"), "eval_every": 1, "eval_windows": 4, "teacher": "none", "tasks_share": 0.5}
    output = finetune(tmp_path / "run", save_every=1, **how)
    rows = torch.cat(seen)
    assert len(rows) == 6 and (rows[:, 0] == BEGIN).all() and (rows[:, 1:] != BEGIN).all()
    # A run of a version whose windows began with nothing goes on so.
    as_an_earlier_version_saved(output / "checkpoints/step-00000001", "begin")
    seen.clear()
    finetune(output, steps=2, resume=True, **how)
    assert len(torch.cat(seen)) == 6 and (torch.cat(seen) != BEGIN).all()


def task_text(output, split="train"):
    file = TokenFile.open(output / "data/tasks" / f"{split}.bin")
    return _decode(file.tokens)


def _decode(tokens):
    return tiny_tokenizer().decode([int(id) for id in tokens])


def pieces(novel, text):
    """How many of the pieces of a novel stand in a text."""
    return sum(novel[i : i + 60].strip() in text for i in range(0, 20_000, 500))


def test_without_data_it_learns_from_the_novels_and_tasks_in_them(tmp_path, capfd):
    output = finetune(tmp_path / "run", eval_every=1, eval_windows=2)
    assert sorted(path.name for path in (output / "data").iterdir()) == ["0-sample", "tasks"]
    assert "Emma" in task_text(output) + _decode(TokenFile.open(output / "data/0-sample/train.bin").tokens)
    (answers,) = records(output, "answers_loss")
    assert answers > 0 and len(records(output, "validation_answers_loss")) == 1
    # Tasks and novels together, and novels alone.
    divergences = records(output, "validation_divergence") + records(output, "validation_prose_divergence")
    assert len(divergences) == 2 and min(divergences) > 0 and divergences[0] != divergences[1]
    held_out, trained = (novels()[title].decode()[30_000:50_000] for title in ("persuasion", "emma"))
    for split, holds, lacks in (("train", trained, held_out), ("validation", held_out, trained)):
        text = task_text(output, split)
        assert pieces(holds, text) > 3 and pieces(lacks, text) == 0
    # Its recipe repeats it.
    assert load_recipe(output / "recipe.yaml", FinetuneOptions, "finetune")["data"] is None


def test_kinds_of_tasks_are_those_that_are_named(tmp_path):
    named = finetune(tmp_path / "named", data=["barges.txt"], kinds=["completion"])
    others = finetune(tmp_path / "others", data=["barges.txt"])
    # A completion's facts are in prose alone.
    blocks = re.compile(r"INSERT INTO|<table|\| entry \||^- .*: |subject\": ", re.MULTILINE)
    assert not blocks.search(task_text(named)) and blocks.search(task_text(others))
    assert load_recipe(named / "recipe.yaml", FinetuneOptions, "finetune")["kinds"] == ["completion"]


@pytest.mark.parametrize(
    ("changes", "words", "begun"),
    [
        # Nobody waits for text to be tokenized where options alone say that there will be no tasks.
        ({"tasks_share": 0.0}, "--kinds is of tasks, and none .* give their share", False),
        ({"teacher": "none"}, "--kinds is of tasks, and none .* give their share", False),
        ({"data": ["asked"]}, "--kinds is of tasks, and none .* give their share", True),
        (SHORT, "--kinds completion: tasks cannot be mixed in: they take windows of at least", True),
    ],
    ids=["no share", "no teacher", "answers are marked", "too short"],
)
def test_kinds_of_tasks_that_would_not_be_mixed_in_are_refused(tmp_path, changes, words, begun):
    with pytest.raises(UsageError, match=words):
        finetune(tmp_path / "run", **{"data": ["barges.txt"], "kinds": ["completion"]} | changes)
    assert (tmp_path / "run").exists() == begun


def test_tasks_are_hidden_in_the_users_text(tmp_path):
    output = finetune(tmp_path / "run", data=["barges.txt"])
    assert "barge of day" in task_text(output) and records(output, "answers_loss")
    prepared = finetune(tmp_path / "prepared", data=[str(output / "data/0-barges-txt")])
    assert (prepared / "data/tasks/train.bin").read_bytes() == (output / "data/tasks/train.bin").read_bytes()
    assert records(prepared) == records(output)


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"data": ["barges.txt"], "teacher": "none"}, 0),
        ({"data": ["barges.txt"], "teacher": "none", "tasks_share": 1.0}, 1),
        ({"data": ["asked"]}, 0),
        ({"data": ["asked"], "tasks_share": 0.5}, 0.5),
        ({"data": ["barges.txt"], "tasks_share": 0.0}, 0),
    ],
    ids=["no teacher", "no teacher, asked", "marked", "marked, asked", "none asked"],
)
def test_where_they_are_mixed_in(tmp_path, capfd, changes, share):
    output = finetune(tmp_path / "run", save_every=1, **changes)
    assert (output / "data/tasks").exists() == bool(share)
    identity = json.loads((output / "checkpoints/step-00000001/training.json").read_text())["identity"]
    assert identity.get("tasks_share", 0) == share
    said = "tasks are hidden in the shipped novels" in " ".join(capfd.readouterr().err.split())
    assert said == (changes["data"] == ["asked"] and share > 0)


def test_windows_too_short_for_tasks(tmp_path, capfd):
    finetune(tmp_path / "run", **SHORT | {"data": ["barges.txt"]})
    said = " ".join(capfd.readouterr().err.split())
    assert "no tasks are mixed in: they take windows of at least 1041 text tokens, and these have 56" in said
    with pytest.raises(UsageError, match="--tasks-share 0.5: tasks cannot be mixed in: they take windows of at least"):
        finetune(tmp_path / "asked", **SHORT | {"data": ["barges.txt"], "tasks_share": 0.5})


@pytest.mark.parametrize("share", ["-0.1", "1.5", "half"])
def test_a_share_is_between_0_and_1(landmark, share):
    result = landmark("finetune", "--model", "base", "--tasks-share", share)
    assert result.code == 2 and "tasks-share" in result.err and "Traceback" not in result.err


def test_weights_are_for_data_that_is_named(landmark):
    result = landmark("finetune", "--model", "base", "--data-weights", "1,2")
    assert result.code == 2 and "--data-weights: 2 given for 0 of --data" in result.err


def test_resumed_it_is_the_same_run(tmp_path, capfd):
    how = {"data": ["barges.txt"], "steps": 2, "save_every": 1}
    whole, part = finetune(tmp_path / "whole", **how), tmp_path / "part"
    shutil.copytree(whole / "checkpoints/step-00000001", part / "checkpoints/step-00000001")
    capfd.readouterr()
    finetune(part, resume=True, **how)
    # As it was left by a version that wrote no recipe before its end.
    said = " ".join(capfd.readouterr().err.split())
    assert "part has no recipe.yaml" in said and "it goes on with --lr 0.0003, today's defaults; give them if" in said
    finetune(part, resume=True, **how)
    assert "recipe.yaml" not in capfd.readouterr().err
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with pytest.raises(LandmarkError, match="tasks_share is 0.5 there and 0.25 here"):
        finetune(part, resume=True, tasks_share=0.25, **how)


def test_resumed_it_keeps_the_tasks_that_an_earlier_version_made(tmp_path, monkeypatch):
    how = {"data": ["barges.txt"], "save_every": 1}
    with monkeypatch.context() as earlier:
        earlier.setattr(corpus, "CONTENTS", corpus.CONTENTS - 1)
        output = finetune(tmp_path / "run", **how)
        file = output / "data/tasks/train.bin"
        made = file.read_bytes(), file.with_suffix(".json").read_bytes()
    finetune(output, steps=2, resume=True, **how)
    assert (file.read_bytes(), file.with_suffix(".json").read_bytes()) == made and len(records(output)) == 2
    # What is damaged is made again: here of the same text, for it is the same program.
    file.write_bytes(made[0][:-1] + b"x")
    finetune(output, steps=3, resume=True, **how)
    assert file.read_bytes() == made[0] and file.with_suffix(".json").read_bytes() != made[1]


def test_resumed_it_keeps_the_text_it_was_trained_on(tmp_path):
    """What it was made from may be another by then, or gone: there is no other way to go on."""
    text = tmp_path / "text.txt"
    shutil.copy("barges.txt", text)
    how = {"data": [str(text)], "save_every": 1, "teacher": "none"}
    output = finetune(tmp_path / "run", **how)
    (file,) = (output / "data").glob("*/train.bin")
    made = file.read_bytes(), file.with_suffix(".json").read_bytes()
    text.write_text(prose("swan", 300))
    finetune(output, steps=2, resume=True, **how)
    text.unlink()
    finetune(output, steps=3, resume=True, **how)
    assert (file.read_bytes(), file.with_suffix(".json").read_bytes()) == made and len(records(output)) == 3


def test_resumed_it_refuses_other_options_of_its_text(tmp_path):
    """They would change nothing: the text is prepared already. Where none of --data is text they do not matter."""
    how = {"data": ["barges.txt"], "teacher": "none", "save_every": 1}
    output = finetune(tmp_path / "run", **how)
    recipe = (output / "recipe.yaml").read_bytes()
    for name, (first, other) in {"text_field": ("text", "body"), "validation_share": (0.01, 0.125)}.items():
        label = f"--{name.replace('_', '-')}"
        with pytest.raises(UsageError, match=f"{label} {other}: .* was prepared by {label} {first}, .*: give it so"):
            finetune(output, steps=2, resume=True, **how | {name: other})
        assert (output / "recipe.yaml").read_bytes() == recipe
    (own,) = (output / "data").glob("*/train.bin")
    changed = FinetuneOptions(model="base", data=[str(own.parent)], text_field="body")
    finetune_data.check_text_options(changed, output)
    (output / "recipe.yaml").unlink()
    finetune_data.check_text_options(FinetuneOptions(model="base", text_field="body"), output)


def test_a_recipe_that_an_earlier_run_saved_has_no_tasks(tmp_path):
    saved = finetune(tmp_path / "run", **SHORT | {"data": ["barges.txt"]}) / "recipe.yaml"
    lines = [line for line in saved.read_text().splitlines() if not line.startswith("tasks-share")]
    (tmp_path / "earlier.yaml").write_text("\n".join(lines))
    assert load_recipe(tmp_path / "earlier.yaml", FinetuneOptions, "finetune")["tasks_share"] == 0


@pytest.mark.slow
def test_two_processes_make_the_same_tasks_and_learn_as_one(tmp_path):
    def curve(name, processes, accumulation):
        options = LONG | {"model": "base", "data": "barges.txt", "output": tmp_path / name, "steps": 2}
        options |= {"batch_size": 1, "accumulation": accumulation}
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "landmark_cli"]
        command = [sys.executable, *launcher, "finetune", *arguments]
        done = subprocess.run(command, env=environment(ACCELERATE_USE_CPU="true"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [records(tmp_path / name, key) for key in ("loss", "divergence", "answers_loss")]

    two, one = curve("two", 2, 2), curve("one", 1, 4)
    assert_close_norm(torch.tensor(two), torch.tensor(one))
    made = [(tmp_path / name / "data/tasks/train.bin").read_bytes() for name in ("one", "two")]
    assert made[0] == made[1]
