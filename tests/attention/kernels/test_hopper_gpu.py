"""The Hopper kernels on a Hopper GPU, through dispatch: what the definition gives, the same bits every time, no hang.

    pytest -m gpu -n 8 tests/attention/kernels/test_hopper_gpu.py

A kernel that waits for ever ends its process after LIMIT seconds, with a trace that names the test.
"""

import faulthandler
import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from landmark_cli.attention import backends, functional
from landmark_cli.attention.kernels.hopper import launch, parts, support
from landmark_cli.attention.operators import attention, attention_backward
from landmark_cli.attention.reference import landmark_attention as eager
from tests.attention.agreement import Case, outputs_and_gradients
from tests.attention.kernels import test_training_gpu
from tests.closeness import assert_close_norm, whole_error

DEVICE = "cuda"
ROUNDED = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
LIMIT = 90

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic", "ignore:.*Deterministic"),
]


@pytest.fixture(autouse=True)
def limit():
    """The kernels are there, and none of them may hang."""
    assert support.is_hopper(DEVICE) and support.why_not_gluon() is None
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    assert backends.hopper.KERNELS.given_up is None, "the Triton kernels took their place"


def hopper(q, k, v, **arguments):
    return functional.landmark_attention(q, k, v, **arguments, backend="hopper")


def assert_agrees(case: Case, dtype: torch.dtype) -> None:
    leaves = case.tensors(dtype, DEVICE)
    given = torch.randn_like(leaves[0]), torch.randn(leaves[0].shape[:3], device=DEVICE)
    arguments = {"block_size": case.block_size, "scale": case.scale, "return_lse": True}
    found = outputs_and_gradients(hopper, *leaves, *given, **arguments)
    exact = [x.detach().float().requires_grad_() for x in leaves]
    expected = outputs_and_gradients(eager, *exact, given[0].float(), given[1], **arguments)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        error = whole_error(a, b)
        assert error <= ROUNDED[dtype], f"{case}: {name} {error:.1e}"  # a NaN fails too


def serves(case: Case) -> bool:
    dims = case.dim in support.HEAD_DIMS and case.block_size in support.BLOCK_SIZES
    return dims and case.queries >= backends.FEW_QUERIES and not (case.start or case.cu_seqlens or case.dropout_p)


