"""The Triton kernels on an NVIDIA GPU give what the definition gives, in every precision and at real sizes.

    pytest -m "gpu and not slow" -n 12 --dist worksteal tests/attention/kernels/test_training_gpu.py

Nearly all of the time goes into compiling kernels, so processes help; the slow test takes 30 GB. A kernel that reads
where it must not ends its process: `-k 2-byte`, `-k 4-byte` and `-k "not byte"` find it.
"""

import pytest
import torch
import triton
from torch.utils.checkpoint import checkpoint

from landmark_cli.attention import functional
from landmark_cli.attention.kernels.common import choices
from landmark_cli.attention.kernels.common.statistics import backward_parts
from landmark_cli.attention.kernels.training import configurations, launch
from landmark_cli.attention.operators import attention, attention_backward
from landmark_cli.attention.reference import landmark_attention as eager
from tests.attention.agreement import CASES, EXACT, Case, assert_agrees, outputs_and_gradients
from tests.attention.agreement import triton_attention as landmark_attention
from tests.closeness import assert_close_norm, whole_error

DEVICE = "cuda"
ROUNDED = 1e-2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*deterministic", "ignore:.*Deterministic"),
]

LARGE_CASES = [
    Case(2, 515, dim=64, heads=2),
    Case(7, 1000, dim=128, heads=4, key_heads=2),
    Case(16, 777, dim=8, heads=3, key_heads=1),
    Case(33, 900, dim=24, heads=2),
    Case(51, 512, dim=128, batch=4, heads=8, key_heads=8),
    Case(51, 2293, dim=128, heads=4, key_heads=2),
    Case(64, 1900, dim=128, heads=4, key_heads=4),
    Case(64, 2500, dim=128, heads=4, key_heads=1),
    Case(64, 1900, dim=64, heads=2),
    Case(64, 2500, dim=64, heads=2, key_heads=2),
    Case(100, 1300, dim=80, heads=2),
    Case(128, 1500, dim=40, heads=2),
    Case(128, 1100, dim=96, heads=2, key_heads=2),
    Case(200, 1500, dim=192, heads=2),
    Case(256, 1800, dim=128, heads=2),
    Case(256, 1400, dim=256, heads=2),
    Case(64, 1, keys=1000, dim=128, batch=2, heads=4, key_heads=2),
    Case(64, 700, keys=2717, dim=128, batch=3, heads=2, key_heads=2, start=(0, 333, 2400)),
    Case(51, 2300, dim=64, heads=4, key_heads=2, cu_seqlens=(0, 1, 700, 700, 1999, 2300)),
    Case(64, 1500, dim=128, batch=2, heads=2, dropout_p=0.3, dropout_seed=2**50 + 1),
    Case(51, 1200, keys=1500, dim=128, heads=2, dropout_p=0.3, dropout_seed=-7, cu_seqlens=(0, 800, 1500)),
    # As Gemma 2 and GPT-OSS have them, and all together.
    Case(64, 1500, dim=256, heads=4, key_heads=2, softcap=50.0),
    Case(64, 2100, dim=128, heads=4, key_heads=2, softcap=2.0),
    Case(64, 1900, dim=64, heads=8, key_heads=1, batch=2, sinks=True),
    Case(51, 2293, dim=128, heads=4, key_heads=2, softcap=2.0, sinks=True),
    Case(51, 2300, dim=64, heads=4, key_heads=2, cu_seqlens=(0, 1, 700, 700, 1999, 2300), softcap=2.0, sinks=True),
    Case(128, 1500, dim=40, heads=2, softcap=2.0, sinks=True),
    Case(64, 1900, dim=128, heads=4, key_heads=2, joint=True),
    Case(256, 1400, dim=256, heads=2, joint=True),
    Case(51, 2300, dim=64, heads=4, key_heads=2, cu_seqlens=(0, 1, 700, 700, 1999, 2300), sinks=True, joint=True),
    Case(64, 700, keys=2717, dim=128, batch=3, heads=2, start=(0, 333, 2400), softcap=2.0, joint=True),
    Case(64, 700, keys=2717, dim=128, batch=3, heads=2, key_heads=2, start=(0, 333, 2400), softcap=2.0, sinks=True),
]

# Products of float32 are made in three parts, which other tiles serve.
LARGE_EXACT_CASES = [
    Case(2, 300, dim=40, heads=2),
    Case(51, 700, dim=96, heads=2),
    Case(64, 900, dim=128, heads=4, key_heads=2),
    Case(100, 700, dim=256, heads=2),
    Case(128, 700, dim=40, heads=2),
    Case(256, 700, dim=80, heads=2),
    Case(64, 300, keys=700, dim=64, batch=2, heads=2, start=(100, 450), dropout_p=0.3, dropout_seed=5),
    Case(64, 900, dim=128, heads=4, key_heads=2, softcap=50.0, sinks=True),
    Case(100, 700, dim=256, heads=2, softcap=2.0, sinks=True),
    Case(128, 700, dim=40, heads=2, joint=True),
    Case(100, 700, dim=256, heads=2, softcap=2.0, sinks=True, joint=True),
]


