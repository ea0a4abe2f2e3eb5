"""The last write of a run: tried before the first step, and nothing is lost where it fails all the same."""

import errno
import json
import os
import subprocess

import pytest
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from landmark_cli.commands import finetune as finetune_command
from landmark_cli.commands import finetune_model
from landmark_cli.commands import train as train_command
from landmark_cli.commands.finetune import FinetuneOptions
from landmark_cli.errors import LandmarkError, Stopped
from landmark_cli.models import store
from landmark_cli.training import publish
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.training.command import environment, train
from tests.training.tiny import byte_tokenizer, write_corpus

SHORT = {"landmark_freq": 7, "sequence_length": 32, "steps": 2, "batch_size": 2, "accumulation": 1, "eval_every": 0}
KINDS = {"whole": {}, "adapters": {"lora_rank": 2}, "merged": {"lora_rank": 2, "merge": True}}
FEW = {"steps": 2, "accumulation": 1, "eval_every": 0, "save_every": 2}
LLAMA_2 = {"temperature": 0.9, "top_p": 0.6}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("publish")
    write_corpus(root / "corpus", byte_tokenizer(root / "bytes"))
    (root / "cats.txt").write_text("the cats sat on the mats. " * 60)
    tiny_decoder("llama").save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    return root


def finetune(place, output, **changes):
    options = SHORT | {"model": str(place / "base"), "data": [str(place / "cats.txt")], "device": "cpu"}
    options |= {"eval_ruler": "none"}
    finetune_command.run(FinetuneOptions(**(options | {"output": output} | changes)))
    return output


def with_generation_config(place, directory, **settings):
    """A copy of the base model with another generation config."""
    for file in (place / "base").iterdir():
        (directory / file.name).parent.mkdir(exist_ok=True)
        (directory / file.name).write_bytes(file.read_bytes())
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "transformers_version": "4.31.0"}
    (directory / "generation_config.json").write_text(json.dumps(tokens | settings))
    return str(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_a_temperature_without_do_sample_is_settled(place, tmp_path, kind, capsys):
    base = with_generation_config(place, tmp_path / "base", **LLAMA_2)
    output = finetune(place, tmp_path / "run", model=base, **KINDS[kind])
    assert store.load(output, device="cpu")[0].config.landmark_freq == 7
    if kind != "adapters":
        saved = GenerationConfig.from_pretrained(output)
        assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.9, 0.6)
    assert f"{base} has settings of sampling (temperature 0.9, top_p 0.6)" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"temperature": 0.0, "top_p": 0.6}, {"do_sample": False, "temperature": 0.7}])
def test_greedy_decoding_stays_greedy(place, tmp_path, settings):
    output = finetune(place, tmp_path / "run", model=with_generation_config(place, tmp_path / "base", **settings))
    saved = GenerationConfig.from_pretrained(output)
    assert not saved.do_sample and saved.temperature is None and saved.top_p is None


def untrained(output):
    return not (output / "metrics.jsonl").exists() and not (output / "checkpoints").exists()


@pytest.mark.parametrize("kind", ["whole", "merged"])
def test_what_transformers_does_not_save_is_refused_before_the_first_step(place, tmp_path, kind):
    base = with_generation_config(place, tmp_path / "base", early_stopping=True, num_beams=1)
    with pytest.raises(
        LandmarkError, match="nothing was trained, .* saved in .* afterwards: .*GenerationConfig is invalid"
    ):
        finetune(place, tmp_path / "run", model=base, **KINDS[kind])
    assert untrained(tmp_path / "run") and not (tmp_path / "run/data").exists()


# What the end of a run calls: by train, and by fine-tuning of each kind.
NEEDED = {
    ("train", PreTrainedModel, "save_pretrained"),
    ("train", PreTrainedConfig, "save_pretrained"),
    ("train", PreTrainedTokenizerBase, "save_pretrained"),
    ("train", train_command, "save_recipe"),
    ("whole", PreTrainedModel, "save_pretrained"),
    ("whole", PreTrainedTokenizerBase, "save_pretrained"),
    ("whole", finetune_model, "save_recipe"),
    ("adapters", PeftModel, "save_pretrained"),
    ("adapters", PreTrainedConfig, "save_pretrained"),
    ("adapters", PreTrainedTokenizerBase, "save_pretrained"),
    ("merged", PreTrainedConfig, "save_pretrained"),
    ("merged", GenerationConfig, "save_pretrained"),
    ("merged", PreTrainedTokenizerBase, "save_pretrained"),
}


