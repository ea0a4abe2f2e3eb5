"""The Triton kernels, interpreted on the CPU, give what the definition gives: outputs and gradients."""

import math

import pytest
import torch
import triton
from torch.utils.checkpoint import checkpoint

from landmark_cli.attention.kernels.common import statistics
from landmark_cli.attention.kernels.common.configuration import Configuration
from landmark_cli.attention.kernels.training import launch
from landmark_cli.attention.kernels.training.configurations import Choices
from landmark_cli.attention.operators import attention, attention_backward
from landmark_cli.attention.reference import landmark_attention as eager
from tests.attention.agreement import CASES, EXACT, Case, assert_agrees
from tests.attention.agreement import triton_attention as landmark_attention
from tests.closeness import assert_close_norm

# numpy, which the interpreter calculates with, says so where a row sees nothing of a block.
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
]


@pytest.fixture
def tiles(monkeypatch):
    """Sets the tiles' rows and keys: the interpreter's own are large, for it needs the same time for any size."""
    return lambda rows, cols: monkeypatch.setattr(launch, "choices", lambda *_: Choices([Configuration(rows, cols)]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, tiles):
    tiles(32, max(16, triton.next_power_of_2(case.block_size)))
    assert_agrees(case, EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "logits", [{}, {"softcap": 2.0, "sinks": True}, {"joint": True}], ids=["", "capped, sinks", "joint"]
)
def test_16_bit(logits, dtype):
    assert_agrees(Case(16, 50, dim=32, heads=2, **logits), 1e-2, dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case(64, 100),
        Case(51, 60, keys=75, dropout_p=0.3, dropout_seed=1),
        Case(40, 70, cu_seqlens=(0, 9, 70)),
        Case(64, 100, heads=2, softcap=2.0, sinks=True),
        Case(51, 60, keys=115, joint=True),
        Case(40, 90, cu_seqlens=(0, 9, 90), softcap=2.0, sinks=True, heads=2, joint=True),
        Case(40, 70, keys=90, batch=2, start=(0, 30), joint=True),
    ],
    ids=str,
)
def test_blocks_wider_than_a_tile(case, tiles):
    tiles(32, 16)
    assert_agrees(case, EXACT)


@pytest.mark.parametrize("rows", [16, 64])
def test_tiles_of_other_heights(rows, tiles):
    tiles(rows, 16)
    assert_agrees(Case(10, 75, heads=2, key_heads=1), EXACT)


@pytest.mark.parametrize(
    ("case", "share", "whole_heads"),
    [
        (Case(7, 60, batch=2, heads=2, key_heads=2), 0.7, True),
        (Case(7, 90, heads=2, key_heads=1), 0.9, False),
        (Case(7, 70, keys=83, batch=2, start=(0, 30)), 1.0, False),
        (Case(7, 90, cu_seqlens=(0, 41, 90), dropout_p=0.3, dropout_seed=9), 1.0, False),
        (Case(7, 60, batch=2, heads=2, key_heads=2, softcap=2.0, sinks=True), 0.7, True),
        (Case(7, 90, heads=2, key_heads=1, softcap=2.0, sinks=True), 0.9, False),
        (Case(7, 60, batch=2, heads=2, key_heads=2, joint=True), 0.7, True),
        (Case(7, 90, cu_seqlens=(0, 41, 90), sinks=True, joint=True), 1.0, False),
    ],
    ids=[
        "groups of heads",
        "ranges of rows",
        "ranges of rows, padded",
        "ranges of rows, packed",
        "groups of heads, sinks",
        "ranges of rows, sinks",
        "groups of heads, joint",
        "ranges of rows, packed, joint",
    ],  # fmt: skip
)
def test_backward_in_parts(case, share, whole_heads, tiles, monkeypatch):
    tiles(32, 16)
    monkeypatch.setattr(statistics, "WORKSPACE", share)
    q, k, _ = case.tensors(torch.float32, "cpu")
    parts, _ = statistics.backward_parts(q, k, case.block_size)
    assert len(parts) > 1
    assert all((part.first_row, part.last_row) == (0, case.queries) for part in parts) == whole_heads
    assert_agrees(case, EXACT)


