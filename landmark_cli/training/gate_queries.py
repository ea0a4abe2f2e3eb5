"""Of which queries the gate's loss asks (gate.py): some of every row, and where the blocks of its rows stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLED = 64
"""Queries of a row, at most."""
TEXT_SAMPLED, ANSWERS_SAMPLED = 64, 64
"""The same where landmarks only choose blocks: of the text, and of answers and their questions."""
QUESTION = 32
"""Tokens before an answer that are asked with it."""
# A prime: rows that differ have, as good as always, another remainder.
OFFSETS = 65_521
# What puts places in an order that looks drawn (Park and Miller's generator, one step of it).
MULTIPLIER, MODULUS = 48_271, 2**31 - 1


@dataclass(frozen=True)
class Sample:
    """The sampled queries of a batch, (B, S), and the blocks of its rows, M at most; all int64 where they are not bool.

    text: each query's place among the n text tokens that the teacher reads. stream: its place in the student's stream.
    real: whether it counts. own: the number of its block in the row. first: that of its document's first block. begin:
    where its own block begins in the stream. text_blocks: (B, n), the block of every text token. spans: (B, M, 2),
    which of the n text tokens are a block's: the first, and what is behind the last. landmarks: (B, M), where the
    landmark of each block stands in the stream, some place where it has none. block_size: tokens of a block.
    joint: whether landmarks only choose blocks. end: behind the blocks that it can choose from: its own block, or the
    first one of its chunk. numbers: (B, M), of each block in its chunk; None where windows are no chunks.
    """

    text: Tensor
    stream: Tensor
    real: Tensor
    own: Tensor
    first: Tensor
    begin: Tensor
    text_blocks: Tensor
    spans: Tensor
    landmarks: Tensor
    block_size: int
    joint: bool
    end: Tensor
    numbers: Tensor | None = None


def sample(
    input_ids: Tensor,
    landmark: Tensor,
    order: Tensor,
    known: Tensor,
    block_size: int,
    cu_seqlens: Tensor | None = None,
    answers: Tensor | None = None,
    joint: bool = False,
    chunk: int | None = None,
) -> Sample:
    """Sample queries behind the first block of every row, at most `SAMPLED` and evenly spaced from an offset that the
    row's own tokens draw: how rows are split into processes makes no difference. Where landmarks only choose,
    `TEXT_SAMPLED` of them, and `ANSWERS_SAMPLED` of the `answers` besides.

    input_ids: (B, T) stream. landmark: (B, T) bool, where its landmarks are. order: (B, n), where in the stream each
    text token that the teacher reads stands. known: (B, T) bool, queries that may count. cu_seqlens: as LossModel has
    it. answers: (B, T) bool, those that predict answers; None where nobody marks them. joint: whether landmarks only
    choose blocks. chunk: stream tokens of a chunk, where windows are read chunk by chunk.
    """
    batch, tokens = input_ids.shape
    device, width, freq = input_ids.device, order.shape[1], block_size - 1
    place = torch.arange(tokens, device=device)
    begins = torch.cat([place.new_ones(batch, 1, dtype=torch.bool), landmark[:, :-1]], 1)
    new_document = torch.zeros_like(begins)
    new_document[:, 0] = True
    most = tokens // block_size + 1
    if cu_seqlens is not None:
        marks = torch.zeros(input_ids.numel() + 1, dtype=torch.bool, device=device)
        marks.index_fill_(0, cu_seqlens.long(), True)
        new_document = new_document | marks[:-1].view(batch, tokens)
        most += len(cu_seqlens)
    begins = begins | new_document
    block = begins.cumsum(1) - 1
    first = torch.where(new_document, block, 0).cummax(1).values
    begin = torch.where(begins, place, 0).cummax(1).values

    def of_blocks(values: Tensor) -> Tensor:
        """(B, M) of values that landmarks have, (B, T)."""
        # What is no landmark writes behind the last block, which is left out.
        found = place.new_zeros(batch, most + 1)
        return found.scatter_(1, torch.where(landmark, block, most), values)[:, :most]

    # Blocks of a chunk; a window that is read whole is one, and its queries choose from what is before their own block.
    together = 1 if chunk is None else chunk // block_size
    number = (block - first) % together

    # A row has this much text at least.
    behind = max(min(width, tokens - tokens // block_size) - freq, 1)
    if joint:
        queries = min(TEXT_SAMPLED, behind)
    else:
        # At most one in each block, so that in the backward pass no two queries add to one key of it in an order of
        # their own.
        queries = min(SAMPLED, max(behind // freq, 1))
    offset = (input_ids.sum(1, keepdim=True) % OFFSETS).double() / OFFSETS
    text = freq + ((torch.arange(queries, device=device) + offset) * behind / queries).long()
    text = text.clamp(max=width - 1)
    asked = torch.ones_like(text, dtype=torch.bool)
    if joint and answers is not None:
        of_answers, some = _near_answers((answers & known).gather(1, order))
        text, asked = torch.cat([text, of_answers], 1), torch.cat([asked, some], 1)
    stream = order.gather(1, text)
    real = asked & (text < (~landmark).sum(1, keepdim=True)) & known.gather(1, stream)
    own, begins_at = block.gather(1, stream), first.gather(1, stream)
    end = own - number.gather(1, stream)
    text_blocks = block.gather(1, order)
    is_text = torch.arange(width, device=device) < (~landmark).sum(1, keepdim=True)
    ends = place.new_zeros(batch, most).scatter_add_(1, text_blocks, is_text.long()).cumsum(1)
    spans = torch.stack([nn.functional.pad(ends[:, :-1], (1, 0)), ends], -1)
    if joint:
        # A query of the first block, or chunk, has nothing to choose.
        real = real & (end > begins_at)
    return Sample(
        text,
        stream,
        real,
        own,
        begins_at,
        begin.gather(1, stream),
        text_blocks,
        spans,
        of_blocks(place.expand(batch, tokens)),
        block_size,
        joint,
        end,
        None if chunk is None else of_blocks(number),
    )


def _near_answers(answers: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that predict answers, and the QUESTION tokens before them, at most `ANSWERS_SAMPLED` of a row, as if
    drawn: their places, (B, S) int64, and whether there is such a token (else the place is 0). answers: (B, n) bool."""
    width = answers.shape[1]
    ahead = nn.functional.pad(answers.float(), (0, QUESTION))
    near = nn.functional.max_pool1d(ahead[:, None], QUESTION + 1, stride=1)[:, 0] > 0
    # No two places have the same rank, for the modulus is a prime.
    rank = (torch.arange(width, device=answers.device) * MULTIPLIER % MODULUS + 1).double()
    best = torch.topk(rank * near, min(ANSWERS_SAMPLED, width), dim=1)
    some = best.values > 0
    return best.indices.masked_fill(~some, 0), some
