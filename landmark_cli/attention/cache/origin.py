"""What a row of a layer went on from last, and which of it the row's slots still hold: asked for again, a text that was
read once is brought to where it was without what still stands there."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .absent import Source


@dataclass
class Origin:
    """Blocks of a source that a row went on from.

    source: where they lie. first: the number of the first one. tail: a copy of the incomplete one, the last, (G, 2,
    block_size, D), which is written to by whatever is read next; tail_key: of its landmark's key, (G, D). written:
    numbers of blocks that were written to since, whose slots hold these. absent: (G, capacity) bool on the host, slots
    that nothing had been fetched to when the row was forgotten.
    """

    source: Source
    first: int
    tail: Tensor
    tail_key: Tensor
    written: list[range] = field(default_factory=list)
    absent: Tensor | None = None

    @property
    def last(self) -> int:
        return self.first + self.source.shape[1] - 1

    def write(self, begin: int, end: int) -> None:
        """Blocks begin .. end - 1 are written to."""
        if self.written and self.written[-1].start <= begin <= self.written[-1].stop:
            before = self.written.pop()
            begin, end = before.start, max(before.stop, end)
        self.written.append(range(begin, end))

    def lost(self, capacity: int) -> Tensor:
        """(m,) int64: the numbers of those complete blocks whose slots have been written to."""
        if all(self.last <= blocks.start and blocks.stop <= self.first + capacity for blocks in self.written):
            return torch.empty(0, dtype=torch.int64)
        found = torch.zeros(capacity, dtype=torch.bool)
        for blocks in self.written:
            found[torch.arange(max(blocks.start, blocks.stop - capacity), blocks.stop) % capacity] = True
        return self.first + found[torch.arange(self.first, self.last) % capacity].nonzero().squeeze(-1)
