"""`landmark train` itself: its defaults, its directory, its refusals, and runs that are killed or split."""

import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
import yaml
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from landmark_cli.cli import main
from landmark_cli.commands import courses, plan, run_loop
from landmark_cli.commands.train import TrainOptions, run
from landmark_cli.data import transformers_tokenizer
from landmark_cli.data.pretrained_tokenizers import begin_ids
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference.generation import generate
from landmark_cli.inference.settings import SamplingSettings
from landmark_cli.models import store
from landmark_cli.models.generation_config import tokens_without_text
from landmark_cli.training.setup import LossModel
from tests import awkward_tokenizers
from tests.forked import Forked
from tests.training.command import (
    CHECKOUT,
    SHORT,
    arguments,
    as_an_earlier_version_saved,
    environment,
    records,
    stop_behind,
    train,
)
from tests.training.tiny import byte_tokenizer, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    return write_corpus(root / "data" / "cats", byte_tokenizer(root / "bytes"))


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_windows_begin_as_the_tokenizer_begins_a_text(tmp_path, monkeypatch):
    """Trained on and held out, as prompts do that the model is given later."""
    awkward_tokenizers.byte_tokenizer(adds="<s> $A").save_pretrained(tmp_path / "bytes")
    corpus = write_corpus(tmp_path / "cats", tmp_path / "bytes")
    seen, forward = [], LossModel.forward
    monkeypatch.setattr(
        LossModel, "forward", lambda self, **batch: seen.append(batch["input_ids"]) or forward(self, **batch)
    )
    output = train(corpus, tmp_path / "run", steps=1, eval_every=1, save_every=1)
    rows = torch.cat(seen)
    assert len(seen) > 1 and (rows[:, 0] == awkward_tokenizers.BEGIN).all()
    assert (rows[:, 1:] != awkward_tokenizers.BEGIN).all()
    assert begin_ids(AutoTokenizer.from_pretrained(output)) == [awkward_tokenizers.BEGIN]
    # A run of a version whose windows began with nothing goes on so.
    as_an_earlier_version_saved(output / "checkpoints/step-00000001", "begin")
    seen.clear()
    train(corpus, output, steps=2, eval_every=1, resume=True)
    assert len(seen) > 1 and (torch.cat(seen) != awkward_tokenizers.BEGIN).all()


def test_the_directory_holds_a_model_that_opens_anywhere(corpus, tmp_path):
    output = train(corpus, tmp_path / "run")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    config = model.config
    assert (config.landmark_freq, config.trained_length, config.vocab_size) == (7, 34, 320)
    assert config._attn_implementation == "landmark"
    assert tokenizer.convert_tokens_to_ids("<landmark>") == config.landmark_token_id == 257
    assert config.eos_token_id == tokenizer.eos_token_id == 256
    assert records(output, "step") == [1, 2, 2, 3, 4, 4]
    assert records(output)[-1] < records(output)[0]
    assert records(output, "tokens")[-1] == 4 * 4 * 34
    assert len(records(output, "validation_loss")) == 2


