"""benchmarks/tune_window.py: the fastest configuration stands first, and the usual one is back in its place."""

import itertools
from pathlib import Path

import pytest

from tests.modules import load_script


@pytest.fixture
def script(monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root)
    import benchmarks.reading_windows as windows

    script = load_script(root / "benchmarks/tune_window.py")
    tiny = windows.Shape(2, 1, 16)
    for module, name, value in (
        (windows, "DEVICE", "cpu"), (windows, "CHUNK", 128), (script, "LARGE", tiny), (script, "TOKENS", 256),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    return script


def test_kernels_are_timed_one_configuration_after_another(script, monkeypatch):
    taken, tried = itertools.cycle([3.0, 1.0, 2.0]), []
    usual = script.kernels.window_choices

    def timed(work, rounds, stages):
        work()
        changed = script.kernels.window_choices
        tried.append(changed.args[2] if changed is not usual else None)
        return {stages[0]: next(taken)}

    monkeypatch.setattr(script, "stage_times", timed)
    lines = list(script.tune(["merge"], 1))
    assert tried == [None, *script.CANDIDATES["merge"]] and script.kernels.window_choices is usual
    assert [float(line.split()[1].rstrip(":")) for line in lines] == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert lines[3] == "merge 3.00: as it is"


def test_a_configuration_that_does_not_fit_loses_no_other(script, monkeypatch):
    def timed(work, rounds, stages):
        if getattr(script.kernels.window_choices, "args", (None,) * 3)[2] is script.CANDIDATES["merge"][0]:
            raise RuntimeError("shared memory")
        return {stages[0]: 1.0}

    monkeypatch.setattr(script, "stage_times", timed)
    first, *rest = script.tune(["merge"], 1)
    assert first.endswith(": RuntimeError") and len(rest) == len(script.CANDIDATES["merge"])
