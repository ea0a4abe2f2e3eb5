"""Tensors as kernels take and give them."""

from __future__ import annotations

import torch
from torch import Tensor

from .configuration import INTERPRETED


def empty_heads_last(x: Tensor) -> Tensor:
    """An empty (B, H, T, D) like x that lies in memory as (B, T, H, D)."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty_strided((batch, heads, tokens, dim), (tokens * heads * dim, dim, heads * dim, 1))


def operand(x: Tensor) -> Tensor:
    """x with a contiguous head dim, copied only where it is not; in float32 for Triton's interpreter if bfloat16."""
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()
