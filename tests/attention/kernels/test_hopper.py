"""The Hopper kernels, run on the CPU by an emulator of their language, give what the definition gives."""

import contextlib
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.experimental import gluon

from landmark_cli.attention import backends, functional
from landmark_cli.attention.backends import Problem
from landmark_cli.attention.kernels.common import statistics
from landmark_cli.attention.kernels.hopper import launch, parts, schedule, support
from landmark_cli.attention.operators import attention
from landmark_cli.attention.reference import landmark_attention as eager
from tests.attention.agreement import Case
from tests.attention.kernels import gluon_emulator

ROUNDED = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
KERNELS = {name: getattr(launch, name) for name in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")}
# Sinks and settings of the operator: blocks of 64, nothing but them.
PLAIN = None, 64, 0.125, None, None, 0.0, None, None, False, "hopper"
PAIRS, SINGLES = launch.ForwardConfiguration(2, 3, 4, 2), launch.ForwardConfiguration(2, 4, 4, 1, row_stages=2)


@pytest.fixture(autouse=True)
def chip(monkeypatch, poisoned):
    """A chip of three multiprocessors, so that each has several tiles to work on."""
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(launch, name, gluon_emulator.Emulated(kernel))
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    properties = types.SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    yield
    schedule.query_schedule.cache_clear()
    schedule.key_schedule.cache_clear()
    parts._backward_parts.cache_clear()


@pytest.fixture
def little_workspace(monkeypatch):
    """Less memory than one head's statistics take, so that backward goes by ranges of rows."""
    monkeypatch.setattr(statistics, "WORKSPACE", 0.2)
    monkeypatch.setattr(parts, "LEAST_BOUND", 0)


@pytest.mark.parametrize(
    ("case", "dtype", "choice", "with_lse"),
    [
        (Case(64, 256, dim=64), torch.bfloat16, None, False),
        (Case(64, 700, dim=64, heads=3, key_heads=1), torch.float16, None, True),
        (Case(64, 300, keys=1003, dim=128, heads=2, key_heads=2), torch.bfloat16, PAIRS, False),
        (Case(64, 420, dim=128, batch=2), torch.bfloat16, SINGLES, True),
        (Case(51, 300, keys=420, dim=64, batch=2, heads=4, key_heads=2), torch.bfloat16, PAIRS, False),
        (Case(33, 257, dim=128, heads=2), torch.float16, PAIRS, True),
        (Case(16, 600, dim=64, heads=2), torch.bfloat16, None, False),
    ],
    ids=lambda x: str(x) if isinstance(x, Case) else "",
)
def test_agrees_with_the_definition(case, dtype, choice, with_lse):
    q, k, v = (x.detach() for x in case.tensors(dtype, "cpu"))
    dout, dlse = torch.randn_like(q), torch.randn(q.shape[:3]) if with_lse else None
    scale = case.dim**-0.5
    out, lse = launch.forward(q, k, v, case.block_size, scale, choice=choice)
    given = dout, dlse, q, k, v, out, lse, case.block_size, scale
    # Three consumers have no room for wider heads.
    choices = [None, launch.BackwardConfiguration(3, 2, 2)]
    choices += [launch.BackwardConfiguration(4, 3, 2, 3)] * (case.dim == 64)
    every = [launch.backward(*given, choice=choice) for choice in choices]
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    wanted = eager(*exact, block_size=case.block_size, return_lse=True)
    used = 1 + with_lse
    wanted += torch.autograd.grad(wanted[:used], exact, [dout.float(), dlse][:used])
    for grads in every:
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), wanted, strict=True):
            assert (a.float() - b).norm() <= ROUNDED[dtype] * b.norm(), name
            assert a.dtype == (torch.float32 if name == "lse" else dtype)


def test_backward_in_ranges_of_rows(request):
    """Part by part it adds up to what it is at once, but for rounding in between."""
    q, k, v = (x.detach() for x in Case(64, 500, dim=64, heads=2).tensors(torch.float16, "cpu"))
    out, lse = launch.forward(q, k, v, 64, 0.125)
    dout = torch.randn_like(q)
    whole = launch.backward(dout, None, q, k, v, out, lse, 64, 0.125)
    request.getfixturevalue("little_workspace")
    assert parts.backward_parts(q, k, 64)[0][0].first_row > 0
    for a, b in zip(whole, launch.backward(dout, None, q, k, v, out, lse, 64, 0.125), strict=True):
        assert (a.float() - b.float()).norm() <= 1e-3 * a.float().norm()


