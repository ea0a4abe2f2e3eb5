"""A file that cannot be read on from, or is damaged: a line that says why."""

import dataclasses
import random
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference import memory_fit, reader_memory
from landmark_cli.inference.memory import Memory
from landmark_cli.inference.window import WindowReader
from tests.inference.remembering import NOVEL, QUESTION, ask, read, reader, recalled
from tests.tiny import LANDMARK, tiny_baseline


@pytest.mark.parametrize("version, message", [(4, "a newer version"), (5, "a newer version"), (2, "an older version")])
def test_another_version_is_refused(tmp_path, monkeypatch, version, message):
    kept = reader()
    read(kept, NOVEL)
    monkeypatch.setattr(memory_fit, "VERSION", version)
    kept.save(tmp_path / "novel")
    monkeypatch.undo()
    with pytest.raises(LandmarkError, match=f"written by {message} of this program.* read the text anew"):
        recalled([tmp_path / "novel"])


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "weights")
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times.")
    for name, message in {
        "weights": "it holds no memory of a reader",
        "text": "it holds no memory of a reader; landmark generate --save-memory writes one",
        "none": "No such file",
        "": "ordinary file",
    }.items():
        with pytest.raises(LandmarkError, match=rf"{re.escape(str(tmp_path / name))} cannot be read: .*{message}"):
            recalled([tmp_path / name])
    with pytest.raises(UsageError, match="no landmarks"):
        WindowReader(tiny_baseline()).recall(tmp_path / "weights")


def read_all(path):
    """Read every byte of a memory's file."""
    for blocks, _ in Memory.open(path).layers:
        blocks.whole()


def test_damage_is_found_wherever_it_is(tmp_path):
    kept = reader()
    read(kept, NOVEL)
    path = tmp_path / "novel"
    kept.save(path)
    read_all(path)
    whole, chance = path.read_bytes(), random.Random(3)
    for at in [*range(0, 1200, 23), *(chance.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(LandmarkError, match=re.escape(str(path))):
            read_all(path)
    for end in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(LandmarkError, match=re.escape(str(path))) as found:
            Memory.open(path)
        assert ("it is longer or shorter than it was written" in str(found.value)) == (end > 7)


@pytest.mark.parametrize("used", [False, True])
def test_a_file_whose_incomplete_block_is_damaged_leaves_nothing_to_read_on_from(tmp_path, used):
    """It is the one block that is fetched unasked: by a reader in use at once, else when a layer is first used."""
    kept, later = reader(), reader()
    read(kept, NOVEL)
    path = tmp_path / "novel"
    kept.save(path)
    content = path.read_bytes()
    with safe_open(path, "pt") as file:
        block = file.get_tensor("layers.1.blocks")[1, -1].numpy().tobytes()
    path.write_bytes(content.replace(block, bytes([block[0] ^ 1]) + block[1:]))
    damaged = pytest.raises(LandmarkError, match="block 13 of head 1 in layers.1.blocks is not what was written")
    if used:
        read(later, NOVEL[:20])
        with damaged:
            later.recall(path)
        assert len(later.texts[0]) == 0 and not later.cache.fetching
        assert torch.equal(ask(later), ask(reader()))
    else:
        later.recall(path)
        for _ in range(2):
            with damaged:
                read(later, QUESTION)
    path.write_bytes(content)
    later.recall(path)
    assert torch.equal(ask(later), ask(kept))


@pytest.mark.parametrize("field", ["blocks", "tail", "text", "layers"])
def test_a_file_that_was_made_up_is_refused(tmp_path, field):
    """Its checksums are right, and its counts do not fit its tensors."""
    kept = reader()
    read(kept, NOVEL)
    made = reader_memory.take(kept)
    wrong = {
        "blocks": 10**12,
        "tail": -1,
        "text": made.text[1:],
        "layers": [made.layers[0], made.layers[1]._replace(landmark_keys=made.layers[1].landmark_keys[:, 1:])],
    }
    dataclasses.replace(made, **{field: wrong[field]}).save(tmp_path / "made")
    with pytest.raises(LandmarkError, match="made cannot be read: its counts and its tensors do not fit each other"):
        Memory.open(tmp_path / "made")
    dataclasses.replace(made, text=made.text * 0 + LANDMARK + 1).save(tmp_path / "made")
    with pytest.raises(LandmarkError, match="does not fit the model"):
        recalled([tmp_path / "made"])
