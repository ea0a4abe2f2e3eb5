"""Tensors as kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from .configuration import INTERPRETED


def operand(x: Tensor) -> Tensor:
    """x with a contiguous head dim, copied only where it is not; in float32 for Triton's interpreter if bfloat16."""
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()
