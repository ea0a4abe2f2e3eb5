"""The kernels that read a whole window at once give what the definition gives: outputs and gradients."""

import dataclasses

import pytest
import torch

from landmark_cli.attention import functional
from landmark_cli.attention.kernels.common.choices import Choices
from landmark_cli.attention.kernels.common.configuration import Configuration
from landmark_cli.attention.kernels.reading import window as kernels
from landmark_cli.attention.kernels.reading import window_support
from landmark_cli.attention.retrieval_window import retrieve_window, select_in_window
from landmark_cli.attention.window_operators import retrieve
from tests.attention.windows import CASES as SMALL
from tests.attention.windows import Case
from tests.closeness import assert_close_norm

# numpy, which the interpreter calculates with, says so where a row sees nothing.
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
]

# What the definition's own cases leave out: heads of several parts, lists and landmarks of several tiles, 18 blocks.
CASES = [case for case in SMALL if case.top_k and case.tokens > case.chunk] + [
    Case(40, chunk=16, block_size=8, dim=24, rotary=8, heads=4, key_heads=2, batch=2),
    Case(64, chunk=8, block_size=4, dim=40, top_k=3, explore=0.5, heads=4, key_heads=2),
    Case(60, chunk=20, block_size=2, top_k=18, heads=1),
    Case(168, chunk=28, block_size=2, heads=1, dim=4),
    Case(60, chunk=20, block_size=20, top_k=1, dim=32),
    Case(38, softcap=1.5),
    Case(38, selection="max_over_heads", heads=3, key_heads=3, softcap=1.5),
    Case(40, batch=2, cu_seqlens=(0, 1, 1, 40, 63, 80), softcap=1.5),
    Case(40, chunk=16, block_size=8, dim=24, rotary=8, heads=4, key_heads=2, batch=2, softcap=1.5),
    Case(60, chunk=20, block_size=2, top_k=18, heads=1, softcap=1.5),
    Case(40, chunk=16, block_size=8, dim=24, rotary=8, softcap=1.5, joint=True),
    Case(26, explore=0.5, heads=4, key_heads=2, joint=True),
    Case(60, chunk=20, block_size=20, top_k=1, dim=32, joint=True),
]
GPU_CASES = [
    Case(1500, chunk=256, block_size=64, top_k=4, heads=4, key_heads=2, dim=64),
    Case(1500, chunk=256, block_size=64, top_k=4, heads=4, key_heads=1, dim=128),
    Case(900, chunk=204, block_size=51, top_k=3, heads=3, key_heads=3, dim=96),
    Case(1300, chunk=128, block_size=16, top_k=8, heads=2, key_heads=1, dim=256, batch=2),
    Case(1300, chunk=256, block_size=128, top_k=2, heads=4, key_heads=2, dim=128),
    Case(1300, chunk=256, block_size=128, top_k=2, heads=2, key_heads=2, dim=256),
    Case(2000, chunk=256, block_size=32, top_k=20, heads=2, key_heads=1, dim=64),
    Case(1200, chunk=256, block_size=64, top_k=4, heads=4, key_heads=2, dim=80, rotary=32),
    Case(1700, chunk=256, block_size=64, top_k=4, heads=4, key_heads=2, dim=128, batch=3, start=(0, 300, 1690)),
    Case(1700, chunk=256, block_size=64, top_k=4, heads=4, key_heads=2, dim=64, cu_seqlens=(0, 5, 700, 700, 1700)),
    Case(1700, chunk=256, block_size=64, top_k=4, heads=4, key_heads=2, dim=64, layer=0, equal_landmarks=True),
    Case(1700, chunk=256, block_size=64, top_k=4, heads=4, key_heads=2, dim=64, explore=0.3),
    Case(1700, chunk=256, block_size=64, top_k=4, heads=4, key_heads=2, dim=64, selection="max_over_heads"),
    Case(6400, chunk=32, block_size=16, top_k=4, heads=2, key_heads=1, dim=64),
    Case(1500, chunk=256, block_size=64, top_k=4, heads=4, key_heads=2, dim=64, softcap=1.5),
    Case(1500, chunk=256, block_size=64, top_k=4, heads=4, key_heads=1, dim=128, softcap=1.5),
    Case(1300, chunk=256, block_size=64, top_k=4, heads=4, key_heads=2, dim=256, softcap=50.0),
    Case(1500, chunk=256, block_size=64, top_k=4, heads=4, key_heads=2, dim=64, joint=True),
    Case(1500, chunk=256, block_size=64, top_k=4, heads=4, key_heads=1, dim=128, softcap=1.5, joint=True),
    Case(1300, chunk=256, block_size=128, top_k=2, heads=2, key_heads=2, dim=256, joint=True),
    Case(1700, chunk=256, block_size=64, top_k=4, heads=4, key_heads=2, dim=64, explore=0.3, joint=True),
]
NAMES = "out", "lse", "dq", "dk", "dv", "down", "down_lse"


