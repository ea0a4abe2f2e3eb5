"""Launches are repeated with other addresses and the same arguments."""

import torch

from landmark_cli.attention.kernels.common.configuration import Configuration
from landmark_cli.attention.kernels.common.repeat import Kept, addresses, launch


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
    done = launch(kernel, 7, tensors, (2, 1), (5,), {"TWO": 2, "ONE": 1}, Configuration(16, 16, 4, 3, 128))
    assert kernel.options == {"num_warps": 4, "num_stages": 3, "maxnreg": 128} and not compiled.runs
    done.again([16, None, 32])
    assert compiled.runs == [((7, 1, 1), (32, None, 5, 1, 2))]


def test_the_interpreter_leaves_nothing_to_repeat():
    assert launch(Kernel(None), 1, [None, None], (0, 1), (5,), {"ONE": 1, "TWO": 2}, Configuration(16, 16)) is None


def test_addresses():
    x = torch.zeros(64)
    assert addresses(x, None, x[4:]) == (x.data_ptr(), None, x.data_ptr() + 16)
    assert addresses(x, x[1:]) is None


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr("landmark_cli.attention.kernels.common.repeat.KEPT", 3)
    kept = Kept()
    for key in range(8):
        assert kept.keep(key, str(key)) == str(key)
        assert len(kept) <= 3 and kept[key] == str(key)
