"""Rotations by whole block slots, which put a query at the wanted distance from a block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rotary import rotation_table


class SlotRotations:
    """What all layers of a cache share of rotary embedding. frequencies: (rotary_dim / 2,) angle per position.

    replaced: how often a table has been replaced by a longer one.
    """

    def __init__(self, block_size: int, frequencies: Tensor):
        self.block_size = block_size
        self.replaced = 0
        self._frequencies = {frequencies.device: frequencies}
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def frequencies(self, device: torch.device) -> Tensor:
        """(rotary_dim / 2,) angle per position, on a device."""
        if device not in self._frequencies:
            self._frequencies[device] = next(iter(self._frequencies.values())).to(device)
        return self._frequencies[device]

    def by(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotations by so many block slots: slots.shape + (rotary_dim / 2,) each, float32."""
        return rotation_table(slots * self.block_size, self.frequencies(slots.device))

    def table(self, slots: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotations by 0, 1, .. block slots, (at least `slots`, rotary_dim / 2) each."""
        key = device, dtype
        if key not in self._tables or self._tables[key][0].shape[0] < slots:
            # A first one replaces nothing: what was recorded before knows nothing of it.
            self.replaced += key in self._tables
            cos, sin = self.by(torch.arange(1 << (slots - 1).bit_length(), device=device))
            self._tables[key] = cos.to(dtype), sin.to(dtype)
        return self._tables[key]
