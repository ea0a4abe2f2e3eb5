"""--sequence-length means the same tokens in every command that trains; recipes that meant others are still read."""

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from landmark_cli.commands import finetune, train
from landmark_cli.commands.finetune import FinetuneOptions
from landmark_cli.commands.finetune_plan import PLAIN, filled
from landmark_cli.commands.train import TrainOptions
from landmark_cli.data.landmarks import insert_landmarks
from landmark_cli.data.windows import Windows
from landmark_cli.errors import UsageError
from landmark_cli.options import load_recipe, save_recipe
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.training.tiny import write_corpus

# As the first version that had `landmark finetune` saved them, and the last one before recipes had a format.
SAVED = {
    "first": """\
command: finetune
data: [novels]
data-weights: null
sequence-length: {text}
landmarks-in-loss: false
text-field: text
validation-share: 0.01
model: llama
landmark-freq: {freq}
top-k-blocks: 4
gradient-checkpointing: false
lora-rank: null
lora-alpha: null
lora-dropout: 0.0
lora-targets: null
merge: false
four-bit: false
steps: 15000
batch-size: 2
save-dtype: auto
""",
    "last": """\
command: finetune
data:
- novels
data-weights: null
sequence-length: {text}
landmarks-in-loss: true
text-field: text
validation-share: 0.01
model: llama
landmark-freq: {freq}
top-k-blocks: null
gradient-checkpointing: false
lora-rank: 16
lora-alpha: null
lora-dropout: 0.0
lora-targets: null
merge: false
four-bit: false
steps: 15000
batch-size: 2
accumulation: 8
bad-steps: 10
fp32-residual: true
save-dtype: auto
""",
}


def with_landmarks(text, freq):
    """Tokens of a window of so many text tokens, its landmarks on top."""
    return len(insert_landmarks(torch.zeros(text, dtype=torch.int64), freq, 1))


def recipe(path, text):
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("lengths")
    tiny_decoder("llama").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    write_corpus(root / "data", root / "model")
    return root


@pytest.mark.parametrize("length", [31, 32, 33])
def test_both_commands_train_on_windows_of_that_many_tokens(place, tmp_path, monkeypatch, length):
    """Ending right before a landmark, with one, and behind it."""
    loops = []
    common = {"sequence_length": length, "landmark_freq": 7, "device": "cpu", "seed": 4, "batch_size": 2}
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8}
    for command, options in (
        (train, TrainOptions(data=[place / "data"], output=tmp_path / "train", **common, **shape)),
        (finetune, FinetuneOptions(model=str(place / "model"), data=[str(place / "data")], output=tmp_path, **common)),
    ):
        monkeypatch.setattr(command, "carry_out", lambda *given: loops.append(given[-2:]))
        monkeypatch.setattr("landmark_cli.training.publish.Publication.publish", lambda *_: None)
        command.run(options)
    ids = []
    for config, loop in loops:
        assert config.trained_length == loop.settings.sequence_length == length
        batch = loop.batches.batch(0, 0, 4)["input_ids"]
        assert batch.shape == (4, length)
        assert (batch == config.landmark_token_id).sum() == 4 * (length // 8)
        ids.append(batch.where(batch != config.landmark_token_id, -1))
        assert all(len(window) and window.windows.sequence_length == length for window in loop.validation)
    assert ids[0].equal(ids[1])


@pytest.mark.parametrize(
    ("options", "length", "text"),
    [(TrainOptions(), 512, 502), (filled(FinetuneOptions(model="m", teacher="none"), PLAIN), 2048, 2016)],
    ids=["train", "finetune"],
)
def test_the_default_windows_are_what_they_always_were(options, length, text):
    assert options.sequence_length == length
    assert Windows(options.sequence_length, options.landmark_freq, 5, None).text_length == text


@pytest.mark.parametrize(("name", "length"), [("llama/finetune_7b", 512), ("results/smollm2", 1024)])
def test_the_windows_of_our_recipes_are_what_they_always_were(name, length):
    values = load_recipe(name, FinetuneOptions, "finetune")
    assert values["sequence_length"] == length
    # 504 and 1008, which these recipes gave when text alone was counted.
    assert Windows(length, values["landmark_freq"], 5, None).text_length == length * 63 // 64


@given(st.integers(2, 300), st.integers(1, 70), st.sampled_from(sorted(SAVED)))
def test_what_earlier_runs_saved_is_read_as_it_was_meant(tmp_path_factory, text, freq, version):
    path = recipe(tmp_path_factory.getbasetemp() / "recipe.yaml", SAVED[version].format(text=text, freq=freq))
    values = load_recipe(path, FinetuneOptions, "finetune")
    assert values["sequence_length"] == with_landmarks(text, freq)
    if values["sequence_length"] > freq:
        assert Windows(values["sequence_length"], freq, 1, None).text_length == text


def test_a_recipe_of_an_earlier_run_says_that_it_is_one(tmp_path, capsys):
    load_recipe(recipe(tmp_path / "r.yaml", SAVED["last"].format(text=2016, freq=63)), FinetuneOptions, "finetune")
    assert (
        "saved by an earlier version: its 2016 text tokens a window are 2048 with landmarks" in capsys.readouterr().err
    )


@pytest.mark.parametrize("left_out", ["lora-targets", "text-field", "save-dtype", "four-bit"])
def test_recipes_written_by_hand_mean_what_the_help_says(tmp_path, left_out, capsys):
    lines = SAVED["last"].format(text=512, freq=63).splitlines(keepends=True)
    path = recipe(tmp_path / "r.yaml", "".join(line for line in lines if not line.startswith(left_out)))
    assert load_recipe(path, FinetuneOptions, "finetune")["sequence_length"] == 512
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "options"),
    [("train", TrainOptions(data=[Path("d")])), ("finetune", FinetuneOptions(model="m", data=["d"], lora_rank=4))],
    ids=["train", "finetune"],
)
def test_what_runs_save_today_comes_back_as_it_is(tmp_path, command, options, capsys):
    save_recipe(options, tmp_path / "r.yaml", command)
    content = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert content["format"] == 2 and content["sequence-length"] == options.sequence_length
    assert type(options)(**load_recipe(tmp_path / "r.yaml", type(options), command)) == options
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("version", ["3", "1", "[2]", "two"])
def test_a_recipe_of_another_format_is_refused(tmp_path, version):
    path = recipe(tmp_path / "r.yaml", f"command: train\nformat: {version}\nsteps: 3\n")
    with pytest.raises(UsageError, match="this version reads format 2, not "):
        load_recipe(path, TrainOptions, "train")
