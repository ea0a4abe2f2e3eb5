"""The block cache: every layer's blocks, and how far each row of a batch has been read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from landmark_cli.errors import LandmarkError

from .blocks import HeldBlocks, LayerBlocks
from .chunk import Chunk, Passage
from .layer_window import HeldText, LayerWindow
from .pages import Offload, Resident
from .rotations import SlotRotations
from .settings import RetrievalSettings
from .streaming import Streaming
from .trace import Trace


class BlockCache:
    """The blocks of all layers of one model, and how far each row of the batch has been read. Layers that keep a
    sliding window have their newest text in place of blocks.

    inverse_frequencies: (rotary_dim / 2,) angle per position of the rotary embedding of the layers with landmarks.
    batch: rows. device: where the counters live (keys and values live where the model puts them).
    offload: keep blocks in host memory, see pages.Offload; landmark keys stay on the model's device, and so do windows.
    one_landmark: every landmark enters the model as the same vector, as a token id does. In the first layer, which has
    seen nothing else yet, all landmark keys are then one vector.

    trace: set to a trace.Trace to record which blocks queries read.
    asked_again: whether the row that was put last goes on from what it went on from before.
    generation: rises whenever tensors of the cache are replaced by larger ones.
    backends: names of those that have read.
    retrievals, dropped_retrievals: of models with a context-miss token, how many blocks queries chose, and how many of
    these a share under the cutoff dropped.

    Use: chunk = begin_chunk(lengths); model(ids, **inputs(chunk)); end_chunk(chunk). Several chunks in one call of the
    model: with passage([(lengths, width), ..]) as chunks: model(ids, **inputs(chunks)).
    """

    def __init__(
        self,
        settings: RetrievalSettings,
        inverse_frequencies: Tensor,
        *,
        batch: int = 1,
        device: torch.device | str = "cpu",
        offload: Offload | None = None,
        one_landmark: bool = False,
    ):
        self.settings = settings
        self.one_landmark = one_landmark
        self.device = torch.device(device)
        frequencies = inverse_frequencies.to(self.device)
        self.rotations = SlotRotations(settings.block_size, frequencies)
        # In a layer without positions blocks stand where they stand: every rotation is by an angle of 0.
        self.no_rotations = SlotRotations(settings.block_size, torch.zeros_like(frequencies))
        self.batch = batch
        self.offload = offload
        self.resident = None if offload is None else Resident(offload, self.device)
        self.trace: Trace | None = None
        self.backends: set[str] = set()
        self.expected_blocks = 0
        self.layers: dict[int, LayerBlocks] = {}
        self.windows: dict[int, LayerWindow] = {}
        self._replaced = 0
        # Of each row the complete blocks that room was last made behind, and for how many more; None where layers may
        # have changed since.
        self._reserved: tuple[list[int], list[int]] | None = None
        # Rows of a chunk that has been begun and is not counted as read.
        self._begun: set[int] = set()
        self._recalled = self.asked_again = False
        self._streaming: Streaming | None = None
        # By layer, what rows go on from and what has no place yet, blocks with the number of their first: what a layer
        # has is made when it is first used.
        self._waiting: dict[int, dict[int, tuple[int, HeldBlocks | HeldText]]] = {}
        self.reset()

    @property
    def generation(self) -> int:
        return self._replaced + self.rotations.replaced + self.no_rotations.replaced

    @property
    def fetching(self) -> bool:
        """Whether there are blocks that are fetched when they are first read."""
        # Asked before every token, and mostly for nothing.
        if self._recalled and not self._waiting:
            self._recalled = any(blocks.fetching for blocks in self.layers.values())
        return self._recalled

    def fetch_all(self) -> None:
        """Fetch what has not been read yet of what rows went on from."""
        self.asked_again = False
        for blocks in self.layers.values():
            blocks.fetch_all()

    def reset(self) -> None:
        """Forget everything read; the memory stays for the next text."""
        self.host_blocks = [0] * self.batch
        self.host_tail = [0] * self.batch
        self.retrievals = self.dropped_retrievals = 0
        for row in range(self.batch):
            self.forget(row)

    def forget(self, row: int) -> None:
        """Forget what one row has read."""
        self._reserved = None
        self._begun.discard(row)
        self.host_blocks[row] = self.host_tail[row] = 0
        for blocks in self.layers.values():
            blocks.forget(row)
        for waiting in self._waiting.values():
            waiting.pop(row, None)
        for window in self.windows.values():
            window.forget(row)

    def first_held(self, row: int) -> int:
        """The number of the oldest block of a row that can be retrieved, or of the incomplete one where none can."""
        return max(0, self.host_blocks[row] - self.settings.retrievable)

    def copy_of(self, row: int) -> list[HeldBlocks | HeldText]:
        """Of each layer a copy of what a row holds. Of blocks, zeros stand behind the last token read."""
        held: list[HeldBlocks | HeldText] = []
        for index in sorted(self.layers.keys() | self.windows.keys() | self._waiting.keys()):
            if row in self._waiting.get(index, {}):
                _, waiting = self._waiting[index][row]
                parts = (part.clone() if isinstance(part, Tensor) else part.whole() for part in waiting)
                held.append(type(waiting)(*parts))
                continue
            if index in self.windows:
                held.append(self.windows[index].copy_of(row))
                continue
            of_layer = self.layers[index].copy_of(row, self.first_held(row), self.host_blocks[row])
            of_layer.blocks[:, -1, :, self.host_tail[row] :] = 0
            of_layer.landmark_keys[:, -1] = 0
            held.append(of_layer)
        return held

    def put(self, row: int, held: Sequence[HeldBlocks | HeldText], blocks: int, tail: int) -> None:
        """Have a row go on as if it had read `blocks` complete blocks and `tail` tokens of one more, of which `held` is
        what `copy_of` gave, on any device. Blocks may lie in a source, from which they are fetched when they are first
        read; what fails then raises LandmarkError."""
        self.forget(row)
        self.asked_again = False
        added = [0] * self.batch
        for index, of_layer in enumerate(held):
            first = 0
            if isinstance(of_layer, HeldBlocks):
                added[row] = of_layer.blocks.shape[1]
                first = blocks + 1 - added[row]
                self._recalled |= not isinstance(of_layer.blocks, Tensor)
            if index in self.windows:
                self.windows[index].put(row, of_layer)
            elif index in self.layers:
                layer = self.layers[index]
                self._replaced += layer.make_room(self.host_blocks, added, self.expected_blocks)
                self.asked_again |= layer.put(row, first, of_layer)
            else:
                self._waiting.setdefault(index, {})[row] = first, of_layer
        self.host_blocks[row], self.host_tail[row] = blocks, tail

    def take(self, rows: Sequence[int]) -> None:
        """Row r becomes what row rows[r] is, as beams do in a beam search; there may be more or fewer rows than before.

        A trace says nothing of what was read until then.
        """
        if list(rows) == list(range(self.batch)):
            return
        self._reserved = None
        self._begun = {to for to, row in enumerate(rows) if row in self._begun}
        used = max(self.host_blocks) + 1
        for blocks in self.layers.values():
            blocks.take(rows, used)
        for window in self.windows.values():
            window.take(rows)
        self.host_blocks = [self.host_blocks[row] for row in rows]
        self.host_tail = [self.host_tail[row] for row in rows]
        for index, waiting in self._waiting.items():
            self._waiting[index] = {to: waiting[row] for to, row in enumerate(rows) if row in waiting}
        if len(rows) != self.batch:
            self.batch = len(rows)
            self._replaced += 1
        if self.trace is not None:
            self.trace.layers = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockCache:
        """A cache that has read the same and reads on by itself."""
        other = copy.copy(self)
        other.resident = copy.deepcopy(self.resident, memo)
        other.layers = {index: copy.deepcopy(blocks, memo) for index, blocks in self.layers.items()}
        other.windows = {index: copy.deepcopy(window, memo) for index, window in self.windows.items()}
        other.host_blocks, other.host_tail = list(self.host_blocks), list(self.host_tail)
        other._waiting = {index: dict(waiting) for index, waiting in self._waiting.items()}
        other._begun, other.backends = set(self._begun), set(self.backends)
        other.trace = None
        return other

    def expect(self, tokens: int) -> None:
        """Say how many stream tokens (landmarks too) the longest row will have in the end: room for all of them is then
        made at once, where doubling would hold up to twice as much, and old and new room at the same time."""
        self.expected_blocks = tokens // self.settings.block_size + 1

    def begin_chunk(self, lengths: Sequence[int], width: int | None = None, rows: Sequence[int] | None = None) -> Chunk:
        """Place the next chunk: `lengths` stream tokens (landmarks too) of each row, padded on the left to `width`.
        rows: those that the model is called with, in rising order, by default all; the others have no tokens."""
        lengths = list(lengths)
        width = max(lengths) if width is None else width
        if len(lengths) != self.batch or min(lengths) < 0 or max(lengths) > width or width == 0:
            raise ValueError(f"lengths {lengths} do not fit a chunk of {self.batch} rows of {width} tokens")
        rows = range(self.batch) if rows is None else rows
        if sum(lengths[row] for row in rows) != sum(lengths):
            raise ValueError(f"lengths {lengths} give tokens to rows that are not among {list(rows)}")
        self.begin(lengths)
        counters = torch.tensor(self.counts(lengths, width, rows), dtype=torch.int32)
        # Copied from pinned memory, so that the host need not wait for the device.
        counters = counters.pin_memory() if self.device.type == "cuda" else counters
        return self.chunk(lengths, width, rows, counters.to(self.device, non_blocking=True))

    def begin(self, lengths: Sequence[int]) -> None:
        """Say that layers are about to read a chunk of `lengths` stream tokens of each row; `advance` says that they
        have.

        Blocks of a chunk that fails in between are written to again by the next, but a window has rolled on. Raises
        LandmarkError where there are windows and such a row has not been forgotten, or put, since.
        """
        rows = {row for row, new in enumerate(lengths) if new}
        if self.windows and not rows.isdisjoint(self._begun):
            raise LandmarkError(
                "reading failed in the middle of a chunk, of which layers with a sliding window hold a part: reset the "
                "reader and read the text anew, or recall it"
            )
        self._begun |= rows

    def counts(self, lengths: Sequence[int], width: int, rows: Sequence[int]) -> list[list[int]]:
        """What the counters of the next chunk are; arguments as of `begin_chunk`."""
        start = [width - n for n in lengths]
        return [*([of_all[row] for row in rows] for of_all in (start, self.host_blocks, self.host_tail)), list(rows)]

    def chunk(self, lengths: Sequence[int], width: int, rows: Sequence[int], counters: Tensor) -> Chunk:
        """The next chunk, whose counters are on the device already; what it holds besides is worked out there."""
        if self.trace is not None:
            # A chunk that has no blocks to read leaves it empty.
            self.trace.layers = {}
        rotation = None
        if self.settings.positions == "absolute":
            rotation = self.rotations.by(counters[1])
        hosts = ([of_all[row] for row in rows] for of_all in (lengths, self.host_blocks, self.host_tail))
        return Chunk(width, *hosts, list(rows), self.settings.retrievable, counters, rotation)

    @contextmanager
    def passage(
        self, parts: Sequence[tuple[Sequence[int], int]], rows: Sequence[int] | None = None
    ) -> Iterator[Passage]:
        """The next chunks, (lengths, width) each and all of the same rows, as in `begin_chunk`, which are counted as
        read once the model has been called with them. Offloaded blocks are streamed to the device where
        `why_not_streamed` gives no reason."""
        total = [sum(lengths) for lengths in zip(*(lengths for lengths, _ in parts), strict=True)]
        self.reserve(total)
        before, chunks = (self.host_blocks, self.host_tail), []
        self.host_blocks, self.host_tail = map(list, before)
        try:
            for lengths, width in parts:
                chunks.append(self.begin_chunk(lengths, width, rows))
                self.advance(lengths)
        finally:
            self.host_blocks, self.host_tail = before
        self.begin(total)
        if self.offload is not None and self.why_not_streamed() is None:
            self._streaming = Streaming(self.layers, chunks, self.resident)
        try:
            yield Passage(chunks)
        finally:
            if self._streaming is not None:
                self._streaming.end()
            self._streaming = None
        for lengths, _ in parts:
            self.advance(lengths)

    def streamed(self, index: int) -> AbstractContextManager:
        """While layer `index` reads a passage: its blocks are on the device, where they are streamed."""
        streams = self._streaming is not None and index in self._streaming.layers
        return self._streaming.layer(index) if streams else nullcontext()

    def why_not_streamed(self) -> str | None:
        """Why offloaded layers cannot come to the device whole, one after the other; None if they can."""
        if not self.layers or any(self._waiting.values()):
            return "it is not known yet what layers hold"
        if self.fetching:
            return "blocks have still to be fetched"
        if {blocks.landmark_keys.device for blocks in self.layers.values()} != {self.device}:
            return "layers are spread over devices"
        if len({blocks.landmark_keys.dtype for blocks in self.layers.values()}) > 1:
            return "layers are of several dtypes"
        if not all(self.resident.fits(blocks.blocks) for blocks in self.layers.values()):
            return "layers take more than the memory for blocks on the device"
        return None

    def inputs(self, chunk: Chunk | Passage) -> dict[str, Any]:
        """What a model is called with, beside the tokens, to read a chunk."""
        return {"position_ids": chunk.position_ids, "landmark_cache": self, "landmark_chunk": chunk}

    def window_start(self, chunk: Chunk) -> Tensor:
        """(B,) where the window of retrieved blocks begins: one slot more than blocks are retrieved, before position 0.

        With absolute positions, where the row's stream begins.
        """
        settings = self.settings
        absolute = settings.positions == "absolute"
        slots = chunk.blocks if absolute else chunk.cached.clamp(max=settings.top_k) + 1
        return -slots * settings.block_size

    def layer(self, index: int, k: Tensor, chunk: Chunk, rotated: bool = True) -> LayerBlocks:
        """Layer `index`'s blocks with room for the chunk; made on first use, shaped after its keys k (B, G, T, D).
        rotated: it has positions."""
        self._reserved = None
        if index not in self.layers:
            one_key = self.one_landmark and index == 0
            rotations = self.rotations if rotated else self.no_rotations
            self.layers[index] = LayerBlocks(
                self.settings, self._of_all_rows(k), rotations, self.resident, len(self.layers), one_key
            )
        blocks = self.layers[index]
        # Rows that rest keep what they have; of chunks side by side the first begins, and the last ends.
        complete, added = list(self.host_blocks), [1] * self.batch
        more = self._added_blocks(chunk.host_lengths, chunk.host_tail)
        begins: dict[int, int] = {}
        for row, has, adds in zip(chunk.host_rows, chunk.host_blocks, more, strict=True):
            complete[row] = begins.setdefault(row, has)
            added[row] = has + adds - begins[row]
        self._replaced += blocks.reserve(complete, added, self.expected_blocks)
        for row, place in self._waiting.get(index, {}).items():
            blocks.put(row, *place)
        # Only now: where that fails, whoever reads on meets it again.
        self._waiting.pop(index, None)
        return blocks

    def window(self, index: int, k: Tensor, window: int) -> LayerWindow:
        """The newest text of layer `index`, which sees `window` text tokens; made as `layer` makes blocks."""
        if index not in self.windows:
            self.windows[index] = LayerWindow(window, self.settings.block_size, self._of_all_rows(k))
        for row, (_, held) in self._waiting.pop(index, {}).items():
            self.windows[index].put(row, held)
        return self.windows[index]

    def reserve(self, lengths: Sequence[int]) -> None:
        """Make room for a chunk of `lengths` stream tokens in every layer that has been used."""
        added = self._added_blocks(lengths, self.host_tail)
        # Most steps touch the blocks that the one before has touched, and asking every layer takes longer than all
        # else that the host does for a step.
        if self._reserved == (self.host_blocks, added):
            return
        for blocks in self.layers.values():
            self._replaced += blocks.reserve(self.host_blocks, added, self.expected_blocks)
        self._reserved = list(self.host_blocks), added

    def record(
        self, layer: int, chunk: Chunk, ages: Tensor | None, shares: Tensor | None, dropped: Tensor | None
    ) -> None:
        """Enter what a layer read of a chunk in the trace, if there is one, and count what a cutoff has dropped.

        ages: (B, H or 1, T or 1, k) int, None where nothing was retrieved; shares: (B, H, T, k); dropped: (B, H, T, k)
        bool, None but for a context-miss token.
        """
        if self.trace is not None and ages is not None:
            self.trace.record(layer, ages, shares, chunk.real, chunk.blocks)
        if dropped is not None:
            self.retrievals += int((ages > 0).sum() + dropped.sum())
            self.dropped_retrievals += int(dropped.sum())

    def end_chunk(self, chunk: Chunk) -> None:
        """Count the chunk as read, after every layer has seen it."""
        lengths = dict(zip(chunk.host_rows, chunk.host_lengths, strict=True))
        self.advance([lengths.get(row, 0) for row in range(self.batch)])

    def advance(self, lengths: Sequence[int]) -> None:
        """Count so many stream tokens of each row as read."""
        size = self.settings.block_size
        self._begun -= {row for row, new in enumerate(lengths) if new}
        for row, new in enumerate(lengths):
            total = self.host_tail[row] + new
            self.host_blocks[row] += total // size
            self.host_tail[row] = total % size

    def _of_all_rows(self, x: Tensor) -> Tensor:
        """A tensor, (n, ...), in the shape that it would have of all rows."""
        return x[:1].expand(self.batch, *x.shape[1:])

    def _added_blocks(self, lengths: Sequence[int], tail: Sequence[int]) -> list[int]:
        return [added_blocks(new, r, self.settings.block_size) for r, new in zip(tail, lengths, strict=True)]


def added_blocks(length: int, tail: int, block_size: int) -> int:
    """Blocks that a row touches in a chunk of `length` stream tokens behind `tail` tokens of an incomplete block, plus
    one: the next tail block."""
    return (tail + length) // block_size + 1
