"""Token files: what goes in comes out, and nothing unfinished, truncated or changed is ever taken for whole."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark_cli.data.token_file import TokenFile, TokenFileWriter, find_corpus, read_metadata, remove_token_file
from landmark_cli.errors import LandmarkError
from landmark_cli.file_reading import hash_file
from landmark_cli.file_writing import write_sealed
from tests.data.texts import documents_in


class Letters:
    """A tokenizer whose ids are bytes."""

    name = "letters"
    vocab_size = 257
    eot_id = 256
    fingerprint = "abc"


class ManyLetters(Letters):
    vocab_size = 70_000
    eot_id = 69_999


def write(path, documents, tokenizer=Letters, **settings):
    with TokenFileWriter(path, tokenizer, source="a test", **settings) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.uint32), text_bytes=len(document))
    return TokenFile.open(path)


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


def flip_a_byte(path, at=0):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    # A coarse clock of the file system could hide so quick a change.
    os.utime(path, ns=(1, 1))


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


def test_a_format_of_the_future_is_refused(tmp_path):
    write(tmp_path / "train.bin", [[1]])
    described = tmp_path / "train.json"
    content = json.loads(described.read_text()) | {"format": 99}
    del content["checksum"]
    write_sealed(described, content)
    with pytest.raises(LandmarkError, match="not of a kind that this version reads"):
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


def test_metadata_without_a_checksum_is_of_an_earlier_version(tmp_path):
    write(tmp_path / "train.bin", [[1, 2]])
    content = json.loads((tmp_path / "train.json").read_text())
    del content["checksum"], content["left_out"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(LandmarkError, match="lacks 'checksum'"):
        TokenFile.open(tmp_path / "train.bin")
    (tmp_path / "train.json").write_text(json.dumps(content | {"format": 1, "modified_ns": [0, 0]}))
    assert TokenFile.open(tmp_path / "train.bin").metadata.left_out is None
    # Its contents were looked at, and it has a checksum from now on.
    assert json.loads((tmp_path / "train.json").read_text()).keys() > {"checksum"}


def test_every_bit_of_the_metadata_counts(tmp_path):
    write(tmp_path / "train.bin", [[1, 2]])
    content = (tmp_path / "train.json").read_bytes()
    for bit in range(0, 8 * len(content), 3):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "train.json").write_bytes(damaged)
        try:
            assert TokenFile.open(tmp_path / "train.bin")
        except LandmarkError:
            continue
        assert json.loads(damaged) == json.loads(content)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_every_byte_of_a_checkpoint_counts(tmp_path, at):
    writer = TokenFileWriter(tmp_path / "train.bin", Letters, source="a test")
    writer.add_document(np.array([1, 2]))
    state = writer.checkpoint()
    writer.close()
    flip_a_byte(tmp_path / "train.bin.partial", at)
    with pytest.raises(LandmarkError, match=r"train\.bin\.partial is not what had been written to it"):
        TokenFileWriter(tmp_path / "train.bin", Letters, source="a test", resume=state)


def test_the_newest_corpus_is_found(tmp_path):
    with pytest.raises(LandmarkError, match="no prepared corpus under .*landmark prepare"):
        find_corpus(tmp_path)
    for age, name in enumerate(["new", "old", "unfinished"]):
        write(tmp_path / name / "train.bin", [[1]])
        os.utime(tmp_path / name / "train.bin", (1_000_000 - age, 1_000_000 - age))
    os.utime(tmp_path / "unfinished" / "train.bin")
    (tmp_path / "unfinished" / "train.json").unlink()
    assert find_corpus(tmp_path) == tmp_path / "new"
    assert read_metadata(tmp_path / "new" / "train").documents == 1
