"""Read the same random chunks with the eager definition and with another backend."""

from dataclasses import dataclass, field
from typing import get_args

import pytest
import torch
from torch import Tensor

from landmark_cli.attention.cache import BlockCache, Offload, RetrievalSettings, Selection, Trace
from landmark_cli.attention.functional import attend_chunk
from landmark_cli.attention.rotary import default_inverse_frequencies, rotate, rotation_table


@dataclass
class Case:
    """chunks: stream tokens of each chunk, one number for all rows or a number a row. rotary: rotated dimensions.

    resident: offload, keeping so many blocks on the device. context_miss: with a context-miss token. sinks: whether
    every head has one. leaves_out: the backend is called without the rows that have nothing in a chunk, and with the
    last row at least. joined: queries, keys and values come to the backend as views of one tensor.
    """

    chunks: list
    batch: int = 1
    heads: int = 2
    key_heads: int = 1
    dim: int = 16
    rotary: int | None = None
    block_size: int = 5
    top_k: int = 2
    settings: dict = field(default_factory=dict)
    resident: int | None = None
    dtype: torch.dtype = torch.float32
    context_miss: bool = False
    softcap: float | None = None
    sinks: bool = False
    leaves_out: bool = False
    joined: bool = False

    def rows(self, lengths: list[int]) -> list[int]:
        """Those that the backend is called with."""
        resting = range(self.batch - 1) if self.leaves_out else ()
        return [row for row in range(self.batch) if row not in resting or lengths[row]]


