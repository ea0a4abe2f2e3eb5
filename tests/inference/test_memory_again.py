"""A file that is read on from: the blocks that stay in it, and what asking it again reads."""

import copy
import re

import pytest
import torch

from landmark_cli.errors import LandmarkError
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.memory import Memory
from landmark_cli.inference.stored_blocks import Span
from tests.inference.remembering import NOVEL, QUESTION, SETTINGS, ask, read, reader, recalled
from tests.tiny import tiny_text

# --- blocks that stay in the file


@pytest.fixture
def fetched(monkeypatch):
    """The (layer, head, block) that are read from files, in order."""
    found, plain = [], Span.read

    def remember(span, heads, blocks, device):
        found.extend(zip([span.name] * len(heads), heads.tolist(), blocks.tolist(), strict=True))
        return plain(span, heads, blocks, device)

    monkeypatch.setattr(Span, "read", remember)
    return found


def test_a_block_is_fetched_once_and_only_when_it_is_chosen(tmp_path, fetched):
    kept, later = reader(), reader()
    read(kept, NOVEL)
    kept.save(tmp_path / "novel")
    later.recall(tmp_path / "novel")
    assert fetched == []
    later.trace()
    # The incomplete blocks, which are written to, and what queries choose of the 13 complete ones.
    chosen = {(layer, head, 13) for layer in range(2) for head in range(2)}
    for token in range(4):
        later.step([token])
        for layer, (ages, _, blocks) in later.cache.trace.layers.items():
            for head in range(2):
                chosen |= {(layer, head, int(blocks[0] - age)) for age in ages[0, head].flatten() if age > 0}
    expected = {(f"layers.{layer}.blocks", head, block) for layer, head, block in chosen if block <= 13}
    assert set(fetched) == expected and len(fetched) == len(expected) < 2 * 2 * 14