# The Triton kernels' cases in the domain, and further ones.
CASES = [case for case in test_training_gpu.LARGE_CASES if serves(case)] + [
    Case(64, 256, dim=128),
    Case(64, 257, dim=128, batch=3, heads=100, key_heads=100),
    Case(64, 4500, dim=128),
    Case(64, 1100, keys=5001, dim=128, heads=2, key_heads=2),
    Case(64, 777, keys=3333, dim=64, batch=2, heads=4, key_heads=1),
    Case(51, 300, keys=999, dim=64, heads=2, key_heads=2),
    Case(51, 4096, dim=128),
    Case(33, 1000, dim=128, heads=2, key_heads=2),
    Case(16, 1003, dim=128, heads=2, key_heads=1),
    Case(16, 640, dim=64, heads=2, key_heads=2, scale=0.7),
    Case(50, 500, dim=128, heads=2, key_heads=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16(case):
    assert_agrees(case, torch.bfloat16)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_float16(case):
    assert_agrees(case, torch.float16)


# Kernels are compiled for each of these, and for no length, batch or number of heads.
KINDS = [
    (torch.bfloat16, 128, 64, 1),
    (torch.bfloat16, 128, 64, 4),
    (torch.bfloat16, 64, 64, 1),
    (torch.bfloat16, 128, 51, 1),
    (torch.float16, 64, 51, 2),
    (torch.bfloat16, 64, 16, 1),
    (torch.float16, 128, 33, 3),
    (torch.float16, 128, 64, 1),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_random_shapes(kind):
    """25 of each kind: 200 a run, none like the last run's; the seed is printed."""
    dtype, dim, block, group = kind
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    numbers = random.Random(seed)
    for _ in range(25):
        queries = numbers.choice([numbers.randint(256, 700), numbers.randint(256, 3000)])
        keys = queries + numbers.choice([0, numbers.randint(1, 700)])
        # As many heads in all as the definition has memory and time for.
        most = max(1, min(300, 40_000_000 // (queries * keys)) // group)
        key_heads = numbers.randint(1, most)
        batch = numbers.choice([n for n in range(1, key_heads + 1) if key_heads % n == 0])
        key_heads //= batch
        case = Case(block, queries, keys=keys, dim=dim, batch=batch, heads=key_heads * group, key_heads=key_heads)
        assert_agrees(case, dtype)


@pytest.mark.parametrize("heads", [1, 2, 7, 64, 131, 132, 133, 299, 300])
def test_any_number_of_heads(heads):
    """More or fewer tiles than multiprocessors, and as many."""
    assert_agrees(Case(64, 256, dim=128, heads=heads, key_heads=heads), torch.bfloat16)


@pytest.mark.parametrize(
    "case",
    [
        Case(64, 1000, dim=128, batch=2, heads=8, key_heads=2),
        Case(51, 777, dim=64, heads=40, key_heads=40),
        Case(64, 512, dim=128, batch=16, heads=8, key_heads=8),
    ],
    ids=str,
)
def test_the_same_bits_a_thousand_times(case):
    torch.use_deterministic_algorithms(False)
    q, k, v = (x.detach() for x in case.tensors(torch.bfloat16, DEVICE))
    dout = torch.randn_like(q)

    def run():
        out, lse = launch.forward(q, k, v, case.block_size, 0.1)
        return [out, lse, *launch.backward(dout, None, q, k, v, out, lse, case.block_size, 0.1)]

    first = run()
    assert all(x.isfinite().all() for x in first)
    differ = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        for a, b in zip(first, run(), strict=True):
            differ += (a != b).any()
    assert differ.item() == 0


def test_a_call_of_a_known_kind_repeats_launches(monkeypatch):
    """On other tensors, and in parts; the first call of a kind is what all other tests see."""
    monkeypatch.setattr(parts, "LEAST_BOUND", 0)
    case = Case(16, 6000, keys=6500, dim=64, heads=2, key_heads=1)
    for _ in range(3):
        assert_agrees(case, torch.bfloat16)
    for dim, *choice in (128, 4, 3, 3), (128, 4, 4, 2), (128, 5, 4, 3), (64, 4, 3, 4, 3), (64, 4, 3, 2):
        choice = launch.BackwardConfiguration(*choice)
        q, k, v = (x.detach() for x in Case(64, 700, dim=dim, heads=2).tensors(torch.bfloat16, DEVICE))
        out, lse = launch.forward(q, k, v, 64, 0.1)
        expected = launch.backward(out, None, q, k, v, out, lse, 64, 0.1)
        found = launch.backward(out, None, q, k, v, out, lse, 64, 0.1, choice=choice)
        for a, b in zip(found, expected, strict=True):
            if choice.consumers == launch.backward_configuration(700, dim).consumers:
                assert torch.equal(a, b)
            else:
                # Other rows are masked then, and so rounded otherwise.
                assert (a - b).float().norm() <= 5e-3 * b.float().norm()


def test_backward_in_ranges_of_rows(monkeypatch):
    monkeypatch.setattr(parts, "LEAST_BOUND", 0)
    case = Case(16, 6000, keys=6500, dim=64, heads=2, key_heads=1)
    q, k, _ = case.tensors(torch.bfloat16, DEVICE)
    assert parts.backward_parts(q, k, case.block_size)[0][0].first_row > 0
    assert_agrees(case, torch.bfloat16)


@pytest.mark.parametrize("view", ["of one projection", "head dim in steps", "expanded keys", "expanded gradient"])
def test_strides(view):
    projected = torch.randn(2, 300, 3, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    q, k, v = (x.transpose(1, 2) for x in projected.unbind(2))
    if view == "head dim in steps":
        q = torch.randn(2, 2, 64, 300, dtype=torch.bfloat16, device=DEVICE).transpose(-1, -2)
    if view == "expanded keys":
        k = k[:, :1].expand(-1, 2, -1, -1)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().float().requires_grad_() for x in leaves]
    dout = torch.randn_like(q)
    if view == "expanded gradient":
        dout = torch.ones((), dtype=q.dtype, device=DEVICE).expand_as(q)
    found = torch.autograd.grad(hopper(*leaves, block_size=51), leaves, dout)
    expected = torch.autograd.grad(eager(*exact, block_size=51), exact, dout.float())
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b).norm() <= ROUNDED[torch.bfloat16] * b.norm()


def test_extra_memory_of_a_training_step():
    """Less than twice the memory of q, beside inputs, outputs and gradients."""
    q, k, v = Case(64, 8192, dim=128, heads=8, key_heads=8).tensors(torch.bfloat16, DEVICE)
    dout = torch.randn_like(q)
    torch.autograd.grad(hopper(q, k, v, block_size=64), [q, k, v], dout)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = hopper(q, k, v, block_size=64, return_lse=True)
    gradients = torch.autograd.grad(out, [q, k, v], dout)
    needed = sum(x.numel() * x.element_size() for x in (out, lse, *gradients))
    extra = torch.cuda.max_memory_allocated() - before - needed
    assert extra < 2 * q.numel() * q.element_size(), f"{extra / q.numel() / q.element_size():.2f} times q"


@pytest.mark.parametrize("choice", [(2, 3, 4, 2), (2, 4, 4, 2), (2, 3, 4, 1), (3, 4, 4, 1)], ids=str)
def test_other_configurations(choice):
    """Those that the benchmarks try, which need not be the ones chosen."""
    dim = 64 if choice[0] == 3 else 128
    q, k, v = (x.detach() for x in Case(64, 2500, keys=2600, dim=dim, heads=2).tensors(torch.bfloat16, DEVICE))
    out, lse = launch.forward(q, k, v, 64, 0.1, choice=launch.ForwardConfiguration(*choice))
    expected = eager(q.float(), k.float(), v.float(), block_size=64, scale=0.1, return_lse=True)
    for a, b in zip((out, lse), expected, strict=True):
        assert (a.float() - b).norm() <= ROUNDED[torch.bfloat16] * b.norm()


def test_opcheck():
    q, k, v = (x.detach() for x in Case(64, 300, dim=64, heads=2, key_heads=1).tensors(torch.bfloat16, DEVICE))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    settings = 64, 0.125, None, None, 0.0, None, None, False, "hopper"
    torch.library.opcheck(attention, (*leaves, None, *settings))
    out, lse = attention(q, k, v, None, *settings)
    torch.library.opcheck(attention_backward, (torch.randn_like(out), None, q, k, v, None, out, lse, *settings))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(dynamic):
    def layer(function, q, k, v):
        return function(torch.tanh(q), k, v, block_size=64) * 2

    compiled = torch.compile(lambda *inputs: layer(hopper, *inputs), fullgraph=True)
    for tokens in (300, 413) if dynamic else (300,):
        leaves = Case(64, tokens, dim=64, heads=2, key_heads=2).tensors(torch.bfloat16, DEVICE)
        if dynamic:
            for x in leaves:
                torch._dynamo.mark_dynamic(x, 2)
        found, expected = compiled(*leaves), layer(hopper, *leaves)
        assert_close_norm(found, expected)
        dout = torch.randn_like(found)
        for a, b in zip(*(torch.autograd.grad(x, leaves, dout) for x in (found, expected)), strict=True):
            assert (a - b).float().norm() <= 1e-2 * b.float().norm()


def test_activation_checkpointing():
    q, k, v = Case(64, 700, dim=128, heads=2).tensors(torch.bfloat16, DEVICE)

    def layer(q):
        return hopper(q, k, v, block_size=64).float().square().sum()

    plain = torch.autograd.grad(layer(q), [q, k, v])
    again = torch.autograd.grad(checkpoint(layer, q, use_reentrant=False), [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_captured_training_step_follows_its_inputs():
    torch.use_deterministic_algorithms(False)
    leaves = Case(64, 700, dim=128, heads=2).tensors(torch.bfloat16, DEVICE)
    dout = torch.randn_like(leaves[0])

    def step():
        out = hopper(*leaves, block_size=64)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    # In a stream of its own, as capture wants it: this one compiles the kernels and makes their schedules.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            for x in (*leaves, dout):
                x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_autocast():
    leaves = Case(64, 300, dim=64, heads=2).tensors(torch.float32, DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        out = hopper(*leaves, block_size=64)
    expected = eager(*leaves, block_size=64)
    assert out.dtype == torch.bfloat16 and (out - expected).norm() <= ROUNDED[torch.bfloat16] * expected.norm()


def test_the_triton_kernels_agree():
    """The same inputs through both, at a size that the definition has no memory for."""
    case = Case(64, 16384, dim=128, heads=4, key_heads=2)
    leaves = case.tensors(torch.bfloat16, DEVICE)
    given = torch.randn_like(leaves[0]), torch.randn(leaves[0].shape[:3], device=DEVICE)
    found, expected = (
        outputs_and_gradients(
            functional.landmark_attention, *leaves, *given, block_size=64, return_lse=True, backend=name
        )
        for name in ("hopper", "triton")
    )
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()
