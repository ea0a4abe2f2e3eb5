"""What a run makes of token files, and which it refuses: the rules, and that every command keeps to them."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from landmark_cli.commands import evaluate, finetune, study, train
from landmark_cli.data.batches import Batches
from landmark_cli.data.checks import check_one_tokenizer, check_token_files
from landmark_cli.data.pretrained_tokenizers import text_ids
from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.data.tokenizers import load_tokenizer
from landmark_cli.data.training_data import TrainingData, token_files
from landmark_cli.data.variants import VariantBatches
from landmark_cli.data.windows import Windows
from landmark_cli.errors import LandmarkError
from landmark_cli.file_writing import write_sealed
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.gpt import GPTConfig
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.training.tiny import write_corpus

SHORT = {
    "sequence_length": 32,
    "landmark_freq": 7,
    "steps": 1,
    "accumulation": 1,
    "device": "cpu",
    "output": Path("run"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model with landmarks, its tokenizer, and two corpora made with it."""
    root = tmp_path_factory.mktemp("training-data")
    model, tokenizer = tiny_decoder("llama"), tiny_tokenizer()
    add_landmarks(model, tokenizer, landmark_freq=7, trained_length=64, top_k_blocks=2)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_corpus(root / "data", root / "model")
    write_corpus(root / "more", root / "model", characters=3000)
    return root


