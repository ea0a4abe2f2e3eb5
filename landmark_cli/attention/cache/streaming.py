"""Offloaded layers on the GPU one after the other, each whole, for a passage that is read layer by layer.

A chunk's queries choose so many blocks that one chunk after the other would fetch most of a long text's blocks over the
bus for every chunk. A passage fetches each of them once for all of its chunks, in copies of whole rings that run while
the layer before still computes. What a layer does with its blocks is what it does where nothing is offloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from .blocks import LayerBlocks
from .chunk import Chunk
from .pages import ROOMS, Resident


class Streaming:
    """A passage's way through the layers.

    layers: by their numbers, all on one device, with room for all that the passage adds. chunks: of the passage.
    resident: which has rooms for them, see its `fits`.
    """

    def __init__(self, layers: Mapping[int, LayerBlocks], chunks: Sequence[Chunk], resident: Resident) -> None:
        self.layers, self.order = layers, sorted(layers)
        size = layers[self.order[0]].settings.block_size
        # Of each row the blocks that it has, the tail block too, and those that the passage writes to.
        self._held, self._written = {}, {}
        added = (sum(lengths) for lengths in zip(*(chunk.host_lengths for chunk in chunks), strict=True))
        counts = zip(chunks[0].host_rows, chunks[0].host_blocks, chunks[0].host_tail, added, strict=True)
        for row, blocks, tail, new in counts:
            self._held[row] = range(blocks + 1)
            self._written[row] = range(blocks, blocks + -(-(tail + new) // size) if new else blocks)
        largest = max((blocks.blocks for blocks in layers.values()), key=lambda blocks: blocks.nbytes)
        self._rooms = resident.rooms(largest)
        for blocks in layers.values():
            # The rooms are where their pages were.
            blocks.forget_pages()
        cuda = resident.device.type == "cuda"
        self._side = torch.cuda.Stream(resident.device) if cuda else None
        self._arrived: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        # Earlier chunks may still be writing to host memory, and whoever had the rooms' memory before to that.
        self._after_what_was_asked_for()
        self._fetch(self.order[0])

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """While this layer reads; every layer once, in the order of their numbers."""
        blocks, place = self.layers[index], self.order.index(index)
        room, arrived = self._arrived.pop(index)
        if arrived is not None:
            arrived.wait()
        if place + 1 < len(self.order):
            self._fetch(self.order[place + 1])
        with blocks.staged(room) as staged:
            yield
        self._after_what_was_asked_for()
        self._copy(blocks.blocks, staged, self._written)

    def end(self) -> None:
        """After the last layer: what the device computes next finds all in host memory."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)

    def _fetch(self, index: int) -> None:
        """Have a layer's blocks travel to the room that the layer before the last one has left."""
        source = self.layers[index].blocks
        room = self._rooms[self.order.index(index) % ROOMS][: source.numel()].view(source.shape)
        self._copy(room, source, self._held)
        self._arrived[index] = room, None if self._side is None else self._side.record_event()

    def _copy(self, to: Tensor, source: Tensor, numbers: Mapping[int, range]) -> None:
        """Copy blocks of each row, by their numbers, beside what the device computes."""
        capacity = to.shape[2]
        with self._beside():
            for row, range_ in numbers.items():
                for slots in _runs(range_, capacity):
                    for head in range(to.shape[1]):
                        to[row, head, slots].copy_(source[row, head, slots], non_blocking=True)

    def _beside(self) -> AbstractContextManager:
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def _after_what_was_asked_for(self) -> None:
        """Copies from now on come after all that the device has been asked to compute."""
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._side.device))


def _runs(numbers: range, capacity: int) -> Iterator[slice]:
    """The slots of blocks with these numbers, in runs; a ring that is full is one."""
    if len(numbers) >= capacity:
        yield slice(0, capacity)
        return
    at = numbers.start
    while at < numbers.stop:
        slot = at % capacity
        run = min(numbers.stop - at, capacity - slot)
        yield slice(slot, slot + run)
        at += run
