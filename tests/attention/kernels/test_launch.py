"""Launches are repeated with other addresses and the same arguments."""

import torch

from landmark_cli.attention.kernels.common.launch import Address, Kept, LaunchCache, Operand, addresses, launch


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

        calls.run(kind, tensors, make)

    x, y = torch.zeros(8), torch.zeros(9)
    call(("a",), x, None)
    call(("a",), y, None)
    assert made == [("a",)] and compiled.runs == [((1, 1, 1), (y.data_ptr(), None, 5, 1, 2))]
    # One that begins where tensors rarely do has launches of its own, which are not kept.
    for _ in range(2):
        call(("a",), y[1:], None)
        call(("b",), y[1:], None)
    assert made == [("a",), ("a",), ("b",), ("a",), ("b",)] and ("b",) not in calls
    calls.clear()
    call(("a",), x, None)
    assert len(made) == 6 and len(compiled.runs) == 1


def test_addresses():
    x = torch.zeros(64)
    assert addresses(x, None, x[4:]) == (x.data_ptr(), None, x.data_ptr() + 16)
    assert addresses(x, x[1:]) is None


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr("landmark_cli.attention.kernels.common.launch.KEPT", 3)
    kept = Kept()
    for key in range(8):
        assert kept.keep(key, str(key)) == str(key)
        assert len(kept) <= 3 and kept[key] == str(key)
