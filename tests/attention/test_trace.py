"""A trace says of every block what share of the output it made up, whichever attention read it."""

import pytest
import torch

from landmark_cli.attention.cache import BlockCache, Offload, RetrievalSettings, Trace
from landmark_cli.attention.functional import attend_chunk
from landmark_cli.attention.rotary import default_inverse_frequencies
from tests.closeness import assert_close_norm

DIM, BLOCK, HEADS, BLOCKS = 16, 3, 2, 9
SETTINGS = RetrievalSettings(BLOCK, 3, context_miss_cutoff=0.02)


CONTEXT_MISS_KEY = torch.randn(1, 1, 1, DIM, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("offloaded", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", ["eager", "blockwise", "triton", "context miss"])
def test_traced_shares_are_those_of_the_output(name, tokens, offloaded):
    generator = torch.Generator().manual_seed(1)
    offload = Offload(1, 4 * 2 * BLOCK * DIM * 4) if offloaded else None
    cache = BlockCache(SETTINGS, default_inverse_frequencies(DIM), batch=2, offload=offload)
    cache.trace = Trace()
    # Block n's values are the n-th unit vector, and the chunk's own are nothing: so the output holds the shares.
    stream = torch.eye(DIM)[:BLOCKS].repeat_interleave(BLOCK, 0)
    for lengths, v in (([len(stream)] * 2, stream), ([tokens, max(0, tokens - 2)], torch.zeros(tokens, DIM))):
        chunk = cache.begin_chunk(lengths)
        assert cache.trace.layers == {}
        q, k = (torch.randn(2, n, chunk.width, DIM, generator=generator) * 2 for n in (HEADS, 1))
        given = {"context_miss_key": CONTEXT_MISS_KEY} if name == "context miss" else {"backend": name}
        out = attend_chunk(0, q, k, v.expand(2, 1, -1, -1), cache, chunk, **given)
        cache.end_chunk(chunk)
    read = 0
    for row in range(2):
        for token in range(tokens):
            found = torch.zeros(HEADS, DIM)
            for entry in cache.trace.read_by(row, token):
                assert entry["share"] > 0
                found[entry["head"], entry["block"]] = entry["share"]
                read += 1
            assert_close_norm(out[row, :, token], found)
    assert 0 < read <= 3 * HEADS * sum(lengths)
    if name == "context miss":
        assert read == cache.retrievals - cache.dropped_retrievals < cache.retrievals


def test_a_chunk_that_reads_no_blocks_leaves_nothing_of_an_earlier_one():
    cache = BlockCache(SETTINGS, default_inverse_frequencies(DIM))
    cache.trace = Trace()
    for again in range(2):
        for length in (9, 4):
            chunk = cache.begin_chunk([length])
            x = torch.randn(1, 1, length, DIM)
            attend_chunk(0, x, x, x, cache, chunk, backend="eager")
            cache.end_chunk(chunk)
            assert bool(cache.trace.read_by(0, -1)) == (length == 4), again
        cache.reset()
