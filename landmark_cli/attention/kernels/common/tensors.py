"""Tensors as kernels give them. Whoever attends gives the same, without Triton too, so nothing here imports it."""

from __future__ import annotations

from torch import Tensor


def empty_heads_last(x: Tensor, tokens: int | None = None) -> Tensor:
    """An empty (B, H, T, D) like x, or of so many tokens, that lies in memory as (B, T, H, D)."""
    batch, heads, length, dim = x.shape
    tokens = length if tokens is None else tokens
    return x.new_empty_strided((batch, heads, tokens, dim), (tokens * heads * dim, dim, heads * dim, 1))
