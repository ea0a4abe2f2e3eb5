"""Of which queries the gate's loss asks (gate.py): some of every row, and where the blocks of its rows stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLED = 64
"""Queries of a row, at most."""
TEXT_SAMPLED, REPEATED_SAMPLED, ANSWERS_SAMPLED = 128, 128, 256
"""The same where landmarks only choose blocks: of the text, of what it repeats, and of answers and their questions."""
QUESTION = 32
"""Tokens before an answer that are asked with it."""
# There is room for the blocks of so many documents, or of twice, three times ... as many: what is compiled for a
# number of blocks serves micro-batches of any fewer.
DOCUMENTS = 32
# A prime: rows that differ have, as good as always, another remainder.
OFFSETS = 65_521
# What puts places in an order that looks drawn, neighbours far apart: an odd number near 2 ** 32 divided by the golden
# ratio, so that no two places below 2 ** 32 have one rank (Knuth, The Art of Computer Programming, volume 3, 6.4).
MULTIPLIER, MODULUS = 2_654_435_769, 2**32


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

    def choosable(self) -> Tensor:
        """Which blocks each query can choose, (B, S, M) bool: of its document, before its own block or its chunk."""
        blocks = torch.arange(self.landmarks.shape[1], device=self.landmarks.device)
        return (blocks >= self.first[..., None]) & (blocks < self.end[..., None])


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
    `TEXT_SAMPLED` of them, and besides, of those that count and are not among them, `REPEATED_SAMPLED` of the tokens
    that with the two before them stood already in a block that they can choose, and `ANSWERS_SAMPLED` of the `answers`.

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
        most += -(-len(cu_seqlens) // DOCUMENTS) * DOCUMENTS
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
    end = block - number

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
    text_blocks, text_first, text_end = (values.gather(1, order) for values in (block, first, end))
    is_text = torch.arange(width, device=device) < (~landmark).sum(1, keepdim=True)
    counts = is_text & known.gather(1, order)
    if joint:
        # A query of the first block, or chunk, has nothing to choose.
        counts = counts & (text_end > text_first)
        kinds = [(_repeated(input_ids.gather(1, order), text_first, text_blocks, text_end), REPEATED_SAMPLED)]
        if answers is not None:
            kinds.append((_near_answers((answers & known).gather(1, order)), ANSWERS_SAMPLED))
        draw = input_ids.sum(1, keepdim=True)
        for among, most_of_them in kinds:
            # None is asked twice, which says nothing new; gradients of one query would be added up in any order.
            left = counts.scatter(1, text, False)
            places, some = _drawn(among & left, most_of_them, draw)
            text, asked = torch.cat([text, places], 1), torch.cat([asked, some], 1)
    stream = order.gather(1, text)
    real = asked & counts.gather(1, text)
    ends = place.new_zeros(batch, most).scatter_add_(1, text_blocks, is_text.long()).cumsum(1)
    spans = torch.stack([nn.functional.pad(ends[:, :-1], (1, 0)), ends], -1)
    return Sample(
        text,
        stream,
        real,
        block.gather(1, stream),
        first.gather(1, stream),
        begin.gather(1, stream),
        text_blocks,
        spans,
        of_blocks(place.expand(batch, tokens)),
        block_size,
        joint,
        end.gather(1, stream),
        None if chunk is None else of_blocks(number),
    )


def _near_answers(answers: Tensor) -> Tensor:
    """Which tokens predict answers, or are among the QUESTION tokens before such; answers and they (B, n) bool."""
    ahead = nn.functional.pad(answers.float(), (0, QUESTION))
    return nn.functional.max_pool1d(ahead[:, None], QUESTION + 1, stride=1)[:, 0] > 0


def _repeated(ids: Tensor, first: Tensor, blocks: Tensor, end: Tensor) -> Tensor:
    """Which tokens stood before behind the same two tokens, in their document and in a block that they can choose:
    (B, n) bool. Where a text repeats itself is where a model looks far back. All (B, n) int64: ids; of each token its
    document's first block, its own block, and what is behind those that it can choose."""
    before, two_before = (nn.functional.pad(ids, (n, 0))[:, : ids.shape[1]] for n in (1, 2))
    # No vocabulary has 2 ** 21 tokens: three are one number.
    three = (two_before << 21 | before) << 21 | ids
    three[:, :2] = -1
    # Of those that are alike, each document's stand together, in their order.
    ordered, place = three.sort(dim=1, stable=True)
    document = first.gather(1, place)
    number = torch.arange(ids.shape[1], device=ids.device)
    others = (ordered[:, 1:] != ordered[:, :-1]) | (document[:, 1:] != document[:, :-1])
    begins = nn.functional.pad(others, (1, 0), value=True)
    # The one that stands first.
    foremost = place.gather(1, torch.where(begins, number, 0).cummax(1).values)
    earlier = (blocks.gather(1, foremost) < end.gather(1, place)) & (ordered >= 0)
    return torch.zeros_like(earlier).scatter_(1, place, earlier)


def _drawn(among: Tensor, most: int, draw: Tensor) -> tuple[Tensor, Tensor]:
    """At most so many of each row, as if drawn by the row's number: their places, (B, S) int64, and whether there is
    such a token (else the place is 0). among: (B, n) bool; draw: (B, 1) int64."""
    width = among.shape[1]
    place = torch.arange(width, device=among.device) + draw % (MODULUS // 4)
    rank = (place * MULTIPLIER % MODULUS + 1).double()
    best = torch.topk(rank * among, min(most, width), dim=1)
    some = best.values > 0
    return best.indices.masked_fill(~some, 0), some