@pytest.fixture
def tiles(monkeypatch):
    """Small tiles, items of work and groups of key heads, so that there are several of each."""
    small = Choices([Configuration(16, 16)])
    usual = kernels.window_choices

    def choose(kernel, q, block_size, top_k):
        return usual(kernel, q, block_size, top_k) if kernel == "pair_gradient" else small

    monkeypatch.setattr(kernels, "window_choices", choose)
    monkeypatch.setattr(kernels, "ITEM", 24)
    monkeypatch.setattr(kernels, "PAIR_BYTES", 0)


def inputs(case: Case, dtype=torch.float32, device="cpu"):
    """q, k and v, rotated; a part of the chunks' own; the gradients of what comes of it."""
    q, k, v = case.tensors(torch.float32, device)
    q, k = case.rotated(case.window(device), q, k)
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    own, dout = (torch.randn_like(leaves[0]) for _ in range(2))
    own_lse, dlse = (torch.randn(q.shape[:3], device=device) for _ in range(2))
    # Padding has no part of its own.
    own_lse = own_lse.masked_fill((case.window(device).chunk_of < 0)[:, None], -torch.inf)
    return leaves, [own.requires_grad_(), own_lse.requires_grad_()], [dout, dlse]


def of_kernels(case: Case, leaves, own, gradients, ages=None):
    """Outputs and gradients of the kernels; the log-sum-exp of nothing is 0 here."""
    window = case.window(leaves[0].device.type)
    if ages is None and case.selection != "per_token_and_head":
        ages = select_in_window(leaves[0], leaves[1], window, layer=case.layer, softcap=case.softcap)
    given = {"backend": "triton", "ages": ages, "softcap": case.softcap}
    out, lse = retrieve(*leaves, window, None, case.layer, own, **given)
    return with_gradients(out, lse, [*leaves, *(own or ())], gradients)


def of_definition(case: Case, leaves, own, gradients, ages=None):
    leaves = [x.detach().float().requires_grad_() for x in leaves]
    own = None if own is None else [x.detach().float().requires_grad_() for x in own]
    given = {"layer": case.layer, "ages": ages, "softcap": case.softcap}
    out, lse = retrieve_window(*leaves, case.window(leaves[0].device.type), **given)
    if own is not None:
        both = torch.stack([own[1], lse])
        lse = torch.logsumexp(both.masked_fill(both == -torch.inf, -1e30), 0)
        out = own[0] * torch.exp(both[0] - lse).unsqueeze(-1) + out * torch.exp(both[1] - lse).unsqueeze(-1)
        lse = lse.masked_fill(lse < -1e29, -torch.inf)
    return with_gradients(out, lse, [*leaves, *(own or ())], [x.float() for x in gradients])


def with_gradients(out, lse, leaves, gradients):
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, gradients)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition(case, tiles):
    given = inputs(case)
    found, expected = of_kernels(case, *given), of_definition(case, *given)
    assert_close_norm(dict(zip(NAMES, found, strict=True)), dict(zip(NAMES, expected, strict=True)))


def test_without_an_own_part(tiles):
    leaves, _, gradients = inputs(SMALL[2])
    found, expected = (function(SMALL[2], leaves, None, gradients) for function in (of_kernels, of_definition))
    assert_close_norm(found, expected)


