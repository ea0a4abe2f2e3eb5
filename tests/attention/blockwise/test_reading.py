"""Plain PyTorch, block by block, reads what the definition reads."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark_cli.attention.blockwise import pieces, retrieve, select, window
from landmark_cli.attention.cache import Selection
from tests.attention.reading import CASES, JOINT_CASES, LEAVING_OUT, RERANK_CASES, Case, assert_same_traces, read
from tests.closeness import assert_close_norm, tolerance

# What takes more than one piece, tile or group, and what only the definition did before.
LARGER = {
    "the paper's evaluation": Case([255, 255, 17], batch=3, heads=8, key_heads=8, dim=32, block_size=51, top_k=4),
    "9 heads on 3": Case([800, 777, 1, 1], heads=9, key_heads=3, dim=64, block_size=64, top_k=4),
    "rows of a batch at one pace": Case([[50, 50], [7, 7], [64, 64], [1, 1]], batch=2, heads=4, key_heads=2),
    "rows that rest": Case([[50, 50, 9], [0, 7, 1], [64, 0, 0], [1, 1, 0]], batch=3, heads=4, key_heads=2),
    "more blocks retrieved than the kernels can": Case([700, 9, 1], block_size=5, top_k=70),
    "nothing retrieved": Case([23, 9, 1, 40], top_k=0),
    "a head dim of 24, bfloat16": Case([90, 33, 1], dim=24, dtype=torch.bfloat16),
    "many blocks, shared by heads": Case([600, 60, 1], block_size=3, settings={"selection": "max_over_heads"}),
    "many blocks, shared by query heads": Case(
        [600, 60, 1], heads=4, key_heads=2, block_size=3, settings={"selection": "max_over_query_heads"}
    ),
    "many blocks, shared by tokens": Case([600, 60, 1], block_size=3, settings={"selection": "max_over_tokens"}),
    "many blocks, true distances": Case([600, 60, 1], block_size=3, settings={"positions": "absolute"}),
    "a context-miss token": Case([40, 9, 1, 14], top_k=3, context_miss=True),
    "a context-miss token, rows of their own lengths": Case(
        [[40, 5], [3, 9], [0, 14]], batch=2, top_k=3, context_miss=True, settings={"context_miss_cutoff": 0.1}
    ),
}  # fmt: skip
# What bounds logits or has company is not read block by block.
ALL = CASES | LARGER | LEAVING_OUT | {n: case for n, case in (JOINT_CASES | RERANK_CASES).items() if not case.sinks}


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody has written holds NaN or huge integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_reads_as_defined(case: Case, seed: int = 0) -> None:
    expected, found, caches = read(case, seed=seed, backend="blockwise", poison=True)
    assert_close_norm(found, expected, case.dtype)
    assert caches[1].backends == {"blockwise"}
    assert (caches[0].retrievals, caches[0].dropped_retrievals) == (caches[1].retrievals, caches[1].dropped_retrievals)
    assert not case.settings.get("context_miss_cutoff") or caches[0].dropped_retrievals
    assert_same_traces(*caches, tolerance=tolerance(case.dtype))
    if caches[0].trace is not None and case.dtype == torch.float32:
        # Every query's blocks, not only the last token's.
        assert caches[0].trace.layers.keys() == caches[1].trace.layers.keys()
        for (ages, _, _), (other, _, _) in zip(*(cache.trace.layers.values() for cache in caches), strict=True):
            assert torch.equal(ages.sort(-1).values, other.long().sort(-1).values)


@pytest.mark.parametrize("name", ALL)
def test_agrees_with_the_definition(name):
    assert_reads_as_defined(ALL[name])


@pytest.mark.parametrize("name", ALL)
def test_pieces_change_nothing(name, monkeypatch):
    """Pieces of one block and tiles of two queries, so that all of them have borders everywhere."""
    for room in (pieces, window):
        monkeypatch.setattr(room, "PIECE", 1)
    monkeypatch.setattr(retrieve, "LARGEST_TILE", 2)
    monkeypatch.setattr(retrieve, "FEW_QUERIES", 0)
    monkeypatch.setattr(select, "GROUP", 2)
    monkeypatch.setattr(select, "FEW_SCORES", 0)
    case = ALL[name]
    assert_reads_as_defined(replace(case, chunks=[n if isinstance(n, list) else min(n, 40) for n in case.chunks]), 1)


@given(
    st.lists(st.lists(st.integers(0, 23), min_size=2, max_size=2).filter(any), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.integers(2, 7),
    st.integers(0, 5),
    st.sampled_from(get_args(Selection)),
    st.sampled_from([None, 0, 3]),
    st.sampled_from(["bounded", "absolute"]),
    st.sampled_from(["grouped", "joint", "with a context-miss token"]),
)
@settings(max_examples=40)
def test_any_chunks_are_read_as_defined(chunks, heads, block_size, top_k, selection, cache_blocks, positions, how):
    more = {"selection": selection, "cache_blocks": cache_blocks, "positions": positions, "joint": how == "joint"}
    given = {"context_miss": how == "with a context-miss token", "settings": more}
    assert_reads_as_defined(Case(chunks, 2, *heads, dim=8, block_size=block_size, top_k=top_k, **given))


@given(st.integers(1, 5), st.integers(1, 90), st.integers(1, 9), st.integers(1, 4))
def test_of_equal_scores_the_newer_blocks_is_the_better(rows, count, top_k, values):
    """Against a stable sort, with scores that are often equal and blocks that are not there."""
    generator = torch.Generator().manual_seed(rows * count * values)
    scores = torch.randint(values, (rows, count), generator=generator).float()
    scores[torch.rand(rows, count, generator=generator) < 0.2] = -torch.inf
    top_k = min(top_k, count)
    order = scores.sort(dim=-1, descending=True, stable=True)
    expected = (order.indices + 1).masked_fill(order.values == -torch.inf, 0)[:, :top_k]
    for shape in ((rows, count), (1, rows, 1, count)):
        found = select.newest_best(scores.clone().view(shape), top_k)
        assert torch.equal(found, expected.view(*shape[:-1], top_k))


def test_autocast_changes_nothing():
    _, expected, _ = read(CASES["chunks inside and across blocks"], backend="blockwise")
    with torch.autocast("cpu", torch.bfloat16):
        _, found, _ = read(CASES["chunks inside and across blocks"], backend="blockwise")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