@pytest.mark.parametrize("baseline", [False, True])
def test_transformers_generates_from_the_directory(corpus, tmp_path, baseline):
    output = train(corpus, tmp_path / "run", baseline=baseline, steps=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id
    assert model.generation_config.suppress_tokens == tokens_without_text(model, tokenizer)
    assert "import landmark_cli" in (output / "README.md").read_text()
    prompts = ["the cat sat on the mat. " * 8, "a"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = generate(model, tokenizer, prompts, SamplingSettings(max_new_tokens=5, temperature=0))
    width = inputs["input_ids"].shape[1]
    for row, one in zip(generated[:, width:].tolist(), expected, strict=True):
        assert row[: len(one.tokens)] == one.tokens


@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
def test_a_tokenizer_with_gaps_between_its_ids(tmp_path, eos):
    tokenizer = awkward_tokenizers.byte_tokenizer(ids={"<|im_start|>": 270, "<|im_end|>": 279}, eos_token=eos)
    tokenizer.save_pretrained(tmp_path / "gap")
    corpus = write_corpus(tmp_path / "corpus", tmp_path / "gap")
    assert TokenFile.open(corpus / "train.bin").metadata.vocab_size == 280
    output = train(corpus, tmp_path / "run", steps=2)
    model, tokenizer = store.load(output, device="cpu")
    assert (model.config.landmark_token_id, model.config.vocab_size) == (280, 320)
    assert tokenizer.convert_tokens_to_ids(["<landmark>", eos]) == [280, model.config.eos_token_id]


def test_a_tokenizer_that_would_not_come_back_is_refused_before_the_first_step(tmp_path, monkeypatch):
    def added_as_transformers_does(tokenizer, names):
        tokenizer.add_tokens(names, special_tokens=True)

    monkeypatch.setattr(transformers_tokenizer, "add_tokens", added_as_transformers_does)
    awkward_tokenizers.byte_tokenizer(ids={"<|im_end|>": 279}).save_pretrained(tmp_path / "gap")
    corpus = write_corpus(tmp_path / "corpus", tmp_path / "gap")
    with pytest.raises(LandmarkError, match="gap does not come back the same .*<landmark> is 259, not 280"):
        train(corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(corpus, tmp_path / "baseline", baseline=True, steps=1)


def test_the_recipe_in_it_repeats_the_run(corpus, tmp_path):
    first = train(corpus, tmp_path / "first", seed=5, dropout=0.1)
    recipe = yaml.safe_load((first / "recipe.yaml").read_text())
    assert recipe["command"] == "train" and recipe["seed"] == 5 and "output" not in recipe
    with pytest.raises(SystemExit) as exit:
        main(["train", f"--recipe={first / 'recipe.yaml'}", "--device=cpu", "--output=second"])
    assert exit.value.code == 0
    assert (tmp_path / "second/model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_a_run_is_resumed_by_its_directory_alone(corpus, tmp_path, monkeypatch, capsys):
    options = {"seed": 5, "dropout": 0.1, "save_every": 2}
    whole, part = train(corpus, tmp_path / "whole", **options), tmp_path / "part"
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the power"):
        stop_behind(patched, 3)
        train(corpus, part, **options)
    saved = (part / "recipe.yaml").read_text()
    # A resumption that is refused changes nothing in the directory.
    with pytest.raises(SystemExit) as refused:
        main(["train", f"--output={part}", "--device=cpu", "--resume", "--n-layer=3"])
    assert refused.value.code == 1 and "n_layer is 2 there and 3 here" in capsys.readouterr().err
    assert (part / "recipe.yaml").read_text() == saved
    with pytest.raises(SystemExit) as exit:
        main(["train", "--resume", f"--output={part}", "--device=cpu"])
    assert exit.value.code == 0 and f"with the options of {part}/recipe.yaml" in capsys.readouterr().err
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert records(part) == records(whole)
    # What is given beside it counts, and is what the directory says from then on.
    with pytest.raises(SystemExit) as exit:
        main(["train", "--steps=6", f"--output={part}", "--device=cpu", "--resume"])
    assert exit.value.code == 0 and records(part, "step")[-1] == 6
    assert yaml.safe_load((part / "recipe.yaml").read_text()) == yaml.safe_load(saved) | {"steps": 6}


def test_a_recipe_that_changed_since_the_run_wrote_it_is_not_gone_on_from(corpus, tmp_path, capsys):
    output = train(corpus, tmp_path / "run", save_every=2)
    recipe, resume = output / "recipe.yaml", ["train", f"--output={tmp_path / 'run'}", "--device=cpu", "--resume"]
    recipe.write_text(recipe.read_text().replace("weight-decay: 0.001", "weight-decay: 0.101"))
    for given, code in (([], 2), ([f"--recipe={recipe}"], 0)):
        with pytest.raises(SystemExit) as exit:
            main([*resume, *given])
        assert exit.value.code == code
    said = capsys.readouterr().err
    assert f"not as it was written, by the checksum in its last line: if you changed it, give --recipe {recipe}" in said
    assert "weight-decay: 0.101" in recipe.read_text()
    # Of an earlier version, which wrote no checksum.
    recipe.write_text("".join(line for line in recipe.read_text().splitlines(True) if not line.startswith("#")))
    with pytest.raises(SystemExit) as exit:
        main(resume)
    assert exit.value.code == 0


def test_a_resumption_of_nothing_and_one_with_a_recipe_take_no_saved_options(corpus, tmp_path, capsys):
    output = train(corpus, tmp_path / "run", save_every=2)
    (tmp_path / "other.yaml").write_text("seed: 3\nn-layer: 4\n")
    for given in ([f"--output={tmp_path / 'new'}"], [f"--output={output}", "--recipe=other.yaml"]):
        with pytest.raises(SystemExit):
            main(["train", "--resume", "--device=cpu", "--data=nowhere", *given])
        assert "with the options of" not in capsys.readouterr().err


def test_a_baseline_has_no_landmarks(corpus, tmp_path):
    output = train(corpus, tmp_path / "run", baseline=True)
    config = AutoModelForCausalLM.from_pretrained(output).config
    assert config.landmark_freq is None and config._attn_implementation == "sdpa"
    assert "<landmark>" not in AutoTokenizer.from_pretrained(output).get_vocab()


def test_runs_of_different_precision_follow_each_other_in_one_process(corpus, tmp_path):
    half = train(corpus, tmp_path / "half", precision="bf16")
    whole = train(corpus, tmp_path / "whole", precision="fp32")
    assert records(half) == pytest.approx(records(whole), rel=1e-2) and records(half) != records(whole)


def test_fp16_without_a_gpu_is_refused(corpus, tmp_path):
    with pytest.raises(LandmarkError, match="--precision fp16 needs a GPU"):
        train(corpus, tmp_path / "run", precision="fp16")


def test_without_options_it_takes_the_newest_corpus_and_a_new_directory(corpus, tmp_path, capsys):
    (tmp_path / "data").symlink_to(corpus.parent)
    for _ in range(2):
        run(TrainOptions(**SHORT))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["cats-landmark", "cats-landmark-2"]
    shown = capsys.readouterr().err
    assert "training on data/cats, the newest prepared corpus under data/" in shown
    assert "landmark attention" in shown and "136 tokens a step" in shown
    assert "trained model: runs/cats-landmark-2" in shown


def test_work_for_a_gpu_is_told_before_a_cpu_begins_it(corpus, tmp_path, capsys, monkeypatch):
    train(corpus, tmp_path / "small", steps=1)
    assert "work for a GPU" not in capsys.readouterr().err
    monkeypatch.setattr(run_loop, "LONG_ON_CPU", 1)
    train(corpus, tmp_path / "large", steps=1)
    assert "warning: each of 1 step is" in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_trains_nothing(corpus, tmp_path, capsys):
    train(corpus, tmp_path / "run", dry_run=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert "tokens a step 136 in 4 windows of 34" in shown
    assert "parameters 11,344" in shown and "memory, about" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"baseline": True, "memory_length": 16},
        {"context_miss_token": True, "position_jump": 3, "group_dropout": 0.5},
        {"sequence_length": 64, "read_chunk": 16, "top_k_blocks": 1},
        {"mask_documents": True},
    ],
    ids=["plain", "recurrent", "variants", "read", "masked"],
)
def test_a_dry_run_measures_the_steps_of_the_run(corpus, tmp_path, capsys, monkeypatch, changes):

    options = {"dry_run": True, "steps": 7200, "accumulation": 3} | changes
    train(corpus, tmp_path / "run", **options)
    shown = " ".join(capsys.readouterr().out.split())
    said = re.search(
        r"time, about ([\d:]+): (\S+) s a step, by 3 micro-batches; .* cost, about (\S+) hours of one CPU", shown
    )
    assert float(said[3]) == pytest.approx(2 * float(said[2]), rel=0.02)
    # A CPU's process holds more than the run.
    assert "of memory" not in shown
    monkeypatch.setattr(plan, "CPU_OPERATIONS", 1e3)
    train(corpus, tmp_path / "run", **options)
    shown = capsys.readouterr().out
    assert "not measured: a step takes a CPU long" in shown and "cost" not in shown
    assert not (tmp_path / "run").exists()


def test_killed_at_any_step_and_resumed_it_ends_with_the_same_bits(corpus, tmp_path):
    options = {"steps": 40, "save_every": 3, "eval_every": 0, "dropout": 0.1}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = Forked(arguments(corpus, killed, **options), tmp_path / "said.txt", environment())
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (killed / "checkpoints/step-00000009").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(LandmarkError, match="another landmark command is writing to .*killed"):
        train(corpus, killed, resume=True, **options)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "config.json").exists()

    train(corpus, killed, resume=True, **options)
    train(corpus, whole, **options)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert records(killed) == records(whole)


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_demo_recipe(corpus, tmp_path, launched):
    (tmp_path / "data").symlink_to(corpus.parent)
    command = ["train", "--recipe", "demo/tiny", "--steps", "2", "--batch-size", "2", "--device", "cpu"]
    if launched:
        launcher = ["accelerate", "launch", "--num_processes", "1", str(CHECKOUT / "landmark")]
        subprocess.run([*launcher, *command], env=environment(), check=True, timeout=240)
    else:
        assert Forked(command, tmp_path / "said.txt", environment()).wait() == 0
    assert AutoModelForCausalLM.from_pretrained("runs/cats-landmark").config.model_type == "landmark_gpt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 18, "n_head": 4}, "--n-embd 18 over --n-head 4"),
        ({"data_weights": [1.0, 2.0]}, "--data-weights: 2 given for 1 of --data"),
    ],
)
def test_options_that_contradict_each_other_are_refused(corpus, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        train(corpus, tmp_path / "run", **changes)


def test_a_run_is_not_overwritten_and_not_resumed_by_another_model(corpus, tmp_path):
    output = train(corpus, tmp_path / "run", save_every=2)
    with pytest.raises(LandmarkError, match="run already holds a run: add --resume"):
        train(corpus, output)
    with pytest.raises(LandmarkError, match="belongs to another run: n_layer is 2 there and 3 here"):
        train(corpus, output, resume=True, n_layer=3)
    with pytest.raises(LandmarkError, match="belongs to another run: global_batch is 4 there and 8 here"):
        train(corpus, output, resume=True, batch_size=4)


def test_a_token_file_cut_short_is_refused(corpus, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    with open(copy / "train.bin", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(LandmarkError, match=r"train\.bin was truncated or changed"):
        train(copy, tmp_path / "run")


def test_corpora_of_different_tokenizers_do_not_mix(corpus, tmp_path):
    other = write_corpus(tmp_path / "gpt2", "gpt2")
    with pytest.raises(LandmarkError, match="prepared with different tokenizers"):
        train(corpus, tmp_path / "run", data=[corpus, other])


def test_a_tokenizer_that_changed_since_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "cats", byte_tokenizer(tmp_path / "bytes"))
    load_tokenizer("gpt2").save_pretrained(tmp_path / "bytes")
    with pytest.raises(LandmarkError, match="prepared with the tokenizer .*bytes"):
        train(corpus, tmp_path / "run")


def test_two_corpora_train_together(corpus, tmp_path):
    more = write_corpus(tmp_path / "more", corpus.parent.parent / "bytes", characters=3000)
    output = train(corpus, tmp_path / "run", data=[corpus, more], data_weights=[1.0, 3.0])
    assert len(records(output)) == 4 and len(records(output, "validation_loss")) == 2


def test_fewer_steps_than_are_done_are_refused(corpus, tmp_path):
    output = train(corpus, tmp_path / "run", steps=2, save_every=1)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="--steps 1: the run in .*run has done 2 already; .* `landmark models export`"):
        train(corpus, output, steps=1, save_every=1, resume=True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_finished_run_can_be_resumed_again(corpus, tmp_path):
    output = train(corpus, tmp_path / "run", save_every=2)
    weights = (output / "model.safetensors").read_bytes()
    train(corpus, output, save_every=2, resume=True)
    assert (output / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.5}, "--lr 0.5: the run in .*run has done all of its 2 steps with 0.002; give more --steps, or leave"),
        (
            {"warmup": 0.25, "schedule": "constant"},
            "--schedule constant --warmup 0.25: the run in .* with one-cycle and 0.02; give more --steps, or leave",
        ),
    ],
)
def test_a_finished_run_is_not_said_to_be_trained_otherwise(corpus, tmp_path, changes, said):
    """Neither by its recipe, which is to repeat it, nor by its card."""
    output = train(corpus, tmp_path / "run", steps=2, save_every=1, warmup=0.02, lr=0.002)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=said):
        train(corpus, output, resume=True, **{"steps": 2, "save_every": 1, "warmup": 0.02, "lr": 0.002} | changes)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_what_a_resumed_run_does_otherwise_is_said(corpus, tmp_path, capsys):
    output = train(corpus, tmp_path / "run", steps=2, save_every=1, lr=0.002)
    train(corpus, output, resume=True, steps=3, save_every=1, lr=0.002)
    assert "from step 3 on" not in capsys.readouterr().err
    train(corpus, output, resume=True, steps=4, save_every=1, lr=0.5)
    assert "from step 4 on --lr 0.5, which was 0.002 before" in capsys.readouterr().err
    third = shutil.copytree(output / "checkpoints/step-00000003", tmp_path / "third")
    earlier, recipe = output / "recipe-to-step-3.yaml", output / "recipe.yaml"
    assert "lr: 0.002" in earlier.read_text() and "lr: 0.5" in recipe.read_text()
    assert [courses.recipe_at(output, step) for step in (1, 3, 4)] == [earlier, earlier, recipe]
    # A step that is done again is one of the newer options; the steps before it are what they were.
    shutil.rmtree(output / "checkpoints/step-00000004")
    train(corpus, output, resume=True, steps=5, save_every=1, lr=0.1)
    assert "from step 4 on --lr 0.1, which was 0.002 before" in capsys.readouterr().err
    train(corpus, output, resume=True, steps=6, save_every=1, lr=0.3)
    assert [courses.recipe_at(output, step).name for step in (3, 5, 6)] == [
        "recipe-to-step-3.yaml",
        "recipe-to-step-5.yaml",
        "recipe.yaml",
    ]
    assert "lr: 0.002" in earlier.read_text() and "lr: 0.1" in (output / "recipe-to-step-5.yaml").read_text()
    for number in (4, 5, 6):
        shutil.rmtree(output / f"checkpoints/step-{number:08}", ignore_errors=True)
    (output / "config.json").unlink()
    shutil.copytree(third, output / "checkpoints/step-00000003", dirs_exist_ok=True)
    train(corpus, output, resume=True, steps=4, save_every=1, lr=0.3)
    assert sorted(path.name for path in output.glob("recipe*")) == ["recipe-to-step-3.yaml", "recipe.yaml"]


