"""GPT-2's tokenizer and a novel, opened once."""

import tarfile

import pytest

from landmark_cli.data.assets import ASSETS
from landmark_cli.data.tokenizers import load_tokenizer


@pytest.fixture(scope="session")
def gpt2():
    return load_tokenizer("gpt2")


@pytest.fixture(scope="session")
def gpt2_directory(gpt2, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpt2")
    gpt2.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def novel():
    with tarfile.open(ASSETS / "austen.tar.xz") as archive:
        return archive.extractfile("persuasion.txt").read().decode()
