"""Which rows of a batch stop: transformers' stopping criteria, without work for the device where none is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria


class Stopping:
    """Stopping criteria that are asked after every token.

    What a token or the length of the text decides is decided on the host, by what is there already. The others are
    asked as transformers asks them.

    early: none of them can depend on what a caller does with the newest token, so they may be asked before it is given
    out.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        self._ends: set[int] = set()
        self._longest = math.inf
        self._others = StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self._ends.update(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is MaxLengthCriteria:
                self._longest = min(criterion.max_length, self._longest)
            else:
                self._others.append(criterion)
        self.early = all(type(criterion) in (StopStringCriteria, MaxTimeCriteria) for criterion in self._others)

    def asked(self, ids: Tensor, scores: Any = None) -> list[Tensor]:
        """What the criteria that are not decided on the host say of a text (B, T): (B,) bool, or nothing where there
        are none. Nothing waits for the device."""
        return [self._others(ids, scores)] if self._others else []

    def going(self, going: Sequence[bool], tokens: Sequence[int], length: int, asked: Sequence[Sequence]) -> list[bool]:
        """Which of the rows that were going go on, with their newest tokens, in texts of so many tokens. asked: what
        `asked` gave, on the host."""
        if length >= self._longest:
            return [False] * len(going)
        on = [was and token not in self._ends for was, token in zip(going, tokens, strict=True)]
        for stops in asked:
            on = [was and not stop for was, stop in zip(on, stops, strict=True)]
        return on
