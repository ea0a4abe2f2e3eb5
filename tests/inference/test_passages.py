"""Chunks that are read by one call of the model, layer by layer, give what they give one after the other."""

from dataclasses import replace

import pytest
import torch

from landmark_cli.attention.cache.streaming import Streaming
from landmark_cli.inference import block_reader, graphs
from landmark_cli.inference.block_reader import BlockReader
from landmark_cli.inference.chunk_lengths import chunks_together
from landmark_cli.inference.graphs import ChunkForward
from landmark_cli.models.decoders import add_landmarks
from tests.closeness import assert_close_norm
from tests.inference.test_graphs import by_definition
from tests.models.families import tiny_decoder, tiny_tokenizer
from tests.models.stepping import landmark_decoder
from tests.tiny import tiny_model, tiny_text

__all__ = ["by_definition"]
ROWS = [tiny_text(101, 1)]
UNLIKE = [tiny_text(101, 1), tiny_text(38, 2), tiny_text(9, 3)]
CASES = {
    "one row": (ROWS, {}),
    "rows of their own lengths": (UNLIKE, {}),
    "evicted, the ring full": (ROWS, {"cache_blocks": 5}),
    "evicted, rows of their own lengths": (UNLIKE, {"cache_blocks": 3}),
    "true distances": (ROWS, {"positions": "absolute"}),
    "shared by tokens": (ROWS, {"selection": "max_over_tokens"}),
}


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody has written holds NaN, that of the rooms too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def calls(monkeypatch):
    """The chunks of each passage that is read."""
    found, plain = [], ChunkForward.passage

    def passage(self, ids, parts, *given):
        found.append(len(parts))
        return plain(self, ids, parts, *given)

    monkeypatch.setattr(ChunkForward, "passage", passage)
    return found


def open_reader(model, rows, tokens=10**4, **settings) -> BlockReader:
    reader = BlockReader(model, **{"chunk": 8, "top_k_blocks": 2, "batch": len(rows), **settings})
    reader.passage_tokens = tokens
    return reader


def read(reader: BlockReader, rows, steps: int = 6) -> list[torch.Tensor]:
    """The last logits of each row in every chunk that has some, those of steps after these, and of a text after all."""
    found = []
    for chunk in reader.read(rows, last_only=True):
        found += [chunk.logits[row, -1].clone() for row, length in enumerate(chunk.lengths) if length]
    for step in range(steps):
        found += list(reader.step([(5 * step + row) % 30 for row in range(len(rows))]))
    return found + [logits for chunk in reader.read([row[:13] for row in rows]) for logits in chunk.logits[:, -1]]


def held(reader: BlockReader) -> list[torch.Tensor]:
    return [part for row in range(reader.batch) for of_layer in reader.cache.copy_of(row) for part in of_layer]


# In the interpreter one case takes as long as all others, and kernels know nothing of passages.
SHORT = "interpreted", ([tiny_text(41, 1)], {"cache_blocks": 3})


@pytest.mark.parametrize(
    "backend, name",
    [
        *((backend, name) for backend in ("eager", "blockwise") for name in CASES),
        pytest.param("triton", SHORT[0], marks=pytest.mark.slow),
    ],
)
def test_a_passage_gives_what_its_chunks_give(backend, name, calls, monkeypatch):
    monkeypatch.setenv("LANDMARK_ATTENTION", backend)
    rows, settings = {**CASES, SHORT[0]: SHORT[1]}[name]
    model = tiny_model(n_layer=1 if backend == "triton" else 3)
    plain, streamed = open_reader(model, rows, **settings), open_reader(model, rows, offload="cpu", **settings)
    expected, found = read(plain, rows), read(streamed, rows)
    assert calls and max(calls) > 2
    assert streamed.texts == plain.texts and streamed.cache.host_tail == plain.cache.host_tail
    for ours, theirs in zip([*found, *held(streamed)], [*expected, *held(plain)], strict=True):
        assert_close_norm(ours, theirs)