@pytest.mark.parametrize("kind, owner, name", sorted(NEEDED, key=str), ids=lambda part: getattr(part, "__name__", part))
def test_what_the_end_needs_is_tried_before_the_first_step(place, tmp_path, monkeypatch, kind, owner, name):
    output = tmp_path / "run"

    def fail(*_, **__):
        raise TypeError("cannot be written down")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(LandmarkError, match="saved .*: cannot be written down"):
        train(place / "corpus", output) if kind == "train" else finetune(place, output, **KINDS[kind])
    assert untrained(output)


def test_a_config_that_does_not_come_back_is_refused_before_the_first_step(place, tmp_path, monkeypatch):
    to_diff_dict = PreTrainedConfig.to_diff_dict
    monkeypatch.setattr(PreTrainedConfig, "to_diff_dict", lambda self: to_diff_dict(self) | {"top_k_blocks": 9})
    with pytest.raises(LandmarkError, match="its config.json comes back with top_k_blocks 9, not 2"):
        finetune(place, tmp_path)
    assert untrained(tmp_path)


FAILURES = {"full": OSError(errno.ENOSPC, "No space left on device"), "unforeseen": ValueError("not like this")}


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """What an undisturbed run leaves."""
    return train(place / "corpus", tmp_path_factory.mktemp("whole"), **FEW)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("save_every", [0, 2])
def test_what_was_trained_is_not_lost_where_the_last_write_fails(
    place, whole, tmp_path, monkeypatch, failure, save_every
):
    output, options = tmp_path / "run", FEW | {"save_every": save_every}

    def fail(*_):
        raise FAILURES[failure]

    with monkeypatch.context() as patch:
        patch.setattr(publish, "put_in_place", fail)
        with pytest.raises(LandmarkError, match=r"could not be written to .*run: .*step-00000002 holds all .*--resume"):
            train(place / "corpus", output, **options)
    assert not (output / "config.json").exists() and not (output / "model.partial").exists()
    train(place / "corpus", output, resume=True, **options)
    assert (output / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_directory_is_finished_when_its_last_file_is_there_or_not_at_all(place, tmp_path, monkeypatch):
    """A finished run is resumed, and killed while its files are put in place."""
    output = train(place / "corpus", tmp_path / "run", **FEW)
    files = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    replace = os.replace
    for stop in range(len(files)):
        count = iter(range(100))

        def killed(source, target, stop=stop, count=count):
            if source.parent == output / "model.partial" and target.parent == output and next(count) == stop:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            try:
                train(place / "corpus", output, resume=True, **FEW)
            except (KeyboardInterrupt, Stopped):
                # The checkpoint is kept, which whoever is stopped hears of.
                assert not (output / "config.json").exists()
            else:
                break
    assert stop > 3
    assert {name: (output / name).read_bytes() for name in files} == files


def test_weights_of_another_kind_do_not_stay_beside_the_model(place, tmp_path):
    output = finetune(place, tmp_path / "run", save_every=2, **KINDS["adapters"])
    assert (output / "adapter_model.safetensors").is_file()
    finetune(place, output, save_every=2, resume=True, **KINDS["merged"])
    assert not list(output.glob("adapter*")) and (output / "model.safetensors").is_file()
    finetune(place, output, save_every=2, resume=True, **KINDS["adapters"])
    assert not list(output.glob("model*")) and (output / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_no_process_waits_for_one_that_cannot_save(place, tmp_path):
    base = with_generation_config(place, tmp_path / "base", early_stopping=True, num_beams=1)
    command = ["torchrun", "--nproc_per_node=2", "-m", "landmark_cli", "finetune", f"--model={base}"]
    command += [f"--data={place / 'cats.txt'}", f"--output={tmp_path / 'run'}", "--landmark-freq=7"]
    environ = environment(ACCELERATE_USE_CPU="true")
    ended = subprocess.run(
        [*command, "--sequence-length=32", "--steps=1"], env=environ, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode and "nothing was trained" in ended.stderr
    assert untrained(tmp_path / "run")
