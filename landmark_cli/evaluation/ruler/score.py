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


def bootstrap_interval(scores: Sequence[float]) -> tuple[float, float]:
    """The interval that holds 95 % of the means of samples drawn again from these scores, with replacement. It has no
    width where all scores are equal. The same scores give the same interval.

    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    """
    scores = np.asarray(scores, dtype=float)
    drawn = np.random.default_rng(0).integers(len(scores), size=(RESAMPLES, len(scores)))
    low, high = np.quantile(scores[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
