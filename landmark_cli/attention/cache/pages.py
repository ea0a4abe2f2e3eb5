"""Blocks in host memory: what the GPU then keeps of them, and how much host memory they take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from landmark_cli.errors import LandmarkError

if TYPE_CHECKING:
    from .cache import LayerBlocks

GIB = 2**30


@dataclass(frozen=True)
class Offload:
    """Keep the block cache in host memory; the GPU reads it there and keeps the blocks it used last.

    layers: of the model. resident_bytes: GPU memory for blocks kept there, all layers together.
    """

    layers: int
    resident_bytes: int = 2 * GIB

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Host memory that like's device can read; pinned where that is a GPU."""
        return torch.empty(shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)


class ResidentBlocks:
    """The blocks of one layer that the GPU holds copies of; the least recently used ones make room for others.

    A unit is one block of one key head of one row, numbered (row * G + head) * capacity + slot.

    pool: (places, 2, block_size, D). place: (units + 1,) int32, where in the pool a unit is, -1 where it is not.
    unit, used: (places + 1,) int32, which unit is in a place (-1: none) and when it was last used.
    The last entry of each is a dummy, so that everything below has a fixed shape and runs without the host.
    """

    def __init__(self, blocks: LayerBlocks):
        shape, like = blocks.blocks.shape, blocks.landmark_keys
        size = shape[3:].numel() * like.element_size()
        self.units = shape[:3].numel()
        self.places = max(1, min(self.units, blocks.offload.resident_bytes // blocks.offload.layers // size))
        self.pool = like.new_zeros(self.places, *shape[3:])

        def filled(count: int, value: int) -> Tensor:
            return torch.full((count + 1,), value, dtype=torch.int32, device=like.device)

        self.place, self.unit, self.used = filled(self.units, -1), filled(self.places, -1), filled(self.places, 0)
        self.now = torch.zeros((), dtype=torch.int32, device=like.device)

    def admit(self, needed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give needed units that are not in the pool a place, as far as there are places that this call does not need.

        needed: (units,) bool. Returns (units, places, count): the first `count` of `units` have to be copied to the
        first `count` of `places`; both (places,) int32, count a tensor without dimensions.
        """
        self.now += 1
        places, dummy_unit = self.places, self.units
        place = self.place[:-1]
        self.used[torch.where(needed & (place >= 0), place, places).long()] = self.now
        missing = needed & (place < 0)
        rank = missing.cumsum(0) - 1
        oldest = self.used[:-1].argsort(stable=True)
        count = torch.minimum(missing.sum(), (self.used[:-1] < self.now).sum())
        taken = torch.arange(places, device=needed.device) < count

        arriving = torch.full_like(self.unit, dummy_unit)
        target = torch.where(missing & (rank < count), rank, places)
        arriving[target] = torch.arange(self.units, dtype=torch.int32, device=needed.device)
        arriving = arriving[:-1]

        # A unit may have been overwritten since: then it has left its place already.
        leaving = self.unit[oldest]
        left = taken & (leaving >= 0) & (self.place[leaving.long()] == oldest)
        # Not by an index and "= -1", which would copy the number from the host and cannot be recorded.
        self.place.index_fill_(0, torch.where(left, leaving, dummy_unit).long(), -1)
        self.place[torch.where(taken, arriving, dummy_unit).long()] = oldest.int()
        self.unit[torch.where(taken, oldest, places)] = arriving
        self.used[torch.where(taken, oldest, places)] = self.now
        return arriving, oldest.int(), count


def require_host_memory(settings, config, tokens: int, batch: int, dtype: torch.dtype) -> None:
    """Raise LandmarkError where the blocks of `tokens` stream tokens a row will not fit into this machine's memory.

    settings: RetrievalSettings. config: the model's. Pinned memory is handed out in powers of two a layer.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    blocks = min(tokens // settings.block_size + 1, settings.retrievable)
    layer = batch * heads * blocks * 2 * settings.block_size * head_dim * dtype.itemsize
    needed, available = config.num_hidden_layers * (1 << (layer - 1).bit_length()), available_host_memory()
    if available is not None and needed > available:
        raise LandmarkError(
            f"offloading {tokens:,} tokens needs {needed / GIB:.1f} GiB of host memory, {available / GIB:.1f} GiB are "
            "available; read less, or keep fewer blocks with --cache-blocks"
        )


def available_host_memory() -> int | None:
    """Bytes that programs can still take, by the system's estimate; None where it gives none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return int(found["MemAvailable"]) * 1024 if "MemAvailable" in found else None
