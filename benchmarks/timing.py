"""How contenders are timed side by side: in turn, round after round, so that a ratio compares neighbours in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

GPU = torch.cuda.is_available()
Name = TypeVar("Name", bound=Hashable)


def in_turn(contenders: Mapping[Name, Callable[[], float]], rounds: int, warm: int = 2) -> dict[Name, list[float]]:
    """What each contender says it took, round after round; `warm` rounds come first, which do not count."""
    found: dict[Name, list[float]] = {name: [] for name in contenders}
    for number in range(-warm, rounds):
        for name, run in contenders.items():
            taken = run()
            if number >= 0:
                found[name].append(taken)
    return found


def medians(contenders: Mapping[Name, Callable[[], float]], rounds: int, warm: int = 2) -> dict[Name, float]:
    """The median of what `in_turn` gives of each."""
    return {name: statistics.median(taken) for name, taken in in_turn(contenders, rounds, warm).items()}


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def clocked(work: Callable[[], object]) -> float:
    """Seconds of one call by the clock, all told."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started
