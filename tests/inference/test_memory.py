"""What was read, kept and read on from: as if nothing had come between, or a line that says why not."""

import copy
import dataclasses
import hashlib
import json
import random
import re
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from landmark_cli.errors import LandmarkError, UsageError
from landmark_cli.inference import memory
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.memory import About, Memory
from landmark_cli.inference.stored_blocks import Span, checksums_of
from landmark_cli.inference.window import WindowReader
from landmark_cli.models.decoders import add_landmarks
from landmark_cli.models.quantization import quantize
from tests.models.families import tiny_tokenizer
from tests.tiny import FREQ, LANDMARK, tiny_baseline, tiny_llama, tiny_model, tiny_text

MODEL = tiny_model()
NOVEL, QUESTION = tiny_text(53), tiny_text(11, seed=2)
SETTINGS = [
    {},
    {"selection": "max_over_heads"},
    {"selection": "max_over_tokens", "top_k_blocks": 3},
    {"cache_blocks": 3},
    {"cache_blocks": 0},
    {"positions": "absolute"},
    {"positions": "absolute", "cache_blocks": 4},
    {"offload": "cpu"},
    {"top_k_blocks": 0},
]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda chosen: " ".join(map(str, chosen.items())))


def reader(batch=1, model=MODEL, **settings) -> BlockReader:
    return BlockReader(model, **{"chunk": 8, **settings}, batch=batch)


def read(from_reader: BlockReader, text, row=0) -> torch.Tensor:
    """The logits of a text that one row reads; the others rest."""
    rows = [text if index == row else text[:0] for index in range(from_reader.batch)]
    return torch.cat([chunk.row(row) for chunk in from_reader.read(rows)])


def ask(from_reader: BlockReader, row=0) -> torch.Tensor:
    """The logits of the question, chunk by chunk, and of three steps behind it."""
    steps = [[token if index == row else None for index in range(from_reader.batch)] for token in (3, 1, 4)]
    return torch.cat([read(from_reader, QUESTION, row), *(from_reader.step(step)[row, None] for step in steps)])


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_blocks_that_differ_have_other_checksums(device):
    """One bit, the same bit of two words, words that take each other's place, words that are gone."""
    block = torch.randn(2, FREQ + 1, 8, generator=torch.Generator().manual_seed(0))
    words = block.view(-1).view(torch.int32)
    assert len(words) == 80
    changed = [words.clone()]
    for bit in range(32):
        for places in ([0], [79], [0, 1], [0, 2], [1, 3], [5, 78]):
            changed.append(words.clone())
            changed[-1][places] ^= torch.tensor(1 << bit).to(torch.int32)
    for swapped in ([1, 0], [2, 1], [3, 0]):
        changed.append(words.clone())
        changed[-1][swapped] = changed[-1][swapped[::-1]]
    for count in (1, 2, 80):
        changed.append(words.clone())
        changed[-1][:count] = 0
    blocks = torch.stack(changed).view(torch.float32).view(-1, *block.shape)
    sums = checksums_of(blocks.to(device)).cpu()
    assert len(set(sums.tolist())) == len(blocks) and torch.equal(sums, checksums_of(blocks))
    assert torch.equal(sums[:1], checksums_of(block[None])) and checksums_of(blocks[:0]).shape == (0,)


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


# --- a library


@pytest.fixture
def books(tmp_path):
    """Paths by name: "b" has 6 blocks and 3 tokens, "c" 5 blocks, "b6" is the first 6 blocks of "b"."""
    texts = {"b": tiny_text(27, seed=7), "c": tiny_text(20, seed=8)}
    for name, text in {**texts, "b6": texts["b"][:24]}.items():
        for bound in (None, 5):
            one = reader(cache_blocks=bound)
            read(one, text)
            one.save(tmp_path / f"{name}-{bound}")
    return lambda bound, *names: [tmp_path / f"{name}-{bound}" for name in names]


def recalled(paths, **settings):
    one = reader(**settings)
    one.recall(*paths)
    return one


def test_a_library_has_the_blocks_of_its_files_one_after_another(books):
    both = recalled(books(None, "b", "c"))
    assert (both.cache.host_blocks, both.cache.host_tail) == ([11], [0])
    first, second = (recalled(books(None, name)).cache.copy_of(0) for name in ("b", "c"))
    for together, one, two in zip(both.cache.copy_of(0), first, second, strict=True):
        for held, before, after in zip(together, one, two, strict=True):
            assert torch.equal(held, torch.cat([before[:, :6], after], dim=1))
    assert list(both.texts[0]) == [*tiny_text(27, seed=7)[:24].tolist(), *tiny_text(20, seed=8).tolist()]
    assert not torch.equal(ask(both), ask(recalled(books(None, "c", "b"))))


def test_the_incomplete_block_of_an_earlier_file_is_left_out(books):
    assert torch.equal(ask(recalled(books(None, "b", "c"))), ask(recalled(books(None, "b6", "c"))))
    assert recalled(books(None, "c", "b")).cache.host_tail == [3]


