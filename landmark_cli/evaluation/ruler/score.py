"""How answers are judged, and how sure a mean of so many is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def found_in(answer: str, references: Sequence[str]) -> list[bool]:
    """Which of the references stand in the answer, whether in capitals or not."""
    said = answer.lower()
    return [reference.lower() in said for reference in references]


def score(found: Sequence[bool], any_of: bool = False) -> float:
    """The share of references found; 1 or 0 where any one of them is enough."""
    return float(any(found)) if any_of else sum(found) / len(found)


def bootstrap_interval(*groups: Sequence[float]) -> tuple[float, float]:
    """The interval that holds 95 % of the means of samples drawn again from these scores, with replacement; of several
    groups, such as tasks, each is drawn again by itself, and the mean is that of their means. It has no width where all
    scores of every group are equal. The same scores give the same interval.

    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    """
    generator, means = np.random.default_rng(0), np.zeros(RESAMPLES)
    for group in groups:
        scores = np.asarray(group, dtype=float)
        drawn = generator.integers(len(scores), size=(RESAMPLES, len(scores)))
        means += scores[drawn].mean(axis=1) / len(groups)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
