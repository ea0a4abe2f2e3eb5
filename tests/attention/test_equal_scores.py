"""Which block wins where scores are equal, or nearly: no tolerance decides, and of equal scores the newer block's wins.

Every way in which blocks are chosen is tried: the definition's, those of plain PyTorch in pieces and of the Triton
kernels.
"""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from landmark_cli.attention.cache import BlockCache, Offload, RetrievalSettings, Trace
from landmark_cli.attention.functional import attend_chunk
from landmark_cli.attention.kernels.reading import selection
from landmark_cli.attention.rotary import default_inverse_frequencies, rotate, rotation_table
from landmark_cli.inference.block_reader import BlockReader
from tests.tiny import tiny_model, tiny_text

DIM, BLOCK = 16, 2


@dataclass
class Way:
    """A way in which blocks are chosen. tokens: of the chunk that chooses, behind `blocks` complete blocks."""

    tokens: int
    blocks: int = 40
    heads: int = 1
    top_k: int = 1
    backend: str = "triton"
    settings: dict = field(default_factory=dict)
    offload: bool = False
    dtype: torch.dtype = torch.float32
    shared_out: bool = False


WAYS = {
    "eager": Way(7, backend="eager"),
    "eager, shared by heads": Way(7, backend="eager", heads=2, settings={"selection": "max_over_heads"}),
    "eager, shared by tokens": Way(7, backend="eager", settings={"selection": "max_over_tokens"}),
    "blockwise": Way(7, backend="blockwise"),
    "blockwise, by groups": Way(7, blocks=140, backend="blockwise", heads=2, top_k=3),
    "blockwise, shared by heads": Way(7, backend="blockwise", heads=2, settings={"selection": "max_over_heads"}),
    "blockwise, shared by query heads": Way(
        7, backend="blockwise", heads=2, settings={"selection": "max_over_query_heads"}
    ),
    "blockwise, shared by tokens": Way(7, backend="blockwise", settings={"selection": "max_over_tokens"}),
    "blockwise, 16 bits": Way(7, blocks=140, backend="blockwise", dtype=torch.float16),
    "blockwise, a step": Way(1, blocks=140, backend="blockwise"),
    "a chunk": Way(7),
    "a chunk, landmarks in several tiles": Way(7, blocks=140, heads=2),
    "a chunk whose landmarks are shared out": Way(7, blocks=140, shared_out=True),
    "a chunk, two passes": Way(7, top_k=18),
    "a chunk, shared by heads": Way(7, heads=2, settings={"selection": "max_over_heads"}),
    "a chunk, shared by query heads": Way(7, heads=2, settings={"selection": "max_over_query_heads"}),
    "a chunk, shared by tokens": Way(7, settings={"selection": "max_over_tokens"}),
    "a chunk, 16 bits": Way(7, blocks=140, dtype=torch.float16),
    "a step": Way(1, blocks=140),
    "a step, 16 bits": Way(1, blocks=140, dtype=torch.float16),
    "a step of two queries a key head": Way(1, heads=2),
    "a step, offloaded": Way(1, offload=True),
}


@pytest.fixture
def shared_out(monkeypatch):
    """Programs that share out the landmarks of few queries are not worth it for so few of these; here they run."""
    monkeypatch.setattr(selection, "LEAST_TILES", 1)