class Noted:
    """Instead of a kernel: notes where its operands begin, whether it is launched anew or again."""

    def __init__(self, kernel, notes):
        self.arg_names, self.notes = kernel.arg_names, notes

    def __getitem__(self, grid):
        def first(*arguments, **options):
            self.note("anew", arguments)
            return {grid: lambda *arguments: self.note("again", arguments)}

        return first

    def note(self, when, arguments):
        def address(x):
            x = getattr(x, "base", x)
            return x.data_ptr() if hasattr(x, "data_ptr") else x

        self.notes.append((when, [address(x) for x in arguments]))


def test_a_call_of_a_known_kind_launches_on_its_own_tensors(monkeypatch, little_workspace):
    """Also in parts, whose operands begin inside the call's tensors."""
    notes = []
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(launch, name, Noted(kernel, notes))
    launch.FORWARD_CALLS.clear()
    launch.BACKWARD_CALLS.clear()
    seen = []
    for _ in range(3):
        q, k, v = (x.detach() for x in Case(64, 500, keys=700, dim=64, heads=2, batch=2).tensors(torch.float16, "cpu"))
        out, lse = launch.forward(q, k, v, 64, 0.125)
        dout = torch.randn_like(q)
        tensors = q, k, v, out, lse, dout, *launch.backward(dout, None, q, k, v, out, lse, 64, 0.125)
        begins = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors]

        def places(address, begins=begins):
            return [(i, address - a) for i, (a, b) in enumerate(begins) if a <= address < b]

        seen.append([sum((places(x) for x in addresses if isinstance(x, int)), []) for _, addresses in notes])
        assert {when for when, _ in notes} == {"again" if len(seen) > 1 else "anew"}
        notes.clear()
    assert len(seen[0]) > 5 and seen[0] == seen[1] == seen[2]
    # Every tensor is somebody's operand, and in parts some begin behind a tensor's beginning.
    assert {i for launched in seen[0] for i, _ in launched} == set(range(9))
    assert any(start > 0 for launched in seen[0] for _, start in launched)
    launch.FORWARD_CALLS.clear()
    launch.BACKWARD_CALLS.clear()


@pytest.mark.parametrize("unfit", ["strides", "address"])
def test_copied_inputs_are_what_a_call_and_its_repetition_launch_on(monkeypatch, unfit):
    notes = []
    for name, kernel in KERNELS.items():
        monkeypatch.setattr(launch, name, Noted(kernel, notes))
    launch.FORWARD_CALLS.clear()
    launch.BACKWARD_CALLS.clear()
    q, k, v = (x.detach() for x in Case(64, 300, dim=64, heads=2).tensors(torch.float16, "cpu"))
    # As another call of the same kind, whose tensors are fit, leaves it.
    for _ in range(3):
        launch.forward(q, k, v, 64, 0.125)
    assert [when for when, _ in notes] == ["anew", "again", "again"]
    assert all(operands[:3] == [x.data_ptr() for x in (q, k, v)] for _, operands in notes)
    notes.clear()
    other = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    if unfit == "address":
        other = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].as_strided(k.shape, k.stride())
    for _ in range(2):
        out, lse = launch.forward(q, other, v, 64, 0.125)
        launch.backward(torch.randn_like(q), None, q, other, v, out, lse, 64, 0.125)
    assert [when for when, _ in notes] == ["anew"] * 3 + ["again"] * 3
    # A copy lies elsewhere, where the copy engine can begin.
    launched = [operands[place] for (_, operands), place in zip(notes, [1, 2, 2] * 2, strict=True)]
    assert other.data_ptr() not in launched and all(address % 16 == 0 for address in launched)
    launch.FORWARD_CALLS.clear()
    launch.BACKWARD_CALLS.clear()


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