def test_a_tracker_that_is_not_installed_names_its_extra(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LandmarkError, match=r"pip install 'landmark-cli\[wandb\]'"):
        train(corpus, tmp_path / "run", log_with=["wandb"])


def test_trackers_are_told_the_project_and_the_runs_name(corpus, tmp_path, monkeypatch):
    told = []
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, *given, **named: told.append((given, named)))
    train(corpus, tmp_path / "first", log_with=["wandb"], steps=1)
    train(corpus, tmp_path / "second", log_with=["wandb"], steps=1, log_project="novels", log_name="third try")
    assert [given for given, _ in told] == [("landmark",), ("novels",)]
    assert [named["init_kwargs"]["wandb"]["name"] for _, named in told] == ["first", "third try"]
    assert told[0][1]["config"]["n_layer"] == 2


def test_a_device_that_is_not_there_is_refused(corpus, tmp_path):
    with pytest.raises(UsageError, match="--device cuda:7: there is no such device here"):
        train(corpus, tmp_path / "run", device="cuda:7")
    assert not (tmp_path / "run").exists()


# Most of it is compiling. That each operator compiles in one graph is tested where the operators are.
@pytest.mark.slow
def test_a_compiled_model_learns_the_same(corpus, tmp_path):
    plain = train(corpus, tmp_path / "plain")
    compiled = train(corpus, tmp_path / "compiled", compile=True)
    assert records(compiled) == pytest.approx(records(plain), rel=1e-4)
