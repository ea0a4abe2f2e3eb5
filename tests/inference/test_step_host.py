"""What the host does for a decoding step beside its graph's replay: the GPU waits for it before every token."""

import sys
from dataclasses import replace

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from landmark_cli.inference import graphs
from landmark_cli.inference.block_reader import BlockReader
from tests.tiny import tiny_model, tiny_text

# Of a step, at most: of torch, and of Python, of which comprehensions are calls up to Python 3.11. It is about 0.1 ms,
# where a small model's graph takes 0.6. What comes on top of these is worth a measurement on a GPU first.
OPERATIONS, CALLS, CALLS_OF_C = 8, 42, 28


class Still:
    """Stands in for a CUDA graph whose replay costs nothing."""

    def __init__(self, function, device, pool):
        self.output, self.pool = function().clone(), None

    def replay(self) -> None:
        pass


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def calls_of(work) -> dict[str, int]:
    """Calls of functions in Python and in C."""
    found = {"call": 0, "c_call": 0}

    def count(frame, event, argument):
        if event in found:
            found[event] += 1

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("layers", [1, 3])
def test_the_host_does_little_for_a_step_and_no_more_for_more_layers(layers, monkeypatch):
    monkeypatch.setenv("LANDMARK_ATTENTION", "eager")
    monkeypatch.setitem(graphs.BACKENDS, "eager", replace(graphs.BACKENDS["eager"], recorded=True))
    reader = BlockReader(tiny_model(n_layer=layers, landmark_freq=40), chunk=40)
    reader.forward.recording, reader.forward.record = True, Still
    list(reader.read([tiny_text(90)], last_only=True))
    for _ in range(4):
        reader.step([1])
    # The graph is recorded, and the block goes on.
    assert [kind[:3] for kind in reader.forward._recorded] == [(1, 1, True)]
    with Operations() as operations:
        reader.step([1])
    calls = calls_of(lambda: reader.step([1]))

    assert len(operations.found) <= OPERATIONS, operations.found
    assert calls["call"] <= CALLS and calls["c_call"] <= CALLS_OF_C, calls
