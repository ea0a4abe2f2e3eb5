"""The Hopper kernels, run on the CPU by an emulator of their language, give what the definition gives."""

import contextlib
import types

import pytest
import torch
from triton.experimental import gluon

from landmark_cli.attention.fused import launch as portable
from landmark_cli.attention.hopper import launch, schedule, support
from landmark_cli.attention.reference import landmark_attention as eager
from tests.attention import gluon_emulator
from tests.attention.agreement import Case

ROUNDED = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
PAIRS, SINGLES = launch.ForwardConfiguration(2, 3, 4, 2), launch.ForwardConfiguration(2, 4, 4, 1)


@pytest.fixture(autouse=True)
def chip(monkeypatch, poisoned):
    """A chip of three multiprocessors, so that each has several tiles to work on."""
    for name in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"):
        monkeypatch.setattr(launch, name, gluon_emulator.Emulated(getattr(launch, name)))
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    properties = types.SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    yield
    schedule.query_schedule.cache_clear()
    schedule.key_schedule.cache_clear()


@pytest.mark.parametrize("with_lse", [True, False], ids=["dlse", "plain"])
@pytest.mark.parametrize(
    ("case", "dtype", "choice"),
    [
        (Case(64, 256, dim=64), torch.bfloat16, None),
        (Case(64, 700, dim=64, heads=3, key_heads=1), torch.float16, None),
        (Case(64, 300, keys=1003, dim=128, heads=2, key_heads=2), torch.bfloat16, PAIRS),
        (Case(64, 420, dim=128, batch=2), torch.bfloat16, SINGLES),
        (Case(51, 300, keys=420, dim=64, batch=2, heads=4, key_heads=2), torch.bfloat16, PAIRS),
        (Case(33, 257, dim=128, heads=2), torch.float16, PAIRS),
        (Case(16, 600, dim=64, heads=2), torch.bfloat16, None),
    ],
    ids=lambda x: str(x).replace("torch.", "").replace("ForwardConfiguration", "") if x is not None else "",
)
def test_agrees_with_the_definition(case, dtype, choice, with_lse):
    q, k, v = (x.detach() for x in case.tensors(dtype, "cpu"))
    dout, dlse = torch.randn_like(q), torch.randn(q.shape[:3]) if with_lse else None
    scale = case.dim**-0.5
    out, lse = launch.forward(q, k, v, case.block_size, scale, choice=choice)
    grads = launch.backward(dout, dlse, q, k, v, out, lse, case.block_size, scale)
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    wanted = eager(*exact, block_size=case.block_size, return_lse=True)
    used = 1 + with_lse
    wanted += torch.autograd.grad(wanted[:used], exact, [dout.float(), dlse][:used])
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), wanted, strict=True):
        assert (a.float() - b).norm() <= ROUNDED[dtype] * b.norm(), name
        assert a.dtype == (torch.float32 if name == "lse" else dtype)


def test_backward_in_ranges_of_rows(monkeypatch):
    """Part by part it adds up to what it is at once, but for rounding in between."""
    q, k, v = (x.detach() for x in Case(64, 500, dim=64, heads=2).tensors(torch.float16, "cpu"))
    out, lse = launch.forward(q, k, v, 64, 0.125)
    dout = torch.randn_like(q)
    whole = launch.backward(dout, None, q, k, v, out, lse, 64, 0.125)
    monkeypatch.setattr(portable, "WORKSPACE", 0.2)
    assert portable.work_groups(q, k, 64)[1] < 500
    for a, b in zip(whole, launch.backward(dout, None, q, k, v, out, lse, 64, 0.125), strict=True):
        assert (a.float() - b.float()).norm() <= 1e-3 * a.float().norm()


@gluon.jit
def aliased(turns):
    newer = turns + 1
    older = newer
    for _ in range(turns):
        older = newer
        newer = newer + 1
    return older


@gluon.jit
def distinct(turns):
    newer = turns + 1
    older = newer + 0
    for _ in range(turns):
        older = newer
        newer = newer + 1
    return older


def test_the_emulator_knows_what_triton_takes_for_constant():
    """Two names of one value before a loop, whose first turn leaves one of them at it."""
    gluon_emulator.Emulated(distinct)[1,](3, num_warps=4, maxnreg=1)
    with pytest.raises(AssertionError, match="older for constant"):
        gluon_emulator.Emulated(aliased)[1,](3, num_warps=4, maxnreg=1)


@pytest.mark.parametrize("heads", [1, 7, 300])
@pytest.mark.parametrize("tiles", [1, 5, 40])
def test_a_schedule_has_every_tile_once(heads, tiles):
    lists = schedule.deal([2.5 + tile for tile in range(tiles)], heads, 8, 132)
    assert sorted(sum(lists, [])) == [(head, tile) for head in range(heads) for tile in range(tiles)]
    loads = [sum(2.5 + tile for _, tile in work) for work in lists]
    assert max(loads) - min(loads) <= tiles + 2.5


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((torch.float32, 128, 64), "float32"),
        ((torch.bfloat16, 96, 64), "head dim 96"),
        ((torch.bfloat16, 128, 65), "block_size is 65"),
        ((torch.bfloat16, 128, 64), "compute capability 9.0"),
    ],
    ids=str,
)
def test_what_they_cannot_serve_is_named(given, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason in support.why_not(*given)


def test_this_triton_has_what_they_call():
    assert support.why_not_gluon() is None


def test_another_gluon_is_explained(monkeypatch):
    monkeypatch.setattr(launch.gl, "warp_specialize", lambda functions, warps: None)
    assert "has no functions_and_args" in support.why_not_gluon()
    monkeypatch.delattr(launch.gl, "warp_specialize")
    assert "warp_specialize" in support.why_not_gluon()