@pytest.mark.parametrize("settings", [{}, {"top_k_blocks": 1, "cache_blocks": 12}, {"positions": "absolute"}], ids=str)
@pytest.mark.parametrize("way", ["on", "copied", "saved", "two rows", "another row"])
def test_reading_on_for_long_is_as_if_nothing_had_come_between(tmp_path, settings, way):
    """The ring grows, wraps, is copied and is given away while blocks of it lie in the file, which stays as it is."""
    whole, kept, later = reader(**settings), reader(**settings), reader(**settings)
    for each in (whole, kept):
        read(each, NOVEL)
    path = tmp_path / "novel"
    kept.save(path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    later.recall(path)
    row = 0
    read(later, NOVEL[:2]), read(whole, NOVEL[:2])
    if way == "copied":
        later, left = copy.deepcopy(later), later
        read(left, QUESTION)
    elif way == "saved":
        later.save(tmp_path / "further")
        later = recalled([tmp_path / "further"], **settings)
    elif way == "two rows":
        later.take([0, 0])
        row = 1
    elif way == "another row":
        later.take([0, 0])
        later.recall(path, row=0)
        later.forget(0)
        row = 1
    further = tiny_text(90, seed=9)
    torch.testing.assert_close(read(later, further, row), read(whole, further))
    torch.testing.assert_close(ask(later, row), ask(whole))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


# --- the same file again


def elsewhere(one: BlockReader, path) -> BlockReader:
    """Between two questions something else is read in the row."""
    one.reset()
    read(one, tiny_text(17, seed=5))
    return one


def another_file(one: BlockReader, path) -> BlockReader:
    one.recall(path.with_name("other"))
    read(one, QUESTION)
    return one


def long_answer(one: BlockReader, path) -> BlockReader:
    """The ring grows, and one of a bounded cache wraps."""
    read(one, tiny_text(90, seed=9))
    return one


def half_a_chunk(one: BlockReader, path) -> BlockReader:
    """The second layer fails when the first has stored its chunk already."""
    plain, calls = one.cache.layers[1].reserve, []

    def broken(*given):
        calls.append(given)
        raise LandmarkError("the second layer fails")

    one.cache.layers[1].reserve = broken
    with pytest.raises(LandmarkError, match="second layer"):
        read(one, tiny_text(8, seed=4))
    one.cache.layers[1].reserve = plain
    assert calls
    return one


def rows_moved(one: BlockReader, path) -> BlockReader:
    one.take([0, 0])
    read(one, tiny_text(8, seed=4), row=0)
    one.take([1])
    return one


BETWEEN = {
    "nothing": lambda one, path: one,
    "reset": lambda one, path: one.reset() or one,
    "elsewhere": elsewhere,
    "long answer": long_answer,
    "long answer, elsewhere": lambda one, path: elsewhere(long_answer(one, path), path),
    "another file": another_file,
    "half a chunk": half_a_chunk,
    "a copy": lambda one, path: copy.deepcopy(one),
    "rows moved": rows_moved,
}


AGAIN = [(between, {}) for between in BETWEEN]
AGAIN += [("long answer, elsewhere", settings) for settings in SETTINGS[1:]]


@pytest.mark.parametrize("between, settings", AGAIN, ids=str)
def test_a_file_that_is_asked_again_answers_as_at_first(tmp_path, settings, between, monkeypatch):
    path, kept = tmp_path / "novel", reader(**settings)
    read(kept, NOVEL)
    kept.save(path)
    read(kept, QUESTION)
    kept.save(tmp_path / "other")
    later = recalled([path], **settings)
    first = ask(later)
    for _ in range(2):
        later = BETWEEN[between](later, path)
        with monkeypatch.context() as closed:
            if between != "another file":
                closed.setattr(Memory, "open", None)
            later.recall(path)
        assert torch.equal(ask(later), first)
        assert list(later.texts[0]) == [*NOVEL.tolist(), *QUESTION.tolist(), 3, 1, 4]


def test_what_has_been_fetched_is_not_fetched_again(tmp_path, fetched):
    kept = reader()
    read(kept, NOVEL)
    kept.save(tmp_path / "novel")
    later = recalled([tmp_path / "novel"])
    ask(later)
    assert fetched
    fetched.clear()
    for _ in range(2):
        later.reset()
        later.recall(tmp_path / "novel")
        ask(later)
        assert fetched == []
    elsewhere(later, None)
    later.recall(tmp_path / "novel")
    later.cache.fetch_all()
    # The 17 tokens read elsewhere stand where the novel's first blocks stood.
    assert {block for _, _, block in fetched} >= set(range(5))
    later.recall(tmp_path / "novel")
    assert not later.cache.fetching


@pytest.mark.parametrize("change", ["flipped", "in place", "replaced", "gone", "touched"])
def test_a_file_that_changed_is_opened_again(tmp_path, change):
    path, kept, other = tmp_path / "novel", reader(), reader()
    read(kept, NOVEL), read(other, tiny_text(53, seed=8))
    kept.save(path), other.save(tmp_path / "other")
    later = recalled([path])
    first = ask(later)
    later.cache.fetch_all()
    content = (tmp_path / "other").read_bytes()
    if change == "flipped":
        whole = bytearray(path.read_bytes())
        whole[-5000:] = bytes(byte ^ 1 for byte in whole[-5000:])
        path.write_bytes(whole)
    elif change == "in place":
        assert len(content) == path.stat().st_size
        path.write_bytes(content)
    elif change == "replaced":
        (tmp_path / "other").replace(path)
    elif change == "gone":
        path.unlink()
    else:
        path.touch()
    if change in ("gone", "flipped"):
        with pytest.raises(LandmarkError, match=re.escape(str(path))):
            later.recall(path)
            later.cache.fetch_all()
        return
    later.recall(path)
    assert torch.equal(ask(later), first if change == "touched" else ask(recalled([path])))
    assert torch.equal(ask(recalled([path])), first) == (change == "touched")


@pytest.mark.parametrize("damage", ["flipped", "cut short", "gone", "replaced"])
def test_what_happens_to_a_file_that_is_being_read(tmp_path, damage):
    """Damage is found by whoever reads a damaged block, and a file that is deleted or replaced stays as it was."""
    kept, later, whole = reader(top_k_blocks=3), reader(top_k_blocks=3), reader(top_k_blocks=3)
    for each in (kept, whole):
        read(each, NOVEL)
    path = tmp_path / "novel"
    kept.save(path)
    later.recall(path)
    later.step([1]), whole.step([1])
    with path.open("r+b") as file:
        if damage == "flipped":
            length = int.from_bytes(file.read(8), "little")
            begin = 8 + length
            content = bytearray(path.read_bytes())
            content[begin:] = bytes(byte ^ 1 for byte in content[begin:])
            file.seek(0), file.write(content)
        elif damage == "cut short":
            file.truncate(3000)
    if damage == "gone":
        path.unlink()
    elif damage == "replaced":
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").replace(path)
    if damage in ("gone", "replaced"):
        assert torch.equal(ask(later), ask(whole))
        return
    why = {"flipped": "block .* of head .* in layers.*blocks is not what was written", "cut short": "ends too early"}
    with pytest.raises(LandmarkError, match=f"{re.escape(str(path))} cannot be read: .*{why[damage]}.*; read the text"):
        ask(later)