def test_backward_in_groups_of_heads(monkeypatch):
    """Heads are worked on for themselves: in other parts the gradients have the same bits."""
    q, k, v = (x.detach() for x in Case(64, 200, dim=64, heads=6, key_heads=3).tensors(torch.bfloat16, "cpu"))
    out, lse = launch.forward(q, k, v, 64, 0.125)
    dout = torch.randn_like(q)
    whole = launch.backward(dout, None, q, k, v, out, lse, 64, 0.125)
    monkeypatch.setattr(parts, "balanced", lambda *given: 2)
    parts._backward_parts.cache_clear()
    launch.BACKWARD_CALLS.clear()
    assert [part.key_heads for part in parts.backward_parts(q, k, 64)[0]] == [2, 1]
    for a, b in zip(whole, launch.backward(dout, None, q, k, v, out, lse, 64, 0.125), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "tokens", "dim"),
    [(4, 9, 3, 8192, 64), (1, 9, 3, 8192, 64), (2, 15, 5, 8192, 64), (1, 32, 8, 8192, 64), (1, 32, 32, 8192, 128)],
    ids=["SmolLM2-135M", "SmolLM2-135M, one window", "SmolLM2-360M", "Llama-3.2-1B", "a key head each"],
)
def test_the_parts_of_backward_leave_few_multiprocessors_idle(batch, heads, key_heads, tokens, dim, monkeypatch):
    chip = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: chip)
    q, k = (torch.empty(batch, n, tokens, dim, dtype=torch.bfloat16, device="meta") for n in (heads, key_heads))
    found, workspace = parts.backward_parts(q, k, 64)
    assert 4 * workspace <= max(statistics.WORKSPACE * q.numel() * q.element_size(), parts.LEAST_BOUND)
    assert sum(part.key_heads for part in found) == batch * key_heads
    group = heads // key_heads
    given = tokens, 0, launch.KEY_CONSUMERS, 64
    costs = schedule.key_tile_costs(*given, group)
    busy = sum(schedule.longest_key_walk(*given, part.key_heads, group, dim, 132) for part in found)
    # Nothing is shorter than its heaviest tile, nor than an even share. A head's last tiles leave some of them idle.
    assert busy <= 1.35 * max(max(costs), batch * key_heads * sum(costs) / 132)


@pytest.mark.parametrize("heads", [1, 7, 300])
@pytest.mark.parametrize("tiles", [1, 5, 40])
def test_a_schedule_has_every_tile_once(heads, tiles):
    lists = schedule.deal([2.5 + tile for tile in range(tiles)], heads, 8, 132)
    assert sorted(sum(lists, [])) == [(head, tile) for head in range(heads) for tile in range(tiles)]
    loads = [sum(2.5 + tile for _, tile in work) for work in lists]
    assert max(loads) - min(loads) <= tiles + 2.5


