"""With joint, landmarks only choose: reading that chooses every block is plain causal attention over the text."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from landmark_cli.attention.cache import BlockCache, RetrievalSettings, Trace
from landmark_cli.attention.functional import attend_chunk
from landmark_cli.attention.rotary import default_inverse_frequencies, rotate, rotation_table
from tests.closeness import assert_close_norm

DIM, SIZE, HEADS, KEY_HEADS = 8, 4, 4, 2
FREQUENCIES = default_inverse_frequencies(DIM)
SETTINGS = RetrievalSettings(SIZE, 9, joint=True)


def stream(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (1, HEADS, tokens, DIM), keys and values of a stream, not rotated, float64."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        2 * torch.randn(1, heads, tokens, DIM, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )


def read(cache: BlockCache, q: Tensor, k: Tensor, v: Tensor, chunks: list[int], **given) -> Tensor:
    """What the definition gives for a stream, read in chunks."""
    found, begin = [], 0
    for length in chunks:
        chunk = cache.begin_chunk([length])
        rotation = [x[:, None] for x in rotation_table(chunk.position_ids, FREQUENCIES)]
        own = slice(begin, begin + length)
        rotated = (rotate(x[:, :, own], *rotation) for x in (q, k))
        found.append(attend_chunk(0, *rotated, v[:, :, own], cache, chunk, backend="eager", **given))
        cache.end_chunk(chunk)
        begin += length
    return torch.cat(found, dim=2)


def plain(q: Tensor, k: Tensor, v: Tensor, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """Causal attention at the stream's positions to all that is no landmark."""
    tokens = torch.arange(q.shape[2])
    q, k = (rotate(x, *rotation_table(tokens, FREQUENCIES)) for x in (q, k))
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * DIM**-0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    unseen = (tokens > tokens[:, None]) | (tokens % SIZE == SIZE - 1)
    logits = logits.masked_fill(unseen, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(logits)[:, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    return torch.softmax(logits, dim=-1)[..., : len(tokens)] @ v


@pytest.mark.parametrize("positions", ["bounded", "absolute"])
@pytest.mark.parametrize(
    "softcap, sinks", [(None, None), (1.5, torch.linspace(-1, 2, HEADS))], ids=["", "capped, sinks"]
)
def test_what_chooses_every_block_is_plain_attention_over_the_text(positions, softcap, sinks):
    """Chunks inside and across blocks, steps, and landmarks' own queries."""
    q, k, v = stream(36)
    cache = BlockCache(replace(SETTINGS, positions=positions), FREQUENCIES)
    found = read(cache, q, k, v, [6, 13, 1, 1, 1, 8, 2, 4], softcap=softcap, sinks=sinks)
    # Keys are stored as angles of float32 have rotated them.
    assert_close_norm(found, plain(q, k, v, softcap, sinks), torch.float32)


def test_of_chosen_blocks_the_text_shares_one_softmax():
    """The chosen blocks are those of the grouped softmax; the share of each is what its text has among all that is
    read, the chunk and the tail block before it. Absolute positions, so that every block is where the stream has it."""
    settings = replace(SETTINGS, top_k=2, positions="absolute")
    (q, k, v), chunks = stream(31, seed=1), [22, 9]
    traces, found = [], []
    for each in (settings, replace(settings, joint=False)):
        cache = BlockCache(each, FREQUENCIES)
        cache.trace = Trace()
        found.append(read(cache, q, k, v, chunks))
        traces.append(cache.trace.layers[0])
    (ages, shares, _), (grouped, *_) = traces
    assert torch.equal(ages, grouped)
    assert (found[0] - found[1]).norm() > 0.1 * found[1].norm()

    tokens = torch.arange(31)
    q, k = (rotate(x, *rotation_table(tokens, FREQUENCIES)) for x in (q, k))
    logits = q[:, :, 22:] @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * DIM**-0.5
    block = tokens // SIZE
    # Before the chunk block 5 begins; block 5 - age is read.
    chosen = (5 - ages.unsqueeze(-1) == block).any(-2)
    seen = (chosen | (block >= 5)) & (tokens <= tokens[22:, None]) & (tokens % SIZE < SIZE - 1)
    weights = torch.softmax(logits.masked_fill(~seen, -torch.inf), dim=-1)
    of_block = torch.zeros(*weights.shape[:3], 8, dtype=weights.dtype).index_add(-1, block, weights)
    assert_close_norm(shares, of_block.gather(-1, 5 - ages), torch.float32)
    assert_close_norm(found[0][:, :, 22:], weights @ v.repeat_interleave(2, dim=1), torch.float32)


def test_landmarks_values_and_keys_take_no_part_in_what_is_read():
    """Their keys choose, and here every block is chosen whatever they are."""
    q, k, v = stream(20)
    other_k, other_v = k.clone(), v.clone()
    for x in (other_k, other_v):
        x[:, :, SIZE - 1 :: SIZE] *= -3
    found = [read(BlockCache(SETTINGS, FREQUENCIES), q, *given, [9, 11]) for given in ((k, v), (other_k, other_v))]
    assert_close_norm(*found)


@pytest.mark.parametrize("backend", ["eager", "blockwise"])
def test_a_context_miss_token_is_refused(backend):
    q, k, v = (x.float() for x in stream(6))
    cache = BlockCache(SETTINGS, FREQUENCIES)
    chunk = cache.begin_chunk([6])
    with pytest.raises(ValueError, match="joint and context_miss_key exclude each other"):
        attend_chunk(0, q, k, v, cache, chunk, context_miss_key=k[:, :, :1], backend=backend)
