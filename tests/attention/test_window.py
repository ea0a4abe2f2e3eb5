"""Where the chunks and blocks of a window stand, against loops that say the same."""

import pytest
import torch

from landmark_cli.attention.rotary import default_inverse_frequencies, rotation_table
from landmark_cli.attention.window import ReadingWindow, WindowSettings

SIZE, CHUNK, TOP_K = 3, 6, 2
FREQUENCIES = default_inverse_frequencies(8)
SETTINGS = WindowSettings(CHUNK, SIZE, TOP_K)
# Rows, tokens of a row, and the documents of every row, (first token, tokens) each: none, one or several a row.
LAYOUTS = {
    "one chunk": (2, 6, {}),
    "whole chunks": (2, 18, {}),
    "a part of a chunk at the end": (3, 20, {}),
    "shorter than a block": (1, 2, {}),
    "left padding": (4, 20, {"start": [0, 5, 20, 19]}),
    "documents": (2, 20, {"cu_seqlens": [0, 1, 20, 20, 33, 40]}),
    "one document a row": (2, 12, {"cu_seqlens": [0, 12, 24]}),
}


def documents_of(batch: int, tokens: int, bounds: dict) -> list[tuple[int, int, int]]:
    """(row, first token, tokens) of every document."""
    if "start" in bounds:
        return [(row, first, tokens - first) for row, first in enumerate(bounds["start"])]
    edges = bounds.get("cu_seqlens", range(0, batch * tokens + 1, tokens))
    return [(a // tokens, a % tokens, b - a) for a, b in zip(edges, edges[1:], strict=False)]


def make(name: str, **arguments) -> ReadingWindow:
    batch, tokens, bounds = LAYOUTS[name]
    bounds = {name: torch.tensor(values) for name, values in bounds.items()}
    return ReadingWindow.make(SETTINGS, batch, tokens, FREQUENCIES, **bounds, **arguments)


@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_and_blocks_stand_where_a_reader_would_cut_them(name):
    batch, tokens, bounds = LAYOUTS[name]
    window = make(name)
    chunks, blocks = [], []
    chunk_of = torch.full((batch, tokens), -1)
    position_ids = torch.zeros(batch, tokens, dtype=torch.long)
    for row, begin, length in documents_of(batch, tokens, bounds):
        first_block = len(blocks)
        for first in range(0, length, CHUNK):
            last = min(first + CHUNK, length)
            chunk_of[row, begin + first : begin + last] = len(chunks)
            position_ids[row, begin + first : begin + last] = torch.arange(last - first)
            chunks.append([row, begin + first, last - first, first_block, first // SIZE])
        blocks += [[row, begin + n * SIZE, n % (CHUNK // SIZE)] for n in range(length // SIZE)]

    assert window.chunks[: len(chunks)].tolist() == chunks
    assert (window.chunks[len(chunks) :, 2] == 0).all()
    assert window.blocks[: len(blocks)].tolist() == blocks
    assert (window.blocks[len(blocks) :, 0] == -1).all()
    assert window.chunk_of.tolist() == chunk_of.tolist()
    assert torch.equal(window.position_ids, position_ids)
    assert window.host_chunks == window.chunks.tolist()
    assert window.most_earlier >= max([chunk[4] for chunk in chunks])
    assert {x.dtype for x in (window.chunks, window.blocks, window.chunk_of)} == {torch.int32}

    assert window.even == (not bounds)
    if window.even:
        assert window.chunks.shape == (batch * -(-tokens // CHUNK), 5) and len(chunks) == len(window.chunks)
        assert window.blocks.shape == (batch * (tokens // SIZE), 3) and len(blocks) == len(window.blocks)
    else:
        begins = [row * tokens + first for row, first, *_ in chunks]
        left_over = [batch * tokens] * (len(window.chunks) - len(chunks) + 1)
        assert window.own_bounds.tolist() == [0, *begins, *left_over]


def test_rotations_are_by_whole_block_slots():
    window = make("whole chunks")
    assert window.cos.shape == (TOP_K + 1 + CHUNK // SIZE, 4)
    expected = rotation_table(torch.arange(len(window.cos)) * SIZE, FREQUENCIES)
    assert torch.equal(window.cos, expected[0]) and torch.equal(window.sin, expected[1])


def test_a_window_is_made_within_a_compiled_function_and_once_for_all_documents_of_one_number():
    def made(bounds):
        window = ReadingWindow.make(SETTINGS, 2, 20, FREQUENCIES, cu_seqlens=bounds)
        return window.chunks, window.blocks, window.chunk_of, window.own_bounds, window.position_ids

    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="eager", dynamic=False)
    for bounds in ([0, 1, 20, 33, 40], [0, 7, 20, 40, 40], [0, 20, 21, 22, 40]):
        with torch.compiler.set_stance("default" if bounds[1] == 1 else "fail_on_recompile"):
            found = compiled(torch.tensor(bounds))
        for a, b in zip(found, made(torch.tensor(bounds)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 7}, "chunk is 7; it must be whole blocks of 3"),
        ({"chunk": 0}, "chunk is 0"),
        ({"block_size": 1}, "block_size is 1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"selection": "all"}, "selection is 'all'"),
        ({"explore": 1.5}, "explore is 1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        WindowSettings(**{"chunk": CHUNK, "block_size": SIZE, "top_k": TOP_K, **settings})


def test_what_excludes_each_other_is_refused():
    with pytest.raises(ValueError, match="start and cu_seqlens"):
        ReadingWindow.make(SETTINGS, 1, 6, FREQUENCIES, start=torch.tensor([1]), cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="explore_seed"):
        ReadingWindow.make(WindowSettings(CHUNK, SIZE, TOP_K, explore=0.5), 1, 6, FREQUENCIES)