@pytest.mark.parametrize("case", CASES + LARGE_EXACT_CASES, ids=lambda case: f"4-byte-{case}")
def test_float32(case):
    assert_agrees(case, EXACT, torch.float32, DEVICE)


@pytest.mark.parametrize("case", CASES[::2] + LARGE_CASES, ids=lambda case: f"2-byte-{case}")
def test_bfloat16(case):
    assert_agrees(case, ROUNDED, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("case", CASES[1::2] + LARGE_CASES[::3], ids=lambda case: f"2-byte-{case}")
def test_float16(case):
    assert_agrees(case, ROUNDED, torch.float16, DEVICE)


def test_float32_is_as_exact_as_pytorch_is_told():
    leaves = Case(64, 500, dim=64, heads=2).tensors(torch.float32, DEVICE)
    given = [torch.randn_like(leaves[0]), torch.randn(leaves[0].shape[:3], device=DEVICE)]
    arguments = {"block_size": 64, "return_lse": True}
    try:
        torch.set_float32_matmul_precision("high")
        found = outputs_and_gradients(landmark_attention, *leaves, *given, **arguments)
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = outputs_and_gradients(eager, *leaves, *given, **arguments)
    for a, b in zip(found, expected, strict=True):
        assert EXACT < whole_error(a, b) < 3e-3


@pytest.mark.parametrize(
    "case",
    [
        Case(16, 130, dim=32, heads=2, key_heads=1),
        Case(51, 150, dim=64, dropout_p=0.4, dropout_seed=3),
        Case(16, 130, dim=32, heads=2, key_heads=1, softcap=2.0, sinks=True),
    ],
    ids=str,
)
def test_the_gradient_is_the_slope(case):
    """Along the gradient the outputs rise as much as it is long: central differences, no other implementation."""
    leaves = case.tensors(torch.float32, DEVICE)
    weights = torch.randn_like(leaves[0], dtype=torch.float64), torch.randn(leaves[0].shape[:3], device=DEVICE).double()

    def value(q, k, v):
        outputs = landmark_attention(q, k, v, **case.arguments(DEVICE))
        return sum((x.double() * weight).sum() for x, weight in zip(outputs, weights, strict=True))

    for leaf, gradient in zip(leaves, torch.autograd.grad(value(*leaves), leaves), strict=True):
        length = gradient.double().norm()
        step = 0.05 * gradient / length
        with torch.no_grad():
            above, below = (value(*(x + sign * step if x is leaf else x for x in leaves)) for sign in (1, -1))
        assert ((above - below) / 0.1 / length).item() == pytest.approx(1.0, abs=2e-4)


@pytest.mark.parametrize("view", ["of one projection", "head dim in steps", "expanded keys", "expanded gradient"])
def test_strides(view):
    projected = torch.randn(2, 300, 3, 2, 64, device=DEVICE)
    q, k, v = (x.transpose(1, 2) for x in projected.unbind(2))
    if view == "head dim in steps":
        q = torch.randn(2, 2, 64, 300, device=DEVICE).transpose(-1, -2)
    if view == "expanded keys":
        k = k[:, :1].expand(-1, 2, -1, -1)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = torch.ones((), device=DEVICE).expand_as(q) if view == "expanded gradient" else torch.randn_like(q)
    found, expected = (
        torch.autograd.grad(function(*leaves, block_size=51), leaves, dout) for function in (landmark_attention, eager)
    )
    for a, b in zip(found, expected, strict=True):
        assert_close_norm(a, b)


@pytest.mark.slow
def test_tensors_of_more_than_2_to_the_31_numbers():
    """The last row of a batch, whose every index needs 64 bits, is what it is when alone."""
    batch, heads, tokens, dim, block_size = 33, 32, 16384, 128, 64
    assert batch * heads * tokens * dim > 2**31
    torch.use_deterministic_algorithms(False)
    x = torch.empty(batch, heads, tokens, dim, dtype=torch.bfloat16, device=DEVICE)
    x[-1].normal_()
    layout = launch.Layout(block_size, dim**-0.5)
    with torch.no_grad():
        x[:-1] = 0.0
        found = launch.forward(x, x, x, layout)
        found = [*found, *launch.backward(x, None, x, x, x, *found, layout)[:3]]
        found = [y[-1:].clone() for y in found]
        x = x[-1:].clone()
        expected = launch.forward(x, x, x, layout)
        expected = [*expected, *launch.backward(x, None, x, x, x, *expected, layout)[:3]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("logits", [{}, {"softcap": 2.0, "sinks": True}], ids=["", "capped, sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(dtype, logits):
    case = Case(64, 2500, dim=128, batch=2, heads=8, key_heads=2, dropout_p=0.2, dropout_seed=1, **logits)
    leaves = case.tensors(dtype, DEVICE)
    dout = torch.randn_like(leaves[0])
    arguments = case.arguments(DEVICE)
    if case.sinks:
        leaves.append(arguments["sinks"].requires_grad_())

    def run():
        out, lse = landmark_attention(*leaves[:3], **arguments)
        return [out, lse, *torch.autograd.grad(out, leaves, dout)]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize(
    "case",
    [
        Case(64, 4096, dim=128, heads=16, key_heads=16),
        Case(64, 8192, dim=64, heads=8, key_heads=2),
        Case(7, 4096, dim=128, heads=4, key_heads=4),
        Case(64, 16384, dim=64),
    ],
    ids=str,
)
def test_extra_memory_of_a_training_step(case):
    """Less than twice the memory of q, beside inputs, outputs and gradients."""
    q, k, v = case.tensors(torch.bfloat16, DEVICE)
    dout = torch.randn_like(q)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = landmark_attention(q, k, v, block_size=case.block_size, return_lse=True)
    gradients = torch.autograd.grad(out, [q, k, v], dout)
    needed = sum(x.numel() * x.element_size() for x in (out, lse, *gradients))
    extra = torch.cuda.max_memory_allocated() - before - needed
    assert extra < 2 * q.numel() * q.element_size(), f"{extra / q.numel() / q.element_size():.2f} times q"


@pytest.mark.parametrize("case", [Case(7, 2000, dim=64), Case(3, 1500, keys=1800, dim=128, heads=2)], ids=str)
def test_backward_in_ranges_of_rows(case):
    q, k, _ = case.tensors(torch.bfloat16, DEVICE)
    assert backward_parts(q, k, case.block_size)[0][0].first_row > 0
    assert_agrees(case, ROUNDED, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("bounds", ["plain", "start", "cu_seqlens", "dropout", "softcap and sinks", "joint"])
def test_opcheck(bounds):
    case = Case(16, 90, dim=32, heads=2, key_heads=1, sinks=bounds == "softcap and sinks")
    q, k, v = case.tensors(torch.float32, DEVICE)
    softcap, sinks = 2.0 if case.sinks else None, case.arguments(DEVICE)["sinks"]
    start = torch.tensor([3], dtype=torch.int32, device=DEVICE) if bounds == "start" else None
    cu_seqlens = torch.tensor([0, 9, 90], dtype=torch.int32, device=DEVICE) if bounds == "cu_seqlens" else None
    dropout = (0.3, torch.tensor(5, device=DEVICE)) if bounds == "dropout" else (0.0, None)
    settings = 16, 0.25, start, cu_seqlens, *dropout, softcap, bounds == "joint", "triton"
    torch.library.opcheck(attention, (q, k, v, sinks if sinks is None else sinks.requires_grad_(), *settings))
    q, k, v, sinks = (None if x is None else x.detach() for x in (q, k, v, sinks))
    out, lse = attention(q, k, v, sinks, *settings)
    torch.library.opcheck(attention_backward, (torch.randn_like(out), None, q, k, v, sinks, out, lse, *settings))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(dynamic):
    def layer(function, q, k, v, seed):
        return function(torch.tanh(q), k, v, block_size=16, dropout_p=0.3, dropout_seed=seed) * 2

    compiled = torch.compile(lambda *inputs: layer(landmark_attention, *inputs), fullgraph=True, dynamic=dynamic)
    for tokens in (90, 133) if dynamic else (90,):
        leaves = Case(16, tokens, dim=32, heads=2).tensors(torch.float32, DEVICE)
        seed = torch.tensor(tokens)
        found, expected = compiled(*leaves, seed), layer(eager, *leaves, seed)
        assert_close_norm(found, expected)
        dout = torch.randn_like(found)
        for a, b in zip(*(torch.autograd.grad(x, leaves, dout) for x in (found, expected)), strict=True):
            assert_close_norm(a, b)


def test_activation_checkpointing():
    q, k, v = Case(64, 700, dim=128, heads=2).tensors(torch.bfloat16, DEVICE)

    def layer(q):
        return landmark_attention(q, k, v, block_size=64, dropout_p=0.3, dropout_seed=1).float().square().sum()

    plain = torch.autograd.grad(layer(q), [q, k, v])
    again = torch.autograd.grad(checkpoint(layer, q, use_reentrant=False), [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    leaves = Case(64, 300, dim=64, heads=2).tensors(torch.float32, DEVICE)
    with torch.autocast("cuda", dtype):
        out = landmark_attention(*leaves, block_size=64)
    assert out.dtype == dtype
    expected = eager(*leaves, block_size=64)
    assert (out - expected).norm() <= ROUNDED * expected.norm()
    dout = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(x, leaves, dout.to(x.dtype)) for x in (out, expected))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= ROUNDED * b.norm()


def test_a_captured_training_step_follows_its_inputs():
    torch.use_deterministic_algorithms(False)
    leaves = Case(64, 700, dim=128, heads=2).tensors(torch.bfloat16, DEVICE)
    dout, seed = torch.randn_like(leaves[0]), torch.tensor(1, device=DEVICE)

    def step():
        out = landmark_attention(*leaves, block_size=64, dropout_p=0.3, dropout_seed=seed)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    # In a stream of its own, as capture wants it: the graph's, which also compiles the kernels.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number in (2, 3):
        with torch.no_grad():
            seed.fill_(number)
            for x in (*leaves, dout):
                x.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_a_new_length_compiles_nothing():
    def step(tokens):
        leaves = Case(64, tokens, dim=64, heads=2, key_heads=2).tensors(torch.bfloat16, DEVICE)
        out = landmark_attention(*leaves, block_size=64)
        torch.autograd.grad(out, leaves, torch.randn_like(out))

    step(511)
    compiled = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given["key"])
    try:
        for tokens in (1, 64, 77, 512, 1000, 1024):
            step(tokens)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert not compiled


def forget_calls():
    for calls in (launch.FORWARD_CALLS, launch.BACKWARD_CALLS):
        calls.clear()


@pytest.mark.parametrize("kind", ["plain", "start", "cu_seqlens", "dropout", "softcap", "sinks", "rows"])
def test_calls_alike_repeat_their_launches(kind):
    """Other tensors, bounds and seeds of the same kind give what they give in a call of its own."""

    def case(number):
        if kind == "rows":
            return Case(3, 1000, dim=64)
        kinds = {
            "plain": {},
            "start": {"start": (number, 99 + number)},
            "cu_seqlens": {"batch": 1, "cu_seqlens": (0, 50 + number, 300)},
            "dropout": {"dropout_p": 0.3, "dropout_seed": number},
            "softcap": {"softcap": 1.0 + number},
            "sinks": {"sinks": True},
        }
        return Case(51, 300, **{"dim": 64, "batch": 2, "heads": 4, "key_heads": 2} | kinds[kind])

    def step(number, leaves, dout):
        out = landmark_attention(*leaves, **case(number).arguments(DEVICE) | {"return_lse": False})
        return [out, *torch.autograd.grad(out, leaves, dout)]

    torch.use_deterministic_algorithms(False)
    forget_calls()
    for number in range(3):
        leaves = case(number).tensors(torch.bfloat16, DEVICE)
        inputs = leaves, torch.randn_like(leaves[0])
        found = step(number, *inputs)
        assert launch.FORWARD_CALLS.launches and launch.BACKWARD_CALLS.launches
        forget_calls()
        assert all(torch.equal(a, b) for a, b in zip(found, step(number, *inputs), strict=True))


def test_an_uncommon_address():
    x = torch.randn(2 * 300 * 64 + 1, device=DEVICE)
    leaves = [x[1:].view(1, 2, 300, 64).requires_grad_(), *(torch.randn(1, 2, 300, 64, device=DEVICE) for _ in "kv")]
    for _ in range(2):
        found, expected = (function(*leaves, block_size=51) for function in (landmark_attention, eager))
        assert_close_norm(found, expected)


def test_tuning(monkeypatch):
    """It keeps a fast configuration, and the results."""
    monkeypatch.setattr(choices, "TUNE", True)
    monkeypatch.setattr(choices, "TRIED", 2)
    configurations._choices.cache_clear()
    forget_calls()
    try:
        assert_agrees(Case(64, 600, dim=64, heads=2), ROUNDED, torch.bfloat16, DEVICE)
        q = torch.empty(1, 2, 600, 64, dtype=torch.bfloat16, device=DEVICE)
        for kernel in ("forward", "query_gradient", "key_gradient"):
            assert configurations.choices(kernel, q, 64).tuned
    finally:
        configurations._choices.cache_clear()
        forget_calls()


@pytest.mark.parametrize(
    ("words", "device", "arguments"),
    [
        ("different devices", "cpu", {"block_size": 4}),
        ("block_size is 300", DEVICE, {"block_size": 300}),
        ("landmark_mask", DEVICE, {"landmark_mask": torch.ones(1, 8, dtype=torch.bool)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(words, device, arguments):
    q = torch.randn(1, 1, 8, 16, device=DEVICE)
    k = q.to(device)
    with pytest.raises(ValueError, match=words):
        functional.landmark_attention(q, k, k, **arguments, backend="triton")