# Every feature once, small, since without a GPU every program of a kernel is interpreted.
CASES = {
    "chunks inside and across blocks": Case([12, 7, 19], dim=24),
    "rows of their own lengths, 4 heads on 2": Case([[12, 5], [3, 16], [0, 7]], batch=2, heads=4, key_heads=2, top_k=3),
    "steps": Case([22, 1, 1, 1, 1], heads=2),
    "steps of rows in different phases": Case([[22, 13], [2, 1], [0, 2], [4, 3]], batch=2),
    "eviction, the ring growing after it wrapped": Case([12, 8, 3, 1, 26, 11], settings={"cache_blocks": 3}),
    **{rule: Case([12, 9, 1, 14], top_k=3, settings={"selection": rule}) for rule in get_args(Selection)},
    "true distances": Case([12, 16, 1, 10], settings={"positions": "absolute"}),
    "partial rotary": Case([12, 9, 1], dim=24, rotary=8),
    "18 blocks retrieved": Case([60, 7], block_size=3, top_k=18),
    "shared by two query heads": Case(
        [12, 9, 1, 14], heads=4, key_heads=2, batch=2, top_k=3, settings={"selection": "max_over_query_heads"}
    ),
    "18 blocks retrieved, shared": Case([60, 5], block_size=3, top_k=18, settings={"selection": "max_over_heads"}),
    "blocks wider than a tile": Case([150, 75, 1], block_size=70, heads=1),
    "landmarks in several tiles": Case([136, 3, 1], block_size=2, heads=1),
    "numbers of 16 bits": Case([[12, 5], [7, 16], [1, 2]], batch=2, top_k=3, dtype=torch.float16),
    "numbers of 16 bits, several tiles": Case([136, 3, 1], block_size=2, heads=1, dtype=torch.float16),
    "numbers of 16 bits, 18 blocks": Case([60, 7], block_size=3, top_k=18, dtype=torch.float16),
    "offloaded": Case([12, 9, 1, 16], top_k=3, resident=3),
    "offloaded, landmarks in several tiles": Case([136, 1, 2], block_size=2, heads=1, resident=8),
    "offloaded, evicted": Case([12, 9, 1, 16, 8], top_k=3, resident=2, settings={"cache_blocks": 3}),
}
# Logits that are bounded, or have company in the outer softmax.
LOGITS = {"softcap": 1.5, "sinks": True}
LOGITS_CASES = {
    "soft-capped": Case([12, 7, 19, 1], dim=24, softcap=1.5),
    "sinks, 4 heads on 2": Case([12, 7, 19, 1], heads=4, key_heads=2, sinks=True),
    "rows of their own lengths, capped, sinks": Case(
        [[12, 5], [3, 16], [0, 7], [1, 1]], batch=2, heads=4, key_heads=2, top_k=3, **LOGITS
    ),
    "steps of rows in different phases, capped, sinks": Case([[22, 13], [2, 1], [0, 2], [4, 3]], batch=2, **LOGITS),
    **{
        f"{rule}, capped, sinks": Case(
            [12, 9, 1, 14], heads=4, key_heads=2, top_k=3, settings={"selection": rule}, **LOGITS
        )
        for rule in get_args(Selection)
    },
    "true distances, capped, sinks": Case([12, 16, 1, 10], settings={"positions": "absolute"}, **LOGITS),
    "partial rotary, capped, sinks": Case([12, 9, 1], dim=24, rotary=8, **LOGITS),
    "18 blocks retrieved, capped, sinks": Case([60, 7], block_size=3, top_k=18, **LOGITS),
    "blocks wider than a tile, capped, sinks": Case([150, 75, 1], block_size=70, heads=1, **LOGITS),
    "landmarks in several tiles, capped, sinks": Case([136, 3, 1], block_size=2, heads=1, **LOGITS),
    "numbers of 16 bits, capped, sinks": Case(
        [[12, 5], [7, 16], [1, 2]], batch=2, top_k=3, dtype=torch.float16, **LOGITS
    ),
    "offloaded, capped, sinks": Case([12, 9, 1, 16], top_k=3, resident=3, **LOGITS),
    "nothing to retrieve, capped, sinks": Case([12, 9, 1], top_k=0, **LOGITS),
}
# Landmarks choose blocks and no more.
JOINT = {"joint": True}
JOINT_CASES = {
    "joint, rows of their own lengths, steps": Case(
        [[12, 8], [3, 11], [2, 1], [0, 2]], batch=2, heads=4, key_heads=2, settings=JOINT
    ),
    "joint, capped, sinks": Case([12, 7, 19, 1], dim=24, rotary=8, settings=JOINT, **LOGITS),
    "joint, blocks wider than a tile": Case([150, 75, 1], block_size=70, heads=1, settings=JOINT),
    "joint, numbers of 16 bits, shared by heads": Case(
        [12, 16, 1], dtype=torch.float16, settings={**JOINT, "selection": "max_over_heads"}
    ),
    "joint, true distances, offloaded": Case(
        [12, 9, 1, 16], top_k=3, resident=3, settings={**JOINT, "positions": "absolute"}
    ),
}
# Landmarks propose blocks, of which the text decides; and what it says is sharpened.
RERANK_CASES = {
    "re-ranked, rows of their own lengths, steps": Case(
        [[14, 31], [3, 11], [2, 1], [0, 2], [9, 8]], batch=2, heads=4, key_heads=2,
        settings={**JOINT, "rerank_blocks": 5, "block_temperature": 0.5},
    ),
    "re-ranked, capped, sinks": Case([32, 17, 1], dim=24, rotary=8, settings={**JOINT, "rerank_blocks": 4}, **LOGITS),
    "re-ranked, 18 of 30 blocks": Case([96, 7, 1], block_size=3, top_k=18, settings={**JOINT, "rerank_blocks": 30}),
    "re-ranked, 3 of 20 blocks, numbers of 16 bits": Case(
        [96, 7, 1], block_size=3, top_k=3, dtype=torch.float16, settings={**JOINT, "rerank_blocks": 20}
    ),
    "re-ranked, more than there are": Case([12, 9, 1], settings={**JOINT, "rerank_blocks": 40}),
    "re-ranked, true distances, offloaded, evicted": Case(
        [32, 9, 1, 16, 8], resident=3,
        settings={**JOINT, "positions": "absolute", "cache_blocks": 6, "rerank_blocks": 4, "block_temperature": 0.7},
    ),
    "sharpened, steps": Case([32, 17, 1, 1, 3], heads=4, key_heads=2, top_k=4, settings={"block_temperature": 0.4}),
    "sharpened, shared by heads, sinks": Case(
        [32, 17, 1], top_k=3, sinks=True, settings={"selection": "max_over_heads", "block_temperature": 1.5}
    ),
}  # fmt: skip

