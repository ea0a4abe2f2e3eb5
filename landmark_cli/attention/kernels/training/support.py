"""What the training kernels can serve."""

from __future__ import annotations

import torch

MAX_HEAD_DIM = 256
MAX_BLOCK_SIZE = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(dtype: torch.dtype, head_dim: int, block_size: int | None) -> str | None:
    """Why the Triton kernels cannot serve, naming the argument and what is allowed; None if they can. block_size: None
    where there are no blocks, as in a layer with a sliding window."""
    if dtype not in DTYPES:
        return f"q is {dtype}; the Triton kernels take {', '.join(map(str, DTYPES))}"
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        return f"q has head dim {head_dim}; the Triton kernels take multiples of 8 up to {MAX_HEAD_DIM}"
    if block_size is not None and not 2 <= block_size <= MAX_BLOCK_SIZE:
        return f"block_size is {block_size}; the Triton kernels take 2 to {MAX_BLOCK_SIZE}"
    return None
