"""A token file is written whole or not at all, and a writer goes on where another one stopped."""

import os

import numpy as np
import pytest

from landmark_cli.data.token_file import TokenFile
from landmark_cli.data.token_file_writer import TokenFileWriter
from landmark_cli.errors import LandmarkError
from tests.data.letters import Letters, flip_a_byte, write
from tests.data.texts import documents_in


def test_pieces_make_one_document(tmp_path):
    with TokenFileWriter(tmp_path / "train", Letters, source="a test") as writer:
        writer.append(np.array([1, 2]))
        writer.append(np.array([3]))
        writer.end_document()
    opened = TokenFile.open(tmp_path / "train")
    assert opened.path == tmp_path / "train.bin"
    assert opened.tokens.tolist() == [1, 2, 3, 256]


def test_an_error_leaves_what_stood_there(tmp_path):
    write(tmp_path / "train.bin", [[1, 2]])
    with pytest.raises(ZeroDivisionError), TokenFileWriter(tmp_path / "train.bin", Letters, source="new") as writer:
        writer.add_document(np.array([3]))
        raise ZeroDivisionError
    assert documents_in(TokenFile.open(tmp_path / "train.bin")) == [[1, 2]]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train.bin", "train.json"]


def test_a_writer_goes_on_from_a_checkpoint(tmp_path):
    whole = write(tmp_path / "whole.bin", [[1, 2], [3]])
    writer = TokenFileWriter(tmp_path / "train.bin", Letters, source="a test")
    writer.add_document(np.array([1, 2]), text_bytes=2)
    state = writer.checkpoint()
    writer.append(np.array([7, 7, 7]), text_bytes=3)
    writer.close()
    with TokenFileWriter(tmp_path / "train.bin", Letters, source="a test", resume=state) as writer:
        writer.add_document(np.array([3]), text_bytes=1)
    opened = TokenFile.open(tmp_path / "train.bin")
    assert opened.metadata.sha256 == whole.metadata.sha256
    assert (opened.metadata.documents, opened.metadata.text_bytes) == (2, 3)


def test_a_checkpoint_that_was_cut_short_is_refused(tmp_path):
    writer = TokenFileWriter(tmp_path / "train.bin", Letters, source="a test")
    writer.add_document(np.array([1, 2]))
    state = writer.checkpoint()
    writer.close()
    os.truncate(tmp_path / "train.bin.partial", 2)
    with pytest.raises(LandmarkError, match=r"train\.bin\.partial is 4 bytes shorter"):
        TokenFileWriter(tmp_path / "train.bin", Letters, source="a test", resume=state)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match="below the vocabulary's 257, found 300"):
        write(tmp_path / "train.bin", [[300]])


@pytest.mark.parametrize("at", [0, 1, 5])
def test_every_byte_of_a_checkpoint_counts(tmp_path, at):
    writer = TokenFileWriter(tmp_path / "train.bin", Letters, source="a test")
    writer.add_document(np.array([1, 2]))
    state = writer.checkpoint()
    writer.close()
    flip_a_byte(tmp_path / "train.bin.partial", at)
    with pytest.raises(LandmarkError, match=r"train\.bin\.partial is not what had been written to it"):
        TokenFileWriter(tmp_path / "train.bin", Letters, source="a test", resume=state)
