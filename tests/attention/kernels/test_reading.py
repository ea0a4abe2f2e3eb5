"""The Triton kernels read what the eager definition reads."""

from dataclasses import replace

import pytest
import torch

from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.attention.functional import attend_chunk
from landmark_cli.attention.kernels.common.configuration import Configuration
from landmark_cli.attention.kernels.reading import launch, selection
from landmark_cli.attention.rotary import default_inverse_frequencies
from landmark_cli.errors import LandmarkError
from landmark_cli.inference.block_reader import BlockReader
from tests.attention.reading import (
    CASES,
    JOINT_CASES,
    LEAVING_OUT,
    LOGITS,
    LOGITS_CASES,
    RERANK_CASES,
    Case,
    assert_same_traces,
    read,
)
from tests.closeness import assert_close_norm, tolerance
from tests.tiny import tiny_model, tiny_text

GPU_CASES = {
    "the paper's evaluation": Case([255] * 6 + [17], batch=3, heads=8, key_heads=8, dim=128, block_size=51, top_k=4),
    "32 heads on 8": Case([1000, 1000, 700, 1, 1, 3], heads=32, key_heads=8, dim=128, block_size=64, top_k=8),
    "9 heads on 3 of 64": Case([800, 777, 1, 900], heads=9, key_heads=3, dim=64, block_size=64, top_k=4),
    "steps of 5 rows": Case(
        [[900, 340, 2, 511, 60], [1] * 5, [2, 1, 0, 1, 1], [1, 0, 1, 2, 1]],
        batch=5, heads=8, key_heads=4, dim=128, block_size=51, top_k=4,
    ),
    "many landmarks": Case([6000, 6000, 1, 1, 200], heads=4, key_heads=2, dim=64, block_size=7, top_k=4),
    "many landmarks, a query each": Case([6000, 6000, 1, 1], heads=4, key_heads=4, dim=128, block_size=7, top_k=4),
    "head dim 256": Case([500, 300, 1], heads=4, key_heads=1, dim=256, block_size=64, top_k=4),
    "head dim 80, 32 rotated": Case([500, 300, 1], heads=4, key_heads=4, dim=80, rotary=32, block_size=51, top_k=4),
    "blocks of 200": Case([900, 700, 1], heads=4, key_heads=2, dim=128, block_size=200, top_k=2),
    "64 blocks retrieved": Case([1500, 600, 1], heads=4, key_heads=2, dim=64, block_size=16, top_k=64),
    "shared by heads": Case(
        [900, 700, 1], heads=8, key_heads=4, dim=128, block_size=51, top_k=4, settings={"selection": "max_over_heads"}
    ),
    "shared by tokens": Case(
        [900, 700, 1], heads=8, key_heads=4, dim=128, block_size=51, top_k=4, settings={"selection": "max_over_tokens"}
    ),
    "true distances": Case(
        [900, 700, 1], heads=8, key_heads=4, dim=128, block_size=51, top_k=4, settings={"positions": "absolute"}
    ),
    "evicted": Case(
        [900, 700, 1, 40], heads=8, key_heads=4, dim=128, block_size=51, top_k=4, settings={"cache_blocks": 9}
    ),
    "offloaded, 8 heads on 4": Case(
        [900, 700, 1, 40, 1, 1], heads=8, key_heads=4, dim=128, block_size=51, top_k=4, resident=40
    ),
    "as Gemma 2": Case([500, 700, 1, 1], heads=8, key_heads=4, dim=256, block_size=64, top_k=4, softcap=50.0),
    "as Gemma 3": Case([1900, 4100, 1, 1], heads=4, dim=256, block_size=64, top_k=4),
    "as GPT-OSS": Case([900, 700, 1, 1], heads=64, key_heads=8, dim=64, block_size=64, top_k=4, sinks=True),
    "32 heads on 8, capped, sinks": Case(
        [1000, 700, 1, 1, 3], heads=32, key_heads=8, dim=128, block_size=64, top_k=8, **LOGITS
    ),
    "many landmarks, a query each, capped, sinks": Case(
        [6000, 6000, 1, 1], heads=4, key_heads=4, dim=128, block_size=7, top_k=4, **LOGITS
    ),
    "shared by heads, capped, sinks": Case(
        [900, 700, 1], heads=8, key_heads=4, dim=128, block_size=51, top_k=4, settings={"selection": "max_over_heads"},
        **LOGITS,
    ),
    "offloaded and evicting frames, capped, sinks": Case(
        [900, 700, 1, 40, 1, 1], heads=8, key_heads=4, dim=128, block_size=51, top_k=4, resident=40, **LOGITS
    ),
    "joint, 32 heads on 8": Case(
        [1000, 1000, 700, 1, 1, 3], heads=32, key_heads=8, dim=128, block_size=64, top_k=8, settings={"joint": True}
    ),
    "re-ranked, sharpened, 9 heads on 3 of 64": Case(
        [1900, 1777, 1, 1, 3], heads=9, key_heads=3, dim=64, block_size=64, top_k=8,
        settings={"joint": True, "rerank_blocks": 40, "block_temperature": 0.5},
    ),
    "re-ranked, of 16 bits, a query each": Case(
        [6000, 6000, 1, 1], heads=4, key_heads=4, dim=128, block_size=16, top_k=4, dtype=torch.bfloat16,
        settings={"joint": True, "rerank_blocks": 64},
    ),
    "joint, as Gemma 2": Case(
        [500, 700, 1, 1], heads=8, key_heads=4, dim=256, block_size=64, top_k=4, softcap=50.0, settings={"joint": True}
    ),
    "joint, as GPT-OSS": Case(
        [900, 700, 1, 1], heads=64, key_heads=8, dim=64, block_size=64, top_k=4, sinks=True, settings={"joint": True}
    ),
}  # fmt: skip
ALL_CASES = {**CASES, **LOGITS_CASES, **JOINT_CASES, **RERANK_CASES}


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody has written holds NaN or huge integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ALL_CASES)
def test_agrees_with_the_definition(name):
    case = ALL_CASES[name]
    eager, fused, caches = read(case)
    assert_close_norm(fused, eager, case.dtype)
    assert_same_traces(*caches, tolerance=tolerance(case.dtype))