# In chunks rows come and go, and single rows do steps.
_COMING_AND_GOING = [[12, 17, 9], [0, 16, 3], [7, 0, 0], [0, 8, 0], [0, 1, 2], [1, 0, 1]]
LEAVING_OUT = {
    name: Case(_COMING_AND_GOING, batch=3, heads=4, key_heads=2, top_k=3, leaves_out=True, **given)
    for name, given in {
        "rows left out": {},
        **{f"rows left out, {rule}": {"settings": {"selection": rule}} for rule in get_args(Selection)[1:]},
        "rows left out, true distances": {"settings": {"positions": "absolute"}},
        "rows left out, evicted": {"settings": {"cache_blocks": 3}},
        "rows left out, offloaded": {"resident": 4},
    }.items()
}


def read(
    case: Case, device: str = "cpu", seed: int = 0, backend: str = "triton", poison: bool = False
) -> tuple[list[Tensor], list[Tensor], list[BlockCache]]:
    """(eager outputs, the backend's outputs, caches) of every chunk; eager reads the same numbers in float32.

    Every second chunk is traced. poison: the backend's blocks hold NaN before they are written.
    """
    generator = torch.Generator().manual_seed(seed)
    inverse_frequencies = default_inverse_frequencies(case.rotary or case.dim)
    settings = RetrievalSettings(case.block_size, case.top_k, **case.settings)
    block_bytes = 2 * case.block_size * case.dim * case.dtype.itemsize
    offload = None if case.resident is None else Offload(1, case.resident * block_bytes)
    caches = [
        BlockCache(settings, inverse_frequencies, batch=case.batch, device=device, offload=o) for o in (None, offload)
    ]
    miss = torch.randn(1, case.key_heads, 1, case.dim, generator=generator) if case.context_miss else None
    # In any precision the same numbers.
    sinks = torch.linspace(-1, 2, case.heads, device=device).bfloat16() if case.sinks else None
    outputs = [], []
    for index, lengths in enumerate(case.chunks):
        lengths = [lengths] * case.batch if isinstance(lengths, int) else lengths
        q, k, v = (
            torch.randn(case.batch, max(lengths), n, case.dim, generator=generator).to(device, case.dtype)
            for n in (case.heads, case.key_heads, case.key_heads)
        )
        for which, name in enumerate(("eager", backend)):
            cache = caches[which]
            cache.trace = Trace() if index % 2 and not case.leaves_out else None
            rows = case.rows(lengths) if which == 1 else list(range(case.batch))
            chunk = cache.begin_chunk(lengths, rows=rows)
            rotation = rotation_table(chunk.position_ids, inverse_frequencies.to(device))
            given = [_rotated(q[rows], *rotation), _rotated(k[rows], *rotation), v[rows].transpose(1, 2)]
            given = [x.float() for x in given] if which == 0 else given
            if case.joined and which == 1:
                whole = torch.cat([x.transpose(1, 2) for x in given], dim=2)
                given = [x.transpose(1, 2) for x in whole.split([x.shape[1] for x in given], dim=2)]
            if poison and which == 1 and index == 0:
                cache.expect(sum(n if isinstance(n, int) else max(n) for n in case.chunks))
                layer = cache.layer(0, given[1], chunk)
                layer.blocks.fill_(torch.nan)
                layer.landmark_keys.fill_(torch.nan)
            if case.context_miss:
                given.append(miss.to(given[0]))
            logits = {"softcap": case.softcap, "sinks": sinks}
            out = attend_chunk(0, *given[:3], cache, chunk, None, *given[3:], backend=name, **logits).float()
            outputs[which].append(out.new_zeros(case.batch, *out.shape[1:]).index_copy(0, chunk.rows.long(), out))
            cache.end_chunk(chunk)
    return *outputs, caches


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, H, D) -> (B, H, T, D) rotated at the chunk's positions, and in memory as it was, as in a model."""
    return rotate(x, cos[:, :, None], sin[:, :, None]).transpose(1, 2)


def assert_same_traces(eager: BlockCache, other: BlockCache, tolerance: float) -> None:
    """The last token of every row has read the same blocks, with shares that differ by rounding."""
    if eager.trace is None:
        return
    assert set(eager.trace.layers) == set(other.trace.layers)
    lengths = eager.trace.layers[0][1].shape if eager.trace.layers else (0,)
    for row in range(lengths[0]):
        expected, found = (cache.trace.read_by(row, -1) for cache in (eager, other))
        assert [r["block"] for r in expected] == [r["block"] for r in found]
        assert [r["share"] for r in found] == pytest.approx([r["share"] for r in expected], abs=tolerance)
