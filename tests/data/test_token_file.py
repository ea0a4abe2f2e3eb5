"""Token files: what goes in comes out, and nothing unfinished, truncated or changed is ever taken for whole."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark_cli.data.token_file import TokenFile, newest_corpus
from landmark_cli.data.token_file_metadata import read_metadata, remove_token_file
from landmark_cli.errors import LandmarkError
from landmark_cli.file_reading import hash_file
from landmark_cli.file_writing import write_sealed
from tests.data.letters import Letters, ManyLetters, flip_a_byte, write
from tests.data.texts import documents_in


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 255), max_size=20), max_size=8), st.sampled_from([Letters, ManyLetters]))
def test_documents_come_back(tmp_path_factory, documents, tokenizer):
    opened = write(tmp_path_factory.mktemp("t") / "train.bin", documents, tokenizer)
    assert documents_in(opened) == documents
    assert opened.tokens.tolist() == [t for document in documents for t in [*document, tokenizer.eot_id]]
    assert opened.tokens.dtype == (np.uint16 if tokenizer is Letters else np.uint32)
    metadata = opened.metadata
    assert (metadata.tokens, metadata.documents) == (len(opened.tokens), len(documents))
    assert metadata.text_bytes == sum(map(len, documents))
    assert (metadata.tokenizer, metadata.eot_id, metadata.source) == ("letters", tokenizer.eot_id, "a test")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGE = {
    "truncated": (lambda d: os.truncate(d / "train.bin", 4), r"train\.bin .*4 bytes instead of 10"),
    "longer": (lambda d: open(d / "train.bin", "ab").write(b"xx"), r"train\.bin .*12 bytes instead of 10"),
    "changed": (lambda d: flip_a_byte(d / "train.bin"), r"train\.bin .*contents are not those"),
    "lost": (lambda d: (d / "train.bin").unlink(), r"train\.bin .*missing"),
    "unfinished": (lambda d: (d / "train.json").unlink(), r"not finished.*landmark prepare"),
    "garbled": (lambda d: (d / "train.json").write_text("{"), r"train\.json cannot be read"),
    "other facts": (
        lambda d: edit(d / "train.json", '"eot_id": 256', '"eot_id": 255'),
        r"train\.json .*not what was written",
    ),
    "other json": (lambda d: (d / "train.json").write_text("{}"), r"train\.json cannot be read"),
    "gone": (lambda d: remove_token_file(d / "train.bin"), r"there is no token file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(tmp_path, damage):
    write(tmp_path / "train.bin", [[1, 2], [3]])
    do, message = DAMAGE[damage]
    do(tmp_path)
    with pytest.raises(LandmarkError, match=message):
        TokenFile.open(tmp_path / "train.bin")


def test_a_directory_is_not_a_token_file(tmp_path):
    with pytest.raises(LandmarkError, match=r"is a directory.*train\.bin"):
        TokenFile.open(tmp_path)


def test_a_copy_is_checked_once_and_then_trusted(tmp_path, monkeypatch):
    write(tmp_path / "train.bin", [[1, 2]])
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in ("train.bin", "train.json"):
        shutil.copyfile(tmp_path / file, copied / file)
        os.utime(copied / file, ns=(10**18, 10**18))
    assert documents_in(TokenFile.open(copied / "train.bin")) == [[1, 2]]
    monkeypatch.setattr("landmark_cli.data.token_file.ALWAYS_CHECKED_BYTES", 0)
    monkeypatch.setattr("landmark_cli.data.token_file.hash_file", None)
    assert documents_in(TokenFile.open(copied / "train.bin")) == [[1, 2]]


def test_bytes_that_flip_by_themselves_are_found(tmp_path, monkeypatch):
    """A disk that fails leaves the time of writing as it was: small files are hashed all the same, large ones when
    somebody asks."""
    write(tmp_path / "train.bin", [[1, 2], [3]])
    file = tmp_path / "train.bin"
    before = file.stat().st_mtime_ns
    flip_a_byte(file)
    os.utime(file, ns=(before, before))
    with pytest.raises(LandmarkError, match=r"train\.bin .*contents are not those"):
        TokenFile.open(file)
    monkeypatch.setattr("landmark_cli.data.token_file.ALWAYS_CHECKED_BYTES", 0)
    TokenFile.open(file)
    with pytest.raises(LandmarkError, match=r"train\.bin .*contents are not those"):
        TokenFile.open(file, verify=True)


def as_written_before(path, version, with_offsets=True):
    """Turn a token file into one of an earlier format, with the places of its documents in a file beside it; format 1
    has no checksum and says nothing of what was left out."""
    content = json.loads(path.with_suffix(".json").read_text())
    ends = np.flatnonzero(TokenFile.open(path).tokens == content["eot_id"]) + 1
    offsets = path.with_suffix(".offsets")
    offsets.write_bytes(np.array([0, *ends], dtype="<i8").tobytes())
    content |= {"format": version, "offsets_sha256": hash_file(offsets).hexdigest()}
    content["modified_ns"] = [file.stat().st_mtime_ns for file in (path, offsets)]
    if not with_offsets:
        offsets.unlink()
    del content["checksum"]
    if version == 1:
        del content["left_out"]
        path.with_suffix(".json").write_text(json.dumps(content))
    else:
        write_sealed(path.with_suffix(".json"), content)


EARLIER = pytest.mark.parametrize(("version", "with_offsets"), [(1, True), (1, False), (2, True), (2, False)], ids=str)


@EARLIER
def test_token_files_of_earlier_formats_open_and_are_trusted(tmp_path, monkeypatch, version, with_offsets):
    path = tmp_path / "train.bin"
    write(path, [[1, 2], [3]])
    as_written_before(path, version, with_offsets)
    described = path.with_suffix(".json").read_bytes()
    opened = TokenFile.open(path, verify=True)
    assert documents_in(opened) == [[1, 2], [3]] and opened.metadata.left_out is None
    assert (opened.metadata.format, opened.metadata.documents) == (version, 2)
    # A large one is not hashed again, and nothing is written beside it.
    monkeypatch.setattr("landmark_cli.data.token_file.ALWAYS_CHECKED_BYTES", 0)
    monkeypatch.setattr("landmark_cli.data.token_file.hash_file", None)
    assert documents_in(TokenFile.open(path)) == [[1, 2], [3]]
    assert path.with_suffix(".json").read_bytes() == described


@EARLIER
@pytest.mark.parametrize("damage", ["truncated", "longer", "changed", "lost"])
def test_damage_to_token_files_of_earlier_formats_is_found(tmp_path, version, with_offsets, damage):
    write(tmp_path / "train.bin", [[1, 2], [3]])
    as_written_before(tmp_path / "train.bin", version, with_offsets)
    do, message = DAMAGE[damage]
    do(tmp_path)
    with pytest.raises(LandmarkError, match=message):
        TokenFile.open(tmp_path / "train.bin")


def test_a_copy_of_an_earlier_format_is_looked_at_once_and_brought_up_to_date(tmp_path):
    path = tmp_path / "train.bin"
    write(path, [[1, 2]])
    as_written_before(path, 2)
    os.utime(path, ns=(10**18, 10**18))
    assert documents_in(TokenFile.open(path)) == [[1, 2]]
    metadata = read_metadata(path)
    assert (metadata.format, metadata.modified_ns) == (3, [10**18])


def test_nothing_of_an_earlier_format_stays_beside_a_file_that_replaces_it(tmp_path):
    for end in (lambda path: write(path, [[3]]), remove_token_file):
        write(tmp_path / "train.bin", [[1, 2]])
        as_written_before(tmp_path / "train.bin", 2)
        end(tmp_path / "train.bin")
        assert not (tmp_path / "train.offsets").exists()


def test_the_newest_corpus_is_found(tmp_path):
    with pytest.raises(LandmarkError, match="no prepared corpus under .*landmark prepare"):
        newest_corpus(tmp_path)
    for age, name in enumerate(["new", "old", "unfinished"]):
        write(tmp_path / name / "train.bin", [[1]])
        os.utime(tmp_path / name / "train.bin", (1_000_000 - age, 1_000_000 - age))
    os.utime(tmp_path / "unfinished" / "train.bin")
    (tmp_path / "unfinished" / "train.json").unlink()
    assert newest_corpus(tmp_path) == tmp_path / "new"
    assert read_metadata(tmp_path / "new" / "train").documents == 1
