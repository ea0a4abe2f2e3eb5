"""What was read, kept and read on from: as if nothing had come between."""

import copy
import hashlib
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from landmark_cli.errors import LandmarkError
from landmark_cli.inference import memory
from landmark_cli.models.decoders import add_landmarks
from tests.inference.remembering import NOVEL, QUESTION, ask, each_setting, read, reader
from tests.models.families import tiny_tokenizer
from tests.tiny import FREQ, tiny_llama, tiny_text


@each_setting
@pytest.mark.parametrize("length", [1, 3, 4, 53])
def test_reading_on_from_a_file_gives_the_same_bits(tmp_path, settings, length):
    whole, kept, later = reader(**settings), reader(**settings), reader(**settings)
    for each in (whole, kept):
        read(each, NOVEL[:length])
    kept.save(tmp_path / "novel")
    later.recall(tmp_path / "novel")
    assert torch.equal(ask(later), ask(whole))
    assert later.texts == whole.texts == [torch.cat([NOVEL[:length], QUESTION, torch.tensor([3, 1, 4])]).tolist()] or (
        list(later.texts[0]) == list(whole.texts[0])
    )


def test_many_blocks_are_kept_and_read_on_from_in_inference_mode(tmp_path):
    """Several threads then read and add up: each begins outside of the mode, and may write to no tensor of it."""
    novel = tiny_text(50 * FREQ + 1, seed=8)
    with torch.inference_mode():
        whole, kept, later = (reader() for _ in range(3))
        for each in (whole, kept):
            read(each, novel)
        kept.save(tmp_path / "novel")
        later.recall(tmp_path / "novel")
        assert torch.equal(ask(later), ask(whole))
        later.save(tmp_path / "again")
        expected = ask(later)
    outside = reader()
    outside.recall(tmp_path / "again")
    assert torch.equal(ask(outside), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_grouped_heads(tmp_path, dtype):
    model = tiny_llama(num_attention_heads=4)
    add_landmarks(model, tiny_tokenizer(), landmark_freq=FREQ, trained_length=32)
    model = model.to(dtype)
    whole, kept, later = (reader(model=model) for _ in range(3))
    for each in (whole, kept):
        read(each, NOVEL % 20)
    kept.save(tmp_path / "novel")
    later.recall(tmp_path / "novel")
    assert torch.equal(read(later, QUESTION % 20), read(whole, QUESTION % 20))


@each_setting
def test_a_row_of_a_reader_in_use_goes_on_from_it(tmp_path, settings):
    """In place of what it has read, whatever other rows do meanwhile."""
    whole = reader(**settings)
    read(whole, NOVEL)
    whole.save(tmp_path / "novel")
    busy, alone = reader(2, **settings), reader(**settings)
    other = tiny_text(21, seed=5)
    list(busy.read([other, tiny_text(90, seed=6)]))
    read(alone, other)
    busy.recall(tmp_path / "novel", row=1)
    torch.testing.assert_close(ask(busy, row=1), ask(whole))
    torch.testing.assert_close(ask(busy, row=0), ask(alone))


def test_a_memory_is_written_in_a_file_as_it_says(tmp_path):
    kept = reader(2, cache_blocks=4)
    list(kept.read([NOVEL[:5], NOVEL]))
    kept.save(tmp_path / "novel", row=1)
    (tmp_path / "other").touch()
    assert (tmp_path / "novel").stat().st_mode == (tmp_path / "other").stat().st_mode
    with safe_open(tmp_path / "novel", "pt") as file:
        header = json.loads(file.metadata()["landmark"])
    assert (header["blocks"], header["tail"], header["about"]["cache_blocks"]) == (13, 1, 4)
    tensors = load_file(tmp_path / "novel")
    assert tensors["layers.1.blocks"].shape == (2, 5, 2, FREQ + 1, 8)
    assert not tensors["layers.1.blocks"][:, -1, :, 1:].any() and tensors["layers.1.blocks"][:, -1, :, 0].all()
    assert tensors["text"].tolist() == NOVEL.tolist()
    again = reader(cache_blocks=4)
    read(again, NOVEL)
    again.save(tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again").items():
        if not name.endswith(".checksums"):
            torch.testing.assert_close(tensors[name], tensor)
    weights = hashlib.shake_256(b"landmark").digest(8 * 2 * (2 * (FREQ + 1) * 8 // 2))
    low, high = (weights[: len(weights) // 2], weights[len(weights) // 2 :])
    for head, sums in zip(tensors["layers.0.blocks"], tensors["layers.0.checksums"].tolist(), strict=True):
        for block, found in zip(head, sums, strict=True):
            words = struct.unpack("<80i", block.numpy().tobytes())
            expected = 0
            weights = (struct.unpack("<40q", part) for part in (low, high))
            for m, n, lo, hi in zip(*weights, words[::2], words[1::2], strict=True):
                # A word of 64 bits is hi * 2^32 + lo, lo without a sign.
                expected += m * (hi * 2**32 + lo % 2**32) + n * hi
            assert found % 2**64 == expected % 2**64


def test_reading_on_and_saving_again_is_as_reading_at_once(tmp_path):
    whole, part, later = reader(), reader(), reader()
    read(whole, NOVEL[:32]), read(part, NOVEL[:32])
    part.save(tmp_path / "part")
    later.recall(tmp_path / "part")
    for each, name in ((whole, "whole"), (later, "part")):
        read(each, NOVEL[32:])
        each.save(tmp_path / name)
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_was_recalled_can_be_saved_unread(tmp_path):
    kept, later = reader(), reader()
    read(kept, NOVEL)
    kept.save(tmp_path / "novel")
    later.recall(tmp_path / "novel")
    later.save(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "novel").read_bytes()
    later.reset()
    with pytest.raises(LandmarkError, match="nothing has been read"):
        later.save(tmp_path / "none")
    assert torch.equal(ask(later), ask(reader()))


@pytest.mark.parametrize("unread", [False, True])
def test_rows_that_take_each_others_place_take_their_memories_along(tmp_path, unread):
    one, two = reader(), reader()
    read(one, NOVEL), read(two, NOVEL[:21])
    for name, each in (("one", one), ("two", two)):
        each.save(tmp_path / name)
    rows = reader(2)
    if unread:
        rows.recall(tmp_path / "one", row=0), rows.recall(tmp_path / "two", row=1)
    else:
        list(rows.read([NOVEL, NOVEL[:21]]))
    again = copy.deepcopy(rows)
    rows.take([1, 1, 0])
    for row, name in enumerate(("two", "two", "one")):
        rows.save(tmp_path / "row", row)
        found, expected = load_file(tmp_path / "row"), load_file(tmp_path / name)
        for key in expected:
            if not key.endswith(".checksums"):
                torch.testing.assert_close(found[key], expected[key])
    rows.step([3, None, None])
    assert list(map(len, rows.texts)) == [22, 21, 53]
    torch.testing.assert_close(ask(again), ask(one))


# --- what is written


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    kept = reader()
    read(kept, NOVEL)
    kept.save(tmp_path / "novel")
    before = (tmp_path / "novel").read_bytes()
    read(kept, QUESTION)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory, "settle", full)
    with pytest.raises(LandmarkError, match="novel cannot be written: No space left on device; make room"):
        kept.save(tmp_path / "novel")
    assert (tmp_path / "novel").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