@pytest.mark.parametrize("settings", [{}, {"cache_blocks": 3}], ids=str)
@pytest.mark.parametrize("order", ["sb", "ssb", "bs", "bsb", "ss"])
def test_texts_shorter_than_a_block_are_part_of_a_library_too(tmp_path, settings, order):
    """They have no complete block, so in front of others nothing of them is left."""
    for name, text in {"s": NOVEL[:3], "b": NOVEL}.items():
        one = reader(**settings)
        read(one, text)
        one.save(tmp_path / name)
    left = [name for name in order[:-1] if name == "b"] + [order[-1]]
    found, expected = (recalled([tmp_path / name for name in names], **settings) for names in (order, left))
    assert torch.equal(ask(found), ask(expected)) and found.texts == expected.texts


def test_a_library_keeps_no_more_than_the_cache_does(books):
    """The last file fills it, so what came before is evicted; the placement of the nearest blocks is the same."""
    bounded = recalled(books(5, "b", "c"), cache_blocks=5)
    assert torch.equal(ask(bounded), ask(recalled(books(5, "c"), cache_blocks=5)))
    assert bounded.cache.host_blocks[0] > 11


def test_no_library_of_absolute_positions(tmp_path):
    one = reader(positions="absolute")
    read(one, NOVEL)
    one.save(tmp_path / "a")
    with pytest.raises(UsageError, match="absolute positions cannot be read one after another"):
        recalled([tmp_path / "a"] * 2, positions="absolute")


# --- what is refused


def quantized_model() -> PreTrainedModel:
    model = tiny_model(n_embd=64, vocab_size=96)
    quantize(model, "int8", torch.device("cpu"))
    return model


OTHER = {
    "top_k_blocks": ({"top_k_blocks": 1}, "--top-k-blocks 2, and this is to be read with 1: give --top-k-blocks 2"),
    "chunk": ({"chunk": 12}, "--chunk 8"),
    "cache_blocks": ({"cache_blocks": 7}, "--cache-blocks none"),
    "selection": ({"selection": "max_over_heads"}, "--selection per_token_and_head"),
    "positions": ({"positions": "absolute"}, "--positions bounded"),
    "context_miss_cutoff": ({"context_miss_cutoff": 0.5}, "--context-miss-cutoff 0.0"),
    "landmark_freq": ({"model": tiny_model(landmark_freq=5)}, "--landmark-freq 4|another model"),
    "model": ({"model": tiny_model(seed=1)}, "was read by another model, 'GPTForCausalLM'"),
    "quantization": ({"model": quantized_model()}, "--quantization none, and this is to be read with int8: give"),
    "dtype": (
        {"model": tiny_model().double()},
        "--dtype float32, and this is to be read with float64: give --dtype float32",
    ),
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(About) if field.name != "version"])
def test_a_memory_of_other_settings_is_refused_by_their_names(tmp_path, name):
    kept = reader()
    read(kept, NOVEL)
    kept.save(tmp_path / "novel")
    settings, message = OTHER[name]
    with pytest.raises(UsageError, match=message) as error:
        recalled([tmp_path / "novel"], **settings)
    assert f"--memory {tmp_path / 'novel'}" in str(error.value)


@pytest.mark.parametrize("version, message", [(4, "a newer version"), (2, "an older version")])
def test_another_version_is_refused(tmp_path, monkeypatch, version, message):
    kept = reader()
    read(kept, NOVEL)
    monkeypatch.setattr(memory, "VERSION", version)
    kept.save(tmp_path / "novel")
    monkeypatch.undo()
    with pytest.raises(LandmarkError, match=f"written by {message} of this program.* read the text anew"):
        recalled([tmp_path / "novel"])


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "weights")
    (tmp_path / "text").write_text("It was")
    for name, message in {
        "weights": "it holds no memory of a reader",
        "text": "",
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
        with pytest.raises(LandmarkError, match=re.escape(str(path))):
            Memory.open(path)


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


def test_a_library_that_is_asked_again_answers_as_at_first(books):
    paths = books(None, "b", "c")
    both = recalled(paths)
    first = ask(both)
    for order in (paths, paths[::-1], paths):
        both.recall(*order)
        assert torch.equal(ask(both), first if order == paths else ask(recalled(order)))


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


@pytest.mark.parametrize("field", ["blocks", "tail", "text", "layers"])
def test_a_file_that_was_made_up_is_refused(tmp_path, field):
    """Its checksums are right, and its counts do not fit its tensors."""
    kept = reader()
    read(kept, NOVEL)
    made = memory.take(kept)
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


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    kept = reader()
    read(kept, NOVEL)
    kept.save(tmp_path / "novel")
    before = (tmp_path / "novel").read_bytes()
    read(kept, QUESTION)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory, "flush", full)
    with pytest.raises(LandmarkError, match="novel cannot be written: No space left on device; make room"):
        kept.save(tmp_path / "novel")
    assert (tmp_path / "novel").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_models_hash_is_of_every_bit_of_its_weights_and_nothing_else():
    model = tiny_model()
    before = memory.model_hash(model)
    assert memory.model_hash(tiny_model()) == before
    for weight in model.parameters():
        for place in (0, -1):
            bits = weight.data.view(-1).view(torch.int32)
            bits[place] ^= 1
            assert memory.model_hash(model) != before
            bits[place] ^= 1
    first = next(iter(model.parameters()))
    # The same numbers somewhere else, not aligned to eight bytes.
    first.data = torch.cat([torch.zeros(1), first.data.flatten()])[1:].view(first.shape)
    assert memory.model_hash(model) == before
    rows = first.data.view(-1, 2)
    rows[[0, 1]] = rows[[1, 0]]
    assert memory.model_hash(model) != before
