"""Blocks that rows of a layer go on from and that still lie elsewhere, as those of a memory's file do: each is fetched
when it is first chosen, by the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

# Bytes that are fetched at a time, which is what a fetch takes besides the place that they are fetched to.
PIECE = 64 << 20


class Source(Protocol):
    """Blocks of one layer of one row, (G, n, 2, block_size, D), the incomplete one last, kept elsewhere."""

    shape: torch.Size
    nbytes: int

    def read(self, heads: Tensor, blocks: Tensor, device: torch.device) -> Tensor:
        """The blocks (m,) of heads (m,), both int64 on the host: (m, 2, block_size, D) on a device. Raises
        LandmarkError."""

    def whole(self) -> Tensor:
        """All of them."""


class Absent:
    """Which slots of a layer's ring stand for blocks that have not been fetched yet.

    mask: (B, G, capacity) bool on the host. sources: by row the number of the first block, and where the blocks lie;
    rows that have all of theirs have none.
    """

    def __init__(self, batch: int, heads: int, capacity: int) -> None:
        self.mask = torch.zeros(batch, heads, capacity, dtype=torch.bool)
        self.sources: dict[int, tuple[int, Source]] = {}

    def __bool__(self) -> bool:
        return bool(self.sources)

    def copy(self) -> Absent:
        other = Absent(0, 0, 0)
        other.mask, other.sources = self.mask.clone(), dict(self.sources)
        return other

    def add(self, row: int, first: int, source: Source, mask: Tensor) -> None:
        """Blocks first, first + 1, .. of a row lie in a source, those that belong into the slots (G, capacity) of the
        mask there alone."""
        self.mask[row] = mask
        if mask.any():
            self.sources[row] = first, source

    def forget(self, row: int) -> None:
        if self.sources.pop(row, None) is not None:
            self.mask[row] = False

    def overwrite(self, complete: Sequence[int], added: Sequence[int]) -> None:
        """The slots that each row's `added` blocks behind its `complete` ones take now stand for these."""
        for row in self.sources:
            slots = torch.arange(complete[row], complete[row] + added[row]) % self.mask.shape[2]
            self.mask[row, :, slots] = False

    def take(self, rows: Sequence[int]) -> None:
        """Row r has the sources that row rows[r] had; masks are the caller's."""
        self.sources = {to: self.sources[row] for to, row in enumerate(rows) if row in self.sources}

    def fetch(self, needed: Tensor, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Fetch what is needed, (B, G, capacity) bool on the host, and absent: rows, heads (m,), slots (m,) and, on the
        device, blocks (m, 2, block_size, D), piece by piece; each is no longer absent once the next is asked for."""
        for row, (first, source) in list(self.sources.items()):
            heads, slots = (needed[row] & self.mask[row]).nonzero(as_tuple=True)
            count = max(1, PIECE * source.shape[:2].numel() // max(1, source.nbytes))
            for head, slot in zip(heads.split(count), slots.split(count), strict=True):
                if len(head):
                    yield row, head, slot, source.read(head, (slot - first) % self.mask.shape[2], device)
                    self.mask[row, head, slot] = False
            if not self.mask[row].any():
                del self.sources[row]
