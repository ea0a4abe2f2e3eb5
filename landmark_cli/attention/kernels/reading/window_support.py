"""Which training windows the kernels can read."""

from __future__ import annotations

import torch
import triton

from .call import MAX_TOP_K

# Bytes of a block's keys and values, by those of a number. Backward holds them in one tile, and of float32, whose
# products are made of parts, several copies.
TILE_BYTES = {2: 128 << 10, 4: 64 << 10}


def why_not(dtype: torch.dtype, head_dim: int, block_size: int, top_k: int) -> str | None:
    """Why the kernels cannot read a window so, naming the argument and what is allowed; None if they can."""
    if top_k > MAX_TOP_K:
        return f"top_k is {top_k}; the Triton kernels retrieve at most {MAX_TOP_K} blocks"
    sizes = [triton.next_power_of_2(n) for n in (head_dim, block_size)]
    most = TILE_BYTES[dtype.itemsize]
    if 2 * sizes[0] * sizes[1] * dtype.itemsize > most:
        return (
            f"block_size is {block_size} with head dim {head_dim} of {dtype}; keys and values of a block take at most "
            f"{most >> 10} KiB in the Triton kernels that read training windows"
        )
    return None
