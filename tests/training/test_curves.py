"""Training runs follow the loss curves that are kept in curves/ to rounding, whatever else in the code has changed.

Another processor adds in another order: with AVX2 in place of AVX512, losses of the first 37 steps of "landmark"
differ by at most 1.2e-7 of themselves, gradient norms by 3.9e-7.
"""

import pytest

from tests.training.curves import runs

# Shares of the kept value. Gradient norms feel rounding more than losses do.
TOLERANCES = {"loss": 1e-4, "gradient_norm": 2e-3, "validation_loss": 1e-4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("curves")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        runs.make_place()
    return place


@pytest.fixture(autouse=True)
def in_the_place(place, monkeypatch):
    monkeypatch.chdir(place)


def departures(found: runs.Curve, kept: runs.Curve) -> list[str]:
    """Where a curve leaves the kept one by more than rounding."""
    assert {key: len(values) for key, values in found.items()} == {key: len(values) for key, values in kept.items()}
    return [
        f"{key} {number}: {value}, not {expected}"
        for key, tolerance in TOLERANCES.items()
        for number, (value, expected) in enumerate(zip(found[key], kept[key], strict=True), 1)
        if abs(value - expected) > tolerance * abs(expected)
    ]


@pytest.mark.parametrize("name", runs.RUNS)
def test_training_follows_the_kept_curve(name, tmp_path):
    assert departures(runs.run(name, tmp_path / "run"), runs.kept(name)) == []


def test_rounding_alone_is_no_departure(tmp_path):
    """The same rows a step in micro-batches of one: sums in another order."""
    assert departures(runs.run("landmark", tmp_path / "run", batch_size=1, accumulation=2), runs.kept("landmark")) == []


@pytest.mark.parametrize(
    "change",
    [{"weight_decay": 0.05}, {"group_dropout": 0.01}],
    ids=["half the weight decay", "a block is lost now and then"],
)
def test_a_change_of_training_is_a_departure(change, tmp_path):
    assert departures(runs.run("landmark", tmp_path / "run", **change), runs.kept("landmark"))
