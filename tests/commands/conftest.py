"""A place to work in, as a user has it: models under runs/, a corpus under data/."""

import os
import time
from types import SimpleNamespace

import pytest

from landmark_cli import cli, console
from landmark_cli.data.token_file_writer import TokenFileWriter
from tests.gpt2 import small_gpt2
from tests.tiny import tiny_baseline, tiny_model

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 12


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """runs/landmark is newer than runs/baseline; data/mine holds two documents."""
    root = tmp_path_factory.mktemp("workplace")
    tokenizer = small_gpt2(root / "tokenizer")
    landmark = tokenizer.landmark_id
    common = {"vocab_size": landmark + 1, "eos_token_id": tokenizer.eot_id}
    models = {"baseline": tiny_baseline(**common), "landmark": tiny_model(landmark_token_id=landmark, **common)}
    for age, (name, model) in enumerate(models.items()):
        model.save_pretrained(root / "runs" / name)
        tokenizer.save_pretrained(root / "runs" / name)
        then = time.time() - 100 + age
        os.utime(root / "runs" / name / "config.json", (then, then))
    for split in ("train", "validation"):
        with TokenFileWriter(root / "data" / "mine" / f"{split}.bin", tokenizer, source="a test") as writer:
            for document in tokenizer.encode_documents([TEXT, TEXT[::-1]]):
                writer.add_document(document)
    return root


@pytest.fixture
def landmark(workplace, monkeypatch, capsys):
    """Run the command in the workplace, in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(workplace)
    # As in a shell without a terminal: tables are as wide as they need.
    monkeypatch.delenv("COLUMNS", raising=False)
    console.console.cache_clear()

    def call(*arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=exit.value.code, out=out, err=err)

    yield call
    console.console.cache_clear()
