"""Group dropout's random numbers: a function of (seed, row, block), so that any implementation can repeat them."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox_uniform(seed: int | Tensor, row: Tensor, block: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) from the Philox 4x32-10 counter (row, block, 0, 0) under the key `seed`.

    row, block: integer tensors that broadcast; row < 2**32, block < 2**32. Returns float32.
    The first of the four 32-bit words is used, its upper 24 bits over 2**24.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    row, block = torch.broadcast_tensors(row.long(), block.long())
    seed = int(seed)
    c0, c1, c2, c3 = row & _LOW, block & _LOW, torch.zeros_like(row), torch.zeros_like(row)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return (c0 >> 8).float() / (1 << 24)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit a and b; int64 holds only 63 bits, so b goes in halves."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def group_dropout_scale(seed: int | Tensor, p: float, shape: tuple[int, int, int], block: Tensor) -> Tensor:
    """Factor on each earlier block's share: 0 with probability p, otherwise 1 / (1 - p).

    shape: (B, H, T) of the queries, whose row number is (b * H + h) * T + t.
    block: (B or 1, N) number of each block within its document. Returns (B, H, T, N) float32.
    """
    rows = torch.arange(shape[0] * shape[1] * shape[2], device=block.device).view(*shape, 1)
    uniform = philox_uniform(seed, rows, block[:, None, None, :])
    return (uniform >= p).float() / (1.0 - p)


def layer_seed(seed: int | Tensor | None, layer: int) -> int | Tensor | None:
    """Another seed for every layer, so that what is lost or drawn in one layer need not be in the next."""
    return None if seed is None else (seed + layer * 0x9E3779B97F4A7C15 % (1 << 61)) % (1 << 62)