@pytest.mark.parametrize("name", ["re-ranked, 18 of 30 blocks", "re-ranked, 3 of 20 blocks, numbers of 16 bits"])
def test_many_queries_propose_in_several_passes(name, monkeypatch):
    """Scores of all blocks are written down for few queries alone."""
    monkeypatch.setattr(selection, "NUMBERS_BYTES", 0)
    eager, fused, _ = read(RERANK_CASES[name])
    assert_close_norm(fused, eager, RERANK_CASES[name].dtype)


@pytest.mark.parametrize("rows", [64, 128])
def test_large_tiles(rows, monkeypatch):
    """As GPUs have them that multiply by groups of warps."""
    monkeypatch.setattr(launch, "merge_configuration", lambda call: Configuration(rows, 64))
    eager, fused, _ = read(Case([150, 140], block_size=64))
    assert_close_norm(fused, eager)


OFFLOADED = {name: case for name, case in {**ALL_CASES, **GPU_CASES}.items() if case.resident is not None}


def assert_same_bits(case: Case, device: str) -> None:
    offloaded, here = (read(each, device)[1] for each in (case, replace(case, resident=None)))
    for ours, theirs in zip(offloaded, here, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [name for name in OFFLOADED if name in ALL_CASES])
def test_where_blocks_lie_changes_no_bit(name):
    assert_same_bits(OFFLOADED[name], "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", OFFLOADED)
def test_where_blocks_lie_changes_no_bit_on_a_gpu(name, dtype):
    assert_same_bits(replace(OFFLOADED[name], dtype=dtype), "cuda")


@pytest.mark.parametrize(
    ("case", "device"),
    [
        pytest.param(replace(CASES["steps"], chunks=[12, 1, 2]), "cpu", id="steps-cpu"),
        *(
            pytest.param(case, "cuda", marks=pytest.mark.gpu, id=f"{name}-gpu")
            for name, case in {**CASES, **GPU_CASES}.items()
        ),
    ],
)
def test_views_of_one_tensor_are_read_as_they_are_alone(case, device):
    """As they come from the joined product of a fused step."""
    joined, alone = (read(each, device)[1] for each in (replace(case, joined=True), case))
    assert all(map(torch.equal, joined, alone))