def test_short_sequences_have_more_heads_in_flight(monkeypatch):
    """At the paper's size the longest list is within 4% of an even share; heads in flight are whole groups."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(multi_processor_count=132)
    )
    costs = schedule.query_tile_costs(512, 0, 128, 64)
    table = schedule.query_schedule(512, 0, 128, 64, 128, 1, 128, torch.device("cpu"))
    loads = sum(torch.where(tile >= 0, torch.tensor(costs)[tile], 0.0) for tile in table[:, :, 1])
    assert (table[:, :, 1] >= 0).sum() == 128 * 4
    assert loads.max() <= 1.04 * sum(costs) * 128 / 132
    assert list(schedule.heads_in_flight(128, 8, 1 << 18)) == [8, 16, 32, 64]
    assert list(schedule.heads_in_flight(40, 12, 1)) == [12, 24, 40]
    assert list(schedule.heads_in_flight(32, 8, 1 << 23)) == [8]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((torch.float32, 128, 64), "float32"),
        ((torch.bfloat16, 96, 64), "head dim 96"),
        ((torch.bfloat16, 128, 65), "block_size is 65"),
    ],
    ids=str,
)
def test_what_they_cannot_serve_is_named(given, reason, monkeypatch):
    why_not = backends.BACKENDS["hopper"].why_not
    assert "compute capability 9.0" in why_not(Problem("cpu", *given))
    monkeypatch.setattr(support, "is_hopper", lambda device: True)
    assert reason in why_not(Problem("cuda", *given))


def test_this_triton_has_what_they_call():
    assert support.why_not_gluon() is None


def test_without_triton_they_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert support.why_not_gluon.__wrapped__() == "triton is not installed"


def test_another_gluon_is_explained(monkeypatch):
    explain = support.why_not_gluon.__wrapped__
    monkeypatch.setattr(launch.gl, "warp_specialize", lambda functions, warps: None)
    assert "has no functions_and_args" in explain()
    monkeypatch.delattr(launch.gl, "warp_specialize")
    assert "warp_specialize" in explain()


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize(
    "error", [AttributeError("gl has no such thing"), RuntimeError("PassManager::run failed\nmore")], ids=repr
)
def test_what_does_not_compile_runs_the_triton_kernels_and_says_so_once(name, error, monkeypatch, capsys):
    def broken(*arguments):
        raise error

    monkeypatch.setattr(backends.hopper.KERNELS, "given_up", None)
    monkeypatch.setattr(support, "is_hopper", lambda device: True)
    monkeypatch.setattr(launch, name, broken)
    leaves = Case(64, 300, dim=64).tensors(torch.bfloat16, "cpu")
    exact = [x.detach().float().requires_grad_() for x in leaves]
    for _ in range(2):
        out, _ = attention(*leaves, *PLAIN)
        expected = eager(*exact, block_size=64)
        found = out, *torch.autograd.grad(out.float().square().sum(), leaves)
        wanted = expected, *torch.autograd.grad(expected.square().sum(), exact)
        for a, b in zip(found, wanted, strict=True):
            assert (a.float() - b).norm() <= 1e-2 * b.norm()
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and str(error).splitlines()[0] in said
    assert "does not compile" in backends.BACKENDS["hopper"].why_not(Problem("cuda", torch.bfloat16, 64, 64))


def test_other_errors_are_not_taken_for_that(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(backends.hopper.KERNELS, "given_up", None)
    monkeypatch.setattr(launch, "forward", broken)
    with pytest.raises(RuntimeError, match="illegal memory"):
        attention(*Case(64, 300, dim=64).tensors(torch.bfloat16, "cpu"), *PLAIN)
    assert backends.hopper.KERNELS.given_up is None


@pytest.mark.parametrize("error", [AttributeError, TypeError, NotImplementedError, ImportError, KeyError, RuntimeError])
@pytest.mark.parametrize("place", ["forward", "forward_configuration", "query_schedule", "aligned"])
def test_faults_of_our_own_code_are_raised(place, error, monkeypatch):
    """None of them may have the Triton kernels run instead for the rest of the process, without a word of why."""
    monkeypatch.setattr(backends.hopper.KERNELS, "given_up", None)
    # As if the fault were in a line of that function's.
    code = compile(
        "def broken(*arguments, **named):\n    raise error('a fault of ours, in PassManager')", launch.__file__, "exec"
    )
    names = {"__name__": launch.__name__, "error": error}
    exec(code, names)
    monkeypatch.setattr(launch, place, names["broken"])
    with pytest.raises(error, match="a fault of ours"):
        attention(*Case(64, 300, dim=64).tensors(torch.bfloat16, "cpu"), *PLAIN)
    assert backends.hopper.KERNELS.given_up is None


def test_a_gpu_is_asked_for_itself(monkeypatch):
    """Beside a Hopper GPU there may be another."""
    capabilities = {"cuda:0": (9, 0), "cuda:1": (8, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    support.is_hopper.cache_clear()
    monkeypatch.delenv("LANDMARK_ATTENTION", raising=False)
    monkeypatch.setattr(functional, "_definition", lambda *given, **named: None)
    chosen, choose = {}, functional.choose

    def remember(problem, requested):
        chosen[problem.device] = choose(problem, requested)
        return "eager"

    monkeypatch.setattr(functional, "choose", remember)
    with FakeTensorMode():
        for device in capabilities:
            q = torch.empty(1, 2, 512, 128, dtype=torch.bfloat16, device=device)
            functional.landmark_attention(q, q, q, block_size=64)
    support.is_hopper.cache_clear()
    assert chosen == {"cuda:0": "hopper", "cuda:1": "triton"}


@pytest.fixture
def able(monkeypatch):
    """As if the CPU were the chip."""
    monkeypatch.setattr(support, "is_hopper", lambda device: True)
    monkeypatch.delenv("LANDMARK_ATTENTION", raising=False)
    backends._announce.cache_clear()


def test_they_run_where_they_are_asked_for(able, monkeypatch, capsys):
    leaves = Case(64, 300, dim=64, heads=2, key_heads=1).tensors(torch.bfloat16, "cpu")
    exact = [x.detach().float().requires_grad_() for x in leaves]
    dout = torch.randn_like(leaves[0])
    monkeypatch.setenv("LANDMARK_ATTENTION", "hopper")
    out = functional.landmark_attention(*leaves, block_size=64)
    assert "landmark attention: hopper (as asked for)" in capsys.readouterr().err
    expected = eager(*exact, block_size=64)
    found, wanted = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, exact, dout.float())
    for a, b in zip((out, *found), (expected, *wanted), strict=True):
        assert (a.float() - b).norm() <= ROUNDED[torch.bfloat16] * b.norm()


@pytest.mark.parametrize(
    ("queries", "arguments", "reason"),
    [
        (255, {"block_size": 64}, "fewer than 256"),
        (300, {"block_size": 64, "start": torch.tensor([3])}, "padding"),
        (300, {"block_size": 64, "dropout_p": 0.1, "dropout_seed": 1}, "dropout"),
        (300, {"block_size": 70}, "block_size is 70"),
        (300, {"landmark_mask": torch.arange(300)[None] % 9 == 8}, "landmark_mask"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_asked_for_what_they_cannot_do_they_say_so(able, queries, arguments, reason):
    q, k, v = Case(64, queries, dim=64).tensors(torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=f'the backend "hopper" was asked for, but .*{reason}'):
        functional.landmark_attention(q, k, v, **arguments, backend="hopper")


@pytest.mark.parametrize(
    ("dtype", "few_queries", "told"),
    [
        (torch.bfloat16, False, "hopper (on cuda)"),
        (torch.float32, False, "triton (on cuda; q is torch.float32"),
        (torch.bfloat16, True, "triton (on cuda; q has fewer than 256 tokens)"),
    ],
    ids=str,
)
def test_they_run_where_they_can(able, dtype, few_queries, told, capsys):
    name = backends.choose(Problem("cuda:0", dtype, 128, 64, few_queries=few_queries))
    assert told.startswith(name) and f"landmark attention: {told}" in capsys.readouterr().err


def test_asked_for_to_read_the_triton_kernels_do(able, monkeypatch, capsys):
    problem = Problem("cuda:0", torch.bfloat16, 128, 64, reading=True)
    assert backends.choose(problem) == "triton"
    assert "triton (on cuda; retrieval has no Hopper kernels of its own)" in capsys.readouterr().err
    monkeypatch.setenv("LANDMARK_ATTENTION", "hopper")
    assert backends.choose(problem) == "triton"


@pytest.mark.parametrize("view", ["of one projection", "head dim in steps", "expanded keys", "off by 2 bytes"])
def test_what_the_copy_engine_cannot_take_is_copied(view):
    x = torch.randn(2, 300, 3, 2, 64).to(torch.bfloat16).select(2, 1).transpose(1, 2)
    if view == "head dim in steps":
        x = torch.randn(2, 2, 64, 300).to(torch.bfloat16).transpose(-1, -2)
    if view == "expanded keys":
        x = x[:, :1].expand(-1, 2, -1, -1)
    if view == "off by 2 bytes":
        x = torch.randn(2 * 2 * 300 * 64 + 1).to(torch.bfloat16)[1:].view(2, 2, 300, 64)
    (found,), copied = launch.aligned(x)
    assert torch.equal(found, x) and (found is x) == (view == "of one projection") == (not copied)
    assert all(x > 0 and x % 8 == 0 for x in found.stride()[:3]) and found.stride(3) == 1
    assert found.data_ptr() % 16 == 0