@pytest.mark.parametrize("heads", [1, 8, 32])
@pytest.mark.parametrize("tokens", [512, 8160, 131072])
@pytest.mark.parametrize("block_size", [16, 51, 64])
def test_the_workspace_is_bounded(heads, tokens, block_size):
    q = torch.empty(1, heads, tokens, 128, dtype=torch.bfloat16, device="meta")
    parts, workspace = statistics.backward_parts(q, q, block_size)
    assert 4 * workspace <= statistics.WORKSPACE * q.numel() * q.element_size()
    for part in parts:
        size = statistics.statistics_size(part.last_row - part.first_row, part.first_row, block_size)
        assert size == 4 * part.plane and 3 * part.key_heads * size <= workspace
        assert part.key_heads == 1 or (part.first_row, part.last_row) == (0, tokens)
    # Whole rounds of the heads that are in flight together, but for a few heads and for the last part.
    step, in_flight = parts[0].key_heads, statistics.HEADS_IN_FLIGHT
    assert step == heads or step < in_flight or step % in_flight == 0
    assert sorted({(part.first_head, part.first_row) for part in parts}) == [
        (head, row) for head in range(0, heads, step) for row in sorted({part.first_row for part in parts})
    ]


@pytest.mark.parametrize("view", ["of one projection", "head dim in steps", "expanded keys", "expanded gradient"])
def test_strides(view):
    projected = torch.randn(2, 40, 3, 2, 16)
    q, k, v = projected.unbind(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if view == "head dim in steps":
        q = torch.randn(2, 2, 16, 40).transpose(-1, -2)
    if view == "expanded keys":
        k = k[:, :1].expand(-1, 2, -1, -1)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = torch.ones(()).expand(2, 2, 40, 16) if view == "expanded gradient" else torch.randn(2, 2, 40, 16)
    found, expected = (
        torch.autograd.grad(function(*leaves, block_size=7), leaves, dout) for function in (landmark_attention, eager)
    )
    for a, b in zip(found, expected, strict=True):
        assert_close_norm(a, b)


def test_a_row_that_sees_nothing():
    q, k, v = Case(7, 20, batch=2).tensors(torch.float32, "cpu")
    out, lse = landmark_attention(q, k, v, block_size=7, start=torch.tensor([20, 12]), return_lse=True)
    dq, dk, dv = torch.autograd.grad(out.sum(), [q, k, v])
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all()
    assert (out[1, :, :12] == 0).all() and (out[1, :, 12:] != 0).all()
    for gradient in (dq, dk, dv):
        assert (gradient[0] == 0).all() and (gradient[1, :, :12] == 0).all()


def test_the_same_bits_every_time(tiles):
    tiles(32, 16)
    q, k, v = Case(16, 70, heads=2, key_heads=1).tensors(torch.float32, "cpu")
    leaves = [q, k, v, torch.tensor([-1.0, 2.0]).requires_grad_()]

    def attend(q, k, v, sinks):
        return landmark_attention(q, k, v, block_size=16, softcap=2.0, sinks=sinks).sum()

    runs = [torch.autograd.grad(attend(*leaves), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_landmarks_have_no_value():
    q, k, v = Case(5, 30).tensors(torch.float32, "cpu")
    out = landmark_attention(q, k, v, block_size=5)
    changed = v.detach().clone()
    changed[:, :, 4::5] = 1e6
    torch.testing.assert_close(landmark_attention(q, k, changed, block_size=5), out, rtol=0, atol=0)
    (dv,) = torch.autograd.grad(out.sum(), v)
    assert (dv[:, :, 4::5] == 0).all()


@pytest.mark.parametrize("cols", [16, 64])
def test_where_text_is_weighted_jointly_landmarks_have_no_key_either(cols, tiles):
    """Keys whose logits overflow change nothing, not even where whole tiles need no mask."""
    tiles(16, cols)
    q, k, v = Case(40, 130, heads=2, key_heads=1).tensors(torch.float32, "cpu")
    dout = torch.randn_like(q)
    found = []
    for size in (1.0, 1e6):
        loud = torch.where((torch.arange(130) % 40 == 39)[:, None], size, 1.0)
        given = q, (k * loud).detach().requires_grad_(), (v * loud).detach().requires_grad_()
        out = landmark_attention(*given, block_size=40, joint=True)
        gradients = torch.autograd.grad(out, given, dout)
        for gradient in gradients[1:]:
            assert (gradient[:, :, 39::40] == 0).all()
        found.append([out, *gradients])
    # The product of a landmark's own query with the other keys is what it was.
    for quiet, loud in zip(*found, strict=True):
        torch.testing.assert_close(loud, quiet, rtol=0, atol=0)


def test_the_output_lies_as_the_next_layer_wants_it():
    q, k, v = Case(7, 20, heads=2).tensors(torch.float32, "cpu")
    out = landmark_attention(q, k, v, block_size=7)
    assert out.transpose(1, 2).is_contiguous()
    assert all(g.transpose(1, 2).is_contiguous() for g in torch.autograd.grad(out.sum(), [q, k, v]))


def test_a_row_that_sees_nothing_but_a_sink():
    q, k, v = Case(7, 20, batch=2, heads=2).tensors(torch.float32, "cpu")
    sinks = torch.tensor([-1.0, 2.0]).requires_grad_()
    out, lse = landmark_attention(q, k, v, block_size=7, start=torch.tensor([20, 12]), sinks=sinks, return_lse=True)
    assert (out[0] == 0).all() and (out[1, :, :12] == 0).all() and (out[1, :, 12:] != 0).all()
    torch.testing.assert_close(lse[0], sinks[:, None].expand(2, 20), rtol=1e-6, atol=0)
    (dsinks,) = torch.autograd.grad(lse[0].sum(), sinks)
    torch.testing.assert_close(dsinks, torch.full((2,), 20.0))


def test_without_a_gradient_of_sinks_or_of_anything_else():
    q, k, v = (x.detach() for x in Case(7, 20, heads=2).tensors(torch.float32, "cpu"))
    sinks = torch.tensor([-1.0, 2.0]).requires_grad_()
    found, expected = (
        torch.autograd.grad(function(q, k, v, block_size=7, sinks=sinks).square().sum(), sinks)
        for function in (landmark_attention, eager)
    )
    assert_close_norm(found, expected)
    out = landmark_attention(q.requires_grad_(), k, v, block_size=7, sinks=sinks.detach())
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("bounds", ["plain", "start", "cu_seqlens", "dropout", "softcap and sinks", "joint"])
def test_opcheck(bounds):
    q, k, v = Case(7, 20).tensors(torch.float32, "cpu")
    softcap, sinks = (2.0, torch.tensor([0.5]).requires_grad_()) if bounds == "softcap and sinks" else (None, None)
    start = torch.tensor([3], dtype=torch.int32) if bounds == "start" else None
    cu_seqlens = torch.tensor([0, 9, 20], dtype=torch.int32) if bounds == "cu_seqlens" else None
    dropout = (0.3, torch.tensor(5)) if bounds == "dropout" else (0.0, None)
    settings = 7, 0.25, start, cu_seqlens, *dropout, softcap, bounds == "joint", "triton"
    torch.library.opcheck(attention, (q, k, v, sinks, *settings))
    q, k, v, sinks = (None if x is None else x.detach() for x in (q, k, v, sinks))
    out, lse = attention(q, k, v, sinks, *settings)
    torch.library.opcheck(attention_backward, (torch.randn_like(out), None, q, k, v, sinks, out, lse, *settings))


def test_compiles_in_one_graph_for_every_seed():
    compiled = torch.compile(
        lambda q, k, v, seed: landmark_attention(q * 2, k, v, block_size=7, dropout_p=0.4, dropout_seed=seed) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    q, k, v = Case(7, 30).tensors(torch.float32, "cpu")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (3, 2**50, -1):
            out = compiled(q, k, v, torch.tensor(seed))
            expected = eager(q * 2, k, v, block_size=7, dropout_p=0.4, dropout_seed=seed) + 1
            assert_close_norm(out, expected)
            found, wanted = (torch.autograd.grad(x.sum(), [q, k, v], retain_graph=True) for x in (out, expected))
            for a, b in zip(found, wanted, strict=True):
                assert_close_norm(a, b)


def test_activation_checkpointing():
    q, k, v = Case(7, 30).tensors(torch.float32, "cpu")

    def layer(q):
        return landmark_attention(q, k, v, block_size=7)

    plain = torch.autograd.grad(layer(q).sum(), [q, k, v])
    again = torch.autograd.grad(checkpoint(layer, q, use_reentrant=False).sum(), [q, k, v])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_autocast_gives_its_dtype():
    q, k, v = Case(7, 20).tensors(torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        out = landmark_attention(q, k, v, block_size=7)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.float().sum(), q)[0].dtype == torch.float32


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_torch_func_is_refused(transform):
    q, k, v = Case(7, 20).tensors(torch.float32, "cpu")

    def function(q):
        return landmark_attention(q, k, v, block_size=7).sum()

    transformed = {
        "vmap": lambda: torch.func.vmap(function)(torch.stack([q, q])),
        "grad": lambda: torch.func.grad(function)(q),
        "jvp": lambda: torch.func.jvp(function, (q,), (q,)),
    }
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        transformed[transform]()


def test_second_derivatives_are_refused():
    q, k, v = Case(7, 20).tensors(torch.float32, "cpu")
    (dq,) = torch.autograd.grad(landmark_attention(q, k, v, block_size=7).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="landmark"):
        dq.sum().backward()


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("words", "q", "k", "arguments"),
    [
        ("dimensions", ones(2, 3), ones(2, 3), {}),
        ("batch or head dim", ones(1, 2, 4, 16), ones(2, 2, 4, 16), {}),
        ("not a multiple", ones(1, 3, 4, 16), ones(1, 2, 4, 16), {}),
        ("at least one", ones(1, 2, 0, 16), ones(1, 2, 4, 16), {}),
        ("at most", ones(1, 2, 5, 16), ones(1, 2, 4, 16), {}),
        ("differ in dtype", ones(1, 2, 4, 16, dtype=torch.float16), ones(1, 2, 4, 16), {}),
        ("different devices", ones(1, 2, 4, 16).to("meta"), ones(1, 2, 4, 16), {}),
        ("float64", ones(1, 2, 4, 16, dtype=torch.float64), ones(1, 2, 4, 16, dtype=torch.float64), {}),
        ("head dim 264", ones(1, 1, 4, 264), ones(1, 1, 4, 264), {}),
        ("head dim 12", ones(1, 1, 4, 12), ones(1, 1, 4, 12), {}),
        ("block_size is 1", ones(1, 1, 4, 16), ones(1, 1, 4, 16), {"block_size": 1}),
        ("block_size is 257", ones(1, 1, 4, 16), ones(1, 1, 4, 16), {"block_size": 257}),
        ("scale is -1", ones(1, 1, 4, 16), ones(1, 1, 4, 16), {"scale": -1.0}),
        ("softcap is 0.0; .* positive", ones(1, 1, 4, 16), ones(1, 1, 4, 16), {"softcap": 0.0}),
        ("sinks is .* one logit for each head", ones(1, 1, 4, 16), ones(1, 1, 4, 16), {"sinks": torch.ones(2)}),
        ("sinks is on meta", ones(1, 1, 4, 16), ones(1, 1, 4, 16), {"sinks": torch.ones(1, device="meta")}),
        ("dropout_p is 1", ones(1, 1, 4, 16), ones(1, 1, 4, 16), {"dropout_p": 1.0, "dropout_seed": 0}),
        ("dropout_seed", ones(1, 1, 4, 16), ones(1, 1, 4, 16), {"dropout_p": 0.5}),
        (
            "joint and dropout_p exclude",
            ones(1, 1, 4, 16),
            ones(1, 1, 4, 16),
            {"dropout_p": 0.5, "dropout_seed": 0, "joint": True},
        ),
        ("start is a row", ones(1, 1, 4, 16), ones(1, 1, 4, 16), {"start": torch.tensor([[1]])}),
        ("start has shape", ones(1, 1, 4, 16), ones(1, 1, 4, 16), {"start": torch.tensor([1, 2])}),
        ("cu_seqlens is a row", ones(1, 1, 4, 16), ones(1, 1, 4, 16), {"cu_seqlens": torch.tensor([0.0, 4.0])}),
        ("q has 2 rows", ones(2, 1, 4, 16), ones(2, 1, 4, 16), {"cu_seqlens": torch.tensor([0, 4])}),
        (
            "exclude each other",
            ones(1, 1, 4, 16),
            ones(1, 1, 4, 16),
            {"cu_seqlens": torch.tensor([0, 4]), "start": torch.tensor([0])},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(words, q, k, arguments):
    with pytest.raises(ValueError, match=words):
        landmark_attention(q, k, k, **{"block_size": 4, **arguments})