# In the interpreter one of them is quick enough for every change; a GPU tries all.
QUICK = ("rows left out",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LEAVING_OUT]
)
def test_rows_that_rest_can_be_left_out(name):
    eager, fused, _ = read(LEAVING_OUT[name], poison=True)
    assert_close_norm(fused, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", [*ALL_CASES, *GPU_CASES, *LEAVING_OUT])
def test_agrees_with_the_definition_on_a_gpu(name, dtype):
    cases = {**ALL_CASES, **GPU_CASES, **LEAVING_OUT}
    eager, fused, _ = read(replace(cases[name], dtype=dtype), "cuda")
    far, rows = 0, 0
    for expected, found in zip(eager, fused, strict=True):
        assert found.isfinite().all()
        error = (found - expected).norm(dim=-1)
        size = expected.norm(dim=-1)
        padding = size == 0
        assert (error[padding] == 0).all()
        error, size = error[~padding], size[~padding].maximum(size.square().mean().sqrt() / 10)
        # Scores of two blocks may be closer than 16 bits tell: then another block is as good, for a few queries.
        far += (error > (3e-2 if dtype == torch.bfloat16 else 1e-3) * size).sum().item()
        rows += error.numel()
        assert (error.median() / size.median()).item() < (5e-3 if dtype == torch.bfloat16 else 1e-5)
    top_k = cases[name].top_k
    assert far <= (0.01 * (1 + top_k / 8) if dtype == torch.bfloat16 else 1e-3) * rows


# Steps of a single query a key head are worked off without the matrix unit, those of more with it.
SHARED_OUT = {
    "one query": Case([60, 1, 1], block_size=2, heads=1),
    "one query, partial rotary": Case([60, 1, 1], block_size=2, heads=1, dim=24, rotary=8, top_k=3),
    "one query, true distances": Case([60, 1, 1], block_size=2, heads=1, settings={"positions": "absolute"}),
    "two queries": Case([60, 1, 1], block_size=2, heads=2),
    "rows of their own lengths": Case([[60, 5], [1, 1], [0, 1]], batch=2, block_size=2, heads=1),
    "one query, 16 bits": Case([60, 1, 1], block_size=2, heads=1, dtype=torch.float16),
    "one query, capped, sinks": Case([60, 1, 1], block_size=2, heads=1, **LOGITS),
    "two queries, capped, sinks": Case([60, 1, 1], block_size=2, heads=2, **LOGITS),
}


@pytest.mark.parametrize("name", SHARED_OUT)
def test_programs_of_a_step_take_several_tiles_each(name, monkeypatch):
    case = SHARED_OUT[name]
    monkeypatch.setattr(selection, "MAX_SPLITS", 1)
    rows = 1 if case.heads == case.key_heads else 16
    monkeypatch.setattr(selection, "step_configuration", lambda _: Configuration(rows, 16))
    eager, fused, _ = read(case)
    assert_close_norm(fused, eager, case.dtype)


FEW_QUERIES = {
    "one head": Case([270, 20, 3], block_size=2, heads=1),
    "rows of their own lengths, 4 heads on 2": Case([[270, 37], [10, 20]], batch=2, heads=4, key_heads=2, block_size=2),
    "8 blocks": Case([270, 20], block_size=2, heads=1, top_k=8),
    "true distances": Case([270, 20], block_size=2, heads=1, settings={"positions": "absolute"}),
    "evicted": Case([270, 20, 20], block_size=2, heads=1, settings={"cache_blocks": 140}),
    "16 bits": Case([270, 20], block_size=2, heads=1, top_k=3, dtype=torch.float16),
}


# Cases that take long in the interpreter: what they have of their own, others here and on a GPU have too.
LONG = dict.fromkeys(("rows of their own lengths, 4 heads on 2", "8 blocks", "true distances"), pytest.mark.slow)


@pytest.mark.parametrize("name", [pytest.param(name, marks=LONG.get(name, ())) for name in FEW_QUERIES])
def test_programs_share_out_the_landmarks_of_few_queries(name, monkeypatch):
    case, shares = FEW_QUERIES[name], []
    monkeypatch.setattr(selection, "LEAST_TILES", 1)
    counted = selection.shares_of_landmarks
    monkeypatch.setattr(selection, "shares_of_landmarks", lambda *given: shares.append(counted(*given)) or shares[-1])
    eager, fused, caches = read(case)
    assert max(shares) >= 2
    assert_close_norm(fused, eager, case.dtype)
    assert_same_traces(*caches, tolerance=tolerance(case.dtype))


def test_a_step_stores_its_keys_beside_its_choice(monkeypatch):
    """A kernel less; what has nothing to choose from, and wider chunks, are stored first."""
    stored, store = [], launch.store
    monkeypatch.setattr(launch, "store", lambda call: stored.append(call.tokens) or store(call))
    eager, ours, _ = read(Case([4, 12, 1, 2, 4, 5]))
    assert stored == [4, 12, 5]
    for a, b in zip(ours, eager, strict=True):
        assert_close_norm(a, b)


def test_what_the_kernels_do_not_know_is_refused(monkeypatch):
    cache = BlockCache(RetrievalSettings(4, 65), default_inverse_frequencies(16))
    chunk = cache.begin_chunk([4])
    x = torch.zeros(1, 1, 4, 16)
    with pytest.raises(LandmarkError, match="top_k is 65; the Triton kernels retrieve at most 64"):
        attend_chunk(0, x, x, x, cache, chunk, backend="triton")
    cache = BlockCache(RetrievalSettings(4, 2), default_inverse_frequencies(16))
    with pytest.raises(LandmarkError, match="scale is -1"):
        attend_chunk(0, x, x, x, cache, chunk, scale=-1.0, backend="triton")
    with pytest.raises(LandmarkError, match=r"softcap is 0\.0; the Triton kernels need a positive one"):
        attend_chunk(0, x, x, x, cache, chunk, softcap=0.0, backend="triton")
    monkeypatch.delitem(selection.SELECTIONS, "per_token_and_head")
    with pytest.raises(LandmarkError, match="selection is per_token_and_head; the Triton kernels know max_over_"):
        attend_chunk(0, x, x, x, cache, chunk, backend="triton")


def test_a_model_says_what_the_kernels_cannot(monkeypatch):
    monkeypatch.setenv("LANDMARK_ATTENTION", "triton")
    reader = BlockReader(tiny_model(), top_k_blocks=65, chunk=8)
    with pytest.raises(LandmarkError, match=r"top_k is 65; .* at most 64 blocks; or set LANDMARK_ATTENTION=eager"):
        next(reader.read([tiny_text(9)]))