@pytest.mark.parametrize("part", ["dim of parts", "no rest"])
def test_wide_heads_and_blocks_go_part_by_part(part, monkeypatch):
    launched = []
    kernel = kernels.pair_gradient_kernel

    class Counted:
        def __getitem__(self, grid):
            def launch(*given, **options):
                launched.append(options["PART"])
                return kernel[grid](*given, **options)

            return launch

    monkeypatch.setattr(kernels, "pair_gradient_kernel", Counted())
    case = Case(260, chunk=130, block_size=130, top_k=1, dim=80, rotary=32 if part == "dim of parts" else None, heads=1)
    given = inputs(case)
    assert_close_norm(of_kernels(case, *given), of_definition(case, *given))
    assert launched == ([0, 1, 2] if part == "dim of parts" else [0, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit(dtype):
    case = Case(40, chunk=16, block_size=8, dim=32, heads=4, key_heads=2)
    given = inputs(case, dtype)
    found, expected = of_kernels(case, *given), of_definition(case, *given)
    assert [x.dtype for x in found] == [dtype, torch.float32, dtype, dtype, dtype, dtype, torch.float32]
    assert_close_norm([x.float() for x in found], expected, torch.bfloat16)


def test_the_same_bits_every_time(tiles):
    case = Case(24, chunk=8, block_size=4, heads=4, key_heads=2)
    given = inputs(case)
    runs = [of_kernels(case, *given) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_strides_and_gradients_that_are_missing():
    case = Case(24, heads=2, key_heads=2)
    leaves, own, (dout, dlse) = inputs(case)
    window = case.window()
    expected = torch.autograd.grad(retrieve(*leaves, window, backend="triton")[0], leaves, dout)
    # The head dim in steps, and a gradient without memory of its own.
    others = [x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in leaves]
    found = torch.autograd.grad(retrieve(*others, window, backend="triton")[0], others, dout)
    assert_close_norm(found, expected)
    out, lse = retrieve(*leaves, window, backend="triton")
    assert (lse == -torch.inf).any()
    by_lse = torch.autograd.grad(lse[lse > -torch.inf].sum(), leaves, retain_graph=True, allow_unused=True)
    assert all(x.isfinite().all() for x in by_lse) and (by_lse[2] == 0).all()
    ones = torch.autograd.grad(out.sum(), leaves)
    assert all(x.isfinite().all() for x in ones)


@pytest.mark.parametrize(
    ("case", "sinks"),
    [
        (Case(14, heads=4, key_heads=2), None),
        (Case(16, batch=2, start=(0, 3)), None),
        (Case(14, batch=2, cu_seqlens=(0, 1, 1, 14, 21, 28)), None),
        (Case(20, cu_seqlens=(0, 6, 20), layer=0, equal_landmarks=True), None),
        (Case(14, heads=4, key_heads=2, softcap=1.5), (-1.0, 2.0, 0.0, 1.0)),
        (Case(16, batch=2, start=(0, 3), softcap=1.5), (-1.0, 2.0)),
        (Case(16, batch=2, start=(0, 3), joint=True), (-1.0, 2.0)),
        (Case(20, cu_seqlens=(0, 6, 20), heads=4, key_heads=2, softcap=1.5, joint=True), None),
        # What is selected together depends on how far the cap presses the scores of each head.
        (Case(20, selection="max_over_heads", softcap=0.3), None),
    ],
    ids=str,
)
def test_attention_of_a_window_in_the_kernels(case, sinks):
    q, k, v = case.tensors()
    window = case.window()
    leaves = [*(x.detach().requires_grad_() for x in case.rotated(window, q, k)), v]
    if sinks is not None:
        leaves.append(torch.tensor(sinks).requires_grad_())

    def attend(backend):
        logits = {"softcap": case.softcap, "sinks": None if sinks is None else leaves[3]}
        return functional.attend_window(case.layer, *leaves[:3], window, backend=backend, **logits)

    found, expected = (attend(backend) for backend in ("triton", "eager"))
    assert_close_norm(found, expected)
    assert_close_norm(*(torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected)))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((torch.bfloat16, 128, 64, 65), "top_k is 65; the Triton kernels retrieve at most 64 blocks"),
        ((torch.bfloat16, 256, 129, 4), "block_size is 129 with head dim 256"),
        ((torch.float32, 128, 65, 4), "block_size is 65 with head dim 128"),
        ((torch.bfloat16, 256, 128, 64), None),
        ((torch.float32, 128, 64, 64), None),
    ],
)
def test_what_the_kernels_cannot_read_is_named(given, reason):
    found = window_support.why_not(*given)
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*deterministic", "ignore:.*Deterministic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, *GPU_CASES], ids=str)
def test_agrees_with_the_definition_on_a_gpu(case, dtype):
    if (reason := window_support.why_not(dtype, case.dim, case.block_size, case.top_k)) is not None:
        pytest.skip(reason)
    given = inputs(case, dtype, "cuda")
    wrong = 3e-2 if dtype != torch.float32 else 1e-4
    for name, a, b in zip(NAMES, of_kernels(case, *given), of_definition(case, *given), strict=True):
        assert a.isfinite().all(), name
        # Scores of two blocks may be closer than the dtype tells: then another block is as good, for a few queries, and
        # of these the gradients of keys are sums. The others show in the median.
        error, size = (a.float() - b.float()).norm(dim=-1), b.float().norm(dim=-1)
        assert error.median() <= wrong * size.square().mean().sqrt(), name
    ages = select_in_window(*given[0][:2], case.window("cuda"), layer=case.layer, softcap=case.softcap)
    found, expected = of_kernels(case, *given, ages), of_definition(case, *given, ages)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert (a.float() - b.float()).norm() <= wrong * b.float().norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("case", [GPU_CASES[0], GPU_CASES[5]], ids=str)
def test_a_thousand_repeats_are_the_same_bits(case):
    torch.use_deterministic_algorithms(False)
    given = inputs(
        dataclasses.replace(case, tokens=4096, chunk=512 // case.block_size * case.block_size), torch.bfloat16, "cuda"
    )
    case = dataclasses.replace(case, tokens=4096, chunk=512 // case.block_size * case.block_size)
    first = of_kernels(case, *given)
    for _ in range(1000):
        assert all(torch.equal(a, b) for a, b in zip(first, of_kernels(case, *given), strict=True))
