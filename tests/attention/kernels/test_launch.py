"""Launches are repeated with other addresses and the same arguments."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from landmark_cli.attention import operators
from landmark_cli.attention.kernels.common import rotary
from landmark_cli.attention.kernels.common.launch import Address, Kept, LaunchCache, Operand, addresses, launch
from landmark_cli.attention.kernels.hopper import launch as hopper
from landmark_cli.attention.kernels.hopper import schedule
from landmark_cli.attention.kernels.landmarks import launch as landmarks
from landmark_cli.attention.kernels.training import launch as training
from landmark_cli.training import fused_gate


class Compiled:
    def __init__(self):
        self.runs = []

    def __getitem__(self, grid):
        return lambda *arguments: self.runs.append((grid, arguments))


class Kernel:
    """Two tensors, a number, two constants."""

    arg_names = ("A", "B", "size", "ONE", "TWO")

    def __init__(self, compiled):
        self.compiled, self.options = compiled, None

    def __getitem__(self, grid):
        def run(a, b, size, *, ONE, TWO, **options):
            self.options = options
            return self.compiled

        return run


def test_a_launch_again():
    compiled = Compiled()
    kernel = Kernel(compiled)
    tensors = [torch.zeros(4), None, torch.zeros(4)]
    done = launch(kernel, 7, tensors, (2, 1), (5,), {"TWO": 2, "ONE": 1}, {"num_warps": 4})
    assert kernel.options == {"num_warps": 4} and not compiled.runs
    done.again((16, None, 32))
    assert compiled.runs == [((7, 1, 1), (32, None, 5, 1, 2))]


def test_pieces_descriptors_and_tensors_that_calls_share():
    compiled, shared = Compiled(), torch.zeros(3)
    x = torch.zeros(8)
    described = Operand(0, x, lambda base: ("descriptor", base.data_ptr()))
    done = launch(Kernel(compiled), 2, [x], (Operand(0, x[4:]), described), (shared,), {"ONE": 1, "TWO": 2}, {})
    for _ in range(2):
        done.again((64,))
    assert compiled.runs == [((2, 1, 1), (80, ("descriptor", 64), shared.data_ptr(), 1, 2))] * 2
    assert done.memory == (shared,) and Address(5).data_ptr() == 5


def test_the_interpreter_leaves_nothing_to_repeat():
    assert launch(Kernel(None), 1, [None, None], (0, 1), (5,), {"ONE": 1, "TWO": 2}, {}) is None


def test_a_call_of_a_known_kind_repeats_its_launches():
    calls, compiled, made = LaunchCache(), Compiled(), []

    def call(kind, *tensors):
        def make():
            made.append(kind)
            yield launch(Kernel(compiled), 1, tensors, (0, 1), (5,), {"ONE": 1, "TWO": 2}, {})

        if not calls.repeat(kind, tensors):
            calls.make(kind, tensors, make)

    x, y = torch.zeros(8), torch.zeros(9)
    call(("a",), x, None)
    call(("a",), y, None)
    assert made == [("a",)] and compiled.runs == [((1, 1, 1), (y.data_ptr(), None, 5, 1, 2))]
    # One that begins where tensors rarely do has launches of its own, which are not kept.
    for _ in range(2):
        call(("a",), y[1:], None)
        call(("b",), y[1:], None)
    assert made == [("a",), ("a",), ("b",), ("a",), ("b",)] and ("b",) not in calls.launches
    calls.clear()
    call(("a",), x, None)
    assert len(made) == 6 and len(compiled.runs) == 1


def test_addresses():
    x = torch.zeros(64)
    assert addresses([x, None, x[4:]]) == (x.data_ptr(), None, x.data_ptr() + 16)
    assert addresses([x, x[1:]]) is None


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr("landmark_cli.attention.kernels.common.launch.KEPT", 3)
    kept = Kept()
    for key in range(8):
        assert kept.keep(key, str(key)) == str(key)
        assert len(kept) <= 3 and kept[key] == str(key)


@pytest.mark.parametrize("programs", [(5, 3), (5, 3, 2)], ids=str)
def test_programs_along_several_axes(programs):
    compiled = Compiled()
    done = launch(Kernel(compiled), programs, [torch.zeros(1)], (0, 0), (5,), {"ONE": 1, "TWO": 2}, {})
    done.again((16,))
    assert compiled.runs == [((*programs, 1)[:3], (16, 16, 5, 1, 2))]


class Counted:
    """Instead of a kernel: counts its launches, those that Triton prepares ("anew") and those that it does not."""

    def __init__(self, kernel, counts):
        self.arg_names, self.counts, self.name = kernel.arg_names, counts, kernel.fn.__name__

    def __getitem__(self, grid):
        def anew(*arguments, **constants):
            self.counts[self.name, "anew"] += 1
            return {grid: again}

        def again(*arguments):
            assert len(arguments) == len(self.arg_names)
            self.counts[self.name, "again"] += 1

        return anew


@pytest.fixture
def counts(monkeypatch):
    """How often each kernel of a training step is launched; nothing runs."""
    found = Counter()
    for module, names in (
        (training, ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")),
        (hopper, ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")),
        (landmarks, ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")),
        (rotary, ("rotate_kernel", "join_kernel")),
        (fused_gate, ("block_logits_kernel",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=3))
    caches = [calls for of in (training, hopper, landmarks) for calls in (of.FORWARD_CALLS, of.BACKWARD_CALLS)]
    caches += [rotary.CALLS, fused_gate.CALLS]
    for cache in caches:
        cache.clear()
    yield found
    for cache in caches:
        cache.clear()
    schedule.query_schedule.cache_clear()
    schedule.key_schedule.cache_clear()


def rotate_all(q, k, v):
    """Rotations of a training step, forward and backward: of queries and keys, and of both together with values."""
    cos, sin = torch.randn(2, 1, 1, q.shape[2], q.shape[3] // 2)
    for x in (q, k):
        rotary.rotate(x, cos, sin).backward(torch.ones_like(x))
    rotary.join_rotated(q.detach(), k.detach(), v.detach(), cos, -sin)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_a_second_training_step_leaves_triton_nothing_to_prepare(backend, compiled, counts, monkeypatch):
    """Nor does anything look for grids, schedules, descriptors or configurations again, on tensors of its own."""

    def attend(qkv):
        q, k, v = (part.transpose(1, 2) for part in (qkv * 2).unbind(2))
        return operators.attend(q, k, v, block_size=51, backend=backend)

    run = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    kept, seen = [], []
    for _ in range(3):
        qkv = torch.randn(2, 300, 3, 4, 64, dtype=torch.float16, requires_grad=True)
        out = run(qkv)
        out.backward(torch.randn(2, 300, 4, 64, dtype=torch.float16).transpose(1, 2))
        q, k, v = (part.transpose(1, 2).detach().requires_grad_() for part in qkv.unbind(2))
        rotate_all(q, k, v)
        # Held, so that the next step's tensors lie elsewhere.
        kept.append((qkv, out, q, k, v))
        seen.append({way: Counter(n for n, w in counts.elements() if w == way) for way in ("anew", "again")})
        counts.clear()
        if len(seen) == 1:
            for module, names in (
                (training, ("launch_forward", "launch_backward", "choices")),
                (hopper, ("launch_forward", "launch_backward", "aligned", "_describer", "forward_configuration")),
                (rotary, ("_launch_anew",)),
            ):
                for name in names:
                    monkeypatch.setattr(module, name, None)
    once = {"forward_kernel": 1, "query_gradient_kernel": 1, "key_gradient_kernel": 1}
    assert {n: c for n, c in (seen[0]["anew"] + seen[0]["again"]).items() if n in once} == once
    for step in seen[1:]:
        assert step["anew"] == {} and step["again"] == once | {"rotate_kernel": 4, "join_kernel": 1}


def test_nor_do_landmarks_own_queries(counts):
    """Whatever launches depend on is looked at again where it changes."""
    kept = []

    def step(heads=4, text=15, scale=0.25, lined_up=True):
        given = *torch.randn(2, 2, 6, heads, 64), *torch.randn(2, 2, 6 * text, 2, 64)
        q, dout, k, v = (x.transpose(1, 2) if lined_up else x.transpose(1, 2).contiguous() for x in given)
        out, lse = landmarks.forward(q, k, v, text, scale)
        landmarks.backward(dout, q, k, v, out, lse, text, scale)
        kept.append((q, dout, k, v, out, lse))
        found = {way: sum(n for (_, w), n in counts.items() if w == way) for way in ("anew", "again")}
        counts.clear()
        return found

    assert [step() for _ in range(3)] == [{"anew": 3, "again": 0}] + 2 * [{"anew": 0, "again": 3}]
    for other in ({"heads": 2}, {"text": 31}, {"scale": 0.5}, {"lined_up": False}):
        assert step(**other)["anew"] == 3 and step(**other)["again"] == 3
    assert step()["again"] == 3


def test_nor_do_logits_of_a_teachers_blocks(counts):
    kept = []

    def step(heads=4, scale=0.25, reach=None, blocks=6):
        q, k = torch.randn(2, heads, 40, 64), torch.randn(2, 2, 40, 64)
        text, spans = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, blocks, 2, dtype=torch.int64)
        kept.append((q, k, text, spans, fused_gate.block_logits(q, k, text, spans, scale, reach)))
        (found,) = (way for _, way in counts.elements())
        counts.clear()
        return found

    assert [step() for _ in range(3)] == ["anew", "again", "again"]
    for other in ({"heads": 2}, {"scale": 0.5}, {"reach": 7}, {"reach": 8}, {"blocks": 5}):
        assert [step(**other), step(**other)] == ["anew", "again"]
    assert step() == "again"
