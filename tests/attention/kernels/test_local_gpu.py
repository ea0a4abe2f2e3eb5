"""The Triton kernels of layers with a sliding window on an NVIDIA GPU give what the definition gives, in every
precision and at real sizes, and are recorded in CUDA graphs.

    pytest -m gpu -n 8 --dist worksteal tests/attention/kernels/test_local_gpu.py
"""

import copy

import pytest
import torch

from landmark_cli.attention import local
from landmark_cli.attention.cache import BlockCache, RetrievalSettings
from landmark_cli.attention.kernels.local import launch
from landmark_cli.attention.rotary import default_inverse_frequencies
from tests.attention.sliding import CASES, READINGS, Case, Reading, agreement
from tests.closeness import whole_error

DEVICE = "cuda"
# Largest relative error of all rows together.
EXACT, ROUNDED = 1e-5, 1e-2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic", "ignore:.*Deterministic"),
]

# As Gemma 3 and 2, GPT-OSS and others have them, and tiles of all heights.
LARGE_CASES = [
    Case(512, 3000, block_size=64, dim=256, heads=4),
    Case(1024, 2500, block_size=64, dim=256, heads=4, softcap=50.0),
    Case(4096, 4500, block_size=64, dim=256, heads=8, key_heads=4, softcap=50.0),
    Case(128, 2100, block_size=64, dim=64, batch=2, heads=8, sinks=True),
    Case(512, 1900, block_size=51, dim=128, heads=4, key_heads=2, cu_seqlens=(0, 1, 700, 700, 1900)),
    Case(100, 1500, block_size=64, dim=96, batch=3, start=(0, 333, 1400)),
    Case(512, 2000, block_size=64, dim=128, batch=2, chunk=512),
    Case(200, 1300, dim=80, batch=2, every=30, softcap=2.0, sinks=True),
    Case(1000, 3000, block_size=64, dim=128, batch=2, heads=8, key_heads=8),
]
# What rounding does to the logits of this one a softmax makes more of than is allowed.
ROUNDED_CASES = [case for case in CASES if case.scale is None]

LARGE_READINGS = [
    Reading(512, ((2048,), (2048,), (1,), (1,), (700,)), block_size=64, dim=256, heads=4),
    Reading(1024, ((100, 0), (1984, 300), (1, 1), (9, 0)), block_size=64, dim=256, heads=4, softcap=50.0),
    Reading(128, ((300, 40, 1), (1, 0, 1), (1, 1, 1)), block_size=64, dim=64, heads=16, key_heads=2, sinks=True),
]


def assert_agrees(pairs, allowed: float) -> None:
    errors = {name: whole_error(a, b) for name, (a, b) in pairs.items()}
    assert all(error <= allowed for error in errors.values()), errors  # a NaN fails too


@pytest.mark.parametrize("case", [*CASES, LARGE_CASES[0], *LARGE_CASES[3:]], ids=lambda case: f"4-byte-{case}")
def test_float32(case):
    assert_agrees(agreement(case, torch.float32, DEVICE), EXACT)


@pytest.mark.parametrize("case", ROUNDED_CASES[::2] + LARGE_CASES, ids=lambda case: f"2-byte-{case}")
def test_bfloat16(case):
    assert_agrees(agreement(case, torch.bfloat16, DEVICE), ROUNDED)


@pytest.mark.parametrize("case", ROUNDED_CASES[1::2] + LARGE_CASES[::3], ids=lambda case: f"2-byte-{case}")
def test_float16(case):
    assert_agrees(agreement(case, torch.float16, DEVICE), ROUNDED)


@pytest.mark.parametrize("case", READINGS + LARGE_READINGS, ids=str)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, EXACT), (torch.bfloat16, ROUNDED)], ids=str)
def test_chunk_after_chunk(case, dtype, allowed):
    found, expected = (case.read(backend, dtype, DEVICE) for backend in ("triton", "eager"))
    assert_agrees({str(i): pair for i, pair in enumerate(zip(found, expected, strict=True))}, allowed)


def test_calls_that_repeat_a_launch():
    """With other tensors, the launches that were kept give what was never launched before."""
    case = Case(100, 700, block_size=64, dim=64, heads=4, batch=2, softcap=2.0, sinks=True)
    for _ in range(3):
        assert_agrees(agreement(case, torch.bfloat16, DEVICE), ROUNDED)
    assert launch.FORWARD_CALLS.launches and launch.BACKWARD_CALLS.launches


@pytest.mark.parametrize("width", [1, 2])
@torch.no_grad()
def test_steps_are_recorded(width):
    """A step in a CUDA graph, replayed with other tokens and counters, is the step without one."""
    frequencies = default_inverse_frequencies(256).to(DEVICE)
    cache = BlockCache(RetrievalSettings(64, 2), frequencies, batch=2, device=DEVICE)
    made = [torch.randn(2, 90, heads, 256, device=DEVICE).bfloat16().transpose(1, 2) for heads in (4, 1, 1)]
    chunk = cache.begin_chunk([90, 30])
    held = cache.window(0, made[1], 100)
    local.attend_chunk(*made, held, chunk, frequencies, backend="triton")
    cache.end_chunk(chunk)

    still = [torch.zeros_like(x[:, :, :width]) for x in made]
    counters = torch.zeros(4, 2, dtype=torch.int32, device=DEVICE)
    counters[0] = width
    rows = range(2)

    def step():
        return local.attend_chunk(
            *still, held, cache.chunk([width] * 2, width, rows, counters), frequencies, backend="triton"
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):
        fresh = [torch.randn_like(x) for x in still]
        other = copy.deepcopy(held)
        expected = local.attend_chunk(*fresh, other, cache.begin_chunk([width] * 2), frequencies, backend="eager")
        for to, x in zip(still, fresh, strict=True):
            to.copy_(x)
        counters.copy_(torch.tensor(cache.counts([width] * 2, width, rows), dtype=torch.int32))
        graph.replay()
        cache.advance([width] * 2)
        assert_agrees({"out": (out, expected)}, ROUNDED)
        assert torch.equal(held.keys, other.keys) and torch.equal(held.real, other.real)
