"""Chunks that follow one another, read as rows of one, give what they give one after the other."""

from dataclasses import replace

import pytest
import torch

from landmark_cli.attention.cache import BlockCache, Chunk, Passage, RetrievalSettings, most_side_by_side
from landmark_cli.attention.functional import attend_chunk
from landmark_cli.attention.rotary import default_inverse_frequencies
from landmark_cli.inference.block_reader import BlockReader
from tests.attention.reading import Case
from tests.closeness import assert_close_norm
from tests.tiny import tiny_model, tiny_text

# Chunks of whole blocks, the incomplete block before them included, and others; widths of a chunk alone, and in rows.
CASES = {
    "one row, from the beginning": Case([0, 16, 16, 16]),
    "rows of their own lengths, evicted": Case(
        [[9, 3], [16, 16], [16, 16], [7, 16], [0, 16], [12, 3]], batch=2, heads=4, key_heads=2,
        settings={"cache_blocks": 3},
    ),
    "true distances": Case([17, 20, 20, 20, 16], settings={"positions": "absolute"}),
    "shared by tokens": Case([23, 17, 17], settings={"selection": "max_over_tokens"}),
    "shared by heads": Case([[23, 2], [17, 17], [17, 4]], batch=2, settings={"selection": "max_over_heads"}),
    "numbers of 16 bits": Case([9, 16, 16, 16], top_k=3, dtype=torch.float16),
}  # fmt: skip
QUICK = ("one row, from the beginning", "shared by heads")


def read(case: Case, device: str, most: int) -> tuple[torch.Tensor, BlockCache, Passage]:
    """What the chunks after the first give, which is read before the passage; the cache, and the passage."""
    draw = torch.Generator().manual_seed(0)
    settings = RetrievalSettings(case.block_size, case.top_k, **case.settings)
    cache = BlockCache(settings, default_inverse_frequencies(case.dim), batch=case.batch, device=device)
    parts = [[n] * case.batch if isinstance(n, int) else n for n in case.chunks]

    def numbers(tokens: int) -> list[torch.Tensor]:
        shapes = ((case.batch, n, tokens, case.dim) for n in (case.heads, case.key_heads, case.key_heads))
        return [torch.randn(shape, generator=draw).to(device, case.dtype) for shape in shapes]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return attend_chunk(0, q, k, v, cache, chunk, backend="triton")

    first, *rest = parts
    if max(first):
        chunk = cache.begin_chunk(first)
        attend(*numbers(max(first)), chunk)
        cache.end_chunk(chunk)
    widths = [max(16, *lengths) for lengths in rest]
    with cache.passage(list(zip(rest, widths, strict=True))) as passage:
        out = passage.read(attend, *numbers(sum(widths)), most=most)
    return out, cache, passage


@pytest.mark.parametrize(
    ("name", "device"),
    [
        *(pytest.param(name, "cpu", marks=() if name in QUICK else pytest.mark.slow) for name in CASES),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in CASES),
    ],
)
def test_chunks_side_by_side_give_what_they_give_one_after_the_other(name, device):
    expected, there, _ = read(CASES[name], device, 0)
    found, here, passage = read(CASES[name], device, 4096)
    counts = [count for _, count in passage.runs(4096)]
    assert max(counts) > 1 and sum(counts) == len(passage.chunks)
    assert_close_norm(found, expected)
    for row in range(here.batch):
        for ours, theirs in zip(here.copy_of(row), there.copy_of(row), strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_as_many_are_read_at_a_time_as_have_room():
    """Chunks of other widths end a run, and what is a step to the kernels is read alone."""
    cache = BlockCache(RetrievalSettings(5, 2), default_inverse_frequencies(16), batch=2, device="cpu")
    widths = [20, 20, 20, 21, 21, 15, 15, 20]
    with cache.passage([([width, 3], width) for width in widths]) as passage:
        assert [(chunk.width, count) for chunk, count in passage.runs(4096)] == [
            (20, 3), (21, 2), (15, 1), (15, 1), (20, 1)
        ]  # fmt: skip
        run = passage.runs(4096)[0][0]
        assert run.host_rows == [0, 0, 0, 1, 1, 1] and run.host_blocks == [0, 4, 8, 0, 0, 1]
        assert run.counters.tolist() == [[0, 0, 0, 17, 17, 17], run.host_blocks, run.host_tail, run.host_rows]
    with cache.passage([([20, 3], 20)] * 5) as passage:
        assert [count for _, count in passage.runs(2 * 2 * 20)] == [2, 2, 1]
        assert [count for _, count in passage.runs(2 * 20 - 1)] == [1] * 5
        # What is worked out for a layer serves the others.
        assert passage.runs(80) is passage.runs(80)
    # Of eight heads of 128 numbers of 16 bits, each query reading four blocks: 8 KiB a token.
    q = torch.empty(1, 8, 3, 128, dtype=torch.bfloat16, device="meta")
    assert most_side_by_side(q, 4) == 1 << 15
    # Rows of the narrowest chunks, times heads, are programs.
    assert most_side_by_side(q, 0) == 8191 * 16


@pytest.mark.parametrize("stores_first, expected", [(True, 2), (False, 9)])
def test_a_passage_asks_for_few_reads(stores_first, expected, monkeypatch):
    """Of narrow chunks a read takes the host longer than the device: they are what a passage of them took."""
    from landmark_cli.attention.backends import BACKENDS

    monkeypatch.setenv("LANDMARK_ATTENTION", "eager")
    reads, eager = [], BACKENDS["eager"]

    def read(q, k, v, blocks, chunk, *rest, **given):
        reads.append(len(chunk.host_rows))
        return eager.read(q, k, v, blocks, chunk, *rest, **given)

    monkeypatch.setitem(BACKENDS, "eager", replace(eager, read=read, stores_first=stores_first))
    monkeypatch.setattr("landmark_cli.attention.dispatch.most_side_by_side", lambda q, top_k: 5 * 20)
    reader = BlockReader(tiny_model(n_layer=2), chunk=16, top_k_blocks=2, offload="cpu")
    reader.passage_tokens = 10**4
    list(reader.read([tiny_text(16 * 10)], last_only=True))
    layers = 2
    # A chunk, from which on layers are known, and nine in a passage.
    assert len(reads) == layers * (1 + expected) and sum(reads) == layers * 10
