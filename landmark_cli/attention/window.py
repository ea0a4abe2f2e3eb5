"""A batch of training windows that is to be read chunk by chunk: where its chunks and its blocks stand.

A model reads a text of any length in chunks, through a block cache (cache/). In training all chunks of a window are
there at once, and every layer works on all of them together: this says which chunk may retrieve which blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .cache.settings import Selection
from .dropout import layer_seed
from .rotary import rotation_table


@dataclass(frozen=True)
class WindowSettings:
    """How windows are read.

    chunk: stream tokens (landmarks included) of a chunk, in whole blocks. block_size: tokens a block, landmark
    included. top_k, selection: blocks retrieved per query, and who shares a selection (see RetrievalSettings).
    explore: probability that the last choice of a selection is a random block in place of the k-th best (see
    `ReadingWindow`). joint: all text that is read shares one softmax, and landmarks only choose blocks (see
    reference.landmark_attention).

    Raises ValueError naming a setting that cannot be.
    """

    chunk: int
    block_size: int
    top_k: int
    selection: Selection = "per_token_and_head"
    explore: float = 0.0
    joint: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size}; a text token and a landmark make it at least 2")
        if self.chunk < 1 or self.chunk % self.block_size:
            raise ValueError(f"chunk is {self.chunk}; it must be whole blocks of {self.block_size} tokens")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 or more")
        if self.selection not in get_args(Selection):
            raise ValueError(f"selection is {self.selection!r}; choose one of {', '.join(get_args(Selection))}")
        if not 0.0 <= self.explore <= 1.0:
            raise ValueError(f"explore is {self.explore}; a probability is between 0 and 1")

    @property
    def positions(self) -> int:
        """Positions that reading takes: top_k + 1 block slots and a chunk. Nothing stands further apart."""
        return (self.top_k + 1) * self.block_size + self.chunk


class ReadingWindow:
    """How a batch of windows, (B, N) stream tokens, is read chunk by chunk, and where its chunks and complete blocks
    stand. Made once for all layers, by `make`; tensors lie on the model's device.

    Every document of every row (a row without documents is one) is cut into chunks from its beginning on; the last
    chunk may be shorter. Blocks count from the document's beginning too, so a chunk begins with a new block. Queries of
    a chunk can retrieve the complete blocks of the chunks before it in its document.

    chunks: (R, 5) int32: batch row, first token, tokens (0: no chunk), first block (an index into `blocks`), earlier
    blocks: a chunk can retrieve the blocks first .. first + earlier - 1, which are in time order.
    blocks: (M, 3) int32: batch row (-1: no block), first token, number in its chunk (0, 1, ..). Complete blocks only,
    document by document, in time order; what is no block stands at the end.
    chunk_of: (B, N) int32, the chunk of each token (an index into `chunks`), -1 on padding.
    cos, sin: (top_k + 1 + chunk / block_size, rotary_dim / 2) float32, of the rotations by 0, 1, .. block slots.
    most_earlier: on the host, no chunk has more earlier blocks.
    even: rows are alike, without padding and documents. Then R = B * ceil(N / chunk) and M = B * (N // block_size), row
    by row, and every chunk and block is one.
    start: (B,) int32, the padding in front of each row; None where there is none.
    own_bounds: (R + 2,) int32, None where rows are even: cu_seqlens of attention within chunks, counted over all rows
    one after the other. What is before a row's first chunk is at the end of another row's last one, where nothing sees
    it.
    one_landmark: every landmark enters the model as the same vector (see BlockCache).
    explore_seed: the seed of exploring, a number or a tensor of one; None without.

    Positions: a token stands at its index in its chunk, and so are queries and keys rotated (`position_ids`). A block
    that is number c of its chunk and is to stand d slots before a query's chunk is reached by rotating the query by
    d + c block slots more.

    Exploring: for every selection, of query head h (the first of those that share it) and token t of the row (the
    chunk's first where tokens share it), with row number r = (b * H + h) * N + t and x(i) = the upper 24 bits of the
    Philox word of (r, i) under the layer's seed (`seed_of`; see dropout.py): where more than top_k blocks are earlier
    and x(0) < explore * 2**24, the k-th best block is replaced by the (x(1) * (earlier - top_k) >> 24)-th newest of the
    blocks that are not among the k best.
    """

    # No dataclass, for it is an argument of layers (see dispatch.landmark_attention_forward).
    def __init__(
        self,
        settings: WindowSettings,
        chunks: Tensor,
        blocks: Tensor,
        chunk_of: Tensor,
        cos: Tensor,
        sin: Tensor,
        most_earlier: int,
        even: bool,
        start: Tensor | None = None,
        one_landmark: bool = True,
        explore_seed: int | Tensor | None = None,
        own_bounds: Tensor | None = None,
    ) -> None:
        self.settings = settings
        self.chunks = chunks
        self.blocks = blocks
        self.chunk_of = chunk_of
        self.cos = cos
        self.sin = sin
        self.most_earlier = most_earlier
        self.even = even
        self.start = start
        self.one_landmark = one_landmark
        self.explore_seed = explore_seed
        self.own_bounds = own_bounds

    @classmethod
    def make(
        cls,
        settings: WindowSettings,
        batch: int,
        tokens: int,
        frequencies: Tensor,
        *,
        start: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        one_landmark: bool = True,
        explore_seed: int | Tensor | None = None,
    ) -> ReadingWindow:
        """The window of `batch` rows of `tokens` stream tokens. Nothing here waits for the device.

        frequencies: (rotary_dim / 2,) angle per position of the model's rotary embedding, on the model's device. start:
        (B,) first real token of each row (left padding). cu_seqlens: (n + 1,) boundaries of documents, counted over all
        rows one after the other: they rise from 0 to batch * tokens, and every row begins one. Documents may be empty.

        Raises ValueError where arguments exclude each other.
        """
        if start is not None and cu_seqlens is not None:
            raise ValueError("start and cu_seqlens exclude each other: packed rows have no padding")
        if settings.explore and explore_seed is None:
            raise ValueError("explore needs explore_seed, so that backward and other implementations can repeat it")
        device, size, chunk = frequencies.device, settings.block_size, settings.chunk
        # Of every document, (documents,) int64 each: its row, its first token there, its tokens.
        if cu_seqlens is not None:
            bounds = cu_seqlens.to(device=device, dtype=torch.int64)
            row, begin, length = bounds[:-1] // tokens, bounds[:-1] % tokens, bounds.diff()
        else:
            row = torch.arange(batch, device=device)
            begin = torch.zeros_like(row) if start is None else start.to(device=device, dtype=torch.int64)
            length = tokens - begin
        most = batch * -(-tokens // chunk) if cu_seqlens is None else batch * tokens // chunk + len(row)
        document, number, real = _count_off(-(-length // chunk), most)
        block_document, block_number, is_block = _count_off(length // size, batch * (tokens // size))
        first = number * chunk
        counts = length // size
        columns = (
            row[document],
            begin[document] + first,
            (length[document] - first).clamp(max=chunk) * real,
            (counts.cumsum(0) - counts)[document],
            number * (chunk // size) * real,
        )
        chunks = torch.stack(columns, dim=-1).int()
        blocks = torch.stack(
            (
                torch.where(is_block, row[block_document], -1),
                begin[block_document] + block_number * size,
                block_number % (chunk // size),
            ),
            dim=-1,
        ).int()
        # Where each chunk begins, counted over all rows; what is no chunk begins behind the last token.
        begins = torch.where(chunks[:, 2] > 0, chunks[:, 0].long() * tokens + chunks[:, 1], batch * tokens)
        index = torch.arange(batch * tokens, device=device)
        chunk_of = (torch.searchsorted(begins, index, right=True) - 1).view(batch, tokens)
        even = start is None and cu_seqlens is None
        if start is not None:
            chunk_of = chunk_of.masked_fill(torch.arange(tokens, device=device) < begin[:, None], -1)
        slots = torch.arange(settings.top_k + 1 + chunk // size, device=device)
        cos, sin = rotation_table(slots * size, frequencies)
        edges = begins.new_zeros(1), begins, begins.new_full((1,), batch * tokens)
        return cls(
            settings,
            chunks,
            blocks,
            chunk_of.int(),
            cos,
            sin,
            most_earlier=(tokens - 1) // chunk * (chunk // size),
            even=even,
            start=None if start is None else begin.int(),
            one_landmark=one_landmark,
            explore_seed=explore_seed if settings.explore else None,
            own_bounds=None if even else torch.cat(edges).int(),
        )

    @property
    def chunk(self) -> int:
        return self.settings.chunk

    @property
    def block_size(self) -> int:
        return self.settings.block_size

    @property
    def top_k(self) -> int:
        return self.settings.top_k

    @property
    def selection(self) -> Selection:
        return self.settings.selection

    @property
    def explore(self) -> float:
        return self.settings.explore

    @property
    def joint(self) -> bool:
        return self.settings.joint

    def by(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotations by so many block slots: slots.shape + (rotary_dim / 2,) each."""
        return self.cos[slots.abs()], self.sin[slots.abs()] * slots.sign().unsqueeze(-1)

    def seed_of(self, layer: int) -> int | Tensor | None:
        """The seed of exploring in a layer; None without."""
        return layer_seed(self.explore_seed, layer)

    @functools.cached_property
    def unrotated(self) -> ReadingWindow:
        """The same window for a layer without positions: every rotation is by an angle of 0."""
        return ReadingWindow(
            self.settings,
            self.chunks,
            self.blocks,
            self.chunk_of,
            torch.ones_like(self.cos),
            torch.zeros_like(self.sin),
            most_earlier=self.most_earlier,
            even=self.even,
            start=self.start,
            one_landmark=self.one_landmark,
            explore_seed=self.explore_seed,
            own_bounds=self.own_bounds,
        )

    @functools.cached_property
    def host_chunks(self) -> list[list[int]]:
        """`chunks` on the host. It waits for the device where rows are uneven, once for all layers."""
        if not self.even:
            return self.chunks.tolist()
        batch, tokens = self.chunk_of.shape
        blocks, blocks_of_chunk = tokens // self.block_size, self.chunk // self.block_size
        return [
            [row, first, min(self.chunk, tokens - first), row * blocks, first // self.chunk * blocks_of_chunk]
            for row in range(batch)
            for first in range(0, tokens, self.chunk)
        ]

    @property
    def position_ids(self) -> Tensor:
        """(B, N) int64: each token's index in its chunk, as the model's rotary embedding takes it; 0 on padding."""
        first = self.chunks[self.chunk_of.clamp(min=0).long(), 1]
        index = torch.arange(self.chunk_of.shape[1], device=first.device)
        return torch.where(self.chunk_of < 0, 0, index - first)


def _count_off(counts: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number `most` places through counts[0] things of the first document, counts[1] of the second and so on.

    counts: (documents,), with a sum of at most `most`. Returns for every place, (most,) each, its document, its number
    there, and whether there is such a thing; places that are left over stand at the end, as of document 0.
    """
    ends = counts.cumsum(0)
    place = torch.arange(most, device=counts.device)
    real = place < ends[-1:]
    document = torch.where(real, torch.searchsorted(ends, place, right=True), 0)
    return document, torch.where(real, place - (ends - counts)[document], 0), real