@pytest.mark.parametrize("name", ["one row", "rows of their own lengths"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_passage_is_read_in_fewer_kernels_too(family, name, calls, by_definition, monkeypatch):
    """Of layers with a sliding window as well, which roll on from chunk to chunk; without graphs."""
    monkeypatch.setattr(ChunkForward, "records", lambda *given: False)
    (rows, settings), model = CASES[name], landmark_decoder(family)
    plain, streamed = (open_reader(model, rows, offload=where, **settings) for where in ("none", "cpu"))
    streamed.forward.recording = True
    assert streamed.forward._fused() is not None
    expected, found = read(plain, rows), read(streamed, rows)
    assert calls and max(calls) > 2
    for ours, theirs in zip([*found, *held(streamed)], [*expected, *held(plain)], strict=True):
        assert_close_norm(ours, theirs)


@pytest.fixture
def same_passages(monkeypatch):
    """Passages of the first reader are those of the next ones too, which would read chunk by chunk."""
    counts, rule = [], BlockReader._chunks_at_once

    def first(self, *given):
        counts.append(rule(self, *given))
        return counts[-1]

    monkeypatch.setattr(BlockReader, "_chunks_at_once", first)

    def next_reader():
        again = iter(list(counts))
        monkeypatch.setattr(BlockReader, "_chunks_at_once", lambda *_: next(again))

    return next_reader


@pytest.mark.parametrize("name", CASES)
def test_where_blocks_lie_changes_no_bit_of_a_passage(name, calls, same_passages):
    rows, settings = CASES[name]
    model = tiny_model(n_layer=3)
    streamed = open_reader(model, rows, offload="cpu", **settings)
    found = read(streamed, rows)
    same_passages()
    here = open_reader(model, rows, **settings)
    for ours, theirs in zip([*found, *held(streamed)], [*read(here, rows), *held(here)], strict=True):
        assert torch.equal(ours, theirs)
    assert max(calls) > 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tokens", [10**4, 0], ids=["in passages", "chunk by chunk"])
@pytest.mark.parametrize("name", CASES)
def test_where_blocks_lie_changes_no_bit_on_a_gpu(name, tokens, dtype, calls, same_passages):
    rows, settings = CASES[name]
    model = tiny_model(n_layer=3, n_head=2, n_embd=32).to("cuda", dtype)
    found, blocks = [], []
    for options in ({"offload": "cpu"}, {}):
        reader = open_reader(model, rows, tokens, **options, **settings)
        for chunk in reader.read(rows, last_only=True):
            found.append(chunk.logits.clone())
        for step in range(12):
            found.append(reader.step([(5 * step + row) % 30 for row in range(len(rows))]))
        torch.cuda.synchronize()
        blocks.append([part.cpu() for part in held(reader)])
        same_passages()
    assert not calls if tokens == 0 else calls[0] > 2 and calls == 2 * calls[:1]
    half = len(found) // 2
    for ours, theirs in zip([*found[:half], *blocks[0]], [*found[half:], *blocks[1]], strict=True):
        assert ours.isfinite().all() and torch.equal(ours, theirs)


@pytest.mark.gpu
def test_layers_wait_for_their_blocks_and_their_blocks_for_them(calls, same_passages):
    """Copies that take as long as layers do, of several passages in a row."""
    model = tiny_model(n_layer=7, n_head=4, n_embd=256, landmark_freq=31, trained_length=1024)
    # A chunk, and seven passages of nine.
    model, text = model.to("cuda", torch.bfloat16), [tiny_text(64 * 620)]
    found = []
    for options in ({"offload": "cpu"}, {}):
        reader = open_reader(model, text, tokens=6000, chunk=620, **options)
        found.append([chunk.logits.clone() for chunk in reader.read(text, last_only=True)])
        found[-1] += [reader.step([step % 30]) for step in range(70)]
        same_passages()
    assert calls == 14 * [9]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family, settings", [("llama", {}), ("mistral", {"sliding_window": 60}), ("gemma3", {})])
def test_decoders_of_the_library_read_passages(family, settings, calls):
    """Layers that keep a sliding window have no blocks to stream, and one that all of a passage would not fit into is
    no obstacle."""
    model = tiny_decoder(family, num_hidden_layers=2, **settings)
    add_landmarks(model, tiny_tokenizer(), landmark_freq=5, trained_length=60, top_k_blocks=2)
    plain, streamed = open_reader(model, UNLIKE), open_reader(model, UNLIKE, offload="cpu")
    for ours, theirs in zip(read(streamed, UNLIKE), read(plain, UNLIKE), strict=True):
        assert_close_norm(ours, theirs)
    assert max(calls) > 2


def test_a_block_travels_once_to_the_device_and_what_is_new_once_back(monkeypatch):
    copied, plain = [], Streaming._copy

    def copy(self, to, source, numbers):
        copied.append([len(row) for row in numbers.values()])
        plain(self, to, source, numbers)

    monkeypatch.setattr(Streaming, "_copy", copy)
    reader = open_reader(tiny_model(n_layer=3), ROWS, offload="cpu")
    list(reader.read(ROWS, last_only=True))
    # Of 2 blocks and a tail block before the passage, and of 101 tokens in blocks of 4.
    assert copied == [[3], [3], [24], [3], [24], [24]]


def test_when_chunks_are_read_one_by_one(calls):
    model, text = tiny_model(), [tiny_text(300)]
    for settings in ({"offload": "none"}, {"tokens": 0, "offload": "cpu"}, {"tokens": 19, "offload": "cpu"}):
        list(open_reader(model, text, **settings).read(text, last_only=True))
    traced = open_reader(model, text, offload="cpu")
    traced.trace()
    list(traced.read(text, last_only=True))
    list(open_reader(model, text, offload="cpu").read(text))
    tight = open_reader(model, text, offload="cpu")
    object.__setattr__(tight.cache.offload, "resident_bytes", 1000)
    list(tight.read(text, last_only=True))
    assert not calls
    # A question after a long text chooses fewer blocks than there are.
    asked = open_reader(model, text, offload="cpu")
    list(asked.read(text, last_only=True))
    del calls[:]
    list(asked.read([tiny_text(16)], last_only=True))
    assert not calls


@pytest.fixture
def records(monkeypatch):
    """Readers take the definition's chunks for such as are recorded, as those of a small model are on a GPU."""
    monkeypatch.setenv("LANDMARK_ATTENTION", "eager")
    monkeypatch.setitem(graphs.BACKENDS, "eager", replace(graphs.BACKENDS["eager"], recorded=True))
    # None is: a second chunk of a kind is read as the first.
    monkeypatch.setattr(ChunkForward, "_record", lambda *_: False)

    def opened(*given, **settings) -> BlockReader:
        reader = open_reader(*given, **settings)
        reader.forward.recording = True
        return reader

    return opened


@pytest.mark.parametrize("rows, counts", [(ROWS, [12]), (UNLIKE, [2, 3, 7]), (3 * ROWS, [12])], ids=len)
def test_chunks_that_are_little_work_are_read_in_passages_with_nothing_offloaded(rows, counts, calls, records):
    """Behind the first one, from which on layers are known: of rows of unlike lengths as many as few of them end in."""
    model = tiny_model(n_layer=2)
    ours = read(records(model, rows), rows)
    assert calls == counts
    for found, expected in zip(ours, read(open_reader(model, rows), rows), strict=True):
        assert_close_norm(found, expected)


@pytest.mark.parametrize("most, together", [(24, True), (23, False)])
def test_chunks_of_much_text_are_read_one_by_one_with_nothing_offloaded(most, together, calls, records, monkeypatch):
    """Of all rows together: 3 of 8 tokens."""
    monkeypatch.setattr(block_reader, "LITTLE_TEXT", most)
    list(records(tiny_model(), 3 * ROWS).read(3 * ROWS, last_only=True))
    assert bool(calls) == together


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [ROWS, UNLIKE], ids=len)
def test_a_gpu_reads_in_passages_what_it_reads_chunk_by_chunk(rows, calls):
    model = tiny_model(n_layer=3, n_head=2, n_embd=32).to("cuda")
    together, alone = (open_reader(model, rows, tokens) for tokens in (10**4, 0))
    found = read(together, rows)
    assert max(calls) > 2
    for ours, theirs in zip([*found, *held(together)], [*read(alone, rows), *held(alone)], strict=True):
        assert_close_norm(ours, theirs)


def test_when_they_are_read_one_by_one_all_the_same(calls, records, tmp_path):
    """Chunks that keep a GPU busy, a server's, those of a bounded cache, of layers with windows; and what blocks in a
    file are read by."""
    text = [tiny_text(120)]
    reader = records(tiny_model(), text)
    list(reader.read(text, last_only=True))
    assert max(calls) > 2
    del calls[:]
    list(reader.read(text))
    reader.save(tmp_path / "novel")
    asked = records(tiny_model(), text)
    asked.recall(tmp_path / "novel")
    list(asked.read(text, last_only=True))
    busy, serving, bounded = (records(tiny_model(), text, **more) for more in ({}, {}, {"cache_blocks": 3}))
    busy.forward._weights, serving.forward.steps_alone = 1 << 60, True
    windows = tiny_decoder("gemma3", num_hidden_layers=2)
    add_landmarks(windows, tiny_tokenizer(), landmark_freq=5, trained_length=60, top_k_blocks=2)
    for reader in (busy, serving, bounded, records(windows, text)):
        list(reader.read(text, last_only=True))
    assert not calls


@pytest.mark.parametrize(
    "working, count",
    [([1] * 9, 9), ([8, 8, 8, 4], 4), ([8, 8, 4, 4], 3), ([8, 1], 1), (range(64, 0, -2), 13), ([], 1)],
)
def test_rows_that_end_rest_for_a_fifth_of_a_passage_at_most(working, count):
    assert chunks_together(working) == count


def test_a_passage_that_fails_leaves_the_reader_as_it_was(monkeypatch):
    model = tiny_model(n_layer=2)
    reader, plain = (open_reader(model, ROWS, offload="cpu") for _ in range(2))
    for each in (reader, plain):
        list(each.read([ROWS[0][:16]], last_only=True))
    forward, before = model.lm_head.forward, list(reader.cache.host_blocks)
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(reader.read([ROWS[0][16:]], last_only=True))
    assert reader.cache.host_blocks == before and len(reader.texts[0]) == 16
    monkeypatch.setattr(model.lm_head, "forward", forward)
    for ours, theirs in zip(read(reader, [ROWS[0][16:]]), read(plain, [ROWS[0][16:]]), strict=True):
        assert torch.equal(ours, theirs)
