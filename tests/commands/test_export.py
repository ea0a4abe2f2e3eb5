"""`landmark models export`: a checkpoint as the model that its run would write, whatever the run trains."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from landmark_cli.commands.export import ExportOptions, run
from landmark_cli.commands.finetune import FinetuneOptions
from landmark_cli.commands.finetune import run as run_finetune
from landmark_cli.errors import LandmarkError
from landmark_cli.locks import sole_writer
from landmark_cli.models import store
from landmark_cli.training.checksums import write_checksums
from tests.commands.test_finetune import SHORT as FINETUNE
from tests.commands.test_finetune import sentences
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.training.command import train
from tests.training.tiny import byte_tokenizer, write_corpus

SAVING = {"steps": 4, "save_every": 2, "eval_every": 0}
# What a run leaves beside its model.
OF_THE_RUN = {"checkpoints", "metrics.jsonl", "data", "README.md"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus and a decoder."""
    root = tmp_path_factory.mktemp("export")
    write_corpus(root / "cats", byte_tokenizer(root / "bytes"))
    tiny_decoder("llama", initializer_range=0.1).save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    (root / "cats.txt").write_text(sentences(0, 100))
    return root


@pytest.fixture(autouse=True)
def in_the_place(place, fresh_accelerator, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    return train(place / "cats", tmp_path_factory.mktemp("runs") / "run", **SAVING)


def finetuned(output, **changes):
    run_finetune(
        FinetuneOptions(**FINETUNE | SAVING | {"model": "base", "data": ["cats.txt"], "output": output} | changes)
    )
    return output


def export(checkpoint, output=None):
    return run(ExportOptions(checkpoint=checkpoint, output=output))


def files(directory):
    """The contents of a model's files, by their names."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in OF_THE_RUN}


def test_the_newest_checkpoint_of_a_finished_run_is_its_model(trained, monkeypatch):
    monkeypatch.chdir(trained.parent)
    output = export(Path("run"))
    assert output == Path("run-step-4") and files(output) == files(trained)
    assert store.newest_model(trained.parent) == output.absolute()


def test_an_earlier_checkpoint_is_what_the_run_would_have_left_there(place, trained, tmp_path):
    # Exported while the run goes on.
    with sole_writer(trained):
        output = export(trained / "checkpoints/step-00000002", tmp_path / "exported")
    shutil.copytree(trained, tmp_path / "short", ignore=shutil.ignore_patterns("config.json", "step-00000004"))
    short = train(place / "cats", tmp_path / "short", **SAVING | {"steps": 2, "resume": True})
    assert (output / "model.safetensors").read_bytes() == (short / "model.safetensors").read_bytes()
    assert files(output).keys() == files(short).keys()
    assert (output / "recipe.yaml").read_bytes() == (trained / "recipe.yaml").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"save_dtype": "bfloat16", "teacher": "self"},
        {"lora_rank": 2},
        {"lora_rank": 2, "merge": True},
        pytest.param({"train": "landmarks"}, marks=pytest.mark.slow),
        pytest.param({"sequence_length": 48, "read_chunk": 16, "top_k_blocks": 1}, marks=pytest.mark.slow),
    ],
    ids=["whole", "adapters", "merged", "landmarks", "read"],
)
def test_what_was_fine_tuned(tmp_path, changes):
    finished = finetuned(tmp_path / "run", **changes)
    output = export(tmp_path / "run", tmp_path / "exported")
    assert files(output) == files(finished)
    assert "4, each 4 x" in (output / "README.md").read_text()
    half = export(tmp_path / "run/checkpoints/step-00000002")
    assert half == tmp_path / "run-step-2" and "2, each 4 x" in (half / "README.md").read_text()
    model, _ = store.load(half, device="cpu")
    assert model.config.landmark_freq == 7


def test_what_a_run_has_kept_is_no_model_and_says_how_to_make_one(trained, tmp_path):
    with pytest.raises(LandmarkError, match="is a checkpoint.*`landmark models export .*step-00000002` makes a model"):
        store.load(trained / "checkpoints/step-00000002", device="cpu")
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("config.json"))
    with pytest.raises(
        LandmarkError, match="run is a run that has not come to its end: `landmark models export .*run`"
    ):
        store.load(tmp_path / "run", device="cpu")


def no_recipe(directory):
    (directory / "recipe.yaml").unlink()


def edited(directory):
    recipe = directory / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("n-embd: 16", "n-embd: 32"))


def changed_recipe(**changes):
    def change(directory):
        recipe = yaml.safe_load((directory / "recipe.yaml").read_text())
        (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes))

    return change


def damaged(directory):
    file = directory / "checkpoints/step-00000004/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def sharded(directory, step=4):
    record = directory / f"checkpoints/step-0000000{step}/training.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"layout": "FSDP 2 SHARDED_STATE_DICT"}))
    write_checksums(record.parent)


def no_checkpoint(directory):
    shutil.rmtree(directory / "checkpoints")


def existing(directory):
    directory.with_name("run-step-4").mkdir()
    directory.with_name("run-step-4").joinpath("config.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_recipe, "has no recipe.yaml, which says what its model is"),
        (edited, "recipe .*recipe.yaml is not as it was written"),
        (
            changed_recipe(**{"n-embd": 32}),
            r"the weights of another model: .* is \(\d+, 16\) there and \(\d+, 32\)",
        ),
        (changed_recipe(**{"n-layer": 3}), "holds the weights of another model: model.layers.2.* is missing there"),
        (changed_recipe(command="prepare"), "is not of a run: its command is 'prepare'"),
        (damaged, "step-00000004 is damaged"),
        (sharded, "was saved as FSDP 2 .*--resume --output .*run --steps 4, the run writes its model"),
        (no_checkpoint, "has no checkpoint; name a run's directory"),
        (existing, "run-step-4 already holds a model"),
    ],
    ids=["recipe", "edited", "width", "depth", "command", "damaged", "sharded", "none", "existing"],
)
def test_what_cannot_be_exported_leaves_nothing(trained, tmp_path, spoil, message):
    directory = tmp_path / "run"
    shutil.copytree(trained, directory)
    spoil(directory)
    before = set(os.listdir(tmp_path))
    with pytest.raises(LandmarkError, match=message):
        export(directory)
    assert set(os.listdir(tmp_path)) == before


def test_shards_of_an_earlier_step_are_read_where_no_later_ones_are(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    sharded(tmp_path / "run", step=2)
    with pytest.raises(LandmarkError, match="--steps 2, the run writes its model, once you have moved the later check"):
        export(tmp_path / "run/checkpoints/step-00000002")


def test_a_checkpoint_that_is_not_there_names_those_that_are(trained):
    with pytest.raises(LandmarkError, match="there is no checkpoint .*; there are step-00000002, step-00000004"):
        export(trained / "checkpoints/step-00000003")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("run", "run is the directory of a run, which writes its model there: give another --output"),
        ("run/checkpoints/step-00000002", "step-00000002 is a checkpoint: give another --output"),
    ],
)
def test_nothing_of_a_run_is_written_over(trained, tmp_path, output, message):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("config.json"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(LandmarkError, match=message):
        export(tmp_path / "run/checkpoints/step-00000002", tmp_path / output)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
