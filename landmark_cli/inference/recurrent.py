"""Read inputs of any length through a Transformer-XL: segment by segment, with the memory of what came before.

Source: arXiv 1901.02860, section 3.2; the baseline of arXiv 2305.16300, table 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from landmark_cli.attention.recurrent import RecurrentMemory
from landmark_cli.inference.readers import BaseReader, ReadChunk


class RecurrentReader(BaseReader):
    """Reads a batch of rows of one length and remembers the last keys and values of every layer.

    A chunk is one segment of the model. batch: rows.
    """

    equal_lengths = True

    def __init__(self, model: PreTrainedModel, *, batch: int = 1):
        self.model, self.batch = model, batch
        self.chunk = model.config.segment_length
        self.reset()

    def reset(self) -> None:
        """Forget everything read."""
        self.memory = RecurrentMemory(self.model.config.memory_length)

    def take(self, rows: Sequence[int]) -> None:
        """As BaseReader.take."""
        layers = self.memory.layers
        self.memory.layers = {index: tuple(x[list(rows)] for x in kept) for index, kept in layers.items()}
        self.batch = len(rows)

    @torch.no_grad()
    def read(
        self, rows: Sequence[Tensor | Sequence[int]], *, last_only: bool = False, transient: bool = False
    ) -> Iterator[ReadChunk]:
        """As BaseReader.read, segment by segment.

        Raises ValueError where rows differ in length: the recurrence knows no padding.
        """
        rows = self._rows(rows)
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"rows: expected {self.batch} of one length, found lengths {[len(row) for row in rows]}")
        ids = torch.stack(rows).to(self.model.device)
        for begin in range(0, ids.shape[1], self.chunk):
            segment = ids[:, begin : begin + self.chunk]
            kept = 1 if last_only else 0
            logits = self.model(segment, recurrent_memory=self.memory, logits_to_keep=kept).logits
            yield ReadChunk(logits, [segment.shape[1]] * self.batch, [begin] * self.batch)

    def step(self, tokens: Sequence[int | None]) -> Tensor:
        """As BaseReader.step; a row of None has ended: its logits mean nothing from then on."""
        (chunk,) = self.read([[token or 0] for token in tokens], last_only=True)
        return chunk.logits[:, -1]