@pytest.fixture(autouse=True)
def in_a_copy(place, tmp_path, monkeypatch):
    for name in ("data", "more"):
        (tmp_path / name).mkdir()
        for file in (place / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model").symlink_to(place / "model")
    monkeypatch.chdir(tmp_path)


def claim(corpus, split, **changes):
    """Have the metadata of a token file say something else."""
    described = Path(corpus) / f"{split}.json"
    content = json.loads(described.read_text())
    del content["checksum"]
    write_sealed(described, content | changes)


def run_train(data):
    train.run(train.TrainOptions(data=data, n_layer=1, n_head=2, n_embd=8, **SHORT))


def run_finetune(data):
    finetune.run(
        finetune.FinetuneOptions(model="model", data=[str(directory) for directory in data], eval_ruler="none", **SHORT)
    )


def run_perplexity(data):
    evaluate.run_perplexity(evaluate.PerplexityOptions(model="model", data=data[0], device="cpu"))


def run_study(data):
    roles = ["landmark=model", "baseline=model"]
    study.run(study.StudyOptions(study="table1", role=roles, data=data[0], device="cpu"))


COMMANDS = {"train": run_train, "finetune": run_finetune, "eval perplexity": run_perplexity, "eval study": run_study}
TRAINING = ["train", "finetune"]


def refused(command, file, message):
    with pytest.raises(LandmarkError, match=message) as error:
        COMMANDS[command]([Path("data")])
    assert file in str(error.value) and not list(Path().glob("run/*.jsonl"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_token_files_of_another_tokenizer(command):
    for split in ("train", "validation"):
        claim("data", split, tokenizer_fingerprint="of another")
    file = "data/train.bin" if command in TRAINING else "data/validation.bin"
    refused(command, file, "was prepared with the tokenizer .*model, which is not that of .*model")


@pytest.mark.parametrize(
    ("command", "split"),
    [*((command, "validation") for command in COMMANDS), *((command, "train") for command in TRAINING)],
)
def test_every_command_refuses_ids_that_the_model_does_not_know(command, split):
    claim("data", split, vocab_size=9999)
    refused(command, f"data/{split}.bin", r"may hold ids up to 9998, and .*model.* knows those below \d+: prepare")


@pytest.mark.parametrize("command", TRAINING)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_corpora_of_two_tokenizers_are_refused_together(command, split):
    claim("more", split, tokenizer_fingerprint="of another", tokenizer="other")
    with pytest.raises(LandmarkError, match=f"different tokenizers .*more/{split}.bin with other"):
        COMMANDS[command]([Path("data"), Path("more")])


def test_what_is_checked_of_a_token_file():
    file = TokenFile.open("data/train")
    tokenizer = load_tokenizer("model")
    check_one_tokenizer([file, TokenFile.open("more/train")])
    check_token_files([file], tokenizer.encode, file.metadata.vocab_size, "it")
    check_token_files([file], partial(text_ids, tiny_tokenizer()), file.metadata.vocab_size, "it")
    with pytest.raises(LandmarkError, match="is not that of runs/m"):
        check_token_files([file], lambda text: [1], file.metadata.vocab_size, "runs/m")
    with pytest.raises(LandmarkError, match="runs/m knows those below 9"):
        check_token_files([file], tokenizer.encode, 9, "runs/m")


CONFIG = GPTConfig(trained_length=33, landmark_freq=4, landmark_token_id=600, n_layer=1, n_head=1, n_embd=2)


def test_batches_are_those_of_the_files_and_the_models_windows():
    data = TrainingData.open([Path("data"), Path("more")], [1.0, 2.0])
    windows = data.windows(CONFIG)
    eot = data.train[0].metadata.eot_id
    files = [TokenFile.open("data/train"), TokenFile.open("more/train")]
    expected = Batches(files, [1.0, 2.0], Windows(33, 4, 600, eot), 8, 5).batch(3, 0, 8)
    found = data.batches(windows, 8, 5).batch(3, 0, 8)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain = data.batches(windows, 8, 5, position_jump=0, controlled_landmarks=0.0)
    assert isinstance(plain, Batches)
    varied = data.batches(windows, 8, 5, position_jump=9, controlled_landmarks=0.0)
    assert isinstance(varied, VariantBatches) and "position_ids" in varied.batch(0, 0, 1)
    with_landmarks = data.batches(data.windows(CONFIG, include_landmarks=True), 8, 5).batch(3, 0, 8)
    assert (with_landmarks["labels"] == 600).any() and not (expected["labels"] == 600).any()


@pytest.mark.parametrize(("count", "expected"), [(1, [1, 1]), (2, [1, 1]), (7, [3, 3]), (10**6, [None, None])])
def test_validation_windows_are_spread_over_the_files(count, expected):
    data = TrainingData.open([Path("data"), Path("more")])
    windows = data.windows(CONFIG)
    found = [len(one) for one in data.validation_windows(windows, count)]
    whole = [(len(file.tokens) - 1) // windows.text_length for file in data.validation]
    assert found == [size if limit is None else limit for limit, size in zip(expected, whole, strict=True)]


def test_corpora_without_validation(capsys):
    Path("more/validation.json").unlink()
    Path("more/validation.bin").unlink()
    assert len(TrainingData.open([Path("data"), Path("more")]).validation) == 1
    assert capsys.readouterr().err == ""
    data = TrainingData.open([Path("more")])
    assert data.validation_windows(data.windows(CONFIG), 8) == [] and data.files == data.train
    assert "more has no validation.bin: training without evaluation" in capsys.readouterr().err
    assert TrainingData.open([Path("more")], validation=False).validation == []
    assert capsys.readouterr().err == ""


def test_text_becomes_token_files_once_and_prepared_corpora_stay_where_they_are(capsys):
    Path("cats.txt").write_text("the cats sat on the mats. " * 40)
    names = ["data", "cats.txt"]
    directories = token_files(names, Path("run/data"), "model", validation_share=0.0)
    assert directories == [Path("data"), Path("run/data/1-cats-txt")]
    ids = load_tokenizer("model").encode(Path("cats.txt").read_text())
    with TokenFileWriter("expected/train", load_tokenizer("model"), source="") as writer:
        writer.add_document(np.array(ids))
    prepared = TokenFile.open(directories[1] / "train").metadata
    assert prepared.sha256 == TokenFile.open("expected/train").metadata.sha256
    capsys.readouterr()
    assert token_files(names, Path("run/data"), "model", validation_share=0.0) == directories
    assert "holds token files made from this very source already" in capsys.readouterr().err
