"""What a tensor's bits add up to: the same on every device, and worked out where the tensor lies."""

from __future__ import annotations

import torch
from torch import Tensor

SUMMED = 1 << 22


@torch.no_grad()
def bit_sums(weight: Tensor) -> tuple[int, int]:
    """Two sums over a tensor's bits modulo 2^64: plain, and weighted by place."""
    flat = weight.detach().contiguous().reshape(-1).view(torch.uint8)
    if len(flat) % 8 == 0:
        # A view as wider numbers needs an aligned beginning.
        flat = (flat if flat.storage_offset() % 8 == 0 else flat.clone()).view(torch.int64)
    plain = weighted = 0
    for begin in range(0, len(flat), SUMMED):
        part = flat[begin : begin + SUMMED].to(torch.int64)
        place = torch.arange(begin, begin + len(part), device=part.device) * 0x9E3779B97F4A7C1 + 1
        plain, weighted = plain + int(part.sum()), weighted + int((part * place).sum())
    return plain % (1 << 64), weighted % (1 << 64)
