"""benchmarks/compare.py: what is said of two series, and that a slower tree is found out."""

import json
import random
import shutil
from pathlib import Path

import pytest

from benchmarks import compare

ROOT = Path(compare.__file__).parents[1]


def series(ratio, noise, count, seed=0):
    chance = random.Random(seed)
    base = [chance.uniform(9, 11) for _ in range(count)]
    return base, [value * ratio * chance.uniform(1 - noise, 1 + noise) for value in base]


@pytest.mark.parametrize(
    ("ratio", "noise", "count", "verdict"),
    [
        (1.0, 0.01, 10, "same"),
        (1.1, 0.01, 10, "slower"),
        (0.9, 0.01, 10, "faster"),
        (1.05, 0.1, 10, "unsure"),
        (1.1, 0.01, 5, "unsure"),
        (1.1, 0.01, 6, "slower"),
        (1.02, 0.001, 10, "same"),
    ],
)
def test_a_verdict_takes_confidence(ratio, noise, count, verdict):
    """What base itself drifts by, here a tenth, is no difference."""
    found = compare.compared("a case", *series(ratio, noise, count), threshold=0.03)
    assert found.verdict == verdict and found.low <= found.ratio <= found.high
    assert found.ratio == pytest.approx(ratio, rel=noise)


@pytest.mark.parametrize("count", [3, 6, 10, 25])
def test_an_interval_holds_the_true_median_as_often_as_it_says(count):
    chance, held = random.Random(0), 0
    for _ in range(2000):
        low, high = compare.interval([chance.expovariate(1.0) for _ in range(count)])
        held += low <= 0.6931 <= high
    least = compare.CONFIDENCE if count >= 6 else compare.coverage(count, 0)
    assert least - 0.015 < held / 2000
    # One more value at each end would be too many to leave out.
    assert compare.interval(range(1, 11)) == (2, 9) and compare.interval(range(1, 7)) == (1, 6)


def test_measurements_alternate():
    asked = []

    class Clock:
        def __init__(self, name):
            self.name = name

        def time(self, case):
            asked.append(self.name)
            return 1.0

    found = compare.in_turns([Clock("A"), Clock("B")], ["case"], 4, float("inf"))
    assert "".join(asked) == "ABBAABBA" and found == {"case": [[1.0] * 4] * 2}
    assert compare.in_turns([Clock("A"), Clock("B")], ["case"], 4, 0.0) == {"case": [[1.0]] * 2}


@pytest.mark.slow
def test_a_tree_that_is_slower_is_found_out(tmp_path, capsys):
    slow = tmp_path / "slow"
    for name in ("landmark_cli", "benchmarks"):
        shutil.copytree(ROOT / name, slow / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    dispatch = slow / "landmark_cli" / "attention" / "reference.py"
    text = dispatch.read_text()
    call = text.index('"""', text.index("def landmark_attention(")) + 3
    end = text.index('"""', call) + 3
    dispatch.write_text(text[:end] + "\n    __import__('time').sleep(0.1)\n" + text[end:])
    options = ["--size", "small", "--rounds", "6", "--json", str(tmp_path / "out.json")]
    assert compare.main([str(ROOT), str(slow), "--parts", "attention", *options]) == 1
    data = json.loads((tmp_path / "out.json").read_text())
    assert [one["verdict"] for one in data["cases"]] == ["slower"] * 2 and data["failed"] == []
    assert "**slower**" in capsys.readouterr().out
    # A part that cannot be made in one of the trees is told.
    dispatch.write_text("raise ValueError('no such tree')\n")
    assert compare.main([str(ROOT), str(slow), "--parts", "attention", *options]) == 1
    assert "not timed: attention, head: ValueError: no such tree" in capsys.readouterr().out
