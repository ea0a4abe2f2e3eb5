"""The texts of several rows as one chunk: landmarks put in, padding in front, and where each row's text stands."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from landmark_cli.data.landmarks import insert_landmarks
from landmark_cli.models.device import to_device


class PaddedChunk(NamedTuple):
    """A chunk's stream tokens of the rows that the model is called with, (n, W), padded on the left, and how many each
    of all rows has. kept, index: see `_text_positions`."""

    ids: Tensor
    lengths: list[int]
    kept: Tensor
    index: Tensor | None
    rows: list[int]

    @classmethod
    def of(
        cls,
        texts: list[Tensor],
        tails: list[int],
        rows: list[int],
        landmark_freq: int,
        landmark_token_id: int,
        *,
        last_only: bool,
    ) -> PaddedChunk:
        """The rows' texts, going on with tail blocks of which `tails` text tokens have been read.

        rows: those that the model is called with; the others have no text. last_only: keep each row's last text
        position alone.
        """
        streams = [_stream(text, r, landmark_freq, landmark_token_id) for text, r in zip(texts, tails, strict=True)]
        lengths = [len(stream) for stream in streams]
        ids = torch.full((len(rows), max(lengths)), landmark_token_id)
        for place, row in enumerate(rows):
            ids[place, ids.shape[1] - lengths[row] :] = streams[row]
        longest = max(map(len, texts))
        kept, index = _text_positions(ids == landmark_token_id, min(1, longest) if last_only else longest)
        return cls(ids, lengths, kept, index, rows)

    def of_rows(self, logits: Tensor) -> Tensor:
        """Of logits (n, positions kept, vocabulary) those at each row's own positions, (B, W', vocabulary), zeros for
        rows that the model was not called with."""
        if self.index is not None:
            index = to_device(self.index, logits.device)[..., None].expand(-1, -1, logits.shape[-1])
            logits = logits.gather(1, index)
        if len(self.rows) == len(self.lengths):
            return logits
        found = logits.new_zeros(len(self.lengths), *logits.shape[1:])
        return found.index_copy_(0, to_device(torch.tensor(self.rows), logits.device), logits)


def _stream(text: Tensor, tail: int, landmark_freq: int, landmark_token_id: int) -> Tensor:
    """Text of a row with its landmarks put in, going on with a tail block of which `tail` text tokens have been
    read."""
    head = landmark_freq - tail
    if len(text) < head:
        return text
    rest = insert_landmarks(text[head:], landmark_freq, landmark_token_id)
    return torch.cat([text[:head], torch.tensor([landmark_token_id]), rest])


def _text_positions(landmark: Tensor, wanted: int) -> tuple[Tensor, Tensor | None]:
    """The last `wanted` text positions of each row, given where landmarks (and padding) stand, (B, T).

    Returns the positions that any row needs, (n,), and where among these each row's own are, (B, wanted), or None
    where all rows need the same positions.
    """
    text = ~landmark
    rank = text.long().flip(-1).cumsum(-1).flip(-1)
    needed = text & (rank <= wanted)
    kept = needed.any(0).nonzero().squeeze(-1)
    if needed[:, kept].all():
        return kept, None
    # A row's padding stands in front, so counting from the end keeps its text at the right.
    order = torch.argsort(needed[:, kept].long(), dim=-1, stable=True)
    return kept, order[:, order.shape[-1] - wanted :]
