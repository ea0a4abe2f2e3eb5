"""`landmark finetune`: the report at its end and on the way, and the model card."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import landmark_cli
from landmark_cli.commands.export import ExportOptions
from landmark_cli.commands.export import run as export
from landmark_cli.commands.finetune import FinetuneOptions, run
from landmark_cli.commands.finetune_report import asked_samples, rows_of
from landmark_cli.errors import LandmarkError, Stopped, UsageError
from landmark_cli.evaluation.ruler import brief
from landmark_cli.evaluation.ruler.brief import Figures, affordable_samples, lengths_of
from landmark_cli.models import store
from landmark_cli.models.card import Trained, model_card
from tests.data.test_mixing import prose
from tests.gpt2 import small_gpt2
from tests.models.families import tiny_decoder
from tests.training.command import records

CHECKOUT = Path(landmark_cli.__file__).parent.parent
# In these tokens a length of 590 has room for all tasks, and is within the model's positions.
SHORT = {"landmark_freq": 31, "sequence_length": 256, "steps": 3, "batch_size": 1, "accumulation": 2, "log_every": 1}
SHORT |= {"eval_every": 0, "device": "cpu", "teacher": "none", "eval_ruler": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "max_position_embeddings": 596,
        "vocab_size": small_gpt2(root / "base").vocab_size,
    }
    tiny_decoder("llama", **shape, num_attention_heads=2, num_key_value_heads=1).save_pretrained(root / "base")
    (root / "barges.txt").write_text(prose("barge", 200))
    return root


@pytest.fixture(autouse=True)
def in_the_place(place, fresh_accelerator, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture
def short_lengths(monkeypatch):
    """Asked at 300, 590 and 620 tokens, whatever the trained length; answers are short."""
    monkeypatch.setattr(brief, "lengths_of", lambda trained: [300, 590, 620])
    made = brief.make_task

    def make_task(*args):
        task = made(*args)
        task.new_tokens = 3
        return task

    monkeypatch.setattr(brief, "make_task", make_task)


def finetune(output, **changes):
    run(FinetuneOptions(**(SHORT | {"model": "base", "data": ["barges.txt"], "output": Path(output)} | changes)))
    return Path(output)


NAMES = [f"ruler_{task}_{length}" for task in (*brief.TASKS, "mean") for length in (590, 620)]


@pytest.mark.usefixtures("short_lengths")
@pytest.mark.parametrize(
    "changes", [pytest.param({}, id="whole"), pytest.param({"lora_rank": 2}, id="adapters", marks=pytest.mark.slow)]
)
def test_a_run_ends_with_figures_beside_the_untouched_models(tmp_path, capfd, changes):
    output = finetune(tmp_path / "run", **changes)
    (record,) = (r for line in (output / "metrics.jsonl").open() if "ruler_mean_590" in (r := json.loads(line)))
    assert record["step"] == 3 and all(0 <= record[name] <= 1 for name in NAMES)
    assert "untouched_ruler_mean_590" in record and "untouched_ruler_mean_600" not in record
    shown = capfd.readouterr().err
    assert "RULER, the trained model and the untouched one by full attention, 1 sample each" in shown
    card = (output / "README.md").read_text()
    assert "# base with landmark attention" in card and "## Figures" in card and "base_model" not in card
    assert "| vt | untouched | - | 0.00 | - |" in card and "| data | barges.txt |" in card
    assert "each 2 x 256 = 512 tokens" in card and "the same call" in card and "## Without the package" in card
    assert ("landmark_cli.load(" in card) == bool(changes)
    assert store.load(output, device="cpu")[0].config.landmark_freq == 31
    # Of its answers none is asked for again.
    answers = (output / "ruler.jsonl").read_text()
    finetune(output, resume=True, **changes)
    assert (output / "ruler.jsonl").read_text() == answers and "## Figures" in (output / "README.md").read_text()


def test_the_card_says_up_to_which_step_the_options_were_others(tmp_path):
    """And of a checkpoint, by which it was trained itself."""
    how = {"eval_ruler": "none", "save_every": 1}
    output = finetune(tmp_path / "run", lr=0.001, steps=1, **how)
    finetune(output, lr=0.002, resume=True, steps=2, **how)
    card = (output / "README.md").read_text()
    assert "highest learning rate 0.002 |" in card and "| to step 1 | --lr 0.001 |" in card
    export(ExportOptions(checkpoint=output / "checkpoints/step-00000001", output=tmp_path / "first"))
    first = (tmp_path / "first/README.md").read_text()
    assert "highest learning rate 0.001 |" in first and "to step" not in first


@pytest.mark.usefixtures("short_lengths")
def test_on_the_way_the_model_is_asked_as_it_is_and_the_run_stays_the_same(tmp_path):
    alone = finetune(tmp_path / "alone", eval_ruler="none")
    assert not records(alone, "ruler_mean_590") and "## Figures" not in (alone / "README.md").read_text()
    asked = finetune(tmp_path / "asked", eval_ruler_every=1)
    assert [line["step"] for line in map(json.loads, (asked / "metrics.jsonl").open()) if NAMES[0] in line] == [1, 2, 3]
    assert (asked / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert records(asked) == records(alone) and not (asked / "ruler.partial").exists()


@pytest.mark.usefixtures("short_lengths")
@pytest.mark.parametrize("error", [LandmarkError("no figures today"), RuntimeError("CUDA out of memory")])
def test_a_report_that_fails_leaves_the_model_and_says_so(tmp_path, capfd, monkeypatch, error):
    def measure(*args, **kwargs):
        raise error

    monkeypatch.setattr(brief, "measure", measure)
    output = finetune(tmp_path / "run", eval_ruler_every=2)
    assert f"the report of the trained model is left out: {error}" in " ".join(capfd.readouterr().err.split())
    assert (output / "config.json").exists() and "## How it was made" in (output / "README.md").read_text()


@pytest.mark.usefixtures("short_lengths")
@pytest.mark.parametrize(("every", "steps"), [(0, 3), (1, 1)], ids=["at the end", "on the way"])
def test_a_signal_ends_the_report_and_leaves_what_is_trained(tmp_path, monkeypatch, every, steps):
    def measure(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        asked = args[6]
        while not asked:
            pass
        raise asked.stopped("what was answered is kept")

    monkeypatch.setattr(brief, "measure", measure)
    with pytest.raises(Stopped, match="its report the rest is left out" if not every else "after step 2 of 3") as stop:
        finetune(tmp_path / "run", eval_ruler_every=every)
    assert stop.value.exit_code == 143
    assert (tmp_path / "run/config.json").exists() == (not every)
    if every:
        assert (tmp_path / "run/checkpoints/step-00000002").exists()


def test_what_may_be_asked_for(tmp_path):
    assert [asked_samples(value) for value in ("auto", "none", "0", "12")] == [None, 0, 0, 12]
    for value in ("many", "-1", "1.5", "", "١", "100000"):
        with pytest.raises(UsageError, match="--eval-ruler .*: give a number of samples"):
            finetune(tmp_path / "run", eval_ruler=value)
    with pytest.raises(UsageError, match="--eval-ruler-every asks what --eval-ruler leaves out"):
        finetune(tmp_path / "run", eval_ruler="0", eval_ruler_every=5)
    assert not (tmp_path / "run").exists()


def test_windows_too_short_for_any_task_have_no_report(tmp_path, capfd):
    output = finetune(tmp_path / "run", steps=1, sequence_length=16, landmark_freq=7)
    assert "no report by RULER: its tasks take more than 8 times the trained length" in capfd.readouterr().err
    assert not records(output, "ruler_mean_512") and not (output / "ruler.jsonl").exists()


def test_what_a_device_can_afford():
    assert lengths_of(8192) == [4096, 8192, 32768, 65536] and lengths_of(16) == [128]
    with torch.device("meta"):
        small = tiny_decoder("llama")
        large = tiny_decoder("llama", hidden_size=4096, num_hidden_layers=32, intermediate_size=11008)
    assert affordable_samples(small, lengths_of(8192), on_gpu=True) == brief.MOST_SAMPLES
    assert 2 <= affordable_samples(large, lengths_of(8192), on_gpu=True) < brief.MOST_SAMPLES
    assert affordable_samples(small, lengths_of(8192), on_gpu=False) == 0
    assert affordable_samples(small, lengths_of(256), on_gpu=False) == 1
    assert affordable_samples(large, lengths_of(256), on_gpu=False) == 0


def test_the_mean_is_of_the_tasks_at_a_length():
    trained = Figures({("a", 10): 1.0, ("b", 10): 0.5, ("a", 20): 0.0, ("b", 20): 0.5})
    columns, rows = rows_of(trained, Figures({("a", 10): 1.0, ("b", 10): 0.0}), [10, 20])
    assert columns == ["task", "model", "10", "20"]
    assert rows[-2:] == [["mean", "trained", 0.75, 0.25], ["mean", "untouched", 0.5, None]]
    assert rows[:2] == [["a", "trained", 1.0, 0.0], ["a", "untouched", 1.0, None]]


@pytest.mark.slow
def test_two_processes_wait_for_the_report_of_one(tmp_path):
    options = SHORT | {"model": "base", "data": "barges.txt", "output": tmp_path / "run"}
    options |= {"eval_ruler_every": 2}
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "landmark_cli", "finetune"]
    changed = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run([*command, *arguments], env=os.environ | changed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [record["step"] for record in found if "ruler_mean_2048" in record] == [2, 3]


def test_a_card_names_a_base_of_the_hub_for_the_hub():
    model = tiny_decoder("llama")
    model.config.landmark_freq, model.config.top_k_blocks, model.config.trained_length = 63, 4, 512
    made = Trained("people/base-1B", True, False, "landmark finetune --model people/base-1B", [("data", "books/")])
    card = model_card(model, made)
    assert card.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\nbase_model: people/base-1B\n"
    )
    assert "# base-1B with landmark attention" in card and "    landmark finetune --model people/base-1B\n" in card
    assert "| data | books/ |" in card and "## Figures" not in card
    assert "How it was made" not in model_card(model) and "\nbase_model" not in model_card(model)