def chosen(way: Way, landmark_keys: Tensor, inverse_frequencies: Tensor, q: Tensor, **options):
    """The blocks, counted from 0, that each head reads at the last token of a chunk, in order of time.

    landmark_keys: (blocks, DIM), before rotation; the keys of text are random. q: (tokens, DIM) of every head.
    """
    generator = torch.Generator().manual_seed(0)
    offload = Offload(1, 5 * 2 * BLOCK * DIM * way.dtype.itemsize) if way.offload else None
    settings = RetrievalSettings(BLOCK, way.top_k, **way.settings)
    cache = BlockCache(settings, inverse_frequencies, offload=offload, **options)
    cache.trace = Trace()
    keys = torch.randn(way.blocks, BLOCK, DIM, generator=generator)
    keys[:, -1] = landmark_keys
    keys = torch.cat([keys.flatten(0, 1), torch.randn(way.tokens, DIM, generator=generator)])
    # In chunks that end anywhere: what rounding does to a key depends on its place in its chunk.
    ends = [*range(0, BLOCK * way.blocks, 11), BLOCK * way.blocks, len(keys)]
    for begin, end in zip(ends, ends[1:], strict=False):
        last = end == len(keys)
        chunk = cache.begin_chunk([end - begin])
        queries = q if last else torch.randn(end - begin, DIM, generator=generator)
        cos, sin = rotation_table(chunk.position_ids, inverse_frequencies)
        k = rotate(keys[begin:end].to(way.dtype)[None, None], cos[:, None], sin[:, None])
        queries = rotate(queries.to(way.dtype).expand(1, way.heads, -1, -1), cos[:, None], sin[:, None])
        if last or way.backend == "eager":
            v = torch.randn(k.shape, generator=generator).to(k)
            attend_chunk(0, queries, k, v, cache, chunk, 1.0, backend=way.backend)
        else:
            # What earlier chunks attend to does not matter here.
            cache.layer(0, k, chunk).append(k, torch.zeros_like(k), chunk)
        cache.end_chunk(chunk)
    reads = cache.trace.read_by(0, -1)
    return [[read["block"] for read in reads if read["head"] == head] for head in range(way.heads)]


@pytest.mark.parametrize("name", WAYS)
def test_the_better_block_wins_however_close(name, request):
    """In the first layer too, where nobody says that landmarks are alike."""
    way = WAYS[name]
    if way.shared_out:
        request.getfixturevalue("shared_out")
    # Nothing is rotated, so a landmark's first number is its score.
    still = torch.zeros(DIM // 2)
    q = torch.zeros(way.tokens, DIM)
    q[:, 0] = 1.0
    step = 2.0**-10 if way.dtype == torch.float16 else 4e-6
    scores = torch.full((way.blocks,), -1.0)
    certain = list(range(way.blocks - way.top_k - 5, way.blocks - 6))
    scores[certain] = 2.0
    older, newer = 3, 9
    for ahead, winner in ((step, older), (0.0, newer), (-step, newer)):
        scores[older], scores[newer] = 1.0 + ahead, 1.0
        keys = torch.zeros(way.blocks, DIM)
        keys[:, 0] = scores
        assert chosen(way, keys, still, q) == [[winner, *certain]] * way.heads


@pytest.mark.parametrize("name", WAYS)
def test_far_blocks_of_one_landmark_key_go_to_the_newest(name, request):
    way = WAYS[name]
    if way.shared_out:
        request.getfixturevalue("shared_out")
    generator = torch.Generator().manual_seed(3)
    landmark = torch.randn(DIM, generator=generator).expand(way.blocks, DIM)
    for _ in range(20):
        q = torch.randn(1, DIM, generator=generator).expand(way.tokens, DIM)
        (*_, read) = chosen(way, landmark, default_inverse_frequencies(DIM), q, one_landmark=True)
        assert len(set(read)) == way.top_k
        # Of the far blocks, which are older than the last top_k, the newest ones.
        near = way.blocks - way.top_k
        far = [block for block in read if block < near]
        assert far == list(range(near - len(far), near))
        if far:
            return
    raise AssertionError("no query preferred a far block")


@pytest.mark.parametrize("backend", ["eager", "blockwise", "triton"])
def test_a_reader_knows_that_the_first_layer_has_one_landmark_key(backend, monkeypatch):
    monkeypatch.setenv("LANDMARK_ATTENTION", backend)
    reader = BlockReader(tiny_model(n_layer=1), top_k_blocks=2, chunk=25)
    reader.cache.trace = Trace()
    list(reader.read([tiny_text(58)]))
    # The last chunk began behind 12 blocks, of which 10 and 11 are near.
    found = set()
    for token in range(8):
        for head in range(2):
            found.add(tuple(r["block"] for r in reader.cache.trace.read_by(0, token) if r["head"] == head))
    assert found <= {(10, 11), (9, 10), (9, 11), (8, 9)} and len(found) > 1
