"""Products of sampled queries (gate_queries.py) with keys, in float32: gate.py and straight_through.py form them."""

from __future__ import annotations

import torch
from torch import Tensor


def taken(x: Tensor, places: Tensor) -> Tensor:
    """x: (B, G, T, D); places: (B, S). Returns (B, G, S, D)."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def sampled(x: Tensor, places: Tensor) -> Tensor:
    """As `taken`, `widened`."""
    return widened(taken(x, places))


def widened(x: Tensor) -> Tensor:
    """x in float32, or float64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q: (..., B, H, S, D); k: (B, G, M, D). Returns (..., B, H, S, M)."""
    groups = k.shape[1]
    return (q.unflatten(-3, (groups, -1)) @ k.unsqueeze(2).transpose(-1, -2)).flatten(-4, -3) * scale
